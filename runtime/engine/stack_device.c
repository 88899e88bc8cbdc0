// SPDX-License-Identifier: Apache-2.0
#include "runtime/engine/stack_device.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"

static enum status open_cuda(const struct stack_options *o, struct device **out,
                             struct fault *fault)
{
    const char *number = o->device + strlen("cuda");
    char *end = (char *)(uintptr_t)number;
    unsigned long ordinal = 0;
    if (*number == ':' && number[1] >= '0' && number[1] <= '9')
        ordinal = strtoul(number + 1, &end, 10);
    if (*end || ordinal > 1023)
        return fault_set(fault, STATUS_INVALID,
                         "\"%.40s\" is not a device: GPUs are cuda:0, cuda:1 and so on.",
                         o->device);
    struct cuda_options options = {
        .ordinal = (int)ordinal, .dtype = o->dtype, .batch_invariant = o->batch_invariant};
    return device_create_cuda(&options, out, fault);
}

enum status stack__device_open(const struct stack_options *options, struct device **out,
                               struct fault *fault)
{
    const char *name = options->device ? options->device : "cpu";
    if (!strncmp(name, "cuda", 4))
        return open_cuda(options, out, fault);
    if (strcmp(name, "cpu") != 0)
        return fault_set(fault, STATUS_INVALID,
                         "there is no device \"%.40s\": the names are cpu, cuda:0, cuda:1 and so "
                         "on.",
                         name);
    struct cpu_options cpu = {.threads = options->threads,
                              .dtype = options->dtype,
                              .instruction_set = options->instruction_set};
    return device_create_cpu(&cpu, out, fault);
}

static bool host_access(const struct device *device)
{
    struct device_info info = {0};
    device->table->info(device, &info);
    return info.host_access;
}

enum status stack__link_open(const struct stack_options *options, struct device *device,
                             struct link **out)
{
    struct link_options speeds = {.h2d_gbytes_per_s = options->h2d_gbytes_per_s,
                                  .d2h_gbytes_per_s = options->d2h_gbytes_per_s,
                                  .read_gbytes_per_s = options->read_gbytes_per_s,
                                  .latency_us = options->link_latency_us};
    return host_access(device) ? copy_link_threads(&speeds, out)
                               : copy_link_device(device, &speeds, out);
}

bool stack__may_block(const struct device *device)
{
    return host_access(device);
}

void stack__fit_pool(const struct stack_options *options, const struct device *device,
                     size_t page_bytes, uint64_t *pool_bytes)
{
    size_t available = device->table->free_bytes(device);
    double share = options->gpu_memory_utilization;
    if (available == SIZE_MAX) // host memory: what the model wants
        return;
    uint64_t most = (uint64_t)((share > 0 ? share : 0.9) * (double)available);
    if (share > 0 || *pool_bytes > most)
        *pool_bytes = most / page_bytes * page_bytes;
}

enum status stack__no_room(const struct device *device, const char *what, uint64_t bytes,
                           const char *option, struct fault *fault)
{
    size_t available = device->table->free_bytes(device);
    if (available == SIZE_MAX)
        return fault_set(fault, STATUS_NO_MEMORY,
                         "%s of %llu MiB was asked for and could not be had; lower %s.", what,
                         (unsigned long long)(bytes >> 20), option);
    return fault_set(fault, STATUS_NO_MEMORY,
                     "%s of %llu MiB was asked for and the device has %llu MiB free; lower %s.",
                     what, (unsigned long long)(bytes >> 20), (unsigned long long)(available >> 20),
                     option);
}
