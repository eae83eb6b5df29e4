// Source `bpf`: reaching what `schedmirror load` pinned, and registering with the kernel, by raw bpf(2)
// calls. No libbpf: this runs inside other people's processes. Needs no privilege beyond access to the pinned
// files.
//
// Thread safety: every function, from any thread. Errors: one line in Error, see mirror.h.
#pragma once

#include <cstddef>

#include "mirror/mirror.h"

namespace adaptive::bpf {

// The pinned maps, open and mapped.
struct Maps {
    uint32_t slots;  // elements of each array
    uint32_t id;     // the kernel's, of the array of slots
    const sched_slot* slot_array;
    sched_claim* claim_array;
    int register_fd;  // the program that registers who runs it
};

bool open_maps(const char* dir, Maps* maps, Error* error) noexcept;
void close_maps(const Maps& maps) noexcept;

// The notes of the mirror with this number of slots and this id (Maps); null: there are none, or it is another
// mirror by now.
sched_notes* open_notes(const char* dir, uint32_t slots, uint32_t id, Error* error) noexcept;
void close_notes(sched_notes* notes, uint32_t slots) noexcept;

// Registers the calling task, of whatever process, or with slot 0 takes its registration away. 0 or errno.
int set_registration(int register_fd, sched_registration registration) noexcept;

}  // namespace adaptive::bpf
