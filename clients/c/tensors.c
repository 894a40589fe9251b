/* SPDX-License-Identifier: Apache-2.0 */
/* tensors.c - K, V and Q in, attention out: the frames of a session.
 *
 * Append   cut into messages of message_bytes, several on their way before the first answer, for
 *          the service packs one while the next one travels. Pieces point into the caller's arrays.
 * Attend   one message, one answer, gathered to where the caller wants it.
 * Fetch    one question, a stream of answers of at most 128 tokens.
 */
#include <string.h>

#include "clients/c/session.h"

enum {
    APPENDS_IN_FLIGHT = 8,
    LAYERS_MAX = 256,
    ITEMS_MAX = 64,
};

/* ---- Append ------------------------------------------------------------------------------ */

/* One frame of an append: tokens begin .. begin + tokens - 1 of what the caller gave. */
static int append_send(struct stream *stream, const struct kivi_session *session,
                       const struct kivi_append *append, uint64_t begin, uint32_t tokens,
                       uint64_t deadline_us, struct kivi_error *error) {
    const struct kivi_layout *layout = &session->info.layout;
    uint32_t layers = append->all_layers ? layout->layers : 1;
    Kivi__V1__AppendRequest frame = KIVI__V1__APPEND_REQUEST__INIT;
    frame.session = session->handle;
    frame.layer = append->layer;
    frame.all_layers = append->all_layers;
    frame.expected_length = append->expected_length + begin;
    frame.tokens = tokens;
    if (append->token_ids) {
        frame.n_token_ids = tokens;
        frame.token_ids = (uint32_t *)append->token_ids + begin;
    }
    if (append->query_energy && begin == 0) {
        frame.n_query_energy = (size_t)layers * layout->kv_heads * layout->head_dim;
        frame.query_energy = (float *)append->query_energy;
    }

    struct wire_piece pieces[2 * LAYERS_MAX];
    size_t offset = (size_t)begin * session->kv_row_bytes, bytes = tokens * session->kv_row_bytes;
    for (uint32_t i = 0; i < layers; i++) {
        pieces[2 * i] = (struct wire_piece){(const uint8_t *)append->k[i] + offset, bytes};
        pieces[2 * i + 1] = (struct wire_piece){(const uint8_t *)append->v[i] + offset, bytes};
    }
    return stream_send(stream, &frame.base, pieces, 2 * layers, deadline_us, error);
}

static int append_receive(struct stream *stream, struct kivi_appended *result,
                          uint64_t deadline_us, struct kivi_error *error) {
    const struct wire_message *message;
    int code = stream_receive(stream, &message, deadline_us, error);
    if (code != KIVI_OK) return code;
    if (!message) return error_set(error, KIVI_UNAVAILABLE, "", "the service ended the stream");
    Kivi__V1__AppendResponse *answer =
        kivi__v1__append_response__unpack(NULL, message->header_bytes, message->header);
    if (!answer) return error_set(error, KIVI_INTERNAL, "", "the answer cannot be read");
    *result = (struct kivi_appended){
        .length = answer->length,
        .session_length = answer->session_length,
        .sealed_tokens = answer->sealed_tokens,
        .blocks_shared = result->blocks_shared + answer->blocks_shared,
    };
    kivi__v1__append_response__free_unpacked(answer, NULL);
    return KIVI_OK;
}

static int append_check(const struct kivi_session *session, const struct kivi_append *append,
                        struct kivi_error *error) {
    if (append->tokens == 0)
        return error_set(error, KIVI_INVALID_ARGUMENT, "tokens", "there are none");
    if (!append->all_layers && append->layer >= session->info.layout.layers)
        return error_set(error, KIVI_INVALID_ARGUMENT, "layer", "%u: the layout has %u",
                         append->layer, session->info.layout.layers);
    if (session->info.layout.layers > LAYERS_MAX)
        return error_set(error, KIVI_INTERNAL, "layers", "%u is above %d",
                         session->info.layout.layers, LAYERS_MAX);
    return KIVI_OK;
}

int kivi_session_append(struct kivi_session *session, const struct kivi_append *append,
                        struct kivi_appended *result, uint32_t timeout_ms,
                        struct kivi_error *error) {
    memset(result, 0, sizeof *result);
    int code = append_check(session, append, error);
    if (code != KIVI_OK) return code;

    size_t layers = append->all_layers ? session->info.layout.layers : 1;
    uint64_t frame_tokens =
        session->client->message_bytes / (2 * layers * session->kv_row_bytes);
    if (frame_tokens == 0) frame_tokens = 1;

    struct stream *stream = stream_borrow(session->client->transport, METHOD_APPEND, error);
    if (!stream) return KIVI_RESOURCE_EXHAUSTED;
    uint64_t deadline_us = stream_deadline_us(stream, timeout_ms);
    uint64_t sent = 0, in_flight = 0;
    while (code == KIVI_OK && (sent < append->tokens || in_flight > 0)) {
        if (sent < append->tokens && in_flight < APPENDS_IN_FLIGHT) {
            uint64_t left = append->tokens - sent;
            uint32_t tokens = (uint32_t)(left < frame_tokens ? left : frame_tokens);
            code = append_send(stream, session, append, sent, tokens, deadline_us, error);
            sent += tokens;
            in_flight++;
        } else {
            code = append_receive(stream, result, deadline_us, error);
            in_flight--;
        }
    }
    stream_return(stream);
    return code;
}

