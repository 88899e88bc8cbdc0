// SPDX-License-Identifier: Apache-2.0
// polder synth: a random checkpoint for benchmarks and tests.
#include <stdio.h>

#include "runtime/cli/commands.h"
#include "runtime/model/synth.h"

int command_synth(const struct settings *settings)
{
    struct fault fault = {.text = ""};
    if (!settings->out) {
        (void)fprintf(stderr, "polder: say where to write: --out DIR.\n");
        return EXIT_USAGE;
    }
    struct synth_options options = {.directory = settings->out,
                                    .shape = settings->shape,
                                    .overrides = settings->set.item,
                                    .override_count = settings->set.count,
                                    .tokenizer_directory = settings->model,
                                    .seed = settings->seed};
    if (synth_write(&options, &fault))
        return complain(&fault);
    (void)printf("wrote a random %s checkpoint to %s\n", settings->shape, settings->out);
    return EXIT_DONE;
}
