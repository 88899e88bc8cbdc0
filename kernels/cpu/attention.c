// SPDX-License-Identifier: Apache-2.0
// out[row][head] = softmax(q . K[0..position] * scale) V over paged blocks.
//
// KV is reduced in segments of KV_SEGMENT tokens at absolute positions: scores, their maximum m, p
// = exp(s - m), sum l, part = p V. Segments are merged in ascending order:
//   m' = max(m, ms), l = l e^(m - m') + ls e^(ms - m'), acc = acc e^(m - m') + part e^(ms - m').
// What is computed for one (row, head) depends on its position alone, so decode and prefill, and
// any chunking, give the same bits. q is rounded to the compute dtype for the dot; p and all sums
// are fp32.
//
// Task: `split` rows x one KV head. Rows of one sequence in ascending order share the pass over K
// and V with the heads / kv_heads query heads of that KV head, QUERIES at a time. Bound by the
// bytes of the KV at decode, by fp32 multiply-adds (p V) at prefill.
#include <math.h>
#include <string.h>

#include "kernels/cpu/cpu.h"

// The (row, head) pairs of one pass: rows [row, row + rows) x heads [head, head + heads).
struct group {
    uint32_t row, rows, head, heads, kv_head;
};

enum { TOKENS_PASS = 32 }; // K or V rows of one pass: 8 KiB at head_dim 128

struct softmax_state {
    float max[QUERIES], sum[QUERIES];
};

static void queries_load(struct cpu_stream *s, struct slot *slot, const struct attention_args *a,
                         const struct group *g)
{
    size_t dim = a->kv.shape.head_dim, bytes = dim * cpu__element(s);
    for (uint32_t r = 0; r < g->rows; r++)
        for (uint32_t h = 0; h < g->heads; h++)
            cpu__kernel(s)->store(a->q + (g->row + r) * a->q_stride + (g->head + h) * dim,
                                  slot->query + (r * g->heads + h) * bytes, dim);
}

// Addresses of K and V rows of tokens [first, first + tokens).
static void tokens_find(struct cpu_stream *s, struct slot *slot, const struct attention_args *a,
                        const struct group *g, uint32_t first, uint32_t tokens)
{
    size_t element = cpu__element(s), bytes = a->kv.shape.head_dim * element;
    uint32_t block = a->kv.shape.block_tokens, sequence = a->sequence[g->row];
    for (uint32_t t = 0; t < tokens;) {
        uint32_t in_block = block - (first + t) % block;
        const uint8_t *k =
            cpu__kv_at(&a->kv, element, a->layer, sequence, first + t, 0, g->kv_head);
        const uint8_t *v =
            cpu__kv_at(&a->kv, element, a->layer, sequence, first + t, 1, g->kv_head);
        for (uint32_t i = 0; i < in_block && t < tokens; i++, t++) {
            slot->rows[t] = k + i * bytes;
            slot->values[t] = v + i * bytes;
        }
    }
}

// Fetches the rows of the pass that begins at `first` while the one before it is computed. A macro,
// because GCC drops calls of a function that only fetches.
#define PASS_FETCH(rows, first, last, row_bytes)                                                   \
    for (size_t row_ = (first); row_ < min_size((first) + TOKENS_PASS, last); row_++)              \
        for (size_t byte_ = 0; byte_ < (row_bytes); byte_ += 64)                                   \
    __builtin_prefetch((rows)[row_] + byte_, 0, 2)

// scores = q . K, TOKENS_PASS tokens for all queries at a time, so that K comes from memory once.
static void segment_scores(struct cpu_stream *s, struct slot *slot, const struct group *g,
                           const uint32_t *seen, size_t dim)
{
    uint32_t queries = g->rows * g->heads, last = seen[queries - 1]; // the last row sees most
    size_t row_bytes = dim * cpu__element(s);
    for (uint32_t t = 0; t < last; t += TOKENS_PASS) {
        PASS_FETCH(slot->rows, t + TOKENS_PASS, last, row_bytes);
        for (uint32_t q = 0; q < queries; q++)
            if (seen[q] > t)
                cpu__kernel(s)->dots(slot->query + q * row_bytes, slot->rows + t,
                                     min_size(TOKENS_PASS, seen[q] - t), dim,
                                     slot->scores + q * KV_SEGMENT + t);
    }
    PASS_FETCH(slot->values, 0, last, row_bytes);
}

// part[query] = p V over one segment, in the same passes: four queries together over what all of
// them see, then the rest of each.
static void segment_mix(struct cpu_stream *s, struct slot *slot, const struct group *g,
                        const uint32_t *seen, size_t dim, size_t stride)
{
    const struct micro_dtype *kernel = cpu__kernel(s);
    uint32_t queries = g->rows * g->heads, last = seen[queries - 1];
    memset(slot->part, 0, queries * stride * sizeof(float));
    for (uint32_t t = 0; t < last; t += TOKENS_PASS) {
        PASS_FETCH(slot->values, t + TOKENS_PASS, last, dim * cpu__element(s));
        for (uint32_t q = 0, n; q < queries; q += n) {
            n = queries - q < 4 ? queries - q : 4;
            uint32_t end = t + TOKENS_PASS, common = seen[q] < end ? seen[q] : end;
            common = common > t ? common : t; // rows ascend: the first of the four sees least
            kernel->mix(slot->scores + q * KV_SEGMENT + t, KV_SEGMENT, slot->values + t, common - t,
                        0, dim, slot->part + q * stride, stride, n);
            for (uint32_t i = q; i < q + n; i++) {
                uint32_t own = seen[i] < end ? seen[i] : end;
                if (own > common)
                    kernel->mix(slot->scores + i * KV_SEGMENT + common, KV_SEGMENT,
                                slot->values + common, own - common, 0, dim,
                                slot->part + i * stride, stride, 1);
            }
        }
    }
}

