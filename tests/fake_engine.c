// SPDX-License-Identifier: Apache-2.0
// Keeps the promises of port.h: one ENGINE_DONE per request, texts in order, events only when the
// ring has room. stats answers with the counters the tests look at (cancels, pauses, resumes,
// running).
#include "tests/fake_engine.h"

#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/check.h"
#include "base/clock.h"

enum { ADAPTERS_MAX = 16 };

struct sequence {
    bool used, paused, cancelled;
    struct engine_request request;
    int32_t prompt[FAKE_CONTEXT];
    int32_t stop_token[ENGINE_STOPS_MAX];
    char stop[ENGINE_STOPS_MAX][ENGINE_STOP_BYTES_MAX + 1];
    uint32_t generated;
    uint64_t arrived_us, due_us, first_us;
    char held[8]; // bytes of an unfinished character, and one more character when there are stop
                  // strings
    uint32_t held_bytes;
    char tail[2 * ENGINE_STOP_BYTES_MAX]; // the end of the text, to look for stop strings
};

struct fake_engine {
    struct fake_engine_options options;
    struct clock clock;
    pthread_t thread;
    bool draining, quit;
    uint64_t requests, cancels, pauses, resumes, done;
    uint32_t running;
    struct sequence sequences[FAKE_QUEUE];
    char adapter[ADAPTERS_MAX][ENGINE_ADAPTER_NAME];
    uint32_t owner[ADAPTERS_MAX];
};

// ---- events ------------------------------------------------------------------------------------

static bool push(struct fake_engine *engine, const void *record, size_t bytes)
{
    uint64_t one = 1;
    if (ring_push(engine->options.port->events, record, bytes))
        return false;
    (void)!write(engine->options.port->event_wake, &one, sizeof one);
    return true;
}

static void push_always(struct fake_engine *engine, const void *record, size_t bytes)
{
    while (!push(engine, record, bytes))
        (void)usleep(100);
}

// Bytes at the start of held[0..count) that are complete characters.
static uint32_t complete_bytes(const char *held, uint32_t count)
{
    uint32_t at = 0;
    while (at < count) {
        uint8_t lead = (uint8_t)held[at];
        uint32_t length = lead < 0xc0 ? 1 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
        if (at + length > count)
            break;
        at += length;
    }
    return at;
}

static bool push_done(struct fake_engine *engine, struct sequence *s, enum engine_finish finish,
                      enum status status)
{
    uint64_t now = clock_now_us(&engine->clock);
    struct {
        struct engine_done done;
        char text[8];
    } record = {.done = {.kind = ENGINE_DONE,
                         .status = status,
                         .id = s->request.id,
                         .finish = finish,
                         .prompt_tokens = s->request.prompt_tokens,
                         .generated_tokens = s->generated,
                         .queue_us = 100,
                         .first_token_us = s->first_us ? s->first_us - s->arrived_us : 0,
                         .total_us = now - s->arrived_us}};
    if (finish == ENGINE_FINISH_LENGTH) {
        record.done.text_bytes = complete_bytes(s->held, s->held_bytes);
        memcpy(record.text, s->held, s->held_bytes);
    }
    if (!push(engine, &record, sizeof record.done + record.done.text_bytes))
        return false;
    s->used = false;
    engine->running--;
    engine->done++;
    return true;
}

static void refuse(struct fake_engine *engine, const struct engine_request *request,
                   enum status status, const char *message)
{
    struct engine_done done = {
        .kind = ENGINE_DONE, .status = status, .id = request->id, .finish = ENGINE_FINISH_ERROR};
    (void)snprintf(done.message, sizeof done.message, "%s", message);
    push_always(engine, &done, sizeof done);
}

// ---- tokens ------------------------------------------------------------------------------------

static size_t token_text(int32_t token, char out[64])
{
    if (token == FAKE_EOS)
        return 0;
    if (token > FAKE_EOS) {
        memset(out, ' ', (size_t)(token - FAKE_EOS));
        return (size_t)(token - FAKE_EOS);
    }
    out[0] = (char)token;
    return 1;
}

