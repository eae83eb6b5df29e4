#pragma once
/*
 * What a hostile scheduler and a careless administrator do to processes, and how long a task may be held up
 * between two steps.
 *
 * Thread safety: a Tormentor belongs to one thread, which is none of the tormented.
 */

#include <fcntl.h>
#include <sched.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <string>
#include <vector>

#include "../unit/processes.h"
#include "server/torture.h"
#include "spin/pace.h"

namespace torture {

using adaptive::CycleClock;
using lock_generator::torture::Arena;
using lock_generator::torture::kTasks;
using lock_generator::torture::Random;

/// Lets some time pass: mostly nanoseconds, at most 8 us on the CPU or 256 us asleep.
[[gnu::noinline]] inline void hold_up(Random& random) {
    const uint32_t way = random.below(16);
    if (way < 10) {
        const uint64_t from = CycleClock::now(),
                       ticks = adaptive::SpinPace::from_nanoseconds(random.heavy_headed(13));
        while (CycleClock::now() - from < ticks) CycleClock::pause();
    } else if (way < 15) {
        sched_yield();
    } else {
        usleep(random.heavy_headed(8));
    }
}

/// A mirror of the run's own, in the BPF file system.
class OwnMirror {
  public:
    OwnMirror(std::string schedmirror, const std::string& name) : schedmirror_(std::move(schedmirror)) {
        if (geteuid() != 0) {
            why_not_ = "not root";
            return;
        }
        dir_ = "/sys/fs/bpf/" + name + "_" + std::to_string(getpid());
        FILE* pipe = popen((command() + " load --group root 2>&1").c_str(), "r");
        for (char line[256]; pipe != nullptr && fgets(line, sizeof(line), pipe) != nullptr;) why_not_ += line;
        if (pipe == nullptr || pclose(pipe) != 0) {
            dir_.clear();
            if (why_not_.empty()) why_not_ = "schedmirror does not run";
        }
    }
    ~OwnMirror() {
        if (dir_.empty()) return;
        if (system((command() + " unload >/dev/null 2>&1").c_str()) != 0)
            std::cerr << "the mirror in " << dir_ << " could not be unloaded\n";
    }
    OwnMirror(const OwnMirror&) = delete;

    /// Empty: there is none.
    const std::string& dir() const { return dir_; }
    const std::string& why_not() const { return why_not_; }

    /// In another process, whose id this is.
    pid_t begin_reloading(Random& random) const {
        const std::string both = command() + " unload; sleep 0.0" + std::to_string(random.below(10)) + "; " +
                                 command() + " load --group root --slots " +
                                 std::to_string(random.from_to(4, 200));
        const pid_t parent = getpid(), pid = fork();
        if (pid == 0) {
            ::test::die_with(parent);
            const int nowhere = open("/dev/null", O_RDWR);
            dup2(nowhere, 1);
            dup2(nowhere, 2);
            execl("/bin/sh", "sh", "-c", both.c_str(), nullptr);
            _exit(127);
        }
        return pid;
    }

  private:
    std::string command() const { return schedmirror_ + " --dir " + dir_; }

    const std::string schedmirror_;
    std::string dir_, why_not_;
};

struct Torments {
    uint64_t stops = 0, moves = 0, nices = 0, switches = 0, beliefs = 0, reloads = 0;
};

/// Stops, moves and renices tasks, and reloads the mirror. Everything that it has begun ends with it.
class Tormentor {
  public:
    Tormentor(Arena& arena, uint64_t seed, const OwnMirror& mirror, Torments& done)
        : random_(seed), done_(done), arena_(arena), mirror_(mirror) {
        CPU_ZERO(&all_cpus_);
        sched_getaffinity(0, sizeof(all_cpus_), &all_cpus_);
    }
    virtual ~Tormentor() {
        resume(UINT64_MAX);
        if (reloading_ > 0) waitpid(reloading_, nullptr, 0);
    }

    void act() {
        const uint64_t now = CycleClock::now();
        resume(now);
        if (reloading_ > 0 && waitpid(reloading_, nullptr, WNOHANG) == reloading_) reloading_ = 0;
        if (now < next_) return;
        next_ = now + random_.below(8'000) * CycleClock::ticks_per_microsecond();
        const uint32_t what = random_.below(16);
        if (what < 4)
            stop(now);
        else if (what < 7)
            move();
        else if (what < 8)
            nice();
        else
            change(what - 8);
    }

  protected:
    /// One of eight other torments, which depend on the locks.
    virtual void change(uint32_t what) = 0;

    /// 0: there is nobody.
    pid_t somebody() {
        int there = 0;
        for (const auto& t : arena_.tasks) there += t.pid.load() != 0;
        if (there == 0) return 0;
        int which = int(random_.below(uint32_t(there)));
        for (const auto& t : arena_.tasks)
            if (const pid_t pid = t.pid.load(); pid != 0 && which-- == 0) return pid;
        return 0;
    }

    void reload() {
        if (mirror_.dir().empty() || reloading_ > 0) return;
        reloading_ = mirror_.begin_reloading(random_);
        done_.reloads++;
    }

    Random random_;
    Torments& done_;

  private:
    struct Stopped {
        pid_t pid;
        uint64_t until;
    };

    void stop(uint64_t now) {
        const pid_t pid = somebody();
        if (pid == 0) return;
        for (const Stopped& s : stopped_)
            if (s.pid == pid) return;
        if (stopped_.empty()) arena_.stopped_since = now;
        kill(pid, SIGSTOP);
        stopped_.push_back(
            {pid, now + (50 + random_.heavy_headed(14)) * CycleClock::ticks_per_microsecond()});
        done_.stops++;
    }
    void resume(uint64_t now) {
        if (stopped_.empty()) return;
        std::erase_if(stopped_, [&](const Stopped& s) {
            if (s.until > now) return false;
            kill(s.pid, SIGCONT);
            return true;  // or it has died
        });
        if (!stopped_.empty()) return;
        arena_.stopped_ticks += CycleClock::now() - arena_.stopped_since.exchange(0);
    }

    void move() {
        cpu_set_t cpus = all_cpus_;
        if (random_.below(3) != 0) {  // else: let it go where it wants
            std::vector<int> there;
            for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
                if (CPU_ISSET(cpu, &all_cpus_)) there.push_back(cpu);
            CPU_ZERO(&cpus);
            CPU_SET(there[random_.below(uint32_t(there.size()))], &cpus);
        }
        if (const pid_t pid = somebody(); pid != 0) sched_setaffinity(pid, sizeof(cpus), &cpus);
        done_.moves++;
    }

    /// Raising it again takes root. Beyond 10 a task may go without the CPU for so long that nobody can tell
    /// whether it owes a wake-up or the wake-up is lost.
    void nice() {
        if (geteuid() != 0) return;
        if (const pid_t pid = somebody(); pid != 0)
            setpriority(PRIO_PROCESS, id_t(pid), int(random_.below(16)) - 5);
        done_.nices++;
    }

    Arena& arena_;
    const OwnMirror& mirror_;
    cpu_set_t all_cpus_;
    uint64_t next_ = 0;
    std::vector<Stopped> stopped_;
    pid_t reloading_ = 0;
};

}  // namespace torture
