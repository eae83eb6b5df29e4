// What adaptive_pthread.h describes: the interposed functions, and the decision whether they do anything.
//
// All of this runs inside other people's programs, at any time: before constructors, in children of any kind of fork,
// in threads that are ending, with cancellation pending.
#include <dlfcn.h>
#include <gnu/libc-version.h>
#include <pthread.h>
#include <sys/single_threaded.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "lock/this_task.h"
#include "lock/wiped_on_fork.h"
#include "preload/adaptive_pthread.h"
#include "protocol/pthread_protocol.h"

#if !defined(__GLIBC__) || !defined(__LP64__)
#error "this is about the mutexes of glibc on 64-bit machines"
#endif

namespace adaptive {
namespace {

constexpr Sharing kPrivate = Sharing::process_private;

// ---- what the kernel wipes in a forked child ----

constexpr size_t kSeats = 256;

enum class Mode : uint32_t { undecided, deciding, handing_over, active };
enum class Choice : uint32_t { open, being_made, made };

struct alignas(64) Seat {
    uint64_t word;
};

struct alignas(kLargestPage) Wiped {
    Seat seats[kSeats];
    std::atomic<Mode> mode;
    std::atomic<Choice> mirror;
};
constinit Wiped wiped = {};

// ---- the functions behind ours ----

struct Next {
    int (*lock)(pthread_mutex_t*);
    int (*trylock)(pthread_mutex_t*);
    int (*unlock)(pthread_mutex_t*);
    int (*timedlock)(pthread_mutex_t*, const timespec*);
    int (*clocklock)(pthread_mutex_t*, clockid_t, const timespec*);
};
constinit Next next = {};

// dlsym() that succeeds neither allocates nor comes back to us: glibc calls its own functions directly.
template <class Function>
Function resolve(Function& function, const char* name) noexcept {
    const std::atomic_ref<Function> resolved(function);
    Function found = resolved.load(std::memory_order_relaxed);
    if (found == nullptr) [[unlikely]] {
        found = reinterpret_cast<Function>(dlsym(RTLD_NEXT, name));
        if (found == nullptr) abort();  // a C library without mutexes
        resolved.store(found, std::memory_order_relaxed);
    }
    return found;
}
auto next_lock() noexcept {
    return resolve(next.lock, "pthread_mutex_lock");
}
auto next_trylock() noexcept {
    return resolve(next.trylock, "pthread_mutex_trylock");
}
auto next_unlock() noexcept {
    return resolve(next.unlock, "pthread_mutex_unlock");
}
auto next_timedlock() noexcept {
    return resolve(next.timedlock, "pthread_mutex_timedlock");
}
auto next_clocklock() noexcept {
    return resolve(next.clocklock, "pthread_mutex_clocklock");
}

// ---- the decision ----

constinit thread_local bool inside = false;  // this thread is at work for us: its locks are the C library's

struct Options {
    bool off = false, help = false;
    MirrorChoice mirror;
    char bpf_dir[200] = {};
};
constinit Options options;
constinit bool counting = false;
constinit char reason[sizeof(adaptive_pthread_status::why_not)] = {};

constexpr const char* kHelp =
    "libadaptive_pthread.so: pthread mutexes that spin while their owner is on a CPU\n"
    "ADAPTIVE_PTHREAD=WORD,...\n"
    "  off       hand everything to the C library\n"
    "  stats     one line on standard error when the process exits\n"
    "  bpf       the mirror that `schedmirror load` pinned, or none; bpf=DIR: pinned in DIR\n"
    "  rseq      a mirror inferred within this process, or none\n"
    "  blind     no mirror: short spins\n"
    "  help      this text\n"
    "Without bpf, rseq, blind: the best there is.\n";

// Without stdio, whose locks the program may hold.
[[gnu::format(printf, 1, 2)]] void say(const char* format, ...) noexcept {
    char line[1024];
    va_list arguments;
    va_start(arguments, format);
    const int length = vsnprintf(line, sizeof(line), format, arguments);
    va_end(arguments);
    if (length > 0) (void)!write(STDERR_FILENO, line, std::min<size_t>(length, sizeof(line) - 1));
}

[[gnu::format(printf, 1, 2)]] bool refuse(const char* format, ...) noexcept {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(reason, sizeof(reason), format, arguments);
    va_end(arguments);
    return false;
}

bool read_options() noexcept {
    const char* words = getenv("ADAPTIVE_PTHREAD");
    using Wanted = MirrorChoice::Wanted;
    for (size_t length; words != nullptr && *words != 0; words += length + (words[length] == ',')) {
        length = strcspn(words, ",");
        const auto is = [&](const char* word) {
            return strlen(word) == length && memcmp(words, word, length) == 0;
        };
        if (is("off")) {
            options.off = true;
        } else if (is("stats")) {
            counting = true;
        } else if (is("help")) {
            options.help = true;
        } else if (is("rseq")) {
            options.mirror.wanted = Wanted::rseq;
        } else if (is("blind")) {
            options.mirror.wanted = Wanted::off;
        } else if (is("bpf")) {
            options.mirror.wanted = Wanted::bpf;
        } else if (length > 4 && length < 4 + sizeof(options.bpf_dir) && memcmp(words, "bpf=", 4) == 0) {
            options.mirror.wanted = Wanted::bpf;
            memcpy(options.bpf_dir, words + 4, length - 4);
            options.bpf_dir[length - 4] = 0;
            options.mirror.bpf_dir = options.bpf_dir;
        } else if (length != 0) {
            refuse("unknown word '%.*s' in ADAPTIVE_PTHREAD (see ADAPTIVE_PTHREAD=help)",
                   static_cast<int>(length), words);
            say("adaptive_pthread: inactive: %s\n", reason);
            return false;
        }
    }
    return true;
}

// Whether the functions behind ours are the C library's own.
bool nobody_behind_us() noexcept {
    Dl_info libc = {}, other = {};
    dladdr(reinterpret_cast<void*>(&gnu_get_libc_version), &libc);
    void* const functions[] = {reinterpret_cast<void*>(next_lock()), reinterpret_cast<void*>(next_trylock()),
                               reinterpret_cast<void*>(next_unlock()),
                               reinterpret_cast<void*>(next_timedlock()),
                               reinterpret_cast<void*>(next_clocklock())};
    for (void* function : functions)
        if (dladdr(function, &other) == 0 || other.dli_fbase != libc.dli_fbase)
            return refuse("%s has put mutexes of its own in place",
                          other.dli_fname ? other.dli_fname : "somebody");
    return true;
}

// Whether the C library's mutexes are what we take them for.
bool words_are_known() noexcept {
    pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
    __pthread_mutex_s& data = mutex.__data;
    const auto is = [&](int word, int owner, unsigned users) {
        asm volatile("" ::: "memory");
        return data.__lock == word && data.__owner == owner && data.__nusers == users && data.__kind == 0;
    };
    const int self = gettid();
    bool ok = next_lock()(&mutex) == 0 && is(1, self, 1);
    ok = ok && next_trylock()(&mutex) == EBUSY && is(1, self, 1);
    ok = ok && next_unlock()(&mutex) == 0 && is(0, 0, 0);
    ok = ok && next_trylock()(&mutex) == 0 && is(1, self, 1);
    data.__lock = 2;
    ok = ok && next_trylock()(&mutex) == EBUSY && is(2, self, 1);
    ok = ok && next_unlock()(&mutex) == 0 && is(0, 0, 0);
    return ok || refuse("the mutexes of glibc %s are not laid out as expected", gnu_get_libc_version());
}

bool may_be_active() noexcept {
    static constinit bool known = false, may = false;  // only one thread decides, and what it found stays
    if (!known) {
        may = read_options() && (!options.off || refuse("switched off by ADAPTIVE_PTHREAD")) &&
              nobody_behind_us() && words_are_known();
        known = true;
    }
    if (may && !wipe_on_fork(&wiped, sizeof(wiped)))
        return refuse("madvise(MADV_WIPEONFORK): %s", strerror(errno));
    return may;
}

constinit bool loaded = false;  // before that there is no environment to read

[[gnu::cold, gnu::noinline]] Mode decide() noexcept {
    if (!loaded) return Mode::undecided;
    Mode seen = Mode::undecided;
    if (!wiped.mode.compare_exchange_strong(seen, Mode::deciding, std::memory_order_acquire)) return seen;
    const int errno_before = errno;
    forget_parent();  // in a child that no fork handler has prepared
    inside = false;
    const Mode decided = may_be_active() ? Mode::active : Mode::handing_over;
    wiped.mode.store(decided, std::memory_order_release);
    errno = errno_before;
    return decided;
}

// As long as somebody decides, the others use the C library's functions: who does what never matters.
bool is_active() noexcept {
    Mode mode = wiped.mode.load(std::memory_order_relaxed);
    if (mode == Mode::undecided) [[unlikely]]
        mode = decide();
    return mode == Mode::active;
}

// ---- threads ----

// The mirror is opened for a program that has threads, not for every little command. False: another thread is at it.
bool choose_mirror() noexcept {
    Choice seen = Choice::open;
    if (!wiped.mirror.compare_exchange_strong(seen, Choice::being_made, std::memory_order_acquire))
        return seen == Choice::made;
    Error error = {};
    if (!use_mirror(options.mirror, &error)) {
        refuse("%s", error.text);
        use_mirror({.wanted = MirrorChoice::Wanted::off}, nullptr);
    }
    wiped.mirror.store(Choice::made, std::memory_order_release);
    return true;
}

// The calling thread enters the mirror. It may be cancelled, and signalled, but not in there.
[[gnu::cold, gnu::noinline]] bool enter() noexcept {
    if (__libc_single_threaded || inside) return false;
    inside = true;
    const int errno_before = errno;
    int cancel_state;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &cancel_state);
    const bool chosen = choose_mirror();
    if (chosen) (void)this_task();
    pthread_setcancelstate(cancel_state, nullptr);
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    errno = errno_before;
    inside = false;
    return chosen;
}

// Null: not entered, what it does is the C library's business.
ThisTask* entered_task() noexcept {
    ThisTask& task = internal::this_task_of_thread;
    if (task.tid() == 0 && !enter()) [[unlikely]]
        return nullptr;
    return &task;
}

// ---- the mutexes ----

struct Counters {
    std::atomic<uint64_t> contended, spin_acquired, owner_off_cpu, budget_spent, slept, sent, spared;
};
constinit Counters counters = {};

[[gnu::cold, gnu::noinline]] void count_event(LockEvent event) noexcept {
    const auto add = [](std::atomic<uint64_t>& counter) { counter.fetch_add(1, std::memory_order_relaxed); };
    switch (event) {
        case LockEvent::contended:
            return add(counters.contended);
        case LockEvent::spin_acquired:
            return add(counters.spin_acquired);
        case LockEvent::owner_off_cpu:
            return add(counters.owner_off_cpu);
        case LockEvent::budget_spent:
            return add(counters.budget_spent);
        case LockEvent::slept:
            return add(counters.slept);
        case LockEvent::wakeup_sent:
            return add(counters.sent);
        case LockEvent::wakeup_spared:
            return add(counters.spared);
        case LockEvent::spin_ticks:
            return;
    }
}

struct PthreadHost : ThisTaskHost {
    using Lock = pthread_mutex_t;

