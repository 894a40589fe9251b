/* SPDX-License-Identifier: Apache-2.0 */
/* attend.cuh - attention on codes: the kernel, for one head_dim and one kind of codec.
 *
 * A warp holds NQ *quads* of four query vectors.  For a packed page of one KV head:
 *
 *   scores   tokens on the M side, slots on the K side, on the N side eight columns: for
 *            each vector of a quad a high and a low digit of q s, so that
 *            q s = (high + low / 254) 2^-k  with both in -127 .. 127.  k makes the largest
 *            product of the page just fit.  Codes are masked, never shifted: position j of
 *            a byte counts 2^(w j) times, which is taken out of the sums.
 *   softmax  on the accumulators where they lie; p is scaled by the page's own maximum, so
 *            that a sink elsewhere cannot starve it
 *   values   channels on the M side, tokens on the K side, p s as two digits again; the
 *            page's token order (page.h) lets one transpose per eight tokens make the B
 *            operand out of the scores
 *
 *   zeros of keys: one product of q with the zeros, scattered back to channel order, as
 *   16-bit elements.  Zeros of values: one product of the digits with the signed bytes.
 *   Mean of values: sum of p, times it.
 *
 * Raw pages come in slices of 16 tokens, with 16-bit products and q and p as two 16-bit
 * digits.  Lanes: g = lane / 4, t = lane % 4; a lane's sums belong to vector t of a quad.
 */
#ifndef KV_KERNELS_CUDA_ATTEND_CUH
#define KV_KERNELS_CUDA_ATTEND_CUH

#include "kernels/cuda/attend.h"
#include "kernels/cuda/ptx.cuh"

namespace {

constexpr uint32_t ALL = 0xffffffffu;
constexpr uint32_t ROUND = 0x66006600u;  /* 1536: adding it leaves an integer in the low byte */
constexpr uint32_t BASE = 0x5bf05bf0u;   /* 254 */
constexpr float DIGITS = 254.0f;

/* Two digits of x * s for two values at once, as integers in the low bytes of the halves.  Returns
 * what they leave, in units of the last. */
KV_DEVICE uint32_t split_product(uint32_t x, uint32_t s, uint32_t &high, uint32_t &low) {
    high = fma2(x, s, ROUND);
    uint32_t whole = sub2(high, ROUND);
    uint32_t rest = fma2(x, s, whole ^ 0x80008000u);
    low = fma2(rest, BASE, ROUND);
    return fma2(rest, BASE, sub2(ROUND, low));
}

/* The same of a pair that is already there. */
KV_DEVICE void split_pair(uint32_t x, uint32_t &high, uint32_t &low) {
    high = fma2(x, 0x3c003c00u, ROUND);
    low = fma2(sub2(x, sub2(high, ROUND)), BASE, ROUND);
}

/* Two digits of x * s in binary32, as integers in the low bytes: nothing is lost before the last. */
KV_DEVICE float split_exact(float x, float s, uint32_t &high, uint32_t &low) {
    constexpr float WHOLE = 0x1.8p23f; /* adding it leaves an integer in the low byte */
    const float h = fmaf(x, s, WHOLE), rest = fmaf(x, s, WHOLE - h), l = fmaf(rest, DIGITS, WHOLE);
    high = __float_as_uint(h);
    low = __float_as_uint(l);
    return fmaf(rest, DIGITS, WHOLE - l);
}
KV_DEVICE uint32_t low_bytes(const uint32_t (&x)[4]) {
    return __byte_perm(__byte_perm(x[0], x[1], 0x0040), __byte_perm(x[2], x[3], 0x0040), 0x5410);
}

/* Four slots' bytes beside each other: words of the even and of the odd half. */
KV_DEVICE void gather_bytes(const uint32_t (&half)[4], uint32_t &even, uint32_t &odd) {
    uint32_t a = __byte_perm(half[0], half[1], 0x6420), b = __byte_perm(half[2], half[3], 0x6420);
    even = __byte_perm(a, b, 0x6420);
    odd = __byte_perm(a, b, 0x7531);
}

/* e4m3 bytes as f16 times 2^-8: the formats differ in bias only. */
KV_DEVICE uint32_t scale_twice(uint32_t bytes, int i) {
    return __byte_perm(bytes, 0, i == 0 ? 0x0404 : i == 1 ? 0x1414 : i == 2 ? 0x2424 : 0x3434) >> 1;
}

/* What makes the largest product of a page just fit the first digit: 127 / largest, at most
 * `most`, and rounded down to seven bits, so that its product with an e4m3 scale is exact in
 * f16. */
KV_DEVICE float digit_lift(float largest, float most) {
    const float lift = __fdividef(127.0f, fmaxf(largest, 127.0f / most));
    return __uint_as_float(__float_as_uint(lift) & 0xfffe0000u);
}

/* Third digits of a first: fewer than 254 x 254, because a third digit also makes up for
 * q s having been rounded to f16, which is up to 0.1 of a first. */
constexpr float FINER = 1280.0f;

KV_DEVICE float power_of_two(int exponent) {
    return __uint_as_float((uint32_t)(127 + exponent) << 23);
}

/* ---- one warp's products on codes ------------------------------------------------- */

template <int NQ> struct columns {
    uint32_t b0[NQ], b1[NQ];
};

template <int NQ> using tile_sums = int[NQ][8][4];

template <int NQ>
KV_DEVICE void load_columns(columns<NQ> &b, uint32_t words, uint32_t quad_bytes, int K, int g, int t) {
#pragma unroll
    for (int q = 0; q < NQ; q++) {
        uint32_t base = words + q * quad_bytes + g * 4;
        b.b0[q] = K == 8 && t > 1 ? 0 : load_32(base + t * 32);
        b.b1[q] = K == 32 ? load_32(base + (t + 4) * 32) : 0;
    }
}

/* Eight token tiles of one chunk of K slots at width W.  GROUPED: the columns change with
 * the token, `group_bytes` apart, every 2^tiles_log tiles. */
template <int W, int K, int NQ, bool GROUPED>
KV_DEVICE void key_chunk(uint32_t codes, uint32_t words, uint32_t quad_bytes, uint32_t group_bytes,
                         int tiles_log, int lane, tile_sums<NQ> &sums) {
    constexpr int P = 8 / W, UNITS = W, UNIT_BYTES = 16 * K;
    const int g = lane >> 2, t = lane & 3;
    columns<NQ> b;
    if (!GROUPED) load_columns<NQ>(b, words, quad_bytes, K, g, t);
#pragma unroll
    for (int u = 0; u < UNITS; u++) {
        uint4 v = {0, 0, 0, 0};
        uint32_t at = codes + u * UNIT_BYTES;
        if (K == 32) v = load_128(at + lane * 16);
        if (K == 16) {
            uint2 h = load_64(at + lane * 8);
            v.x = h.x, v.y = h.y;
        }
        if (K == 8 && t < 2) {
            uint2 h = load_64(at + (2 * g + t) * 8);
            v.x = h.x, v.y = h.y;
        }
#pragma unroll
        for (int j = 0; j < P; j++) {
            const uint32_t mask = (0x01010101u * ((1u << W) - 1)) << (W * j);
            const int tile = u * P + j;
            if (GROUPED)
                load_columns<NQ>(b, words + (tile >> tiles_log) * group_bytes, quad_bytes, K, g, t);
#pragma unroll
            for (int q = 0; q < NQ; q++) {
                if (K == 32)
                    mma_u8s8(sums[q][tile], v.x & mask, v.y & mask, v.z & mask, v.w & mask, b.b0[q],
                             b.b1[q]);
                else
                    mma_u8s8_k16(sums[q][tile], v.x & mask, v.y & mask, b.b0[q]);
            }
        }
    }
}

/* All chunks of one quarter of the slots. */
template <int W, int D, int NQ, bool GROUPED>
KV_DEVICE void key_quarter(uint32_t codes, uint32_t words, uint32_t quad_bytes, uint32_t group_bytes,
                           int tiles_log, int lane, tile_sums<NQ> &sums) {
    if (D == 256) {
        key_chunk<W, 32, NQ, GROUPED>(codes, words, quad_bytes, group_bytes, tiles_log, lane, sums);
        key_chunk<W, 32, NQ, GROUPED>(codes + 512 * W, words + 8 * 32, quad_bytes, group_bytes,
                                      tiles_log, lane, sums);
    } else if (D == 128) {
        key_chunk<W, 32, NQ, GROUPED>(codes, words, quad_bytes, group_bytes, tiles_log, lane, sums);
    } else if (D == 96) {
        key_chunk<W, 16, NQ, GROUPED>(codes, words, quad_bytes, group_bytes, tiles_log, lane, sums);
        key_chunk<W, 8, NQ, GROUPED>(codes + 256 * W, words + 4 * 32, quad_bytes, group_bytes,
                                     tiles_log, lane, sums);
    } else {
        key_chunk<W, 16, NQ, GROUPED>(codes, words, quad_bytes, group_bytes, tiles_log, lane, sums);
    }
}

/* Tile i of width W counts 2^(W (i mod 8/W)) times. */
__host__ __device__ constexpr int position_bits(int W, int tile) {
    return W * (tile % (8 / W));
}

/* From the counts of width FROM to those of width TO: exact, because every sum is a multiple
 * of what it is divided by. */
template <int FROM, int TO, int NQ> KV_DEVICE void recount(tile_sums<NQ> &sums) {
#pragma unroll
    for (int q = 0; q < NQ; q++)
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const int shift = position_bits(TO, i) - position_bits(FROM, i);
#pragma unroll
            for (int e = 0; e < 4; e++)
                sums[q][i][e] = shift >= 0 ? sums[q][i][e] << shift : sums[q][i][e] >> -shift;
        }
}

