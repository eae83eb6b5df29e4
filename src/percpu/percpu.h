#pragma once
/*
 * Per-CPU critical sections: counters and lists of which every CPU has its own, changed without an atomic
 * instruction and without a lock.
 *
 * The problem: a thread that says "my CPU's counter += 1" may be preempted or moved between finding the
 * counter and storing it, and then overwrites what others did there. Atomic instructions cure that at some 20
 * cycles each, a lock at more. Restartable sequences cure it for nothing: the thread tells the kernel, by one
 * store, which instructions belong together. If it is interrupted within them (preempted, moved, a signal),
 * the kernel continues it at an abort handler instead, and it starts again. The last instruction of each
 * sequence, the commit, is the only one that others can see.
 *
 * PerCpu is a view of memory with one lane per CPU and one lane more, the common lane, for threads without
 * rseq (restartable() says no: glibc before 2.35 or its tunable off, an emulator, a CPU number beyond the
 * lanes). They use plain atomics there; no word is ever changed both ways. The truth is the sum of the lanes.
 *
 * Thread and signal safety: everything, from any thread and any signal handler; also one that interrupted the
 * same call. Nothing blocks. Process safety: the memory may be shared; lists then need it at the same address
 * in each process. A thread killed within a sequence leaves what was before it or after it, never less.
 * fork: the child may go on. A debugger that steps through a sequence makes it start again each time. Unloading a shared object that uses this is safe once no thread is in a call: no
 * descriptor of it stays registered.
 *
 * Units: lanes 0 .. cpus - 1 are CPUs as the kernel numbers them, lane cpus is the common one. Offsets in
 * bytes from a lane's start, multiples of 8.
 *
 * Errors: none. Source: rseq(2); the proposal of 2015, "restartable sequences: fast user-space percpu
 * critical sections".
 */

#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "base/rseq_area.h"

#if defined(__x86_64__)
#include "percpu/percpu_x86_64.h"
#elif defined(__aarch64__)
#include "percpu/percpu_aarch64.h"
#else
#error "percpu.h knows x86-64 and aarch64"
#endif

namespace adaptive {

/// An element of a list. Whoever has popped it owns it until it is pushed again.
struct PerCpuNode {
    PerCpuNode* next;
};

class PerCpu {
  public:
    /// A number of CPUs that no CPU's number reaches, as this system is configured.
    static uint32_t possible_cpus() noexcept { return static_cast<uint32_t>(sysconf(_SC_NPROCESSORS_CONF)); }

    /// lane_bytes: what each CPU has; a multiple of 64, so that no two CPUs share a cache line.
    static constexpr size_t bytes(size_t lane_bytes, uint32_t cpus) noexcept {
        return lane_bytes * (static_cast<size_t>(cpus) + 1);
    }

    /// memory: 64-byte aligned, zeroed by whoever made it (a zero is a counter at 0 and an empty list).
    PerCpu(void* memory, size_t lane_bytes, uint32_t cpus) noexcept
        : memory_(static_cast<char*>(memory)), lane_bytes_(lane_bytes), cpus_(cpus) {}

    /// Whether the calling thread uses restartable sequences; else the common lane.
    bool restartable() const noexcept { return here().area != nullptr; }

    uint32_t lanes() const noexcept { return cpus_ + 1; }

    /// The calling thread's lane; already a past fact when it returns.
    uint32_t lane() const noexcept { return here().lane; }

    /// What a lane's word holds just now; of any lane, from any thread.
    uint64_t read(uint32_t lane, size_t offset) const noexcept {
        return __atomic_load_n(word(lane, offset), __ATOMIC_RELAXED);
    }
    /// Of all lanes. Exact when nobody adds meanwhile; else some value between before and after, if all add.
    uint64_t sum(size_t offset) const noexcept {
        uint64_t sum = 0;
        for (uint32_t lane = 0; lane < lanes(); lane++) sum += read(lane, offset);
        return sum;
    }

    /// Adds to this CPU's word.
    void add(size_t offset, uint64_t delta) const noexcept {
        for (;;) {
            const Here at = here();
            if (at.area == nullptr) {
                __atomic_fetch_add(word(at.lane, offset), delta, __ATOMIC_RELAXED);
                return;
            }
            const RseqEnd end = rseq_add(at.area, at.lane, word(at.lane, offset), delta);
            at.leave();
            if (end == RseqEnd::done) return;
        }
    }

