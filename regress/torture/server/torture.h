/*
 * Torture of a few locks by many tasks, after the Linux kernel's locktorture: what one task does and checks.
 *
 * Problem
 * -------
 * Exclusion fails visibly: somebody sees what it must not. A lost wake-up does not: on a busy lock the next
 * release wakes whom the last one forgot. So the tasks work in bursts. A burst ends for all of them before
 * the next begins, and whoever was forgotten sleeps on a free lock from then on, for as long as the watchdog
 * needs to see it.
 *
 * Phases
 * ------
 * Arena::epoch counts them. In an even one (a burst) every task takes locks, in all ways, until the burst's
 * time is over; in an odd one (an audit) each looks at its own semaphore. The last to be done closes the
 * phase (or a supervisor does, where tasks die): nobody is inside a lock then, so everything must add up.
 *
 * Torturer does what makes sense with any lock, LWLockTorturer what only the server's lock has.
 *
 * Checks
 * ------
 * - By every holder: nobody is inside whom the lock excludes (Protected::writer, readers); the words that it
 *   protects are all equal, and nobody else changes them.
 * - By an exclusive holder, of the bystanders (who wait until a lock is free without taking it): none has
 *   slept through many releases, none sleeps on although the variable that it waits for was changed.
 * - At the end of a burst: every lock's state word is that of a new lock, nobody is queued, and a lock's
 *   protected counter is the sum of what the tasks counted for themselves.
 * - At an audit: a task's semaphore holds exactly the wake-ups that others posted without cause.
 *
 * Api, the locks under test, as seen by the calling task:
 * - bool acquire(lock, exclusive): true if it was free at once
 * - bool acquire_conditionally(lock, exclusive)
 * - void release(lock, exclusive)
 * - const char* left_behind(lock): what is wrong with a lock that nobody uses; null: nothing
 * of the server's lock also:
 * - bool acquire_or_wait(lock), wait_for_variable(lock, old, uint64_t* now)
 * - void update_variable(lock, value), release_clearing_variable(lock)
 * - uint64_t variable(lock)
 * - bool is_asleep(proc): that task is on a wait list (read first) and past its last attempt (read then)
 * - void post(proc): a wake-up without cause; int take_posts(): takes all that the own semaphore holds
 *
 * Process safety: the Arena is shared by all tasks, each of which owns one Task in it. A task may leave
 * between any two steps, and must say so: one that is killed anywhere else ends the torture for all (the
 * locks are not what they were), as it ends all processes of a server.
 */
#pragma once

#include <time.h>

#include <atomic>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>

#include "../../../bench/generator/busy_work.h"
#include "spin/cycle_clock.h"

namespace lock_generator::torture {

using adaptive::CycleClock;

constexpr int kLocks = 8;
constexpr int kTasks = 64;
constexpr int kWords = 6;

enum class Way : uint8_t { none, exclusive, shared, until_free, variable };
constexpr int kWays = 5;
inline const char* name_of(Way way) {
    constexpr const char* names[kWays] = {"nothing", "exclusive", "shared", "until free", "variable"};
    return int(way) < kWays ? names[int(way)] : "?";
}

/// What a lock protects.
struct alignas(128) Protected {
    volatile uint64_t words[kWords];  // all equal while nobody holds exclusively: the exclusive holds so far
    uint64_t variable;                // of bystanders; 0 when nobody holds exclusively

    // Who is inside, kept without the lock's help.
    alignas(64) std::atomic<uint32_t> writer;
    std::atomic<uint32_t> readers;
};

struct alignas(128) Task {
    std::atomic<int32_t> pid;  // 0: nobody
    std::atomic<int32_t> proc;
    std::atomic<uint64_t> done;  // the last phase that this task has ended for itself

    // What it is about: written by the task, read by the watchdog and by exclusive holders.
    std::atomic<uint32_t> episode;
    std::atomic<int8_t> lock;
    std::atomic<Way> way;
    std::atomic<uint64_t> old_value;

