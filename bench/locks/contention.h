// What tasks do that contend for one lock, and what they write down: the same for every lock, for threads and
// for processes.
//
// The arena lies in memory that all tasks share. Each task, over and over: takes the lock, changes the line
// that it protects, works inside, gives the lock back, works outside.
//
// Units: turns of busy_work.h for work, CycleClock ticks for waits.
#pragma once

#include <atomic>
#include <cstdint>
#include <ctime>
#include <new>

#include "base/futex.h"
#include "generator/busy_work.h"
#include "locks/histogram.h"
#include "spin/cycle_clock.h"

namespace bench {

constexpr int kMostTasks = 1024;

/// What is done with the lock. One hold in `rare_one_in` (0: none) is unlike the others.
struct Section {
    const char* name;
    uint64_t hold_ns, outside_ns;
    uint64_t rare_one_in;
    uint64_t rare_sleep_ns, rare_compute_ns;
};

inline constexpr Section kSections[] = {
    {"20ns", 20, 20, 0, 0, 0},
    {"200ns", 200, 200, 0, 0, 0},
    {"2us", 2'000, 2'000, 0, 0, 0},
    {"20us", 20'000, 20'000, 0, 0, 0},
    {"bimodal_io", 100, 400, 100, 200'000, 0},
    {"bimodal_cpu", 500, 1'000, 50, 0, 100'000},
};

/// Written by its task alone, on lines of its own.
struct alignas(128) Task {
    std::atomic<uint64_t> operations;  // begun and ended
    uint64_t intrusions;               // holds during which somebody else was inside
    std::atomic<uint64_t> sleeps;      // voluntary context switches
    Histogram waits;
};

struct Arena {
    alignas(128) unsigned char lock[128];
    alignas(128) volatile uint64_t protected_line[8];

    alignas(128) uint64_t hold, outside, rare_compute;  // turns
    uint64_t rare_one_in, rare_sleep_ns;
    uint64_t timed_one_in;  // a power of two: reading the clock is a part of short sections

    alignas(128) std::atomic<uint32_t> ready;
    alignas(128) std::atomic<uint32_t> started;
    alignas(128) std::atomic<uint64_t> stopped_at;  // ticks; 0: go on

    alignas(128) Task tasks[kMostTasks];
};

/// Asleep, and not before the lock is known to work for this task.
inline void await_start(Arena& arena) {
    arena.ready.fetch_add(1);
    while (arena.started.load() == 0)
        adaptive::futex_wait(&arena.started, 0, adaptive::Sharing::process_shared,
                             adaptive::Deadline::never());
}

/// What one hold does, lock taken. False: the lock let somebody else in meanwhile.
inline bool hold(Arena& arena, uint64_t task, uint64_t& chain) {
    volatile uint64_t* line = arena.protected_line;
    line[0] = line[0] + 1;
    line[1] = task;
    chain = lock_generator::work(arena.hold, chain);
    if (arena.rare_one_in != 0 && (chain >> 40) % arena.rare_one_in == 0) {
        if (arena.rare_sleep_ns != 0) {
            const timespec time = {0, static_cast<long>(arena.rare_sleep_ns)};
            nanosleep(&time, nullptr);
        }
        chain = lock_generator::work(arena.rare_compute, chain);
    }
    line[7] = line[7] + 1;
    return line[1] == task;
}

/// The life of task number `index`. Holding takes the lock when it is made, and gives it back at its end.
template <class Lock, class Holding>
void contend(Arena& arena, int index) {
    Lock& lock = *std::launder(reinterpret_cast<Lock*>(arena.lock));
    Task& me = arena.tasks[index];
    // The chain of the work is a random number generator, too.
    uint64_t chain = static_cast<uint64_t>(index + 1) * 0x9E3779B97F4A7C15u;
    uint64_t operations = 0;
    { Holding holding(lock); }  // whatever a lock sets up for a task at its first use
    await_start(arena);
    uint64_t timed = 0;  // the first always: somebody may never get further
    while (arena.stopped_at.load(std::memory_order_relaxed) == 0) {
        uint64_t before = 0, after = 0;
        if (timed == 0) before = adaptive::CycleClock::now();
        {
            Holding holding(lock);
            if (timed == 0) after = adaptive::CycleClock::now();
            if (!hold(arena, static_cast<uint64_t>(index), chain)) me.intrusions++;
        }
        if (timed == 0) {
            // What the end of the measurement cut off counts up to there.
            const uint64_t stop = arena.stopped_at.load(std::memory_order_relaxed);
            if (stop != 0 && stop < after) after = stop;
            me.waits.add(after > before ? after - before : 0);
        }
        me.operations.store(++operations, std::memory_order_relaxed);
        chain = lock_generator::work(arena.outside, chain);
        timed = (chain >> 33) & (arena.timed_one_in - 1);
    }
}

}  // namespace bench
