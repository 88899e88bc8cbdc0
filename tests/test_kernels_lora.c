// SPDX-License-Identifier: Apache-2.0
// LoRA at true rank: mixed ranks, base rows among adapter rows, absent modules, slices over
// scattered pages with everything else poisoned; embed_tokens by token, lm_head with B^T cut.
#include "tests/test_kernels_adapters.h"

static uint32_t layer_of(const struct adapters *l, enum lora_module module)
{
    return module < LORA_MODULES ? 1 : l->layers;
}

static void hidden_check(struct rig *rig, const struct adapters *l, const float *x, uint32_t rows,
                         uint32_t d_in, const float *hidden, enum lora_module module)
{
    for (uint32_t r = 0; r < rows; r++) {
        const struct plain_pair *p = adapters_pair(l, r, layer_of(l, module), module, 0);
        uint32_t rank = p ? p->rank : 0;
        for (uint32_t j = 0; j < rank; j++) {
            double want = 0, scale = 0;
            for (uint32_t i = 0; i < d_in; i++) {
                want += (double)x[r * d_in + i] * (double)p->a[j * d_in + i];
                scale += fabs((double)x[r * d_in + i] * (double)p->a[j * d_in + i]);
            }
            near(rig, hidden[r * l->batch.rank_max + j], want, scale, tolerance_sum(rig));
        }
        for (uint32_t j = rank; j < l->batch.rank_max; j++)
            assert_true(isnan(hidden[r * l->batch.rank_max + j])); // true rank: not touched
    }
}

static void expand_check(struct rig *rig, const struct adapters *l, const float *hidden,
                         const float *before, const float *y, uint32_t rows, uint32_t d_out,
                         uint32_t stride, enum lora_module module, int half)
{
    for (uint32_t r = 0; r < rows; r++) {
        const struct plain_pair *p = adapters_pair(l, r, layer_of(l, module), module, 0);
        for (uint32_t c = 0; c < d_out; c++) {
            size_t at = r * stride + (half < 0 ? c : tile_interleaved_row(c, (size_t)half));
            double want = (double)before[at], scale = fabs(want);
            for (uint32_t j = 0; p && j < p->rank; j++) {
                double term = (double)p->scale * (double)hidden[r * l->batch.rank_max + j] *
                              (double)p->b[j * d_out + c];
                want += term;
                scale += fabs(term);
            }
            near(rig, y[at], want, scale, tolerance_sum(rig));
        }
    }
}

static void lora_case(struct rig *rig, uint32_t d_in, uint32_t d_out, uint32_t rows,
                      enum lora_module module, int half)
{
    static const uint32_t ranks[] = {8, 0, 64, 1, 3, 16};
    struct adapters l;
    adapters_make(&l, rig, ranks, ARRAY_COUNT(ranks), 2, 1, d_in, d_out, 8192);
    adapters_batch(&l, rows);
    float *x, *hidden = rig_poison(rig, (size_t)rows * l.batch.rank_max);
    void *act = rig_act(rig, rows, d_in, &x);
    uint32_t stride = (half < 0 ? d_out : (uint32_t)tile_interleaved_rows(d_out)) + 3;
    float *y = rig_floats(rig, (size_t)rows * stride),
          *before = rig_alloc(rig, (size_t)rows * stride * 4);
    memcpy(before, y, (size_t)rows * stride * sizeof(float));
    uint32_t layer = layer_of(&l, module);
    // Before them, others of the same unit: a backend may begin early behind two of them.
    float *aside = rig_poison(rig, (size_t)rows * l.batch.rank_max);
    for (int i = 0; i < 4; i++) // different commands, or they were launched together
        rig->table->lora_shrink(rig->stream,
                                &(struct lora_shrink_args){.batch = &l.batch,
                                                           .x = act,
                                                           .hidden = i % 2 ? aside : hidden,
                                                           .layer = layer,
                                                           .d_in = i % 2 ? d_in : d_in - 8,
                                                           .module = module});
    rig->table->lora_shrink(rig->stream, &(struct lora_shrink_args){.batch = &l.batch,
                                                                    .x = act,
                                                                    .hidden = hidden,
                                                                    .layer = layer,
                                                                    .d_in = d_in,
                                                                    .module = module});
    rig->table->lora_expand(rig->stream, &(struct lora_expand_args){.batch = &l.batch,
                                                                    .hidden = hidden,
                                                                    .y = y,
                                                                    .y_stride = stride,
                                                                    .layer = layer,
                                                                    .d_out = d_out,
                                                                    .module = module,
                                                                    .interleave_half = half});
    rig_run(rig);
    hidden_check(rig, &l, x, rows, d_in, hidden, module);
    expand_check(rig, &l, hidden, before, y, rows, d_out, stride, module, half);
    rig_clear(rig);
}

