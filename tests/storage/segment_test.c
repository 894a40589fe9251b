/* SPDX-License-Identifier: Apache-2.0 */
/* segment_test.c - the format: what is encoded is decoded, and nothing else is. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "storage/segment.h"

#include <stdlib.h>

enum { SEGMENT_BYTES = 1 << 20 };

static struct kv_segment_header segment_of(uint32_t slot, uint64_t generation) {
    struct kv_segment_header segment = {
        .generation = generation, .oldest_generation = generation / 2,
        .segment_bytes = SEGMENT_BYTES, .slot = slot};
    memset(segment.store, 0x5a, sizeof segment.store);
    memset(segment.identity, (int)generation, sizeof segment.identity);
    return segment;
}

static struct kv_record record_of(uint8_t key, uint32_t page, uint32_t count, uint32_t bytes) {
    struct kv_record record = {.sequence = 1000u + key, .tag = 77, .kind = KV_RECORD_BLOCK,
                               .part_count = count, .part_bytes = bytes, .page = page};
    memset(record.key.bytes, key, sizeof record.key.bytes);
    return record;
}

/* The record at its page of a segment in memory; returns the page behind it. */
static uint32_t record_put(const struct kv_segment_header *segment, uint8_t *memory,
                           const struct kv_record *record) {
    uint8_t *header  = memory + (size_t)record->page * KV_PAGE;
    uint8_t *payload = header + (size_t)kv_record_header_pages(record->part_count) * KV_PAGE;
    for (size_t i = 0; i < (size_t)record->part_count * record->part_bytes; i++) {
        payload[i] = (uint8_t)(record->key.bytes[0] + i * 7 + (i >> 8));
    }
    kv_record_encode(segment, record, payload, header);
    return record->page + kv_record_pages(record->part_count, record->part_bytes);
}

struct seen {
    uint32_t count;
    uint8_t keys[64];
};
static void see(void *context, const struct kv_record *record) {
    struct seen *seen = context;
    seen->keys[seen->count++ % 64] = record->key.bytes[0];
}

static void crc_is_castagnoli(void **state) {
    assert_int_equal(kv_crc32c("123456789", 9), 0xe3069283u); /* RFC 3720's polynomial */
    assert_int_equal(kv_crc32c_extend(kv_crc32c("12345", 5), "6789", 4), 0xe3069283u);
    assert_int_equal(kv_crc32c("", 0), 0);
}

static void sizes_are_those_of_the_drawing(void **state) {
    assert_int_equal(kv_record_header_pages(0), 1);
    assert_int_equal(kv_record_header_pages(992), 1);
    assert_int_equal(kv_record_header_pages(993), 2);
    assert_int_equal(kv_record_header_pages(2048), 3);
    assert_int_equal(kv_record_pages(0, 0), 1);
    assert_int_equal(kv_record_pages(3, 1365), 2);
    assert_int_equal(kv_record_pages(3, 1366), 3);
    assert_int_equal(kv_footer_pages(0), 1);
    assert_int_equal(kv_footer_pages(42), 2);
    assert_int_equal(kv_footer_pages(43), 3);
    uint32_t page, pages, skip;
    kv_record_part_range(10, 5000, 3, &page, &pages, &skip);
    assert_int_equal(page, 1 + 3);
    assert_int_equal(skip, 15000 - 3 * 4096);
    assert_int_equal(pages, 2);
}

/* Every single bit of a superblock, segment header, trailer and record header counts. */
static void every_flipped_bit_is_refused(void **state) {
    static uint8_t page[2 * KV_PAGE];
    const struct kv_segment_header segment = segment_of(3, 9);
    struct kv_superblock superblock = {.epoch = 5, .segment_bytes = SEGMENT_BYTES, .clean = true};
    struct kv_superblock superblock_out;
    kv_superblock_encode(&superblock, page);
    assert_true(kv_superblock_decode(page, &superblock_out));
    assert_true(superblock_out.clean && superblock_out.epoch == 5);
    for (uint32_t bit = 0; bit < KV_PAGE * 8; bit++) {
        page[bit / 8] ^= (uint8_t)(1 << bit % 8);
        assert_false(kv_superblock_decode(page, &superblock_out));
        page[bit / 8] ^= (uint8_t)(1 << bit % 8);
    }
    struct kv_segment_header header;
    kv_segment_header_encode(&segment, page);
    for (uint32_t bit = 0; bit < KV_PAGE * 8; bit++) {
        page[bit / 8] ^= (uint8_t)(1 << bit % 8);
        assert_true(kv_segment_header_decode(page, &header)); /* by the other copy */
        assert_int_equal(header.generation, 9);
        page[KV_PAGE + bit / 8] ^= (uint8_t)(1 << bit % 8);
        assert_false(kv_segment_header_decode(page, &header));
        page[bit / 8] ^= (uint8_t)(1 << bit % 8);
        page[KV_PAGE + bit / 8] ^= (uint8_t)(1 << bit % 8);
    }
    struct kv_trailer trailer;
    kv_trailer_encode(&segment, 0, 5, page, page);
    assert_true(kv_trailer_decode(page, &trailer));
    for (uint32_t bit = 0; bit < KV_PAGE * 8; bit++) {
        page[bit / 8] ^= (uint8_t)(1 << bit % 8);
        assert_false(kv_trailer_decode(page, &trailer));
        page[bit / 8] ^= (uint8_t)(1 << bit % 8);
    }
    static uint8_t payload[3 * 100];
    const struct kv_record record = record_of(1, 2, 3, 100);
    struct kv_record out;
    kv_record_encode(&segment, &record, payload, page);
    assert_true(kv_record_decode(&segment, 2, page, KV_PAGE, &out));
    for (uint32_t bit = 0; bit < KV_PAGE * 8; bit++) {
        page[bit / 8] ^= (uint8_t)(1 << bit % 8);
        assert_false(kv_record_decode(&segment, 2, page, KV_PAGE, &out));
        page[bit / 8] ^= (uint8_t)(1 << bit % 8);
    }
}

