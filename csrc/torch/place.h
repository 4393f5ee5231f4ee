// Where the tensors of a call are, and the kernels of that device.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "smartkv/params.h"

namespace smartkv::binding {

using torch::stable::Tensor;

// Kernels of CUDA devices, for the current one: they run on its current stream and take their
// workspaces from torch. Throws where this build, or this torch, has no CUDA.
const KernelTable& cuda_kernels();

class Place {
 public:
  // Of the first tensor of a call. Throws unless it is on the CPU or on a CUDA device.
  Place(const Tensor& tensor, const char* name);

  // Throws unless the tensor is in the same place.
  void check(const Tensor& tensor, const char* name) const;

  // On a GPU the host reads no values: kernels bring ids and lengths into range themselves.
  bool has_readable_values() const { return !is_cuda_; }

  // Runs an op, like run(&KernelTable::append_kv, params).
  template <typename Params>
  void run(void (*KernelTable::*op)(const Params&, const Parallel&), const Params& params) const {
    run_guarded(
        [](const KernelTable& kernels, const void* context, const Parallel& parallel) {
          const auto& call = *static_cast<const Call<Params>*>(context);
          (kernels.*call.op)(call.params, parallel);
        },
        Call<Params>{op, params});
  }

 private:
  template <typename Params>
  struct Call {
    void (*KernelTable::*op)(const Params&, const Parallel&);
    const Params& params;
  };
  using Invoke = void (*)(const KernelTable&, const void*, const Parallel&);

  template <typename Params>
  void run_guarded(Invoke invoke, const Call<Params>& call) const {
    run_here(invoke, &call);
  }
  void run_here(Invoke invoke, const void* call) const;

  bool is_cuda_;
  int32_t index_;  // of the CUDA device
};

}  // namespace smartkv::binding
