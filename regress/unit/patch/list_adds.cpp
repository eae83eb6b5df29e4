#include "list.h"

// Always in one mode, for which a clone is made.
int other_file_adds() {
    return list_add(4, 0);
}
