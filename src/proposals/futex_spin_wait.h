#pragma once
/*
 * futex_spin_wait: wait for a wake-up, spinning as long as the task runs that is to send it.
 *
 * What FUTEX_SPIN was proposed to do inside futex_wait(2): the futex holds the thread id of a lock's owner; a
 * waiter whose owner is on a CPU expects the wake-up soon and does not go to sleep for it. Here both happen in
 * user space, and the owner's state is read in the mirror.
 *
 * A wake-up by the kernel cannot reach a task that spins in user space. So beside the owner stands a count of
 * wake-ups, which spinners watch and sleepers sleep on: both see every one that is sent after they came.
 *
 * The rest is as with any futex: the owner's word is the caller's, who may use FUTEX_WAITERS and the spare bit
 * of it, both ignored here, and a wait may end although another waiter was meant: wake-ups are for all who spin
 * and `count` of those who sleep.
 *
 * Which task the owner is. It has to be in the mirror: whoever makes itself the owner says
 * this_task().note_running(). Its id is looked up once, at the beginning. A task that has died and another one
 * with its id are told apart by the mirror, whose registrations die with the task; before it sleeps and then
 * every 50 ms, the waiter asks the kernel whether there is such a task: an owner that dies wakes nobody.
 *
 * Thread and process safety: yes, with Sharing::process_shared across processes of one pid namespace.
 * Errors: none; the outcome says what happened. Source: "[RFC PATCH 0/1] Add FUTEX_SPIN operation", 2024.
 */

#include <atomic>
#include <cstdint>

#include "lock/this_task.h"
#include "mirror/claim.h"

namespace adaptive {

/// In any memory; zeroed: nobody owns it.
struct FutexSpinWord {
    uint32_t owner = 0;  ///< FUTEX_TID_MASK: thread id; the two bits above it are the user's
    uint32_t wakes = 0;
};

enum class FutexSpinEnd : uint8_t {
    woken_spinning,  ///< or just before going to sleep; or the owner has changed meanwhile
    woken_asleep,
    timed_out,
    value_differs,  ///< the owner was another than expected, from the beginning
    no_such_task,
};

inline constexpr int64_t kOwnerCheckNs = 50'000'000;

/// Waits for futex_spin_wake() while the owner is the task with id `expected`.
inline FutexSpinEnd futex_spin_wait(FutexSpinWord& futex, uint32_t expected, Sharing sharing,
                                    const Deadline& deadline = Deadline::never()) noexcept {
    // Against a mirror that lies, then the waiter sleeps as it would without one; and shorter if it can only guess:
    // source rseq takes an owner that sleeps for one that runs.
    const int64_t longest_ns = process_mirror().source() == Source::bpf ? 100'000'000 : 200'000;

    const std::atomic_ref<uint32_t> owner(futex.owner), wakes(futex.wakes);
    // Before the owner is read: a wake-up from now on is noticed. Pairs with the release in futex_spin_wake().
    const uint32_t wakes_before = wakes.load(std::memory_order_acquire);
    const auto differs = [&] {
        return ((owner.load(std::memory_order_acquire) ^ expected) & FUTEX_TID_MASK) != 0;
    };
    if (differs()) return FutexSpinEnd::value_differs;

    ThisTask& task = this_task();
    task.note_running();
    const uint32_t tid = expected & FUTEX_TID_MASK;
    const SlotId slot = task.find(tid, sharing);
    if (slot == 0 && !task_exists(tid)) return FutexSpinEnd::no_such_task;

    const SpinBudget budget = spin_budget(deadline, longest_ns);
    const SpinEnd end = spin_on_owner(
        [&] { return wakes.load(std::memory_order_acquire) != wakes_before || differs(); },
        [&] { return slot; }, [&](SlotId s) { return task.look(s, sharing); }, budget, SpinPace::quick());
    if (end == SpinEnd::acquired) return FutexSpinEnd::woken_spinning;

    if (deadline.passed()) return FutexSpinEnd::timed_out;
    for (bool slept = false;; slept = true) {
        if (!task_exists(tid)) return FutexSpinEnd::no_such_task;
        const FutexWait wait =
            futex_wait_in_slices(&futex.wakes, wakes_before, sharing, deadline, kOwnerCheckNs);
        task.note_slept();
        switch (wait) {
            case FutexWait::woken:
                return FutexSpinEnd::woken_asleep;
            case FutexWait::changed:
                return slept ? FutexSpinEnd::woken_asleep : FutexSpinEnd::woken_spinning;
            case FutexWait::timed_out:
                return FutexSpinEnd::timed_out;
            case FutexWait::interrupted:
                break;
        }
    }
}

/// Wakes all who spin and up to `count` of those who sleep. Returns how many of the latter.
inline int futex_spin_wake(FutexSpinWord& futex, int count, Sharing sharing) noexcept {
    std::atomic_ref<uint32_t>(futex.wakes).fetch_add(1, std::memory_order_release);
    return futex_wake(&futex.wakes, count, sharing);
}

}  // namespace adaptive
