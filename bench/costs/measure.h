// Timing of small things: in batches short enough to fall between two preemptions, of which the median counts.
#pragma once

#include <sched.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <vector>

namespace bench {

inline double now_ns() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return static_cast<double>(t.tv_sec) * 1e9 + static_cast<double>(t.tv_nsec);
}

/// Of at least one value.
inline double median(std::vector<double> values) {
    std::sort(values.begin(), values.end());
    return values[values.size() / 2];
}

/// Nanoseconds that one call of `operation()` takes.
template <class Operation>
double cost_ns(int batches, int per_batch, Operation&& operation) {
    std::vector<double> times;
    for (int batch = 0; batch < batches; batch++) {
        const double begin = now_ns();
        for (int i = 0; i < per_batch; i++) operation();
        times.push_back((now_ns() - begin) / per_batch);
    }
    return median(times);
}

/// Where this process may run.
inline std::vector<int> allowed_cpus() {
    std::vector<int> cpus;
    cpu_set_t set;
    CPU_ZERO(&set);
    if (sched_getaffinity(0, sizeof(set), &set) != 0) return cpus;
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
        if (CPU_ISSET(cpu, &set)) cpus.push_back(cpu);
    return cpus;
}

/// The calling thread.
inline void pin_to(int cpu) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    if (sched_setaffinity(0, sizeof(set), &set) != 0) {
        perror("cannot pin to a CPU");
        exit(1);
    }
}

/// The value counts as used.
template <class T>
inline void keep(T value) {
    asm volatile("" : : "r"(value) : "memory");
}

}  // namespace bench
