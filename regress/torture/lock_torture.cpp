/*
 * Torture of the waiting algorithm outside PostgreSQL: processes on shared memory take its locks in all ways
 * (what they do and check: bench/generator/torture.h), while this process torments them and watches for lost
 * wake-ups.
 *
 * A run is a series of rounds. A round has its own processes and its own memory, and ends either in order,
 * with a look at everything that must add up, or with the SIGKILL of a process anywhere in the algorithm,
 * after which all are killed: as a server does, since nobody can know what state that one left behind.
 *
 * Exits with 0, with 1 after a violation, with 2 when it cannot run.
 */

#include <dirent.h>
#include <fcntl.h>
#include <sched.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/sysinfo.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <boost/program_options.hpp>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <memory>
#include <new>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "../../bench/generator/torture.h"
#include "../unit/process_lock.h"
#include "../unit/processes.h"
#include "mirror/mirror.h"

namespace po = boost::program_options;
using namespace adaptive;
using namespace adaptive::test;
using namespace lock_generator::torture;
using ::test::Child;
using ::test::seconds;

namespace {

constexpr auto kBits = ProcessHost::kBits;

// ---- what a round's processes share ----

/// What the processes believe of each other.
enum class Belief : int { bpf, rseq, lies, all_on_cpu, all_blocked, nothing };
constexpr int kBeliefs = 6;

constexpr int kMixedPolicies = 3;  // beside the three WaitPolicies: every operation another one
constexpr uint32_t kRseqSlots = kTasks + 1;

struct Round {
    Arena arena;
    SharedLock locks[kLocks];
    Seat seats[kTasks];

    alignas(128) std::atomic<int> policy;
    std::atomic<uint32_t> spin_microseconds;
    std::atomic<Belief> belief;
    std::atomic<bool> forgetful;           // the pace of the spins is never learnt
    std::atomic<uint32_t> steps_to_delay;  // one step in so many takes longer; 0: none
    std::atomic<bool> finish;

    alignas(128) char rseq_table[64 * 1024];
};

std::string mirror_dir;

// ---- a process under torture ----

/// Lets time pass before a step of the algorithm now and then: a window of a few nanoseconds becomes one that
/// others fall into.
struct DelayedHost : ProcessHost {
    static inline uint32_t steps_to_delay = 0;

    static std::atomic_ref<uint32_t> state(Lock& l) {
        step();
        return ProcessHost::state(l);
    }
    static std::atomic_ref<uint8_t> wait_state(Waiter w) {
        step();
        return ProcessHost::wait_state(w);
    }

  private:
    static void step() {
        if (steps_to_delay != 0 && ++steps_ >= next_) [[unlikely]]
            delay();
    }
    [[gnu::noinline]] static void delay() {
        static Random random{uint64_t(getpid())};
        steps_ = 0;
        next_ = random.below(2 * steps_to_delay);
        const uint32_t way = random.below(16);
        if (way < 10) {
            const uint64_t from = CycleClock::now(),
                           ticks = SpinPace::from_nanoseconds(random.heavy_headed(13));
            while (CycleClock::now() - from < ticks) CycleClock::pause();
        } else if (way < 15) {
            sched_yield();
        } else {
            usleep(random.heavy_headed(8));
        }
    }
    static inline uint32_t steps_ = 0, next_ = 0;
};
using DelayedLock = AdaptiveLock<DelayedHost>;

/// A process's view of the others, and its own entry in both mirrors.
class Eyes {
  public:
    explicit Eyes(Round& round, int index) : round_(round) {
        Error error;
        if (rseq_.open_rseq(round.rseq_table, &error))
            rseq_task_.attach_rseq(rseq_, SlotId(index + 1), nullptr, &error);
    }

    void note_running() {
        switch (round_.belief.load(std::memory_order_relaxed)) {
            case Belief::bpf:
                if (bpf_task_.slot() != 0 && !bpf_task_.note_running()) bpf_task_.detach();
                ProcessHost::slot = bpf_task_.slot();
                break;
            case Belief::rseq:
                rseq_task_.note_running();
                ProcessHost::slot = rseq_task_.slot();
                break;
            default:
                break;
        }
    }

