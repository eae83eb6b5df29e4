/* The mirror's memory layout, shared by the kernel-side program (plain C) and everything in user space.
 *
 * Arrays indexed by slot number. Number 0 is nobody ("unknown").
 *   slots:  a cache line, written by the kernel, mapped read-only by its readers; element 0 is the header
 *   claims: a cache line, written by the task that owns the slot
 *   notes:  words of the task that owns the slot, and what the kernel writes into them when it leaves its CPU
 * All integers are in the machine's byte order; every field is read and written as one whole word.
 */
#pragma once

#include <linux/types.h>

#define SCHED_MIRROR_MAGIC 0x7363684dU /* "Mhcs" */
#define SCHED_MIRROR_VERSION 2U        /* of this layout, and of what is pinned */
#define SCHED_MIRROR_MAX_SLOTS 65535U  /* a slot number fits 16 bits */
#define SCHED_NEVER_SEEN (~0ULL)       /* claim.seen_switches: no switch count equals this one */

enum sched_state {
    SCHED_UNKNOWN = 0,
    SCHED_ON_CPU = 1,
    SCHED_PREEMPTED = 2, /* runnable, waiting for a CPU */
    SCHED_BLOCKED = 3,   /* asleep, waiting for something else */
    SCHED_DEAD = 4,
};

struct sched_slot {
    __u32 state;          /* enum sched_state */
    __u32 cpu;            /* of the last switch */
    __u32 tid;            /* in the initial pid namespace */
    __u32 generation;     /* of the registration that the other fields speak of */
    __u64 last_switch_ns; /* clock of that CPU's scheduler, near CLOCK_MONOTONIC */
    __u64 switches;       /* transitions recorded, in and out; never goes back */
    __u8 pad[32];
};

/* Which pid namespace a claim's thread id belongs to: elsewhere it says nothing of who lives. */
struct sched_whence {
    __u32 pid_namespace; /* its inode; 0: unknown */
    __u32 generation;    /* of the claim that this was said of, as one word with the inode */
};

struct sched_claim {
    __u32 tid;           /* 0: free. Claimed by compare-and-swap; in the claimant's pid namespace */
    __u32 generation;    /* + 1 at every claim and at every death: tells a slot's users in time apart */
    __u64 seen_switches; /* "I was running when my slot had this count of switches" */
    struct sched_whence whence;
    __u8 pad[40];
};

struct sched_header {
    __u32 magic;
    __u32 version;
    __u32 slots;  /* elements of each array, the header's included */
    __u32 active; /* 0 once unloaded; nothing changes afterwards */
    __u8 pad[48];
};

/* One of the stores that the kernel makes for a task that leaves its CPU. */
#define SCHED_NOTES 8U       /* at most so many a task */
#define SCHED_NOTE_BYTES 64U /* of words that they can go to */

struct sched_note {
    __u64 value;
    __u8 offset; /* of the word, a multiple of its size */
    __u8 size;   /* 1, 2, 4 or 8; anything else: no note */
    __u8 pad[6];
};

struct sched_notes {
    __u8 words[SCHED_NOTE_BYTES];
    struct sched_note note[SCHED_NOTES];
};

/* What a task's registration says, in the kernel's task storage and to the program that makes it. */
#define SCHED_HAS_NOTES 0x80000000U /* in slot, beside the number */

struct sched_registration {
    __u32 slot; /* 0: none */
    __u32 generation;
} __attribute__((aligned(8))); /* written as one word */
