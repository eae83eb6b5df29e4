// Fills in an Error, and says false: `return fail(error, "no such %s", name);`
#pragma once

#include <cstdarg>
#include <cstdio>

#include "mirror/mirror.h"

namespace adaptive {

__attribute__((format(printf, 2, 3))) inline bool fail(Error* error, const char* format, ...) noexcept {
    if (error == nullptr) return false;
    va_list args;
    va_start(args, format);
    vsnprintf(error->text, sizeof(error->text), format, args);
    va_end(args);
    return false;
}

}  // namespace adaptive
