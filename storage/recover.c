/* SPDX-License-Identifier: Apache-2.0 */
/* recover.c - fills the table from what is on disk.
 *
 *   look     each file's header and trailer: who is alive, who is stale, who is damaged
 *   order    the living by generation, oldest first
 *   apply    with a footer: its index is read, payloads are not;
 *            without: the segment is read whole and scanned (segment.h), payloads are verified, so
 *            that a record which was never acknowledged and is torn is not there
 *   secure   what the last process may not have synced is synced now
 *   resume   the youngest segment goes on being filled if it has room
 *
 * After a clean stop every segment alive has a footer.  After a crash at most those that were open
 * or about to be lack one; that bounds the scan whatever the size of the disk.
 *
 * Applying in the order of the log makes the newest record of a key win: a record is applied if its
 * sequence is not lower than what is known, a tombstone removes what is older.  The log never puts a
 * tombstone before a record that it covers (log.h), so tombstones need not be remembered. */
#include "storage/store_internal.h"

#include "proto/kv_check.h"
#include "storage/clock.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>

enum {
    GROUP = 16,            /* segments looked at, or indices read, at once */
    PIECE_BYTES = 1 << 20, /* of a segment that is scanned */
    LOOK_BYTES = (KV_SEGMENT_HEADER_PAGES + 1) * KV_PAGE,
};

/* What is known of one file. */
struct found {
    uint32_t slot;
    bool alive;
    bool has_trailer;
    bool unreadable;
    struct kv_segment_header header;
    struct kv_trailer trailer;
};

struct recovery {
    struct kv_store *store;
    struct kv_log *log;
    struct found *found; /* [slot_count] */
    uint32_t *order;     /* slots alive, by generation */
    uint32_t alive_count;
    uint8_t *group;      /* GROUP times index_bytes */
    uint8_t *segment;    /* segment_bytes, made when the first one is scanned */
    uint32_t slot;       /* being applied */
    uint64_t next_sequence;
    uint64_t bytes;
    bool all_footers;
};

/* ---- Look ---------------------------------------------------------------------------------- */

static bool zero(const uint8_t *memory, size_t bytes) {
    for (size_t i = 0; i < bytes; i++) {
        if (memory[i] != 0) return false;
    }
    return true;
}

static bool header_is_ours(const struct recovery *recovery, const struct kv_segment_header *header,
                           uint32_t slot) {
    return memcmp(header->store, recovery->log->superblock.store, KV_IDENTITY_BYTES) == 0 &&
           header->slot == slot && header->segment_bytes == recovery->log->options.segment_bytes;
}

/* Decides from a file's header and trailer pages what it is. */
static void look_at(struct recovery *recovery, uint32_t slot, const uint8_t *pages) {
    struct found *found    = &recovery->found[slot];
    const uint8_t *last    = pages + KV_SEGMENT_HEADER_PAGES * KV_PAGE;
    bool has_header        = kv_segment_header_decode(pages, &found->header);
    bool has_trailer       = kv_trailer_decode(last, &found->trailer);
    bool blank             = !has_header && zero(pages, KV_SEGMENT_HEADER_PAGES * KV_PAGE);
    if (has_header && !header_is_ours(recovery, &found->header, slot)) has_header = false;
    if (has_trailer && !header_is_ours(recovery, &found->trailer.segment, slot))
        has_trailer = false;
    /* A trailer of an earlier life stands there until it is overwritten. */
    if (has_header && has_trailer &&
        memcmp(found->header.identity, found->trailer.segment.identity, KV_IDENTITY_BYTES) != 0)
        has_trailer = false;
    if (!has_header && has_trailer) found->header = found->trailer.segment;
    found->alive       = has_header || has_trailer;
    found->has_trailer = has_trailer;
    if (!found->alive && !blank) recovery->store->stats.segments_lost++;
}

