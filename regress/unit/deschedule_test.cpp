// Deschedule notifications: every deschedule writes every word, nothing else does, and nothing but them is
// written.
#include "proposals/deschedule.h"

#include <gtest/gtest.h>
#include <sys/resource.h>

#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "base/rseq_area.h"
#include "mirror/bpf_source.h"
#include "private_mirror.h"
#include "processes.h"

using namespace adaptive;
using test::Child;
using test::eventually;
using test::Shared;

namespace {

int64_t deschedules() {
    rusage usage = {};
    getrusage(RUSAGE_THREAD, &usage);
    return usage.ru_nvcsw + usage.ru_nivcsw;
}

struct Tally {
    std::atomic<uint64_t> written{0}, missed{0}, untimely{0}, uses{0}, wrong{0};
    std::atomic<int> failed{0}, ready{0};
    std::atomic<uint32_t> slot{0};
    char text[256] = "";
};

class DescheduleTest : public test::PrivateMirror {
  protected:
    void SetUp() override {
        PrivateMirror::SetUp();
        if (IsSkipped() || HasFatalFailure()) return;
        Error error;
        ASSERT_TRUE(mirror.open_bpf(dir.c_str(), &error)) << error.text;
        ASSERT_TRUE(task.attach(mirror, &error)) << error.text;
    }
    void TearDown() override {
        task.detach();
        mirror.close();
        PrivateMirror::TearDown();
    }

    // In a child or thread: a registration with notes of its own.
    struct Member {
        Mirror mirror;
        MirrorTask task;
        DescheduleNotes notes;
        bool join(const std::string& dir, Tally& tally) {
            Error error;
            if (!mirror.open_bpf(dir.c_str(), &error) || !task.attach(mirror, &error) ||
                !notes.open(dir.c_str(), mirror, task, &error)) {
                strcpy(tally.text, error.text);
                tally.failed = 1;
                return false;
            }
            tally.slot = task.slot();
            return true;
        }
    };
    sched_notes* all() {
        Error error;
        sched_notes* notes = bpf::open_notes(dir.c_str(), mirror.capacity() + 1, mirror.id(), &error);
        EXPECT_NE(notes, nullptr) << error.text;
        return notes;
    }
    void close_all(sched_notes* notes) { bpf::close_notes(notes, mirror.capacity() + 1); }

