// A load generator for one LWLock.
//
// How LWLock waiting behaves depends on two times: how long the lock is held, and how long a process stays
// outside before it comes back. Real workloads mix many such pairs; here one call makes one pair, of known
// length, many thousand times.
//
// - Time is made by computing, in calibrated nanoseconds (busy_work.h). A query does a fixed number of
//   operations, so that it is the same work whatever the lock costs: queries a second compare as operations a
//   second.
// - Inside the lock the holder also uses one cache line of data that the lock protects, as any user of a lock
//   does: an exclusive holder counts in it, a shared holder reads it, and the work inside starts from what
//   was read. The busy loop itself touches no memory.
// - The mix (shared or exclusive, sleeping, computing longer) follows the operation's number, not a random
//   number: every query has exactly the same mix.
//
// The stress function is a test of mutual exclusion and not a benchmark.
extern "C" {
#include "postgres.h"

#include "access/htup_details.h"
#include "fmgr.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "postmaster/bgworker.h"
#include "storage/ipc.h"
#include "storage/lwlock.h"
#include "storage/shmem.h"
#include "utils/guc.h"

PG_MODULE_MAGIC;

PG_FUNCTION_INFO_V1(lock_generator_run);
PG_FUNCTION_INFO_V1(lock_generator_longest_wait);
PG_FUNCTION_INFO_V1(lock_generator_calibrate);
PG_FUNCTION_INFO_V1(lock_generator_line_cost);
PG_FUNCTION_INFO_V1(lock_generator_stress);
PG_FUNCTION_INFO_V1(lock_generator_stress_totals);
PG_FUNCTION_INFO_V1(lock_generator_error);
PG_FUNCTION_INFO_V1(lock_generator_start_waiter);

PGDLLEXPORT void _PG_init(void);
PGDLLEXPORT void lock_generator_waiter(Datum database);
}

#include <atomic>
#include <cmath>

#include "busy_work.h"
#include "line_cost.h"
#include "spin/cycle_clock.h"
#include "torture_server.h"

namespace {

constexpr char kTranche[] = "lock_generator";
constexpr uint32_t kNobody = 0;

// Lives in the server's shared memory; zeroed by the first process that sees it. Each line has one purpose.
struct Shared {
    // What the lock of lock_generator_run() protects.
    alignas(128) volatile uint64_t operations;

    alignas(128) std::atomic<uint64_t> longest_wait;  // ticks

    // What the lock of lock_generator_stress() protects: `first` and `second` are equal whenever nobody holds
    // it exclusively.
    alignas(128) volatile uint64_t first;
    alignas(128) volatile uint64_t second;

    // Who is inside, kept without the lock's help: these reveal a violation.
    alignas(128) std::atomic<uint32_t> writer;
    std::atomic<uint32_t> readers;