    /// Outside of any lock. After an unload this finds the new mirror.
    void attach() {
        if (bpf_task_.slot() != 0 || mirror_dir.empty() || seconds() < next_try_) return;
        next_try_ = seconds() + 0.05;
        Error error;
        if (!bpf_.active()) {
            bpf_.close();
            if (!bpf_.open_bpf(mirror_dir.c_str(), &error)) return;
        }
        bpf_task_.attach(bpf_, &error);
    }

    SchedState look(SlotId slot) {
        switch (round_.belief.load(std::memory_order_relaxed)) {
            case Belief::bpf:
                return bpf_.look(slot);
            case Belief::rseq:
                return rseq_.look(slot);
            case Belief::lies:
                return static_cast<SchedState>(random_.below(6));
            case Belief::all_on_cpu:
                return SchedState::on_cpu;
            case Belief::all_blocked:
                return SchedState::blocked;
            case Belief::nothing:
                break;
        }
        return SchedState::unknown;
    }

  private:
    Round& round_;
    Mirror bpf_, rseq_;
    MirrorTask bpf_task_, rseq_task_;
    double next_try_ = 0;
    Random random_{uint64_t(getpid())};
};
Eyes* eyes = nullptr;

class ProcessLocks {
  public:
    explicit ProcessLocks(Round& round) : round_(round) {}

    bool acquire(int lock, bool exclusive) {
        prepare();
        return DelayedLock::acquire(round_.locks[lock], mode(exclusive));
    }
    bool acquire_conditionally(int lock, bool exclusive) {
        prepare();
        return DelayedLock::acquire_conditionally(round_.locks[lock], mode(exclusive));
    }
    bool acquire_or_wait(int lock) {
        prepare();
        return DelayedLock::acquire_or_wait(round_.locks[lock], LockMode::exclusive);
    }
    bool wait_for_variable(int lock, uint64_t old, uint64_t* now) {
        return DelayedLock::wait_until(round_.locks[lock], [&] {
            const uint64_t value = variable(lock);
            if (value == old) return false;
            *now = value;
            return true;
        });
    }
    void release(int lock, bool exclusive) { DelayedLock::release(round_.locks[lock], mode(exclusive)); }
    void update_variable(int lock, uint64_t value) {
        DelayedLock::update(round_.locks[lock], [&] { set_variable(lock, value); });
    }
    void release_clearing_variable(int lock) {
        set_variable(lock, 0);
        release(lock, true);
    }
    uint64_t variable(int lock) {
        return std::atomic_ref(round_.arena.data[lock].variable).load(std::memory_order_relaxed);
    }

    bool is_asleep(int seat) {
        Seat& s = round_.seats[seat];
        return wait_state(s) == WaitState::waiting && s.asleep;
    }
    static WaitState wait_state(Seat& s) {
        return static_cast<WaitState>(std::atomic_ref(s.wait_state).load());
    }
    const char* left_behind(int lock) {
        SharedLock& l = round_.locks[lock];
        if (!l.waiters.empty()) return "its wait list is not empty";
        const uint32_t state = ProcessHost::state(l).load();
        if (state == kBits.release_ok) return nullptr;
        snprintf(text_, sizeof(text_), "its state word is %#x", state);
        return text_;
    }

    void post(int seat) { sem_post(&round_.seats[seat].semaphore); }
    int take_posts() {
        int taken = 0;
        while (sem_trywait(&ProcessHost::seat->semaphore) == 0) taken++;
        return taken;
    }

  private:
    static LockMode mode(bool exclusive) { return exclusive ? LockMode::exclusive : LockMode::shared; }
    void set_variable(int lock, uint64_t value) {
        std::atomic_ref(round_.arena.data[lock].variable).store(value, std::memory_order_relaxed);
    }

    /// What the module does at an acquire, and the settings as they are now.
    void prepare() {
        eyes->note_running();
        const int policy = round_.policy.load(std::memory_order_relaxed);
        ProcessHost::wait_policy =
            static_cast<WaitPolicy>(policy == kMixedPolicies ? int(turn_++ % 3) : policy);
        ProcessHost::spin_microseconds = round_.spin_microseconds.load(std::memory_order_relaxed);
        DelayedHost::steps_to_delay = round_.steps_to_delay.load(std::memory_order_relaxed);
    }

