// The protocol of libadaptive_pthread.so in every interleaving of a few tasks with few preemptions, some of which are
// in the C library instead: never held by two, nobody sleeps for ever, nothing owed is left behind.
//
// INTERLEAVINGS_PREEMPTIONS adds to the preemptions visited (each one takes some 15 times longer).

#include <gtest/gtest.h>

#include <deque>
#include <memory>

#include "protocol/pthread_protocol.h"
#include "stepped.h"

namespace adaptive::test {
namespace {

struct Mutex {
    int word = 0;
    uint32_t owner = 0;
};

/// Everything an execution starts from. Two mutexes share the seat.
struct Stage {
    Mutex mutexes[2];
    uint64_t seat = 0;
    std::deque<std::pair<int, const void*>> asleep;  // the kernel's queue: task, mutex
    uint64_t sparing_since[4] = {};
    int holders[2] = {}, turns = 0;
    uint64_t spared = 0;
};
Stage* stage;
uint64_t spared_in_all;

struct SteppedHost {
    using Lock = Mutex;

    static Stepped<int> word(Lock& lock) { return Stepped<int>(lock.word); }
    static Stepped<uint64_t> seat(const Lock*) { return Stepped<uint64_t>(stage->seat); }
    static uint64_t key(const Lock* lock) { return static_cast<uint64_t>(lock - stage->mutexes + 1) << 20; }
    static uint32_t owner(Lock& lock) { return lock.owner; }
    // Task 2 has no slot.
    static SlotId slot() {
        const int n = explorer->current();
        return n == 2 ? mutex_word::kUnnamed : static_cast<SlotId>(n + 1);
    }
    static SlotId find(uint32_t tid) { return static_cast<SlotId>(tid); }
    // The mirror's answer is anything.
    static SchedState look(SlotId slot) {
        if (slot == mutex_word::kUnnamed || slot == 0) return SchedState::unknown;
        return explorer->choose(2) == 0 ? SchedState::on_cpu : SchedState::preempted;
    }
    static FutexWait sleep(Lock& lock) {
        const int task = explorer->current();
        explorer->step("futex_wait");
        if (lock.word != 2) return FutexWait::changed;
        stage->asleep.push_back({task, &lock});
        explorer->block_until("sleep", [task] {
            for (const auto& s : stage->asleep)
                if (s.first == task) return false;
            return true;
        });
        return FutexWait::woken;
    }
    static void wake(const Lock* lock) {
        explorer->step("futex_wake");
        for (auto s = stage->asleep.begin(); s != stage->asleep.end(); s++)
            if (s->second == lock) {
                stage->asleep.erase(s);
                return;
            }
    }
    static bool starves(uint64_t) { return explorer->choose(2) == 1; }
    static SpinPace pace(Lock&) { return {.ticks = 0}; }
    static void waited(Lock&, bool) {}
    static uint64_t& sparing_since() { return stage->sparing_since[explorer->current()]; }
    static uint64_t spare_for_ticks() { return UINT64_MAX; }
    static void count(LockEvent event) { spared_in_all += event == LockEvent::wakeup_spared; }
};

using Protocol = PthreadProtocol<SteppedHost>;
// A spin ends after one look at the lock: a longer one is one that is preempted before it.
constexpr SpinBudget kOneLook = {.watched = 0, .unwatched = 0};

void in_the_mutex(Mutex& mutex) {
    int& holders = stage->holders[&mutex - stage->mutexes];
    if (++holders > 1) explorer->fail("two hold the mutex");
    mutex.owner = static_cast<uint32_t>(explorer->current() + 1);
    stage->turns++;
    explorer->step("holds");
    mutex.owner = 0;
    holders--;
}

Explorer::Task locks(int times = 1, int which = 0) {
    return [=] {
        Mutex& mutex = stage->mutexes[which];
        for (int i = 0; i < times; i++) {
            if (!Protocol::try_acquire(mutex)) Protocol::acquire(mutex, kOneLook);
            in_the_mutex(mutex);
            Protocol::release(mutex);
        }
    };
}
/// pthread_mutex_timedlock() whose time is over when the spin is.
Explorer::Task gives_up(int times = 1) {
    return [=] {
        Mutex& mutex = stage->mutexes[0];
        for (int i = 0; i < times; i++) {
            if (!Protocol::try_acquire(mutex) && !Protocol::acquire_spinning(mutex, kOneLook)) continue;
            in_the_mutex(mutex);
            Protocol::release(mutex);
        }
    };
}

// What glibc does.
void glibc_lock(Mutex& mutex, int taken) {
    int seen = 0;
    if (SteppedHost::word(mutex).compare_exchange_strong(seen, taken)) return;
    while (SteppedHost::word(mutex).exchange(2) != 0) SteppedHost::sleep(mutex);
}
void glibc_unlock(Mutex& mutex) {
    if (SteppedHost::word(mutex).exchange(0) > 1) SteppedHost::wake(&mutex);
}
Explorer::Task locks_in_glibc(int times = 1) {
    return [=] {
        Mutex& mutex = stage->mutexes[0];
        for (int i = 0; i < times; i++) {
            glibc_lock(mutex, 1);
            in_the_mutex(mutex);
            glibc_unlock(mutex);
        }
    };
}
/// Takes it here, waits in pthread_cond_wait(), which gives it up and takes it back in there, and gives it up here.
Explorer::Task waits_for_condition() {
    return [] {
        Mutex& mutex = stage->mutexes[0];
        if (!Protocol::try_acquire(mutex)) Protocol::acquire(mutex, kOneLook);
        in_the_mutex(mutex);
        glibc_unlock(mutex);
        glibc_lock(mutex, 2);
        in_the_mutex(mutex);
        Protocol::release(mutex);
    };
}

struct Scenario {
    const char* name;
    std::vector<Explorer::Task> tasks;
    int preemptions;
    bool spares = true;  ///< a wake-up, in some execution

