/* SPDX-License-Identifier: Apache-2.0 */
/* store.c - opens and closes the store, answers questions, and turns the wheel.
 *
 * One turn (kv_store_poll) is: note what I/O has finished; let the log, the reclaimer, the readers
 * and the writers each go as far as they can; hand new I/O to the kernel in one call; and only then
 * run the callers' callbacks, so that whatever they call finds the store between two turns. */
#include "storage/store_internal.h"

#include "proto/kv_check.h"
#include "storage/clock.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

enum {
    SEGMENT_BYTES_DEFAULT = 64 << 20,
    SEGMENT_BYTES_UNIT    = 1 << 20,
    SEGMENTS_MIN          = 4,
    ENTRIES_SPARE         = 256, /* tombstones on their way, records replaced but still held */
    THREADS_MAX           = 32,
    SWEEP_US              = 100 * 1000,
    CLOSE_US              = 60 * 1000 * 1000, /* a disk that hangs does not keep us for ever */
};

static void on_thread(const struct kv_store *store) {
    KV_CHECK(pthread_equal(store->thread, pthread_self()));
}

/* ---- Open ---------------------------------------------------------------------------------- */

static enum kv_status options_check(const struct kv_store_options *options, char *why,
                                    size_t why_bytes) {
    const char *wrong = NULL;
    if (options->arena_bytes == 0 || options->arena_bytes % (2 << 20) != 0)
        wrong = "arena_bytes must be a positive multiple of 2 MiB";
    else if (options->arena_bytes / KV_ARENA_UNIT > 1u << 31)
        wrong = "arena_bytes must be at most 8 TiB";
    else if (options->blocks_max < 1 || options->blocks_max > 1u << 28)
        wrong = "blocks_max must be 1 to 2^28";
    else if (options->io_depth < 1 || options->io_depth > 256)
        wrong = "io_depth must be 1 to 256";
    else if (options->path != NULL && options->segment_bytes % SEGMENT_BYTES_UNIT != 0)
        wrong = "segment_bytes must be a multiple of 1 MiB";
    else if (options->path != NULL && options->segment_bytes > 1ull << 40)
        wrong = "segment_bytes must be at most 1 TiB";
    else if (options->path != NULL &&
             options->disk_bytes / SEGMENTS_MIN <
                 (options->segment_bytes != 0 ? options->segment_bytes : SEGMENT_BYTES_DEFAULT))
        wrong = "disk_bytes must hold at least 4 segments";
    if (wrong == NULL) return KV_OK;
    snprintf(why, why_bytes, "%s", wrong);
    return KV_INVALID;
}

static enum kv_status arena_open(struct kv_store *store) {
    void *memory          = NULL;
    enum kv_status status = kv_device_alloc(store->options.device, KV_MEMORY_PINNED,
                                            store->options.arena_bytes, &memory);
    if (status != KV_OK) return status;
    store->memory = memory;
    /* Before it is touched: a request of 1 MiB in 4 KiB pages is more pieces than most disks take at
     * once, and is split.  Measured on spills of 1 MiB: 0.91 of fio without, 1.16 with. */
    madvise(memory, store->options.arena_bytes, MADV_HUGEPAGE);
    return kv_arena_open((uint32_t)(store->options.arena_bytes / KV_ARENA_UNIT), &store->arena);
}

static enum kv_status transfers_open(struct kv_store *store) {
    uint32_t count         = store->options.io_depth;
    store->transfers       = calloc(count, sizeof *store->transfers);
    store->transfer_pages  = aligned_alloc(KV_PAGE, (size_t)count * KV_PAGE);
    store->reclaim.buffer  = aligned_alloc(KV_PAGE, KV_CARRY_BYTES);
    store->reclaim.header  = aligned_alloc(
        KV_PAGE, (size_t)kv_record_header_pages(KV_RECORD_PARTS_MAX) * KV_PAGE);
    if (store->transfers == NULL || store->transfer_pages == NULL ||
        store->reclaim.buffer == NULL || store->reclaim.header == NULL)
        return KV_BUSY;
    store->transfer_count   = count;
    store->transfers_in_use = count;
    for (uint32_t i = 0; i < count; i++) {
        store->transfers[i].store = store;
        store->transfers[i].page  = store->transfer_pages + (size_t)i * KV_PAGE;
        kv_transfer_give(store, &store->transfers[i]);
    }
    return KV_OK;
}