    Round& round_;
    unsigned turn_ = 0;
    char text_[80];
};

using ProcessTorturer = LWLockTorturer<ProcessLocks>;

[[noreturn]] void be_tortured(Round& round, int index) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    signal(SIGINT, SIG_IGN);  // the parent ends us in order
    ProcessHost::seat = &round.seats[index];
    Eyes own_eyes(round, index);
    eyes = &own_eyes;
    ProcessHost::hint = [](uint16_t slot) { return eyes->look(slot); };

    ProcessLocks locks(round);
    ProcessTorturer torturer(round.arena, index, locks, getpid(), index, round.arena.seed + uint64_t(index));
    Task& me = round.arena.tasks[index];
    while (!round.finish.load(std::memory_order_relaxed)) {
        own_eyes.attach();
        torturer.step();
        if (round.forgetful.load(std::memory_order_relaxed)) ProcessHost::lock_task.pace = {};
        me.contended.store(ProcessHost::counts[int(LockEvent::contended)], std::memory_order_relaxed);
    }
    ProcessTorturer::leave(me);
    _exit(0);
}

// ---- /proc ----

std::string read_file(const std::string& path) {
    std::ifstream file(path);
    std::stringstream text;
    text << file.rdbuf();
    return text.str();
}

char scheduling_state(pid_t pid) {
    const std::string stat = read_file("/proc/" + std::to_string(pid) + "/stat");
    const size_t name_ends = stat.rfind(')');
    return name_ends == std::string::npos || name_ends + 2 >= stat.size() ? '?' : stat[name_ends + 2];
}

/// Nanoseconds on a CPU.
uint64_t run_time(pid_t pid) {
    return strtoull(read_file("/proc/" + std::to_string(pid) + "/schedstat").c_str(), nullptr, 10);
}

// ---- the tormentor ----

struct Torments {
    uint64_t stops = 0, moves = 0, nices = 0, policies = 0, budgets = 0, beliefs = 0, reloads = 0;
};

/// Does what a hostile scheduler and a careless administrator do. Everything that it has begun ends with it.
class Tormentor {
  public:
    Tormentor(Round& round, const std::vector<pid_t>& pids, uint64_t seed, const std::string& schedmirror,
              Torments& done)
        : round_(round), pids_(pids), random_(seed), schedmirror_(schedmirror), done_(done) {
        CPU_ZERO(&all_cpus_);
        sched_getaffinity(0, sizeof(all_cpus_), &all_cpus_);
        set_policy();
        set_budget();
        set_belief();
        set_delay();
    }
    ~Tormentor() {
        resume(UINT64_MAX);
        if (reloading_ > 0) waitpid(reloading_, nullptr, 0);
    }

