// SharedMutex: exclusion under preemption, turns of readers and writers, and giving up in the middle of it.
#include "lock/shared_mutex.h"

#include <mutex>
#include <random>
#include <shared_mutex>

#include "lock_test.h"

namespace adaptive::test {
namespace {

class SharedMutexTest : public WithSource {
    TimeLimit limit_{60};
};
INSTANTIATE_FOR_SOURCES(SharedMutexTest);

TEST_P(SharedMutexTest, ReadersShareAndWritersDoNot) {
    SharedMutex mutex;
    mutex.lock_shared();
    EXPECT_TRUE(mutex.try_lock_shared());
    EXPECT_FALSE(mutex.try_lock());
    mutex.unlock_shared();
    EXPECT_FALSE(mutex.try_lock());
    mutex.unlock_shared();
    EXPECT_TRUE(mutex.try_lock());
    EXPECT_FALSE(mutex.try_lock());
    EXPECT_FALSE(mutex.try_lock_shared());
    mutex.unlock();
    alignas(8) char zero[sizeof(mutex)] = {};
    EXPECT_EQ(memcmp(&mutex, zero, 16), 0) << "tidy";
}

template <class M>
struct Guarded {
    M mutex;
    std::atomic<int> readers{0}, writers{0}, violations{0}, gave_up{0};
    std::atomic<long> writes{0}, reads{0};
    long value = 0;

    void turn(int n, int i, std::minstd_rand& random) {
        const auto patience = std::chrono::microseconds(random() % 300);
        if (random() % 3 == 0) {
            if (n % 2 == 0)
                mutex.lock();
            else if (!mutex.try_lock_for(patience))
                return void(gave_up++);
            if (writers++ != 0 || readers != 0) violations++;
            value = value + 1;
            if (i % 16 == 0) usleep(20);
            writers--;
            writes++;
            mutex.unlock();
        } else {
            if (n % 2 == 0)
                mutex.lock_shared();
            else if (!mutex.try_lock_shared_for(patience))
                return void(gave_up++);
            readers++;
            if (writers != 0) violations++;
            if (i % 16 == 0) usleep(20);
            readers--;
            reads++;
            mutex.unlock_shared();
        }
    }
};

TEST_P(SharedMutexTest, ThreadsThatReadWriteAndGiveUp) {
    Guarded<SharedMutex> guarded;
    run_threads(8, [&](int n) {
        std::minstd_rand random(static_cast<unsigned>(n) + 1);
        for (int i = 0; i < 2'000; i++) guarded.turn(n, i, random);
    });
    EXPECT_EQ(guarded.violations, 0);
    EXPECT_EQ(guarded.value, guarded.writes);
    EXPECT_GT(guarded.reads, 0);
    EXPECT_EQ(guarded.reads + guarded.writes + guarded.gave_up, 8 * 2'000);
    EXPECT_TRUE(guarded.mutex.try_lock()) << "nothing is left over";
}

TEST_P(SharedMutexTest, ProcessesThatReadWriteAndGiveUp) {
    Shared<Guarded<InterprocessSharedMutex>> guarded;
    {
        std::vector<std::unique_ptr<Child>> children;
        for (int n = 0; n < 8; n++)
            children.push_back(std::make_unique<Child>([&, n] {
                std::minstd_rand random(static_cast<unsigned>(n) + 1);
                for (int i = 0; i < 1'000; i++) guarded->turn(n, i, random);
            }));
        for (auto& child : children) EXPECT_EQ(child->wait(), 0);
    }
    EXPECT_EQ(guarded->violations, 0);
    EXPECT_EQ(guarded->value, guarded->writes);
    EXPECT_EQ(guarded->reads + guarded->writes + guarded->gave_up, 8 * 1'000);
}

// Readers that take turns so that one is always in.
TEST_P(SharedMutexTest, ReadersDoNotStarveAWriter) {
    SharedMutex mutex;
    std::atomic<bool> stop{false};
    std::vector<std::thread> readers;
    for (int n = 0; n < 3; n++)
        readers.emplace_back([&] {
            while (!stop) {
                std::shared_lock lock(mutex);
                usleep(2000);
            }
        });
    usleep(20'000);
    for (int i = 0; i < 5; i++) {
        EXPECT_TRUE(mutex.try_lock_for(5s));
        mutex.unlock();
    }
    stop = true;
    for (auto& t : readers) t.join();
}

// Writers that are back at once: a reader waits for one of them.
TEST_P(SharedMutexTest, WritersDoNotStarveAReader) {
    SharedMutex mutex;
    std::atomic<bool> stop{false};
    std::atomic<int> writes{0};
    std::vector<std::thread> writers;
    for (int n = 0; n < 3; n++)
        writers.emplace_back([&] {
            while (!stop) {
                std::scoped_lock lock(mutex);
                writes++;
                usleep(5000);
            }
        });
    while (writes < 2) usleep(1000);
    for (int i = 0; i < 10; i++) {
        const int before = writes;
        mutex.lock_shared();
        // The one that was in; one more may have begun between counting and asking.
        EXPECT_LE(writes - before, 2);
        mutex.unlock_shared();
    }
    stop = true;
    for (auto& t : writers) t.join();
}

TEST_P(SharedMutexTest, WhoGivesUpLeavesTheOthersTheirTurn) {
    SharedMutex mutex;
    mutex.lock_shared();
    std::thread writer([&] { EXPECT_FALSE(mutex.try_lock_for(300ms)); });
    ASSERT_TRUE(eventually([&] {
        const bool no_writer = mutex.try_lock_shared();
        if (no_writer) mutex.unlock_shared();
        return !no_writer;
    }));
    // The writer waits for us, this reader for the writer: until it gives up.
    std::thread reader([&] {
        const double start = seconds();
        EXPECT_FALSE(mutex.try_lock_shared_for(10ms));
        EXPECT_TRUE(mutex.try_lock_shared_for(30s));
        EXPECT_LT(seconds() - start, 5);
        mutex.unlock_shared();
    });
    reader.join();
    writer.join();
    mutex.unlock_shared();
    EXPECT_TRUE(mutex.try_lock_for(0ns));
    std::thread([&] {
        EXPECT_FALSE(mutex.try_lock_shared_until(std::chrono::system_clock::now() + 10ms));
    }).join();
    mutex.unlock();
}

}  // namespace
}  // namespace adaptive::test
