/* SPDX-License-Identifier: Apache-2.0 */
/* store_damage_test.c - a disk that lies.
 *
 * A small store is filled and its directory kept in memory, once as a clean stop leaves it and once
 * as kill -9 does.  Each trial damages a copy, opens it, and reads every block.  Two things must be
 * true whatever was done: no wrong byte is returned (lab_read() judges each one), and every block
 * that was not touched is still served.
 *
 * Flips in different records do not know of each other, so one trial flips a bit in every second
 * record, each a different one, and leaves the others to be the intact ones. */
#include "tests/storage/store_lab.h"

#include "storage/segment.h"

#include <sys/stat.h>
#include <unistd.h>

enum {
    BLOCKS       = 150,
    SEGMENTS_MAX = 8,
    RECORDS_MAX  = 256,
    PAGE_BITS    = KV_PAGE * 8,
};

static struct lab lab; /* its directory is where trials happen */

/* ---- The original ------------------------------------------------------------------------- */

struct place {
    uint64_t number; /* of the block */
    uint32_t slot, page;
};

struct original {
    uint8_t superblock[2 * KV_PAGE];
    uint8_t *segments[SEGMENTS_MAX]; /* NULL: an empty file */
    struct kv_segment_header headers[SEGMENTS_MAX];
    struct place places[RECORDS_MAX];
    uint32_t place_count;
    uint32_t scanning; /* slot, while its records are noted */
};

static struct original clean, crashed;

static void place_note(void *context, const struct kv_record *record) {
    struct original *original = context;
    assert_true(original->place_count < RECORDS_MAX);
    original->places[original->place_count++] = (struct place){
        .number = lab_key_number(&record->key), .slot = original->scanning, .page = record->page};
}

static void original_take(struct original *original, const struct lab *from) {
    size_t bytes;
    uint8_t *superblock = lab_file_read(from, "superblock", &bytes);
    assert_true(bytes >= sizeof original->superblock);
    memcpy(original->superblock, superblock, sizeof original->superblock);
    free(superblock);
    for (uint32_t slot = 0; slot < SEGMENTS_MAX - 1; slot++) {
        char name[32];
        lab_segment_name(slot, name);
        uint8_t *memory = lab_file_read(from, name, &bytes);
        if (bytes == LAB_MIB && kv_segment_header_decode(memory, &original->headers[slot])) {
            original->segments[slot] = memory;
            original->scanning       = slot;
            kv_segment_scan(&original->headers[slot], memory, bytes, place_note, original);
        } else {
            free(memory);
        }
    }
}

static int originals_make(void **state) {
    lab_open(&lab);
    lab.options.io_threads = true; /* thousands of rings would take a minute to come and go */
    lab.options.io_depth   = 2;
    lab.options.disk_bytes = SEGMENTS_MAX * LAB_MIB;
    lab_start(&lab);
    for (uint64_t number = 0; number < BLOCKS; number++) lab_put(&lab, number);
    lab_settle(&lab);
    struct lab image;
    lab_crash(&lab, &image);
    original_take(&crashed, &image);
    lab_close(&image);
    lab_stop(&lab);
    original_take(&clean, &lab);
    assert_int_equal(clean.place_count, BLOCKS);
    assert_int_equal(crashed.place_count, BLOCKS);
    return 0;
}

static int originals_free(void **state) {
    for (uint32_t slot = 0; slot < SEGMENTS_MAX; slot++) {
        free(clean.segments[slot]);
        free(crashed.segments[slot]);
    }
    lab_close(&lab);
    return 0;
}

/* ---- A trial ------------------------------------------------------------------------------ */

struct trial {
    const struct original *original;
    uint8_t superblock[2 * KV_PAGE];
    uint8_t *segments[SEGMENTS_MAX];
    size_t bytes[SEGMENTS_MAX];
    bool touched[BLOCKS]; /* these may be gone */
};

static void trial_begin(struct trial *trial, const struct original *original) {
    *trial = (struct trial){.original = original};
    memcpy(trial->superblock, original->superblock, sizeof trial->superblock);
    for (uint32_t slot = 0; slot < SEGMENTS_MAX; slot++) {
        if (original->segments[slot] == NULL) continue;
        trial->bytes[slot]    = LAB_MIB;
        trial->segments[slot] = malloc(LAB_MIB);
        memcpy(trial->segments[slot], original->segments[slot], LAB_MIB);
    }
}

