// The registration behind the locks: which mirror is used, and why not a better one; threads that come and go;
// fork.
#include "lock/this_task.h"

#include <dlfcn.h>
#include <pthread.h>
#include <sys/resource.h>

#include <climits>

#include "lock/mutex.h"
#include "lock_test.h"

#if !defined(__SANITIZE_THREAD__) && \
    !defined(__SANITIZE_ADDRESS__)  // which have functions of their own there
#define CAN_FAIL
// In the place of the C library's: what the environment names has nothing left to give.
namespace {
bool fails(const char* function) {
    const char* name = getenv("THIS_TASK_TEST_FAILS");
    return name != nullptr && strcmp(name, function) == 0;
}
template <class Function>
Function behind(Function, const char* name) {
    return reinterpret_cast<Function>(dlsym(RTLD_NEXT, name));
}
}  // namespace
extern "C" {
int pthread_key_create(pthread_key_t* key, void (*destructor)(void*)) noexcept {
    const bool is_ours = destructor != nullptr && destructor != testing::internal::DeleteThreadLocalValue;
    if (is_ours && fails("pthread_key_create")) return EAGAIN;
    return behind(&pthread_key_create, "pthread_key_create")(key, destructor);
}
int pthread_setspecific(pthread_key_t key, const void* value) noexcept {
    if (value == &adaptive::internal::this_task_of_thread && fails("pthread_setspecific")) return ENOMEM;
    return behind(&pthread_setspecific, "pthread_setspecific")(key, value);
}
int __register_atfork(void (*prepare)(), void (*parent)(), void (*child)(), void* of_whom) noexcept;
extern void* __dso_handle;
int pthread_atfork(void (*prepare)(), void (*parent)(), void (*child)()) noexcept {
    if (fails("pthread_atfork")) return ENOMEM;
    return __register_atfork(prepare, parent, child, __dso_handle);
}
}
#endif

