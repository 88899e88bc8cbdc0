// SPDX-License-Identifier: Apache-2.0
// See sim_requests.h. A violation prints the request and aborts; sim_engine.c prints how to see it
// again.
#include "sim_requests.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "sim_fingerprint.h"

static _Noreturn void wrong(const struct book *book, const struct book_request *q,
                            const char *format, ...) PRINTF_LIKE(3, 4);

static _Noreturn void wrong(const struct book *book, const struct book_request *q,
                            const char *format, ...)
{
    va_list list;
    va_start(list, format);
    fprintf(stderr, "at %llu us: ", (unsigned long long)book->world->now_us);
    vfprintf(stderr, format, list);
    va_end(list);
    if (q)
        fprintf(
            stderr, "\n  request %llu: tenant %u class %u prompt %u max %u adapter %d got %u%s%s%s",
            (unsigned long long)q->r.id, q->r.tenant, q->r.class, q->r.prompt_tokens,
            q->r.max_tokens, q->adapter ? (int)q->adapter->number : -1, q->got,
            q->cancelled ? " cancelled" : "", q->paused ? " paused" : "", q->ended ? " ended" : "");
    fputc('\n', stderr);
    abort();
}

static uint32_t below(struct book *book, uint32_t n)
{
    return (uint32_t)rng_below(&book->rng, n);
}

static bool chance(struct book *book, uint32_t per_mille)
{
    return below(book, 1000) < per_mille;
}

void book_begin(struct book *book, struct sim_world *world, uint64_t seed)
{
    memset(book, 0, sizeof *book);
    book->world = world;
    book->rng.seed = rng_mix(seed ^ 0xb00c);
    book->whole_per_mille = seed % 3 ? 100 : 700;
    book->live_max = BOOK_ROOM;
    book->ids = 1;
    book->only_class = ENGINE_CLASSES;
}

// ---- requests ----

// Prompts begin with a piece of one of a few long texts, so that prefixes are shared; the same ones
// under all tenants and adapters.
static void make_prompt(struct book *book, struct book_request *q)
{
    uint32_t length = chance(book, 600) ? 1 + below(book, 24) : 1 + below(book, SIM_CONTEXT - 20);
    uint32_t shared = chance(book, 700) ? below(book, length + 1) : 0, text = below(book, 4);
    bool whole = chance(
        book,
        book->whole_per_mille); // the same whole blocks as others: written blocks are then shared
    if (whole) {
        shared = length = 8 * (1 + below(book, 8));
        q->r.tenant = text = 0;
    }
    for (uint32_t i = 0; i < length; i++)
        q->prompt[i] = i < shared ? (int32_t)(rng_at(5, text, i) % SIM_VOCAB)
                                  : (int32_t)below(book, SIM_VOCAB);
    q->r.prompt_tokens = length;
    uint32_t room = SIM_CONTEXT - length;
    q->r.max_tokens = 1 + below(book, chance(book, 150) ? room : (room < 12 ? room : 12));
}

static void make_stops(struct book *book, struct book_request *q)
{
    q->r.stop_tokens = chance(book, 200) ? 1 + below(book, ENGINE_STOPS_MAX) : 0;
    for (uint32_t i = 0; i < q->r.stop_tokens; i++)
        q->stop_token[i] = (int32_t)below(book, SIM_VOCAB);
    q->r.stop_strings = chance(book, 300) ? 1 + below(book, 3) : 0;
    for (uint32_t i = 0; i < q->r.stop_strings; i++) {
        uint32_t length = 2 + below(book, 4);
        for (uint32_t c = 0; c < length; c++)
            q->stop[i][c] = (char)('a' + below(book, 5));
        q->stop[i][length] = 0;
    }
    if (q->r.stop_strings && chance(book, 100))
        strcpy(q->stop[0], "\xc3\xa9");
}

// Names 2 and 5 are the operator's, who is no tenant.
static uint32_t owner_of(uint32_t name)
{
    return name % 3 == 2 ? SIM_TENANTS : name % SIM_TENANTS;
}

