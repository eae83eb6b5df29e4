#include "program_text.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#ifndef MAP_FIXED_NOREPLACE
#define MAP_FIXED_NOREPLACE 0x100000
#endif

namespace adaptive::patch {
namespace {

struct Mapping {
    uintptr_t start, end;
    uint64_t file_offset;
    char permissions[5];
    char path[PATH_MAX];
};

// The lines of /proc/self/maps, in ascending order of address.
class Mappings {
  public:
    Mappings() noexcept : file_(std::fopen("/proc/self/maps", "re")) {}
    ~Mappings() {
        std::free(line_);
        if (file_) std::fclose(file_);
    }
    Mappings(const Mappings&) = delete;
    Mappings& operator=(const Mappings&) = delete;

    bool readable() const noexcept { return file_ != nullptr; }

    bool next(Mapping* m) noexcept {
        const ssize_t length = file_ ? getline(&line_, &size_, file_) : -1;
        if (length <= 0) return false;
        if (line_[length - 1] == '\n') line_[length - 1] = '\0';
        int path = 0;
        if (std::sscanf(line_, "%" SCNxPTR "-%" SCNxPTR " %4s %" SCNx64 " %*s %*s %n", &m->start, &m->end,
                        m->permissions, &m->file_offset, &path) != 4)
            return false;
        std::snprintf(m->path, sizeof m->path, "%s", line_ + path);
        return true;
    }

  private:
    FILE* file_;
    char* line_ = nullptr;
    size_t size_ = 0;
};

bool continues(const Mapping& run, const Mapping& m) {
    return m.start == run.end && m.file_offset == run.file_offset + (run.end - run.start) &&
           std::strcmp(m.permissions, run.permissions) == 0 && std::strcmp(m.path, run.path) == 0;
}

constexpr uintptr_t kLowestAddress = 0x10000;  // vm.mmap_min_addr, usually

struct Pages {
    void* start;
    size_t bytes;
};

Pages pages_of(const void* address, size_t bytes) {
    const uintptr_t mask = page_size() - 1, at = reinterpret_cast<uintptr_t>(address);
    const uintptr_t start = at & ~mask, end = (at + bytes + mask) & ~mask;
    return {reinterpret_cast<void*>(start), end - start};
}

}  // namespace

size_t page_size() noexcept {
    return static_cast<size_t>(sysconf(_SC_PAGESIZE));
}

bool ProgramText::open(const void* address, char* why, size_t why_size) noexcept {
    const uintptr_t at = reinterpret_cast<uintptr_t>(address);
    Mappings mappings;
    if (!mappings.readable()) {
        std::snprintf(why, why_size, "cannot be located: /proc/self/maps: %s", std::strerror(errno));
        return false;
    }
    Mapping run = {}, m;  // of mappings that differ only in having been changed or not
    while (mappings.next(&m)) {
        if (continues(run, m)) {
            run.end = m.end;
        } else if (at >= run.start && at < run.end) {
            break;
        } else {
            run = m;
        }
    }
    if (at < run.start || at >= run.end) {
        std::snprintf(why, why_size, "lies in memory that /proc/self/maps does not list");
        return false;
    }
    if (std::strcmp(run.permissions, "r-xp") != 0 || run.path[0] != '/') {
        std::snprintf(why, why_size, "lies in memory that is not a program's code (%s %.100s)",
                      run.permissions, run.path);
        return false;
    }
    std::memcpy(path_, run.path, sizeof path_);
    struct stat status;
    fd_ = ::open(path_, O_RDONLY | O_CLOEXEC);
    if (fd_ < 0 || fstat(fd_, &status) != 0) {
        std::snprintf(why, why_size, "cannot be compared with its file: %.100s: %s", path_,
                      std::strerror(errno));
        close();
        return false;
    }
    start_ = run.start;
    end_ = run.end;
    file_offset_ = run.file_offset;
    device_ = status.st_dev;
    inode_ = status.st_ino;
    return true;
}

bool ProgramText::reopen() noexcept {
    struct stat status;
    fd_ = ::open(path_, O_RDONLY | O_CLOEXEC);
    if (fd_ >= 0 && fstat(fd_, &status) == 0 && status.st_dev == device_ && status.st_ino == inode_)
        return true;
    close();
    return false;
}

void ProgramText::close() noexcept {
    if (fd_ >= 0) ::close(fd_);
    fd_ = -1;
}

bool ProgramText::contains(const void* address, size_t bytes) const noexcept {
    const uintptr_t at = reinterpret_cast<uintptr_t>(address);
    return at >= start_ && at < end_ && bytes <= end_ - at;
}

bool ProgramText::read_file(const void* address, uint8_t* out, size_t bytes) const noexcept {
    const uint64_t offset = reinterpret_cast<uintptr_t>(address) - start_ + file_offset_;
    return pread(fd_, out, bytes, static_cast<off_t>(offset)) == static_cast<ssize_t>(bytes);
}

ProgramText::Outcome ProgramText::write(void* address, const uint8_t* code, size_t bytes) const noexcept {
    const Pages pages = pages_of(address, bytes);
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);

    Outcome outcome = Outcome::unchanged;
    int error = 0;
    if (mprotect(pages.start, pages.bytes, PROT_READ | PROT_WRITE) != 0) {
        error = errno;
    } else {
        char* at = static_cast<char*>(address);
        std::memcpy(at, code, bytes);
        __builtin___clear_cache(at, at + bytes);
        if (mprotect(pages.start, pages.bytes, PROT_READ | PROT_EXEC) == 0) {
            outcome = Outcome::done;
        } else {
            error = errno;
            outcome = reset(address, bytes) ? Outcome::reset : Outcome::lost;
        }
    }

    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    errno = error;
    return outcome;
}

// A policy that forbids "was written, becomes executable" (SELinux execmod, seccomp, PR_SET_MDWE) still
// allows what every program start does: map a file's code.
bool ProgramText::reset(void* address, size_t bytes) const noexcept {
    const Pages pages = pages_of(address, bytes);
    const uint64_t offset = reinterpret_cast<uintptr_t>(pages.start) - start_ + file_offset_;
    return fd_ >= 0 && mmap(pages.start, pages.bytes, PROT_READ | PROT_EXEC, MAP_PRIVATE | MAP_FIXED, fd_,
                            static_cast<off_t>(offset)) == pages.start;
}

// Tries the gaps below the object, the nearest first.
void* ProgramText::allocate_near(size_t bytes, uintptr_t reach) const noexcept {
    const uintptr_t lowest = end_ > reach ? end_ - reach : 0;
    uintptr_t limit = start_;
    for (int attempt = 0; attempt < 64; attempt++) {
        uintptr_t best = 0, gap = kLowestAddress;
        Mappings mappings;
        for (Mapping m; gap < limit && mappings.next(&m); gap = m.end) {
            const uintptr_t top = m.start < limit ? m.start : limit;
            if (top >= gap + bytes && top - bytes >= lowest) best = top - bytes;
        }
        if (best == 0) return nullptr;

        void* wanted = reinterpret_cast<void*>(best);
        void* got = mmap(wanted, bytes, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
        if (got == wanted) return got;
        if (got != MAP_FAILED) munmap(got, bytes);  // before Linux 4.17 the flag is only a hint
        limit = best;
    }
    return nullptr;
}

}  // namespace adaptive::patch
