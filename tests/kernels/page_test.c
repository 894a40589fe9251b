/* SPDX-License-Identifier: Apache-2.0 */
/* Sizes, rules and order of the packed page, as page.h promises them. */
#include <math.h>

#include "kernels/cpu_codes.h"
#include "kernels/half.h"
#include "tests/kernels/cases.h"

static void kivi2_is_9232_bytes_a_head_and_two_and_a_quarter_bits(void **state) {
    struct kv_shape shape = shape_of("kivi2", 1, 128, KV_DTYPE_F16);
    assert_int_equal(kv_page_map(&shape).record_bytes, 9232);
    assert_int_equal(kv_page_bytes(&shape), 9232);
    assert_true(fabs(kv_shape_bits(&shape) - 2.25) < 0.005);
    shape.heads = 8;
    assert_int_equal(kv_page_bytes(&shape), 8 * 9232);
}

static void presets_cost_the_bits_they_are_named_for(void **state) {
    static const struct {
        const char *name;
        double bits;
        uint32_t sinks, window;
    } expected[] = {
        {"kivi1.5", 1.5, 1, 128},   {"kivi1.75", 1.75, 1, 128}, {"kivi2", 2.25, 1, 128},
        {"kivi2.5", 2.5, 1, 128},   {"kivi2-paper", 3, 0, 128}, {"kivi4-paper", 5, 0, 128},
        {"raw16", 16, 0, 0},
    };
    size_t count;
    const struct kv_preset *presets = kv_presets(&count);
    assert_int_equal(count, sizeof expected / sizeof expected[0]);
    for (size_t i = 0; i < count; i++) {
        struct kv_shape shape = shape_of(expected[i].name, 2, 128, KV_DTYPE_F16);
        assert_string_equal(presets[i].name, expected[i].name);
        assert_string_equal(kv_codec_name(&shape.codec), expected[i].name);
        assert_true(fabs(kv_shape_bits(&shape) - expected[i].bits) < 0.005);
        assert_int_equal(presets[i].sink_blocks, expected[i].sinks);
        assert_int_equal(presets[i].window_tokens, expected[i].window);
    }
    struct kv_preset untouched = {.name = "untouched"};
    assert_int_equal(kv_preset_find("kivi3", &untouched), KV_NOT_FOUND);
    assert_string_equal(untouched.name, "untouched");
    assert_string_equal(kv_codec_name(&(struct kv_codec){.kind = 9}), "custom");
}

static void parts_stand_in_order_on_multiples_of_16(void **state) {
    size_t count;
    const struct kv_preset *presets = kv_presets(&count);
    for (size_t i = 0; i < count; i++)
        for (uint32_t d = 0; d < HEAD_DIMS; d++) {
            struct kv_shape shape = shape_of(presets[i].name, 1, head_dims[d], KV_DTYPE_F16);
            if (shape.codec.kind == KV_CODEC_RAW) continue;
            struct kv_page_map m = kv_page_map(&shape);
            const uint32_t starts[] = {m.key_order,  m.key_scale,   m.key_zero,
                                       m.key_codes,  m.value_mean,  m.value_scale,
                                       m.value_zero, m.value_codes, m.record_bytes};
            for (size_t s = 0; s < sizeof starts / sizeof starts[0]; s++) {
                assert_int_equal(starts[s] % 16, 0);
                if (s > 0) assert_true(starts[s] >= starts[s - 1]);
            }
            uint32_t width_sum = kv_codec_key_width_sum(&shape.codec);
            assert_int_equal(m.value_mean - m.key_codes, 4 * head_dims[d] * width_sum);
            assert_int_equal(m.record_bytes - m.value_codes,
                             16 * head_dims[d] * shape.codec.value_bits);
        }
}

static void range_tables_follow_their_formula(void **state) {
    static const double shares[KV_RANGES] = {0, .08, .16, .24};
    for (int a = 0; a < KV_RANGES; a++) {
        assert_int_equal(kv_range_offset[a], (int)rint(shares[a] * KV_UNITS));
        for (int b = 0; b < KV_RANGES; b++) {
            double span = (1 - shares[a] - shares[b]) * KV_UNITS;
            /* The neighbours of the f16 nearest to it are further away. */
            for (int width = 2; width <= 4; width += 2) {
                uint16_t bits = width == 2 ? kv_range_step2[a][b] : kv_range_step4[a][b];
                double exact = ((1 << width) - 1) / span;
                double off = fabs(decode_element(bits, KV_DTYPE_F16) - exact);
                assert_true(off <= fabs(decode_element(bits + 1, KV_DTYPE_F16) - exact));
                assert_true(off <= fabs(decode_element(bits - 1, KV_DTYPE_F16) - exact));
            }
        }
    }
}

