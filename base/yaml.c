// SPDX-License-Identifier: Apache-2.0
// Builds the tree of base/yaml.h from libyaml's events.
//
//   bytes -> libyaml (scanner, parser) -> one event at a time -> node_new + stack of open
//   collections
//
// Owns: the limits, and what is refused. Does not own: the meaning of any key.
// Invariants: 1. the stack of open collections never exceeds YAML_DEPTH_MAX, so freeing may
// recurse.
// 2. A node is linked into its parent as soon as it exists: on any failure yaml_tree_free(tree)
// frees all.
// 3. Work is bounded: duplicate keys are found by sorting a closed map, not by comparing all pairs.
#include "base/yaml.h"

#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <yaml.h>

#include "base/reader.h"

enum { KEY_BYTES_MAX = 256, NAME_BYTES = 200 };

#ifdef POLDER_PLANT_BUG
enum { DEPTH_SLACK = 1 }; // the planted bug of tests/fuzz_yaml.c: one open collection too many
#else
enum { DEPTH_SLACK = 0 };
#endif

struct yaml_node {
    const struct yaml_tree *tree;
    enum yaml_kind kind;
    bool quoted;
    int line, column;
    char *key, *text;
    struct yaml_node **items;
    size_t count, room;
};

struct yaml_tree {
    char name[NAME_BYTES];
    struct yaml_node *root;
    size_t nodes;
};

// What is open while the events come in.
struct builder {
    struct yaml_tree *tree;
    struct yaml_node *open[YAML_DEPTH_MAX];
    size_t depth;
    char *key; // of the next value; owned
    int documents;
    bool ended;
    struct fault *fault;
};

static enum status refuse(const struct builder *b, yaml_mark_t mark, const char *what)
{
    return fault_set(b->fault, STATUS_INVALID, "%s:%zu:%zu: %s", b->tree->name, mark.line + 1,
                     mark.column + 1, what);
}

static enum status out_of_memory(const struct builder *b)
{
    return fault_set(b->fault, STATUS_NO_MEMORY, "out of memory while reading %s.", b->tree->name);
}

// ---- building ----------------------------------------------------------------------------------

static enum status link_node(struct builder *b, struct yaml_node *node)
{
    if (!b->depth) {
        b->tree->root = node;
        return STATUS_OK;
    }
    struct yaml_node *parent = b->open[b->depth - 1];
    if (parent->count == parent->room) {
        size_t room = parent->room ? parent->room * 2 : 4;
        struct yaml_node **items = realloc(parent->items, room * sizeof *items);
        if (!items)
            return out_of_memory(b);
        parent->items = items;
        parent->room = room;
    }
    parent->items[parent->count++] = node;
    return STATUS_OK;
}

static enum status node_new(struct builder *b, enum yaml_kind kind, yaml_mark_t mark,
                            struct yaml_node **out)
{
    if (b->tree->nodes == YAML_NODES_MAX)
        return refuse(b, mark, "the file has too many values.");
    struct yaml_node *node = calloc(1, sizeof *node);
    if (!node)
        return out_of_memory(b);
    node->tree = b->tree;
    node->kind = kind;
    node->line = (int)mark.line + 1;
    node->column = (int)mark.column + 1;
    node->key = b->key;
    b->key = NULL;
    b->tree->nodes++;
    enum status status = link_node(b, node);
    if (status) {
        free(node->key);
        free(node);
        return status;
    }
    *out = node;
    return STATUS_OK;
}

static bool wants_key(const struct builder *b)
{
    return b->depth && b->open[b->depth - 1]->kind == YAML_KIND_MAP && !b->key;
}

