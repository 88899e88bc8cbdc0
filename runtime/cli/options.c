// SPDX-License-Identifier: Apache-2.0
// See options.h. Adding an option is one line in TABLE and one field in struct settings.
#include "runtime/cli/options.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "runtime/cli/config_file.h"

enum type { STRING, UINT, SIZE, REAL, FLAG, LIST };

enum {
    STACK = COMMAND_SERVE | COMMAND_GENERATE | COMMAND_CHECK_CONFIG,
    SERVE = COMMAND_SERVE | COMMAND_CHECK_CONFIG,
    ASK = COMMAND_GENERATE | COMMAND_CHAT,
    REMOTE = COMMAND_CHAT | COMMAND_CALL | COMMAND_STATS | COMMAND_ADAPTER,
    STATE = STACK | COMMAND_ADAPTER,
    WORDS = COMMAND_CALL | COMMAND_ADAPTER | COMMAND_HELP, // take words that are not options
    ANY = 0xffff
};

struct option {
    const char *name;
    enum type type;
    int commands;
    size_t field;
    const char *value, *otherwise, *help;
};

#define FIELD(f) offsetof(struct settings, f)

static const struct option TABLE[] = {
    {"config", STRING, ANY, FIELD(config), "FILE", "", "YAML file whose keys are these options"},
    {"log-level", STRING, ANY, FIELD(log_level), "LEVEL", "info", "debug, info, warn or error"},
    {"help", FLAG, ANY, FIELD(help), "", "", "print this"},
    {"model", STRING, STATE | COMMAND_SYNTH, FIELD(model), "DIR", "",
     "Hugging Face directory of the base model, or synth:SHAPE,key=value,... for random weights "
     "in memory (command synth: whose tokenizer.json is copied)"},
    {"state-dir", STRING, STATE, FIELD(state_dir), "DIR", "~/.local/state/polder",
     "expert store, converted adapters"},
    {"device", STRING, STACK, FIELD(device), "NAME", "cpu",
     "where to run: cpu, cuda:0, cuda:1, ..."},
    {"gpu-memory-utilization", REAL, STACK, FIELD(gpu_memory_utilization), "SHARE", "as needed",
     "share of the GPU's free memory for the pool, when --pool-bytes is not given"},
    {"batch-invariant", FLAG, STACK, FIELD(batch_invariant), "", "",
     "on a GPU: the same bits whatever else runs (slower)"},
    {"dtype", STRING, STATE, FIELD(dtype), "TYPE", "bfloat16",
     "bfloat16, or float32: the reference path"},
    {"instruction-set", STRING, STACK, FIELD(instruction_set), "NAME", "best",
     "avx512bf16, avx2 or portable"},
    {"threads", UINT, STACK, FIELD(threads), "N", "all cores", "compute threads of the CPU device"},
    {"served-model-name", STRING, STACK, FIELD(served_model_name), "NAME", "the directory's name",
     "name of the base model in requests"},
    {"pool-bytes", SIZE, STACK, FIELD(pool_bytes), "BYTES", "experts + 8 contexts + 64M",
     "the pool of KV, adapters and experts"},
    {"host-bytes", SIZE, STACK, FIELD(host_bytes), "BYTES", "256M", "the host tier"},
    {"page-bytes", SIZE, STATE, FIELD(page_bytes), "BYTES", "least waste",
     "32K to 2M, a power of two"},
    {"max-model-len", UINT, STACK, FIELD(max_model_len), "N", "the model's, at most 32768",
     "tokens of one sequence"},
    {"max-num-seqs", UINT, STACK, FIELD(max_num_seqs), "N", "64", "sequences running at once"},
    {"max-num-batched-tokens", UINT, STACK, FIELD(max_num_batched_tokens), "N", "512",
     "rows of a step"},
    {"max-queue", UINT, STACK, FIELD(max_queue), "N", "256", "requests waiting"},
    {"max-adapters", UINT, STACK, FIELD(max_adapters), "N", "4096", "adapters registered"},
    {"max-lora-rank", UINT, STACK, FIELD(max_lora_rank), "N", "512",
     "largest rank accepted; costs work memory only"},
    {"lora-modules", LIST, STACK, FIELD(lora_modules), "NAME=DIR", "",
     "adapter to register at start"},
    {"h2d-gbytes-per-s", REAL, STACK, FIELD(h2d_gbytes_per_s), "X", "unlimited",
     "speed of the link to the device"},
    {"d2h-gbytes-per-s", REAL, STACK, FIELD(d2h_gbytes_per_s), "X", "unlimited", "and back"},
    {"read-gbytes-per-s", REAL, STACK, FIELD(read_gbytes_per_s), "X", "unlimited",
     "speed of file reads"},
    {"h2d-latency-us", UINT, STACK, FIELD(link_latency_us), "N", "0",
     "latency added to every copy"},
    {"segment-halves", UINT, STACK, FIELD(segment_halves), "N", "12",
     "half-layers submitted at once, 1..12"},
    {"no-prefix-caching", FLAG, STACK, FIELD(no_prefix_caching), "", "",
     "do not share equal prefixes"},
    {"no-plan-ahead", FLAG, STACK, FIELD(no_plan_ahead), "", "",
     "plan a step only when the one before has given its results"},
    {"trace-plan", FLAG, STACK, FIELD(trace_plan), "", "",
     "print every step plan to standard error"},
    {"host", STRING, SERVE, FIELD(host), "ADDRESS", "127.0.0.1", "address to listen on"},
    {"port", UINT, SERVE, FIELD(port), "N", "7077", "TCP port; 0 picks a free one"},
    {"uds", STRING, SERVE, FIELD(uds), "PATH", "", "Unix socket to listen on as well"},
    {"no-tcp", FLAG, SERVE, FIELD(no_tcp), "", "", "listen on the Unix socket only"},
    {"tenants", STRING, SERVE, FIELD(tenants), "FILE", "", "tenants.yaml: keys, adapters, limits"},
    {"adapter-dir", LIST, SERVE, FIELD(adapter_dirs), "DIR", "",
     "directory below which adapters.register may read"},
    {"max-upload-bytes", SIZE, SERVE, FIELD(max_upload_bytes), "BYTES", "0: none",
     "adapters that tenants upload, all under way together"},
    {"shutdown-timeout", UINT, SERVE, FIELD(shutdown_timeout), "SECONDS", "30",
     "after SIGTERM, time for running requests"},
    {"idle-timeout", UINT, SERVE, FIELD(idle_timeout), "SECONDS", "600",
     "idle connections are closed"},
    {"slow-reader-timeout", UINT, SERVE, FIELD(slow_reader_timeout), "SECONDS", "30",
     "a client that does not read its answers is closed"},
    {"max-connections", UINT, SERVE, FIELD(max_connections), "N", "1024", "connections at once"},
    {"max-frame-bytes", SIZE, SERVE, FIELD(max_frame_bytes), "BYTES", "4M",
     "largest request frame"},
    {"dry-run", FLAG, SERVE, FIELD(dry_run), "", "", "print what would fit, load nothing"},
    {"prompt", STRING, ASK, FIELD(prompt), "TEXT", "", "the text to continue"},
    {"prompt-file", STRING, ASK, FIELD(prompt_file), "FILE", "", "read the prompt from a file"},
    {"adapter", STRING, ASK, FIELD(adapter), "NAME", "the base model", "adapter to use"},
    {"max-tokens", UINT, ASK, FIELD(max_tokens), "N", "128", "tokens to generate"},
    {"temperature", REAL, ASK, FIELD(temperature), "X", "0", "0 is greedy"},
    {"top-p", REAL, ASK, FIELD(top_p), "X", "1", "nucleus sampling"},
    {"top-k", UINT, ASK, FIELD(top_k), "N", "0", "0 is off"},
    {"seed", SIZE, ASK | COMMAND_SYNTH, FIELD(seed), "N", "0",
     "the same seed gives the same tokens"},
    {"stop", LIST, ASK, FIELD(stop), "TEXT", "", "end the answer before this text"},
    {"ignore-eos", FLAG, ASK, FIELD(ignore_eos), "", "", "go on past the end token"},
    {"token-ids", FLAG, COMMAND_GENERATE, FIELD(token_ids), "", "",
     "print token ids instead of text"},
    {"offline", FLAG, COMMAND_ADAPTER, FIELD(offline), "", "",
     "work on the state directory; so it is with --model or --state-dir and without --connect"},
    {"manifest", STRING, COMMAND_ADAPTER, FIELD(manifest), "FILE", "",
     "add: YAML list of adapters to register in one run, which may be run again"},
    {"upload", FLAG, COMMAND_ADAPTER, FIELD(upload), "", "",
     "add: send the files to a server that cannot read the directory (its --max-upload-bytes)"},
    {"owner", STRING, COMMAND_ADAPTER, FIELD(owner), "TENANT", "the operator",
     "offline: whose adapter it is"},
    {"connect", STRING, REMOTE, FIELD(connect), "ADDRESS", "127.0.0.1:7077",
     "host:port or unix:PATH"},
    {"api-key", STRING, REMOTE, FIELD(api_key), "KEY", "", "tenant's key; better by environment"},
    {"api-key-file", STRING, REMOTE, FIELD(api_key_file), "FILE", "", "file that holds the key"},
    {"out", STRING, COMMAND_SYNTH, FIELD(out), "DIR", "", "directory to write"},
    {"shape", STRING, COMMAND_SYNTH, FIELD(shape), "NAME", "tiny", "tiny, demo, qwen3-moe-2g"},
    {"set", LIST, COMMAND_SYNTH, FIELD(set), "KEY=N", "", "change one number of the shape"},
};

