/* SPDX-License-Identifier: Apache-2.0 */
/* page.c - sizes, rules and presets of the packed page.
 *
 * page.h says what each part of a record is; here stand the sums that follow from it and
 * the codecs that have a name.
 */
#include "kernels/page.h"

const uint16_t kv_range_offset[KV_RANGES] = {0, 164, 328, 491};

const uint16_t kv_range_step2[KV_RANGES][KV_RANGES] = {
    {0x1601, 0x1686, 0x1725, 0x17e6},
    {0x1686, 0x1725, 0x17e6, 0x186a},
    {0x1725, 0x17e6, 0x186a, 0x1901},
    {0x17e6, 0x186a, 0x1901, 0x19c6},
};

const uint16_t kv_range_step4[KV_RANGES][KV_RANGES] = {
    {0x1f81, 0x2014, 0x2077, 0x20f0},
    {0x2014, 0x2077, 0x20f0, 0x2184},
    {0x2077, 0x20f0, 0x2184, 0x2241},
    {0x20f0, 0x2184, 0x2241, 0x2337},
};

/* The mixes of each average width, the most uneven first: a tie of costs goes to the mix
 * with the most channels that cost nothing to read. */
#define MIXES_2_5 .mix_count = 3, .mixes = {{4, 4, 2, 0}, {4, 4, 1, 1}, {4, 2, 2, 2}}
#define MIXES_2 .mix_count = 4, .mixes = {{4, 4, 0, 0}, {4, 2, 2, 0}, {4, 2, 1, 1}, {2, 2, 2, 2}}
#define MIXES_1_5 .mix_count = 4, .mixes = {{4, 2, 0, 0}, {4, 1, 1, 0}, {2, 2, 2, 0}, {2, 2, 1, 1}}

static const struct kv_preset presets[] = {
    {"kivi1.5",
     {.kind = KV_CODEC_UNBIASED, .value_bits = 1, .value_rotated = 1, MIXES_1_5}, 1, 128},
    {"kivi1.75",
     {.kind = KV_CODEC_UNBIASED, .value_bits = 1, .value_rotated = 1, MIXES_2}, 1, 128},
    {"kivi2", {.kind = KV_CODEC_UNBIASED, .value_bits = 2, MIXES_2}, 1, 128},
    {"kivi2.5", {.kind = KV_CODEC_UNBIASED, .value_bits = 2, MIXES_2_5}, 1, 128},
    {"kivi2-paper",
     {.kind = KV_CODEC_MINMAX, .key_bits = 2, .value_bits = 2, .group = 32}, 0, 128},
    {"kivi4-paper",
     {.kind = KV_CODEC_MINMAX, .key_bits = 4, .value_bits = 4, .group = 32}, 0, 128},
    {"raw16", {.kind = KV_CODEC_RAW}, 0, 0},
};
enum { PRESET_COUNT = sizeof presets / sizeof presets[0] };

static bool is_zero(const uint8_t *bytes, size_t count) {
    for (size_t i = 0; i < count; i++)
        if (bytes[i] != 0) return false;
    return true;
}

static bool mix_valid(const uint8_t mix[KV_QUARTERS]) {
    for (uint32_t q = 0; q < KV_QUARTERS; q++) {
        if (mix[q] != 0 && mix[q] != 1 && mix[q] != 2 && mix[q] != 4) return false;
        if (q > 0 && mix[q] > mix[q - 1]) return false;
    }
    return mix[0] != 0;
}

static uint32_t mix_sum(const uint8_t mix[KV_QUARTERS]) {
    return (uint32_t)mix[0] + mix[1] + mix[2] + mix[3];
}

static bool minmax_valid(const struct kv_codec *codec, uint32_t head_dim) {
    bool bits = (codec->key_bits == 2 || codec->key_bits == 4) &&
                (codec->value_bits == 2 || codec->value_bits == 4);
    bool group = codec->group == 32 || codec->group == 64 || codec->group == 128;
    return bits && group && head_dim % codec->group == 0 && codec->value_rotated == 0 &&
           codec->mix_count == 0 && is_zero(codec->mixes[0], sizeof codec->mixes);
}

