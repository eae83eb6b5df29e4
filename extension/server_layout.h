#pragma once
/*
 * Does the running server lay out what this module uses as the headers say that the module was built with?
 *
 * The magic block compares the major version only. A minor release that moved a member of PGPROC would get its wait lists
 * written to in the wrong places.
 */

#include <cstddef>

namespace adaptive::server_layout {

/// Compares with what the server itself has just initialized. Only in the postmaster, once it has set up shared memory and
/// before it has children. False: `why`, of `why_size` bytes, says what differs.
bool is_as_built(char* why, size_t why_size);

}  // namespace adaptive::server_layout
