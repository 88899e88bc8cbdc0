// SPDX-License-Identifier: Apache-2.0
// Records the model into the stream: one function per half-layer. Decides nothing; the same for all
// backends. What a half-layer leaves behind is the residual rows x and the KV it wrote, nothing
// else, so a step can be left after any half and entered again.
//
//   begin     : x = Embed(token)                                                          (+ LoRA)
//   half 2l   : x += O(attention(rope(norm(QKV(rmsnorm(x))))))            (+ LoRA on q, k, v, o)
//   half 2l+1 : x += MLP(rmsnorm(x)), dense or router -> map -> experts -> combine    (+ LoRA)
//   head      : sample(Head(rmsnorm(x[last rows])))                                       (+ LoRA)
//
// With several ranks (kernels/comm.h) each computes its share of heads, units and experts, and x is
// the same on all of them: rank 0 adds its part of a half-layer to x itself, the others put theirs
// into scratch.partial, and the sum over ranks of those arrays is the new x. Router, norms and head
// are computed by all. With one rank nothing of this is recorded.
#include <math.h>

#include "runtime/engine/internal.h"

static struct kv_view kv_view_of(const struct engine *e, const struct step *step)
{
    return (struct kv_view){
        .arena = (uint8_t *)(uintptr_t)e->options.arena,
        .page_bytes = e->options.page_bytes,
        .pages = step->device.pages,
        .blocks_max = (uint32_t)div_up(e->options.context_max, e->options.kv_shape.block_tokens),
        .shape = e->options.kv_shape};
}

static bool has(const struct step *step, enum lora_module module)
{
    return step->lora_modules >> module & 1;
}

// The step's rows, or those that are sampled.
static const struct lora_batch *batch_of(const struct step *step, enum lora_module module)
{
    return module == LORA_HEAD ? &step->lora_head : &step->lora;
}

// Shrinks stand right before their expands: the expand then begins while they still run.
static void shrink(struct engine *e, struct step *step, enum lora_module module, uint32_t layer,
                   const void *x, uint32_t d_in, uint32_t buffer)
{
    if (!has(step, module))
        return;
    struct lora_shrink_args a = {.batch = batch_of(step, module),
                                 .x = x,
                                 .hidden = e->scratch.lora_hidden[buffer],
                                 .layer = layer,
                                 .d_in = d_in,
                                 .module = module};
    e->table->lora_shrink(e->stream, &a);
}

static void expand(struct engine *e, struct step *step, enum lora_module module, uint32_t layer,
                   float *y, size_t stride, uint32_t d_out, uint32_t buffer, int half)
{
    if (!has(step, module))
        return;
    struct lora_expand_args a = {.batch = batch_of(step, module),
                                 .hidden = e->scratch.lora_hidden[buffer],
                                 .y = y,
                                 .y_stride = stride,
                                 .layer = layer,
                                 .d_out = d_out,
                                 .module = module,
                                 .interleave_half = half};
    e->table->lora_expand(e->stream, &a);
}

static void norm(struct engine *e, const struct step *step, const float *weight, float *out_f32)
{
    const struct model_config *c = &e->options.model->config;
    struct rmsnorm_args a = {.x = step->x,
                             .weight = weight,
                             .out = e->scratch.act,
                             .out_f32 = out_f32,
                             .rows = step->plan.rows,
                             .dim = c->hidden,
                             .epsilon = c->rms_epsilon};
    e->table->rmsnorm(e->stream, &a);
}

static void gemm(struct engine *e, const void *x, const void *weight, float *y, size_t stride,
                 uint32_t rows, uint32_t n, uint32_t k, bool add)
{
    struct gemm_args a = {.x = x,
                          .weight = weight,
                          .y = y,
                          .y_stride = stride,
                          .rows = rows,
                          .n = n,
                          .k = k,
                          .add = add};
    e->table->gemm(e->stream, &a);
}

// Where this rank's part of a half-layer goes: x itself (added), or an array of its own (replaced).
struct part {
    float *y;
    bool add;
};

static struct part part_of(const struct engine *e, const struct step *step)
{
    bool first = e->options.model->share.rank == 0;
    return (struct part){.y = first ? step->x : e->scratch.partial, .add = first};
}

static void sum_parts(struct engine *e, struct step *step, const struct part *part)
{
    const struct model *m = e->options.model;
    if (m->share.world == 1)
        return;
    struct all_reduce_args a = {.comm = e->options.comm,
                                .from = part->y,
                                .to = step->x,
                                .rows = step->plan.rows,
                                .cols = m->config.hidden};
    e->table->all_reduce(e->stream, &a);
}

