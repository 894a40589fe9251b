/* SPDX-License-Identifier: Apache-2.0 */
/* disk_fault_test.c - a disk that fails at any one moment, or from it on.
 *
 * One scenario - open, write, wait, evict, restore, read parts, drop, overflow the disk, close - is
 * run again and again; each time the next read, write, sync or allocation fails, until a run meets
 * none.  Whatever fails: no wrong byte (get() fails the test on one), no wait for ever, each answer
 * one that the header allows, and afterwards, with the disk whole again, the store works. */
#include "tests/storage/harness.h"

#include "storage/clock.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>

static int setup(void **state) {
    struct harness *h = malloc(sizeof *h);
    harness_setup(h);
    h->options.arena_bytes = 2 * MIB;
    h->options.disk_bytes  = 5 * MIB;
    *state                 = h;
    return 0;
}

static int teardown(void **state) {
    harness_teardown(*state);
    free(*state);
    return 0;
}

static bool one_of(enum kv_status status, uint32_t allowed) {
    return (allowed >> status & 1) != 0;
}
#define MAY(status) (1u << (status))

/* True if it ran to the end; false if the store could not be opened. */
static bool scenario(struct harness *h) {
    enum kv_status status = harness_try_open(h);
    if (status != KV_OK) {
        assert_true(one_of(status, MAY(KV_IO_ERROR) | MAY(KV_BUSY)));
        return false;
    }
    const uint32_t after_read = MAY(KV_OK) | MAY(KV_NOT_FOUND) | MAY(KV_IO_ERROR) |
                                MAY(KV_BUSY);
    put_keep(h, 500, 7);
    for (uint64_t i = 0; i < 12; i++) put(h, i);
    status = sync_wait(h, 3, KV_WRITTEN);
    assert_true(one_of(status, MAY(KV_OK) | MAY(KV_IO_ERROR)));
    status = sync_wait(h, 5, KV_SYNCED);
    assert_true(one_of(status, MAY(KV_OK) | MAY(KV_IO_ERROR)));
    struct put wanted = {.version = 1, .part_count = PARTS, .part_bytes = PART_BYTES};
    for (uint64_t i = 12; i < 110; i++) { /* more than the arena, more than the disk */
        wanted.number = i;
        uint32_t tries = 0;
        while (put_try(h, &wanted) == KV_BUSY && tries++ < 100) turn_store(h);
        if (i % 10 == 0) {
            assert_true(one_of(get(h, i - 5), after_read));
            assert_true(one_of(get_part(h, i / 2, 2), after_read));
        }
        if (i % 16 == 0) {
            struct kv_digest key = key_of(i - 2);
            status               = kv_store_drop(h->store, &key);
            assert_true(one_of(status, MAY(KV_OK) | MAY(KV_NOT_FOUND) | MAY(KV_BUSY)));
            if (status == KV_OK) assert_int_equal(get(h, i - 2), KV_NOT_FOUND);
        }
    }
    for (uint64_t i = 0; i < 110; i += 7) assert_true(one_of(get(h, i), after_read));
    assert_true(harness_disk_bytes(h) <= h->options.disk_bytes);
    harness_close(h);
    return true;
}

static void wipe(struct harness *h) {
    char command[256];
    snprintf(command, sizeof command, "rm -rf '%s'", h->path);
    assert_int_equal(system(command), 0);
}

static void sweep(struct harness *h, enum kv_io_kind kind, struct kv_io_fault fault, bool forever) {
    uint32_t step = harness_rounds(8) == 8 ? 1 : 5;
    if (forever) step *= 6; /* most of such a run is like its neighbour's */
    for (uint32_t nth = 1;; nth += step) {
        wipe(h);
        struct bad_disk disk = {.kind = (int)kind, .nth = nth, .forever = forever, .fault = fault};
        bad_disk_set(&disk);
        scenario(h);
        bad_disk_clear();
        uint32_t hits = disk.hits;
        /* The disk is whole again: what is there is right, and it works. */
        if (harness_try_open(h) == KV_OK) {
            for (uint64_t i = 0; i < 110; i += 9) {
                enum kv_status status = get(h, i);
                assert_true(one_of(status, MAY(KV_OK) | MAY(KV_NOT_FOUND) | MAY(KV_CORRUPT)));
            }
            put(h, 1000 + nth);
            assert_int_equal(sync_wait(h, 1000 + nth, KV_SYNCED), KV_OK);
            harness_close(h);
        } else {
            /* Only if the very first superblock never got there whole. */
            assert_true(kind == KV_IO_WRITE && fault.torn);
        }
        if (hits == 0) {
            assert_true(nth > 3); /* the scenario does such things */
            return;
        }
    }
}

