// SPDX-License-Identifier: Apache-2.0
// Sampling against a full sort in double precision. A draw is accepted when the uniform number lies
// in the token's interval, give or take what fp32 exponentials may move its ends.
#include "tests/test_kernels_rig.h"

struct plain {
    uint32_t vocab, *order; // ids in descending order
    double *p;              // by place in the order, truncated and normalised
    uint32_t kept;
    double log_sum, max;
};

static const float *sort_logits;

static int order_compare(const void *a, const void *b)
{
    uint32_t i = *(const uint32_t *)a, j = *(const uint32_t *)b;
    if (sort_logits[i] > sort_logits[j] || sort_logits[i] < sort_logits[j])
        return sort_logits[i] > sort_logits[j] ? -1 : 1;
    return i < j ? -1 : 1;
}

static void plain_make(struct plain *s, const float *logits, uint32_t vocab,
                       const struct sample_params *p)
{
    *s = (struct plain){.vocab = vocab};
    s->order = malloc(vocab * sizeof *s->order);
    s->p = malloc(vocab * sizeof *s->p);
    for (uint32_t i = 0; i < vocab; i++)
        s->order[i] = i;
    sort_logits = logits;
    qsort(s->order, vocab, sizeof *s->order, order_compare);
    s->max = (double)logits[s->order[0]];
    double sum = 0, all = 0, kept = 0,
           temperature = p->temperature > 0 ? (double)p->temperature : 1;
    uint32_t k = p->top_k && p->top_k < vocab ? p->top_k : vocab;
    for (uint32_t i = 0; i < vocab; i++)
        s->log_sum += exp((double)logits[s->order[i]] - s->max);
    s->log_sum = log(s->log_sum);
    for (uint32_t i = 0; i < vocab; i++) {
        s->p[i] = exp(((double)logits[s->order[i]] - s->max) / temperature);
        sum += i < k ? s->p[i] : 0;
    }
    for (s->kept = 0; s->kept < k; s->kept++) {
        if (s->kept && kept >= (double)p->top_p * sum)
            break;
        kept += s->p[s->kept];
    }
    for (uint32_t i = 0; i < s->kept; i++)
        all += s->p[i];
    for (uint32_t i = 0; i < vocab; i++)
        s->p[i] /= all;
}

static void plain_free(struct plain *s)
{
    free(s->order);
    free(s->p);
}

// The token may be one whose interval holds u within `slack`, of the kept ones or one beside the
// edge.
static void draw_check(const struct plain *s, int32_t token, double u)
{
    const double slack = 2e-5;
    double begin = 0;
    for (uint32_t i = 0; i < s->vocab; i++) {
        double end = begin + s->p[i];
        if (s->order[i] == (uint32_t)token) {
            bool edge = i == s->kept && s->p[i] > 0 && u + slack >= begin;
            if (i >= s->kept && !edge)
                fail_msg("token %d is place %u, only %u are kept", token, i, s->kept);
            if (!(u >= begin - slack && u <= end + slack))
                fail_msg("token %d has [%g, %g), drawn with %g", token, begin, end, u);
            return;
        }
        begin = end;
    }
    fail_msg("no token %d", token);
}

static void row_check(struct rig *rig, const struct sample_args *a, uint32_t row)
{
    const float *logits = a->logits + (size_t)row * a->stride;
    const struct sample_params *p = &a->params[row];
    struct plain s;
    plain_make(&s, logits, a->vocab, p);
    if (p->temperature > 0)
        draw_check(&s, a->token[row], (double)rng_uniform(p->seed, 0, p->counter));
    else
        assert_int_equal(a->token[row], s.order[0]);
    double want = (double)logits[a->token[row]] - s.max - s.log_sum;
    near(rig, a->logprob[row], want, fabs(want) + 1, 1e-6);
    for (uint32_t i = 0; i < a->tops; i++) {
        if (i >= a->vocab) {
            assert_int_equal(a->top_token[row * a->tops + i], SAMPLE_NOT_A_NUMBER);
            continue;
        }
        assert_int_equal(a->top_token[row * a->tops + i], s.order[i]);
        want = (double)logits[s.order[i]] - s.max - s.log_sum;
        near(rig, a->top_logprob[row * a->tops + i], want, fabs(want) + 1, 1e-6);
    }
    plain_free(&s);
}

static void sample_case(struct rig *rig, uint32_t vocab, uint32_t rows, float spread, bool coarse)
{
    uint32_t tops = 5, stride = vocab + 2;
    float *logits = rig_floats(rig, (size_t)rows * stride);
    struct sample_params *params = rig_alloc(rig, rows * sizeof *params);
    static const float temperatures[] = {0, 1, 0.3f, 2.5f}, top_ps[] = {1, 0.9f, 0.5f, 0.01f};
    static const uint32_t top_ks[] = {0, 1, 7, 40};
    for (size_t i = 0; i < (size_t)rows * stride; i++)
        logits[i] = coarse ? floorf(logits[i] * 3) : logits[i] * spread; // coarse: many ties
    for (uint32_t r = 0; r < rows; r++)
        params[r] = (struct sample_params){temperatures[r % 4], top_ps[random_below(4)],
                                           top_ks[random_below(4)], rng_next(&rig_rng), r};
    struct sample_args a = {.logits = logits,
                            .stride = stride,
                            .vocab = vocab,
                            .rows = rows,
                            .params = params,
                            .token = rig_alloc(rig, rows * 4),
                            .logprob = rig_poison(rig, rows),
                            .tops = tops,
                            .top_token = rig_alloc(rig, rows * tops * 4),
                            .top_logprob = rig_poison(rig, rows * tops)};
    rig->table->sample(rig->stream, &a);
    rig_run(rig);
    for (uint32_t r = 0; r < rows; r++)
        row_check(rig, &a, r);
    int32_t *again = rig_alloc(rig, 4);
    struct sample_args one = a;
    one.rows = 1;
    one.token = again;
    one.tops = 0;
    one.logprob = NULL;
    for (uint32_t r = 0; r < rows; r++) { // alone: the same token
        one.logits = logits + (size_t)r * stride;
        one.params = params + r;
        rig->table->sample(rig->stream, &one);
        rig_run(rig);
        assert_int_equal(*again, a.token[r]);
    }
    rig_clear(rig);
}

