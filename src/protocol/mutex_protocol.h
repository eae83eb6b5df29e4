#pragma once
/*
 * The protocol of the mutexes: spin on the owner, else sleep on a futex. One 64-bit word says everything:
 *
 *   bits  0 .. 29   the owner's thread id; 0: free; all ones: not recoverable
 *   bit  30         the owner has died (robust mutexes; written by the kernel, FUTEX_OWNER_DIED)
 *   bit  31         somebody may be asleep (FUTEX_WAITERS)
 *   bits 32 .. 47   the owner's slot in the mirror
 *   bits 48 .. 63   the spinner's slot, kUnnamed if it has none; 0: there is no spinner; kReserved: see 4.
 *
 * The lower half is laid out as the kernel wants it for robust futexes, and is what sleepers sleep on. Zero is
 * a free mutex.
 *
 * Problem
 * -------
 * As in queue_protocol.h, with less room: no list of waiters, as those of several processes could not reach each
 * other's nodes. The kernel's futex queue takes its place, so that who sleeps is known only as "somebody may".
 *
 * Algorithm
 * ---------
 * Acquire, in phases:
 * 1. attempt: take the mutex if it is free (and not reserved, see 4.).
 * 2. spin: unless somebody spins already who is not seen off its CPU, become *the* spinner and attempt as
 *    long as the owner is on a CPU and the budget lasts.
 * 3. settle, one step: leave the spinner's office, and take the mutex if it is free, else set `waiters`.
 * 4. sleep, if the lower half is still as it was left in 3. Whoever has slept knows no longer whether others
 *    sleep, and keeps `waiters` set from then on. Start again at 2. Whoever was woken and still waits after
 *    Host::starves()'s time reserves the mutex: a spinner of a kind that nobody overtakes, and that may sleep.
 *
 * Release, one step: free the mutex and
 * - if it is reserved, leave that so and wake who reserved it;
 * - if a spinner is there, and may be counted on: leave both as they are, wake nobody (spare the wake-up);
 * - if there are waiters, clear `waiters`, depose the spinner, and then wake one;
 * - else nothing more.
 *
 * Invariants
 * ----------
 * I1 (duty to wake). At any time when the mutex is free and somebody is asleep, one running party has the duty
 * to take it or to wake:
 * - a releaser that has cleared `waiters`, until it has woken one;
 * - the one woken, until it settles: it takes the mutex, with `waiters`, or sets `waiters` for the holder that
 *   it finds; also when it gives up because its time has passed;
 * - else `waiters` is set, and the spinner named in the word has it, until it settles: it takes the mutex and
 *   leaves `waiters` set, or finds a holder, who will find no spinner and `waiters` set. A deposed spinner has
 *   none. Likewise who has reserved it, until it takes it or gives up.
 *
 * I2 (a free mutex is not touched). What a release has to say is in the step that frees the mutex; from then on
 * its memory may be gone. The wake-up uses its address only.
 *
 * I3 (bounds). A spin ends with its budget. A task that releases again and again spares for at most
 * Host::spare_for_ticks() in a row, and never for a spinner that the mirror shows off its CPU; a deposed
 * spinner can be replaced. In Sharing::process_shared a task can be killed with the duty of I1: there no
 * sleep lasts longer than kBackstopNs before another look, and who finds the mutex free then takes it from
 * whom it was left to, so that a death costs the others no more than that.
 *
 * I4 (no starvation). Who is awake overtakes who sleeps, but for kStarvingNs only: then the mutex is reserved
 * for one of those who have waited so long, and the present holder is the last to overtake. Several of them
 * come one after the other; every release between wakes the one asleep for longest.
 *
 * Host says what the word, sleeping and the mirror are, so that tests can run this code in every interleaving.
 * All of it is static:
 * - Lock; word(Lock&): a handle with load, compare_exchange_weak and _strong of std::atomic<uint64_t>
 * - identity(): this task as an owner: bits 0 .. 47 of the word
 * - look(slot): the mirror's word on another task
 * - sleep(Lock&, lower half, deadline, Sleeper): a FutexWait; interrupted is any return without a wake-up
 * - wake(Lock&, how many, Sleeper): of that kind only
 * - starves(since): whether a wait that began then (CycleClock) has been long enough
 * - passed(deadline), budget(deadline): as a SpinBudget
 * - pace(Lock&), waited(Lock&, spun): what PaceLearner says, and is told; quick_pace(): where it has no say
 * - sparing_since(): see I3; spare_for_ticks()
 *
 * Thread and process safety: any number of tasks. Acquire and release order as std::mutex does.
 * Source: Linux mutex.c; futexes: Drepper, "Futexes are tricky"; robust: Documentation/locking/robust-futex-ABI.
 */

