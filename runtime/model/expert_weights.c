// SPDX-License-Identifier: Apache-2.0
// Expert tensors of a checkpoint, in the three forms that exist, into an expert store.
//
//   per expert   mlp.experts.E.{gate,up}_proj.weight [I, H], mlp.experts.E.down_proj.weight [H, I]
//   fused        mlp.experts.gate_up_proj [E, 2I, H], mlp.experts.down_proj [E, H, I] (transformers
//   5) transposed   mlp.experts.gate_up_proj [E, H, 2I], mlp.experts.down_proj [E, I, H]
//
// The form of a layer is proved by shapes. 2I = H makes one gate_up shape fit both fused forms, I =
// H one down shape, but never both at once, so the pair of shapes always decides. Gate rows stand
// before up rows.
#include "runtime/model/internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/arith.h"
#include "base/check.h"

enum { NAME_BYTES = 128 };

enum form { FORM_PER_EXPERT, FORM_FUSED, FORM_TRANSPOSED };

// The tensors of one expert as the checkpoint has them, and its three matrices in the store's form.
struct buffers {
    uint8_t *gate, *up, *down, *scratch; // scratch: one expert's gate_up as it stands
};

static void expert_name(char out[NAME_BYTES], uint32_t layer, uint32_t expert, const char *which)
{
    (void)snprintf(out, NAME_BYTES, "model.layers.%u.mlp.experts.%u.%s.weight", layer, expert,
                   which);
}

static void fused_name(char out[NAME_BYTES], uint32_t layer, const char *which)
{
    (void)snprintf(out, NAME_BYTES, "model.layers.%u.mlp.experts.%s", layer, which);
}

static bool has_shape(const struct tensor *tensor, const uint64_t shape[3])
{
    return tensor && tensor->dims == 3 && !memcmp(tensor->shape, shape, 3 * sizeof *shape);
}

static enum form form_of(const struct loader *loader, uint32_t layer)
{
    const struct model_config *config = &loader->model->config;
    const uint64_t e = config->experts, i = config->moe_intermediate, h = config->hidden;
    char gate_up[NAME_BYTES], down[NAME_BYTES];
    fused_name(gate_up, layer, "gate_up_proj");
    fused_name(down, layer, "down_proj");
    if (!checkpoint_has(loader->checkpoint, gate_up))
        return FORM_PER_EXPERT;
    bool transposed =
        has_shape(checkpoint_look(loader->checkpoint, gate_up), (const uint64_t[]){e, h, 2 * i}) &&
        has_shape(checkpoint_look(loader->checkpoint, down), (const uint64_t[]){e, i, h});
    return transposed ? FORM_TRANSPOSED : FORM_FUSED;
}

static enum status claim_fused(struct loader *loader, uint32_t layer, enum form form,
                               const struct weight **gate_up, const struct weight **down,
                               struct fault *fault)
{
    const struct model_config *config = &loader->model->config;
    const uint64_t e = config->experts, i = config->moe_intermediate, h = config->hidden;
    const uint64_t gate_up_shape[2][3] = {{e, 2 * i, h}, {e, h, 2 * i}};
    const uint64_t down_shape[2][3] = {{e, h, i}, {e, i, h}};
    bool transposed = form == FORM_TRANSPOSED;
    char name[NAME_BYTES];
    fused_name(name, layer, "gate_up_proj");
    enum status status =
        checkpoint_claim(loader->checkpoint, name, gate_up_shape[transposed], 3, gate_up, fault);
    if (status)
        return status;
    fused_name(name, layer, "down_proj");
    return checkpoint_claim(loader->checkpoint, name, down_shape[transposed], 3, down, fault);
}

// The three tensors of one expert: gate, up, down.
static enum status claim_one(struct loader *loader, uint32_t layer, uint32_t expert,
                             const struct weight *out[3], struct fault *fault)
{
    static const char *const which[] = {"gate_proj", "up_proj", "down_proj"};
    const struct model_config *config = &loader->model->config;
    const uint64_t wide[] = {config->moe_intermediate, config->hidden};
    const uint64_t tall[] = {config->hidden, config->moe_intermediate};
    for (size_t i = 0; i < ARRAY_COUNT(which); i++) {
        char name[NAME_BYTES];
        expert_name(name, layer, expert, which[i]);
        enum status status =
            checkpoint_claim(loader->checkpoint, name, i == 2 ? tall : wide, 2, &out[i], fault);
        if (status)
            return status;
    }
    return STATUS_OK;
}

