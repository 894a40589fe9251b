/* SPDX-License-Identifier: Apache-2.0 */
/* cpu_scalar_attend.c - from codes back to numbers, and attention over them.
 *
 * A page of one KV head, packed or raw, becomes binary32 x^ in the worker's scratch:
 *
 *     keys     float [channel][token]   so that scores of a page add up token beside token
 *     values   float [token][channel]   so that outputs add up channel beside channel
 *
 * and attention runs over that with a softmax that is kept while it grows: per query
 * vector the largest score so far, the sum of e^(score - largest), and the output under
 * the same factor.  What a faster backend does on the codes themselves must come out as
 * this does, to the bound of tests/kernel_check.
 */
#include <math.h>

#include "kernels/cpu_codes.h"
#include "kernels/cpu_scalar.h"
#include "kernels/half.h"

enum { T = KV_BLOCK_TOKENS, D_MAX = KV_HEAD_DIM_MAX };

struct scratch {
    float keys[D_MAX * T];   /* [channel][token] */
    float values[T * D_MAX]; /* [token][channel] */
    uint8_t codes[T * D_MAX];
    float scores[T];
    float sums[KV_ROWS_MAX * KV_GROUP_HEADS_MAX]; /* of e^(score - largest), by query vector */
};
static_assert(sizeof(struct scratch) <= KV_CPU_SCRATCH, "the worker's scratch holds it");

static uint16_t load_u16(const uint8_t *source, size_t index) {
    uint16_t value;
    memcpy(&value, source + 2 * index, sizeof value);
    return value;
}

/* ---- a packed record to numbers ---------------------------------------------------- */

static void unbiased_keys(const struct kv_shape *shape, const struct kv_page_map *map,
                          const uint8_t *record, uint8_t *codes, float *keys) {
    uint32_t D = shape->head_dim;
    struct kv_page_header header;
    memcpy(&header, record, sizeof header);
    /* A record is trusted to be ours only as far as its checksum goes; an index out of
     * its table must not become a read out of bounds. */
    uint32_t mix = header.mix < shape->codec.mix_count ? header.mix : 0;
    kv_codes_unpack_keys(shape->codec.mixes[mix], D, record + map->key_codes, codes);

    float step = kv_f32_of_f16(header.key_factor) / 448.0f;
    for (uint32_t slot = 0; slot < D; slot++) {
        float s = kv_f32_of_e4m3(record[map->key_scale + slot]) * step;
        float z = kv_f32_of_f16(load_u16(record + map->key_zero, slot));
        uint32_t channel = record[map->key_order + slot];
        if (channel >= D) channel = slot;
        for (uint32_t t = 0; t < T; t++)
            keys[channel * T + t] = (float)codes[slot * T + t] * s + z;
    }
}

static void unbiased_values(const struct kv_shape *shape, const struct kv_page_map *map,
                            const uint8_t *record, uint8_t *codes, float *values) {
    uint32_t D = shape->head_dim;
    struct kv_page_header header;
    memcpy(&header, record, sizeof header);
    kv_codes_unpack_values(shape->codec.value_bits, D, record + map->value_codes, codes);

    float mean[D_MAX], step = kv_f32_of_f16(header.value_factor) / 448.0f;
    for (uint32_t c = 0; c < D; c++)
        mean[c] = kv_f32_of_f16(load_u16(record + map->value_mean, c));
    for (uint32_t t = 0; t < T; t++) {
        float *row = values + t * D;
        float s = kv_f32_of_e4m3(record[map->value_scale + t]) * step;
        float z = (float)(int8_t)record[map->value_zero + t] * (s / 4.0f);
        for (uint32_t c = 0; c < D; c++) row[c] = (float)codes[t * D + c] * s + z;
        if (shape->codec.value_rotated) kv_scalar_rotate(row, D);
        for (uint32_t c = 0; c < D; c++) row[c] += mean[c];
    }
}

