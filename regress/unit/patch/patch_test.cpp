// install() and remove() on hand-written functions (targets_*.S), under uprobes, and with every system call
// failing.
//
// Patching changes a process for good, so each test does it in a child; a child returns its complaint as a
// string.
#include "patch/patch.h"

#include <dlfcn.h>
#include <gtest/gtest.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/perf_event.h>
#include <linux/seccomp.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <functional>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "../processes.h"
#include "patch/machine.h"

#if defined(__x86_64__)
#include <sys/user.h>
#endif

extern "C" {
int call_and_check(void* function, const long* arguments, long* result);
void count_signal(int);
// Takes its arguments as the originals do; the second may be an int that was widened.
long replacement(long a, long b, long c, long d, long e, long f) {
    return 2000000 + a + 2 * b + 3 * c + 5 * d + 7 * e + 11 * f;
}
long replacement_of_two(long a, long b) {
    return replacement(a, b, 0, 0, 0, 0);
}
}

namespace adaptive::patch {
namespace {

struct Target {
    const char* name;
    int int_args;
};

#if defined(__x86_64__)
const std::vector<Target> kTargets = {
    {"push_rbp", 6},
    {"push_rbx", 6},
    {"push_r15", 6},
    {"push_r12", 6},
    {"load_int", 6},
    {"lower_sp_little", 6},
    {"lower_sp_much", 6},
    {"landing_pad", 6},
    {"load_free_argument", 2},
    {"load_wide", 6},
    {"address", 6},
    {"widen_in_place", 6},
    {"clear", 6},
    {"copy_argument", 6},
    {"constant", 6},
    {"test_argument", 6},
    {"compare_memory", 6},
    {"two_pages", 6},
    {"just_long_enough", 6},
};
#else
const std::vector<Target> kTargets = {
    {"push_pair", 6},       {"push_pair_much", 6}, {"push_one", 6},
    {"lower_sp_little", 6}, {"lower_sp_much", 6},  {"landing_pad", 6},
    {"sign_return", 6},     {"address", 6},        {"load_free_argument", 2},
    {"widen_in_place", 6},  {"copy_argument", 6},  {"constant", 6},
    {"compare", 6},
};
#endif

uint8_t* address_of(const char* name) {
    return static_cast<uint8_t*>(dlsym(RTLD_DEFAULT, name));
}

Replacement replace(const char* name, int int_args = 6) {
    void* const by =
        int_args == 6 ? reinterpret_cast<void*>(&replacement) : reinterpret_cast<void*>(&replacement_of_two);
    return {name, address_of(name), by, int_args};
}

std::vector<Replacement> replace_all() {
    std::vector<Replacement> all;
    for (const Target& target : kTargets) all.push_back(replace(target.name, target.int_args));
    return all;
}

Result install_all() {
    const auto all = replace_all();
    return install(all.data(), static_cast<int>(all.size()));
}

// Empty when the function was reached by `base` (1000000: itself, 2000000: its replacement), with its
// arguments, and with the caller's registers kept.
std::string call(const Target& target, long base) {
    long arguments[6] = {101, 103, 107, 109, 113, 127}, result = 0;
    for (int i = target.int_args; i < 6; i++) arguments[i] = 0;
    const long expected =
        replacement(arguments[0], arguments[1], arguments[2], arguments[3], arguments[4], arguments[5]) -
        2000000 + base;
    if (call_and_check(address_of(target.name), arguments, &result) != 0)
        return std::string(target.name) + ": a callee-saved register was lost";
    // What the original computes from an argument that its first instruction may spoil does not matter.
    if (result != expected && (base == 2000000 || target.int_args == 6))
        return std::string(target.name) + ": returned " + std::to_string(result) + " for " +
               std::to_string(expected);
    return "";
}

std::string call_all(long base) {
    for (const Target& target : kTargets)
        if (auto complaint = call(target, base); !complaint.empty()) return complaint;
    return "";
}

constexpr long kOriginal = 1000000, kReplaced = 2000000;

std::string writable_and_executable(pid_t pid) {
    std::ifstream maps("/proc/" + std::to_string(pid) + "/maps");
    for (std::string line; std::getline(maps, line);)
        if (line.find(" rwx") != std::string::npos) return line;
    return "";
}

using Body = std::function<std::string()>;

// A forked process that runs `body` and sends back what it returns.
class Child {
  public:
    explicit Child(const Body& body) {
        int fd[2];
        if (pipe(fd) != 0) abort();
        const pid_t parent = getpid();
        pid_ = fork();
        if (pid_ == 0) {
            test::die_with(parent);
            close(fd[0]);
            const std::string complaint = body();
            if (write(fd[1], complaint.data(), complaint.size()) < 0) _exit(3);
            _exit(0);
        }
        close(fd[1]);
        fd_ = fd[0];
    }
    Child(const Child&) = delete;
    Child& operator=(const Child&) = delete;
    ~Child() { close(fd_); }

    pid_t pid() const { return pid_; }

    std::string join() {
        int status;
        waitpid(pid_, &status, 0);
        return verdict(status);
    }
    // For who has waited for it already.
    std::string verdict(int status) {
        std::string complaint;
        char buffer[1024];
        for (ssize_t n; (n = read(fd_, buffer, sizeof buffer)) > 0;)
            complaint.append(buffer, static_cast<size_t>(n));
        if (WIFSIGNALED(status))
            return std::string("killed: ") + strsignal(WTERMSIG(status)) + " " + complaint;
        if (WEXITSTATUS(status) != 0) return "exit status " + std::to_string(WEXITSTATUS(status));
        return complaint;
    }

