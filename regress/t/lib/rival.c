/*
 * A module that patches LWLockAcquire() too, as a profiler might: a jump at the entry, to code that counts the
 * call, does what the overwritten instructions did and goes on behind them. For tests, on x86-64.
 *
 * Listed before adaptive_lwlock it is there first; listed behind it, it comes when shared memory has been set
 * up.
 */
#include "postgres.h"

#include <sys/mman.h>

#include "fmgr.h"
#include "miscadmin.h"
#include "storage/ipc.h"
#include "storage/lwlock.h"

PG_MODULE_MAGIC;

PGDLLEXPORT void _PG_init(void);
PG_FUNCTION_INFO_V1(rival_calls);
PG_FUNCTION_INFO_V1(rival_leave);

#define JUMP_BYTES 5
#define PAGE 4096

static shmem_startup_hook_type previous_startup_hook;
static uint8 original[16];
static int taken; /* how many bytes were overwritten; 0: nothing was patched */
static volatile uint64* calls;

/* Length of an instruction that does the same anywhere; 0: not known. */
static int movable(const uint8* code) {
    if (code[0] >= 0x50 && code[0] <= 0x57) return 1;                                       /* push */
    if (code[0] == 0x41 && code[1] >= 0x50 && code[1] <= 0x57) return 2;                    /* push */
    if (code[0] == 0x48 && code[1] == 0x89 && code[2] == 0xe5) return 3;                    /* mov rsp,rbp */
    if (code[0] == 0xf3 && code[1] == 0x0f && code[2] == 0x1e && code[3] == 0xfa) return 4; /* endbr64 */
    return 0;
}

static uint8* jump(uint8* at, const uint8* to) {
    int32 distance = (int32)(to - (at + JUMP_BYTES));

    at[0] = 0xe9;
    memcpy(at + 1, &distance, sizeof(distance));
    return at + JUMP_BYTES;
}

static void write_code(uint8* at, const uint8* bytes, int n) {
    uint8* page = (uint8*)((uintptr_t)at & ~(uintptr_t)(PAGE - 1));

    if (mprotect(page, 2 * PAGE, PROT_READ | PROT_WRITE) != 0) elog(FATAL, "rival: mprotect: %m");
    memcpy(at, bytes, n);
    if (mprotect(page, 2 * PAGE, PROT_READ | PROT_EXEC) != 0) elog(FATAL, "rival: mprotect: %m");
}

static void patch(void) {
    uint8* const entry = (uint8*)LWLockAcquire;
    uint8* const hint = (uint8*)((uintptr_t)entry & ~(uintptr_t)(PAGE - 1));
    uint8 *code = MAP_FAILED, *at, entered[sizeof(original)];
    int32 distance;

    for (int i = 1; i < 1000 && code == (uint8*)MAP_FAILED; i++)
        code = mmap(hint - i * 0x100000, 2 * PAGE, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    if (code == (uint8*)MAP_FAILED || mmap(code + PAGE, PAGE, PROT_READ | PROT_WRITE,
                                           MAP_SHARED | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED)
        elog(FATAL, "rival: no memory near the server: %m");
    calls = (uint64*)(code + PAGE);

    at = code;
    memcpy(at, "\xf0\x48\xff\x05", 4); /* lock incq *calls */
    distance = (int32)(PAGE - 8);
    memcpy(at + 4, &distance, sizeof(distance));
    at += 8;
    while (taken < JUMP_BYTES) {
        const uint8* next = entry + taken;
        int n = movable(next);

        if (next[0] == 0xe9) { /* somebody else's jump: from its new place */
            memcpy(&distance, next + 1, sizeof(distance));
            at = jump(at, next + JUMP_BYTES + distance);
            taken += JUMP_BYTES;
            break;
        }
        if (n == 0) elog(FATAL, "rival: LWLockAcquire begins with an instruction that is not known here");
        memcpy(at, next, n);
        at += n;
        taken += n;
    }
    jump(at, entry + taken);
    if (mprotect(code, PAGE, PROT_READ | PROT_EXEC) != 0) elog(FATAL, "rival: mprotect: %m");

    memcpy(original, entry, taken);
    memset(entered, 0x90, sizeof(entered));
    entered[0] = 0xe9;
    distance = (int32)(code - (entry + JUMP_BYTES));
    memcpy(entered + 1, &distance, sizeof(distance));
    write_code(entry, entered, taken);
}

static void startup(void) {
    if (previous_startup_hook) previous_startup_hook();
    if (taken == 0) patch();
}

void _PG_init(void) {
    if (!process_shared_preload_libraries_in_progress) return;
    if (shmem_startup_hook == NULL) {
        patch();
    } else {
        previous_startup_hook = shmem_startup_hook;
        shmem_startup_hook = startup;
    }
}

/* Calls seen in all processes. */
Datum rival_calls(PG_FUNCTION_ARGS) {
    PG_RETURN_INT64(calls == NULL ? 0 : (int64)*calls);
}

/* Puts back what this module found, in this process. */
Datum rival_leave(PG_FUNCTION_ARGS) {
    write_code((uint8*)LWLockAcquire, original, taken);
    PG_RETURN_VOID();
}