static void a_record_elsewhere_is_refused(void **state) {
    static uint8_t page[KV_PAGE], payload[100];
    const struct kv_segment_header segment = segment_of(3, 9);
    const struct kv_record record          = record_of(1, 7, 1, 100);
    struct kv_record out;
    kv_record_encode(&segment, &record, payload, page);
    assert_true(kv_record_decode(&segment, 7, page, KV_PAGE, &out));
    assert_false(kv_record_decode(&segment, 8, page, KV_PAGE, &out)); /* went astray */
    struct kv_segment_header other = segment_of(4, 9);
    assert_false(kv_record_decode(&other, 7, page, KV_PAGE, &out)); /* another file */
    other = segment_of(3, 10);
    assert_false(kv_record_decode(&other, 7, page, KV_PAGE, &out)); /* an earlier life */
    other             = segment;
    other.identity[5] = 0;
    assert_false(kv_record_decode(&other, 7, page, KV_PAGE, &out)); /* imitated */
    assert_false(kv_record_decode(&segment, 7, page, KV_PAGE - 1, &out));
    other = segment_of(3, 9);
    kv_record_move(&other, 50, page);
    assert_true(kv_record_decode(&segment, 50, page, KV_PAGE, &out));
    assert_true(kv_record_payload_valid(page, payload));
    payload[99] ^= 1;
    assert_false(kv_record_payload_valid(page, payload));
}

/* A torn record in the middle hides nothing behind it; an old record inside it is not taken for
 * one either. */
static void scan_finds_what_is_whole(void **state) {
    uint8_t *memory                        = calloc(1, SEGMENT_BYTES);
    const struct kv_segment_header segment = segment_of(3, 9);
    uint32_t page = KV_SEGMENT_HEADER_PAGES, starts[8];
    for (uint8_t key = 0; key < 8; key++) {
        const struct kv_record record = record_of(key, page, 3, 9000);
        starts[key]                   = page;
        page                          = record_put(&segment, memory, &record);
    }
    struct seen seen = {0};
    assert_int_equal(kv_segment_scan(&segment, memory, SEGMENT_BYTES, see, &seen), page);
    assert_int_equal(seen.count, 8);
    memory[(size_t)starts[2] * KV_PAGE + 20] ^= 4;              /* its header */
    memory[(size_t)starts[5] * KV_PAGE + KV_PAGE + 10000] ^= 4; /* its payload */
    seen.count = 0;
    assert_int_equal(kv_segment_scan(&segment, memory, SEGMENT_BYTES, see, &seen), page);
    assert_int_equal(seen.count, 6);
    const uint8_t expected[] = {0, 1, 3, 4, 6, 7};
    assert_memory_equal(seen.keys, expected, 6);
    /* Cut off in the middle of the last one. */
    seen.count = 0;
    assert_int_equal(
        kv_segment_scan(&segment, memory, (size_t)(page - 1) * KV_PAGE, see, &seen), starts[7]);
    assert_int_equal(seen.count, 5);
    free(memory);
}

static void index_is_all_or_nothing(void **state) {
    const struct kv_segment_header segment = segment_of(3, 9);
    static uint8_t index[KV_PAGE], page[KV_PAGE];
    for (uint8_t key = 0; key < 5; key++) {
        struct kv_record record = record_of(key, 2 + 3 * key, 1, 8000);
        if (key == 3) record.kind = KV_RECORD_NONE;
        kv_index_encode(&record, index + (size_t)key * KV_INDEX_RECORD_BYTES);
    }
    kv_trailer_encode(&segment, 5, 17, index, page);
    struct kv_trailer trailer;
    assert_true(kv_trailer_decode(page, &trailer));
    struct seen seen = {0};
    assert_true(kv_index_decode(&trailer, index, sizeof index, see, &seen));
    assert_int_equal(seen.count, 4);
    for (uint32_t bit = 0; bit < 5 * KV_INDEX_RECORD_BYTES * 8; bit++) {
        index[bit / 8] ^= (uint8_t)(1 << bit % 8);
        assert_false(kv_index_decode(&trailer, index, sizeof index, see, &seen));
        index[bit / 8] ^= (uint8_t)(1 << bit % 8);
    }
    /* Sealed correctly, but impossible: beyond the end. */
    struct kv_record far = record_of(0, 200, 1, 8000);
    kv_index_encode(&far, index);
    kv_trailer_encode(&segment, 5, 17, index, page);
    assert_true(kv_trailer_decode(page, &trailer));
    assert_false(kv_index_decode(&trailer, index, sizeof index, see, &seen));
    assert_int_equal(seen.count, 4);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(crc_is_castagnoli),
        cmocka_unit_test(sizes_are_those_of_the_drawing),
        cmocka_unit_test(every_flipped_bit_is_refused),
        cmocka_unit_test(a_record_elsewhere_is_refused),
        cmocka_unit_test(scan_finds_what_is_whole),
        cmocka_unit_test(index_is_all_or_nothing),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
