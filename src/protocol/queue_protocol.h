#pragma once
/*
 * A reader-writer lock whose waiters spin on the owner and otherwise sleep in a queue.
 *
 * Problem
 * -------
 * One word says who holds the lock. Whoever finds it taken can spin, which is cheap when the holder is about
 * to let go and a disaster when the holder is not running, or sleep, which costs two context switches, often
 * more than the critical section. And a release that wakes a sleeper while somebody is ready to take the lock
 * at once buys nothing: the woken task finds the lock taken and sleeps again. A queue of such tasks is a
 * convoy.
 *
 * Algorithm
 * ---------
 * Acquire, in phases:
 * 1. attempt: take the lock if it is free.
 * 2. spin on owner: attempt again and again until the owner is off its CPU or the budget is spent. A writer
 *    does so only as *the* spinner (bit `spinner`), unless one runs already: one keeps the line quiet.
 *    Readers, who can all enter together, spin without the bit.
 * 3. queue: put yourself on the wait list, at its end; in front, if you were woken and found the lock taken by a
 *    writer again, so that those who come in between cannot pass you for ever. A writer that found it taken by
 *    readers goes to the end: in front, each moment without a hold would wake only that writer, and readers who
 *    could enter beside the others would sleep behind it. In policy park every waiter goes to the end, as
 *    in the server.
 * 4. last attempt: the lock may have been freed between 1 and 3, when nobody could know that you would sleep.
 * 5. sleep; when woken, start again at 1.
 *
 * Release: give the lock up; if it is free now and somebody is queued, wake. But while there is a spinner,
 * wake nobody who would only compete with it (spare the wake-up).
 *
 * Invariants
 * ----------
 * I1 (duty to wake). At any time when the lock is free and a locker is asleep in the queue, at least one
 * running party has the duty to wake or to take the lock:
 * - the releaser, until it has woken or seen the spinner bit;
 * - the spinner, until it acquires (then it is a holder, whose release comes) or clears the bit and makes its
 *   last attempt (phase 4), which finds the lock free (it is a holder again), or held by somebody whose release
 *   happens after the bit was cleared: that release wakes, unless the next spinner has taken the duty over;
 * - a task woken but not yet running (whenever `release_ok` is clear there is one): it sets `release_ok` before its next
 *   attempt. There may be several of them (I5); the duty is each one's.
 *
 * I2 (wait list). The list, and every waiter's wait state but the last step to not_waiting, change only under
 * `list_locked`; `has_waiters` and `until_free` describe the list whenever `list_locked` is clear.
 *
 * I3 (bystanders). Waiters in mode until_free do not compete for the lock. Every release that frees it wakes them,
 * spinner or not; but a late one leaves those alone that came after its free moment (I7).
 *
 * I4 (no starvation by spinners). A task that releases again and again spares wake-ups for at most
 * Host::spare_for_ticks() in a row, and none for a spinner that the mirror shows off its CPU, or of whom nothing is
 * known and that began longer ago than that (Host::is_spinner_overdue()).
 *
 * I5 (no convoy behind a woken task; as far as Host::is_wakeup_late() knows, which is a hint). Whoever was woken and
 * does not run soon is waiting for a CPU. The others in the queue are not kept asleep by that: the next release that
 * spares nobody wakes another. But in policy park, as that is stock's way: without a spin most of them would be
 * woken in vain.
 *
 * I6 (no trace). A task may leave in the middle of an acquire, by an exit in a signal handler, and leave behind its bit,
 * its place in the queue, or a wake-up that it was sent. It notes the lock before any of them, so that abandon() finds
 * it. Every acquire that has to wait calls that first, as the exit may itself take locks. As in the server, nothing
 * helps when a task leaves with the wait list locked, with others off the list and not yet woken, or with the lock taken
 * and not yet remembered.
 *
 * I7 (free moments). A task that waits until the lock is free need not see it free: a spinner may take it within the same
 * 100 ns. While until_free waiters are queued, the task that ends a free moment sets `free_since` with the same step
 * that takes the lock. The bit says: since the latest of these waiters began its call, the lock was not held exclusively
 * for a moment. Thus a waiter in whose call the bit is set already takes those before it off the list and clears it.
 * A task that takes until_free waiters off the list tells them whether there was such a moment.
 *
 * All conflicts are decided on the one state word, in its modification order: a waiter publishes itself
 * (has_waiters, with the list behind it) before its last attempt, and a releaser gives up before it looks at
 * the flags, by read-modify-writes of the same word; so one of the two sees the other. All of them are
 * sequentially consistent, as users of the server's own LWLocks may rely on full barriers; what each one
 * pairs with is said where it stands.
 *
 * Thread and process safety: any number of tasks, in one or several processes, as far as Host's memory
 * reaches.
 *
 * Source: PostgreSQL's lwlock.c (phases 1, 3, 4, 5 and the wait list), Linux mutex.c and osq_lock.c (phase
 * 2).
 */

