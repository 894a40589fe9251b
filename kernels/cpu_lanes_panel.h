/* SPDX-License-Identifier: Apache-2.0 */
/* cpu_lanes_panel.h - packed codes laid out for the multiply unit.  Private to kernels/.
 *
 * A *panel* is the codes of K or V of one head record, a byte each:
 *
 *      panel[tile][row][m][4]     tile: 16 M-values (tokens of K, channels of V)
 *                                 row:  4 consecutive K-values (slots of K, tokens of V)
 *
 * so that 64 bytes are sixteen M-values by one dword of K-values: the unsigned operand of
 * vpdpbusd when the signed one is a dword of query digits seen by all lanes.  Sums stay in
 * their lane, and nothing is added across lanes at the end.  It is also the layout of a
 * tile of the AMX unit.
 *
 * Making it costs three shuffles for 8 / width vectors, a shift, a mask and a store each:
 * once per page, for however many query vectors.
 */
#ifndef KV_KERNELS_CPU_LANES_PANEL_H
#define KV_KERNELS_CPU_LANES_PANEL_H

#include "kernels/cpu.h"
#include "kernels/cpu_lanes.h"

enum { KV_PANEL_BYTES = 128 * KV_HEAD_DIM_MAX, KV_PANEL_ROW = 64 };

/* Widths of the four quarters of a record's keys.  A mix that the codec has not got is read as the first:
 * damage is found by checksums, but must not become a read out of bounds. */
KV_INLINE void panel_widths(const struct kv_codec *codec, const uint8_t *record,
                            uint8_t width[KV_QUARTERS]) {
    uint32_t mix =
        codec->kind == KV_CODEC_MINMAX ? 0 : ((const struct kv_page_header *)record)->mix;
    if (mix >= codec->mix_count) mix = 0;
    for (int q = 0; q < KV_QUARTERS; q++)
        width[q] = codec->kind == KV_CODEC_MINMAX ? codec->key_bits : codec->mixes[mix][q];
}

/* One unit: the tiles at positions 0 .. 8 / width - 1 go to row0 of the panels to[].  The same unit of the
 * next page, `ahead` bytes from this one, is asked for: it will be wanted when this page is done. */
KV_INLINE void panel_unit(const uint8_t *unit, ptrdiff_t ahead, uint32_t k, uint32_t width,
                          uint8_t *const to[8]) {
    vi turned[8];
    for (uint32_t line = 0; line < k / 4; line++)
        _mm_prefetch((const char *)unit + ahead + 64 * line, _MM_HINT_T0);
    v_turn_unit(unit, k, turned);
    vi mask = v_set_i((width == 4 ? 0x0f : width == 2 ? 0x03 : 0x01) * 0x01010101);
    for (uint32_t j = 0; j < 8 / width; j++)
#pragma GCC unroll 8
        for (uint32_t row = 0; row < k / 4; row++)
            v_store_i(to[j] + row * KV_PANEL_ROW, v_and(v_shr(turned[row], width * j), mask));
}

/* K of one record: eight tiles of `rows` rows, the quarters of width 0 left out (they are the last ones).
 * Returns rows = slots with codes / 4. */
static inline uint32_t panel_keys(const struct kv_shape *shape, const struct kv_page_map *map,
                                  const uint8_t *record, ptrdiff_t ahead, uint8_t *panel) {
    uint8_t width[KV_QUARTERS];
    panel_widths(&shape->codec, record, width);
    uint32_t quarter = shape->head_dim / 4, active = 0;
    while (active < KV_QUARTERS && width[active])
        active++;
    uint32_t rows = active * quarter / 4;

    const uint8_t *unit = record + map->key_codes;
    for (uint32_t q = 0; q < active; q++) {
        uint32_t w = width[q], positions = 8 / w;
        for (uint32_t slot = 0; slot < quarter;) {
            uint32_t left = quarter - slot, k = left >= 32 ? 32 : left >= 16 ? 16 : 8;
            for (uint32_t u = 0; u < w; u++) {
                uint8_t *to[8];
                for (uint32_t j = 0; j < positions; j++)
                    to[j] = panel +
                            ((u * positions + j) * rows + (q * quarter + slot) / 4) * KV_PANEL_ROW;
                if (k == 32) {
                    if (w == 2)
                        panel_unit(unit, ahead, 32, 2, to);
                    else if (w == 4)
                        panel_unit(unit, ahead, 32, 4, to);
                    else
                        panel_unit(unit, ahead, 32, 1, to);
                } else if (k == 16) {
                    panel_unit(unit, ahead, 16, w, to);
                } else {
                    panel_unit(unit, ahead, 8, w, to);
                }
                unit += 16 * k;
            }
            slot += k;
        }
    }
    return rows;
}

/* V of one record: head_dim / 16 tiles of 32 rows. */
static inline void panel_values(const struct kv_shape *shape, const struct kv_page_map *map,
                                const uint8_t *record, ptrdiff_t ahead, uint8_t *panel) {
    const uint8_t *unit = record + map->value_codes;
    uint32_t w = shape->codec.value_bits, positions = 8 / w, tiles = shape->head_dim / 16;
    for (uint32_t n = 0; n < 4 * tiles; n += positions, unit += 512) {
        uint8_t *to[8];
        uint32_t tile = n % tiles, block = n / tiles;
        for (uint32_t j = 0; j < positions; j++) {
            to[j] = panel + (tile * 32 + block * 8) * KV_PANEL_ROW;
            if (++tile == tiles) tile = 0, block++;
        }
        if (w == 2)
            panel_unit(unit, ahead, 32, 2, to);
        else if (w == 4)
            panel_unit(unit, ahead, 32, 4, to);
        else
            panel_unit(unit, ahead, 32, 1, to);
    }
}

#endif
