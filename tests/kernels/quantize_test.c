/* SPDX-License-Identifier: Apache-2.0 */
/* What quantizing promises, on inputs that break naive code.
 *
 * Bytes are held by vectors_test and kernel_check; here stand the properties those bytes
 * are for, measured on x^ as decode.c reads it: bounded noise, no bias, order by
 * importance, and the same page however it was asked for.  Backends: scalar and the best.
 */
#include <math.h>

#include "kernels/half.h"
#include "tests/kernels/cases.h"

static struct lab lab[2];

static int open_labs(void **state) {
    return lab_open(&lab[0], "scalar", 1) && lab_open(&lab[1], "auto", 3) ? 0 : 1;
}

static int close_labs(void **state) {
    lab_close(&lab[0]);
    lab_close(&lab[1]);
    return 0;
}

/* A quantized page of one head, and x and x^ of it. */
struct sample {
    struct kv_shape shape;
    uint16_t *raw;
    uint8_t *page;
    double *x[2]; /* keys, values: [token][channel] */
    double *hat[2];
};

static struct sample sample_make(const struct kv_shape *shape, enum pattern pattern,
                                 const float *energy, uint64_t seed) {
    struct sample s = {.shape = *shape};
    size_t bytes = (size_t)T * shape->head_dim * sizeof(double);
    s.raw = raw_page(shape, pattern, seed);
    s.page = allocate(kv_page_bytes(shape));
    for (int i = 0; i < 2; i++) {
        s.x[i] = allocate(bytes);
        s.hat[i] = allocate(bytes);
    }
    lab_quantize(&lab[0], shape, s.raw, energy, s.page);
    decode_raw(shape, s.raw, 0, s.x[0], s.x[1]);
    decode_record(shape, s.page, s.hat[0], s.hat[1]);
    return s;
}

static void sample_free(struct sample *s) {
    free(s->raw);
    free(s->page);
    for (int i = 0; i < 2; i++) {
        free(s->x[i]);
        free(s->hat[i]);
    }
}

/* Every codec, head_dim, dtype and pattern: the page is valid, its numbers are finite, and
 * no element is further off than the page's whole extent. */
static void every_pattern_gives_a_valid_page(void **state) {
    size_t count;
    const struct kv_preset *presets = kv_presets(&count);
    for (size_t p = 0; p < count; p++)
        for (uint32_t d = 0; d < HEAD_DIMS; d++)
            for (uint32_t pattern = 0; pattern < PATTERN_COUNT; pattern++) {
                uint8_t dtype = pattern % 2 ? KV_DTYPE_BF16 : KV_DTYPE_F16;
                struct kv_shape shape = shape_of(presets[p].name, 1, head_dims[d], dtype);
                if (shape.codec.kind == KV_CODEC_RAW) continue;
                struct sample s = sample_make(&shape, (enum pattern)pattern, NULL, pattern + 1);
                assert_true(kv_page_valid(&shape, s.page));
                for (int side = 0; side < 2; side++) {
                    double largest = 0;
                    for (uint32_t i = 0; i < T * head_dims[d]; i++)
                        largest = fmax(largest, fabs(s.x[side][i]));
                    /* Rotated rows mix channels: an outlier's error reaches all of its run. */
                    double bound = largest * (shape.codec.value_rotated ? 20 : 2.2) + 1e-7;
                    for (uint32_t i = 0; i < T * head_dims[d]; i++)
                        assert_true(fabs(s.hat[side][i] - s.x[side][i]) <= bound);
                }
                sample_free(&s);
            }
}

static void minmax_errors_are_half_a_step(void **state) {
    static const enum pattern patterns[] = {PATTERN_NORMAL, PATTERN_BIASED, PATTERN_ALTERNATING,
                                            PATTERN_COARSE, PATTERN_ROWS};
    for (size_t p = 0; p < sizeof patterns / sizeof patterns[0]; p++) {
        struct kv_shape shape = shape_of("kivi4-paper", 1, 128, KV_DTYPE_F16);
        struct sample s = sample_make(&shape, patterns[p], NULL, 5);
        struct kv_page_map map = kv_page_map(&shape);
        for (uint32_t t = 0; t < T; t++)
            for (uint32_t c = 0; c < 128; c++) {
                uint16_t scale[2];
                memcpy(&scale[0], s.page + map.key_scale + 2 * (t / 32 * 128 + c), 2);
                memcpy(&scale[1], s.page + map.value_scale + 2 * (c / 32 * T + t), 2);
                for (int side = 0; side < 2; side++) {
                    /* A half step, and what f16 loses in x - min, / and the scale. */
                    double step = decode_element(scale[side], KV_DTYPE_F16);
                    double off = fabs(s.hat[side][t * 128 + c] - s.x[side][t * 128 + c]);
                    assert_true(off <= step * (0.5 + 16 * 0x1p-10) + 1e-7);
                }
            }
        sample_free(&s);
    }
}

