/* SPDX-License-Identifier: Apache-2.0 */
/* dequantize.cu - packed pages back to raw ones: x^ of page.h in binary32, rounded.
 *
 * A block of threads makes keys or values of one KV head out of the packed part, which lies
 * in shared memory.  Bound by what is written, so the work per element counts:
 *
 *   keys     a thread owns two neighbouring channels of one row in every token tile: the row's
 *            eight codes of a channel are 8 w bits that stand together (page.h), taken off
 *            one after the other.  A warp writes 128 bytes of a token at a time.
 *   values   a lane owns 64 channels (D = 96: 32) of one token, which is what the rotation
 *            wants; rows go out through shared memory, 16 bytes a lane, side by side.
 */
#include <algorithm>

#include "kernels/cuda/cuda.h"
#include "kernels/cuda/page.cuh"

namespace {

enum kind { PLAIN, ROTATED, MINMAX };

struct dequantize_call {
    page_shape shape;
    struct kv_dequantize items[KV_ITEMS_MAX];
};

/* How a block of threads divides a half page of one head. */
template <int D> struct division {
    static constexpr int PAIRS = D / 2;
    static constexpr int ROW_SETS = D == 256 ? 2 : 4; /* of the 16 rows of a key tile */
    static constexpr int THREADS = PAIRS * ROW_SETS;
    static constexpr int ROWS = 16 / ROW_SETS;
    static constexpr int CHANNELS = D == 96 ? 32 : 64; /* of a token that a lane has */
    static constexpr int LANES = D / CHANNELS;         /* that share a token */
    static constexpr bool SPREAD = D != 96;            /* those lanes are neighbours */
    static constexpr int TOKENS = SPREAD ? 32 / LANES : 32; /* of a warp at a time */
    static constexpr int ROW_BYTES = SPREAD ? 2 * D : 2 * CHANNELS;
    static constexpr int STAGED_ROW = ROW_BYTES + 16; /* keeps banks apart */
    static constexpr int STAGED_BYTES = TOKENS * STAGED_ROW * (THREADS / 32);
    static constexpr int PASSES = T * LANES / 32;
};

/* A code, 0 .. 15, as a float. */
KV_DEVICE float float_of_code(uint32_t bits, uint32_t mask) {
    return __fadd_rn(__uint_as_float((bits & mask) | 0x4b000000u), -8388608.0f);
}

/* Two elements of the type asked for, rounded and kept finite. */
KV_DEVICE uint32_t elements_saturated(float low, float high, bool bf16) {
    return bf16 ? saturate_bf16(pack_bf16(low, high)) : saturate_f16(pack_f16(low, high));
}

template <int D, int KIND>
KV_DEVICE void keys(const page_shape &shape, const char *part, uint8_t *slot_of, uint16_t *target, bool to_bf16, int thread) {
    using of = division<D>;
    constexpr int GROUPS = KIND == MINMAX ? 4 : 1; /* of 32 tokens; wider ones repeat */
    const struct kv_page_map &map = shape.map;
    const bool bf16 = shape.bf16;
    const uint32_t header = KIND == MINMAX ? 0 : *(const uint32_t *)part;
    const uint32_t mix = (header & 255) < shape.mix_count ? header & 255 : 0;
    if (KIND != MINMAX) {
        for (int slot = thread; slot < D; slot += of::THREADS) {
            const uint32_t c = ((const uint8_t *)part)[map.key_order + slot];
            slot_of[min(c, (uint32_t)D - 1)] = (uint8_t)slot;
        }
        __syncthreads();
    }
    const int pair = thread % of::PAIRS, set = thread / of::PAIRS;
    uint32_t at[2], stride[2], row_stride[2], width[2];
    float scale[2][GROUPS], zero[2][GROUPS];
#pragma unroll
    for (int e = 0; e < 2; e++) {
        const int c = 2 * pair + e, slot = KIND == MINMAX ? c : min((int)slot_of[c], D - 1);
        const int quarter = slot / (D / 4), in_quarter = slot % (D / 4);
        int k, start;
        chunk_of_slot<D>(in_quarter, k, start);
        const int kk = in_quarter - start;
        uint32_t codes = map.key_codes;
        if (KIND == MINMAX) {
            width[e] = shape.key_bits;
            codes += quarter * 4 * D * shape.key_bits;
#pragma unroll
            for (int g = 0; g < GROUPS; g++) {
                const int index = 32 * g / (int)shape.group * D + c;
                scale[e][g] = f32_of_element(((const uint16_t *)(part + map.key_scale))[index], bf16);
                zero[e][g] = f32_of_element(((const uint16_t *)(part + map.key_zero))[index], bf16);
            }
        } else {
            width[e] = shape.mixes[mix][quarter];
            for (int q = 0; q < quarter; q++) codes += 4 * D * shape.mixes[mix][q];
            const float step = __fdiv_rn(f32_of_f16((uint16_t)(header >> 16)), 448.0f);
            scale[e][0] = __fmul_rn(f32_of_e4m3(((const uint8_t *)part)[map.key_scale + slot]), step);
            zero[e][0] = f32_of_f16(((const uint16_t *)(part + map.key_zero))[slot]);
        }
        at[e] = codes + start * 16 * width[e] + word_of_place(k, 0, kk) * 4 + (kk & 3);
        stride[e] = 16 * k;
        row_stride[e] = 2 * k;
    }
#pragma unroll 1
    for (int i = 0; i < of::ROWS; i++) {
        const int m = set * of::ROWS + i;
        uint32_t bits[2];
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const uint8_t *byte = (const uint8_t *)part + at[e] + (m & 7) * row_stride[e] + (m >> 3) * 4;
            bits[e] = 0;
            if (width[e] >= 1) bits[e] = byte[0];
            if (width[e] >= 2) bits[e] |= (uint32_t)byte[stride[e]] << 8;
            if (width[e] >= 4)
                bits[e] |= (uint32_t)byte[2 * stride[e]] << 16 | (uint32_t)byte[3 * stride[e]] << 24;
        }
        uint32_t *row = (uint32_t *)(target + token_of_row(m) * D) + pair;
#pragma unroll
        for (int tile = 0; tile < 8; tile++) {
            float x[2];
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const int g = KIND == MINMAX ? tile / 2 : 0;
                const float code = float_of_code(bits[e], (1u << width[e]) - 1);
                x[e] = __fadd_rn(__fmul_rn(code, scale[e][g]), zero[e][g]);
                bits[e] >>= width[e];
            }
            row[tile * 16 * (D / 2)] = elements_saturated(x[0], x[1], to_bf16);
        }
    }
}