#include <atomic>
#include <cstdint>
#include <utility>

#include "spin/spin_on_owner.h"

namespace adaptive {

enum class LockMode : uint8_t {
    exclusive,
    shared,
    until_free,
    freed,  ///< of an until_free waiter that is off the list: the lock was free during its call (I7)
};
enum class WaitState : uint8_t {
    not_waiting,
    waiting,
    removed
};  ///< removed: off the list, not yet signalled
enum class WaitPolicy : int { owner, blind, park };

/// What happened on the slow path, for the statistics.
enum class LockEvent : uint8_t {
    contended,
    spin_acquired,
    owner_off_cpu,
    budget_spent,
    slept,
    wakeup_sent,
    wakeup_spared,
    spin_ticks,
};

/// Where a state word keeps what. The values are those of the lock's home (a PostgreSQL version, say).
struct StateBits {
    uint32_t has_waiters;  ///< the wait list is not empty
    uint32_t release_ok;   ///< a release may wake lockers: the last one woken has come to run
    uint32_t list_locked;  ///< spinlock over the wait list
    uint32_t spinner;      ///< somebody spins for this lock
    uint32_t until_free;   ///< an until_free waiter is at the head of the wait list
    uint32_t free_since;   ///< the lock was free since the latest of them began to wait (I7)
    uint32_t exclusive;    ///< held exclusively
    uint32_t shared;       ///< one shared hold; holds add up
    uint32_t held_mask;    ///< every bit of a hold, exclusive or shared
};

/// What a task keeps of its own between its calls. Starts empty; belongs to one task, also in memory that is shared.
template <class Lock>
struct LockTask {
    Lock* waiting_for = nullptr;  ///< the lock that it waits for, spinning or queued (I6)
    uint64_t sparing_since = 0;   ///< 0: the last wake-up that was due was sent
    Lock* spun_for = nullptr;     ///< got by a spin of `spun_ticks`, to be counted after the hold
    uint64_t spun_ticks = 0;
    PaceLearner pace;
};

/**
 * The protocol over a Host, which says what a lock, a waiter and sleeping are. All of Host is static:
 *
 * - Lock, Waiter, WaitList: types. Waiter is a small handle, kNobody is none; WaitList is the list's head
 * - kBits: the StateBits
 * - state(Lock&): the word, as std::atomic_ref<uint32_t>
 * - wait_list(Lock&), empty_list(): the WaitList& in the lock; an empty local one
 * - push_head, push_tail, erase(WaitList&, Waiter), first(WaitList&), next(WaitList&, Waiter),
 * empty(WaitList&)
 * - self(): this task's Waiter (may refuse: no return)
 * - queued_already(): this task waits in a queue already, a bug that must not go on (no return)
 * - wait_state(Waiter): a WaitState, as std::atomic_ref<uint8_t>
 * - wait_mode(Waiter), set_wait_mode(Waiter, LockMode): what a queued waiter waits for
 * - lock_list_contended(Lock&): wait until list_locked looks clear
 * - sleep(), wake(Waiter): semaphore down on self, up on another; both may be spurious
 * - sleep_begins, sleep_ended(Lock&, LockMode): reporting around a sleep
 * - policy(), budget(): the WaitPolicy and SpinBudget in force
 * - spare_for_ticks(): I4's bound, CycleClock ticks
 * - note_wakeup(Lock&), is_wakeup_late(Lock&): a locker is being woken; it ought to run by now, a hint (I5)
 * - set_owner(Lock&), owner(Lock&): this task took the lock; the slot of who did
 * - set_spinner(Lock&), spinner(Lock&): likewise for the spinner
 * - is_spinner_overdue(Lock&): the last set_spinner() was longer ago than spare_for_ticks(), a hint (I4)
 * - look(slot): the SchedState of a slot, the mirror's word
 * - task(): this task's LockTask
 * - count(Lock&, LockEvent, uint64_t)
 */
template <class Host>
class QueueProtocol {
    using Lock = typename Host::Lock;
    using Waiter = typename Host::Waiter;
    using WaitList = typename Host::WaitList;
    static constexpr StateBits kBits = Host::kBits;

