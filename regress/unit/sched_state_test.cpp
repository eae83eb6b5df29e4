// sched_state: the proposal's words from every source, who is meant by a handle, and what becomes of the dead.
#include "proposals/sched_state.h"

#include <fcntl.h>
#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "base/rseq_area.h"
#include "mirror/bpf_source.h"
#include "private_mirror.h"
#include "processes.h"

using namespace adaptive;
using test::Child;
using test::eventually;
using test::Shared;

static_assert(sizeof(rseq_sched_state) == 12 && offsetof(rseq_sched_state, version) == 0);
static_assert(offsetof(rseq_sched_state, state) == 4 && offsetof(rseq_sched_state, tid) == 8);
static_assert(kSchedOnCpu == 1, "as proposed");
static_assert(std::is_trivially_destructible_v<SchedStates> &&
              std::is_trivially_destructible_v<SchedStateTask>);

namespace {

struct Said {
    std::atomic<uint64_t> handle{0};
    std::atomic<int> failed{0}, go{0}, tid{0};
    char text[256] = "";

    void tell(SchedHandle h) { handle = h.slot | static_cast<uint64_t>(h.generation) << 32; }
    SchedHandle told() const { return {static_cast<uint32_t>(handle), static_cast<uint32_t>(handle >> 32)}; }
};

// One table for this process and its children.
class SchedStateTest : public test::PrivateMirror {
  protected:
    void SetUp() override { make(SchedSource::rseq, 8); }
    void TearDown() override {
        states.close();
        if (memory != nullptr) munmap(memory, size);
        if (states_are_the_mirror) PrivateMirror::TearDown();
    }
    void make(SchedSource source, uint32_t slots) {
        Error error;
        if (source == SchedSource::bpf) {
            PrivateMirror::SetUp();
            if (IsSkipped() || HasFatalFailure()) return;
            states_are_the_mirror = true;
            reload("--slots " + std::to_string(slots - 1) + " --group root");
            ASSERT_TRUE(states.open_bpf(dir.c_str(), &error)) << error.text;
            return;
        }
        if (rseq_area() == nullptr) GTEST_SKIP() << "no rseq area";
        size = SchedStates::bytes(slots, kCpus);
        memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        SchedStates::format(memory, slots, kCpus);
        ASSERT_TRUE(states.open(memory, &error)) << error.text;
    }
    bool attach(SchedStateTask& task, Error& error) { return task.attach(states, &error); }

    // In a child or thread: attaches and tells its handle.
    bool join(SchedStateTask& task, Said& said) {
        Error error;
        if (attach(task, error)) {
            said.tid = gettid();
            said.tell(task.handle());
            return true;
        }
        strcpy(said.text, error.text);
        said.failed = 1;
        return false;
    }
    bool joined(const Said& said) const {
        return eventually([&] { return said.handle != 0 || said.failed != 0; }) && said.failed == 0;
    }
    bool dead(SchedHandle handle) const {
        const rseq_sched_state state = states.read(handle);
        EXPECT_EQ(state.state == kSchedDead, state.tid == 0);
        if (state.state == kSchedDead) {
            EXPECT_EQ(states.look(handle), SchedState::dead) << "once, and for ever";
        }
        return state.state == kSchedDead;
    }

