// SPDX-License-Identifier: Apache-2.0
// Expert GEMMs from tiles through the page list, with expert LoRA inside.
//
//   gate_up: hidden[pair] = silu(Wg x[row] + LoRA) * (Wu x[row] + LoRA)
//   down:    out[pair] = Wd hidden[pair] + LoRA
// for experts in state 1. Task: one expert x one row block of 64 weight rows x at most TOKENS_CHUNK
// of its pairs; all pairs of an expert in a task share one pass over the tiles, which is what makes
// a batch cheap: at decode the bytes of the distinct experts are read once. `prepare` lists the
// experts that have work.
//
// Expert LoRA is computed before (moe_lora.c) and added to the 64 columns of a task before SwiGLU.
#include <string.h>

#include "kernels/cpu/moe_gemm.h"

static uint32_t experts_prepare(struct cpu_stream *s, const struct moe_gemm_args *a, size_t blocks)
{
    uint32_t tasks = 0;
    s->expert_count = 0;
    for (uint32_t e = 0; e < a->view.experts; e++) {
        uint32_t pairs = a->work.begin[e + 1] - a->work.begin[e];
        if (!pairs || a->work.state[e] != 1)
            continue;
        struct active_expert *x = &s->experts[s->expert_count++];
        *x = (struct active_expert){e, tasks, (uint32_t)blocks,
                                    (uint32_t)div_up(pairs, TOKENS_CHUNK)};
        tasks += x->blocks * x->chunks;
    }
    return tasks;
}

static struct expert_task expert_task_at(const struct cpu_stream *s, const struct moe_gemm_args *a,
                                         uint32_t task)
{
    uint32_t low = 0, high = s->expert_count; // the last expert with first_task <= task
    while (high - low > 1) {
        uint32_t middle = low + (high - low) / 2;
        if (s->experts[middle].first_task <= task)
            low = middle;
        else
            high = middle;
    }
    const struct active_expert *x = &s->experts[low];
    uint32_t within = task - x->first_task, begin = a->work.begin[x->expert];
    uint32_t pairs = a->work.begin[x->expert + 1] - begin, chunk = within % x->chunks;
    uint32_t size = (uint32_t)cpu__chunk_size(pairs, x->chunks), first = chunk * size;
    return (struct expert_task){x->expert, within / x->chunks, begin + first,
                                first < pairs ? (uint32_t)min_size(size, pairs - first) : 0};
}

// The addresses of tiles [first, first + 2 * k_tiles) of an expert: those of a row block, and those
// of the next, to fetch ahead.
static void tiles_find(struct slot *slot, const struct expert_view *view, uint32_t expert,
                       size_t first, size_t k_tiles)
{
    size_t per_page = view->page_bytes / TILE_BYTES, left = first % per_page;
    const uint32_t *pages = view->pages + (size_t)expert * view->pages_per_expert;
    const uint32_t *page = pages + first / per_page, *end = pages + view->pages_per_expert;
    const uint8_t *tile = view->arena + (size_t)*page * view->page_bytes + left * TILE_BYTES;
    left = per_page - left;
    for (size_t i = 0; i < 2 * k_tiles; i++) {
        slot->tiles[i] = tile;
        tile += TILE_BYTES;
        if (--left == 0) {
            page += page + 1 < end; // behind the last tile the last page again: only fetched ahead
            tile = view->arena + (size_t)*page * view->page_bytes;
            left = per_page;
        }
    }
}

// Multiplies the task's row block with its tokens into slot->out.
static void expert_strip(struct cpu_stream *s, struct slot *slot, const struct moe_gemm_args *a,
                         const struct expert_task *t, const struct side *side)
{
    enum dtype dtype = cpu__device(s)->dtype;
    size_t k_tiles = div_up(side->in, tile_cols(dtype));
    size_t x_bytes = cpu__act_row_bytes(dtype, side->in);
    for (uint32_t i = 0; i < t->count; i++)
        slot->x[i] = side->x + a->work.order[t->first + i] / side->pairs_per_x * x_bytes;
    tiles_find(slot, &a->view, t->expert, side->first_tile + t->block * k_tiles, k_tiles);
    cpu__kernel(s)->strip(
        &(struct strip){.tiles = slot->tiles,
                        .k_tiles = k_tiles,
                        .x = slot->x,
                        .tokens = t->count,
                        .rows = (uint32_t)min_size(TILE_ROWS, side->out - t->block * TILE_ROWS),
                        .out = slot->out});
}

// ---- the GEMMs ----

