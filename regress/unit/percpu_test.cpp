// Per-CPU critical sections: exact under preemption, migration and signals, at every level of optimisation and
// in shared objects, with rseq and without; aborts seen; nothing left behind.
#include "percpu/percpu.h"

#include <dlfcn.h>
#include <gtest/gtest.h>
#include <sys/auxv.h>
#include <sys/syscall.h>

#include <array>
#include <atomic>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "percpu/ops.h"
#include "private_mirror.h"
#include "processes.h"

using namespace adaptive;
using test::PerCpuOps;

namespace {

constexpr size_t kLane = 128, kCounter = 0, kSlots = 8, kList = 64;  // offsets in a lane

bool expect_rseq() {
#ifdef __SANITIZE_THREAD__
    return false;  // see PerCpu::here()
#endif
    return rseq_area() != nullptr && getenv("NO_RSEQ") == nullptr;
}

// Lanes in memory that forked children share.
struct Lanes : PerCpu {
    Lanes() : Lanes(possible_cpus()) {}
    explicit Lanes(uint32_t cpus) : PerCpu(map(bytes(kLane, cpus)), kLane, cpus) {}
    static void* map(size_t size) {
        return mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    }
};

// The shared object built at one level of optimisation.
struct Library {
    void* handle;
    const PerCpuOps* ops;

    explicit Library(int level) {
        std::string path = test::schedmirror_path();
        path.replace(path.rfind('/'), std::string::npos,
                     "/lib/libpercpu_ops_O" + std::to_string(level) + ".so");
        handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
        EXPECT_NE(handle, nullptr) << dlerror();
        ops = handle != nullptr ? static_cast<const PerCpuOps*>(dlsym(handle, "percpu_ops")) : nullptr;
    }
    ~Library() {
        if (handle != nullptr) dlclose(handle);
    }
};

// What the signal handlers of a storm do.
thread_local void (*on_storm)(void*) = nullptr;
thread_local void* storm_argument = nullptr;

void handle_storm(int) {
    if (on_storm != nullptr) on_storm(storm_argument);
}

// SIGALRM at the calling thread, every so many microseconds.
class Storm {
  public:
    Storm(long microseconds, void (*body)(void*), void* argument) {
        struct sigaction action = {};
        action.sa_handler = handle_storm;
        action.sa_flags = SA_RESTART;
        sigaction(SIGALRM, &action, nullptr);
        storm_argument = argument;
        on_storm = body;
        sigevent event = {};
        event.sigev_notify = SIGEV_THREAD_ID;
        event.sigev_signo = SIGALRM;
        event._sigev_un._tid = gettid();
        EXPECT_EQ(timer_create(CLOCK_MONOTONIC, &event, &timer_), 0);
        const itimerspec every = {{0, microseconds * 1000}, {0, microseconds * 1000}};
        timer_settime(timer_, 0, &every, nullptr);
    }
    ~Storm() {
        timer_delete(timer_);
        on_storm = nullptr;
    }

  private:
    timer_t timer_;
};

// Runs body(index, stop) in more threads than there are CPUs, and moves them about meanwhile.
template <typename Body>
void under_fire(double duration, Body body) {
    const int cpus = static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN));
    const int count = 3 * cpus;
    std::atomic<bool> stop{false};
    std::vector<std::atomic<pid_t>> tids(static_cast<size_t>(count));
    std::vector<std::thread> threads;
    for (int i = 0; i < count; i++)
        threads.emplace_back([&, i] {
            tids[static_cast<size_t>(i)] = gettid();
            body(i, stop);
        });
    std::mt19937 random(1);
    for (const double end = test::seconds() + duration; test::seconds() < end; usleep(200)) {
        const pid_t tid = tids[random() % tids.size()];
        cpu_set_t set;
        CPU_ZERO(&set);
        CPU_SET(random() % static_cast<unsigned>(cpus), &set);
        if (tid != 0) sched_setaffinity(tid, sizeof(set), &set);
    }
    stop = true;
    for (std::thread& thread : threads) thread.join();
}

// ---- the sequences themselves, on an area that no kernel keeps ----

