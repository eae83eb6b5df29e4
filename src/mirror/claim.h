// Where a task's claim is to be found, and whether the claimant lives: shared by those who claim slots and
// those who look for a task's slot.
#pragma once

#include <signal.h>
#include <sys/types.h>

#include <cerrno>
#include <cstdint>

namespace adaptive {

// A claimant looks at so many slots, and so do those who look for one.
inline constexpr uint32_t kClaimLooks = 64;

// A task claims the first free slot behind a place of its own, so that many starting at once do not fight over
// the same slots, and that others find it. Counted from 0. The places of consecutive numbers lie as far from each
// other as can be (Knuth, TAOCP 3, 6.4: Fibonacci hashing), whatever the number of slots.
inline uint32_t claim_place(uint32_t tid, uint32_t slots) noexcept {
    return static_cast<uint32_t>((uint64_t{tid * 2654435769U} * slots) >> 32);
}

// Whether a task of any pid namespace may have that id. No kernel gives higher ones (proc(5): pid_max).
inline bool is_task_id(uint32_t tid) noexcept {
    return tid != 0 && tid <= 1U << 22;
}

// Whether there is a process or thread of that id in this pid namespace. A claim may say anything: kill() would
// take a negative number for a process group, and -1 for everybody.
inline bool task_exists(uint32_t tid) noexcept {
    const auto pid = static_cast<pid_t>(tid);
    return pid > 0 && (kill(pid, 0) == 0 || errno != ESRCH);
}

}  // namespace adaptive
