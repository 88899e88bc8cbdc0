// SPDX-License-Identifier: Apache-2.0
#include "runtime/cli/manifest.h"

#include <inttypes.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "base/yaml.h"
#include "runtime/cli/commands.h"

enum { LINE = 700 };

struct manifest {
    struct yaml_tree *tree;
    struct manifest_entry *entries;
    char **failures; // sentences of those that failed, or NULL
    size_t count;
};

static void clear(struct manifest *manifest)
{
    for (size_t i = 0; i < manifest->count && manifest->entries; i++) {
        free((void *)(uintptr_t)manifest->entries[i].path);
        free(manifest->failures ? manifest->failures[i] : NULL);
    }
    free(manifest->failures);
    free(manifest->entries);
    yaml_tree_free(manifest->tree);
}

// Relative paths begin at the manifest, wherever the command was called.
static char *resolve(const char *manifest, const char *path)
{
    const char *slash = strrchr(manifest, '/');
    char *out = NULL;
    if (*path == '/' || !slash)
        return strdup(path);
    return asprintf(&out, "%.*s/%s", (int)(slash - manifest), manifest, path) < 0 ? NULL : out;
}

static enum status read_entry(const char *file, const struct yaml_node *node,
                              struct manifest_entry *out, struct fault *fault)
{
    static const char *const known[] = {"name", "path", "owner"};
    const char *path = NULL;
    enum status status = yaml_map_known(node, known, ARRAY_COUNT(known), fault);
    if (!status)
        status = yaml_map_string(node, "name", 1000, &out->name, fault);
    if (!status)
        status = yaml_map_string(node, "path", PATH_MAX - 1, &path, fault);
    if (!status)
        status = yaml_map_string(node, "owner", 1000, &out->owner, fault);
    if (status)
        return status;
    out->line = yaml_node_line(node);
    if (!out->name || !path)
        return yaml_node_fault(node, fault, "an adapter needs name and path.");
    if (!adapter_name_is_valid(out->name))
        return yaml_node_fault(node, fault,
                               "\"%.80s\" is not an adapter name; use letters, digits, '.', '_' "
                               "and '-', at most %d.",
                               out->name, ADAPTER_NAME_MAX - 1);
    if (out->owner && !adapter_name_is_valid(out->owner))
        return yaml_node_fault(node, fault, "\"%.80s\" is not a tenant's name.", out->owner);
    out->path = resolve(file, path);
    return out->path ? STATUS_OK : fault_set(fault, STATUS_NO_MEMORY, "out of memory.");
}

static int by_name(const void *a, const void *b)
{
    const struct manifest_entry *const *x = a, *const *y = b;
    int order = strcmp((*x)->name, (*y)->name);
    return order ? order : (*x)->line - (*y)->line;
}

// Two entries of one name would replace each other at every run.
static enum status check_twice(const char *file, const struct manifest *manifest,
                               struct fault *fault)
{
    size_t n = manifest->count;
    enum status status = STATUS_OK;
    const struct manifest_entry **sorted = calloc(n ? n : 1, sizeof *sorted);
    if (!sorted)
        return fault_set(fault, STATUS_NO_MEMORY, "out of memory.");
    for (size_t i = 0; i < n; i++)
        sorted[i] = &manifest->entries[i];
    qsort(sorted, n, sizeof *sorted, by_name);
    for (size_t i = 1; i < n && !status; i++)
        if (!strcmp(sorted[i]->name, sorted[i - 1]->name))
            status = fault_set(fault, STATUS_INVALID,
                               "%.120s:%d: the name %s stands in line %d already.", file,
                               sorted[i]->line, sorted[i]->name, sorted[i - 1]->line);
    free(sorted);
    return status;
}

static enum status load(const char *path, struct manifest *out, struct fault *fault)
{
    static const char *const known[] = {"adapters"};
    const struct yaml_node *list = NULL;
    enum status status = yaml_tree_load(path, &out->tree, fault);
    if (status)
        return status;
    const struct yaml_node *root = yaml_tree_root(out->tree);
    status = yaml_map_known(root, known, ARRAY_COUNT(known), fault);
    if (!status)
        status = yaml_map_list(root, "adapters", &list, fault);
    if (!status && !list)
        status = yaml_node_fault(root, fault,
                                 "a manifest has a list `adapters:` of `- name: ...` with `path: "
                                 "...`.");
    if (status)
        return status;
    size_t count = yaml_node_count(list);
    out->entries = calloc(count ? count : 1, sizeof *out->entries);
    out->failures = calloc(count ? count : 1, sizeof *out->failures);
    if (!out->entries || !out->failures)
        return fault_set(fault, STATUS_NO_MEMORY, "out of memory.");
    out->count = count;
    for (size_t i = 0; i < count && !status; i++)
        status = read_entry(path, yaml_node_at(list, i), &out->entries[i], fault);
    return status ? status : check_twice(path, out, fault);
}

int manifest_run(const char *path, manifest_add add, void *context)
{
    struct fault fault = {.text = ""};
    struct manifest manifest = {.count = 0};
    size_t results[MANIFEST_STOP + 1] = {0}, i = 0;
    if (load(path, &manifest, &fault)) {
        clear(&manifest);
        return complain(&fault);
    }
    for (bool stopped = false; i < manifest.count && !stopped; i++) {
        const struct manifest_entry *entry = &manifest.entries[i];
        char line[LINE] = "";
        enum manifest_result result = add(context, entry, line, sizeof line);
        results[result]++;
        stopped = result == MANIFEST_STOP;
        if (result == MANIFEST_FAILED || stopped)
            manifest.failures[i] = strdup(line);
        (void)fprintf(stderr, "[%zu/%zu] %s: %s\n", i + 1, manifest.count, entry->name, line);
    }
    size_t failed = results[MANIFEST_FAILED] + results[MANIFEST_STOP];
    (void)printf("%zu listed: %zu registered, %zu unchanged, %zu failed, %zu not tried\n",
                 manifest.count, results[MANIFEST_ADDED], results[MANIFEST_UNCHANGED], failed,
                 manifest.count - i);
    for (size_t k = 0; k < i; k++) {
        if (manifest.failures[k])
            (void)printf("failed: %s (line %d): %s\n", manifest.entries[k].name,
                         manifest.entries[k].line, manifest.failures[k]);
    }
    int code = failed || i < manifest.count ? EXIT_FAILED : EXIT_DONE;
    clear(&manifest);
    return code;
}
