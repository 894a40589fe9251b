/* SPDX-License-Identifier: Apache-2.0 */
/* fake_engine.c - device, store and engine for tests of the rpc layer alone.
 *
 * Implements service/engine.h (and as much of the rooms below as main.c opens) without storage
 * or arithmetic: answers are made up, but lengths, orders and errors are those of the contract. The
 * rpc tests can thus provoke what a real engine does rarely:
 *
 *    layer 200   is answered after 300 ms
 *    layer 201   is answered only when the request is cancelled or its deadline passes
 *    digest ee.. is NOT_FOUND, dd.. is DATA_LOSS
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "kernels/page.h"
#include "proto/kv_check.h"
#include "service/engine.h"

enum { SESSIONS = 256, LAYOUTS = 16, LAYERS = 4, DIM = 64 };

struct fake_session {
    bool used;
    char name[KV_NAME_MAX + 1];
    struct kv_digest fingerprint;
    uint64_t length[KV_LAYERS_MAX];
};

struct kv_engine {
    struct kv_engine_options options;
    pthread_mutex_t lock;
    pthread_cond_t wake;
    bool stop;
    struct kv_request *requests, *free_requests;
    uint8_t *staging;
    uint8_t **free_staging;
    uint32_t staging_free;
    struct kv_request *first, **last; /* submitted */
    struct kv_request *slow;          /* layers 200 and 201 */
    void (*on_free)(void *);
    void *on_free_context;
    struct fake_session sessions[SESSIONS];
    struct kv_layout_info layouts[LAYOUTS];
    uint32_t layout_count;
    uint64_t served;
};

static uint64_t now_us(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000 + (uint64_t)now.tv_nsec / 1000;
}

/* ---- Rooms below ------------------------------------------------------------------------------------ */

enum kv_status kv_device_open(const struct kv_device_options *options, struct kv_device **out) {
    *out = NULL;
    return strcmp(options->name, "none") == 0 ? KV_INVALID : KV_OK;
}

bool kv_device_knows_cuda(void) {
    return false;
}

const char *kv_device_missing(const char *name) {
    return "there is none";
}
void kv_device_close(struct kv_device *device) {
}
const char *kv_device_name(const struct kv_device *device) {
    return "fake";
}
enum kv_status kv_store_open(const struct kv_store_options *options, struct kv_store **out,
                             char *why, size_t why_bytes) {
    *out = NULL;
    return KV_OK;
}
void kv_store_close(struct kv_store *store) {
}
const struct kv_store_stats *kv_store_stats(const struct kv_store *store) {
    static const struct kv_store_stats stats;
    return &stats;
}
const char *kv_store_io_engine(const struct kv_store *store) {
    return "none";
}
const char *kv_store_io_reason(const struct kv_store *store) {
    return "";
}

/* ---- The pool --------------------------------------------------------------------------------------- */

enum kv_status kv_engine_open(const struct kv_engine_options *options, struct kv_engine **out,
                              char *why, size_t why_bytes) {
    struct kv_engine *engine = calloc(1, sizeof *engine);
    size_t staging_bytes = 3 * (size_t)options->message_bytes_max + (64 << 10);
    engine->options = *options;
    pthread_mutex_init(&engine->lock, NULL);
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&engine->wake, &monotonic);
    pthread_condattr_destroy(&monotonic);
    engine->requests = calloc(options->request_count, sizeof *engine->requests);
    engine->free_staging = calloc(options->staging_count, sizeof *engine->free_staging);
    engine->staging = aligned_alloc(4096, options->staging_count * staging_bytes);
    for (uint32_t i = 0; i < options->request_count; i++) {
        engine->requests[i].next_private = engine->free_requests;
        engine->free_requests = &engine->requests[i];
    }
    for (uint32_t i = 0; i < options->staging_count; i++)
        engine->free_staging[engine->staging_free++] = engine->staging + i * staging_bytes;
    engine->last = &engine->first;
    *out = engine;
    return KV_OK;
}

void kv_engine_close(struct kv_engine *engine) {
    KV_CHECK(engine->staging_free == engine->options.staging_count); /* all were given back */
    free(engine->requests);
    free(engine->free_staging);
    free(engine->staging);
    free(engine);
}