static bool ends_with_stop(struct sequence *s, const char *text, size_t bytes)
{
    for (size_t i = 0; i < bytes; i++) {
        memmove(s->tail, s->tail + 1, sizeof s->tail - 1);
        s->tail[sizeof s->tail - 1] = text[i];
    }
    for (uint32_t i = 0; i < s->request.stop_strings; i++) {
        size_t length = strlen(s->stop[i]);
        if (!memcmp(s->tail + sizeof s->tail - length, s->stop[i], length))
            return true;
    }
    return false;
}

// What may be given out after `token`; with stop strings one byte is always held back.
static uint32_t text_after(struct sequence *s, int32_t token, char out[96])
{
    char joined[96];
    memcpy(joined, s->held, s->held_bytes);
    uint32_t count = s->held_bytes + (uint32_t)token_text(token, joined + s->held_bytes);
    uint32_t ready = complete_bytes(joined, count);
    if (s->request.stop_strings && ready)
        ready = complete_bytes(joined, ready - 1);
    if (count - ready > sizeof s->held)
        ready = count;
    memcpy(out, joined, ready);
    s->held_bytes = count - ready;
    memcpy(s->held, joined + ready, s->held_bytes);
    return ready;
}

static bool is_stop_token(const struct sequence *s, int32_t token)
{
    for (uint32_t i = 0; i < s->request.stop_tokens; i++) {
        if (s->stop_token[i] == token)
            return true;
    }
    return token == FAKE_EOS && !s->request.ignore_eos;
}

static void emit_token(struct fake_engine *engine, struct sequence *s, uint64_t now)
{
    struct {
        struct engine_text text;
        char bytes[96];
    } record = {.text = {.kind = ENGINE_TEXT, .id = s->request.id, .index = s->generated}};
    if (ring_room(engine->options.port->events) < sizeof record + sizeof(struct engine_done) + 64)
        return;
    int32_t token = s->prompt[s->generated % s->request.prompt_tokens];
    char piece[64];
    size_t piece_bytes = token_text(token, piece);
    record.text.token = token;
    record.text.logprob = -0.5f;
    record.text.tops = s->request.tops;
    for (uint32_t i = 0; i < s->request.tops; i++) {
        record.text.top_token[i] = (token + (int32_t)i) % FAKE_VOCAB;
        record.text.top_logprob[i] = -0.5f - (float)i;
    }
    bool stopped = is_stop_token(s, token);
    if (!stopped)
        record.text.text_bytes = text_after(s, token, record.bytes);
    s->generated++;
    if (!s->first_us)
        s->first_us = now;
    CHECK(push(engine, &record, sizeof record.text + record.text.text_bytes));
    s->due_us = now + engine->options.delay_us;
    stopped = stopped || ends_with_stop(s, piece, piece_bytes);
    if (stopped)
        CHECK(push_done(engine, s, ENGINE_FINISH_STOP, STATUS_OK));
    else if (s->generated == s->request.max_tokens)
        CHECK(push_done(engine, s, ENGINE_FINISH_LENGTH, STATUS_OK));
}

static uint64_t advance(struct fake_engine *engine, struct sequence *s, uint64_t now)
{
    if (engine->quit)
        (void)push_done(engine, s, ENGINE_FINISH_ERROR, STATUS_SHUTTING_DOWN);
    else if (s->cancelled)
        (void)push_done(engine, s, ENGINE_FINISH_CANCELLED, STATUS_CANCELLED);
    else if (s->request.deadline_us && now > s->request.deadline_us)
        (void)push_done(engine, s, ENGINE_FINISH_ERROR, STATUS_DEADLINE);
    else if (!s->paused && now >= s->due_us)
        emit_token(engine, s, now);
    return s->used && !s->paused ? s->due_us : UINT64_MAX;
}

// ---- commands ----------------------------------------------------------------------------------

static uint32_t find_adapter(const struct fake_engine *engine, const char *name)
{
    for (uint32_t i = 0; i < ADAPTERS_MAX; i++) {
        if (engine->adapter[i][0] && !strcmp(engine->adapter[i], name))
            return i;
    }
    return ADAPTERS_MAX;
}

