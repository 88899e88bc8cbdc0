// SPDX-License-Identifier: Apache-2.0
// The table: tenants.yaml to an immutable array, and the two questions asked of it: whose key,
// which adapters.
//
// Owns: numbering across reloads, key hashes, patterns. Does not own: counters, time, what an
// adapter is. Invariants: 1. number = index, and a name keeps its number over every chain of
// reloads. 2. No two tenants share a key hash. 3. An inactive tenant has no keys and no patterns,
// so nothing can be done in its name.
// 4. The time of tenants_find_key depends on the length of the key and the number of hashes alone.
#include "tenants/tenants.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "base/hash.h"
#include "base/yaml.h"

enum { PATTERN_BYTES = 64, DEFAULT_PARALLEL = 64, DEFAULT_QUEUE = 64, DEFAULT_CHANGES = 120 };

struct entry {
    struct tenant tenant;
    uint32_t keys, patterns;
    struct digest key[TENANT_KEYS_MAX];
    char pattern[TENANT_PATTERNS_MAX][PATTERN_BYTES];
};

struct tenants {
    uint32_t count, room;
    struct entry *entries;
};

static const char *const class_names[TENANT_CLASSES] = {"interactive", "standard", "batch"};

const char *tenant_class_name(enum tenant_class class)
{
    return (unsigned)class < TENANT_CLASSES ? class_names[class] : "standard";
}

bool tenant_class_from_name(const char *name, enum tenant_class *out)
{
    for (int i = 0; i < TENANT_CLASSES; i++) {
        if (!strcmp(name, class_names[i])) {
            *out = (enum tenant_class)i;
            return true;
        }
    }
    return false;
}

// ---- reading -----------------------------------------------------------------------------------

static bool name_is_valid(const char *name)
{
    return *name != '.' && strspn(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
                                        "0123456789._-") == strlen(name);
}

static enum status read_keys(const struct yaml_node *map, struct entry *entry, struct fault *fault)
{
    const struct yaml_node *list = NULL;
    enum status status = yaml_map_list(map, "keys_blake2b", &list, fault);
    if (status || !list)
        return status;
    if (yaml_node_count(list) > TENANT_KEYS_MAX)
        return yaml_node_fault(list, fault, "keys_blake2b has %zu entries; at most %d are allowed.",
                               yaml_node_count(list), TENANT_KEYS_MAX);
    for (size_t i = 0; i < yaml_node_count(list); i++) {
        const struct yaml_node *item = yaml_node_at(list, i);
        const char *hex = NULL;
        status = yaml_node_string(item, 2 * DIGEST_BYTES, &hex, NULL);
        if (status || !digest_from_hex(hex, &entry->key[i]))
            return yaml_node_fault(item, fault,
                                   "keys_blake2b holds BLAKE2b-256 hashes of keys, 64 "
                                   "hexadecimal digits each, never the keys themselves.");
        entry->keys++;
    }
    return STATUS_OK;
}

static enum status read_patterns(const struct yaml_node *map, struct entry *entry,
                                 struct fault *fault)
{
    const struct yaml_node *list = NULL;
    enum status status = yaml_map_list(map, "allowed_adapters", &list, fault);
    if (status || !list)
        return status;
    if (yaml_node_count(list) > TENANT_PATTERNS_MAX)
        return yaml_node_fault(list, fault,
                               "allowed_adapters has %zu entries; at most %d are allowed.",
                               yaml_node_count(list), TENANT_PATTERNS_MAX);
    for (size_t i = 0; i < yaml_node_count(list); i++) {
        const char *text = NULL;
        status = yaml_node_string(yaml_node_at(list, i), PATTERN_BYTES - 1, &text, fault);
        if (status)
            return status;
        (void)snprintf(entry->pattern[entry->patterns++], PATTERN_BYTES, "%s", text);
    }
    return STATUS_OK;
}

static enum status read_u32(const struct yaml_node *map, const char *key, uint32_t max,
                            uint32_t *out, struct fault *fault)
{
    uint64_t value = *out;
    enum status status = yaml_map_u64(map, key, 0, max, &value, fault);
    *out = (uint32_t)value;
    return status;
}

static enum status read_limits(const struct yaml_node *map, struct tenant *tenant,
                               struct fault *fault)
{
    enum status status = read_u32(map, "rpm_limit", 10000000, &tenant->rpm_limit, fault);
    if (!status)
        status =
            read_u32(map, "max_parallel_requests", 65536, &tenant->max_parallel_requests, fault);
    if (!status)
        status = read_u32(map, "max_queue", 65536, &tenant->max_queue, fault);
    if (!status)
        status = read_u32(map, "max_tokens", 1u << 30, &tenant->max_tokens, fault);
    if (!status)
        status = read_u32(map, "max_context_tokens", 1u << 30, &tenant->max_context_tokens, fault);
    if (!status)
        status = yaml_map_double(map, "weight", 0.01, 100, &tenant->weight, fault);
    if (!status)
        status = yaml_map_bool(map, "manage_adapters", &tenant->manage_adapters, fault);
    if (!status)
        status = read_u32(map, "adapter_rpm_limit", 10000000, &tenant->adapter_rpm_limit, fault);
    if (!status)
        status = yaml_map_bool(map, "see_tenants", &tenant->see_tenants, fault);
    if (!status)
        status =
            yaml_map_u64(map, "adapter_bytes", 0, TENANT_BYTES_MAX, &tenant->adapter_bytes, fault);
    if (!status)
        status = yaml_map_u64(map, "pinned_adapter_bytes", 0, TENANT_BYTES_MAX,
                              &tenant->pinned_adapter_bytes, fault);
    return status;
}

