// RobustMutex: every way to die with it, told to sleepers and spinners within 100 ms; beside the C library's own
// robust mutexes; ids that are used again.
#include "lock/robust_mutex.h"

#include <linux/sched.h>
#include <pthread.h>

#include <algorithm>
#include <random>

#include "lock_test.h"

namespace adaptive::test {
namespace {

class RobustMutexTest : public WithSource {
    TimeLimit limit_{60};
};
INSTANTIATE_FOR_SOURCES(RobustMutexTest);

std::atomic_ref<uint64_t> raw(RobustMutex& mutex) {
    return std::atomic_ref<uint64_t>(*static_cast<uint64_t*>(static_cast<void*>(&mutex)));
}
bool is_held(RobustMutex& mutex) {
    return eventually([&] { return (raw(mutex) & mutex_word::kTid) != 0; });
}
bool somebody_sleeps(RobustMutex& mutex) {
    const bool announced = eventually([&] { return (raw(mutex) & mutex_word::kWaiters) != 0; });
    usleep(10'000);
    return announced;
}

TEST_P(RobustMutexTest, IsAMutex) {
    RobustMutex mutex;
    long counter = 0;
    run_threads(8, [&](int) {
        for (int i = 0; i < 10'000; i++) {
            ASSERT_EQ(mutex.lock(), LockResult::acquired);
            counter = counter + 1;
            mutex.unlock();
        }
    });
    EXPECT_EQ(counter, 80'000);
    ASSERT_EQ(mutex.lock(), LockResult::acquired);
    std::thread([&] {
        EXPECT_EQ(mutex.try_lock(), LockResult::timed_out);
        EXPECT_EQ(mutex.try_lock_for(10ms), LockResult::timed_out);
        EXPECT_EQ(mutex.try_lock_until(std::chrono::system_clock::now() + 10ms), LockResult::timed_out);
    }).join();
    mutex.unlock();
    EXPECT_EQ(mutex.try_lock(), LockResult::acquired);
    mutex.unlock();
}

TEST_P(RobustMutexTest, AThreadThatEndsWithIt) {
    RobustMutex mutex;
    std::thread([&] { EXPECT_EQ(mutex.lock(), LockResult::acquired); }).join();
    EXPECT_EQ(mutex.lock(), LockResult::owner_died);
    mutex.consistent();
    mutex.unlock();
    EXPECT_EQ(mutex.lock(), LockResult::acquired);
    mutex.unlock();
}

TEST_P(RobustMutexTest, NotMadeConsistentItIsLostToAll) {
    Shared<RobustMutex> mutex;
    std::thread([&] { EXPECT_EQ(mutex->lock(), LockResult::acquired); }).join();
    ASSERT_EQ(mutex->lock(), LockResult::owner_died);
    std::vector<std::unique_ptr<Child>> sleepers;
    for (int i = 0; i < 3; i++)
        sleepers.push_back(
            std::make_unique<Child>([&] { _exit(mutex->lock() == LockResult::not_recoverable ? 0 : 1); }));
    ASSERT_TRUE(somebody_sleeps(*mutex));
    mutex->unlock();
    for (auto& child : sleepers) EXPECT_EQ(child->wait(), 0);
    EXPECT_EQ(mutex->lock(), LockResult::not_recoverable);
    EXPECT_EQ(mutex->try_lock(), LockResult::not_recoverable);
    EXPECT_EQ(mutex->try_lock_for(1s), LockResult::not_recoverable);
}

TEST_P(RobustMutexTest, WhoDiesWhilePuttingItRightIsFollowedByTheNext) {
    Shared<RobustMutex> mutex;
    for (int i = 0; i < 3; i++) {
        const LockResult expected = i == 0 ? LockResult::acquired : LockResult::owner_died;
        Child child([&] { _exit(mutex->lock() == expected ? 0 : 1); });
        EXPECT_EQ(child.wait(), 0);
    }
    EXPECT_EQ(mutex->try_lock(), LockResult::owner_died);
    mutex->consistent();
    mutex->unlock();
}

/// What a waiter reports of the death of the holder.
struct Death {
    RobustMutex mutex;
    std::atomic<bool> waits{false};
    std::atomic<double> told{0};
};

/// Kills or ends a holder after `delay` with a waiter there; how long the waiter did not know.
template <class Dies>
double seconds_until_told(Dies dies, bool waiter_sleeps, useconds_t delay) {
    Shared<Death> death;
    Child holder([&] {
        if (death->mutex.lock() != LockResult::acquired) _exit(1);
        dies();
    });
    if (!is_held(death->mutex)) return 1e9;
    Child waiter([&] {
        death->waits = true;
        const LockResult result = death->mutex.lock();
        death->told = seconds();
        _exit(result == LockResult::owner_died ? 0 : 1);
    });
    if (waiter_sleeps && !somebody_sleeps(death->mutex)) return 1e9;
    while (!death->waits) CycleClock::pause();
    for (const double end = seconds() + delay * 1e-6; seconds() < end;) CycleClock::pause();
    const double killed = seconds();
    holder.end(SIGKILL);
    if (waiter.wait() != 0) return 1e9;
    return death->told - killed;
}

TEST_P(RobustMutexTest, ASleeperIsToldWithin100ms) {
    for (int i = 0; i < 5; i++) EXPECT_LT(seconds_until_told([] { pause(); }, true, 0), 0.1);
}

TEST_P(RobustMutexTest, ASpinnerIsToldWithin100ms) {
    // Around the time at which it stops spinning and goes to sleep.
    for (useconds_t delay = 0; delay < 400; delay += 20)
        EXPECT_LT(seconds_until_told([] { compute(10s); }, false, delay), 0.1) << "after " << delay << " us";
}

TEST_P(RobustMutexTest, ExecIsADeath) {
    Shared<RobustMutex> mutex;
    Child child([&] {
        if (mutex->lock() == LockResult::acquired) execl("/bin/sleep", "sleep", "10", nullptr);
    });
    ASSERT_TRUE(eventually([&] { return (raw(*mutex) & mutex_word::kOwnerDied) != 0; }));
    EXPECT_EQ(kill(child.pid, 0), 0) << "the process goes on";
    EXPECT_EQ(mutex->try_lock_for(5s), LockResult::owner_died);
    mutex->consistent();
    mutex->unlock();
}

// The kernel wakes one sleeper only: the others must not be forgotten.
TEST_P(RobustMutexTest, AllSleepersGoOnAfterADeath) {
    Shared<Death> death;
    Child holder([&] {
        (void)death->mutex.lock();
        pause();
    });
    ASSERT_TRUE(is_held(death->mutex));
    std::vector<std::unique_ptr<Child>> sleepers;
    for (int i = 0; i < 8; i++)
        sleepers.push_back(std::make_unique<Child>([&] {
            const LockResult result = death->mutex.lock();
            if (result == LockResult::owner_died) death->mutex.consistent();
            usleep(1000);
            death->mutex.unlock();
            _exit(is_acquired(result) ? 0 : 1);
        }));
    ASSERT_TRUE(somebody_sleeps(death->mutex));
    usleep(20'000);
    holder.end(SIGKILL);
    for (auto& sleeper : sleepers) EXPECT_EQ(sleeper->wait(), 0);
}

// A child made by fork holds nothing: its end is not the holder's.
TEST_P(RobustMutexTest, AForkedChildHoldsNothing) {
    Shared<RobustMutex> mutex;
    ASSERT_EQ(mutex->lock(), LockResult::acquired);
    Child child([&] { _exit(mutex->try_lock() == LockResult::timed_out ? 0 : 1); });
    EXPECT_EQ(child.wait(), 0);
    EXPECT_EQ(raw(*mutex) & mutex_word::kTid, static_cast<uint64_t>(gettid()));
    mutex->unlock();
}

TEST_P(RobustMutexTest, BesideTheCLibrarysInAnyOrder) {
    struct Both {
        RobustMutex ours[3];
        pthread_mutex_t theirs[3];
    };
    Shared<Both> both;
    pthread_mutexattr_t attr;
    pthread_mutexattr_init(&attr);
    pthread_mutexattr_setrobust(&attr, PTHREAD_MUTEX_ROBUST);
    pthread_mutexattr_setpshared(&attr, PTHREAD_PROCESS_SHARED);
    for (auto& m : both->theirs) pthread_mutex_init(&m, &attr);
    const auto take_and_drop_some = [&](unsigned seed) {
        std::minstd_rand random(seed);
        std::vector<int> order = {0, 1, 2, 3, 4, 5};
        std::shuffle(order.begin(), order.end(), random);
        for (int i : order)
            if (i < 3)
                (void)both->ours[i].lock();
            else
                pthread_mutex_lock(&both->theirs[i - 3]);
        std::shuffle(order.begin(), order.end(), random);
        order.resize(3);
        for (int i : order)
            if (i < 3)
                both->ours[i].unlock();
            else
                pthread_mutex_unlock(&both->theirs[i - 3]);
        return order;
    };
    for (unsigned seed = 1; seed <= 60; seed++) {
        Child child([&] {
            take_and_drop_some(seed);
            raise(SIGKILL);
        });
        child.wait();
        // What it dropped, by the same dice.
        std::minstd_rand random(seed);
        std::vector<int> order = {0, 1, 2, 3, 4, 5};
        std::shuffle(order.begin(), order.end(), random);
        std::shuffle(order.begin(), order.end(), random);
        for (size_t n = 0; n < 6; n++) {
            const bool died = n >= 3;
            if (order[n] < 3) {
                RobustMutex& m = both->ours[order[n]];
                ASSERT_EQ(m.try_lock(), died ? LockResult::owner_died : LockResult::acquired) << seed;
                m.consistent();
                m.unlock();
            } else {
                pthread_mutex_t& m = both->theirs[order[n] - 3];
                ASSERT_EQ(pthread_mutex_trylock(&m), died ? EOWNERDEAD : 0) << seed;
                if (died) pthread_mutex_consistent(&m);
                pthread_mutex_unlock(&m);
            }
        }
    }
}

/// A process with a given id, if that can be had.
pid_t fork_with_id(pid_t id) {
    clone_args args = {};
    args.exit_signal = SIGCHLD;
    args.set_tid = reinterpret_cast<uintptr_t>(&id);
    args.set_tid_size = 1;
    return static_cast<pid_t>(syscall(SYS_clone3, &args, sizeof(args)));
}

// The id of the dead holder belongs to somebody else before anybody asks: who lives, and even takes and frees the
// mutex of others.
TEST_P(RobustMutexTest, AnIdThatIsUsedAgainFoolsNobody) {
    Shared<RobustMutex> mutex;
    for (int i = 0; i < 5; i++) {
        pid_t id;
        {
            Child holder([&] {
                (void)mutex->lock();
                pause();
            });
            ASSERT_TRUE(is_held(*mutex));
            id = holder.pid;
            Child sleeper([&] {
                const LockResult result = mutex->lock();
                _exit(result == LockResult::owner_died ? 0 : 1);  // with the mutex, in its turn
            });
            ASSERT_TRUE(somebody_sleeps(*mutex));
            holder.end(SIGKILL);
            EXPECT_EQ(sleeper.wait(), 0);
        }
        const pid_t impostor = fork_with_id(id);
        if (impostor < 0)
            GTEST_SKIP() << "this process may not choose the id of another: " << strerror(errno);
        if (impostor == 0) {
            forget_parent();
            pause();
        }
        EXPECT_EQ(mutex->try_lock_for(100ms), LockResult::owner_died);
        mutex->consistent();
        mutex->unlock();
        kill(impostor, SIGKILL);
        waitpid(impostor, nullptr, 0);
    }
}

TEST_P(RobustMutexTest, AThreadWithoutAListIsToldSo) {
    RobustMutex mutex;
    std::thread([&] {
        robust_list_head* list = nullptr;
        size_t size = 0;
        ASSERT_EQ(syscall(SYS_get_robust_list, 0, &list, &size), 0);
        robust_list_head other = *list;
        other.list.next = &other.list;
        other.futex_offset = 8;
        syscall(SYS_set_robust_list, nullptr, size);
        EXPECT_EQ(mutex.lock(), LockResult::not_supported);
        syscall(SYS_set_robust_list, &other, size);
        EXPECT_EQ(mutex.lock(), LockResult::not_supported);
        syscall(SYS_set_robust_list, list, size);
        EXPECT_EQ(mutex.lock(), LockResult::acquired);
        mutex.unlock();
    }).join();
}

// Sixteen processes, of which one after the other is killed, anywhere.
TEST_P(RobustMutexTest, KilledAnywhereAmongSixteen) {
    struct Account {
        RobustMutex mutex;
        long debits = 0, credits = 0;
        std::atomic<long> turns{0}, repairs{0}, wrong{0};
    };
    Shared<Account> account;
    const auto work = [&] {
        for (;;) {
            const LockResult result = account->mutex.lock();
            if (result == LockResult::owner_died) {
                account->credits = account->debits;
                account->repairs++;
                account->mutex.consistent();
            } else if (result != LockResult::acquired || account->debits != account->credits) {
                account->wrong++;
            }
            account->debits = account->debits + 1;
            if (account->debits % 64 == 0) usleep(30);
            account->credits = account->credits + 1;
            account->turns++;
            account->mutex.unlock();
        }
    };
    std::vector<std::unique_ptr<Child>> children;
    for (int i = 0; i < 16; i++) children.push_back(std::make_unique<Child>(work));
    std::minstd_rand random(42);
    for (int i = 0; i < 60; i++) {
        auto& victim = children[random() % children.size()];
        victim->end(SIGKILL);
        const long before = account->turns;
        ASSERT_TRUE(eventually([&] { return account->turns > before + 20; })) << "after kill " << i;
        victim = std::make_unique<Child>(work);
    }
    children.clear();
    EXPECT_EQ(account->wrong, 0);
    EXPECT_TRUE(is_acquired(account->mutex.try_lock_for(1s)));
    account->mutex.unlock();
    printf("    %ld turns, %ld repairs\n", account->turns.load(), account->repairs.load());
}

}  // namespace
}  // namespace adaptive::test
