/* SPDX-License-Identifier: Apache-2.0 */
/* quantize.cu - raw pages to packed pages, bit for bit as page.h says.
 *
 * A block of threads makes the key half or the value half of one head record.  The half
 * page lies in shared memory as [token][channel], 16 bits each, and changes its meaning in
 * place: element, then fixed-point integer u (UNBIASED), then code.  In the end the codes
 * are packed into the record's order, which is staged and written out in one run.
 *
 *   keys     a thread owns a channel
 *   values   a warp owns a token where channels are summed, a thread where candidates are
 *            tried
 *
 * The search tries 16 ranges on four elements at a time: two fused products round two
 * elements each (exact product, one rounding: page.h's rint), and three byte dot products
 * per four elements keep the sums.
 */
#include "kernels/cuda/cuda.h"
#include "kernels/cuda/page.cuh"

namespace {

constexpr uint32_t ALL = 0xffffffffu;

struct quantize_call {
    page_shape shape;
    const struct kv_quantize *items;
};

/* kv_range_step2 and kv_range_step4 depend on a + b only. */
__device__ const uint16_t STEP2[7] = {0x1601, 0x1686, 0x1725, 0x17e6, 0x186a, 0x1901, 0x19c6};
__device__ const uint16_t STEP4[7] = {0x1f81, 0x2014, 0x2077, 0x20f0, 0x2184, 0x2241, 0x2337};
__device__ const uint16_t OFFSET[KV_RANGES] = {0, 164, 328, 491};

/* Shared memory of a block: the half page with rows of 2 D + 8 bytes (conflict-free for a
 * thread per token and for a thread per channel), the staged part, and per-group numbers. */
template <int D> struct half_page {
    static constexpr int ROW = D + 4;
    uint16_t x[T][ROW];

    KV_DEVICE void load(const uint16_t *source, int thread, int threads) {
        for (int i = thread; i < T * D / 4; i += threads) {
            const int t = i / (D / 4), c = i % (D / 4) * 4;
            *(uint2 *)&x[t][c] = *(const uint2 *)(source + t * D + c);
        }
    }
};

/* ---- the group rule ---------------------------------------------------------------------- */

struct choice {
    float scale, error;
    int sum;
    uint32_t offset, step; /* f16 bits of the range chosen; width 1: step = 0 */
};

/* Tries all ranges at width W on a group of n integers; get(i) gives elements 4 i .. 4 i + 3
 * as {u0 | u1 << 16, u2 | u3 << 16}. */
template <int W, class Get>
KV_DEVICE choice choose(Get get, int n, int SU, float power, float unit) {
    const uint16_t *steps = W == 2 ? STEP2 : STEP4;
    int SC[16], SCC[16], SCU[16];
#pragma unroll
    for (int i = 0; i < 16; i++) SC[i] = SCC[i] = SCU[i] = 0;
    uint32_t m[7], A[4];
#pragma unroll
    for (int i = 0; i < 7; i++) m[i] = steps[i] * 0x10001u;
#pragma unroll
    for (int i = 0; i < 4; i++) A[i] = __half_as_ushort(__ushort2half_rn(OFFSET[i])) * 0x10001u;
    constexpr uint32_t ROUND = 0x66006600u, TOP = ROUND + ((1u << W) - 1) * 0x10001u;
    for (int i = 0; i < n / 4; i++) {
        const uint2 u = get(i);
        const uint32_t h0 = (uint32_t)__half_as_ushort(__ushort2half_rn(u.x & 0xffff)) |
                            (uint32_t)__half_as_ushort(__ushort2half_rn(u.x >> 16)) << 16;
        const uint32_t h1 = (uint32_t)__half_as_ushort(__ushort2half_rn(u.y & 0xffff)) |
                            (uint32_t)__half_as_ushort(__ushort2half_rn(u.y >> 16)) << 16;
#pragma unroll
        for (int a = 0; a < 4; a++) {
            const uint32_t x0 = sub2(h0, A[a]), x1 = sub2(h1, A[a]);
#pragma unroll
            for (int b = 0; b < 4; b++) {
                const uint32_t c0 = min2(max2(fma2(x0, m[a + b], ROUND), ROUND), TOP);
                const uint32_t c1 = min2(max2(fma2(x1, m[a + b], ROUND), ROUND), TOP);
                const uint32_t c = __byte_perm(c0, c1, 0x6420);
                const int k = 4 * a + b;
                SC[k] = __dp4a(c, 0x01010101u, (uint32_t)SC[k]);
                SCC[k] = __dp4a(c, c, (uint32_t)SCC[k]);
                SCU[k] = __dp2a_hi(u.y, c, __dp2a_lo(u.x, c, (uint32_t)SCU[k]));
            }
        }
    }
    float best = 0;
    choice out = {0, 0, 0, 0, m[0] & 0xffff};
    int covariance = 1;
#pragma unroll
    for (int k = 0; k < 16; k++) {
        const int X = n * SCU[k] - SC[k] * SU, Q = n * SCC[k] - SC[k] * SC[k];
        if (Q == 0 || X <= 0) continue;
        const float merit = __fdiv_rn(__fmul_rn((float)X, (float)X), (float)Q);
        if (!(merit > best)) continue;
        best = merit;
        covariance = X;
        out.sum = SC[k];
        out.offset = A[k / 4] & 0xffff, out.step = m[k / 4 + k % 4] & 0xffff;
    }
    out.scale = __fmul_rn(__fdiv_rn(power, (float)covariance), unit);
    out.error = __fmul_rn(power, __fsub_rn(__fdiv_rn(power, best), 1.0f));
    return out;
}

/* Width 1 has one candidate. */
template <class Get> KV_DEVICE choice choose_above_mean(Get get, int n, int SU, float power, float unit) {
    int SC = 0, SCU = 0;
    for (int i = 0; i < n / 4; i++) {
        const uint2 pair = get(i);
        const uint32_t u[4] = {pair.x & 0xffff, pair.x >> 16, pair.y & 0xffff, pair.y >> 16};
#pragma unroll
        for (int e = 0; e < 4; e++)
            if (n * (int)u[e] > SU) SC++, SCU += (int)u[e];
    }
    const int X = n * SCU - SC * SU, Q = n * SC - SC * SC;
    const float merit = __fdiv_rn(__fmul_rn((float)X, (float)X), (float)Q);
    choice out = {0, 0, SC, 0, 0};
    out.scale = __fmul_rn(__fdiv_rn(power, (float)X), unit);
    out.error = __fmul_rn(power, __fsub_rn(__fdiv_rn(power, merit), 1.0f));
    return out;
}

/* The code of one u under a choice of width w. */
KV_DEVICE uint32_t code_of(uint32_t u, int w, uint32_t offset, uint32_t step, int n, int SU) {
    if (w == 1) return n * (int)u > SU;
    const int top = (1 << w) - 1;
    const float x = __fsub_rn((float)u, f32_of_f16((uint16_t)offset));
    const int code = __float2int_rn(__fmul_rn(x, f32_of_f16((uint16_t)step)));
    return (uint32_t)min(max(code, 0), top);
}

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

KV_DEVICE uint32_t fix_element(const group_fix &fix, float x) {
    return fix.constant ? 0 : (uint32_t)__float2int_rn(__fmul_rn(__fsub_rn(x, fix.low), fix.per_unit));
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

/* ---- packing ------------------------------------------------------------------------------- */

/* Codes of one quarter, [token][channel], to its bytes; order: slot -> channel. */
template <int D>
KV_DEVICE void pack_quarter(const half_page<D> &page, const uint8_t *order, int quarter, int w, char *out,
                            int thread, int threads) {
    const int P = 8 / w, words = D * w; /* of 4 D w bytes */
    for (int i = thread; i < words; i += threads) {
        /* Chunks lie behind each other: the first CHUNK slots make 4 w CHUNK words. */
        int k = CHUNK<D>, start = i / (4 * w * k) * k;
        int rest = i - start * 4 * w;
        if (D == 96 && start >= 16) k = 8;
        const int u = rest / (4 * k), word = rest % (4 * k);
        const place at = place_of_word(k, word);
        uint32_t value = 0;
        for (int b = 0; b < 4; b++) {
            const int slot = quarter * (D / 4) + start + at.kk + b;
            const int c = order != nullptr ? order[slot] : slot;
            for (int j = 0; j < P; j++)
                value |= (uint32_t)page.x[16 * (u * P + j) + token_of_row(at.m)][c] << (8 * b + w * j);
        }
        ((uint32_t *)out)[i] = value;
    }
}

template <int D> KV_DEVICE void pack_values(const half_page<D> &page, int w, char *out, int thread, int threads) {
    const int P = 8 / w;
    for (int i = thread; i < 4 * D * w; i += threads) {
        const int u = i / 128, word = i % 128;
        const place at = place_of_word(32, word);
        uint32_t value = 0;
        for (int j = 0; j < P; j++) {
            const int n = u * P + j, block = n / (D / 16), tile = n % (D / 16);
            for (int b = 0; b < 4; b++)
                value |= (uint32_t)page.x[32 * block + at.kk + b][16 * tile + at.m] << (8 * b + w * j);
        }
        ((uint32_t *)out)[i] = value;
    }
}

/* ---- UNBIASED keys ------------------------------------------------------------------------- */

template <int D> struct key_memory {
    half_page<D> page;
    alignas(16) char staged[16 + 4 * D + 4 * D * 16]; /* up to four quarters of width 4 */
    float importance[D];
    float error[3][D]; /* by slot; widths 0 and 1 and ... see width_index */
    float error0[D];
    uint8_t order[D];
    float cost[KV_MIX_COUNT_MAX];
    int factor_bits;
    uint32_t mix;
};

/* 1, 2, 4 -> 0, 1, 2 */
KV_DEVICE int width_index(int w) {
    return w >> 1;
}

template <int D> __global__ void __launch_bounds__(D) quantize_keys(const __grid_constant__ quantize_call call) {
    extern __shared__ __align__(16) char shared[];
    key_memory<D> &memory = *(key_memory<D> *)shared;
    const page_shape &shape = call.shape;
    const struct kv_quantize item = call.items[blockIdx.y];
    const int head = blockIdx.x, c = threadIdx.x;
    const uint16_t *source = (const uint16_t *)item.raw + (size_t)head * T * D;
    char *record = (char *)item.packed + (size_t)head * shape.map.record_bytes;

    memory.page.load(source, c, D);
    if (c == 0) memory.factor_bits = 0;
    __syncthreads();

    /* This thread's channel. */
    const bool bf16 = shape.bf16;
    float low = INFINITY, high = -INFINITY;
    for (int t = 0; t < T; t++) {
        const float x = f32_of_element(memory.page.x[t][c], bf16);
        low = fminf(low, x), high = fmaxf(high, x);
    }
    const group_fix fix = fix_range(low, high);
    int SU = 0;
    long long squares = 0;
    for (int t = 0; t < T; t++) {
        const uint32_t u = fix_element(fix, f32_of_element(memory.page.x[t][c], bf16));
        memory.page.x[t][c] = (uint16_t)u;
        SU += (int)u;
        squares += u * u;
    }
    const float power = (float)(T * squares - (long long)SU * SU);
    const float mean = fix_mean(fix, SU, T);
    const float energy = item.energy == nullptr ? 1.0f : item.energy[head * D + c];
    const float weight = __fmul_rn(__fmul_rn(fix.unit, fix.unit), energy);
    const float importance = __fmul_rn(power, weight);
    memory.importance[c] = importance;

    choice chosen[3] = {};
    if (power > 0) {
        auto get = [&](int i) {
            const uint16_t *x = &memory.page.x[4 * i][c];
            constexpr int ROW = half_page<D>::ROW;
            return make_uint2(x[0] | (uint32_t)x[ROW] << 16, x[2 * ROW] | (uint32_t)x[3 * ROW] << 16);
        };
        if (shape.widths_used & 2) chosen[0] = choose_above_mean(get, T, SU, power, fix.unit);
        if (shape.widths_used & 4) chosen[1] = choose<2>(get, T, SU, power, fix.unit);
        if (shape.widths_used & 16) chosen[2] = choose<4>(get, T, SU, power, fix.unit);
    }
    __syncthreads();

    int slot = 0;
    for (int i = 0; i < D; i++) {
        const float other = memory.importance[i];
        slot += other > importance || (other == importance && i < c);
    }
    memory.order[slot] = (uint8_t)c;
    memory.error0[slot] = importance;
#pragma unroll
    for (int i = 0; i < 3; i++) memory.error[i][slot] = __fmul_rn(chosen[i].error, weight);
    __syncthreads();

    if (c < (int)shape.mix_count) {
        float cost = 0;
        for (int quarter = 0; quarter < 4; quarter++) {
            const int w = shape.mixes[c][quarter];
            const float *error = w == 0 ? memory.error0 : memory.error[width_index(w)];
#pragma unroll 8
            for (int s = quarter * (D / 4); s < (quarter + 1) * (D / 4); s++) cost = __fadd_rn(cost, error[s]);
        }
        memory.cost[c] = cost;
    }
    __syncthreads();
    uint32_t mix = 0;
    float least = INFINITY;
    for (uint32_t i = 0; i < shape.mix_count; i++)
        if (memory.cost[i] < least) least = memory.cost[i], mix = i;

    const int quarter = slot / (D / 4), w = shape.mixes[mix][quarter];
    const choice mine = w == 1 ? chosen[0] : w == 2 ? chosen[1] : w == 4 ? chosen[2] : choice{};
    atomicMax(&memory.factor_bits, __float_as_int(mine.scale)); /* scales are not negative */

    /* Elements to codes, the channel's own column. */
    if (w > 0)
        for (int t = 0; t < T; t++)
            memory.page.x[t][c] = power > 0 ? (uint16_t)code_of(memory.page.x[t][c], w, mine.offset, mine.step, T, SU) : 0;
    __syncthreads();
    const uint16_t factor = f16_saturated(__int_as_float(memory.factor_bits));
    const stored_scale stored = store_scale(mine.scale, factor);
    float zero = mean;
    if (w > 0) zero = __fsub_rn(mean, __fmul_rn(stored.scale, __fdiv_rn((float)mine.sum, (float)T)));
    char *staged = memory.staged;
    ((uint8_t *)staged)[shape.map.key_order + slot] = (uint8_t)c;
    ((uint8_t *)staged)[shape.map.key_scale + slot] = (uint8_t)stored.byte;
    ((uint16_t *)(staged + shape.map.key_zero))[slot] = f16_saturated(zero);

    char *codes = staged + shape.map.key_codes;
    for (int q = 0; q < 4; q++) {
        const int width = shape.mixes[mix][q];
        if (width == 0) continue;
        pack_quarter<D>(memory.page, memory.order, q, width, codes, c, D);
        codes += 4 * D * width;
    }
    __syncthreads();
    /* The second word of the header is the value block's. */
    if (c == 0) *(uint32_t *)record = mix | (uint32_t)factor << 16;
    if (c == 1) *(uint2 *)(record + 8) = make_uint2(0, 0);
    copy_out(record + 16, staged + 16, shape.map.value_mean - 16, c, D);
}

/* ---- UNBIASED values ----------------------------------------------------------------------- */

template <int D> struct value_memory {
    half_page<D> page;
    alignas(16) char staged[2 * D + 2 * T + 4 * 4 * D * 2];
    float mean[D];
    float token_unit[T], token_mean[T];
    int token_sum[T];
    uint32_t token_squares[T];
    int factor_bits;
};

template <int D> __global__ void __launch_bounds__(T) quantize_values(const __grid_constant__ quantize_call call) {
    extern __shared__ __align__(16) char shared[];
    value_memory<D> &memory = *(value_memory<D> *)shared;
    const page_shape &shape = call.shape;
    const struct kv_quantize item = call.items[blockIdx.y];
    const int head = blockIdx.x, thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
    const bool bf16 = shape.bf16;
    const uint16_t *source = (const uint16_t *)item.raw + (size_t)(shape.heads + head) * T * D;
    char *record = (char *)item.packed + (size_t)head * shape.map.record_bytes;
    char *staged = memory.staged - shape.map.value_mean;

    memory.page.load(source, thread, T);
    if (thread == 0) memory.factor_bits = 0;
    __syncthreads();
    for (int c = thread; c < D; c += T) {
        float part[8] = {};
        for (int t = 0; t < T; t += 8)
#pragma unroll
            for (int j = 0; j < 8; j++) part[j] = __fadd_rn(part[j], f32_of_element(memory.page.x[t + j][c], bf16));
        const float sum = __fadd_rn(__fadd_rn(__fadd_rn(part[0], part[1]), __fadd_rn(part[2], part[3])),
                                    __fadd_rn(__fadd_rn(part[4], part[5]), __fadd_rn(part[6], part[7])));
        const uint16_t half = f16_saturated(__fdiv_rn(sum, (float)T));
        ((uint16_t *)(staged + shape.map.value_mean))[c] = half;
        memory.mean[c] = f32_of_f16(half);
    }
    __syncthreads();

    for (int t = warp; t < T; t += T / 32) {
        float y[D / 32], low = INFINITY, high = -INFINITY;
#pragma unroll
        for (int e = 0; e < D / 32; e++)
            y[e] = __fsub_rn(f32_of_element(memory.page.x[t][lane + 32 * e], bf16), memory.mean[lane + 32 * e]);
        if (shape.rotated) rotate_token<D>(y, lane);
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
    __syncthreads();

    const int t = thread, SU = memory.token_sum[t], w = shape.value_bits;
    const float unit = memory.token_unit[t], mean = memory.token_mean[t];
    const float power = (float)((long long)D * memory.token_squares[t] - (long long)SU * SU);
    choice mine = {};
    if (power > 0) {
        auto get = [&](int i) { return *(const uint2 *)&memory.page.x[t][4 * i]; };
        mine = w == 2 ? choose<2>(get, D, SU, power, unit) : choose_above_mean(get, D, SU, power, unit);
    }
    const float zero = __fsub_rn(mean, __fmul_rn(mine.scale, __fdiv_rn((float)mine.sum, (float)D)));
    const bool constant = mine.scale == 0 || fabsf(zero) > __fmul_rn(31.0f, mine.scale);
    if (constant) mine.sum = 0, mine.scale = __fdiv_rn(fabsf(mean), 31.0f);
    atomicMax(&memory.factor_bits, __float_as_int(mine.scale));
    for (int c = 0; c < D; c += 4) {
        uint2 &four = *(uint2 *)&memory.page.x[t][c];
        const uint2 u = four;
        uint2 codes = {0, 0};
        if (!constant) {
            codes.x = code_of(u.x & 0xffff, w, mine.offset, mine.step, D, SU) |
                      code_of(u.x >> 16, w, mine.offset, mine.step, D, SU) << 16;
            codes.y = code_of(u.y & 0xffff, w, mine.offset, mine.step, D, SU) |
                      code_of(u.y >> 16, w, mine.offset, mine.step, D, SU) << 16;
        }
        four = codes;
    }
    __syncthreads();
    const uint16_t factor = f16_saturated(__int_as_float(memory.factor_bits));
    const stored_scale stored = store_scale(mine.scale, factor);
    int quarters = 0;
    if (stored.scale != 0) {
        const float x = __fdiv_rn(__fsub_rn(mean, __fmul_rn(stored.scale, __fdiv_rn((float)mine.sum, (float)D))),
                                  __fdiv_rn(stored.scale, 4.0f));
        quarters = x < -128.0f ? -128 : x > 127.0f ? 127 : __float2int_rn(x);
    }
    ((uint8_t *)staged)[shape.map.value_scale + t] = (uint8_t)stored.byte;
    ((int8_t *)staged)[shape.map.value_zero + t] = (int8_t)quarters;
    pack_values<D>(memory.page, w, staged + shape.map.value_codes, thread, T);
    __syncthreads();
    if (thread == 0) *(uint32_t *)(record + 4) = factor;
    copy_out(record + shape.map.value_mean, staged + shape.map.value_mean,
             shape.map.record_bytes - shape.map.value_mean, thread, T);
}

/* ---- MINMAX --------------------------------------------------------------------------------- */

template <int D> struct minmax_memory {
    half_page<D> page;
    alignas(16) char staged[2 * 2 * 4 * D + 16 * D * 4]; /* metadata of groups of 32, width 4 */
};

/* One group: n elements `stride` apart, replaced by their codes. */
KV_DEVICE void minmax_group(uint16_t *x, int stride, int n, int top, bool bf16, uint16_t &scale_out, uint16_t &min_out) {
    float low = INFINITY, high = -INFINITY;
    for (int i = 0; i < n; i++) {
        const float v = f32_of_element(x[i * stride], bf16);
        low = fminf(low, v), high = fmaxf(high, v);
    }
    low = __fadd_rn(low, 0.0f), high = __fadd_rn(high, 0.0f); /* -0 becomes +0 */
    const float span = f32_of_element(element_saturated(__fsub_rn(high, low), bf16), bf16);
    scale_out = element_saturated(__fdiv_rn(span, (float)top), bf16);
    min_out = element_saturated(low, bf16);
    const float scale = f32_of_element(scale_out, bf16);
    for (int i = 0; i < n; i++) {
        const float v = f32_of_element(x[i * stride], bf16);
        const float above = f32_of_element(element_saturated(__fsub_rn(v, low), bf16), bf16);
        float code = scale == 0 ? 0 : __fdiv_rn(above, scale);
        code = fminf(f32_of_element(element_saturated(code, bf16), bf16), (float)top);
        x[i * stride] = (uint16_t)__float2int_rn(code);
    }
}

template <int D> __global__ void __launch_bounds__(D) minmax_keys(const __grid_constant__ quantize_call call) {
    extern __shared__ __align__(16) char shared[];
    minmax_memory<D> &memory = *(minmax_memory<D> *)shared;
    const page_shape &shape = call.shape;
    const struct kv_quantize item = call.items[blockIdx.y];
    const int head = blockIdx.x, c = threadIdx.x, n = shape.group, w = shape.key_bits;
    char *record = (char *)item.packed + (size_t)head * shape.map.record_bytes;
    memory.page.load((const uint16_t *)item.raw + (size_t)head * T * D, c, D);
    __syncthreads();
    for (int g = 0; g < T / n; g++) {
        uint16_t scale, least;
        minmax_group(&memory.page.x[g * n][c], half_page<D>::ROW, n, (1 << w) - 1, shape.bf16, scale, least);
        ((uint16_t *)(memory.staged + shape.map.key_scale))[g * D + c] = scale;
        ((uint16_t *)(memory.staged + shape.map.key_zero))[g * D + c] = least;
    }
    __syncthreads();
    for (int q = 0; q < 4; q++)
        pack_quarter<D>(memory.page, nullptr, q, w, memory.staged + shape.map.key_codes + q * 4 * D * w, c, D);
    __syncthreads();
    copy_out(record, memory.staged, shape.map.value_mean, c, D);
}

template <int D> __global__ void __launch_bounds__(T) minmax_values(const __grid_constant__ quantize_call call) {
    extern __shared__ __align__(16) char shared[];
    minmax_memory<D> &memory = *(minmax_memory<D> *)shared;
    const page_shape &shape = call.shape;
    const struct kv_quantize item = call.items[blockIdx.y];
    const int head = blockIdx.x, t = threadIdx.x, n = shape.group, w = shape.value_bits;
    char *record = (char *)item.packed + (size_t)head * shape.map.record_bytes;
    char *staged = memory.staged - shape.map.value_mean;
    memory.page.load((const uint16_t *)item.raw + (size_t)(shape.heads + head) * T * D, t, T);
    __syncthreads();
    for (int g = 0; g < D / n; g++) {
        uint16_t scale, least;
        minmax_group(&memory.page.x[t][g * n], 1, n, (1 << w) - 1, shape.bf16, scale, least);
        ((uint16_t *)(staged + shape.map.value_scale))[g * T + t] = scale;
        ((uint16_t *)(staged + shape.map.value_zero))[g * T + t] = least;
    }
    __syncthreads();
    pack_values<D>(memory.page, w, staged + shape.map.value_codes, t, T);
    __syncthreads();
    copy_out(record + shape.map.value_mean, staged + shape.map.value_mean,
             shape.map.record_bytes - shape.map.value_mean, t, T);
}

/* ---- starting ------------------------------------------------------------------------------- */

template <int D> bool allow_shared() {
    const cudaFuncAttribute most = cudaFuncAttributeMaxDynamicSharedMemorySize;
    return cudaFuncSetAttribute(quantize_keys<D>, most, sizeof(key_memory<D>)) == cudaSuccess &&
           cudaFuncSetAttribute(quantize_values<D>, most, sizeof(value_memory<D>)) == cudaSuccess &&
           cudaFuncSetAttribute(minmax_keys<D>, most, sizeof(minmax_memory<D>)) == cudaSuccess &&
           cudaFuncSetAttribute(minmax_values<D>, most, sizeof(minmax_memory<D>)) == cudaSuccess;
}

template <int D> cudaError_t start(const quantize_call &call, bool minmax, uint32_t count, cudaStream_t queue) {
    const dim3 grid(call.shape.heads, count);
    if (minmax) {
        minmax_keys<D><<<grid, D, sizeof(minmax_memory<D>), queue>>>(call);
        minmax_values<D><<<grid, T, sizeof(minmax_memory<D>), queue>>>(call);
    } else {
        quantize_keys<D><<<grid, D, sizeof(key_memory<D>), queue>>>(call);
        quantize_values<D><<<grid, T, sizeof(value_memory<D>), queue>>>(call);
    }
    return cudaGetLastError();
}

} // namespace

enum kv_status cuda_quantize_open(struct cuda_device *device) {
    (void)device;
    return allow_shared<64>() && allow_shared<96>() && allow_shared<128>() && allow_shared<256>() ? KV_OK : KV_UNAVAILABLE;
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
    struct cuda_upload upload = cuda_upload_reserve(stream, count * sizeof *items);
    memcpy(upload.host, items, count * sizeof *items);
    cuda_upload_send(stream, upload, count * sizeof *items);
    quantize_call call = {page_shape_of(shape), (const struct kv_quantize *)upload.device};
    const bool minmax = shape->codec.kind == KV_CODEC_MINMAX;
    cudaError_t error;
    switch (shape->head_dim) {
    case 64: error = start<64>(call, minmax, count, stream->queue); break;
    case 96: error = start<96>(call, minmax, count, stream->queue); break;
    case 128: error = start<128>(call, minmax, count, stream->queue); break;
    default: error = start<256>(call, minmax, count, stream->queue); break;
    }
    cuda_ok(stream->device, error);
}
