// SPDX-License-Identifier: Apache-2.0
// Router, map, expert GEMMs from scattered pages (all other pages poisoned), expert LoRA, combine,
// misses and resuming, against double precision.
#include "tests/test_kernels_adapters.h"

enum { LAYER = 1 };

struct moe {
    struct rig *rig;
    uint32_t experts, top_k, dim, units, rows;
    struct expert_view view;
    uint32_t *pages, *need;
    float *gate, *up, *down, *x; // exact weights [experts][..][..], operand values
    void *act;
    struct moe_work work;
    const struct adapters *lora;
    uint8_t *wanted, *used; // with lora: what the map says of parts
};

static void pages_make(struct moe *m, size_t page_bytes)
{
    struct rig *rig = m->rig;
    size_t per_page = page_bytes / TILE_BYTES;
    size_t up_tiles = tile_count(rig->dtype, tile_interleaved_rows(m->units), m->dim);
    size_t tiles = up_tiles + tile_count(rig->dtype, m->dim, m->units);
    uint32_t per = (uint32_t)div_up(tiles, per_page), used = per * m->experts, all = used * 2 + 3;
    uint8_t *arena = rig_alloc(rig, all * page_bytes), *packed = rig_alloc(rig, tiles * TILE_BYTES);
    uint32_t *numbers = rig_alloc(rig, all * sizeof *numbers);
    m->pages = rig_alloc(rig, used * sizeof *m->pages);
    memset(arena, 0xff, all * page_bytes);
    for (uint32_t i = 0; i < all; i++)
        numbers[i] = i;
    for (uint32_t i = 0; i < used; i++) {
        uint32_t j = i + random_below(all - i), page = numbers[j];
        numbers[j] = numbers[i];
        m->pages[i] = page;
    }
    size_t matrix = (size_t)m->units * m->dim;
    for (uint32_t e = 0; e < m->experts; e++) {
        memset(packed, 0, tiles * TILE_BYTES);
        int mark = rig->blocks;
        tile_pack(rig->dtype, rig_narrow(rig, m->gate + e * matrix, matrix), m->units, m->dim, 0,
                  packed);
        tile_pack(rig->dtype, rig_narrow(rig, m->up + e * matrix, matrix), m->units, m->dim, 1,
                  packed);
        tile_pack(rig->dtype, rig_narrow(rig, m->down + e * matrix, matrix), m->dim, m->units, -1,
                  packed + up_tiles * TILE_BYTES);
        while (rig->blocks > mark)
            rig_release_last(rig);
        for (size_t t = 0; t < tiles; t++)
            memcpy(arena + m->pages[e * per + t / per_page] * page_bytes +
                       t % per_page * TILE_BYTES,
                   packed + t * TILE_BYTES, TILE_BYTES);
    }
    m->view =
        (struct expert_view){arena, page_bytes, m->pages, per, m->experts, (uint32_t)up_tiles};
}

static void moe_make(struct moe *m, struct rig *rig, uint32_t experts, uint32_t top_k, uint32_t dim,
                     uint32_t units, uint32_t rows, size_t page_bytes)
{
    *m = (struct moe){
        .rig = rig, .experts = experts, .top_k = top_k, .dim = dim, .units = units, .rows = rows};
    size_t pairs = (size_t)rows * top_k, hidden;
    m->gate = rig_weight(rig, experts * units, dim);
    m->up = rig_weight(rig, experts * units, dim);
    m->down = rig_weight(rig, experts * units, dim);
    pages_make(m, page_bytes);
    m->act = rig_act(rig, rows, dim, &m->x);
    m->need = rig_alloc(rig, experts * sizeof(uint32_t));
    hidden = rig->table->act_bytes(rig->device, pairs, units);
    m->work.expert = rig_alloc(rig, pairs * sizeof(uint32_t));
    m->work.gate = rig_floats(rig, pairs);
    m->work.begin = rig_alloc(rig, (experts + 1) * sizeof(uint32_t));
    m->work.order = rig_alloc(rig, pairs * sizeof(uint32_t));
    m->work.state = rig_alloc(rig, experts);
    m->work.hidden = rig_alloc(rig, hidden);
    m->work.out = rig_poison(rig, pairs * dim);
    memset(m->work.hidden, 0xff, hidden);
    memset(m->work.state, 0x77, experts);
    for (size_t p = 0; p < pairs; p++)
        m->work.expert[p] = (uint32_t)((p % top_k + random_below(3) * top_k) % experts);
}

