// What handing something over to another task costs. Prints nanoseconds as a JSON object.
//
//   switch_same_cpu    to a sleeper on the same CPU: futex wake, futex wait, a context switch
//   wake_other_cpu     to a sleeper on another CPU, until it runs
//   spinner            to a spinner on another CPU: the cache line moves
// Null: there is only one CPU to run on.
#include <unistd.h>

#include <atomic>
#include <thread>

#include "base/futex.h"
#include "costs/measure.h"
#include "generator/line_cost.h"

using namespace adaptive;

namespace {

constexpr int kBatches = 60, kPerBatch = 100;

/// A word that says whose turn it is; the other sleeps.
struct Ball {
    std::atomic<uint32_t> turn{0};

    void await(uint32_t mine) {
        for (uint32_t seen; (seen = turn) != mine;)
            futex_wait(&turn, seen, Sharing::process_private, Deadline::never());
    }
    void pass_to(uint32_t next) {
        turn = next;
        futex_wake(&turn, 1, Sharing::process_private);
    }
};

double handover_ns(int cpu, int other_cpu) {
    Ball ball;
    std::thread other([&] {
        bench::pin_to(other_cpu);
        for (int i = 0; i < kBatches * kPerBatch; i++) {
            ball.await(1);
            ball.pass_to(0);
        }
    });
    double round_trip = 0;
    std::thread timer([&] {
        bench::pin_to(cpu);
        round_trip = bench::cost_ns(kBatches, kPerBatch, [&] {
            ball.pass_to(1);
            ball.await(0);
        });
    });
    timer.join();
    other.join();
    return round_trip / 2;
}

}  // namespace

int main() {
    const std::vector<int> cpus = bench::allowed_cpus();
    printf("{\"switch_same_cpu\": %.4g", handover_ns(cpus[0], cpus[0]));
    if (cpus.size() > 1)
        printf(", \"wake_other_cpu\": %.4g, \"spinner\": %.4g}\n", handover_ns(cpus[0], cpus[1]),
               lock_generator::line_cost_ns());
    else
        printf(", \"wake_other_cpu\": null, \"spinner\": null}\n");
    return 0;
}
