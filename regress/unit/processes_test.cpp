// What the tests start ends with them, however they end.
#include "processes.h"

#include <gtest/gtest.h>

#include <cerrno>
#include <cstring>

using test::Child;
using test::eventually;
using test::Shared;

namespace {

bool is_there(pid_t pid) {
    return kill(pid, 0) == 0;
}

void spin() {
    for (;;) asm volatile("");
}

// Orphans come to the test, which sees how they ended.
class Orphans : public ::testing::Test {
  protected:
    void SetUp() override { prctl(PR_SET_CHILD_SUBREAPER, 1); }
    void TearDown() override { prctl(PR_SET_CHILD_SUBREAPER, 0); }

    static bool was_killed(pid_t pid) {
        int status = 0;
        const bool ended = eventually([&] { return waitpid(pid, &status, WNOHANG) == pid; });
        if (!ended) kill(pid, SIGKILL);
        return ended && WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL;
    }
};

TEST(Child, EndsWithItsScope) {
    pid_t pid;
    {
        Child child(spin);
        pid = child.pid;
        EXPECT_TRUE(is_there(pid));
    }
    EXPECT_FALSE(is_there(pid));
}

TEST_F(Orphans, EndWithAParentThatIsKilled) {
    Shared<std::atomic<pid_t>> pid;
    Child parent([&] {
        Child child(spin);
        *pid = child.pid;
        pause();
    });
    ASSERT_TRUE(eventually([&] { return *pid != 0; }));
    EXPECT_TRUE(is_there(*pid));
    parent.end(SIGKILL);
    EXPECT_TRUE(was_killed(*pid));
}

// All of a pid namespace ends with its process 1, and that with its parent.
TEST_F(Orphans, EndWithAParentOutsideItsPidNamespace) {
    if (geteuid() != 0) GTEST_SKIP() << "a pid namespace needs root";
    Shared<std::atomic<pid_t>> pid;
    Shared<std::atomic<int>> problem;
    Child parent([&] {
        if (unshare(CLONE_NEWPID) != 0) return void(*problem = errno);
        Child first([] {
            Child child(spin);
            child.wait();
        });
        *pid = first.pid;
        pause();
    });
    ASSERT_TRUE(eventually([&] { return *pid != 0 || *problem != 0; }));
    if (*problem != 0) GTEST_SKIP() << "no pid namespace here: " << strerror(*problem);
    parent.end(SIGKILL);
    EXPECT_TRUE(was_killed(*pid));
}

}  // namespace