static void moe_record(struct moe *m, float *y, bool resume)
{
    struct rig *rig = m->rig;
    if (!m->wanted)
        m->wanted = rig_alloc(rig, (size_t)SEGMENTS_MAX * m->experts);
    struct moe_gemm_args gemm = {.work = m->work,
                                 .view = m->view,
                                 .x = m->act,
                                 .rows = m->rows,
                                 .dim = m->dim,
                                 .intermediate = m->units,
                                 .top_k = m->top_k,
                                 .layer = LAYER,
                                 .lora = m->lora ? &m->lora->batch : NULL};
    rig->table->moe_map(rig->stream, &(struct moe_map_args){.work = m->work,
                                                            .view = m->view,
                                                            .need = m->need,
                                                            .rows = m->rows,
                                                            .top_k = m->top_k,
                                                            .layer = LAYER,
                                                            .resume = resume,
                                                            .lora = gemm.lora,
                                                            .part_wanted = m->wanted,
                                                            .page_used = m->used});
    rig->table->moe_gate_up(rig->stream, &gemm);
    rig->table->moe_down(rig->stream, &gemm);
    rig->table->moe_combine(
        rig->stream,
        &(struct moe_combine_args){
            .work = m->work, .y = y, .rows = m->rows, .dim = m->dim, .top_k = m->top_k});
}

// The LoRA of one module for one row: result[cols] += scale * (x A^T) B^T, and its size.
static void plain_lora(const struct moe *m, uint32_t row, enum lora_module module, uint32_t expert,
                       const double *x, uint32_t in, double *result, double *size, uint32_t cols)
{
    const struct plain_pair *p =
        m->lora ? adapters_pair(m->lora, row, LAYER, module, expert) : NULL;
    for (uint32_t j = 0; p && j < p->rank; j++) {
        double h = 0, h_size = 0;
        for (uint32_t i = 0; i < in; i++) {
            h += x[i] * (double)p->a[j * in + i];
            h_size += fabs(x[i] * (double)p->a[j * in + i]);
        }
        for (uint32_t c = 0; c < cols; c++) {
            result[c] += (double)p->scale * h * (double)p->b[j * cols + c];
            size[c] += fabs((double)p->scale * h_size * (double)p->b[j * cols + c]);
        }
    }
}

static void plain_gemm(const float *w, const double *x, uint32_t out, uint32_t in, double *result,
                       double *size)
{
    for (uint32_t j = 0; j < out; j++) {
        result[j] = size[j] = 0;
        for (uint32_t i = 0; i < in; i++) {
            result[j] += (double)w[(size_t)j * in + i] * x[i];
            size[j] += fabs((double)w[(size_t)j * in + i] * x[i]);
        }
    }
}

enum { WIDE = 512 };

