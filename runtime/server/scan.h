// SPDX-License-Identifier: Apache-2.0
// The frame scanner: walks one msgpack-RPC message with limits BEFORE msgpack-c sees it, because
// msgpack-c has none (five bytes make it reserve gigabytes). It also finds where the message ends.
//
// Accepted: one array of 4 (first element 0 or 1) or 3 (first element 2); inside it nil, booleans,
// integers, floats, str (valid UTF-8), bin, arrays, and maps whose keys are str and differ.
// Refused: ext, byte 0xc1, everything beyond the limits. A claim that cannot fit (2^32 items) is
// refused when its header is read.
//
// The caller keeps the bytes of an unfinished message in one buffer and calls scan_run again with
// more of them; scanning goes on where it stopped, so the work is linear in the bytes. Pure, fixed
// memory.
#ifndef POLDER_RUNTIME_SERVER_SCAN_H
#define POLDER_RUNTIME_SERVER_SCAN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {
    SCAN_DEPTH_MAX = 16,
    SCAN_KEYS_MAX = 128,     // keys of the maps that are open at one time
    SCAN_KEY_BYTES_MAX = 255 // of one key
};

struct scan_limits {
    size_t frame_bytes;  // of one message
    size_t string_bytes; // of one str or bin
    uint32_t items;      // values in one message, containers included
};

enum scan_result { SCAN_MORE, SCAN_COMPLETE, SCAN_BAD };

struct scan_level {
    uint32_t left; // values still to come in this container
    bool map, key; // key: the next value is a key
    uint16_t keys; // of this map, at the end of the scanner's key stack
};

struct scan_key {
    uint32_t offset, hash;
    uint8_t bytes;
};

struct scanner {
    struct scan_limits limits;
    size_t at;        // next byte to look at
    uint64_t pending; // values announced by open containers and not seen yet
    uint32_t items, depth, keys;
    const char *reason; // when bad: a sentence without a dot
    struct scan_level level[SCAN_DEPTH_MAX];
    struct scan_key key[SCAN_KEYS_MAX];
};

void scan_begin(struct scanner *scanner, const struct scan_limits *limits);

// `bytes` is the message from its first byte, `count` how much of it there is by now (never less
// than in an earlier call). COMPLETE: the message is bytes[0..scanner->at). BAD: at byte
// scanner->at because scanner->reason; nothing more can be read from this peer. MORE: at least one
// byte is missing.
enum scan_result scan_run(struct scanner *scanner, const uint8_t *bytes, size_t count);

bool utf8_is_valid(const uint8_t *bytes, size_t count);
// A copy in which every broken part is U+FFFD; `out` has room for 3 * count bytes. Returns its
// length.
size_t utf8_lossy(const uint8_t *bytes, size_t count, char *out);

#endif
