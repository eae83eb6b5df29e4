#pragma once
/*
 * The pace of a spin: how long a spinner leaves a taken lock alone before it looks again.
 *
 * Every look takes the lock's cache line from the holder, and taking the lock over takes the data along: a few transfers
 * between cores, 200 to 300 ns together. Two kinds of locks want opposite things:
 *   - Holders that stay away for longer than that (most locks of a real program): the lock is free after the hold, and
 *     every moment it is not taken is lost. Look soon and often.
 *   - Holders that are back sooner than that (a loop around a short critical section): as long as one task has the
 *     lock to itself it costs one core's cached time; handing it to and fro costs several transfers a turn, and more
 *     cores make it slower. Stay away, and take it over rarely.
 *
 * PaceLearner tells them apart by what the spinner itself does: how long it stays outside between two exclusive holds of
 * the same lock. It samples one turn after each contended acquire; the uncontended path pays one comparison.
 *
 * Bounds: a wrong guess costs at most SpinPace::longest of waiting a look, and spins remain limited by their budget. What
 * nothing is known of gets the quick pace.
 * Thread safety: a PaceLearner belongs to one task.
 */

#include <cstddef>
#include <cstdint>

#include "spin/cycle_clock.h"

namespace adaptive {

/// Times between looks, in CycleClock ticks: `first`, then doubling up to `longest`.
struct SpinPace {
    uint64_t first;
    uint64_t longest;

    static SpinPace quick() { return of_nanoseconds(50, 1'600); }
    static SpinPace patient() { return of_nanoseconds(10'000, 10'000); }

  private:
    static SpinPace of_nanoseconds(uint64_t first, uint64_t longest) {
        const uint64_t ticks = CycleClock::ticks_per_microsecond();
        return {.first = first * ticks / 1000, .longest = longest * ticks / 1000};
    }
};

class PaceLearner {
  public:
    /// An exclusive acquire begins. Hot.
    void acquiring(const void* lock) noexcept {
        if (lock == left_) [[unlikely]] end_sample();
    }

    /// An exclusive hold has ended. Hot.
    void released(const void* lock) noexcept {
        if (lock == taken_) [[unlikely]] {
            taken_ = nullptr;
            left_ = lock;
            left_at_ = CycleClock::now();
        }
    }

    /// An exclusive acquire that had to wait has succeeded: sample the turn that follows.
    void acquired_contended(const void* lock) noexcept { taken_ = lock; }

    SpinPace pace(const void* lock) const noexcept {
        const uint32_t outside = outside_[index(lock)];
        return outside != kUnknown && outside < kHandOverNanoseconds ? SpinPace::patient() : SpinPace::quick();
    }

  private:
    static constexpr uint32_t kUnknown = 0;
    static constexpr uint32_t kHandOverNanoseconds = 300;
    static constexpr uint32_t kLongestNanoseconds = 100'000;
    static constexpr size_t kLocks = 64;  // locks share entries: one of them may get the other's pace

    static size_t index(const void* lock) noexcept {
        return (reinterpret_cast<uint64_t>(lock) * 0x9E3779B97F4A7C15u) >> 58;
    }

    void end_sample() noexcept {
        const uint64_t ns = (CycleClock::now() - left_at_) * 1000 / CycleClock::ticks_per_microsecond();
        const uint32_t sample = 1 + static_cast<uint32_t>(ns < kLongestNanoseconds ? ns : kLongestNanoseconds);
        uint32_t& mean = outside_[index(left_)];
        mean = mean == kUnknown ? sample : mean - mean / 8 + sample / 8;
        left_ = nullptr;
    }

    const void* taken_ = nullptr;  // the sampled lock, while it is held
    const void* left_ = nullptr;   // the same, since it was released
    uint64_t left_at_ = 0;
    uint32_t outside_[kLocks] = {};  // moving mean of the time outside, ns
};

}  // namespace adaptive
