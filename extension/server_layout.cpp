#include "server_layout.h"

#include <cstring>

#include "server/server.h"

namespace adaptive::server_layout {
namespace {

/// A list's head, of either of the server's types of lists: empty ones point to themselves.
template <typename Head>
bool is_empty_list(const Head& head) {
    const void* first;
    memcpy(&first, &head, sizeof(first));
    return first == &head;
}

/// LWLockInitialize() writes every member, and nothing else.
const char* what_differs_in_lwlock() {
    constexpr int kUntouched = 0xAA;
    LWLockPadded memory, untouched;
    memset(&memory, kUntouched, sizeof(memory));
    memset(&untouched, kUntouched, sizeof(untouched));
    LWLock& lock = memory.lock;
    LWLockInitialize(&lock, LWTRANCHE_FIRST_USER_DEFINED);
    const auto same = [&](size_t from, size_t to) {
        return memcmp(reinterpret_cast<char*>(&memory) + from, reinterpret_cast<char*>(&untouched) + from,
                      to - from) == 0;
    };
    if (lock.tranche != LWTRANCHE_FIRST_USER_DEFINED) return "LWLock.tranche";
    if (pg_atomic_read_u32(&lock.state) != server::kLockBits.release_ok) return "LWLock.state";
    if (lock.waiters.head != server::kNobody || lock.waiters.tail != server::kNobody) return "LWLock.waiters";
    if (!same(server::kOwnerOffset, offsetof(LWLock, state))) return "the hole in LWLock";
    if (!same(sizeof(LWLock), sizeof(memory))) return "the size of LWLock";
    return nullptr;
}

/// Members on either side of those that are used, and in between: one that was added or taken away moves one of them.
const char* what_differs_in(PGPROC& proc, int number) {
    if (server::proc_number(&proc) != number) return "PGPROC.pgprocno";
    if (proc.sem == nullptr) return "PGPROC.sem";
    if (!proc.procLatch.is_shared || proc.procLatch.owner_pid != 0) return "PGPROC.procLatch";
    if (proc.pid != 0 || proc.lwWaiting != 0) return "PGPROC.lwWaiting";
    for (auto& locks : proc.myProcLocks)
        if (!is_empty_list(locks)) return "PGPROC.myProcLocks";
    if (proc.fpInfoLock.tranche != LWTRANCHE_LOCK_FASTPATH) return "PGPROC.fpInfoLock";
    if (!is_empty_list(proc.lockGroupMembers)) return "PGPROC.lockGroupMembers";
    return nullptr;
}

const char* what_differs() {
    if (const char* what = what_differs_in_lwlock()) return what;
    // The size first: with another all but the first would be looked at in the wrong places.
    const int count = MaxBackends + NUM_AUXILIARY_PROCS;
    if (reinterpret_cast<char*>(PreparedXactProcs) - reinterpret_cast<char*>(ProcGlobal->allProcs) !=
        static_cast<ptrdiff_t>(count * sizeof(PGPROC)))
        return "the size of PGPROC";
    if (ProcGlobal->allProcCount != static_cast<uint32>(count)) return "PROC_HDR.allProcCount";
    for (int i = 0; i < count; i++)
        if (const char* what = what_differs_in(ProcGlobal->allProcs[i], i)) return what;
    return nullptr;
}

}  // namespace

bool is_as_built(char* why, size_t why_size) {
    const char* const what = what_differs();
    if (what != nullptr)
        snprintf(why, why_size,
                 "this server differs from the one that the module was built for (" PG_VERSION
                 ") in %s: build the module anew",
                 what);
    return what == nullptr;
}

}  // namespace adaptive::server_layout
