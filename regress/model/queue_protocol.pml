/*
 * Model of src/protocol/queue_protocol.h for the spin model checker; regress/model/check runs it.
 *
 * Tasks take and release one lock as often as they like, and may stop coming whenever they are outside. The checker
 * visits every interleaving of their steps and shows
 *   exclusion         a writer is alone: the assertion in attempt().
 *   no lost wake-up   the only state without a next step is the one where every task has stopped (spin: no invalid end
 *                     state). Were somebody asleep with nobody to wake him, the others could stop and leave him there.
 *   progress          no endless run in which, from some step on, no acquire and no wait ends (spin: no non-progress
 *                     cycle). With the above: once the others stop coming, every acquire ends.
 *   I2                nobody is queued twice. When all have stopped the state word is clean, and the semaphores balanced.
 *   I3                a release that frees the lock has taken every bystander off the list when it returns.
 *   I6                with VANISH: all of this although a task leaves in the middle of an acquire.
 *   I7                wait_until() returns true only if there was a free moment since its call, and does not queue again
 *                     when there was one while it was queued.
 *
 * Steps and functions
 * -------------------
 * An inline here is the function of the same name there, and a step is one atomic operation on the state word, a wait
 * state or a semaphore. Only these are drawn together into one step:
 *   - A compare-exchange loop: only its last round has an effect. And with it whatever only looks: an attempt that
 *     finds the lock taken, the looks in become_spinner(), the spinner's looks at the lock and its owner.
 *   - lock_list() and the look at free_since and at the hold that follows: nobody without the list lock can tell.
 *   - unlock_list() and what was done with the list locked. That touches the list, the wait modes, and the wait states
 *     waiting and removed, which nobody else reads or writes without the list lock; only absorb_wakeup() reads a wait
 *     state without it, and asks for not_waiting alone.
 *   - Erasing a waiter from the waker's own list, and making it not_waiting, which publishes that.
 * Chosen freely whenever they are asked for: the policy, the mirror's answers, the time that I4 lets a releaser spare,
 * whether a wake-up is late, and the spinner's budget, which need only end. wake_all() wakes in any order, that of the
 * list among them.
 * All operations on the state word are sequentially consistent there; here every step is.
 *
 * Options (-D)
 *   TASKS=n        3 unless said otherwise, at most 4 (and then WRITERS_ONLY: see SHARED)
 *   WRITERS_ONLY   no shared holds
 *   BYSTANDERS     tasks also acquire_or_wait()
 *   WATCHERS       tasks also wait_until() the lock is free
 *   VANISH         the last task may leave at any step of an acquire that waits, and abandon() what it left behind
 *   VARIABLE       another cast: task 0 acquires, may update() a variable and then need not release; the others
 *                  wait_until() it has changed
 *   FOREIGN_POST   somebody posts on task 0's semaphore, once, at any time, for reasons of his own
 *   MUTATE_…       breaks a rule of the protocol; the checker must find out
 */

#ifndef TASKS
#define TASKS 3
#endif

/* ---- the lock ---- */

#define HAS_WAITERS 1
#define RELEASE_OK 2
#define LIST_LOCKED 4
#define SPINNER 8
#define UNTIL_FREE 16
#define EXCLUSIVE 32
#define SHARED 64 /* 128, 192: two, three holds */
#define HELD_MASK (EXCLUSIVE | 192)
#define FREE_SINCE 256

#define NOBODY 7

short state = RELEASE_OK;
byte list[TASKS] = NOBODY; /* the wait list, from its head */
byte listed;               /* its length */

/* ---- the waiters ---- */

mtype = { exclusive, shared, until_free, freed, not_waiting, waiting, removed };

mtype wait_state[TASKS] = not_waiting;
mtype wait_mode[TASKS] = exclusive; /* of those in the list; freed: told so when it was taken off (I7) */
byte semaphore[TASKS];

bit variable; /* guarded by the lock, watched by wait_until() */

/* ---- for the properties only ---- */

byte writers, readers;
byte owed[TASKS]; /* by each releaser, as a set: the bystanders that its release has to wake */
byte stopped;     /* how many tasks do not come again */
bit waits[TASKS], was_free_in_call[TASKS], was_free_while_queued[TASKS]; /* in wait_until() */
bit vanishing, vanished;

hidden byte i, j, w; /* used within one step */

#define me _pid
#define set_of(task) (1 << (task))
#define hold_of(mode) (mode == exclusive -> EXCLUSIVE : SHARED)
#define is_free_for(mode) ((state & (mode == exclusive -> HELD_MASK : EXCLUSIVE)) == 0)
#define held_exclusively ((state & EXCLUSIVE) != 0)

/* ---- the wait list (I2) ---- */

