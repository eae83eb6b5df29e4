// A thread's rseq area as it is registered with the kernel, and how it is taken to another place.
//
// The number of bytes says what the kernel may keep there: with fewer than before a thread would lose what the C
// library and others rely on (Linux 7.1 and later keep the newer fields only of larger areas). The kernel takes an
// area back only with the number that it was registered with; so what is registered anew here is never less.
#pragma once

#include <sys/auxv.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>

#include "base/rseq_area.h"

namespace adaptive {

// Tests put an area and a kernel of their own here.
struct RseqRegistration {
    volatile RseqArea* area;
    uint32_t bytes;
    int (*call)(volatile RseqArea* area, uint32_t bytes, bool on);  // registers or unregisters; 0 or errno

    static RseqRegistration of_this_thread() noexcept {
#ifdef ADAPTIVE_HAVE_RSEQ
        // glibc 2.40 registers as much as the kernel names, rounded up to its alignment; at least, and before, 32.
        constexpr unsigned long kAuxAlignment = 28;  // AT_RSEQ_ALIGN, Linux 6.3
        const auto alignment = static_cast<uint32_t>(getauxval(kAuxAlignment));
        uint32_t bytes = 32;
        if (__rseq_size > bytes && alignment != 0)
            bytes = (__rseq_size + alignment - 1) / alignment * alignment;
        return {rseq_area(), bytes, [](volatile RseqArea* area, uint32_t bytes, bool on) {
                    constexpr int kUnregister = 1;
                    return syscall(SYS_rseq, area, bytes, on ? 0 : kUnregister, RSEQ_SIG) == 0 ? 0 : errno;
                }};
#else
        return {nullptr, 0, [](volatile RseqArea*, uint32_t, bool) { return ENOSYS; }};
#endif
    }

    // 0, or errno, and then the area is where it was.
    int move_to(volatile RseqArea* other) const noexcept {
        if (const int problem = call(area, bytes, false); problem != 0) return problem;
        const int problem = call(other, bytes, true);
        if (problem != 0) call(area, bytes, true);
        return problem;
    }
};

}  // namespace adaptive
