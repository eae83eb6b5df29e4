// How true the sources of sched_state are, and how soon a waiter follows them.
//
// 1. Looks. Owners that compute, take turns and sleep, more of them than CPUs, are looked at by another
//    process. How many of those that run are seen running, how many of the others are seen off their CPU?
//    The truth for rseq is bpf, at moments between which the owner was not switched. The truth for bpf is what
//    cannot be otherwise: who looks at itself runs; who shares a CPU with the one that looks does not.
// 2. Stops. A waiter spins on an owner (spin_on_owner, as the locks do) that goes to sleep, or is preempted.
//    How long from the switch, by the kernel's own trace, until the waiter stops? And from the owner's last
//    instruction, which includes the kernel's way to the switch.
//
// Loads a mirror of its own in a directory of its own; needs root, and tracefs for the times of the switches.
#include <sched.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <boost/program_options.hpp>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "mirror/mirror.h"
#include "spin/spin_on_owner.h"

namespace po = boost::program_options;
namespace fs = std::filesystem;
using namespace adaptive;

namespace {

constexpr uint32_t kSlots = 256, kCpus = 1024;
constexpr int kMostRounds = 10000;

std::string schedmirror, dir;
void* rseq_memory;

[[noreturn]] void give_up(const std::string& what) {
    std::cerr << "accuracy: " << what << "\n";
    exit(1);
}

template <typename T>
T* shared(size_t count = 1) {
    void* memory =
        mmap(nullptr, sizeof(T) * count, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) give_up("no memory");
    return static_cast<T*>(memory);  // zeros
}

uint64_t from_us(uint64_t us) {
    return us * CycleClock::ticks_per_microsecond();
}
double to_us(uint64_t ticks) {
    return static_cast<double>(ticks) / static_cast<double>(CycleClock::ticks_per_microsecond());
}
void compute(uint64_t us) {
    for (const uint64_t end = CycleClock::now() + from_us(us); CycleClock::now() < end;) CycleClock::pause();
}

void pin_to(int cpu) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    if (sched_setaffinity(0, sizeof(set), &set) != 0) give_up("cannot pin to a CPU");
}

// A process known to both mirrors.
struct Member {
    Mirror bpf, rseq;
    MirrorTask in_bpf, in_rseq;

    Member() {
        Error error;
        if (!bpf.open_bpf(dir.c_str(), &error) || !in_bpf.attach(bpf, &error) ||
            !rseq.open_rseq(rseq_memory, &error) || !in_rseq.attach_rseq_claim(rseq, &error))
            give_up(error.text);
    }
    void note_running() {
        in_bpf.note_running();
        in_rseq.note_running();
    }
};

class Process {
  public:
    template <typename Body>
    explicit Process(Body body) {
        const pid_t parent = getpid();
        pid_ = fork();
        if (pid_ == 0) {
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            if (getppid() != parent) _exit(1);
            body();
            _exit(0);
        }
    }
    ~Process() { end(SIGKILL); }
    Process(const Process&) = delete;
    pid_t pid() const { return pid_; }
    void end(int signal) {
        if (pid_ <= 0) return;
        if (signal != 0) kill(pid_, signal);
        waitpid(pid_, nullptr, 0);
        pid_ = 0;
    }

  private:
    pid_t pid_;
};

// ---- looks ----

struct Owner {
    std::atomic<uint32_t> bpf_slot, rseq_slot;
    std::atomic<uint64_t> looks, seen_running;  // at itself
};

struct Looks {
    uint64_t running, seen_running, off, seen_off;
};

std::string percent(uint64_t part, uint64_t whole) {
    char text[32];
    snprintf(text, sizeof(text), "%.3f %%",
             whole == 0 ? 0.0 : 100.0 * static_cast<double>(part) / static_cast<double>(whole));
    return text;
}

void print(const char* source, const Looks& looks) {
    printf("%-6s | %12lu %12s | %12lu %12s\n", source, looks.running,
           percent(looks.seen_running, looks.running).c_str(), looks.off,
           percent(looks.seen_off, looks.off).c_str());
}

