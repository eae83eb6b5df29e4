// aarch64: which first instructions can stay in front of a jump, and the code placed behind and in the thunk.
//
// Every instruction is one little-endian word. Source: Arm ARM (DDI 0487), C4.1; calling convention:
// AAPCS64, 6.1.1.
#include <cstring>

#include "machine.h"

namespace adaptive::patch::aarch64 {
namespace {

// What an instruction does, and hence what takes it back.
enum class Does : uint8_t { nothing, writes_rd, widens_rd, signs_lr, pushes_pair, pushes_one, lowers_sp };

struct Form {
    uint32_t mask, value;
    Does does;
};

// Reading memory is harmless: the original did so with the same registers.
constexpr Form kForms[] = {
    {0xffffffff, 0xd503245f, Does::nothing},      // bti  c
    {0xffffffff, 0xd50324df, Does::nothing},      // bti  jc
    {0xffffffff, 0xd503233f, Does::signs_lr},     // paciasp
    {0xffffffff, 0xd503237f, Does::signs_lr},     // pacibsp
    {0xffe003e0, 0xa9a003e0, Does::pushes_pair},  // stp  Xt, Xu, [sp, #-N]!
    {0xfff00fe0, 0xf8100fe0, Does::pushes_one},   // str  Xt, [sp, #-N]!
    {0xff8003ff, 0xd10003ff, Does::lowers_sp},    // sub  sp, sp, #N
    {0x9f000000, 0x90000000, Does::writes_rd},    // adrp Xd, page
    {0x7fe0ffe0, 0x2a0003e0, Does::widens_rd},    // mov  d, m
    {0x7f800000, 0x52800000, Does::writes_rd},    // mov  d, #N
    {0xfffffc00, 0x93407c00, Does::widens_rd},    // sxtw Xd, Wn
    {0xbfc00000, 0xb9400000, Does::writes_rd},    // ldr  t, [n, #N]
    {0xbfc00000, 0x39400000, Does::writes_rd},    // ldrb, ldrh
    {0x7f80001f, 0x7100001f, Does::nothing},      // cmp  n, #N
    {0x7f20001f, 0x6b00001f, Does::nothing},      // cmp  n, m
};

constexpr uint32_t kNop = 0xd503201f;
constexpr uint32_t kSignToCheck = 0x80;  // paciasp -> autiasp, pacibsp -> autibsp

constexpr uint32_t add_sp(uint32_t bytes) {
    return 0x910003ff | bytes << 10;
}

// x0 to x7 carry arguments, x9 to x17 are free; x8 may carry the address of a struct result, x18 is the
// platform's.
bool may_write(uint32_t rd, int int_args) {
    return rd < 8 ? static_cast<int>(rd) >= int_args : rd >= 9 && rd <= 17;
}

}  // namespace

bool recognise(const uint8_t* code, size_t size, int int_args, FirstInstruction* first) noexcept {
    uint32_t word;
    if (size < sizeof word) return false;
    std::memcpy(&word, code, sizeof word);

    const uint32_t rd = word & 31, rm = word >> 16 & 31, rn = word >> 5 & 31;
    for (const Form& form : kForms) {
        if ((word & form.mask) != form.value) continue;
        uint32_t undo = kNop;
        switch (form.does) {
            case Does::nothing:
                break;
            case Does::writes_rd:
                if (!may_write(rd, int_args)) return false;
                break;
            case Does::widens_rd:  // an int in its own register: bits that the replacement does not look at
                if (!may_write(rd, rd == (form.value == 0x93407c00 ? rn : rm) ? 0 : int_args)) return false;
                break;
            case Does::signs_lr:
                undo = word | kSignToCheck;
                break;
            case Does::pushes_pair:  // imm7, negative, in units of 8
                undo = add_sp((128 - (word >> 15 & 127)) * 8);
                break;
            case Does::pushes_one:  // imm9, negative
                undo = add_sp(512 - (word >> 12 & 511));
                break;
            case Does::lowers_sp:
                undo = word ^ (0xd1000000 ^ 0x91000000);
                break;
        }
        first->length = sizeof word;
        first->undo_length = sizeof undo;
        std::memcpy(first->undo, &undo, sizeof undo);
        return true;
    }
    return false;
}

bool is_breakpoint(const uint8_t* code) noexcept {
    uint32_t word;
    std::memcpy(&word, code, sizeof word);
    return (word & 0xffe0001f) == 0xd4200000;  // brk #N
}

void encode_jump(uint8_t* out, uintptr_t from, uintptr_t to) noexcept {
    const uint32_t word = 0x14000000 | (static_cast<uint32_t>((to - from) >> 2) & 0x3ffffff);  // b to
    std::memcpy(out, &word, sizeof word);
}

// x17 is the linker's scratch register, and `br x17` may land on `bti c`.
void encode_thunk(uint8_t* out, const FirstInstruction& first, uintptr_t target) noexcept {
    constexpr uint32_t kJump[] = {0x58000071, 0xd61f0220, kNop};  // ldr x17, target; br x17
    static_assert(sizeof kNop + sizeof kJump == 16);
    std::memcpy(out, first.undo, sizeof kNop);
    std::memcpy(out + 4, kJump, sizeof kJump);
    std::memcpy(out + 16, &target, sizeof target);
}

bool names_data(const uint8_t*, uintptr_t*) noexcept {
    return false;
}

}  // namespace adaptive::patch::aarch64