    alignas(128) std::atomic<uint64_t> exclusive_total;
    std::atomic<uint64_t> shared_total;
};

Shared* shared = nullptr;
LWLock* run_lock = nullptr;
LWLock* stress_lock = nullptr;

double ns_per_turn_setting = 0;

shmem_request_hook_type next_shmem_request = nullptr;
shmem_startup_hook_type next_shmem_startup = nullptr;

void request_shmem() {
    if (next_shmem_request) next_shmem_request();
    RequestAddinShmemSpace(sizeof(Shared) + alignof(Shared));
    RequestNamedLWLockTranche(kTranche, 2);
    lock_generator::torture::request_shmem();
}

void start_shmem() {
    if (next_shmem_startup) next_shmem_startup();

    bool found;
    LWLockAcquire(AddinShmemInitLock, LW_EXCLUSIVE);
    void* mem = ShmemInitStruct(kTranche, sizeof(Shared) + alignof(Shared), &found);
    shared = reinterpret_cast<Shared*>(TYPEALIGN(alignof(Shared), mem));
    if (!found) memset(static_cast<void*>(shared), 0, sizeof(Shared));
    LWLockPadded* locks = GetNamedLWLockTranche(kTranche);
    run_lock = &locks[0].lock;
    stress_lock = &locks[1].lock;
    lock_generator::torture::start_shmem();
    LWLockRelease(AddinShmemInitLock);
}

void require_preload() {
    if (!shared)
        ereport(ERROR, (errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
                        errmsg("lock_generator must be loaded via shared_preload_libraries")));
}

double ns_per_turn() {
    static double calibrated = 0;
    if (ns_per_turn_setting > 0) return ns_per_turn_setting;
    if (calibrated == 0) calibrated = lock_generator::calibrate();
    return calibrated;
}

uint64_t turns_for(double ns) {
    return uint64_t(ns / ns_per_turn() + 0.5);
}

int32 checked_arg(FunctionCallInfo fcinfo, int n, const char* name, int32 max) {
    const int32 value = PG_GETARG_INT32(n);
    if (value < 0 || value > max)
        ereport(ERROR,
                (errcode(ERRCODE_INVALID_PARAMETER_VALUE), errmsg("%s must be between 0 and %d", name, max)));
    return value;
}

// Whether operation i is one of the `percent` in a hundred. 37 and 100 share no divisor: each hundred is a
// permutation, well mixed.
bool in_percentage(uint64_t i, int percent) {
    return int(i * 37 % 100) < percent;
}

bool one_in(uint64_t i, int every) {
    return every > 0 && i % uint64_t(every) == uint64_t(every) - 1;
}

// Waits without computing, as a read from disk would. A signal may end the sleep early.
void sleep_us(int us) {
    timespec wait = {us / 1'000'000, long(us % 1'000'000) * 1000};
    nanosleep(&wait, nullptr);
}

[[noreturn]] void violation(const char* what) {
    ereport(ERROR, (errcode(ERRCODE_DATA_CORRUPTED), errmsg("lock_generator: %s", what)));
    pg_unreachable();
}

// Long enough inside for others to arrive.
void linger() {
    (void)lock_generator::work(20, 0);
}

// Both return what went wrong, or null. They leave the shared record as they found it, so that one violation
// is reported once.
const char* stress_exclusive() {
    const uint32_t me = uint32_t(MyProcPid);
    const char* wrong = nullptr;

    if (shared->writer.exchange(me, std::memory_order_relaxed) != kNobody) wrong = "two exclusive holders";
    if (shared->readers.load(std::memory_order_relaxed) != 0) wrong = "an exclusive holder met a shared one";

    const uint64_t value = shared->first;
    if (shared->second != value) wrong = "an exclusive holder saw half of another's update";
    shared->first = value + 1;
    linger();
    shared->second = value + 1;
    if (shared->first != value + 1) wrong = "an exclusive holder's update was overwritten";

    if (shared->writer.exchange(kNobody, std::memory_order_relaxed) != me) wrong = "two exclusive holders";
    return wrong;
}

const char* stress_shared() {
    const char* wrong = nullptr;

    shared->readers.fetch_add(1, std::memory_order_relaxed);
    if (shared->writer.load(std::memory_order_relaxed) != kNobody)
        wrong = "a shared holder met an exclusive one";

    const uint64_t value = shared->first;
    linger();
    if (shared->second != value || shared->first != value) wrong = "a shared holder saw a value change";

    if (shared->writer.load(std::memory_order_relaxed) != kNobody)
        wrong = "a shared holder met an exclusive one";
    shared->readers.fetch_sub(1, std::memory_order_relaxed);
    return wrong;
}

}  // namespace

void _PG_init(void) {
    if (!process_shared_preload_libraries_in_progress) return;

    DefineCustomRealVariable(
        "lock_generator.ns_per_turn",
        "Nanoseconds that one turn of the busy loop takes; 0 calibrates in every session.",
        "Give two clusters the same value to make them do the same work.", &ns_per_turn_setting, 0, 0, 1000,
        PGC_SUSET, 0, nullptr, nullptr, nullptr);
    MarkGUCPrefixReserved(kTranche);

    next_shmem_request = shmem_request_hook;
    shmem_request_hook = request_shmem;
    next_shmem_startup = shmem_startup_hook;
    shmem_startup_hook = start_shmem;
}

