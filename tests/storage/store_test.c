/* SPDX-License-Identifier: Apache-2.0 */
/* store_test.c - every promise and every status of storage/store.h, kept on a healthy disk.
 *
 * Each case runs three times where it makes sense: over io_uring (where the machine allows it, or
 * whatever the store falls back to), over the thread pool, and in memory alone. */
#include "tests/storage/store_lab.h"

#include <poll.h>
#include <pthread.h>
#include <sys/eventfd.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

/* ---- fixtures ----------------------------------------------------------------------------- */

enum medium { MEDIUM_RING, MEDIUM_THREADS, MEDIUM_NONE };
static enum medium medium;

static int medium_ring(void **state) {
    medium = MEDIUM_RING;
    return 0;
}
static int medium_threads(void **state) {
    medium = MEDIUM_THREADS;
    return 0;
}
static int medium_none(void **state) {
    medium = MEDIUM_NONE;
    return 0;
}

static int lab_setup(void **state) {
    struct lab *lab = malloc(sizeof *lab);
    lab_open(lab);
    lab->options.io_threads = medium == MEDIUM_THREADS;
    if (medium == MEDIUM_NONE) lab->options.path = NULL;
    *state = lab;
    return 0;
}

static int lab_teardown(void **state) {
    lab_close(*state);
    free(*state);
    return 0;
}

static bool has_disk(void) {
    return medium != MEDIUM_NONE;
}

/* Large enough that 63 fill the arena's 4 MiB: header page, 15 pages of payload. */
static const struct kv_block_extent large = {
    .tag = LAB_TAG, .part_count = 15, .part_bytes = 4096};

static void put_large(struct lab *lab, uint64_t number) {
    assert_int_equal(lab_put_as(lab, number, 0, KV_CLASS_BLOCK, &large, false), KV_OK);
}

static enum kv_status get_large(struct lab *lab, uint64_t number) {
    uint64_t version;
    return lab_read(lab, number, &large, &version);
}

static enum kv_status reserve(struct lab *lab, uint64_t number, enum kv_block_class class,
                              const struct kv_block_extent *extent, struct kv_slot *slot) {
    struct kv_digest key = lab_key(number);
    return kv_store_reserve(lab->store, &key, class, extent, slot);
}

static enum kv_status drop(struct lab *lab, uint64_t number) {
    struct kv_digest key = lab_key(number);
    return kv_store_drop(lab->store, &key);
}

/* ---- opening ------------------------------------------------------------------------------ */

static void expect_refused(struct lab *lab, enum kv_status expected) {
    char why[256]         = "";
    enum kv_status status = lab_try_start(lab, why);
    assert_int_equal(status, expected);
    assert_null(lab->store); /* untouched */
    assert_true(why[0] != 0 && memchr(why, 0, sizeof why) != NULL);
}

/* Options that contradict each other could only be found out later, by a crash.  One at a time is
 * made wrong; the same options without it must open. */
static void options_that_contradict_each_other_are_invalid(void **state) {
    struct lab *lab                     = *state;
    const struct kv_store_options right = lab->options;
    for (int wrong = 0; wrong < 9; wrong++) {
        lab->options = right;
        switch (wrong) {
        case 0: lab->options.arena_bytes = 0; break;
        case 1: lab->options.arena_bytes += 4096; break;
        case 2: lab->options.blocks_max = 0; break;
        case 3: lab->options.disk_bytes = 4 * LAB_MIB - 4096; break;
        case 4: lab->options.segment_bytes = LAB_MIB + 4096; break;
        case 5: lab->options.io_depth = 0; break;
        case 6: lab->options.io_depth = 257; break;
        case 7: lab->options.disk_bytes = 0; break;
        case 8: lab->options.segment_bytes = 64 * LAB_MIB; break; /* fewer than 4 */
        }
        print_message("options %d\n", wrong);
        expect_refused(lab, KV_INVALID);
    }
    lab->options = right;
    lab_start(lab);
}

/* Somebody's photos are not overwritten. */
static void a_directory_that_holds_something_else_is_invalid_and_untouched(void **state) {
    struct lab *lab = *state;
    lab_file_write(lab, "photo.jpg", (const uint8_t *)"photo", 5);
    expect_refused(lab, KV_INVALID);
    size_t bytes;
    uint8_t *photo = lab_file_read(lab, "photo.jpg", &bytes);
    assert_int_equal(bytes, 5);
    assert_memory_equal(photo, "photo", 5);
    free(photo);
}

static void a_superblock_of_another_program_is_invalid_and_untouched(void **state) {
    struct lab *lab = *state;
    uint8_t other[8192];
    memset(other, 'x', sizeof other);
    lab_file_write(lab, "superblock", other, sizeof other);
    expect_refused(lab, KV_INVALID);
    size_t bytes;
    uint8_t *found = lab_file_read(lab, "superblock", &bytes);
    assert_int_equal(bytes, sizeof other);
    assert_memory_equal(found, other, sizeof other);
    free(found);
}

static void another_segment_size_is_invalid_and_loses_nothing(void **state) {
    struct lab *lab = *state;
    lab_start(lab);
    lab_put(lab, 1);
    lab_stop(lab);
    lab->options.segment_bytes = 2 * LAB_MIB;
    expect_refused(lab, KV_INVALID);
    lab->options.segment_bytes = LAB_MIB;
    lab_start(lab);
    assert_int_equal(lab_get(lab, 1), KV_OK);
}

/* Two processes in one directory would overwrite each other's records. */
static void a_directory_that_is_in_use_is_busy(void **state) {
    struct lab *lab = *state;
    lab_start(lab);
    struct kv_store *second = NULL;
    char why[256]           = "";
    assert_int_equal(kv_store_open(&lab->options, &second, why, sizeof why), KV_BUSY);
    assert_null(second);
    assert_true(why[0] != 0);
    lab_put(lab, 1);
    assert_int_equal(lab_sync(lab, 1, KV_WRITTEN), KV_OK);
}

static void a_directory_that_cannot_be_is_an_io_error(void **state) {
    struct lab *lab = *state;
    char path[LAB_PATH_BYTES + 32];
    snprintf(path, sizeof path, "%s/not/there", lab->path);
    lab->options.path = path;
    expect_refused(lab, KV_IO_ERROR);

    lab_file_write(lab, "file", (const uint8_t *)"", 0);
    snprintf(path, sizeof path, "%s/file", lab->path);
    expect_refused(lab, KV_IO_ERROR);
}

/* The store's own fallback must be told truthfully. */
static void the_engine_in_use_is_named(void **state) {
    struct lab *lab = *state;
    lab_start(lab);
    const char *engine = kv_store_io_engine(lab->store);
    const char *reason = kv_store_io_reason(lab->store);
    print_message("engine %s, reason \"%s\"\n", engine, reason);
    if (medium == MEDIUM_NONE) {
        assert_string_equal(engine, "none");
    } else if (medium == MEDIUM_THREADS) {
        assert_string_equal(engine, "threads");
        assert_string_not_equal(reason, "");
    } else if (strcmp(engine, "io_uring") == 0) {
        assert_string_equal(reason, "");
    } else { /* this machine forbids it */
        assert_string_equal(engine, "threads");
        assert_string_not_equal(reason, "");
    }
}

/* ---- one block's life --------------------------------------------------------------------- */

