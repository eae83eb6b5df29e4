#pragma once
/* Whether the module does its work in this server, and if not, why. */

namespace adaptive::module {

struct Status {
    bool active;
    const char* reason;  // why not, or null
    int functions_replaced;
};
Status status();

/// False when the library was loaded by a single session, which has no shared memory of the module's.
bool preloaded();

}  // namespace adaptive::module
