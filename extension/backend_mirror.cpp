#include "backend_mirror.h"

#include <pthread.h>
#include <stdio.h>
#include <sys/sysinfo.h>

#include <algorithm>
#include <utility>

#include "base/error.h"
#include "lwlock/api.h"
#include "settings.h"

extern "C" {
#include "access/twophase.h"
#include "access/xact.h"
#include "utils/timestamp.h"
}

namespace adaptive::backend_mirror {

namespace internal {
Mirror mirror;
MirrorTask task;
SlotId own_slot = 0;
bool settled = false;
LockHints* lock_hints = nullptr;
static_assert(kLockHints == 256, "hints_of() takes eight bits of the hash");
}  // namespace internal

using namespace internal;

namespace {

// Shared by the server's processes.
struct Shared {
    pg_atomic_uint64 warned_at;         // TimestampTz
    pg_atomic_uint64 stale_witness;     // who last found its mirror stale: the mirror's id, process id
    pg_atomic_uint64 stale_witness_at;  // TimestampTz
    pg_atomic_uint32 stale_mirror;      // id of a mirror that nobody keeps
    SlotId slot_of_backend[FLEXIBLE_ARRAY_MEMBER];  // indexed by PGPROC number
};

Shared* shared = nullptr;
Source wanted = Source::off;                        // what the postmaster chose at start
char not_bpf_reason[2 * sizeof(Error::text) + 16];  // of two sources, it may be
constexpr char kStaleReason[] =
    "the mirror is stale, the kernel records no switches in it: "
    "run `schedmirror unload` and `schedmirror load` as root";

// ---- this process ----

// Tries to get a slot come at these distances, in microseconds. Each that fails in a mirror that is there doubles the
// next one: all slots are taken, and by many processes.
constexpr uint64_t kShortestPause = 1'000'000, kLongestPause = 60'000'000;

Error no_slot = {};     // why this process has none; empty: said already, or it has one
uint64_t last_try = 0;  // CycleClock; 0: the next need not wait
uint64_t pause_us = kShortestPause;
MirrorTask lost_task;  // a registration that no longer counts and is still to be given back
bool slept = false;    // since the registration was last judged

int backends() {
    return MaxBackends + NUM_AUXILIARY_PROCS + max_prepared_xacts;
}

// The rseq source's slots are PGPROC numbers + 1, and 0 is nobody. A server with more PGPROCs does without.
uint32_t rseq_slots() {
    return Min(static_cast<uint32_t>(backends()) + 1, SCHED_MIRROR_MAX_SLOTS);
}
// As many as there were when the memory was asked for: some may be added before it is set up again after a crash.
uint32_t cpus() {
    static const auto n = static_cast<uint32_t>(get_nprocs_conf());
    return n;
}

size_t shared_bytes() {
    return offsetof(Shared, slot_of_backend) + sizeof(SlotId) * static_cast<size_t>(backends());
}

void publish_slot(SlotId slot) {
    own_slot = slot;
    if (MyProc != nullptr) shared->slot_of_backend[server::proc_number(MyProc)] = slot;
}

bool is_stale() {
    return mirror.source() == Source::bpf && mirror.id() == pg_atomic_read_u32(&shared->stale_mirror);
}

void close_mirror() {
    task.detach();
    lost_task.detach();
    publish_slot(0);
    mirror.close();
    last_try = 0;
    pause_us = kShortestPause;
}

void leave_stale_mirror() {
    close_mirror();  // nothing in it is true of anybody
    strlcpy(not_bpf_reason, kStaleReason, sizeof(not_bpf_reason));
}

bool open_rseq(void* table, Error* error) {
    if (static_cast<uint32_t>(backends()) >= SCHED_MIRROR_MAX_SLOTS)
        return fail(
            error,
            "this server may have %d processes, and source rseq serves at most %u: lower max_connections",
            backends(), SCHED_MIRROR_MAX_SLOTS - 1);
    Mirror::rseq_format(table, rseq_slots(), cpus());
    return mirror.open_rseq(table, error, ProcGlobal->allProcs, sizeof(PGPROC) * ProcGlobal->allProcCount);
}

void open_mirror_in_shmem(void* rseq_table) {
    Error error = {};
    const auto setting = static_cast<settings::SchedStateSource>(settings::sched_state);
    using enum settings::SchedStateSource;

    mirror.close();
    wanted = Source::off;
    if (setting == bpf || setting == automatic) {
        if (mirror.open_bpf(kMirrorDir, &error)) {
            wanted = Source::bpf;
            not_bpf_reason[0] = '\0';
            return;
        }
        strlcpy(not_bpf_reason, error.text, sizeof(not_bpf_reason));
        if (setting == bpf) wanted = Source::bpf;  // it may be loaded later
    } else {
        snprintf(not_bpf_reason, sizeof(not_bpf_reason), "adaptive_lwlock.sched_state is set to \"%s\"",
                 setting == rseq ? "rseq" : "off");
    }
    if (setting == rseq || setting == automatic) {
        if (open_rseq(rseq_table, &error)) {
            wanted = Source::rseq;
        } else {
            ereport(WARNING, (errmsg("adaptive_lwlock: source rseq is not available: %s", error.text)));
            const size_t said = strlen(not_bpf_reason);
            snprintf(not_bpf_reason + said, sizeof(not_bpf_reason) - said, "; source rseq: %s", error.text);
        }
    }
}

/// The mirror that the kernel kept is gone, or was never there: is it back?
bool open_again() {
    Error error;
    if (!mirror.open_bpf(kMirrorDir, &error)) {
        strlcpy(not_bpf_reason, error.text, sizeof(not_bpf_reason));
        return false;
    }
    not_bpf_reason[0] = '\0';
    if (is_stale()) {
        mirror.close();
        strlcpy(not_bpf_reason, kStaleReason, sizeof(not_bpf_reason));
    }
    return mirror.source() == Source::bpf;
}

bool attach() {
    if (mirror.source() == Source::bpf) return task.attach(mirror, &no_slot);
    const auto slot = static_cast<SlotId>(server::proc_number(MyProc) + 1);
    return task.attach_rseq(mirror, slot, &MyProc->wait_event_info, &no_slot);
}

void seek_slot() {
    // A clock that was set back is past every pause.
    const uint64_t now = CycleClock::now();
    if (last_try != 0 && now - last_try < pause_us * CycleClock::ticks_per_microsecond()) return;
    last_try = now;
    if (mirror.source() == Source::off && !open_again()) return;
    if (attach()) {
        publish_slot(task.slot());
        pause_us = kShortestPause;
    } else {
        pause_us = std::min(2 * pause_us, kLongestPause);
    }
}

/// All leave a stale mirror: one process's word is not enough, and is forgotten after ten minutes.
bool another_found_it_stale() {
    const uint64 me = static_cast<uint64>(mirror.id()) << 32 | static_cast<uint32>(MyProcPid);
    const auto now = static_cast<uint64>(GetCurrentTimestamp());
    const uint64 said_at = pg_atomic_exchange_u64(&shared->stale_witness_at, now);
    const uint64 before = pg_atomic_exchange_u64(&shared->stale_witness, me);
    return before != me && before >> 32 == mirror.id() && now - said_at < 10 * USECS_PER_MINUTE;
}

void judge_registration() {
    switch (task.note_slept()) {
        case Recording::works:
            return;
        case Recording::stopped:  // this one registration was taken away
            return lost();
        case Recording::never:
            if (!another_found_it_stale()) return lost();
            pg_atomic_write_u32(&shared->stale_mirror, mirror.id());
            strlcpy(no_slot.text, kStaleReason, sizeof(no_slot.text));
    }
}

/// Everything that may take a system call is done here. The caller holds no LWLock.
void look_after_slot() {
    if (wanted == Source::off) {
        settled = true;
        return;
    }
    if (std::exchange(slept, false)) judge_registration();
    lost_task.detach();
    if (is_stale()) leave_stale_mirror();
    if (mirror.source() == Source::bpf && !mirror.active()) close_mirror();
    if (own_slot == 0) seek_slot();
    settled = own_slot != 0;
}

/// A slot may be missed inside a lock acquire, where nothing can be logged. Once a minute for all processes.
void report_missing_slot() {
    if (no_slot.text[0] == '\0' || own_slot != 0) return;
    const TimestampTz now = GetCurrentTimestamp();
    uint64 warned_at = pg_atomic_read_u64(&shared->warned_at);
    if (now - static_cast<TimestampTz>(warned_at) > USECS_PER_MINUTE &&
        pg_atomic_compare_exchange_u64(&shared->warned_at, &warned_at, static_cast<uint64>(now)))
        ereport(
            LOG,
            (errmsg(
                 "adaptive_lwlock: this process runs without a slot in the mirror, and those who wait for it "
                 "spin only briefly"),
             errdetail("%s", no_slot.text)));
    no_slot.text[0] = '\0';
}

void at_transaction_end(XactEvent event, void*) {
    if (event != XACT_EVENT_COMMIT && event != XACT_EVENT_ABORT) return;
    look_after_slot();
    report_missing_slot();
}

void child_after_fork() {
    task.reset_after_fork();
    lost_task.reset_after_fork();
    own_slot = 0;
    settled = slept = false;
    no_slot.text[0] = '\0';
    last_try = 0;
    pause_us = kShortestPause;
}

}  // namespace

size_t shmem_bytes() {
    return sizeof(LockHints) * kLockHints + shared_bytes() + Mirror::rseq_bytes(rseq_slots(), cpus()) +
           3 * 128;
}

void shmem_startup() {
    bool found;
    lock_hints = static_cast<LockHints*>(
        ShmemInitStruct("adaptive_lwlock lock hints", sizeof(LockHints) * kLockHints, &found));
    MemSet(lock_hints, 0, sizeof(LockHints) * kLockHints);
    shared = static_cast<Shared*>(ShmemInitStruct("adaptive_lwlock slots", shared_bytes(), &found));
    MemSet(shared, 0, shared_bytes());
    pg_atomic_init_u64(&shared->warned_at, 0);
    pg_atomic_init_u64(&shared->stale_witness, 0);
    pg_atomic_init_u64(&shared->stale_witness_at, 0);
    pg_atomic_init_u32(&shared->stale_mirror, 0);
    open_mirror_in_shmem(
        ShmemInitStruct("adaptive_lwlock rseq mirror", Mirror::rseq_bytes(rseq_slots(), cpus()), &found));
}

void register_callbacks() {
    if (pthread_atfork(nullptr, nullptr, child_after_fork) != 0)
        ereport(ERROR, (errcode(ERRCODE_OUT_OF_MEMORY), errmsg("out of memory")));
    RegisterXactCallback(at_transaction_end, nullptr);
}

Status status() {
    const bool running = mirror.source() != Source::off && mirror.active() && !is_stale();
    const char* reason = nullptr;
    if (is_stale())
        reason = kStaleReason;
    else if (mirror.source() == Source::bpf && !mirror.active())
        reason = "the kernel side was unloaded; load it again with: schedmirror load";
    else if (mirror.source() != Source::bpf && not_bpf_reason[0] != '\0')
        reason = not_bpf_reason;
    return {.source = !running                         ? "off"
                      : mirror.source() == Source::bpf ? "bpf"
                                                       : "rseq",
            .source_reason = reason,
            .slots_used = running ? mirror.used() : 0,
            .slots_total = running ? mirror.capacity() : 0};
}

BackendSlot of_backend(int proc_number) {
    const SlotId slot = shared->slot_of_backend[proc_number];
    return {.slot = slot, .info = mirror.info(slot)};
}

namespace internal {

void settle() {
    // The postmaster sets shared memory up without a PGPROC; its children get theirs before they take any
    // lock that they could have to wait for.
    if (MyProc == nullptr || shared == nullptr) return;
    // The end of the transaction, or a later acquire, will do.
    if (IsTransactionOrTransactionBlock() || lwlock_api::held_count() > 0) return;
    publish_slot(own_slot);  // at first: instead of a predecessor's
    look_after_slot();
}

void lost() {
    lost_task = std::exchange(task, MirrorTask());
    publish_slot(0);
    settled = false;
}

void after_sleep() {
    slept = true;
    if (!IsTransactionOrTransactionBlock()) settled = false;
}

}  // namespace internal
}  // namespace adaptive::backend_mirror