/* FILLING is nobody's business but the one's who fills; abandon leaves no trace. */
static void a_block_is_invisible_until_commit(void **state) {
    struct lab *lab = *state;
    lab_start(lab);
    struct kv_block_extent extent = lab_extent(1);
    struct kv_slot slot, other;
    uint64_t used = kv_store_stats(lab->store)->arena_bytes_used;
    for (int round = 0; round < 3; round++) {
        assert_int_equal(reserve(lab, 1, KV_CLASS_BLOCK, &extent, &slot), KV_OK);
        assert_true(kv_store_stats(lab->store)->arena_bytes_used > used);
        assert_int_equal(reserve(lab, 1, KV_CLASS_BLOCK, &extent, &other), KV_EXISTS);
        assert_false(lab_has(lab, 1));
        assert_int_equal(lab_get(lab, 1), KV_NOT_FOUND);
        assert_int_equal(drop(lab, 1), KV_BUSY);
        lab_fill(slot.address, 1, 0, &extent);
        if (round < 2) kv_store_abandon(lab->store, &slot);
        if (round < 2) assert_int_equal(kv_store_stats(lab->store)->arena_bytes_used, used);
        if (round < 2) assert_int_equal(drop(lab, 1), KV_NOT_FOUND);
    }
    kv_store_commit(lab->store, &slot, false);
    assert_true(lab_has(lab, 1));
    assert_int_equal(lab_get(lab, 1), KV_OK);
    assert_int_equal(reserve(lab, 1, KV_CLASS_BLOCK, &extent, &other), KV_EXISTS);
}

static void find_gives_back_what_was_reserved(void **state) {
    struct lab *lab = *state;
    lab_start(lab);
    for (uint64_t number = 1; number < 40; number++) {
        struct kv_block_extent extent = lab_extent(number);
        extent.tag                    = number * 0x123456789abcdefull;
        enum kv_block_class class     = number % 2 ? KV_CLASS_BLOCK : KV_CLASS_KEEP;
        assert_int_equal(lab_put_as(lab, number, 0, class, &extent, false), KV_OK);
    }
    for (int again = 0; again < 1 + has_disk(); again++) {
        for (uint64_t number = 1; number < 40; number++) {
            struct kv_block_info info     = lab_find(lab, number);
            struct kv_block_extent extent = lab_extent(number);
            assert_int_equal(info.extent.tag, number * 0x123456789abcdefull);
            assert_int_equal(info.extent.part_count, extent.part_count);
            assert_int_equal(info.extent.part_bytes, extent.part_bytes);
            assert_int_equal(info.class, number % 2 ? KV_CLASS_BLOCK : KV_CLASS_KEEP);
        }
        if (has_disk()) lab_stop(lab);
        if (has_disk()) lab_start(lab);
    }
}

/* Sizes at every edge of a page and of the header, up to a segment. */
static void every_size_up_to_a_segment_comes_back(void **state) {
    static const struct kv_block_extent extents[] = {
        {LAB_TAG, 1, 1},       {LAB_TAG, 3, 1},       {LAB_TAG, 1, 4095},    {LAB_TAG, 1, 4096},
        {LAB_TAG, 1, 4097},    {LAB_TAG, 2, 2048},    {LAB_TAG, 7, 4097},    {LAB_TAG, 991, 16},
        {LAB_TAG, 992, 16},    {LAB_TAG, 993, 16},    {LAB_TAG, 2048, 16},   {LAB_TAG, 2048, 480},
        {LAB_TAG, 1, 1000000}, {LAB_TAG, 240, 4096},  {LAB_TAG, 3, 333333},
    };
    struct lab *lab = *state;
    lab_start(lab);
    for (uint64_t i = 0; i < sizeof extents / sizeof extents[0]; i++) {
        assert_int_equal(lab_put_as(lab, i, 0, KV_CLASS_BLOCK, &extents[i], false), KV_OK);
        uint64_t version;
        assert_int_equal(lab_read(lab, i, &extents[i], &version), KV_OK);
    }
    if (!has_disk()) return;
    lab_stop(lab);
    lab_start(lab);
    for (uint64_t i = 0; i < sizeof extents / sizeof extents[0]; i++) {
        uint64_t version;
        uint32_t last = extents[i].part_count - 1;
        assert_int_equal(lab_read_part(lab, i, &extents[i], (int32_t)last / 2, &version), KV_OK);
        assert_int_equal(lab_read_part(lab, i, &extents[i], (int32_t)last, &version), KV_OK);
        assert_int_equal(lab_read(lab, i, &extents[i], &version), KV_OK);
    }
}

/* The world asks for impossible sizes, also such whose product overflows. */
static void what_can_never_fit_is_invalid(void **state) {
    static const struct kv_block_extent extents[] = {
        {LAB_TAG, 0, 4096},
        {LAB_TAG, 1, 0},
        {LAB_TAG, 0, 0},
        {LAB_TAG, KV_PARTS_MAX + 1, 1},
        {LAB_TAG, UINT32_MAX, UINT32_MAX},
        {LAB_TAG, 2048, UINT32_MAX},
        {LAB_TAG, 1, UINT32_MAX},
        {LAB_TAG, 1024, 4 * LAB_MIB}, /* 2^32 bytes: zero in 32 bits */
        {LAB_TAG, 1, 4 * LAB_MIB},
    };
    struct lab *lab = *state;
    lab_start(lab);
    struct kv_slot slot;
    for (size_t i = 0; i < sizeof extents / sizeof extents[0]; i++) {
        assert_int_equal(reserve(lab, 1, KV_CLASS_BLOCK, &extents[i], &slot), KV_INVALID);
        assert_int_equal(reserve(lab, 1, KV_CLASS_KEEP, &extents[i], &slot), KV_INVALID);
    }
    struct kv_block_extent segment = {LAB_TAG, 1, LAB_MIB};
    enum kv_status expected        = has_disk() ? KV_INVALID : KV_OK;
    assert_int_equal(reserve(lab, 1, KV_CLASS_BLOCK, &segment, &slot), expected);
    if (expected == KV_OK) kv_store_abandon(lab->store, &slot);
    assert_int_equal(kv_store_stats(lab->store)->arena_bytes_used, 0);
}

/* ---- durability --------------------------------------------------------------------------- */

struct sync_note {
    int calls;
    enum kv_status status;
};

static void sync_note(struct kv_sync *sync, enum kv_status status) {
    struct sync_note *note = sync->owner;
    note->calls++;
    note->status = status;
}

static void durability_is_answered_truthfully(void **state) {
    struct lab *lab = *state;
    lab_start(lab);
    lab_put(lab, 1);
    assert_int_equal(lab_find(lab, 1).durability, KV_VOLATILE);
    assert_int_equal(lab_sync(lab, 2, KV_WRITTEN), KV_NOT_FOUND);
    assert_int_equal(lab_sync(lab, 1, KV_WRITTEN), KV_OK);
    assert_int_equal(lab_find(lab, 1).durability, KV_WRITTEN);
    lab_turns_for(lab, 50000); /* sync_ms is 0: only on demand */
    assert_int_equal(lab_find(lab, 1).durability, KV_WRITTEN);
    assert_int_equal(lab_sync(lab, 1, KV_SYNCED), KV_OK);
    assert_int_equal(lab_find(lab, 1).durability, KV_SYNCED);
    lab_put(lab, 3);
    assert_true(lab_find(lab, 3).durability < KV_SYNCED);
    assert_int_equal(lab_sync(lab, 3, KV_SYNCED), KV_OK);
    assert_int_equal(lab_find(lab, 3).durability, KV_SYNCED);
}

static void written_becomes_synced_by_itself_after_sync_ms(void **state) {
    struct lab *lab      = *state;
    lab->options.sync_ms = 20;
    lab_start(lab);
    lab_put(lab, 1);
    assert_int_equal(lab_sync(lab, 1, KV_WRITTEN), KV_OK);
    uint64_t end = lab_now_us() + 10 * 1000000; /* a slow machine is no reason to fail */
    while (lab_find(lab, 1).durability != KV_SYNCED && lab_now_us() < end) lab_turn(lab);
    assert_int_equal(lab_find(lab, 1).durability, KV_SYNCED);
}

