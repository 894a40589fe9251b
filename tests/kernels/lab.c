/* SPDX-License-Identifier: Apache-2.0 */
/* lab.c - see lab.h. */
#include "tests/kernels/lab.h"

#include <math.h>
#include <sched.h>
#include <time.h>

#include "kernels/half.h"
#include "proto/kv_check.h"

bool lab_open(struct lab *lab, const char *name, uint32_t workers) {
    memset(lab, 0, sizeof *lab);
    struct kv_device_options options = {.name = name, .workers = workers};
    enum kv_status status = kv_device_open(&options, &lab->device);
    if (status == KV_NOT_FOUND) return false;
    KV_CHECK(status == KV_OK);
    KV_CHECK(kv_stream_open(lab->device, &lab->stream) == KV_OK);
    for (uint32_t kind = 0; kind < 2; kind++) {
        void *memory;
        KV_CHECK(kv_device_alloc(lab->device, (enum kv_memory)kind, LAB_AREA_BYTES, &memory) ==
                 KV_OK);
        lab->area[kind] = memory;
    }
    return true;
}

void lab_close(struct lab *lab) {
    kv_stream_close(lab->stream);
    for (uint32_t kind = 0; kind < 2; kind++)
        kv_device_free(lab->device, (enum kv_memory)kind, lab->area[kind], LAB_AREA_BYTES);
    kv_device_close(lab->device);
}

void lab_clear(struct lab *lab) {
    lab->used[0] = lab->used[1] = 0;
}

static void *take(struct lab *lab, enum kv_memory kind, size_t bytes) {
    uint8_t *piece = lab->area[kind] + lab->used[kind];
    lab->used[kind] += (bytes + 255) / 256 * 256;
    KV_CHECK(lab->used[kind] <= LAB_AREA_BYTES);
    return piece;
}

void *lab_device(struct lab *lab, size_t bytes) {
    return take(lab, KV_MEMORY_DEVICE, bytes);
}

void *lab_pinned(struct lab *lab, size_t bytes) {
    return take(lab, KV_MEMORY_PINNED, bytes);
}

double lab_seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

void lab_wait(struct lab *lab) {
    uint64_t ticket = kv_stream_mark(lab->stream);
    double limit = lab_seconds() + 60;
    while (!kv_stream_reached(lab->stream, ticket)) {
        KV_CHECK(lab_seconds() < limit);
        sched_yield(); /* to a worker that has this CPU and no other */
    }
    KV_CHECK(kv_device_status(lab->device) == KV_OK);
}

void *lab_put(struct lab *lab, const void *source, size_t bytes) {
    void *piece = lab_device(lab, bytes);
    if (bytes == 0) return piece;
    if (kv_device_is_host(lab->device)) {
        memcpy(piece, source, bytes);
        return piece;
    }
    size_t mark = lab->used[KV_MEMORY_PINNED];
    void *staging = lab_pinned(lab, bytes);
    memcpy(staging, source, bytes);
    kv_stream_copy(lab->stream, piece, staging, bytes);
    lab_wait(lab);
    lab->used[KV_MEMORY_PINNED] = mark;
    return piece;
}

void lab_get(struct lab *lab, void *target, const void *device, size_t bytes) {
    if (bytes == 0) return;
    if (kv_device_is_host(lab->device)) {
        memcpy(target, device, bytes);
        return;
    }
    size_t mark = lab->used[KV_MEMORY_PINNED];
    void *staging = lab_pinned(lab, bytes);
    kv_stream_copy(lab->stream, staging, device, bytes);
    lab_wait(lab);
    memcpy(target, staging, bytes);
    lab->used[KV_MEMORY_PINNED] = mark;
}

void lab_quantize(struct lab *lab, const struct kv_shape *shape, const uint16_t *raw,
                  const float *energy, uint8_t *packed) {
    struct lab before = *lab;
    size_t energy_bytes = (size_t)shape->heads * shape->head_dim * sizeof(float);
    struct kv_quantize item = {
        .raw = lab_put(lab, raw, kv_shape_bytes_raw(shape)),
        .energy = energy == NULL ? NULL : lab_put(lab, energy, energy_bytes),
        .packed = lab_device(lab, kv_page_bytes(shape)),
    };
    kv_kernel_quantize(lab->stream, shape, 1, &item);
    lab_wait(lab);
    lab_get(lab, packed, item.packed, kv_page_bytes(shape));
    *lab = before;
}

