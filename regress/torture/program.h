#pragma once
/*
 * What the programs of the torture are made of: options, a series of rounds, a report, an exit code.
 *
 * Exits with 0, with 1 after a violation or where nobody ever met, with 2 when it cannot run.
 */

#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <boost/program_options.hpp>
#include <csignal>
#include <cstdint>
#include <ctime>
#include <exception>
#include <filesystem>
#include <iostream>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "../unit/processes.h"
#include "tormentor.h"
#include "watchdog.h"

namespace torture {

struct Options {
    int tasks;
    double seconds;
    uint64_t seed;
    std::string schedmirror;
    bool in_order;
};

inline volatile sig_atomic_t interrupted = 0;

struct Totals {
    static constexpr int kWays = lock_generator::torture::kWays;

    uint64_t acquires = 0, contended = 0, bursts = 0, rounds = 0, kills = 0, violations = 0;
    uint64_t longest[kWays] = {};
    Torments torments;

    void add(const Arena& arena) {
        for (const auto& t : arena.tasks) {
            for (int lock = 0; lock < lock_generator::torture::kLocks; lock++)
                acquires += t.exclusive[lock] + t.shared[lock];
            contended += t.contended;
            for (int w = 0; w < kWays; w++) longest[w] = std::max<uint64_t>(longest[w], t.longest[w]);
        }
        bursts += arena.epoch / 2;
        rounds++;
    }
};

/// One round: its processes, and what becomes of them.
class BasicRound {
  public:
    virtual ~BasicRound() = default;
    /// False after a violation.
    virtual bool run(double length) = 0;

  protected:
    BasicRound(const char* program, Totals& totals) : program_(program), totals_(totals) {}

    /// Where it all happens, whether the processes are to end, and how to watch them.
    virtual Arena& arena() = 0;
    virtual std::atomic<bool>& finish() = 0;
    virtual Watchdog watchdog() = 0;
    /// Everything there is to see, after a violation.
    virtual void show() = 0;
    /// What the round needs twice a millisecond.
    virtual void tend() {}

    /// Whether this is an end that was meant.
    virtual bool may_end(const siginfo_t& how) {
        return finish() && how.si_code == CLD_EXITED && how.si_status == 0;
    }

    bool torment(Tormentor& tormentor, double length) {
        Watchdog dog = watchdog();
        for (const double end = test::seconds() + length; test::seconds() < end && !interrupted;
             usleep(500)) {
            tormentor.act();
            if (!is_well(dog)) return false;
        }
        return true;
    }

    /// Until every task has left.
    bool end_in_order() {
        finish() = true;
        Watchdog dog = watchdog();
        for (int left = 1; left > 0; usleep(1000)) {
            if (!is_well(dog)) return false;
            left = 0;
            for (const auto& t : arena().tasks) left += t.pid != 0;
        }
        return true;
    }

    bool is_well(Watchdog& dog) {
        tend();
        if (arena().violations != 0) return fail(arena().reported ? arena().violation : "(no text)");
        const std::string problem = dog.look();
        if (!problem.empty()) return fail(problem);
        const pid_t died = dog.has_looked() ? find_dead() : 0;
        return died == 0 || fail("process " + std::to_string(died) + " ended by itself");
    }

    bool fail(const std::string& what) {
        totals_.violations += std::max<uint32_t>(1, arena().violations);
        std::cerr << program_ << ": " << what << "\n";
        show();
        return false;
    }

    const char* const program_;
    Totals& totals_;
    std::vector<std::unique_ptr<test::Child>> children_;

