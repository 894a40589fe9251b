/* SPDX-License-Identifier: Apache-2.0 */
/* kernel_check_pages.c - ingest, emit, quantize, dequantize: the same bytes.  observe: 1e-5. */
#include <math.h>

#include "kernels/half.h"
#include "proto/kv_check.h"
#include "tests/kernels/kernel_check.h"

enum { T = KV_BLOCK_TOKENS };

/* Which part of a packed page a byte belongs to, for the message. */
static const char *part_name(const struct kv_shape *shape, size_t offset) {
    if (shape->codec.kind == KV_CODEC_RAW) return "element";
    struct kv_page_map map = kv_page_map(shape);
    size_t at = offset % map.record_bytes;
    if (at >= map.value_codes) return "value_codes";
    if (at >= map.value_zero) return "value_zero";
    if (at >= map.value_scale) return "value_scale";
    if (at >= map.value_mean) return "value_mean";
    if (at >= map.key_codes) return "key_codes";
    if (at >= map.key_zero) return "key_zero";
    if (at >= map.key_scale) return "key_scale";
    if (at >= map.key_order) return "key_order";
    return "header";
}

static void compare_packed(struct bench_pair *pair, const struct check_case *check,
                           const uint8_t *truth, const uint8_t *tested) {
    size_t bytes = kv_page_bytes(&check->shape), count = 0, first = 0;
    for (size_t i = 0; i < bytes; i++)
        if (truth[i] != tested[i] && count++ == 0) first = i;
    if (count == 0) return;
    char what[200];
    snprintf(what, sizeof what, "quantize: %zu bytes differ, the first at %zu in %s: %02x for %02x",
             count, first, part_name(&check->shape, first), tested[first], truth[first]);
    case_fail(pair, check, what);
}

static void compare_elements(struct bench_pair *pair, const struct check_case *check,
                             const char *verb, const uint16_t *truth, const uint16_t *tested,
                             size_t elements) {
    size_t count = 0, first = 0;
    for (size_t i = 0; i < elements; i++)
        if (truth[i] != tested[i] && count++ == 0) first = i;
    if (count == 0) return;
    char what[200];
    snprintf(what, sizeof what, "%s: %zu elements differ, the first at %zu: %04x for %04x", verb,
             count, first, tested[first], truth[first]);
    case_fail(pair, check, what);
}

/* None, ordinary, zero in places, and the largest. */
static const float *draw_energy(struct dice *dice, const struct kv_shape *shape, float *energy) {
    uint32_t kind = dice_below(dice, 4);
    if (kind == 0) return NULL;
    for (uint32_t i = 0; i < (uint32_t)shape->heads * shape->head_dim; i++) {
        energy[i] = expf(2 * dice_normal(dice));
        if (kind == 2 && dice_below(dice, 3) == 0) energy[i] = 0;
        if (kind == 3) energy[i] = dice_below(dice, 2) ? KV_ENERGY_MAX : energy[i] * 1e-20f;
    }
    return energy;
}

static void check_quantize(struct bench_pair *pair, const struct check_case *check,
                           struct dice *dice) {
    const struct kv_shape *shape = &check->shape;
    size_t elements = 2 * kv_shape_elements(shape);
    uint16_t *raw = malloc(elements * sizeof *raw), *back[2];
    uint8_t *packed[2];
    float *energy = malloc((size_t)shape->heads * shape->head_dim * sizeof *energy);
    for (int i = 0; i < 2; i++) {
        back[i] = malloc(elements * sizeof *raw);
        packed[i] = malloc(kv_page_bytes(shape));
        KV_CHECK(raw != NULL && energy != NULL && back[i] != NULL && packed[i] != NULL);
        memset(packed[i], 0xa5 + i, kv_page_bytes(shape)); /* every byte must be written */
    }
    case_page(check, dice, dice_below(dice, 15), raw);
    const float *used = draw_energy(dice, shape, energy);

    lab_quantize(&pair->truth, shape, raw, used, packed[0]);
    lab_quantize(&pair->tested, shape, raw, used, packed[1]);
    compare_packed(pair, check, packed[0], packed[1]);

    bool either = shape->dtype == KV_DTYPE_BF16 && shape->codec.kind != KV_CODEC_RAW;
    for (int finer = 0; finer <= either; finer++) {
        enum kv_dtype dtype = finer ? KV_DTYPE_F16 : (enum kv_dtype)shape->dtype;
        lab_dequantize(&pair->truth, shape, packed[0], dtype, back[0]);
        lab_dequantize(&pair->tested, shape, packed[0], dtype, back[1]);
        compare_elements(pair, check, finer ? "dequantize to f16" : "dequantize", back[0], back[1],
                         elements);
    }

    for (int i = 0; i < 2; i++) {
        free(back[i]);
        free(packed[i]);
    }
    free(raw);
    free(energy);
}

