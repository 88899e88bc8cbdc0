// SPDX-License-Identifier: Apache-2.0
// Byte-level BPE tokenizers in the form Hugging Face's tokenizer.json gives them (GPT-2, Qwen2,
// Qwen3, Llama 3): the same ids as the `tokenizers` package, or a refusal that names what is not
// supported.
//
//   text -> [non-normalized added tokens cut out] -> normalizer -> [normalized added tokens cut
//   out]
//        -> pre-tokenizer (splits, digits, byte-level) -> words -> BPE -> ids
//
// Read: model BPE (merges as "a b" or [a, b], ignore_merges), normalizers NFC NFD NFKC NFKD and
// Sequence, pre-tokenizers Split Digits ByteLevel and Sequence (ByteLevel last), decoder ByteLevel,
// post-processors ByteLevel and TemplateProcessing, added_tokens with all their flags. Everything
// else, every unknown key included, is STATUS_UNSUPPORTED with its name.
//
// Text is any bytes. A maximal run of bytes that are not UTF-8 (Unicode 15, table 3-7) is one word
// of its own: it is not normalized, not split, matches no added token, and the text on its two
// sides is encoded as if it stood alone (add_prefix_space applies only at the very start of the
// text and after added tokens). Every tokenizer that loads has all 256 bytes, so decoding gives
// back the very bytes whenever the file asks for no change of text (normalizer, add_prefix_space,
// Removed, lstrip, rstrip).
//
// Text cannot make special tokens unless the caller passes TOKENIZE_SPECIAL: a file in which merges
// or single bytes give a special token is refused.
//
// A tokenizer is immutable after loading: any thread may use it, each with its own token_scratch.
#ifndef POLDER_RUNTIME_TOKENIZER_TOKENIZER_H
#define POLDER_RUNTIME_TOKENIZER_TOKENIZER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

enum {
    TOKENIZER_FILE_MAX = 64 << 20,                // bytes of tokenizer.json
    TOKENIZER_TEXT_MAX = 8 << 20,                 // bytes of one text to encode
    TOKENIZER_IDS_MAX = 1 << 21,                  // ids are below this
    TOKEN_BYTES_MAX = 1024,                       // of one token
    TOKEN_STREAM_ROOM = 3 * (TOKEN_BYTES_MAX + 4) // bytes token_stream_push may write
};

struct tokenizer;

// `label` names the text in sentences; the text is not kept. CORRUPT (damaged or contradictory),
// UNSUPPORTED, LIMIT, NO_MEMORY. The caller frees *out.
MUST_USE enum status tokenizer_load(const char *label, const char *json, size_t bytes,
                                    struct tokenizer **out, struct fault *fault);
// Reads directory/tokenizer.json; also NOT_FOUND, IO.
MUST_USE enum status tokenizer_load_in(const char *directory, struct tokenizer **out,
                                       struct fault *fault);
void tokenizer_free(struct tokenizer *tokenizer); // NULL is fine

// ---- the vocabulary ----
uint32_t
tokenizer_id_limit(const struct tokenizer *tokenizer); // all ids are below; there may be holes
uint32_t tokenizer_count(const struct tokenizer *tokenizer); // ids that stand for something
// The bytes an id stands for (any bytes, often half a character), valid as long as the tokenizer;
// false for an id that stands for nothing.
bool tokenizer_bytes(const struct tokenizer *tokenizer, uint32_t id, const uint8_t **out,
                     size_t *bytes);
bool tokenizer_is_special(const struct tokenizer *tokenizer, uint32_t id);
// The id of the added token with this content ("<|im_end|>"), else of the ordinary token with
// exactly these bytes; false when there is none.
bool tokenizer_find(const struct tokenizer *tokenizer, const char *text, size_t bytes,
                    uint32_t *id);

// ---- encode ----
// Working memory of one thread at a time. During a call it grows to at most 28 bytes per byte of
// the longest word and 10 per byte of text that is normalized; what is beyond 1 MiB is given back
// after it.
struct token_scratch;
MUST_USE enum status token_scratch_create(struct token_scratch **out);
void token_scratch_destroy(struct token_scratch *scratch); // NULL is fine

// Ids; begin with {0}, encoding appends and grows `ids` by realloc; the owner frees with
// token_list_clear.
struct token_list {
    uint32_t *ids;
    size_t count, capacity;
};
void token_list_clear(struct token_list *list);

enum tokenize_flags {
    TOKENIZE_SPECIAL = 1,  // special tokens written in the text are recognised
    TOKENIZE_TEMPLATE = 2, // the post-processor's tokens (BOS) are put around the text
};

// Appends the ids of a text. LIMIT when the text is longer than TOKENIZER_TEXT_MAX, the list would
// get longer than list_max, or the pre-tokenizer's pattern gives up on this text; NO_MEMORY. On
// failure the list is as it was.
MUST_USE enum status tokenizer_encode(const struct tokenizer *tokenizer,
                                      struct token_scratch *scratch, const void *text, size_t bytes,
                                      unsigned flags, size_t list_max, struct token_list *list,
                                      struct fault *fault);

// ---- decode ----
// All bytes of the ids one after another, as they are; ids that stand for nothing give nothing.
// Writes at most `room` bytes and returns how many there are. Allocates nothing.
size_t tokenizer_decode(const struct tokenizer *tokenizer, const uint32_t *ids, size_t count,
                        bool skip_special, uint8_t *out, size_t room);

// The same one id at a time, as valid UTF-8: a character is given out when its last byte has come,
// broken sequences become U+FFFD (one for each maximal part, as Rust's from_utf8_lossy). All pieces
// together are what the package's decode gives. Begin with {0}; a plain value, copy it to fork.
struct token_stream {
    uint8_t held[4]; // beginning of a character
    uint8_t held_bytes;
    bool keep_special; // else special tokens give no text
};
// `out` has room for TOKEN_STREAM_ROOM bytes; returns the bytes written, whole characters only.
size_t token_stream_push(const struct tokenizer *tokenizer, struct token_stream *stream,
                         uint32_t id, char *out);
// At the end: U+FFFD when a character was left unfinished. At most 3 bytes.
size_t token_stream_flush(struct token_stream *stream, char *out);

#endif
