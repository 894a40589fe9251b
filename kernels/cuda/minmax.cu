/* SPDX-License-Identifier: Apache-2.0 */
/* minmax.cu - raw pages to packed pages under MINMAX codecs, bit for bit as page.h says.
 *
 * Bound by what is read.  A thread holds its group, or its part of it, in registers: one
 * pass over memory, many loads in flight, nothing but codes in shared memory.
 *
 *   keys     a thread owns two neighbouring channels in 64 tokens, 32 at a time
 *   values   a thread owns four tokens and, of four channel tiles (D = 96: two), four
 *            channels: the codes of a byte's positions are its own; four lanes share a group
 *
 * Codes without a division, where elements are f16.  a = r(x - min) and the scale have 11
 * bits, so a / scale is never a number on which r() and rint() turn, and never closer to one
 * than a quarter of what binary32 can tell apart.  Width 2: r(a / scale) rounds to more than k - 1
 * if a lies above one of three multiples of the scale; of those the next smaller f16 does as
 * well.  Width 4: a quotient corrected once.  Both were compared with the division for all
 * 573 million pairs of f16 with a quotient below 17.
 */
#include "kernels/cuda/cuda.h"
#include "kernels/cuda/page.cuh"

namespace {

struct minmax_call {
    page_shape shape;
    struct kv_quantize items[KV_ITEMS_MAX];
};

constexpr uint32_t ALL = 0xffffffffu;

/* ---- pairs of elements of either type ---------------------------------------------------- */

template <bool BF16> struct pair {
    KV_DEVICE static uint32_t least(uint32_t a, uint32_t b) { return BF16 ? min2_bf16(a, b) : min2(a, b); }
    KV_DEVICE static uint32_t most(uint32_t a, uint32_t b) { return BF16 ? max2_bf16(a, b) : max2(a, b); }
    KV_DEVICE static float low(uint32_t a) { return BF16 ? low_bf16(a) : low_f16(a); }
    KV_DEVICE static float high(uint32_t a) { return BF16 ? high_bf16(a) : high_f16(a); }
    KV_DEVICE static uint32_t pack(float a, float b) {
        return BF16 ? saturate_bf16(pack_bf16(a, b)) : saturate_f16(pack_f16(a, b));
    }
    /* -0 becomes +0. */
    KV_DEVICE static uint32_t plus_zero(uint32_t a) { return pack(__fadd_rn(low(a), 0.0f), __fadd_rn(high(a), 0.0f)); }
};

/* The largest f16 that is not above x. */
KV_DEVICE uint32_t f16_down(float x) {
    return __half_as_ushort(__float2half_rd(x));
}

/* How the two elements of a pair, each of its own group, become codes. */
template <int W, bool BF16> struct rule {
    using of = pair<BF16>;
    static constexpr float TOP = (float)((1 << W) - 1);
    uint32_t low, scales;
    uint32_t steps[3];            /* f16, width 2 */
    float scale[2], inverse[2];   /* else */
    bool divide;                  /* bf16 scales whose inverse is out of range */

    KV_DEVICE rule(uint32_t least, uint32_t most) {
        low = of::plus_zero(least);
        const uint32_t high = of::plus_zero(most);
        const uint32_t span = of::pack(__fsub_rn(of::low(high), of::low(low)), __fsub_rn(of::high(high), of::high(low)));
        /* Times the inverse: the same after rounding for every span of either type. */
        scales = of::pack(__fmul_rn(of::low(span), 1.0f / TOP), __fmul_rn(of::high(span), 1.0f / TOP));
        scale[0] = of::low(scales), scale[1] = of::high(scales);
        divide = false;
        if (W == 2 && !BF16) {
            /* What is divided by 0 has code 0: nothing lies above infinity. */
            const float factor[3] = {2049.0f / 4096, 3071.0f / 2048, 2561.0f / 1024};
#pragma unroll
            for (int k = 0; k < 3; k++) {
                const uint32_t a = scale[0] == 0 ? 0x7c00 : f16_down(factor[k] * scale[0]);
                const uint32_t b = scale[1] == 0 ? 0x7c00 : f16_down(factor[k] * scale[1]);
                steps[k] = a | b << 16;
            }
        } else {
#pragma unroll
            for (int e = 0; e < 2; e++) {
                inverse[e] = scale[e] == 0 ? 0 : __frcp_rn(scale[e]);
                if (BF16 && scale[e] != 0 && !(scale[e] > 0x1p-120f && scale[e] < 0x1p120f)) divide = true;
            }
        }
    }

    KV_DEVICE float quotient(float a, int e) const {
        if (BF16 && divide) return scale[e] == 0 ? 0 : __fdiv_rn(a, scale[e]);
        const float q = __fmul_rn(a, inverse[e]);
        return __fmaf_rn(__fmaf_rn(-q, scale[e], a), inverse[e], q);
    }

    /* Adds the codes times `count`, as f16. */
    KV_DEVICE void add_codes(uint32_t &sum, uint32_t x, uint32_t count) const {
        if (W == 2 && !BF16) {
            const uint32_t a = sub2(x, low); /* infinity is above what it would be saturated to, and steps */
#pragma unroll
            for (int k = 0; k < 3; k++) sum = fma2(above2(a, steps[k]), count, sum);
            return;
        }
        const uint32_t a = of::pack(__fsub_rn(of::low(x), of::low(low)), __fsub_rn(of::high(x), of::high(low)));
        uint32_t q = of::pack(quotient(of::low(a), 0), quotient(of::high(a), 1));
        if (BF16) q = pack_f16(of::low(q), of::high(q)); /* what f16 cannot tell is no code's limit */
        constexpr uint32_t ROUND = 0x66006600u, LIMIT = W == 2 ? 0x42004200u : 0x4b804b80u;
        const uint32_t rounded = sub2(min2(q, LIMIT), ROUND | 0x80008000u);
        sum = fma2(sub2(rounded, ROUND), count, sum);
    }
};

/* 2^(W j) as f16, twice. */
template <int W> KV_DEVICE constexpr uint32_t count_of(int j) {
    return (uint32_t)(15 + W * j) << 10 | (uint32_t)(15 + W * j) << 26;
}
/* Integers of f16 pairs into their low bytes. */
KV_DEVICE uint32_t bytes_of(uint32_t pair) {
    return sub2(pair, 0xe400e400u); /* + 1024 */
}

/* ---- keys ---------------------------------------------------------------------------------- */

template <int D> constexpr int THREADS = D; /* two halves of the tokens, D / 2 pairs */

template <int D, int W, bool BF16>
KV_DEVICE void keys(const page_shape &shape, const uint16_t *source, char *staged, int thread) {
    using of = pair<BF16>;
    constexpr int P = 8 / W;
    const struct kv_page_map &map = shape.map;
    const int couple = thread % (D / 2), half = thread / (D / 2), group = (int)shape.group;
    const uint32_t *column = (const uint32_t *)source + couple;
    const int slot = 2 * couple % (D / 4), quarter = 2 * couple / (D / 4);
    int k, start;
    chunk_of_slot<D>(slot, k, start);
    char *out = staged + map.key_codes + quarter * 4 * D * W + start * 16 * W + word_of_place(k, 0, slot - start) * 4 + (slot - start & 3);
    uint32_t sum[16];
#pragma unroll
    for (int run = 0; run < 2; run++) { /* 32 tokens */
        const int first = 64 * half + 32 * run;
        uint32_t x[32];
#pragma unroll
        for (int i = 0; i < 32; i++) x[i] = column[(first + i) * (D / 2)];
        uint32_t least = x[0], most = x[0];
#pragma unroll
        for (int i = 1; i < 32; i++) least = of::least(least, x[i]), most = of::most(most, x[i]);
        if (group > 32) /* the rest of the group; this is its rarer kind */
#pragma unroll 4
            for (int t = first / group * group; t < first / group * group + group; t++) {
                const uint32_t other = column[t * (D / 2)];
                least = of::least(least, other), most = of::most(most, other);
            }
        const rule<W, BF16> rule(least, most);
        if (first % group == 0) {
            ((uint32_t *)(staged + map.key_scale))[first / group * (D / 2) + couple] = rule.scales;
            ((uint32_t *)(staged + map.key_zero))[first / group * (D / 2) + couple] = rule.low;
        }
#pragma unroll
        for (int tile = 0; tile < 2; tile++) {
            const int j = (2 * run + tile) % P;
#pragma unroll
            for (int i = 0; i < 16; i++) {
                if (j == 0) sum[i] = 0;
                rule.add_codes(sum[i], x[16 * tile + i], count_of<W>(j));
            }
        }
        if ((2 * run + 2) % P != 0) continue;
        const int unit = (4 * half + 2 * run) / P;
#pragma unroll
        for (int i = 0; i < 16; i++) {
            const int m = row_of_token(i);
            *(uint16_t *)(out + unit * 16 * k + (m & 7) * 2 * k + (m >> 3) * 4) =
                (uint16_t)__byte_perm(bytes_of(sum[i]), 0, 0x4420);
        }
    }
}

/* ---- values -------------------------------------------------------------------------------- */

/* Least and most of a pair's two elements and over four lanes, as {least, -most}. */
template <bool BF16> KV_DEVICE void over_lanes(uint32_t &least, uint32_t &most) {
    using of = pair<BF16>;
    uint32_t both = __byte_perm(least, most ^ 0x80008000u, 0x5410);
    both = of::least(both, __byte_perm(least, most ^ 0x80008000u, 0x7632));
    both = of::least(both, __shfl_xor_sync(ALL, both, 1));
    both = of::least(both, __shfl_xor_sync(ALL, both, 2));
    least = __byte_perm(both, 0, 0x1010);
    most = __byte_perm(both, 0, 0x3232) ^ 0x80008000u;
}

template <int D, int W, bool BF16>
KV_DEVICE void values(const page_shape &shape, const uint16_t *source, char *staged, int thread) {
    using of = pair<BF16>;
    constexpr int P = 8 / W, TILES = D == 96 ? 2 : 4, SETS = D / 16 / TILES, TASKS = 32 * SETS * 4;
    const struct kv_page_map &map = shape.map;
    const int group = (int)shape.group;
#pragma unroll 1
    for (int task = thread; task < TASKS; task += THREADS<D>) {
        const int q = task & 3, t0 = (task >> 2 & 31) * 4, set = task >> 7;
        const int c0 = set * 16 * TILES;
        uint2 x[4][TILES];
#pragma unroll
        for (int t = 0; t < 4; t++)
#pragma unroll
            for (int j = 0; j < TILES; j++) x[t][j] = *(const uint2 *)(source + (t0 + t) * D + c0 + 16 * j + 4 * q);
        uint32_t sum[4][TILES / 2][2]; /* of two tiles; width 2 takes two of those to the byte */
#pragma unroll
        for (int t = 0; t < 4; t++) {
#pragma unroll
            for (int two = 0; two < TILES / 2; two++) {
                const uint2 a = x[t][2 * two], b = x[t][2 * two + 1];
                uint32_t least = of::least(of::least(a.x, a.y), of::least(b.x, b.y));
                uint32_t most = of::most(of::most(a.x, a.y), of::most(b.x, b.y));
                const int first = c0 + 32 * two;
                if (group > 32)
                    for (int c = first / group * group; c < first / group * group + group; c += 16) {
                        const uint2 other = *(const uint2 *)(source + (t0 + t) * D + c + 4 * q);
                        least = of::least(least, of::least(other.x, other.y));
                        most = of::most(most, of::most(other.x, other.y));
                    }
                over_lanes<BF16>(least, most);
                const rule<W, BF16> rule(least, most);
                if (q == 0 && first % group == 0) {
                    ((uint16_t *)(staged + map.value_scale))[first / group * T + t0 + t] = (uint16_t)rule.scales;
                    ((uint16_t *)(staged + map.value_zero))[first / group * T + t0 + t] = (uint16_t)rule.low;
                }
                sum[t][two][0] = sum[t][two][1] = 0;
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    rule.add_codes(sum[t][two][0], x[t][2 * two + j].x, count_of<W>((2 * two + j) % P));
                    rule.add_codes(sum[t][two][1], x[t][2 * two + j].y, count_of<W>((2 * two + j) % P));
                }
            }
        }
        /* Four tokens' bytes make a word; tile n of the page, unit n / P. */
        const int n = D / 16 * (t0 >> 5) + set * TILES;
        const int place = (t0 >> 2 & 3) * 4 + 2 * (t0 >> 4 & 1) + (q >> 1);
        constexpr bool WHOLE = D / 16 % P == 0;
        constexpr int TWOS = WHOLE ? P / 2 : 1; /* pairs of tiles in a unit */
#pragma unroll
        for (int unit = 0; unit < TILES / 2 / TWOS; unit++) {
            uint32_t *out = (uint32_t *)(staged + map.value_codes) + (n + 2 * unit * TWOS) / P * 128 + place;
            const int shift = WHOLE ? 0 : W * (n % P);
#pragma unroll
            for (int couple = 0; couple < 2; couple++) {
                uint32_t byte[4];
#pragma unroll
                for (int t = 0; t < 4; t++) {
                    uint32_t s = sum[t][unit * TWOS][couple];
                    if (TWOS == 2) s = fma2(sum[t][unit * TWOS + 1][couple], 0x3c003c00u, s);
                    byte[t] = bytes_of(s);
                }
                const uint32_t a = __byte_perm(byte[0], byte[1], 0x6240), b = __byte_perm(byte[2], byte[3], 0x6240);
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const uint32_t word = __byte_perm(a, b, e == 0 ? 0x5410 : 0x7632);
                    uint32_t *at = out + (4 * (q & 1) + 2 * couple + e) * 16;
                    if (WHOLE)
                        *at = word;
                    else
                        atomicOr(at, word << shift);
                }
            }
        }
    }
}

