/* SPDX-License-Identifier: Apache-2.0 */
/* log.h - segment files in a directory: where the next record goes, and what is safe.
 *
 * The log knows segments and their states; it does not know blocks.  The store asks it for a place,
 * writes the record there itself (through kv_log_io()), and tells it how that went.
 *
 *              open chain              place ... place                 footer, sync
 *   FREE/ABSENT ---> OPENING ---> READY ---> OPEN ---> FULL ---> SEALING ---> SEALED ---> FREE
 *                                              |         |           |                retire
 *                                              +---------+-----------+---> FAILED ------> FREE
 *                                                  a failed fdatasync
 *
 *   ABSENT   an empty file; OPENING preallocates it first
 *   READY    the next one, its header written and synced ahead of need, so that appending never
 *            waits for it
 *   FULL     takes no more records; waits for its writes in flight
 *   FAILED   an fdatasync failed.  It is never asked again: what the kernel answers after a failed
 *            fsync says nothing.  Records that were synced before stay readable
 *
 * Preallocation is fallocate(), when a segment is first used.  Writing zeros as well was left out:
 * it writes every byte twice to make the first of many passes faster.
 *
 * Space.  One segment that could be opened is kept back, so that whatever must be carried out of
 * the oldest one always has somewhere to go.
 *
 * Order.  Segments are retired oldest first, and each header says how old the oldest is.  So a
 * tombstone never goes before the records that it covers, and a file of an earlier life is
 * recognised.
 *
 * Failure.  A failed write closes its segment and is tried again in another.  From the second
 * failure in a row on the log pauses, 100 ms at first, 10 s at most: a disk that is back is used
 * again, one that is not costs little.
 *
 * Threads. One. */
#ifndef KV_STORAGE_LOG_H
#define KV_STORAGE_LOG_H

#include "storage/io.h"
#include "storage/segment.h"
#include "storage/table.h"

#define KV_SEGMENT_NONE UINT32_MAX

enum kv_segment_state {
    KV_SEGMENT_ABSENT,
    KV_SEGMENT_FREE,
    KV_SEGMENT_OPENING,
    KV_SEGMENT_READY,
    KV_SEGMENT_OPEN,
    KV_SEGMENT_FULL,
    KV_SEGMENT_SEALING,
    KV_SEGMENT_SEALED,
    KV_SEGMENT_FAILED,
};

struct kv_segment {
    enum kv_segment_state state;
    struct kv_segment_header header;
    uint32_t end_page;
    uint32_t record_count;
    uint32_t writes, reads;     /* of records, in flight; kept by the store through the log */
    uint64_t written, synced;   /* writes completed; the first `synced` of them are safe */
    uint64_t unsynced_since_us; /* 0: written == synced */
    uint64_t sync_covers;       /* `written` when the sync in flight was submitted */
    bool sync_wanted, busy;     /* busy: `request` is in flight */
    bool footer_failed;
    uint32_t index;             /* which index buffer, or UINT32_MAX */
    struct kv_sync *syncs;      /* the store's: waiting for an fdatasync of this segment */
    struct kv_entry_list live;  /* the store's: entries whose record is here */
    struct kv_io_request request;
};

/* Of an open or sealing segment: its index as the footer will have it, trailer behind it. */
enum { KV_LOG_INDEXES = 3 };

struct kv_log_options {
    const char *path;
    uint64_t disk_bytes, segment_bytes;
    uint32_t io_depth;     /* requests that the store will have in flight at most */
    uint32_t io_threads;
    bool use_threads;
    uint8_t *memory;       /* the arena, to be registered with the I/O engine */
    uint64_t memory_bytes;
    uint32_t sync_ms;
    /* After each fdatasync, with an errno if it failed: the records up to `synced` are safe, and
     * after a failure the others are not and never will be. */
    void (*on_sync)(void *context, uint32_t slot, int error);
    void *context;
};

