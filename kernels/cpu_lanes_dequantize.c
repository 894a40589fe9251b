/* SPDX-License-Identifier: Apache-2.0 */
/* cpu_lanes_dequantize.c - codes back to 16-bit elements, for AVX-512 and AVX2 (see cpu_lanes.h).
 *
 * K: codes to rows of slots, slots to channels by one byte permutation per token, then sixteen
 * channels at a time.  V: a panel row is sixteen channels of four tokens; a shift and a mask give one.
 * The operations and their order are page.h's, so the elements equal the scalar's to the bit.
 */
#include "kernels/cpu_lanes_panel.h"
#include "kernels/cpu_lanes_words.h"

#include <math.h>

enum { T = KV_BLOCK_TOKENS, D_MAX = KV_HEAD_DIM_MAX };

struct work {
    uint8_t panel[KV_PANEL_BYTES];
    uint8_t code[T][D_MAX];
    float scale[8][D_MAX],
        zero[8][D_MAX]; /* by channel, per key group; by token, per value group */
    float mean[D_MAX];
    float row[D_MAX];
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

static void dequantize_keys(const struct kv_shape *shape, const struct kv_page_map *map,
                            const uint8_t *record, int to_bf16, uint16_t *keys,
                            struct work *work) {
    uint32_t D = shape->head_dim, group = T;
    int bf16    = shape->dtype == KV_DTYPE_BF16;
    bool minmax = shape->codec.kind == KV_CODEC_MINMAX;
    if (minmax) {
        group = shape->codec.group;
        load_minmax(record + map->key_scale, record + map->key_zero, T / group, D, bf16, work);
    } else {
        load_key_terms(map, record, D, work);
        memset(work->code, 0, sizeof work->code); /* quarters of width 0 are not in the record */
    }
    uint8_t width[KV_QUARTERS];
    panel_widths(&shape->codec, record, width);
    words_keys(false, width, D, work->code[0], D_MAX,
               (uint8_t *)(uintptr_t)record + map->key_codes);

    for (uint32_t t = 0; t < T; t++) {
        uint8_t *code = work->code[t];
        int8_t ordered[D_MAX];
        if (!minmax) {
            v_permute_bytes(ordered, (const int8_t *)code, work->slot, (D + 63) & ~63u,
                            D <= 64    ? 1
                            : D <= 128 ? 2
                                       : 4);
            code = (uint8_t *)ordered;
        }
        const float *scale = work->scale[t / group], *zero = work->zero[t / group];
        for (uint32_t c = 0; c < D; c += 16)
            v_store_half(
                keys + t * D + c,
                v_add(v_mul(v_to_f(v_load_u8(code + c)), v_load(scale + c)), v_load(zero + c)),
                to_bf16);
    }
}

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

static void dequantize_values(const struct kv_shape *shape, const struct kv_page_map *map,
                              const uint8_t *record, int to_bf16, uint16_t *values,
                              struct work *work) {
    uint32_t D = shape->head_dim, group = D;
    int bf16    = shape->dtype == KV_DTYPE_BF16;
    bool minmax = shape->codec.kind == KV_CODEC_MINMAX;
    if (minmax) {
        group = shape->codec.group;
        load_minmax(record + map->value_scale, record + map->value_zero, D / group, T, bf16, work);
    } else {
        load_value_terms(map, record, D, work);
    }
    panel_values(shape, map, record, &(struct ahead){0}, work->panel);
    float norm = (float)(1.0 / sqrt((double)(D & (0 - D))));

    for (uint32_t t = 0; t < T; t++) {
        for (uint32_t c = 0; c < D; c += 16) {
            vi quad = v_load_i(work->panel + ((c / 16) * 32 + t / 4) * KV_PANEL_ROW);
            vf code = v_to_f(v_and(v_shr(quad, 8 * (t & 3)), v_set_i(0xff)));
            vf y    = v_add(v_mul(code, v_set(work->scale[c / group][t])),
                            v_set(work->zero[c / group][t]));
            if (minmax)
                v_store_half(values + t * D + c, y, to_bf16);
            else
                v_store(work->row + c, y);
        }
        if (minmax) continue;
        if (shape->codec.value_rotated) lanes_rotate(work->row, D, norm);
        for (uint32_t c = 0; c < D; c += 16)
            v_store_half(values + t * D + c, v_add(v_load(work->row + c), v_load(work->mean + c)),
                         to_bf16);
    }
}

void KV_LANES_FN(dequantize)(const struct kv_shape *shape, const struct kv_page_map *map,
                             const uint8_t *record, enum kv_dtype dtype, uint16_t *keys,
                             uint16_t *values, void *scratch);
void KV_LANES_FN(dequantize)(const struct kv_shape *shape, const struct kv_page_map *map,
                             const uint8_t *record, enum kv_dtype dtype, uint16_t *keys,
                             uint16_t *values, void *scratch) {
    int bf16 = dtype == KV_DTYPE_BF16;
    dequantize_keys(shape, map, record, bf16, keys, scratch);
    dequantize_values(shape, map, record, bf16, values, scratch);
}