static void minmax_keys(const struct kv_shape *shape, const struct kv_page_map *map,
                        const uint8_t *record, uint8_t *codes, float *keys) {
    uint32_t D = shape->head_dim, n = shape->codec.group, bits = shape->codec.key_bits;
    const uint8_t widths[KV_QUARTERS] = {(uint8_t)bits, (uint8_t)bits, (uint8_t)bits,
                                         (uint8_t)bits};
    kv_codes_unpack_keys(widths, D, record + map->key_codes, codes);
    for (uint32_t group = 0; group < T / n; group++)
        for (uint32_t c = 0; c < D; c++) {
            uint32_t index = group * D + c, start = c * T + group * n;
            float s = kv_f32_of_element(load_u16(record + map->key_scale, index), shape->dtype);
            float z = kv_f32_of_element(load_u16(record + map->key_zero, index), shape->dtype);
            for (uint32_t i = start; i < start + n; i++) keys[i] = (float)codes[i] * s + z;
        }
}

static void minmax_values(const struct kv_shape *shape, const struct kv_page_map *map,
                          const uint8_t *record, uint8_t *codes, float *values) {
    uint32_t D = shape->head_dim, n = shape->codec.group;
    kv_codes_unpack_values(shape->codec.value_bits, D, record + map->value_codes, codes);
    for (uint32_t group = 0; group < D / n; group++)
        for (uint32_t t = 0; t < T; t++) {
            uint32_t index = group * T + t, start = t * D + group * n;
            float s = kv_f32_of_element(load_u16(record + map->value_scale, index), shape->dtype);
            float z = kv_f32_of_element(load_u16(record + map->value_zero, index), shape->dtype);
            for (uint32_t i = start; i < start + n; i++) values[i] = (float)codes[i] * s + z;
        }
}

static void record_to_floats(const struct kv_shape *shape, const struct kv_page_map *map,
                             const uint8_t *record, struct scratch *scratch) {
    if (shape->codec.kind == KV_CODEC_MINMAX) {
        minmax_keys(shape, map, record, scratch->codes, scratch->keys);
        minmax_values(shape, map, record, scratch->codes, scratch->values);
    } else {
        unbiased_keys(shape, map, record, scratch->codes, scratch->keys);
        unbiased_values(shape, map, record, scratch->codes, scratch->values);
    }
}

void kv_scalar_dequantize(const struct kv_shape *shape, const struct kv_page_map *map,
                          const uint8_t *record, enum kv_dtype dtype, uint16_t *keys,
                          uint16_t *values, void *memory) {
    struct scratch *scratch = memory;
    uint32_t D = shape->head_dim;
    record_to_floats(shape, map, record, scratch);
    for (uint32_t t = 0; t < T; t++)
        for (uint32_t c = 0; c < D; c++) {
            keys[t * D + c] = kv_element_saturated(scratch->keys[c * T + t], (uint8_t)dtype);
            values[t * D + c] = kv_element_saturated(scratch->values[t * D + c], (uint8_t)dtype);
        }
}

/* ---- attention -------------------------------------------------------------------- */

/* The first `tokens` rows of a raw page; the rest of the arrays stays undefined. */
static void raw_to_floats(const struct kv_cpu_attend *task, const struct kv_page_ref *ref,
                          struct scratch *scratch) {
    uint32_t D = task->shape->head_dim;
    const uint16_t *keys = (const uint16_t *)ref->page + (size_t)task->head * T * D;
    const uint16_t *values = keys + kv_shape_elements(task->shape);
    for (uint32_t t = 0; t < ref->tokens; t++)
        for (uint32_t c = 0; c < D; c++)
            scratch->keys[c * T + t] = kv_f32_of_element(keys[t * D + c], task->shape->dtype);
    kv_cpu_scalar.widen(values, task->shape->dtype, 1.0f, scratch->values,
                        (size_t)ref->tokens * D);
}

