/* SPDX-License-Identifier: Apache-2.0 */
/* quantize.cu - raw pages to packed pages under UNBIASED codecs, bit for bit as page.h says.
 *
 * A block of threads makes the key half or the value half of one head record.  The half
 * page lies in shared memory as [token][channel], 16 bits each: first elements, then their
 * fixed-point integers u.
 *
 *   keys     a thread owns a channel until importance is known, then a slot: a warp then has
 *            slots of one quarter, and searches only the widths that some mix gives it
 *   values   a thread owns a token; where values are rotated, a warp does until there is u
 *
 * The search over 16 ranges needs sums over codes, all exact integers.
 *
 * Width 2.  A code counts how many of its range's three thresholds u has reached, so all
 * sums follow from how many u lie above each threshold, and what they add up to.  The 48
 * thresholds of the 16 ranges are constants, 41 of them different: u is sent through a table
 * to its interval, and each thread keeps number and sum of u by interval.  Against trying
 * each range on each element this is a quarter of the instructions.
 *
 * Width 4.  240 thresholds are too many to keep; ranges are tried, four elements at a time.
 * The bits of an integer below 2048, read as f16, are that integer times 2^-24, and f16
 * rounds to whole multiples of that there: fma(x, -m, top) with relu is top minus the code,
 * product, rounding and both clamps in one instruction for two elements.  Three byte dot
 * products per four elements keep the sums.
 */
#include <algorithm>

#include "kernels/cuda/cuda.h"
#include "kernels/cuda/page.cuh"

namespace {

constexpr uint32_t ALL = 0xffffffffu;

struct quantize_call {
    page_shape shape;
    struct kv_quantize items[KV_ITEMS_MAX];
};

/* kv_range_step2 and kv_range_step4 depend on a + b only. */
#define RANGE_STEPS2 {0x1601, 0x1686, 0x1725, 0x17e6, 0x186a, 0x1901, 0x19c6}
#define RANGE_STEPS4 {0x1f81, 0x2014, 0x2077, 0x20f0, 0x2184, 0x2241, 0x2337}
#define RANGE_OFFSETS {0, 164, 328, 491}
__device__ constexpr uint16_t STEP2[7] = RANGE_STEPS2;
__device__ constexpr uint16_t STEP4[7] = RANGE_STEPS4;
__device__ constexpr int OFFSET[KV_RANGES] = RANGE_OFFSETS;

/* ---- thresholds of width 2 ------------------------------------------------------------ */

/* The least u whose code under range (a, b) is k or more.  No (u - A) m of the table lies
 * half way between two integers, so rounding to even never decides. */
constexpr int threshold_of(int a, int b, int k) {
    const int steps[7] = RANGE_STEPS2, offsets[KV_RANGES] = RANGE_OFFSETS;
    const int bits = steps[a + b], whole = 1024 + (bits & 1023); /* m = whole 2^(exponent - 25) */
    const long long above = (long long)(2 * k - 1) << (25 - (bits >> 10)), per = 2 * whole;
    return offsets[a] + (int)((above + per - 1) / per);
}

struct threshold_table {
    int count;
    int rank[16][3];                 /* of [4 a + b][k - 1] among the different ones, from 1 */
    alignas(16) uint8_t interval[KV_UNITS + 1]; /* how many thresholds u has reached */
};

constexpr threshold_table make_thresholds() {
    threshold_table out = {};
    bool is_threshold[KV_UNITS + 2] = {};
    for (int i = 0; i < 16; i++)
        for (int k = 1; k <= 3; k++) is_threshold[threshold_of(i / 4, i % 4, k)] = true;
    for (int u = 0; u <= KV_UNITS; u++) {
        out.count += is_threshold[u];
        out.interval[u] = (uint8_t)out.count;
    }
    for (int i = 0; i < 16; i++)
        for (int k = 1; k <= 3; k++) out.rank[i][k - 1] = out.interval[threshold_of(i / 4, i % 4, k)];
    return out;
}

constexpr threshold_table THRESHOLDS = make_thresholds();
constexpr int INTERVALS = THRESHOLDS.count + 1;
__device__ constexpr threshold_table device_thresholds = THRESHOLDS;

/* Number and sum of u in one word: 256 times 2047 takes 19 bits, three of them 21. */
constexpr int NUMBER_SHIFT = 21;

/* A thread's intervals are STRIDE words apart. */
template <int STRIDE> struct tally {
    uint32_t *words;
    const uint8_t *interval;

    KV_DEVICE void clear() const {
        for (int i = 0; i < INTERVALS; i++) words[i * STRIDE] = 0;
    }
    KV_DEVICE void add(uint32_t u0, uint32_t u1, uint32_t u2, uint32_t u3) const {
        const uint32_t i0 = interval[u0], i1 = interval[u1], i2 = interval[u2], i3 = interval[u3];
        words[i0 * STRIDE] += u0 + (1u << NUMBER_SHIFT);
        words[i1 * STRIDE] += u1 + (1u << NUMBER_SHIFT);
        words[i2 * STRIDE] += u2 + (1u << NUMBER_SHIFT);
        words[i3 * STRIDE] += u3 + (1u << NUMBER_SHIFT);
    }
    /* From each interval to all above it too. */
    KV_DEVICE void accumulate() const {
        uint32_t sum = 0;
#pragma unroll
        for (int i = INTERVALS - 1; i > 0; i--) words[i * STRIDE] = sum += words[i * STRIDE];
    }
};

/* Rows of 2 D + 8 bytes: conflict-free for a thread per token and for a thread per channel. */
template <int D> struct half_page {
    static constexpr int ROW = D + 4;
    uint16_t x[T][ROW];

    KV_DEVICE void load(const uint16_t *source, int thread, int threads) {
        for (int i = thread; i < T * D / 8; i += threads) {
            const int t = i / (D / 8), c = i % (D / 8) * 8;
            const uint4 v = *(const uint4 *)(source + t * D + c);
            *(uint2 *)&x[t][c] = make_uint2(v.x, v.y);
            *(uint2 *)&x[t][c + 4] = make_uint2(v.z, v.w);
        }
    }
};

/* ---- the group rule ---------------------------------------------------------------------- */

struct choice {
    float scale, error;
    int sum;
    float offset, step; /* of the range chosen; width 1: neither */
};

/* What page.h asks of candidates, one after the other. */
struct contest {
    int n, SU;
    float power, unit;
    float best;
    int covariance, sum, winner;

