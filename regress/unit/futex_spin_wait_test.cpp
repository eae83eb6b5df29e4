// futex_spin_wait: each outcome, with each source; no wake-up is lost between spinning and sleeping; owners that
// are gone, and ids that are used again.
#include "proposals/futex_spin_wait.h"

#include <sys/resource.h>

#include "lock_test.h"

namespace adaptive::test {
namespace {

constexpr Sharing kPrivate = Sharing::process_private;

class FutexSpinWaitTest : public WithSource {
    TimeLimit limit_{60};
};
INSTANTIATE_FOR_SOURCES(FutexSpinWaitTest);

uint32_t own_tid() {
    return this_task().tid();
}

/// A thread that owns a futex and does something.
struct Owner {
    FutexSpinWord futex;
    std::atomic<bool> begin{false};
    std::thread thread;

    template <class Body>
    explicit Owner(Body body) {
        thread = std::thread([this, body] {
            ::test::pin_to(0);
            std::atomic_ref<uint32_t>(futex.owner) = own_tid();
            while (!begin) CycleClock::pause();
            this_task().note_running();  // as whoever takes a lock
            body(futex);
        });
        while (tid() == 0) usleep(100);
    }
    ~Owner() { thread.join(); }
    uint32_t tid() { return std::atomic_ref<uint32_t>(futex.owner); }
};

TEST_P(FutexSpinWaitTest, TheValueDiffers) {
    FutexSpinWord futex = {.owner = own_tid()};
    EXPECT_EQ(futex_spin_wait(futex, own_tid() + 1, kPrivate), FutexSpinEnd::value_differs);
    futex.owner = 0;
    EXPECT_EQ(futex_spin_wait(futex, own_tid(), kPrivate), FutexSpinEnd::value_differs);
}

TEST_P(FutexSpinWaitTest, WaitersAndTheSpareBitAreMasked) {
    FutexSpinWord futex = {.owner = own_tid() | FUTEX_WAITERS};
    const Deadline soon = Deadline::in(1ms);
    EXPECT_EQ(futex_spin_wait(futex, own_tid() | FUTEX_OWNER_DIED, kPrivate, soon), FutexSpinEnd::timed_out);
}

TEST_P(FutexSpinWaitTest, ThereIsNoSuchTask) {
    FutexSpinWord futex;
    EXPECT_EQ(futex_spin_wait(futex, 0, kPrivate), FutexSpinEnd::no_such_task);
    uint32_t tid = 0;
    std::thread([&] { tid = own_tid(); }).join();
    futex.owner = tid;
    EXPECT_EQ(futex_spin_wait(futex, tid, kPrivate), FutexSpinEnd::no_such_task);
    futex.owner = FUTEX_TID_MASK;
    EXPECT_EQ(futex_spin_wait(futex, FUTEX_TID_MASK, kPrivate), FutexSpinEnd::no_such_task);
}

TEST_P(FutexSpinWaitTest, AnOwnerThatDiesWithoutWakingEndsTheWait) {
    FutexSpinWord futex;
    std::atomic_ref<uint32_t> owner(futex.owner);
    std::thread owning([&] {
        this_task().note_running();
        owner = this_task().tid();
        usleep(20'000);  // the waiter is asleep by now
    });
    uint32_t tid;
    while ((tid = owner) == 0) usleep(100);
    EXPECT_EQ(futex_spin_wait(futex, tid, Sharing::process_private, Deadline::in(5s)),
              FutexSpinEnd::no_such_task);
    owning.join();
}

TEST_P(FutexSpinWaitTest, WokenAsleepByAnOwnerThatSlept) {
    Owner owner([](FutexSpinWord& futex) {
        usleep(100'000);
        futex_spin_wake(futex, 1, kPrivate);
    });
    const double used_before = cpu_seconds_of_thread();
    owner.begin = true;
    EXPECT_EQ(futex_spin_wait(owner.futex, owner.tid(), kPrivate), FutexSpinEnd::woken_asleep);
    EXPECT_LT(cpu_seconds_of_thread() - used_before, 0.05) << "spun for a sleeping owner";
}

/// How often the calling thread lost its CPU to another task.
int64_t preemptions() {
    rusage usage;
    getrusage(RUSAGE_THREAD, &usage);
    return usage.ru_nivcsw;
}

// The owner is found by its id, and spun for as long as it runs. Turns count in which neither task lost its CPU, to
// another task or to another machine.
TEST_P(FutexSpinWaitTest, WokenSpinningByAnOwnerThatComputes) {
    if (GetParam() == Source::off) GTEST_SKIP() << "nothing is known of owners";
    const int cpus = static_cast<int>(std::thread::hardware_concurrency());
    if (cpus < 2) GTEST_SKIP() << "one CPU: the owner does not run while we look";
    const ::test::RestoreAffinity restore;
    ::test::pin_to(cpus - 1);
    constexpr int kTurns = 10;
    int undisturbed = 0, spinning = 0;
    for (const double start = seconds(); undisturbed < kTurns && seconds() - start < 25;) {
        double begun, sent;
        int64_t lost = -preemptions(), lost_by_owner;
        FutexSpinEnd end;
        {
            Owner owner([&](FutexSpinWord& futex) {
                lost_by_owner = -preemptions();
                compute(100us);
                sent = seconds();
                lost_by_owner += preemptions();
                futex_spin_wake(futex, 1, kPrivate);
            });
            begun = seconds();
            owner.begin = true;
            end = futex_spin_wait(owner.futex, owner.tid(), kPrivate);
            lost += preemptions();
        }
        if (lost != 0 || lost_by_owner != 0 || sent - begun > 130e-6) continue;
        undisturbed++;
        spinning += end == FutexSpinEnd::woken_spinning;
    }
    if (undisturbed < kTurns) GTEST_SKIP() << "the two hardly ever had a CPU each";
    EXPECT_GT(spinning, kTurns / 2);
}

TEST_P(FutexSpinWaitTest, TimesOutSpinningAndAsleep) {
    for (const bool computes : {false, true}) {
        Owner owner([=](FutexSpinWord&) {
            if (computes)
                compute(100ms);
            else
                usleep(100'000);
        });
        owner.begin = true;
        const double start = seconds();
        EXPECT_EQ(futex_spin_wait(owner.futex, owner.tid(), kPrivate, Deadline::in(30ms)),
                  FutexSpinEnd::timed_out);
        EXPECT_GE(seconds() - start, 0.03);
        EXPECT_EQ(futex_spin_wait(owner.futex, owner.tid(), kPrivate,
                                  Deadline::at(std::chrono::system_clock::now() - 1s)),
                  FutexSpinEnd::timed_out);
    }
}

TEST_P(FutexSpinWaitTest, ANewOwnerEndsTheWait) {
    FutexSpinWord futex = {.owner = own_tid()};
    const uint32_t tid = own_tid();
    std::thread other([&] {
        usleep(1000);
        std::atomic_ref<uint32_t>(futex.owner) = tid + 1;
        futex_spin_wake(futex, INT_MAX, kPrivate);
    });
    // The waiter has this very task for its owner, who never wakes it.
    const FutexSpinEnd end = futex_spin_wait(futex, tid, kPrivate, Deadline::in(30s));
    EXPECT_TRUE(end == FutexSpinEnd::woken_spinning || end == FutexSpinEnd::woken_asleep ||
                end == FutexSpinEnd::value_differs);
    other.join();
}

// A lock made of it, with wake-ups at every moment between spinning and sleeping: a lost one hangs.
TEST_P(FutexSpinWaitTest, NoWakeUpIsLost) {
    struct Lock {
        FutexSpinWord futex;
        void lock() {
            std::atomic_ref<uint32_t> owner(futex.owner);
            for (;;) {
                uint32_t seen = 0;
                if (owner.compare_exchange_strong(seen, own_tid(), std::memory_order_acquire)) return;
                futex_spin_wait(futex, seen, Sharing::process_shared);
            }
        }
        void unlock() {
            std::atomic_ref<uint32_t>(futex.owner).store(0, std::memory_order_release);
            futex_spin_wake(futex, 1, Sharing::process_shared);
        }
    };
    struct Area {
        Lock lock;
        long counter = 0;
    };
    Shared<Area> area;
    {
        std::vector<std::unique_ptr<Child>> children;
        for (int n = 0; n < 4; n++)
            children.push_back(std::make_unique<Child>([&] {
                for (int i = 0; i < 3'000; i++) {
                    area->lock.lock();
                    area->counter = area->counter + 1;
                    if (i % 64 == 0) usleep(50);
                    area->lock.unlock();
                }
            }));
        for (auto& child : children) EXPECT_EQ(child->wait(), 0);
    }
    EXPECT_EQ(area->counter, 12'000);
}

// Source rseq keeps the claims of the dead: their id may have come to somebody who runs and runs.
TEST_P(FutexSpinWaitTest, AnotherTaskWithTheIdIsWaitedForWithinTheTimeGiven) {
    Shared<FutexSpinWord> futex;
    Child dead([&] { futex->owner = own_tid(); });
    const pid_t id = dead.pid;
    ASSERT_EQ(dead.wait(), 0);
    EXPECT_EQ(futex_spin_wait(*futex, futex->owner, Sharing::process_shared), FutexSpinEnd::no_such_task);
    std::atomic<bool> stop{false};
    // Close enough to a recycled id: the claim of one that lives.
    std::thread other([&] {
        std::atomic_ref<uint32_t>(futex->owner) = own_tid();
        while (!stop) CycleClock::pause();
    });
    ASSERT_TRUE(
        eventually([&] { return std::atomic_ref<uint32_t>(futex->owner) != static_cast<uint32_t>(id); }));
    const double start = seconds();
    EXPECT_EQ(futex_spin_wait(*futex, futex->owner, Sharing::process_shared, Deadline::in(20ms)),
              FutexSpinEnd::timed_out);
    EXPECT_LT(seconds() - start, 1);
    stop = true;
    other.join();
}

}  // namespace
}  // namespace adaptive::test
