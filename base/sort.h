// SPDX-License-Identifier: Apache-2.0
// Heapsort in place. qsort of the C library may allocate; the step loop may not.
// Not stable: comparators break ties themselves.
#ifndef POLDER_BASE_SORT_H
#define POLDER_BASE_SORT_H

#include <stddef.h>

typedef int (*sort_compare)(const void *a, const void *b);

void sort_in_place(void *items, size_t count, size_t item_bytes, sort_compare compare);

#endif
