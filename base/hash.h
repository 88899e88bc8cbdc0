// SPDX-License-Identifier: Apache-2.0
// BLAKE2b-256 (RFC 7693, libsodium): content digests, hashed keys, prefix-cache chains.
#ifndef POLDER_BASE_HASH_H
#define POLDER_BASE_HASH_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { DIGEST_BYTES = 32 };

struct digest {
    uint8_t bytes[DIGEST_BYTES];
};

// key may be NULL (unkeyed), else DIGEST_BYTES long.
struct digest hash_bytes(const struct digest *key, const void *data, size_t bytes);

struct hash_stream {
    _Alignas(64) unsigned char opaque[448];
};
void hash_begin(struct hash_stream *stream, const struct digest *key);
void hash_update(struct hash_stream *stream, const void *data, size_t bytes);
struct digest hash_end(struct hash_stream *stream);

// The lower level of a tree, for what is large: into the stream goes the digest of each piece of
// HASH_PIECE bytes, not the bytes. The last piece of a call may be shorter, so all calls of a
// stream but the last give a multiple. Three times as fast as hash_update where the processor has
// the vectors, and the same everywhere.
enum { HASH_PIECE = 4096 };
void hash_pieces(struct hash_stream *stream, const void *data, size_t bytes);
// For tests: with at most this many at once.
enum hash_width { HASH_ONE, HASH_FOUR, HASH_EIGHT };
enum hash_width hash_width_here(void);
void hash_pieces_as(struct hash_stream *stream, const void *data, size_t bytes,
                    enum hash_width width);

bool digest_equal(const struct digest *a, const struct digest *b); // constant time
void digest_hex(const struct digest *digest, char out[2 * DIGEST_BYTES + 1]);
bool digest_from_hex(const char *hex, struct digest *out);

void random_bytes(void *out, size_t bytes); // from the kernel, for salts and keys only

#endif
