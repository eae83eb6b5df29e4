// The mirror kept by the kernel: layout, slot life cycle, truth of the answers, hostile contents.
#include "mirror/mirror.h"

#include <fcntl.h>
#include <grp.h>
#include <gtest/gtest.h>
#include <linux/bpf.h>
#include <pwd.h>
#include <sys/stat.h>
#include <sys/syscall.h>

#include <cstring>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

#include "mirror/bpf_source.h"
#include "private_mirror.h"
#include "processes.h"

using namespace adaptive;
using test::Child;
using test::eventually;
using test::Shared;

namespace {
int kills = 0;
}  // namespace

// In the place of the C library's: counts how often somebody is asked for.
extern "C" int kill(pid_t pid, int signal) noexcept {
    kills++;
    return static_cast<int>(syscall(SYS_kill, pid, signal));
}

static_assert(offsetof(sched_slot, state) == 0 && offsetof(sched_slot, cpu) == 4);
static_assert(offsetof(sched_slot, tid) == 8 && offsetof(sched_slot, generation) == 12);
static_assert(offsetof(sched_slot, last_switch_ns) == 16 && offsetof(sched_slot, switches) == 24);
static_assert(offsetof(sched_claim, tid) == 0 && offsetof(sched_claim, generation) == 4);
static_assert(offsetof(sched_claim, seen_switches) == 8);
static_assert(offsetof(sched_header, version) == 4 && offsetof(sched_header, active) == 12);
static_assert(std::is_trivially_destructible_v<Mirror> && std::is_trivially_destructible_v<MirrorTask>);

