// SPDX-License-Identifier: Apache-2.0
// The CUDA device: choice and checks of the GPU, memory, copies beside the segments, faults, the
// table.
//
// Three streams besides those of stream_create: one per direction of copy_start, one for zero_now
// and uploads. What zero_now did is waited for by the next submit (side_done). A CUDA error is
// sticky: the device is marked failed, said once in the log, and every later call answers DEVICE;
// only a new process heals.
//
// Threads: the engine thread, and one thread at a time for upload while a model is loaded.
#include <cuda_runtime_api.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/log.h"
#include "kernels/cuda/cuda.h"
#include "kernels/cuda/stream.h"

enum status cuda__fail(struct cuda_device *device, const char *call, int error)
{
    if (!device->failed) {
        (void)snprintf(device->failure, sizeof device->failure, "%.80s: %s", call,
                       cudaGetErrorString((cudaError_t)error));
        log_line(LOG_ERROR, "%s: %s", device->info.name, device->failure);
    }
    device->failed = STATUS_DEVICE;
    return STATUS_DEVICE;
}

static struct cuda_device *cuda_of(const struct device *device)
{
    return (struct cuda_device *)(uintptr_t)device;
}

static void device_info(const struct device *device, struct device_info *out)
{
    *out = cuda_of(device)->info;
}

// ---- memory ----

static enum status device_alloc(struct device *device, size_t bytes, void **out)
{
    struct cuda_device *d = cuda_of(device);
    *out = NULL;
    cudaError_t error = cudaMalloc(out, bytes);
    if (error == cudaErrorMemoryAllocation) {
        (void)cudaGetLastError(); // not sticky: the caller says what was asked and what was free
        return STATUS_NO_MEMORY;
    }
    CUDA_TRY(d, error);
    CUDA_TRY(d, cudaMemsetAsync(*out, 0, bytes, d->side));
    CUDA_TRY(d, cudaStreamSynchronize(d->side));
    return STATUS_OK;
}

static void device_release(struct device *device, void *memory)
{
    if (memory && cudaFree(memory) != cudaSuccess && !cuda_of(device)->failed)
        log_line(LOG_WARN, "%s: releasing device memory failed.", cuda_of(device)->info.name);
}

static enum status device_alloc_host(struct device *device, size_t bytes, void **out)
{
    struct cuda_device *d = cuda_of(device);
    *out = NULL;
    cudaError_t error = cudaHostAlloc(out, bytes, cudaHostAllocPortable | cudaHostAllocMapped);
    if (error == cudaErrorMemoryAllocation) {
        (void)cudaGetLastError();
        return STATUS_NO_MEMORY;
    }
    CUDA_TRY(d, error);
    memset(*out, 0, bytes);
    return STATUS_OK;
}

static void device_release_host(struct device *device, void *memory)
{
    if (memory && cudaFreeHost(memory) != cudaSuccess && !cuda_of(device)->failed)
        log_line(LOG_WARN, "%s: releasing pinned memory failed.", cuda_of(device)->info.name);
}

static size_t device_act_bytes(const struct device *device, size_t rows, size_t cols)
{
    (void)device;
    return rows * cuda__act_cols(cols) * 2;
}

static size_t device_free_bytes(const struct device *device)
{
    size_t available = 0, total = 0;
    (void)device;
    return cudaMemGetInfo(&available, &total) == cudaSuccess ? available : 0;
}

static enum status device_move(struct device *device, void *to, const void *from, size_t bytes)
{
    struct cuda_device *d = cuda_of(device);
    CUDA_TRY(d, cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, d->side));
    CUDA_TRY(d, cudaStreamSynchronize(d->side));
    return STATUS_OK;
}

static enum status device_zero_now(struct device *device, void *to, size_t bytes)
{
    struct cuda_device *d = cuda_of(device);
    CUDA_TRY(d, cudaMemsetAsync(to, 0, bytes, d->side));
    d->side_dirty = true;
    return STATUS_OK;
}

// ---- copies beside the segments ----

