// What this CPU offers and which kernel set runs.
#pragma once

#include <string>
#include <vector>

namespace smartkv {

// Names of the detected instruction set extensions that a kernel set cares about.
std::vector<std::string> cpu_features();

// Kernel sets that this CPU can run, best first.
std::vector<std::string> available_kernel_sets();

// Name of the set that cpu_kernels() returns; throws like it.
const char* kernel_set_name();

struct KernelTable;

// The named set; throws std::runtime_error if it is unknown or cannot run here.
const KernelTable& kernel_set(const std::string& name);

}  // namespace smartkv