static void trial_write(const struct trial *trial) {
    lab_file_write(&lab, "superblock", trial->superblock, sizeof trial->superblock);
    for (uint32_t slot = 0; slot < SEGMENTS_MAX - 1; slot++) {
        char name[32];
        lab_segment_name(slot, name);
        lab_file_write(&lab, name, trial->segments[slot], trial->bytes[slot]);
    }
}

static void trial_free(struct trial *trial) {
    for (uint32_t slot = 0; slot < SEGMENTS_MAX; slot++) free(trial->segments[slot]);
}

/* Reads all blocks.  `exact`: the touched ones must be gone, not only not wrong. */
static void trial_judge(const struct trial *trial, bool exact) {
    for (uint64_t number = 0; number < BLOCKS; number++) {
        enum kv_status status = lab_get(&lab, number);
        if (!trial->touched[number]) {
            if (status != KV_OK)
                fail_msg("block %d is intact and was not served: %d", (int)number, (int)status);
            continue;
        }
        if (status != KV_NOT_FOUND && status != KV_CORRUPT && (status != KV_OK || exact))
            fail_msg("block %d is damaged: %d (cuts %zu %zu %zu)", (int)number, (int)status,
                     trial->bytes[0], trial->bytes[1], trial->bytes[2]);
        if (status == KV_CORRUPT) /* once */
            assert_int_equal(lab_get(&lab, number), KV_NOT_FOUND);
    }
}

/* Opens, judges, puts something new (the service goes on), closes, and, for every fourth trial, opens
 * and judges again: damage must not get worse by being met. */
static void trial_run(struct trial *trial, bool exact) {
    trial_write(trial);
    lab_start(&lab);
    trial_judge(trial, exact);
    lab_put(&lab, 1000);
    lab_stop(&lab);
    static uint32_t trials;
    if (trials++ % 4 == 0) {
        lab_start(&lab);
        trial_judge(trial, exact);
        assert_int_equal(lab_get(&lab, 1000), KV_OK);
        lab_stop(&lab);
    }
    trial_free(trial);
}

static void flip(uint8_t *memory, uint64_t bit) {
    memory[bit / 8] ^= (uint8_t)(1u << bit % 8);
}

static void touch_segment(struct trial *trial, uint32_t slot) {
    for (uint32_t i = 0; i < trial->original->place_count; i++) {
        if (trial->original->places[i].slot == slot)
            trial->touched[trial->original->places[i].number] = true;
    }
}

static uint32_t segments_used(const struct original *original) {
    uint32_t count = 0;
    while (original->segments[count] != NULL) count++;
    return count;
}

/* ---- Records ------------------------------------------------------------------------------ */

/* Every bit of the pages that a header occupies, by the decoder alone: none may pass. */
static void no_flipped_bit_of_a_record_header_passes(void **state) {
    for (uint32_t i = 0; i < BLOCKS; i += 37) {
        const struct place *place = &clean.places[i];
        uint8_t header[KV_PAGE];
        struct kv_record record;
        memcpy(header, clean.segments[place->slot] + (size_t)place->page * KV_PAGE, KV_PAGE);
        const struct kv_segment_header *segment = &clean.headers[place->slot];
        assert_true(kv_record_decode(segment, place->page, header, KV_PAGE, &record));
        for (uint64_t bit = 0; bit < PAGE_BITS; bit++) {
            flip(header, bit);
            if (kv_record_decode(segment, place->page, header, KV_PAGE, &record))
                fail_msg("bit %d passes", (int)bit);
            flip(header, bit);
        }
    }
}

/* Bits of a header page to be tried on a whole store: all of the fields, a sample of the zeros. */
static uint64_t header_bit(uint64_t step) {
    enum { FIELD_BITS = (KV_RECORD_FIXED_BYTES + 4 * 9) * 8 };
    if (step < FIELD_BITS) return step;
    return FIELD_BITS + (step - FIELD_BITS) * 97;
}

static void headers_flip(const struct original *original) {
    uint64_t step = 0;
    while (header_bit(step) < PAGE_BITS) {
        struct trial trial;
        trial_begin(&trial, original);
        for (uint32_t i = 0; i < BLOCKS; i += 2) {
            uint64_t bit = header_bit(step);
            step += LAB_ROUNDS_DIVISOR;
            if (bit >= PAGE_BITS) break;
            const struct place *place = &original->places[i];
            flip(trial.segments[place->slot], (uint64_t)place->page * PAGE_BITS + bit);
            trial.touched[place->number] = true;
        }
        trial_run(&trial, true);
    }
}

