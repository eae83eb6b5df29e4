// The waiting algorithm itself in every interleaving of a few tasks with few preemptions: what regress/model shows of the
// model, shown of the code. Nobody is alone with a lock taken by two, nobody sleeps for ever, and all is tidy in the end.
//
// INTERLEAVINGS_PREEMPTIONS adds to the preemptions visited (each one takes some 15 times longer).

#include "interleavings.h"

#include <gtest/gtest.h>

#include <functional>
#include <utility>

#include "process_lock.h"
#include "stepped.h"

namespace adaptive::test {
namespace {

struct Player {
    Seat seat;
    int semaphore = 0;
    LockTask<SharedLock> lock_task;
    SchedState hint = SchedState::on_cpu;
    bool is_listed = false;  // on whichever list
    unsigned owed = 0;       // the bystanders that this task's release has to wake, as a set

    // A signal may arrive once, at any point where the lock has promised to bear it (I6): what its handler does.
    std::function<void()> signal_handler;
    bool left = false;
    bool has_list = false, has_lock = false;
    int woken = 0;  // by this task, taken off the list and still to be woken

    // Of a task in wait_until() (I7).
    bool waits = false;
    bool was_free = false;         // the lock, since it began to wait
    bool is_queued = false;        // and everybody knows
    bool was_queued_free = false;  // it was queued at a moment when the lock was free
};
struct ThrownOut {};

/// Everything an execution starts from.
struct Stage {
    SharedLock lock;
    Player players[4];
    int writers = 0, readers = 0, turns = 0;
    uint64_t variable = 0;
};
Stage* stage;

Player& me() {
    return stage->players[explorer->current()];
}
Player& player_of(const Seat* seat) {
    for (Player& p : stage->players)
        if (&p.seat == seat) return p;
    abort();
}
unsigned set_of(const Seat* seat) {
    return 1u << (&player_of(seat) - stage->players);
}

/// Between any two steps.
void point_for_a_signal() {
    Player& self = me();
    if (self.signal_handler && !self.has_list && !self.has_lock && self.woken == 0 &&
        explorer->choose(2) != 0)
        std::exchange(self.signal_handler, nullptr)();
}

/// The state word, and what it says of its past.
struct StateWord : Stepped<uint32_t> {
    using Stepped::Stepped;
    static constexpr auto kBits = ProcessHost::kBits;

    uint32_t load(std::memory_order = {}) const {
        const uint32_t seen = Stepped::load();
        point_for_a_signal();
        return seen;
    }
    uint32_t fetch_or(uint32_t bits) {
        const uint32_t before = Stepped::fetch_or(bits);
        if (bits & ~before & kBits.list_locked) me().has_list = true;
        point_for_a_signal();
        return before;
    }
    uint32_t fetch_and(uint32_t bits) {
        const uint32_t before = Stepped::fetch_and(bits);
        point_for_a_signal();
        return before;
    }
    uint32_t fetch_sub(uint32_t hold) {
        const uint32_t before = Stepped::fetch_sub(hold), left = before - hold;
        me().has_lock = false;
        // The bystanders that I3 has woken when the release is over.
        if ((left & (kBits.held_mask | kBits.list_locked)) == 0)
            for (Seat& seat : stage->lock.waiters)
                if (seat.wait_mode == LockMode::until_free) me().owed |= set_of(&seat);
        if (!(left & kBits.exclusive))
            for (Player& p : stage->players) p.was_free = true, p.was_queued_free |= p.is_queued;
        return before;
    }
    bool compare_exchange_weak(uint32_t& seen, uint32_t desired, std::memory_order = {}) {
        const uint32_t before = seen;
        if (!Stepped::compare_exchange_weak(seen, desired)) return false;
        if ((desired & kBits.held_mask) != (before & kBits.held_mask)) me().has_lock = true;
        if (before & ~desired & kBits.list_locked) {
            me().has_list = false;
            me().is_queued = me().waits && me().is_listed;
            me().was_queued_free |= me().is_queued && !(desired & kBits.exclusive);
        }
        point_for_a_signal();
        return true;
    }
};
struct WaitStateByte : Stepped<uint8_t> {
    using Stepped::Stepped;
    uint8_t load(std::memory_order = {}) const {
        const uint8_t seen = Stepped::load();
        point_for_a_signal();
        return seen;
    }
};

/// ProcessHost with steps, and with free choice of what the mirror says, of the policy, and of what is late.
struct SteppedHost : ProcessHost {
    static StateWord state(Lock& l) { return StateWord(l.state); }
    static WaitStateByte wait_state(Waiter w) { return WaitStateByte(w->wait_state); }
    static Waiter self() { return &me().seat; }
    static void queued_already() { explorer->fail("queued twice"); }

