// SPDX-License-Identifier: Apache-2.0
// gemm, embed, gather, scatter, copy, zero, rmsnorm and swiglu against double precision.
#include "tests/test_kernels_rig.h"

static void gemm_case(struct rig *rig, uint32_t rows, uint32_t n, uint32_t k, bool add)
{
    float *x, *w = rig_weight(rig, n, k);
    void *act = rig_act(rig, rows, k, &x), *tiles = rig_dense(rig, w, n, k);
    uint32_t stride = n + 3;
    float *y = rig_poison(rig, (size_t)rows * stride), *before = rig_floats(rig, (size_t)rows * n);
    for (size_t r = 0; add && r < rows; r++)
        memcpy(y + r * stride, before + r * n, n * sizeof(float));
    rig->table->gemm(rig->stream, &(struct gemm_args){.x = act,
                                                      .weight = tiles,
                                                      .y = y,
                                                      .y_stride = stride,
                                                      .rows = rows,
                                                      .n = n,
                                                      .k = k,
                                                      .add = add});
    rig_run(rig);
    for (size_t r = 0; r < rows; r++) {
        for (size_t j = 0; j < n; j++) {
            double sum = add ? (double)before[r * n + j] : 0, scale = fabs(sum);
            for (size_t i = 0; i < k; i++) {
                double product = (double)x[r * k + i] * (double)w[j * k + i];
                sum += product;
                scale += fabs(product);
            }
            near(rig, y[r * stride + j], sum, scale, tolerance_sum(rig));
        }
        assert_true(isnan(y[r * stride + n])); // nothing behind the row was touched
    }
    rig_clear(rig);
}

static void gemm_all(struct rig *rig)
{
    static const uint32_t shapes[][2] = {{40, 96},  {96, 40},   {200, 200}, {1, 1},
                                         {64, 64},  {24, 72},   {130, 33},  {257, 300},
                                         {8, 1000}, {500, 130}, {16, 2048}, {200, 1100}};
    static const uint32_t rows[] = {0, 1, 2, 3, 4, 5, 6, 7, 13, 17, 48, 96, 97};
    for (size_t i = 0; i < ARRAY_COUNT(shapes); i++)
        for (size_t r = 0; r < ARRAY_COUNT(rows); r++)
            gemm_case(rig, rows[r], shapes[i][0], shapes[i][1], (i + r) % 3 == 0);
    gemm_case(rig, 9, 300, 4000, true); // k in many parts
    gemm_case(rig, 33, 130, 2100, false);
    gemm_case(rig, 64, 257, 1000, true);
    gemm_case(rig, 20, 36000, 70, true); // more pieces of n than places for them
}

static void test_kernels_gemm_matches_double(void **state)
{
    (void)state;
    rig_each("gemm", gemm_all);
}

static void gemm_bits(struct rig *rig)
{
    enum { ROWS = 197, N = 150, K = 264 };
    if (!rig->exact)
        return;
    float *x, *w = rig_weight(rig, N, K);
    const uint8_t *act = rig_act(rig, ROWS, K, &x);
    void *tiles = rig_dense(rig, w, N, K);
    float *all = rig_poison(rig, ROWS * N), *part = rig_poison(rig, ROWS * N);
    size_t row_bytes = rig->table->act_bytes(rig->device, 1, K);
    struct gemm_args a = {act, tiles, all, N, ROWS, N, K, false};
    rig->table->gemm(rig->stream, &a);
    for (uint32_t first = 0, n; first < ROWS; first += n) {
        n = 1 + random_below(ROWS - first < 12 ? ROWS - first : 12);
        a = (struct gemm_args){act + first * row_bytes, tiles, part + first * N, N, n, N, K, false};
        rig->table->gemm(rig->stream, &a);
        if (random_below(2))
            rig_run(rig);
    }
    rig_run(rig);
    assert_memory_equal(all, part, ROWS * N * sizeof(float));
    rig_clear(rig);
}

static void test_kernels_gemm_bits_do_not_depend_on_the_batch(void **state)
{
    (void)state;
    rig_each("gemm bits", gemm_bits);
}