static void page_to_floats(const struct kv_cpu_attend *task, const struct kv_page_ref *ref,
                           struct scratch *scratch) {
    if (ref->raw || task->shape->codec.kind == KV_CODEC_RAW) {
        raw_to_floats(task, ref, scratch);
    } else {
        const uint8_t *record =
            (const uint8_t *)ref->page + (size_t)task->head * task->map->record_bytes;
        record_to_floats(task->shape, task->map, record, scratch);
    }
}

/* One query vector over the first `tokens` tokens of the page in scratch.  *largest, *sum
 * and out are the softmax so far; *largest = -inf: nothing yet. */
static void attend_vector(const float *query, uint32_t D, uint32_t tokens,
                          struct scratch *scratch, float *largest, float *sum, float *out) {
    float *scores = scratch->scores;
    for (uint32_t t = 0; t < tokens; t++) scores[t] = 0;
    for (uint32_t c = 0; c < D; c++)
        for (uint32_t t = 0; t < tokens; t++) scores[t] += query[c] * scratch->keys[c * T + t];

    float top = *largest;
    for (uint32_t t = 0; t < tokens; t++) top = scores[t] > top ? scores[t] : top;
    float shrink = expf(*largest - top); /* 0 for the first tokens: e^-inf */
    *largest = top;
    *sum *= shrink;
    for (uint32_t c = 0; c < D; c++) out[c] *= shrink;

    for (uint32_t t = 0; t < tokens; t++) {
        float p = expf(scores[t] - top);
        *sum += p;
        for (uint32_t c = 0; c < D; c++) out[c] += p * scratch->values[t * D + c];
    }
}

/* Tokens of a page of `tokens`, the first of which is number `start`, that a row with the
 * limit `visible` sees. */
static uint32_t tokens_visible(uint32_t start, uint32_t tokens, uint32_t visible) {
    if (visible <= start) return 0;
    return visible - start < tokens ? visible - start : tokens;
}

/* lse[] holds the largest score of each vector until the end. */
static void attend_page(const struct kv_cpu_attend *task, uint32_t start,
                        const struct kv_page_ref *ref, struct scratch *scratch) {
    uint32_t D = task->shape->head_dim;
    page_to_floats(task, ref, scratch);
    for (uint32_t row = 0; row < task->rows; row++) {
        uint32_t tokens = tokens_visible(start, ref->tokens, task->visible[row]);
        if (tokens == 0) continue;
        for (uint32_t i = row * task->group; i < (row + 1) * task->group; i++)
            attend_vector(task->query + (size_t)i * D, D, tokens, scratch, &task->lse[i],
                          &scratch->sums[i], task->out + (size_t)i * D);
    }
}

static uint32_t visible_to_any(const struct kv_cpu_attend *task) {
    uint32_t most = 0;
    for (uint32_t row = 0; row < task->rows; row++)
        if (task->visible[row] > most) most = task->visible[row];
    return most;
}

void kv_scalar_attend(const struct kv_cpu_attend *task) {
    struct scratch *scratch = task->scratch;
    uint32_t D = task->shape->head_dim, n = task->rows * task->group;
    for (uint32_t i = 0; i < n; i++) {
        task->lse[i] = -INFINITY;
        scratch->sums[i] = 0;
    }
    memset(task->out, 0, (size_t)n * D * sizeof(float));

    uint32_t start = task->token, end = visible_to_any(task);
    for (uint32_t i = 0; i < task->page_count && start < end; i++) {
        if (task->cancel != NULL && atomic_load_explicit(task->cancel, memory_order_relaxed))
            return;
        attend_page(task, start, &task->pages[i], scratch);
        start += task->pages[i].tokens;
    }

    for (uint32_t i = 0; i < n; i++) {
        float sum = scratch->sums[i];
        if (sum == 0) continue; /* saw nothing: out 0, lse -inf */
        for (uint32_t c = 0; c < D; c++) task->out[(size_t)i * D + c] /= sum;
        task->lse[i] += logf(sum);
    }
}
