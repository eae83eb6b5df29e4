/*
 * Torture of the library's locks: processes on shared memory, and threads, take InterprocessMutex,
 * InterprocessSharedMutex, RobustMutex, Mutex and SharedMutex and wait for notifications with them (what they
 * do and check: server/torture.h), while this process torments them and watches for lost wake-ups.
 *
 * A run is a series of rounds, of three sorts that take turns:
 * - processes on all kinds of process-shared locks;
 * - threads of one process, on the private kinds and on RobustMutex;
 * - mortals: processes on RobustMutex that are killed anywhere and replaced, while the others go on. The next
 *   owner mends what the dead one left, or now and then gives the mutex up for ever: then its place is taken
 *   by the next of its incarnations, which nobody has used before.
 *
 * In between
 * ----------
 * What can go wrong does so in windows of a few instructions. Calls are held up behind any one of their
 * instructions (single_step.h) and around their futex calls, and mortals die there. Futex calls come here
 * first, as this program has a syscall() of its own. That also says who is asleep, and puts off the look
 * that the sleepers of process-shared locks take every 50 ms: it would hide a lost wake-up. Where tasks
 * die it stays, and what it found is counted.
 *
 * Notifications
 * -------------
 * Those who wait at a lock's condition variable want a gift. Every gift is given once, with a notify_one(), and
 * taken under the lock by anybody who wants one; so a gift that lies about while somebody sleeps is a lost
 * notification. Many wait for as long as it takes: one task, which never does, ends a burst as the last one and
 * gives what is wanted until then. Mortals wait for a time only, as a notification may die with whom it woke.
 *
 * Exit codes: program.h.
 */

#include <dlfcn.h>
#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/sysinfo.h>

#include <chrono>
#include <cstdarg>
#include <cstddef>
#include <cstdio>
#include <new>
#include <thread>

#include "../unit/process_lock.h"
#include "lock/condition_variable.h"
#include "lock/mutex.h"
#include "lock/robust_mutex.h"
#include "lock/shared_mutex.h"
#include "program.h"
#include "single_step.h"

using namespace adaptive;
using namespace torture;
using namespace lock_generator::torture;
using adaptive::test::make_shared_memory;
using std::chrono::nanoseconds;
using ::test::Child;
using ::test::seconds;
using Wanted = MirrorChoice::Wanted;

namespace {

// ---- what a round's tasks share ----

enum class Sort : uint8_t { processes, threads, mortals };
enum class Kind : uint8_t { mutex, shared, robust, private_mutex, private_shared };
constexpr const char* kKindNames[] = {"InterprocessMutex", "InterprocessSharedMutex", "RobustMutex", "Mutex",
                                      "SharedMutex"};
constexpr int kGiver = 0;  // the task that never waits for ever
constexpr uint32_t kIncarnations = 16;
constexpr uint32_t kRseqSlots = 2 * kTasks;

struct alignas(128) AnyLock {
    Kind kind;
    alignas(64) InterprocessMutex mutex;
    InterprocessSharedMutex shared;
    Mutex private_mutex;
    SharedMutex private_shared;
    alignas(64) RobustMutex robust[kIncarnations];
    std::atomic<uint32_t> incarnation;  // all before it are lost for ever
    std::atomic<bool> given_up[kIncarnations];

    alignas(64) InterprocessConditionVariable condition;
    ConditionVariable private_condition;
    std::atomic<uint32_t> wanted, given;  // gifts; changed under the lock

    bool is_private() const { return kind == Kind::private_mutex || kind == Kind::private_shared; }
    RobustMutex& present() { return robust[incarnation.load()]; }

    bool contains(const void* word) const {
        const auto at = reinterpret_cast<uintptr_t>(word), begin = reinterpret_cast<uintptr_t>(this);
        return at - begin < sizeof(AnyLock);
    }
    bool is_condition(const void* word) const { return word == &condition || word == &private_condition; }
};

/// What others see of a task, beside its Task.
struct alignas(128) Sleeper {
    std::atomic<const void*> on;  // the futex that it sleeps on; null: it does not
    std::atomic<uint64_t> killed_at;
    std::atomic<uint64_t> sleeps, backstops, deaths_seen, longest_until_told;
};

struct Round {
    Arena arena;
    Sort sort;
    AnyLock locks[kLocks];
    Sleeper sleepers[kTasks];