void lab_dequantize(struct lab *lab, const struct kv_shape *shape, const uint8_t *packed,
                    enum kv_dtype dtype, uint16_t *raw) {
    struct lab before = *lab;
    struct kv_dequantize item = {
        .packed = lab_put(lab, packed, kv_page_bytes(shape)),
        .raw = lab_device(lab, kv_shape_bytes_raw(shape)),
        .dtype = dtype,
    };
    kv_kernel_dequantize(lab->stream, shape, 1, &item);
    lab_wait(lab);
    lab_get(lab, raw, item.raw, kv_shape_bytes_raw(shape));
    *lab = before;
}

void lab_attend(struct lab *lab, const struct kv_shape *shape, const struct kv_attend *host) {
    struct lab before = *lab;
    struct kv_attend item = *host;
    size_t vectors = (size_t)item.rows * item.heads_q, elements = vectors * shape->head_dim;
    item.query = lab_put(lab, host->query, elements * kv_dtype_bytes(item.dtype));
    item.out = lab_pinned(lab, elements * sizeof(float));
    item.lse = lab_pinned(lab, vectors * sizeof(float));
    memcpy(item.out, host->out, elements * sizeof(float));
    memcpy(item.lse, host->lse, vectors * sizeof(float));

    struct kv_page_ref *pages = calloc(item.page_count + 1, sizeof *pages);
    KV_CHECK(pages != NULL);
    for (uint32_t i = 0; i < item.page_count; i++) {
        pages[i] = host->pages[i];
        size_t bytes = pages[i].raw ? kv_shape_bytes_raw(shape) : kv_page_bytes(shape);
        pages[i].page = lab_put(lab, host->pages[i].page, bytes);
    }
    item.pages = pages;
    kv_kernel_attend(lab->stream, shape, 1, &item);
    free(pages); /* copied by the call */
    lab_wait(lab);
    memcpy(host->out, item.out, elements * sizeof(float));
    memcpy(host->lse, item.lse, vectors * sizeof(float));
    *lab = before;
}

/* ---- numbers --------------------------------------------------------------------------- */

