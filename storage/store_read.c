/* SPDX-License-Identifier: Apache-2.0 */
/* store_read.c - a block's way back: pins, restores, single parts.
 *
 * A pin is started when all the memory it needs could be had at once; until then it waits in line
 * and holds nothing, so two pins can never each hold what the other one needs.
 *
 *   pin_find      every key is there, with the right tag
 *   pin_take      pins on all entries; memory for what is cold, or none of it
 *   pin_proceed   parts are read, restores are awaited
 *   pin_undo      after a failure, when none of its reads is in flight any more
 *
 * A whole block is restored for everybody: the read belongs to the entry, and any number of pins
 * wait for it.  A single part is read for one pin, together with the record's header (identity and
 * the part's checksum), into memory that looks like a short record:
 *
 *     [ header pages ][ the pages that cover the part ]
 *
 * entries_private[i] holds the entry and, in its highest bits, whether block i is such a part,
 * whether this pin has begun the restore of block i, and whether it holds a pin on it. */
#include "storage/store_internal.h"

#include "proto/kv_check.h"
#include "storage/clock.h"

#include <errno.h>

#define OWN_PART 0x80000000u
#define BEGUN 0x40000000u
#define TAKEN 0x20000000u
#define ENTRY_MASK 0x1fffffffu

static uint32_t pin_entry(const struct kv_pin *pin, uint32_t block) {
    return pin->entries_private[block] & ENTRY_MASK;
}

static void pin_push(struct kv_pin_list *list, struct kv_pin *pin) {
    pin->next_private = NULL;
    if (list->head == NULL) {
        list->head = pin;
    } else {
        list->tail->next_private = pin;
    }
    list->tail = pin;
}

static struct kv_pin *pin_pop(struct kv_pin_list *list) {
    struct kv_pin *pin = list->head;
    if (pin != NULL) list->head = pin->next_private;
    return pin;
}

static void pin_finish(struct kv_store *store, struct kv_pin *pin, enum kv_status status) {
    pin->status_private = status;
    pin_push(&store->pins_done, pin);
}

/* ---- Parts --------------------------------------------------------------------------------- */

struct part {
    uint32_t header_pages;
    uint32_t page, pages; /* in the record: the pages that cover the part */
    uint32_t skip;        /* where in the first of them it begins */
};

static struct part part_of(const struct kv_entry *entry, int32_t part) {
    struct part found = {.header_pages = kv_record_header_pages(entry->extent.part_count)};
    kv_record_part_range(entry->extent.part_count, entry->extent.part_bytes, (uint32_t)part,
                         &found.page, &found.pages, &found.skip);
    return found;
}

/* The arena unit that a pin's part was read into, from the address it was given. */
static uint32_t part_unit(const struct kv_store *store, const struct part *part,
                          const uint8_t *address) {
    size_t offset = (size_t)(address - store->memory) - part->skip;
    return (uint32_t)(offset / KV_ARENA_UNIT) - part->header_pages;
}

static void part_give(struct kv_store *store, struct kv_pin *pin, uint32_t block) {
    struct part part = part_of(kv_store_entry(store, pin_entry(pin, block)), pin->part);
    kv_arena_free(store->arena, part_unit(store, &part, pin->addresses[block]));
}

/* ---- Taking what a pin needs --------------------------------------------------------------- */

static enum kv_status pin_find(struct kv_store *store, struct kv_pin *pin) {
    for (uint32_t block = 0; block < pin->count; block++) {
        pin->failed    = block;
        uint32_t index = kv_table_find(store->table, &pin->keys[block], KV_KIND_VISIBLE);
        if (index == KV_ENTRY_NONE) return KV_NOT_FOUND;
        const struct kv_entry *entry = kv_store_entry(store, index);
        if (entry->extent.tag != pin->tag) return KV_MISMATCH;
        if (pin->part >= 0 && (uint32_t)pin->part >= entry->extent.part_count) return KV_INVALID;
        pin->entries_private[block] = index;
    }
    return KV_OK;
}

static bool pin_is_resident(struct kv_store *store, const struct kv_pin *pin) {
    for (uint32_t block = 0; block < pin->count; block++) {
        if (kv_store_entry(store, pin_entry(pin, block))->state != KV_ENTRY_RESIDENT) return false;
    }
    return true;
}

/* Where the caller finds block `block` when its entry is RESIDENT. */
static void pin_address(struct kv_store *store, struct kv_pin *pin, uint32_t block) {
    const struct kv_entry *entry = kv_store_entry(store, pin_entry(pin, block));
    size_t offset = pin->part < 0 ? 0 : (size_t)pin->part * entry->extent.part_bytes;
    pin->addresses[block] = kv_entry_payload(store, entry) + offset;
}