static enum status on_scalar(struct builder *b, const yaml_event_t *event)
{
    const char *value = (const char *)event->data.scalar.value;
    size_t length = event->data.scalar.length;
    if (event->data.scalar.anchor)
        return refuse(b, event->start_mark, "anchors (&name) are not supported.");
    if (event->data.scalar.tag)
        return refuse(b, event->start_mark, "tags (!name) are not supported.");
    if (memchr(value, 0, length))
        return refuse(b, event->start_mark, "a text may not contain the character NUL.");
    if (wants_key(b) && (!length || length > KEY_BYTES_MAX))
        return refuse(b, event->start_mark, "a key must have 1 to 256 bytes.");
    char *text = strndup(value, length);
    if (!text)
        return out_of_memory(b);
    if (wants_key(b)) {
        b->key = text;
        return STATUS_OK;
    }
    struct yaml_node *node = NULL;
    enum status status = node_new(b, YAML_KIND_SCALAR, event->start_mark, &node);
    if (status) {
        free(text);
        return status;
    }
    node->text = text;
    node->quoted = event->data.scalar.style != YAML_PLAIN_SCALAR_STYLE;
    return STATUS_OK;
}

static enum status on_open(struct builder *b, const yaml_event_t *event, enum yaml_kind kind)
{
    bool map = kind == YAML_KIND_MAP;
    if (map ? event->data.mapping_start.anchor : event->data.sequence_start.anchor)
        return refuse(b, event->start_mark, "anchors (&name) are not supported.");
    if (map ? event->data.mapping_start.tag : event->data.sequence_start.tag)
        return refuse(b, event->start_mark, "tags (!name) are not supported.");
    if (wants_key(b))
        return refuse(b, event->start_mark, "a key must be a plain word, not a list or a map.");
    if (b->depth == YAML_DEPTH_MAX + DEPTH_SLACK)
        return refuse(b, event->start_mark, "the nesting is deeper than 16 levels.");
    struct yaml_node *node = NULL;
    enum status status = node_new(b, kind, event->start_mark, &node);
    if (!status)
        b->open[b->depth++] = node;
    return status;
}

static int by_key(const void *a, const void *b)
{
    const struct yaml_node *left = *(struct yaml_node *const *)a;
    const struct yaml_node *right = *(struct yaml_node *const *)b;
    int order = strcmp(left->key, right->key);
    return order ? order : (left->line > right->line) - (left->line < right->line);
}

static enum status check_duplicates(const struct builder *b, const struct yaml_node *map)
{
    if (map->count < 2)
        return STATUS_OK;
    struct yaml_node **sorted = malloc(map->count * sizeof *sorted);
    if (!sorted)
        return out_of_memory(b);
    memcpy(sorted, map->items, map->count * sizeof *sorted);
    qsort(sorted, map->count, sizeof *sorted, by_key);
    enum status status = STATUS_OK;
    for (size_t i = 1; i < map->count && !status; i++) {
        if (!strcmp(sorted[i - 1]->key, sorted[i]->key))
            status = yaml_node_fault(sorted[i], b->fault,
                                     "the key \"%.64s\" is there twice (first in "
                                     "line %d).",
                                     sorted[i]->key, sorted[i - 1]->line);
    }
    free(sorted);
    return status;
}

static enum status on_document(struct builder *b, const yaml_event_t *event)
{
    if (b->documents++)
        return refuse(b, event->start_mark, "only one document per file is supported.");
    if (event->data.document_start.version_directive ||
        event->data.document_start.tag_directives.start !=
            event->data.document_start.tag_directives.end)
        return refuse(b, event->start_mark, "directives (%YAML, %TAG) are not supported.");
    return STATUS_OK;
}

static enum status on_event(struct builder *b, const yaml_event_t *event)
{
    switch (event->type) {
    case YAML_DOCUMENT_START_EVENT:
        return on_document(b, event);
    case YAML_ALIAS_EVENT:
        return refuse(b, event->start_mark, "aliases (*name) are not supported.");
    case YAML_SCALAR_EVENT:
        return on_scalar(b, event);
    case YAML_SEQUENCE_START_EVENT:
        return on_open(b, event, YAML_KIND_LIST);
    case YAML_MAPPING_START_EVENT:
        return on_open(b, event, YAML_KIND_MAP);
    case YAML_MAPPING_END_EVENT:
        b->depth--;
        return check_duplicates(b, b->open[b->depth]);
    case YAML_SEQUENCE_END_EVENT:
        b->depth--;
        return STATUS_OK;
    case YAML_STREAM_END_EVENT:
        b->ended = true;
        return STATUS_OK;
    default:
        return STATUS_OK;
    }
}

