// SPDX-License-Identifier: Apache-2.0
#include "runtime/cli/config_file.h"

#include <stdio.h>

#include "base/yaml.h"

static enum status give(const char *path, const char *key, const struct yaml_node *node,
                        config_file_value value, void *context, struct fault *fault)
{
    char where[300];
    (void)snprintf(where, sizeof where, "%.250s:%d", path, yaml_node_line(node));
    if (yaml_node_kind(node) == YAML_KIND_SCALAR)
        return value(context, where, key, yaml_node_text(node), fault);
    if (yaml_node_kind(node) == YAML_KIND_MAP)
        return yaml_node_fault(node, fault, "%.60s takes a value or a list, not a map.", key);
    for (size_t i = 0; i < yaml_node_count(node); i++) {
        const struct yaml_node *item = yaml_node_at(node, i);
        if (yaml_node_kind(item) != YAML_KIND_SCALAR)
            return yaml_node_fault(item, fault, "the items of %.60s must be plain values.", key);
        (void)snprintf(where, sizeof where, "%.250s:%d", path, yaml_node_line(item));
        enum status status = value(context, where, key, yaml_node_text(item), fault);
        if (status)
            return status;
    }
    return STATUS_OK;
}

enum status config_file_read(const char *path, config_file_value value, void *context, void **owned,
                             struct fault *fault)
{
    struct yaml_tree *tree = NULL;
    enum status status = yaml_tree_load(path, &tree, fault);
    if (status)
        return status;
    const struct yaml_node *root = yaml_tree_root(tree);
    if (yaml_node_kind(root) != YAML_KIND_MAP)
        status = yaml_node_fault(root, fault, "a configuration file is a map of option: value.");
    for (size_t i = 0; !status && i < yaml_node_count(root); i++) {
        const struct yaml_node *node = yaml_node_at(root, i);
        status = give(path, yaml_node_key(node), node, value, context, fault);
    }
    if (status) {
        yaml_tree_free(tree);
        return status;
    }
    *owned = tree;
    return STATUS_OK;
}

void config_file_free(void *owned)
{
    yaml_tree_free(owned);
}