namespace adaptive::test {
namespace {

using Wanted = MirrorChoice::Wanted;
constexpr Sharing kPrivate = Sharing::process_private, kShared = Sharing::process_shared;

// A library that holds its mutex over fork(), so that its child finds it free: pthread_atfork()'s usual use. Its
// handlers are registered before this process's first lock.
constinit Mutex over_fork;
bool holds_over_fork = false;
[[gnu::constructor]] void register_handlers() {
    const auto prepare = [] {
        if (holds_over_fork) over_fork.lock();
    };
    const auto after = [] {
        if (holds_over_fork) over_fork.unlock();
    };
    pthread_atfork(prepare, after, after);
}

// Forks, and the child again. 0: both children could lock.
int fork_twice() {
    return Child([] {
               alarm(5);
               over_fork.lock();
               over_fork.unlock();
               _exit(Child([] {
                         over_fork.lock();
                         _exit(0);
                     }).wait());
           })
        .wait();
}

class ThisTaskTest : public WithSource {
    TimeLimit limit_{60};
};
INSTANTIATE_FOR_SOURCES(ThisTaskTest);

TEST_P(ThisTaskTest, EntersByItself) {
    std::thread([] {
        ThisTask& task = this_task();
        EXPECT_EQ(task.tid(), static_cast<uint32_t>(gettid()));
        EXPECT_EQ(task.slot(kPrivate) != 0, GetParam() != Source::off);
        EXPECT_EQ(task.slot(kShared), task.slot(kPrivate)) << "these tables reach all processes";
        EXPECT_EQ(task.find(task.tid(), kPrivate), task.slot(kPrivate));
        EXPECT_EQ(task.find(0, kPrivate), 0);
        EXPECT_EQ(&this_task(), &task);
    }).join();
}

TEST_P(ThisTaskTest, LeavesWithItsThread) {
    const MirrorInUse before = mirror_in_use();
    for (int i = 0; i < 20; i++)
        std::thread([&] {
            // Destroyed before the thread's registration is given back.
            struct LocksLate {
                Mutex mutex;
                ~LocksLate() { mutex.lock(), mutex.unlock(); }
            };
            thread_local LocksLate late;
            late.mutex.lock();
            EXPECT_EQ(mirror_in_use().used, before.used + (GetParam() != Source::off ? 1 : 0));
            late.mutex.unlock();
        }).join();
    EXPECT_EQ(mirror_in_use().used, before.used);
}

TEST_P(ThisTaskTest, SeesOthersRunAndSleep) {
    if (GetParam() == Source::off) return;
    std::atomic<SlotId> slot{0};
    std::atomic<bool> stop{false};
    std::thread sleeper([&] {
        slot = this_task().slot(kPrivate);
        while (!stop) usleep(1000);
    });
    ASSERT_TRUE(eventually([&] { return slot != 0; }));
    EXPECT_TRUE(GetParam() == Source::rseq ||
                eventually([&] { return this_task().look(slot, kPrivate) == SchedState::blocked; }));
    stop = true;
    sleeper.join();
}

TEST_P(ThisTaskTest, AForkedChildEntersAnew) {
    (void)this_task();
    const SlotId parents = this_task().slot(kShared);
    const pid_t parent = getpid();
    Child child([&] {
        const ThisTask& task = this_task();
        const bool ok = task.tid() == static_cast<uint32_t>(gettid()) && getpid() != parent &&
                        (parents == 0 || (task.slot(kShared) != 0 && task.slot(kShared) != parents));
        Child grandchild([&] { _exit(this_task().tid() == static_cast<uint32_t>(gettid()) ? 0 : 1); });
        _exit(ok && grandchild.wait() == 0 ? 0 : 1);
    });
    EXPECT_EQ(child.wait(), 0);
    EXPECT_EQ(this_task().slot(kShared), parents);
}

// Locks are taken in the handlers of fork(): by a thread that has entered or has not, whose mirror is there or gone.
TEST_P(ThisTaskTest, ForkWaitsForNobody) {
    enum { kNew, kEntered, kUnloaded };
    for (const int who : {kNew, kEntered, kUnloaded}) {
        if (who == kUnloaded && GetParam() != Source::bpf) continue;
        Child process([&] {
            alarm(5);
            holds_over_fork = true;
            std::atomic<bool> stop{false};
            std::thread other([&] {
                while (!stop) over_fork.lock(), usleep(100), over_fork.unlock(), usleep(100);
            });
            usleep(5000);
            int forked = -1;
            std::thread([&] {
                if (who != kNew) over_fork.lock(), over_fork.unlock();
                if (who == kUnloaded) schedmirror("unload");
                forked = fork_twice();
            }).join();
            stop = true;
            other.join();
            _exit(forked == 0 ? 0 : 1);
        });
        EXPECT_EQ(process.wait(), 0) << who;
    }
}

TEST_P(ThisTaskTest, TheMirrorIsNotTakenFromThreadsThatUseIt) {
    if (GetParam() == Source::off) return;
    std::atomic<bool> entered{false}, stop{false};
    std::thread other([&] {
        (void)this_task();
        entered = true;
        while (!stop) usleep(1000);
    });
    ASSERT_TRUE(eventually([&] { return entered.load(); }));
    Error error = {};
    EXPECT_FALSE(use_mirror({.wanted = Wanted::off}, &error));
    EXPECT_NE(strstr(error.text, "other threads"), nullptr) << error.text;
    EXPECT_EQ(mirror_in_use().source, GetParam());
    stop = true;
    other.join();
    EXPECT_TRUE(use_mirror({.wanted = Wanted::off}, &error)) << error.text;
    EXPECT_EQ(this_task().slot(kPrivate), 0);
}

TEST_P(ThisTaskTest, AnUnloadedMirrorIsNoticedAndLocksGoOn) {
    if (GetParam() != Source::bpf) return;
    Mutex mutex;
    mutex.lock();
    mutex.unlock();
    ASSERT_NE(this_task().slot(kPrivate), 0);
    ASSERT_EQ(schedmirror("unload").exit_code, 0);
    mutex.lock();
    EXPECT_EQ(this_task().slot(kPrivate), 0);
    EXPECT_EQ(this_task().look(1, kPrivate), SchedState::unknown);
    mutex.unlock();
    ASSERT_EQ(schedmirror("load --slots 100 --group root").exit_code, 0);
    Error error = {};
    EXPECT_TRUE(use_mirror({.wanted = Wanted::bpf, .bpf_dir = dir.c_str()}, &error)) << error.text;
    EXPECT_NE(this_task().slot(kPrivate), 0);
}

TEST(MirrorChoiceTest, SaysWhyNotABetterOne) {
    Error error = {};
    const MirrorChoice nowhere = {.wanted = Wanted::bpf, .bpf_dir = "/sys/fs/bpf/no_such_mirror"};
    ASSERT_TRUE(use_mirror({.wanted = Wanted::off}, &error));
    EXPECT_FALSE(use_mirror(nowhere, &error));
    EXPECT_NE(strstr(error.text, "schedmirror load"), nullptr) << error.text;
    EXPECT_EQ(mirror_in_use().source, Source::off) << "nothing has changed";

    ASSERT_TRUE(use_mirror({.bpf_dir = nowhere.bpf_dir}, &error)) << error.text;
    const MirrorInUse status = mirror_in_use();
    EXPECT_NE(strstr(status.why_not_bpf.text, "schedmirror load"), nullptr) << status.why_not_bpf.text;
    if (status.source == Source::off) {
        EXPECT_STRNE(status.why_not_rseq.text, "");
    } else {
        EXPECT_EQ(status.source, Source::rseq);
        EXPECT_FALSE(status.across_processes) << "a table of this process's own";
        EXPECT_NE(this_task().slot(kPrivate), 0);
        EXPECT_EQ(this_task().slot(kShared), 0) << "nobody else can look this one up";
        EXPECT_EQ(this_task().look(this_task().slot(kPrivate), kShared), SchedState::unknown);
    }
    EXPECT_TRUE(use_mirror({.wanted = Wanted::off}, &error));
}

TEST(MirrorChoiceTest, AFullTableLeavesThreadsWithoutASlot) {
    alignas(64) static char table[(3 + 64) * 64];
    Mirror::rseq_format(table, 3, 64);
    Error error = {};
    if (!use_mirror({.wanted = Wanted::rseq, .rseq_table = table}, &error)) GTEST_SKIP() << error.text;
    ASSERT_NE(this_task().slot(kPrivate), 0);
    std::atomic<int> entered{0};
    Mutex mutex;
    run_threads(3, [&](int) {
        entered++;
        for (int i = 0; i < 1000; i++) mutex.lock(), mutex.unlock();
        while (entered < 3) usleep(1000);
    });
    EXPECT_NE(strstr(mirror_in_use().refused.text, "taken"), nullptr) << mirror_in_use().refused.text;
    EXPECT_TRUE(use_mirror({.wanted = Wanted::off}, &error)) << error.text;
}

// What this thread has used: CPU seconds, and how often it slept.
struct Used {
    double cpu;
    long sleeps;
};
Used used_so_far() {
    timespec cpu;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &cpu);
    rusage usage;
    getrusage(RUSAGE_THREAD, &usage);
    return {static_cast<double>(cpu.tv_sec) + 1e-9 * static_cast<double>(cpu.tv_nsec), usage.ru_nvcsw};
}

// A table of the process's own has room for every thread, and entering it does not depend on how many there are: it
// takes little time and waits for nobody. Whether the thread then has a CPU is not the table's doing, so that time is left out.
TEST(MirrorChoiceTest, ThousandsOfThreadsEnterAtOnce) {
    TimeLimit limit(100);
#ifdef __SANITIZE_THREAD__  // everything takes longer
    constexpr int kThreads = 500, kBlock = 500;
    constexpr double kLongest = 1e-3;
#else
    constexpr int kThreads = 3000, kBlock = 500;
    constexpr double kLongest = 50e-6;
#endif
    Error error = {};
    if (!use_mirror({.wanted = Wanted::rseq}, &error)) GTEST_SKIP() << error.text;
    std::atomic<int> entered{0}, without{0};
    std::atomic<bool> stop{false};
    std::vector<pthread_t> threads(kThreads);
    std::vector<Used> used(kThreads);
    struct Argument {
        std::atomic<int>&entered, &without;
        std::atomic<bool>& stop;
        Used& used;
    };
    std::vector<Argument> arguments;
    for (int i = 0; i < kThreads; i++) arguments.push_back({entered, without, stop, used[i]});
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, 65536);
    const auto body = [](void* argument) -> void* {
        auto& a = *static_cast<Argument*>(argument);
        Mutex mutex;
        const Used before = used_so_far();
        mutex.lock();
        mutex.unlock();
        const Used after = used_so_far();
        a.used = {after.cpu - before.cpu, after.sleeps - before.sleeps};
        a.without += this_task().slot(kPrivate) == 0;
        a.entered++;
        a.stop.wait(false);
        return nullptr;
    };
    for (int i = 0; i < kThreads; i++) {
        ASSERT_EQ(pthread_create(&threads[i], &attributes, body, &arguments[i]), 0);
        if (i % kBlock == kBlock - 1) {
            ASSERT_TRUE(eventually([&] { return entered == i + 1; }, 60));
        }
    }
    EXPECT_EQ(without, 0);
    EXPECT_EQ(mirror_in_use().used, kThreads + 1u);
    stop = true;
    stop.notify_all();
    for (const pthread_t thread : threads) pthread_join(thread, nullptr);
    EXPECT_EQ(mirror_in_use().used, 1u);
    for (int from = 0; from < kThreads; from += kBlock) {
        Used sum = {};
        for (int i = from; i < from + kBlock; i++) sum.cpu += used[i].cpu, sum.sleeps += used[i].sleeps;
        EXPECT_LE(sum.cpu / kBlock, kLongest) << "threads " << from << " to " << from + kBlock;
        // What all wait for makes most of them sleep. On a busy machine some do inside the kernel.
        EXPECT_LE(sum.sleeps, kBlock / 2) << "threads " << from << " to " << from + kBlock;
        printf("threads %d to %d: first lock %.1f us, %ld sleeps\n", from, from + kBlock,
               sum.cpu / kBlock * 1e6, sum.sleeps);
    }
    EXPECT_TRUE(use_mirror({.wanted = Wanted::off}, &error)) << error.text;
}