static void lora_all(struct rig *rig)
{
    static const uint32_t shapes[][2] = {{40, 96}, {96, 40}, {200, 72}, {24, 1030}, {520, 24}};
    static const uint32_t rows[] = {1, 2, 7, 33, 70};
    for (size_t i = 0; i < ARRAY_COUNT(shapes); i++)
        for (size_t r = 0; r < ARRAY_COUNT(rows); r++)
            for (int half = -1; half < 2; half++)
                lora_case(rig, shapes[i][0], shapes[i][1], rows[r],
                          half < 0 ? LORA_Q
                          : half   ? LORA_UP
                                   : LORA_GATE,
                          half);
}

static void test_kernels_lora_matches_double(void **state)
{
    (void)state;
    rig_each("lora", lora_all);
}

// Vocabularies of one block, of whole blocks and of a rest, in either type.
static void head_all(struct rig *rig)
{
    static const uint32_t shapes[][2] = {{40, 96}, {24, 1024}, {72, 4096}, {136, 5000}};
    static const uint32_t rows[] = {1, 7, 70};
    for (size_t i = 0; i < ARRAY_COUNT(shapes); i++)
        for (size_t r = 0; r < ARRAY_COUNT(rows); r++)
            lora_case(rig, shapes[i][0], shapes[i][1], rows[r], LORA_HEAD, -1);
}

static void test_kernels_lora_of_lm_head(void **state)
{
    (void)state;
    rig_each("lora of lm_head", head_all);
}

static void gather_check(struct rig *rig, const struct adapters *l, const int32_t *token,
                         uint32_t vocab, const float *hidden)
{
    for (uint32_t r = 0; r < l->batch.rows; r++) {
        const struct plain_pair *p = adapters_pair(l, r, l->layers, LORA_EMBED, 0);
        bool known = token[r] >= 0 && (uint32_t)token[r] < vocab;
        uint32_t rank = p ? p->rank : 0;
        for (uint32_t j = 0; j < rank; j++) {
            double want = known ? (double)p->a[j * vocab + (uint32_t)token[r]] : 0;
            near(rig, hidden[r * l->batch.rank_max + j], want, 0, 0); // the bits of A
        }
        for (uint32_t j = rank; j < l->batch.rank_max; j++)
            assert_true(isnan(hidden[r * l->batch.rank_max + j]));
    }
}

static void gather_case(struct rig *rig, uint32_t vocab, uint32_t dim, uint32_t rows)
{
    static const uint32_t ranks[] = {8, 0, 33, 1, 3, 64};
    struct adapters l;
    adapters_make(&l, rig, ranks, ARRAY_COUNT(ranks), 2, 1, vocab, dim, 8192);
    adapters_batch(&l, rows);
    float *hidden = rig_poison(rig, (size_t)rows * l.batch.rank_max);
    float *y = rig_floats(rig, (size_t)rows * dim),
          *before = rig_alloc(rig, (size_t)rows * dim * sizeof(float));
    memcpy(before, y, (size_t)rows * dim * sizeof(float));
    int32_t *token = rig_alloc(rig, rows * sizeof *token);
    for (uint32_t r = 0; r < rows; r++)
        token[r] =
            random_below(9) == 0 ? (r % 2 ? -1 : (int32_t)vocab) : (int32_t)random_below(vocab);
    rig->table->lora_gather(rig->stream, &(struct lora_gather_args){.batch = &l.batch,
                                                                    .token = token,
                                                                    .hidden = hidden,
                                                                    .layer = l.layers,
                                                                    .vocab = vocab,
                                                                    .module = LORA_EMBED});
    rig->table->lora_expand(rig->stream, &(struct lora_expand_args){.batch = &l.batch,
                                                                    .hidden = hidden,
                                                                    .y = y,
                                                                    .y_stride = dim,
                                                                    .layer = l.layers,
                                                                    .d_out = dim,
                                                                    .module = LORA_EMBED,
                                                                    .interleave_half = -1});
    rig_run(rig);
    gather_check(rig, &l, token, vocab, hidden);
    expand_check(rig, &l, hidden, before, y, rows, dim, dim, LORA_EMBED, -1);
    rig_clear(rig);
}

