/* SPDX-License-Identifier: Apache-2.0 */
/* store_entry.c - where an entry stands, and who must make room. */
#include "storage/store_internal.h"

#include "proto/kv_check.h"

bool kv_entry_protected(const struct kv_store *store, const struct kv_entry *entry) {
    return entry->protected_us > store->now_us;
}

static void counted_remove(struct kv_store *store, struct kv_entry *entry) {
    uint64_t bytes = (uint64_t)kv_entry_pages(entry) * KV_PAGE;
    if (entry->class == KV_CLASS_KEEP) store->keep_bytes -= bytes;
    if (entry->protected_counted) store->protected_bytes -= bytes;
    entry->protected_counted = false;
    store->visible--;
    if (entry->state == KV_ENTRY_RESIDENT) store->resident--;
    if (entry->disk == KV_DISK_WRITTEN) store->on_disk--;
}

static void memory_give(struct kv_store *store, struct kv_entry *entry) {
    if (entry->unit == KV_ARENA_NONE) return;
    kv_arena_free(store->arena, entry->unit);
    entry->unit = KV_ARENA_NONE;
}

/* Without a disk what leaves memory is lost, so KEEP stays. */
static bool evictable(const struct kv_store *store, const struct kv_entry *entry) {
    if (entry->state != KV_ENTRY_RESIDENT || entry->pins > 0 || entry->transfers > 0) return false;
    if (store->has_disk) return entry->disk == KV_DISK_WRITTEN;
    return entry->class != KV_CLASS_KEEP;
}

void kv_entry_settle(struct kv_store *store, uint32_t index) {
    struct kv_entry *entry = kv_store_entry(store, index);
    if (entry->state == KV_ENTRY_GONE) {
        if (entry->pins > 0 || entry->transfers > 0) return;
        memory_give(store, entry);
        kv_table_remove(store->table, index);
        return;
    }
    if (evictable(store, entry)) {
        if (entry->age.list == NULL) kv_ages_add(store->table, &store->ages, index);
    } else {
        kv_ages_remove(store->table, &store->ages, index);
    }
}

void kv_entry_pin(struct kv_store *store, uint32_t index) {
    struct kv_entry *entry = kv_store_entry(store, index);
    if (entry->pins++ == 0) store->pinned++;
    kv_ages_use(entry, store->now_us);
    kv_entry_settle(store, index);
}

void kv_entry_unpin(struct kv_store *store, uint32_t index) {
    struct kv_entry *entry = kv_store_entry(store, index);
    KV_CHECK(entry->pins > 0);
    if (--entry->pins == 0) store->pinned--;
    kv_entry_settle(store, index);
}

void kv_entry_forget(struct kv_store *store, uint32_t index, enum kv_status status) {
    struct kv_entry *entry = kv_store_entry(store, index);
    KV_CHECK(kv_entry_visible(entry));
    kv_ages_remove(store->table, &store->ages, index);
    kv_list_remove(store->table, KV_LINK_AGE, index); /* dirty or reads */
    kv_list_remove(store->table, KV_LINK_LIVE, index);
    counted_remove(store, entry);
    kv_sync_finish_all(store, &entry->syncs, KV_NOT_FOUND);
    entry->unread = entry->state == KV_ENTRY_RESTORING;
    entry->state  = KV_ENTRY_GONE;
    entry->status = (uint8_t)status;
    kv_entry_settle(store, index);
}

void kv_entry_rewrite(struct kv_store *store, uint32_t index) {
    struct kv_entry *entry = kv_store_entry(store, index);
    KV_CHECK(entry->state == KV_ENTRY_RESIDENT);
    kv_ages_remove(store->table, &store->ages, index);
    kv_list_remove(store->table, KV_LINK_LIVE, index);
    if (entry->disk == KV_DISK_WRITTEN) store->on_disk--;
    entry->disk = KV_DISK_QUEUED;
    kv_list_push(store->table, &store->dirty, KV_LINK_AGE, index);
}

void kv_entry_lose_disk(struct kv_store *store, uint32_t index, enum kv_status status) {
    struct kv_entry *entry = kv_store_entry(store, index);
    if (entry->state == KV_ENTRY_RESIDENT) {
        kv_entry_rewrite(store, index);
    } else {
        store->stats.drops++;
        kv_entry_forget(store, index, status);
    }
}

/* ---- Making room --------------------------------------------------------------------------- */

/* Protected blocks go back to the young end; they are at most half of the arena, so a victim is
 * found within one round if there is one. */
static uint32_t coldest(struct kv_store *store) {
    for (uint32_t round = kv_table_used(store->table); round > 0; round--) {
        uint32_t index = kv_ages_coldest(&store->ages);
        if (index == KV_ENTRY_NONE || store->has_disk) return index;
        if (!kv_entry_protected(store, kv_store_entry(store, index))) return index;
        kv_ages_remove(store->table, &store->ages, index);
        kv_ages_add(store->table, &store->ages, index);
    }
    return KV_ENTRY_NONE;
}

/* While the disk fails or is full of what must stay, blocks that cannot be written are the last
 * resort: the service goes on without them rather than not at all. */
static bool drop_unwritable(struct kv_store *store) {
    if (!store->has_disk) return false;
    if (!kv_log_is_paused(store->log) && !kv_store_reclaim_full(store)) return false;
    for (uint32_t index = store->dirty.head; index != KV_ENTRY_NONE;) {
        struct kv_entry *entry = kv_store_entry(store, index);
        uint32_t next          = entry->age.next;
        if (entry->state == KV_ENTRY_RESIDENT && entry->pins == 0 &&
            entry->transfers == 0 && entry->class == KV_CLASS_BLOCK &&
            !kv_entry_protected(store, entry)) {
            store->stats.drops++;
            kv_entry_forget(store, index, KV_NOT_FOUND);
            return true;
        }
        index = next;
    }
    return false;
}

bool kv_store_evict_one(struct kv_store *store) {
    uint32_t index = coldest(store);
    if (index == KV_ENTRY_NONE) return drop_unwritable(store);
    struct kv_entry *entry = kv_store_entry(store, index);
    if (!store->has_disk) {
        store->stats.drops++;
        kv_entry_forget(store, index, KV_NOT_FOUND);
        return true;
    }
    store->stats.evictions++;
    store->resident--;
    kv_ages_remove(store->table, &store->ages, index);
    memory_give(store, entry);
    entry->state = KV_ENTRY_COLD;
    entry->hot   = false;
    return true;
}

uint32_t kv_store_memory_take(struct kv_store *store, uint32_t pages) {
    for (;;) {
        uint32_t unit = kv_arena_alloc(store->arena, pages);
        if (unit != KV_ARENA_NONE) return unit;
        if (!kv_store_evict_one(store)) return KV_ARENA_NONE;
    }
}
