// Launchers of the CUDA kernels: no torch, no CUDA header, so that any compiler can include it.
#pragma once

#include "smartkv/params.h"

namespace smartkv {

// Pointers of `params` are on the current device. Returns nullptr, or what the launch failed with.
const char* merge_states_cuda(const MergeStatesParams& params, void* stream);

}  // namespace smartkv
