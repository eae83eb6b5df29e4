// How a function is replaced, and why the jump is not at its entry.
//
// The problem. The obvious way is to overwrite a function's first bytes by a jump. Then an operator attaches
// a uprobe (perf, bpftrace) to the function. The kernel knows the program by its *file*: it puts a breakpoint
// on the first byte in memory, and when it is hit, it executes the instruction that the file has there, `push
// %rbp`, one byte, and goes on at offset 1: in the middle of the jump. Every backend dies. A debugger that
// stepped over its breakpoint would be no better off.
//
// The cure. The first instruction stays untouched, the jump is placed behind it, and what that instruction
// did is undone before the replacement runs:
//
//     LWLockAcquire:   55                push %rbp            as in the file: a uprobe's breakpoint sits here
//                      e9 rel32          jmp  thunk           over mov %rsp,%rbp; push %r15
//                      ...                                    never executed again
//     thunk:           5d                pop  %rbp
//                      3e ff 25 0        notrack jmp *0(%rip)
//                      .quad replacement
//
// The replacement sees the registers and the stack of a call, so arguments, uretprobes (they exchange the
// return address before the first instruction) and shadow stacks work. This needs a first instruction that
// can be undone (a push, lowering the stack pointer, signing the return address), that does nothing (endbr64,
// bti) or that only writes what a function may spoil and no argument is in. x86_64.cpp and aarch64.cpp list
// them; anything else is refused.
//
// The rest of the old function is dead: it can only be entered through its entry. Hence it does not matter
// that the jump may end within an instruction, nor whether a loop in there leads back under it.
//
// Safety. The bytes in memory must be those of the file: otherwise someone else has already changed the
// function, and two patches would not undo each other. One difference is accepted, a breakpoint on the entry:
// a uprobe attached before the server started, which is no patch and is served as above. The thunks are made
// executable first, so a system that forbids this (SELinux, systemd's MemoryDenyWriteExecute) says so before
// the program was touched; when it objects only later, the program's pages are mapped again from the file.
// Memory is never writable and executable.
//
// Copies. A replaced function must be the only one that does its work. Link-time optimization inlines
// functions into callers in other files, and clones them for some callers, while the symbol stays where it
// was: who calls a copy would miss the replacement and the state that it keeps. Symbols do not tell, servers
// are stripped. But a copy uses the static variables of the original, so all code is searched for
// instructions that name one of these. Some bytes only look like such an instruction: in five megabytes of
// code that costs one build in ten thousand its replacement, no more.
//
// What it makes unusable: breakpoints and uprobes *inside* the few bytes under the jump must not be set, and
// those further inside the old function, including its static probes, do not fire. The thunk has no unwind
// information; a profiler's sample in its two instructions may miss the caller, no more. On aarch64 a changed
// page no longer has PROT_BTI.
#include "patch.h"

#include <dirent.h>
#include <dlfcn.h>
#include <elf.h>
#include <link.h>
#include <sys/mman.h>
#include <sys/prctl.h>

#include <cerrno>
#include <cinttypes>
#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "machine.h"
#include "program_text.h"

#ifndef PR_SET_VMA
#define PR_SET_VMA 0x53564d41
#define PR_SET_VMA_ANON_NAME 0
#endif

