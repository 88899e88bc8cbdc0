// SPDX-License-Identifier: Apache-2.0
// polder generate: one answer without a server. The same stack and engine as polder serve; this
// thread is the front end of the port.
#include <inttypes.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/reader.h"
#include "runtime/cli/commands.h"
#include "runtime/cli/wire.h"

enum { PROMPT_BYTES_MAX = 4 << 20 };

static enum status read_prompt(const struct settings *s, char **out, size_t *bytes,
                               struct fault *fault)
{
    if (s->prompt_file) {
        struct reader *reader = NULL;
        enum status status = reader_open(s->prompt_file, &reader, fault);
        if (status)
            return status;
        *bytes = (size_t)min_size(reader->size, PROMPT_BYTES_MAX);
        *out = malloc(*bytes + 1);
        status = *out ? reader_read(reader, 0, *out, *bytes) : STATUS_NO_MEMORY;
        reader_close(reader);
        return status ? fault_set(fault, status, "%s could not be read.", s->prompt_file)
                      : STATUS_OK;
    }
    if (!s->prompt)
        return fault_set(fault, STATUS_INVALID,
                         "say what to continue: --prompt TEXT or --prompt-file FILE.");
    *bytes = strlen(s->prompt);
    *out = strdup(s->prompt);
    return *out ? STATUS_OK : fault_set(fault, STATUS_NO_MEMORY, "out of memory.");
}

// The request record: fixed part, tokens, stop strings. Freed by the caller.
static enum status make_request(const struct settings *s, const int32_t *tokens, size_t count,
                                uint8_t **out, size_t *bytes, struct fault *fault)
{
    size_t room = sizeof(struct engine_request) + count * sizeof *tokens;
    if (s->stop.count > ENGINE_STOPS_MAX)
        return fault_set(fault, STATUS_INVALID, "at most %d stop texts are taken.",
                         ENGINE_STOPS_MAX);
    for (uint32_t i = 0; i < s->stop.count; i++) {
        size_t n = strlen(s->stop.item[i]);
        if (!n || n > ENGINE_STOP_BYTES_MAX)
            return fault_set(fault, STATUS_INVALID, "a stop text has 1 to %d bytes.",
                             ENGINE_STOP_BYTES_MAX);
        room += 2 + n;
    }
    struct engine_request r = {.kind = ENGINE_REQUEST,
                               .id = 1,
                               .class = ENGINE_STANDARD,
                               .prompt_tokens = (uint32_t)count,
                               .max_tokens = s->max_tokens,
                               .stop_strings = s->stop.count,
                               .temperature = (float)s->temperature,
                               .top_p = (float)s->top_p,
                               .top_k = s->top_k,
                               .ignore_eos = s->ignore_eos,
                               .seed = s->seed};
    if (s->adapter && strlen(s->adapter) >= sizeof r.adapter)
        return fault_set(fault, STATUS_INVALID, "the adapter name is too long.");
    if (s->adapter)
        (void)snprintf(r.adapter, sizeof r.adapter, "%s", s->adapter);
    uint8_t *record = malloc(room);
    if (!record)
        return fault_set(fault, STATUS_NO_MEMORY, "out of memory.");
    memcpy(record, &r, sizeof r);
    memcpy(record + sizeof r, tokens, count * sizeof *tokens);
    size_t at = sizeof r + count * sizeof *tokens;
    for (uint32_t i = 0; i < s->stop.count; i++) {
        uint16_t n = (uint16_t)strlen(s->stop.item[i]);
        memcpy(record + at, &n, sizeof n);
        memcpy(record + at + sizeof n, s->stop.item[i], n);
        at += sizeof n + n;
    }
    *out = record;
    *bytes = room;
    return STATUS_OK;
}

static void show_text(const struct settings *s, const struct engine_text *text)
{
    if (s->token_ids)
        (void)printf("%d ", text->token);
    else
        (void)fwrite(text + 1, 1, text->text_bytes, stdout);
    (void)fflush(stdout);
}

