// Source `rseq`: the mirror inferred without privilege.
//
// Every task stores the CPU its rseq area shows, and its slot number in that CPU's "ran here last" entry,
// whenever one of them changed. A task is then known to be off CPU when
//   - it was last seen on the CPU that the reader runs on now,
//   - another task has since run on its CPU, or
//   - it says itself that it waits (its blocked word is not 0).
// Otherwise it is taken to run: a guess that misses owners whose CPU went to a task outside the table.
//
// The table lies in memory that the caller shares between its processes, at any address in each of them.
// Whatever it contains, reading it is safe: indexes are checked, and a blocked word is read only inside the
// range that this process named when it opened the table.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/rseq_area.h"
#include "mirror/sched_slot.h"

namespace adaptive {

struct RseqHeader {
    uint32_t magic, version, slots, cpus;
    uint8_t pad[48];
};

struct RseqSlot {
    uint32_t tid;         // 0: free (claimed slots); in the claimant's pid namespace
    uint32_t generation;  // + 1 at every attach
    uint32_t cpu_plus_1;  // 0: nobody here
    uint32_t unused;
    uint64_t blocked_word;  // address of a uint32_t, 0: none
    sched_whence whence;    // of a claimant
    uint8_t pad[32];
};

struct RseqCpu {
    uint32_t last_slot;
    uint8_t pad[60];
};

static_assert(sizeof(RseqHeader) == 64 && sizeof(RseqSlot) == 64 && sizeof(RseqCpu) == 64);

inline constexpr uint32_t kRseqMagic = 0x71657372U;  // "rseq"
inline constexpr uint32_t kRseqVersion = 2;

// Memory: header, slots - 1 tasks behind it (so that slot numbers index from the start), CPUs.
inline constexpr size_t rseq_table_bytes(uint32_t slots, uint32_t cpus) noexcept {
    return (static_cast<size_t>(slots) + cpus) * sizeof(RseqSlot);
}

void rseq_table_format(void* mem, uint32_t slots, uint32_t cpus) noexcept;
// Likewise, in memory that is zero.
void rseq_table_head(void* mem, uint32_t slots, uint32_t cpus) noexcept;

}  // namespace adaptive