    /// Stores `desired` if the lane's word is `expected` and the thread is still on the lane's CPU. Moved or
    /// aborted: nothing was stored, look again, perhaps at another lane.
    RseqEnd compare_store(uint32_t lane, size_t offset, uint64_t expected, uint64_t desired) const noexcept {
        const Here at = here();
        if (at.lane != lane) return RseqEnd::moved;
        if (at.area == nullptr)
            return __atomic_compare_exchange_n(word(lane, offset), &expected, desired, false,
                                               __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)
                       ? RseqEnd::done
                       : RseqEnd::mismatch;
        const RseqEnd end = rseq_compare_store(at.area, lane, word(lane, offset), expected, desired);
        at.leave();
        return end;
    }

    /// Puts a node on this CPU's list.
    void push(size_t head, PerCpuNode* node) const noexcept {
        for (;;) {
            const Here at = here();
            if (at.area == nullptr) return push_common(list(at.lane, head), node, node);
            const RseqEnd end = rseq_push(at.area, at.lane, word(at.lane, head), node);
            at.leave();
            if (end == RseqEnd::done) return;
        }
    }

    /// The node that was last pushed on this CPU's list, else one of the common lane's. Null: both are empty,
    /// or another thread was popping from the common one just then; other CPUs may have some.
    PerCpuNode* pop(size_t head) const noexcept {
        for (;;) {
            const Here at = here();
            if (at.area == nullptr) return pop_common(head);
            void* node = nullptr;
            const RseqEnd end = rseq_pop(at.area, at.lane, word(at.lane, head), &node);
            at.leave();
            if (end == RseqEnd::done) return static_cast<PerCpuNode*>(node);
            if (end == RseqEnd::mismatch) return pop_common(head);
        }
    }

  private:
    struct Here {
        volatile RseqArea* area;  // null: without rseq, in the common lane
        uint32_t lane;

        /// Out of the sequence, however it ended: the kernel must not look for a descriptor that may be
        /// unmapped, and its next interruption is cheaper.
        void leave() const noexcept { area->rseq_cs = 0; }
    };

    Here here() const noexcept {
#ifndef __SANITIZE_THREAD__  // it does not see what the sequences order
        volatile RseqArea* area = rseq_area();
        if (area != nullptr) {
            const uint32_t cpu = area->cpu_id;
            if (cpu < cpus_) return {area, cpu};
        }
#endif
        return {nullptr, cpus_};
    }

    uint64_t* word(uint32_t lane, size_t offset) const noexcept {
        return reinterpret_cast<uint64_t*>(memory_ + lane * lane_bytes_ + offset);
    }
    PerCpuNode** list(uint32_t lane, size_t head) const noexcept {
        return reinterpret_cast<PerCpuNode**>(word(lane, head));
    }

    /// A chain. Release: pairs with the acquire of whoever takes it.
    static void push_common(PerCpuNode** head, PerCpuNode* first, PerCpuNode* last) noexcept {
        PerCpuNode* before = __atomic_load_n(head, __ATOMIC_RELAXED);
        do last->next = before;
        while (!__atomic_compare_exchange_n(head, &before, first, true, __ATOMIC_RELEASE, __ATOMIC_RELAXED));
    }

    /// Takes the whole list and puts back what is too much. (Taking one by compare-and-swap would mistake a
    /// node that was popped and pushed again meanwhile for one that never left.)
    PerCpuNode* pop_common(size_t head) const noexcept {
        PerCpuNode** common = list(cpus_, head);
        if (__atomic_load_n(common, __ATOMIC_RELAXED) == nullptr) return nullptr;
        PerCpuNode* first = __atomic_exchange_n(common, nullptr, __ATOMIC_ACQUIRE);
        if (first == nullptr || first->next == nullptr) return first;
        PerCpuNode* last = first->next;
        while (last->next != nullptr) last = last->next;
        push_common(common, first->next, last);
        return first;
    }

    char* memory_;
    size_t lane_bytes_;
    uint32_t cpus_;
};

}  // namespace adaptive
