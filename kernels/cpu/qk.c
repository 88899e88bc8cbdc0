// SPDX-License-Identifier: Apache-2.0
// QK-norm, RoPE and the write of K and V into the paged cache; a task per row. Angles are position
// * inv_freq in fp32 with the C library's cosf and sinf, as transformers computes them. q stays
// fp32 in place; k and v are rounded once, to the compute dtype, when they enter the cache.
#include <math.h>

#include "kernels/cpu/cpu.h"

uint8_t *cpu__kv_at(const struct kv_view *kv, size_t element, uint32_t layer, uint32_t sequence,
                    uint32_t position, uint32_t value, uint32_t head)
{
    const struct kv_shape *shape = &kv->shape;
    uint32_t block = position / shape->block_tokens;
    CHECK(block < kv->blocks_max);
    size_t slot = ((size_t)sequence * kv->blocks_max + block) * shape->pages_per_block +
                  layer / shape->layers_per_page;
    size_t token = ((size_t)value * shape->kv_heads + head) * shape->block_tokens +
                   position % shape->block_tokens;
    return kv->arena + (size_t)kv->pages[slot] * kv->page_bytes +
           layer % shape->layers_per_page * shape->part_bytes + token * shape->head_dim * element;
}

// out = rotate(norm(in)); in == out is allowed.
static void head_turn(const struct micro *micro, const float *in, const float *weight,
                      float epsilon, const float *angle, size_t dim, float *out)
{
    size_t half = dim / 2;
    const float *cosine = angle, *sine = angle + half;
    if (weight) {
        float mean = micro->sum_squares(in, dim) / (float)dim;
        micro->scale_mul(in, weight, 1.0f / sqrtf(mean + epsilon), out, dim);
        in = out;
    }
    for (size_t i = 0; i < half; i++) {
        float a = in[i], b = in[i + half];
        out[i] = a * cosine[i] - b * sine[i];
        out[i + half] = b * cosine[i] + a * sine[i];
    }
}

static void qk_task(struct cpu_stream *s, struct slot *slot, struct command *c, uint32_t row)
{
    const struct qk_args *a = &c->a.qk;
    const struct micro *micro = cpu__micro(s);
    const struct micro_dtype *kernel = cpu__kernel(s);
    size_t dim = a->kv.shape.head_dim, half = dim / 2, element = cpu__element(s);
    uint32_t sequence = a->sequence[row], position = a->position[row];
    for (size_t i = 0; i < half; i++) {
        float angle = (float)position * a->inv_freq[i];
        slot->angle[i] = cosf(angle);
        slot->angle[half + i] = sinf(angle);
    }
    for (uint32_t h = 0; h < a->heads; h++) {
        float *q = a->q + row * a->q_stride + h * dim;
        head_turn(micro, q, a->q_weight, a->epsilon, slot->angle, dim, q);
    }
    for (uint32_t h = 0; h < a->kv.shape.kv_heads; h++) {
        head_turn(micro, a->k + row * a->k_stride + h * dim, a->k_weight, a->epsilon, slot->angle,
                  dim, slot->out);
        kernel->store(slot->out, cpu__kv_at(&a->kv, element, a->layer, sequence, position, 0, h),
                      dim);
        kernel->store(a->v + row * a->v_stride + h * dim,
                      cpu__kv_at(&a->kv, element, a->layer, sequence, position, 1, h), dim);
    }
}

static const struct operation qk_operation = {.task = qk_task};

void cpu__kv_check(const struct stream *s, const struct kv_view *kv, uint32_t layer)
{
    const struct kv_shape *shape = &kv->shape;
    size_t element = dtype_bytes(((const struct cpu_device *)s->device)->dtype);
    CHECK(shape->head_dim && shape->head_dim <= HEAD_DIM_MAX && shape->head_dim % 2 == 0);
    CHECK(shape->block_tokens && shape->kv_heads && shape->layers_per_page);
    CHECK(layer < shape->layers && layer / shape->layers_per_page < shape->pages_per_block);
    CHECK(shape->part_bytes >=
          2 * element * shape->kv_heads * shape->block_tokens * shape->head_dim);
}

void cpu__qk_norm_rope_kv(struct stream *s, const struct qk_args *a)
{
    if (!a->rows)
        return;
    cpu__kv_check(s, &a->kv, a->layer);
    struct command *c = cpu__record(s, &qk_operation, a->rows);
    c->a.qk = *a;
    size_t dim = a->kv.shape.head_dim, kv_width = a->kv.shape.kv_heads * dim * sizeof(float);
    cpu__reads(c, a->k, kv_width, a->k_stride * sizeof(float), a->rows);
    cpu__reads(c, a->v, kv_width, a->v_stride * sizeof(float), a->rows);
    cpu__writes(c, a->q, a->heads * dim * sizeof(float), a->q_stride * sizeof(float), a->rows);
    cpu__writes(c, a->kv.arena, 1, 0, 1); // stands for the cache
    cpu__record_end(s, c);
}
