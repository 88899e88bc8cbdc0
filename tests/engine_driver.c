// SPDX-License-Identifier: Apache-2.0
#include "engine_driver.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "runtime/model/synth.h"

static void give_up(const char *what)
{
    (void)fprintf(stderr, "engine driver: %s\n", what);
    abort();
}

const char *driver_device(void)
{
    const char *name = getenv("POLDER_TEST_DEVICE");
    return name ? name : "cpu";
}

void driver_skip_without_device(void)
{
    struct device *device = NULL;
    struct fault fault = {.text = ""};
    if (!strcmp(driver_device(), "cpu"))
        return;
    struct cuda_options options = {.dtype = DTYPE_BF16};
    if (!device_create_cuda(&options, &device, &fault)) {
        device->table->destroy(device);
        return;
    }
    (void)printf("SKIPPED: %s\n", fault.text);
    exit(DRIVER_SKIP);
}

struct driver *driver_create(const struct stack_options *options)
{
    struct fault fault = {.text = ""};
    struct driver *d = calloc(1, sizeof *d);
    if (!d)
        give_up("out of memory");
    d->answers = calloc(DRIVER_REQUESTS_MAX, sizeof *d->answers);
    if (!d->answers || stack_create(options, &d->stack, &fault))
        give_up(fault.text);
    d->next_id = 1;
    return d;
}

void driver_destroy(struct driver *driver)
{
    stack_destroy(driver->stack);
    free(driver->answers);
    free(driver);
}

void driver_reset(struct driver *driver)
{
    memset(driver->answers, 0, DRIVER_REQUESTS_MAX * sizeof *driver->answers);
    driver->next_id = 1;
}

static uint8_t *put(uint8_t *at, const void *from, size_t bytes)
{
    memcpy(at, from, bytes);
    return at + bytes;
}

uint64_t driver_submit(struct driver *driver, const struct driver_ask *ask)
{
    struct engine_request r = {.kind = ENGINE_REQUEST,
                               .tenant = ask->tenant,
                               .id = driver->next_id++,
                               .class = ask->class,
                               .prompt_tokens = ask->prompt_tokens,
                               .max_tokens = ask->max_tokens,
                               .temperature = ask->temperature,
                               .top_p = ask->top_p > 0 ? ask->top_p : 1.0f,
                               .top_k = ask->top_k,
                               .tops = ask->tops,
                               .ignore_eos = 1,
                               .stop_tokens = ask->stop_tokens,
                               .stop_strings = ask->stop != NULL,
                               .seed = ask->seed};
    if (r.id >= DRIVER_REQUESTS_MAX)
        give_up("too many requests; use driver_reset");
    if (ask->adapter)
        (void)snprintf(r.adapter, sizeof r.adapter, "%s", ask->adapter);
    uint16_t stop_bytes = ask->stop ? (uint16_t)strlen(ask->stop) : 0;
    size_t prompt = ask->prompt_tokens * sizeof *ask->prompt;
    size_t stops = ask->stop_tokens * sizeof *ask->stop_token;
    size_t bytes =
        sizeof r + prompt + stops + (ask->stop ? sizeof stop_bytes + (size_t)stop_bytes : 0);
    uint8_t *record = malloc(bytes), *at = record;
    if (!record)
        give_up("out of memory");
    at = put(at, &r, sizeof r);
    at = put(at, ask->prompt, prompt);
    if (stops)
        at = put(at, ask->stop_token, stops);
    if (ask->stop)
        (void)put(put(at, &stop_bytes, sizeof stop_bytes), ask->stop, stop_bytes);
    if (engine_send(stack_port(driver->stack), record, bytes))
        give_up("the command ring is full");
    free(record);
    driver->open++;
    return r.id;
}

void driver_control(struct driver *driver, uint32_t kind, uint64_t id)
{
    struct engine_control c = {.kind = kind, .id = id};
    if (engine_send(stack_port(driver->stack), &c, sizeof c))
        give_up("the command ring is full");
}

static void take_text(struct driver_answer *a, const void *text, size_t bytes)
{
    size_t room = sizeof a->text - a->text_bytes;
    memcpy(a->text + a->text_bytes, text, bytes < room ? bytes : room);
    a->text_bytes += (uint32_t)(bytes < room ? bytes : room);
}

static void take_event(struct driver *driver, const void *record)
{
    uint32_t kind;
    memcpy(&kind, record, sizeof kind);
    if (kind == ENGINE_TEXT) {
        const struct engine_text *text = record;
        struct driver_answer *a = &driver->answers[text->id];
        if (a->done || a->count != text->index || a->count == DRIVER_TOKENS_MAX)
            give_up("a token out of order");
        a->logprob[a->count] = text->logprob;
        a->token[a->count++] = text->token;
        take_text(a, text + 1, text->text_bytes);
    } else if (kind == ENGINE_DONE) {
        const struct engine_done *done = record;
        struct driver_answer *a = &driver->answers[done->id];
        if (a->done)
            give_up("a second final status");
        a->done = true;
        a->status = done->status;
        a->finish = done->finish;
        a->cached = done->cached_tokens;
        a->generated = done->generated_tokens;
        take_text(a, done + 1, done->text_bytes);
        memcpy(a->message, done->message, sizeof a->message);
        driver->open--;
    }
}

enum engine_turn driver_turn(struct driver *driver)
{
    enum engine_turn turn = engine_turn(stack_engine(driver->stack));
    struct engine_port *port = stack_port(driver->stack);
    const void *record;
    size_t bytes;
    while (ring_peek(port->events, &record, &bytes)) {
        take_event(driver, record);
        ring_pop(port->events);
    }
    return turn;
}

void driver_finish(struct driver *driver)
{
    time_t start = time(NULL);
    while (driver->open) {
        if (driver_turn(driver) == ENGINE_WAITING)
            (void)usleep(20);
        if (time(NULL) - start > 300)
            give_up("requests did not finish within 300 s");
    }
    engine_check(stack_engine(driver->stack));
}

const struct driver_answer *driver_answer_of(const struct driver *driver, uint64_t id)
{
    return &driver->answers[id];
}

void driver_make_directory(char *directory, size_t room)
{
    (void)snprintf(directory, room, "/tmp/polder-test-XXXXXX");
    if (!mkdtemp(directory))
        give_up("no temporary directory");
}

void driver_make_model(char *directory, size_t room, const char *shape,
                       const char *const *overrides, size_t override_count, uint64_t seed)
{
    struct fault fault = {.text = ""};
    driver_make_directory(directory, room);
    struct synth_options o = {.directory = directory,
                              .shape = shape,
                              .overrides = overrides,
                              .override_count = override_count,
                              .seed = seed};
    if (synth_write(&o, &fault))
        give_up(fault.text);
}

void driver_remove(const char *directory)
{
    char command[400];
    (void)snprintf(command, sizeof command, "rm -rf '%s'", directory);
    if (strncmp(directory, "/tmp/polder-test-", 17) != 0 || system(command))
        give_up("the temporary directory could not be removed");
}