// Checks hidden of one pair, and out from the hidden that was computed (so that errors do not add
// up).
static void pair_check(struct moe *m, uint32_t pair)
{
    struct rig *rig = m->rig;
    uint32_t row = pair / m->top_k, e = m->work.expert[pair], d = m->dim, u = m->units;
    static double x[WIDE], gate[WIDE], up[WIDE], h[WIDE], out[WIDE], gate_size[WIDE], size[WIDE];
    size_t matrix = (size_t)u * d;
    for (uint32_t i = 0; i < d; i++)
        x[i] = (double)m->x[(size_t)row * d + i];
    plain_gemm(m->gate + e * matrix, x, u, d, gate, gate_size);
    plain_gemm(m->up + e * matrix, x, u, d, up, size);
    plain_lora(m, row, LORA_GATE, e, x, d, gate, gate_size, u);
    plain_lora(m, row, LORA_UP, e, x, d, up, size, u);
    for (uint32_t i = 0; i < u; i++) {
        double silu = gate[i] / (1 + exp(-gate[i])), want = silu * up[i];
        // silu' <= 1.1: an error of the gate passes on at most that much
        double slack =
            (1.1 * gate_size[i] * fabs(up[i]) + fabs(silu) * size[i]) * tolerance_sum(rig);
        float got = act_get(rig, m->work.hidden, u, pair, i);
        h[i] = (double)got;
        double rounding = tolerance_act(rig) * fabs(want);
        near(rig, got, want, (rounding + slack) / tolerance_act(rig), tolerance_act(rig));
    }
    plain_gemm(m->down + e * matrix, h, d, u, out, size);
    plain_lora(m, row, LORA_DOWN, e, h, u, out, size, d);
    for (uint32_t i = 0; i < d; i++)
        near(rig, m->work.out[(size_t)pair * d + i], out[i], size[i], tolerance_sum(rig));
}

static void combine_check(struct moe *m, const float *before, const float *y)
{
    for (uint32_t r = 0; r < m->rows; r++)
        for (uint32_t i = 0; i < m->dim; i++) {
            double want = (double)before[r * m->dim + i], size = fabs(want);
            for (uint32_t k = 0; k < m->top_k; k++) {
                size_t pair = (size_t)r * m->top_k + k;
                double term = (double)m->work.gate[pair] * (double)m->work.out[pair * m->dim + i];
                want += term;
                size += fabs(term);
            }
            near(m->rig, y[r * m->dim + i], want, size, tolerance_sum(m->rig));
        }
}

// CUDA leaves 1 until the next map says 3 (moe.h).
static bool is_done(const struct rig *rig, uint8_t state)
{
    return state == 3 || (rig->gpu && state == 1);
}

static void moe_check(struct moe *m)
{
    uint32_t pairs = m->rows * m->top_k;
    float *y = rig_floats(m->rig, (size_t)m->rows * m->dim + 1);
    float *before = rig_alloc(m->rig, ((size_t)m->rows * m->dim + 1) * sizeof(float));
    memcpy(before, y, (size_t)m->rows * m->dim * sizeof(float));
    moe_record(m, y, false);
    rig_run(m->rig);
    for (uint32_t e = 0, sum = 0; e < m->experts; e++) {
        uint32_t n = 0, last = 0;
        for (uint32_t p = 0; p < pairs; p++)
            n += m->work.expert[p] == e;
        assert_int_equal(m->need[e], n);
        assert_int_equal(m->work.begin[e], sum);
        assert_true(is_done(m->rig, m->work.state[e]) || !n);
        assert_true(m->work.state[e] == 0 || n);
        for (uint32_t i = sum; i < sum + n; i++) { // ascending within an expert
            assert_true(i == sum || m->work.order[i] > last);
            last = m->work.order[i];
            assert_int_equal(m->work.expert[last], e);
        }
        sum += n;
    }
    for (uint32_t p = 0; p < pairs; p++)
        pair_check(m, p);
    assert_true(act_padding_zero(m->rig, m->work.hidden, pairs, m->units));
    combine_check(m, before, y);
}

struct moe_shape {
    uint32_t experts, top_k, dim, units, rows;
    size_t page_bytes;
    bool one; // all rows to one expert
};

static const struct moe_shape shapes[] = {
    {4, 1, 40, 24, 0, 32768, false},    {4, 2, 40, 24, 1, 32768, false},
    {8, 2, 96, 72, 5, 32768, false},    {8, 4, 200, 24, 7, 65536, false},
    {5, 3, 96, 40, 33, 8192, false},    {6, 1, 64, 64, 130, 32768, true},
    {40, 2, 200, 72, 9, 131072, false},
};

