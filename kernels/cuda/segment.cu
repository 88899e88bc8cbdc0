// SPDX-License-Identifier: Apache-2.0
// The two kernels around a segment: open writes the control block that all others read (row
// counts, adapters, "no miss"), close tells the host what it came to. One thread block each; bound
// by launch latency. The result's sequence number is written last: with the event after it, it
// proves that the segment ran to its end.
#include "kernels/cuda/common.cuh"

static_assert(offsetof(struct cuda_control, rows) == 16, "segment_enter reads word 4 on");

static __global__ void open_kernel(struct cuda_control *control, struct cuda_open open)
{
    uint32_t i = threadIdx.x;
    if (i < ROW_SLOTS)
        control->rows[i] = open.rows[i];
    if (i == 0) {
        control->miss_layer = NO_MISS;
        control->lora_segments = open.lora_segments;
        control->lora_rank = open.lora_rank;
    }
}

static __global__ void close_kernel(const struct cuda_control *control, struct cuda_result *result,
                                    uint32_t sequence)
{
    result->miss_layer = control->miss_layer;
    __threadfence_system();
    result->sequence = sequence;
}

void cuda__segment_open(cudaStream_t stream, struct cuda_control *control,
                        const struct cuda_open *open)
{
    open_kernel<<<1, 32, 0, stream>>>(control, *open);
}

void cuda__segment_close(cudaStream_t stream, const struct cuda_control *control,
                         struct cuda_result *result, uint32_t sequence)
{
    close_kernel<<<1, 1, 0, stream>>>(control, result, sequence);
}
