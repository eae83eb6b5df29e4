// Where a task's claim is to be found, and whether the claimant lives: shared by those who claim slots and
// those who look for a task's slot.
#pragma once

#include <signal.h>
#include <sys/types.h>

#include <cerrno>
#include <cstdint>

namespace adaptive {

// A task claims the first free slot behind a place of its own, so that many starting at once do not fight over
// the same slots, and that others find it. Counted from 0.
inline uint32_t claim_place(uint32_t tid, uint32_t slots) noexcept {
    return static_cast<uint32_t>((tid * 2654435761ULL) >> 16) % slots;
}

// Whether there is a process or thread of that id in this pid namespace. A claim may say anything: kill() would
// take a negative number for a process group, and -1 for everybody.
inline bool task_exists(uint32_t tid) noexcept {
    const auto pid = static_cast<pid_t>(tid);
    return pid > 0 && (kill(pid, 0) == 0 || errno != ESRCH);
}

}  // namespace adaptive
