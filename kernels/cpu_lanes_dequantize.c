/* SPDX-License-Identifier: Apache-2.0 */
/* cpu_lanes_dequantize.c - codes back to 16-bit elements, for AVX-512 and AVX2 (see cpu_lanes.h).
 *
 * K: codes to rows of slots, slots to channels by one byte permutation per token, then sixteen
 * channels at a time.  V: a panel row is sixteen channels of four tokens; codes of up to four bits are
 * looked up among the values their group can have.  What is called with a constant `D` is compiled once
 * per head_dim, so that scales stay in registers and loops over channels disappear.
 * The operations and their order are page.h's, so the elements equal the scalar's to the bit.
 */
#include "kernels/cpu_lanes_panel.h"

#include <math.h>

enum { T = KV_BLOCK_TOKENS, D_MAX = KV_HEAD_DIM_MAX };

struct work {
    uint8_t panel[KV_PANEL_BYTES];
    uint8_t code[T * D_MAX];
    float scale[8][D_MAX],
        zero[8][D_MAX]; /* by channel, per key group; by token, per value group */
    float mean[D_MAX];
    float row[4][D_MAX];
    uint8_t slot[D_MAX]; /* channel -> slot */
};
static_assert(sizeof(struct work) <= KV_CPU_SCRATCH, "a worker's scratch");

static float factor_step(uint16_t factor) {
    uint16_t factors[16] = {factor};
    float step[16];
    v_store(step, v_div(v_load_f16(factors), v_set(448.0f)));
    return step[0];
}

/* Scale and minimum of MINMAX groups: count in all. */
static void load_minmax(const uint8_t *scale, const uint8_t *zero, uint32_t groups, uint32_t count,
                        int bf16, struct work *work) {
    for (uint32_t g = 0; g < groups; g++)
        for (uint32_t i = 0; i < count; i += 16) {
            v_store(work->scale[g] + i, v_load_half((const uint16_t *)scale + g * count + i, bf16));
            v_store(work->zero[g] + i, v_load_half((const uint16_t *)zero + g * count + i, bf16));
        }
}

static void load_key_terms(const struct kv_page_map *map, const uint8_t *record, uint32_t D,
                           struct work *work) {
    float step = factor_step(((const struct kv_page_header *)record)->key_factor);
    for (uint32_t c = 0; c < D; c++)
        work->slot[c] = (uint8_t)c;
    for (uint32_t slot = 0; slot < D; slot += 16) {
        float s[16], z[16];
        v_store(s, v_mul(v_load_e4m3(record + map->key_scale + slot), v_set(step)));
        v_store(z, v_load_f16((const uint16_t *)(record + map->key_zero) + slot));
        for (uint32_t i = 0; i < 16; i++) {
            uint32_t channel = record[map->key_order + slot + i];
            if (channel >= D) channel = slot + i;
            work->slot[channel]     = (uint8_t)(slot + i);
            work->scale[0][channel] = s[i];
            work->zero[0][channel]  = z[i];
        }
    }
}

/* ---- keys ------------------------------------------------------------------------------------ */

/* Row of a tile to token within the tile (page.h). */
KV_INLINE uint32_t token_of_row(uint32_t m) {
    return 4 * ((m & 7) >> 1) + 2 * (m >> 3) + (m & 1);
}

/* One unit to rows of bytes: `to` is the first token of tile 0 at the unit's first slot. */
KV_INLINE void unpack_unit_32(const uint8_t *unit, const uint32_t width, uint8_t *to,
                              uint32_t stride) {
    for (uint32_t g = 0; g < 8; g++, unit += 64) {
        vi rows = v_rows_32(unit);
        uint8_t *row = to + token_of_row(g) * stride; /* row g + 8 is two tokens on */
#pragma GCC unroll 8
        for (uint32_t j = 0; j < 8 / width; j++, row += 16 * stride)
            v_store_halves((uint8_t *const[]){row, row + 2 * stride}, v_codes(rows, width, j));
    }
}

KV_INLINE void unpack_unit_16(const uint8_t *unit, const uint32_t width, uint8_t *to,
                              uint32_t stride) {
    for (uint32_t g = 0; g < 8; g += 2, unit += 64) {
        vi rows = v_rows_16(unit);
        uint8_t *row = to + token_of_row(g) * stride; /* then g + 8, g + 1, g + 9 */
#pragma GCC unroll 8
        for (uint32_t j = 0; j < 8 / width; j++, row += 16 * stride)
            v_store_quarters(
                (uint8_t *const[]){row, row + 2 * stride, row + stride, row + 3 * stride},
                v_codes(rows, width, j));
    }
}