/* R of page.h on the channels that this lane and its LANES neighbours have of a token. */
template <int D> KV_DEVICE void rotate_shared(float (&y)[division<D>::CHANNELS], int part) {
    constexpr int C = division<D>::CHANNELS, N = D & -D;
#pragma unroll
    for (int stride = 1; stride < C && stride < N; stride *= 2)
#pragma unroll
        for (int c = 0; c < C; c++)
            if ((c & stride) == 0) {
                const float a = y[c], b = y[c + stride];
                y[c] = __fadd_rn(a, b), y[c + stride] = __fsub_rn(a, b);
            }
#pragma unroll
    for (int stride = C; stride < N; stride *= 2)
#pragma unroll
        for (int c = 0; c < C; c++) {
            const float other = __shfl_xor_sync(0xffffffffu, y[c], stride / C);
            y[c] = part & (stride / C) ? __fsub_rn(other, y[c]) : __fadd_rn(y[c], other);
        }
#pragma unroll
    for (int c = 0; c < C; c++) y[c] = __fmul_rn(y[c], rotation_norm<N>());
}

template <int D, int KIND, int W>
KV_DEVICE void values(const page_shape &shape, const char *part, char *staged, uint16_t *target, bool to_bf16, int thread) {
    using of = division<D>;
    constexpr int C = of::CHANNELS, P = 8 / W, TILES = D / 16;
    constexpr int SHARE = P < C / 16 ? P : C / 16; /* tiles of a lane in one unit */
    const struct kv_page_map &map = shape.map;
    const bool bf16 = shape.bf16;
    const int lane = thread & 31, warp = thread >> 5;
    staged += warp * of::TOKENS * of::STAGED_ROW;
    const float step =
        KIND == MINMAX ? 0 : __fdiv_rn(f32_of_f16(((const uint16_t *)(part - 16))[2]), 448.0f);
#pragma unroll 1
    for (int pass = warp; pass < of::PASSES; pass += of::THREADS / 32) {
        const int which = of::SPREAD ? lane % of::LANES : pass % of::LANES;
        const int row = of::SPREAD ? lane / of::LANES : lane;
        const int first = (of::SPREAD ? pass : pass / of::LANES) * of::TOKENS, t = first + row;
        float scale = 0, zero = 0, y[KIND == ROTATED ? C : 1];
        if (KIND != MINMAX) {
            scale = __fmul_rn(f32_of_e4m3(((const uint8_t *)part)[map.value_scale - map.value_mean + t]), step);
            zero = __fmul_rn((float)((const int8_t *)part)[map.value_zero - map.value_mean + t], __fdiv_rn(scale, 4.0f));
        }
        char *out = staged + row * of::STAGED_ROW + (of::SPREAD ? which * 2 * C : 0);
        const char *codes = part + map.value_codes - map.value_mean + ((t >> 2 & 3) * 4 + 2 * (t >> 4 & 1)) * 4;
        const int n0 = TILES * (t >> 5) + which * (C / 16);
#pragma unroll
        for (int run = 0; run < C / 16; run += SHARE) {
            const int n = n0 + run, down = 8 * (t & 3) + W * (n % P);
            uint32_t x[2][8];
#pragma unroll
            for (int g = 0; g < 8; g++) {
                const uint2 v = *(const uint2 *)(codes + (n / P) * 512 + g * 64);
                x[0][g] = v.x >> down, x[1][g] = v.y >> down;
            }
#pragma unroll
            for (int j = 0; j < SHARE; j++) {
                const int tile = run + j, c0 = which * C + 16 * tile;
                if (KIND == MINMAX) {
                    const int index = c0 / (int)shape.group * T + t;
                    scale = f32_of_element(((const uint16_t *)part)[index], bf16);
                    zero = f32_of_element(((const uint16_t *)(part + map.value_zero - map.value_mean))[index], bf16);
                }
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    float z[8];
#pragma unroll
                    for (int g = 0; g < 8; g++)
                        z[g] = __fadd_rn(__fmul_rn(float_of_code(x[r][g] >> (W * j), (1u << W) - 1), scale), zero);
                    if (KIND == ROTATED) {
#pragma unroll
                        for (int g = 0; g < 8; g++) y[KIND == ROTATED ? 16 * tile + 8 * r + g : 0] = z[g];
                        continue;
                    }
                    uint32_t word[4];
                    if (KIND == PLAIN) {
                        const uint4 means = *(const uint4 *)(part + 2 * (c0 + 8 * r));
                        const uint32_t mean[4] = {means.x, means.y, means.z, means.w};
#pragma unroll
                        for (int i = 0; i < 4; i++) {
                            z[2 * i] = __fadd_rn(z[2 * i], low_f16(mean[i]));
                            z[2 * i + 1] = __fadd_rn(z[2 * i + 1], high_f16(mean[i]));
                        }
                    }
#pragma unroll
                    for (int i = 0; i < 4; i++) word[i] = elements_saturated(z[2 * i], z[2 * i + 1], to_bf16);
                    *(uint4 *)(out + 2 * (16 * tile + 8 * r)) = make_uint4(word[0], word[1], word[2], word[3]);
                }
            }
        }
        if constexpr (KIND == ROTATED) {
            rotate_shared<D>(y, which);
#pragma unroll
            for (int i = 0; i < C / 8; i++) {
                const uint4 means = *(const uint4 *)(part + 2 * (which * C + 8 * i));
                const uint32_t mean[4] = {means.x, means.y, means.z, means.w};
                uint32_t word[4];
#pragma unroll
                for (int j = 0; j < 4; j++)
                    word[j] = elements_saturated(__fadd_rn(y[8 * i + 2 * j], low_f16(mean[j])),
                                                 __fadd_rn(y[8 * i + 2 * j + 1], high_f16(mean[j])), to_bf16);
                *(uint4 *)(out + 16 * i) = make_uint4(word[0], word[1], word[2], word[3]);
            }
        }
        __syncwarp();
        constexpr int ACROSS = of::ROW_BYTES / 16;
        char *rows = (char *)(target + first * D) + (of::SPREAD ? 0 : which * 2 * C);
#pragma unroll
        for (int i = 0; i < of::TOKENS * ACROSS / 32; i++) {
            const int at = 32 * i + lane, r = at / ACROSS, c = at % ACROSS * 16;
            *(uint4 *)(rows + r * 2 * D + c) = *(const uint4 *)(staged + r * of::STAGED_ROW + c);
        }
        __syncwarp();
    }
}

