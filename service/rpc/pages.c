/* SPDX-License-Identifier: Apache-2.0 */
/* pages.c - one question, many answers: Get, Fetch, List.
 *
 * The question becomes a plan, and the plan becomes requests, two in flight: while one page is on
 * its way to the client the engine makes the next.  Some plans begin with a question to the
 * engine, whose answer is not the client's: how many layers there are (Get), how long the session
 * is (Fetch).
 *
 *     Get     layers outside, digests inside; a block that failed once is not asked for again
 *     Fetch   layers outside, runs of 128 tokens inside
 *     List    pages of as many sessions as fit a staging buffer, told one by one
 */
#include <grpc/byte_buffer.h>
#include <stdio.h>
#include <stdlib.h>

#include "service/rpc/internal.h"

enum { LIST_PAGE = 64 };

struct pages {
    struct kv_plan plan;
    bool asked;     /* the question before the first page */
    bool known;     /* and its answer */
    bool exhausted;
    uint32_t layers_first; /* LAYOUTS: how many were looked through */
    uint32_t layer_count;  /* that will be told */
    uint32_t layer;        /* next: index into the layers told */
    uint32_t digest;       /* next, Get */
    uint64_t token;        /* next, Fetch */
    uint8_t failed[KV_GET_BLOCKS_MAX / 8];
};

static bool is_get(const struct call *call) {
    return call->method->plan == kv_decode_get;
}
static bool is_list(const struct call *call) {
    return call->method->plan == kv_decode_list;
}

static bool block_failed(const struct pages *pages, uint32_t digest) {
    return pages->failed[digest / 8] >> digest % 8 & 1;
}

/* The number of the layer that is told as the n-th. */
static uint32_t layer_number(const struct pages *pages, uint32_t n) {
    return pages->plan.layer_count ? pages->plan.layers[n] : n;
}

void pages_free(struct call *call) {
    if (!call->pages) return;
    free(call->pages);
    call->pages = NULL;
    pthread_mutex_lock(&call->rpc->lock);
    call->rpc->plans--;
    pthread_mutex_unlock(&call->rpc->lock);
}

/* ---- The question --------------------------------------------------------------------------------- */

static struct pages *pages_new(struct kv_rpc *rpc) {
    pthread_mutex_lock(&rpc->lock);
    bool room = rpc->plans < PLANS_MAX;
    rpc->plans += room;
    pthread_mutex_unlock(&rpc->lock);
    if (!room) return NULL;
    struct pages *pages = calloc(1, sizeof *pages);
    KV_CHECK(pages);
    return pages;
}

void pages_accept(struct call *call, struct workspace *workspace) {
    struct kv_inbound in = {.memory = workspace->memory, .memory_bytes = workspace->memory_bytes};
    grpc_byte_buffer *message = call->in;
    call->in = NULL;
    call->pages = pages_new(call->rpc);
    if (!call->pages) {
        grpc_byte_buffer_destroy(message);
        call_end(call, KV_BUSY, "too many such calls at once");
        return;
    }
    /* A place for the decoder's complaint; a request of the engine's is not needed to refuse. */
    struct kv_request *why = calloc(1, sizeof *why);
    KV_CHECK(why);
    size_t count = call_pieces(message, workspace->pieces);
    enum kv_status status = KV_INVALID;
    if (count && kv_wire_split(workspace->pieces, count, workspace->scratch,
                               workspace->scratch_bytes, &in.wire) == KV_OK)
        status = call->method->plan(&in, &call->pages->plan, why);
    else
        why->status = KV_INVALID;
    grpc_byte_buffer_destroy(message);
    if (status != KV_OK) call_end_with(call, why, call->sequence_next);
    free(why);
}

/* ---- Pages ---------------------------------------------------------------------------------------- */

static void get_ask(struct pages *pages, struct kv_request *request) {
    request->kind = KV_REQUEST_LAYOUTS;
    request->layouts.first = pages->layers_first;
}

