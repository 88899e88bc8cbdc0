// SPDX-License-Identifier: Apache-2.0
// One loop over values. A value is taken only when all of its header (and, for str and bin, all of
// its bytes) is there; otherwise `at` stays on its first byte and the caller comes back with more.
// Re-reading a header costs O(1), a string is examined once, so the total work is linear.
//
// Invariants: 1. pending <= frame_bytes - at after each container header, for every value needs a
// byte: so a message that passes never announces more than its limit can hold. 2. The keys of all
// open maps lie on one stack, each map's at the end while it is the innermost; comparing a key
// costs at most SCAN_KEYS_MAX hash comparisons. 3. bytes[0..at) never needs to be looked at again,
// except keys of open maps.
#include "runtime/server/scan.h"

#include <string.h>

#ifdef POLDER_PLANT_BUG
enum {
    HEADER_SLACK = 1
}; // the planted bug of tests/fuzz_rpc.c: a header is read one byte too early
#else
enum { HEADER_SLACK = 0 };
#endif

enum step { STEP_TAKEN, STEP_SHORT, STEP_BAD }; // SHORT: bytes are missing, nothing was taken

enum value_kind { VALUE_SCALAR, VALUE_STR, VALUE_BIN, VALUE_ARRAY, VALUE_MAP };

struct value {
    enum value_kind kind;
    size_t header;  // bytes before the payload; of a scalar: all of it
    uint64_t count; // bytes of str and bin, items of an array, pairs of a map
};

// Length of the character at the start, or, with *valid false, of the longest beginning of a
// character that is there (at least 1): what Unicode (table 3-8) replaces by one U+FFFD. count > 0.
static size_t utf8_step(const uint8_t *bytes, size_t count, bool *valid)
{
    uint8_t lead = bytes[0];
    *valid = lead < 0x80;
    if (lead < 0xc2 || lead > 0xf4)
        return 1;
    size_t length = lead >= 0xf0 ? 4 : lead >= 0xe0 ? 3 : 2;
    uint8_t low = lead == 0xe0 ? 0xa0 : lead == 0xf0 ? 0x90 : 0x80;
    uint8_t high = lead == 0xed ? 0x9f : lead == 0xf4 ? 0x8f : 0xbf;
    for (size_t i = 1; i < length; i++) {
        if (i >= count || bytes[i] < low || bytes[i] > high)
            return i;
        low = 0x80;
        high = 0xbf;
    }
    *valid = true;
    return length;
}

bool utf8_is_valid(const uint8_t *bytes, size_t count)
{
    bool valid = true;
    for (size_t i = 0; i < count && valid;)
        i += utf8_step(bytes + i, count - i, &valid);
    return valid;
}

size_t utf8_lossy(const uint8_t *bytes, size_t count, char *out)
{
    size_t used = 0;
    for (size_t i = 0; i < count;) {
        bool valid;
        size_t length = utf8_step(bytes + i, count - i, &valid);
        memcpy(out + used, valid ? (const char *)bytes + i : "\xef\xbf\xbd", valid ? length : 3);
        used += valid ? length : 3;
        i += length;
    }
    return used;
}

void scan_begin(struct scanner *scanner, const struct scan_limits *limits)
{
    scanner->limits = *limits;
    scanner->at = 0;
    scanner->pending = 1;
    scanner->items = scanner->depth = scanner->keys = 0;
    scanner->reason = NULL;
}

static enum step bad(struct scanner *scanner, const char *reason)
{
    scanner->reason = reason;
    return STEP_BAD;
}

static uint64_t big_endian(const uint8_t *bytes, size_t count)
{
    uint64_t value = 0;
    for (size_t i = 0; i < count; i++)
        value = value << 8 | bytes[i];
    return value;
}