/* ---- the kernel ---------------------------------------------------------------------- */

template <int D, int MODE, int NQ> struct worker {
    static constexpr int TILES = D / 16;
    static constexpr bool ROTATED = MODE == ATTEND_ROTATED;
    static constexpr bool MINMAX = MODE == ATTEND_MINMAX;
    static constexpr int RAW_STRIDE = 2 * D + 16; /* conflict-free for ldmatrix */

    const attend_call &call;
    const int lane, g, t;
    uint32_t fragments, fragments_raw, query, words, zeros; /* shared memory */

    /* Outputs so far: coded holds the sums of codes (rotated if the codec is), plain all
     * else; one and the same unless ROTATED.  [tile][r]: channel 16 tile + g + 8 r. */
    float coded[NQ][TILES][2];
    float plain[ROTATED ? NQ : 1][ROTATED ? TILES : 1][2];
    float largest[NQ], sum[NQ], zero[NQ];
    float unscale[NQ]; /* query units to log2 scores */
    float coarse; /* share of call.refine_above that is left by what q loses as one f16 */
    uint32_t limit[NQ];

    KV_DEVICE worker(const attend_call &c, int lane_) : call(c), lane(lane_), g(lane_ >> 2), t(lane_ & 3) {
#pragma unroll
        for (int q = 0; q < NQ; q++) {
            largest[q] = -INFINITY, sum[q] = 0, zero[q] = 0;
#pragma unroll
            for (int i = 0; i < TILES; i++)
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    coded[q][i][r] = 0;
                    if (ROTATED) plain[q][i][r] = 0;
                }
        }
    }

    KV_DEVICE float &exact(int q, int i, int r) {
        if (ROTATED) return plain[q][i][r];
        return coded[q][i][r];
    }

    /* Moves the running state to a new largest score; returns 2^(page - new), by which the
     * page's sums, relative to its own largest, count. */
    KV_DEVICE float advance(int q, float page_largest) {
        float next = fmaxf(largest[q], page_largest);
        /* A row that has seen nothing yet: the lanes of the warp differ, the code may not. */
        const float base = next == -INFINITY ? 0 : next;
        float shrink = largest[q] == next ? 1.0f : exp2_fast(largest[q] - base);
        if (__any_sync(ALL, shrink != 1.0f)) {
            sum[q] *= shrink, zero[q] *= shrink;
#pragma unroll
            for (int i = 0; i < TILES; i++)
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    coded[q][i][r] *= shrink;
                    if (ROTATED) plain[q][i][r] *= shrink;
                }
        }
        largest[q] = next;
        return exp2_fast(page_largest - base);
    }

    KV_DEVICE static float over_rows(float x) {
        x += __shfl_xor_sync(ALL, x, 4);
        x += __shfl_xor_sync(ALL, x, 8);
        return x + __shfl_xor_sync(ALL, x, 16);
    }
    KV_DEVICE static float max_over_rows(float x) {
        x = fmaxf(x, __shfl_xor_sync(ALL, x, 4));
        x = fmaxf(x, __shfl_xor_sync(ALL, x, 8));
        return fmaxf(x, __shfl_xor_sync(ALL, x, 16));
    }

    /* Sums over the lanes; of the four of a quad each lane keeps its own vector's. */
    KV_DEVICE float own_sum(const float (&x)[4]) const {
        const bool odd = lane & 1, second = lane & 2;
        float a = odd ? x[1] : x[0], b = odd ? x[3] : x[2];
        a += __shfl_xor_sync(ALL, odd ? x[0] : x[1], 1);
        b += __shfl_xor_sync(ALL, odd ? x[2] : x[3], 1);
        const float mine = second ? b : a;
        return over_rows(mine + __shfl_xor_sync(ALL, second ? a : b, 2));
    }

    /* Two more digits of q s for four slots, in the place of the first two.  They also hold
     * what q loses as one f16.  scale: lifted. */
    KV_DEVICE void refine_four(uint32_t target, int q, const uint32_t (&channel)[4], const float (&scale)[4]) {
#pragma unroll
        for (int v = 0; v < 4; v++) {
            const uint2 digits = load_64(target + 8 * v);
            uint32_t third = 0, fourth = 0;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const uint32_t at = fragments + 2 * ((q * (D / 32) + (channel[i] >> 5)) * 256 + 64 * v + (channel[i] & 31));
                const float x = low_f16(load_u16(at)) + low_f16(load_u16(at + 64));
                const int high = (int8_t)(digits.x >> (8 * i)), low = (int8_t)(digits.y >> (8 * i));
                const float rest = fmaf((float)low, -1.0f / DIGITS, fmaf(x, scale[i], (float)-high)) * FINER;
                const float whole = rintf(rest);
                third |= ((uint32_t)(int)whole & 255) << (8 * i);
                fourth |= ((uint32_t)(int)rintf((rest - whole) * DIGITS) & 255) << (8 * i);
            }
            store_64(target + 8 * v, third, fourth);
        }
    }

    /* Whether digits worth `unit` are too coarse for any vector. */
    KV_DEVICE bool too_coarse(float unit, uint32_t mix) const {
        const float above = call.refine_above[mix] * coarse;
        bool any = false;
#pragma unroll
        for (int q = 0; q < NQ; q++) any |= fabsf(unit * unscale[q]) > above;
        return __any_sync(ALL, any);
    }

    /* q . zeros, channel order, for the rows of both halves of A (two groups of tokens). */
    KV_DEVICE void zero_product(int q, uint32_t low_rows, uint32_t high_rows, float &low, float &high) {
        /* Two sums: a product waits for the one before it of the same sum. */
        float c[4] = {0, 0, 0, 0}, d[4] = {0, 0, 0, 0};
        uint32_t b = (MINMAX && call.bf16 ? fragments_raw : fragments) + q * D * 16 + lane * 16;
#pragma unroll
        for (int i = 0; i < D / 32; i++) {
            uint4 f = load_128(b + i * 512);
            uint4 x = load_128(low_rows + i * 64 + t * 16);
            uint4 y = MINMAX ? load_128(high_rows + i * 64 + t * 16) : x;
            if (MINMAX && call.bf16) {
                mma_bf16(c, x.x, y.x, x.y, y.y, f.x, f.y);
                mma_bf16(d, x.z, y.z, x.w, y.w, f.z, f.w);
            } else {
                mma_f16(c, x.x, y.x, x.y, y.y, f.x, f.y);
                mma_f16(d, x.z, y.z, x.w, y.w, f.z, f.w);
            }
        }
        low = (c[0] + d[0]) + (c[1] + d[1]), high = (c[2] + d[2]) + (c[3] + d[3]);
    }

    /* ---- UNBIASED keys ---- */

    /* Columns of q s for every slot, into `words`; zeros in channel order, into `zeros`.
     * Returns what turns a sum of digits times codes into q.k.  left: what the digits leave of q s,
     * times the middle code of its width, in the same units as such a sum: the codes' mean is
     * made up for, and only their spread counts as noise. */
    KV_DEVICE float unbiased_columns(uint32_t part, uint32_t mix, float &lift, float (&left)[NQ]) {
        constexpr int MINE = (D / 4 + 31) / 32; /* groups of four slots of this lane */
        uint32_t pair[MINE][4][NQ][2], scale[MINE][4], most = 0;
        const uint32_t key_order = part + call.map.key_order, key_scale = part + call.map.key_scale,
                       key_zero = part + call.map.key_zero;
#pragma unroll
        for (int m = 0; m < MINE; m++) {
            const int four = lane + 32 * m;
            if (D % 128 != 0 && four >= D / 4) continue;
            uint32_t order = load_32(key_order + 4 * four), scales = load_32(key_scale + 4 * four);
            uint2 z = load_64(key_zero + 8 * four);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                uint32_t channel = order >> (8 * i) & 255;
                if (D < 256) channel = min(channel, (uint32_t)D - 1);
                uint32_t half = (i < 2 ? z.x : z.y) >> (16 * (i & 1));
                store_u16(zeros + 2 * channel, half);
                scale[m][i] = scale_twice(scales, i);
#pragma unroll
                for (int q = 0; q < NQ; q++) {
                    uint2 v = load_64(query + q * D * 8 + channel * 8);
                    pair[m][i][q][0] = v.x, pair[m][i][q][1] = v.y;
                    most = max2(most, max2(abs2(mul2(v.x, scale[m][i])), abs2(mul2(v.y, scale[m][i]))));
                }
            }
        }
        most = __reduce_max_sync(ALL, max(most & 0xffff, most >> 16));
        lift = digit_lift(low_f16(most), 0x1p14f);
        const uint32_t lifts = pack_f16(lift, lift);
        float rests[NQ][4];
