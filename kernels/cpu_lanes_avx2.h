/* SPDX-License-Identifier: Apache-2.0 */
/* cpu_lanes_avx2.h - the operations of cpu_lanes.h on AVX2, FMA and F16C: a value is two registers,
 * `a` the lanes 0 .. 7 and `b` the lanes 8 .. 15. */
#ifndef KV_KERNELS_CPU_LANES_AVX2_H
#define KV_KERNELS_CPU_LANES_AVX2_H

#include <string.h>

typedef struct {
    __m256 a, b;
} vf;
typedef struct {
    __m256i a, b;
} vi;
typedef vi vm; /* lanes of all ones or all zeros */

/* Candidates searched at once: three sums of two registers each leave room for no more of sixteen. */
enum { KV_LANES_RANGES = 1 };

#define KV_F2(name, op)                          \
    KV_INLINE vf name(vf x, vf y) {              \
        return (vf){op(x.a, y.a), op(x.b, y.b)}; \
    }
#define KV_I2(name, op)                          \
    KV_INLINE vi name(vi x, vi y) {              \
        return (vi){op(x.a, y.a), op(x.b, y.b)}; \
    }
#define KV_COMPARE(name, how)                                           \
    KV_INLINE vm name(vf x, vf y) {                                     \
        return (vm){_mm256_castps_si256(_mm256_cmp_ps(x.a, y.a, how)),  \
                    _mm256_castps_si256(_mm256_cmp_ps(x.b, y.b, how))}; \
    }

KV_INLINE vf v_zero(void) {
    return (vf){_mm256_setzero_ps(), _mm256_setzero_ps()};
}
KV_INLINE vf v_set(float x) {
    return (vf){_mm256_set1_ps(x), _mm256_set1_ps(x)};
}
KV_INLINE vf v_load(const float *from) {
    return (vf){_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)};
}
KV_INLINE void v_store(float *to, vf x) {
    _mm256_storeu_ps(to, x.a);
    _mm256_storeu_ps(to + 8, x.b);
}
KV_F2(v_add, _mm256_add_ps)
KV_F2(v_sub, _mm256_sub_ps)
KV_F2(v_mul, _mm256_mul_ps)
KV_F2(v_div, _mm256_div_ps)
KV_F2(v_min, _mm256_min_ps)
KV_F2(v_max, _mm256_max_ps)
/* x, its magnitude at most `limit`. */
KV_INLINE vf v_within(vf x, vf limit) {
    return v_min(v_max(x, v_sub(v_zero(), limit)), limit);
}
KV_COMPARE(v_lt, _CMP_LT_OQ)
KV_COMPARE(v_le, _CMP_LE_OQ)
KV_COMPARE(v_eq, _CMP_EQ_OQ)
KV_INLINE vf v_fma(vf x, vf y, vf z) {
    return (vf){_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
KV_INLINE vi v_round_i(vf x) {
    return (vi){_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)};
}
KV_INLINE vf v_to_f(vi x) {
    return (vf){_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)};
}
KV_INLINE vi v_bits(vf x) {
    return (vi){_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)};
}
KV_INLINE vf v_from_bits(vi x) {
    return (vf){_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)};
}

KV_INLINE float v_sum(vf x) {
    __m256 s = _mm256_add_ps(x.a, x.b);
    __m128 t = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    t        = _mm_add_ps(t, _mm_movehl_ps(t, t));
    return _mm_cvtss_f32(_mm_add_ss(t, _mm_movehdup_ps(t)));
}
KV_INLINE float v_greatest(vf x) {
    __m256 s = _mm256_max_ps(x.a, x.b);
    __m128 t = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    t        = _mm_max_ps(t, _mm_movehl_ps(t, t));
    return _mm_cvtss_f32(_mm_max_ss(t, _mm_movehdup_ps(t)));
}

