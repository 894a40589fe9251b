/* SPDX-License-Identifier: Apache-2.0 */
/* snapshot.h - a committed session as bytes.  Version 1.
 *
 * Two kinds of records, of class KEEP.  The *tail chunks* hold the exact tokens behind the last
 * sealed block and are written first, under names nobody has used before; the *snapshot* refers to
 * them and to the sealed blocks, and replaces the one before it in one step.  So whatever happens
 * in between, the session is there as it was or as it is, never half of each.
 *
 * Snapshot, little endian, in parts of 4096 bytes (65536 if that made more than KV_PARTS_MAX), zero
 * behind the end:
 *
 *      0  struct snapshot_head, 512 bytes
 *    512  keys        [block_count][32]        of the sealed blocks, in order
 *         ids         u32 [ids_count]          of the tokens behind them
 *         rows_seen   u32 [layers]
 *         energy      f32 [layers][energy_count]
 *
 * Tail chunk c: part l is layer c * chunk_layers + l; in it, for every 128 tokens or what is left
 * of them, K [heads][tokens][head_dim] and V alike, 16-bit elements of the raw page's dtype.
 *
 * The store has verified the bytes (CRC32C per part); what is checked here is that the numbers in
 * them fit each other, because a record may come from a version that was wrong.
 *
 * Threads.  [any thread]  Pure functions.
 */
#ifndef KV_SERVICE_SNAPSHOT_H
#define KV_SERVICE_SNAPSHOT_H

#include "service/engine.h"

enum { SNAPSHOT_VERSION = 1, SNAPSHOT_PART_BYTES = 4096, SNAPSHOT_CHUNK_BYTES = 8 << 20 };

struct snapshot_head {
    char magic[8];            /* "KIVISESS" */
    uint32_t version;
    uint32_t head_bytes;      /* 512 */
    uint64_t total_bytes;     /* of the snapshot, padding left out */
    uint64_t generation;      /* with the nonce it names the tail chunks */
    uint64_t length;          /* tokens: block_count * 128 + those in the chunks */
    uint32_t block_count;
    uint32_t ids_count;       /* length - block_count * 128, or 0: it has no token ids */
    uint32_t ids_given;       /* 0 or 1 */
    uint32_t layers;
    uint32_t energy_count;    /* KV heads * head_dim */
    uint32_t chunk_count;     /* 0: there is no tail */
    uint32_t chunk_layers;    /* in each chunk but perhaps the last */
    uint32_t salt_count;
    uint8_t salt[KV_SALT_MAX];
    struct kv_digest fingerprint;
    struct kv_digest head;    /* digest that the next block's chains from */
    uint8_t nonce[16];
    char name[KV_NAME_MAX + 8]; /* zero terminated */
    uint8_t zero[88];
};
static_assert(sizeof(struct snapshot_head) == 512, "written to disk as it stands");

/* A snapshot taken apart; the pointers lead into its bytes. */
struct snapshot {
    const struct snapshot_head *head;
    const struct kv_digest *keys;
    const uint32_t *ids;
    const uint32_t *rows_seen;
    const float *energy;
};

/* total_bytes of a head whose counts are filled in. */
uint64_t snapshot_total_bytes(const struct snapshot_head *head);
struct kv_block_extent snapshot_extent(uint64_t tag, uint64_t total_bytes);

/* Writes the record: extent's bytes at `out`.  The head is complete but for what is constant.
 * A NULL pointer leaves its room as it is: the caller fills it. */
void snapshot_encode(const struct snapshot *from, const struct kv_block_extent *extent,
                     uint8_t *out);

/* `bytes` is at least a head long, 8-byte aligned.  False: this is no snapshot we can read. */
bool snapshot_head_valid(const uint8_t *bytes, uint64_t available);
/* The whole record.  False as above. */
bool snapshot_decode(const uint8_t *bytes, uint64_t available, struct snapshot *out);

/* Tail tokens, bytes of one layer's tail, and how layers are put into chunks. */
uint32_t snapshot_tail_tokens(const struct snapshot_head *head);
uint64_t snapshot_layer_bytes(const struct kv_shape *shape, uint32_t tail_tokens);
uint32_t snapshot_chunk_layers(uint64_t layer_bytes, uint32_t layers);

/* Rows of a raw page to and from a chunk; returns the bytes on the chunk's side. */
size_t snapshot_rows_save(const struct kv_shape *shape, const uint8_t *page, uint32_t tokens,
                          uint8_t *out);
size_t snapshot_rows_load(const struct kv_shape *shape, uint8_t *page, uint32_t tokens,
                          const uint8_t *from);

#endif
