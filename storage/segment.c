/* SPDX-License-Identifier: Apache-2.0 */
/* segment.c - encodes and verifies what segment.h draws.
 *
 * Fields are read and written with memcpy at the offsets of the drawing, named once below. */
#include "storage/segment.h"

#include "proto/kv_check.h"

#include <isa-l.h>

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the format is little endian");

static const char magic_superblock[9] = "KIVISUPR";
static const char magic_segment[9]    = "KIVISEGM";
static const char magic_footer[9]     = "KIVIFOOT";
static const char magic_record[9]     = "KIVIRECD";

/* Common to all four. */
enum { AT_MAGIC = 0, AT_VERSION = 8, AT_CRC = 12 };
/* Superblock. */
enum {
    AT_SUPER_STORE    = 16,
    AT_SUPER_EPOCH    = 32,
    AT_SUPER_BYTES    = 40,
    AT_SUPER_NEWEST   = 48,
    AT_SUPER_OLDEST   = 56,
    AT_SUPER_SEQUENCE = 64,
    AT_SUPER_CLEAN    = 72,
};
/* Segment header and trailer. */
enum {
    AT_STORE         = 16,
    AT_IDENTITY      = 32,
    AT_GENERATION    = 48,
    AT_OLDEST        = 56,
    AT_SLOT          = 64,
    AT_SEGMENT_BYTES = 72,
    AT_RECORD_COUNT  = 80,
    AT_INDEX_CRC     = 84,
    AT_END_PAGE      = 88,
};
/* Index record. */
enum {
    AT_INDEX_KEY        = 0,
    AT_INDEX_TENANT     = 32,
    AT_INDEX_SEQUENCE   = 48,
    AT_INDEX_TAG        = 56,
    AT_INDEX_PAGE       = 64,
    AT_INDEX_PART_COUNT = 68,
    AT_INDEX_PART_BYTES = 72,
    AT_INDEX_KIND       = 76,
};
/* Record header. */
enum {
    AT_RECORD_IDENTITY   = 16,
    AT_RECORD_GENERATION = 32,
    AT_RECORD_SLOT       = 40,
    AT_RECORD_PAGE       = 44,
    AT_RECORD_SEQUENCE   = 48,
    AT_RECORD_TAG        = 56,
    AT_RECORD_TENANT     = 64,
    AT_RECORD_KEY        = 80,
    AT_RECORD_KIND       = 112,
    AT_RECORD_PART_COUNT = 116,
    AT_RECORD_PART_BYTES = 120,
    AT_RECORD_PART_CRC   = 128,
};
static_assert((int)AT_RECORD_PART_CRC == (int)KV_RECORD_FIXED_BYTES, "the drawing in segment.h");

static void put32(uint8_t *at, uint32_t value) {
    memcpy(at, &value, 4);
}
static void put64(uint8_t *at, uint64_t value) {
    memcpy(at, &value, 8);
}
static uint32_t get32(const uint8_t *at) {
    uint32_t value;
    memcpy(&value, at, 4);
    return value;
}
static uint64_t get64(const uint8_t *at) {
    uint64_t value;
    memcpy(&value, at, 8);
    return value;
}

/* ---- CRC ----------------------------------------------------------------------------------- */

uint32_t kv_crc32c_extend(uint32_t crc, const void *memory, size_t bytes) {
    const uint8_t *at = memory;
    /* ISA-L takes an int and leaves the inversions to the caller. */
    const size_t most = 1u << 30;
    uint32_t state    = ~crc;
    while (bytes > 0) {
        size_t now = bytes < most ? bytes : most;
        state      = crc32_iscsi((unsigned char *)at, (int)now, state);
        at += now;
        bytes -= now;
    }
    return ~state;
}

uint32_t kv_crc32c(const void *memory, size_t bytes) {
    return kv_crc32c_extend(0, memory, bytes);
}

