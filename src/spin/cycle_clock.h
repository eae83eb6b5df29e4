#pragma once
/*
 * A clock cheap enough to be read inside a spin loop: the processor's constant-rate counter.
 *
 * Units: ticks of that counter; ticks_per_microsecond() converts. The counter is measured once against
 * CLOCK_MONOTONIC (calibrate(), about 2 ms, call it before forking or starting threads).
 * Thread safety: now() and pause() always; calibrate() once, before anyone converts.
 */

#include <time.h>

#include <cstdint>

#if defined(__x86_64__)
#include <x86intrin.h>
#elif !defined(__aarch64__)
#error "cycle_clock.h knows x86-64 and aarch64"
#endif

namespace adaptive {

class CycleClock {
  public:
    static uint64_t now() noexcept {
#if defined(__x86_64__)
        return __rdtsc();
#else
        uint64_t ticks;
        asm volatile("mrs %0, cntvct_el0" : "=r"(ticks));
        return ticks;
#endif
    }

    /// Ticks that have passed since `then`, which may have been read on another CPU, whose counter is a little ahead.
    static uint64_t since(uint64_t then) noexcept {
        const auto passed = static_cast<int64_t>(now() - then);
        return passed > 0 ? static_cast<uint64_t>(passed) : 0;
    }

    /// Tells the processor that this is a spin loop: yields the sibling hyper-thread and the load ports.
    static void pause() noexcept {
#if defined(__x86_64__)
        _mm_pause();
#else
        asm volatile("isb" ::: "memory");
#endif
    }

    static void calibrate() noexcept {
        uint64_t best = 0;
        for (int round = 0; round < 5; round++) {
            // A round that was interrupted between the two clocks reads too many ticks: keep the least.
            const uint64_t ns_from = monotonic_ns(), ticks_from = now();
            while (monotonic_ns() - ns_from < 400'000) pause();
            const uint64_t ticks = now() - ticks_from, ns = monotonic_ns() - ns_from;
            const uint64_t rate = ticks * 1000 / ns;
            if (best == 0 || (rate != 0 && rate < best)) best = rate;
        }
        ticks_per_us_ = best != 0 ? best : 1;
    }

    static uint64_t ticks_per_microsecond() noexcept {
        return ticks_per_us_;
    }

  private:
    static uint64_t monotonic_ns() noexcept {
        timespec t;
        clock_gettime(CLOCK_MONOTONIC, &t);
        return static_cast<uint64_t>(t.tv_sec) * 1'000'000'000 + static_cast<uint64_t>(t.tv_nsec);
    }

    static inline uint64_t ticks_per_us_ = 1000;  // a guess that is safe before calibrate()
};

}  // namespace adaptive