    KV_DEVICE contest(int n_, int SU_, float power_, float unit_)
        : n(n_), SU(SU_), power(power_), unit(unit_), best(0), covariance(1), sum(0), winner(0) {}

    KV_DEVICE void enter(int candidate, int SC, int SCC, int SCU) {
        const int X = n * SCU - SC * SU, Q = n * SCC - SC * SC;
        if (Q == 0 || X <= 0) return;
        const float merit = __fdiv_rn(__fmul_rn((float)X, (float)X), (float)Q);
        if (merit > best) best = merit, covariance = X, sum = SC, winner = candidate;
    }
    KV_DEVICE choice close() const {
        choice out = {0, 0, sum, 0, 0};
        out.scale = __fmul_rn(__fdiv_rn(power, (float)covariance), unit);
        out.error = __fmul_rn(power, __fsub_rn(__fdiv_rn(power, best), 1.0f));
        return out;
    }
};

KV_DEVICE void set_range(choice &out, const uint16_t (&steps)[7], int winner) {
    const int a = winner >> 2, i = a + (winner & 3);
    uint32_t step = steps[0];
#pragma unroll
    for (int j = 1; j < 7; j++)
        if (i == j) step = steps[j];
    out.step = f32_of_f16((uint16_t)step);
    out.offset = (float)(a == 0 ? OFFSET[0] : a == 1 ? OFFSET[1] : a == 2 ? OFFSET[2] : OFFSET[3]);
}

/* Width 2, from accumulated intervals. */
template <int STRIDE> KV_DEVICE choice choose2(const tally<STRIDE> &tally, int n, int SU, float power, float unit) {
    constexpr uint32_t SUM_MASK = (1u << NUMBER_SHIFT) - 1;
    contest contest(n, SU, power, unit);
#pragma unroll
    for (int i = 0; i < 16; i++) {
        const uint32_t one = tally.words[device_thresholds.rank[i][0] * STRIDE], two = tally.words[device_thresholds.rank[i][1] * STRIDE],
                       three = tally.words[device_thresholds.rank[i][2] * STRIDE], all = one + two + three;
        const int SC = (int)(all >> NUMBER_SHIFT);
        const int SCC = SC + 2 * (int)(two >> NUMBER_SHIFT) + 4 * (int)(three >> NUMBER_SHIFT);
        contest.enter(i, SC, SCC, (int)(all & SUM_MASK));
    }
    choice out = contest.close();
    set_range(out, STEP2, contest.winner);
    return out;
}

/* Width 4; get(i) gives elements 4 i .. 4 i + 3 as {u0 | u1 << 16, u2 | u3 << 16}. */
template <class Get> KV_DEVICE choice choose4(Get get, int n, int SU, float power, float unit) {
    constexpr uint32_t TOP = 15;
    uint32_t SD[16], SDD[16], SDU[16]; /* of 15 - code */
#pragma unroll
    for (int i = 0; i < 16; i++) SD[i] = SDD[i] = SDU[i] = 0;
#pragma unroll 1
    for (int i = 0; i < n / 4; i++) {
        const uint2 u = get(i);
#pragma unroll
        for (int a = 0; a < 4; a++) {
            const uint32_t x0 = above_offset(u.x, OFFSET[a]), x1 = above_offset(u.y, OFFSET[a]);
#pragma unroll
            for (int b = 0; b < 4; b++) {
                const uint32_t step = (STEP4[a + b] ^ 0x8000u) * 0x10001u;
                const uint32_t d0 = fma2_relu(x0, step, TOP * 0x10001u), d1 = fma2_relu(x1, step, TOP * 0x10001u);
                const uint32_t d = __byte_perm(d0, d1, 0x6420);
                const int k = 4 * a + b;
                SD[k] = __dp4a(d, 0x01010101u, SD[k]);
                SDD[k] = __dp4a(d, d, SDD[k]);
                SDU[k] = __dp2a_hi(u.y, d, __dp2a_lo(u.x, d, SDU[k]));
            }
        }
    }
    contest contest(n, SU, power, unit);
#pragma unroll
    for (int k = 0; k < 16; k++)
        contest.enter(k, (int)TOP * n - (int)SD[k], (int)(TOP * TOP) * n - 2 * (int)TOP * (int)SD[k] + (int)SDD[k],
                      (int)TOP * SU - (int)SDU[k]);
    choice out = contest.close();
    set_range(out, STEP4, contest.winner);
    return out;
}

/* Width 1 has one candidate. */
template <class Get> KV_DEVICE choice choose1(Get get, int n, int SU, float power, float unit) {
    const uint32_t least = (uint32_t)SU / (uint32_t)n; /* n u > SU as u > floor(SU / n) */
    int SC = 0, SCU = 0;
    for (int i = 0; i < n / 4; i++) {
        const uint2 pair = get(i);
        const uint32_t u[4] = {pair.x & 0xffff, pair.x >> 16, pair.y & 0xffff, pair.y >> 16};
#pragma unroll
        for (int e = 0; e < 4; e++)
            if (u[e] > least) SC++, SCU += (int)u[e];
    }
    contest contest(n, SU, power, unit);
    const int X = n * SCU - SC * SU, Q = n * SC - SC * SC;
    contest.best = __fdiv_rn(__fmul_rn((float)X, (float)X), (float)Q);
    contest.covariance = X, contest.sum = SC;
    return contest.close();
}

/* Codes of one group as they are asked for, in the low byte. */
template <int W> struct coder {
    float offset, step;
    uint32_t least;

    KV_DEVICE coder(const choice &choice, int n, int SU)
        : offset(8388608.0f + choice.offset), step(choice.step), least((uint32_t)SU / (uint32_t)n) {}

    KV_DEVICE uint32_t operator()(uint32_t u) const {
        if (W == 1) return u > least;
        constexpr float ROUND = 12582912.0f; /* leaves an integer in the low bits */
        const float x = __fsub_rn(__uint_as_float(u | 0x4b000000u), offset);
        const float y = __fmaf_rn(x, step, ROUND); /* the product is exact: one rounding */
        return __float_as_uint(fminf(fmaxf(y, ROUND), ROUND + (float)((1 << W) - 1)));
    }
};

struct group_fix {
    float low, per_unit, unit;
    bool constant;
};

KV_DEVICE group_fix fix_range(float low, float high) {
    group_fix out;
    out.low = __fadd_rn(low, 0.0f); /* -0 becomes +0 */
    const float span = __fsub_rn(high, out.low);
    out.constant = span <= 1e-8f;
    out.per_unit = out.constant ? 0 : __fdiv_rn((float)KV_UNITS, span);
    out.unit = out.constant ? 0 : __fdiv_rn(span, (float)KV_UNITS);
    return out;
}

/* Constant groups: per_unit is 0, and so is u. */
KV_DEVICE uint32_t fix_element(const group_fix &fix, float x) {
    const float u = __fmul_rn(__fsub_rn(x, fix.low), fix.per_unit);
    return __float_as_uint(__fadd_rn(u, 12582912.0f)) & 0xffff; /* rounded by the sum */
}

KV_DEVICE float fix_mean(const group_fix &fix, int SU, int n) {
    if (fix.constant) return fix.low;
    return __fadd_rn(fix.low, __fmul_rn(__fdiv_rn((float)SU, (float)n), fix.unit));
}

/* One kind of scales under their page's factor. */
struct stored_scale {
    uint32_t byte;
    float scale; /* what the reader will have */
};
KV_DEVICE stored_scale store_scale(float scale, uint16_t factor) {
    const float step = __fdiv_rn(f32_of_f16(factor), 448.0f);
    stored_scale out;
    out.byte = factor == 0 ? 0 : e4m3_saturated(__fdiv_rn(scale, step));
    out.scale = __fmul_rn(f32_of_e4m3(out.byte), step);
    return out;
}

KV_DEVICE void copy_out(char *target, const char *staged, uint32_t bytes, int thread, int threads) {
    for (uint32_t i = 16 * thread; i < bytes; i += 16 * threads) *(uint4 *)(target + i) = *(const uint4 *)(staged + i);
}

/* ---- keys ---------------------------------------------------------------------------------- */

template <int D> constexpr int THREADS = D > T ? D : T;

template <int D> struct key_memory {
    half_page<D> page;
    union {
        alignas(16) uint32_t words[INTERVALS * D];
        char staged[16 + 4 * D + 4 * D * 16]; /* up to four quarters of width 4 */
    };
    alignas(16) uint8_t interval[KV_UNITS + 1];
    alignas(16) float importance[D];
    float power[D], unit[D], mean[D], weight[D]; /* by channel */
    int sum[D];
    float error[4][D]; /* by slot; of widths 0, 1, 2, 4 */
    float cost[KV_MIX_COUNT_MAX];
    int factor_bits;
    uint8_t order[D];
};

/* Codes of a slot's channel into its bytes; the first of them at `out`. */
template <int D, int W>
KV_DEVICE void pack_slot(const half_page<D> &page, int c, int k, const coder<W> &code, char *out) {
    constexpr int P = 8 / W;
#pragma unroll 1
    for (int u = 0; u < W; u++)
#pragma unroll 4
        for (int token = 0; token < 16; token++) {
            uint32_t byte = 0;
#pragma unroll
            for (int j = 0; j < P; j++) byte += code(page.x[16 * (u * P + j) + token][c]) << (W * j);
            const int m = row_of_token(token);
            out[u * 16 * k + (m & 7) * 2 * k + (m >> 3) * 4] = (char)byte;
        }
}

template <int D> KV_DEVICE void quantize_keys(const quantize_call &call, char *shared) {
    key_memory<D> &memory = *(key_memory<D> *)shared;
    const page_shape &shape = call.shape;
    const struct kv_quantize item = call.items[blockIdx.y];
    const int head = blockIdx.x, thread = threadIdx.x;
    const bool active = thread < D, bf16 = shape.bf16;
    const uint16_t *source = (const uint16_t *)item.raw + (size_t)head * T * D;
    char *record = (char *)item.packed + (size_t)head * shape.map.record_bytes;

    copy_out((char *)memory.interval, (const char *)device_thresholds.interval, sizeof memory.interval, thread, THREADS<D>);
    if (thread == 0) memory.factor_bits = 0;
    if (active) tally<D>{memory.words + thread, memory.interval}.clear();
    wait_previous();
    memory.page.load(source, thread, THREADS<D>);
    __syncthreads();

    /* A channel a thread. */
    if (active) {
        const int c = thread;
        float low = INFINITY, high = -INFINITY;
#pragma unroll 8
        for (int t = 0; t < T; t++) {
            const float x = f32_of_element(memory.page.x[t][c], bf16);
            low = fminf(low, x), high = fmaxf(high, x);
        }
        const group_fix fix = fix_range(low, high);
        const tally<D> mine = {memory.words + c, memory.interval};
        uint32_t SU = 0, squares = 0;
#pragma unroll 2
        for (int t = 0; t < T; t += 4) {
            uint32_t u[4];
#pragma unroll
            for (int i = 0; i < 4; i++) u[i] = fix_element(fix, f32_of_element(memory.page.x[t + i][c], bf16));
#pragma unroll
            for (int i = 0; i < 4; i++) {
                memory.page.x[t + i][c] = (uint16_t)u[i];
                SU += u[i], squares += u[i] * u[i];
            }
            if (shape.widths_used & 4) mine.add(u[0], u[1], u[2], u[3]);
        }
        if (shape.widths_used & 4) mine.accumulate();
        const float power = (float)((long long)T * squares - (long long)SU * SU);
        const float energy = item.energy == nullptr ? 1.0f : item.energy[head * D + c];
        const float weight = __fmul_rn(__fmul_rn(fix.unit, fix.unit), energy);
        memory.sum[c] = (int)SU;
        memory.power[c] = power;
        memory.unit[c] = fix.unit;
        memory.mean[c] = fix_mean(fix, (int)SU, T);
        memory.weight[c] = weight;
        memory.importance[c] = __fmul_rn(power, weight);
    }
    __syncthreads();
    if (active) {
        const int c = thread;
        const float importance = memory.importance[c];
        int slot = 0;
        for (int i = 0; i < D; i += 4) {
            const float4 other = *(const float4 *)&memory.importance[i];
            slot += other.x > importance || (other.x == importance && i < c);
            slot += other.y > importance || (other.y == importance && i + 1 < c);
            slot += other.z > importance || (other.z == importance && i + 2 < c);
            slot += other.w > importance || (other.w == importance && i + 3 < c);
        }
        memory.order[slot] = (uint8_t)c;
    }
    __syncthreads();

    /* A slot a thread.  Warps of a block differ in work, and which of a multiprocessor's four
     * schedulers has a warp depends on its number: blocks begin with different quarters. */
    const int slot = active ? (thread + 32 * (head + (int)blockIdx.y)) % D : 0;
    const int quarter = slot / (D / 4), c = memory.order[slot];
    const int SU = memory.sum[c];
    const float power = memory.power[c], unit = memory.unit[c];
    choice chosen[3] = {};
    if (active) {
        if (power > 0) {
            auto get = [&](int i) {
                const uint16_t *x = &memory.page.x[4 * i][c];
                constexpr int ROW = half_page<D>::ROW;
                return make_uint2(x[0] | (uint32_t)x[ROW] << 16, x[2 * ROW] | (uint32_t)x[3 * ROW] << 16);
            };
            const uint32_t widths = shape.quarter_widths[quarter];
            if (widths & 2) chosen[0] = choose1(get, T, SU, power, unit);
            if (widths & 4) chosen[1] = choose2(tally<D>{memory.words + c, memory.interval}, T, SU, power, unit);
            if (widths & 16) chosen[2] = choose4(get, T, SU, power, unit);
        }
        memory.error[0][slot] = memory.importance[c];
#pragma unroll
        for (int i = 0; i < 3; i++) memory.error[i + 1][slot] = __fmul_rn(chosen[i].error, memory.weight[c]);
    }
    __syncthreads();

    if (thread < (int)shape.mix_count) {
        float cost = 0;
        for (int q = 0; q < 4; q++) {
            const int w = shape.mixes[thread][q];
            const float *error = memory.error[w == 4 ? 3 : w];
#pragma unroll 8
            for (int s = q * (D / 4); s < (q + 1) * (D / 4); s++) cost = __fadd_rn(cost, error[s]);
        }
        memory.cost[thread] = cost;
    }
    __syncthreads();
    uint32_t mix = 0;
    float least = INFINITY;
    for (uint32_t i = 0; i < shape.mix_count; i++)
        if (memory.cost[i] < least) least = memory.cost[i], mix = i;
    const int w = shape.mixes[mix][quarter];
    const choice mine = w == 1 ? chosen[0] : w == 2 ? chosen[1] : w == 4 ? chosen[2] : choice{};
    if (active) atomicMax(&memory.factor_bits, __float_as_int(mine.scale)); /* not negative */
    __syncthreads();

    const uint16_t factor = f16_saturated(__int_as_float(memory.factor_bits));
    char *staged = memory.staged;
    if (active) {
        const stored_scale stored = store_scale(mine.scale, factor);
        float zero = memory.mean[c];
        if (w > 0) zero = __fsub_rn(zero, __fmul_rn(stored.scale, __fdiv_rn((float)mine.sum, (float)T)));
        ((uint8_t *)staged)[shape.map.key_order + slot] = (uint8_t)c;
        ((uint8_t *)staged)[shape.map.key_scale + slot] = (uint8_t)stored.byte;
        ((uint16_t *)(staged + shape.map.key_zero))[slot] = f16_saturated(zero);

        char *codes = staged + shape.map.key_codes;
        for (int q = 0; q < quarter; q++) codes += 4 * D * shape.mixes[mix][q];
        int k, start;
        chunk_of_slot<D>(slot % (D / 4), k, start);
        const int kk = slot % (D / 4) - start;
        codes += start * 16 * w + word_of_place(k, 0, kk) * 4 + (kk & 3);
        /* Of a constant channel u is 0 and so are the codes. */
        if (w == 1) pack_slot<D, 1>(memory.page, c, k, coder<1>(mine, T, SU), codes);
        if (w == 2) pack_slot<D, 2>(memory.page, c, k, coder<2>(mine, T, SU), codes);
        if (w == 4) pack_slot<D, 4>(memory.page, c, k, coder<4>(mine, T, SU), codes);
    }
    __syncthreads();
    /* The second word of the header is the value block's. */
    if (thread == 0) *(uint32_t *)record = mix | (uint32_t)factor << 16;
    if (thread == 1) *(uint2 *)(record + 8) = make_uint2(0, 0);
    copy_out(record + 16, staged + 16, shape.map.value_mean - 16, thread, THREADS<D>);
}

/* ---- values -------------------------------------------------------------------------------- */

template <int D> struct value_memory {
    half_page<D> page;
    union {
        alignas(16) uint32_t words[INTERVALS * T];
        char staged[2 * D + 2 * T + 4 * 4 * D * 2];
    };
    alignas(16) uint8_t interval[KV_UNITS + 1];
    alignas(16) float mean[D];
    float token_unit[T], token_mean[T];
    int token_sum[T];
    uint32_t token_squares[T];
    int factor_bits;
};

KV_DEVICE void elements_of(uint2 four, bool bf16, float (&x)[4]) {
    x[0] = bf16 ? low_bf16(four.x) : low_f16(four.x), x[1] = bf16 ? high_bf16(four.x) : high_f16(four.x);
    x[2] = bf16 ? low_bf16(four.y) : low_f16(four.y), x[3] = bf16 ? high_bf16(four.y) : high_f16(four.y);
}

/* Elements of the thread's token to u, less the means. */
template <int D> KV_DEVICE void fix_token(value_memory<D> &memory, int t, bool bf16) {
    float low = INFINITY, high = -INFINITY;
#pragma unroll 4
    for (int i = 0; i < D / 4; i++) {
        float x[4];
        elements_of(*(const uint2 *)&memory.page.x[t][4 * i], bf16, x);
        const float4 mean = *(const float4 *)&memory.mean[4 * i];
        const float y[4] = {__fsub_rn(x[0], mean.x), __fsub_rn(x[1], mean.y), __fsub_rn(x[2], mean.z), __fsub_rn(x[3], mean.w)};
#pragma unroll
        for (int e = 0; e < 4; e++) low = fminf(low, y[e]), high = fmaxf(high, y[e]);
    }
    const group_fix fix = fix_range(low, high);
    uint32_t SU = 0, squares = 0;
#pragma unroll 4
    for (int i = 0; i < D / 4; i++) {
        uint2 &four = *(uint2 *)&memory.page.x[t][4 * i];
        float x[4];
        elements_of(four, bf16, x);
        const float4 mean = *(const float4 *)&memory.mean[4 * i];
        const uint32_t u[4] = {fix_element(fix, __fsub_rn(x[0], mean.x)), fix_element(fix, __fsub_rn(x[1], mean.y)),
                               fix_element(fix, __fsub_rn(x[2], mean.z)), fix_element(fix, __fsub_rn(x[3], mean.w))};
#pragma unroll
        for (int e = 0; e < 4; e++) SU += u[e], squares += u[e] * u[e];
        four = make_uint2(u[0] | u[1] << 16, u[2] | u[3] << 16);
    }
    memory.token_unit[t] = fix.unit;
    memory.token_mean[t] = fix_mean(fix, (int)SU, D);
    memory.token_sum[t] = (int)SU;
    memory.token_squares[t] = squares;
}

/* The same of a rotated token, by a warp. */
template <int D> KV_DEVICE void fix_token_rotated(value_memory<D> &memory, int t, int lane, bool bf16) {
    float y[D / 32], low = INFINITY, high = -INFINITY;
#pragma unroll
    for (int e = 0; e < D / 32; e++)
        y[e] = __fsub_rn(f32_of_element(memory.page.x[t][lane + 32 * e], bf16), memory.mean[lane + 32 * e]);
    rotate_token<D>(y, lane);
#pragma unroll
    for (int e = 0; e < D / 32; e++) low = fminf(low, y[e]), high = fmaxf(high, y[e]);
    for (int o = 16; o > 0; o /= 2) {
        low = fminf(low, __shfl_xor_sync(ALL, low, o));
        high = fmaxf(high, __shfl_xor_sync(ALL, high, o));
    }
    const group_fix fix = fix_range(low, high);
    uint32_t SU = 0, squares = 0;
#pragma unroll
    for (int e = 0; e < D / 32; e++) {
        const uint32_t u = fix_element(fix, y[e]);
        memory.page.x[t][lane + 32 * e] = (uint16_t)u;
        SU += u, squares += u * u;
    }
    SU = __reduce_add_sync(ALL, SU), squares = __reduce_add_sync(ALL, squares);
    if (lane == 0) {
        memory.token_unit[t] = fix.unit;
        memory.token_mean[t] = fix_mean(fix, (int)SU, D);
        memory.token_sum[t] = (int)SU;
        memory.token_squares[t] = squares;
    }
}

/* Codes of a token into its bytes.  Where a unit's tiles go on in the next 32 tokens, its
 * bytes have codes of two tokens: staged starts out as zeros and is added to. */
template <int D, int W> KV_DEVICE void pack_token(const half_page<D> &page, int t, const coder<W> &code, bool constant, char *out) {
    constexpr int P = 8 / W, TILES = D / 16;
    constexpr bool WHOLE = TILES % P == 0;
    constexpr int STEP = WHOLE ? P : 1;
    const int n0 = TILES * (t >> 5), word0 = (t >> 2 & 3) * 4 + 2 * (t >> 4 & 1);
#pragma unroll 1
    for (int i = 0; i < TILES; i += STEP) {
        const int n = n0 + i, shift = WHOLE ? 0 : W * (n % P) ;
        char *unit = out + n / P * 512;
#pragma unroll 4
        for (int m = 0; m < 16; m += 2) {
            uint32_t byte[2] = {0, 0};
#pragma unroll
            for (int j = 0; j < STEP; j++) {
                const uint32_t u = *(const uint32_t *)&page.x[t][16 * (i + j) + m];
                byte[0] += code(u & 0xffff) << (W * j), byte[1] += code(u >> 16) << (W * j);
            }
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const int word = (m + e & 7) * 16 + word0 + (m >> 3);
                if (WHOLE)
                    unit[4 * word + (t & 3)] = constant ? 0 : (char)byte[e];
                else if (!constant)
                    atomicOr((uint32_t *)unit + word, (byte[e] & ((1u << W) - 1)) << (8 * (t & 3) + shift));
            }
        }
    }
}