/* ---- rules ----------------------------------------------------------------------------------- */

static struct kv_shape good_unbiased(void) {
    return shape_of("kivi2", 2, 128, KV_DTYPE_F16);
}

static struct kv_shape good_minmax(void) {
    return shape_of("kivi2-paper", 2, 128, KV_DTYPE_F16);
}

#define REFUSED(make, change)                 \
    do {                                      \
        struct kv_shape shape = make;         \
        struct kv_codec *codec = &shape.codec; \
        (void)codec;                          \
        assert_true(kv_shape_valid(&shape));  \
        change;                               \
        assert_false(kv_shape_valid(&shape)); \
    } while (0)

static void a_shape_that_breaks_one_rule_is_refused(void **state) {
    REFUSED(good_unbiased(), shape.heads = 0);
    REFUSED(good_unbiased(), shape.heads = KV_HEADS_MAX + 1);
    REFUSED(good_unbiased(), shape.head_dim = 80);
    REFUSED(good_unbiased(), shape.head_dim = 0);
    REFUSED(good_unbiased(), shape.dtype = KV_DTYPE_F32);
    REFUSED(good_unbiased(), shape.dtype = 0);
    REFUSED(good_unbiased(), codec->kind = 3);
    REFUSED(good_unbiased(), codec->reserved[1] = 1);
}

static void a_codec_that_breaks_one_rule_is_refused(void **state) {
    REFUSED(good_unbiased(), codec->key_bits = 2);
    REFUSED(good_unbiased(), codec->group = 32);
    REFUSED(good_unbiased(), codec->value_bits = 0);
    REFUSED(good_unbiased(), codec->value_bits = 3);
    REFUSED(good_unbiased(), codec->value_bits = 4);
    REFUSED(good_unbiased(), codec->value_rotated = 2);
    REFUSED(good_unbiased(), codec->mix_count = 0);
    REFUSED(good_unbiased(), codec->mix_count = 5);
    REFUSED(good_unbiased(), codec->mix_count = 3); /* the fourth is not zero */
    REFUSED(good_unbiased(), codec->mixes[0][0] = 3);
    REFUSED(good_unbiased(), codec->mixes[0][0] = 8);
    REFUSED(good_unbiased(), codec->mixes[1][3] = 4);                              /* rises */
    REFUSED(good_unbiased(), memcpy(codec->mixes[1], (uint8_t[]){4, 2, 1, 0}, 4)); /* sum 7 */
    REFUSED(good_unbiased(), memset(codec->mixes, 0, sizeof codec->mixes));        /* sum 0 */
    REFUSED(good_minmax(), codec->key_bits = 1);
    REFUSED(good_minmax(), codec->key_bits = 3);
    REFUSED(good_minmax(), codec->value_bits = 1);
    REFUSED(good_minmax(), codec->group = 0);
    REFUSED(good_minmax(), codec->group = 16);
    REFUSED(good_minmax(), codec->value_rotated = 1);
    REFUSED(good_minmax(), codec->mix_count = 1);
    REFUSED(good_minmax(), codec->mixes[3][3] = 1);
    REFUSED(good_minmax(), (codec->group = 128, shape.head_dim = 64));
    REFUSED(good_minmax(), (codec->group = 64, shape.head_dim = 96));
    REFUSED(shape_of("raw16", 2, 128, KV_DTYPE_F16), codec->value_bits = 2);
}

/* ---- order of codes -------------------------------------------------------------------------- */

/* Random codes, packed by the kernels' walk, are found by the formula of page.h, and no
 * other bit is set: the walk and the formula are one-to-one, and unpacking inverts it. */
