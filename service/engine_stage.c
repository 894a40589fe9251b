/* SPDX-License-Identifier: Apache-2.0 */
/* engine_stage.c - new tokens into a tail, and full blocks out of it.
 *
 * What an Append and the append half of an Attend share.  A part is staged in up to three steps,
 * and the session shows nothing of it until stage_publish():
 *
 *   reserve   pages for the rows, ids beside them                     (may find no memory)
 *   ingest    rows from the message into the pages, on the lane      (may find NaN)
 *   seal      pages that are due, packed into a block the store has reserved
 *
 * Which block a full one becomes is decided when its first layer is due:
 *
 *   the cache has it               SHARED: ours is dropped, layer by layer, never packed
 *   nobody has it                  FILLING under its digest
 *   somebody is filling it now     FILLING under a private name.  Nobody waits for anybody: the
 *                                  other may be stuck for ever.  Whoever completes second finds
 *                                  the block there and drops its own copy; if we complete first,
 *                                  the cache holds the block twice, which costs memory and nothing
 *                                  else.
 */
#include "service/engine_private.h"

#include <math.h>
#include <stdio.h>

bool energy_valid(const float *energy, size_t count) {
    for (size_t i = 0; i < count; i++)
        if (!(energy[i] >= 0 && energy[i] <= KV_ENERGY_MAX)) return false; /* so is NaN */
    return true;
}

enum kv_status stage_check(struct kv_engine *engine, const struct part *part,
                           uint64_t expected_length, const char **field, char message[160]) {
    const struct session *session = part->session;
    for (uint32_t i = 0; i < part->layer_count; i++) {
        uint32_t length = session->length[part->layer + i];
        if (length == expected_length) continue;
        *field = "expected_length";
        snprintf(message, 160, "layer %u has %u tokens, not %llu", part->layer + i, length,
                 (unsigned long long)expected_length);
        return KV_ABORTED;
    }
    uint32_t max = engine->options.session_tokens_max;
    if (part->tokens > max || expected_length > max - part->tokens) {
        *field = "tokens";
        snprintf(message, 160, "%llu and %u more are beyond the longest session, %u",
                 (unsigned long long)expected_length, part->tokens, max);
        return KV_INVALID;
    }
    return KV_OK;
}

enum kv_status stage_reserve(struct kv_engine *engine, struct part *part, const uint32_t *ids,
                             const char **message) {
    struct session *session = part->session;
    uint64_t begin = session->length[part->layer];
    enum kv_status status = KV_OK;
    for (uint32_t i = 0; i < part->layer_count && status == KV_OK; i++)
        status = session_stage_pages(session, &engine->tail, part->layer + i, part->tokens);
    if (status == KV_OK)
        status = session_stage_ids(session, begin, part->tokens, ids, message);
    if (status != KV_OK) stage_rollback(engine, part);
    return status;
}

/* ---- Rows in -------------------------------------------------------------------------------- */

/* What one layer's rows fill of one page. */
static struct kv_ingest ingest_of(const struct part *part, const struct live_block *live,
                                  uint32_t layer, uint32_t token, uint32_t end) {
    const struct layout_entry *layout = part->session->layout;
    uint32_t begin = part->session->length[layer];
    uint32_t page_end = (live->index + 1) * KV_BLOCK_TOKENS;
    uint32_t last = end < page_end ? end : page_end;
    const uint8_t *keys = part->data + (layer - part->layer) * 2 * part->tokens * layout->row_bytes;
    return (struct kv_ingest){
        .keys = keys + (token - begin) * layout->row_bytes,
        .values = keys + (part->tokens + (token - begin)) * layout->row_bytes,
        .dtype = layout->info.layout.dtype,
        .token = token % KV_BLOCK_TOKENS,
        .tokens = last - token,
        .page = live->pages[layer].raw,
    };
}

void stage_ingest(struct kv_engine *engine, struct lane *lane, struct part *part) {
    const struct session *session = part->session;
    uint32_t count = 0;
    part->fault_first = lane->fault_count;
    for (uint32_t i = 0; i < part->layer_count; i++) {
        uint32_t layer = part->layer + i, token = session->length[layer];
        uint32_t end = token + part->tokens;
        struct live_block *live = session_live(session, token / KV_BLOCK_TOKENS);
        for (; token < end; live = live->next) {
            KV_CHECK(lane->fault_count < engine->fault_max);
            uint32_t *fault = &lane->faults[lane->fault_count++];
            *fault = 0;
            engine->ingests[count] = ingest_of(part, live, layer, token, end);
            engine->ingests[count].fault = fault;
            token += engine->ingests[count].tokens;
            if (++count == KV_ITEMS_MAX) {
                kv_kernel_ingest(lane->stream, &session->layout->shape, count, engine->ingests);
                count = 0;
            }
        }
    }
    if (count) kv_kernel_ingest(lane->stream, &session->layout->shape, count, engine->ingests);
    part->fault_count = lane->fault_count - part->fault_first;
}