static void look(struct recovery *recovery) {
    struct kv_log *log = recovery->log;
    struct kv_io_request requests[2 * GROUP];
    for (uint32_t slot = 0; slot < log->slot_count;) {
        uint32_t slots[GROUP], count = 0;
        for (; slot < log->slot_count && count < GROUP; slot++) {
            if (log->segments[slot].state != KV_SEGMENT_FREE) continue;
            uint8_t *pages          = recovery->group + (size_t)count * LOOK_BYTES;
            requests[2 * count]     = (struct kv_io_request){
                    .kind   = KV_IO_READ,
                    .file   = kv_log_file(slot),
                    .memory = pages,
                    .bytes  = KV_SEGMENT_HEADER_PAGES * KV_PAGE,
            };
            requests[2 * count + 1] = (struct kv_io_request){
                .kind   = KV_IO_READ,
                .file   = kv_log_file(slot),
                .memory = pages + KV_SEGMENT_HEADER_PAGES * KV_PAGE,
                .bytes  = KV_PAGE,
                .offset = log->options.segment_bytes - KV_PAGE,
            };
            slots[count++] = slot;
        }
        kv_log_run(log, requests, 2 * count);
        for (uint32_t i = 0; i < count; i++) {
            uint8_t *pages = recovery->group + (size_t)i * LOOK_BYTES;
            /* A file that cannot be read is taken for zeros where it cannot. */
            for (uint32_t j = 0; j < 2; j++) {
                if (requests[2 * i + j].error == 0) continue;
                recovery->log->io_errors++;
                recovery->found[slots[i]].unreadable = true;
                memset(requests[2 * i + j].memory, 0, requests[2 * i + j].bytes);
            }
            look_at(recovery, slots[i], pages);
            recovery->bytes += LOOK_BYTES;
        }
    }
}

/* ---- Order --------------------------------------------------------------------------------- */

static int by_generation(const void *a, const void *b, void *context) {
    const struct found *found = context;
    uint64_t x                = found[*(const uint32_t *)a].header.generation;
    uint64_t y                = found[*(const uint32_t *)b].header.generation;
    return x < y ? -1 : x > y;
}

/* Refuses what is older than the oldest segment that anybody knew to be alive. */
static void order(struct recovery *recovery) {
    struct kv_log *log = recovery->log;
    uint64_t oldest    = log->superblock.oldest_generation;
    uint64_t newest    = log->superblock.newest_generation;
    for (uint32_t slot = 0; slot < log->slot_count; slot++) {
        const struct found *found = &recovery->found[slot];
        if (!found->alive) continue;
        if (found->header.oldest_generation > oldest) oldest = found->header.oldest_generation;
        if (found->header.generation > newest) newest = found->header.generation;
    }
    log->newest_generation = newest;
    for (uint32_t slot = 0; slot < log->slot_count; slot++) {
        struct found *found = &recovery->found[slot];
        if (!found->alive || found->header.generation < oldest) {
            found->alive = false;
            continue;
        }
        recovery->order[recovery->alive_count++] = slot;
    }
    qsort_r(recovery->order, recovery->alive_count, sizeof *recovery->order, by_generation,
            recovery->found);
}

/* ---- Apply --------------------------------------------------------------------------------- */

/* The table is full: the block that would be reclaimed first makes room. */
static bool table_make_room(struct recovery *recovery) {
    struct kv_store *store = recovery->store;
    for (uint32_t i = 0; i < recovery->alive_count; i++) {
        struct kv_segment *segment = kv_log_segment(recovery->log, recovery->order[i]);
        if (segment->live.head == KV_ENTRY_NONE) continue;
        store->stats.drops++;
        kv_entry_forget(store, segment->live.head, KV_NOT_FOUND);
        return true;
    }
    return false;
}