/* A caller that is called back from within its own call is re-entered. */
static void callbacks_run_in_poll_and_nowhere_else(void **state) {
    struct lab *lab = *state;
    lab_start(lab);
    lab_put(lab, 1);
    struct sync_note notes[3] = {{0}};
    struct kv_sync syncs[3]   = {
        {.key = lab_key(1), .durability = KV_WRITTEN, .on_done = sync_note, .owner = &notes[0]},
        {.key = lab_key(2), .durability = KV_SYNCED, .on_done = sync_note, .owner = &notes[1]},
        {.key = lab_key(1), .durability = KV_SYNCED, .on_done = sync_note, .owner = &notes[2]},
    };
    static struct lab_pin here, absent;
    uint64_t one = 1, two = 2;
    lab_pin_prepare(&here, &one, 1, -1);
    lab_pin_prepare(&absent, &two, 1, -1);
    for (int i = 0; i < 3; i++) kv_store_sync(lab->store, &syncs[i]);
    kv_store_pin(lab->store, &here.pin);
    kv_store_pin(lab->store, &absent.pin);
    kv_store_wait(lab->store, -1, 20000);
    for (int i = 0; i < 3; i++) assert_int_equal(notes[i].calls, 0);
    assert_int_equal(here.calls + absent.calls, 0);

    uint32_t ran = kv_store_poll(lab->store); /* "in the next poll even when resident" */
    assert_int_equal(here.calls, 1);
    assert_int_equal(absent.calls, 1);
    assert_int_equal(here.status, KV_OK);
    assert_int_equal(absent.status, KV_NOT_FOUND);
    while (notes[0].calls + notes[1].calls + notes[2].calls < 3) {
        kv_store_wait(lab->store, -1, 1000);
        ran += kv_store_poll(lab->store);
    }
    assert_int_equal(ran, 5);
    assert_int_equal(notes[0].status, has_disk() ? KV_OK : KV_UNAVAILABLE);
    assert_int_equal(notes[1].status, has_disk() ? KV_NOT_FOUND : KV_UNAVAILABLE);
    assert_int_equal(notes[2].status, has_disk() ? KV_OK : KV_UNAVAILABLE);
    lab_unpin(lab, &here);
}

/* A callback that calls the store (the usual thing: the next step of a request) must find it in
 * order. */
static void chained_done(struct kv_sync *sync, enum kv_status status);

struct chain {
    struct lab *lab;
    uint64_t number;
    int calls;
};

static void chained_done(struct kv_sync *sync, enum kv_status status) {
    struct chain *chain = sync->owner;
    assert_int_equal(status, KV_OK);
    if (++chain->calls == 20) return;
    struct kv_block_extent extent = lab_extent(++chain->number);
    struct kv_slot slot;
    assert_int_equal(reserve(chain->lab, chain->number, KV_CLASS_BLOCK, &extent, &slot), KV_OK);
    lab_fill(slot.address, chain->number, 0, &extent);
    kv_store_commit(chain->lab->store, &slot, false);
    sync->key = lab_key(chain->number);
    kv_store_sync(chain->lab->store, sync);
}

static bool chain_is_done(struct lab *lab, void *context) {
    return ((struct chain *)context)->calls == 20;
}

static void a_callback_may_call_the_store(void **state) {
    struct lab *lab = *state;
    lab_start(lab);
    lab_put(lab, 1);
    struct chain chain  = {.lab = lab, .number = 1};
    struct kv_sync sync = {
        .key = lab_key(1), .durability = KV_SYNCED, .on_done = chained_done, .owner = &chain};
    kv_store_sync(lab->store, &sync);
    lab_until(lab, chain_is_done, &chain);
    for (uint64_t number = 1; number <= 20; number++)
        assert_int_equal(lab_get(lab, number), KV_OK);
}

static void without_a_disk_nothing_is_durable(void **state) {
    struct lab *lab = *state;
    lab_start(lab);
    lab_put(lab, 1);
    assert_int_equal(lab_sync(lab, 1, KV_WRITTEN), KV_UNAVAILABLE);
    assert_int_equal(lab_sync(lab, 1, KV_SYNCED), KV_UNAVAILABLE);
    assert_int_equal(lab_find(lab, 1).durability, KV_VOLATILE);
    assert_int_equal(lab_find(lab, 1).tier, KV_TIER_HOST);
    assert_int_equal(drop(lab, 1), KV_OK);
    assert_int_equal(lab_sync(lab, 1, KV_SYNCED), KV_UNAVAILABLE);
}

/* ---- memory ------------------------------------------------------------------------------- */

/* Nothing is lost by holding more than fits: what is cold comes back, byte for byte, and memory
 * never exceeds the arena. */
static void more_than_the_arena_holds_is_all_there(void **state) {
    enum { BLOCKS = 200 };
    struct lab *lab = *state;
    lab_start(lab);
    for (uint64_t number = 0; number < BLOCKS; number++) put_large(lab, number);
    lab_settle(lab);
    const struct kv_store_stats *stats = kv_store_stats(lab->store);
    assert_int_equal(stats->blocks, BLOCKS);
    assert_int_equal(stats->blocks_resident + stats->blocks_cold, BLOCKS);
    assert_true(stats->blocks_cold >= BLOCKS - 64);
    assert_true(stats->evictions >= BLOCKS - 64);
    assert_int_equal(stats->drops, 0);
    assert_int_equal(stats->spills, BLOCKS);
    assert_true(stats->bytes_written >= BLOCKS * 15 * 4096);
    struct dice dice = {1};
    for (int round = 0; round < 2 * BLOCKS; round++) {
        uint64_t number   = round < BLOCKS ? (uint64_t)round : dice_below(&dice, BLOCKS);
        bool cold         = lab_find(lab, number).tier == KV_TIER_NVME;
        uint64_t restores = stats->restores;
        assert_int_equal(get_large(lab, number), KV_OK);
        assert_int_equal(stats->restores, restores + cold);
        assert_int_equal(lab_find(lab, number).tier, KV_TIER_HOST);
        assert_true(stats->arena_bytes_used <= lab->options.arena_bytes);
    }
    assert_int_equal(stats->corruptions + stats->io_errors, 0);
    assert_true(stats->bytes_read > 0 && stats->restore_us_per_mib > 0);
}

static void without_a_disk_the_oldest_blocks_go(void **state) {
    enum { BLOCKS = 200 };
    struct lab *lab = *state;
    lab_start(lab);
    struct kv_digest kept = lab_key(0), absent = lab_key(BLOCKS);
    assert_int_equal(lab_put_as(lab, 1, 0, KV_CLASS_KEEP, &large, false), KV_OK);
    put_large(lab, 0);
    assert_true(kv_store_protect(lab->store, &kept, lab_now_us() + 600 * 1000000ull));
    assert_false(kv_store_protect(lab->store, &absent, lab_now_us() + 1000000));
    for (uint64_t number = 2; number < BLOCKS; number++) put_large(lab, number);
    const struct kv_store_stats *stats = kv_store_stats(lab->store);
    assert_int_equal(stats->blocks + stats->drops, BLOCKS);
    assert_true(stats->blocks >= 60 && stats->blocks <= 64);
    assert_int_equal(get_large(lab, 0), KV_OK); /* protected */
    assert_int_equal(get_large(lab, 1), KV_OK); /* KEEP */
    for (uint64_t number = BLOCKS - 60; number < BLOCKS; number++)
        assert_int_equal(get_large(lab, number), KV_OK);
    assert_int_equal(get_large(lab, 2), KV_NOT_FOUND);
}

