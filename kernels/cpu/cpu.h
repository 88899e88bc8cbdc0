// SPDX-License-Identifier: Apache-2.0
// What the files of this folder share: the device, its compute slots, the stream and its commands.
//
// Scratch is bounded at creation: one struct slot per thread (below), and per stream the command
// list and the work areas named in struct cpu_stream. No operation allocates. Limits that follow
// are CHECKed when recording: columns of a weight <= TILES_MAX tiles, head_dim <= HEAD_DIM_MAX,
// experts <= EXPERTS_MAX, rank
// <= RANK_MAX.
#ifndef POLDER_KERNELS_CPU_CPU_H
#define POLDER_KERNELS_CPU_CPU_H

#include <stdatomic.h>

#include "base/check.h"
#include "kernels/cpu/micro.h"
#include "kernels/device.h"

enum {
    WINDOW = 16,        // commands looked at for overlap
    TOKENS_CHUNK = 126, // tokens of one GEMM task at most: 21 groups of 6
    TILES_MAX = 2048,   // 131072 columns of bf16, 65536 of fp32
    HEAD_DIM_MAX = 512,
    QUERIES = 32, // (row, head) pairs that share one pass over K and V
    EXPERTS_MAX = 4096,
    RANK_MAX = 1024,
    STREAMS_MAX = 32,
    THREADS_MAX = 1024,
    ROUTER_ROWS = 16,          // up to here the logits of a router are split over threads
    ADAPTER_ADDED = 4 << 20,   // floats of expert LoRA kept between commands
    COLUMNS_CHUNK = 512,       // columns of a row-wise task
    COPY_CHUNK = 256 * 1024,   // bytes of a copy task
    SPIN_LIMIT = 2000,         // looks for work inside a segment before a thread sleeps
    LINGER_LIMIT = 1000,       // looks for the next segment before a worker sleeps
    SAMPLE_BUCKETS = 2048,     // buckets of the sampler's radix selection
    SAMPLE_CANDIDATES = 65536, // ids of one bucket that are listed instead of looked for
};

// One compute slot: scratch of whoever computes, a worker or the thread that waits.
struct slot {
    const uint8_t *tiles[2 * TILES_MAX];
    const uint8_t *x[TOKENS_CHUNK];
    const uint8_t *rows[RANK_MAX], *values[RANK_MAX];
    _Alignas(64) float out[TOKENS_CHUNK * TILE_ROWS];
    _Alignas(64) float hidden[TOKENS_CHUNK * RANK_MAX];
    _Alignas(64) float mixed[TOKENS_CHUNK * 2 * TILE_ROWS];
    _Alignas(64) float scores[QUERIES * KV_SEGMENT];
    _Alignas(64) float part[QUERIES * HEAD_DIM_MAX], sum[QUERIES * HEAD_DIM_MAX];
    _Alignas(64) uint8_t query[QUERIES * HEAD_DIM_MAX * 4];
    _Alignas(64) float angle[2 * HEAD_DIM_MAX];
    _Alignas(64) float logits[EXPERTS_MAX];
    double bucket_mass[2][SAMPLE_BUCKETS]; // the first level, a deeper one
    uint32_t bucket_count[2][SAMPLE_BUCKETS];
    uint32_t candidates[SAMPLE_CANDIDATES], candidate_count; // ids of one first-level bucket
    uint32_t candidate_bucket;                               // SAMPLE_BUCKETS: of none
};

struct cpu_device {
    struct device base;
    struct device_info info;
    const struct micro *micro;
    const struct micro_dtype *kernel; // of the compute dtype
    enum dtype dtype;
    struct pool *pool; // pool.c
};

struct cpu_stream;
struct command;

// An operation: prepare counts the tasks (one thread, when all it depends on is complete), task
// runs one, finish runs once after the last. prepare and finish may be NULL (tasks as recorded;
// nothing).
struct operation {
    uint32_t (*prepare)(struct cpu_stream *s, struct command *c);
    void (*task)(struct cpu_stream *s, struct slot *slot, struct command *c, uint32_t task);
    void (*finish)(struct cpu_stream *s, struct command *c);
    bool in_miss; // runs during a miss of its own layer
    bool fence;   // waits for all before; all after wait for it
};

// A strided piece of memory a command reads or writes.
struct span {
    const uint8_t *base;
    size_t width, stride, rows; // bytes, bytes, count
};

enum { SPANS = 6 };

struct copy_args {
    uint8_t *to;
    const uint8_t *from; // NULL: zero
    size_t bytes;
};

