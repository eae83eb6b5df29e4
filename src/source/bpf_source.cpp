#include "source/bpf_source.h"

#include <fcntl.h>
#include <linux/bpf.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "mirror/error.h"

namespace adaptive::bpf {
namespace {

constexpr unsigned kPidfdThread = O_EXCL;  // PIDFD_THREAD, Linux 6.9

// All bytes zero, as the kernel demands of the unused ones: `= {}` would promise that of a union's first
// member only.
bpf_attr zeroed() noexcept {
    bpf_attr attr;
    memset(&attr, 0, sizeof(attr));
    return attr;
}

long call(int command, bpf_attr* attr) noexcept {
    return syscall(SYS_bpf, command, attr, sizeof(*attr));
}

uint64_t address(const void* pointer) noexcept {
    return reinterpret_cast<uintptr_t>(pointer);
}

// A file descriptor (close-on-exec) or -1 with an explanation.
int open_pinned(const char* dir, const char* name, Error* error) noexcept {
    char path[256];
    if (snprintf(path, sizeof(path), "%s/%s", dir, name) >= static_cast<int>(sizeof(path))) {
        fail(error, "the directory name of the mirror is too long");
        return -1;
    }
    bpf_attr attr = zeroed();
    attr.pathname = address(path);
    const int fd = static_cast<int>(call(BPF_OBJ_GET, &attr));
    if (fd >= 0) return fd;
    if (errno == ENOENT || errno == ENOTDIR)
        fail(error, "no mirror at %s: run `schedmirror load` as root", dir);
    else if (errno == EACCES)
        fail(error, "this user may not open %s: join the group of the mirror (`schedmirror load --group`)",
             path);
    else if (errno == EPERM || errno == ENOSYS)
        fail(error,
             "the kernel refuses BPF_OBJ_GET to this process (%s): Linux 5.19 or later is needed, and no "
             "seccomp filter against bpf(2)",
             strerror(errno));
    else
        fail(error, "cannot open %s: %s", path, strerror(errno));
    return -1;
}

// The kernel's own description of a map; all zero for what is none. (A program's begins with its type too,
// but has no such sizes.)
bpf_map_info describe(int fd) noexcept {
    bpf_map_info info = {};
    bpf_attr attr = zeroed();
    attr.info.bpf_fd = static_cast<uint32_t>(fd);
    attr.info.info_len = sizeof(info);
    attr.info.info = address(&info);
    if (call(BPF_OBJ_GET_INFO_BY_FD, &attr) != 0) return {};
    return info;
}

// Maps an array whose shape is as expected. Null: not our layout.
void* map_array(int fd, const bpf_map_info& info, size_t element, int protection) noexcept {
    if (info.type != BPF_MAP_TYPE_ARRAY || info.value_size != element) return nullptr;
    if (info.max_entries < 2 || info.max_entries > SCHED_MIRROR_MAX_SLOTS) return nullptr;
    // Newer kernels map an array's pages when they are touched: not while somebody spins.
    void* memory = mmap(nullptr, element * info.max_entries, protection, MAP_SHARED | MAP_POPULATE, fd, 0);
    return memory == MAP_FAILED ? nullptr : memory;
}

// What a registration is written to must not be larger: the kernel would read behind it.
bool is_task_storage(const bpf_map_info& info) noexcept {
    return info.type == BPF_MAP_TYPE_TASK_STORAGE && info.key_size == sizeof(int) &&
           info.value_size == sizeof(sched_registration);
}

// Keeps a half-built Maps from leaking.
struct Opening {
    Maps maps = {0, 0, nullptr, nullptr, -1};
    int slots_fd = -1, claims_fd = -1;
    bool keep = false;
    ~Opening() {
        if (slots_fd >= 0) close(slots_fd);  // a mapping outlives its descriptor
        if (claims_fd >= 0) close(claims_fd);
        if (!keep) close_maps(maps);
    }
};

// A pidfd of the calling task, or -1.
int pidfd_of_self() noexcept {
    const pid_t tid = gettid();
    return static_cast<int>(syscall(SYS_pidfd_open, tid, tid == getpid() ? 0U : kPidfdThread));
}

}  // namespace

bool open_maps(const char* dir, Maps* maps, Error* error) noexcept {
    Opening o;
    if ((o.slots_fd = open_pinned(dir, "slots", error)) < 0) return false;
    if ((o.claims_fd = open_pinned(dir, "claims", error)) < 0) return false;
    if ((o.maps.tasks_fd = open_pinned(dir, "tasks", error)) < 0) return false;

    const bpf_map_info slots = describe(o.slots_fd), claims = describe(o.claims_fd);
    o.maps.slots = slots.max_entries;
    o.maps.id = slots.id;
    void* slot_array = map_array(o.slots_fd, slots, sizeof(sched_slot), PROT_READ);
    o.maps.slot_array = static_cast<const sched_slot*>(slot_array);
    if (slots.max_entries == claims.max_entries)
        o.maps.claim_array = static_cast<sched_claim*>(
            map_array(o.claims_fd, claims, sizeof(sched_claim), PROT_READ | PROT_WRITE));
    const auto* header = static_cast<const sched_header*>(slot_array);
    if (header == nullptr || o.maps.claim_array == nullptr || header->magic != SCHED_MIRROR_MAGIC ||
        !is_task_storage(describe(o.maps.tasks_fd)))
        return fail(error,
                    "%s holds no mirror of a known layout: reload it with this version's `schedmirror`", dir);
    if (header->version != SCHED_MIRROR_VERSION)
        return fail(error,
                    "the mirror at %s has layout version %u, this program knows %u: reload it with this "
                    "version's `schedmirror`",
                    dir, header->version, SCHED_MIRROR_VERSION);
    if (__atomic_load_n(&header->active, __ATOMIC_RELAXED) == 0)
        return fail(error, "the mirror at %s has been unloaded: run `schedmirror load` as root", dir);

    *maps = o.maps;
    o.keep = true;
    return true;
}

void close_maps(const Maps& maps) noexcept {
    if (maps.slot_array != nullptr)
        munmap(const_cast<sched_slot*>(maps.slot_array), maps.slots * sizeof(sched_slot));
    if (maps.claim_array != nullptr) munmap(maps.claim_array, maps.slots * sizeof(sched_claim));
    if (maps.tasks_fd >= 0) close(maps.tasks_fd);
}

sched_notes* open_notes(const char* dir, uint32_t slots, uint32_t id, Error* error) noexcept {
    const int notes_fd = open_pinned(dir, "notes", error), slots_fd = open_pinned(dir, "slots", error);
    void* notes = nullptr;
    if (notes_fd >= 0 && slots_fd >= 0) {
        const bpf_map_info info = describe(notes_fd);
        if (info.max_entries == slots && describe(slots_fd).id == id)
            notes = map_array(notes_fd, info, sizeof(sched_notes), PROT_READ | PROT_WRITE);
        if (notes == nullptr)
            fail(error, "%s holds no notes, or not those of the mirror that is open: open it again", dir);
    }
    if (notes_fd >= 0) close(notes_fd);
    if (slots_fd >= 0) close(slots_fd);
    return static_cast<sched_notes*>(notes);
}

void close_notes(sched_notes* notes, uint32_t slots) noexcept {
    if (notes != nullptr) munmap(notes, slots * sizeof(sched_notes));
}

int set_registration(int tasks_fd, const sched_registration& registration) noexcept {
    const int pidfd = pidfd_of_self();
    if (pidfd < 0) return errno;
    bpf_attr attr = zeroed();
    attr.map_fd = static_cast<uint32_t>(tasks_fd);
    attr.key = address(&pidfd);
    attr.value = address(&registration);
    const int result = call(BPF_MAP_UPDATE_ELEM, &attr) == 0 ? 0 : errno;
    close(pidfd);
    return result;
}

void delete_registration(int tasks_fd) noexcept {
    const int pidfd = pidfd_of_self();
    if (pidfd < 0) return;
    bpf_attr attr = zeroed();
    attr.map_fd = static_cast<uint32_t>(tasks_fd);
    attr.key = address(&pidfd);
    call(BPF_MAP_DELETE_ELEM, &attr);
    close(pidfd);
}

}  // namespace adaptive::bpf