#pragma unroll
        for (int q = 0; q < NQ; q++) rests[q][0] = rests[q][1] = rests[q][2] = rests[q][3] = 0;
#pragma unroll
        for (int m = 0; m < MINE; m++) {
            const int four = lane + 32 * m;
            if (D % 128 != 0 && four >= D / 4) continue;
            const float middle = (float)((1 << (mix >> (16 * four / D * 8) & 255)) - 1) * 0.5f;
#pragma unroll
            for (int q = 0; q < NQ; q++) {
                uint32_t word[8];
#pragma unroll
                for (int p = 0; p < 2; p++) {
                    uint32_t high[4], low[4], rest[4];
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        rest[i] = split_product(pair[m][i][q][p], mul2(scale[m][i], lifts), high[i], low[i]);
                    const uint32_t all = add2(add2(rest[0], rest[1]), add2(rest[2], rest[3]));
                    rests[q][2 * p] = fmaf(low_f16(all), middle, rests[q][2 * p]);
                    rests[q][2 * p + 1] = fmaf(high_f16(all), middle, rests[q][2 * p + 1]);
                    gather_bytes(high, word[4 * p], word[4 * p + 2]);
                    gather_bytes(low, word[4 * p + 1], word[4 * p + 3]);
                }
                uint32_t target = words + q * D * 8 + four * 32;
                store_128(target, word[0], word[1], word[2], word[3]);
                store_128(target + 16, word[4], word[5], word[6], word[7]);
            }
        }
        uint32_t header = load_32(part);
        float factor = low_f16(header >> 16);
#pragma unroll
        for (int q = 0; q < NQ; q++) left[q] = own_sum(rests[q]);
        __syncwarp();
        return __fdividef(factor * (256.0f / 448.0f / DIGITS), lift);
    }

    KV_DEVICE void unbiased_refine(uint32_t part, float lift) {
        __syncwarp();
#pragma unroll 1
        for (int four = lane; four < D / 4; four += 32) {
            const uint32_t order = load_32(part + call.map.key_order + 4 * four);
            const uint32_t scales = load_32(part + call.map.key_scale + 4 * four);
            uint32_t channel[4];
            float scale[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                channel[i] = min(order >> (8 * i) & 255, (uint32_t)D - 1);
                scale[i] = low_f16(scale_twice(scales, i)) * lift;
            }
#pragma unroll 1
            for (int q = 0; q < NQ; q++) refine_four(words + q * D * 8 + four * 32, q, channel, scale);
        }
        __syncwarp();
    }

    /* Scores of a packed page in log2 units: [tile][r] is token 16 tile + 4 (g / 2) + (g & 1)
     * + 2 r. */
    KV_DEVICE void unbiased_scores(uint32_t part, float (&score)[NQ][8][2]) {
        uint32_t index = load_u8(part);
        index = index < call.mix_count ? index : 0;
        const uint32_t mix = call.mixes[index];
        float lift, left[NQ];
        const float unit = unbiased_columns(part, mix, lift, left);
        const bool coarse = too_coarse(unit, index);
#pragma unroll
        for (int q = 0; q < NQ; q++) {
            float base, unused;
            zero_product(q, zeros, zeros, base, unused);
            /* More digits leave nothing to make up for. */
            if (!coarse) base = fmaf(left[q], unit, base);
#pragma unroll
            for (int i = 0; i < 8; i++) score[q][i][0] = score[q][i][1] = base * unscale[q];
        }
        unbiased_products(part, mix, unit, score);
        if (coarse) {
            unbiased_refine(part, lift);
            unbiased_products_any(part, mix, unit * (1 / FINER), score);
        }
    }

    KV_DEVICE static void clear(tile_sums<NQ> &sums) {
#pragma unroll
        for (int q = 0; q < NQ; q++)
#pragma unroll
            for (int i = 0; i < 8; i++) sums[q][i][0] = sums[q][i][1] = sums[q][i][2] = sums[q][i][3] = 0;
    }

    /* Adds codes times the digits in `words`. */
    KV_DEVICE void unbiased_products(uint32_t part, uint32_t mix, float unit, float (&score)[NQ][8][2]) {
        /* The mixes of the presets, straight on: the loads of all quarters are under way together. */
        int sums[NQ][8][4];
        clear(sums);
        bool known = true;
        if constexpr (ROTATED) { /* kivi1.5 */
            if (mix == mix_word(2, 2, 1, 1))
                key_mix<2, 2, 1, 1>(part, sums);
            else if (mix == mix_word(2, 2, 2, 0))
                key_mix<2, 2, 2, 0>(part, sums);
            else if (mix == mix_word(4, 1, 1, 0))
                key_mix<4, 1, 1, 0>(part, sums);
            else if (mix == mix_word(4, 2, 0, 0))
                key_mix<4, 2, 0, 0>(part, sums);
            else
                known = false;
        } else { /* kivi2 */
            if (mix == mix_word(2, 2, 2, 2))
                key_mix<2, 2, 2, 2>(part, sums);
            else if (mix == mix_word(4, 2, 1, 1))
                key_mix<4, 2, 1, 1>(part, sums);
            else if (mix == mix_word(4, 2, 2, 0))
                key_mix<4, 2, 2, 0>(part, sums);
            else if (mix == mix_word(4, 4, 0, 0))
                key_mix<4, 4, 0, 0>(part, sums);
            else
                known = false;
        }
        if (!known) {
            unbiased_products_any(part, mix, unit, score);
            return;
        }
        add_scores(sums, (int)(mix & 255), unit, score);
    }

    KV_DEVICE static constexpr uint32_t mix_word(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
        return a | b << 8 | c << 16 | d << 24;
    }

    /* All quarters of a mix, from the narrowest to the widest. */
    template <int W0, int W1, int W2, int W3> KV_DEVICE void key_mix(uint32_t part, tile_sums<NQ> &sums) {
        const uint32_t codes = part + call.map.key_codes;
        if constexpr (W3 > 0)
            key_quarter<W3, D, NQ, false>(codes + 4 * D * (W0 + W1 + W2), words + 3 * (D / 16) * 32, D * 8, 0, 0, lane, sums);
        if constexpr (W3 > 0 && W3 != W2) recount<W3, W2, NQ>(sums);
        if constexpr (W2 > 0)
            key_quarter<W2, D, NQ, false>(codes + 4 * D * (W0 + W1), words + 2 * (D / 16) * 32, D * 8, 0, 0, lane, sums);
        if constexpr (W2 > 0 && W2 != W1) recount<W2, W1, NQ>(sums);
        key_quarter<W1, D, NQ, false>(codes + 4 * D * W0, words + (D / 16) * 32, D * 8, 0, 0, lane, sums);
        if constexpr (W1 != W0) recount<W1, W0, NQ>(sums);
        key_quarter<W0, D, NQ, false>(codes, words, D * 8, 0, 0, lane, sums);
    }

    /* Sums, counted as width does, become scores. */
    KV_DEVICE void add_scores(const tile_sums<NQ> &sums, int width, float unit, float (&score)[NQ][8][2]) {
#pragma unroll
        for (int q = 0; q < NQ; q++) {
            const float u = unit * unscale[q];
            const float one = width == 4 ? 0x1p-4f : width == 2 ? 0x1p-2f : 0x1p-1f;
            float count = u;
#pragma unroll
            for (int i = 0; i < 8; i++) {
                if (i > 0) count *= one;
                if ((i & 1) == 0 && width == 4) count = u;
                if ((i & 3) == 0 && width == 2) count = u;
                score[q][i][0] = fmaf((float)(sums[q][i][0] * 254 + sums[q][i][1]), count, score[q][i][0]);
                score[q][i][1] = fmaf((float)(sums[q][i][2] * 254 + sums[q][i][3]), count, score[q][i][1]);
            }
        }
    }

    /* The same for any mix. */
    KV_DEVICE void unbiased_products_any(uint32_t part, uint32_t mix, float unit, float (&score)[NQ][8][2]) {
        int sums[NQ][8][4];
        clear(sums);
        uint32_t codes = part + call.map.key_codes + 4 * D * call.key_width_sum;
        int width = 0;
        /* From the last quarter to the first widths rise, so the counts are changed at most
         * twice. */
#pragma unroll 1
        for (int quarter = 3; quarter >= 0; quarter--) {
            const int w = mix >> (8 * quarter) & 255;
            if (w == 0) continue;
            codes -= 4 * D * w;
            const uint32_t b = words + quarter * (D / 16) * 32;
            if (w == 4) {
                if (width == 1) recount<1, 4, NQ>(sums);
                if (width == 2) recount<2, 4, NQ>(sums);
                key_quarter<4, D, NQ, false>(codes, b, D * 8, 0, 0, lane, sums);
            } else if (w == 2) {
                if (width == 1) recount<1, 2, NQ>(sums);
                key_quarter<2, D, NQ, false>(codes, b, D * 8, 0, 0, lane, sums);
            } else {
                key_quarter<1, D, NQ, false>(codes, b, D * 8, 0, 0, lane, sums);
            }
            width = w;
        }
        add_scores(sums, width, unit, score);
    }

    /* ---- MINMAX keys ---- */

    KV_DEVICE float element(uint32_t half) const {
        return call.bf16 ? low_bf16(half) : low_f16(half & 0xffff);
    }

    /* left: as above, [key group]. */
    KV_DEVICE float minmax_columns(uint32_t part, float &lift, float (&left)[4][NQ]) {
        constexpr int MINE = (D / 4 + 31) / 32;
        const int key_groups = 128 >> call.group_log;
        float most = 0;
        for (int group = 0; group < key_groups; group++)
#pragma unroll
            for (int m = 0; m < MINE; m++) {
                const int four = lane + 32 * m;
                if (D % 128 != 0 && four >= D / 4) continue;
                uint2 s = load_64(part + call.map.key_scale + group * 2 * D + 8 * four);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    float scale = element((i < 2 ? s.x : s.y) >> (16 * (i & 1)));
#pragma unroll
                    for (int q = 0; q < NQ; q++) {
                        uint2 v = load_64(query + q * D * 8 + (4 * four + i) * 8);
                        uint32_t m2 = max2(abs2(v.x), abs2(v.y));
                        most = fmaxf(most, scale * fmaxf(low_f16(m2), high_f16(m2)));
                    }
                }
            }
        most = __uint_as_float(__reduce_max_sync(ALL, __float_as_uint(most)));
        lift = digit_lift(most, 0x1p100f);
        const float middle = call.key_bits == 2 ? 1.5f : 7.5f;
        for (int group = 0; group < key_groups; group++) {
            float rests[NQ][4];
#pragma unroll
            for (int q = 0; q < NQ; q++) rests[q][0] = rests[q][1] = rests[q][2] = rests[q][3] = 0;
#pragma unroll
            for (int m = 0; m < MINE; m++) {
                const int four = lane + 32 * m;
                if (D % 128 != 0 && four >= D / 4) continue;
                uint2 s = load_64(part + call.map.key_scale + group * 2 * D + 8 * four);
#pragma unroll
                for (int q = 0; q < NQ; q++) {
                    uint32_t high[4][4], low[4][4], word[8];
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        const float scale = element((i < 2 ? s.x : s.y) >> (16 * (i & 1))) * lift;
                        const uint2 v = load_64(query + q * D * 8 + (4 * four + i) * 8);
                        rests[q][0] += split_exact(low_f16(v.x), scale, high[0][i], low[0][i]);
                        rests[q][1] += split_exact(high_f16(v.x), scale, high[1][i], low[1][i]);
                        rests[q][2] += split_exact(low_f16(v.y), scale, high[2][i], low[2][i]);
                        rests[q][3] += split_exact(high_f16(v.y), scale, high[3][i], low[3][i]);
                    }
#pragma unroll
                    for (int v = 0; v < 4; v++) word[2 * v] = low_bytes(high[v]), word[2 * v + 1] = low_bytes(low[v]);
                    uint32_t target = words + (group * NQ + q) * D * 8 + four * 32;
                    store_128(target, word[0], word[1], word[2], word[3]);
                    store_128(target + 16, word[4], word[5], word[6], word[7]);
                }
            }
