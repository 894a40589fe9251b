/* SPDX-License-Identifier: Apache-2.0 */
/* log.c - appending: places, sealing, syncing, retiring.  log_files.c opens and closes.
 *
 * Each segment has one request of its own for the chain of steps that opens, syncs or seals it; the
 * steps of a chain share a stem and stand in the order in which they happen. */
#include "storage/log.h"

#include "proto/kv_check.h"

#include <errno.h>
#include <sys/random.h>
#include <unistd.h>

enum {
    PAUSE_FIRST_US = 100 * 1000,
    PAUSE_MOST_US = 10 * 1000 * 1000,
    ALLOCATE_AGAIN_US = 10 * 1000 * 1000,
};

struct kv_io *kv_log_io(struct kv_log *log) {
    return log->io;
}

struct kv_segment *kv_log_segment(struct kv_log *log, uint32_t slot) {
    KV_CHECK(slot < log->slot_count);
    return &log->segments[slot];
}

static uint32_t slot_of(const struct kv_log *log, const struct kv_segment *segment) {
    return (uint32_t)(segment - log->segments);
}

static uint64_t segment_bytes(const struct kv_log *log) {
    return log->options.segment_bytes;
}

static void request_submit(struct kv_log *log, struct kv_segment *segment, enum kv_io_kind kind,
                           void (*on_done)(struct kv_io_request *)) {
    KV_CHECK(!segment->busy);
    segment->busy            = true;
    segment->request.kind    = kind;
    segment->request.file    = kv_log_file(slot_of(log, segment));
    segment->request.on_done = on_done;
    segment->request.owner   = log;
    kv_io_submit(log->io, &segment->request);
}

static struct kv_segment *request_segment(struct kv_io_request *request) {
    struct kv_segment *segment =
        (struct kv_segment *)((char *)request - offsetof(struct kv_segment, request));
    segment->busy = false;
    return segment;
}

static void log_pause(struct kv_log *log) {
    log->pause_us = log->pause_us == 0 ? PAUSE_FIRST_US : log->pause_us * 2;
    if (log->pause_us > PAUSE_MOST_US) log->pause_us = PAUSE_MOST_US;
    log->paused_until_us = log->now_us + log->pause_us;
}

bool kv_log_is_paused(const struct kv_log *log) {
    return log->now_us < log->paused_until_us;
}

/* ---- Superblock ---------------------------------------------------------------------------- */

static uint64_t oldest_generation(const struct kv_log *log) {
    uint64_t oldest = log->newest_generation + 1;
    for (uint32_t slot = 0; slot < log->slot_count; slot++) {
        const struct kv_segment *segment = &log->segments[slot];
        if (segment->state < KV_SEGMENT_OPENING) continue;
        if (segment->header.generation < oldest) oldest = segment->header.generation;
    }
    return oldest;
}

static void superblock_start(struct kv_log *log);

static void superblock_synced(struct kv_io_request *request) {
    struct kv_log *log   = request->owner;
    log->superblock_busy = false;
    if (request->error != 0) log->io_errors++;
    if (log->superblock_wanted) superblock_start(log);
}

static void superblock_written(struct kv_io_request *request) {
    struct kv_log *log = request->owner;
    if (request->error != 0) {
        superblock_synced(request);
        return;
    }
    request->kind    = KV_IO_SYNC;
    request->on_done = superblock_synced;
    kv_io_submit(log->io, request);
}

/* Notes which generations are alive.  Losing one of these writes costs nothing but that a stale
 * file might be believed to be one segment longer alive. */
static void superblock_start(struct kv_log *log) {
    log->superblock_wanted = log->superblock_busy;
    if (log->superblock_busy) return;
    log->superblock_busy              = true;
    log->superblock.clean             = false;
    log->superblock.newest_generation = log->newest_generation;
    log->superblock.oldest_generation = oldest_generation(log);
    log->superblock.epoch++;
    kv_superblock_encode(&log->superblock, log->superblock_memory);
    log->superblock_request = (struct kv_io_request){
        .kind    = KV_IO_WRITE,
        .file    = 0,
        .memory  = log->superblock_memory,
        .bytes   = KV_PAGE,
        .offset  = log->superblock.epoch % 2 * KV_PAGE,
        .on_done = superblock_written,
        .owner   = log,
    };
    kv_io_submit(log->io, &log->superblock_request);
}

