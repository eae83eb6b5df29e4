// The mutexes' protocols in every interleaving of a few tasks with few preemptions: never held by two, nobody
// sleeps for ever, whoever gives up takes no wake-up with him, and all is tidy in the end. With tasks that are
// killed: nobody sleeps for ever once the backstop has let the others look.
//
// INTERLEAVINGS_PREEMPTIONS adds to the preemptions visited (each one takes some 15 times longer).

#include <gtest/gtest.h>

#include <deque>
#include <memory>

#include "lock/shared_mutex.h"
#include "stepped.h"

namespace adaptive::test {
namespace {

struct Asleep {
    int task;
    const void* address;
    Sleeper kind;
};
struct Killed {};
enum class MayBeKilled { never, without_the_lock, always };

struct Words {
    uint64_t writers = 0, state = 0;
    uint32_t wakeups = 0;
    SlotId reader = 0;
};

/// Everything an execution starts from.
struct Stage {
    Words lock;
    std::deque<Asleep> asleep;  // the kernel's queue
    uint64_t sparing_since[4] = {};
    MayBeKilled may_be_killed[4] = {};
    bool backstop[4] = {};  // it ended a sleep
    bool ended[4] = {}, was_killed = false;
    int writers = 0, readers = 0, turns = 0;
};
Stage* stage;

/// A task's patience.
struct SteppedDeadline {
    bool timed = false;
    mutable bool has_passed = false;
};

struct SteppedHost {
    using Lock = uint64_t;
    using Deadline = SteppedDeadline;

    template <class Word>
    static Stepped<Word> word(Word& word) {
        maybe_killed();
        return Stepped<Word>(word);
    }
    static uint64_t identity() {
        const uint64_t n = static_cast<uint64_t>(explorer->current());
        // Task 2 has no slot.
        return (n == 2 ? 0 : (n + 1) << 32) | (100 + n);
    }
    /// SIGKILL, and what the kernel makes of a mutex that is on the task's robust list, or pending there.
    static void maybe_killed() {
        const MayBeKilled may = stage->may_be_killed[explorer->current()];
        const uint64_t tid = identity() & mutex_word::kTid;
        uint64_t& word = stage->lock.writers;
        if (may == MayBeKilled::never || stage->was_killed) return;
        if (may == MayBeKilled::without_the_lock && (word & mutex_word::kTid) == tid) return;
        if (explorer->choose(2) == 0) return;
        stage->was_killed = true;
        if (may == MayBeKilled::always) {
            explorer->step("killed");
            const bool held = (word & mutex_word::kTid) == tid, waiters = word & mutex_word::kWaiters;
            if (held)
                word =
                    (word & ~uint64_t{UINT32_MAX}) | (word & mutex_word::kWaiters) | mutex_word::kOwnerDied;
            if (held ? waiters : mutex_word::is_free(word)) wake(word, 1, Sleeper::any);
        }
        throw Killed();
    }

