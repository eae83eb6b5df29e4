#include "schedmirror/loader.h"

#include <bpf/bpf.h>
#include <bpf/libbpf.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/magic.h>
#include <linux/membarrier.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <bit>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <stdexcept>

#include "mirror/mirror.h"
#include "schedmirror.skel.h"

namespace adaptive::loader {
namespace {

constexpr const char* kBpfFs = "/sys/fs/bpf";
constexpr const char* kPins[] = {"sched_switch", "process_exit", "deactivate", "register",
                                 "slots",        "claims",       "notes"};

bool verbose = false;

int talk(libbpf_print_level, const char* format, va_list args) {
    return verbose ? vfprintf(stderr, format, args) : 0;
}

// Ends the command with its one line.
[[noreturn]] void refuse(const std::string& what) {
    throw std::runtime_error(what);
}

std::string reason() {
    return strerror(errno);
}

struct Descriptor {
    int fd;
    explicit Descriptor(int fd) : fd(fd) {}
    ~Descriptor() {
        if (fd >= 0) close(fd);
    }
    Descriptor(Descriptor&& other) noexcept : fd(other.fd) { other.fd = -1; }
    Descriptor& operator=(const Descriptor&) = delete;
};

// ---- what is pinned at a directory ----

enum class Found { nothing, remains, other_version, mirror };

struct Pinned {
    Found what = Found::nothing;
    uint32_t version = 0, slots = 0;  // slots: elements of the arrays
    gid_t group = 0;
    const char* frozen = nullptr;  // an array that all who take part must write, and nobody can
};

std::string path(const std::string& dir, const char* name) {
    return dir + "/" + name;
}

// Those who may open a map can freeze it while nobody has it mapped. The kernel tells that of a descriptor.
bool is_frozen(const std::string& file) {
    const Descriptor map(bpf_obj_get(file.c_str()));
    std::ifstream lines("/proc/self/fdinfo/" + std::to_string(map.fd));
    for (std::string name, value; lines >> name >> value;)
        if (name == "frozen:") return value != "0";
    return false;
}

Pinned inspect(const std::string& dir) {
    Pinned pinned;
    for (const char* name : kPins)
        if (access(path(dir, name).c_str(), F_OK) == 0) pinned.what = Found::remains;

    Descriptor fd(bpf_obj_get(path(dir, "slots").c_str()));
    if (fd.fd < 0) {
        if (errno == ENOENT) return pinned;
        refuse("cannot open " + path(dir, "slots") + " (" + reason() + "): run as root");
    }
    bpf_map_info info = {};
    uint32_t length = sizeof(info);
    if (bpf_obj_get_info_by_fd(fd.fd, &info, &length) != 0)
        refuse("cannot read " + path(dir, "slots") + ": " + reason());
    // Every version begins with the same header.
    if (info.type != BPF_MAP_TYPE_ARRAY || info.value_size < offsetof(sched_header, pad)) return pinned;
    std::string element(info.value_size, '\0');
    const uint32_t zero = 0;
    if (bpf_map_lookup_elem(fd.fd, &zero, element.data()) != 0) return pinned;
    sched_header header;
    memcpy(&header, element.data(), offsetof(sched_header, pad));
    if (header.magic != SCHED_MIRROR_MAGIC) return pinned;
    pinned.version = header.version;
    pinned.slots = info.max_entries;
    if (header.version != SCHED_MIRROR_VERSION || info.value_size != sizeof(sched_slot)) {
        pinned.what = Found::other_version;
        return pinned;
    }
    struct stat file;
    if (stat(path(dir, "slots").c_str(), &file) == 0) pinned.group = file.st_gid;
    bool whole = header.active != 0;
    for (const char* name : kPins) whole = whole && access(path(dir, name).c_str(), F_OK) == 0;
    for (const char* name : {"claims", "notes"})
        if (whole && pinned.frozen == nullptr && is_frozen(path(dir, name))) pinned.frozen = name;
    if (whole && pinned.frozen == nullptr) pinned.what = Found::mirror;
    return pinned;
}

void unpin(const std::string& dir) {
    for (const char* name : kPins)
        if (unlink(path(dir, name).c_str()) != 0 && errno != ENOENT)
            refuse("cannot remove " + path(dir, name) + " (" + reason() + "): run as root");
}

// The directory, locked against another load or unload. fd < 0: there is none.
Descriptor lock(const std::string& dir) {
    for (;;) {
        Descriptor directory(open(dir.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
        if (directory.fd < 0 && errno == ENOENT) return directory;
        if (directory.fd < 0) refuse("cannot open " + dir + " (" + reason() + "): run as root");
        if (flock(directory.fd, LOCK_EX) != 0) refuse("cannot lock " + dir + ": " + reason());
        // An unload that held the lock may have removed the directory meanwhile.
        struct stat locked, named;
        if (fstat(directory.fd, &locked) == 0 && stat(dir.c_str(), &named) == 0 &&
            locked.st_ino == named.st_ino)
            return directory;
    }
}

Descriptor make_and_lock(const std::string& dir) {
    for (;;) {
        if (mkdir(dir.c_str(), 0700) != 0 && errno != EEXIST)
            refuse("cannot create " + dir + " (" + reason() + "): run as root");
        Descriptor directory = lock(dir);
        if (directory.fd >= 0) return directory;
    }
}

// ---- load ----

gid_t group_id(const std::string& name) {
    const group* entry = getgrnam(name.c_str());
    if (entry == nullptr) refuse("there is no group " + name + ": create it, or name another with --group");
    return entry->gr_gid;
}

std::string group_name(gid_t id) {
    const group* entry = getgrgid(id);
    return entry != nullptr ? entry->gr_name : std::to_string(id);
}

bool is_bpffs(const std::string& dir) {
    struct statfs fs;
    return statfs(dir.c_str(), &fs) == 0 && fs.f_type == BPF_FS_MAGIC;
}

// A BPF file system above dir.
void prepare_file_system(const std::string& dir) {
    const std::string parent = dir.substr(0, dir.rfind('/'));
    if (is_bpffs(parent)) return;
    if (parent != kBpfFs)
        refuse(parent + " is not in a BPF file system: mount one there (mount -t bpf bpf DIR)");
    if (mount("bpf", kBpfFs, "bpf", MS_NOSUID | MS_NODEV | MS_NOEXEC, "mode=0711") != 0)
        refuse(std::string("the BPF file system is not mounted, and cannot be (") + reason() +
               "): run as root `mount -t bpf bpf " + kBpfFs + "`");
    printf("schedmirror: mounted the BPF file system at %s\n", kBpfFs);
}

constexpr mode_t kPass = S_IXGRP | S_IXOTH;

// Where a load that changes the file system's mode keeps the former one, as a directory's: there are no files here.
std::string former_mode(const std::string& dir) {
    return path(dir, "former_mode");
}

// systemd mounts the file system for root alone. What is pinned there has modes of its own; passing through harms
// nobody.
void let_group_pass(const std::string& dir) {
    struct stat root;
    if (dir.substr(0, dir.rfind('/')) != kBpfFs || stat(kBpfFs, &root) != 0 || (root.st_mode & S_IXOTH) != 0)
        return;
    if (mkdir(former_mode(dir).c_str(), 0700) == 0) chmod(former_mode(dir).c_str(), root.st_mode & 07777);
    if (chmod(kBpfFs, (root.st_mode & 07777) | kPass) != 0)
        refuse(std::string("cannot let the group pass through ") + kBpfFs + ": " + reason());
    printf("schedmirror: made %s passable for other users (mode +x), until `schedmirror unload`\n", kBpfFs);
}

void take_back_passage(const std::string& dir) {
    struct stat former, root;
    if (stat(former_mode(dir).c_str(), &former) != 0 || rmdir(former_mode(dir).c_str()) != 0) return;
    if (stat(kBpfFs, &root) != 0 ||
        chmod(kBpfFs, (root.st_mode & 07777 & ~kPass) | (former.st_mode & kPass)) != 0)
        refuse(std::string("cannot set the mode of ") + kBpfFs + ": " + reason());
    printf("schedmirror: %s has its former mode again\n", kBpfFs);
}

[[noreturn]] void refuse_load(int error) {
    if (error == EPERM || error == EACCES) refuse("loading needs CAP_BPF and CAP_PERFMON: run as root");
    utsname system;
    int major = 0, minor = 0;
    uname(&system);
    sscanf(system.release, "%d.%d", &major, &minor);
    if (major < 5 || (major == 5 && minor < 19))
        refuse(std::string("Linux ") + system.release + " is too old: 5.19 or later is needed");
    refuse(std::string("the kernel refuses the program (") + strerror(error) + "): --verbose shows why");
}

void give(const std::string& file, gid_t group, mode_t mode) {
    if (chown(file.c_str(), 0, group) != 0 || chmod(file.c_str(), mode) != 0)
        refuse("cannot set the owner and mode of " + file + ": " + reason());
}

// `Pin` is libbpf's function for such a thing.
template <auto Pin, class Thing>
void pin(Thing* thing, const std::string& file, gid_t group, mode_t mode) {
    if (Pin(thing, file.c_str()) != 0) refuse("cannot pin " + file + ": " + reason());
    give(file, group, mode);
}

// The pinned attachment outlives this process; the program runs from here on.
void attach(bpf_program* program, const std::string& file) {
    bpf_link* link = bpf_program__attach(program);
    if (link == nullptr) refuse_load(errno);
    const int problem = bpf_link__pin(link, file.c_str());
    bpf_link__destroy(link);
    if (problem != 0) refuse("cannot pin " + file + ": " + strerror(-problem));
}

// No slot has been seen running yet.
void never_seen(int claims_fd, uint32_t slots) {
    void* memory =
        mmap(nullptr, slots * sizeof(sched_claim), PROT_READ | PROT_WRITE, MAP_SHARED, claims_fd, 0);
    if (memory == MAP_FAILED) refuse("cannot map the mirror: " + reason());
    auto* claims = static_cast<sched_claim*>(memory);
    for (uint32_t i = 0; i < slots; i++) claims[i].seen_switches = SCHED_NEVER_SEEN;
    munmap(memory, slots * sizeof(sched_claim));
}

void load_and_pin(const std::string& dir, uint32_t slots, gid_t group) {
    struct Skeleton {
        schedmirror_bpf* bpf = schedmirror_bpf__open();
        ~Skeleton() { schedmirror_bpf__destroy(bpf); }
    } skeleton;
    schedmirror_bpf* bpf = skeleton.bpf;
    if (bpf == nullptr) refuse_load(errno);
    bpf_map__set_max_entries(bpf->maps.slots, slots);
    bpf_map__set_max_entries(bpf->maps.claims, slots);
    bpf_map__set_max_entries(bpf->maps.notes, slots);
    // At most half full, so that two tasks rarely want the same place.
    const uint32_t places = std::bit_ceil(2 * slots);
    bpf_map__set_max_entries(bpf->maps.places, places);
    bpf->rodata->places_mask = places - 1;
    if (const int problem = schedmirror_bpf__load(bpf); problem != 0) refuse_load(-problem);

    never_seen(bpf_map__fd(bpf->maps.claims), slots);
    sched_slot header = {};
    const sched_header content = {SCHED_MIRROR_MAGIC, SCHED_MIRROR_VERSION, slots, 1, {}};
    memcpy(&header, &content, sizeof(header));
    const uint32_t zero = 0;
    // Frozen: from here on only the kernel's programs write the array, whoever opens it. The file mode cannot
    // say that, for the kernel maps (even to read) only what was opened for reading and writing.
    if (bpf_map_update_elem(bpf_map__fd(bpf->maps.slots), &zero, &header, BPF_ANY) != 0 ||
        bpf_map_freeze(bpf_map__fd(bpf->maps.slots)) != 0)
        refuse("cannot prepare the mirror: " + reason());

    pin<bpf_map__pin>(bpf->maps.slots, path(dir, "slots"), group, 0660);
    pin<bpf_map__pin>(bpf->maps.claims, path(dir, "claims"), group, 0660);
    pin<bpf_map__pin>(bpf->maps.notes, path(dir, "notes"), group, 0660);
    pin<bpf_program__pin>(bpf->progs.set_registration, path(dir, "register"), group, 0660);
    pin<bpf_program__pin>(bpf->progs.deactivate, path(dir, "deactivate"), 0, 0600);
    attach(bpf->progs.on_process_exit, path(dir, "process_exit"));
    attach(bpf->progs.on_sched_switch, path(dir, "sched_switch"));
    give(dir, group, 0750);
}

// True: what is asked for is there already.
bool loaded_already(const std::string& dir, const Pinned& pinned, const LoadOptions& options) {
    if (pinned.what == Found::other_version)
        refuse("layout version " + std::to_string(pinned.version) + " is loaded at " + dir +
               ", this command has " + std::to_string(SCHED_MIRROR_VERSION) +
               ": run `schedmirror unload` first");
    if (pinned.what != Found::mirror) return false;
    const std::string loaded = "loaded already at " + dir + " with " + std::to_string(pinned.slots - 1) +
                               " slots for group " + group_name(pinned.group);
    if (options.slots.value_or(pinned.slots - 1) != pinned.slots - 1 ||
        (options.group && group_id(*options.group) != pinned.group))
        refuse(loaded + ": to change that, run `schedmirror unload` first");
    printf("schedmirror: %s\n", loaded.c_str());
    return true;
}

// ---- unload ----

// Lets whatever version is pinned switch itself off, see deactivate in schedmirror.bpf.c. Twice: programs
// that still read "active" run under RCU and may write once more until the barrier has passed.
void deactivate(const std::string& dir) {
    Descriptor program(bpf_obj_get(path(dir, "deactivate").c_str()));
    if (program.fd < 0 && errno == ENOENT) return;
    LIBBPF_OPTS(bpf_test_run_opts, no_options);
    for (int i = 0; i < 2; i++) {
        if (program.fd < 0 || bpf_prog_test_run_opts(program.fd, &no_options) != 0)
            refuse("cannot run " + path(dir, "deactivate") + " (" + reason() + "): run as root");
        syscall(SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0);
    }
}

void remove_all(const std::string& dir) {
    deactivate(dir);
    unpin(dir);
}

// ---- status ----

void describe_program(const std::string& dir, const char* name) {
    Descriptor link(bpf_obj_get(path(dir, name).c_str()));
    bpf_link_info link_info = {};
    uint32_t length = sizeof(link_info);
    if (link.fd < 0 || bpf_obj_get_info_by_fd(link.fd, &link_info, &length) != 0) return;  // root only
    Descriptor program(bpf_prog_get_fd_by_id(link_info.prog_id));
    bpf_prog_info info = {};
    length = sizeof(info);
    if (program.fd < 0 || bpf_obj_get_info_by_fd(program.fd, &info, &length) != 0) return;
    printf("%s: program %u", name, info.id);
    if (info.run_cnt != 0)
        printf(", %llu runs of %llu ns on average", info.run_cnt, info.run_time_ns / info.run_cnt);
    printf(", %llu runs missed\n", info.recursion_misses);
}

}  // namespace

void set_verbose() {
    verbose = true;
}

int load(const std::string& dir, const LoadOptions& options) {
    libbpf_set_print(talk);
    gid_t group = group_id(options.group.value_or(kDefaultGroup));
    if (access("/sys/kernel/btf/vmlinux", R_OK) != 0)
        refuse(
            "the kernel has no type information (/sys/kernel/btf/vmlinux): one built with "
            "CONFIG_DEBUG_INFO_BTF "
            "is needed");
    prepare_file_system(dir);
    Descriptor directory = make_and_lock(dir);
    let_group_pass(dir);
    const Pinned pinned = inspect(dir);
    if (loaded_already(dir, pinned, options)) return kDone;
    remove_all(dir);  // what an interrupted load or unload left
    const uint32_t slots =
        options.slots.value_or(pinned.frozen != nullptr ? pinned.slots - 1 : kDefaultSlots);
    if (pinned.frozen != nullptr) {
        printf("schedmirror: removed the mirror at %s, whose %s were frozen\n", dir.c_str(), pinned.frozen);
        if (!options.group) group = pinned.group;
    }
    try {
        load_and_pin(dir, slots + 1, group);
    } catch (...) {
        unpin(dir);
        take_back_passage(dir);
        rmdir(dir.c_str());
        throw;
    }
    printf("schedmirror: loaded at %s (mode 0750, its maps 0660) with %u slots for group %s\n", dir.c_str(),
           slots, group_name(group).c_str());
    return kDone;
}

int unload(const std::string& dir) {
    libbpf_set_print(talk);
    Descriptor directory = lock(dir);
    const bool loaded = directory.fd >= 0 && inspect(dir).what != Found::nothing;
    if (loaded) remove_all(dir);
    take_back_passage(dir);  // also after a load that was killed before it pinned anything
    if (rmdir(dir.c_str()) != 0 && loaded) refuse("cannot remove " + dir + ": " + reason());
    printf("schedmirror: %s %s\n", loaded ? "unloaded from" : "not loaded at", dir.c_str());
    return kDone;
}

int status(const std::string& dir) {
    libbpf_set_print(talk);
    if (access(dir.c_str(), F_OK) != 0 && errno == ENOENT) {
        printf("not loaded (%s)\n", dir.c_str());
        return kNotLoaded;
    }
    const Pinned pinned = inspect(dir);
    if (pinned.what == Found::other_version) {
        printf("layout version %u loaded at %s; this command has %u\n", pinned.version, dir.c_str(),
               SCHED_MIRROR_VERSION);
        return kNotLoaded;
    }
    if (pinned.frozen != nullptr) {
        printf(
            "not usable: %s is frozen, as members of the group can do: `schedmirror load` replaces the "
            "mirror\n",
            path(dir, pinned.frozen).c_str());
        return kNotLoaded;
    }
    if (pinned.what != Found::mirror) {
        printf("not loaded (%s is incomplete)\n", dir.c_str());
        return kNotLoaded;
    }
    Mirror mirror;
    Error error;
    if (!mirror.open_bpf(dir.c_str(), &error)) refuse(error.text);
    printf("loaded at %s, layout version %u, for group %s\n", dir.c_str(), pinned.version,
           group_name(pinned.group).c_str());
    printf("slots: %u used of %u\n", mirror.used(), mirror.capacity());
    describe_program(dir, "sched_switch");
    describe_program(dir, "process_exit");
    for (uint32_t slot = 1; slot <= mirror.capacity(); slot++) {
        const SlotInfo info = mirror.info(static_cast<SlotId>(slot));
        if (info.state == SchedState::unknown || info.state == SchedState::dead) continue;
        printf("slot %u: pid %u, %s, cpu %u, %llu switches\n", slot, info.tid, name_of(info.state), info.cpu,
               static_cast<unsigned long long>(info.switches));
    }
    mirror.close();
    return kDone;
}

}  // namespace adaptive::loader
