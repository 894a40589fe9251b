/* SPDX-License-Identifier: Apache-2.0 */
/* store.h - blocks by key, wherever their bytes are.
 *
 * The store knows keys, lengths and tiers.  It does not know what a block's bytes mean, who
 * asked for them, or why.  A block is `part_count` parts of `part_bytes` each, one behind the
 * other, written once:
 *
 *              reserve           commit             write, evict
 *    (absent) ---------> FILLING ------> RESIDENT ---------------> COLD
 *        ^                  |            | ^                        |
 *        |     abandon      |            | |       restore          |
 *        +------------------+            | +------------------------+
 *        +------------- drop ------------+--------- drop -----------+
 *
 *    FILLING   memory is reserved; the caller is writing it
 *    RESIDENT  in the arena; may be pinned.  Soon after commit it is also written to the
 *              segment log (segment.h), because a log write is cheap and makes it survive
 *    COLD      on disk only
 *
 * A block that moves is never nowhere: its arena copy is given up only after its write has
 * completed, and it is RESIDENT again only after every byte read back has been verified.  When
 * memory is needed the coldest unpinned block that is on disk gives up its copy; without a disk
 * it is dropped (but for class KEEP).  When the disk is full the oldest segment goes, with its
 * blocks; carried forward are class KEEP, pinned and protected blocks, and, within limits, blocks
 * that were used since they were written.  All of this is counted.
 *
 * Threads.   One: the thread that called kv_store_open().  Every call checks.
 * Progress.  Calls return at once.  Callbacks run inside kv_store_poll() and nowhere else, so
 *            a caller is never re-entered.
 * Memory.    Everything is allocated by kv_store_open() from the limits in its options.  A
 *            limit in use is KV_BUSY, never an allocation.  Operations (struct kv_pin, struct
 *            kv_sync) belong to the caller and are borrowed from the call to its callback.
 * Integrity. Every byte that comes back from disk is verified (CRC32C per part and per header,
 *            own offset, generation) before it is visible.  What fails is quarantined: dropped
 *            and counted; the caller sees KV_CORRUPT once and KV_NOT_FOUND afterwards.
 */
#ifndef KV_STORAGE_STORE_H
#define KV_STORAGE_STORE_H

#include "kernels/device.h"
#include "proto/kv_types.h"

struct kv_store;

enum kv_durability { KV_VOLATILE = 1, KV_WRITTEN = 2, KV_SYNCED = 3 };
enum kv_tier { KV_TIER_GPU = 1, KV_TIER_HOST = 2, KV_TIER_NVME = 3 };

/* BLOCK: cache; goes when the disk is full.  KEEP: carried forward then, and replaces an older
 * record of the same key at commit (a session's snapshot). */
enum kv_block_class { KV_CLASS_BLOCK = 0, KV_CLASS_KEEP = 1 };

enum {
    KV_PARTS_MAX = 2048,
    KV_PIN_MAX = 256, /* blocks of one pin */
};

struct kv_store_options {
    struct kv_device *device; /* borrowed; closed after the store */
    uint64_t arena_bytes;     /* host memory for block bytes, a multiple of 2 MiB */
    uint32_t blocks_max;      /* keys known at once, in all tiers: 1 .. 2^28 */
    const char *path;         /* directory; NULL: nothing is ever on disk */
    uint64_t disk_bytes;      /* hard cap on the directory, at least 4 segments */
    uint64_t segment_bytes;   /* 0: 64 MiB.  A multiple of 1 MiB; tests use small ones */
    uint32_t io_depth;        /* requests in flight: 1 .. 256 */
    bool io_threads;          /* use the thread-pool engine even if io_uring is there */
    uint32_t sync_ms;         /* WRITTEN becomes SYNCED within this long; 0: only on demand */
};

/* Opens the directory, recovers what is in it, and returns when the index stands.
 * KV_INVALID: options contradict each other, or the directory holds something else.
 * KV_BUSY: not enough memory, or another process has the directory.  KV_IO_ERROR.
 * `why` (at least 256 bytes) says it in words.  On failure *out is untouched. */