static const struct {
    const char *word;
    enum command command;
    const char *arguments, *help;
} COMMANDS[] = {
    {"serve", COMMAND_SERVE, "--model DIR --tenants FILE", "serve a model to many tenants"},
    {"generate", COMMAND_GENERATE, "--model DIR --prompt TEXT", "one answer, without a server"},
    {"chat", COMMAND_CHAT, "[--connect ADDRESS]", "type, and a server continues"},
    {"call", COMMAND_CALL, "METHOD JSON", "one call of the RPC interface"},
    {"stats", COMMAND_STATS, "", "numbers of a running server"},
    {"adapter", COMMAND_ADAPTER,
     "add NAME DIR | add --manifest FILE | list | show NAME | rm NAME | verify [NAME...] | gc | "
     "pin NAME | "
     "unpin NAME | load NAME | unload NAME | stats",
     "adapters of a server, or of a state directory"},
    {"synth", COMMAND_SYNTH, "--out DIR --shape NAME", "write a random checkpoint"},
    {"check-config", COMMAND_CHECK_CONFIG, "--config FILE",
     "check options and tenants, start nothing"},
    {"hash-key", COMMAND_HASH_KEY, "< KEY",
     "hash of a key for tenants.yaml; the key comes on standard input"},
    {"version", COMMAND_VERSION, "", "print the version"},
    {"help", COMMAND_HELP, "[COMMAND]", "print help"},
    {"completion", COMMAND_COMPLETION, "", "print a bash completion script"},
};

