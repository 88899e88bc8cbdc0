// SPDX-License-Identifier: Apache-2.0
// Generates, reads and writes workloads (workload.h).
//
// The same list on every machine: random numbers are base/rng.h's, and everything after them is
// addition, multiplication, division and square root of doubles, which IEEE 754 gives to the last
// bit. The C library's log and exp are not so exact: their last bit depends on its version and on
// the processor. So `logarithm` and `exponential` here are series, good to about 1e-15, which is
// far more than a workload needs.
//
// Gamma: Marsaglia and Tsang, "A simple method for generating gamma variables" (2000), whose normal
// variates come from Marsaglia's polar method; a shape below 1 is that of shape + 1 times
// u^(1 / shape). Popularity: binary search in the table of cumulated weights.
#include "bench/workload.h"

#include <errno.h>
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "base/rng.h"

// Streams of rng_at, for each phase.
enum { STREAM_TIME = 1, STREAM_ADAPTER, STREAM_INPUT, STREAM_OUTPUT, STREAMS };

enum { ADAPTERS_MAX = 1 << 20, TOKENS_MAX = 1 << 20, FILE_MAX = 64 << 20, REPEAT_MAX = 1000 };

struct draw {
    uint64_t seed, stream, counter;
};

// ---- numbers ----

// Natural logarithm of a normal x > 0: m 2^e with m near 1, and ln m = 2 artanh((m - 1) / (m + 1)).
static double logarithm(double x)
{
    int e;
    double m = frexp(x, &e), sum = 0;
    if (m < 0.70710678118654752) {
        m *= 2;
        e--;
    }
    double z = (m - 1) / (m + 1), z2 = z * z;
    for (int k = 25; k > 0; k -= 2)
        sum = sum * z2 + 1.0 / k;
    return e * 0.69314718055994531 + 2 * z * sum;
}

// e^x, 0 where that would be no normal number.
static double exponential(double x)
{
    if (x < -700)
        return 0;
    double k = floor(x / 0.69314718055994531 + 0.5), r = x - k * 0.69314718055994531, sum = 1;
    for (int i = 16; i > 0; i--)
        sum = 1 + r * sum / i;
    return ldexp(sum, (int)k);
}

// In (0, 1), 53 bits.
static double draw_unit(struct draw *draw)
{
    uint64_t bits = rng_at(draw->seed, draw->stream, draw->counter++) >> 11;
    return ((double)bits + 0.5) * (1.0 / 9007199254740992.0);
}

static double draw_normal(struct draw *draw)
{
    for (;;) {
        double x = 2 * draw_unit(draw) - 1, y = 2 * draw_unit(draw) - 1, s = x * x + y * y;
        if (s > 0 && s < 1)
            return x * sqrt(-2 * logarithm(s) / s);
    }
}

// Of mean `shape`.
static double draw_gamma(struct draw *draw, double shape)
{
    if (shape < 1) {
        double u = draw_unit(draw);
        return draw_gamma(draw, shape + 1) * exponential(logarithm(u) / shape);
    }
    double d = shape - 1.0 / 3, c = 1 / sqrt(9 * d);
    for (;;) {
        double x = draw_normal(draw), v = 1 + c * x, u = draw_unit(draw);
        if (v <= 0)
            continue;
        v = v * v * v;
        if (logarithm(u) < 0.5 * x * x + d - d * v + d * logarithm(v))
            return d * v;
    }
}

static uint32_t draw_between(struct draw *draw, uint32_t least, uint32_t most)
{
    uint64_t bits = rng_at(draw->seed, draw->stream, draw->counter++);
    return least + (uint32_t)(bits % ((uint64_t)most - least + 1));
}

// ---- a phase ----

struct phase_state {
    const struct workload_phase *phase;
    struct draw draw[STREAMS];
    double *weights; // cumulated, [adapters]
};

static enum status state_begin(struct phase_state *s, const struct workload_phase *phase,
                               uint64_t seed, uint32_t index, struct fault *fault)
{
    *s = (struct phase_state){.phase = phase};
    for (uint32_t i = 0; i < STREAMS; i++)
        s->draw[i] = (struct draw){.seed = seed, .stream = (uint64_t)index * STREAMS + i};
    s->weights = malloc((phase->adapters + 1) * sizeof *s->weights);
    if (!s->weights)
        return fault_set(fault, STATUS_NO_MEMORY, "out of memory for the weights of adapters.");
    double sum = 0;
    for (uint32_t i = 0; i < phase->adapters; i++) {
        sum += exponential(-phase->alpha * logarithm(i + 1.0));
        s->weights[i] = sum;
    }
    return STATUS_OK;
}