namespace adaptive::patch {
namespace {

constexpr size_t kMostEntryBytes = 16;  // the longest x86-64 instruction has 15
constexpr const char* kThunksName = "adaptive_lwlock thunks";

struct Patch {
    const char* name;
    uint8_t* entry;
    size_t size;
    uint8_t* at;  // where the jump goes: behind the first instruction
    uintptr_t replacement;
    FirstInstruction first;
    uint8_t original[native::kJumpBytes];
    uint8_t jump[native::kJumpBytes];
};

struct Installation {
    ProgramText text;
    Patch patches[kMostFunctions];
    int n;  // 0: nothing is installed
    void* thunks;
    size_t thunk_bytes;
};

Installation installed;

Result success(int replaced) {
    return {true, replaced, true, ""};
}

__attribute__((format(printf, 1, 2))) Result refusal(const char* format, ...) {
    Result result = {false, 0, true, ""};
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(result.reason, sizeof result.reason, format, arguments);
    va_end(arguments);
    return result;
}

int count_threads() {
    DIR* tasks = opendir("/proc/self/task");
    if (tasks == nullptr) return -1;
    int n = 0;
    while (const dirent* entry = readdir(tasks))
        if (entry->d_name[0] != '.') n++;
    closedir(tasks);
    return n;
}

Result check_single_threaded() {
    const int threads = count_threads();
    if (threads < 1)
        return refusal("cannot count the threads of this process: /proc/self/task: %s", std::strerror(errno));
    if (threads > 1) return refusal("this process already has %d threads", threads);
    return success(0);
}

const void* object_of(const void* address) {
    Dl_info info;
    return dladdr(address, &info) ? info.dli_fbase : nullptr;
}

// While a page of the program is not executable, this module and the C library must be.
bool is_needed_for_patching(const void* address) {
    const void* object = object_of(address);
    return object == object_of(reinterpret_cast<const void*>(&install)) ||
           object == object_of(reinterpret_cast<const void*>(&mprotect));
}

void print_bytes(char* out, size_t size, const uint8_t* bytes, size_t n) {
    size_t at = 0;
    for (size_t i = 0; i < n && at + 4 <= size; i++)
        at += static_cast<size_t>(std::snprintf(out + at, size - at, i ? " %02x" : "%02x", bytes[i]));
}

// Fills `patch`, or says why this function cannot be replaced.
Result examine(const ProgramText& text, const Replacement& wanted, Patch* patch) {
    const char* name = wanted.name;
    Dl_info info;
    const ElfW(Sym)* symbol = nullptr;
    if (!dladdr1(wanted.original, &info, reinterpret_cast<void**>(const_cast<ElfW(Sym)**>(&symbol)),
                 RTLD_DL_SYMENT) ||
        symbol == nullptr || info.dli_saddr != wanted.original)
        return refusal("function %s has no symbol, so its length is not known", name);
    if (!text.contains(wanted.original, symbol->st_size))
        return refusal("function %s is not in the same code as the others", name);
    if (std::strcmp(info.dli_sname, name) != 0)
        return refusal("function %s shares its code with %s", name, info.dli_sname);
    if (ELF64_ST_TYPE(symbol->st_info) != STT_FUNC) return refusal("symbol %s is not a function", name);

    uint8_t file[kMostEntryBytes + kMostJumpBytes] = {};
    const size_t known = symbol->st_size < sizeof file ? symbol->st_size : sizeof file;
    if (!text.read_file(wanted.original, file, known))
        return refusal("cannot read the file that %s comes from", name);

    patch->name = name;
    patch->entry = static_cast<uint8_t*>(wanted.original);
    patch->size = symbol->st_size;
    patch->replacement = reinterpret_cast<uintptr_t>(wanted.replacement);
    if (!native::recognise(file, known, wanted.int_args, &patch->first)) {
        char bytes[3 * kMostEntryBytes + 1] = "";
        print_bytes(bytes, sizeof bytes, file, known < 12 ? known : 12);
        return refusal("function %s begins with an instruction that is not recognised: %s", name, bytes);
    }
    const size_t first = patch->first.length, needed = first + native::kJumpBytes;
    if (symbol->st_size < needed)
        return refusal("function %s is too short to be replaced: %zu bytes, %zu needed", name,
                       static_cast<size_t>(symbol->st_size), needed);

    const bool has_breakpoint = native::is_breakpoint(patch->entry) && !native::is_breakpoint(file);
    const size_t skip = has_breakpoint ? native::kBreakpointBytes : 0;
    if (std::memcmp(patch->entry + skip, file + skip, needed - skip) != 0) {
        char bytes[3 * kMostEntryBytes + 1] = "";
        print_bytes(bytes, sizeof bytes, patch->entry, needed);
        return refusal("function %s was already changed by another module: %s", name, bytes);
    }

    patch->at = patch->entry + first;
    std::memcpy(patch->original, file + first, sizeof patch->original);
    return success(1);
}

}  // namespace

const bool finds_copies = native::kDataBytes != 0;

namespace {

// The static variables that every function which marks copies uses.
struct Marks {
    static constexpr int kMost = 8;
    uintptr_t data[kMost];
    int n = -1;  // there was no such function yet