static void attention_half(struct engine *e, struct step *step, uint32_t layer)
{
    const struct model_config *c = &e->options.model->config;
    const struct model_layer *w = &e->options.model->layers[layer];
    struct scratch *s = &e->scratch;
    const struct model_share *share = &e->options.model->share;
    uint32_t rows = step->plan.rows, q_n = share->heads * c->head_dim;
    uint32_t kv_n = share->kv_heads * c->head_dim;
    size_t stride = q_n + 2 * kv_n;
    norm(e, step, w->attention_norm, NULL);
    gemm(e, s->act, w->qkv, s->qkv, stride, rows, (uint32_t)stride, c->hidden, false);
    shrink(e, step, LORA_Q, layer, s->act, c->hidden, 0);
    shrink(e, step, LORA_K, layer, s->act, c->hidden, 1);
    shrink(e, step, LORA_V, layer, s->act, c->hidden, 2);
    expand(e, step, LORA_Q, layer, s->qkv, stride, q_n, 0, -1);
    expand(e, step, LORA_K, layer, s->qkv + q_n, stride, kv_n, 1, -1);
    expand(e, step, LORA_V, layer, s->qkv + q_n + kv_n, stride, kv_n, 2, -1);
    struct kv_view view = kv_view_of(e, step);
    struct qk_args qk = {.q = s->qkv,
                         .k = s->qkv + q_n,
                         .v = s->qkv + q_n + kv_n,
                         .q_stride = stride,
                         .k_stride = stride,
                         .v_stride = stride,
                         .q_weight = w->q_norm,
                         .k_weight = w->k_norm,
                         .inv_freq = e->options.model->inv_freq,
                         .sequence = step->device.sequence,
                         .position = step->device.position,
                         .kv = view,
                         .rows = rows,
                         .heads = share->heads,
                         .layer = layer,
                         .epsilon = c->rms_epsilon};
    e->table->qk_norm_rope_kv(e->stream, &qk);
    struct attention_args at = {.q = s->qkv,
                                .q_stride = stride,
                                .out = s->attention,
                                .sequence = step->device.sequence,
                                .position = step->device.position,
                                .kv = view,
                                .rows = rows,
                                .heads = share->heads,
                                .layer = layer,
                                .scale = 1.0f / sqrtf((float)c->head_dim)};
    e->table->attention(e->stream, &at);
    struct part part = part_of(e, step);
    gemm(e, s->attention, w->o, part.y, c->hidden, rows, c->hidden, q_n, part.add);
    shrink(e, step, LORA_O, layer, s->attention, q_n, 0);
    expand(e, step, LORA_O, layer, part.y, c->hidden, c->hidden, 0, -1);
    sum_parts(e, step, &part);
}

static void dense_half(struct engine *e, struct step *step, uint32_t layer)
{
    const struct model_config *c = &e->options.model->config;
    const struct model_layer *w = &e->options.model->layers[layer];
    struct scratch *s = &e->scratch;
    uint32_t units = e->options.model->share.intermediate;
    uint32_t rows = step->plan.rows, n = (uint32_t)tile_interleaved_rows(units);
    norm(e, step, w->mlp_norm, NULL);
    gemm(e, s->act, w->gate_up, s->gate_up, n, rows, n, c->hidden, false);
    shrink(e, step, LORA_GATE, layer, s->act, c->hidden, 0);
    shrink(e, step, LORA_UP, layer, s->act, c->hidden, 1);
    expand(e, step, LORA_GATE, layer, s->gate_up, n, units, 0, 0);
    expand(e, step, LORA_UP, layer, s->gate_up, n, units, 1, 1);
    struct swiglu_args sw = {
        .gate_up = s->gate_up, .stride = n, .out = s->mid, .rows = rows, .intermediate = units};
    e->table->swiglu(e->stream, &sw);
    struct part part = part_of(e, step);
    gemm(e, s->mid, w->down, part.y, c->hidden, rows, c->hidden, units, part.add);
    shrink(e, step, LORA_DOWN, layer, s->mid, units, 0);
    expand(e, step, LORA_DOWN, layer, part.y, c->hidden, c->hidden, 0, -1);
    sum_parts(e, step, &part);
}

static void moe_half(struct engine *e, struct step *step, uint32_t layer, bool from_gate)
{
    const struct model_config *c = &e->options.model->config;
    const struct model_layer *w = &e->options.model->layers[layer];
    struct scratch *s = &e->scratch;
    uint32_t rows = step->plan.rows, moe = e->moe_index[layer];
    struct expert_view view = experts_view(e->options.experts, moe);
    if (!from_gate) {
        norm(e, step, w->mlp_norm, s->normed);
        struct router_args r = {.x = s->normed,
                                .weight = w->router,
                                .expert = s->moe.expert,
                                .gate = s->moe.gate,
                                .rows = rows,
                                .dim = c->hidden,
                                .experts = c->experts,
                                .top_k = c->top_k,
                                .normalize = c->normalize_top_k};
        e->table->router(e->stream, &r);
    }
    struct moe_map_args map = {.work = s->moe,
                               .view = view,
                               .need = s->need + (size_t)moe * c->experts,
                               .host_state = s->expert_state,
                               .rows = rows,
                               .top_k = c->top_k,
                               .layer = layer,
                               .resume = from_gate,
                               .mine = e->options.model->share.experts};
    if (step->has_parts) {
        map.lora = &step->lora;
        map.part_wanted = s->part_wanted;
        map.page_used = adapters_page_used(e->options.adapters);
    }
    e->table->moe_map(e->stream, &map);
    bool lora = has(step, LORA_GATE) || has(step, LORA_UP) || has(step, LORA_DOWN);
    struct moe_gemm_args g = {.work = s->moe,
                              .view = view,
                              .x = s->act,
                              .rows = rows,
                              .dim = c->hidden,
                              .intermediate = c->moe_intermediate,
                              .top_k = c->top_k,
                              .layer = layer,
                              .lora = lora ? &step->lora : NULL};
    e->table->moe_gate_up(e->stream, &g);
    e->table->moe_down(e->stream, &g);
    struct part part = part_of(e, step);
    struct moe_combine_args cb = {.work = s->moe,
                                  .y = part.y,
                                  .rows = rows,
                                  .dim = c->hidden,
                                  .top_k = c->top_k,
                                  .mine = e->options.model->share.experts,
                                  .replace = !part.add};
    e->table->moe_combine(e->stream, &cb);
    sum_parts(e, step, &part);
}

