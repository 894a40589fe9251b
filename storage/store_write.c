/* SPDX-License-Identifier: Apache-2.0 */
/* store_write.c - a block's way in: reserve, commit, its write, and who waits for it.
 *
 * A record lies in the arena as it will lie on disk, header directly in front of the payload, so
 * that one write covers both.  The header is encoded when the write starts, because only then its
 * place is known; it holds the parts' checksums, and that is the one pass over the bytes that
 * storage makes on their way out. */
#include "storage/store_internal.h"

#include "proto/kv_check.h"

/* ---- Reserve, commit, abandon -------------------------------------------------------------- */

/* KEEP and protected blocks are what reclaiming has to carry: half of the space is theirs. */
static bool keep_allowed(const struct kv_store *store, uint64_t bytes) {
    uint64_t space = store->has_disk ? store->options.disk_bytes : store->options.arena_bytes;
    return store->keep_bytes + store->protected_bytes + bytes <= space / 2;
}

static bool extent_possible(const struct kv_store *store, const struct kv_block_extent *extent) {
    if (extent->part_count < 1 || extent->part_count > KV_PARTS_MAX || extent->part_bytes < 1)
        return false;
    uint64_t pages = kv_record_pages(extent->part_count, extent->part_bytes);
    if (pages > kv_arena_units_total(store->arena)) return false;
    return !store->has_disk || pages <= kv_segment_record_pages_max(store->options.segment_bytes);
}

/* True when another key may be known. */
static bool entry_available(struct kv_store *store) {
    if (store->visible < store->options.blocks_max) return true;
    if (!store->has_disk) return kv_store_evict_one(store);
    if (kv_store_reclaim_entry(store)) return true;
    store->room_wanted = true;
    return false;
}

enum kv_status kv_store_reserve(struct kv_store *store, const struct kv_digest *key,
                                enum kv_block_class class, const struct kv_block_extent *extent,
                                struct kv_slot *out) {
    KV_CHECK(pthread_equal(store->thread, pthread_self()));
    KV_CHECK(class == KV_CLASS_BLOCK || class == KV_CLASS_KEEP);
    if (!extent_possible(store, extent)) return KV_INVALID;
    if (kv_table_find(store->table, key, KV_KIND_FILLING) != KV_ENTRY_NONE) return KV_EXISTS;
    if (class == KV_CLASS_BLOCK &&
        kv_table_find(store->table, key, KV_KIND_VISIBLE) != KV_ENTRY_NONE)
        return KV_EXISTS;

    uint32_t pages = kv_record_pages(extent->part_count, extent->part_bytes);
    uint64_t bytes = (uint64_t)pages * KV_PAGE;
    if (class == KV_CLASS_KEEP && !keep_allowed(store, bytes)) return KV_BUSY;
    if (!entry_available(store)) return KV_BUSY;
    uint32_t unit = kv_store_memory_take(store, pages);
    if (unit == KV_ARENA_NONE) return KV_BUSY;
    uint32_t index = kv_table_insert(store->table, key, KV_ENTRY_FILLING);
    if (index == KV_ENTRY_NONE) {
        kv_arena_free(store->arena, unit);
        return KV_BUSY;
    }
    struct kv_entry *entry = kv_store_entry(store, index);
    entry->extent          = *extent;
    entry->class           = (uint8_t)class;
    entry->unit            = unit;
    store->visible++;
    store->filling++;
    if (class == KV_CLASS_KEEP) store->keep_bytes += bytes;

    /* What stands behind the payload in its last page goes to disk too: no old bytes there. */
    uint8_t *payload = kv_entry_payload(store, entry);
    size_t length    = (size_t)extent->part_count * extent->part_bytes;
    size_t end       = (size_t)kv_record_payload_pages(extent->part_count, extent->part_bytes);
    memset(payload + length, 0, end * KV_PAGE - length);
    *out = (struct kv_slot){.address = payload, .entry = index};
    return KV_OK;
}

