// An rseq area in shared memory, registered in the place of glibc's: other processes read it live, it aborts
// critical sections like any, and glibc's can be put back.
#include <gtest/gtest.h>

#include <memory>
#include <random>
#include <utility>

#include "percpu/percpu.h"
#include "private_mirror.h"
#include "processes.h"
#include "proposals/sched_state.h"

#include "../../examples/rseq_registration.h"

using namespace adaptive;
using test::Child;
using test::eventually;
using test::Shared;

namespace {

struct alignas(64) SharedArea {
    volatile RseqArea area = {};
    char room[448] = {};  // for whatever a later kernel keeps
    std::atomic<int> problem{0};
    std::atomic<uint64_t> turns{0}, aborts{0}, wrong{0};
    uint64_t head = 0;

    SharedArea() { area.cpu_id = kNoCpu; }
};

// In a child: from glibc's area to the shared one.
bool change_over(SharedArea& shared) {
    shared.problem = RseqRegistration::of_this_thread().move_to(&shared.area);
    return shared.problem == 0;
}

class RseqShared : public ::testing::Test {
  protected:
    void SetUp() override {
        if (rseq_area() == nullptr) GTEST_SKIP() << "no rseq area";
    }
    test::RestoreAffinity restore;
};

/// For ever, with its area in `shared`.
Child computing_on_cpu_0(SharedArea& shared) {
    return Child([&shared] {
        test::pin_to(0);
        if (change_over(shared))
            for (;;) asm volatile("");
    });
}

TEST_F(RseqShared, AnotherProcessReadsTheCpuLive) {
    const int cpus = static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN));
    Shared<SharedArea> shared;
    Child child = computing_on_cpu_0(*shared);
    ASSERT_TRUE(eventually([&] { return shared->area.cpu_id == 0 || shared->problem != 0; }));
    ASSERT_EQ(shared->problem, 0);
    std::mt19937 random(1);
    for (int turn = 0; turn < 20; turn++) {
        const auto cpu = static_cast<uint32_t>(random() % static_cast<unsigned>(cpus));
        cpu_set_t set;
        CPU_ZERO(&set);
        CPU_SET(cpu, &set);
        sched_setaffinity(child.pid, sizeof(set), &set);
        EXPECT_TRUE(eventually([&] { return shared->area.cpu_id == cpu; })) << "turn " << turn;
    }
}

