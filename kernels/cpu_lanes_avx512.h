/* SPDX-License-Identifier: Apache-2.0 */
/* cpu_lanes_avx512.h - the operations of cpu_lanes.h on AVX-512 F, BW, VL, DQ, VNNI, VBMI and GFNI. */
#ifndef KV_KERNELS_CPU_LANES_AVX512_H
#define KV_KERNELS_CPU_LANES_AVX512_H

typedef __m512 vf;
typedef __m512i vi;
typedef __mmask16 vm;

/* Candidates searched at once: twelve sums, four multipliers and what goes with them are 25 of 32 registers. */
enum { KV_LANES_RANGES = 4 };

KV_INLINE vf v_zero(void) {
    return _mm512_setzero_ps();
}
KV_INLINE vf v_set(float a) {
    return _mm512_set1_ps(a);
}
KV_INLINE vf v_load(const float *from) {
    return _mm512_loadu_ps(from);
}
KV_INLINE void v_store(float *to, vf a) {
    _mm512_storeu_ps(to, a);
}
KV_INLINE vf v_add(vf a, vf b) {
    return _mm512_add_ps(a, b);
}
KV_INLINE vf v_sub(vf a, vf b) {
    return _mm512_sub_ps(a, b);
}
KV_INLINE vf v_mul(vf a, vf b) {
    return _mm512_mul_ps(a, b);
}
KV_INLINE vf v_div(vf a, vf b) {
    return _mm512_div_ps(a, b);
}
KV_INLINE vf v_min(vf a, vf b) {
    return _mm512_min_ps(a, b);
}
KV_INLINE vf v_max(vf a, vf b) {
    return _mm512_max_ps(a, b);
}
/* a, its magnitude at most `limit`. */
KV_INLINE vf v_within(vf a, vf limit) {
    return _mm512_range_ps(a, limit, 0x2); /* the smaller magnitude, the first one's sign */
}
KV_INLINE vf v_fma(vf a, vf b, vf c) {
    return _mm512_fmadd_ps(a, b, c);
}
KV_INLINE vf v_round(vf a) {
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
KV_INLINE vi v_round_i(vf a) {
    return _mm512_cvtps_epi32(a);
}
KV_INLINE vf v_to_f(vi a) {
    return _mm512_cvtepi32_ps(a);
}
KV_INLINE vi v_bits(vf a) {
    return _mm512_castps_si512(a);
}
KV_INLINE vf v_from_bits(vi a) {
    return _mm512_castsi512_ps(a);
}
KV_INLINE float v_sum(vf a) {
    return _mm512_reduce_add_ps(a);
}
KV_INLINE float v_greatest(vf a) {
    return _mm512_reduce_max_ps(a);
}

KV_INLINE vm v_lt(vf a, vf b) {
    return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ);
}
KV_INLINE vm v_le(vf a, vf b) {
    return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ);
}
KV_INLINE vm v_eq(vf a, vf b) {
    return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ);
}
KV_INLINE vm v_gt_i(vi a, vi b) {
    return _mm512_cmpgt_epi32_mask(a, b);
}
KV_INLINE vm v_both(vm a, vm b) {
    return a & b;
}
KV_INLINE vm v_either(vm a, vm b) {
    return a | b;
}
KV_INLINE uint32_t v_truths(vm a) {
    return a;
}
KV_INLINE vm v_first(uint32_t count) {
    return count >= 16 ? 0xffff : (vm)((1u << count) - 1);
}
KV_INLINE vm v_later(uint32_t lane) {
    return (vm)(0xfffeu << lane);
} /* lanes after that one */
KV_INLINE vf v_select(vm m, vf yes, vf no) {
    return _mm512_mask_blend_ps(m, no, yes);
}
KV_INLINE vi v_select_i(vm m, vi yes, vi no) {
    return _mm512_mask_blend_epi32(m, no, yes);
}

