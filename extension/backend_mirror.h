#pragma once
/*
 * This server's use of the mirror: which source keeps it, this process's own slot in it, and the
 * owner-to-slot tables.
 *
 * Every process attaches at the first lock it acquires with a PGPROC of its own; the kernel (bpf) or the next
 * process with the same PGPROC (rseq) takes the slot back. When the mirror is unloaded the process notices,
 * goes on without a slot (owners are unknown then, and spins short), and attaches again once the mirror is
 * back. It looks for that once a second; for a slot in a full mirror less and less often, down to once a minute.
 *
 * Nothing here makes a system call while the process holds an LWLock, or waits for one. What takes system calls
 * is done at the end of a transaction; and outside of transactions, which some processes never have, at the
 * beginning of an acquire by a process that holds nothing.
 */

#include <atomic>

#include "mirror/mirror.h"
#include "server/server.h"

namespace adaptive::backend_mirror {

size_t shmem_bytes();
/// Postmaster: sets the shared tables up and opens the source that the settings ask for.
void shmem_startup();
/// Once per process tree, before any fork.
void register_callbacks();

struct Status {
    const char* source;         // bpf, rseq or off
    const char* source_reason;  // why it is not bpf, or null
    uint32_t slots_used, slots_total;
};
Status status();

struct BackendSlot {
    SlotId slot;  // 0: none
    SlotInfo info;
};
/// What the mirror says of a process, by the number of its PGPROC.
BackendSlot of_backend(int proc_number);

/// What is believed of a lock and has no room in it.
struct alignas(64) LockHints {
    SlotId spinner;           // who spins for it
    uint64_t spinning_since;  // since when, CycleClock ticks
    uint64_t woken_at;        // when a locker who waits for it was last woken, likewise
};

#pragma GCC visibility push(hidden)  // reached without a detour through the global offset table
namespace internal {
extern Mirror mirror;
extern MirrorTask task;
extern SlotId own_slot;
extern bool settled;  // there is nothing to look after at an acquire
void settle();
void lost();
void after_sleep();
constexpr size_t kLockHints = 256;
extern LockHints* lock_hints;
}  // namespace internal
#pragma GCC visibility pop

// ---- hot paths ----

/// Said at every acquire: "I run".
inline void note_running() {
    if (!internal::settled) [[unlikely]]
        internal::settle();
    if (!internal::task.note_running()) [[unlikely]]
        internal::lost();
}

inline SlotId slot() {
    return internal::own_slot;
}

inline SchedState look(SlotId slot) {
    return internal::mirror.look(slot);
}

/// This process has slept for a lock and runs again.
inline void note_slept() {
    internal::after_sleep();
}

/// Of the lock at this address. Locks share entries, and a lock in dynamic shared memory has another address in every
/// process: like everything about the mirror it is a hint.
inline LockHints& hints_of(const void* lock) {
    const uint64_t hash = reinterpret_cast<uint64_t>(lock) * 0x9E3779B97F4A7C15u;
    return internal::lock_hints[hash >> 56];
}

}  // namespace adaptive::backend_mirror