    std::atomic<uint32_t> posted;   // wake-ups without cause since the last audit
    std::atomic<uint32_t> posters;  // who post one right now

    // Totals, of all tasks that had this entry.
    std::atomic<uint64_t> exclusive[kLocks], shared[kLocks];
    std::atomic<uint64_t> longest[kWays];  // ticks of CycleClock
    std::atomic<uint64_t> contended;       // kept by the Api, if it can
};

/// Where a violation is told beside the arena's record of the first one; may be null.
inline void (*also_report)(const char* text) = nullptr;

/// Zeroed, then start().
struct Arena {
    uint64_t seed;
    uint64_t started;  // ticks
    alignas(128) std::atomic<uint64_t> epoch;
    std::atomic<uint64_t> ends_at;  // ticks: of a burst
    alignas(128) std::atomic<uint64_t> closed;

    // Time in which at least one task was stopped; kept by whoever stops them.
    alignas(128) std::atomic<uint64_t> stopped_ticks, stopped_since;  // since: 0 when none is
    std::atomic<uint64_t> stops;

    alignas(128) std::atomic<uint32_t> violations;
    std::atomic<uint32_t> reported;
    char violation[240];  // the first; complete when `reported` is set

    Protected data[kLocks];
    Task tasks[kTasks];

    void start(uint64_t with_seed) {
        seed = with_seed;
        started = CycleClock::now();
        epoch = 1;
        for (Task& t : tasks) t.lock = -1;
    }

    __attribute__((format(gnu_printf, 2, 3), cold, noinline)) void violate(const char* format, ...) {
        char text[sizeof(violation)];
        va_list args;
        va_start(args, format);
        vsnprintf(text, sizeof(text), format, args);
        va_end(args);
        if (violations++ == 0) {
            memcpy(violation, text, sizeof(text));
            reported = 1;
        }
        if (also_report != nullptr) also_report(text);
    }

    uint64_t stopped_until(uint64_t now) const {
        const uint64_t since = stopped_since.load(std::memory_order_relaxed);
        return stopped_ticks.load(std::memory_order_relaxed) + (since != 0 && now > since ? now - since : 0);
    }
    uint64_t exclusive_holds(int lock) const {
        uint64_t sum = 0;
        for (const Task& t : tasks) sum += t.exclusive[lock].load(std::memory_order_relaxed);
        return sum;
    }
    uint64_t shared_holds(int lock) const {
        uint64_t sum = 0;
        for (const Task& t : tasks) sum += t.shared[lock].load(std::memory_order_relaxed);
        return sum;
    }
};

/// splitmix64.
class Random {
  public:
    explicit Random(uint64_t seed) : state_(seed) {}
    uint64_t next() {
        uint64_t z = state_ += 0x9E3779B97F4A7C15u;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
        return z ^ (z >> 31);
    }
    uint32_t below(uint32_t n) { return uint32_t((next() >> 32) * n >> 32); }
    uint32_t from_to(uint32_t from, uint32_t to) { return from + below(to - from + 1); }
    bool per_64k(uint32_t chance) { return below(65536) < chance; }
    /// Up to 2^bits - 1, and mostly much less.
    uint32_t heavy_headed(uint32_t bits) { return uint32_t(next() >> 32) & ((1u << below(bits + 1)) - 1); }

  private:
    uint64_t state_;
};

/// What the tasks do in a burst: the same for all of them.
struct Burst {
    uint32_t microseconds;
    uint32_t operations = 32;                    // at least, of every task
    uint32_t locks;                              // the first so many are used
    uint32_t hold_least = 0, outside_least = 0;  // turns of work, about a nanosecond each
    uint32_t hold_bits, outside_bits;            // and up to 2^bits turns more, mostly much less
    // Chances, of 65536:
    uint32_t shared;   // an acquire is shared
    uint32_t special;  // it is not a plain acquire
    uint32_t nested;   // it takes a second lock inside the first
    uint32_t nap;      // the holder sleeps for up to 2 ms; and as often a task sleeps outside

