// Torture of real LWLocks by real backends: torture.h over the server's own functions, and what a watchdog
// outside needs to see. Nothing here knows the server's major version.
extern "C" {
#include "postgres.h"

#include "access/htup_details.h"
#include "fmgr.h"
#include "funcapi.h"
#include "lib/stringinfo.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "storage/ipc.h"
#include "storage/lwlock.h"
#include "storage/pg_sema.h"
#include "storage/proc.h"
#include "storage/proclist.h"
#include "storage/shmem.h"
#include "utils/builtins.h"
#include "utils/wait_event.h"

PG_FUNCTION_INFO_V1(lock_generator_torture);
PG_FUNCTION_INFO_V1(lock_generator_torture_stops);
PG_FUNCTION_INFO_V1(lock_generator_torture_totals);
PG_FUNCTION_INFO_V1(lock_generator_torture_locks);
}

#include "torture_server.h"

#include <signal.h>

#include <type_traits>

#include "torture.h"

namespace {

using namespace lock_generator::torture;

constexpr char kTranche[] = "lock_generator_torture";

// Zeroed by the first process that sees it.
struct Shared {
    Arena arena;
    std::atomic<bool> taken[kTasks];

    // Learnt from the locks themselves: the state word of a lock that nobody uses, and all bits of a hold.
    uint32_t idle_state;
    uint32_t held_mask;
};

Shared* shared = nullptr;
LWLockPadded* locks = nullptr;

LWLock* lock_at(int i) {
    return &locks[i].lock;
}

// The type of the variables that LWLockUpdateVar() and friends work on.
template <class Function>
struct VariableOf;
template <class Variable, class... Rest>
struct VariableOf<void(LWLock*, Variable*, Rest...)> {
    using Type = Variable;
};
using Variable = VariableOf<decltype(LWLockUpdateVar)>::Type;
static_assert(sizeof(Variable) == sizeof(uint64_t));

Variable* variable_at(int lock) {
    return reinterpret_cast<Variable*>(&shared->arena.data[lock].variable);
}

/// Queued for an LWLock, and past the last attempt. In this order: see torture.h.
bool sleeps(const PGPROC* proc, uint32 wait_event_mask, uint32 wait_event) {
    const bool queued = *const_cast<const volatile uint8*>(&proc->lwWaiting) == LW_WS_WAITING;
    pg_read_barrier();
    return queued &&
           (*const_cast<const volatile uint32*>(&proc->wait_event_info) & wait_event_mask) == wait_event;
}

class ServerLocks {
  public:
    bool acquire(int lock, bool exclusive) { return LWLockAcquire(lock_at(lock), mode(exclusive)); }
    bool acquire_conditionally(int lock, bool exclusive) {
        return LWLockConditionalAcquire(lock_at(lock), mode(exclusive));
    }
    bool acquire_or_wait(int lock) { return LWLockAcquireOrWait(lock_at(lock), LW_EXCLUSIVE); }
    bool wait_for_variable(int lock, uint64_t old, uint64_t* now) {
        uint64 value = *now;
        const bool freed = LWLockWaitForVar(lock_at(lock), variable_at(lock), old, &value);
        *now = value;
        return freed;
    }
    void release(int lock, bool) { LWLockRelease(lock_at(lock)); }
    void update_variable(int lock, uint64_t value) {
        LWLockUpdateVar(lock_at(lock), variable_at(lock), value);
    }
    void release_clearing_variable(int lock) { LWLockReleaseClearVar(lock_at(lock), variable_at(lock), 0); }
    uint64_t variable(int lock) {
        return *const_cast<volatile uint64_t*>(&shared->arena.data[lock].variable);
    }

    bool is_asleep(int proc) {
        return sleeps(GetPGProcByNumber(proc), 0xFFFFFFFF, PG_WAIT_LWLOCK | lock_at(0)->tranche);
    }
    const char* left_behind(int lock) {
        if (!proclist_is_empty(&lock_at(lock)->waiters)) return "its wait list is not empty";
        const uint32 state = pg_atomic_read_u32(&lock_at(lock)->state);
        if (state == shared->idle_state) return nullptr;
        snprintf(text_, sizeof(text_), "its state word is %#x", state);
        return text_;
    }

    void post(int proc) { PGSemaphoreUnlock(GetPGProcByNumber(proc)->sem); }
    int take_posts() {
        int taken = 0;
        while (PGSemaphoreTryLock(MyProc->sem)) taken++;
        return taken;
    }