namespace {

// What a child tells about itself.
struct Report {
    std::atomic<uint32_t> slot{0}, failed{0}, noted{0}, stale{0}, go{0};
    std::atomic<uint64_t> looks{0}, wrong{0};
    char text[256] = "";
};

class MirrorTest : public test::PrivateMirror {
  protected:
    // In a child: opens, attaches, reports. False: failed.
    bool join(Mirror& mirror, MirrorTask& task, Report& report) const {
        Error error;
        if (!mirror.open_bpf(dir.c_str(), &error) || !task.attach(mirror, &error)) {
            strcpy(report.text, error.text);
            report.failed = 1;
            return false;
        }
        report.slot = task.slot();
        return true;
    }
    bool joined(const Report& report) const {
        return eventually([&] { return report.slot != 0 || report.failed != 0; }) && report.failed == 0;
    }
    void open(Mirror& mirror) const {
        Error error;
        ASSERT_TRUE(mirror.open_bpf(dir.c_str(), &error)) << error.text;
    }
    bpf::Maps maps() const {
        bpf::Maps maps;
        Error error;
        EXPECT_TRUE(bpf::open_maps(dir.c_str(), &maps, &error)) << error.text;
        return maps;
    }
    // A descriptor of the kernel-written array with every right that its file gives.
    int open_slots() const {
        const std::string path = dir + "/slots";
        bpf_attr attr;
        memset(&attr, 0, sizeof(attr));
        attr.pathname = reinterpret_cast<uintptr_t>(path.c_str());
        return static_cast<int>(syscall(SYS_bpf, BPF_OBJ_GET, &attr, sizeof(attr)));
    }
    // Claims a slot in the name of a task of this pid namespace, which need not exist.
    static void claim_for(sched_claim& claim, pid_t tid) {
        struct stat status;
        ASSERT_EQ(stat("/proc/self/ns/pid", &status), 0);
        claim.tid = static_cast<uint32_t>(tid);
        claim.whence = {static_cast<uint32_t>(status.st_ino), claim.generation};
    }
    // Takes the switch program away and leaves the mirror as it is: from now on every switch is missed.
    void stop_recording() {
        ASSERT_EQ(unlink((dir + "/sched_switch").c_str()), 0);
        usleep(100000);
    }
};

void spin(MirrorTask& task) {
    for (;;) task.note_running();
}

TEST(ClosedMirror, KnowsNothing) {
    Mirror mirror;
    EXPECT_EQ(mirror.source(), Source::off);
    EXPECT_FALSE(mirror.active());
    EXPECT_EQ(mirror.capacity(), 0u);
    EXPECT_EQ(mirror.used(), 0u);
    for (int slot : {0, 1, 65535}) EXPECT_EQ(mirror.look(static_cast<SlotId>(slot)), SchedState::unknown);
    MirrorTask task;
    EXPECT_TRUE(task.note_running());
    task.detach();
    Error error;
    EXPECT_FALSE(task.attach(mirror, &error));
    EXPECT_FALSE(mirror.open_bpf("/sys/fs/bpf/no_such_mirror", &error));
    EXPECT_NE(strstr(error.text, "schedmirror load"), nullptr) << error.text;
}

TEST_F(MirrorTest, SlotLifeCycle) {
    Mirror mirror;
    open(mirror);
    EXPECT_EQ(mirror.source(), Source::bpf);
    EXPECT_EQ(mirror.capacity(), 100u);
    EXPECT_EQ(mirror.used(), 0u);
    MirrorTask task;
    Error error;
    ASSERT_TRUE(task.attach(mirror, &error)) << error.text;
    const SlotId slot = task.slot();
    ASSERT_TRUE(task.attach(mirror, &error));
    EXPECT_EQ(task.slot(), slot) << "attaching twice keeps the slot";
    EXPECT_EQ(mirror.used(), 1u);
    EXPECT_EQ(mirror.look(slot), SchedState::on_cpu) << "before the first switch";
    usleep(1000);
    task.note_running();
    const SlotInfo info = mirror.info(slot);
    EXPECT_EQ(info.state, SchedState::on_cpu);
    EXPECT_EQ(info.tid, test::machine_tid());
    EXPECT_GE(info.switches, 1u);
    EXPECT_GT(info.last_switch_ns, 0u);
    EXPECT_LT(info.cpu, 4096u);
    task.detach();
    EXPECT_EQ(task.slot(), 0);
    EXPECT_EQ(mirror.used(), 0u);
    EXPECT_EQ(mirror.info(slot).state, SchedState::unknown);
    const uint64_t switches = mirror.info(slot).switches;
    usleep(1000);
    EXPECT_EQ(mirror.info(slot).switches, switches) << "no longer counted";

    // The same slot again: another generation.
    ASSERT_TRUE(task.attach(mirror, &error)) << error.text;
    usleep(1000);
    EXPECT_EQ(task.slot(), slot) << "the search starts at the task's own place";
    EXPECT_GT(mirror.info(slot).generation, info.generation);
    task.detach();
    mirror.close();
}

TEST_F(MirrorTest, UnusedAndOutOfRangeSlotsAreUnknown) {
    Mirror mirror;
    open(mirror);
    for (uint32_t slot = 0; slot <= 65535; slot++)
        ASSERT_EQ(mirror.look(static_cast<SlotId>(slot)), SchedState::unknown) << slot;
    mirror.close();
}

TEST_F(MirrorTest, BlockedTaskIsSeenBlocked) {
    Shared<Report> report;
    Child child([&] {
        Mirror mirror;
        MirrorTask task;
        if (join(mirror, task, *report)) pause();
    });
    ASSERT_TRUE(joined(*report)) << report->text;
    Mirror mirror;
    open(mirror);
    const auto slot = static_cast<SlotId>(report->slot);
    EXPECT_TRUE(eventually([&] { return mirror.look(slot) == SchedState::blocked; }));
    mirror.close();
}

// Reader and spinning owner share one CPU: whenever the reader looks, the owner is certainly preempted.
TEST_F(MirrorTest, PreemptedTaskIsSeenPreempted) {
    test::RestoreAffinity restore;
    test::pin_to(0);
    Shared<Report> report;
    Child child([&] {
        Mirror mirror;
        MirrorTask task;
        if (join(mirror, task, *report)) spin(task);
    });
    ASSERT_TRUE(joined(*report)) << report->text;
    Mirror mirror;
    open(mirror);
    const auto slot = static_cast<SlotId>(report->slot);
    uint64_t looks = 0, preempted = 0;
    usleep(50000);
    for (const double end = test::seconds() + 1; test::seconds() < end; looks++)
        preempted += mirror.look(slot) == SchedState::preempted;
    EXPECT_GT(static_cast<double>(preempted) / static_cast<double>(looks), 0.999) << looks << " looks";
    mirror.close();
}

// Three spinning owners on one CPU, the reader on another: at most one of them runs at a time, and each has
// its turn, which may take a while when others want that CPU too.
TEST_F(MirrorTest, MoreRunnableTasksThanCpus) {
    if (sysconf(_SC_NPROCESSORS_ONLN) < 2) GTEST_SKIP() << "needs two CPUs";
    test::RestoreAffinity restore;
    test::pin_to(1);
    std::vector<std::unique_ptr<Shared<Report>>> reports;
    std::vector<std::unique_ptr<Child>> children;
    for (int i = 0; i < 3; i++) {
        reports.push_back(std::make_unique<Shared<Report>>());
        Report& report = **reports.back();
        children.push_back(std::make_unique<Child>([&] {
            Mirror mirror;
            MirrorTask task;
            if (join(mirror, task, report)) spin(task);
        }));
    }
    for (auto& report : reports) ASSERT_TRUE(joined(**report)) << (*report)->text;
    test::pin_to(0);
    Mirror mirror;
    open(mirror);
    uint64_t looks = 0, crowded = 0, on_cpu[3] = {}, preempted[3] = {};
    auto seen_both_ways = [&] {
        for (int i = 0; i < 3; i++)
            if (on_cpu[i] == 0 || preempted[i] == 0) return false;
        return true;
    };
    const double start = test::seconds();
    for (double now = start; now < start + 1 || (now < start + 30 && !seen_both_ways());
         now = test::seconds(), looks++) {
        int running = 0;
        for (int i = 0; i < 3; i++) {
            const SchedState state = mirror.look(static_cast<SlotId>((*reports[i])->slot));
            running += state == SchedState::on_cpu;
            on_cpu[i] += state == SchedState::on_cpu;
            preempted[i] += state == SchedState::preempted;
        }
        crowded += running > 1;
    }
    EXPECT_LT(static_cast<double>(crowded) / static_cast<double>(looks), 0.01) << looks << " looks";
    for (int i = 0; i < 3; i++) {
        EXPECT_GT(on_cpu[i], 0u);
        EXPECT_GT(preempted[i], 0u);
    }
    mirror.close();
}

// The acceptance: a running task that looks at its own slot sees itself on CPU in at least 99.9 % of the
// looks.
class Accuracy : public MirrorTest, public ::testing::WithParamInterface<int> {};

TEST_P(Accuracy, RunningTaskSeesItselfOnCpu) {
    const int tasks = GetParam();
    std::vector<std::unique_ptr<Shared<Report>>> reports;
    std::vector<std::unique_ptr<Child>> children;
    for (int i = 0; i < tasks; i++) {
        reports.push_back(std::make_unique<Shared<Report>>());
        Report& report = **reports.back();
        children.push_back(std::make_unique<Child>([&, i] {
            Mirror mirror;
            MirrorTask task;
            if (!join(mirror, task, report)) return;
            const double end = test::seconds() + 2;
            uint64_t looks = 0, wrong = 0;
            while (test::seconds() < end) {
                for (int k = 0; k < 100; k++, looks++) {
                    task.note_running();
                    wrong += mirror.look(task.slot()) != SchedState::on_cpu;
                }
                if (i % 2 == 1) usleep(50);  // some wake up often, some are preempted
            }
            report.looks = looks;
            report.wrong = wrong;
            task.detach();
        }));
    }
    uint64_t looks = 0, wrong = 0;
    for (int i = 0; i < tasks; i++) {
        children[i]->wait();
        Report& report = **reports[i];
        ASSERT_EQ(report.failed, 0u) << report.text;
        EXPECT_LE(static_cast<double>(report.wrong), 0.001 * static_cast<double>(report.looks))
            << "task " << i;
        looks += report.looks;
        wrong += report.wrong;
    }
    RecordProperty("looks", std::to_string(looks));
    printf("%d tasks: %lu looks, %lu wrong\n", tasks, looks, wrong);
}

INSTANTIATE_TEST_SUITE_P(IdleAndOversubscribed, Accuracy, ::testing::Values(1, 2, 8));

// A switch-in that the kernel's events miss is mended by the task's own note_running.
TEST_F(MirrorTest, MissedSwitchIsMended) {
    Shared<Report> report;
    Child child([&] {
        Mirror mirror;
        MirrorTask task;
        if (!join(mirror, task, *report)) return;
        while (report->go == 0) usleep(200000);
        task.note_running();
        report->noted = 1;
        for (;;) getppid();
    });
    ASSERT_TRUE(joined(*report)) << report->text;
    Mirror mirror;
    open(mirror);
    const auto slot = static_cast<SlotId>(report->slot);
    // Stop recording while the child sleeps; its 200 ms leave time for that.
    ASSERT_TRUE(eventually([&] { return mirror.look(slot) == SchedState::blocked; }));
    const uint64_t asleep = mirror.info(slot).switches;
    ASSERT_TRUE(eventually([&] { return mirror.info(slot).switches > asleep + 1; }));
    stop_recording();
    ASSERT_EQ(mirror.look(slot), SchedState::blocked);
    report->go = 1;
    ASSERT_TRUE(eventually([&] { return report->noted != 0; }));
    EXPECT_EQ(mirror.look(slot), SchedState::on_cpu);
    mirror.close();
}

// What `count` sleeps come to; the last answer, or the first that is not `works`.
Recording sleep_and_note(MirrorTask& task, int count) {
    for (int i = 0; i < count; i++) {
        usleep(100);
        if (const Recording answer = task.note_slept(); answer != Recording::works) return answer;
    }
    return Recording::works;
}

TEST_F(MirrorTest, MirrorThatNobodyKeepsIsNoticed) {
    Mirror mirror;
    open(mirror);
    MirrorTask task;
    Error error;
    ASSERT_TRUE(task.attach(mirror, &error)) << error.text;
    EXPECT_EQ(sleep_and_note(task, 100), Recording::works);
    stop_recording();
    ASSERT_EQ(sleep_and_note(task, 1), Recording::works);  // what moved before

    // Sleeps that switched nothing, their wake-ups came first: no proof, however many. A busy machine may
    // preempt this loop, which is a switch like any other; sixteen within 64 turns it does not.
    for (int i = 0; i < 64; i++) ASSERT_EQ(task.note_slept(), Recording::works) << i;

    EXPECT_EQ(sleep_and_note(task, 400), Recording::stopped) << "it worked before";
    task.detach();
    ASSERT_TRUE(mirror.active()) << "the mirror itself does not know";
    ASSERT_TRUE(task.attach(mirror, &error)) << error.text;
    EXPECT_EQ(sleep_and_note(task, 400), Recording::never) << "not since attaching";
    task.detach();
    mirror.close();
}

// The task's registration alone is gone: attaching again helps.
TEST_F(MirrorTest, RegistrationTakenAwayIsNoticed) {
    Mirror mirror;
    open(mirror);
    MirrorTask task;
    Error error;
    ASSERT_TRUE(task.attach(mirror, &error)) << error.text;
    usleep(100);
    const bpf::Maps raw = maps();
    bpf::set_registration(raw.register_fd, {0, 0});
    EXPECT_EQ(sleep_and_note(task, 400), Recording::stopped);
    task.detach();
    ASSERT_TRUE(task.attach(mirror, &error)) << error.text;
    EXPECT_EQ(sleep_and_note(task, 100), Recording::works);
    task.detach();
    mirror.close();
    bpf::close_maps(raw);
}

TEST_F(MirrorTest, OutOfSlotsThenOneComesBack) {
    reload("--slots 2 --group root");
    Shared<Report> a, b;
    auto hold = [&](Report& report) {
        Mirror mirror;
        MirrorTask task;
        if (join(mirror, task, report)) pause();
    };
    Child first([&] { hold(*a); });
    Child second([&] { hold(*b); });
    ASSERT_TRUE(joined(*a)) << a->text;
    ASSERT_TRUE(joined(*b)) << b->text;
    EXPECT_NE(a->slot, b->slot);

    Mirror mirror;
    open(mirror);
    EXPECT_EQ(mirror.used(), 2u);
    MirrorTask task;
    Error error;
    EXPECT_FALSE(task.attach(mirror, &error));
    EXPECT_NE(strstr(error.text, "all 2 slots"), nullptr) << error.text;
    EXPECT_EQ(task.slot(), 0);
    EXPECT_TRUE(task.note_running()) << "the caller goes on without";

    const uint32_t generation = mirror.info(static_cast<SlotId>(a->slot)).generation;
    first.end(SIGKILL);
    ASSERT_TRUE(eventually([&] { return mirror.used() == 1; }))
        << "freed by the kernel side, with nobody's help";
    EXPECT_EQ(mirror.look(static_cast<SlotId>(a->slot)), SchedState::dead);
    EXPECT_EQ(mirror.info(static_cast<SlotId>(a->slot)).generation, generation + 1);
    ASSERT_TRUE(task.attach(mirror, &error)) << error.text;
    EXPECT_EQ(task.slot(), a->slot);
    EXPECT_EQ(mirror.look(task.slot()), SchedState::on_cpu);
    task.detach();
    mirror.close();
}

// A task that died between claiming and registering left a claim that the kernel side knows nothing of.
TEST_F(MirrorTest, ClaimOfAVanishedTaskIsTakenOver) {
    reload("--slots 1 --group root");
    Child vanished([] {});
    const bpf::Maps raw = maps();
    claim_for(raw.claim_array[1], vanished.pid);
    Mirror mirror;
    open(mirror);
    MirrorTask task;
    Error error;
    EXPECT_FALSE(task.attach(mirror, &error)) << "a zombie still exists";
    vanished.wait();
    ASSERT_TRUE(task.attach(mirror, &error)) << error.text;
    EXPECT_EQ(task.slot(), 1);
    task.detach();
    mirror.close();
    bpf::close_maps(raw);
}

// A mirror without a free slot costs those who look for one little, and only at that moment.
TEST_F(MirrorTest, AFullMirrorIsLookedAtBriefly) {
    for (const int slots : {100, 65534}) {
        reload("--group root --slots " + std::to_string(slots));
        const bpf::Maps raw = maps();
        for (int slot = 1; slot <= slots; slot++) claim_for(raw.claim_array[slot], getpid());
        Mirror mirror;
        open(mirror);
        MirrorTask task;
        Error error;
        EXPECT_FALSE(task.attach(mirror, &error));
        EXPECT_NE(strstr(error.text, (" " + std::to_string(slots) + " slots").c_str()), nullptr)
            << error.text;
        kills = 0;
        for (int tries = 0; tries < 10; tries++) EXPECT_FALSE(task.attach(mirror, &error));
        EXPECT_LE(kills, 10 * 8) << "of " << slots << " slots";
        EXPECT_GT(kills, 0);
        mirror.close();
        bpf::close_maps(raw);
    }
}

// Whichever slot of a full mirror becomes free, or lost its task unseen, it is found after some tries.
TEST_F(MirrorTest, TheLastFreeSlotIsFoundAfterSomeTries) {
    constexpr int kSlots = 4096;
    reload("--group root --slots " + std::to_string(kSlots));
    const bpf::Maps raw = maps();
    Mirror mirror;
    open(mirror);
    for (int slot = 1; slot <= kSlots; slot++) claim_for(raw.claim_array[slot], getpid());
    Child vanished([] {});
    vanished.wait();
    Error error;
    for (const bool died : {false, true}) {
        for (const int free : {1, 2, 63, 64, 65, 1000, 2047, 2048, 4095, 4096}) {
            if (died) {
                Child child([] {});
                claim_for(raw.claim_array[free], child.pid);
                child.wait();
            } else {
                raw.claim_array[free].tid = 0;
            }
            MirrorTask task;
            int tries = 1;
            while (!task.attach(mirror, &error) && tries < 5000) tries++;
            EXPECT_EQ(task.slot(), free) << error.text;
            EXPECT_LE(tries, died ? 1024 : 128) << "slot " << free << (died ? " of a dead task" : "");
            task.detach();
            claim_for(raw.claim_array[free], getpid());
        }
    }
    mirror.close();
    bpf::close_maps(raw);
}

// For a task of another pid namespace kill(2) finds nobody, or somebody else.
TEST_F(MirrorTest, PidNamespacesLeaveEachOtherTheirSlots) {
    for (const bool outside_first : {false, true}) {
        reload("--slots 1 --group root");
        Shared<Report> outside, inside;
        const auto hold = [&](Report& report) {
            Mirror mirror;
            MirrorTask task;
            if (!join(mirror, task, report)) return;
            report.noted = 1;
            while (task.note_running()) usleep(1000);
            report.stale = 1;
            pause();
        };
        const auto in_another = [&] {
            if (unshare(CLONE_NEWPID) != 0) _exit(1);
            Child first([&] {  // process 1: the others end with it
                Child second([&] { hold(*inside); });
                second.wait();
            });
            first.wait();
        };
        Report &owner = outside_first ? *outside : *inside, &rival = outside_first ? *inside : *outside;
        auto child = std::make_unique<Child>([&] { outside_first ? hold(*outside) : in_another(); });
        ASSERT_TRUE(joined(owner)) << owner.text;
        {
            Child other([&] { outside_first ? in_another() : hold(*outside); });
            EXPECT_FALSE(joined(rival)) << (outside_first ? "from inside" : "from outside");
            EXPECT_NE(strstr(rival.text, "all 1 slots"), nullptr) << rival.text;
        }
        usleep(20000);
        EXPECT_EQ(owner.stale, 0u) << "its slot was taken";
    }
}

// Nor is there a task behind a number that is none. (As a signed number these are process groups, and all
// processes.)
TEST_F(MirrorTest, ClaimOfNonsenseIsTakenOver) {
    reload("--slots 1 --group root");
    const bpf::Maps raw = maps();
    Mirror mirror;
    open(mirror);
    for (const uint32_t tid : {UINT32_MAX, static_cast<uint32_t>(-getpgrp()), 0x80000000U}) {
        raw.claim_array[1].tid = tid;
        MirrorTask task;
        Error error;
        EXPECT_TRUE(task.attach(mirror, &error)) << tid << ": " << error.text;
        task.detach();
    }
    mirror.close();
    bpf::close_maps(raw);
}

// Taken for dead (say, in another pid namespace), a task learns that its slot has a newer user.
TEST_F(MirrorTest, TakenOverTaskNotices) {
    reload("--slots 1 --group root");
    Shared<Report> report;
    Child child([&] {
        Mirror mirror;
        MirrorTask task;
        if (!join(mirror, task, *report)) return;
        while (task.note_running()) usleep(1000);
        report->noted = 1;
        for (;;) usleep(1000);
    });
    ASSERT_TRUE(joined(*report)) << report->text;
    Child vanished([] {});
    const auto gone = static_cast<uint32_t>(vanished.pid);
    vanished.wait();
    const bpf::Maps raw = maps();
    raw.claim_array[1].tid = gone;
    Mirror mirror;
    open(mirror);
    MirrorTask task;
    Error error;
    ASSERT_TRUE(task.attach(mirror, &error)) << error.text;
    usleep(1000);
    EXPECT_TRUE(eventually([&] { return report->noted != 0; }));
    // The older user's switches are ignored, and its death frees nothing.
    for (const double end = test::seconds() + 0.2; test::seconds() < end;)
        ASSERT_EQ(mirror.info(1).tid, test::machine_tid());
    child.end(SIGKILL);
    usleep(10000);
    EXPECT_EQ(mirror.used(), 1u);
    EXPECT_TRUE(task.note_running());
    EXPECT_EQ(mirror.look(1), SchedState::on_cpu);
    task.detach();
    mirror.close();
    bpf::close_maps(raw);
}

// The same when the newer user has claimed the slot but not switched yet, so that the kernel has not heard of
// it.
TEST_F(MirrorTest, DeathFreesNobodyElsesClaim) {
    Shared<Report> report;
    Child child([&] {
        Mirror mirror;
        MirrorTask task;
        if (join(mirror, task, *report)) pause();
    });
    ASSERT_TRUE(joined(*report)) << report->text;
    const bpf::Maps raw = maps();
    sched_claim& claim = raw.claim_array[report->slot];
    claim.generation++;
    claim.tid = static_cast<uint32_t>(gettid());
    child.end(SIGKILL);
    usleep(10000);
    EXPECT_EQ(claim.tid, static_cast<uint32_t>(gettid()));
    bpf::close_maps(raw);
}

TEST_F(MirrorTest, UnloadedWhileAttached) {
    Mirror mirror;
    open(mirror);
    MirrorTask task;
    Error error;
    ASSERT_TRUE(task.attach(mirror, &error)) << error.text;
    usleep(1000);
    EXPECT_TRUE(task.note_running());
    ASSERT_EQ(schedmirror("unload").exit_code, 0);
    EXPECT_FALSE(task.note_running());
    EXPECT_FALSE(mirror.active());
    EXPECT_EQ(mirror.look(task.slot()), SchedState::unknown);
    MirrorTask late;
    EXPECT_FALSE(late.attach(mirror, &error));
    task.detach();
    mirror.close();

    ASSERT_EQ(schedmirror("load --slots 100 --group root").exit_code, 0);
    open(mirror);
    ASSERT_TRUE(task.attach(mirror, &error)) << error.text;
    EXPECT_TRUE(task.note_running());
    EXPECT_EQ(mirror.look(task.slot()), SchedState::on_cpu);
    task.detach();
    mirror.close();
}

// Unloading itself moves the switch counts: a task that is never switched out learns of it too.
TEST_F(MirrorTest, UnloadingIsNoticedWithoutASwitch) {
    Mirror mirror;
    open(mirror);
    MirrorTask task;
    Error error;
    ASSERT_TRUE(task.attach(mirror, &error)) << error.text;
    stop_recording();
    ASSERT_TRUE(task.note_running());
    ASSERT_EQ(schedmirror("unload").exit_code, 0);
    EXPECT_FALSE(task.note_running());
    task.detach();
    mirror.close();
}

TEST_F(MirrorTest, ForkedChildTakesASlotOfItsOwn) {
    Mirror mirror;
    open(mirror);
    MirrorTask task;
    Error error;
    ASSERT_TRUE(task.attach(mirror, &error)) << error.text;
    Shared<Report> report;
    Child child([&] {
        task.reset_after_fork();
        Error failure;
        if (task.attach(mirror, &failure)) report->slot = task.slot();
    });
    child.wait();
    EXPECT_NE(report->slot, 0u);
    EXPECT_NE(report->slot, task.slot());
    EXPECT_TRUE(eventually([&] { return mirror.used() == 1; }));
    task.detach();
    mirror.close();
}

TEST_F(MirrorTest, ThreadsRegisterOneByOne) {
    Mirror mirror;
    open(mirror);
    MirrorTask task;
    Error error;
    ASSERT_TRUE(task.attach(mirror, &error)) << error.text;
    std::thread other([&] {
        MirrorTask mine;
        Error failure;
        ASSERT_TRUE(mine.attach(mirror, &failure)) << failure.text;
        EXPECT_NE(mine.slot(), task.slot());
        usleep(1000);
        mine.note_running();
        EXPECT_EQ(mirror.look(mine.slot()), SchedState::on_cpu);
        EXPECT_EQ(mirror.info(mine.slot()).tid, test::machine_tid());
        // Ends attached: the kernel side gives the slot back.
    });
    other.join();
    EXPECT_TRUE(eventually([&] { return mirror.used() == 1; }));
    task.detach();
    mirror.close();
}

// Runs the body as another user, with that user's groups.
template <typename Body>
void run_as(const char* user, Body body) {
    const passwd* entry = getpwnam(user);
    if (entry == nullptr || initgroups(user, entry->pw_gid) != 0 || setgid(entry->pw_gid) != 0 ||
        setuid(entry->pw_uid) != 0)
        _exit(2);
    body();
}

TEST_F(MirrorTest, GroupMembersNeedNoPrivilege) {
    if (getpwnam("postgres") == nullptr || getpwnam("nobody") == nullptr)
        GTEST_SKIP() << "needs the users postgres and nobody";
    reload("--group postgres");
    for (const char* user : {"postgres", "nobody"}) {
        Shared<Report> report;
        Child child([&] {
            run_as(user, [&] {
                Mirror mirror;
                MirrorTask task;
                if (!join(mirror, task, *report)) return;
                usleep(1000);
                report->noted = task.note_running() && mirror.look(task.slot()) == SchedState::on_cpu &&
                                mirror.info(task.slot()).switches > 0;
                task.detach();
            });
        });
        EXPECT_EQ(child.wait(), 0);
        if (user[0] == 'p') {
            EXPECT_EQ(report->noted, 1u) << report->text;
        } else {
            EXPECT_EQ(report->failed, 1u);
            EXPECT_NE(strstr(report->text, "group"), nullptr) << report->text;
        }
    }
}

// Several that register and unregister on one CPU, each preempted in the middle of it by the others.
TEST_F(MirrorTest, RegistrationsOnOneCpuDoNotDisturbEachOther) {
    const bpf::Maps raw = maps();
    const auto churn = [&](uint32_t slot) {
        cpu_set_t one;
        CPU_ZERO(&one);
        CPU_SET(0, &one);
        sched_setaffinity(0, sizeof(one), &one);
        for (const double end = test::seconds() + 2; test::seconds() < end;)
            if (bpf::set_registration(raw.register_fd, {slot, 1}) != 0 ||
                bpf::set_registration(raw.register_fd, {0, 0}) != 0)
                _exit(1);
        // Nothing of it is left: a switch of ours is not recorded.
        const uint64_t before = __atomic_load_n(&raw.slot_array[slot].switches, __ATOMIC_RELAXED);
        usleep(1000);
        _exit(__atomic_load_n(&raw.slot_array[slot].switches, __ATOMIC_RELAXED) == before ? 0 : 2);
    };
    Child a([&] { churn(1); }), b([&] { churn(2); }), c([&] { churn(3); });
    EXPECT_EQ(a.wait(), 0);
    EXPECT_EQ(b.wait(), 0);
    EXPECT_EQ(c.wait(), 0);
    bpf::close_maps(raw);
}

// The kernel side finds registrations by task id, in 8 places here. Two tasks that want the same one are both followed.
TEST_F(MirrorTest, TasksThatWantOnePlaceAreBothFollowed) {
    reload("--slots 2 --group root");
    constexpr uint32_t kPlaces = 8;
    Mirror mirror;
    open(mirror);
    const auto wait_and_spin = [&](Report& report) {
        Mirror its;
        MirrorTask task;
        if (!join(its, task, report)) return;
        while (report.go == 0) usleep(1000);
        while (report.go == 1) task.note_running();
        pause();
    };
    const auto tid = [&](const Report& report) {
        const auto slot = static_cast<SlotId>(report.slot);
        EXPECT_TRUE(eventually([&] { return mirror.look(slot) == SchedState::blocked; })) << "not followed";
        return mirror.info(slot).tid;
    };
    Shared<Report> a, b;
    auto first = std::make_unique<Child>([&] { wait_and_spin(*a); });
    ASSERT_TRUE(joined(*a)) << a->text;
    std::unique_ptr<Child> second;
    for (int i = 0; i < 1000 && !HasFailure(); i++) {
        b->slot = 0;
        second = std::make_unique<Child>([&] { wait_and_spin(*b); });
        ASSERT_TRUE(joined(*b)) << b->text;
        if ((tid(*a) ^ tid(*b)) % kPlaces == 0) break;
        second.reset();
        ASSERT_TRUE(eventually([&] { return mirror.used() == 1; }));
    }
    ASSERT_EQ((tid(*a) ^ tid(*b)) % kPlaces, 0u) << "no two ids that want one place";
    for (Report* report : {&*a, &*b}) {
        const auto slot = static_cast<SlotId>(report->slot);
        report->go = 1;
        EXPECT_TRUE(eventually([&] { return mirror.look(slot) == SchedState::on_cpu; }));
        report->go = 2;
        EXPECT_TRUE(eventually([&] { return mirror.look(slot) == SchedState::blocked; }));
        // The place is free after the first one: who has none goes on.
        if (report == &*a) first.reset();
    }
    EXPECT_EQ(mirror.look(static_cast<SlotId>(a->slot)), SchedState::dead);
    EXPECT_EQ(mirror.used(), 1u);
    mirror.close();
}

// Whatever a member of the group registers or writes, the header and other slots' memory stay the kernel's.
TEST_F(MirrorTest, HostileMembersOnlyMislead) {
    const bpf::Maps raw = maps();
    const sched_header before = *reinterpret_cast<const sched_header*>(raw.slot_array);
    for (uint32_t slot : {0u, 101u, 65535u, 65536u, UINT32_MAX}) {
        Child child([&] {
            if (bpf::set_registration(raw.register_fd, {slot, 7}) != 0) _exit(1);
            usleep(2000);
        });
        EXPECT_EQ(child.wait(), 0);
    }
    EXPECT_EQ(memcmp(&before, raw.slot_array, sizeof(before)), 0);
    const int fd = open_slots();
    ASSERT_GE(fd, 0);
    EXPECT_EQ(mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0), MAP_FAILED)
        << "not even as root";
    close(fd);

    auto* bytes = reinterpret_cast<unsigned char*>(raw.claim_array);
    srand(7);
    for (size_t i = 0; i < raw.slots * sizeof(sched_claim); i++)
        bytes[i] = static_cast<unsigned char>(rand());
    Mirror mirror;
    open(mirror);
    for (uint32_t slot = 0; slot <= 65535; slot++) {
        EXPECT_LE(static_cast<uint32_t>(mirror.look(static_cast<SlotId>(slot))), SCHED_DEAD);
        mirror.info(static_cast<SlotId>(slot));
    }
    EXPECT_LE(mirror.used(), 100u);
    MirrorTask task;
    Error error;
    if (task.attach(mirror, &error)) task.detach();
    mirror.close();
    bpf::close_maps(raw);
}

}  // namespace
