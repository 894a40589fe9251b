/* SPDX-License-Identifier: Apache-2.0 */
/* store_internal.h - what the store's files share; seen by storage/store*.c and recover.c only.
 *
 *   store.c          open, close, ask, forget, poll, wait
 *   store_entry.c    where an entry stands: memory, queues, pins, eviction
 *   store_write.c    reserve, commit, the queue of writes, sync
 *   store_read.c     pins, restores, reads of single parts
 *   store_reclaim.c  empties the oldest segment
 *   recover.c        fills the table from the disk
 *
 * Where an entry stands.  Its `age` link is in one of: ages (evictable), dirty (to be written),
 * reads (to be restored), or none (pinned, in flight, cold).  Its `live` link is in the list of
 * the segment that holds its record.  entry_settle() is called after anything that may let it
 * move: it alone frees GONE entries and lets others be evicted. */
#ifndef KV_STORAGE_STORE_INTERNAL_H
#define KV_STORAGE_STORE_INTERNAL_H

#include "storage/arena.h"
#include "storage/log.h"
#include "storage/segment.h"
#include "storage/store.h"
#include "storage/table.h"

#include <pthread.h>

enum {
    KV_POLL_CRC_BYTES = 4 << 20, /* checksummed for writes per poll: about half a millisecond */
    KV_CARRY_BYTES = 1 << 20,    /* copied at a time when a record is carried forward */
};

/* One record's I/O in flight: a write, a restore, or the two reads of a single part. */
struct kv_transfer {
    struct kv_io_request request[2];
    struct kv_store *store;
    uint32_t pending;      /* of the requests */
    int error;
    uint32_t entry;
    struct kv_place place; /* slot and page; index for writes */
    uint64_t began_us;
    struct kv_pin *pin;    /* part reads: whose, and which of its blocks */
    uint32_t pin_block;
    uint8_t *page;         /* KV_PAGE of its own, for tombstones */
    struct kv_transfer *next_free;
};

struct kv_sync_list {
    struct kv_sync *head, *tail;
};
struct kv_pin_list {
    struct kv_pin *head, *tail;
};

/* What is being done to the oldest segment. */
struct kv_reclaim {
    bool active;
    uint32_t slot;
    uint64_t hot_pages;   /* carried only because they were used */
    uint32_t entry;       /* being carried, or KV_ENTRY_NONE */
    struct kv_place from, to;
    struct kv_io_request request;
    uint8_t *header;      /* of the record being carried: the largest header */
    uint8_t *buffer;      /* KV_CARRY_BYTES */
    uint64_t done_bytes, total_bytes; /* of the payload, in whole pages */
    uint32_t part;        /* whose crc is being computed */
    uint64_t part_left;
    uint32_t crc;
    bool busy;            /* request is in flight */
    struct { uint32_t slot; uint64_t number; } target[KV_LOG_INDEXES]; /* must be synced */
    uint32_t target_count;
    uint32_t fruitless;   /* segments reclaimed since a new record last found a place */
    uint64_t full_until_us; /* everything on disk has to stay: no new records before this */
};

struct kv_store {
    struct kv_store_options options;
    pthread_t thread;
    uint64_t now_us;
    bool has_disk;

    struct kv_table *table;
    struct kv_arena *arena;
    uint8_t *memory;      /* the arena's region, options.arena_bytes of pinned memory */
    struct kv_log *log;   /* NULL: no disk */

    struct kv_ages ages;
    struct kv_entry_list dirty, reads;
    uint64_t next_sequence;
    uint32_t visible;     /* entries that count against blocks_max: visible or FILLING */
    uint32_t resident;    /* entries in that state */
    uint32_t on_disk;     /* visible entries with disk WRITTEN */
    uint64_t keep_bytes, protected_bytes;
    uint64_t swept_us;    /* when expired protections were last looked for */
    uint32_t pinned;      /* entries with pins; nothing may be left at close */
    uint32_t filling;
    uint32_t writes_in_flight;
    bool room_wanted;     /* an entry or a place was refused: reclaim */
    uint64_t refused_us;  /* the end of the pause of the log that waiters were told about */