static enum status on_syntax_error(const struct builder *b, const yaml_parser_t *parser)
{
    if (parser->error == YAML_MEMORY_ERROR)
        return out_of_memory(b);
    const char *problem = parser->problem ? parser->problem : "this is not YAML";
    if (parser->error == YAML_READER_ERROR)
        return fault_set(b->fault, STATUS_INVALID, "%s:%zu:1: %s (byte %zu).", b->tree->name,
                         parser->mark.line + 1, problem, parser->problem_offset);
    return fault_set(b->fault, STATUS_INVALID, "%s:%zu:%zu: %s.", b->tree->name,
                     parser->problem_mark.line + 1, parser->problem_mark.column + 1, problem);
}

static enum status build(struct builder *b, const char *text, size_t bytes)
{
    yaml_parser_t parser;
    if (!yaml_parser_initialize(&parser))
        return out_of_memory(b);
    yaml_parser_set_encoding(&parser, YAML_UTF8_ENCODING);
    yaml_parser_set_input_string(&parser, (const unsigned char *)text, bytes);
    enum status status = STATUS_OK;
    while (!status && !b->ended) {
        yaml_event_t event;
        if (!yaml_parser_parse(&parser, &event)) {
            status = on_syntax_error(b, &parser);
            break;
        }
        status = on_event(b, &event);
        yaml_event_delete(&event);
    }
    yaml_parser_delete(&parser);
    free(b->key);
    b->key = NULL;
    return status;
}

static bool is_nothing(const struct yaml_node *node)
{
    return !node || (yaml_node_is_null(node) && !*node->text);
}

enum status yaml_tree_parse(const char *name, const char *text, size_t bytes,
                            struct yaml_tree **out, struct fault *fault)
{
    if (bytes > YAML_BYTES_MAX)
        return fault_set(fault, STATUS_INVALID,
                         "%s:1:1: the file has %zu bytes; at most %d are read.", name, bytes,
                         YAML_BYTES_MAX);
    struct yaml_tree *tree = calloc(1, sizeof *tree);
    if (!tree)
        return fault_set(fault, STATUS_NO_MEMORY, "out of memory while reading %s.", name);
    (void)snprintf(tree->name, sizeof tree->name, "%s", name);
    struct builder b = {.tree = tree, .fault = fault};
    enum status status = build(&b, text, bytes);
    if (!status && is_nothing(tree->root)) {
        struct yaml_node *empty = tree->root ? tree->root : calloc(1, sizeof *empty);
        if (empty) {
            free(empty->text);
            *empty =
                (struct yaml_node){.tree = tree, .kind = YAML_KIND_MAP, .line = 1, .column = 1};
            tree->root = empty;
        } else {
            status = out_of_memory(&b);
        }
    }
    if (status) {
        yaml_tree_free(tree);
        return status;
    }
    *out = tree;
    return STATUS_OK;
}

enum status yaml_tree_load(const char *path, struct yaml_tree **out, struct fault *fault)
{
    struct reader *reader = NULL;
    enum status status = reader_open(path, &reader, fault);
    if (status)
        return status;
    char *text = NULL;
    if (reader->size > YAML_BYTES_MAX) {
        status = fault_set(fault, STATUS_INVALID,
                           "%s:1:1: the file has %llu bytes; at most %d are "
                           "read.",
                           path, (unsigned long long)reader->size, YAML_BYTES_MAX);
        goto done;
    }
    size_t bytes = (size_t)reader->size;
    text = malloc(bytes + 1);
    if (!text) {
        status = fault_set(fault, STATUS_NO_MEMORY, "out of memory while reading %s.", path);
        goto done;
    }
    status = reader_read(reader, 0, text, bytes);
    if (status) {
        status = fault_set(fault, status, "reading %s failed.", path);
        goto done;
    }
    status = yaml_tree_parse(path, text, bytes, out, fault);
done:
    free(text);
    reader_close(reader);
    return status;
}

