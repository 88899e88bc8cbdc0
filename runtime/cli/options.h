// SPDX-License-Identifier: Apache-2.0
// The one option table: command line, environment (POLDER_<NAME>), YAML file (--config), --help and
// the shell completion are all made from it. Command line beats environment beats file. An unknown
// key or a bad value is an error that names where it stands.
#ifndef POLDER_RUNTIME_CLI_OPTIONS_H
#define POLDER_RUNTIME_CLI_OPTIONS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include "base/status.h"

enum { OPTION_LIST_MAX = 64, OPTION_WORDS_MAX = 16 };

struct option_list {
    const char *item[OPTION_LIST_MAX];
    uint32_t count;
};

// Everything an option can set. Strings live until settings_clear.
struct settings {
    // any command
    const char *config, *log_level;
    bool help;
    // the model and its pool
    const char *model, *state_dir, *device, *dtype, *instruction_set, *served_model_name;
    uint32_t threads, max_model_len, max_num_seqs, max_num_batched_tokens, max_queue, max_adapters;
    uint32_t max_lora_rank, segment_halves, link_latency_us;
    uint64_t pool_bytes, host_bytes, page_bytes;
    double gpu_memory_utilization, h2d_gbytes_per_s, d2h_gbytes_per_s, read_gbytes_per_s;
    bool no_prefix_caching, batch_invariant, no_plan_ahead, trace_plan;
    struct option_list lora_modules;
    // serving
    const char *host, *uds, *tenants;
    uint32_t port, shutdown_timeout, idle_timeout, slow_reader_timeout, max_connections,
        max_frame_bytes;
    struct option_list adapter_dirs;
    uint64_t max_upload_bytes;
    bool dry_run, no_tcp;
    // asking
    const char *prompt, *prompt_file, *adapter;
    uint32_t max_tokens, top_k;
    double temperature, top_p;
    uint64_t seed;
    struct option_list stop;
    bool ignore_eos, token_ids;
    // talking to a server
    const char *connect, *api_key, *api_key_file;
    // adapter
    const char *owner, *manifest;
    bool offline, upload;
    // synth
    const char *out, *shape;
    struct option_list set;
    // words that are not options: METHOD, JSON, names
    const char *word[OPTION_WORDS_MAX];
    uint32_t words;
    // owned text
    void *owned;
};

enum command {
    COMMAND_SERVE = 1,
    COMMAND_GENERATE = 2,
    COMMAND_CHAT = 4,
    COMMAND_CALL = 8,
    COMMAND_STATS = 16,
    COMMAND_ADAPTER = 32,
    COMMAND_SYNTH = 64,
    COMMAND_CHECK_CONFIG = 128,
    COMMAND_VERSION = 256,
    COMMAND_HELP = 512,
    COMMAND_COMPLETION = 1024,
    COMMAND_HASH_KEY = 2048
};

// Parses argv[1..] after the command's own word. `environment` is main's third argument.
MUST_USE enum status settings_parse(enum command command, int count, char **words,
                                    char **environment, struct settings *out, struct fault *fault);
void settings_clear(struct settings *settings);

void options_help(enum command command, FILE *to);
void options_completion(FILE *to);

// The command of a word, 0 when there is none, and its line of help.
enum command command_find(const char *word);

#endif