    void act() {
        const uint64_t now = CycleClock::now();
        resume(now);
        if (reloading_ > 0 && waitpid(reloading_, nullptr, WNOHANG) == reloading_) reloading_ = 0;
        if (now < next_) return;
        next_ = now + random_.below(8'000) * CycleClock::ticks_per_microsecond();
        switch (random_.below(16)) {
            case 0:
            case 1:
            case 2:
            case 3:
                return stop(now);
            case 4:
            case 5:
            case 6:
                return move();
            case 7:
                return nice();
            case 8:
            case 9:
                return set_policy();
            case 10:
                return set_budget();
            case 11:
                return set_belief();
            case 12:
                if (random_.below(16) == 0) reload();
                return;
            case 13:
                return set_delay();
            default:
                return;
        }
    }

  private:
    struct Stopped {
        pid_t pid;
        uint64_t until;
    };

    pid_t somebody() { return pids_[random_.below(uint32_t(pids_.size()))]; }

    void stop(uint64_t now) {
        const pid_t pid = somebody();
        for (const Stopped& s : stopped_)
            if (s.pid == pid) return;
        if (stopped_.empty()) round_.arena.stopped_since = now;
        kill(pid, SIGSTOP);
        stopped_.push_back(
            {pid, now + (50 + random_.heavy_headed(14)) * CycleClock::ticks_per_microsecond()});
        done_.stops++;
    }
    void resume(uint64_t now) {
        if (stopped_.empty()) return;
        std::erase_if(stopped_,
                      [&](const Stopped& s) { return s.until <= now && kill(s.pid, SIGCONT) == 0; });
        if (!stopped_.empty()) return;
        Arena& a = round_.arena;
        a.stopped_ticks += CycleClock::now() - a.stopped_since.exchange(0);
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
        sched_setaffinity(somebody(), sizeof(cpus), &cpus);
        done_.moves++;
    }

    /// Raising it again takes root. Beyond 10 a task may go without the CPU for so long that nobody can tell
    /// whether it owes a wake-up or the wake-up is lost.
    void nice() {
        if (geteuid() != 0) return;
        setpriority(PRIO_PROCESS, id_t(somebody()), int(random_.below(16)) - 5);
        done_.nices++;
    }

    void set_policy() {
        // Owner-aware spinning is what there is most to break in.
        round_.policy =
            random_.below(4) != 0 ? int(WaitPolicy::owner) : int(random_.below(kMixedPolicies + 1));
        done_.policies++;
    }
    void set_budget() {
        constexpr uint32_t usual = 200;
        round_.spin_microseconds = random_.below(2) == 0 ? usual : random_.heavy_headed(11);
        done_.budgets++;
    }
    void set_belief() {
        const Belief some = static_cast<Belief>(random_.below(kBeliefs));
        round_.belief = random_.below(2) == 0 ? Belief::bpf : some;
        round_.forgetful = random_.below(2) == 0;
        done_.beliefs++;
    }

    void set_delay() {
        constexpr uint32_t every[] = {0, 0, 0, 2000, 2000, 200, 200, 10};
        round_.steps_to_delay = every[random_.below(8)];
    }

    void reload() {
        if (mirror_dir.empty() || reloading_ > 0) return;
        const std::string command = schedmirror_ + " --dir " + mirror_dir;
        const std::string both = command + " unload; sleep 0.0" + std::to_string(random_.below(10)) + "; " +
                                 command + " load --group root --slots " +
                                 std::to_string(random_.from_to(4, 200));
        reloading_ = fork();
        if (reloading_ == 0) {
            const int nowhere = open("/dev/null", O_RDWR);
            dup2(nowhere, 1);
            dup2(nowhere, 2);
            execl("/bin/sh", "sh", "-c", both.c_str(), nullptr);
            _exit(127);
        }
        done_.reloads++;
    }

    Round& round_;
    const std::vector<pid_t>& pids_;
    Random random_;
    const std::string& schedmirror_;
    Torments& done_;
    cpu_set_t all_cpus_;
    uint64_t next_ = 0;
    std::vector<Stopped> stopped_;
    pid_t reloading_ = 0;
};

// ---- the watchdog ----

/**
 * Looks for lost wake-ups: a process is asleep on a free lock, for more than a second in which nobody was
 * stopped and nothing changed at this lock, and everybody who could still owe the wake-up has had a CPU or is
 * asleep as well. And for a burst that does not end.
 */
class Watchdog {
  public:
    explicit Watchdog(Round& round) : round_(round), stopped_(round.arena.stopped_until(CycleClock::now())) {}

    /// What is wrong, or an empty string.
    std::string look() {
        const double now = seconds();
        has_looked_ = now - last_ >= 0.1;
        if (!has_looked_) return "";
        // Only what passed while nobody was stopped.
        const uint64_t ticks = CycleClock::now(), stopped = round_.arena.stopped_until(ticks);
        const double stopped_for =
            double(stopped - stopped_) / double(CycleClock::ticks_per_microsecond()) / 1e6;
        const double passed = std::max(0.0, now - last_ - stopped_for);
        last_ = now;
        stopped_ = stopped;

        for (int lock = 0; lock < kLocks; lock++) {
            Suspicion& s = suspicions_[lock];
            Scene scene = scene_of(lock);
            if (!scene.suspicious()) {
                s = {};
            } else if (!(scene == s.scene)) {
                s = {std::move(scene), 0, run_times()};
            } else if ((s.seconds += passed) > 1 && (s.seconds > 30 || nobody_may_owe(s))) {
                char text[120];
                snprintf(text, sizeof(text), "lost wake-up: asleep on free lock %d for %.1f s", lock,
                         s.seconds);
                return text;
            }
        }

        const uint64_t epoch = round_.arena.epoch;
        stuck_for_ = epoch == epoch_ ? stuck_for_ + passed : 0;
        epoch_ = epoch;
        return stuck_for_ > 30 ? "a burst does not end" : "";
    }
    /// Whether it was time to look.
    bool has_looked() const { return has_looked_; }

