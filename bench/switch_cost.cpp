// What the mirror adds to a context switch, in nanoseconds.
//
// Two tasks on one CPU hand a byte to and fro through two pipes: every hand-over is one context switch.
// Rounds with and without the program attached alternate in one run, back to back, so that the host's noise
// meets both; only differences within a pair count. The rows:
//   empty program                no mirror: a BPF program at the same place that returns at once, the least that any costs
//   unregistered, 0 registered   neither task registered, nobody else either
//   unregistered, N registered   neither task registered, N sleeping tasks are
//   registered,   N registered   both tasks registered, and so are N sleeping ones
//
// On a shared machine the host's noise may be larger than the difference. So the kernel is asked as well how long a run of
// the program takes (its BPF statistics, in a third measurement, as keeping them costs time): "program ns" is that less
// the same of the empty program, the mirror's own part.
//
// Loads a mirror of its own in a directory of its own; needs root. "Without" means that its attachments are
// unpinned.
#include <bpf/bpf.h>
#include <bpf/libbpf.h>
#include <fcntl.h>
#include <linux/bpf.h>
#include <sched.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <boost/program_options.hpp>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <filesystem>
#include <functional>
#include <iostream>
#include <iterator>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "costs/measure.h"
#include "mirror/mirror.h"

namespace po = boost::program_options;
using adaptive::Error;
using adaptive::Mirror;
using adaptive::MirrorTask;

namespace {

std::string schedmirror, dir;

[[noreturn]] void give_up(const std::string& what) {
    std::cerr << "switch_cost: " << what << "\n";
    exit(1);
}

void command(const std::string& verb) {
    if (system((schedmirror + " --dir " + dir + " " + verb + " > /dev/null").c_str()) != 0)
        give_up("`schedmirror " + verb + "` failed (needs root)");
}

// Attached as long as it lives.
class EmptyProgram {
  public:
    EmptyProgram() {
        bpf_insn return_0[2] = {};
        return_0[0].code = BPF_ALU64 | BPF_MOV | BPF_K;  // r0 = 0
        return_0[1].code = BPF_JMP | BPF_EXIT;
        LIBBPF_OPTS(bpf_prog_load_opts, options, .expected_attach_type = BPF_TRACE_RAW_TP);
        options.attach_btf_id =
            static_cast<__u32>(libbpf_find_vmlinux_btf_id("sched_switch", BPF_TRACE_RAW_TP));
        program_ =
            bpf_prog_load(BPF_PROG_TYPE_TRACING, "empty", "GPL", return_0, std::size(return_0), &options);
        link_ = bpf_raw_tracepoint_open(nullptr, program_);
        if (link_ < 0) give_up("cannot attach a BPF program to sched_switch (needs root)");
    }
    ~EmptyProgram() {
        close(link_);
        close(program_);
    }

  private:
    int program_, link_;
};

// How long the runs of the newest program of that name take, while this lives, by the kernel's own account.
class ProgramTime {
  public:
    explicit ProgramTime(const std::string& name) : statistics_(bpf_enable_stats(BPF_STATS_RUN_TIME)) {
        for (__u32 id = 0; bpf_prog_get_next_id(id, &id) == 0;) {
            int program = bpf_prog_get_fd_by_id(id);
            if (program < 0) continue;
            if (info(program).name == name) std::swap(program_, program);
            if (program >= 0) close(program);
        }
        if (statistics_ < 0 || program_ < 0) give_up("the kernel keeps no statistics of BPF programs");
        before_ = info(program_);
    }
    ~ProgramTime() {
        close(program_);
        close(statistics_);
    }
    double ns_per_run() const {
        const bpf_prog_info now = info(program_);
        const __u64 runs = now.run_cnt - before_.run_cnt;
        if (runs == 0) give_up("the program did not run");
        return static_cast<double>(now.run_time_ns - before_.run_time_ns) / static_cast<double>(runs);
    }