TEST(Sequences, DoWhatTheySayAndLeaveTheRest) {
    RseqArea area = {};
    area.cpu_id = 3;
    uint64_t word = 40;
    EXPECT_EQ(rseq_add(&area, 3, &word, 2), RseqEnd::done);
    EXPECT_EQ(word, 42u);
    EXPECT_NE(area.rseq_cs, 0u) << "the kernel was told";
    EXPECT_EQ(area.rseq_cs % 32, 0u);
    EXPECT_EQ(rseq_add(&area, 2, &word, 2), RseqEnd::moved);
    EXPECT_EQ(word, 42u);
    EXPECT_EQ(rseq_compare_store(&area, 3, &word, 41, 7), RseqEnd::mismatch);
    EXPECT_EQ(rseq_compare_store(&area, 2, &word, 42, 7), RseqEnd::moved);
    EXPECT_EQ(word, 42u);
    EXPECT_EQ(rseq_compare_store(&area, 3, &word, 42, 7), RseqEnd::done);
    EXPECT_EQ(word, 7u);

    uint64_t head = 0;
    PerCpuNode a = {}, b = {};
    void* popped = &area;
    EXPECT_EQ(rseq_pop(&area, 3, &head, &popped), RseqEnd::mismatch);
    EXPECT_EQ(rseq_push(&area, 3, &head, &a), RseqEnd::done);
    EXPECT_EQ(rseq_push(&area, 2, &head, &b), RseqEnd::moved);
    EXPECT_EQ(rseq_push(&area, 3, &head, &b), RseqEnd::done);
    EXPECT_EQ(b.next, &a);
    EXPECT_EQ(a.next, nullptr);
    EXPECT_EQ(rseq_pop(&area, 2, &head, &popped), RseqEnd::moved);
    EXPECT_EQ(rseq_pop(&area, 3, &head, &popped), RseqEnd::done);
    EXPECT_EQ(popped, &b);
    EXPECT_EQ(rseq_pop(&area, 3, &head, &popped), RseqEnd::done);
    EXPECT_EQ(popped, &a);
    EXPECT_EQ(head, 0u);
    EXPECT_EQ(area.cpu_id, 3u);
    EXPECT_EQ(area.flags, 0u);
}

// ---- aborts ----

// Signals in a loop that is mostly inside the sequences: many hit them, nothing is lost. (Of an addition, with
// its two instructions, processors rarely stop in the middle.)
TEST(Aborts, SignalsRestartTheSequence) {
    if (!expect_rseq()) GTEST_SKIP() << "no rseq";
    test::RestoreAffinity restore;
    test::pin_to(0);
    volatile RseqArea* area = rseq_area();
    PerCpuNode nodes[2];
    uint64_t head = 0, aborted = 0, turns = 0, wrong = 0, signals = 0;
    for (PerCpuNode& node : nodes) ASSERT_EQ(rseq_push(area, 0, &head, &node), RseqEnd::done);
    auto until_done = [&](auto sequence) {
        for (RseqEnd end; (end = sequence()) != RseqEnd::done;) {
            wrong += end != RseqEnd::aborted;
            aborted++;
        }
    };
    {
        Storm storm(
            50, [](void* count) { ++*static_cast<uint64_t*>(count); }, &signals);
        for (const double end = test::seconds() + 10; aborted < 100 && test::seconds() < end;)
            for (int i = 0; i < 10000; i++, turns++) {
                void* node = nullptr;
                until_done([&] { return rseq_pop(area, 0, &head, &node); });
                wrong += node != &nodes[1] || head != reinterpret_cast<uintptr_t>(&nodes[0]);
                until_done([&] { return rseq_push(area, 0, &head, node); });
            }
    }
    area->rseq_cs = 0;
    EXPECT_GE(aborted, 100u);
    EXPECT_EQ(wrong, 0u);
    printf("%lu signals, %lu aborts in %lu turns\n", signals, aborted, turns);
}

// A fault in the middle of a pop: the sequence is aborted exactly there, and starts again.
struct Fault {
    static inline void* page;
    static inline volatile int faults;
    static void handle(int, siginfo_t* info, void*) {
        if (info->si_addr != page) _exit(9);
        faults = faults + 1;
        mprotect(page, 4096, PROT_READ | PROT_WRITE);
    }
};

