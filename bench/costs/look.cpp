// What it costs to learn whether another task is on a CPU: a look into the mirror, and what else there is. Prints
// nanoseconds as a JSON object.
//
//   rseq_read          a load from the own rseq area: the least that memory kept by the kernel can cost
//   mirror_look        Mirror::look() at another task, its line in the cache
//   syscall            the cheapest system call (getppid)
//   futex_round_trip   futex_wait() on a word that has changed: into the kernel, to the futex, and back; what a
//                      wait that spins inside the kernel pays before it looks at the owner
//   proc_stat_read     the state of a task from /proc/PID/stat, the file kept open
//   proc_stat_open     the same, opened each time
#include <fcntl.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <cstring>
#include <string>
#include <thread>

#include "base/futex.h"
#include "base/rseq_area.h"
#include "costs/measure.h"
#include "lock/this_task.h"

using namespace adaptive;
using bench::cost_ns;
using bench::keep;

namespace {

// The letter behind the command's name, which may contain anything.
char state_in(const char* stat, ssize_t length) {
    const void* bracket = length > 0 ? memrchr(stat, ')', static_cast<size_t>(length)) : nullptr;
    return bracket != nullptr ? static_cast<const char*>(bracket)[2] : '?';
}

}  // namespace

int main() {
    // Another task, asleep until the end.
    std::atomic<uint32_t> slot{0}, done{0};
    std::thread other([&] {
        slot = this_task().slot(Sharing::process_private) + 1U;
        while (done == 0) futex_wait(&done, 0, Sharing::process_private, Deadline::never());
    });
    while (slot == 0) usleep(1000);
    const auto other_slot = static_cast<SlotId>(slot - 1);
    const MirrorInUse mirror = mirror_in_use();
    const std::string path = "/proc/" + std::to_string(getpid()) + "/stat";
    const int stat = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    std::atomic<uint32_t> word{1};
    char text[1024];

    printf("{\"source\": \"%s\"", mirror.source == Source::bpf    ? "bpf"
                                  : mirror.source == Source::rseq ? "rseq"
                                                                  : "off");
    const auto print = [](const char* name, double ns) { printf(", \"%s\": %.4g", name, ns); };
    print("rseq_read", cost_ns(200, 10'000, [] { keep(current_cpu()); }));
    print("mirror_look", cost_ns(200, 10'000, [&] { keep(process_mirror().look(other_slot)); }));
    print("syscall", cost_ns(200, 1'000, [] { keep(syscall(SYS_getppid)); }));
    print("futex_round_trip", cost_ns(200, 1'000, [&] {
              keep(futex_wait(&word, 0, Sharing::process_private, Deadline::never()));
          }));
    print("proc_stat_read",
          cost_ns(100, 100, [&] { keep(state_in(text, pread(stat, text, sizeof(text), 0))); }));
    print("proc_stat_open", cost_ns(100, 100, [&] {
              const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
              keep(state_in(text, read(file, text, sizeof(text))));
              close(file);
          }));
    printf("}\n");
    done = 1;
    futex_wake(&done, 1, Sharing::process_private);
    other.join();
    return 0;
}
