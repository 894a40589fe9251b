/* SPDX-License-Identifier: Apache-2.0 */
/* page.h - the packed page, to the bit.  Version 1.
 *
 * A page holds K and V of one layer for T = 128 tokens of H KV heads with D
 * channels.  It is H equal *head records*, one behind the other; everything is
 * little endian, every part starts on a multiple of 16 bytes, and unused bytes
 * are zero, so that equal inputs give equal pages to the byte on every backend.
 * The bytes are the same in GPU memory, in host memory, on disk and on the wire.
 *
 * RAW record (also the raw page's halves, see kv_types.h).  A raw page is not made
 * of records: it is K [H][128][D] and then V [H][128][D] in 16-bit elements.
 *
 * UNBIASED record             bytes     (D = 128, average key width 2: 9232)
 *   header                    16        mix u8, zero u8, key_factor f16, value_factor f16, zero
 *   key_order                 D         u8: slot -> channel, most important channel first
 *   key_scale                 D         e4m3, by slot
 *   key_zero                  2 D       f16, by slot
 *   key_codes                 4 D * sum of the four widths
 *   value_mean                2 D       f16, by channel
 *   value_scale               128       e4m3, by token
 *   value_zero                128       i8, by token: quarters of the token's scale
 *   value_codes               16 D * value_bits
 *
 * MINMAX record, group g, KG = 128 / g key groups, VG = D / g value groups
 *   key_scale                 2 KG D    dtype, [key group][channel]
 *   key_min                   2 KG D
 *   key_codes                 16 D * key_bits
 *   value_scale               2 VG 128  dtype, [value group][token]
 *   value_min                 2 VG 128
 *   value_codes               16 D * value_bits
 *
 * ---- Order of codes ------------------------------------------------------------
 *
 * Codes stand in the order in which the A operand of an 8-bit tensor-core product
 * (m16n8k32, or m16n8k16) lies in the registers of a warp, so that a lane's load is
 * its operand; a CPU reads the same bytes as 4-channel groups for vpdpbusd.
 *
 * A *tile* is 16 M-values by 32, 16 or 8 K-values.  Lane (g = 0..7, t = 0..3), row
 * half r = 0..1 and K half h = 0..1 own one byte-quad:
 *
 *      M-value  g + 8 r            K-values  16 h + 4 t + {0, 1, 2, 3} = byte 0..3
 *
 * A byte of width w holds P = 8 / w codes, one from each of P consecutive tiles (the
 * *positions*): position j in bits [w j, w j + w).  P tiles together are a *unit* of
 * little-endian 32-bit words.  For a tile with k K-values:
 *
 *      k = 32: word = (4 g + t) * 4 + 2 h + r       128 words
 *      k = 16: word = (4 g + t) * 2 + r              64 words     (h = 0)
 *      k =  8: word = (2 g + t) * 2 + r              32 words     (h = 0, t = 0..1)
 *
 * K: M-values are tokens, K-values are slots.  Token tile i = 0..7; row m of it is token
 *
 *      16 i + 4 ((m & 7) >> 1) + 2 (m >> 3) + (m & 1)
 *
 * (this order of rows makes the score accumulators of the first product the byte-quads
 * of four consecutive tokens that the second product needs).  Quarter q of the slots
 * [q D/4, (q+1) D/4) has width w_q and is cut into chunks of slots: 32 + 32 (D = 256),
 * 32 (D = 128), 16 + 8 (D = 96), 16 (D = 64).  Order: quarter, chunk, unit, word; unit u
 * holds token tiles u P .. u P + P - 1.  A quarter of width 0 has no bytes.  MINMAX is
 * the same with four quarters of width key_bits and slot = channel.
 *
 * V: M-values are channels (16 i + m), K-values are tokens (k = 32, natural order).
 * Tile number n = (D / 16) * token_block + channel_tile, for token_block = 0..3 of 32
 * tokens and channel_tile = 0 .. D/16 - 1; unit u holds tiles u P .. u P + P - 1.
 *
 * ---- Values -------------------------------------------------------------------
 *
 * All arithmetic below is IEEE binary32 with one rounding (to nearest, ties to even)
 * per operation written: no contraction to fma, no reassociation.  f16(x) rounds to
 * binary16, saturating at +-65504; sums marked "exact" are integers.
 *
 *   UNBIASED  k^ = code * s + z      s = e4m3(key_scale) * (key_factor / 448), z = key_zero
 *             v^ = code * s + zq * (s / 4) + mean[c]
 *                                    s = e4m3(value_scale) * (value_factor / 448)
 *             width 0: k^ = z.  Rotated: code * s + zq * (s / 4) is channel c of R y, where
 *             y = v - mean and R is the normalised Walsh-Hadamard matrix (below).
 *   MINMAX    x^ = code * scale + min
 *
 * ---- UNBIASED: from 16-bit elements to codes -----------------------------------
 *
 * Attention averages over tokens and channels: noise averages out, bias does not.  The
 * range of a group is chosen for the least squared error *after* the scale is set so
 * that x^ regressed on x has slope one and the mean is kept (RaBitQ, SIGMOD 2024, argues
 * the same for vectors).  All choices hang on exact integers.
 *
 * Group.  n elements x[i] as binary32 (n = 128 for K: tokens; n = D for V: channels).
 *   low = min + 0 (so that a minimum of -0 is +0, whichever zero came first), high = max,
 *   span = high - low.
 *   Constant group: span <= 1e-8.  Scale 0, codes 0, mean = low.
 *   u[i] = rint((x[i] - low) * (2047 / span)), an integer in 0 .. 2047
 *   unit = span / 2047
 *   SU = sum u, SUU = sum u^2 (exact);  P = n SUU - SU^2 (exact, 64 bits)
 *   mean = low + (float(SU) / float(n)) * unit
 *
 * Codes of a candidate range (a, b) at width w > 1, top = 2^w - 1, a, b in {0, .08, .16, .24}:
 *   A = {0, 164, 328, 491}[a];  m(w, a, b) = kv_range_step[] below, an f16 value near
 *   top / ((1 - a - b) 2047)
 *   code = min(max(rint((u - A) * m), 0), top)      (the product is exact in binary32)
 * Width 1 has one candidate: code = 1 if n u > SU, else 0.
 *   SC = sum c, SCC = sum c^2, SCU = sum c u (exact)
 *   X = n SCU - SC SU,  Q = n SCC - SC^2 (exact, 32 bits signed)
 *   merit = (float(X) * float(X)) / float(Q); candidates in order a outer, b inner; the
 *   first with the greatest merit wins.  Q = 0 or X <= 0: not a candidate.
 *   s = (float(P) / float(X)) * unit                the unbiased scale
 *   e = float(P) * (float(P) / merit - 1)           its squared error, times n, in units
 *
 * Page factor of the scales s of one kind (all slots of width > 0, or all tokens):
 *   factor = f16(max s);  step = factor / 448;  factor = 0: every scale is 0
 *   stored e4m3 = nearest e4m3fn of s / step, ties to even, at most 448; s' = e4m3 * step
 *
 * K.  energy[c] is the running mean of q[c]^2 over the query rows that attend this KV
 *   head, or 1; at most KV_ENERGY_MAX, which keeps what follows free of NaN.
 *   weight[c] = (unit * unit) * energy[c]; a constant group has P = 0, unit = 0 and every e 0.
 *   importance[c] = float(P) * weight[c]; slots are channels sorted by falling
 *   importance, ties by rising channel.
 *   error(c, w) = e * weight[c] for w > 0;  float(P) * weight[c] for w = 0
 *   cost(mix) = sum over slots in order 0 .. D-1 of error(slot's channel, its quarter's
 *   width), accumulated one after the other; the first mix with the least cost wins.
 *   key_zero = f16(mean - s' * (float(SC) / 128));  width 0: f16(mean)
 *
 * V.  mean[c] = f16(sum / 128), where partial sum j = 0..7 adds tokens j, j + 8, ... in
 *   order to +0, and the eight are added as ((0+1)+(2+3))+((4+5)+(6+7)).  y = v - mean.
 *   Rotated: y is replaced by the Walsh-Hadamard transform in binary32: for each aligned
 *   run of N channels, N the largest power of two that divides D, butterflies (a + b, a - b)
 *   at strides 1, 2, 4, .. N/2 in this order, then each times float(1 / sqrt(N)).  R is
 *   its own inverse.
 *   Then the group rule at width value_bits.  z = mean_of_group - s * (float(SC) / float(D)).
 *   If s = 0 or |z| > 31 s, the token is nearly constant: codes 0, SC = 0,
 *   s = |mean_of_group| / 31.
 *   value_zero = clamp(rint((mean_of_group - s' * (float(SC) / float(D))) / (s' / 4)), -128, 127),
 *   0 if s' = 0.
 *
 * Elements of magnitude above 65504 (bf16 can hold them), NaN and Inf never get here:
 * kv_kernel_ingest() refuses them.
 *
 * ---- MINMAX: the published algorithm --------------------------------------------
 *
 * KIVI (arXiv 2402.02750, its reference code at commit 876b4d2): in the element type,
 * r(x) = rounded to it (one binary32 operation, then rounded; saturating at the largest
 * finite value),
 *   min = min x + 0;  max = max x + 0;  scale = r(r(max - min) / top);
 *   code = rint(clamp(r(r(x - min) / scale), 0, top))
 * scale = 0: code 0 (the published code divides by zero there).  The + 0 turns -0 into +0,
 * because which zero a minimum or a maximum finds depends on the machine.
 *
 * Published layout, for import and export: 32-bit words, code j of a word in bits
 * [w j, w j + w), 32 / w codes per word:
 *   K codes int32 [H][D][T w / 32], consecutive tokens;  scale, min [H][D][T / g]
 *   V codes int32 [H][T][D w / 32], consecutive channels; scale, min [H][T][D / g]
 */