    // I2: the lock's own list is touched under its lock only.
    static void check(WaitList& list) {
        if (&list == &stage->lock.waiters && !(stage->lock.state & kBits.list_locked))
            explorer->fail("the wait list is touched without its lock");
    }
    static void enter(WaitList& list, Waiter w) {
        check(list);
        if (std::exchange(player_of(w).is_listed, true)) explorer->fail("a task is on two lists");
        if (&list != &stage->lock.waiters)
            me().woken++;
        else if (me().waits && me().was_queued_free)
            explorer->fail("it was queued when the lock was free, and queues again");
    }
    static void push_head(WaitList& list, Waiter w) {
        enter(list, w);
        ProcessHost::push_head(list, w);
    }
    static void push_tail(WaitList& list, Waiter w) {
        enter(list, w);
        ProcessHost::push_tail(list, w);
    }
    static void erase(WaitList& list, Waiter w) {
        check(list);
        ProcessHost::erase(list, w);
        player_of(w).is_listed = player_of(w).is_queued = false;
        for (Player& p : stage->players) p.owed &= ~set_of(w);
    }
    static void lock_list_contended(Lock& l) {
        explorer->block_until("list_locked", [&l] { return !(l.state & kBits.list_locked); });
    }

    static void sleep() {
        Player& self = me();
        explorer->block_until("sleep", [&self] { return self.semaphore > 0; });
        self.semaphore--;
        point_for_a_signal();
    }
    static void wake(Waiter w) {
        explorer->step("wake");
        player_of(w).semaphore++;
        if (w != &me().seat && me().woken > 0) me().woken--;
    }

    static void sleep_begins(Lock&, LockMode) {}
    static void sleep_ended(Lock&, LockMode) {}