struct kv_request *kv_engine_acquire(struct kv_engine *engine, bool with_staging) {
    pthread_mutex_lock(&engine->lock);
    struct kv_request *request = engine->free_requests;
    if (with_staging && engine->staging_free == 0) request = NULL;
    if (request) {
        engine->free_requests = request->next_private;
        memset(request, 0, sizeof *request);
        if (with_staging) {
            request->staging = engine->free_staging[--engine->staging_free];
            request->staging_bytes =
                3 * (size_t)engine->options.message_bytes_max + (64 << 10);
        }
    }
    pthread_mutex_unlock(&engine->lock);
    return request;
}

void kv_engine_release(struct kv_engine *engine, struct kv_request *request) {
    pthread_mutex_lock(&engine->lock);
    if (request->staging) engine->free_staging[engine->staging_free++] = request->staging;
    request->next_private = engine->free_requests;
    engine->free_requests = request;
    void (*on_free)(void *) = engine->on_free;
    void *context = engine->on_free_context;
    pthread_mutex_unlock(&engine->lock);
    if (on_free) on_free(context);
}

void kv_engine_on_free(struct kv_engine *engine, void (*on_free)(void *), void *context) {
    pthread_mutex_lock(&engine->lock);
    engine->on_free = on_free;
    engine->on_free_context = context;
    pthread_mutex_unlock(&engine->lock);
}

void kv_engine_submit(struct kv_engine *engine, struct kv_request *request) {
    pthread_mutex_lock(&engine->lock);
    request->next_private = NULL;
    *engine->last = request;
    engine->last = &request->next_private;
    pthread_cond_signal(&engine->wake);
    pthread_mutex_unlock(&engine->lock);
}

void kv_engine_stop(struct kv_engine *engine) {
    pthread_mutex_lock(&engine->lock);
    engine->stop = true;
    pthread_cond_signal(&engine->wake);
    pthread_mutex_unlock(&engine->lock);
}

enum kv_landed kv_engine_land(struct kv_engine *engine, struct kv_request *request) {
    return KV_LANDED_NOT;
}

bool kv_engine_takes_pieces(const struct kv_engine *engine) {
    return false;
}

bool kv_engine_ready(const struct kv_engine *engine) {
    return true;
}

/* ---- Answers ----------------------------------------------------------------------------------------- */

static void refuse(struct kv_request *request, enum kv_status status, const char *field,
                   const char *message) {
    request->status = status;
    snprintf(request->field, sizeof request->field, "%s", field);
    snprintf(request->message, sizeof request->message, "%s", message);
}

static struct fake_session *session_at(struct kv_engine *engine, uint64_t handle) {
    if (handle == 0 || handle > SESSIONS || !engine->sessions[handle - 1].used) return NULL;
    return &engine->sessions[handle - 1];
}

static const struct kv_layout_info *layout_at(struct kv_engine *engine,
                                              const struct kv_digest *fingerprint) {
    for (uint32_t i = 0; i < engine->layout_count; i++)
        if (kv_digest_equal(&engine->layouts[i].fingerprint, fingerprint))
            return &engine->layouts[i];
    return NULL;
}

static void serve_register(struct kv_engine *engine, struct kv_request *request) {
    const struct kv_layout *layout = &request->reg.layout;
    if (!kv_head_dim_valid(layout->head_dim)) {
        refuse(request, KV_INVALID, "layout.head_dim", "is not one of 64, 96, 128, 256");
        return;
    }
    struct kv_layout_info info = {.layout = *layout, .bits_per_element = 2.25};
    memcpy(info.model, request->reg.model, sizeof info.model);
    memset(info.fingerprint.bytes, layout->layers, KV_DIGEST_BYTES);
    request->reg.created = layout_at(engine, &info.fingerprint) == NULL;
    if (request->reg.created && engine->layout_count == LAYOUTS) {
        refuse(request, KV_BUSY, "layout", "layouts_max layouts are registered");
        return;
    }
    if (request->reg.created) engine->layouts[engine->layout_count++] = info;
    request->reg.info = info;
}

static void serve_open(struct kv_engine *engine, struct kv_request *request) {
    const struct kv_layout_info *layout = layout_at(engine, &request->open.fingerprint);
    if (!layout) {
        refuse(request, KV_MISMATCH, "fingerprint", "no layout with it is registered");
        return;
    }
    struct fake_session *found = NULL, *empty = NULL;
    for (uint32_t i = 0; i < SESSIONS; i++) {
        struct fake_session *session = &engine->sessions[i];
        if (session->used && strcmp(session->name, request->open.name) == 0) found = session;
        if (!session->used && !empty) empty = session;
    }
    if (!found && !empty) {
        refuse(request, KV_BUSY, "", "sessions_open_max sessions are open");
        return;
    }
    request->open.created = !found;
    if (!found) {
        found = empty;
        *found = (struct fake_session){.used = true, .fingerprint = request->open.fingerprint};
        memcpy(found->name, request->open.name, sizeof found->name);
    }
    request->open.session = (uint64_t)(found - engine->sessions) + 1;
    request->open.length = found->length[0];
    request->open.usable = found->length[0];
    request->open.info = *layout;
}