KV_INLINE vi v_zero_i(void) {
    return _mm512_setzero_si512();
}
KV_INLINE vi v_set_i(int32_t a) {
    return _mm512_set1_epi32(a);
}
KV_INLINE vi v_load_i(const void *from) {
    return _mm512_loadu_si512(from);
}
KV_INLINE void v_store_i(void *to, vi a) {
    _mm512_storeu_si512(to, a);
}
/* Past the caches; `to` is aligned to 64 bytes. */
KV_INLINE void v_store_away(void *to, vi a) {
    _mm512_stream_si512(to, a);
}
KV_INLINE vi v_add_i(vi a, vi b) {
    return _mm512_add_epi32(a, b);
}
KV_INLINE vi v_sub_i(vi a, vi b) {
    return _mm512_sub_epi32(a, b);
}
KV_INLINE vi v_mul_i(vi a, vi b) {
    return _mm512_mullo_epi32(a, b);
}
KV_INLINE vi v_max_i(vi a, vi b) {
    return _mm512_max_epi32(a, b);
}
KV_INLINE vi v_min_i(vi a, vi b) {
    return _mm512_min_epi32(a, b);
}
KV_INLINE vi v_and(vi a, vi b) {
    return _mm512_and_si512(a, b);
}
KV_INLINE vi v_or(vi a, vi b) {
    return _mm512_or_si512(a, b);
}
KV_INLINE vi v_shl(vi a, unsigned n) {
    return _mm512_sll_epi32(a, _mm_cvtsi32_si128((int)n));
}
KV_INLINE vi v_shr(vi a, unsigned n) {
    return _mm512_srl_epi32(a, _mm_cvtsi32_si128((int)n));
}
KV_INLINE vi v_sar(vi a, unsigned n) {
    return _mm512_sra_epi32(a, _mm_cvtsi32_si128((int)n));
}
KV_INLINE int32_t v_sum_i(vi a) {
    return _mm512_reduce_add_epi32(a);
}

/* Bytes hold 8 / width codes each: those at position j.  One affine map of a byte's bits does the shift and
 * the mask: byte 7 - i of the matrix says which bits make bit i. */
KV_INLINE vi v_codes(vi bytes, const uint32_t width, const uint32_t j) {
    uint64_t map = 0;
    for (uint32_t i = 0; i < width; i++)
        map |= (uint64_t)1 << (i + width * j) << (8 * (7 - i));
    return _mm512_gf2p8affine_epi64_epi8(bytes, _mm512_set1_epi64((long long)map), 0);
}

/* code * scale + zero for codes of up to four bits, which stand in one byte of each lane: sixteen
 * results, looked up. */
typedef struct {
    vf of_code;
} v_affine;
KV_INLINE v_affine v_affine_of(float scale, float zero) {
    const vf codes = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return (v_affine){_mm512_add_ps(_mm512_mul_ps(codes, _mm512_set1_ps(scale)), _mm512_set1_ps(zero))};
}
KV_INLINE vf v_affine_codes(v_affine map, vi quads, const uint32_t byte) {
    return _mm512_permutexvar_ps(_mm512_srli_epi32(quads, 8 * byte), map.of_code);
}

/* 2^t in two steps: t less its floor; p times 2^floor(t), or 0 below 2^-126. */
KV_INLINE vf v_fraction(vf t) {
    return _mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
}
KV_INLINE vf v_times_power(vf p, vf t) {
    return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(t, _mm512_set1_ps(-126.0f), _CMP_GE_OQ), p, t);
}

/* 16-bit lanes, unsigned. */
KV_INLINE vi v_subs_u16(vi a, vi b) {
    return _mm512_subs_epu16(a, b);
}
KV_INLINE vi v_mulhi_u16(vi a, vi b) {
    return _mm512_mulhi_epu16(a, b);
}
KV_INLINE vi v_mulhrs_16(vi a, vi b) {
    return _mm512_mulhrs_epi16(a, b);
}
KV_INLINE vi v_min_u16(vi a, vi b) {
    return _mm512_min_epu16(a, b);
}