/* ---- Opening: allocate, header, sync ------------------------------------------------------- */

static void open_fail(struct kv_log *log, struct kv_segment *segment,
                      enum kv_segment_state back_to) {
    log->io_errors++;
    log->next      = KV_SEGMENT_NONE;
    segment->state = back_to;
    log->in_use--;
    if (back_to == KV_SEGMENT_ABSENT) log->allocated--;
    log_pause(log);
}

static void open_synced(struct kv_io_request *request) {
    struct kv_log *log         = request->owner;
    struct kv_segment *segment = request_segment(request);
    if (request->error != 0) {
        open_fail(log, segment, KV_SEGMENT_FREE);
        return;
    }
    segment->state = KV_SEGMENT_READY;
    superblock_start(log);
}

static void open_written(struct kv_io_request *request) {
    struct kv_log *log         = request->owner;
    struct kv_segment *segment = request_segment(request);
    if (request->error != 0) {
        open_fail(log, segment, KV_SEGMENT_FREE);
        return;
    }
    request_submit(log, segment, KV_IO_SYNC, open_synced);
}

static void open_write(struct kv_log *log, struct kv_segment *segment) {
    struct kv_segment_header *header = &segment->header;
    *header = (struct kv_segment_header){
        .generation        = ++log->newest_generation,
        .segment_bytes     = segment_bytes(log),
        .slot              = slot_of(log, segment),
    };
    header->oldest_generation = oldest_generation(log);
    memcpy(header->store, log->superblock.store, KV_IDENTITY_BYTES);
    ssize_t got = getrandom(header->identity, KV_IDENTITY_BYTES, 0);
    KV_CHECK(got == KV_IDENTITY_BYTES); /* cannot fail for so few bytes once the pool is up */
    kv_segment_header_encode(header, log->header_memory);
    segment->request.memory = log->header_memory;
    segment->request.bytes  = KV_SEGMENT_HEADER_PAGES * KV_PAGE;
    segment->request.offset = 0;
    request_submit(log, segment, KV_IO_WRITE, open_written);
}

static void open_allocated(struct kv_io_request *request) {
    struct kv_log *log         = request->owner;
    struct kv_segment *segment = request_segment(request);
    /* A file system that cannot preallocate (EOPNOTSUPP) still can hold the segment. */
    if (request->error != 0 && request->error != EOPNOTSUPP) {
        log->allocate_after_us = log->now_us + ALLOCATE_AGAIN_US;
        open_fail(log, segment, KV_SEGMENT_ABSENT);
        /* Fewer segments than hoped for is no reason to stop if there are others to reuse. */
        if (log->in_use > 0) {
            log->paused_until_us = 0;
            log->pause_us        = 0;
        }
        return;
    }
    open_write(log, segment);
}

static uint32_t segment_in(const struct kv_log *log, enum kv_segment_state state) {
    for (uint32_t slot = 0; slot < log->slot_count; slot++) {
        if (log->segments[slot].state == state) return slot;
    }
    return KV_SEGMENT_NONE;
}

static bool may_allocate(const struct kv_log *log) {
    return log->allocated < log->segments_max && log->now_us >= log->allocate_after_us;
}

static void open_start(struct kv_log *log) {
    uint32_t slot = segment_in(log, KV_SEGMENT_FREE);
    bool absent   = slot == KV_SEGMENT_NONE;
    if (absent && !may_allocate(log)) return;
    if (absent) slot = segment_in(log, KV_SEGMENT_ABSENT);
    if (slot == KV_SEGMENT_NONE) return;

    struct kv_segment *segment  = &log->segments[slot];
    *segment                   = (struct kv_segment){.state = KV_SEGMENT_OPENING};
    segment->index             = UINT32_MAX;
    segment->end_page          = KV_SEGMENT_HEADER_PAGES;
    segment->header.generation = log->newest_generation + 1; /* must not look like the oldest */
    kv_list_init(&segment->live);
    log->next = slot;
    log->in_use++;
    if (absent) {
        log->allocated++;
        segment->request.memory = NULL;
        segment->request.bytes  = segment_bytes(log);
        segment->request.offset = 0;
        request_submit(log, segment, KV_IO_ALLOCATE, open_allocated);
    } else {
        open_write(log, segment);
    }
}

