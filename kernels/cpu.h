/* SPDX-License-Identifier: Apache-2.0 */
/* cpu.h - what one CPU instruction set provides.  Private to kernels/.
 *
 * One table per file: cpu_scalar.c (the definition), cpu_avx2.c, cpu_avx512.c, cpu_amx.c.  An entry
 * works on one KV head and knows nothing of threads, queues or whole pages: cpu_pool.c cuts
 * operations into such tasks, runs them on its workers and joins the parts.
 *
 * Threads.  Any; a call touches only what it is given.
 * Memory.   Nothing allocates.  `scratch` is the worker's own, 64-byte aligned, KV_CPU_SCRATCH
 *           bytes, contents undefined between calls.
 */
#ifndef KV_KERNELS_CPU_H
#define KV_KERNELS_CPU_H

#include "kernels/kernel.h"

enum { KV_CPU_SCRATCH = 4 << 20 };

/* Attention of the query rows of one KV head's group over a run of pages.  A query vector
 * i = row * group + head_in_group; n = rows * group. */
struct kv_cpu_attend {
    const struct kv_shape *shape;
    const struct kv_page_map *map;   /* of the packed record; unused when every page is raw */
    uint32_t head;                   /* which KV head of the pages */
    uint32_t group;                  /* query heads per KV head: 1 .. KV_GROUP_HEADS_MAX */
    uint32_t rows;                   /* 1 .. KV_ROWS_MAX */
    const float *query;              /* [n][head_dim], already times score_scale; 64-byte aligned */
    const struct kv_page_ref *pages;
    uint32_t page_count;
    uint32_t token;                  /* number of pages[0]'s first token in the whole context */
    const uint32_t *visible;         /* [rows], in tokens of the whole context */
    float *out;                      /* [n][head_dim], normalised; 0 where nothing is visible */
    float *lse;                      /* [n], natural log; -inf where nothing is visible */
    const atomic_bool *cancel;       /* may be NULL; looked at once per page */
    void *scratch;
};

struct kv_cpu_isa {
    const char *name;
    uint32_t lanes; /* binary32 numbers an instruction works on; 1: scalar */
    bool (*available)(void);

    /* keys, values: [128][head_dim] 16-bit elements of shape->dtype.  energy: [head_dim] or
     * NULL.  record: map->record_bytes, every byte is written.  Codec is not RAW. */
    void (*quantize)(const struct kv_shape *shape, const struct kv_page_map *map,
                     const uint16_t *keys, const uint16_t *values, const float *energy,
                     uint8_t *record, void *scratch);

    /* keys, values: likewise, but of dtype. */
    void (*dequantize)(const struct kv_shape *shape, const struct kv_page_map *map,
                       const uint8_t *record, enum kv_dtype dtype, uint16_t *keys,
                       uint16_t *values, void *scratch);

    void (*attend)(const struct kv_cpu_attend *task);

    /* count elements of `from` -> 16-bit elements of `to` (F32 -> F16, or the same dtype).
     * Returns the index of the first that is not finite or above `limit` in magnitude after
     * conversion, or count.  source begins at any byte. */
    size_t (*convert)(const void *source, enum kv_dtype from, enum kv_dtype to, float limit,
                      uint16_t *target, size_t count);

    /* The same for a target that nobody reads soon: it is written past the caches where it can be.
     * Other threads see it after kv_cpu_away_done(). */
    size_t (*convert_away)(const void *source, enum kv_dtype from, enum kv_dtype to, float limit,
                           uint16_t *target, size_t count);

    /* 16-bit elements -> binary32, times factor. */
    void (*widen)(const void *source, enum kv_dtype from, float factor, float *target,
                  size_t count);
};

static inline void kv_cpu_away_done(void) {
#if defined(__x86_64__)
    __builtin_ia32_sfence();
#endif
}

/* The fastest table this machine has ("auto") or the one of that name; NULL: no such table
 * was built.  The caller asks available() before using one by name. */
const struct kv_cpu_isa *kv_cpu_isa_find(const char *name);

extern const struct kv_cpu_isa kv_cpu_scalar;
extern const struct kv_cpu_isa kv_cpu_avx2;
extern const struct kv_cpu_isa kv_cpu_avx512;
extern const struct kv_cpu_isa kv_cpu_amx; /* AVX-512, attention on tiles */

#endif
