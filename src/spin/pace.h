#pragma once
/*
 * The pace of a spin: how long a spinner leaves a taken lock alone before it looks again.
 *
 * Every look takes the lock's cache line from the holder, and taking the lock over takes along the data that
 * it protects. So two kinds of locks want opposite things:
 *   - If holders stay away for longer than a hand-over takes, the lock is free after the hold, and every moment
 *     that it is not taken is lost. Look at every turn of the spin (quick).
 *   - If holders are back sooner than that, one task that has the lock to itself turns faster, with everything
 *     in its cache, than two that hand it to and fro; more cores make it slower. Stay away, take over rarely
 *     (patient).
 *
 * PaceLearner tells them apart by what its own task goes through at the lock: the time of a hold after a
 * hand-over (with the cache misses) against the time of a whole turn alone (hold and outside, until the next
 * acquire). Patience pays when a turn alone is shorter than a hold after a hand-over together with the
 * hand-over of the lock itself. It samples exclusive holds after a spin only; the uncontended
 * path pays a comparison at either end.
 *
 * Bounds: a wrong guess costs at most SpinPace::patient() of waiting a look, and spins remain limited by their
 * budget. What little is known of gets the quick pace. Thread safety: a PaceLearner belongs to one task.
 */

#include <cstddef>
#include <cstdint>

#include "spin/cycle_clock.h"

namespace adaptive {

/// The least time between looks.
struct SpinPace {
    uint64_t ticks;  // CycleClock

    static SpinPace quick() { return {.ticks = 1}; }
    static SpinPace patient() { return {.ticks = from_nanoseconds(10'000)}; }

    static uint64_t from_nanoseconds(uint64_t ns) { return ns * CycleClock::ticks_per_microsecond() / 1000; }
};

class PaceLearner {
  public:
    /// An acquire begins. Hot.
    void acquiring(const void* lock, bool exclusive = true) noexcept {
        if (lock == sampled_) [[unlikely]]
            sample_at_acquire(exclusive);
    }

    /// A hold has ended. Hot.
    void released(const void* lock, bool exclusive = true) noexcept {
        if (lock == sampled_) [[unlikely]]
            sample_at_release(exclusive);
    }

    /// An exclusive acquire that had to wait has succeeded. `spun`: awake to the end, so that the lock was handed
    /// over. (After a sleep the first hold is a long one, as everything is out of the cache.)
    void waited(const void* lock, bool spun) noexcept {
        // A turn during which the lock was handed over again was not one alone. Of known locks one hand-over in
        // kSampled is looked at; a prime, or of two that are taken in turn always the same one would be.
        sampled_ = nullptr;
        if (!spun) return;
        if (of(lock).is_known() && ++skipped_ % kSampled != 0) return;
        sampled_ = lock;
        stage_ = Stage::holding;
        since_ = CycleClock::now();
    }

    SpinPace pace(const void* lock) const noexcept {
        const Times& t = of(lock);
        const bool patience_pays =
            t.is_known() && t.turn_alone < t.hold_after_handover + SpinPace::from_nanoseconds(kHandOverNs);
        return patience_pays ? SpinPace::patient() : SpinPace::quick();
    }

  private:
    static constexpr uint64_t kHandOverNs = 50;  // a transfer of the lock's line
    static constexpr uint32_t kSampled = 7;
    static constexpr uint32_t kFew = 8;
    static constexpr size_t kLocks = 64;  // locks share entries: one of them may get the other's pace

    enum class Stage : uint8_t { holding, outside, alone };

    struct Times {                         // ticks
        uint64_t hold_after_handover = 0;  // running median
        uint64_t turn_alone = 0;  // running low quantile: a spinner that looks often makes turns longer
        uint32_t turns = 0;       // seen alone, up to kFew

        bool is_known() const noexcept { return turns == kFew; }
    };

    static size_t index(const void* lock) noexcept {
        return (reinterpret_cast<uint64_t>(lock) * 0x9E3779B97F4A7C15u) >> 58;
    }
    Times& of(const void* lock) noexcept { return times_[index(lock)]; }
    const Times& of(const void* lock) const noexcept { return times_[index(lock)]; }

    /// Moves a running quantile a little towards a sample, however far the sample lies: one that was
    /// preempted counts no more than any other. Steps up are 1/`up` of the value and steps down 1/`down`; as
    /// many samples lie below, in the long run, as up : down says. Of the first few the least counts: a task begins
    /// with its caches cold, and would need long to get down from there.
    static void learn(uint64_t& value, uint64_t sample, bool few, uint64_t up, uint64_t down) noexcept {
        if (few)
            value = value == 0 || sample < value ? sample + 1 : value;
        else
            value = sample > value ? value + value / up + 1 : value - value / down;
    }

    [[gnu::noinline]] void sample_at_acquire(bool exclusive) noexcept {
        if (!exclusive) return;
        const uint64_t now = CycleClock::now();
        if (stage_ == Stage::alone) {
            Times& t = of(sampled_);
            learn(t.turn_alone, now - since_, !t.is_known(), 64, 8);
            if (!t.is_known()) t.turns++;
            sampled_ = nullptr;
        } else {
            stage_ = Stage::alone;  // unless this acquire has to wait: waited()
            since_ = now;
        }
    }

    [[gnu::noinline]] void sample_at_release(bool exclusive) noexcept {
        if (!exclusive || stage_ != Stage::holding) return;
        Times& t = of(sampled_);
        learn(t.hold_after_handover, CycleClock::now() - since_, !t.is_known(), 16, 16);
        stage_ = Stage::outside;
    }

    const void* sampled_ = nullptr;
    uint64_t since_ = 0;
    Stage stage_ = Stage::holding;
    uint32_t skipped_ = 0;
    Times times_[kLocks];
};

}  // namespace adaptive