    alignas(128) std::atomic<int> belief;  // a Wanted, or kMixedBeliefs
    std::atomic<uint32_t> calls_to_delay;  // one call in so many is held up; 0: none
    std::atomic<bool> only_gives;          // the giver has done its other part
    std::atomic<bool> finish;

    alignas(128) char rseq_table[64 * 1024];
};
constexpr int kMixedBeliefs = 4;  // every process believes something else

std::string mirror_dir;  // empty: there is none
bool has_robust;         // an emulator may know no robust list

// ---- the words, from outside ----

uint64_t raw(const void* lock, int word = 0) {
    auto* words = static_cast<uint64_t*>(const_cast<void*>(lock));
    return std::atomic_ref<uint64_t>(words[word]).load();
}

/// What the mutexes name as their owner; of an AnyLock, the present incarnation's.
uint64_t owner_word(AnyLock& l) {
    switch (l.kind) {
        case Kind::mutex:
            return raw(&l.mutex);
        case Kind::shared:
            return raw(&l.shared);
        case Kind::robust:
            return raw(&l.present());
        case Kind::private_mutex:
            return raw(&l.private_mutex);
        case Kind::private_shared:
            return raw(&l.private_shared);
    }
    return 0;
}
/// Readers in and waiting, a writer; without the phase.
uint64_t shared_state(AnyLock& l) {
    constexpr uint64_t kPhase = 1ULL << 63;
    if (l.kind == Kind::shared) return raw(&l.shared, 1) & ~kPhase;
    if (l.kind == Kind::private_shared) return raw(&l.private_shared, 1) & ~kPhase;
    return 0;
}
bool is_free(AnyLock& l) {
    constexpr uint64_t kReadersWaiting = 0xffffffULL << 32;
    return mutex_word::is_free(owner_word(l)) && (shared_state(l) & ~kReadersWaiting) == 0;
}

// ---- a task under torture ----

/// This thread.
struct Self {
    Round* round = nullptr;
    int index = 0;
    Random random{0};
    bool has_deadline = false;  // a futex call's timeout is more than the backstop
    uint64_t waits_since = 0, stopped_before = 0;
    uint32_t calls = 0, next_delay = 0;

    Sleeper& sleeper() const { return round->sleepers[index]; }
};
thread_local Self self;

/// Ends a process as only a kill from outside could.
void die() {
    self.sleeper().killed_at = CycleClock::now();
    kill(getpid(), SIGKILL);
}

void happen() {
    if (self.round->sort == Sort::mortals && self.random.below(4) == 0) die();
    hold_up(self.random);
}

bool is_time_to_delay() {
    const uint32_t every = self.round->calls_to_delay.load(std::memory_order_relaxed);
    if (every == 0 || ++self.calls < self.next_delay) [[likely]]
        return false;
    self.calls = 0;
    self.next_delay = 1 + self.random.below(2 * every);
    return true;
}

/// Calls of the locks under test, one of which now and then is held up anywhere.
template <class Call>
decltype(auto) delayed(Call&& call) {
    struct End {
        ~End() { SingleStep::end(); }
    } end;
    if (is_time_to_delay()) [[unlikely]]
        SingleStep::begin(1 + self.random.below(1u << self.random.from_to(4, 10)));
    return call();
}

/// Calls with a deadline.
struct HasDeadline {
    HasDeadline() { self.has_deadline = true; }
    ~HasDeadline() { self.has_deadline = false; }
};

using Syscall = long (*)(long, ...);

/// The futex call, with this thread noted as asleep.
long tortured_futex(Syscall call, const long (&a)[6]) {
    const auto* word = reinterpret_cast<const uint32_t*>(a[0]);
    const bool waits = (a[1] & FUTEX_CMD_MASK) == FUTEX_WAIT_BITSET;
    // Behind a step that left a duty, or took it on.
    if (self.random.below(4) == 0 && is_time_to_delay()) hold_up(self.random);
    if (!waits) return call(SYS_futex, a[0], a[1], a[2], a[3], a[4], a[5]);

    Round& round = *self.round;
    Sleeper& sleeper = self.sleeper();
    AnyLock* lock = std::find_if(std::begin(round.locks), std::end(round.locks),
                                 [&](const AnyLock& l) { return l.contains(word); });
    const bool has_backstop =
        a[3] != 0 && !self.has_deadline && lock != std::end(round.locks) && !lock->is_condition(word);
    timespec later;
    auto timeout = a[3];
    if (has_backstop && round.sort != Sort::mortals) {
        later = *reinterpret_cast<const timespec*>(a[3]);
        later.tv_sec += 20;
        timeout = reinterpret_cast<long>(&later);
    }
    sleeper.sleeps.fetch_add(1, std::memory_order_relaxed);
    sleeper.on = word;
    const long result = call(SYS_futex, a[0], a[1], a[2], timeout, a[4], a[5]);
    const int error = errno;
    sleeper.on = nullptr;
    if (has_backstop && result != 0 && error == ETIMEDOUT && is_free(*lock))
        sleeper.backstops.fetch_add(1, std::memory_order_relaxed);
    errno = error;
    return result;
}

/**
 * A RobustMutex as the other kinds are, for tasks that may be killed anywhere.
 *
 * Whoever is told of a death mends what is protected: it is what the tasks counted for themselves. That can be
 * done again by the next one, if it is killed as well.
 */
class Mended {
  public:
    Mended(Round& round, int lock) : round_(round), l_(round.locks[lock]), lock_(lock) {}