static void flipped_headers_are_refused_after_a_clean_stop(void **state) {
    headers_flip(&clean);
}
static void flipped_headers_are_refused_after_a_crash(void **state) {
    headers_flip(&crashed);
}

static void payloads_flip(const struct original *original) {
    struct dice dice = {lab_seed("payloads_flip")};
    for (int round = 0; round < 60 / LAB_ROUNDS_DIVISOR; round++) {
        struct trial trial;
        trial_begin(&trial, original);
        for (uint32_t i = 0; i < BLOCKS; i++) {
            if (dice_below(&dice, 2) == 0) continue;
            const struct place *place     = &original->places[i];
            struct kv_block_extent extent = lab_extent(place->number);
            uint64_t bit = dice_below(&dice, (uint32_t)lab_extent_bytes(&extent) * 8);
            flip(trial.segments[place->slot], (uint64_t)(place->page + 1) * PAGE_BITS + bit);
            trial.touched[place->number] = true;
        }
        trial_run(&trial, true);
    }
}

static void flipped_payloads_are_refused_after_a_clean_stop(void **state) {
    payloads_flip(&clean);
}
static void flipped_payloads_are_refused_after_a_crash(void **state) {
    payloads_flip(&crashed);
}

/* A part is checked alone: what is intact of a damaged block is served until somebody meets the
 * damage. */
static void a_flipped_part_does_not_spoil_its_neighbours(void **state) {
    struct trial trial;
    trial_begin(&trial, &clean);
    for (uint32_t i = 0; i < BLOCKS; i++) { /* the first bit of the last part of each */
        const struct place *place     = &clean.places[i];
        struct kv_block_extent extent = lab_extent(place->number);
        uint64_t byte = (uint64_t)(extent.part_count - 1) * extent.part_bytes;
        flip(trial.segments[place->slot], (uint64_t)(place->page + 1) * PAGE_BITS + byte * 8);
    }
    trial_write(&trial);
    lab_start(&lab);
    uint64_t expected = 0;
    for (uint64_t number = 0; number < BLOCKS; number++) {
        struct kv_block_extent extent = lab_extent(number);
        int32_t last                  = (int32_t)extent.part_count - 1;
        uint64_t version;
        for (int32_t part = 0; part < last; part++)
            assert_int_equal(lab_read_part(&lab, number, &extent, part, &version), KV_OK);
        assert_int_equal(lab_read_part(&lab, number, &extent, last, &version), KV_CORRUPT);
        assert_int_equal(kv_store_stats(lab.store)->corruptions, ++expected);
        assert_int_equal(lab_read_part(&lab, number, &extent, 0, &version), KV_NOT_FOUND);
        assert_false(lab_has(&lab, number));
        lab_put(&lab, number); /* the cache may have it again */
        assert_int_equal(lab_get(&lab, number), KV_OK);
    }
    lab_stop(&lab);
    trial_free(&trial);
}

/* ---- Segments ----------------------------------------------------------------------------- */

/* One header copy is enough, whichever. */
static void a_flipped_bit_of_a_segment_header_loses_nothing(void **state) {
    uint32_t used = segments_used(&clean);
    uint64_t step = 0;
    while (header_bit(step) < PAGE_BITS) {
        struct trial trial;
        trial_begin(&trial, step % 2 ? &clean : &crashed);
        for (uint32_t slot = 0; slot < used; slot++) {
            uint64_t bit = header_bit(step);
            step += LAB_ROUNDS_DIVISOR;
            if (bit >= PAGE_BITS || trial.segments[slot] == NULL) break;
            flip(trial.segments[slot], step / used % 2 * PAGE_BITS + bit);
        }
        trial_run(&trial, true);
    }
}

/* Neither copy: what the segment holds may be found by its footer or not at all. */
static void flipped_bits_of_both_segment_headers_harm_no_other_segment(void **state) {
    struct dice dice = {lab_seed("both_segment_headers")};
    for (uint32_t round = 0; round < 40 / LAB_ROUNDS_DIVISOR + 1; round++) {
        const struct original *original = round % 2 ? &clean : &crashed;
        struct trial trial;
        trial_begin(&trial, original);
        uint32_t slot = round % segments_used(original);
        for (uint64_t copy = 0; copy < 2; copy++)
            flip(trial.segments[slot], copy * PAGE_BITS + dice_below(&dice, 96 * 8));
        touch_segment(&trial, slot);
        trial_run(&trial, false);
    }
}

