// SPDX-License-Identifier: Apache-2.0
#include "base/sort.h"

#include <stdint.h>

static void swap(uint8_t *a, uint8_t *b, size_t bytes)
{
    for (size_t i = 0; i < bytes; i++) {
        uint8_t t = a[i];
        a[i] = b[i];
        b[i] = t;
    }
}

static void sift(uint8_t *items, size_t from, size_t count, size_t bytes, sort_compare compare)
{
    for (size_t root = from;;) {
        size_t child = 2 * root + 1;
        if (child >= count)
            return;
        if (child + 1 < count && compare(items + child * bytes, items + (child + 1) * bytes) < 0)
            child++;
        if (compare(items + root * bytes, items + child * bytes) >= 0)
            return;
        swap(items + root * bytes, items + child * bytes, bytes);
        root = child;
    }
}

void sort_in_place(void *items, size_t count, size_t item_bytes, sort_compare compare)
{
    uint8_t *base = items;
    for (size_t i = count / 2; i-- > 0;)
        sift(base, i, count, item_bytes, compare);
    for (size_t end = count; end-- > 1;) {
        swap(base, base + end * item_bytes, item_bytes);
        sift(base, 0, end, item_bytes, compare);
    }
}
