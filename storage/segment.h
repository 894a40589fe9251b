/* SPDX-License-Identifier: Apache-2.0 */
/* segment.h - the on-disk format, to the byte, as pure functions on memory.
 *
 * Everything here turns values into bytes and bytes into values.  Nothing reads a file, nothing
 * allocates, nothing trusts a length it has not checked: any bytes at all may be handed in.
 *
 * A directory holds one file `superblock` and files `segment-00000`, `segment-00001`, ...  All
 * numbers are little endian, everything is written in pages of 4096 bytes at offsets that are
 * multiples of 4096, and every unnamed byte is zero.  A CRC is CRC32C; "the page's crc" covers the
 * whole page with the crc field itself taken as zero.
 *
 *   superblock         two pages, A at 0 and B at 4096, written in turn: the valid one with the
 *                      higher epoch counts, so that a torn write loses nothing
 *
 *      0  magic "KIVISUPR"      32  u64 epoch               64  u64 next_sequence
 *      8  u32 version           40  u64 segment_bytes       72  u32 clean (0, 1)
 *     12  u32 crc               48  u64 newest_generation
 *     16  u8  store[16]         56  u64 oldest_generation
 *
 *   segment            one file of segment_bytes
 *
 *     page 0, page 1   the header, twice
 *     page 2 ...       records, one behind the other
 *     (unused)
 *     last pages       the footer: index, then trailer in the very last page; written when the
 *                      segment is full or the store is closed
 *
 *   segment header     and trailer (which has the last four fields too)
 *
 *      0  magic "KIVISEGM" or "KIVIFOOT"
 *      8  u32 version           48  u64 generation          72  u64 segment_bytes
 *     12  u32 crc               56  u64 oldest_generation   80  u32 record_count
 *     16  u8  store[16]         64  u32 slot                84  u32 index_crc
 *     32  u8  identity[16]      68  u32 zero                88  u32 end_page   92  u32 zero
 *
 *     `slot` is the number in the file's name.  `generation` counts segments ever begun in this
 *     store.  `identity` is random, new with each generation: bytes that a client sent cannot
 *     imitate a record because no client knows it.  `oldest_generation` is the oldest segment that
 *     was alive when this one was begun: anything older is stale, wherever it comes from.
 *
 *   index record       96 bytes each, record_count of them, in the order of the log
 *
 *      0  u8 key[32]            56  u64 tag                 76  u32 kind (0: write failed)
 *     32  u8 tenant[16]         64  u32 page                80  u32 zero[4]
 *     48  u64 sequence          68  u32 part_count, u32 part_bytes (at 72)
 *
 *   record             header, payload, zeros up to a page
 *
 *      0  magic "KIVIRECD"      48  u64 sequence           112  u32 kind
 *      8  u32 version           56  u64 tag                116  u32 part_count
 *     12  u32 crc               64  u8  tenant[16]         120  u32 part_bytes
 *     16  u8  identity[16]      80  u8  key[32]            124  u32 zero
 *     32  u64 generation                                   128  u32 part_crc[part_count]
 *     40  u32 slot, u32 page (at 44)
 *
 *     The header is as many pages as part_crc needs (one for up to 992 parts); its crc covers
 *     them all.  Part i starts part_bytes * i behind the header and may straddle pages: it can be
 *     read alone as the pages that cover it, and checked alone against part_crc[i].
 *
 * A record is valid when (1) magic, version and header crc hold; (2) kind and sizes make sense and
 * lie inside the segment; (3) identity, generation, slot and page are those of the place where it
 * was found; and (4), before any of its bytes are used, the crc of the part that holds them.
 * (3) is what refuses a write that went astray, a file under another's name, and what is left of
 * a segment's earlier life.
 *
 * Of several valid records of one key the one with the highest sequence counts, a tombstone
 * meaning "absent"; with equal sequences (a record carried forward) the one in the younger
 * generation.
 */
#ifndef KV_STORAGE_SEGMENT_H
#define KV_STORAGE_SEGMENT_H

#include "proto/kv_types.h"

enum {
    KV_PAGE = 4096,
    KV_SEGMENT_VERSION = 1,
    KV_SEGMENT_HEADER_PAGES = 2,
    KV_INDEX_RECORD_BYTES = 96,
    KV_TENANT_BYTES = 16,
    KV_IDENTITY_BYTES = 16,
    KV_RECORD_FIXED_BYTES = 128, /* of the header, before part_crc */
    KV_RECORD_PARTS_MAX = 2048,
};

enum kv_record_kind {
    KV_RECORD_NONE = 0, /* only in an index: the write failed, there is nothing */
    KV_RECORD_BLOCK = 1,
    KV_RECORD_KEEP = 2,
    KV_RECORD_TOMBSTONE = 3, /* no parts, no payload */
};

struct kv_superblock {
    uint8_t store[KV_IDENTITY_BYTES];
    uint64_t epoch;
    uint64_t segment_bytes;
    uint64_t newest_generation; /* highest ever begun */
    uint64_t oldest_generation; /* anything older is stale */
    uint64_t next_sequence;     /* exact when clean, else a lower bound */
    bool clean;                 /* closed in order: every segment alive has its footer */
};