enum command command_find(const char *word)
{
    for (size_t i = 0; i < ARRAY_COUNT(COMMANDS); i++) {
        if (!strcmp(COMMANDS[i].word, word))
            return COMMANDS[i].command;
    }
    return 0;
}

// ---- values ----

static bool parse_uint(const char *text, uint64_t *out)
{
    char *end;
    errno = 0;
    *out = strtoull(text, &end, 10);
    return *text >= '0' && *text <= '9' && !errno && !*end;
}

// 123, 512K, 3M, 2G, 1.5G, 2GiB. A fraction needs a unit.
static bool parse_size(const char *text, uint64_t *out)
{
    char *end;
    if (parse_uint(text, out))
        return true;
    double value = strtod(text, &end);
    double unit = *end == 'K' || *end == 'k'   ? 1024.0
                  : *end == 'M' || *end == 'm' ? 1048576.0
                  : *end == 'G' || *end == 'g' ? 1073741824.0
                                               : 1.0;
    if (unit == 1.0)
        return false;
    end++;
    end += !strcmp(end, "iB") ? 2 : !strcmp(end, "B") ? 1 : 0;
    if (*text < '0' || *text > '9' || *end || !(value * unit <= 9.0e18))
        return false;
    *out = (uint64_t)(value * unit);
    return true;
}

static bool parse_flag(const char *text, bool *out)
{
    *out =
        !strcmp(text, "true") || !strcmp(text, "yes") || !strcmp(text, "1") || !strcmp(text, "on");
    return *out || !strcmp(text, "false") || !strcmp(text, "no") || !strcmp(text, "0") ||
           !strcmp(text, "off");
}

static bool set_value(struct settings *s, const struct option *o, const char *text)
{
    char *field = (char *)s + o->field, *end;
    uint64_t number;
    double real;
    switch (o->type) {
    case STRING:
        memcpy(field, &text, sizeof text);
        return true;
    case UINT:
        if (!parse_size(text, &number) || number > UINT32_MAX)
            return false;
        *(uint32_t *)(void *)field = (uint32_t)number;
        return true;
    case SIZE:
        // max_frame_bytes is the one 32-bit size
        if (!parse_size(text, &number))
            return false;
        if (o->field == FIELD(max_frame_bytes))
            *(uint32_t *)(void *)field = number > UINT32_MAX ? UINT32_MAX : (uint32_t)number;
        else
            memcpy(field, &number, sizeof number);
        return true;
    case REAL:
        real = strtod(text, &end);
        if (end == text || *end || !isfinite(real) || real < 0)
            return false;
        memcpy(field, &real, sizeof real);
        return true;
    case FLAG:
        return parse_flag(text, (bool *)field);
    case LIST: {
        struct option_list *list = (struct option_list *)(void *)field;
        if (list->count == OPTION_LIST_MAX)
            return false;
        list->item[list->count++] = text;
        return true;
    }
    }
    return false;
}