TEST(Aborts, FaultInsideAPop) {
    if (!expect_rseq()) GTEST_SKIP() << "no rseq";
    test::RestoreAffinity restore;
    test::pin_to(0);
    Fault::page = mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    auto* node = static_cast<PerCpuNode*>(Fault::page);
    PerCpuNode below = {};
    struct sigaction action = {}, before;
    action.sa_sigaction = Fault::handle;
    action.sa_flags = SA_SIGINFO;
    sigaction(SIGSEGV, &action, &before);
    volatile RseqArea* area = rseq_area();
    for (int round = 0; round < 20; round++) {
        uint64_t head = 0;
        ASSERT_EQ(rseq_push(area, 0, &head, &below), RseqEnd::done);
        ASSERT_EQ(rseq_push(area, 0, &head, node), RseqEnd::done);
        mprotect(Fault::page, 4096, PROT_NONE);
        Fault::faults = 0;
        void* popped = nullptr;
        ASSERT_EQ(rseq_pop(area, 0, &head, &popped), RseqEnd::aborted);
        EXPECT_EQ(Fault::faults, 1);
        EXPECT_EQ(head, reinterpret_cast<uintptr_t>(node)) << "nothing was changed";
        EXPECT_EQ(area->rseq_cs, 0u) << "cleared by the kernel";
        while (rseq_pop(area, 0, &head, &popped) != RseqEnd::done) continue;
        EXPECT_EQ(popped, node);
        EXPECT_EQ(head, reinterpret_cast<uintptr_t>(&below));
    }
    // And through the whole: one pop, with one abort inside that nobody notices.
    Lanes lanes;
    lanes.push(kList, node);
    mprotect(Fault::page, 4096, PROT_NONE);
    Fault::faults = 0;
    EXPECT_EQ(lanes.pop(kList), node);
    EXPECT_EQ(Fault::faults, 1);
    area->rseq_cs = 0;
    sigaction(SIGSEGV, &before, nullptr);
}

// ---- everything, from shared objects of every level of optimisation ----

class Ops : public ::testing::TestWithParam<int> {
  protected:
    void SetUp() override {
        ASSERT_NE(library.ops, nullptr);
        ASSERT_EQ(ops().restartable(lanes), expect_rseq());
    }
    const PerCpuOps& ops() const { return *library.ops; }

    Library library{GetParam()};
    Lanes lanes;
};

struct Adder {
    const PerCpuOps& ops;
    const PerCpu& lanes;
    uint64_t in_handler = 0;
    static void handle(void* self) {
        auto* adder = static_cast<Adder*>(self);
        adder->ops.add(adder->lanes, kCounter, 1);
        adder->in_handler++;
    }
};

TEST_P(Ops, AddsAreExact) {
    std::atomic<uint64_t> added{0};
    under_fire(0.4, [&](int i, const std::atomic<bool>& stop) {
        Adder adder{ops(), lanes};
        uint64_t mine = 0;
        {
            Storm storm(100 + 30 * i, Adder::handle, &adder);
            for (; !stop; mine += 3) ops().add(lanes, kCounter, 3);
        }
        added += mine + adder.in_handler;
    });
    EXPECT_EQ(lanes.sum(kCounter), added.load());
    if (!expect_rseq()) {
        EXPECT_EQ(lanes.read(lanes.lanes() - 1, kCounter), added.load());
    }
}

TEST_P(Ops, CompareAndStoreIsExact) {
    std::atomic<uint64_t> stored{0}, refused{0};
    under_fire(0.4, [&](int i, const std::atomic<bool>& stop) {
        uint64_t mine = 0, mismatches = 0;
        Storm storm(
            100 + 30 * i, [](void*) {}, nullptr);
        while (!stop) {
            const uint32_t lane = lanes.lane();
            const uint64_t now = lanes.read(lane, kSlots);
            // A while between the look and the store, so that others come between.
            for (int i = 0; i < 20; i++) asm volatile("" ::: "memory");
            const RseqEnd end = ops().compare_store(lanes, lane, kSlots, now, now + 1);
            mine += end == RseqEnd::done;
            mismatches += end == RseqEnd::mismatch;
        }
        stored += mine;
        refused += mismatches;
    });
    EXPECT_EQ(lanes.sum(kSlots), stored.load());
    EXPECT_GT(refused.load(), 0u) << "nobody ever came between";
}

