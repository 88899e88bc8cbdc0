// SPDX-License-Identifier: Apache-2.0
// The CPU device: the choice of the instruction set and of the number of threads, and the table.
// The choice is made once, here; what was chosen is named in device_info.
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/cpu/cpu.h"
#include "kernels/plain.h"

static void device_destroy(struct device *device)
{
    if (!device)
        return;
    struct cpu_device *d = (struct cpu_device *)device;
    cpu__pool_destroy(d->pool);
    free(d);
}

static void device_describe(const struct device *device, struct device_info *out)
{
    *out = ((const struct cpu_device *)device)->info;
}

static size_t act_bytes(const struct device *device, size_t rows, size_t cols)
{
    return rows * cpu__act_row_bytes(((const struct cpu_device *)device)->dtype, cols);
}

static const struct device_table table = {
    .destroy = device_destroy,
    .info = device_describe,
    .alloc = cpu__alloc,
    .release = cpu__release,
    .act_bytes = act_bytes,
    .alloc_host = cpu__alloc,
    .release_host = cpu__release,
    .upload = plain_move,
    .download = plain_move,
    .zero_now = plain_zero,
    .free_bytes = plain_free_bytes,
    .copy_start = plain_copy_start,
    .copy_poll = plain_copy_poll,
    .unit = plain_unit,
    .captures = plain_captures,
    .stream_create = cpu__stream_create,
    .stream_destroy = cpu__stream_destroy,
    .submit = cpu__submit,
    .poll = cpu__poll,
    .wait = cpu__wait,
    .copy = cpu__copy,
    .zero = cpu__zero,
    .scatter = cpu__scatter,
    .gather = cpu__gather,
    .embed = cpu__embed,
    .rmsnorm = cpu__rmsnorm,
    .gemm = cpu__gemm,
    .swiglu = cpu__swiglu,
    .lora_gather = cpu__lora_gather,
    .lora_shrink = cpu__lora_shrink,
    .lora_expand = cpu__lora_expand,
    .qk_norm_rope_kv = cpu__qk_norm_rope_kv,
    .attention = cpu__attention,
    .router = cpu__router,
    .moe_map = cpu__moe_map,
    .moe_gate_up = cpu__moe_gate_up,
    .moe_down = cpu__moe_down,
    .moe_combine = cpu__moe_combine,
    .all_reduce = cpu__all_reduce,
    .sample = cpu__sample,
};

struct choice {
    const char *name;
    const struct micro *(*micro)(void);
    bool usable;
};

// The instruction sets this binary has, best first. The compiler's check includes the operating
// system's.
static void choices_fill(struct choice out[3])
{
    memset(out, 0, 3 * sizeof *out);
    uint32_t n = 0;
#ifdef POLDER_CPU_X86
    __builtin_cpu_init();
    bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("fma");
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    out[n++] = (struct choice){"avx512bf16", cpu__micro_avx512, avx512};
    out[n++] = (struct choice){"avx2", cpu__micro_avx2, avx2};
#endif
    out[n] = (struct choice){"portable", cpu__micro_portable, true};
}

static enum status micro_choose(const char *wanted, const struct micro **out, struct fault *fault)
{
    struct choice choices[3];
    choices_fill(choices);
    for (int i = 0; i < 3 && choices[i].name; i++) {
        if (wanted && strcmp(wanted, choices[i].name) != 0)
            continue;
        if (choices[i].usable) {
            *out = choices[i].micro();
            return STATUS_OK;
        }
        if (wanted)
            return fault_set(fault, STATUS_UNSUPPORTED,
                             "this CPU (or its operating system) does not have the instruction set "
                             "'%s': leave the choice to Polder, or ask for 'portable'",
                             wanted);
    }
    return fault_set(fault, STATUS_INVALID,
                     "there is no instruction set '%s' in this build: the names are avx512bf16, "
                     "avx2 and portable",
                     wanted);
}

static uint32_t threads_choose(uint32_t wanted)
{
    cpu_set_t set;
    if (wanted)
        return wanted;
    if (sched_getaffinity(0, sizeof set, &set) || CPU_COUNT(&set) < 1)
        return 1;
    return (uint32_t)min_size((size_t)CPU_COUNT(&set), THREADS_MAX);
}

enum status device_create_cpu(const struct cpu_options *options, struct device **out,
                              struct fault *fault)
{
    *out = NULL;
    if (options->threads > THREADS_MAX)
        return fault_set(fault, STATUS_INVALID, "%u threads asked for: at most %d can be used",
                         options->threads, THREADS_MAX);
    const struct micro *micro = NULL;
    enum status status = micro_choose(options->instruction_set, &micro, fault);
    if (status != STATUS_OK)
        return status;
    struct cpu_device *d = calloc(1, sizeof *d);
    if (!d)
        return fault_set(fault, STATUS_NO_MEMORY, "no memory for the CPU device");
    d->base.table = &table;
    d->micro = micro;
    d->dtype = options->dtype;
    d->kernel = &micro->dtype[options->dtype];
    d->info.threads = threads_choose(options->threads);
    d->info.dtype = options->dtype;
    d->info.dense_tiles = d->info.host_access = true;
    d->info.head_dim_max = HEAD_DIM_MAX;
    d->info.experts_max = EXPERTS_MAX;
    snprintf(d->info.instruction_set, sizeof d->info.instruction_set, "%s", micro->name);
    snprintf(d->info.name, sizeof d->info.name, "cpu %s, %u thread%s", micro->name, d->info.threads,
             d->info.threads == 1 ? "" : "s");
    status = cpu__pool_create(d->info.threads, &d->pool);
    if (status != STATUS_OK) {
        (void)fault_set(fault, status, "cannot start %u compute threads", d->info.threads);
        free(d);
        return status;
    }
    *out = &d->base;
    return STATUS_OK;
}
