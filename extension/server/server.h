#pragma once
/*
 * The server's headers, as C, and the one header that knows this major version.
 *
 * A version header defines, in namespace adaptive::server:
 *   kLockBits                    the bits of LWLock.state
 *   Variable, value_of()         what LWLockWaitForVar() and friends watch
 *   kDisown, kReleaseDisowned    these functions of the server, or null where it has none
 *   kNobody, proc_number()       how the wait list names a PGPROC
 * Whoever supports a new major version writes such a header and lists it here. Nothing else asks for the
 * version: for one without a header pgNN.h the Makefile builds unknown_version.cpp instead of the module.
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

#include <atomic>
#include <cstddef>

namespace adaptive::server {

// Since version 18.
using Disown = void(LWLock* lock);
using ReleaseDisowned = void(LWLock* lock, LWLockMode mode);

}  // namespace adaptive::server

#if PG_MAJORVERSION_NUM == 15
#include "pg15.h"
#elif PG_MAJORVERSION_NUM == 17
#include "pg17.h"
#elif PG_MAJORVERSION_NUM == 18
#include "pg18.h"
#else
#error "no header for this major version of PostgreSQL"
#endif

namespace adaptive::server {

// The owner's slot number is kept in the hole between LWLock.tranche and LWLock.state.
constexpr size_t kOwnerOffset = 2;
static_assert(offsetof(LWLock, tranche) == 0 && sizeof(LWLock::tranche) == 2);
static_assert(offsetof(LWLock, state) == 4 && offsetof(LWLock, waiters) == 8 && sizeof(LWLock) == 16);
static_assert(sizeof(pg_atomic_uint32) == 4);

}  // namespace adaptive::server
