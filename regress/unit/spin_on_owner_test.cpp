// spin_on_owner: what ends a spin. The mirror is a function here, so it says what each case needs.
#include "spin/spin_on_owner.h"

#include <gtest/gtest.h>

#include <utility>

namespace adaptive {
namespace {

// In ticks: milliseconds, and minutes.
constexpr SpinBudget kBudget = {.watched = 2'000'000, .unwatched = 200'000};
constexpr SpinBudget kPlenty = {.watched = 1'000'000'000'000, .unwatched = 1'000'000'000'000};
constexpr SlotId kOwner = 7;

bool taken() {
    return false;
}
SlotId owner() {
    return kOwner;
}

template <class TryAcquire, class Owner, class StateOf>
SpinEnd spin(TryAcquire try_acquire, Owner owner_now, StateOf state_of, const SpinBudget& budget = kPlenty) {
    return spin_on_owner(try_acquire, owner_now, state_of, budget, SpinPace::quick());
}

TEST(SpinOnOwnerTest, EndsWithTheLock) {
    int attempts = 0;
    EXPECT_EQ(spin([&] { return ++attempts == 3; }, owner, [](SlotId) { return SchedState::on_cpu; }),
              SpinEnd::acquired);
    EXPECT_EQ(attempts, 3);
}

TEST(SpinOnOwnerTest, EndsAtOnceWhenTheOwnerIsOffItsCpu) {
    for (const SchedState off : {SchedState::preempted, SchedState::blocked, SchedState::dead}) {
        int attempts = 0;
        const auto hundred_attempts = [&] { return ++attempts > 100; };
        EXPECT_EQ(spin(hundred_attempts, owner, [=](SlotId) { return off; }), SpinEnd::owner_off_cpu);
        EXPECT_LE(attempts, 2);
    }
}

TEST(SpinOnOwnerTest, EndsWhenTheOwnerLeavesItsCpu) {
    int looks = 0;
    const auto leaves = [&](SlotId s) {
        EXPECT_EQ(s, kOwner);
        return ++looks < 50 ? SchedState::on_cpu : SchedState::preempted;
    };
    EXPECT_EQ(spin(taken, owner, leaves), SpinEnd::owner_off_cpu);
    EXPECT_LT(looks, 60);
}

// One look may show who had the lock before: an acquirer stores its slot after it took the lock.
TEST(SpinOnOwnerTest, GoesOnAfterASingleLookAtATaskOffItsCpu) {
    constexpr SlotId kFormer = 3;
    int attempts = 0, reads = 0, looks = 0;
    const auto fifty_attempts = [&] { return ++attempts % 50 == 0; };
    const auto former_then_owner = [&] { return reads++ == 0 ? kFormer : kOwner; };
    const auto former_sleeps = [&](SlotId s) {
        return s == kFormer ? SchedState::blocked : SchedState::on_cpu;
    };
    EXPECT_EQ(spin(fifty_attempts, former_then_owner, former_sleeps), SpinEnd::acquired);

    const auto off_once = [&](SlotId) { return ++looks == 10 ? SchedState::blocked : SchedState::on_cpu; };
    EXPECT_EQ(spin(fifty_attempts, owner, off_once), SpinEnd::acquired);
}

TEST(SpinOnOwnerTest, EndsWithTheBudgetOfWhatIsKnown) {
    for (const auto& [state, budget] : {std::pair{SchedState::on_cpu, kBudget.watched},
                                        std::pair{SchedState::unknown, kBudget.unwatched}}) {
        const auto always = [state = state](SlotId) { return state; };
        const uint64_t start = CycleClock::now();
        EXPECT_EQ(spin(taken, owner, always, kBudget), SpinEnd::budget_spent);
        EXPECT_GE(CycleClock::now() - start, budget);
    }
}

// A mirror that calls everybody asleep, and owners of whom no look finds the one of the look before.
TEST(SpinOnOwnerTest, EndsWithTheBudgetWhileOwnersChange) {
    SlotId last = 0;
    uint64_t attempts = 0;
    const auto never = [&] { return ++attempts > 100'000'000; };
    const auto changes = [&] { return ++last; };
    const auto asleep = [](SlotId) { return SchedState::blocked; };
    EXPECT_EQ(spin(never, changes, asleep, kBudget), SpinEnd::budget_spent);
}

// A clock that a test moves. `step`: what a look takes.
struct TestClock {
    static inline uint64_t ticks, step, looks;
    static inline uint64_t jump_at_look, jump_back;
    static uint64_t now() {
        if (++looks == jump_at_look) ticks -= jump_back;
        return ticks += step;
    }
    static void pause() {}

    static void start(uint64_t a_step) {
        ticks = 1'000'000'000'000;
        step = a_step;
        looks = jump_at_look = 0;
    }
};

// What a test gives up at.
struct Endless {};

SpinEnd spin_by_test_clock(SpinPace pace) {
    uint64_t looks = 0;
    const auto runs = [&](SlotId) {
        if (++looks > 100'000'000) throw Endless();
        return SchedState::on_cpu;
    };
    return spin_on_owner<TestClock>(taken, owner, runs, kBudget, pace);
}

TEST(SpinOnOwnerTest, AClockThatJumpsBackProlongsNothing) {
    for (const SpinPace pace : {SpinPace::quick(), SpinPace{.ticks = 10'000}})
        for (const uint64_t jump_at : {2, 3, 50, 1000}) {
            TestClock::start(100);
            TestClock::jump_at_look = jump_at;
            TestClock::jump_back = 500'000'000'000;
            EXPECT_EQ(spin_by_test_clock(pace), SpinEnd::budget_spent)
                << pace.ticks << ", at look " << jump_at;
            EXPECT_LE(TestClock::looks, kBudget.watched / 100 + 10) << pace.ticks << ", at look " << jump_at;
        }
}

TEST(SpinOnOwnerTest, AClockThatStandsStillEndsASpinAsWell) {
    for (const SpinPace pace : {SpinPace::quick(), SpinPace{.ticks = 10'000}}) {
        TestClock::start(0);
        EXPECT_EQ(spin_by_test_clock(pace), SpinEnd::budget_spent);
        EXPECT_LE(TestClock::looks, kBudget.looks() + 1);
    }
    EXPECT_GE(kBudget.looks(), kBudget.watched / CycleClock::ticks_per_microsecond() * 100);
}

}  // namespace
}  // namespace adaptive