    Mirror mirror;
    MirrorTask task;
};

TEST_F(DescheduleTest, Rules) {
    DescheduleNotes notes;
    Error error;
    EXPECT_EQ(notes.add<uint8_t>(0, 1, &error), nullptr) << "not open";
    EXPECT_FALSE(notes.kept());
    MirrorTask stranger;
    EXPECT_FALSE(notes.open(dir.c_str(), mirror, stranger, &error));
    EXPECT_FALSE(notes.open("/sys/fs/bpf/no_such_mirror", mirror, task, &error));
    ASSERT_TRUE(notes.open(dir.c_str(), mirror, task, &error)) << error.text;
    EXPECT_FALSE(notes.open(dir.c_str(), mirror, task, &error)) << "open already";
    EXPECT_TRUE(notes.kept());

    EXPECT_EQ(notes.add<uint8_t>(64, 1, &error), nullptr);
    EXPECT_EQ(notes.add<uint16_t>(1, 1, &error), nullptr);
    EXPECT_EQ(notes.add<uint32_t>(62, 1, &error), nullptr);
    EXPECT_EQ(notes.add<uint64_t>(60, 1, &error), nullptr);
    EXPECT_NE(strstr(error.text, "multiple"), nullptr) << error.text;

    volatile uint64_t* words[8];
    for (uint64_t i = 0; i < 8; i++) {
        words[i] = notes.add<uint64_t>(8 * i, 100 + i, &error);
        ASSERT_NE(words[i], nullptr) << error.text;
    }
    EXPECT_EQ(notes.add<uint8_t>(1, 1, &error), nullptr) << "eight is the most";
    EXPECT_NE(strstr(error.text, "taken"), nullptr) << error.text;
    EXPECT_EQ(notes.add<uint64_t>(8, 201, &error), words[1]) << "again: another value";
    notes.remove(words[2]);
    *words[2] = 7;
    usleep(1000);
    for (uint64_t i = 0; i < 8; i++) EXPECT_EQ(*words[i], i == 1 ? 201 : i == 2 ? 7 : 100 + i);
    EXPECT_NE(notes.add<uint8_t>(23, 9, &error), nullptr) << "one is free again";
    usleep(1000);
    EXPECT_EQ(*words[2], (9ULL << 56) + 7);
    notes.close();
    EXPECT_FALSE(notes.kept());
    ASSERT_TRUE(notes.open(dir.c_str(), mirror, task, &error)) << error.text;
    EXPECT_NE(notes.add<uint8_t>(0, 1, &error), nullptr) << "none are left of the last time";
    notes.close();
}

TEST_F(DescheduleTest, EverySizeAndNothingBeside) {
    DescheduleNotes notes;
    Error error;
    ASSERT_TRUE(notes.open(dir.c_str(), mirror, task, &error)) << error.text;
    auto* byte = notes.add<uint8_t>(63, 0x11, &error);
    auto* half = notes.add<uint16_t>(2, 0x2222, &error);
    auto* word = notes.add<int32_t>(8, -3, &error);
    auto* big = notes.add<uint64_t>(24, 0x4444444444444444, &error);
    ASSERT_TRUE(byte != nullptr && half != nullptr && word != nullptr && big != nullptr) << error.text;
    uint8_t* line = const_cast<uint8_t*>(byte) - 63;
    memset(line, 0xee, 64);
    usleep(1000);
    EXPECT_EQ(*byte, 0x11);
    EXPECT_EQ(*half, 0x2222);
    EXPECT_EQ(*word, -3);
    EXPECT_EQ(*big, 0x4444444444444444u);
    for (int i = 0; i < 64; i++)
        EXPECT_EQ(line[i] == 0xee, i != 63 && i / 2 != 1 && i / 4 != 2 && i / 8 != 3) << i;
    notes.close();
}

// Descheduled: written. Written: descheduled. Tasks that preempt one another, are moved, and sleep.
TEST_F(DescheduleTest, AfterEachDescheduleAndNeverWhileRunning) {
    const int cpus = static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN));
    std::vector<std::unique_ptr<Shared<Tally>>> tallies;
    std::vector<std::unique_ptr<Child>> children;
    for (int i = 0; i < 2 * cpus + 1; i++) {
        tallies.push_back(std::make_unique<Shared<Tally>>());
        Tally& tally = **tallies.back();
        children.push_back(std::make_unique<Child>([&, i] {
            Member member;
            Error error;
            if (!member.join(dir, tally)) return;
            volatile uint32_t* word = member.notes.add<uint32_t>(4 * static_cast<size_t>(i), 0, &error);
            volatile uint8_t* other = member.notes.add<uint8_t>(60, 5, &error);
            for (const double end = test::seconds() + 1.5; test::seconds() < end;) {
                int64_t before, armed;
                do {
                    before = deschedules();
                    *word = 1;
                    *other = 0;
                    armed = deschedules();
                } while (before != armed);
                if (i % 3 == 2) usleep(100);
                for (;;) {
                    if (*word == 0) {
                        if (deschedules() == armed) tally.untimely++;
                        break;
                    }
                    if (deschedules() != armed) {
                        if (*word != 0) tally.missed++;
                        break;
                    }
                }
                if (*word != 0 || *other != 5) tally.missed++;
                tally.written++;
            }
        }));
    }
    std::mt19937 random(2);
    for (const double end = test::seconds() + 1.3; test::seconds() < end; usleep(2000)) {
        cpu_set_t set;
        CPU_ZERO(&set);
        CPU_SET(random() % static_cast<unsigned>(cpus), &set);
        sched_setaffinity(children[random() % children.size()]->pid, sizeof(set), &set);
    }
    uint64_t written = 0;
    for (size_t i = 0; i < children.size(); i++) {
        children[i]->wait();
        Tally& tally = **tallies[i];
        ASSERT_EQ(tally.failed, 0) << tally.text;
        EXPECT_EQ(tally.missed, 0u) << "task " << i << " of " << tally.written;
        EXPECT_EQ(tally.untimely, 0u) << "task " << i << " of " << tally.written;
        EXPECT_GT(tally.written, 0u);
        written += tally.written;
    }
    printf("%lu deschedules\n", written);
    EXPECT_GT(written, 100u);
}

