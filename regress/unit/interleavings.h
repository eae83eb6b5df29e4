#pragma once
/*
 * Visits the interleavings of a few tasks that run real code, one after the other, on one thread.
 *
 * Problem
 * -------
 * A lost wake-up needs two tasks to meet within a few instructions. Stress meets it now and then; a model checker
 * meets it always, but checks a model. Here the code itself is the model.
 *
 * Method
 * ------
 * Tasks are fibers. Before each operation on shared memory they call step(), where the Explorer decides who goes on. An
 * execution is determined by the decisions taken in it, so that all of them can be visited by depth-first search: run
 * again with the same decisions up to the last one that has an alternative, and take that. As nearly all errors need few
 * preemptions, only executions with at most `preemptions` of them are visited (a switch away from a task that could have
 * gone on; switching from one that sleeps or has ended is free), but of these all.
 *
 * Operations are sequentially consistent here, and what lies between two steps is one: what the code under test does to
 * plain memory must be guarded by something that steps.
 *
 * Source: Musuvathi and Qadeer, "Iterative context bounding for systematic testing of multithreaded programs", 2007.
 */

#include <boost/context/fiber.hpp>
#include <boost/context/pooled_fixedsize_stack.hpp>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace adaptive::test {

class Explorer {
  public:
    using Task = std::function<void()>;
    struct Outcome {
        uint64_t executions = 0;
        uint64_t steps = 0;
        std::string failure;  ///< of the first execution that went wrong, with its steps; empty: none did
    };

    explicit Explorer(int preemptions) : preemptions_(preemptions) {}

    /// For each execution: `prepare` gives the tasks, and when all have ended `check` says what is wrong, or nothing.
    Outcome explore(const std::function<std::vector<Task>()>& prepare,
                    const std::function<std::string()>& check) {
        Outcome outcome;
        decisions_.clear();
        do {
            execute(prepare());
            if (failure_.empty()) failure_ = check();
            outcome.executions++;
            outcome.steps += trace_.size();
        } while (failure_.empty() && next_branch());
        if (!failure_.empty()) outcome.failure = failure_ + "\n" + print_trace();
        return outcome;
    }

    // ---- for the tasks ----

    int current() const { return current_; }

    /// An operation on shared memory follows: another task may come first.
    void step(const char* what) {
        scheduler_ = std::move(scheduler_).resume();
        trace_.push_back({current_, what});
    }

    /// As step(), and not before `ready()`.
    void block_until(const char* what, std::function<bool()> ready) {
        tasks_[current_].ready = std::move(ready);
        step(what);
        tasks_[current_].ready = nullptr;
    }

    /// One of 0 … n-1; all are visited.
    int choose(int n) {
        if (next_ == decisions_.size()) decisions_.push_back({0, n});
        return decisions_[next_++].taken;
    }

    /// Something is wrong.
    void fail(std::string what) {
        if (failure_.empty()) failure_ = std::move(what);
    }

  private:
    static constexpr size_t kMostSteps = 5000;

    struct Decision {
        int taken, alternatives;
    };
    struct Fiber {
        boost::context::fiber fiber;
        std::function<bool()> ready;  // none: may go on
        bool ended = false;
    };
    struct Step {
        int task;
        const char* what;
    };

    bool runnable(const Fiber& task) const { return !task.ended && (!task.ready || task.ready()); }

    void execute(const std::vector<Task>& programs) {
        namespace context = boost::context;
        next_ = 0;
        failure_.clear();
        trace_.clear();
        tasks_.clear();
        tasks_.resize(programs.size());
        for (size_t i = 0; i < programs.size(); i++)
            tasks_[i].fiber =
                context::fiber(std::allocator_arg, stacks_, [this, i, &programs](context::fiber&& from) {
                    scheduler_ = std::move(from);
                    programs[i]();
                    tasks_[i].ended = true;
                    return std::move(scheduler_);
                });

        int last = -1, preempted = 0;
        for (;;) {
            // Whoever went last comes first: to go on is the default, and free.
            std::vector<int> candidates;
            if (last >= 0 && runnable(tasks_[last])) candidates.push_back(last);
            const bool may_go_on = !candidates.empty();
            if (!may_go_on || preempted < preemptions_)
                for (int i = 0; i < static_cast<int>(tasks_.size()); i++)
                    if (i != last && runnable(tasks_[i])) candidates.push_back(i);
            if (candidates.empty()) break;

            const int taken = candidates.size() == 1 ? 0 : choose(static_cast<int>(candidates.size()));
            if (may_go_on && taken != 0) preempted++;
            current_ = last = candidates[taken];
            tasks_[current_].fiber = std::move(tasks_[current_].fiber).resume();
            if (!failure_.empty()) break;
            if (trace_.size() > kMostSteps) {
                fail("it does not end");
                break;
            }
        }
        for (const Fiber& task : tasks_)
            if (!task.ended) fail("somebody sleeps and nobody is left to wake him");
        tasks_.clear();  // unwinds those that have not ended
    }

    /// Goes back to the last decision that has an alternative left. False: none has.
    bool next_branch() {
        while (!decisions_.empty() && decisions_.back().taken + 1 >= decisions_.back().alternatives)
            decisions_.pop_back();
        if (decisions_.empty()) return false;
        decisions_.back().taken++;
        return true;
    }

    std::string print_trace() const {
        std::string text;
        const size_t from = trace_.size() > 200 ? trace_.size() - 200 : 0;
        for (size_t i = from; i < trace_.size(); i++)
            text += "  task " + std::to_string(trace_[i].task) + ": " + trace_[i].what + "\n";
        return text;
    }

    const int preemptions_;
    boost::context::pooled_fixedsize_stack stacks_{64 * 1024};
    std::vector<Fiber> tasks_;
    boost::context::fiber scheduler_;
    int current_ = -1;
    std::vector<Decision> decisions_;
    size_t next_ = 0;
    std::vector<Step> trace_;
    std::string failure_;
};

}  // namespace adaptive::test
