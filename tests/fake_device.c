// SPDX-License-Identifier: Apache-2.0
// See fake_device.h. A stream is an array of commands (kind and a copy of the arguments) and a
// place up to which the segment in flight has run. After a miss every command is skipped but the
// expert products of the layer that missed (kernels/device.h).
//
// Invariants: 1. commands run in order, each at most once. 2. nothing runs before submit or after
// poll has said that the segment retired.
#include "fake_device.h"

#include <stdio.h>
#include <stdlib.h>

#include "base/check.h"
#include "fake_lora.h"
#include "kernels/plain.h"

enum command_kind {
    DO_COPY,
    DO_ZERO,
    DO_SCATTER,
    DO_GATHER,
    DO_EMBED,
    DO_RMSNORM,
    DO_GEMM,
    DO_SWIGLU,
    DO_LORA_GATHER,
    DO_SHRINK,
    DO_EXPAND,
    DO_QK,
    DO_ATTENTION,
    DO_ROUTER,
    DO_MAP,
    DO_GATE_UP,
    DO_DOWN,
    DO_COMBINE,
    DO_ALL_REDUCE,
    DO_SAMPLE
};

struct move_args {
    void *to;
    const void *from;
    size_t bytes;
};

struct command {
    enum command_kind kind;
    union {
        struct move_args move;
        struct scatter_args scatter;
        struct gather_args gather;
        struct embed_args embed;
        struct rmsnorm_args rmsnorm;
        struct gemm_args gemm;
        struct swiglu_args swiglu;
        struct lora_gather_args lora_gather;
        struct lora_shrink_args shrink;
        struct lora_expand_args expand;
        struct qk_args qk;
        struct attention_args attention;
        struct router_args router;
        struct moe_map_args map;
        struct moe_gemm_args moe;
        struct moe_combine_args combine;
        struct all_reduce_args all_reduce;
        struct sample_args sample;
    } a;
};

struct fake_stream {
    struct stream base;
    struct command *commands;
    uint32_t room, recorded, submitted, ran;
    bool in_flight, failed;
    struct segment_result result;
    uint64_t ready_us;
};

struct fake_device {
    struct device base;
    struct fake_device_options options;
    struct fake_device_counts counts;
    struct fake_stream *stream; // the last one made
};

static struct fake_device *device_of(struct fake_stream *s)
{
    return (struct fake_device *)s->base.device;
}

// ---- dense ----

static void run_scatter(const struct scatter_args *a)
{
    for (uint32_t i = 0; i < a->count; i++)
        a->table[a->index[i]] = a->value[i];
}

static void run_embed(const struct embed_args *a)
{
    for (uint32_t r = 0; r < a->rows; r++) {
        // What sample gives a row that is lost may come back as input of a surplus row.
        CHECK(a->token[r] == SAMPLE_NOT_A_NUMBER ||
              (a->token[r] >= 0 && (uint32_t)a->token[r] < a->vocab));
        put(a->x, f32(a->dim), r, print_mix((uint64_t)a->token[r] + 1, print_word(a->table)));
    }
}

static void run_rmsnorm(const struct rmsnorm_args *a)
{
    for (uint32_t r = 0; r < a->rows; r++) {
        uint64_t word = print_mix(get(a->x, f32(a->dim), r), print_word(a->weight));
        if (a->out)
            put(a->out, ACT, r, word);
        if (a->out_f32)
            put(a->out_f32, f32(a->dim), r, word);
    }
}

static void run_gemm(const struct gemm_args *a)
{
    for (uint32_t r = 0; r < a->rows; r++) {
        uint64_t word = print_mix(get(a->x, ACT, r), print_word(a->weight));
        if (a->add) {
            put(a->y, f32(a->y_stride), r, print_mix(get(a->y, f32(a->y_stride), r), word));
            continue;
        }
        put(a->y, f32(a->y_stride), r, word);
        for (uint32_t c = PRINT_COLUMNS; c < a->n; c += PRINT_COLUMNS)
            put(a->y + c, f32(a->y_stride), r, print_column(word, c));
        if (a->n >= 16)
            put(a->y + 8, f32(a->y_stride), r, print_column(word, 8)); // first up row
    }
}

static void run_swiglu(const struct swiglu_args *a)
{
    for (uint32_t r = 0; r < a->rows; r++)
        put(a->out, ACT, r,
            print_mix(get(a->gate_up, f32(a->stride), r), get(a->gate_up + 8, f32(a->stride), r)));
}

