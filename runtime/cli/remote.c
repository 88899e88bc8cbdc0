// SPDX-License-Identifier: Apache-2.0
// Commands that talk to a running server: call, stats, chat, and adapter without --offline.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <jansson.h>

#include "base/reader.h"
#include "clients/c/polder_client.h"
#include "clients/c/polder_client_json.h"
#include "runtime/cli/adapter.h"
#include "runtime/cli/commands.h"

enum { TIMEOUT_MS = 600000, KEY_MAX = 1024, LINE_MAX_BYTES = 65536, CHAT_MAX = 1 << 20 };

static int complain_remote(const struct polder_error *error)
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

static struct polder_client *open_client(const struct settings *s)
{
    char key[KEY_MAX];
    struct polder_error error;
    if (find_key(s, key, sizeof key))
        return NULL;
    struct polder_client *client = polder_open(s->connect ? s->connect : "127.0.0.1:7077",
                                               key[0] ? key : NULL, TIMEOUT_MS, &error);
    memset(key, 0, sizeof key);
    if (!client)
        (void)complain_remote(&error);
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

// One call; the result as JSON on standard output, streamed texts before it.
static int call_once(const struct settings *s, const char *method, const char *params)
{
    struct polder_error error;
    char *result = NULL;
    bool any = false;
    struct polder_client *client = open_client(s);
    if (!client)
        return EXIT_FAILED;
    int rc = polder_call_json(client, method, params, 2, print_token, &any, &result, &error);
    if (any)
        (void)printf("\n");
    if (rc)
        (void)complain_remote(&error);
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
    return call_once(settings, settings->word[0], settings->words == 2 ? settings->word[1] : NULL);
}

int command_stats(const struct settings *settings)
{
    return call_once(settings, "stats", NULL);
}

// ---- adapter ----

// Quotes a text as a JSON string; false when it does not fit.
static bool quote(const char *text, char *out, size_t room)
{
    size_t n = 0;
    if (room < 3)
        return false;
    out[n++] = '"';
    for (; *text; text++) {
        unsigned char c = (unsigned char)*text;
        if (n + 8 > room)
            return false;
        if (c == '"' || c == '\\') {
            out[n++] = '\\';
            out[n++] = (char)c;
        } else if (c < 0x20) {
            n += (size_t)snprintf(out + n, room - n, "\\u%04x", c);
        } else {
            out[n++] = (char)c;
        }
    }
    out[n++] = '"';
    out[n] = 0;
    return true;
}

static int adapter_call(const struct settings *s, const char *method, const char *name,
                        const char *directory)
{
    char quoted_name[300], quoted_path[8300], params[9000], path[4096];
    if (!quote(name, quoted_name, sizeof quoted_name)) {
        (void)fprintf(stderr, "polder: the name is too long.\n");
        return EXIT_USAGE;
    }
    if (!directory) {
        (void)snprintf(params, sizeof params, "{\"name\": %s}", quoted_name);
        return call_once(s, method, params);
    }
    // The server reads the path, so it must not depend on this shell's directory.
    if (!realpath(directory, path)) {
        (void)fprintf(stderr, "polder: there is no directory %s.\n", directory);
        return EXIT_FAILED;
    }
    if (!quote(path, quoted_path, sizeof quoted_path))
        return EXIT_USAGE;
    (void)snprintf(params, sizeof params, "{\"name\": %s, \"path\": %s}", quoted_name, quoted_path);
    return call_once(s, method, params);
}

// The list's entry of that name, out of the same answer `list` gives.
// Prints it, as JSON like the list.
static bool print_entry(const char *list_text, const char *name)
{
    bool found = false;
    json_t *list = json_loads(list_text, 0, NULL), *item;
    size_t i;
    json_array_foreach(list, i, item)
    {
        const char *own = json_string_value(json_object_get(item, "name"));
        if (found || !own || strcmp(own, name) != 0)
            continue;
        found = json_dumpf(item, stdout, JSON_INDENT(2)) == 0;
        (void)printf("\n");
    }
    json_decref(list);
    return found;
}

static int adapter_show(const struct settings *s, const char *name)
{
    struct polder_error error;
    char *list = NULL;
    struct polder_client *client = open_client(s);
    if (!client)
        return EXIT_FAILED;
    int code = EXIT_FAILED;
    if (polder_call_json(client, "adapters.list", NULL, 0, NULL, NULL, &list, &error))
        (void)complain_remote(&error);
    else if (print_entry(list, name))
        code = EXIT_DONE;
    else
        (void)fprintf(stderr, "polder: there is no adapter named \"%s\".\n", name);
    free(list);
    polder_close(client);
    return code;
}

int adapter_remote(const struct settings *settings)
{
    const char *verb = settings->word[0];
    if (!strcmp(verb, "add"))
        return adapter_call(settings, "adapters.add", settings->word[1], settings->word[2]);
    if (!strcmp(verb, "rm"))
        return adapter_call(settings, "adapters.remove", settings->word[1], NULL);
    if (!strcmp(verb, "show"))
        return adapter_show(settings, settings->word[1]);
    return call_once(settings, "adapters.list", NULL);
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
        (void)complain_remote(&error);
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
    struct polder_client *client = line && chat.text ? open_client(settings) : NULL;
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
