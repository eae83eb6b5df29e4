#pragma once
/*
 * Spin on owner: wait for a lock by spinning exactly as long as its owner is on a CPU.
 *
 * The same rule as the Linux kernel's mutex_spin_on_owner() and rwsem_spin_on_owner(), for user space, with the
 * mirror in the place of task_struct::on_cpu. The mirror is a hint: whatever it says, the spin ends within the
 * budget, so a wrong hint costs time and never correctness.
 *
 * Thread and process safety: the loop keeps no state outside its arguments.
 */

#include <cstdint>

#include "mirror/mirror.h"
#include "spin/cycle_clock.h"

namespace adaptive {

enum class SpinEnd : uint8_t { acquired, owner_off_cpu, budget_spent };

/// How long a spin may last, in CycleClock ticks.
struct SpinBudget {
    uint64_t watched;    ///< while the mirror says that the owner is on a CPU
    uint64_t unwatched;  ///< while nothing is known of the owner (no mirror, or an owner without a slot)
};

/**
 * Spins until `try_acquire()` is true, the owner is off its CPU, or the budget is spent.
 *
 * try_acquire: one attempt; it should only read unless the lock looks free, to leave the line to the holder.
 * owner_state: SchedState of the present owner; a spin that does not want to look returns on_cpu.
 */
template <class TryAcquire, class OwnerState>
inline SpinEnd spin_on_owner(TryAcquire&& try_acquire, OwnerState&& owner_state, const SpinBudget& budget) {
    // Each look at the lock or at the owner can cost the holder a cache miss, so looks get rarer up to a pause that
    // is still short beside a wake-up (32 pauses are 0.5 to 1.5 us).
    constexpr int kLongestPause = 32;
    const uint64_t start = CycleClock::now();
    bool seen_off_cpu = false;

    for (int pauses = 1;; pauses = pauses < kLongestPause ? pauses * 2 : kLongestPause) {
        if (try_acquire()) return SpinEnd::acquired;

        const SchedState state = owner_state();
        const bool off_cpu = state != SchedState::on_cpu && state != SchedState::unknown;
        // An acquirer stores its slot just after it took the lock, so one look may still show the owner before it,
        // who sleeps by now. A second look in a row cannot, for any practical purpose.
        if (off_cpu && seen_off_cpu) return SpinEnd::owner_off_cpu;
        seen_off_cpu = off_cpu;

        const uint64_t limit = state == SchedState::unknown ? budget.unwatched : budget.watched;
        if (CycleClock::now() - start >= limit) return SpinEnd::budget_spent;

        for (int i = 0; i < pauses; i++) CycleClock::pause();
    }
}

}  // namespace adaptive
