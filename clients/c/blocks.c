/* SPDX-License-Identifier: Apache-2.0 */
/* blocks.c - the cache below the sessions: look up, put, get. */
#include <stdlib.h>
#include <string.h>

#include "clients/c/client.h"

enum { LOOKUP_BLOCKS_MAX = 8192, GET_BLOCKS_MAX = 4096 };

/* An array of digests as protobuf-c wants it; borrows them.  NULL: memory is out. */
static ProtobufCBinaryData *digest_list(const struct kivi_digest *digests, size_t count) {
    ProtobufCBinaryData *list = calloc(count + 1, sizeof *list);
    for (size_t i = 0; list && i < count; i++) list[i] = digest_bytes(&digests[i]);
    return list;
}

/* ---- Lookup ------------------------------------------------------------------------------ */

static int found_set(struct kivi_found *found, const Kivi__V1__LookupResponse *answer,
                     struct kivi_error *error) {
    struct kivi_found_block *blocks = calloc(answer->n_blocks + 1, sizeof *blocks);
    if (!blocks) return error_set(error, KIVI_RESOURCE_EXHAUSTED, "", "out of memory");
    for (size_t i = 0; i < answer->n_blocks; i++) {
        digest_set(&blocks[i].digest, answer->blocks[i]->digest);
        blocks[i].tier = (uint32_t)answer->blocks[i]->tier;
        blocks[i].bytes = answer->blocks[i]->bytes;
    }
    *found = (struct kivi_found){
        .blocks = blocks,
        .block_count = answer->n_blocks,
        .tokens = answer->tokens,
        .load_us = answer->load_us,
        .lease_ms = answer->lease_ms,
    };
    return KIVI_OK;
}

int kivi_block_lookup(struct kivi_client *client, const struct kivi_lookup *lookup,
                      struct kivi_found *found, uint32_t timeout_ms, struct kivi_error *error) {
    if (lookup->digests && lookup->digest_count > LOOKUP_BLOCKS_MAX)
        return error_set(error, KIVI_INVALID_ARGUMENT, "digests", "more than %d",
                         LOOKUP_BLOCKS_MAX);
    ProtobufCBinaryData *digests = digest_list(lookup->digests, lookup->digest_count);
    if (!digests) return error_set(error, KIVI_RESOURCE_EXHAUSTED, "", "out of memory");

    Kivi__V1__LookupRequest question = KIVI__V1__LOOKUP_REQUEST__INIT;
    Kivi__V1__LookupResponse *answer;
    question.fingerprint = digest_bytes(&lookup->fingerprint);
    question.salt = bytes_of(lookup->salt, lookup->salt_bytes);
    question.token_ids = (uint32_t *)lookup->token_ids;
    question.n_token_ids = lookup->token_ids ? lookup->token_count : 0;
    question.digests = digests;
    question.n_digests = lookup->digests ? lookup->digest_count : 0;
    question.lease_ms = lookup->lease_ms;
    int code = CLIENT_CALL(client, METHOD_LOOKUP, &question, kivi__v1__lookup_response, &answer,
                           timeout_ms, error);
    free(digests);
    if (code != KIVI_OK) return code;
    code = found_set(found, answer, error);
    protobuf_c_message_free_unpacked(&answer->base, NULL);
    return code;
}

/* ---- Put --------------------------------------------------------------------------------- */

struct kivi_put {
    struct stream *stream;
    struct kivi_digest fingerprint;
    size_t energy_count; /* numbers of one page's query energy */
    bool begun; /* the first message, which names the layout, was sent */
};

int kivi_put_open(struct kivi_client *client, const struct kivi_layout_info *info,
                  struct kivi_put **out, struct kivi_error *error) {
    struct kivi_put *put = calloc(1, sizeof *put);
    if (!put) return error_set(error, KIVI_RESOURCE_EXHAUSTED, "", "out of memory");
    put->fingerprint = info->fingerprint;
    put->stream = stream_open(client->transport, METHOD_PUT, error);
    if (!put->stream) {
        free(put);
        return KIVI_RESOURCE_EXHAUSTED;
    }
    put->energy_count = (size_t)info->layout.kv_heads * info->layout.head_dim;
    *out = put;
    return KIVI_OK;
}

int kivi_put_page(struct kivi_put *put, const struct kivi_put_page *page, uint32_t timeout_ms,
                  struct kivi_error *error) {
    Kivi__V1__PutRequest frame = KIVI__V1__PUT_REQUEST__INIT;
    if (!put->begun) frame.fingerprint = digest_bytes(&put->fingerprint);
    if (page->digest) {
        frame.digest = digest_bytes(page->digest);
    } else {
        if (page->parent) frame.parent = digest_bytes(page->parent);
        frame.token_ids = (uint32_t *)page->token_ids;
        frame.n_token_ids = page->token_ids ? KIVI_BLOCK_TOKENS : 0;
        frame.salt = bytes_of(page->salt, page->salt_bytes);
    }
    frame.layer = page->layer;
    frame.form = (Kivi__V1__Form)page->form;
    frame.durability = (Kivi__V1__Durability)page->durability;
    frame.query_energy = (float *)page->query_energy;
    frame.n_query_energy = page->query_energy ? put->energy_count : 0;
    frame.raw = page->raw;

    struct wire_piece data = {page->data, page->data_bytes};
    uint64_t deadline_us = stream_deadline_us(put->stream, timeout_ms);
    int code = stream_send(put->stream, &frame.base, &data, 1, deadline_us, error);
    if (code == KIVI_OK) put->begun = true;
    return code;
}

