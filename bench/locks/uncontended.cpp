// What each lock costs a task that has it to itself: taking it and giving it back, as Google Benchmark counts.
// The time of an iteration is of one such turn.
#include <benchmark/benchmark.h>

#include <string>

#include "locks/contenders.h"

namespace {

void turn(benchmark::State& state, const bench::Contender& lock, const bench::Use& use) {
    adaptive::Error error = {};
    if (lock.prepare != nullptr && !lock.prepare(&error)) {
        state.SkipWithError(error.text);
        return;
    }
    alignas(128) unsigned char memory[128] = {};
    use.construct(memory);
    constexpr uint64_t kBatch = 1000;
    use.turns(memory, kBatch);
    while (state.KeepRunningBatch(kBatch)) use.turns(memory, kBatch);
}

}  // namespace

int main(int argc, char** argv) {
    const auto add = [](const bench::Contender& lock, const bench::Use& use, const char* kind) {
        if (use.turns != nullptr)
            benchmark::RegisterBenchmark((std::string(lock.name) + "/" + kind).c_str(),
                                         [&lock, &use](benchmark::State& state) { turn(state, lock, use); });
    };
    for (const bench::Contender& lock : bench::contenders()) {
        add(lock, lock.threads, "threads");
        add(lock, lock.processes, "processes");
    }
    benchmark::Initialize(&argc, argv);
    if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 2;
    benchmark::RunSpecifiedBenchmarks();
    return 0;
}
