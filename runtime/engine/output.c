// SPDX-License-Identifier: Apache-2.0
// After a step: sampled tokens become text and events, sequences end or go on.
//
// Nothing here waits: output_results does all of it or, when the event ring might not have room,
// none.
#include <string.h>
#include <unistd.h>

#include "base/check.h"
#include "runtime/engine/internal.h"

enum { PIECE_MAX = 3200 }; // one token's text: 1024 bytes, each at worst a U+FFFD of 3

bool output_event(struct engine *engine, const void *record, size_t bytes)
{
    struct engine_port *port = engine->options.port;
    enum status status = ring_push(port->events, record, bytes);
    CHECK(status != STATUS_INVALID);
    if (status)
        return false;
    uint64_t one = 1;
    ssize_t ignored = write(port->event_wake, &one, sizeof one);
    (void)ignored;
    return true;
}

size_t output_room_needed(const struct engine *engine, uint32_t samples)
{
    (void)engine;
    return ((size_t)samples + 1) *
           (sizeof(struct engine_text) + TEXT_HELD_MAX + 16); // see ring_free
}

static void emit_text(struct engine *e, struct sequence *s, uint32_t sample, size_t ready)
{
    const struct result_set *set = &e->scratch.results[e->results.set];
    struct engine_text text = {.kind = ENGINE_TEXT,
                               .token = set->token[sample],
                               .id = s->id,
                               .index = s->generated - 1,
                               .logprob = set->logprob[sample],
                               .tops = s->tops,
                               .text_bytes = (uint32_t)ready};
    for (uint32_t i = 0; i < s->tops; i++) {
        text.top_token[i] = set->top_token[(size_t)sample * e->results.tops + i];
        text.top_logprob[i] = set->top_logprob[(size_t)sample * e->results.tops + i];
    }
    memcpy(e->record, &text, sizeof text);
    memcpy(e->record + sizeof text, s->text.held, ready);
    CHECK(output_event(e, e->record, sizeof text + ready)); // room was checked
    text_consume(&s->text, ready);
}

static bool is_stop_token(const struct engine *e, const struct sequence *s, int32_t token)
{
    for (uint32_t i = 0; i < s->stop_tokens; i++) {
        if (s->stop_token[i] == token)
            return true;
    }
    const struct model_config *c = &e->options.model->config;
    for (uint32_t i = 0; !s->ignore_eos && i < c->eos_count; i++) {
        if ((int32_t)c->eos[i] == token)
            return true;
    }
    return false;
}

// Decodes the token into the held text; true when a stop string ended the answer.
static bool add_token_text(struct engine *e, struct sequence *s, int32_t token, size_t *ready)
{
    const struct engine_text_decoder *d = &e->options.decoder;
    char piece[PIECE_MAX];
    *ready = 0;
    if (!d->decode)
        return false;
    size_t n = d->decode(d->context, (uint8_t *)s->text.decode_state, token, piece, sizeof piece);
    CHECK(n <= sizeof piece);
    return text_add(&s->text, piece, n, ready);
}

// The text that was held back, complete or not, when no more tokens come.
static void finish_text(struct engine *e, struct sequence *s)
{
    const struct engine_text_decoder *d = &e->options.decoder;
    char piece[PIECE_MAX];
    size_t ready;
    if (!d->finish)
        return;
    size_t n = d->finish(d->context, (uint8_t *)s->text.decode_state, piece, sizeof piece);
    (void)text_add(&s->text, piece, n, &ready);
}

// One sampled token of one sequence; true when the sequence goes on.
static bool take_token(struct engine *e, uint32_t slot, uint32_t sample)
{
    struct sequence *s = &e->sequences[slot];
    int32_t token = e->scratch.results[e->results.set].token[sample];
    if (token < 0) {
        sequence_end(e, slot, STATUS_NUMERIC, ENGINE_FINISH_ERROR,
                     "The model produced a value that is not a number for this request.");
        return false;
    }
    if (!s->first_token_us)
        s->first_token_us = clock_now_us(&e->options.clock);
    s->generated++;
    e->counters.generated_tokens++;
    size_t ready = 0;
    bool stop_token = is_stop_token(e, s, token);
    bool stopped = !stop_token && add_token_text(e, s, token, &ready);
    CHECK(s->length < e->options.context_max); // prompt + max_tokens fit, checked on arrival
    s->tokens[s->length++] = token;
    emit_text(e, s, sample, ready);
    if (stop_token || stopped) {
        if (stop_token)
            finish_text(e, s);
        else
            s->text.held_bytes = 0;
        sequence_end(e, slot, STATUS_OK, ENGINE_FINISH_STOP, NULL);
        return false;
    }
    if (s->generated == s->max_tokens) {
        finish_text(e, s);
        sequence_end(e, slot, STATUS_OK, ENGINE_FINISH_LENGTH, NULL);
        return false;
    }
    return true;
}

// The rows of the step are done: computed, committed, counted.
static void take_rows(struct engine *e, const struct results *r)
{
    e->counters.rows += r->plan.rows;
    e->counters.half_rows_run += (uint64_t)r->halves_run * r->plan.rows;
    e->counters.half_rows_due += 2ull * e->options.model->config.layers * r->plan.rows;
    for (uint32_t i = 0; i < r->plan.runs; i++) {
        const struct plan_run *run = &r->runs[i];
        struct sequence *s = &e->sequences[run->slot];
        if (s->state != SEQUENCE_RUNNING) {
            e->counters.rows_surplus += run->count; // it had ended before
            continue;
        }
        // What was computed with an adapter of which a page could not be read is worth nothing.
        if (s->has_adapter && adapter_is_broken(e->options.adapters, s->adapter)) {
            sequence_end(e, run->slot, STATUS_IO, ENGINE_FINISH_ERROR,
                         "Reading the adapter from its store failed; ask the operator.");
            continue;
        }
        uint32_t end = run->position + run->count;
        uint32_t prompt_before = s->high_water < s->prompt ? s->high_water : s->prompt;
        s->computed = end;
        s->high_water = end > s->high_water ? end : s->high_water;
        uint32_t prompt_now = s->high_water < s->prompt ? s->high_water : s->prompt;
        e->counters.prompt_tokens += prompt_now - prompt_before;
        kv_commit(e->options.kv, s->kv, s->tokens, end);
    }
}

void output_drop(struct engine *engine)
{
    struct results *r = &engine->results;
    if (r->waiting)
        step_release_runs(engine, r->runs, r->plan.runs);
    r->waiting = false;
}

bool output_results(struct engine *engine)
{
    struct results *r = &engine->results;
    if (ring_free(engine->options.port->events) < output_room_needed(engine, r->plan.samples))
        return false;
    take_rows(engine, r);
    // Releasing the rows first lets a sequence end at once, unless the next step has rows of it.
    step_release_runs(engine, r->runs, r->plan.runs);
    uint64_t now = clock_now_us(&engine->options.clock);
    for (uint32_t i = 0, sample = 0; i < r->plan.runs; i++) {
        const struct plan_run *run = &r->runs[i];
        uint32_t at = sample;
        sample += run->samples;
        if (engine->sequences[run->slot].state != SEQUENCE_RUNNING)
            continue;
        if (!run->samples || take_token(engine, run->slot, at))
            (void)sequence_end_if_over(engine, run->slot, now);
    }
    r->waiting = false;
    return true;
}
