// SPDX-License-Identifier: Apache-2.0
#include "tests/test_kernels_rig.h"

#include "base/hash.h"

struct rng rig_rng;

static void seed_once(void)
{
    static bool done;
    if (done)
        return;
    done = true;
    const char *given = getenv("POLDER_TEST_SEED");
    random_bytes(&rig_rng.seed, sizeof rig_rng.seed);
    if (given)
        rig_rng.seed = strtoull(given, NULL, 10);
    printf("seed: POLDER_TEST_SEED=%llu\n", (unsigned long long)rig_rng.seed);
}

float random_float(void)
{
    float sum = 0;
    for (int i = 0; i < 6; i++)
        sum += (float)(rng_next(&rig_rng) >> 40) * (1.0f / 16777216.0f) - 0.5f;
    return sum;
}

uint32_t random_below(uint32_t n)
{
    return (uint32_t)rng_below(&rig_rng, n);
}

void rig_open(struct rig *rig, const char *instruction_set, enum dtype dtype, uint32_t threads)
{
    seed_once();
    struct cpu_options options = {threads, dtype, instruction_set};
    struct fault fault;
    memset(rig, 0, sizeof *rig);
    assert_int_equal(device_create_cpu(&options, &rig->device, &fault), STATUS_OK);
    rig->table = rig->device->table;
    rig->dtype = dtype;
    rig->instruction_set = instruction_set;
    rig->exact = true;
    assert_int_equal(rig->table->stream_create(rig->device, 64, &rig->stream), STATUS_OK);
}

enum { GPU_ARENA = 768 << 20 };

// The GPU, way 0: command by command, 1: captured units, 2: batch-invariant.
static enum status rig_open_gpu(struct rig *rig, int way, struct fault *fault)
{
    static const char *const names[] = {"cuda", "cuda captured", "cuda invariant"};
    seed_once();
    memset(rig, 0, sizeof *rig);
    struct cuda_options options = {.dtype = DTYPE_BF16, .batch_invariant = way == 2};
    enum status status = device_create_cuda(&options, &rig->device, fault);
    if (status)
        return status;
    rig->table = rig->device->table;
    rig->instruction_set = names[way];
    rig->gpu = true;
    rig->captured = way == 1;
    rig->exact = way == 2;
    assert_int_equal(rig->table->alloc_host(rig->device, GPU_ARENA, (void **)&rig->arena),
                     STATUS_OK);
    assert_int_equal(rig->table->stream_create(rig->device, 64, &rig->stream), STATUS_OK);
    rig_unit(rig);
    return STATUS_OK;
}

void rig_unit(struct rig *rig)
{
    if (rig->captured)
        rig->table->unit(rig->stream);
}

void rig_release_last(struct rig *rig)
{
    rig->blocks--;
    if (rig->gpu)
        rig->arena_used = rig->used_before[rig->blocks];
    else
        rig->table->release(rig->device, rig->memory[rig->blocks]);
}

void rig_clear(struct rig *rig)
{
    while (rig->blocks)
        rig_release_last(rig);
}

void rig_close(struct rig *rig)
{
    rig_clear(rig);
    rig->table->stream_destroy(rig->stream);
    if (rig->gpu)
        rig->table->release_host(rig->device, rig->arena);
    rig->table->destroy(rig->device);
}

static void rig_each_gpu(const char *name, void (*test)(struct rig *rig))
{
    for (int way = 0; way < 3; way++) {
        struct rig rig;
        struct fault fault;
        if (rig_open_gpu(&rig, way, &fault)) {
            printf("SKIPPED %s on the GPU: %s\n", name, fault.text);
            return;
        }
        test(&rig);
        printf("%-28s %-14s bf16 largest relative error %.2e\n", name, rig.instruction_set,
               rig.error);
        rig_close(&rig);
    }
}

void rig_each(const char *name, void (*test)(struct rig *rig))
{
    if (getenv("POLDER_TEST_GPU_ONLY")) {
        rig_each_gpu(name, test);
        return;
    }
    static const char *const sets[] = {"avx512bf16", "avx2", "portable"};
    for (size_t i = 0; i < ARRAY_COUNT(sets); i++) {
        struct cpu_options options = {1, DTYPE_F32, sets[i]};
        struct device *device;
        struct fault fault;
        if (device_create_cpu(&options, &device, &fault) != STATUS_OK) {
            printf("SKIPPED %s on %s: %s\n", name, sets[i], fault.text);
            continue;
        }
        device->table->destroy(device);
        for (int d = 0; d < 2; d++) {
            struct rig rig;
            rig_open(&rig, sets[i], d ? DTYPE_F32 : DTYPE_BF16, 2);
            test(&rig);
            printf("%-28s %-10s %-4s largest relative error %.2e\n", name, sets[i],
                   d ? "f32" : "bf16", rig.error);
            rig_close(&rig);
        }
    }
    rig_each_gpu(name, test);
}

void rig_run(struct rig *rig)
{
    struct segment_result result;
    assert_int_equal(rig->table->submit(rig->stream), STATUS_OK);
    assert_int_equal(rig->table->wait(rig->stream, &result), STATUS_OK);
    assert_false(result.missed);
    rig_unit(rig);
}

