/* SPDX-License-Identifier: Apache-2.0 */
/* store_model_test.c - random operations against a model that fits in a page.
 *
 * The model knows of each key which states it has gone through, numbered, and the last one that was
 * acknowledged as WRITTEN.  While the store runs, a key is in its newest state, except that a block
 * nobody holds may have been dropped, which the store must have counted.  After a crash (a copy of
 * the directory, taken with writes in flight) it is in any state since the acknowledged one.
 * Whatever is read is judged byte for byte, and says its version itself. */
#include "tests/storage/store_lab.h"

enum { KEYS = 48, STEPS = 12000 / LAB_ROUNDS_DIVISOR, PINS = 4 };

struct model_key {
    uint64_t state;        /* newest; a present one is the version of the bytes */
    uint64_t acknowledged; /* newest state known to be WRITTEN */
    uint64_t absent;       /* newest state that was "absent" */
    bool present, keep;
    uint32_t pins;
};

struct model {
    struct lab lab;
    struct dice dice;
    struct model_key keys[KEYS];
    struct lab_pin pins[PINS];
    uint64_t pinned[PINS][3]; /* key numbers */
    bool pin_used[PINS];
    uint64_t losses;          /* that the model has met, of this store's drops */
    uint64_t drops_asked;
    bool lossless;            /* the disk is so large that nothing ever has to go */
};

static struct model model;

static struct kv_block_extent extent_of(uint64_t key) {
    return lab_extent(key * 7 + 3);
}

/* Brings the model to what a drop by the store leaves; each must have been counted. */
static void key_lost(struct model *m, struct model_key *key) {
    assert_true(key->pins == 0 && !key->keep && !m->lossless);
    m->losses++;
    assert_true(m->losses + m->drops_asked <= kv_store_stats(m->lab.store)->drops);
    key->present = false;
    key->absent  = ++key->state;
}

static void key_check(struct model *m, uint64_t number) {
    struct model_key *key = &m->keys[number];
    bool there            = lab_has(&m->lab, number);
    if (there && !key->present) fail_msg("key %d came back", (int)number);
    if (!there && key->present) key_lost(m, key);
}

static void step_put(struct model *m, uint64_t number) {
    struct model_key *key         = &m->keys[number];
    struct kv_block_extent extent = extent_of(number);
    struct kv_digest digest       = lab_key(number);
    struct kv_slot slot;
    key->keep = number % 6 == 0;
    if (key->keep && key->pins > 0) return; /* pins would be of the older record: store_test.c */
    enum kv_block_class class = key->keep ? KV_CLASS_KEEP : KV_CLASS_BLOCK;
    enum kv_status status     = kv_store_reserve(m->lab.store, &digest, class, &extent, &slot);
    if (status == KV_BUSY) return;
    if (status == KV_EXISTS) {
        assert_true(key->present && !key->keep);
        return;
    }
    assert_int_equal(status, KV_OK);
    if (dice_below(&m->dice, 8) == 0) {
        kv_store_abandon(m->lab.store, &slot);
        return;
    }
    key_check(m, number);
    lab_fill(slot.address, number, ++key->state, &extent);
    kv_store_commit(m->lab.store, &slot, false);
    key->present = true;
}

static void step_get(struct model *m, uint64_t number) {
    struct kv_block_extent extent = extent_of(number);
    int32_t part = (int32_t)dice_below(&m->dice, extent.part_count + 1) - 1;
    uint64_t version;
    enum kv_status status = part < 0 ? lab_read(&m->lab, number, &extent, &version)
                                     : lab_read_part(&m->lab, number, &extent, part, &version);
    if (status == KV_BUSY) return; /* others hold too much */
    key_check(m, number);
    struct model_key *key = &m->keys[number];
    if (status == KV_NOT_FOUND) {
        assert_false(key->present);
        return;
    }
    assert_int_equal(status, KV_OK);
    assert_int_equal(version, key->state);
}

static void step_drop(struct model *m, uint64_t number) {
    struct model_key *key   = &m->keys[number];
    struct kv_digest digest = lab_key(number);
    key_check(m, number);
    enum kv_status status = kv_store_drop(m->lab.store, &digest);
    if (status == KV_BUSY && key->pins == 0) return; /* no room for the tombstone */
    assert_int_equal(status, key->pins > 0 ? KV_BUSY : key->present ? KV_OK : KV_NOT_FOUND);
    if (status != KV_OK) return;
    m->drops_asked++;
    key->present = false;
    key->absent  = ++key->state;
}

static void step_sync(struct model *m, uint64_t number) {
    struct model_key *key = &m->keys[number];
    uint64_t state        = key->state;
    enum kv_status status =
        lab_sync(&m->lab, number, dice_below(&m->dice, 2) ? KV_WRITTEN : KV_SYNCED);
    assert_true(status == KV_OK || status == KV_NOT_FOUND);
    key_check(m, number);
    if (status == KV_OK && key->state == state) key->acknowledged = state;
}