/* Grid (heads, items, 2: keys, values).  Shared memory: the part, then staged rows. */
template <int D, int KIND>
__global__ void __launch_bounds__(division<D>::THREADS, KIND == ROTATED ? 2 : 4)
    dequantize(const __grid_constant__ dequantize_call call) {
    extern __shared__ __align__(16) char shared[];
    __shared__ uint8_t slot_of[D];
    const page_shape &shape = call.shape;
    const struct kv_page_map &map = shape.map;
    const int head = blockIdx.x, thread = threadIdx.x;
    const bool second = blockIdx.z, to_bf16 = call.items[blockIdx.y].dtype == KV_DTYPE_BF16;
    const char *record = (const char *)call.items[blockIdx.y].packed + (size_t)head * map.record_bytes;
    uint16_t *target = (uint16_t *)call.items[blockIdx.y].raw + (size_t)(second * shape.heads + head) * T * D;

    /* Values: 16 bytes of the record's header come first, for the scales' factor. */
    const uint32_t first = second ? map.value_mean : 0, last = second ? map.record_bytes : map.value_mean;
    char *part = shared + (second ? 16 : 0);
    launch_next(), wait_previous();
    for (uint32_t i = 16 * thread; i < last - first; i += 16 * division<D>::THREADS)
        *(uint4 *)(part + i) = *(const uint4 *)(record + first + i);
    if (second && thread == 0) *(uint4 *)shared = *(const uint4 *)record;
    __syncthreads();

    if (!second)
        keys<D, KIND>(shape, part, slot_of, target, to_bf16, thread);
    else {
        char *staged = part + ((last - first + 15) & ~15u);
        if (KIND != MINMAX && shape.value_bits == 1) values<D, KIND, 1>(shape, part, staged, target, to_bf16, thread);
        if (shape.value_bits == 2) values<D, KIND, 2>(shape, part, staged, target, to_bf16, thread);
        if (KIND == MINMAX && shape.value_bits == 4) values<D, KIND, 4>(shape, part, staged, target, to_bf16, thread);
    }
}