struct command {
    const struct operation *op;
    union {
        struct copy_args copy;
        struct scatter_args scatter;
        struct gather_args gather;
        struct embed_args embed;
        struct rmsnorm_args rmsnorm;
        struct swiglu_args swiglu;
        struct gemm_args gemm;
        struct lora_gather_args lora_gather;
        struct lora_shrink_args shrink;
        struct lora_expand_args expand;
        struct qk_args qk;
        struct attention_args attention;
        struct router_args router;
        struct moe_map_args map;
        struct moe_gemm_args moe;
        struct moe_combine_args combine;
        struct all_reduce_args all_reduce;
        struct sample_args sample;
    } a;
    struct span reads[SPANS], writes[SPANS];
    uint32_t read_count, write_count;
    uint32_t after;      // commands [0, after) must be complete
    uint32_t parts;      // of gemm: tasks per row block; of LoRA: rows or pairs per task
    uint32_t split;      // how tasks are counted: columns or chunks per row block, by operation
    uint32_t miss_layer; // of moe commands
    uint32_t tasks;
    bool skipped;
    _Atomic uint32_t state; // enum command_state
    _Alignas(64) _Atomic uint32_t next;
    _Alignas(64) _Atomic uint32_t done;
};

// One expert with pairs, in a moe_gate_up or moe_down: tasks [first_task, next.first_task).
struct active_expert {
    uint32_t expert, first_task, blocks, chunks;
};

struct cpu_stream {
    struct stream base;
    struct command *commands;
    uint32_t capacity, count, fence; // fence: commands [0, fence) precede the next one
    // Shared with the workers.
    _Atomic uint32_t active;    // a segment is in flight
    _Atomic uint32_t users;     // slots looking at the commands
    _Atomic uint32_t head;      // commands [0, head) are complete
    _Atomic uint32_t submitted; // commands of the segment in flight
    bool missed;
    bool failed; // a collective failed: all that follows is skipped
    uint32_t miss_layer;
    // Work areas.
    float *router_logits;          // [ROUTER_ROWS][EXPERTS_MAX]
    struct active_expert *experts; // [EXPERTS_MAX]
    uint32_t expert_count;
    float *adapter_added; // [ADAPTER_ADDED], see moe_lora.c
    uint32_t *cursor;     // [EXPERTS_MAX] counting sort of moe_map
};

static inline struct cpu_device *cpu__device(const struct cpu_stream *s)
{
    return (struct cpu_device *)s->base.device;
}

static inline const struct micro *cpu__micro(const struct cpu_stream *s)
{
    return cpu__device(s)->micro;
}

static inline const struct micro_dtype *cpu__kernel(const struct cpu_stream *s)
{
    return cpu__device(s)->kernel;
}

static inline size_t cpu__element(const struct cpu_stream *s)
{
    return dtype_bytes(cpu__device(s)->dtype);
}

// Rows in `chunks` chunks, as even as whole groups of 6 allow.
static inline size_t cpu__chunk_size(size_t rows, size_t chunks)
{
    return round_up(div_up(rows, chunks), 6);
}

// Into how many tasks a row block is cut, so that few of them keep all threads busy to the end;
// never below 32 KiB of weights.
static inline uint32_t cpu__parts(const struct device *device, size_t blocks, size_t k_tiles)
{
    size_t enough = (size_t)16 * ((const struct cpu_device *)device)->info.threads;
    uint32_t parts = 1;
    while (parts < 4 && blocks * parts < enough && k_tiles * TILE_BYTES / parts >= 65536)
        parts *= 2;
    return parts;
}

// An act row: cols padded with zeros to whole tiles.
static inline size_t cpu__act_row_bytes(enum dtype dtype, size_t cols)
{
    return div_up(cols, tile_cols(dtype)) * TILE_ROW_BYTES;
}

// stream.c: starts a command; `tasks` stands when the operation has no prepare. Spans follow, then
// end.
struct command *cpu__record(struct stream *stream, const struct operation *op, uint32_t tasks);
void cpu__reads(struct command *c, const void *base, size_t width, size_t stride, size_t rows);
void cpu__writes(struct command *c, const void *base, size_t width, size_t stride, size_t rows);
void cpu__record_end(struct stream *stream, struct command *c);
enum status cpu__stream_create(struct device *device, uint32_t commands, struct stream **out);
void cpu__stream_destroy(struct stream *stream);
enum status cpu__submit(struct stream *stream);
bool cpu__poll(struct stream *stream, struct segment_result *result);
enum status cpu__wait(struct stream *stream, struct segment_result *result);

// stream.c, called by the pool: computes on the stream until it has retired or nothing could be
// done for SPIN_LIMIT looks. Returns whether any task was run.
bool cpu__stream_work(struct cpu_stream *s, struct slot *slot);
bool cpu__stream_has_work(struct cpu_stream *s);
bool cpu__stream_retired(struct cpu_stream *s);