static void moe_all(struct rig *rig)
{
    for (size_t i = 0; i < ARRAY_COUNT(shapes); i++) {
        const struct moe_shape *s = &shapes[i];
        struct moe m;
        moe_make(&m, rig, s->experts, s->top_k, s->dim, s->units, s->rows, s->page_bytes);
        for (uint32_t p = 0; s->one && p < s->rows * s->top_k; p++)
            m.work.expert[p] = 3;
        moe_check(&m);
        rig_clear(rig);
    }
}

static void test_kernels_moe_matches_double(void **state)
{
    (void)state;
    rig_each("moe", moe_all);
}

static void moe_lora_all(struct rig *rig)
{
    static const uint32_t ranks[] = {8, 0, 64, 1, 3};
    for (size_t i = 1; i < ARRAY_COUNT(shapes); i++) {
        const struct moe_shape *s = &shapes[i];
        struct moe m;
        struct adapters l;
        moe_make(&m, rig, s->experts, s->top_k, s->dim, s->units, s->rows, s->page_bytes);
        adapters_make(&l, rig, ranks, ARRAY_COUNT(ranks), 2, s->experts < 9 ? s->experts : 1,
                      s->dim, s->units, 8192);
        adapters_batch(&l, s->rows);
        m.lora = &l;
        moe_check(&m);
        rig_clear(rig);
    }
}

static void test_kernels_moe_lora_matches_double(void **state)
{
    (void)state;
    rig_each("moe lora", moe_lora_all);
}

struct bits_case {
    uint32_t rows, step, units, dim, top_k, ranks[3]; // step: every so many rows are compared
};

// A batch against the same rows alone: the same bits.
static void moe_bits_case(struct rig *rig, const struct bits_case *c)
{
    struct moe m;
    struct adapters l;
    size_t bytes = c->dim * sizeof(float);
    moe_make(&m, rig, 4, c->top_k, c->dim, c->units, c->rows, 32768);
    adapters_make(&l, rig, c->ranks, ARRAY_COUNT(c->ranks), 2, 4, c->dim, c->units,
                  c->units > 40 ? 32768 : 8192);
    adapters_batch(&l, c->rows);
    m.lora = &l;
    float *y = rig_alloc(rig, c->rows * bytes), *y1 = rig_alloc(rig, bytes);
    moe_record(&m, y, false);
    rig_run(rig);
    struct moe one = m;
    struct adapters alone = l;
    one.lora = &alone;
    alone.row_begin = rig_alloc(rig, 8);
    alone.adapter = rig_alloc(rig, 4);
    one.rows = 1;
    one.work.out = rig_poison(rig, c->top_k * c->dim);
    one.work.hidden = rig_alloc(rig, rig->table->act_bytes(rig->device, c->top_k, c->units));
    for (uint32_t r = 0; r < c->rows; r += c->step) {
        one.act = (uint8_t *)m.act + r * rig->table->act_bytes(rig->device, 1, c->dim);
        one.work.expert = m.work.expert + r * c->top_k;
        one.work.gate = m.work.gate + r * c->top_k;
        alone.batch.row_begin = alone.row_begin;
        alone.batch.rows = 1;
        alone.batch.adapter = alone.adapter;
        alone.row_begin[0] = 0;
        alone.row_begin[1] = 1;
        alone.adapter[0] = adapters_of(&l, r);
        alone.batch.segments = 1;
        memset(y1, 0, bytes);
        moe_record(&one, y1, false);
        rig_run(rig);
        assert_memory_equal(y1, y + r * c->dim, bytes);
    }
    rig_clear(rig);
}

static void moe_bits(struct rig *rig)
{
    // The latter two have more pairs than the CPU keeps rows for, and more than it keeps A x for.
    static const struct bits_case cases[] = {{120, 1, 40, 96, 2, {8, 64, 3}},
                                             {1030, 41, 512, 24, 4, {8, 64, 3}},
                                             {1030, 41, 512, 24, 4, {8, 512, 3}}};
    for (size_t i = 0; rig->exact && i < ARRAY_COUNT(cases); i++)
        moe_bits_case(rig, &cases[i]);
}