  private:
    static LWLockMode mode(bool exclusive) { return exclusive ? LW_EXCLUSIVE : LW_SHARED; }
    char text_[80];
};

void log_violation(const char* text) {
    ereport(LOG, (errcode(ERRCODE_DATA_CORRUPTED), errmsg("lock_generator: violation: %s", text)));
}

using ServerTorturer = LWLockTorturer<ServerLocks>;

void require_preload() {
    if (!shared)
        ereport(ERROR, (errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
                        errmsg("lock_generator must be loaded via shared_preload_libraries")));
}

int take_entry() {
    for (int i = 0; i < kTasks; i++) {
        bool free = false;
        if (shared->taken[i].compare_exchange_strong(free, true)) return i;
    }
    ereport(ERROR, (errcode(ERRCODE_TOO_MANY_CONNECTIONS), errmsg("all %d torture tasks are taken", kTasks)));
    pg_unreachable();
}

void leave(int, Datum entry) {
    const int index = DatumGetInt32(entry);
    if (shared->arena.tasks[index].pid.load() != 0) ServerTorturer::leave(shared->arena.tasks[index]);
    shared->taken[index] = false;
}

uint64_t ticks_of(int milliseconds) {
    return uint64_t(milliseconds) * 1000 * CycleClock::ticks_per_microsecond();
}

double milliseconds_of(uint64_t ticks) {
    return double(ticks) / double(CycleClock::ticks_per_microsecond()) / 1000;
}

void nap_us(uint32_t us) {
    const timespec time = {0, long(us) * 1000};
    nanosleep(&time, nullptr);
}

/// Any process of the server but this one and the postmaster; 0 now and then.
pid_t some_process(Random& random) {
    const pid_t pid = ProcGlobal->allProcs[random.below(ProcGlobal->allProcCount)].pid;
    return pid == MyProcPid ? 0 : pid;
}

void stop_somebody(Random& random) {
    pid_t pid = 0;
    for (int i = 0; i < 1000 && pid == 0; i++) pid = some_process(random);
    if (pid == 0) return;

    // Whatever may want to end this process has to wait: the other must not stay stopped.
    sigset_t all, before;
    sigfillset(&all);
    sigprocmask(SIG_BLOCK, &all, &before);
    Arena& arena = shared->arena;
    arena.stopped_since = CycleClock::now();
    if (kill(pid, SIGSTOP) == 0) {
        nap_us(50 + random.heavy_headed(14));
        kill(pid, SIGCONT);
        arena.stops++;
    }
    arena.stopped_ticks += CycleClock::now() - arena.stopped_since.exchange(0);
    sigprocmask(SIG_SETMASK, &before, nullptr);
}

/// Whom the list names. It is read without its lock, so it may end early or repeat somebody.
void describe_waiters(LWLock* lock, StringInfo text) {
    constexpr const char* modes[] = {"exclusive", "shared", "until_free"};
    int number = *const_cast<volatile int*>(&lock->waiters.head);
    for (int n = 0; n < 100 && number >= 0 && number < int(ProcGlobal->allProcCount); n++) {
        PGPROC* proc = GetPGProcByNumber(number);
        appendStringInfo(text, "%s%d/%s/%s", n == 0 ? "" : " ", proc->pid, modes[Min(proc->lwWaitMode, 2)],
                         sleeps(proc, 0xFF000000, PG_WAIT_LWLOCK) ? "asleep"
                         : proc->lwWaiting == LW_WS_WAITING       ? "queued"
                         : proc->lwWaiting == LW_WS_NOT_WAITING   ? "woken"
                                                                  : "removed");
        number = *const_cast<volatile int*>(&proc->lwWaitLink.next);
    }
}

}  // namespace

void lock_generator::torture::request_shmem() {
    RequestAddinShmemSpace(sizeof(Shared) + alignof(Shared));
    RequestNamedLWLockTranche(kTranche, kLocks);
}

void lock_generator::torture::start_shmem() {
    bool found;
    void* mem = ShmemInitStruct(kTranche, sizeof(Shared) + alignof(Shared), &found);
    shared = reinterpret_cast<Shared*>(TYPEALIGN(alignof(Shared), mem));
    locks = GetNamedLWLockTranche(kTranche);
    CycleClock::calibrate();
    also_report = log_violation;
    if (found) return;

    memset(static_cast<void*>(shared), 0, sizeof(Shared));
    shared->arena.start(0);
    LWLock* lock = lock_at(0);
    shared->idle_state = pg_atomic_read_u32(&lock->state);
    LWLockAcquire(lock, LW_EXCLUSIVE);
    const uint32 exclusive = pg_atomic_read_u32(&lock->state) ^ shared->idle_state;
    LWLockRelease(lock);
    shared->held_mask = exclusive | (exclusive - 1);  // the count of shared holds is below
}