  private:
    pid_t pid_;
    int fd_;
};

std::string in_child(const Body& body) {
    return Child(body).join();
}

std::string expect_refusal(const Result& result, const char* part) {
    if (result.ok) return "was not refused";
    if (!result.intact) return "left the program broken";
    if (result.replaced != 0) return "says that some functions are replaced";
    if (!std::strstr(result.reason, part)) return std::string("reason: ") + result.reason;
    return "";
}

std::string refuses(std::vector<Replacement> wanted, const char* part) {
    return in_child([&]() -> std::string {
        auto complaint = expect_refusal(install(wanted.data(), static_cast<int>(wanted.size())), part);
        return complaint.empty() ? call_all(kOriginal) : complaint;
    });
}

TEST(Patch, ReplacesAndRestores) {
    EXPECT_EQ(in_child([]() -> std::string {
                  for (int round = 0; round < 20; round++) {
                      if (auto complaint = call_all(kOriginal); !complaint.empty()) return complaint;
                      const Result result = install_all();
                      if (!result.ok) return result.reason;
                      if (result.replaced != static_cast<int>(kTargets.size()) || !result.intact)
                          return "wrong result";
                      if (auto complaint = call_all(kReplaced); !complaint.empty()) return complaint;
                      if (auto line = writable_and_executable(getpid()); !line.empty()) return line;
                      const Result removed = remove();
                      if (!removed.ok || removed.replaced != 0) return removed.reason;
                  }
                  return call_all(kOriginal);
              }),
              "");
}

TEST(Patch, LeavesTheFirstInstruction) {
    EXPECT_EQ(in_child([]() -> std::string {
                  const Target& target = kTargets[0];
                  uint8_t before[16];
                  std::memcpy(before, address_of(target.name), sizeof before);
                  const Replacement one = replace(target.name);
                  FirstInstruction first;
                  if (!native::recognise(before, sizeof before, 6, &first)) return "not recognised";
                  if (!install(&one, 1).ok) return "not installed";
                  if (std::memcmp(before, address_of(target.name), first.length) != 0) return "changed";
                  if (std::memcmp(before, address_of(target.name), sizeof before) == 0)
                      return "nothing changed";
                  const size_t end = first.length + native::kJumpBytes;
                  if (std::memcmp(before + end, address_of(target.name) + end, sizeof before - end) != 0)
                      return "changed more than the jump";
                  return remove().ok && std::memcmp(before, address_of(target.name), sizeof before) == 0
                             ? ""
                             : "left over";
              }),
              "");
}

TEST(Patch, ChildrenInheritAndMayRemove) {
    EXPECT_EQ(in_child([]() -> std::string {
                  if (!install_all().ok) return "not installed";
                  auto complaint = in_child([]() -> std::string {
                      if (auto inner = call_all(kReplaced); !inner.empty()) return inner;
                      return remove().ok ? call_all(kOriginal) : "not removed";
                  });
                  return complaint.empty() ? call_all(kReplaced) : complaint;
              }),
              "");
}

TEST(Patch, RemoveWithoutInstallDoesNothing) {
    EXPECT_TRUE(remove().ok);
}

TEST(Patch, InstallsOnce) {
    EXPECT_EQ(in_child([]() -> std::string {
                  if (!install_all().ok) return "not installed";
                  const Result again = install_all();
                  return again.ok || !std::strstr(again.reason, "already been replaced")
                             ? "twice"
                             : call_all(kReplaced);
              }),
              "");
}

TEST(PatchRefuses, WhatItDoesNotUnderstand) {
    EXPECT_EQ(refuses({replace("unknown_instruction")},
                      "unknown_instruction begins with an instruction that is not recognised: "),
              "");
    EXPECT_EQ(refuses({replace("too_short")}, "too_short is too short"), "");
    EXPECT_EQ(refuses({replace("spoils_argument", 2)}, "spoils_argument begins with"), "");
    EXPECT_EQ(in_child([]() -> std::string {
                  const Replacement one = replace("spoils_argument", 1);
                  return install(&one, 1).reason;
              }),
              "");
}

TEST(PatchRefuses, AllWhenOneIsRefused) {
    auto wanted = replace_all();
    wanted.push_back(replace("unknown_instruction"));
    EXPECT_EQ(refuses(wanted, "unknown_instruction"), "");
}

TEST(PatchRefuses, WrongNumbers) {
    EXPECT_EQ(refuses({}, "cannot replace 0 functions"), "");
    EXPECT_EQ(refuses(std::vector<Replacement>(kMostFunctions + 1, replace(kTargets[0].name)),
                      "cannot replace 65 functions"),
              "");
}

TEST(PatchRefuses, SharedCode) {
    const bool one_is_named_two = [] {
        Dl_info info;
        return dladdr(address_of("alias_one"), &info) && std::strcmp(info.dli_sname, "alias_two") == 0;
    }();
    EXPECT_EQ(refuses({replace(one_is_named_two ? "alias_one" : "alias_two")}, "shares its code with alias_"),
              "");
    EXPECT_EQ(refuses({replace(kTargets[0].name), replace(kTargets[0].name)}, "share their code"), "");
}

TEST(PatchRefuses, WhatIsNoFunctionOfTheProgram) {
    const char* name = kTargets[0].name;
    void* own = reinterpret_cast<void*>(&replacement);
    EXPECT_EQ(refuses({{"middle", address_of(name) + 4, own, 6}}, "has no symbol"), "");
    EXPECT_EQ(refuses({{"null", nullptr, own, 6}}, "does not list"), "");
    EXPECT_EQ(refuses({{"replacement", own, own, 6}}, "needed to replace it"), "");
    EXPECT_EQ(refuses({{"mprotect", dlsym(RTLD_DEFAULT, "mprotect"), own, 3}}, "needed to replace it"), "");
    EXPECT_EQ(refuses({replace(name), {"mprotect", dlsym(RTLD_DEFAULT, "mprotect"), own, 3}},
                      "not in the same code"),
              "");
    static int data;
    EXPECT_EQ(refuses({{"data", &data, own, 6}}, "not a program's code"), "");
    void* generated = mmap(nullptr, 4096, PROT_READ | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    EXPECT_EQ(refuses({{"generated", generated, own, 6}}, "not a program's code"), "");
    munmap(generated, 4096);
}

TEST(PatchRefuses, ProcessWithThreads) {
    EXPECT_EQ(in_child([]() -> std::string {
                  std::thread([] { pause(); }).detach();
                  return expect_refusal(install_all(), "already has 2 threads");
              }),
              "");
}

// ---- copies that link-time optimization makes ----

int replaced_calls = 0;
int no_list() {
    replaced_calls++;
    return 0;
}

// Replaces the functions of a library's list, with or without a look for copies, and has the library's other
// file call one. "" when that call came to the replacement.
std::string replace_list(const char* library, const char* caller, bool look, Result* result) {
    void* const handle = dlopen(library, RTLD_NOW);
    if (handle == nullptr) return dlerror();
    const auto function = [&](const char* name, int args, bool marks) {
        return Replacement{name, dlsym(handle, name), reinterpret_cast<void*>(&no_list), args, marks};
    };
    const Replacement functions[] = {
        function("list_add", 2, false),
        function("list_clear", 0, false),
        function("list_has", 1, look),
        function("list_has_between", 2, look),
    };
    *result = install(functions, 4);
    reinterpret_cast<int (*)()>(dlsym(handle, caller))();
    return replaced_calls == 1 ? "" : "the call went past the replacement";
}

TEST(PatchCopies, NoneInSeparateFiles) {
    for (const char* caller : {"other_file_clears", "other_file_adds"}) {
        EXPECT_EQ(in_child([&]() -> std::string {
                      Result result;
                      auto complaint = replace_list("libpatch_list.so", caller, true, &result);
                      return result.ok ? complaint : result.reason;
                  }),
                  "");
    }
}

TEST(PatchCopies, AreRefused) {
    if (native::kDataBytes == 0) GTEST_SKIP() << "copies are not recognised on this architecture";
    const char* const copies[][2] = {{"libpatch_list_inlined.so", "other_file_clears"},
                                     {"libpatch_list_cloned.so", "other_file_adds"}};
    for (const auto& [library, caller] : copies) {
        EXPECT_EQ(in_child([&]() -> std::string {
                      Result result;
                      auto complaint = replace_list(library, caller, false, &result);
                      return result.ok ? complaint : result.reason;
                  }),
                  "the call went past the replacement")
            << library << " has no copy, so there is nothing to be tested";
        EXPECT_EQ(in_child([&] {
                      Result result;
                      replace_list(library, caller, true, &result);
                      return expect_refusal(result, "has a copy of a function to be replaced, at 0x");
                  }),
                  "")
            << library;
    }
}

TEST(PatchCopies, NothingToTellThemBy) {
    if (native::kDataBytes == 0) GTEST_SKIP() << "copies are not recognised on this architecture";
    Replacement one = replace("landing_pad");
    one.marks_copies = true;
    EXPECT_EQ(refuses({one}, "the variables of the functions to be replaced cannot be found"), "");
}

TEST(PatchCopies, MayStayWhereTheyCannotBeFound) {
    const auto says = [](const char* configured, const char* flags, bool can_find, const char* words) {
        const char* const why = why_copies_may_stay(configured, flags, can_find);
        return std::strstr(why != nullptr ? why : "nothing", words) != nullptr;
    };
    for (const bool can_find : {true, false}) {
        EXPECT_TRUE(says("'--prefix=/usr'", "-O2 -Wl,-z,relro", can_find, "nothing"));
        EXPECT_TRUE(
            says("'CFLAGS=-flto=auto'", "-flto=auto", can_find, "was built with link-time optimization"));
    }
    // By Meson.
    EXPECT_TRUE(says("", "-O2", true, "nothing"));
    EXPECT_TRUE(says("", "-O2", false, "does not say whether"));
#if defined(__x86_64__)
    EXPECT_TRUE(finds_copies);
#elif defined(__aarch64__)
    EXPECT_FALSE(finds_copies);
#endif
}

// Changes code as another module would: `offset` bytes behind the entry.
void scribble(const char* name, size_t offset, const void* bytes, size_t n) {
    uint8_t* at = address_of(name) + offset;
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    void* start = reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(at) & ~(page - 1));
    mprotect(start, 2 * page, PROT_READ | PROT_WRITE);
    std::memcpy(at, bytes, n);
    __builtin___clear_cache(reinterpret_cast<char*>(at), reinterpret_cast<char*>(at) + n);
    mprotect(start, 2 * page, PROT_READ | PROT_EXEC);
}

TEST(PatchRefuses, SomeoneElsesJump) {
    const char* name = kTargets[0].name;
    for (const size_t offset : {0, 4}) {
        EXPECT_EQ(in_child([&] {
                      uint8_t jump[native::kJumpBytes];
                      const auto from = reinterpret_cast<uintptr_t>(address_of(name)) + offset;
                      native::encode_jump(jump, from, from + 64);
                      scribble(name, offset, jump, sizeof jump);
                      return expect_refusal(install_all(), "was already changed by another module");
                  }),
                  "");
    }
}

TEST(PatchRefuses, ToRemoveWhatOthersChangedSince) {
    EXPECT_EQ(in_child([]() -> std::string {
                  if (!install_all().ok) return "not installed";
                  const uint32_t something = 0;
                  scribble(kTargets[1].name, 4, &something, sizeof something);
                  const Result result = remove();
                  if (result.ok || result.replaced != static_cast<int>(kTargets.size()) || !result.intact)
                      return "removed";
                  return std::strstr(result.reason, "changed by another module since") ? "" : result.reason;
              }),
              "");
}

TEST(Patch, RemovesWhatOthersPutBackToo) {
    EXPECT_EQ(in_child([]() -> std::string {
                  uint8_t before[16];
                  std::memcpy(before, address_of(kTargets[1].name), sizeof before);
                  if (!install_all().ok) return "not installed";
                  scribble(kTargets[1].name, 0, before, sizeof before);
                  if (auto complaint = call(kTargets[1], kOriginal); !complaint.empty()) return complaint;
                  const Result result = remove();
                  return result.ok ? call_all(kOriginal) : result.reason;
              }),
              "");
}

TEST(Patch, AcceptsABreakpointOnTheEntry) {
    EXPECT_EQ(in_child([]() -> std::string {
#if defined(__x86_64__)
                  const uint8_t breakpoint[] = {0xcc};
#else
                  const uint8_t breakpoint[] = {0x00, 0x00, 0x20, 0xd4};
#endif
                  const char* name = kTargets[0].name;
                  scribble(name, 0, breakpoint, sizeof breakpoint);
                  const Result result = install_all();
                  if (!result.ok) return result.reason;
                  if (!remove().ok) return "not removed";
                  return std::memcmp(address_of(name), breakpoint, sizeof breakpoint) == 0
                             ? ""
                             : "breakpoint is gone";
              }),
              "");
}

// A system that lets nothing become executable, as systemd's MemoryDenyWriteExecute= does.
TEST(PatchRefuses, WhenSeccompDeniesMprotect) {
    EXPECT_EQ(in_child([]() -> std::string {
                  sock_filter filter[] = {
                      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
                      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_mprotect, 0, 3),
                      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, args[2])),
                      BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, PROT_EXEC, 0, 1),
                      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
                      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
                  };
                  const sock_fprog program = {static_cast<unsigned short>(std::size(filter)), filter};
                  if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 ||
                      prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) != 0)
                      return "no seccomp";
                  auto complaint = expect_refusal(install_all(), "does not allow generated code");
                  return complaint.empty() ? call_all(kOriginal) : complaint;
              }),
              "");
}