/* ---- Placing ------------------------------------------------------------------------------- */

uint32_t kv_log_available(const struct kv_log *log) {
    uint32_t available = log->allocated - log->in_use; /* FREE */
    if (may_allocate(log)) available += log->segments_max - log->allocated;
    if (log->next != KV_SEGMENT_NONE) available++;
    return available;
}

bool kv_log_wants_room(const struct kv_log *log) {
    if (log->allocated > log->segments_max) return true;
    if (kv_log_available(log) >= 2) return false;
    /* With none left nothing but what is carried may be placed, however empty the open one is: a
     * crash in the middle of reclaiming leaves it so. */
    return kv_log_available(log) == 0 || log->open == KV_SEGMENT_NONE ||
           log->segments[log->open].end_page > log->segment_pages / 2;
}

bool kv_log_is_stuck(const struct kv_log *log) {
    return log->open == KV_SEGMENT_NONE && kv_log_available(log) == 0 &&
           log->allocated >= log->segments_max;
}

static void open_close(struct kv_log *log) {
    log->segments[log->open].state = KV_SEGMENT_FULL;
    log->open                      = KV_SEGMENT_NONE;
}

static bool segment_takes(const struct kv_log *log, const struct kv_segment *segment,
                          uint32_t pages) {
    return segment->end_page + (uint64_t)pages + kv_footer_pages(segment->record_count + 1) <=
           log->segment_pages;
}

static bool open_is_half_used(const struct kv_log *log) {
    return log->open != KV_SEGMENT_NONE &&
           log->segments[log->open].end_page > log->segment_pages / 2;
}

/* Whether a segment more will be there.  A file that is only hoped for may find no space, and then what the
 * oldest segment must keep has to fit into the open one: half of that is left for it until then. */
static bool next_is_certain(const struct kv_log *log) {
    if (log->allocated > log->in_use) return true; /* a FREE one */
    if (log->next == KV_SEGMENT_NONE) return false;
    const struct kv_segment *next = &log->segments[log->next];
    return next->state == KV_SEGMENT_READY || next->request.kind != KV_IO_ALLOCATE;
}

/* Makes the READY segment the OPEN one, if there is one and an index buffer for it. */
static bool open_switch(struct kv_log *log) {
    if (log->next == KV_SEGMENT_NONE) open_start(log);
    if (log->next == KV_SEGMENT_NONE) return false;
    struct kv_segment *segment = &log->segments[log->next];
    if (segment->state != KV_SEGMENT_READY) return false;
    for (uint32_t i = 0; i < KV_LOG_INDEXES; i++) {
        if (log->index_owner[i] != KV_SEGMENT_NONE) continue;
        log->index_owner[i] = log->next;
        segment->index      = i;
        segment->state      = KV_SEGMENT_OPEN;
        log->open           = log->next;
        log->next           = KV_SEGMENT_NONE;
        return true;
    }
    return false;
}

enum kv_status kv_log_place(struct kv_log *log, struct kv_record *record, bool carry,
                            struct kv_place *out) {
    if (kv_log_is_paused(log)) return KV_IO_ERROR;
    /* The last segment is open already: what is in the oldest one needs the rest of it. */
    if (!carry && kv_log_available(log) == 0) return KV_BUSY;
    if (!carry && open_is_half_used(log) && !next_is_certain(log)) return KV_BUSY;
    uint32_t pages = kv_record_pages(record->part_count, record->part_bytes);
    if (log->open != KV_SEGMENT_NONE &&
        !segment_takes(log, &log->segments[log->open], pages)) {
        open_close(log);
    }
    if (log->open == KV_SEGMENT_NONE) {
        if (kv_log_available(log) < (carry ? 1 : 2)) return KV_BUSY;
        if (!open_switch(log)) return KV_BUSY;
    }
    struct kv_segment *segment = &log->segments[log->open];
    KV_CHECK(segment_takes(log, segment, pages));
    record->page = segment->end_page;
    kv_index_encode(record, log->index_memory[segment->index] +
                                (size_t)segment->record_count * KV_INDEX_RECORD_BYTES);
    *out = (struct kv_place){
        .slot = log->open, .page = segment->end_page, .index = segment->record_count};
    segment->end_page += pages;
    segment->record_count++;
    segment->writes++;
    return KV_OK;
}

