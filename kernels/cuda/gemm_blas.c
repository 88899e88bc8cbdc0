// SPDX-License-Identifier: Apache-2.0
// Dense products of many rows by cuBLASLt: bf16 operands, fp32 accumulation, fp32 result.
//
// cuBLASLt counts columns first. Read that way, W [n][k] row-major is a k x n matrix A that is used
// transposed, x [rows][k] is a k x rows matrix B, and y [rows][n] is the n x rows matrix
//   D = A^T B,   lda = ldb = act_cols(k), ldd = y_stride.
// The sum runs over act_cols(k) columns: the padding of both operands is zero.
//
// Descriptors live for one call. That, and the heuristic's choice of an algorithm, is host work: it
// is done when a unit is captured (or eagerly, in tests), not in every step. The heuristic sees the
// true alignment of the pointers, and is a function of shapes and alignment: the same bucket gives
// the same algorithm. Reductions through atomics are not asked for.
#include "kernels/cuda/gemm.h"

struct problem {
    cublasLtMatmulDesc_t operation;
    cublasLtMatrixLayout_t weight, x, y;
    cublasLtMatmulPreference_t preference;
};

// Of the address and of the distance between columns; 256 at most, which is what is worth knowing.
static uint32_t alignment(const void *p, size_t stride_bytes)
{
    size_t bits = (size_t)p | stride_bytes | 256;
    return (uint32_t)(bits & (~bits + 1));
}

static bool operation_make(struct problem *p)
{
    cublasOperation_t transposed = CUBLAS_OP_T, plain = CUBLAS_OP_N;
    return !cublasLtMatmulDescCreate(&p->operation, CUBLAS_COMPUTE_32F, CUDA_R_32F) &&
           !cublasLtMatmulDescSetAttribute(p->operation, CUBLASLT_MATMUL_DESC_TRANSA, &transposed,
                                           sizeof transposed) &&
           !cublasLtMatmulDescSetAttribute(p->operation, CUBLASLT_MATMUL_DESC_TRANSB, &plain,
                                           sizeof plain);
}

static bool preference_set(struct problem *p, cublasLtMatmulPreferenceAttributes_t which,
                           uint32_t value)
{
    return !cublasLtMatmulPreferenceSetAttribute(p->preference, which, &value, sizeof value);
}

static bool preference_make(struct problem *p, const void *weight, const void *x, const float *y,
                            size_t k_bytes, size_t y_bytes)
{
    size_t workspace = BLAS_WORKSPACE_BYTES;
    uint32_t schemes = CUBLASLT_REDUCTION_SCHEME_NONE | CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
    return !cublasLtMatmulPreferenceCreate(&p->preference) &&
           !cublasLtMatmulPreferenceSetAttribute(p->preference,
                                                 CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                                 &workspace, sizeof workspace) &&
           preference_set(p, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, schemes) &&
           preference_set(p, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
                          alignment(weight, k_bytes)) &&
           preference_set(p, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignment(x, k_bytes)) &&
           preference_set(p, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, alignment(y, y_bytes)) &&
           preference_set(p, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignment(y, y_bytes));
}

static void problem_free(struct problem *p)
{
    if (p->preference)
        (void)cublasLtMatmulPreferenceDestroy(p->preference);
    if (p->weight)
        (void)cublasLtMatrixLayoutDestroy(p->weight);
    if (p->x)
        (void)cublasLtMatrixLayoutDestroy(p->x);
    if (p->y)
        (void)cublasLtMatrixLayoutDestroy(p->y);
    if (p->operation)
        (void)cublasLtMatmulDescDestroy(p->operation);
}

bool cuda__gemm_blas(const struct cuda_launch *l, const struct gemm_args *a, const void *x,
                     float *y, size_t y_stride, uint32_t rows)
{
    struct problem p = {0};
    size_t k = cuda__act_cols(a->k);
    cublasLtMatmulHeuristicResult_t found;
    int count = 0;
    bool ready = operation_make(&p) &&
                 !cublasLtMatrixLayoutCreate(&p.weight, CUDA_R_16BF, k, a->n, (int64_t)k) &&
                 !cublasLtMatrixLayoutCreate(&p.x, CUDA_R_16BF, k, rows, (int64_t)k) &&
                 !cublasLtMatrixLayoutCreate(&p.y, CUDA_R_32F, a->n, rows, (int64_t)y_stride) &&
                 preference_make(&p, a->weight, x, y, 2 * k, 4 * y_stride) &&
                 !cublasLtMatmulAlgoGetHeuristic(l->device->blas, p.operation, p.weight, p.x, p.y,
                                                 p.y, p.preference, 1, &found, &count) &&
                 count > 0 && found.state == CUBLAS_STATUS_SUCCESS;
    if (ready) {
        const float one = 1.0f, zero = 0.0f, *beta = a->add && y == a->y ? &one : &zero;
        cublasStatus_t status = cublasLtMatmul(l->device->blas, p.operation, &one, a->weight,
                                               p.weight, x, p.x, beta, y, p.y, y, p.y, &found.algo,
                                               l->blas_workspace, BLAS_WORKSPACE_BYTES, l->stream);
        if (status != CUBLAS_STATUS_SUCCESS)
            (void)cuda__fail(l->device, cublasLtGetStatusName(status), (int)cudaErrorUnknown);
    }
    problem_free(&p);
    return ready;
}