static bool unbiased_valid(const struct kv_codec *codec) {
    if (codec->key_bits != 0 || codec->group != 0) return false;
    if (codec->value_bits != 1 && codec->value_bits != 2) return false;
    if (codec->value_rotated > 1) return false;
    if (codec->mix_count < 1 || codec->mix_count > KV_MIX_COUNT_MAX) return false;
    for (uint32_t i = 0; i < codec->mix_count; i++)
        if (!mix_valid(codec->mixes[i]) || mix_sum(codec->mixes[i]) != mix_sum(codec->mixes[0]))
            return false;
    size_t used = (size_t)codec->mix_count * KV_QUARTERS;
    return is_zero(codec->mixes[0] + used, sizeof codec->mixes - used);
}

bool kv_shape_valid(const struct kv_shape *shape) {
    const struct kv_codec *codec = &shape->codec;
    if (shape->heads < 1 || shape->heads > KV_HEADS_MAX) return false;
    if (!kv_head_dim_valid(shape->head_dim)) return false;
    if (shape->dtype != KV_DTYPE_F16 && shape->dtype != KV_DTYPE_BF16) return false;
    if (!is_zero(codec->reserved, sizeof codec->reserved)) return false;
    switch (codec->kind) {
    case KV_CODEC_RAW: return is_zero((const uint8_t *)codec, sizeof *codec);
    case KV_CODEC_MINMAX: return minmax_valid(codec, shape->head_dim);
    case KV_CODEC_UNBIASED: return unbiased_valid(codec);
    default: return false;
    }
}

uint32_t kv_codec_key_width_sum(const struct kv_codec *codec) {
    if (codec->kind == KV_CODEC_MINMAX) return KV_QUARTERS * (uint32_t)codec->key_bits;
    return mix_sum(codec->mixes[0]);
}

static struct kv_page_map map_unbiased(const struct kv_codec *codec, uint32_t D) {
    struct kv_page_map map;
    map.key_order = sizeof(struct kv_page_header);
    map.key_scale = map.key_order + D;
    map.key_zero = map.key_scale + D;
    map.key_codes = map.key_zero + 2 * D;
    map.value_mean = map.key_codes + 4 * D * kv_codec_key_width_sum(codec);
    map.value_scale = map.value_mean + 2 * D;
    map.value_zero = map.value_scale + KV_BLOCK_TOKENS;
    map.value_codes = map.value_zero + KV_BLOCK_TOKENS;
    map.record_bytes = map.value_codes + 16 * D * codec->value_bits;
    return map;
}

static struct kv_page_map map_minmax(const struct kv_codec *codec, uint32_t D) {
    uint32_t key_groups = KV_BLOCK_TOKENS / codec->group;
    uint32_t value_groups = D / codec->group;
    struct kv_page_map map;
    map.key_order = 0;
    map.key_scale = 0;
    map.key_zero = map.key_scale + 2 * key_groups * D;
    map.key_codes = map.key_zero + 2 * key_groups * D;
    map.value_mean = map.key_codes + 16 * D * codec->key_bits;
    map.value_scale = map.value_mean;
    map.value_zero = map.value_scale + 2 * value_groups * KV_BLOCK_TOKENS;
    map.value_codes = map.value_zero + 2 * value_groups * KV_BLOCK_TOKENS;
    map.record_bytes = map.value_codes + 16 * D * codec->value_bits;
    return map;
}

struct kv_page_map kv_page_map(const struct kv_shape *shape) {
    if (shape->codec.kind == KV_CODEC_MINMAX) return map_minmax(&shape->codec, shape->head_dim);
    return map_unbiased(&shape->codec, shape->head_dim);
}

size_t kv_page_bytes(const struct kv_shape *shape) {
    if (shape->codec.kind == KV_CODEC_RAW) return kv_shape_bytes_raw(shape);
    return (size_t)shape->heads * kv_page_map(shape).record_bytes;
}

double kv_shape_bits(const struct kv_shape *shape) {
    return 8.0 * (double)kv_page_bytes(shape) / (2.0 * (double)kv_shape_elements(shape));
}

/* ---- pages from outside ----------------------------------------------------------------- */

static uint32_t load_u16(const uint8_t *source) {
    uint16_t value;
    memcpy(&value, source, sizeof value);
    return value;
}