static void no_flipped_bit_of_a_segment_header_or_trailer_passes(void **state) {
    uint8_t page[KV_PAGE], pages[2 * KV_PAGE];
    struct kv_trailer trailer;
    struct kv_segment_header header;
    memcpy(page, clean.segments[0] + LAB_MIB - KV_PAGE, KV_PAGE);
    memcpy(pages, clean.segments[0], 2 * KV_PAGE);
    memset(pages + KV_PAGE, 0, KV_PAGE); /* only one copy */
    assert_true(kv_trailer_decode(page, &trailer));
    assert_true(kv_segment_header_decode(pages, &header));
    for (uint64_t bit = 0; bit < PAGE_BITS; bit++) {
        flip(page, bit);
        flip(pages, bit);
        if (kv_trailer_decode(page, &trailer)) fail_msg("bit %d of the trailer", (int)bit);
        if (kv_segment_header_decode(pages, &header)) fail_msg("bit %d of the header", (int)bit);
        flip(page, bit);
        flip(pages, bit);
    }
}

/* A footer is a shortcut: without it the records themselves are found. */
static void a_flipped_bit_of_a_footer_loses_nothing(void **state) {
    struct dice dice = {lab_seed("footers")};
    uint32_t used    = segments_used(&clean);
    for (uint64_t round = 0; round < (96 * 8u + 100) / LAB_ROUNDS_DIVISOR; round += used) {
        struct trial trial;
        trial_begin(&trial, &clean);
        for (uint32_t slot = 0; slot < used; slot++) {
            uint64_t trailer = (uint64_t)LAB_MIB * 8 - PAGE_BITS;
            uint64_t bit     = trailer + (round + slot) * LAB_ROUNDS_DIVISOR;
            if (round + slot >= 96 * 8u / LAB_ROUNDS_DIVISOR)
                bit = trailer - PAGE_BITS + dice_below(&dice, PAGE_BITS); /* the index */
            flip(trial.segments[slot], bit);
        }
        trial_run(&trial, true);
    }
}

static void segments_truncate(const struct original *original) {
    uint32_t used = segments_used(original);
    for (uint32_t cut = 0; cut < LAB_MIB / 512; cut += LAB_ROUNDS_DIVISOR * used) {
        struct trial trial;
        trial_begin(&trial, original);
        for (uint32_t slot = 0; slot < used; slot++) {
            uint32_t steps    = (cut + slot * LAB_ROUNDS_DIVISOR) % (LAB_MIB / 512);
            trial.bytes[slot] = (size_t)steps * 512;
            for (uint32_t i = 0; i < BLOCKS; i++) {
                const struct place *place     = &original->places[i];
                struct kv_block_extent extent = lab_extent(place->number);
                size_t end = (size_t)(place->page + 1) * KV_PAGE + lab_extent_bytes(&extent);
                if (place->slot == slot && end > trial.bytes[slot])
                    trial.touched[place->number] = true;
            }
            /* Without a whole header a file says nothing about itself. */
            if (trial.bytes[slot] < KV_PAGE) touch_segment(&trial, slot);
        }
        trial_run(&trial, true);
    }
}

static void truncated_segments_serve_what_is_before_the_cut_after_a_clean_stop(void **state) {
    segments_truncate(&clean);
}
static void truncated_segments_serve_what_is_before_the_cut_after_a_crash(void **state) {
    segments_truncate(&crashed);
}

/* Each file is whole and valid, only not where it was written. */
static void swapped_segments_are_refused(void **state) {
    for (int round = 0; round < 2; round++) {
        const struct original *original = round == 0 ? &clean : &crashed;
        uint32_t used                   = segments_used(original);
        assert_true(used >= 3);
        for (uint32_t a = 0; a < used; a++) {
            for (uint32_t b = a + 1; b < used; b++) {
                struct trial trial;
                trial_begin(&trial, original);
                uint8_t *memory   = trial.segments[a];
                trial.segments[a] = trial.segments[b];
                trial.segments[b] = memory;
                touch_segment(&trial, a);
                touch_segment(&trial, b);
                trial_run(&trial, true);
            }
        }
    }
}

