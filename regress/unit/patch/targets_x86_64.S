// Functions to be replaced, one for each kind of first instruction. Each returns
// 1000000 + a + 2b + 3c + 5d + 7e + 11f of its six arguments.
        .text
        .balign 4096

        .macro target name:req, first:req, undo
        .balign 16
        .globl \name
        .type \name, @function
\name:  \first
        \undo
        jmp body
        .skip 5, 0x90           // room for the jump even where this one is short
        .size \name, . - \name
        .endm

        target push_rbp, "push %rbp", "pop %rbp"
        target push_rbx, "push %rbx", "pop %rbx"
        target push_r15, "push %r15", "pop %r15"
        target push_r12, "push %r12", "pop %r12"
        target lower_sp_little, "sub $0x18, %rsp", "add $0x18, %rsp"
        target lower_sp_much, "sub $0x1234, %rsp", "add $0x1234, %rsp"
        target landing_pad, "endbr64"

        .balign 4096
        target load_int, "mov number(%rip), %eax"
        target load_free_argument, "movslq number(%rip), %rdx"
        target load_wide, "mov number(%rip), %r11"
        target address, "lea number(%rip), %r10"
        target widen_in_place, "movslq %esi, %rsi"
        target clear, "xor %eax, %eax"
        target copy_argument, "mov %rdi, %r10"
        target constant, "mov $7, %eax"
        target test_argument, "test %rdi, %rdi"
        target compare_memory, "cmpl $199, number(%rip)"

        .balign 4096
        .fill 4090, 1, 0x90     // the jump behind this one lies on two pages
        .globl two_pages
        .type two_pages, @function
two_pages:
        endbr64
        jmp body
        .skip 5, 0x90
        .size two_pages, . - two_pages

        .balign 16
        .globl just_long_enough
        .type just_long_enough, @function
just_long_enough:
        push %rbp
        pop %rbp
        jmp body                // 2 bytes
        .skip 2, 0x90
        .size just_long_enough, . - just_long_enough

        // What must be refused. The first is one byte too short.
        .globl too_short, unknown_instruction, spoils_argument, alias_one, alias_two
        .type too_short, @function
too_short:
        push %rbp
        xor %eax, %eax
        pop %rbp
        ret
        .size too_short, . - too_short
        .skip 32
        target unknown_instruction, "mov %rdi, -8(%rsp)"
        target spoils_argument, "mov number(%rip), %esi"
        .type alias_one, @function
        .type alias_two, @function
alias_one:
alias_two:
        push %rbp
        pop %rbp
        jmp body
        .skip 5, 0x90
        .size alias_one, . - alias_one
        .size alias_two, . - alias_two

        // A signal handler on a page that is changed, when two_pages is.
        .globl count_signal
        .type count_signal, @function
count_signal:
        incl signals_seen(%rip)
        ret
        .size count_signal, . - count_signal

        .balign 16
body:   lea 1000000(%rdi,%rsi,2), %rax
        lea (%rdx,%rdx,2), %r10
        add %r10, %rax
        lea (%rcx,%rcx,4), %r10
        add %r10, %rax
        imul $7, %r8, %r10
        add %r10, %rax
        imul $11, %r9, %r10
        add %r10, %rax
        ret

        // long call_and_check(function, long arguments[6], long* result): 0 when the function preserved what it must.
        .balign 4096
        .globl call_and_check
        .type call_and_check, @function
call_and_check:
        push %rbx
        push %rbp
        push %r12
        push %r13
        push %r14
        push %r15
        push %rdx
        mov %rdi, %r11
        mov %rsi, %r10
        mov (%r10), %rdi
        mov 8(%r10), %rsi
        mov 16(%r10), %rdx
        mov 24(%r10), %rcx
        mov 32(%r10), %r8
        mov 40(%r10), %r9
        mov $0x1001, %ebx
        mov $0x1002, %ebp
        mov $0x1003, %r12d
        mov $0x1004, %r13d
        mov $0x1005, %r14d
        mov %rsp, %r15
        call *%r11
        cmp %rsp, %r15
        jne 1f
        cmp $0x1001, %rbx
        jne 1f
        cmp $0x1002, %rbp
        jne 1f
        cmp $0x1003, %r12
        jne 1f
        cmp $0x1004, %r13
        jne 1f
        cmp $0x1005, %r14
        jne 1f
        pop %rdx
        mov %rax, (%rdx)
        xor %eax, %eax
        jmp 2f
1:      pop %rdx
        mov $1, %eax
2:      pop %r15
        pop %r14
        pop %r13
        pop %r12
        pop %rbp
        pop %rbx
        ret
        .size call_and_check, . - call_and_check

        .data
        .balign 8
number: .quad 0
        .globl signals_seen
        .type signals_seen, @object
        .size signals_seen, 4
        .hidden signals_seen
signals_seen:
        .long 0
        .section .note.GNU-stack, "", @progbits