static void serve_append(struct kv_engine *engine, struct kv_request *request) {
    struct kv_append *append = &request->append;
    struct fake_session *session = session_at(engine, append->session);
    size_t expected = (size_t)append->tokens * 2 * DIM * 2 * (append->all_layers ? LAYERS : 1);
    if (!session)
        refuse(request, KV_NOT_FOUND, "session", "there is no such session");
    else if (append->layer >= KV_LAYERS_MAX)
        refuse(request, KV_INVALID, "layer", "there is no such layer");
    else if (request->bytes_in != expected)
        refuse(request, KV_INVALID, "data", "is not as long as tokens says");
    else if (append->expected_length != session->length[append->layer])
        refuse(request, KV_ABORTED, "expected_length", "the layer has another length");
    if (request->status != KV_OK) return;
    session->length[append->layer] += append->tokens;
    append->length = append->session_length = session->length[append->layer];
}

static void serve_attend(struct kv_engine *engine, struct kv_request *request) {
    struct kv_attend_request *attend = &request->attend;
    request->reply_offset = (request->bytes_in + 63) & ~(size_t)63;
    float *reply = (float *)(void *)(request->staging + request->reply_offset);
    for (uint32_t i = 0; i < attend->item_count; i++) {
        struct kv_attend_item *item = &attend->items[i];
        if (!session_at(engine, item->session)) {
            item->status = KV_NOT_FOUND;
            strcpy(item->field, "session");
            strcpy(item->message, "there is no such session");
            continue;
        }
        for (uint32_t k = 0; k < item->rows * (DIM + 1); k++) *reply++ = (float)i;
        item->length = 7;
    }
    request->reply_bytes =
        (size_t)((uint8_t *)reply - request->staging) - request->reply_offset;
}

static void serve_put(struct kv_request *request) {
    struct kv_put *put = &request->put;
    if (put->layer >= LAYERS) {
        refuse(request, KV_INVALID, "layer", "there is no such layer");
        return;
    }
    if (!put->has_digest) memset(put->digest.bytes, (int)put->token_ids[0], KV_DIGEST_BYTES);
    if (put->digest.bytes[0] == 0xdd) refuse(request, KV_BUSY, "", "the disk is full");
    put->complete = put->layer == LAYERS - 1;
    put->bytes_held = request->bytes_in * LAYERS;
}

static void serve_get(struct kv_request *request) {
    const struct kv_get *get = &request->get;
    if (get->layer >= LAYERS) refuse(request, KV_INVALID, "layers", "there is no such layer");
    if (get->digest.bytes[0] == 0xee) refuse(request, KV_NOT_FOUND, "", "");
    if (get->digest.bytes[0] == 0xdd) refuse(request, KV_CORRUPT, "", "");
    if (request->status != KV_OK) return;
    request->reply_bytes = get->digest.bytes[0] == 0xbb ? 1 << 20 : 1024;
    memset(request->staging, (int)get->layer, request->reply_bytes);
}

static void serve_fetch(struct kv_engine *engine, struct kv_request *request) {
    struct kv_fetch *fetch = &request->fetch;
    struct fake_session *session = session_at(engine, fetch->session);
    if (!session) {
        refuse(request, KV_NOT_FOUND, "session", "there is no such session");
        return;
    }
    fetch->length = session->length[0];
    fetch->layers = LAYERS;
    request->reply_bytes = (size_t)fetch->tokens * 2 * DIM * 2;
    memset(request->staging, (int)fetch->layer, request->reply_bytes);
}