#pragma unroll
            for (int q = 0; q < NQ; q++) {
                const float sum_left = own_sum(rests[q]) * middle;
#pragma unroll
                for (int g4 = 0; g4 < 4; g4++)
                    if (g4 == group) left[g4][q] = sum_left;
            }
        }
        __syncwarp();
        return 1.0f / (DIGITS * lift);
    }

    KV_DEVICE void minmax_refine(uint32_t part, float lift) {
        const int key_groups = 128 >> call.group_log;
        __syncwarp();
#pragma unroll 1
        for (int i = lane; i < key_groups * (D / 4); i += 32) {
            const uint32_t group = i / (D / 4), four = i % (D / 4);
            const uint2 s = load_64(part + call.map.key_scale + group * 2 * D + 8 * four);
            uint32_t channel[4];
            float scale[4];
#pragma unroll
            for (int e = 0; e < 4; e++) {
                channel[e] = 4 * four + e;
                scale[e] = element((e < 2 ? s.x : s.y) >> (16 * (e & 1))) * lift;
            }
#pragma unroll 1
            for (int q = 0; q < NQ; q++) refine_four(words + (group * NQ + q) * D * 8 + four * 32, q, channel, scale);
        }
        __syncwarp();
    }

    KV_DEVICE void minmax_scores(uint32_t part, float (&score)[NQ][8][2]) {
        float lift, left[4][NQ];
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int q = 0; q < NQ; q++) left[i][q] = 0;
        const float unit = minmax_columns(part, lift, left);
        const bool coarse = too_coarse(unit, 0);
        const int tiles_log = call.group_log - 4;
#pragma unroll
        for (int q = 0; q < NQ; q++) {
            float z = 0;
#pragma unroll
            for (int i = 0; i < 8; i++) {
                if ((i & ((1 << tiles_log) - 1)) == 0) {
                    uint32_t row = part + call.map.key_zero + (i >> tiles_log) * 2 * D;
                    float unused;
                    zero_product(q, row, row, z, unused);
                }
                const float more = tiles_log == 1 ? left[i >> 1][q] : tiles_log == 2 ? left[i >> 2][q] : left[0][q];
                score[q][i][0] = score[q][i][1] = (coarse ? z : fmaf(more, unit, z)) * unscale[q];
            }
        }
#pragma unroll 1
        for (bool refined = false;; refined = true) {
            minmax_products(part, refined ? unit * (1 / FINER) : unit, score);
            if (refined || !coarse) break;
            minmax_refine(part, lift);
        }
    }

    KV_DEVICE void minmax_products(uint32_t part, float unit, float (&score)[NQ][8][2]) {
        const int tiles_log = call.group_log - 4, bits = call.key_bits;
        int sums[NQ][8][4];
#pragma unroll
        for (int q = 0; q < NQ; q++)
#pragma unroll
            for (int i = 0; i < 8; i++) sums[q][i][0] = sums[q][i][1] = sums[q][i][2] = sums[q][i][3] = 0;
#pragma unroll 1
        for (int quarter = 0; quarter < 4; quarter++) {
            const uint32_t codes = part + call.map.key_codes + quarter * 4 * D * bits;
            const uint32_t b = words + quarter * (D / 16) * 32;
            if (bits == 2)
                key_quarter<2, D, NQ, true>(codes, b, D * 8, NQ * D * 8, tiles_log, lane, sums);
            else
                key_quarter<4, D, NQ, true>(codes, b, D * 8, NQ * D * 8, tiles_log, lane, sums);
        }
#pragma unroll
        for (int q = 0; q < NQ; q++) {
            const float u = unit * unscale[q];
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const float count = u * (bits == 2 ? (float)(1.0 / (1 << position_bits(2, i)))
                                                   : (float)(1.0 / (1 << position_bits(4, i))));
                score[q][i][0] = fmaf((float)(sums[q][i][0] * 254 + sums[q][i][1]), count, score[q][i][0]);
                score[q][i][1] = fmaf((float)(sums[q][i][2] * 254 + sums[q][i][3]), count, score[q][i][1]);
            }
        }
    }

    /* ---- values ---- */

    /* B operand of 16 tokens out of the digits where the scores lie. */
    KV_DEVICE static uint32_t tokens_to_column(uint32_t high, uint32_t low) {
        uint32_t a = transpose(__byte_perm(high, low, 0x5410));
        uint32_t b = transpose(__byte_perm(high, low, 0x7632));
        return __byte_perm(a, b, 0x6420);
    }

    /* Adds the products of channel tiles [FIRST, FIRST + COUNT) with all tokens, times
     * `unit`. */
    template <int W, int FIRST, int COUNT>
    KV_DEVICE void value_tiles(uint32_t codes, const uint32_t (&column)[NQ][8], const float (&unit)[NQ]) {
        constexpr int P = 8 / W;
        constexpr bool ALIGNED = TILES % P == 0; /* a tile has one position in all token blocks */
        int sums[NQ][COUNT][4];
#pragma unroll
        for (int q = 0; q < NQ; q++)
#pragma unroll
            for (int i = 0; i < COUNT; i++) sums[q][i][0] = sums[q][i][1] = sums[q][i][2] = sums[q][i][3] = 0;
#pragma unroll
        for (int block = 0; block < 4; block++) {
            uint4 v;
            int held = -1;
#pragma unroll
            for (int i = 0; i < COUNT; i++) {
                const int n = TILES * block + FIRST + i;
                if (n / P != held) v = load_128(codes + (n / P) * 512 + lane * 16), held = n / P;
                const int shift = W * (n % P);
                const uint32_t mask = (0x01010101u * ((1u << W) - 1)) << (ALIGNED ? shift : 0);
                const int down = ALIGNED ? 0 : shift;
#pragma unroll
                for (int q = 0; q < NQ; q++)
                    mma_u8s8(sums[q][i], v.x >> down & mask, v.y >> down & mask, v.z >> down & mask,
                             v.w >> down & mask, column[q][2 * block], column[q][2 * block + 1]);
            }
        }
#pragma unroll
        for (int q = 0; q < NQ; q++)
#pragma unroll
            for (int i = 0; i < COUNT; i++) {
                const float count = unit[q] * (ALIGNED ? 1.0f / (1 << (W * ((FIRST + i) % P))) : 1.0f);
                coded[q][FIRST + i][0] = fmaf((float)(sums[q][i][0] * 254 + sums[q][i][1]), count, coded[q][FIRST + i][0]);
                coded[q][FIRST + i][1] = fmaf((float)(sums[q][i][2] * 254 + sums[q][i][3]), count, coded[q][FIRST + i][1]);
            }
    }

    template <int W> KV_DEVICE void all_value_tiles(uint32_t codes, const uint32_t (&column)[NQ][8], const float (&unit)[NQ]) {
        constexpr int STEP = TILES > 8 ? 8 : TILES;
        value_tiles<W, 0, STEP>(codes, column, unit);
        if (TILES > 8) value_tiles<W, TILES - STEP, STEP>(codes, column, unit);
    }

    /* p: relative to the page's largest, times 64.  weight: what they count. */
    KV_DEVICE void unbiased_values(uint32_t part, float header_factor, const float (&p)[NQ][8][2],
                                   const float (&page_sum)[NQ], const float (&weight)[NQ]) {
        const uint32_t part0 = part - call.map.value_mean;
        const uint32_t value_scale = part0 + call.map.value_scale, value_zero = part0 + call.map.value_zero;
        uint32_t column[NQ][8];
        const uint32_t pick = g & 1 ? 0x3414 : 0x2404;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            uint32_t scales = __byte_perm(load_32(value_scale + 16 * i + 4 * (g >> 1)), 0, pick) >> 1;
#pragma unroll
            for (int q = 0; q < NQ; q++) {
                uint32_t high, low;
                split_product(pack_f16(p[q][i][0], p[q][i][1]), scales, high, low);
                column[q][i] = tokens_to_column(high, low);
            }
        }
        float unit[NQ];
        const float step = header_factor * (256.0f / 448.0f / DIGITS);
