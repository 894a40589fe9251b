/* SPDX-License-Identifier: Apache-2.0 */
/* kernel_check.h - what the files of kernel_check share.
 *
 *   kernel_check.c          options, the list of cases, the verdict
 *   kernel_check_pages.c    ingest, emit, quantize, dequantize, observe: to the byte
 *   kernel_check_attend.c   attend: to a bound
 *   kernel_check_bench.c    --bench
 */
#ifndef KV_TESTS_KERNELS_KERNEL_CHECK_H
#define KV_TESTS_KERNELS_KERNEL_CHECK_H

#include "tests/kernels/lab.h"

/* The backend under test beside the definition, and what has been seen so far. */
struct bench_pair {
    struct lab truth;
    struct lab tested;
    const char *name;
    uint64_t seed;
    uint64_t only; /* run this case alone; 0: all */
    uint64_t number; /* of the case at hand, those left out counted */
    uint64_t cases;  /* that ran */
    uint64_t failures;
    double worst_out;     /* largest error of an output, as a share of its bound */
    double worst_lse;
    double square_error;  /* of outputs, over all cases of ordinary data */
    double square_output;
};

/* Relative error of attention on ordinary data that a backend may have. */
#define ERROR_ORDINARY 0x1p-11

/* One case: everything in it follows from these. */
struct check_case {
    uint64_t seed;
    struct kv_shape shape;
    enum pattern pattern;
    const struct fixture *fixture; /* real KV instead of the pattern, or NULL */
};

/* A case's raw page; from the fixture its block-th block, over layers and again. */
void case_page(const struct check_case *check, struct dice *dice, uint32_t block, uint16_t *raw);

/* Prints one line that says how to run the case alone; the first few of a program. */
void case_fail(struct bench_pair *pair, const struct check_case *check, const char *what);

void check_pages(struct bench_pair *pair, const struct check_case *check);
void check_attend(struct bench_pair *pair, const struct check_case *check);

struct bench_options {
    const char *backend;
    uint32_t workers;
    const char *json; /* path, "-" for stdout, or NULL */
};
/* Times the backend; false: a goal was missed or the file could not be written. */
bool kernel_bench(const struct bench_options *options);

#endif
