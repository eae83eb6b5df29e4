/*
 * Gives a lock away, as an asynchronous I/O does with the lock of a buffer: one process takes it, another one releases it.
 * Preloaded; every function of it returns whether this process holds the lock.
 */
#include "postgres.h"

#include "fmgr.h"
#include "miscadmin.h"
#include "storage/ipc.h"
#include "storage/lwlock.h"

PG_MODULE_MAGIC;

PG_FUNCTION_INFO_V1(disown_take);
PG_FUNCTION_INFO_V1(disown_release);
PG_FUNCTION_INFO_V1(disown_wait);

static shmem_request_hook_type next_shmem_request;

static void request_shmem(void) {
    if (next_shmem_request) next_shmem_request();
    RequestNamedLWLockTranche("disown", 1);
}

void _PG_init(void) {
    next_shmem_request = shmem_request_hook;
    shmem_request_hook = request_shmem;
}

static LWLock* lock(void) {
    return &GetNamedLWLockTranche("disown")->lock;
}

static LWLockMode mode(FunctionCallInfo fcinfo) {
    return PG_GETARG_BOOL(0) ? LW_SHARED : LW_EXCLUSIVE;
}

Datum disown_take(PG_FUNCTION_ARGS) {
    LWLockAcquire(lock(), mode(fcinfo));
    LWLockDisown(lock());
    PG_RETURN_BOOL(LWLockHeldByMe(lock()));
}

Datum disown_release(PG_FUNCTION_ARGS) {
    LWLockReleaseDisowned(lock(), mode(fcinfo));
    PG_RETURN_BOOL(LWLockHeldByMe(lock()));
}

Datum disown_wait(PG_FUNCTION_ARGS) {
    bool held;

    LWLockAcquire(lock(), mode(fcinfo));
    held = LWLockHeldByMe(lock());
    LWLockRelease(lock());
    PG_RETURN_BOOL(held);
}