static int show_done(const struct settings *s, const struct engine_done *done)
{
    if (!s->token_ids)
        (void)fwrite(done + 1, 1, done->text_bytes, stdout);
    (void)printf("\n");
    if (done->status == STATUS_NOT_FOUND && s->adapter) {
        (void)fprintf(stderr, "polder: there is no adapter named \"%s\"; see --lora-modules.\n",
                      s->adapter);
        return EXIT_FAILED;
    }
    if (done->status) {
        (void)fprintf(stderr, "polder: %s\n", done->message);
        return done->status == STATUS_DEVICE ? EXIT_DEVICE : EXIT_FAILED;
    }
    double first = (double)done->first_token_us / 1e3;
    double rest = (double)(done->total_us - done->first_token_us) / 1e6;
    (void)fprintf(stderr,
                  "%u prompt tokens, %u generated; first after %.1f ms, then %.1f tokens/s\n",
                  done->prompt_tokens, done->generated_tokens, first,
                  rest > 0 ? (double)(done->generated_tokens - 1) / rest : 0.0);
    return EXIT_DONE;
}

// Shows events until the request is done.
static int listen(const struct settings *s, struct engine_port *port)
{
    for (;;) {
        const void *record;
        size_t bytes;
        while (ring_peek(port->events, &record, &bytes)) {
            uint32_t kind;
            int code = -1;
            memcpy(&kind, record, sizeof kind);
            if (kind == ENGINE_TEXT)
                show_text(s, record);
            else if (kind == ENGINE_DONE)
                code = show_done(s, record);
            ring_pop(port->events);
            if (code >= 0)
                return code;
        }
        struct pollfd wake = {.fd = port->event_wake, .events = POLLIN};
        uint64_t count;
        if (poll(&wake, 1, 1000) > 0 && read(port->event_wake, &count, sizeof count) < 0)
            continue;
    }
}

static int ask(const struct settings *s, struct wire_text *text, struct stack *stack,
               struct fault *fault)
{
    char *prompt = NULL;
    size_t prompt_bytes = 0, count = 0, bytes = 0;
    uint8_t *record = NULL;
    int code = EXIT_FAILED;
    if (read_prompt(s, &prompt, &prompt_bytes, fault))
        return complain(fault);
    size_t max = prompt_bytes + 16;
    int32_t *tokens = malloc(max * sizeof *tokens);
    enum status status =
        tokens ? wire_encode(text, prompt, prompt_bytes, tokens, max, &count) : STATUS_NO_MEMORY;
    if (status)
        (void)fault_set(fault, status, "the prompt could not be turned into tokens.");
    if (!status)
        status = make_request(s, tokens, count, &record, &bytes, fault);
    if (!status && stack_start(stack))
        status = fault_set(fault, STATUS_NO_MEMORY, "the engine thread could not be started.");
    if (!status && engine_send(stack_port(stack), record, bytes))
        status = fault_set(fault, STATUS_LIMIT, "the prompt is too long.");
    if (status)
        code = complain(fault);
    else
        code = listen(s, stack_port(stack));
    free(record);
    free(tokens);
    free(prompt);
    return code;
}

// What can be told before the model is loaded.
static enum status check_asking(const struct settings *s, struct fault *fault)
{
    if (!s->prompt && !s->prompt_file)
        return fault_set(fault, STATUS_INVALID,
                         "say what to continue: --prompt TEXT or --prompt-file FILE.");
    if (!s->max_tokens)
        return fault_set(fault, STATUS_INVALID, "--max-tokens is 0; ask for at least one token.");
    if (s->temperature > 2.0)
        return fault_set(fault, STATUS_INVALID, "--temperature is 0 to 2.");
    if (s->top_p <= 0.0 || s->top_p > 1.0)
        return fault_set(fault, STATUS_INVALID, "--top-p is above 0 and at most 1.");
    return STATUS_OK;
}

int command_generate(const struct settings *settings)
{
    struct fault fault = {.text = ""};
    struct wire_text text = {0};
    struct stack *stack = NULL;
    if (check_asking(settings, &fault) || wire_text_load(settings, &text, &fault))
        return complain(&fault);
    int code = EXIT_FAILED;
    if (wire_stack(settings, text.tokenizer, NULL, false, &stack, &fault))
        code = complain(&fault);
    else
        code = ask(settings, &text, stack, &fault);
    stack_destroy(stack);
    wire_text_clear(&text);
    return code;
}
