// SPDX-License-Identifier: Apache-2.0
// polder adapter on a state directory, without a server: the same conversion and the same registry
// of files as the server's, under the same lock.
//
// What changes the registry (add, rm, gc) takes the lock and is refused while a server has it; what
// reads (list, show, verify) does not: a store file is never changed, only replaced whole.
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <jansson.h>

#include "adapters/registry.h"
#include "base/check.h"
#include "runtime/cli/adapter.h"
#include "runtime/cli/commands.h"
#include "runtime/cli/manifest.h"
#include "runtime/cli/wire.h"

struct offline {
    const struct settings *settings;
    char state[ENGINE_PATH];
    bool identified;
    struct stack_identity identity;
    int lock;
};

// The base model that adapters are checked against.
static enum status identify(struct offline *o, struct fault *fault)
{
    struct stack_options options;
    char state[ENGINE_PATH];
    enum status status =
        wire_stack_options(o->settings, NULL, state, sizeof state, &options, fault);
    if (!status)
        status = stack_identify(&options, &o->identity, fault);
    o->identified = !status;
    return status;
}

// ---- add ----

// Whose file the name gets: that of the adapter that has it, else --owner.
static enum status choose_entry(const struct offline *o, const char *name, const char *owner,
                                struct registry_entry *out, struct fault *fault)
{
    owner = owner ? owner : o->settings->owner;
    owner = owner ? owner : "";
    if (!adapter_name_is_valid(name))
        return fault_set(
            fault, STATUS_INVALID,
            "\"%.80s\" is not an adapter name; use letters, digits, '.', '_' and '-', at most %d.",
            name, ADAPTER_NAME_MAX - 1);
    if (*owner && !adapter_name_is_valid(owner))
        return fault_set(fault, STATUS_INVALID, "--owner \"%.80s\" is not a tenant's name.", owner);
    enum status status = registry_find(o->state, name, owner, out);
    if (status == STATUS_NOT_FOUND) {
        *out = (struct registry_entry){.name = ""};
        (void)snprintf(out->name, sizeof out->name, "%s", name);
        (void)snprintf(out->tenant, sizeof out->tenant, "%s", owner);
        return STATUS_OK;
    }
    if (!status && *owner && strcmp(owner, out->tenant) != 0)
        return fault_set(fault, STATUS_EXISTS,
                         "the name %s belongs to %s%s; remove it first or choose another name.",
                         name, out->tenant[0] ? "tenant " : "the operator", out->tenant);
    return status ? fault_set(fault, status, "the registry could not be read.") : STATUS_OK;
}

// *skipped: it was registered with the same content already.
static enum status add_one(const struct offline *o, const struct manifest_entry *wanted,
                           struct adapter_report *report, bool *skipped, struct fault *fault)
{
    const struct adapter_base *base = &o->identity.base;
    size_t page_bytes = o->identity.page_bytes;
    struct registry_entry entry;
    struct adapter_summary now;
    char path[REGISTRY_PATH];
    *skipped = false;
    enum status status = choose_entry(o, wanted->name, wanted->owner, &entry, fault);
    if (!status)
        status = registry_path(o->state, &entry, path, fault);
    if (status)
        return status;
    uint32_t version = adapter_version_at(path, wanted->path, base, page_bytes, skipped);
    if (*skipped && !adapter_inspect(path, true, &now, NULL)) {
        *report = now.report;
        return STATUS_OK;
    }
    *skipped = false;
    // The rename at the end of the conversion is what registers.
    return adapter_convert_version(wanted->path, base, page_bytes, version + 1, path, report,
                                   fault);
}

static void say(const struct adapter_report *report, bool skipped, char *out, size_t room)
{
    if (skipped)
        (void)snprintf(out, room, "registered with this content already, version %u",
                       report->version);
    else
        adapter_report_line(report, out, room);
}

