#include "memory.h"

#include <new>

namespace smartkv {

constexpr std::align_val_t SCRATCH_ALIGNMENT{64};

Scratch::Scratch(size_t bytes)
    : data_(static_cast<char*>(::operator new(bytes + 64, SCRATCH_ALIGNMENT))) {}

Scratch::~Scratch() { ::operator delete(data_, SCRATCH_ALIGNMENT); }

}  // namespace smartkv