static void restore_cancel(struct kv_store *store, uint32_t index) {
    struct kv_entry *entry = kv_store_entry(store, index);
    kv_list_remove(store->table, KV_LINK_AGE, index);
    kv_arena_free(store->arena, entry->unit);
    entry->unit  = KV_ARENA_NONE;
    entry->state = KV_ENTRY_COLD;
}

/* Memory for one block that is not resident.  False: there is none. */
static bool pin_take_block(struct kv_store *store, struct kv_pin *pin, uint32_t block) {
    uint32_t index         = pin_entry(pin, block);
    struct kv_entry *entry = kv_store_entry(store, index);
    if (entry->state == KV_ENTRY_RESIDENT) return true;
    pin->cold[block] = true;
    pin->from_disk++;
    if (entry->state == KV_ENTRY_RESTORING) return true; /* for somebody else; we wait too */
    KV_CHECK(entry->state == KV_ENTRY_COLD);

    if (pin->part >= 0) {
        struct part part = part_of(entry, pin->part);
        uint32_t unit    = kv_store_memory_take(store, part.header_pages + part.pages);
        if (unit == KV_ARENA_NONE) return false;
        pin->addresses[block] =
            kv_store_unit_memory(store, unit + part.header_pages) + part.skip;
        pin->entries_private[block] |= OWN_PART;
        return true;
    }
    uint32_t unit = kv_store_memory_take(store, kv_entry_pages(entry));
    if (unit == KV_ARENA_NONE) return false;
    entry->unit   = unit;
    entry->state  = KV_ENTRY_RESTORING;
    entry->status = KV_OK;
    kv_list_push(store->table, &store->reads, KV_LINK_AGE, index);
    pin->entries_private[block] |= BEGUN;
    return true;
}

static void pin_hold(struct kv_store *store, struct kv_pin *pin, uint32_t block) {
    kv_entry_pin(store, pin_entry(pin, block));
    pin->entries_private[block] |= TAKEN;
}

static void pin_give_all(struct kv_store *store, struct kv_pin *pin) {
    for (uint32_t block = 0; block < pin->count; block++) {
        if (pin->entries_private[block] & OWN_PART) part_give(store, pin, block);
        if (pin->entries_private[block] & TAKEN) kv_entry_unpin(store, pin_entry(pin, block));
        pin->entries_private[block] = pin_entry(pin, block);
    }
}

/* After pin_take_*() has failed at `block`: everything as it was. */
static bool pin_undo(struct kv_store *store, struct kv_pin *pin, uint32_t block) {
    pin->failed = block;
    for (uint32_t i = 0; i < pin->count; i++) {
        if (pin->entries_private[i] & BEGUN) restore_cancel(store, pin_entry(pin, i));
    }
    pin_give_all(store, pin);
    return false;
}

static void pin_clear(struct kv_pin *pin) {
    pin->from_disk = 0;
    memset(pin->cold, 0, sizeof pin->cold);
}

/* What is in memory stays there, and the rest is found room for beside it. */
static bool pin_take_all(struct kv_store *store, struct kv_pin *pin) {
    pin_clear(pin);
    for (uint32_t block = 0; block < pin->count; block++) {
        pin_hold(store, pin, block); /* all of them first: so that none evicts another */
    }
    for (uint32_t block = 0; block < pin->count; block++) {
        if (!pin_take_block(store, pin, block)) return pin_undo(store, pin, block);
    }
    return true;
}

/* The same for parts when memory is short: whole blocks of this very pin may be evicted, and their
 * parts read instead, so that all fit as long as the parts do. */
static bool pin_take_parts(struct kv_store *store, struct kv_pin *pin) {
    pin_clear(pin);
    for (int sweep = 0; sweep < 2; sweep++) {
        for (uint32_t block = 0; block < pin->count; block++) {
            if (pin->entries_private[block] & TAKEN) continue;
            const struct kv_entry *entry = kv_store_entry(store, pin_entry(pin, block));
            if (sweep == 0 && entry->state == KV_ENTRY_RESIDENT) continue;
            pin_hold(store, pin, block);
            if (!pin_take_block(store, pin, block)) return pin_undo(store, pin, block);
        }
    }
    return true;
}

/* All or nothing. */
static bool pin_take(struct kv_store *store, struct kv_pin *pin) {
    return pin_take_all(store, pin) || (pin->part >= 0 && pin_take_parts(store, pin));
}

/* Whether memory may become free without anybody giving up a pin: blocks are being written, and
 * can be evicted then. */
