// SPDX-License-Identifier: Apache-2.0
// Expert LoRA as PEFT writes it for the 3-D parameters of transformers 5 (target_parameters), and
// stacked 3-D tensors as other trainers export it.
//
// Parameters of a layer: gate_up_proj [E, 2I, H], down_proj [E, H, I] (out, in for a Linear). PEFT
// wraps the module once for each targeted parameter, in the order in which the module declares
// them, whatever the order of target_parameters: gate_up_proj is the inner wrapper
// (".experts.base_layer"), down_proj the outer one (".experts"); a parameter targeted alone is the
// outer one. The tensors are flat:
//   lora_A [E * r, n1]    row e * r + j        lora_B [n2, r * E]    column j * E + e
// Which of the parameter's two dimensions n1 is depends on the version that wrote the file:
//   >= 0.19.1   n1 = in,  n2 = out   delta[e] = B_e A_e          "linear order"
//   older       n1 = out, n2 = in    delta[e] = (B_e A_e)^T      "transposed": A and B change roles
// (tuners/lora/layer.py, ParamWrapper: 0.17, 0.18, 0.19.0 against 0.19.1, 0.20, 0.21, all read and
// run). {n1, n2} is {H, 2I} or {H, I} without order, so the shapes always prove which parameter it
// is. They prove the order unless the parameter is square (2I = H or I = H); then the other
// parameter of the same file proves it, and only when that is missing the version is believed, and
// the report says so.
//
// A of gate_up_proj serves the gate rows and the up rows of B: both pairs point at the same A rows.
//
// Stacked: lora_A [E, r, in], lora_B [E, out, r], for gate_proj, up_proj, down_proj or
// gate_up_proj; or either of them transposed, [E, in, r], [E, r, out], as trainers that compute
// x A B export them. The shapes prove which, one order for all A and one for all B of a file; PEFT
// writes no such file, so where rank and dimension are equal everywhere no version helps and the
// adapter is refused.
#include <inttypes.h>
#include <string.h>

#include "adapters/peft.h"
#include "adapters/store.h"
#include "base/check.h"

enum order { ORDER_UNKNOWN, ORDER_LINEAR, ORDER_TRANSPOSED };

// Sources of one expert's A and B^T for a whole parameter.
struct parameter {
    struct peft_source a, b;
    uint32_t rank, expert, layer;
    float scale;
    bool is_down;
};

// Splits gate_up into gate and up; down is one matrix.
static enum status parameter_put(struct peft_reading *reading, const struct parameter *parameter,
                                 struct fault *fault)
{
    uint32_t layer = parameter->layer, expert = parameter->expert;
    enum lora_module first = parameter->is_down ? LORA_DOWN : LORA_GATE;
    struct peft_pair pair = {
        .a = parameter->a, .b = parameter->b, .rank = parameter->rank, .scale = parameter->scale};
    (void)adapter__module_dims(reading->base, layer, first, &pair.d_in, &pair.d_out);
    enum status status = peft__plan_put(reading, layer, first, expert, &pair, fault);
    if (status || parameter->is_down)
        return status;
    pair.b.first += pair.b.dim_step * pair.d_out;
    pair.shares_a = true;
    return peft__plan_put(reading, layer, LORA_UP, expert, &pair, fault);
}

// ---- fused ----

static const struct tensor *const *fused_at(const struct peft_reading *reading, uint32_t layer,
                                            bool is_outer)
{
    return reading->tensors.fused[layer * 2 + is_outer];
}

// Is it down_proj, and in which order? False when the shape is neither parameter's.
static bool fused_shape(const struct adapter_base *base, const struct tensor *a,
                        const struct tensor *b, bool *is_down, enum order *order)
{
    uint64_t n1 = a->shape[1], n2 = b->shape[0];
    uint64_t hidden = base->hidden, inner = base->moe_intermediate, both = 2 * inner;
    if ((n1 == hidden && n2 == both) || (n1 == both && n2 == hidden)) {
        *is_down = false;
        *order = n1 == n2 ? ORDER_UNKNOWN : n1 == hidden ? ORDER_LINEAR : ORDER_TRANSPOSED;
        return true;
    }
    *is_down = true;
    *order = n1 == n2 ? ORDER_UNKNOWN : n1 == inner ? ORDER_LINEAR : ORDER_TRANSPOSED;
    return (n1 == inner && n2 == hidden) || (n1 == hidden && n2 == inner);
}

