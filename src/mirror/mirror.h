// The mirror: whether other tasks (processes or threads, of any process) are on a CPU right now, read without
// a syscall.
//
//   Mirror      this process's view of the table: open once, then look(slot) from anywhere
//   MirrorTask  the calling task's own entry: attach, and say note_running() now and then
//
// Two sources keep the table true. `bpf`: the kernel writes it at every context switch (the `schedmirror`
// command loads the program). `rseq`: the tasks write where they run and readers infer the rest
// (mirror/rseq_source.h). Every answer is a hint: it may be stale when it arrives, and other users of the
// table may have written nonsense. Correctness must never depend on one; no contents of the table can crash a
// reader.
//
// Thread safety. Mirror: look, info, active, capacity, used from any thread at any time; open and close
// alone, and close only after the tasks attached to it have detached. MirrorTask: only the task that owns it.
//
// Process safety. Both survive fork; the child says reset_after_fork() on an inherited MirrorTask and
// attaches anew.
//
// Units. Slot numbers 1 .. capacity(); 0 is nobody. Times in nanoseconds of the scheduler's clock, which is
// near CLOCK_MONOTONIC but leaves out, on some kernels, the time of interrupts and of the hypervisor.
//
// Errors. false and one line in Error: what is missing and what to do. Nothing throws.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/error.h"
#include "mirror/rseq_source.h"
#include "mirror/sched_slot.h"

namespace adaptive {

static_assert(sizeof(sched_slot) == 64 && sizeof(sched_claim) == 64 && sizeof(sched_header) == 64);
static_assert(sizeof(sched_notes) == 192);

enum class SchedState : uint32_t {
    unknown = SCHED_UNKNOWN,
    on_cpu = SCHED_ON_CPU,
    preempted = SCHED_PREEMPTED,
    blocked = SCHED_BLOCKED,
    dead = SCHED_DEAD,
};

const char* name_of(SchedState state) noexcept;  // for people: on_cpu, preempted, blocked, dead, unknown

using SlotId = uint16_t;  // 0 = none

enum class Source : uint8_t { off, rseq, bpf };

struct SlotInfo {
    SchedState state;
    uint32_t cpu;
    uint32_t tid;       // in the initial pid namespace with source bpf
    uint32_t claimant;  // who has the slot now, in that task's own pid namespace; 0: nobody
    uint32_t generation;
    uint64_t last_switch_ns;  // 0 with source rseq
    uint64_t switches;        // 0 with source rseq
};

inline constexpr const char* kMirrorDir = "/sys/fs/bpf/schedmirror";

class MirrorTask;

class Mirror {
  public:
    // Maps what `schedmirror load` pinned under dir.
    bool open_bpf(const char* dir, Error* error) noexcept;

    // A table of `slots` slot numbers (0 included) and `cpus` CPUs (the highest CPU number + 1).
    static size_t rseq_bytes(uint32_t slots, uint32_t cpus) noexcept { return rseq_table_bytes(slots, cpus); }
    static void rseq_format(void* mem, uint32_t slots, uint32_t cpus) noexcept {
        rseq_table_format(mem, slots, cpus);
    }
    // mem: 64-byte aligned, formatted. [words, words + words_bytes): memory that this process may read as
    // long as the mirror is open, at the same address in every process; blocked words outside of it are never
    // read.
    bool open_rseq(void* mem, Error* error, const void* words = nullptr, size_t words_bytes = 0) noexcept;

    void close() noexcept;

    Source source() const noexcept { return source_; }
    bool active() const noexcept;  // bpf: not unloaded; rseq: always

    // The state of another task. No syscall; 0, out of range, nonsense: unknown.
    SchedState look(SlotId slot) const noexcept;

    // The slot of a task that attached itself, by the id it has in its own pid namespace; 0: none was found.
    // Looks at a few slots only: in a table nearly full, or of slots chosen by their users, a task is missed. A
    // task of another pid namespace may be taken for it: like all answers, a hint.
    SlotId find(uint32_t tid) const noexcept;