static void take_request(struct fake_engine *engine, const struct engine_request *request)
{
    struct sequence *s = NULL;
    for (uint32_t i = 0; i < FAKE_QUEUE && !s; i++) {
        if (!engine->sequences[i].used)
            s = &engine->sequences[i];
    }
    CHECK(request->prompt_tokens && request->prompt_tokens + request->max_tokens <= FAKE_CONTEXT);
    if (engine->draining) {
        refuse(engine, request, STATUS_SHUTTING_DOWN, "draining");
    } else if (!s) {
        refuse(engine, request, STATUS_LIMIT, "the queue is full");
    } else if (request->adapter[0] && find_adapter(engine, request->adapter) == ADAPTERS_MAX) {
        refuse(engine, request, STATUS_NOT_FOUND, "no such adapter");
    } else {
        const char *at = (const char *)(request + 1);
        memset(s, 0, sizeof *s);
        s->used = true;
        s->request = *request;
        memcpy(s->prompt, at, request->prompt_tokens * sizeof(int32_t));
        at += request->prompt_tokens * sizeof(int32_t);
        memcpy(s->stop_token, at, request->stop_tokens * sizeof(int32_t));
        at += request->stop_tokens * sizeof(int32_t);
        for (uint32_t i = 0; i < request->stop_strings; i++) {
            uint16_t bytes;
            memcpy(&bytes, at, sizeof bytes);
            memcpy(s->stop[i], at + sizeof bytes, bytes);
            at += sizeof bytes + bytes;
        }
        s->arrived_us = clock_now_us(&engine->clock);
        s->due_us = s->arrived_us + engine->options.delay_us;
        engine->running++;
        engine->requests++;
    }
}

static void push_reply(struct fake_engine *engine, uint64_t id, enum status status,
                       const char *text)
{
    struct {
        struct engine_reply reply;
        char text[4096];
    } record = {.reply = {.kind = ENGINE_REPLY, .status = status, .id = id}};
    (void)snprintf(record.reply.message, sizeof record.reply.message, "%s",
                   status_sentence(status));
    record.reply.bytes = (uint32_t)snprintf(record.text, sizeof record.text, "%s", text);
    push_always(engine, &record, sizeof record.reply + record.reply.bytes);
}

static void take_adapter(struct fake_engine *engine, const struct engine_adapter_command *command)
{
    uint32_t at = find_adapter(engine, command->name);
    if (command->kind != ENGINE_ADAPTER_ADD && command->kind != ENGINE_ADAPTER_REMOVE) {
        // Every adapter has 1000 bytes and nobody has pinned one before.
        bool pins = command->kind == ENGINE_ADAPTER_PIN && command->pinned_bytes_max < 1000;
        push_reply(engine, command->id,
                   at == ADAPTERS_MAX ? STATUS_NOT_FOUND
                   : pins             ? STATUS_LIMIT
                                      : STATUS_OK,
                   "");
        return;
    }
    if (command->kind == ENGINE_ADAPTER_REMOVE) {
        bool own = at < ADAPTERS_MAX && engine->owner[at] == command->owner;
        if (own)
            engine->adapter[at][0] = 0;
        push_reply(engine, command->id, own ? STATUS_OK : STATUS_NOT_FOUND, "");
        return;
    }
    if (at < ADAPTERS_MAX) {
        bool mine =
            engine->owner[at] == command->owner || engine->owner[at] >= engine->options.tenants;
        push_reply(engine, command->id, command->replace && mine ? STATUS_OK : STATUS_EXISTS, "");
        return;
    }
    for (at = 0; at < ADAPTERS_MAX && engine->adapter[at][0]; at++)
        ;
    if (at < ADAPTERS_MAX) {
        memcpy(engine->adapter[at], command->name, sizeof engine->adapter[at]);
        engine->owner[at] = command->owner;
    }
    push_reply(engine, command->id, at < ADAPTERS_MAX ? STATUS_OK : STATUS_LIMIT, "");
}

// The first name behind `after`; ADAPTERS_MAX: none.
static uint32_t next_adapter(const struct fake_engine *engine, const char *after)
{
    uint32_t best = ADAPTERS_MAX;
    for (uint32_t i = 0; i < ADAPTERS_MAX; i++)
        if (engine->adapter[i][0] && strcmp(engine->adapter[i], after) > 0 &&
            (best == ADAPTERS_MAX || strcmp(engine->adapter[i], engine->adapter[best]) < 0))
            best = i;
    return best;
}