static void run_gather(const struct gather_args *a)
{
    for (uint32_t r = 0; r < a->rows; r++)
        put(a->to, f32(a->dim), r, get(a->from, f32(a->dim), a->index[r]));
}

static void run_sample(const struct sample_args *a)
{
    for (uint32_t r = 0; r < a->rows; r++) {
        uint64_t word = get(a->logits, f32(a->stride), r);
        a->token[r] = print_token(word, &a->params[r], a->vocab);
        if (a->logprob)
            a->logprob[r] = print_logprob(word);
        for (uint32_t i = 0; i < a->tops; i++) {
            a->top_token[(size_t)r * a->tops + i] = print_top_token(word, i, a->vocab);
            a->top_logprob[(size_t)r * a->tops + i] = -(float)i;
        }
    }
}

// ---- attention ----

static uint8_t *kv_slot(const struct fake_device *d, const struct kv_view *kv, uint32_t sequence,
                        uint32_t position, uint32_t layer)
{
    const struct kv_shape *shape = &kv->shape;
    uint32_t block = position / shape->block_tokens;
    CHECK(block < kv->blocks_max);
    size_t at = ((size_t)sequence * kv->blocks_max + block) * shape->pages_per_block;
    uint32_t page = kv->pages[at + layer / shape->layers_per_page];
    CHECK(page < d->options.pages);
    return kv->arena + (size_t)page * kv->page_bytes +
           layer % shape->layers_per_page * shape->part_bytes +
           (size_t)(position % shape->block_tokens) * shape->head_dim * sizeof(uint16_t);
}

static void run_qk(const struct fake_device *d, const struct qk_args *a)
{
    uint64_t rope = print_word(a->inv_freq);
    for (uint32_t r = 0; r < a->rows; r++) {
        uint32_t position = a->position[r];
        put(a->q, f32(a->q_stride), r,
            print_query(get(a->q, f32(a->q_stride), r), print_word(a->q_weight), rope, position));
        uint64_t word = print_kv(get(a->k, f32(a->k_stride), r), get(a->v, f32(a->v_stride), r),
                                 print_word(a->k_weight), rope, position);
        uint8_t *slot = kv_slot(d, &a->kv, a->sequence[r], position, a->layer);
        put(slot, 0, 0, word);
        put(slot + a->kv.shape.part_bytes / 2, 0, 0, print_slot_magic(word, position, a->layer));
    }
}

static void run_attention(const struct fake_device *d, const struct attention_args *a)
{
    for (uint32_t r = 0; r < a->rows; r++) {
        uint64_t sum = 0;
        for (uint32_t p = 0; p <= a->position[r]; p++) {
            const uint8_t *slot = kv_slot(d, &a->kv, a->sequence[r], p, a->layer);
            uint64_t word = print_word(slot);
            uint64_t magic = print_word(slot + a->kv.shape.part_bytes / 2);
            if (magic != print_slot_magic(word, p, a->layer)) {
                fprintf(stderr,
                        "row %u (sequence %u, position %u) reads KV of position %u, layer %u, "
                        "which nobody wrote there\n",
                        r, a->sequence[r], a->position[r], p, a->layer);
                CHECK(false);
            }
            sum += word;
        }
        put(a->out, ACT, r, print_mix(get(a->q, f32(a->q_stride), r), sum));
    }
}

// ---- experts ----

static void run_router(const struct router_args *a)
{
    for (uint32_t r = 0; r < a->rows; r++) {
        uint64_t word = print_mix(get(a->x, f32(a->dim), r), print_word(a->weight));
        uint32_t *chosen = a->expert + (size_t)r * a->top_k;
        for (uint32_t i = 0; i < a->top_k; i++) {
            uint32_t gate = print_gate(word, i);
            chosen[i] = print_expert(word, i, a->experts, chosen);
            memcpy(a->gate + (size_t)r * a->top_k + i, &gate, sizeof gate);
        }
    }
}

static bool expert_is_here(const struct fake_device *d, const struct expert_view *view, uint32_t e)
{
    for (uint32_t i = 0; i < view->pages_per_expert; i++) {
        uint32_t page = view->pages[(size_t)e * view->pages_per_expert + i];
        if (page == PAGE_NONE)
            return false;
        CHECK(page < d->options.pages);
    }
    return true;
}

