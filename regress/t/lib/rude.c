/*
 * A module that holds an LWLock of its own while it calls the modules listed before it. For tests.
 *
 * rude.from: the postmaster sets shared memory up once at start, and again after every crash; from which time on this
 * module holds its lock.
 */
#include "postgres.h"

#include <limits.h>

#include "fmgr.h"
#include "miscadmin.h"
#include "storage/ipc.h"
#include "storage/lwlock.h"
#include "utils/guc.h"

PG_MODULE_MAGIC;

PGDLLEXPORT void _PG_init(void);

static shmem_startup_hook_type previous_startup_hook;
static LWLock lock;
static int from = 1;
static int times = 0;

static void startup(void) {
    bool hold = ++times >= from;

    LWLockInitialize(&lock, LWLockNewTrancheId());
    LWLockRegisterTranche(lock.tranche, "rude");
    if (hold) LWLockAcquire(&lock, LW_EXCLUSIVE);
    if (previous_startup_hook) previous_startup_hook();
    if (hold) {
        if (!LWLockHeldByMe(&lock)) elog(FATAL, "rude: the lock was taken away");
        LWLockRelease(&lock);
        if (InterruptHoldoffCount != 0) elog(FATAL, "rude: interrupts are held off");
    }
}

void _PG_init(void) {
    if (!process_shared_preload_libraries_in_progress) return;
    DefineCustomIntVariable("rude.from", "The time from which on the lock is held.", NULL, &from, 1, 1,
                            INT_MAX, PGC_POSTMASTER, 0, NULL, NULL, NULL);
    previous_startup_hook = shmem_startup_hook;
    shmem_startup_hook = startup;
}