static void every_write_fails_once(void **state) {
    sweep(*state, KV_IO_WRITE, (struct kv_io_fault){.error = EIO}, false);
}
static void every_write_is_torn_once(void **state) {
    sweep(*state, KV_IO_WRITE,
          (struct kv_io_fault){.error = EIO, .move_bytes = 4096, .torn = true}, false);
}
static void every_read_fails_once(void **state) {
    sweep(*state, KV_IO_READ, (struct kv_io_fault){.error = EIO}, false);
}
static void every_sync_fails_once(void **state) {
    sweep(*state, KV_IO_SYNC, (struct kv_io_fault){.error = EIO}, false);
}
static void every_allocation_fails_once(void **state) {
    sweep(*state, KV_IO_ALLOCATE, (struct kv_io_fault){.error = ENOSPC}, false);
}

/* From a moment on no write succeeds: blocks stay in memory, the service goes on, and when the disk
 * is back so is durability. */
static void a_disk_that_dies_and_comes_back(void **state) {
    struct harness *h = *state;
    harness_open(h);
    for (uint64_t i = 0; i < 5; i++) put(h, i);
    settle(h);
    struct bad_disk disk = {.kind = KV_IO_WRITE, .nth = 1, .forever = true, .fault = {.error = EIO}};
    bad_disk_set(&disk);
    put(h, 10);
    assert_int_equal(sync_wait(h, 10, KV_WRITTEN), KV_IO_ERROR);
    struct kv_block_info info;
    assert_true(find(h, 10, &info));
    assert_int_equal(info.tier, KV_TIER_HOST);
    assert_int_equal(info.durability, KV_VOLATILE);
    assert_int_equal(get(h, 10), KV_OK);
    assert_int_equal(get(h, 2), KV_OK);
    for (uint64_t i = 100; i < 200; i++) put(h, i); /* three times the arena: must not wedge */
    assert_int_equal(get(h, 199), KV_OK);
    assert_true(kv_store_stats(h->store)->io_errors > 0);
    bad_disk_clear();
    uint64_t began = kv_clock_us();
    enum kv_status status;
    do {
        turn_store(h);
        status = sync_wait(h, 199, KV_SYNCED);
    } while (status == KV_IO_ERROR && kv_clock_us() < began + 15000000);
    assert_int_equal(status, KV_OK);
}

/* A failed fdatasync is never asked again: the segment is given up, and what was in memory is
 * written, and synced, elsewhere. */
static void a_failed_sync_poisons_the_segment(void **state) {
    struct harness *h = *state;
    harness_open(h);
    for (uint64_t i = 0; i < 3; i++) put(h, i);
    assert_int_equal(sync_wait(h, 2, KV_SYNCED), KV_OK);
    put(h, 3);
    assert_int_equal(sync_wait(h, 3, KV_WRITTEN), KV_OK);
    struct bad_disk disk = {.kind = KV_IO_SYNC, .nth = 1, .fault = {.error = EIO}};
    bad_disk_set(&disk);
    assert_int_equal(sync_wait(h, 3, KV_SYNCED), KV_IO_ERROR);
    assert_int_equal(disk.hits, 1);
    assert_int_equal(kv_store_stats(h->store)->segments_lost, 1);
    struct kv_block_info info;
    assert_true(find(h, 3, &info));
    assert_int_equal(info.durability, KV_VOLATILE);
    assert_true(find(h, 2, &info));
    assert_int_equal(info.durability, KV_SYNCED); /* by the earlier one */
    assert_int_equal(sync_wait(h, 3, KV_SYNCED), KV_OK);
    for (uint64_t i = 0; i < 4; i++) assert_int_equal(get(h, i), KV_OK);
    harness_close(h);
    harness_open(h);
    for (uint64_t i = 0; i < 4; i++) assert_int_equal(get(h, i), KV_OK);
}

