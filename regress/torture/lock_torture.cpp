/*
 * Torture of the waiting algorithm outside PostgreSQL: processes on shared memory take its locks in all ways
 * (what they do and check: server/torture.h), while this process torments them and watches for lost
 * wake-ups.
 *
 * A run is a series of rounds. A round has its own processes and its own memory, and ends either in order,
 * with a look at everything that must add up, or with the SIGKILL of a process anywhere in the algorithm,
 * after which all are killed: as a server does, since nobody can know what state that one left behind.
 *
 * Exit codes: program.h.
 */

#include <sys/mman.h>
#include <sys/sysinfo.h>

#include <cstdio>
#include <new>

#include "../unit/process_lock.h"
#include "mirror/mirror.h"
#include "program.h"

using namespace adaptive;
using namespace adaptive::test;
using namespace torture;
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

std::string mirror_dir;  // empty: there is none

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
        hold_up(random);
    }
    static inline uint32_t steps_ = 0, next_ = 0;
};
using DelayedLock = QueueProtocol<DelayedHost>;

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

// ---- what torments and watches them ----

/// And what only these locks can be tormented with.
class LockTormentor : public Tormentor {
  public:
    LockTormentor(Round& round, uint64_t seed, const OwnMirror& mirror, Torments& done)
        : Tormentor(round.arena, seed, mirror, done), round_(round) {
        set_policy();
        set_budget();
        set_belief();
        set_delay();
    }

  private:
    void change(uint32_t what) override {
        switch (what) {
            case 0:
            case 1:
                return set_policy();
            case 2:
                return set_budget();
            case 3:
                return set_belief();
            case 4:
                if (random_.below(16) == 0) reload();
                return;
            case 5:
                return set_delay();
            default:
                return;
        }
    }

    void set_policy() {
        // Owner-aware spinning is what there is most to break in.
        round_.policy =
            random_.below(4) != 0 ? int(WaitPolicy::owner) : int(random_.below(kMixedPolicies + 1));
        done_.switches++;
    }
    void set_budget() {
        constexpr uint32_t usual = 200;
        round_.spin_microseconds = random_.below(2) == 0 ? usual : random_.heavy_headed(11);
        done_.switches++;
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

    Round& round_;
};

/// Wrong, if it lasts: to be asleep on a free lock.
Scene scene_of(Round& round, int lock) {
    ProcessLocks api(round);
    Scene scene;
    scene.state = ProcessHost::state(round.locks[lock]).load();
    scene.holds = round.arena.exclusive_holds(lock) + round.arena.shared_holds(lock);
    for (int i = 0; i < kTasks; i++) {
        const Task& t = round.arena.tasks[i];
        if (t.pid.load() != 0 && t.lock.load() == lock && api.is_asleep(t.proc))
            scene.asleep.push_back({i, t.episode});
    }
    if ((scene.state & kBits.held_mask) == 0 && !scene.asleep.empty())
        scene.wrong = "lost wake-up: asleep on free lock " + std::to_string(lock);
    return scene;
}

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

class LockRound : public BasicRound {
  public:
    LockRound(const Options& options, uint64_t seed, const OwnMirror& mirror, Totals& totals)
        : BasicRound("lock_torture", totals), options_(options), random_(seed), mirror_(mirror) {
        round_ = make_shared_memory<Round>();
        if (round_ == nullptr) throw std::runtime_error("no shared memory");
        Round& r = *round_;
        r.arena.start(seed);
        for (Seat& s : r.seats) sem_init(&s.semaphore, 1, 0);
        Mirror::rseq_format(r.rseq_table, kRseqSlots, uint32_t(get_nprocs_conf()));
        for (int i = 0; i < options.tasks; i++)
            children_.push_back(std::make_unique<Child>([&] { be_tortured(r, i); }));
    }
    ~LockRound() override {
        children_.clear();  // kills whoever is left
        munmap(round_, sizeof(Round));
    }

    bool run(double length) override {
        const bool by_death = !options_.in_order && random_.below(2) == 0;
        bool well;
        {
            LockTormentor tormentor(*round_, random_.next(), mirror_, totals_.torments);
            well = torment(tormentor, length);
        }
        totals_.add(round_->arena);
        if (!well || interrupted) return well;
        if (by_death)
            die();
        else
            well = end_in_order() && adds_up();
        return well;
    }

  private:
    Arena& arena() override { return round_->arena; }
    std::atomic<bool>& finish() override { return round_->finish; }
    Watchdog watchdog() override {
        return Watchdog(round_->arena, kLocks, [this](int lock) { return scene_of(*round_, lock); });
    }
    void show() override { ::show(*round_); }

    /// A process dies anywhere; the others go on for a moment with what it left behind.
    void die() {
        kill(children_[random_.below(uint32_t(children_.size()))]->pid, SIGKILL);
        usleep(random_.heavy_headed(16));
        totals_.kills++;
    }

    bool adds_up() {
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
    const OwnMirror& mirror_;
    Round* round_;
};

int torture_locks(const Options& options) {
    Totals totals;
    const auto round = [&](uint64_t seed, const OwnMirror& mirror) {
        mirror_dir = mirror.dir();
        return std::make_unique<LockRound>(options, seed, mirror, totals);
    };
    return run_rounds("lock_torture", options, totals, round, [&](double passed) {
        std::cout << "lock_torture: waiting algorithm, " << options.tasks << " processes, seed "
                  << options.seed << "\n";
        report_beginning(totals, passed);
        report("mode switches", totals.torments.switches);
        report("mirror switches", totals.torments.beliefs);
        report("mirror reloads", totals.torments.reloads);
        report_longest_waits(totals, name_of);
    });
}

}  // namespace

int main(int argc, char** argv) {
    return run_program("lock_torture", "tortures the waiting algorithm outside PostgreSQL", argc, argv,
                       torture_locks);
}