static enum status read_entry(const struct yaml_node *map, struct entry *entry, struct fault *fault)
{
    static const char *const known[] = {
        "name",        "keys_blake2b",       "allowed_adapters",      "priority_class",
        "weight",      "rpm_limit",          "max_parallel_requests", "max_queue",
        "max_tokens",  "max_context_tokens", "manage_adapters",       "adapter_rpm_limit",
        "see_tenants", "adapter_bytes",      "pinned_adapter_bytes"};
    *entry = (struct entry){.tenant = {.active = true,
                                       .class = TENANT_STANDARD,
                                       .weight = 1,
                                       .max_parallel_requests = DEFAULT_PARALLEL,
                                       .max_queue = DEFAULT_QUEUE,
                                       .adapter_rpm_limit = DEFAULT_CHANGES}};
    enum status status = yaml_map_known(map, known, ARRAY_COUNT(known), fault);
    if (status)
        return status;
    const char *name = NULL, *class = NULL;
    status = yaml_map_string(map, "name", TENANT_NAME_BYTES - 1, &name, fault);
    if (status)
        return status;
    if (!name || !name_is_valid(name))
        return yaml_node_fault(map, fault,
                               "a tenant needs a name of letters, digits, '.', '_', '-', not "
                               "starting with '.'.");
    (void)snprintf(entry->tenant.name, sizeof entry->tenant.name, "%s", name);
    status = yaml_map_string(map, "priority_class", 32, &class, fault);
    if (!status && class && !tenant_class_from_name(class, &entry->tenant.class))
        status = yaml_node_fault(yaml_node_get(map, "priority_class"), fault,
                                 "priority_class must be interactive, standard or batch.");
    if (!status)
        status = read_keys(map, entry, fault);
    if (!status)
        status = read_patterns(map, entry, fault);
    if (!status)
        status = read_limits(map, &entry->tenant, fault);
    return status;
}

// ---- the table ---------------------------------------------------------------------------------

static struct entry *entry_named(const struct tenants *tenants, const char *name)
{
    for (uint32_t i = 0; i < tenants->count; i++) {
        if (!strcmp(tenants->entries[i].tenant.name, name))
            return &tenants->entries[i];
    }
    return NULL;
}

static bool key_is_taken(const struct tenants *tenants, const struct entry *entry)
{
    for (uint32_t i = 0; i < tenants->count; i++) {
        for (uint32_t k = 0; k < tenants->entries[i].keys; k++) {
            for (uint32_t j = 0; j < entry->keys; j++) {
                if (digest_equal(&tenants->entries[i].key[k], &entry->key[j]))
                    return true;
            }
        }
    }
    return false;
}

// Known names first, inactive, so that their numbers stand.
static enum status table_new(uint32_t room, const struct tenants *previous, struct tenants **out,
                             struct fault *fault)
{
    uint32_t known = previous ? previous->count : 0;
    struct tenants *tenants = calloc(1, sizeof *tenants);
    if (tenants)
        tenants->entries = calloc((size_t)known + room + 1, sizeof *tenants->entries);
    if (!tenants || !tenants->entries) {
        free(tenants);
        return fault_set(fault, STATUS_NO_MEMORY, "out of memory while reading the tenants.");
    }
    tenants->room = known + room;
    for (uint32_t i = 0; i < known; i++) {
        struct tenant *slot = &tenants->entries[i].tenant;
        memcpy(slot->name, previous->entries[i].tenant.name, sizeof slot->name);
        slot->class = TENANT_STANDARD;
    }
    tenants->count = known;
    *out = tenants;
    return STATUS_OK;
}

static enum status table_add(struct tenants *tenants, const struct yaml_node *item,
                             const struct entry *entry, struct fault *fault)
{
    struct entry *slot = entry_named(tenants, entry->tenant.name);
    if (slot && slot->tenant.active)
        return yaml_node_fault(item, fault, "the tenant \"%s\" is there twice.",
                               entry->tenant.name);
    if (key_is_taken(tenants, entry))
        return yaml_node_fault(item, fault, "a key of \"%s\" belongs to another tenant already.",
                               entry->tenant.name);
    if (!slot && tenants->count == TENANTS_MAX)
        return yaml_node_fault(
            item, fault, "more than %d tenants (removed ones count until a restart).", TENANTS_MAX);
    if (!slot)
        slot = &tenants->entries[tenants->count++];
    *slot = *entry;
    return STATUS_OK;
}

