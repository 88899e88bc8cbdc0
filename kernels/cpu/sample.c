// SPDX-License-Identifier: Apache-2.0
// Sampling, a task per row, bound by a few passes over the logits. Nothing is sorted.
//
// top_k, top_p and the draw all ask the same question: in the order (logit descending, id
// ascending), where does a running count or a running mass reach a target? It is answered by radix
// selection on an order-preserving 32-bit key of the logit: histograms of 11, 11 and 10 bits with
// count and mass (double) per bucket, each level within the bucket where the target is reached. The
// first histogram serves all three questions. Masses are added in id order within a bucket, buckets
// in descending order, so the result is a function of the row alone.
#include <math.h>
#include <string.h>

#include "base/rng.h"
#include "kernels/cpu/cpu.h"

enum { LEVELS = 3, CHUNK = 256 };
static const uint32_t level_shift[LEVELS] = {21, 10, 0};

struct row_view {
    const struct micro *micro;
    const float *logits;
    uint32_t vocab;
    float max, inverse_temperature;
};

// A prefix of the order: all keys above `key`, and the first `ties` ids that have it.
struct cut {
    uint32_t key, ties;
    double mass;
};

static uint32_t key_of(float logit)
{
    union {
        float number;
        uint32_t bits;
    } u = {.number = logit + 0.0f}; // -0 counts as 0
    return u.bits & 0x80000000u ? ~u.bits : u.bits | 0x80000000u;
}

static float mass_of(const struct row_view *r, float logit)
{
    float out;
    return r->micro->exp_sum(&logit, &out, 1, r->max, r->inverse_temperature);
}

static void histogram_first(struct slot *slot, const struct row_view *r)
{
    float mass[CHUNK];
    slot->candidate_bucket = SAMPLE_BUCKETS;
    memset(slot->bucket_count[0], 0, sizeof slot->bucket_count[0]);
    memset(slot->bucket_mass[0], 0, sizeof slot->bucket_mass[0]);
    for (uint32_t first = 0; first < r->vocab; first += CHUNK) {
        uint32_t n = (uint32_t)min_size(CHUNK, r->vocab - first);
        r->micro->exp_sum(r->logits + first, mass, n, r->max, r->inverse_temperature);
        for (uint32_t i = 0; i < n; i++) {
            uint32_t bucket = key_of(r->logits[first + i]) >> level_shift[0];
            slot->bucket_count[0][bucket]++;
            slot->bucket_mass[0][bucket] += (double)mass[i];
        }
    }
}

// Lists the ids of a first-level bucket, when they fit, so that deeper levels need not look at all
// others.
static bool candidates_list(struct slot *slot, const struct row_view *r, uint32_t bucket)
{
    if (slot->candidate_bucket == bucket)
        return true;
    if (slot->bucket_count[0][bucket] > SAMPLE_CANDIDATES)
        return false;
    uint32_t n = 0;
    for (uint32_t i = 0; i < r->vocab; i++) {
        slot->candidates[n < SAMPLE_CANDIDATES ? n : 0] = i; // kept when the next line counts it
        n += key_of(r->logits[i]) >> level_shift[0] == bucket;
    }
    slot->candidate_count = n;
    slot->candidate_bucket = bucket;
    return true;
}

static void histogram_add(struct slot *slot, const struct row_view *r, uint32_t level,
                          uint32_t prefix, uint32_t id)
{
    uint32_t above = level_shift[level - 1], shift = level_shift[level];
    uint32_t key = key_of(r->logits[id]), bucket = key >> shift & ((1u << (above - shift)) - 1u);
    if (key >> above != prefix)
        return;
    slot->bucket_count[1][bucket]++;
    slot->bucket_mass[1][bucket] += (double)mass_of(r, r->logits[id]);
}

// The histogram of keys whose bits above the level's are `prefix`.
static void histogram_within(struct slot *slot, const struct row_view *r, uint32_t level,
                             uint32_t prefix)
{
    memset(slot->bucket_count[1], 0, sizeof slot->bucket_count[1]);
    memset(slot->bucket_mass[1], 0, sizeof slot->bucket_mass[1]);
    if (candidates_list(slot, r, prefix >> (level == 1 ? 0 : level_shift[0] - level_shift[1]))) {
        for (uint32_t i = 0; i < slot->candidate_count; i++)
            histogram_add(slot, r, level, prefix, slot->candidates[i]);
        return;
    }
    for (uint32_t i = 0; i < r->vocab; i++)
        histogram_add(slot, r, level, prefix, i);
}