/* A write that the disk put somewhere else: the record is whole, at another record's place. */
static void a_record_at_the_wrong_place_is_refused(void **state) {
    for (int round = 0; round < 2; round++) {
        const struct original *original = round == 0 ? &clean : &crashed;
        struct trial trial;
        trial_begin(&trial, original);
        for (uint32_t i = 0; i + 4 < BLOCKS; i += 4) {
            const struct place *from = &original->places[i], *to = &original->places[i + 2];
            struct kv_block_extent extent = lab_extent(from->number);
            uint32_t pages = kv_record_pages(extent.part_count, extent.part_bytes);
            struct kv_block_extent other = lab_extent(to->number);
            if (pages > kv_record_pages(other.part_count, other.part_bytes)) continue;
            memcpy(trial.segments[to->slot] + (size_t)to->page * KV_PAGE,
                   original->segments[from->slot] + (size_t)from->page * KV_PAGE,
                   (size_t)pages * KV_PAGE);
            trial.touched[to->number] = true;
        }
        trial_run(&trial, true);
    }
}

static void garbage_zeros_and_absent_files_harm_no_other_segment(void **state) {
    struct dice dice = {lab_seed("garbage")};
    for (uint32_t round = 0; round < 12; round++) {
        const struct original *original = round % 2 ? &clean : &crashed;
        struct trial trial;
        trial_begin(&trial, original);
        uint32_t slot   = round % segments_used(original);
        uint8_t *memory = trial.segments[slot];
        for (size_t at = 0; at < LAB_MIB; at += 8) {
            uint64_t word = round % 3 == 0 ? 0 : dice_bits(&dice);
            memcpy(memory + at, &word, sizeof word);
        }
        if (round % 3 == 2) trial.bytes[slot] = 0;
        touch_segment(&trial, slot);
        trial_run(&trial, true);
    }
}

/* ---- Generations -------------------------------------------------------------------------- */

/* A backup of one file, put back later: its blocks were dropped or replaced since, and must not
 * come back.  Version 1 of each key is stale, version 2 is current. */
static void a_stale_segment_of_an_earlier_generation_is_refused(void **state) {
    enum { KEYS = 20, STALE = 3 };
    static const struct kv_block_extent extent = {LAB_TAG, 4, 8192};
    struct lab old;
    lab_open(&old);
    old.options.disk_bytes = 8 * LAB_MIB;
    lab_start(&old);
    for (uint64_t key = 0; key < KEYS; key++)
        assert_int_equal(lab_put_as(&old, key, 1, KV_CLASS_BLOCK, &extent, false), KV_OK);
    lab_settle(&old);
    struct lab then;
    lab_crash(&old, &then);

    for (uint64_t key = 0; key < KEYS; key++) {
        struct kv_digest digest = lab_key(key);
        assert_int_equal(kv_store_drop(old.store, &digest), KV_OK);
    }
    for (uint64_t filler = 1000; filler < 1400; filler++) /* twice around the disk */
        assert_int_equal(lab_put_as(&old, filler, 0, KV_CLASS_BLOCK, &extent, false), KV_OK);
    for (uint64_t key = 0; key < KEYS / 2; key++)
        assert_int_equal(lab_put_as(&old, key, 2, KV_CLASS_BLOCK, &extent, false), KV_OK);
    lab_settle(&old);

    for (uint32_t round = 0; round < 2 * STALE; round++) {
        struct lab now;
        char name[32];
        size_t bytes;
        if (round == STALE) { /* and after a clean stop */
            lab_stop(&old);
        }
        lab_crash(&old, &now);
        lab_segment_name(round % STALE, name);
        uint8_t *stale = lab_file_read(&then, name, &bytes);
        lab_file_write(&now, name, stale, bytes);
        free(stale);
        lab_start(&now);
        uint32_t current = 0;
        for (uint64_t key = 0; key < KEYS; key++) {
            uint64_t version      = 0;
            enum kv_status status = lab_read(&now, key, &extent, &version);
            if (status == KV_OK) assert_int_equal(version, 2);
            if (key >= KEYS / 2) assert_int_equal(status, KV_NOT_FOUND);
            current += status == KV_OK;
        }
        print_message("%s of an earlier life: %u of %d current ones are served\n", name, current,
                      KEYS / 2);
        lab_close(&now);
    }
    lab_close(&then);
    lab_close(&old);
}