template <int D> KV_DEVICE void quantize_values(const quantize_call &call, char *shared) {
    value_memory<D> &memory = *(value_memory<D> *)shared;
    const page_shape &shape = call.shape;
    const struct kv_quantize item = call.items[blockIdx.y];
    const int head = blockIdx.x, thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
    const bool bf16 = shape.bf16, active = thread < T;
    const int w = shape.value_bits;
    const uint16_t *source = (const uint16_t *)item.raw + (size_t)(shape.heads + head) * T * D;
    char *record = (char *)item.packed + (size_t)head * shape.map.record_bytes;

    copy_out((char *)memory.interval, (const char *)device_thresholds.interval, sizeof memory.interval, thread, THREADS<D>);
    if (thread == 0) memory.factor_bits = 0;
    wait_previous();
    memory.page.load(source, thread, THREADS<D>);
    __syncthreads();
    for (int c = thread; c < D; c += THREADS<D>) {
        float part[8] = {};
        for (int t = 0; t < T; t += 8)
#pragma unroll
            for (int j = 0; j < 8; j++) part[j] = __fadd_rn(part[j], f32_of_element(memory.page.x[t + j][c], bf16));
        const float sum = __fadd_rn(__fadd_rn(__fadd_rn(part[0], part[1]), __fadd_rn(part[2], part[3])),
                                    __fadd_rn(__fadd_rn(part[4], part[5]), __fadd_rn(part[6], part[7])));
        memory.mean[c] = f32_of_f16(f16_saturated(__fdiv_rn(sum, (float)T)));
    }
    __syncthreads();
    if (shape.rotated)
        for (int t = warp; t < T; t += THREADS<D> / 32) fix_token_rotated<D>(memory, t, lane, bf16);
    else if (active)
        fix_token<D>(memory, thread, bf16);
    __syncthreads();

    const int t = active ? thread : 0, SU = memory.token_sum[t];
    const float unit = memory.token_unit[t], mean = memory.token_mean[t];
    const float power = (float)((long long)D * memory.token_squares[t] - (long long)SU * SU);
    choice mine = {};
    if (active && power > 0) {
        auto get = [&](int i) { return *(const uint2 *)&memory.page.x[t][4 * i]; };
        if (w == 2) {
            const tally<T> own = {memory.words + t, memory.interval};
            own.clear();
#pragma unroll 2
            for (int i = 0; i < D / 4; i++) {
                const uint2 u = get(i);
                own.add(u.x & 0xffff, u.x >> 16, u.y & 0xffff, u.y >> 16);
            }
            own.accumulate();
            mine = choose2(own, D, SU, power, unit);
        } else {
            mine = choose1(get, D, SU, power, unit);
        }
    }
    const float zero = __fsub_rn(mean, __fmul_rn(mine.scale, __fdiv_rn((float)mine.sum, (float)D)));
    const bool constant = mine.scale == 0 || fabsf(zero) > __fmul_rn(31.0f, mine.scale);
    if (constant) mine.sum = 0, mine.scale = __fdiv_rn(fabsf(mean), 31.0f);
    if (active) atomicMax(&memory.factor_bits, __float_as_int(mine.scale));
    __syncthreads();

    const struct kv_page_map &map = shape.map;
    const uint16_t factor = f16_saturated(__int_as_float(memory.factor_bits));
    char *staged = memory.staged - map.value_mean;
    constexpr bool ADDED = D / 16 % 8 != 0; /* pack_token adds at some width */
    if (ADDED) {
        for (uint32_t i = thread; i < (map.record_bytes - map.value_codes) / 4; i += THREADS<D>)
            ((uint32_t *)(staged + map.value_codes))[i] = 0;
        __syncthreads();
    }
    for (int c = thread; c < D; c += THREADS<D>)
        ((uint16_t *)(staged + map.value_mean))[c] = __half_as_ushort(__float2half_rn(memory.mean[c]));
    if (active) {
        const stored_scale stored = store_scale(mine.scale, factor);
        int quarters = 0;
        if (stored.scale != 0) {
            const float x = __fdiv_rn(__fsub_rn(mean, __fmul_rn(stored.scale, __fdiv_rn((float)mine.sum, (float)D))),
                                      __fdiv_rn(stored.scale, 4.0f));
            quarters = x < -128.0f ? -128 : x > 127.0f ? 127 : __float2int_rn(x);
        }
        ((uint8_t *)staged)[map.value_scale + t] = (uint8_t)stored.byte;
        ((int8_t *)staged)[map.value_zero + t] = (int8_t)quarters;
        if (w == 2)
            pack_token<D, 2>(memory.page, t, coder<2>(mine, D, SU), constant, staged + map.value_codes);
        else
            pack_token<D, 1>(memory.page, t, coder<1>(mine, D, SU), constant, staged + map.value_codes);
    }
    __syncthreads();
    if (thread == 0) *(uint32_t *)(record + 4) = factor;
    copy_out(record + map.value_mean, staged + map.value_mean, map.record_bytes - map.value_mean, thread, THREADS<D>);
}