static bool room_will_come(const struct kv_store *store) {
    if (!store->has_disk || kv_log_is_paused(store->log) || kv_store_reclaim_full(store))
        return false;
    return store->dirty.head != KV_ENTRY_NONE || store->writes_in_flight > 0;
}

/* False: it has to wait. */
static bool pin_start(struct kv_store *store, struct kv_pin *pin) {
    enum kv_status status = pin_find(store, pin);
    if (status != KV_OK) {
        pin_finish(store, pin, status);
        return true;
    }
    if (!pin_take(store, pin)) {
        if (room_will_come(store)) return false;
        pin_finish(store, pin, KV_BUSY);
        return true;
    }
    pin->ready_private = pin->issued_private = pin->reading_private = 0;
    pin->status_private                                             = KV_OK;
    pin_push(&store->pins_active, pin);
    return true;
}

static void pin_check(const struct kv_store *store, const struct kv_pin *pin) {
    KV_CHECK(pthread_equal(store->thread, pthread_self()));
    KV_CHECK(pin->count >= 1 && pin->count <= KV_PIN_MAX);
}

void kv_store_pin(struct kv_store *store, struct kv_pin *pin) {
    pin_check(store, pin);
    if (store->pins_waiting.head != NULL &&
        (pin_find(store, pin) != KV_OK || !pin_is_resident(store, pin))) {
        pin_push(&store->pins_waiting, pin); /* behind those who came first */
        return;
    }
    if (!pin_start(store, pin)) pin_push(&store->pins_waiting, pin);
}

enum kv_status kv_store_pin_now(struct kv_store *store, struct kv_pin *pin) {
    pin_check(store, pin);
    enum kv_status status = pin_find(store, pin);
    if (status != KV_OK) return status;
    if (!pin_is_resident(store, pin)) return KV_BUSY;
    bool taken = pin_take(store, pin);
    KV_CHECK(taken);
    for (uint32_t block = 0; block < pin->count; block++) pin_address(store, pin, block);
    return KV_OK;
}

void kv_store_unpin(struct kv_store *store, struct kv_pin *pin) {
    pin_check(store, pin);
    pin_give_all(store, pin);
}

void kv_store_unpin_key(struct kv_store *store, const struct kv_digest *key) {
    KV_CHECK(pthread_equal(store->thread, pthread_self()));
    uint32_t index = kv_table_find_gone_pinned(store->table, key);
    if (index == KV_ENTRY_NONE) index = kv_table_find(store->table, key, KV_KIND_VISIBLE);
    KV_CHECK(index != KV_ENTRY_NONE);
    struct kv_entry *entry = kv_store_entry(store, index);
    KV_CHECK(entry->commit_pins > 0);
    entry->commit_pins--;
    kv_entry_unpin(store, index);
}

/* ---- Reading ------------------------------------------------------------------------------- */

/* What was found at the entry's place is that block's record, as far as the header says. */
static bool header_valid(struct kv_store *store, const struct kv_transfer *transfer,
                         const uint8_t *header) {
    const struct kv_entry *entry = kv_store_entry(store, transfer->entry);
    struct kv_record record;
    size_t bytes = (size_t)kv_record_header_pages(entry->extent.part_count) * KV_PAGE;
    return kv_record_decode(&kv_log_segment(store->log, transfer->place.slot)->header,
                            transfer->place.page, header, bytes, &record) &&
           kv_digest_equal(&record.key, &entry->key) && record.sequence == entry->sequence &&
           record.part_count == entry->extent.part_count &&
           record.part_bytes == entry->extent.part_bytes && record.tag == entry->extent.tag;
}

static void measure(struct kv_store *store, const struct kv_transfer *transfer, uint64_t bytes) {
    uint64_t took    = kv_clock_us() - transfer->began_us;
    uint64_t per_mib = (took << 20) / (bytes > 0 ? bytes : 1);
    uint64_t before  = store->stats.restore_us_per_mib;
    store->stats.restore_us_per_mib = before == 0 ? per_mib + 1 : (7 * before + per_mib) / 8 + 1;
    store->stats.bytes_read += bytes;
}

/* The record on disk is not what was written. */
static void quarantine(struct kv_store *store, uint32_t index) {
    struct kv_entry *entry = kv_store_entry(store, index);
    store->stats.corruptions++;
    if (entry->state == KV_ENTRY_RESIDENT && entry->disk == KV_DISK_WRITTEN) {
        kv_entry_rewrite(store, index);
    } else if (kv_entry_visible(entry)) {
        kv_entry_forget(store, index, KV_CORRUPT);
    }
}

