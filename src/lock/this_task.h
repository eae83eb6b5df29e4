#pragma once
/*
 * What a thread brings to the locks of this library: its name in a lock's word, its place in the mirror, and
 * what it has learnt of the locks it takes.
 *
 * A thread enters by itself at the first lock it takes, and leaves at its end. The mirror is the process's,
 * chosen by use_mirror() or at the first lock:
 *
 *   bpf    kept by the kernel, for every task of the machine: if `schedmirror load` has pinned it and this
 *          user may open it
 *   rseq   inferred. A table private to the process serves up to 65534 of its threads at a time; one in memory
 *          that the caller shares (MirrorChoice::rseq_table) serves threads of all processes that name it
 *   off    nothing is known of owners: spins are short, and the locks are as right as ever
 *
 * Processes that share a lock should use the same mirror: a slot number of another one is a wrong hint, which
 * costs time. A table private to the process is never asked about a process-shared lock.
 *
 * A mirror that is taken away (`schedmirror unload`) leaves its threads where `off` would: after another
 * use_mirror() the thread that called it, and those that enter later, use the new one.
 *
 * A thread that gets no slot does not look for one again: those who wait for it spin only briefly.
 *
 * fork: the child's thread enters anew at its next lock. (pthread_atfork: a child made by clone() or _Fork()
 * must not use these locks before it has called forget_parent().) Nothing is held over a fork: the handlers of
 * others may lock. If the C library has no key for threads' ends left when this library is loaded, or no memory
 * for the handler, threads get no slots; mirror_in_use().refused says so.
 * Thread safety: everything here, from any thread. Errors: one line in Error. Nothing throws or allocates; a
 * private rseq table is mapped. The first use in a process takes 2 ms to measure the clock.
 */

#include <linux/futex.h>

#include <cstdint>

#include "base/futex.h"
#include "mirror/mirror.h"
#include "spin/spin_on_owner.h"

namespace adaptive {

struct MirrorChoice {
    enum class Wanted : uint8_t { best, bpf, rseq, off };

    Wanted wanted = Wanted::best;  ///< best: bpf, else rseq, else off
    const char* bpf_dir = kMirrorDir;
    void* rseq_table = nullptr;  ///< as for Mirror::open_rseq(); null: one private to this process
};

/// Chooses this process's mirror. False, with the reason, if what was wanted cannot be had or other threads
/// use the present one; nothing has changed then.
bool use_mirror(const MirrorChoice& choice, Error* error) noexcept;

struct MirrorInUse {
    Source source;
    bool across_processes;  ///< serves process-shared locks as well
    uint32_t slots, used;
    Error why_not_bpf;   ///< empty: it is, or was not wanted
    Error why_not_rseq;  ///< likewise
    Error refused;       ///< why the last thread that got no slot got none; empty: all did
};
MirrorInUse mirror_in_use() noexcept;

/// The mirror in use, for those who look at other tasks themselves.
const Mirror& process_mirror() noexcept;

/// For the child of a clone() or _Fork(), before its first lock.
void forget_parent() noexcept;

/// One for each thread. What is hot comes first.
class ThisTask {
  public:
    /// Whom a lock's word names: the thread id, and 32 bits above it the slot (0: none).
    uint64_t identity(Sharing sharing) const { return identities_[static_cast<int>(sharing)]; }
    SlotId slot(Sharing sharing) const { return static_cast<SlotId>(identity(sharing) >> 32); }
    uint32_t tid() const { return static_cast<uint32_t>(identities_[0]); }

    /// "I am running", said at every acquire.
    void note_running() {
        if (!registration_.note_running()) [[unlikely]]
            lose_slot();
    }
    /// Said after every sleep.
    void note_slept() {
        if (registration_.note_slept() != Recording::works) [[unlikely]]
            lose_slot();
    }

    /// The mirror's word on the holder or spinner of a lock.
    SchedState look(SlotId slot, Sharing sharing) const {
        const Mirror* mirror = mirrors_[static_cast<int>(sharing)];
        return mirror != nullptr ? mirror->look(slot) : SchedState::unknown;
    }

    /// The slot of the task with this id, see Mirror::find().
    SlotId find(uint32_t tid, Sharing sharing) const {
        const Mirror* mirror = mirrors_[static_cast<int>(sharing)];
        return mirror != nullptr ? mirror->find(tid) : 0;
    }

    PaceLearner pace;
    uint64_t sparing_since = 0;          ///< 0: the last wake-up that was due was sent
    robust_list_head* robust = nullptr;  ///< see robust_mutex.h

  private:
    friend ThisTask& this_task() noexcept;
    friend bool use_mirror(const MirrorChoice& choice, Error* error) noexcept;
    friend struct ThisTaskAccess;

    [[gnu::cold]] void enter() noexcept;
    [[gnu::cold]] void lose_slot() noexcept;

    uint64_t identities_[2] = {0, 0};  // by Sharing; 0: not entered
    const Mirror* mirrors_[2] = {nullptr, nullptr};
    MirrorTask registration_;
    uint32_t process_ = 0;   // entered in this one, see this_task.cpp
    bool has_left_ = false;  // the thread is ending
};

namespace internal {
inline constinit thread_local ThisTask this_task_of_thread;
}

inline ThisTask& this_task() noexcept {
    ThisTask& task = internal::this_task_of_thread;
    if (task.identities_[0] == 0) [[unlikely]]
        task.enter();
    return task;
}

/// How long the locks of this library spin: the watched budget is a bound against a lying mirror, the
/// unwatched one is about what a sleep and a wake-up cost.
inline SpinBudget spin_budget(const Deadline& deadline, int64_t watched_ns = 200'000) noexcept {
    constexpr int64_t kUnwatchedNs = 20'000;
    const int64_t left = deadline.left();
    const auto ticks = [left](int64_t ns) {
        return left <= 0 ? 0 : SpinPace::from_nanoseconds(static_cast<uint64_t>(left < ns ? left : ns));
    };
    return {.watched = ticks(watched_ns), .unwatched = ticks(kUnwatchedNs)};
}

}  // namespace adaptive
