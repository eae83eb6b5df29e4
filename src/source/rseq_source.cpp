#include "source/rseq_source.h"

#include <cstring>

namespace adaptive {

void rseq_table_format(void* mem, uint32_t slots, uint32_t cpus) noexcept {
    memset(mem, 0, rseq_table_bytes(slots, cpus));
    auto* table = static_cast<RseqSlot*>(mem);
    for (uint32_t i = 1; i < slots; i++) table[i].cpu = kNoCpu;
    auto* header = static_cast<RseqHeader*>(mem);
    header->version = kRseqVersion;
    header->slots = slots;
    header->cpus = cpus;
    __atomic_store_n(&header->magic, kRseqMagic, __ATOMIC_RELEASE);
}

}  // namespace adaptive