TEST(PatchRefuses, WhenTheProcessDeniesItself) {
    constexpr int kSetMdwe = 65, kRefuseExecGain = 1;  // PR_SET_MDWE, Linux 6.3
    const std::string complaint = in_child([]() -> std::string {
        if (prctl(kSetMdwe, kRefuseExecGain, 0, 0, 0) != 0) return "skip";
        auto inner = expect_refusal(install_all(), "does not allow generated code");
        return inner.empty() ? call_all(kOriginal) : inner;
    });
    if (complaint == "skip") GTEST_SKIP() << "this kernel has no PR_SET_MDWE";
    EXPECT_EQ(complaint, "");
}

#if defined(__x86_64__)

// Runs `body` in a child that is stopped at the entry of every system call between two calls of mark().
// `on_call` sees the registers and says whether the call shall fail with EPERM instead of being made.
void mark() {
    syscall(SYS_getppid);
}

std::string traced(const Body& body, const std::function<bool(pid_t, const user_regs_struct&)>& on_call) {
    Child child([&] {
        if (ptrace(PTRACE_TRACEME, 0, nullptr, nullptr) != 0) return std::string("no ptrace");
        raise(SIGSTOP);
        return body();
    });
    const pid_t pid = child.pid();
    int status;
    waitpid(pid, &status, 0);
    if (!WIFSTOPPED(status)) return child.verdict(status);
    ptrace(PTRACE_SETOPTIONS, pid, nullptr, PTRACE_O_TRACESYSGOOD | PTRACE_O_EXITKILL);
    bool entry = true, marked = false, failing = false;
    for (int signal = 0;;) {
        ptrace(PTRACE_SYSCALL, pid, nullptr, signal);
        signal = 0;
        waitpid(pid, &status, 0);
        if (WIFEXITED(status) || WIFSIGNALED(status)) return child.verdict(status);
        if (WSTOPSIG(status) != (SIGTRAP | 0x80)) {
            signal = WSTOPSIG(status);
            continue;
        }
        user_regs_struct registers;
        ptrace(PTRACE_GETREGS, pid, nullptr, &registers);
        if (entry) {
            if (registers.orig_rax == SYS_getppid) {
                marked = !marked;
            } else if (marked && registers.orig_rax != SYS_brk &&
                       on_call(pid, registers)) {  // which cannot fail so
                failing = true;
                registers.orig_rax = static_cast<unsigned long long>(-1);
                ptrace(PTRACE_SETREGS, pid, nullptr, &registers);
            }
        } else if (failing) {
            failing = false;
            registers.rax = static_cast<unsigned long long>(-EPERM);
            ptrace(PTRACE_SETREGS, pid, nullptr, &registers);
        }
        entry = !entry;
    }
}