KV_I2(v_gt_i, _mm256_cmpgt_epi32)
KV_I2(v_both, _mm256_and_si256)
KV_I2(v_either, _mm256_or_si256)
KV_INLINE vi v_lanes(void) {
    return (vi){_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7),
                _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15)};
}
KV_INLINE vi v_set_i(int32_t x) {
    return (vi){_mm256_set1_epi32(x), _mm256_set1_epi32(x)};
}
KV_INLINE vm v_first(uint32_t count) {
    return v_gt_i(v_set_i((int32_t)(count < 16 ? count : 16)), v_lanes());
}
KV_INLINE vm v_later(uint32_t lane) {
    return v_gt_i(v_lanes(), v_set_i((int32_t)lane));
} /* lanes after that one */
KV_INLINE vf v_select(vm m, vf yes, vf no) {
    return (vf){_mm256_blendv_ps(no.a, yes.a, _mm256_castsi256_ps(m.a)),
                _mm256_blendv_ps(no.b, yes.b, _mm256_castsi256_ps(m.b))};
}
KV_INLINE vi v_select_i(vm m, vi yes, vi no) {
    return (vi){_mm256_blendv_epi8(no.a, yes.a, m.a), _mm256_blendv_epi8(no.b, yes.b, m.b)};
}
KV_INLINE uint32_t v_truths(vm m) {
    return (uint32_t)_mm256_movemask_ps(_mm256_castsi256_ps(m.a)) |
           (uint32_t)_mm256_movemask_ps(_mm256_castsi256_ps(m.b)) << 8;
}