// Bytes of length field or scalar payload that follow first bytes 0xc0 to 0xdf.
static const uint8_t field_bytes[32] = {
    0, 0, 0, 0, 1, 2, 4, 0, 0, 0, 4, 8, 1, 2, 4, 8, // nil, -, false, true, bin, ext, float, uint
    1, 2, 4, 8, 0, 0, 0, 0, 0, 1, 2, 4, 2, 4, 2, 4, // int, fixext, str, array, map
};

// What the first byte says. false: not allowed.
static bool classify(struct scanner *scanner, uint8_t first, struct value *value)
{
    *value = (struct value){.kind = VALUE_SCALAR, .header = 1};
    if (first < 0x80 || first >= 0xe0)
        return true;
    if (first < 0xc0) {
        value->kind = first < 0x90 ? VALUE_MAP : first < 0xa0 ? VALUE_ARRAY : VALUE_STR;
        value->count = first & (first < 0xa0 ? 0x0f : 0x1f);
        return true;
    }
    value->header += field_bytes[first - 0xc0];
    if (first == 0xc1)
        scanner->reason = "the byte c1 does not exist in msgpack";
    else if ((first >= 0xc7 && first <= 0xc9) || (first >= 0xd4 && first <= 0xd8))
        scanner->reason = "ext values are not used in this protocol";
    else if (first >= 0xc4 && first <= 0xc6)
        value->kind = VALUE_BIN;
    else if (first >= 0xd9 && first <= 0xdb)
        value->kind = VALUE_STR;
    else if (first == 0xdc || first == 0xdd)
        value->kind = VALUE_ARRAY;
    else if (first >= 0xde)
        value->kind = VALUE_MAP;
    return !scanner->reason;
}

// The root array and the message type: what msgpack-RPC itself demands.
static enum step check_envelope(struct scanner *scanner, const struct value *value,
                                const uint8_t *bytes)
{
    if (!scanner->depth)
        return value->kind == VALUE_ARRAY && (value->count == 3 || value->count == 4)
                   ? STEP_TAKEN
                   : bad(scanner, "a message must be an array of 3 or 4 values");
    if (scanner->depth != 1 || scanner->items != 1)
        return STEP_TAKEN;
    uint8_t first = bytes[scanner->at];
    bool is_unsigned = first < 0x80 || (first >= 0xcc && first <= 0xcf);
    uint64_t type = first < 0x80 ? first : big_endian(bytes + scanner->at + 1, value->header - 1);
    if (!is_unsigned || type > 2)
        return bad(scanner, "the message type must be 0, 1 or 2");
    if (scanner->level[0].left != (type == 2 ? 3 : 4))
        return bad(scanner, "requests and responses have 4 values, notifications 3");
    return STEP_TAKEN;
}

static enum step check_key(struct scanner *scanner, const struct value *value, const uint8_t *bytes)
{
    struct scan_level *level = &scanner->level[scanner->depth - 1];
    if (value->kind != VALUE_STR)
        return bad(scanner, "a map key must be a str");
    if (value->count > SCAN_KEY_BYTES_MAX)
        return bad(scanner, "a map key is longer than 255 bytes");
    if (scanner->keys == SCAN_KEYS_MAX)
        return bad(scanner, "too many map keys");
    const uint8_t *text = bytes + scanner->at + value->header;
    uint32_t hash = 2166136261u;
    for (size_t i = 0; i < value->count; i++)
        hash = (hash ^ text[i]) * 16777619u;
    for (uint32_t i = scanner->keys - level->keys; i < scanner->keys; i++) {
        const struct scan_key *key = &scanner->key[i];
        if (key->hash == hash && key->bytes == value->count &&
            !memcmp(bytes + key->offset, text, key->bytes))
            return bad(scanner, "a map key is there twice");
    }
    scanner->key[scanner->keys++] =
        (struct scan_key){.offset = (uint32_t)(scanner->at + value->header),
                          .hash = hash,
                          .bytes = (uint8_t)value->count};
    level->keys++;
    return STEP_TAKEN;
}