#include <linux/futex.h>

#include <atomic>
#include <bit>
#include <cstdint>

#include "lock/this_task.h"
#include "spin/spin_on_owner.h"

namespace adaptive {

enum class LockResult : uint8_t {
    acquired,
    owner_died,  ///< acquired, but the last owner died with it: what it guards may be half changed
    timed_out,   ///< not acquired; also of an attempt that found it taken
    not_recoverable,
    not_supported,
};

inline constexpr bool is_acquired(LockResult result) {
    return result == LockResult::acquired || result == LockResult::owner_died;
}

/// No sleeper of a process-shared lock sleeps longer than this before it looks whether its wake-up is lost.
inline constexpr int64_t kBackstopNs = 50'000'000;

/// And no waiter of any lock is overtaken for longer.
inline constexpr int64_t kStarvingNs = 50'000'000;

/// The kinds of sleepers, as bits for FUTEX_WAIT_BITSET.
enum class Sleeper : uint32_t { usual = 1, reserving = 2, any = 3 };

/// The word, see the file's head.
namespace mutex_word {
inline constexpr uint64_t kTid = FUTEX_TID_MASK;
inline constexpr uint64_t kOwnerDied = FUTEX_OWNER_DIED;
inline constexpr uint64_t kWaiters = FUTEX_WAITERS;
inline constexpr uint64_t kNotRecoverable = kTid;  // in place of an owner
inline constexpr uint64_t kSpinner = 0xffffULL << 48;
inline constexpr SlotId kUnnamed = 0xffff;  // in place of a spinner's slot
inline constexpr uint64_t kReserved = 0xfffeULL << 48;

inline bool is_free(uint64_t word) {
    return (word & kTid) == 0;
}
inline bool is_reserved(uint64_t word) {
    return (word & kSpinner) == kReserved;
}
inline SlotId owner_slot(uint64_t word) {
    return static_cast<SlotId>(word >> 32);
}
inline SlotId spinner_slot(uint64_t word) {
    return static_cast<SlotId>(word >> 48);
}
/// The half that futex(2) is told of.
inline uint32_t futex_half(uint64_t word) {
    return static_cast<uint32_t>(word);
}
static_assert(std::endian::native == std::endian::little, "the lower half is at the word's own address");
}  // namespace mutex_word

template <class Host>
class MutexProtocol {
    using Lock = typename Host::Lock;
    using Deadline = typename Host::Deadline;

  public:
    /// acquired, owner_died, timed_out or not_recoverable.
    static LockResult acquire(Lock& lock, const Deadline& deadline) {
        uint64_t seen = Host::word(lock).load(std::memory_order_relaxed);
        // Nobody there at all is a case of its own, for a step that need not wait for what is read.
        if (seen == 0 && Host::word(lock).compare_exchange_strong(
                             seen, Host::identity(), std::memory_order_acquire, std::memory_order_relaxed))
            [[likely]]
            return LockResult::acquired;
        if (take(lock, seen, 0, kNoOffice)) return taken(seen);
        return acquire_contended(lock, deadline);
    }

    /// As acquire() with a deadline that has passed, without waiting for anything.
    static LockResult try_acquire(Lock& lock) {
        uint64_t seen = 0;
        if (take(lock, seen, 0, kNoOffice)) return taken(seen);
        return (seen & mutex_word::kTid) == mutex_word::kNotRecoverable ? LockResult::not_recoverable
                                                                        : LockResult::timed_out;
    }

    /// Gives the mutex up, whoever took it.
    static void release(Lock& lock) {
        using namespace mutex_word;
        uint64_t seen = Host::word(lock).load(std::memory_order_relaxed);
        // Pairs with the acquire of whoever takes it next. Nobody there at all: as above. Nobody asleep: whoever
        // spins, or has reserved it, is awake.
        const auto leave = [&](uint64_t left) {
            return Host::word(lock).compare_exchange_strong(seen, left, std::memory_order_release,
                                                            std::memory_order_relaxed);
        };
        if (seen == Host::identity() ? leave(0) : (seen & kWaiters) == 0 && leave(seen & kSpinner)) return;
        release_contended(lock, seen);
    }