/* The file system is full although the cap is not: no segment can be made at all. */
static void no_space_from_the_start(void **state) {
    struct harness *h    = *state;
    struct bad_disk disk = {.kind = KV_IO_ALLOCATE, .nth = 1, .forever = true,
                            .fault = {.error = ENOSPC}};
    bad_disk_set(&disk);
    harness_open(h);
    put(h, 1);
    assert_int_equal(sync_wait(h, 1, KV_WRITTEN), KV_IO_ERROR);
    assert_int_equal(get(h, 1), KV_OK);
    for (uint64_t i = 2; i < 100; i++) put(h, i);
    assert_int_equal(get(h, 99), KV_OK);
}

/* It is full after two segments: the log goes round in those. */
static void no_space_later(void **state) {
    struct harness *h    = *state;
    struct bad_disk disk = {.kind = KV_IO_ALLOCATE, .nth = 4, .forever = true,
                            .fault = {.error = ENOSPC}};
    bad_disk_set(&disk);
    harness_open(h);
    put_keep(h, 500, 1);
    for (uint64_t i = 0; i < 200; i++) put(h, i);
    assert_int_equal(sync_wait(h, 199, KV_SYNCED), KV_OK);
    assert_int_equal(get(h, 500), KV_OK);
}

/* A read that fails is not a damaged block: another time it may succeed. */
static void a_failed_read_may_be_repeated(void **state) {
    struct harness *h = *state;
    harness_open(h);
    for (uint64_t i = 0; i < 35; i++) put(h, i); /* more than the arena, less than the disk */
    settle(h);
    uint64_t cold[2], count = 0;
    for (uint64_t i = 0; i < 35 && count < 2; i++) {
        struct kv_block_info info;
        if (find(h, i, &info) && info.tier == KV_TIER_NVME) cold[count++] = i;
    }
    assert_int_equal(count, 2);
    struct bad_disk disk = {.kind = KV_IO_READ, .nth = 1, .fault = {.error = EIO}};
    bad_disk_set(&disk);
    assert_int_equal(get_part(h, cold[0], 1), KV_IO_ERROR);
    assert_int_equal(get_part(h, cold[0], 1), KV_OK);
    bad_disk_set(&disk);
    assert_int_equal(get(h, cold[1]), KV_IO_ERROR);
    assert_int_equal(get(h, cold[1]), KV_OK);
    assert_int_equal(kv_store_stats(h->store)->corruptions, 0);
}

static void a_slow_disk_only_takes_longer(void **state) {
    struct harness *h    = *state;
    struct bad_disk disk = {.kind = -1, .nth = 1, .forever = true, .fault = {.delay_us = 3000}};
    bad_disk_set(&disk);
    harness_open(h);
    for (uint64_t i = 0; i < 60; i++) put(h, i);
    for (uint64_t i = 20; i < 60; i += 5) assert_int_equal(get(h, i), KV_OK);
    assert_int_equal(sync_wait(h, 59, KV_SYNCED), KV_OK);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(int argc, char **argv) {
    harness_arguments(argc, argv);
    const struct CMUnitTest tests[] = {
        TEST(a_disk_that_dies_and_comes_back),
        TEST(a_failed_sync_poisons_the_segment),
        TEST(no_space_from_the_start),
        TEST(no_space_later),
        TEST(a_failed_read_may_be_repeated),
        TEST(a_slow_disk_only_takes_longer),
        TEST(every_write_fails_once),
        TEST(every_write_is_torn_once),
        TEST(every_read_fails_once),
        TEST(every_sync_fails_once),
        TEST(every_allocation_fails_once),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