    friend void PrintTo(const Scenario& s, std::ostream* out) { *out << s.name; }
};

class PreloadInterleavings : public ::testing::TestWithParam<Scenario> {};

TEST_P(PreloadInterleavings, AreAllRight) {
    const Scenario& scenario = GetParam();
    spared_in_all = 0;
    expect_right_in_every_interleaving(stage, scenario.tasks, scenario.preemptions, [&]() -> std::string {
        if (stage->turns == 0) return "nobody has held the mutex";
        if (stage->mutexes[0].word != 0 || stage->mutexes[1].word != 0) return "the mutex is not free";
        if (stage->seat != 0) return "the seat is not free";
        return {};
    });
    EXPECT_EQ(spared_in_all != 0, scenario.spares);
    printf("    %lu wake-ups spared\n", spared_in_all);
}

const Scenario kScenarios[] = {
    {"Two", {locks(2), locks(2)}, 4},
    {"Three", {locks(), locks(), locks()}, 3},
    {"TwoAndOneTwice", {locks(2), locks(), locks()}, 3},
    {"TwoAndOneThatGivesUp", {locks(), gives_up(), locks()}, 3},
    {"OneTwiceAndOneThatGivesUp", {locks(2), gives_up(2), locks()}, 3},
    {"TwoAndOneInGlibc", {locks(), locks(), locks_in_glibc()}, 3},
    {"OneAndTwoInGlibc", {locks(2), locks_in_glibc(), locks_in_glibc()}, 3, false},
    {"OneThatGivesUpAndTwoInGlibc", {gives_up(2), locks(), locks_in_glibc(), locks_in_glibc()}, 2},
    {"ConditionAndTwo", {waits_for_condition(), locks(), locks()}, 3},
    {"ConditionAndGlibc", {waits_for_condition(), locks(), locks_in_glibc()}, 3},
    {"Four", {locks(), locks(), locks(), locks()}, 2},
    {"ASpinnerLosesItsSeat", {locks(2), gives_up(), locks_in_glibc(), gives_up()}, 3},
    {"AnotherMutexHasTheSeat", {locks(), locks(), locks(1, 1), locks(1, 1)}, 3, false},
};
INSTANTIATE_TEST_SUITE_P(All, PreloadInterleavings, ::testing::ValuesIn(kScenarios),
                         [](const auto& scenario) { return scenario.param.name; });

}  // namespace
}  // namespace adaptive::test