static void gather_all(struct rig *rig)
{
    static const uint32_t shapes[][2] = {{1, 40}, {97, 64}, {1000, 24}, {601, 200}};
    static const uint32_t rows[] = {1, 7, 70};
    for (size_t i = 0; i < ARRAY_COUNT(shapes); i++)
        for (size_t r = 0; r < ARRAY_COUNT(rows); r++)
            gather_case(rig, shapes[i][0], shapes[i][1], rows[r]);
}

static void test_kernels_lora_of_embeddings(void **state)
{
    (void)state;
    rig_each("lora of embeddings", gather_all);
}

// Each row alone gives the bits it has in the batch.
static void lora_bits_of(struct rig *rig, enum lora_module module)
{
    enum { ROWS = 45, IN = 136, OUT = 2600 };
    static const uint32_t ranks[] = {8, 33, 1};
    struct adapters l;
    float *x;
    adapters_make(&l, rig, ranks, ARRAY_COUNT(ranks), 2, 1, IN, OUT, 16384);
    uint32_t layer = layer_of(&l, module);
    adapters_batch(&l, ROWS);
    const uint8_t *act = rig_act(rig, ROWS, IN, &x);
    float *hidden = rig_poison(rig, ROWS * l.batch.rank_max), *y = rig_alloc(rig, ROWS * OUT * 4);
    float *hidden1 = rig_poison(rig, l.batch.rank_max), *y1 = rig_alloc(rig, OUT * 4);
    rig->table->lora_shrink(rig->stream,
                            &(struct lora_shrink_args){&l.batch, act, hidden, layer, IN, module});
    rig->table->lora_expand(
        rig->stream, &(struct lora_expand_args){&l.batch, hidden, y, OUT, layer, OUT, module, -1});
    rig_run(rig);
    uint32_t *begin = rig_alloc(rig, 8), *adapter = rig_alloc(rig, 4);
    begin[1] = 1;
    for (uint32_t r = 0; r < ROWS; r++) {
        *adapter = adapters_of(&l, r);
        struct lora_batch one = l.batch;
        one.segments = 1;
        one.row_begin = begin;
        one.rows = begin[1];
        one.adapter = adapter;
        memset(y1, 0, OUT * sizeof(float));
        const void *x1 = act + r * rig->table->act_bytes(rig->device, 1, IN);
        rig->table->lora_shrink(rig->stream,
                                &(struct lora_shrink_args){&one, x1, hidden1, layer, IN, module});
        rig->table->lora_expand(rig->stream, &(struct lora_expand_args){&one, hidden1, y1, OUT,
                                                                        layer, OUT, module, -1});
        rig_run(rig);
        assert_memory_equal(y1, y + r * OUT, OUT * sizeof(float));
    }
    rig_clear(rig);
}

static void lora_bits(struct rig *rig)
{
    lora_bits_of(rig, LORA_K);
    lora_bits_of(rig, LORA_HEAD);
}

static void test_kernels_lora_bits_do_not_depend_on_the_batch(void **state)
{
    (void)state;
    rig_each("lora bits", lora_bits);
}

static void lora_none(struct rig *rig)
{
    struct lora_batch empty = {.segments = 0, .rank_max = 8};
    float y = 1, hidden = 2;
    rig->table->lora_shrink(rig->stream,
                            &(struct lora_shrink_args){&empty, &y, &hidden, 0, 1, LORA_Q});
    rig->table->lora_expand(rig->stream,
                            &(struct lora_expand_args){&empty, &hidden, &y, 1, 0, 1, LORA_Q, -1});
    rig_run(rig);
    assert_true(y >= 1 && y <= 1 && hidden >= 2 && hidden <= 2);
}

static void test_kernels_lora_of_nobody_does_nothing(void **state)
{
    (void)state;
    rig_each("lora of nobody", lora_none);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_kernels_lora_matches_double),
        cmocka_unit_test(test_kernels_lora_of_lm_head),
        cmocka_unit_test(test_kernels_lora_of_embeddings),
        cmocka_unit_test(test_kernels_lora_bits_do_not_depend_on_the_batch),
        cmocka_unit_test(test_kernels_lora_of_nobody_does_nothing),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