#pragma unroll
        for (int q = 0; q < NQ; q++) unit[q] = weight[q] * step;

        int zeros_sum[NQ][4];
#pragma unroll
        for (int q = 0; q < NQ; q++) zeros_sum[q][0] = zeros_sum[q][1] = zeros_sum[q][2] = zeros_sum[q][3] = 0;
#pragma unroll
        for (int block = 0; block < 4; block++) {
            uint32_t a = load_32(value_zero + 32 * block + 4 * t), b = load_32(value_zero + 32 * block + 16 + 4 * t);
#pragma unroll
            for (int q = 0; q < NQ; q++)
                mma_s8s8(zeros_sum[q], a, a, b, b, column[q][2 * block], column[q][2 * block + 1]);
        }
#pragma unroll
        for (int q = 0; q < NQ; q++)
            zero[q] = fmaf((float)(zeros_sum[q][0] * 254 + zeros_sum[q][1]), unit[q] * 0.25f, zero[q]);

        const uint32_t codes = part0 + call.map.value_codes;
        if (call.value_bits == 2)
            all_value_tiles<2>(codes, column, unit);
        else
            all_value_tiles<1>(codes, column, unit);

        /* Each lane its channels g and g + 8 of a tile: matrices whose even rows are the
         * tile's first 8 channels and odd rows its last 8. */
#pragma unroll
        for (int i = 0; i < TILES; i += 4) {
            const int tile = min(i + (lane >> 3), TILES - 1);
            uint4 m = load_matrices_transposed(part + 32 * tile + 16 * (lane & 1));
            uint32_t mean[4] = {m.x, m.y, m.z, m.w};
#pragma unroll
            for (int j = 0; j < 4 && i + j < TILES; j++)
#pragma unroll
                for (int q = 0; q < NQ; q++) {
                    float share = page_sum[q] * weight[q];
                    exact(q, i + j, 0) = fmaf(share, low_f16(mean[j]), exact(q, i + j, 0));
                    exact(q, i + j, 1) = fmaf(share, high_f16(mean[j]), exact(q, i + j, 1));
                }
        }
    }

    template <int W, int PER>
    KV_DEVICE void minmax_value_groups(uint32_t part0, const float (&p)[NQ][8][2], const float (&weight)[NQ]) {
        constexpr int GROUPS = TILES / PER;
        const uint32_t codes = part0 + call.map.value_codes;
        const int row = 4 * (g >> 1) + (g & 1);
#pragma unroll
        for (int group = 0; group < GROUPS; group++) {
            const uint32_t scale = part0 + call.map.value_scale + 256 * group;
            const uint32_t least = part0 + call.map.value_zero + 256 * group;
            float most = 0, add[NQ];
#pragma unroll
            for (int q = 0; q < NQ; q++) add[q] = 0;
#pragma unroll
            for (int i = 0; i < 8; i++)
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    const int token = 16 * i + row + 2 * r;
                    float s = element(load_u16(scale + 2 * token)), z = element(load_u16(least + 2 * token));
#pragma unroll
                    for (int q = 0; q < NQ; q++) most = fmaxf(most, s * p[q][i][r]), add[q] = fmaf(p[q][i][r], z, add[q]);
                }
            most = __uint_as_float(__reduce_max_sync(ALL, __float_as_uint(most)));
            const float lift = digit_lift(most, 0x1p100f);
            uint32_t column[NQ][8];
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const int token = 16 * i + row;
                float s0 = element(load_u16(scale + 2 * token)) * lift, s1 = element(load_u16(scale + 2 * token + 4)) * lift;
#pragma unroll
                for (int q = 0; q < NQ; q++) {
                    uint32_t high, low;
                    split_pair(pack_f16(p[q][i][0] * s0, p[q][i][1] * s1), high, low);
                    column[q][i] = tokens_to_column(high, low);
                }
            }
            float unit[NQ];
