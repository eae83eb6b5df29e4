#pragma once
/*
 * Counters of what happened on the slow path, per tranche, in shared memory.
 *
 * One table per CPU (percpu/percpu.h), so that backends on different CPUs do not fight over the lines they count
 * on, and no addition is atomic; the sum over the CPUs is the truth.
 */

#include "protocol/queue_protocol.h"
#include "server/server.h"

extern "C" {
#include "utils/timestamp.h"
}

namespace adaptive::stats {

/// Totals of one tranche, indexed by LockEvent.
constexpr int kEvents = static_cast<int>(LockEvent::spin_ticks) + 1;
struct Totals {
    uint64_t of[kEvents];
    uint64_t operator[](LockEvent e) const { return of[static_cast<int>(e)]; }
};

/// Tranches with a number from here on are counted together, in the last row.
constexpr int kTranches = 256;
constexpr int kOtherTranches = kTranches - 1;

size_t shmem_bytes();
void shmem_startup();

/// Adds n. Without shared memory (yet): no effect.
void count(uint16_t tranche, LockEvent event, uint64_t n);

Totals totals(int tranche);
void reset();
TimestampTz reset_time();  ///< when shared memory was set up, or the last reset

}  // namespace adaptive::stats
