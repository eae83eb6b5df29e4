// The waiting algorithm, transition by transition, and under stress with a mirror that lies.

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <random>
#include <thread>

#include "process_lock.h"
#include "processes.h"

namespace adaptive::test {
namespace {

using namespace std::chrono_literals;

constexpr auto kBits = ProcessHost::kBits;
constexpr SlotId kOwnerSlot = 7, kSpinnerSlot = 8;

uint64_t counted(LockEvent e) {
    return ProcessHost::counts[static_cast<int>(e)];
}

SchedState always_on_cpu(SlotId) {
    return SchedState::on_cpu;
}
SchedState always_blocked(SlotId) {
    return SchedState::blocked;
}

/// Makes the calling thread a task: a seat, a policy, a mirror, counters at zero.
void sit_down(Seat& seat, WaitPolicy policy = WaitPolicy::park, SchedState (*hint)(SlotId) = always_on_cpu,
              SlotId slot = 1) {
    ProcessHost::seat = &seat;
    ProcessHost::wait_policy = policy;
    ProcessHost::hint = hint;
    ProcessHost::slot = slot;
    for (uint64_t& n : ProcessHost::counts) n = 0;
}

class QueueProtocolTest : public ::testing::Test {
  protected:
    void SetUp() override {
        CycleClock::calibrate();
        for (Seat& s : seats_) sem_init(&s.semaphore, 0, 0);
        ProcessHost::spin_microseconds = 100'000;
        sit_down(seats_[0]);
    }

    /// A second task that acquires the lock, releases it, and does `afterwards`.
    template <class Afterwards>
    std::thread acquirer(LockMode mode, WaitPolicy policy, SchedState (*hint)(SlotId),
                         Afterwards afterwards) {
        return std::thread([=, this] {
            sit_down(seats_[1], policy, hint, 2);
            ProcessLock::acquire(lock_, mode);
            ProcessLock::release(lock_, mode);
            afterwards();
        });
    }
    std::thread sleeper(LockMode mode = LockMode::exclusive) {
        return acquirer(mode, WaitPolicy::park, always_on_cpu, [this] { passed_++; });
    }

    void await_bits(uint32_t bits) {
        while ((ProcessHost::state(lock_).load() & bits) != bits) std::this_thread::yield();
    }
    /// Queued, and past its last attempt for all a scheduler can do: the wait for the semaphore follows at
    /// once.
    void await_sleeper() {
        await_bits(kBits.has_waiters);
        std::this_thread::sleep_for(20ms);
    }
    /// As a spinner would, without one that could interfere.
    void pretend_spinner() {
        ProcessHost::state(lock_).fetch_or(kBits.spinner);
        lock_.spinner = kSpinnerSlot;
    }
    void withdraw_spinner() { ProcessHost::state(lock_).fetch_and(~kBits.spinner); }

