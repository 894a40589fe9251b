/* SPDX-License-Identifier: Apache-2.0 */
/* half.h - conversions between binary32 and the small formats.  Private to kernels/.
 *
 *   f16    IEEE binary16           1 sign, 5 exponent (bias 15), 10 fraction bits
 *   bf16   upper half of binary32  1 sign, 8 exponent, 7 fraction bits
 *   e4m3   "fn" flavour            1 sign, 4 exponent (bias 7), 3 fraction bits; no
 *                                  infinity, 0x7f is NaN, the largest is 448
 *
 * Every conversion to a smaller format rounds to nearest, ties to even, subnormals
 * included; every conversion to binary32 is exact.  They are integer operations and exact
 * additions only, so that they give the same bits on every machine, and without branches
 * that would keep the compiler from turning loops of them into vectors.
 */
#ifndef KV_KERNELS_HALF_H
#define KV_KERNELS_HALF_H

#include "proto/kv_types.h"

static inline uint32_t kv_bits_of_f32(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float kv_f32_of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline float kv_f32_of_f16(uint16_t half) {
    /* The exponent is rebiased by a product, which also normalises subnormals. */
    uint32_t magnitude = (uint32_t)(half & 0x7fff) << 13;
    float scaled = kv_f32_of_bits(magnitude) * 0x1p112f;
    uint32_t bits = kv_bits_of_f32(scaled);
    if (magnitude >= 0x0f800000u) bits |= 0x7f800000u; /* infinity and NaN */
    return kv_f32_of_bits(bits | (uint32_t)(half & 0x8000) << 16);
}

/* As IEEE says: what lies above 65504 and a half step becomes infinity. */
static inline uint16_t kv_f16_of_f32(float value) {
    uint32_t bits = kv_bits_of_f32(value);
    uint32_t sign = bits >> 16 & 0x8000;
    uint32_t magnitude = bits & 0x7fffffff;

    /* Normal: rebias, then add half a step less one, plus the last kept bit: ties to even.
     * The carry may run into the exponent, which is then the right one. */
    uint32_t normal = (magnitude - 0x38000000u + 0xfff + (magnitude >> 13 & 1)) >> 13;
    /* Subnormal: at 0.5 the last place of binary32 is 2^-24, that of an f16 subnormal. */
    uint32_t subnormal = kv_bits_of_f32(kv_f32_of_bits(magnitude) + 0.5f) - 0x3f000000u;

    uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
    if (magnitude >= 0x47800000u) half = magnitude > 0x7f800000u ? 0x7e00 : 0x7c00;
    return (uint16_t)(sign | half);
}

/* f16() of page.h: finite in, finite out. */
static inline uint16_t kv_f16_saturated(float value) {
    uint16_t half = kv_f16_of_f32(value);
    return (half & 0x7fff) == 0x7c00 ? (uint16_t)(half - 1) : half;
}

static inline float kv_f32_of_bf16(uint16_t brain) {
    return kv_f32_of_bits((uint32_t)brain << 16);
}

static inline uint16_t kv_bf16_of_f32(float value) {
    uint32_t bits = kv_bits_of_f32(value);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    uint32_t quiet = bits >> 16 | 0x40; /* rounding could carry a NaN into infinity */
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000u ? quiet : rounded);
}

static inline uint16_t kv_bf16_saturated(float value) {
    uint16_t brain = kv_bf16_of_f32(value);
    return (brain & 0x7fff) == 0x7f80 ? (uint16_t)(brain - 1) : brain;
}

static inline float kv_f32_of_e4m3(uint8_t byte) {
    uint32_t magnitude = (uint32_t)(byte & 0x7f) << 20;
    float scaled = kv_f32_of_bits(magnitude) * 0x1p120f;
    uint32_t bits = (byte & 0x7f) == 0x7f ? 0x7fc00000u : kv_bits_of_f32(scaled);
    return kv_f32_of_bits(bits | (uint32_t)(byte & 0x80) << 24);
}

/* For 0 <= value; above 448 the answer is 448. */
static inline uint8_t kv_e4m3_saturated(float value) {
    uint32_t bits = kv_bits_of_f32(value);
    uint32_t normal = (bits - 0x3c000000u + 0x7ffff + (bits >> 20 & 1)) >> 20;
    /* Subnormal steps are 2^-9: the last place of binary32 at 2^14. */
    uint32_t subnormal = kv_bits_of_f32(value + 0x1p14f) - 0x46800000u;
    uint32_t byte = bits < 0x3c800000u ? subnormal : normal;
    return (uint8_t)(byte > 0x7e ? 0x7e : byte);
}

/* The 16-bit element types of raw pages. */
static inline float kv_f32_of_element(uint16_t element, uint8_t dtype) {
    return dtype == KV_DTYPE_BF16 ? kv_f32_of_bf16(element) : kv_f32_of_f16(element);
}

static inline uint16_t kv_element_saturated(float value, uint8_t dtype) {
    return dtype == KV_DTYPE_BF16 ? kv_bf16_saturated(value) : kv_f16_saturated(value);
}

#endif
