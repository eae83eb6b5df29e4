/*
 * Entry point: puts the replacement in place when the postmaster starts, and makes sure that it works.
 *
 * An optimization never keeps a database from starting: whatever is not as expected leaves the server with
 * its own functions, and is said in the log and in adaptive_lwlock_status().
 */

#include "module.h"

#include <stdio.h>

#include "backend_mirror.h"
#include "lwlock/api.h"
#include "lwlock/probes.h"
#include "patch/patch.h"
#include "server/server.h"
#include "server_layout.h"
#include "settings.h"
#include "stats.h"

extern "C" {
#include "common/config_info.h"
PG_MODULE_MAGIC;
PGDLLEXPORT void _PG_init(void);
}

namespace adaptive::module {
namespace {

bool loaded_by_postmaster = false;
bool active = false;
char reason[sizeof(patch::Result::reason)] = "the server has not finished starting";
int functions_replaced = 0;

shmem_request_hook_type previous_request_hook = nullptr;
shmem_startup_hook_type previous_startup_hook = nullptr;

void request_shmem() {
    if (previous_request_hook) previous_request_hook();
    RequestAddinShmemSpace(stats::shmem_bytes() + 128);
    RequestAddinShmemSpace(backend_mirror::shmem_bytes());
}

/// One lock that the server itself takes and releases, from a file other than lwlock.c. Counts on nothing but
/// the owner's slot number, which only the replacement stores.
bool server_calls_replacement() {
    constexpr SlotId kMark = 0xFFFF;
    LWLock* const lock = ShmemIndexLock;
    const int held_before = lwlock_api::held_count();
    const uint32 holdoff_before = InterruptHoldoffCount;
    auto* owner = reinterpret_cast<volatile SlotId*>(reinterpret_cast<char*>(lock) + server::kOwnerOffset);
    volatile bool raised = false;

    // Functions that were left to the server must do right by the replacement's list of held locks.
    static LWLock own_lock;
    server::Variable variable = {};
    LWLockInitialize(&own_lock, LWTRANCHE_FIRST_USER_DEFINED);

    *owner = 0;
    backend_mirror::internal::own_slot = kMark;
    PG_TRY();
    {
        bool found;
        ShmemInitStruct("adaptive_lwlock self-check", 1, &found);
        LWLockAcquire(&own_lock, LW_EXCLUSIVE);
        LWLockReleaseClearVar(&own_lock, &variable, 1);
    }
    PG_CATCH();
    {
        // Some calls reach the replacement and some the server's own function, which then misses the lock in
        // its list.
        FlushErrorState();
        InterruptHoldoffCount = holdoff_before;  // an error sets it to 0
        raised = true;
    }
    PG_END_TRY();
    backend_mirror::internal::own_slot = 0;

    const uint32 held = (pg_atomic_read_u32(&lock->state) | pg_atomic_read_u32(&own_lock.state)) &
                        server::kLockBits.held_mask;
    return !raised && *owner == kMark && held == 0 && lwlock_api::held_count() == held_before;
}

/// Back to the server's own functions, letting go of what either of the two implementations may have taken.
void back_to_stock() {
    LWLockReleaseAll();
    const patch::Result removed = patch::remove();
    // Some functions are replaced and some are not: nobody could take a lock and release it again.
    if (!removed.ok) elog(FATAL, "adaptive_lwlock: %s", removed.reason);
    LWLockReleaseAll();
    functions_replaced = 0;
}

/// Told by what the server itself says of how it was built.
const char* why_copies_may_stay() {
    size_t n;
    const ConfigData* const settings = get_configdata(my_exec_path, &n);
    const char* configured = "";
    StringInfoData flags;
    initStringInfo(&flags);
    for (size_t i = 0; i < n; i++) {
        if (strcmp(settings[i].name, "CONFIGURE") == 0) configured = settings[i].setting;
        appendStringInfo(&flags, "%s ", settings[i].setting);
    }
    const char* const why = patch::why_copies_may_stay(configured, flags.data, patch::finds_copies);
    pfree(flags.data);
    return why;
}

void say_that_it_is_held(LWLock* lock, LWLockMode, void*) {
    snprintf(
        reason, sizeof(reason),
        "another module holds the LWLock \"%s\" while it calls this one: list adaptive_lwlock behind it in "
        "shared_preload_libraries",
        probe::tranche_name(*lock));
}

void replace_functions() {
    // Shared memory is set up again after a crash; the code pages stay as they are.
    static bool installed = false;
    if (!installed) {
        if (const char* why = why_copies_may_stay()) {
            strlcpy(reason, why, sizeof(reason));
            return;
        }
        if (!server_layout::is_as_built(reason, sizeof(reason))) return;
        // The server's list of locks held is not the replacement's, which could not let go of them.
        reason[0] = '\0';
        ForEachLWLockHeldByMe(say_that_it_is_held, nullptr);
        if (reason[0] != '\0') return;
        const patch::Result result = lwlock_api::install();
        if (!result.ok) {
            if (!result.intact) elog(FATAL, "adaptive_lwlock: %s", result.reason);
            strlcpy(reason, result.reason, sizeof(reason));
            return;
        }
        installed = true;
        functions_replaced = result.replaced;
    }
    if (!server_calls_replacement()) {
        back_to_stock();
        strlcpy(reason,
                "the server does not call its LWLock functions where this module replaced them (a build with "
                "link-time optimization?)",
                sizeof(reason));
        installed = false;
        return;
    }
    active = true;
}

void startup_shmem() {
    if (previous_startup_hook) previous_startup_hook();

    active = false;
    stats::shmem_startup();
    backend_mirror::shmem_startup();
    replace_functions();

    const backend_mirror::Status mirror = backend_mirror::status();
    if (!active)
        ereport(WARNING,
                (errmsg("adaptive_lwlock is not active, the server waits for LWLocks in its own way"),
                 errdetail("%s", reason)));
    else if (mirror.source_reason != nullptr)
        ereport(LOG, (errmsg("adaptive_lwlock is active: %d functions replaced, source \"%s\"",
                             functions_replaced, mirror.source),
                      errdetail("Not bpf: %s", mirror.source_reason)));
    else
        ereport(LOG, (errmsg("adaptive_lwlock is active: %d functions replaced, source \"%s\"",
                             functions_replaced, mirror.source)));
}

}  // namespace

Status status() {
    return {active, active ? nullptr : reason, functions_replaced};
}

bool preloaded() {
    return loaded_by_postmaster;
}

}  // namespace adaptive::module

void _PG_init(void) {
    using namespace adaptive;
    if (!process_shared_preload_libraries_in_progress) return;

    module::loaded_by_postmaster = true;
    settings::define();
    MarkGUCPrefixReserved("adaptive_lwlock");
    CycleClock::calibrate();
    backend_mirror::register_callbacks();
    module::previous_request_hook = shmem_request_hook;
    shmem_request_hook = module::request_shmem;
    module::previous_startup_hook = shmem_startup_hook;
    shmem_startup_hook = module::startup_shmem;
}
