#pragma once
/* What is particular to PostgreSQL 15. Read in its lwlock.c, lwlock.h, proc.h. */

#include "lock/adaptive_lock.h"

namespace adaptive::server {

constexpr int kMajorVersion = 15;

constexpr StateBits kLockBits = {
    .has_waiters = 1u << 30,
    .release_ok = 1u << 29,
    .list_locked = 1u << 28,
    .spinner = 1u << 27,     // free in the server
    .until_free = 1u << 26,  // free in the server
    .exclusive = 1u << 24,
    .shared = 1,
    .held_mask = (1u << 25) - 1,
};

/// A variable guarded by an LWLock. Reads and writes are atomic because they are made with the wait list
/// locked.
using Variable = uint64;
inline uint64 read(const Variable* v) {
    return *const_cast<const volatile uint64*>(v);
}
inline void write(Variable* v, uint64 value) {
    *const_cast<volatile uint64*>(v) = value;
}

constexpr int kNobody = INVALID_PGPROCNO;
inline int proc_number(const PGPROC* proc) {
    return proc->pgprocno;
}
inline PGPROC* proc_by_number(int number) {
    return GetPGProcByNumber(number);
}

}  // namespace adaptive::server