/* SplitMix64: a counter, hashed. */
uint64_t dice_bits(struct dice *dice) {
    uint64_t z = dice->state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

uint32_t dice_below(struct dice *dice, uint32_t limit) {
    return (uint32_t)((dice_bits(dice) >> 32) * limit >> 32);
}

float dice_uniform(struct dice *dice) {
    return (float)(dice_bits(dice) >> 40) * 0x1p-24f;
}

/* Box and Muller's, in binary64 so that libraries' last bits do not reach the result often;
 * nothing depends on them, but a seed should replay. */
float dice_normal(struct dice *dice) {
    double radius = sqrt(-2 * log((double)dice_uniform(dice) + 0x1p-25));
    return (float)(radius * cos(6.283185307179586 * (double)dice_uniform(dice)));
}

static const char *const pattern_names[PATTERN_COUNT] = {
    "normal", "biased",   "constant", "rows",        "zeros",  "subnormal",
    "tiny",   "outliers", "largest",  "alternating", "coarse", "bits",
};

const char *pattern_name(enum pattern pattern) {
    return pattern_names[pattern];
}

struct filling {
    enum pattern pattern;
    struct dice *dice;
    float bias[KV_HEAD_DIM_MAX];
    float spread[KV_HEAD_DIM_MAX];
    float constant;
};

static float filling_value(struct filling *filling, uint32_t t, uint32_t c) {
    struct dice *dice = filling->dice;
    float sign = dice_bits(dice) & 1 ? 1.0f : -1.0f;
    switch (filling->pattern) {
    case PATTERN_BIASED: return filling->bias[c] + filling->spread[c] * dice_normal(dice);
    case PATTERN_CONSTANT: return filling->constant;
    case PATTERN_ROWS: return t < 64 ? filling->bias[c] : filling->bias[t % KV_BLOCK_TOKENS / 8];
    case PATTERN_ZEROS: return sign * 0.0f;
    case PATTERN_SUBNORMAL: return sign * dice_uniform(dice) * 0x1p-14f;
    case PATTERN_TINY: return filling->constant * 1e-7f + 1.2e-8f * dice_uniform(dice);
    case PATTERN_OUTLIERS:
        return dice_normal(dice) * (c % 37 == 5 || t % 61 == 17 ? 1e4f : 1.0f) * 0.5f;
    case PATTERN_LARGEST: return sign * 65280.0f; /* also the largest bf16 within the limit */
    case PATTERN_ALTERNATING: return ((t ^ c) & 1 ? 1.0f : -1.0f) * (1.0f + dice_uniform(dice));
    case PATTERN_COARSE: return (float)dice_below(dice, 5) * 0.25f - 0.5f;
    default: return dice_normal(dice);
    }
}

static uint16_t any_element(struct dice *dice, uint8_t dtype) {
    for (;;) {
        uint16_t element = (uint16_t)dice_bits(dice);
        if (fabsf(kv_f32_of_element(element, dtype)) <= 65504.0f) return element;
    }
}

static uint16_t to_element(float value, uint8_t dtype) {
    uint16_t element = kv_element_saturated(value, dtype);
    KV_CHECK(fabsf(kv_f32_of_element(element, dtype)) <= 65504.0f);
    return element;
}

void pattern_fill(enum pattern pattern, struct dice *dice, const struct kv_shape *shape,
                  uint16_t *half) {
    uint32_t D = shape->head_dim;
    for (uint32_t head = 0; head < shape->heads; head++) {
        struct filling filling = {.pattern = pattern, .dice = dice};
        filling.constant = dice_normal(dice) * 3;
        for (uint32_t c = 0; c < D; c++) {
            filling.bias[c] = dice_normal(dice) * (dice_below(dice, 8) == 0 ? 50.0f : 0.5f);
            filling.spread[c] = expf(dice_normal(dice) * 1.5f);
        }
        for (uint32_t t = 0; t < KV_BLOCK_TOKENS; t++)
            for (uint32_t c = 0; c < D; c++)
                half[((size_t)head * KV_BLOCK_TOKENS + t) * D + c] =
                    pattern == PATTERN_BITS
                        ? any_element(dice, shape->dtype)
                        : to_element(filling_value(&filling, t, c), shape->dtype);
    }
}

/* ---- real KV ----------------------------------------------------------------------------- */

bool fixture_open(struct fixture *fixture, const char *path) {
    memset(fixture, 0, sizeof *fixture);
    FILE *file = fopen(path, "rb");
    if (file == NULL) return false;
    fseek(file, 0, SEEK_END);
    long size = ftell(file);
    rewind(file);
    fixture->bytes = size > 8 ? malloc((size_t)size + 1) : NULL;
    fixture->size = (size_t)size;
    bool read = fixture->bytes != NULL && fread(fixture->bytes, 1, (size_t)size, file) == (size_t)size;
    fclose(file);
    if (read) fixture->bytes[size] = 0;
    if (!read) fixture_close(fixture);
    return read;
}

void fixture_close(struct fixture *fixture) {
    free(fixture->bytes);
    memset(fixture, 0, sizeof *fixture);
}

/* Up to three numbers of a JSON list; how many there were. */
static int numbers_after(const char *text, const char *key, uint64_t out[3]) {
    const char *at = strstr(text, key);
    if (at == NULL || (at = strchr(at, '[')) == NULL) return 0;
    int count = 0;
    while (count < 3 && *at != ']' && *at != 0) {
        char *end;
        out[count++] = strtoull(at + 1, &end, 10);
        at = end;
    }
    return count;
}

bool fixture_find(const struct fixture *fixture, const char *name, struct tensor *out) {
    uint64_t header_bytes;
    memcpy(&header_bytes, fixture->bytes, 8);
    KV_CHECK(header_bytes <= fixture->size - 8);
    char quoted[64];
    snprintf(quoted, sizeof quoted, "\"%s\":", name);
    const char *entry = strstr((const char *)fixture->bytes + 8, quoted);
    if (entry == NULL) return false;

    uint64_t shape[3] = {0}, offsets[3] = {0};
    int dims = numbers_after(entry, "\"shape\"", shape);
    KV_CHECK(dims >= 1 && numbers_after(entry, "\"data_offsets\"", offsets) == 2);
    KV_CHECK(offsets[0] <= offsets[1] && 8 + header_bytes + offsets[1] <= fixture->size);
    const char *dtype = strstr(entry, "\"dtype\"");
    KV_CHECK(dtype != NULL);
    dtype += strlen("\"dtype\"");
    dtype += strspn(dtype, ": \"");
    out->dtype = strncmp(dtype, "BF16", 4) == 0 ? KV_DTYPE_BF16
                 : strncmp(dtype, "F16", 3) == 0 ? KV_DTYPE_F16
                                                 : KV_DTYPE_F32;
    for (int i = 0; i < 3; i++)
        out->shape[i] = i < 3 - dims ? 1 : (uint32_t)shape[i - (3 - dims)];
    out->data = fixture->bytes + 8 + header_bytes + offsets[0];
    return true;
}

const char *fixture_path(const char *name) {
    static char path[512];
    const char *root = getenv("TEST_SRCDIR"), *workspace = getenv("TEST_WORKSPACE");
    if (root != NULL && workspace != NULL)
        snprintf(path, sizeof path, "%s/%s/tests/%s", root, workspace, name);
    else
        snprintf(path, sizeof path, "tests/%s", name);
    return path;
}
