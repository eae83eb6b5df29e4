// This thread's rseq area, as glibc registered it (restartable sequences, Linux 4.18; glibc 2.35).
// The kernel keeps the area's cpu_id true whenever the thread runs in user space: one load tells the CPU, no
// syscall.
//
// Thread safety: every function speaks of the calling thread only; the pointer lives as long as that thread.
// Source: rseq(2), glibc manual "Restartable Sequences".
#pragma once

#include <cstddef>
#include <cstdint>

#if __has_include(<sys/rseq.h>)
#include <sys/rseq.h>
#define ADAPTIVE_HAVE_RSEQ 1
#endif

namespace adaptive {

inline constexpr uint32_t kNoCpu = UINT32_MAX;

// The area's layout (struct rseq), as far as this library knows it. How much of it the running kernel keeps
// is the feature size in the auxiliary vector (AT_RSEQ_FEATURE_SIZE); glibc's own areas may be shorter.
struct RseqArea {
    uint32_t cpu_id_start;
    uint32_t cpu_id;   // negative as a signed number: not registered
    uint64_t rseq_cs;  // the critical section that the thread is in; the kernel clears it when it interrupts
    uint32_t flags;
    uint32_t node_id;  // from here on since Linux 6.3
    uint32_t mm_cid;
    uint32_t padding1;
};
static_assert(offsetof(RseqArea, cpu_id) == 4 && offsetof(RseqArea, rseq_cs) == 8);
static_assert(offsetof(RseqArea, mm_cid) == 24);

// Null: glibc has no rseq or was told not to register it (tunable glibc.pthread.rseq=0), the kernel refused
// it, or somebody unregistered this thread's.
inline volatile RseqArea* rseq_area() noexcept {
#ifdef ADAPTIVE_HAVE_RSEQ
    if (__rseq_size == 0) return nullptr;
    auto* area =
        reinterpret_cast<volatile RseqArea*>(static_cast<char*>(__builtin_thread_pointer()) + __rseq_offset);
    return static_cast<int32_t>(area->cpu_id) < 0 ? nullptr : area;
#else
    return nullptr;
#endif
}

// Where the kernel writes this thread's CPU number, or null, as above.
inline const volatile uint32_t* rseq_cpu_word() noexcept {
    const volatile RseqArea* area = rseq_area();
    return area != nullptr ? &area->cpu_id : nullptr;
}

// The CPU this thread runs on; already a past fact when it returns. kNoCpu without rseq.
inline uint32_t current_cpu() noexcept {
    const volatile uint32_t* word = rseq_cpu_word();
    return word != nullptr ? *word : kNoCpu;
}

}  // namespace adaptive
