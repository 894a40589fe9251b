/* SPDX-License-Identifier: Apache-2.0 */
/* store_crash_test.c - kill -9 at random points under load.
 *
 * A child opens the directory and puts blocks, replaces kept records and drops, as fast as it can.
 * What the store reports as WRITTEN the child passes on through a pipe, and nothing before.  The
 * parent kills it after a random time (in recovery, in the middle of a write, while the disk is being
 * reclaimed, while it closes), opens the same directory, and holds the store to every word:
 *
 *   acknowledged    it is there and right: a block at its version, a kept record at its version or a
 *                   newer one that was on its way, a dropped block nowhere
 *   anything else   it is there and right, or it is not there
 *
 * The directory lives on from cycle to cycle, and its disk is small, so that most cycles work on a
 * full one.  A block may go when the disk is full, oldest first, so only the newest quarter of a
 * disk's worth of them is insisted on.  Kept records never go. */
#include "tests/storage/store_lab.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

enum {
    CYCLES       = 100 / LAB_ROUNDS_DIVISOR,
    KILL_MOST_US = 60 * 1000,
    KEPT         = 8,
    IN_FLIGHT    = 32,
    DISK_BYTES   = 12 * LAB_MIB,
    RECENT       = 128, /* keys: 2 MiB of blocks on average, that cannot have been reclaimed yet */
    DROPS_EVERY  = 7,
    DROPPABLE    = 4, /* only keys that are multiples of it are ever dropped */
};

static const uint64_t kept_first = 1ull << 40; /* key numbers of kept records */

/* What the child says: so and so has happened, and is WRITTEN. */
struct word {
    uint64_t number, version;
    uint32_t dropped;
    uint32_t zero;
};

/* ---- The child ---------------------------------------------------------------------------- */

struct claim {
    struct kv_sync sync;
    struct word word;
    bool busy;
};

static struct claim claims[IN_FLIGHT];
static int tell_fd;

static void claim_done(struct kv_sync *sync, enum kv_status status) {
    struct claim *claim = sync->owner;
    claim->busy         = false;
    if (status != KV_OK) return; /* reclaimed or replaced meanwhile */
    ssize_t wrote = write(tell_fd, &claim->word, sizeof claim->word);
    if (wrote != sizeof claim->word) _exit(3);
}

static void claim_start(struct lab *lab, const struct word *word) {
    struct claim *claim = claims;
    while (claim->busy) {
        if (++claim < claims + IN_FLIGHT) continue;
        lab_turn(lab);
        claim = claims;
    }
    claim->busy = true;
    claim->word = *word;
    claim->sync = (struct kv_sync){.key        = lab_key(word->number),
                                   .durability = KV_WRITTEN,
                                   .on_done    = claim_done,
                                   .owner      = claim};
    kv_store_sync(lab->store, &claim->sync);
}

static struct kv_block_extent extent_of(uint64_t number, uint64_t version) {
    return lab_extent(number < kept_first ? number : number + version * 31);
}

static void put(struct lab *lab, uint64_t number, uint64_t version, enum kv_block_class class) {
    struct kv_block_extent extent = extent_of(number, version);
    if (lab_put_as(lab, number, version, class, &extent, false) != KV_OK) _exit(4);
    claim_start(lab, &(struct word){.number = number, .version = version});
}

static void child_drop(struct lab *lab, uint64_t number) {
    struct kv_digest key = lab_key(number);
    if (kv_store_drop(lab->store, &key) == KV_OK)
        claim_start(lab, &(struct word){.number = number, .dropped = 1});
}

/* Never returns.  `first` is a key number that was never used, `version` above every kept one. */
static void child_run(struct lab *lab, uint64_t first, uint64_t version, bool closes) {
    lab_start(lab);
    struct dice dice = {first};
    for (uint64_t number = first;; number++) {
        put(lab, number, number, KV_CLASS_BLOCK);
        if (number % 5 == 0)
            put(lab, kept_first + dice_below(&dice, KEPT), version++, KV_CLASS_KEEP);
        if (number % DROPS_EVERY == 0 && number > first + 20)
            child_drop(lab, (number - 1 - dice_below(&dice, 15)) / DROPPABLE * DROPPABLE);
        kv_store_poll(lab->store);
        if (closes && number == first + 50) {
            kv_store_close(lab->store); /* the kill comes during this, or just after */
            pause();
        }
    }
}

/* ---- The parent --------------------------------------------------------------------------- */

struct ledger {
    struct word blocks[1 << 16]; /* acknowledged in this cycle, in order */
    uint32_t count;
    uint64_t kept[KEPT];  /* acknowledged versions, for ever */
    bool dropped[1 << 16]; /* by number - first */
    uint64_t first;
};
static struct ledger ledger;

static void ledger_note(const struct word *word) {
    if (word->number >= kept_first) {
        uint64_t *kept = &ledger.kept[word->number - kept_first];
        if (word->version > *kept) *kept = word->version;
        return;
    }
    assert_in_range(word->number, ledger.first, ledger.first + (1 << 16) - 1);
    if (word->dropped) {
        ledger.dropped[word->number - ledger.first] = true;
    } else {
        assert_true(ledger.count < 1 << 16);
        ledger.blocks[ledger.count++] = *word;
    }
}

static void listen_until(int fd, uint64_t end_us) {
    struct word word;
    while (lab_now_us() < end_us) {
        struct pollfd ready = {.fd = fd, .events = POLLIN};
        if (poll(&ready, 1, 1) <= 0) continue;
        if (read(fd, &word, sizeof word) != sizeof word) return;
        ledger_note(&word);
    }
}