static uint32_t choose_adapter(struct phase_state *s)
{
    uint32_t low = 0, high = s->phase->adapters;
    if (!high)
        return WORKLOAD_BASE;
    double at = draw_unit(&s->draw[STREAM_ADAPTER]) * s->weights[high - 1];
    for (high--; low < high;) {
        uint32_t middle = low + (high - low) / 2;
        if (s->weights[middle] > at)
            high = middle;
        else
            low = middle + 1;
    }
    return low;
}

static double choose_interval(struct phase_state *s)
{
    double cv2 = s->phase->cv * s->phase->cv;
    if (cv2 <= 0)
        return 1 / s->phase->rate;
    return draw_gamma(&s->draw[STREAM_TIME], 1 / cv2) * cv2 / s->phase->rate;
}

static enum status add_request(struct workload *w, const struct workload_request *request,
                               struct fault *fault)
{
    if (w->count == WORKLOAD_REQUESTS_MAX)
        return fault_set(fault, STATUS_LIMIT, "a workload has at most %d requests.",
                         WORKLOAD_REQUESTS_MAX);
    if (!(w->count & (w->count - 1))) { // room doubles at 0, 1, 2, 4, ...
        size_t room = w->count ? 2 * (size_t)w->count : 1;
        struct workload_request *grown = realloc(w->requests, room * sizeof *grown);
        if (!grown)
            return fault_set(fault, STATUS_NO_MEMORY, "out of memory for a workload.");
        w->requests = grown;
    }
    w->requests[w->count++] = *request;
    return STATUS_OK;
}

// Begins at *at seconds and moves *at to its end.
static enum status make_phase(struct phase_state *s, double *at, struct workload *w,
                              struct fault *fault)
{
    const struct workload_phase *p = s->phase;
    double end = p->seconds > 0 ? *at + p->seconds : 0;
    for (uint32_t i = 0; !p->requests || i < p->requests; i++) {
        double next = *at + choose_interval(s);
        if (end > 0 && next > end) {
            *at = end;
            return STATUS_OK;
        }
        *at = next;
        uint32_t adapter = choose_adapter(s);
        struct workload_request request = {
            .time_us = (uint64_t)(*at * 1e6 + 0.5),
            .adapter = adapter,
            .input = draw_between(&s->draw[STREAM_INPUT], p->input_min, p->input_max),
            .output = draw_between(&s->draw[STREAM_OUTPUT], p->output_min, p->output_max),
            .tenant = (adapter == WORKLOAD_BASE ? i : adapter) % p->tenants};
        enum status status = add_request(w, &request, fault);
        if (status)
            return status;
    }
    return STATUS_OK;
}

static enum status count_used(struct workload *w, struct fault *fault)
{
    uint8_t *seen = calloc(w->adapters + 1, 1);
    if (!seen)
        return fault_set(fault, STATUS_NO_MEMORY, "out of memory for a workload.");
    for (uint32_t i = 0; i < w->count; i++) {
        uint32_t adapter = w->requests[i].adapter;
        w->used += adapter != WORKLOAD_BASE && !seen[adapter];
        seen[adapter == WORKLOAD_BASE ? w->adapters : adapter] = 1;
    }
    free(seen);
    return STATUS_OK;
}

static enum status summarize(struct workload *w, struct fault *fault)
{
    double outputs = 0;
    for (uint32_t i = 0; i < w->count; i++) {
        const struct workload_request *r = &w->requests[i];
        uint32_t tokens = r->input + r->output;
        if (r->adapter != WORKLOAD_BASE && r->adapter >= w->adapters)
            w->adapters = r->adapter + 1;
        w->tenants = r->tenant >= w->tenants ? r->tenant + 1 : w->tenants;
        w->input_max = r->input > w->input_max ? r->input : w->input_max;
        w->output_max = r->output > w->output_max ? r->output : w->output_max;
        w->tokens_max = tokens > w->tokens_max ? tokens : w->tokens_max;
        outputs += r->output;
    }
    w->output_mean = w->count ? outputs / w->count : 0;
    return count_used(w, fault);
}

