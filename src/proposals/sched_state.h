// sched_state: whether a thread, of this process or another, is on a CPU, read from memory without a syscall.
//
// The layout and the meaning are those proposed for struct rseq (`sched_state`): a word with a bit that is set
// while the thread is on a CPU, and its thread id. What the proposal leaves open is answered here:
//   - Between processes. The words lie in memory that any process can map.
//   - Lifetime. That memory belongs to no thread: a reader can look at any time, at whatever handle.
//   - Identity. A handle names a slot and a generation. Whoever has the slot later, even with the same thread
//     id, has another generation, and the handle's thread is seen as dead from then on.
//   - Death. A thread that dies, however it dies, is seen as dead as soon as the kernel has taken it down.
//
//   SchedStates      the reader's view: open once, then look(handle) or read(handle) from anywhere
//   SchedStateTask   the calling thread's own entry: attach, hand out handle(), say note_running() now and then
//
// Sources, of which all users of one table have the same:
//   bpf     the kernel's switches, written by the program that `schedmirror load` left (mirror/mirror.h)
//   rseq    inferred from where threads were last seen running (mirror/rseq_source.h)
// With rseq the table lies in memory that the caller shares, and a thread's death is seen by a robust mutex that
// it holds: the kernel marks it when the thread is gone, before anybody can get its id.
//
// Every answer is a hint, stale when it arrives. Nobody's life may depend on one; no content of the table can
// crash a reader.
//
// Thread safety. SchedStates: look and read from any thread at any time; open and close alone. SchedStateTask:
// only its thread. Signal handlers may look and read. Process safety: both survive fork; the child says
// reset_after_fork() on an inherited SchedStateTask and attaches anew. exec counts as death (not with bpf:
// there the task lives on).
//
// Errors: false and one line in Error. Nothing throws, nothing allocates.
// Source: Mathieu Desnoyers's and André Almeida's proposal, "Add sched_state field to struct rseq".
#pragma once

#include <pthread.h>

#include <cstddef>
#include <cstdint>

#include "mirror/mirror.h"

namespace adaptive {

// As proposed. The kernel's version is 0.
struct rseq_sched_state {
    uint32_t version;
    uint32_t state;
    uint32_t tid;  // 0: dead, or nobody
};

inline constexpr uint32_t kSchedOnCpu = 1U << 0;  // the proposal's one bit; the others are this library's
inline constexpr uint32_t kSchedPreempted = 1U << 16;
inline constexpr uint32_t kSchedBlocked = 1U << 17;
inline constexpr uint32_t kSchedDead = 1U << 18;
inline constexpr uint32_t kSchedUnknown = 1U << 19;

enum class SchedSource : uint8_t { off, rseq, bpf };

// Who is meant. May lie in shared memory, and be kept for as long as one likes. All zero: nobody.
struct SchedHandle {
    uint32_t slot;
    uint32_t generation;
};

// A slot of a table of the source `rseq`.
struct alignas(64) SchedStateSlot {
    pthread_mutex_t life;  // held by the thread that has the slot
    uint32_t generation;
};
static_assert(sizeof(SchedStateSlot) == 64);

class SchedStates {
  public:
    // bpf: maps what `schedmirror load` pinned under dir.
    bool open_bpf(const char* dir, Error* error) noexcept;

    // rseq: memory, 64-byte aligned, for `slots` slot numbers (0 included) and `cpus` CPUs (the highest CPU
    // number + 1). format: once, by its creator.
    static size_t bytes(uint32_t slots, uint32_t cpus) noexcept;
    static void format(void* mem, uint32_t slots, uint32_t cpus) noexcept;
    bool open(void* mem, Error* error) noexcept;

    void close() noexcept;

    SchedSource source() const noexcept { return source_; }
    uint32_t capacity() const noexcept { return mirror_.capacity(); }

    // For the spinner.
    SchedState look(SchedHandle handle) const noexcept { return observe(handle).state; }
    // The same in the proposal's terms.
    rseq_sched_state read(SchedHandle handle) const noexcept;

  private:
    friend class SchedStateTask;

    struct Observed {
        SchedState state;
        uint32_t tid;
    };
    Observed observe(SchedHandle handle) const noexcept;

    SchedSource source_ = SchedSource::off;
    SchedStateSlot* slots_ = nullptr;  // rseq
    Mirror mirror_;
};

class SchedStateTask {
  public:
    // Attached already: true.
    bool attach(SchedStates& states, Error* error) noexcept;
    void detach() noexcept;
    void reset_after_fork() noexcept { *this = SchedStateTask(); }

    SchedHandle handle() const noexcept { return handle_; }  // all zero when not attached

    // "I am running": see MirrorTask::note_running(). False: detach, attach again later.
    bool note_running() noexcept { return task_.note_running(); }

  private:
    SchedHandle handle_ = {0, 0};
    SchedStateSlot* slot_ = nullptr;  // rseq
    MirrorTask task_;
};

// ---- hot path ----

// State before claim: a claim that is still the handle's now was so when the state was read. A slot's next user
// moves the generation on before it becomes visible in the claim.
inline SchedStates::Observed SchedStates::observe(SchedHandle handle) const noexcept {
    if (handle.slot == 0 || handle.slot > capacity()) return {SchedState::unknown, 0};
    SchedState state = mirror_.look(static_cast<SlotId>(handle.slot));
    uint32_t tid;
    uint32_t generation;
#ifndef __SANITIZE_THREAD__  // it knows no fences
    __atomic_thread_fence(__ATOMIC_ACQUIRE);
#endif
    if (source_ == SchedSource::bpf) {
        const sched_claim claim = mirror_.claim(static_cast<SlotId>(handle.slot));
        tid = claim.tid;
        generation = claim.generation;
    } else {
        // The mutex's first word is a futex word: thread id, and two bits, one of them for a dead owner.
        constexpr uint32_t kTid = 0x3fffffff;
        const SchedStateSlot& slot = slots_[handle.slot];
        tid = __atomic_load_n(reinterpret_cast<const uint32_t*>(&slot.life), __ATOMIC_ACQUIRE) & kTid;
        generation = __atomic_load_n(&slot.generation, __ATOMIC_RELAXED);
    }
    if (tid == 0 || generation != handle.generation) return {SchedState::dead, 0};
    // The claim alone tells the dead. The mirror may still show the slot's last user's death to a reader whom a
    // switch of the present one overtakes.
    if (state == SchedState::dead) state = SchedState::preempted;
    return {state, tid};
}

inline rseq_sched_state SchedStates::read(SchedHandle handle) const noexcept {
    const Observed seen = observe(handle);
    uint32_t state = kSchedUnknown;
    switch (seen.state) {
        case SchedState::on_cpu:
            state = kSchedOnCpu;
            break;
        case SchedState::preempted:
            state = kSchedPreempted;
            break;
        case SchedState::blocked:
            state = kSchedBlocked;
            break;
        case SchedState::dead:
            state = kSchedDead;
            break;
        case SchedState::unknown:
            break;
    }
    return {0, state, seen.tid};
}

}  // namespace adaptive