/* The newer record of a key takes over from the older one, its waiters included. */
static void replace(struct kv_store *store, uint32_t old_index, struct kv_entry *entry) {
    struct kv_entry *old = kv_store_entry(store, old_index);
    entry->logged        = old->logged;
    entry->protected_us  = old->protected_us;
    if (old->protected_counted) {
        entry->protected_counted = true;
        store->protected_bytes += (uint64_t)kv_entry_pages(entry) * KV_PAGE;
    }
    entry->syncs         = old->syncs;
    old->syncs           = NULL;
    kv_entry_forget(store, old_index, KV_NOT_FOUND);
}

void kv_store_commit(struct kv_store *store, const struct kv_slot *slot, bool pinned) {
    KV_CHECK(pthread_equal(store->thread, pthread_self()));
    struct kv_entry *entry = kv_store_entry(store, slot->entry);
    KV_CHECK(entry->state == KV_ENTRY_FILLING);
    uint32_t old = kv_table_find(store->table, &entry->key, KV_KIND_VISIBLE);
    if (old != KV_ENTRY_NONE) replace(store, old, entry);

    entry->state      = KV_ENTRY_RESIDENT;
    entry->sequence   = store->next_sequence++;
    entry->arrived_us = store->now_us;
    store->filling--;
    store->resident++;
    if (pinned) {
        entry->pins = entry->commit_pins = 1;
        store->pinned++;
    }
    if (store->has_disk) {
        entry->disk = KV_DISK_QUEUED;
        kv_list_push(store->table, &store->dirty, KV_LINK_AGE, slot->entry);
    }
    kv_entry_settle(store, slot->entry);
}

void kv_store_abandon(struct kv_store *store, const struct kv_slot *slot) {
    KV_CHECK(pthread_equal(store->thread, pthread_self()));
    struct kv_entry *entry = kv_store_entry(store, slot->entry);
    KV_CHECK(entry->state == KV_ENTRY_FILLING);
    store->filling--;
    store->visible--;
    if (entry->class == KV_CLASS_KEEP)
        store->keep_bytes -= (uint64_t)kv_entry_pages(entry) * KV_PAGE;
    entry->state = KV_ENTRY_GONE;
    kv_entry_settle(store, slot->entry);
}

/* ---- Waiting for a write ------------------------------------------------------------------- */

void kv_sync_finish(struct kv_store *store, struct kv_sync *sync, enum kv_status status) {
    sync->status_private = status;
    sync->next_private   = NULL;
    if (store->syncs_done.head == NULL) {
        store->syncs_done.head = sync;
    } else {
        store->syncs_done.tail->next_private = sync;
    }
    store->syncs_done.tail = sync;
}

void kv_sync_finish_all(struct kv_store *store, struct kv_sync **list, enum kv_status status) {
    while (*list != NULL) {
        struct kv_sync *sync = *list;
        *list                = sync->next_private;
        kv_sync_finish(store, sync, status);
    }
}

/* The record is at (slot, number): who wants it SYNCED goes on waiting, for the segment. */
static void sync_segment(struct kv_store *store, struct kv_sync *sync, uint32_t slot,
                         uint64_t number) {
    struct kv_segment *segment = kv_log_segment(store->log, slot);
    if (sync->durability == KV_WRITTEN || number <= segment->synced) {
        kv_sync_finish(store, sync, KV_OK);
        return;
    }
    if (segment->state == KV_SEGMENT_FAILED) {
        kv_sync_finish(store, sync, KV_IO_ERROR);
        return;
    }
    sync->number_private = number;
    sync->next_private   = segment->syncs;
    segment->syncs       = sync;
    kv_log_want_sync(store->log, slot);
}

void kv_sync_written(struct kv_store *store, struct kv_sync **list, uint32_t slot,
                     uint64_t number) {
    while (*list != NULL) {
        struct kv_sync *sync = *list;
        *list                = sync->next_private;
        sync_segment(store, sync, slot, number);
    }
}

