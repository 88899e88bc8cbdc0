// SPDX-License-Identifier: Apache-2.0
// From token ids to the text a client may see: streaming decode, stop strings, holding back what
// could be the start of a stop string. Pure, fixed memory.
#ifndef POLDER_RUNTIME_ENGINE_TEXT_H
#define POLDER_RUNTIME_ENGINE_TEXT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "runtime/engine/port.h"

enum { TEXT_HELD_MAX = 4096 };

struct text_output {
    uint32_t stops;
    uint16_t stop_bytes[ENGINE_STOPS_MAX];
    char stop[ENGINE_STOPS_MAX][ENGINE_STOP_BYTES_MAX];
    uint32_t held_bytes;
    char held[TEXT_HELD_MAX]; // decoded, not yet given out
    uint64_t decode_state[8]; // of the tokenizer's streaming decoder
};

// Adds text (complete characters). *ready is how many bytes at the start of `held` may be given out
// now; true when a stop string was found: *ready then ends where it starts and the rest is dropped.
bool text_add(struct text_output *output, const char *text, size_t bytes, size_t *ready);
// The first `bytes` of held were given out.
void text_consume(struct text_output *output, size_t bytes);

#endif