#ifndef KV_KERNELS_PAGE_H
#define KV_KERNELS_PAGE_H

#include "proto/kv_types.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { KV_PAGE_VERSION = 1, KV_UNITS = 2047, KV_RANGES = 4 };

/* Query energy is 0 .. this; kv_kernel_observe() keeps to it. */
#define KV_ENERGY_MAX 1e30f

struct kv_page_header {
    uint8_t mix;           /* index into codec.mixes */
    uint8_t zero0;
    uint16_t key_factor;   /* f16 bits */
    uint16_t value_factor; /* f16 bits */
    uint8_t zero[10];
};
static_assert(sizeof(struct kv_page_header) == 16, "the record's first part");

/* Where the parts of one head record begin, in bytes from the record's start.  Parts a
 * codec does not have are empty: they begin where the next one does. */
struct kv_page_map {
    uint32_t key_order;
    uint32_t key_scale;
    uint32_t key_zero;    /* MINMAX: key_min */
    uint32_t key_codes;
    uint32_t value_mean;
    uint32_t value_scale;
    uint32_t value_zero;  /* MINMAX: value_min */
    uint32_t value_codes;
    uint32_t record_bytes; /* of the whole head record: a multiple of 16 */
};

/* [any thread] The map of a packed record; not for RAW. */
struct kv_page_map kv_page_map(const struct kv_shape *shape);