/* Only head_dim 96 has such units. */
KV_INLINE void unpack_unit_8(const uint8_t *unit, const uint32_t width, uint8_t *to,
                             uint32_t stride) {
    const uint32_t mask = ((1u << width) - 1) * 0x01010101u;
    for (uint32_t g = 0; g < 8; g++)
        for (uint32_t i = 0; i < 4; i++, unit += 4) { /* t, and the half of the rows */
            uint8_t *row = to + token_of_row(g + 8 * (i & 1)) * stride + 4 * (i >> 1);
            uint32_t word;
            memcpy(&word, unit, 4);
            for (uint32_t j = 0; j < 8 / width; j++, row += 16 * stride, word >>= width)
                memcpy(row, &(uint32_t){word & mask}, 4);
        }
}

KV_INLINE void unpack_unit(const uint8_t *unit, const uint32_t k, const uint32_t width, uint8_t *to,
                           uint32_t stride) {
    if (k == 32)
        unpack_unit_32(unit, width, to, stride);
    else if (k == 16)
        unpack_unit_16(unit, width, to, stride);
    else
        unpack_unit_8(unit, width, to, stride);
}

/* K of one record to code[128][stride].  Slots of width 0 become code 0. */
KV_INLINE void unpack_keys(const struct kv_codec *codec, const uint8_t *record, const uint8_t *unit,
                           const uint32_t D, uint8_t *code, const uint32_t stride) {
    uint8_t width[KV_QUARTERS];
    panel_widths(codec, record, width);
    if (width[KV_QUARTERS - 1] == 0) memset(code, 0, (size_t)T * stride);
    for (uint32_t q = 0; q < KV_QUARTERS && width[q] > 0; q++)
        for (uint32_t slot = q * (D / 4), k; slot < (q + 1) * (D / 4); slot += k) {
            uint32_t left = (q + 1) * (D / 4) - slot;
            k             = left >= 32 ? 32 : left >= 16 ? 16 : 8;
            for (uint32_t u = 0; u < width[q]; u++, unit += 16 * k) {
                uint8_t *to = code + 16 * u * (8u / width[q]) * stride + slot;
                if (width[q] == 2)
                    unpack_unit(unit, k, 2, to, stride);
                else if (width[q] == 4)
                    unpack_unit(unit, k, 4, to, stride);
                else
                    unpack_unit(unit, k, 1, to, stride);
            }
        }
}

/* Tokens [first, end), which share scales and zeros. */
KV_INLINE void write_keys(struct work *work, const uint32_t D, const uint32_t stride,
                          const bool minmax, uint32_t first, uint32_t end, uint32_t group,
                          int to_bf16, uint16_t *keys) {
    vf scale[D_MAX / 16], zero[D_MAX / 16];
#pragma GCC unroll 16
    for (uint32_t i = 0; i < D / 16; i++) {
        scale[i] = v_load(work->scale[group] + 16 * i);
        zero[i]  = v_load(work->zero[group] + 16 * i);
    }
    for (uint32_t t = first; t < end; t++) {
        const uint8_t *code = work->code + t * stride;
        int8_t ordered[D_MAX];
        if (!minmax) {
            v_permute_bytes(ordered, (const int8_t *)code, work->slot, stride,
                            D <= 64 ? 1 : D <= 128 ? 2 : 4);
            code = (const uint8_t *)ordered;
        }
#pragma GCC unroll 16
        for (uint32_t i = 0; i < D / 16; i++)
            v_store_half(keys + t * D + 16 * i,
                         v_add(v_mul(v_to_f(v_load_u8(code + 16 * i)), scale[i]), zero[i]),
                         to_bf16);
    }
}

KV_INLINE void dequantize_keys(const struct kv_shape *shape, const struct kv_page_map *map,
                               const uint8_t *record, const uint32_t D, int to_bf16,
                               uint16_t *keys, struct work *work) {
    const uint32_t stride = (D + 63) & ~63u;
    unpack_keys(&shape->codec, record, record + map->key_codes, D, work->code, stride);
    if (shape->codec.kind != KV_CODEC_MINMAX) {
        load_key_terms(map, record, D, work);
        write_keys(work, D, stride, false, 0, T, 0, to_bf16, keys);
        return;
    }
    uint32_t group = shape->codec.group;
    load_minmax(record + map->key_scale, record + map->key_zero, T / group, D,
                shape->dtype == KV_DTYPE_BF16, work);
    for (uint32_t g = 0; g < T / group; g++)
        write_keys(work, D, stride, true, g * group, (g + 1) * group, g, to_bf16, keys);
}

