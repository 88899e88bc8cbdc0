// SPDX-License-Identifier: Apache-2.0
// Commands that talk to a running server: call, stats, chat. (adapter: adapter_remote.c)
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/reader.h"
#include "runtime/cli/commands.h"
#include "runtime/cli/remote.h"

enum { TIMEOUT_MS = 600000, KEY_MAX = 1024, LINE_MAX_BYTES = 65536, CHAT_MAX = 1 << 20 };

int remote_complain(const struct polder_error *error)
{
    (void)fprintf(stderr, "polder: %s: %s\n", error->code, error->message);
    return EXIT_FAILED;
}

// The key of --api-key or --api-key-file, "" when there is neither.
static int find_key(const struct settings *s, char *out, size_t room)
{
    out[0] = 0;
    if (s->api_key) {
        (void)snprintf(out, room, "%s", s->api_key);
        return 0;
    }
    if (!s->api_key_file)
        return 0;
    struct reader *reader = NULL;
    struct fault fault = {.text = ""};
    if (reader_open(s->api_key_file, &reader, &fault))
        return complain(&fault);
    size_t bytes = reader->size < room - 1 ? (size_t)reader->size : room - 1;
    enum status status = reader_read(reader, 0, out, bytes);
    reader_close(reader);
    while (bytes && (out[bytes - 1] == '\n' || out[bytes - 1] == '\r'))
        bytes--;
    out[bytes] = 0;
    if (status) {
        (void)fprintf(stderr, "polder: %s could not be read.\n", s->api_key_file);
        return EXIT_FAILED;
    }
    return 0;
}

struct polder_client *remote_open(const struct settings *s)
{
    char key[KEY_MAX];
    struct polder_error error;
    if (find_key(s, key, sizeof key))
        return NULL;
    struct polder_client *client = polder_open(s->connect ? s->connect : "127.0.0.1:7077",
                                               key[0] ? key : NULL, TIMEOUT_MS, &error);
    memset(key, 0, sizeof key);
    if (!client)
        (void)remote_complain(&error);
    return client;
}

static bool print_token(void *context, const struct polder_token *token)
{
    bool *any = context;
    (void)fwrite(token->text, 1, token->text_bytes, stdout);
    (void)fflush(stdout);
    *any = true;
    return true;
}

int remote_call(const struct settings *s, const char *method, const char *params)
{
    struct polder_error error;
    char *result = NULL;
    bool any = false;
    struct polder_client *client = remote_open(s);
    if (!client)
        return EXIT_FAILED;
    int rc = polder_call_json(client, method, params, 2, print_token, &any, &result, &error);
    if (any)
        (void)printf("\n");
    if (rc)
        (void)remote_complain(&error);
    else
        (void)printf("%s\n", result);
    free(result);
    polder_close(client);
    return rc ? EXIT_FAILED : EXIT_DONE;
}

int command_call(const struct settings *settings)
{
    if (settings->words < 1 || settings->words > 2) {
        (void)fprintf(stderr, "polder: usage: polder call METHOD ['{\"key\": value}']\n");
        return EXIT_USAGE;
    }
    return remote_call(settings, settings->word[0],
                       settings->words == 2 ? settings->word[1] : NULL);
}

int command_stats(const struct settings *settings)
{
    return remote_call(settings, "stats", NULL);
}

// ---- chat ----

struct chat {
    char *text; // everything said, by both
    size_t bytes;
};

static void chat_add(struct chat *chat, const char *text, size_t bytes)
{
    // The oldest half goes when the buffer is full; the server refuses what its context cannot
    // hold.
    if (chat->bytes + bytes + 1 > CHAT_MAX) {
        size_t gone = chat->bytes / 2;
        while (gone < chat->bytes && ((unsigned char)chat->text[gone] & 0xc0) == 0x80)
            gone++;
        memmove(chat->text, chat->text + gone, chat->bytes - gone);
        chat->bytes -= gone;
    }
    if (chat->bytes + bytes + 1 <= CHAT_MAX) {
        memcpy(chat->text + chat->bytes, text, bytes);
        chat->bytes += bytes;
    }
    chat->text[chat->bytes] = 0;
}

static int chat_turn(const struct settings *s, struct polder_client *client, struct chat *chat)
{
    struct polder_error error;
    struct polder_result result;
    bool any = false;
    struct polder_generate ask = {.model = s->adapter,
                                  .prompt = chat->text,
                                  .max_tokens = s->max_tokens,
                                  .temperature = s->temperature,
                                  .top_p = s->top_p,
                                  .top_k = s->top_k,
                                  .has_seed = s->seed != 0,
                                  .seed = s->seed,
                                  .ignore_eos = s->ignore_eos,
                                  .stop = s->stop.item,
                                  .stop_count = s->stop.count};
    if (polder_generate(client, &ask, print_token, &any, &result, &error)) {
        (void)remote_complain(&error);
        return error.type == -1 ? -1 : 0;
    }
    (void)printf("\n");
    chat_add(chat, result.text, result.text_bytes);
    polder_result_free(&result);
    return 0;
}

int command_chat(const struct settings *settings)
{
    char *line = malloc(LINE_MAX_BYTES);
    struct chat chat = {.text = calloc(1, CHAT_MAX)};
    struct polder_client *client = line && chat.text ? remote_open(settings) : NULL;
    int code = client ? EXIT_DONE : EXIT_FAILED;
    bool terminal = isatty(STDIN_FILENO);
    if (client && terminal)
        (void)fprintf(stderr,
                      "Type a line; the model continues the text. /new forgets it, /quit ends.\n");
    if (client && settings->prompt) {
        chat_add(&chat, settings->prompt, strlen(settings->prompt));
        code = chat_turn(settings, client, &chat) ? EXIT_FAILED : EXIT_DONE;
    }
    while (client && code == EXIT_DONE) {
        if (terminal)
            (void)fprintf(stderr, "> ");
        if (!fgets(line, LINE_MAX_BYTES, stdin) || !strcmp(line, "/quit\n"))
            break;
        if (!strcmp(line, "/new\n")) {
            chat.bytes = 0;
            continue;
        }
        chat_add(&chat, line, strcspn(line, "\n"));
        if (chat_turn(settings, client, &chat))
            code = EXIT_FAILED;
    }
    polder_close(client);
    free(chat.text);
    free(line);
    return code;
}