/* What is pinned stays, where it is, whatever comes. */
static void pinned_blocks_are_never_moved(void **state) {
    struct lab *lab = *state;
    lab_start(lab);
    static struct lab_pin pin;
    uint64_t numbers[8];
    for (uint64_t i = 0; i < 8; i++) put_large(lab, numbers[i] = i);
    assert_int_equal(lab_pin(lab, &pin, numbers, 8, -1), KV_OK);
    for (uint64_t number = 100; number < 300; number++) put_large(lab, number);
    for (uint64_t i = 0; i < 8; i++) {
        uint64_t version;
        assert_true(lab_block_valid(pin.addresses[i], i, &large, &version));
        assert_int_equal(lab_find(lab, i).tier, KV_TIER_HOST);
        assert_int_equal(drop(lab, i), KV_BUSY);
    }
    lab_unpin(lab, &pin);
    for (uint64_t i = 0; i < 8; i++) assert_int_equal(drop(lab, i), KV_OK);
}

static void a_commit_may_keep_a_pin(void **state) {
    struct lab *lab = *state;
    lab_start(lab);
    assert_int_equal(lab_put_as(lab, 1, 0, KV_CLASS_BLOCK, &large, true), KV_OK);
    for (uint64_t number = 100; number < 300; number++) put_large(lab, number);
    assert_int_equal(lab_find(lab, 1).tier, KV_TIER_HOST);
    assert_int_equal(drop(lab, 1), KV_BUSY);
    struct kv_digest key = lab_key(1);
    kv_store_unpin_key(lab->store, &key);
    assert_int_equal(drop(lab, 1), KV_OK);
    assert_false(lab_has(lab, 1));
}

/* A limit in use is an answer, and the answer changes when the limit is free again. */
static void a_full_arena_is_busy_until_something_is_unpinned(void **state) {
    struct lab *lab = *state;
    lab_start(lab);
    uint64_t count = 0;
    struct kv_slot slot;
    while (reserve(lab, count, KV_CLASS_BLOCK, &large, &slot) == KV_OK) {
        lab_fill(slot.address, count++, 0, &large);
        kv_store_commit(lab->store, &slot, true);
    }
    assert_in_range(count, 60, 64);
    if (has_disk()) lab_settle(lab);
    for (int i = 0; i < 20; i++) {
        lab_turn(lab);
        assert_int_equal(reserve(lab, count, KV_CLASS_BLOCK, &large, &slot), KV_BUSY);
    }
    assert_null(kv_store_memory_alloc(lab->store, 64 * 1024));
    struct kv_digest key = lab_key(7);
    kv_store_unpin_key(lab->store, &key);
    put_large(lab, count);
    for (uint64_t number = 0; number < count; number++) {
        key = lab_key(number);
        if (number != 7) kv_store_unpin_key(lab->store, &key);
    }
}

static void more_keys_than_blocks_max_are_busy_or_replace_the_oldest(void **state) {
    struct lab *lab         = *state;
    lab->options.blocks_max = 10;
    lab_start(lab);
    struct kv_block_extent small = {LAB_TAG, 1, 100};
    struct kv_slot slots[10], more;
    for (uint64_t i = 0; i < 10; i++)
        assert_int_equal(reserve(lab, i, KV_CLASS_BLOCK, &small, &slots[i]), KV_OK);
    assert_int_equal(reserve(lab, 10, KV_CLASS_BLOCK, &small, &more), KV_BUSY);
    kv_store_abandon(lab->store, &slots[0]);
    assert_int_equal(reserve(lab, 10, KV_CLASS_BLOCK, &small, &slots[0]), KV_OK);
    lab_fill(slots[0].address, 10, 0, &small);
    for (uint64_t i = 1; i < 10; i++) lab_fill(slots[i].address, i, 0, &small);
    for (int i = 0; i < 10; i++) kv_store_commit(lab->store, &slots[i], false);
    assert_int_equal(kv_store_stats(lab->store)->blocks, 10);
    assert_int_equal(drop(lab, 5), KV_OK);
    assert_int_equal(lab_put_as(lab, 11, 0, KV_CLASS_BLOCK, &small, false), KV_OK);
}

/* More keys than blocks_max must not stop the service for good, no more than a full disk does. */
static void a_full_table_makes_room_by_itself(void **state) {
    struct lab *lab         = *state;
    lab->options.blocks_max = 50;
    lab_start(lab);
    struct kv_block_extent small = {LAB_TAG, 1, 100};
    for (uint64_t number = 0; number < 300; number++) {
        assert_int_equal(lab_put_as(lab, number, 0, KV_CLASS_BLOCK, &small, false), KV_OK);
        assert_true(kv_store_stats(lab->store)->blocks <= 50);
    }
    assert_true(kv_store_stats(lab->store)->drops > 0);
    assert_true(lab_has(lab, 299));
}

static void memory_for_others_counts_against_the_arena(void **state) {
    struct lab *lab = *state;
    lab_start(lab);
    for (uint64_t number = 0; number < 70; number++) put_large(lab, number);
    if (has_disk()) lab_settle(lab);
    const struct kv_store_stats *stats = kv_store_stats(lab->store);
    uint8_t *runs[4];
    for (int i = 0; i < 4; i++) { /* evicts */
        runs[i] = kv_store_memory_alloc(lab->store, 500000);
        assert_non_null(runs[i]);
        memset(runs[i], i, 500000);
    }
    assert_true(stats->arena_bytes_used >= 2000000);
    assert_true(stats->arena_bytes_used <= lab->options.arena_bytes);
    assert_null(kv_store_memory_alloc(lab->store, lab->options.arena_bytes + 1));
    assert_null(kv_store_memory_alloc(lab->store, SIZE_MAX));
    for (uint64_t number = 100; number < 170; number++) put_large(lab, number);
    for (int i = 0; i < 4; i++) {
        for (int at = 0; at < 500000; at += 499) assert_int_equal(runs[i][at], i);
        kv_store_memory_free(lab->store, runs[i]);
    }
}

/* ---- pins --------------------------------------------------------------------------------- */

static void a_pin_says_which_block_is_absent_or_different(void **state) {
    struct lab *lab = *state;
    lab_start(lab);
    static struct lab_pin pin;
    uint64_t numbers[] = {1, 2, 3, 4};
    lab_put(lab, 1);
    lab_put(lab, 2);
    struct kv_block_extent other = lab_extent(3);
    other.tag                    = LAB_TAG + 1;
    assert_int_equal(lab_put_as(lab, 3, 0, KV_CLASS_BLOCK, &other, false), KV_OK);

    assert_int_equal(lab_pin(lab, &pin, numbers, 4, -1), KV_MISMATCH);
    assert_int_equal(pin.pin.failed, 2);
    numbers[2] = 2;
    assert_int_equal(lab_pin(lab, &pin, numbers, 4, -1), KV_NOT_FOUND);
    assert_int_equal(pin.pin.failed, 3);
    lab_pin_prepare(&pin, numbers, 4, -1);
    assert_int_equal(kv_store_pin_now(lab->store, &pin.pin), KV_NOT_FOUND);
    assert_int_equal(pin.pin.failed, 3);
    for (uint64_t number = 1; number <= 3; number++) /* nothing stayed pinned */
        assert_int_equal(drop(lab, number), KV_OK);
}

static void a_part_that_does_not_exist_is_refused(void **state) {
    struct lab *lab = *state;
    lab_start(lab);
    static struct lab_pin pin;
    uint64_t number = 1;
    put_large(lab, number);
    assert_int_equal(lab_pin(lab, &pin, &number, 1, 15), KV_INVALID);
    assert_int_equal(lab_pin(lab, &pin, &number, 1, INT32_MAX), KV_INVALID);
    assert_int_equal(drop(lab, number), KV_OK);
}

