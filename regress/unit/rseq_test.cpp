// The mirror inferred from where tasks run: life cycle, what it infers, hostile tables, processes without
// rseq.
#include <gtest/gtest.h>

#include <boost/interprocess/mapped_region.hpp>
#include <boost/interprocess/shared_memory_object.hpp>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "base/rseq_area.h"
#include "mirror/mirror.h"
#include "private_mirror.h"
#include "processes.h"

using namespace adaptive;
using test::Child;
using test::eventually;
using test::Shared;
namespace ipc = boost::interprocess;

namespace {

constexpr uint32_t kSlots = 8, kCpus = 256;

struct Report {
    std::atomic<uint32_t> slot{0}, failed{0}, wait{0};
};

// A table in shared memory that every process maps for itself, at an address of its own.
class RseqTest : public ::testing::Test {
  protected:
    void SetUp() override {
        if (rseq_cpu_word() == nullptr) GTEST_SKIP() << "no rseq area: glibc before 2.35 or switched off";
        ipc::shared_memory_object::remove(name.c_str());
        ipc::shared_memory_object memory(ipc::create_only, name.c_str(), ipc::read_write);
        memory.truncate(static_cast<ipc::offset_t>(Mirror::rseq_bytes(kSlots, kCpus)));
        region = map();
        Mirror::rseq_format(region.get_address(), kSlots, kCpus);
        open(mirror, region);
    }
    void TearDown() override {
        mirror.close();
        ipc::shared_memory_object::remove(name.c_str());
    }

    ipc::mapped_region map() const {
        const ipc::shared_memory_object memory(ipc::open_only, name.c_str(), ipc::read_write);
        return ipc::mapped_region(memory, ipc::read_write);
    }
    void open(Mirror& which, const ipc::mapped_region& where) {
        Error error;
        ASSERT_TRUE(which.open_rseq(where.get_address(), &error, &*report, sizeof(Report))) << error.text;
    }
    // A child with a mapping and a slot of its own that spins on `cpu`, and says so.
    auto spinner(int cpu, Report& its) {
        return [this, cpu, &its] {
            test::pin_to(cpu);
            const ipc::mapped_region mine = map();
            Mirror here;
            MirrorTask task;
            Error error;
            if (!here.open_rseq(mine.get_address(), &error) || !task.attach_rseq_claim(here, &error)) {
                its.failed = 1;
                return;
            }
            its.slot = task.slot();
            for (;;) task.note_running();
        };
    }
    bool joined(const Report& its) const {
        return eventually([&] { return its.slot != 0 || its.failed != 0; }) && its.failed == 0;
    }
    void needs_two_cpus() const {
        if (sysconf(_SC_NPROCESSORS_ONLN) < 2) GTEST_SKIP() << "needs two CPUs";
    }
    double share(SlotId slot, SchedState state) const {
        uint64_t looks = 0, hits = 0;
        for (const double end = test::seconds() + 0.3; test::seconds() < end; looks++)
            hits += mirror.look(slot) == state;
        return static_cast<double>(hits) / static_cast<double>(looks);
    }

