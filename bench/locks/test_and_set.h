// The spinlock of textbooks: test, then test-and-set, for ever.
//
// Thread and process safety: that is what it is for, at any address. It neither knows nor asks whether its
// holder runs: with more tasks than CPUs, waiters burn the time slices that the holder needs.
#pragma once

#include <atomic>

#include "spin/cycle_clock.h"

namespace bench {

class TestAndSet {
  public:
    void lock() {
        while (taken_.exchange(true, std::memory_order_acquire))
            while (taken_.load(std::memory_order_relaxed)) adaptive::CycleClock::pause();
    }
    void unlock() { taken_.store(false, std::memory_order_release); }

  private:
    std::atomic<bool> taken_{false};
};

}  // namespace bench
