// What it costs a task that uses restartable sequences when others look at its state meanwhile, and the state
// lies on the same cache line as its rseq_cs field, or on a line of its own.
//
// The writer does what a critical section does to that line: it stores rseq_cs before and after, and touches a
// counter of its own; densely, or with 100 ns of other work between. Now and then (every 4000 times, as a
// scheduler would) it changes its state. The reader looks as spin_on_owner() does: a pause, a load. Prints
// nanoseconds as a JSON object: of a critical section (and what is between) with nobody looking, with the state
// on its own line, on the same line; of a look at either. Null: there is only one CPU to run on, or the reader did
// not get one.
#include <unistd.h>

#include <atomic>
#include <thread>

#include "costs/measure.h"
#include "generator/busy_work.h"
#include "spin/cycle_clock.h"

using adaptive::CycleClock;

namespace {

constexpr int kRounds = 15, kBatches = 8, kDensePerBatch = 50'000, kSpacedPerBatch = 1'000;

enum Layout { nobody_looks, own_line, same_line, kLayouts };

struct alignas(128) Area {
    std::atomic<uint64_t> rseq_cs{0};
    std::atomic<uint32_t> state_beside{1};
    alignas(128) std::atomic<uint32_t> state_apart{1};
};

Area area;
alignas(128) std::atomic<int> layout{nobody_looks};
alignas(128) std::atomic<uint64_t> looks{0};
alignas(128) uint64_t counter = 0;

void read_until_end(int cpu) {
    bench::pin_to(cpu);
    uint64_t done = 0;
    for (;;) {
        switch (layout.load(std::memory_order_relaxed)) {
            case own_line:
                CycleClock::pause();
                bench::keep(area.state_apart.load(std::memory_order_relaxed));
                break;
            case same_line:
                CycleClock::pause();
                bench::keep(area.state_beside.load(std::memory_order_relaxed));
                break;
            case nobody_looks:
                usleep(100);
                continue;
            default:
                return;
        }
        looks.store(++done, std::memory_order_relaxed);
    }
}

struct Timed {
    std::vector<double> section, look;  // nanoseconds
};

// Adds batches during which the reader did look: on a busy machine it does not always run.
void time_sections(Layout chosen, uint64_t turns_between, int per_batch, Timed* timed) {
    layout = chosen;
    uint64_t chain = 1, sections = 0;
    for (int batch = 0; batch < kBatches; batch++) {
        const double deadline = bench::now_ns() + 5e6;
        for (const uint64_t seen = looks;
             chosen != nobody_looks && looks == seen && bench::now_ns() < deadline;)
            CycleClock::pause();
        const uint64_t looks_before = looks;
        const double ns = bench::cost_ns(1, per_batch, [&] {
            area.rseq_cs.store(chain | 1, std::memory_order_relaxed);
            bench::keep(++counter);
            area.rseq_cs.store(0, std::memory_order_relaxed);
            if (++sections % 4000 == 0) {
                const auto state = static_cast<uint32_t>(sections / 4000 % 2);
                area.state_beside.store(state, std::memory_order_relaxed);
                area.state_apart.store(state, std::memory_order_relaxed);
            }
            chain = lock_generator::work(turns_between, chain);
        });
        const uint64_t looked = looks - looks_before;
        if (chosen != nobody_looks && looked < 10) continue;
        timed->section.push_back(ns);
        if (looked != 0) timed->look.push_back(ns * per_batch / static_cast<double>(looked));
    }
    layout = nobody_looks;
}

void print(const char* name, const std::vector<double>& values) {
    printf("\"%s\": ", name);
    if (values.empty())
        printf("null");
    else
        printf("%.4g", bench::median(values));
}

void print_all(const char* name, const Timed (&timed)[kLayouts]) {
    constexpr const char* kNames[] = {"nobody_looks", "own_line", "same_line"};
    printf("%s: {", name);
    for (int i = 0; i < kLayouts; i++) {
        print(kNames[i], timed[i].section);
        printf(", ");
    }
    print("look_own_line", timed[own_line].look);
    printf(", ");
    print("look_same_line", timed[same_line].look);
    printf("}");
}

}  // namespace

int main() {
    const std::vector<int> cpus = bench::allowed_cpus();
    if (cpus.size() < 2) {
        printf("null\n");
        return 0;
    }
    const auto turns_between = static_cast<uint64_t>(100 / lock_generator::calibrate());
    bench::pin_to(cpus[0]);
    std::thread reader(read_until_end, cpus[1]);
    Timed dense[kLayouts], spaced[kLayouts];
    for (int round = 0; round < kRounds; round++)
        for (int i = 0; i < kLayouts; i++) {
            const auto chosen = static_cast<Layout>((i + round) % kLayouts);
            time_sections(chosen, 0, kDensePerBatch, &dense[chosen]);
            time_sections(chosen, turns_between, kSpacedPerBatch, &spaced[chosen]);
        }
    layout = kLayouts;
    reader.join();
    print_all("{\"dense\"", dense);
    print_all(", \"spaced\"", spaced);
    printf("}\n");
    return 0;
}