static enum status fused_check(const struct peft_reading *reading, uint32_t layer, bool is_outer,
                               bool *is_down, enum order *order, struct fault *fault)
{
    const struct tensor *const *pair = fused_at(reading, layer, is_outer);
    const struct tensor *a = pair[0], *b = pair[1];
    const char *part = is_outer ? "" : ".base_layer";
    if (!a || !b)
        return fault_set(fault, STATUS_INVALID, "model.layers.%u.mlp.experts%s has %s but no %s.",
                         layer, part, a ? "lora_A" : "lora_B", a ? "lora_B" : "lora_A");
    if (a->dims != 2 || b->dims != 2)
        return fault_set(fault, STATUS_INVALID, "\"%.150s\" or its lora_B is not a matrix.",
                         a->name);
    if (!fused_shape(reading->base, a, b, is_down, order))
        return fault_set(fault, STATUS_INVALID,
                         "\"%.150s\" (%" PRIu64 " columns) and its lora_B (%" PRIu64
                         " rows) fit neither gate_up_proj nor down_proj of the base model: this "
                         "adapter was made for another base.",
                         a->name, a->shape[1], b->shape[0]);
    return STATUS_OK;
}

// One order for the whole file.
static enum status fused_order(struct peft_reading *reading, enum order *out, struct fault *fault)
{
    bool any = false;
    *out = ORDER_UNKNOWN;
    for (uint32_t layer = 0; layer < reading->base->layers; layer++)
        for (int outer = 0; outer < 2; outer++) {
            const struct tensor *const *pair = fused_at(reading, layer, outer);
            bool is_down;
            enum order order;
            if (!pair[0] && !pair[1])
                continue;
            any = true;
            enum status status = fused_check(reading, layer, outer, &is_down, &order, fault);
            if (status)
                return status;
            if (order != ORDER_UNKNOWN && *out != ORDER_UNKNOWN && order != *out)
                return fault_set(
                    fault, STATUS_INVALID,
                    "the expert matrices of layer %u stand in another order than those "
                    "before it.",
                    layer);
            *out = order != ORDER_UNKNOWN ? order : *out;
        }
    if (any && *out == ORDER_UNKNOWN) {
        bool linear = peft__config_is_linear_order(reading->config);
        *out = linear ? ORDER_LINEAR : ORDER_TRANSPOSED;
        reading->is_by_version = true;
    }
    reading->is_transposed |= *out == ORDER_TRANSPOSED;
    return STATUS_OK;
}

static enum status fused_rank(const struct peft_reading *reading, const struct tensor *a,
                              const struct tensor *b, const char *name, uint32_t *rank,
                              struct fault *fault)
{
    *rank = peft__config_rank(reading->config, name);
    uint64_t rows = (uint64_t)*rank * reading->base->experts;
    if (a->shape[0] != rows || b->shape[1] != rows)
        return fault_set(fault, STATUS_INVALID,
                         "\"%.150s\" has %" PRIu64 " rows, its lora_B %" PRIu64
                         " columns; rank %u for %u experts makes %" PRIu64 ".",
                         a->name, a->shape[0], b->shape[1], *rank, reading->base->experts, rows);
    return STATUS_OK;
}

static enum status fused_put(struct peft_reading *reading, uint32_t layer, bool is_outer,
                             enum order order, bool *is_down, struct fault *fault)
{
    const struct tensor *const *pair = fused_at(reading, layer, is_outer);
    enum order seen;
    char name[PEFT_NAME_MAX];
    uint32_t rank, experts = reading->base->experts;
    enum status status = fused_check(reading, layer, is_outer, is_down, &seen, fault);
    if (status)
        return status;
    peft__parameter_name(layer, *is_down, name);
    if (!peft__config_targets_parameter(reading->config, name))
        return fault_set(fault, STATUS_INVALID,
                         "the file has LoRA for %s, which target_parameters does not name.", name);
    status = fused_rank(reading, pair[0], pair[1], name, &rank, fault);
    float scale = peft__config_scale(reading->config, name, rank);
    for (uint32_t e = 0; e < experts && !status; e++) {
        struct peft_source rows = {.tensor = pair[0], // lora_A [E * r, n1]
                                   .first = (uint64_t)e * rank * pair[0]->shape[1],
                                   .rank_step = pair[0]->shape[1],
                                   .dim_step = 1};
        struct peft_source columns = {.tensor = pair[1], // lora_B [n2, r * E]
                                      .first = e,
                                      .rank_step = experts,
                                      .dim_step = (uint64_t)rank * experts};
        struct parameter parameter = {.a = order == ORDER_LINEAR ? rows : columns,
                                      .b = order == ORDER_LINEAR ? columns : rows,
                                      .rank = rank,
                                      .expert = e,
                                      .layer = layer,
                                      .scale = scale,
                                      .is_down = *is_down};
        status = parameter_put(reading, &parameter, fault);
    }
    reading->has_fused = true;
    return status;
}