/* ---- Attend ------------------------------------------------------------------------------ */

/* Bytes of one item's results. */
static size_t out_bytes(const struct kivi_attend_item *item) {
    const struct kivi_layout *layout = &item->session->info.layout;
    return (size_t)item->rows * layout->query_heads * layout->head_dim * sizeof(float);
}
static size_t lse_bytes(const struct kivi_attend_item *item) {
    return (size_t)item->rows * item->session->info.layout.query_heads * sizeof(float);
}

static int attend_send(struct stream *stream, uint32_t layer, const struct kivi_attend_item *items,
                       size_t count, uint64_t deadline_us, struct kivi_error *error) {
    Kivi__V1__AttendRequest__Item parts[ITEMS_MAX];
    Kivi__V1__AttendRequest__Item *part_list[ITEMS_MAX];
    struct wire_piece pieces[3 * ITEMS_MAX];
    Kivi__V1__AttendRequest frame = KIVI__V1__ATTEND_REQUEST__INIT;
    frame.layer = layer;
    frame.n_items = count;
    frame.items = part_list;

    for (size_t i = 0; i < count; i++) {
        const struct kivi_attend_item *item = &items[i];
        Kivi__V1__AttendRequest__Item *part = part_list[i] = &parts[i];
        kivi__v1__attend_request__item__init(part);
        part->session = item->session->handle;
        part->rows = item->rows;
        part->mask = (Kivi__V1__AttendRequest__Mask)item->mask;
        part->visible = (uint32_t *)item->visible;
        part->n_visible = item->visible ? item->rows : 0;
        part->append_tokens = item->append_tokens;
        part->expected_length = item->expected_length;
        part->token_ids = (uint32_t *)item->token_ids;
        part->n_token_ids = item->token_ids ? item->append_tokens : 0;
        part->no_energy = item->no_energy;

        size_t kv_bytes = item->append_tokens * item->session->kv_row_bytes;
        pieces[3 * i] = (struct wire_piece){item->q, item->rows * item->session->q_row_bytes};
        pieces[3 * i + 1] = (struct wire_piece){item->k, kv_bytes};
        pieces[3 * i + 2] = (struct wire_piece){item->v, kv_bytes};
    }
    return stream_send(stream, &frame.base, pieces, 3 * count, deadline_us, error);
}

/* Results to where the caller wants them; the first item that failed is the call's error. */
static int attend_scatter(const Kivi__V1__AttendResponse *answer,
                          const struct wire_message *message, struct kivi_attend_item *items,
                          size_t count, struct kivi_error *error) {
    size_t expected = 0, offset = 0;
    for (size_t i = 0; i < count && answer->n_items == count; i++)
        if (answer->items[i]->code == KIVI_OK) expected += out_bytes(&items[i]) + lse_bytes(&items[i]);
    if (answer->n_items != count || message->payload_bytes != expected)
        return error_set(error, KIVI_INTERNAL, "", "the answer has %zu items and %zu bytes, not %zu and %zu",
                         answer->n_items, message->payload_bytes, count, expected);

    int first = KIVI_OK;
    for (size_t i = 0; i < count; i++) {
        const Kivi__V1__AttendResponse__Item *part = answer->items[i];
        items[i].code = (int)part->code;
        items[i].length = part->length;
        if (part->code != KIVI_OK) {
            if (first == KIVI_OK) first = error_set(error, (int)part->code, NULL, "%s", part->message);
            continue;
        }
        wire_gather(message, offset, out_bytes(&items[i]), items[i].out);
        offset += out_bytes(&items[i]);
        wire_gather(message, offset, lse_bytes(&items[i]), items[i].lse);
        offset += lse_bytes(&items[i]);
    }
    return first;
}