// "someday": what lists may get to say.
static void put_numbers(char *out, size_t room, bool claimed)
{
    (void)snprintf(out, room,
                   ",\"pinned\":true,\"claimed\":%s,\"resident\":true,\"pages\":1,\"users\":3,"
                   "\"device_bytes\":1000,\"host_bytes\":1000,\"file_bytes\":1000,\"rank_min\":4,"
                   "\"rank_max\":8,\"bytes\":900,\"applied\":4,\"possible\":8,\"layout\":\"none\","
                   "\"version\":1,\"digest\":\"d\",\"source\":\"s\",\"hits\":5,\"misses\":6,"
                   "\"loads\":7,\"load_us\":8,\"load_us_max\":9,\"part_pages\":10,"
                   "\"part_misses\":11,\"someday\":12",
                   claimed ? "true" : "false");
}

// Pages of two, whatever is asked for, so that whoever asks has to ask again.
static void push_list(struct fake_engine *engine, const struct engine_list *list)
{
    enum { PAGE = 2 };
    char text[4096] = "{\"adapters\":[", numbers[1024] = "";
    size_t used = strlen(text);
    const char *after = list->after;
    uint32_t at = 0;
    for (uint32_t n = 0; n < PAGE && (at = next_adapter(engine, after)) < ADAPTERS_MAX; n++) {
        after = engine->adapter[at];
        if (engine->options.numbers)
            put_numbers(numbers, sizeof numbers, engine->owner[at] == list->tenant);
        used +=
            (size_t)snprintf(text + used, sizeof text - used, "%s{\"name\":\"%s\",\"owner\":%u%s}",
                             n ? "," : "", engine->adapter[at], engine->owner[at], numbers);
    }
    bool more = next_adapter(engine, after) < ADAPTERS_MAX;
    (void)snprintf(text + used, sizeof text - used, "],\"more\":%s}", more ? "true" : "false");
    push_reply(engine, list->id, STATUS_OK, text);
}

static void push_stats(struct fake_engine *engine, uint64_t id)
{
    char text[512];
    (void)snprintf(
        text, sizeof text,
        "{\"requests\":%llu,\"done\":%llu,\"cancels\":%llu,\"pauses\":%llu,\"resumes\":%llu,"
        "\"running\":%u}",
        (unsigned long long)engine->requests, (unsigned long long)engine->done,
        (unsigned long long)engine->cancels, (unsigned long long)engine->pauses,
        (unsigned long long)engine->resumes, engine->running);
    push_reply(engine, id, STATUS_OK, text);
}

static void steer(struct fake_engine *engine, const struct engine_control *control)
{
    for (uint32_t i = 0; i < FAKE_QUEUE; i++) {
        struct sequence *s = &engine->sequences[i];
        if (!s->used || s->request.id != control->id)
            continue;
        if (control->kind == ENGINE_CANCEL)
            s->cancelled = true;
        else
            s->paused = control->kind == ENGINE_PAUSE;
        engine->cancels += control->kind == ENGINE_CANCEL;
        engine->pauses += control->kind == ENGINE_PAUSE;
        engine->resumes += control->kind == ENGINE_RESUME;
    }
}

static void take(struct fake_engine *engine, const void *record)
{
    uint32_t kind;
    memcpy(&kind, record, sizeof kind);
    const struct engine_control *control = record;
    switch (kind) {
    case ENGINE_REQUEST:
        take_request(engine, record);
        break;
    case ENGINE_ADAPTER_ADD:
    case ENGINE_ADAPTER_REMOVE:
    case ENGINE_ADAPTER_LOAD:
    case ENGINE_ADAPTER_UNLOAD:
    case ENGINE_ADAPTER_PIN:
    case ENGINE_ADAPTER_UNPIN:
        take_adapter(engine, record);
        break;
    case ENGINE_ADAPTER_LIST:
        push_list(engine, record);
        break;
    case ENGINE_STATS:
        push_stats(engine, control->id);
        break;
    case ENGINE_DRAIN:
        engine->draining = true;
        break;
    case ENGINE_QUIT:
        engine->quit = engine->draining = true;
        break;
    default:
        steer(engine, control);
    }
}

// ---- life --------------------------------------------------------------------------------------

