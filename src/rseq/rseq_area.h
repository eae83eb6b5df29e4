// This thread's rseq area, as glibc registered it (restartable sequences, Linux 4.18; glibc 2.35).
// The kernel keeps the area's cpu_id true whenever the thread runs in user space: one load tells the CPU, no
// syscall.
//
// Thread safety: every function speaks of the calling thread only; the pointer lives as long as that thread.
// Source: rseq(2), glibc manual "Restartable Sequences".
#pragma once

#include <cstdint>

#if __has_include(<sys/rseq.h>)
#include <sys/rseq.h>
#define ADAPTIVE_HAVE_RSEQ 1
#endif

namespace adaptive {

inline constexpr uint32_t kNoCpu = UINT32_MAX;

// Where the kernel writes this thread's CPU number, or null: glibc has no rseq or was told not to register it
// (tunable glibc.pthread.rseq=0), or the kernel refused it.
inline const volatile uint32_t* rseq_cpu_word() noexcept {
#ifdef ADAPTIVE_HAVE_RSEQ
    if (__rseq_size == 0) return nullptr;
    auto* area =
        reinterpret_cast<struct rseq*>(static_cast<char*>(__builtin_thread_pointer()) + __rseq_offset);
    const volatile uint32_t* word = &area->cpu_id;
    // Negative: this thread's registration failed or has not happened.
    return static_cast<int32_t>(*word) < 0 ? nullptr : word;
#else
    return nullptr;
#endif
}

// The CPU this thread runs on; already a past fact when it returns. kNoCpu without rseq.
inline uint32_t current_cpu() noexcept {
    const volatile uint32_t* word = rseq_cpu_word();
    return word != nullptr ? *word : kNoCpu;
}

}  // namespace adaptive