static enum kv_status disk_open(struct kv_store *store, char *why, size_t why_bytes) {
    const struct kv_store_options *options = &store->options;
    struct kv_log_options log              = {
                     .path          = options->path,
                     .disk_bytes    = options->disk_bytes,
                     .segment_bytes = options->segment_bytes,
                     .io_depth      = 2 * options->io_depth + 1, /* parts take two requests, carrying one */
                     .io_threads    = options->io_depth < THREADS_MAX ? options->io_depth : THREADS_MAX,
                     .use_threads   = options->io_threads,
                     .memory        = store->memory,
                     .memory_bytes  = options->arena_bytes,
                     .sync_ms       = options->sync_ms,
                     .on_sync       = kv_store_on_sync,
                     .context       = store,
    };
    enum kv_status status = kv_log_open(&log, &store->log, why, why_bytes);
    if (status != KV_OK) return status;
    snprintf(store->io_reason, sizeof store->io_reason, "%s%s%s",
             kv_io_reason(kv_log_io(store->log)),
             store->log->buffered && kv_io_reason(kv_log_io(store->log))[0] != 0 ? "; " : "",
             store->log->buffered ? "buffered: the file system refuses O_DIRECT" : "");
    return kv_store_recover(store, why, why_bytes);
}

static void store_free(struct kv_store *store) {
    kv_log_close(store->log);
    kv_table_close(store->table);
    kv_arena_close(store->arena);
    if (store->memory != NULL)
        kv_device_free(store->options.device, KV_MEMORY_PINNED, store->memory,
                       store->options.arena_bytes);
    free(store->transfers);
    free(store->transfer_pages);
    free(store->reclaim.buffer);
    free(store->reclaim.header);
    free(store);
}

enum kv_status kv_store_open(const struct kv_store_options *options, struct kv_store **out,
                             char *why, size_t why_bytes) {
    enum kv_status status = options_check(options, why, why_bytes);
    if (status != KV_OK) return status;
    snprintf(why, why_bytes, "out of memory");
    struct kv_store *store = calloc(1, sizeof *store);
    if (store == NULL) return KV_BUSY;
    store->options       = *options;
    store->has_disk      = options->path != NULL;
    store->thread        = pthread_self();
    store->now_us        = kv_clock_us();
    store->next_sequence = 1;
    store->reclaim.entry = KV_ENTRY_NONE;
    if (store->options.segment_bytes == 0) store->options.segment_bytes = SEGMENT_BYTES_DEFAULT;
    kv_list_init(&store->dirty);
    kv_list_init(&store->reads);
    kv_ages_init(&store->ages, options->arena_bytes / KV_ARENA_UNIT);

    status = kv_table_open(options->blocks_max + ENTRIES_SPARE, &store->table);
    if (status == KV_OK) status = arena_open(store);
    if (status == KV_OK) status = transfers_open(store);
    if (status == KV_OK && store->has_disk) status = disk_open(store, why, why_bytes);
    if (status != KV_OK) {
        store_free(store);
        return status;
    }
    why[0] = 0;
    *out   = store;
    return KV_OK;
}

/* ---- Turning ------------------------------------------------------------------------------- */

static void turn(struct kv_store *store) {
    store->now_us = kv_clock_us();
    if (store->has_disk) {
        kv_io_poll(kv_log_io(store->log));
        kv_log_poll(store->log, store->now_us);
        kv_store_reclaim_pump(store);
    }
    kv_store_read_pump(store);
    if (store->has_disk) {
        kv_store_write_pump(store);
        kv_io_flush(kv_log_io(store->log));
    }
}

/* Taken off first: what a callback adds runs in the next turn. */
static uint32_t callbacks_run(struct kv_store *store) {
    struct kv_sync *sync   = store->syncs_done.head;
    struct kv_pin *pin     = store->pins_done.head;
    store->syncs_done.head = NULL;
    store->pins_done.head  = NULL;
    uint32_t count         = 0;
    for (; sync != NULL; count++) {
        struct kv_sync *next = sync->next_private;
        sync->on_done(sync, sync->status_private);
        sync = next;
    }
    for (; pin != NULL; count++) {
        struct kv_pin *next = pin->next_private;
        pin->on_ready(pin, pin->status_private);
        pin = next;
    }
    return count;
}

uint32_t kv_store_poll(struct kv_store *store) {
    on_thread(store);
    turn(store);
    return callbacks_run(store);
}

/* Whether another turn would get anywhere without any I/O finishing first. */
static bool turn_is_due(const struct kv_store *store) {
    if (store->syncs_done.head != NULL || store->pins_done.head != NULL) return true;
    if (store->reclaim.active && !store->reclaim.busy && store->reclaim.entry == KV_ENTRY_NONE &&
        kv_io_in_flight(store->log->io) == 0)
        return true;
    return store->has_disk && store->dirty.head != KV_ENTRY_NONE && store->transfers_free != NULL &&
           !store->room_wanted && !kv_log_is_paused(store->log);
}