    template <class Word>
    static FutexWait sleep(Word& word, uint32_t expected, const Deadline& deadline, Sleeper kind) {
        const int task = explorer->current();
        const void* address = &word;
        explorer->step("futex_wait");
        if (static_cast<uint32_t>(word) != expected) return FutexWait::changed;
        stage->asleep.push_back({task, address, kind});
        const auto is_asleep = [task] {
            for (const Asleep& s : stage->asleep)
                if (s.task == task) return true;
            return false;
        };
        explorer->block_until("sleep", [&] { return deadline.timed || !is_asleep(); });
        if (!is_asleep())
            return std::exchange(stage->backstop[task], false) ? FutexWait::interrupted : FutexWait::woken;
        std::erase_if(stage->asleep, [task](const Asleep& s) { return s.task == task; });
        deadline.has_passed = true;
        return FutexWait::timed_out;
    }
    template <class Word>
    static void wake(Word& word, int count, Sleeper kind) {
        maybe_killed();
        explorer->step("futex_wake");
        const void* address = &word;
        for (auto s = stage->asleep.begin(); s != stage->asleep.end() && count > 0;) {
            if (s->address == address && (static_cast<int>(s->kind) & static_cast<int>(kind)) != 0) {
                s = stage->asleep.erase(s);
                count--;
            } else {
                s++;
            }
        }
    }
    static bool starves(uint64_t) { return explorer->choose(2) == 1; }
    static bool passed(const Deadline& deadline) {
        if (deadline.timed && !deadline.has_passed) deadline.has_passed = explorer->choose(2) == 1;
        return deadline.has_passed;
    }
    // A spin ends after one look at the lock: a longer one is one that is preempted before it.
    static SpinBudget budget(const Deadline&) { return {.watched = 0, .unwatched = 0}; }
    // The mirror's answer is chosen once for a question, as the time that a question lasts is not determined.
    static SchedState look(SlotId slot) {
        if (slot == mutex_word::kUnnamed || slot == 0) return SchedState::unknown;
        return explorer->choose(2) == 0 ? SchedState::on_cpu : SchedState::preempted;
    }
    static SpinPace pace(uint64_t&) { return quick_pace(); }
    static SpinPace quick_pace() { return {.ticks = 0}; }
    static void waited(uint64_t&, bool) {}
    static uint64_t& sparing_since() { return stage->sparing_since[explorer->current()]; }
    static uint64_t spare_for_ticks() { return UINT64_MAX; }
};

using Exclusive = MutexProtocol<SteppedHost>;
using ReadWrite = SharedProtocol<SteppedHost, Words>;

void in_the_lock(bool writer) {
    (writer ? stage->writers : stage->readers)++;
    if (stage->writers + (stage->readers > 0) > 1) explorer->fail("two hold the lock");
    stage->turns++;
    SteppedHost::maybe_killed();
    explorer->step("holds");
    (writer ? stage->writers : stage->readers)--;
}

Explorer::Task locks(int times = 1, bool timed = false) {
    return [=] {
        for (int i = 0; i < times; i++) {
            const LockResult result = Exclusive::acquire(stage->lock.writers, {.timed = timed});
            if (result == LockResult::timed_out && timed) continue;
            if (result != LockResult::acquired) explorer->fail("not acquired, and not given up");
            in_the_lock(true);
            Exclusive::release(stage->lock.writers);
        }
    };
}
Explorer::Task gives_up() {
    return locks(1, true);
}
Explorer::Task tries() {
    return [] {
        if (!is_acquired(Exclusive::try_acquire(stage->lock.writers))) return;
        in_the_lock(true);
        Exclusive::release(stage->lock.writers);
    };
}
Explorer::Task writes(int times = 1, bool timed = false) {
    return [=] {
        for (int i = 0; i < times; i++) {
            if (!ReadWrite::acquire(stage->lock, {.timed = timed})) continue;
            in_the_lock(true);
            ReadWrite::release(stage->lock);
        }
    };
}
Explorer::Task reads(int times = 1, bool timed = false) {
    return [=] {
        for (int i = 0; i < times; i++) {
            if (!ReadWrite::acquire_shared(stage->lock, {.timed = timed})) continue;
            in_the_lock(false);
            ReadWrite::release_shared(stage->lock);
        }
    };
}
Explorer::Task tries_to_write() {
    return [] {
        if (!ReadWrite::try_acquire(stage->lock)) return;
        in_the_lock(true);
        ReadWrite::release(stage->lock);
    };
}

/// A task that may be killed, at any step or at any at which it does not hold the lock; with that, the next one
/// to hold it may be told so, and makes it consistent.
Explorer::Task dies(MayBeKilled when) {
    return [=] {
        stage->may_be_killed[explorer->current()] = when;
        try {
            locks(2)();
        } catch (const Killed&) {
        }
        stage->ended[explorer->current()] = true;
    };
}
Explorer::Task survives() {
    return [] {
        const LockResult result = Exclusive::acquire(stage->lock.writers, {});
        if (result == LockResult::owner_died) {
            if (stage->writers == 1) stage->writers = 0;  // it was killed in there
            stage->lock.writers &= ~mutex_word::kOwnerDied;
        }
        in_the_lock(true);
        Exclusive::release(stage->lock.writers);
        stage->ended[explorer->current()] = true;
    };
}
/// The time after which every sleeper looks again: when nothing else can happen.
Explorer::Task backstop() {
    return [] {
        const auto all_ended = [] { return stage->ended[0] && stage->ended[1] && stage->ended[2]; };
        while (!all_ended()) {
            explorer->block_until("backstop", [&] {
                const auto sleeps = [](int task) {
                    for (const Asleep& s : stage->asleep)
                        if (s.task == task) return true;
                    return false;
                };
                for (int task = 0; task < 3; task++)
                    if (!stage->ended[task] && !sleeps(task)) return false;
                return true;
            });
            for (const Asleep& s : stage->asleep) stage->backstop[s.task] = true;
            stage->asleep.clear();
        }
    };
}

struct Scenario {
    const char* name;
    std::vector<Explorer::Task> tasks;
    int preemptions;