// An owner: holds for a while, looks at itself, goes on; every now and then it sleeps.
void be_owner(Owner& self, unsigned seed) {
    Member member;
    std::mt19937 random(seed);
    self.rseq_slot = member.in_rseq.slot();
    self.bpf_slot = member.in_bpf.slot();
    for (;;) {
        member.note_running();
        self.looks.fetch_add(1, std::memory_order_relaxed);
        if (member.bpf.look(member.in_bpf.slot()) == SchedState::on_cpu)
            self.seen_running.fetch_add(1, std::memory_order_relaxed);
        compute(1 + random() % 20);
        if (random() % 100 == 0) usleep(200);
    }
}

void look(int owners, int strangers, double seconds) {
    auto* table = shared<Owner>(static_cast<size_t>(owners));
    auto* rseq = shared<Looks>();
    std::vector<std::unique_ptr<Process>> others;
    for (int i = 0; i < strangers; i++)
        others.push_back(std::make_unique<Process>([] {
            for (;;) {
                compute(2000);
                usleep(2000);
            }
        }));
    std::vector<std::unique_ptr<Process>> processes;
    for (int i = 0; i < owners; i++)
        processes.push_back(
            std::make_unique<Process>([&, i] { be_owner(table[i], static_cast<unsigned>(i)); }));
    for (int i = 0; i < owners; i++)
        while (table[i].bpf_slot == 0) usleep(1000);
    Process([&] {
        Member me;
        for (const uint64_t end = CycleClock::now() + from_us(static_cast<uint64_t>(seconds * 1e6));
             CycleClock::now() < end;)
            for (int i = 0; i < owners; i++) {
                me.note_running();
                const auto slot = static_cast<SlotId>(table[i].bpf_slot);
                const uint64_t before = me.bpf.info(slot).switches;
                const SchedState truth = me.bpf.look(slot);
                const bool off = is_off_cpu(me.rseq.look(static_cast<SlotId>(table[i].rseq_slot)));
                if (me.bpf.look(slot) != truth || me.bpf.info(slot).switches != before) continue;
                if (truth == SchedState::on_cpu) {
                    rseq->running++;
                    rseq->seen_running += !off;
                } else {
                    rseq->off++;
                    rseq->seen_off += off;
                }
            }
    }).end(0);
    processes.clear();

    Looks bpf = {};
    for (int i = 0; i < owners; i++) {
        bpf.running += table[i].looks;
        bpf.seen_running += table[i].seen_running;
    }
    // Who shares a CPU with the one that looks.
    auto* off = shared<Looks>();
    auto* neighbour = shared<Owner>();
    Process beside([&] {
        pin_to(0);
        be_owner(*neighbour, 1);
    });
    while (neighbour->bpf_slot == 0) usleep(1000);
    Process([&] {
        pin_to(0);
        Mirror mirror;
        Error error;
        if (!mirror.open_bpf(dir.c_str(), &error)) give_up(error.text);
        for (const uint64_t end = CycleClock::now() + from_us(static_cast<uint64_t>(seconds * 0.5e6));
             CycleClock::now() < end;) {
            off->off++;
            off->seen_off += is_off_cpu(mirror.look(static_cast<SlotId>(neighbour->bpf_slot)));
        }
    }).end(0);
    bpf.off = off->off;
    bpf.seen_off = off->seen_off;

    printf("%d owners and %d strangers on %ld CPUs\n", owners, strangers, sysconf(_SC_NPROCESSORS_ONLN));
    printf("%-6s | %12s %12s | %12s %12s\n", "source", "running", "seen so", "off CPU", "seen so");
    print("bpf", bpf);
    print("rseq", *rseq);
}

// ---- stops ----

// The kernel's trace of one process's switch-outs, in ticks of the same counter as CycleClock. Made before the
// mirror is loaded, so that its time is taken before the mirror is written.
class Trace {
  public:
    Trace() {
        std::error_code ignored;
        on_ = fs::create_directory(where_, ignored) && put("trace_clock", "x86-tsc") &&
              put("buffer_size_kb", "4096") && put(kSwitches + "filter", "prev_pid == -1") &&
              put(kSwitches + "enable", "1");
        if (!on_) std::cerr << "accuracy: no tracefs here: the times of the switches are not known\n";
    }
    ~Trace() {
        put(kSwitches + "enable", "0");
        rmdir(where_.c_str());
    }
    Trace(const Trace&) = delete;