static void sample_all(struct rig *rig)
{
    static const uint32_t vocabs[] = {1, 2, 3, 50, 257, 5000};
    for (size_t i = 0; i < ARRAY_COUNT(vocabs); i++)
        for (int spread = 0; spread < 3; spread++)
            sample_case(rig, vocabs[i], 24, 0.1f + 4 * (float)spread, spread == 1);
}

static void test_kernels_sample_matches_a_full_sort(void **state)
{
    (void)state;
    rig_each("sample", sample_all);
}

static void sample_lost(struct rig *rig)
{
    enum { VOCAB = 300, ROWS = 6 };
    float *logits = rig_floats(rig, ROWS * VOCAB);
    float *logprob = rig_alloc(rig, ROWS * 4), *top = rig_alloc(rig, ROWS * 4);
    int32_t *token = rig_alloc(rig, ROWS * 4), *top_token = rig_alloc(rig, ROWS * 4);
    struct sample_params *params = rig_alloc(rig, ROWS * sizeof *params);
    for (int r = 0; r < ROWS; r++)
        params[r] = (struct sample_params){r % 2 ? 1.0f : 0.0f, 1.0f, 0, 1, 1};
    logits[1 * VOCAB + 299] = NAN;
    logits[2 * VOCAB + 7] = INFINITY;
    for (int i = 0; i < VOCAB; i++)
        logits[3 * VOCAB + i] = -INFINITY;
    for (int i = 0; i < VOCAB; i++) // everything masked but one
        logits[5 * VOCAB + i] = i == 33 ? -1e30f : -INFINITY;
    logits[4 * VOCAB + 12] = logits[4 * VOCAB + 200] = 50; // greedy: the lower of two equals
    rig->table->sample(rig->stream, &(struct sample_args){logits, VOCAB, VOCAB, ROWS, params, token,
                                                          logprob, 1, top_token, top});
    rig_run(rig);
    for (int r = 1; r < 4; r++) {
        assert_int_equal(token[r], SAMPLE_NOT_A_NUMBER);
        assert_int_equal(top_token[r], SAMPLE_NOT_A_NUMBER);
        assert_true(isnan(logprob[r]));
    }
    assert_true(token[0] >= 0 && !isnan(logprob[0]));
    assert_int_equal(token[4], 12);
    assert_int_equal(token[5], 33);
    assert_true(logprob[5] >= 0 && logprob[5] <= 0);
    rig_clear(rig);
}

static void test_kernels_sample_loses_only_rows_that_are_not_numbers(void **state)
{
    (void)state;
    rig_each("sample lost rows", sample_lost);
}

// Frequencies of 20,000 draws against the distribution: chi-square with 15 degrees of freedom.
static void sample_frequencies(struct rig *rig)
{
    enum { VOCAB = 16, ROWS = 500, TIMES = 40 };
    float *logits = rig_alloc(rig, ROWS * VOCAB * 4);
    struct sample_params *params = rig_alloc(rig, ROWS * sizeof *params);
    int32_t *token = rig_alloc(rig, ROWS * 4);
    double count[VOCAB] = {0}, sum = 0, chi = 0;
    for (int i = 0; i < ROWS * VOCAB; i++)
        logits[i] = 0.2f * (float)(i % VOCAB);
    for (uint64_t t = 0; t < TIMES; t++) {
        for (uint64_t r = 0; r < ROWS; r++)
            params[r] = (struct sample_params){1, 1, 0, 99, t * ROWS + r};
        rig->table->sample(rig->stream, &(struct sample_args){.logits = logits,
                                                              .stride = VOCAB,
                                                              .vocab = VOCAB,
                                                              .rows = ROWS,
                                                              .params = params,
                                                              .token = token});
        rig_run(rig);
        for (int r = 0; r < ROWS; r++)
            count[token[r]]++;
    }
    for (int i = 0; i < VOCAB; i++)
        sum += exp(0.2 * i);
    for (int i = 0; i < VOCAB; i++) {
        double want = exp(0.2 * i) / sum * ROWS * TIMES;
        chi += (count[i] - want) * (count[i] - want) / want;
    }
    assert_true(chi < 37.7); // 0.1 % point; the seed is fixed
    rig_clear(rig);
}

static void test_kernels_sample_frequencies_follow_the_distribution(void **state)
{
    (void)state;
    rig_each("sample frequencies", sample_frequencies);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_kernels_sample_matches_a_full_sort),
        cmocka_unit_test(test_kernels_sample_loses_only_rows_that_are_not_numbers),
        cmocka_unit_test(test_kernels_sample_frequencies_follow_the_distribution),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
