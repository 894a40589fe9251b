/* SPDX-License-Identifier: Apache-2.0 */
/* attend.h - what the host tells the attention kernels.  Private to kernels/cuda.
 *
 * A context is cut into *units* of about equal bytes: a packed page of one KV head, or 16
 * tokens of a raw page.  A block of threads takes a run of units of one item, one KV head
 * and one block of query vectors; its warps take single units in turn.
 */
#ifndef KV_KERNELS_CUDA_ATTEND_H
#define KV_KERNELS_CUDA_ATTEND_H

#include "kernels/kernel.h"

#include <cuda_runtime.h>

enum { ATTEND_SLICE = 16 /* tokens of a raw unit */, ATTEND_WARPS_MAX = 16, ATTEND_SPLITS_MAX = 512 };

struct attend_unit {
    const char *page;
    uint32_t token;  /* number of its first token in the context */
    uint16_t tokens; /* that exist */
    uint8_t raw;
    uint8_t slice; /* raw: which 16 tokens of the page */
};
static_assert(sizeof(struct attend_unit) == 16, "loaded as one word");

struct attend_item {
    const void *query;
    float *out;
    float *lse;
    float score_scale; /* times log2 e */
    uint32_t unit_first, unit_count;
    uint32_t block_first; /* of the grid; blocks are [head][vector block][split] */
    uint32_t vector_blocks;
    uint32_t splits;
    uint32_t part_first; /* of the partial results; as block_first, over split items only */
    uint32_t counter_first;
    uint32_t visible_first;
    uint32_t group; /* query heads per KV head */
    uint32_t vectors; /* rows * group */
    uint32_t heads_q;
    uint32_t dtype;
    uint32_t merge;
};

struct attend_call {
    /* In the kernel's arguments: a read of memory less before the first copy starts. */
    struct attend_item items[KV_ITEMS_MAX];
    uint32_t block_first[KV_ITEMS_MAX]; /* of the items, to be searched */
    const struct attend_unit *units;
    const uint32_t *visible;
    float *parts;      /* [part][vector][head_dim + 4]: output, largest, sum, nothing */
    unsigned *counters; /* zero between calls */
    uint32_t item_count;
    uint32_t heads;
    uint32_t raw_value_offset; /* bytes from K to V of a raw page */
    struct kv_page_map map;
    uint32_t mixes[KV_MIX_COUNT_MAX]; /* four widths, a byte each */
    uint32_t mix_count;
    uint32_t key_width_sum;
    uint8_t key_bits, value_bits, group_log, bf16;
    uint32_t stage_bytes;
    uint32_t stages;
    uint32_t ahead; /* while the kernel before still runs, bring the first units into the L2 cache */
    /* Log2 units that the last of two digits may be worth: [mix], MINMAX: [0]. */
    float refine_above[KV_MIX_COUNT_MAX];
};

enum attend_mode { ATTEND_PLAIN, ATTEND_ROTATED, ATTEND_MINMAX };

/* One instance of the kernel and how to launch it, unless the plan knows better: fewer threads
 * always do. */
struct attend_kernel {
    void (*kernel)(struct attend_call);
    uint32_t threads;
    uint32_t blocks_per_sm;
    uint32_t vectors; /* of a vector block */
};

/* [mode][0: 4 vectors, 1: 8 vectors] */
extern const struct attend_kernel attend_kernels_64[3][2];
extern const struct attend_kernel attend_kernels_96[3][2];
extern const struct attend_kernel attend_kernels_128[3][2];
extern const struct attend_kernel attend_kernels_256[3][2];

/* Shared memory of one block, in bytes from its start. */
struct attend_layout {
    uint32_t barriers, query, fragments, fragments_raw, vectors, scratch, scratch_bytes, ring;
    uint32_t bytes;
};

#ifdef __CUDACC__
__host__ __device__
#endif
    static inline struct attend_layout
    attend_layout_of(uint32_t D, bool minmax, uint32_t group_log, uint32_t quads, uint32_t warps,
                  uint32_t stages, uint32_t stage_bytes) {
    struct attend_layout l;
    uint32_t key_groups = minmax ? 128u >> group_log : 1;
    l.barriers = 0;
    l.query = 512;
    l.fragments = l.query + quads * D * 8;
    l.fragments_raw = l.fragments + quads * D * 16;
    l.vectors = l.fragments_raw + quads * D * 16;
    l.scratch = l.vectors + 4 * quads * 8 + 64;
    l.scratch = (l.scratch + 127) & ~127u;
    l.scratch_bytes = key_groups * (quads * D * 8 + D * 2);
    l.ring = (l.scratch + warps * l.scratch_bytes + 127) & ~127u;
    l.bytes = l.ring + warps * stages * stage_bytes;
    uint32_t merge = l.ring + warps * 4 * quads * (D + 4) * 4 * 2 + 1024; /* the epilogue's use */
    uint32_t combine = l.query + 4 * quads * ATTEND_SPLITS_MAX * 4 + warps * 512;
    if (l.bytes < merge) l.bytes = merge;
    if (l.bytes < combine) l.bytes = combine;
    return l;
}

#endif