void *rig_alloc(struct rig *rig, size_t bytes)
{
    void *memory;
    CHECK(rig->blocks < (int)ARRAY_COUNT(rig->memory));
    if (rig->gpu) { // with room behind it: captured commands work on whole buckets of rows
        size_t room = round_up(rig->captured ? 2 * bytes + 65536 : bytes, 256);
        CHECK(rig->arena_used + room <= GPU_ARENA);
        memory = rig->arena + rig->arena_used;
        memset(memory, 0, room);
        rig->used_before[rig->blocks] = rig->arena_used;
        rig->arena_used += room;
        rig->memory[rig->blocks++] = memory;
        return memory;
    }
    assert_int_equal(rig->table->alloc(rig->device, bytes, &memory), STATUS_OK);
    assert_int_equal((size_t)memory % 64, 0);
    rig->memory[rig->blocks++] = memory;
    return memory;
}

float *rig_floats(struct rig *rig, size_t n)
{
    float *out = rig_alloc(rig, n * sizeof *out);
    for (size_t i = 0; i < n; i++)
        out[i] = random_float();
    return out;
}

float *rig_poison(struct rig *rig, size_t n)
{
    float *out = rig_alloc(rig, n * sizeof *out);
    for (size_t i = 0; i < n; i++)
        out[i] = NAN;
    return out;
}

float quantize(enum dtype dtype, float x)
{
    return dtype == DTYPE_BF16 ? bf16_to_f32(bf16_from_f32(x)) : x;
}

// Through rmsnorm, which is how acts are made; the fp32 result says what was rounded.
void *rig_act(struct rig *rig, size_t rows, size_t cols, float **values)
{
    size_t bytes = rig->table->act_bytes(rig->device, rows, cols);
    void *act = rig_alloc(rig, bytes);
    memset(act, 0xff, bytes);
    float *x = rig_floats(rig, rows * cols), *weight = rig_floats(rig, cols);
    *values = rig_alloc(rig, rows * cols * sizeof(float));
    rig->table->rmsnorm(rig->stream, &(struct rmsnorm_args){.x = x,
                                                            .weight = weight,
                                                            .out = act,
                                                            .out_f32 = *values,
                                                            .rows = (uint32_t)rows,
                                                            .dim = (uint32_t)cols,
                                                            .epsilon = 1e-6f});
    rig_run(rig);
    for (size_t i = 0; i < rows * cols; i++)
        (*values)[i] = quantize(rig->dtype, (*values)[i]);
    return act;
}

static size_t act_stride(const struct rig *rig, size_t cols)
{
    return rig->table->act_bytes(rig->device, 1, cols);
}

float act_get(const struct rig *rig, const void *act, size_t cols, size_t row, size_t col)
{
    const uint8_t *p = (const uint8_t *)act + row * act_stride(rig, cols);
    if (rig->dtype == DTYPE_F32)
        return ((const float *)(const void *)p)[col];
    return bf16_to_f32(((const uint16_t *)(const void *)p)[col]);
}

bool act_padding_zero(const struct rig *rig, const void *act, size_t rows, size_t cols)
{
    size_t used = cols * dtype_bytes(rig->dtype), stride = act_stride(rig, cols);
    for (size_t r = 0; r < rows; r++)
        for (size_t i = used; i < stride; i++)
            if (((const uint8_t *)act)[r * stride + i])
                return false;
    return true;
}

float *rig_weight(struct rig *rig, size_t rows, size_t cols)
{
    float *w = rig_floats(rig, rows * cols);
    for (size_t i = 0; i < rows * cols; i++)
        w[i] = quantize(rig->dtype, w[i]);
    return w;
}

void *rig_narrow(struct rig *rig, const float *values, size_t n)
{
    void *out = rig_alloc(rig, n * dtype_bytes(rig->dtype));
    for (size_t i = 0; i < n; i++) {
        if (rig->dtype == DTYPE_BF16)
            ((uint16_t *)out)[i] = bf16_from_f32(values[i]);
        else
            ((float *)out)[i] = values[i];
    }
    return out;
}

void *rig_dense(struct rig *rig, const float *values, size_t rows, size_t cols)
{
    if (!rig->gpu) {
        void *out = rig_alloc(rig, tile_count(rig->dtype, rows, cols) * TILE_BYTES);
        tile_pack(rig->dtype, rig_narrow(rig, values, rows * cols), rows, cols, -1, out);
        return out;
    }
    size_t stride = round_up(cols, tile_cols(rig->dtype));
    uint16_t *out = rig_alloc(rig, rows * stride * sizeof *out);
    for (size_t r = 0; r < rows; r++)
        for (size_t c = 0; c < cols; c++)
            out[r * stride + c] = bf16_from_f32(values[r * cols + c]);
    return out;
}

void *rig_copy(struct rig *rig, const void *from, size_t bytes)
{
    return memcpy(rig_alloc(rig, bytes), from, bytes);
}

void near(struct rig *rig, float got, double want, double scale, double tolerance)
{
    if (isnan(got) || isnan(want))
        fail_msg("not a number: got %g, want %g", (double)got, want);
    double error = fabs((double)got - want);
    if (!(error <= tolerance * scale + 1e-30))
        fail_msg("%s: got %.9g, want %.9g, scale %.3g, tolerance %.3g", rig->instruction_set,
                 (double)got, want, scale, tolerance);
    if (scale > 0 && error / scale > rig->error)
        rig->error = error / scale;
}

double tolerance_sum(const struct rig *rig)
{
    return rig->gpu ? 2e-5 : 4e-6;
}

double tolerance_row(const struct rig *rig)
{
    return rig->gpu ? 2e-6 : 1e-6;
}

double tolerance_act(const struct rig *rig)
{
    return rig->dtype == DTYPE_BF16 ? 1.0 / 256 : 4e-6;
}