static enum manifest_result add_listed(void *context, const struct manifest_entry *entry,
                                       char *line, size_t room)
{
    struct fault fault = {.text = ""};
    struct adapter_report report;
    bool skipped;
    enum status status = add_one(context, entry, &report, &skipped, &fault);
    if (status) {
        (void)snprintf(line, room, "%s", fault.text[0] ? fault.text : status_sentence(status));
        return MANIFEST_FAILED;
    }
    say(&report, skipped, line, room);
    return skipped ? MANIFEST_UNCHANGED : MANIFEST_ADDED;
}

static int add(struct offline *o)
{
    struct fault fault = {.text = ""};
    struct adapter_report report;
    bool skipped;
    char line[1024], text[2048];
    if (o->settings->manifest)
        return manifest_run(o->settings->manifest, add_listed, o);
    struct manifest_entry entry = {.name = o->settings->word[1], .path = o->settings->word[2]};
    if (add_one(o, &entry, &report, &skipped, &fault))
        return complain(&fault);
    say(&report, skipped, line, sizeof line);
    (void)fprintf(stderr, "%s: %s\n", entry.name, line);
    adapter_report_json(&report, text, sizeof text);
    (void)printf("{\"name\": \"%s\", \"report\": %s}\n", entry.name, text);
    return EXIT_DONE;
}

// ---- list, show, verify ----

static json_t *entry_json(const struct offline *o, const struct registry_entry *entry)
{
    struct fault fault = {.text = ""};
    struct adapter_summary s;
    char path[REGISTRY_PATH], base[2 * DIGEST_BYTES + 1], report[2048];
    enum status status = registry_path(o->state, entry, path, &fault);
    if (!status)
        status = adapter_inspect(path, false, &s, &fault);
    if (status)
        return json_pack("{s:s, s:s, s:s}", "name", entry->name, "owner", entry->tenant, "damaged",
                         fault.text);
    digest_hex(&s.base, base);
    adapter_report_json(&s.report, report, sizeof report);
    json_t *json = json_loads(report, 0, NULL);
    json_t *head = json_pack("{s:s, s:s}", "name", entry->name, "owner", entry->tenant);
    if (!json || !head || json_object_update(head, json)) {
        json_decref(json);
        return head;
    }
    json_decref(json);
    (void)json_object_set_new(head, "file_bytes", json_integer((json_int_t)s.file_bytes));
    (void)json_object_set_new(head, "page_bytes", json_integer((json_int_t)s.page_bytes));
    (void)json_object_set_new(head, "dtype",
                              json_string(s.dtype == DTYPE_BF16 ? "bfloat16" : "float32"));
    (void)json_object_set_new(head, "base", json_string(base));
    return head;
}

static bool is_wanted(const struct offline *o, const struct registry_entry *entry, const char *name)
{
    const char *owner = o->settings->owner;
    return (!name || !strcmp(entry->name, name)) && (!owner || !strcmp(entry->tenant, owner));
}

static int missing(const char *name)
{
    (void)fprintf(stderr, "polder: there is no adapter named \"%.80s\".\n", name);
    return EXIT_FAILED;
}

static int list(const struct offline *o)
{
    struct fault fault = {.text = ""};
    struct registry_entry *entries;
    size_t count, found = 0;
    const char *name = o->settings->words > 1 ? o->settings->word[1] : NULL; // show
    if (registry_list(o->state, &entries, &count, &fault))
        return complain(&fault);
    json_t *all = json_array();
    for (size_t i = 0; i < count; i++) {
        if (!is_wanted(o, &entries[i], name))
            continue;
        (void)json_array_append_new(all, entry_json(o, &entries[i]));
        found++;
    }
    free(entries);
    if (!name || found)
        (void)json_dumpf(name && found == 1 ? json_array_get(all, 0) : all, stdout, JSON_INDENT(2));
    if (!name || found)
        (void)printf("\n");
    json_decref(all);
    return name && !found ? missing(name) : EXIT_DONE;
}

static bool verify_entry(const struct offline *o, const struct registry_entry *entry)
{
    struct fault fault = {.text = ""};
    struct adapter_summary s;
    char path[REGISTRY_PATH];
    enum status status = registry_path(o->state, entry, path, &fault);
    if (!status)
        status = adapter_inspect(path, !o->identified, &s, &fault);
    if (!status && o->identified)
        status = adapter_verify(path, &o->identity.base, o->identity.page_bytes, &fault);
    (void)printf("%s%s%s: ", entry->name, entry->tenant[0] ? "@" : "", entry->tenant);
    if (status)
        (void)printf("%s\n", fault.text);
    else
        (void)printf("good, version %u, %" PRIu64 " bytes\n", s.report.version, s.file_bytes);
    return !status;
}