enum status workload_make(const struct workload_spec *spec, struct workload *out,
                          struct fault *fault)
{
    struct phase_state state;
    enum status status = STATUS_OK;
    double at = 0;
    *out = (struct workload){.count = 0};
    for (uint32_t i = 0; !status && i < spec->repeat * spec->phases; i++) {
        const struct workload_phase *phase = &spec->phase[i % spec->phases];
        if (!phase->requests && phase->seconds <= 0)
            status = fault_set(fault, STATUS_INVALID,
                               "a phase without an end: give requests or seconds.");
        if (!status)
            status = state_begin(&state, phase, spec->seed, i, fault);
        if (!status) {
            out->adapters = phase->adapters > out->adapters ? phase->adapters : out->adapters;
            out->tenants = phase->tenants > out->tenants ? phase->tenants : out->tenants;
            status = make_phase(&state, &at, out, fault);
            free(state.weights);
        }
    }
    if (!status && !out->count)
        status = fault_set(fault, STATUS_INVALID, "the workload has no request.");
    if (!status)
        status = summarize(out, fault);
    if (status)
        workload_clear(out);
    return status;
}

void workload_clear(struct workload *workload)
{
    free(workload->requests);
    *workload = (struct workload){.count = 0};
}

// ---- specs ----

void workload_spec_default(struct workload_spec *out)
{
    *out = (struct workload_spec){.seed = 42, .repeat = 1, .phases = 1};
    out->phase[0] = (struct workload_phase){.rate = 1,
                                            .cv = 1,
                                            .alpha = 1,
                                            .requests = 100,
                                            .adapters = 1,
                                            .tenants = 1,
                                            .input_min = 8,
                                            .input_max = 512,
                                            .output_min = 8,
                                            .output_max = 512};
}

static bool read_number(const char *text, double least, double most, double *out)
{
    char *end;
    double value = strtod(text, &end);
    if (end == text || *end || !(value >= least && value <= most))
        return false;
    *out = value;
    return true;
}

static bool read_count(const char *text, uint32_t least, uint32_t most, uint32_t *out)
{
    double value;
    if (!read_number(text, least, most, &value) || floor(value) < value)
        return false;
    *out = (uint32_t)value;
    return true;
}

// "8..512", or "8" for 8..8.
static bool read_range(const char *text, uint32_t *least, uint32_t *most)
{
    char low[32];
    const char *dots = strstr(text, "..");
    size_t length = dots ? (size_t)(dots - text) : strlen(text);
    if (length >= sizeof low)
        return false;
    memcpy(low, text, length);
    low[length] = 0;
    return read_count(low, 1, TOKENS_MAX, least) &&
           read_count(dots ? dots + 2 : low, *least, TOKENS_MAX, most);
}

// *known: there is such a key.
static bool set_phase(struct workload_phase *p, const char *key, const char *value, bool *known)
{
    *known = true;
    if (!strcmp(key, "rate"))
        return read_number(value, 1e-6, 1e6, &p->rate);
    if (!strcmp(key, "cv"))
        return read_number(value, 0, 16, &p->cv);
    if (!strcmp(key, "alpha"))
        return read_number(value, 0, 16, &p->alpha);
    if (!strcmp(key, "seconds"))
        return read_number(value, 0, 1e6, &p->seconds);
    if (!strcmp(key, "requests"))
        return read_count(value, 0, WORKLOAD_REQUESTS_MAX, &p->requests);
    if (!strcmp(key, "adapters"))
        return read_count(value, 0, ADAPTERS_MAX, &p->adapters);
    if (!strcmp(key, "tenants"))
        return read_count(value, 1, ADAPTERS_MAX, &p->tenants);
    if (!strcmp(key, "input"))
        return read_range(value, &p->input_min, &p->input_max);
    if (!strcmp(key, "output"))
        return read_range(value, &p->output_min, &p->output_max);
    *known = false;
    return false;
}

static enum status key_fault(const char *key, const char *value, bool known, struct fault *fault)
{
    if (known)
        return fault_set(fault, STATUS_INVALID, "%.40s=%.40s of a workload is out of range.", key,
                         value);
    return fault_set(fault, STATUS_INVALID, "a workload has no \"%.40s\".", key);
}

