/* SPDX-License-Identifier: Apache-2.0 */
/* engine_land.c - pages that go into their block on the thread that received them.
 *
 * A page that stays in 16 bits is only copied, and the thread that has just read it from the socket has it
 * in its cache.  Handing it to the engine, from there to a worker and back costs two or three wake-ups, more
 * than the copy.  So the first page of such a block goes the long way, for the engine has to find room; from
 * then on the block stands here, and the other pages *land*:
 *
 *      lane:    claim the page --> copy it, without the lock --> note that it is in
 *      engine:  open (there is room) ... close (the block is complete, or will never be)
 *
 * The engine hears of a landed page only if all pages of the block are claimed now, or if it was bad.
 *
 * Whose page is it?  The first to claim it: lane or engine.  A page that comes again is nobody's.
 * Whose memory is it?  The lane's from its claim until it notes the page; close() says no meanwhile, and
 * who wanted to free the block does so later.
 * One mutex guards all of it, for some hundred instructions at a time.
 */
#include "service/engine_private.h"

#include <stdlib.h>

struct landing {
    bool open;         /* lanes may claim */
    uint64_t stream;
    struct kv_digest digest;
    const struct layout_entry *layout; /* its info and shape do not change */
    bool raw;
    uint8_t *address;
    uint32_t inside;   /* lanes that copy */
    uint32_t claimed, landed;
    uint8_t pages[KV_LAYERS_MAX / 8]; /* bit: claimed */
    struct landing *next; /* of those that are open */
};

enum kv_status engine_landings_open(struct kv_engine *engine, uint32_t count) {
    pthread_mutex_init(&engine->land_lock, NULL);
    engine->landings = calloc(count, sizeof engine->landings[0]);
    return engine->landings ? KV_OK : KV_BUSY;
}

void engine_landings_close(struct kv_engine *engine) {
    if (!engine->landings) return;
    pthread_mutex_destroy(&engine->land_lock);
    free(engine->landings);
}

/* With the lock.  False: somebody has it already. */
static bool claim(struct landing *landing, uint32_t layer) {
    uint8_t bit = (uint8_t)(1 << layer % 8);
    if (landing->pages[layer / 8] & bit) return false;
    landing->pages[layer / 8] |= bit;
    landing->claimed++;
    return true;
}

void landing_begin(struct kv_engine *engine, uint32_t index, const struct kv_put *put,
                   const struct layout_entry *layout, uint8_t *address) {
    struct landing *landing = &engine->landings[index];
    pthread_mutex_lock(&engine->land_lock);
    KV_CHECK(!landing->open && landing->inside == 0);
    *landing = (struct landing){.open = address != NULL, .stream = put->stream,
                                .digest = put->digest, .layout = layout, .raw = put->raw,
                                .address = address};
    if (landing->open) {
        landing->next = engine->landing_first;
        engine->landing_first = landing;
    }
    pthread_mutex_unlock(&engine->land_lock);
}

bool landing_claim(struct kv_engine *engine, uint32_t index, uint32_t layer) {
    pthread_mutex_lock(&engine->land_lock);
    bool mine = claim(&engine->landings[index], layer);
    pthread_mutex_unlock(&engine->land_lock);
    return mine;
}

uint32_t landing_count(struct kv_engine *engine, uint32_t index) {
    pthread_mutex_lock(&engine->land_lock);
    uint32_t landed = engine->landings[index].landed;
    pthread_mutex_unlock(&engine->land_lock);
    return landed;
}

bool landing_end(struct kv_engine *engine, uint32_t index) {
    struct landing *landing = &engine->landings[index];
    pthread_mutex_lock(&engine->land_lock);
    if (landing->open) {
        struct landing **link = &engine->landing_first;
        while (*link != landing) link = &(*link)->next;
        *link = landing->next;
        landing->open = false;
    }
    bool alone = landing->inside == 0;
    pthread_mutex_unlock(&engine->land_lock);
    return alone;
}

/* ---- On a lane --------------------------------------------------------------------------------- */

/* With the lock: where this page may land, or NULL. */
static struct landing *find(struct kv_engine *engine, const struct kv_request *request) {
    const struct kv_put *put = &request->put;
    struct landing *landing = engine->landing_first;
    while (landing && (landing->stream != put->stream || !kv_digest_equal(&landing->digest, &put->digest)))
        landing = landing->next;
    if (!landing) return NULL;
    const struct layout_entry *layout = landing->layout;
    bool fits = put->layer < layout->info.layout.layers && landing->raw == put->raw &&
                kv_digest_equal(&layout->info.fingerprint, &put->fingerprint) &&
                request->bytes_in == 2 * KV_BLOCK_TOKENS * layout->row_bytes;
    return fits && claim(landing, put->layer) ? landing : NULL;
}

enum kv_landed kv_engine_land(struct kv_engine *engine, struct kv_request *request) {
    struct kv_put *put = &request->put;
    size_t array_bytes = put->piece_count * sizeof put->pieces[0];
    if (!put->pieces || !put->has_digest || put->has_energy) return KV_LANDED_NOT;
    pthread_mutex_lock(&engine->land_lock);
    struct landing *landing = find(engine, request);
    if (landing) landing->inside++;
    pthread_mutex_unlock(&engine->land_lock);
    if (!landing) return KV_LANDED_NOT;

    const struct layout_entry *layout = landing->layout;
    const struct kv_ingest ingest = {
        .pieces = put->pieces,
        .piece_count = put->piece_count,
        .dtype = layout->info.layout.dtype,
        .tokens = KV_BLOCK_TOKENS,
        .page = landing->address + (size_t)put->layer * layout->raw_bytes,
    };
    KV_CHECK(array_bytes + layout->row_bytes <= request->staging_bytes);
    put->fault = kv_kernel_ingest_here(engine->options.device, &layout->shape, &ingest,
                                       request->staging + array_bytes);
    put->landed = true;

    pthread_mutex_lock(&engine->land_lock);
    landing->inside--;
    if (!put->fault) landing->landed++;
    bool all = landing->claimed == layout->info.layout.layers;
    pthread_mutex_unlock(&engine->land_lock);
    return all || put->fault ? KV_LANDED_TELL : KV_LANDED;
}