// Has every matrix of the parameter found its pair, in whatever layout?
static bool parameter_is_there(const struct peft_reading *reading, uint32_t layer, bool is_down)
{
    enum lora_module first = is_down ? LORA_DOWN : LORA_GATE, last = is_down ? LORA_DOWN : LORA_UP;
    for (int m = (int)first; m <= (int)last; m++)
        for (uint32_t e = 0; e < reading->base->experts; e++)
            if (!peft__pair_at(reading->plan, layer, (enum lora_module)m, e)->rank)
                return false;
    return true;
}

static enum status fused_layer(struct peft_reading *reading, uint32_t layer, enum order order,
                               struct fault *fault)
{
    const struct tensor *const *inner = fused_at(reading, layer, false);
    const struct tensor *const *outer = fused_at(reading, layer, true);
    bool has_inner = inner[0] || inner[1], has_outer = outer[0] || outer[1], is_down;
    enum status status = STATUS_OK;
    if (has_inner && !has_outer)
        return fault_set(fault, STATUS_INVALID,
                         "layer %u has mlp.experts.base_layer.lora_A but no mlp.experts.lora_A.",
                         layer);
    for (int i = 0; i < 2 && !status; i++)
        if (i ? has_outer : has_inner)
            status = fused_put(reading, layer, i, order, &is_down, fault);
    for (int i = 0; i < 2 && !status; i++) {
        char name[PEFT_NAME_MAX];
        peft__parameter_name(layer, i, name);
        if (peft__config_targets_parameter(reading->config, name) &&
            !parameter_is_there(reading, layer, i))
            status =
                fault_set(fault, STATUS_INVALID,
                          "target_parameters names %s, but the file has no LoRA for it.", name);
    }
    return status;
}

// ---- stacked ----

bool peft__stack_has(uint32_t stack, enum lora_module module)
{
    return stack ? module == LORA_GATE + stack - 1 : module == LORA_GATE || module == LORA_UP;
}

void peft__stack_name(uint32_t layer, uint32_t stack, char out[PEFT_NAME_MAX])
{
    peft__parameter_name(layer, stack == 3, out);
    if (stack == 1 || stack == 2) { // no parameter of that name: "...experts.gate_proj"
        const char *word = peft__module_word((enum lora_module)(LORA_GATE + stack - 1));
        memcpy(strrchr(out, '.') + 1, word, strlen(word) + 1);
    }
}

struct stack {
    const struct tensor *sides[2]; // lora_A, lora_B; NULL: the file has none
    enum order orders[2];          // what the shapes say
    enum lora_module module;       // gate for gate_up
    uint32_t rank, dims[2];        // in, out
    char name[PEFT_NAME_MAX];
};

// Is the tensor [experts, first, second] (linear) or [experts, second, first] (transposed)?
static bool stack_side(const struct tensor *tensor, uint32_t experts, uint32_t first,
                       uint32_t second, enum order *order)
{
    const uint64_t *shape = tensor->shape;
    if (tensor->dims != 3 || shape[0] != experts)
        return false;
    *order = first == second ? ORDER_UNKNOWN : shape[1] == first ? ORDER_LINEAR : ORDER_TRANSPOSED;
    return (shape[1] == first && shape[2] == second) || (shape[1] == second && shape[2] == first);
}

static enum status stack_read(const struct peft_reading *reading, uint32_t layer, uint32_t index,
                              struct stack *out, struct fault *fault)
{
    const struct tensor *const *pair = reading->tensors.stacked[layer * PEFT_STACKS + index];
    uint32_t experts = reading->base->experts;
    *out = (struct stack){.sides = {pair[0], pair[1]}, .module = LORA_GATE};
    if (!pair[0] && !pair[1])
        return STATUS_OK;
    if (index)
        out->module = (enum lora_module)(LORA_GATE + index - 1);
    peft__stack_name(layer, index, out->name);
    if (!pair[0] || !pair[1])
        return fault_set(fault, STATUS_INVALID, "%s has %s but no %s.", out->name,
                         pair[0] ? "lora_A" : "lora_B", pair[0] ? "lora_B" : "lora_A");
    if (!peft__config_targets(reading->config, out->name) &&
        !peft__config_targets_parameter(reading->config, out->name))
        return fault_set(fault, STATUS_INVALID,
                         "the file has LoRA for %s, which adapter_config.json does not target.",
                         out->name);
    (void)adapter__module_dims(reading->base, layer, out->module, &out->dims[0], &out->dims[1]);
    if (!index)
        out->dims[1] *= 2;
    out->rank = peft__config_rank(reading->config, out->name);
    if (!stack_side(pair[0], experts, out->rank, out->dims[0], &out->orders[0]) ||
        !stack_side(pair[1], experts, out->dims[1], out->rank, &out->orders[1]))
        return fault_set(fault, STATUS_INVALID,
                         "\"%.150s\" is not [%u, %u, %u] with a lora_B of [%u, %u, %u], nor the "
                         "transposed of these: another base or rank.",
                         pair[0]->name, experts, out->rank, out->dims[0], experts, out->dims[1],
                         out->rank);
    return STATUS_OK;
}