static void transfer_start(struct kv_store *store, struct kv_transfer *transfer, uint32_t index,
                           void (*on_done)(struct kv_io_request *)) {
    struct kv_entry *entry = kv_store_entry(store, index);
    transfer->entry        = index;
    transfer->place = (struct kv_place){.slot = entry->segment, .page = entry->page};
    entry->transfers++;
    kv_log_segment(store->log, entry->segment)->reads++;
    for (uint32_t i = 0; i < transfer->pending; i++) {
        transfer->request[i].kind    = KV_IO_READ;
        transfer->request[i].file    = kv_log_file(entry->segment);
        transfer->request[i].on_done = on_done;
        transfer->request[i].owner   = transfer;
        kv_io_submit(kv_log_io(store->log), &transfer->request[i]);
    }
}

/* True when both of its requests are done. */
static bool transfer_done(struct kv_transfer *transfer, const struct kv_io_request *request) {
    struct kv_store *store = transfer->store;
    if (request->error != 0) transfer->error = request->error;
    if (--transfer->pending > 0) return false;
    if (transfer->error != 0) store->log->io_errors++;
    kv_store_entry(store, transfer->entry)->transfers--;
    kv_log_segment(store->log, transfer->place.slot)->reads--;
    return true;
}

/* ---- Restoring whole blocks ---------------------------------------------------------------- */

static void restore_done(struct kv_io_request *request) {
    struct kv_transfer *transfer = request->owner;
    struct kv_store *store       = transfer->store;
    uint32_t index               = transfer->entry;
    if (!transfer_done(transfer, request)) return;
    struct kv_entry *entry = kv_store_entry(store, index);
    int error              = transfer->error;
    bool valid             = false;
    if (error == 0) {
        const uint8_t *header = kv_store_unit_memory(store, entry->unit);
        valid = header_valid(store, transfer, header) &&
                kv_record_payload_valid(header, kv_entry_payload(store, entry));
        measure(store, transfer, request->bytes);
    }
    kv_transfer_give(store, transfer);

    if (entry->state == KV_ENTRY_GONE) { /* its copy on disk was lost meanwhile */
        kv_entry_settle(store, index);
        return;
    }
    KV_CHECK(entry->state == KV_ENTRY_RESTORING);
    if (valid) {
        entry->state      = KV_ENTRY_RESIDENT;
        entry->arrived_us = store->now_us;
        store->stats.restores++;
        store->resident++;
        kv_entry_settle(store, index);
        return;
    }
    kv_arena_free(store->arena, entry->unit);
    entry->unit  = KV_ARENA_NONE;
    entry->state = KV_ENTRY_COLD;
    if (error != 0) {
        entry->status = KV_IO_ERROR; /* it may be readable another time */
    } else {
        quarantine(store, index);
    }
}

static void restore_start(struct kv_store *store, struct kv_transfer *transfer, uint32_t index) {
    struct kv_entry *entry = kv_store_entry(store, index);
    kv_list_remove(store->table, KV_LINK_AGE, index);
    transfer->pending    = 1;
    transfer->request[0] = (struct kv_io_request){
        .memory = kv_store_unit_memory(store, entry->unit),
        .bytes  = (uint64_t)kv_entry_pages(entry) * KV_PAGE,
        .offset = (uint64_t)entry->page * KV_PAGE,
    };
    transfer_start(store, transfer, index, restore_done);
}

/* ---- Reading single parts ------------------------------------------------------------------ */

static void part_done(struct kv_io_request *request) {
    struct kv_transfer *transfer = request->owner;
    struct kv_store *store       = transfer->store;
    struct kv_pin *pin           = transfer->pin;
    uint32_t block               = transfer->pin_block;
    uint32_t index               = transfer->entry;
    if (!transfer_done(transfer, request)) return;
    struct kv_entry *entry = kv_store_entry(store, index);
    enum kv_status status  = transfer->error != 0 ? KV_IO_ERROR : KV_OK;
    if (status == KV_OK) {
        struct part part      = part_of(entry, pin->part);
        const uint8_t *header =
            kv_store_unit_memory(store, part_unit(store, &part, pin->addresses[block]));
        measure(store, transfer, (uint64_t)(part.header_pages + part.pages) * KV_PAGE);
        if (!header_valid(store, transfer, header) ||
            !kv_record_part_valid(header, (uint32_t)pin->part, pin->addresses[block]))
            status = KV_CORRUPT;
    }
    kv_transfer_give(store, transfer);
    pin->reading_private--;
    if (status != KV_OK && pin->status_private == KV_OK) {
        pin->status_private = status;
        pin->failed         = block;
    }
    if (status == KV_CORRUPT) quarantine(store, index);
    kv_entry_settle(store, index);
}

