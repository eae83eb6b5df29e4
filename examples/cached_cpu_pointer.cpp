// A pointer to this CPU's data that turns to null by itself when the thread is descheduled.
//
// Asking "which CPU am I on?" at every use, and hoping to still be there, is what most per-CPU code does. Here
// the thread asks once after each deschedule: while the pointer is not null it has not left its CPU since.
//
//   schedmirror load && build/examples/cached_cpu_pointer [DIRECTORY OF THE MIRROR]
#include <sched.h>
#include <sys/resource.h>

#include <cstdio>
#include <ctime>
#include <vector>

#include "proposals/deschedule.h"

using namespace adaptive;

namespace {

struct alignas(64) CpuData {
    uint64_t uses;
};

constexpr uintptr_t kLooking = 1;

// This CPU's data, by one load as long as the thread has not been descheduled.
CpuData* data_here(volatile uintptr_t* cached, std::vector<CpuData>& cpus, uint64_t* looked) {
    if (const uintptr_t pointer = *cached; pointer > kLooking) return reinterpret_cast<CpuData*>(pointer);
    ++*looked;
    *cached = kLooking;
    CpuData* data = &cpus[static_cast<size_t>(sched_getcpu())];
    DescheduleNotes::replace(cached, kLooking, reinterpret_cast<uintptr_t>(data));
    return data;
}

}  // namespace

int main(int argc, char** argv) {
    const char* dir = argc > 1 ? argv[1] : kMirrorDir;
    Mirror mirror;
    MirrorTask task;
    DescheduleNotes notes;
    Error error;
    volatile uintptr_t* cached = nullptr;
    if (!mirror.open_bpf(dir, &error) || !task.attach(mirror, &error) ||
        !notes.open(dir, mirror, task, &error) || (cached = notes.add<uintptr_t>(0, 0, &error)) == nullptr) {
        fprintf(stderr, "cached_cpu_pointer: %s\n", error.text);
        return 1;
    }

    std::vector<CpuData> cpus(4096);
    uint64_t uses = 0, looked = 0;
    for (const time_t end = time(nullptr) + 2; time(nullptr) < end;)
        for (int i = 0; i < 1000; i++, uses++) data_here(cached, cpus, &looked)->uses++;

    rusage usage;
    getrusage(RUSAGE_THREAD, &usage);
    printf("%lu uses, %lu times asked for the CPU, %ld times descheduled\n", uses, looked,
           usage.ru_nvcsw + usage.ru_nivcsw);
    for (size_t cpu = 0; cpu < cpus.size(); cpu++)
        if (cpus[cpu].uses != 0) printf("CPU %zu: %lu uses\n", cpu, cpus[cpu].uses);
    notes.close();
    task.detach();
    mirror.close();
    return 0;
}