static void record_apply(void *context, const struct kv_record *record) {
    struct recovery *recovery = context;
    struct kv_store *store    = recovery->store;
    if (record->sequence >= recovery->next_sequence) recovery->next_sequence = record->sequence + 1;
    uint32_t known = kv_table_find(store->table, &record->key, KV_KIND_VISIBLE);
    if (known != KV_ENTRY_NONE) {
        if (record->sequence < kv_store_entry(store, known)->sequence) return;
        kv_entry_forget(store, known, KV_NOT_FOUND);
    }
    if (record->kind == KV_RECORD_TOMBSTONE) return;
    if (kv_record_pages(record->part_count, record->part_bytes) >
        kv_arena_units_total(store->arena)) { /* the arena has shrunk: it can never come back */
        store->stats.drops++;
        return;
    }
    if (store->visible >= store->options.blocks_max && !table_make_room(recovery)) return;
    uint32_t index = kv_table_insert(store->table, &record->key, KV_ENTRY_COLD);
    KV_CHECK(index != KV_ENTRY_NONE); /* ENTRIES_SPARE are free while nothing is in flight */
    struct kv_segment *segment = kv_log_segment(recovery->log, recovery->slot);
    struct kv_entry *entry     = kv_store_entry(store, index);
    entry->extent              = (struct kv_block_extent){
                     .tag        = record->tag,
                     .part_count = record->part_count,
                     .part_bytes = record->part_bytes,
    };
    entry->class        = record->kind == KV_RECORD_KEEP ? KV_CLASS_KEEP : KV_CLASS_BLOCK;
    entry->sequence     = record->sequence;
    entry->disk         = KV_DISK_WRITTEN;
    entry->logged       = true;
    entry->segment      = recovery->slot;
    entry->page         = record->page;
    entry->write_number = ++segment->written;
    kv_list_push(store->table, &segment->live, KV_LINK_LIVE, index);
    store->visible++;
    store->on_disk++;
    if (entry->class == KV_CLASS_KEEP)
        store->keep_bytes += (uint64_t)kv_entry_pages(entry) * KV_PAGE;
}

/* For a resumed segment: its index as it was when it was written. */
struct rebuild {
    struct kv_log *log;
    uint32_t count;
};
static void record_index(void *context, const struct kv_record *record) {
    struct rebuild *rebuild = context;
    kv_index_encode(record, rebuild->log->index_memory[0] +
                                (size_t)rebuild->count * KV_INDEX_RECORD_BYTES);
    rebuild->count++;
}

static uint64_t index_offset(const struct recovery *recovery, const struct found *found) {
    return (uint64_t)(recovery->log->segment_pages - kv_footer_pages(found->trailer.record_count)) *
           KV_PAGE;
}

static uint64_t index_length(const struct found *found) {
    return (uint64_t)(kv_footer_pages(found->trailer.record_count) - 1) * KV_PAGE;
}

/* Reads the whole segment to recovery->segment.  False: no memory. */
static bool segment_read(struct recovery *recovery, uint32_t slot) {
    struct kv_log *log = recovery->log;
    uint64_t bytes     = log->options.segment_bytes;
    uint32_t pieces    = (uint32_t)(bytes / PIECE_BYTES);
    if (recovery->segment == NULL) recovery->segment = aligned_alloc(KV_PAGE, bytes);
    struct kv_io_request *requests = calloc(pieces, sizeof *requests);
    if (recovery->segment == NULL || requests == NULL) {
        free(requests);
        return false;
    }
    for (uint32_t i = 0; i < pieces; i++) {
        requests[i] = (struct kv_io_request){
            .kind   = KV_IO_READ,
            .file   = kv_log_file(slot),
            .memory = recovery->segment + (size_t)i * PIECE_BYTES,
            .bytes  = PIECE_BYTES,
            .offset = (uint64_t)i * PIECE_BYTES,
        };
    }
    kv_log_run(log, requests, pieces);
    for (uint32_t i = 0; i < pieces; i++) {
        if (requests[i].error == 0) continue;
        recovery->log->io_errors++;
        memset(requests[i].memory, 0, PIECE_BYTES);
    }
    free(requests);
    recovery->bytes += bytes;
    return true;
}

static bool scan(struct recovery *recovery, uint32_t slot, struct kv_segment *segment) {
    struct found *found = &recovery->found[slot];
    found->has_trailer  = false;
    if (!segment_read(recovery, slot)) return false;
    segment->end_page =
        kv_segment_scan(&found->header, recovery->segment, recovery->log->options.segment_bytes,
                        record_apply, recovery);
    recovery->all_footers = false;
    return true;
}

