// SPDX-License-Identifier: Apache-2.0
// The CUDA backend beside the libraries. moe_combine against cuSPARSE: y += P H, where P is the CSR
// matrix [rows][pairs] with top_k gates in each row (columns are the row's own pairs) and H the
// expert outputs [pairs][dim]. Both sum in fp32; the library's order is its own, so the tolerance
// is that of sums.
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>
#include <cuda_runtime_api.h>
#include <cusparse.h>

#include "engine_driver.h"
#include "kernels/comm.h"
#include "tests/test_kernels_rig.h"

struct product {
    struct device *device;
    const struct device_table *t;
    uint32_t rows, top_k, dim;
    float *gate, *out, *y; // host
    void *device_gate, *device_out, *device_y, *device_y2;
};

static void *uploaded(struct product *p, const void *from, size_t bytes)
{
    void *to = NULL;
    assert_int_equal(p->t->alloc(p->device, bytes, &to), STATUS_OK);
    assert_int_equal(p->t->upload(p->device, to, from, bytes), STATUS_OK);
    return to;
}

static float *random_host(size_t count)
{
    float *out = malloc(count * sizeof *out);
    for (size_t i = 0; i < count; i++)
        out[i] = random_float();
    return out;
}

static void sparse_product(struct product *p)
{
    uint32_t pairs = p->rows * p->top_k;
    int32_t *offset = malloc((p->rows + 1) * sizeof *offset), *column = malloc(pairs * 4);
    for (uint32_t r = 0; r <= p->rows; r++)
        offset[r] = (int32_t)(r * p->top_k);
    for (uint32_t i = 0; i < pairs; i++)
        column[i] = (int32_t)i;
    void *offsets = uploaded(p, offset, (p->rows + 1) * 4),
         *columns = uploaded(p, column, pairs * 4);
    cusparseHandle_t handle;
    cusparseSpMatDescr_t matrix;
    cusparseDnMatDescr_t h, y;
    float one = 1;
    size_t bytes = 0;
    void *space = NULL;
    assert_int_equal(cusparseCreate(&handle), 0);
    assert_int_equal(cusparseCreateCsr(&matrix, p->rows, pairs, pairs, offsets, columns,
                                       p->device_gate, CUSPARSE_INDEX_32I, CUSPARSE_INDEX_32I,
                                       CUSPARSE_INDEX_BASE_ZERO, CUDA_R_32F),
                     0);
    assert_int_equal(cusparseCreateDnMat(&h, pairs, p->dim, p->dim, p->device_out, CUDA_R_32F,
                                         CUSPARSE_ORDER_ROW),
                     0);
    assert_int_equal(cusparseCreateDnMat(&y, p->rows, p->dim, p->dim, p->device_y2, CUDA_R_32F,
                                         CUSPARSE_ORDER_ROW),
                     0);
    cusparseOperation_t plain = CUSPARSE_OPERATION_NON_TRANSPOSE;
    assert_int_equal(cusparseSpMM_bufferSize(handle, plain, plain, &one, matrix, h, &one, y,
                                             CUDA_R_32F, CUSPARSE_SPMM_ALG_DEFAULT, &bytes),
                     0);
    assert_int_equal(p->t->alloc(p->device, bytes + 64, &space), STATUS_OK);
    assert_int_equal(cusparseSpMM(handle, plain, plain, &one, matrix, h, &one, y, CUDA_R_32F,
                                  CUSPARSE_SPMM_ALG_DEFAULT, space),
                     0);
    assert_int_equal(cudaDeviceSynchronize(), 0);
    (void)cusparseDestroySpMat(matrix);
    (void)cusparseDestroyDnMat(h);
    (void)cusparseDestroyDnMat(y);
    (void)cusparseDestroy(handle);
    p->t->release(p->device, offsets);
    p->t->release(p->device, columns);
    p->t->release(p->device, space);
    free(offset);
    free(column);
}

static void combine(struct product *p)
{
    struct stream *s;
    struct segment_result result;
    assert_int_equal(p->t->stream_create(p->device, 8, &s), STATUS_OK);
    struct moe_combine_args a = {.work = {.gate = p->device_gate, .out = p->device_out},
                                 .y = p->device_y,
                                 .rows = p->rows,
                                 .dim = p->dim,
                                 .top_k = p->top_k};
    p->t->moe_combine(s, &a);
    assert_int_equal(p->t->submit(s), STATUS_OK);
    assert_int_equal(p->t->wait(s, &result), STATUS_OK);
    p->t->stream_destroy(s);
}