/* Looks for the layout among those that came; there may be more. */
static enum verdict get_told(struct pages *pages, const struct kv_request *request,
                             struct call *call) {
    const uint8_t *from = request->staging + request->reply_offset;
    for (uint32_t i = 0; i < request->layouts.count; i++) {
        struct kv_layout_info info;
        memcpy(&info, from + i * sizeof info, sizeof info);
        if (!kv_digest_equal(&info.fingerprint, &pages->plan.fingerprint)) continue;
        pages->known = true;
        pages->layer_count = pages->plan.layer_count ? pages->plan.layer_count : info.layout.layers;
        return VERDICT_SILENT;
    }
    pages->layers_first += request->layouts.count;
    pages->asked = !request->layouts.more;
    if (request->layouts.more) return VERDICT_SILENT;
    call_end(call, KV_MISMATCH, "fingerprint: no layout with it is registered");
    snprintf(call->end.field, sizeof call->end.field, "fingerprint");
    return VERDICT_SILENT;
}

static bool get_next(struct pages *pages, struct flight *flight, struct kv_request *request) {
    while (pages->digest < pages->plan.digest_count && block_failed(pages, pages->digest))
        pages->digest++;
    if (pages->digest == pages->plan.digest_count) {
        pages->digest = 0;
        pages->layer++;
        while (pages->digest < pages->plan.digest_count && block_failed(pages, pages->digest))
            pages->digest++;
    }
    if (pages->layer >= pages->layer_count || pages->digest == pages->plan.digest_count)
        return false;
    flight->index = pages->digest;
    request->kind = KV_REQUEST_GET;
    request->get.fingerprint = pages->plan.fingerprint;
    request->get.digest = pages->plan.digests[pages->digest++];
    request->get.layer = layer_number(pages, pages->layer);
    request->get.form = pages->plan.form;
    return true;
}

static void fetch_ask(struct pages *pages, struct kv_request *request) {
    request->kind = KV_REQUEST_FETCH;
    request->fetch.session = pages->plan.session;
    request->fetch.layer = pages->plan.layer_count == 1 ? pages->plan.layers[0] : KV_LAYERS_MAX;
}

static enum verdict fetch_told(struct pages *pages, const struct kv_request *request,
                               struct call *call) {
    struct kv_plan *plan = &pages->plan;
    uint64_t length = request->fetch.length;
    if (request->status != KV_OK) return VERDICT_FAIL;
    if (plan->end > length || plan->begin > length) {
        char text[128];
        snprintf(text, sizeof text, "%s: %llu is beyond the session's length, %llu",
                 plan->end > length ? "end" : "begin",
                 (unsigned long long)(plan->end > length ? plan->end : plan->begin),
                 (unsigned long long)length);
        call_end(call, KV_INVALID, text);
        snprintf(call->end.field, sizeof call->end.field, "%s", plan->end > length ? "end" : "begin");
        return VERDICT_SILENT;
    }
    if (plan->end == 0) plan->end = length;
    pages->token = plan->begin;
    pages->layer_count = plan->layer_count ? plan->layer_count : request->fetch.layers;
    pages->known = true;
    return VERDICT_SILENT;
}

static bool fetch_next(struct pages *pages, struct kv_request *request) {
    const struct kv_plan *plan = &pages->plan;
    if (pages->token >= plan->end) {
        pages->layer++;
        pages->token = plan->begin;
    }
    if (pages->layer >= pages->layer_count || pages->token >= plan->end) return false;
    uint64_t end = (pages->token / KV_BLOCK_TOKENS + 1) * KV_BLOCK_TOKENS;
    if (end > plan->end) end = plan->end;
    request->kind = KV_REQUEST_FETCH;
    request->fetch.session = plan->session;
    request->fetch.layer = layer_number(pages, pages->layer);
    request->fetch.begin = pages->token;
    request->fetch.tokens = (uint32_t)(end - pages->token);
    request->fetch.dtype = plan->dtype;
    pages->token = end;
    return true;
}

