/* SPDX-License-Identifier: Apache-2.0 */
/* kvfile.c - which tensors of a file are a text's cache, and whether they fit together. */
#include "clients/cli/kvfile.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static uint32_t dtype_number(const char *dtype) {
    if (strcmp(dtype, "F16") == 0) return KIVI_F16;
    if (strcmp(dtype, "BF16") == 0) return KIVI_BF16;
    if (strcmp(dtype, "F32") == 0) return KIVI_F32;
    return 0;
}

/* L of "k.L"; false for any other name. */
static bool key_number(const char *name, uint32_t *number) {
    char end;
    unsigned value;
    if (strncmp(name, "k.", 2) != 0 || sscanf(name + 2, "%9u%c", &value, &end) != 1) return false;
    char again[16];
    snprintf(again, sizeof again, "k.%u", value);
    *number = value;
    return strcmp(again, name) == 0;
}

static int number_compare(const void *a, const void *b) {
    uint32_t left = *(const uint32_t *)a, right = *(const uint32_t *)b;
    return left < right ? -1 : left > right;
}

static const struct st_tensor *tensor_of_layer(const struct kvfile *kv, const char *stem,
                                               uint32_t number) {
    char name[32];
    snprintf(name, sizeof name, "%s.%u", stem, number);
    return st_find(kv->file, name);
}

static bool layers_find(struct kvfile *kv, char *why) {
    for (size_t i = 0; i < st_count(kv->file); i++) {
        uint32_t number;
        if (!key_number(st_at(kv->file, i)->name, &number)) continue;
        if (kv->layers == KVFILE_LAYERS_MAX) {
            snprintf(why, ST_WHY_BYTES, "more than %d layers", KVFILE_LAYERS_MAX);
            return false;
        }
        kv->numbers[kv->layers++] = number;
    }
    if (kv->layers == 0) {
        snprintf(why, ST_WHY_BYTES, "no tensor is called k.0, k.1, ...");
        return false;
    }
    qsort(kv->numbers, kv->layers, sizeof *kv->numbers, number_compare);
    for (uint32_t i = 0; i < kv->layers; i++) {
        kv->k[i] = tensor_of_layer(kv, "k", kv->numbers[i]);
        kv->v[i] = tensor_of_layer(kv, "v", kv->numbers[i]);
        kv->q[i] = tensor_of_layer(kv, "q", kv->numbers[i]);
        kv->energy[i] = tensor_of_layer(kv, "q_energy", kv->numbers[i]);
    }
    return true;
}

static bool shape_is(const struct st_tensor *tensor, uint64_t a, uint64_t b, uint64_t c) {
    return tensor && tensor->rank == 3 && tensor->shape[0] == a && tensor->shape[1] == b &&
           tensor->shape[2] == c;
}

/* All layers alike. */
static bool layers_check(struct kvfile *kv, char *why) {
    const struct st_tensor *first = kv->k[0];
    kv->dtype = dtype_number(first->dtype);
    if (first->rank != 3 || first->bytes == 0 || kv->dtype == 0 || first->shape[0] > UINT32_MAX ||
        first->shape[2] > UINT32_MAX) {
        snprintf(why, ST_WHY_BYTES, "'%.80s' is not [heads, tokens, dim] of F16, BF16 or F32",
                 first->name);
        return false;
    }
    kv->kv_heads = (uint32_t)first->shape[0];
    kv->tokens = first->shape[1];
    kv->head_dim = (uint32_t)first->shape[2];
    kv->query_heads = kv->kv_heads;
    if (kv->q[0] && kv->q[0]->rank == 3 && kv->q[0]->shape[0] <= UINT32_MAX) {
        kv->query_heads = (uint32_t)kv->q[0]->shape[0];
        kv->rows = kv->q[0]->shape[1];
    }
    kv->has_energy = true;
    for (uint32_t i = 0; i < kv->layers; i++) {
        const struct st_tensor *k = kv->k[i], *v = kv->v[i], *q = kv->q[i], *e = kv->energy[i];
        bool good = shape_is(k, kv->kv_heads, kv->tokens, kv->head_dim) &&
                    shape_is(v, kv->kv_heads, kv->tokens, kv->head_dim) &&
                    strcmp(k->dtype, first->dtype) == 0 && strcmp(v->dtype, first->dtype) == 0;
        if (kv->rows > 0)
            good = good && shape_is(q, kv->query_heads, kv->rows, kv->head_dim) &&
                   strcmp(q->dtype, first->dtype) == 0;
        if (e)
            good = good && strcmp(e->dtype, "F32") == 0 &&
                   e->bytes == (size_t)kv->kv_heads * kv->head_dim * sizeof(float);
        if (!good) {
            snprintf(why, ST_WHY_BYTES, "layer %u does not have the shape of layer %u",
                     kv->numbers[i], kv->numbers[0]);
            return false;
        }
        if (!e) kv->has_energy = false;
    }
    if (kv->rows <= kv->tokens) return true;
    snprintf(why, ST_WHY_BYTES, "there are more queries than tokens");
    return false;
}