  private:
    /// What is to be seen of one lock.
    struct Scene {
        struct Sleeper {
            int task;
            uint32_t episode;
            bool operator==(const Sleeper&) const = default;
        };
        uint32_t state = 0;
        uint64_t holds = 0;
        std::vector<Sleeper> asleep;

        bool suspicious() const { return (state & kBits.held_mask) == 0 && !asleep.empty(); }
        bool operator==(const Scene&) const = default;
    };
    struct Suspicion {
        Scene scene;
        double seconds = 0;
        std::vector<uint64_t> run_times;
    };

    Scene scene_of(int lock) {
        ProcessLocks api(round_);
        Scene scene;
        scene.state = ProcessHost::state(round_.locks[lock]).load();
        scene.holds = round_.arena.exclusive_holds(lock) + round_.arena.shared_holds(lock);
        for (int i = 0; i < kTasks; i++) {
            const Task& t = round_.arena.tasks[i];
            if (t.pid.load() != 0 && t.lock.load() == lock && api.is_asleep(t.proc))
                scene.asleep.push_back({i, t.episode});
        }
        return scene;
    }

    std::vector<uint64_t> run_times() const {
        std::vector<uint64_t> times;
        for (const Task& t : round_.arena.tasks) times.push_back(t.pid.load() != 0 ? run_time(t.pid) : 0);
        return times;
    }
    bool nobody_may_owe(const Suspicion& s) const {
        const std::vector<uint64_t> times = run_times();
        for (int i = 0; i < kTasks; i++) {
            const pid_t pid = round_.arena.tasks[i].pid;
            if (pid != 0 && scheduling_state(pid) != 'S' && times[i] - s.run_times[i] < 10'000'000)
                return false;
        }
        return true;
    }

    Round& round_;
    Suspicion suspicions_[kLocks];
    double last_ = seconds(), stuck_for_ = 0;
    uint64_t stopped_ = 0, epoch_ = 0;
    bool has_looked_ = false;
};

// ---- the scene of a failure ----

std::string decoded(uint32_t state) {
    struct {
        uint32_t bit;
        const char* name;
    } constexpr flags[] = {{kBits.has_waiters, "has_waiters"}, {kBits.release_ok, "release_ok"},
                           {kBits.list_locked, "list_locked"}, {kBits.spinner, "spinner"},
                           {kBits.until_free, "until_free"},   {kBits.exclusive, "exclusive"}};
    char text[200];
    snprintf(text, sizeof(text), "%#010x =", state);
    std::string decoded = text;
    for (const auto& f : flags)
        if (state & f.bit) decoded += std::string(" ") + f.name;
    const uint32_t shared = state & kBits.held_mask & ~kBits.exclusive;
    return decoded + " shared:" + std::to_string(shared);
}

void show(Round& round) {
    constexpr const char* wait_states[] = {"not waiting", "waiting", "removed"};
    constexpr const char* modes[] = {"exclusive", "shared", "until free"};
    std::cerr << "  phase " << round.arena.epoch << ", policy " << round.policy << ", budget "
              << round.spin_microseconds << " us, belief " << int(round.belief.load()) << "\n";
    for (int lock = 0; lock < kLocks; lock++) {
        SharedLock& l = round.locks[lock];
        const Protected& p = round.arena.data[lock];
        std::cerr << "  lock " << lock << ": " << decoded(l.state) << ", owner's slot " << l.owner
                  << ", spinner's " << l.spinner << "; inside: writer " << p.writer << ", readers "
                  << p.readers << "\n";
        int n = 0;
        for (auto w = l.waiters.begin(); w != l.waiters.end() && n < kTasks; ++w, ++n)
            std::cerr << "    queued: task " << &*w - round.seats << ", " << modes[int(w->wait_mode) % 3]
                      << ", " << wait_states[w->wait_state % 3] << "\n";
    }
    for (int i = 0; i < kTasks; i++) {
        const Task& t = round.arena.tasks[i];
        const pid_t pid = t.pid;
        if (pid == 0) continue;
        int posts = -1;
        sem_getvalue(&round.seats[i].semaphore, &posts);
        const std::string proc = "/proc/" + std::to_string(pid);
        std::cerr << "  task " << i << ": pid " << pid << " " << scheduling_state(pid) << " in "
                  << read_file(proc + "/wchan") << ", slot " << i + 1 << ", phase done " << t.done;
        if (t.lock >= 0)
            std::cerr << ", lock " << int(t.lock) << " " << name_of(t.way) << ", "
                      << wait_states[round.seats[i].wait_state % 3]
                      << (round.seats[i].asleep ? ", asleep" : "");
        std::cerr << ", semaphore " << posts << " (posted " << t.posted << ")\n";
    }
}

// ---- rounds ----

struct Options {
    int tasks;
    double seconds;
    uint64_t seed;
    std::string schedmirror;
    bool in_order;
};

struct Totals {
    uint64_t acquires = 0, contended = 0, bursts = 0, rounds = 0, kills = 0, violations = 0;
    uint64_t longest[kWays] = {};
    Torments torments;