Datum lock_generator_run(PG_FUNCTION_ARGS) {
    require_preload();
    const int32 hold_ns = checked_arg(fcinfo, 0, "hold_ns", 1'000'000'000);
    const int32 out_ns = checked_arg(fcinfo, 1, "out_ns", 1'000'000'000);
    const double min_ms = PG_GETARG_FLOAT8(2);
    const int32 shared_pct = checked_arg(fcinfo, 3, "shared_pct", 100);
    const int32 sleep_every = checked_arg(fcinfo, 4, "sleep_every", INT_MAX);
    const int32 sleep_for = checked_arg(fcinfo, 5, "sleep_us", 60'000'000);
    const int32 compute_every = checked_arg(fcinfo, 6, "compute_every", INT_MAX);
    const int32 compute_us = checked_arg(fcinfo, 7, "compute_us", 1'000'000);
    if (!(min_ms > 0 && min_ms <= 60'000))
        ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE),
                        errmsg("min_ms must be above 0 and at most 60000")));

    const uint64_t operations = uint64_t(std::ceil(min_ms * 1e6 / std::max(1, hold_ns + out_ns)));
    const uint64_t hold_turns = turns_for(hold_ns);
    const uint64_t out_turns = turns_for(out_ns);
    const uint64_t compute_turns = turns_for(compute_us * 1000.0);

    // Reading the clock would be a part of short turns.
    const uint64_t timed_one_in = hold_ns + out_ns < 1000 ? 16 : 1;

    uint64_t chain = operations, longest = 0;
    for (uint64_t i = 0; i < operations; ++i) {
        const bool timed = i % timed_one_in == 0;
        const uint64_t asked = timed ? adaptive::CycleClock::now() : 0;
        if (in_percentage(i, shared_pct)) {
            LWLockAcquire(run_lock, LW_SHARED);
            chain += shared->operations;
        } else {
            LWLockAcquire(run_lock, LW_EXCLUSIVE);
            chain += shared->operations;
            shared->operations = shared->operations + 1;
        }
        if (timed) longest = std::max(longest, adaptive::CycleClock::now() - asked);
        chain = lock_generator::work(hold_turns, chain);
        if (one_in(i, sleep_every)) sleep_us(sleep_for);
        if (one_in(i, compute_every)) chain = lock_generator::work(compute_turns, chain);
        LWLockRelease(run_lock);

        chain = lock_generator::work(out_turns, chain);
        CHECK_FOR_INTERRUPTS();
    }
    uint64_t seen = shared->longest_wait.load(std::memory_order_relaxed);
    while (seen < longest && !shared->longest_wait.compare_exchange_weak(seen, longest)) {
    }
    PG_RETURN_INT64(int64(operations));
}

Datum lock_generator_longest_wait(PG_FUNCTION_ARGS) {
    (void)fcinfo;
    require_preload();
    adaptive::CycleClock::calibrate();
    PG_RETURN_FLOAT8(double(shared->longest_wait.exchange(0)) /
                     double(adaptive::CycleClock::ticks_per_microsecond()) / 1000);
}

Datum lock_generator_calibrate(PG_FUNCTION_ARGS) {
    PG_RETURN_FLOAT8(lock_generator::calibrate());
}

Datum lock_generator_line_cost(PG_FUNCTION_ARGS) {
    PG_RETURN_FLOAT8(lock_generator::line_cost_ns());
}

Datum lock_generator_stress(PG_FUNCTION_ARGS) {
    require_preload();
    const int64 acquires = PG_GETARG_INT64(0);
    const int32 shared_pct = checked_arg(fcinfo, 1, "shared_pct", 100);
    if (acquires < 0)
        ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE), errmsg("acquires must not be negative")));

    // Backends in step would meet the lock in the same order again and again.
    const uint64_t phase = uint64_t(MyProcPid) * 17;
    uint64_t exclusive_done = 0, shared_done = 0;
    for (int64 i = 0; i < acquires; ++i) {
        const bool share = in_percentage(uint64_t(i) + phase, shared_pct);
        const LWLockMode mode = share ? LW_SHARED : LW_EXCLUSIVE;
        // Some acquires do not wait at first: the other way into a lock.
        if (!one_in(uint64_t(i) + phase, 16) || !LWLockConditionalAcquire(stress_lock, mode))
            LWLockAcquire(stress_lock, mode);
        const char* wrong = share ? stress_shared() : stress_exclusive();
        LWLockRelease(stress_lock);
        ++(share ? shared_done : exclusive_done);
        if (wrong) violation(wrong);
        CHECK_FOR_INTERRUPTS();
    }
    shared->exclusive_total.fetch_add(exclusive_done, std::memory_order_relaxed);
    shared->shared_total.fetch_add(shared_done, std::memory_order_relaxed);
    PG_RETURN_INT64(int64(exclusive_done + shared_done));
}