    Seat seats_[2];
    SharedLock lock_;
    std::atomic<int> passed_{0};
};

TEST_F(QueueProtocolTest, TakesAFreeLockAtOnceAndNamesItsOwner) {
    ProcessHost::slot = kOwnerSlot;
    EXPECT_TRUE(ProcessLock::acquire(lock_, LockMode::exclusive));
    EXPECT_EQ(lock_.state, kBits.exclusive | kBits.release_ok);
    EXPECT_EQ(lock_.owner, kOwnerSlot);
    ProcessLock::release(lock_, LockMode::exclusive);
    EXPECT_EQ(lock_.state, kBits.release_ok);
    EXPECT_EQ(counted(LockEvent::contended), 0u);
}

TEST_F(QueueProtocolTest, SharedHoldsAddUpAndExcludeWriters) {
    EXPECT_TRUE(ProcessLock::acquire_conditionally(lock_, LockMode::shared));
    EXPECT_TRUE(ProcessLock::acquire_conditionally(lock_, LockMode::shared));
    EXPECT_FALSE(ProcessLock::acquire_conditionally(lock_, LockMode::exclusive));
    ProcessLock::release(lock_, LockMode::shared);
    EXPECT_FALSE(ProcessLock::acquire_conditionally(lock_, LockMode::exclusive));
    ProcessLock::release(lock_, LockMode::shared);
    EXPECT_TRUE(ProcessLock::acquire_conditionally(lock_, LockMode::exclusive));
    EXPECT_FALSE(ProcessLock::acquire_conditionally(lock_, LockMode::shared));
}

TEST_F(QueueProtocolTest, SpinsWhileTheOwnerRunsAndTakesTheLockWithoutSleeping) {
    ProcessLock::acquire(lock_, LockMode::exclusive);
    uint64_t slept = 99, got = 0;
    auto other = acquirer(LockMode::exclusive, WaitPolicy::owner, always_on_cpu, [&] {
        slept = counted(LockEvent::slept);
        got = counted(LockEvent::spin_acquired);
    });
    await_bits(kBits.spinner);
    ProcessLock::release(lock_, LockMode::exclusive);
    other.join();
    EXPECT_EQ(slept, 0u);
    EXPECT_EQ(got, 1u);
    EXPECT_EQ(lock_.state, kBits.release_ok) << "the spinner bit is given back";
}

TEST_F(QueueProtocolTest, CountsEverySpinOnceWhenLocksAreHeldWithinEachOther) {
    SharedLock inner;
    ProcessLock::acquire(lock_, LockMode::exclusive);
    ProcessLock::acquire(inner, LockMode::exclusive);
    uint64_t while_held = 99, in_the_end = 99;
    std::thread other([&] {
        sit_down(seats_[1], WaitPolicy::owner, always_on_cpu, 2);
        ProcessLock::acquire(lock_, LockMode::exclusive);
        ProcessLock::acquire(inner, LockMode::exclusive);
        while_held = counted(LockEvent::spin_acquired);
        ProcessLock::release(inner, LockMode::exclusive);
        ProcessLock::release(lock_, LockMode::exclusive);

        ProcessLock::acquire(lock_, LockMode::exclusive);
        ProcessLock::release(lock_, LockMode::exclusive);
        in_the_end = counted(LockEvent::spin_acquired);
    });
    await_bits(kBits.spinner);
    ProcessLock::release(lock_, LockMode::exclusive);
    while (!(ProcessHost::state(inner).load() & kBits.spinner)) std::this_thread::yield();
    ProcessLock::release(inner, LockMode::exclusive);
    other.join();
    EXPECT_EQ(while_held, 1u) << "the outer lock's spin is counted when that is released";
    EXPECT_EQ(in_the_end, 2u) << "the second turn waits for nobody";
}

TEST_F(QueueProtocolTest, SleepsWhenTheOwnerIsOffItsCpu) {
    ProcessLock::acquire(lock_, LockMode::exclusive);
    uint64_t left = 0, slept = 0;
    auto other = acquirer(LockMode::exclusive, WaitPolicy::owner, always_blocked, [&] {
        left = counted(LockEvent::owner_off_cpu);
        slept = counted(LockEvent::slept);
    });
    await_sleeper();
    EXPECT_FALSE(ProcessHost::state(lock_).load() & kBits.spinner);
    ProcessLock::release(lock_, LockMode::exclusive);
    other.join();
    EXPECT_EQ(left, 1u);
    EXPECT_EQ(slept, 1u);
}

TEST_F(QueueProtocolTest, SleepsWhenTheBudgetIsSpentAndBlindNeverLooks) {
    ProcessHost::spin_microseconds = 50;
    ProcessLock::acquire(lock_, LockMode::exclusive);
    static std::atomic<int> looks;
    looks = 0;
    uint64_t spent = 0;
    auto other = acquirer(
        LockMode::exclusive, WaitPolicy::blind,
        [](SlotId) {
            looks++;
            return SchedState::blocked;
        },
        [&] { spent = counted(LockEvent::budget_spent); });
    await_sleeper();
    ProcessLock::release(lock_, LockMode::exclusive);
    other.join();
    EXPECT_EQ(spent, 1u);
    EXPECT_EQ(looks, 0);
}

TEST_F(QueueProtocolTest, AnUnknownOwnerIsSpunForBriefly) {
    ProcessHost::spin_microseconds = 1'000'000;  // a fifth of it while nothing is known
    ProcessLock::acquire(lock_, LockMode::exclusive);
    uint64_t ticks = 0;
    auto other = acquirer(
        LockMode::exclusive, WaitPolicy::owner, [](SlotId) { return SchedState::unknown; },
        [&] { ticks = counted(LockEvent::spin_ticks); });
    await_sleeper();
    ProcessLock::release(lock_, LockMode::exclusive);
    other.join();
    EXPECT_LT(ticks, 600'000 * CycleClock::ticks_per_microsecond());
}

TEST_F(QueueProtocolTest, ALockFreedJustBeforeQueueingIsNotSleptFor) {
    ProcessLock::acquire(lock_, LockMode::exclusive);
    static SharedLock* lock;
    lock = &lock_;
    alarm(30);  // the wake-up that is lost without the last attempt never comes
    std::thread other([&] {
        sit_down(seats_[1]);
        ProcessHost::before_queueing = [] { ProcessLock::release(*lock, LockMode::exclusive); };
        ProcessLock::acquire(lock_, LockMode::exclusive);
        EXPECT_EQ(counted(LockEvent::slept), 0u);
    });
    other.join();
    alarm(0);
    EXPECT_EQ(lock_.state, kBits.exclusive | kBits.release_ok) << "still queued";
}

TEST_F(QueueProtocolTest, SparesTheWakeUpForASpinnerAndOwesItAfterwards) {
    ProcessLock::acquire(lock_, LockMode::exclusive);
    auto other = sleeper();
    await_sleeper();
    pretend_spinner();
    ProcessLock::release(lock_, LockMode::exclusive);
    std::this_thread::sleep_for(20ms);
    EXPECT_EQ(passed_, 0) << "woken although a spinner was there";
    EXPECT_EQ(counted(LockEvent::wakeup_spared), 1u);

    // What a spinner does that leaves: clears the bit, and its last attempt makes it a holder whose release
    // wakes.
    withdraw_spinner();
    EXPECT_TRUE(ProcessLock::acquire(lock_, LockMode::exclusive));
    ProcessLock::release(lock_, LockMode::exclusive);
    other.join();
    EXPECT_EQ(counted(LockEvent::wakeup_sent), 1u);
}

TEST_F(QueueProtocolTest, WakesWhenTheSpinnerIsOffItsCpu) {
    ProcessHost::hint = [](SlotId slot) {
        return slot == kSpinnerSlot ? SchedState::preempted : SchedState::on_cpu;
    };
    ProcessLock::acquire(lock_, LockMode::exclusive);
    auto other = sleeper();
    await_sleeper();
    pretend_spinner();
    ProcessLock::release(lock_, LockMode::exclusive);
    other.join();
    EXPECT_EQ(passed_, 1);
}

TEST_F(QueueProtocolTest, ASpinnerOffItsCpuIsReplacedAndOneOnItIsNot) {
    for (const bool replaced : {true, false}) {
        ProcessLock::acquire(lock_, LockMode::exclusive);
        pretend_spinner();
        uint64_t spun = 99;
        static std::atomic<SchedState> spinner_state;
        spinner_state = replaced ? SchedState::preempted : SchedState::on_cpu;
        auto other = acquirer(
            LockMode::exclusive, WaitPolicy::owner,
            [](SlotId slot) { return slot == kSpinnerSlot ? spinner_state.load() : SchedState::on_cpu; },
            [&] { spun = counted(LockEvent::spin_acquired); });
        std::this_thread::sleep_for(20ms);
        ProcessHost::hint = always_blocked;  // so that this release wakes, if anybody sleeps
        ProcessLock::release(lock_, LockMode::exclusive);
        other.join();
        EXPECT_EQ(spun, replaced ? 1u : 0u);
        withdraw_spinner();
        ProcessHost::hint = always_on_cpu;
    }
}

TEST_F(QueueProtocolTest, SpinnersCannotKeepASleeperAsleepForLong) {
    ProcessLock::acquire(lock_, LockMode::exclusive);
    auto other = sleeper();
    await_sleeper();
    pretend_spinner();  // and it stays: as a stream of spinners would look
    const auto start = std::chrono::steady_clock::now();
    ProcessLock::release(lock_, LockMode::exclusive);
    while (passed_ == 0 && std::chrono::steady_clock::now() - start < 5s) {
        // Not acquire(): nobody would wake us, as the spinner that the other spares is none.
        if (ProcessLock::acquire_conditionally(lock_, LockMode::exclusive))
            ProcessLock::release(lock_, LockMode::exclusive);
    }
    EXPECT_EQ(passed_, 1) << "starved";
    withdraw_spinner();
    ProcessLock::acquire(lock_, LockMode::exclusive);
    ProcessLock::release(lock_, LockMode::exclusive);
    other.join();
}

TEST_F(QueueProtocolTest, AWokenTaskThatDoesNotRunKeepsNobodyAsleepForLong) {
    ProcessLock::acquire(lock_, LockMode::exclusive);
    auto other = sleeper();
    await_sleeper();
    // As if somebody else had been woken, who has not come to run yet.
    ProcessHost::state(lock_).fetch_and(~kBits.release_ok);
    const uint64_t second = 1'000'000 * CycleClock::ticks_per_microsecond();
    ProcessHost::wait_policy = WaitPolicy::owner;
    lock_.woken_at = CycleClock::now() + second;  // not late, however long this test is kept from running
    ProcessLock::release(lock_, LockMode::exclusive);
    EXPECT_EQ(counted(LockEvent::wakeup_sent), 0u);
    lock_.woken_at = CycleClock::now() - second;
    ProcessHost::wait_policy = WaitPolicy::park;  // as stock
    ProcessLock::acquire(lock_, LockMode::exclusive);
    ProcessLock::release(lock_, LockMode::exclusive);
    EXPECT_EQ(counted(LockEvent::wakeup_sent), 0u);
    ProcessHost::wait_policy = WaitPolicy::owner;
    ProcessLock::acquire(lock_, LockMode::exclusive);
    ProcessLock::release(lock_, LockMode::exclusive);
    EXPECT_EQ(counted(LockEvent::wakeup_sent), 1u);
    ProcessHost::state(lock_).fetch_or(kBits.release_ok);
    ProcessLock::acquire(lock_, LockMode::exclusive);
    ProcessLock::release(lock_, LockMode::exclusive);
    other.join();
}

TEST_F(QueueProtocolTest, WhoWaitsForFreedomIsWokenAtEveryRelease) {
    ProcessLock::acquire(lock_, LockMode::exclusive);
    std::atomic<int> result{-1};
    std::thread other([&] {
        sit_down(seats_[1]);
        result = ProcessLock::acquire_or_wait(lock_, LockMode::exclusive);
    });
    await_sleeper();
    EXPECT_TRUE(ProcessHost::state(lock_).load() & kBits.until_free);
    pretend_spinner();
    ProcessHost::state(lock_).fetch_and(~kBits.release_ok);  // and a woken locker is on its way
    ProcessLock::release(lock_, LockMode::exclusive);
    other.join();
    EXPECT_EQ(result, 0);
    EXPECT_FALSE(lock_.state & (kBits.has_waiters | kBits.until_free | kBits.held_mask));
}

TEST_F(QueueProtocolTest, WaitUntilSeesTheReleaseAndTheUpdate) {
    std::atomic<uint64_t> value{1};
    for (const bool by_release : {true, false}) {
        value = 1;
        ProcessLock::acquire(lock_, LockMode::exclusive);
        std::atomic<int> freed{-1};
        std::thread other([&] {
            sit_down(seats_[1]);
            freed = ProcessLock::wait_until(lock_, [&] { return value.load() != 1; });
        });
        await_sleeper();
        if (!by_release) ProcessLock::update(lock_, [&] { value = 2; });
        if (by_release) ProcessLock::release(lock_, LockMode::exclusive);
        other.join();
        EXPECT_EQ(freed, by_release);
        if (!by_release) ProcessLock::release(lock_, LockMode::exclusive);
    }
}

// A spinner takes a lock within 100 ns of its release, long before a sleeper comes to look.
TEST_F(QueueProtocolTest, WhoWaitsForFreedomNeedNotSeeIt) {
    ProcessLock::acquire(lock_, LockMode::exclusive);
    bool freed = false;
    std::thread waiter([&] {
        sit_down(seats_[1], WaitPolicy::park, always_on_cpu, 2);
        freed = ProcessLock::wait_until(lock_, [] { return false; });
        passed_++;
    });
    await_sleeper();
    ProcessLock::release(lock_, LockMode::exclusive);
    ProcessLock::acquire(lock_, LockMode::exclusive);
    EXPECT_TRUE(::test::eventually([&] { return passed_ == 1; })) << "it sleeps through the next hold";
    ProcessLock::release(lock_, LockMode::exclusive);
    waiter.join();
    EXPECT_TRUE(freed);
    EXPECT_EQ(lock_.state, kBits.release_ok);
}

TEST_F(QueueProtocolTest, ARunOfReadersIsWokenTogether) {
    Seat third;
    sem_init(&third.semaphore, 0, 0);
    ProcessLock::acquire(lock_, LockMode::exclusive);
    std::atomic<int> inside{0};
    auto reader = [&](Seat& seat) {
        sit_down(seat);
        ProcessLock::acquire(lock_, LockMode::shared);
        inside++;
        while (inside < 2) std::this_thread::yield();  // hangs if only one was let in
        ProcessLock::release(lock_, LockMode::shared);
    };
    std::thread a(reader, std::ref(seats_[1])), b(reader, std::ref(third));
    await_sleeper();
    ProcessLock::release(lock_, LockMode::exclusive);
    a.join();
    b.join();
    EXPECT_EQ(lock_.state & kBits.held_mask, 0u);
}

TEST_F(QueueProtocolTest, ASpinningReaderDoesNotKeepSleepingReadersOut) {
    ProcessLock::acquire(lock_, LockMode::exclusive);
    auto sleeping = sleeper(LockMode::shared);
    await_sleeper();
    Seat third;
    sem_init(&third.semaphore, 0, 0);
    std::atomic<int> spinning_got_in{0};
    std::thread spinning([&] {
        sit_down(third, WaitPolicy::owner);
        ProcessLock::acquire(lock_, LockMode::shared);
        spinning_got_in = 1;
        while (passed_ == 0) std::this_thread::yield();  // hangs if the sleeper has to wait for this release
        ProcessLock::release(lock_, LockMode::shared);
    });
    std::this_thread::sleep_for(20ms);
    alarm(30);
    ProcessLock::release(lock_, LockMode::exclusive);
    sleeping.join();
    spinning.join();
    alarm(0);
    EXPECT_EQ(spinning_got_in, 1);
}

TEST_F(QueueProtocolTest, ASpinnerThrownOutOfItsAcquireLeavesNobodyAsleep) {
    struct ThrownOut {};
    static thread_local int looks;
    ProcessLock::acquire(lock_, LockMode::exclusive);
    auto other = sleeper();
    await_sleeper();
    std::thread spinner([&] {
        Seat seat;
        sit_down(
            seat, WaitPolicy::owner,
            [](SlotId) {
                if (++looks > 100) throw ThrownOut();
                return SchedState::on_cpu;
            },
            kSpinnerSlot);
        EXPECT_THROW(ProcessLock::acquire(lock_, LockMode::exclusive), ThrownOut);
        EXPECT_TRUE(ProcessHost::state(lock_).load() & kBits.spinner);
        ProcessHost::hint = always_on_cpu;
        ProcessLock::release(lock_, LockMode::exclusive);  // of the other thread's hold: spared
        std::this_thread::sleep_for(20ms);
        EXPECT_EQ(passed_, 0);
        ProcessLock::abandon();
    });
    spinner.join();
    other.join();
    EXPECT_EQ(lock_.state, kBits.release_ok);
}

TEST_F(QueueProtocolTest, ASpinnerOfWhomNothingIsKnownIsSparedForATimeOnly) {
    ProcessHost::hint = [](SlotId) { return SchedState::unknown; };
    ProcessLock::acquire(lock_, LockMode::exclusive);
    auto other = sleeper();
    await_sleeper();
    pretend_spinner();
    const uint64_t second = 1'000'000 * CycleClock::ticks_per_microsecond();
    // Not overdue, however long this test is kept from running.
    lock_.spinning_since = CycleClock::now() + second;
    ProcessLock::release(lock_, LockMode::exclusive);
    EXPECT_EQ(counted(LockEvent::wakeup_spared), 1u);
    ProcessLock::acquire(lock_, LockMode::exclusive);
    ProcessHost::lock_task.sparing_since = 0;  // as another releaser, who has not spared yet
    lock_.spinning_since = CycleClock::now() - second;
    ProcessLock::release(lock_, LockMode::exclusive);
    EXPECT_EQ(counted(LockEvent::wakeup_sent), 1u) << "nobody would wake the sleeper";
    other.join();
    EXPECT_EQ(passed_, 1);
}

TEST_F(QueueProtocolTest, AWriterThatFindsReadersDoesNotKeepSleepingReadersOut) {
    for (const WaitPolicy policy : {WaitPolicy::park, WaitPolicy::owner}) {
        ProcessLock::acquire(lock_, LockMode::exclusive);
        static SharedLock* lock;
        lock = &lock_;
        std::atomic<int> passed{0}, reader_turn{0};
        std::thread writer([&] {
            sit_down(seats_[1], policy, always_blocked, 2);
            // Woken, it finds that a reader has come first.
            ProcessHost::after_sleep = [] { ProcessLock::acquire_conditionally(*lock, LockMode::shared); };
            ProcessLock::acquire(lock_, LockMode::exclusive);
            passed++;
            ProcessLock::release(lock_, LockMode::exclusive);
        });
        while (!seats_[1].asleep) std::this_thread::yield();
        Seat third;
        sem_init(&third.semaphore, 0, 0);
        std::thread reader([&] {
            sit_down(third, policy, always_blocked, 3);
            ProcessLock::acquire(lock_, LockMode::shared);
            reader_turn = ++passed;
            ProcessLock::release(lock_, LockMode::shared);
        });
        while (!third.asleep) std::this_thread::yield();

        ProcessLock::release(lock_, LockMode::exclusive);
        while (!(ProcessHost::state(lock_).load() & kBits.held_mask)) std::this_thread::yield();
        while (!seats_[1].asleep) std::this_thread::yield();
        await_sleeper();
        ProcessLock::release(lock_, LockMode::shared);  // a free moment, the reader's
        reader.join();
        writer.join();
        EXPECT_EQ(reader_turn, 1) << "the writer was woken once more, in policy " << static_cast<int>(policy);
    }
}

TEST_F(QueueProtocolTest, QueueingTwiceIsNotSurvived) {
    ProcessLock::acquire(lock_, LockMode::exclusive);
    seats_[0].wait_state = static_cast<uint8_t>(WaitState::waiting);
    EXPECT_DEATH(ProcessLock::acquire(lock_, LockMode::exclusive), "");
}

TEST_F(QueueProtocolTest, ForeignSemaphorePostsAreGivenBack) {
    ProcessLock::acquire(lock_, LockMode::exclusive);
    for (int i = 0; i < 3; i++) sem_post(&seats_[1].semaphore);
    auto other = sleeper();
    await_sleeper();
    EXPECT_EQ(passed_, 0) << "a spurious wake-up let it in";
    ProcessLock::release(lock_, LockMode::exclusive);
    other.join();
    int value = 0;
    sem_getvalue(&seats_[1].semaphore, &value);
    EXPECT_EQ(value, 3);
}

class PaceTest : public ::testing::Test {
  protected:
    static void SetUpTestSuite() { CycleClock::calibrate(); }

    /// Two turns at a lock, the second of them alone, of which `hold_us` and `outside_us` is spent in each part. The
    /// first hold takes `more_us` more: what it protects comes from another's cache.
    void two_turns(int lock, uint64_t hold_us, uint64_t outside_us, bool spun = true, uint64_t more_us = 10) {
        const auto pass = [](uint64_t us) {
            const uint64_t from = CycleClock::now();
            while (CycleClock::now() - from < us * CycleClock::ticks_per_microsecond()) CycleClock::pause();
        };
        learner_.waited(&locks_[lock], spun);
        for (int turn = 0; turn < 2; turn++) {
            pass(turn == 0 ? hold_us + more_us : hold_us);
            learner_.released(&locks_[lock]);
            pass(outside_us);
            learner_.acquiring(&locks_[lock]);
        }
    }
    bool is_patient(int lock) const {
        return learner_.pace(&locks_[lock]).ticks == SpinPace::patient().ticks;
    }

  private:
    PaceLearner learner_;
    int locks_[2];  // neighbours never share an entry
};

TEST_F(PaceTest, IsPatientOnlyWithLocksWhoseHoldersComeStraightBack) {
    EXPECT_FALSE(is_patient(0)) << "the default must be the safe one";
    for (int i = 0; i < 400; i++) two_turns(0, 20, 0);
    for (int i = 0; i < 400; i++) two_turns(1, 20, 50);
    EXPECT_TRUE(is_patient(0));
    EXPECT_FALSE(is_patient(1));
    for (int i = 0; i < 400; i++) two_turns(0, 20, 50);
    EXPECT_FALSE(is_patient(0)) << "and unlearns";
}

TEST_F(PaceTest, LearnsOfLocksThatAreTakenInTurn) {
    for (int i = 0; i < 400; i++)
        for (int lock : {0, 1}) two_turns(lock, 20, 0);
    ASSERT_TRUE(is_patient(0) && is_patient(1));
    for (int i = 0; i < 400; i++)
        for (int lock : {0, 1}) two_turns(lock, 20, 50);
    EXPECT_FALSE(is_patient(0) || is_patient(1));
}

TEST_F(PaceTest, IsNotMisledByColdCaches) {
    two_turns(0, 20, 50, true, 1000);  // a task's first hold
    for (int i = 0; i < 50; i++) {
        EXPECT_FALSE(is_patient(0)) << "after " << i << " hand-overs";
        two_turns(0, 20, 50);
    }
}

TEST_F(PaceTest, LearnsNothingFromHoldsAfterASleep) {
    for (int i = 0; i < 400; i++) two_turns(0, 20, 0, false);
    EXPECT_FALSE(is_patient(0));
}

// ---- stress
// -------------------------------------------------------------------------------------------------

struct Arena {
    SharedLock lock;
    Seat seats[8];
    volatile uint64_t first = 0, second = 0;  // equal whenever nobody writes
    std::atomic<uint64_t> written{0};
    std::atomic<int> violations{0};
};

SchedState lying_mirror(SlotId) {
    static thread_local std::minstd_rand random(static_cast<unsigned>(getpid()));
    return static_cast<SchedState>(random() % 5);
}

/// Many processes with changing modes on one lock, against a deadline: a lost wake-up is a process that never
/// ends.
void stress(SchedState (*hint)(SlotId), int processes, int turns) {
    Arena* arena = make_shared_memory<Arena>();
    ASSERT_NE(arena, nullptr);
    for (Seat& s : arena->seats) sem_init(&s.semaphore, 1, 0);
    ProcessHost::spin_microseconds = 20;
    CycleClock::calibrate();

    pid_t pids[8];
    const pid_t parent = getpid();
    for (int p = 0; p < processes; p++) {
        pids[p] = fork();
        if (pids[p] != 0) continue;
        ::test::die_with(parent);
        alarm(60);  // ends this process by SIGALRM, which the parent sees
        std::minstd_rand random(static_cast<unsigned>(p + 1));
        sit_down(arena->seats[p], WaitPolicy::owner, hint, static_cast<SlotId>(p + 1));
        for (int i = 0; i < turns; i++) {
            ProcessHost::wait_policy = static_cast<WaitPolicy>(random() % 3);
            const unsigned what = random() % 16;
            if (what == 0) {
                if (!ProcessLock::acquire_or_wait(arena->lock, LockMode::exclusive)) continue;
            } else if (what == 1) {
                ProcessLock::wait_until(arena->lock, [&] { return true; });
                continue;
            }
            const LockMode mode = what < 8 ? LockMode::exclusive : LockMode::shared;
            if (what != 0) ProcessLock::acquire(arena->lock, mode);
            if (arena->first != arena->second) arena->violations++;
            if (mode == LockMode::exclusive) {
                arena->first = arena->first + 1;
                for (unsigned n = random() % 64; n > 0; n--) CycleClock::pause();
                arena->second = arena->second + 1;
                arena->written++;
            }
            ProcessLock::release(arena->lock, mode);
            if (what == 15) sched_yield();
        }
        _exit(0);
    }
    for (int p = 0; p < processes; p++) {
        int status = 0;
        waitpid(pids[p], &status, 0);
        EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0)
            << "process " << p << " status " << status << ", state " << std::hex << arena->lock.state;
    }
    EXPECT_EQ(arena->violations, 0);
    EXPECT_EQ(arena->first, arena->written);
    EXPECT_EQ(arena->lock.state, kBits.release_ok) << "held, queued or spinner bits left behind";
    for (int p = 0; p < processes; p++) {
        int value = -1;
        sem_getvalue(&arena->seats[p].semaphore, &value);
        EXPECT_EQ(value, 0) << "semaphore of process " << p << " out of balance";
    }
    munmap(arena, sizeof(Arena));
}

TEST(QueueProtocolStress, EveryOwnerSeemsToRun) {
    stress(always_on_cpu, 6, 200'000);
}
TEST(QueueProtocolStress, EveryOwnerSeemsAsleep) {
    stress(always_blocked, 6, 100'000);
}
TEST(QueueProtocolStress, TheMirrorLies) {
    stress(lying_mirror, 8, 200'000);
}

}  // namespace
}  // namespace adaptive::test