/* Constant channels and tokens come back as the nearest f16 to what they were. */
static void constant_groups_come_back(void **state) {
    struct kv_shape shape = shape_of("kivi2", 1, 128, KV_DTYPE_F16);
    struct sample s = sample_make(&shape, PATTERN_CONSTANT, NULL, 11);
    for (uint32_t i = 0; i < T * 128; i++) {
        assert_true(s.hat[0][i] == s.x[0][i]);
        assert_true(s.hat[1][i] == s.x[1][i]);
    }
    sample_free(&s);
}

/* x^ regressed on x has slope one, and the mean is kept: to the 1/16 of an e4m3 scale and
 * the rounding of the zero.  Range clipping without the correction has slopes near 0.85. */
static void keys_are_unbiased(void **state) {
    struct kv_shape shape = shape_of("kivi2", 1, 128, KV_DTYPE_F16);
    struct sample s = sample_make(&shape, PATTERN_NORMAL, NULL, 21);
    struct kv_page_map map = kv_page_map(&shape);
    double slope_sum = 0;
    uint32_t measured = 0;
    for (uint32_t slot = 0; slot < 128; slot++) {
        if (shape.codec.mixes[s.page[0]][slot / 32] == 0) continue;
        uint32_t c = s.page[map.key_order + slot];
        double mean = 0, mean_hat = 0, both = 0, power = 0;
        for (uint32_t t = 0; t < T; t++) {
            mean += s.x[0][t * 128 + c] / T;
            mean_hat += s.hat[0][t * 128 + c] / T;
        }
        for (uint32_t t = 0; t < T; t++) {
            double x = s.x[0][t * 128 + c] - mean;
            both += x * (s.hat[0][t * 128 + c] - mean_hat);
            power += x * x;
        }
        assert_true(fabs(both / power - 1) < 1.0 / 16 + 0.005);
        assert_true(fabs(mean - mean_hat) < 0.005 * sqrt(power / T));
        slope_sum += both / power;
        measured++;
    }
    assert_true(measured >= 64);
    assert_true(fabs(slope_sum / measured - 1) < 0.01);
    sample_free(&s);
}

/* Slots are channels by falling variance times energy: a channel of more energy moves
 * forward, one of none goes last, and equals stand in their own order. */
static void slots_are_ordered_by_importance(void **state) {
    struct kv_shape shape = shape_of("kivi2", 1, 64, KV_DTYPE_F16);
    struct kv_page_map map = kv_page_map(&shape);
    uint16_t *raw = allocate(kv_shape_bytes_raw(&shape));
    uint8_t *page = allocate(kv_page_bytes(&shape));
    memset(raw, 0, kv_shape_bytes_raw(&shape));
    for (uint32_t t = 0; t < T; t++)
        for (uint32_t c = 0; c < 64; c++) /* all channels alike */
            raw[t * 64 + c] = kv_f16_saturated((float)(t % 7) - 3);
    float energy[64];
    for (uint32_t c = 0; c < 64; c++) energy[c] = 1;
    energy[40] = 9;
    energy[41] = 4;
    energy[3] = 0;
    lab_quantize(&lab[0], &shape, raw, energy, page);
    const uint8_t *order = page + map.key_order;
    assert_int_equal(order[0], 40);
    assert_int_equal(order[1], 41);
    assert_int_equal(order[63], 3);
    for (uint32_t slot = 3; slot < 63; slot++) assert_true(order[slot] > order[slot - 1]);
    free(raw);
    free(page);
}

