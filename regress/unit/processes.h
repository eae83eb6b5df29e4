// Child processes for tests: forked, reporting through a shared page, killed at the end of the scope, and with their parent.
#pragma once

#include <fcntl.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstdint>
#include <cstdlib>
#include <ctime>
#include <new>

namespace test {

inline double seconds() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * 1e-9;
}

// Polls until the condition holds; false after the deadline.
template <typename Condition>
bool eventually(Condition condition, double deadline = 5.0) {
    for (const double end = seconds() + deadline; seconds() < end; usleep(500))
        if (condition()) return true;
    return condition();
}

inline void pin_to(int cpu) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    sched_setaffinity(0, sizeof(set), &set);
}

struct RestoreAffinity {
    cpu_set_t before;
    RestoreAffinity() { sched_getaffinity(0, sizeof(before), &before); }
    ~RestoreAffinity() { sched_setaffinity(0, sizeof(before), &before); }
};

// An object at the same address in this process and the ones forked later.
template <typename T>
class Shared {
  public:
    Shared() {
        void* memory = mmap(nullptr, sizeof(T), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        object_ = new (memory) T();
    }
    ~Shared() { munmap(object_, sizeof(T)); }
    Shared(const Shared&) = delete;
    T* operator->() const { return object_; }
    T& operator*() const { return *object_; }

  private:
    T* object_;
};

// Called in a process just forked by `parent`: it is killed as soon as the thread that forked it has ended, however.
inline void die_with(pid_t parent) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    // That may have happened before. A parent outside the pid namespace has the number 0.
    if (getppid() != parent && getppid() != 0) _exit(1);
}

class Child {
  public:
    template <typename Body>
    explicit Child(Body body) {
        const pid_t parent = getpid();
        // The child says through it that it is bound to this thread. If that is gone by then, nobody reads.
        int bound[2];
        if (pipe2(bound, O_CLOEXEC) != 0) abort();
        pid = fork();
        if (pid == 0) {
            close(bound[0]);
            die_with(parent);
            if (write(bound[1], "", 1) != 1) _exit(1);
            close(bound[1]);
            body();
            _exit(0);
        }
        close(bound[1]);
        char byte;
        while (read(bound[0], &byte, 1) < 0 && errno == EINTR) {
        }
        close(bound[0]);
    }
    ~Child() { end(SIGKILL); }
    Child(const Child&) = delete;

    // The wait status; the child is gone afterwards.
    int end(int signal) {
        if (pid <= 0) return 0;
        if (signal != 0) kill(pid, signal);
        int status = 0;
        waitpid(pid, &status, 0);
        pid = 0;
        return status;
    }
    int wait() { return end(0); }

    pid_t pid;
};

}  // namespace test