struct kv_segment_header {
    uint8_t store[KV_IDENTITY_BYTES];
    uint8_t identity[KV_IDENTITY_BYTES];
    uint64_t generation;
    uint64_t oldest_generation;
    uint64_t segment_bytes;
    uint32_t slot;
};

struct kv_trailer {
    struct kv_segment_header segment;
    uint32_t record_count;
    uint32_t index_crc;
    uint32_t end_page; /* first page behind the last record */
};

struct kv_record {
    struct kv_digest key;
    uint8_t tenant[KV_TENANT_BYTES]; /* zeros for now */
    uint64_t sequence;
    uint64_t tag;
    uint32_t kind; /* enum kv_record_kind */
    uint32_t part_count;
    uint32_t part_bytes;
    uint32_t page; /* of the segment, where its header begins */
};

uint32_t kv_crc32c(const void *memory, size_t bytes);
/* The same, continued: start with 0. */
uint32_t kv_crc32c_extend(uint32_t crc, const void *memory, size_t bytes);

/* ---- Sizes ------------------------------------------------------------------------------- */

uint32_t kv_record_header_pages(uint32_t part_count);
uint32_t kv_record_payload_pages(uint32_t part_count, uint32_t part_bytes);
uint32_t kv_record_pages(uint32_t part_count, uint32_t part_bytes);
/* Index and trailer of so many records. */
uint32_t kv_footer_pages(uint32_t record_count);
/* Pages that records of one segment can have beside one footer entry: the largest record. */
uint32_t kv_segment_record_pages_max(uint64_t segment_bytes);

/* Which pages cover part `part`, counted from the record's header; *skip is where in the first one
 * the part begins. */
void kv_record_part_range(uint32_t part_count, uint32_t part_bytes, uint32_t part,
                          uint32_t *page, uint32_t *pages, uint32_t *skip);

/* ---- Encode, decode ----------------------------------------------------------------------
 * Encoders write whole pages.  Decoders return false for anything that is not exactly what an
 * encoder writes; *out is then undefined. */

void kv_superblock_encode(const struct kv_superblock *superblock, uint8_t page[KV_PAGE]);
bool kv_superblock_decode(const uint8_t page[KV_PAGE], struct kv_superblock *out);

/* Both copies: KV_SEGMENT_HEADER_PAGES pages.  Decoding takes whichever is intact. */
void kv_segment_header_encode(const struct kv_segment_header *header, uint8_t *pages);
bool kv_segment_header_decode(const uint8_t *pages, struct kv_segment_header *out);

void kv_index_encode(const struct kv_record *record, uint8_t entry[KV_INDEX_RECORD_BYTES]);

/* Writes the trailer of the index that lies in `index` (record_count entries, zero padded to
 * whole pages) to `page`. */
void kv_trailer_encode(const struct kv_segment_header *segment, uint32_t record_count,
                       uint32_t end_page, const uint8_t *index, uint8_t page[KV_PAGE]);
bool kv_trailer_decode(const uint8_t page[KV_PAGE], struct kv_trailer *out);

/* Calls `visit` for every record of an index whose crc is the trailer's.  False, and nobody is
 * called, if it is not, or if any entry is impossible in such a segment. */
typedef void kv_record_visit(void *context, const struct kv_record *record);
bool kv_index_decode(const struct kv_trailer *trailer, const uint8_t *index, size_t bytes,
                     kv_record_visit *visit, void *context);

/* Writes the record's header to `header` (kv_record_header_pages() pages), computing the crc of
 * each part of `payload`. */
void kv_record_encode(const struct kv_segment_header *segment, const struct kv_record *record,
                      const uint8_t *payload, uint8_t *header);

/* The same header for another place: the parts' crcs stay. */
void kv_record_move(const struct kv_segment_header *segment, uint32_t page, uint8_t *header);

/* Conditions 1 to 3 for the record whose header begins at `header`, of which `bytes` are there,
 * and which was found at `page` of `segment`. */
bool kv_record_decode(const struct kv_segment_header *segment, uint32_t page,
                      const uint8_t *header, size_t bytes, struct kv_record *out);

/* Condition 4.  The header must have passed kv_record_decode(). */
bool kv_record_part_valid(const uint8_t *header, uint32_t part, const uint8_t *part_memory);
bool kv_record_payload_valid(const uint8_t *header, const uint8_t *payload);
uint32_t kv_record_part_crc(const uint8_t *header, uint32_t part);

/* Finds the valid records of a segment without a footer, wholly in memory, in the order of the
 * log: at a valid one it steps over it, anywhere else one page on, so that a torn record hides
 * nothing behind it.  Payloads are verified.  Returns the first page behind the last valid one. */
uint32_t kv_segment_scan(const struct kv_segment_header *segment, const uint8_t *memory,
                         size_t bytes, kv_record_visit *visit, void *context);

#endif