    // The spinner's budget ends after one look at the lock: a longer spin is one that is preempted before it. The mirror's
    // answer is chosen once a question, as the time that a question lasts is not determined.
    static WaitPolicy policy() { return explorer->choose(2) == 0 ? WaitPolicy::owner : WaitPolicy::park; }
    static SpinBudget budget() {
        me().hint = SchedState::on_cpu;
        return {.watched = 0, .unwatched = 0};
    }
    static uint16_t spinner(Lock&) {
        me().hint = explorer->choose(2) == 0 ? SchedState::on_cpu : SchedState::preempted;
        return 0;
    }
    static uint16_t owner(Lock&) { return 0; }
    static void set_owner(Lock&) {}
    static void set_spinner(Lock&) { point_for_a_signal(); }
    static bool is_spinner_overdue(Lock&) { return explorer->choose(2) != 0; }
    static SchedState look(uint16_t) { return me().hint; }
    static uint64_t spare_for_ticks() { return UINT64_MAX; }
    static void note_wakeup(Lock&) {}
    static bool is_wakeup_late(Lock&) { return explorer->choose(2) != 0; }
    static LockTask<SharedLock>& task() { return me().lock_task; }
    static void count(Lock&, LockEvent, uint64_t) {}
};

using Waiting = QueueProtocol<SteppedHost>;

void hold(LockMode mode) {
    me().signal_handler = nullptr;  // only waiting is promised to bear it
    (mode == LockMode::exclusive ? stage->writers : stage->readers)++;
    if (stage->writers + (stage->readers > 0) > 1) explorer->fail("two hold the lock");
    stage->turns++;
    explorer->step("holds");
    (mode == LockMode::exclusive ? stage->writers : stage->readers)--;
    Waiting::release(stage->lock, mode);
    if (me().owed != 0) explorer->fail("a release has left a bystander waiting");
}

Explorer::Task acquires(LockMode mode, int times = 1) {
    return [=] {
        for (int i = 0; i < times; i++) {
            Waiting::acquire(stage->lock, mode);
            hold(mode);
        }
    };
}
Explorer::Task writer(int times = 1) {
    return acquires(LockMode::exclusive, times);
}
Explorer::Task reader(int times = 1) {
    return acquires(LockMode::shared, times);
}
Explorer::Task acquires_or_waits() {
    return [] {
        if (Waiting::acquire_or_wait(stage->lock, LockMode::exclusive)) hold(LockMode::exclusive);
    };
}
/// As whoever flushes the log. Until the variable is set, or only until the lock has been free.
void wait_until(bool variable_is_set) {
    Player& self = me();
    self.was_free = !(stage->lock.state & ProcessHost::kBits.exclusive);
    self.was_queued_free = false;
    self.waits = true;
    const bool freed =
        Waiting::wait_until(stage->lock, [=] { return variable_is_set && stage->variable != 0; });
    if (freed && !self.was_free) explorer->fail("the lock was not free since the wait began");
    self.waits = false;
}
Explorer::Task waits_for_variable() {
    return [] { wait_until(true); };
}
Explorer::Task waits_until_free(int times = 1) {
    return [=] {
        for (int i = 0; i < times; i++) wait_until(false);
    };
}
/// As whoever inserts into the log: announces progress and lets go, or keeps the lock until the others are through.
Explorer::Task updates_variable(bool and_releases) {
    return [=] {
        Waiting::acquire(stage->lock, LockMode::exclusive);
        Waiting::update(stage->lock, [] { stage->variable = 1; });
        if (and_releases) Waiting::release(stage->lock, LockMode::exclusive);
    };
}
/// Leaves at any point. An exit in a signal handler takes locks, or first gives back what was left.
Explorer::Task thrown_out_of(Explorer::Task wait, bool takes_a_lock = false) {
    return [=] {
        me().signal_handler = [] { throw ThrownOut(); };
        try {
            wait();
        } catch (const ThrownOut&) {
            me().left = true;
            me().waits = false;
            if (takes_a_lock) reader()();
            Waiting::abandon();
        }
    };
}
/// At any point a signal handler takes the same lock, and returns.
Explorer::Task interrupted(Explorer::Task wait) {
    return [=] {
        me().signal_handler = [] {
            const bool waits = std::exchange(me().waits, false);
            writer()();
            me().waits = waits;
        };
        wait();
    };
}
/// Somebody else has use for that task's semaphore and posts it.
Explorer::Task posts_on(int task) {
    return [=] { SteppedHost::wake(&stage->players[task].seat); };
}

struct Scenario {
    const char* name;
    std::vector<Explorer::Task> tasks;
    int preemptions;
    bool keeps_the_lock = false;
    int posts = 0;  // on task 0, beyond the wake-ups