static void test_kernels_moe_bits_do_not_depend_on_the_batch(void **state)
{
    (void)state;
    rig_each("moe bits", moe_bits);
}

// Some experts are missing: the others are done, nothing is combined, nothing after runs; then the
// pages come, in two steps, and the result has the bits of a run without misses.
static void moe_miss(struct rig *rig)
{
    enum { ROWS = 20, DIM = 96, PAIRS = ROWS * 2 };
    struct moe m;
    moe_make(&m, rig, 8, 2, DIM, 40, ROWS, 32768);
    for (uint32_t p = 0; p < PAIRS; p++)
        m.work.expert[p] = p % 6; // 6 and 7 have no pairs
    float *y = rig_alloc(rig, ROWS * DIM * 4), *want = rig_alloc(rig, ROWS * DIM * 4);
    moe_record(&m, want, false);
    rig_run(rig);
    for (uint32_t i = 0; i < PAIRS * DIM; i++)
        m.work.out[i] = NAN;
    uint32_t per = m.view.pages_per_expert, at[3] = {2 * per + 1, 4 * per, 7 * per};
    uint32_t kept[3];
    for (int i = 0; i < 3; i++) {
        kept[i] = m.pages[at[i]];
        m.pages[at[i]] = PAGE_NONE; // expert 7 is missing too, but nobody needs it
    }
    float *after = rig_alloc(rig, 4), *zero = rig_alloc(rig, 4);
    uint32_t *first = rig_alloc(rig, 4);
    *after = 1;
    struct segment_result result;
    for (int step = 0; step < 3; step++) {
        moe_record(&m, y, step > 0);
        rig->table->gather(rig->stream, &(struct gather_args){zero, first, after, 1, 1});
        assert_int_equal(rig->table->submit(rig->stream), STATUS_OK);
        assert_int_equal(rig->table->wait(rig->stream, &result), STATUS_OK);
        rig_unit(rig);
        assert_int_equal(result.missed, step < 2);
        for (uint32_t e = 0; e < 8; e++) {
            bool missing = (e == 2 && step < 1) || (e == 4 && step < 2);
            if (e > 5 || missing)
                assert_int_equal(m.work.state[e], e > 5 ? 0 : 2);
            else
                assert_true(is_done(rig, m.work.state[e]));
        }
        if (step < 2) {
            assert_int_equal(result.miss_layer, LAYER);
            assert_true(*after >= 1); // what comes after did not run
            for (uint32_t i = 0; i < ROWS * DIM; i++)
                assert_true(y[i] >= 0 && y[i] <= 0);
            m.pages[at[step]] = kept[step];
        }
        if (step == 0) // what is done stays done: from now on its pages may go
            for (uint32_t i = 0; i < per; i++)
                m.pages[i] = PAGE_NONE;
    }
    assert_true(*after <= 0);
    assert_memory_equal(y, want, ROWS * DIM * 4);
    rig_clear(rig);
}

static void test_kernels_moe_miss_is_resumed_with_the_same_bits(void **state)
{
    (void)state;
    rig_each("moe miss", moe_miss);
}

