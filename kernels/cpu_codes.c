/* SPDX-License-Identifier: Apache-2.0 */
/* cpu_codes.c - the order of codes, walked.
 *
 * In page.h's words: a tile is 16 M-values by k K-values, a byte holds the same place of P
 * consecutive tiles, and P tiles are a unit.  So the walk goes over the places of a tile,
 * and for each over the units and, inside a byte, over the positions.
 */
#include "kernels/cpu_codes.h"

enum { T = KV_BLOCK_TOKENS, TILE_ROWS = 16, TOKEN_TILES = T / TILE_ROWS };

/* Byte of a unit that holds row m (0..15) and K-value kk (0..k-1) of its tiles. */
static uint32_t place_in_unit(uint32_t k, uint32_t m, uint32_t kk) {
    uint32_t g = m & 7, r = m >> 3;
    uint32_t h = kk >> 4, t = kk >> 2 & 3, byte = kk & 3;
    uint32_t word = k == 32   ? (4 * g + t) * 4 + 2 * h + r
                    : k == 16 ? (4 * g + t) * 2 + r
                              : (2 * g + t) * 2 + r;
    return 4 * word + byte;
}

/* Which of a K tile's 16 tokens stands in row m. */
static uint32_t key_row_token(uint32_t m) {
    return 4 * ((m & 7) >> 1) + 2 * (m >> 3) + (m & 1);
}

/* Slots of the next chunk of a quarter that has `left` slots to go. */
static uint32_t chunk_slots(uint32_t left) {
    return left >= 32 ? 32 : left >= 16 ? 16 : 8;
}

/* One chunk of K slots at one width; codes and packed point at its first slot and byte. */
static void pack_key_chunk(uint32_t width, uint32_t k, const uint8_t *codes, uint8_t *packed) {
    uint32_t P = 8 / width, units = TOKEN_TILES / P, unit_bytes = TILE_ROWS * k;
    for (uint32_t slot = 0; slot < k; slot++)
        for (uint32_t m = 0; m < TILE_ROWS; m++) {
            const uint8_t *code = codes + slot * T + key_row_token(m);
            uint8_t *place = packed + place_in_unit(k, m, slot);
            for (uint32_t unit = 0; unit < units; unit++) {
                uint32_t byte = 0;
                for (uint32_t j = 0; j < P; j++)
                    byte |= (uint32_t)code[TILE_ROWS * (unit * P + j)] << (width * j);
                place[unit * unit_bytes] = (uint8_t)byte;
            }
        }
}

static void unpack_key_chunk(uint32_t width, uint32_t k, const uint8_t *packed, uint8_t *codes) {
    uint32_t P = 8 / width, units = TOKEN_TILES / P, unit_bytes = TILE_ROWS * k;
    uint32_t mask = (1u << width) - 1;
    for (uint32_t slot = 0; slot < k; slot++)
        for (uint32_t m = 0; m < TILE_ROWS; m++) {
            uint8_t *code = codes + slot * T + key_row_token(m);
            const uint8_t *place = packed + place_in_unit(k, m, slot);
            for (uint32_t unit = 0; unit < units; unit++) {
                uint32_t byte = place[unit * unit_bytes];
                for (uint32_t j = 0; j < P; j++)
                    code[TILE_ROWS * (unit * P + j)] = (uint8_t)(byte >> (width * j) & mask);
            }
        }
}

void kv_codes_pack_keys(const uint8_t widths[KV_QUARTERS], uint32_t head_dim,
                        const uint8_t *codes, uint8_t *packed) {
    uint32_t quarter = head_dim / KV_QUARTERS;
    for (uint32_t q = 0; q < KV_QUARTERS; q++) {
        if (widths[q] == 0) continue;
        for (uint32_t slot = 0, k; slot < quarter; slot += k) {
            k = chunk_slots(quarter - slot);
            pack_key_chunk(widths[q], k, codes + (q * quarter + slot) * T, packed);
            packed += widths[q] * T * k / 8;
        }
    }
}

void kv_codes_unpack_keys(const uint8_t widths[KV_QUARTERS], uint32_t head_dim,
                          const uint8_t *packed, uint8_t *codes) {
    uint32_t quarter = head_dim / KV_QUARTERS;
    for (uint32_t q = 0; q < KV_QUARTERS; q++) {
        if (widths[q] == 0) {
            memset(codes + q * quarter * T, 0, quarter * T);
            continue;
        }
        for (uint32_t slot = 0, k; slot < quarter; slot += k) {
            k = chunk_slots(quarter - slot);
            unpack_key_chunk(widths[q], k, packed, codes + (q * quarter + slot) * T);
            packed += widths[q] * T * k / 8;
        }
    }
}

enum { VALUE_TILE_TOKENS = 32, VALUE_UNIT_BYTES = TILE_ROWS * VALUE_TILE_TOKENS };

/* The first code of tile number n in [token][channel] order. */
static size_t value_tile_start(uint32_t n, uint32_t head_dim) {
    uint32_t channel_tiles = head_dim / TILE_ROWS;
    uint32_t token_block = n / channel_tiles, channel_tile = n % channel_tiles;
    return (size_t)token_block * VALUE_TILE_TOKENS * head_dim + channel_tile * TILE_ROWS;
}

void kv_codes_pack_values(uint32_t width, uint32_t head_dim, const uint8_t *codes,
                          uint8_t *packed) {
    uint32_t tiles = head_dim / TILE_ROWS * (T / VALUE_TILE_TOKENS);
    memset(packed, 0, (size_t)width * T * head_dim / 8);
    for (uint32_t n = 0; n < tiles; n++) {
        uint32_t unit = n * width / 8, shift = n * width % 8;
        const uint8_t *tile = codes + value_tile_start(n, head_dim);
        uint8_t *bytes = packed + unit * VALUE_UNIT_BYTES;
        for (uint32_t kk = 0; kk < VALUE_TILE_TOKENS; kk++)
            for (uint32_t m = 0; m < TILE_ROWS; m++)
                bytes[place_in_unit(32, m, kk)] |= (uint8_t)(tile[kk * head_dim + m] << shift);
    }
}

void kv_codes_unpack_values(uint32_t width, uint32_t head_dim, const uint8_t *packed,
                            uint8_t *codes) {
    uint32_t tiles = head_dim / TILE_ROWS * (T / VALUE_TILE_TOKENS);
    uint32_t mask = (1u << width) - 1;
    for (uint32_t n = 0; n < tiles; n++) {
        uint32_t unit = n * width / 8, shift = n * width % 8;
        uint8_t *tile = codes + value_tile_start(n, head_dim);
        const uint8_t *bytes = packed + unit * VALUE_UNIT_BYTES;
        for (uint32_t kk = 0; kk < VALUE_TILE_TOKENS; kk++)
            for (uint32_t m = 0; m < TILE_ROWS; m++)
                tile[kk * head_dim + m] =
                    (uint8_t)(bytes[place_in_unit(32, m, kk)] >> shift & mask);
    }
}
