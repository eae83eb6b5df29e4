#pragma once
/*
 * The restartable sequences of percpu.h for aarch64. Their shape, and the sections, are those of
 * percpu_x86_64.h.
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
    "adrp x16, 3b\n"                    \
    "add x16, x16, :lo12:3b\n"          \
    "str x16, %[rseq_cs]\n"             \
    "1: ldr w16, %[cpu_id]\n"           \
    "cmp w16, %w[cpu]\n"                \
    "b.ne %l[moved]\n"

// The signature: brk, so that it is never run by mistake.
#define ADAPTIVE_RSEQ_END                    \
    "2:\n"                                   \
    ".pushsection __rseq_failure, \"ax?\"\n" \
    ".inst 0xd428bc00\n"                     \
    "4: b %l[aborted]\n"                     \
    ".popsection\n"

#define ADAPTIVE_RSEQ_INPUTS [cpu] "r"(cpu), [cpu_id] "Q"(area->cpu_id), [rseq_cs] "Q"(area->rseq_cs)

namespace adaptive {

inline RseqEnd rseq_add(volatile RseqArea* area, uint32_t cpu, uint64_t* word, uint64_t delta) noexcept {
    asm goto(ADAPTIVE_RSEQ_BEGIN
             "ldr x16, [%[word]]\n"
             "add x16, x16, %[delta]\n"
             "str x16, [%[word]]\n"  // commit
             ADAPTIVE_RSEQ_END
             :
             : ADAPTIVE_RSEQ_INPUTS, [word] "r"(word), [delta] "r"(delta)
             : "x16", "cc", "memory"
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
             "ldr x16, [%[word]]\n"
             "cmp x16, %[expected]\n"
             "b.ne %l[mismatch]\n"
             "str %[desired], [%[word]]\n"  // commit
             ADAPTIVE_RSEQ_END
             :
             : ADAPTIVE_RSEQ_INPUTS, [word] "r"(word), [expected] "r"(expected), [desired] "r"(desired)
             : "x16", "cc", "memory"
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
             "ldr x16, [%[head]]\n"
             "str x16, [%[node]]\n"      // the node is still ours alone
             "str %[node], [%[head]]\n"  // commit
             ADAPTIVE_RSEQ_END
             :
             : ADAPTIVE_RSEQ_INPUTS, [head] "r"(head), [node] "r"(node)
             : "x16", "cc", "memory"
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
             "ldr x16, [%[head]]\n"
             "cbz x16, %l[mismatch]\n"
             "str x16, [%[node]]\n"
             "ldr x16, [x16]\n"      // the next one: nobody can have taken the first since it was read
             "str x16, [%[head]]\n"  // commit
             ADAPTIVE_RSEQ_END
             :
             : ADAPTIVE_RSEQ_INPUTS, [head] "r"(head), [node] "r"(node)
             : "x16", "cc", "memory"
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
