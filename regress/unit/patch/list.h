// A list that one file keeps to itself, as lwlock.c does the locks held, and another file that uses it.
#pragma once

extern "C" {
int list_add(long item, int mode);  // modes 0 and 1 take even and odd items only
int list_clear();                   // how many there were
int list_has(long item);
int list_has_between(long first, long last);

int other_file_clears();
int other_file_adds();
}
