// SPDX-License-Identifier: Apache-2.0
// Strict YAML: the part of YAML 1.1 that people write into configuration files, as a read-only tree
// whose nodes know their line. Refused with a sentence: anchors, aliases, tags, directives, several
// documents, duplicate keys, keys that are not scalars, NUL in a scalar, nesting deeper than
// YAML_DEPTH_MAX, more than YAML_BYTES_MAX bytes or YAML_NODES_MAX nodes. Every sentence begins
// "file:line:column: ".
//
// Scalars keep their text; a getter decides what they mean. Unquoted true/false are the only
// booleans, unquoted decimal digits the only integers, so `no`, `0x10` and "5" are never taken for
// something else. Any one thread at a time; a finished tree may be read by many.
#ifndef POLDER_BASE_YAML_H
#define POLDER_BASE_YAML_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

enum { YAML_DEPTH_MAX = 16, YAML_NODES_MAX = 65536, YAML_BYTES_MAX = 1 << 20 };

enum yaml_kind { YAML_KIND_SCALAR, YAML_KIND_LIST, YAML_KIND_MAP };

struct yaml_tree;
struct yaml_node;

// `name` is only used in sentences; `text` is not kept. An empty document gives an empty map as
// root. STATUS_INVALID with a sentence for anything refused. The caller frees with yaml_tree_free.
MUST_USE enum status yaml_tree_parse(const char *name, const char *text, size_t bytes,
                                     struct yaml_tree **out, struct fault *fault);
MUST_USE enum status yaml_tree_load(const char *path, struct yaml_tree **out, struct fault *fault);
void yaml_tree_free(struct yaml_tree *tree);
const struct yaml_node *yaml_tree_root(const struct yaml_tree *tree);

enum yaml_kind yaml_node_kind(const struct yaml_node *node);
int yaml_node_line(const struct yaml_node *node);
size_t yaml_node_count(const struct yaml_node *node); // items or pairs; 0 for a scalar
const struct yaml_node *yaml_node_at(const struct yaml_node *node, size_t index); // in file order
const char *yaml_node_key(const struct yaml_node *node);  // of a value in a map; NULL elsewhere
const char *yaml_node_text(const struct yaml_node *node); // of a scalar; NULL for list and map
bool yaml_node_is_null(const struct yaml_node *node);     // an unquoted ~, null or nothing at all
const struct yaml_node *yaml_node_get(const struct yaml_node *map, const char *key); // or NULL

// Sets the fault to "file:line:column: <sentence>" and returns STATUS_INVALID.
enum status yaml_node_fault(const struct yaml_node *node, struct fault *fault, const char *format,
                            ...) PRINTF_LIKE(3, 4);

// One value. STATUS_INVALID with a sentence when it is of another kind or out of range.
MUST_USE enum status yaml_node_u64(const struct yaml_node *node, uint64_t min, uint64_t max,
                                   uint64_t *out, struct fault *fault);
MUST_USE enum status yaml_node_double(const struct yaml_node *node, double min, double max,
                                      double *out, struct fault *fault);
MUST_USE enum status yaml_node_bool(const struct yaml_node *node, bool *out, struct fault *fault);
// A scalar of 1..bytes_max bytes; *out lives as long as the tree.
MUST_USE enum status yaml_node_string(const struct yaml_node *node, size_t bytes_max,
                                      const char **out, struct fault *fault);

// The same for the value of `key`; a missing key leaves *out as it was and is no failure.
MUST_USE enum status yaml_map_u64(const struct yaml_node *map, const char *key, uint64_t min,
                                  uint64_t max, uint64_t *out, struct fault *fault);
MUST_USE enum status yaml_map_double(const struct yaml_node *map, const char *key, double min,
                                     double max, double *out, struct fault *fault);
MUST_USE enum status yaml_map_bool(const struct yaml_node *map, const char *key, bool *out,
                                   struct fault *fault);
MUST_USE enum status yaml_map_string(const struct yaml_node *map, const char *key, size_t bytes_max,
                                     const char **out, struct fault *fault);
// *out: the list, or NULL when the key is missing. STATUS_INVALID when it is something else.
MUST_USE enum status yaml_map_list(const struct yaml_node *map, const char *key,
                                   const struct yaml_node **out, struct fault *fault);

// Is `node` a map, and is every key one of the known ones? The sentence lists them. STATUS_INVALID
// if not.
MUST_USE enum status yaml_map_known(const struct yaml_node *node, const char *const *known,
                                    size_t count, struct fault *fault);

#endif