/* While until_free waiters are listed. */
inline look_for_free_moment()
{
#ifndef MUTATE_FREE_MOMENT_ASSUMED
    was_free = (state & UNTIL_FREE) && ((state & FREE_SINCE) || !held_exclusively);
#else
    was_free = (state & UNTIL_FREE);
#endif
    saw_free_since = (state & FREE_SINCE) != 0
}

inline lock_list()
{
    d_step {
        !(state & LIST_LOCKED) -> state = state | LIST_LOCKED;
        has_list = true;
        look_for_free_moment()
    }
}

inline unlock_list(set, clear)
{
    state = (state | (set)) & ~((clear) | LIST_LOCKED | HAS_WAITERS | UNTIL_FREE);
    if
    :: listed == 0
    :: else ->
        state = state | HAS_WAITERS | (wait_mode[list[0]] == until_free -> UNTIL_FREE : 0)
    fi;
    state = state & ~((state & UNTIL_FREE) -> 0 : FREE_SINCE);
    has_list = false;
    was_free = false;
    saw_free_since = false
}

inline push_tail(task)
{
    list[listed] = task;
    listed++
}

inline push_head(task)
{
    for (i : 1 .. listed) {
        list[listed + 1 - i] = list[listed - i]
    }
    list[0] = task;
    listed++
}

inline erase(task)
{
    i = 0;
    do
    :: list[i] == task -> break
    :: else -> i++
    od;
    listed--;
    for (i : i .. listed - 1) {
        list[i] = list[i + 1]
    }
    list[listed] = NOBODY;
    wait_mode[task] = exclusive; /* nobody asks any more: fewer states */
    for (i : 0 .. TASKS - 1) {
        owed[i] = owed[i] & ~set_of(task)
    }
}

inline queue_self(as, in_front)
{
    lock_list();
    d_step {
        assert(wait_state[me] == not_waiting);
        saw_free_since = saw_free_since && as == until_free;
        if
        :: saw_free_since -> take_until_free()
        :: else
        fi;
        wait_mode[me] = as;
        wait_state[me] = waiting;
        if
        :: as == until_free -> push_head(me)
#ifndef MUTATE_IN_FRONT_OF_BYSTANDERS
        :: as != until_free && in_front && held_exclusively && (listed == 0 || wait_mode[list[0]] != until_free) ->
            push_head(me)
        :: as != until_free && in_front -> push_tail(me) /* policy park */
#else
        :: as != until_free && in_front -> push_head(me)
#endif
        :: else -> push_tail(me)
        fi;
        unlock_list(0, (saw_free_since -> FREE_SINCE : 0))
    }
#if defined(BYSTANDERS) || defined(WATCHERS) || defined(VARIABLE)
    wake_all()
#endif
}

inline dequeue_self()
{
    lock_list();
    d_step {
        still_queued = (wait_state[me] == waiting);
        if
        :: still_queued -> erase(me); wait_state[me] = not_waiting
        :: else
        fi;
        unlock_list(0, 0)
    }
    if
    :: still_queued -> still_queued = false
    :: else ->
#ifndef MUTATE_DUTY_NOT_GIVEN_BACK
        state = state | RELEASE_OK;
#endif
#ifndef MUTATE_WAKEUP_NOT_ABSORBED
        absorb_wakeup()
#endif
    fi
}

inline move_to_woken(task)
{
    erase(task);
    wait_state[task] = removed;
    woken = woken | set_of(task)
}

inline take_until_free()
{
    do
    :: listed > 0 && wait_mode[list[0]] == until_free ->
        w = list[0];
        move_to_woken(w);
        wait_mode[w] = (was_free && waits[w] -> freed : exclusive) /* the others do not ask */
    :: else -> break
    od
}

inline take_freed()
{
    if
#ifndef MUTATE_WOKEN_IN_VAIN
    :: was_free -> take_until_free()
#else
    :: true -> take_until_free()
#endif
    :: else
    fi
}

inline wake(task)
{
    wait_state[task] = not_waiting;
    d_step { woken = woken & ~set_of(task); semaphore[task]++ }
}

inline wake_all()
{
    do
    :: woken & set_of(0) -> wake(0)
    :: woken & set_of(1) -> wake(1)
#if TASKS > 2
    :: woken & set_of(2) -> wake(2)
#endif
#if TASKS > 3
    :: woken & set_of(3) -> wake(3)
#endif
    :: woken == 0 -> break
    od
}

/* ---- sleeping ---- */

inline absorb_wakeup()
{
    do
    :: d_step { semaphore[me] > 0 -> semaphore[me]-- }
        if
        :: wait_state[me] == not_waiting -> break
#ifndef MUTATE_EXCESS_GIVEN_BACK_AT_ONCE
        :: else -> taken_in_excess++
#else
        :: else -> semaphore[me]++
#endif
        fi
    od;
    do
    :: taken_in_excess > 0 -> d_step { semaphore[me]++; taken_in_excess-- }
    :: taken_in_excess == 0 -> break
    od
}