static void node_free(struct yaml_node *node)
{
    if (!node)
        return;
    for (size_t i = 0; i < node->count; i++)
        node_free(node->items[i]);
    free(node->items);
    free(node->key);
    free(node->text);
    free(node);
}

void yaml_tree_free(struct yaml_tree *tree)
{
    if (!tree)
        return;
    node_free(tree->root);
    free(tree);
}

// ---- reading -----------------------------------------------------------------------------------

const struct yaml_node *yaml_tree_root(const struct yaml_tree *tree)
{
    return tree->root;
}

enum yaml_kind yaml_node_kind(const struct yaml_node *node)
{
    return node->kind;
}

int yaml_node_line(const struct yaml_node *node)
{
    return node->line;
}

size_t yaml_node_count(const struct yaml_node *node)
{
    return node->count;
}

const struct yaml_node *yaml_node_at(const struct yaml_node *node, size_t index)
{
    return index < node->count ? node->items[index] : NULL;
}

const char *yaml_node_key(const struct yaml_node *node)
{
    return node->key;
}

const char *yaml_node_text(const struct yaml_node *node)
{
    return node->text;
}

bool yaml_node_is_null(const struct yaml_node *node)
{
    return node->kind == YAML_KIND_SCALAR && !node->quoted &&
           (!*node->text || !strcmp(node->text, "~") || !strcmp(node->text, "null"));
}

const struct yaml_node *yaml_node_get(const struct yaml_node *map, const char *key)
{
    if (map->kind != YAML_KIND_MAP)
        return NULL;
    for (size_t i = 0; i < map->count; i++) {
        if (!strcmp(map->items[i]->key, key))
            return map->items[i];
    }
    return NULL;
}

enum status yaml_node_fault(const struct yaml_node *node, struct fault *fault, const char *format,
                            ...)
{
    if (!fault)
        return STATUS_INVALID;
    char text[sizeof fault->text];
    va_list list;
    va_start(list, format);
    (void)vsnprintf(text, sizeof text, format, list);
    va_end(list);
    return fault_set(fault, STATUS_INVALID, "%s:%d:%d: %s", node->tree->name, node->line,
                     node->column, text);
}

static const char *label(const struct yaml_node *node)
{
    return node->key ? node->key : "the value";
}

// How the value is quoted back to the person who wrote it.
static const char *shown(const struct yaml_node *node)
{
    if (node->kind == YAML_KIND_LIST)
        return "a list";
    return node->kind == YAML_KIND_MAP ? "a map" : node->text;
}

enum status yaml_node_u64(const struct yaml_node *node, uint64_t min, uint64_t max, uint64_t *out,
                          struct fault *fault)
{
    bool good = node->kind == YAML_KIND_SCALAR && !node->quoted && *node->text;
    uint64_t value = 0;
    for (const char *at = good ? node->text : ""; *at && good; at++) {
        good = *at >= '0' && *at <= '9' && !__builtin_mul_overflow(value, 10u, &value) &&
               !__builtin_add_overflow(value, (uint64_t)(*at - '0'), &value);
    }
    if (!good || value < min || value > max)
        return yaml_node_fault(
            node, fault, "%s must be a whole number from %llu to %llu; it is %.64s.", label(node),
            (unsigned long long)min, (unsigned long long)max, shown(node));
    *out = value;
    return STATUS_OK;
}