/* [any thread] Bytes of a whole page under the shape's codec, RAW included. */
size_t kv_page_bytes(const struct kv_shape *shape);

/* [any thread] True if heads, head_dim and dtype are in range and the codec's fields obey the
 * rules in kv_types.h for this head_dim.  Stricter than needed to compute, because a codec is
 * hashed into a fingerprint: fields that its kind does not use are zero, and so are the mixes
 * behind mix_count.  The widths of a mix add up to at least 1; MINMAX groups divide head_dim. */
bool kv_shape_valid(const struct kv_shape *shape);

/* Sum of the widths of any mix (MINMAX: 4 key_bits): key_codes take 4 D times this. */
uint32_t kv_codec_key_width_sum(const struct kv_codec *codec);

/* [any thread] True if a packed page, kv_page_bytes() of it, is one that quantize could have
 * made as far as its metadata shows: a mix of the codec, an order that is a permutation,
 * scales that are finite and not negative, zeros and means that are finite, unused bytes 0.
 * For pages that come from outside; any codes are valid.  RAW: every element is finite. */
bool kv_page_valid(const struct kv_shape *shape, const void *page);

/* Bits per element of a page, metadata counted. */
double kv_shape_bits(const struct kv_shape *shape);

/* Range offsets A, and steps m as binary16 bits, [a][b], for widths 2 and 4.  Generated as
 * the f16 nearest to top / ((1 - a - b) * 2047) with a, b in {0, .08, .16, .24} computed in
 * binary64; a test regenerates them. */
extern const uint16_t kv_range_offset[KV_RANGES];
extern const uint16_t kv_range_step2[KV_RANGES][KV_RANGES];
extern const uint16_t kv_range_step4[KV_RANGES][KV_RANGES];

/* Presets by name: "raw16", "kivi2-paper", "kivi4-paper", "kivi2.5", "kivi2", "kivi1.75",
 * "kivi1.5".  Also gives the sink blocks and window tokens that belong to the preset.
 * KV_NOT_FOUND: no such name; nothing is written. */
struct kv_preset {
    const char *name;
    struct kv_codec codec;
    uint16_t sink_blocks;
    uint16_t window_tokens;
};
enum kv_status kv_preset_find(const char *name, struct kv_preset *out);

/* The presets in order of bits, for listings; count through the argument. */
const struct kv_preset *kv_presets(size_t *count);

/* The name of a codec that equals a preset's, or "custom". */
const char *kv_codec_name(const struct kv_codec *codec);

#ifdef __cplusplus
}
#endif
#endif