std::string permissions_of(pid_t pid, const void* address) {
    std::ifstream maps("/proc/" + std::to_string(pid) + "/maps");
    for (std::string line; std::getline(maps, line);) {
        unsigned long start, end;
        char permissions[5];
        if (std::sscanf(line.c_str(), "%lx-%lx %4s", &start, &end, permissions) == 3 &&
            reinterpret_cast<unsigned long>(address) >= start &&
            reinterpret_cast<unsigned long>(address) < end)
            return permissions;
    }
    return "";
}

bool is_mprotect(const user_regs_struct& r) {
    return r.orig_rax == SYS_mprotect;
}
bool makes_executable(const user_regs_struct& r) {
    return is_mprotect(r) && r.rdx & PROT_EXEC;
}
bool maps_file_code(const user_regs_struct& r) {
    return r.orig_rax == SYS_mmap && r.rdx & PROT_EXEC;
}

class PatchTraced : public testing::Test {
  protected:
    void SetUp() override {
        const auto nothing =
            traced([] { return std::string(); }, [](pid_t, const user_regs_struct&) { return false; });
        if (nothing == "no ptrace") GTEST_SKIP() << "ptrace is not permitted here";
    }
};

// At every system call: nothing is writable and executable, and a signal whose handler lies on a page that is
// being changed does no harm.
TEST_F(PatchTraced, NeverWritableAndExecutable) {
    std::string found;
    int was_writable = 0, signals = 0;
    EXPECT_EQ(traced(
                  []() -> std::string {
                      std::signal(SIGUSR1, count_signal);
                      mark();
                      const Result result = install_all();
                      const Result removed = remove();
                      mark();
                      if (!result.ok || !removed.ok) return std::string(result.reason) + removed.reason;
                      return call_all(kOriginal);
                  },
                  [&](pid_t pid, const user_regs_struct& r) {
                      if (auto line = writable_and_executable(pid); !line.empty()) found = line;
                      const auto permissions =
                          permissions_of(pid, reinterpret_cast<const void*>(&count_signal));
                      if (permissions == "rw-p") {
                          was_writable++;
                      } else if (permissions != "r-xp") {
                          found = permissions;
                      }
                      if (r.orig_rax != SYS_rt_sigreturn) {  // which ends the handler
                          signals++;
                          kill(pid, SIGUSR1);
                      }
                      return false;
                  }),
              "");
    EXPECT_EQ(found, "");
    EXPECT_GE(was_writable, 2) << "the test looked at the wrong page";
    EXPECT_GT(signals, 50);
}