// Mostly an adapter that the tenant may use; another tenant's is as if there were none.
static void choose_adapter(struct book *book, struct book_request *q)
{
    uint32_t name = below(book, BOOK_NAMES);
    bool may_use = owner_of(name) == SIM_TENANTS || owner_of(name) == q->r.tenant;
    if (!may_use && chance(book, 850)) {
        name = 2 + 3 * below(book, 2);
        may_use = true;
    }
    (void)snprintf(q->r.adapter, sizeof q->r.adapter, "n%u", name);
    q->adapter = may_use ? book->names[name] : NULL;
    q->not_found = !q->adapter;
}

struct book_request *book_new(struct book *book)
{
    struct book_request *q = NULL;
    for (uint32_t i = 0; i < BOOK_ROOM && !q; i++)
        q = book->requests[i].live ? NULL : &book->requests[i];
    if (!q || book->live >= book->live_max)
        return NULL;
    memset(q, 0, sizeof *q);
    q->r = (struct engine_request){.kind = ENGINE_REQUEST,
                                   .tenant = below(book, SIM_TENANTS),
                                   .id = book->ids,
                                   .class = below(book, ENGINE_CLASSES),
                                   .top_p = 1.0f,
                                   .tops = chance(book, 200) ? below(book, ENGINE_TOPS_MAX + 1) : 0,
                                   .want_logprob = below(book, 2),
                                   .ignore_eos = chance(book, 300),
                                   .seed = rng_next(&book->rng) >> 1};
    if (book->only_class < ENGINE_CLASSES)
        q->r.class = book->only_class;
    if (chance(book, 500)) {
        q->r.temperature = 0.25f * (float)(1 + below(book, 4));
        q->r.top_p = 0.5f + 0.125f * (float)below(book, 5);
        q->r.top_k = below(book, 3) * 10;
    }
    make_prompt(book, q);
    make_stops(book, q);
    if (chance(book, q->r.tenant ? 650 : 450))
        choose_adapter(book, q);
    if (!book->mild && chance(book, 30))
        q->r.deadline_us = book->world->now_us + below(book, 20000);
    if (!book->mild && chance(book, 10))
        q->r.seed = (uint64_t)PRINT_NAN_SEED << 32 | below(book, 4);
    if (book->mild && q->not_found)
        q->not_found = false, q->r.adapter[0] = 0;
    return q;
}

bool book_send(struct book *book, struct book_request *q)
{
    uint8_t record[sizeof(struct engine_request) + sizeof q->prompt + sizeof q->stop_token + 256];
    size_t at = sizeof q->r;
    memcpy(record, &q->r, sizeof q->r);
    memcpy(record + at, q->prompt, q->r.prompt_tokens * sizeof(int32_t));
    at += q->r.prompt_tokens * sizeof(int32_t);
    memcpy(record + at, q->stop_token, q->r.stop_tokens * sizeof(int32_t));
    at += q->r.stop_tokens * sizeof(int32_t);
    for (uint32_t i = 0; i < q->r.stop_strings; i++) {
        uint16_t length = (uint16_t)strlen(q->stop[i]);
        memcpy(record + at, &length, sizeof length);
        memcpy(record + at + sizeof length, q->stop[i], length);
        at += sizeof length + length;
    }
    if (engine_send(&book->world->port, record, at))
        return false;
    q->live = true;
    q->after_drain = book->draining;
    q->sent_us = book->world->now_us;
    q->order = book->orders++;
    book->ids++;
    book->live++;
    book->counts.sent++;
    return true;
}

bool book_send_request(struct book *book)
{
    struct book_request *q = book_new(book);
    return q && book_send(book, q);
}

// ---- other commands ----

bool book_control(struct book *book, enum engine_command_kind kind, uint64_t id)
{
    struct engine_control c = {.kind = (uint32_t)kind, .id = id};
    return engine_send(&book->world->port, &c, sizeof c) == STATUS_OK;
}

