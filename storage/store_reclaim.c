/* SPDX-License-Identifier: Apache-2.0 */
/* store_reclaim.c - when the disk is full the oldest segment goes.
 *
 *   pick      the oldest segment
 *   sort      each live record: dropped with its block, or carried forward
 *   carry     header read, payload copied a piece at a time and checked on the way, header written
 *             last, so that a record half carried is no record
 *   sync      what was carried must be as safe as it was before the original goes
 *   retire
 *
 * Carried are: records of class KEEP, protected and pinned ones, and blocks that were used since
 * they were written, the last kind up to a quarter of a segment, so that a first-in-first-out disk
 * does not lose what is in daily use.  Copying goes from disk to disk through a buffer of its own
 * and needs no arena memory: reclaiming makes room for blocks that cannot leave the arena before, so
 * it must not wait for the arena itself.
 *
 * If segment after segment has to be carried whole, the disk is full of what must stay: writes are
 * refused for a second, and blocks stay in memory. */
#include "storage/store_internal.h"

#include "proto/kv_check.h"

#include <errno.h>

enum {
    FULL_US = 1000 * 1000,
    SORT_PER_POLL = 256, /* entries dropped before others get their turn */
};

bool kv_store_reclaim_full(const struct kv_store *store) {
    return store->now_us < store->reclaim.full_until_us;
}

/* ---- Carrying one record ------------------------------------------------------------------- */

static void carry_read(struct kv_store *store);

static void carry_submit(struct kv_store *store, enum kv_io_kind kind, uint32_t slot,
                         uint8_t *memory, uint64_t bytes, uint64_t offset,
                         void (*on_done)(struct kv_io_request *)) {
    struct kv_reclaim *reclaim = &store->reclaim;
    KV_CHECK(!reclaim->busy);
    reclaim->busy    = true;
    reclaim->request = (struct kv_io_request){
        .kind    = kind,
        .file    = kv_log_file(slot),
        .memory  = memory,
        .bytes   = bytes,
        .offset  = offset,
        .on_done = on_done,
        .owner   = store,
    };
    kv_io_submit(kv_log_io(store->log), &reclaim->request);
}

/* The record's copy here cannot be read, or its new one not be written. */
static void carry_end(struct kv_store *store, int error, bool corrupt) {
    struct kv_reclaim *reclaim = &store->reclaim;
    uint32_t index             = reclaim->entry;
    struct kv_entry *entry     = kv_store_entry(store, index);
    uint64_t number            = kv_log_written(store->log, &reclaim->to, error);
    reclaim->entry             = KV_ENTRY_NONE;
    entry->transfers--;

    bool still_here = kv_entry_visible(entry) && entry->disk == KV_DISK_WRITTEN &&
                      entry->segment == reclaim->from.slot && entry->page == reclaim->from.page;
    if (corrupt && still_here) {
        store->stats.corruptions++;
        kv_entry_lose_disk(store, index, KV_CORRUPT);
    } else if (error == 0 && still_here) {
        struct kv_segment *target = kv_log_segment(store->log, reclaim->to.slot);
        kv_list_remove(store->table, KV_LINK_LIVE, index);
        kv_list_push(store->table, &target->live, KV_LINK_LIVE, index);
        entry->segment      = reclaim->to.slot;
        entry->page         = reclaim->to.page;
        entry->write_number = number;
        entry->used         = false;
        uint32_t i = 0;
        while (i < reclaim->target_count && reclaim->target[i].slot != reclaim->to.slot) i++;
        if (i < KV_LOG_INDEXES) {
            reclaim->target[i].slot   = reclaim->to.slot;
            reclaim->target[i].number = number;
            if (i == reclaim->target_count) reclaim->target_count++;
        }
        if (target->state == KV_SEGMENT_FAILED) kv_entry_lose_disk(store, index, KV_IO_ERROR);
    }
    kv_entry_settle(store, index);
}

static void carry_failed(struct kv_store *store, int error, bool corrupt) {
    carry_end(store, corrupt ? EBADMSG : error, corrupt);
}

static void carry_header_written(struct kv_io_request *request) {
    struct kv_store *store = request->owner;
    store->reclaim.busy    = false;
    if (request->error != 0) {
        carry_failed(store, request->error, false);
        return;
    }
    carry_end(store, 0, false);
}

static void carry_written(struct kv_io_request *request) {
    struct kv_store *store     = request->owner;
    struct kv_reclaim *reclaim = &store->reclaim;
    reclaim->busy              = false;
    if (request->error != 0) {
        carry_failed(store, request->error, false);
        return;
    }
    store->stats.bytes_written += request->bytes;
    reclaim->done_bytes += request->bytes;
    if (reclaim->done_bytes < reclaim->total_bytes) {
        carry_read(store);
        return;
    }
    struct kv_entry *entry = kv_store_entry(store, reclaim->entry);
    kv_record_move(&kv_log_segment(store->log, reclaim->to.slot)->header, reclaim->to.page,
                   reclaim->header);
    carry_submit(store, KV_IO_WRITE, reclaim->to.slot, reclaim->header,
                 (uint64_t)kv_record_header_pages(entry->extent.part_count) * KV_PAGE,
                 (uint64_t)reclaim->to.page * KV_PAGE, carry_header_written);
}

