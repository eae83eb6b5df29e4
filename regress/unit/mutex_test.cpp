// Mutex and InterprocessMutex: exclusion under preemption, every way to wait and to give up, processes that are
// killed, mirrors that lie.
#include "lock/mutex.h"

#include <boost/interprocess/managed_shared_memory.hpp>
#include <condition_variable>
#include <mutex>
#include <random>

#include "lock_test.h"

namespace adaptive::test {
namespace {

template <class M>
std::atomic_ref<uint64_t> raw(M& mutex) {
    return std::atomic_ref<uint64_t>(*static_cast<uint64_t*>(static_cast<void*>(&mutex)));
}

template <class M>
bool somebody_sleeps(M& mutex) {
    return eventually([&] { return (raw(mutex) & mutex_word::kWaiters) != 0; });
}

class MutexTest : public WithSource {
    TimeLimit limit_{60};
};
INSTANTIATE_FOR_SOURCES(MutexTest);

TEST_P(MutexTest, ZeroedMemoryIsAnUnlockedMutex) {
    alignas(8) char memory[8] = {};
    auto& mutex = *reinterpret_cast<Mutex*>(memory);
    ASSERT_TRUE(mutex.try_lock());
    EXPECT_EQ(mutex_word::futex_half(raw(mutex)), static_cast<uint32_t>(gettid()));
    EXPECT_EQ(mutex.owner_slot() != 0, GetParam() != Source::off);
    EXPECT_EQ(mutex.owner_slot(), this_task().slot(Sharing::process_private));
    EXPECT_FALSE(mutex.try_lock());
    mutex.unlock();
    EXPECT_EQ(raw(mutex), 0u);
}

TEST_P(MutexTest, IsHeldByOne) {
    Mutex mutex;
    long counter = 0;
    run_threads(8, [&](int) {
        for (int i = 0; i < 20'000; i++) {
            std::scoped_lock lock(mutex);
            counter = counter + 1;
            if (i % 1000 == 0) std::this_thread::yield();
        }
    });
    EXPECT_EQ(counter, 8 * 20'000);
    EXPECT_EQ(raw(mutex) & ~mutex_word::kWaiters, 0u);
}

TEST_P(MutexTest, IsHeldByOneThoughHoldersSleep) {
    Mutex mutex;
    long counter = 0;
    run_threads(8, [&](int) {
        for (int i = 0; i < 100; i++) {
            std::scoped_lock lock(mutex);
            counter = counter + 1;
            if (i % 10 == 0) usleep(100);
        }
    });
    EXPECT_EQ(counter, 800);
}

TEST_P(MutexTest, TwoAreLockedWithoutDeadlock) {
    Mutex a;
    InterprocessMutex b;
    long counter = 0;
    run_threads(4, [&](int n) {
        for (int i = 0; i < 5'000; i++) {
            if (n % 2) {
                std::scoped_lock lock(a, b);
                counter++;
            } else {
                std::scoped_lock lock(b, a);
                counter++;
            }
        }
    });
    EXPECT_EQ(counter, 20'000);
}

TEST_P(MutexTest, GivesUpInTime) {
    Mutex mutex;
    std::scoped_lock lock(mutex);
    std::thread([&] {
        const double start = seconds();
        EXPECT_FALSE(mutex.try_lock_for(50ms));
        EXPECT_FALSE(mutex.try_lock_until(std::chrono::steady_clock::now() + 50ms));
        EXPECT_FALSE(mutex.try_lock_until(std::chrono::system_clock::now() + 50ms));
        EXPECT_GE(seconds() - start, 0.15);
        EXPECT_LT(seconds() - start, 1.0);
        const double passed = seconds();
        EXPECT_FALSE(mutex.try_lock_for(-1h));
        EXPECT_FALSE(mutex.try_lock_for(0ns));
        EXPECT_FALSE(mutex.try_lock_until(std::chrono::system_clock::time_point::min()));
        EXPECT_LT(seconds() - passed, 0.1);
    }).join();
}

TEST_P(MutexTest, WaitsForAnUnlockWithAnyDeadline) {
    Mutex mutex;
    for (int way = 0; way < 4; way++) {
        mutex.lock();
        std::thread other([&, way] {
            switch (way) {
                case 0:
                    EXPECT_TRUE(mutex.try_lock_for(30s));
                    break;
                case 1:
                    EXPECT_TRUE(mutex.try_lock_for(std::chrono::hours::max()));
                    break;
                case 2:
                    EXPECT_TRUE(mutex.try_lock_until(std::chrono::system_clock::now() + 30s));
                    break;
                case 3:
                    mutex.lock();
                    break;
            }
            mutex.unlock();
        });
        EXPECT_TRUE(somebody_sleeps(mutex));
        usleep(2000);
        mutex.unlock();
        other.join();
    }
}

// Those who give up in the middle of it must not take wake-ups with them: then the others would sleep for ever.
TEST_P(MutexTest, WhoGivesUpSwallowsNoWakeUp) {
    Mutex mutex;
    std::atomic<int> gave_up{0};
    long counter = 0;
    run_threads(8, [&](int n) {
        std::minstd_rand random(static_cast<unsigned>(n) + 1);
        for (int i = 0; i < 400; i++) {
            if (n % 2 == 0) {
                mutex.lock();
            } else if (!mutex.try_lock_for(std::chrono::microseconds(random() % 300))) {
                gave_up++;
                continue;
            }
            counter = counter + 1;
            if (i % 8 == 0) usleep(50);
            mutex.unlock();
        }
    });
    EXPECT_EQ(counter, 8 * 400 - gave_up);
    EXPECT_GT(gave_up, 0);
}

TEST_P(MutexTest, ASleepingHolderIsNotSpunFor) {
    Mutex mutex;
    mutex.lock();
    double used = 1;
    std::thread other([&] {
        const double before = cpu_seconds_of_thread();
        mutex.lock();
        used = cpu_seconds_of_thread() - before;
        mutex.unlock();
    });
    usleep(300'000);
    mutex.unlock();
    other.join();
    EXPECT_LT(used, 0.02);
}

TEST_P(MutexTest, LeavesErrnoAlone) {
    Mutex mutex;
    mutex.lock();
    std::thread([&] {
        errno = 1234;
        EXPECT_FALSE(mutex.try_lock_for(5ms));
        EXPECT_EQ(errno, 1234);
    }).join();
    mutex.unlock();
}

// A holder destroys the mutex that its predecessor is still busy unlocking.
TEST_P(MutexTest, MayBeDestroyedByTheLastHolder) {
    for (int i = 0; i < 300; i++) {
        auto* mutex = new Mutex;
        mutex->lock();
        std::thread other([&] {
            mutex->lock();
            mutex->unlock();
            memset(static_cast<void*>(mutex), 0xff, sizeof(*mutex));
            delete mutex;
        });
        if (i % 2) usleep(100);
        mutex->unlock();
        other.join();
    }
}

// A holder that is back at once, and sleeps in the lock: without a reservation whoever waits comes too late for
// seconds.
TEST_P(MutexTest, NobodyStarves) {
    Mutex mutex;
    std::atomic<bool> stop{false};
    std::vector<std::thread> greedy;
    for (int n = 0; n < 3; n++)
        greedy.emplace_back([&] {
            for (int i = 0; !stop; i++) {
                std::scoped_lock lock(mutex);
                if (i % 16 == 0) usleep(100);
            }
        });
    usleep(20'000);
    double longest = 0;
    for (int i = 0; i < 20; i++) {
        const double start = seconds();
        mutex.lock();
        longest = std::max(longest, seconds() - start);
        mutex.unlock();
        usleep(1000);
    }
    stop = true;
    for (auto& t : greedy) t.join();
    EXPECT_LT(longest, 0.4);
}

// ---- processes ----

TEST_P(MutexTest, SixteenProcessesInInterprocessMemory) {
    namespace interprocess = boost::interprocess;
    struct Counted {
        InterprocessMutex mutex;
        long counter = 0;
    };
    const std::string name = "adaptive_mutex_test_" + std::to_string(getpid());
    interprocess::managed_shared_memory segment(interprocess::create_only, name.c_str(), 65536);
    auto& counted = *segment.construct<Counted>("counted")();
    {
        std::vector<std::unique_ptr<Child>> children;
        for (int n = 0; n < 16; n++)
            children.push_back(std::make_unique<Child>([&] {
                interprocess::managed_shared_memory mine(interprocess::open_only, name.c_str());
                Counted& c = *mine.find<Counted>("counted").first;
                for (int i = 0; i < 5'000; i++) {
                    std::scoped_lock lock(c.mutex);
                    c.counter = c.counter + 1;
                    if (i % 500 == 0) sched_yield();
                }
            }));
        for (auto& child : children) EXPECT_EQ(child->wait(), 0);
    }
    EXPECT_EQ(counted.counter, 16 * 5'000);
    interprocess::shared_memory_object::remove(name.c_str());
}

// Killed while they wait, spinning or asleep, woken or not: the others go on.
TEST_P(MutexTest, ProcessesKilledWhileTheyWait) {
    struct Area {
        InterprocessMutex mutex;
        std::atomic<bool> stop{false};
        std::atomic<long> counter{0};
    };
    Shared<Area> area;
    std::vector<std::unique_ptr<Child>> survivors;
    for (int n = 0; n < 3; n++)
        survivors.push_back(std::make_unique<Child>([&] {
            while (!area->stop) {
                std::scoped_lock lock(area->mutex);
                area->counter++;
                if (area->counter % 16 == 0) usleep(100);
            }
        }));
    for (int round = 0; round < 30; round++) {
        area->mutex.lock();
        Child victim([&] { area->mutex.lock(); });
        usleep(300 + 50 * (round % 20));
        victim.end(SIGKILL);  // it cannot hold it: this process does
        area->mutex.unlock();
        const long before = area->counter;
        ASSERT_TRUE(eventually([&] { return area->counter > before + 2; })) << "in round " << round;
    }
    area->stop = true;
    for (auto& child : survivors) EXPECT_EQ(child->wait(), 0);
}

// The worst moment: the mutex is free, all others asleep, and who has the duty to take it is gone.
TEST_P(MutexTest, ADeadSpinnerDelaysTheSleepersByTheBackstopAtMost) {
    struct Area {
        InterprocessMutex mutex;
        std::atomic<bool> acquired{false};
    };
    Shared<Area> area;
    area->mutex.lock();
    Child sleeper([&] {
        area->mutex.lock();
        area->acquired = true;
        area->mutex.unlock();
    });
    ASSERT_TRUE(somebody_sleeps(area->mutex));
    usleep(5000);
    // As a release leaves it that trusts the spinner.
    raw(area->mutex) = mutex_word::kWaiters | mutex_word::kSpinner;
    const double start = seconds();
    ASSERT_TRUE(eventually([&] { return area->acquired.load(); }));
    EXPECT_LT(seconds() - start, 0.3);
    EXPECT_EQ(sleeper.wait(), 0);
}

TEST_P(MutexTest, ReleasesOfBusyTasksDoNotTrustASpinnerForEver) {
    Mutex mutex;
    std::atomic<bool> passed{false};
    mutex.lock();
    std::thread sleeper([&] {
        mutex.lock();
        passed = true;
        mutex.unlock();
    });
    ASSERT_TRUE(somebody_sleeps(mutex));
    usleep(5000);
    // A spinner that never does anything: only the bound on sparing ends this.
    raw(mutex) |= mutex_word::kSpinner;
    const double end = seconds() + 5;
    while (!passed && seconds() < end) {
        mutex.unlock();
        mutex.lock();
    }
    EXPECT_TRUE(passed);
    mutex.unlock();
    sleeper.join();
}

TEST_P(MutexTest, AfterForkTheChildHasItsOwnName) {
    Mutex mutex;
    InterprocessMutex other;
    mutex.lock();
    const uint32_t mine = this_task().tid();
    const SlotId slot = this_task().slot(Sharing::process_shared);
    Child child([&] {
        mutex.unlock();  // its copy of the parent's
        mutex.lock();
        other.lock();
        const uint64_t word = raw(mutex);
        const bool ok = mutex_word::futex_half(word) == static_cast<uint32_t>(gettid()) &&
                        this_task().tid() != mine &&
                        (slot == 0 || this_task().slot(Sharing::process_shared) != slot);
        _exit(ok ? 0 : 1);
    });
    EXPECT_EQ(child.wait(), 0);
    EXPECT_EQ(mutex_word::futex_half(raw(mutex)), mine);
    mutex.unlock();
}

// ---- lies ----

// Another user of the table writes anything into it, all the time.
TEST(MutexWithHostileMirror, IsHeldByOneAndNobodyWaitsForEver) {
    TimeLimit limit(60);
    Shared<SharedRseqTable> table;
    Error error;
    if (!use_mirror({.wanted = MirrorChoice::Wanted::rseq, .rseq_table = table->memory}, &error))
        GTEST_SKIP() << error.text;
    {
        Child liar([&] {
            std::minstd_rand random(7);
            auto* words = reinterpret_cast<std::atomic<uint32_t>*>(table->memory);
            for (;;) {
                const size_t n = 16 + random() % (sizeof(table->memory) / 4 - 16);
                words[n] = random() % 4 == 0 ? static_cast<uint32_t>(random()) : random() % 4;
                if (random() % 64 == 0) usleep(10);
            }
        });
        InterprocessMutex mutex;
        long counter = 0;
        run_threads(6, [&](int n) {
            for (int i = 0; i < 3'000; i++) {
                if (n == 0 && i % 2 == 0 && !mutex.try_lock_for(1us)) continue;
                if (n != 0 || i % 2 == 1) mutex.lock();
                counter = counter + 1;
                if (i % 100 == 0) usleep(10);
                mutex.unlock();
            }
        });
        EXPECT_GE(counter, 5 * 3'000 + 1'500);
    }
    // And words of the mutex that no task has written.
    Mutex mutex;
    for (const uint64_t slots : {0xffff'fffe'0000'0000u, 0x0001'ffff'0000'0000u}) {
        raw(mutex) = slots;
        mutex.lock();
        mutex.unlock();
        EXPECT_EQ(raw(mutex) & mutex_word::kTid, 0u);
    }
    EXPECT_TRUE(use_mirror({.wanted = MirrorChoice::Wanted::off}, &error)) << error.text;
}

}  // namespace
}  // namespace adaptive::test