static enum status bad_value(const struct option *o, const char *text, const char *where,
                             struct fault *fault)
{
    static const char *const wanted[] = {
        "a text",        "a whole number",  "a size such as 512M", "a number, 0 or more",
        "true or false", "at most 64 items"};
    return fault_set(fault, STATUS_INVALID, "%s: \"%.80s\" is not a value for %s; it takes %s.",
                     where, text, o->name, wanted[o->type]);
}

// '-' and '_' are the same in names.
static bool same_name(const char *a, const char *b)
{
    for (; *a && *b; a++, b++) {
        if (*a != *b && !((*a == '-' || *a == '_') && (*b == '-' || *b == '_')))
            return false;
    }
    return !*a && !*b;
}

static const struct option *find_option(const char *name, int commands)
{
    for (size_t i = 0; i < ARRAY_COUNT(TABLE); i++) {
        if ((TABLE[i].commands & commands) && same_name(TABLE[i].name, name))
            return &TABLE[i];
    }
    return NULL;
}

// ---- the three sources ----

struct file_context {
    struct settings *settings;
    enum command command;
};

static enum status file_value(void *context, const char *where, const char *key, const char *text,
                              struct fault *fault)
{
    struct file_context *c = context;
    const struct option *o = find_option(key, ANY);
    if (!o || o->field == FIELD(config) || o->field == FIELD(help))
        return fault_set(fault, STATUS_INVALID, "%s: there is no option \"%.60s\".", where, key);
    if (!(o->commands & (int)c->command))
        return STATUS_OK; // a key of another command: one file may serve several
    return set_value(c->settings, o, text) ? STATUS_OK : bad_value(o, text, where, fault);
}

static void environment_name(const char *option, char *out, size_t room)
{
    size_t n = (size_t)snprintf(out, room, "POLDER_");
    for (; *option && n + 1 < room; option++)
        out[n++] = *option == '-'
                       ? '_'
                       : (char)(*option >= 'a' && *option <= 'z' ? *option - 32 : *option);
    out[n] = 0;
}

static enum status read_environment(enum command command, char **environment, struct settings *s,
                                    struct fault *fault)
{
    for (size_t i = 0; i < ARRAY_COUNT(TABLE); i++) {
        char name[80];
        environment_name(TABLE[i].name, name, sizeof name);
        size_t length = strlen(name);
        for (char **e = environment; e && *e && (TABLE[i].commands & (int)command); e++) {
            if (strncmp(*e, name, length) != 0 || (*e)[length] != '=')
                continue;
            if (!set_value(s, &TABLE[i], *e + length + 1))
                return bad_value(&TABLE[i], *e + length + 1, name, fault);
        }
    }
    return STATUS_OK;
}

static enum status read_word(enum command command, char **words, int count, int *at,
                             struct settings *s, struct fault *fault)
{
    const char *word = words[*at];
    if (strncmp(word, "--", 2) != 0 || !word[2]) {
        if (s->words == OPTION_WORDS_MAX)
            return fault_set(fault, STATUS_INVALID, "too many words; see polder help.");
        s->word[s->words++] = word;
        return STATUS_OK;
    }
    char name[80];
    const char *equals = strchr(word, '=');
    size_t length = equals ? (size_t)(equals - word) - 2 : strlen(word) - 2;
    if (length >= sizeof name)
        return fault_set(fault, STATUS_INVALID, "there is no option %.90s.", word);
    memcpy(name, word + 2, length);
    name[length] = 0;
    const struct option *o = find_option(name, (int)command);
    if (!o && find_option(name, ANY))
        return fault_set(fault, STATUS_INVALID, "--%s does not belong to this command; see --help.",
                         name);
    if (!o)
        return fault_set(fault, STATUS_INVALID, "there is no option --%s; see --help.", name);
    const char *text = equals ? equals + 1 : o->type == FLAG ? "true" : NULL;
    if (!text && *at + 1 < count)
        text = words[++*at];
    if (!text)
        return fault_set(fault, STATUS_INVALID, "--%s needs a value: %s.", o->name, o->value);
    return set_value(s, o, text) ? STATUS_OK : bad_value(o, text, "command line", fault);
}

