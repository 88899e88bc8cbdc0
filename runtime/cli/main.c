// SPDX-License-Identifier: Apache-2.0
// The one binary: finds the command, parses its options, runs it.
#include <stdio.h>
#include <string.h>

#include "base/hash.h"
#include "base/log.h"
#include "runtime/cli/commands.h"

int complain(const struct fault *fault)
{
    (void)fprintf(stderr, "polder: %s\n",
                  fault->text[0] ? fault->text : status_sentence(fault->status));
    return fault->status == STATUS_DEVICE ? EXIT_DEVICE : EXIT_FAILED;
}

static int set_log_level(const struct settings *settings, struct fault *fault)
{
    static const char *const names[] = {"debug", "info", "warn", "error"};
    for (int level = LOG_DEBUG; level <= LOG_ERROR; level++) {
        if (!strcmp(settings->log_level, names[level])) {
            log_set_level((enum log_level)level);
            return 0;
        }
    }
    fault->text[0] = 0;
    (void)fault_set(fault, STATUS_INVALID,
                    "--log-level \"%.40s\" is none of debug, info, warn, error.",
                    settings->log_level);
    return 1;
}

// The key comes on standard input, so that it stays out of the shell's history and the process
// list.
static int hash_key(void)
{
    char key[1024], hex[2 * DIGEST_BYTES + 1];
    size_t n = fread(key, 1, sizeof key, stdin);
    while (n && (key[n - 1] == '\n' || key[n - 1] == '\r'))
        n--;
    if (!n || n == sizeof key) {
        (void)fprintf(stderr, "polder: write one key of at most 1000 bytes to standard input.\n");
        return EXIT_FAILED;
    }
    struct digest digest = hash_bytes(NULL, key, n);
    digest_hex(&digest, hex);
    (void)printf("%s\n", hex);
    return EXIT_DONE;
}

static int help(const char *word)
{
    enum command command = command_find(word);
    if (!command) {
        (void)fprintf(stderr, "polder: there is no command \"%.60s\"; see polder help.\n", word);
        return EXIT_USAGE;
    }
    options_help(command, stdout);
    return EXIT_DONE;
}

static int run(enum command command, const struct settings *settings)
{
    switch (command) {
    case COMMAND_SERVE:
        return command_serve(settings);
    case COMMAND_GENERATE:
        return command_generate(settings);
    case COMMAND_CHAT:
        return command_chat(settings);
    case COMMAND_CALL:
        return command_call(settings);
    case COMMAND_STATS:
        return command_stats(settings);
    case COMMAND_ADAPTER:
        return command_adapter(settings);
    case COMMAND_SYNTH:
        return command_synth(settings);
    case COMMAND_CHECK_CONFIG:
        return command_check_config(settings);
    case COMMAND_VERSION:
        (void)printf("polder %s\n", POLDER_VERSION);
        return EXIT_DONE;
    case COMMAND_HASH_KEY:
        return hash_key();
    case COMMAND_COMPLETION:
        options_completion(stdout);
        return EXIT_DONE;
    case COMMAND_HELP:
        return help(settings->words ? settings->word[0] : "help");
    }
    return EXIT_USAGE;
}

int main(int count, char **words, char **environment)
{
    const char *word = count > 1 ? words[1] : "help";
    if (!strcmp(word, "--help") || !strcmp(word, "-h"))
        word = "help";
    if (!strcmp(word, "--version"))
        word = "version";
    enum command command = command_find(word);
    if (!command) {
        (void)fprintf(stderr, "polder: there is no command \"%.60s\"; see polder help.\n", word);
        return EXIT_USAGE;
    }
    struct settings settings;
    struct fault fault = {.text = ""};
    int rest = count > 2 ? count - 2 : 0;
    if (settings_parse(command, rest, words + 2, environment, &settings, &fault)) {
        (void)complain(&fault);
        return EXIT_USAGE;
    }
    int code = EXIT_USAGE;
    if (settings.help) {
        options_help(command, stdout);
        code = EXIT_DONE;
    } else if (set_log_level(&settings, &fault)) {
        (void)complain(&fault);
    } else {
        code = run(command, &settings);
    }
    settings_clear(&settings);
    return code;
}