    void follow(pid_t pid) const {
        put("trace", "");
        put(kSwitches + "filter", "prev_pid == " + std::to_string(pid));
    }
    std::vector<uint64_t> switches() const {
        std::vector<uint64_t> times;
        if (!on_) return times;
        std::ifstream lines(where_ + "/trace");
        for (std::string line; std::getline(lines, line);) {
            const size_t end = line.find(": sched_switch:");
            if (end == std::string::npos) continue;
            times.push_back(strtoull(line.c_str() + line.rfind(' ', end - 1), nullptr, 10));
        }
        return times;
    }

  private:
    bool put(const std::string& file, const std::string& value) const {
        std::ofstream out(where_ + "/" + file);
        out << value << std::flush;
        return out.good();
    }
    const std::string kSwitches = "events/sched/sched_switch/";
    const std::string where_ = "/sys/kernel/tracing/instances/accuracy_" + std::to_string(getpid());
    bool on_ = false;
};

enum class LeavesBy { sleeping, preemption };

struct Stop {
    uint64_t spin_from, spin_to, last_instruction;
    SpinEnd end;
};

struct Stage {
    std::atomic<uint32_t> bpf_slot, rseq_slot, round, held;
    std::atomic<uint64_t> last_instruction;
    Stop stops[kMostRounds];
};

// Holds once a round, on a CPU of its own; leaves it while holding.
void be_leaving_owner(Stage& stage, LeavesBy how, int cpu) {
    pin_to(cpu);
    Member member;
    std::mt19937 random(7);
    stage.rseq_slot = member.in_rseq.slot();
    stage.bpf_slot = member.in_bpf.slot();
    for (uint32_t round = 1;; round++) {
        while (stage.round < round) CycleClock::pause();
        member.note_running();
        stage.last_instruction = CycleClock::now();
        stage.held = round;
        if (how == LeavesBy::sleeping) {
            compute(20 + random() % 50);
            stage.last_instruction = CycleClock::now();
            usleep(300);
        } else {
            while (stage.round == round)
                stage.last_instruction.store(CycleClock::now(), std::memory_order_relaxed);
        }
    }
}

// Takes the owner's CPU now and then, at once.
void be_preemptor(int cpu) {
    Member member;
    pin_to(cpu);
    const sched_param priority = {1};
    sched_setscheduler(0, SCHED_FIFO, &priority);
    std::mt19937 random(9);
    for (;;) {
        usleep(300 + static_cast<useconds_t>(random() % 700));
        member.note_running();
        compute(300);
    }
}

double quantile(std::vector<double>& values, double q) {
    if (values.empty()) return 0;
    std::sort(values.begin(), values.end());
    return values[static_cast<size_t>(q * static_cast<double>(values.size() - 1))];
}

