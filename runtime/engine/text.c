// SPDX-License-Identifier: Apache-2.0
// The search starts where a stop string could reach into the new text, so the work per token is
// bounded by the stop strings' length, not by the answer's.
#include "runtime/engine/text.h"

#include <string.h>

#include "base/check.h"

// Where the first stop string begins in held, or held_bytes.
static size_t find_stop(const struct text_output *o)
{
    size_t first = o->held_bytes;
    for (uint32_t s = 0; s < o->stops; s++) {
        size_t n = o->stop_bytes[s];
        for (size_t at = 0; n && at + n <= o->held_bytes && at < first; at++) {
            if (!memcmp(o->held + at, o->stop[s], n))
                first = at;
        }
    }
    return first;
}

// Longest end of held that is a proper beginning of some stop string.
static size_t pending_stop(const struct text_output *o)
{
    size_t longest = 0;
    for (uint32_t s = 0; s < o->stops; s++) {
        size_t n = o->stop_bytes[s] ? (size_t)o->stop_bytes[s] - 1 : 0;
        if (n > o->held_bytes)
            n = o->held_bytes;
        for (; n > longest; n--) {
            if (!memcmp(o->held + o->held_bytes - n, o->stop[s], n))
                longest = n;
        }
    }
    return longest;
}

bool text_add(struct text_output *output, const char *text, size_t bytes, size_t *ready)
{
    CHECK(bytes <= TEXT_HELD_MAX - output->held_bytes);
    memcpy(output->held + output->held_bytes, text, bytes);
    output->held_bytes += (uint32_t)bytes;
    size_t at = find_stop(output);
    if (at < output->held_bytes) {
        output->held_bytes = (uint32_t)at;
        *ready = at;
        return true;
    }
    *ready = output->held_bytes - pending_stop(output);
    return false;
}

void text_consume(struct text_output *output, size_t bytes)
{
    CHECK(bytes <= output->held_bytes);
    memmove(output->held, output->held + bytes, output->held_bytes - bytes);
    output->held_bytes -= (uint32_t)bytes;
}
