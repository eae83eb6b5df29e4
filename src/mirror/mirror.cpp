#include "mirror/mirror.h"

#include <unistd.h>

#include <algorithm>

#include "base/error.h"
#include "mirror/bpf_source.h"
#include "mirror/claim.h"

namespace adaptive {

const char* name_of(SchedState state) noexcept {
    switch (state) {
        case SchedState::on_cpu:
            return "on_cpu";
        case SchedState::preempted:
            return "preempted";
        case SchedState::blocked:
            return "blocked";
        case SchedState::dead:
            return "dead";
        case SchedState::unknown:
            break;
    }
    return "unknown";
}

bool Mirror::open_bpf(const char* dir, Error* error) noexcept {
    if (source_ != Source::off) return fail(error, "a mirror is open already");
    bpf::Maps maps;
    if (!bpf::open_maps(dir, &maps, error)) return false;
    slots_ = maps.slot_array;
    claims_ = maps.claim_array;
    register_fd_ = maps.register_fd;
    id_ = maps.id;
    limit_ = maps.slots;
    source_ = Source::bpf;
    return true;
}

bool Mirror::open_rseq(void* mem, Error* error, const void* words, size_t words_bytes) noexcept {
    if (source_ != Source::off) return fail(error, "a mirror is open already");
    if (rseq_cpu_word() == nullptr)
        return fail(error,
                    "no rseq area in this thread: glibc 2.35 or later is needed, with its tunable "
                    "glibc.pthread.rseq left on");
    const auto* header = static_cast<const RseqHeader*>(mem);
    if (reinterpret_cast<uintptr_t>(mem) % 64 != 0)
        return fail(error, "the rseq table is not 64-byte aligned");
    if (__atomic_load_n(&header->magic, __ATOMIC_ACQUIRE) != kRseqMagic || header->version != kRseqVersion ||
        header->slots < 2 || header->slots > SCHED_MIRROR_MAX_SLOTS || header->cpus == 0)
        return fail(error, "this memory holds no rseq table of a known layout: format it first");
    rseq_slots_ = static_cast<RseqSlot*>(mem);
    rseq_cpus_ = reinterpret_cast<RseqCpu*>(rseq_slots_ + header->slots);
    cpus_ = header->cpus;
    words_begin_ = reinterpret_cast<uintptr_t>(words);
    words_end_ =
        words_bytes < sizeof(uint32_t) ? words_begin_ : words_begin_ + words_bytes - (sizeof(uint32_t) - 1);
    limit_ = header->slots;
    source_ = Source::rseq;
    return true;
}

void Mirror::close() noexcept {
    if (source_ == Source::bpf) bpf::close_maps({limit_, id_, slots_, claims_, register_fd_});
    *this = Mirror();
}

bool Mirror::active() const noexcept {
    if (source_ == Source::bpf) return __atomic_load_n(&header()->active, __ATOMIC_RELAXED) != 0;
    return source_ == Source::rseq;
}

SlotId Mirror::find(uint32_t tid) const noexcept {
    if (tid == 0) return 0;
    const uint32_t slots = capacity(), looks = std::min(slots, kClaimLooks);
    for (uint32_t i = 0; i < looks; i++) {
        const uint32_t slot = 1 + (claim_place(tid, slots) + i) % slots;
        const uint32_t* claimant = source_ == Source::bpf ? &claims_[slot].tid : &rseq_slots_[slot].tid;
        if (__atomic_load_n(claimant, __ATOMIC_RELAXED) == tid) return static_cast<SlotId>(slot);
    }
    return 0;
}

SlotInfo Mirror::info(SlotId slot) const noexcept {
    SlotInfo info = {};
    if (slot == 0 || slot >= limit_) return info;
    info.state = look(slot);
    if (source_ == Source::rseq) {
        const RseqSlot& s = rseq_slots_[slot];
        info.cpu = __atomic_load_n(&s.cpu_plus_1, __ATOMIC_RELAXED) - 1;
        info.tid = info.claimant = __atomic_load_n(&s.tid, __ATOMIC_RELAXED);
        info.generation = __atomic_load_n(&s.generation, __ATOMIC_RELAXED);
        // look() speaks of others: whoever is on this CPU but me is not running.
        if (info.tid != 0 && info.tid == static_cast<uint32_t>(gettid())) info.state = SchedState::on_cpu;
        return info;
    }
    const sched_slot& s = slots_[slot];
    info.cpu = __atomic_load_n(&s.cpu, __ATOMIC_RELAXED);
    info.tid = __atomic_load_n(&s.tid, __ATOMIC_RELAXED);
    info.generation = __atomic_load_n(&s.generation, __ATOMIC_RELAXED);
    info.last_switch_ns = __atomic_load_n(&s.last_switch_ns, __ATOMIC_RELAXED);
    info.switches = __atomic_load_n(&s.switches, __ATOMIC_RELAXED);
    // The kernel's words may still speak of an earlier user of the slot.
    const uint32_t claimant = __atomic_load_n(&claims_[slot].tid, __ATOMIC_RELAXED);
    info.claimant = claimant;
    const uint32_t claimed = __atomic_load_n(&claims_[slot].generation, __ATOMIC_RELAXED);
    if (claimant == 0 && info.state != SchedState::dead) info.state = SchedState::unknown;
    if (claimant != 0 && info.generation != claimed) info.tid = claimant;
    return info;
}

uint32_t Mirror::used() const noexcept {
    uint32_t used = 0;
    for (uint32_t i = 1; i < limit_; i++)
        used += source_ == Source::bpf ? __atomic_load_n(&claims_[i].tid, __ATOMIC_RELAXED) != 0
                                       : __atomic_load_n(&rseq_slots_[i].cpu_plus_1, __ATOMIC_RELAXED) != 0;
    return used;
}

}  // namespace adaptive