void stop(const Trace& trace, Source source, LeavesBy how, int rounds) {
    auto* stage = shared<Stage>();
    Process owner([&] { be_leaving_owner(*stage, how, 1); });
    std::unique_ptr<Process> preemptor;
    if (how == LeavesBy::preemption) preemptor = std::make_unique<Process>([] { be_preemptor(1); });
    while (stage->bpf_slot == 0) usleep(1000);
    trace.follow(owner.pid());
    Process([&] {
        pin_to(0);
        Member me;
        const SpinBudget budget = {from_us(2000), from_us(2000)};
        const Mirror& mirror = source == Source::bpf ? me.bpf : me.rseq;
        const auto slot =
            static_cast<SlotId>(source == Source::bpf ? stage->bpf_slot.load() : stage->rseq_slot.load());
        for (int i = 0; i < rounds; i++) {
            const uint32_t round = static_cast<uint32_t>(i) + 1;
            stage->round = round;
            while (stage->held < round) CycleClock::pause();
            me.note_running();
            Stop& its = stage->stops[i];
            its.spin_from = CycleClock::now();
            its.end = spin_on_owner([] { return false; }, [&] { return slot; },
                                    [&](SlotId s) { return mirror.look(s); }, budget, SpinPace::quick());
            its.spin_to = CycleClock::now();
            its.last_instruction = stage->last_instruction;
            if (how == LeavesBy::sleeping) usleep(500);
        }
    }).end(0);
    owner.end(SIGKILL);
    const std::vector<uint64_t> switches = trace.switches();

    // A stop belongs to the switch-out last before it. Without one during the spin ("other") the owner had left
    // before, or it was a false alarm.
    std::vector<double> from_switch, from_instruction;
    int left = 0, stopped = 0, without_switch = 0;
    for (int i = 0; i < rounds; i++) {
        const Stop& its = stage->stops[i];
        auto after = std::upper_bound(switches.begin(), switches.end(), its.spin_to);
        const bool was_out = after != switches.begin() && after[-1] >= its.spin_from;
        if (!switches.empty() && !was_out) {
            without_switch += its.end == SpinEnd::owner_off_cpu;
            continue;
        }
        left++;
        if (its.end != SpinEnd::owner_off_cpu) continue;
        stopped++;
        if (was_out) from_switch.push_back(to_us(its.spin_to - after[-1]));
        if (its.spin_to > its.last_instruction)
            from_instruction.push_back(to_us(its.spin_to - its.last_instruction));
    }
    printf("%-6s %-10s | %7d %9s %6d | %8.2f %8.2f | %8.2f %8.2f\n", source == Source::bpf ? "bpf" : "rseq",
           how == LeavesBy::sleeping ? "sleeps" : "preempted", left,
           percent(static_cast<uint64_t>(stopped), static_cast<uint64_t>(left)).c_str(), without_switch,
           quantile(from_switch, 0.5), quantile(from_switch, 0.9), quantile(from_instruction, 0.5),
           quantile(from_instruction, 0.9));
    munmap(stage, sizeof(Stage));
}

void command(const std::string& verb) {
    if (system((schedmirror + " --dir " + dir + " " + verb + " > /dev/null").c_str()) != 0)
        give_up("`schedmirror " + verb + "` failed (needs root)");
}

}  // namespace

int main(int argc, char** argv) {
    int owners = 0, strangers = 0, rounds = 0;
    double seconds = 0;
    po::options_description options("How true the sources of sched_state are, and how soon a waiter follows");
    options.add_options()(
        "owners", po::value(&owners)->default_value(2 * static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN))),
        "owners that are looked at")("strangers", po::value(&strangers)->default_value(1),
                                     "processes that compute half of the time and that no mirror knows")(
        "seconds", po::value(&seconds)->default_value(3), "of looking")(
        "rounds", po::value(&rounds)->default_value(1000), "owners that leave their CPU, per row")(
        "schedmirror", po::value(&schedmirror)->default_value("build/schedmirror"), "the command")(
        "help", "print this");
    po::variables_map given;
    po::store(po::parse_command_line(argc, argv, options), given);
    po::notify(given);
    if (given.count("help")) {
        std::cout << options;
        return 0;
    }
    if (owners < 1 || owners > 200 || rounds < 1 || rounds > kMostRounds)
        give_up("1 to 200 owners, 1 to 10000 rounds");
    if (sysconf(_SC_NPROCESSORS_ONLN) < 2) give_up("needs two CPUs");
    setvbuf(stdout, nullptr, _IOLBF, 0);  // the processes forked later inherit what is not written yet

    CycleClock::calibrate();
    dir = "/sys/fs/bpf/accuracy_" + std::to_string(getpid());
    rseq_memory = shared<char>(Mirror::rseq_bytes(kSlots, kCpus));
    Mirror::rseq_format(rseq_memory, kSlots, kCpus);
    const Trace trace;
    command("load --slots 1000 --group root");
    look(owners, strangers, seconds);
    printf("\nmicroseconds until the waiter stops: median and 90th percentile\n");
    printf("%-6s %-10s | %7s %9s %6s | %17s | %17s\n", "source", "owner", "left", "stopped", "other",
           "from the switch", "from its last instr.");
    for (const LeavesBy how : {LeavesBy::sleeping, LeavesBy::preemption})
        for (const Source source : {Source::bpf, Source::rseq}) stop(trace, source, how, rounds);
    command("unload");
    return 0;
}
