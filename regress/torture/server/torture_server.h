// The torture's part of lock_generator's shared memory. Called from its hooks, in the postmaster.
#pragma once

namespace lock_generator::torture {

void request_shmem();
/// Under AddinShmemInitLock.
void start_shmem();

}  // namespace lock_generator::torture
