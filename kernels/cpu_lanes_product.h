/* SPDX-License-Identifier: Apache-2.0 */
/* cpu_lanes_product.h - a panel of codes by the digits of query vectors.  Private to kernels/.
 *
 * The one operation that meets every code once per query vector, in two versions that give the same
 * integers: vpdpbusd (or what AVX2 has for it), and tiles of the AMX unit.
 *
 *     digit    [bundle][digit][vector of the bundle][pitch]   signed bytes, by K-value
 *     sums     [tile][digit * bundle + vector][16 M-values]   exact
 *
 * A bundle is up to eight query vectors: with their upper digits in eight rows and their lower ones in
 * eight more it is a tile of the AMX unit as it stands, and a panel (cpu_lanes_panel.h) the other.  A
 * tile's product costs a cycle for each row of digits; bundles are smaller where there are fewer vectors.
 */
#ifndef KV_KERNELS_CPU_LANES_PRODUCT_H
#define KV_KERNELS_CPU_LANES_PRODUCT_H

#include "kernels/cpu_lanes_panel.h"

enum {
    BUNDLE         = 8,
    DIGITS         = 3, /* at most, of a query; p has 2 */
    PRODUCT_TILES  = 4, /* of a panel at once */
    PRODUCT_ROWS   = 2 * BUNDLE + 16, /* a third digit's tile is stored in full */
};

/* Of one tile. */
typedef int32_t product_sum[PRODUCT_ROWS][16];

struct product {
    const uint8_t *panel; /* the first tile's row 0 */
    uint32_t rows;        /* of a tile */
    uint32_t tiles;       /* 2 or 4 */
    const int8_t *digit;  /* of the bundle */
    uint32_t pitch;
    uint32_t bundle;  /* vectors that bundles have */
    uint32_t vectors; /* that this one has */
    bool fine;        /* three digits */
};

#ifdef __AMX_INT8__

/* Shapes of the eight tile registers: 0 .. 3 sums, 4 digits, 5 and 6 codes, and, when a third digit is
 * multiplied, 6 the digits and 7 their sums, with rows to spare. */
struct tile_shapes {
    uint8_t palette, start_row, zero[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};
static_assert(sizeof(struct tile_shapes) == 64, "what ldtilecfg reads");

static void product_begin(uint32_t bundle) {
    struct tile_shapes shapes = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        shapes.row_bytes[i] = 64;
        shapes.rows[i]      = i < 5 ? (uint8_t)(2 * bundle) : 16;
    }
    _tile_loadconfig(&shapes);
}

/* Gives the unit's state back, so that a switch of threads need not save it. */
static void product_end(void) {
    _tile_release();
}

/* Codes past a tile's last row are the next tile's: they meet digits of zero. */
static void product(const struct product *of, product_sum *sums) {
    size_t tile_bytes  = (size_t)of->rows * KV_PANEL_ROW;
    uint32_t steps     = (of->rows + 15) / 16;
    const uint8_t *one = of->panel, *two = one + tile_bytes, *three = two + tile_bytes,
                  *four = three + tile_bytes;
    _tile_zero(0);
    _tile_zero(1);
    if (of->tiles == 4) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (uint32_t i = 0; i < steps; i++) {
        _tile_loadd(4, of->digit + 64 * i, of->pitch);
        _tile_loadd(5, one + 1024 * i, 64);
        _tile_dpbsud(0, 4, 5);
        _tile_loadd(6, two + 1024 * i, 64);
        _tile_dpbsud(1, 4, 6);
        if (of->tiles != 4) continue;
        _tile_loadd(5, three + 1024 * i, 64);
        _tile_dpbsud(2, 4, 5);
        _tile_loadd(6, four + 1024 * i, 64);
        _tile_dpbsud(3, 4, 6);
    }
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    if (of->tiles == 4) {
        _tile_stored(2, sums[2], 64);
        _tile_stored(3, sums[3], 64);
    }
    for (uint32_t a = 0; of->fine && a < of->tiles; a++) {
        _tile_zero(7);
        for (uint32_t i = 0; i < steps; i++) {
            _tile_loadd(6, of->digit + (size_t)2 * of->bundle * of->pitch + 64 * i, of->pitch);
            _tile_loadd(5, of->panel + a * tile_bytes + 1024 * i, 64);
            _tile_dpbsud(7, 6, 5);
        }
        _tile_stored(7, sums[a][2 * of->bundle], 64);
    }
}

