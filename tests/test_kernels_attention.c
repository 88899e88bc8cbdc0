// SPDX-License-Identifier: Apache-2.0
// qk_norm_rope_kv and paged attention against double precision: scattered pages, everything else in
// the arena poisoned with NaN.
#include "tests/test_kernels_rig.h"

struct world {
    struct rig *rig;
    struct kv_view kv;
    uint32_t sequences, heads;
    uint32_t *pages;
};

static void world_make(struct world *w, struct rig *rig, uint32_t sequences, uint32_t tokens,
                       struct kv_shape shape, uint32_t heads)
{
    uint32_t blocks = (uint32_t)div_up(tokens, shape.block_tokens);
    shape.part_bytes =
        2 * (size_t)shape.kv_heads * shape.block_tokens * shape.head_dim * dtype_bytes(rig->dtype);
    shape.pages_per_block = (uint32_t)div_up(shape.layers, shape.layers_per_page);
    size_t page_bytes = round_up(shape.part_bytes * shape.layers_per_page, 64) + 64;
    uint32_t used = sequences * blocks * shape.pages_per_block, all = used + used / 2 + 1;
    uint32_t *free_pages = rig_alloc(rig, all * sizeof *free_pages);
    *w = (struct world){.rig = rig, .sequences = sequences, .heads = heads};
    w->pages = rig_alloc(rig, used * sizeof *w->pages);
    for (uint32_t i = 0; i < all; i++)
        free_pages[i] = i;
    for (uint32_t i = 0; i < used; i++) {
        uint32_t j = i + random_below(all - i), page = free_pages[j];
        free_pages[j] = free_pages[i];
        w->pages[i] = page;
    }
    uint8_t *arena = rig_alloc(rig, all * page_bytes);
    memset(arena, 0xff, all * page_bytes); // NaN in both dtypes
    w->kv = (struct kv_view){arena, page_bytes, w->pages, blocks, shape};
}

static uint8_t *kv_at(const struct world *w, uint32_t layer, uint32_t sequence, uint32_t position,
                      uint32_t value, uint32_t head)
{
    const struct kv_shape *s = &w->kv.shape;
    size_t element = dtype_bytes(w->rig->dtype);
    size_t at =
        ((size_t)sequence * w->kv.blocks_max + position / s->block_tokens) * s->pages_per_block +
        layer / s->layers_per_page;
    return w->kv.arena + w->pages[at] * w->kv.page_bytes +
           layer % s->layers_per_page * s->part_bytes +
           (((size_t)value * s->kv_heads + head) * s->block_tokens + position % s->block_tokens) *
               s->head_dim * element;
}

static float kv_get(const struct world *w, const uint8_t *row, size_t i)
{
    if (w->rig->dtype == DTYPE_F32)
        return ((const float *)(const void *)row)[i];
    return bf16_to_f32(((const uint16_t *)(const void *)row)[i]);
}

static void kv_fill(const struct world *w, uint32_t layer, uint32_t sequence, uint32_t tokens)
{
    const struct kv_shape *s = &w->kv.shape;
    for (uint32_t t = 0; t < tokens; t++)
        for (uint32_t v = 0; v < 2; v++)
            for (uint32_t h = 0; h < s->kv_heads; h++)
                for (uint32_t i = 0; i < s->head_dim; i++) {
                    uint8_t *row = kv_at(w, layer, sequence, t, v, h);
                    float x = random_float();
                    if (w->rig->dtype == DTYPE_F32)
                        ((float *)(void *)row)[i] = x;
                    else
                        ((uint16_t *)(void *)row)[i] = bf16_from_f32(x);
                }
}

static void attention_check(struct world *w, uint32_t layer, const float *q, uint32_t q_stride,
                            const void *out, const uint32_t *sequence, const uint32_t *position,
                            uint32_t rows, float scale)
{
    size_t dim = w->kv.shape.head_dim, group = w->heads / w->kv.shape.kv_heads;
    for (uint32_t r = 0; r < rows; r++)
        for (uint32_t h = 0; h < w->heads; h++) {
            uint32_t n = position[r] + 1;
            double *score = malloc(n * sizeof *score), max = -INFINITY, sum = 0;
            for (uint32_t t = 0; t < n; t++) {
                const uint8_t *k = kv_at(w, layer, sequence[r], t, 0, h / (uint32_t)group);
                score[t] = 0;
                for (size_t i = 0; i < dim; i++)
                    score[t] += (double)quantize(w->rig->dtype, q[r * q_stride + h * dim + i]) *
                                (double)kv_get(w, k, i);
                score[t] *= (double)scale;
                max = fmax(max, score[t]);
            }
            for (uint32_t t = 0; t < n; t++)
                sum += score[t] = exp(score[t] - max);
            for (size_t i = 0; i < dim; i++) {
                double want = 0, size = 0;
                for (uint32_t t = 0; t < n; t++) {
                    const uint8_t *v = kv_at(w, layer, sequence[r], t, 1, h / (uint32_t)group);
                    want += score[t] / sum * (double)kv_get(w, v, i);
                    size += score[t] / sum * fabs((double)kv_get(w, v, i));
                }
                near(w->rig, act_get(w->rig, out, w->heads * dim, r, h * dim + i), want, size,
                     tolerance_act(w->rig));
            }
            free(score);
        }
}

