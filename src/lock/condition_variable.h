#pragma once
/*
 * ConditionVariable: 8 bytes, for every mutex of this library, and every other lock with lock() and unlock().
 *
 *   ConditionVariable              among the threads of one process
 *   InterprocessConditionVariable  in memory that processes share
 *
 * As std::condition_variable_any: waits may end without a notification, so wait in a loop or with a predicate;
 * what is waited for changes under the lock. A wait for a lock whose lock() has a result (RobustMutex) has
 * that result. Zeroed memory is one that nobody waits for. Destroy it when no wait is going on.
 *
 * Algorithm: one word counts notifications (lower half, the futex) and those who wait (upper half). A waiter
 * counts itself while it holds the lock, and sleeps as long as no notification has come since; a notification
 * that finds nobody costs a load. The waiters' count may be too high (somebody was killed, or had two
 * notifications): that costs a wake-up for nobody, which corrects it. It is never too low.
 *
 * Thread and process safety: yes. Errors: none; nothing throws but what the lock throws.
 */

#include <atomic>
#include <bit>
#include <climits>
#include <condition_variable>
#include <utility>

#include "base/futex.h"

namespace adaptive {

template <Sharing sharing>
class BasicConditionVariable {
  public:
    constexpr BasicConditionVariable() noexcept = default;
    BasicConditionVariable(const BasicConditionVariable&) = delete;
    BasicConditionVariable& operator=(const BasicConditionVariable&) = delete;

    void notify_one() noexcept {
        uint64_t seen = word().load(std::memory_order_relaxed);
        do {
            if (seen < kWaiter) return;
        } while (!word().compare_exchange_weak(seen, notified(seen) - kWaiter, std::memory_order_relaxed));
        futex_wake(&word_, 1, sharing);
    }

    void notify_all() noexcept {
        uint64_t seen = word().load(std::memory_order_relaxed);
        do {
            if (seen < kWaiter) return;
        } while (!word().compare_exchange_weak(seen, notified(seen) % kWaiter, std::memory_order_relaxed));
        futex_wake(&word_, INT_MAX, sharing);
    }

    /// Returns what lock.lock() returns.
    template <class Lock>
    auto wait(Lock& lock) {
        wait_unlocked(lock, Deadline::never());
        return lock.lock();
    }

    template <class Lock, class Predicate>
    void wait(Lock& lock, Predicate predicate) {
        while (!predicate()) wait(lock);
    }

    template <class Lock, class Clock, class Duration>
    std::cv_status wait_until(Lock& lock, const std::chrono::time_point<Clock, Duration>& when) {
        return wait_before(lock, Deadline::at(when));
    }

    template <class Lock, class Rep, class Period>
    std::cv_status wait_for(Lock& lock, const std::chrono::duration<Rep, Period>& duration) {
        return wait_before(lock, Deadline::in(duration));
    }

    /// The predicate's last word.
    template <class Lock, class Clock, class Duration, class Predicate>
    bool wait_until(Lock& lock, const std::chrono::time_point<Clock, Duration>& when, Predicate predicate) {
        return wait_before(lock, Deadline::at(when), std::move(predicate));
    }

    template <class Lock, class Rep, class Period, class Predicate>
    bool wait_for(Lock& lock, const std::chrono::duration<Rep, Period>& duration, Predicate predicate) {
        return wait_before(lock, Deadline::in(duration), std::move(predicate));
    }

  private:
    static constexpr uint64_t kWaiter = 1ULL << 32;
    static_assert(std::endian::native == std::endian::little, "the lower half is at the word's own address");

    static uint64_t notified(uint64_t word) {
        return (word & ~(kWaiter - 1)) | static_cast<uint32_t>(word + 1);
    }

    std::atomic_ref<uint64_t> word() { return std::atomic_ref<uint64_t>(word_); }

    template <class Lock>
    std::cv_status wait_before(Lock& lock, const Deadline& deadline) {
        static_assert(std::is_void_v<decltype(lock.lock())>, "the lock's result would be lost");
        const std::cv_status status = wait_unlocked(lock, deadline);
        lock.lock();
        return status;
    }

    template <class Lock, class Predicate>
    bool wait_before(Lock& lock, const Deadline& deadline, Predicate predicate) {
        while (!predicate())
            if (wait_before(lock, deadline) == std::cv_status::timeout) return predicate();
        return true;
    }

    /// Unlocks and waits. The lock orders this task's count before whatever is notified of; the notification
    /// itself orders nothing.
    template <class Lock>
    std::cv_status wait_unlocked(Lock& lock, const Deadline& deadline) {
        const auto before = static_cast<uint32_t>(word().fetch_add(kWaiter, std::memory_order_relaxed));
        lock.unlock();
        for (;;) {
            switch (futex_wait(&word_, before, sharing, deadline)) {
                case FutexWait::woken:
                case FutexWait::changed:
                    return std::cv_status::no_timeout;  // and the notification has counted one waiter less
                case FutexWait::interrupted:
                    break;
                case FutexWait::timed_out:
                    return stop_waiting(before) ? std::cv_status::timeout : std::cv_status::no_timeout;
            }
        }
    }

    /// False if a notification came first: it may have been this task's.
    bool stop_waiting(uint32_t before) {
        uint64_t seen = word().load(std::memory_order_relaxed);
        do {
            if (static_cast<uint32_t>(seen) != before) return false;
        } while (!word().compare_exchange_weak(seen, seen - kWaiter, std::memory_order_relaxed));
        return true;
    }

    alignas(8) uint64_t word_ = 0;
};

using ConditionVariable = BasicConditionVariable<Sharing::process_private>;
using InterprocessConditionVariable = BasicConditionVariable<Sharing::process_shared>;

static_assert(sizeof(ConditionVariable) == 8);

}  // namespace adaptive