/* A whole segment of another store, with the same name, keys and generation. */
static void a_segment_of_another_store_is_refused(void **state) {
    struct lab other;
    lab_open(&other);
    other.options.disk_bytes = SEGMENTS_MAX * LAB_MIB;
    lab_start(&other);
    struct kv_block_extent extent;
    for (uint64_t number = 0; number < BLOCKS; number++) {
        extent = lab_extent(number);
        assert_int_equal(lab_put_as(&other, number, 9, KV_CLASS_BLOCK, &extent, false), KV_OK);
    }
    lab_stop(&other);
    for (uint32_t slot = 0; slot < 3; slot++) {
        struct trial trial;
        char name[32];
        lab_segment_name(slot, name);
        trial_begin(&trial, slot % 2 ? &clean : &crashed);
        free(trial.segments[slot]);
        trial.segments[slot] = lab_file_read(&other, name, &trial.bytes[slot]);
        touch_segment(&trial, slot);
        trial_run(&trial, true);
    }
    lab_close(&other);
}

/* ---- Superblock --------------------------------------------------------------------------- */

static void a_flipped_bit_of_either_superblock_loses_nothing(void **state) {
    for (uint64_t bit = 0; bit < 2 * PAGE_BITS; bit += 3 * LAB_ROUNDS_DIVISOR) {
        if (bit % PAGE_BITS == 76 * 8) bit += PAGE_BITS - 76 * 8 - 64; /* the zeros: only the end */
        if (bit % PAGE_BITS > 76 * 8 && bit % PAGE_BITS < PAGE_BITS - 64)
            bit += PAGE_BITS - 64 - bit % PAGE_BITS;
        struct trial trial;
        trial_begin(&trial, bit % 2 ? &clean : &crashed);
        flip(trial.superblock, bit);
        trial_run(&trial, true);
    }
}

static void two_damaged_superblocks_are_refused_and_left_alone(void **state) {
    struct trial trial;
    trial_begin(&trial, &clean);
    flip(trial.superblock, 200);
    flip(trial.superblock, PAGE_BITS + 300);
    trial_write(&trial);
    char why[256] = "";
    assert_int_equal(lab_try_start(&lab, why), KV_INVALID);
    assert_true(why[0] != 0);
    size_t bytes;
    uint8_t *segment = lab_file_read(&lab, "segment-00000", &bytes);
    assert_int_equal(bytes, LAB_MIB);
    assert_memory_equal(segment, trial.segments[0], LAB_MIB);
    free(segment);
    trial_free(&trial);
}

/* ------------------------------------------------------------------------------------------- */

int main(void) {
    lab_filter();
    lab_use_memory();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(no_flipped_bit_of_a_record_header_passes),
        cmocka_unit_test(flipped_headers_are_refused_after_a_clean_stop),
        cmocka_unit_test(flipped_headers_are_refused_after_a_crash),
        cmocka_unit_test(flipped_payloads_are_refused_after_a_clean_stop),
        cmocka_unit_test(flipped_payloads_are_refused_after_a_crash),
        cmocka_unit_test(a_flipped_part_does_not_spoil_its_neighbours),
        cmocka_unit_test(a_flipped_bit_of_a_segment_header_loses_nothing),
        cmocka_unit_test(flipped_bits_of_both_segment_headers_harm_no_other_segment),
        cmocka_unit_test(no_flipped_bit_of_a_segment_header_or_trailer_passes),
        cmocka_unit_test(a_flipped_bit_of_a_footer_loses_nothing),
        cmocka_unit_test(truncated_segments_serve_what_is_before_the_cut_after_a_clean_stop),
        cmocka_unit_test(truncated_segments_serve_what_is_before_the_cut_after_a_crash),
        cmocka_unit_test(swapped_segments_are_refused),
        cmocka_unit_test(a_record_at_the_wrong_place_is_refused),
        cmocka_unit_test(garbage_zeros_and_absent_files_harm_no_other_segment),
        cmocka_unit_test(a_stale_segment_of_an_earlier_generation_is_refused),
        cmocka_unit_test(a_segment_of_another_store_is_refused),
        cmocka_unit_test(a_flipped_bit_of_either_superblock_loses_nothing),
        cmocka_unit_test(two_damaged_superblocks_are_refused_and_left_alone),
    };
    return cmocka_run_group_tests_name("damage", tests, originals_make, originals_free);
}
