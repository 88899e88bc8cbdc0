// SPDX-License-Identifier: Apache-2.0
// LoRA at true rank: mixed ranks, base rows among adapter rows, absent modules, slices over
// scattered pages with everything else poisoned.
#include "tests/test_kernels_adapters.h"

static void hidden_check(struct rig *rig, const struct adapters *l, const float *x, uint32_t rows,
                         uint32_t d_in, const float *hidden, enum lora_module module)
{
    for (uint32_t r = 0; r < rows; r++) {
        const struct plain_pair *p = adapters_pair(l, r, 1, module, 0);
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
        const struct plain_pair *p = adapters_pair(l, r, 1, module, 0);
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

static void lora_case(struct rig *rig, uint32_t d_in, uint32_t d_out, uint32_t rows, int half)
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
    enum lora_module module = half < 0 ? LORA_Q : half ? LORA_UP : LORA_GATE;
    // Before them, others of the same unit: a backend may begin early behind two of them.
    float *aside = rig_poison(rig, (size_t)rows * l.batch.rank_max);
    for (int i = 0; i < 4; i++) // different commands, or they were launched together
        rig->table->lora_shrink(rig->stream,
                                &(struct lora_shrink_args){.batch = &l.batch,
                                                           .x = act,
                                                           .hidden = i % 2 ? aside : hidden,
                                                           .layer = 1,
                                                           .d_in = i % 2 ? d_in : d_in - 8,
                                                           .module = module});
    rig->table->lora_shrink(rig->stream, &(struct lora_shrink_args){.batch = &l.batch,
                                                                    .x = act,
                                                                    .hidden = hidden,
                                                                    .layer = 1,
                                                                    .d_in = d_in,
                                                                    .module = module});
    rig->table->lora_expand(rig->stream, &(struct lora_expand_args){.batch = &l.batch,
                                                                    .hidden = hidden,
                                                                    .y = y,
                                                                    .y_stride = stride,
                                                                    .layer = 1,
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
                lora_case(rig, shapes[i][0], shapes[i][1], rows[r], half);
}

static void test_kernels_lora_matches_double(void **state)
{
    (void)state;
    rig_each("lora", lora_all);
}

// Each row alone gives the bits it has in the batch.
static void lora_bits(struct rig *rig)
{
    enum { ROWS = 45, IN = 136, OUT = 600 };
    static const uint32_t ranks[] = {8, 33, 1};
    struct adapters l;
    float *x;
    adapters_make(&l, rig, ranks, ARRAY_COUNT(ranks), 2, 1, IN, OUT, 8192);
    adapters_batch(&l, ROWS);
    const uint8_t *act = rig_act(rig, ROWS, IN, &x);
    float *hidden = rig_poison(rig, ROWS * l.batch.rank_max), *y = rig_alloc(rig, ROWS * OUT * 4);
    float *hidden1 = rig_poison(rig, l.batch.rank_max), *y1 = rig_alloc(rig, OUT * 4);
    rig->table->lora_shrink(rig->stream,
                            &(struct lora_shrink_args){&l.batch, act, hidden, 1, IN, LORA_K});
    rig->table->lora_expand(
        rig->stream, &(struct lora_expand_args){&l.batch, hidden, y, OUT, 1, OUT, LORA_K, -1});
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
                                &(struct lora_shrink_args){&one, x1, hidden1, 1, IN, LORA_K});
        rig->table->lora_expand(
            rig->stream, &(struct lora_expand_args){&one, hidden1, y1, OUT, 1, OUT, LORA_K, -1});
        rig_run(rig);
        assert_memory_equal(y1, y + r * OUT, OUT * sizeof(float));
    }
    rig_clear(rig);
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
        cmocka_unit_test(test_kernels_lora_bits_do_not_depend_on_the_batch),
        cmocka_unit_test(test_kernels_lora_of_nobody_does_nothing),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
