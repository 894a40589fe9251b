/* SPDX-License-Identifier: Apache-2.0 */
/* kill_test.c - kill -9 at random moments: what was acknowledged as WRITTEN is there afterwards.
 *
 * A child opens the store and commits blocks and snapshots, drops some, and tells each acknowledgement
 * through a pipe.  The parent kills it after a random time, opens the directory itself, and holds
 * every word it was told against what it finds.  The disk is large enough that nothing acknowledged is
 * reclaimed, so nothing has an excuse.  The same directory goes through all cycles. */
#include "tests/storage/harness.h"

#include "storage/clock.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

enum { CYCLES = 40, SNAPSHOTS = 8, AHEAD = 24, BLOCKS_KNOWN = 1 << 16 };

enum word_kind { WORD_OPEN, WORD_WRITTEN, WORD_SNAPSHOT, WORD_DROPPING, WORD_DROPPED };
struct word {
    uint64_t kind, number, version;
};

/* ---- The child ----------------------------------------------------------------------------- */

struct ack {
    struct kv_sync sync;
    struct word word;
    int pipe;
    bool busy;
};

static void tell(int pipe, enum word_kind kind, uint64_t number, uint64_t version) {
    struct word word = {kind, number, version};
    if (write(pipe, &word, sizeof word) != (ssize_t)sizeof word) _exit(3);
}

static void on_done(struct kv_sync *sync, enum kv_status status) {
    struct ack *ack = sync->owner;
    ack->busy       = false;
    if (status == KV_OK)
        tell(ack->pipe, (enum word_kind)ack->word.kind, ack->word.number, ack->word.version);
}

static void ask(struct harness *h, struct ack *ack, int pipe, struct word word) {
    *ack = (struct ack){.sync = {.key = key_of(word.number), .durability = KV_WRITTEN,
                                 .on_done = on_done},
                        .word = word, .pipe = pipe, .busy = true};
    ack->sync.owner = ack;
    kv_store_sync(h->store, &ack->sync);
}

static struct ack *ack_free(struct harness *h, struct ack *acks) {
    for (;;) {
        for (int i = 0; i < AHEAD; i++) {
            if (!acks[i].busy) return &acks[i];
        }
        kv_store_wait(h->store, -1, 20000);
        kv_store_poll(h->store);
    }
}

static void child_run(struct harness *h, int pipe, uint64_t first, uint64_t version, uint64_t seed) {
    static struct ack acks[AHEAD];
    if (harness_try_open(h) != KV_OK) _exit(4);
    tell(pipe, WORD_OPEN, 0, 0);
    for (uint64_t number = first;; number++) {
        struct put wanted = {.number = number, .version = 1,
                             .part_count = 1 + (uint32_t)random_below(&seed, 5),
                             .part_bytes = 1 + (uint32_t)random_below(&seed, 9000)};
        struct word word = {WORD_WRITTEN, number, 1};
        if (number % 8 == 0) { /* a snapshot, newer than the last one of its name */
            wanted.class   = KV_CLASS_KEEP;
            wanted.number  = number / 8 % SNAPSHOTS;
            wanted.version = version++;
            word           = (struct word){WORD_SNAPSHOT, wanted.number, wanted.version};
        }
        enum kv_status status;
        while ((status = put_try(h, &wanted)) == KV_BUSY) {
            kv_store_wait(h->store, -1, 20000);
            kv_store_poll(h->store);
        }
        if (status != KV_OK) _exit(5);
        ask(h, ack_free(h, acks), pipe, word);
        if (number % 16 == 5 && number >= first + 3) { /* forget one of a moment ago */
            struct kv_digest key = key_of(number - 3);
            tell(pipe, WORD_DROPPING, number - 3, 0);
            struct ack *ack = ack_free(h, acks);
            if (kv_store_drop(h->store, &key) == KV_OK)
                ask(h, ack, pipe, (struct word){WORD_DROPPED, number - 3, 0});
        }
        kv_store_poll(h->store);
    }
}

/* ---- The parent ---------------------------------------------------------------------------- */

enum { UNKNOWN, WRITTEN, DROPPING, DROPPED };
struct known {
    uint8_t blocks[BLOCKS_KNOWN];
    uint64_t snapshots[SNAPSHOTS]; /* newest version acknowledged */
    uint64_t next, version;
    uint64_t words;
};