KV_INLINE vi v_zero_i(void) {
    return (vi){_mm256_setzero_si256(), _mm256_setzero_si256()};
}
KV_INLINE vi v_load_i(const void *from) {
    return (vi){_mm256_loadu_si256(from), _mm256_loadu_si256((const __m256i *)from + 1)};
}
KV_INLINE void v_store_i(void *to, vi x) {
    _mm256_storeu_si256(to, x.a);
    _mm256_storeu_si256((__m256i *)to + 1, x.b);
}
/* Past the caches; `to` is aligned to 64 bytes. */
KV_INLINE void v_store_away(void *to, vi x) {
    _mm256_stream_si256(to, x.a);
    _mm256_stream_si256((__m256i *)to + 1, x.b);
}
KV_I2(v_add_i, _mm256_add_epi32)
KV_I2(v_sub_i, _mm256_sub_epi32)
KV_I2(v_mul_i, _mm256_mullo_epi32)
KV_I2(v_and, _mm256_and_si256)
KV_I2(v_or, _mm256_or_si256)
KV_INLINE vi v_shl(vi x, unsigned n) {
    __m128i by = _mm_cvtsi32_si128((int)n);
    return (vi){_mm256_sll_epi32(x.a, by), _mm256_sll_epi32(x.b, by)};
}
KV_INLINE vi v_shr(vi x, unsigned n) {
    __m128i by = _mm_cvtsi32_si128((int)n);
    return (vi){_mm256_srl_epi32(x.a, by), _mm256_srl_epi32(x.b, by)};
}
KV_INLINE vi v_sar(vi x, unsigned n) {
    __m128i by = _mm_cvtsi32_si128((int)n);
    return (vi){_mm256_sra_epi32(x.a, by), _mm256_sra_epi32(x.b, by)};
}
KV_INLINE int32_t v_sum_i(vi x) {
    __m256i s = _mm256_add_epi32(x.a, x.b);
    __m128i t = _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
    t         = _mm_add_epi32(t, _mm_shuffle_epi32(t, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(t, _mm_shuffle_epi32(t, 0xb1)));
}

/* Bytes hold 8 / width codes each: those at position j. */
KV_INLINE vi v_codes(vi bytes, const uint32_t width, const uint32_t j) {
    return v_and(v_shr(bytes, width * j), v_set_i(((1 << width) - 1) * 0x01010101));
}

/* code * scale + zero for codes that stand in one byte of each lane. */
typedef struct {
    vf scale, zero;
} v_affine;
KV_INLINE v_affine v_affine_of(float scale, float zero) {
    return (v_affine){v_set(scale), v_set(zero)};
}
KV_INLINE vf v_affine_codes(v_affine map, vi quads, const uint32_t byte) {
    vi codes = v_and(v_shr(quads, 8 * byte), v_set_i(0xff));
    return v_add(v_mul(v_to_f(codes), map.scale), map.zero);
}

/* 2^t in two steps: t less its floor; p times 2^floor(t), or 0 below 2^-126. */
KV_INLINE vf v_floor_(vf t) {
    return (vf){_mm256_floor_ps(t.a), _mm256_floor_ps(t.b)};
}
KV_INLINE vf v_fraction(vf t) {
    return v_sub(t, v_floor_(t));
}
KV_INLINE vf v_times_power(vf p, vf t) {
    vf scaled = v_from_bits(v_add_i(v_bits(p), v_shl(v_round_i(v_floor_(t)), 23)));
    return v_select(v_le(v_set(-126.0f), t), scaled, v_zero());
}

/* 16-bit lanes, unsigned. */
KV_I2(v_subs_u16, _mm256_subs_epu16)
KV_I2(v_mulhi_u16, _mm256_mulhi_epu16)
KV_I2(v_mulhrs_16, _mm256_mulhrs_epi16)
KV_I2(v_min_u16, _mm256_min_epu16)

/* c + the sums of products of neighbours: pairs of i16; quads of u8 (x) by i8 (y).  The pair sums of the
 * latter pass through i16: exact for codes up to 15, as 2 * 15 * 128 < 32768. */
KV_INLINE vi v_dot_16(vi c, vi x, vi y) {
    return (vi){_mm256_add_epi32(c.a, _mm256_madd_epi16(x.a, y.a)),
                _mm256_add_epi32(c.b, _mm256_madd_epi16(x.b, y.b))};
}
KV_INLINE vi v_dot_8(vi c, vi x, vi y) {
    const __m256i one = _mm256_set1_epi16(1);
    return (vi){_mm256_add_epi32(c.a, _mm256_madd_epi16(_mm256_maddubs_epi16(x.a, y.a), one)),
                _mm256_add_epi32(c.b, _mm256_madd_epi16(_mm256_maddubs_epi16(x.b, y.b), one))};
}

/* Sixteen elements of a narrow type, widened; and lanes cut down to 16 or 8 bits, which they must fit. */
KV_INLINE vi v_load_u8(const uint8_t *from) {
    __m128i x = _mm_loadu_si128((const __m128i *)from);
    return (vi){_mm256_cvtepu8_epi32(x), _mm256_cvtepu8_epi32(_mm_srli_si128(x, 8))};
}
KV_INLINE vi v_load_i8(const int8_t *from) {
    __m128i x = _mm_loadu_si128((const __m128i *)from);
    return (vi){_mm256_cvtepi8_epi32(x), _mm256_cvtepi8_epi32(_mm_srli_si128(x, 8))};
}
KV_INLINE vi v_load_u16(const uint16_t *from) {
    return (vi){_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)from)),
                _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)from + 1))};
}
KV_INLINE __m256i v_narrow_(vi x) {
    return _mm256_permute4x64_epi64(_mm256_packus_epi32(x.a, x.b), 0xd8);
}
KV_INLINE void v_store_u16(uint16_t *to, vi x) {
    _mm256_storeu_si256((__m256i *)to, v_narrow_(x));
}
KV_INLINE void v_store_u8(uint8_t *to, vi x) {
    __m256i half = v_narrow_(x);
    _mm_storeu_si128((__m128i *)to, _mm_packus_epi16(_mm256_castsi256_si128(half),
                                                     _mm256_extracti128_si256(half, 1)));
}
KV_INLINE vf v_load_f16(const uint16_t *from) {
    return (vf){_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from)),
                _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from + 1))};
}
KV_INLINE void v_store_f16(uint16_t *to, vf x) {
    _mm_storeu_si128((__m128i *)to,
                     _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    _mm_storeu_si128((__m128i *)to + 1,
                     _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

/* Lanes that hold the bits of a binary16. */
KV_INLINE vf v_from_f16(vi bits) {
    __m256i half = v_narrow_(bits);
    return (vf){_mm256_cvtph_ps(_mm256_castsi256_si128(half)),
                _mm256_cvtph_ps(_mm256_extracti128_si256(half, 1))};
}

/* Rounded to binary16 and back. */
KV_INLINE vf v_round_f16(vf x) {
    return (vf){
        _mm256_cvtph_ps(_mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)),
        _mm256_cvtph_ps(_mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC))};
}

/* base[index[lane]]. */
KV_INLINE vi v_gather(const int32_t *base, vi index) {
    return (vi){_mm256_i32gather_epi32(base, index.a, 4), _mm256_i32gather_epi32(base, index.b, 4)};
}

/* ---- Shuffles, by purpose rather than by pattern ---- */

/* Lanes i and i + stride, i without the bit `stride` (1, 2, 4 or 8), become their sum and difference.  The
 * product with one of either sign is exact, so this rounds once. */
KV_INLINE vf v_butterfly(vf x, int stride) {
    if (stride == 8) return (vf){_mm256_add_ps(x.a, x.b), _mm256_sub_ps(x.a, x.b)};
    __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), at = _mm256_set1_epi32(stride);
    __m256 minus = _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(lane, at), at));
    __m256 sign  = _mm256_blendv_ps(_mm256_set1_ps(1.0f), _mm256_set1_ps(-1.0f), minus);
    at           = _mm256_xor_si256(lane, at);
    return (vf){_mm256_fmadd_ps(x.a, sign, _mm256_permutevar8x32_ps(x.a, at)),
                _mm256_fmadd_ps(x.b, sign, _mm256_permutevar8x32_ps(x.b, at))};
}