    void lock() {
        while (!got([](RobustMutex& m) { return m.lock(); })) {
        }
    }
    bool try_lock() {
        return got([](RobustMutex& m) { return m.try_lock(); });
    }
    bool try_lock_for(nanoseconds time) {
        return got([&](RobustMutex& m) { return m.try_lock_for(time); });
    }
    void unlock() { l_.present().unlock(); }

  private:
    template <class Attempt>
    bool got(Attempt attempt) {
        for (;;) {
            uint32_t i = l_.incarnation.load();
            switch (attempt(l_.robust[i])) {
                case LockResult::acquired:
                    return true;
                case LockResult::owner_died:
                    mend(i);
                    return true;
                case LockResult::timed_out:
                    return false;
                case LockResult::not_recoverable:
                    if (!l_.given_up[i])
                        round_.arena.violate("lock %d: not recoverable, but nobody gave it up", lock_);
                    if (i + 1 < kIncarnations) l_.incarnation.compare_exchange_strong(i, i + 1);
                    break;
                case LockResult::not_supported:
                    round_.arena.violate("lock %d: not supported", lock_);
                    return true;
            }
        }
    }

    void mend(uint32_t incarnation) {
        Protected& p = round_.arena.data[lock_];
        if (round_.sort != Sort::mortals)
            round_.arena.violate("lock %d: told of a death, but nobody has died", lock_);
        note_told(p.writer.load());
        p.writer = p.readers = 0;
        const uint64_t holds = round_.arena.exclusive_holds(lock_);
        for (volatile uint64_t& word : p.words) word = holds;
        if (self.random.below(8) == 0 && incarnation + 1 < kIncarnations)
            l_.given_up[incarnation] = true;
        else if (!l_.given_up[incarnation])
            l_.present().consistent();
    }

    /// How long it took until somebody knew of a death, in its wait for it.
    void note_told(uint32_t writer) const {
        Sleeper& me = self.sleeper();
        me.deaths_seen.fetch_add(1, std::memory_order_relaxed);
        if (writer == 0 || self.waits_since == 0) return;  // it died on the way in or out, or here is no wait
        const uint64_t now = CycleClock::now();
        const uint64_t since = std::max(self.waits_since, round_.sleepers[writer - 1].killed_at.load());
        const uint64_t stopped = round_.arena.stopped_until(now) - self.stopped_before;
        if (now < since + stopped) return;
        const uint64_t waited = now - since - stopped;
        if (waited > me.longest_until_told) me.longest_until_told = waited;
        if (waited > 1'000'000 * CycleClock::ticks_per_microsecond())
            round_.arena.violate("lock %d: its owner's death was told after %.0f ms", lock_,
                                 milliseconds(waited));
    }

    Round& round_;
    AnyLock& l_;
    const int lock_;
};

/// Api of the Torturer.
class LibraryLocks {
  public:
    explicit LibraryLocks(Round& round) : round_(round) {}