// Experts whose pairs lack a part of their adapter are missing; mark: what missing experts want.
static void look_for_parts(const struct moe_map_args *a, bool mark)
{
    const struct lora_batch *b = a->lora;
    for (uint32_t s = 0; b && s < b->segments; s++) {
        const struct lora_adapter_view *view =
            b->adapter[s] == 0xffffffff ? NULL : &b->adapters[b->adapter[s]];
        if (!view || !view->parts)
            continue;
        for (uint32_t p = b->row_begin[s] * a->top_k; p < b->row_begin[s + 1] * a->top_k; p++) {
            uint32_t e = a->work.expert[p];
            const struct lora_part *part = &view->parts[a->layer * view->experts + e];
            if (mark && a->work.state[e] == 2 && part->count)
                a->part_wanted[s * a->view.experts + e] = 1;
            for (uint32_t i = 0; !mark && a->work.state[e] != 3 && i < part->count; i++) {
                uint32_t page = view->pages[part->first + i];
                if (page == PAGE_NONE)
                    a->work.state[e] = 2;
                else
                    a->page_used[page] = 1;
            }
        }
    }
}

static void run_map(struct fake_stream *s, const struct moe_map_args *a)
{
    const struct moe_work *w = &a->work;
    uint32_t pairs = a->rows * a->top_k, at = 0;
    for (uint32_t e = 0; e < a->view.experts; e++) {
        w->begin[e] = at;
        for (uint32_t p = 0; p < pairs; p++) {
            if (w->expert[p] == e)
                w->order[at++] = p;
        }
        a->need[e] = at - w->begin[e];
        bool done = a->resume && w->state[e] == 3;
        CHECK(done || !a->resume || (w->state[e] != 0) == (a->need[e] != 0));
        if (!done) {
            w->state[e] = 0;
            if (a->need[e])
                w->state[e] = expert_is_here(device_of(s), &a->view, e) ? 1 : 2;
        }
    }
    look_for_parts(a, false);
    for (uint32_t e = 0; e < a->view.experts; e++) {
        a->host_state[e] = w->state[e];
        if (w->state[e] == 2 && !s->result.missed)
            s->result = (struct segment_result){.missed = true, .miss_layer = a->layer};
    }
    look_for_parts(a, true);
    CHECK(at == pairs);
    w->begin[a->view.experts] = at;
}

static uint64_t tiles_word(const struct expert_view *view, uint32_t e, uint32_t begin, uint32_t end)
{
    size_t per_page = view->page_bytes / TILE_BYTES;
    uint64_t sum = 0;
    for (uint32_t t = begin; t < end; t++) {
        uint32_t page = view->pages[(size_t)e * view->pages_per_expert + t / per_page];
        CHECK(page != PAGE_NONE);
        sum = print_mix(sum, print_word(view->arena + (size_t)page * view->page_bytes +
                                        t % per_page * TILE_BYTES));
    }
    return sum;
}

static void run_gate_up(const struct moe_gemm_args *a)
{
    const struct moe_work *w = &a->work;
    for (uint32_t e = 0; e < a->view.experts; e++) {
        if (w->state[e] != 1)
            continue;
        uint64_t weight = tiles_word(&a->view, e, 0, a->view.down_tile);
        for (uint32_t i = w->begin[e]; i < w->begin[e + 1]; i++) {
            uint32_t pair = w->order[i], row = pair / a->top_k;
            uint64_t x = get(a->x, ACT, row), gate = print_mix(x, weight);
            uint64_t up = print_column(gate, 8);
            gate += fake_expert_lora(a->lora, row, a->layer, LORA_GATE, e, x);
            up += fake_expert_lora(a->lora, row, a->layer, LORA_UP, e, x);
            put(w->hidden, ACT, pair, print_mix(gate, up));
        }
    }
}

