// Waiting for the owner of a word: spinning while the owner runs, asleep while it does not.
//
// The example that came with the FUTEX_SPIN proposal, on this library: a second thread owns the futex, works for
// a while and wakes the waiter, who tells what became of its wait. Here the owner works once on its CPU, once
// asleep, and once for longer than the waiter has patience.
//
//   build/examples/futex_spin     (better with a mirror: `schedmirror load` first, as root)

#include "proposals/futex_spin_wait.h"

#include <unistd.h>

#include <cstdio>
#include <thread>

using namespace adaptive;
using namespace std::chrono_literals;

namespace {

const char* name_of(FutexSpinEnd end) {
    switch (end) {
        case FutexSpinEnd::woken_spinning:
            return "woken while it was spinning";
        case FutexSpinEnd::woken_asleep:
            return "slept, and was woken";
        case FutexSpinEnd::timed_out:
            return "timed out";
        case FutexSpinEnd::value_differs:
            return "the futex has another owner";
        case FutexSpinEnd::no_such_task:
            return "there is no such task";
    }
    return "?";
}

void compute(std::chrono::nanoseconds duration) {
    for (const auto end = std::chrono::steady_clock::now() + duration;
         std::chrono::steady_clock::now() < end;)
        CycleClock::pause();
}

template <class Work>
void wait_for_owner(const char* what_it_does, Work work) {
    FutexSpinWord futex;
    std::atomic_ref<uint32_t> owner(futex.owner);
    std::atomic<uint32_t> started{0};
    std::thread owning([&] {
        this_task().note_running();  // from here on the mirror knows this thread
        const uint32_t me = this_task().tid();
        owner = me;
        started = me;
        work();
        owner = 0;
        futex_spin_wake(futex, 1, Sharing::process_private);
    });
    uint32_t tid;
    while ((tid = started) == 0) CycleClock::pause();
    const FutexSpinEnd end =
        futex_spin_wait(futex, tid, Sharing::process_private, Deadline::in(std::chrono::milliseconds(30)));
    printf("the owner %s: the waiter %s\n", what_it_does, name_of(end));
    owning.join();

    // The thread is gone, and left its id in the futex.
    owner = tid;
    if (futex_spin_wait(futex, tid, Sharing::process_private) != FutexSpinEnd::no_such_task)
        printf("somebody has the id of the owner that has ended\n");
}

}  // namespace

int main() {
    const MirrorInUse mirror = mirror_in_use();
    printf("source of the mirror: %s%s%s\n",
           mirror.source == Source::bpf    ? "bpf"
           : mirror.source == Source::rseq ? "rseq"
                                           : "off",
           mirror.why_not_bpf.text[0] ? "; not bpf: " : "", mirror.why_not_bpf.text);
    wait_for_owner("computes for 2 ms", [] { compute(2ms); });
    wait_for_owner("sleeps for 2 ms", [] { usleep(2000); });
    wait_for_owner("computes for 60 ms", [] { compute(60ms); });
    return 0;
}