inline sleep_until_woken()
{
    absorb_wakeup()
}

/* ---- the releaser ---- */

inline wake_waiters()
{
    lock_list();
    d_step {
        take_freed();
        woke_locker = false;
        j = 0;
        do
        :: j == listed -> break
        :: j < listed && (wait_mode[list[j]] == until_free || (woke_locker && wait_mode[list[j]] == exclusive)) -> j++
        :: else ->
            w = list[j];
            woke_locker = true;
            if
            :: wait_mode[w] == exclusive -> move_to_woken(w); break
            :: else -> move_to_woken(w)
            fi
        od;
        if
        :: woke_locker -> unlock_list(0, RELEASE_OK)
        :: else -> unlock_list(RELEASE_OK, 0)
        fi
    }
    wake_all()
}

inline update(value)
{
    lock_list();
    d_step { variable = value; look_for_free_moment() }
    d_step {
        take_until_free();
        unlock_list(0, 0)
    }
    wake_all()
}

inline wake_until_free()
{
    lock_list();
    d_step {
        take_freed();
        unlock_list(0, 0)
    }
    wake_all()
}

/* Whether the mirror and I4 allow it is left open. */
#ifndef MUTATE_SPARE_WITHOUT_SPINNER
#define may_spare_wakeup (left & SPINNER)
#else
#define may_spare_wakeup true
#endif

inline after_release()
{
    if
    :: true -> wake_waiters() /* RELEASE_OK, or late */
    :: !(left & RELEASE_OK) || may_spare_wakeup ->
        if
#ifndef MUTATE_BYSTANDERS_SPARED
        :: left & UNTIL_FREE -> wake_until_free()
#else
        :: (left & UNTIL_FREE) && !(left & SPINNER) -> wake_until_free()
#endif
        :: else
        fi
    fi
}

inline release()
{
    d_step {
        state = state - hold_of(mode);
        left = state & ~LIST_LOCKED; /* that one nobody asks for */
        writers = writers - (mode == exclusive -> 1 : 0);
        readers = readers - (mode == shared -> 1 : 0);
        for (i : 1 .. listed) {
            w = list[i - 1];
            if
            :: !(left & HELD_MASK) && wait_mode[w] == until_free -> owed[me] = owed[me] | set_of(w)
            :: else
            fi
        }
        for (i : 0 .. TASKS - 1) {
            was_free_in_call[i] = was_free_in_call[i] || waits[i]
        }
        for (i : 1 .. listed) {
            w = list[i - 1];
            was_free_while_queued[w] = waits[w]
        }
    }
    if
    :: (left & (HELD_MASK | HAS_WAITERS)) == HAS_WAITERS -> after_release()
    :: else
    fi;
    left = 0;
    assert(owed[me] == 0)
}

/* ---- acquiring ---- */

/* `got` says whether. */
inline attempt(clear)
{
#ifdef MUTATE_ATTEMPT_IN_TWO_STEPS
    got = is_free_for(mode);
#endif
    d_step {
#ifndef MUTATE_ATTEMPT_IN_TWO_STEPS
        got = is_free_for(mode);
#endif
        if
        :: got ->
            state = (state + hold_of(mode)) & ~(clear);
#ifndef MUTATE_FREE_MOMENT_NOT_NOTED
            state = state | (mode == exclusive && (state & UNTIL_FREE) -> FREE_SINCE : 0);
#endif
            writers = writers + (mode == exclusive -> 1 : 0);
            readers = readers + (mode == shared -> 1 : 0);
            assert(writers + (readers > 0) <= 1)
        :: else
        fi
    }
}

inline become_spinner()
{
    state = state | SPINNER /* if it was set, the mirror has shown that spinner off its CPU */
}

/* `got` is false on entry. */
inline spin()
{
    if
    :: mode == exclusive -> become_spinner();
        if
        :: atomic { is_free_for(mode) -> attempt(SPINNER) }
#ifndef MUTATE_SPINNER_CLEARED_LATE
        :: state = state & ~SPINNER /* the owner is off its CPU, or the budget is spent */
#else
        :: cleared_late = true
#endif
        fi
    :: atomic { mode == shared && is_free_for(mode) -> attempt(0) } /* a reader spins without the bit */
    :: true /* the policy is to park, somebody else spins, or a reader's spin got nowhere */
    fi
}

inline acquire_contended()
{
    do
    :: spin();
        if
        :: got -> break
        :: else
        fi;
        queue_self(mode, woken_in_vain);
#ifndef MUTATE_NO_LAST_ATTEMPT
        attempt(0);
#endif
#ifdef MUTATE_SPINNER_CLEARED_LATE
        if
        :: cleared_late -> d_step { state = state & ~SPINNER; cleared_late = false }
        :: else
        fi;
#endif
        if
        :: got -> dequeue_self(); break
        :: else
        fi;
        sleep_until_woken();
#ifndef MUTATE_NO_RELEASE_OK
        state = state | RELEASE_OK;
#endif
        attempt(0);
        if
        :: got -> break
        :: else -> woken_in_vain = true
        fi
    od;
    woken_in_vain = false
}