/* Elements of which no exponent is all ones, and with a sign only where it may be. */
static bool all_finite(const uint8_t *source, size_t count, uint8_t dtype, bool negative_too) {
    uint32_t infinity = dtype == KV_DTYPE_BF16 ? 0x7f80 : 0x7c00;
    for (size_t i = 0; i < count; i++) {
        uint32_t element = load_u16(source + 2 * i);
        if ((element & 0x7fff) >= infinity) return false;
        if (!negative_too && element > 0x7fff) return false;
    }
    return true;
}

/* e4m3 has one NaN and no infinity. */
static bool scales_valid(const uint8_t *scales, size_t count) {
    for (size_t i = 0; i < count; i++)
        if (scales[i] >= 0x7f) return false;
    return true;
}

static bool is_permutation(const uint8_t *order, uint32_t count) {
    bool seen[KV_HEAD_DIM_MAX] = {false};
    for (uint32_t i = 0; i < count; i++) {
        if (order[i] >= count || seen[order[i]]) return false;
        seen[order[i]] = true;
    }
    return true;
}

static bool record_valid_unbiased(const struct kv_shape *shape, const struct kv_page_map *map,
                                  const uint8_t *record) {
    uint32_t D = shape->head_dim;
    struct kv_page_header header;
    memcpy(&header, record, sizeof header);
    const uint8_t *key_factor = record + offsetof(struct kv_page_header, key_factor);
    const uint8_t *value_factor = record + offsetof(struct kv_page_header, value_factor);
    return header.mix < shape->codec.mix_count && header.zero0 == 0 &&
           is_zero(header.zero, sizeof header.zero) &&
           all_finite(key_factor, 1, KV_DTYPE_F16, false) &&
           all_finite(value_factor, 1, KV_DTYPE_F16, false) &&
           is_permutation(record + map->key_order, D) &&
           scales_valid(record + map->key_scale, D) &&
           all_finite(record + map->key_zero, D, KV_DTYPE_F16, true) &&
           all_finite(record + map->value_mean, D, KV_DTYPE_F16, true) &&
           scales_valid(record + map->value_scale, KV_BLOCK_TOKENS);
}

static bool record_valid_minmax(const struct kv_shape *shape, const struct kv_page_map *map,
                                const uint8_t *record) {
    size_t groups = (size_t)KV_BLOCK_TOKENS * shape->head_dim / shape->codec.group;
    return all_finite(record + map->key_scale, groups, shape->dtype, false) &&
           all_finite(record + map->key_zero, groups, shape->dtype, true) &&
           all_finite(record + map->value_scale, groups, shape->dtype, false) &&
           all_finite(record + map->value_zero, groups, shape->dtype, true);
}

bool kv_page_valid(const struct kv_shape *shape, const void *page) {
    if (shape->codec.kind == KV_CODEC_RAW)
        return all_finite(page, 2 * kv_shape_elements(shape), shape->dtype, true);
    struct kv_page_map map = kv_page_map(shape);
    for (uint32_t head = 0; head < shape->heads; head++) {
        const uint8_t *record = (const uint8_t *)page + (size_t)head * map.record_bytes;
        bool valid = shape->codec.kind == KV_CODEC_MINMAX
                         ? record_valid_minmax(shape, &map, record)
                         : record_valid_unbiased(shape, &map, record);
        if (!valid) return false;
    }
    return true;
}

/* ---- names ------------------------------------------------------------------------------ */

const struct kv_preset *kv_presets(size_t *count) {
    *count = PRESET_COUNT;
    return presets;
}

enum kv_status kv_preset_find(const char *name, struct kv_preset *out) {
    for (size_t i = 0; i < PRESET_COUNT; i++) {
        if (strcmp(presets[i].name, name) != 0) continue;
        *out = presets[i];
        return KV_OK;
    }
    return KV_NOT_FOUND;
}

const char *kv_codec_name(const struct kv_codec *codec) {
    for (size_t i = 0; i < PRESET_COUNT; i++)
        if (memcmp(&presets[i].codec, codec, sizeof *codec) == 0) return presets[i].name;
    return "custom";
}
