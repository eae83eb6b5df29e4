#pragma once
/*
 * The restartable sequences of percpu.h for x86-64.
 *
 * Each has this shape (labels 1 to 4 as in the code):
 *
 *      rseq_cs = &descriptor      the last instruction outside: from the next on the kernel restarts us
 *   1: if (cpu_id != cpu) goto moved
 *      …                          reads, and stores that nobody sees
 *      commit                     one store
 *   2:
 *   4: goto aborted               elsewhere, behind the signature that the kernel demands before an abort handler
 *
 * The descriptor {version, flags, start, length, abort handler} lies in a section of its own, which is
 * writable because in a shared object its addresses are relocated. Both sections join the group of the code
 * they belong to ("?"), so that of an inline function that several files contain, the linker keeps all parts
 * of one copy or none.
 */

#include <cstdint>

#include "base/rseq_area.h"
#include "percpu/rseq_end.h"

#define ADAPTIVE_RSEQ_BEGIN             \
    ".pushsection __rseq_cs, \"aw?\"\n" \
    ".balign 32\n"                      \
    "3: .long 0, 0\n"                   \
    ".quad 1f, 2f - 1f, 4f\n"           \
    ".popsection\n"                     \
    "leaq 3b(%%rip), %%rax\n"           \
    "movq %%rax, %[rseq_cs]\n"          \
    "1: cmpl %[cpu], %[cpu_id]\n"       \
    "jne %l[moved]\n"

// 0f b9 3d: ud1, so that the signature in front of the handler is never run by mistake.
#define ADAPTIVE_RSEQ_END                    \
    "2:\n"                                   \
    ".pushsection __rseq_failure, \"ax?\"\n" \
    ".byte 0x0f, 0xb9, 0x3d\n"               \
    ".long 0x53053053\n"                     \
    "4: jmp %l[aborted]\n"                   \
    ".popsection\n"

#define ADAPTIVE_RSEQ_INPUTS [cpu] "r"(cpu), [cpu_id] "m"(area->cpu_id), [rseq_cs] "m"(area->rseq_cs)

namespace adaptive {

inline RseqEnd rseq_add(volatile RseqArea* area, uint32_t cpu, uint64_t* word, uint64_t delta) noexcept {
    asm goto(ADAPTIVE_RSEQ_BEGIN "addq %[delta], (%[word])\n"  // commit
             ADAPTIVE_RSEQ_END
             :
             : ADAPTIVE_RSEQ_INPUTS, [word] "r"(word), [delta] "r"(delta)
             : "rax", "cc", "memory"
             : moved, aborted);
    return RseqEnd::done;
moved:
    return RseqEnd::moved;
aborted:
    return RseqEnd::aborted;
}

inline RseqEnd rseq_compare_store(volatile RseqArea* area, uint32_t cpu, uint64_t* word, uint64_t expected,
                                  uint64_t desired) noexcept {
    asm goto(ADAPTIVE_RSEQ_BEGIN
             "cmpq %[expected], (%[word])\n"
             "jne %l[mismatch]\n"
             "movq %[desired], (%[word])\n"  // commit
             ADAPTIVE_RSEQ_END
             :
             : ADAPTIVE_RSEQ_INPUTS, [word] "r"(word), [expected] "r"(expected), [desired] "r"(desired)
             : "rax", "cc", "memory"
             : mismatch, moved, aborted);
    return RseqEnd::done;
mismatch:
    return RseqEnd::mismatch;
moved:
    return RseqEnd::moved;
aborted:
    return RseqEnd::aborted;
}

/// node: its first word becomes the link.
inline RseqEnd rseq_push(volatile RseqArea* area, uint32_t cpu, uint64_t* head, void* node) noexcept {
    asm goto(ADAPTIVE_RSEQ_BEGIN
             "movq (%[head]), %%rax\n"
             "movq %%rax, (%[node])\n"    // the node is still ours alone
             "movq %[node], (%[head])\n"  // commit
             ADAPTIVE_RSEQ_END
             :
             : ADAPTIVE_RSEQ_INPUTS, [head] "r"(head), [node] "r"(node)
             : "rax", "cc", "memory"
             : moved, aborted);
    return RseqEnd::done;
moved:
    return RseqEnd::moved;
aborted:
    return RseqEnd::aborted;
}

/// *node: what was popped; undefined unless done.
inline RseqEnd rseq_pop(volatile RseqArea* area, uint32_t cpu, uint64_t* head, void** node) noexcept {
    asm goto(ADAPTIVE_RSEQ_BEGIN
             "movq (%[head]), %%rax\n"
             "testq %%rax, %%rax\n"
             "je %l[mismatch]\n"
             "movq %%rax, (%[node])\n"
             "movq (%%rax), %%rax\n"    // the next one: nobody can have taken the first since it was read
             "movq %%rax, (%[head])\n"  // commit
             ADAPTIVE_RSEQ_END
             :
             : ADAPTIVE_RSEQ_INPUTS, [head] "r"(head), [node] "r"(node)
             : "rax", "cc", "memory"
             : mismatch, moved, aborted);
    return RseqEnd::done;
mismatch:
    return RseqEnd::mismatch;
moved:
    return RseqEnd::moved;
aborted:
    return RseqEnd::aborted;
}

}  // namespace adaptive

#undef ADAPTIVE_RSEQ_BEGIN
#undef ADAPTIVE_RSEQ_END
#undef ADAPTIVE_RSEQ_INPUTS