static void gemm_lost_row(struct rig *rig)
{
    enum { ROWS = 7, N = 70, K = 100 };
    float *x = rig_floats(rig, ROWS * K), *weight = rig_floats(rig, K);
    void *act = rig_alloc(rig, rig->table->act_bytes(rig->device, ROWS, K));
    float *clean = rig_poison(rig, ROWS * N), *y = rig_poison(rig, ROWS * N);
    void *tiles = rig_dense(rig, rig_weight(rig, N, K), N, K);
    for (int lost = 0; lost < 2; lost++) {
        if (lost)
            x[3 * K + 50] = NAN;
        rig->table->rmsnorm(rig->stream,
                            &(struct rmsnorm_args){x, weight, act, NULL, ROWS, K, 1e-6f});
        struct gemm_args a = {act, tiles, lost ? y : clean, N, ROWS, N, K, false};
        rig->table->gemm(rig->stream, &a);
        rig_run(rig);
    }
    for (size_t r = 0; r < ROWS; r++)
        for (size_t j = 0; j < N; j++)
            if (r == 3)
                assert_true(isnan(y[r * N + j]));
            else
                assert_memory_equal(&y[r * N + j], &clean[r * N + j], sizeof(float));
    rig_clear(rig);
}

static void test_kernels_a_row_that_is_not_a_number_stays_alone(void **state)
{
    (void)state;
    rig_each("lost row", gemm_lost_row);
}

static void norm_case(struct rig *rig, uint32_t rows, uint32_t dim)
{
    float *x = rig_floats(rig, (size_t)rows * dim), *weight = rig_floats(rig, dim);
    float *out = rig_poison(rig, (size_t)rows * dim);
    size_t bytes = rig->table->act_bytes(rig->device, rows, dim);
    void *act = rig_alloc(rig, bytes);
    memset(act, 0xff, bytes);
    rig->table->rmsnorm(rig->stream, &(struct rmsnorm_args){x, weight, act, out, rows, dim, 1e-5f});
    rig_run(rig);
    for (size_t r = 0; r < rows; r++) {
        double square = 0;
        for (size_t i = 0; i < dim; i++)
            square += (double)x[r * dim + i] * (double)x[r * dim + i];
        double scale = 1 / sqrt(square / dim + 1e-5);
        for (size_t i = 0; i < dim; i++) {
            double want = (double)x[r * dim + i] * scale * (double)weight[i];
            near(rig, out[r * dim + i], want, fabs(want), tolerance_row(rig));
            float rounded = quantize(rig->dtype, out[r * dim + i]);
            float got = act_get(rig, act, dim, r, i);
            assert_memory_equal(&got, &rounded, sizeof got);
        }
    }
    assert_true(act_padding_zero(rig, act, rows, dim));
    rig_clear(rig);
}

static void norm_all(struct rig *rig)
{
    static const uint32_t dims[] = {1, 5, 16, 40, 96, 200, 2048, 7001};
    for (size_t i = 0; i < ARRAY_COUNT(dims); i++)
        for (uint32_t rows = 0; rows < 4; rows++)
            norm_case(rig, rows, dims[i]);
}

static void test_kernels_rmsnorm_matches_double(void **state)
{
    (void)state;
    rig_each("rmsnorm", norm_all);
}

static void swiglu_case(struct rig *rig, uint32_t rows, uint32_t units)
{
    uint32_t stride = (uint32_t)tile_interleaved_rows(units) + 5;
    float *gate_up = rig_floats(rig, (size_t)rows * stride);
    for (size_t i = 0; i < (size_t)rows * stride; i++)
        gate_up[i] *= i % 7 == 0 ? 40.0f : 2.0f;
    size_t bytes = rig->table->act_bytes(rig->device, rows, units);
    void *act = rig_alloc(rig, bytes);
    memset(act, 0xff, bytes);
    rig->table->swiglu(rig->stream, &(struct swiglu_args){gate_up, stride, act, rows, units});
    rig_run(rig);
    for (size_t r = 0; r < rows; r++)
        for (size_t u = 0; u < units; u++) {
            double gate = (double)gate_up[r * stride + tile_interleaved_row(u, 0)];
            double up = (double)gate_up[r * stride + tile_interleaved_row(u, 1)];
            double want = gate / (1 + exp(-gate)) * up;
            near(rig, act_get(rig, act, units, r, u), want, fabs(want) + 1e-30, tolerance_act(rig));
        }
    assert_true(act_padding_zero(rig, act, rows, units));
    rig_clear(rig);
}