/* Finds the page again whose word was set, and says which element that is. */
enum kv_status stage_fault(const struct lane *lane, const struct part *part, char message[160]) {
    const struct kv_layout *layout = &part->session->layout->info.layout;
    uint32_t word = part->fault_first;
    for (uint32_t i = 0; i < part->layer_count; i++) {
        uint32_t token = part->session->length[part->layer + i], end = token + part->tokens;
        while (token < end) {
            uint32_t tokens = KV_BLOCK_TOKENS - token % KV_BLOCK_TOKENS;
            if (tokens > end - token) tokens = end - token;
            uint32_t fault = lane->faults[word++];
            if (fault) {
                uint64_t row = (uint64_t)layout->heads * layout->head_dim;
                uint64_t element = fault - 1;
                bool value = element >= tokens * row;
                if (value) element -= tokens * row;
                snprintf(message, 160,
                         "%s of layer %u, token %llu, head %llu, channel %llu is not finite or "
                         "above 65504",
                         value ? "v" : "k", part->layer + i,
                         (unsigned long long)(token + element / row),
                         (unsigned long long)(element % row / layout->head_dim),
                         (unsigned long long)(element % layout->head_dim));
                return KV_INVALID;
            }
            token += tokens;
        }
    }
    return KV_OK;
}

/* ---- Blocks out ------------------------------------------------------------------------------- */

bool block_find(struct kv_engine *engine, const struct layout_entry *layout, uint32_t index,
                const struct kv_digest *key, struct kv_block_info *info) {
    return kv_store_find(engine->options.store, key, info) && info->extent.tag == layout->tag &&
           info->extent.part_count == layout->info.layout.layers &&
           info->extent.part_bytes == session_page_bytes(layout, index);
}

/* Decides what a full block becomes.  False: there is no room for it now. */
static bool live_resolve(struct kv_engine *engine, struct session *session,
                         struct live_block *live) {
    struct layout_entry *layout = session->layout;
    if (session->ids_mode == IDS_NONE)
        live->digest = kv_digest_private(session->nonce, live->index);
    struct kv_block_info info;
    if (block_find(engine, layout, live->index, &live->digest, &info)) {
        live->state = LIVE_SHARED;
        live->key = live->digest;
        return true;
    }
    const struct kv_block_extent extent = {
        .tag = layout->tag,
        .part_count = layout->info.layout.layers,
        .part_bytes = session_page_bytes(layout, live->index),
    };
    live->key = live->digest;
    enum kv_status status = kv_store_reserve(engine->options.store, &live->key, KV_CLASS_BLOCK,
                                             &extent, &live->slot);
    if (status == KV_EXISTS) {
        live->key = kv_digest_private(session->nonce, live->index);
        status = kv_store_reserve(engine->options.store, &live->key, KV_CLASS_BLOCK, &extent,
                                  &live->slot);
    }
    if (status != KV_OK) return false;
    live->state = LIVE_FILLING;
    live->device = gpu_scratch(engine, (uint64_t)extent.part_count * extent.part_bytes);
    return true;
}

static uint32_t staged_length(const struct part *part, uint32_t layer) {
    return part->session->length[layer] + part->tokens;
}

bool stage_due(const struct part *part) {
    for (uint32_t i = 0; i < part->layer_count; i++) {
        uint32_t layer = part->layer + i;
        const struct live_block *live = part->session->live_first;
        while (live && live->pages[layer].state == PAGE_SEALED) live = live->next;
        if (live && live->pages[layer].state == PAGE_RAW &&
            session_page_due(part->session, live, staged_length(part, layer)))
            return true;
    }
    return false;
}

/* Pages to pack, handed over in lots of KV_ITEMS_MAX.  Sinks are copied: packing by codec RAW. */
struct packing {
    struct kv_engine *engine;
    struct lane *lane;
    const struct layout_entry *layout;
    uint32_t packed, raw, calls;
};

static void packing_flush(struct packing *packing, uint32_t at_least) {
    struct kv_engine *engine = packing->engine;
    if (packing->packed >= at_least) {
        kv_kernel_quantize(packing->lane->stream, &packing->layout->shape, packing->packed,
                           engine->quantizes);
        packing->packed = 0;
        packing->calls++;
    }
    if (packing->raw >= at_least) {
        kv_kernel_quantize(packing->lane->stream, &packing->layout->shape_raw, packing->raw,
                           engine->quantizes_raw);
        packing->raw = 0;
        packing->calls++;
    }
}

static void packing_add(struct packing *packing, const struct live_block *live, uint32_t layer,
                        const float *energy) {
    struct kv_engine *engine = packing->engine;
    uint32_t page_bytes = session_page_bytes(packing->layout, live->index);
    struct kv_quantize item = {
        .raw = live->pages[layer].raw,
        .energy = energy,
        .packed = live_packed(live) + (size_t)layer * page_bytes,
    };
    if (session_block_raw(packing->layout, live->index))
        engine->quantizes_raw[packing->raw++] = item;
    else engine->quantizes[packing->packed++] = item;
    packing_flush(packing, KV_ITEMS_MAX);
}