/* Grid (heads, items, 2: keys, values). */
template <int D> __global__ void __launch_bounds__(THREADS<D>) quantize(const __grid_constant__ quantize_call call) {
    extern __shared__ __align__(16) char shared[];
    launch_next();
    if (blockIdx.z == 0)
        quantize_keys<D>(call, shared);
    else
        quantize_values<D>(call, shared);
}

template <int D> void start(struct cuda_stream *stream, const quantize_call &call, uint32_t count) {
    const size_t bytes = std::max(sizeof(key_memory<D>), sizeof(value_memory<D>));
    cuda_launch(stream->device, stream->queue, quantize<D>, dim3(call.shape.heads, count, 2), THREADS<D>, (uint32_t)bytes, call);
}

} // namespace

enum kv_status cuda_quantize_open(void) {
    return cuda_allow_shared(quantize<64>) && cuda_allow_shared(quantize<96>) && cuda_allow_shared(quantize<128>) &&
                   cuda_allow_shared(quantize<256>)
               ? KV_OK
               : KV_UNAVAILABLE;
}

void cuda_quantize(struct kv_stream *base, const struct kv_shape *shape, uint32_t count,
                   const struct kv_quantize *items) {
    struct cuda_stream *stream = (struct cuda_stream *)base;
    if (shape->codec.kind == KV_CODEC_RAW) {
        for (uint32_t i = 0; i < count; i++)
            cuda_ok(stream->device, cudaMemcpyAsync(items[i].packed, items[i].raw, kv_shape_bytes_raw(shape),
                                                    cudaMemcpyDefault, stream->queue));
        return;
    }
    if (shape->codec.kind == KV_CODEC_MINMAX) {
        cuda_quantize_minmax(stream, shape, count, items);
        return;
    }
    quantize_call call = {page_shape_of(shape), {}};
    memcpy(call.items, items, count * sizeof *items);
    switch (shape->head_dim) {
    case 64: start<64>(stream, call, count); break;
    case 96: start<96>(stream, call, count); break;
    case 128: start<128>(stream, call, count); break;
    default: start<256>(stream, call, count); break;
    }
}
