/* SPDX-License-Identifier: Apache-2.0 */
/* page.cuh - arithmetic of page.h on the device: the same operations, the same roundings.
 *
 * Everything that decides a bit of a page is written with the functions that name their
 * rounding (__fadd_rn, __fmul_rn, __fdiv_rn), so that no compiler flag can contract it.
 */
#ifndef KV_KERNELS_CUDA_PAGE_CUH
#define KV_KERNELS_CUDA_PAGE_CUH

#include "kernels/cuda/ptx.cuh"
#include "kernels/page.h"

namespace {

constexpr int T = KV_BLOCK_TOKENS;

/* A shape and its map, as a kernel's argument. */
struct page_shape {
    struct kv_page_map map;
    uint32_t heads;
    uint32_t bf16;
    uint32_t mix_count;
    uint8_t mixes[KV_MIX_COUNT_MAX][KV_QUARTERS];
    uint32_t widths_used; /* bit w: some mix has width w */
    uint8_t quarter_widths[KV_QUARTERS]; /* the same of each quarter */
    uint32_t key_bits, value_bits, group, rotated;
};

inline page_shape page_shape_of(const struct kv_shape *shape) {
    page_shape out = {};
    const struct kv_codec *codec = &shape->codec;
    if (codec->kind != KV_CODEC_RAW) out.map = kv_page_map(shape);
    out.heads = shape->heads;
    out.bf16 = shape->dtype == KV_DTYPE_BF16;
    out.mix_count = codec->mix_count;
    memcpy(out.mixes, codec->mixes, sizeof out.mixes);
    for (uint32_t i = 0; i < codec->mix_count; i++)
        for (uint32_t q = 0; q < KV_QUARTERS; q++) {
            out.widths_used |= 1u << codec->mixes[i][q];
            out.quarter_widths[q] |= (uint8_t)(1u << codec->mixes[i][q]);
        }
    out.key_bits = codec->key_bits;
    out.value_bits = codec->value_bits;
    out.group = codec->group;
    out.rotated = codec->value_rotated;
    return out;
}

KV_DEVICE float f32_of_f16(uint16_t half) {
    return __half2float(__ushort_as_half(half));
}
KV_DEVICE uint16_t f16_saturated(float x) {
    uint16_t half = __half_as_ushort(__float2half_rn(x));
    return (half & 0x7fff) == 0x7c00 ? half - 1 : half;
}
KV_DEVICE float f32_of_element(uint16_t element, bool bf16) {
    return bf16 ? __uint_as_float((uint32_t)element << 16) : f32_of_f16(element);
}
KV_DEVICE uint16_t element_saturated(float x, bool bf16) {
    if (!bf16) return f16_saturated(x);
    uint16_t brain = __bfloat16_as_ushort(__float2bfloat16_rn(x));
    return (brain & 0x7fff) == 0x7f80 ? brain - 1 : brain;
}
/* For 0 <= x; above 448 the answer is 448. */
KV_DEVICE uint32_t e4m3_saturated(float x) {
    uint32_t bits = __float_as_uint(x);
    uint32_t normal = (bits - 0x3c000000u + 0x7ffff + (bits >> 20 & 1)) >> 20;
    uint32_t subnormal = __float_as_uint(__fadd_rn(x, 0x1p14f)) - 0x46800000u;
    return min(bits < 0x3c800000u ? subnormal : normal, 0x7eu);
}
KV_DEVICE float f32_of_e4m3(uint32_t byte) {
    return __fmul_rn(__uint_as_float(byte << 20), 0x1p120f);
}

/* ---- the order of codes ------------------------------------------------------------- */

/* A place in a unit: which row and K-value the word's first byte has. */
struct place {
    int m, kk;
};

/* K: a chunk of k slots; word: of its unit. */
KV_DEVICE place place_of_word(int k, int word) {
    if (k == 32) return {(word >> 4) + 8 * (word & 1), 16 * (word >> 1 & 1) + 4 * (word >> 2 & 3)};
    if (k == 16) return {(word >> 3) + 8 * (word & 1), 4 * (word >> 1 & 3)};
    return {(word >> 2) + 8 * (word & 1), 4 * (word >> 1 & 1)};
}
KV_DEVICE int word_of_place(int k, int m, int kk) {
    const int g = m & 7, r = m >> 3, h = kk >> 4, t = kk >> 2 & 3;
    if (k == 32) return (4 * g + t) * 4 + 2 * h + r;
    if (k == 16) return (4 * g + t) * 2 + r;
    return (2 * g + t) * 2 + r;
}
/* Token of row m of a K tile, and the row of a token. */
KV_DEVICE int token_of_row(int m) {
    return 4 * ((m & 7) >> 1) + 2 * (m >> 3) + (m & 1);
}
KV_DEVICE int row_of_token(int token) {
    return 2 * (token >> 2 & 3) + (token & 1) + 8 * (token >> 1 & 1);
}

/* Slots of the first chunk of a quarter; only D = 96 has a second, shorter one, and D = 256
 * a second, equal one. */
template <int D> constexpr int CHUNK = D >= 128 ? 32 : 16;

/* Where slot `slot` of its quarter lies: the chunk's size and start, in slots. */
template <int D> KV_DEVICE void chunk_of_slot(int slot, int &k, int &start) {
    k = CHUNK<D>, start = slot / CHUNK<D> * CHUNK<D>;
    if (D == 96 && slot >= 16) k = 8;
}

/* Byte address and shift of a key code, from the start of its quarter's codes of width w. */
template <int D> KV_DEVICE uint32_t key_byte(int w, int slot, int token, int &shift) {
    int k, start;
    chunk_of_slot<D>(slot, k, start);
    const int P = 8 / w, tile = token >> 4, kk = slot - start;
    shift = w * (tile % P);
    return (uint32_t)(start * 16 * w + tile / P * 16 * k + word_of_place(k, row_of_token(token), kk) * 4 + (kk & 3));
}
template <int D> KV_DEVICE uint32_t value_byte(int w, int token, int channel, int &shift) {
    const int n = D / 16 * (token >> 5) + (channel >> 4), P = 8 / w;
    shift = w * (n % P);
    return (uint32_t)(n / P * 512 + word_of_place(32, channel & 15, token & 31) * 4 + (token & 3));
}

/* ---- the Walsh-Hadamard transform of a token, across a warp -------------------------------- */

template <int N> KV_DEVICE constexpr float rotation_norm() {
    return N == 32    ? 0.17677669529663687f
           : N == 64  ? 0.125f
           : N == 128 ? 0.08838834764831845f
                      : 0.0625f;
}

/* y[e] is channel lane + 32 e. */
template <int D> KV_DEVICE void rotate_token(float (&y)[D / 32], int lane) {
    constexpr int N = D & -D;
#pragma unroll
    for (int stride = 1; stride < 32; stride *= 2)
#pragma unroll
        for (int e = 0; e < D / 32; e++) {
            const float other = __shfl_xor_sync(0xffffffffu, y[e], stride);
            y[e] = lane & stride ? __fsub_rn(other, y[e]) : __fadd_rn(y[e], other);
        }
#pragma unroll
    for (int stride = 1; stride < N / 32; stride *= 2)
#pragma unroll
        for (int e = 0; e < D / 32; e++)
            if ((e & stride) == 0) {
                const float a = y[e], b = y[e + stride];
                y[e] = __fadd_rn(a, b), y[e + stride] = __fsub_rn(a, b);
            }
#pragma unroll
    for (int e = 0; e < D / 32; e++) y[e] = __fmul_rn(y[e], rotation_norm<N>());
}

} // namespace

#endif
