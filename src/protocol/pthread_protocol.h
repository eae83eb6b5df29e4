#pragma once
/*
 * Spin on owner for a mutex whose word is the C library's: what waits here and what waits in glibc may wait for
 * the same mutex.
 *
 * The word is glibc's low-level lock, 32 bits: 0 free, 1 held, 2 held and somebody may be asleep. Whoever sleeps
 * has set 2 and sleeps on 2; whoever was woken takes the mutex with 2, as others may sleep; a release sets 0, and
 * wakes one if there was a 2. Any mixture of glibc's functions and these keeps to that, so that code which nobody
 * puts anything in the place of (condition variables, mtx_lock, a library that was bound otherwise) stays right.
 *
 * Problem
 * -------
 * A release that finds 2 wakes somebody, although a spinner may be about to take the mutex: the convoy of
 * queue_protocol.h. To spare that wake-up the releaser must know of the spinner, and be sure that it will not walk
 * away without waking; but the word has no room for one.
 *
 * Algorithm
 * ---------
 * A spinner takes a seat: a 64-bit word of this process, found by hashing the mutex's address:
 *
 *   bits  0 .. 15   the spinner's slot in the mirror, kUnnamed if it has none
 *   bit  16         a wake-up was spared for the spinner, who owes it now
 *   bits 16 .. 63   the mutex's address (a multiple of 4); 0: the seat is free
 *
 * Acquire: attempt; spin on the owner in the seat, unless another spinner has it who is not seen off its CPU; else,
 * and then, glibc's protocol: set 2, sleep, again.
 * Release: set 0. If there was a 2, and the seat names this mutex and a spinner that is on a CPU, mark the wake-up
 * as owed there, by compare-and-swap; if that does not succeed, wake one.
 *
 * Invariants
 * ----------
 * I1 (duty to wake). Whoever takes a spinner out of its seat learns, by the same compare-and-swap, whether a wake-up
 * is owed: a spinner that leaves its seat pays (it sets 2 if it holds the mutex or finds it held, else wakes one);
 * one that takes the seat of another keeps the mark. So a wake-up is either sent, or owed by one who runs, or there
 * is a 2 in the word of a holder. That is glibc's own invariant but for the second case, which glibc's functions need
 * not know of.
 *
 * I2 (a free mutex is not touched). After the step that frees the mutex a release uses its address only: for the seat
 * and for the wake-up. Its memory may be gone.
 *
 * I3 (bounds). A spin ends with its budget. A task that releases again and again spares for at most
 * Host::spare_for_ticks() in a row, and only for a spinner that the mirror shows on a CPU.
 *
 * I4. As with glibc there is no order among waiters; one that has been overtaken for kStarvingNs spins also where
 * another does.
 *
 * Host says what the words, sleeping and the mirror are, so that tests can run this code in every interleaving. All of
 * it is static:
 * - Lock; word(Lock&), seat(Lock&): handles with load, store, exchange, compare_exchange_weak and _strong of
 *   std::atomic<int> and std::atomic<uint64_t>
 * - key(const Lock*): the address in its place in a seat; 0: this mutex has no seat. owner(Lock&): thread id of the
 *   holder; 0: unknown
 * - slot(): this task's slot; find(thread id): another one's; look(slot): the mirror's word
 * - sleep(Lock&): on 2, a FutexWait; wake(Lock&): one
 * - starves(since), pace(Lock&), waited(Lock&, spun), sparing_since(), spare_for_ticks(): see mutex_protocol.h
 * - count(LockEvent): statistics
 *
 * Thread safety: any number of threads of one process. Acquire and release order as pthread_mutex_lock() and
 * pthread_mutex_unlock() do. Source: glibc's nptl/lowlevellock.c; Drepper, "Futexes are tricky".
 */

#include <atomic>
#include <cstdint>

#include "protocol/mutex_protocol.h"
#include "protocol/queue_protocol.h"
#include "spin/spin_on_owner.h"

namespace adaptive {

template <class Host>
class PthreadProtocol {
    using Lock = typename Host::Lock;

  public:
    static constexpr int kFree = 0, kHeld = 1, kHeldAndWaited = 2;
    static constexpr uint64_t kOwed = 1ULL << 16;
    static constexpr uint64_t kSlot = 0xffff;
    static constexpr uint64_t kAddress = ~(kSlot | kOwed);

    static bool try_acquire(Lock& lock) { return take(lock, kHeld); }

    static void acquire(Lock& lock, const SpinBudget& budget) {
        const uint64_t since = CycleClock::now();
        int taken = kHeld;
        Host::count(LockEvent::contended);
        bool spun;
        while (!(spun = spin(lock, taken, budget, taken == kHeldAndWaited && Host::starves(since)))) {
            if (Host::word(lock).exchange(kHeldAndWaited, std::memory_order_acquire) == kFree) break;
            Host::count(LockEvent::slept);
            if (Host::sleep(lock) != FutexWait::changed) taken = kHeldAndWaited;
        }
        Host::waited(lock, spun);
    }

