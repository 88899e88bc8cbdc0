// SPDX-License-Identifier: Apache-2.0
// polder adapter: which verb, against a server or against a state directory, and the words both
// use.
#include "runtime/cli/adapter.h"

#include <stdio.h>
#include <string.h>

#include "base/check.h"
#include "runtime/cli/commands.h"

// Field names come from the client's file; what would break a JSON text becomes '?'.
static void clean(char *text)
{
    for (; *text; text++) {
        if (*text == '"' || *text == '\\' || (unsigned char)*text < 0x20)
            *text = '?';
    }
}

void adapter_report_json(const struct adapter_report *report, char *out, size_t room)
{
    char ignored[sizeof report->ignored], digest[2 * DIGEST_BYTES + 1];
    memcpy(ignored, report->ignored, sizeof ignored);
    clean(ignored);
    digest_hex(&report->digest, digest);
    (void)snprintf(out, room,
                   "{\"applied\":%u,\"possible\":%u,\"rank_min\":%u,\"rank_max\":%u,\"bytes\":%llu,"
                   "\"version\":%u,\"digest\":\"%s\",\"layout\":\"%s\",\"ignored\":\"%s\"}",
                   report->matrices_applied, report->matrices_possible, report->rank_min,
                   report->rank_max, (unsigned long long)report->bytes, report->version, digest,
                   report->layout, ignored);
}

void adapter_report_line(const struct adapter_report *report, char *out, size_t room)
{
    char ranks[32];
    (void)snprintf(ranks, sizeof ranks, "%u", report->rank_max);
    if (report->rank_min != report->rank_max)
        (void)snprintf(ranks, sizeof ranks, "%u to %u", report->rank_min, report->rank_max);
    (void)snprintf(out, room,
                   "applied to %u of %u matrices, rank %s, %llu bytes; %s; version %u%s%s",
                   report->matrices_applied, report->matrices_possible, ranks,
                   (unsigned long long)report->bytes, report->layout, report->version,
                   report->ignored[0] ? "; ignored fields: " : "", report->ignored);
}

static const struct verb {
    const char *word;
    uint32_t words_min, words_max; // with the verb
    enum { BOTH, OFFLINE, REMOTE } where;
} VERBS[] = {
    {"add", 3, 3, BOTH},      {"list", 1, 1, BOTH},    {"show", 2, 2, BOTH},
    {"rm", 2, 2, BOTH},       {"gc", 1, 1, OFFLINE},   {"verify", 1, OPTION_WORDS_MAX, OFFLINE},
    {"pin", 2, 2, REMOTE},    {"unpin", 2, 2, REMOTE}, {"load", 2, 2, REMOTE},
    {"unload", 2, 2, REMOTE}, {"stats", 1, 1, REMOTE},
};

static const struct verb *find_verb(const struct settings *settings)
{
    uint32_t words = settings->words;
    if (settings->manifest) // its verb is add, without words
        return words == 1 && !strcmp(settings->word[0], "add") ? &VERBS[0] : NULL;
    for (size_t i = 0; i < ARRAY_COUNT(VERBS); i++) {
        const struct verb *verb = &VERBS[i];
        if (words >= verb->words_min && words <= verb->words_max &&
            !strcmp(verb->word, settings->word[0]))
            return verb;
    }
    return NULL;
}

int command_adapter(const struct settings *settings)
{
    const struct verb *verb = find_verb(settings);
    if (!verb) {
        (void)fprintf(stderr, "polder: usage: polder adapter add NAME DIR | add --manifest FILE | "
                              "list | show NAME | rm NAME | verify [NAME...] | gc | pin NAME | "
                              "unpin NAME | load NAME | unload NAME | stats\n");
        return EXIT_USAGE;
    }
    bool named = settings->model || settings->state_dir;
    bool offline = settings->offline || (named && !settings->connect);
    if (offline && verb->where != REMOTE)
        return adapter_offline(settings);
    if (!offline && verb->where != OFFLINE)
        return adapter_remote(settings);
    (void)fprintf(stderr, "polder: adapter %s works on %s.\n", verb->word,
                  offline ? "a running server: leave --model, --state-dir and --offline away"
                          : "a state directory: say which with --state-dir DIR");
    return EXIT_USAGE;
}
