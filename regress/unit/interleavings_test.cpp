// The waiting algorithm itself in every interleaving of a few tasks with few preemptions: what regress/model shows of the
// model, shown of the code. Nobody is alone with a lock taken by two, nobody sleeps for ever, and all is tidy in the end.
//
// INTERLEAVINGS_PREEMPTIONS adds to the preemptions visited (each one takes some 15 times longer).

#include "interleavings.h"

#include <gtest/gtest.h>

#include "process_lock.h"
#include "stepped.h"

namespace adaptive::test {
namespace {

struct Player {
    Seat seat;
    int semaphore = 0;
    LockTask<SharedLock> lock_task;
    SchedState hint = SchedState::on_cpu;
    bool may_leave = false;  // in the middle of its acquire, until it has queued
    bool is_listed = false;  // on whichever list
    unsigned owed = 0;       // the bystanders that this task's release has to wake, as a set
};
struct ThrownOut {};

/// Everything an execution starts from.
struct Stage {
    SharedLock lock;
    Player players[3];
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

/// Between any two steps of its spin a task may leave, as an exit in a signal handler does.
void point_to_leave() {
    if (me().may_leave && explorer->choose(2) != 0) {
        me().may_leave = false;
        throw ThrownOut();
    }
}

/// The state word. Who gives a hold up notes whom I3 has woken when the release is over.
struct StateWord : Stepped<uint32_t> {
    using Stepped::Stepped;
    uint32_t load(std::memory_order = {}) const {
        const uint32_t seen = Stepped::load();
        point_to_leave();
        return seen;
    }
    uint32_t fetch_or(uint32_t bits) {
        const uint32_t before = Stepped::fetch_or(bits);
        if (bits == ProcessHost::kBits.spinner) point_to_leave();
        return before;
    }
    uint32_t fetch_and(uint32_t bits) {
        const uint32_t before = Stepped::fetch_and(bits);
        if (bits == ~ProcessHost::kBits.spinner) point_to_leave();
        return before;
    }
    uint32_t fetch_sub(uint32_t hold) {
        const uint32_t before = Stepped::fetch_sub(hold);
        constexpr uint32_t kFreeAndListKnown = ProcessHost::kBits.held_mask | ProcessHost::kBits.list_locked;
        if (((before - hold) & kFreeAndListKnown) == 0)
            for (Seat& seat : stage->lock.waiters)
                if (seat.wait_mode == LockMode::until_free) me().owed |= set_of(&seat);
        return before;
    }
};

/// ProcessHost with steps, and with free choice of what the mirror says, of the policy, and of what is late.
struct SteppedHost : ProcessHost {
    static StateWord state(Lock& l) { return StateWord(l.state); }
    static Stepped<uint8_t> wait_state(Waiter w) { return Stepped<uint8_t>(w->wait_state); }
    static Waiter self() {
        me().may_leave = false;
        return &me().seat;
    }
    static void queued_already() { explorer->fail("queued twice"); }

    // I2: the lock's own list is touched under its lock only.
    static void check(WaitList& list) {
        if (&list == &stage->lock.waiters && !(stage->lock.state & kBits.list_locked))
            explorer->fail("the wait list is touched without its lock");
    }
    static void enter(WaitList& list, Waiter w) {
        check(list);
        if (std::exchange(player_of(w).is_listed, true)) explorer->fail("a task is on two lists");
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
        player_of(w).is_listed = false;
        for (Player& p : stage->players) p.owed &= ~set_of(w);
    }
    static void lock_list_contended(Lock& l) {
        explorer->block_until("list_locked", [&l] { return !(l.state & kBits.list_locked); });
    }

    static void sleep() {
        Player& self = me();
        explorer->block_until("sleep", [&self] { return self.semaphore > 0; });
        self.semaphore--;
    }
    static void wake(Waiter w) {
        explorer->step("wake");
        player_of(w).semaphore++;
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
    static uint16_t owner(Lock&) {
        point_to_leave();
        return 0;
    }
    static void set_owner(Lock&) {}
    static void set_spinner(Lock&) { point_to_leave(); }
    static bool is_spinner_overdue(Lock&) { return explorer->choose(2) != 0; }
    static SchedState look(uint16_t) { return me().hint; }
    static uint64_t spare_for_ticks() { return UINT64_MAX; }
    static void note_wakeup(Lock&) {}
    static bool is_wakeup_late(Lock&) { return explorer->choose(2) != 0; }
    static LockTask<SharedLock>& task() { return me().lock_task; }
    static void count(Lock&, LockEvent, uint64_t) {}
};

using Waiting = AdaptiveLock<SteppedHost>;

void hold(LockMode mode) {
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
Explorer::Task waits_for_variable() {
    return [] { Waiting::wait_until(stage->lock, [] { return stage->variable != 0; }); };
}
/// As whoever inserts into the log: announces progress and lets go, or keeps the lock until the others are through.
Explorer::Task updates_variable(bool and_releases) {
    return [=] {
        Waiting::acquire(stage->lock, LockMode::exclusive);
        Waiting::update(stage->lock, [] { stage->variable = 1; });
        if (and_releases) Waiting::release(stage->lock, LockMode::exclusive);
    };
}
/// Leaves its spin at any point. An exit in a signal handler takes locks, or first gives back what was left.
Explorer::Task thrown_out(bool takes_a_lock = false) {
    return [=] {
        me().may_leave = true;
        try {
            Waiting::acquire(stage->lock, LockMode::exclusive);
            me().may_leave = false;
            hold(LockMode::exclusive);
        } catch (const ThrownOut&) {
            if (takes_a_lock) {
                Waiting::acquire(stage->lock, LockMode::shared);
                hold(LockMode::shared);
            }
            Waiting::abandon_spin();
        }
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
        for (int i = 0; i < 3; i++) {
            if (stage->players[i].semaphore != (i == 0 ? scenario.posts : 0))
                return "a semaphore is out of balance";
            if (stage->players[i].seat.wait_state != 0) return "a task seems to wait";
            if (stage->players[i].lock_task.spinning_for) return "a task seems to spin";
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
    {"WritersAndOneThrownOut", {writer(), writer(), thrown_out()}, 3},
    {"WritersAndOneThrownOutThatTakesALock", {writer(), writer(), thrown_out(true)}, 2},
};
INSTANTIATE_TEST_SUITE_P(AdaptiveLock, Interleavings, ::testing::ValuesIn(kScenarios),
                         [](const auto& scenario) { return scenario.param.name; });

}  // namespace
}  // namespace adaptive::test