    /// Only the spin: for those who sleep in the C library, up to a deadline. False: not acquired.
    static bool acquire_spinning(Lock& lock, const SpinBudget& budget) {
        Host::count(LockEvent::contended);
        if (!spin(lock, kHeld, budget, false)) return false;
        Host::waited(lock, true);
        return true;
    }

    static void release(Lock& lock) {
        Lock* const address = &lock;
        // Pairs with the acquire of whoever takes it next. `lock` may be gone afterwards.
        if (Host::word(lock).exchange(kFree, std::memory_order_release) < kHeldAndWaited) [[likely]]
            return;
        if (may_spare_wakeup(address)) return Host::count(LockEvent::wakeup_spared);
        Host::count(LockEvent::wakeup_sent);
        Host::wake(address);
    }

  private:
    static constexpr uint64_t kStanding = 0;

    static bool take(Lock& lock, int taken) {
        int seen = kFree;
        return Host::word(lock).compare_exchange_strong(seen, taken, std::memory_order_acquire,
                                                        std::memory_order_relaxed);
    }

    /// True if the mutex was taken. In any case nothing is owed any more.
    [[gnu::noinline]] static bool spin(Lock& lock, int taken, const SpinBudget& budget, bool starves) {
        bool may_spin = true;
        const uint64_t seated = sit_down(lock, may_spin);
        if (!may_spin && !starves) return false;

        uint32_t watched = 0;
        SlotId slot = 0;
        const SpinEnd end = spin_on_owner(
            [&] { return Host::word(lock).load(std::memory_order_relaxed) == kFree && take(lock, taken); },
            [&] { return Host::owner(lock); },
            [&](uint32_t tid) {
                if (tid != watched) slot = Host::find(tid);
                watched = tid;
                return Host::look(slot);
            },
            budget, Host::pace(lock));
        const bool acquired = end == SpinEnd::acquired;
        Host::count(acquired                       ? LockEvent::spin_acquired
                    : end == SpinEnd::budget_spent ? LockEvent::budget_spent
                                                   : LockEvent::owner_off_cpu);
        if (seated != kStanding && stand_up(lock, seated)) pay(lock, acquired);
        return acquired;
    }

    /// What the seat says of this task, or kStanding: there is none to be had. may_spin: nobody else does.
    static uint64_t sit_down(Lock& lock, bool& may_spin) {
        const uint64_t key = Host::key(&lock);
        if (key == 0) return kStanding;
        const uint64_t mine = key | Host::slot();
        auto&& seat = Host::seat(&lock);
        uint64_t seen = seat.load(std::memory_order_relaxed);
        do {
            if (seen != 0 && (seen & kAddress) != key) return kStanding;  // of another mutex: spin without
            may_spin = seen == 0 || is_off_cpu(Host::look(static_cast<SlotId>(seen & kSlot)));
            if (!may_spin) return kStanding;
        } while (!seat.compare_exchange_weak(seen, mine | (seen & kOwed), std::memory_order_acq_rel,
                                             std::memory_order_relaxed));
        return mine;
    }

    /// True if a wake-up is owed. Not by one who was put out of the seat: whoever did that owes it.
    static bool stand_up(Lock& lock, uint64_t mine) {
        auto&& seat = Host::seat(&lock);
        uint64_t seen = seat.load(std::memory_order_relaxed);
        do {
            if ((seen & ~kOwed) != mine) return false;
        } while (!seat.compare_exchange_weak(seen, 0, std::memory_order_acq_rel, std::memory_order_relaxed));
        return (seen & kOwed) != 0;
    }

    static void pay(Lock& lock, bool holds) {
        if (holds) return Host::word(lock).store(kHeldAndWaited, std::memory_order_relaxed);
        int seen = kHeld;
        if (!Host::word(lock).compare_exchange_strong(seen, kHeldAndWaited, std::memory_order_relaxed,
                                                      std::memory_order_relaxed) &&
            seen == kFree)
            Host::wake(&lock);
    }

    /// May the spinner be left to take the mutex, with the sleepers left asleep? Then it owes the wake-up.
    static bool may_spare_wakeup(Lock* lock) {
        const uint64_t key = Host::key(lock);
        uint64_t& since = Host::sparing_since();
        auto&& seat = Host::seat(lock);
        uint64_t seen = seat.load(std::memory_order_relaxed);
        while (key != 0 && (seen & kAddress) == key &&
               Host::look(static_cast<SlotId>(seen & kSlot)) == SchedState::on_cpu) {
            const uint64_t now = CycleClock::now();
            if (since == 0) since = now;
            if (now - since >= Host::spare_for_ticks()) break;
            // Pairs with the acquire in stand_up() and sit_down(): who owes sees the mutex as it was left here.
            if (seat.compare_exchange_weak(seen, seen | kOwed, std::memory_order_acq_rel,
                                           std::memory_order_relaxed))
                return true;
        }
        since = 0;
        return false;
    }
};

}  // namespace adaptive
