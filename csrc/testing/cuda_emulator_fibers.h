// What the CUDA emulator stands on: stacks, the switch from one to another, and what the sanitizers must
// be told of it. Everything runs on one OS thread, so a switch is a function call that returns elsewhere.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <new>

#if defined(__x86_64__) && defined(__ELF__) && !defined(FASTSEQ_EMULATOR_UCONTEXT)
#define FASTSEQ_EMULATOR_FAST_SWITCH 1
#else
#include <ucontext.h>
#endif

// g++ says so by a macro, clang by a feature.
#if defined(__has_feature)
#define FASTSEQ_HAS_FEATURE(x) __has_feature(x)
#else
#define FASTSEQ_HAS_FEATURE(x) 0
#endif
#if defined(__SANITIZE_ADDRESS__) || FASTSEQ_HAS_FEATURE(address_sanitizer)
#define FASTSEQ_EMULATOR_ASAN 1
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__) || FASTSEQ_HAS_FEATURE(thread_sanitizer)
#define FASTSEQ_EMULATOR_TSAN 1
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
// A function whose own reads and writes the thread sanitizer does not see, and whose caller does not take
// it in.
#define FASTSEQ_UNTRACKED __attribute__((no_sanitize("thread"), noinline))
#else
#define FASTSEQ_UNTRACKED
#endif

namespace fastseq::emulator {

#if defined(FASTSEQ_EMULATOR_ASAN)
constexpr bool kAddressSanitizer = true;
#else
constexpr bool kAddressSanitizer = false;
#endif

// ---- the thread sanitizer --------------------------------------------------------------------------------

#if defined(FASTSEQ_EMULATOR_TSAN)
constexpr bool kThreadSanitizer = true;
// While it lives, the sanitizer ignores what this fiber reads and writes: the emulator's own state is
// shared by all fibers, and only the kernel's memory is to be judged.
struct Untracked {
  Untracked() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Untracked() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
  Untracked(const Untracked&) = delete;
};
// What a fiber did before release(x) happened before what another does after acquire(x).
inline void release(void* at) { __tsan_release(at); }
inline void acquire(void* at) { __tsan_acquire(at); }
#else
constexpr bool kThreadSanitizer = false;
struct Untracked {
  Untracked() {}  // not trivial, so that it counts as used
};
inline void release(void*) {}
inline void acquire(void*) {}
#endif

// ---- stacks and switches ---------------------------------------------------------------------------------

// A stack of its own between two pages that nobody may touch, so that an overflow is a crash at its place.
class Stack {
 public:
  Stack() : page_(static_cast<size_t>(sysconf(_SC_PAGESIZE))) {
    memory_ =
        mmap(nullptr, kBytes + 2 * page_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory_ == MAP_FAILED || mprotect(bottom(), kBytes, PROT_READ | PROT_WRITE) != 0)
      throw std::bad_alloc();
  }
  ~Stack() { munmap(memory_, kBytes + 2 * page_); }
  Stack(const Stack&) = delete;
  char* bottom() const { return static_cast<char*>(memory_) + page_; }
  char* top() const { return bottom() + kBytes; }
  static constexpr size_t kBytes = size_t{128} << 10;

 private:
  size_t page_;
  void* memory_;
};

#if defined(FASTSEQ_EMULATOR_FAST_SWITCH)
// Pushes what a call must preserve, leaves the stack pointer at *from, and goes on with what `to` had
// left. A tenth of swapcontext's time, which calls the kernel for the signal mask.
extern "C" void fastseq_switch_stack(void** from, void* to);
asm(R"(
.pushsection .text
.weak fastseq_switch_stack
.hidden fastseq_switch_stack
.type fastseq_switch_stack, @function
fastseq_switch_stack:
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
.size fastseq_switch_stack, .-fastseq_switch_stack
.popsection
)");
#endif

// A place to come back to: a point of execution on some stack.
class Fiber {
 public:
  Fiber() = default;
  Fiber(const Fiber&) = delete;
#if defined(FASTSEQ_EMULATOR_TSAN)
  ~Fiber() {
    if (owns_) __tsan_destroy_fiber(tsan_);
  }
#endif

  // `entry` will run on the stack at the first switch to this fiber. It must not return.
  void prepare(const Stack& stack, void (*entry)()) {
    bottom_ = stack.bottom();
    size_ = Stack::kBytes;
#if defined(FASTSEQ_EMULATOR_FAST_SWITCH)
    void** top = reinterpret_cast<void**>(stack.top());
    *--top = nullptr;  // entry's return address: the end of every backtrace
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    stack_pointer_ = top;
#else
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack.bottom();
    context_.uc_stack.ss_size = Stack::kBytes;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
#endif
#if defined(FASTSEQ_EMULATOR_TSAN)
    tsan_ = __tsan_create_fiber(0);
    owns_ = true;
#endif
  }

  // To be called by the fiber that runs; returns when someone switches back to it.
  FASTSEQ_UNTRACKED void switch_to(Fiber& to) {
#if defined(FASTSEQ_EMULATOR_TSAN)
    if (!owns_) tsan_ = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(to.tsan_, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(FASTSEQ_EMULATOR_ASAN)
    came_from() = this;
    __sanitizer_start_switch_fiber(&fake_stack_, to.bottom_, to.size_);
#endif
#if defined(FASTSEQ_EMULATOR_FAST_SWITCH)
    fastseq_switch_stack(&stack_pointer_, to.stack_pointer_);
#else
    swapcontext(&context_, &to.context_);
#endif
    arrived();
  }

  // To be called first thing by an entry; `switch_to` does it for those that come back.
  void arrived() {
#if defined(FASTSEQ_EMULATOR_ASAN)
    Fiber& last = *came_from();
    __sanitizer_finish_switch_fiber(fake_stack_, &last.bottom_, &last.size_);
#endif
  }

 private:
#if defined(FASTSEQ_EMULATOR_ASAN)
  static Fiber*& came_from() {
    static thread_local Fiber* fiber = nullptr;
    return fiber;
  }
  void* fake_stack_ = nullptr;
#endif
#if defined(FASTSEQ_EMULATOR_TSAN)
  void* tsan_ = nullptr;
  bool owns_ = false;
#endif
#if defined(FASTSEQ_EMULATOR_FAST_SWITCH)
  void* stack_pointer_ = nullptr;
#else
  ucontext_t context_;
#endif
  const void* bottom_ = nullptr;
  size_t size_ = 0;
};

}  // namespace fastseq::emulator
