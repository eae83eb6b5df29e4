#pragma once
/*
 * Sleeping on a 32-bit word in memory, and waking those who do: futex(2), with the deadlines of <chrono>.
 *
 * Thread and process safety: all of it. Sharing::process_shared finds sleepers of every process that maps the
 * word; process_private only those of this one, and is cheaper. errno is left as it was.
 * Units: nanoseconds of the clock that a Deadline names.
 */

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <climits>
#include <cstdint>
#include <ctime>

namespace adaptive {

enum class Sharing : uint8_t { process_private, process_shared };

/// A moment to give up at.
struct Deadline {
    static constexpr int64_t kNever = INT64_MAX;

    int64_t ns = kNever;
    clockid_t clock = CLOCK_MONOTONIC;

    static Deadline never() { return {}; }

    template <class Rep, class Period>
    static Deadline in(const std::chrono::duration<Rep, Period>& duration) {
        const int64_t ns = nanoseconds(duration), from = Deadline().now();
        return {.ns = ns < kNever - from ? from + ns : kNever};
    }

    /// The system clock's deadlines move when that clock is set.
    template <class Clock, class Duration>
    static Deadline at(const std::chrono::time_point<Clock, Duration>& when) {
        if constexpr (std::is_same_v<Clock, std::chrono::steady_clock>)
            return {.ns = nanoseconds(when.time_since_epoch())};
        else if constexpr (std::is_same_v<Clock, std::chrono::system_clock>)
            return {.ns = nanoseconds(when.time_since_epoch()), .clock = CLOCK_REALTIME};
        else
            return in(when - Clock::now());
    }

    bool is_never() const { return ns == kNever; }
    /// What is left until then; not above 0 when it has passed.
    int64_t left() const { return is_never() ? kNever : ns - now(); }
    bool passed() const { return left() <= 0; }
    int64_t now() const {
        timespec t;
        clock_gettime(clock, &t);
        return t.tv_sec * 1'000'000'000LL + t.tv_nsec;
    }

  private:
    /// Rounded up; a time too long to count is for ever, one before the clock began its beginning.
    template <class Rep, class Period>
    static int64_t nanoseconds(const std::chrono::duration<Rep, Period>& duration) {
        const double approximately = std::chrono::duration<double, std::nano>(duration).count();
        if (!(approximately < 9e18)) return kNever;
        if (approximately <= 0) return 0;
        return std::chrono::ceil<std::chrono::nanoseconds>(duration).count();
    }
};

enum class FutexWait : uint8_t {
    woken,
    changed,  ///< the word was not as expected: has not slept
    interrupted,
    timed_out,
};

/// Sleeps until woken, if the word is as expected. `kinds`: only a wake-up of one of these (bits) is meant.
inline FutexWait futex_wait(const void* word, uint32_t expected, Sharing sharing, const Deadline& deadline,
                            uint32_t kinds = FUTEX_BITSET_MATCH_ANY) {
    const int op = FUTEX_WAIT_BITSET | (sharing == Sharing::process_private ? FUTEX_PRIVATE_FLAG : 0) |
                   (deadline.clock == CLOCK_REALTIME ? FUTEX_CLOCK_REALTIME : 0);
    const timespec until = {.tv_sec = deadline.ns / 1'000'000'000, .tv_nsec = deadline.ns % 1'000'000'000};
    const int errno_before = errno;
    const long result =
        syscall(SYS_futex, word, op, expected, deadline.is_never() ? nullptr : &until, nullptr, kinds);
    const int problem = result == 0 ? 0 : errno;
    errno = errno_before;
    switch (problem) {
        case 0:
            return FutexWait::woken;
        case EAGAIN:
            return FutexWait::changed;
        case ETIMEDOUT:
            return FutexWait::timed_out;
        default:
            return FutexWait::interrupted;
    }
}

/// As futex_wait(), but not for longer than `longest_ns` before the caller looks again: interrupted, then.
inline FutexWait futex_wait_in_slices(const void* word, uint32_t expected, Sharing sharing,
                                      const Deadline& deadline, int64_t longest_ns,
                                      uint32_t kinds = FUTEX_BITSET_MATCH_ANY) {
    if (deadline.left() <= longest_ns) return futex_wait(word, expected, sharing, deadline, kinds);
    const Deadline slice = Deadline::in(std::chrono::nanoseconds(longest_ns));
    const FutexWait end = futex_wait(word, expected, sharing, slice, kinds);
    return end == FutexWait::timed_out ? FutexWait::interrupted : end;
}

/// Wakes up to `count` sleepers. The address is not read: the word may be gone already.
inline int futex_wake(const void* word, int count, Sharing sharing, uint32_t kinds = FUTEX_BITSET_MATCH_ANY) {
    const int op = FUTEX_WAKE_BITSET | (sharing == Sharing::process_private ? FUTEX_PRIVATE_FLAG : 0);
    const int errno_before = errno;
    const long woken = syscall(SYS_futex, word, op, count, nullptr, nullptr, kinds);
    errno = errno_before;
    return woken < 0 ? 0 : static_cast<int>(woken);
}

}  // namespace adaptive
