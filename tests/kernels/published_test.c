/* SPDX-License-Identifier: Apache-2.0 */
/* A MINMAX page and the published arrays are the same numbers. */
#include <math.h>

#include "kernels/published.h"
#include "tests/kernels/cases.h"

static struct lab lab;

static int open_lab(void **state) {
    return lab_open(&lab, "scalar", 2) ? 0 : 1;
}

static int close_lab(void **state) {
    lab_close(&lab);
    return 0;
}

static struct kv_published arrays_allocate(const struct kv_shape *shape) {
    size_t groups = kv_published_groups(shape) * sizeof(uint16_t);
    return (struct kv_published){
        .key_codes = allocate(kv_published_words(shape, true) * sizeof(uint32_t)),
        .key_scale = allocate(groups),
        .key_min = allocate(groups),
        .value_codes = allocate(kv_published_words(shape, false) * sizeof(uint32_t)),
        .value_scale = allocate(groups),
        .value_min = allocate(groups),
    };
}

static void arrays_free(struct kv_published *arrays) {
    free(arrays->key_codes);
    free(arrays->key_scale);
    free(arrays->key_min);
    free(arrays->value_codes);
    free(arrays->value_scale);
    free(arrays->value_min);
}

/* x^ by the published layout's own words: K [H][D][T w / 32] and [H][D][T / g], V [H][T]... */
static double published_key(const struct kv_shape *shape, const struct kv_published *p,
                            uint32_t head, uint32_t t, uint32_t c) {
    uint32_t D = shape->head_dim, w = shape->codec.key_bits, g = shape->codec.group;
    uint32_t row = head * D + c, per = 32 / w;
    uint32_t code = p->key_codes[row * (T / per) + t / per] >> (t % per * w) & ((1u << w) - 1);
    return code * decode_element(p->key_scale[row * (T / g) + t / g], shape->dtype) +
           decode_element(p->key_min[row * (T / g) + t / g], shape->dtype);
}

static double published_value(const struct kv_shape *shape, const struct kv_published *p,
                              uint32_t head, uint32_t t, uint32_t c) {
    uint32_t D = shape->head_dim, w = shape->codec.value_bits, g = shape->codec.group;
    uint32_t row = head * T + t, per = 32 / w;
    uint32_t code = p->value_codes[row * (D / per) + c / per] >> (c % per * w) & ((1u << w) - 1);
    return code * decode_element(p->value_scale[row * (D / g) + c / g], shape->dtype) +
           decode_element(p->value_min[row * (D / g) + c / g], shape->dtype);
}

static void check_shape(const struct kv_shape *shape) {
    uint32_t D = shape->head_dim;
    size_t bytes = kv_page_bytes(shape);
    uint16_t *raw = raw_page(shape, PATTERN_BIASED, D);
    uint8_t *page = allocate(bytes), *back = allocate(bytes);
    double *k = allocate(T * D * sizeof *k), *v = allocate(T * D * sizeof *v);
    struct kv_published arrays = arrays_allocate(shape);
    lab_quantize(&lab, shape, raw, NULL, page);
    kv_published_export(shape, page, &arrays);
    for (uint32_t head = 0; head < shape->heads; head++) {
        decode_record(shape, page + head * kv_page_map(shape).record_bytes, k, v);
        for (uint32_t t = 0; t < T; t++)
            for (uint32_t c = 0; c < D; c++) {
                assert_true(published_key(shape, &arrays, head, t, c) == k[t * D + c]);
                assert_true(published_value(shape, &arrays, head, t, c) == v[t * D + c]);
            }
    }
    memset(back, 0xff, bytes);
    kv_published_import(shape, &arrays, back);
    assert_memory_equal(back, page, bytes);
    arrays_free(&arrays);
    free(raw);
    free(page);
    free(back);
    free(k);
    free(v);
}

static void export_gives_the_same_numbers_and_import_the_same_page(void **state) {
    for (uint32_t d = 0; d < HEAD_DIMS; d++)
        for (uint8_t key_bits = 2; key_bits <= 4; key_bits += 2)
            for (uint8_t value_bits = 2; value_bits <= 4; value_bits += 2)
                for (uint8_t group = 32; group <= 128 && group != 0; group = (uint8_t)(group * 2)) {
                    struct kv_shape shape = {.heads = 2, .head_dim = head_dims[d],
                                             .dtype = group == 64 ? KV_DTYPE_BF16 : KV_DTYPE_F16};
                    shape.codec = (struct kv_codec){.kind = KV_CODEC_MINMAX, .key_bits = key_bits,
                                                    .value_bits = value_bits, .group = group};
                    if (kv_shape_valid(&shape)) check_shape(&shape);
                }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(export_gives_the_same_numbers_and_import_the_same_page),
    };
    return cmocka_run_group_tests(tests, open_lab, close_lab);
}