static void swiglu_all(struct rig *rig)
{
    static const uint32_t units[] = {1, 8, 24, 72, 100, 768, 6200};
    for (size_t i = 0; i < ARRAY_COUNT(units); i++)
        for (uint32_t rows = 0; rows < 3; rows++)
            swiglu_case(rig, rows, units[i]);
}

static void test_kernels_swiglu_matches_double(void **state)
{
    (void)state;
    rig_each("swiglu", swiglu_all);
}

static void moves_all(struct rig *rig)
{
    enum { VOCAB = 50, DIM = 40, ROWS = 9, BIG = 700001 };
    float *table = rig_weight(rig, VOCAB, DIM), *x = rig_poison(rig, ROWS * DIM);
    float *gathered = rig_poison(rig, ROWS * DIM);
    static const int32_t some[ROWS] = {0, 49, 7, 7, -1, 50, 3, 21, 30};
    static const uint32_t those[ROWS] = {8, 7, 6, 3, 2, 1, 0, 0, 7}, where[3] = {7, 0, 3},
                          what[3] = {70, 1, 30};
    int32_t *tokens = rig_copy(rig, some, sizeof some);
    uint32_t *index = rig_copy(rig, those, sizeof those), *pages = rig_alloc(rig, 8 * 4);
    uint32_t *at = rig_copy(rig, where, sizeof where), *value = rig_copy(rig, what, sizeof what);
    if (rig->captured) // copies and scatters stand outside units
        return;
    rig->table->embed(rig->stream, &(struct embed_args){tokens, rig_narrow(rig, table, VOCAB * DIM),
                                                        x, ROWS, DIM, VOCAB});
    rig->table->gather(rig->stream, &(struct gather_args){x, index, gathered, ROWS, DIM});
    rig->table->scatter(rig->stream, &(struct scatter_args){pages, at, value, 3});
    uint8_t *from = rig_alloc(rig, BIG), *to = rig_alloc(rig, BIG + 1);
    for (size_t i = 0; i < BIG; i++)
        from[i] = (uint8_t)rng_next(&rig_rng);
    to[BIG] = 0x5a;
    rig->table->copy(rig->stream, to, from, BIG);
    rig->table->zero(rig->stream, to + 100, 300000);
    rig_run(rig);
    for (size_t r = 0; r < ROWS; r++)
        for (size_t i = 0; i < DIM; i++) {
            bool lost = tokens[r] < 0 || tokens[r] >= VOCAB; // that row only
            if (lost)
                assert_true(isnan(x[r * DIM + i]));
            else
                assert_true(x[r * DIM + i] == table[(size_t)tokens[r] * DIM + i]);
        }
    for (size_t r = 0; r < ROWS; r++)
        assert_memory_equal(gathered + r * DIM, x + index[r] * DIM, DIM * sizeof(float));
    assert_true(pages[7] == 70 && pages[0] == 1 && pages[3] == 30 && pages[1] == 0);
    for (size_t i = 0; i < BIG; i++)
        assert_int_equal(to[i], i >= 100 && i < 300100 ? 0 : from[i]);
    assert_int_equal(to[BIG], 0x5a);
    rig_clear(rig);
}

static void test_kernels_moves_move(void **state)
{
    (void)state;
    rig_each("copy zero scatter gather embed", moves_all);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_kernels_gemm_matches_double),
        cmocka_unit_test(test_kernels_gemm_bits_do_not_depend_on_the_batch),
        cmocka_unit_test(test_kernels_a_row_that_is_not_a_number_stays_alone),
        cmocka_unit_test(test_kernels_rmsnorm_matches_double),
        cmocka_unit_test(test_kernels_swiglu_matches_double),
        cmocka_unit_test(test_kernels_moves_move),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
