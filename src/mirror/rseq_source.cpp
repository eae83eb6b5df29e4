#include "mirror/rseq_source.h"

#include <cstring>

namespace adaptive {

void rseq_table_format(void* mem, uint32_t slots, uint32_t cpus) noexcept {
    memset(mem, 0, rseq_table_bytes(slots, cpus));
    rseq_table_head(mem, slots, cpus);
}

void rseq_table_head(void* mem, uint32_t slots, uint32_t cpus) noexcept {
    auto* header = static_cast<RseqHeader*>(mem);
    header->version = kRseqVersion;
    header->slots = slots;
    header->cpus = cpus;
    __atomic_store_n(&header->magic, kRseqMagic, __ATOMIC_RELEASE);
}

}  // namespace adaptive
