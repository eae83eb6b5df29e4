#pragma once
/*
 * What the tests of the locks share: a mirror of each source, a time limit, and threads that are preempted.
 */

#include <gtest/gtest.h>
#include <unistd.h>

#include <chrono>
#include <cstring>
#include <thread>
#include <vector>

#include "lock/this_task.h"
#include "private_mirror.h"
#include "processes.h"

namespace adaptive::test {

using namespace std::chrono_literals;
using ::test::Child;
using ::test::eventually;
using ::test::seconds;
using ::test::Shared;

/// Whoever sleeps for ever ends the program, with a name.
class TimeLimit {
  public:
    explicit TimeLimit(unsigned seconds) { alarm(seconds); }
    ~TimeLimit() { alarm(0); }
};

/// A table for source rseq that children made by fork() share.
struct SharedRseqTable {
    static constexpr uint32_t kSlots = 256, kCpus = 256;
    alignas(64) char memory[(kSlots + kCpus) * 64];
    SharedRseqTable() { Mirror::rseq_format(memory, kSlots, kCpus); }
};

/// Runs a test with the process's mirror kept by the source given as the parameter.
class WithSource : public ::test::PrivateMirror, public ::testing::WithParamInterface<Source> {
  protected:
    void SetUp() override {
        Error error = {};
        MirrorChoice choice;
        switch (GetParam()) {
            case Source::off:
                choice.wanted = MirrorChoice::Wanted::off;
                break;
            case Source::rseq:
                choice = {.wanted = MirrorChoice::Wanted::rseq, .rseq_table = table->memory};
                break;
            case Source::bpf:
                PrivateMirror::SetUp();
                if (IsSkipped() || HasFatalFailure()) return;
                choice = {.wanted = MirrorChoice::Wanted::bpf, .bpf_dir = dir.c_str()};
                break;
        }
        if (!use_mirror(choice, &error)) {
            ASSERT_EQ(GetParam(), Source::rseq) << error.text;
            GTEST_SKIP() << error.text;
        }
        ASSERT_EQ(mirror_in_use().source, GetParam());
    }
    void TearDown() override {
        Error error = {};
        EXPECT_TRUE(use_mirror({.wanted = MirrorChoice::Wanted::off}, &error)) << error.text;
        if (GetParam() == Source::bpf) PrivateMirror::TearDown();
    }

    Shared<SharedRseqTable> table;
};

inline std::string source_name(const ::testing::TestParamInfo<Source>& info) {
    return info.param == Source::off ? "off" : info.param == Source::rseq ? "rseq" : "bpf";
}

#define INSTANTIATE_FOR_SOURCES(suite)                                                                  \
    INSTANTIATE_TEST_SUITE_P(Sources, suite, ::testing::Values(Source::off, Source::rseq, Source::bpf), \
                             source_name)

/// `count` threads, more than there are CPUs: all on two of them, so that holders and spinners are preempted.
template <class Body>
void run_threads(int count, Body body) {
    std::vector<std::thread> threads;
    for (int i = 0; i < count; i++)
        threads.emplace_back([=] {
            ::test::pin_to(i % 2 == 0 ? 0 : static_cast<int>(std::thread::hardware_concurrency()) - 1);
            body(i);
        });
    for (std::thread& t : threads) t.join();
}

inline void compute(std::chrono::nanoseconds duration) {
    for (const auto end = std::chrono::steady_clock::now() + duration;
         std::chrono::steady_clock::now() < end;)
        CycleClock::pause();
}

inline double cpu_seconds_of_thread() {
    timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_nsec) * 1e-9;
}

}  // namespace adaptive::test