/* c + the sums of products of neighbours: pairs of i16; quads of u8 (a) by i8 (b). */
KV_INLINE vi v_dot_16(vi c, vi a, vi b) {
    return _mm512_dpwssd_epi32(c, a, b);
}
KV_INLINE vi v_dot_8(vi c, vi a, vi b) {
    return _mm512_dpbusd_epi32(c, a, b);
}

/* Sixteen elements of a narrow type, widened; and lanes cut down to 16 or 8 bits. */
KV_INLINE vi v_load_u8(const uint8_t *from) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)from));
}
KV_INLINE vi v_load_i8(const int8_t *from) {
    return _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from));
}
KV_INLINE vi v_load_u16(const uint16_t *from) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from));
}
KV_INLINE void v_store_u16(uint16_t *to, vi a) {
    _mm256_storeu_si256((__m256i *)to, _mm512_cvtepi32_epi16(a));
}
KV_INLINE void v_store_u8(uint8_t *to, vi a) {
    _mm_storeu_si128((__m128i *)to, _mm512_cvtepi32_epi8(a));
}
KV_INLINE vf v_load_f16(const uint16_t *from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from));
}
KV_INLINE void v_store_f16(uint16_t *to, vf a) {
    _mm256_storeu_si256((__m256i *)to,
                        _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

/* Lanes that hold the bits of a binary16. */
KV_INLINE vf v_from_f16(vi bits) {
    return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(bits));
}

/* Rounded to binary16 and back. */
KV_INLINE vf v_round_f16(vf a) {
    return _mm512_cvtph_ps(_mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

/* base[index[lane]]. */
KV_INLINE vi v_gather(const int32_t *base, vi index) {
    return _mm512_i32gather_epi32(index, base, 4);
}

/* ---- Shuffles, by purpose rather than by pattern ---- */

/* Lanes i and i + stride, i without the bit `stride` (1, 2, 4 or 8), become their sum and difference.  The
 * product with one of either sign is exact, so this rounds once. */
KV_INLINE vf v_butterfly(vf a, int stride) {
    const vi lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    vm upper = stride == 1 ? 0xaaaa : stride == 2 ? 0xcccc : stride == 4 ? 0xf0f0 : 0xff00;
    vf sign  = _mm512_mask_blend_ps(upper, _mm512_set1_ps(1.0f), _mm512_set1_ps(-1.0f));
    vf other = _mm512_permutexvar_ps(_mm512_xor_si512(lane, _mm512_set1_epi32(stride)), a);
    return _mm512_fmadd_ps(a, sign, other);
}

/* The sums of four vectors. */
KV_INLINE void v_sum_four(const vf x[4], float *to) {
    vf a     = _mm512_add_ps(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
    vf b     = _mm512_add_ps(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
    vf s     = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
    __m256 t = _mm256_add_ps(_mm512_castps512_ps256(s), _mm512_extractf32x8_ps(s, 1));
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps(t, 1)));
}

/* The sums of four times four vectors, times `scale`: those of x[i] to to + i * pitch.  As v_sum_four adds. */
KV_INLINE void v_sum_four_fours(const vf x[4][4], float scale, float *to, size_t pitch) {
    vf s[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        vf a = _mm512_add_ps(_mm512_unpacklo_ps(x[i][0], x[i][1]), _mm512_unpackhi_ps(x[i][0], x[i][1]));
        vf b = _mm512_add_ps(_mm512_unpacklo_ps(x[i][2], x[i][3]), _mm512_unpackhi_ps(x[i][2], x[i][3]));
        s[i] = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
    }
    /* Quarters of a register: 0 + 2 and 1 + 3, two vectors to a register; then the two. */
    vf a = _mm512_add_ps(_mm512_shuffle_f32x4(s[0], s[1], 0x44), _mm512_shuffle_f32x4(s[0], s[1], 0xee));
    vf b = _mm512_add_ps(_mm512_shuffle_f32x4(s[2], s[3], 0x44), _mm512_shuffle_f32x4(s[2], s[3], 0xee));
    vf t = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    t = _mm512_mul_ps(t, _mm512_set1_ps(scale));
    _mm_storeu_ps(to, _mm512_castps512_ps128(t));
    _mm_storeu_ps(to + pitch, _mm512_extractf32x4_ps(t, 1));
    _mm_storeu_ps(to + 2 * pitch, _mm512_extractf32x4_ps(t, 2));
    _mm_storeu_ps(to + 3 * pitch, _mm512_extractf32x4_ps(t, 3));
}

/* The greatest of each of four vectors. */
KV_INLINE void v_greatest_four(const vf x[4], float *to) {
    vf a     = _mm512_max_ps(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
    vf b     = _mm512_max_ps(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
    vf s     = _mm512_max_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
    __m256 t = _mm256_max_ps(_mm512_castps512_ps256(s), _mm512_extractf32x8_ps(s, 1));
    _mm_storeu_ps(to, _mm_max_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps(t, 1)));
}

/* x[i] lane j becomes x[j] lane i. */
KV_INLINE void v_turn_16(vf x[16]) {
    const vi low  = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const vi high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    /* Four times: a lane's highest bit leaves to the vector's number, whose highest bit enters below. */
    vf y[16];
#pragma GCC unroll 4
    for (int step = 0; step < 4; step++) {
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) {
            y[2 * i]     = _mm512_permutex2var_ps(x[i], low, x[i + 8]);
            y[2 * i + 1] = _mm512_permutex2var_ps(x[i], high, x[i + 8]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++)
            x[i] = y[i];
    }
}

/* Rows of a key tile to tokens: lane 4 a + 2 r + b takes lane 8 r + 2 a + b (page.h). */
KV_INLINE vf v_rows_to_tokens(vf a) {
    return _mm512_permutexvar_ps(
        _mm512_setr_epi32(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15), a);
}

/* The way back, and the token that lane m of a row stands for. */
KV_INLINE vf v_tokens_to_rows(vf a) {
    return _mm512_permutexvar_ps(
        _mm512_setr_epi32(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15), a);
}
KV_INLINE vi v_lane_tokens(void) {
    return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}
KV_INLINE vi v_row_tokens(void) {
    return _mm512_setr_epi32(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
}

/* Where packs_epi32(x, y) puts the low byte of lane j of x (k = 0) or y (k = 1); for j = 0 .. 15; the lane
 * that a token has in a row. */
#define KV_LOW_(k, j)  (2 * (8 * ((j) / 4) + 4 * (k) + (j) % 4))
#define KV_LANE_(t)    (8 * ((t) >> 1 & 1) + 2 * ((t) >> 2) + ((t)&1))
#define KV_SAME_(t)    (t)
#define KV_ALL_(f, k, add)                                                                   \
    KV_LOW_(k, f(0)) + add, KV_LOW_(k, f(1)) + add, KV_LOW_(k, f(2)) + add,                  \
        KV_LOW_(k, f(3)) + add, KV_LOW_(k, f(4)) + add, KV_LOW_(k, f(5)) + add,              \
        KV_LOW_(k, f(6)) + add, KV_LOW_(k, f(7)) + add, KV_LOW_(k, f(8)) + add,              \
        KV_LOW_(k, f(9)) + add, KV_LOW_(k, f(10)) + add, KV_LOW_(k, f(11)) + add,            \
        KV_LOW_(k, f(12)) + add, KV_LOW_(k, f(13)) + add, KV_LOW_(k, f(14)) + add,           \
        KV_LOW_(k, f(15)) + add

/* Four vectors of i32 that fit 16 bits, each x = 256 hi + lo with lo signed: 64 bytes of hi and of lo, lane
 * after lane, or, where lanes are rows of a key tile, token after token. */
KV_INLINE void v_digits(const vi x[4], const int rows, int8_t *hi, int8_t *lo) {
    static const uint8_t lanes[64] = {KV_ALL_(KV_SAME_, 0, 0), KV_ALL_(KV_SAME_, 1, 0),
                                      KV_ALL_(KV_SAME_, 0, 1), KV_ALL_(KV_SAME_, 1, 1)};
    static const uint8_t tokens[64] = {KV_ALL_(KV_LANE_, 0, 0), KV_ALL_(KV_LANE_, 1, 0),
                                       KV_ALL_(KV_LANE_, 0, 1), KV_ALL_(KV_LANE_, 1, 1)};
    __m512i order = _mm512_loadu_si512(rows ? tokens : lanes);
    /* With 128 added the upper byte is hi and the lower one lo + 128. */
    __m512i half = _mm512_set1_epi16(128);
    __m512i a = _mm512_add_epi16(_mm512_packs_epi32(x[0], x[1]), half);
    __m512i b = _mm512_add_epi16(_mm512_packs_epi32(x[2], x[3]), half);
    a         = _mm512_permutexvar_epi8(order, a);
    b         = _mm512_permutexvar_epi8(order, b);
    _mm512_storeu_si512(lo, _mm512_xor_si512(_mm512_shuffle_i64x2(a, b, 0x44),
                                             _mm512_set1_epi8((char)0x80)));
    _mm512_storeu_si512(hi, _mm512_shuffle_i64x2(a, b, 0xee));
}

/* to[i] = from[index[i]] for i < count, count a multiple of 64, all below 64 * tables, tables 1, 2 or 4. */
KV_INLINE void v_permute_bytes(int8_t *to, const int8_t *from, const uint8_t *index, uint32_t count,
                               uint32_t tables) {
    for (uint32_t i = 0; i < count; i += 64) {
        __m512i at = _mm512_loadu_si512(index + i);
        __m512i r;
        if (tables == 1) {
            r = _mm512_permutexvar_epi8(at, _mm512_loadu_si512(from));
        } else {
            r = _mm512_permutex2var_epi8(_mm512_loadu_si512(from), at,
                                         _mm512_loadu_si512(from + 64));
            if (tables == 4) {
                __m512i high = _mm512_permutex2var_epi8(_mm512_loadu_si512(from + 128), at,
                                                        _mm512_loadu_si512(from + 192));
                r            = _mm512_mask_blend_epi8(_mm512_movepi8_mask(at), r, high);
            }
        }
        _mm512_storeu_si512(to + i, r);
    }
}

/* Two vectors a and b to two others: zero[i] = (a then b)[at[i]], one[i] = (a then b)[at[i] + step].  With the
 * patterns below this moves one bit of the lane's number into the vector's number, and one the other way. */
KV_INLINE void v_swap_bits(vi a, vi b, vi at, int step, vi *zero, vi *one) {
    *zero = _mm512_permutex2var_epi32(a, at, b);
    *one  = _mm512_permutex2var_epi32(a, _mm512_add_epi32(at, _mm512_set1_epi32(step)), b);
}

/* 64 bytes of a unit of 32 K-values are rows g and g + 8 of its tiles: those rows, one behind the other.  Of a
 * unit of 16 K-values: rows g, g + 8, g + 1 and g + 9. */
KV_INLINE vi v_rows_32(const uint8_t *words) {
    return _mm512_permutexvar_epi32(
        _mm512_setr_epi32(0, 4, 8, 12, 2, 6, 10, 14, 1, 5, 9, 13, 3, 7, 11, 15), v_load_i(words));
}
KV_INLINE vi v_rows_16(const uint8_t *words) {
    return _mm512_permutexvar_epi32(
        _mm512_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15), v_load_i(words));
}
KV_INLINE void v_store_halves(uint8_t *const to[2], vi a) {
    _mm256_storeu_si256((__m256i *)to[0], _mm512_castsi512_si256(a));
    _mm256_storeu_si256((__m256i *)to[1], _mm512_extracti64x4_epi64(a, 1));
}
KV_INLINE void v_store_quarters(uint8_t *const to[4], vi a) {
    _mm_storeu_si128((__m128i *)to[0], _mm512_castsi512_si128(a));
    _mm_storeu_si128((__m128i *)to[1], _mm512_extracti32x4_epi32(a, 1));
    _mm_storeu_si128((__m128i *)to[2], _mm512_extracti32x4_epi32(a, 2));
    _mm_storeu_si128((__m128i *)to[3], _mm512_extracti32x4_epi32(a, 3));
}

/* The ways back: rows from where they lie, and rows to words. */
KV_INLINE vi v_load_halves(const uint8_t *const from[2]) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)from[0])),
                              _mm256_loadu_si256((const __m256i *)from[1]), 1);
}
KV_INLINE vi v_load_quarters(const uint8_t *const from[4]) {
    __m512i a = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)from[0]));
    a         = _mm512_inserti32x4(a, _mm_loadu_si128((const __m128i *)from[1]), 1);
    a         = _mm512_inserti32x4(a, _mm_loadu_si128((const __m128i *)from[2]), 2);
    return _mm512_inserti32x4(a, _mm_loadu_si128((const __m128i *)from[3]), 3);
}
KV_INLINE vi v_words_32(vi rows) {
    return _mm512_permutexvar_epi32(
        _mm512_setr_epi32(0, 8, 4, 12, 1, 9, 5, 13, 2, 10, 6, 14, 3, 11, 7, 15), rows);
}
KV_INLINE vi v_words_16(vi rows) {
    return _mm512_permutexvar_epi32(
        _mm512_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15), rows);
}