static void check(struct product *p)
{
    size_t count = (size_t)p->rows * p->dim;
    float *ours = malloc(count * sizeof *ours), *theirs = malloc(count * sizeof *theirs);
    assert_int_equal(p->t->download(p->device, ours, p->device_y, count * 4), STATUS_OK);
    assert_int_equal(p->t->download(p->device, theirs, p->device_y2, count * 4), STATUS_OK);
    for (size_t i = 0; i < count; i++) {
        double size = fabs((double)p->y[i]);
        for (uint32_t k = 0; k < p->top_k; k++) {
            size_t pair = i / p->dim * p->top_k + k;
            size += fabs((double)p->gate[pair] * (double)p->out[pair * p->dim + i % p->dim]);
        }
        assert_false(isnan(ours[i]) || isnan(theirs[i]));
        if (!(fabs((double)ours[i] - (double)theirs[i]) <= 2e-6 * size))
            fail_msg("element %zu: %.9g, cuSPARSE %.9g", i, (double)ours[i], (double)theirs[i]);
    }
    free(ours);
    free(theirs);
}

static void test_cuda_combine_matches_cusparse(void **state)
{
    (void)state;
    static const uint32_t shapes[][3] = {{1, 8, 2048}, {7, 2, 96}, {64, 8, 2048}, {300, 3, 1000}};
    struct cuda_options options = {.dtype = DTYPE_BF16};
    struct device *device = NULL;
    random_bytes(&rig_rng.seed, sizeof rig_rng.seed);
    assert_int_equal(device_create_cuda(&options, &device, NULL), STATUS_OK);
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        struct product p = {.device = device,
                            .t = device->table,
                            .rows = shapes[i][0],
                            .top_k = shapes[i][1],
                            .dim = shapes[i][2]};
        size_t pairs = (size_t)p.rows * p.top_k, count = (size_t)p.rows * p.dim;
        p.gate = random_host(pairs);
        p.out = random_host(pairs * p.dim);
        p.y = random_host(count);
        p.device_gate = uploaded(&p, p.gate, pairs * 4);
        p.device_out = uploaded(&p, p.out, pairs * p.dim * 4);
        p.device_y = uploaded(&p, p.y, count * 4);
        p.device_y2 = uploaded(&p, p.y, count * 4);
        combine(&p);
        sparse_product(&p);
        check(&p);
        void *all[] = {p.device_gate, p.device_out, p.device_y, p.device_y2};
        for (size_t k = 0; k < ARRAY_COUNT(all); k++)
            p.t->release(device, all[k]);
        free(p.gate);
        free(p.out);
        free(p.y);
    }
    device->table->destroy(device);
}

// NCCL with one rank: the key, the communicator and the collective itself, on a stream.
static void test_cuda_nccl_sums_one_rank(void **state)
{
    (void)state;
    enum { COUNT = 1000 };
    struct cuda_options options = {.dtype = DTYPE_BF16};
    struct device *device = NULL;
    struct comm_key key;
    struct comm *comm = NULL;
    struct fault fault = {.text = ""};
    assert_int_equal(device_create_cuda(&options, &device, NULL), STATUS_OK);
    struct product p = {.device = device, .t = device->table};
    if (comm_key_make(&key, &fault) || comm_create_nccl(&key, 0, 1, &comm, &fault))
        fail_msg("%s", fault.text);
    float *from = random_host(COUNT), *sum = malloc(COUNT * sizeof *sum);
    void *device_from = uploaded(&p, from, COUNT * 4), *device_to = uploaded(&p, sum, COUNT * 4);
    assert_int_equal(comm->table->all_reduce(comm, NULL, device_from, device_to, COUNT), STATUS_OK);
    assert_int_equal(cudaDeviceSynchronize(), 0);
    assert_int_equal(p.t->download(device, sum, device_to, COUNT * 4), STATUS_OK);
    assert_memory_equal(sum, from, COUNT * 4);
    comm->table->destroy(comm);
    p.t->release(device, device_from);
    p.t->release(device, device_to);
    free(from);
    free(sum);
    device->table->destroy(device);
}

int main(void)
{
    driver_skip_without_device();
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_cuda_combine_matches_cusparse),
                                       cmocka_unit_test(test_cuda_nccl_sums_one_rank)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