/* Grid (heads, items, 2: keys, values); shared memory: the part. */
template <int D, bool BF16> __global__ void __launch_bounds__(THREADS<D>, 1024 / D) minmax(const __grid_constant__ minmax_call call) {
    extern __shared__ __align__(16) char staged[];
    const page_shape &shape = call.shape;
    const struct kv_page_map &map = shape.map;
    const struct kv_quantize &item = call.items[blockIdx.y];
    const int head = blockIdx.x, thread = threadIdx.x;
    const bool second = blockIdx.z;
    const uint16_t *source = (const uint16_t *)item.raw + (size_t)(second * shape.heads + head) * T * D;
    char *record = (char *)item.packed + (size_t)head * map.record_bytes;
    launch_next();
    if (D == 96 && second) { /* words that two threads share */
        for (uint32_t i = thread; i < (map.record_bytes - map.value_codes) / 4; i += THREADS<D>)
            ((uint32_t *)(staged + map.value_codes - map.value_mean))[i] = 0;
        __syncthreads();
    }
    wait_previous();
    if (!second) {
        if (shape.key_bits == 2)
            keys<D, 2, BF16>(shape, source, staged, thread);
        else
            keys<D, 4, BF16>(shape, source, staged, thread);
    } else {
        if (shape.value_bits == 2)
            values<D, 2, BF16>(shape, source, staged - map.value_mean, thread);
        else
            values<D, 4, BF16>(shape, source, staged - map.value_mean, thread);
    }
    __syncthreads();
    const uint32_t first = second ? map.value_mean : 0, bytes = (second ? map.record_bytes : map.value_mean) - first;
    for (uint32_t i = 16 * thread; i < bytes; i += 16 * THREADS<D>)
        *(uint4 *)(record + first + i) = *(const uint4 *)(staged + i);
}

template <int D> void start(struct cuda_stream *stream, const minmax_call &call, uint32_t count) {
    const struct kv_page_map &map = call.shape.map;
    const uint32_t bytes = map.value_mean > map.record_bytes - map.value_mean ? map.value_mean : map.record_bytes - map.value_mean;
    cuda_launch(stream->device, stream->queue, call.shape.bf16 ? minmax<D, true> : minmax<D, false>,
                dim3(call.shape.heads, count, 2), THREADS<D>, bytes, call);
}

} // namespace

void cuda_quantize_minmax(struct cuda_stream *stream, const struct kv_shape *shape, uint32_t count,
                          const struct kv_quantize *items) {
    minmax_call call = {page_shape_of(shape), {}};
    memcpy(call.items, items, count * sizeof *items);
    switch (shape->head_dim) {
    case 64: start<64>(stream, call, count); break;
    case 96: start<96>(stream, call, count); break;
    case 128: start<128>(stream, call, count); break;
    default: start<256>(stream, call, count); break;
    }
}