// The example's protocol: while the word is not null the thread has not left the CPU.
TEST_F(DescheduleTest, CachedCpuIsRightOrGone) {
    if (rseq_cpu_word() == nullptr) GTEST_SKIP() << "no rseq to compare with";
    const int cpus = static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN));
    constexpr uint32_t kLooking = 0x80000000, kCpu = 1;
    std::vector<std::unique_ptr<Shared<Tally>>> tallies;
    std::vector<std::unique_ptr<Child>> children;
    for (int i = 0; i < 2 * cpus; i++) {
        tallies.push_back(std::make_unique<Shared<Tally>>());
        Tally& tally = **tallies.back();
        children.push_back(std::make_unique<Child>([&] {
            Member member;
            Error error;
            if (!member.join(dir, tally)) return;
            volatile uint32_t* cached = member.notes.add<uint32_t>(0, 0, &error);
            uint64_t uses = 0, wrong = 0, looked = 0;
            for (const double end = test::seconds() + 1; test::seconds() < end;)
                for (int turn = 0; turn < 1000; turn++, uses++) {
                    const uint32_t first = *cached, cpu = current_cpu(), again = *cached;
                    if (first == again && first >= kCpu && first != kLooking) wrong += first != cpu + kCpu;
                    if (again == 0 || again == kLooking) {
                        *cached = kLooking;
                        DescheduleNotes::replace(cached, kLooking, current_cpu() + kCpu);
                        looked++;
                    }
                }
            tally.uses = uses;
            tally.wrong = wrong;
            tally.written = looked;
        }));
    }
    std::mt19937 random(3);
    for (const double end = test::seconds() + 0.9; test::seconds() < end; usleep(500)) {
        cpu_set_t set;
        CPU_ZERO(&set);
        CPU_SET(random() % static_cast<unsigned>(cpus), &set);
        sched_setaffinity(children[random() % children.size()]->pid, sizeof(set), &set);
    }
    for (size_t i = 0; i < children.size(); i++) {
        children[i]->wait();
        Tally& tally = **tallies[i];
        ASSERT_EQ(tally.failed, 0) << tally.text;
        EXPECT_EQ(tally.wrong, 0u) << "of " << tally.uses;
        EXPECT_GT(tally.written, 2u);
        EXPECT_LT(tally.written, tally.uses / 100) << "it lasts, most of the time";
    }
}

// The example itself: it asks for its CPU about once a deschedule, and not at every use.
TEST_F(DescheduleTest, Example) {
    const test::Outcome outcome = test::shell(test::example_path("cached_cpu_pointer") + " " + dir);
    ASSERT_EQ(outcome.exit_code, 0) << outcome.output;
    unsigned long uses = 0, looked = 0, left = 0;
    ASSERT_EQ(sscanf(outcome.output.c_str(), "%lu uses, %lu times asked for the CPU, %lu times", &uses,
                     &looked, &left),
              3)
        << outcome.output;
    EXPECT_GE(looked, 1u);
    EXPECT_LE(looked, left + 1) << outcome.output;
    EXPECT_GT(uses, 1000 * looked) << outcome.output;
    EXPECT_NE(test::shell(test::example_path("cached_cpu_pointer") + " /sys/fs/bpf/no_such_mirror").exit_code,
              0);
}

