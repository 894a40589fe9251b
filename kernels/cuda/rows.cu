/* SPDX-License-Identifier: Apache-2.0 */
/* rows.cu - between the wire's token-major rows and raw pages: ingest, emit; and observe. */
#include "kernels/cuda/cuda.h"
#include "kernels/cuda/page.cuh"

#include <algorithm>
#include <cfloat>

namespace {

enum { THREADS = 256, BLOCKS_MAX = 64 };
constexpr uint32_t NO_FAULT = 0xffffffffu;

struct rows_shape {
    uint32_t heads, head_dim, bf16;
    float limit;
};

rows_shape rows_shape_of(const struct kv_shape *shape) {
    rows_shape out = {shape->heads, shape->head_dim, shape->dtype == KV_DTYPE_BF16,
                      shape->codec.kind == KV_CODEC_RAW ? FLT_MAX : 65504.0f};
    return out;
}

/* Element of a raw page where element i of a token-major row block lies, K or V. */
KV_DEVICE size_t raw_index(const rows_shape &shape, uint32_t token, uint32_t i, bool values) {
    const uint32_t D = shape.head_dim, c = i % D, head = i / D % shape.heads, t = i / D / shape.heads;
    return ((size_t)(values * shape.heads + head) * T + token + t) * D + c;
}

/* Grid (blocks, items).  The last block of an item to finish writes its fault, so that the
 * pinned word is written once, or never. */
__global__ void __launch_bounds__(THREADS) ingest(const struct kv_ingest *items, rows_shape shape, uint32_t *faults) {
    const struct kv_ingest item = items[blockIdx.y];
    const uint32_t count = item.tokens * shape.heads * shape.head_dim;
    uint16_t *page = (uint16_t *)item.page;
    uint32_t least = NO_FAULT;
    for (uint32_t n = blockIdx.x * THREADS + threadIdx.x; n < 2 * count; n += gridDim.x * THREADS) {
        const bool values = n >= count;
        const uint32_t i = values ? n - count : n;
        const void *source = values ? item.values : item.keys;
        uint16_t element;
        if (item.dtype == KV_DTYPE_F32)
            element = __half_as_ushort(__float2half_rn(((const float *)source)[i]));
        else
            element = ((const uint16_t *)source)[i];
        page[raw_index(shape, item.token, i, values)] = element;
        /* A NaN compares false with everything. */
        if (!(fabsf(f32_of_element(element, shape.bf16)) <= shape.limit)) least = min(least, 1 + n);
    }
    least = __reduce_min_sync(0xffffffffu, least);
    uint32_t *slot = faults + 2 * blockIdx.y;
    if (threadIdx.x % 32 == 0 && least != NO_FAULT) atomicMax(&slot[0], NO_FAULT - least);
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0 && atomicAdd(&slot[1], 1) == gridDim.x - 1) {
        __threadfence();
        const uint32_t found = atomicExch(&slot[0], 0);
        slot[1] = 0;
        if (found != 0) *item.fault = NO_FAULT - found;
    }
}

__global__ void __launch_bounds__(THREADS) emit(const struct kv_emit *items, rows_shape shape) {
    const struct kv_emit item = items[blockIdx.y];
    const uint32_t count = item.tokens * shape.heads * shape.head_dim;
    const uint16_t *page = (const uint16_t *)item.page;
    for (uint32_t n = blockIdx.x * THREADS + threadIdx.x; n < 2 * count; n += gridDim.x * THREADS) {
        const bool values = n >= count;
        const uint32_t i = values ? n - count : n;
        const uint16_t element = page[raw_index(shape, item.token, i, values)];
        void *target = values ? item.values : item.keys;
        if (item.dtype == KV_DTYPE_F32)
            ((float *)target)[i] = f32_of_element(element, shape.bf16);
        else
            ((uint16_t *)target)[i] = element;
    }
}

KV_DEVICE float query_at(const struct kv_observe &item, size_t i) {
    if (item.dtype == KV_DTYPE_F32) return ((const float *)item.query)[i];
    return f32_of_element(((const uint16_t *)item.query)[i], item.dtype == KV_DTYPE_BF16);
}

/* One block an item: first which rows are finite, then a thread per KV head and channel, in
 * the order of kernel.h. */
