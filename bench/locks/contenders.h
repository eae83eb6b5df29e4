// The locks that are compared, each under a name, for threads of one process and for processes.
#pragma once

#include <cstdint>
#include <span>

#include "locks/contention.h"
#include "mirror/mirror.h"

namespace bench {

/// How one kind of tasks uses a lock. Null functions: not for tasks of that kind.
struct Use {
    void (*construct)(void* lock) = nullptr;  // at most 128 bytes, aligned to 128
    void (*contend)(Arena& arena, int index) = nullptr;
    void (*turns)(void* lock, uint64_t count) = nullptr;  // takes it and gives it back, `count` times
};

struct Contender {
    const char* name;
    bool ours;
    const char* about;
    Use threads, processes;
    /// Chooses the mirror, before there are tasks; null: it uses none. False with the reason if it cannot be
    /// had.
    bool (*prepare)(adaptive::Error* error) = nullptr;
};

std::span<const Contender> contenders();

/// Null: there is none of that name.
const Contender* contender(const char* name);

}  // namespace bench
