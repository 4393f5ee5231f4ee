// Scratch memory of the kernels. Compiled once, without ISA flags: allocation happens on the
// calling thread, so that no exception can arise inside a Parallel body.
#pragma once

#include <cstddef>

namespace smartkv {

// 64-byte aligned, uninitialised, released on destruction. Throws std::bad_alloc.
class Scratch {
 public:
  explicit Scratch(size_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  char* data() const { return data_; }

 private:
  char* data_;
};

}  // namespace smartkv
