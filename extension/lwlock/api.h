#pragma once
/* The server's LWLock functions, replaced, and what the self-check needs. */

#include "patch/patch.h"

namespace adaptive::lwlock_api {

/// Puts the replacements in place of the server's functions. Undone by patch::remove().
patch::Result install();

/// How many locks this process holds by the replacement's own list.
int held_count();

}  // namespace adaptive::lwlock_api
