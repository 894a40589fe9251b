/* SPDX-License-Identifier: Apache-2.0 */
/* table_test.c - keys are found exactly when they are there, and a scan does not flush the hot set. */
#include "tests/storage/harness.h"

#include "storage/table.h"

#include <stdlib.h>

static void random_walk_agrees_with_the_model(void **state) {
    enum { ENTRIES = 300, KEYS = 500 };
    uint64_t seed = random_seed("table");
    struct kv_table *table;
    static uint32_t visible[KEYS], filling[KEYS];
    memset(visible, 0xff, sizeof visible);
    memset(filling, 0xff, sizeof filling);
    assert_int_equal(kv_table_open(ENTRIES, &table), KV_OK);
    uint32_t used = 0;
    for (uint32_t step = 0; step < harness_rounds(200000); step++) {
        uint64_t number      = random_below(&seed, KEYS);
        struct kv_digest key = key_of(number);
        bool which           = random_below(&seed, 2);
        uint32_t *model      = which ? visible : filling;
        enum kv_entry_kind kind = which ? KV_KIND_VISIBLE : KV_KIND_FILLING;
        assert_int_equal(kv_table_find(table, &key, kind), model[number]);
        if (model[number] != KV_ENTRY_NONE) {
            kv_table_remove(table, model[number]);
            model[number] = KV_ENTRY_NONE;
            used--;
        } else {
            model[number] =
                kv_table_insert(table, &key, which ? KV_ENTRY_COLD : KV_ENTRY_FILLING);
            assert_int_equal(model[number] == KV_ENTRY_NONE, used == ENTRIES);
            used += model[number] != KV_ENTRY_NONE;
        }
        assert_int_equal(kv_table_used(table), used);
    }
    for (uint64_t number = 0; number < KEYS; number++) {
        struct kv_digest key = key_of(number);
        assert_int_equal(kv_table_find(table, &key, KV_KIND_VISIBLE), visible[number]);
        assert_int_equal(kv_table_find(table, &key, KV_KIND_FILLING), filling[number]);
        assert_int_equal(kv_table_find(table, &key, KV_KIND_TOMBSTONE), KV_ENTRY_NONE);
    }
    kv_table_close(table);
}

/* 8 blocks in use every two seconds, and 1000 read once each in between: of an arena of 20, the 8
 * stay.  The thirty touches of one pass over the layers do not make a scanned block hot. */
static void a_scan_does_not_flush_the_hot_set(void **state) {
    enum { HOT = 8, ARENA = 20 };
    struct kv_table *table;
    struct kv_ages ages;
    assert_int_equal(kv_table_open(2000, &table), KV_OK);
    kv_ages_init(&ages, ARENA * 2); /* each block is 2 pages */
    uint64_t now = 1000000;
    uint32_t resident = 0;
    for (uint32_t i = 0; i < 1000 + HOT; i++) {
        struct kv_digest key   = key_of(i);
        uint32_t index         = kv_table_insert(table, &key, KV_ENTRY_RESIDENT);
        struct kv_entry *entry = kv_table_entry(table, index);
        assert_int_equal(index, i);
        entry->extent     = (struct kv_block_extent){.part_count = 1, .part_bytes = 4096};
        entry->arrived_us = now;
        for (int layer = 0; layer < 30; layer++) kv_ages_use(entry, now + 1000u * (unsigned)layer);
        kv_ages_add(table, &ages, index);
        resident++;
        now += 250000;
        if (i % HOT == HOT - 1 && i >= HOT) {
            for (uint32_t hot = 0; hot < HOT; hot++) {
                assert_ptr_not_equal(kv_table_entry(table, hot)->age.list, NULL); /* still there */
                kv_ages_remove(table, &ages, hot);
                kv_ages_use(kv_table_entry(table, hot), now);
                kv_ages_add(table, &ages, hot);
            }
        }
        while (resident > ARENA) {
            kv_ages_remove(table, &ages, kv_ages_coldest(&ages));
            resident--;
        }
    }
    kv_table_close(table);
}

/* Hot blocks get at most three quarters: what was hot long ago makes room in the end. */
static void the_hot_set_is_bounded(void **state) {
    struct kv_table *table;
    struct kv_ages ages;
    assert_int_equal(kv_table_open(100, &table), KV_OK);
    kv_ages_init(&ages, 40);
    for (uint32_t i = 0; i < 20; i++) {
        struct kv_digest key   = key_of(i);
        uint32_t index         = kv_table_insert(table, &key, KV_ENTRY_RESIDENT);
        struct kv_entry *entry = kv_table_entry(table, index);
        entry->extent          = (struct kv_block_extent){.part_count = 1, .part_bytes = 4096};
        kv_ages_use(entry, 2 * KV_CORRELATED_US);
        kv_ages_add(table, &ages, index);
        assert_true(ages.hot_units <= 30);
    }
    assert_int_equal(kv_ages_coldest(&ages), 0);
    for (uint32_t i = 0; i < 20; i++) {
        assert_int_equal(kv_ages_coldest(&ages), i);
        kv_ages_remove(table, &ages, i);
    }
    assert_int_equal(kv_ages_coldest(&ages), KV_ENTRY_NONE);
    assert_int_equal(ages.hot_units, 0);
    kv_table_close(table);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(random_walk_agrees_with_the_model),
        cmocka_unit_test(a_scan_does_not_flush_the_hot_set),
        cmocka_unit_test(the_hot_set_is_bounded),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