// Notes that say anything: the stores stay in the words of that slot.
TEST_F(DescheduleTest, HostileNotesStayInTheirSlot) {
    Shared<Tally> tally;
    Child child([&] {
        Member member;
        if (!member.join(dir, *tally)) return;
        for (;;) usleep(50);
    });
    ASSERT_TRUE(eventually([&] { return tally->slot != 0 || tally->failed != 0; }));
    ASSERT_EQ(tally->failed, 0) << tally->text;
    sched_notes* notes = all();
    const uint32_t slot = tally->slot;
    const size_t bytes = (mirror.capacity() + 1) * sizeof(sched_notes);
    std::vector<unsigned char> expected(bytes);
    std::mt19937 random(5);
    int changed = 0;
    for (int round = 0; round < 300; round++) {
        auto* raw = reinterpret_cast<unsigned char*>(notes);
        for (size_t i = 0; i < bytes; i++) raw[i] = static_cast<unsigned char>(random());
        if (round % 2 == 0)
            for (sched_note& note : notes[slot].note) note.size = static_cast<uint8_t>(1U << random() % 4);
        memcpy(expected.data(), raw, bytes);
        const uint64_t before = mirror.info(static_cast<SlotId>(slot)).switches;
        ASSERT_TRUE(eventually([&] { return mirror.info(static_cast<SlotId>(slot)).switches > before + 2; }));
        const size_t words = slot * sizeof(sched_notes);
        changed += memcmp(expected.data() + words, raw + words, SCHED_NOTE_BYTES) != 0;
        // All but these words, which change all the time.
        size_t others = 0;
        for (size_t i = 0; i < bytes; i++)
            others += (i < words || i >= words + SCHED_NOTE_BYTES) && raw[i] != expected[i];
        ASSERT_EQ(others, 0u) << "round " << round;
    }
    EXPECT_GT(changed, 100);
    close_all(notes);
}

// At no other time: not when the task comes back, either.
TEST_F(DescheduleTest, NotWrittenWhenTheTaskComesBack) {
    Shared<Tally> tally;
    int ends[2];
    ASSERT_EQ(pipe(ends), 0);
    // On a CPU that never idles: not every kernel traces the switch away from the idle task.
    test::RestoreAffinity restore;
    test::pin_to(0);
    Child busy([] {
        for (;;) asm volatile("");
    });
    Child child([&] {
        Member member;
        Error error;
        if (!member.join(dir, *tally)) return;
        volatile uint32_t* word = member.notes.add<uint32_t>(0, 77, &error);
        for (char byte; read(ends[0], &byte, 1) == 1;) tally->uses = *word;
    });
    ASSERT_TRUE(eventually([&] { return tally->slot != 0 || tally->failed != 0; }));
    ASSERT_EQ(tally->failed, 0) << tally->text;
    const auto slot = static_cast<SlotId>(tally->slot);
    sched_notes* notes = all();
    auto* word = reinterpret_cast<volatile uint32_t*>(notes[slot].words);
    // It may be descheduled between coming back and looking, but seldom.
    int turns = 0, untouched = 0;
    for (; turns < 30; turns++) {
        ASSERT_TRUE(eventually([&] { return mirror.look(slot) == SchedState::blocked; }));
        *word = 5;
        tally->uses = 0;
        ASSERT_EQ(write(ends[1], "x", 1), 1);
        ASSERT_TRUE(eventually([&] { return tally->uses != 0; }));
        untouched += tally->uses == 5;
    }
    EXPECT_GT(untouched, turns / 2);
    EXPECT_TRUE(eventually([&] { return *word == 77; }));
    close_all(notes);
}

TEST_F(DescheduleTest, ReplaceComesTooLateAfterADeschedule) {
    DescheduleNotes notes;
    Error error;
    ASSERT_TRUE(notes.open(dir.c_str(), mirror, task, &error)) << error.text;
    volatile uint64_t* word = notes.add<uint64_t>(0, 0, &error);
    ASSERT_NE(word, nullptr) << error.text;
    *word = 1;
    usleep(1000);
    EXPECT_FALSE(DescheduleNotes::replace<uint64_t>(word, 1, 2));
    EXPECT_EQ(*word, 0u);
    EXPECT_TRUE(DescheduleNotes::replace<uint64_t>(word, 0, 2));
    usleep(1000);
    EXPECT_EQ(*word, 0u);
    notes.close();
}