static struct book_request *any_live(struct book *book)
{
    uint32_t first = below(book, BOOK_ROOM);
    for (uint32_t i = 0; i < BOOK_ROOM; i++) {
        struct book_request *q = &book->requests[(first + i) % BOOK_ROOM];
        if (q->live)
            return q;
    }
    return NULL;
}

static bool send_adapter(struct book *book, uint32_t name, const struct sim_adapter *content,
                         enum status expected)
{
    struct engine_adapter_command c = {.kind = content ? ENGINE_ADAPTER_ADD : ENGINE_ADAPTER_REMOVE,
                                       .owner = owner_of(name),
                                       .replace = book->names[name] && expected == STATUS_OK};
    c.id = book->reply_ids + 1;
    (void)snprintf(c.name, sizeof c.name, "n%u", name);
    if (content)
        (void)snprintf(c.store_path, sizeof c.store_path, "%s", content->store);
    if (engine_send(&book->world->port, &c, sizeof c))
        return false;
    book->reply_expected[++book->reply_ids % 256] = expected;
    book->replies_due++;
    return true;
}

void book_name(struct book *book, uint32_t name, uint32_t content)
{
    const struct sim_adapter *a = &book->world->model->adapters[content];
    CHECK(send_adapter(book, name, a, STATUS_OK));
    book->names[name] = a;
}

static void change_name(struct book *book)
{
    uint32_t name = below(book, BOOK_NAMES);
    const struct sim_adapter *a = &book->world->model->adapters[below(book, SIM_CONTENTS)];
    if (book->names[name] && chance(book, 900)) {
        if (send_adapter(book, name, NULL, STATUS_OK)) {
            book->names[name] = NULL;
            book->counts.adapters_removed++;
        }
    } else if (book->names[name]) {
        // A new version: what was asked before goes on with the old one.
        bool is_new = a != book->names[name];
        if (send_adapter(book, name, a, is_new ? STATUS_OK : STATUS_EXISTS) && is_new)
            book->names[name] = a;
    } else if (chance(book, 100)) {
        (void)send_adapter(book, name, NULL, STATUS_NOT_FOUND);
    } else if (send_adapter(book, name, a, STATUS_OK)) {
        book->names[name] = a;
        book->counts.adapters_added++;
    }
}

// Load, unload, pin or unpin: what comes of it depends on what runs. Unpinned oftener than pinned.
static void keep_name(struct book *book)
{
    static const uint32_t kinds[] = {ENGINE_ADAPTER_LOAD, ENGINE_ADAPTER_UNLOAD, ENGINE_ADAPTER_PIN,
                                     ENGINE_ADAPTER_UNPIN, ENGINE_ADAPTER_UNPIN};
    uint32_t name = below(book, BOOK_NAMES);
    struct engine_adapter_command c = {.kind = kinds[below(book, ARRAY_COUNT(kinds))],
                                       .owner = owner_of(name),
                                       .id = book->reply_ids + 1,
                                       .pinned_bytes_max = chance(book, 900) ? UINT64_MAX : 0};
    (void)snprintf(c.name, sizeof c.name, "n%u", name);
    if (engine_send(&book->world->port, &c, sizeof c))
        return;
    book->reply_expected[++book->reply_ids % 256] =
        book->names[name] ? STATUS_COUNT : STATUS_NOT_FOUND;
    book->replies_due++;
    book->counts.keeps++;
}

static bool may_be_answered(enum status expected, enum status status)
{
    if (expected != STATUS_COUNT)
        return expected == status;
    return !status || status == STATUS_BUSY || status == STATUS_LIMIT || status == STATUS_FULL;
}

