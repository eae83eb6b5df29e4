/*
 * The public functions of the server's lwlock.c that touch a lock's state or the list of locks held, on
 * QueueProtocol.
 *
 * The server keeps its list of held locks to itself, so all of these functions are replaced together and this
 * list is the only one in use. Arguments, results, errors, interrupt holdoff and probes are those of the
 * server.
 */

#include "lwlock/api.h"

#include <iterator>

#include "lwlock/host.h"

// Raised by a tracer that attaches to the probe of the same name; see lwlock/probes.h.
extern "C" {
#define PROBE_SEMAPHORE __attribute__((section(".probes"), visibility("hidden"), used)) unsigned short
PROBE_SEMAPHORE postgresql_lwlock__acquire_semaphore = 0;
PROBE_SEMAPHORE postgresql_lwlock__release_semaphore = 0;
PROBE_SEMAPHORE postgresql_lwlock__wait__start_semaphore = 0;
PROBE_SEMAPHORE postgresql_lwlock__wait__done_semaphore = 0;
PROBE_SEMAPHORE postgresql_lwlock__condacquire_semaphore = 0;
PROBE_SEMAPHORE postgresql_lwlock__condacquire__fail_semaphore = 0;
PROBE_SEMAPHORE postgresql_lwlock__acquire__or__wait_semaphore = 0;
PROBE_SEMAPHORE postgresql_lwlock__acquire__or__wait__fail_semaphore = 0;
}