void kv_store_wait(struct kv_store *store, int wake_fd, uint64_t timeout_us) {
    on_thread(store);
    turn(store);
    if (turn_is_due(store)) timeout_us = 0;
    if (!store->has_disk) {
        kv_io_sleep(wake_fd, timeout_us);
        return;
    }
    uint64_t deadline = kv_log_deadline(store->log);
    uint64_t left     = deadline > store->now_us ? deadline - store->now_us : 0;
    kv_io_wait(kv_log_io(store->log), wake_fd, left < timeout_us ? left : timeout_us);
}

/* ---- Close --------------------------------------------------------------------------------- */

void kv_store_close(struct kv_store *store) {
    if (store == NULL) return;
    on_thread(store);
    KV_CHECK(store->filling == 0 && store->pinned == 0);
    if (store->has_disk) {
        uint64_t deadline = kv_clock_us() + CLOSE_US;
        while (store->dirty.head != KV_ENTRY_NONE || store->transfers_in_use > 0 ||
               store->reclaim.active) {
            bool hopeless = kv_log_is_paused(store->log) || kv_store_reclaim_full(store) ||
                            store->now_us > deadline;
            if (hopeless && store->transfers_in_use == 0 && !store->reclaim.busy) break;
            kv_store_wait(store, -1, 10000);
            kv_store_poll(store);
        }
        kv_log_finish(store->log, store->next_sequence, deadline);
        callbacks_run(store); /* whoever still waited for a sync is told what came of it */
    }
    store_free(store);
}

/* ---- Asking -------------------------------------------------------------------------------- */

static enum kv_durability durability_of(const struct kv_store *store,
                                        const struct kv_entry *entry) {
    if (entry->disk != KV_DISK_WRITTEN) return KV_VOLATILE;
    return entry->write_number <= kv_log_segment(store->log, entry->segment)->synced ? KV_SYNCED
                                                                                     : KV_WRITTEN;
}

bool kv_store_find(struct kv_store *store, const struct kv_digest *key,
                   struct kv_block_info *out) {
    on_thread(store);
    uint32_t index = kv_table_find(store->table, key, KV_KIND_VISIBLE);
    if (index == KV_ENTRY_NONE) return false;
    const struct kv_entry *entry = kv_store_entry(store, index);
    *out                         = (struct kv_block_info){
                                .tier       = entry->state == KV_ENTRY_RESIDENT ? KV_TIER_HOST : KV_TIER_NVME,
                                .durability = durability_of(store, entry),
                                .class      = (enum kv_block_class)entry->class,
                                .sequence   = entry->sequence,
                                .extent     = entry->extent,
    };
    return true;
}

bool kv_store_use_copy(struct kv_store *store, const struct kv_digest *key, uint64_t sequence) {
    on_thread(store);
    uint32_t index = kv_table_find(store->table, key, KV_KIND_VISIBLE);
    if (index == KV_ENTRY_NONE) return false;
    struct kv_entry *entry = kv_store_entry(store, index);
    if (entry->sequence != sequence) return false;
    entry->used = true;
    /* On disk it is safe whatever its age in memory, which is wanted for blocks that have no copy.
     * Without a disk the block and its copies live as long as it is in memory. */
    if (!store->has_disk && entry->state == KV_ENTRY_RESIDENT && entry->age.list != NULL) {
        kv_ages_remove(store->table, &store->ages, index);
        kv_ages_use(entry, store->now_us);
        kv_ages_add(store->table, &store->ages, index);
    }
    return true;
}

/* Takes expired protections out of the sum; only when the limit has been met, and not often. */
static void protected_sweep(struct kv_store *store) {
    if (store->now_us < store->swept_us + SWEEP_US) return;
    store->swept_us = store->now_us;
    for (uint32_t index = 0; index < kv_table_capacity(store->table); index++) {
        struct kv_entry *entry = kv_store_entry(store, index);
        if (!kv_entry_visible(entry) || !entry->protected_counted) continue;
        if (kv_entry_protected(store, entry)) continue;
        entry->protected_counted = false;
        store->protected_bytes -= (uint64_t)kv_entry_pages(entry) * KV_PAGE;
    }
}