static void step_pin(struct model *m, uint32_t at) {
    struct lab_pin *pin = &m->pins[at];
    if (m->pin_used[at]) {
        for (int i = 0; i < 3; i++) {
            uint64_t version, number = m->pinned[at][i];
            struct kv_block_extent extent = extent_of(number);
            assert_true(lab_block_valid(pin->addresses[i], number, &extent, &version));
            m->keys[number].pins--;
        }
        lab_unpin(&m->lab, pin);
        m->pin_used[at] = false;
        return;
    }
    for (int i = 0; i < 3; i++) m->pinned[at][i] = dice_below(&m->dice, KEYS);
    if (lab_pin(&m->lab, pin, m->pinned[at], 3, -1) != KV_OK) return;
    m->pin_used[at] = true;
    for (int i = 0; i < 3; i++) m->keys[m->pinned[at][i]].pins++;
}

static void unpin_all(struct model *m) {
    for (uint32_t at = 0; at < PINS; at++) {
        if (m->pin_used[at]) step_pin(m, at);
    }
}

/* What the disk holds is what the model is from now on. */
static void adopt(struct model *m, bool crashed) {
    m->losses = m->drops_asked = 0;
    for (uint64_t number = 0; number < KEYS; number++) {
        struct model_key *key         = &m->keys[number];
        struct kv_block_extent extent = extent_of(number);
        uint64_t version              = 0;
        enum kv_status status         = lab_read(&m->lab, number, &extent, &version);
        assert_true(status == KV_OK || status == KV_NOT_FOUND);
        if (status == KV_OK) {
            if (version < key->acknowledged || version > key->state ||
                (!crashed && version != key->state))
                fail_msg("key %d is at %d, acknowledged %d, newest %d", (int)number, (int)version,
                         (int)key->acknowledged, (int)key->state);
        } else {
            bool was_absent = crashed ? key->absent >= key->acknowledged : !key->present;
            bool may_go     = !key->keep && !m->lossless; /* the disk was full */
            if (!was_absent && !may_go) fail_msg("key %d is lost", (int)number);
        }
        key->present = status == KV_OK;
        if (status == KV_OK) key->state = version;
        key->acknowledged = key->state; /* it was read from disk */
        if (!key->present) key->absent = key->acknowledged;
    }
    m->losses = kv_store_stats(m->lab.store)->drops;
}

static void step_restart(struct model *m) {
    unpin_all(m);
    for (uint64_t number = 0; number < KEYS; number++) key_check(m, number);
    if (dice_below(&m->dice, 2) == 0) {
        lab_stop(&m->lab);
        lab_start(&m->lab);
        adopt(m, false);
        return;
    }
    struct lab image;
    lab_crash(&m->lab, &image);
    lab_close(&m->lab);
    m->lab              = image;
    m->lab.options.path = m->lab.path;
    lab_start(&m->lab);
    adopt(m, true);
}

static void step(struct model *m) {
    uint64_t number = dice_below(&m->dice, KEYS);
    uint32_t what   = dice_below(&m->dice, 1000);
    if (what < 400) step_put(m, number);
    else if (what < 600) step_get(m, number);
    else if (what < 730) step_drop(m, number);
    else if (what < 800) step_sync(m, number);
    else if (what < 870) step_pin(m, dice_below(&m->dice, PINS));
    else if (what < 995) lab_turn(&m->lab);
    else step_restart(m);
}

static void the_store_is_its_model(uint64_t disk_bytes, bool threads) {
    model = (struct model){.dice     = {lab_seed("store_model_test")},
                           .lossless = disk_bytes >= 256 * LAB_MIB};
    lab_open(&model.lab);
    model.lab.options.arena_bytes = 2 * LAB_MIB;
    model.lab.options.disk_bytes  = disk_bytes;
    model.lab.options.io_threads  = threads;
    lab_start(&model.lab);
    for (int i = 0; i < STEPS; i++) step(&model);
    unpin_all(&model);
    assert_int_equal(kv_store_stats(model.lab.store)->corruptions, 0);
    assert_int_equal(kv_store_stats(model.lab.store)->io_errors, 0);
    lab_close(&model.lab);
}

static void on_a_large_disk_over_io_uring(void **state) {
    the_store_is_its_model(256 * LAB_MIB, false);
}
static void on_a_small_disk_over_io_uring(void **state) {
    the_store_is_its_model(6 * LAB_MIB, false);
}
static void on_a_small_disk_over_threads(void **state) {
    the_store_is_its_model(6 * LAB_MIB, true);
}

int main(void) {
    lab_filter();
    lab_use_memory();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(on_a_large_disk_over_io_uring),
        cmocka_unit_test(on_a_small_disk_over_io_uring),
        cmocka_unit_test(on_a_small_disk_over_threads),
    };
    return cmocka_run_group_tests_name("model", tests, NULL, NULL);
}
