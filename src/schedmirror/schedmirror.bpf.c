// SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause
/* Keeps the mirror true: writes, at every context switch, whether registered tasks are on a CPU.
 *
 * A task registers in its own task storage (`tasks`: slot and generation), so that the registration dies with the task
 * and a recycled task id can never be mistaken for it. It does so by running a program (set_registration), which knows
 * who calls: nobody registers another, or takes its registration away. Everything else that user space says here is
 * untrusted: a slot number is bounds-checked, slot 0 (the header) is refused, and of several tasks that name one slot
 * the newest generation wins. A note can only go to the words of its own slot, whatever it says.
 */
#include <linux/bpf.h>

#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>
#include <stdbool.h>

#include "mirror/sched_slot.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

/* The fields used of kernel types; relocated to the running kernel's layout when loaded. */
struct bpf_map;
struct bpf_local_storage;
struct sched_entity {
    __u64 exec_start; /* the scheduler's clock, when it last looked: at this very switch, on either side */
} __attribute__((preserve_access_index));
struct task_struct {
    int pid;
    struct sched_entity se;
    struct bpf_local_storage* bpf_storage;
} __attribute__((preserve_access_index));

#define EAGAIN 11
#define TASK_RUNNING 0
#define TASK_DEAD 0x80 /* stable since 4.14 */

struct {
    __uint(type, BPF_MAP_TYPE_ARRAY);
    __uint(map_flags, BPF_F_MMAPABLE);
    __uint(max_entries, 2); /* set when loaded */
    __type(key, __u32);
    __type(value, struct sched_slot);
} slots SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_ARRAY);
    __uint(map_flags, BPF_F_MMAPABLE);
    __uint(max_entries, 2); /* set when loaded */
    __type(key, __u32);
    __type(value, struct sched_claim);
} claims SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_ARRAY);
    __uint(map_flags, BPF_F_MMAPABLE);
    __uint(max_entries, 2); /* set when loaded */
    __type(key, __u32);
    __type(value, struct sched_notes);
} notes SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_TASK_STORAGE);
    __uint(map_flags, BPF_F_NO_PREALLOC);
    __type(key, int);
    __type(value, struct sched_registration);
} tasks SEC(".maps");

/* The registrations once more, by task id: the kernel's helper for task storage costs more than all else at a switch. Two tasks
 * may want one place. Whoever came second is found by its storage only. */
struct place {
    __u64 task; /* its address in the kernel; 0: free */
    struct sched_registration registration;
};
struct {
    __uint(type, BPF_MAP_TYPE_ARRAY);
    __uint(max_entries, 1); /* set when loaded, as the mask is */
    __type(key, __u32);
    __type(value, struct place);
} places SEC(".maps");
const volatile __u32 places_mask = 0;

static __always_inline bool is_active(void) {
    __u32 zero = 0;
    const struct sched_header* header = bpf_map_lookup_elem(&slots, &zero);
    return header && header->active;
}

static __always_inline struct place* place_of(struct task_struct* task) {
    __u32 number = (__u32)task->pid & places_mask;
    return bpf_map_lookup_elem(&places, &number);
}

static __always_inline struct sched_registration* registration_of(struct task_struct* task) {
    /* No storage of any kind, as nearly every task. */
    if (!task->bpf_storage) return 0;
    struct place* place = place_of(task);
    if (place && place->task == (__u64)task) return &place->registration;
    return bpf_task_storage_get(&tasks, task, 0, 0);
}

/* By the task itself. It may be switched at any time, on its own CPU: until it has the place its storage counts. */
static __always_inline void take_place(struct task_struct* me, __u64 registration) {
    struct place* place = place_of(me);
    if (!place) return;
    if (place->task != (__u64)me && __sync_val_compare_and_swap(&place->task, 0, (__u64)me) != 0) return;
    *(volatile __u64*)&place->registration = registration;
}
static __always_inline void leave_place(struct task_struct* me) {
    struct place* place = place_of(me);
    if (!place || place->task != (__u64)me) return;
    *(volatile __u64*)&place->registration = 0;
    __sync_lock_test_and_set(&place->task, 0);
}

static __always_inline __u32 number_of(const struct sched_registration* registration) {
    return registration->slot & ~SCHED_HAS_NOTES;
}

/* The slot that a registration still has a right to. */
static __always_inline struct sched_slot* slot_of(const struct sched_registration* registration) {
    __u32 number = number_of(registration);
    struct sched_slot* slot = number ? bpf_map_lookup_elem(&slots, &number) : 0;
    if (!slot) return 0;
    int newer = registration->generation - slot->generation; /* wraps */
    if (newer < 0) return 0;                                 /* died, or the slot was taken over */
    if (newer > 0) slot->generation = registration->generation;
    return slot;
}

/* What the task that leaves its CPU asked to have written. The task itself sees all of it before it runs again.
 * Masks keep each store inside the slot's words and aligned. */