static void list_next(struct pages *pages, struct kv_request *request) {
    request->kind = KV_REQUEST_LIST;
    memcpy(request->list.prefix, pages->plan.prefix, sizeof request->list.prefix);
    memcpy(request->list.after, pages->plan.after, sizeof request->list.after);
    uint32_t limit = pages->plan.limit;
    request->list.limit = limit && limit < LIST_PAGE ? limit : LIST_PAGE;
    /* Where the next page begins is known only when this one is there. */
    pages->exhausted = true;
}

static enum verdict list_told(struct pages *pages, const struct kv_request *request) {
    uint32_t count = request->list.count;
    if (request->status != KV_OK) return VERDICT_FAIL;
    bool enough = pages->plan.limit && count >= pages->plan.limit;
    if (pages->plan.limit && !enough) pages->plan.limit -= count;
    if (count > 0) {
        struct kv_session_info last;
        memcpy(&last, request->staging + request->reply_offset + (count - 1) * sizeof last,
               sizeof last);
        memcpy(pages->plan.after, last.name, sizeof last.name);
    }
    pages->exhausted = enough || !request->list.more || count == 0;
    return VERDICT_KEEP;
}

/* Fills a request with what comes next; false: nothing does. */
static bool pages_next(struct call *call, struct flight *flight, struct kv_request *request) {
    struct pages *pages = call->pages;
    if (is_list(call)) {
        list_next(pages, request);
        return true;
    }
    if (!pages->known) {
        pages->asked = true;
        if (is_get(call))
            get_ask(pages, request);
        else
            fetch_ask(pages, request);
        return true;
    }
    return is_get(call) ? get_next(pages, flight, request) : fetch_next(pages, request);
}

void pages_step(struct call *call) {
    struct pages *pages = call->pages;
    /* A question, and a page of a list, go alone: what follows depends on the answer. */
    while (!call->ending && !pages->exhausted && (!pages->asked || pages->known)) {
        struct flight *flight = flight_free(call);
        struct kv_request *request = flight ? flight_request(call) : NULL;
        if (!request) return;
        flight = flight_take(call, FLIGHT_HELD, request);
        if (!pages_next(call, flight, request)) {
            pages->exhausted = true;
            kv_engine_release(call->rpc->engine, request);
            flight->request = NULL;
            flight->state = FLIGHT_FREE;
            call->sequence_next--;
            break;
        }
        flight_submit(flight);
        if (is_list(call)) return;
    }
    bool list_open = is_list(call) && !flight_free(call);
    if (pages->exhausted && !list_open) call->ending = true;
}

enum verdict pages_done(struct flight *flight, const struct kv_request *request) {
    struct call *call = flight->call;
    struct pages *pages = call->pages;
    if (is_list(call)) return list_told(pages, request);
    if (!pages->known) {
        if (request->status != KV_OK) return VERDICT_FAIL;
        return is_get(call) ? get_told(pages, request, call) : fetch_told(pages, request, call);
    }
    if (!is_get(call) || request->status == KV_OK)
        return request->status == KV_OK ? VERDICT_ANSWER : VERDICT_FAIL;
    switch (request->status) {
    case KV_NOT_FOUND:
    case KV_CORRUPT:
    case KV_IO_ERROR:
    case KV_BUSY: flight->failed = true; return VERDICT_ANSWER; /* that block's alone */
    default: return VERDICT_FAIL;
    }
}

void pages_encode(struct flight *flight, const struct kv_request *request, kv_room *room,
                  void *context) {
    if (is_get(flight->call))
        kv_encode_get(request, flight->index, room, context);
    else
        kv_encode_fetch(request, room, context);
}

/* Runs in order of sequence, just before the answer would leave. */
bool pages_drop(struct flight *flight) {
    struct pages *pages = flight->call->pages;
    if (!pages || !is_get(flight->call)) return false;
    if (block_failed(pages, flight->index)) return true;
    if (flight->failed) pages->failed[flight->index / 8] |= (uint8_t)(1u << flight->index % 8);
    return false;
}