// stats, or a page of the list that begins anywhere.
static void ask(struct book *book, enum engine_command_kind kind)
{
    struct engine_list list = {.kind = kind, .limit = below(book, 4), .id = book->reply_ids + 1};
    bool sent = true;
    if (kind == ENGINE_ADAPTER_LIST) {
        (void)snprintf(list.after, sizeof list.after, "n%u", below(book, BOOK_NAMES + 1));
        sent = !engine_send(&book->world->port, &list, sizeof list);
    } else {
        sent = book_control(book, kind, list.id);
    }
    if (sent) {
        book->reply_expected[++book->reply_ids % 256] = STATUS_OK;
        book->replies_due++;
    }
}

void book_send_other(struct book *book)
{
    struct book_request *q = any_live(book);
    uint32_t kind = below(book, 100);
    if (kind < 30 && q && !book->mild) {
        q->cancelled = book_control(book, ENGINE_CANCEL, q->r.id) || q->cancelled;
    } else if (kind < 55 && q && !book->mild) {
        if (book_control(book, q->paused ? ENGINE_RESUME : ENGINE_PAUSE, q->r.id))
            q->paused = !q->paused;
    } else if (kind < 80) {
        for (uint32_t i = 0; i < BOOK_ROOM; i++) { // resumes come oftener than pauses
            q = &book->requests[i];
            if (q->live && q->paused && book_control(book, ENGINE_RESUME, q->r.id))
                q->paused = false;
        }
    } else if (kind < 86 && !book->mild && book->replies_due < 200) {
        keep_name(book);
    } else if (kind < 92 && book->replies_due < 200) {
        change_name(book);
    } else if (kind < 97 && book->replies_due < 200) {
        ask(book, kind < 95 ? ENGINE_STATS : ENGINE_ADAPTER_LIST);
    } else {
        (void)book_control(book, kind == 98 ? (enum engine_command_kind)77 : ENGINE_CANCEL,
                           1u << 30);
    }
}

void book_resume_all(struct book *book)
{
    for (uint32_t i = 0; i < BOOK_ROOM; i++) {
        struct book_request *q = &book->requests[i];
        if (q->live && q->paused && book_control(book, ENGINE_RESUME, q->r.id))
            q->paused = false;
    }
}

bool book_has_class(const struct book *book, uint32_t class)
{
    for (uint32_t i = 0; i < BOOK_ROOM; i++) {
        if (book->requests[i].live && book->requests[i].r.class == class)
            return true;
    }
    return false;
}

// ---- what must come ----

static void expect_next(struct book_request *q)
{
    struct sample_params p = {.temperature = q->r.temperature,
                              .top_p = q->r.top_p,
                              .top_k = q->r.top_k,
                              .seed = q->r.seed,
                              .counter = q->got};
    q->next = print_token(q->reference.logits, &p, SIM_VOCAB);
}

static void start(struct book *book, struct book_request *q)
{
    if (q->started)
        return;
    q->started = true;
    sim_reference_begin(&q->reference, book->world->model, q->adapter);
    for (uint32_t i = 0; i < q->r.prompt_tokens; i++)
        sim_reference_feed(&q->reference, q->prompt[i]);
    expect_next(q);
}

// Cuts the text at the first stop string.
static bool find_stop(struct book_request *q)
{
    const char *first = NULL;
    q->text[q->text_bytes] = 0;
    for (uint32_t i = 0; i < q->r.stop_strings; i++) {
        const char *at = strstr(q->text, q->stop[i]);
        if (at && (!first || at < first))
            first = at;
    }
    if (!first)
        return false;
    q->text_bytes = (uint32_t)(first - q->text);
    return true;
}

static bool stops_at(const struct book *book, const struct book_request *q, int32_t token)
{
    const struct model_config *c = &book->world->model->model.config;
    for (uint32_t i = 0; i < q->r.stop_tokens; i++) {
        if (q->stop_token[i] == token)
            return true;
    }
    for (uint32_t i = 0; i < c->eos_count && !q->r.ignore_eos; i++) {
        if ((int32_t)c->eos[i] == token)
            return true;
    }
    return false;
}

