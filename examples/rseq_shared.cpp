// An rseq area in shared memory: what the kernel tells one process, another one reads live.
//
// The fields of struct rseq are private to a process only because C libraries keep the area in thread-local
// memory. A process that takes its area back and registers one in MAP_SHARED memory instead shows every
// process that maps it where it runs. So a kernel with the proposed sched_state field would serve programs made
// of processes without any change to the proposal.
//
// A demonstration, not a recipe: libraries in the process that use the C library's area find it unregistered
// (glibc's own sched_getcpu() then makes the syscall).
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>

#include "rseq_registration.h"

using namespace adaptive;

namespace {

double microseconds() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return static_cast<double>(now.tv_sec) * 1e6 + static_cast<double>(now.tv_nsec) / 1e3;
}

void move_to(pid_t pid, int cpu) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    sched_setaffinity(pid, sizeof(set), &set);
}

}  // namespace

int main() {
    const RseqRegistration own = RseqRegistration::of_this_thread();
    if (own.area == nullptr) {
        puts("no rseq area in this process: glibc 2.35 or later is needed");
        return 77;
    }
    void* page = mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    auto* shared = static_cast<volatile RseqArea*>(page);
    shared->cpu_id = kNoCpu;

    const pid_t parent = getpid(), child = fork();
    if (child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (getppid() != parent) _exit(1);
        if (const int problem = own.move_to(shared); problem != 0) {
            printf("rseq: %s\n", strerror(problem));
            exit(1);
        }
        for (;;) asm volatile("");  // from here on it says nothing: the kernel does
    }
    for (const double end = microseconds() + 2e6; shared->cpu_id == kNoCpu && microseconds() < end;)
        usleep(100);

    const int cpus = static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN));
    int wrong = 0;
    for (int turn = 0; turn < 6; turn++) {
        const int cpu = turn % cpus;
        move_to(0, (cpu + 1) % cpus);
        const double from = microseconds();
        move_to(child, cpu);
        while (shared->cpu_id != static_cast<uint32_t>(cpu) && microseconds() < from + 2e6) continue;
        const bool seen = shared->cpu_id == static_cast<uint32_t>(cpu);
        wrong += !seen;
        printf("process %d moved to CPU %d: %s after %.0f us\n", child, cpu, seen ? "seen" : "NOT seen",
               microseconds() - from);
    }
    kill(child, SIGKILL);
    waitpid(child, nullptr, 0);
    return wrong == 0 ? 0 : 1;
}
