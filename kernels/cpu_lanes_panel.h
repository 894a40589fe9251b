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
 * Making it costs three shuffles for 8 / width vectors, one operation and a store each:
 * once per page, for however many query vectors.
 */
#ifndef KV_KERNELS_CPU_LANES_PANEL_H
#define KV_KERNELS_CPU_LANES_PANEL_H

#include "kernels/cpu.h"
#include "kernels/cpu_lanes.h"

enum {
    KV_PANEL_BYTES = 128 * KV_HEAD_DIM_MAX,
    KV_PANEL_ROW   = 64,
    AHEAD_UNIT     = 5, /* lines asked for beside a unit */
};

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

/* Memory that will be wanted soon, asked for a few lines at a time between other work: asked for all at
 * once it would fill the core's few line buffers, and the work's own loads would wait behind it. */
struct ahead {
    const uint8_t *next, *end;
};

KV_INLINE void ahead_step(struct ahead *ahead, uint32_t lines) {
    for (uint32_t i = 0; i < lines && ahead->next < ahead->end; i++, ahead->next += 64)
        _mm_prefetch((const char *)ahead->next, _MM_HINT_T0);
}

/* One unit: the tiles at positions 0 .. 8 / width - 1 go to row0 of the panels to[]. */
KV_INLINE void panel_unit(const uint8_t *unit, struct ahead *ahead, const uint32_t k, const uint32_t width,
                          uint8_t *const to[8]) {
    vi turned[8];
    ahead_step(ahead, AHEAD_UNIT);
    v_turn_unit(unit, k, turned);
#pragma GCC unroll 8
    for (uint32_t j = 0; j < 8 / width; j++)
#pragma GCC unroll 8
        for (uint32_t row = 0; row < k / 4; row++)
            v_store_i(to[j] + row * KV_PANEL_ROW, v_codes(turned[row], width, j));
}

KV_INLINE void panel_unit_any(const uint8_t *unit, struct ahead *ahead, uint32_t k, uint32_t width,
                              uint8_t *const to[8]) {
    if (width == 2)
        panel_unit(unit, ahead, k, 2, to);
    else if (width == 4)
        panel_unit(unit, ahead, k, 4, to);
    else
        panel_unit(unit, ahead, k, 1, to);
}

/* K of one record: eight tiles of `rows` rows, the quarters of width 0 left out (they are the last ones).
 * Returns rows = slots with codes / 4. */
static inline uint32_t panel_keys(const struct kv_shape *shape, const struct kv_page_map *map,
                                  const uint8_t *record, struct ahead *ahead, uint8_t *panel) {
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
                if (k == 32)
                    panel_unit_any(unit, ahead, 32, w, to);
                else if (k == 16)
                    panel_unit_any(unit, ahead, 16, w, to);
                else
                    panel_unit_any(unit, ahead, 8, w, to);
                unit += 16 * k;
            }
            slot += k;
        }
    }
    return rows;
}

/* V of one record: head_dim / 16 tiles of 32 rows. */
static inline void panel_values(const struct kv_shape *shape, const struct kv_page_map *map,
                                const uint8_t *record, struct ahead *ahead, uint8_t *panel) {
    const uint8_t *unit = record + map->value_codes;
    uint32_t w = shape->codec.value_bits, positions = 8 / w, tiles = shape->head_dim / 16;
    for (uint32_t n = 0; n < 4 * tiles; n += positions, unit += 512) {
        uint8_t *to[8];
        uint32_t tile = n % tiles, block = n / tiles;
        for (uint32_t j = 0; j < positions; j++) {
            to[j] = panel + (tile * 32 + block * 8) * KV_PANEL_ROW;
            if (++tile == tiles) tile = 0, block++;
        }
        panel_unit_any(unit, ahead, 32, w, to);
    }
}

#endif