/* ---- ingest and emit ------------------------------------------------------------------------ */

/* Any bit pattern now and then, so that NaN, Inf and elements above the limit occur. */
static void draw_rows(struct dice *dice, enum kv_dtype dtype, uint32_t wild, size_t count,
                      void *rows) {
    for (size_t i = 0; i < count; i++) {
        bool bits = wild != 0 && dice_below(dice, wild) == 0;
        float value = dice_normal(dice) * (dice_below(dice, 16) == 0 ? 1e-6f : 3.0f);
        if (dtype == KV_DTYPE_F32)
            ((float *)rows)[i] = bits ? kv_f32_of_bits((uint32_t)dice_bits(dice)) : value;
        else
            ((uint16_t *)rows)[i] = bits ? (uint16_t)dice_bits(dice)
                                         : kv_element_saturated(value, (uint8_t)dtype);
    }
}

struct rows {
    enum kv_dtype dtype;
    uint32_t token;
    uint32_t tokens;
    size_t bytes; /* of keys, and of values */
    void *keys;
    void *values;
};

static uint32_t run_ingest(struct lab *lab, const struct kv_shape *shape, const struct rows *rows,
                           uint16_t *page) {
    struct lab before = *lab;
    uint32_t *fault = lab_pinned(lab, sizeof *fault);
    *fault = 0;
    struct kv_ingest item = {
        .keys = lab_put(lab, rows->keys, rows->bytes),
        .values = lab_put(lab, rows->values, rows->bytes),
        .dtype = rows->dtype,
        .token = rows->token,
        .tokens = rows->tokens,
        .page = lab_put(lab, page, kv_shape_bytes_raw(shape)),
        .fault = fault,
    };
    kv_kernel_ingest(lab->stream, shape, 1, &item);
    lab_wait(lab);
    uint32_t found = *fault;
    lab_get(lab, page, item.page, kv_shape_bytes_raw(shape));
    *lab = before;
    return found;
}

static void run_emit(struct lab *lab, const struct kv_shape *shape, const uint16_t *page,
                     struct rows *rows) {
    struct lab before = *lab;
    struct kv_emit item = {
        .page = lab_put(lab, page, kv_shape_bytes_raw(shape)),
        .token = rows->token,
        .tokens = rows->tokens,
        .dtype = rows->dtype,
        .keys = lab_device(lab, rows->bytes),
        .values = lab_device(lab, rows->bytes),
    };
    kv_kernel_emit(lab->stream, shape, 1, &item);
    lab_wait(lab);
    lab_get(lab, rows->keys, item.keys, rows->bytes);
    lab_get(lab, rows->values, item.values, rows->bytes);
    *lab = before;
}

/* The rows again, out of the page they went into, as `dtype`. */
static void check_emit(struct bench_pair *pair, const struct check_case *check,
                       const uint16_t *page, struct rows rows, enum kv_dtype dtype) {
    struct rows out[2];
    rows.bytes = rows.bytes / kv_dtype_bytes(rows.dtype) * kv_dtype_bytes(dtype);
    rows.dtype = dtype;
    for (int i = 0; i < 2; i++) {
        out[i] = rows;
        out[i].keys = malloc(rows.bytes);
        out[i].values = malloc(rows.bytes);
        KV_CHECK(out[i].keys != NULL && out[i].values != NULL);
        run_emit(i == 0 ? &pair->truth : &pair->tested, &check->shape, page, &out[i]);
    }
    compare_elements(pair, check, "emit keys", out[0].keys, out[1].keys, rows.bytes / 2);
    compare_elements(pair, check, "emit values", out[0].values, out[1].values, rows.bytes / 2);
    for (int i = 0; i < 2; i++) {
        free(out[i].keys);
        free(out[i].values);
    }
}

static struct rows rows_draw(struct dice *dice, const struct kv_shape *shape) {
    struct rows rows = {.dtype = (enum kv_dtype)shape->dtype};
    if (shape->dtype == KV_DTYPE_F16 && dice_bits(dice) & 1) rows.dtype = KV_DTYPE_F32;
    rows.token = dice_below(dice, T);
    rows.tokens = 1 + dice_below(dice, T - rows.token);
    size_t count = (size_t)rows.tokens * shape->heads * shape->head_dim;
    rows.bytes = count * kv_dtype_bytes(rows.dtype);
    rows.keys = malloc(rows.bytes);
    rows.values = malloc(rows.bytes);
    KV_CHECK(rows.keys != NULL && rows.values != NULL);
    uint32_t wild = dice_below(dice, 2) ? 0 : 1 + dice_below(dice, 20000);
    draw_rows(dice, rows.dtype, wild, count, rows.keys);
    draw_rows(dice, rows.dtype, wild, count, rows.values);
    return rows;
}