/* A unit of codes (page.h) turned, so that out[k] holds word k of each M-value, lane m = g + 8 r; word k is
 * the four K-values 4 k .. 4 k + 3.  Bits in brackets, the highest first: what a vector's or a lane's number
 * is made of. */
KV_INLINE void v_turn_unit(const uint8_t *unit, const uint32_t k, vi out[8]) {
    vi x[8];
#pragma GCC unroll 8
    for (uint32_t i = 0; i < k / 4; i++)
        x[i] = v_load_i(unit + 64 * i);
    if (k == 32) {
        /* vector (g2 g1 g0), lane (t1 t0 h r): three times the highest bit leaves and a g enters below. */
        const vi at = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        vi a[8], b[8];
#pragma GCC unroll 4
        for (int g = 0; g < 4; g++)
            v_swap_bits(x[g], x[g + 4], at, 8, &a[g], &a[4 + g]);
#pragma GCC unroll 2
        for (int t = 0; t < 8; t += 4)
#pragma GCC unroll 2
            for (int g = 0; g < 2; g++)
                v_swap_bits(a[t + g], a[t + g + 2], at, 8, &b[t + g], &b[t + g + 2]);
#pragma GCC unroll 4
        for (int t = 0; t < 4; t++)
            v_swap_bits(b[2 * t], b[2 * t + 1], at, 8, &out[t], &out[4 + t]);
    } else if (k == 16) {
        /* vector (g2 g1), lane (g0 t1 t0 r); then vector (t1 g1), lane (t0 g0 r g2). */
        const vi first =
            _mm512_setr_epi32(0, 16, 1, 17, 8, 24, 9, 25, 2, 18, 3, 19, 10, 26, 11, 27);
        const vi second = _mm512_setr_epi32(0, 4, 16, 20, 1, 5, 17, 21, 2, 6, 18, 22, 3, 7, 19, 23);
        vi a[4];
        v_swap_bits(x[0], x[2], first, 4, &a[0], &a[2]);
        v_swap_bits(x[1], x[3], first, 4, &a[1], &a[3]);
        v_swap_bits(a[0], a[1], second, 8, &out[0], &out[1]);
        v_swap_bits(a[2], a[3], second, 8, &out[2], &out[3]);
    } else {
        /* vector (g2), lane (g1 g0 t r). */
        const vi at = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29);
        v_swap_bits(x[0], x[1], at, 2, &out[0], &out[1]);
    }
}

#endif