static void *engine_main(void *context)
{
    struct fake_engine *engine = context;
    for (;;) {
        const void *record;
        size_t bytes;
        while (ring_peek(engine->options.port->commands, &record, &bytes)) {
            take(engine, record);
            ring_pop(engine->options.port->commands);
        }
        uint64_t next = UINT64_MAX, now = clock_now_us(&engine->clock);
        for (uint32_t i = 0; i < FAKE_QUEUE && engine->running; i++) {
            if (engine->sequences[i].used) {
                uint64_t due = advance(engine, &engine->sequences[i], now);
                next = due < next ? due : next;
            }
        }
        if (engine->quit && !engine->running)
            break;
        struct pollfd wait = {.fd = engine->options.port->command_wake, .events = POLLIN};
        uint64_t left = next <= now ? 0 : next - now;
        uint64_t count;
        struct timespec timeout = {.tv_nsec = (long)(left < 5000000 ? left * 1000 : 5000000)};
        if (ppoll(&wait, 1, &timeout, NULL) > 0)
            (void)!read(wait.fd, &count, sizeof count);
    }
    struct engine_control stopped = {.kind = ENGINE_STOPPED};
    push_always(engine, &stopped, sizeof stopped);
    return NULL;
}

enum status fake_engine_start(const struct fake_engine_options *options, struct fake_engine **out)
{
    static const char *const names[] = {"acme-one", "bolt-one", "shared"};
    struct fake_engine *engine = calloc(1, sizeof *engine);
    if (!engine)
        return STATUS_NO_MEMORY;
    engine->options = *options;
    engine->clock = clock_monotonic();
    for (uint32_t i = 0; i < ARRAY_COUNT(names) && options->operator_adapters; i++) {
        (void)snprintf(engine->adapter[i], sizeof engine->adapter[i], "%s", names[i]);
        engine->owner[i] = options->tenants;
    }
    if (pthread_create(&engine->thread, NULL, engine_main, engine)) {
        free(engine);
        return STATUS_NO_MEMORY;
    }
    *out = engine;
    return STATUS_OK;
}

void fake_engine_stop(struct fake_engine *engine)
{
    (void)pthread_join(engine->thread, NULL);
    free(engine);
}

struct engine_limits fake_engine_limits(void)
{
    return (struct engine_limits){.vocab = FAKE_VOCAB,
                                  .context_tokens = FAKE_CONTEXT,
                                  .queue_max = FAKE_QUEUE,
                                  .eos_count = 1,
                                  .eos = {FAKE_EOS},
                                  .model_name = "demo"};
}

static enum status fake_encode(void *context, const char *text, size_t bytes, int32_t *out,
                               size_t max, size_t *count)
{
    (void)context;
    if (bytes > max)
        return STATUS_LIMIT;
    for (size_t i = 0; i < bytes; i++)
        out[i] = (uint8_t)text[i];
    *count = bytes;
    return STATUS_OK;
}

static enum status fake_decode(void *context, const int32_t *tokens, size_t count, char *out,
                               size_t max, size_t *bytes)
{
    (void)context;
    *bytes = 0;
    for (size_t i = 0; i < count; i++) {
        char piece[64];
        size_t length = token_text(tokens[i], piece);
        if (length > max - *bytes)
            return STATUS_LIMIT;
        memcpy(out + *bytes, piece, length);
        *bytes += length;
    }
    return STATUS_OK;
}

struct server_tokenizer fake_tokenizer(void)
{
    return (struct server_tokenizer){.encode = fake_encode, .decode = fake_decode};
}

static enum status fake_convert(void *context, const char *directory, const char *old_path,
                                const char *store_path, char *report, size_t report_bytes,
                                struct fault *fault)
{
    (void)context;
    char path[512];
    bool again = access(old_path, F_OK) == 0;
    (void)snprintf(path, sizeof path, "%s/adapter_config.json", directory);
    if (access(path, R_OK))
        return fault_set(fault, STATUS_CORRUPT, "there is no adapter_config.json.");
    (void)snprintf(path, sizeof path, "%s/slow", directory);
    if (!access(path, F_OK))
        (void)usleep(300000);
    int descriptor = open(store_path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (descriptor < 0)
        return fault_set(fault, STATUS_IO, "the store file cannot be written.");
    (void)close(descriptor);
    (void)snprintf(report, report_bytes, "{\"applied\":4,\"possible\":8,\"version\":%d}",
                   again ? 2 : 1);
    return STATUS_OK;
}

struct server_converter fake_converter(void)
{
    return (struct server_converter){.convert = fake_convert};
}