  public:
    /// Takes the lock. True if it was free at once, false if it had to be waited for, spinning or asleep.
    static bool acquire(Lock& lock, LockMode mode) {
        if (acquire_at_once(lock, mode)) [[likely]]
            return true;
        acquire_contended(lock, mode);
        return false;
    }

    /// Takes the lock if it is free at once.
    static bool acquire_conditionally(Lock& lock, LockMode mode) {
        if (!attempt(lock, mode)) return false;
        Host::set_owner(lock);
        return true;
    }

    /// Takes the lock if it is free at once (true); else waits until it has been freed, without taking it
    /// (false).
    static bool acquire_or_wait(Lock& lock, LockMode mode) {
        if (attempt(lock, mode)) {
            Host::set_owner(lock);
            return true;
        }
        begin_to_wait(lock);
        queue_self(lock, LockMode::until_free);
        const bool taken = attempt(lock, mode);
        if (taken) {
            dequeue_self(lock);
            Host::set_owner(lock);
        } else {
            sleep_until_woken(lock, LockMode::until_free, mode);
        }
        end_to_wait();
        return taken;
    }

    /**
     * Waits until the lock is not held exclusively, or was not for a moment since the call began (true), or until
     * `settled()` says that there is no more to wait for (false). Whoever changes what `settled` looks at does so inside
     * update(), or before a release.
     */
    template <class Settled>
    static bool wait_until(Lock& lock, Settled&& settled) {
        for (;;) {
            if (!held_exclusively(lock)) return true;
            if (settled()) return false;
            begin_to_wait(lock);

            // From here on, a release or an update wakes us (I3). What happened before is seen by looking
            // again: a change inside an update() that did not find us came before, on the state word.
            queue_self(lock, LockMode::until_free);
            bool freed = !held_exclusively(lock);
            const bool over = freed || settled();
            if (over) {
                dequeue_self(lock);
            } else {
                sleep_until_woken(lock, LockMode::until_free, LockMode::exclusive);
                freed = Host::wait_mode(Host::self()) == LockMode::freed;
            }
            end_to_wait();
            if (over || freed) return freed;
        }
    }

    /// Runs `change()` with the wait list locked and wakes those who wait_until() it.
    template <class Change>
    static void update(Lock& lock, Change&& change) {
        lock_list(lock);
        change();
        WaitList woken = take_until_free(lock, was_free(lock));
        unlock_list(lock, 0, 0);
        wake_all(lock, woken);
    }

    /// Gives up a hold in `mode` (exclusive or shared), and wakes whom it must.
    static void release(Lock& lock, LockMode mode) {
        const uint32_t hold = hold_of(mode);
        // Pairs with the waiters' publication in unlock_list(): see the file's head.
        const uint32_t left = Host::state(lock).fetch_sub(hold) - hold;
        Host::task().pace.released(&lock, mode == LockMode::exclusive);
        if (is_free_with_waiters(left)) [[unlikely]]
            after_release(lock, left);
        disown(lock);
    }

