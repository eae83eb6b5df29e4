#pragma once
/*
 * Mutex: 8 bytes, spins while its owner is on a CPU, sleeps otherwise.
 *
 *   Mutex              among the threads of one process
 *   InterprocessMutex  in memory that processes share, at any address in each of them
 *
 * Both are std::timed_mutex in all but name (TimedLockable): std::unique_lock and std::scoped_lock work. They
 * are not recursive. Zeroed memory is an unlocked mutex; destroying one that nobody holds or waits for is
 * always right, also straight after the unlock() by which its last user learnt that.
 *
 * Thread and process safety: that is what they are for. A process that dies while it waits for an
 * InterprocessMutex delays the others by at most 50 ms; one that dies holding it leaves it locked for ever:
 * see robust_mutex.h.
 * Errors: none. Nothing throws or allocates. The owner's state is read in the process's mirror (this_task.h),
 * a hint: a wrong one costs time.
 * Source: the protocol and what it promises are in mutex_protocol.h.
 */

#include "protocol/mutex_protocol.h"

namespace adaptive {

template <Sharing sharing>
class BasicMutex {
    using Protocol = MutexProtocol<FutexHost<sharing>>;

  public:
    constexpr BasicMutex() noexcept = default;
    BasicMutex(const BasicMutex&) = delete;
    BasicMutex& operator=(const BasicMutex&) = delete;

    void lock() noexcept { lock_until(Deadline::never()); }

    bool try_lock() noexcept {
        this_task().note_running();
        return is_acquired(Protocol::try_acquire(word_));
    }

    template <class Rep, class Period>
    bool try_lock_for(const std::chrono::duration<Rep, Period>& duration) noexcept {
        return lock_until(Deadline::in(duration));
    }

    template <class Clock, class Duration>
    bool try_lock_until(const std::chrono::time_point<Clock, Duration>& when) noexcept {
        return lock_until(Deadline::at(when));
    }

    bool lock_until(const Deadline& deadline) noexcept {
        ThisTask& task = this_task();
        task.note_running();
        task.pace.acquiring(&word_);
        return is_acquired(Protocol::acquire(word_, deadline));
    }

    void unlock() noexcept {
        ThisTask& task = this_task();
        Protocol::release(word_);
        task.pace.released(&word_);
    }

    /// The holder's slot in the mirror, a hint; 0: none, or unknown.
    SlotId owner_slot() const noexcept {
        return mutex_word::owner_slot(std::atomic_ref<uint64_t>(word_).load(std::memory_order_relaxed));
    }

  private:
    alignas(8) mutable uint64_t word_ = 0;
};

using Mutex = BasicMutex<Sharing::process_private>;
using InterprocessMutex = BasicMutex<Sharing::process_shared>;

static_assert(sizeof(Mutex) == 8 && sizeof(InterprocessMutex) == 8);

}  // namespace adaptive
