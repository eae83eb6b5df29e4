/*
 * Preloaded into what runs under the emulator: shows a process as having one thread. The emulator has a thread of its own in
 * each, and no function is replaced in a process with several.
 *
 * ONE_TASK: a directory with one entry.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

DIR* opendir(const char* path) {
    DIR* (*next)(const char*) = (DIR * (*)(const char*)) dlsym(RTLD_NEXT, "opendir");
    return next(strcmp(path, "/proc/self/task") == 0 ? getenv("ONE_TASK") : path);
}