    void add(const Round& round) {
        for (const Task& t : round.arena.tasks) {
            for (int lock = 0; lock < kLocks; lock++) acquires += t.exclusive[lock] + t.shared[lock];
            contended += t.contended;
            for (int w = 0; w < kWays; w++) longest[w] = std::max<uint64_t>(longest[w], t.longest[w]);
        }
        bursts += round.arena.epoch / 2;
        rounds++;
    }
};

volatile sig_atomic_t interrupted = 0;

/// One round: its processes, and what becomes of them.
class Torture {
  public:
    Torture(const Options& options, uint64_t seed, Totals& totals)
        : options_(options), random_(seed), totals_(totals) {
        round_ = make_shared_memory<Round>();
        if (round_ == nullptr) throw std::runtime_error("no shared memory");
        Round& r = *round_;
        r.arena.start(seed);
        for (Seat& s : r.seats) sem_init(&s.semaphore, 1, 0);
        Mirror::rseq_format(r.rseq_table, kRseqSlots, uint32_t(get_nprocs_conf()));
        for (int i = 0; i < options.tasks; i++) {
            children_.push_back(std::make_unique<Child>([&] { be_tortured(r, i); }));
            pids_.push_back(children_.back()->pid);
        }
    }
    ~Torture() {
        children_.clear();  // kills whoever is left
        munmap(round_, sizeof(Round));
    }

    /// False after a violation.
    bool run(double length) {
        const bool by_death = !options_.in_order && random_.below(2) == 0;
        bool well = torment(length);
        totals_.add(*round_);
        if (!well || interrupted) return well;
        if (by_death)
            die();
        else
            well = end_in_order();
        return well;
    }

  private:
    bool torment(double length) {
        Tormentor tormentor(*round_, pids_, random_.next(), options_.schedmirror, totals_.torments);
        Watchdog watchdog(*round_);
        for (const double end = seconds() + length; seconds() < end && !interrupted; usleep(500)) {
            tormentor.act();
            if (!is_well(watchdog)) return false;
        }
        return true;
    }

    bool is_well(Watchdog& watchdog) {
        if (round_->arena.violations != 0)
            return fail(round_->arena.reported ? round_->arena.violation : "(no text)");
        const std::string problem = watchdog.look();
        if (!problem.empty()) return fail(problem);
        const pid_t died = watchdog.has_looked() ? find_dead() : 0;
        return died == 0 || fail("process " + std::to_string(died) + " ended by itself");
    }

    /// One that is gone and should not be.
    pid_t find_dead() {
        for (const pid_t pid : pids_) {
            siginfo_t how = {};
            if (waitid(P_PID, id_t(pid), &how, WEXITED | WNOHANG | WNOWAIT) == 0 && how.si_pid == pid &&
                !(round_->finish && how.si_code == CLD_EXITED && how.si_status == 0))
                return pid;
        }
        return 0;
    }

    bool fail(const std::string& what) {
        totals_.violations += std::max<uint32_t>(1, round_->arena.violations);
        std::cerr << "lock_torture: " << what << "\n";
        show(*round_);
        return false;
    }

    /// A process dies anywhere; the others go on for a moment with what it left behind.
    void die() {
        kill(pids_[random_.below(uint32_t(pids_.size()))], SIGKILL);
        usleep(random_.heavy_headed(16));
        totals_.kills++;
    }