static void run_down(const struct moe_gemm_args *a)
{
    const struct moe_work *w = &a->work;
    uint32_t tiles = (uint32_t)tile_count(DTYPE_BF16, a->dim, a->intermediate);
    for (uint32_t e = 0; e < a->view.experts; e++) {
        if (w->state[e] != 1)
            continue;
        uint64_t weight = tiles_word(&a->view, e, a->view.down_tile, a->view.down_tile + tiles);
        for (uint32_t i = w->begin[e]; i < w->begin[e + 1]; i++) {
            uint32_t pair = w->order[i];
            uint64_t x = get(w->hidden, ACT, pair);
            put(w->out, f32(a->dim), pair,
                print_mix(x, weight) +
                    fake_expert_lora(a->lora, pair / a->top_k, a->layer, LORA_DOWN, e, x));
        }
        w->state[e] = 3;
    }
}

static void run_combine(const struct moe_combine_args *a)
{
    for (uint32_t r = 0; r < a->rows; r++) {
        uint64_t sum = 0;
        for (uint32_t i = 0; i < a->top_k; i++) {
            size_t pair = (size_t)r * a->top_k + i;
            uint32_t gate;
            memcpy(&gate, a->work.gate + pair, sizeof gate);
            sum = print_mix(sum, get(a->work.out, f32(a->dim), pair) + gate);
        }
        put(a->y, f32(a->dim), r, print_mix(get(a->y, f32(a->dim), r), sum));
    }
}

// ---- running ----

static void count_half(struct fake_device *d, uint32_t rows)
{
    d->counts.halves++;
    d->counts.rows += rows;
}

static void run_moe(struct fake_stream *s, const struct command *c)
{
    if (c->kind == DO_MAP)
        run_map(s, &c->a.map);
    else if (c->kind == DO_GATE_UP)
        run_gate_up(&c->a.moe);
    else if (c->kind == DO_DOWN)
        run_down(&c->a.moe);
    else
        run_combine(&c->a.combine);
    if (c->kind == DO_COMBINE)
        count_half(device_of(s), c->a.combine.rows);
}

static void run_one(struct fake_stream *s, const struct command *c)
{
    struct fake_device *d = device_of(s);
    bool is_expert_product = c->kind == DO_GATE_UP || c->kind == DO_DOWN;
    if (s->result.missed && !(is_expert_product && c->a.moe.layer == s->result.miss_layer))
        return;
    d->counts.commands++;
    switch (c->kind) {
    case DO_COPY:
        memcpy(c->a.move.to, c->a.move.from, c->a.move.bytes);
        break;
    case DO_ZERO:
        memset(c->a.move.to, 0, c->a.move.bytes);
        break;
    case DO_SCATTER:
        run_scatter(&c->a.scatter);
        break;
    case DO_GATHER:
        run_gather(&c->a.gather);
        break;
    case DO_EMBED:
        run_embed(&c->a.embed);
        break;
    case DO_RMSNORM:
        run_rmsnorm(&c->a.rmsnorm);
        break;
    case DO_GEMM:
        run_gemm(&c->a.gemm);
        break;
    case DO_SWIGLU:
        run_swiglu(&c->a.swiglu);
        count_half(d, c->a.swiglu.rows);
        break;
    case DO_LORA_GATHER:
        fake_run_lora_gather(&c->a.lora_gather);
        break;
    case DO_SHRINK:
        fake_run_shrink(&c->a.shrink);
        break;
    case DO_EXPAND:
        fake_run_expand(&c->a.expand);
        break;
    case DO_QK:
        run_qk(d, &c->a.qk);
        break;
    case DO_ATTENTION:
        run_attention(d, &c->a.attention);
        count_half(d, c->a.attention.rows);
        break;
    case DO_ROUTER:
        run_router(&c->a.router);
        break;
    case DO_MAP:
    case DO_GATE_UP:
    case DO_DOWN:
    case DO_COMBINE:
        run_moe(s, c);
        break;
    case DO_ALL_REDUCE: // one rank: nothing to add
        CHECK(!c->a.all_reduce.comm || c->a.all_reduce.comm->world == 1);
        break;
    case DO_SAMPLE:
        run_sample(&c->a.sample);
        break;
    }
}

static void run_until(struct fake_stream *s, uint32_t end)
{
    for (; s->ran < end; s->ran++)
        run_one(s, &s->commands[s->ran]);
}

static uint64_t duration_us(const struct fake_stream *s, const struct fake_device *d)
{
    uint64_t rows = 0;
    for (uint32_t i = 0; i < s->recorded; i++) {
        const struct command *c = &s->commands[i];
        if (c->kind == DO_ATTENTION)
            rows += c->a.attention.rows;
        else if (c->kind == DO_COMBINE || c->kind == DO_SWIGLU)
            rows += c->kind == DO_COMBINE ? c->a.combine.rows : c->a.swiglu.rows;
    }
    return d->options.base_us + rows * d->options.row_ns / 1000;
}

