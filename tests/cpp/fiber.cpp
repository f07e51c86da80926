#include "fiber.h"

#include <cstdint>
#include <cstdlib>
#include <utility>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__)
// Unlike swapcontext it leaves the signal mask alone, which takes a system call.
extern "C" void fff_switch_stack(void** save, void* load);
asm(R"(
  .text
  .type fff_switch_stack, @function
fff_switch_stack:
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
  .size fff_switch_stack, .-fff_switch_stack
)");
#endif

namespace fff::test {
namespace {

Fiber* previous = nullptr;  // of the switch that is under way
Fiber* running = nullptr;

}  // namespace

void Fiber::restart(std::function<void()> body) {
  body_ = std::move(body);
  bottom_ = stack_.get();
  size_ = bytes_;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack_.get(), bytes_);  // frames that were left for good
#endif
#if defined(__x86_64__)
  const auto top = reinterpret_cast<uintptr_t>(stack_.get() + bytes_) / 16 * 16;
  void** slot = reinterpret_cast<void**>(top);
  *--slot = nullptr;  // where a return address would be
  *--slot = reinterpret_cast<void*>(&Fiber::enter);
  for (int saved_register = 0; saved_register < 6; ++saved_register) {
    *--slot = nullptr;
  }
  stack_pointer_ = slot;
#else
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack_.get();
  context_.uc_stack.ss_size = bytes_;
  context_.uc_link = nullptr;
  makecontext(&context_, &Fiber::enter, 0);
#endif
}

void Fiber::switch_to(Fiber& next, bool for_good) {
  previous = this;
  running = &next;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &shadow_, next.bottom_, next.size_);
#else
  static_cast<void>(for_good);
#endif
#if defined(__x86_64__)
  fff_switch_stack(&stack_pointer_, next.stack_pointer_);
#else
  swapcontext(&context_, &next.context_);
#endif
  entered();
}

void Fiber::entered() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(shadow_, &previous->bottom_, &previous->size_);
#endif
}

void Fiber::enter() {
  Fiber& self = *running;
  self.shadow_ = nullptr;
  self.entered();
  self.body_();
  std::abort();
}

}  // namespace fff::test
