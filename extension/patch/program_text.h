// The executable code of one object file (the program or a library), in memory and in its file.
//
// Thread and process safety: for the only thread of a process. Errors: false and errno, or an Outcome.
#pragma once

#include <sys/types.h>

#include <climits>
#include <cstddef>
#include <cstdint>

namespace adaptive::patch {

class ProgramText {
  public:
    enum class Outcome {
        done,
        unchanged,  // refused before anything was touched; errno says why
        reset,  // refused on the way: the pages hold what the file holds, other changes in them are gone too
        lost    // the pages could not be made executable again
    };

    // Finds the mapping that `address` lies in and opens its file. False, and then `why` is a phrase that
    // fits after "X ", unless it is a private, not writable, executable mapping of a file.
    bool open(const void* address, char* why, size_t why_size) noexcept;
    // Opens the same file again, after close(). False when it is gone or another one has its name.
    bool reopen() noexcept;
    void close() noexcept;

    const uint8_t* begin() const noexcept { return reinterpret_cast<const uint8_t*>(start_); }
    const uint8_t* end() const noexcept { return reinterpret_cast<const uint8_t*>(end_); }
    bool contains(const void* address, size_t bytes) const noexcept;
    bool read_file(const void* address, uint8_t* out, size_t bytes) const noexcept;

    // Changes code in memory. The pages that hold it are readable and writable, then readable and executable,
    // never both; in between no signal handler runs. The caller, and all it needs for this, must be in
    // another object.
    Outcome write(void* address, const uint8_t* code, size_t bytes) const noexcept;
    // Maps the file anew over the pages that hold these bytes.
    bool reset(void* address, size_t bytes) const noexcept;

    // A fresh private page, readable and writable, from which all of this code is at most `reach` away, or
    // null. It lies below the object, never above, where the program's heap grows.
    void* allocate_near(size_t bytes, uintptr_t reach) const noexcept;

  private:
    uintptr_t start_ = 0, end_ = 0;
    uint64_t file_offset_ = 0;
    int fd_ = -1;
    dev_t device_ = 0;
    ino_t inode_ = 0;
    char path_[PATH_MAX] = {};
};

size_t page_size() noexcept;

}  // namespace adaptive::patch