// A task that dies is written a last time. With the switch program gone, no other store can explain the value.
TEST_F(DescheduleTest, WrittenAtDeath) {
    Shared<Tally> tally;
    Child child([&] {
        Member member;
        Error error;
        if (!member.join(dir, *tally)) return;
        member.notes.add<uint32_t>(0, 77, &error);
        tally->ready = 1;
        for (;;) pause();
    });
    ASSERT_TRUE(eventually([&] { return tally->ready != 0 || tally->failed != 0; }));
    ASSERT_EQ(unlink((dir + "/sched_switch").c_str()), 0);
    usleep(100000);
    sched_notes* notes = all();
    auto* word = reinterpret_cast<volatile uint32_t*>(notes[tally->slot].words);
    *word = 1;
    usleep(1000);
    ASSERT_EQ(*word, 1u);
    child.end(SIGKILL);
    EXPECT_EQ(*word, 77u);
    close_all(notes);
}

// The next user of a slot has neither its predecessor's notes nor its words.
TEST_F(DescheduleTest, NothingPassesToTheSlotsNextUser) {
    DescheduleNotes notes;
    Error error;
    ASSERT_TRUE(notes.open(dir.c_str(), mirror, task, &error)) << error.text;
    ASSERT_NE(notes.add<uint32_t>(0, 77, &error), nullptr);
    const SlotId slot = task.slot();
    notes.reset_after_fork();  // as if it had died: nothing is taken back
    task.detach();
    ASSERT_TRUE(task.attach(mirror, &error)) << error.text;
    ASSERT_EQ(task.slot(), slot);
    sched_notes* raw = all();
    auto* word = reinterpret_cast<volatile uint32_t*>(raw[slot].words);
    *word = 1;
    usleep(1000);
    EXPECT_EQ(*word, 1u) << "who has no notes has nothing written";
    ASSERT_TRUE(notes.open(dir.c_str(), mirror, task, &error)) << error.text;
    EXPECT_EQ(*word, 0u);
    *word = 1;
    usleep(1000);
    EXPECT_EQ(*word, 1u) << "nor what another one noted";
    notes.close();
    close_all(raw);
}

// Unloading invalidates too, once and for all.
TEST_F(DescheduleTest, UnloadingWritesALastTime) {
    DescheduleNotes notes;
    Error error;
    ASSERT_TRUE(notes.open(dir.c_str(), mirror, task, &error)) << error.text;
    volatile uint32_t* word = notes.add<uint32_t>(0, 77, &error);
    ASSERT_NE(word, nullptr);
    // With the switch program gone, no other store can explain the value.
    ASSERT_EQ(unlink((dir + "/sched_switch").c_str()), 0);
    usleep(100000);
    *word = 1;
    usleep(1000);
    ASSERT_EQ(*word, 1u) << "nobody writes any more, and nobody knows";
    EXPECT_TRUE(notes.kept());
    ASSERT_EQ(schedmirror("unload").exit_code, 0);
    EXPECT_EQ(*word, 77u);
    EXPECT_FALSE(notes.kept());
    EXPECT_EQ(notes.add<uint32_t>(4, 1, &error), nullptr);
    notes.close();
}

TEST_F(DescheduleTest, ForkedChildOpensItsOwn) {
    DescheduleNotes notes;
    Error error;
    ASSERT_TRUE(notes.open(dir.c_str(), mirror, task, &error)) << error.text;
    volatile uint32_t* word = notes.add<uint32_t>(0, 77, &error);
    Shared<Tally> tally;
    Child child([&] {
        notes.reset_after_fork();
        task.reset_after_fork();
        Error failure;
        if (!task.attach(mirror, &failure) || !notes.open(dir.c_str(), mirror, task, &failure)) return;
        volatile uint32_t* mine = notes.add<uint32_t>(0, 55, &failure);
        usleep(1000);
        if (mine != nullptr && *mine == 55 && notes.kept()) tally->ready = 1;
    });
    child.wait();
    EXPECT_EQ(tally->ready, 1);
    EXPECT_TRUE(notes.kept());
    EXPECT_EQ(*word, 77u);
    notes.close();
}

}  // namespace