    static std::atomic_ref<int> word(Lock& lock) { return std::atomic_ref<int>(lock.__data.__lock); }
    static std::atomic_ref<uint64_t> seat(const Lock* lock) {
        const auto address = reinterpret_cast<uint64_t>(lock);
        return std::atomic_ref<uint64_t>(wiped.seats[(address * 0x9E3779B97F4A7C15u) >> 56].word);
    }
    static uint64_t key(const Lock* lock) {
        const auto address = reinterpret_cast<uint64_t>(lock);
        return address >> 48 == 0 && address % 4 == 0 ? address << 16 : 0;
    }
    static uint32_t owner(Lock& lock) {
        return static_cast<uint32_t>(
            std::atomic_ref<int>(lock.__data.__owner).load(std::memory_order_relaxed));
    }
    static SlotId slot() {
        const SlotId slot = this_task().slot(kPrivate);
        return slot != 0 ? slot : mutex_word::kUnnamed;
    }
    static SlotId find(uint32_t tid) { return this_task().find(tid, kPrivate); }
    static SchedState look(SlotId slot) { return this_task().look(slot, kPrivate); }
    static FutexWait sleep(Lock& lock) {
        const FutexWait end = futex_wait(&lock.__data.__lock, 2, kPrivate, Deadline::never());
        this_task().note_slept();
        return end;
    }
    static void wake(const Lock* lock) { futex_wake(&lock->__data.__lock, 1, kPrivate); }
    static SpinPace pace(Lock& lock) { return this_task().pace.pace(&lock); }
    static void waited(Lock& lock, bool spun) { this_task().pace.waited(&lock, spun); }
    static void count(LockEvent event) {
        if (counting) [[unlikely]]
            count_event(event);
    }
};
using Protocol = PthreadProtocol<PthreadHost>;

static_assert(kSeats == 256, "an index of 8 bits");

// The kinds that are taken over: normal and adaptive, whatever was said about lock elision but that it is on.
bool is_plain(const pthread_mutex_t* mutex) noexcept {
    constexpr int kNoElision = 512;
    const int kind = __atomic_load_n(&mutex->__data.__kind, __ATOMIC_RELAXED) & ~kNoElision;
    return kind == PTHREAD_MUTEX_TIMED_NP || kind == PTHREAD_MUTEX_ADAPTIVE_NP;
}

// The task for a mutex that is taken over now; null: hand the call over.
ThisTask* taken_over(const pthread_mutex_t* mutex) noexcept {
    return is_plain(mutex) && is_active() ? entered_task() : nullptr;
}

// As glibc does once it has the word.
int held(pthread_mutex_t* mutex, const ThisTask& task) noexcept {
    std::atomic_ref<int>(mutex->__data.__owner)
        .store(static_cast<int>(task.tid()), std::memory_order_relaxed);
    mutex->__data.__nusers++;
    return 0;
}

// True if the mutex was taken before the deadline without going to sleep for it.
bool try_for_a_while(pthread_mutex_t* mutex, ThisTask& task, clockid_t clock,
                     const timespec& until) noexcept {
    task.note_running();
    task.pace.acquiring(mutex);
    if (Protocol::try_acquire(*mutex)) return true;
    // What is wrong with the other arguments is for the C library to say.
    constexpr int64_t kLastSecond = INT64_MAX / 1'000'000'000 - 1;
    if ((clock != CLOCK_MONOTONIC && clock != CLOCK_REALTIME) || until.tv_nsec < 0 ||
        until.tv_nsec >= 1'000'000'000 || until.tv_sec < 0)
        return false;
    const int64_t second = std::min<int64_t>(until.tv_sec, kLastSecond);
    const Deadline deadline = {.ns = second * 1'000'000'000 + until.tv_nsec, .clock = clock};
    return !deadline.passed() && Protocol::acquire_spinning(*mutex, spin_budget(deadline));
}

void fill(adaptive_pthread_status& status) noexcept {
    status = {};
    status.active = is_active();
    memcpy(status.why_not, reason, sizeof(reason));
    if (status.active && wiped.mirror == Choice::made && entered_task() != nullptr) {
        const MirrorInUse mirror = mirror_in_use();
        strcpy(status.source, mirror.source == Source::bpf    ? "bpf"
                              : mirror.source == Source::rseq ? "rseq"
                                                              : "off");
        if (reason[0] == 0) memcpy(status.why_not, mirror.why_not_bpf.text, sizeof(mirror.why_not_bpf.text));
    }
    const auto get = [](std::atomic<uint64_t>& counter) { return counter.load(std::memory_order_relaxed); };
    status.contended = get(counters.contended);
    status.spin_acquired = get(counters.spin_acquired);
    status.owner_off_cpu = get(counters.owner_off_cpu);
    status.budget_spent = get(counters.budget_spent);
    status.slept = get(counters.slept);
    status.wakeups_sent = get(counters.sent);
    status.wakeups_spared = get(counters.spared);
}

[[gnu::constructor]] void at_load() noexcept {
    loaded = true;
    (void)is_active();
    if (options.help) say("%s", kHelp);
}

[[gnu::destructor]] void at_exit() noexcept {
    if (!counting) return;
    adaptive_pthread_status s;
    fill(s);
    say("adaptive_pthread: %s[%d]: %s, source %s%s%s%s; contended %lu, spins: acquired %lu, owner off CPU "
        "%lu, "
        "budget spent %lu; slept %lu, wake-ups sent %lu, spared %lu\n",
        program_invocation_short_name, getpid(), s.active ? "active" : "inactive",
        s.source[0] != 0 ? s.source : "none", s.why_not[0] != 0 ? " (" : "", s.why_not,
        s.why_not[0] != 0 ? ")" : "", s.contended, s.spin_acquired, s.owner_off_cpu, s.budget_spent, s.slept,
        s.wakeups_sent, s.wakeups_spared);
}

}  // namespace
}  // namespace adaptive

// ---- what programs call ----

extern "C" {
#pragma GCC visibility push(default)

int pthread_mutex_lock(pthread_mutex_t* mutex) noexcept {
    using namespace adaptive;
    ThisTask* const task = taken_over(mutex);
    if (task == nullptr) [[unlikely]]
        return next_lock()(mutex);
    task->note_running();
    task->pace.acquiring(mutex);
    if (!Protocol::try_acquire(*mutex)) [[unlikely]]
        Protocol::acquire(*mutex, spin_budget(Deadline::never()));
    return held(mutex, *task);
}

int pthread_mutex_trylock(pthread_mutex_t* mutex) noexcept {
    using namespace adaptive;
    ThisTask* const task = taken_over(mutex);
    if (task == nullptr) [[unlikely]]
        return next_trylock()(mutex);
    task->note_running();
    return Protocol::try_acquire(*mutex) ? held(mutex, *task) : EBUSY;
}

int pthread_mutex_clocklock(pthread_mutex_t* mutex, clockid_t clock, const timespec* until) noexcept {
    using namespace adaptive;
    ThisTask* const task = taken_over(mutex);
    if (task == nullptr || !try_for_a_while(mutex, *task, clock, *until))
        return next_clocklock()(mutex, clock, until);
    return held(mutex, *task);
}

int pthread_mutex_timedlock(pthread_mutex_t* mutex, const timespec* until) noexcept {
    using namespace adaptive;
    ThisTask* const task = taken_over(mutex);
    if (task == nullptr || !try_for_a_while(mutex, *task, CLOCK_REALTIME, *until))
        return next_timedlock()(mutex, until);
    return held(mutex, *task);
}

int pthread_mutex_unlock(pthread_mutex_t* mutex) noexcept {
    using namespace adaptive;
    ThisTask* const task = taken_over(mutex);
    if (task == nullptr) [[unlikely]]
        return next_unlock()(mutex);
    std::atomic_ref<int>(mutex->__data.__owner).store(0, std::memory_order_relaxed);
    mutex->__data.__nusers--;
    Protocol::release(*mutex);
    task->pace.released(mutex);
    return 0;
}

void adaptive_pthread_get_status(adaptive_pthread_status* status) {
    adaptive::fill(*status);
}

#pragma GCC visibility pop
}
