// What patch.cpp needs to know about instructions, once per architecture. Pure functions from bytes to bytes,
// so that both architectures are compiled and tested everywhere; `native` is the one that runs.
#pragma once

#include <cstddef>
#include <cstdint>

namespace adaptive::patch {

// The instruction at a function's entry, which stays where it is, and the code that takes its effect back.
struct FirstInstruction {
    size_t length;
    size_t undo_length;  // 0: nothing to take back
    uint8_t undo[8];
};

// Each architecture has
//   kReach            how far a jump reaches, in bytes, with some to spare
//   kJumpBytes        size of that jump
//   kBreakpointBytes  size of the breakpoint instruction a debugger or uprobe puts on an entry
//   recognise()       decodes the first instruction of a function that takes `int_args` integer arguments;
//   false when
//                     it is not one whose effect can be ignored or undone
//   is_breakpoint()   whether these bytes are such a breakpoint
//   encode_jump()     a jump from address `from` to address `to`
//   encode_thunk()    undoes `first`, then goes to `target`; kThunkBytes at most, position-independent
//   names_data()      whether an instruction may lie here that names data by its distance from the code, with
//                     its opcode at `code`, and the address of that data
//   kDataBytes        how many bytes names_data() looks at; 0: what data code uses cannot be told so
inline constexpr size_t kThunkBytes = 32;
inline constexpr size_t kMostJumpBytes = 8;

namespace x86_64 {
inline constexpr uintptr_t kReach = 0x7fff0000;  // jmp rel32
inline constexpr size_t kJumpBytes = 5;
inline constexpr size_t kBreakpointBytes = 1;
bool recognise(const uint8_t* code, size_t size, int int_args, FirstInstruction* first) noexcept;
bool is_breakpoint(const uint8_t* code) noexcept;
void encode_jump(uint8_t* out, uintptr_t from, uintptr_t to) noexcept;
void encode_thunk(uint8_t* out, const FirstInstruction& first, uintptr_t target) noexcept;
inline constexpr size_t kDataBytes = 6;
bool names_data(const uint8_t* code, uintptr_t* data) noexcept;
}  // namespace x86_64

namespace aarch64 {
inline constexpr uintptr_t kReach = 0x7ff0000;  // b imm26: 128 MiB
inline constexpr size_t kJumpBytes = 4;
inline constexpr size_t kBreakpointBytes = 4;
bool recognise(const uint8_t* code, size_t size, int int_args, FirstInstruction* first) noexcept;
bool is_breakpoint(const uint8_t* code) noexcept;
void encode_jump(uint8_t* out, uintptr_t from, uintptr_t to) noexcept;
void encode_thunk(uint8_t* out, const FirstInstruction& first, uintptr_t target) noexcept;
inline constexpr size_t kDataBytes =
    0;  // all variables of a file are named by their distance from one anchor
bool names_data(const uint8_t* code, uintptr_t* data) noexcept;
}  // namespace aarch64

#if defined(__x86_64__)
namespace native = x86_64;
#elif defined(__aarch64__)
namespace native = aarch64;
#else
#error "functions can be replaced on x86-64 and aarch64 only"
#endif

}  // namespace adaptive::patch