Datum lock_generator_torture(PG_FUNCTION_ARGS) {
    require_preload();
    const uint64_t end = CycleClock::now() + ticks_of(PG_GETARG_INT32(0));
    const uint64_t seed = uint64_t(PG_GETARG_INT64(1));
    const int entry = take_entry();

    PG_ENSURE_ERROR_CLEANUP(leave, Int32GetDatum(entry));
    {
        uint64_t none = 0;
        std::atomic_ref(shared->arena.seed).compare_exchange_strong(none, seed);
        ServerLocks api;
        ServerTorturer torturer(shared->arena, entry, api, MyProcPid, int(MyProc - ProcGlobal->allProcs),
                                seed);
        while (CycleClock::now() < end) {
            CHECK_FOR_INTERRUPTS();
            torturer.step();
        }
    }
    PG_END_ENSURE_ERROR_CLEANUP(leave, Int32GetDatum(entry));
    leave(0, Int32GetDatum(entry));
    PG_RETURN_VOID();
}

Datum lock_generator_torture_stops(PG_FUNCTION_ARGS) {
    require_preload();
    const uint64_t end = CycleClock::now() + ticks_of(PG_GETARG_INT32(0));
    Random random(uint64_t(PG_GETARG_INT64(1)));
    while (CycleClock::now() < end) {
        CHECK_FOR_INTERRUPTS();
        nap_us(random.below(60'000));
        stop_somebody(random);
    }
    PG_RETURN_VOID();
}

Datum lock_generator_torture_totals(PG_FUNCTION_ARGS) {
    require_preload();
    TupleDesc row;
    if (get_call_result_type(fcinfo, nullptr, &row) != TYPEFUNC_COMPOSITE)
        elog(ERROR, "return type must be a row type");

    const Arena& arena = shared->arena;
    uint64_t acquires = 0, longest[kWays] = {};
    for (int lock = 0; lock < kLocks; lock++)
        acquires += arena.exclusive_holds(lock) + arena.shared_holds(lock);
    int tasks = 0;
    for (const Task& t : arena.tasks) {
        tasks += t.pid.load() != 0;
        for (int w = 0; w < kWays; w++) longest[w] = Max(longest[w], t.longest[w].load());
    }
    Datum values[] = {Int64GetDatum(int64(arena.started)),
                      Int64GetDatum(int64(arena.epoch.load())),
                      Int64GetDatum(int64(acquires)),
                      Int32GetDatum(tasks),
                      Int64GetDatum(int64(arena.stops.load())),
                      Float8GetDatum(milliseconds_of(arena.stopped_until(CycleClock::now()))),
                      Float8GetDatum(milliseconds_of(longest[int(Way::exclusive)])),
                      Float8GetDatum(milliseconds_of(longest[int(Way::shared)])),
                      Float8GetDatum(milliseconds_of(longest[int(Way::until_free)])),
                      Float8GetDatum(milliseconds_of(longest[int(Way::variable)])),
                      Int32GetDatum(int32(arena.violations.load())),
                      CStringGetTextDatum(arena.reported ? arena.violation : "")};
    bool nulls[lengthof(values)] = {};
    PG_RETURN_DATUM(HeapTupleGetDatum(heap_form_tuple(BlessTupleDesc(row), values, nulls)));
}

Datum lock_generator_torture_locks(PG_FUNCTION_ARGS) {
    require_preload();
    InitMaterializedSRF(fcinfo, 0);
    ReturnSetInfo* result = reinterpret_cast<ReturnSetInfo*>(fcinfo->resultinfo);
    StringInfoData waiters;
    initStringInfo(&waiters);

    for (int i = -NUM_FIXED_LWLOCKS; i < kLocks; i++) {
        LWLock* lock = i < 0 ? &MainLWLockArray[i + NUM_FIXED_LWLOCKS].lock : lock_at(i);
        if (i < 0 && proclist_is_empty(&lock->waiters)) continue;
        const uint32 state = pg_atomic_read_u32(&lock->state);
        resetStringInfo(&waiters);
        describe_waiters(lock, &waiters);
        Datum values[] = {
            Int32GetDatum(i),
            CStringGetTextDatum(GetLWLockIdentifier(PG_WAIT_LWLOCK, lock->tranche)),
            Int64GetDatum(int64(state)),
            BoolGetDatum((state & shared->held_mask) != 0),
            Int64GetDatum(i < 0 ? 0
                                : int64(shared->arena.exclusive_holds(i) + shared->arena.shared_holds(i))),
            CStringGetTextDatum(waiters.data)};
        bool nulls[lengthof(values)] = {};
        tuplestore_putvalues(result->setResult, result->setDesc, values, nulls);
    }
    return Datum(0);
}
