// SPDX-License-Identifier: Apache-2.0
// The stream's entries of the device table, see stream.c.
#ifndef POLDER_KERNELS_CUDA_STREAM_H
#define POLDER_KERNELS_CUDA_STREAM_H

#include "kernels/cuda/cuda.h"

// name in the table, its arguments, whether it opens a row slot of its own
#define CUDA_ROW_OPERATIONS(X)                                                                     \
    X(gather, gather_args, true)                                                                   \
    X(embed, embed_args, false)                                                                    \
    X(rmsnorm, rmsnorm_args, false)                                                                \
    X(gemm, gemm_args, false)                                                                      \
    X(swiglu, swiglu_args, false)                                                                  \
    X(qk_norm_rope_kv, qk_args, false)                                                             \
    X(attention, attention_args, false)                                                            \
    X(router, router_args, false)                                                                  \
    X(moe_combine, moe_combine_args, false)                                                        \
    X(sample, sample_args, false)                                                                  \
    X(all_reduce, all_reduce_args, false)

// Those that know the adapters of the step: they carry a copy of its lora_batch.
#define CUDA_LORA_OPERATIONS(X)                                                                    \
    X(lora_gather, lora_gather_args, batch)                                                        \
    X(lora_shrink, lora_shrink_args, batch)                                                        \
    X(lora_expand, lora_expand_args, batch)                                                        \
    X(moe_map, moe_map_args, lora)                                                                 \
    X(moe_gate_up, moe_gemm_args, lora)                                                            \
    X(moe_down, moe_gemm_args, lora)

enum status cuda__stream_create(struct device *device, uint32_t commands, struct stream **out);
void cuda__stream_destroy(struct stream *stream);
enum status cuda__submit(struct stream *stream);
bool cuda__poll(struct stream *stream, struct segment_result *result);
enum status cuda__wait(struct stream *stream, struct segment_result *result);
void cuda__unit(struct stream *stream);
uint64_t cuda__captures(const struct stream *stream);
void cuda__record_copy(struct stream *stream, void *to, const void *from, size_t bytes);
void cuda__record_zero(struct stream *stream, void *to, size_t bytes);
void cuda__record_scatter(struct stream *stream, const struct scatter_args *a);
#define X(name, args, own) void cuda__record_##name(struct stream *stream, const struct args *a);
CUDA_ROW_OPERATIONS(X)
CUDA_LORA_OPERATIONS(X)
#undef X

#endif