    friend void PrintTo(const Scenario& s, std::ostream* out) { *out << s.name; }
};

class MutexInterleavings : public ::testing::TestWithParam<Scenario> {};

TEST_P(MutexInterleavings, AreAllRight) {
    const Scenario& scenario = GetParam();
    expect_right_in_every_interleaving(stage, scenario.tasks, scenario.preemptions, [&]() -> std::string {
        if (stage->turns == 0) return "nobody has held the lock";
        // `waiters` may be left over: the next release clears it. So may what a killed task put there.
        const uint64_t expected = stage->was_killed ? ~mutex_word::kTid : mutex_word::kWaiters;
        if ((stage->lock.writers & ~expected) != 0) return "the mutex is not clean";
        constexpr uint64_t kPhase = 1ULL << 63;
        if ((stage->lock.state & ~kPhase) != 0) return "the state is not clean";
        return {};
    });
}

const Scenario kScenarios[] = {
    {"Two", {locks(2), locks(2)}, 4},
    {"Three", {locks(), locks(), locks()}, 3},
    {"TwoAndOneTwice", {locks(2), locks(), locks()}, 3},
    {"TwoAndOneThatGivesUp", {locks(2), gives_up(), locks()}, 3},
    {"OneAndTwoThatGiveUp", {locks(2), gives_up(), gives_up()}, 3},
    {"TwoAndOneThatTries", {locks(), locks(), tries()}, 3},
    {"OneIsKilledWithoutTheLock",
     {survives(), survives(), dies(MayBeKilled::without_the_lock), backstop()},
     2},
    {"OneIsKilled", {survives(), survives(), dies(MayBeKilled::always), backstop()}, 2},
    {"OneWithASlotIsKilled", {dies(MayBeKilled::always), survives(), survives(), backstop()}, 2},
    {"WriterAndReaders", {writes(), reads(), reads()}, 3},
    {"WritersAndReader", {writes(), writes(), reads()}, 3},
    {"WriterAndReaderTurns", {writes(2), reads(2)}, 3},
    {"ReaderThatGivesUp", {writes(2), reads(1, true), reads()}, 3},
    {"WriterThatGivesUp", {writes(1, true), reads(2), reads()}, 3},
    {"WriterThatGivesUpAndWriter", {writes(1, true), writes(), reads()}, 3},
    {"ReadersLetInAndAWriterThatGivesUp", {writes(), reads(), writes(1, true), reads()}, 2},
    {"WriterThatTries", {writes(), reads(), tries_to_write()}, 3},
};
INSTANTIATE_TEST_SUITE_P(All, MutexInterleavings, ::testing::ValuesIn(kScenarios),
                         [](const auto& scenario) { return scenario.param.name; });

}  // namespace
}  // namespace adaptive::test