/* The crc of `bytes` with the four bytes at AT_CRC taken as zero. */
static uint32_t crc_sealed(const uint8_t *memory, size_t bytes) {
    static const uint8_t zero[4];
    uint32_t crc = kv_crc32c(memory, AT_CRC);
    crc          = kv_crc32c_extend(crc, zero, sizeof zero);
    return kv_crc32c_extend(crc, memory + AT_CRC + 4, bytes - AT_CRC - 4);
}

static void seal(uint8_t *memory, size_t bytes, const char *magic) {
    memcpy(memory + AT_MAGIC, magic, 8);
    put32(memory + AT_VERSION, KV_SEGMENT_VERSION);
    put32(memory + AT_CRC, crc_sealed(memory, bytes));
}

static bool sealed_as(const uint8_t *memory, const char *magic) {
    return memcmp(memory + AT_MAGIC, magic, 8) == 0 &&
           get32(memory + AT_VERSION) == KV_SEGMENT_VERSION;
}

/* ---- Sizes --------------------------------------------------------------------------------- */

static uint64_t pages_of(uint64_t bytes) {
    return (bytes + KV_PAGE - 1) / KV_PAGE;
}

uint32_t kv_record_header_pages(uint32_t part_count) {
    return (uint32_t)pages_of(KV_RECORD_FIXED_BYTES + 4ull * part_count);
}

/* At most 2048 parts of 4 GiB: 2^31 pages, so that a record's pages always fit 32 bits. */
uint32_t kv_record_payload_pages(uint32_t part_count, uint32_t part_bytes) {
    return (uint32_t)pages_of((uint64_t)part_count * part_bytes);
}

uint32_t kv_record_pages(uint32_t part_count, uint32_t part_bytes) {
    return kv_record_header_pages(part_count) + kv_record_payload_pages(part_count, part_bytes);
}

uint32_t kv_footer_pages(uint32_t record_count) {
    return (uint32_t)pages_of((uint64_t)record_count * KV_INDEX_RECORD_BYTES) + 1;
}

uint32_t kv_segment_record_pages_max(uint64_t segment_bytes) {
    return (uint32_t)(segment_bytes / KV_PAGE) - KV_SEGMENT_HEADER_PAGES - kv_footer_pages(1);
}

void kv_record_part_range(uint32_t part_count, uint32_t part_bytes, uint32_t part, uint32_t *page,
                          uint32_t *pages, uint32_t *skip) {
    KV_CHECK(part < part_count);
    uint64_t begin = (uint64_t)part * part_bytes;
    uint64_t first = begin / KV_PAGE;
    *page          = kv_record_header_pages(part_count) + (uint32_t)first;
    *pages         = (uint32_t)(pages_of(begin + part_bytes) - first);
    *skip          = (uint32_t)(begin % KV_PAGE);
}

/* Whether a record of this kind and size can stand at `page` of a segment that ends at
 * `page_end`. */
static bool record_fits(const struct kv_record *record, uint64_t page_end) {
    if (record->kind == KV_RECORD_TOMBSTONE) {
        if (record->part_count != 0 || record->part_bytes != 0) return false;
    } else if (record->kind == KV_RECORD_BLOCK || record->kind == KV_RECORD_KEEP) {
        if (record->part_count == 0 || record->part_count > KV_RECORD_PARTS_MAX) return false;
        if (record->part_bytes == 0) return false;
    } else {
        return false;
    }
    uint64_t pages = kv_record_pages(record->part_count, record->part_bytes);
    return record->page >= KV_SEGMENT_HEADER_PAGES && record->page + pages <= page_end;
}

/* ---- Superblock ---------------------------------------------------------------------------- */

void kv_superblock_encode(const struct kv_superblock *superblock, uint8_t page[KV_PAGE]) {
    memset(page, 0, KV_PAGE);
    memcpy(page + AT_SUPER_STORE, superblock->store, KV_IDENTITY_BYTES);
    put64(page + AT_SUPER_EPOCH, superblock->epoch);
    put64(page + AT_SUPER_BYTES, superblock->segment_bytes);
    put64(page + AT_SUPER_NEWEST, superblock->newest_generation);
    put64(page + AT_SUPER_OLDEST, superblock->oldest_generation);
    put64(page + AT_SUPER_SEQUENCE, superblock->next_sequence);
    put32(page + AT_SUPER_CLEAN, superblock->clean ? 1 : 0);
    seal(page, KV_PAGE, magic_superblock);
}

