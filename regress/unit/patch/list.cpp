#include "list.h"

namespace {
long items[50];
int count;
}  // namespace

int list_add(long item, int mode) {
    if (count >= 50) return 0;
    switch (mode) {
        case 0:
            if (item % 2 != 0) return 0;
            break;
        case 1:
            if (item % 2 == 0) return 0;
            break;
        default:
            for (int i = 0; i < count; i++)
                if (items[i] % mode == item % mode) return 0;
    }
    items[count++] = item;
    return 1;
}

int list_clear() {
    int cleared = 0;
    for (; count > 0; cleared++) items[--count] = 0;
    return cleared;
}

int list_has(long item) {
    for (int i = 0; i < count; i++)
        if (items[i] == item) return 1;
    return 0;
}

int list_has_between(long first, long last) {
    for (int i = 0; i < count; i++)
        if (items[i] >= first && items[i] <= last) return 1;
    return 0;
}
