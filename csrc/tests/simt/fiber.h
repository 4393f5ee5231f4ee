// A stack of its own for every CUDA thread, switched by hand: threads of a block take turns on one
// OS thread.
#pragma once

#include <cstddef>

namespace simt {

class Fiber {
 public:
  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // The next resume() calls entry(). What the fiber was doing until then is dropped, not unwound.
  void start(void (*entry)());
  // Runs the fiber until it calls suspend() or its entry returns. It must not throw.
  void resume();
  // Back to the caller of resume(). Called on a fiber.
  static void suspend();

 private:
  static void main();

  char* stack_;       // below it lies a page that faults
  void* context_;     // where the fiber was suspended
  void* fake_stack_;  // AddressSanitizer's
  void (*entry_)();
};

}  // namespace simt