enum status workload_spec_set(struct workload_spec *spec, const char *key, const char *value,
                              struct fault *fault)
{
    bool known = true, valid = true;
    double seed;
    if (!strcmp(key, "seed")) {
        valid = read_number(value, 0, 9007199254740992.0, &seed);
        spec->seed = valid ? (uint64_t)seed : 0;
    } else if (!strcmp(key, "repeat")) {
        valid = read_count(value, 1, REPEAT_MAX, &spec->repeat);
    } else {
        for (uint32_t i = 0; valid && i < spec->phases; i++)
            valid = set_phase(&spec->phase[i], key, value, &known);
    }
    return valid ? STATUS_OK : key_fault(key, value, known, fault);
}

// Cuts "key=value" in two; false when there is no "=".
static bool cut(char *word, char **value)
{
    *value = strchr(word, '=');
    if (!*value)
        return false;
    *(*value)++ = 0;
    return true;
}

static enum status parse_phase(char *words, struct workload_phase *phase, struct fault *fault)
{
    char *rest, *value;
    struct workload_spec defaults;
    workload_spec_default(&defaults);
    *phase = defaults.phase[0];
    bool bounded = strstr(words, "seconds=");
    if (bounded)
        phase->requests = 0;
    for (char *word = strtok_r(words, " \t", &rest); word; word = strtok_r(NULL, " \t", &rest)) {
        bool known = false;
        if (!cut(word, &value))
            return fault_set(fault, STATUS_INVALID, "\"%.40s\" is not key=value.", word);
        if (!set_phase(phase, word, value, &known))
            return key_fault(word, value, known, fault);
    }
    return STATUS_OK;
}

static enum status parse_line(char *line, struct workload_spec *out, struct fault *fault)
{
    char *rest, *word = strtok_r(line, " \t", &rest);
    if (!strcmp(word, "phase")) {
        if (out->phases == WORKLOAD_PHASES_MAX)
            return fault_set(fault, STATUS_LIMIT, "a workload has at most %d phases.",
                             WORKLOAD_PHASES_MAX);
        return parse_phase(rest, &out->phase[out->phases++], fault);
    }
    char *value = strtok_r(NULL, " \t", &rest);
    if (!value || (strcmp(word, "seed") != 0 && strcmp(word, "repeat") != 0))
        return fault_set(fault, STATUS_INVALID, "a line begins with seed, repeat or phase.");
    return workload_spec_set(out, word, value, fault);
}

// ---- lines ----

// The next line without comment and blanks at its ends; false past the end.
static bool next_line(const char **at, uint32_t *number, char *out, size_t room)
{
    while (**at) {
        size_t length = strcspn(*at, "\n"), used = length < room ? length : room - 1;
        memcpy(out, *at, used);
        out[used] = 0;
        *at += length + ((*at)[length] == '\n');
        ++*number;
        out[strcspn(out, "#\r")] = 0;
        for (size_t n = strlen(out); n && (out[n - 1] == ' ' || out[n - 1] == '\t');)
            out[--n] = 0;
        if (out[strspn(out, " \t")])
            return true;
    }
    return false;
}

enum status workload_spec_parse(const char *text, const char *name, struct workload_spec *out,
                                struct fault *fault)
{
    char line[512];
    uint32_t number = 0;
    struct fault inner = {.text = ""};
    workload_spec_default(out);
    out->phases = 0;
    while (next_line(&text, &number, line, sizeof line)) {
        if (parse_line(line, out, &inner))
            return fault_set(fault, inner.status, "%.120s, line %u: %.150s", name, number,
                             inner.text);
    }
    return out->phases ? STATUS_OK : fault_set(fault, STATUS_INVALID, "%.120s has no phase.", name);
}

static bool parse_request(const char *line, struct workload_request *out)
{
    char adapter[16];
    unsigned long long time_us;
    int end = 0;
    if (sscanf(line, "%llu %15s %u %u %u %n", &time_us, adapter, &out->input, &out->output,
               &out->tenant, &end) != 5 ||
        line[end])
        return false;
    out->time_us = time_us;
    out->adapter = WORKLOAD_BASE;
    if (strcmp(adapter, "-") != 0 && !read_count(adapter, 0, ADAPTERS_MAX - 1, &out->adapter))
        return false;
    return out->input && out->input <= TOKENS_MAX && out->output && out->output <= TOKENS_MAX &&
           out->tenant < ADAPTERS_MAX;
}

