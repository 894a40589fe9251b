/* SPDX-License-Identifier: Apache-2.0 */
/* harness.h - a store in a directory of its own, and blocks whose right bytes are known.
 *
 * A block's content is a function of its number and version, so any byte read back can be judged
 * without remembering what was written.  The version is kept in the block's tag.  Calls that wait
 * turn the store themselves and fail the test after half a minute: nothing may wait for ever. */
#ifndef KV_TESTS_STORAGE_HARNESS_H
#define KV_TESTS_STORAGE_HARNESS_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "storage/io_fault.h"
#include "storage/store.h"

enum { MIB = 1 << 20 };

struct harness {
    struct kv_store_options options;
    struct kv_store *store;
    char root[128]; /* a directory for this test */
    char path[160]; /* the store's */
    char why[256];
};

/* "threads" as the only argument of the test program: all stores use that engine.
 * KV_TEST_FILTER in the environment: only tests whose names match. */
void harness_arguments(int argc, char **argv);
bool harness_threads(void);
/* Slow under a sanitizer: fewer rounds there. */
uint32_t harness_rounds(uint32_t optimized);

/* 4 MiB of arena, 16 segments of 1 MiB, depth 8; not open yet. */
void harness_setup(struct harness *h);
void harness_open(struct harness *h);
enum kv_status harness_try_open(struct harness *h);
void harness_close(struct harness *h);
void harness_teardown(struct harness *h); /* closes, and removes the directory */

/* Copies the store's directory, as it is on disk now, to root/name and makes that the path. */
void harness_copy(const struct harness *from, struct harness *to, const char *name);
uint64_t harness_disk_bytes(const struct harness *h); /* as du counts */

struct kv_digest key_of(uint64_t number);
void content_fill(uint8_t *memory, size_t bytes, uint64_t number, uint64_t version,
                  uint64_t offset);
bool content_right(const uint8_t *memory, size_t bytes, uint64_t number, uint64_t version,
                   uint64_t offset);

/* A block of 4 parts of 16 KiB unless said otherwise; version 1. */
enum { PARTS = 4, PART_BYTES = 16384 };
struct put {
    uint64_t number, version;
    uint32_t part_count, part_bytes;
    enum kv_block_class class;
    bool pinned;
};
enum kv_status put_block(struct harness *h, const struct put *put); /* waits while BUSY */
enum kv_status put_try(struct harness *h, const struct put *put);   /* KV_BUSY is an answer */
void put(struct harness *h, uint64_t number);
void put_keep(struct harness *h, uint64_t number, uint64_t version);

enum kv_status sync_wait(struct harness *h, uint64_t number, enum kv_durability durability);

/* A pin with room for its arrays. */
struct pinned {
    struct kv_pin pin;
    struct kv_digest keys[KV_PIN_MAX];
    uint8_t *addresses[KV_PIN_MAX];
    uint32_t entries[KV_PIN_MAX];
    bool ready;
    enum kv_status status;
};
void pin_begin(struct harness *h, struct pinned *pinned, const uint64_t *numbers, uint32_t count,
               int32_t part, uint64_t tag);
enum kv_status pin_end(struct harness *h, struct pinned *pinned); /* waits */

/* Pins, compares, unpins.  KV_OK only if the bytes are right; wrong ones fail the test. */
enum kv_status get(struct harness *h, uint64_t number);
enum kv_status get_part(struct harness *h, uint64_t number, int32_t part);

void turn_store(struct harness *h); /* once: wait a little, poll */
/* Until everything committed is on disk. */
void settle(struct harness *h);
bool find(struct harness *h, uint64_t number, struct kv_block_info *info);

/* ---- A disk that fails on purpose ---------------------------------------------------------- */

struct bad_disk {
    int kind;          /* enum kv_io_kind, or -1: any */
    uint32_t nth;      /* 1: the first; 0: none */
    bool forever;      /* that one and all after it */
    struct kv_io_fault fault;
    uint32_t seen;     /* so far */
    uint32_t hits;
};
void bad_disk_set(struct bad_disk *disk);
void bad_disk_clear(void);

/* ---- Randomness with a seed ----------------------------------------------------------------- */

/* From KV_TEST_SEED, or the clock; printed. */
uint64_t random_seed(const char *what);
uint64_t random_next(uint64_t *state);
static inline uint64_t random_below(uint64_t *state, uint64_t limit) {
    return random_next(state) % limit;
}

#endif
