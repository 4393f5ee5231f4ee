#include "place.h"

#include <torch/csrc/stable/accelerator.h>

#include "checks.h"

namespace smartkv::binding {

Place::Place(const Tensor& tensor, const char* name) : is_cuda_(tensor.is_cuda()), index_(0) {
  binding::check(is_cuda_ || tensor.is_cpu(), name, " must be on the CPU or on a CUDA device");
  if (is_cuda_) index_ = tensor.get_device_index();
}

void Place::check(const Tensor& tensor, const char* name) const {
  if (!is_cuda_) {
    binding::check(tensor.is_cpu(), name, " must be on the CPU like the other tensors");
    return;
  }
  binding::check(tensor.is_cuda() && tensor.get_device_index() == index_, name,
                 " must be on cuda:", index_, " like the other tensors");
}

void Place::run_here(Invoke invoke, const void* call) const {
  if (!is_cuda_) return invoke(cpu_kernels(), call, torch_parallel());
  const torch::stable::accelerator::DeviceGuard guard(index_);
  invoke(cuda_kernels(), call, Parallel{});
}

#ifndef SMARTKV_WITH_CUDA
const KernelTable& cuda_kernels() {
  throw std::runtime_error("smartkv_ext was built without CUDA: rebuild it where nvcc is found");
}
#endif

}  // namespace smartkv::binding
