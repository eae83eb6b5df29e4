#include "ops.h"

using namespace adaptive;

void list_push(const PerCpu& lanes, size_t head, PerCpuNode* node);
PerCpuNode* list_pop(const PerCpu& lanes, size_t head);

const test::PerCpuOps percpu_ops = {
    [](const PerCpu& lanes) { return lanes.restartable(); },
    [](const PerCpu& lanes, size_t offset, uint64_t delta) { lanes.add(offset, delta); },
    [](const PerCpu& lanes, uint32_t lane, size_t offset, uint64_t expected, uint64_t desired) {
        return lanes.compare_store(lane, offset, expected, desired);
    },
    list_push, list_pop};
