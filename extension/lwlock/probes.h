#pragma once
/*
 * The server's static probes, postgresql:lwlock__*, fired from the replacement with the server's arguments.
 *
 * They live in this module, so a tracer attaches to adaptive_lwlock.so under the same provider and names.
 * Each is guarded by a semaphore that the tracer raises; without one a probe costs a load and a branch.
 */

#define _SDT_HAS_SEMAPHORES 1  // each probe names its semaphore, or a tracer would not raise it
#include <sys/sdt.h>           // ahead of probes.h: it has templates, which must not be declared as C
extern "C" {
#include "utils/probes.h"
}

#include "protocol/queue_protocol.h"
#include "server/server.h"

namespace adaptive::probe {

inline const char* tranche_name(const LWLock& lock) {
    return GetLWLockIdentifier(PG_WAIT_LWLOCK, lock.tranche);
}

inline void acquired(const LWLock& lock, LWLockMode mode) {
    if (TRACE_POSTGRESQL_LWLOCK_ACQUIRE_ENABLED()) TRACE_POSTGRESQL_LWLOCK_ACQUIRE(tranche_name(lock), mode);
}
inline void released(const LWLock& lock) {
    if (TRACE_POSTGRESQL_LWLOCK_RELEASE_ENABLED()) TRACE_POSTGRESQL_LWLOCK_RELEASE(tranche_name(lock));
}
inline void wait_start(const LWLock& lock, LockMode mode) {
    if (TRACE_POSTGRESQL_LWLOCK_WAIT_START_ENABLED())
        TRACE_POSTGRESQL_LWLOCK_WAIT_START(tranche_name(lock), static_cast<LWLockMode>(mode));
}
inline void wait_done(const LWLock& lock, LockMode mode) {
    if (TRACE_POSTGRESQL_LWLOCK_WAIT_DONE_ENABLED())
        TRACE_POSTGRESQL_LWLOCK_WAIT_DONE(tranche_name(lock), static_cast<LWLockMode>(mode));
}
inline void conditionally_acquired(const LWLock& lock, LWLockMode mode) {
    if (TRACE_POSTGRESQL_LWLOCK_CONDACQUIRE_ENABLED())
        TRACE_POSTGRESQL_LWLOCK_CONDACQUIRE(tranche_name(lock), mode);
}
inline void conditional_acquire_failed(const LWLock& lock, LWLockMode mode) {
    if (TRACE_POSTGRESQL_LWLOCK_CONDACQUIRE_FAIL_ENABLED())
        TRACE_POSTGRESQL_LWLOCK_CONDACQUIRE_FAIL(tranche_name(lock), mode);
}
inline void acquired_or_waited(const LWLock& lock, LWLockMode mode) {
    if (TRACE_POSTGRESQL_LWLOCK_ACQUIRE_OR_WAIT_ENABLED())
        TRACE_POSTGRESQL_LWLOCK_ACQUIRE_OR_WAIT(tranche_name(lock), mode);
}
inline void acquire_or_wait_failed(const LWLock& lock, LWLockMode mode) {
    if (TRACE_POSTGRESQL_LWLOCK_ACQUIRE_OR_WAIT_FAIL_ENABLED())
        TRACE_POSTGRESQL_LWLOCK_ACQUIRE_OR_WAIT_FAIL(tranche_name(lock), mode);
}

}  // namespace adaptive::probe
