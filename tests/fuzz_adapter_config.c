// SPDX-License-Identifier: Apache-2.0
// Fuzzes the reader of adapter_config.json, and what is asked of it afterwards: is this matrix
// targeted, at what rank and scale. Besides memory errors, a rank outside 1..512, a scale that is
// not finite, a sentence that is missing or an answer that changes between two calls (while
// no pattern takes too many steps) is a crash.
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "adapters/peft.h"
#include "adapters/store.h"
#include "base/check.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void ask(struct peft_config *config, const char *name)
{
    struct fault fault = {.text = ""};
    bool targeted = peft__config_targets(config, name);
    uint32_t rank = peft__config_rank(config, name);
    float scale = peft__config_scale(config, name, rank);
    CHECK(rank >= 1 && rank <= ADAPTER_RANK_MAX);
    CHECK(isfinite(scale));
    if (!peft__config_check(config, NULL)) {
        bool again = peft__config_targets(config, name);
        CHECK(targeted == again);
        CHECK(rank == peft__config_rank(config, name));
    }
    if (peft__config_check(config, &fault))
        CHECK(fault.status == STATUS_LIMIT && fault.text[0]);
    (void)peft__config_targets_parameter(config, name);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct peft_config config;
    struct fault fault = {.text = ""};
    enum status status = peft__config_parse((const char *)data, size, &config, &fault);
    if (status) {
        CHECK(fault.status == status && fault.text[0]);
    } else {
        char name[PEFT_NAME_MAX];
        for (int m = 0; m < LORA_MODULES_ALL; m++) {
            peft__module_name(17, (enum lora_module)m, -1, name);
            ask(&config, name);
            peft__module_name(0, (enum lora_module)m, 3, name);
            ask(&config, name);
        }
        for (int down = 0; down < 2; down++) {
            peft__parameter_name(2, down, name);
            ask(&config, name);
        }
        (void)peft__config_is_linear_order(&config);
        CHECK(memchr(config.ignored, 0, sizeof config.ignored));
    }
    peft__config_clear(&config);
    return 0;
}