    /// Gives a mutex up for ever, and tells everybody.
    static void release_not_recoverable(Lock& lock) {
        auto&& word = Host::word(lock);
        uint64_t seen = word.load(std::memory_order_relaxed);
        while (!word.compare_exchange_weak(seen, mutex_word::kNotRecoverable, std::memory_order_release,
                                           std::memory_order_relaxed)) {
        }
        Host::wake(lock, INT_MAX, Sleeper::any);
    }

  private:
    static constexpr uint64_t kNoOffice = 0;
    static constexpr uint64_t kTaken = 0;

    /// `office`: the spinner bits this task has put into the word, which it takes out with its next step. If
    /// it was deposed they are another's, or none.
    static uint64_t without(uint64_t word, uint64_t office) {
        return (word & mutex_word::kSpinner) == office ? word & ~mutex_word::kSpinner : word;
    }

    /// Takes the mutex if `seen`, or what it has become since, shows it free and not left to another.
    static bool take(Lock& lock, uint64_t& seen, uint64_t waiters, uint64_t office) {
        using namespace mutex_word;
        while (is_free(seen) && (!is_reserved(seen) || office == kReserved)) {
            const uint64_t kept = without(seen, office) & (kWaiters | kOwnerDied | kSpinner);
            if (Host::word(lock).compare_exchange_weak(seen, kept | waiters | Host::identity(),
                                                       std::memory_order_acquire, std::memory_order_relaxed))
                return true;
        }
        return false;
    }

    static LockResult taken(uint64_t seen) {
        return (seen & mutex_word::kOwnerDied) ? LockResult::owner_died : LockResult::acquired;
    }

    [[gnu::noinline]] static LockResult acquire_contended(Lock& lock, const Deadline& deadline) {
        using namespace mutex_word;
        const uint64_t since = CycleClock::now();
        uint64_t waiters = 0;  // kWaiters: this task may have been woken, and others still sleep
        uint64_t office = kNoOffice, seen;
        bool spun = false;
        bool distrusts = false;  // has slept for as long as a sleep may last
        for (;;) {
            seen = Host::word(lock).load(std::memory_order_relaxed);
            const bool starves = waiters != 0 && Host::starves(since);
            if (office == kNoOffice) office = become_spinner(lock, seen, starves);
            spun = office != kNoOffice && spin(lock, seen, waiters, office, deadline);
            if (spun) break;

            const bool gives_up = Host::passed(deadline);
            const bool reserves = !gives_up && (office == kReserved || starves);
            const uint64_t left = settle(lock, seen, waiters, office, distrusts,
                                         (gives_up ? waiters : kWaiters) | (reserves ? kReserved : 0));
            if (left == kTaken) break;
            if ((left & kTid) == kNotRecoverable) return LockResult::not_recoverable;
            if (gives_up) return LockResult::timed_out;
            office = reserves ? kReserved : kNoOffice;

            // A wake-up that was meant for whoever reserved it may have come to us: the kernel, ending a
            // holder, does not choose.
            if (is_free(left) && !reserves) Host::wake(lock, 1, Sleeper::reserving);
            const FutexWait end =
                Host::sleep(lock, futex_half(left), deadline, reserves ? Sleeper::reserving : Sleeper::usual);
            if (end != FutexWait::changed) waiters = kWaiters;
            distrusts = end == FutexWait::interrupted;
        }
        Host::waited(lock, spun);
        return taken(seen);
    }

    /// Phase 3, on which I1 rests: out of office, and takes the mutex (kTaken, out of the state `seen`), or
    /// adds `bits` and returns what the word is now.
    static uint64_t settle(Lock& lock, uint64_t& seen, uint64_t waiters, uint64_t office, bool distrusts,
                           uint64_t bits) {
        using namespace mutex_word;
        seen = Host::word(lock).load(std::memory_order_relaxed);
        for (;;) {
            if (take(lock, seen, waiters, distrusts ? seen & kSpinner : office)) return kTaken;
            uint64_t left = without(seen, office);
            if ((bits & kReserved) != 0) left &= ~kSpinner;  // whoever spins: deposed
            left |= bits;
            if (left == seen || Host::word(lock).compare_exchange_weak(seen, left, std::memory_order_relaxed,
                                                                       std::memory_order_relaxed))
                return left;
        }
    }

