// SPDX-License-Identifier: Apache-2.0
// Configuration files: base/yaml.h and tenants.yaml. Claims: a refusal has a sentence with name and
// line; a tree has every node within the limits and unique keys; getters never read a value they
// refuse; what tenants_parse accepts is inside its ranges. With -DPOLDER_PLANT_BUG one collection
// too many is opened.
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "base/yaml.h"
#include "tenants/tenants.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void check_scalar(const struct yaml_node *node)
{
    uint64_t number = 7;
    double real = 0.5;
    bool flag = false;
    const char *text = NULL;
    struct fault fault = {.text = ""};
    CHECK(yaml_node_text(node));
    CHECK(yaml_node_u64(node, 10, 1000, &number, &fault) ? number == 7
                                                         : number >= 10 && number <= 1000);
    CHECK(yaml_node_double(node, -1, 1, &real, &fault) ? real == 0.5 : real >= -1 && real <= 1);
    (void)!yaml_node_bool(node, &flag, &fault);
    CHECK(yaml_node_string(node, 64, &text, &fault) ? !text : *text && strlen(text) <= 64);
}

static size_t check_node(const struct yaml_node *node, int depth)
{
    size_t nodes = 1;
    CHECK(depth <= YAML_DEPTH_MAX && yaml_node_line(node) >= 1);
    if (yaml_node_kind(node) == YAML_KIND_SCALAR)
        check_scalar(node);
    for (size_t i = 0; i < yaml_node_count(node); i++) {
        const struct yaml_node *item = yaml_node_at(node, i);
        if (yaml_node_kind(node) == YAML_KIND_MAP && i < 64)
            CHECK(yaml_node_get(node, yaml_node_key(item)) == item);
        nodes += check_node(item, depth + 1);
    }
    return nodes;
}

static void check_tenants(const char *text, size_t size)
{
    struct tenants *tenants = NULL, *again = NULL;
    struct fault fault = {.text = ""};
    uint32_t number;
    if (tenants_parse("t", text, size, NULL, &tenants, &fault)) {
        CHECK(fault.text[0] && !tenants);
        return;
    }
    CHECK(tenants_count(tenants) >= 1 && tenants_count(tenants) <= TENANTS_MAX);
    for (uint32_t i = 0; i < tenants_count(tenants); i++) {
        const struct tenant *tenant = tenants_at(tenants, i);
        CHECK(tenant->name[0] && tenant->class < TENANT_CLASSES && tenant->weight >= 0.01);
        (void)tenants_allow_adapter(tenants, i, "some-adapter");
    }
    CHECK(!tenants_find_key(tenants, "no such key", 11, &number));
    CHECK(tenants_parse("t", text, size, tenants, &again, &fault) == STATUS_OK);
    CHECK(tenants_count(again) == tenants_count(tenants));
    tenants_free(again);
    tenants_free(tenants);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct yaml_tree *tree = NULL;
    struct fault fault = {.text = ""};
    if (yaml_tree_parse("t", (const char *)data, size, &tree, &fault)) {
        CHECK(!tree && !strncmp(fault.text, "t:", 2));
        return 0;
    }
    CHECK(check_node(yaml_tree_root(tree), 0) <= YAML_NODES_MAX + 1);
    yaml_tree_free(tree);
    check_tenants((const char *)data, size);
    return 0;
}
