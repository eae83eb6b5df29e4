#pragma once
/*
 * SharedMutex: one writer or any number of readers, waiting as Mutex does. 24 bytes.
 *
 *   SharedMutex              among the threads of one process
 *   InterprocessSharedMutex  in memory that processes share
 *
 * Both are std::shared_timed_mutex in all but name: std::unique_lock, std::shared_lock and std::scoped_lock
 * work. Not recursive, for readers neither. Zeroed memory is an unlocked one.
 *
 * Bounds. Readers and writers take turns (phases): a reader waits for one writer at most, the one that was
 * there when it came (its wait for earlier readers included); a writer waits for the readers that were in when
 * its turn began, and for none that come later. Among writers the rules are those of Mutex: who is awake
 * overtakes who sleeps, for 50 ms.
 *
 * Algorithm
 * ---------
 * `writers` is a mutex among writers. `state`, 64 bits:
 *
 *   bits  0 .. 23  readers in             bit  30  a writer is in, or waits for the readers to leave
 *                                         bit  31  and sleeps
 *   bits 32 .. 55  readers waiting        bit  63  the phase
 *
 * A writer takes `writers`, announces itself (bit 30) and waits until the readers in have left: spinning while
 * the last one that came runs, then asleep on the lower half. A reader that finds bit 30 spins on the writer;
 * then it counts itself as waiting and sleeps until the phase changes. When a writer leaves it turns all that
 * wait into readers in, in the same step, and changes the phase if there are any: they hold the lock before
 * they run, and before the next writer can announce itself. The phase cannot change again before they have
 * left, as another writer has to be in for that: one bit tells them apart.
 *
 * A writer that gives up waiting takes bit 30 back and leaves the phase alone, as readers let in by the last one
 * may not have noticed yet. It wakes those who wait, and they let themselves in.
 *
 * Readers sleep on `wakeups`, which changes after every change of `state` that they are woken for.
 *
 * Thread and process safety: yes. A process that dies holding or waiting for an InterprocessSharedMutex
 * leaves it locked. Destroy one when every unlock() has returned. Errors: none. Nothing throws or allocates.
 * Source: phase-fair locks: Brandenburg and Anderson, "Spin-based reader-writer synchronization for multiprocessor
 * real-time systems", 2010; spinning: Linux rwsem.c.
 */

#include "protocol/mutex_protocol.h"

namespace adaptive {

/// The protocol over a Host as in mutex_protocol.h. Lock has `writers`, a Host::Lock, `state` and `wakeups` as
/// above, and `reader`, the slot of the last reader that came.
template <class Host, class Lock>
class SharedProtocol {
    using Writers = MutexProtocol<Host>;
    using Deadline = typename Host::Deadline;

  public:
    static bool acquire(Lock& lock, const Deadline& deadline) {
        if (!is_acquired(Writers::acquire(lock.writers, deadline))) return false;
        auto&& state = Host::word(lock.state);
        uint64_t seen = state.load(std::memory_order_relaxed);
        // Pairs with the release of the last reader that left.
        while (!state.compare_exchange_weak(seen, seen | kWriter, std::memory_order_acquire,
                                            std::memory_order_relaxed)) {
        }
        return (seen & kReadersIn) == 0 || wait_for_readers(lock, deadline);
    }

    static bool try_acquire(Lock& lock) {
        if (!is_acquired(Writers::try_acquire(lock.writers))) return false;
        uint64_t seen = 0;
        auto&& state = Host::word(lock.state);
        while ((seen & kReadersIn) == 0)
            if (state.compare_exchange_weak(seen, seen | kWriter, std::memory_order_acquire,
                                            std::memory_order_relaxed))
                return true;
        Writers::release(lock.writers);
        return false;
    }

    static void release(Lock& lock) {
        auto&& state = Host::word(lock.state);
        uint64_t seen = state.load(std::memory_order_relaxed), left;
        do {
            const uint64_t waiting = (seen & kReadersWaiting) >> 32;
            left = ((seen & kPhase) ^ (waiting != 0 ? kPhase : 0)) | waiting;
            // Pairs with the acquire of all who come next.
        } while (
            !state.compare_exchange_weak(seen, left, std::memory_order_release, std::memory_order_relaxed));
        if ((seen & kReadersWaiting) != 0) wake_readers(lock);
        Writers::release(lock.writers);
    }