uint64_t kv_log_written(struct kv_log *log, const struct kv_place *place, int error) {
    struct kv_segment *segment = kv_log_segment(log, place->slot);
    KV_CHECK(segment->writes > 0);
    segment->writes--;
    if (error == 0) {
        log->failures = 0;
        log->pause_us = 0;
        if (segment->unsynced_since_us == 0) segment->unsynced_since_us = log->now_us;
        return ++segment->written;
    }
    log->io_errors++;
    if (segment->index != UINT32_MAX) {
        memset(log->index_memory[segment->index] + (size_t)place->index * KV_INDEX_RECORD_BYTES, 0,
               KV_INDEX_RECORD_BYTES);
    }
    /* The requests that fail beside this one share its cause: one failure, not many. */
    if (log->open == place->slot) {
        open_close(log);
        if (++log->failures >= 2) log_pause(log);
    }
    return 0;
}

/* ---- Syncing and sealing ------------------------------------------------------------------- */

void kv_log_want_sync(struct kv_log *log, uint32_t slot) {
    kv_log_segment(log, slot)->sync_wanted = true;
}

static void index_release(struct kv_log *log, struct kv_segment *segment) {
    if (segment->index == UINT32_MAX) return;
    log->index_owner[segment->index] = KV_SEGMENT_NONE;
    segment->index                   = UINT32_MAX;
}

static void sync_note(struct kv_log *log, struct kv_segment *segment, int error) {
    if (error == 0) {
        segment->synced            = segment->sync_covers;
        segment->unsynced_since_us = segment->synced == segment->written ? 0 : log->now_us;
    } else {
        log->io_errors++;
        if (log->open == slot_of(log, segment)) log->open = KV_SEGMENT_NONE;
        segment->state             = KV_SEGMENT_FAILED;
        segment->unsynced_since_us = 0;
        index_release(log, segment);
        if (++log->failures >= 2) log_pause(log);
    }
    log->options.on_sync(log->options.context, slot_of(log, segment), error);
}

static void sync_done(struct kv_io_request *request) {
    struct kv_log *log         = request->owner;
    struct kv_segment *segment = request_segment(request);
    sync_note(log, segment, request->error);
}

static void sync_start(struct kv_log *log, struct kv_segment *segment,
                       void (*on_done)(struct kv_io_request *)) {
    segment->sync_wanted = false;
    segment->sync_covers = segment->written;
    request_submit(log, segment, KV_IO_SYNC, on_done);
}

static void seal_synced(struct kv_io_request *request) {
    struct kv_log *log         = request->owner;
    struct kv_segment *segment = request_segment(request);
    if (request->error == 0) {
        segment->state = KV_SEGMENT_SEALED;
        index_release(log, segment);
    }
    sync_note(log, segment, request->error);
}

static void seal_written(struct kv_io_request *request) {
    struct kv_log *log         = request->owner;
    struct kv_segment *segment = request_segment(request);
    /* Without its footer the segment will be scanned at the next start: slower, not lost. */
    if (request->error != 0) {
        segment->footer_failed = true;
        log->io_errors++;
    }
    sync_start(log, segment, seal_synced);
}

static void seal_start(struct kv_log *log, struct kv_segment *segment) {
    uint8_t *index   = log->index_memory[segment->index];
    uint32_t pages   = kv_footer_pages(segment->record_count);
    size_t bytes     = (size_t)segment->record_count * KV_INDEX_RECORD_BYTES;
    uint8_t *trailer = index + (size_t)(pages - 1) * KV_PAGE;
    memset(index + bytes, 0, (size_t)(trailer - index) - bytes);
    kv_trailer_encode(&segment->header, segment->record_count, segment->end_page, index, trailer);
    segment->state          = KV_SEGMENT_SEALING;
    segment->request.memory = index;
    segment->request.bytes  = (uint64_t)pages * KV_PAGE;
    segment->request.offset = (uint64_t)(log->segment_pages - pages) * KV_PAGE;
    request_submit(log, segment, KV_IO_WRITE, seal_written);
}

