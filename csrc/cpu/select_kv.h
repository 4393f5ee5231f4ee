// Entry point of select_kv: plain C++ without kernel sets, shared by all kernel tables.
#pragma once

#include "smartkv/params.h"

namespace smartkv {

void select_kv_cpu(const SelectParams& params, const Parallel& parallel);

}  // namespace smartkv
