/* SPDX-License-Identifier: Apache-2.0 */
/* cpu_lanes_words.h - plain rows of bytes to codes in page.h's order.  Private to kernels/.
 *
 *   keys     uint8 [128 tokens][stride]    K-values are slots
 *   values   uint8 [channel][stride]       K-values are tokens
 *
 * A unit's words are the `or` of its positions' rows, shifted, and put in order 64 bytes at a time.  Units of
 * eight K-values, which only head_dim 96 has, are made word by word.
 */
#ifndef KV_KERNELS_CPU_LANES_WORDS_H
#define KV_KERNELS_CPU_LANES_WORDS_H

#include "kernels/cpu.h"
#include "kernels/cpu_lanes.h"

/* Row of a tile to token within the tile (page.h). */
static inline uint32_t words_token(uint32_t m) {
    return 4 * ((m & 7) >> 1) + 2 * (m >> 3) + (m & 1);
}

/* 64 bytes of a unit of 32 K-values, its rows g and g + 8; at[] is how far they are from a tile's first. */
KV_INLINE vi words_rows_32(uint8_t *const tiles[8], const uint32_t at[2], const uint32_t w) {
    vi sum = v_zero_i();
#pragma GCC unroll 8
    for (uint32_t j = 8 / w; j-- > 0;)
        sum = v_or(v_shl(sum, w),
                   v_load_halves((const uint8_t *const[]){tiles[j] + at[0], tiles[j] + at[1]}));
    return v_words_32(sum);
}

/* Of a unit of 16: rows g, g + 8, g + 1 and g + 9. */
KV_INLINE vi words_rows_16(uint8_t *const tiles[8], const uint32_t at[4], const uint32_t w) {
    vi sum = v_zero_i();
#pragma GCC unroll 8
    for (uint32_t j = 8 / w; j-- > 0;)
        sum = v_or(v_shl(sum, w),
                   v_load_quarters((const uint8_t *const[]){tiles[j] + at[0], tiles[j] + at[1],
                                                            tiles[j] + at[2], tiles[j] + at[3]}));
    return v_words_16(sum);
}

/* A unit of 8: words (g t r), where t is K-value / 4. */
KV_INLINE void words_unit_8(uint8_t *const tiles[8], const uint32_t *at, const uint32_t w,
                            uint8_t *unit) {
    for (uint32_t m = 0; m < 16; m++)
        for (uint32_t t = 0; t < 2; t++) {
            uint32_t word = 0, part;
            for (uint32_t j = 0; j < 8 / w; j++) {
                memcpy(&part, tiles[j] + at[m] + 4 * t, 4);
                word |= part << (w * j);
            }
            memcpy(unit + 4 * ((2 * (m & 7) + t) * 2 + (m >> 3)), &word, 4);
        }
}

static inline __attribute__((always_inline)) void words_unit(const uint32_t k, const uint32_t w,
                                                             uint8_t *unit, uint8_t *const tiles[8],
                                                             uint32_t stride, bool tokens) {
    uint32_t at[16]; /* rows */
    for (uint32_t m = 0; m < 16; m++)
        at[m] = (tokens ? words_token(m) : m) * stride;
    if (k == 32)
        for (uint32_t g = 0; g < 8; g++)
            v_store_i(unit + 64 * g, words_rows_32(tiles, (uint32_t[]){at[g], at[g + 8]}, w));
    else if (k == 16)
        for (uint32_t g = 0; g < 8; g += 2)
            v_store_i(unit + 32 * g,
                      words_rows_16(tiles, (uint32_t[]){at[g], at[g + 8], at[g + 1], at[g + 9]}, w));
    else
        words_unit_8(tiles, at, w, unit);
}

static inline __attribute__((always_inline)) void words_width(uint32_t k, uint32_t w,
                                                              uint8_t *unit,
                                                              uint8_t *const tiles[8],
                                                              uint32_t stride, bool tokens) {
    if (w == 1)
        words_unit(k, 1, unit, tiles, stride, tokens);
    else if (w == 2)
        words_unit(k, 2, unit, tiles, stride, tokens);
    else
        words_unit(k, 4, unit, tiles, stride, tokens);
}

/* K: codes[128][stride] and packed key_codes.  Slots of width 0 are neither read nor written. */
static inline __attribute__((always_inline)) void words_keys(const uint8_t width[KV_QUARTERS],
                                                             uint32_t D, uint8_t *codes,
                                                             uint32_t stride, uint8_t *packed) {
    for (uint32_t q = 0; q < KV_QUARTERS && width[q]; q++)
        for (uint32_t slot = q * (D / 4), k; slot < (q + 1) * (D / 4); slot += k) {
            uint32_t left = (q + 1) * (D / 4) - slot;
            k             = left >= 32 ? 32 : left >= 16 ? 16 : 8;
            for (uint32_t u = 0; u < width[q]; u++, packed += 16 * k) {
                uint8_t *tiles[8];
                for (uint32_t j = 0; j < 8u / width[q]; j++)
                    tiles[j] = codes + 16 * (u * (8u / width[q]) + j) * stride + slot;
                if (k == 32)
                    words_width(32, width[q], packed, tiles, stride, true);
                else if (k == 16)
                    words_width(16, width[q], packed, tiles, stride, true);
                else
                    words_width(8, width[q], packed, tiles, stride, true);
            }
        }
}

/* V: codes[D][stride] and packed value_codes. */
static inline __attribute__((always_inline)) void
words_values(uint32_t w, uint32_t D, uint8_t *codes, uint32_t stride, uint8_t *packed) {
    uint32_t tile = 0, block = 0;
    for (uint32_t u = 0; u < D / 4 * w / 8; u++, packed += 512) {
        uint8_t *tiles[8];
        for (uint32_t j = 0; j < 8 / w; j++) {
            tiles[j] = codes + 16 * tile * stride + 32 * block;
            if (++tile == D / 16) tile = 0, block++;
        }
        words_width(32, w, packed, tiles, stride, false);
    }
}

#endif
