/* SPDX-License-Identifier: Apache-2.0 */
/* decode.c - see decode.h. */
#include "tests/kernels/decode.h"

#include <math.h>

enum { T = KV_BLOCK_TOKENS };

static double fields(uint32_t bits, uint32_t exponent_bits, uint32_t fraction_bits, int bias) {
    uint32_t exponent = bits >> fraction_bits & ((1u << exponent_bits) - 1);
    uint32_t fraction = bits & ((1u << fraction_bits) - 1);
    double sign = bits >> (exponent_bits + fraction_bits) & 1 ? -1 : 1;
    if (exponent == 0) return sign * ldexp(fraction, 1 - bias - (int)fraction_bits);
    return sign * ldexp(fraction + (1u << fraction_bits), (int)exponent - bias - (int)fraction_bits);
}

double decode_element(uint16_t element, uint8_t dtype) {
    return dtype == KV_DTYPE_BF16 ? fields(element, 8, 7, 127) : fields(element, 5, 10, 15);
}

double decode_e4m3(uint8_t byte) {
    return fields(byte, 4, 3, 7);
}

static uint16_t u16_at(const uint8_t *source, uint32_t index) {
    return (uint16_t)(source[2 * index] | source[2 * index + 1] << 8);
}

static double f16_at(const uint8_t *source, uint32_t index) {
    return decode_element(u16_at(source, index), KV_DTYPE_F16);
}

/* Byte of (row m, K-value kk) in a unit of tiles with k K-values. */
static uint32_t unit_byte(uint32_t k, uint32_t m, uint32_t kk) {
    uint32_t g = m % 8, r = m / 8, h = kk / 16, t = kk % 16 / 4;
    uint32_t word = 0;
    if (k == 32) word = (4 * g + t) * 4 + 2 * h + r;
    if (k == 16) word = (4 * g + t) * 2 + r;
    if (k == 8) word = (2 * g + t) * 2 + r;
    return 4 * word + kk % 4;
}

static uint32_t key_width(const struct kv_shape *shape, const uint8_t *record, uint32_t quarter) {
    return shape->codec.kind == KV_CODEC_MINMAX ? shape->codec.key_bits
                                                : shape->codec.mixes[record[0]][quarter];
}

uint32_t decode_key_code(const struct kv_shape *shape, const uint8_t *record, uint32_t slot,
                         uint32_t token) {
    uint32_t D = shape->head_dim, quarter = slot / (D / 4), inside = slot % (D / 4);
    uint32_t w = key_width(shape, record, quarter);
    if (w == 0) return 0;

    uint32_t at = kv_page_map(shape).key_codes;
    for (uint32_t q = 0; q < quarter; q++) at += 4 * D * key_width(shape, record, q);
    uint32_t k = D == 64 ? 16 : 32, first = 0;
    if (D == 256 && inside >= 32) first = 32;
    if (D == 96) {
        k = inside < 16 ? 16 : 8;
        first = inside < 16 ? 0 : 16;
    }
    at += first * T * w / 8; /* the chunk before */

    uint32_t tile = token / 16, row = 0;
    while (4 * ((row & 7) >> 1) + 2 * (row >> 3) + (row & 1) != token % 16) row++;
    uint32_t P = 8 / w;
    uint32_t byte = record[at + tile / P * 16 * k + unit_byte(k, row, inside - first)];
    return byte >> (w * (tile % P)) & ((1u << w) - 1);
}

uint32_t decode_value_code(const struct kv_shape *shape, const uint8_t *record, uint32_t token,
                           uint32_t channel) {
    uint32_t w = shape->codec.value_bits, P = 8 / w;
    uint32_t n = shape->head_dim / 16 * (token / 32) + channel / 16;
    uint32_t at = kv_page_map(shape).value_codes + n / P * 512 + unit_byte(32, channel % 16, token % 32);
    return record[at] >> (w * (n % P)) & ((1u << w) - 1);
}

/* y <- R y by the matrix: entry (i, j) is the sign of the parity of i & j, over sqrt N. */
static void rotate(uint32_t D, double *y) {
    uint32_t N = D;
    while (N & (N - 1)) N -= N & -N; /* the power of two above all others in D ... */
    while (D % N != 0) N /= 2;       /* ... that divides it */
    double out[KV_HEAD_DIM_MAX];
    for (uint32_t c = 0; c < D; c++) {
        out[c] = 0;
        for (uint32_t j = 0; j < N; j++) {
            double sign = __builtin_popcount((c % N) & j) & 1 ? -1 : 1;
            out[c] += sign * y[c / N * N + j];
        }
    }
    for (uint32_t c = 0; c < D; c++) y[c] = out[c] / sqrt(N);
}

static void unbiased(const struct kv_shape *shape, const uint8_t *record, double *keys,
                     double *values) {
    struct kv_page_map map = kv_page_map(shape);
    uint32_t D = shape->head_dim;
    double key_step = f16_at(record, 1) / 448, value_step = f16_at(record, 2) / 448;
    for (uint32_t slot = 0; slot < D; slot++) {
        uint32_t channel = record[map.key_order + slot];
        double s = decode_e4m3(record[map.key_scale + slot]) * key_step;
        double z = f16_at(record + map.key_zero, slot);
        for (uint32_t t = 0; t < T; t++)
            keys[t * D + channel] = decode_key_code(shape, record, slot, t) * s + z;
    }
    for (uint32_t t = 0; t < T; t++) {
        double s = decode_e4m3(record[map.value_scale + t]) * value_step;
        double z = (int8_t)record[map.value_zero + t] * s / 4;
        double *row = values + t * D;
        for (uint32_t c = 0; c < D; c++) row[c] = decode_value_code(shape, record, t, c) * s + z;
        if (shape->codec.value_rotated) rotate(D, row);
        for (uint32_t c = 0; c < D; c++) row[c] += f16_at(record + map.value_mean, c);
    }
}

static void minmax(const struct kv_shape *shape, const uint8_t *record, double *keys,
                   double *values) {
    struct kv_page_map map = kv_page_map(shape);
    uint32_t D = shape->head_dim, g = shape->codec.group;
    for (uint32_t t = 0; t < T; t++)
        for (uint32_t c = 0; c < D; c++) {
            uint32_t k = t / g * D + c, v = c / g * T + t;
            keys[t * D + c] =
                decode_key_code(shape, record, c, t) *
                    decode_element(u16_at(record + map.key_scale, k), shape->dtype) +
                decode_element(u16_at(record + map.key_zero, k), shape->dtype);
            values[t * D + c] =
                decode_value_code(shape, record, t, c) *
                    decode_element(u16_at(record + map.value_scale, v), shape->dtype) +
                decode_element(u16_at(record + map.value_zero, v), shape->dtype);
        }
}

void decode_record(const struct kv_shape *shape, const uint8_t *record, double *keys,
                   double *values) {
    if (shape->codec.kind == KV_CODEC_MINMAX)
        minmax(shape, record, keys, values);
    else
        unbiased(shape, record, keys, values);
}

void decode_raw(const struct kv_shape *shape, const uint16_t *raw, uint32_t head, double *keys,
                double *values) {
    size_t count = (size_t)T * shape->head_dim, half = kv_shape_elements(shape);
    for (size_t i = 0; i < count; i++) {
        keys[i] = decode_element(raw[head * count + i], shape->dtype);
        values[i] = decode_element(raw[half + head * count + i], shape->dtype);
    }
}