    static constexpr uint32_t kCpus = 256;
    SchedStates states;
    void* memory = nullptr;
    size_t size = 0;
    bool states_are_the_mirror = false;
};

// ---- from every source ----

class EverySource : public SchedStateTest, public ::testing::WithParamInterface<SchedSource> {
  protected:
    void SetUp() override { make(GetParam(), 2); }
};

TEST_P(EverySource, NobodyIsUnknown) {
    for (const uint32_t slot : {0U, 2U, 3U, 65535U, 65536U, UINT32_MAX}) {
        EXPECT_EQ(states.read({slot, 0}).state, kSchedUnknown) << slot;
        EXPECT_EQ(states.look({slot, 1}), SchedState::unknown);
    }
    EXPECT_TRUE(dead({1, 77})) << "a slot that nobody has";
    SchedStates closed;
    EXPECT_EQ(closed.look({1, 1}), SchedState::unknown);
    Error error;
    SchedStateTask task;
    EXPECT_FALSE(task.attach(closed, &error));
}

TEST_P(EverySource, RunningThreadIsOnCpu) {
    if (sysconf(_SC_NPROCESSORS_ONLN) < 2) GTEST_SKIP() << "needs two CPUs";
    test::RestoreAffinity restore;
    test::pin_to(0);
    Shared<Said> said;
    Child child([&] {
        test::pin_to(1);
        SchedStateTask task;
        if (join(task, *said))
            for (;;) task.note_running();
    });
    ASSERT_TRUE(joined(*said)) << said->text;
    EXPECT_TRUE(eventually([&] { return states.read(said->told()).state == kSchedOnCpu; }));
    EXPECT_EQ(states.read(said->told()).tid, static_cast<uint32_t>(child.pid));
    EXPECT_EQ(states.read(said->told()).version, 0u);
    child.end(SIGKILL);
    EXPECT_TRUE(dead(said->told())) << "as soon as it is gone";
}

TEST_P(EverySource, DetachedThreadIsGone) {
    SchedStateTask task;
    Error error;
    SchedHandle before = {0, 0};
    for (int turn = 0; turn < 5; turn++) {
        ASSERT_TRUE(attach(task, error)) << error.text;
        ASSERT_TRUE(attach(task, error)) << "twice is once";
        EXPECT_TRUE(task.note_running());
        EXPECT_EQ(task.handle().slot, 1u);
        EXPECT_FALSE(dead(task.handle()));
        EXPECT_TRUE(before.slot == 0 || dead(before));
        before = task.handle();
        task.detach();
        EXPECT_TRUE(dead(before));
        EXPECT_EQ(task.handle().slot, 0u);
    }
}

// Threads that end without a word, one after another in the one slot.
TEST_P(EverySource, DeadThreadIsSeenAndItsSlotRecycled) {
    std::vector<SchedHandle> handles;
    for (int i = 0; i < 20; i++) {
        SchedHandle handle = {0, 0};
        bool alive = false;
        Error error = {};
        std::thread([&] {
            SchedStateTask task;
            if (!attach(task, error)) return;
            handle = task.handle();
            alive = !dead(handle);
            for (const SchedHandle& before : handles) EXPECT_TRUE(dead(before));
        }).join();
        ASSERT_EQ(handle.slot, 1u) << error.text;
        EXPECT_TRUE(alive);
        // join() may return a little before the kernel has taken the thread down for all to see.
        ASSERT_TRUE(eventually([&] { return dead(handle); }));
        handles.push_back(handle);
    }
}

TEST_P(EverySource, ExecAndForkAreNoInheritance) {
    Shared<Said> said;
    Child child([&] {
        SchedStateTask task;
        if (!join(task, *said)) return;
        // The child's child: not the one with the slot.
        const pid_t grandchild = fork();
        if (grandchild == 0) {
            task.reset_after_fork();
            _exit(dead(said->told()) ? 1 : 0);
        }
        int status = 1;
        waitpid(grandchild, &status, 0);
        if (status != 0) said->failed = 1;
        if (dead(said->told())) said->failed = 2;
        said->go = 1;
        while (said->go == 1) usleep(500);
        execlp("sleep", "sleep", "10", static_cast<char*>(nullptr));
    });
    ASSERT_TRUE(joined(*said)) << said->text;
    ASSERT_TRUE(eventually([&] { return said->go == 1; }));
    EXPECT_EQ(said->failed, 0);
    EXPECT_FALSE(dead(said->told()));
    said->go = 2;
    // With bpf the registration belongs to the task, which lives on.
    if (GetParam() != SchedSource::bpf) {
        EXPECT_TRUE(eventually([&] { return dead(said->told()); }));
    }
    child.end(SIGKILL);
    EXPECT_TRUE(dead(said->told()));
}

// Two competitors for few slots, and readers of whatever was ever told. Who has a slot is alive; who was joined
// is dead; nothing crashes.
TEST_P(EverySource, ComingAndGoing) {
    std::atomic<uint64_t> told[64] = {};
    std::atomic<bool> stop{false};
    std::atomic<uint64_t> attached{0}, taken_for_dead{0}, resurrected{0}, reads{0};
    auto churn = [&](unsigned seed) {
        std::mt19937 random(seed);
        while (!stop) {
            uint64_t handle = 0;
            std::thread([&] {
                SchedStateTask task;
                Error error;
                if (!attach(task, error)) return;
                handle = task.handle().slot | static_cast<uint64_t>(task.handle().generation) << 32;
                told[random() % 64] = handle;
                attached++;
                for (int i = 0; i < 100; i++) taken_for_dead += dead(task.handle());
                if (random() % 2 == 0) task.detach();
            }).join();
            const SchedHandle gone = {static_cast<uint32_t>(handle), static_cast<uint32_t>(handle >> 32)};
            if (handle == 0) continue;
            if (!eventually([&] { return dead(gone); }, 10)) resurrected++;
            // And for ever, whoever is just taking its slot.
            for (int i = 0; i < 3000; i++) resurrected += !dead(gone);
        }
    };
    std::thread competitors[] = {std::thread(churn, 1), std::thread(churn, 2), std::thread(churn, 3)};
    std::thread reader([&] {
        for (; !stop; reads++) {
            const uint64_t handle = told[reads % 64];
            states.read({static_cast<uint32_t>(handle), static_cast<uint32_t>(handle >> 32)});
        }
    });
    usleep(1000000);
    stop = true;
    for (std::thread& competitor : competitors) competitor.join();
    reader.join();
    EXPECT_GT(attached.load(), 5u);
    EXPECT_GT(reads.load(), 100u);
    EXPECT_EQ(taken_for_dead.load(), 0u);
    EXPECT_EQ(resurrected.load(), 0u);
}

// Several at once at the one slot, without pause: whoever gets it keeps it.
TEST_P(EverySource, CompetitorsSpoilNothing) {
    std::atomic<uint64_t> attached{0}, taken_for_dead{0}, resurrected{0};
    std::atomic<bool> stop{false};
    auto compete = [&] {
        SchedStateTask task;
        Error error;
        while (!stop) {
            if (!attach(task, error)) continue;
            attached++;
            for (int i = 0; i < 100; i++) taken_for_dead += dead(task.handle());
            const SchedHandle before = task.handle();
            task.detach();
            for (int i = 0; i < 100; i++) resurrected += !dead(before);
        }
    };
    std::vector<std::thread> threads;
    for (int i = 0; i < 4; i++) threads.emplace_back(compete);
    usleep(700000);
    stop = true;
    for (std::thread& thread : threads) thread.join();
    EXPECT_GT(attached.load(), 10u);
    EXPECT_EQ(taken_for_dead.load(), 0u) << "of " << attached;
    EXPECT_EQ(resurrected.load(), 0u) << "of " << attached;
}

// The next process gets its predecessor's process id, and its slot.
TEST_P(EverySource, ReusedThreadIdIsAnotherThread) {
    if (geteuid() != 0) GTEST_SKIP() << "choosing process ids needs root";
    Shared<Said> first, second;
    Shared<std::atomic<int>> problem;
    Child outer([&] {
        if (unshare(CLONE_NEWPID) != 0) return void(*problem = errno);
        Child init([&] {  // process 1 of the new namespace
            pid_t pid = 0;
            auto victim = [&](Said& said) {
                return [&] {
                    if (pid != 0 && getpid() != pid) pause();
                    SchedStateTask task;
                    if (join(task, said))
                        for (;;) task.note_running();
                };
            };
            {
                Child a(victim(*first));
                pid = a.pid;
                if (!joined(*first) || dead(first->told())) return void(*problem = -1);
            }
            const int last = open("/proc/sys/kernel/ns_last_pid", O_WRONLY | O_CLOEXEC);
            const std::string number = std::to_string(pid - 1);
            std::unique_ptr<Child> b;
            for (int attempt = 0; attempt < 100 && (b == nullptr || b->pid != pid); attempt++) {
                b.reset();
                if (last < 0 || pwrite(last, number.data(), number.size(), 0) < 0)
                    return void(*problem = errno);
                b = std::make_unique<Child>(victim(*second));
            }
            if (b->pid != pid) return void(*problem = -3);
            if (!joined(*second)) return void(*problem = -2);
            // From here on by the test's own view of the table, outside of the namespace.
            while (second->go == 0) usleep(500);
        });
        init.wait();
    });
    const bool up = eventually([&] { return second->handle != 0 || second->failed != 0 || *problem != 0; });
    if (*problem > 0) GTEST_SKIP() << "no private process ids here: " << strerror(*problem);
    if (*problem == -3) GTEST_SKIP() << "the kernel did not give the id again";
    ASSERT_TRUE(up && *problem == 0 && second->failed == 0) << *problem << second->text << first->text;
    EXPECT_EQ(first->tid, second->tid);
    EXPECT_EQ(first->told().slot, second->told().slot);
    EXPECT_NE(first->told().generation, second->told().generation);
    EXPECT_TRUE(dead(first->told()));
    EXPECT_FALSE(dead(second->told()));
    EXPECT_EQ(states.read(second->told()).tid, static_cast<uint32_t>(second->tid));
    second->go = 1;
    outer.wait();
    EXPECT_TRUE(dead(second->told()));
}

INSTANTIATE_TEST_SUITE_P(Sources, EverySource, ::testing::Values(SchedSource::rseq, SchedSource::bpf),
                         [](const auto& info) { return info.param == SchedSource::bpf ? "bpf" : "rseq"; });

class BpfTest : public SchedStateTest {
  protected:
    void SetUp() override { make(SchedSource::bpf, 2); }
};

// What the mirror still shows of the slot's last user: a look that a switch of the present one overtakes finds
// the old state with a newer count.
TEST_F(BpfTest, PredecessorsDeathIsNotOnesOwn) {
    Shared<Said> said;
    {
        Child child([&] {
            SchedStateTask task;
            if (join(task, *said)) pause();
        });
        ASSERT_TRUE(joined(*said)) << said->text;
    }
    bpf::Maps raw;
    Error error;
    ASSERT_TRUE(bpf::open_maps(dir.c_str(), &raw, &error)) << error.text;
    int shown_dead = 0;
    for (int turn = 0; turn < 20; turn++) {
        SchedStateTask task;
        ASSERT_TRUE(attach(task, error)) << error.text;
        raw.claim_array[1].seen_switches = SCHED_NEVER_SEEN;
        shown_dead += raw.slot_array[1].state == SCHED_DEAD;
        EXPECT_FALSE(dead(task.handle()));
        task.detach();
    }
    EXPECT_GT(shown_dead, 0);
    bpf::close_maps(raw);
}

// ---- tables ----

TEST_F(SchedStateTest, FullTableAndAnotherOne) {
    std::vector<SchedStateTask> tasks(8);
    Error error;
    for (int i = 0; i < 7; i++) ASSERT_TRUE(attach(tasks[static_cast<size_t>(i)], error)) << error.text;
    EXPECT_FALSE(attach(tasks[7], error));
    EXPECT_NE(strstr(error.text, "all 7 slots"), nullptr) << error.text;
    tasks[3].detach();
    EXPECT_TRUE(attach(tasks[7], error)) << error.text;
    EXPECT_EQ(tasks[7].handle().slot, 4u);
    for (SchedStateTask& task : tasks) task.detach();
}

TEST_F(SchedStateTest, WhatIsNoTableIsRefusedOrHarmless) {
    alignas(64) static unsigned char nothing[256] = {};
    SchedStates other;
    Error error;
    EXPECT_FALSE(other.open(nothing, &error));
    EXPECT_NE(strstr(error.text, "format"), nullptr) << error.text;
    EXPECT_FALSE(other.open(nothing + 8, &error));
    std::mt19937 random(3);
    for (int round = 0; round < 100; round++) {
        for (size_t i = 0; i < size; i++)
            static_cast<unsigned char*>(memory)[i] = static_cast<unsigned char>(random());
        for (uint32_t slot = 0; slot < 20; slot++) {
            uint32_t generation = static_cast<uint32_t>(random());
            if (slot > 0 && slot < 8) generation = static_cast<SchedStateSlot*>(memory)[slot].generation;
            EXPECT_LE(static_cast<uint32_t>(states.look({slot, generation})), SCHED_DEAD);
        }
    }
}

}  // namespace