// The tokens that the step before sampled, where this step's rows want them.
static void follow_tokens(struct engine *e, const struct step *step)
{
    struct scatter_args a = {.table = (uint32_t *)step->device.token,
                             .index = step->device.follow,
                             .value =
                                 (const uint32_t *)e->scratch.results[1 - step->result_set].token,
                             .count = step->followed};
    e->table->scatter(e->stream, &a);
}

static void embed(struct engine *e, struct step *step)
{
    const struct model_config *c = &e->options.model->config;
    struct embed_args a = {.token = step->device.token,
                           .table = e->options.model->embedding,
                           .x = step->x,
                           .rows = step->plan.rows,
                           .dim = c->hidden,
                           .vocab = c->vocab};
    e->table->embed(e->stream, &a);
    if (!has(step, LORA_EMBED))
        return;
    struct lora_gather_args g = {.batch = &step->lora,
                                 .token = step->device.token,
                                 .hidden = e->scratch.lora_hidden[0],
                                 .layer = c->layers,
                                 .vocab = c->vocab,
                                 .module = LORA_EMBED};
    e->table->lora_gather(e->stream, &g);
    expand(e, step, LORA_EMBED, c->layers, step->x, c->hidden, c->hidden, 0, -1);
}

void forward_begin(struct engine *engine, struct step *step)
{
    const struct engine_options *o = &engine->options;
    uint32_t blocks = (uint32_t)div_up(o->context_max, o->kv_shape.block_tokens);
    size_t table =
        (size_t)step->plan.runs * blocks * o->kv_shape.pages_per_block * sizeof(uint32_t);
    size_t fixed = (size_t)((uint8_t *)step->host.pages - step->block.host);
    if (step->places_changed)
        engine->table->copy(engine->stream, step->block.device, step->block.host, fixed + table);
    step->places_changed = false;
    bool begins = step->half == 0 && !step->resume_gate;
    if (begins && step->followed)
        follow_tokens(engine, step);
    engine->table->unit(engine->stream);
    if (begins)
        embed(engine, step);
}

void forward_half(struct engine *engine, struct step *step, uint32_t half, bool from_gate)
{
    uint32_t layer = half / 2;
    if (half % 2 == 0)
        attention_half(engine, step, layer);
    else if (engine->options.model->config.is_moe[layer])
        moe_half(engine, step, layer, from_gate);
    else
        dense_half(engine, step, layer);
}

void forward_head(struct engine *engine, struct step *step)
{
    const struct model *m = engine->options.model;
    const struct model_config *c = &m->config;
    struct scratch *s = &engine->scratch;
    struct result_set *results = &s->results[step->result_set];
    uint32_t rows = step->plan.samples;
    struct gather_args g = {.from = step->x,
                            .index = step->device.gather,
                            .to = s->last,
                            .rows = rows,
                            .dim = c->hidden};
    engine->table->gather(engine->stream, &g);
    struct rmsnorm_args n = {.x = s->last,
                             .weight = m->final_norm,
                             .out = s->last_act,
                             .rows = rows,
                             .dim = c->hidden,
                             .epsilon = c->rms_epsilon};
    engine->table->rmsnorm(engine->stream, &n);
    gemm(engine, s->last_act, m->head, s->logits, c->vocab, rows, c->vocab, c->hidden, false);
    shrink(engine, step, LORA_HEAD, c->layers, s->last_act, c->hidden, 0);
    expand(engine, step, LORA_HEAD, c->layers, s->logits, c->vocab, c->vocab, 0, -1);
    struct sample_args a = {.logits = s->logits,
                            .stride = c->vocab,
                            .vocab = c->vocab,
                            .rows = rows,
                            .params = step->device.sample,
                            .token = results->token,
                            .logprob = results->logprob,
                            .tops = step->tops,
                            .top_token = results->top_token,
                            .top_logprob = results->top_logprob};
    engine->table->sample(engine->stream, &a);
}