/* Goes on with the parts' checksums over the next piece of payload.  False: one is wrong. */
static bool carry_check(struct kv_store *store, const uint8_t *memory, uint64_t bytes) {
    struct kv_reclaim *reclaim   = &store->reclaim;
    const struct kv_entry *entry = kv_store_entry(store, reclaim->entry);
    while (bytes > 0 && reclaim->part < entry->extent.part_count) {
        uint64_t now = bytes < reclaim->part_left ? bytes : reclaim->part_left;
        reclaim->crc = kv_crc32c_extend(reclaim->crc, memory, now);
        reclaim->part_left -= now;
        memory += now;
        bytes -= now;
        if (reclaim->part_left > 0) continue;
        if (reclaim->crc != kv_record_part_crc(reclaim->header, reclaim->part)) return false;
        reclaim->part++;
        reclaim->crc       = 0;
        reclaim->part_left = entry->extent.part_bytes;
    }
    return true;
}

static uint64_t carry_offset(struct kv_store *store, const struct kv_place *place) {
    const struct kv_entry *entry = kv_store_entry(store, store->reclaim.entry);
    uint64_t pages = place->page + kv_record_header_pages(entry->extent.part_count);
    return pages * KV_PAGE + store->reclaim.done_bytes;
}

static void carry_piece_read(struct kv_io_request *request) {
    struct kv_store *store     = request->owner;
    struct kv_reclaim *reclaim = &store->reclaim;
    reclaim->busy              = false;
    if (request->error != 0) {
        carry_failed(store, request->error, false);
        return;
    }
    store->stats.bytes_read += request->bytes;
    if (!carry_check(store, reclaim->buffer, request->bytes)) {
        carry_failed(store, 0, true);
        return;
    }
    carry_submit(store, KV_IO_WRITE, reclaim->to.slot, reclaim->buffer, request->bytes,
                 carry_offset(store, &reclaim->to), carry_written);
}

static void carry_read(struct kv_store *store) {
    struct kv_reclaim *reclaim = &store->reclaim;
    uint64_t left              = reclaim->total_bytes - reclaim->done_bytes;
    carry_submit(store, KV_IO_READ, reclaim->from.slot, reclaim->buffer,
                 left < KV_CARRY_BYTES ? left : KV_CARRY_BYTES,
                 carry_offset(store, &reclaim->from), carry_piece_read);
}

static void carry_header_read(struct kv_io_request *request) {
    struct kv_store *store     = request->owner;
    struct kv_reclaim *reclaim = &store->reclaim;
    reclaim->busy              = false;
    if (request->error != 0) {
        carry_failed(store, request->error, false);
        return;
    }
    const struct kv_entry *entry = kv_store_entry(store, reclaim->entry);
    struct kv_record record;
    if (!kv_record_decode(&kv_log_segment(store->log, reclaim->from.slot)->header,
                          reclaim->from.page, reclaim->header, request->bytes, &record) ||
        !kv_digest_equal(&record.key, &entry->key) || record.sequence != entry->sequence) {
        carry_failed(store, 0, true);
        return;
    }
    carry_read(store);
}

static enum kv_status carry_start(struct kv_store *store, uint32_t index) {
    struct kv_reclaim *reclaim = &store->reclaim;
    struct kv_entry *entry     = kv_store_entry(store, index);
    struct kv_record record    = {
           .key        = entry->key,
           .sequence   = entry->sequence,
           .tag        = entry->extent.tag,
           .kind       = entry->class == KV_CLASS_KEEP ? KV_RECORD_KEEP : KV_RECORD_BLOCK,
           .part_count = entry->extent.part_count,
           .part_bytes = entry->extent.part_bytes,
    };
    enum kv_status status = kv_log_place(store->log, &record, true, &reclaim->to);
    if (status != KV_OK) return status;
    entry->transfers++;
    kv_entry_settle(store, index);
    reclaim->entry       = index;
    reclaim->from        = (struct kv_place){.slot = entry->segment, .page = entry->page};
    reclaim->done_bytes  = 0;
    reclaim->total_bytes = (uint64_t)KV_PAGE * kv_record_payload_pages(record.part_count,
                                                                       record.part_bytes);
    reclaim->part        = 0;
    reclaim->part_left   = record.part_bytes;
    reclaim->crc         = 0;
    carry_submit(store, KV_IO_READ, reclaim->from.slot, reclaim->header,
                 (uint64_t)kv_record_header_pages(record.part_count) * KV_PAGE,
                 (uint64_t)reclaim->from.page * KV_PAGE, carry_header_read);
    return KV_OK;
}

/* ---- The segment --------------------------------------------------------------------------- */

