// The table of the source rseq: a header, the slots, and the mirror's table behind them.
//
// A slot is claimed by locking its robust mutex, which a dead thread leaves marked. Its generation moves on
// twice: before the lock is tried, so that nobody takes the new owner for the old one; and after, so that a
// competitor's late attempt at the first step, which names the generation it expects, fails.
#include "proposals/sched_state.h"

#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <new>

#include "base/error.h"

namespace adaptive {
namespace {

constexpr uint32_t kMagic = 0x74617473U;  // "stat"
constexpr uint32_t kVersion = 2;

// In the place of slot 0.
struct Header {
    uint32_t magic, version, slots, cpus;
};
static_assert(sizeof(Header) <= sizeof(SchedStateSlot));
static_assert(offsetof(pthread_mutex_t, __data.__lock) == 0);

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
    __atomic_add_fetch(&slot.generation, 1, __ATOMIC_RELEASE);
    return true;
}

}  // namespace

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

void SchedStates::format(void* mem, uint32_t slots, uint32_t cpus) noexcept {
    auto* table = static_cast<SchedStateSlot*>(mem);
    memset(mem, 0, bytes(slots, cpus));
    for (uint32_t i = 1; i < slots; i++) make_mutex(&table[i].life);
    Mirror::rseq_format(table + slots, slots, cpus);
    auto* header = static_cast<Header*>(mem);
    header->version = kVersion;
    header->slots = slots;
    header->cpus = cpus;
    __atomic_store_n(&header->magic, kMagic, __ATOMIC_RELEASE);
}

bool SchedStates::open(void* mem, Error* error) noexcept {
    if (source_ != SchedSource::off) return fail(error, "a table is open already");
    const auto* header = static_cast<const Header*>(mem);
    if (reinterpret_cast<uintptr_t>(mem) % alignof(SchedStateSlot) != 0)
        return fail(error, "the table of states is not 64-byte aligned");
    if (__atomic_load_n(&header->magic, __ATOMIC_ACQUIRE) != kMagic || header->version != kVersion)
        return fail(error, "this memory holds no table of states of a known layout: format it first");
    auto* table = static_cast<SchedStateSlot*>(mem);
    if (!mirror_.open_rseq(table + header->slots, error)) return false;
    source_ = SchedSource::rseq;
    slots_ = table;
    return true;
}

void SchedStates::close() noexcept {
    mirror_.close();
    *this = SchedStates();
}

// ---- the thread's own entry ----

bool SchedStateTask::attach(SchedStates& states, Error* error) noexcept {
    if (handle_.slot != 0) return true;
    if (states.source_ == SchedSource::off) return fail(error, "no table of states is open");
    if (states.source_ == SchedSource::bpf) {
        if (!task_.attach(states.mirror_, error)) return false;
        handle_ = {task_.slot(), task_.generation()};
        return true;
    }
    uint32_t number = 1;
    while (number <= states.capacity() && !claim(states.slots_[number])) number++;
    if (number > states.capacity())
        return fail(error, "all %u slots of the table of states are taken", states.capacity());
    slot_ = &states.slots_[number];
    handle_ = {number, __atomic_load_n(&slot_->generation, __ATOMIC_RELAXED)};
    if (task_.attach_rseq(states.mirror_, static_cast<SlotId>(number), nullptr, error)) return true;
    detach();
    return false;
}

void SchedStateTask::detach() noexcept {
    task_.detach();
    if (slot_ != nullptr) {
        __atomic_add_fetch(&slot_->generation, 1, __ATOMIC_RELEASE);
        pthread_mutex_unlock(&slot_->life);
    }
    *this = SchedStateTask();
}

}  // namespace adaptive
