// CUDA binding of merge_states. Compiled only where nvcc is found.
#include <torch/csrc/stable/accelerator.h>

#include <tuple>

#include "merge_input.h"
#include "cuda_ops.h"

// Lives in libtorch_cuda. Weak, so that this build also loads on a CPU-only torch, where it is
// null.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace smartkv::binding {
namespace {

std::tuple<Tensor, Tensor> merge_states(const Tensor& o, const Tensor& lse) {
  check(o.is_cuda() && lse.is_cuda() && o.get_device_index() == lse.get_device_index(),
        "o and lse must be on the same CUDA device");
  check(aoti_torch_get_current_cuda_stream != nullptr,
        "merge_states on CUDA needs a torch that was built with CUDA");
  const torch::stable::accelerator::DeviceGuard guard(o.get_device_index());
  MergeInput input = merge_input(o, lse);
  if (input.params.rows == 0) return {input.out, input.out_lse};
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(o.get_device_index(), &stream));
  const char* const error = merge_states_cuda(input.params, stream);
  check(error == nullptr, "merge_states could not be launched on CUDA: ", error ? error : "");
  return {input.out, input.out_lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(smartkv, CUDA, m) { m.impl("merge_states", TORCH_BOX(&merge_states)); }

}  // namespace smartkv::binding
