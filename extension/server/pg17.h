#pragma once
/* What is particular to PostgreSQL 17. Read in its lwlock.c, lwlock.h, proc.h, procnumber.h. */

#include "protocol/queue_protocol.h"

namespace adaptive::server {

constexpr StateBits kLockBits = {
    .has_waiters = 1u << 30,
    .release_ok = 1u << 29,
    .list_locked = 1u << 28,
    .spinner = 1u << 27,     // free in the server
    .until_free = 1u << 26,  // free in the server
    .free_since = 1u << 25,  // free in the server
    .exclusive = 1u << 24,
    .shared = 1,
    .held_mask = (1u << 25) - 1,
};

using Variable = pg_atomic_uint64;
inline std::atomic_ref<uint64> value_of(Variable* v) {
    return std::atomic_ref<uint64>(const_cast<uint64&>(v->value));
}

constexpr Disown* kDisown = nullptr;
constexpr ReleaseDisowned* kReleaseDisowned = nullptr;

constexpr int kNobody = INVALID_PROC_NUMBER;
inline int proc_number(const PGPROC* proc) {
    return GetNumberFromPGProc(proc);
}

}  // namespace adaptive::server