    bool end_in_order() {
        round_->finish = true;
        Watchdog watchdog(*round_);
        for (auto left = pids_.size(); left > 0; usleep(1000)) {
            if (!is_well(watchdog)) return false;
            left = 0;
            for (const Task& t : round_->arena.tasks) left += t.pid != 0;
        }
        ProcessLocks api(*round_);
        ProcessTorturer::check_quiet(round_->arena, api);
        for (int i = 0; i < options_.tasks; i++) {
            int posts = -1;
            sem_getvalue(&round_->seats[i].semaphore, &posts);
            if (posts != int(round_->arena.tasks[i].posted))
                round_->arena.violate("the semaphore of task %d is at %d instead of %u", i, posts,
                                      round_->arena.tasks[i].posted.load());
        }
        return round_->arena.violations == 0 || fail(round_->arena.violation);
    }

    const Options& options_;
    Random random_;
    Totals& totals_;
    Round* round_;
    std::vector<std::unique_ptr<Child>> children_;
    std::vector<pid_t> pids_;
};

void report(const Options& options, const Totals& t, double passed) {
    const auto line = [](const char* name, auto value) {
        std::cout << "  " << name << ": " << value << "\n";
    };
    std::cout << "lock_torture: waiting algorithm, " << options.tasks << " processes, seed " << options.seed
              << "\n";
    line("seconds", uint64_t(passed));
    line("acquires", t.acquires);
    line("contended", t.contended);
    line("bursts", t.bursts);
    line("rounds", t.rounds);
    line("kills", t.kills);
    line("stops", t.torments.stops);
    line("moves", t.torments.moves);
    line("renices", t.torments.nices);
    line("mode switches", t.torments.policies + t.torments.budgets);
    line("mirror switches", t.torments.beliefs);
    line("mirror reloads", t.torments.reloads);
    for (int w = 1; w < kWays; w++)
        line(("longest wait, " + std::string(name_of(Way(w))) + ", ms").c_str(),
             double(t.longest[w] / CycleClock::ticks_per_microsecond()) / 1000);
    line("violations", t.violations);
}

/// A mirror of the run's own, in the BPF file system. Why there is none, or an empty string.
std::string load_mirror(const Options& options) {
    if (geteuid() != 0) return "not root";
    mirror_dir = "/sys/fs/bpf/lock_torture_" + std::to_string(getpid());
    const std::string command = options.schedmirror + " --dir " + mirror_dir + " load --group root 2>&1";
    std::string output;
    FILE* pipe = popen(command.c_str(), "r");
    for (char line[256]; pipe != nullptr && fgets(line, sizeof(line), pipe) != nullptr;) output += line;
    if (pipe == nullptr || pclose(pipe) != 0) {
        mirror_dir.clear();
        return output.empty() ? "schedmirror does not run" : output;
    }
    return "";
}

void unload_mirror(const Options& options) {
    if (mirror_dir.empty()) return;
    if (system((options.schedmirror + " --dir " + mirror_dir + " unload >/dev/null 2>&1").c_str()) != 0)
        std::cerr << "lock_torture: the mirror in " << mirror_dir << " could not be unloaded\n";
}

int torture(const Options& options) {
    const std::string no_mirror = load_mirror(options);
    if (!no_mirror.empty()) std::cout << "lock_torture: without the kernel's mirror: " << no_mirror << "\n";

    Totals totals;
    Random random(options.seed);
    const double start = seconds();
    bool well = true;
    for (double left = options.seconds; well && left > 0.5 && !interrupted;
         left = start + options.seconds - seconds()) {
        Torture round(options, random.next(), totals);
        well = round.run(std::min(left, 1 + random.below(5'000) / 1000.0));
    }
    unload_mirror(options);
    report(options, totals, seconds() - start);
    if (well && totals.contended == 0) {
        std::cout << "lock_torture: nobody ever met: this tests nothing\n";
        well = false;
    }
    return well ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
    Options options;
    po::options_description known(
        "lock_torture [OPTION]…: tortures the waiting algorithm outside PostgreSQL");
    known.add_options()("help", "this text");
    known.add_options()("seconds", po::value(&options.seconds)->default_value(60), "how long");
    known.add_options()("tasks", po::value(&options.tasks)->default_value(16), "processes, 2 to 64");
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
        std::cout << "lock_torture: seed " << options.seed << std::endl;
        return torture(options);
    } catch (const std::exception& problem) {
        std::cerr << "lock_torture: " << problem.what() << "\n";
        return 2;
    }
}