    /// The hold has ended for this task: it was released, or somebody else will release it.
    static void disown(Lock& lock) {
        if (Host::task().spun_for == &lock) [[unlikely]]
            count_deferred_spin(lock);
    }

    /// For a task that was thrown out of an acquire (an exit in a signal handler): nobody else would clear away what it
    /// left behind (I6). Otherwise it does nothing.
    static void abandon() {
        if (Host::task().waiting_for == nullptr) [[likely]]
            return;
        Lock& lock = *std::exchange(Host::task().waiting_for, nullptr);
        const Waiter self = Host::self();
        if (wait_state(self) != WaitState::not_waiting) {
            dequeue_self(lock);
            // As a waker would: the signal handler may return, and the acquire that it interrupted go on.
            Host::wake(self);
        }
        // The spinner bit may be another task's by now: clearing that costs a wake-up. A duty to wake may be this
        // task's (I1).
        auto state = Host::state(lock);
        state.fetch_or(kBits.release_ok);
        const uint32_t left = state.fetch_and(~kBits.spinner) & ~kBits.spinner;
        if (is_free_with_waiters(left)) after_release(lock, left);
    }

  private:
    static uint32_t hold_of(LockMode mode) {
        return mode == LockMode::exclusive ? kBits.exclusive : kBits.shared;
    }

    /// The bits of the holds that exclude one in `mode`.
    static uint32_t conflicts_of(LockMode mode) {
        return mode == LockMode::exclusive ? kBits.held_mask : kBits.exclusive;
    }

    static bool is_free_with_waiters(uint32_t state) {
        return (state & (kBits.held_mask | kBits.has_waiters)) == kBits.has_waiters;
    }

    static bool held_exclusively(Lock& lock) { return (Host::state(lock).load() & kBits.exclusive) != 0; }

    /// List locked, until_free waiters in it: was the lock free since the latest of them began its call (I7)?
    static bool was_free(Lock& lock) {
        const uint32_t seen = Host::state(lock).load();
        return (seen & kBits.free_since) != 0 || (seen & kBits.exclusive) == 0;
    }

    /// Takes the lock if it is free for `mode`, clearing the bits in `clear` with the same step.
    static bool attempt(Lock& lock, LockMode mode, uint32_t clear = 0) {
        auto state = Host::state(lock);
        const uint32_t conflicts = conflicts_of(mode), hold = hold_of(mode);
        uint32_t seen = state.load();
        while ((seen & conflicts) == 0) {
            uint32_t taken = (seen + hold) & ~clear;
            if (mode == LockMode::exclusive && (seen & kBits.until_free)) taken |= kBits.free_since;  // I7
            if (state.compare_exchange_weak(seen, taken)) [[likely]]
                return true;
        }
        return false;
    }

    /// Phase 1. Inlined into its caller it costs no more than the server's own, which is all that most acquires do.
    [[gnu::always_inline]] static bool acquire_at_once(Lock& lock, LockMode mode) {
        Host::task().pace.acquiring(&lock, mode == LockMode::exclusive);
        if (!attempt(lock, mode)) [[unlikely]]
            return false;
        Host::set_owner(lock);
        return true;
    }

    static void begin_to_wait(Lock& lock) {
        abandon();  // left over from an acquire that this one interrupted
        Host::task().waiting_for = &lock;
        std::atomic_signal_fence(std::memory_order_seq_cst);  // I6
        Host::count(lock, LockEvent::contended, 1);
    }
    static void end_to_wait() {
        std::atomic_signal_fence(std::memory_order_seq_cst);
        Host::task().waiting_for = nullptr;
    }