    Burst(uint64_t seed, uint64_t epoch) {
        Random random(seed * 0x100000001B3u + epoch);
        if (random.below(2) == 0) {
            // Hardly begun, and over: what the last release of a burst does not mend is seen.
            microseconds = 0;
            operations = random.from_to(1, 3);
            locks = random.from_to(1, 3);
            hold_least = random.from_to(0, 30'000);
            hold_bits = 12;
            outside_bits = 10;
            shared = random.below(2) == 0 ? random.below(40'000) : 0;
            special = random.below(2) == 0 ? random.below(30'000) : 0;
            nested = 2'000;
            nap = 100;
            return;
        }
        const uint32_t kind = random.below(20);
        if (kind < 14) {
            // As many contended acquires as can be had: two tasks at one lock, inside for as long as outside,
            // find it taken nearly every time.
            microseconds = random.from_to(20'000, 120'000);
            locks = random.below(8) == 0 ? 2 : 1;
            outside_least = random.from_to(350, 600);
            hold_least = outside_least + random.below(100);
            hold_bits = random.from_to(0, 5);
            outside_bits = random.from_to(0, 5);
            shared = random.below(3) == 0 ? random.below(30'000) : 0;
            special = 200;
            nested = 20;
            nap = 1;
        } else if (kind < 17) {  // everything
            microseconds = random.from_to(3'000, 40'000);
            locks = random.from_to(1, kLocks);
            hold_bits = random.from_to(0, 13);
            outside_bits = random.from_to(0, 13);
            shared = random.below(60'000);
            special = 16'000;
            nested = 8'000;
            nap = 300;
        } else if (kind < 18) {  // many sleepers
            microseconds = random.from_to(3'000, 30'000);
            locks = random.from_to(1, 4);
            hold_bits = random.from_to(0, 13);
            outside_bits = random.from_to(0, 10);
            shared = random.below(50'000);
            special = 4'000;
            nested = 2'000;
            nap = 8'000;
        } else {  // many bystanders
            microseconds = random.from_to(3'000, 30'000);
            locks = random.from_to(1, 2);
            hold_bits = random.from_to(0, 11);
            outside_bits = random.from_to(0, 8);
            shared = random.below(16'000);
            special = 30'000;
            nested = 500;
            nap = 100;
        }
    }
};

/// What a task does with locks of any kind.
template <class Api>
class Torturer {
  public:
    /// Takes the entry of a task that the caller owns, which others see after enter().
    Torturer(Arena& arena, int index, Api& api, uint64_t seed)
        : arena_(arena), api_(api), me_(arena.tasks[index]), index_(index), random_(seed) {}

    /// From now on the others wait for this task at the end of a phase; the present one it leaves to them.
    void enter(int32_t pid) {
        me_.pid = pid;
        uint64_t epoch;
        do {
            epoch = arena_.epoch.load();
            me_.done = epoch;
        } while (arena_.epoch.load() != epoch);  // else it might have ended without this task
    }

    /// Between two steps only. Afterwards nobody posts to this task any more.
    static void leave(Task& task) {
        task.pid = 0;
        while (task.posters.load() != 0) nap_for(20'000);
    }

    /// A part of a phase, or a short wait for the next.
    void step() {
        const uint64_t epoch = arena_.epoch.load();
        if (me_.done.load(std::memory_order_relaxed) == epoch) return await_others(epoch);
        if (epoch % 2 != 0) {
            audit();
            me_.done = epoch;
            return;
        }
        const Burst burst(arena_.seed, epoch);
        for (uint32_t i = 0; i < burst.operations; i++) operation(burst);
        if (CycleClock::now() < arena_.ends_at.load(std::memory_order_relaxed)) return;
        finish_burst(epoch);
        me_.done = epoch;
    }

    static bool all_are_done(const Arena& arena, uint64_t epoch) {
        for (const Task& t : arena.tasks)
            if (t.pid.load() != 0 && t.done.load() != epoch) return false;
        return true;
    }

    /// Ends a phase that all are done with: by one task, or by a supervisor.
    static void close_phase(Arena& arena, Api& api, uint64_t epoch) {
        if (epoch % 2 == 0) {
            check_quiet(arena, api);
        } else {
            const uint64_t length =
                Burst(arena.seed, epoch + 1).microseconds * CycleClock::ticks_per_microsecond();
            arena.ends_at = CycleClock::now() + length;
        }
        arena.epoch = epoch + 1;
    }

    /// Everything that must hold while no task is in a lock.
    static void check_quiet(Arena& arena, Api& api) {
        for (int lock = 0; lock < kLocks; lock++) {
            if (const char* what = api.left_behind(lock))
                arena.violate("lock %d, which nobody uses: %s", lock, what);
            const uint64_t counted = arena.exclusive_holds(lock), value = arena.data[lock].words[0];
            if (counted != value)
                arena.violate("lock %d: %lu exclusive holds, but the protected counter says %lu", lock,
                              counted, value);
        }
    }

  protected:
    /// What else is to be looked at while nobody is in a lock.
    virtual void audit() {}
    /// Anything but to acquire, hold and release.
    virtual void special_operation(int lock, const Burst&) = 0;
    /// The last thing in a burst; afterwards this task leaves the locks alone.
    virtual void finish_burst(uint64_t) {}
    /// By an exclusive holder, now and then. holds: how often the lock has been taken so.
    virtual void look_around(int, uint64_t) {}

    void operation(const Burst& b) {
        const int lock = int(random_.below(b.locks));
        if (random_.per_64k(b.special)) [[unlikely]] {
            special_operation(lock, b);
        } else {
            const bool exclusive = !random_.per_64k(b.shared);
            acquire(lock, exclusive);
            inside(lock, exclusive, b);
            if (lock + 1 < kLocks && random_.per_64k(b.nested)) [[unlikely]] {
                const int second = int(random_.from_to(uint32_t(lock) + 1, kLocks - 1));
                const bool second_exclusive = !random_.per_64k(b.shared);
                acquire(second, second_exclusive);
                inside(second, second_exclusive, b);
                api_.release(second, second_exclusive);
            }
            api_.release(lock, exclusive);
        }
        chain_ = work(b.outside_least + random_.heavy_headed(b.outside_bits), chain_);
        if (random_.per_64k(b.nap)) [[unlikely]]
            nap_for(random_.heavy_headed(21));
    }

    void acquire(int lock, bool exclusive) {
        const Way way = exclusive ? Way::exclusive : Way::shared;
        const uint64_t from = begin(lock, way);
        if (api_.acquire(lock, exclusive))
            me_.lock.store(-1, std::memory_order_release);
        else
            end(from, way);
    }

    void try_once(int lock, const Burst& b) {
        const bool exclusive = !random_.per_64k(b.shared);
        if (!api_.acquire_conditionally(lock, exclusive)) return;
        inside(lock, exclusive, b);
        api_.release(lock, exclusive);
    }

    uint64_t begin(int lock, Way way) {
        me_.episode.store(me_.episode.load(std::memory_order_relaxed) + 1, std::memory_order_release);
        me_.way.store(way, std::memory_order_release);
        me_.lock.store(int8_t(lock), std::memory_order_release);
        const uint64_t now = CycleClock::now();
        stopped_before_ = arena_.stopped_until(now);
        return now;
    }

    void end(uint64_t from, Way way) {
        me_.lock.store(-1, std::memory_order_release);
        const uint64_t now = CycleClock::now();
        const uint64_t waited = now - from, stopped = arena_.stopped_until(now) - stopped_before_;
        auto& longest = me_.longest[int(way)];
        if (waited > stopped && waited - stopped > longest.load(std::memory_order_relaxed))
            longest.store(waited - stopped, std::memory_order_relaxed);
    }

    // ---- inside ----

    void inside(int lock, bool exclusive, const Burst& b) {
        if (exclusive)
            inside_exclusively(lock, b);
        else
            inside_shared(lock, b);
    }

    void linger(const Burst& b) {
        chain_ = work(b.hold_least + random_.heavy_headed(b.hold_bits), chain_);
        if (random_.per_64k(b.nap)) [[unlikely]]
            nap_for(random_.heavy_headed(21));
    }

    void inside_exclusively(int lock, const Burst& b) {
        Protected& p = arena_.data[lock];
        const uint32_t self = uint32_t(index_ + 1);
        const uint32_t other = p.writer.load(std::memory_order_relaxed);
        p.writer.store(self, std::memory_order_relaxed);
        const uint32_t readers = p.readers.load(std::memory_order_relaxed);
        if (other != 0 || readers != 0) [[unlikely]]
            arena_.violate("lock %d: an exclusive holder met %s", lock,
                           other != 0 ? "another" : "a shared one");

        const uint64_t holds = p.words[0];
        bool torn = false;
        for (int i = 1; i < kWords; i++) torn |= p.words[i] != holds;
        if (torn) [[unlikely]]
            arena_.violate("lock %d: an exclusive holder saw half of another's update", lock);
        for (int i = 0; i < kWords / 2; i++) p.words[i] = holds + 1;
        linger(b);
        for (int i = kWords / 2; i < kWords; i++) p.words[i] = holds + 1;
        if (p.words[0] != holds + 1) [[unlikely]]
            arena_.violate("lock %d: an exclusive holder's update was overwritten", lock);
        count(me_.exclusive[lock]);

        if (random_.below(64) == 0) [[unlikely]]
            look_around(lock, holds);
        if (p.writer.load(std::memory_order_relaxed) != self) [[unlikely]]
            arena_.violate("lock %d: another exclusive holder came in", lock);
        p.writer.store(0, std::memory_order_relaxed);
    }

    void inside_shared(int lock, const Burst& b) {
        Protected& p = arena_.data[lock];
        p.readers.fetch_add(1, std::memory_order_relaxed);
        const uint64_t holds = p.words[0];
        bool changed = p.writer.load(std::memory_order_relaxed) != 0;
        linger(b);
        for (int i = 0; i < kWords; i++) changed |= p.words[i] != holds;
        changed |= p.writer.load(std::memory_order_relaxed) != 0;
        if (changed) [[unlikely]]
            arena_.violate("lock %d: a shared holder met an exclusive one", lock);
        count(me_.shared[lock]);
        p.readers.fetch_sub(1, std::memory_order_relaxed);
    }

    static void count(std::atomic<uint64_t>& counter) {
        counter.store(counter.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
    }

    static void nap_for(uint32_t ns) {
        const timespec time = {0, long(ns)};
        nanosleep(&time, nullptr);
    }

    Arena& arena_;
    Api& api_;
    Task& me_;
    const int index_;
    Random random_;

  private:
    void await_others(uint64_t epoch) {
        if (!all_are_done(arena_, epoch)) return nap_for(200'000);
        uint64_t before = epoch - 1;
        if (!arena_.closed.compare_exchange_strong(before, epoch)) return nap_for(100'000);
        close_phase(arena_, api_, epoch);
    }

    uint64_t chain_ = 1, stopped_before_ = 0;
};

/// And with the server's: bystanders, and wake-ups without cause.
template <class Api>
class LWLockTorturer : public Torturer<Api> {
  public:
    LWLockTorturer(Arena& arena, int index, Api& api, int32_t pid, int32_t proc, uint64_t seed)
        : Torturer<Api>(arena, index, api, seed) {
        api_.take_posts();
        me_.posted = 0;
        me_.proc = proc;
        this->enter(pid);
    }

  private:
    using Torturer<Api>::acquire;
    using Torturer<Api>::api_;
    using Torturer<Api>::arena_;
    using Torturer<Api>::begin;
    using Torturer<Api>::end;
    using Torturer<Api>::inside;
    using Torturer<Api>::linger;
    using Torturer<Api>::me_;
    using Torturer<Api>::random_;

    void audit() override {
        const uint32_t expected = me_.posted.exchange(0);
        const int found = api_.take_posts();
        if (found != int(expected))
            arena_.violate("the semaphore of process %d holds %d wake-ups instead of %u", me_.pid.load(),
                           found, expected);
    }

    [[gnu::noinline]] void special_operation(int lock, const Burst& b) override {
        switch (random_.below(10)) {
            case 0:
            case 1:
                return this->try_once(lock, b);
            case 2:
            case 3:
            case 4: {
                const uint64_t from = begin(lock, Way::until_free);
                const bool acquired = api_.acquire_or_wait(lock);
                end(from, Way::until_free);
                if (!acquired) return;
                inside(lock, true, b);
                return api_.release(lock, true);
            }
            case 5:
            case 6: {
                const uint64_t old_value = api_.variable(lock);
                uint64_t now = old_value;
                me_.old_value = old_value;
                const uint64_t from = begin(lock, Way::variable);
                const bool freed = api_.wait_for_variable(lock, old_value, &now);
                end(from, Way::variable);
                if (!freed && now == old_value)
                    arena_.violate("lock %d: the awaited variable has not changed", lock);
                if (!freed && now != 0 && int(now >> 56) != lock + 1)
                    arena_.violate("lock %d: a waiter read %lx, which nobody wrote", lock, now);
                return;
            }
            case 7:
            case 8:
                acquire(lock, true);
                inside(lock, true, b);
                for (uint32_t n = random_.below(4); n > 0; n--) update_variable(lock, b);
                return api_.release_clearing_variable(lock);
            default:
                return post();
        }
    }

    // ---- bystanders ----

    /// A bystander is taken off the list by the first release after it fell asleep. Of the releases since
    /// then that have not done so every other task can be in the middle of one at most.
    void look_around(int lock, uint64_t holds) override {
        for (int i = 0; i < kTasks; i++) {
            const uint32_t episode = asleep_on(lock, i, Way::until_free).episode;
            if (episode == 0) continue;
            Sighting& first = seen_[i];
            if (first.episode != episode || first.lock != lock)
                first = {holds, episode, lock};
            else if (holds - first.holds > 2 * kTasks)
                arena_.violate("lock %d: process %d waits until it is free and slept through %lu releases",
                               lock, arena_.tasks[i].pid.load(), holds - first.holds);
        }
    }

    void update_variable(int lock, const Burst& b) {
        const uint64_t value = uint64_t(lock + 1) << 56 | (arena_.data[lock].words[0] * 4 + updates_++ % 4);
        api_.update_variable(lock, value);
        for (int i = 0; i < kTasks; i++) {
            const Asleep task = asleep_on(lock, i, Way::variable);
            if (task.episode != 0 && task.old_value != value)
                arena_.violate("lock %d: process %d slept through an update of the variable", lock,
                               arena_.tasks[i].pid.load());
        }
        linger(b);
    }

    struct Asleep {
        uint32_t episode;  // 0: it is not
        uint64_t old_value;
    };

    /// All from one and the same episode: what a task sets before it says the episode's lock, and clears that
    /// first.
    Asleep asleep_on(int lock, int task, Way way) {
        Task& t = arena_.tasks[task];
        const uint32_t episode = t.episode.load();
        if (t.lock.load() != lock || t.pid.load() == 0 || t.way.load() != way ||
            !api_.is_asleep(t.proc.load()))
            return {};
        const uint64_t old_value = t.old_value.load();
        if (t.lock.load() != lock || t.episode.load() != episode) return {};
        return {episode, old_value};
    }

    // ---- wake-ups without cause, as other users of the semaphore send ----

    void post() {
        Task& t = arena_.tasks[random_.below(kTasks)];
        t.posters++;  // pairs with leave(): either the pid is gone, or we are waited for
        if (t.pid.load() != 0) {
            t.posted++;
            api_.post(t.proc.load());
        }
        t.posters--;
    }

    struct Sighting {
        uint64_t holds;
        uint32_t episode;
        int lock;
    };

    uint64_t updates_ = 0;
    Sighting seen_[kTasks] = {};
};

}  // namespace lock_generator::torture