static void pin_now_never_waits(void **state) {
    struct lab *lab = *state;
    lab_start(lab);
    put_large(lab, 1);
    static struct lab_pin pin;
    uint64_t number = 1, version;
    lab_pin_prepare(&pin, &number, 1, -1);
    assert_int_equal(kv_store_pin_now(lab->store, &pin.pin), KV_OK);
    assert_true(lab_block_valid(pin.addresses[0], 1, &large, &version));
    assert_int_equal(pin.pin.from_disk, 0);
    assert_int_equal(drop(lab, 1), KV_BUSY);
    lab_unpin(lab, &pin);
    if (has_disk()) {
        lab_make_cold(lab, 1, 1000);
        lab_pin_prepare(&pin, &number, 1, -1);
        assert_int_equal(kv_store_pin_now(lab->store, &pin.pin), KV_BUSY);
        assert_int_equal(lab_find(lab, 1).tier, KV_TIER_NVME);
    }
    lab_turns_for(lab, 5000);
    assert_int_equal(pin.calls, 0);
    assert_int_equal(drop(lab, 1), KV_OK);
}

static void a_pin_says_what_was_read_from_disk(void **state) {
    struct lab *lab = *state;
    lab_start(lab);
    static struct lab_pin pin;
    uint64_t numbers[] = {1, 2, 3};
    put_large(lab, 1);
    put_large(lab, 3);
    lab_make_cold(lab, 1, 1000);
    lab_make_cold(lab, 3, 2000);
    put_large(lab, 2);
    for (int32_t part = -1; part < 3; part += 2) {
        assert_int_equal(lab_find(lab, 1).tier, KV_TIER_NVME);
        assert_int_equal(lab_pin(lab, &pin, numbers, 3, part), KV_OK);
        assert_int_equal(pin.pin.from_disk, 2);
        assert_true(pin.pin.cold[0] && !pin.pin.cold[1] && pin.pin.cold[2]);
        lab_unpin(lab, &pin);
        assert_int_equal(lab_find(lab, 1).tier, part < 0 ? KV_TIER_HOST : KV_TIER_NVME);
        if (part < 0) lab_make_cold(lab, 1, 3000);
        if (part < 0 && lab_find(lab, 3).tier != KV_TIER_NVME) lab_make_cold(lab, 3, 4000);
    }
}

/* A context larger than the arena: one layer of 200 blocks is held at once while all 15 layers of
 * them are three times what the arena has. */
static void one_part_of_more_than_the_arena_holds(void **state) {
    enum { BLOCKS = 200 };
    static const struct kv_block_extent straddling = {LAB_TAG, 30, 2048 + 40};
    struct lab *lab = *state;
    lab_start(lab);
    static struct lab_pin pin;
    uint64_t numbers[BLOCKS];
    for (uint64_t i = 0; i < BLOCKS; i++) {
        numbers[i] = i;
        assert_int_equal(lab_put_as(lab, i, 0, KV_CLASS_BLOCK, &straddling, false), KV_OK);
    }
    for (int32_t part = 0; part < 30; part += 7) {
        assert_int_equal(lab_pin(lab, &pin, numbers, BLOCKS, part), KV_OK);
        for (uint64_t i = 0; i < BLOCKS; i++) {
            uint64_t version;
            assert_true(lab_part_valid(pin.addresses[i], i, (uint32_t)part, &straddling, &version));
        }
        assert_true(pin.pin.from_disk > 100);
        lab_unpin(lab, &pin);
    }
    assert_int_equal(lab_pin(lab, &pin, numbers, BLOCKS, -1), KV_BUSY); /* whole, they do not fit */
    for (uint64_t i = 0; i < BLOCKS; i++) assert_int_equal(drop(lab, i), KV_OK);
    assert_int_equal(kv_store_stats(lab->store)->arena_bytes_used, 0);
}

/* The same block twice in one pin, and two pins of the same cold block at once: one read serves
 * all, and each gives back what it took. */
static void pins_of_the_same_block_share_one_restore(void **state) {
    struct lab *lab = *state;
    lab_start(lab);
    put_large(lab, 1);
    lab_make_cold(lab, 1, 1000);
    static struct lab_pin a, b, part;
    uint64_t numbers[] = {1, 1};
    uint64_t restores  = kv_store_stats(lab->store)->restores;
    lab_pin_prepare(&a, numbers, 2, -1);
    lab_pin_prepare(&b, numbers, 1, -1);
    lab_pin_prepare(&part, numbers, 2, 3);
    kv_store_pin(lab->store, &part.pin);
    kv_store_pin(lab->store, &a.pin);
    kv_store_pin(lab->store, &b.pin);
    uint64_t end = lab_now_us() + 20 * 1000000;
    while (a.calls + b.calls + part.calls < 3 && lab_now_us() < end) lab_turn(lab);
    assert_int_equal(a.calls, 1);
    assert_int_equal(b.calls, 1);
    assert_int_equal(part.calls, 1);
    assert_int_equal(a.status | b.status | part.status, KV_OK);
    assert_int_equal(kv_store_stats(lab->store)->restores, restores + 1);
    assert_ptr_equal(a.addresses[0], b.addresses[0]);
    assert_ptr_equal(a.addresses[0], a.addresses[1]);
    uint64_t version;
    assert_true(lab_block_valid(a.addresses[0], 1, &large, &version));
    assert_true(lab_part_valid(part.addresses[0], 1, 3, &large, &version));
    assert_true(lab_part_valid(part.addresses[1], 1, 3, &large, &version));
    lab_unpin(lab, &a);
    assert_int_equal(drop(lab, 1), KV_BUSY);
    lab_unpin(lab, &b);
    lab_unpin(lab, &part);
    assert_int_equal(drop(lab, 1), KV_OK);
    lab_settle(lab);
    assert_int_equal(kv_store_stats(lab->store)->arena_bytes_used, 0);
}

/* All or nothing: a pin whose last block is absent or too much holds none of the others, even those
 * whose read had begun. */
static void a_pin_that_does_not_fit_is_busy_and_holds_nothing(void **state) {
    enum { BLOCKS = 100 };
    struct lab *lab = *state;
    lab_start(lab);
    static struct lab_pin pin, small;
    uint64_t numbers[BLOCKS];
    for (uint64_t i = 0; i < BLOCKS; i++) put_large(lab, numbers[i] = i);
    lab_settle(lab);
    assert_int_equal(lab_pin(lab, &pin, numbers, BLOCKS, -1), KV_BUSY);
    assert_int_equal(lab_pin(lab, &small, numbers, 40, -1), KV_OK);
    assert_int_equal(lab_pin(lab, &pin, numbers + 40, 40, -1), KV_BUSY); /* beside the other */
    lab_unpin(lab, &small);
    assert_int_equal(lab_pin(lab, &pin, numbers + 40, 40, -1), KV_OK);
    lab_unpin(lab, &pin);
    for (uint64_t i = 0; i < BLOCKS; i++) assert_int_equal(drop(lab, i), KV_OK);
    assert_int_equal(kv_store_stats(lab->store)->arena_bytes_used, 0);
}

/* ---- KEEP --------------------------------------------------------------------------------- */

/* A session's snapshot is replaced at commit and not a moment before; who reads the old one goes on
 * reading it. */