/* The energy a layer is packed with: what came with this request, or was staged from its rows, or
 * is known from before. */
static const float *energy_of(const struct part *part, uint32_t layer) {
    const struct session *session = part->session;
    size_t count = session->layout->energy_count;
    if (part->energy) return part->energy + (layer - part->layer) * count;
    if (part->observed) return session->energy_staged;
    return session->rows_seen[layer] ? session->energy + layer * count : NULL;
}

static void seal_layer(struct packing *packing, struct part *part, uint32_t layer) {
    struct session *session = part->session;
    /* Of KV_STREAM_DEPTH, as are the copies of blocks that become complete; what is left over is due
     * next time too. */
    enum { CALLS_MAX = 64, COPIES_MAX = 64 };
    uint32_t pages = 0;
    for (struct live_block *live = session->live_first; live; live = live->next) {
        struct live_page *page = &live->pages[layer];
        if (page->state == PAGE_NONE || packing->calls >= CALLS_MAX) return;
        if (page->state == PAGE_SEALED) continue;
        if (packing->engine->gpu && pages++ == COPIES_MAX) return;
        if (!session_page_due(session, live, staged_length(part, layer))) return;
        if (live->state == LIVE_RAW && !live_resolve(packing->engine, session, live)) return;
        page->state = PAGE_SEALING;
        part->sealing = true;
        if (live->state == LIVE_FILLING) packing_add(packing, live, layer, energy_of(part, layer));
    }
}

/* Blocks that are complete once this part is published: from the gpu tier to the store's memory. */
static void copy_complete(struct kv_engine *engine, struct lane *lane, const struct part *part) {
    const struct session *session = part->session;
    uint32_t layers = session->layout->info.layout.layers;
    if (!engine->gpu) return;
    for (const struct live_block *live = session->live_first; live; live = live->next) {
        uint32_t sealing = 0;
        for (uint32_t l = 0; l < layers; l++) sealing += live->pages[l].state == PAGE_SEALING;
        if (live->state != LIVE_FILLING || !live->device || sealing == 0) continue;
        if (live->sealed_count + sealing < layers) continue;
        kv_stream_copy(lane->stream, live->slot.address, live->device,
                       (size_t)layers * session_page_bytes(session->layout, live->index));
    }
}

void stage_seal(struct kv_engine *engine, struct lane *lane, struct part *part) {
    struct packing packing = {.engine = engine, .lane = lane, .layout = part->session->layout};
    for (uint32_t i = 0; i < part->layer_count; i++) seal_layer(&packing, part, part->layer + i);
    packing_flush(&packing, 1);
    copy_complete(engine, lane, part);
}

/* ---- Now it has happened -------------------------------------------------------------------------- */

/* A block whose last page was sealed goes into the cache, unless somebody else's is there. */
static void live_commit(struct kv_engine *engine, struct session *session,
                        struct live_block *live) {
    struct kv_block_info info;
    if (live->state == LIVE_SHARED) {
        engine->stats.blocks_shared++;
    } else if (!kv_digest_equal(&live->key, &live->digest) &&
               block_find(engine, session->layout, live->index, &live->digest, &info)) {
        kv_store_abandon(engine->options.store, &live->slot);
        gpu_scratch_free(engine, live->device);
        live->key = live->digest;
        engine->stats.blocks_shared++;
    } else {
        kv_store_commit(engine->options.store, &live->slot, false);
        gpu_adopt(engine, &live->key, live->device);
        engine->stats.blocks_sealed++;
    }
    live->device = NULL;
}

static void publish_energy(struct part *part, uint32_t layer) {
    struct session *session = part->session;
    size_t bytes = session->layout->energy_count * sizeof(float);
    float *energy = session->energy + layer * session->layout->energy_count;
    if (part->energy) {
        memcpy(energy, energy_of(part, layer), bytes);
        session->rows_seen[layer] = ENERGY_GIVEN_ROWS;
    } else if (part->observed) {
        memcpy(energy, session->energy_staged, bytes);
        session->rows_seen[layer] = *session->rows_staged;
    }
}

void stage_publish(struct kv_engine *engine, struct part *part) {
    struct session *session = part->session;
    for (uint32_t i = 0; i < part->layer_count; i++) {
        publish_energy(part, part->layer + i);
        if (part->tokens) session_publish(session, &engine->tail, part->layer + i, part->tokens);
    }
    session_publish_ids(session);
    engine->stats.tokens_appended += part->tokens;
    session->used_us = engine->now_us;
    for (struct live_block *live; (live = session_complete(session));) {
        live_commit(engine, session, live);
        session_pop(session, &engine->tail);
    }
}

void stage_rollback(struct kv_engine *engine, struct part *part) {
    for (uint32_t i = 0; i < part->layer_count; i++)
        session_rollback(part->session, &engine->tail, part->layer + i);
}