template <int D, int KIND> bool start_kind(struct cuda_stream *stream, const dequantize_call &call, uint32_t count) {
    const struct kv_page_map &map = call.shape.map;
    const uint32_t keys = map.value_mean, values = map.record_bytes - map.value_mean;
    const uint32_t bytes = std::max(keys, 16 + values + (uint32_t)division<D>::STAGED_BYTES);
    return cuda_launch(stream->device, stream->queue, dequantize<D, KIND>, dim3(call.shape.heads, count, 2),
                       division<D>::THREADS, bytes, call);
}

template <int D> void start(struct cuda_stream *stream, const struct kv_shape *shape, const dequantize_call &call, uint32_t count) {
    if (shape->codec.kind == KV_CODEC_MINMAX)
        start_kind<D, MINMAX>(stream, call, count);
    else if (shape->codec.value_rotated)
        start_kind<D, ROTATED>(stream, call, count);
    else
        start_kind<D, PLAIN>(stream, call, count);
}

template <int D> bool allow() {
    return cuda_allow_shared(dequantize<D, PLAIN>) && cuda_allow_shared(dequantize<D, ROTATED>) &&
           cuda_allow_shared(dequantize<D, MINMAX>);
}

} // namespace

enum kv_status cuda_dequantize_open(void) {
    return allow<64>() && allow<96>() && allow<128>() && allow<256>() ? KV_OK : KV_UNAVAILABLE;
}

void cuda_dequantize(struct kv_stream *base, const struct kv_shape *shape, uint32_t count,
                     const struct kv_dequantize *items) {
    struct cuda_stream *stream = (struct cuda_stream *)base;
    if (shape->codec.kind == KV_CODEC_RAW) {
        for (uint32_t i = 0; i < count; i++)
            cuda_ok(stream->device, cudaMemcpyAsync(items[i].raw, items[i].packed, kv_shape_bytes_raw(shape),
                                                    cudaMemcpyDefault, stream->queue));
        return;
    }
    dequantize_call call = {page_shape_of(shape), {}};
    memcpy(call.items, items, count * sizeof *items);
    switch (shape->head_dim) {
    case 64: start<64>(stream, shape, call, count); break;
    case 96: start<96>(stream, shape, call, count); break;
    case 128: start<128>(stream, shape, call, count); break;
    default: start<256>(stream, shape, call, count); break;
    }
}