#ifdef CAN_FAIL
// What the C library has no more of is missed by nobody but those who look at others.
TEST(MirrorChoiceTest, WithoutWhatTellsOfAThreadsEndThereAreNoSlots) {
    for (const char* function : {"pthread_key_create", "pthread_setspecific", "pthread_atfork"}) {
        const ::test::Outcome outcome =
            ::test::shell("THIS_TASK_TEST_FAILS=" + std::string(function) + " /proc/" +
                          std::to_string(getpid()) + "/exe --gtest_filter=WithoutAnEnd.LocksWork");
        EXPECT_EQ(outcome.exit_code, 0) << function << ": " << outcome.output;
    }
}

// Nothing to see here, except when run again by the test above.
TEST(WithoutAnEnd, LocksWork) {
    const char* function = getenv("THIS_TASK_TEST_FAILS");
    if (function == nullptr) return;
    pthread_key_t first = 0;  // the program's own
    const bool has_key = pthread_key_create(&first, nullptr) == 0;
    if (has_key) pthread_setspecific(first, &first);
    Error error = {};
    if (!use_mirror({.wanted = Wanted::rseq}, &error)) GTEST_SKIP() << error.text;
    Mutex mutex;
    int turns = 0;
    run_threads(4, [&](int) {
        for (int i = 0; i < 1000; i++) mutex.lock(), turns++, mutex.unlock();
        EXPECT_EQ(this_task().slot(kPrivate), 0);
    });
    EXPECT_EQ(turns, 4000);
    const MirrorInUse status = mirror_in_use();
    EXPECT_EQ(status.source, Source::rseq);
    EXPECT_EQ(status.used, 0u);
    EXPECT_NE(strstr(status.refused.text, function), nullptr) << status.refused.text;
    EXPECT_TRUE(!has_key || pthread_getspecific(first) == &first);
    EXPECT_TRUE(use_mirror({.wanted = Wanted::off}, &error)) << error.text;
}
#endif

TEST(DeadlineTest, ExtremesDoNotWrap) {
    EXPECT_TRUE(Deadline::in(std::chrono::hours::max()).is_never());
    EXPECT_TRUE(Deadline::in(std::chrono::nanoseconds::max()).is_never());
    EXPECT_TRUE(Deadline::in(std::chrono::hours::min()).passed());
    EXPECT_TRUE(Deadline::at(std::chrono::steady_clock::time_point::max()).is_never());
    EXPECT_TRUE(Deadline::at(std::chrono::system_clock::time_point::min()).passed());
    EXPECT_FALSE(Deadline::never().passed());
    EXPECT_GE(Deadline::in(std::chrono::duration<double>(0.5)).left(), 400'000'000);
}

}  // namespace
}  // namespace adaptive::test
