/* SPDX-License-Identifier: Apache-2.0 */
/* cpu_lanes.h - sixteen lanes of 32 bits, on AVX-512 and on AVX2.  Private to kernels/.
 *
 * The fast CPU kernels are written once, in these few dozen operations, and compiled once
 * per instruction set: a value is one 512-bit register, or a pair of 256-bit ones.  So the
 * two tables cannot disagree about a bit, and AVX2 costs no second set of kernels.
 *
 *   vf   16 binary32          vi   16 x i32, or 32 x i16, or 64 x i8, as the operation says
 *   vm   a truth per 32-bit lane
 *
 * Arithmetic rounds once per operation; only v_fma() fuses.  Loads and stores need no
 * alignment.  KV_LANES_FN(name) gives each compilation its own external names.
 */
#ifndef KV_KERNELS_CPU_LANES_H
#define KV_KERNELS_CPU_LANES_H

#include <immintrin.h>
#include <stdint.h>

#include "proto/kv_types.h"

#define KV_LANES_JOIN_(name, isa) kv_##isa##_##name
#define KV_LANES_JOIN(name, isa)  KV_LANES_JOIN_(name, isa)
#define KV_LANES_FN(name)         KV_LANES_JOIN(name, KV_LANES_ISA)

#define KV_INLINE static inline __attribute__((always_inline, unused))

#ifdef __AVX512BW__
#include "kernels/cpu_lanes_avx512.h"
#else
#include "kernels/cpu_lanes_avx2.h"
#endif

KV_INLINE vf v_abs(vf a) {
    return v_from_bits(v_and(v_bits(a), v_set_i(0x7fffffff)));
}

/* bf16 is the upper half of binary32. */
KV_INLINE vf v_load_bf16(const uint16_t *from) {
    return v_from_bits(v_shl(v_load_u16(from), 16));
}

/* Sixteen elements of a raw page. */
KV_INLINE vf v_load_half(const uint16_t *from, int bf16) {
    return bf16 ? v_load_bf16(from) : v_load_f16(from);
}

/* To the nearest, ties to even, saturating at the largest finite value. */
KV_INLINE void v_store_half(uint16_t *to, vf a, int bf16) {
    if (bf16) {
        vi bits = v_bits(v_within(a, v_set(0x1.fep+127f)));
        vi odd  = v_and(v_shr(bits, 16), v_set_i(1));
        v_store_u16(to, v_shr(v_add_i(bits, v_add_i(odd, v_set_i(0x7fff))), 16));
    } else {
        v_store_f16(to, v_within(a, v_set(65504.0f)));
    }
}

/* A raw page's rounding, in binary32. */
KV_INLINE vf v_round_half(vf a, int bf16) {
    if (!bf16) return v_round_f16(v_within(a, v_set(65504.0f)));
    uint16_t half[16];
    v_store_half(half, a, 1);
    return v_load_bf16(half);
}

/* R of page.h on one row of D channels, in place: the normalised Walsh-Hadamard transform of each
 * aligned run of N channels, N the largest power of two in D (32 or more).  D is a constant, so that the
 * row stays in registers. */
KV_INLINE void lanes_rotate_row(float *y, const uint32_t D, float norm) {
    const uint32_t runs = (D & (0 - D)) / 16;
    vf x[KV_HEAD_DIM_MAX / 16];
#pragma GCC unroll 16
    for (uint32_t i = 0; i < D / 16; i++) {
        x[i] = v_load(y + 16 * i);
#pragma GCC unroll 4
        for (uint32_t bit = 0; bit < 4; bit++)
            x[i] = v_butterfly(x[i], 1 << bit);
    }
#pragma GCC unroll 4
    for (uint32_t stride = 1; stride < runs; stride *= 2)
#pragma GCC unroll 16
        for (uint32_t i = 0; i < D / 16; i++)
            if (!(i & stride)) {
                vf a = x[i], b = x[i + stride];
                x[i]          = v_add(a, b);
                x[i + stride] = v_sub(a, b);
            }
#pragma GCC unroll 16
    for (uint32_t i = 0; i < D / 16; i++)
        v_store(y + 16 * i, v_mul(x[i], v_set(norm)));
}

static inline void __attribute__((unused)) lanes_rotate(float *y, uint32_t D, float norm) {
    switch (D) {
    case 64: lanes_rotate_row(y, 64, norm); break;
    case 96: lanes_rotate_row(y, 96, norm); break;
    case 128: lanes_rotate_row(y, 128, norm); break;
    default: lanes_rotate_row(y, 256, norm); break;
    }
}

/* Sixteen e4m3 bytes, none of them negative.  Shifted to the place of a binary16's exponent
 * they are the value times 2^-8, subnormals included. */
KV_INLINE vf v_load_e4m3(const uint8_t *from) {
    return v_mul(v_from_f16(v_shl(v_load_u8(from), 7)), v_set(256.0f));
}

/* 2^t for t <= 0, or hardly more, within 3 units in the last place; 0 below 2^-126 and of NaN. */
KV_INLINE vf v_exp2(vf t) {
    vf f = v_fraction(t);
    vf p = v_fma(v_set(0x1.ec320ap-10f), f, v_set(0x1.26900ep-7f));
    p    = v_fma(p, f, v_set(0x1.c95446p-5f));
    p    = v_fma(p, f, v_set(0x1.ebd5a8p-3f));
    p    = v_fma(p, f, v_set(0x1.62e4f6p-1f));
    p    = v_fma(p, f, v_set(0x1.fffffep-1f));
    return v_times_power(p, t);
}

#endif
