/* SPDX-License-Identifier: Apache-2.0 */
/* reclaim_test.c - what goes and what stays when the disk is full, over many rounds of the log.
 *
 * The disk holds a few segments only, so that every test drives the log around several times: the
 * order of segments, what is carried out of the oldest, and the tombstones that go with it. */
#include "tests/storage/harness.h"

#include "storage/clock.h"

#include <stdlib.h>

static int setup(void **state) {
    struct harness *h = malloc(sizeof *h);
    harness_setup(h);
    *state = h;
    return 0;
}

static int teardown(void **state) {
    harness_teardown(*state);
    free(*state);
    return 0;
}

/* Four snapshots fill a segment to its last page, so nothing can be gained by carrying them. */
static void keep_has_half_of_the_disk(void **state) {
    struct harness *h     = *state;
    h->options.disk_bytes = 9 * MIB;
    harness_open(h);
    struct put wanted = {.version = 1, .part_count = 1, .part_bytes = 250000,
                         .class = KV_CLASS_KEEP};
    uint64_t count = 0;
    for (;; count++) {
        wanted.number  = count;
        uint64_t tries = 0;
        enum kv_status status;
        while ((status = put_try(h, &wanted)) == KV_BUSY && tries++ < 50) turn_store(h);
        if (status != KV_OK) break;
    }
    assert_in_range(count, 16, 18);
    /* Cache blocks still pass through, again and again, and no snapshot is lost to them. */
    for (uint64_t i = 1000; i < 1200; i++) put(h, i);
    for (uint64_t i = 0; i < count; i++) assert_int_equal(get(h, i), KV_OK);
    assert_int_equal(get(h, 1199), KV_OK);
    harness_close(h);
    harness_open(h);
    for (uint64_t i = 0; i < count; i++) assert_int_equal(get(h, i), KV_OK);
}

/* A snapshot in memory and one on disk only are carried alike, by way of the disk. */
static void snapshots_are_carried_for_ever(void **state) {
    struct harness *h     = *state;
    h->options.disk_bytes = 5 * MIB;
    harness_open(h);
    for (uint64_t i = 0; i < 6; i++) put_keep(h, i, 10 + i);
    for (uint64_t i = 1000; i < 1500; i++) {
        put(h, i);
        if (i % 50 == 0) assert_int_equal(get(h, 0), KV_OK);
        if (i % 50 == 1) put_keep(h, 1, i); /* replaced while others are carried */
    }
    for (uint64_t i = 0; i < 6; i++) assert_int_equal(get(h, i), KV_OK);
    struct kv_block_info info;
    assert_true(find(h, 1, &info));
    assert_int_equal(info.extent.tag, 1451);
    harness_close(h);
    harness_open(h);
    for (uint64_t i = 0; i < 6; i++) assert_int_equal(get(h, i), KV_OK);
    assert_true(find(h, 1, &info));
    assert_int_equal(info.extent.tag, 1451);
}

/* A dropped key stays away although its tombstone's segment is reused many times, and whenever the
 * process might have crashed. */
static void tombstones_outlive_what_they_cover(void **state) {
    struct harness *h     = *state;
    h->options.disk_bytes = 6 * MIB;
    harness_open(h);
    put_keep(h, 1, 1);
    put_keep(h, 2, 1);
    for (uint64_t i = 100; i < 130; i++) put(h, i);
    settle(h);
    struct kv_digest key = key_of(1);
    assert_int_equal(kv_store_drop(h->store, &key), KV_OK);
    assert_int_equal(sync_wait(h, 1, KV_SYNCED), KV_OK);
    for (uint64_t i = 130; i < 500; i++) {
        put(h, i);
        if (i % 37 != 0) continue;
        struct harness copy;
        harness_copy(h, &copy, "copy");
        harness_open(&copy);
        assert_int_equal(get(&copy, 1), KV_NOT_FOUND);
        assert_int_equal(get(&copy, 2), KV_OK);
        harness_close(&copy);
    }
}

static void cap_is_kept_and_the_oldest_go(void **state) {
    struct harness *h = *state;
    harness_open(h);
    for (uint64_t i = 0; i < 1000; i++) { /* 68 MiB through a cap of 17 */
        put(h, i);
        if (i % 50 == 0) assert_true(harness_disk_bytes(h) <= h->options.disk_bytes);
    }
    settle(h);
    assert_true(harness_disk_bytes(h) <= h->options.disk_bytes);
    uint64_t held = 0;
    for (uint64_t i = 0; i < 1000; i++) held += get(h, i) == KV_OK;
    assert_in_range(held, 150, 250);
    assert_int_equal(get(h, 999), KV_OK);
    assert_int_equal(get(h, 0), KV_NOT_FOUND);
    assert_true(kv_store_stats(h->store)->drops >= 700);
}