static void codes_stand_where_the_formula_says(void **state) {
    static const uint8_t mixes[][KV_QUARTERS] = {
        {4, 4, 0, 0}, {4, 2, 2, 0}, {4, 2, 1, 1}, {2, 2, 2, 2}, {1, 1, 1, 1}, {4, 4, 4, 4}};
    struct dice dice = {7};
    for (size_t m = 0; m < sizeof mixes / sizeof mixes[0]; m++)
        for (uint32_t d = 0; d < HEAD_DIMS; d++)
            for (uint32_t value_bits = 1; value_bits <= 2; value_bits++) {
                uint32_t D = head_dims[d];
                struct kv_shape shape = {.heads = 1, .head_dim = (uint16_t)D, .dtype = KV_DTYPE_F16};
                shape.codec = (struct kv_codec){.kind = KV_CODEC_UNBIASED, .mix_count = 1,
                                                .value_bits = (uint8_t)value_bits};
                memcpy(shape.codec.mixes[0], mixes[m], KV_QUARTERS);
                struct kv_page_map map = kv_page_map(&shape);
                uint8_t *record = allocate(map.record_bytes), *back = allocate(T * D);
                uint8_t *keys = allocate(T * D), *values = allocate(T * D);
                memset(record, 0, map.record_bytes);
                for (uint32_t i = 0; i < T * D; i++) {
                    keys[i] = (uint8_t)dice_below(&dice, 1u << mixes[m][i / T / (D / 4)]);
                    values[i] = (uint8_t)dice_below(&dice, 1u << value_bits);
                }
                kv_codes_pack_keys(mixes[m], D, keys, record + map.key_codes);
                kv_codes_pack_values(value_bits, D, values, record + map.value_codes);
                for (uint32_t i = 0; i < T * D; i++) {
                    assert_int_equal(decode_key_code(&shape, record, i / T, i % T), keys[i]);
                    assert_int_equal(decode_value_code(&shape, record, i / D, i % D), values[i]);
                }
                kv_codes_unpack_keys(mixes[m], D, record + map.key_codes, back);
                assert_memory_equal(back, keys, T * D);
                kv_codes_unpack_values(value_bits, D, record + map.value_codes, back);
                assert_memory_equal(back, values, T * D);
                free(record);
                free(back);
                free(keys);
                free(values);
            }
}

/* ---- pages from outside ------------------------------------------------------------------------ */

static void a_page_with_damaged_metadata_is_not_valid(void **state) {
    struct lab lab;
    assert_true(lab_open(&lab, "scalar", 1));
    struct kv_shape shape = shape_of("kivi2", 2, 96, KV_DTYPE_F16);
    struct kv_page_map m = kv_page_map(&shape);
    uint16_t *raw = raw_page(&shape, PATTERN_BIASED, 3);
    uint8_t *page = allocate(kv_page_bytes(&shape));
    lab_quantize(&lab, &shape, raw, NULL, page);
    assert_true(kv_page_valid(&shape, page));

    /* Where in the second record, and what: a mix that is not there, unused bytes, factors,
     * an order with a repetition and one out of range, a NaN scale, an infinite zero and
     * mean. */
    const struct {
        uint32_t at;
        uint8_t byte;
    } damages[] = {
        {0, 4},
        {1, 1},
        {15, 1},
        {3, 0x7c},
        {5, 0x80},
        {m.key_order, page[m.record_bytes + m.key_order + 1]},
        {m.key_order, 96},
        {m.key_scale + 5, 0x7f},
        {m.key_scale + 5, 0x81},
        {m.key_zero + 1, 0x7c},
        {m.value_mean + 7, 0xff},
        {m.value_scale + 127, 0xff},
    };
    for (size_t i = 0; i < sizeof damages / sizeof damages[0]; i++) {
        uint8_t *place = page + m.record_bytes + damages[i].at, was = *place;
        *place = damages[i].byte;
        assert_false(kv_page_valid(&shape, page));
        *place = was;
        assert_true(kv_page_valid(&shape, page));
    }
    /* Any codes are valid. */
    memset(page + m.key_codes, 0xff, 100);
    memset(page + m.value_codes, 0xff, 100);
    assert_true(kv_page_valid(&shape, page));
    free(raw);
    free(page);
    lab_close(&lab);
}

/* ---- small floats -------------------------------------------------------------------------------- */