static void end_reference(struct book_request *q, enum engine_finish finish, bool flush)
{
    q->ended = true;
    q->finish = finish;
    if (flush)
        q->text_bytes +=
            (uint32_t)sim_decode_finish(NULL, q->decode_state, q->text + q->text_bytes, 8);
}

// The reference takes the token that was seen.
static void advance(struct book *book, struct book_request *q, int32_t token)
{
    q->got++;
    if (stops_at(book, q, token)) {
        end_reference(q, ENGINE_FINISH_STOP, true);
        return;
    }
    q->text_bytes += (uint32_t)sim_decode(NULL, q->decode_state, token, q->text + q->text_bytes, 8);
    if (find_stop(q)) {
        book->counts.texts_cut++;
        end_reference(q, ENGINE_FINISH_STOP, false);
    } else if (q->got == q->r.max_tokens) {
        end_reference(q, ENGINE_FINISH_LENGTH, true);
    } else {
        sim_reference_feed(&q->reference, token);
        expect_next(q);
    }
}

static void check_text(struct book *book, struct book_request *q, const char *text, size_t bytes)
{
    if (q->text_got + bytes > q->text_bytes || memcmp(q->text + q->text_got, text, bytes) != 0)
        wrong(book, q, "text \"%.*s\" after %u bytes; the reference has \"%.*s\"", (int)bytes, text,
              q->text_got, (int)q->text_bytes, q->text);
    q->text_got += (uint32_t)bytes;
}

static struct book_request *find(struct book *book, uint64_t id)
{
    for (uint32_t i = 0; i < BOOK_ROOM; i++) {
        if (book->requests[i].live && book->requests[i].r.id == id)
            return &book->requests[i];
    }
    wrong(book, NULL, "an event for request %llu, which does not live", (unsigned long long)id);
}

static void on_text(struct book *book, const void *record, size_t bytes)
{
    struct engine_text t;
    memcpy(&t, record, sizeof t);
    CHECK(bytes == sizeof t + t.text_bytes);
    struct book_request *q = find(book, t.id);
    start(book, q);
    if (q->ended)
        wrong(book, q, "token %d after the last one", t.token);
    if (t.index != q->got || t.token != q->next)
        wrong(book, q, "token %u is %d; the reference says %d for token %u", t.index, t.token,
              q->next, q->got);
    if (t.logprob != print_logprob(q->reference.logits) || t.tops != q->r.tops)
        wrong(book, q, "logprob %g or tops %u are wrong", (double)t.logprob, t.tops);
    for (uint32_t i = 0; i < t.tops; i++) {
        if (t.top_token[i] != print_top_token(q->reference.logits, i, SIM_VOCAB))
            wrong(book, q, "top token %u is wrong", i);
    }
    advance(book, q, t.token);
    check_text(book, q, (const char *)record + sizeof t, t.text_bytes);
    book->counts.tokens++;
}

static void check_good_end(struct book *book, struct book_request *q, const struct engine_done *d)
{
    if (!q->ended || d->finish != (uint32_t)q->finish)
        wrong(book, q, "finished with reason %u; the reference says %u", d->finish,
              q->ended ? (unsigned)q->finish : 0);
    if (q->text_got != q->text_bytes)
        wrong(book, q, "the text has %u bytes; the reference has %u", q->text_got, q->text_bytes);
    if (d->generated_tokens != q->got || d->prompt_tokens != q->r.prompt_tokens ||
        d->cached_tokens > q->r.prompt_tokens)
        wrong(book, q, "counts %u, %u, %u are wrong", d->generated_tokens, d->prompt_tokens,
              d->cached_tokens);
    book->counts.stops += d->finish == ENGINE_FINISH_STOP;
    book->counts.lengths += d->finish == ENGINE_FINISH_LENGTH;
}

