/* SPDX-License-Identifier: Apache-2.0 */
/* cpu_lanes_words.h - plain rows of bytes to codes in page.h's order.  Private to kernels/.
 *
 *   keys     uint8 [128 tokens][stride]    K-values are slots
 *   values   uint8 [channel][stride]       K-values are tokens
 *
 * Four neighbouring K-values of a row are one 32-bit word, and a word of a unit is the `or` of the P
 * positions' words, shifted: no byte is touched alone.
 */
#ifndef KV_KERNELS_CPU_LANES_WORDS_H
#define KV_KERNELS_CPU_LANES_WORDS_H

#include "kernels/cpu.h"

/* Row of a tile to token within the tile (page.h). */
static inline uint32_t words_token(uint32_t m) {
    return 4 * ((m & 7) >> 1) + 2 * (m >> 3) + (m & 1);
}

/* Where in a unit of k K-values word (m, quad) stands: quad is K-value / 4. */
static inline uint32_t words_place(uint32_t k, uint32_t m, uint32_t quad) {
    uint32_t g = m & 7, r = m >> 3, t = quad & 3, h = quad >> 2;
    return k == 32   ? (4 * g + t) * 4 + 2 * h + r
           : k == 16 ? (4 * g + t) * 2 + r
                     : (2 * g + t) * 2 + r;
}

/* One unit and one row m of its tiles: rows[j] is where the row's codes of position j begin. */
static inline void words_pack_row(uint32_t k, uint32_t w, uint32_t m, const uint8_t *const rows[8],
                                  uint8_t *unit) {
    for (uint32_t quad = 0; quad < k / 4; quad++) {
        uint32_t word = 0, part;
        for (uint32_t j = 0; j < 8 / w; j++) {
            memcpy(&part, rows[j] + 4 * quad, 4);
            word |= part << (w * j);
        }
        memcpy(unit + 4 * words_place(k, m, quad), &word, 4);
    }
}

static inline __attribute__((always_inline)) void words_unit(uint32_t k, uint32_t w,
                                                             uint8_t *unit, uint8_t *const tiles[8],
                                                             uint32_t stride, bool tokens) {
    for (uint32_t m = 0; m < 16; m++) {
        uint8_t *rows[8];
        for (uint32_t j = 0; j < 8 / w; j++)
            rows[j] = tiles[j] + (tokens ? words_token(m) : m) * stride;
        words_pack_row(k, w, m, (const uint8_t *const *)rows, unit);
    }
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