enum kv_status kv_store_open(const struct kv_store_options *options, struct kv_store **out,
                             char *why, size_t why_bytes);

/* Finishes writes in flight, writes what is RESIDENT and not yet on disk, closes the log
 * cleanly (the next start reads footers only), frees.  Nothing may be pinned or FILLING. */
void kv_store_close(struct kv_store *store);

/* ---- Writing: reserve, fill, commit --------------------------------------------------- */

struct kv_block_extent {
    uint64_t tag;        /* kept with the block and given back; the store never reads it */
    uint32_t part_count; /* 1 .. KV_PARTS_MAX */
    uint32_t part_bytes; /* > 0 */
};

struct kv_slot {
    uint8_t *address; /* arena memory, part_count * part_bytes, yours until commit or abandon */
    uint32_t entry;   /* the store's own index */
};

/* KV_EXISTS: committed or being filled by someone (class BLOCK; KEEP may be FILLING beside the
 * record it will replace, but only once).  KV_BUSY: no memory or no entry is free yet; room is
 * being made if anything can be evicted, and the same call may succeed after a poll.
 * KV_INVALID: larger than a segment or the arena can ever hold. */
enum kv_status kv_store_reserve(struct kv_store *store, const struct kv_digest *key,
                                enum kv_block_class class, const struct kv_block_extent *extent,
                                struct kv_slot *out);

/* Makes the block visible and queues its write.  It starts with one pin if `pinned`: give it
 * back with kv_store_unpin_key().  The bytes must not change from here on. */
void kv_store_commit(struct kv_store *store, const struct kv_slot *slot, bool pinned);
void kv_store_abandon(struct kv_store *store, const struct kv_slot *slot);

/* Calls back when the block has reached `durability`.  KV_OK; KV_NOT_FOUND: absent, or dropped
 * meanwhile; KV_IO_ERROR: its write or its fdatasync failed, or the disk is full of what must stay
 * (it remains RESIDENT as VOLATILE; a new write to another segment is tried at once, and later ones
 * with growing pauses); KV_UNAVAILABLE: there is no disk. */
struct kv_sync {
    struct kv_digest key;          /* in */
    enum kv_durability durability; /* in: KV_WRITTEN or KV_SYNCED */
    void (*on_done)(struct kv_sync *sync, enum kv_status status);
    void *owner;                   /* the caller's */

    enum kv_status status_private;
    uint64_t number_private;
    struct kv_sync *next_private;
};
void kv_store_sync(struct kv_store *store, struct kv_sync *sync);

/* ---- Reading: pin, use, unpin --------------------------------------------------------- */

/* Brings blocks into memory and holds them there.
 *
 *   part < 0    whole blocks; they become RESIDENT
 *   part >= 0   only this part of each: a RESIDENT block is pinned as it is; of a COLD one
 *               just the part is read into arena memory that belongs to the pin, for contexts
 *               larger than the arena
 */
struct kv_pin {
    const struct kv_digest *keys; /* in:  [count], unchanged until unpin */
    uint8_t **addresses;          /* out: [count] of the block, or of the part; good until unpin */
    uint32_t count;               /* in:  1 .. KV_PIN_MAX */
    int32_t part;                 /* in */
    uint64_t tag;                 /* in:  the tag every block was reserved with */
    void (*on_ready)(struct kv_pin *pin, enum kv_status status);
    void *owner;                  /* the caller's */
    uint32_t failed;              /* out: index of the first block that failed */
    uint32_t from_disk;           /* out: how many had to be read */
    bool cold[KV_PIN_MAX];        /* out: which */

    uint32_t ready_private, issued_private, reading_private;
    enum kv_status status_private;
    uint32_t *entries_private;    /* in: [count], the pin's own notes */
    struct kv_pin *next_private;
};

/* All or nothing: unless status is KV_OK nothing is pinned and addresses is meaningless.
 * KV_NOT_FOUND: a key is absent.  KV_MISMATCH: a tag differs.  KV_INVALID: a block has no such
 * part.  KV_BUSY: the pinned set does not
 * fit beside what others hold.  KV_CORRUPT, KV_IO_ERROR: a restore failed.
 * on_ready runs in the next kv_store_poll() even when everything is resident, except that
 * kv_store_pin_now() pins at once when nothing has to be read: KV_OK, or KV_BUSY when the
 * asynchronous call is needed, or the failure. */
