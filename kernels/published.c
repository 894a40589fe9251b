/* SPDX-License-Identifier: Apache-2.0 */
/* published.c - see published.h.  Codes pass through plain arrays of one code per byte, in
 * which both layouts are a walk; metadata is transposed. */
#include "kernels/published.h"

#include "kernels/cpu_codes.h"
#include "proto/kv_check.h"

enum { T = KV_BLOCK_TOKENS, D_MAX = KV_HEAD_DIM_MAX };

static void check_shape(const struct kv_shape *shape) {
    KV_CHECK(kv_shape_valid(shape));
    KV_CHECK(shape->codec.kind == KV_CODEC_MINMAX);
}

size_t kv_published_words(const struct kv_shape *shape, bool keys) {
    uint32_t width = keys ? shape->codec.key_bits : shape->codec.value_bits;
    return kv_shape_elements(shape) * width / 32;
}

size_t kv_published_groups(const struct kv_shape *shape) {
    return kv_shape_elements(shape) / shape->codec.group;
}

/* count codes, one per byte, to words and back. */
static void words_of_codes(uint32_t width, size_t count, const uint8_t *codes, uint32_t *words) {
    uint32_t per_word = 32 / width;
    for (size_t i = 0; i < count; i += per_word) {
        uint32_t word = 0;
        for (uint32_t j = 0; j < per_word; j++) word |= (uint32_t)codes[i + j] << (width * j);
        words[i / per_word] = word;
    }
}

static void codes_of_words(uint32_t width, size_t count, const uint32_t *words, uint8_t *codes) {
    uint32_t per_word = 32 / width, mask = (1u << width) - 1;
    for (size_t i = 0; i < count; i++)
        codes[i] = (uint8_t)(words[i / per_word] >> (i % per_word * width) & mask);
}

/* target[column][row] = source[row][column], 16-bit elements; either may be unaligned. */
static void transpose(const void *source, uint32_t rows, uint32_t columns, void *target) {
    for (uint32_t row = 0; row < rows; row++)
        for (uint32_t column = 0; column < columns; column++)
            memcpy((uint8_t *)target + 2 * ((size_t)column * rows + row),
                   (const uint8_t *)source + 2 * ((size_t)row * columns + column), 2);
}

struct widths {
    uint8_t of[KV_QUARTERS];
};

static struct widths key_widths(const struct kv_codec *codec) {
    uint8_t w = codec->key_bits;
    return (struct widths){{w, w, w, w}};
}

/* One head's part of the published arrays. */
static struct kv_published head_of(const struct kv_shape *shape, const struct kv_published *all,
                                   uint32_t head) {
    size_t groups = head * kv_published_groups(shape) / shape->heads;
    size_t key_words = head * kv_published_words(shape, true) / shape->heads;
    size_t value_words = head * kv_published_words(shape, false) / shape->heads;
    return (struct kv_published){
        .key_codes = all->key_codes + key_words,
        .key_scale = all->key_scale + groups,
        .key_min = all->key_min + groups,
        .value_codes = all->value_codes + value_words,
        .value_scale = all->value_scale + groups,
        .value_min = all->value_min + groups,
    };
}

void kv_published_export(const struct kv_shape *shape, const void *page,
                         const struct kv_published *out) {
    check_shape(shape);
    struct kv_page_map map = kv_page_map(shape);
    const struct kv_codec *codec = &shape->codec;
    uint32_t D = shape->head_dim, key_groups = T / codec->group, value_groups = D / codec->group;
    uint8_t codes[T * D_MAX];
    for (uint32_t head = 0; head < shape->heads; head++) {
        const uint8_t *record = (const uint8_t *)page + (size_t)head * map.record_bytes;
        struct kv_published part = head_of(shape, out, head);
        kv_codes_unpack_keys(key_widths(codec).of, D, record + map.key_codes, codes);
        words_of_codes(codec->key_bits, (size_t)T * D, codes, part.key_codes);
        transpose(record + map.key_scale, key_groups, D, part.key_scale);
        transpose(record + map.key_zero, key_groups, D, part.key_min);
        kv_codes_unpack_values(codec->value_bits, D, record + map.value_codes, codes);
        words_of_codes(codec->value_bits, (size_t)T * D, codes, part.value_codes);
        transpose(record + map.value_scale, value_groups, T, part.value_scale);
        transpose(record + map.value_zero, value_groups, T, part.value_min);
    }
}

void kv_published_import(const struct kv_shape *shape, const struct kv_published *in,
                         void *page) {
    check_shape(shape);
    struct kv_page_map map = kv_page_map(shape);
    const struct kv_codec *codec = &shape->codec;
    uint32_t D = shape->head_dim, key_groups = T / codec->group, value_groups = D / codec->group;
    uint8_t codes[T * D_MAX];
    for (uint32_t head = 0; head < shape->heads; head++) {
        uint8_t *record = (uint8_t *)page + (size_t)head * map.record_bytes;
        struct kv_published part = head_of(shape, in, head);
        transpose(part.key_scale, D, key_groups, record + map.key_scale);
        transpose(part.key_min, D, key_groups, record + map.key_zero);
        codes_of_words(codec->key_bits, (size_t)T * D, part.key_codes, codes);
        kv_codes_pack_keys(key_widths(codec).of, D, codes, record + map.key_codes);
        transpose(part.value_scale, T, value_groups, record + map.value_scale);
        transpose(part.value_min, T, value_groups, record + map.value_zero);
        codes_of_words(codec->value_bits, (size_t)T * D, part.value_codes, codes);
        kv_codes_pack_values(codec->value_bits, D, codes, record + map.value_codes);
    }
}