    static bool acquire_shared(Lock& lock, const Deadline& deadline) {
        uint64_t seen = Host::word(lock.state).load(std::memory_order_relaxed);
        if (!enter(lock, seen, 0) && !wait_for_writer(lock, seen, deadline)) return false;
        note_reader(lock);
        return true;
    }

    static bool try_acquire_shared(Lock& lock) {
        uint64_t seen = Host::word(lock.state).load(std::memory_order_relaxed);
        if (!enter(lock, seen, 0)) return false;
        note_reader(lock);
        return true;
    }

    static void release_shared(Lock& lock) {
        auto&& state = Host::word(lock.state);
        uint64_t seen = state.load(std::memory_order_relaxed);
        while (!state.compare_exchange_weak(seen, seen - 1, std::memory_order_release,
                                            std::memory_order_relaxed)) {
        }
        if ((seen & (kReadersIn | kWriterSleeps)) == (1 | kWriterSleeps))
            Host::wake(lock.state, 1, Sleeper::any);
    }

  private:
    static constexpr uint64_t kReadersIn = (1ULL << 24) - 1;
    static constexpr uint64_t kWriter = 1ULL << 30;
    static constexpr uint64_t kWriterSleeps = 1ULL << 31;
    static constexpr uint64_t kReaderWaiting = 1ULL << 32;  // one of them
    static constexpr uint64_t kReadersWaiting = kReadersIn << 32;
    static constexpr uint64_t kPhase = 1ULL << 63;

    static uint32_t lower(uint64_t word) { return static_cast<uint32_t>(word); }

    static void note_reader(Lock& lock) {
        std::atomic_ref<SlotId>(lock.reader)
            .store(mutex_word::owner_slot(Host::identity()), std::memory_order_relaxed);
    }

    static void wake_readers(Lock& lock) {
        // Pairs with the acquire in wait_for_writer(): whoever sees the new count sees the new state.
        Host::word(lock.wakeups).fetch_add(1, std::memory_order_release);
        Host::wake(lock.wakeups, INT_MAX, Sleeper::any);
    }

    /// A reader goes in, unless a writer is there; `counted`: kReaderWaiting if it is one that waits.
    static bool enter(Lock& lock, uint64_t& seen, uint64_t counted) {
        while ((seen & kWriter) == 0)
            if (Host::word(lock.state)
                    .compare_exchange_weak(seen, seen + 1 - counted, std::memory_order_acquire,
                                           std::memory_order_relaxed))
                return true;
        return false;
    }

    [[gnu::noinline]] static bool wait_for_writer(Lock& lock, uint64_t seen, const Deadline& deadline) {
        auto&& state = Host::word(lock.state);
        const SpinEnd end = spin_on_owner(
            [&] {
                seen = state.load(std::memory_order_relaxed);
                return enter(lock, seen, 0);
            },
            [&] { return mutex_word::owner_slot(Host::word(lock.writers).load(std::memory_order_relaxed)); },
            [](SlotId slot) { return Host::look(slot); }, Host::budget(deadline), Host::quick_pace());
        if (end == SpinEnd::acquired) return true;
        if (Host::passed(deadline)) return false;

        do {
            if (enter(lock, seen, 0)) return true;
        } while (!state.compare_exchange_weak(seen, seen + kReaderWaiting, std::memory_order_relaxed,
                                              std::memory_order_relaxed));
        const uint64_t phase = seen & kPhase;
        for (;;) {
            const uint32_t wakeups = Host::word(lock.wakeups).load(std::memory_order_acquire);
            seen = state.load(std::memory_order_acquire);
            do {
                if ((seen & kPhase) != phase) return true;
            } while ((seen & kWriter) == 0 &&
                     !state.compare_exchange_weak(seen, seen + 1 - kReaderWaiting, std::memory_order_acquire,
                                                  std::memory_order_acquire));
            if ((seen & kWriter) == 0) return true;
            if (Host::sleep(lock.wakeups, wakeups, deadline, Sleeper::usual) == FutexWait::timed_out &&
                stop_waiting(lock, phase))
                return false;
        }
    }