    friend void PrintTo(const Scenario& s, std::ostream* out) { *out << s.name; }
};

class Interleavings : public ::testing::TestWithParam<Scenario> {};

TEST_P(Interleavings, AreAllRight) {
    const Scenario& scenario = GetParam();
    expect_right_in_every_interleaving(stage, scenario.tasks, scenario.preemptions, [&]() -> std::string {
        constexpr auto kBits = SteppedHost::kBits;
        if (stage->lock.state != (kBits.release_ok | (scenario.keeps_the_lock ? kBits.exclusive : 0)))
            return "the state word is not clean";
        if (!stage->lock.waiters.empty()) return "the wait list is not empty";
        for (int i = 0; i < 4; i++) {
            // Who leaves need not wait for the wake-up that was on its way.
            const int surplus = stage->players[i].semaphore - (i == 0 ? scenario.posts : 0);
            if (surplus != 0 && !(surplus == 1 && stage->players[i].left))
                return "a semaphore is out of balance";
            if (stage->players[i].seat.wait_state != 0) return "a task seems to wait";
            if (stage->players[i].lock_task.waiting_for) return "a task has not ended its wait";
            if (!scenario.keeps_the_lock && stage->players[i].lock_task.spun_for)
                return "a spin was not counted";
        }
        return {};
    });
}

const Scenario kScenarios[] = {
    {"TwoWriters", {writer(2), writer(2)}, 4},
    {"ThreeWriters", {writer(), writer(), writer()}, 3},
    {"WriterTurnsAndTwoWriters", {writer(2), writer(), writer()}, 3},
    {"WriterAndReaders", {writer(), reader(), reader()}, 3},
    {"WritersAndReader", {writer(), writer(), reader()}, 3},
    {"WriterAndReaderTurns", {writer(2), reader(2)}, 4},
    {"WritersAndBystander", {writer(), writer(), acquires_or_waits()}, 3},
    {"WritersTurnsAndBystander", {writer(2), writer(), acquires_or_waits()}, 3},
    {"ReaderWriterAndBystander", {reader(), writer(), acquires_or_waits()}, 3},
    {"WriterAndTwoBystanders", {writer(), acquires_or_waits(), acquires_or_waits()}, 3},
    {"VariableReleased", {updates_variable(true), waits_for_variable(), waits_for_variable()}, 3},
    {"VariableKept", {updates_variable(false), waits_for_variable(), waits_for_variable()}, 3, true},
    {"VariableAndWriter", {updates_variable(true), waits_for_variable(), writer()}, 3},
    {"ForeignPost", {writer(), writer(), posts_on(0)}, 3, false, 1},
    {"WritersAndWhoWaitsUntilFree", {writer(2), writer(), waits_until_free()}, 3},
    {"WriterAndTwoWhoWaitUntilFree", {writer(3), waits_until_free(), waits_until_free(2)}, 3},
    {"WritersTurnsAndWhoWaitsUntilFree", {writer(2), writer(2), waits_until_free(2)}, 3},
    {"WritersAndTwoWhoWaitUntilFree", {writer(), writer(), waits_until_free(), waits_until_free()}, 3},
    {"WritersAndOneThrownOut", {writer(), writer(), thrown_out_of(writer())}, 3},
    {"WriterAndReaderThrownOut", {writer(), writer(), thrown_out_of(reader())}, 2},
    {"WritersAndBystanderThrownOut", {writer(), writer(), thrown_out_of(acquires_or_waits())}, 2},
    {"WritersAndOneThrownOutWhoWaitsUntilFree", {writer(), writer(), thrown_out_of(waits_until_free())}, 3},
    {"WritersAndOneThrownOutThatTakesALock", {writer(), writer(), thrown_out_of(writer(), true)}, 2},
    {"WritersAndOneInterrupted", {writer(), writer(), interrupted(writer())}, 2},
    {"WritersAndBystanderInterrupted", {writer(), writer(), interrupted(acquires_or_waits())}, 2},
    {"WritersAndOneInterruptedWhoWaitsUntilFree", {writer(), writer(), interrupted(waits_until_free())}, 2},
};
INSTANTIATE_TEST_SUITE_P(QueueProtocol, Interleavings, ::testing::ValuesIn(kScenarios),
                         [](const auto& scenario) { return scenario.param.name; });

}  // namespace
}  // namespace adaptive::test