static enum step enter(struct scanner *scanner, const struct value *value)
{
    uint64_t values = value->kind == VALUE_MAP ? value->count * 2 : value->count;
    if (scanner->depth == SCAN_DEPTH_MAX)
        return bad(scanner, "the nesting is deeper than 16 levels");
    if (scanner->pending + values > scanner->limits.frame_bytes - scanner->at - value->header)
        return bad(scanner, "more items are announced than a message can hold");
    if (scanner->items + scanner->pending + values > scanner->limits.items)
        return bad(scanner, "the message has too many items");
    if (!values)
        return STEP_TAKEN;
    scanner->pending += values;
    scanner->level[scanner->depth++] = (struct scan_level){
        .left = (uint32_t)values, .map = value->kind == VALUE_MAP, .key = value->kind == VALUE_MAP};
    return STEP_TAKEN;
}

// A value is done: count it in its container, and close what is full.
static void leave(struct scanner *scanner)
{
    while (scanner->depth) {
        struct scan_level *level = &scanner->level[scanner->depth - 1];
        level->left--;
        level->key = level->map && !level->key;
        if (level->left)
            return;
        scanner->keys -= level->keys;
        scanner->depth--;
    }
}

static enum step check_string(struct scanner *scanner, const struct value *value,
                              const uint8_t *bytes, size_t count)
{
    if (value->kind != VALUE_STR && value->kind != VALUE_BIN)
        return STEP_TAKEN;
    if (value->count > scanner->limits.string_bytes)
        return bad(scanner, "a str or bin is too long");
    if (value->header + value->count > scanner->limits.frame_bytes - scanner->at)
        return bad(scanner, "the message is too long");
    if (count - scanner->at < value->header + value->count)
        return STEP_SHORT;
    if (value->kind == VALUE_STR &&
        !utf8_is_valid(bytes + scanner->at + value->header, (size_t)value->count))
        return bad(scanner, "a str is not valid UTF-8");
    return STEP_TAKEN;
}

// Takes one value at scanner->at.
static enum step take(struct scanner *scanner, const uint8_t *bytes, size_t count)
{
    struct value value;
    if (scanner->at >= scanner->limits.frame_bytes)
        return bad(scanner, "the message is too long");
    if (scanner->at >= count)
        return STEP_SHORT;
    if (!classify(scanner, bytes[scanner->at], &value))
        return STEP_BAD;
    if (value.header > scanner->limits.frame_bytes - scanner->at)
        return bad(scanner, "the message is too long");
    if (count - scanner->at + HEADER_SLACK < value.header)
        return STEP_SHORT;
    if (value.kind != VALUE_SCALAR && value.header > 1)
        value.count = big_endian(bytes + scanner->at + 1, value.header - 1);
    if (scanner->items == scanner->limits.items)
        return bad(scanner, "the message has too many items");
    enum step step = check_string(scanner, &value, bytes, count);
    if (step != STEP_TAKEN)
        return step;
    if (check_envelope(scanner, &value, bytes) == STEP_BAD)
        return STEP_BAD;
    if (scanner->depth && scanner->level[scanner->depth - 1].key &&
        check_key(scanner, &value, bytes) == STEP_BAD)
        return STEP_BAD;
    bool container = value.kind == VALUE_ARRAY || value.kind == VALUE_MAP;
    scanner->items++;
    scanner->pending--;
    if (container && enter(scanner, &value) == STEP_BAD)
        return STEP_BAD;
    scanner->at += value.header + (container ? 0 : (size_t)value.count);
    if (!container || !value.count)
        leave(scanner);
    return STEP_TAKEN;
}

enum scan_result scan_run(struct scanner *scanner, const uint8_t *bytes, size_t count)
{
    while (scanner->pending) {
        enum step step = take(scanner, bytes, count);
        if (step != STEP_TAKEN)
            return step == STEP_BAD ? SCAN_BAD : SCAN_MORE;
    }
    return SCAN_COMPLETE;
}