void kv_store_sync(struct kv_store *store, struct kv_sync *sync) {
    KV_CHECK(pthread_equal(store->thread, pthread_self()));
    KV_CHECK(sync->durability == KV_WRITTEN || sync->durability == KV_SYNCED);
    if (!store->has_disk) {
        kv_sync_finish(store, sync, KV_UNAVAILABLE);
        return;
    }
    uint32_t index = kv_table_find(store->table, &sync->key, KV_KIND_VISIBLE);
    if (index == KV_ENTRY_NONE)
        index = kv_table_find(store->table, &sync->key, KV_KIND_TOMBSTONE);
    if (index == KV_ENTRY_NONE) {
        kv_sync_finish(store, sync, KV_NOT_FOUND);
        return;
    }
    struct kv_entry *entry = kv_store_entry(store, index);
    if (entry->disk == KV_DISK_WRITTEN) {
        sync_segment(store, sync, entry->segment, entry->write_number);
        return;
    }
    /* No write will be tried before the pause is over; or there is no room. */
    if (kv_log_is_paused(store->log) || kv_store_reclaim_full(store)) {
        kv_sync_finish(store, sync, KV_IO_ERROR);
        return;
    }
    sync->next_private = entry->syncs;
    entry->syncs       = sync;
}

void kv_store_on_sync(void *context, uint32_t slot, int error) {
    struct kv_store *store     = context;
    struct kv_segment *segment = kv_log_segment(store->log, slot);
    struct kv_sync *waiting    = segment->syncs;
    segment->syncs             = NULL;
    while (waiting != NULL) {
        struct kv_sync *sync = waiting;
        waiting              = sync->next_private;
        sync_segment(store, sync, slot, sync->number_private);
    }
    if (error == 0) return;
    /* Nothing that was written since the last good sync can be relied on any more. */
    for (uint32_t index = segment->live.head; index != KV_ENTRY_NONE;) {
        struct kv_entry *entry = kv_store_entry(store, index);
        uint32_t next          = entry->live.next;
        if (entry->write_number > segment->synced)
            kv_entry_lose_disk(store, index, KV_IO_ERROR);
        index = next;
    }
    store->stats.segments_lost++;
}

/* ---- Writing ------------------------------------------------------------------------------- */

struct kv_transfer *kv_transfer_take(struct kv_store *store) {
    struct kv_transfer *transfer = store->transfers_free;
    if (transfer == NULL) return NULL;
    store->transfers_free = transfer->next_free;
    store->transfers_in_use++;
    transfer->error    = 0;
    transfer->pending  = 0;
    transfer->pin      = NULL;
    transfer->began_us = store->now_us;
    return transfer;
}

void kv_transfer_give(struct kv_store *store, struct kv_transfer *transfer) {
    transfer->next_free   = store->transfers_free;
    store->transfers_free = transfer;
    store->transfers_in_use--;
}

static void write_failed(struct kv_store *store, uint32_t index) {
    struct kv_entry *entry = kv_store_entry(store, index);
    if (entry->failures < UINT8_MAX) entry->failures++;
    kv_sync_finish_all(store, &entry->syncs, KV_IO_ERROR);
    if (entry->state == KV_ENTRY_GONE) return;
    entry->disk = KV_DISK_QUEUED;
    kv_list_push(store->table, &store->dirty, KV_LINK_AGE, index);
}

static void write_succeeded(struct kv_store *store, uint32_t index, const struct kv_place *place,
                            uint64_t number) {
    struct kv_entry *entry = kv_store_entry(store, index);
    store->stats.bytes_written += (uint64_t)kv_entry_pages(entry) * KV_PAGE;
    entry->failures = 0;
    kv_sync_written(store, &entry->syncs, place->slot, number);
    if (entry->state == KV_ENTRY_GONE) return; /* dropped meanwhile: a tombstone follows */
    if (entry->state == KV_ENTRY_TOMBSTONE) {
        entry->state = KV_ENTRY_GONE;
        return;
    }
    store->stats.spills++;
    struct kv_segment *segment = kv_log_segment(store->log, place->slot);
    if (segment->state == KV_SEGMENT_FAILED) { /* its sync failed while this was in flight */
        kv_entry_rewrite(store, index);
        return;
    }
    store->on_disk++;
    entry->disk         = KV_DISK_WRITTEN;
    entry->segment      = place->slot;
    entry->page         = place->page;
    entry->write_number = number;
    entry->used         = false;
    kv_list_push(store->table, &segment->live, KV_LINK_LIVE, index);
}