static void part_start(struct kv_store *store, struct kv_transfer *transfer, struct kv_pin *pin,
                       uint32_t block) {
    uint32_t index         = pin_entry(pin, block);
    struct kv_entry *entry = kv_store_entry(store, index);
    struct part part       = part_of(entry, pin->part);
    uint8_t *memory =
        kv_store_unit_memory(store, part_unit(store, &part, pin->addresses[block]));
    uint64_t record      = (uint64_t)entry->page * KV_PAGE;
    bool adjacent        = part.page == part.header_pages; /* one read covers both */
    transfer->pin        = pin;
    transfer->pin_block  = block;
    transfer->pending    = adjacent ? 1 : 2;
    transfer->request[0] = (struct kv_io_request){
        .memory = memory,
        .bytes  = (uint64_t)(part.header_pages + (adjacent ? part.pages : 0)) * KV_PAGE,
        .offset = record,
    };
    transfer->request[1] = (struct kv_io_request){
        .memory = memory + (size_t)part.header_pages * KV_PAGE,
        .bytes  = (uint64_t)part.pages * KV_PAGE,
        .offset = record + (uint64_t)part.page * KV_PAGE,
    };
    pin->reading_private++;
    transfer_start(store, transfer, index, part_done);
}

/* ---- Progress ------------------------------------------------------------------------------ */

/* Starts reads of this pin's parts as long as transfers are free. */
static void pin_issue(struct kv_store *store, struct kv_pin *pin) {
    while (pin->issued_private < pin->count && pin->status_private == KV_OK) {
        uint32_t block = pin->issued_private;
        if (pin->entries_private[block] & OWN_PART) {
            struct kv_entry *entry = kv_store_entry(store, pin_entry(pin, block));
            if (entry->state == KV_ENTRY_GONE) { /* its copy on disk was lost meanwhile */
                pin->status_private = entry->status;
                pin->failed         = block;
                return;
            }
            if (entry->state == KV_ENTRY_RESIDENT) { /* somebody else restored it meanwhile */
                part_give(store, pin, block);
                pin->entries_private[block] &= ~OWN_PART;
                pin_address(store, pin, block);
            } else {
                struct kv_transfer *transfer = kv_transfer_take(store);
                if (transfer == NULL) return;
                part_start(store, transfer, pin, block);
            }
        }
        pin->issued_private++;
    }
}

/* Looks at the blocks that others restore for this pin, in order, no further than the first one
 * that is not there yet. */
static void pin_advance(struct kv_store *store, struct kv_pin *pin) {
    while (pin->ready_private < pin->count && pin->status_private == KV_OK) {
        uint32_t block = pin->ready_private;
        if (!(pin->entries_private[block] & OWN_PART)) {
            struct kv_entry *entry = kv_store_entry(store, pin_entry(pin, block));
            if (entry->state == KV_ENTRY_RESTORING) return;
            if (entry->unit == KV_ARENA_NONE || entry->unread) {
                pin->status_private = entry->status;
                pin->failed         = block;
                return;
            }
            pin_address(store, pin, block);
        }
        pin->ready_private++;
    }
}

/* True when the pin is over, one way or the other. */
static bool pin_proceed(struct kv_store *store, struct kv_pin *pin) {
    pin_issue(store, pin);
    pin_advance(store, pin);
    if (pin->reading_private > 0) return false;
    if (pin->status_private != KV_OK) {
        pin_give_all(store, pin);
        pin_finish(store, pin, pin->status_private);
        return true;
    }
    if (pin->issued_private < pin->count || pin->ready_private < pin->count) return false;
    pin_finish(store, pin, KV_OK);
    return true;
}

void kv_store_read_pump(struct kv_store *store) {
    while (store->pins_waiting.head != NULL) {
        struct kv_pin *pin = store->pins_waiting.head;
        struct kv_pin *next = pin->next_private;
        if (!pin_start(store, pin)) break;
        store->pins_waiting.head = next;
    }
    while (store->reads.head != KV_ENTRY_NONE) {
        struct kv_transfer *transfer = kv_transfer_take(store);
        if (transfer == NULL) break;
        restore_start(store, transfer, store->reads.head);
    }
    struct kv_pin_list active = store->pins_active;
    store->pins_active.head   = NULL;
    for (struct kv_pin *pin; (pin = pin_pop(&active)) != NULL;) {
        if (!pin_proceed(store, pin)) pin_push(&store->pins_active, pin);
    }
}