  private:
    static bpf_prog_info info(int program) {
        bpf_prog_info info = {};
        __u32 size = sizeof(info);
        if (bpf_obj_get_info_by_fd(program, &info, &size) != 0)
            give_up("a BPF program says nothing of itself");
        return info;
    }

    int statistics_, program_ = -1;
    bpf_prog_info before_ = {};
};

struct Pipe {
    int ends[2];
    Pipe() {
        if (pipe(ends) != 0) give_up("no pipe");
    }
    void send() const {
        if (write(ends[1], "x", 1) != 1) _exit(1);
    }
    void receive() const {
        char byte;
        if (read(ends[0], &byte, 1) != 1) _exit(1);
    }
};

// Alone on one CPU: real-time, where allowed, so that nobody else's time is measured.
void alone_on(int cpu) {
    const sched_param priority = {1};
    sched_setscheduler(0, SCHED_FIFO, &priority);
    bench::pin_to(cpu);
}

// A forked process that registers if asked to, says so, and runs `body`.
template <typename Body>
pid_t start(bool registered, Body body) {
    Pipe ready;
    const pid_t parent = getpid(), child = fork();
    if (child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (getppid() != parent) _exit(1);
        Mirror mirror;
        MirrorTask task;
        Error error;
        if (registered && (!mirror.open_bpf(dir.c_str(), &error) || !task.attach(mirror, &error)))
            give_up(error.text);
        ready.send();
        body();
        _exit(0);
    }
    ready.receive();
    close(ready.ends[0]);
    close(ready.ends[1]);
    return child;
}

constexpr int kBatch =
    200;  // round trips timed at once: short enough to fall between two preemptions by others

using bench::median;

// Nanoseconds per switch between two fresh processes on `cpu`: the median of the batches.
double measure(bool registered, int cpu, int batches, const std::function<void()>& before) {
    Pipe go, there, back, result;
    const pid_t echo = start(registered, [&] {
        alone_on(cpu);
        for (int i = 0; i < (batches + 1) * kBatch; i++) {
            there.receive();
            back.send();
        }
    });
    const pid_t timer = start(registered, [&] {
        go.receive();
        alone_on(cpu);
        const double ns = bench::cost_ns(batches + 1, kBatch,
                                         [&] {
                                             there.send();
                                             back.receive();
                                         }) /
                          2;
        if (write(result.ends[1], &ns, sizeof(ns)) != sizeof(ns)) _exit(1);
    });
    before();
    usleep(50000);  // the kernel detaches a program a little after it was told to
    go.send();
    double ns = 0;
    if (read(result.ends[0], &ns, sizeof(ns)) != sizeof(ns)) give_up("a measuring process died");
    waitpid(echo, nullptr, 0);
    waitpid(timer, nullptr, 0);
    for (const Pipe* p : {&go, &there, &back, &result})
        for (int end : p->ends) close(end);
    return ns;
}

struct Case {
    const char* name;
    bool mirror, registered;
    int others;  // sleeping registered tasks
    const char* target;
    std::vector<double> without, with, added, program;
};

enum class Half { without, with, with_statistics };

// Nanoseconds a switch; with statistics: a run of the program.
double one(const Case& c, Half half, int cpu, int batches) {
    const bool attached = half != Half::without;
    std::optional<ProgramTime> time;
    if (!c.mirror) {
        std::optional<EmptyProgram> program;
        if (attached) program.emplace();
        if (half == Half::with_statistics) time.emplace("empty");
        const double ns = measure(false, cpu, batches, [] {});
        return time ? time->ns_per_run() : ns;
    }
    command("load --slots 1000 --group root");
    std::vector<pid_t> others;
    for (int i = 0; i < c.others; i++) others.push_back(start(true, [] { pause(); }));
    const double ns = measure(c.registered, cpu, batches, [&] {
        if (!attached) command("unload");
        if (half == Half::with_statistics) time.emplace("on_sched_switch");
    });
    const double result = time ? time->ns_per_run() : ns;
    for (pid_t pid : others) kill(pid, SIGKILL);
    for (pid_t pid : others) waitpid(pid, nullptr, 0);
    if (attached) command("unload");
    return result;
}

}  // namespace

