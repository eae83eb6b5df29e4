// Functions to be replaced, one for each kind of first instruction. Each returns
// 1000000 + a + 2b + 3c + 5d + 7e + 11f of its six arguments.
        .arch armv8.5-a
        .text
        .balign 65536

        .macro target name:req, first:req, undo
        .balign 16
        .globl \name
        .type \name, %function
\name:  \first
        \undo
        b body
        .size \name, . - \name
        .endm

        target push_pair, "stp x29, x30, [sp, #-48]!", "ldp x29, x30, [sp], #48"
        target push_pair_much, "stp x29, x30, [sp, #-512]!", "add sp, sp, #512"
        target push_one, "str x19, [sp, #-32]!", "ldr x19, [sp], #32"
        target lower_sp_little, "sub sp, sp, #32", "add sp, sp, #32"
        target lower_sp_much, "sub sp, sp, #4096", "add sp, sp, #4096"
        target landing_pad, "bti c"
        target sign_return, "paciasp", "autiasp"

        .balign 65536
        target address, "adrp x9, number"
        target load_free_argument, "adrp x2, number", "mov x2, #0"
        target widen_in_place, "sxtw x1, w1"
        target copy_argument, "mov x10, x0"
        target constant, "mov w9, #7"
        target compare, "cmp w0, #5"

        // What must be refused.
        .globl too_short, alias_one, alias_two
        .type too_short, %function
too_short:
        cmp w0, #1
        .size too_short, . - too_short
        ret
        .skip 32
        target unknown_instruction, "stur x0, [sp, #-8]"
        target spoils_argument, "adrp x1, number"
        .type alias_one, %function
        .type alias_two, %function
alias_one:
alias_two:
        stp x29, x30, [sp, #-16]!
        ldp x29, x30, [sp], #16
        b body
        .size alias_one, . - alias_one
        .size alias_two, . - alias_two

        .globl count_signal
        .type count_signal, %function
count_signal:
        ret
        .size count_signal, . - count_signal

        .balign 16
body:   add x0, x0, x1, lsl #1
        mov x9, #3
        madd x0, x2, x9, x0
        mov x9, #5
        madd x0, x3, x9, x0
        mov x9, #7
        madd x0, x4, x9, x0
        mov x9, #11
        madd x0, x5, x9, x0
        mov w9, #16960
        movk w9, #15, lsl #16
        add x0, x0, x9
        ret

        // long call_and_check(function, long arguments[6], long* result): 0 when the function preserved what it must.
        .balign 65536
        .globl call_and_check
        .type call_and_check, %function
call_and_check:
        stp x29, x30, [sp, #-64]!
        stp x19, x20, [sp, #16]
        stp x21, x22, [sp, #32]
        str x2, [sp, #48]
        mov x16, x0
        mov x9, x1
        ldp x0, x1, [x9]
        ldp x2, x3, [x9, #16]
        ldp x4, x5, [x9, #32]
        mov x19, #0x1001
        mov x20, #0x1002
        mov x21, sp
        mov x29, #0x1003
        blr x16
        mov x10, sp
        cmp x10, x21
        b.ne 1f
        mov x11, #0x1001
        sub x19, x19, x11
        cbnz x19, 1f
        mov x11, #0x1002
        sub x20, x20, x11
        cbnz x20, 1f
        mov x11, #0x1003
        sub x29, x29, x11
        cbnz x29, 1f
        ldr x2, [sp, #48]
        str x0, [x2]
        mov x0, #0
        b 2f
1:      mov sp, x21
        mov x0, #1
2:      ldp x21, x22, [sp, #32]
        ldp x19, x20, [sp, #16]
        ldp x29, x30, [sp], #64
        ret
        .size call_and_check, . - call_and_check

        .data
        .balign 8
number: .quad 0
        .section .note.GNU-stack, "", %progbits
