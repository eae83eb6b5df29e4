#include "mirror/bpf_source.h"

#include <fcntl.h>
#include <linux/bpf.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "base/error.h"

namespace adaptive::bpf {
namespace {

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

// The kernel's own description of a map or a program. A program's begins with its type too.
bool describe(int fd, void* info, size_t size) noexcept {
    bpf_attr attr = zeroed();
    attr.info.bpf_fd = static_cast<uint32_t>(fd);
    attr.info.info_len = static_cast<uint32_t>(size);
    attr.info.info = address(info);
    return call(BPF_OBJ_GET_INFO_BY_FD, &attr) == 0;
}

bpf_map_info describe_map(int fd) noexcept {
    bpf_map_info info = {};
    if (!describe(fd, &info, sizeof(info))) return {};
    return info;
}

// Maps an array whose shape is as expected. Null: not our layout, or with errno EPERM, frozen.
void* map_array(int fd, const bpf_map_info& info, size_t element, int protection) noexcept {
    errno = 0;
    if (info.type != BPF_MAP_TYPE_ARRAY || info.value_size != element) return nullptr;
    if (info.max_entries < 2 || info.max_entries > SCHED_MIRROR_MAX_SLOTS) return nullptr;
    // Newer kernels map an array's pages when they are touched: not while somebody spins.
    void* memory = mmap(nullptr, element * info.max_entries, protection, MAP_SHARED | MAP_POPULATE, fd, 0);
    return memory == MAP_FAILED ? nullptr : memory;
}

// The kernel runs what it is given: it must be the one that registers.
bool is_registering_program(int fd) noexcept {
    bpf_prog_info info = {};
    return describe(fd, &info, sizeof(info)) && info.type == BPF_PROG_TYPE_SYSCALL &&
           strncmp(info.name, "set_registration", sizeof(info.name) - 1) == 0;
}

// A map that nobody has mapped can be frozen by all who may open it, and stays so.
bool fail_frozen(Error* error, const char* dir, const char* name) noexcept {
    return fail(
        error,
        "%s/%s is frozen, as members of its group can do: run `schedmirror load` as root, which replaces it",
        dir, name);
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

}  // namespace

bool open_maps(const char* dir, Maps* maps, Error* error) noexcept {
    Opening o;
    if ((o.slots_fd = open_pinned(dir, "slots", error)) < 0) return false;
    if ((o.claims_fd = open_pinned(dir, "claims", error)) < 0) return false;
    if ((o.maps.register_fd = open_pinned(dir, "register", error)) < 0) return false;

    const bpf_map_info slots = describe_map(o.slots_fd), claims = describe_map(o.claims_fd);
    o.maps.slots = slots.max_entries;
    o.maps.id = slots.id;
    void* slot_array = map_array(o.slots_fd, slots, sizeof(sched_slot), PROT_READ);
    o.maps.slot_array = static_cast<const sched_slot*>(slot_array);
    errno = 0;
    if (slots.max_entries == claims.max_entries)
        o.maps.claim_array = static_cast<sched_claim*>(
            map_array(o.claims_fd, claims, sizeof(sched_claim), PROT_READ | PROT_WRITE));
    if (o.maps.claim_array == nullptr && errno == EPERM) return fail_frozen(error, dir, "claims");
    const auto* header = static_cast<const sched_header*>(slot_array);
    if (header == nullptr || o.maps.claim_array == nullptr || header->magic != SCHED_MIRROR_MAGIC ||
        !is_registering_program(o.maps.register_fd))
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
    if (maps.register_fd >= 0) close(maps.register_fd);
}

sched_notes* open_notes(const char* dir, uint32_t slots, uint32_t id, Error* error) noexcept {
    const int notes_fd = open_pinned(dir, "notes", error), slots_fd = open_pinned(dir, "slots", error);
    void* notes = nullptr;
    if (notes_fd >= 0 && slots_fd >= 0) {
        const bpf_map_info info = describe_map(notes_fd);
        errno = 0;
        if (info.max_entries == slots && describe_map(slots_fd).id == id)
            notes = map_array(notes_fd, info, sizeof(sched_notes), PROT_READ | PROT_WRITE);
        if (notes == nullptr && errno == EPERM)
            fail_frozen(error, dir, "notes");
        else if (notes == nullptr)
            fail(error, "%s holds no notes, or not those of the mirror that is open: open it again", dir);
    }
    if (notes_fd >= 0) close(notes_fd);
    if (slots_fd >= 0) close(slots_fd);
    return static_cast<sched_notes*>(notes);
}

void close_notes(sched_notes* notes, uint32_t slots) noexcept {
    if (notes != nullptr) munmap(notes, slots * sizeof(sched_notes));
}

int set_registration(int register_fd, sched_registration registration) noexcept {
    bpf_attr attr = zeroed();
    attr.test.prog_fd = static_cast<uint32_t>(register_fd);
    attr.test.ctx_in = address(&registration);
    attr.test.ctx_size_in = sizeof(registration);
    // Whom the kernel is busy with on this CPU was preempted: let it go on.
    for (int tries = 100;; tries--) {
        const int problem = call(BPF_PROG_TEST_RUN, &attr) == 0 ? static_cast<int>(attr.test.retval) : errno;
        if (problem != EAGAIN || tries == 0) return problem;
        sched_yield();
    }
}

}  // namespace adaptive::bpf