static enum status read_table(const struct yaml_node *root, const struct tenants *previous,
                              struct tenants **out, struct fault *fault)
{
    static const char *const known[] = {"tenants"};
    enum status status = yaml_map_known(root, known, 1, fault);
    const struct yaml_node *list = NULL;
    if (!status)
        status = yaml_map_list(root, "tenants", &list, fault);
    if (status)
        return status;
    if (!list || !yaml_node_count(list))
        return yaml_node_fault(root, fault, "there are no tenants; write \"tenants:\" and a list.");
    if (yaml_node_count(list) > TENANTS_MAX)
        return yaml_node_fault(list, fault, "more than %d tenants.", TENANTS_MAX);
    struct entry *entry = malloc(sizeof *entry);
    if (!entry)
        return fault_set(fault, STATUS_NO_MEMORY, "out of memory while reading the tenants.");
    status = table_new((uint32_t)yaml_node_count(list), previous, out, fault);
    for (size_t i = 0; i < yaml_node_count(list) && !status; i++) {
        status = read_entry(yaml_node_at(list, i), entry, fault);
        if (!status)
            status = table_add(*out, yaml_node_at(list, i), entry, fault);
    }
    free(entry);
    return status;
}

static enum status from_tree(struct yaml_tree *tree, const struct tenants *previous,
                             struct tenants **out, struct fault *fault)
{
    struct tenants *made = NULL;
    enum status status = read_table(yaml_tree_root(tree), previous, &made, fault);
    yaml_tree_free(tree);
    if (status) {
        tenants_free(made);
        return status;
    }
    *out = made;
    return STATUS_OK;
}

enum status tenants_parse(const char *name, const char *text, size_t bytes,
                          const struct tenants *previous, struct tenants **out, struct fault *fault)
{
    struct yaml_tree *tree = NULL;
    enum status status = yaml_tree_parse(name, text, bytes, &tree, fault);
    return status ? status : from_tree(tree, previous, out, fault);
}

enum status tenants_load(const char *path, const struct tenants *previous, struct tenants **out,
                         struct fault *fault)
{
    struct yaml_tree *tree = NULL;
    enum status status = yaml_tree_load(path, &tree, fault);
    return status ? status : from_tree(tree, previous, out, fault);
}

enum status tenants_open_access(struct tenants **out, struct fault *fault)
{
    struct tenants *tenants = NULL;
    enum status status = table_new(1, NULL, &tenants, fault);
    if (status)
        return status;
    struct entry *entry = &tenants->entries[0];
    entry->tenant = (struct tenant){.name = TENANT_LOCAL,
                                    .active = true,
                                    .class = TENANT_STANDARD,
                                    .weight = 1,
                                    .max_parallel_requests = UINT32_MAX,
                                    .max_queue = UINT32_MAX,
                                    .manage_adapters = true,
                                    .see_tenants = true,
                                    .pinned_adapter_bytes = TENANT_BYTES_MAX};
    (void)snprintf(entry->pattern[0], PATTERN_BYTES, "*");
    entry->patterns = 1;
    tenants->count = 1;
    *out = tenants;
    return STATUS_OK;
}

void tenants_free(struct tenants *tenants)
{
    if (!tenants)
        return;
    free(tenants->entries);
    free(tenants);
}

uint32_t tenants_count(const struct tenants *tenants)
{
    return tenants->count;
}

const struct tenant *tenants_at(const struct tenants *tenants, uint32_t number)
{
    return number < tenants->count ? &tenants->entries[number].tenant : NULL;
}

// ---- questions ---------------------------------------------------------------------------------

bool tenants_find_key(const struct tenants *tenants, const char *key, size_t bytes,
                      uint32_t *number)
{
    if (!bytes || bytes > TENANT_KEY_BYTES_MAX)
        return false;
    struct digest digest = hash_bytes(NULL, key, bytes);
    return tenants_find_digest(tenants, &digest, number);
}

bool tenants_find_digest(const struct tenants *tenants, const struct digest *digest,
                         uint32_t *number)
{
    uint32_t found = UINT32_MAX;
    for (uint32_t i = 0; i < tenants->count; i++) {
        for (uint32_t k = 0; k < tenants->entries[i].keys; k++) {
            uint32_t mask = 0u - (uint32_t)digest_equal(digest, &tenants->entries[i].key[k]);
            found = (found & ~mask) | (i & mask);
        }
    }
    *number = found;
    return found != UINT32_MAX;
}

bool tenant_pattern_matches(const char *pattern, const char *name)
{
    const char *star = NULL, *resume = NULL;
    while (*name) {
        if (*pattern == '*') {
            star = ++pattern;
            resume = name;
        } else if (*pattern == *name) {
            pattern++;
            name++;
        } else if (star) {
            pattern = star;
            name = ++resume;
        } else {
            return false;
        }
    }
    while (*pattern == '*')
        pattern++;
    return !*pattern;
}

bool tenants_allow_adapter(const struct tenants *tenants, uint32_t number, const char *adapter)
{
    if (number >= tenants->count)
        return false;
    const struct entry *entry = &tenants->entries[number];
    for (uint32_t i = 0; i < entry->patterns; i++) {
        if (tenant_pattern_matches(entry->pattern[i], adapter))
            return true;
    }
    return false;
}
