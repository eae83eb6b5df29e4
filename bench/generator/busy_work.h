// Work of a known length that touches no memory: a chain of dependent multiplications, calibrated in
// nanoseconds.
//
// Process safety: no shared state. Units: turns of the loop, nanoseconds.
#pragma once

#include <cstdint>
#include <ctime>

namespace lock_generator {

inline uint64_t monotonic_ns() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return uint64_t(now.tv_sec) * 1'000'000'000 + uint64_t(now.tv_nsec);
}

// Starts when `chain` is known and returns what the last turn made. Feeding each piece of work with the
// result of the one before keeps an out-of-order processor from doing two pieces at once.
[[nodiscard]] inline uint64_t work(uint64_t turns, uint64_t chain) {
    for (uint64_t i = 0; i < turns; ++i) {
        chain = chain * 6364136223846793005u + 1442695040888963407u;
        // The compiler must neither fold the chain nor drop it.
        asm volatile("" : "+r"(chain));
    }
    return chain;
}

// Nanoseconds a turn. The shortest of many short trials: whatever else ran on this CPU only ever makes a
// trial longer.
inline double calibrate() {
    constexpr uint64_t turns = 20'000;
    constexpr int trials = 200;
    uint64_t best = UINT64_MAX;
    uint64_t chain = 0;
    for (int i = 0; i < trials; ++i) {
        const uint64_t start = monotonic_ns();
        chain = work(turns, chain);
        const uint64_t spent = monotonic_ns() - start;
        if (spent < best) best = spent;
    }
    return double(best) / double(turns);
}

}  // namespace lock_generator