static void *attention_run(struct world *w, uint32_t layer, const float *q, uint32_t q_stride,
                           const uint32_t *sequence, const uint32_t *position, uint32_t rows,
                           float scale)
{
    struct rig *rig = w->rig;
    size_t cols = w->heads * w->kv.shape.head_dim;
    size_t bytes = rig->table->act_bytes(rig->device, rows, cols);
    void *out = rig_alloc(rig, bytes);
    memset(out, 0xff, bytes);
    rig->table->attention(rig->stream, &(struct attention_args){.q = q,
                                                                .q_stride = q_stride,
                                                                .out = out,
                                                                .sequence = sequence,
                                                                .position = position,
                                                                .kv = w->kv,
                                                                .rows = rows,
                                                                .heads = w->heads,
                                                                .layer = layer,
                                                                .scale = scale});
    rig_run(rig);
    assert_true(act_padding_zero(rig, out, rows, cols));
    return out;
}

struct attention_shape {
    uint32_t kv_heads, group, dim, block, layers, per_page, context, rows;
};

static void attention_case(struct rig *rig, const struct attention_shape *a)
{
    struct world w;
    uint32_t heads = a->kv_heads * a->group, stride = heads * a->dim + 7;
    world_make(&w, rig, 2, a->context,
               (struct kv_shape){.layers = a->layers,
                                 .kv_heads = a->kv_heads,
                                 .head_dim = a->dim,
                                 .block_tokens = a->block,
                                 .layers_per_page = a->per_page},
               heads);
    uint32_t layer = a->layers - 1, rows = a->rows;
    uint32_t *sequence = rig_alloc(rig, 300 * 4), *position = rig_alloc(rig, 300 * 4);
    kv_fill(&w, layer, 0, a->context);
    kv_fill(&w, layer, 1, a->context / 2 + 1);
    // A chunk that ends at the context of sequence 0, then a decode row of sequence 1.
    for (uint32_t r = 0; r < rows; r++) {
        sequence[r] = r + 1 == rows && rows > 1;
        position[r] = sequence[r] ? a->context / 2 : a->context - (rows > 1 ? rows - 1 : 1) + r;
    }
    float *q = rig_floats(rig, (size_t)(rows + 1) * stride), scale = 1.0f / sqrtf((float)a->dim);
    void *out = attention_run(&w, layer, q, stride, sequence, position, rows, scale);
    attention_check(&w, layer, q, stride, out, sequence, position, rows, scale);
    rig_clear(rig);
}

static void attention_all(struct rig *rig)
{
    static const struct attention_shape cases[] = {
        {1, 1, 16, 8, 1, 1, 1, 0},     {1, 1, 16, 8, 1, 1, 1, 1},    {2, 1, 40, 8, 2, 1, 30, 1},
        {2, 2, 40, 16, 3, 2, 300, 9},  {1, 8, 64, 32, 2, 2, 257, 1}, {2, 8, 128, 16, 1, 1, 600, 6},
        {4, 2, 64, 16, 1, 1, 520, 70}, {1, 40, 16, 8, 1, 1, 40, 3},  {1, 3, 24, 8, 1, 1, 256, 20},
        {2, 4, 96, 16, 2, 1, 513, 2},
    };
    for (size_t i = 0; i < ARRAY_COUNT(cases); i++)
        attention_case(rig, &cases[i]);
}

static void test_kernels_attention_matches_double(void **state)
{
    (void)state;
    rig_each("attention", attention_all);
}

