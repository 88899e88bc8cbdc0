// SPDX-License-Identifier: Apache-2.0
// What stands for the CUDA backend in a build without it.
#include "kernels/device.h"

enum status device_create_cuda(const struct cuda_options *options, struct device **out,
                               struct fault *fault)
{
    *out = NULL;
    return fault_set(fault, STATUS_UNSUPPORTED,
                     "this build has no CUDA backend, so there is no device cuda:%d: build it with "
                     "`make cuda`, or use --device cpu.",
                     options->ordinal);
}
