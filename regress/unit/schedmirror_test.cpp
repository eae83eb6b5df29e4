// The schedmirror command: what it says, what it returns, what it leaves behind.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <linux/bpf.h>
#include <sys/stat.h>
#include <sys/syscall.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "private_mirror.h"
#include "processes.h"

using test::Outcome;
using test::shell;

namespace {

class SchedmirrorTest : public test::PrivateMirror {
  protected:
    void refuses(const Outcome& outcome, const char* because, int exit_code = 1) const {
        EXPECT_EQ(outcome.exit_code, exit_code) << outcome.output;
        EXPECT_NE(outcome.output.find(because), std::string::npos) << outcome.output;
        EXPECT_EQ(std::count(outcome.output.begin(), outcome.output.end(), '\n'), 1) << outcome.output;
    }
    // A command line in a mount namespace of its own, where `before` has been arranged.
    Outcome elsewhere(const std::string& before, const std::string& command) const {
        return shell("unshare -m sh -c '" + before + " && " + test::schedmirror_path() + " " + command + "'");
    }
};

TEST_F(SchedmirrorTest, LoadIsIdempotent) {
    const Outcome again = schedmirror("load");
    EXPECT_EQ(again.exit_code, 0);
    EXPECT_NE(again.output.find("loaded already"), std::string::npos) << again.output;
    EXPECT_EQ(schedmirror("load --slots 100 --group root").exit_code, 0);
    refuses(schedmirror("load --slots 101"), "with 100 slots for group root");
    refuses(schedmirror("load --group daemon"), "with 100 slots for group root");
}

TEST_F(SchedmirrorTest, StatusAndUnload) {
    Outcome status = schedmirror("status");
    EXPECT_EQ(status.exit_code, 0);
    EXPECT_NE(status.output.find("slots: 0 used of 100"), std::string::npos) << status.output;
    EXPECT_EQ(schedmirror("unload").exit_code, 0);
    EXPECT_NE(access(dir.c_str(), F_OK), 0) << "nothing is left behind";
    status = schedmirror("status");
    EXPECT_EQ(status.exit_code, 3);
    EXPECT_NE(status.output.find("not loaded"), std::string::npos) << status.output;
    EXPECT_EQ(schedmirror("unload").exit_code, 0) << "idempotent";
}

TEST_F(SchedmirrorTest, OwnersAndModes) {
    const struct {
        const char* name;
        mode_t mode;
    } files[] = {
        {"", 0750},          {"/slots", 0660},      {"/claims", 0660},       {"/notes", 0660},
        {"/register", 0660}, {"/deactivate", 0600}, {"/sched_switch", 0600}, {"/process_exit", 0600}};
    for (const auto& file : files) {
        struct stat found;
        ASSERT_EQ(stat((dir + file.name).c_str(), &found), 0) << file.name;
        EXPECT_EQ(found.st_mode & 07777, file.mode) << file.name;
        EXPECT_EQ(found.st_uid, 0u);
    }
}

TEST_F(SchedmirrorTest, SaysWhichModesItSetsAndTakesBackTheFileSystems) {
    const std::string command = test::schedmirror_path(), mode = "stat -c %a /sys/fs/bpf | tail -c 4";
    const std::string mount = "mount -t bpf -o mode=0700 bpf /sys/fs/bpf && ";
    const Outcome both =
        shell("unshare -m sh -c '" + mount + command + " load --group root && " + mode + " && " + command +
              " load --group root && " + command + " unload && " + mode + " && ls /sys/fs/bpf'");
    ASSERT_EQ(both.exit_code, 0) << both.output;
    EXPECT_NE(both.output.find("made /sys/fs/bpf passable"), std::string::npos) << both.output;
    EXPECT_NE(both.output.find("loaded at /sys/fs/bpf/schedmirror (mode 0750, its maps 0660)"),
              std::string::npos)
        << both.output;
    EXPECT_NE(both.output.find("\n711\n"), std::string::npos) << both.output;
    EXPECT_NE(both.output.find("has its former mode again"), std::string::npos) << both.output;
    EXPECT_NE(both.output.find("\n700\n"), std::string::npos) << both.output;
    EXPECT_EQ(both.output.find("schedmirror\n", both.output.find("\n700\n")), std::string::npos)
        << both.output;
    // Of a load that was killed right after it changed the mode.
    const std::string killed =
        "mkdir -m 0700 /sys/fs/bpf/schedmirror /sys/fs/bpf/schedmirror/former_mode && chmod 0711 /sys/fs/bpf";
    const Outcome half = shell("unshare -m sh -c '" + mount + killed + " && " + command + " unload && " +
                               mode + " && ! test -e /sys/fs/bpf/schedmirror && echo gone'");
    EXPECT_NE(half.output.find("not loaded at /sys/fs/bpf/schedmirror\n700\ngone\n"), std::string::npos)
        << half.output;
    // Not what others made so.
    const Outcome kept = shell("unshare -m sh -c 'mount -t bpf -o mode=0711 bpf /sys/fs/bpf && " + command +
                               " load --group root && " + command + " unload && " + mode + "'");
    EXPECT_NE(kept.output.find("\n711\n"), std::string::npos) << kept.output;
}

TEST_F(SchedmirrorTest, RepairsAnInterruptedLoad) {
    ASSERT_EQ(unlink((dir + "/sched_switch").c_str()), 0);
    EXPECT_EQ(schedmirror("status").exit_code, 3);
    EXPECT_EQ(schedmirror("load --slots 7 --group root").exit_code, 0);
    EXPECT_NE(schedmirror("status").output.find("of 7"), std::string::npos);
}

TEST_F(SchedmirrorTest, RefusesAnotherLayoutVersion) {
    ASSERT_EQ(schedmirror("unload").exit_code, 0);
    ASSERT_EQ(mkdir(dir.c_str(), 0700), 0);
    bpf_attr attr;
    memset(&attr, 0, sizeof(attr));
    attr.map_type = BPF_MAP_TYPE_ARRAY;
    attr.key_size = 4;
    attr.value_size = 128;
    attr.max_entries = 4;
    const int fd = static_cast<int>(syscall(SYS_bpf, BPF_MAP_CREATE, &attr, sizeof(attr)));
    ASSERT_GE(fd, 0);
    uint32_t zero = 0, value[32] = {SCHED_MIRROR_MAGIC, SCHED_MIRROR_VERSION + 1, 4, 1};
    memset(&attr, 0, sizeof(attr));
    attr.map_fd = static_cast<uint32_t>(fd);
    attr.key = reinterpret_cast<uintptr_t>(&zero);
    attr.value = reinterpret_cast<uintptr_t>(value);
    ASSERT_EQ(syscall(SYS_bpf, BPF_MAP_UPDATE_ELEM, &attr, sizeof(attr)), 0);
    const std::string slots = dir + "/slots";
    memset(&attr, 0, sizeof(attr));
    attr.bpf_fd = static_cast<uint32_t>(fd);
    attr.pathname = reinterpret_cast<uintptr_t>(slots.c_str());
    ASSERT_EQ(syscall(SYS_bpf, BPF_OBJ_PIN, &attr, sizeof(attr)), 0);
    close(fd);

    const std::string other = "layout version " + std::to_string(SCHED_MIRROR_VERSION + 1) + " is loaded";
    refuses(schedmirror("load"), other.c_str());
    EXPECT_EQ(schedmirror("status").exit_code, 3);
    EXPECT_EQ(schedmirror("unload").exit_code, 0) << "every version can be taken out";
    EXPECT_EQ(schedmirror("load --slots 100 --group root").exit_code, 0);
}

TEST_F(SchedmirrorTest, SaysWhatIsMissing) {
    const std::string fresh = "/sys/fs/bpf/schedmirror_test_fresh_" + std::to_string(getpid());
    refuses(schedmirror("load --group no_such_group"), "there is no group no_such_group");
    refuses(shell(test::schedmirror_path() + " --dir /tmp/no_bpf_here load --group root"), "BPF file system");
    refuses(elsewhere("mount -t tmpfs none /sys/kernel/btf", "--dir " + fresh + " load --group root"),
            "CONFIG_DEBUG_INFO_BTF");
    // Root in all but the capabilities.
    refuses(shell("setpriv --bounding-set -bpf,-perfmon,-sys_admin --inh-caps -bpf,-perfmon,-sys_admin " +
                  test::schedmirror_path() + " --dir " + fresh + " load --group root"),
            "CAP_BPF");
    refuses(shell("setpriv --reuid 65534 --regid 65534 --clear-groups " + test::schedmirror_path() +
                  " --dir " + dir + " load"),
            "run as root");
    EXPECT_NE(access(fresh.c_str(), F_OK), 0) << "a failed load leaves nothing";
}

TEST_F(SchedmirrorTest, MountsTheBpfFileSystem) {
    const Outcome outcome =
        elsewhere("umount -l /sys/fs/bpf",
                  "load --group root && stat -c %a /sys/fs/bpf && " + test::schedmirror_path() + " unload");
    EXPECT_EQ(outcome.exit_code, 0) << outcome.output;
    EXPECT_NE(outcome.output.find("mounted the BPF file system"), std::string::npos) << outcome.output;
    EXPECT_NE(outcome.output.find("711"), std::string::npos) << outcome.output;
}

TEST_F(SchedmirrorTest, LetsTheGroupThrough) {
    // As systemd mounts it.
    const Outcome outcome =
        elsewhere("mount -t bpf -o mode=700 bpf /sys/fs/bpf",
                  "load --group root && stat -c %a /sys/fs/bpf && " + test::schedmirror_path() + " unload");
    EXPECT_EQ(outcome.exit_code, 0) << outcome.output;
    EXPECT_NE(outcome.output.find("711"), std::string::npos) << outcome.output;
}

TEST_F(SchedmirrorTest, UsageErrors) {
    for (const char* wrong : {"", "dance", "load --slots 0", "load --slots 65535", "load --slots many",
                              "status --slots 3", "load unload", "--nonsense load"})
        refuses(schedmirror(wrong), "see schedmirror --help", 2);
    EXPECT_EQ(schedmirror("--help").exit_code, 0);
}

// Several at once: each ends well, and one mirror is there (or none) at the end.
TEST_F(SchedmirrorTest, LoadsAndUnloadsAtTheSameTime) {
    for (int round = 0; round < 3; round++) {
        std::vector<std::unique_ptr<test::Child>> children;
        for (int i = 0; i < 4; i++)
            children.push_back(std::make_unique<test::Child>(
                [&] { _exit(schedmirror(i % 2 ? "unload" : "load --slots 100 --group root").exit_code); }));
        for (auto& child : children) EXPECT_EQ(child->wait(), 0);
    }
    EXPECT_EQ(schedmirror("load --slots 100 --group root").exit_code, 0);
    EXPECT_EQ(schedmirror("status").exit_code, 0);
}

}  // namespace
