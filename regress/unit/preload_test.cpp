// Programs that know nothing of libadaptive_pthread.so, with it and without it.
//
// This program runs itself, all its tests each time: without the library ("stock"), with the library switched off, and
// with every source of the mirror. What a mutex may do is the same each time.
#include <dlfcn.h>
#include <gtest/gtest.h>
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <threads.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <thread>
#include <vector>

#include "preload/adaptive_pthread.h"
#include "private_mirror.h"
#include "processes.h"

namespace {

using namespace std::chrono_literals;
using test::Child;
using test::eventually;
using test::seconds;
using test::Shared;

/// What main() says to the runs of itself.
const char* how() {
    const char* how = getenv("PRELOAD_TEST_HOW");
    return how != nullptr ? how : "";
}
bool is_active() {
    return strcmp(how(), "stock") != 0 && strcmp(how(), "off") != 0;
}

adaptive_pthread_status status() {
    adaptive_pthread_status s = {};
    const auto get = reinterpret_cast<void (*)(adaptive_pthread_status*)>(
        dlsym(RTLD_DEFAULT, "adaptive_pthread_get_status"));
    if (get != nullptr) get(&s);
    return s;
}

/// A mutex that says so when two hold it, and of which kind it is.
struct Kind {
    const char* name;
    int type = PTHREAD_MUTEX_DEFAULT;
    int pshared = PTHREAD_PROCESS_PRIVATE;
    int robust = PTHREAD_MUTEX_STALLED;
    int protocol = PTHREAD_PRIO_NONE;
    bool initialised = true;  // by pthread_mutex_init() with attributes; else statically

    friend void PrintTo(const Kind& kind, std::ostream* out) { *out << kind.name; }
};
const Kind kKinds[] = {
    {.name = "Static", .initialised = false},
    {.name = "StaticAdaptive", .type = PTHREAD_MUTEX_ADAPTIVE_NP, .initialised = false},
    {.name = "StaticRecursive", .type = PTHREAD_MUTEX_RECURSIVE, .initialised = false},
    {.name = "StaticErrorcheck", .type = PTHREAD_MUTEX_ERRORCHECK, .initialised = false},
    {.name = "Default"},
    {.name = "Normal", .type = PTHREAD_MUTEX_NORMAL},
    {.name = "Adaptive", .type = PTHREAD_MUTEX_ADAPTIVE_NP},
    {.name = "Recursive", .type = PTHREAD_MUTEX_RECURSIVE},
    {.name = "Errorcheck", .type = PTHREAD_MUTEX_ERRORCHECK},
    {.name = "ProcessShared", .pshared = PTHREAD_PROCESS_SHARED},
    {.name = "Robust", .robust = PTHREAD_MUTEX_ROBUST},
    {.name = "RobustShared", .pshared = PTHREAD_PROCESS_SHARED, .robust = PTHREAD_MUTEX_ROBUST},
    {.name = "RobustRecursive", .type = PTHREAD_MUTEX_RECURSIVE, .robust = PTHREAD_MUTEX_ROBUST},
    {.name = "Inherit", .protocol = PTHREAD_PRIO_INHERIT},
    {.name = "InheritRobust", .robust = PTHREAD_MUTEX_ROBUST, .protocol = PTHREAD_PRIO_INHERIT},
};

struct TestMutex {
    pthread_mutex_t mutex;
    int holders = 0;
    long turns = 0;