static bool apply(struct recovery *recovery, uint32_t slot, const uint8_t *index, int error) {
    struct kv_log *log         = recovery->log;
    struct found *found        = &recovery->found[slot];
    struct kv_segment *segment = &log->segments[slot];
    recovery->slot             = slot;
    segment->header            = found->header;
    segment->state             = KV_SEGMENT_SEALED;
    segment->end_page          = KV_SEGMENT_HEADER_PAGES;
    log->in_use++;
    bool whole = found->has_trailer && error == 0 &&
                 kv_index_decode(&found->trailer, index, index_length(found), record_apply,
                                 recovery);
    if (!whole) return scan(recovery, slot, segment);
    segment->end_page     = found->trailer.end_page;
    segment->record_count = found->trailer.record_count;
    return true;
}

/* Indices are read a group at a time and applied one by one. */
static bool apply_all(struct recovery *recovery) {
    struct kv_log *log = recovery->log;
    struct kv_io_request requests[GROUP];
    for (uint32_t first = 0; first < recovery->alive_count; first += GROUP) {
        uint32_t count = recovery->alive_count - first;
        if (count > GROUP) count = GROUP;
        uint32_t reads = 0;
        int of[GROUP];
        for (uint32_t i = 0; i < count; i++) {
            uint32_t slot             = recovery->order[first + i];
            const struct found *found = &recovery->found[slot];
            of[i]                     = -1;
            if (!found->has_trailer || index_length(found) == 0) continue;
            of[i]             = (int)reads;
            requests[reads++] = (struct kv_io_request){
                .kind   = KV_IO_READ,
                .file   = kv_log_file(slot),
                .memory = recovery->group + i * log->index_bytes,
                .bytes  = index_length(found),
                .offset = index_offset(recovery, found),
            };
            recovery->bytes += index_length(found);
        }
        kv_log_run(log, requests, reads);
        for (uint32_t i = 0; i < count; i++) {
            int error = of[i] >= 0 ? requests[of[i]].error : 0;
            if (error != 0) recovery->log->io_errors++;
            if (!apply(recovery, recovery->order[first + i],
                       recovery->group + i * log->index_bytes, error))
                return false;
        }
    }
    return true;
}

/* ---- Secure -------------------------------------------------------------------------------- */

/* A segment is opened only after the one before its predecessor has been synced (there are that
 * many index buffers), so after a crash the youngest ones are in doubt and those without a footer.
 * Their records are WRITTEN until this sync says otherwise. */
static void secure(struct recovery *recovery) {
    struct kv_log *log = recovery->log;
    bool clean         = log->superblock.clean;
    for (uint32_t i = 0; i < recovery->alive_count; i++) {
        uint32_t slot              = recovery->order[i];
        struct kv_segment *segment = &log->segments[slot];
        bool in_doubt = !recovery->found[slot].has_trailer ||
                        (!clean && i + KV_LOG_INDEXES >= recovery->alive_count);
        if (in_doubt) {
            struct kv_io_request request = {.kind = KV_IO_SYNC, .file = kv_log_file(slot)};
            kv_log_run(log, &request, 1);
            if (request.error != 0) {
                recovery->log->io_errors++;
                segment->state = KV_SEGMENT_FAILED;
                continue;
            }
        }
        segment->synced = segment->written;
    }
}

/* ---- Resume -------------------------------------------------------------------------------- */

/* Empty segments are free at once. */
static void free_empty(struct recovery *recovery) {
    struct kv_log *log = recovery->log;
    for (uint32_t i = 0; i < recovery->alive_count; i++) {
        struct kv_segment *segment = &log->segments[recovery->order[i]];
        if (segment->end_page > KV_SEGMENT_HEADER_PAGES) continue;
        if (segment->state != KV_SEGMENT_SEALED) continue;
        segment->state = KV_SEGMENT_FREE;
        log->in_use--;
    }
}

/* Takes the footer away, because it would hide what is added, and keeps its index. */
static bool footer_take(struct recovery *recovery, uint32_t slot, uint32_t *count) {
    struct kv_log *log          = recovery->log;
    const struct found *found   = &recovery->found[slot];
    struct kv_io_request read   = {
          .kind   = KV_IO_READ,
          .file   = kv_log_file(slot),
          .memory = log->index_memory[0],
          .bytes  = index_length(found),
          .offset = index_offset(recovery, found),
    };
    struct kv_io_request write = {
        .kind   = KV_IO_WRITE,
        .file   = kv_log_file(slot),
        .memory = recovery->group,
        .bytes  = KV_PAGE,
        .offset = log->options.segment_bytes - KV_PAGE,
    };
    kv_log_run(log, &read, 1);
    if (read.error != 0 ||
        kv_crc32c(log->index_memory[0], (size_t)found->trailer.record_count *
                                            KV_INDEX_RECORD_BYTES) != found->trailer.index_crc)
        return false;
    memset(recovery->group, 0, KV_PAGE);
    kv_log_run(log, &write, 1);
    *count = found->trailer.record_count;
    return write.error == 0;
}

