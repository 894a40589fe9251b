/* SPDX-License-Identifier: Apache-2.0 */
/* kernel.h - KIVI arithmetic on device memory.
 *
 * Six verbs.  Each finds its backend through the stream, checks its arguments in one
 * place (kernel.c), and only enqueues: the call returns before the arithmetic has happened.
 *
 *   ingest      token-major rows as they came from the wire  ->  raw pages, checked
 *   emit        raw pages  ->  token-major rows for the wire
 *   quantize    raw page  ->  packed page
 *   dequantize  packed page  ->  raw page
 *   observe     query rows  ->  running query energy
 *   attend      query rows x pages  ->  output and log-sum-exp
 *
 * Memory.  Pages are device or pinned memory; the device reads and writes pinned memory across the bus,
 *          which is right and slow.  The caller owns every buffer and keeps it unchanged until a ticket taken after
 *          the call is reached; the arrays of items themselves are copied before the call
 *          returns, and so are the arrays of page references.  No backend allocates after
 *          kv_stream_open().
 * Threads. The engine thread.  A CPU backend has its own workers below this line.
 * Errors.  None are returned.  A bad argument is a bug of the caller and is checked; what
 *          the data itself can do wrong (NaN, Inf) is reported by ingest through memory;
 *          a device failure is sticky, see kv_device_status().
 * Truth.   cpu_scalar.c defines the answer.  tests/kernel_check holds every other backend
 *          to it: packed pages byte for byte, attention to the bound written there.
 */
#ifndef KV_KERNELS_KERNEL_H
#define KV_KERNELS_KERNEL_H

#ifdef __cplusplus
#include <atomic>
using atomic_bool = std::atomic<bool>;
#else
#include <stdatomic.h>
#endif

#include "kernels/device.h"
#include "kernels/page.h"

