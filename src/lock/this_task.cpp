#include "lock/this_task.h"

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>

#include "mirror/error.h"

namespace adaptive {

struct ThisTaskAccess {
    static void leave(ThisTask& task) noexcept;
    static void drop_slot(ThisTask& task) noexcept;
    static void forget_parent(ThisTask& task) noexcept;
};

namespace {

constexpr uint32_t kPrivateSlots = 1024;

// This process's mirror, and what there is to say of it; all under `guard`, but for looks at an open mirror.
struct Process {
    Mirror mirror;
    bool chosen = false, registered = false;
    bool across_processes = false;
    uint32_t users = 0;  // threads that may look at the mirror
    void* private_table = nullptr;
    pthread_key_t key = 0;
    Error why_not_bpf = {}, why_not_rseq = {}, refused = {};
} process;

uint32_t cpus() noexcept {
    const long n = sysconf(_SC_NPROCESSORS_CONF);
    return n > 0 ? static_cast<uint32_t>(n) : 1;
}

// A lock of the C library could be one of ours, put in its place.
std::atomic<bool> guard{false};

void lock_guard() noexcept {
    // Pairs with the release in unlock_guard().
    while (guard.exchange(true, std::memory_order_acquire)) usleep(50);
}
void unlock_guard() noexcept {
    guard.store(false, std::memory_order_release);
}

void after_fork_in_child() noexcept {
    ThisTaskAccess::forget_parent(internal::this_task_of_thread);
    unlock_guard();
}

// Once in a process, guarded.
void register_process() noexcept {
    if (process.registered) return;
    process.registered = true;
    CycleClock::calibrate();
    pthread_key_create(&process.key,
                       [](void* task) { ThisTaskAccess::leave(*static_cast<ThisTask*>(task)); });
    pthread_atfork(lock_guard, unlock_guard, after_fork_in_child);
}

size_t private_table_bytes() noexcept {
    return Mirror::rseq_bytes(kPrivateSlots, cpus());
}

// Opens an rseq mirror over the given table, or over one of this process's own.
bool open_rseq(Mirror& mirror, void* table, void** private_table, Error* error) noexcept {
    if (table == nullptr) {
        void* memory =
            mmap(nullptr, private_table_bytes(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) return fail(error, "no memory for the rseq table");
        Mirror::rseq_format(memory, kPrivateSlots, cpus());
        *private_table = table = memory;
    }
    if (mirror.open_rseq(table, error)) return true;
    if (*private_table != nullptr) munmap(*private_table, private_table_bytes());
    *private_table = nullptr;
    return false;
}

// Guarded. False: not to be had, and nothing has changed.
bool choose(const MirrorChoice& choice, Error* error) noexcept {
    using Wanted = MirrorChoice::Wanted;
    Mirror mirror;
    void* private_table = nullptr;
    Error why_not_bpf = {}, why_not_rseq = {};
    const bool wants_bpf = choice.wanted == Wanted::bpf || choice.wanted == Wanted::best;
    const bool wants_rseq = choice.wanted == Wanted::rseq || choice.wanted == Wanted::best;
    const bool has_bpf = wants_bpf && mirror.open_bpf(choice.bpf_dir, &why_not_bpf);
    const bool has_rseq =
        !has_bpf && wants_rseq && open_rseq(mirror, choice.rseq_table, &private_table, &why_not_rseq);
    if (choice.wanted == Wanted::bpf && !has_bpf) return fail(error, "%s", why_not_bpf.text);
    if (choice.wanted == Wanted::rseq && !has_rseq) return fail(error, "%s", why_not_rseq.text);

    process.mirror.close();
    if (process.private_table != nullptr) munmap(process.private_table, private_table_bytes());
    process.mirror = mirror;
    process.private_table = private_table;
    process.across_processes = has_bpf || (has_rseq && private_table == nullptr);
    process.why_not_bpf = why_not_bpf;
    process.why_not_rseq = why_not_rseq;
    process.refused = {};
    process.chosen = true;
    return true;
}

}  // namespace

void ThisTask::enter() noexcept {
    lock_guard();
    register_process();
    if (!process.chosen) choose({}, nullptr);

    const auto tid = static_cast<uint64_t>(gettid());
    identities_[0] = identities_[1] = tid;
    const Source source = process.mirror.source();
    if (!has_left_ && source != Source::off) {
        Error error = {};
        const bool attached = source == Source::bpf ? registration_.attach(process.mirror, &error)
                                                    : registration_.attach_rseq_claim(process.mirror, &error);
        if (attached)
            identities_[0] |= static_cast<uint64_t>(registration_.slot()) << 32;
        else
            process.refused = error;
        process.users++;
        mirrors_[0] = &process.mirror;
        if (process.across_processes) {
            identities_[1] = identities_[0];
            mirrors_[1] = &process.mirror;
        }
        pthread_setspecific(process.key, this);
    }
    unlock_guard();
}

// The mirror has been unloaded, or nobody keeps it: what it says is not worth a look any more.
void ThisTask::lose_slot() noexcept {
    lock_guard();
    ThisTaskAccess::drop_slot(*this);
    unlock_guard();
}

void ThisTaskAccess::drop_slot(ThisTask& task) noexcept {
    if (task.mirrors_[0] != nullptr) process.users--;
    task.registration_.detach();
    for (const Mirror*& mirror : task.mirrors_) mirror = nullptr;
    for (uint64_t& identity : task.identities_) identity &= UINT32_MAX;
}

void ThisTaskAccess::leave(ThisTask& task) noexcept {
    lock_guard();
    drop_slot(task);
    task.has_left_ = true;  // later destructors of this thread may still lock
    unlock_guard();
}

// Only the forking thread lives on; the other slots of a private table are the parent's.
void ThisTaskAccess::forget_parent(ThisTask& task) noexcept {
    task.registration_.reset_after_fork();
    task.mirrors_[0] = task.mirrors_[1] = nullptr;
    task.identities_[0] = task.identities_[1] = 0;
    task.robust = nullptr;
    task.sparing_since = 0;
    process.users = 0;
    if (process.private_table != nullptr) Mirror::rseq_format(process.private_table, kPrivateSlots, cpus());
}

void forget_parent() noexcept {
    after_fork_in_child();
}

bool use_mirror(const MirrorChoice& choice, Error* error) noexcept {
    ThisTask& task = internal::this_task_of_thread;
    lock_guard();
    register_process();
    const bool uses_it = task.mirrors_[0] != nullptr;
    bool done = false;
    if (process.users > (uses_it ? 1 : 0)) {
        fail(error, "other threads of this process use the present mirror: choose before they take a lock");
    } else {
        ThisTaskAccess::drop_slot(task);  // of the mirror that may be closed
        done = choose(choice, error);
        task.identities_[0] = task.identities_[1] = 0;  // enters anew
    }
    unlock_guard();
    return done;
}

MirrorInUse mirror_in_use() noexcept {
    this_task();
    lock_guard();
    const MirrorInUse status = {.source = process.mirror.source(),
                                .across_processes = process.across_processes,
                                .slots = process.mirror.capacity(),
                                .used = process.mirror.used(),
                                .why_not_bpf = process.why_not_bpf,
                                .why_not_rseq = process.why_not_rseq,
                                .refused = process.refused};
    unlock_guard();
    return status;
}

const Mirror& process_mirror() noexcept {
    this_task();
    return process.mirror;
}

}  // namespace adaptive
