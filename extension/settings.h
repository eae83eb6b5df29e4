#pragma once
/* The module's settings (GUCs) and the constants beside them. */

#include <algorithm>

#include "protocol/queue_protocol.h"

namespace adaptive::settings {

enum class SchedStateSource : int { automatic, bpf, rseq, off };

/// Registers the settings with the server. Call once, while shared_preload_libraries is processed.
void define();

// What the settings say; the variables are the server's to write.
extern int mode;         // a WaitPolicy
extern int max_spin;     // microseconds
extern int sched_state;  // a SchedStateSource

// Nothing is known of this owner: spin as briefly as a wake-up would take, whatever max_spin allows.
constexpr int kUnwatchedSpinMicroseconds = 20;
// A sleeper is passed over in favour of spinners for at most this long by one releaser, and for as long in favour of
// one that was woken and does not run.
constexpr int kSpareForMicroseconds = 1000;

inline WaitPolicy policy() {
    return static_cast<WaitPolicy>(mode);
}

inline SpinBudget spin_budget() {
    const uint64_t ticks = CycleClock::ticks_per_microsecond();
    return {.watched = max_spin * ticks, .unwatched = std::min(max_spin, kUnwatchedSpinMicroseconds) * ticks};
}

const char* mode_name();

}  // namespace adaptive::settings