enum status yaml_node_double(const struct yaml_node *node, double min, double max, double *out,
                             struct fault *fault)
{
    bool good = node->kind == YAML_KIND_SCALAR && !node->quoted && *node->text &&
                strspn(node->text, "+-.0123456789eE") == strlen(node->text);
    double value = 0;
    if (good) {
        char *end = NULL;
        value = strtod(node->text, &end);
        good = !*end && isfinite(value);
    }
    if (!good || value < min || value > max)
        return yaml_node_fault(node, fault, "%s must be a number from %g to %g; it is %.64s.",
                               label(node), min, max, shown(node));
    *out = value;
    return STATUS_OK;
}

enum status yaml_node_bool(const struct yaml_node *node, bool *out, struct fault *fault)
{
    bool scalar = node->kind == YAML_KIND_SCALAR && !node->quoted;
    if (scalar && !strcmp(node->text, "true"))
        *out = true;
    else if (scalar && !strcmp(node->text, "false"))
        *out = false;
    else
        return yaml_node_fault(node, fault, "%s must be true or false; it is %.64s.", label(node),
                               shown(node));
    return STATUS_OK;
}

enum status yaml_node_string(const struct yaml_node *node, size_t bytes_max, const char **out,
                             struct fault *fault)
{
    if (node->kind != YAML_KIND_SCALAR || yaml_node_is_null(node) || !*node->text)
        return yaml_node_fault(node, fault, "%s must be a text.", label(node));
    if (strlen(node->text) > bytes_max)
        return yaml_node_fault(node, fault, "%s has %zu bytes; at most %zu are allowed.",
                               label(node), strlen(node->text), bytes_max);
    *out = node->text;
    return STATUS_OK;
}

enum status yaml_map_u64(const struct yaml_node *map, const char *key, uint64_t min, uint64_t max,
                         uint64_t *out, struct fault *fault)
{
    const struct yaml_node *node = yaml_node_get(map, key);
    return node ? yaml_node_u64(node, min, max, out, fault) : STATUS_OK;
}

enum status yaml_map_double(const struct yaml_node *map, const char *key, double min, double max,
                            double *out, struct fault *fault)
{
    const struct yaml_node *node = yaml_node_get(map, key);
    return node ? yaml_node_double(node, min, max, out, fault) : STATUS_OK;
}

enum status yaml_map_bool(const struct yaml_node *map, const char *key, bool *out,
                          struct fault *fault)
{
    const struct yaml_node *node = yaml_node_get(map, key);
    return node ? yaml_node_bool(node, out, fault) : STATUS_OK;
}

enum status yaml_map_string(const struct yaml_node *map, const char *key, size_t bytes_max,
                            const char **out, struct fault *fault)
{
    const struct yaml_node *node = yaml_node_get(map, key);
    return node ? yaml_node_string(node, bytes_max, out, fault) : STATUS_OK;
}

enum status yaml_map_list(const struct yaml_node *map, const char *key,
                          const struct yaml_node **out, struct fault *fault)
{
    const struct yaml_node *node = yaml_node_get(map, key);
    *out = node;
    if (node && node->kind != YAML_KIND_LIST)
        return yaml_node_fault(node, fault, "%s must be a list; it is %.64s.", key, shown(node));
    return STATUS_OK;
}

enum status yaml_map_known(const struct yaml_node *node, const char *const *known, size_t count,
                           struct fault *fault)
{
    if (node->kind != YAML_KIND_MAP)
        return yaml_node_fault(node, fault, "%s must be a map of key: value.", label(node));
    for (size_t i = 0; i < node->count; i++) {
        const struct yaml_node *value = node->items[i];
        size_t k = 0;
        while (k < count && strcmp(value->key, known[k]))
            k++;
        if (k < count)
            continue;
        char list[200];
        size_t used = 0;
        list[0] = 0;
        for (k = 0; k < count && used < sizeof list - 1; k++)
            used +=
                (size_t)snprintf(list + used, sizeof list - used, "%s%s", k ? ", " : "", known[k]);
        return yaml_node_fault(value, fault, "unknown key \"%.64s\"; known: %s.", value->key, list);
    }
    return STATUS_OK;
}