static void segment_merge(struct slot *slot, struct softmax_state *state, uint32_t q, float max,
                          float sum, size_t dim, size_t stride, bool first)
{
    float *acc = slot->sum + q * stride;
    const float *part = slot->part + q * stride;
    if (first) {
        memcpy(acc, part, dim * sizeof(float));
        state->max[q] = max;
        state->sum[q] = sum;
        return;
    }
    float top = max > state->max[q] ? max : state->max[q];
    float keep = expf(state->max[q] - top), add = expf(max - top);
    state->max[q] = top;
    state->sum[q] = state->sum[q] * keep + sum * add;
    for (size_t i = 0; i < dim; i++)
        acc[i] = acc[i] * keep + part[i] * add;
}

static void segment_run(struct cpu_stream *s, struct slot *slot, const struct attention_args *a,
                        const struct group *g, struct softmax_state *state, uint32_t first)
{
    size_t dim = a->kv.shape.head_dim, stride = round_up(dim, MIX_PAD);
    uint32_t queries = g->rows * g->heads, seen[QUERIES];
    float max[QUERIES], sum[QUERIES];
    uint32_t last = a->position[g->row + g->rows - 1] + 1 - first;
    tokens_find(s, slot, a, g, first, last < KV_SEGMENT ? last : KV_SEGMENT);
    for (uint32_t q = 0; q < queries; q++) {
        uint32_t end = a->position[g->row + q / g->heads] + 1;
        seen[q] = end <= first ? 0 : (uint32_t)min_size(end - first, KV_SEGMENT);
    }
    segment_scores(s, slot, g, seen, dim);
    for (uint32_t q = 0; q < queries; q++) {
        float *scores = slot->scores + q * KV_SEGMENT;
        if (!seen[q])
            continue;
        max[q] = cpu__micro(s)->max(scores, seen[q]);
        sum[q] = cpu__micro(s)->exp_sum(scores, scores, seen[q], max[q], a->scale);
        max[q] *= a->scale;
    }
    segment_mix(s, slot, g, seen, dim, stride);
    for (uint32_t q = 0; q < queries; q++)
        if (seen[q])
            segment_merge(slot, state, q, max[q], sum[q], dim, stride, first == 0);
}

static void group_run(struct cpu_stream *s, struct slot *slot, const struct attention_args *a,
                      const struct group *g)
{
    struct softmax_state state;
    size_t dim = a->kv.shape.head_dim, stride = round_up(dim, MIX_PAD), element = cpu__element(s);
    queries_load(s, slot, a, g);
    uint32_t last = a->position[g->row + g->rows - 1];
    for (uint32_t first = 0; first <= last; first += KV_SEGMENT)
        segment_run(s, slot, a, g, &state, first);
    size_t cols = a->heads * dim, row_bytes = cpu__act_row_bytes(cpu__device(s)->dtype, cols);
    for (uint32_t q = 0; q < g->rows * g->heads; q++) {
        uint32_t head = g->head + q % g->heads;
        uint8_t *out = (uint8_t *)a->out + (g->row + q / g->heads) * row_bytes;
        float *acc = slot->sum + q * stride;
        for (size_t i = 0; i < dim; i++)
            acc[i] /= state.sum[q];
        cpu__kernel(s)->store(acc, out + head * dim * element, dim);
        if (head + 1 == a->heads)
            memset(out + cols * element, 0, row_bytes - cols * element);
    }
}

static void attention_task(struct cpu_stream *s, struct slot *slot, struct command *c,
                           uint32_t task)
{
    const struct attention_args *a = &c->a.attention;
    uint32_t kv_heads = a->kv.shape.kv_heads, per_kv = a->heads / kv_heads;
    uint32_t row = task / kv_heads * c->split, kv_head = task % kv_heads;
    uint32_t end = (uint32_t)min_size(row + c->split, a->rows);
    uint32_t rows_max = per_kv < QUERIES ? QUERIES / per_kv : 1;
    while (row < end) {
        uint32_t n = 1;
        while (n < rows_max && row + n < end && a->sequence[row + n] == a->sequence[row] &&
               a->position[row + n] > a->position[row + n - 1])
            n++;
        for (uint32_t h = 0; h < per_kv; h += QUERIES) {
            struct group g = {.row = row,
                              .rows = n,
                              .head = kv_head * per_kv + h,
                              .heads = (uint32_t)min_size(per_kv - h, QUERIES),
                              .kv_head = kv_head};
            group_run(s, slot, a, &g);
        }
        row += n;
    }
}

static const struct operation attention_operation = {.task = attention_task};

void cpu__attention(struct stream *s, const struct attention_args *a)
{
    if (!a->rows)
        return;
    cpu__kv_check(s, &a->kv, a->layer);
    CHECK(a->heads && a->heads % a->kv.shape.kv_heads == 0 && a->scale > 0);
    // Few rows: one per task, for balance; many: enough to fill a pass.
    uint32_t split = a->rows >= 64 ? 16 : a->rows >= 16 ? 4 : 1;
    struct command *c = cpu__record(s, &attention_operation,
                                    (uint32_t)div_up(a->rows, split) * a->kv.shape.kv_heads);
    c->a.attention = *a;
    c->split = split;
    size_t cols = (size_t)a->heads * a->kv.shape.head_dim;
    cpu__reads(c, a->q, cols * sizeof(float), a->q_stride * sizeof(float), a->rows);
    cpu__reads(c, a->kv.arena, 1, 0, 1);
    cpu__writes(c, a->out,
                a->rows * cpu__act_row_bytes(((struct cpu_device *)s->device)->dtype, cols), 0, 1);
    cpu__record_end(s, c);
}