static enum status fake_submit(struct stream *stream)
{
    struct fake_stream *s = (struct fake_stream *)stream;
    struct fake_device *d = device_of(s);
    CHECK(!s->in_flight);
    d->counts.submits++;
    if (d->counts.submits == d->options.fail_submit) {
        s->recorded = 0;
        return STATUS_DEVICE;
    }
    s->in_flight = true;
    s->failed = d->counts.submits == d->options.fail_segment;
    s->result = (struct segment_result){.missed = false};
    s->submitted = s->recorded;
    s->recorded = s->ran = 0;
    uint32_t now = s->submitted;
    if (d->options.timing == FAKE_AT_END)
        now = 0;
    else if (d->options.timing == FAKE_IN_BETWEEN)
        now = (uint32_t)(rng_at(7, 7, d->counts.submits) % (s->submitted + 1));
    s->recorded = s->submitted;
    s->ready_us = *d->options.now_us + duration_us(s, d);
    s->recorded = 0;
    run_until(s, s->failed ? s->submitted / 2 : now);
    return STATUS_OK;
}

static enum status finish(struct fake_stream *s, struct segment_result *result)
{
    if (!s->in_flight) {
        *result = (struct segment_result){.missed = false};
        return STATUS_OK;
    }
    if (!s->failed)
        run_until(s, s->submitted);
    s->in_flight = false;
    *result = s->result;
    return s->failed ? STATUS_DEVICE : STATUS_OK;
}

static enum status fake_wait(struct stream *stream, struct segment_result *result)
{
    return finish((struct fake_stream *)stream, result);
}

static bool fake_poll(struct stream *stream, struct segment_result *result)
{
    struct fake_stream *s = (struct fake_stream *)stream;
    if (s->in_flight && *device_of(s)->options.now_us < s->ready_us)
        return false;
    (void)finish(s, result);
    return true;
}

// ---- recording ----

static struct command *record(struct stream *stream, enum command_kind kind)
{
    struct fake_stream *s = (struct fake_stream *)stream;
    CHECK(!s->in_flight && s->recorded < s->room);
    struct command *c = &s->commands[s->recorded++];
    c->kind = kind;
    return c;
}

static void fake_copy(struct stream *s, void *to, const void *from, size_t bytes)
{
    record(s, DO_COPY)->a.move = (struct move_args){to, from, bytes};
}

static void fake_zero(struct stream *s, void *to, size_t bytes)
{
    record(s, DO_ZERO)->a.move = (struct move_args){.to = to, .bytes = bytes};
}

#define RECORDER(name, type, kind, field)                                                          \
    static void name(struct stream *s, const struct type *a)                                       \
    {                                                                                              \
        record(s, kind)->a.field = *a;                                                             \
    }

RECORDER(fake_scatter, scatter_args, DO_SCATTER, scatter)
RECORDER(fake_gather, gather_args, DO_GATHER, gather)
RECORDER(fake_embed, embed_args, DO_EMBED, embed)
RECORDER(fake_rmsnorm, rmsnorm_args, DO_RMSNORM, rmsnorm)
RECORDER(fake_gemm, gemm_args, DO_GEMM, gemm)
RECORDER(fake_swiglu, swiglu_args, DO_SWIGLU, swiglu)
RECORDER(fake_lora_gather, lora_gather_args, DO_LORA_GATHER, lora_gather)
RECORDER(fake_shrink, lora_shrink_args, DO_SHRINK, shrink)
RECORDER(fake_expand, lora_expand_args, DO_EXPAND, expand)
RECORDER(fake_qk, qk_args, DO_QK, qk)
RECORDER(fake_attention, attention_args, DO_ATTENTION, attention)
RECORDER(fake_router, router_args, DO_ROUTER, router)
RECORDER(fake_map, moe_map_args, DO_MAP, map)
RECORDER(fake_gate_up, moe_gemm_args, DO_GATE_UP, moe)
RECORDER(fake_down, moe_gemm_args, DO_DOWN, moe)
RECORDER(fake_combine, moe_combine_args, DO_COMBINE, combine)
RECORDER(fake_all_reduce, all_reduce_args, DO_ALL_REDUCE, all_reduce)
RECORDER(fake_sample, sample_args, DO_SAMPLE, sample)