static void serve_list(struct kv_engine *engine, struct kv_request *request) {
    struct kv_session_info *out = (struct kv_session_info *)(void *)request->staging;
    const struct kv_list *list = &request->list;
    char after[KV_NAME_MAX + 1];
    memcpy(after, list->after, sizeof after);
    /* Three at a time, so that a small test sees more than one page. */
    for (;;) {
        const struct fake_session *next = NULL;
        for (uint32_t i = 0; i < SESSIONS; i++) {
            const struct fake_session *session = &engine->sessions[i];
            if (!session->used || strncmp(session->name, list->prefix, strlen(list->prefix)) ||
                strcmp(session->name, after) <= 0)
                continue;
            if (!next || strcmp(session->name, next->name) < 0) next = session;
        }
        if (!next) return;
        request->list.more = request->list.count == 3 || request->list.count == list->limit;
        if (request->list.more) return;
        struct kv_session_info *info = &out[request->list.count++];
        *info = (struct kv_session_info){.length = next->length[0], .open = true};
        memcpy(info->name, next->name, sizeof info->name);
        memcpy(after, next->name, sizeof after);
    }
}

static void serve(struct kv_engine *engine, struct kv_request *request) {
    engine->served++;
    switch (request->kind) {
    case KV_REQUEST_REGISTER: serve_register(engine, request); break;
    case KV_REQUEST_LAYOUTS:
        memcpy(request->staging, engine->layouts, engine->layout_count * sizeof *engine->layouts);
        request->layouts.count = engine->layout_count;
        break;
    case KV_REQUEST_OPEN: serve_open(engine, request); break;
    case KV_REQUEST_APPEND: serve_append(engine, request); break;
    case KV_REQUEST_ATTEND: serve_attend(engine, request); break;
    case KV_REQUEST_PUT: serve_put(request); break;
    case KV_REQUEST_GET: serve_get(request); break;
    case KV_REQUEST_FETCH: serve_fetch(engine, request); break;
    case KV_REQUEST_LIST: serve_list(engine, request); break;
    case KV_REQUEST_CLOSE: {
        struct fake_session *session = session_at(engine, request->commit.session);
        if (session)
            session->used = false;
        else
            refuse(request, KV_NOT_FOUND, "session", "there is no such session");
        break;
    }
    case KV_REQUEST_STATS:
        request->stats = (struct kv_engine_stats){.backend = "fake", .io_engine = "none",
                                                  .ready = true, .requests = engine->served};
        break;
    default: break;
    }
}

/* ---- The thread -------------------------------------------------------------------------------------- */

static uint32_t layer_of(const struct kv_request *request) {
    return request->kind == KV_REQUEST_ATTEND   ? request->attend.layer
           : request->kind == KV_REQUEST_APPEND ? request->append.layer
                                                : 0;
}

/* True if the slow request may be answered now, and how. */
static bool slow_is_due(struct kv_request *request, uint64_t now, bool stop) {
    uint64_t submitted = (uint64_t)(uintptr_t)request->engine_private;
    if (atomic_load(&request->cancelled)) request->status = KV_CANCELLED;
    if (request->deadline_us && now > request->deadline_us) request->status = KV_DEADLINE;
    if (stop) request->status = KV_UNAVAILABLE;
    return request->status != KV_OK || (layer_of(request) == 200 && now - submitted > 300000);
}

static void serve_slow(struct kv_engine *engine, bool stop) {
    struct kv_request **link = &engine->slow;
    while (*link) {
        struct kv_request *request = *link;
        if (!slow_is_due(request, now_us(), stop)) {
            link = &request->next_private;
            continue;
        }
        *link = request->next_private;
        if (request->status == KV_OK) serve(engine, request);
        request->on_done(request);
    }
}

void kv_engine_run(struct kv_engine *engine) {
    for (bool stop = false; !stop;) {
        pthread_mutex_lock(&engine->lock);
        if (!engine->first && !engine->stop) {
            uint64_t at = now_us() + 20000;
            struct timespec until = {.tv_sec  = (time_t)(at / 1000000),
                                     .tv_nsec = (long)(at % 1000000) * 1000};
            pthread_cond_timedwait(&engine->wake, &engine->lock, &until);
        }
        struct kv_request *request = engine->first;
        engine->first = NULL;
        engine->last = &engine->first;
        stop = engine->stop && !request;
        pthread_mutex_unlock(&engine->lock);

        while (request) {
            struct kv_request *next = request->next_private;
            if (layer_of(request) == 200 || layer_of(request) == 201) {
                request->engine_private = (void *)(uintptr_t)now_us();
                request->next_private = engine->slow;
                engine->slow = request;
            } else {
                serve(engine, request);
                request->on_done(request);
            }
            request = next;
        }
        serve_slow(engine, stop);
    }
}