    /// The lock, as its own type or as one that stands for it.
    template <class Use>
    decltype(auto) use(int lock, Use&& use) {
        AnyLock& l = round_.locks[lock];
        Mended mended(round_, lock);
        switch (l.kind) {
            case Kind::mutex:
                return use(l.mutex);
            case Kind::shared:
                return use(l.shared);
            case Kind::private_mutex:
                return use(l.private_mutex);
            case Kind::private_shared:
                return use(l.private_shared);
            case Kind::robust:
                break;
        }
        return use(mended);
    }
    template <class Use>
    decltype(auto) use_condition(int lock, Use&& use) {
        AnyLock& l = round_.locks[lock];
        return l.is_private() ? use(l.private_condition) : use(l.condition);
    }

    bool acquire(int lock, bool exclusive) {
        const bool was_free = is_free(round_.locks[lock]);
        if (!was_free) {
            contended_++;
            self.waits_since = CycleClock::now();
            self.stopped_before = round_.arena.stopped_until(self.waits_since);
        }
        use(lock, [&]<class Lock>(Lock& l) {
            if constexpr (requires { l.lock_shared(); })
                if (!exclusive) return delayed([&] { l.lock_shared(); });
            delayed([&] { l.lock(); });
        });
        self.waits_since = 0;
        return was_free;
    }
    bool acquire_conditionally(int lock, bool exclusive) {
        return use(lock, [&]<class Lock>(Lock& l) {
            if constexpr (requires { l.lock_shared(); })
                if (!exclusive) return delayed([&] { return l.try_lock_shared(); });
            return delayed([&] { return l.try_lock(); });
        });
    }
    bool acquire_within(int lock, bool exclusive, nanoseconds time) {
        const HasDeadline has_deadline;
        return use(lock, [&]<class Lock>(Lock& l) {
            if constexpr (requires { l.lock_shared(); })
                if (!exclusive) return delayed([&] { return l.try_lock_shared_for(time); });
            return delayed([&] { return l.try_lock_for(time); });
        });
    }
    void release(int lock, bool exclusive) {
        use(lock, [&]<class Lock>(Lock& l) {
            if constexpr (requires { l.lock_shared(); })
                if (!exclusive) return delayed([&] { l.unlock_shared(); });
            delayed([&] { l.unlock(); });
        });
    }

    void give(int lock) {
        round_.locks[lock].given++;
        delayed([&] { use_condition(lock, [](auto& condition) { condition.notify_one(); }); });
    }
    void tell_all(int lock) {
        use_condition(lock, [](auto& condition) { condition.notify_all(); });
    }
    /// With the lock held. Whether there is a gift; time: 0: waits until there is.
    bool await_gift(int lock, nanoseconds time) {
        const auto is_there = [&] { return round_.locks[lock].given != 0; };
        return use(lock, [&](auto& l) {
            return use_condition(lock, [&](auto& condition) {
                return delayed([&] {
                    if (time != nanoseconds(0)) return condition.wait_for(l, time, is_there);
                    condition.wait(l, is_there);
                    return true;
                });
            });
        });
    }

    const char* left_behind(int lock) {
        AnyLock& l = round_.locks[lock];
        if (round_.sort == Sort::mortals) {
            // What the dead left is nobody's, or can be mended. That has no place to note a spinner's death.
            Mended mended(round_, lock);
            if (!mended.try_lock()) return "it is held";
            mended.unlock();
            return nullptr;
        }
        const uint64_t word = owner_word(l), state = shared_state(l);
        if (word == 0 && state == 0 && l.wanted == 0 && l.given == 0) return nullptr;
        snprintf(text_, sizeof(text_), "%s, its words are %#lx, %#lx; %u gifts wanted, %u there",
                 kKindNames[int(l.kind)], word, state, l.wanted.load(), l.given.load());
        return text_;
    }

    uint64_t contended() const { return contended_; }

  private:
    Round& round_;
    uint64_t contended_ = 0;
    char text_[160];
};

class LibraryTorturer : public Torturer<LibraryLocks> {
  public:
    LibraryTorturer(Round& round, int index, LibraryLocks& api, uint64_t seed)
        : Torturer(round.arena, index, api, seed), round_(round) {}

    /// The giver may come after others have begun a burst.
    void enter(int32_t pid) {
        Torturer::enter(pid);
        finish_burst(me_.done);
    }

    /// As the last one: somebody may wait for ever.
    void leave_in_order() {
        give_until([](const Task&) { return false; });
        leave(me_);
    }

  private:
    void finish_burst(uint64_t epoch) override {
        give_until([&](const Task& t) { return t.done >= epoch; });
    }

