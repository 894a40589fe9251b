/* SPDX-License-Identifier: Apache-2.0 */
/* cases.h - cmocka, and the shapes that tests of kernels go through. */
#ifndef KV_TESTS_KERNELS_CASES_H
#define KV_TESTS_KERNELS_CASES_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include <cmocka.h>

#include "tests/kernels/decode.h"
#include "tests/kernels/lab.h"

enum { T = KV_BLOCK_TOKENS };

static const uint16_t head_dims[] = {64, 96, 128, 256};
enum { HEAD_DIMS = sizeof head_dims / sizeof head_dims[0] };

static inline struct kv_shape shape_of(const char *preset, uint32_t heads, uint32_t head_dim,
                                       uint8_t dtype) {
    struct kv_preset found;
    assert_int_equal(kv_preset_find(preset, &found), KV_OK);
    struct kv_shape shape = {.heads = (uint16_t)heads,
                             .head_dim = (uint16_t)head_dim,
                             .dtype = dtype,
                             .codec = found.codec};
    assert_true(kv_shape_valid(&shape));
    return shape;
}

static inline void *allocate(size_t bytes) {
    void *memory = malloc(bytes);
    assert_non_null(memory);
    return memory;
}

/* A raw page of one pattern, to be freed. */
static inline uint16_t *raw_page(const struct kv_shape *shape, enum pattern pattern,
                                 uint64_t seed) {
    struct dice dice = {seed};
    uint16_t *raw = allocate(kv_shape_bytes_raw(shape));
    pattern_fill(pattern, &dice, shape, raw);
    pattern_fill(pattern, &dice, shape, raw + kv_shape_elements(shape));
    return raw;
}

#endif