int kivi_put_result(struct kivi_put *put, struct kivi_put_result *result, uint32_t timeout_ms,
                    struct kivi_error *error) {
    const struct wire_message *message;
    uint64_t deadline_us = stream_deadline_us(put->stream, timeout_ms);
    int code = stream_receive(put->stream, &message, deadline_us, error);
    if (code != KIVI_OK) return code;
    if (!message) return error_set(error, KIVI_UNAVAILABLE, "", "the service ended the stream");
    Kivi__V1__PutResponse *answer =
        kivi__v1__put_response__unpack(NULL, message->header_bytes, message->header);
    if (!answer) return error_set(error, KIVI_INTERNAL, "", "the answer cannot be read");

    memset(result, 0, sizeof *result);
    digest_set(&result->digest, answer->digest);
    result->code = (int)answer->code;
    result->existed = answer->existed;
    result->durability = (uint32_t)answer->durability;
    result->credit = answer->credit;
    result->bytes_held = answer->bytes_held;
    text_set(result->message, sizeof result->message, answer->message);
    kivi__v1__put_response__free_unpacked(answer, NULL);
    return KIVI_OK;
}

int kivi_put_close(struct kivi_put *put, uint32_t timeout_ms, struct kivi_error *error) {
    if (!put) return KIVI_OK;
    const struct wire_message *message = NULL;
    uint64_t deadline_us = stream_deadline_us(put->stream, timeout_ms);
    int code = stream_finish(put->stream, deadline_us, error);
    if (code == KIVI_OK) code = stream_receive(put->stream, &message, deadline_us, error);
    if (code == KIVI_OK && message)
        code = error_set(error, KIVI_FAILED_PRECONDITION, "", "there are results that nobody took");
    stream_close(put->stream);
    free(put);
    return code;
}

/* ---- Get --------------------------------------------------------------------------------- */

struct kivi_get {
    struct stream *stream;
};

int kivi_get_open(struct kivi_client *client, const struct kivi_digest *fingerprint,
                  const struct kivi_digest *digests, size_t digest_count, const uint32_t *layers,
                  size_t layer_count, uint32_t form, struct kivi_get **out, uint32_t timeout_ms,
                  struct kivi_error *error) {
    if (digest_count == 0 || digest_count > GET_BLOCKS_MAX)
        return error_set(error, KIVI_INVALID_ARGUMENT, "digests", "%zu is not in 1 .. %d",
                         digest_count, GET_BLOCKS_MAX);
    struct kivi_get *get = calloc(1, sizeof *get);
    ProtobufCBinaryData *list = digest_list(digests, digest_count);
    if (get && list) get->stream = stream_open(client->transport, METHOD_GET, error);
    if (!get || !list || !get->stream) {
        free(list);
        free(get);
        return error_set(error, KIVI_RESOURCE_EXHAUSTED, "", "out of memory");
    }

    Kivi__V1__GetRequest question = KIVI__V1__GET_REQUEST__INIT;
    question.fingerprint = digest_bytes(fingerprint);
    question.digests = list;
    question.n_digests = digest_count;
    question.layers = (uint32_t *)layers;
    question.n_layers = layers ? layer_count : 0;
    question.form = (Kivi__V1__Form)form;
    uint64_t deadline_us = stream_deadline_us(get->stream, timeout_ms);
    int code = stream_send(get->stream, &question.base, NULL, 0, deadline_us, error);
    if (code == KIVI_OK) code = stream_finish(get->stream, deadline_us, error);
    free(list);
    if (code != KIVI_OK) {
        kivi_get_close(get);
        return code;
    }
    *out = get;
    return KIVI_OK;
}

int kivi_get_next(struct kivi_get *get, struct kivi_got_page *page, void *buffer,
                  size_t buffer_bytes, bool *done, uint32_t timeout_ms, struct kivi_error *error) {
    const struct wire_message *message;
    uint64_t deadline_us = stream_deadline_us(get->stream, timeout_ms);
    int code = stream_receive(get->stream, &message, deadline_us, error);
    if (code != KIVI_OK) return code;
    *done = !message;
    if (!message) return KIVI_OK;
    if (message->payload_bytes > buffer_bytes)
        return error_set(error, KIVI_INVALID_ARGUMENT, "buffer_bytes", "%zu, and the page has %zu",
                         buffer_bytes, message->payload_bytes);
    Kivi__V1__GetResponse *answer =
        kivi__v1__get_response__unpack(NULL, message->header_bytes, message->header);
    if (!answer) return error_set(error, KIVI_INTERNAL, "", "the answer cannot be read");

    memset(page, 0, sizeof *page);
    page->index = answer->index;
    page->layer = answer->layer;
    page->code = (int)answer->code;
    page->form = (uint32_t)answer->form;
    page->data_bytes = message->payload_bytes;
    text_set(page->message, sizeof page->message, answer->message);
    wire_gather(message, 0, message->payload_bytes, buffer);
    kivi__v1__get_response__free_unpacked(answer, NULL);
    return KIVI_OK;
}

void kivi_get_close(struct kivi_get *get) {
    if (!get) return;
    stream_close(get->stream);
    free(get);
}