    /// The giver goes on until every other task is done, or has left.
    template <class IsDone>
    void give_until(IsDone is_done) {
        if (index_ != kGiver || round_.sort == Sort::mortals) return;
        round_.only_gives = true;
        for (const Task& t : arena_.tasks)
            for (; &t != &me_ && t.pid != 0 && !is_done(t); nap_for(200'000)) give_what_is_wanted();
        round_.only_gives = false;
    }

    void give_what_is_wanted() {
        for (int lock = 0; lock < kLocks; lock++) {
            AnyLock& l = round_.locks[lock];
            if (l.given.load() < l.wanted.load()) give(lock, UINT32_MAX);
        }
    }

    [[gnu::noinline]] void special_operation(int lock, const Burst& b) override {
        switch (random_.below(8)) {
            case 0:
                return try_once(lock, b);
            case 1:
            case 2:
            case 3:
                return try_for_a_time(lock, b);
            case 4:
                return give(lock, 1 + random_.below(3));
            case 5:
                return give_what_is_wanted();
            default:
                return await_gift(lock, b);
        }
    }

    void try_for_a_time(int lock, const Burst& b) {
        const bool exclusive = !random_.per_64k(b.shared);
        const uint64_t from = begin(lock, Way::until_free);
        const bool acquired =
            api_.acquire_within(lock, exclusive, nanoseconds(random_.heavy_headed(26)));  // 67 ms
        end(from, Way::until_free);
        if (!acquired) return;
        inside(lock, exclusive, b);
        api_.release(lock, exclusive);
    }

    void give(int lock, uint32_t most) {
        AnyLock& l = round_.locks[lock];
        acquire(lock, true);
        for (; most > 0 && l.given < l.wanted; most--) api_.give(lock);
        if (random_.below(8) == 0) api_.tell_all(lock);
        api_.release(lock, true);
    }

    void await_gift(int lock, const Burst& b) {
        AnyLock& l = round_.locks[lock];
        const bool for_ever = index_ != kGiver && round_.sort != Sort::mortals && random_.below(2) == 0;
        acquire(lock, true);
        l.wanted++;
        const uint64_t from = begin(lock, Way::variable);
        const bool given = api_.await_gift(lock, nanoseconds(for_ever ? 0 : 1 + random_.heavy_headed(23)));
        end(from, Way::variable);
        l.wanted--;
        if (given) l.given--;
        inside(lock, true, b);
        api_.release(lock, true);
    }

    Round& round_;
};

/// This process's mirror as the round would have it now. Outside of any lock.
class Beliefs {
  public:
    explicit Beliefs(Round& round) : round_(round) {}

    void follow() {
        const int belief = round_.belief.load(std::memory_order_relaxed);
        const Wanted wanted = belief == kMixedBeliefs ? mine_ : static_cast<Wanted>(belief);
        const bool has_lost_it = wanted == Wanted::bpf && this_task().slot(Sharing::process_private) == 0;
        if ((wanted == chosen_ && !has_lost_it) || seconds() < next_try_) return;
        next_try_ = seconds() + 0.05;
        const bool is_shared = round_.sort != Sort::threads;
        Error error;
        if (use_mirror({.wanted = wanted,
                        .bpf_dir = mirror_dir.c_str(),
                        .rseq_table = is_shared ? round_.rseq_table : nullptr},
                       &error))
            chosen_ = wanted;
    }

  private:
    Round& round_;
    const Wanted mine_ = static_cast<Wanted>(1 + getpid() % 3);
    Wanted chosen_ = Wanted::best;  // none yet
    double next_try_ = 0;
};

void be_tortured(Round& round, int index, Beliefs* beliefs) {
    self = {
        .round = &round, .index = index, .random = Random(round.arena.seed * kTasks + uint64_t(gettid()))};
    round.sleepers[index].on = nullptr;
    Task& me = round.arena.tasks[index];
    const uint64_t contended_before = me.contended;
    LibraryLocks api(round);
    LibraryTorturer torturer(round, index, api, self.random.next());
    torturer.enter(gettid());
    while (!round.finish.load(std::memory_order_relaxed)) {
        if (beliefs != nullptr) beliefs->follow();
        torturer.step();
        me.contended.store(contended_before + api.contended(), std::memory_order_relaxed);
    }
    torturer.leave_in_order();
    self.round = nullptr;
}

[[noreturn]] void be_a_process(Round& round, int first, int tasks) {
    signal(SIGINT, SIG_IGN);  // the parent ends us in order
    SingleStep::install(happen);
    Beliefs beliefs(round);
    beliefs.follow();
    if (tasks == 1) {
        be_tortured(round, first, &beliefs);
    } else {
        std::vector<std::thread> threads;
        for (int i = 0; i < tasks; i++) threads.emplace_back([&round, i] { be_tortured(round, i, nullptr); });
        for (std::thread& thread : threads) thread.join();
    }
    _exit(0);
}

// ---- what torments and watches them ----

class LibraryTormentor : public Tormentor {
  public:
    LibraryTormentor(Round& round, uint64_t seed, const OwnMirror& mirror, Torments& done)
        : Tormentor(round.arena, seed, mirror, done), round_(round) {
        set_delay();
    }

    static int some_belief(Random& random) {
        const int some = 1 + int(random.below(kMixedBeliefs));
        return random.below(2) == 0 ? int(Wanted::bpf) : some;
    }

  private:
    void change(uint32_t what) override {
        switch (what) {
            case 0:
                round_.belief = some_belief(random_);
                done_.beliefs++;
                return;
            case 1:
                if (random_.below(16) == 0) reload();
                return;
            case 2:
                return set_delay();
            default:
                return;
        }
    }
    void set_delay() {
        constexpr uint32_t every[] = {0, 0, 5000, 5000, 500, 500, 50, 10};
        round_.calls_to_delay = every[random_.below(8)];
        done_.switches++;
    }

    Round& round_;
};

bool is_living(const Round& round, uint64_t tid) {
    for (const Task& t : round.arena.tasks)
        if (uint64_t(t.pid.load()) == tid) return true;
    return tid == uint64_t(getpid());
}

/// Wrong, if it lasts: to be asleep on a free lock, or while a gift is there; a lock that a dead task holds.
Scene scene_of_lock(Round& round, int lock) {
    AnyLock& l = round.locks[lock];
    const uint64_t word = owner_word(l), tid = word & mutex_word::kTid;
    Scene scene;
    if (tid != 0 && tid != mutex_word::kNotRecoverable && !is_living(round, tid)) {
        scene.state = tid;
        scene.wrong = "lock " + std::to_string(lock) + " was held by a dead task";
        return scene;
    }
    if (!is_free(l)) return scene;
    scene.state = word ^ shared_state(l);
    scene.holds = round.arena.exclusive_holds(lock) + round.arena.shared_holds(lock);
    const bool gift_is_there = l.given != 0 && round.sort != Sort::mortals;
    for (int i = 0; i < kTasks; i++) {
        const Task& t = round.arena.tasks[i];
        const void* on = round.sleepers[i].on.load();
        if (t.pid != 0 && l.contains(on) && (gift_is_there || !l.is_condition(on)))
            scene.asleep.push_back({i, t.episode});
    }
    if (!scene.asleep.empty()) scene.wrong = "lost wake-up: asleep on free lock " + std::to_string(lock);
    return scene;
}

/// Wrong, if it lasts: all who have not done their part are asleep.
Scene scene_of_all(Round& round) {
    Scene scene;
    scene.state = round.arena.epoch;
    for (int i = 0; i < kTasks; i++) {
        const Task& t = round.arena.tasks[i];
        if (t.pid == 0 || t.done == scene.state || (i == kGiver && round.only_gives)) continue;
        if (round.sleepers[i].on == nullptr) return scene;
        scene.asleep.push_back({i, t.episode});
    }
    if (!scene.asleep.empty()) scene.wrong = "lost wake-up: all were asleep";
    return scene;
}

void show(Round& round) {
    constexpr const char* sorts[] = {"processes", "threads", "mortals"};
    std::cerr << "  " << sorts[int(round.sort)] << ", phase " << round.arena.epoch << ", mirror "
              << round.belief << ", one call in " << round.calls_to_delay << " delayed\n"
              << std::hex << std::showbase;
    for (AnyLock& l : round.locks) {
        const Protected& p = round.arena.data[&l - round.locks];
        std::cerr << "  lock " << &l - round.locks << ": " << kKindNames[int(l.kind)] << ", incarnation "
                  << l.incarnation << ", words " << owner_word(l) << ", " << shared_state(l)
                  << "; inside: writer " << p.writer << ", readers " << p.readers << "; gifts wanted "
                  << l.wanted << ", there " << l.given << "\n";
    }
    std::cerr << std::dec;
    for (int i = 0; i < kTasks; i++) {
        const Task& t = round.arena.tasks[i];
        const pid_t pid = t.pid;
        if (pid == 0) continue;
        std::cerr << "  task " << i << ": tid " << std::hex << pid << std::dec << " " << scheduling_state(pid)
                  << ", phase done " << t.done;
        if (t.lock >= 0) std::cerr << ", lock " << int(t.lock);
        const void* on = round.sleepers[i].on;
        for (const AnyLock& l : round.locks)
            if (l.contains(on))
                std::cerr << ", asleep on " << (l.is_condition(on) ? "the condition of " : "lock ")
                          << &l - round.locks << " + "
                          << static_cast<const char*>(on) - reinterpret_cast<const char*>(&l);
        std::cerr << "\n";
    }
}

// ---- rounds ----

struct LibraryTotals : Totals {
    uint64_t sleeps = 0, backstops = 0, deaths_seen = 0, given_up = 0, longest_until_told = 0;
    uint64_t contended_of[3] = {};

    void add(Round& round) {
        const uint64_t before = contended;
        Totals::add(round.arena);
        contended_of[int(round.sort)] += contended - before;
        for (const Sleeper& s : round.sleepers) {
            sleeps += s.sleeps;
            backstops += s.backstops;
            deaths_seen += s.deaths_seen;
            longest_until_told = std::max<uint64_t>(longest_until_told, s.longest_until_told);
        }
        for (const AnyLock& l : round.locks) given_up += l.incarnation;
    }
};

class LibraryRound : public BasicRound {
  public:
    LibraryRound(const Options& options, Sort sort, uint64_t seed, const OwnMirror& mirror,
                 LibraryTotals& totals)
        : BasicRound("library_torture", totals),
          options_(options),
          random_(seed),
          mirror_(mirror),
          all_totals_(totals) {
        round_ = make_shared_memory<Round>();
        if (round_ == nullptr) throw std::runtime_error("no shared memory");
        api_ = std::make_unique<LibraryLocks>(*round_);
        self = {.round = round_, .index = kTasks - 1, .random = Random(seed)};

        Round& r = *round_;
        r.sort = sort;
        r.arena.start(seed);
        r.arena.closed = UINT64_MAX;  // this process closes the phases
        r.belief = LibraryTormentor::some_belief(random_);
        Mirror::rseq_format(r.rseq_table, kRseqSlots, uint32_t(get_nprocs_conf()));
        for (AnyLock& l : r.locks) l.kind = some_kind(sort);
        if (sort == Sort::threads)
            children_.push_back(std::make_unique<Child>([&] { be_a_process(r, 0, options.tasks); }));
        else
            for (int i = 0; i < options.tasks; i++) children_.push_back(process(i));
    }
    ~LibraryRound() override {
        self.round = nullptr;
        children_.clear();  // kills whoever is left
        munmap(round_, sizeof(Round));
    }

    bool run(double length) override {
        bool well;
        {
            LibraryTormentor tormentor(*round_, random_.next(), mirror_, totals_.torments);
            well = torment(tormentor, length);
        }
        well = well && end_in_order();
        if (well) LibraryTorturer::check_quiet(round_->arena, *api_);
        all_totals_.add(*round_);
        return well && (round_->arena.violations == 0 || fail(round_->arena.violation));
    }

  private:
    Arena& arena() override { return round_->arena; }
    std::atomic<bool>& finish() override { return round_->finish; }
    Watchdog watchdog() override {
        return Watchdog(round_->arena, kLocks + 1, [this](int i) {
            return i < kLocks ? scene_of_lock(*round_, i) : scene_of_all(*round_);
        });
    }
    void show() override { ::show(*round_); }

    Kind some_kind(Sort sort) {
        if (sort == Sort::mortals) return Kind::robust;
        for (;;) {
            const auto kind = static_cast<Kind>((sort == Sort::threads ? 2 : 0) + random_.below(3));
            if (kind != Kind::robust || has_robust) return kind;
        }
    }
    std::unique_ptr<Child> process(int i) {
        return std::make_unique<Child>([this, i] { be_a_process(*round_, i, 1); });
    }

    void tend() override {
        if (round_->sort == Sort::mortals) {
            if (!round_->finish && seconds() >= next_kill_) {
                next_kill_ = seconds() + random_.heavy_headed(16) * 1e-6;
                const auto i = random_.below(uint32_t(children_.size()));
                round_->sleepers[i].killed_at = CycleClock::now();
                kill(children_[i]->pid, SIGKILL);
            }
            replace_the_dead();
        }
        const uint64_t epoch = round_->arena.epoch;
        if (LibraryTorturer::all_are_done(round_->arena, epoch))
            LibraryTorturer::close_phase(round_->arena, *api_, epoch);
    }

    bool may_end(const siginfo_t& how) override {
        return BasicRound::may_end(how) ||
               (round_->sort == Sort::mortals && how.si_code == CLD_KILLED && how.si_status == SIGKILL);
    }

    void replace_the_dead() {
        for (size_t i = 0; i < children_.size(); i++) {
            Child& child = *children_[i];
            siginfo_t how = {};
            if (waitid(P_PID, id_t(child.pid), &how, WEXITED | WNOHANG | WNOWAIT) != 0 ||
                how.si_pid != child.pid || how.si_code != CLD_KILLED || !may_end(how))
                continue;
            child.wait();
            totals_.kills++;
            Task& task = round_->arena.tasks[i];
            task.pid = 0;
            task.lock = -1;
            if (!round_->finish) children_[i] = process(int(i));
        }
    }

    const Options& options_;
    Random random_;
    const OwnMirror& mirror_;
    LibraryTotals& all_totals_;
    Round* round_;
    std::unique_ptr<LibraryLocks> api_;
    double next_kill_ = seconds();
};

const char* name_of_wait(Way way) {
    constexpr const char* names[kWays] = {nullptr, "exclusive", "shared", "with a deadline", nullptr};
    return names[int(way)];
}

int torture_library(const Options& options) {
    Error error;
    use_mirror({.wanted = Wanted::off}, &error);  // of this process
    LibraryTotals totals;
    Random random(options.seed);
    RobustMutex robust;
    has_robust = robust.try_lock() == LockResult::acquired;
    if (has_robust)
        robust.unlock();
    else
        std::cout << "library_torture: without RobustMutex, which is not supported here\n";
    uint32_t turn = random.below(3);
    const auto round = [&](uint64_t seed, const OwnMirror& mirror) {
        mirror_dir = mirror.dir();
        auto sort = static_cast<Sort>(turn++ % 3);
        if (sort == Sort::mortals && (options.in_order || !has_robust)) sort = Sort::processes;
        return std::make_unique<LibraryRound>(options, sort, seed, mirror, totals);
    };
    return run_rounds("library_torture", options, totals, round, [&](double passed) {
        std::cout << "library_torture: the library's locks, " << options.tasks << " tasks, seed "
                  << options.seed << "\n";
        report_beginning(totals, passed);
        report("delay switches", totals.torments.switches);
        report("mirror switches", totals.torments.beliefs);
        report("mirror reloads", totals.torments.reloads);
        report("contended, of processes", totals.contended_of[int(Sort::processes)]);
        report("contended, of threads", totals.contended_of[int(Sort::threads)]);
        report("contended, of mortals", totals.contended_of[int(Sort::mortals)]);
        report("sleeps", totals.sleeps);
        report("free locks found by the backstop", totals.backstops);
        report("deaths told to the next owner", totals.deaths_seen);
        report("mutexes given up", totals.given_up);
        report("longest until told of a death, ms", milliseconds(totals.longest_until_told));
        report_longest_waits(totals, name_of_wait);
    });
}

}  // namespace

/// In the place of the C library's, for all of this program.
extern "C" long syscall(long number, ...) noexcept {
    // Not guarded, as a local static would be: whoever waits for the guard comes here.
    static std::atomic<Syscall> found;
    Syscall call = found.load(std::memory_order_relaxed);
    if (call == nullptr) found = call = reinterpret_cast<Syscall>(dlsym(RTLD_NEXT, "syscall"));
    long a[6];
    va_list args;
    va_start(args, number);
    for (long& argument : a) argument = va_arg(args, long);
    va_end(args);
    if (number == SYS_futex && self.round != nullptr) return tortured_futex(call, a);
    return call(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}

int main(int argc, char** argv) {
    return run_program("library_torture", "tortures the locks of the library", argc, argv, torture_library);
}