bool kv_store_protect(struct kv_store *store, const struct kv_digest *key, uint64_t until_us) {
    on_thread(store);
    uint32_t index = kv_table_find(store->table, key, KV_KIND_VISIBLE);
    if (index == KV_ENTRY_NONE) return false;
    struct kv_entry *entry = kv_store_entry(store, index);
    uint64_t bytes         = (uint64_t)kv_entry_pages(entry) * KV_PAGE;
    uint64_t space = store->has_disk ? store->options.disk_bytes : store->options.arena_bytes;
    /* KEEP records are carried anyway and count already. */
    if (!entry->protected_counted && entry->class != KV_CLASS_KEEP) {
        if (store->protected_bytes + store->keep_bytes + bytes > space / 2) protected_sweep(store);
        if (store->protected_bytes + store->keep_bytes + bytes > space / 2) return false;
        entry->protected_counted = true;
        store->protected_bytes += bytes;
    }
    if (until_us > entry->protected_us) entry->protected_us = until_us;
    return true;
}

void kv_store_each(struct kv_store *store, enum kv_block_class class,
                   void (*visit)(void *context, const struct kv_digest *key,
                                 const struct kv_block_extent *extent),
                   void *context) {
    on_thread(store);
    for (uint32_t index = 0; index < kv_table_capacity(store->table); index++) {
        const struct kv_entry *entry = kv_store_entry(store, index);
        if (kv_entry_visible(entry) && entry->class == class)
            visit(context, &entry->key, &entry->extent);
    }
}

/* ---- Forgetting ---------------------------------------------------------------------------- */

enum kv_status kv_store_drop(struct kv_store *store, const struct kv_digest *key) {
    on_thread(store);
    if (kv_table_find(store->table, key, KV_KIND_FILLING) != KV_ENTRY_NONE) return KV_BUSY;
    uint32_t index = kv_table_find(store->table, key, KV_KIND_VISIBLE);
    if (index == KV_ENTRY_NONE) return KV_NOT_FOUND;
    struct kv_entry *entry = kv_store_entry(store, index);
    if (entry->pins > 0 || entry->state == KV_ENTRY_RESTORING) return KV_BUSY;
    if (entry->logged) {
        uint32_t earlier = kv_table_find(store->table, key, KV_KIND_TOMBSTONE);
        if (earlier != KV_ENTRY_NONE && kv_store_entry(store, earlier)->disk == KV_DISK_QUEUED) {
            kv_store_entry(store, earlier)->sequence = store->next_sequence++;
        } else {
            uint32_t tombstone = kv_table_insert(store->table, key, KV_ENTRY_TOMBSTONE);
            if (tombstone == KV_ENTRY_NONE) return KV_BUSY;
            struct kv_entry *stone = kv_store_entry(store, tombstone);
            stone->sequence        = store->next_sequence++;
            stone->disk            = KV_DISK_QUEUED;
            kv_list_push(store->table, &store->dirty, KV_LINK_AGE, tombstone);
        }
    }
    store->stats.drops++;
    kv_entry_forget(store, index, KV_NOT_FOUND);
    return KV_OK;
}

/* ---- Stats --------------------------------------------------------------------------------- */

const struct kv_store_stats *kv_store_stats(const struct kv_store *store) {
    on_thread(store);
    struct kv_store *own         = (struct kv_store *)store; /* the answer lives in the store */
    struct kv_store_stats *stats = &own->stats;
    stats->blocks                = store->visible - store->filling;
    stats->blocks_resident       = store->resident;
    stats->blocks_cold           = stats->blocks - store->resident;
    stats->blocks_on_disk        = store->on_disk;
    stats->io_errors             = store->has_disk ? store->log->io_errors : 0;
    stats->arena_bytes_used = (uint64_t)kv_arena_units_used(store->arena) * KV_ARENA_UNIT;
    stats->disk_bytes_used  = store->has_disk ? kv_log_bytes_used(store->log) : 0;
    return stats;
}

const char *kv_store_io_engine(const struct kv_store *store) {
    return store->has_disk ? kv_io_name(store->log->io) : "none";
}

const char *kv_store_io_reason(const struct kv_store *store) {
    return store->io_reason;
}

/* ---- Memory for others --------------------------------------------------------------------- */

void *kv_store_memory_alloc(struct kv_store *store, size_t bytes) {
    on_thread(store);
    uint64_t units = (bytes + KV_ARENA_UNIT - 1) / KV_ARENA_UNIT;
    if (units == 0 || units > kv_arena_units_total(store->arena)) return NULL;
    uint32_t unit = kv_store_memory_take(store, (uint32_t)units);
    return unit == KV_ARENA_NONE ? NULL : kv_store_unit_memory(store, unit);
}

void kv_store_memory_free(struct kv_store *store, void *memory) {
    on_thread(store);
    size_t offset = (size_t)((uint8_t *)memory - store->memory);
    KV_CHECK(offset < store->options.arena_bytes && offset % KV_ARENA_UNIT == 0);
    kv_arena_free(store->arena, (uint32_t)(offset / KV_ARENA_UNIT));
}