static __noinline int write_notes(__u32 number) {
    struct sched_notes* its = bpf_map_lookup_elem(&notes, &number);
    if (!its) return 0;
    for (int i = 0; i < SCHED_NOTES; i++) {
        const __u64 value = *(volatile __u64*)&its->note[i].value;
        const __u32 offset = *(volatile __u8*)&its->note[i].offset;
        switch (*(volatile __u8*)&its->note[i].size) {
            case 1:
                *(volatile __u8*)(its->words + (offset & (SCHED_NOTE_BYTES - 1))) = value;
                break;
            case 2:
                *(volatile __u16*)(its->words + (offset & (SCHED_NOTE_BYTES - 2))) = value;
                break;
            case 4:
                *(volatile __u32*)(its->words + (offset & (SCHED_NOTE_BYTES - 4))) = value;
                break;
            case 8:
                *(volatile __u64*)(its->words + (offset & (SCHED_NOTE_BYTES - 8))) = value;
                break;
        }
    }
    return 0;
}

/* State before count: see Mirror::look_bpf. A reader may see these stores apart, and any mixture is only a
 * hint; no barrier is paid for. One task switches on one CPU at a time, under that CPU's run-queue lock, so a
 * slot has one writer. */
static __always_inline void record(struct task_struct* task, enum sched_state state, __u32 cpu) {
    struct sched_registration* registration = registration_of(task);
    struct sched_slot* slot = registration ? slot_of(registration) : 0;
    if (!slot) return;
    slot->cpu = cpu;
    slot->tid = task->pid;
    slot->last_switch_ns = task->se.exec_start; /* asking for the time would cost half of this program */
    *(volatile __u32*)&slot->state = state;
    *(volatile __u64*)&slot->switches = slot->switches + 1;
    if (state != SCHED_ON_CPU && registration->slot & SCHED_HAS_NOTES) write_notes(number_of(registration));
}

SEC("tp_btf/sched_switch")
int BPF_PROG(on_sched_switch, bool preempt, struct task_struct* prev, struct task_struct* next,
             unsigned int prev_state) {
    if (!prev->bpf_storage && !next->bpf_storage) return 0;
    if (!is_active()) return 0;

    __u32 cpu = bpf_get_smp_processor_id();
    record(prev,
           prev_state & TASK_DEAD                  ? SCHED_DEAD
           : preempt || prev_state == TASK_RUNNING ? SCHED_PREEMPTED
                                                   : SCHED_BLOCKED,
           cpu);
    record(next, SCHED_ON_CPU, cpu);
    return 0;
}

/* The slot of a task that dies, however it dies, comes back by itself. */
SEC("tp_btf/sched_process_exit")
int BPF_PROG(on_process_exit, struct task_struct* task) {
    if (!task->bpf_storage) return 0;
    leave_place(task);
    struct sched_registration* registration = bpf_task_storage_get(&tasks, task, 0, 0);
    struct sched_slot* slot = registration ? slot_of(registration) : 0;
    if (!slot || !is_active()) return 0;
    __u32 number = number_of(registration);
    struct sched_claim* claim = bpf_map_lookup_elem(&claims, &number);
    if (!claim || claim->generation != registration->generation) return 0;

    if (registration->slot & SCHED_HAS_NOTES) write_notes(number);
    /* From here on the switches of the dying task are out of date, see slot_of. */
    __u32 next = registration->generation + 1;
    slot->generation = next;
    *(volatile __u32*)&slot->state = SCHED_DEAD;
    *(volatile __u64*)&slot->switches = slot->switches + 1;
    /* Last, with a full barrier: tid = 0 and the new generation in one (little-endian) store. */
    __sync_lock_test_and_set((__u64*)claim, (__u64)next << 32);
    return 0;
}

/* Run by every task that takes part, for itself. The map of registrations is not pinned, so there is no other way to it,
 * nor one to freeze it. */
SEC("syscall")
int set_registration(struct sched_registration* wanted) {
    struct task_struct* me = bpf_get_current_task_btf();
    if (wanted->slot == 0) {
        leave_place(me);
        /* It counts no more from here on. The kernel refuses to free it while it is busy with another storage on this CPU:
         * then it goes with the task. */
        struct sched_registration* mine = bpf_task_storage_get(&tasks, me, 0, 0);
        if (mine) *(volatile __u64*)mine = 0;
        bpf_task_storage_delete(&tasks, me);
        return 0;
    }
    struct sched_registration* mine = bpf_task_storage_get(&tasks, me, 0, BPF_LOCAL_STORAGE_GET_F_CREATE);
    if (!mine) return EAGAIN; /* no memory, or busy as above */
    /* In one (little-endian) store. */
    const __u64 registration = (__u64)wanted->generation << 32 | wanted->slot;
    *(volatile __u64*)mine = registration;
    take_place(me, registration);
    return 0;
}

/* Run by `schedmirror unload`: tells every task that uses the mirror. Its switch count moves, so that it
 * looks, and the header says that nobody counts any more. Here because user space cannot write `slots`: the
 * array is frozen. */
static long deactivate_slot(struct bpf_map* map, __u32* number, void* element, void* unused) {
    if (*number == 0) {
        *(volatile __u32*)&((struct sched_header*)element)->active = 0;
    } else {
        struct sched_slot* slot = element;
        *(volatile __u32*)&slot->state = SCHED_UNKNOWN;
        *(volatile __u64*)&slot->switches = slot->switches + 1;
        write_notes(*number);
    }
    return 0;
}

SEC("syscall")
int deactivate(void* ctx) {
    bpf_for_each_map_elem(&slots, deactivate_slot, 0, 0);
    return 0;
}
