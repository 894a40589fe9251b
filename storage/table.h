/* SPDX-License-Identifier: Apache-2.0 */
/* table.h - what the store knows of each block, by key and by age.
 *
 * A fixed number of entries; an entry's index is its name everywhere in storage/.  The table finds
 * entries by key, keeps free ones, and keeps entries in lists; what the fields mean and when they
 * change is the business of store_*.c.
 *
 * One key may have several entries: at most one VISIBLE (resident, restoring, cold), at most one
 * FILLING, at most one TOMBSTONE, and any number of GONE ones that somebody still holds.
 *
 * Which block is evicted.  Two queues, after 2Q and segmented LRU.  A block that comes into memory
 * (by commit or restore) goes to the tail of `probation`; used again a second or more later, it
 * moves to `hot`, which holds at most three quarters of the arena and gives its coldest back to
 * probation.  Victims come from the head of probation.  So a scan, however long, only replaces what
 * was used once.  The second matters: attention touches a block once per layer within
 * milliseconds, and those thirty touches are one use.  Only entries that can be evicted at this
 * moment stand in the queues, so that taking a victim never searches.
 *
 * Threads. One.
 */
#ifndef KV_STORAGE_TABLE_H
#define KV_STORAGE_TABLE_H

#include "storage/store.h"

#define KV_ENTRY_NONE UINT32_MAX

enum { KV_CORRELATED_US = 1000000 }; /* uses closer to the arrival than this are part of it */

enum kv_entry_state {
    KV_ENTRY_FREE = 0,
    KV_ENTRY_FILLING,
    KV_ENTRY_RESIDENT,  /* in memory, perhaps on disk too */
    KV_ENTRY_RESTORING, /* memory is taken, its read queued or in flight */
    KV_ENTRY_COLD,      /* on disk only */
    KV_ENTRY_GONE,      /* dropped or replaced; freed when nobody holds it */
    KV_ENTRY_TOMBSTONE, /* dropped; its tombstone is being written */
};

enum kv_entry_kind { KV_KIND_VISIBLE, KV_KIND_FILLING, KV_KIND_GONE, KV_KIND_TOMBSTONE };

enum kv_entry_disk {
    KV_DISK_NONE = 0, /* no copy on disk */
    KV_DISK_QUEUED,   /* in the queue of writes */
    KV_DISK_WRITING,  /* its write is in flight */
    KV_DISK_WRITTEN,  /* at (segment, page); synced when the segment says so */
};

/* Ends of an intrusive list of entries. */
struct kv_entry_list {
    uint32_t head, tail; /* KV_ENTRY_NONE: empty */
};

struct kv_entry_link {
    uint32_t previous, next;
    struct kv_entry_list *list; /* NULL: in none */
};

struct kv_entry {
    struct kv_digest key;
    struct kv_block_extent extent;
    uint64_t sequence;        /* order of commits and drops; 0 while FILLING */
    uint64_t protected_us;    /* not dropped before this moment */
    uint64_t arrived_us;      /* when it came into memory */
    struct kv_sync *syncs;    /* waiting for this entry, any order */
    struct kv_entry_link age; /* evictable, or queued for a write or a read */
    struct kv_entry_link live; /* of its segment: WRITTEN */
    uint32_t unit;            /* arena, of the record's header; KV_ARENA_NONE: not in memory */
    uint32_t segment, page;   /* where on disk: WRITTEN */
    uint64_t write_number;    /* which completed write of its segment it was */
    uint32_t pins;
    uint32_t commit_pins;     /* of which kv_store_commit() took */
    uint32_t transfers;       /* I/O in flight that names this entry */
    uint8_t state;            /* enum kv_entry_state */
    uint8_t class;            /* enum kv_block_class */
    uint8_t disk;             /* enum kv_entry_disk */
    uint8_t failures;         /* of its write, in a row */
    uint8_t status;           /* GONE: enum kv_status for those who waited */
    bool unread;              /* GONE while its restore was in flight: its memory is garbage */
    bool hot;                 /* used again after it had arrived */
    bool used;                /* pinned since its record was written */
    bool logged;              /* some record of this key may be on disk */
    bool protected_counted;   /* its bytes are in the store's protected_bytes */
};

struct kv_table;

/* KV_BUSY: out of memory. */
enum kv_status kv_table_open(uint32_t entries, struct kv_table **out);
void kv_table_close(struct kv_table *table); /* NULL is closed */

struct kv_entry *kv_table_entry(struct kv_table *table, uint32_t index);
uint32_t kv_table_capacity(const struct kv_table *table);
uint32_t kv_table_used(const struct kv_table *table);

/* An index, or KV_ENTRY_NONE. */
uint32_t kv_table_find(struct kv_table *table, const struct kv_digest *key,
                       enum kv_entry_kind kind);
/* The GONE entry of this key that still has a pin from its commit, or KV_ENTRY_NONE. */
uint32_t kv_table_find_gone_pinned(struct kv_table *table, const struct kv_digest *key);

/* A fresh entry, zero but for its key and `state`, or KV_ENTRY_NONE when all are in use. */
uint32_t kv_table_insert(struct kv_table *table, const struct kv_digest *key,
                         enum kv_entry_state state);
/* It must be in no list. */
void kv_table_remove(struct kv_table *table, uint32_t index);

/* ---- Lists ------------------------------------------------------------------------------- */

enum kv_entry_links { KV_LINK_AGE, KV_LINK_LIVE };

void kv_list_init(struct kv_entry_list *list);
void kv_list_push(struct kv_table *table, struct kv_entry_list *list, enum kv_entry_links which,
                  uint32_t index); /* at the tail */
void kv_list_push_head(struct kv_table *table, struct kv_entry_list *list,
                       enum kv_entry_links which, uint32_t index);
/* Takes it out of whatever list it is in; nothing if in none. */
void kv_list_remove(struct kv_table *table, enum kv_entry_links which, uint32_t index);

/* ---- Ages -------------------------------------------------------------------------------- */

struct kv_ages {
    struct kv_entry_list probation, hot;
    uint64_t hot_units, hot_units_max;
};

void kv_ages_init(struct kv_ages *ages, uint64_t arena_units);
/* The block is used now: decides whether it is hot.  It may be in no queue (pinned). */
void kv_ages_use(struct kv_entry *entry, uint64_t now_us);
/* The block can be evicted from now on; it is the youngest. */
void kv_ages_add(struct kv_table *table, struct kv_ages *ages, uint32_t index);
/* It cannot any more; nothing if it is in no queue of `ages`. */
void kv_ages_remove(struct kv_table *table, struct kv_ages *ages, uint32_t index);
/* The coldest, or KV_ENTRY_NONE. */
uint32_t kv_ages_coldest(const struct kv_ages *ages);

#endif
