/* SPDX-License-Identifier: Apache-2.0 */
/* store_lab.h - a store in a directory of its own, for the tests of storage/store.h.
 *
 * A lab opens and closes one store over and over in a fresh directory, and makes its calls read as
 * if they were synchronous: each helper polls until the answer is there.  Nothing waits for ever:
 * what takes longer than LAB_PATIENCE_S ends the program and says where it stood.
 *
 * Blocks are made from two numbers.  The key number gives the key; key and version give every byte,
 * so that any bytes at all that come back can be judged without remembering what was written.
 * The first 16 bytes of each part say the key, the version and the part in clear.
 *
 * Threads. One, the store's. */
#ifndef KV_TESTS_STORAGE_STORE_LAB_H
#define KV_TESTS_STORAGE_STORE_LAB_H

#include "kernels/device.h"
#include "storage/store.h"

/* After the includes that it wants before it, for every test. */
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include <cmocka.h>

enum {
    LAB_PATIENCE_S = 60,
    LAB_MIB        = 1 << 20,
    LAB_PATH_BYTES = 512,
    LAB_TAG        = 77, /* of every block, unless a test says otherwise */
};

/* A test under a sanitizer is ten times slower, and finds what it finds in fewer rounds. */
#ifdef LAB_LIGHT
enum { LAB_ROUNDS_DIVISOR = 10 };
#else
enum { LAB_ROUNDS_DIVISOR = 1 };
#endif

struct lab {
    struct kv_store_options options; /* a test may change them before lab_start() */
    struct kv_store *store;          /* NULL: not open */
    char path[LAB_PATH_BYTES];
};

/* An empty directory and options: 4 MiB of arena, 1024 keys, 32 segments of 1 MiB,
 * depth 16, synced on demand only.  The store is not open yet; its device, a scalar one, is opened and
 * closed with it, so that there are no threads while it is closed and a test may fork. */
void lab_open(struct lab *lab);
/* Closes the store if it is open, and removes the directory. */
void lab_close(struct lab *lab);

void lab_start(struct lab *lab);                  /* must succeed */
enum kv_status lab_try_start(struct lab *lab, char why[256]);
void lab_stop(struct lab *lab);
/* What a process that is killed now would leave: a second lab over a copy of the directory, with
 * the same options.  Not started. */
void lab_crash(const struct lab *lab, struct lab *image);

/* From here on directories are made in memory, if there is such a file system: for tests that care
 * for bytes and open a store a thousand times. */
void lab_use_memory(void);

/* Only the cases whose names match the pattern in the environment's KIVI_TEST_FILTER, if it is
 * set; for main() to call first. */
void lab_filter(void);

/* ---- numbers ------------------------------------------------------------------------------ */

/* A stream of random numbers that a seed replays on every machine. */
struct dice {
    uint64_t state;
};
uint64_t dice_bits(struct dice *dice);
uint32_t dice_below(struct dice *dice, uint32_t limit);
/* From the environment's KIVI_TEST_SEED if that is set, else a new one; printed either way. */
uint64_t lab_seed(const char *test);

uint64_t lab_now_us(void);

/* ---- blocks ------------------------------------------------------------------------------- */

struct kv_digest lab_key(uint64_t number);
uint64_t lab_key_number(const struct kv_digest *key);
/* Of many shapes, always the same for a number: 1 to 9 parts that end inside, at and behind pages,
 * at most 40 KiB in all. */
struct kv_block_extent lab_extent(uint64_t number);
size_t lab_extent_bytes(const struct kv_block_extent *extent);

void lab_fill(uint8_t *memory, uint64_t number, uint64_t version,
              const struct kv_block_extent *extent);
/* True if every byte of the part is that of some version of the block, which is stored. */
bool lab_part_valid(const uint8_t *memory, uint64_t number, uint32_t part,
                    const struct kv_block_extent *extent, uint64_t *version);
/* All parts, of one version. */
bool lab_block_valid(const uint8_t *memory, uint64_t number, const struct kv_block_extent *extent,
                     uint64_t *version);

/* ---- calls, waited for -------------------------------------------------------------------- */

/* One turn of an engine's loop: polls, and sleeps a moment if nothing was done. */
void lab_turn(struct lab *lab);
/* Turns until `done` says so. */
void lab_until(struct lab *lab, bool (*done)(struct lab *lab, void *context), void *context);
void lab_turns_for(struct lab *lab, uint64_t us);

/* Reserves (again and again while KV_BUSY), fills and commits.  KV_EXISTS and KV_INVALID come
 * back. */
enum kv_status lab_put_as(struct lab *lab, uint64_t number, uint64_t version,
                          enum kv_block_class class, const struct kv_block_extent *extent,
                          bool pinned);
/* Version 0 of lab_extent(number), class BLOCK, not pinned; must succeed. */
void lab_put(struct lab *lab, uint64_t number);

enum kv_status lab_sync(struct lab *lab, uint64_t number, enum kv_durability durability);
/* Until every block is on disk and nothing is being done. */
void lab_settle(struct lab *lab);

/* A pin with room for what it points at. */
struct lab_pin {
    struct kv_pin pin;
    struct kv_digest keys[KV_PIN_MAX];
    uint8_t *addresses[KV_PIN_MAX];
    uint32_t entries[KV_PIN_MAX];
    enum kv_status status;
    uint32_t calls; /* of on_ready */
};
void lab_pin_prepare(struct lab_pin *pin, const uint64_t *numbers, uint32_t count, int32_t part);
/* Starts and waits. */
enum kv_status lab_pin(struct lab *lab, struct lab_pin *pin, const uint64_t *numbers,
                       uint32_t count, int32_t part);
void lab_unpin(struct lab *lab, struct lab_pin *pin);

/* Pins the block, judges every byte, unpins.  KV_OK: it is some version of the block, and here it
 * is.  Any status of a pin otherwise.  Wrong bytes fail the test. */
enum kv_status lab_read(struct lab *lab, uint64_t number, const struct kv_block_extent *extent,
                        uint64_t *version);
/* The same for one part. */
enum kv_status lab_read_part(struct lab *lab, uint64_t number,
                             const struct kv_block_extent *extent, int32_t part,
                             uint64_t *version);
/* lab_read() of lab_extent(number). */
enum kv_status lab_get(struct lab *lab, uint64_t number);

struct kv_block_info lab_find(struct lab *lab, uint64_t number); /* must be there */
bool lab_has(struct lab *lab, uint64_t number);
/* Pushes a block out of memory by reading others; a whole arena of them is put for it, from key
 * `filler` on, and dropped again. */
void lab_make_cold(struct lab *lab, uint64_t number, uint64_t filler);

/* ---- the directory ------------------------------------------------------------------------ */

/* Of everything in it, as du sees it. */
uint64_t lab_disk_bytes(const struct lab *lab);
/* The whole of a file; freed by the caller. */
uint8_t *lab_file_read(const struct lab *lab, const char *name, size_t *bytes);
void lab_file_write(const struct lab *lab, const char *name, const uint8_t *memory, size_t bytes);
/* A file `segment-...` by its slot. */
void lab_segment_name(uint32_t slot, char name[32]);

#endif
