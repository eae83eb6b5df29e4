// One measurement: so many tasks contend for one lock for a while. Prints a JSON object.
//
// bench/micro runs it for every lock, number of tasks and section in turn, and compares.
//
// What is counted is what happens between two moments at which the program looks at all tasks: they neither
// begin nor end meanwhile.
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <boost/program_options.hpp>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <string>
#include <thread>
#include <vector>

#include "locks/contenders.h"

namespace po = boost::program_options;
using adaptive::CycleClock;
using bench::Arena;
using bench::Contender;
using bench::Section;

namespace {

constexpr int kFailed = 1, kUsage = 2, kNotHere = 3;

constexpr const char* kAbout =
    "Usage: micro --lock NAME [OPTION]… | --list\n"
    "\n"
    "Lets tasks contend for one lock and prints what came of it as a JSON object: operations a second,\n"
    "CPU seconds per million operations, sleeps (voluntary context switches) per operation, the time\n"
    "from asking for the lock until having it (50th and 99th percentile, longest), and the operations\n"
    "of the task that had the fewest, as a share of an equal share. In short sections one wait in eight\n"
    "is timed.\n"
    "Exit codes: 1 failed, 2 wrong option, 3 this lock cannot be had here, or not by processes.\n"
    "\n";

[[noreturn]] void give_up(int code, const std::string& what) {
    std::cerr << "micro: " << what << "\n";
    exit(code);
}

double seconds_of(clockid_t clock) {
    timespec t;
    clock_gettime(clock, &t);
    return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_nsec) * 1e-9;
}

uint64_t own_sleeps() {
    rusage usage;
    getrusage(RUSAGE_THREAD, &usage);
    return static_cast<uint64_t>(usage.ru_nvcsw);
}