static void listen_to_the_end(int fd) {
    struct word word;
    ssize_t got;
    while ((got = read(fd, &word, sizeof word)) == sizeof word) ledger_note(&word);
    assert_int_equal(got, 0); /* a word is written whole or not at all */
}

static void cycle_kill(struct lab *lab, struct dice *dice, uint64_t version, bool closes) {
    int ends[2];
    assert_int_equal(pipe(ends), 0);
    fflush(NULL);
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        close(ends[0]);
        tell_fd = ends[1];
        child_run(lab, ledger.first, version, closes);
    }
    close(ends[1]);
    listen_until(ends[0], lab_now_us() + dice_below(dice, KILL_MOST_US * LAB_ROUNDS_DIVISOR));
    assert_int_equal(kill(child, SIGKILL), 0);
    int status;
    assert_int_equal(waitpid(child, &status, 0), child);
    listen_to_the_end(ends[0]);
    close(ends[0]);
    if (!WIFSIGNALED(status) || WTERMSIG(status) != SIGKILL)
        fail_msg("the child ended by itself: status %x", (unsigned)status);
}

struct roll {
    uint64_t numbers[4096];
    uint32_t count;
};

static void roll_note(void *context, const struct kv_digest *key,
                      const struct kv_block_extent *extent) {
    struct roll *roll = context;
    assert_true(roll->count < 4096);
    roll->numbers[roll->count++] = lab_key_number(key);
}

/* Whatever is there is right.  The newest key number of all is stored. */
static uint32_t judge_all(struct lab *lab, uint64_t *newest) {
    static struct roll roll;
    roll.count = 0;
    *newest    = 0;
    kv_store_each(lab->store, KV_CLASS_BLOCK, roll_note, &roll);
    for (uint32_t i = 0; i < roll.count; i++) {
        uint64_t number = roll.numbers[i], version;
        struct kv_block_extent extent = extent_of(number, 0);
        enum kv_status status         = lab_read(lab, number, &extent, &version);
        if (status == KV_NOT_FOUND) continue; /* the disk is full, and it was the oldest's turn */
        assert_int_equal(status, KV_OK);
        assert_int_equal(version, number);
        if (number > *newest) *newest = number;
    }
    return roll.count;
}

static void judge_acknowledged(struct lab *lab, uint64_t newest) {
    for (uint32_t i = 0; i < ledger.count; i++) {
        uint64_t number = ledger.blocks[i].number;
        if (number + RECENT < newest || lab_has(lab, number)) continue;
        /* A drop that was not yet acknowledged may have happened: nobody was promised either. */
        if (number % DROPPABLE != 0)
            fail_msg("block %llu was WRITTEN and is lost", (unsigned long long)number);
    }
    for (uint64_t i = 0; i < 1 << 16; i++) {
        if (ledger.dropped[i] && lab_has(lab, ledger.first + i))
            fail_msg("block %llu was dropped and is back", (unsigned long long)(ledger.first + i));
    }
}

/* Kept records change their size with the version, so the one that is found says which it is. */
static void judge_kept(struct lab *lab) {
    for (uint64_t i = 0; i < KEPT; i++) {
        if (ledger.kept[i] == 0) continue;
        struct kv_block_extent extent = lab_find(lab, kept_first + i).extent;
        uint64_t version;
        assert_int_equal(lab_read(lab, kept_first + i, &extent, &version), KV_OK);
        struct kv_block_extent expected = extent_of(kept_first + i, version);
        assert_int_equal(extent.part_count, expected.part_count);
        assert_int_equal(extent.part_bytes, expected.part_bytes);
        if (version < ledger.kept[i])
            fail_msg("kept record %d is at version %llu, %llu was WRITTEN", (int)i,
                     (unsigned long long)version, (unsigned long long)ledger.kept[i]);
        ledger.kept[i] = version; /* found means written */
    }
}

static void no_acknowledged_block_is_lost(bool threads, int cycles) {
    struct dice dice = {lab_seed("store_crash_test")};
    struct lab lab;
    lab_open(&lab);
    lab.options.disk_bytes = DISK_BYTES;
    lab.options.io_threads = threads;
    memset(ledger.kept, 0, sizeof ledger.kept);
    uint64_t first = 1, acknowledged = 0, seen = 0, version = 1;
    for (int cycle = 0; cycle < cycles; cycle++) {
        ledger.first = first;
        ledger.count = 0;
        memset(ledger.dropped, 0, sizeof ledger.dropped);
        cycle_kill(&lab, &dice, version, cycle % 5 == 4);
        lab_start(&lab);
        uint64_t newest;
        seen += judge_all(&lab, &newest);
        judge_acknowledged(&lab, newest);
        judge_kept(&lab);
        lab_stop(&lab);
        acknowledged += ledger.count;
        first += 1 << 16;
        version += 1 << 16;
    }
    printf("%d cycles, %llu blocks acknowledged as WRITTEN, %llu read back: 0 lost, 0 wrong\n",
           cycles, (unsigned long long)acknowledged, (unsigned long long)seen);
    assert_true(acknowledged > 10 * (uint64_t)cycles); /* there was a load */
    lab_close(&lab);
}

static void no_acknowledged_block_is_lost_over_io_uring(void **state) {
    no_acknowledged_block_is_lost(false, CYCLES);
}
static void no_acknowledged_block_is_lost_over_threads(void **state) {
    no_acknowledged_block_is_lost(true, CYCLES / 4 + 1);
}

int main(void) {
    lab_filter();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(no_acknowledged_block_is_lost_over_io_uring),
        cmocka_unit_test(no_acknowledged_block_is_lost_over_threads),
    };
    return cmocka_run_group_tests_name("crash", tests, NULL, NULL);
}
