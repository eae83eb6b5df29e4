#pragma once
/*
 * The server's headers, as C, and the one header that knows this major version.
 *
 * A version header defines, in namespace adaptive::server:
 *   kMajorVersion, kLockBits            the major version; the bits of LWLock.state
 *   Variable                            what LWLockWaitForVar() and friends watch, with read()/write()
 *   kNobody, proc_number(), proc_by_number()    how the wait list names a PGPROC
 * Whoever supports a new major version writes such a header and lists it here; nothing else asks for the
 * version.
 */

extern "C" {
#include "postgres.h"

#include "fmgr.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "port/atomics.h"
#include "storage/ipc.h"
#include "storage/lwlock.h"
#include "storage/pg_sema.h"
#include "storage/proc.h"
#include "storage/proclist.h"
#include "storage/s_lock.h"
#include "storage/shmem.h"
#include "utils/builtins.h"
#include "utils/guc.h"
#include "utils/wait_event.h"
}

#include <cstddef>

#if PG_VERSION_NUM >= 150000 && PG_VERSION_NUM < 160000
#include "pg15.h"
#else
#error "adaptive_lwlock does not know this major version of PostgreSQL; it knows 15"
#endif

namespace adaptive::server {

// The owner's slot number is kept in the hole between LWLock.tranche and LWLock.state.
constexpr size_t kOwnerOffset = 2;
static_assert(offsetof(LWLock, tranche) == 0 && sizeof(LWLock::tranche) == 2);
static_assert(offsetof(LWLock, state) == 4 && offsetof(LWLock, waiters) == 8 && sizeof(LWLock) == 16);
static_assert(sizeof(pg_atomic_uint32) == 4);

}  // namespace adaptive::server