// Each system call of install() fails once, then each of remove().
TEST_F(PatchTraced, SurvivesAnySystemCallFailing) {
    int refused = 0, attempts = 0;
    for (int failing = 0;; failing++) {
        int n = 0;
        std::string complaint = traced(
            []() -> std::string {
                mark();
                const Result result = install_all();
                mark();
                if (!result.intact) return "broken";
                if (result.ok != (result.reason[0] == '\0')) return "no reason";
                if (result.ok != (result.replaced != 0)) return "wrong count";
                if (auto inner = call_all(result.ok ? kReplaced : kOriginal); !inner.empty()) return inner;
                if (result.ok) {
                    if (!remove().ok) return "not removed";
                } else {
                    if (!install_all().ok) return "a second attempt fails";
                    if (auto inner = call_all(kReplaced); !inner.empty()) return inner;
                }
                return result.ok ? "" : "refused";
            },
            [&](pid_t, const user_regs_struct&) { return n++ == failing; });
        if (n <= failing) break;
        attempts++;
        if (complaint == "refused") {
            refused++;
            complaint = "";
        }
        EXPECT_EQ(complaint, "") << "system call " << failing;
    }
    EXPECT_GT(attempts, 2 * static_cast<int>(kTargets.size()));
    EXPECT_GT(refused, 2 * static_cast<int>(kTargets.size()));

    for (int failing = 0;; failing++) {
        int n = 0;
        const std::string complaint = traced(
            []() -> std::string {
                if (!install_all().ok) return "not installed";
                mark();
                const Result result = remove();
                mark();
                if (!result.intact) return "broken";
                return call_all(result.ok ? kOriginal : kReplaced);
            },
            [&](pid_t, const user_regs_struct&) { return n++ == failing; });
        if (n <= failing) break;
        EXPECT_EQ(complaint, "") << "system call " << failing << " of remove()";
    }
}

// From the nth such call on, a policy denies what the installation needs: by then some functions are
// replaced.
void denies_from_the_nth(bool (*denied)(const user_regs_struct&)) {
    for (int nth = 0;; nth++) {
        int n = 0;
        const std::string complaint = traced(
            []() -> std::string {
                mark();
                const Result result = install_all();
                mark();
                if (result.ok) return call_all(kReplaced);
                auto inner = expect_refusal(result, "does not allow");
                return inner.empty() ? call_all(kOriginal) : inner;
            },
            [&](pid_t, const user_regs_struct& r) { return denied(r) && n++ >= nth; });
        EXPECT_EQ(complaint, "") << "from call " << nth;
        if (n <= nth) {
            EXPECT_GT(nth, static_cast<int>(kTargets.size()));
            return;
        }
    }
}

TEST_F(PatchTraced, PutsBackWhenNothingMoreBecomesExecutable) {
    denies_from_the_nth(makes_executable);
}
TEST_F(PatchTraced, PutsBackWhenMprotectIsDenied) {
    denies_from_the_nth(is_mprotect);
}

TEST_F(PatchTraced, SaysWhenTheProgramCannotGoOn) {
    int n = 0;
    EXPECT_EQ(traced(
                  []() -> std::string {
                      mark();
                      const Result result = install_all();
                      mark();
                      return result.ok || result.intact ? "thinks that all is well" : "";
                  },
                  [&](pid_t, const user_regs_struct& r) {
                      return (makes_executable(r) && n++ >= 1) || maps_file_code(r);
                  }),
              "");
}

#endif

// A uprobe on the entry of a function of the targets' library, in one process.
class Uprobe {
  public:
    Uprobe(const char* function, pid_t pid, bool on_return) {
        std::ifstream("/sys/bus/event_source/devices/uprobe/type") >> type_;
        Dl_info info;
        dladdr(address_of(function), &info);
        perf_event_attr attributes = {};
        attributes.size = sizeof attributes;
        attributes.type = type_;
        attributes.config = on_return ? 1 : 0;
        attributes.config1 = reinterpret_cast<uint64_t>(info.dli_fname);
        attributes.config2 = file_offset(address_of(function));
        fd_ = static_cast<int>(syscall(SYS_perf_event_open, &attributes, pid, -1, -1, PERF_FLAG_FD_CLOEXEC));
        error_ = fd_ < 0 ? errno : 0;
    }
    Uprobe(const Uprobe&) = delete;
    Uprobe& operator=(const Uprobe&) = delete;
    ~Uprobe() {
        if (fd_ >= 0) close(fd_);
    }

    bool attached() const { return type_ != 0 && fd_ >= 0; }
    std::string why_not() const { return type_ == 0 ? "this kernel has no uprobes" : std::strerror(error_); }
    uint64_t count() const {
        uint64_t n = 0;
        return read(fd_, &n, sizeof n) == sizeof n ? n : ~0ull;
    }

  private:
    static uint64_t file_offset(const void* address) {
        const auto at = reinterpret_cast<unsigned long>(address);
        std::ifstream maps("/proc/self/maps");
        for (std::string line; std::getline(maps, line);) {
            unsigned long start, end, offset;
            if (std::sscanf(line.c_str(), "%lx-%lx %*s %lx", &start, &end, &offset) == 3 && at >= start &&
                at < end)
                return at - start + offset;
        }
        return 0;
    }

    uint32_t type_ = 0;
    int fd_, error_;
};