__global__ void __launch_bounds__(THREADS) observe(const struct kv_observe *items, rows_shape shape) {
    const struct kv_observe item = items[blockIdx.x];
    __shared__ uint32_t bad[KV_ROWS_MAX];
    const uint32_t D = shape.head_dim, row = item.heads_q * D, group = item.heads_q / shape.heads;
    for (uint32_t r = threadIdx.x; r < item.rows; r += THREADS) bad[r] = 0;
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < item.rows * row; i += THREADS)
        if (!(fabsf(query_at(item, i)) <= FLT_MAX)) bad[i / row] = 1;
    __syncthreads();
    uint32_t rows = 0;
    for (uint32_t r = 0; r < item.rows; r++) rows += !bad[r];
    const uint32_t seen = *item.rows_seen;
    __syncthreads(); /* all have read it */
    if (rows == 0) return;
    const bool plain = seen == 0 || (uint64_t)seen + rows < 33;
    const float keep = plain ? __fdiv_rn((float)seen, (float)(seen + rows)) : powf(0.9f, (float)rows / 32.0f);
    for (uint32_t i = threadIdx.x; i < shape.heads * D; i += THREADS) {
        float sum = 0;
        for (uint32_t r = 0; r < item.rows; r++)
            for (uint32_t h = 0; h < group && !bad[r]; h++) {
                const float q = query_at(item, (size_t)r * row + (i / D * group + h) * D + i % D);
                sum = __fadd_rn(sum, __fmul_rn(q, q));
            }
        const float mean = __fdiv_rn(sum, (float)(rows * group));
        const float old = seen == 0 ? 0 : item.energy[i];
        const float energy = __fadd_rn(__fmul_rn(keep, old), __fmul_rn(__fsub_rn(1.0f, keep), mean));
        item.energy[i] = energy < KV_ENERGY_MAX ? energy : KV_ENERGY_MAX;
    }
    if (threadIdx.x == 0) *item.rows_seen = seen > UINT32_MAX - rows ? UINT32_MAX : seen + rows;
}

template <class Item> const Item *upload_items(struct cuda_stream *stream, uint32_t count, const Item *items) {
    struct cuda_upload upload = cuda_upload_reserve(stream, count * sizeof *items);
    memcpy(upload.host, items, count * sizeof *items);
    cuda_upload_send(stream, upload, count * sizeof *items);
    return (const Item *)upload.device;
}

template <class Item> uint32_t blocks_for(const struct kv_shape *shape, uint32_t count, const Item *items) {
    uint32_t tokens = 1;
    for (uint32_t i = 0; i < count; i++) tokens = std::max(tokens, items[i].tokens);
    const uint32_t elements = 2 * tokens * shape->heads * shape->head_dim;
    return std::min<uint32_t>(BLOCKS_MAX, (elements + 4 * THREADS - 1) / (4 * THREADS));
}

} // namespace

void cuda_ingest(struct kv_stream *base, const struct kv_shape *shape, uint32_t count, const struct kv_ingest *items) {
    struct cuda_stream *stream = (struct cuda_stream *)base;
    const dim3 grid(blocks_for(shape, count, items), count);
    ingest<<<grid, THREADS, 0, stream->queue>>>(upload_items(stream, count, items), rows_shape_of(shape), stream->faults);
    cuda_ok(stream->device, cudaGetLastError());
}

void cuda_emit(struct kv_stream *base, const struct kv_shape *shape, uint32_t count, const struct kv_emit *items) {
    struct cuda_stream *stream = (struct cuda_stream *)base;
    const dim3 grid(blocks_for(shape, count, items), count);
    emit<<<grid, THREADS, 0, stream->queue>>>(upload_items(stream, count, items), rows_shape_of(shape));
    cuda_ok(stream->device, cudaGetLastError());
}

void cuda_observe(struct kv_stream *base, const struct kv_shape *shape, uint32_t count, const struct kv_observe *items) {
    struct cuda_stream *stream = (struct cuda_stream *)base;
    observe<<<count, THREADS, 0, stream->queue>>>(upload_items(stream, count, items), rows_shape_of(shape));
    cuda_ok(stream->device, cudaGetLastError());
}
