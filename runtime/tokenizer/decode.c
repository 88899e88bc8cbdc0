// SPDX-License-Identifier: Apache-2.0
// The way back: ids into bytes, all at once or one at a time as whole characters. And the
// vocabulary.
#include <string.h>

#include "base/arith.h"
#include "runtime/tokenizer/internal.h"

static const char replacement[] = "\xef\xbf\xbd"; // U+FFFD

uint32_t tokenizer_id_limit(const struct tokenizer *t)
{
    return t->id_limit;
}

uint32_t tokenizer_count(const struct tokenizer *t)
{
    return t->count;
}

bool tokenizer_bytes(const struct tokenizer *t, uint32_t id, const uint8_t **out, size_t *bytes)
{
    if (id >= t->id_limit || !t->entries[id].flags)
        return false;
    *out = t->blob + t->entries[id].offset;
    *bytes = t->entries[id].bytes;
    return true;
}

bool tokenizer_is_special(const struct tokenizer *t, uint32_t id)
{
    return id < t->id_limit && (t->entries[id].flags & TOKEN_SPECIAL);
}

bool tokenizer_find(const struct tokenizer *t, const char *text, size_t bytes, uint32_t *id)
{
    const struct added_set *const sets[] = {&t->raw, &t->normalized};
    for (size_t k = 0; k < 2; k++)
        for (size_t i = 0; i < sets[k]->count; i++) {
            const struct added_token *token = &sets[k]->tokens[i];
            if (token->bytes == bytes && memcmp(token->text, text, bytes) == 0) {
                *id = token->id;
                return true;
            }
        }
    return tokenizer__find_ordinary(t, (const uint8_t *)text, bytes, id);
}

size_t tokenizer_decode(const struct tokenizer *t, const uint32_t *ids, size_t count,
                        bool skip_special, uint8_t *out, size_t room)
{
    size_t total = 0;
    for (size_t i = 0; i < count; i++) {
        const uint8_t *bytes;
        size_t n;
        if (!tokenizer_bytes(t, ids[i], &bytes, &n) ||
            (skip_special && tokenizer_is_special(t, ids[i])))
            continue;
        if (total < room && n)
            memcpy(out + total, bytes, min_size(n, room - total));
        total += n;
    }
    return total;
}

// Adds a byte to what is held and writes what has become certain. At most 4 bytes are held: a
// beginning that is still possible (up to 3) and the new one.
static size_t push_byte(struct token_stream *stream, uint8_t byte, char *out)
{
    size_t written = 0;
    stream->held[stream->held_bytes++] = byte;
    while (stream->held_bytes) {
        int length = utf8__scan(stream->held, stream->held_bytes);
        if (!length)
            break;
        size_t used = (size_t)(length > 0 ? length : -length);
        if (length > 0)
            memcpy(out + written, stream->held, used);
        else
            memcpy(out + written, replacement, 3);
        written += length > 0 ? used : 3;
        stream->held_bytes = (uint8_t)(stream->held_bytes - used);
        memmove(stream->held, stream->held + used, stream->held_bytes);
    }
    return written;
}

size_t token_stream_push(const struct tokenizer *t, struct token_stream *stream, uint32_t id,
                         char *out)
{
    const uint8_t *bytes;
    size_t count, written = 0;
    if (!tokenizer_bytes(t, id, &bytes, &count) ||
        (!stream->keep_special && tokenizer_is_special(t, id)))
        return 0;
    for (size_t i = 0; i < count; i++)
        written += push_byte(stream, bytes[i], out + written);
    return written;
}

size_t token_stream_flush(struct token_stream *stream, char *out)
{
    if (!stream->held_bytes)
        return 0;
    stream->held_bytes = 0;
    memcpy(out, replacement, 3);
    return 3;
}