bool kv_superblock_decode(const uint8_t page[KV_PAGE], struct kv_superblock *out) {
    if (!sealed_as(page, magic_superblock)) return false;
    if (get32(page + AT_CRC) != crc_sealed(page, KV_PAGE)) return false;
    memcpy(out->store, page + AT_SUPER_STORE, KV_IDENTITY_BYTES);
    out->epoch             = get64(page + AT_SUPER_EPOCH);
    out->segment_bytes     = get64(page + AT_SUPER_BYTES);
    out->newest_generation = get64(page + AT_SUPER_NEWEST);
    out->oldest_generation = get64(page + AT_SUPER_OLDEST);
    out->next_sequence     = get64(page + AT_SUPER_SEQUENCE);
    uint32_t clean         = get32(page + AT_SUPER_CLEAN);
    out->clean             = clean == 1;
    return clean <= 1;
}

/* ---- Segment header and footer ------------------------------------------------------------- */

static void segment_put(const struct kv_segment_header *segment, uint8_t *page) {
    memset(page, 0, KV_PAGE);
    memcpy(page + AT_STORE, segment->store, KV_IDENTITY_BYTES);
    memcpy(page + AT_IDENTITY, segment->identity, KV_IDENTITY_BYTES);
    put64(page + AT_GENERATION, segment->generation);
    put64(page + AT_OLDEST, segment->oldest_generation);
    put64(page + AT_SEGMENT_BYTES, segment->segment_bytes);
    put32(page + AT_SLOT, segment->slot);
}

static bool segment_get(const uint8_t *page, const char *magic, struct kv_segment_header *out) {
    if (!sealed_as(page, magic)) return false;
    if (get32(page + AT_CRC) != crc_sealed(page, KV_PAGE)) return false;
    memcpy(out->store, page + AT_STORE, KV_IDENTITY_BYTES);
    memcpy(out->identity, page + AT_IDENTITY, KV_IDENTITY_BYTES);
    out->generation        = get64(page + AT_GENERATION);
    out->oldest_generation = get64(page + AT_OLDEST);
    out->segment_bytes     = get64(page + AT_SEGMENT_BYTES);
    out->slot              = get32(page + AT_SLOT);
    return out->oldest_generation <= out->generation;
}

void kv_segment_header_encode(const struct kv_segment_header *header, uint8_t *pages) {
    segment_put(header, pages);
    seal(pages, KV_PAGE, magic_segment);
    memcpy(pages + KV_PAGE, pages, KV_PAGE);
}

bool kv_segment_header_decode(const uint8_t *pages, struct kv_segment_header *out) {
    return segment_get(pages, magic_segment, out) ||
           segment_get(pages + KV_PAGE, magic_segment, out);
}

void kv_index_encode(const struct kv_record *record, uint8_t entry[KV_INDEX_RECORD_BYTES]) {
    memset(entry, 0, KV_INDEX_RECORD_BYTES);
    memcpy(entry + AT_INDEX_KEY, record->key.bytes, KV_DIGEST_BYTES);
    memcpy(entry + AT_INDEX_TENANT, record->tenant, KV_TENANT_BYTES);
    put64(entry + AT_INDEX_SEQUENCE, record->sequence);
    put64(entry + AT_INDEX_TAG, record->tag);
    put32(entry + AT_INDEX_PAGE, record->page);
    put32(entry + AT_INDEX_PART_COUNT, record->part_count);
    put32(entry + AT_INDEX_PART_BYTES, record->part_bytes);
    put32(entry + AT_INDEX_KIND, record->kind);
}