#pragma unroll
            for (int q = 0; q < NQ; q++) {
                unit[q] = weight[q] / (DIGITS * lift);
                add[q] = over_rows(add[q]) * weight[q];
#pragma unroll
                for (int i = 0; i < PER; i++) coded[q][group * PER + i][0] += add[q], coded[q][group * PER + i][1] += add[q];
            }
            minmax_tiles<W, GROUPS, PER>(group, codes, column, unit);
        }
    }

    template <int W, int GROUPS, int PER>
    KV_DEVICE void minmax_tiles(int group, uint32_t codes, const uint32_t (&column)[NQ][8], const float (&unit)[NQ]) {
        if (group == 0) value_tiles<W, 0, PER>(codes, column, unit);
        if constexpr (GROUPS > 1) if (group == 1) value_tiles<W, PER, PER>(codes, column, unit);
        if constexpr (GROUPS > 2) if (group == 2) value_tiles<W, 2 * PER, PER>(codes, column, unit);
        if constexpr (GROUPS > 3) if (group == 3) value_tiles<W, 3 * PER, PER>(codes, column, unit);
        if constexpr (GROUPS > 4) if (group == 4) value_tiles<W, 4 * PER, PER>(codes, column, unit);
        if constexpr (GROUPS > 5) if (group == 5) value_tiles<W, 5 * PER, PER>(codes, column, unit);
        if constexpr (GROUPS > 6) if (group == 6) value_tiles<W, 6 * PER, PER>(codes, column, unit);
        if constexpr (GROUPS > 7) if (group == 7) value_tiles<W, 7 * PER, PER>(codes, column, unit);
    }

    template <int W> KV_DEVICE void minmax_values(uint32_t part0, const float (&p)[NQ][8][2], const float (&weight)[NQ]) {
        if (call.group_log == 5) minmax_value_groups<W, 2>(part0, p, weight);
        if constexpr (D % 64 == 0) if (call.group_log == 6) minmax_value_groups<W, 4>(part0, p, weight);
        if constexpr (D % 128 == 0) if (call.group_log == 7) minmax_value_groups<W, 8>(part0, p, weight);
    }

    /* ---- units ---- */

    /* First half of a packed page: scores to p, relative to the page's largest, times 64. */
    KV_DEVICE void packed_keys(uint32_t part, uint32_t token, float (&p)[NQ][8][2], float (&weight)[NQ],
                               float (&page_sum)[NQ], float &value_factor) {
        if (MINMAX) {
            minmax_scores(part, p);
        } else {
            unbiased_scores(part, p);
            value_factor = low_f16(load_32(part + 4));
        }
#pragma unroll
        for (int q = 0; q < NQ; q++) {
            if (__any_sync(ALL, token + 128 > limit[q])) {
                const uint32_t first = token + 4 * (g >> 1) + (g & 1);
#pragma unroll
                for (int i = 0; i < 8; i++)
#pragma unroll
                    for (int r = 0; r < 2; r++)
                        if (first + 16 * i + 2 * r >= limit[q]) p[q][i][r] = -INFINITY;
            }
            float most = p[q][0][0];
#pragma unroll
            for (int i = 0; i < 8; i++) most = fmaxf(most, fmaxf(p[q][i][0], p[q][i][1]));
            most = max_over_rows(most);
            weight[q] = advance(q, most) * 0x1p-6f;
            const float shift = most == -INFINITY ? 0 : 6.0f - most;
            float total[4] = {0, 0, 0, 0};
#pragma unroll
            for (int i = 0; i < 8; i++)
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    p[q][i][r] = exp2_fast(p[q][i][r] + shift);
                    total[2 * (i & 1) + r] += p[q][i][r];
                }
            page_sum[q] = over_rows((total[0] + total[1]) + (total[2] + total[3]));
            sum[q] = fmaf(page_sum[q], weight[q], sum[q]);
        }
    }

    KV_DEVICE void packed_values(uint32_t part, const float (&p)[NQ][8][2], const float (&weight)[NQ],
                                 const float (&page_sum)[NQ], float value_factor) {
        if (MINMAX) {
            const uint32_t part0 = part - call.map.value_mean;
            if (call.value_bits == 2)
                minmax_values<2>(part0, p, weight);
            else
                minmax_values<4>(part0, p, weight);
        } else {
            unbiased_values(part, value_factor, p, page_sum, weight);
        }
    }

    /* A slice of a raw page; column[q][r] become the B operand of the second product. */
    KV_DEVICE void raw_keys(uint32_t part, uint32_t token, uint32_t tokens, uint32_t (&column)[NQ][8], float (&weight)[NQ]) {
        const uint32_t b = (call.bf16 ? fragments_raw : fragments) + lane * 16;
#pragma unroll
        for (int q = 0; q < NQ; q++) {
            float c[4] = {0, 0, 0, 0};
#pragma unroll
            for (int i = 0; i < D / 32; i++) {
                uint4 f = load_128(b + q * D * 16 + i * 512);
                uint4 x = load_128(part + g * RAW_STRIDE + i * 64 + t * 16);
                uint4 y = load_128(part + (g + 8) * RAW_STRIDE + i * 64 + t * 16);
                if (call.bf16) {
                    mma_bf16(c, x.x, y.x, x.y, y.y, f.x, f.y);
                    mma_bf16(c, x.z, y.z, x.w, y.w, f.z, f.w);
                } else {
                    mma_f16(c, x.x, y.x, x.y, y.y, f.x, f.y);
                    mma_f16(c, x.z, y.z, x.w, y.w, f.z, f.w);
                }
            }
            const uint32_t end = min(limit[q], token + tokens);
            float s0 = token + g < end ? (c[0] + c[1]) * unscale[q] : -INFINITY;
            float s1 = token + g + 8 < end ? (c[2] + c[3]) * unscale[q] : -INFINITY;
            float most = max_over_rows(fmaxf(s0, s1));
            weight[q] = advance(q, most);
            const float shift = most == -INFINITY ? 0 : -most;
            float p0 = exp2_fast(s0 + shift), p1 = exp2_fast(s1 + shift);
            sum[q] = fmaf(over_rows(p0 + p1), weight[q], sum[q]);
            if (call.bf16) {
                uint32_t h = pack_bf16(p0, p1), l = pack_bf16(p0 - low_bf16(h), p1 - high_bf16(h));
                column[q][0] = transpose(__byte_perm(h, l, 0x5410));
                column[q][1] = transpose(__byte_perm(h, l, 0x7632));
            } else {
                uint32_t h = pack_f16(p0, p1), l = pack_f16(p0 - low_f16(h), p1 - high_f16(h));
                column[q][0] = transpose(__byte_perm(h, l, 0x5410));
                column[q][1] = transpose(__byte_perm(h, l, 0x7632));
            }
        }
    }

    KV_DEVICE void raw_values(uint32_t part, uint32_t tokens, const uint32_t (&column)[NQ][8], const float (&weight)[NQ]) {
        if (tokens < ATTEND_SLICE) {
            /* What lies behind the newest token is anything, NaN included. */
            for (uint32_t i = tokens * (D / 8) + lane; i < ATTEND_SLICE * (D / 8); i += 32)
                store_128(part + i / (D / 8) * RAW_STRIDE + i % (D / 8) * 16, 0, 0, 0, 0);
            fence_bulk();
            __syncwarp();
        }
        const int matrix = lane >> 3;
        const uint32_t row = part + ((matrix >> 1) * 8 + (lane & 7)) * RAW_STRIDE + (matrix & 1) * 16;
#pragma unroll
        for (int i = 0; i < TILES; i++) {
            uint4 a = load_matrices_transposed(row + 32 * i);
#pragma unroll
            for (int q = 0; q < NQ; q++) {
                float c[4] = {0, 0, 0, 0};
                if (call.bf16)
                    mma_bf16(c, a.x, a.y, a.z, a.w, column[q][0], column[q][1]);
                else
                    mma_f16(c, a.x, a.y, a.z, a.w, column[q][0], column[q][1]);
                exact(q, i, 0) = fmaf(c[0] + c[1], weight[q], exact(q, i, 0));
                exact(q, i, 1) = fmaf(c[2] + c[3], weight[q], exact(q, i, 1));
            }
        }
    }
};

/* A warp's way of bringing units in: stages of one part (keys or values of a unit) each. */
template <int D> struct feeder {
    const attend_call &call;
    const attend_unit *units; /* of this warp, `step` apart */
    uint32_t step, count;     /* units */
    uint32_t head, bars, ring, lane;
    uint32_t issued, slot; /* parts */
    uint4 next;            /* the unit that is issued next */

    KV_DEVICE feeder(const attend_call &c) : call(c) {}

    KV_DEVICE uint4 unit(uint32_t i) const {
        return __ldg((const uint4 *)(units + (size_t)min(i, count - 1) * step));
    }

    /* Brings the first units as far as the L2 cache, while the kernel before may still write
     * to them: the copies proper see what it wrote. */
    KV_DEVICE void prefetch() const {
#if KV_HAVE_BULK
        if (lane >= min(count, (call.stages + 1) / 2)) return;
        const uint4 u = unit(lane);
        const char *page = (const char *)((uint64_t)u.y << 32 | u.x);
        if (u.w >> 16 & 255) {
            page += (size_t)(head * 128 + (u.w >> 24) * ATTEND_SLICE) * (2 * D);
            prefetch_bulk(page, ATTEND_SLICE * 2 * D);
            prefetch_bulk(page + call.raw_value_offset, ATTEND_SLICE * 2 * D);
        } else {
            prefetch_bulk(page + (size_t)head * call.map.record_bytes, call.map.record_bytes);
        }
#endif
    }

    /* Queues part number `issued` into its stage. */
    KV_DEVICE void issue() {
        const uint32_t target = ring + slot * call.stage_bytes;
        if (issued < 2 * count) {
            const char *page = (const char *)((uint64_t)next.y << 32 | next.x);
            const bool raw = next.w >> 16 & 255, values = issued & 1;
            if (raw) {
                const char *source = page + (values ? call.raw_value_offset : 0) +
                                     (size_t)(head * 128 + (next.w >> 24) * ATTEND_SLICE) * (2 * D);
                copy_rows(target, source);
            } else {
                const char *source = page + (size_t)head * call.map.record_bytes;
                const uint32_t begin = values ? call.map.value_mean : 0;
                const uint32_t end = values ? call.map.record_bytes : call.map.value_mean;
                copy_run(target, source + begin, end - begin);
            }
            if (values) next = unit(issued / 2 + 1);
        }
#if !KV_HAVE_BULK
        copy_commit();
#endif
        issued++;
        if (++slot == call.stages) slot = 0;
    }

    KV_DEVICE void copy_rows(uint32_t target, const char *source) {
#if KV_HAVE_BULK
        if (lane == 0) barrier_expect(bars + slot * 8, ATTEND_SLICE * 2 * D);
        __syncwarp();
        if (lane < ATTEND_SLICE) copy_bulk(target + lane * (2 * D + 16), source + lane * (2 * D), 2 * D, bars + slot * 8);
#else
        for (uint32_t i = lane; i < ATTEND_SLICE * (D / 8); i += 32)
            copy_16(target + i / (D / 8) * (2 * D + 16) + i % (D / 8) * 16, source + i * 16);
#endif
    }

    KV_DEVICE void copy_run(uint32_t target, const char *source, uint32_t bytes) {
#if KV_HAVE_BULK
        if (lane == 0) {
            barrier_expect(bars + slot * 8, bytes);
            copy_bulk(target, source, bytes, bars + slot * 8);
        }
#else
        for (uint32_t i = lane * 16; i < bytes; i += 512) copy_16(target + i, source + i);
#endif
    }

    KV_DEVICE void wait(uint32_t stage, uint32_t parity) {
#if KV_HAVE_BULK
        barrier_wait(bars + stage * 8, parity);
#else
        if (call.stages == 2)
            copy_wait<1>();
        else
            copy_wait<2>();
        __syncwarp();
#endif
    }
};

/* Query element c of a vector. */
KV_DEVICE float query_element(const void *q, uint32_t dtype, size_t i) {
    if (dtype == KV_DTYPE_F32) return ((const float *)q)[i];
    if (dtype == KV_DTYPE_BF16) return __bfloat162float(((const __nv_bfloat16 *)q)[i]);
    return __half2float(((const __half *)q)[i]);
}

