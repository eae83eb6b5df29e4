#pragma once
/*
 * Something that happens behind any one instruction of what a thread does next: a window of one instruction
 * is hit as often as any other.
 *
 * x86-64: by the trap flag, about a microsecond an instruction. On other machines programs cannot single-step
 * themselves, and nothing ever happens.
 */

#include <cerrno>
#include <csignal>
#include <cstdint>

#if defined(__x86_64__)
#include <ucontext.h>
#include <x86intrin.h>
#endif

namespace torture {

class SingleStep {
  public:
    /// Once in a process. `happens` runs in a signal handler.
    static void install(void (*happens)()) {
        happens_ = happens;
#if defined(__x86_64__)
        struct sigaction action = {};
        action.sa_sigaction = trap;
        action.sa_flags = SA_SIGINFO | SA_RESTART;
        sigaction(SIGTRAP, &action, nullptr);
#endif
    }

    /// It happens behind so many instructions (above 0), unless end() comes first.
    static void begin(uint32_t instructions) {
        left_ = instructions;
        set_trap_flag(true);
    }
    static void end() {
        if (left_ == 0) return;
        left_ = 0;
        set_trap_flag(false);
    }

  private:
#if defined(__x86_64__)
    static constexpr long long kTrapFlag = 0x100;

    [[gnu::always_inline]] static void set_trap_flag(bool on) {
        const auto flags = __readeflags();
        __writeeflags(on ? flags | kTrapFlag : flags & ~kTrapFlag);
    }
    static void trap(int, siginfo_t*, void* context) {
        const int errno_before = errno;
        if (left_ == 0 || --left_ == 0) {
            static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_EFL] &= ~kTrapFlag;
            happens_();
        }
        errno = errno_before;
    }
#else
    static void set_trap_flag(bool) {}
#endif

    static inline void (*happens_)() = nullptr;
    static inline thread_local uint32_t left_ = 0;
};

}  // namespace torture