/* x[i] lane j becomes y[j] lane i, eight by eight. */
KV_INLINE void v_turn_8_(const __m256 x[8], __m256 y[8]) {
    __m256 p[8], q[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        p[i]     = _mm256_unpacklo_ps(x[i], x[i + 1]);
        p[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
        q[i]     = _mm256_shuffle_ps(p[i], p[i + 2], 0x44);
        q[i + 1] = _mm256_shuffle_ps(p[i], p[i + 2], 0xee);
        q[i + 2] = _mm256_shuffle_ps(p[i + 1], p[i + 3], 0x44);
        q[i + 3] = _mm256_shuffle_ps(p[i + 1], p[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        y[i]     = _mm256_permute2f128_ps(q[i], q[i + 4], 0x20);
        y[i + 4] = _mm256_permute2f128_ps(q[i], q[i + 4], 0x31);
    }
}

/* The sums of four vectors. */
KV_INLINE void v_sum_four(const vf x[4], float *to) {
    __m256 a = _mm256_hadd_ps(_mm256_add_ps(x[0].a, x[0].b), _mm256_add_ps(x[1].a, x[1].b));
    __m256 b = _mm256_hadd_ps(_mm256_add_ps(x[2].a, x[2].b), _mm256_add_ps(x[3].a, x[3].b));
    __m256 s = _mm256_hadd_ps(a, b);
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
}

/* The sums of four times four vectors, times `scale`: those of x[i] to to + i * pitch. */
KV_INLINE void v_sum_four_fours(const vf x[4][4], float scale, float *to, size_t pitch) {
    for (int i = 0; i < 4; i++) {
        v_sum_four(x[i], to + i * pitch);
        for (int j = 0; j < 4; j++) to[i * pitch + j] *= scale;
    }
}

/* The greatest of each of four vectors. */
KV_INLINE void v_greatest_four(const vf x[4], float *to) {
    for (int i = 0; i < 4; i++)
        to[i] = v_greatest(x[i]);
}

/* x[i] lane j becomes x[j] lane i. */
KV_INLINE void v_turn_16(vf x[16]) {
    __m256 in[8], out[4][8];
    for (int part = 0; part < 4; part++) { /* rows 8 (part & 1) on, columns 8 (part >> 1) on */
        for (int i = 0; i < 8; i++)
            in[i] = part & 2 ? x[8 * (part & 1) + i].b : x[8 * (part & 1) + i].a;
        v_turn_8_(in, out[part]);
    }
    for (int i = 0; i < 8; i++) {
        x[i]     = (vf){out[0][i], out[1][i]};
        x[8 + i] = (vf){out[2][i], out[3][i]};
    }
}

/* Rows of a key tile to tokens: lane 4 a + 2 r + b takes lane 8 r + 2 a + b (page.h). */
KV_INLINE vf v_rows_to_tokens(vf x) {
    __m256d p = _mm256_castps_pd(x.a), q = _mm256_castps_pd(x.b);
    __m256d even = _mm256_unpacklo_pd(p, q), odd = _mm256_unpackhi_pd(p, q);
    return (vf){_mm256_castpd_ps(_mm256_permute2f128_pd(even, odd, 0x20)),
                _mm256_castpd_ps(_mm256_permute2f128_pd(even, odd, 0x31))};
}

/* The way back, and the token that lane m of a row stands for. */
KV_INLINE vf v_tokens_to_rows(vf x) {
    __m256d p = _mm256_castps_pd(x.a), q = _mm256_castps_pd(x.b);
    __m256d low = _mm256_permute2f128_pd(p, q, 0x20), high = _mm256_permute2f128_pd(p, q, 0x31);
    __m256d even = _mm256_unpacklo_pd(low, high), odd = _mm256_unpackhi_pd(low, high);
    return (vf){_mm256_castpd_ps(even), _mm256_castpd_ps(odd)};
}
KV_INLINE vi v_lane_tokens(void) {
    return v_lanes();
}
KV_INLINE vi v_row_tokens(void) {
    return (vi){_mm256_setr_epi32(0, 1, 4, 5, 8, 9, 12, 13),
                _mm256_setr_epi32(2, 3, 6, 7, 10, 11, 14, 15)};
}

/* Four vectors of i32 that fit 16 bits, each x = 256 hi + lo with lo signed: 64 bytes of hi and of lo, lane
 * after lane, or, where lanes are rows of a key tile, token after token. */
KV_INLINE void v_digits(const vi given[4], const int rows, int8_t *hi, int8_t *lo) {
    vi x[4];
    for (int i = 0; i < 4; i++)
        x[i] = rows ? v_bits(v_rows_to_tokens(v_from_bits(given[i]))) : given[i];
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const __m256i low = _mm256_set1_epi16(0x00ff), half = _mm256_set1_epi16(128);
    for (int i = 0; i < 2; i++) {
        __m256i a = _mm256_packs_epi32(x[2 * i].a, x[2 * i].b),
                b = _mm256_packs_epi32(x[2 * i + 1].a, x[2 * i + 1].b);
        __m256i l = _mm256_packus_epi16(_mm256_and_si256(a, low), _mm256_and_si256(b, low));
        __m256i h = _mm256_packs_epi16(_mm256_srai_epi16(_mm256_add_epi16(a, half), 8),
                                       _mm256_srai_epi16(_mm256_add_epi16(b, half), 8));
        _mm256_storeu_si256((__m256i *)(lo + 32 * i), _mm256_permutevar8x32_epi32(l, order));
        _mm256_storeu_si256((__m256i *)(hi + 32 * i), _mm256_permutevar8x32_epi32(h, order));
    }
}

/* to[i] = from[index[i]] for i < count, count a multiple of 64, all below 64 * tables, tables 1, 2 or 4. */
KV_INLINE void v_permute_bytes(int8_t *to, const int8_t *from, const uint8_t *index, uint32_t count,
                               uint32_t tables) {
    (void)tables;
    for (uint32_t i = 0; i < count; i++)
        to[i] = from[index[i]];
}

/* 64 bytes of a unit of 32 K-values are rows g and g + 8 of its tiles: those rows, one behind the other.  Of a
 * unit of 16 K-values: rows g, g + 8, g + 1 and g + 9. */
KV_INLINE vi v_rows_32(const uint8_t *words) {
    vi x         = v_load_i(words); /* t0 t1 | t2 t3, each of them (h r) */
    __m256i even = _mm256_permute2x128_si256(x.a, x.b, 0x20);
    __m256i odd  = _mm256_permute2x128_si256(x.a, x.b, 0x31);
    __m256i h0 = _mm256_unpacklo_epi32(even, odd), h1 = _mm256_unpackhi_epi32(even, odd);
    return (vi){_mm256_permute4x64_epi64(_mm256_unpacklo_epi64(h0, h1), 0xd8),
                _mm256_permute4x64_epi64(_mm256_unpackhi_epi64(h0, h1), 0xd8)};
}
KV_INLINE vi v_rows_16(const uint8_t *words) {
    vi x               = v_load_i(words);
    const __m256i rows = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
    return (vi){_mm256_permutevar8x32_epi32(x.a, rows), _mm256_permutevar8x32_epi32(x.b, rows)};
}
KV_INLINE void v_store_halves(uint8_t *const to[2], vi x) {
    _mm256_storeu_si256((__m256i *)to[0], x.a);
    _mm256_storeu_si256((__m256i *)to[1], x.b);
}
KV_INLINE void v_store_quarters(uint8_t *const to[4], vi x) {
    _mm_storeu_si128((__m128i *)to[0], _mm256_castsi256_si128(x.a));
    _mm_storeu_si128((__m128i *)to[1], _mm256_extracti128_si256(x.a, 1));
    _mm_storeu_si128((__m128i *)to[2], _mm256_castsi256_si128(x.b));
    _mm_storeu_si128((__m128i *)to[3], _mm256_extracti128_si256(x.b, 1));
}

/* The ways back: rows from where they lie, and rows to words. */
KV_INLINE vi v_load_halves(const uint8_t *const from[2]) {
    return (vi){_mm256_loadu_si256((const __m256i *)from[0]),
                _mm256_loadu_si256((const __m256i *)from[1])};
}
KV_INLINE vi v_load_quarters(const uint8_t *const from[4]) {
    return (vi){_mm256_loadu2_m128i((const __m128i *)from[1], (const __m128i *)from[0]),
                _mm256_loadu2_m128i((const __m128i *)from[3], (const __m128i *)from[2])};
}
KV_INLINE vi v_words_32(vi rows) {
    const __m256i order = _mm256_setr_epi32(0, 4, 2, 6, 1, 5, 3, 7);
    __m256i a = _mm256_permutevar8x32_epi32(rows.a, order);
    __m256i b = _mm256_permutevar8x32_epi32(rows.b, order);
    return (vi){_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b)};
}
KV_INLINE vi v_words_16(vi rows) {
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    return (vi){_mm256_permutevar8x32_epi32(rows.a, order),
                _mm256_permutevar8x32_epi32(rows.b, order)};
}

/* A unit of codes (page.h) turned, so that out[k] holds word k of each M-value, lane m = g + 8 r; word k is
 * the four K-values 4 k .. 4 k + 3. */
KV_INLINE void v_turn_unit(const uint8_t *unit, uint32_t k, vi out[8]) {
    const float *words = (const float *)unit;
    __m256 x[8], y[8];
    if (k == 32) {
        /* Row g has sixteen words (t1 t0 h r): half of them at a time. */
        for (int t = 0; t < 4; t += 2) {
#pragma GCC unroll 8
            for (int g = 0; g < 8; g++)
                x[g] = _mm256_loadu_ps(words + 16 * g + 4 * t);
            v_turn_8_(x, y); /* y[4 t0 + 2 h + r] */
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                int t0 = i >> 1, h = i & 1;
                out[4 * h + t + t0] = (vi){_mm256_castps_si256(y[4 * t0 + 2 * h]),
                                           _mm256_castps_si256(y[4 * t0 + 2 * h + 1])};
            }
        }
    } else if (k == 16) {
        /* Row g has eight words (t1 t0 r). */
#pragma GCC unroll 8
        for (int g = 0; g < 8; g++)
            x[g] = _mm256_loadu_ps(words + 8 * g);
        v_turn_8_(x, y);
        for (int t = 0; t < 4; t++)
            out[t] = (vi){_mm256_castps_si256(y[2 * t]), _mm256_castps_si256(y[2 * t + 1])};
    } else {
        /* Row g has four words (t0 r); memory to memory, as only D = 96 has such units. */
        uint32_t word[2][16];
        for (int g = 0; g < 8; g++)
            for (int i = 0; i < 4; i++)
                memcpy(&word[i >> 1][g + 8 * (i & 1)], words + 4 * g + i, 4);
        out[0] = v_load_i(word[0]);
        out[1] = v_load_i(word[1]);
    }
}

#endif
