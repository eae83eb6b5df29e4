#pragma once
/*
 * RobustMutex: an InterprocessMutex whose holder may die.
 *
 * lock() then says owner_died to the next one, who holds it, puts right what it guards and says consistent().
 * Whoever unlocks without that gives the mutex up for ever: every lock() says not_recoverable from then on. As
 * POSIX's robust mutexes, EOWNERDEAD and ENOTRECOVERABLE.
 *
 * How the death is seen. The kernel itself frees what a dying task holds, and wakes a sleeper, before the
 * task's id can be used again: every holder is on the robust list of its thread, the one that the C library
 * registered for its own robust mutexes (get_robust_list(2)), and whoever is about to take or to give up a
 * mutex is noted there as well (list_op_pending). So there is no delay, nobody is asked whether he lives, and
 * no recycled id can be taken for the dead one. Spinners see the word change. This holds for a thread that
 * ends, a process that is killed or exits, and exec.
 *
 * For one list to serve both, this object looks like the C library's from the kernel's side: the word at the
 * start, the list's links where a pthread_mutex_t has them, 32 and 24 bytes behind. A C library with another
 * layout is recognized (not_supported).
 *
 * A race that every robust mutex has: a thread is killed in unlock(), after it gave the mutex up and before it took
 * its note back. The kernel then looks at that memory once more. If another thread has mapped something else there
 * meanwhile, with the dead thread's id in that place, the kernel marks it as a dead owner's. So keep the memory of a
 * RobustMutex mapped while threads that used it may be killed. Linux 7.2 closes the race for words of 32 bits:
 * FUTEX_ROBUST_UNLOCK, and a function of the vDSO for the uncontended case, set them to 0 and clear the note. Neither
 * is used here: this word has 64 bits, and its release may leave the spinner and the sleepers' bit in it.
 *
 * Not seen: a holder in another pid namespace whose id a dying task has there (the kernel compares ids), and a
 * thread made by clone() without the C library (not_supported).
 *
 * Thread and process safety: yes; in memory that processes share, at any address. unlock() and consistent() by
 * the thread that holds it only. After fork the child holds nothing of what its parent held.
 * Zeroed memory is an unlocked mutex; 40 bytes.
 * Errors: LockResult. Source: Documentation/locking/robust-futexes, robust-futex-ABI (Linux); Gleixner,
 * "futex: Add support for unlocking robust futexes" (Linux 7.2).
 */

#include <cstddef>

#include "protocol/mutex_protocol.h"

namespace adaptive {

class RobustMutex {
    using Protocol = MutexProtocol<FutexHost<Sharing::process_shared>>;

  public:
    constexpr RobustMutex() noexcept = default;
    RobustMutex(const RobustMutex&) = delete;
    RobustMutex& operator=(const RobustMutex&) = delete;

    [[nodiscard]] LockResult lock() noexcept { return lock_until(Deadline::never()); }

    [[nodiscard]] LockResult try_lock() noexcept {
        return enlisted([&] {
            this_task().note_running();
            return Protocol::try_acquire(word_);
        });
    }

    template <class Rep, class Period>
    [[nodiscard]] LockResult try_lock_for(const std::chrono::duration<Rep, Period>& duration) noexcept {
        return lock_until(Deadline::in(duration));
    }

    template <class Clock, class Duration>
    [[nodiscard]] LockResult try_lock_until(const std::chrono::time_point<Clock, Duration>& when) noexcept {
        return lock_until(Deadline::at(when));
    }

    [[nodiscard]] LockResult lock_until(const Deadline& deadline) noexcept {
        return enlisted([&] {
            ThisTask& task = this_task();
            task.note_running();
            task.pace.acquiring(&word_);
            return Protocol::acquire(word_, deadline);
        });
    }

    /// After owner_died: what is guarded is right again.
    void consistent() noexcept {
        std::atomic_ref<uint64_t>(word_).fetch_and(~mutex_word::kOwnerDied, std::memory_order_relaxed);
    }

    void unlock() noexcept {
        ThisTask& task = this_task();
        robust_list_head& list = *task.robust;
        set_pending(list, &links_.next);
        dequeue(list);
        if (std::atomic_ref<uint64_t>(word_).load(std::memory_order_relaxed) & mutex_word::kOwnerDied)
            Protocol::release_not_recoverable(word_);
        else
            Protocol::release(word_);
        // The memory may be gone by now: the kernel survives that, it reads the word as any user would.
        set_pending(list, nullptr);
        task.pace.released(&word_);
    }

  private:
    /// As the C library's: what points at an entry, from either side, points at its `next`.
    struct Links {
        robust_list* prev = nullptr;
        robust_list next = {nullptr};
    };

    /// The order in which a kernel that ends this thread finds these stores: as written.
    static void in_program_order() noexcept { std::atomic_signal_fence(std::memory_order_seq_cst); }

    static void set_pending(robust_list_head& list, robust_list* entry) noexcept {
        in_program_order();
        std::atomic_ref<robust_list*>(list.list_op_pending).store(entry, std::memory_order_relaxed);
        in_program_order();
    }

    /// Runs `acquire()` with this mutex noted as pending, and enlists it if it was taken.
    template <class Acquire>
    LockResult enlisted(Acquire&& acquire) noexcept {
        ThisTask& task = this_task();
        if (task.robust == nullptr && (task.robust = list_of_this_thread()) == nullptr) [[unlikely]]
            return LockResult::not_supported;
        robust_list_head& list = *task.robust;
        set_pending(list, &links_.next);
        const LockResult result = acquire();
        if (is_acquired(result)) enqueue(list);
        set_pending(list, nullptr);
        return result;
    }

    /// Null: none that this layout fits.
    [[gnu::cold]] static robust_list_head* list_of_this_thread() noexcept {
        robust_list_head* list = nullptr;
        size_t size = 0;
        const int errno_before = errno;
        const long result = syscall(SYS_get_robust_list, 0, &list, &size);
        errno = errno_before;
        constexpr long kOffset = -static_cast<long>(offsetof(RobustMutex, links_.next));
        if (result != 0 || list == nullptr || list->futex_offset != kOffset) return nullptr;
        return list;
    }

    static Links& links_of(robust_list* next) noexcept {
        return *reinterpret_cast<Links*>(reinterpret_cast<char*>(next) - offsetof(Links, next));
    }
    /// The lowest bit of a pointer marks an entry of the C library's for the kernel.
    static robust_list* unmarked(robust_list* entry) noexcept {
        return reinterpret_cast<robust_list*>(reinterpret_cast<uintptr_t>(entry) & ~uintptr_t{1});
    }

    void enqueue(robust_list_head& list) noexcept {
        robust_list* first = list.list.next;
        links_ = {.prev = &list.list, .next = {first}};
        set_prev(list, first, &links_.next);
        in_program_order();
        list.list.next = &links_.next;
    }

    void dequeue(robust_list_head& list) noexcept {
        unmarked(links_.prev)->next = links_.next.next;
        in_program_order();
        set_prev(list, links_.next.next, links_.prev);
        links_ = {};
    }

    /// The head of the list has none.
    static void set_prev(robust_list_head& list, robust_list* entry, robust_list* prev) noexcept {
        if (unmarked(entry) != &list.list) links_of(unmarked(entry)).prev = prev;
    }

    uint64_t word_ = 0;
    uint64_t unused_[2] = {};
    Links links_;
};

static_assert(sizeof(RobustMutex) == 40 && sizeof(void*) == 8);

}  // namespace adaptive
