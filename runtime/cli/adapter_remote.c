// SPDX-License-Identifier: Apache-2.0
// polder adapter against a running server: adapters.register, remove, list, and what is made of
// them.
//
// The server reads the directories of `add` itself, so their paths are made absolute here; with
// --upload it is sent their files. What the
// server has of the same files already (the source digest in its list) is not sent again.
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <jansson.h>

#include "runtime/cli/adapter.h"
#include "runtime/cli/adapter_upload.h"
#include "runtime/cli/commands.h"
#include "runtime/cli/manifest.h"
#include "runtime/cli/remote.h"

struct remote {
    struct polder_client *client;
    bool uploads;            // --upload: the server cannot read the directories
    json_t *list;            // what was registered at the beginning, or NULL
    uint64_t retry_after_ms; // of the last refusal; 0: waiting does not help
};

static const char *text_of(const json_t *object, const char *key)
{
    const char *text = json_string_value(json_object_get(object, key));
    return text ? text : "";
}

static const json_t *find(const json_t *list, const char *name)
{
    for (size_t i = 0; i < json_array_size(list); i++) {
        if (!strcmp(text_of(json_array_get(list, i), "name"), name))
            return json_array_get(list, i);
    }
    return NULL;
}

// The page behind `after` (NULL: the first) goes to the end of the list. *more: it is not the last.
static int fetch_page(struct remote *remote, const char *after, bool *more,
                      struct polder_error *error)
{
    enum { PAGE = 1000 };
    json_t *params = json_pack("{s:i, s:s*}", "limit", PAGE, "after", after);
    char *asked = params ? json_dumps(params, JSON_COMPACT) : NULL, *text = NULL;
    int failed =
        polder_call_json(remote->client, "adapters.list", asked, 0, NULL, NULL, &text, error);
    json_t *page = failed ? NULL : json_loads(text, 0, NULL);
    *more = json_is_true(json_object_get(page, "more"));
    if (!failed)
        (void)json_array_extend(remote->list, json_object_get(page, "adapters"));
    json_decref(page);
    json_decref(params);
    free(asked);
    free(text);
    return failed;
}

static int fetch_list(struct remote *remote, struct polder_error *error)
{
    bool more = true;
    remote->list = json_array();
    for (size_t count = 0; more; count = json_array_size(remote->list)) {
        const char *after = count ? text_of(json_array_get(remote->list, count - 1), "name") : NULL;
        if (fetch_page(remote, after, &more, error))
            return -1;
        if (json_array_size(remote->list) == count)
            break;
    }
    return 0;
}

static int remote_begin(const struct settings *s, struct remote *remote)
{
    struct polder_error error;
    *remote = (struct remote){.client = remote_open(s), .uploads = s->upload};
    if (!remote->client)
        return EXIT_FAILED;
    return fetch_list(remote, &error) ? remote_complain(&error) : EXIT_DONE;
}

static void remote_end(struct remote *remote)
{
    json_decref(remote->list);
    polder_close(remote->client);
}

// ---- add ----

// What the report in the answer says, as adapter_report_line says it.
static void report_line(const json_t *report, char *out, size_t room)
{
    struct adapter_report r = {.version = 1};
    r.matrices_applied = (uint32_t)json_integer_value(json_object_get(report, "applied"));
    r.matrices_possible = (uint32_t)json_integer_value(json_object_get(report, "possible"));
    r.rank_min = (uint32_t)json_integer_value(json_object_get(report, "rank_min"));
    r.rank_max = (uint32_t)json_integer_value(json_object_get(report, "rank_max"));
    r.bytes = (uint64_t)json_integer_value(json_object_get(report, "bytes"));
    if (json_object_get(report, "version"))
        r.version = (uint32_t)json_integer_value(json_object_get(report, "version"));
    (void)snprintf(r.layout, sizeof r.layout, "%s", text_of(report, "layout"));
    (void)snprintf(r.ignored, sizeof r.ignored, "%s", text_of(report, "ignored"));
    adapter_report_line(&r, out, room);
}

static bool is_unchanged(const struct remote *remote, const struct manifest_entry *entry,
                         const char *path, char *line, size_t room)
{
    struct digest source;
    char hex[2 * DIGEST_BYTES + 1];
    const json_t *now = find(remote->list, entry->name);
    if (!now || adapter_source(path, &source, NULL))
        return false;
    digest_hex(&source, hex);
    if (strcmp(hex, text_of(now, "source")) != 0)
        return false;
    (void)snprintf(line, room, "registered with this content already, version %lld",
                   (long long)json_integer_value(json_object_get(now, "version")));
    return true;
}

static enum manifest_result failure(struct remote *remote, const struct polder_error *error,
                                    char *line, size_t room)
{
    remote->retry_after_ms = error->retry_after_ms;
    (void)snprintf(line, room, "%s: %s", error->code, error->message);
    return error->type == -1 ? MANIFEST_STOP : MANIFEST_FAILED;
}