static void protected_and_pinned_blocks_stay(void **state) {
    struct harness *h     = *state;
    h->options.disk_bytes = 8 * MIB;
    harness_open(h);
    for (uint64_t i = 0; i < 10; i++) put(h, i);
    settle(h);
    uint64_t until = kv_clock_us() + 60000000;
    for (uint64_t i = 0; i < 5; i++) {
        struct kv_digest key = key_of(i);
        assert_true(kv_store_protect(h->store, &key, until));
        assert_true(kv_store_protect(h->store, &key, 1)); /* never shortens */
    }
    static struct pinned pinned;
    const uint64_t number = 7;
    pin_begin(h, &pinned, &number, 1, -1, 1);
    assert_int_equal(pin_end(h, &pinned), KV_OK);
    for (uint64_t i = 100; i < 400; i++) put(h, i);
    for (uint64_t i = 0; i < 5; i++) assert_int_equal(get(h, i), KV_OK);
    assert_int_equal(get(h, 7), KV_OK);
    assert_int_equal(get(h, 8), KV_NOT_FOUND);
    kv_store_unpin(h->store, &pinned.pin);
}

/* The working set is read again and again while new blocks stream by: it stays, although the log is
 * first in, first out. */
static void used_blocks_are_carried_forward(void **state) {
    struct harness *h = *state;
    harness_open(h);
    for (uint64_t i = 0; i < 3; i++) put(h, i);
    for (uint64_t i = 100; i < 900; i++) {
        put(h, i);
        if (i % 20 == 0)
            for (uint64_t j = 0; j < 3; j++) assert_int_equal(get(h, j), KV_OK);
    }
}

/* Everything is pinned: nothing can be gained on disk, writes are refused, and once the pins are gone
 * the store goes on. */
static void pinned_beyond_the_disk_is_told(void **state) {
    struct harness *h      = *state;
    h->options.disk_bytes  = 4 * MIB;
    h->options.arena_bytes = 8 * MIB;
    harness_open(h);
    struct put wanted = {.version = 1, .part_count = PARTS, .part_bytes = PART_BYTES,
                         .pinned = true};
    uint64_t count = 0;
    while (count < 100) {
        wanted.number = count;
        if (put_block(h, &wanted) != KV_OK) break;
        count++;
    }
    uint64_t written = 0, refused = 0;
    for (uint64_t i = 0; i < count; i++) {
        enum kv_status status = sync_wait(h, i, KV_WRITTEN);
        assert_true(status == KV_OK || status == KV_IO_ERROR);
        written += status == KV_OK;
        refused += status == KV_IO_ERROR;
    }
    assert_true(written > 20 && refused > 0);
    for (uint64_t i = 0; i < count; i++) {
        assert_int_equal(get(h, i), KV_OK);
        struct kv_digest key = key_of(i);
        kv_store_unpin_key(h->store, &key);
    }
    for (uint64_t i = 200; i < 400; i++) put(h, i);
    assert_int_equal(get(h, 399), KV_OK);
}

/* A smaller cap takes effect soon after the next open, oldest first, snapshots kept. */
static void cap_may_shrink_and_grow(void **state) {
    struct harness *h = *state;
    harness_open(h);
    put_keep(h, 5000, 1);
    for (uint64_t i = 0; i < 200; i++) put(h, i);
    harness_close(h);
    h->options.disk_bytes = 6 * MIB;
    harness_open(h);
    uint64_t began = kv_clock_us();
    while (harness_disk_bytes(h) > 6 * MIB && kv_clock_us() < began + 10000000) turn_store(h);
    assert_true(harness_disk_bytes(h) <= 6 * MIB);
    assert_int_equal(get(h, 5000), KV_OK);
    assert_int_equal(get(h, 199), KV_OK);
    for (uint64_t i = 200; i < 400; i++) put(h, i);
    assert_true(harness_disk_bytes(h) <= 6 * MIB);
    h->options.disk_bytes = 17 * MIB;
    harness_close(h);
    harness_open(h);
    assert_int_equal(get(h, 5000), KV_OK);
    assert_int_equal(get(h, 399), KV_OK);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(int argc, char **argv) {
    harness_arguments(argc, argv);
    const struct CMUnitTest tests[] = {
        TEST(keep_has_half_of_the_disk),
        TEST(snapshots_are_carried_for_ever),
        TEST(tombstones_outlive_what_they_cover),
        TEST(cap_is_kept_and_the_oldest_go),
        TEST(protected_and_pinned_blocks_stay),
        TEST(used_blocks_are_carried_forward),
        TEST(pinned_beyond_the_disk_is_told),
        TEST(cap_may_shrink_and_grow),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