static bool may_end_so(struct book *book, struct book_request *q, const struct engine_done *d)
{
    switch ((enum status)d->status) {
    case STATUS_CANCELLED:
        book->counts.cancelled++;
        return q->cancelled && d->finish == ENGINE_FINISH_CANCELLED;
    case STATUS_DEADLINE:
        book->counts.deadlines++;
        return q->r.deadline_us && book->world->now_us >= q->r.deadline_us;
    case STATUS_NOT_FOUND:
        book->counts.refused++;
        return q->not_found && !q->got;
    case STATUS_LIMIT:
        book->counts.refused++;
        // Pinned adapters leave room for any one request without an adapter.
        if (book->counts.keeps && q->adapter && strstr(d->message, "larger than the pool"))
            return !q->got;
        return !book->mild && !q->got && book->live >= book->world->options.queue_max;
    case STATUS_SHUTTING_DOWN:
        book->counts.refused++;
        return book->quitting || (!q->got && (q->after_drain || book->faults));
    case STATUS_NUMERIC:
        start(book, q);
        book->counts.numeric++;
        return q->next == SAMPLE_NOT_A_NUMBER;
    default:
        book->counts.failed++;
        return book->faults;
    }
}

static void on_done(struct book *book, const void *record, size_t bytes)
{
    struct engine_done d;
    memcpy(&d, record, sizeof d);
    CHECK(bytes == sizeof d + d.text_bytes);
    struct book_request *q = find(book, d.id);
    if (d.text_bytes)
        check_text(book, q, (const char *)record + sizeof d, d.text_bytes);
    if (!d.status)
        check_good_end(book, q, &d);
    else if (!may_end_so(book, q, &d))
        wrong(book, q, "ended with %s: %.200s", status_code((enum status)d.status), d.message);
    q->live = false;
    book->live--;
    book->counts.done++;
}

static void on_reply(struct book *book, const void *record)
{
    struct engine_reply r;
    memcpy(&r, record, sizeof r);
    enum status expected = book->reply_expected[r.id % 256];
    if (!book->replies_due || !may_be_answered(expected, (enum status)r.status))
        wrong(book, NULL, "reply %llu is %s (%.200s), not %s", (unsigned long long)r.id,
              status_code((enum status)r.status), r.message, status_code(expected));
    book->counts.keeps_done += expected == STATUS_COUNT && !r.status;
    book->replies_due--;
    book->counts.replies++;
}

void book_take_events(struct book *book, uint32_t events_max)
{
    const void *record;
    size_t bytes;
    while (events_max-- && ring_peek(book->world->port.events, &record, &bytes)) {
        uint32_t kind;
        memcpy(&kind, record, sizeof kind);
        if (book->stopped)
            wrong(book, NULL, "an event of kind %u after ENGINE_STOPPED", kind);
        if (kind == ENGINE_TEXT)
            on_text(book, record, bytes);
        else if (kind == ENGINE_DONE)
            on_done(book, record, bytes);
        else if (kind == ENGINE_REPLY)
            on_reply(book, record);
        else if (kind == ENGINE_STOPPED)
            book->stopped = true;
        else
            wrong(book, NULL, "an event of unknown kind %u", kind);
        ring_pop(book->world->port.events);
    }
}

// ---- starvation ----

void book_watch(struct book *book, uint64_t bound_us)
{
    const struct book_request *head = NULL;
    for (uint32_t i = 0; i < BOOK_ROOM; i++) {
        const struct book_request *q = &book->requests[i];
        if (q->live && !q->paused && !q->ended &&
            (!head || q->r.class < head->r.class ||
             (q->r.class == head->r.class && q->order < head->order)))
            head = q;
    }
    uint64_t now = book->world->now_us;
    if (!head || head->r.id != book->head_id || head->got != book->head_got) {
        book->head_id = head ? head->r.id : 0;
        book->head_got = head ? head->got : 0;
        book->head_since_us = now;
        return;
    }
    uint64_t waited = now - book->head_since_us;
    if (waited > book->counts.wait_max_us)
        book->counts.wait_max_us = waited;
    if (waited > bound_us)
        wrong(book, head, "the most urgent request has waited %llu us without a token",
              (unsigned long long)waited);
}