#ifdef __cplusplus
extern "C" {
#endif

enum {
    KV_ITEMS_MAX = 64,       /* items of one call */
    KV_ATTEND_PAGES_MAX = 4096, /* page references of one attend call, all items together */
};

/* Token-major rows -> one raw page.
 *
 *   keys, values   device or pinned, [tokens][heads][head_dim] of `dtype`
 *   page           device, raw page; rows token .. token + tokens - 1 of every head are
 *                  written, nothing else is touched
 *   fault          pinned, one word.  Left alone when all is well.  Otherwise set to the
 *                  smallest 1 + element index that is NaN, Inf or (after conversion to the
 *                  page's dtype) of magnitude above `limit`, counting K first: K element
 *                  i -> 1 + i, V element i -> 1 + tokens * heads * head_dim + i.  The page's
 *                  rows are undefined then. */
struct kv_ingest {
    const void *keys;
    const void *values;
    enum kv_dtype dtype; /* F32 goes to F16 pages; F16 and BF16 need the page's own dtype */
    uint32_t token;      /* first row of the page, 0 .. 127 */
    uint32_t tokens;     /* 1 .. 128 - token */
    void *page;
    uint32_t *fault;
    /* Instead of keys and values, which are NULL then: the same bytes, all keys and then all values, in
     * pieces cut anywhere.  Pieces and array stay as they are for as long as buffers do.  Only where
     * kv_device_is_host(). */
    const struct kv_span *pieces;
    uint32_t piece_count;
};
/* limit: 65504, the largest f16, for every codec but RAW; RAW takes any finite element. */
void kv_kernel_ingest(struct kv_stream *stream, const struct kv_shape *shape, uint32_t count,
                      const struct kv_ingest *items);

/* The same for one item whose rows lie in pieces and whose page is not read soon, on the calling thread
 * [any], before it returns: what item->fault would get, or 0 (item->fault is not used).  Only where
 * kv_device_is_host().  scratch: bytes of one token's rows in item->dtype. */
uint32_t kv_kernel_ingest_here(const struct kv_device *device, const struct kv_shape *shape,
                               const struct kv_ingest *item, void *scratch);

/* Raw page -> token-major rows in `dtype`: F32, or the page's own. */
struct kv_emit {
    const void *page;
    uint32_t token;
    uint32_t tokens;
    enum kv_dtype dtype;
    void *keys; /* device or pinned, [tokens][heads][head_dim] */
    void *values;
};
void kv_kernel_emit(struct kv_stream *stream, const struct kv_shape *shape, uint32_t count,
                    const struct kv_emit *items);

/* Raw page (all 128 tokens, all elements within the limit) -> packed page, kv_page_bytes().
 * energy: device or pinned, float [heads][head_dim], 0 .. KV_ENERGY_MAX, or NULL for ones; only
 * UNBIASED reads it.  RAW is a copy. */
struct kv_quantize {
    const void *raw;
    const float *energy;
    void *packed;
};
void kv_kernel_quantize(struct kv_stream *stream, const struct kv_shape *shape, uint32_t count,
                        const struct kv_quantize *items);

/* Packed page -> raw page.  The elements are x^ of page.h in binary32, rounded to `dtype`: the
 * shape's, or F16 where the eight bits of a bf16 shape would be too coarse.  RAW is a copy. */
struct kv_dequantize {
    const void *packed;
    void *raw;
    enum kv_dtype dtype; /* of `raw`: F16, or the shape's; RAW: the shape's */
};
void kv_kernel_dequantize(struct kv_stream *stream, const struct kv_shape *shape, uint32_t count,
                          const struct kv_dequantize *items);

/* Query energy of one layer: a running mean of q^2, as each KV head's channels see it.
 * With m = mean of q[row][head][c]^2 over the n rows and the query heads of the group:
 *   fewer than 33 rows seen so far and now together, or none before:  mean over all rows seen
 *   else  energy = L energy + (1 - L) m,  L = 0.9^(n / 32)
 * so that 32 rows weigh a tenth.  A row with an element that is not finite is left out, of
 * every head and of the count.  The result is at most KV_ENERGY_MAX.  Computed in binary32 in
 * any order: backends agree to 1e-5, not to the bit. */
struct kv_observe {
    const void *query;   /* device or pinned, [rows][heads_q][head_dim] of dtype */
    enum kv_dtype dtype;
    uint32_t heads_q;
    uint32_t rows;       /* 1 .. KV_ROWS_MAX */
    float *energy;       /* pinned, [heads][head_dim] */
    uint32_t *rows_seen; /* pinned */
};
void kv_kernel_observe(struct kv_stream *stream, const struct kv_shape *shape, uint32_t count,
                       const struct kv_observe *items);

/* One page of a context.  Raw pages may be partly filled; packed pages are full. */
struct kv_page_ref {
    const void *page;
    uint16_t tokens; /* 1 .. 128 that exist */
    uint16_t raw;    /* 1: raw page; 0: packed by shape.codec */
};

/* Attention of query rows over a run of pages:
 *
 *   score[r][h][i] = score_scale * q[r][h] . k[h / (heads_q / heads)][i]      i < visible[r]
 *   lse[r][h]      = log sum_i exp(score)                                   natural log
 *   out[r][h]      = sum_i exp(score - lse) v[..][i]
 *
 * RoPE has been applied to query and keys already.  Tokens are counted over the pages in
 * order, from 0; visible[r] says how many row r may see: that is the causal mask, and rows
 * that see nothing give out 0 and lse -inf.
 *
 * merge: out and lse hold the result over other tokens, and this run is merged into it:
 *   m = max(a, b); out = (out_a e^(a-m) + out_b e^(b-m)) / (e^(a-m) + e^(b-m)),
 * and out 0, lse -inf where both are empty.
 *
 * Scores must stay finite in binary32; what one that does not makes of its row is undefined.
 *
 * cancel: when it becomes true the backend may stop at the next page; out and lse are
 * undefined then.  NULL: never. */
struct kv_attend {
    const void *query;  /* device or pinned, [rows][heads_q][head_dim] of dtype */
    enum kv_dtype dtype;
    uint32_t heads_q;   /* a multiple of shape.heads, at most 16 per KV head */
    uint32_t rows;      /* 1 .. KV_ROWS_MAX */
    float score_scale;
    uint32_t page_count; /* 0: the context is empty */
    const struct kv_page_ref *pages; /* host array */
    const uint32_t *visible;         /* host array [rows], copied */
    bool merge;
    float *out; /* device or pinned, [rows][heads_q][head_dim] */
    float *lse; /* device or pinned, [rows][heads_q] */
    const atomic_bool *cancel;
};
void kv_kernel_attend(struct kv_stream *stream, const struct kv_shape *shape, uint32_t count,
                      const struct kv_attend *items);

#ifdef __cplusplus
}
#endif
#endif
