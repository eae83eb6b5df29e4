#pragma once
/*
 * Why something failed, in one line for people: what is missing and what to do.
 *
 * Whatever can fail takes an Error* (may be null) and returns false: `return fail(error, "no such %s", name);`
 */

#include <cstdarg>
#include <cstdio>

namespace adaptive {

struct Error {
    char text[256];
};

__attribute__((format(printf, 2, 3))) inline bool fail(Error* error, const char* format, ...) noexcept {
    if (error == nullptr) return false;
    va_list args;
    va_start(args, format);
    vsnprintf(error->text, sizeof(error->text), format, args);
    va_end(args);
    return false;
}

}  // namespace adaptive