// One order for every lora_A of the file, and one for every lora_B.
static enum status stacked_orders(struct peft_reading *reading, enum order orders[2],
                                  struct fault *fault)
{
    for (uint32_t i = 0; i < reading->base->layers * PEFT_STACKS; i++) {
        struct stack stack;
        enum status status = stack_read(reading, i / PEFT_STACKS, i % PEFT_STACKS, &stack, fault);
        if (status)
            return status;
        reading->has_stacked |= stack.sides[0] != NULL;
        for (int side = 0; side < 2 && stack.sides[0]; side++) {
            if (stack.orders[side] == ORDER_UNKNOWN)
                continue;
            if (orders[side] != ORDER_UNKNOWN && orders[side] != stack.orders[side])
                return fault_set(
                    fault, STATUS_INVALID,
                    "\"%.150s\" stands in another order than the stacked experts before it.",
                    stack.sides[side]->name);
            orders[side] = stack.orders[side];
        }
    }
    for (int side = 0; side < 2 && reading->has_stacked; side++) {
        if (orders[side] == ORDER_UNKNOWN)
            return fault_set(
                fault, STATUS_INVALID,
                "the stacked experts are square (the rank equals the dimension), so "
                "their shapes do not prove the order of lora_%c: export one matrix per "
                "expert, or another rank.",
                side ? 'B' : 'A');
        reading->is_transposed |= orders[side] == ORDER_TRANSPOSED;
    }
    return STATUS_OK;
}

// Expert e of [E, rank, dim] (is_rows) or [E, dim, rank].
static struct peft_source stack_source(const struct tensor *tensor, uint32_t e, uint32_t rank,
                                       uint32_t dim, bool is_rows)
{
    return (struct peft_source){.tensor = tensor,
                                .first = (uint64_t)e * rank * dim,
                                .rank_step = is_rows ? dim : 1,
                                .dim_step = is_rows ? 1 : rank};
}

static enum status stacked_put(struct peft_reading *reading, uint32_t layer, uint32_t index,
                               const enum order orders[2], struct fault *fault)
{
    struct stack stack;
    enum status status = stack_read(reading, layer, index, &stack, fault);
    if (status || !stack.sides[0])
        return status;
    struct parameter one = {.rank = stack.rank, .layer = layer};
    one.scale = peft__config_scale(reading->config, stack.name, stack.rank);
    for (; one.expert < reading->base->experts && !status; one.expert++) {
        one.a = stack_source(stack.sides[0], one.expert, stack.rank, stack.dims[0],
                             orders[0] == ORDER_LINEAR);
        one.b = stack_source(stack.sides[1], one.expert, stack.rank, stack.dims[1],
                             orders[1] == ORDER_TRANSPOSED);
        struct peft_pair pair = {.a = one.a,
                                 .b = one.b,
                                 .rank = one.rank,
                                 .d_in = stack.dims[0],
                                 .d_out = stack.dims[1],
                                 .scale = one.scale};
        status = index ? peft__plan_put(reading, layer, stack.module, one.expert, &pair, fault)
                       : parameter_put(reading, &one, fault);
    }
    return status;
}

enum status peft__plan_experts(struct peft_reading *reading, struct fault *fault)
{
    enum order order, orders[2] = {ORDER_UNKNOWN, ORDER_UNKNOWN};
    enum status status = stacked_orders(reading, orders, fault);
    for (uint32_t i = 0; i < reading->base->layers * PEFT_STACKS && !status; i++)
        status = stacked_put(reading, i / PEFT_STACKS, i % PEFT_STACKS, orders, fault);
    if (!status)
        status = fused_order(reading, &order, fault);
    for (uint32_t layer = 0; layer < reading->base->layers && !status; layer++)
        if (reading->base->is_moe[layer])
            status = fused_layer(reading, layer, order, fault);
    return status;
}