Datum lock_generator_stress_totals(PG_FUNCTION_ARGS) {
    require_preload();
    TupleDesc row;
    if (get_call_result_type(fcinfo, nullptr, &row) != TYPEFUNC_COMPOSITE)
        elog(ERROR, "return type must be a row type");

    LWLockAcquire(stress_lock, LW_SHARED);
    const uint64_t value = shared->first;
    LWLockRelease(stress_lock);
    Datum values[] = {Int64GetDatum(int64(shared->exclusive_total.load(std::memory_order_relaxed))),
                      Int64GetDatum(int64(shared->shared_total.load(std::memory_order_relaxed))),
                      Int64GetDatum(int64(value))};
    bool nulls[3] = {};
    PG_RETURN_DATUM(HeapTupleGetDatum(heap_form_tuple(row, values, nulls)));
}

Datum lock_generator_error(PG_FUNCTION_ARGS) {
    (void)fcinfo;
    require_preload();
    LWLockAcquire(run_lock, LW_EXCLUSIVE);
    LWLockAcquire(stress_lock, LW_SHARED);
    ereport(ERROR, (errmsg("lock_generator: raised while holding the lock")));
    PG_RETURN_VOID();
}

void lock_generator_waiter(Datum database) {
    BackgroundWorkerUnblockSignals();
    BackgroundWorkerInitializeConnectionByOid(DatumGetObjectId(database), InvalidOid, 0);
    LWLockAcquire(run_lock, LW_EXCLUSIVE);
    LWLockRelease(run_lock);
}

Datum lock_generator_start_waiter(PG_FUNCTION_ARGS) {
    (void)fcinfo;
    require_preload();
    BackgroundWorker worker = {};
    strlcpy(worker.bgw_name, "lock_generator waiter", sizeof(worker.bgw_name));
    strlcpy(worker.bgw_type, worker.bgw_name, sizeof(worker.bgw_type));
    worker.bgw_flags = BGWORKER_SHMEM_ACCESS | BGWORKER_BACKEND_DATABASE_CONNECTION;
    worker.bgw_start_time = BgWorkerStart_RecoveryFinished;
    worker.bgw_restart_time = BGW_NEVER_RESTART;
    strlcpy(worker.bgw_library_name, kTranche, sizeof(worker.bgw_library_name));
    strlcpy(worker.bgw_function_name, "lock_generator_waiter", sizeof(worker.bgw_function_name));
    worker.bgw_main_arg = ObjectIdGetDatum(MyDatabaseId);
    worker.bgw_notify_pid = MyProcPid;
    BackgroundWorkerHandle* handle;
    pid_t pid;
    if (!RegisterDynamicBackgroundWorker(&worker, &handle) ||
        WaitForBackgroundWorkerStartup(handle, &pid) != BGWH_STARTED)
        ereport(ERROR, (errmsg("lock_generator: the background worker does not start")));
    PG_RETURN_INT32(pid);
}
