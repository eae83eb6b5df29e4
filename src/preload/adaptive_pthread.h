#pragma once
/*
 * libadaptive_pthread.so: the mutexes of a threaded program that knows nothing of this library spin on their owner.
 *
 *   LD_PRELOAD=/path/to/libadaptive_pthread.so [ADAPTIVE_PTHREAD=WORD,…] PROGRAM…
 *
 * The words (ADAPTIVE_PTHREAD=help prints them) say which source the mirror has, ask for statistics at the end, or
 * switch everything off.
 *
 * What is taken over: pthread_mutex_lock(), _trylock(), _timedlock(), _clocklock() and _unlock() of mutexes of the
 * kinds "normal" and "adaptive" that are private to the process, without a protocol and not robust, however they were
 * initialised and whenever: a mutex is recognised by its kind at every call. std::mutex and std::timed_mutex are such.
 * What is handed to the C library, call by call: every other kind (recursive, error-checking, robust, process-shared,
 * priority inheritance and protection, elided), the waiting of _timedlock() and _clocklock() once the spin has not
 * succeeded, and everything before the program's first thread is
 * started or the library's own constructor has run. What is not touched at all:
 * condition variables, read-write locks, C11's mtx_lock() and the C library's own locks.
 *
 * How this can be right: adaptive::Mutex keeps the owner's slot, the waiters and the spinner in a word of its own. A
 * pthread_mutex_t that held such a word would be destroyed by the first function of the C library that is not
 * interposed: pthread_cond_wait() unlocks and locks inside glibc, which calls itself directly, and so do mtx_lock(),
 * libraries opened with RTLD_DEEPBIND, and newer functions that nobody has heard of yet. So the mutex stays glibc's,
 * to the bit: its lock word, its protocol of sleeping and waking, its owner field (a thread id, which finds the
 * owner's slot in the mirror), its count of users. Spinning, and the knowledge of who spins, are kept outside of it
 * (pthread_protocol.h). Everything that is not interposed meets a mutex of its own kind; who gets it, this library or
 * glibc, may change from call to call; destroying, initialising anew, attributes, robust lists and cancellation need
 * no thought.
 *
 * Before it takes anything over the library tries out that the C library does keep to that protocol, and that the
 * functions behind its own are the C library's (a sanitizer, say, wants to see every call). If not, it is inactive, and
 * `stats` says why.
 *
 * fork, _Fork, clone: what is known of the parent's threads is wiped by the kernel in every child (MADV_WIPEONFORK);
 * the child's thread enters the mirror anew.
 *
 * Thread and process safety: as the C library's; calls before any constructor has run are served. Errors: the C
 * library's. Nothing allocates. pthread_mutex_lock() stays no cancellation point and keeps errno. Fairness: as the C
 * library's, none is promised; nobody sleeps beside a mutex that is released for more than 1 ms on end without a
 * wake-up.
 *
 * Limits: glibc 2.34 or later. Preload it; opened with dlopen() it does nothing. Every thread that takes a mutex makes
 * a few bpf(2) and pidfd_open(2) calls once: with a system call filter that kills for these use the source rseq. A
 * program that uses this library itself as well should leave bpf to one of the two.
 */

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct adaptive_pthread_status {
    int active;        /* 0: everything is handed to the C library */
    char why_not[256]; /* active: why the mirror has not the source that was wanted, or "" */
    char source[8];    /* bpf, rseq, off; "" before the first thread has entered */
    /* Counted while ADAPTIVE_PTHREAD has the word stats. */
    uint64_t contended;     /* acquires that found the mutex taken */
    uint64_t spin_acquired; /* spins by how they ended */
    uint64_t owner_off_cpu;
    uint64_t budget_spent;
    uint64_t slept;
    uint64_t wakeups_sent;
    uint64_t wakeups_spared;
};

/* For programs that look whether it is there (dlsym) and what it did. */
void adaptive_pthread_get_status(struct adaptive_pthread_status* status);

#ifdef __cplusplus
}
#endif