static void gate_up_task(struct cpu_stream *s, struct slot *slot, struct command *c, uint32_t task)
{
    const struct moe_gemm_args *a = &c->a.moe;
    struct side side = cpu__moe_side(a, false);
    struct expert_task t = expert_task_at(s, a, task);
    expert_strip(s, slot, a, &t, &side);
    cpu__moe_lora_add(s, slot, a, &t, &side);
    size_t first = t.block * UNITS, units = min_size(UNITS, a->intermediate - first);
    float out[UNITS];
    for (uint32_t i = 0; i < t.count; i++) {
        cpu__micro(s)->swiglu(slot->out + i * TILE_ROWS, out, round_up(units, 8));
        cpu__act_store(s, a->work.hidden, a->work.order[t.first + i], a->intermediate, first, units,
                       out);
    }
}

static void down_task(struct cpu_stream *s, struct slot *slot, struct command *c, uint32_t task)
{
    const struct moe_gemm_args *a = &c->a.moe;
    struct side side = cpu__moe_side(a, true);
    struct expert_task t = expert_task_at(s, a, task);
    expert_strip(s, slot, a, &t, &side);
    cpu__moe_lora_add(s, slot, a, &t, &side);
    size_t first = t.block * TILE_ROWS, cols = min_size(TILE_ROWS, a->dim - first);
    for (uint32_t i = 0; i < t.count; i++)
        memcpy(a->work.out + (size_t)a->work.order[t.first + i] * a->dim + first,
               slot->out + i * TILE_ROWS, cols * sizeof(float));
}

static uint32_t gemm_prepare(struct cpu_stream *s, struct command *c)
{
    struct side side = cpu__moe_side(&c->a.moe, c->split);
    return experts_prepare(s, &c->a.moe, div_up(side.out, TILE_ROWS));
}

static void down_finish(struct cpu_stream *s, struct command *c)
{
    const struct moe_gemm_args *a = &c->a.moe;
    for (uint32_t i = 0; i < s->expert_count; i++)
        a->work.state[s->experts[i].expert] = 3;
}

static const struct operation gate_up_operation = {
    .prepare = gemm_prepare, .task = gate_up_task, .in_miss = true};
static const struct operation down_operation = {
    .prepare = gemm_prepare, .task = down_task, .finish = down_finish, .in_miss = true};

static void record(struct stream *stream, const struct moe_gemm_args *a, bool down,
                   const struct operation *op)
{
    struct cpu_stream *s = (struct cpu_stream *)stream;
    enum dtype dtype = cpu__device(s)->dtype;
    struct side side = cpu__moe_side(a, down);
    struct command *c = cpu__record(stream, op, 0);
    size_t pairs = (size_t)a->rows * a->top_k;
    c->a.moe = *a;
    c->split = down;
    c->miss_layer = a->layer;
    cpu__reads(c, side.x, pairs / side.pairs_per_x * cpu__act_row_bytes(dtype, side.in), 0, 1);
    cpu__reads(c, s->adapter_added, 1, 0, 1);
    if (down)
        cpu__writes(c, a->work.out, pairs * a->dim * sizeof(float), 0, 1);
    else
        cpu__writes(c, a->work.hidden, pairs * cpu__act_row_bytes(dtype, a->intermediate), 0, 1);
    cpu__writes(c, s->experts, 1, 0, 1); // one at a time: the list of active experts is shared
    cpu__record_end(stream, c);
}

static void moe_gemm(struct stream *s, const struct moe_gemm_args *a, bool down)
{
    enum dtype dtype = ((struct cpu_device *)s->device)->dtype;
    CHECK(a->view.experts && a->view.experts <= EXPERTS_MAX && a->top_k);
    CHECK(div_up(a->dim, tile_cols(dtype)) <= TILES_MAX);
    CHECK(div_up(a->intermediate, tile_cols(dtype)) <= TILES_MAX);
    CHECK(tile_count(dtype, tile_interleaved_rows(a->intermediate), a->dim) <= a->view.down_tile);
    CHECK(a->view.down_tile + tile_count(dtype, a->dim, a->intermediate) <=
          a->view.pages_per_expert * (a->view.page_bytes / TILE_BYTES));
    if (!a->rows)
        return;
    cpu__moe_lora_record(s, a, down);
    record(s, a, down, down ? &down_operation : &gate_up_operation);
}

void cpu__moe_gate_up(struct stream *s, const struct moe_gemm_args *a)
{
    moe_gemm(s, a, false);
}

void cpu__moe_down(struct stream *s, const struct moe_gemm_args *a)
{
    moe_gemm(s, a, true);
}
