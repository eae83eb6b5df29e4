// x86-64: which first instructions can stay in front of a jump, and the code placed behind and in the thunk.
//
// An encoding is [REX] opcode [ModRM [SIB] [displacement]] [immediate]. Source: Intel SDM, volume 2, chapter
// 2 and appendix A; calling convention: System V ABI for AMD64, 3.2.
#include <cstring>

#include "machine.h"

namespace adaptive::patch::x86_64 {
namespace {

enum Register : uint8_t { rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11 };
constexpr uint8_t kArguments[] = {rdi, rsi, rdx, rcx, r8, r9};

// A function may spoil these, except those that carry its arguments.
constexpr uint32_t kCallerSaved =
    1u << rax | 1u << rcx | 1u << rdx | 1u << rsi | 1u << rdi | 1u << r8 | 1u << r9 | 1u << r10 | 1u << r11;

enum class Writes : uint8_t { flags, reg, rm };  // rm: refused when it is memory

struct Form {
    uint16_t opcode;    // 0x0f.. for the two-byte map
    int8_t extension;   // what ModRM.reg must be, or kAny
    uint8_t immediate;  // bytes
    Writes writes;
};

constexpr int8_t kAny = -1;

// Reading memory is harmless: the original did so with the same registers.
constexpr Form kForms[] = {
    {0x8b, kAny, 0, Writes::reg},    // mov    r/m, r
    {0x89, kAny, 0, Writes::rm},     // mov    r, r/m
    {0xc7, 0, 4, Writes::rm},        // mov    imm, r/m
    {0x63, kAny, 0, Writes::reg},    // movslq r/m, r
    {0x8d, kAny, 0, Writes::reg},    // lea    m, r
    {0x33, kAny, 0, Writes::reg},    // xor    r/m, r
    {0x31, kAny, 0, Writes::rm},     // xor    r, r/m
    {0x0fb6, kAny, 0, Writes::reg},  // movzb  r/m, r
    {0x0fb7, kAny, 0, Writes::reg},  // movzw  r/m, r
    {0x0fbe, kAny, 0, Writes::reg},  // movsb  r/m, r
    {0x0fbf, kAny, 0, Writes::reg},  // movsw  r/m, r
    {0x84, kAny, 0, Writes::flags},  // testb  r, r/m
    {0x85, kAny, 0, Writes::flags},  // test   r, r/m
    {0xf6, 0, 1, Writes::flags},     // testb  imm, r/m
    {0xf7, 0, 4, Writes::flags},     // test   imm, r/m
    {0x38, kAny, 0, Writes::flags},  // cmpb   r, r/m
    {0x39, kAny, 0, Writes::flags},  // cmp    r, r/m
    {0x3a, kAny, 0, Writes::flags},  // cmpb   r/m, r
    {0x3b, kAny, 0, Writes::flags},  // cmp    r/m, r
    {0x80, 7, 1, Writes::flags},     // cmpb   imm8, r/m
    {0x81, 7, 4, Writes::flags},     // cmp    imm32, r/m
    {0x83, 7, 1, Writes::flags},     // cmp    imm8, r/m
};

// Whether the instruction may write `reg`. Widening an int in its own register (movslq %esi,%rsi) changes
// only bits that the replacement, which has the same prototype, does not look at.
bool may_write(uint8_t reg, bool widens_itself, int int_args) {
    if (reg >= 32 || !(kCallerSaved >> reg & 1)) return false;
    if (widens_itself) return true;
    for (int i = 0; i < int_args && i < 6; i++)
        if (kArguments[i] == reg) return false;
    return true;
}

// Length of ModRM, SIB and displacement; 0 when `size` is too small.
size_t operand_length(const uint8_t* code, size_t size) {
    if (size < 1) return 0;
    const uint8_t mod = code[0] >> 6, rm = code[0] & 7;
    size_t length = 1;
    uint8_t base = rm;
    if (mod != 3 && rm == 4) {
        if (size < 2) return 0;
        base = code[1] & 7;
        length++;
    }
    if (mod == 1) length += 1;
    if (mod == 2 || (mod == 0 && base == 5)) length += 4;  // mod 0, rm 5: disp32(%rip)
    return length <= size ? length : 0;
}

void set(FirstInstruction* first, size_t length, const uint8_t* undo, size_t undo_length) {
    first->length = length;
    first->undo_length = undo_length;
    if (undo_length) std::memcpy(first->undo, undo, undo_length);
}

}  // namespace

bool recognise(const uint8_t* code, size_t size, int int_args, FirstInstruction* first) noexcept {
    constexpr uint8_t kEndbr64[] = {0xf3, 0x0f, 0x1e, 0xfa};
    if (size >= sizeof kEndbr64 && std::memcmp(code, kEndbr64, sizeof kEndbr64) == 0) {
        set(first, sizeof kEndbr64, nullptr, 0);
        return true;
    }

    size_t at = 0;
    uint8_t rex = 0;
    if (size > 0 && (code[0] & 0xf0) == 0x40) rex = code[at++];
    if (at >= size) return false;
    const bool wide = rex & 8;
    const uint8_t high_reg = (rex & 4) << 1, high_rm = (rex & 1) << 3;

    uint16_t opcode = code[at++];
    if ((opcode & 0xf8) == 0x50) {  // push r: pop r
        uint8_t undo[2];
        size_t n = 0;
        if (rex) undo[n++] = rex;
        undo[n++] = static_cast<uint8_t>(opcode + 8);
        set(first, at, undo, n);
        return (opcode & 7) != rsp || high_rm;
    }
    if ((opcode & 0xf8) == 0xb8) {  // mov imm, r
        const size_t length = at + (wide ? 8 : 4);
        set(first, length, nullptr, 0);
        return length <= size && may_write((opcode & 7) | high_rm, false, int_args);
    }
    if (opcode == 0x0f) {
        if (at >= size) return false;
        opcode = static_cast<uint16_t>(0x0f00 | code[at++]);
    }

    const size_t operand = operand_length(code + at, size - at);
    if (operand == 0) return false;
    const uint8_t modrm = code[at];
    const bool rm_is_register = modrm >> 6 == 3;
    const uint8_t extension = modrm >> 3 & 7;
    const uint8_t reg = extension | high_reg;
    const uint8_t rm = (modrm & 7) | high_rm;

    if ((opcode == 0x83 || opcode == 0x81) && rex == 0x48 && modrm == 0xec) {  // sub imm,%rsp: add imm,%rsp
        const size_t length = at + 1 + (opcode == 0x83 ? 1 : 4);
        if (length > size) return false;
        uint8_t undo[8];
        std::memcpy(undo, code, length);
        undo[at] = 0xc4;
        set(first, length, undo, length);
        return true;
    }

    for (const Form& form : kForms) {
        if (form.opcode != opcode || (form.extension != kAny && form.extension != extension)) continue;
        if (opcode == 0x8d && rm_is_register) return false;
        const size_t length = at + operand + form.immediate;
        if (length > size) return false;
        const bool widens_itself =
            rm_is_register && reg == rm && (opcode == 0x63 || opcode == 0x8b || opcode == 0x89);
        set(first, length, nullptr, 0);
        switch (form.writes) {
            case Writes::flags:
                return true;
            case Writes::reg:
                return may_write(reg, widens_itself, int_args);
            case Writes::rm:
                return rm_is_register && may_write(rm, widens_itself, int_args);
        }
    }
    return false;
}

bool is_breakpoint(const uint8_t* code) noexcept {
    return code[0] == 0xcc;
}  // int3

void encode_jump(uint8_t* out, uintptr_t from, uintptr_t to) noexcept {
    const int32_t distance = static_cast<int32_t>(to - (from + kJumpBytes));
    out[0] = 0xe9;  // jmp rel32
    std::memcpy(out + 1, &distance, sizeof distance);
}

// ModRM with mod 0 and rm 5 is disp32(%rip), which counts from the end of the instruction: behind the immediate.
bool names_data(const uint8_t* code, uintptr_t* data) noexcept {
    const uint8_t opcode = code[0], modrm = code[1], extension = modrm >> 3 & 7;
    if ((modrm & 0xc7) != 5) return false;
    int32_t distance;
    std::memcpy(&distance, code + 2, sizeof distance);
    size_t immediate = 0;
    switch (opcode) {
        case 0x6b:
        case 0x80:
        case 0x83:
        case 0xc0:
        case 0xc1:
        case 0xc6:
            immediate = 1;
            break;
        case 0x69:
        case 0x81:
        case 0xc7:
            immediate = 4;
            break;
        case 0xf6:  // test, and others that have none
            immediate = extension < 2 ? 1 : 0;
            break;
        case 0xf7:
            immediate = extension < 2 ? 4 : 0;
            break;
    }
    const uintptr_t end = reinterpret_cast<uintptr_t>(code) + kDataBytes + immediate;
    *data = end + static_cast<uintptr_t>(intptr_t{distance});
    return true;
}

// `notrack`, because nothing says that the replacement begins with endbr64; without CET it means nothing.
void encode_thunk(uint8_t* out, const FirstInstruction& first, uintptr_t target) noexcept {
    constexpr uint8_t kJump[] = {0x3e, 0xff, 0x25, 0, 0, 0, 0};  // notrack jmp *0(%rip)
    std::memcpy(out, first.undo, first.undo_length);
    out += first.undo_length;
    std::memcpy(out, kJump, sizeof kJump);
    std::memcpy(out + sizeof kJump, &target, sizeof target);
    static_assert(sizeof first.undo + sizeof kJump + sizeof target <= kThunkBytes);
}

}  // namespace adaptive::patch::x86_64