  private:
    /// One that is gone and should not be.
    pid_t find_dead() {
        for (const auto& child : children_) {
            siginfo_t how = {};
            if (waitid(P_PID, id_t(child->pid), &how, WEXITED | WNOHANG | WNOWAIT) == 0 &&
                how.si_pid == child->pid && !may_end(how))
                return child->pid;
        }
        return 0;
    }
};

template <class Value>
void report(const std::string& name, const Value& value) {
    std::cout << "  " << name << ": " << value << "\n";
}

inline double milliseconds(uint64_t ticks) {
    return double(ticks / CycleClock::ticks_per_microsecond()) / 1000;
}

/// The first lines of a report, and the last.
inline void report_beginning(const Totals& t, double seconds) {
    report("seconds", uint64_t(seconds));
    report("acquires", t.acquires);
    report("contended", t.contended);
    report("bursts", t.bursts);
    report("rounds", t.rounds);
    report("kills", t.kills);
    report("stops", t.torments.stops);
    report("moves", t.torments.moves);
    report("renices", t.torments.nices);
}
inline void report_longest_waits(const Totals& t, const char* (*name_of)(lock_generator::torture::Way)) {
    for (int w = 1; w < Totals::kWays; w++)
        if (const char* name = name_of(lock_generator::torture::Way(w)))
            report(std::string("longest wait, ") + name + ", ms", milliseconds(t.longest[w]));
}

/**
 * Round after round, until the time is over.
 *
 * make_round(const Options&, seed, const OwnMirror&): a unique_ptr<BasicRound> on `totals`; and how long a
 * round lasts at least and at most.
 */
template <class MakeRound, class Report>
int run_rounds(const char* program, const Options& options, Totals& totals, MakeRound make_round,
               Report report_totals) {
    const OwnMirror mirror(options.schedmirror, program);
    if (mirror.dir().empty())
        std::cout << program << ": without the kernel's mirror: " << mirror.why_not() << "\n";

    Random random(options.seed);
    const double start = test::seconds();
    bool well = true;
    for (double left = options.seconds; well && left > 0.5 && !interrupted;
         left = start + options.seconds - test::seconds()) {
        const auto round = make_round(random.next(), mirror);
        well = round->run(std::min(left, 1 + random.below(5'000) / 1000.0));
    }
    report_totals(test::seconds() - start);
    report("violations", totals.violations);
    if (well && totals.contended == 0) {
        std::cout << program << ": nobody ever met: this tests nothing\n";
        well = false;
    }
    return well ? 0 : 1;
}

/// main() of a program: torture(options) returns the exit code.
template <class Torture>
int run_program(const char* program, const char* about, int argc, char** argv, Torture torture) {
    namespace po = boost::program_options;
    Options options;
    po::options_description known(std::string(program) + " [OPTION]…: " + about);
    known.add_options()("help", "this text");
    known.add_options()("seconds", po::value(&options.seconds)->default_value(60), "how long");
    known.add_options()("tasks", po::value(&options.tasks)->default_value(16), "that take locks, 2 to 64");
    known.add_options()("seed", po::value(&options.seed), "of an earlier run; default: by the clock");
    known.add_options()("in-order", po::bool_switch(&options.in_order), "kill nobody");
    known.add_options()("schedmirror", po::value(&options.schedmirror),
                        "the command; default: beside this one");
    try {
        po::variables_map given;
        po::store(po::parse_command_line(argc, argv, known), given);
        po::notify(given);
        if (given.count("help")) {
            std::cout << known;
            return 0;
        }
        if (options.tasks < 2 || options.tasks > kTasks || !(options.seconds > 0))
            throw std::runtime_error("tasks or seconds out of range");
        if (!given.count("seed")) options.seed = uint64_t(time(nullptr));
        if (!given.count("schedmirror"))
            options.schedmirror =
                std::filesystem::read_symlink("/proc/self/exe").parent_path() / "schedmirror";

        for (const int sig : {SIGINT, SIGTERM, SIGHUP}) signal(sig, [](int) { interrupted = 1; });
        CycleClock::calibrate();
        std::cout << program << ": seed " << options.seed << std::endl;
        return torture(options);
    } catch (const std::exception& problem) {
        std::cerr << program << ": " << problem.what() << "\n";
        return 2;
    }
}

}  // namespace torture
