// A stack and the place where its execution goes on.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace fff::test {

class Fiber {
 public:
  // Of the caller's own stack.
  Fiber() = default;
  // `body` must not return but switch elsewhere for good, and must not throw.
  explicit Fiber(size_t stack_bytes) : stack_(new std::byte[stack_bytes]), bytes_(stack_bytes) {}
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Makes it go on at the start of `body`.
  void restart(std::function<void()> body);

  // Stops this fiber, which is running, and lets `next` go on until somebody switches back.
  // `for_good`: it will not go on but by a restart.
  void switch_to(Fiber& next, bool for_good = false);

 private:
  static void enter();
  void entered();

  std::unique_ptr<std::byte[]> stack_;
  size_t bytes_ = 0;
  std::function<void()> body_;
#if defined(__x86_64__)
  void* stack_pointer_ = nullptr;
#else
  ucontext_t context_;
#endif
  // What AddressSanitizer knows of this stack.
  void* shadow_ = nullptr;
  const void* bottom_ = nullptr;
  size_t size_ = 0;
};

}  // namespace fff::test