// *answer: the text of the result, the caller's; NULL when nothing was sent.
static enum manifest_result add_one(struct remote *remote, const struct manifest_entry *entry,
                                    char **answer, char *line, size_t room)
{
    char path[PATH_MAX];
    struct polder_error error;
    *answer = NULL;
    remote->retry_after_ms = 0;
    if (entry->owner) {
        (void)snprintf(line, room,
                       "a server registers for the tenant whose key asks; leave owner "
                       "away, or work offline with --state-dir.");
        return MANIFEST_FAILED;
    }
    if (!realpath(entry->path, path)) {
        (void)snprintf(line, room, "there is no directory %.200s.", entry->path);
        return MANIFEST_FAILED;
    }
    if (is_unchanged(remote, entry, path, line, room))
        return MANIFEST_UNCHANGED;
    uint64_t upload = 0;
    if (remote->uploads && adapter_upload(remote->client, entry->name, path, &upload, &error))
        return failure(remote, &error, line, room);
    json_t *params = remote->uploads ? json_pack("{s:I}", "upload", (json_int_t)upload)
                                     : json_pack("{s:s, s:s}", "name", entry->name, "path", path);
    char *text = params ? json_dumps(params, JSON_COMPACT) : NULL;
    json_decref(params);
    if (!text) {
        (void)snprintf(line, room, "the path %.200s is not UTF-8.", path);
        return MANIFEST_FAILED;
    }
    const char *method = remote->uploads ? "adapters.upload_commit" : "adapters.register";
    int failed = polder_call_json(remote->client, method, text, 2, NULL, NULL, answer, &error);
    free(text);
    if (failed)
        return failure(remote, &error, line, room);
    json_t *result = json_loads(*answer, 0, NULL);
    report_line(json_object_get(result, "report"), line, room);
    json_decref(result);
    return MANIFEST_ADDED;
}

// A long list runs into the rate of changes (adapter_rpm_limit): it waits, as it is told to.
static enum manifest_result add_listed(void *context, const struct manifest_entry *entry,
                                       char *line, size_t room)
{
    struct remote *remote = context;
    char *answer;
    for (;;) {
        enum manifest_result result = add_one(remote, entry, &answer, line, room);
        free(answer);
        if (result != MANIFEST_FAILED || !remote->retry_after_ms)
            return result;
        (void)fprintf(stderr, "%s: %s\n", entry->name, line);
        (void)usleep((useconds_t)(remote->retry_after_ms * 1000));
    }
}

static void print(const json_t *adapter)
{
    (void)json_dumpf(adapter, stdout, JSON_INDENT(2));
    (void)printf("\n");
}

static int add(struct remote *remote, const char *name, const char *directory)
{
    char line[1024], *answer;
    struct manifest_entry entry = {.name = name, .path = directory};
    enum manifest_result result = add_one(remote, &entry, &answer, line, sizeof line);
    if (result == MANIFEST_FAILED || result == MANIFEST_STOP) {
        (void)fprintf(stderr, "polder: %s\n", line);
        return EXIT_FAILED;
    }
    (void)fprintf(stderr, "%s: %s\n", name, line);
    if (answer)
        (void)printf("%s\n", answer);
    else
        print(find(remote->list, name));
    free(answer);
    return EXIT_DONE;
}

// ---- the others ----

static int show(const struct remote *remote, const char *name)
{
    const json_t *found = find(remote->list, name);
    if (!found) {
        (void)fprintf(stderr, "polder: there is no adapter named \"%s\".\n", name);
        return EXIT_FAILED;
    }
    print(found);
    return EXIT_DONE;
}

static int call_named(const struct settings *s, const char *method, const char *name)
{
    json_t *params = json_pack("{s:s}", "name", name);
    char *text = params ? json_dumps(params, JSON_COMPACT) : NULL;
    int code = EXIT_USAGE;
    if (text)
        code = remote_call(s, method, text);
    else
        (void)fprintf(stderr, "polder: the name is not UTF-8.\n");
    free(text);
    json_decref(params);
    return code;
}

int adapter_remote(const struct settings *s)
{
    const char *verb = s->word[0];
    struct remote remote;
    if (!strcmp(verb, "rm"))
        return call_named(s, "adapters.remove", s->word[1]);
    if (!strcmp(verb, "stats"))
        return remote_call(s, "adapters.stats", NULL);
    if (!strcmp(verb, "load") || !strcmp(verb, "unload") || !strcmp(verb, "pin") ||
        !strcmp(verb, "unpin")) {
        char method[40];
        (void)snprintf(method, sizeof method, "adapters.%s", verb);
        return call_named(s, method, s->word[1]);
    }
    if (!strcmp(verb, "add") && !s->manifest && access(s->word[2], F_OK) != 0) {
        (void)fprintf(stderr, "polder: there is no directory %s.\n", s->word[2]);
        return EXIT_FAILED;
    }
    int code = remote_begin(s, &remote);
    if (!code && s->manifest)
        code = manifest_run(s->manifest, add_listed, &remote);
    else if (!code && !strcmp(verb, "list"))
        print(remote.list);
    else if (!code && !strcmp(verb, "add"))
        code = add(&remote, s->word[1], s->word[2]);
    else if (!code)
        code = show(&remote, s->word[1]);
    remote_end(&remote);
    return code;
}