struct Element {
    PerCpuNode node;
    std::atomic<int> owner{0};
};

struct Taker {
    const PerCpuOps& ops;
    const PerCpu& lanes;
    uint64_t pushes = 0, doubled = 0, taken = 0;

    void take_and_put_back() {
        auto* element = reinterpret_cast<Element*>(ops.pop(lanes, kList));
        if (element == nullptr) return;
        taken++;
        doubled += element->owner.exchange(gettid()) != 0;
        element->owner = 0;
        ops.push(lanes, kList, &element->node);
        pushes++;
    }
    static void handle(void* self) { static_cast<Taker*>(self)->take_and_put_back(); }
};

TEST_P(Ops, ListElementsAreNeitherLostNorDoubled) {
    std::vector<Element> elements(50);
    for (Element& element : elements) ops().push(lanes, kList, &element.node);
    std::atomic<uint64_t> pushes{elements.size()}, doubled{0}, taken{0};
    under_fire(0.4, [&](int i, const std::atomic<bool>& stop) {
        Taker taker{ops(), lanes}, in_handler{ops(), lanes};
        {
            Storm storm(100 + 30 * i, Taker::handle, &in_handler);
            while (!stop) taker.take_and_put_back();
        }
        for (const Taker* its : {&taker, &in_handler}) {
            pushes += its->pushes;
            doubled += its->doubled;
            taken += its->taken;
        }
    });
    EXPECT_GT(taken.load(), 1000u);
    EXPECT_EQ(doubled.load(), 0u);
    EXPECT_EQ(lanes.sum(kList + 8), pushes.load());
    // Every element is on one list, once.
    test::RestoreAffinity restore;
    size_t found = 0;
    for (int cpu = 0; cpu < sysconf(_SC_NPROCESSORS_ONLN); cpu++) {
        test::pin_to(cpu);
        while (auto* element = reinterpret_cast<Element*>(ops().pop(lanes, kList))) {
            EXPECT_EQ(element->owner.exchange(-1), 0);
            ASSERT_LE(++found, elements.size());
        }
    }
    EXPECT_EQ(found, elements.size());
}

// Nothing in a thread points into a shared object that is gone.
TEST_P(Ops, NothingIsLeftBehind) {
    test::RestoreAffinity restore;
    test::pin_to(0);
    PerCpuNode node;
    {
        Library again(GetParam());
        again.ops->push(lanes, kList, &node);
        EXPECT_EQ(again.ops->pop(lanes, kList), &node);
        EXPECT_EQ(again.ops->pop(lanes, kList), nullptr);
        again.ops->compare_store(lanes, lanes.lane(), kSlots, 1, 2);
        again.ops->add(lanes, kCounter, 1);
    }
    if (expect_rseq()) {
        EXPECT_EQ(rseq_area()->rseq_cs, 0u);
    }
}

INSTANTIATE_TEST_SUITE_P(O, Ops, ::testing::Values(0, 1, 2, 3));

// ---- lanes and processes ----

// Registers and unregisters glibc's area of this thread.
bool rseq_call(volatile RseqArea* area, int flags) {
#ifdef ADAPTIVE_HAVE_RSEQ
    const unsigned long kept = getauxval(27 /* AT_RSEQ_FEATURE_SIZE */);
    return syscall(SYS_rseq, area, kept > 32 && __rseq_size > 32 ? __rseq_size : 32, flags, RSEQ_SIG) == 0;
#else
    return false;
#endif
}