/* ---- values ---------------------------------------------------------------------------------- */

static void load_value_terms(const struct kv_page_map *map, const uint8_t *record, uint32_t D,
                             struct work *work) {
    float step = factor_step(((const struct kv_page_header *)record)->value_factor);
    for (uint32_t t = 0; t < T; t += 16) {
        vf s = v_mul(v_load_e4m3(record + map->value_scale + t), v_set(step));
        v_store(work->scale[0] + t, s);
        v_store(work->zero[0] + t,
                v_mul(v_to_f(v_load_i8((const int8_t *)record + map->value_zero + t)),
                      v_mul(s, v_set(0.25f))));
    }
    for (uint32_t c = 0; c < D; c += 16)
        v_store(work->mean + c, v_load_f16((const uint16_t *)(record + map->value_mean) + c));
}

/* What four neighbouring tokens' codes stand for, before mean and rotation: to row[0 .. 3]. */
KV_INLINE void value_rows(struct work *work, const uint32_t D, uint32_t group, uint32_t t,
                          float *const row[4]) {
    for (uint32_t g = 0; g < D / group; g++) {
        v_affine map[4];
#pragma GCC unroll 4
        for (uint32_t i = 0; i < 4; i++)
            map[i] = v_affine_of(work->scale[g][t + i], work->zero[g][t + i]);
        for (uint32_t c = g * group; c < (g + 1) * group; c += 16) {
            vi quads = v_load_i(work->panel + ((c / 16) * 32 + t / 4) * KV_PANEL_ROW);
#pragma GCC unroll 4
            for (uint32_t i = 0; i < 4; i++)
                v_store(row[i] + c, v_affine_codes(map[i], quads, i));
        }
    }
}

KV_INLINE void dequantize_values(const struct kv_shape *shape, const struct kv_page_map *map,
                                 const uint8_t *record, const uint32_t D, int to_bf16,
                                 uint16_t *values, struct work *work) {
    bool minmax    = shape->codec.kind == KV_CODEC_MINMAX;
    uint32_t group = minmax ? shape->codec.group : D;
    if (minmax)
        load_minmax(record + map->value_scale, record + map->value_zero, D / group, T,
                    shape->dtype == KV_DTYPE_BF16, work);
    else
        load_value_terms(map, record, D, work);
    panel_values(shape, map, record, &(struct ahead){0}, work->panel);
    float norm = (float)(1.0 / sqrt((double)(D & (0 - D))));

    for (uint32_t t = 0; t < T; t += 4) {
        value_rows(work, D, group, t,
                   (float *const[]){work->row[0], work->row[1], work->row[2], work->row[3]});
        for (uint32_t i = 0; i < 4; i++) {
            float *row = work->row[i];
            if (!minmax && shape->codec.value_rotated) lanes_rotate_row(row, D, norm);
#pragma GCC unroll 16
            for (uint32_t c = 0; c < D; c += 16) {
                vf y = v_load(row + c);
                if (!minmax) y = v_add(y, v_load(work->mean + c));
                v_store_half(values + (t + i) * D + c, y, to_bf16);
            }
        }
    }
}

KV_INLINE void dequantize_record(const struct kv_shape *shape, const struct kv_page_map *map,
                                 const uint8_t *record, const uint32_t D, int to_bf16,
                                 uint16_t *keys, uint16_t *values, struct work *work) {
    dequantize_keys(shape, map, record, D, to_bf16, keys, work);
    dequantize_values(shape, map, record, D, to_bf16, values, work);
}

void KV_LANES_FN(dequantize)(const struct kv_shape *shape, const struct kv_page_map *map,
                             const uint8_t *record, enum kv_dtype dtype, uint16_t *keys,
                             uint16_t *values, void *scratch);
void KV_LANES_FN(dequantize)(const struct kv_shape *shape, const struct kv_page_map *map,
                             const uint8_t *record, enum kv_dtype dtype, uint16_t *keys,
                             uint16_t *values, void *scratch) {
    int bf16 = dtype == KV_DTYPE_BF16;
    switch (shape->head_dim) {
    case 64: dequantize_record(shape, map, record, 64, bf16, keys, values, scratch); break;
    case 96: dequantize_record(shape, map, record, 96, bf16, keys, values, scratch); break;
    case 128: dequantize_record(shape, map, record, 128, bf16, keys, values, scratch); break;
    default: dequantize_record(shape, map, record, 256, bf16, keys, values, scratch); break;
    }
}