static void fill_defaults(struct settings *s)
{
    *s = (struct settings){.log_level = "info",
                           .device = "cpu",
                           .dtype = "bfloat16",
                           .host = "127.0.0.1",
                           .port = 7077,
                           .shutdown_timeout = 30,
                           .idle_timeout = 600,
                           .slow_reader_timeout = 30,
                           .max_connections = 1024,
                           .max_frame_bytes = 4u << 20,
                           .max_tokens = 128,
                           .top_p = 1.0,
                           .shape = "tiny"};
}

enum status settings_parse(enum command command, int count, char **words, char **environment,
                           struct settings *out, struct fault *fault)
{
    fill_defaults(out);
    // --config first, wherever it stands: the other sources go over it.
    struct settings early;
    fill_defaults(&early);
    enum status status = read_environment(command, environment, &early, fault);
    for (int i = 0; i < count && !status; i++)
        status = read_word(command, words, count, &i, &early, fault);
    if (!status && early.words && !(command & WORDS))
        status =
            fault_set(fault, STATUS_INVALID, "this command takes no word beside its options%s.",
                      command == COMMAND_HASH_KEY ? "; the key comes on standard input" : "");
    if (status)
        return status;
    if (early.config) {
        struct file_context context = {.settings = out, .command = command};
        status = config_file_read(early.config, file_value, &context, &out->owned, fault);
    }
    if (!status)
        status = read_environment(command, environment, out, fault);
    for (int i = 0; i < count && !status; i++)
        status = read_word(command, words, count, &i, out, fault);
    if (status)
        settings_clear(out);
    return status;
}

void settings_clear(struct settings *settings)
{
    config_file_free(settings->owned);
    settings->owned = NULL;
}

// ---- texts made from the table ----

void options_help(enum command command, FILE *to)
{
    if (!command || command == COMMAND_HELP) {
        (void)fprintf(to,
                      "polder: one pool of pages for KV, LoRA adapters and experts, shared by many "
                      "tenants\n\n");
        for (size_t i = 0; i < ARRAY_COUNT(COMMANDS); i++)
            (void)fprintf(to, "  polder %-13s %s\n", COMMANDS[i].word, COMMANDS[i].help);
        (void)fprintf(to, "\npolder COMMAND --help lists a command's options.\n");
        return;
    }
    for (size_t i = 0; i < ARRAY_COUNT(COMMANDS); i++) {
        if (COMMANDS[i].command == command)
            (void)fprintf(to, "polder %s %s\n  %s\n\n", COMMANDS[i].word, COMMANDS[i].arguments,
                          COMMANDS[i].help);
    }
    for (size_t i = 0; i < ARRAY_COUNT(TABLE); i++) {
        const struct option *o = &TABLE[i];
        if (!(o->commands & (int)command))
            continue;
        char left[80];
        (void)snprintf(left, sizeof left, "--%s %s", o->name, o->value);
        (void)fprintf(to, "  %-34s %s%s%s%s%s\n", left, o->help, *o->otherwise ? " (default: " : "",
                      o->otherwise, *o->otherwise ? ")" : "",
                      o->type == LIST ? "; may be repeated" : "");
    }
    (void)fprintf(to,
                  "\nEach option may also be set in the environment (--max-num-seqs: "
                  "POLDER_MAX_NUM_SEQS)\nor as a key of the --config file (max_num_seqs: 8).\n");
}

void options_completion(FILE *to)
{
    (void)fprintf(to, "_polder() {\n  local words=\"");
    for (size_t i = 0; i < ARRAY_COUNT(COMMANDS); i++)
        (void)fprintf(to, "%s ", COMMANDS[i].word);
    (void)fprintf(to, "\"\n  [ \"$COMP_CWORD\" -gt 1 ] && case \"${COMP_WORDS[1]}\" in\n");
    for (size_t i = 0; i < ARRAY_COUNT(COMMANDS); i++) {
        (void)fprintf(to, "    %s) words=\"", COMMANDS[i].word);
        for (size_t k = 0; k < ARRAY_COUNT(TABLE); k++) {
            if (TABLE[k].commands & (int)COMMANDS[i].command)
                (void)fprintf(to, "--%s ", TABLE[k].name);
        }
        (void)fprintf(to, "\" ;;\n");
    }
    (void)fprintf(
        to, "  esac\n  COMPREPLY=($(compgen -W \"$words\" -f -- \"${COMP_WORDS[COMP_CWORD]}\"))\n"
            "}\ncomplete -F _polder polder\n");
}
