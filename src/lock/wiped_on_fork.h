#pragma once
/*
 * What a process knows of its own threads, and a forked child must not believe: memory that is zero in the child,
 * whatever made it (fork(), _Fork(), clone()). No handler has to run for that, and no lock is held over a fork.
 *
 *   struct alignas(kLargestPage) Known { … };      static, so that nobody else's data is wiped with it
 *   constinit Known known = {};
 *   wipe_on_fork(&known, sizeof(known));           once, in any process
 *
 * Source: madvise(2), MADV_WIPEONFORK (Linux 4.14). A child that shares its parent's memory is no forked one.
 */

#include <sys/mman.h>

#include <cstddef>

namespace adaptive {

#ifdef __aarch64__
inline constexpr size_t kLargestPage = 65536;
#else
inline constexpr size_t kLargestPage = 4096;
#endif

/// False, with errno: the kernel does not do that. Private memory only; pages that are wiped already stay so.
inline bool wipe_on_fork(void* memory, size_t bytes) noexcept {
    return madvise(memory, bytes, MADV_WIPEONFORK) == 0;
}

}  // namespace adaptive