static uint64_t sync_due(const struct kv_log *log, const struct kv_segment *segment) {
    if (segment->written == segment->synced) return UINT64_MAX;
    if (segment->sync_wanted) return 0;
    if (log->options.sync_ms == 0) return UINT64_MAX;
    return segment->unsynced_since_us + 1000ull * log->options.sync_ms;
}

void kv_log_poll(struct kv_log *log, uint64_t now_us) {
    log->now_us = now_us;
    for (uint32_t i = 0; i < KV_LOG_INDEXES; i++) {
        if (log->index_owner[i] == KV_SEGMENT_NONE) continue;
        struct kv_segment *segment = &log->segments[log->index_owner[i]];
        if (segment->busy) continue;
        if (segment->state == KV_SEGMENT_FULL && segment->writes == 0) {
            seal_start(log, segment);
        } else if (now_us >= sync_due(log, segment)) {
            sync_start(log, segment, sync_done);
        }
    }
    /* The next segment is opened ahead, so that it is there when half of the current one is used. */
    if (log->next == KV_SEGMENT_NONE && !kv_log_is_paused(log) && log->open != KV_SEGMENT_NONE &&
        log->segments[log->open].end_page > log->segment_pages / 4)
        open_start(log);
}

uint64_t kv_log_deadline(const struct kv_log *log) {
    uint64_t deadline = UINT64_MAX;
    if (kv_log_is_paused(log)) deadline = log->paused_until_us;
    for (uint32_t i = 0; i < KV_LOG_INDEXES; i++) {
        if (log->index_owner[i] == KV_SEGMENT_NONE) continue;
        const struct kv_segment *segment = &log->segments[log->index_owner[i]];
        if (segment->busy) continue;
        uint64_t due = sync_due(log, segment);
        if (due < deadline) deadline = due;
    }
    return deadline;
}

/* ---- Retiring ------------------------------------------------------------------------------ */

uint32_t kv_log_oldest(const struct kv_log *log) {
    uint32_t oldest = KV_SEGMENT_NONE;
    for (uint32_t slot = 0; slot < log->slot_count; slot++) {
        const struct kv_segment *segment = &log->segments[slot];
        if (segment->state < KV_SEGMENT_OPENING) continue;
        if (oldest == KV_SEGMENT_NONE ||
            segment->header.generation < log->segments[oldest].header.generation)
            oldest = slot;
    }
    if (oldest == KV_SEGMENT_NONE) return KV_SEGMENT_NONE;
    enum kv_segment_state state = log->segments[oldest].state;
    return state == KV_SEGMENT_SEALED || state == KV_SEGMENT_FAILED ? oldest : KV_SEGMENT_NONE;
}

void kv_log_retire(struct kv_log *log, uint32_t slot) {
    struct kv_segment *segment = kv_log_segment(log, slot);
    KV_CHECK(segment->state == KV_SEGMENT_SEALED || segment->state == KV_SEGMENT_FAILED);
    KV_CHECK(segment->live.head == KV_ENTRY_NONE && segment->syncs == NULL);
    KV_CHECK(segment->reads == 0 && segment->writes == 0 && !segment->busy);
    segment->state = KV_SEGMENT_FREE;
    log->in_use--;
    /* The cap has shrunk: files go, but not the one that is kept back. */
    if (log->allocated > log->segments_max && kv_log_available(log) > 2 &&
        ftruncate(log->files[kv_log_file(slot)], 0) == 0) {
        segment->state = KV_SEGMENT_ABSENT;
        log->allocated--;
    }
}

uint64_t kv_log_bytes_used(const struct kv_log *log) {
    uint64_t pages = 0;
    for (uint32_t slot = 0; slot < log->slot_count; slot++) {
        const struct kv_segment *segment = &log->segments[slot];
        if (segment->state >= KV_SEGMENT_OPEN) pages += segment->end_page;
    }
    return pages * KV_PAGE;
}
