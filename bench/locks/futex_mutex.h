// A mutex of one word: free, taken, or taken with sleepers. Whoever finds it taken tries `spins` times more,
// then sleeps.
//
//   FutexMutex<0, …>     always sleeps
//   FutexMutex<100, …>   a fixed budget of spinning, then sleeps: what good implementations do that know
//                        nothing of the owner
//
// A waiter that was woken spins again before it sleeps again, and a spinner only reads while the mutex is
// taken. Whoever has slept does not know whether others sleep, and takes the mutex as one with sleepers.
//
// Thread and process safety: that is what it is for; process-shared at any address.
// Source: the three states are those of Drepper, "Futexes are tricky", section 6.
#pragma once

#include <atomic>
#include <cstdint>

#include "base/futex.h"
#include "spin/cycle_clock.h"

namespace bench {

template <int spins, adaptive::Sharing sharing>
class FutexMutex {
  public:
    void lock() {
        uint32_t seen = kFree;
        if (word_.compare_exchange_strong(seen, kTaken, std::memory_order_acquire, std::memory_order_relaxed))
            return;
        uint32_t as = kTaken;
        for (;;) {
            if (spin(as)) return;
            if (word_.exchange(kTakenWithSleepers, std::memory_order_acquire) == kFree) return;
            adaptive::futex_wait(&word_, kTakenWithSleepers, sharing, adaptive::Deadline::never());
            as = kTakenWithSleepers;
        }
    }

    void unlock() {
        if (word_.exchange(kFree, std::memory_order_release) == kTakenWithSleepers)
            adaptive::futex_wake(&word_, 1, sharing);
    }

  private:
    static constexpr uint32_t kFree = 0, kTaken = 1, kTakenWithSleepers = 2;

    bool spin(uint32_t as) {
        for (int i = 0; i < spins; i++) {
            adaptive::CycleClock::pause();
            uint32_t seen = word_.load(std::memory_order_relaxed);
            if (seen == kFree &&
                word_.compare_exchange_strong(seen, as, std::memory_order_acquire, std::memory_order_relaxed))
                return true;
        }
        return false;
    }

    std::atomic<uint32_t> word_{kFree};
};

}  // namespace bench
