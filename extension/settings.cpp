extern "C" {
#include "postgres.h"

#include "utils/guc.h"
}

#include "settings.h"

namespace adaptive::settings {

int mode = static_cast<int>(WaitPolicy::owner);
int max_spin = 200;
int sched_state = static_cast<int>(SchedStateSource::automatic);

namespace {

const config_enum_entry kModes[] = {{"owner", static_cast<int>(WaitPolicy::owner), false},
                                    {"blind", static_cast<int>(WaitPolicy::blind), false},
                                    {"park", static_cast<int>(WaitPolicy::park), false},
                                    {nullptr, 0, false}};

const config_enum_entry kSources[] = {{"auto", static_cast<int>(SchedStateSource::automatic), false},
                                      {"bpf", static_cast<int>(SchedStateSource::bpf), false},
                                      {"rseq", static_cast<int>(SchedStateSource::rseq), false},
                                      {"off", static_cast<int>(SchedStateSource::off), false},
                                      {nullptr, 0, false}};

}  // namespace

void define() {
    DefineCustomEnumVariable("adaptive_lwlock.mode", "How a backend waits for an LWLock that is taken.",
                             "owner: spin as long as the lock's owner is on a CPU, else sleep. "
                             "blind: spin for max_spin without looking at the owner, then sleep. "
                             "park: sleep at once, as the server does without this module.",
                             &mode, static_cast<int>(WaitPolicy::owner), kModes, PGC_SUSET, 0, nullptr,
                             nullptr, nullptr);
    DefineCustomIntVariable(
        "adaptive_lwlock.max_spin",
        "Longest time, in microseconds, that a backend spins for an LWLock before it sleeps.",
        "In mode owner, a backend whose lock's owner leaves its CPU stops earlier.", &max_spin, 200, 0,
        100000, PGC_SUSET, 0, nullptr, nullptr, nullptr);
    DefineCustomEnumVariable(
        "adaptive_lwlock.sched_state", "What keeps the mirror of the backends' scheduling states.",
        "bpf: the kernel, after \"schedmirror load\". rseq: the backends themselves, less exact. "
        "auto: bpf if it is there, else rseq. off: nothing.",
        &sched_state, static_cast<int>(SchedStateSource::automatic), kSources, PGC_POSTMASTER, 0, nullptr,
        nullptr, nullptr);
}

const char* mode_name() {
    for (const config_enum_entry* e = kModes; e->name != nullptr; e++)
        if (e->val == mode) return e->name;
    return "unknown";
}

}  // namespace adaptive::settings
