/* SPDX-License-Identifier: Apache-2.0 */
/* segment_fuzz.c - any bytes at all as a segment: read as recovery reads it.
 *
 * The first byte says how much is repaired before reading, because bytes found at random never pass
 * a checksum: bit 0 the header, bit 1 the trailer's and index's checksums, bit 2 those of each
 * record.  So the code behind the checksums is reached, with lengths and offsets of anybody's
 * choice.  Every record that is accepted must lie inside the segment. */
#include "storage/segment.h"

#include "proto/kv_check.h"

#include <stdlib.h>

enum { SEGMENT_PAGES = 64, RECORD_MAGIC_BYTES = 8 };

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void check_record(void *context, const struct kv_record *record) {
    uint32_t *count = context;
    KV_CHECK(record->page >= KV_SEGMENT_HEADER_PAGES);
    KV_CHECK((uint64_t)record->page + kv_record_pages(record->part_count, record->part_bytes) <=
             SEGMENT_PAGES);
    KV_CHECK(record->kind >= KV_RECORD_BLOCK && record->kind <= KV_RECORD_TOMBSTONE);
    for (uint32_t part = 0; part < record->part_count; part += 1 + record->part_count / 4) {
        uint32_t page, pages, skip;
        kv_record_part_range(record->part_count, record->part_bytes, part, &page, &pages, &skip);
        KV_CHECK(record->page + page + pages <= SEGMENT_PAGES && skip < KV_PAGE);
    }
    ++*count;
}

/* Makes a record of whatever stands at `page`, with the sizes that the input chose. */
static void repair_record(const struct kv_segment_header *segment, uint8_t *memory, uint32_t page,
                          const uint8_t *choice) {
    struct kv_record record = {.sequence = choice[0], .page = page, .kind = 1u + choice[1] % 3};
    if (record.kind != KV_RECORD_TOMBSTONE) {
        record.part_count = 1u + choice[2] * 8u;
        record.part_bytes = 1u + (uint32_t)choice[3] * 37u;
    }
    if (page + kv_record_pages(record.part_count, record.part_bytes) > SEGMENT_PAGES) return;
    size_t header = (size_t)kv_record_header_pages(record.part_count) * KV_PAGE;
    kv_record_encode(segment, &record, memory + (size_t)page * KV_PAGE + header,
                     memory + (size_t)page * KV_PAGE);
    /* and then what the input wants to be wrong with it */
    memory[(size_t)page * KV_PAGE + (choice[4] * 16u + choice[5]) % header] ^= choice[6];
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static uint8_t memory[SEGMENT_PAGES * KV_PAGE];
    if (size < 16) return 0;
    memset(memory, 0, sizeof memory);
    uint8_t repair = data[0];
    /* The input is laid out sparsely: 64 bytes of it open each page. */
    for (size_t i = 16; i < size && i < 16 + (size_t)SEGMENT_PAGES * 64; i++) {
        memory[(i - 16) / 64 * KV_PAGE + (i - 16) % 64] = data[i];
    }
    struct kv_segment_header segment = {
        .generation = 9, .segment_bytes = sizeof memory, .slot = 3};
    memset(segment.identity, 0xa5, sizeof segment.identity);
    if (repair & 1) kv_segment_header_encode(&segment, memory);
    for (size_t i = 1; (repair & 4) && i + 7 < 16; i += 7) {
        repair_record(&segment, memory, 2u + data[i] % 60, data + i);
    }
    uint8_t *last = memory + sizeof memory - KV_PAGE;
    if (repair & 2) {
        uint32_t count = data[15] % 43;
        kv_trailer_encode(&segment, count, 2u + data[14] % 70, last - KV_PAGE, last);
    }

    uint32_t count = 0;
    struct kv_segment_header header;
    if (!kv_segment_header_decode(memory, &header)) header = segment;
    header.segment_bytes = sizeof memory;
    struct kv_trailer trailer;
    if (kv_trailer_decode(last, &trailer)) {
        uint64_t pages = kv_footer_pages(trailer.record_count);
        if (trailer.segment.segment_bytes == sizeof memory) {
            kv_index_decode(&trailer, memory + sizeof memory - pages * KV_PAGE,
                            (pages - 1) * KV_PAGE, check_record, &count);
        }
    }
    uint32_t end = kv_segment_scan(&header, memory, sizeof memory, check_record, &count);
    KV_CHECK(end >= KV_SEGMENT_HEADER_PAGES && end <= SEGMENT_PAGES);
    struct kv_superblock superblock;
    kv_superblock_decode(memory, &superblock);
    return 0;
}
