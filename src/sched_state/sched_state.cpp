// The table of the sources kernel and rseq: a header, the slots, and for rseq the mirror's table behind them.
//
// A slot is claimed by locking its robust mutex, which a dead thread leaves marked. Its generation moves on
// twice: before the lock is tried, so that nobody takes the new owner for the old one; and after, so that a
// competitor's late attempt at the first step, which names the generation it expects, fails.
#include "sched_state/sched_state.h"

#include <sys/auxv.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <new>

#include "mirror/error.h"

namespace adaptive {
namespace {

constexpr uint32_t kMagic = 0x74617473U;  // "stat"
constexpr uint32_t kVersion = 1;
constexpr unsigned long kAuxFeatureSize = 27;  // AT_RSEQ_FEATURE_SIZE, Linux 6.3

// In the place of slot 0.
struct Header {
    uint32_t magic, version, slots, cpus, source;
};
static_assert(sizeof(Header) <= sizeof(SchedStateSlot));
static_assert(offsetof(pthread_mutex_t, __data.__lock) == 0);

int registered_by_syscall(volatile RseqArea* area, uint32_t bytes, bool on) {
#ifdef ADAPTIVE_HAVE_RSEQ
    constexpr int kUnregister = 1;
    return syscall(SYS_rseq, area, bytes, on ? 0 : kUnregister, RSEQ_SIG) == 0 ? 0 : errno;
#else
    (void)area, (void)bytes, (void)on;
    return ENOSYS;
#endif
}

void make_mutex(pthread_mutex_t* mutex) noexcept {
    pthread_mutexattr_t attributes;
    pthread_mutexattr_init(&attributes);
    pthread_mutexattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
    pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
    pthread_mutex_init(mutex, &attributes);
    pthread_mutexattr_destroy(&attributes);
}

bool is_free(const SchedStateSlot& slot) noexcept {
    constexpr uint32_t kTid = 0x3fffffff;
    return (__atomic_load_n(reinterpret_cast<const uint32_t*>(&slot.life), __ATOMIC_ACQUIRE) & kTid) == 0;
}

bool claim(SchedStateSlot& slot) noexcept {
    uint32_t generation = __atomic_load_n(&slot.generation, __ATOMIC_ACQUIRE);
    if (!is_free(slot)) return false;
    if (!__atomic_compare_exchange_n(&slot.generation, &generation, generation + 1, false, __ATOMIC_ACQ_REL,
                                     __ATOMIC_RELAXED))
        return false;
    const int locked = pthread_mutex_trylock(&slot.life);
    if (locked == EOWNERDEAD) pthread_mutex_consistent(&slot.life);
    if (locked != 0 && locked != EOWNERDEAD) return false;
    __atomic_store_n(&slot.state.state, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&slot.state.tid, 0, __ATOMIC_RELAXED);
    __atomic_add_fetch(&slot.generation, 1, __ATOMIC_RELEASE);
    return true;
}

}  // namespace

// ---- the proposal's field ----

RseqRegistration RseqRegistration::of_this_thread() noexcept {
    // glibc registers its size rounded up to that of the first struct rseq.
#ifdef ADAPTIVE_HAVE_RSEQ
    const uint32_t bytes = __rseq_size > 32 ? __rseq_size : 32;
#else
    const uint32_t bytes = 0;
#endif
    return {rseq_area(), bytes, static_cast<uint32_t>(getauxval(kAuxFeatureSize)), registered_by_syscall};
}

bool RseqRegistration::offers_sched_state() const noexcept {
    constexpr uint32_t kEnd = offsetof(RseqArea, sched_state_ptr) + sizeof(uint64_t);
    return area != nullptr && feature_size >= kEnd && bytes >= kEnd;
}

// ---- the reader's view ----

bool SchedStates::open_bpf(const char* dir, Error* error) noexcept {
    if (source_ != SchedSource::off) return fail(error, "a table is open already");
    if (!mirror_.open_bpf(dir, error)) return false;
    source_ = SchedSource::bpf;
    return true;
}

size_t SchedStates::bytes(uint32_t slots, uint32_t cpus) noexcept {
    return slots * sizeof(SchedStateSlot) + Mirror::rseq_bytes(slots, cpus);
}

void SchedStates::format(void* mem, uint32_t slots, uint32_t cpus, SchedSource source) noexcept {
    auto* table = static_cast<SchedStateSlot*>(mem);
    memset(mem, 0, bytes(slots, cpus));
    for (uint32_t i = 1; i < slots; i++) make_mutex(&table[i].life);
    Mirror::rseq_format(table + slots, slots, cpus);
    auto* header = static_cast<Header*>(mem);
    header->version = kVersion;
    header->slots = slots;
    header->cpus = cpus;
    header->source = static_cast<uint32_t>(source);
    __atomic_store_n(&header->magic, kMagic, __ATOMIC_RELEASE);
}

bool SchedStates::open(void* mem, Error* error) noexcept {
    if (source_ != SchedSource::off) return fail(error, "a table is open already");
    const auto* header = static_cast<const Header*>(mem);
    if (reinterpret_cast<uintptr_t>(mem) % alignof(SchedStateSlot) != 0)
        return fail(error, "the table of states is not 64-byte aligned");
    if (__atomic_load_n(&header->magic, __ATOMIC_ACQUIRE) != kMagic || header->version != kVersion)
        return fail(error, "this memory holds no table of states of a known layout: format it first");
    const auto source = static_cast<SchedSource>(header->source);
    if (source != SchedSource::kernel && source != SchedSource::rseq)
        return fail(error, "the table of states has a source that needs none");
    auto* table = static_cast<SchedStateSlot*>(mem);
    if (!mirror_.open_rseq(table + header->slots, error)) return false;
    source_ = source;
    slots_ = table;
    return true;
}

void SchedStates::close() noexcept {
    mirror_.close();
    *this = SchedStates();
}

// ---- the thread's own entry ----

bool SchedStateTask::attach(SchedStates& states, Error* error,
                            const RseqRegistration& registration) noexcept {
    if (handle_.slot != 0) return true;
    if (states.source_ == SchedSource::off) return fail(error, "no table of states is open");
    if (states.source_ == SchedSource::bpf) {
        if (!task_.attach(states.mirror_, error)) return false;
        handle_ = {task_.slot(), task_.generation()};
        return true;
    }
    if (states.source_ == SchedSource::kernel && !registration.offers_sched_state())
        return fail(error,
                    "the running kernel offers no sched_state in struct rseq, or glibc's area has no "
                    "room for it");

    uint32_t number = 1;
    while (number <= states.capacity() && !claim(states.slots_[number])) number++;
    if (number > states.capacity())
        return fail(error, "all %u slots of the table of states are taken", states.capacity());
    slot_ = &states.slots_[number];
    registration_ = registration;
    handle_ = {number, __atomic_load_n(&slot_->generation, __ATOMIC_RELAXED)};
    if (states.source_ == SchedSource::rseq
            ? task_.attach_rseq(states.mirror_, static_cast<SlotId>(number), nullptr, error)
            : register_with_kernel(error))
        return true;
    detach();
    return false;
}

// The kernel reads the pointer when the area is registered.
bool SchedStateTask::set_pointer(const rseq_sched_state* state) noexcept {
    const RseqRegistration& r = registration_;
    if (r.call(r.area, r.bytes, false) != 0) return false;
    r.area->sched_state_ptr = reinterpret_cast<uintptr_t>(state);
    return r.call(r.area, r.bytes, true) == 0;
}

// A later kernel may use the same bytes for something else. One that knows the field has filled in the state by
// the time the registration returns.
bool SchedStateTask::register_with_kernel(Error* error) noexcept {
    if (!set_pointer(&slot_->state)) return fail(error, "the kernel does not let rseq be registered anew");
    const rseq_sched_state& state = slot_->state;
    if (__atomic_load_n(&state.tid, __ATOMIC_RELAXED) != 0 &&
        (__atomic_load_n(&state.state, __ATOMIC_RELAXED) & kSchedOnCpu) != 0)
        return true;
    return fail(error,
                "the running kernel has an rseq area large enough for sched_state, but does not keep it");
}

void SchedStateTask::detach() noexcept {
    task_.detach();
    if (slot_ != nullptr) {
        if (registration_.area != nullptr && registration_.offers_sched_state() &&
            registration_.area->sched_state_ptr == reinterpret_cast<uintptr_t>(&slot_->state))
            set_pointer(nullptr);
        __atomic_add_fetch(&slot_->generation, 1, __ATOMIC_RELEASE);
        pthread_mutex_unlock(&slot_->life);
    }
    *this = SchedStateTask();
}

}  // namespace adaptive
