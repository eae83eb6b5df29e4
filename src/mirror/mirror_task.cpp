// A task's registration: claiming a slot, and giving it back.
//
// A claim is a compare-and-swap of the claimant's thread id and a new generation into a free slot. The
// registration carries that generation: of two tasks that believe the slot theirs (one was taken for dead), the
// kernel follows the newer, and the older learns so at its next note_running().
//
// A task that died between claiming and registering left a claim that nobody gives back (of source rseq: one that
// did not detach). Another one takes it over, if kill(2) knows no such task. That says something of the tasks of
// the asker's own pid namespace only, so a claimant says which one is its: in a word of its own that names the
// claim's generation. A claim of which nothing was said yet is left alone.
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#include <initializer_list>

#include "base/error.h"
#include "mirror/bpf_source.h"
#include "mirror/claim.h"
#include "mirror/mirror.h"

namespace adaptive {
namespace {

// Two neighbours that are read and written as one word.
struct Claimant {
    uint32_t tid, generation;
};
static_assert(offsetof(sched_claim, tid) == 0 && offsetof(sched_claim, generation) == 4);
static_assert(offsetof(RseqSlot, tid) == 0 && offsetof(RseqSlot, generation) == 4);
static_assert(offsetof(sched_claim, whence) % 8 == 0 && offsetof(RseqSlot, whence) % 8 == 0);

template <class Slot>
Claimant claimant_of(const Slot& slot) noexcept {
    return std::bit_cast<Claimant>(
        __atomic_load_n(reinterpret_cast<const uint64_t*>(&slot), __ATOMIC_RELAXED));
}

template <class Slot>
bool replace(Slot& slot, Claimant from, Claimant to) noexcept {
    auto expected = std::bit_cast<uint64_t>(from);
    // Acquire pairs with the release of whoever freed the slot: its last words are visible to the new user.
    return __atomic_compare_exchange_n(reinterpret_cast<uint64_t*>(&slot), &expected,
                                       std::bit_cast<uint64_t>(to), false, __ATOMIC_ACQ_REL,
                                       __ATOMIC_RELAXED);
}

// The inode of the calling task's pid namespace; 0: there is no /proc to say it.
uint32_t pid_namespace() noexcept {
    struct stat status;
    return stat("/proc/self/ns/pid", &status) == 0 ? static_cast<uint32_t>(status.st_ino) : 0;
}

// How often the kernel has switched the calling task out, by its own accounts.
int64_t times_switched_out() noexcept {
    rusage usage = {};
    getrusage(RUSAGE_THREAD, &usage);
    return usage.ru_nvcsw + usage.ru_nivcsw;
}

struct Claimed {
    uint32_t slot;  // 0: none
    uint32_t generation;
};

// Claims a slot for `tid`: first a free one, then one whose claimant no longer exists. slot_at(i) is slot i;
// newer(i, generation): a generation for its next claim.
template <class SlotAt, class Newer>
Claimed claim_slot(uint32_t limit, uint32_t tid, uint32_t failed_tries, SlotAt slot_at,
                   Newer newer) noexcept {
    constexpr uint32_t kQuestions = 8;
    const uint32_t slots = limit - 1, looks = std::min(slots, kClaimLooks);
    const uint32_t start = claim_place(tid + failed_tries, slots);
    const uint32_t here = pid_namespace();
    uint32_t questions = 0;
    for (const bool take_over : {false, true}) {
        for (uint32_t i = 0; i < looks; i++) {
            const uint32_t number = 1 + (start + i) % slots;
            auto& slot = slot_at(number);
            const Claimant seen = claimant_of(slot);
            if (is_task_id(seen.tid)) {
                if (!take_over) continue;
                const auto whence = std::bit_cast<sched_whence>(
                    __atomic_load_n(reinterpret_cast<const uint64_t*>(&slot.whence), __ATOMIC_RELAXED));
                if (here == 0 || whence.pid_namespace != here || whence.generation != seen.generation)
                    continue;
                if (questions++ == kQuestions) return {0, 0};
                if (task_exists(seen.tid)) continue;
            }
            const uint32_t generation = newer(number, seen.generation);
            if (!replace(slot, seen, {tid, generation})) continue;
            __atomic_store_n(reinterpret_cast<uint64_t*>(&slot.whence),
                             std::bit_cast<uint64_t>(sched_whence{here, generation}), __ATOMIC_RELAXED);
            return {number, generation};
        }
    }
    return {0, 0};
}

bool fail_full(Error* error, const char* table, uint32_t slots, const char* advice) noexcept {
    if (slots <= kClaimLooks) return fail(error, "all %u slots of the %s are taken%s", slots, table, advice);
    return fail(error, "all %u slots of the %s are taken, or so say %u of them%s", slots, table, kClaimLooks,
                advice);
}

}  // namespace

bool MirrorTask::attach(Mirror& mirror, Error* error) noexcept {
    if (slot_ != 0) return true;
    if (mirror.source_ != Source::bpf) return fail(error, "no bpf mirror is open");
    if (!mirror.active()) return fail(error, "the mirror has been unloaded: run `schedmirror load` as root");

    const auto tid = static_cast<uint32_t>(gettid());
    const auto [slot, generation] = claim_slot(
        mirror.limit_, tid, failed_tries_, [&](uint32_t i) -> sched_claim& { return mirror.claims_[i]; },
        [&](uint32_t i, uint32_t claimed) {
            const uint32_t recorded = __atomic_load_n(&mirror.slots_[i].generation, __ATOMIC_RELAXED);
            return 1 + (static_cast<int32_t>(recorded - claimed) > 0 ? recorded : claimed);
        });
    if (slot == 0) {
        failed_tries_++;
        return fail_full(error, "mirror", mirror.capacity(),
                         ": `schedmirror unload`, then `schedmirror load --slots` with a larger number");
    }

    sched_claim* claim = &mirror.claims_[slot];
    const sched_slot* mine = &mirror.slots_[slot];
    const int problem = bpf::set_registration(mirror.register_fd_, {slot, generation});
    if (problem != 0) {
        replace(*claim, {tid, generation}, {0, generation + 1});
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
    register_fd_ = mirror.register_fd_;
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
    const int problem =
        bpf::set_registration(register_fd_, {slot_ | (on ? SCHED_HAS_NOTES : 0), generation_});
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
    enter_rseq(mirror, slot, __atomic_add_fetch(&s.generation, 1, __ATOMIC_RELAXED), word);
    return true;
}

bool MirrorTask::attach_rseq_claim(Mirror& mirror, Error* error) noexcept {
    if (slot_ != 0) return true;
    if (mirror.source_ != Source::rseq) return fail(error, "no rseq mirror is open");
    if (rseq_cpu_word() == nullptr) return fail(error, "no rseq area in this thread");
    const auto [slot, generation] = claim_slot(
        mirror.limit_, static_cast<uint32_t>(gettid()), failed_tries_,
        [&](uint32_t i) -> RseqSlot& { return mirror.rseq_slots_[i]; },
        [](uint32_t, uint32_t claimed) { return claimed + 1; });
    if (slot == 0) {
        failed_tries_++;
        return fail_full(error, "rseq table", mirror.capacity(), "");
    }
    enter_rseq(mirror, static_cast<SlotId>(slot), generation, 0);
    return true;
}

void MirrorTask::enter_rseq(Mirror& mirror, SlotId slot, uint32_t generation,
                            uint64_t blocked_word) noexcept {
    RseqSlot& s = mirror.rseq_slots_[slot];
    *this = MirrorTask();
    source_ = Source::rseq;
    seen_ = kNeverCounts + 1;
    slot_ = slot;
    generation_ = generation;
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
        bpf::set_registration(register_fd_, {0, 0});
        if (__atomic_load_n(&claim_->generation, __ATOMIC_RELAXED) == generation_) {
            __atomic_store_n(&claim_->seen_switches, SCHED_NEVER_SEEN, __ATOMIC_RELAXED);
            // The generation moves on in the same store: whoever remembers this task by slot and generation never
            // meets the next one, as after a death (schedmirror.bpf.c).
            replace(*claim_, {tid_, generation_}, {0, generation_ + 1});
        }
    }
    if (source_ == Source::rseq &&
        __atomic_load_n(&rseq_mine_->generation, __ATOMIC_RELAXED) == generation_) {
        __atomic_store_n(&rseq_mine_->blocked_word, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&rseq_mine_->cpu_plus_1, 0, __ATOMIC_RELAXED);
        replace(*rseq_mine_, {tid_, generation_}, {0, generation_});
    }
    *this = MirrorTask();
}

}  // namespace adaptive