namespace adaptive::lwlock_api {
namespace {

using Waiting = QueueProtocol<LwlockHost>;

// ---- the locks that this process holds ----

struct Held {
    LWLock* lock;
    LWLockMode mode;
};
constexpr int kMostHeld = 200;  // as the server: pg_buffercache takes all buffer partitions at once

Held held[kMostHeld];
int num_held = 0;

void ensure_room() {
    if (num_held >= kMostHeld) elog(ERROR, "too many LWLocks taken");
}

void remember(LWLock* lock, LWLockMode mode) {
    held[num_held++] = {lock, mode};
}

[[gnu::noinline]] LWLockMode forget_any(LWLock* lock) {
    int i = num_held;
    while (--i >= 0 && held[i].lock != lock) {
    }
    if (i < 0) elog(ERROR, "lock %s is not held", probe::tranche_name(*lock));
    const LWLockMode mode = held[i].mode;
    num_held--;
    for (; i < num_held; i++) held[i] = held[i + 1];
    return mode;
}

/// Takes the lock off the list and says how it was held. Most often it is the last one taken.
inline LWLockMode forget(LWLock* lock) {
    const int last = num_held - 1;
    if (last < 0 || held[last].lock != lock) [[unlikely]]
        return forget_any(lock);
    num_held = last;
    return held[last].mode;
}

LockMode waiting_mode(LWLockMode mode) {
    return static_cast<LockMode>(mode);
}

// ---- the replacements ----

// The result decides whether a backend moves on to another WAL insertion lock next time: it should when
// somebody else uses this one, so a lock that was got by spinning counts as one that was slept for.
bool acquire(LWLock* lock, LWLockMode mode) {
    ensure_room();
    HOLD_INTERRUPTS();
    backend_mirror::note_running();
    const bool at_once = Waiting::acquire(*lock, waiting_mode(mode));
    probe::acquired(*lock, mode);
    remember(lock, mode);
    return at_once;
}

bool conditional_acquire(LWLock* lock, LWLockMode mode) {
    ensure_room();
    HOLD_INTERRUPTS();
    backend_mirror::note_running();
    if (!Waiting::acquire_conditionally(*lock, waiting_mode(mode))) {
        RESUME_INTERRUPTS();
        probe::conditional_acquire_failed(*lock, mode);
        return false;
    }
    remember(lock, mode);
    probe::conditionally_acquired(*lock, mode);
    return true;
}

bool acquire_or_wait(LWLock* lock, LWLockMode mode) {
    ensure_room();
    HOLD_INTERRUPTS();
    backend_mirror::note_running();
    if (!Waiting::acquire_or_wait(*lock, waiting_mode(mode))) {
        RESUME_INTERRUPTS();
        probe::acquire_or_wait_failed(*lock, mode);
        return false;
    }
    remember(lock, mode);
    probe::acquired_or_waited(*lock, mode);
    return true;
}

// Whoever sees a variable's new value sees also what was written before it.
uint64 read(server::Variable* variable) {
    return server::value_of(variable).load(std::memory_order_acquire);
}
void write(server::Variable* variable, uint64 value) {
    server::value_of(variable).store(value, std::memory_order_release);
}

bool wait_for_var(LWLock* lock, server::Variable* variable, uint64 old_value, uint64* new_value) {
    HOLD_INTERRUPTS();
    const bool freed = Waiting::wait_until(*lock, [&] {
        const uint64 value = read(variable);
        if (value == old_value) return false;
        *new_value = value;
        return true;
    });
    RESUME_INTERRUPTS();
    return freed;
}

void update_var(LWLock* lock, server::Variable* variable, uint64 value) {
    Waiting::update(*lock, [&] { write(variable, value); });
}

void release(LWLock* lock) {
    const LWLockMode mode = forget(lock);
    Waiting::release(*lock, waiting_mode(mode));
    probe::released(*lock);
    RESUME_INTERRUPTS();
}

void release_clear_var(LWLock* lock, server::Variable* variable, uint64 value) {
    // Before the release, or the next holder's value could be overwritten. Those who wait for the variable are
    // woken by the release.
    write(variable, value);
    release(lock);
}

// The lock stays held, by an I/O under way, and any process may be the one to release it.
void disown(LWLock* lock) {
    if (forget(lock) == LW_EXCLUSIVE) LwlockHost::set_no_owner(*lock);
    Waiting::disown(*lock);
    RESUME_INTERRUPTS();
}

void release_disowned(LWLock* lock, LWLockMode mode) {
    Waiting::release(*lock, waiting_mode(mode));
    probe::released(*lock);
}

void release_all() {
    Waiting::abandon();
    while (num_held > 0) {
        HOLD_INTERRUPTS();  // error recovery has set the count; release() must not lower it
        release(held[num_held - 1].lock);
    }
}

void for_each_held_by_me(void (*callback)(LWLock*, LWLockMode, void*), void* context) {
    for (int i = 0; i < num_held; i++) callback(held[i].lock, held[i].mode, context);
}

bool held_by_me(LWLock* lock) {
    for (int i = 0; i < num_held; i++)
        if (held[i].lock == lock) return true;
    return false;
}

bool any_held_by_me(LWLock* locks, int nlocks, size_t stride) {
    const char* begin = reinterpret_cast<const char*>(locks);
    const char* end = begin + static_cast<size_t>(nlocks) * stride;
    for (int i = 0; i < num_held; i++) {
        const char* lock = reinterpret_cast<const char*>(held[i].lock);
        if (lock >= begin && lock < end && static_cast<size_t>(lock - begin) % stride == 0) return true;
    }
    return false;
}

bool held_by_me_in_mode(LWLock* lock, LWLockMode mode) {
    for (int i = 0; i < num_held; i++)
        if (held[i].lock == lock && held[i].mode == mode) return true;
    return false;
}

/// The template makes the compiler check that the replacement has the original's type.
template <class Function>
patch::Replacement replace(const char* name, Function* original, Function* replacement, int args) {
    return {name, reinterpret_cast<void*>(original), reinterpret_cast<void*>(replacement), args};
}

/// A function that uses nothing but the server's list of locks held. Whatever else uses the list is a copy of one
/// of the functions.
patch::Replacement marking(patch::Replacement replacement) {
    replacement.marks_copies = true;
    return replacement;
}

/// Appends those that this version of the server has; returns how many there are then.
template <size_t kN>
int append_present(patch::Replacement* list, int n, const patch::Replacement (&functions)[kN]) {
    for (const patch::Replacement& f : functions)
        if (f.original != nullptr) list[n++] = f;
    return n;
}

}  // namespace

patch::Result install() {
#define REPLACE(original, replacement, args) replace(#original, original, replacement, args)
    const patch::Replacement needed[] = {
        REPLACE(LWLockAcquire, acquire, 2),
        REPLACE(LWLockConditionalAcquire, conditional_acquire, 2),
        REPLACE(LWLockAcquireOrWait, acquire_or_wait, 2),
        REPLACE(LWLockWaitForVar, wait_for_var, 4),
        REPLACE(LWLockUpdateVar, update_var, 3),
        REPLACE(LWLockRelease, release, 1),
        REPLACE(LWLockReleaseAll, release_all, 0),
        REPLACE(ForEachLWLockHeldByMe, for_each_held_by_me, 2),
        marking(REPLACE(LWLockHeldByMe, held_by_me, 1)),
        marking(REPLACE(LWLockAnyHeldByMe, any_held_by_me, 3)),
        marking(REPLACE(LWLockHeldByMeInMode, held_by_me_in_mode, 2)),
        replace("LWLockDisown", server::kDisown, disown, 1),
    };
    // Since version 17, and compiled without branch protection, these can be little more than a jump, which
    // leaves no room for a patch. They do right beside the replacements too: one ends in a call of
    // LWLockRelease(), the other knows only the state word and the wait list.
    const patch::Replacement dispensable[] = {
        REPLACE(LWLockReleaseClearVar, release_clear_var, 3),
        replace("LWLockReleaseDisowned", server::kReleaseDisowned, release_disowned, 2),
    };
#undef REPLACE
    patch::Replacement list[std::size(needed) + std::size(dispensable)];
    const int n_needed = append_present(list, 0, needed);
    const int n = append_present(list, n_needed, dispensable);
    const patch::Result all = patch::install(list, n);
    return all.ok || !all.intact ? all : patch::install(list, n_needed);
}

int held_count() {
    return num_held;
}

}  // namespace adaptive::lwlock_api
