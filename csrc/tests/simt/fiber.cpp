#include "simt/fiber.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <cstdint>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#define SIMT_ASAN
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SIMT_ASAN
#endif
#endif

#ifdef SIMT_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>

// Otherwise AddressSanitizer maps a second stack for every thread of every block, ten times as
// slow.
extern "C" const char* __asan_default_options() { return "detect_stack_use_after_return=0"; }
#else
#define __sanitizer_start_switch_fiber(save, bottom, size) ((void)(save), (void)(bottom))
#define __sanitizer_finish_switch_fiber(save, bottom, size) \
  ((void)(save), (void)(bottom), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(address, size)
#endif

// Both kinds of switch: save where we are in *from, go on where `to` was saved.
#if defined(__x86_64__) && !defined(SIMT_UCONTEXT)

// Unlike swapcontext it makes no system call, and leaves the red zones on the stacks to
// AddressSanitizer.
extern "C" void smartkv_simt_switch(void** from, void* to);
asm(R"(
.text
.type smartkv_simt_switch, @function
smartkv_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size smartkv_simt_switch, .-smartkv_simt_switch
)");

namespace {

void switch_context(void** from, void* to) { smartkv_simt_switch(from, to); }

void* make_context(char* stack, size_t size, void (*entry)()) {
  void** const top = reinterpret_cast<void**>(stack + size);
  top[-1] = nullptr;  // the return address of entry, for debuggers
  top[-2] = reinterpret_cast<void*>(entry);
  for (int i = 3; i <= 8; ++i) top[-i] = nullptr;
  return top - 8;
}

}  // namespace

#else

namespace {

void switch_context(void** from, void* to) {
  ucontext_t here;
  *from = &here;
  swapcontext(&here, static_cast<ucontext_t*>(to));
}

void* make_context(char* stack, size_t size, void (*entry)()) {
  ucontext_t* const context = new (stack) ucontext_t;
  getcontext(context);
  context->uc_stack.ss_sp = stack + sizeof(ucontext_t);
  context->uc_stack.ss_size = size - sizeof(ucontext_t);
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
  return context;
}

}  // namespace

#endif

namespace simt {
namespace {

constexpr size_t STACK_BYTES = 256 << 10;  // only the pages that are touched take memory
constexpr size_t GUARD_BYTES = 64 << 10;   // a page on every machine

Fiber* running = nullptr;
void* host_context = nullptr;
const void* host_stack = nullptr;
size_t host_stack_bytes = 0;

}  // namespace

Fiber::Fiber() : context_(nullptr), fake_stack_(nullptr), entry_(nullptr) {
  void* const mapped = mmap(nullptr, GUARD_BYTES + STACK_BYTES, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED) throw std::bad_alloc();
  mprotect(mapped, GUARD_BYTES, PROT_NONE);
  stack_ = static_cast<char*>(mapped) + GUARD_BYTES;
}

Fiber::~Fiber() {
  ASAN_UNPOISON_MEMORY_REGION(stack_, STACK_BYTES);
  munmap(stack_ - GUARD_BYTES, GUARD_BYTES + STACK_BYTES);
}

void Fiber::start(void (*entry)()) {
  ASAN_UNPOISON_MEMORY_REGION(stack_, STACK_BYTES);
  entry_ = entry;
  fake_stack_ = nullptr;
  context_ = make_context(stack_, STACK_BYTES, &Fiber::main);
}

void Fiber::resume() {
  running = this;
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, stack_, STACK_BYTES);
  switch_context(&host_context, context_);
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
  running = nullptr;
}

void Fiber::suspend() {
  Fiber* const fiber = running;
  __sanitizer_start_switch_fiber(&fiber->fake_stack_, host_stack, host_stack_bytes);
  switch_context(&fiber->context_, host_context);
  __sanitizer_finish_switch_fiber(fiber->fake_stack_, &host_stack, &host_stack_bytes);
}

void Fiber::main() {
  __sanitizer_finish_switch_fiber(nullptr, &host_stack, &host_stack_bytes);
  running->entry_();
  Fiber* const fiber = running;
  __sanitizer_start_switch_fiber(nullptr, host_stack, host_stack_bytes);  // nullptr: for good
  switch_context(&fiber->context_, host_context);
  __builtin_unreachable();
}

}  // namespace simt