    struct kv_transfer *transfers;
    struct kv_transfer *transfers_free;
    uint32_t transfer_count, transfers_in_use;
    uint8_t *transfer_pages;

    struct kv_pin_list pins_waiting; /* for memory, in order */
    struct kv_pin_list pins_active;  /* started */
    struct kv_pin_list pins_done;    /* to be called back */
    struct kv_sync_list syncs_done;

    struct kv_reclaim reclaim;
    struct kv_store_stats stats;
    char io_reason[200];
};

static inline struct kv_entry *kv_store_entry(struct kv_store *store, uint32_t index) {
    return kv_table_entry(store->table, index);
}
static inline uint32_t kv_entry_pages(const struct kv_entry *entry) {
    return kv_record_pages(entry->extent.part_count, entry->extent.part_bytes);
}
static inline uint8_t *kv_store_unit_memory(struct kv_store *store, uint32_t unit) {
    return store->memory + (size_t)unit * KV_ARENA_UNIT;
}
/* The payload of an entry in memory. */
static inline uint8_t *kv_entry_payload(struct kv_store *store, const struct kv_entry *entry) {
    return kv_store_unit_memory(store, entry->unit) +
           (size_t)kv_record_header_pages(entry->extent.part_count) * KV_PAGE;
}
static inline bool kv_entry_visible(const struct kv_entry *entry) {
    return entry->state == KV_ENTRY_RESIDENT || entry->state == KV_ENTRY_RESTORING ||
           entry->state == KV_ENTRY_COLD;
}

/* ---- store_entry.c --------------------------------------------------------------------- */

/* Memory for so many pages, evicting what it must; KV_ARENA_NONE: not now. */
uint32_t kv_store_memory_take(struct kv_store *store, uint32_t pages);
bool kv_store_evict_one(struct kv_store *store);

void kv_entry_settle(struct kv_store *store, uint32_t index);
void kv_entry_pin(struct kv_store *store, uint32_t index);
void kv_entry_unpin(struct kv_store *store, uint32_t index);
/* Makes a visible entry GONE: nobody finds it any more; those who hold it see `status`. */
void kv_entry_forget(struct kv_store *store, uint32_t index, enum kv_status status);
/* A RESIDENT entry has lost its copy on disk: it is written again. */
void kv_entry_rewrite(struct kv_store *store, uint32_t index);
/* A visible entry's copy on disk is gone: written again if RESIDENT, else forgotten. */
void kv_entry_lose_disk(struct kv_store *store, uint32_t index, enum kv_status status);
bool kv_entry_protected(const struct kv_store *store, const struct kv_entry *entry);

/* ---- store_write.c --------------------------------------------------------------------- */

struct kv_transfer *kv_transfer_take(struct kv_store *store); /* NULL: all in flight */
void kv_transfer_give(struct kv_store *store, struct kv_transfer *transfer);

void kv_sync_finish(struct kv_store *store, struct kv_sync *sync, enum kv_status status);
void kv_sync_finish_all(struct kv_store *store, struct kv_sync **list, enum kv_status status);
/* Entries' waiters when the record has been written as write `number` of `slot`. */
void kv_sync_written(struct kv_store *store, struct kv_sync **list, uint32_t slot,
                     uint64_t number);
/* kv_log_options.on_sync */
void kv_store_on_sync(void *context, uint32_t slot, int error);
void kv_store_write_pump(struct kv_store *store);
/* Whoever waits for a queued write is told that it cannot be. */
void kv_store_write_refuse(struct kv_store *store);

/* ---- store_read.c ---------------------------------------------------------------------- */

void kv_store_read_pump(struct kv_store *store);

/* ---- store_reclaim.c ------------------------------------------------------------------- */

void kv_store_reclaim_pump(struct kv_store *store);
/* More keys than blocks_max before any segment is full: gives up one block of the log's head. */
bool kv_store_reclaim_entry(struct kv_store *store);
/* Whether a segment's records can be given up by reclaiming it. */
bool kv_store_reclaim_full(const struct kv_store *store);

/* ---- recover.c -------------------------------------------------------------------------- */

enum kv_status kv_store_recover(struct kv_store *store, char *why, size_t why_bytes);

#endif