    /// False: a writer has let us in meanwhile.
    static bool stop_waiting(Lock& lock, uint64_t phase) {
        auto&& state = Host::word(lock.state);
        uint64_t seen = state.load(std::memory_order_acquire);
        while ((seen & kPhase) == phase)
            if (state.compare_exchange_weak(seen, seen - kReaderWaiting, std::memory_order_acquire,
                                            std::memory_order_acquire))
                return true;
        return false;
    }

    /// The writer waits for those who were in. False: its time has passed, and it has given up.
    [[gnu::noinline]] static bool wait_for_readers(Lock& lock, const Deadline& deadline) {
        auto&& state = Host::word(lock.state);
        uint64_t seen = 0;
        const auto have_left = [&] {
            // Pairs with the release of the last of them.
            seen = state.load(std::memory_order_acquire);
            return (seen & kReadersIn) == 0;
        };
        const SpinEnd end = spin_on_owner(
            have_left, [&] { return std::atomic_ref<SlotId>(lock.reader).load(std::memory_order_relaxed); },
            [](SlotId slot) { return Host::look(slot); }, Host::budget(deadline), Host::quick_pace());
        if (end == SpinEnd::acquired) return true;

        while (!have_left()) {
            const uint64_t asleep = seen | kWriterSleeps;
            if (asleep != seen && !state.compare_exchange_weak(seen, asleep, std::memory_order_relaxed,
                                                               std::memory_order_relaxed))
                continue;
            if (Host::sleep(lock.state, lower(asleep), deadline, Sleeper::usual) == FutexWait::timed_out &&
                !have_left()) {
                give_up(lock);
                return false;
            }
        }
        return true;
    }

    static void give_up(Lock& lock) {
        auto&& state = Host::word(lock.state);
        uint64_t seen = state.load(std::memory_order_relaxed);
        while (!state.compare_exchange_weak(seen, seen & ~(kWriter | kWriterSleeps),
                                            std::memory_order_relaxed, std::memory_order_relaxed)) {
        }
        if ((seen & kReadersWaiting) != 0) wake_readers(lock);
        Writers::release(lock.writers);
    }
};

template <Sharing sharing>
class BasicSharedMutex {
    struct Words {
        uint64_t writers = 0, state = 0;
        uint32_t wakeups = 0;
        SlotId reader = 0;
    };
    using Protocol = SharedProtocol<FutexHost<sharing>, Words>;

  public:
    constexpr BasicSharedMutex() noexcept = default;
    BasicSharedMutex(const BasicSharedMutex&) = delete;
    BasicSharedMutex& operator=(const BasicSharedMutex&) = delete;

    void lock() noexcept { lock_until(Deadline::never()); }
    bool try_lock() noexcept {
        this_task().note_running();
        return Protocol::try_acquire(words_);
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
        task.pace.acquiring(&words_.writers);
        return Protocol::acquire(words_, deadline);
    }
    void unlock() noexcept {
        Protocol::release(words_);
        this_task().pace.released(&words_.writers);
    }

    void lock_shared() noexcept { lock_shared_until(Deadline::never()); }
    bool try_lock_shared() noexcept {
        this_task().note_running();
        return Protocol::try_acquire_shared(words_);
    }
    template <class Rep, class Period>
    bool try_lock_shared_for(const std::chrono::duration<Rep, Period>& duration) noexcept {
        return lock_shared_until(Deadline::in(duration));
    }
    template <class Clock, class Duration>
    bool try_lock_shared_until(const std::chrono::time_point<Clock, Duration>& when) noexcept {
        return lock_shared_until(Deadline::at(when));
    }
    bool lock_shared_until(const Deadline& deadline) noexcept {
        this_task().note_running();
        return Protocol::acquire_shared(words_, deadline);
    }
    void unlock_shared() noexcept { Protocol::release_shared(words_); }

  private:
    Words words_;
};

static_assert(sizeof(BasicSharedMutex<Sharing::process_private>) == 24);

using SharedMutex = BasicSharedMutex<Sharing::process_private>;
using InterprocessSharedMutex = BasicSharedMutex<Sharing::process_shared>;

}  // namespace adaptive
