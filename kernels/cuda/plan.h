/* SPDX-License-Identifier: Apache-2.0 */
/* plan.h - how a call of attention becomes a launch.  Apart from the stream, so that tests
 * can look at plans and benchmarks can launch one again and again. */
#ifndef KV_KERNELS_CUDA_PLAN_H
#define KV_KERNELS_CUDA_PLAN_H

#include "kernels/cuda/attend.h"

struct attend_limits {
    uint32_t processors;
    uint32_t shared_max; /* bytes of shared memory a block may have */
    uint32_t slots;      /* blocks that run at once; 0: as the kernel was tuned */
    uint32_t stages;     /* most stages of a warp; 0: as tuned, if they fit */
    size_t parts_max;    /* partial results there is room for */
    float coarse;        /* times as coarse as usual may digits be; 0: 1 */
    const struct attend_kernel *kernel; /* NULL: the one that fits shape and rows */
};

struct attend_launch {
    const struct attend_kernel *kernel;
    struct attend_call call; /* parts and counters are the caller's to fill in */
    uint32_t grid, threads;
    uint32_t shared_bytes;
    size_t upload_bytes; /* that have to be copied from host to device first */
};

/* Writes units and limits of rows at `host`, for kernels that will find them at
 * `device`; both hold what upload_bytes can come to. */
struct attend_launch attend_prepare(const struct attend_limits *limits, const struct kv_shape *shape,
                                    uint32_t count, const struct kv_attend *items, uint8_t *host,
                                    uint8_t *device);

/* Fills in splits and places of items whose units and vector blocks are known; returns the
 * number of blocks. */
uint32_t attend_plan(struct attend_item *items, uint32_t count, uint32_t heads, uint32_t slots,
                     uint32_t warps, size_t parts_max);

/* overlaps: the device can bring the kernel in while the stream's last one still runs. */
cudaError_t attend_start(const struct attend_launch *launch, bool overlaps, cudaStream_t queue);

#endif