    SlotInfo info(SlotId slot) const noexcept;  // for people: slower, consistent about who has the slot
    uint32_t capacity() const noexcept { return limit_ == 0 ? 0 : limit_ - 1; }
    // Who has a slot, of one moment: tid and generation. bpf only; slot: 1 .. capacity().
    sched_claim claim(SlotId slot) const noexcept;
    uint32_t used() const noexcept;               // slots taken; walks the table
    uint32_t id() const noexcept { return id_; }  // bpf: no two mirrors of this boot have the same; else 0

  private:
    friend class MirrorTask;

    SchedState look_bpf(SlotId slot) const noexcept;
    SchedState look_rseq(SlotId slot) const noexcept;
    const sched_header* header() const noexcept { return reinterpret_cast<const sched_header*>(slots_); }

    Source source_ = Source::off;
    uint32_t limit_ = 0;  // slot numbers below this one exist; 0 while closed

    const sched_slot* slots_ = nullptr;  // bpf
    sched_claim* claims_ = nullptr;
    int register_fd_ = -1;
    uint32_t id_ = 0;

    RseqSlot* rseq_slots_ = nullptr;  // rseq
    RseqCpu* rseq_cpus_ = nullptr;
    uint32_t cpus_ = 0;
    uint64_t words_begin_ = 0, words_end_ = 0;
};

// What becomes of a task's switches.
enum class Recording : uint8_t {
    works,
    stopped,  // no more: the registration is gone; detach, and attach again
    never,    // not since attaching: nobody keeps this mirror, whatever it says of itself
};

class MirrorTask {
  public:
    // bpf: claims a slot and registers the calling task with the kernel. Attached already: true.
    // Looks at 64 slots, beginning elsewhere each time, so that the last free slot of a large table takes some
    // tries to be found; and asks kill(2) about up to 8 claims whose task may have died unseen.
    bool attach(Mirror& mirror, Error* error) noexcept;

    // rseq, slot chosen by the caller, who must not give it to two tasks. blocked_word: not 0 while the task
    // waits for something; inside the range given to open_rseq; may be null.
    bool attach_rseq(Mirror& mirror, SlotId slot, const volatile uint32_t* blocked_word,
                     Error* error) noexcept;

    // rseq, a free slot of the table, found as by attach(). Slots of tasks that no longer exist are taken over, by
    // tasks of the same pid namespace.
    bool attach_rseq_claim(Mirror& mirror, Error* error) noexcept;

    void detach() noexcept;
    void reset_after_fork() noexcept { *this = MirrorTask(); }  // forget, the slot is the parent's

    SlotId slot() const noexcept { return slot_; }  // 0 when not attached
    uint32_t generation() const noexcept { return generation_; }

    // Whether the kernel writes this task's notes (proposals/deschedule.h). Not before the next attach: off.
    bool set_notes(bool on, Error* error) noexcept;

    // "I am running", said at every lock acquire. Costs two loads while nothing changed. False: the
    // mirror behind this registration has been unloaded, or the slot was taken over; drop the slot, detach,
    // attach again later.
    bool note_running() noexcept;

    // Said after every sleep. A mirror whose program was taken away without unloading it looks active for
    // ever; here it is found out. Costs a load while the own switch count moves.
    Recording note_slept() noexcept;

    // Whether this registration with the bpf mirror still counts: neither unloaded nor taken over.
    bool registered() const noexcept;

  private:
    bool note_switched(uint64_t switches) noexcept;
    void enter_rseq(Mirror& mirror, SlotId slot, uint32_t generation, uint64_t blocked_word) noexcept;

    static constexpr uint64_t kNeverCounts = 0;

    const uint64_t* count_ = &kNeverCounts;  // bpf: this slot's switches
    uint64_t seen_ = 0;  // bpf: copy of claim_->seen_switches; rseq: what *count_ never is
    Source source_ = Source::off;
    SlotId slot_ = 0;
    uint32_t generation_ = 0;
    uint32_t tid_ = 0;  // what this task wrote into the claim; 0: nothing