enum status model__experts_claim(struct loader *loader, struct fault *fault)
{
    const struct model_config *config = &loader->model->config;
    const struct weight *weights[3];
    enum status status = STATUS_OK;
    for (uint32_t layer = 0; !status && layer < config->layers; layer++) {
        if (!config->is_moe[layer])
            continue;
        enum form form = form_of(loader, layer);
        if (form != FORM_PER_EXPERT)
            status = claim_fused(loader, layer, form, &weights[0], &weights[1], fault);
        for (uint32_t e = 0; form == FORM_PER_EXPERT && !status && e < config->experts; e++)
            status = claim_one(loader, layer, e, weights, fault);
    }
    return status;
}

// ---- reading ----

static enum status read_one(struct loader *loader, uint32_t layer, uint32_t expert,
                            const struct buffers *to, struct fault *fault)
{
    const struct weight *weights[3];
    uint8_t *const out[3] = {to->gate, to->up, to->down};
    enum status status = claim_one(loader, layer, expert, weights, fault);
    for (size_t i = 0; !status && i < 3; i++)
        status = weight_read(weights[i], loader->model->dtype, 0, out[i],
                             (size_t)weights[i]->tensor->elements, fault);
    return status;
}

// out[cols][rows] = in[rows][cols], `row_elements` apart, elements of `size` bytes
static void transpose(const uint8_t *in, size_t rows, size_t cols, size_t row_elements, size_t size,
                      uint8_t *out)
{
    for (size_t c = 0; c < cols; c++)
        for (size_t r = 0; r < rows; r++)
            memcpy(out + (c * rows + r) * size, in + (r * row_elements + c) * size, size);
}

static enum status read_fused(struct loader *loader, uint32_t layer, uint32_t expert,
                              enum form form, const struct buffers *to, struct fault *fault)
{
    const struct model_config *config = &loader->model->config;
    enum dtype dtype = loader->model->dtype;
    const struct weight *gate_up, *down;
    size_t i = config->moe_intermediate, h = config->hidden, size = dtype_bytes(dtype);
    uint64_t first = (uint64_t)expert * i * h;
    enum status status = claim_fused(loader, layer, form, &gate_up, &down, fault);
    if (!status)
        status = weight_read(gate_up, dtype, 2 * first, to->scratch, 2 * i * h, fault);
    if (status)
        return status;
    if (form == FORM_FUSED) {
        memcpy(to->gate, to->scratch, i * h * size);
        memcpy(to->up, to->scratch + i * h * size, i * h * size);
        return weight_read(down, dtype, first, to->down, i * h, fault);
    }
    transpose(to->scratch, h, i, 2 * i, size, to->gate);
    transpose(to->scratch + i * size, h, i, 2 * i, size, to->up);
    status = weight_read(down, dtype, first, to->scratch, i * h, fault);
    if (!status)
        transpose(to->scratch, i, h, h, size, to->down);
    return status;
}

static enum status store_layer(struct loader *loader, uint32_t layer, uint32_t moe_layer,
                               const struct buffers *buffers, struct expert_store_writer *writer,
                               struct fault *fault)
{
    const struct model_config *config = &loader->model->config;
    enum form form = form_of(loader, layer);
    enum status status = STATUS_OK;
    for (uint32_t e = 0; !status && e < config->experts; e++) {
        status = form == FORM_PER_EXPERT ? read_one(loader, layer, e, buffers, fault)
                                         : read_fused(loader, layer, e, form, buffers, fault);
        if (!status)
            status = expert_store_put(writer, moe_layer, e, buffers->gate, buffers->up,
                                      buffers->down, fault);
        if (!status && loader->progress)
            loader->progress(loader->progress_context, (uint64_t)config->moe_intermediate *
                                                           config->hidden * 3 *
                                                           dtype_bytes(loader->model->dtype));
    }
    return status;
}

enum status model__experts_store(struct loader *loader, const char *path, struct fault *fault)
{
    const struct model *model = loader->model;
    size_t matrix = (size_t)model->expert_shape.intermediate * model->expert_shape.hidden *
                    dtype_bytes(model->dtype);
    uint8_t *memory = malloc(5 * matrix);
    if (!memory)
        return fault_set(fault, STATUS_NO_MEMORY, "out of memory while writing the expert store.");
    const struct buffers buffers = {memory, memory + matrix, memory + 2 * matrix,
                                    memory + 3 * matrix};
    struct expert_store_writer *writer = NULL;
    enum status status =
        expert_store_create(path, &model->expert_shape, &model->digests.model, &writer, fault);
    for (uint32_t layer = 0, moe_layer = 0; !status && layer < model->config.layers; layer++)
        if (model->config.is_moe[layer])
            status = store_layer(loader, layer, moe_layer++, &buffers, writer, fault);
    if (!status) {
        status = expert_store_finish(writer, fault);
        writer = NULL;
    }
    expert_store_abandon(writer);
    free(memory);
    return status;
}