inline acquire()
{
    attempt(0);
    if
    :: got
    :: else -> { acquire_contended() } unless { vanish() }
    fi
}

inline acquire_or_wait()
{
    attempt(0);
    if
    :: got
    :: else ->
        {
            queue_self(until_free, false);
            attempt(0);
            if
            :: got -> dequeue_self()
            :: else -> sleep_until_woken(); wait_mode[me] = exclusive
            fi
        } unless { vanish() }
    fi
}

/* Until freed, or `settled`. */
inline wait_until(settled)
{
    d_step { waits[me] = true; was_free_in_call[me] = !held_exclusively }
    {
        do
        :: !held_exclusively -> was_free_in_call[me] = true; break
        :: else ->
            got = (settled);
            if
            :: got -> break
            :: else
            fi;
            assert(!was_free_while_queued[me]);
            queue_self(until_free, false);
#ifndef MUTATE_NO_SECOND_LOOK
            got = !held_exclusively;
            if
            :: got
            :: else -> got = (settled)
            fi;
#endif
            if
            :: got -> dequeue_self(); wait_mode[me] = exclusive; break
            :: else
            fi;
            sleep_until_woken();
            if
            :: wait_mode[me] == freed -> wait_mode[me] = exclusive; assert(was_free_in_call[me]); break
            :: else
            fi
        od
    } unless { vanish() };
    atomic { waits[me] = false; was_free_in_call[me] = false; was_free_while_queued[me] = false; got = false }
}

/* ---- leaving ---- */

/* An exit in a signal handler. The server loses who leaves with the list locked, with others to wake, or with the lock. */
inline vanish()
{
    d_step { vanishing && me == TASKS - 1 && !has_list && !got && woken == 0 -> vanishing = false; vanished = true }
    abandon();
    atomic { waits[me] = false; was_free_in_call[me] = false; was_free_while_queued[me] = false }
    goto gone
}

inline abandon()
{
#ifndef MUTATE_LEAVER_STAYS_QUEUED
    if
    :: wait_state[me] != not_waiting -> dequeue_self()
    :: else
    fi;
#endif
#ifndef MUTATE_LEAVER_TAKES_ITS_DUTY_ALONG
    state = state | RELEASE_OK;
#endif
    atomic { state = state & ~SPINNER; left = state & ~LIST_LOCKED }
    if
#ifndef MUTATE_LEAVER_DOES_NOT_WAKE
    :: (left & (HELD_MASK | HAS_WAITERS)) == HAS_WAITERS -> after_release()
#endif
    :: else
    fi
}

/* ---- the tasks ---- */

active [TASKS] proctype task()
{
    mtype mode = exclusive;
    bool got, still_queued, woke_locker, woken_in_vain, cleared_late;
    bool has_list;                 /* it has the list locked, and then: */
    bool was_free, saw_free_since; /* what look_for_free_moment() has seen */
    short left;           /* release(): the state word after it */
    byte woken;           /* taken off the list, to be woken: a set */
    byte taken_in_excess; /* posts that were not the waker's */

#ifndef VARIABLE
    do
    :: if
        :: mode = exclusive
#ifndef WRITERS_ONLY
        :: mode = shared
#endif
        fi;
        if
        :: acquire()
#ifdef BYSTANDERS
        :: acquire_or_wait()
#endif
#ifdef WATCHERS
        :: mode == exclusive -> wait_until(false)
#endif
        fi;
progress:
        if
        :: got -> got = false; release()
        :: else
        fi;
        mode = exclusive
    :: break
    od;
#else
    if
    :: me == 0 ->
        acquire();
        if
        :: update(1);
            if
            :: release()
            :: true
            fi
        :: release()
        fi
    :: else -> wait_until(variable == 1)
    fi;
#endif
gone:
    stopped++
}

#ifdef FOREIGN_POST
bit foreign_post;
active proctype foreigner() { d_step { semaphore[0]++; foreign_post = 1 } }
#else
#define foreign_post 0
#endif

#ifdef VANISH
active proctype signaller() { vanishing = true }
#endif

active proctype aftermath()
{
    stopped == TASKS;
#ifndef VARIABLE
    assert(state == RELEASE_OK);
#endif
    assert(listed == 0);
    d_step {
        for (i : 0 .. TASKS - 1) {
            assert(semaphore[i] == (i == 0 -> foreign_post : 0) || (vanished && i == TASKS - 1))
        }
    }
}
