// SPDX-License-Identifier: Apache-2.0
#include "runtime/cli/wire.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/log.h"
#include "runtime/model/synth.h"

// ---- text ----

// The text of a tokenizer.json whose ids are the bytes themselves: for random models. Each byte is
// written as the character that byte-level BPE gives it (GPT-2).
static enum status load_byte_tokenizer(struct tokenizer **out, struct fault *fault)
{
    char text[8192];
    unsigned moved = 0;
    int at = snprintf(text, sizeof text,
                      "{\"version\":\"1.0\",\"truncation\":null,\"padding\":null,"
                      "\"added_tokens\":[],\"normalizer\":null,\"pre_tokenizer\":{\"type\":"
                      "\"ByteLevel\",\"add_prefix_space\":false,\"trim_offsets\":false,"
                      "\"use_regex\":false},\"post_processor\":null,\"decoder\":{\"type\":"
                      "\"ByteLevel\",\"add_prefix_space\":false,\"trim_offsets\":false,"
                      "\"use_regex\":false},\"model\":{\"type\":\"BPE\",\"vocab\":{");
    for (unsigned byte = 0; byte < 256; byte++) {
        bool itself = (byte >= 33 && byte <= 126) || (byte >= 161 && byte != 173);
        at += snprintf(text + at, sizeof text - (size_t)at, "%s\"\\u%04x\":%u", byte ? "," : "",
                       itself ? byte : 256 + moved, byte);
        moved += !itself;
    }
    at += snprintf(text + at, sizeof text - (size_t)at, "},\"merges\":[]}}");
    return tokenizer_load("the byte tokenizer", text, (size_t)at, out, fault);
}

enum status wire_text_load(const struct settings *settings, struct wire_text *out,
                           struct fault *fault)
{
    memset(out, 0, sizeof *out);
    if (!settings->model)
        return fault_set(fault, STATUS_INVALID, "say which model: --model DIR.");
    enum status status = synth_is_name(settings->model)
                             ? load_byte_tokenizer(&out->tokenizer, fault)
                             : tokenizer_load_in(settings->model, &out->tokenizer, fault);
    if (!status && token_scratch_create(&out->scratch))
        status = fault_set(fault, STATUS_NO_MEMORY, "out of memory for the tokenizer.");
    if (status)
        wire_text_clear(out);
    return status;
}

void wire_text_clear(struct wire_text *text)
{
    token_list_clear(&text->list);
    token_scratch_destroy(text->scratch);
    tokenizer_free(text->tokenizer);
    memset(text, 0, sizeof *text);
}

enum status wire_encode(struct wire_text *text, const char *bytes, size_t count, int32_t *out,
                        size_t max, size_t *tokens)
{
    text->list.count = 0;
    enum status status = tokenizer_encode(text->tokenizer, text->scratch, bytes, count,
                                          TOKENIZE_TEMPLATE, max, &text->list, NULL);
    if (status)
        return status;
    for (size_t i = 0; i < text->list.count; i++)
        out[i] = (int32_t)text->list.ids[i];
    *tokens = text->list.count;
    return STATUS_OK;
}

enum status wire_decode(const struct wire_text *text, const int32_t *tokens, size_t count,
                        char *out, size_t max, size_t *bytes)
{
    size_t at = 0;
    for (size_t i = 0; i < count; i++) {
        uint32_t id = (uint32_t)tokens[i];
        at += tokenizer_decode(text->tokenizer, &id, 1, false, (uint8_t *)out + at, max - at);
        if (at > max)
            return STATUS_LIMIT;
    }
    *bytes = at;
    return STATUS_OK;
}

_Static_assert(sizeof(struct token_stream) <= ENGINE_DECODE_STATE, "state fits a sequence");

static size_t engine_decode(void *context, uint8_t *state, int32_t token, char *out, size_t room)
{
    struct token_stream stream;
    if (room < TOKEN_STREAM_ROOM)
        return 0;
    memcpy(&stream, state, sizeof stream);
    size_t n = token_stream_push(context, &stream, (uint32_t)token, out);
    memcpy(state, &stream, sizeof stream);
    return n;
}