static void index_get(const uint8_t *entry, struct kv_record *out) {
    memcpy(out->key.bytes, entry + AT_INDEX_KEY, KV_DIGEST_BYTES);
    memcpy(out->tenant, entry + AT_INDEX_TENANT, KV_TENANT_BYTES);
    out->sequence   = get64(entry + AT_INDEX_SEQUENCE);
    out->tag        = get64(entry + AT_INDEX_TAG);
    out->page       = get32(entry + AT_INDEX_PAGE);
    out->part_count = get32(entry + AT_INDEX_PART_COUNT);
    out->part_bytes = get32(entry + AT_INDEX_PART_BYTES);
    out->kind       = get32(entry + AT_INDEX_KIND);
}

void kv_trailer_encode(const struct kv_segment_header *segment, uint32_t record_count,
                       uint32_t end_page, const uint8_t *index, uint8_t page[KV_PAGE]) {
    segment_put(segment, page);
    put32(page + AT_RECORD_COUNT, record_count);
    put32(page + AT_INDEX_CRC, kv_crc32c(index, (size_t)record_count * KV_INDEX_RECORD_BYTES));
    put32(page + AT_END_PAGE, end_page);
    seal(page, KV_PAGE, magic_footer);
}

bool kv_trailer_decode(const uint8_t page[KV_PAGE], struct kv_trailer *out) {
    if (!segment_get(page, magic_footer, &out->segment)) return false;
    out->record_count = get32(page + AT_RECORD_COUNT);
    out->index_crc    = get32(page + AT_INDEX_CRC);
    out->end_page     = get32(page + AT_END_PAGE);
    uint64_t pages    = out->segment.segment_bytes / KV_PAGE;
    return out->end_page >= KV_SEGMENT_HEADER_PAGES && out->record_count <= pages &&
           out->end_page + (uint64_t)kv_footer_pages(out->record_count) <= pages;
}

bool kv_index_decode(const struct kv_trailer *trailer, const uint8_t *index, size_t bytes,
                     kv_record_visit *visit, void *context) {
    size_t want = (size_t)trailer->record_count * KV_INDEX_RECORD_BYTES;
    if (bytes < want || kv_crc32c(index, want) != trailer->index_crc) return false;
    struct kv_record record;
    for (uint32_t i = 0; i < trailer->record_count; i++) {
        index_get(index + (size_t)i * KV_INDEX_RECORD_BYTES, &record);
        if (record.kind != KV_RECORD_NONE && !record_fits(&record, trailer->end_page)) return false;
    }
    for (uint32_t i = 0; i < trailer->record_count; i++) {
        index_get(index + (size_t)i * KV_INDEX_RECORD_BYTES, &record);
        if (record.kind != KV_RECORD_NONE) visit(context, &record);
    }
    return true;
}

/* ---- Records ------------------------------------------------------------------------------- */

static size_t header_bytes(const uint8_t *header) {
    return (size_t)kv_record_header_pages(get32(header + AT_RECORD_PART_COUNT)) * KV_PAGE;
}

static void record_place(const struct kv_segment_header *segment, uint32_t page, uint8_t *header) {
    memcpy(header + AT_RECORD_IDENTITY, segment->identity, KV_IDENTITY_BYTES);
    put64(header + AT_RECORD_GENERATION, segment->generation);
    put32(header + AT_RECORD_SLOT, segment->slot);
    put32(header + AT_RECORD_PAGE, page);
    seal(header, header_bytes(header), magic_record);
}

void kv_record_encode(const struct kv_segment_header *segment, const struct kv_record *record,
                      const uint8_t *payload, uint8_t *header) {
    KV_CHECK(record_fits(record, segment->segment_bytes / KV_PAGE));
    memset(header, 0, (size_t)kv_record_header_pages(record->part_count) * KV_PAGE);
    put64(header + AT_RECORD_SEQUENCE, record->sequence);
    put64(header + AT_RECORD_TAG, record->tag);
    memcpy(header + AT_RECORD_TENANT, record->tenant, KV_TENANT_BYTES);
    memcpy(header + AT_RECORD_KEY, record->key.bytes, KV_DIGEST_BYTES);
    put32(header + AT_RECORD_KIND, record->kind);
    put32(header + AT_RECORD_PART_COUNT, record->part_count);
    put32(header + AT_RECORD_PART_BYTES, record->part_bytes);
    for (uint32_t part = 0; part < record->part_count; part++) {
        const uint8_t *memory = payload + (size_t)part * record->part_bytes;
        put32(header + AT_RECORD_PART_CRC + 4 * part, kv_crc32c(memory, record->part_bytes));
    }
    record_place(segment, record->page, header);
}