static enum status device_copy_start(struct device *device, enum copy_direction direction, void *to,
                                     const void *from, size_t bytes)
{
    struct cuda_device *d = cuda_of(device);
    CHECK(d->copy_count[direction] < DEVICE_COPIES_MAX);
    enum cudaMemcpyKind kind =
        direction == COPY_TO_DEVICE ? cudaMemcpyHostToDevice : cudaMemcpyDeviceToHost;
    uint32_t at = (d->copy_first[direction] + d->copy_count[direction]) % DEVICE_COPIES_MAX;
    CUDA_TRY(d, cudaMemcpyAsync(to, from, bytes, kind, d->copies[direction]));
    CUDA_TRY(d, cudaEventRecord(d->copy_done[direction][at], d->copies[direction]));
    d->copy_count[direction]++;
    return STATUS_OK;
}

static bool device_copy_poll(struct device *device, enum copy_direction direction,
                             enum status *status)
{
    struct cuda_device *d = cuda_of(device);
    *status = d->failed;
    if (!d->copy_count[direction])
        return true;
    cudaError_t error = cudaEventQuery(d->copy_done[direction][d->copy_first[direction]]);
    if (error == cudaErrorNotReady)
        return false;
    d->copy_first[direction] = (d->copy_first[direction] + 1) % DEVICE_COPIES_MAX;
    d->copy_count[direction]--;
    if (error != cudaSuccess)
        *status = cuda__fail(d, "a copy between host and device", (int)error);
    return true;
}

// ---- life ----

static void device_destroy(struct device *device)
{
    if (!device)
        return;
    struct cuda_device *d = cuda_of(device);
    if (d->blas)
        (void)cublasLtDestroy(d->blas);
    for (int i = 0; i < 2; i++) {
        for (int k = 0; k < DEVICE_COPIES_MAX; k++)
            if (d->copy_done[i][k])
                (void)cudaEventDestroy(d->copy_done[i][k]);
        if (d->copies[i])
            (void)cudaStreamDestroy(d->copies[i]);
    }
    if (d->side_done)
        (void)cudaEventDestroy(d->side_done);
    if (d->side)
        (void)cudaStreamDestroy(d->side);
    free(d);
}

static const struct device_table table = {
    .destroy = device_destroy,
    .info = device_info,
    .alloc = device_alloc,
    .release = device_release,
    .act_bytes = device_act_bytes,
    .alloc_host = device_alloc_host,
    .release_host = device_release_host,
    .upload = device_move,
    .download = device_move,
    .zero_now = device_zero_now,
    .free_bytes = device_free_bytes,
    .copy_start = device_copy_start,
    .copy_poll = device_copy_poll,
    .stream_create = cuda__stream_create,
    .stream_destroy = cuda__stream_destroy,
    .submit = cuda__submit,
    .poll = cuda__poll,
    .wait = cuda__wait,
    .unit = cuda__unit,
    .captures = cuda__captures,
    .copy = cuda__record_copy,
    .zero = cuda__record_zero,
    .scatter = cuda__record_scatter,
    .gather = cuda__record_gather,
    .embed = cuda__record_embed,
    .rmsnorm = cuda__record_rmsnorm,
    .gemm = cuda__record_gemm,
    .swiglu = cuda__record_swiglu,
    .lora_gather = cuda__record_lora_gather,
    .lora_shrink = cuda__record_lora_shrink,
    .lora_expand = cuda__record_lora_expand,
    .qk_norm_rope_kv = cuda__record_qk_norm_rope_kv,
    .attention = cuda__record_attention,
    .router = cuda__record_router,
    .moe_map = cuda__record_moe_map,
    .moe_gate_up = cuda__record_moe_gate_up,
    .moe_down = cuda__record_moe_down,
    .moe_combine = cuda__record_moe_combine,
    .sample = cuda__record_sample,
    .all_reduce = cuda__record_all_reduce,
};