// Lets a parent and its child take turns.
class Turns {
  public:
    Turns() {
        if (pipe(to_child_) != 0 || pipe(to_parent_) != 0) abort();
    }
    ~Turns() {
        for (const int fd : {to_child_[0], to_child_[1], to_parent_[0], to_parent_[1]}) close(fd);
    }
    Turns(const Turns&) = delete;
    Turns& operator=(const Turns&) = delete;

    void wake_child() { give(to_child_[1]); }
    void wait_for_parent() { take(to_child_[0]); }
    void wake_parent() { give(to_parent_[1]); }
    // The process that gave the turn, 0 when the child is gone.
    pid_t wait_for_child() {
        close(to_parent_[1]);
        to_parent_[1] = -1;
        return take(to_parent_[0]);
    }

  private:
    static void give(int fd) {
        const pid_t self = getpid();
        if (write(fd, &self, sizeof self) != sizeof self) abort();
    }
    static pid_t take(int fd) {
        pid_t from;
        return read(fd, &from, sizeof from) == sizeof from ? from : 0;
    }
    int to_child_[2], to_parent_[2];
};

bool uprobes_are_permitted(std::string* why) {
    Uprobe probe(kTargets[0].name, getpid(), false);
    *why = probe.why_not();
    return probe.attached();
}

constexpr int kCalls = 1000;

// A process that inherited patched functions, with a probe on one of them: it goes on as before, and every
// call counts.
void counts_exactly(bool on_return) {
    std::string why;
    if (!uprobes_are_permitted(&why)) GTEST_SKIP() << "no uprobes here: " << why;
    for (const Target& target : kTargets) {
        Turns turns;
        Child child([&]() -> std::string {
            const Result result = install_all();
            if (!result.ok) return result.reason;
            return in_child([&]() -> std::string {
                turns.wake_parent();
                turns.wait_for_parent();
                for (int i = 0; i < kCalls; i++)
                    if (auto complaint = call(target, kReplaced); !complaint.empty()) return complaint;
                return call_all(kReplaced);
            });
        });
        const pid_t caller = turns.wait_for_child();
        ASSERT_NE(caller, 0);
        Uprobe probe(target.name, caller, on_return);
        ASSERT_TRUE(probe.attached()) << probe.why_not();
        turns.wake_child();
        EXPECT_EQ(child.join(), "") << target.name;
        EXPECT_EQ(probe.count(), static_cast<uint64_t>(kCalls + 1)) << target.name;
    }
}

TEST(PatchUprobe, CountsExactly) {
    counts_exactly(false);
}
TEST(PatchUprobe, CountsReturnsExactly) {
    counts_exactly(true);
}

// Probes come and go on every function while they are being called.
TEST(PatchUprobe, ComeAndGoUnderCalls) {
    std::string why;
    if (!uprobes_are_permitted(&why)) GTEST_SKIP() << "no uprobes here: " << why;
    Child child([]() -> std::string {
        const Result result = install_all();
        if (!result.ok) return result.reason;
        static volatile sig_atomic_t stop;
        std::signal(SIGTERM, [](int) { stop = 1; });
        while (!stop)
            if (auto complaint = call_all(kReplaced); !complaint.empty()) return complaint;
        return remove().ok ? call_all(kOriginal) : "not removed";
    });
    uint64_t hits = 0;
    for (size_t round = 0; round < 40; round++) {
        const char* name = kTargets[round % kTargets.size()].name;
        Uprobe entry(name, child.pid(), false), exit(name, child.pid(), true);
        ASSERT_TRUE(entry.attached() && exit.attached())
            << name << ": " << entry.why_not() << ", " << exit.why_not();
        usleep(500);
        hits += entry.count() + exit.count();
    }
    EXPECT_EQ(waitpid(child.pid(), nullptr, WNOHANG), 0) << "the process did not survive";
    kill(child.pid(), SIGTERM);
    EXPECT_EQ(child.join(), "");
    EXPECT_GT(hits, 0u);
}

// The probe is there before the functions are replaced, and while they are put back.
TEST(PatchUprobe, MayBeThereFirst) {
    std::string why;
    if (!uprobes_are_permitted(&why)) GTEST_SKIP() << "no uprobes here: " << why;
    for (const bool on_return : {false, true}) {
        for (const Target& target : on_return ? std::vector<Target>{kTargets[0]} : kTargets) {
            Turns turns;
            Child child([&]() -> std::string {
                turns.wait_for_parent();
                const uint8_t* entry = address_of(target.name);
                if (!native::is_breakpoint(entry)) return "the probe is not there";
                const Result result = install_all();
                if (!result.ok) return result.reason;
                if (!native::is_breakpoint(entry)) return "the probe is gone";
                for (int i = 0; i < kCalls; i++)
                    if (auto complaint = call(target, kReplaced); !complaint.empty()) return complaint;
                turns.wake_parent();
                turns.wait_for_parent();
                if (native::is_breakpoint(entry)) return "the probe is still there";
                if (auto complaint = call(target, kReplaced); !complaint.empty()) return complaint;
                turns.wake_parent();
                turns.wait_for_parent();
                if (!native::is_breakpoint(entry)) return "the second probe is not there";
                if (!remove().ok) return "not removed";
                return call(target, kOriginal);
            });
            {
                Uprobe probe(target.name, child.pid(), on_return);
                ASSERT_TRUE(probe.attached()) << probe.why_not();
                turns.wake_child();
                const bool alive = turns.wait_for_child() != 0;
                EXPECT_TRUE(alive) << target.name;
                EXPECT_EQ(probe.count(), static_cast<uint64_t>(kCalls)) << target.name;
            }
            turns.wake_child();
            turns.wait_for_child();  // which looks whether the first probe is gone
            Uprobe probe(target.name, child.pid(), on_return);
            turns.wake_child();
            EXPECT_EQ(child.join(), "") << target.name;
        }
    }
}