struct kv_log {
    struct kv_log_options options;
    struct kv_io *io;
    int directory, superblock_file;
    int *files;                /* [1 + slot_count]: the superblock's, then each slot's */
    uint32_t slot_count;
    uint32_t segments_max;     /* how many the cap allows; slot_count may be more after it shrank */
    uint32_t segment_pages;
    struct kv_segment *segments;
    uint32_t open, next;       /* OPEN; OPENING or READY */
    uint32_t in_use;           /* segments that are neither FREE nor ABSENT */
    uint32_t allocated;        /* segments that are not ABSENT */
    uint32_t index_owner[KV_LOG_INDEXES];
    uint8_t *index_memory[KV_LOG_INDEXES];
    size_t index_bytes;
    uint8_t *header_memory;    /* of the segment being opened */
    bool buffered;             /* the file system refused O_DIRECT */

    struct kv_superblock superblock;
    uint8_t *superblock_memory;
    struct kv_io_request superblock_request;
    bool superblock_busy, superblock_wanted;
    bool fresh;                /* there was no superblock */

    uint64_t newest_generation;
    uint64_t now_us;
    uint64_t paused_until_us, pause_us;
    uint64_t allocate_after_us; /* fallocate said the file system is full */
    uint32_t failures;          /* of writes, in a row */
    uint64_t io_errors;
};

struct kv_place {
    uint32_t slot, page;
    uint32_t index; /* of its index record */
};

/* Locks the directory, opens and if need be creates its files, and starts the I/O engine.
 * Nothing is read but the superblock: recover.c does the rest.  Statuses are those of
 * kv_store_open(). */
enum kv_status kv_log_open(const struct kv_log_options *options, struct kv_log **out, char *why,
                           size_t why_bytes);
/* Frees; kv_log_finish() before it closes the log in order. */
void kv_log_close(struct kv_log *log); /* NULL is closed */

struct kv_io *kv_log_io(struct kv_log *log);
struct kv_segment *kv_log_segment(struct kv_log *log, uint32_t slot);
/* The file number of a slot, for requests. */
static inline uint32_t kv_log_file(uint32_t slot) {
    return slot + 1;
}

/* Drives opening, sealing and syncing; never blocks. */
void kv_log_poll(struct kv_log *log, uint64_t now_us);
/* When kv_log_poll() should run again even if no I/O finishes; UINT64_MAX: need not. */
uint64_t kv_log_deadline(const struct kv_log *log);

/* A place for a record, and its entry in the index.  record->page is set.
 * KV_BUSY: a segment is being opened, or room has to be made.  KV_IO_ERROR: the log pauses.
 * carry: the record comes out of the oldest segment, so that the reserve may be used. */
enum kv_status kv_log_place(struct kv_log *log, struct kv_record *record, bool carry,
                            struct kv_place *out);
/* The write at that place is over.  Returns its number in the segment (0 after an error). */
uint64_t kv_log_written(struct kv_log *log, const struct kv_place *place, int error);
bool kv_log_is_paused(const struct kv_log *log);

/* Asks for an fdatasync soon. */
void kv_log_want_sync(struct kv_log *log, uint32_t slot);

/* Segments that could be opened for records that are not carried, were the reserve not kept. */
uint32_t kv_log_available(const struct kv_log *log);
/* True when reclaiming should begin: little room is left, or the cap has shrunk. */
bool kv_log_wants_room(const struct kv_log *log);
/* True when not even what is carried can be placed, now or later. */
bool kv_log_is_stuck(const struct kv_log *log);
/* The oldest segment if it is SEALED or FAILED, else KV_SEGMENT_NONE. */
uint32_t kv_log_oldest(const struct kv_log *log);
/* Gives up a SEALED or FAILED segment without live records and reads. */
void kv_log_retire(struct kv_log *log, uint32_t slot);
uint64_t kv_log_bytes_used(const struct kv_log *log);

/* Seals what is open and marks the superblock clean, or gives up after the deadline.  Drives the
 * I/O engine itself. */
void kv_log_finish(struct kv_log *log, uint64_t next_sequence, uint64_t deadline_us);

/* For recover.c: makes `slot` the OPEN segment again, behind its last record, with the index that
 * is already in index buffer 0. */
void kv_log_resume(struct kv_log *log, uint32_t slot, uint32_t end_page, uint32_t record_count);
/* For recover.c: writes the superblock, not clean, and waits for it.  0 or an errno. */
int kv_log_begin(struct kv_log *log, uint64_t next_sequence);
/* Submits requests, in groups that the engine can take, and waits for all. */
void kv_log_run(struct kv_log *log, struct kv_io_request *requests, uint32_t count);

#endif