    [[gnu::noinline]] static void acquire_contended(Lock& lock, LockMode mode) {
        begin_to_wait(lock);
        bool spun = false;
        for (bool woken_in_vain = false;; woken_in_vain = true) {
            spun = spin(lock, mode);
            if (spun) break;

            queue_self(lock, mode,
                       woken_in_vain && Host::policy() != WaitPolicy::park && held_exclusively(lock));
            if (attempt(lock, mode)) {  // the last attempt: I1 rests on it
                dequeue_self(lock);
                break;
            }
            sleep_until_woken(lock, mode, mode);
            if (attempt(lock, mode)) break;
        }
        end_to_wait();
        Host::set_owner(lock);
        if (mode == LockMode::exclusive) Host::task().pace.waited(&lock, spun);
    }

    // ---- the spinner ----

    /// Phase 2. True if the lock was taken; false if the caller must queue, with the spinner bit given back.
    static bool spin(Lock& lock, LockMode mode) {
        const WaitPolicy policy = Host::policy();
        if (policy == WaitPolicy::park) return false;
        if (mode == LockMode::exclusive && !become_spinner(lock)) return false;

        const uint64_t start = CycleClock::now();
        const SpinEnd end = spin_on_owner(
            [&] { return attempt(lock, mode, mode == LockMode::exclusive ? kBits.spinner : 0); },
            [&] { return Host::owner(lock); },
            [&](auto owner) { return policy == WaitPolicy::blind ? SchedState::on_cpu : Host::look(owner); },
            Host::budget(), mode == LockMode::exclusive ? Host::task().pace.pace(&lock) : SpinPace::quick());
        // From here on releases wake again; the queueing and last attempt that follow make good for those before.
        if (mode == LockMode::exclusive && end != SpinEnd::acquired)
            Host::state(lock).fetch_and(~kBits.spinner);

        LockTask<Lock>& task = Host::task();
        const uint64_t ticks = CycleClock::now() - start;
        if (end == SpinEnd::acquired && task.spun_for == nullptr) {
            // Others wait by now: to count takes a fifth of a short hold. One such lock at a time; within its hold
            // another spin is counted at once.
            task.spun_for = &lock;
            task.spun_ticks = ticks;
        } else {
            count_spin(lock, end, ticks);
        }
        return end == SpinEnd::acquired;
    }

    static void count_spin(Lock& lock, SpinEnd end, uint64_t ticks) {
        Host::count(lock, LockEvent::spin_ticks, ticks);
        Host::count(lock,
                    end == SpinEnd::acquired        ? LockEvent::spin_acquired
                    : end == SpinEnd::owner_off_cpu ? LockEvent::owner_off_cpu
                                                    : LockEvent::budget_spent,
                    1);
    }

    [[gnu::noinline]] static void count_deferred_spin(Lock& lock) {
        Host::task().spun_for = nullptr;
        count_spin(lock, SpinEnd::acquired, Host::task().spun_ticks);
    }

    /// False if somebody else is. A spinner that does not seem to spin any more is replaced. It will still
    /// believe in its role when it runs again: then two spin, and the first to end clears the bit for both.
    /// That spares less and never too much: whoever spins clears the bit at the end, so it is never set
    /// without somebody who owes I1's last attempt.
    static bool become_spinner(Lock& lock) {
        auto state = Host::state(lock);
        if ((state.load(std::memory_order_relaxed) & kBits.spinner) && seems_to_spin(lock)) return false;
        Host::set_spinner(lock);
        state.fetch_or(kBits.spinner);
        return true;
    }

    /// Of the spinner that the state word shows. The bit of one of whom nothing is known may have been left behind.
    static bool seems_to_spin(Lock& lock) {
        const SchedState state = Host::look(Host::spinner(lock));
        return state == SchedState::unknown ? !Host::is_spinner_overdue(lock) : !is_off_cpu(state);
    }

    // ---- the releaser ----

    /// The lock was freed, leaving `left` in the state word, which has waiters.
    [[gnu::noinline]] static void after_release(Lock& lock, uint32_t left) {
        const bool lockers_may_go = (left & kBits.release_ok) != 0 ||
                                    (Host::policy() != WaitPolicy::park && Host::is_wakeup_late(lock));  // I5
        if (lockers_may_go && !((left & kBits.spinner) && may_spare_wakeup(lock))) {
            wake_waiters(lock);
        } else {
            if (lockers_may_go) Host::count(lock, LockEvent::wakeup_spared, 1);
            if (left & kBits.until_free) wake_until_free(lock);  // I3
        }
    }