// A pair's adapter lacks a page of its part: its expert waits though it is there itself, and says
// which adapters need what for it; with the page the result has the bits of a run without misses.
static void parts_miss(struct rig *rig)
{
    enum { ROWS = 24, DIM = 96, UNITS = 40, PAIRS = ROWS * 2, EXPERTS = 4 };
    static const uint32_t ranks[] = {64, 32};
    struct moe m;
    struct adapters l;
    moe_make(&m, rig, EXPERTS, 2, DIM, UNITS, ROWS, 32768);
    adapters_make(&l, rig, ranks, 2, 2, EXPERTS, DIM, UNITS, 8192);
    adapters_parts(&l);
    for (uint32_t i = 0; i <= 3; i++) // rows of adapter 0, of the base, of adapter 1
        l.row_begin[i] = i * (ROWS / 3);
    l.adapter[0] = 0;
    l.adapter[1] = 0xffffffff;
    l.adapter[2] = 1;
    l.batch.segments = 3;
    l.batch.rows = ROWS;
    for (uint32_t p = 0; p < PAIRS; p++)
        m.work.expert[p] = p % 2 + (p / 2 % 2) * 2;
    m.lora = &l;
    m.wanted = rig_alloc(rig, SEGMENTS_MAX * EXPERTS);
    m.used = rig_alloc(rig, 4096);
    float *y = rig_alloc(rig, ROWS * DIM * 4), *want = rig_alloc(rig, ROWS * DIM * 4);
    moe_record(&m, want, false);
    rig_run(rig);
    struct lora_part part = l.view[0].parts[LAYER * EXPERTS + 1];
    uint32_t *slot = (uint32_t *)l.view[0].pages + part.first + part.count - 1, page = *slot;
    assert_true(part.count && m.used[page] && m.used[l.view[0].pages[part.first]]);
    for (uint32_t i = 0; i < SEGMENTS_MAX * EXPERTS; i++)
        assert_int_equal(m.wanted[i], 0);
    *slot = PAGE_NONE;
    memset(m.used, 0, 4096);
    struct segment_result result;
    for (int step = 0; step < 2; step++) {
        moe_record(&m, y, step > 0);
        assert_int_equal(rig->table->submit(rig->stream), STATUS_OK);
        assert_int_equal(rig->table->wait(rig->stream, &result), STATUS_OK);
        rig_unit(rig);
        assert_int_equal(result.missed, step == 0);
        assert_int_equal(m.used[page], step);
        for (uint32_t e = 0; e < EXPERTS; e++) {
            // Parts follow each other: the page may be another expert's too.
            struct lora_part other = l.view[0].parts[LAYER * EXPERTS + e];
            bool waits = !step && &l.view[0].pages[other.first] <= slot &&
                         slot < &l.view[0].pages[other.first] + other.count;
            assert_true(waits ? m.work.state[e] == 2 : is_done(rig, m.work.state[e]));
            assert_true(waits || e != 1 || step);
            for (uint32_t s = 0; s < 3; s++)
                assert_int_equal(m.wanted[s * EXPERTS + e],
                                 waits && s != 1 && l.view[s / 2].parts[LAYER * EXPERTS + e].count);
        }
        *slot = page;
        memset(m.wanted, 0, SEGMENTS_MAX * EXPERTS);
    }
    assert_memory_equal(y, want, ROWS * DIM * 4);
    rig_clear(rig);
}

static void test_kernels_moe_waits_for_parts_of_adapters(void **state)
{
    (void)state;
    rig_each("moe parts", parts_miss);
}