// What is looked for: the count reaches `count`, or the mass reaches (passes, when `beyond`)
// `mass`.
struct target {
    uint32_t count; // 0: by mass
    double mass;
    bool beyond;
};

static bool reached(const struct target *t, uint64_t count, double mass)
{
    if (t->count)
        return count >= t->count;
    return t->beyond ? mass > t->mass : mass >= t->mass;
}

// The bucket where the target is reached, after `count` and `mass` above it, which are advanced to
// what stands before that bucket. Rounding may leave a mass just short: then the last bucket with
// mass.
static uint32_t bucket_find(const uint32_t *counts, const double *masses, const struct target *t,
                            uint64_t *count, double *mass)
{
    uint64_t counted = *count;
    double massed = *mass;
    uint32_t last = SAMPLE_BUCKETS;
    for (uint32_t b = SAMPLE_BUCKETS; b-- > 0;) {
        if (!counts[b])
            continue;
        if (t->count || masses[b] > 0 || last == SAMPLE_BUCKETS) {
            last = b;
            *count = counted;
            *mass = massed;
        }
        if (reached(t, counted + counts[b], massed + masses[b]))
            break;
        counted += counts[b];
        massed += masses[b];
    }
    return last;
}

static struct cut cut_find(struct slot *slot, const struct row_view *r, const struct target *t)
{
    uint64_t count = 0;
    double mass = 0;
    uint32_t key = bucket_find(slot->bucket_count[0], slot->bucket_mass[0], t, &count, &mass);
    uint32_t bucket = key;
    for (uint32_t level = 1; level < LEVELS; level++) {
        histogram_within(slot, r, level, key);
        bucket = bucket_find(slot->bucket_count[1], slot->bucket_mass[1], t, &count, &mass);
        key = key << (level_shift[level - 1] - level_shift[level]) | bucket;
    }
    uint32_t ties = slot->bucket_count[1][bucket], n = 1;
    double one = slot->bucket_mass[1][bucket] / ties;
    while (n < ties && !reached(t, count + n, mass + n * one))
        n++;
    return (struct cut){key, n, mass + n * one};
}

static bool cut_before(const struct cut *a, const struct cut *b)
{
    return a->key > b->key || (a->key == b->key && a->ties < b->ties);
}

static int32_t cut_token(struct slot *slot, const struct row_view *r, const struct cut *cut)
{
    uint32_t seen = 0;
    if (candidates_list(slot, r, cut->key >> level_shift[0])) {
        for (uint32_t i = 0; i < slot->candidate_count; i++)
            if (key_of(r->logits[slot->candidates[i]]) == cut->key && ++seen == cut->ties)
                return (int32_t)slot->candidates[i];
        return SAMPLE_NOT_A_NUMBER;
    }
    for (uint32_t i = 0; i < r->vocab; i++)
        if (key_of(r->logits[i]) == cut->key && ++seen == cut->ties)
            return (int32_t)i;
    return SAMPLE_NOT_A_NUMBER;
}

static int32_t draw(struct slot *slot, const struct row_view *r, const struct sample_params *p)
{
    histogram_first(slot, r);
    struct cut kept = {.key = 0, .ties = UINT32_MAX};
    for (uint32_t b = SAMPLE_BUCKETS; b-- > 0;)
        kept.mass += slot->bucket_mass[0][b];
    if (p->top_k && p->top_k < r->vocab)
        kept = cut_find(slot, r, &(struct target){.count = p->top_k});
    if (p->top_p < 1.0f) {
        double mass = kept.mass * (double)(p->top_p > 0 ? p->top_p : 0);
        struct cut cut = cut_find(slot, r, &(struct target){.mass = mass});
        if (cut_before(&cut, &kept))
            kept = cut;
    }
    double uniform = (double)rng_uniform(p->seed, 0, p->counter);
    struct cut chosen =
        cut_find(slot, r, &(struct target){.mass = uniform * kept.mass, .beyond = true});
    return cut_token(slot, r, cut_before(&kept, &chosen) ? &kept : &chosen);
}