static size_t engine_finish(void *context, uint8_t *state, char *out, size_t room)
{
    struct token_stream stream;
    (void)context;
    (void)room;
    memcpy(&stream, state, sizeof stream);
    return token_stream_flush(&stream, out);
}

// ---- stack ----

enum status wire_state_directory(const struct settings *s, char *out, size_t room,
                                 struct fault *fault)
{
    const char *home =
        getenv("HOME"); // the default's place; everything else is in the option table
    int n = s->state_dir ? snprintf(out, room, "%s", s->state_dir)
                         : snprintf(out, room, "%s/.local/state/polder", home ? home : "/var/lib");
    if (n < 0 || (size_t)n >= room)
        return fault_set(fault, STATUS_INVALID, "--state-dir is too long.");
    return STATUS_OK;
}

static enum status dtype_of(const char *text, enum dtype *out, struct fault *fault)
{
    if (!strcmp(text, "bfloat16") || !strcmp(text, "bf16") || !strcmp(text, "auto"))
        *out = DTYPE_BF16;
    else if (!strcmp(text, "float32") || !strcmp(text, "f32") || !strcmp(text, "float"))
        *out = DTYPE_F32;
    else
        return fault_set(fault, STATUS_INVALID,
                         "--dtype \"%.40s\": bfloat16 and float32 are supported.", text);
    return STATUS_OK;
}

static void show_plan(void *context, const char *line)
{
    (void)context;
    (void)fprintf(stderr, "%s\n", line);
}

// A bar on a terminal, a line at the end elsewhere.
static void show_progress(void *context, uint64_t done, uint64_t total)
{
    enum { WIDTH = 40 };
    (void)context;
    if (!total || !isatty(STDERR_FILENO))
        return;
    int filled = (int)((double)done / (double)total * WIDTH);
    char bar[WIDTH + 1];
    for (int i = 0; i < WIDTH; i++)
        bar[i] = i < filled ? '#' : '.';
    bar[WIDTH] = 0;
    (void)fprintf(stderr, "\rloading [%s] %3.0f %%%s", bar, 100.0 * (double)done / (double)total,
                  done >= total ? "\n" : "");
}

enum status wire_stack_options(const struct settings *settings, const struct tokenizer *tokenizer,
                               char *state, size_t state_room, struct stack_options *out,
                               struct fault *fault)
{
    enum dtype dtype = DTYPE_BF16;
    if (!settings->model)
        return fault_set(fault, STATUS_INVALID, "say which model: --model DIR.");
    if (settings->segment_halves > 12)
        return fault_set(fault, STATUS_INVALID, "--segment-halves is at most 12 (six layers).");
    if (settings->gpu_memory_utilization > 1)
        return fault_set(fault, STATUS_INVALID,
                         "--gpu-memory-utilization is a share of the free memory, at most 1.");
    enum status status = dtype_of(settings->dtype, &dtype, fault);
    if (!status)
        status = wire_state_directory(settings, state, state_room, fault);
    if (status)
        return status;
    const char *isa = settings->instruction_set;
    *out = (struct stack_options){.model = settings->model,
                                  .state_directory = state,
                                  .device = settings->device,
                                  .gpu_memory_utilization = settings->gpu_memory_utilization,
                                  .batch_invariant = settings->batch_invariant,
                                  .dtype = dtype,
                                  .instruction_set = isa && strcmp(isa, "best") != 0 ? isa : NULL,
                                  .threads = settings->threads,
                                  .pool_bytes = settings->pool_bytes,
                                  .host_bytes = settings->host_bytes,
                                  .page_bytes = settings->page_bytes,
                                  .context_max = settings->max_model_len,
                                  .sequences_max = settings->max_num_seqs,
                                  .rows_max = settings->max_num_batched_tokens,
                                  .queue_max = settings->max_queue,
                                  .adapters_max = settings->max_adapters,
                                  .rank_max = settings->max_lora_rank,
                                  .segment_halves_max = settings->segment_halves,
                                  .h2d_gbytes_per_s = settings->h2d_gbytes_per_s,
                                  .d2h_gbytes_per_s = settings->d2h_gbytes_per_s,
                                  .read_gbytes_per_s = settings->read_gbytes_per_s,
                                  .link_latency_us = settings->link_latency_us,
                                  .no_prefix_sharing = settings->no_prefix_caching,
                                  .no_plan_ahead = settings->no_plan_ahead,
                                  .trace = settings->trace_plan ? show_plan : NULL,
                                  .progress = show_progress};
    if (tokenizer) {
        out->decoder = (struct engine_text_decoder){.decode = engine_decode,
                                                    .finish = engine_finish,
                                                    .context = (void *)(uintptr_t)tokenizer};
    }
    return STATUS_OK;
}