static void every_small_float_widens_to_its_definition(void **state) {
    for (uint32_t bits = 0; bits < 0x10000; bits++) {
        for (uint8_t dtype = KV_DTYPE_F16; dtype <= KV_DTYPE_BF16; dtype++) {
            uint32_t infinity = dtype == KV_DTYPE_BF16 ? 0x7f80 : 0x7c00;
            float wide = kv_f32_of_element((uint16_t)bits, dtype);
            if ((bits & 0x7fff) > infinity) {
                assert_true(isnan(wide));
            } else if ((bits & 0x7fff) == infinity) {
                assert_true(isinf(wide) && (wide < 0) == (bits >> 15));
            } else {
                double exact = decode_element((uint16_t)bits, dtype);
                assert_true((double)wide == exact && !signbit(wide) == !(bits & 0x8000));
                assert_int_equal(kv_element_saturated(wide, dtype), bits);
            }
        }
    }
    for (uint32_t bits = 0; bits < 0x7f; bits++) {
        assert_true((double)kv_f32_of_e4m3((uint8_t)bits) == decode_e4m3((uint8_t)bits));
        assert_int_equal(kv_e4m3_saturated(kv_f32_of_e4m3((uint8_t)bits)), bits);
    }
    assert_true(isnan(kv_f32_of_e4m3(0x7f)));
}

/* Between two neighbours: the nearer; half way: the even one; above the last: it. */
static void rounding_to_small_floats_is_to_nearest_even(void **state) {
    for (uint8_t dtype = KV_DTYPE_F16; dtype <= KV_DTYPE_BF16; dtype++) {
        uint32_t last = dtype == KV_DTYPE_BF16 ? 0x7f7f : 0x7bff;
        for (uint32_t low = 0; low < last; low++) {
            /* Exact in binary32 as long as the step is not its own smallest. */
            if (dtype == KV_DTYPE_BF16 && low < 0x100) continue;
            double a = decode_element((uint16_t)low, dtype), b = decode_element((uint16_t)(low + 1), dtype);
            float half = (float)((a + b) / 2);
            assert_int_equal(kv_element_saturated(half, dtype), low + (low & 1));
            assert_int_equal(kv_element_saturated(nextafterf(half, 0), dtype), low);
            assert_int_equal(kv_element_saturated(nextafterf(half, INFINITY), dtype), low + 1);
            assert_int_equal(kv_element_saturated(-nextafterf(half, 0), dtype), low | 0x8000);
        }
        assert_int_equal(kv_element_saturated(3.4e38f, dtype), last);
    }
    for (uint32_t low = 0; low < 0x7e; low++) {
        float half = (float)((decode_e4m3((uint8_t)low) + decode_e4m3((uint8_t)(low + 1))) / 2);
        assert_int_equal(kv_e4m3_saturated(half), low + (low & 1));
        assert_int_equal(kv_e4m3_saturated(nextafterf(half, 0)), low);
        assert_int_equal(kv_e4m3_saturated(nextafterf(half, INFINITY)), low + 1);
    }
    assert_int_equal(kv_e4m3_saturated(1e30f), 0x7e);
    assert_int_equal(kv_f16_of_f32(65519.996f), 0x7bff);
    assert_int_equal(kv_f16_of_f32(65520.0f), 0x7c00);
    assert_int_equal(kv_f16_of_f32(-INFINITY), 0xfc00);
    assert_int_equal(kv_f16_of_f32(NAN) & 0x7fff, 0x7e00);
    assert_int_equal(kv_bf16_of_f32(NAN) & 0x7fc0, 0x7fc0);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(kivi2_is_9232_bytes_a_head_and_two_and_a_quarter_bits),
        cmocka_unit_test(presets_cost_the_bits_they_are_named_for),
        cmocka_unit_test(parts_stand_in_order_on_multiples_of_16),
        cmocka_unit_test(range_tables_follow_their_formula),
        cmocka_unit_test(a_shape_that_breaks_one_rule_is_refused),
        cmocka_unit_test(a_codec_that_breaks_one_rule_is_refused),
        cmocka_unit_test(codes_stand_where_the_formula_says),
        cmocka_unit_test(a_page_with_damaged_metadata_is_not_valid),
        cmocka_unit_test(every_small_float_widens_to_its_definition),
        cmocka_unit_test(rounding_to_small_floats_is_to_nearest_even),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