// Threads with rseq and without, at the same lanes.
TEST(CommonLane, MixesWithRestartableThreads) {
    if (!expect_rseq()) GTEST_SKIP() << "no rseq";
    Lanes lanes;
    std::vector<Element> elements(20);
    for (Element& element : elements) lanes.push(kList, &element.node);
    std::atomic<uint64_t> added{0}, doubled{0}, without{0};
    const Library library(2);
    under_fire(0.5, [&](int i, const std::atomic<bool>& stop) {
        volatile RseqArea* area = rseq_area();
        if (i % 2 == 0) without += rseq_call(area, 1 /* unregister */) && !lanes.restartable();
        Taker taker{*library.ops, lanes};
        uint64_t mine = 0;
        for (; !stop; mine++) {
            lanes.add(kCounter, 1);
            taker.take_and_put_back();
        }
        if (i % 2 == 0) rseq_call(area, 0);
        added += mine;
        doubled += taker.doubled;
    });
    EXPECT_GT(without.load(), 0u);
    EXPECT_EQ(lanes.sum(kCounter), added.load());
    EXPECT_GT(lanes.read(lanes.lanes() - 1, kCounter), 0u);
    EXPECT_LT(lanes.read(lanes.lanes() - 1, kCounter), added.load());
    EXPECT_EQ(doubled.load(), 0u);
}

TEST(CommonLane, TakesCpusBeyondTheLanes) {
    if (sysconf(_SC_NPROCESSORS_ONLN) < 2) GTEST_SKIP() << "needs two CPUs";
    test::RestoreAffinity restore;
    Lanes lanes(1);
    test::pin_to(1);
    EXPECT_FALSE(lanes.restartable());
    EXPECT_EQ(lanes.lane(), 1u);
    lanes.add(kCounter, 5);
    EXPECT_EQ(lanes.compare_store(0, kCounter, 0, 1), RseqEnd::moved);
    EXPECT_EQ(lanes.compare_store(1, kCounter, 4, 1), RseqEnd::mismatch);
    EXPECT_EQ(lanes.compare_store(1, kCounter, 5, 6), RseqEnd::done);
    EXPECT_EQ(lanes.read(1, kCounter), 6u);
    EXPECT_EQ(lanes.read(0, kCounter), 0u);
    PerCpuNode nodes[3];
    for (PerCpuNode& node : nodes) lanes.push(kList, &node);
    test::pin_to(0);
    EXPECT_EQ(lanes.restartable(), expect_rseq());
    for (int i = 2; i >= 0; i--) EXPECT_EQ(lanes.pop(kList), &nodes[i]) << "from the common lane";
    EXPECT_EQ(lanes.pop(kList), nullptr);
}

// Several processes count in shared memory; some are killed in the middle of it.
TEST(Processes, TheKilledLoseNothingButTheirLast) {
    Lanes lanes;
    test::Shared<std::array<std::atomic<uint64_t>, 8>> said;
    std::vector<std::unique_ptr<test::Child>> children;
    for (int i = 0; i < 8; i++)
        children.push_back(std::make_unique<test::Child>([&, i] {
            for (;;) {
                lanes.add(kCounter, 1);
                (*said)[static_cast<size_t>(i)].fetch_add(1, std::memory_order_relaxed);
            }
        }));
    usleep(300000);
    for (auto& child : children) child->end(SIGKILL);
    uint64_t total = 0;
    for (auto& its : *said) total += its;
    EXPECT_GE(lanes.sum(kCounter), total);
    EXPECT_LE(lanes.sum(kCounter), total + children.size());
    EXPECT_GT(total, 10000u);
}

// The tests of this file again, in a process whose glibc registers no rseq area.
TEST(WithoutRseq, EverythingWorksInTheCommonLane) {
    if (getenv("NO_RSEQ") != nullptr) return;
    const test::Outcome outcome =
        test::shell("NO_RSEQ=1 GLIBC_TUNABLES=glibc.pthread.rseq=0 /proc/" + std::to_string(getpid()) +
                    "/exe --gtest_filter='O/Ops.*/2:Processes.*:CommonLane.TakesCpusBeyondTheLanes'");
    EXPECT_EQ(outcome.exit_code, 0) << outcome.output;
    EXPECT_NE(outcome.output.find("6 tests from"), std::string::npos) << outcome.output;
    EXPECT_EQ(outcome.output.find("SKIPPED"), std::string::npos) << outcome.output;
}

}  // namespace