    const sched_slot* mine_ = nullptr;  // bpf
    sched_claim* claim_ = nullptr;
    const sched_header* header_ = nullptr;
    uint64_t attached_at_ = 0;  // switch counts: when attached, and after the last sleep
    uint64_t slept_at_ = 0;
    uint32_t unmoved_sleeps_ = 0;
    uint32_t failed_tries_ = 0;  // to claim a slot
    int64_t unmoved_since_ = 0;  // this task's own count of its switches, when they were first asked for
    int register_fd_ = -1;

    RseqSlot* rseq_mine_ = nullptr;  // rseq
    RseqCpu* rseq_cpus_ = nullptr;
    const volatile uint32_t* cpu_word_ = nullptr;
    uint32_t cpus_ = 0;
};

// ---- hot paths ----

inline SchedState Mirror::look(SlotId slot) const noexcept {
    if (slot == 0 || slot >= limit_) return SchedState::unknown;
    return source_ == Source::bpf ? look_bpf(slot) : look_rseq(slot);
}

// The kernel's word, mended by the task's own: on CPU, or known to have run since the last recorded switch.
// The mending is needed because not every kernel traces every switch: on some virtual machines the switches
// away from the idle task and from init's threads reach no tracepoint user, and whoever is switched in then
// stays "off CPU". The kernel stores the state before the count (schedmirror.bpf.c), so a task that is being
// switched out may still be called running for the length of two stores. Acquire: the counts read are at
// least as new as the state. A reader that is overtaken by a switch between its loads answers with the state
// before it.
inline SchedState Mirror::look_bpf(SlotId slot) const noexcept {
    const sched_slot& s = slots_[slot];
    const uint32_t state = __atomic_load_n(&s.state, __ATOMIC_ACQUIRE);
    if (state == SCHED_ON_CPU) return SchedState::on_cpu;
    const uint64_t seen = __atomic_load_n(&claims_[slot].seen_switches, __ATOMIC_RELAXED);
    if (seen == __atomic_load_n(&s.switches, __ATOMIC_RELAXED)) return SchedState::on_cpu;
    return state <= SCHED_DEAD ? static_cast<SchedState>(state) : SchedState::unknown;
}

inline sched_claim Mirror::claim(SlotId slot) const noexcept {
    sched_claim claim = {};
    const uint64_t both =
        __atomic_load_n(reinterpret_cast<const uint64_t*>(&claims_[slot]), __ATOMIC_RELAXED);
    __builtin_memcpy(&claim, &both, sizeof(both));
    return claim;
}

inline SchedState Mirror::look_rseq(SlotId slot) const noexcept {
    const RseqSlot& s = rseq_slots_[slot];
    const uint32_t cpu = __atomic_load_n(&s.cpu_plus_1, __ATOMIC_RELAXED) - 1;
    if (cpu >= cpus_) return SchedState::unknown;
    const uint64_t word = __atomic_load_n(&s.blocked_word, __ATOMIC_RELAXED);
    if (word >= words_begin_ && word < words_end_ && *reinterpret_cast<const volatile uint32_t*>(word) != 0)
        return SchedState::blocked;
    if (cpu == current_cpu()) return SchedState::preempted;  // I run there
    if (__atomic_load_n(&rseq_cpus_[cpu].last_slot, __ATOMIC_RELAXED) != slot) return SchedState::preempted;
    return SchedState::on_cpu;
}

inline bool MirrorTask::note_running() noexcept {
    const uint64_t switches = __atomic_load_n(count_, __ATOMIC_RELAXED);
    if (switches == seen_) [[likely]]
        return true;
    if (source_ == Source::bpf) return note_switched(switches);
    if (source_ == Source::rseq) {
        const uint32_t cpu = *cpu_word_;
        if (__atomic_load_n(&rseq_mine_->cpu_plus_1, __ATOMIC_RELAXED) != cpu + 1)
            __atomic_store_n(&rseq_mine_->cpu_plus_1, cpu + 1, __ATOMIC_RELAXED);
        if (cpu < cpus_ && __atomic_load_n(&rseq_cpus_[cpu].last_slot, __ATOMIC_RELAXED) != slot_)
            __atomic_store_n(&rseq_cpus_[cpu].last_slot, slot_, __ATOMIC_RELAXED);
    }
    return true;
}

}  // namespace adaptive