/* Without a footer the index is made again from the records. */
static bool index_rebuild(struct recovery *recovery, uint32_t slot, uint32_t *count) {
    struct rebuild rebuild = {.log = recovery->log};
    if (!segment_read(recovery, slot)) return false;
    kv_segment_scan(&recovery->found[slot].header, recovery->segment,
                    recovery->log->options.segment_bytes, record_index, &rebuild);
    *count = rebuild.count;
    return true;
}

/* The youngest segment goes on being filled if at least a quarter of it is free. */
static void resume(struct recovery *recovery) {
    struct kv_log *log = recovery->log;
    uint32_t youngest  = KV_SEGMENT_NONE;
    for (uint32_t i = 0; i < recovery->alive_count; i++) {
        if (log->segments[recovery->order[i]].state != KV_SEGMENT_FREE) youngest = recovery->order[i];
    }
    if (youngest == KV_SEGMENT_NONE) return;
    struct kv_segment *segment = &log->segments[youngest];
    struct found *found        = &recovery->found[youngest];
    bool worth = segment->end_page <= log->segment_pages / 4 * 3;
    /* With no segment left to open it must be: it was the one that is kept back for carrying. */
    if (segment->state != KV_SEGMENT_SEALED || (!worth && kv_log_available(log) > 0)) return;

    uint32_t count = 0;
    if (found->has_trailer ? !footer_take(recovery, youngest, &count)
                           : !index_rebuild(recovery, youngest, &count))
        return;
    kv_log_resume(log, youngest, segment->end_page, count);
}

/* ---- All of it ----------------------------------------------------------------------------- */

static bool recovery_open(struct recovery *recovery, struct kv_store *store) {
    struct kv_log *log = store->log;
    size_t each        = log->index_bytes > LOOK_BYTES ? log->index_bytes : LOOK_BYTES;
    *recovery          = (struct recovery){
                 .store         = store,
                 .log           = log,
                 .found         = calloc(log->slot_count, sizeof *recovery->found),
                 .order         = calloc(log->slot_count, sizeof *recovery->order),
                 .group         = aligned_alloc(KV_PAGE, GROUP * each),
                 .next_sequence = log->superblock.next_sequence,
                 .all_footers   = true,
    };
    return recovery->found != NULL && recovery->order != NULL && recovery->group != NULL;
}

static void recovery_close(struct recovery *recovery) {
    free(recovery->found);
    free(recovery->order);
    free(recovery->group);
    free(recovery->segment);
}

enum kv_status kv_store_recover(struct kv_store *store, char *why, size_t why_bytes) {
    uint64_t began        = kv_clock_us();
    struct kv_log *log    = store->log;
    bool was_clean        = log->superblock.clean || log->fresh;
    enum kv_status status = KV_OK;
    struct recovery recovery;
    bool made = recovery_open(&recovery, store);
    if (made) {
        look(&recovery);
        order(&recovery);
        made = apply_all(&recovery);
    }
    if (!made) {
        snprintf(why, why_bytes, "out of memory");
        status = KV_BUSY;
    } else {
        secure(&recovery);
        free_empty(&recovery);
        int error = kv_log_begin(log, recovery.next_sequence);
        if (error != 0) {
            snprintf(why, why_bytes, "cannot write the superblock: %s", strerror(error));
            status = KV_IO_ERROR;
        }
    }
    if (status == KV_OK) resume(&recovery);
    store->next_sequence           = recovery.next_sequence;
    store->stats.recovery_clean    = was_clean && recovery.all_footers;
    store->stats.recovered_blocks  = store->visible;
    store->stats.recovery_bytes    = recovery.bytes;
    store->stats.recovery_us       = kv_clock_us() - began;
    recovery_close(&recovery);
    return status;
}
