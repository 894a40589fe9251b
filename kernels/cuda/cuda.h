/* SPDX-License-Identifier: Apache-2.0 */
/* cuda.h - the CUDA backend's device and stream, for its own files.
 *
 * The CPU side queues kernels and never waits for them: what a kernel has to know that does
 * not fit its arguments (items, page references) is written into a pinned area and copied
 * to a device area in the stream's order.  The areas are rings of segments; a segment is
 * written again when the copies out of it are done.
 */
#ifndef KV_KERNELS_CUDA_CUDA_H
#define KV_KERNELS_CUDA_CUDA_H

#include <pthread.h>

#include <atomic>

#include <cuda_runtime.h>

#include "kernels/backend.h"

enum {
    UPLOAD_SEGMENTS = 4,
    /* The largest call: raw pages only, eight units of 16 bytes each, and the items. */
    UPLOAD_SEGMENT_BYTES = KV_ATTEND_PAGES_MAX * 8 * 16 + (256 << 10),
    TICKETS = 2 * KV_STREAM_DEPTH, /* a notification takes one as well */
    BLOCKS_PER_SM_MAX = 8,
    PART_FLOATS = 8 * (KV_HEAD_DIM_MAX + 4), /* of a block of eight query vectors */
    COUNTERS = 1 << 16,
};

struct cuda_device {
    struct kv_device base;
    char name[16];
    int ordinal;
    uint32_t processors; /* multiprocessors */
    uint32_t shared_max; /* bytes of shared memory a block may have */
    bool overlaps;       /* a kernel may be brought in while the one before it runs */
    std::atomic<bool> failed;
    std::atomic<int> failure; /* the first cudaError_t that was not cudaSuccess */
    pthread_mutex_t lock; /* of the list of allocations */
    struct cuda_memory *memory;
};

/* A notification that waits for its ticket. */
struct cuda_notice {
    uint64_t ticket;
    int eventfd;
};

struct cuda_stream {
    struct kv_stream base;
    struct cuda_device *device;
    cudaStream_t queue;

    cudaEvent_t events[TICKETS]; /* of ticket t: t % TICKETS */
    uint64_t tickets;            /* given out */
    std::atomic<uint64_t> reached;

    uint8_t *upload_host;
    uint8_t *upload_device;
    uint32_t upload_segment;
    size_t upload_used;
    cudaEvent_t upload_done[UPLOAD_SEGMENTS];

    float *parts; /* attend: results of splits */
    size_t parts_max;
    unsigned *counters;
    uint32_t *faults; /* ingest: [item] {smallest, blocks done} */

    pthread_t watcher;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    struct cuda_notice notices[TICKETS];
    uint32_t notice_first, notice_count;
    bool closing;
};

/* Remembers a failure; every CUDA call's answer comes through here. */
bool cuda_ok(struct cuda_device *device, cudaError_t error);

/* Room for `bytes` in the pinned area, and where the device will find it. */
struct cuda_upload {
    void *host;
    void *device;
};
struct cuda_upload cuda_upload_reserve(struct cuda_stream *stream, size_t bytes);
/* Queues the copy of what was reserved last. */
void cuda_upload_send(struct cuda_stream *stream, struct cuda_upload upload, size_t bytes);

/* The verbs, in the files named after them. */
void cuda_ingest(struct kv_stream *, const struct kv_shape *, uint32_t, const struct kv_ingest *);
void cuda_emit(struct kv_stream *, const struct kv_shape *, uint32_t, const struct kv_emit *);
void cuda_quantize(struct kv_stream *, const struct kv_shape *, uint32_t, const struct kv_quantize *);
void cuda_quantize_minmax(struct cuda_stream *, const struct kv_shape *, uint32_t, const struct kv_quantize *);
void cuda_dequantize(struct kv_stream *, const struct kv_shape *, uint32_t,
                     const struct kv_dequantize *);
void cuda_observe(struct kv_stream *, const struct kv_shape *, uint32_t, const struct kv_observe *);
void cuda_attend(struct kv_stream *, const struct kv_shape *, uint32_t, const struct kv_attend *);

/* Loads the attention kernels and lets them have their shared memory. */
enum kv_status cuda_attend_open(struct cuda_device *device);
enum kv_status cuda_quantize_open(void);
enum kv_status cuda_dequantize_open(void);

/* Lets a kernel have more than 48 KB of shared memory: all there is. */
template <class... Parameters> bool cuda_allow_shared(void (*kernel)(Parameters...)) {
    int ordinal, most;
    cudaFuncAttributes own;
    return cudaGetDevice(&ordinal) == cudaSuccess &&
           cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, ordinal) == cudaSuccess &&
           cudaFuncGetAttributes(&own, kernel) == cudaSuccess &&
           cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                most - (int)own.sharedSizeBytes) == cudaSuccess;
}

/* Launches a kernel that begins with launch_next() and wait_previous() (ptx.cuh), so that its
 * start overlaps the end of what the stream does before it. */
template <class... Parameters, class... Arguments>
bool cuda_launch(struct cuda_device *device, cudaStream_t queue, void (*kernel)(Parameters...), dim3 grid,
                 uint32_t threads, uint32_t shared_bytes, const Arguments &...arguments) {
    cudaLaunchAttribute overlap = {};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = threads;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = queue;
    config.attrs = &overlap;
    config.numAttrs = device->overlaps;
    return cuda_ok(device, cudaLaunchKernelEx(&config, kernel, arguments...));
}

#endif