static bool must_carry(const struct kv_store *store, const struct kv_entry *entry) {
    return entry->class == KV_CLASS_KEEP || entry->pins > 0 || entry->transfers > 0 ||
           kv_entry_protected(store, entry);
}

/* Blocks in use, as many as have room in a quarter of a segment. */
static bool may_carry(const struct kv_store *store, const struct kv_entry *entry) {
    uint64_t pages = store->reclaim.hot_pages + kv_entry_pages(entry);
    return entry->used && pages * 4 <= store->log->segment_pages;
}

/* Nothing more can be written for a while, and whoever waits for it is told. */
static void disk_is_full(struct kv_store *store) {
    store->reclaim.full_until_us = store->now_us + FULL_US;
    kv_store_write_refuse(store);
}

/* Deals with live records until one has to be carried.  True when none is left. */
static bool segment_sort(struct kv_store *store) {
    struct kv_reclaim *reclaim = &store->reclaim;
    struct kv_segment *segment = kv_log_segment(store->log, reclaim->slot);
    for (int i = 0; i < SORT_PER_POLL && reclaim->entry == KV_ENTRY_NONE; i++) {
        uint32_t index = segment->live.head;
        if (index == KV_ENTRY_NONE) return true;
        struct kv_entry *entry = kv_store_entry(store, index);
        bool must = must_carry(store, entry);
        if (must || may_carry(store, entry)) {
            enum kv_status status = carry_start(store, index);
            if (status == KV_OK && !must) reclaim->hot_pages += kv_entry_pages(entry);
            if (status == KV_OK) continue;
            if (!kv_log_is_stuck(store->log)) {
                if (status == KV_BUSY && kv_log_available(store->log) == 0) disk_is_full(store);
                return false;
            }
            /* Only damage leads here: a crash has left no segment to carry into.  One record is
             * given up so that the others can be kept. */
            kv_entry_lose_disk(store, index, KV_IO_ERROR);
        } else {
            store->stats.drops++;
            kv_entry_forget(store, index, KV_NOT_FOUND);
        }
    }
    return false;
}

/* True when all that was carried is safe, or has been dealt with because its segment failed. */
static bool segment_safe(struct kv_store *store) {
    struct kv_reclaim *reclaim = &store->reclaim;
    bool safe                  = true;
    for (uint32_t i = 0; i < reclaim->target_count; i++) {
        const struct kv_segment *target = kv_log_segment(store->log, reclaim->target[i].slot);
        if (target->state == KV_SEGMENT_FAILED || target->synced >= reclaim->target[i].number)
            continue;
        kv_log_want_sync(store->log, reclaim->target[i].slot);
        safe = false;
    }
    return safe;
}

static void segment_pick(struct kv_store *store) {
    struct kv_reclaim *reclaim = &store->reclaim;
    if (!store->room_wanted && !kv_log_wants_room(store->log)) return;
    if (kv_store_reclaim_full(store)) return;
    if (!kv_log_wants_room(store->log) && store->visible < store->options.blocks_max) {
        store->room_wanted = false; /* it only waits for a segment to be opened */
        return;
    }
    uint32_t slot = kv_log_oldest(store->log);
    if (slot == KV_SEGMENT_NONE) return;
    if (reclaim->fruitless > store->log->segments_max) {
        reclaim->fruitless = 0;
        disk_is_full(store);
        return;
    }
    reclaim->active       = true;
    reclaim->slot         = slot;
    reclaim->hot_pages    = 0;
    reclaim->target_count = 0;
}

bool kv_store_reclaim_entry(struct kv_store *store) {
    if (kv_log_oldest(store->log) != KV_SEGMENT_NONE) return false; /* a whole segment goes */
    for (uint32_t slot = 0; slot < store->log->slot_count; slot++) {
        uint32_t index = kv_log_segment(store->log, slot)->live.head;
        for (; index != KV_ENTRY_NONE; index = kv_store_entry(store, index)->live.next) {
            const struct kv_entry *entry = kv_store_entry(store, index);
            if (entry->class == KV_CLASS_KEEP || entry->pins > 0 || entry->transfers > 0 ||
                entry->state == KV_ENTRY_RESTORING || kv_entry_protected(store, entry))
                continue;
            store->stats.drops++;
            kv_entry_forget(store, index, KV_NOT_FOUND);
            return true;
        }
    }
    return false;
}

void kv_store_reclaim_pump(struct kv_store *store) {
    struct kv_reclaim *reclaim = &store->reclaim;
    if (!reclaim->active) segment_pick(store);
    if (!reclaim->active || reclaim->busy || reclaim->entry != KV_ENTRY_NONE) return;
    struct kv_segment *segment = kv_log_segment(store->log, reclaim->slot);
    if (!segment_sort(store) || segment->reads > 0 || segment->busy || segment->writes > 0 ||
        !segment_safe(store))
        return;
    kv_log_retire(store->log, reclaim->slot);
    reclaim->active = false;
    reclaim->fruitless++;
    store->room_wanted = false;
}