enum status workload_parse(const char *text, const char *name, struct workload *out,
                           struct fault *fault)
{
    char line[512];
    uint32_t number = 0;
    enum status status = STATUS_OK;
    *out = (struct workload){.count = 0};
    while (!status && next_line(&text, &number, line, sizeof line)) {
        struct workload_request request;
        if (!parse_request(line, &request))
            status = fault_set(fault, STATUS_INVALID,
                               "%.120s, line %u: not \"time_us adapter input output tenant\".",
                               name, number);
        else if (out->count && request.time_us < out->requests[out->count - 1].time_us)
            status = fault_set(fault, STATUS_INVALID,
                               "%.120s, line %u: earlier than the one before.", name, number);
        else
            status = add_request(out, &request, fault);
    }
    if (!status && !out->count)
        status = fault_set(fault, STATUS_INVALID, "%.120s has no request.", name);
    if (!status)
        status = summarize(out, fault);
    if (status)
        workload_clear(out);
    return status;
}

// ---- files ----

enum status workload_write(const struct workload *workload, const char *path, struct fault *fault)
{
    FILE *file = fopen(path, "w");
    if (!file)
        return fault_set(fault, STATUS_IO, "cannot write %.200s: %s.", path, strerror(errno));
    (void)fprintf(file, "# time_us adapter input output tenant\n");
    for (uint32_t i = 0; i < workload->count; i++) {
        const struct workload_request *r = &workload->requests[i];
        (void)fprintf(file, "%llu ", (unsigned long long)r->time_us);
        if (r->adapter == WORKLOAD_BASE)
            (void)fprintf(file, "-");
        else
            (void)fprintf(file, "%u", r->adapter);
        (void)fprintf(file, " %u %u %u\n", r->input, r->output, r->tenant);
    }
    bool failed = ferror(file);
    failed = fclose(file) != 0 || failed;
    return failed ? fault_set(fault, STATUS_IO, "writing %.200s failed: %s.", path, strerror(errno))
                  : STATUS_OK;
}

static enum status read_text(const char *path, char **out, struct fault *fault)
{
    FILE *file = fopen(path, "r");
    if (!file)
        return fault_set(fault, STATUS_IO, "cannot read %.200s: %s.", path, strerror(errno));
    size_t used = 0, room = 4096;
    char *text = NULL;
    for (bool more = true; more; room *= 2) {
        char *grown = room <= FILE_MAX ? realloc(text, room) : NULL;
        if (!grown) {
            free(text);
            (void)fclose(file);
            return fault_set(fault, STATUS_LIMIT, "%.200s is too large for a workload.", path);
        }
        text = grown;
        used += fread(text + used, 1, room - used - 1, file);
        text[used] = 0;
        more = used == room - 1;
    }
    bool failed = ferror(file);
    (void)fclose(file);
    if (failed) {
        free(text);
        return fault_set(fault, STATUS_IO, "reading %.200s failed: %s.", path, strerror(errno));
    }
    *out = text;
    return STATUS_OK;
}

static bool is_list(const char *text)
{
    char line[512];
    uint32_t number = 0;
    return next_line(&text, &number, line, sizeof line) && line[0] >= '0' && line[0] <= '9';
}

static enum status override_all(struct workload_spec *spec, const char *overrides,
                                struct fault *fault)
{
    char text[512], *rest, *value;
    if (strlen(overrides) >= sizeof text)
        return fault_set(fault, STATUS_LIMIT, "too much to override in a workload.");
    strcpy(text, overrides);
    for (char *word = strtok_r(text, ",", &rest); word; word = strtok_r(NULL, ",", &rest)) {
        if (!cut(word, &value))
            return fault_set(fault, STATUS_INVALID, "\"%.40s\" is not key=value.", word);
        enum status status = workload_spec_set(spec, word, value, fault);
        if (status)
            return status;
    }
    return STATUS_OK;
}

enum status workload_open(const char *path, const char *overrides, struct workload *out,
                          struct fault *fault)
{
    struct workload_spec spec;
    char *text = NULL;
    enum status status = read_text(path, &text, fault);
    if (status)
        return status;
    if (!is_list(text)) {
        status = workload_spec_parse(text, path, &spec, fault);
        if (!status)
            status = override_all(&spec, overrides ? overrides : "", fault);
        if (!status)
            status = workload_make(&spec, out, fault);
    } else if (overrides && *overrides) {
        status = fault_set(fault, STATUS_INVALID,
                           "%.120s is a list of requests: nothing of it can be overridden.", path);
    } else {
        status = workload_parse(text, path, out, fault);
    }
    free(text);
    return status;
}
