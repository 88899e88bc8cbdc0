// SPDX-License-Identifier: Apache-2.0
// The adapter store file (folder-internal; the layout is drawn in store_header.c).
//
// Writer: adapter__store_create, then for each pair, in the order of the table, adapter__store_put
// for A and for B and one adapter__store_record, then adapter__store_finish or
// adapter__store_abandon. Reader: adapter__store_open checks everything that the header says
// against the base and against itself, and gives the dense pair table that the kernels read. Any
// thread.
#ifndef POLDER_ADAPTERS_STORE_H
#define POLDER_ADAPTERS_STORE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "adapters/adapters.h"
#include "base/hash.h"
#include "base/reader.h"
#include "base/status.h"
#include "kernels/lora.h"

// Longer rows of lm_head's B^T are cut (kernels/lora.h): a whole number of tasks of every backend,
// and not longer than the smallest page.
enum { ADAPTER_RANK_MAX = 512, ADAPTER_ROW_ALIGN = 64, ADAPTER_CUT_BYTES = 4096 };
enum { ADAPTER_TOKEN_ALIGN = 16 }; // of rows by token

// Input and output dimensions of a module at a layer of the base (LORA_EMBED, LORA_HEAD: at layer
// base->layers); false when the base has none there.
bool adapter__module_dims(const struct adapter_base *base, uint32_t layer, enum lora_module module,
                          uint32_t *d_in, uint32_t *d_out);
// Matrices of this module at this layer: experts for a MoE layer's MLP, else 1.
uint32_t adapter__module_count(const struct adapter_base *base, uint32_t layer,
                               enum lora_module module);
uint32_t adapter__matrices_possible(const struct adapter_base *base);

// How A, or B transposed, of a matrix lies in its slice.
struct adapter_side {
    uint32_t rank, dim;       // of the matrix
    uint32_t rows, row_bytes; // of the slice
    uint32_t columns;         // of `dim` in a row that is cut, else all
    bool by_token;            // a row for each of `dim`, rank elements
};
// Elements in a row of the slice: fewer in the last block of what is cut.
static inline uint32_t adapter__side_elements(const struct adapter_side *side, uint32_t row)
{
    uint32_t before = row / side->rank * side->columns, left = side->dim - before;
    return side->by_token ? side->rank : left < side->columns ? left : side->columns;
}
struct adapter_side adapter__side(const struct adapter_base *base, enum lora_module module,
                                  bool is_b, uint32_t rank, uint32_t dim);

// What a store file says, decoded and checked.
struct adapter_store {
    struct adapter_report report;
    size_t page_bytes;
    uint64_t header_bytes; // pages begin here
    uint32_t pages;
    uint32_t experts;        // slices per module in `pairs`: the base's experts, or 1
    struct lora_pair *pairs; // [lora_pair_rows(layers)][experts]; the holder frees
    uint32_t modules;        // bit set of enum lora_module
    // Pages [0, trunk_pages) hold what every row needs; parts, NULL without expert LoRA, says which
    // of the others each (layer, expert) needs, at most part_pages_max.
    uint32_t trunk_pages, part_pages_max;
    struct lora_part *parts; // [layers][experts]; the holder frees
    struct digest pages_digest;
};

// One present pair as it stands in the file.
struct adapter_record {
    uint32_t layer, module, expert;
    struct lora_pair pair;
};

// ---- header (store_header.c) ----

struct adapter_header {
    struct adapter_report report;
    struct digest base, pages_digest;
    uint64_t header_bytes;
    size_t page_bytes;
    uint32_t pages, records;
};

size_t adapter__header_bytes(uint32_t records, size_t page_bytes);
// Fills `out` (header_bytes long, zeroed by the caller) and seals it with its own digest.
void adapter__header_encode(const struct adapter_header *header, const struct adapter_base *base,
                            const struct adapter_record *records, uint8_t *out);
MUST_USE enum status adapter__store_open(struct reader *reader, const char *label,
                                         const struct adapter_base *base, size_t page_bytes,
                                         struct adapter_store *out, struct fault *fault);
// The same without a base, as far as that goes: length, seal, summary. `out` has no pairs.
MUST_USE enum status adapter__store_peek(struct reader *reader, const char *label,
                                         struct adapter_store *out, struct adapter_summary *summary,
                                         struct fault *fault);
void adapter__store_clear(struct adapter_store *store);
// Digest of what the adapter means: shapes, table, and the digest of the pages.
struct digest adapter__content_digest(const struct adapter_base *base,
                                      const struct adapter_record *records, uint32_t count,
                                      const struct digest *pages);

// ---- pages (store_reader.c) ----

// Of pages there is a digest for each block: the page, or a part that a read of 1 MiB holds.
static inline size_t adapter__block_bytes(size_t page_bytes)
{
    return page_bytes < 1 << 20 ? page_bytes : 1 << 20;
}
struct digest adapter__block_digest(const void *block, size_t bytes);

// A reader of the pages alone: a block that does not have its digest is an IO error, and the log
// names the label. The file is the reader's when this succeeds. CORRUPT, IO.
MUST_USE enum status adapter__store_reader(struct reader *file, const char *label,
                                           const struct adapter_store *store, struct reader **out,
                                           struct fault *fault);
// Reads every page.
MUST_USE enum status adapter__store_verify(struct reader *reader, const char *label,
                                           const struct adapter_store *store, struct fault *fault);

// ---- writer (store.c) ----

struct adapter_writer;
// `path` appears at once at finish, or not at all. `base` must outlive the writer.
MUST_USE enum status adapter__store_create(const char *path, const struct adapter_base *base,
                                           size_t page_bytes, uint32_t records,
                                           struct adapter_writer **out, struct fault *fault);
// Gives `rows` rows of a slice, from row `first`: elements of the compute dtype, the first row at
// `out`, the next row_bytes of the side behind it.
typedef void (*adapter_row_source)(const void *context, const struct adapter_side *side,
                                   uint32_t first, uint32_t rows, uint8_t *out);
// Places the rows of a side and says where they went.
MUST_USE enum status adapter__store_put(struct adapter_writer *writer,
                                        const struct adapter_side *side, adapter_row_source source,
                                        const void *context, struct lora_slice *out,
                                        struct fault *fault);
MUST_USE enum status adapter__store_record(struct adapter_writer *writer,
                                           const struct adapter_record *record,
                                           struct fault *fault);
// Fills report->bytes and report->digest, writes the header, syncs, renames. The writer is gone
// after this, whatever the result.
MUST_USE enum status adapter__store_finish(struct adapter_writer *writer,
                                           struct adapter_report *report, struct fault *fault);
void adapter__store_abandon(struct adapter_writer *writer);

// ---- pages on their way to the file (store_pages.c) ----

struct adapter_pages;
// Pages of page_bytes each, from `offset` of the file on. Starts a thread, which
// adapter__pages_end ends. NO_MEMORY.
MUST_USE enum status adapter__pages_begin(int descriptor, uint64_t offset, size_t page_bytes,
                                          struct adapter_pages **out);
// A buffer for the next page, holding anything; waits while all are under way. NULL: a page could
// not be written, and adapter__pages_end says why.
uint8_t *adapter__pages_next(struct adapter_pages *pages);
void adapter__pages_put(struct adapter_pages *pages); // that page is full
// Waits for all pages, puts the list of digests behind them and gives its digest. IO with errno.
// `pages` is gone after this.
MUST_USE enum status adapter__pages_end(struct adapter_pages *pages, struct digest *out);
// The same for nobody: what has not been written is thrown away.
void adapter__pages_abandon(struct adapter_pages *pages);

#endif
