#include "stats.h"

#include <sys/sysinfo.h>

#include <algorithm>
#include <atomic>

#include "rseq/rseq_area.h"

namespace adaptive::stats {
namespace {

using Counter = std::atomic<uint64_t>;
static_assert(Counter::is_always_lock_free);

struct alignas(64) Tranche {
    Counter of[kEvents];
};
struct PerCpu {
    Tranche tranche[kTranches];
};

PerCpu* per_cpu = nullptr;  // shared memory, cpus() elements

// More CPUs than this share tables: a table is 16 kB.
constexpr int kMostTables = 128;

int tables() {
    static const int n = std::clamp(get_nprocs_conf(), 1, kMostTables);
    return n;
}

}  // namespace

size_t shmem_bytes() {
    return sizeof(PerCpu) * tables();
}

void shmem_startup() {
    bool found;
    per_cpu = static_cast<PerCpu*>(ShmemInitStruct("adaptive_lwlock statistics", shmem_bytes(), &found));
    if (!found) reset();
}

void count(uint16_t tranche, LockEvent event, uint64_t n) {
    if (per_cpu == nullptr) return;
    PerCpu& table = per_cpu[current_cpu() % static_cast<uint32_t>(tables())];
    Tranche& row = table.tranche[std::min<int>(tranche, kOtherTranches)];
    row.of[static_cast<int>(event)].fetch_add(n, std::memory_order_relaxed);
}

Totals totals(int tranche) {
    Totals sum = {};
    for (int t = 0; t < tables(); t++)
        for (int e = 0; e < kEvents; e++)
            sum.of[e] += per_cpu[t].tranche[tranche].of[e].load(std::memory_order_relaxed);
    return sum;
}

void reset() {
    for (int t = 0; t < tables(); t++)
        for (Tranche& row : per_cpu[t].tranche)
            for (Counter& c : row.of) c.store(0, std::memory_order_relaxed);
}

}  // namespace adaptive::stats