static enum status add_module(struct stack *stack, const char *module, struct fault *fault)
{
    char name[ADAPTER_NAME_MAX];
    const char *equals = strchr(module, '=');
    struct adapter_report report;
    if (!equals || equals == module || (size_t)(equals - module) >= sizeof name)
        return fault_set(fault, STATUS_INVALID, "--lora-modules \"%.80s\" is not NAME=DIR.",
                         module);
    memcpy(name, module, (size_t)(equals - module));
    name[equals - module] = 0;
    enum status status = stack_add_adapter(stack, name, equals + 1, &report, fault);
    if (!status)
        log_line(LOG_INFO,
                 "adapter %s: applied to %u of %u matrices, rank %u to %u, %llu bytes, %s%s%s",
                 name, report.matrices_applied, report.matrices_possible, report.rank_min,
                 report.rank_max, (unsigned long long)report.bytes, report.layout,
                 report.ignored[0] ? "; ignored fields: " : "", report.ignored);
    return status;
}

static uint32_t tenant_number(void *context, const char *name)
{
    const struct tenants *tenants = context;
    for (uint32_t i = 0; i < tenants_count(tenants); i++) {
        if (!strcmp(tenants_at(tenants, i)->name, name))
            return i;
    }
    return UINT32_MAX;
}

// Open access: everybody is one tenant.
static uint32_t local_number(void *context, const char *name)
{
    (void)context;
    return strcmp(name, TENANT_LOCAL) != 0 ? UINT32_MAX : 0;
}

enum status wire_stack(const struct settings *settings, const struct tokenizer *tokenizer,
                       const struct tenants *tenants, bool server, struct stack **out,
                       struct fault *fault)
{
    struct stack_options options;
    char state[ENGINE_PATH], line[400];
    enum status status =
        wire_stack_options(settings, tokenizer, state, sizeof state, &options, fault);
    if (status)
        return status;
    // A reload may add tenants, so the engine has room for as many as a table may hold.
    options.tenants_max = tenants ? TENANTS_MAX : 1;
    options.owns_state = server;
    status = stack_create(&options, out, fault);
    if (status)
        return status;
    // The option's adapters go first: a name given there replaces a store file of the same name.
    for (uint32_t i = 0; i < settings->lora_modules.count && !status; i++)
        status = add_module(*out, settings->lora_modules.item[i], fault);
    if (status) {
        stack_destroy(*out);
        *out = NULL;
        return status;
    }
    uint32_t found = stack_load_adapters(*out,
                                         tenants  ? tenant_number
                                         : server ? local_number
                                                  : NULL,
                                         (void *)(uintptr_t)tenants);
    stack_describe(*out, line, sizeof line);
    log_line(LOG_INFO, "%s", line);
    if (found)
        log_line(LOG_INFO, "%u adapters from the state directory", found);
    return STATUS_OK;
}

void wire_model_name(const struct settings *settings, char *out, size_t room)
{
    if (settings->served_model_name) {
        (void)snprintf(out, room, "%s", settings->served_model_name);
        return;
    }
    size_t end = strlen(settings->model);
    while (end > 1 && settings->model[end - 1] == '/')
        end--;
    size_t start = end;
    while (start && settings->model[start - 1] != '/')
        start--;
    (void)snprintf(out, room, "%.*s", (int)(end - start), settings->model + start);
}