/* One frame there and its answer back.  *answered: the items have their codes. */
static int attend_exchange(struct stream *stream, uint32_t layer, struct kivi_attend_item *items,
                           size_t count, uint64_t deadline_us, bool *answered,
                           struct kivi_error *error) {
    int code = attend_send(stream, layer, items, count, deadline_us, error);
    if (code != KIVI_OK) return code;
    const struct wire_message *message;
    code = stream_receive(stream, &message, deadline_us, error);
    if (code != KIVI_OK) return code;
    if (!message) return error_set(error, KIVI_UNAVAILABLE, "", "the service ended the stream");

    Kivi__V1__AttendResponse *answer =
        kivi__v1__attend_response__unpack(NULL, message->header_bytes, message->header);
    if (!answer) return error_set(error, KIVI_INTERNAL, "", "the answer cannot be read");
    code = attend_scatter(answer, message, items, count, error);
    *answered = code != KIVI_INTERNAL;
    kivi__v1__attend_response__free_unpacked(answer, NULL);
    return code;
}

int kivi_attend(struct kivi_client *client, uint32_t layer, struct kivi_attend_item *items,
                size_t count, uint32_t timeout_ms, struct kivi_error *error) {
    if (count == 0 || count > ITEMS_MAX)
        return error_set(error, KIVI_INVALID_ARGUMENT, "items", "%zu is not in 1 .. %d", count,
                         ITEMS_MAX);
    struct stream *stream = stream_borrow(client->transport, METHOD_ATTEND, error);
    if (!stream) return KIVI_RESOURCE_EXHAUSTED;

    bool answered = false;
    uint64_t deadline_us = stream_deadline_us(stream, timeout_ms);
    int code = attend_exchange(stream, layer, items, count, deadline_us, &answered, error);
    for (size_t i = 0; i < count && !answered; i++) items[i].code = code;
    stream_return(stream);
    return code;
}

int kivi_session_attend(uint32_t layer, struct kivi_attend_item *item, uint32_t timeout_ms,
                        struct kivi_error *error) {
    return kivi_attend(item->session->client, layer, item, 1, timeout_ms, error);
}

/* ---- Fetch ------------------------------------------------------------------------------- */

/* One answer: K and V of a run of tokens that must begin where the last one ended. */
static int fetch_scatter(const struct wire_message *message, size_t row_bytes, uint64_t begin,
                         uint64_t *next, uint64_t end, void *k, void *v,
                         struct kivi_error *error) {
    Kivi__V1__FetchResponse *answer =
        kivi__v1__fetch_response__unpack(NULL, message->header_bytes, message->header);
    if (!answer) return error_set(error, KIVI_INTERNAL, "", "the answer cannot be read");
    uint64_t at = answer->begin, tokens = answer->tokens;
    kivi__v1__fetch_response__free_unpacked(answer, NULL);

    size_t bytes = (size_t)tokens * row_bytes;
    if (at != *next || tokens == 0 || tokens > end - at || message->payload_bytes != 2 * bytes)
        return error_set(error, KIVI_INTERNAL, "", "the service sent tokens that were not asked for");
    size_t offset = (size_t)(at - begin) * row_bytes;
    wire_gather(message, 0, bytes, (uint8_t *)k + offset);
    wire_gather(message, bytes, bytes, (uint8_t *)v + offset);
    *next = at + tokens;
    return KIVI_OK;
}

int kivi_session_fetch(struct kivi_session *session, uint32_t layer, uint64_t begin, uint64_t end,
                       uint32_t dtype, void *k, void *v, uint32_t timeout_ms,
                       struct kivi_error *error) {
    const struct kivi_layout *layout = &session->info.layout;
    if (end <= begin)
        return error_set(error, KIVI_INVALID_ARGUMENT, "end", "the range is empty");
    if (dtype == 0) dtype = layout->dtype;
    size_t row_bytes = (size_t)layout->kv_heads * layout->head_dim * kivi_dtype_bytes(dtype);
    if (row_bytes == 0)
        return error_set(error, KIVI_INVALID_ARGUMENT, "dtype", "%u is none", dtype);
    Kivi__V1__FetchRequest question = KIVI__V1__FETCH_REQUEST__INIT;
    question.session = session->handle;
    question.n_layers = 1;
    question.layers = &layer;
    question.begin = begin;
    question.end = end;
    question.dtype = (Kivi__V1__Dtype)dtype;
    struct stream *stream = stream_open(session->client->transport, METHOD_FETCH, error);
    if (!stream) return KIVI_RESOURCE_EXHAUSTED;

    uint64_t deadline_us = stream_deadline_us(stream, timeout_ms), next = begin;
    const struct wire_message *message = NULL;
    int code = stream_send(stream, &question.base, NULL, 0, deadline_us, error);
    if (code == KIVI_OK) code = stream_finish(stream, deadline_us, error);
    while (code == KIVI_OK) {
        code = stream_receive(stream, &message, deadline_us, error);
        if (code != KIVI_OK || !message) break;
        code = fetch_scatter(message, row_bytes, begin, &next, end, k, v, error);
    }
    if (code == KIVI_OK && next != end)
        code = error_set(error, KIVI_INTERNAL, "", "the service stopped at token %llu",
                         (unsigned long long)next);
    stream_close(stream);
    return code;
}