static void check_rows(struct bench_pair *pair, const struct check_case *check,
                       struct dice *dice) {
    const struct kv_shape *shape = &check->shape;
    size_t elements = 2 * kv_shape_elements(shape);
    struct rows rows = rows_draw(dice, shape);
    uint16_t *page[2];
    uint32_t fault[2];
    for (int i = 0; i < 2; i++) {
        page[i] = malloc(elements * sizeof *page[i]);
        KV_CHECK(page[i] != NULL);
        memset(page[i], 0x3c, elements * sizeof *page[i]); /* finite, and must stay outside the rows */
        fault[i] = run_ingest(i == 0 ? &pair->truth : &pair->tested, shape, &rows, page[i]);
    }
    if (fault[0] != fault[1]) {
        char what[100];
        snprintf(what, sizeof what, "ingest: fault %u for %u", fault[1], fault[0]);
        case_fail(pair, check, what);
    }
    if (fault[0] == 0) {
        compare_elements(pair, check, "ingest", page[0], page[1], elements);
        check_emit(pair, check, page[0], rows, rows.dtype);
        if (rows.dtype != KV_DTYPE_F32) check_emit(pair, check, page[0], rows, KV_DTYPE_F32);
    }
    for (int i = 0; i < 2; i++) free(page[i]);
    free(rows.keys);
    free(rows.values);
}

/* ---- observe ---------------------------------------------------------------------------------- */

static void run_observe(struct lab *lab, const struct kv_shape *shape,
                        const struct kv_observe *host) {
    struct lab before = *lab;
    size_t count = (size_t)shape->heads * shape->head_dim;
    struct kv_observe item = *host;
    item.query = lab_put(lab, host->query,
                         (size_t)host->rows * host->heads_q * shape->head_dim *
                             kv_dtype_bytes(host->dtype));
    item.energy = lab_pinned(lab, count * sizeof(float));
    item.rows_seen = lab_pinned(lab, sizeof(uint32_t));
    memcpy(item.energy, host->energy, count * sizeof(float));
    *item.rows_seen = *host->rows_seen;
    kv_kernel_observe(lab->stream, shape, 1, &item);
    lab_wait(lab);
    memcpy(host->energy, item.energy, count * sizeof(float));
    *host->rows_seen = *item.rows_seen;
    *lab = before;
}

static void check_observe(struct bench_pair *pair, const struct check_case *check,
                          struct dice *dice) {
    static const enum kv_dtype dtypes[] = {KV_DTYPE_F16, KV_DTYPE_BF16, KV_DTYPE_F32};
    const struct kv_shape *shape = &check->shape;
    size_t count = (size_t)shape->heads * shape->head_dim;
    struct kv_observe item = {
        .dtype = dtypes[dice_below(dice, 3)],
        .heads_q = shape->heads * (1 + dice_below(dice, KV_GROUP_HEADS_MAX)),
        .rows = 1 + dice_below(dice, 8),
    };
    size_t elements = (size_t)item.rows * item.heads_q * shape->head_dim;
    void *query = malloc(elements * 4);
    float *energy[2] = {malloc(count * 4), malloc(count * 4)};
    uint32_t first_seen = dice_below(dice, 3) * 20, seen[2];
    KV_CHECK(query != NULL && energy[0] != NULL && energy[1] != NULL);
    draw_rows(dice, item.dtype, dice_below(dice, 3) == 0 ? 2000 : 0, elements, query);
    for (size_t i = 0; i < count; i++) energy[0][i] = energy[1][i] = dice_uniform(dice) * 10;
    for (int i = 0; i < 2; i++) {
        item.query = query;
        item.energy = energy[i];
        seen[i] = first_seen;
        item.rows_seen = &seen[i];
        run_observe(i == 0 ? &pair->truth : &pair->tested, shape, &item);
    }
    bool same = seen[0] == seen[1];
    for (size_t i = 0; i < count; i++)
        same &= fabsf(energy[0][i] - energy[1][i]) <= 1e-5f * fabsf(energy[0][i]);
    if (!same) case_fail(pair, check, "observe: energies or counts differ");
    free(query);
    free(energy[0]);
    free(energy[1]);
}

void check_pages(struct bench_pair *pair, const struct check_case *check) {
    struct dice dice = {check->seed};
    check_quantize(pair, check, &dice);
    check_rows(pair, check, &dice);
    check_observe(pair, check, &dice);
}