#else

static void product_begin(uint32_t bundle) {
}
static void product_end(void) {
}

/* Sums of `tiles` tiles and `vectors` query vectors from vector `first` on.  The counts are constants where
 * this is inlined, and the unrolled sums stay in registers. */
KV_INLINE void product_shape(const struct product *of, uint32_t first, const int digits,
                             const int tiles, const int vectors, product_sum *sums) {
    vi sum[4][4][DIGITS];
    const int8_t *digit[DIGITS];
    uint32_t rows = of->rows, pitch = of->pitch;
#pragma GCC unroll 3
    for (int d = 0; d < digits; d++)
        digit[d] = of->digit + ((uint32_t)d * of->bundle + first) * pitch;
#pragma GCC unroll 4
    for (int a = 0; a < tiles; a++)
#pragma GCC unroll 4
        for (int b = 0; b < vectors; b++)
#pragma GCC unroll 3
            for (int d = 0; d < digits; d++)
                sum[a][b][d] = v_zero_i();
    for (uint32_t row = 0; row < rows; row++) {
        vi code[4];
#pragma GCC unroll 4
        for (int a = 0; a < tiles; a++)
            code[a] = v_load_i(of->panel + (a * rows + row) * KV_PANEL_ROW);
#pragma GCC unroll 4
        for (int b = 0; b < vectors; b++)
#pragma GCC unroll 3
            for (int d = 0; d < digits; d++) {
                int32_t word;
                memcpy(&word, digit[d] + (uint32_t)b * pitch + 4 * row, 4);
                vi x = v_set_i(word);
#pragma GCC unroll 4
                for (int a = 0; a < tiles; a++)
                    sum[a][b][d] = v_dot_8(sum[a][b][d], code[a], x);
            }
    }
#pragma GCC unroll 4
    for (int a = 0; a < tiles; a++)
#pragma GCC unroll 4
        for (int b = 0; b < vectors; b++)
#pragma GCC unroll 3
            for (int d = 0; d < digits; d++)
                v_store_i(sums[a][(uint32_t)d * of->bundle + first + (uint32_t)b], sum[a][b][d]);
}

/* Enough sums in flight to cover the product's latency, few enough for the registers. */
KV_INLINE void product_digits(const struct product *of, const int digits, product_sum *sums) {
    for (uint32_t i = 0, n; i < of->vectors; i += n) {
        n = of->vectors - i;
        if (n == 1 && of->tiles == 4) {
            product_shape(of, i, digits, 4, 1, sums);
        } else if (n == 1) {
            product_shape(of, i, digits, 2, 1, sums);
        } else if (n < 4 && of->tiles == 4) {
            n = 2;
            product_shape(of, i, digits, 4, 2, sums);
        } else if (n < 4) {
            n = 2;
            product_shape(of, i, digits, 2, 2, sums);
        } else {
            n = 4;
            product_shape(of, i, digits, 2, 4, sums);
            if (of->tiles == 2) continue;
            struct product rest = *of;
            rest.panel += 2 * of->rows * KV_PANEL_ROW;
            product_shape(&rest, i, digits, 2, 4, sums + 2);
        }
    }
}

static void product(const struct product *of, product_sum *sums) {
    if (of->fine)
        product_digits(of, 3, sums);
    else
        product_digits(of, 2, sums);
}

#endif

/* The sums of vector `b` over a tile, digits put together, in units of its last digit. */
KV_INLINE vf product_value(int32_t (*sums)[16], uint32_t bundle, uint32_t b, bool fine) {
    vf x = v_to_f(v_add_i(v_shl(v_load_i(sums[b]), 8), v_load_i(sums[bundle + b])));
    return fine ? v_fma(x, v_set(256.0f), v_to_f(v_load_i(sums[2 * bundle + b]))) : x;
}

#endif
