#pragma once
/*
 * What a lock, a waiter and sleeping are in a PostgreSQL server: the Host of QueueProtocol over LWLock and
 * PGPROC.
 *
 * Everything stays where the server keeps it: the state word and the wait list in the LWLock, the wait state
 * in the PGPROC, the sleeps on its semaphore. New are only the owner's slot number, in the hole of the
 * LWLock, three bits of its state word that the server leaves alone, and, in a table beside, the spinner's slot number
 * and when somebody was last woken.
 */

#include <atomic>

#include "backend_mirror.h"
#include "lwlock/probes.h"
#include "protocol/queue_protocol.h"
#include "server/server.h"
#include "settings.h"
#include "stats.h"

namespace adaptive {

static_assert(static_cast<int>(LockMode::exclusive) == LW_EXCLUSIVE);
static_assert(static_cast<int>(LockMode::shared) == LW_SHARED);
static_assert(static_cast<int>(LockMode::until_free) == LW_WAIT_UNTIL_FREE);

struct [[gnu::visibility("hidden")]] LwlockHost {
    using Lock = LWLock;
    using Waiter = int;  // the number of a PGPROC
    using WaitList = proclist_head;
    static constexpr Waiter kNobody = server::kNobody;
    static constexpr StateBits kBits = server::kLockBits;

    static std::atomic_ref<uint32_t> state(LWLock & lock) {
        return std::atomic_ref<uint32_t>(const_cast<uint32&>(lock.state.value));
    }

    // ---- wait list ----
    static WaitList& wait_list(LWLock & lock) {
        return lock.waiters;
    }
    static WaitList empty_list() {
        WaitList list;
        proclist_init(&list);
        return list;
    }
    static bool empty(WaitList & list) {
        return proclist_is_empty(&list);
    }
    static void push_head(WaitList & list, Waiter w) {
        proclist_push_head_offset(&list, w, kLink);
    }
    static void push_tail(WaitList & list, Waiter w) {
        proclist_push_tail_offset(&list, w, kLink);
    }
    static void erase(WaitList & list, Waiter w) {
        proclist_delete_offset(&list, w, kLink);
    }
    static Waiter first(WaitList & list) {
        return list.head;
    }
    static Waiter next(WaitList&, Waiter w) {
        return proclist_node_get(w, kLink)->next;
    }

    // ---- waiters ----
    static Waiter self() {
        // There is nothing to sleep on. Only shared memory initialization runs without a PGPROC, and it is
        // alone.
        if (MyProc == nullptr) elog(PANIC, "cannot wait without a PGPROC structure");
        return server::proc_number(MyProc);
    }
    static void queued_already() {
        elog(PANIC, "queueing for lock while waiting on another one");
    }
    static std::atomic_ref<uint8_t> wait_state(Waiter w) {
        return std::atomic_ref<uint8_t>(GetPGProcByNumber(w)->lwWaiting);
    }
    static LockMode wait_mode(Waiter w) {
        return static_cast<LockMode>(GetPGProcByNumber(w)->lwWaitMode);
    }
    static void set_wait_mode(Waiter w, LockMode mode) {
        GetPGProcByNumber(w)->lwWaitMode = static_cast<uint8>(mode);
    }

    // ---- sleeping ----
    static void sleep() {
        PGSemaphoreLock(MyProc->sem);
    }
    static void wake(Waiter w) {
        PGSemaphoreUnlock(GetPGProcByNumber(w)->sem);
    }
    static void sleep_begins(LWLock & lock, LockMode mode) {
        pgstat_report_wait_start(PG_WAIT_LWLOCK | lock.tranche);
        probe::wait_start(lock, mode);
    }
    static void sleep_ended(LWLock & lock, LockMode mode) {
        probe::wait_done(lock, mode);
        pgstat_report_wait_end();
        backend_mirror::note_slept();
    }
    static void lock_list_contended(LWLock & lock) {
        SpinDelayStatus delay;
        init_local_spin_delay(&delay);
        while (state(lock).load(std::memory_order_relaxed) & kBits.list_locked) perform_spin_delay(&delay);
        finish_spin_delay(&delay);
    }

    // ---- spinning ----
    static WaitPolicy policy() {
        return settings::policy();
    }
    static SpinBudget budget() {
        return settings::spin_budget();
    }
    static uint64_t spare_for_ticks() {
        return settings::kSpareForMicroseconds * CycleClock::ticks_per_microsecond();
    }
    static void note_wakeup(LWLock & lock) {
        woken_at(lock).store(CycleClock::now(), std::memory_order_relaxed);
    }
    static bool is_wakeup_late(LWLock & lock) {
        return CycleClock::since(woken_at(lock).load(std::memory_order_relaxed)) > spare_for_ticks();
    }

    static LockTask<LWLock>& task() {
        return task_;
    }

    static void set_owner(LWLock & lock) {
        owner_of(lock).store(backend_mirror::slot(), std::memory_order_relaxed);
    }
    static void set_no_owner(LWLock & lock) {
        owner_of(lock).store(0, std::memory_order_relaxed);
    }
    static SlotId owner(LWLock & lock) {
        return owner_of(lock).load(std::memory_order_relaxed);
    }
    static void set_spinner(LWLock & lock) {
        spinner_of(lock).store(backend_mirror::slot(), std::memory_order_relaxed);
        spinning_since(lock).store(CycleClock::now(), std::memory_order_relaxed);
    }
    static bool is_spinner_overdue(LWLock & lock) {
        return CycleClock::since(spinning_since(lock).load(std::memory_order_relaxed)) > spare_for_ticks();
    }
    static SlotId spinner(LWLock & lock) {
        return spinner_of(lock).load(std::memory_order_relaxed);
    }
    static SchedState look(SlotId slot) {
        return backend_mirror::look(slot);
    }

    static void count(LWLock & lock, LockEvent event, uint64_t n) {
        stats::count(lock.tranche, event, n);
    }

  private:
    static inline LockTask<LWLock> task_;
    static constexpr size_t kLink = offsetof(PGPROC, lwWaitLink);

    static std::atomic_ref<SlotId> owner_of(LWLock & lock) {
        return std::atomic_ref<SlotId>(
            *reinterpret_cast<SlotId*>(reinterpret_cast<char*>(&lock) + server::kOwnerOffset));
    }
    static std::atomic_ref<SlotId> spinner_of(LWLock & lock) {
        return std::atomic_ref<SlotId>(backend_mirror::hints_of(&lock).spinner);
    }
    static std::atomic_ref<uint64_t> spinning_since(LWLock & lock) {
        return std::atomic_ref<uint64_t>(backend_mirror::hints_of(&lock).spinning_since);
    }
    static std::atomic_ref<uint64_t> woken_at(LWLock & lock) {
        return std::atomic_ref<uint64_t>(backend_mirror::hints_of(&lock).woken_at);
    }
};

}  // namespace adaptive