// pool.c
enum status cpu__pool_create(uint32_t threads, struct pool **out);
void cpu__pool_destroy(struct pool *pool);
bool cpu__pool_add(struct pool *pool, struct cpu_stream *s); // false: STREAMS_MAX are there
void cpu__pool_remove(struct pool *pool, struct cpu_stream *s);
void cpu__pool_submitted(
    struct pool *pool); // wakes the workers but one: the waiter takes its place
// A command is open or complete: wakes sleepers, if any; `retired`: also those who wait for the
// end.
void cpu__pool_progress(struct pool *pool, bool retired);
void cpu__pool_help(struct pool *pool); // poll found the segment unfinished: wakes the last one
void cpu__pool_wait(struct pool *pool,
                    struct cpu_stream *s); // computes, else sleeps, until retired

// memory.c
enum status cpu__alloc(struct device *device, size_t bytes, void **out);
void cpu__release(struct device *device, void *memory);

// norm.c: writes fp32 values [first, first + n) of an act row, and zeros behind them when they are
// its last.
void cpu__act_store(struct cpu_stream *s, void *act, size_t row, size_t cols, size_t first,
                    size_t n, const float *from);

// lora.c: the adapter of a row (NULL: base) and where its run of rows ends.
const struct lora_adapter_view *cpu__lora_view(const struct lora_batch *b, uint32_t row,
                                               uint32_t *last);
// The segment of a row that has an adapter.
uint32_t cpu__lora_segment(const struct lora_batch *b, uint32_t row);
// Pointers to rows [first, first + count) of a slice.
void cpu__lora_rows(const struct lora_batch *b, const struct lora_adapter_view *view,
                    const struct lora_slice *slice, uint32_t first, uint32_t count,
                    const uint8_t **rows);
// Asks the caches for them.
void cpu__lora_fetch(const struct lora_batch *b, const struct lora_adapter_view *view,
                     const struct lora_slice *slice, uint32_t first, uint32_t count);
// y[r][to ..] += scale * hidden[r] B^T[first ..] for `rows` rows of one adapter; uses slot->mixed
// and slot->values.
struct expand_rows {
    const struct lora_batch *batch;
    const struct lora_adapter_view *view;
    const struct lora_pair *pair;
    const float *hidden;
    size_t hidden_stride, rows;
    size_t first, cols; // columns of B^T, of one block when it is cut
    float *y;
    size_t y_stride, to; // `to`: where column `first` goes, before interleaving
    int half;            // as interleave_half
};
void cpu__lora_expand_rows(struct cpu_stream *s, struct slot *slot, const struct expand_rows *e);
// y[first ..] += scale * from[0..n): columns of a plain row, or (half 0, 1; first a multiple of 8)
// of an interleaved one.
void cpu__lora_add(struct cpu_stream *s, float *y, const float *from, float scale, size_t first,
                   size_t n, int half);

// qk.c
uint8_t *cpu__kv_at(const struct kv_view *kv, size_t element, uint32_t layer, uint32_t sequence,
                    uint32_t position, uint32_t value, uint32_t head);
void cpu__kv_check(const struct stream *s, const struct kv_view *kv, uint32_t layer);

// The operations, as the table has them.
void cpu__copy(struct stream *s, void *to, const void *from, size_t bytes);
void cpu__zero(struct stream *s, void *to, size_t bytes);
void cpu__scatter(struct stream *s, const struct scatter_args *a);
void cpu__gather(struct stream *s, const struct gather_args *a);
void cpu__embed(struct stream *s, const struct embed_args *a);
void cpu__rmsnorm(struct stream *s, const struct rmsnorm_args *a);
void cpu__swiglu(struct stream *s, const struct swiglu_args *a);
void cpu__gemm(struct stream *s, const struct gemm_args *a);
void cpu__lora_gather(struct stream *s, const struct lora_gather_args *a);
void cpu__lora_shrink(struct stream *s, const struct lora_shrink_args *a);
void cpu__lora_expand(struct stream *s, const struct lora_expand_args *a);
void cpu__qk_norm_rope_kv(struct stream *s, const struct qk_args *a);
void cpu__attention(struct stream *s, const struct attention_args *a);
void cpu__router(struct stream *s, const struct router_args *a);
void cpu__moe_map(struct stream *s, const struct moe_map_args *a);
void cpu__moe_gate_up(struct stream *s, const struct moe_gemm_args *a);
void cpu__moe_down(struct stream *s, const struct moe_gemm_args *a);
void cpu__moe_combine(struct stream *s, const struct moe_combine_args *a);
void cpu__all_reduce(struct stream *s, const struct all_reduce_args *a);
void cpu__sample(struct stream *s, const struct sample_args *a);

#endif