int main(int argc, char** argv) {
    int rounds = 0, others = 0, cpu = 0, batches = 0;
    po::options_description options("What the mirror adds to a context switch");
    options.add_options()("rounds", po::value(&rounds)->default_value(15), "pairs of measurements per row")(
        "registered", po::value(&others)->default_value(64), "sleeping registered tasks")(
        "cpu", po::value(&cpu)->default_value(0), "where the two tasks run")(
        "batches", po::value(&batches)->default_value(150), "batches of 200 round trips per measurement")(
        "schedmirror", po::value(&schedmirror)->default_value("build/schedmirror"), "the command")(
        "json", "print JSON")("help", "print this");
    po::variables_map given;
    po::store(po::parse_command_line(argc, argv, options), given);
    po::notify(given);
    if (given.count("help")) {
        std::cout << options;
        return 0;
    }
    dir = "/sys/fs/bpf/switch_cost_" + std::to_string(getpid());

    if (std::filesystem::exists(adaptive::kMirrorDir))
        std::cerr
            << "switch_cost: a mirror is loaded at " << adaptive::kMirrorDir
            << ": its program runs in both halves of each pair, so that only a second one is measured\n";

    Case cases[] = {
        {"empty program", false, false, 0, "-", {}, {}, {}, {}},
        {"unregistered", true, false, 0, "25", {}, {}, {}, {}},
        {"unregistered", true, false, others, "25", {}, {}, {}, {}},
        {"registered", true, true, others, "40", {}, {}, {}, {}},
    };
    for (int round = 0; round < rounds; round++) {
        for (Case& c : cases) {
            // Alternating which half comes first, so that a drift of the machine cancels out.
            const bool attached_first = round % 2 == 0;
            const double first = one(c, attached_first ? Half::with : Half::without, cpu, batches);
            const double second = one(c, attached_first ? Half::without : Half::with, cpu, batches);
            c.program.push_back(one(c, Half::with_statistics, cpu, batches));
            c.with.push_back(attached_first ? first : second);
            c.without.push_back(attached_first ? second : first);
            c.added.push_back(c.with.back() - c.without.back());
        }
        fprintf(stderr, "\rround %d of %d", round + 1, rounds);
    }
    fprintf(stderr, "\n");
    const double empty = median(cases[0].program);
    if (given.count("json")) {
        const char* separator = "[";
        for (const Case& c : cases) {
            const auto [low, high] = std::minmax_element(c.added.begin(), c.added.end());
            printf(
                "%s{\"program\": \"%s\", \"registered_tasks\": %s, \"others\": %d, \"without_ns\": %.1f, "
                "\"with_ns\": %.1f, "
                "\"added_ns\": %.1f, \"min\": %.1f, \"max\": %.1f, \"program_ns\": %.1f}",
                separator, c.mirror ? "mirror" : "empty", c.registered ? "true" : "false", c.others,
                median(c.without), median(c.with), median(c.added), *low, *high, median(c.program) - empty);
            separator = ",\n ";
        }
        printf("]\n");
        return 0;
    }
    printf("%-13s %10s | %10s %10s | %9s %20s | %10s %7s\n", "the two tasks", "registered", "without ns",
           "with ns", "added ns", "range", "program ns", "target");
    for (const Case& c : cases) {
        const auto [low, high] = std::minmax_element(c.added.begin(), c.added.end());
        printf("%-13s %10d | %10.1f %10.1f | %9.1f %9.1f ..%8.1f | %10.1f %7s\n", c.name, c.others,
               median(c.without), median(c.with), median(c.added), *low, *high, median(c.program) - empty,
               c.target);
    }
    return 0;
}
