// The per-CPU operations as a shared object offers them, built at every level of optimisation.
#pragma once

#include "percpu/percpu.h"

namespace test {

struct PerCpuOps {
    bool (*restartable)(const adaptive::PerCpu&);
    void (*add)(const adaptive::PerCpu&, size_t offset, uint64_t delta);
    adaptive::RseqEnd (*compare_store)(const adaptive::PerCpu&, uint32_t lane, size_t offset,
                                       uint64_t expected, uint64_t desired);
    void (*push)(const adaptive::PerCpu&, size_t head, adaptive::PerCpuNode*);
    adaptive::PerCpuNode* (*pop)(const adaptive::PerCpu&, size_t head);
};

}  // namespace test

extern "C" const test::PerCpuOps percpu_ops;