/// Tasks of one kind, waiting for the start of the measurement.
class Tasks {
  public:
    Tasks(Arena& arena, const bench::Use& use, int count, bool processes) : arena_(arena), count_(count) {
        for (int index = 0; index < count; index++) {
            const auto body = [&arena, &use, index] {
                use.contend(arena, index);
                arena.tasks[index].sleeps = own_sleeps();
            };
            clockid_t clock;
            if (!processes) {
                threads_.emplace_back(body);
                if (pthread_getcpuclockid(threads_.back().native_handle(), &clock) != 0)
                    fail("a task has no CPU clock");
                clocks_.push_back(clock);
                continue;
            }
            const pid_t parent = getpid(), child = fork();
            if (child < 0) fail("cannot fork");
            if (child == 0) {
                prctl(PR_SET_PDEATHSIG, SIGKILL);
                if (getppid() != parent) _exit(kFailed);
                body();
                _exit(0);
            }
            children_.push_back(child);
            if (clock_getcpuclockid(child, &clock) != 0) fail("a task has no CPU clock");
            clocks_.push_back(clock);
        }
        for (int ms = 0; arena.ready.load() < static_cast<uint32_t>(count); ms++) {
            if (ms > 20'000) fail("the tasks do not get ready");
            usleep(1000);
        }
        usleep(2000);  // the last of them may not sleep yet
    }

    void start() const {
        arena_.started = 1;
        adaptive::futex_wake(&arena_.started, count_, adaptive::Sharing::process_shared);
    }

    void join() {
        for (std::thread& thread : threads_) thread.join();
        for (const pid_t child : children_) {
            int status = 0;
            waitpid(child, &status, 0);
            if (status != 0) fail("a task has died");
        }
    }

    std::vector<uint64_t> operations() const {
        std::vector<uint64_t> each;
        for (int i = 0; i < count_; i++)
            each.push_back(arena_.tasks[i].operations.load(std::memory_order_relaxed));
        return each;
    }
    double cpu_seconds() const {
        double sum = 0;
        for (const clockid_t clock : clocks_) sum += seconds_of(clock);
        return sum;
    }

  private:
    [[noreturn]] void fail(const std::string& what) const {
        for (const pid_t child : children_) kill(child, SIGKILL);
        give_up(kFailed, what);
    }

    Arena& arena_;
    int count_;
    std::vector<std::thread> threads_;
    std::vector<pid_t> children_;
    std::vector<clockid_t> clocks_;
};

uint64_t sum(const std::vector<uint64_t>& values) {
    uint64_t total = 0;
    for (const uint64_t value : values) total += value;
    return total;
}

void measure(const Contender& lock, const Section& section, int count, bool processes, double seconds,
             double ns_per_turn) {
    const bench::Use& use = processes ? lock.processes : lock.threads;
    if (use.contend == nullptr) give_up(kNotHere, std::string(lock.name) + " cannot be shared by processes");
    adaptive::Error error = {};
    if (lock.prepare != nullptr && !lock.prepare(&error)) give_up(kNotHere, error.text);

    void* memory = mmap(nullptr, sizeof(Arena), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) give_up(kFailed, "no memory");
    Arena& arena = *static_cast<Arena*>(memory);  // zeros
    const auto turns = [&](uint64_t ns) {
        return static_cast<uint64_t>(static_cast<double>(ns) / ns_per_turn + 0.5);
    };
    arena.hold = turns(section.hold_ns);
    arena.outside = turns(section.outside_ns);
    arena.rare_compute = turns(section.rare_compute_ns);
    arena.rare_one_in = section.rare_one_in;
    arena.rare_sleep_ns = section.rare_sleep_ns;
    arena.timed_one_in = section.hold_ns < 1000 ? 8 : 1;
    use.construct(arena.lock);

    Tasks tasks(arena, use, count, processes);
    tasks.start();
    const auto sleep = [](double s) { usleep(static_cast<useconds_t>(s * 1e6)); };
    sleep(std::min(seconds / 5, 0.05));  // until every task has had a turn
    const double began = seconds_of(CLOCK_MONOTONIC), cpu_before = tasks.cpu_seconds();
    const std::vector<uint64_t> before = tasks.operations();
    sleep(seconds);
    const double ended = seconds_of(CLOCK_MONOTONIC), cpu_after = tasks.cpu_seconds();
    std::vector<uint64_t> done = tasks.operations();
    arena.stopped_at = CycleClock::now();
    tasks.join();

    const std::vector<uint64_t> all = tasks.operations();
    uint64_t intrusions = 0, sleeps = 0;
    bench::Histogram waits = {};
    for (int i = 0; i < count; i++) {
        const bench::Task& task = arena.tasks[i];
        intrusions += task.intrusions;
        sleeps += task.sleeps;
        waits.merge(task.waits);
    }
    if (intrusions != 0 || arena.protected_line[0] != sum(all) || arena.protected_line[7] != sum(all))
        give_up(kFailed, std::string(lock.name) + " was held by two tasks at once");
    for (size_t i = 0; i < done.size(); i++) done[i] -= before[i];
    const auto total = static_cast<double>(sum(done));
    const double per_operation = 1 / std::max(total, 1.0);
    const auto us = [](uint64_t ticks) {
        return static_cast<double>(ticks) / static_cast<double>(CycleClock::ticks_per_microsecond());
    };
    printf(
        "{\"operations_per_second\": %.1f, \"cpu_seconds_per_million\": %.6g, \"sleeps_per_operation\": "
        "%.6g, "
        "\"wait_p50_us\": %.6g, \"wait_p99_us\": %.6g, \"wait_longest_us\": %.6g, \"least_share\": %.4g}\n",
        total / (ended - began), (cpu_after - cpu_before) * 1e6 * per_operation,
        static_cast<double>(sleeps) / static_cast<double>(std::max<uint64_t>(1, sum(all))),
        us(waits.percentile(0.50)), us(waits.percentile(0.99)), us(waits.longest()),
        static_cast<double>(*std::min_element(done.begin(), done.end())) * count * per_operation);
}

// What there is to choose from, and how long a turn of the busy loop is here.
void list() {
    printf("{\"ns_per_turn\": %.6g,\n \"sections\": [", lock_generator::calibrate());
    const char* separator = "";
    for (const Section& s : bench::kSections) {
        printf("%s\"%s\"", separator, s.name);
        separator = ", ";
    }
    printf("],\n \"locks\": [\n");
    separator = "";
    for (const Contender& c : bench::contenders()) {
        printf("%s  {\"name\": \"%s\", \"ours\": %s, \"processes\": %s, \"about\": \"%s\"}", separator,
               c.name, c.ours ? "true" : "false", c.processes.contend != nullptr ? "true" : "false", c.about);
        separator = ",\n";
    }
    printf("]}\n");
}

int run(int argc, char** argv) {
    std::string lock_name, section_name;
    int threads = 0, processes = 0;
    double seconds = 0, ns_per_turn = 0;
    po::options_description options("Options");
    options.add_options()("lock", po::value(&lock_name), "one of those that --list names")(
        "threads", po::value(&threads), "so many threads")("processes", po::value(&processes),
                                                           "so many processes, in their place")(
        "section", po::value(&section_name)->default_value("200ns"),
        "how long a hold is, and the time outside: one of those that --list names")(
        "seconds", po::value(&seconds)->default_value(1), "of measurement")(
        "ns-per-turn", po::value(&ns_per_turn), "of the busy loop; default: measured")(
        "list", "print what there is")("help", "print this");
    po::variables_map given;
    po::store(po::parse_command_line(argc, argv, options), given);
    po::notify(given);
    if (given.count("help")) {
        std::cout << kAbout << options;
        return 0;
    }
    CycleClock::calibrate();
    if (given.count("list")) {
        list();
        return 0;
    }
    const Contender* lock = bench::contender(lock_name.c_str());
    if (lock == nullptr) give_up(kUsage, "no lock named '" + lock_name + "'; see --list");
    const auto* section = std::find_if(std::begin(bench::kSections), std::end(bench::kSections),
                                       [&](const Section& s) { return section_name == s.name; });
    if (section == std::end(bench::kSections))
        give_up(kUsage, "no section named '" + section_name + "'; see --list");
    if (given.count("threads") == given.count("processes"))
        give_up(kUsage, "either --threads or --processes");
    const int count = given.count("threads") ? threads : processes;
    if (count < 1 || count > bench::kMostTasks)
        give_up(kUsage, "1 to " + std::to_string(bench::kMostTasks) + " tasks");
    if (!(seconds > 0 && seconds <= 1000)) give_up(kUsage, "--seconds must be above 0 and at most 1000");
    if (given.count("ns-per-turn") && !(ns_per_turn > 0.01 && ns_per_turn < 1000))
        give_up(kUsage, "--ns-per-turn must be a time that a turn can take");
    if (ns_per_turn == 0) ns_per_turn = lock_generator::calibrate();
    measure(*lock, *section, count, given.count("processes") != 0, seconds, ns_per_turn);
    return 0;
}

}  // namespace

int main(int argc, char** argv) {
    try {
        return run(argc, argv);
    } catch (const po::error& error) {
        give_up(kUsage, std::string(error.what()) + "; see --help");
    }
}
