// Deschedule notifications: words that the kernel writes when the calling task leaves its CPU.
//
// A task names up to 8 of its words, of 1, 2, 4 or 8 bytes, each with a value. Whenever it is descheduled
// (preempted or going to sleep; also when it dies, and when the mirror is unloaded) the kernel stores the
// values, before the task runs again and at no other time. What the task remembers of "where I run" can so be
// told from what it remembers from before: a pointer to this CPU's data that turns to null by itself.
//
//   uintptr_t cached = *word;                     // one load: still on the CPU that it belongs to
//   if (cached == 0) {
//       *word = kLooking;                         // lost at a deschedule from here on
//       cached = address of this CPU's data;
//       DescheduleNotes::replace(word, kLooking, cached);
//   }
//
// replace(), not a store: a store could come after the deschedule that made the value wrong.
//
// The words lie in 64 bytes that the mirror has for each slot (kernel memory: writing it at a context switch
// can neither fault nor sleep, and it never vanishes with its task). The kernel's stores are exact as far as
// it traces the switch, and stop when its program is taken away: like all of the mirror, a hint. What relies on
// it must stay correct, if perhaps slow, with a word that is wrong.
//
// Thread safety: one task's; only that task calls. The words may be read by anybody who maps the mirror.
// Process safety: after fork the child says reset_after_fork() and opens its own.
// Cost: a task with notes pays a few nanoseconds at each deschedule, the others nothing.
// Errors: false or null, and one line in Error.
// Source: Dmitry Vyukov's proposal to let rseq write {address, value, size} at a deschedule.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "mirror/mirror.h"

namespace adaptive {

class DescheduleNotes {
  public:
    static constexpr size_t kBytes = SCHED_NOTE_BYTES;  // of words
    static constexpr size_t kMost = SCHED_NOTES;        // notes at a time

    // dir: as for mirror.open_bpf(). task: attached to mirror; both outlive this. The words start as zeros.
    bool open(const char* dir, const Mirror& mirror, MirrorTask& task, Error* error) noexcept;
    void close() noexcept;
    void reset_after_fork() noexcept;  // forget: the words are the parent's

    // From now on `value` is stored in the word at `offset` (below kBytes, a multiple of its size) whenever
    // the task is descheduled. A second note for the same word replaces the first.
    template <typename Word>
    volatile Word* add(size_t offset, Word value, Error* error) noexcept {
        static_assert(std::is_integral_v<Word> && sizeof(Word) <= 8);
        return static_cast<volatile Word*>(add(offset, sizeof(Word), static_cast<uint64_t>(value), error));
    }
    // No longer; the word keeps what it holds.
    void remove(const volatile void* word) noexcept;

    // Stores `desired` if the word still holds `expected`, with no deschedule in between.
    template <typename Word>
    static bool replace(volatile Word* word, Word expected, Word desired) noexcept {
        return __atomic_compare_exchange_n(word, &expected, desired, false, __ATOMIC_RELAXED,
                                           __ATOMIC_RELAXED);
    }

    // Whether the kernel still writes, as far as can be told. False: unloaded, or the slot was taken over; the
    // words have been written a last time, and never will be again. To be asked after each replace().
    bool kept() const noexcept { return its_ != nullptr && task_->registered(); }

  private:
    volatile void* add(size_t offset, size_t size, uint64_t value, Error* error) noexcept;
    sched_note* note_at(size_t offset) const noexcept;

    sched_notes* notes_ = nullptr;  // of all slots
    sched_notes* its_ = nullptr;    // of this task
    uint32_t slots_ = 0;
    MirrorTask* task_ = nullptr;
};

}  // namespace adaptive
