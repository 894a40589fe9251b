/* SPDX-License-Identifier: Apache-2.0 */
/* page_check.c - the rules of kernels/page.h that a reader relies on. */
#include "service/page_check.h"

static uint16_t load16(const uint8_t *at) {
    uint16_t bits;
    memcpy(&bits, at, sizeof bits);
    return bits;
}

static bool finite16(uint16_t bits, enum kv_dtype dtype) {
    uint16_t exponent = dtype == KV_DTYPE_BF16 ? 0x7f80 : 0x7c00;
    return (bits & exponent) != exponent;
}

static bool all_finite16(const uint8_t *from, size_t count, enum kv_dtype dtype) {
    for (size_t i = 0; i < count; i++)
        if (!finite16(load16(from + 2 * i), dtype)) return false;
    return true;
}

/* e4m3 scales: 0x7f is NaN, and no scale is negative. */
static bool scales_valid(const uint8_t *from, size_t count) {
    for (size_t i = 0; i < count; i++)
        if (from[i] >= 0x7f) return false;
    return true;
}

static bool permutation(const uint8_t *order, uint32_t count) {
    bool seen[KV_HEAD_DIM_MAX] = {false};
    for (uint32_t i = 0; i < count; i++) {
        if (order[i] >= count || seen[order[i]]) return false;
        seen[order[i]] = true;
    }
    return true;
}

static const char *check_unbiased(const struct kv_shape *shape, const struct kv_page_map *map,
                                  const uint8_t *record) {
    struct kv_page_header header;
    memcpy(&header, record, sizeof header);
    if (header.mix >= shape->codec.mix_count) return "its mix does not exist";
    if (!finite16(header.key_factor, KV_DTYPE_F16) || header.key_factor >> 15 ||
        !finite16(header.value_factor, KV_DTYPE_F16) || header.value_factor >> 15)
        return "a factor is not finite and at least 0";
    if (!permutation(record + map->key_order, shape->head_dim))
        return "its key order is no permutation of the channels";
    if (!scales_valid(record + map->key_scale, shape->head_dim)) return "a key scale is no number";
    if (!all_finite16(record + map->key_zero, shape->head_dim, KV_DTYPE_F16))
        return "a key zero is not finite";
    if (!all_finite16(record + map->value_mean, shape->head_dim, KV_DTYPE_F16))
        return "a value mean is not finite";
    if (!scales_valid(record + map->value_scale, KV_BLOCK_TOKENS))
        return "a value scale is no number";
    return NULL;
}

static const char *check_minmax(const struct kv_shape *shape, const struct kv_page_map *map,
                                const uint8_t *record) {
    enum kv_dtype dtype = (enum kv_dtype)shape->dtype;
    bool keys = all_finite16(record + map->key_scale, (map->key_codes - map->key_scale) / 2, dtype);
    bool values =
        all_finite16(record + map->value_scale, (map->value_codes - map->value_scale) / 2, dtype);
    return keys && values ? NULL : "a scale or minimum is not finite";
}

const char *page_check(const struct kv_shape *shape, const uint8_t *page, uint32_t *head) {
    *head = 0;
    if (shape->codec.kind == KV_CODEC_RAW) {
        bool finite =
            all_finite16(page, 2 * kv_shape_elements(shape), (enum kv_dtype)shape->dtype);
        return finite ? NULL : "an element is not finite";
    }
    struct kv_page_map map = kv_page_map(shape);
    for (; *head < shape->heads; (*head)++) {
        const uint8_t *record = page + (size_t)*head * map.record_bytes;
        const char *wrong = shape->codec.kind == KV_CODEC_UNBIASED
                                ? check_unbiased(shape, &map, record)
                                : check_minmax(shape, &map, record);
        if (wrong) return wrong;
    }
    return NULL;
}