/* -0 is 0: pages of either are equal to the byte. */
static void the_sign_of_zero_leaves_no_trace(void **state) {
    size_t count;
    const struct kv_preset *presets = kv_presets(&count);
    for (size_t p = 0; p < count; p++) {
        struct kv_shape shape = shape_of(presets[p].name, 1, 96, KV_DTYPE_F16);
        if (shape.codec.kind == KV_CODEC_RAW) continue;
        uint16_t *raw = raw_page(&shape, PATTERN_COARSE, 2);
        uint8_t *pages[2] = {allocate(kv_page_bytes(&shape)), allocate(kv_page_bytes(&shape))};
        size_t elements = 2 * kv_shape_elements(&shape);
        for (size_t i = 0; i < elements / 4; i++) raw[i * 2] = 0; /* whole groups and parts */
        for (size_t i = 0; i < elements / 8; i++) raw[i] = 0;
        lab_quantize(&lab[0], &shape, raw, NULL, pages[0]);
        for (size_t i = 0; i < elements; i++)
            if (raw[i] == 0 && i % 3 == 0) raw[i] = 0x8000;
        lab_quantize(&lab[0], &shape, raw, NULL, pages[1]);
        assert_memory_equal(pages[0], pages[1], kv_page_bytes(&shape));
        free(raw);
        free(pages[0]);
        free(pages[1]);
    }
}

/* Whatever stood in the memory, whoever works, one head or many: the same bytes. */
static void a_page_does_not_depend_on_how_it_was_asked_for(void **state) {
    struct kv_shape shape = shape_of("kivi1.5", 5, 64, KV_DTYPE_BF16);
    uint16_t *raw = raw_page(&shape, PATTERN_BITS, 9);
    size_t bytes = kv_page_bytes(&shape);
    uint8_t *pages[3];
    for (int i = 0; i < 3; i++) {
        pages[i] = allocate(bytes);
        memset(pages[i], 0x11 * i, bytes);
        lab_quantize(&lab[i > 0], &shape, raw, NULL, pages[i]);
    }
    assert_memory_equal(pages[0], pages[1], bytes);
    assert_memory_equal(pages[0], pages[2], bytes);

    /* Head 3 alone is the fourth record. */
    struct kv_shape one = shape;
    one.heads = 1;
    size_t half = kv_shape_elements(&one);
    uint16_t *alone = allocate(kv_shape_bytes_raw(&one));
    memcpy(alone, raw + 3 * half, half * 2);
    memcpy(alone + half, raw + 5 * half + 3 * half, half * 2);
    lab_quantize(&lab[0], &one, alone, NULL, pages[1]);
    assert_memory_equal(pages[0] + 3 * (bytes / 5), pages[1], bytes / 5);
    free(raw);
    free(alone);
    for (int i = 0; i < 3; i++) free(pages[i]);
}

/* Dequantized elements are x^ of the page rounded once, to the shape's elements or to f16. */
static void dequantize_gives_x_hat_rounded(void **state) {
    size_t count;
    const struct kv_preset *presets = kv_presets(&count);
    for (size_t p = 0; p < count; p++)
        for (uint32_t d = 0; d < HEAD_DIMS; d++) {
            uint8_t dtype = d % 2 ? KV_DTYPE_BF16 : KV_DTYPE_F16;
            struct kv_shape shape = shape_of(presets[p].name, 1, head_dims[d], dtype);
            if (shape.codec.kind == KV_CODEC_RAW) continue;
            struct sample s = sample_make(&shape, PATTERN_BIASED, NULL, 31);
            uint16_t *back = allocate(kv_shape_bytes_raw(&shape));
            for (int l = 0; l < 4; l++) {
                uint8_t to = l / 2 ? KV_DTYPE_F16 : dtype;
                lab_dequantize(&lab[l % 2], &shape, s.page, (enum kv_dtype)to, back);
                size_t half = kv_shape_elements(&shape);
                for (size_t i = 0; i < 2 * half; i++) {
                    double exact = i < half ? s.hat[0][i] : s.hat[1][i - half];
                    double off = fabs(decode_element(back[i], to) - exact);
                    double unit = to == KV_DTYPE_BF16 ? 0x1p-9 : 0x1p-12;
                    /* Half a place of the element, and binary32's share of the sums. */
                    assert_true(off <= fabs(exact) * unit * 2 + 2e-5 * (fabs(exact) + 1));
                }
            }
            free(back);
            sample_free(&s);
        }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_pattern_gives_a_valid_page),
        cmocka_unit_test(minmax_errors_are_half_a_step),
        cmocka_unit_test(constant_groups_come_back),
        cmocka_unit_test(keys_are_unbiased),
        cmocka_unit_test(slots_are_ordered_by_importance),
        cmocka_unit_test(the_sign_of_zero_leaves_no_trace),
        cmocka_unit_test(a_page_does_not_depend_on_how_it_was_asked_for),
        cmocka_unit_test(dequantize_gives_x_hat_rounded),
    };
    return cmocka_run_group_tests(tests, open_labs, close_labs);
}