void kv_record_move(const struct kv_segment_header *segment, uint32_t page, uint8_t *header) {
    record_place(segment, page, header);
}

bool kv_record_decode(const struct kv_segment_header *segment, uint32_t page,
                      const uint8_t *header, size_t bytes, struct kv_record *out) {
    if (bytes < KV_PAGE || !sealed_as(header, magic_record)) return false;
    out->kind       = get32(header + AT_RECORD_KIND);
    out->part_count = get32(header + AT_RECORD_PART_COUNT);
    out->part_bytes = get32(header + AT_RECORD_PART_BYTES);
    out->page       = get32(header + AT_RECORD_PAGE);
    if (out->page != page || !record_fits(out, segment->segment_bytes / KV_PAGE)) return false;
    if (header_bytes(header) > bytes) return false;
    if (get32(header + AT_CRC) != crc_sealed(header, header_bytes(header))) return false;
    if (memcmp(header + AT_RECORD_IDENTITY, segment->identity, KV_IDENTITY_BYTES) != 0 ||
        get64(header + AT_RECORD_GENERATION) != segment->generation ||
        get32(header + AT_RECORD_SLOT) != segment->slot)
        return false;
    out->sequence = get64(header + AT_RECORD_SEQUENCE);
    out->tag      = get64(header + AT_RECORD_TAG);
    memcpy(out->tenant, header + AT_RECORD_TENANT, KV_TENANT_BYTES);
    memcpy(out->key.bytes, header + AT_RECORD_KEY, KV_DIGEST_BYTES);
    return true;
}

uint32_t kv_record_part_crc(const uint8_t *header, uint32_t part) {
    return get32(header + AT_RECORD_PART_CRC + 4 * (size_t)part);
}

bool kv_record_part_valid(const uint8_t *header, uint32_t part, const uint8_t *part_memory) {
    uint32_t part_bytes = get32(header + AT_RECORD_PART_BYTES);
    return kv_crc32c(part_memory, part_bytes) == kv_record_part_crc(header, part);
}

bool kv_record_payload_valid(const uint8_t *header, const uint8_t *payload) {
    uint32_t part_count = get32(header + AT_RECORD_PART_COUNT);
    uint32_t part_bytes = get32(header + AT_RECORD_PART_BYTES);
    for (uint32_t part = 0; part < part_count; part++) {
        if (!kv_record_part_valid(header, part, payload + (size_t)part * part_bytes)) return false;
    }
    return true;
}

uint32_t kv_segment_scan(const struct kv_segment_header *segment, const uint8_t *memory,
                         size_t bytes, kv_record_visit *visit, void *context) {
    uint64_t page_end = bytes / KV_PAGE;
    uint64_t end      = KV_SEGMENT_HEADER_PAGES;
    for (uint64_t page = KV_SEGMENT_HEADER_PAGES; page < page_end;) {
        const uint8_t *header = memory + page * KV_PAGE;
        struct kv_record record;
        uint64_t next = page + 1;
        if (kv_record_decode(segment, (uint32_t)page, header, bytes - page * KV_PAGE, &record)) {
            uint64_t pages = kv_record_pages(record.part_count, record.part_bytes);
            const uint8_t *payload =
                header + (size_t)kv_record_header_pages(record.part_count) * KV_PAGE;
            if (page + pages <= page_end && kv_record_payload_valid(header, payload)) {
                visit(context, &record);
                end = next = page + pages;
            }
        }
        page = next;
    }
    return (uint32_t)end;
}
