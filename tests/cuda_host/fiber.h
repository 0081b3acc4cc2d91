// Fibers: stacks that a thread switches between. On x86-64 a switch saves the registers that a
// function call preserves; elsewhere it is ucontext, which also makes a system call.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__x86_64__) && !defined(CUPAGED_HOST_UCONTEXT)

#include <xmmintrin.h>

struct Fiber {
    void* stack_pointer;
};

extern "C" void cupaged_host_switch(void** save, void* load);
asm(R"(
.pushsection .text
.type cupaged_host_switch, @function
.local cupaged_host_switch
cupaged_host_switch:
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    ret
.size cupaged_host_switch, .-cupaged_host_switch
.popsection
)");

inline void switch_fiber(Fiber& from, Fiber& to) {
    cupaged_host_switch(&from.stack_pointer, to.stack_pointer);
}

// `entry` runs at the first switch to the fiber and must not return.
inline void init_fiber(Fiber& fiber, char* stack_end, size_t, void (*entry)()) {
    // Six registers, the entry as return address, and a word that aligns the stack as after a call.
    void** const top = reinterpret_cast<void**>(stack_end) - 8;
    for (int i = 0; i < 8; ++i) top[i] = nullptr;
    top[6] = reinterpret_cast<void*>(entry);
    fiber.stack_pointer = top;
}

// Denormal floats are zeros while this lives, as the kernels are compiled with -ftz.
class FloatMode {
  public:
    FloatMode() { _mm_setcsr(old_ | 0x8040); }
    ~FloatMode() { _mm_setcsr(old_); }

  private:
    const unsigned old_ = _mm_getcsr();
};

#else

#include <ucontext.h>

struct Fiber {
    ucontext_t context;
};

inline void switch_fiber(Fiber& from, Fiber& to) {
    swapcontext(&from.context, &to.context);
}

inline void init_fiber(Fiber& fiber, char* stack_end, size_t stack_bytes, void (*entry)()) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stack_end - stack_bytes;
    fiber.context.uc_stack.ss_size = stack_bytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, entry, 0);
}

struct FloatMode {
    FloatMode() {}
};

#endif
