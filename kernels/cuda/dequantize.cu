/* SPDX-License-Identifier: Apache-2.0 */
/* dequantize.cu - packed pages back to raw ones: x^ of page.h in binary32, rounded.
 *
 * A block of threads makes keys or values of one KV head; the packed part lies in shared
 * memory.  A warp writes one token's channels, lane beside lane.
 */
#include "kernels/cuda/cuda.h"
#include "kernels/cuda/page.cuh"

namespace {

enum { THREADS = 256 };

struct dequantize_call {
    page_shape shape;
    const struct kv_dequantize *items;
    uint32_t minmax;
};

/* What a channel of K needs: its quarter's codes, its place there, scale and zero. */
struct key_channel {
    uint32_t codes; /* bytes from the part's start to its quarter */
    int width, slot; /* in the quarter */
    float scale, zero;
};

template <int D> __global__ void __launch_bounds__(THREADS) dequantize(const __grid_constant__ dequantize_call call) {
    extern __shared__ __align__(16) char part[];
    __shared__ key_channel channels[D];
    const page_shape &shape = call.shape;
    const struct kv_page_map &map = shape.map;
    const struct kv_dequantize item = call.items[blockIdx.y];
    const int head = blockIdx.x, thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
    const bool values = blockIdx.z, bf16 = shape.bf16, to_bf16 = item.dtype == KV_DTYPE_BF16;
    const char *record = (const char *)item.packed + (size_t)head * map.record_bytes;
    uint16_t *target = (uint16_t *)item.raw + (size_t)(values * shape.heads + head) * T * D;

    const uint32_t first = values ? map.value_mean : 0, last = values ? map.record_bytes : map.value_mean;
    for (uint32_t i = 16 * thread; i < last - first; i += 16 * THREADS)
        *(uint4 *)(part + i) = *(const uint4 *)(record + first + i);
    const uint32_t header = *(const uint32_t *)record, value_factor = *(const uint16_t *)(record + 4);
    __syncthreads();
    const char *from = part - first;

    if (!values) {
        if (!call.minmax) {
            const uint32_t mix = (header & 255) < shape.mix_count ? header & 255 : 0;
            const float step = __fdiv_rn(f32_of_f16((uint16_t)(header >> 16)), 448.0f);
            for (int slot = thread; slot < D; slot += THREADS) {
                const int quarter = slot / (D / 4);
                key_channel channel;
                channel.codes = map.key_codes;
                for (int q = 0; q < quarter; q++) channel.codes += 4 * D * shape.mixes[mix][q];
                channel.width = shape.mixes[mix][quarter];
                channel.slot = slot % (D / 4);
                channel.scale = __fmul_rn(f32_of_e4m3(((const uint8_t *)from)[map.key_scale + slot]), step);
                channel.zero = f32_of_f16(((const uint16_t *)(from + map.key_zero))[slot]);
                int c = ((const uint8_t *)from)[map.key_order + slot];
                channels[c < D ? c : slot] = channel;
            }
            __syncthreads();
        }
        for (int t = warp; t < T; t += THREADS / 32)
            for (int c = lane; c < D; c += 32) {
                key_channel channel;
                if (call.minmax) {
                    const int index = t / (int)shape.group * D + c;
                    channel.codes = map.key_codes + c / (D / 4) * 4 * D * shape.key_bits;
                    channel.width = shape.key_bits, channel.slot = c % (D / 4);
                    channel.scale = f32_of_element(((const uint16_t *)(from + map.key_scale))[index], bf16);
                    channel.zero = f32_of_element(((const uint16_t *)(from + map.key_zero))[index], bf16);
                } else {
                    channel = channels[c];
                }
                uint32_t code = 0;
                if (channel.width > 0) {
                    int shift;
                    const uint32_t at = channel.codes + key_byte<D>(channel.width, channel.slot, t, shift);
                    code = ((const uint8_t *)from)[at] >> shift & ((1u << channel.width) - 1);
                }
                const float x = __fadd_rn(__fmul_rn((float)code, channel.scale), channel.zero);
                target[t * D + c] = element_saturated(x, to_bf16);
            }
        return;
    }

    const int w = shape.value_bits;
    const uint8_t *codes = (const uint8_t *)from + map.value_codes;
    const float step = call.minmax ? 0 : __fdiv_rn(f32_of_f16((uint16_t)value_factor), 448.0f);
    for (int t = warp; t < T; t += THREADS / 32) {
        float y[D / 32];
#pragma unroll
        for (int e = 0; e < D / 32; e++) {
            const int c = lane + 32 * e;
            int shift;
            const uint32_t at = value_byte<D>(w, t, c, shift);
            const float code = (float)(codes[at] >> shift & ((1u << w) - 1));
            float scale, zero;
            if (call.minmax) {
                const int index = c / (int)shape.group * T + t;
                scale = f32_of_element(((const uint16_t *)(from + map.value_scale))[index], bf16);
                zero = f32_of_element(((const uint16_t *)(from + map.value_zero))[index], bf16);
            } else {
                scale = __fmul_rn(f32_of_e4m3(((const uint8_t *)from)[map.value_scale + t]), step);
                zero = __fmul_rn((float)((const int8_t *)from)[map.value_zero + t], __fdiv_rn(scale, 4.0f));
            }
            y[e] = __fadd_rn(__fmul_rn(code, scale), zero);
        }
        if (shape.rotated) rotate_token<D>(y, lane);
#pragma unroll
        for (int e = 0; e < D / 32; e++) {
            const int c = lane + 32 * e;
            if (!call.minmax) y[e] = __fadd_rn(y[e], f32_of_f16(((const uint16_t *)(from + map.value_mean))[c]));
            target[t * D + c] = element_saturated(y[e], to_bf16);
        }
    }
}

template <int D> cudaError_t start(const dequantize_call &call, uint32_t count, uint32_t bytes, cudaStream_t queue) {
    dequantize<D><<<dim3(call.shape.heads, count, 2), THREADS, bytes, queue>>>(call);
    return cudaGetLastError();
}

} // namespace

void cuda_dequantize(struct kv_stream *base, const struct kv_shape *shape, uint32_t count,
                     const struct kv_dequantize *items) {
    struct cuda_stream *stream = (struct cuda_stream *)base;
    if (shape->codec.kind == KV_CODEC_RAW) {
        for (uint32_t i = 0; i < count; i++)
            cuda_ok(stream->device, cudaMemcpyAsync(items[i].raw, items[i].packed, kv_shape_bytes_raw(shape),
                                                    cudaMemcpyDefault, stream->queue));
        return;
    }
    struct cuda_upload upload = cuda_upload_reserve(stream, count * sizeof *items);
    memcpy(upload.host, items, count * sizeof *items);
    cuda_upload_send(stream, upload, count * sizeof *items);
    dequantize_call call = {page_shape_of(shape), (const struct kv_dequantize *)upload.device,
                            shape->codec.kind == KV_CODEC_MINMAX};
    const struct kv_page_map &map = call.shape.map;
    const uint32_t keys = map.value_mean, values = map.record_bytes - map.value_mean;
    const uint32_t bytes = keys > values ? keys : values;
    cudaError_t error;
    switch (shape->head_dim) {
    case 64: error = start<64>(call, count, bytes, stream->queue); break;
    case 96: error = start<96>(call, count, bytes, stream->queue); break;
    case 128: error = start<128>(call, count, bytes, stream->queue); break;
    default: error = start<256>(call, count, bytes, stream->queue); break;
    }
    cuda_ok(stream->device, error);
}