// What the decoders make of an instruction: its length and what undoes it, or "" when it is refused.
std::string hex(const uint8_t* bytes, size_t n) {
    std::string text;
    for (size_t i = 0; i < n; i++) {
        char two[3];
        std::snprintf(two, sizeof two, "%02x", bytes[i]);
        text += two;
    }
    return text;
}

std::vector<uint8_t> unhex(const std::string& text) {
    std::vector<uint8_t> bytes;
    for (size_t i = 0; i + 1 < text.size(); i += 2)
        bytes.push_back(static_cast<uint8_t>(std::stoi(text.substr(i, 2), nullptr, 16)));
    return bytes;
}

using Recognise = bool (*)(const uint8_t*, size_t, int, FirstInstruction*) noexcept;

std::string decode(Recognise recognise, const std::string& instruction, int int_args) {
    auto code = unhex(instruction);
    code.resize(code.size() + 16, 0x90);
    FirstInstruction first = {};
    if (!recognise(code.data(), code.size(), int_args, &first)) return "";
    return std::to_string(first.length) + ":" + hex(first.undo, first.undo_length);
}

struct Case {
    const char* instruction;
    int int_args;
    const char* expected;
};

TEST(Decoder, X86) {
    const Case cases[] = {
        {"55", 6, "1:5d"},                          // push %rbp
        {"53", 6, "1:5b"},                          // push %rbx
        {"4157", 6, "2:415f"},                      // push %r15
        {"4154", 6, "2:415c"},                      // push %r12
        {"54", 6, ""},                              // push %rsp
        {"f30f1efa", 6, "4:"},                      // endbr64
        {"4883ec28", 6, "4:4883c428"},              // sub $0x28,%rsp
        {"4881ec88000000", 6, "7:4881c488000000"},  // sub $0x88,%rsp
        {"83ec28", 6, ""},                          // sub $0x28,%esp
        {"4883c428", 6, ""},                        // add $0x28,%rsp
        {"4883eb28", 6, ""},                        // sub $0x28,%rbx
        {"8b059af64200", 0, "6:"},                  // mov 0x42f69a(%rip),%eax
        {"486315d9f54200", 2, "7:"},                // movslq 0x42f5d9(%rip),%rdx
        {"486315d9f54200", 3, ""},                  // the third argument is in there
        {"4863f6", 6, "3:"},                        // movslq %esi,%rsi
        {"4863d6", 2, "3:"},                        // movslq %esi,%rdx
        {"4863d6", 3, ""},                          //
        {"4863db", 6, ""},                          // movslq %ebx,%rbx
        {"8b1d9af64200", 0, ""},                    // mov 0x42f69a(%rip),%ebx
        {"89f6", 6, "2:"},                          // mov %esi,%esi
        {"4889f8", 6, "3:"},                        // mov %rdi,%rax
        {"4989fa", 6, "3:"},                        // mov %rdi,%r10
        {"4989f8", 4, "3:"},                        // mov %rdi,%r8
        {"4989f8", 5, ""},                          //
        {"4889fb", 6, ""},                          // mov %rdi,%rbx
        {"48893c24", 6, ""},                        // mov %rdi,(%rsp)
        {"893d00000000", 6, ""},                    // mov %edi,0(%rip)
        {"488b442408", 6, "5:"},                    // mov 8(%rsp),%rax
        {"488b8424880000", 6, "8:"},                // mov 0x88(%rsp),%rax
        {"0fb707", 6, "3:"},                        // movzwl (%rdi),%eax
        {"0fb74702", 6, "4:"},                      // movzwl 2(%rdi),%eax
        {"0fbec0", 6, "3:"},                        // movsbl %al,%eax
        {"0fb6e4", 6, ""},                          // movzbl %ah,%esp
        {"488d0518ee4200", 0, "7:"},                // lea 0x42ee18(%rip),%rax
        {"488d04fd00000000", 6, "8:"},              // lea 0(,%rdi,8),%rax
        {"488d2500000000", 6, ""},                  // lea 0(%rip),%rsp
        {"31c0", 6, "2:"},                          // xor %eax,%eax
        {"4531c0", 4, "3:"},                        // xor %r8d,%r8d
        {"4531c0", 5, ""},                          //
        {"31ff", 1, ""},                            // xor %edi,%edi
        {"b801000000", 6, "5:"},                    // mov $1,%eax
        {"48b80102030405060708", 6, "10:"},         // movabs
        {"41ba01000000", 6, "6:"},                  // mov $1,%r10d
        {"bb01000000", 6, ""},                      // mov $1,%ebx
        {"bf01000000", 1, ""},                      // mov $1,%edi
        {"48c7c0ffffffff", 6, "7:"},                // mov $-1,%rax
        {"c7050000000001000000", 6, ""},            // movl $1,0(%rip)
        {"85f6", 6, "2:"},                          // test %esi,%esi
        {"f60701", 6, "3:"},                        // testb $1,(%rdi)
        {"f7c601000000", 6, "6:"},                  // test $1,%esi
        {"833d00000000c7", 6, "7:"},                // cmpl $199,0(%rip)
        {"813d00000000c7000000", 6, "10:"},         // cmpl $199,0(%rip)
        {"803d0000000000", 6, "7:"},                // cmpb $0,0(%rip)
        {"83c601", 6, ""},                          // add $1,%esi
        {"833d0000000001", 6, "7:"},                // cmpl $1,0(%rip)
        {"8305000000001", 6, ""},                   // addl $1,0(%rip)
        {"64488b042528000000", 6, ""},              // mov %fs:0x28,%rax
        {"66833f00", 6, ""},                        // cmpw $0,(%rdi)
        {"e900000000", 6, ""},                      // jmp
        {"e800000000", 6, ""},                      // call
        {"ff2500000000", 6, ""},                    // jmp *
        {"eb10", 6, ""},                            // jmp
        {"c3", 6, ""},                              // ret
        {"cc", 6, ""},                              // int3
        {"0f1f440000", 6, ""},                      // nop
        {"90", 6, ""},                              // nop
    };
    for (const Case& c : cases)
        EXPECT_EQ(decode(x86_64::recognise, c.instruction, c.int_args), c.expected)
            << c.instruction << " " << c.int_args;
    // Cut off anywhere, nothing beyond the end is looked at or claimed.
    for (const Case& c : cases) {
        const auto code = unhex(c.instruction);
        for (size_t size = 0; size < code.size(); size++) {
            const std::vector<uint8_t> cut(code.begin(), code.begin() + static_cast<long>(size));
            FirstInstruction first;
            if (x86_64::recognise(cut.data(), size, c.int_args, &first)) {
                EXPECT_LE(first.length, size) << c.instruction;
            }
        }
    }
}