    const std::string name = "adaptive_rseq_test_" + std::to_string(getpid());
    Shared<Report> report;
    ipc::mapped_region region;
    Mirror mirror;
    test::RestoreAffinity restore;
};

TEST(RseqArea, TellsTheCpu) {
    if (rseq_cpu_word() == nullptr) GTEST_SKIP() << "no rseq area";
    test::RestoreAffinity restore;
    for (int cpu = 0; cpu < sysconf(_SC_NPROCESSORS_ONLN); cpu++) {
        test::pin_to(cpu);
        EXPECT_EQ(current_cpu(), static_cast<uint32_t>(cpu));
    }
}

TEST_F(RseqTest, RefusesWhatIsNoTable) {
    alignas(64) static unsigned char memory[64 * 4] = {};
    Mirror other;
    Error error;
    EXPECT_FALSE(other.open_rseq(memory, &error));
    EXPECT_NE(strstr(error.text, "format"), nullptr) << error.text;
    EXPECT_FALSE(other.open_rseq(memory + 4, &error));
    Mirror::rseq_format(memory, 2, 2);
    EXPECT_EQ(Mirror::rseq_bytes(2, 2), sizeof(memory));
    EXPECT_TRUE(other.open_rseq(memory, &error)) << error.text;
    EXPECT_EQ(other.capacity(), 1u);
    EXPECT_EQ(other.source(), Source::rseq);
    EXPECT_TRUE(other.active());
}

TEST_F(RseqTest, SlotLifeCycle) {
    EXPECT_EQ(mirror.capacity(), kSlots - 1);
    for (uint32_t slot = 0; slot <= 65535; slot++)
        ASSERT_EQ(mirror.look(static_cast<SlotId>(slot)), SchedState::unknown) << slot;
    MirrorTask task;
    Error error;
    EXPECT_FALSE(task.attach_rseq(mirror, 0, nullptr, &error));
    EXPECT_FALSE(task.attach_rseq(mirror, kSlots, nullptr, &error));
    const uint32_t outside = 0;
    EXPECT_FALSE(task.attach_rseq(mirror, 3, &outside, &error)) << "outside the range given to open_rseq";
    ASSERT_TRUE(task.attach_rseq(mirror, 3, nullptr, &error)) << error.text;
    EXPECT_EQ(task.slot(), 3);
    EXPECT_EQ(mirror.used(), 1u);
    EXPECT_TRUE(task.note_running());
    EXPECT_EQ(mirror.info(3).state, SchedState::on_cpu) << "one's own";
    EXPECT_EQ(mirror.info(3).tid, static_cast<uint32_t>(gettid()));
    EXPECT_EQ(mirror.info(3).generation, 1u);
    task.detach();
    EXPECT_EQ(mirror.used(), 0u);
    EXPECT_EQ(mirror.look(3), SchedState::unknown);
    ASSERT_TRUE(task.attach_rseq(mirror, 3, nullptr, &error)) << error.text;
    EXPECT_EQ(mirror.info(3).generation, 2u);
    task.detach();
}

TEST_F(RseqTest, OwnerOnAnotherCpuRuns) {
    needs_two_cpus();
    test::pin_to(0);
    Child child(spinner(1, *report));
    ASSERT_TRUE(joined(*report));
    EXPECT_GT(share(static_cast<SlotId>(report->slot), SchedState::on_cpu), 0.9);
}

TEST_F(RseqTest, OwnerOnMyCpuIsPreempted) {
    test::pin_to(0);
    Child child(spinner(0, *report));
    ASSERT_TRUE(joined(*report));
    EXPECT_GT(share(static_cast<SlotId>(report->slot), SchedState::preempted), 0.999);
}

TEST_F(RseqTest, OwnerWhoseCpuWentToAnotherIsPreempted) {
    needs_two_cpus();
    test::pin_to(0);
    Shared<Report> other;
    Child first(spinner(1, *report));
    Child second(spinner(1, *other));
    ASSERT_TRUE(joined(*report));
    ASSERT_TRUE(joined(*other));
    const auto a = static_cast<SlotId>(report->slot), b = static_cast<SlotId>(other->slot);
    EXPECT_NE(a, b);
    uint64_t looks = 0, crowded = 0, first_ran = 0, first_off = 0;
    for (const double end = test::seconds() + 0.5; test::seconds() < end; looks++) {
        const bool a_runs = mirror.look(a) == SchedState::on_cpu,
                   b_runs = mirror.look(b) == SchedState::on_cpu;
        crowded += a_runs && b_runs;
        first_ran += a_runs;
        first_off += !a_runs;
    }
    EXPECT_LT(static_cast<double>(crowded) / static_cast<double>(looks), 0.01);
    EXPECT_GT(first_ran, 0u);
    EXPECT_GT(first_off, 0u);
}

TEST_F(RseqTest, OwnerThatSaysItWaitsIsBlocked) {
    Child child([&] {
        MirrorTask task;
        Error error;
        const auto* word = reinterpret_cast<const volatile uint32_t*>(&report->wait);
        if (!task.attach_rseq(mirror, 5, word, &error)) {
            report->failed = 1;
            return;
        }
        report->wait = 1;
        report->slot = 5;
        pause();
    });
    ASSERT_TRUE(joined(*report));
    EXPECT_EQ(mirror.look(5), SchedState::blocked);
    report->wait = 0;
    EXPECT_NE(mirror.look(5), SchedState::blocked);
}

TEST_F(RseqTest, ClaimsRunOutAndComeBackFromTheDead) {
    std::vector<std::unique_ptr<Shared<Report>>> reports;
    std::vector<std::unique_ptr<Child>> children;
    for (uint32_t i = 1; i < kSlots; i++) {
        reports.push_back(std::make_unique<Shared<Report>>());
        Report& its = **reports.back();
        children.push_back(std::make_unique<Child>([this, &its] {
            MirrorTask task;
            Error error;
            if (!task.attach_rseq_claim(mirror, &error)) {
                its.failed = 1;
                return;
            }
            its.slot = task.slot();
            pause();
        }));
    }
    for (auto& its : reports) ASSERT_TRUE(joined(**its));
    EXPECT_EQ(mirror.used(), kSlots - 1);
    MirrorTask task;
    Error error;
    EXPECT_FALSE(task.attach_rseq_claim(mirror, &error));
    EXPECT_NE(strstr(error.text, "taken"), nullptr) << error.text;
    children[2]->end(SIGKILL);
    ASSERT_TRUE(task.attach_rseq_claim(mirror, &error)) << error.text;
    EXPECT_EQ(task.slot(), (*reports[2])->slot);
    EXPECT_EQ(mirror.info(task.slot()).generation, 2u);
    task.detach();
}

TEST_F(RseqTest, HostileTableNeverCrashesAReader) {
    MirrorTask task;
    Error error;
    ASSERT_TRUE(task.attach_rseq(mirror, 1, nullptr, &error)) << error.text;
    std::mt19937_64 random(7);
    auto* words = static_cast<uint64_t*>(region.get_address());
    const size_t count = Mirror::rseq_bytes(kSlots, kCpus) / sizeof(uint64_t);
    for (int round = 0; round < 200; round++) {
        for (size_t i = 0; i < count; i++) words[i] = random();
        for (uint32_t slot = 0; slot < kSlots && round % 2; slot++) {  // plausible CPUs, wild pointers
            auto* s = static_cast<RseqSlot*>(region.get_address()) + slot;
            s->cpu_plus_1 = static_cast<uint32_t>(1 + random() % kCpus);
        }
        for (uint32_t slot = 0; slot <= 65535; slot += slot < 2 * kSlots ? 1 : 977) {
            EXPECT_LE(static_cast<uint32_t>(mirror.look(static_cast<SlotId>(slot))), SCHED_DEAD);
            mirror.info(static_cast<SlotId>(slot));
        }
        task.note_running();
        mirror.used();
    }
    task.detach();
}

// Nothing to see here, except when run again by the test below, in a process whose glibc registers no rseq
// area.
TEST(WithoutRseq, OpenExplains) {
    if (rseq_cpu_word() != nullptr) return;
    alignas(64) static unsigned char memory[64 * 4];
    Mirror::rseq_format(memory, 2, 2);
    Mirror mirror;
    Error error;
    EXPECT_EQ(current_cpu(), kNoCpu);
    EXPECT_FALSE(mirror.open_rseq(memory, &error));
    EXPECT_NE(strstr(error.text, "glibc.pthread.rseq"), nullptr) << error.text;
}

TEST(WithoutRseq, IsAnErrorNotACrash) {
    const test::Outcome outcome =
        test::shell("GLIBC_TUNABLES=glibc.pthread.rseq=0 /proc/" + std::to_string(getpid()) +
                    "/exe --gtest_filter=WithoutRseq.OpenExplains");
    EXPECT_EQ(outcome.exit_code, 0) << outcome.output;
}

}  // namespace
