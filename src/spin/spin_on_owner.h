#pragma once
/*
 * Spin on owner: wait for a lock by spinning exactly as long as its owner is on a CPU.
 *
 * The same rule as the Linux kernel's mutex_spin_on_owner() and rwsem_spin_on_owner(), for user space, with
 * the mirror in the place of task_struct::on_cpu. The mirror is a hint: whatever it says, the spin ends
 * within the budget, so a wrong hint costs time and never correctness. Nor does a clock that jumps or stands
 * still: a jump back ends what it prolongs, and the number of looks is bounded as well.
 *
 * Thread and process safety: the loop keeps no state outside its arguments.
 */

#include <cstdint>

#include "mirror/mirror.h"
#include "spin/cycle_clock.h"
#include "spin/pace.h"

namespace adaptive {

enum class SpinEnd : uint8_t { acquired, owner_off_cpu, budget_spent };

inline bool is_off_cpu(SchedState state) {
    return state != SchedState::on_cpu && state != SchedState::unknown;
}

/// How long a spin may last, in CycleClock ticks.
struct SpinBudget {
    uint64_t watched;    ///< while the mirror says that the owner is on a CPU
    uint64_t unwatched;  ///< while nothing is known of the owner (no mirror, or an owner without a slot)

    /// As many looks as no processor makes in the longer of the two: one takes more than 10 ns.
    uint64_t looks() const {
        const uint64_t longest = watched > unwatched ? watched : unwatched;
        return longest / CycleClock::ticks_per_microsecond() * 100 + 100;
    }
};

/**
 * Spins until `try_acquire()` is true, the owner is off its CPU, or the budget is spent.
 *
 * try_acquire: one attempt; it should only read unless the lock looks free, to leave the line to the holder.
 * owner: who the lock says has it; read with each attempt, from the same line.
 * state_of: SchedState of that owner; a spin that does not want to look returns on_cpu. Looked at between
 * attempts too: it must not touch the lock.
 * pace: the least time between attempts while the owner runs. The caller has just failed to take the lock, so the
 * first one comes after that time, too.
 */
template <class Clock = CycleClock, class TryAcquire, class Owner, class StateOf>
inline SpinEnd spin_on_owner(TryAcquire&& try_acquire, Owner&& owner, StateOf&& state_of,
                             const SpinBudget& budget, SpinPace pace) {
    const uint64_t start = Clock::now();
    uint64_t now = start, looks_left = budget.looks();
    auto watched = owner();
    SchedState state = state_of(watched);

    for (;;) {
        const bool was_off_cpu = is_off_cpu(state);
        // Differences, not moments: a clock that jumps back seems far ahead.
        for (const uint64_t last_attempt = now; now - last_attempt < pace.ticks;) {
            Clock::pause();
            state = state_of(watched);
            now = Clock::now();
            if (is_off_cpu(state) || --looks_left == 0) break;
        }
        if (try_acquire()) return SpinEnd::acquired;

        const auto present = owner();
        if (present != watched) {
            watched = present;
            state = state_of(watched);
        } else if (was_off_cpu && is_off_cpu(state)) {
            // An acquirer stores its slot just after it took the lock, so one look may still show the owner
            // before it, who is gone by now. The same owner in two looks in a row is the owner, for any
            // practical purpose.
            return SpinEnd::owner_off_cpu;
        }
        if (looks_left == 0 ||
            now - start >= (state == SchedState::unknown ? budget.unwatched : budget.watched))
            return SpinEnd::budget_spent;
    }
}

}  // namespace adaptive
