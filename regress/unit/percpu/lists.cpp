// A second file of the shared object. Where nothing is inlined both contain the same functions, of which the
// linker keeps one copy.
#include "ops.h"

using namespace adaptive;

void list_push(const PerCpu& lanes, size_t head, PerCpuNode* node) {
    lanes.push(head, node);
    lanes.add(head + sizeof(uint64_t), 1);  // pushes, next to the list's head
}

PerCpuNode* list_pop(const PerCpu& lanes, size_t head) {
    return lanes.pop(head);
}