    /// kNoOffice if somebody else is the spinner. One that the mirror shows off its CPU is replaced; who `starves`
    /// replaces any, and reserves the mutex.
    static uint64_t become_spinner(Lock& lock, uint64_t& seen, bool starves) {
        using namespace mutex_word;
        const SlotId slot = owner_slot(Host::identity());
        const bool has_name = slot != 0 && static_cast<uint64_t>(slot) << 48 < kReserved;
        const uint64_t office = starves ? kReserved : static_cast<uint64_t>(has_name ? slot : kUnnamed) << 48;
        do {
            if (is_reserved(seen)) return kNoOffice;
            if (!starves && (seen & kSpinner) != 0 && !is_off_cpu(Host::look(spinner_slot(seen))))
                return kNoOffice;
        } while (!Host::word(lock).compare_exchange_weak(
            seen, (seen & ~kSpinner) | office, std::memory_order_relaxed, std::memory_order_relaxed));
        return office;
    }

    /// True if the mutex was taken, out of the state `seen`.
    static bool spin(Lock& lock, uint64_t& seen, uint64_t waiters, uint64_t office,
                     const Deadline& deadline) {
        using namespace mutex_word;
        const auto look_again = [&] {
            seen = Host::word(lock).load(std::memory_order_relaxed);
            return take(lock, seen, waiters, office);
        };
        return spin_on_owner(
                   look_again, [&] { return owner_slot(seen); }, [](SlotId slot) { return Host::look(slot); },
                   Host::budget(deadline),
                   office == kReserved ? Host::quick_pace() : Host::pace(lock)) == SpinEnd::acquired;
    }

    [[gnu::noinline]] static void release_contended(Lock& lock, uint64_t seen) {
        using namespace mutex_word;
        for (;;) {
            const bool reserved = is_reserved(seen);
            const bool wakes = !reserved && (seen & kWaiters) != 0 && !may_spare_wakeup(seen);
            const uint64_t left = wakes ? 0 : seen & (kWaiters | kSpinner);
            if (Host::word(lock).compare_exchange_weak(seen, left, std::memory_order_release,
                                                       std::memory_order_relaxed)) {
                if (reserved) Host::wake(lock, 1, Sleeper::reserving);
                if (wakes) Host::wake(lock, 1, Sleeper::any);
                return;
            }
        }
    }

    /// I3: may the spinner be left to take the mutex, with the sleepers left asleep?
    static bool may_spare_wakeup(uint64_t seen) {
        using namespace mutex_word;
        uint64_t& since = Host::sparing_since();
        if ((seen & kSpinner) != 0) {
            const uint64_t now = CycleClock::now();
            if (since == 0) since = now;
            if (now - since < Host::spare_for_ticks() && !is_off_cpu(Host::look(spinner_slot(seen))))
                return true;
        }
        since = 0;
        return false;
    }
};

/// What every Host of this thread says of its patience.
struct ThisTaskHost {
    static bool starves(uint64_t since) {
        return CycleClock::now() - since > SpinPace::from_nanoseconds(kStarvingNs);
    }
    static uint64_t& sparing_since() { return this_task().sparing_since; }
    static uint64_t spare_for_ticks() { return SpinPace::from_nanoseconds(1'000'000); }
};

/// The Host that programs use: this thread, this process's mirror, futex(2).
template <Sharing sharing>
struct FutexHost : ThisTaskHost {
    using Lock = uint64_t;
    using Deadline = adaptive::Deadline;

    template <class Word>
    static std::atomic_ref<Word> word(Word& word) {
        return std::atomic_ref<Word>(word);
    }
    static uint64_t identity() { return this_task().identity(sharing); }
    static SchedState look(SlotId slot) { return this_task().look(slot, sharing); }

    template <class Word>
    static FutexWait sleep(Word& word, uint32_t expected, const Deadline& deadline, Sleeper kind) {
        const auto kinds = static_cast<uint32_t>(kind);
        const FutexWait end =
            sharing == Sharing::process_shared
                ? futex_wait_in_slices(&word, expected, sharing, deadline, kBackstopNs, kinds)
                : futex_wait(&word, expected, sharing, deadline, kinds);
        this_task().note_slept();
        return end;
    }
    template <class Word>
    static void wake(Word& word, int count, Sleeper kind) {
        futex_wake(&word, count, sharing, static_cast<uint32_t>(kind));
    }

    static bool passed(const Deadline& deadline) { return deadline.passed(); }
    static SpinBudget budget(const Deadline& deadline) { return spin_budget(deadline); }
    static SpinPace pace(uint64_t& lock) { return this_task().pace.pace(&lock); }
    static SpinPace quick_pace() { return SpinPace::quick(); }
    static void waited(uint64_t& lock, bool spun) { this_task().pace.waited(&lock, spun); }
};

}  // namespace adaptive