static void a_kept_record_is_replaced_at_commit(void **state) {
    struct lab *lab = *state;
    lab_start(lab);
    static struct lab_pin old;
    struct kv_slot slot, second;
    uint64_t number = 1, version;
    assert_int_equal(lab_put_as(lab, 1, 10, KV_CLASS_KEEP, &large, false), KV_OK);
    assert_int_equal(lab_pin(lab, &old, &number, 1, -1), KV_OK);

    assert_int_equal(reserve(lab, 1, KV_CLASS_KEEP, &large, &slot), KV_OK);
    assert_int_equal(reserve(lab, 1, KV_CLASS_KEEP, &large, &second), KV_EXISTS); /* only once */
    lab_fill(slot.address, 1, 11, &large);
    assert_int_equal(lab_read(lab, 1, &large, &version), KV_OK);
    assert_int_equal(version, 10);
    kv_store_commit(lab->store, &slot, false);
    assert_int_equal(lab_read(lab, 1, &large, &version), KV_OK);
    assert_int_equal(version, 11);
    assert_true(lab_block_valid(old.addresses[0], 1, &large, &version));
    assert_int_equal(version, 10);
    lab_unpin(lab, &old);
    assert_int_equal(kv_store_stats(lab->store)->blocks, 1);

    assert_int_equal(reserve(lab, 1, KV_CLASS_KEEP, &large, &slot), KV_OK);
    kv_store_abandon(lab->store, &slot);
    assert_int_equal(lab_read(lab, 1, &large, &version), KV_OK);
    assert_int_equal(version, 11);
    if (!has_disk()) return;
    assert_int_equal(lab_sync(lab, 1, KV_WRITTEN), KV_OK);
    struct lab image;
    lab_crash(lab, &image);
    lab_start(&image);
    assert_int_equal(lab_read(&image, 1, &large, &version), KV_OK);
    assert_int_equal(version, 11);
    lab_close(&image);
}

static void kept_records_change_their_size_and_place(void **state) {
    struct lab *lab = *state;
    lab_start(lab);
    for (uint64_t round = 0; round < 300; round++) { /* many times around the disk */
        struct kv_block_extent extent = {LAB_TAG, 1 + (uint32_t)(round % 9),
                                         4096 + (uint32_t)(round * 331 % 16000)};
        assert_int_equal(lab_put_as(lab, round % 3, round, KV_CLASS_KEEP, &extent, false), KV_OK);
        uint64_t version;
        if (round % 7 == 0)
            assert_int_equal(lab_sync(lab, round % 3, KV_SYNCED), has_disk() ? KV_OK : KV_UNAVAILABLE);
        assert_int_equal(lab_read(lab, round % 3, &extent, &version), KV_OK);
        assert_int_equal(version, round);
    }
    assert_int_equal(kv_store_stats(lab->store)->blocks, 3);
}

struct visits {
    uint64_t seen[64];
    uint32_t count;
};

static void visit(void *context, const struct kv_digest *key, const struct kv_block_extent *extent) {
    struct visits *visits = context;
    uint64_t number       = lab_key_number(key);
    assert_in_range(number, 0, 63);
    struct kv_digest expected = lab_key(number);
    assert_memory_equal(key, &expected, sizeof expected);
    assert_int_equal(extent->part_count, lab_extent(number).part_count);
    assert_int_equal(extent->part_bytes, lab_extent(number).part_bytes);
    visits->seen[number]++;
    visits->count++;
}

static void each_visits_every_block_of_a_class_once(void **state) {
    struct lab *lab = *state;
    lab_start(lab);
    for (uint64_t number = 0; number < 60; number++) {
        struct kv_block_extent extent = lab_extent(number);
        enum kv_block_class class     = number % 3 ? KV_CLASS_BLOCK : KV_CLASS_KEEP;
        assert_int_equal(lab_put_as(lab, number, 0, class, &extent, false), KV_OK);
    }
    struct kv_block_extent extent = lab_extent(60);
    struct kv_slot filling;
    assert_int_equal(reserve(lab, 60, KV_CLASS_KEEP, &extent, &filling), KV_OK);
    assert_int_equal(drop(lab, 3), KV_OK);
    for (int again = 0; again < 1 + has_disk(); again++) {
        struct visits kept = {0}, blocks = {0};
        kv_store_each(lab->store, KV_CLASS_KEEP, visit, &kept);
        kv_store_each(lab->store, KV_CLASS_BLOCK, visit, &blocks);
        assert_int_equal(kept.count, 19);
        assert_int_equal(blocks.count, 40);
        for (uint64_t number = 0; number < 60; number++) {
            assert_int_equal(kept.seen[number], number % 3 == 0 && number != 3);
            assert_int_equal(blocks.seen[number], number % 3 != 0);
        }
        if (again == 0) kv_store_abandon(lab->store, &filling);
        if (has_disk()) lab_stop(lab);
        if (has_disk()) lab_start(lab);
    }
}

/* ---- drop --------------------------------------------------------------------------------- */

/* Forgetting is durable too: after the tombstone is acknowledged no crash brings the block back. */
static void a_dropped_block_stays_away(void **state) {
    struct lab *lab = *state;
    lab_start(lab);
    for (uint64_t number = 0; number < 20; number++) lab_put(lab, number);
    lab_settle(lab);
    lab_make_cold(lab, 4, 1000);
    assert_int_equal(drop(lab, 99), KV_NOT_FOUND);
    for (uint64_t number = 0; number < 20; number += 2) {
        assert_int_equal(drop(lab, number), KV_OK);
        assert_false(lab_has(lab, number));
        assert_int_equal(lab_get(lab, number), KV_NOT_FOUND);
        assert_int_equal(drop(lab, number), KV_NOT_FOUND);
        enum kv_durability durability = number % 4 == 0 ? KV_WRITTEN : KV_SYNCED;
        assert_int_equal(lab_sync(lab, number, durability), KV_OK);
    }
    struct lab image;
    lab_crash(lab, &image);
    lab_start(&image);
    lab_stop(lab);
    lab_start(lab);
    for (uint64_t number = 0; number < 20; number++) {
        assert_int_equal(lab_get(lab, number), number % 2 ? KV_OK : KV_NOT_FOUND);
        assert_int_equal(lab_get(&image, number), number % 2 ? KV_OK : KV_NOT_FOUND);
    }
    lab_close(&image);
}

/* Dropped while its write is queued or in flight, and put again at once: the newest state counts,
 * after a crash too. */
static void drop_and_put_again_race_with_the_write(void **state) {
    struct lab *lab = *state;
    lab_start(lab);
    struct dice dice = {7};
    for (uint64_t round = 1; round < 200; round++) {
        uint64_t number = round % 5;
        if (lab_has(lab, number)) assert_int_equal(drop(lab, number), KV_OK);
        for (uint32_t turns = dice_below(&dice, 3); turns > 0; turns--)
            kv_store_poll(lab->store);
        struct kv_block_extent extent = {LAB_TAG, 3, 5000};
        assert_int_equal(lab_put_as(lab, number, round, KV_CLASS_BLOCK, &extent, false), KV_OK);
        if (round % 20 != 0) continue;
        for (uint64_t i = 0; i < 5; i++) assert_int_equal(lab_sync(lab, i, KV_WRITTEN), KV_OK);
        struct lab image;
        lab_crash(lab, &image);
        lab_start(&image);
        for (uint64_t i = 0; i < 5; i++) {
            uint64_t version, now;
            assert_int_equal(lab_read(&image, i, &extent, &version), KV_OK);
            assert_int_equal(lab_read(lab, i, &extent, &now), KV_OK);
            assert_int_equal(version, now);
        }
        lab_close(&image);
    }
}

/* ---- the full disk ------------------------------------------------------------------------ */

/* When the disk is full the oldest unpinned blocks go, never the service: KEEP, pinned and
 * protected ones survive many times the disk's capacity. */
