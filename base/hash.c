// SPDX-License-Identifier: Apache-2.0
#include "base/hash.h"

#include <sodium.h>
#include <string.h>

#include "base/check.h"

_Static_assert(sizeof(struct hash_stream) >= sizeof(crypto_generichash_state), "state fits");

struct digest hash_bytes(const struct digest *key, const void *data, size_t bytes)
{
    struct digest digest;
    CHECK(crypto_generichash(digest.bytes, DIGEST_BYTES, data, bytes, key ? key->bytes : NULL,
                             key ? DIGEST_BYTES : 0) == 0);
    return digest;
}

void hash_begin(struct hash_stream *stream, const struct digest *key)
{
    CHECK(crypto_generichash_init((crypto_generichash_state *)(void *)stream->opaque,
                                  key ? key->bytes : NULL, key ? DIGEST_BYTES : 0,
                                  DIGEST_BYTES) == 0);
}

void hash_update(struct hash_stream *stream, const void *data, size_t bytes)
{
    CHECK(crypto_generichash_update((crypto_generichash_state *)(void *)stream->opaque, data,
                                    bytes) == 0);
}

struct digest hash_end(struct hash_stream *stream)
{
    struct digest digest;
    CHECK(crypto_generichash_final((crypto_generichash_state *)(void *)stream->opaque, digest.bytes,
                                   DIGEST_BYTES) == 0);
    return digest;
}

bool digest_equal(const struct digest *a, const struct digest *b)
{
    return sodium_memcmp(a->bytes, b->bytes, DIGEST_BYTES) == 0;
}

void digest_hex(const struct digest *digest, char out[2 * DIGEST_BYTES + 1])
{
    (void)sodium_bin2hex(out, 2 * DIGEST_BYTES + 1, digest->bytes, DIGEST_BYTES);
}

bool digest_from_hex(const char *hex, struct digest *out)
{
    size_t length = 0;
    return strlen(hex) == 2 * DIGEST_BYTES &&
           sodium_hex2bin(out->bytes, DIGEST_BYTES, hex, 2 * DIGEST_BYTES, NULL, &length, NULL) ==
               0 &&
           length == DIGEST_BYTES;
}

void random_bytes(void *out, size_t bytes)
{
    randombytes_buf(out, bytes);
}
