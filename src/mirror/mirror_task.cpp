// A task's registration: claiming a slot, and giving it back.
//
// A claim is a compare-and-swap of the claimant's thread id into a free slot. The claim's generation then
// moves on by one, and the registration carries it: of two tasks that believe the slot theirs (one was taken
// for dead, or speaks from another pid namespace), the kernel follows the newer, and the older learns so at
// its next note_running().
#include <sys/resource.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <initializer_list>

#include "mirror/claim.h"
#include "mirror/error.h"
#include "mirror/mirror.h"
#include "source/bpf_source.h"

namespace adaptive {
namespace {

bool swap(uint32_t* word, uint32_t from, uint32_t to) noexcept {
    // Acquire pairs with the release of whoever freed the slot: its last words are visible to the new user.
    return __atomic_compare_exchange_n(word, &from, to, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED);
}

// Gives a claim back and moves its generation on, in one store: whoever remembers this task by slot and
// generation never meets the next one, as after a death (schedmirror.bpf.c).
void leave(sched_claim* claim, uint32_t tid, uint32_t generation) noexcept {
    static_assert(offsetof(sched_claim, tid) == 0 && offsetof(sched_claim, generation) == 4);
    const uint32_t from[2] = {tid, generation}, to[2] = {0, generation + 1};
    uint64_t expected, desired;
    memcpy(&expected, from, sizeof(expected));
    memcpy(&desired, to, sizeof(desired));
    __atomic_compare_exchange_n(reinterpret_cast<uint64_t*>(claim), &expected, desired, false,
                                __ATOMIC_ACQ_REL, __ATOMIC_RELAXED);
}

// How often the kernel has switched the calling task out, by its own accounts.
int64_t times_switched_out() noexcept {
    rusage usage = {};
    getrusage(RUSAGE_THREAD, &usage);
    return usage.ru_nvcsw + usage.ru_nivcsw;
}

// Claims a slot for `tid`: first a free one, then one whose claimant no longer exists (it died between
// claiming and registering). word(i) is slot i's claim word. 0: all taken.
template <typename Word>
uint32_t claim_slot(uint32_t limit, uint32_t tid, Word word) noexcept {
    const uint32_t slots = limit - 1;
    const uint32_t start = claim_place(tid, slots);
    for (const bool take_over : {false, true}) {
        for (uint32_t i = 0; i < slots; i++) {
            const uint32_t slot = 1 + (start + i) % slots;
            const uint32_t claimant = __atomic_load_n(word(slot), __ATOMIC_RELAXED);
            if (claimant != 0 && (!take_over || task_exists(claimant))) continue;
            if (swap(word(slot), claimant, tid)) return slot;
        }
    }
    return 0;
}

}  // namespace

bool MirrorTask::attach(Mirror& mirror, Error* error) noexcept {
    if (slot_ != 0) return true;
    if (mirror.source_ != Source::bpf) return fail(error, "no bpf mirror is open");
    if (!mirror.active()) return fail(error, "the mirror has been unloaded: run `schedmirror load` as root");

    const auto tid = static_cast<uint32_t>(gettid());
    const uint32_t slot = claim_slot(mirror.limit_, tid, [&](uint32_t i) { return &mirror.claims_[i].tid; });
    if (slot == 0)
        return fail(
            error,
            "all %u slots of the mirror are taken: `schedmirror unload`, then `schedmirror load --slots` "
            "with a larger number",
            mirror.capacity());

    sched_claim* claim = &mirror.claims_[slot];
    const sched_slot* mine = &mirror.slots_[slot];
    uint32_t generation = __atomic_add_fetch(&claim->generation, 1, __ATOMIC_RELAXED);
    const uint32_t recorded = __atomic_load_n(&mine->generation, __ATOMIC_RELAXED);
    if (static_cast<int32_t>(generation - recorded) <= 0) {
        generation = recorded + 1;
        __atomic_store_n(&claim->generation, generation, __ATOMIC_RELAXED);
    }

    const int problem = bpf::set_registration(mirror.tasks_fd_, {slot, generation});
    if (problem != 0) {
        swap(&claim->tid, tid, 0);
        if (problem == EINVAL && gettid() != getpid())
            return fail(error, "this kernel cannot register a single thread: Linux 6.9 or later is needed");
        return fail(error, "the kernel does not register this task with the mirror: %s", strerror(problem));
    }

    *this = MirrorTask();
    source_ = Source::bpf;
    slot_ = static_cast<SlotId>(slot);
    generation_ = generation;
    tid_ = tid;
    mine_ = mine;
    count_ = reinterpret_cast<const uint64_t*>(&mine->switches);
    claim_ = claim;
    header_ = mirror.header();
    tasks_fd_ = mirror.tasks_fd_;
    // The kernel has not seen this task switch yet: until then the claim alone says that it runs.
    seen_ = slept_at_ = attached_at_ = __atomic_load_n(&mine->switches, __ATOMIC_RELAXED);
    __atomic_store_n(&claim->seen_switches, seen_, __ATOMIC_RELAXED);
    return true;
}

// The rare half of note_running: the slot has switched since. In the normal case the kernel has recorded the
// switch-in that brought us here, and one cache line answers. (A task that was switched out between reading
// the count and storing it stores an old one, which equals no later count.)
bool MirrorTask::note_switched(uint64_t switches) noexcept {
    const uint32_t recorded = __atomic_load_n(&mine_->generation, __ATOMIC_RELAXED);
    if (static_cast<int32_t>(recorded - generation_) > 0) return false;
    seen_ = switches;
    const uint32_t state = __atomic_load_n(&mine_->state, __ATOMIC_RELAXED);
    if (state == SCHED_ON_CPU) return true;
    // Unloading leaves every state unknown behind.
    if (state == SCHED_UNKNOWN && __atomic_load_n(&header_->active, __ATOMIC_RELAXED) == 0) return false;
    __atomic_store_n(&claim_->seen_switches, switches, __ATOMIC_RELAXED);
    return true;
}

bool MirrorTask::registered() const noexcept {
    return source_ == Source::bpf && __atomic_load_n(&header_->active, __ATOMIC_RELAXED) != 0 &&
           __atomic_load_n(&claim_->generation, __ATOMIC_RELAXED) == generation_;
}

bool MirrorTask::set_notes(bool on, Error* error) noexcept {
    if (source_ != Source::bpf) return fail(error, "this task is not registered with a bpf mirror");
    const int problem = bpf::set_registration(tasks_fd_, {slot_ | (on ? SCHED_HAS_NOTES : 0), generation_});
    return problem == 0 ||
           fail(error, "the kernel does not change this task's registration: %s", strerror(problem));
}

// A sleep whose wake-up came first switches nothing, so a count that stands still proves nothing by itself.
// The kernel's accounts do: sixteen switches there and none here. They are asked for at every sixteenth such
// sleep only.
Recording MirrorTask::note_slept() noexcept {
    constexpr uint32_t kEnough = 16;
    if (source_ != Source::bpf) return Recording::works;
    const uint64_t switches = __atomic_load_n(&mine_->switches, __ATOMIC_RELAXED);
    if (switches != slept_at_) {
        slept_at_ = switches;
        unmoved_sleeps_ = 0;
        return Recording::works;
    }
    if (++unmoved_sleeps_ % kEnough != 0) return Recording::works;
    const int64_t switched_out = times_switched_out();
    if (unmoved_sleeps_ == kEnough) unmoved_since_ = switched_out;
    if (switched_out - unmoved_since_ < kEnough) return Recording::works;
    return switches == attached_at_ ? Recording::never : Recording::stopped;
}

bool MirrorTask::attach_rseq(Mirror& mirror, SlotId slot, const volatile uint32_t* blocked_word,
                             Error* error) noexcept {
    if (slot_ != 0) return true;
    if (mirror.source_ != Source::rseq) return fail(error, "no rseq mirror is open");
    if (slot == 0 || slot >= mirror.limit_)
        return fail(error, "slot %u is not in the table of %u slots", slot, mirror.capacity());
    const auto word = reinterpret_cast<uintptr_t>(blocked_word);
    if (word != 0 && (word < mirror.words_begin_ || word >= mirror.words_end_))
        return fail(error, "the blocked word lies outside the memory named when the rseq mirror was opened");
    if (rseq_cpu_word() == nullptr) return fail(error, "no rseq area in this thread");

    RseqSlot& s = mirror.rseq_slots_[slot];
    __atomic_store_n(&s.tid, static_cast<uint32_t>(gettid()), __ATOMIC_RELAXED);
    enter_rseq(mirror, slot, word);
    return true;
}

bool MirrorTask::attach_rseq_claim(Mirror& mirror, Error* error) noexcept {
    if (slot_ != 0) return true;
    if (mirror.source_ != Source::rseq) return fail(error, "no rseq mirror is open");
    if (rseq_cpu_word() == nullptr) return fail(error, "no rseq area in this thread");
    const uint32_t slot = claim_slot(mirror.limit_, static_cast<uint32_t>(gettid()),
                                     [&](uint32_t i) { return &mirror.rseq_slots_[i].tid; });
    if (slot == 0) return fail(error, "all %u slots of the rseq table are taken", mirror.capacity());
    enter_rseq(mirror, static_cast<SlotId>(slot), 0);
    return true;
}

void MirrorTask::enter_rseq(Mirror& mirror, SlotId slot, uint64_t blocked_word) noexcept {
    RseqSlot& s = mirror.rseq_slots_[slot];
    *this = MirrorTask();
    source_ = Source::rseq;
    seen_ = kNeverCounts + 1;
    slot_ = slot;
    generation_ = __atomic_add_fetch(&s.generation, 1, __ATOMIC_RELAXED);
    tid_ = static_cast<uint32_t>(gettid());
    rseq_mine_ = &s;
    rseq_cpus_ = mirror.rseq_cpus_;
    cpus_ = mirror.cpus_;
    cpu_word_ = rseq_cpu_word();
    __atomic_store_n(&s.blocked_word, blocked_word, __ATOMIC_RELAXED);
    note_running();
}

void MirrorTask::detach() noexcept {
    if (source_ == Source::bpf) {
        bpf::delete_registration(tasks_fd_);
        if (__atomic_load_n(&claim_->generation, __ATOMIC_RELAXED) == generation_) {
            __atomic_store_n(&claim_->seen_switches, SCHED_NEVER_SEEN, __ATOMIC_RELAXED);
            leave(claim_, tid_, generation_);
        }
    }
    if (source_ == Source::rseq &&
        __atomic_load_n(&rseq_mine_->generation, __ATOMIC_RELAXED) == generation_) {
        __atomic_store_n(&rseq_mine_->blocked_word, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&rseq_mine_->cpu, kNoCpu, __ATOMIC_RELAXED);
        swap(&rseq_mine_->tid, tid_, 0);
    }
    *this = MirrorTask();
}

}  // namespace adaptive