/* A query vector of a block, a part of it in every lane of a warp, on its way. */
template <int D> struct query_vector {
    float x[D / 32];
    uint32_t limit;
    bool exists;

    KV_DEVICE void load(const attend_call &call, const attend_item &item, uint32_t head, uint32_t vector, int lane) {
        exists = vector < item.vectors;
        const uint32_t row = exists ? vector / item.group : 0;
        const size_t first = exists ? ((size_t)row * item.heads_q + head * item.group + vector % item.group) * D : 0;
        limit = 0xffffffffu;
        if (exists) limit = call.visible[item.visible_first + row];
#pragma unroll
        for (int i = 0; i < D / 32; i++) x[i] = exists ? query_element(item.query, item.dtype, first + lane + 32 * i) : 0;
    }

    /* Lays it out in shared memory as vector v of the block: as [channel][4 vectors] f16,
     * scaled by a power of two so that the largest lies in [32, 64); and as B operands of two
     * 16-bit digits, f16 and, where raw pages are bf16, bf16. */
    template <int NQ>
    KV_DEVICE void store(const attend_call &call, const attend_item &item, const attend_layout &at, char *shared, int v, int lane) const {
        float most = 0;
#pragma unroll
        for (int i = 0; i < D / 32; i++) {
            most = fmaxf(most, fabsf(x[i]));
            if (!(fabsf(x[i]) < INFINITY)) most = INFINITY;
        }
        most = __uint_as_float(__reduce_max_sync(ALL, __float_as_uint(most)));
        const bool finite = most < INFINITY;
        const int exponent = most == 0 || !finite ? 0 : max(-120, min(120, 5 - ((int)(__float_as_uint(most) >> 23) - 127)));
        const float alpha = power_of_two(exponent);
        const int quad = v >> 2, in_quad = v & 3;
#pragma unroll
        for (int i = 0; i < D / 32; i++) {
            const int c = lane + 32 * i;
            const float y = x[i] * alpha;
            const __half high = __float2half_rn(y), low = __float2half_rn(y - __half2float(high));
            ((__half *)(shared + at.query))[(quad * D + c) * 4 + in_quad] = high;
            const int place = ((quad * (D / 32) + i) * 32 + (2 * in_quad) * 4 + (lane >> 3)) * 8 + (lane & 7);
            ((__half *)(shared + at.fragments))[place] = high;
            ((__half *)(shared + at.fragments))[place + 32] = low;
            if (call.bf16) {
                const __nv_bfloat16 h = __float2bfloat16_rn(y), l = __float2bfloat16_rn(y - __bfloat162float(h));
                ((__nv_bfloat16 *)(shared + at.fragments_raw))[place] = h;
                ((__nv_bfloat16 *)(shared + at.fragments_raw))[place + 32] = l;
            }
        }
        if (lane == 0) {
            ((float *)(shared + at.vectors))[v] = !exists ? 0 : finite ? item.score_scale * power_of_two(-exponent) : NAN;
            ((uint32_t *)(shared + at.vectors) + 4 * NQ)[v] = limit;
        }
    }
};

/* R of page.h on one vector in shared memory, by one warp. */
template <int D> KV_DEVICE void rotate(float *y, int lane) {
    constexpr int N = D & -D;
    for (int stride = 1; stride < N; stride *= 2) {
        for (int i = lane; i < D / 2; i += 32) {
            const int c = i / stride * 2 * stride + i % stride;
            const float a = y[c], b = y[c + stride];
            y[c] = a + b;
            y[c + stride] = a - b;
        }
        __syncwarp();
    }
    const float norm = rsqrtf((float)N);
    for (int c = lane; c < D; c += 32) y[c] *= norm;
    __syncwarp();
}

/* How a vector's result goes out: x * value + y * what is there. */
struct closing {
    float x, y;
};

/* One thread a vector: its lse is written, and merged with what is there if the item asks. */
KV_DEVICE closing close_vector(const attend_item &item, size_t at, float largest, float sum) {
    const float mine = sum == 0 ? -INFINITY : (largest + log2f(sum)) * 0.6931471805599453f;
    closing out = {sum == 0 ? 0 : 1.0f / sum, 0};
    float lse = mine;
    if (item.merge) {
        const float other = item.lse[at], most = fmaxf(other, mine);
        if (most > -INFINITY) {
            const float a = expf(other - most), b = expf(mine - most);
            out.x *= b / (a + b), out.y = a / (a + b);
            lse = most + logf(a + b);
        }
    }
    item.lse[at] = lse;
    return out;
}

KV_DEVICE void add_times(float4 &sum, float4 x, float f) {
    sum.x = fmaf(x.x, f, sum.x), sum.y = fmaf(x.y, f, sum.y), sum.z = fmaf(x.z, f, sum.z), sum.w = fmaf(x.w, f, sum.w);
}

KV_DEVICE void write_four(float *out, float4 x, closing how, bool merge) {
    float4 result = {0, 0, 0, 0};
    add_times(result, x, how.x);
    if (merge) add_times(result, make_float4(out[0], out[1], out[2], out[3]), how.y);
    if (((uintptr_t)out & 15) == 0)
        *(float4 *)out = result;
    else
        out[0] = result.x, out[1] = result.y, out[2] = result.z, out[3] = result.w;
}

/* bench.cu's way of seeing where a launch's time goes. */
#ifdef KV_ATTEND_TRACE
enum { TRACE_BLOCKS = 1024, TRACE_POINTS = 12 };
__device__ long long trace_times[TRACE_BLOCKS][TRACE_POINTS];
KV_DEVICE void trace(int point) {
    if (threadIdx.x != 0 || blockIdx.x >= TRACE_BLOCKS) return;
    long long now;
    if (point == 0)
        asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    else
        now = clock64();
    trace_times[blockIdx.x][point] = now;
}
#else
KV_DEVICE void trace(int) {}
#endif