static void listen_to(struct known *known, int pipe, pid_t child, uint64_t live_us) {
    struct word word;
    uint64_t end = 0;
    while (read(pipe, &word, sizeof word) == (ssize_t)sizeof word) {
        known->words++;
        switch (word.kind) {
        case WORD_OPEN: end = kv_clock_us() + live_us; break;
        case WORD_WRITTEN:
            if (known->blocks[word.number] == UNKNOWN) known->blocks[word.number] = WRITTEN;
            break;
        case WORD_SNAPSHOT:
            if (word.version > known->snapshots[word.number])
                known->snapshots[word.number] = word.version;
            if (word.version >= known->version) known->version = word.version + 1;
            break;
        case WORD_DROPPING: known->blocks[word.number] = DROPPING; break;
        case WORD_DROPPED: known->blocks[word.number] = DROPPED; break;
        }
        if (word.kind != WORD_SNAPSHOT && word.number >= known->next) known->next = word.number + 1;
        if (end != 0 && kv_clock_us() >= end) {
            kill(child, SIGKILL);
            end = UINT64_MAX;
        }
    }
}

static void judge(struct harness *h, const struct known *known) {
    for (uint64_t number = 100; number < known->next; number++) {
        enum kv_status status = get(h, number); /* fails the test on wrong bytes */
        if (known->blocks[number] == WRITTEN) assert_int_equal(status, KV_OK);
        if (known->blocks[number] == DROPPED) assert_int_equal(status, KV_NOT_FOUND);
        assert_true(status == KV_OK || status == KV_NOT_FOUND);
    }
    for (uint64_t i = 0; i < SNAPSHOTS; i++) {
        if (known->snapshots[i] == 0) continue;
        struct kv_block_info info;
        assert_true(find(h, i, &info));
        assert_true(info.extent.tag >= known->snapshots[i]);
        assert_int_equal(get(h, i), KV_OK);
    }
}

static void what_was_acknowledged_survives_kill_9(void **state) {
    struct harness *h = *state;
    uint64_t seed     = random_seed("kill");
    static struct known known;
    known          = (struct known){.next = 100, .version = 1};
    uint32_t count = harness_rounds(CYCLES);
    uint64_t scanned = 0;
    for (uint32_t cycle = 0; cycle < count; cycle++) {
        int ends[2];
        assert_int_equal(pipe(ends), 0);
        uint64_t first = known.next + 50, child_seed = random_next(&seed);
        fflush(stdout);
        pid_t child = fork();
        assert_true(child >= 0);
        if (child == 0) {
            close(ends[0]);
            child_run(h, ends[1], first, known.version + 1000, child_seed);
        }
        close(ends[1]);
        listen_to(&known, ends[0], child, random_below(&seed, 30000));
        close(ends[0]);
        int status;
        assert_int_equal(waitpid(child, &status, 0), child);
        assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
        if (cycle % 5 != 4 && cycle + 1 != count) continue; /* most crashes follow on a crash */
        harness_open(h);
        scanned += !kv_store_stats(h->store)->recovery_clean;
        judge(h, &known);
        harness_close(h);
    }
    uint64_t written = 0, dropped = 0;
    for (uint64_t i = 0; i < known.next; i++) {
        written += known.blocks[i] == WRITTEN;
        dropped += known.blocks[i] == DROPPED;
    }
    printf("%u kills, %llu blocks acknowledged, %llu drops, 0 lost\n", count,
           (unsigned long long)written, (unsigned long long)dropped);
    assert_true(written > count && scanned > 0);
}

static int setup(void **state) {
    struct harness *h = malloc(sizeof *h);
    harness_setup(h);
    h->options.disk_bytes    = 3072ull * MIB;
    h->options.segment_bytes = 8 * MIB;
    h->options.blocks_max    = BLOCKS_KNOWN;
    *state                   = h;
    return 0;
}

static int teardown(void **state) {
    harness_teardown(*state);
    free(*state);
    return 0;
}

int main(int argc, char **argv) {
    harness_arguments(argc, argv);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(what_was_acknowledged_survives_kill_9, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
