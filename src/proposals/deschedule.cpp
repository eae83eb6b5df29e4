#include "proposals/deschedule.h"

#include <cstring>

#include "base/error.h"
#include "mirror/bpf_source.h"

namespace adaptive {
namespace {

// The kernel reads a note only on behalf of the task that writes it, on that task's CPU: program order is
// enough. Size 0 while the rest changes.
void set_size(sched_note& note, size_t size) noexcept {
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
    *static_cast<volatile uint8_t*>(&note.size) = static_cast<uint8_t>(size);
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
}

}  // namespace

bool DescheduleNotes::open(const char* dir, const Mirror& mirror, MirrorTask& task, Error* error) noexcept {
    if (its_ != nullptr) return fail(error, "the notes are open already");
    if (mirror.source() != Source::bpf || !task.registered())
        return fail(error, "deschedule notifications need a task that is registered with a bpf mirror");
    const uint32_t slots = mirror.capacity() + 1;
    sched_notes* notes = bpf::open_notes(dir, slots, mirror.id(), error);
    if (notes == nullptr) return false;
    memset(&notes[task.slot()], 0, sizeof(sched_notes));  // what the slot's last user left
    if (!task.set_notes(true, error)) {
        bpf::close_notes(notes, slots);
        return false;
    }
    notes_ = notes;
    its_ = &notes[task.slot()];
    slots_ = slots;
    task_ = &task;
    return true;
}

void DescheduleNotes::close() noexcept {
    // Whose registration is gone has no notes any more, and the slot may be another's.
    if (kept()) {
        task_->set_notes(false, nullptr);
        for (sched_note& note : its_->note) set_size(note, 0);
    }
    reset_after_fork();
}

void DescheduleNotes::reset_after_fork() noexcept {
    bpf::close_notes(notes_, slots_);
    *this = DescheduleNotes();
}

// The note for the word there; none: a free one, or null.
sched_note* DescheduleNotes::note_at(size_t offset) const noexcept {
    sched_note* free = nullptr;
    for (sched_note& note : its_->note) {
        if (note.size != 0 && note.offset == offset) return &note;
        if (note.size == 0 && free == nullptr) free = &note;
    }
    return free;
}

volatile void* DescheduleNotes::add(size_t offset, size_t size, uint64_t value, Error* error) noexcept {
    if (!kept()) {
        fail(error, "the notes are not open, or the mirror behind them is gone");
        return nullptr;
    }
    if (offset >= kBytes || offset % size != 0) {
        fail(error, "no word of %zu bytes at offset %zu: a multiple of its size below %zu", size, offset,
             kBytes);
        return nullptr;
    }
    sched_note* note = note_at(offset);
    if (note == nullptr) {
        fail(error, "all %zu notes of this task are taken", kMost);
        return nullptr;
    }
    set_size(*note, 0);
    note->value = value;
    note->offset = static_cast<uint8_t>(offset);
    set_size(*note, size);
    return its_->words + offset;
}

void DescheduleNotes::remove(const volatile void* word) noexcept {
    const auto offset = static_cast<size_t>(static_cast<const volatile uint8_t*>(word) - its_->words);
    sched_note* note = note_at(offset);
    if (note != nullptr) set_size(*note, 0);
}

}  // namespace adaptive
