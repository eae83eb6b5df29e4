#pragma once
/* The server's LWLock functions, replaced: the list for the patcher, and what the self-check needs. */

#include "patch/patch.h"

namespace adaptive::lwlock_api {

constexpr int kFunctions = 12;
extern const patch::Replacement kReplacements[kFunctions];

/// How many locks this process holds by the replacement's own list.
int held_count();

}  // namespace adaptive::lwlock_api