void kv_store_pin(struct kv_store *store, struct kv_pin *pin);
enum kv_status kv_store_pin_now(struct kv_store *store, struct kv_pin *pin);
void kv_store_unpin(struct kv_store *store, struct kv_pin *pin);

/* Gives back the pin that kv_store_commit(..., true) took. */
void kv_store_unpin_key(struct kv_store *store, const struct kv_digest *key);

/* ---- Asking and forgetting -------------------------------------------------------------- */

struct kv_block_info {
    enum kv_tier tier; /* the fastest */
    enum kv_durability durability;
    enum kv_block_class class;
    uint64_t sequence; /* of this record: a key that is dropped and stored again has another */
    struct kv_block_extent extent;
};
/* True if the block is there (RESIDENT or COLD).  Never touches the disk. */
bool kv_store_find(struct kv_store *store, const struct kv_digest *key, struct kv_block_info *out);

/* For a copy of a record that somebody keeps elsewhere (gpu_tier.h): true while the store still has that
 * very record, and the block counts as used, so that its place on disk is kept. */
bool kv_store_use_copy(struct kv_store *store, const struct kv_digest *key, uint64_t sequence);

/* Protects a block from being dropped until the monotonic clock passes `until_us`; never
 * shortens an earlier protection.  At most half of the disk (or arena, without one) can be
 * protected: false when that is reached or the key is absent. */
bool kv_store_protect(struct kv_store *store, const struct kv_digest *key, uint64_t until_us);

/* Forgets a block, durably: a tombstone is logged for what is on disk; kv_store_sync() on the
 * key, called before the next poll, waits for the tombstone, and answers KV_NOT_FOUND when there is
 * none because nothing was ever written.  KV_NOT_FOUND: absent.  KV_BUSY: pinned, FILLING or being
 * restored, or too many tombstones are on their way. */
enum kv_status kv_store_drop(struct kv_store *store, const struct kv_digest *key);

/* Calls `visit` for every block of a class, in no order; used once after open, to find
 * snapshots.  `visit` may not call the store. */
void kv_store_each(struct kv_store *store, enum kv_block_class class,
                   void (*visit)(void *context, const struct kv_digest *key,
                                 const struct kv_block_extent *extent),
                   void *context);

struct kv_store_stats {
    uint64_t blocks, blocks_resident, blocks_cold; /* now; blocks_cold: on disk only */
    uint64_t blocks_on_disk;
    uint64_t arena_bytes_used, disk_bytes_used;
    uint64_t evictions, drops, spills, restores;   /* since open */
    uint64_t corruptions, io_errors, segments_lost;
    uint64_t bytes_written, bytes_read;
    uint64_t recovered_blocks, recovery_us, recovery_bytes;
    bool recovery_clean;
    uint64_t restore_us_per_mib;                   /* recent mean, 0: not known */
};
const struct kv_store_stats *kv_store_stats(const struct kv_store *store);

/* "io_uring", "threads" or "none". */
const char *kv_store_io_engine(const struct kv_store *store);
/* Why io_uring or O_DIRECT is not used, or "". */
const char *kv_store_io_reason(const struct kv_store *store);

/* ---- Memory for others ----------------------------------------------------------------- */

/* A run of arena memory for the engine's own use (tails, snapshots being built), counted
 * against the arena.  Evicts if it must.  NULL: not now. */
void *kv_store_memory_alloc(struct kv_store *store, size_t bytes);
void kv_store_memory_free(struct kv_store *store, void *memory);

/* ---- Progress -------------------------------------------------------------------------- */

/* Reaps finished I/O and runs callbacks; returns how many ran. */
uint32_t kv_store_poll(struct kv_store *store);

/* Sleeps until I/O finishes, wake_fd is readable (it is read and cleared), or timeout_us has
 * passed.  The engine's only place to sleep. */
void kv_store_wait(struct kv_store *store, int wake_fd, uint64_t timeout_us);

#endif