static int32_t greedy(const struct row_view *r)
{
    for (uint32_t i = 0; i < r->vocab; i++)
        if (r->logits[i] >= r->max)
            return (int32_t)i;
    return SAMPLE_NOT_A_NUMBER;
}

// log of the sum of exp(logit - max), temperature 1.
static double log_sum(const struct row_view *r)
{
    float scratch[CHUNK];
    double sum = 0;
    for (uint32_t first = 0; first < r->vocab; first += CHUNK)
        sum += (double)r->micro->exp_sum(r->logits + first, scratch,
                                         min_size(CHUNK, r->vocab - first), r->max, 1.0f);
    return log(sum);
}

static bool row_usable(struct row_view *r)
{
    bool bad = false;
    for (uint32_t i = 0; i < r->vocab; i++)
        bad |= !(r->logits[i] < INFINITY); // NaN too
    r->max = r->micro->max(r->logits, r->vocab);
    return !bad && r->max > -INFINITY;
}

static void tops_fill(const struct row_view *r, double log_total, uint32_t tops, int32_t *token,
                      float *logprob)
{
    for (uint32_t i = 0; i < tops; i++) {
        token[i] = SAMPLE_NOT_A_NUMBER;
        logprob[i] = -INFINITY;
    }
    for (uint32_t i = 0; i < r->vocab; i++) {
        float logit = r->logits[i];
        if (!(logit > logprob[tops - 1]))
            continue;
        uint32_t at = tops - 1;
        for (; at > 0 && logit > logprob[at - 1]; at--) {
            token[at] = token[at - 1];
            logprob[at] = logprob[at - 1];
        }
        token[at] = (int32_t)i;
        logprob[at] = logit;
    }
    for (uint32_t i = 0; i < tops; i++)
        logprob[i] = (float)((double)logprob[i] - (double)r->max - log_total);
}

static void row_lose(const struct sample_args *a, uint32_t row)
{
    a->token[row] = SAMPLE_NOT_A_NUMBER;
    if (a->logprob)
        a->logprob[row] = NAN;
    for (uint32_t i = 0; i < a->tops; i++) {
        a->top_token[(size_t)row * a->tops + i] = SAMPLE_NOT_A_NUMBER;
        a->top_logprob[(size_t)row * a->tops + i] = NAN;
    }
}

static void sample_task(struct cpu_stream *s, struct slot *slot, struct command *c, uint32_t row)
{
    const struct sample_args *a = &c->a.sample;
    const struct sample_params *p = &a->params[row];
    struct row_view r = {
        .micro = cpu__micro(s), .logits = a->logits + (size_t)row * a->stride, .vocab = a->vocab};
    if (!row_usable(&r)) {
        row_lose(a, row);
        return;
    }
    // 1e30 keeps 0 * inverse_temperature a number
    r.inverse_temperature = p->temperature > 1e-30f ? 1.0f / p->temperature : 1e30f;
    a->token[row] = p->temperature > 0 ? draw(slot, &r, p) : greedy(&r);
    if (!a->logprob && !a->tops)
        return;
    double log_total = log_sum(&r);
    if (a->logprob)
        a->logprob[row] = (float)((double)r.logits[a->token[row]] - (double)r.max - log_total);
    if (a->tops)
        tops_fill(&r, log_total, a->tops, a->top_token + (size_t)row * a->tops,
                  a->top_logprob + (size_t)row * a->tops);
}

static const struct operation sample_operation = {.task = sample_task};

void cpu__sample(struct stream *s, const struct sample_args *a)
{
    CHECK(a->vocab && a->vocab <= INT32_MAX && a->stride >= a->vocab);
    if (!a->rows)
        return;
    struct command *c = cpu__record(s, &sample_operation, a->rows);
    c->a.sample = *a;
    size_t tops = (size_t)a->rows * a->tops;
    cpu__reads(c, a->logits, (size_t)a->rows * a->stride * sizeof(float), 0, 1);
    cpu__writes(c, a->token, a->rows * sizeof(int32_t), 0, 1);
    cpu__writes(c, a->logprob, a->rows * sizeof(float), 0, 1);
    cpu__writes(c, a->top_token, tops * sizeof(int32_t), 0, 1);
    cpu__writes(c, a->top_logprob, tops * sizeof(float), 0, 1);
    cpu__record_end(s, c);
}