    bool has(uintptr_t address) const noexcept {
        for (int i = 0; i < n; i++)
            if (data[i] == address) return true;
        return false;
    }
    void intersect(const uint8_t* code, size_t size) noexcept {
        Marks both;
        both.n = 0;
        for (const uint8_t* at = code; at + native::kDataBytes <= code + size && both.n < kMost; at++) {
            uintptr_t address;
            if (native::names_data(at, &address) && (n < 0 || has(address)) && !both.has(address))
                both.data[both.n++] = address;
        }
        *this = both;
    }
};

// Where none can be found, why_copies_may_stay() says so.
Result check_no_copies(const ProgramText& text, const Replacement* replacements, const Patch* patches,
                       int n) {
    if (!finds_copies) return success(n);
    Marks marks;
    for (int i = 0; i < n; i++)
        if (replacements[i].marks_copies) marks.intersect(patches[i].entry, patches[i].size);
    if (marks.n < 0) return success(n);
    if (marks.n == 0) return refusal("the variables of the functions to be replaced cannot be found");

    for (const uint8_t* at = text.begin(); at + native::kDataBytes <= text.end(); at++) {
        uintptr_t address;
        if (!native::names_data(at, &address) || !marks.has(address)) continue;
        bool inside = false;
        for (int i = 0; i < n; i++)
            inside |= at >= patches[i].entry && at < patches[i].entry + patches[i].size;
        if (inside) continue;
        const auto base = reinterpret_cast<uintptr_t>(object_of(at));
        return refusal("the program has a copy of a function to be replaced, at 0x%" PRIxPTR
                       " (a build with link-time optimization?)",
                       reinterpret_cast<uintptr_t>(at) - base);
    }
    return success(n);
}

Result examine_all(ProgramText& text, const Replacement* replacements, int n, Patch* patches) {
    char why[200];
    if (!text.open(replacements[0].original, why, sizeof why))
        return refusal("function %s %s", replacements[0].name, why);
    if (is_needed_for_patching(replacements[0].original))
        return refusal("function %s is in code that is needed to replace it", replacements[0].name);
    for (int i = 0; i < n; i++) {
        const Result result = examine(text, replacements[i], &patches[i]);
        if (!result.ok) return result;
        for (int j = 0; j < i; j++)
            if (patches[j].entry == patches[i].entry)
                return refusal("functions %s and %s share their code", patches[j].name, patches[i].name);
    }
    return check_no_copies(text, replacements, patches, n);
}

// Children inherit the thunks as they inherit the patched pages.
Result make_thunks(Installation* in, int n) {
    const size_t mask = page_size() - 1;
    in->thunk_bytes = (static_cast<size_t>(n) * kThunkBytes + mask) & ~mask;
    in->thunks = in->text.allocate_near(in->thunk_bytes, native::kReach);
    if (in->thunks == nullptr) return refusal("no memory within a jump's reach of the program's code");

    uint8_t* thunk = static_cast<uint8_t*>(in->thunks);
    for (int i = 0; i < n; i++, thunk += kThunkBytes) {
        Patch& patch = in->patches[i];
        native::encode_thunk(thunk, patch.first, patch.replacement);
        native::encode_jump(patch.jump, reinterpret_cast<uintptr_t>(patch.at),
                            reinterpret_cast<uintptr_t>(thunk));
    }
    char* begin = static_cast<char*>(in->thunks);
    __builtin___clear_cache(begin, begin + in->thunk_bytes);
    if (mprotect(in->thunks, in->thunk_bytes, PROT_READ | PROT_EXEC) != 0) {
        const int error = errno;
        munmap(in->thunks, in->thunk_bytes);
        return refusal("this system does not allow generated code to be made executable: %s",
                       std::strerror(error));
    }
    prctl(PR_SET_VMA, PR_SET_VMA_ANON_NAME, in->thunks, in->thunk_bytes,
          kThunksName);  // a courtesy, may fail
    return success(n);
}

bool holds(const Patch& patch, const uint8_t* bytes) {
    return std::memcmp(patch.at, bytes, native::kJumpBytes) == 0;
}

// Puts the original bytes of the first `n` functions back, by all means. False when some could not be.
bool restore(const Installation& in, int n) {
    bool all = true;
    for (int i = 0; i < n; i++) {
        const Patch& patch = in.patches[i];
        if (!holds(patch, patch.original)) {
            const auto outcome = in.text.write(patch.at, patch.original, sizeof patch.original);
            if (outcome == ProgramText::Outcome::unchanged) in.text.reset(patch.at, sizeof patch.original);
            if (outcome == ProgramText::Outcome::lost) return false;
        }
        all = all && holds(patch, patch.original);
    }
    return all;
}

Result write_jumps(const Installation& in, int n) {
    for (int i = 0; i < n; i++) {
        const Patch& patch = in.patches[i];
        const auto outcome = in.text.write(patch.at, patch.jump, sizeof patch.jump);
        const int error = errno;
        if (outcome == ProgramText::Outcome::done && holds(patch, patch.jump)) continue;

        Result result = outcome == ProgramText::Outcome::done
                            ? refusal("function %s does not keep the change", patch.name)
                            : refusal("this system does not allow function %s to be changed: %s", patch.name,
                                      std::strerror(error));
        result.intact = outcome != ProgramText::Outcome::lost && restore(in, i + 1);
        return result;
    }
    return success(n);
}

}  // namespace

const char* why_copies_may_stay(const char* configured, const char* flags, bool can_find) noexcept {
    // Copies of functions that do not use what marks them cannot be found.
    if (std::strstr(flags, "-flto") != nullptr)
        return "the server was built with link-time optimization, which inlines and clones functions";
    // Builds by Meson do not record it.
    if (configured[0] == '\0' && !can_find)
        return "the server does not say whether it was built with link-time optimization (a build by "
               "Meson?), and this "
               "module cannot find out on this processor: build the server with configure";
    return nullptr;
}

Result install(const Replacement* replacements, int n) noexcept {
    if (installed.n != 0) return refusal("functions have already been replaced");
    if (n < 1 || n > kMostFunctions) return refusal("cannot replace %d functions at once", n);
    Result result = check_single_threaded();
    if (!result.ok) return result;

    result = examine_all(installed.text, replacements, n, installed.patches);
    if (result.ok) result = make_thunks(&installed, n);
    if (result.ok) {
        result = write_jumps(installed, n);
        if (result.ok)
            installed.n = n;
        else if (result.intact)
            munmap(installed.thunks, installed.thunk_bytes);
    }
    installed.text.close();
    return result;
}

Result remove() noexcept {
    if (installed.n == 0) return success(0);
    Result result = check_single_threaded();
    for (int i = 0; result.ok && i < installed.n; i++) {
        const Patch& patch = installed.patches[i];
        if (!holds(patch, patch.jump) && !holds(patch, patch.original))
            result = refusal("function %s was changed by another module since", patch.name);
    }
    if (!result.ok) {
        result.replaced = installed.n;
        return result;
    }

    installed.text.reopen();  // for the last resort only: without it the attempt is worth making
    const bool restored = restore(installed, installed.n);
    installed.text.close();
    if (!restored) {
        result = refusal("the program's own code could not be put back");
        result.intact = false;
        return result;
    }
    munmap(installed.thunks, installed.thunk_bytes);
    installed.n = 0;
    return success(0);
}

}  // namespace adaptive::patch