    /// I4: may the spinner be left to take the lock, with the sleepers left asleep?
    static bool may_spare_wakeup(Lock& lock) {
        const uint64_t now = CycleClock::now();
        uint64_t& since = Host::task().sparing_since;
        if (since == 0) since = now;
        return now - since < Host::spare_for_ticks() && seems_to_spin(lock);
    }

    /// Wakes those at the head of the list who can go: bystanders, and one writer or the readers before it.
    static void wake_waiters(Lock& lock) {
        Host::task().sparing_since = 0;
        // Before the list is locked: this takes a transfer of another line. Should there be no locker, it does not matter.
        if (Host::policy() != WaitPolicy::park) Host::note_wakeup(lock);
        lock_list(lock);
        WaitList woken = take_freed(lock);
        WaitList& list = Host::wait_list(lock);
        bool woke_locker = false;
        for (Waiter w = Host::first(list); w != Host::kNobody;) {
            const Waiter next = Host::next(list, w);
            const LockMode mode = Host::wait_mode(w);
            if (mode != LockMode::until_free && !(woke_locker && mode == LockMode::exclusive)) {
                move_to(list, woken, w);
                woke_locker = true;
                if (mode == LockMode::exclusive) break;
            }
            w = next;
        }
        // A woken locker has the duty now (I1): no release wakes another one until it runs, or is late.
        unlock_list(lock, woke_locker ? 0 : kBits.release_ok, woke_locker ? kBits.release_ok : 0);
        wake_all(lock, woken);
    }

    static void wake_until_free(Lock& lock) {
        lock_list(lock);
        WaitList woken = take_freed(lock);
        unlock_list(lock, 0, 0);
        wake_all(lock, woken);
    }

    // ---- the wait list (I2) ----

    /// Returns the state word as it was: its has_waiters and until_free stay true until unlock_list().
    static uint32_t lock_list(Lock& lock) {
        for (;;) {
            const uint32_t seen = Host::state(lock).fetch_or(kBits.list_locked);
            if (!(seen & kBits.list_locked)) return seen;
            Host::lock_list_contended(lock);
        }
    }

    /// Unlocks the wait list, sets and clears the given bits, and makes has_waiters, until_free and free_since true
    /// again. Whoever has put an until_free waiter on the list sets until_free.
    static void unlock_list(Lock& lock, uint32_t set, uint32_t clear) {
        auto state = Host::state(lock);
        uint32_t seen = state.load(std::memory_order_relaxed);
        WaitList& list = Host::wait_list(lock);
        const bool may_be_first = ((seen | set) & kBits.until_free) != 0;
        set &= ~kBits.until_free;
        if (!Host::empty(list)) {
            set |= kBits.has_waiters;
            // until_free waiters are always in front. To look costs a transfer of the first waiter's line, while others
            // want the list.
            if (may_be_first && Host::wait_mode(Host::first(list)) == LockMode::until_free)
                set |= kBits.until_free;
        }
        clear |= kBits.list_locked | ((kBits.has_waiters | kBits.until_free) & ~set);
        if (!(set & kBits.until_free)) clear |= kBits.free_since;
        while (!state.compare_exchange_weak(seen, (seen | set) & ~clear)) {
        }
    }

    static void queue_self(Lock& lock, LockMode mode, bool in_front = false) {
        const Waiter self = Host::self();
        if (wait_state(self) != WaitState::not_waiting) Host::queued_already();
        const uint32_t seen = lock_list(lock);
        WaitList woken = Host::empty_list();
        uint32_t clear = 0;
        if (mode == LockMode::until_free && (Host::state(lock).load() & kBits.free_since)) {
            woken = take_until_free(lock,
                                    true);  // that moment was theirs, and may have been before our call (I7)
            clear = kBits.free_since;
        }
        Host::set_wait_mode(self, mode);
        set_wait_state(self, WaitState::waiting);
        WaitList& list = Host::wait_list(lock);
        // The until_free waiters come before all others: unlock_list() and take_until_free() rely on it.
        if (mode == LockMode::until_free || (in_front && !(seen & kBits.until_free)))
            Host::push_head(list, self);
        else
            Host::push_tail(list, self);
        unlock_list(lock, mode == LockMode::until_free ? kBits.until_free : 0, clear);
        wake_all(lock, woken);
    }

