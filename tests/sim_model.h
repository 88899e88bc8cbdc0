// SPDX-License-Identifier: Apache-2.0
// Models and adapters of the simulator: small odd shapes whose every weight is a formula, the same
// things as files for the code under test, and the reference: what the fake device must answer for
// a prompt, computed token by token from the formulas alone, without pages, batches or steps.
#ifndef POLDER_TESTS_SIM_MODEL_H
#define POLDER_TESTS_SIM_MODEL_H

#include "adapters/adapters.h"
#include "experts/experts.h"
#include "fakes.h"
#include "runtime/model/model.h"

enum {
    SIM_LAYERS_MAX = 6,
    SIM_EXPERTS_MAX = 8,
    SIM_VARIANTS = 4,
    SIM_CONTENTS = 8,
    SIM_RANK_MAX = 32
};

// One adapter's content, by formula; `store` is the file made of it.
struct sim_adapter {
    uint32_t number;
    uint32_t rank[LORA_MODULES_ALL]; // 0: not in the adapter
    char store[256];
    uint64_t *words; // [lora_pair_rows(layers)][experts][A, B][SIM_RANK_MAX]
};

struct sim_model {
    uint32_t variant;
    struct model model;
    uint8_t is_moe[SIM_LAYERS_MAX];
    struct model_layer layers[SIM_LAYERS_MAX];
    uint64_t *cells; // one 64-byte cell per weight
    struct kv_shape kv_shape;
    struct adapter_base base;
    struct fake_reader store;
    uint64_t gate_up[SIM_LAYERS_MAX][SIM_EXPERTS_MAX], down[SIM_LAYERS_MAX][SIM_EXPERTS_MAX];
    struct sim_adapter adapters[SIM_CONTENTS];
    char directory[200];
};

enum { SIM_PAGE_BYTES = 32768, SIM_VOCAB = 601 };

// Variant 0: dense, MoE, MoE; 1: all MoE, KV blocks of two pages; 2: dense; 3: five layers, experts
// of three pages, KV blocks of three. Adapter stores are made in a new directory under /tmp.
void sim_model_make(struct sim_model *sim, uint32_t variant);
void sim_model_clear(struct sim_model *sim); // removes the directory

struct sim_reference {
    const struct sim_model *sim;
    const struct sim_adapter *adapter; // NULL: the base model
    uint64_t kv_sum[SIM_LAYERS_MAX];
    uint32_t position;
    uint64_t logits; // after the last token fed
};

void sim_reference_begin(struct sim_reference *r, const struct sim_model *sim,
                         const struct sim_adapter *adapter);
void sim_reference_feed(struct sim_reference *r, int32_t token);

#endif
