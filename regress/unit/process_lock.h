#pragma once
/*
 * QueueProtocol outside PostgreSQL: a Host whose tasks are processes (or threads) on shared memory.
 *
 * The arena lies in an anonymous shared mapping made before fork(); every task takes one seat in it. What the
 * lock believes of owners and spinners is decided by `hint`, so that a test can lie to it.
 */

#include <semaphore.h>
#include <sys/mman.h>

#include <atomic>
#include <boost/interprocess/offset_ptr.hpp>
#include <boost/intrusive/list.hpp>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>

#include "protocol/queue_protocol.h"

namespace adaptive::test {

using SharedHook =
    boost::intrusive::list_base_hook<boost::intrusive::void_pointer<boost::interprocess::offset_ptr<void>>,
                                     boost::intrusive::link_mode<boost::intrusive::normal_link>>;

struct Seat : SharedHook {
    sem_t semaphore;
    std::atomic<bool> asleep{false};  // queued, and past the last attempt
    uint8_t wait_state = 0;
    LockMode wait_mode = LockMode::exclusive;
};

using SeatList = boost::intrusive::list<Seat, boost::intrusive::constant_time_size<false>>;

/// The same bits as a PostgreSQL 15 LWLock.
struct SharedLock {
    uint32_t state = 1u << 29;  // release_ok
    std::atomic<uint16_t> owner{0}, spinner{0};
    std::atomic<uint64_t> spinning_since{0}, woken_at{0};
    SeatList waiters;
};

struct ProcessHost {
    using Lock = SharedLock;
    using Waiter = Seat*;
    using WaitList = SeatList;
    static constexpr Waiter kNobody = nullptr;
    static constexpr StateBits kBits = {.has_waiters = 1u << 30,
                                        .release_ok = 1u << 29,
                                        .list_locked = 1u << 28,
                                        .spinner = 1u << 27,
                                        .until_free = 1u << 26,
                                        .free_since = 1u << 25,
                                        .exclusive = 1u << 24,
                                        .shared = 1,
                                        .held_mask = (1u << 25) - 1};

    // This task, and how it waits.
    static inline thread_local Seat* seat = nullptr;
    static inline thread_local uint16_t slot = 0;
    static inline thread_local WaitPolicy wait_policy = WaitPolicy::owner;
    static inline thread_local SchedState (*hint)(uint16_t slot) = [](uint16_t) {
        return SchedState::unknown;
    };
    static inline thread_local uint64_t counts[static_cast<int>(LockEvent::spin_ticks) + 1] = {};
    static inline thread_local LockTask<SharedLock> lock_task;
    static inline uint64_t spin_microseconds = 100;

    static std::atomic_ref<uint32_t> state(Lock& l) { return std::atomic_ref<uint32_t>(l.state); }
    static WaitList& wait_list(Lock& l) { return l.waiters; }
    static WaitList empty_list() { return {}; }
    static bool empty(WaitList& list) { return list.empty(); }
    static void push_head(WaitList& list, Waiter w) { list.push_front(*w); }
    static void push_tail(WaitList& list, Waiter w) { list.push_back(*w); }
    static void erase(WaitList& list, Waiter w) { list.erase(list.iterator_to(*w)); }
    static Waiter first(WaitList& list) { return list.empty() ? nullptr : &list.front(); }
    static Waiter next(WaitList& list, Waiter w) {
        auto it = ++list.iterator_to(*w);
        return it == list.end() ? nullptr : &*it;
    }

    /// A test's chance to let something happen between the first attempt and queueing. Runs once.
    static inline thread_local void (*before_queueing)() = nullptr;
    static Waiter self() {
        if (auto* hook = std::exchange(before_queueing, nullptr)) hook();
        return seat;
    }
    static void queued_already() { abort(); }
    static std::atomic_ref<uint8_t> wait_state(Waiter w) { return std::atomic_ref<uint8_t>(w->wait_state); }
    static LockMode wait_mode(Waiter w) { return w->wait_mode; }
    static void set_wait_mode(Waiter w, LockMode m) { w->wait_mode = m; }

    static void sleep() {
        while (sem_wait(&seat->semaphore) != 0) {
        }
    }
    static void wake(Waiter w) { sem_post(&w->semaphore); }
    static void sleep_begins(Lock&, LockMode) { seat->asleep = true; }
    /// A test's chance to let something happen between a wake-up and the attempt that follows. Runs once.
    static inline thread_local void (*after_sleep)() = nullptr;
    static void sleep_ended(Lock&, LockMode) {
        seat->asleep = false;
        if (auto* hook = std::exchange(after_sleep, nullptr)) hook();
    }
    static void lock_list_contended(Lock&) { sched_yield(); }

    static WaitPolicy policy() { return wait_policy; }
    static SpinBudget budget() {
        const uint64_t ticks = spin_microseconds * CycleClock::ticks_per_microsecond();
        return {.watched = ticks, .unwatched = ticks / 5};
    }
    static uint64_t spare_for_ticks() { return 1000 * CycleClock::ticks_per_microsecond(); }
    static void note_wakeup(Lock& l) { l.woken_at.store(CycleClock::now(), std::memory_order_relaxed); }
    static bool is_wakeup_late(Lock& l) {
        return CycleClock::since(l.woken_at.load(std::memory_order_relaxed)) > spare_for_ticks();
    }
    static LockTask<SharedLock>& task() { return lock_task; }
    static void set_owner(Lock& l) { l.owner.store(slot, std::memory_order_relaxed); }
    static uint16_t owner(Lock& l) { return l.owner.load(std::memory_order_relaxed); }
    static void set_spinner(Lock& l) {
        l.spinner.store(slot, std::memory_order_relaxed);
        l.spinning_since.store(CycleClock::now(), std::memory_order_relaxed);
    }
    static bool is_spinner_overdue(Lock& l) {
        return CycleClock::since(l.spinning_since.load(std::memory_order_relaxed)) > spare_for_ticks();
    }
    static uint16_t spinner(Lock& l) { return l.spinner.load(std::memory_order_relaxed); }
    static SchedState look(uint16_t slot) { return hint(slot); }
    static void count(Lock&, LockEvent e, uint64_t n) { counts[static_cast<int>(e)] += n; }
};

using ProcessLock = QueueProtocol<ProcessHost>;

/// T in memory shared with every process forked from here on.
template <class T>
T* make_shared_memory() {
    void* mem = mmap(nullptr, sizeof(T), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    return mem == MAP_FAILED ? nullptr : new (mem) T();
}

}  // namespace adaptive::test
