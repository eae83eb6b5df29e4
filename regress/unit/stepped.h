#pragma once
/*
 * What the tests that run code in every interleaving (interleavings.h) share: an atomic each of whose operations
 * is a step of the Explorer, given to the code under test in the place of std::atomic_ref; and the exploration of
 * one scenario.
 */

#include <gtest/gtest.h>

#include <atomic>
#include <cstdlib>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "interleavings.h"
#include "spin/cycle_clock.h"

namespace adaptive::test {

inline Explorer* explorer;

template <class T>
class Stepped {
  public:
    explicit Stepped(T& word) : word_(word) {}
    T load(std::memory_order = {}) const {
        explorer->step("load");
        return word_;
    }
    void store(T value, std::memory_order = {}) {
        explorer->step("store");
        word_ = value;
    }
    T exchange(T value, std::memory_order = {}) {
        explorer->step("exchange");
        return std::exchange(word_, value);
    }
    T fetch_or(T bits) {
        explorer->step("fetch_or");
        return std::exchange(word_, word_ | bits);
    }
    T fetch_and(T bits) {
        explorer->step("fetch_and");
        return std::exchange(word_, word_ & bits);
    }
    T fetch_add(T n, std::memory_order = {}) {
        explorer->step("fetch_add");
        return std::exchange(word_, word_ + n);
    }
    T fetch_sub(T n) {
        explorer->step("fetch_sub");
        return std::exchange(word_, word_ - n);
    }
    bool compare_exchange_weak(T& expected, T desired, std::memory_order = {}, std::memory_order = {}) {
        explorer->step("compare_exchange");
        if (word_ == expected) {
            word_ = desired;
            return true;
        }
        expected = word_;
        return false;
    }
    bool compare_exchange_strong(T& expected, T desired, std::memory_order = {}, std::memory_order = {}) {
        return compare_exchange_weak(expected, desired);
    }

  private:
    T& word_;
};

/// Runs the tasks in every interleaving of up to so many preemptions, and INTERLEAVINGS_PREEMPTIONS more, each
/// execution on a new Stage. `problem()` says what is wrong with the stage after one; empty: nothing.
template <class Stage, class Problem>
void expect_right_in_every_interleaving(Stage*& stage, const std::vector<Explorer::Task>& tasks,
                                        int preemptions, Problem&& problem) {
    CycleClock::calibrate();
    const char* more = getenv("INTERLEAVINGS_PREEMPTIONS");
    Explorer the_explorer(preemptions + (more ? atoi(more) : 0));
    explorer = &the_explorer;

    std::unique_ptr<Stage> current;
    const Explorer::Outcome outcome = the_explorer.explore(
        [&] {
            current = std::make_unique<Stage>();
            stage = current.get();
            return tasks;
        },
        [&]() -> std::string { return problem(); });
    EXPECT_EQ(outcome.failure, "");
    EXPECT_GT(outcome.executions, 100u);
    printf("    %lu executions, %lu steps\n", outcome.executions, outcome.steps);
}

}  // namespace adaptive::test