static enum status check_gpu(int ordinal, struct cudaDeviceProp *properties, struct fault *fault)
{
    int count = 0;
    cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess || !count)
        return fault_set(fault, STATUS_UNSUPPORTED,
                         "there is no usable GPU here (%s): use --device cpu.",
                         error == cudaSuccess ? "none is visible" : cudaGetErrorString(error));
    if (ordinal < 0 || ordinal >= count)
        return fault_set(fault, STATUS_UNSUPPORTED,
                         "there is no GPU cuda:%d: this machine shows %d, counted from cuda:0.",
                         ordinal, count);
    error = cudaGetDeviceProperties(properties, ordinal);
    if (error != cudaSuccess)
        return fault_set(fault, STATUS_UNSUPPORTED, "GPU cuda:%d cannot be asked: %s.", ordinal,
                         cudaGetErrorString(error));
    if (properties->major != 9 || properties->minor != 0)
        return fault_set(fault, STATUS_UNSUPPORTED,
                         "GPU cuda:%d (%s) is sm_%d%d; this build has kernels for sm_90 (H100, "
                         "H200) only: use --device cpu.",
                         ordinal, properties->name, properties->major, properties->minor);
    return STATUS_OK;
}

static enum status open_gpu(struct cuda_device *d)
{
    CUDA_TRY(d, cudaSetDevice(d->ordinal));
    CUDA_TRY(d, cudaSetDeviceFlags(cudaDeviceScheduleSpin));
    CUDA_TRY(d, cudaStreamCreateWithFlags(&d->side, cudaStreamNonBlocking));
    CUDA_TRY(d, cudaEventCreateWithFlags(&d->side_done, cudaEventDisableTiming));
    for (int i = 0; i < 2; i++) {
        CUDA_TRY(d, cudaStreamCreateWithFlags(&d->copies[i], cudaStreamNonBlocking));
        for (int k = 0; k < DEVICE_COPIES_MAX; k++)
            CUDA_TRY(d, cudaEventCreateWithFlags(&d->copy_done[i][k], cudaEventDisableTiming));
    }
    if (cublasLtCreate(&d->blas) != CUBLAS_STATUS_SUCCESS)
        return cuda__fail(d, "cublasLtCreate", (int)cudaErrorUnknown);
    enum status status = cuda__gemm_prepare(d);
    if (!status)
        status = cuda__attention_prepare(d);
    if (!status)
        status = cuda__lora_prepare(d);
    if (!status)
        status = cuda__moe_prepare(d);
    if (!status)
        status = cuda__sample_prepare(d);
    return status;
}

enum status device_create_cuda(const struct cuda_options *options, struct device **out,
                               struct fault *fault)
{
    struct cudaDeviceProp properties;
    *out = NULL;
    if (options->dtype != DTYPE_BF16)
        return fault_set(fault, STATUS_UNSUPPORTED,
                         "the CUDA backend computes in bfloat16 only: leave --dtype out, or use "
                         "--device cpu for float32.");
    enum status status = check_gpu(options->ordinal, &properties, fault);
    if (status)
        return status;
    struct cuda_device *d = calloc(1, sizeof *d);
    if (!d)
        return fault_set(fault, STATUS_NO_MEMORY, "no memory for the CUDA device");
    d->base.table = &table;
    d->ordinal = options->ordinal;
    d->invariant = options->batch_invariant;
    d->multiprocessors = properties.multiProcessorCount;
    d->info.dtype = DTYPE_BF16;
    d->info.rows_max = ROWS_MAX;
    d->info.hidden_max = HIDDEN_MAX;
    d->info.head_dim_max = HEAD_DIM_MAX;
    d->info.experts_max = EXPERTS_MAX;
    d->info.top_k_max = TOP_K_MAX;
    d->info.threads = (uint32_t)properties.multiProcessorCount;
    (void)snprintf(d->info.instruction_set, sizeof d->info.instruction_set, "sm_90a");
    (void)snprintf(d->info.name, sizeof d->info.name, "cuda:%d %.36s%s", d->ordinal,
                   properties.name, d->invariant ? ", batch-invariant" : "");
    status = open_gpu(d);
    if (status) {
        (void)fault_set(fault, status, "GPU cuda:%d could not be opened: %s", d->ordinal,
                        d->failure);
        device_destroy(&d->base);
        return status;
    }
    *out = &d->base;
    return STATUS_OK;
}