TEST_F(RseqShared, CriticalSectionsAreRestartedInIt) {
    Shared<SharedArea> shared;
    auto* page = static_cast<PerCpuNode*>(
        mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    static PerCpuNode* hidden;
    hidden = page;
    Child child([&] {
        test::pin_to(0);
        if (!change_over(*shared)) return;
        struct sigaction action = {};
        action.sa_handler = [](int) { mprotect(hidden, 4096, PROT_READ | PROT_WRITE); };
        sigaction(SIGSEGV, &action, nullptr);
        for (int turn = 0; turn < 100; turn++) {
            shared->wrong += rseq_push(&shared->area, 0, &shared->head, page) != RseqEnd::done;
            mprotect(page, 4096, PROT_NONE);
            void* node = nullptr;
            shared->aborts += rseq_pop(&shared->area, 0, &shared->head, &node) == RseqEnd::aborted;
            shared->wrong +=
                rseq_pop(&shared->area, 0, &shared->head, &node) != RseqEnd::done || node != page;
            shared->turns++;
        }
    });
    EXPECT_EQ(child.wait(), 0);
    EXPECT_EQ(shared->problem, 0);
    EXPECT_EQ(shared->turns, 100u);
    // An interruption by others may come on top, and lets the second attempt fail.
    EXPECT_GE(shared->aborts, 95u);
    EXPECT_LE(shared->wrong, 5u);
}

// What uses glibc's area goes on without it, and with it again.
TEST_F(RseqShared, TheOthersGoOn) {
#ifdef __SANITIZE_THREAD__
    GTEST_SKIP() << "under this sanitizer PerCpu does without rseq";
#endif
    Shared<SharedArea> shared;
    Child child([&] {
        test::pin_to(0);
        const RseqRegistration own = RseqRegistration::of_this_thread();
        alignas(64) static char memory[4096];
        const PerCpu lanes(memory, 64, 8);
        shared->wrong += !lanes.restartable();
        if (!change_over(*shared)) return;
        shared->wrong += rseq_area() != nullptr || current_cpu() != kNoCpu;
        shared->wrong += sched_getcpu() != 0;
        shared->wrong += lanes.restartable();
        lanes.add(0, 1);
        RseqRegistration there = own;
        there.area = &shared->area;
        shared->wrong += there.move_to(own.area) != 0;
        shared->wrong += shared->area.cpu_id != kNoCpu;
        shared->wrong += !lanes.restartable() || current_cpu() != 0;
        lanes.add(0, 1);
        shared->wrong += lanes.sum(0) != 2;
        shared->turns = 1;
    });
    EXPECT_EQ(child.wait(), 0);
    EXPECT_EQ(shared->turns, 1u);
    EXPECT_EQ(shared->wrong, 0u);
}

TEST_F(RseqShared, Example) {
    const test::Outcome outcome = test::shell(test::example_path("rseq_shared"));
    EXPECT_EQ(outcome.exit_code, 0) << outcome.output;
    EXPECT_NE(outcome.output.find("seen after"), std::string::npos) << outcome.output;
}

// A kernel that keeps the state of a thread beside its area, and takes an area back only as it was registered.
struct FakeKernel {
    static constexpr uint32_t kBytes = 64;
    struct alignas(64) Area {
        volatile RseqArea area = {};
        rseq_sched_state state = {};
    };
    static inline volatile RseqArea* registered = nullptr;
    static inline uint32_t registered_bytes = 0;
    static inline bool refuses = false;

    static int call(volatile RseqArea* area, uint32_t bytes, bool on) {
        if (on ? registered != nullptr : registered != area || registered_bytes != bytes) return EINVAL;
        if (on && std::exchange(refuses, false)) return EPERM;
        registered = on ? area : nullptr;
        registered_bytes = bytes;
        auto* state = &const_cast<Area*>(reinterpret_cast<volatile Area*>(area))->state;
        *state = {0, on ? kSchedOnCpu : 0, on ? static_cast<uint32_t>(gettid()) : 0};
        return 0;
    }
};

TEST(FakeKernelTest, StateBesideASharedAreaIsReadByOthers) {
    Shared<FakeKernel::Area> shared;
    Child child([&] {
        FakeKernel::Area own;
        if (FakeKernel::call(&own.area, FakeKernel::kBytes, true) != 0) _exit(1);
        const RseqRegistration mine = {&own.area, FakeKernel::kBytes, FakeKernel::call};
        if (mine.move_to(&shared->area) != 0) _exit(2);
        _exit(own.state.tid == 0 && FakeKernel::registered == &shared->area ? 0 : 3);
    });
    const auto tid = static_cast<uint32_t>(child.pid);
    EXPECT_EQ(child.wait(), 0);
    EXPECT_EQ(shared->state.state, kSchedOnCpu);
    EXPECT_EQ(shared->state.tid, tid);
}

TEST(FakeKernelTest, NothingIsRegisteredWithFewerBytesThanBefore) {
    FakeKernel::Area own, other;
    ASSERT_EQ(FakeKernel::call(&own.area, FakeKernel::kBytes, true), 0);
    EXPECT_EQ((RseqRegistration{&own.area, 32, FakeKernel::call}.move_to(&other.area)), EINVAL);
    EXPECT_EQ(FakeKernel::registered, &own.area);
    FakeKernel::refuses = true;
    EXPECT_EQ((RseqRegistration{&own.area, FakeKernel::kBytes, FakeKernel::call}.move_to(&other.area)),
              EPERM);
    EXPECT_EQ(FakeKernel::registered, &own.area) << "put back";
    EXPECT_EQ(FakeKernel::registered_bytes, FakeKernel::kBytes);
    FakeKernel::registered = nullptr;
}

// Why this alone is no mirror: the area of a process that was killed goes on telling its last CPU.
TEST_F(RseqShared, TheDeadGoOnTelling) {
    Shared<SharedArea> shared;
    Child child = computing_on_cpu_0(*shared);
    ASSERT_TRUE(eventually([&] { return shared->area.cpu_id == 0 || shared->problem != 0; }));
    child.end(SIGKILL);
    EXPECT_EQ(shared->area.cpu_id, 0u);
}

}  // namespace