    /// Undoes queue_self(): the lock turned out not to be worth sleeping for.
    static void dequeue_self(Lock& lock) {
        const Waiter self = Host::self();
        lock_list(lock);
        const bool still_queued = wait_state(self) == WaitState::waiting;
        if (still_queued) {
            Host::erase(Host::wait_list(lock), self);
            set_wait_state(self, WaitState::not_waiting);
        }
        unlock_list(lock, 0, 0);

        if (!still_queued) {
            // Somebody chose us to be woken and may have cleared release_ok for it: the duty is ours, give it
            // back to the releasers. Then absorb the wake-up, or it would end some later sleep.
            Host::state(lock).fetch_or(kBits.release_ok);
            absorb_wakeup();
        }
    }

    /// Sleeps as a waiter queued in mode `queued`, on behalf of an acquire in `mode`.
    static void sleep_until_woken(Lock& lock, LockMode queued, LockMode mode) {
        Host::count(lock, LockEvent::slept, 1);
        Host::sleep_begins(lock, mode);
        absorb_wakeup();
        // We run: the next release may wake again. Before our attempt, so that I1's duty passes on without a
        // gap.
        if (queued != LockMode::until_free) Host::state(lock).fetch_or(kBits.release_ok);
        Host::sleep_ended(lock, mode);
    }

    /// Sleeps until a waker has made us not_waiting. The semaphore is shared with other uses: what was taken
    /// from it in excess is given back.
    static void absorb_wakeup() {
        const Waiter self = Host::self();
        int taken_in_excess = 0;
        for (;;) {
            Host::sleep();
            if (wait_state(self) == WaitState::not_waiting) break;
            taken_in_excess++;
        }
        while (taken_in_excess-- > 0) Host::wake(self);
    }

    /// The bystanders, unless they began to wait after the free moment for which they are to be woken.
    static WaitList take_freed(Lock& lock) {
        return was_free(lock) ? take_until_free(lock, true) : Host::empty_list();
    }

    static WaitList take_until_free(Lock& lock, bool freed) {
        WaitList woken = Host::empty_list();
        WaitList& list = Host::wait_list(lock);
        for (Waiter w = Host::first(list);
             w != Host::kNobody && Host::wait_mode(w) == LockMode::until_free;) {
            const Waiter next = Host::next(list, w);
            move_to(list, woken, w);
            if (freed) Host::set_wait_mode(w, LockMode::freed);
            w = next;
        }
        return woken;
    }

    static void move_to(WaitList& from, WaitList& to, Waiter w) {
        Host::erase(from, w);
        Host::push_tail(to, w);
        set_wait_state(w, WaitState::removed);
    }

    static void wake_all(Lock& lock, WaitList& woken) {
        for (Waiter w = Host::first(woken); w != Host::kNobody;) {
            const Waiter next = Host::next(woken, w);
            Host::erase(woken, w);
            // Only now may the waiter queue itself elsewhere: the erase above must be visible first. Pairs
            // with the load in wait_state() by absorb_wakeup().
            set_wait_state(w, WaitState::not_waiting);
            Host::wake(w);
            Host::count(lock, LockEvent::wakeup_sent, 1);
            w = next;
        }
    }

    static WaitState wait_state(Waiter w) {
        return static_cast<WaitState>(Host::wait_state(w).load(std::memory_order_acquire));
    }
    static void set_wait_state(Waiter w, WaitState s) {
        Host::wait_state(w).store(static_cast<uint8_t>(s), std::memory_order_release);
    }
};

}  // namespace adaptive