TEST(Decoder, X86Data) {
    const struct {
        const char* instruction;  // from its opcode on
        int length;               // 0: names no data so
    } cases[] = {
        {"8b0500000000", 6},           // mov 0(%rip),%eax
        {"631500000000", 6},           // movslq, behind its REX
        {"8d3500000000", 6},           // lea
        {"890500000000", 6},           // mov %eax,0(%rip)
        {"ff0500000000", 6},           // incl
        {"833d0000000001", 7},         // cmpl $1
        {"8305000000000a", 7},         // addl $10
        {"803d0000000001", 7},         // cmpb $1
        {"c6050000000001", 7},         // movb $1
        {"6b050000000003", 7},         // imul $3
        {"c0250000000003", 7},         // shlb $3
        {"c1250000000003", 7},         // shll $3
        {"f6050000000001", 7},         // testb $1
        {"f61d00000000", 6},           // negb
        {"c7050000000001000000", 10},  // movl $1
        {"813d0000000001000000", 10},  // cmpl $1
        {"69050000000001000000", 10},  // imul $1
        {"f7050000000001000000", 10},  // testl $1
        {"f71d00000000", 6},           // negl
        {"8b4500000000", 0},           // mov 0(%rbp),%eax
        {"8b8500000000", 0},           // mov 0(%rbp),%eax
        {"8bc500000000", 0},           // mov %ebp,%eax
    };
    for (const auto& c : cases) {
        auto code = unhex(c.instruction);
        for (const int32_t distance : {0, 4711, -4711}) {
            std::memcpy(code.data() + 2, &distance, sizeof distance);
            uintptr_t data = 0;
            EXPECT_EQ(x86_64::names_data(code.data(), &data), c.length != 0) << c.instruction;
            if (c.length == 0) continue;
            EXPECT_EQ(static_cast<intptr_t>(data - reinterpret_cast<uintptr_t>(code.data())),
                      c.length + distance)
                << c.instruction;
        }
    }
}

TEST(Decoder, Aarch64) {
    const Case cases[] = {
        // bytes in memory order
        {"fd7bbda9", 6, "4:ffc30091"},  // stp x29, x30, [sp, #-48]!: add sp, sp, #48
        {"fd7ba0a9", 6, "4:ff030891"},  // stp x29, x30, [sp, #-512]!
        {"fd7b01a9", 6, ""},            // stp x29, x30, [sp, #16]
        {"fd7b81a9", 6, ""},            // stp x29, x30, [sp, #16]!
        {"fd7bc1a8", 6, ""},            // ldp x29, x30, [sp], #16
        {"f30f1ef8", 6, "4:ff830091"},  // str x19, [sp, #-32]!
        {"f30300f9", 6, ""},            // str x19, [sp]
        {"ff8300d1", 6, "4:ff830091"},  // sub sp, sp, #32
        {"ff0740d1", 6, "4:ff074091"},  // sub sp, sp, #4096
        {"3f2303d5", 6, "4:bf2303d5"},  // paciasp: autiasp
        {"7f2303d5", 6, "4:ff2303d5"},  // pacibsp: autibsp
        {"5f2403d5", 6, "4:1f2003d5"},  // bti c
        {"02000090", 2, "4:1f2003d5"},  // adrp x2
        {"02000090", 3, ""},            //
        {"09000090", 6, "4:1f2003d5"},  // adrp x9
        {"13000090", 6, ""},            // adrp x19
        {"08000090", 6, ""},            // adrp x8
        {"217c4093", 6, "4:1f2003d5"},  // sxtw x1, w1
        {"227c4093", 3, ""},            // sxtw x2, w1
        {"227c4093", 2, "4:1f2003d5"},  //
        {"ea0300aa", 6, "4:1f2003d5"},  // mov x10, x0
        {"f30300aa", 6, ""},            // mov x19, x0
        {"e103012a", 6, "4:1f2003d5"},  // mov w1, w1
        {"e900a052", 6, "4:1f2003d5"},  // mov w9, #0x70000
        {"1f140071", 6, "4:1f2003d5"},  // cmp w0, #5
        {"1f0001eb", 6, "4:1f2003d5"},  // cmp x0, x1
        {"0a0840b9", 6, "4:1f2003d5"},  // ldr w10, [x0, #8]
        {"00000014", 6, ""},            // b
        {"00000094", 6, ""},            // bl
        {"c0035fd6", 6, ""},            // ret
        {"000020d4", 6, ""},            // brk
    };
    for (const Case& c : cases)
        EXPECT_EQ(decode(aarch64::recognise, c.instruction, c.int_args), c.expected)
            << c.instruction << " " << c.int_args;
}

TEST(Encoder, Aarch64) {
    uint8_t jump[4];
    aarch64::encode_jump(jump, 0x10000, 0xfff0);
    EXPECT_EQ(hex(jump, 4), "fcffff17");
    aarch64::encode_jump(jump, 0x10000, 0x10100);
    EXPECT_EQ(hex(jump, 4), "40000014");
    const uint8_t brk[] = {0xa0, 0x00, 0x20, 0xd4}, stp[] = {0xfd, 0x7b, 0xbd, 0xa9};
    EXPECT_TRUE(aarch64::is_breakpoint(brk));
    EXPECT_FALSE(aarch64::is_breakpoint(stp));
}

}  // namespace
}  // namespace adaptive::patch