// ---- life ----

static bool alloc_fails(struct fake_device *d)
{
    return ++d->counts.allocs == d->options.fail_alloc;
}

static enum status fake_alloc(struct device *device, size_t bytes, void **out)
{
    struct fake_device *d = (struct fake_device *)device;
    if (alloc_fails(d))
        return STATUS_NO_MEMORY;
    size_t rounded = round_up(bytes, 64);
    *out = aligned_alloc(64, rounded);
    if (!*out)
        return STATUS_NO_MEMORY;
    memset(*out, 0, rounded);
    d->counts.live++;
    return STATUS_OK;
}

static void fake_release(struct device *device, void *memory)
{
    struct fake_device *d = (struct fake_device *)device;
    CHECK(d->counts.live);
    d->counts.live--;
    free(memory);
}

static size_t fake_act_bytes(const struct device *device, size_t rows, size_t cols)
{
    (void)device;
    (void)cols;
    return rows * ACT;
}

static enum status fake_stream_create(struct device *device, uint32_t commands, struct stream **out)
{
    struct fake_device *d = (struct fake_device *)device;
    if (alloc_fails(d))
        return STATUS_NO_MEMORY;
    struct fake_stream *s = calloc(1, sizeof *s);
    struct command *room = calloc(commands, sizeof *room);
    CHECK(s && room);
    s->base.device = device;
    s->commands = room;
    s->room = commands;
    d->counts.live++;
    d->stream = s;
    *out = &s->base;
    return STATUS_OK;
}

static void fake_stream_destroy(struct stream *stream)
{
    struct fake_stream *s = (struct fake_stream *)stream;
    struct fake_device *d = device_of(s);
    d->counts.live--;
    if (d->stream == s)
        d->stream = NULL;
    free(s->commands);
    free(s);
}

static void fake_destroy(struct device *device)
{
    free(device);
}

static void fake_info(const struct device *device, struct device_info *out)
{
    (void)device;
    *out = (struct device_info){
        .name = "fake", .instruction_set = "none", .threads = 1, .dtype = DTYPE_BF16};
}

static const struct device_table table = {
    .destroy = fake_destroy,
    .info = fake_info,
    .alloc = fake_alloc,
    .release = fake_release,
    .act_bytes = fake_act_bytes,
    .alloc_host = fake_alloc,
    .release_host = fake_release,
    .upload = plain_move,
    .download = plain_move,
    .zero_now = plain_zero,
    .free_bytes = plain_free_bytes,
    .copy_start = plain_copy_start,
    .copy_poll = plain_copy_poll,
    .unit = plain_unit,
    .captures = plain_captures,
    .stream_create = fake_stream_create,
    .stream_destroy = fake_stream_destroy,
    .submit = fake_submit,
    .poll = fake_poll,
    .wait = fake_wait,
    .copy = fake_copy,
    .zero = fake_zero,
    .scatter = fake_scatter,
    .gather = fake_gather,
    .embed = fake_embed,
    .rmsnorm = fake_rmsnorm,
    .gemm = fake_gemm,
    .swiglu = fake_swiglu,
    .lora_gather = fake_lora_gather,
    .lora_shrink = fake_shrink,
    .lora_expand = fake_expand,
    .qk_norm_rope_kv = fake_qk,
    .attention = fake_attention,
    .router = fake_router,
    .moe_map = fake_map,
    .moe_gate_up = fake_gate_up,
    .moe_down = fake_down,
    .moe_combine = fake_combine,
    .all_reduce = fake_all_reduce,
    .sample = fake_sample,
};

enum status fake_device_create(const struct fake_device_options *options, struct device **out)
{
    struct fake_device *d = calloc(1, sizeof *d);
    if (!d)
        return STATUS_NO_MEMORY;
    d->base.table = &table;
    d->options = *options;
    *out = &d->base;
    return STATUS_OK;
}

void fake_device_counts(const struct device *device, struct fake_device_counts *out)
{
    *out = ((const struct fake_device *)device)->counts;
}

uint64_t fake_device_ready_us(const struct device *device)
{
    const struct fake_stream *s = ((const struct fake_device *)device)->stream;
    return s && s->in_flight ? s->ready_us : UINT64_MAX;
}