static int verify(struct offline *o)
{
    struct fault fault = {.text = ""};
    struct registry_entry *entries;
    size_t count, bad = 0, seen = 0;
    const struct settings *s = o->settings;
    if ((s->model && identify(o, &fault)) || registry_list(o->state, &entries, &count, &fault))
        return complain(&fault);
    for (uint32_t w = s->words > 1 ? 1 : 0; w < s->words; w++) {
        size_t before = seen;
        for (size_t i = 0; i < count; i++) {
            if (!is_wanted(o, &entries[i], w ? s->word[w] : NULL))
                continue;
            seen++;
            bad += !verify_entry(o, &entries[i]);
        }
        if (w && seen == before)
            bad += (size_t)missing(s->word[w]);
    }
    free(entries);
    (void)printf("%zu verified, %zu bad\n", seen, bad);
    return bad ? EXIT_FAILED : EXIT_DONE;
}

// ---- rm, gc ----

static int rm(const struct offline *o)
{
    struct fault fault = {.text = ""};
    struct registry_entry entry;
    const struct settings *s = o->settings;
    enum status status = registry_find(o->state, s->word[1], s->owner, &entry);
    if (status == STATUS_NOT_FOUND || (!status && s->owner && !is_wanted(o, &entry, s->word[1])))
        return missing(s->word[1]);
    if (!status)
        status = registry_remove(o->state, &entry, NULL, &fault);
    if (status)
        return complain(&fault);
    (void)printf("removed %s%s%s\n", entry.name, entry.tenant[0] ? " of tenant " : "",
                 entry.tenant);
    return EXIT_DONE;
}

struct collected {
    uint64_t files, bytes, unknown;
};

static void collected(void *context, const struct registry_leftover *leftover)
{
    struct collected *sum = context;
    (void)printf("%s %s, %" PRIu64 " bytes\n", leftover->removed ? "removed" : "left alone",
                 leftover->file, leftover->bytes);
    sum->files += leftover->removed;
    sum->bytes += leftover->removed ? leftover->bytes : 0;
    sum->unknown += !leftover->removed;
}

static int gc(const struct offline *o)
{
    struct fault fault = {.text = ""};
    struct collected sum = {.files = 0};
    if (registry_collect(o->state, collected, &sum, &fault))
        return complain(&fault);
    (void)printf("%" PRIu64 " files removed, %" PRIu64 " bytes", sum.files, sum.bytes);
    if (sum.unknown)
        (void)printf("; %" PRIu64 " that are no adapters left alone", sum.unknown);
    (void)printf("\n");
    return EXIT_DONE;
}

int adapter_offline(const struct settings *settings)
{
    struct fault fault = {.text = ""};
    struct offline o = {.settings = settings, .lock = -1};
    const char *verb = settings->word[0];
    bool adds = !strcmp(verb, "add"), writes = adds || !strcmp(verb, "rm") || !strcmp(verb, "gc");
    enum status status = wire_state_directory(settings, o.state, sizeof o.state, &fault);
    if (!status && adds)
        status = registry_make(o.state, &fault);
    if (!status && writes)
        status = registry_lock(o.state, &o.lock, &fault);
    if (!status && adds)
        status = identify(&o, &fault);
    int code = EXIT_FAILED;
    if (status)
        code = complain(&fault);
    else if (adds)
        code = add(&o);
    else if (!strcmp(verb, "rm"))
        code = rm(&o);
    else if (!strcmp(verb, "gc"))
        code = gc(&o);
    else if (!strcmp(verb, "verify"))
        code = verify(&o);
    else
        code = list(&o);
    if (o.identified)
        stack_identity_clear(&o.identity);
    if (o.lock >= 0)
        (void)close(o.lock);
    return code;
}
