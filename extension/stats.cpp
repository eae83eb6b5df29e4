#include "stats.h"

#include <algorithm>
#include <atomic>

#include "percpu/percpu.h"

namespace adaptive::stats {
namespace {

using Counter = std::atomic<uint64_t>;
static_assert(Counter::is_always_lock_free && sizeof(Counter) == sizeof(uint64_t));

struct alignas(64) Tranche {
    Counter of[kEvents];
};
struct Table {
    Tranche tranche[kTranches];
};
static_assert(sizeof(Table) % 64 == 0);

// Shared memory: when the last reset was, what the totals were then, and a table per lane behind it.
struct alignas(64) Moment {
    std::atomic<TimestampTz> time;
};
Moment* last_reset = nullptr;
Table* at_reset = nullptr;

// More CPUs than this count in the common lane: a table is 16 kB.
constexpr uint32_t kMostCpus = 128;

uint32_t cpus() {
    static const uint32_t n = std::clamp(PerCpu::possible_cpus(), 1U, kMostCpus);
    return n;
}

PerCpu tables() {
    return PerCpu(at_reset + 1, sizeof(Table), cpus());
}

size_t offset(int tranche, int event) {
    return offsetof(Table, tranche) + sizeof(Tranche) * static_cast<size_t>(tranche) +
           sizeof(Counter) * static_cast<size_t>(event);
}

}  // namespace

size_t shmem_bytes() {
    return sizeof(Moment) + sizeof(Table) + PerCpu::bytes(sizeof(Table), cpus());
}

void shmem_startup() {
    bool found;
    last_reset = static_cast<Moment*>(ShmemInitStruct("adaptive_lwlock statistics", shmem_bytes(), &found));
    at_reset = reinterpret_cast<Table*>(last_reset + 1);
    if (found) return;
    std::fill_n(reinterpret_cast<char*>(last_reset), shmem_bytes(), 0);
    last_reset->time.store(GetCurrentTimestamp(), std::memory_order_relaxed);
}

void count(uint16_t tranche, LockEvent event, uint64_t n) {
    if (at_reset == nullptr) return;
    tables().add(offset(std::min<int>(tranche, kOtherTranches), static_cast<int>(event)), n);
}

Totals totals(int tranche) {
    Totals sum = {};
    for (int e = 0; e < kEvents; e++)
        sum.of[e] = tables().sum(offset(tranche, e)) -
                    at_reset->tranche[tranche].of[e].load(std::memory_order_relaxed);
    return sum;
}

void reset() {
    // The counters go on: an addition by another CPU would overwrite a zero.
    for (int t = 0; t < kTranches; t++)
        for (int e = 0; e < kEvents; e++)
            at_reset->tranche[t].of[e].store(tables().sum(offset(t, e)), std::memory_order_relaxed);
    last_reset->time.store(GetCurrentTimestamp(), std::memory_order_relaxed);
}

TimestampTz reset_time() {
    return last_reset->time.load(std::memory_order_relaxed);
}

}  // namespace adaptive::stats
