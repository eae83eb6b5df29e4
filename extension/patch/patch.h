// Replacing functions of the running program by functions of a loaded module.
//
// PostgreSQL calls its own LWLockAcquire() directly: no PLT, no hook. A module that is loaded into the
// postmaster before it forks can still take such functions over, by writing a jump into each; every child
// inherits the patched pages. patch.cpp tells how this is done without breaking uprobes and without ever
// having memory that is writable and executable at once.
//
// Thread and process safety: install() and remove() must be called by the only thread of the process
// (checked), while none of the functions is being executed. The change is private to this process and to the
// children that it forks from then on. remove() undoes it in the calling process only.
//
// Errors: nothing is thrown. Whatever is not fully understood is refused with a reason, and then the program
// is as it was.
#pragma once

namespace adaptive::patch {

inline constexpr int kMostFunctions = 64;

struct Replacement {
    const char* name;   // the symbol; must stay valid
    void* original;     // entry of that function, in the main program or in a library
    void* replacement;  // same prototype, in any module
    int int_args;  // how many integer or pointer arguments the function takes in registers: what must survive
                   // the original's first instruction
    // The function's variables tell a copy of any of the functions: nothing but these functions may use a
    // variable that all functions marked so use.
    bool marks_copies = false;
};

struct Result {
    bool ok;
    int replaced;  // how many functions go to their replacement now
    bool intact;   // false: the program's code could not be put back as it was; the process must not go on
    char reason[256];  // one line, empty when ok
};

// Makes every call of each `original` run its `replacement`: all of them or none. 1 to kMostFunctions
// functions, all in the code of one object file, which is not this module or the C library; one installation
// at a time.
Result install(const Replacement* replacements, int n) noexcept;

// What install() finds copies of functions by is not told by the code of every processor.
extern const bool finds_copies;

// Why a program may have copies of functions that install() does not find, as link-time optimization makes them; null: it
// has none. `configured` is how the program was configured to be built, empty where it does not say; `flags` all that it
// says of its compiler's and linker's flags; `can_find`: finds_copies, of the processor that it is for.
const char* why_copies_may_stay(const char* configured, const char* flags, bool can_find) noexcept;

// Puts the program's own bytes back. No effect when nothing is installed.
Result remove() noexcept;

}  // namespace adaptive::patch
