#include "locks/contenders.h"

#include <absl/synchronization/mutex.h>
#include <nsync.h>
#include <oneapi/tbb/queuing_mutex.h>
#include <oneapi/tbb/spin_mutex.h>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <boost/interprocess/sync/interprocess_mutex.hpp>
#include <cstring>
#include <mutex>

#include "lock/mutex.h"
#include "lock/robust_mutex.h"
#include "locks/futex_mutex.h"
#include "locks/test_and_set.h"

namespace bench {
namespace {

using adaptive::MirrorChoice;
using adaptive::Sharing;

// ---- locks as std::lock_guard wants them ----

template <int type, int robustness, int sharing>
class Pthread {
  public:
    Pthread() {
        pthread_mutexattr_t attributes;
        pthread_mutexattr_init(&attributes);
        pthread_mutexattr_settype(&attributes, type);
        pthread_mutexattr_setrobust(&attributes, robustness);
        pthread_mutexattr_setpshared(&attributes, sharing);
        pthread_mutex_init(&mutex_, &attributes);
    }
    void lock() { pthread_mutex_lock(&mutex_); }
    void unlock() { pthread_mutex_unlock(&mutex_); }

  private:
    pthread_mutex_t mutex_;
};
template <int sharing>
using PthreadAdaptive = Pthread<PTHREAD_MUTEX_ADAPTIVE_NP, PTHREAD_MUTEX_STALLED, sharing>;
using PthreadRobust = Pthread<PTHREAD_MUTEX_NORMAL, PTHREAD_MUTEX_ROBUST, PTHREAD_PROCESS_SHARED>;

class Robust {
  public:
    void lock() { (void)mutex_.lock(); }
    void unlock() { mutex_.unlock(); }

  private:
    adaptive::RobustMutex mutex_;
};

class Absl {
  public:
    void lock() { mutex_.Lock(); }
    void unlock() { mutex_.Unlock(); }

  private:
    absl::Mutex mutex_;
};

class Nsync {
  public:
    Nsync() { nsync::nsync_mu_init(&mutex_); }
    void lock() { nsync::nsync_mu_lock(&mutex_); }
    void unlock() { nsync::nsync_mu_unlock(&mutex_); }

  private:
    nsync::nsync_mu mutex_;
};

// ---- uses ----

template <class Lock>
struct HoldingOf {
    using Type = std::lock_guard<Lock>;
};
template <>
struct HoldingOf<tbb::queuing_mutex> {
    using Type = tbb::queuing_mutex::scoped_lock;
};

template <class Lock>
constexpr Use use() {
    static_assert(sizeof(Lock) <= sizeof(Arena::lock));
    using Holding = typename HoldingOf<Lock>::Type;
    return {.construct = [](void* memory) { new (memory) Lock(); },
            .contend = contend<Lock, Holding>,
            .turns =
                [](void* memory, uint64_t count) {
                    Lock& lock = *std::launder(static_cast<Lock*>(memory));
                    for (uint64_t i = 0; i < count; i++) Holding holding(lock);
                }};
}
constexpr Use kNone = {};

// ---- mirrors ----

template <MirrorChoice::Wanted wanted>
bool choose(adaptive::Error* error) {
    // Shared by the tasks to come, which may be processes; the system takes it back with the last of them.
    static void* const table = [] {
        constexpr uint32_t kSlots = kMostTasks + 64;
        const auto cpus = static_cast<uint32_t>(sysconf(_SC_NPROCESSORS_CONF));
        void* memory = mmap(nullptr, adaptive::Mirror::rseq_bytes(kSlots, cpus), PROT_READ | PROT_WRITE,
                            MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) return static_cast<void*>(nullptr);
        adaptive::Mirror::rseq_format(memory, kSlots, cpus);
        return memory;
    }();
    return adaptive::use_mirror({.wanted = wanted, .rseq_table = table}, error);
}
constexpr auto kBpf = choose<MirrorChoice::Wanted::bpf>;
constexpr auto kRseq = choose<MirrorChoice::Wanted::rseq>;
constexpr auto kBest = choose<MirrorChoice::Wanted::best>;
constexpr auto kOff = choose<MirrorChoice::Wanted::off>;

constexpr Use kMutex = use<adaptive::Mutex>(), kInterprocessMutex = use<adaptive::InterprocessMutex>();

constexpr Contender kContenders[] = {
    {"adaptive_bpf", true, "adaptive::Mutex or InterprocessMutex, owners seen by the kernel", kMutex,
     kInterprocessMutex, kBpf},
    {"adaptive_rseq", true, "the same, owners inferred without privilege", kMutex, kInterprocessMutex, kRseq},
    {"adaptive_off", true, "the same, nothing known of owners: a blind budget of 20 us", kMutex,
     kInterprocessMutex, kOff},
    {"adaptive_robust", true, "adaptive::RobustMutex, with the best source there is", use<Robust>(),
     use<Robust>(), kBest},
    {"std_mutex", false, "std::mutex", use<std::mutex>(), kNone},
    {"pthread_adaptive", false, "PTHREAD_MUTEX_ADAPTIVE_NP", use<PthreadAdaptive<PTHREAD_PROCESS_PRIVATE>>(),
     use<PthreadAdaptive<PTHREAD_PROCESS_SHARED>>()},
    {"pthread_robust", false, "PTHREAD_MUTEX_ROBUST, process-shared", use<PthreadRobust>(),
     use<PthreadRobust>()},
    {"boost_ipc", false, "boost::interprocess::interprocess_mutex",
     use<boost::interprocess::interprocess_mutex>(), use<boost::interprocess::interprocess_mutex>()},
    {"absl", false, "absl::Mutex", use<Absl>(), kNone},
    {"tbb_spin", false, "tbb::spin_mutex", use<tbb::spin_mutex>(), use<tbb::spin_mutex>()},
    {"tbb_queuing", false, "tbb::queuing_mutex", use<tbb::queuing_mutex>(), kNone},
    {"nsync", false, "nsync_mu", use<Nsync>(), kNone},
    {"test_and_set", false, "a spinlock (bench/locks/test_and_set.h)", use<TestAndSet>(), use<TestAndSet>()},
    {"futex", false, "always sleeps (bench/locks/futex_mutex.h)",
     use<FutexMutex<0, Sharing::process_private>>(), use<FutexMutex<0, Sharing::process_shared>>()},
    {"spin_then_park", false, "100 blind spins, then sleeps (the same file)",
     use<FutexMutex<100, Sharing::process_private>>(), use<FutexMutex<100, Sharing::process_shared>>()},
};

}  // namespace

std::span<const Contender> contenders() {
    return kContenders;
}

const Contender* contender(const char* name) {
    for (const Contender& c : kContenders)
        if (strcmp(c.name, name) == 0) return &c;
    return nullptr;
}

}  // namespace bench
