// SPDX-License-Identifier: Apache-2.0
// Parses any bytes as config.json. What is accepted must be a shape that the loader and the kernels
// can work with: every field in range, layers and experts consistent.
#include <math.h>
#include <stdint.h>

#include "base/check.h"
#include "runtime/model/model.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void check_config(const struct model_config *config)
{
    CHECK(config->hidden && config->hidden <= 65536 && config->layers && config->layers <= 1024);
    CHECK(config->heads && config->kv_heads && config->heads % config->kv_heads == 0);
    CHECK(config->head_dim >= 2 && config->head_dim % 2 == 0 && config->head_dim <= 1024);
    CHECK(config->vocab && config->max_positions && config->eos_count <= MODEL_EOS_MAX);
    CHECK(isfinite(config->rms_epsilon) && config->rms_epsilon > 0);
    CHECK(isfinite(config->rope_theta) && config->rope_theta >= 1);
    for (uint32_t i = 0; i < config->eos_count; i++)
        CHECK(config->eos[i] < config->vocab);
    uint32_t moe = 0;
    for (uint32_t i = 0; i < config->layers; i++)
        moe += config->is_moe[i];
    CHECK((moe > 0) == (config->experts > 0));
    CHECK(moe == config->layers || config->intermediate > 0);
    if (moe)
        CHECK(config->top_k && config->top_k <= config->experts && config->moe_intermediate);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct model_config config;
    struct fault fault = {0};
    if (model_config_parse((const char *)data, size, &config, &fault)) {
        CHECK(fault.text[0] && !config.is_moe);
        return 0;
    }
    check_config(&config);
    model_config_clear(&config);
    return 0;
}