template <int D, int MODE, int NQ, int THREADS, int BLOCKS>
__global__ void __launch_bounds__(THREADS, BLOCKS) attend(const __grid_constant__ attend_call call) {
    constexpr int VECTORS = 4 * NQ, TILES = D / 16;
    constexpr bool MINMAX = MODE == ATTEND_MINMAX, ROTATED = MODE == ATTEND_ROTATED;
    extern __shared__ __align__(128) char shared[];
    __shared__ uint32_t last;
    __shared__ closing closings[4 * NQ];
    /* Said this way, the compiler knows that it is the same in all lanes. */
    const int lane = threadIdx.x & 31, warp = __shfl_sync(ALL, threadIdx.x >> 5, 0);
    const int threads = blockDim.x, warps = threads / 32;
    trace(0), trace(1);
    const attend_layout at = attend_layout_of(D, MINMAX, call.group_log, NQ, warps, call.stages, call.stage_bytes);

    uint32_t which = 0;
    for (uint32_t step = KV_ITEMS_MAX / 2; step > 0; step /= 2)
        if (which + step < call.item_count && call.block_first[which + step] <= blockIdx.x) which += step;
    const attend_item &item = call.items[which];
    uint32_t rest = blockIdx.x - item.block_first;
    const uint32_t part = rest;
    const uint32_t split = rest % item.splits;
    rest /= item.splits;
    const uint32_t sequence = rest; /* of this item: head and vector block */
    const uint32_t block = rest % item.vector_blocks, head = rest / item.vector_blocks;

    const uint32_t first = (uint64_t)item.unit_count * split / item.splits;
    const uint32_t end = (uint64_t)item.unit_count * (split + 1) / item.splits;

    worker<D, MODE, NQ> work(call, lane);
    feeder<D> feed(call);
    feed.units = call.units + item.unit_first + first + warp;
    feed.step = warps;
    feed.count = first + warp < end ? (end - first - warp + warps - 1) / warps : 0;
    feed.head = head, feed.lane = lane;
    feed.bars = shared_address(shared) + at.barriers + warp * 32;
    feed.ring = shared_address(shared) + at.ring + warp * call.stages * call.stage_bytes;
    feed.issued = feed.slot = 0;
    uint4 unit = {0, 0, 0, 0};
    if (lane == 0) {
        for (uint32_t i = 0; i < call.stages; i++) barrier_init(feed.bars + i * 8);
        barrier_init_done();
        fence_bulk();
    }
    launch_next();
    /* Units come from a copy, which a kernel behind it has waited for before it starts. */
    if (feed.count > 0) unit = feed.next = feed.unit(0);
    if (call.ahead) feed.prefetch();
    __syncthreads();
    wait_previous();
    trace(2);
    /* The query is asked for before the copies are: behind them it would wait for them all. */
    query_vector<D> vector;
    if (warp < VECTORS) vector.load(call, item, head, block * VECTORS + warp, lane);
    /* Keys first: while all warps wait for their first, nothing else should be on its way. */
    if (feed.count > 0) feed.issue();
    trace(3);
    for (int v = warp; v < VECTORS; v += warps) {
        if (v != warp) vector.load(call, item, head, block * VECTORS + v, lane);
        vector.template store<NQ>(call, item, at, shared, v, lane);
    }
    if (feed.count > 0) {
        for (uint32_t i = 1; i < call.stages; i++) feed.issue();
    }
    __syncthreads();
    trace(4);
    work.query = shared_address(shared) + at.query;
    work.fragments = shared_address(shared) + at.fragments;
    work.fragments_raw = shared_address(shared) + at.fragments_raw;
    work.words = shared_address(shared) + at.scratch + warp * at.scratch_bytes;
    work.zeros = work.words + NQ * D * 8;
    work.coarse = item.dtype == KV_DTYPE_F32 ? 0.12f : 1.0f;
#pragma unroll
    for (int q = 0; q < NQ; q++) {
        work.unscale[q] = ((const float *)(shared + at.vectors))[4 * q + (lane & 3)];
        work.limit[q] = ((const uint32_t *)(shared + at.vectors))[VECTORS + 4 * q + (lane & 3)];
    }

    uint32_t stage = 0, parity = 0;
    for (uint32_t i = 0; i < feed.count; i++) {
        const uint32_t token = unit.z, tokens = unit.w & 0xffff;
        const bool raw = unit.w >> 16 & 255;
        unit = feed.unit(i + 1);
        float weight[NQ];
        if (!raw) {
            float p[NQ][8][2], page_sum[NQ], value_factor = 0;
            feed.wait(stage, parity);
            if (i == 0) trace(5);
            work.packed_keys(feed.ring + stage * call.stage_bytes, token, p, weight, page_sum, value_factor);
            __syncwarp();
            feed.issue();
            if (++stage == call.stages) stage = 0, parity ^= 1;
            feed.wait(stage, parity);
            work.packed_values(feed.ring + stage * call.stage_bytes, p, weight, page_sum, value_factor);
        } else {
            uint32_t column[NQ][8];
            feed.wait(stage, parity);
            if (i == 0) trace(5);
            work.raw_keys(feed.ring + stage * call.stage_bytes, token, tokens, column, weight);
            __syncwarp();
            feed.issue();
            if (++stage == call.stages) stage = 0, parity ^= 1;
            feed.wait(stage, parity);
            work.raw_values(feed.ring + stage * call.stage_bytes, tokens, column, weight);
        }
        __syncwarp();
        feed.issue();
        if (++stage == call.stages) stage = 0, parity ^= 1;
    }
#if !KV_HAVE_BULK
    copy_wait<0>();
#endif

    /* The warps of the block, one result: [warp][vector][channel] in the ring's place, how much
     * each row counts, and the sums of rows over warps in the end. */
    trace(6);
    __syncthreads();
    trace(7);
    constexpr int ROW = D + 4, FOURS = D / 4;
    float *outs = (float *)(shared + at.ring), *outs_plain = outs + warps * VECTORS * ROW;
    float *largest = outs + (ROTATED ? 2 : 1) * warps * VECTORS * ROW, *sums = largest + warps * VECTORS;
    const int g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int q = 0; q < NQ; q++) {
        const int slot = warp * VECTORS + 4 * q + t;
        if (g == 0) largest[slot] = work.largest[q], sums[slot] = work.sum[q];
#pragma unroll
        for (int i = 0; i < TILES; i++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                outs[slot * ROW + 16 * i + g + 8 * r] = work.coded[q][i][r] + work.zero[q];
                if (ROTATED) outs_plain[slot * ROW + 16 * i + g + 8 * r] = work.plain[q][i][r];
            }
    }
    __syncthreads();

    const uint32_t vectors = min((uint32_t)VECTORS, item.vectors - block * VECTORS);
    const bool alone = item.splits == 1;
    float *parts = call.parts + (size_t)(item.part_first + part - split) * VECTORS * ROW;
    float *mine = parts + (size_t)split * VECTORS * ROW;
    auto row_of = [&](uint32_t v) {
        const uint32_t vector = block * VECTORS + v;
        return (size_t)(vector / item.group) * item.heads_q + head * item.group + vector % item.group;
    };
    for (int i = threadIdx.x; i < VECTORS * FOURS; i += threads) {
        const uint32_t v = i / FOURS, c = i % FOURS * 4;
        float most = -INFINITY, total = 0;
        for (int w = 0; w < warps; w++) most = fmaxf(most, largest[w * VECTORS + v]);
        const float base = most == -INFINITY ? 0 : most;
        float4 x = {0, 0, 0, 0}, y = {0, 0, 0, 0};
#pragma unroll 4
        for (int w = 0; w < warps; w++) {
            const float f = exp2_fast(largest[w * VECTORS + v] - base);
            total += f * sums[w * VECTORS + v];
            add_times(x, *(const float4 *)&outs[(w * VECTORS + v) * ROW + c], f);
            if (ROTATED) add_times(y, *(const float4 *)&outs_plain[(w * VECTORS + v) * ROW + c], f);
        }
        /* Only this thread has read these four channels. */
        if (ROTATED || alone) *(float4 *)&outs[v * ROW + c] = x;
        if (ROTATED) *(float4 *)&outs_plain[v * ROW + c] = y;
        if (!alone && v < vectors) {
            if (!ROTATED) __stcg((float4 *)(mine + v * ROW + c), x);
            if (c == 0) __stcg((float2 *)(mine + v * ROW + D), make_float2(most, total));
        }
        if (alone && c == 0 && v < vectors) closings[v] = close_vector(item, row_of(v), most, total);
    }
    if (ROTATED) {
        __syncthreads();
        for (int v = warp; v < VECTORS; v += warps) {
            rotate<D>(outs + v * ROW, lane);
            for (int c = lane; c < D; c += 32) {
                const float x = outs[v * ROW + c] + outs_plain[v * ROW + c];
                outs[v * ROW + c] = x;
                if (!alone && v < vectors) __stcg(mine + v * ROW + c, x);
            }
        }
    }
    __syncthreads();
    trace(8);
    if (alone) {
        for (uint32_t i = threadIdx.x; i < vectors * D; i += threads) {
            const uint32_t v = i / D, c = i % D;
            float *out = item.out + row_of(v) * D + c;
            *out = closings[v].x * outs[v * ROW + c] + (item.merge ? closings[v].y * *out : 0);
        }
        return;
    }

    /* The last block of a sequence to come makes one result of all their parts.  Its loads are
     * under way together: one visit to memory, not one for each step. */
    if (threadIdx.x == 0) {
        unsigned *counter = call.counters + item.counter_first + sequence;
        last = add_acquire_release(counter, 1) == item.splits - 1;
        if (last) *counter = 0;
    }
    __syncthreads();
    trace(9);
    if (!last) return;
    constexpr int COLUMNS = VECTORS * FOURS, AHEAD = 8;
    const int teams = threads / COLUMNS > 0 ? threads / COLUMNS : 1, team = threadIdx.x / COLUMNS;
    const int splits = (int)item.splits;
    float *factor = (float *)(shared + at.query); /* [vector][split]; what lies there is done with */
    float4 *rows = (float4 *)(factor + VECTORS * splits); /* [team][column] */
    auto column_of = [&](int s, int column) {
        return (const float4 *)(parts + ((size_t)s * VECTORS + column / FOURS) * ROW + column % FOURS * 4);
    };
    float4 ahead[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
        const int s = team + i * teams, column = threadIdx.x % COLUMNS;
        ahead[i] = {0, 0, 0, 0};
        if (team < teams && s < splits && column / FOURS < (int)vectors) ahead[i] = __ldcg(column_of(s, column));
    }
    for (int v = warp; v < (int)vectors; v += warps) {
        auto pair_of = [&](int s) { return __ldcg((const float2 *)(parts + ((size_t)s * VECTORS + v) * ROW + D)); };
        const float2 mine = lane < splits ? pair_of(lane) : make_float2(-INFINITY, 0);
        float most = mine.x, total = 0;
        for (int s = lane + 32; s < splits; s += 32) most = fmaxf(most, pair_of(s).x);
        for (int o = 16; o > 0; o /= 2) most = fmaxf(most, __shfl_xor_sync(ALL, most, o));
        const float base = most == -INFINITY ? 0 : most;
        for (int s = lane; s < splits; s += 32) {
            const float2 one = s == lane ? mine : pair_of(s);
            const float f = exp2_fast(one.x - base);
            factor[v * splits + s] = f;
            total += f * one.y;
        }
        for (int o = 16; o > 0; o /= 2) total += __shfl_xor_sync(ALL, total, o);
        if (lane == 0) closings[v] = close_vector(item, row_of(v), most, total);
    }
    __syncthreads();
    if (teams == 1 && team > 0) return;
    for (int column = threadIdx.x % COLUMNS; column < COLUMNS; column += teams > 1 ? COLUMNS : threads) {
        const int v = column / FOURS;
        float4 x = {0, 0, 0, 0};
        if (team < teams && v < (int)vectors) {
            const bool first = column == (int)threadIdx.x % COLUMNS;
#pragma unroll
            for (int i = 0; i < AHEAD; i++) {
                const int s = team + i * teams;
                if (s < splits) add_times(x, first ? ahead[i] : __ldcg(column_of(s, column)), factor[v * splits + s]);
            }
#pragma unroll 8
            for (int s = team + AHEAD * teams; s < splits; s += teams)
                add_times(x, __ldcg(column_of(s, column)), factor[v * splits + s]);
        }
        if (teams > 1) {
            if (team < teams) rows[team * COLUMNS + column] = x;
            __syncthreads();
            if (team > 0) return;
            for (int other = 1; other < teams; other++) add_times(x, rows[other * COLUMNS + column], 1.0f);
        }
        if (v >= (int)vectors) continue;
        write_four(item.out + row_of(v) * D + column % FOURS * 4, x, closings[v], item.merge);
    }
    trace(10);
}

} // namespace

#endif