static void a_full_disk_loses_the_oldest_and_nothing_else(void **state) {
    enum { BLOCKS = 600 }; /* of 64 KiB: 37 MiB through 8 */
    struct lab *lab         = *state;
    lab->options.disk_bytes = 8 * LAB_MIB;
    lab_start(lab);
    static struct lab_pin pin;
    uint64_t pinned[] = {1, 2, 3};
    for (uint64_t number = 1; number < 4; number++) put_large(lab, number);
    for (uint64_t number = 4; number < 8; number++)
        assert_int_equal(lab_put_as(lab, number, 0, KV_CLASS_KEEP, &large, false), KV_OK);
    for (uint64_t number = 8; number < 12; number++) {
        struct kv_digest key = lab_key(number);
        put_large(lab, number);
        assert_true(kv_store_protect(lab->store, &key, lab_now_us() + 600 * 1000000ull));
        assert_true(kv_store_protect(lab->store, &key, lab_now_us())); /* never shortens */
    }
    assert_int_equal(lab_pin(lab, &pin, pinned, 3, -1), KV_OK);
    for (uint64_t number = 100; number < 100 + BLOCKS; number++) {
        put_large(lab, number);
        assert_true(kv_store_stats(lab->store)->disk_bytes_used <= 8 * LAB_MIB);
    }
    lab_settle(lab);
    const struct kv_store_stats *stats = kv_store_stats(lab->store);
    print_message("%llu of %d blocks are left\n", (unsigned long long)stats->blocks, BLOCKS + 11);
    assert_int_equal(stats->blocks + stats->drops, BLOCKS + 11);
    assert_true(stats->blocks >= 50); /* of 120 that the cap has room for */
    lab_unpin(lab, &pin);
    for (uint64_t number = 1; number < 12; number++)
        assert_int_equal(get_large(lab, number), KV_OK);
    bool gone = true; /* oldest first: what is there is one run up to the newest */
    for (uint64_t number = 100; number < 100 + BLOCKS; number++) {
        if (lab_has(lab, number)) gone = false;
        if (!gone) assert_int_equal(get_large(lab, number), KV_OK);
    }
    assert_true(lab_has(lab, 100 + BLOCKS - 1));
    lab_stop(lab);
    lab_start(lab);
    for (uint64_t number = 4; number < 8; number++)
        assert_int_equal(get_large(lab, number), KV_OK);
}

static void at_most_half_of_the_space_can_be_protected(void **state) {
    struct lab *lab         = *state;
    lab->options.disk_bytes = 8 * LAB_MIB;
    lab_start(lab);
    uint64_t space     = has_disk() ? lab->options.disk_bytes : lab->options.arena_bytes;
    uint64_t protected = 0, number;
    for (number = 0; number < 200; number++) {
        put_large(lab, number);
        struct kv_digest key = lab_key(number);
        if (!kv_store_protect(lab->store, &key, lab_now_us() + 600 * 1000000ull)) break;
        protected += 16 * 4096;
    }
    assert_true(number < 200);
    assert_true(protected <= space / 2);
    assert_true(protected >= space / 4); /* or it would be of little use */
    for (uint64_t more = 1000; more < 1300; more++) put_large(lab, more); /* the service goes on */
    for (uint64_t i = 0; i < number; i++) assert_int_equal(get_large(lab, i), KV_OK);
}

static void a_protection_ends(void **state) {
    struct lab *lab         = *state;
    lab->options.disk_bytes = 8 * LAB_MIB;
    lab_start(lab);
    for (uint64_t number = 0; number < 20; number++) {
        struct kv_digest key = lab_key(number);
        put_large(lab, number);
        assert_true(kv_store_protect(lab->store, &key, lab_now_us() + 1000));
    }
    lab_turns_for(lab, 2000);
    for (uint64_t number = 100; number < 500; number++) put_large(lab, number);
    for (uint64_t number = 0; number < 20; number++) assert_false(lab_has(lab, number));
}

/* ---- starting again ----------------------------------------------------------------------- */

static void everything_resident_is_on_disk_after_close(void **state) {
    struct lab *lab = *state;
    lab_start(lab);
    for (uint64_t number = 0; number < 100; number++) lab_put(lab, number);
    lab_stop(lab); /* without a single poll */
    lab_start(lab);
    const struct kv_store_stats *stats = kv_store_stats(lab->store);
    assert_true(stats->recovery_clean);
    assert_int_equal(stats->recovered_blocks, 100);
    assert_int_equal(stats->blocks, 100);
    assert_int_equal(stats->blocks_cold, 100);
    assert_int_equal(stats->blocks_on_disk, 100);
    for (uint64_t number = 0; number < 100; number++) {
        assert_int_equal(lab_find(lab, number).tier, KV_TIER_NVME);
        assert_true(lab_find(lab, number).durability >= KV_WRITTEN);
        assert_int_equal(lab_get(lab, number), KV_OK);
    }
}

/* A clean start reads footers only; a crash start scans; both find the same. */
static void a_clean_start_reads_less_than_one_after_a_crash(void **state) {
    struct lab *lab = *state;
    lab_start(lab);
    for (uint64_t number = 0; number < 130; number++) put_large(lab, number);
    lab_settle(lab);
    struct lab image;
    lab_crash(lab, &image);
    lab_stop(lab);
    lab_start(lab);
    lab_start(&image);
    const struct kv_store_stats *clean = kv_store_stats(lab->store);
    const struct kv_store_stats *crash = kv_store_stats(image.store);
    assert_true(clean->recovery_clean);
    assert_false(crash->recovery_clean);
    assert_int_equal(clean->recovered_blocks, 130);
    assert_int_equal(crash->recovered_blocks, 130);
    print_message("recovery reads %llu bytes clean, %llu after a crash\n",
                  (unsigned long long)clean->recovery_bytes,
                  (unsigned long long)crash->recovery_bytes);
    assert_true(clean->recovery_bytes * 4 < crash->recovery_bytes);
    for (uint64_t number = 0; number < 130; number++) {
        assert_int_equal(get_large(lab, number), KV_OK);
        assert_int_equal(get_large(&image, number), KV_OK);
    }
    lab_close(&image);
}

static void many_starts_change_nothing(void **state) {
    struct lab *lab         = *state;
    lab->options.disk_bytes = 8 * LAB_MIB;
    lab_start(lab);
    for (uint64_t number = 0; number < 40; number++) lab_put(lab, number);
    lab_settle(lab);
    for (int round = 0; round < 30; round++) { /* more than the disk has segments */
        struct lab image;
        lab_crash(lab, &image);
        lab_stop(lab);
        lab_close(lab);
        *lab              = image;
        lab->options.path = lab->path;
        lab_start(lab);
        if (round % 3 == 0) lab_stop(lab);
        if (round % 3 == 0) lab_start(lab);
        assert_int_equal(kv_store_stats(lab->store)->blocks, 40);
        for (uint64_t number = 0; number < 40; number++)
            assert_int_equal(lab_get(lab, number), KV_OK);
    }
}

static void a_smaller_cap_is_honoured(void **state) {
    struct lab *lab          = *state;
    lab->options.disk_bytes  = 16 * LAB_MIB;
    lab_start(lab);
    for (uint64_t number = 0; number < 200; number++) put_large(lab, number);
    lab_stop(lab);
    lab->options.disk_bytes = 6 * LAB_MIB;
    lab_start(lab);
    for (uint64_t number = 200; number < 300; number++) put_large(lab, number);
    lab_settle(lab);
    uint64_t end = lab_now_us() + 20 * 1000000ull;
    while (lab_disk_bytes(lab) > 6 * LAB_MIB && lab_now_us() < end) lab_turn(lab);
    assert_true(lab_disk_bytes(lab) <= 6 * LAB_MIB);
    assert_int_equal(get_large(lab, 299), KV_OK);
}

/* A table that shrank knows fewer blocks, and says nothing wrong about the others. */
static void fewer_keys_than_on_disk_still_start(void **state) {
    struct lab *lab = *state;
    lab_start(lab);
    for (uint64_t number = 0; number < 100; number++) lab_put(lab, number);
    lab_stop(lab);
    lab->options.blocks_max = 30;
    lab_start(lab);
    const struct kv_store_stats *stats = kv_store_stats(lab->store);
    assert_true(stats->blocks <= 30);
    uint32_t found = 0;
    for (uint64_t number = 0; number < 100; number++) found += lab_get(lab, number) == KV_OK;
    assert_int_equal(found, stats->blocks);
    assert_true(found > 0);
    lab_put(lab, 1000);
}

