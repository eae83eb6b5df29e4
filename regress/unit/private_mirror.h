// A kernel-kept mirror for one test, pinned in a directory of its own: never the machine's.
#pragma once

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "mirror/mirror.h"

namespace test {

struct Outcome {
    int exit_code;
    std::string output;  // of both streams
};

inline Outcome shell(const std::string& command) {
    Outcome outcome = {-1, ""};
    FILE* pipe = popen((command + " 2>&1").c_str(), "r");
    if (pipe == nullptr) return outcome;
    std::array<char, 512> buffer;
    while (fgets(buffer.data(), buffer.size(), pipe) != nullptr) outcome.output += buffer.data();
    const int status = pclose(pipe);
    outcome.exit_code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
    return outcome;
}

// The command under test: beside the directory of this test's executable.
inline std::string schedmirror_path() {
    char self[4096];
    const ssize_t length = readlink("/proc/self/exe", self, sizeof(self) - 1);
    std::string path(self, length > 0 ? static_cast<size_t>(length) : 0);
    for (int up = 0; up < 2; up++) path.erase(path.rfind('/'));
    return path + "/schedmirror";
}

// The calling thread's id as the kernel's mirror shows it. A test that has a pid namespace of its own is told where the
// processes of the machine are (scripts/private-bpffs).
inline uint32_t machine_tid() {
    const char* proc = getenv("MACHINE_PROC");
    char text[64] = "";
    const std::string path = std::string(proc != nullptr ? proc : "/proc") + "/thread-self";
    if (readlink(path.c_str(), text, sizeof(text) - 1) < 0) return 0;
    return static_cast<uint32_t>(strtoul(strrchr(text, '/') + 1, nullptr, 10));
}

inline std::string example_path(const std::string& name) {
    std::string path = schedmirror_path();
    return path.replace(path.rfind('/'), std::string::npos, "/examples/" + name);
}

class PrivateMirror : public ::testing::Test {
  protected:
    void SetUp() override {
        if (geteuid() != 0) GTEST_SKIP() << "loading the kernel side needs root";
        const Outcome loaded = schedmirror("load --slots 100 --group root");
        ASSERT_EQ(loaded.output.find("refuses the program"), std::string::npos) << loaded.output;
        if (loaded.exit_code != 0) GTEST_SKIP() << "no BPF here: " << loaded.output;
    }
    void TearDown() override { schedmirror("unload"); }

    Outcome schedmirror(const std::string& arguments) const {
        return shell(schedmirror_path() + " --dir " + dir + " " + arguments);
    }
    void reload(const std::string& arguments) const {
        ASSERT_EQ(schedmirror("unload").exit_code, 0);
        const Outcome loaded = schedmirror("load " + arguments);
        ASSERT_EQ(loaded.exit_code, 0) << loaded.output;
    }

    const std::string dir = "/sys/fs/bpf/schedmirror_test_" + std::to_string(getpid());
};

}  // namespace test