// The same rows alone, in one chunk, in chunks of any size: the same bits. The future of a sequence
// (here: NaN behind each row's position, written later) must not matter either.
static void attention_bits(struct rig *rig)
{
    enum { CONTEXT = 530, HEADS = 4, DIM = 40, COLS = HEADS * DIM };
    struct world w;
    if (!rig->exact)
        return;
    world_make(&w, rig, 1, CONTEXT, (struct kv_shape){1, 2, DIM, 16, 0, 1, 0}, HEADS);
    kv_fill(&w, 0, 0, CONTEXT);
    uint32_t *sequence = rig_alloc(rig, CONTEXT * 4), *position = rig_alloc(rig, CONTEXT * 4);
    for (uint32_t i = 0; i < CONTEXT; i++)
        position[i] = i;
    float *q = rig_floats(rig, CONTEXT * COLS);
    const uint8_t *all = attention_run(&w, 0, q, COLS, sequence, position, CONTEXT, 0.2f);
    size_t row = rig->table->act_bytes(rig->device, 1, COLS);
    for (uint32_t first = 0, n; first < CONTEXT; first += n) {
        n = 1 + random_below(first < 60 ? 2 : 90);
        n = n < CONTEXT - first ? n : CONTEXT - first;
        void *part =
            attention_run(&w, 0, q + first * COLS, COLS, sequence, position + first, n, 0.2f);
        assert_memory_equal(part, all + first * row, n * row);
    }
    for (uint32_t i = 300; i < CONTEXT; i++)
        for (uint32_t h = 0; h < 2; h++)
            memset(kv_at(&w, 0, 0, i, 1, h), 0xff, DIM * dtype_bytes(rig->dtype));
    const void *poisoned = attention_run(&w, 0, q, COLS, sequence, position, CONTEXT, 0.2f);
    assert_memory_equal(poisoned, all, 300 * row);
    rig_clear(rig);
}

static void test_kernels_attention_bits_do_not_depend_on_the_chunk(void **state)
{
    (void)state;
    rig_each("attention bits", attention_bits);
}

// Sequences that have their first pages in common, as after a prefix found in the cache: the
// answer, and (exact devices) the bits, are those of each row alone.
static void shared_case(struct rig *rig, uint32_t kv_heads, uint32_t group, uint32_t dim,
                        uint32_t block)
{
    enum { SEQUENCES = 11, CONTEXT = 900, ROWS = SEQUENCES + 3 };
    static const uint32_t common[SEQUENCES] = {0, 512, 800, 256, 256, 255, 600, 0, 512, 768, 900};
    struct world w;
    uint32_t heads = kv_heads * group, cols = heads * dim, *sequence, *position;
    world_make(&w, rig, SEQUENCES, CONTEXT, (struct kv_shape){1, kv_heads, dim, block, 0, 1, 0},
               heads);
    for (uint32_t i = 0; i < SEQUENCES; i++) {
        memcpy(w.pages + i * w.kv.blocks_max, w.pages,
               common[i] / block * sizeof *w.pages); // whole blocks
        kv_fill(&w, 0, i, CONTEXT);
    }
    sequence = rig_alloc(rig, ROWS * 4);
    position = rig_alloc(rig, ROWS * 4);
    for (uint32_t r = 0; r < ROWS; r++) { // the last rows are further ones of the last sequences
        sequence[r] = r < SEQUENCES ? r : 2 * SEQUENCES - 1 - r;
        position[r] = r % 4 == 3 ? 200 + random_below(200) : CONTEXT - 1 - random_below(200);
    }
    float *q = rig_floats(rig, (size_t)ROWS * cols), scale = 1.0f / sqrtf((float)dim);
    uint8_t *out = attention_run(&w, 0, q, cols, sequence, position, ROWS, scale);
    attention_check(&w, 0, q, cols, out, sequence, position, ROWS, scale);
    size_t bytes = rig->table->act_bytes(rig->device, 1, cols);
    for (uint32_t r = 0; rig->exact && r < ROWS; r++) {
        const void *alone =
            attention_run(&w, 0, q + (size_t)r * cols, cols, sequence + r, position + r, 1, scale);
        assert_memory_equal(alone, out + r * bytes, bytes);
    }
    rig_clear(rig);
}

static void shared_all(struct rig *rig)
{
    static const uint32_t cases[][4] = {{2, 1, 64, 16},  {1, 2, 128, 8}, {2, 3, 40, 16},
                                        {1, 4, 128, 32}, {2, 8, 64, 8},  {1, 12, 16, 16}};
    for (size_t i = 0; i < ARRAY_COUNT(cases); i++)
        shared_case(rig, cases[i][0], cases[i][1], cases[i][2], cases[i][3]);
}

static void test_kernels_attention_of_shared_pages_is_that_of_each_row(void **state)
{
    (void)state;
    rig_each("attention shared", shared_all);
}