static void router_case(struct rig *rig, uint32_t rows, uint32_t dim, uint32_t experts,
                        uint32_t top_k, bool normalize)
{
    float *x = rig_floats(rig, (size_t)rows * dim + 1), *w = rig_floats(rig, (size_t)experts * dim);
    uint32_t *expert = rig_alloc(rig, (size_t)rows * top_k * 4 + 4);
    float *gate = rig_poison(rig, (size_t)rows * top_k + 1);
    if (experts > 3) // a tie
        memcpy(w + 3 * dim, w + dim, dim * sizeof(float));
    if (rows > 2)
        x[2 * dim] = NAN;
    rig->table->router(rig->stream, &(struct router_args){x, w, expert, gate, rows, dim, experts,
                                                          top_k, normalize});
    rig_run(rig);
    static double logit[WIDE], p[WIDE];
    for (uint32_t r = 0; r < rows; r++) {
        double max = -INFINITY, sum = 0, kept = 0;
        if (r == 2) {
            for (uint32_t k = 0; k < top_k; k++)
                assert_true(expert[r * top_k + k] == k && isnan(gate[r * top_k + k]));
            continue;
        }
        for (uint32_t e = 0; e < experts; e++) {
            logit[e] = 0;
            for (uint32_t i = 0; i < dim; i++)
                logit[e] += (double)x[r * dim + i] * (double)w[e * dim + i];
            max = fmax(max, logit[e]);
        }
        for (uint32_t e = 0; e < experts; e++)
            sum += p[e] = exp(logit[e] - max);
        for (uint32_t k = 0; k < top_k; k++)
            kept += p[expert[r * top_k + k]];
        for (uint32_t k = 0; k < top_k; k++) {
            uint32_t e = expert[r * top_k + k];
            double want = p[e] / (normalize ? kept : sum);
            near(rig, gate[r * top_k + k], want, want, 1e-4); // exp of logits of size about 10
            uint32_t better = 0;
            for (uint32_t o = 0; o < experts; o++)
                better += logit[o] > logit[e] + 1e-4;
            assert_true(better <= k);
            assert_true(k == 0 || logit[e] <= logit[expert[r * top_k + k - 1]] + 1e-4);
            for (uint32_t j = 0; j < k; j++)
                assert_true(expert[r * top_k + j] != e);
            if (e == 3 && experts > 3) { // the lower index came first
                bool first = false;
                for (uint32_t j = 0; j < k; j++)
                    first |= expert[r * top_k + j] == 1;
                assert_true(first);
            }
        }
    }
    rig_clear(rig);
}

static void router_all(struct rig *rig)
{
    static const uint32_t cases[][4] = {{0, 40, 8, 2},   {1, 40, 8, 8},    {3, 1, 5, 1},
                                        {5, 200, 32, 4}, {17, 200, 33, 4}, {16, 256, 128, 8},
                                        {40, 96, 512, 3}};
    for (size_t i = 0; i < ARRAY_COUNT(cases); i++)
        router_case(rig, cases[i][0], cases[i][1], cases[i][2], cases[i][3], i % 2);
}

static void test_kernels_router_matches_double(void **state)
{
    (void)state;
    rig_each("router", router_all);
}

static void router_bits(struct rig *rig)
{
    enum { ROWS = 50, DIM = 200, EXPERTS = 40, TOP = 4 };
    float *x = rig_floats(rig, ROWS * DIM), *w = rig_floats(rig, EXPERTS * DIM);
    uint32_t *expert = rig_alloc(rig, ROWS * TOP * 4), *expert1 = rig_alloc(rig, TOP * 4);
    float *gate = rig_poison(rig, ROWS * TOP), *gate1 = rig_poison(rig, TOP);
    rig->table->router(rig->stream,
                       &(struct router_args){x, w, expert, gate, ROWS, DIM, EXPERTS, TOP, true});
    rig_run(rig);
    for (uint32_t r = 0; r < ROWS; r++) {
        rig->table->router(rig->stream, &(struct router_args){x + r * DIM, w, expert1, gate1, 1,
                                                              DIM, EXPERTS, TOP, true});
        rig_run(rig);
        assert_memory_equal(expert1, expert + r * TOP, TOP * 4);
        assert_memory_equal(gate1, gate + r * TOP, TOP * 4);
    }
    rig_clear(rig);
}

static void test_kernels_router_bits_do_not_depend_on_the_batch(void **state)
{
    (void)state;
    rig_each("router bits", router_bits);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_kernels_router_matches_double),
        cmocka_unit_test(test_kernels_router_bits_do_not_depend_on_the_batch),
        cmocka_unit_test(test_kernels_moe_matches_double),
        cmocka_unit_test(test_kernels_moe_lora_matches_double),
        cmocka_unit_test(test_kernels_moe_bits_do_not_depend_on_the_batch),
        cmocka_unit_test(test_kernels_moe_miss_is_resumed_with_the_same_bits),
        cmocka_unit_test(test_kernels_moe_waits_for_parts_of_adapters),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
