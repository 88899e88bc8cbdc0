// SPDX-License-Identifier: Apache-2.0
// One word into ids: byte-pair merging in order of rank, then of position, as models/bpe/word.rs
// does.
//
// The word is a doubly linked list of symbols in an array; a heap holds candidate merges as
// (rank << 32 | position of the left symbol). A popped candidate is stale, and dropped, unless the
// pair that stands there now has that very rank. (The package compares the merged id instead. That
// is the same: the text of a pair only grows when one of its symbols changes, and ids stand for
// distinct texts.) Each merge uses up one candidate and adds at most two: the heap never exceeds 2
// n, the whole is O(n log n); a word of 1 MB takes tens of milliseconds to a few hundred.
#include "runtime/tokenizer/internal.h"

#include "base/arith.h"

enum { ARITY = 4 }; // of the heap: fewer cache misses than 2 on words that do not fit the cache
#define NONE UINT32_MAX

static void heap_down(uint64_t *heap, size_t count, size_t i)
{
    uint64_t key = heap[i];
    for (;;) {
        size_t child = i * ARITY + 1, best = child;
        if (child >= count)
            break;
        size_t end = min_size(child + ARITY, count);
        for (size_t j = child + 1; j < end; j++)
            if (heap[j] < heap[best])
                best = j;
        if (heap[best] >= key)
            break;
        heap[i] = heap[best];
        i = best;
    }
    heap[i] = key;
}

static void heap_push(uint64_t *heap, size_t *count, uint64_t key)
{
    size_t i = (*count)++;
    while (i > 0 && heap[(i - 1) / ARITY] > key) {
        heap[i] = heap[(i - 1) / ARITY];
        i = (i - 1) / ARITY;
    }
    heap[i] = key;
}

static uint64_t heap_pop(uint64_t *heap, size_t *count)
{
    uint64_t top = heap[0];
    heap[0] = heap[--*count];
    if (*count)
        heap_down(heap, *count, 0);
    return top;
}

static const struct merge_slot *pair_at(const struct tokenizer *t, const struct bpe_symbol *symbols,
                                        uint32_t left)
{
    uint32_t right = symbols[left].next;
    return right == NONE ? NULL : tokenizer__find_merge(t, symbols[left].id, symbols[right].id);
}

static size_t first_candidates(const struct tokenizer *t, const struct bpe_symbol *symbols,
                               size_t n, uint64_t *heap)
{
    size_t count = 0;
    for (uint32_t i = 0; i + 1 < n; i++) {
        const struct merge_slot *merge = pair_at(t, symbols, i);
        if (merge)
            heap[count++] = (uint64_t)merge->rank << 32 | i;
    }
    for (size_t i = count / ARITY + 1; i-- > 0;)
        if (i < count)
            heap_down(heap, count, i);
    return count;
}

static void merge_at(struct bpe_symbol *symbols, uint32_t left, uint32_t id)
{
    uint32_t right = symbols[left].next, after = symbols[right].next;
    symbols[left].id = id;
    symbols[left].next = after;
    symbols[right].id = NONE;
    if (after != NONE)
        symbols[after].previous = left;
}

// Leaves the ids in scratch->symbols[0, *count).id.
enum status tokenizer__merge(const struct tokenizer *t, struct token_scratch *scratch,
                             const uint8_t *word, size_t bytes, size_t *count)
{
    enum status status = tokenizer__grow((void **)&scratch->symbols, &scratch->symbols_capacity,
                                         bytes, sizeof *scratch->symbols);
    if (!status)
        status = tokenizer__grow((void **)&scratch->heap, &scratch->heap_capacity, 2 * bytes,
                                 sizeof *scratch->heap);
    if (status)
        return status;
    struct bpe_symbol *symbols = scratch->symbols;
    for (uint32_t i = 0; i < bytes; i++)
        symbols[i] = (struct bpe_symbol){.id = t->byte_ids[word[i]],
                                         .previous = i ? i - 1 : NONE,
                                         .next = i + 1 < bytes ? i + 1 : NONE};
    uint64_t *heap = scratch->heap;
    size_t waiting = first_candidates(t, symbols, bytes, heap);
    while (waiting) {
        uint64_t top = heap_pop(heap, &waiting);
        uint32_t left = (uint32_t)top;
        if (symbols[left].id == NONE)
            continue;
        const struct merge_slot *merge = pair_at(t, symbols, left);
        if (!merge || merge->rank != top >> 32)
            continue;
        merge_at(symbols, left, merge->id);
        uint32_t previous = symbols[left].previous;
        if (previous != NONE && (merge = pair_at(t, symbols, previous)))
            heap_push(heap, &waiting, (uint64_t)merge->rank << 32 | previous);
        if ((merge = pair_at(t, symbols, left)))
            heap_push(heap, &waiting, (uint64_t)merge->rank << 32 | left);
    }
    size_t out = 0;
    for (uint32_t i = 0; i != NONE && bytes; i = symbols[i].next)
        symbols[out++].id = symbols[i].id; // out <= i: what is overwritten was read already
    *count = out;
    return STATUS_OK;
}