static void write_done(struct kv_io_request *request) {
    struct kv_transfer *transfer = request->owner;
    struct kv_store *store       = transfer->store;
    struct kv_place place        = transfer->place;
    uint32_t index               = transfer->entry;
    int error                    = request->error;
    kv_transfer_give(store, transfer);
    store->writes_in_flight--;
    kv_store_entry(store, index)->transfers--;

    uint64_t number = kv_log_written(store->log, &place, error);
    if (error != 0) {
        write_failed(store, index);
    } else {
        store->reclaim.fruitless = 0;
        write_succeeded(store, index, &place, number);
    }
    kv_entry_settle(store, index);
}

static void write_start(struct kv_store *store, uint32_t index, struct kv_record *record,
                        const struct kv_place *place) {
    struct kv_entry *entry       = kv_store_entry(store, index);
    struct kv_transfer *transfer = kv_transfer_take(store);
    KV_CHECK(transfer != NULL);
    bool tombstone  = entry->state == KV_ENTRY_TOMBSTONE;
    uint8_t *memory = tombstone ? transfer->page : kv_store_unit_memory(store, entry->unit);
    uint8_t *payload = tombstone ? NULL : kv_entry_payload(store, entry);
    kv_record_encode(&kv_log_segment(store->log, place->slot)->header, record, payload, memory);

    kv_list_remove(store->table, KV_LINK_AGE, index);
    entry->disk   = KV_DISK_WRITING;
    entry->logged = true;
    entry->transfers++;
    store->writes_in_flight++;
    transfer->entry      = index;
    transfer->place      = *place;
    transfer->pending    = 1;
    transfer->request[0] = (struct kv_io_request){
        .kind    = KV_IO_WRITE,
        .file    = kv_log_file(place->slot),
        .memory  = memory,
        .bytes   = (uint64_t)kv_record_pages(record->part_count, record->part_bytes) * KV_PAGE,
        .offset  = (uint64_t)place->page * KV_PAGE,
        .on_done = write_done,
        .owner   = transfer,
    };
    kv_io_submit(kv_log_io(store->log), &transfer->request[0]);
}

static struct kv_record record_of(const struct kv_entry *entry) {
    struct kv_record record = {.key = entry->key, .sequence = entry->sequence};
    if (entry->state == KV_ENTRY_TOMBSTONE) {
        record.kind = KV_RECORD_TOMBSTONE;
        return record;
    }
    record.kind       = entry->class == KV_CLASS_KEEP ? KV_RECORD_KEEP : KV_RECORD_BLOCK;
    record.tag        = entry->extent.tag;
    record.part_count = entry->extent.part_count;
    record.part_bytes = entry->extent.part_bytes;
    return record;
}

void kv_store_write_pump(struct kv_store *store) {
    uint64_t budget = KV_POLL_CRC_BYTES;
    while (store->dirty.head != KV_ENTRY_NONE && budget > 0 && store->transfers_free != NULL) {
        uint32_t index          = store->dirty.head;
        struct kv_record record = record_of(kv_store_entry(store, index));
        struct kv_place place;
        enum kv_status status = kv_log_place(store->log, &record, false, &place);
        if (status == KV_BUSY) store->room_wanted = true;
        if (status == KV_IO_ERROR && store->refused_us != store->log->paused_until_us) {
            store->refused_us = store->log->paused_until_us; /* once per pause */
            kv_store_write_refuse(store);
        }
        if (status != KV_OK) break;
        uint64_t bytes = (uint64_t)record.part_count * record.part_bytes;
        budget -= bytes < budget ? bytes : budget;
        write_start(store, index, &record, &place);
    }
}

void kv_store_write_refuse(struct kv_store *store) {
    for (uint32_t index = store->dirty.head; index != KV_ENTRY_NONE;) {
        struct kv_entry *entry = kv_store_entry(store, index);
        kv_sync_finish_all(store, &entry->syncs, KV_IO_ERROR);
        index = entry->age.next;
    }
}