    explicit TestMutex(const Kind& kind) {
        static const pthread_mutex_t statics[] = {
            PTHREAD_MUTEX_INITIALIZER, PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP,
            PTHREAD_ERRORCHECK_MUTEX_INITIALIZER_NP, PTHREAD_ADAPTIVE_MUTEX_INITIALIZER_NP};
        if (!kind.initialised) {
            mutex = statics[kind.type];
            return;
        }
        pthread_mutexattr_t attributes;
        pthread_mutexattr_init(&attributes);
        if (kind.type != PTHREAD_MUTEX_DEFAULT || strcmp(kind.name, "Normal") == 0) {
            EXPECT_EQ(pthread_mutexattr_settype(&attributes, kind.type), 0);
        }
        EXPECT_EQ(pthread_mutexattr_setpshared(&attributes, kind.pshared), 0);
        EXPECT_EQ(pthread_mutexattr_setrobust(&attributes, kind.robust), 0);
        EXPECT_EQ(pthread_mutexattr_setprotocol(&attributes, kind.protocol), 0);
        EXPECT_EQ(pthread_mutex_init(&mutex, &attributes), 0);
        pthread_mutexattr_destroy(&attributes);
    }
    void enter() {
        holders++;
        turns++;
        if (holders != 1) ADD_FAILURE() << "two hold it";
    }
    void leave() { holders--; }
};

class PreloadKinds : public ::testing::TestWithParam<Kind> {
  protected:
    void SetUp() override { alarm(60); }
    void TearDown() override { alarm(0); }
};
INSTANTIATE_TEST_SUITE_P(All, PreloadKinds, ::testing::ValuesIn(kKinds),
                         [](const auto& kind) { return kind.param.name; });

class Preload : public ::testing::Test {
  protected:
    void SetUp() override { alarm(60); }
    void TearDown() override { alarm(0); }
};

void run_threads(int count, const std::function<void(int)>& body) {
    std::vector<std::thread> threads;
    for (int i = 0; i < count; i++) threads.emplace_back(body, i);
    for (std::thread& t : threads) t.join();
}

/// So that whoever holds a mutex is preempted in it now and then, and others wait.
void compute(std::chrono::nanoseconds duration) {
    for (const auto end = std::chrono::steady_clock::now() + duration;
         std::chrono::steady_clock::now() < end;) {
    }
}

timespec after(std::chrono::milliseconds duration, clockid_t clock = CLOCK_REALTIME) {
    timespec t;
    clock_gettime(clock, &t);
    const auto ns = t.tv_nsec + std::chrono::nanoseconds(duration).count();
    return {.tv_sec = t.tv_sec + ns / 1'000'000'000, .tv_nsec = ns % 1'000'000'000};
}

// ---- what this run is ----

TEST_F(Preload, IsWhatWasAskedFor) {
    if (getenv("PRELOAD_TEST_SKIP") != nullptr) GTEST_SKIP() << getenv("PRELOAD_TEST_SKIP");
    TestMutex m(kKinds[0]);
    adaptive_pthread_status s;
    int rounds = 0;
    do {
        run_threads(4, [&](int) {
            for (int i = 0; i < 300; i++) {
                pthread_mutex_lock(&m.mutex);
                compute(20us);
                pthread_mutex_unlock(&m.mutex);
            }
        });
        s = status();
    } while (is_active() && s.spin_acquired == 0 && ++rounds < 50);
    EXPECT_EQ(s.active != 0, is_active()) << s.why_not;
    EXPECT_EQ(s.contended != 0, is_active());
    EXPECT_EQ(s.spin_acquired != 0, is_active());
    const std::string source = is_active() ? how() : "";
    EXPECT_EQ(s.source, source == "blind" ? "off" : source) << s.why_not;
    if (strcmp(how(), "off") == 0) {
        EXPECT_NE(strstr(s.why_not, "switched off"), nullptr) << s.why_not;
    }
}

// ---- every kind ----

TEST_P(PreloadKinds, ExcludesEachOther) {
    TestMutex m(GetParam());
    std::atomic<long> expected{0};
    run_threads(5, [&](int me) {
        for (int i = 0; i < 2000; i++) {
            int result = EBUSY;
            timespec t;
            switch ((i + me) % 5) {
                case 0:
                    result = pthread_mutex_trylock(&m.mutex);
                    break;
                case 1:
                    result = pthread_mutex_timedlock(&m.mutex, &(t = after(i % 2 == 0 ? 0ms : 1ms)));
                    break;
                case 2:
                    if (GetParam().protocol == PTHREAD_PRIO_INHERIT)
                        continue;  // not with CLOCK_MONOTONIC there
                    result = pthread_mutex_clocklock(&m.mutex, CLOCK_MONOTONIC,
                                                     &(t = after(1ms, CLOCK_MONOTONIC)));
                    break;
                default:
                    result = pthread_mutex_lock(&m.mutex);
            }
            if (result != 0) {
                if (result != EBUSY && result != ETIMEDOUT) ADD_FAILURE() << strerror(result);
                continue;
            }
            m.enter();
            expected++;
            if (i % 64 == 0) sched_yield();
            if (i % 8 == 0) compute(5us);
            m.leave();
            if (pthread_mutex_unlock(&m.mutex) != 0) ADD_FAILURE() << "unlock";
        }
    });
    EXPECT_EQ(m.turns, expected);
    EXPECT_EQ(pthread_mutex_destroy(&m.mutex), 0);
}

TEST_P(PreloadKinds, TellsTheHolderAsItsKindDoes) {
    TestMutex m(GetParam());
    std::thread([&] {
        const Kind& kind = GetParam();
        ASSERT_EQ(pthread_mutex_lock(&m.mutex), 0);
        const bool recursive = kind.type == PTHREAD_MUTEX_RECURSIVE;
        EXPECT_EQ(pthread_mutex_trylock(&m.mutex), recursive ? 0 : EBUSY);
        if (recursive) {
            EXPECT_EQ(pthread_mutex_lock(&m.mutex), 0);
            EXPECT_EQ(pthread_mutex_unlock(&m.mutex), 0);
            EXPECT_EQ(pthread_mutex_unlock(&m.mutex), 0);
        }
        if (kind.type == PTHREAD_MUTEX_ERRORCHECK) {
            EXPECT_EQ(pthread_mutex_lock(&m.mutex), EDEADLK);
        }
        std::thread([&] {
            EXPECT_EQ(pthread_mutex_trylock(&m.mutex), EBUSY);
            if (kind.type == PTHREAD_MUTEX_ERRORCHECK || recursive || kind.robust == PTHREAD_MUTEX_ROBUST) {
                EXPECT_EQ(pthread_mutex_unlock(&m.mutex), EPERM);
            }
        }).join();
        if (kind.robust != PTHREAD_MUTEX_ROBUST) {
            EXPECT_EQ(pthread_mutex_destroy(&m.mutex), EBUSY);
        }
        EXPECT_EQ(pthread_mutex_unlock(&m.mutex), 0);
        if (kind.type == PTHREAD_MUTEX_ERRORCHECK || recursive) {
            EXPECT_EQ(pthread_mutex_unlock(&m.mutex), EPERM);
        }
    }).join();
    EXPECT_EQ(pthread_mutex_destroy(&m.mutex), 0);
}

TEST_P(PreloadKinds, GivesUpInTime) {
    TestMutex m(GetParam());
    std::atomic<bool> holds{false}, done{false};
    std::thread holder([&] {
        pthread_mutex_lock(&m.mutex);
        holds = true;
        while (!done) usleep(1000);
        pthread_mutex_unlock(&m.mutex);
    });
    while (!holds) usleep(1000);
    timespec t;
    const double before = seconds();
    EXPECT_EQ(pthread_mutex_timedlock(&m.mutex, &(t = after(50ms))), ETIMEDOUT);
    EXPECT_GE(seconds() - before, 0.049);
    EXPECT_EQ(pthread_mutex_timedlock(&m.mutex, &(t = {.tv_sec = 1, .tv_nsec = 0})), ETIMEDOUT);
    // Before the clock began: the kernel refuses to wait for that with priority inheritance.
    EXPECT_EQ(pthread_mutex_timedlock(&m.mutex, &(t = {.tv_sec = -1, .tv_nsec = 0})),
              GetParam().protocol == PTHREAD_PRIO_INHERIT ? EINVAL : ETIMEDOUT);
    EXPECT_EQ(pthread_mutex_timedlock(&m.mutex, &(t = {.tv_sec = 1, .tv_nsec = -1})), EINVAL);
    EXPECT_EQ(pthread_mutex_timedlock(&m.mutex, &(t = {.tv_sec = 1, .tv_nsec = 1'000'000'000})), EINVAL);
    EXPECT_EQ(pthread_mutex_clocklock(&m.mutex, CLOCK_PROCESS_CPUTIME_ID, &(t = after(1ms))), EINVAL);
    done = true;
    EXPECT_EQ(pthread_mutex_timedlock(&m.mutex, &(t = {.tv_sec = INT64_MAX / 2, .tv_nsec = 0})), 0);
    EXPECT_EQ(pthread_mutex_unlock(&m.mutex), 0);
    holder.join();
    EXPECT_EQ(pthread_mutex_lock(&m.mutex), 0);
    EXPECT_EQ(pthread_mutex_unlock(&m.mutex), 0);
}

TEST_P(PreloadKinds, WorksWithAConditionVariable) {
    TestMutex m(GetParam());
    pthread_cond_t filled = PTHREAD_COND_INITIALIZER, emptied = PTHREAD_COND_INITIALIZER;
    int items = 0, consumed = 0;
    constexpr int kItems = 3000;
    run_threads(4, [&](int me) {
        for (int i = 0; i < kItems; i++) {
            pthread_mutex_lock(&m.mutex);
            if (me % 2 == 0) {
                while (items == 3) pthread_cond_wait(&emptied, &m.mutex);
                m.enter();
                items++;
                m.leave();
                pthread_cond_signal(&filled);
            } else {
                timespec t;
                while (items == 0)
                    pthread_cond_timedwait(&filled, &m.mutex, &(t = after(i % 3 == 0 ? 0ms : 5000ms)));
                m.enter();
                items--;
                consumed++;
                m.leave();
                pthread_cond_broadcast(&emptied);
            }
            pthread_mutex_unlock(&m.mutex);
        }
    });
    EXPECT_EQ(items, 0);
    EXPECT_EQ(consumed, 2 * kItems);
    EXPECT_EQ(pthread_mutex_destroy(&m.mutex), 0) << "nobody uses it any more";
}

TEST_P(PreloadKinds, TheOwnersDeathIsReportedByRobustOnes) {
    const Kind& kind = GetParam();
    TestMutex m(kind);
    std::thread([&] { EXPECT_EQ(pthread_mutex_lock(&m.mutex), 0); }).join();
    timespec t;
    const int result = pthread_mutex_timedlock(&m.mutex, &(t = after(20ms)));
    EXPECT_EQ(result, kind.robust == PTHREAD_MUTEX_ROBUST ? EOWNERDEAD : ETIMEDOUT);
    if (result != EOWNERDEAD) return;
    EXPECT_EQ(pthread_mutex_consistent(&m.mutex), 0);
    EXPECT_EQ(pthread_mutex_unlock(&m.mutex), 0);
    EXPECT_EQ(pthread_mutex_lock(&m.mutex), 0);
    EXPECT_EQ(pthread_mutex_unlock(&m.mutex), 0);
}

TEST_P(PreloadKinds, IsHeldAcrossProcessesIfShared) {
    const Kind& kind = GetParam();
    if (kind.pshared != PTHREAD_PROCESS_SHARED) return;
    struct Memory {
        alignas(TestMutex) char bytes[sizeof(TestMutex)];
    };
    Shared<Memory> memory;
    auto& m = *new (memory->bytes) TestMutex(kind);
    std::thread([] {}).join();  // a program with threads
    const auto turns = [&] {
        for (int i = 0; i < 3000; i++) {
            pthread_mutex_lock(&m.mutex);
            m.enter();
            if (i % 16 == 0) compute(2us);
            m.leave();
            pthread_mutex_unlock(&m.mutex);
        }
    };
    Child a(turns), b(turns);
    turns();
    EXPECT_EQ(a.wait(), 0);
    EXPECT_EQ(b.wait(), 0);
    EXPECT_EQ(m.turns, 9000);
}

TEST_P(PreloadKinds, ChildrenOfAForkCanGoOn) {
    TestMutex m(GetParam());
    std::atomic<bool> stop{false};
    std::vector<std::thread> others;
    for (int i = 0; i < 3; i++)
        others.emplace_back([&] {
            while (!stop) {
                pthread_mutex_lock(&m.mutex);
                compute(3us);
                pthread_mutex_unlock(&m.mutex);
            }
        });
    for (int i = 0; i < 20; i++) {
        pthread_mutex_lock(&m.mutex);  // as a fork handler would
        const pid_t pid = i % 2 == 0 ? fork() : _Fork();
        // A shared one belongs to the parent; of the other kinds, glibc itself knows only its caller's id in the child.
        if (pid == 0) {
            const Kind& kind = GetParam();
            const bool plain = kind.pshared == PTHREAD_PROCESS_PRIVATE &&
                               kind.robust == PTHREAD_MUTEX_STALLED && kind.protocol == PTHREAD_PRIO_NONE &&
                               (kind.type == PTHREAD_MUTEX_NORMAL || kind.type == PTHREAD_MUTEX_ADAPTIVE_NP);
            if (!plain) _exit(0);
            alarm(10);
            if (pthread_mutex_unlock(&m.mutex) != 0) _exit(1);
            for (int k = 0; k < 100; k++) {
                if (pthread_mutex_lock(&m.mutex) != 0) _exit(2);
                m.enter();
                m.leave();
                if (pthread_mutex_unlock(&m.mutex) != 0) _exit(3);
            }
            TestMutex own(kind);
            run_threads(3, [&](int) {
                for (int k = 0; k < 200; k++) {
                    pthread_mutex_lock(&own.mutex);
                    own.enter();
                    compute(2us);
                    own.leave();
                    pthread_mutex_unlock(&own.mutex);
                }
            });
            _exit(own.turns == 600 ? 0 : 4);
        }
        pthread_mutex_unlock(&m.mutex);
        int wait_status = -1;
        waitpid(pid, &wait_status, 0);
        EXPECT_EQ(wait_status, 0);
    }
    stop = true;
    for (std::thread& t : others) t.join();
}

// What the parent's thread was must not be taken for what its child is: a waiter in the child finds the holder by its own
// id, sees it asleep, and does not spin. No fork handler runs for _Fork(): the kernel has to wipe what was known.
TEST_F(Preload, AChildOfAnyForkEntersTheMirrorAnew) {
    const bool tells_sleepers = strcmp(how(), "bpf") == 0;
    TestMutex m(kKinds[0]);
    std::thread([&] { pthread_mutex_lock(&m.mutex), pthread_mutex_unlock(&m.mutex); }).join();
    pthread_mutex_lock(&m.mutex);  // has entered
    pthread_mutex_unlock(&m.mutex);
    for (const bool with_handlers : {true, false}) {
        const pid_t pid = with_handlers ? fork() : _Fork();
        if (pid == 0) {
            alarm(10);
            const uint64_t before = status().owner_off_cpu;
            pthread_mutex_lock(&m.mutex);
            std::thread waiter([&] { pthread_mutex_lock(&m.mutex), pthread_mutex_unlock(&m.mutex); });
            usleep(50'000);
            pthread_mutex_unlock(&m.mutex);
            waiter.join();
            _exit(!tells_sleepers || status().owner_off_cpu > before ? 0 : 1);
        }
        int wait_status = -1;
        waitpid(pid, &wait_status, 0);
        EXPECT_EQ(wait_status, 0) << (with_handlers ? "fork" : "_Fork");
    }
}

TEST_F(Preload, PriorityProtection) {
    // With a ceiling of a real-time priority, which most may not have: EPERM or EINVAL then.
    TestMutex m({.name = "", .protocol = PTHREAD_PRIO_PROTECT});
    std::thread([&] {
        sched_param priority = {.sched_priority = sched_get_priority_min(SCHED_FIFO)};
        int ceiling = 0;
        EXPECT_EQ(pthread_mutex_getprioceiling(&m.mutex, &ceiling), 0);
        const bool may = pthread_setschedparam(pthread_self(), SCHED_FIFO, &priority) == 0;
        const int result = pthread_mutex_lock(&m.mutex);
        if (may) {
            EXPECT_EQ(result, 0);
        }
        if (result != 0) return;
        EXPECT_EQ(pthread_mutex_trylock(&m.mutex), EBUSY);
        EXPECT_EQ(pthread_mutex_unlock(&m.mutex), 0);
    }).join();
    EXPECT_EQ(pthread_mutex_destroy(&m.mutex), 0);
}

// A thread forks while it spins: in a signal handler. Its child has the spinner's seat, but nobody who spins.
struct {
    TestMutex m{kKinds[0]};
    std::atomic<pid_t> child{0};
} forking;

void fork_in_handler(int) {
    const pid_t pid = _Fork();
    if (pid != 0) {
        forking.child = pid;
        return;
    }
    alarm(5);
    pthread_mutex_t& mutex = forking.m.mutex;
    pthread_mutex_trylock(&mutex);  // it may be held by nobody, or by a thread that is not there
    pthread_mutex_unlock(&mutex);
    pthread_mutex_lock(&mutex);
    std::thread sleeper([&] {
        pthread_mutex_lock(&mutex);
        pthread_mutex_unlock(&mutex);
    });
    usleep(3000);
    pthread_mutex_unlock(&mutex);
    sleeper.join();
    _exit(0);
}

TEST_F(Preload, AChildForkedInAHandlerDuringASpinCanLock) {
    signal(SIGUSR1, fork_in_handler);
    std::atomic<bool> stop{false};
    const auto turns = [&](std::chrono::nanoseconds hold) {
        while (!stop) {
            pthread_mutex_lock(&forking.m.mutex);
            compute(hold);
            pthread_mutex_unlock(&forking.m.mutex);
            compute(hold / 10);
        }
    };
    std::thread holder(turns, 50us), spinner(turns, 0us);
    for (int i = 0; i < 40; i++) {
        forking.child = 0;
        usleep(1000);
        pthread_kill(spinner.native_handle(), SIGUSR1);
        ASSERT_TRUE(eventually([] { return forking.child != 0; }));
        int wait_status = -1;
        waitpid(forking.child, &wait_status, 0);
        EXPECT_EQ(wait_status, 0);
        if (wait_status != 0) break;
    }
    stop = true;
    holder.join();
    spinner.join();
    signal(SIGUSR1, SIG_DFL);
}

// ---- what the C library does by itself ----

TEST_F(Preload, AMutexMayBeTheCLibrarysAndOursAtTheSameTime) {
    // mtx_lock() is bound to glibc's own functions, and a plain mtx_t is a normal pthread_mutex_t.
    static_assert(sizeof(mtx_t) == sizeof(pthread_mutex_t));
    mtx_t both;
    mtx_init(&both, mtx_timed);
    auto* mutex = reinterpret_cast<pthread_mutex_t*>(&both);
    TestMutex counter(kKinds[0]);
    std::atomic<long> expected{0};
    pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
    run_threads(6, [&](int me) {
        for (int i = 0; i < 3000; i++) {
            timespec t;
            bool got;
            if (me % 2 == 0)
                got = pthread_mutex_lock(mutex) == 0;
            else if (i % 3 == 0)
                got = mtx_timedlock(&both, &(t = after(1ms))) == thrd_success;
            else
                got = mtx_lock(&both) == thrd_success;
            if (!got) continue;
            counter.enter();
            expected++;
            if (i % 8 == 0) compute(5us);
            counter.leave();
            if (i % 16 == 0) pthread_cond_timedwait(&changed, mutex, &(t = after(0ms)));
            if ((me + i) % 3 == 0)
                mtx_unlock(&both);
            else
                pthread_mutex_unlock(mutex);
        }
    });
    EXPECT_EQ(counter.turns, expected);
    EXPECT_EQ(pthread_mutex_destroy(mutex), 0);
}

TEST_F(Preload, C11Mutexes) {
    mtx_t mutex;
    ASSERT_EQ(mtx_init(&mutex, mtx_plain | mtx_recursive), thrd_success);
    EXPECT_EQ(mtx_lock(&mutex), thrd_success);
    EXPECT_EQ(mtx_trylock(&mutex), thrd_success);
    std::thread([&] { EXPECT_EQ(mtx_trylock(&mutex), thrd_busy); }).join();
    EXPECT_EQ(mtx_unlock(&mutex), thrd_success);
    EXPECT_EQ(mtx_unlock(&mutex), thrd_success);
    mtx_destroy(&mutex);
}

TEST_F(Preload, ReadWriteLocks) {
    std::shared_timed_mutex lock;
    int value = 0;
    run_threads(4, [&](int me) {
        for (int i = 0; i < 3000; i++) {
            if ((me + i) % 4 == 0) {
                std::unique_lock guard(lock);
                value++;
                if (i % 32 == 0) sched_yield();
                value++;
            } else {
                std::shared_lock guard(lock);
                EXPECT_EQ(value % 2, 0);
            }
        }
    });
    EXPECT_EQ(value, 2 * 3000);
}

TEST_F(Preload, StandardCpp) {
    std::mutex plain;
    std::recursive_mutex recursive;
    std::timed_mutex timed;
    std::condition_variable changed;
    long value = 0;
    run_threads(4, [&](int) {
        for (int i = 0; i < 2000; i++) {
            std::scoped_lock all(plain, recursive, timed);
            std::lock_guard again(recursive);
            value++;
        }
        std::unique_lock guard(plain);
        changed.notify_all();
        EXPECT_TRUE(changed.wait_for(guard, 20s, [&] { return value == 8000; }));
    });
}

// ---- cancellation, errno, ends ----

TEST_F(Preload, LockingIsNoCancellationPoint) {
    TestMutex m(kKinds[0]);
    for (int i = 0; i < 20; i++) {
        std::atomic<bool> ready{false}, locked{false};
        pthread_mutex_lock(&m.mutex);
        std::thread thread([&] {
            pthread_cancel(pthread_self());
            ready = true;
            pthread_mutex_lock(&m.mutex);  // its first one: it enters the mirror, too
            locked = true;
            pthread_mutex_unlock(&m.mutex);
            pthread_testcancel();
        });
        while (!ready) sched_yield();
        if (i % 2 == 0) usleep(1000);
        pthread_mutex_unlock(&m.mutex);
        thread.join();
        EXPECT_TRUE(locked);
    }
}

TEST_F(Preload, ACancelledWaitForAConditionHoldsTheMutexInItsCleanup) {
    struct Both {
        pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
        pthread_cond_t never = PTHREAD_COND_INITIALIZER;
        std::atomic<int> waiting{0}, cleaned{0};
    } both;
    std::vector<pthread_t> threads(3);
    for (pthread_t& thread : threads)
        pthread_create(
            &thread, nullptr,
            [](void* arg) -> void* {
                Both& b = *static_cast<Both*>(arg);
                pthread_mutex_lock(&b.mutex);
                pthread_cleanup_push(
                    [](void* arg) {
                        Both& b = *static_cast<Both*>(arg);
                        EXPECT_EQ(pthread_mutex_trylock(&b.mutex), EBUSY);
                        b.cleaned++;
                        EXPECT_EQ(pthread_mutex_unlock(&b.mutex), 0);
                    },
                    arg);
                b.waiting++;
                for (;;) pthread_cond_wait(&b.never, &b.mutex);
                pthread_cleanup_pop(0);
            },
            &both);
    EXPECT_TRUE(eventually([&] { return both.waiting == 3; }));
    pthread_mutex_lock(&both.mutex);  // they wait, now
    for (const pthread_t thread : threads) pthread_cancel(thread);
    usleep(2000);
    pthread_mutex_unlock(&both.mutex);
    for (const pthread_t thread : threads) pthread_join(thread, nullptr);
    EXPECT_EQ(both.cleaned, 3);
    EXPECT_EQ(pthread_mutex_destroy(&both.mutex), 0);
}

TEST_F(Preload, ErrnoIsLeftAlone) {
    TestMutex m(kKinds[0]);
    run_threads(3, [&](int) {
        for (int i = 0; i < 500; i++) {
            errno = 4711;
            pthread_mutex_lock(&m.mutex);
            if (i % 50 == 0) usleep(200);
            if (errno != EINTR && errno != 4711) ADD_FAILURE() << errno;
            errno = 4711;
            pthread_mutex_unlock(&m.mutex);
            EXPECT_EQ(errno, 4711);
        }
    });
}

TEST_F(Preload, AProgramMayEndWithAMutexHeldAndThreadsWaiting) {
    for (const bool by_exit : {true, false}) {
        Child child([&] {
            static TestMutex m(kKinds[0]);
            static std::atomic<int> started{0};
            for (int i = 0; i < 3; i++)
                std::thread([] {
                    started++;
                    pthread_mutex_lock(&m.mutex);
                    sleep(100);
                }).detach();
            while (started < 3) usleep(100);
            usleep(2000);
            alarm(10);
            if (by_exit) exit(7);
            _exit(7);
        });
        const int wait_status = child.wait();
        EXPECT_TRUE(WIFEXITED(wait_status));
        EXPECT_EQ(WEXITSTATUS(wait_status), 7);
    }
}

TEST_F(Preload, AMutexMayBeGoneAfterItsLastUnlock) {
    // Its page is unmapped as soon as the mutex can be taken, when the unlock before may still be on its way back.
    for (int i = 0; i < 300; i++) {
        void* page = mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        auto* mutex = new (page) pthread_mutex_t(PTHREAD_MUTEX_INITIALIZER);
        pthread_mutex_lock(mutex);
        std::atomic<bool> go{false};
        std::thread other([&] {
            go = true;
            pthread_mutex_lock(mutex);
            pthread_mutex_unlock(mutex);
            pthread_mutex_destroy(mutex);
            munmap(page, 4096);
        });
        while (!go) sched_yield();
        if (i % 3 == 0) usleep(300);
        pthread_mutex_unlock(mutex);
        other.join();
    }
}

TEST_F(Preload, NobodyStarves) {
    TestMutex m(kKinds[0]);
    std::atomic<bool> stop{false};
    double longest = 0;
    run_threads(5, [&](int me) {
        if (me == 0) {
            for (int i = 0; i < 20; i++) {
                const double before = seconds();
                pthread_mutex_lock(&m.mutex);
                longest = std::max(longest, seconds() - before);
                pthread_mutex_unlock(&m.mutex);
                usleep(1000);
            }
            stop = true;
        }
        while (!stop) {
            pthread_mutex_lock(&m.mutex);
            compute(50us);
            pthread_mutex_unlock(&m.mutex);
        }
    });
    EXPECT_LT(longest, 10);
}

TEST_F(Preload, WaitersOfASleepingOwnerSleep) {
    TestMutex m(kKinds[0]);
    pthread_mutex_lock(&m.mutex);
    const auto cpu_seconds = [] {
        timespec t;
        clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
        return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_nsec) * 1e-9;
    };
    std::vector<std::thread> waiters;
    const double before = cpu_seconds();
    for (int i = 0; i < 4; i++)
        waiters.emplace_back([&] {
            pthread_mutex_lock(&m.mutex);
            pthread_mutex_unlock(&m.mutex);
        });
    usleep(300'000);
    EXPECT_LT(cpu_seconds() - before, 0.1);
    pthread_mutex_unlock(&m.mutex);
    for (std::thread& t : waiters) t.join();
}

// ---- before constructors, and the words ----

pthread_mutex_t early_mutex = PTHREAD_MUTEX_INITIALIZER;
int early_results[3] = {-1, -1, -1};

// Runs before the constructor of any library but those that a library depends on.
void lock_early(int, char**, char**) {
    early_results[0] = pthread_mutex_lock(&early_mutex);
    early_results[1] = pthread_mutex_trylock(&early_mutex);
    early_results[2] = pthread_mutex_unlock(&early_mutex);
}
[[gnu::section(".preinit_array"), gnu::used]] void (*const preinit)(int, char**, char**) = lock_early;

TEST_F(Preload, CallsBeforeAnyConstructor) {
    EXPECT_EQ(early_results[0], 0);
    EXPECT_EQ(early_results[1], EBUSY);
    EXPECT_EQ(early_results[2], 0);
}

std::string library() {
    std::string path = test::schedmirror_path();
    return path.replace(path.rfind('/'), std::string::npos, "/libadaptive_pthread.so");
}

TEST_F(Preload, TheWordsAreRead) {
    const std::string preload = "LD_PRELOAD=" + library();
    EXPECT_EQ(test::shell(preload + " /bin/echo hello").output, "hello\n");
    const std::string help = test::shell("ADAPTIVE_PTHREAD=help " + preload + " /bin/true").output;
    EXPECT_NE(help.find("rseq"), std::string::npos) << help;
    const test::Outcome unknown = test::shell("ADAPTIVE_PTHREAD=sats " + preload + " /bin/echo hello");
    EXPECT_NE(unknown.output.find("unknown word 'sats'"), std::string::npos) << unknown.output;
    EXPECT_NE(unknown.output.find("hello"), std::string::npos);
    EXPECT_EQ(unknown.exit_code, 0);
    const std::string stats = test::shell("ADAPTIVE_PTHREAD=blind,stats " + preload + " /bin/true").output;
    EXPECT_NE(stats.find("active, source none"), std::string::npos) << stats;
}

// ---- fork() in other libraries' company ----

// One that holds its mutex over fork(), and registers its handlers before this program's first thread.
pthread_mutex_t over_fork = PTHREAD_MUTEX_INITIALIZER;
void lock_over_fork() {
    pthread_mutex_lock(&over_fork);
}
void unlock_over_fork() {
    pthread_mutex_unlock(&over_fork);
}

// In a process of its own: its first fork is made by a thread that has or has not used a mutex before.
int fork_as(const std::string& who) {
    alarm(5);
    pthread_atfork(lock_over_fork, unlock_over_fork, unlock_over_fork);
    std::thread([] { lock_over_fork(), unlock_over_fork(); }).join();
    std::thread([] {
        for (;;) lock_over_fork(), usleep(100), unlock_over_fork(), usleep(100);
    }).detach();
    int forked = -1;
    const auto daemonize = [&] {  // forks twice
        const pid_t child = fork();
        if (child == 0) {
            alarm(4);
            const pid_t grandchild = fork();
            if (grandchild == 0)
                _exit((alarm(3), lock_over_fork(), unlock_over_fork(), free(malloc(100)), 0));
            int status = -1;
            waitpid(grandchild, &status, 0);
            _exit(status == 0 ? 0 : 1);
        }
        waitpid(child, &forked, 0);
    };
    usleep(20000);
    if (who == "old") lock_over_fork(), unlock_over_fork();
    if (who == "thread")
        std::thread(daemonize).join();
    else
        daemonize();
    return forked == 0 ? 0 : 1;
}

// In a process of its own, which takes all keys of the C library before its first thread. 0: the first is as it was.
int take_all_keys() {
    pthread_key_t first, key;
    if (pthread_key_create(&first, nullptr) != 0) return 1;
    while (pthread_key_create(&key, nullptr) == 0) continue;
    pthread_setspecific(first, &first);
    std::thread([] { lock_over_fork(), unlock_over_fork(); }).join();
    lock_over_fork();
    unlock_over_fork();
    return pthread_getspecific(first) == &first ? 0 : 2;
}

TEST_F(Preload, AllKeysMayBeTaken) {
    const test::Outcome outcome =
        test::shell("PRELOAD_TEST_DO=keys exec /proc/" + std::to_string(getpid()) + "/exe");
    EXPECT_EQ(outcome.exit_code, 0) << outcome.output;
}

TEST_F(Preload, ForkWaitsForNobody) {
    std::vector<std::string> allocators = {""};
    // It has its locks, and holds them over fork() as well. If it is not installed the loader says so.
    const std::string jemalloc = "libjemalloc.so.2";
    if (test::shell("LD_PRELOAD=" + jemalloc + " exec /bin/true").output.empty())
        allocators.push_back(jemalloc + ":");
    const char* preload = getenv("LD_PRELOAD");
    for (const std::string& allocator : allocators)
        for (const std::string who : {"new", "old", "thread"}) {
            const test::Outcome outcome = test::shell("PRELOAD_TEST_DO=" + who + " LD_PRELOAD=" + allocator +
                                                      (preload != nullptr ? preload : "") + " exec /proc/" +
                                                      std::to_string(getpid()) + "/exe");
            EXPECT_EQ(outcome.exit_code, 0) << allocator << who << ": " << outcome.output;
        }
}

// ---- running itself ----

int run_all(const std::vector<std::string>& arguments) {
    const std::string dir = "/sys/fs/bpf/preload_test_" + std::to_string(getpid());
    const std::string schedmirror = test::schedmirror_path() + " --dir " + dir + " ";
    int failed = 0;
    for (const std::string run : {"stock", "off", "blind", "rseq", "bpf"}) {
        std::string environment = "PRELOAD_TEST_HOW=" + run, more;
        if (run != "stock") environment += " LD_PRELOAD=" + library() + " ADAPTIVE_PTHREAD=stats," + run;
        if (run == "bpf") {
            environment += "=" + dir;
            const test::Outcome loaded = test::shell(schedmirror + "load --slots 200 --group root");
            if (loaded.exit_code != 0) {
                setenv("PRELOAD_TEST_SKIP", ("no BPF here: " + loaded.output).c_str(), 1);
                more = " --gtest_filter=Preload.IsWhatWasAskedFor";
            }
        }
        std::string command = environment + " exec";
        for (const std::string& argument : arguments) command += " '" + argument + "'";
        printf("==== %s\n", run.c_str());
        fflush(stdout);
        if (system((command + more).c_str()) != 0) failed++;
        if (run == "bpf") test::shell(schedmirror + "unload");
    }
    return failed;
}

}  // namespace

int main(int argc, char** argv) {
    if (const char* what = getenv("PRELOAD_TEST_DO"); what != nullptr)
        return strcmp(what, "keys") == 0 ? take_all_keys() : fork_as(what);
    const std::vector<std::string> arguments(argv, argv + argc);
    testing::InitGoogleTest(&argc, argv);
    if (*how() == 0 && !testing::GTEST_FLAG(list_tests)) return run_all(arguments) == 0 ? 0 : 1;
    return RUN_ALL_TESTS();
}