/* ---- sleeping and threads ----------------------------------------------------------------- */

static void wait_ends_by_time_or_by_its_wake_fd(void **state) {
    struct lab *lab = *state;
    lab_start(lab);
    int wake       = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    uint64_t began = lab_now_us();
    kv_store_wait(lab->store, wake, 20000);
    assert_true(lab_now_us() - began >= 15000);

    uint64_t one = 1;
    assert_int_equal(write(wake, &one, sizeof one), sizeof one);
    began = lab_now_us();
    kv_store_wait(lab->store, wake, 30 * 1000000);
    assert_true(lab_now_us() - began < 20 * 1000000);
    struct pollfd left = {.fd = wake, .events = POLLIN};
    assert_int_equal(poll(&left, 1, 0), 0); /* it was read and cleared */
    began = lab_now_us();
    kv_store_wait(lab->store, wake, 0);
    assert_true(lab_now_us() - began < 10 * 1000000);
    close(wake);
}

static void *wake_later(void *context) {
    uint64_t one = 1;
    usleep(20000);
    ssize_t wrote = write(*(int *)context, &one, sizeof one);
    return wrote == sizeof one ? NULL : context;
}

static void wait_is_woken_from_another_thread(void **state) {
    struct lab *lab = *state;
    lab_start(lab);
    int wake = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    for (int round = 0; round < 5; round++) {
        pthread_t thread;
        assert_int_equal(pthread_create(&thread, NULL, wake_later, &wake), 0);
        uint64_t began = lab_now_us();
        kv_store_wait(lab->store, wake, 30 * 1000000);
        assert_true(lab_now_us() - began < 20 * 1000000);
        void *failed;
        pthread_join(thread, &failed);
        assert_null(failed);
        kv_store_poll(lab->store);
    }
    close(wake);
}

/* A mistake in the program stops it, before it can spoil anything.  Each runs in a child. */
static void *poll_elsewhere(void *context) {
    kv_store_poll(context);
    return NULL;
}

static void mistake_thread(struct lab *lab) {
    pthread_t thread;
    pthread_create(&thread, NULL, poll_elsewhere, lab->store);
    pthread_join(thread, NULL);
}

static void mistake_close_pinned(struct lab *lab) {
    lab_put_as(lab, 1, 0, KV_CLASS_BLOCK, &large, true);
    kv_store_close(lab->store);
}

static void mistake_unpin_twice(struct lab *lab) {
    struct kv_digest key = lab_key(1);
    lab_put_as(lab, 1, 0, KV_CLASS_BLOCK, &large, true);
    kv_store_unpin_key(lab->store, &key);
    kv_store_unpin_key(lab->store, &key);
}

static void mistake_commit_twice(struct lab *lab) {
    struct kv_slot slot;
    if (reserve(lab, 1, KV_CLASS_BLOCK, &large, &slot) != KV_OK) return;
    kv_store_commit(lab->store, &slot, false);
    kv_store_commit(lab->store, &slot, false);
}

static void our_own_mistakes_stop_the_program(void **state) {
    static void (*const mistakes[])(struct lab *) = {
        mistake_thread, mistake_close_pinned, mistake_unpin_twice, mistake_commit_twice};
    struct lab *lab = *state;
    for (size_t i = 0; i < sizeof mistakes / sizeof mistakes[0]; i++) {
        fflush(NULL);
        pid_t child = fork();
        if (child == 0) {
            signal(SIGABRT, SIG_DFL);
            if (freopen("/dev/null", "w", stderr) == NULL) _exit(1);
            lab_start(lab);
            mistakes[i](lab);
            _exit(0);
        }
        int status;
        assert_int_equal(waitpid(child, &status, 0), child);
        print_message("mistake %zu: status %x\n", i, (unsigned)status);
        assert_true(WIFSIGNALED(status));
        assert_int_equal(WTERMSIG(status), SIGABRT);
    }
}

/* ------------------------------------------------------------------------------------------- */

#define CASE(name) cmocka_unit_test_setup_teardown(name, lab_setup, lab_teardown)

/* With any medium. */
#define CASES_EVERYWHERE                                          \
    CASE(the_engine_in_use_is_named),                             \
    CASE(a_block_is_invisible_until_commit),                      \
    CASE(find_gives_back_what_was_reserved),                      \
    CASE(every_size_up_to_a_segment_comes_back),                  \
    CASE(what_can_never_fit_is_invalid),                          \
    CASE(callbacks_run_in_poll_and_nowhere_else),                 \
    CASE(pinned_blocks_are_never_moved),                          \
    CASE(a_commit_may_keep_a_pin),                                \
    CASE(a_full_arena_is_busy_until_something_is_unpinned),       \
    CASE(a_full_table_makes_room_by_itself),                      \
    CASE(memory_for_others_counts_against_the_arena),             \
    CASE(a_pin_says_which_block_is_absent_or_different),          \
    CASE(a_part_that_does_not_exist_is_refused),                  \
    CASE(pin_now_never_waits),                                    \
    CASE(a_kept_record_is_replaced_at_commit),                    \
    CASE(kept_records_change_their_size_and_place),               \
    CASE(each_visits_every_block_of_a_class_once),                \
    CASE(at_most_half_of_the_space_can_be_protected),             \
    CASE(wait_ends_by_time_or_by_its_wake_fd),                    \
    CASE(wait_is_woken_from_another_thread),                      \
    CASE(our_own_mistakes_stop_the_program)

/* With a disk. */
#define CASES_ON_DISK                                             \
    CASE(options_that_contradict_each_other_are_invalid),         \
    CASE(a_directory_that_holds_something_else_is_invalid_and_untouched), \
    CASE(a_superblock_of_another_program_is_invalid_and_untouched), \
    CASE(another_segment_size_is_invalid_and_loses_nothing),      \
    CASE(a_directory_that_is_in_use_is_busy),                     \
    CASE(a_directory_that_cannot_be_is_an_io_error),              \
    CASE(durability_is_answered_truthfully),                      \
    CASE(written_becomes_synced_by_itself_after_sync_ms),         \
    CASE(a_callback_may_call_the_store),                          \
    CASE(more_than_the_arena_holds_is_all_there),                 \
    CASE(more_keys_than_blocks_max_are_busy_or_replace_the_oldest), \
    CASE(a_pin_says_what_was_read_from_disk),                     \
    CASE(one_part_of_more_than_the_arena_holds),                  \
    CASE(pins_of_the_same_block_share_one_restore),               \
    CASE(a_pin_that_does_not_fit_is_busy_and_holds_nothing),      \
    CASE(a_dropped_block_stays_away),                             \
    CASE(drop_and_put_again_race_with_the_write),                 \
    CASE(a_full_disk_loses_the_oldest_and_nothing_else),          \
    CASE(a_protection_ends),                                      \
    CASE(everything_resident_is_on_disk_after_close),             \
    CASE(a_clean_start_reads_less_than_one_after_a_crash),        \
    CASE(many_starts_change_nothing),                             \
    CASE(a_smaller_cap_is_honoured),                              \
    CASE(fewer_keys_than_on_disk_still_start)

int main(void) {
    lab_filter();
    const struct CMUnitTest on_disk[] = {CASES_EVERYWHERE, CASES_ON_DISK};
    const struct CMUnitTest in_memory[] = {CASES_EVERYWHERE,
                                           CASE(without_a_disk_nothing_is_durable),
                                           CASE(without_a_disk_the_oldest_blocks_go)};
    int failed = cmocka_run_group_tests_name("io_uring", on_disk, medium_ring, NULL);
    failed += cmocka_run_group_tests_name("threads", on_disk, medium_threads, NULL);
    failed += cmocka_run_group_tests_name("memory", in_memory, medium_none, NULL);
    return failed;
}
