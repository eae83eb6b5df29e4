// Loading, unloading and describing the kernel side of the mirror. What is loaded outlives the process:
// pinned files under one directory of the BPF file system hold it, no daemon does.
//
//   DIR/slots   root:GROUP 0660   the mirror, see mirror/sched_slot.h; frozen: no process can write it
//   DIR/claims  root:GROUP 0660   its second, writable array
//   DIR/notes   root:GROUP 0660   its third: what the kernel writes when a task leaves its CPU
//   DIR/register   root:GROUP 0660   the program by which a task registers itself
//   DIR/sched_switch, DIR/process_exit   root 0600   the programs' attachments
//   DIR/deactivate   root 0600   the program that unload runs
//
// Each function prints what it did on stdout, or one line on stderr saying what is missing and what to do,
// and returns the command's exit code. Safe against another load or unload at the same time (a lock on DIR).
#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace adaptive::loader {

inline constexpr uint32_t kDefaultSlots = 4096;
inline constexpr const char* kDefaultGroup = "postgres";

enum ExitCode { kDone = 0, kFailed = 1, kUsage = 2, kNotLoaded = 3 };

struct LoadOptions {
    std::optional<uint32_t> slots;     // usable ones; unset: the default, or whatever is loaded already
    std::optional<std::string> group;  // who may use the mirror; likewise
};

int load(const std::string& dir, const LoadOptions& options);
int unload(const std::string& dir);
int status(const std::string& dir);

void set_verbose();  // let libbpf and the kernel's verifier talk on stderr

}  // namespace adaptive::loader