static bool ids_read(struct kvfile *kv, char *why) {
    const struct st_tensor *ids = st_find(kv->file, "token_ids");
    if (!ids) return true;
    bool wide = strcmp(ids->dtype, "I64") == 0;
    bool known = wide || strcmp(ids->dtype, "I32") == 0 || strcmp(ids->dtype, "U32") == 0;
    if (!known || ids->rank != 1 || ids->shape[0] != kv->tokens) {
        snprintf(why, ST_WHY_BYTES, "token_ids is not [tokens] of I32, U32 or I64");
        return false;
    }
    kv->token_ids = calloc(kv->tokens, sizeof *kv->token_ids);
    if (!kv->token_ids) {
        snprintf(why, ST_WHY_BYTES, "out of memory");
        return false;
    }
    /* Little endian: the low half of a wide id is its first four bytes. */
    for (uint64_t i = 0; i < kv->tokens; i++)
        memcpy(&kv->token_ids[i], (const uint8_t *)ids->data + i * ids->element_bytes,
               sizeof(uint32_t));
    return true;
}

bool kvfile_open(struct kvfile *kv, const char *path, char why[ST_WHY_BYTES]) {
    memset(kv, 0, sizeof *kv);
    kv->file = st_open(path, why);
    return kv->file && layers_find(kv, why) && layers_check(kv, why) && ids_read(kv, why);
}

void kvfile_close(struct kvfile *kv) {
    st_close(kv->file);
    free(kv->token_ids);
    memset(kv, 0, sizeof *kv);
}

struct kivi_layout kvfile_layout(const struct kvfile *kv) {
    struct kivi_layout layout;
    memset(&layout, 0, sizeof layout);
    layout.layers = kv->layers;
    layout.kv_heads = kv->kv_heads;
    layout.query_heads = kv->query_heads;
    layout.head_dim = kv->head_dim;
    layout.dtype = kv->dtype;
    return layout;
}

void kvfile_turn(const struct kvfile *kv, const struct st_tensor *tensor, uint64_t begin,
                 uint64_t count, void *to) {
    uint64_t heads = tensor->shape[0], positions = tensor->shape[1];
    size_t row_bytes = kv->head_dim * tensor->element_bytes;
    for (uint64_t i = 0; i < count; i++)
        for (uint64_t head = 0; head < heads; head++)
            memcpy((uint8_t *)to + (i * heads + head) * row_bytes,
                   (const uint8_t *)tensor->data + (head * positions + begin + i) * row_bytes,
                   row_bytes);
}

void kvfile_energy(const struct kvfile *kv, float *to) {
    size_t bytes = (size_t)kv->kv_heads * kv->head_dim * sizeof(float);
    for (uint32_t i = 0; i < kv->layers; i++)
        memcpy((uint8_t *)to + i * bytes, kv->energy[i]->data, bytes);
}