static double turned(const float *x, const float *weight, double norm, const float *inv_freq,
                     uint32_t position, size_t dim, size_t i, double *scale)
{
    size_t half = dim / 2, j = i < half ? i + half : i - half;
    float angle = (float)position * inv_freq[i % half];
    double a = (double)x[i] * norm * (weight ? (double)weight[i] : 1);
    double b = (double)x[j] * norm * (weight ? (double)weight[j] : 1);
    *scale = fabs(a) + fabs(b);
    return a * cos((double)angle) + (i < half ? -b : b) * sin((double)angle);
}

static double norm_of(const float *x, const float *weight, size_t dim)
{
    double square = 0;
    for (size_t i = 0; i < dim; i++)
        square += (double)x[i] * (double)x[i];
    return weight ? 1 / sqrt(square / (double)dim + 1e-6) : 1;
}

static void qk_case(struct rig *rig, uint32_t dim, uint32_t kv_heads, uint32_t group, bool norms,
                    uint32_t rows)
{
    enum { LAYER = 1, CONTEXT = 400 };
    struct world w;
    uint32_t heads = kv_heads * group, stride = (heads + 2 * kv_heads) * dim;
    world_make(&w, rig, 3, CONTEXT, (struct kv_shape){2, kv_heads, dim, 8, 0, 2, 0}, heads);
    float *qkv = rig_floats(rig, (size_t)rows * stride);
    float *before = rig_alloc(rig, (size_t)rows * stride * sizeof(float) + 1);
    memcpy(before, qkv, (size_t)rows * stride * sizeof(float));
    float *q_weight = norms ? rig_floats(rig, dim) : NULL;
    float *k_weight = norms ? rig_floats(rig, dim) : NULL, *inv_freq = rig_floats(rig, dim / 2);
    uint32_t *sequence = rig_alloc(rig, 8 * 4), *position = rig_alloc(rig, 8 * 4);
    for (uint32_t i = 0; i < dim / 2; i++)
        inv_freq[i] = powf(10000.0f, -2.0f * (float)i / (float)dim);
    for (uint32_t r = 0; r < rows; r++) {
        sequence[r] = r % 3;
        position[r] = r * 40 + random_below(40);
    }
    const float *k = qkv + heads * dim, *v = k + kv_heads * dim;
    rig->table->qk_norm_rope_kv(rig->stream,
                                &(struct qk_args){qkv, k, v, stride, stride, stride, q_weight,
                                                  k_weight, inv_freq, sequence, position, w.kv,
                                                  rows, heads, LAYER, 1e-6f});
    rig_run(rig);
    for (uint32_t r = 0; r < rows; r++)
        for (uint32_t h = 0; h < heads + kv_heads; h++) {
            const float *x = before + r * stride + h * dim,
                        *weight = h < heads ? q_weight : k_weight;
            double norm = norm_of(x, weight, dim), scale;
            for (uint32_t i = 0; i < dim; i++) {
                double want = turned(x, weight, norm, inv_freq, position[r], dim, i, &scale);
                if (h < heads) {
                    near(rig, qkv[r * stride + h * dim + i], want, scale, tolerance_row(rig));
                    continue;
                }
                const uint8_t *row = kv_at(&w, LAYER, sequence[r], position[r], 0, h - heads);
                near(rig, kv_get(&w, row, i), want, scale, tolerance_act(rig));
                row = kv_at(&w, LAYER, sequence[r], position[r], 1, h - heads);
                float value = quantize(rig->dtype, x[kv_heads * dim + i]);
                assert_true(kv_get(&w, row, i) == value);
            }
        }
    rig_clear(rig);
}

static void qk_all(struct rig *rig)
{
    static const uint32_t dims[] = {2, 16, 40, 64, 128};
    for (size_t i = 0; i < ARRAY_COUNT(dims); i++)
        for (uint32_t rows = 0; rows < 8; rows += rows ? 3 : 1)
            for (int norms = 0; norms < 2; norms++)
                qk_case(rig, dims[i], 1 + rows % 2, 1u << (i % 4), norms, rows);
}

static void test_kernels_qk_norm_rope_kv_matches_double(void **state)
{
    (void)state;
    rig_each("qk_norm_rope_kv", qk_all);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_kernels_qk_norm_rope_kv_matches_double),
        cmocka_unit_test(test_kernels_attention_matches_double),
        cmocka_unit_test(test_kernels_attention_bits_do_not_depend_on_the_chunk),
        cmocka_unit_test(test_kernels_attention_of_shared_pages_is_that_of_each_row),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
