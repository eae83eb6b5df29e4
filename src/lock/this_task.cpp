/*
 * Threads enter and leave without a lock, and nothing is held over a fork: a thread that takes a lock inside fork(),
 * in somebody's handler, may enter there.
 *
 * The mirror in use is one of two records that do not change while they are pointed at: a forked child finds the
 * record whole, even if another thread of its parent was just choosing. How many threads use the mirror is counted
 * in memory that is wiped in a child. Who changes the mirror takes the count from zero (or its own use) to kChoosing;
 * who enters meanwhile waits for that, and for nothing else: the one who chooses needs nothing of them.
 */
#include "lock/this_task.h"

#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <climits>
#include <cstring>

#include "base/error.h"
#include "lock/wiped_on_fork.h"

namespace adaptive {

struct ThisTaskAccess {
    static bool uses_mirror(const ThisTask& task) noexcept;
    static void give_back(ThisTask& task) noexcept;
    static void leave(ThisTask& task) noexcept;
    static void forget_parent(ThisTask& task) noexcept;
};

namespace {

// A private table has all slot numbers that there are. What nobody touches takes no memory.
constexpr uint32_t kPrivateSlots = SCHED_MIRROR_MAX_SLOTS;

constexpr uint32_t kChoosing = 1U << 31;

struct alignas(kLargestPage) InThisProcess {
    std::atomic<uint32_t> users;   // threads that may look at the mirror; kChoosing: somebody chooses one
    std::atomic<uint32_t> number;  // this process's among its ancestors', from 1; 0: has none yet
    std::atomic<bool> refused_is_in_use;
};
constinit InThisProcess here = {};
std::atomic<uint32_t> last_number{0};

struct Chosen {
    Mirror mirror;
    bool across_processes = false;
    void* private_table = nullptr;
    Error why_not_bpf = {}, why_not_rseq = {};
};
constinit Chosen records[2];
std::atomic<Chosen*> chosen{nullptr};

constinit Error refused = {};  // guarded by refused_is_in_use
bool calibrated = false;       // while kChoosing

// What is made once, in a constructor: the C library may have no more of it later.
struct {
    std::atomic<bool> done{false};
    bool is_wiped = false;
    pthread_key_t key = 0;
    int no_key = 0, no_handler = 0;  // errno
} at_start;

void after_fork_in_child() noexcept {
    if (!at_start.is_wiped) {
        here.users = here.number = 0;
        here.refused_is_in_use = false;
    }
    ThisTaskAccess::forget_parent(internal::this_task_of_thread);
}

[[gnu::constructor]] void start() noexcept {
    if (at_start.done.exchange(true)) return;
    at_start.is_wiped = wipe_on_fork(&here, sizeof(here));
    at_start.no_key = pthread_key_create(
        &at_start.key, [](void* task) { ThisTaskAccess::leave(*static_cast<ThisTask*>(task)); });
    at_start.no_handler = pthread_atfork(nullptr, nullptr, after_fork_in_child);
}

uint32_t this_process() noexcept {
    uint32_t number = here.number.load(std::memory_order_relaxed);
    if (number != 0) return number;
    const uint32_t mine = last_number.fetch_add(1, std::memory_order_relaxed) + 1;
    return here.number.compare_exchange_strong(number, mine, std::memory_order_relaxed) ? mine : number;
}

// As soon as nobody writes it; it takes a moment.
void with_refused(bool may_wait, auto&& use) noexcept {
    while (here.refused_is_in_use.exchange(true, std::memory_order_acquire)) {
        if (!may_wait) return;
        sched_yield();
    }
    use(refused);
    here.refused_is_in_use.store(false, std::memory_order_release);
}

// The reason of another thread is as good.
void refuse(const Error& error) noexcept {
    with_refused(false, [&](Error& present) { present = error; });
}

uint32_t cpus() noexcept {
    const long n = sysconf(_SC_NPROCESSORS_CONF);
    return n > 0 ? static_cast<uint32_t>(n) : 1;
}

size_t private_table_bytes() noexcept {
    return Mirror::rseq_bytes(kPrivateSlots, cpus());
}

// Opens an rseq mirror over the given table, or over one of this process's own.
bool open_rseq(Mirror& mirror, void* table, void** private_table, Error* error) noexcept {
    if (table == nullptr) {
        void* memory = mmap(nullptr, private_table_bytes(), PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) return fail(error, "no memory for the rseq table");
        wipe_on_fork(memory, private_table_bytes());              // the slots are the parent's
        madvise(memory, private_table_bytes(), MADV_NOHUGEPAGE);  // few of them are used
        rseq_table_head(memory, kPrivateSlots, cpus());
        *private_table = table = memory;
    }
    if (mirror.open_rseq(table, error)) return true;
    if (*private_table != nullptr) munmap(*private_table, private_table_bytes());
    *private_table = nullptr;
    return false;
}

// By who chooses. False: not to be had, and nothing has changed.
bool choose(const MirrorChoice& choice, Error* error) noexcept {
    using Wanted = MirrorChoice::Wanted;
    if (!calibrated) CycleClock::calibrate();
    calibrated = true;

    Chosen* const old = chosen.load(std::memory_order_relaxed);
    Chosen& next = records[old == &records[0] ? 1 : 0];
    next = {};
    const bool wants_bpf = choice.wanted == Wanted::bpf || choice.wanted == Wanted::best;
    const bool wants_rseq = choice.wanted == Wanted::rseq || choice.wanted == Wanted::best;
    const bool has_bpf = wants_bpf && next.mirror.open_bpf(choice.bpf_dir, &next.why_not_bpf);
    const bool has_rseq = !has_bpf && wants_rseq &&
                          open_rseq(next.mirror, choice.rseq_table, &next.private_table, &next.why_not_rseq);
    if (choice.wanted == Wanted::bpf && !has_bpf) return fail(error, "%s", next.why_not_bpf.text);
    if (choice.wanted == Wanted::rseq && !has_rseq) return fail(error, "%s", next.why_not_rseq.text);

    next.across_processes = has_bpf || (has_rseq && next.private_table == nullptr);
    with_refused(true, [](Error& present) { present = {}; });
    // Pairs with the acquire in begin_use().
    chosen.store(&next, std::memory_order_release);
    if (old != nullptr) {
        old->mirror.close();
        if (old->private_table != nullptr) munmap(old->private_table, private_table_bytes());
    }
    return true;
}

// Only one chooses at a time, and only while nobody uses the mirror but `own` uses of its own.
enum class Choosing : uint8_t { mine, in_use };
Choosing begin_choosing(uint32_t own) noexcept {
    for (;;) {
        uint32_t users = own;
        // Acquire pairs with the release of the last who used the mirror, or chose it.
        if (here.users.compare_exchange_strong(users, kChoosing, std::memory_order_acquire))
            return Choosing::mine;
        if (users != kChoosing) return Choosing::in_use;
        futex_wait(&here.users, kChoosing, Sharing::process_private, Deadline::never());
    }
}
void end_choosing() noexcept {
    here.users.store(0, std::memory_order_release);
    futex_wake(&here.users, INT_MAX, Sharing::process_private);
}

// The mirror does not change before end_use(). The first to use one chooses it.
Chosen& begin_use() noexcept {
    for (;;) {
        uint32_t users = here.users.load(std::memory_order_relaxed);
        if (users == kChoosing) {
            futex_wait(&here.users, kChoosing, Sharing::process_private, Deadline::never());
        } else if (chosen.load(std::memory_order_acquire) == nullptr) {
            if (begin_choosing(0) == Choosing::in_use) continue;
            if (chosen.load(std::memory_order_relaxed) == nullptr) choose({}, nullptr);
            end_choosing();
        } else if (here.users.compare_exchange_weak(users, users + 1, std::memory_order_acquire)) {
            return *chosen.load(std::memory_order_relaxed);
        }
    }
}
void end_use() noexcept {
    here.users.fetch_sub(1, std::memory_order_release);
}

// So that the thread gives back at its end what it gets, and a child does not take itself for its parent.
bool can_leave(ThisTask* task, Error* error) noexcept {
    if (at_start.no_handler != 0)
        return fail(error, "no fork handler, so a child must say forget_parent(): pthread_atfork: %s",
                    strerror(at_start.no_handler));
    const int problem = at_start.no_key != 0 ? at_start.no_key : pthread_setspecific(at_start.key, task);
    return problem == 0 ||
           fail(error, "nothing would tell that a thread ends: %s: %s",
                at_start.no_key != 0 ? "pthread_key_create" : "pthread_setspecific", strerror(problem));
}

}  // namespace

void ThisTask::enter() noexcept {
    start();
    process_ = this_process();
    identities_[0] = identities_[1] = static_cast<uint64_t>(gettid());
    Chosen& in_use = begin_use();
    const Source source = in_use.mirror.source();
    Error error = {};
    if (has_left_ || source == Source::off || !can_leave(this, &error)) {
        end_use();
        if (error.text[0] != '\0') refuse(error);
        return;
    }
    if (source == Source::bpf ? registration_.attach(in_use.mirror, &error)
                              : registration_.attach_rseq_claim(in_use.mirror, &error))
        identities_[0] |= static_cast<uint64_t>(registration_.slot()) << 32;
    else
        refuse(error);
    mirrors_[0] = &in_use.mirror;
    if (in_use.across_processes) {
        identities_[1] = identities_[0];
        mirrors_[1] = &in_use.mirror;
    }
}

// The mirror has been unloaded, or nobody keeps it: what it says is not worth a look any more.
void ThisTask::lose_slot() noexcept {
    const bool used = ThisTaskAccess::uses_mirror(*this);
    ThisTaskAccess::give_back(*this);
    if (used) end_use();
}

// And is counted for it; in a forked child nobody is, at first.
bool ThisTaskAccess::uses_mirror(const ThisTask& task) noexcept {
    return task.mirrors_[0] != nullptr && task.process_ == this_process();
}

// A slot that a child has inherited is its parent's.
void ThisTaskAccess::give_back(ThisTask& task) noexcept {
    if (task.process_ == this_process())
        task.registration_.detach();
    else
        task.registration_.reset_after_fork();
    for (const Mirror*& mirror : task.mirrors_) mirror = nullptr;
    for (uint64_t& identity : task.identities_) identity &= UINT32_MAX;
}

void ThisTaskAccess::leave(ThisTask& task) noexcept {
    task.lose_slot();
    task.has_left_ = true;  // later destructors of this thread may still lock
}

// Only the forking thread lives on. It may have entered here already, in a handler that came before this one.
void ThisTaskAccess::forget_parent(ThisTask& task) noexcept {
    if (task.process_ != 0 && task.process_ == here.number.load(std::memory_order_relaxed)) return;
    task.registration_.reset_after_fork();
    task.mirrors_[0] = task.mirrors_[1] = nullptr;
    task.identities_[0] = task.identities_[1] = 0;
    task.process_ = 0;
    task.robust = nullptr;
    task.sparing_since = 0;
}

void forget_parent() noexcept {
    after_fork_in_child();
}

bool use_mirror(const MirrorChoice& choice, Error* error) noexcept {
    ThisTask& task = internal::this_task_of_thread;
    start();
    if (begin_choosing(ThisTaskAccess::uses_mirror(task) ? 1 : 0) == Choosing::in_use)
        return fail(error,
                    "other threads of this process use the present mirror: choose before they take a lock");
    ThisTaskAccess::give_back(task);  // of the mirror that may be closed
    const bool done = choose(choice, error);
    task.identities_[0] = task.identities_[1] = 0;  // enters anew
    end_choosing();
    return done;
}

MirrorInUse mirror_in_use() noexcept {
    this_task();
    const Chosen& in_use = begin_use();
    MirrorInUse status = {.source = in_use.mirror.source(),
                          .across_processes = in_use.across_processes,
                          .slots = in_use.mirror.capacity(),
                          .used = in_use.mirror.used(),
                          .why_not_bpf = in_use.why_not_bpf,
                          .why_not_rseq = in_use.why_not_rseq,
                          .refused = {}};
    end_use();
    with_refused(true, [&](Error& present) { status.refused = present; });
    return status;
}

const Mirror& process_mirror() noexcept {
    this_task();
    return chosen.load(std::memory_order_acquire)->mirror;
}

}  // namespace adaptive
