// ConditionVariable: no notification lost, between threads and processes, with every lock, and with waiters that
// give up.
#include "lock/condition_variable.h"

#include <deque>
#include <mutex>
#include <random>

#include "lock/mutex.h"
#include "lock/robust_mutex.h"
#include "lock_test.h"

namespace adaptive::test {
namespace {

class ConditionVariableTest : public WithSource {
    TimeLimit limit_{60};
};
INSTANTIATE_FOR_SOURCES(ConditionVariableTest);

uint32_t waiters_of(ConditionVariable& cv) {
    return static_cast<uint32_t>(
        std::atomic_ref<uint64_t>(*static_cast<uint64_t*>(static_cast<void*>(&cv))) >> 32);
}

TEST_P(ConditionVariableTest, PingPong) {
    Mutex mutex;
    ConditionVariable changed;
    int turn = 0;
    run_threads(2, [&](int me) {
        for (int i = 0; i < 1'000; i++) {
            std::unique_lock lock(mutex);
            changed.wait(lock, [&] { return turn % 2 == me; });
            turn++;
            changed.notify_one();
        }
    });
    EXPECT_EQ(turn, 2'000);
    EXPECT_EQ(waiters_of(changed), 0u);
}

// As many tokens as there are notifications, for more threads than CPUs, half of whom give up now and then: a
// notification that went to nobody would leave a token, and its thread waiting.
TEST_P(ConditionVariableTest, EveryNotificationFindsAWaiter) {
    Mutex mutex;
    ConditionVariable more;
    int tokens = 0, taken = 0;
    constexpr int kAll = 4'000;
    run_threads(8, [&](int n) {
        std::minstd_rand random(static_cast<unsigned>(n) + 1);
        if (n < 2) {
            for (int i = 0; i < kAll / 2; i++) {
                std::unique_lock lock(mutex);
                tokens++;
                if (i % 2) lock.unlock();
                more.notify_one();
            }
            return;
        }
        for (;;) {
            std::unique_lock lock(mutex);
            while (tokens == 0 && taken < kAll)
                if (n % 2)
                    more.wait(lock);
                else
                    more.wait_for(lock, std::chrono::microseconds(random() % 200));
            if (taken == kAll) return;
            tokens--;
            if (++taken == kAll) more.notify_all();
        }
    });
    EXPECT_EQ(taken, kAll);
}

TEST_P(ConditionVariableTest, OneIsNotifiedOrAll) {
    Mutex mutex;
    ConditionVariable go;
    int permits = 0;
    std::atomic<int> through{0};
    std::vector<std::thread> threads;
    for (int i = 0; i < 6; i++)
        threads.emplace_back([&] {
            std::unique_lock lock(mutex);
            while (permits == 0) go.wait(lock);
            permits--;
            through++;
        });
    ASSERT_TRUE(eventually([&] { return waiters_of(go) == 6; }));
    mutex.lock();
    permits = 1;
    mutex.unlock();
    go.notify_one();
    EXPECT_TRUE(eventually([&] { return through == 1; }));
    usleep(20'000);
    EXPECT_EQ(through, 1);
    mutex.lock();
    permits = 5;
    go.notify_all();
    mutex.unlock();
    for (auto& t : threads) t.join();
    EXPECT_EQ(through, 6);
}

TEST_P(ConditionVariableTest, GivesUpInTimeWithTheLock) {
    Mutex mutex;
    ConditionVariable never;
    std::unique_lock lock(mutex);
    const double start = seconds();
    EXPECT_EQ(never.wait_for(lock, 20ms), std::cv_status::timeout);
    EXPECT_EQ(never.wait_until(lock, std::chrono::system_clock::now() + 20ms), std::cv_status::timeout);
    EXPECT_FALSE(never.wait_until(lock, std::chrono::steady_clock::now() + 20ms, [] { return false; }));
    EXPECT_TRUE(never.wait_for(lock, 20s, [] { return true; }));
    EXPECT_GE(seconds() - start, 0.06);
    EXPECT_LT(seconds() - start, 2);
    EXPECT_TRUE(lock.owns_lock());
    std::thread([&] { EXPECT_FALSE(mutex.try_lock()); }).join();
    EXPECT_EQ(waiters_of(never), 0u) << "who gave up is not counted";
    never.notify_one();
    never.notify_all();
}

TEST_P(ConditionVariableTest, WorksWithOtherLocks) {
    std::mutex mutex;
    ConditionVariable changed;
    bool ready = false;
    std::thread other([&] {
        std::scoped_lock lock(mutex);
        ready = true;
        changed.notify_one();
    });
    std::unique_lock lock(mutex);
    changed.wait(lock, [&] { return ready; });
    lock.unlock();
    other.join();
}

TEST_P(ConditionVariableTest, BetweenProcesses) {
    struct Area {
        InterprocessMutex mutex;
        InterprocessConditionVariable changed;
        int turn = 0;
    };
    Shared<Area> area;
    constexpr int kProcesses = 4, kRounds = 200;
    {
        std::vector<std::unique_ptr<Child>> children;
        for (int me = 0; me < kProcesses; me++)
            children.push_back(std::make_unique<Child>([&, me] {
                for (int i = 0; i < kRounds; i++) {
                    std::unique_lock lock(area->mutex);
                    area->changed.wait(lock, [&] { return area->turn % kProcesses == me; });
                    area->turn++;
                    area->changed.notify_all();
                }
            }));
        for (auto& child : children) EXPECT_EQ(child->wait(), 0);
    }
    EXPECT_EQ(area->turn, kProcesses * kRounds);
}

// A waiter hears of the death of whoever should have notified it, when it takes the lock again.
TEST_P(ConditionVariableTest, ARobustMutexTellsOfADeathAfterTheWait) {
    struct Area {
        RobustMutex mutex;
        InterprocessConditionVariable changed;
        std::atomic<bool> waits{false};
    };
    Shared<Area> area;
    Child waiter([&] {
        if (area->mutex.lock() != LockResult::acquired) _exit(1);
        area->waits = true;
        const LockResult result = area->changed.wait(area->mutex);
        area->mutex.consistent();
        area->mutex.unlock();
        _exit(result == LockResult::owner_died ? 0 : 2);
    });
    ASSERT_TRUE(eventually([&] { return area->waits.load(); }));
    Child notifier([&] {
        if (area->mutex.lock() != LockResult::acquired) _exit(1);
        area->changed.notify_one();
        raise(SIGKILL);
    });
    notifier.wait();
    EXPECT_EQ(waiter.wait(), 0);
    EXPECT_EQ(area->mutex.lock(), LockResult::acquired);
    area->mutex.unlock();
}

}  // namespace
}  // namespace adaptive::test
