// How a restartable sequence ended.
#pragma once

#include <cstdint>

namespace adaptive {

enum class RseqEnd : uint8_t {
    done,      // committed
    mismatch,  // the word did not hold what was expected (for a pop: the list is empty); nothing changed
    moved,     // the thread is on another CPU; nothing changed
    aborted,   // interrupted within the sequence; nothing changed
};

}  // namespace adaptive
