/* SPDX-License-Identifier: Apache-2.0 */
/* session.c - a session's life: open, describe, list, commit, close, delete. */
#include "clients/c/session.h"

#include <stdlib.h>
#include <string.h>

static struct kivi_session *session_make(struct kivi_client *client,
                                         const Kivi__V1__OpenSessionResponse *answer) {
    struct kivi_session *session = calloc(1, sizeof *session);
    if (!session) return NULL;
    session->client = client;
    session->handle = answer->session;
    layout_info_set(&session->info, answer->info);
    const struct kivi_layout *layout = &session->info.layout;
    session->element_bytes = kivi_dtype_bytes(layout->dtype);
    size_t head_bytes = layout->head_dim * session->element_bytes;
    session->kv_row_bytes = layout->kv_heads * head_bytes;
    session->q_row_bytes = layout->query_heads * head_bytes;
    return session;
}

int kivi_session_open(struct kivi_client *client, const struct kivi_session_options *options,
                      struct kivi_session **out, struct kivi_session_state *state,
                      uint32_t timeout_ms, struct kivi_error *error) {
    Kivi__V1__OpenSessionRequest question = KIVI__V1__OPEN_SESSION_REQUEST__INIT;
    Kivi__V1__OpenSessionResponse *answer;
    question.name = (char *)options->name;
    question.fingerprint = digest_bytes(&options->fingerprint);
    question.salt = bytes_of(options->salt, options->salt_bytes);
    question.mode = (Kivi__V1__OpenSessionRequest__Mode)options->mode;
    question.token_ids = (uint32_t *)options->token_ids;
    question.n_token_ids = options->token_ids ? options->token_count : 0;
    int code = CLIENT_CALL(client, METHOD_OPEN_SESSION, &question,
                           kivi__v1__open_session_response, &answer, timeout_ms, error);
    if (code != KIVI_OK) return code;

    struct kivi_session *session = session_make(client, answer);
    if (!session) {
        code = error_set(error, KIVI_RESOURCE_EXHAUSTED, "", "out of memory");
    } else if (session->kv_row_bytes == 0) {
        code = error_set(error, KIVI_INTERNAL, "", "the service did not say the session's layout");
        free(session);
    } else {
        if (state)
            *state = (struct kivi_session_state){
                .length = answer->length,
                .usable = answer->usable,
                .created = answer->created,
                .info = session->info,
            };
        *out = session;
    }
    protobuf_c_message_free_unpacked(&answer->base, NULL);
    return code;
}

void kivi_session_abandon(struct kivi_session *session) {
    free(session);
}

int kivi_session_close(struct kivi_session *session, bool commit, uint32_t timeout_ms,
                       struct kivi_error *error) {
    Kivi__V1__CloseRequest question = KIVI__V1__CLOSE_REQUEST__INIT;
    Kivi__V1__CloseResponse *answer;
    question.session = session->handle;
    question.commit = commit;
    int code = CLIENT_CALL(session->client, METHOD_CLOSE, &question, kivi__v1__close_response,
                           &answer, timeout_ms, error);
    if (code == KIVI_OK) protobuf_c_message_free_unpacked(&answer->base, NULL);
    free(session);
    return code;
}

const struct kivi_layout_info *kivi_session_layout(const struct kivi_session *session) {
    return &session->info;
}

uint64_t kivi_session_handle(const struct kivi_session *session) {
    return session->handle;
}

int kivi_session_commit(struct kivi_session *session, uint32_t durability, uint32_t *reached,
                        uint64_t *length, uint32_t timeout_ms, struct kivi_error *error) {
    Kivi__V1__CommitRequest question = KIVI__V1__COMMIT_REQUEST__INIT;
    Kivi__V1__CommitResponse *answer;
    question.session = session->handle;
    question.durability = (Kivi__V1__Durability)durability;
    int code = CLIENT_CALL(session->client, METHOD_COMMIT, &question, kivi__v1__commit_response,
                           &answer, timeout_ms, error);
    if (code != KIVI_OK) return code;
    if (reached) *reached = (uint32_t)answer->durability;
    if (length) *length = answer->length;
    protobuf_c_message_free_unpacked(&answer->base, NULL);
    return KIVI_OK;
}

void session_info_set(struct kivi_session_info *to, const Kivi__V1__SessionInfo *from) {
    memset(to, 0, sizeof *to);
    if (!from) return;
    text_set(to->name, sizeof to->name, from->name);
    digest_set(&to->fingerprint, from->fingerprint);
    to->length = from->length;
    to->length_committed = from->length_committed;
    to->sealed_tokens = from->sealed_tokens;
    to->bytes_held = from->bytes_held;
    to->bytes_full = from->bytes_full;
    to->blocks_host = from->blocks_host;
    to->blocks_nvme = from->blocks_nvme;
    to->blocks_missing = from->blocks_missing;
    to->open = from->open;
    to->age_ms = from->age_ms;
    to->durability = (uint32_t)from->durability;
}

/* The digests of an answer as an array of the caller's; NULL: memory is out, or one is none. */
static struct kivi_digest *digests_copy(const ProtobufCBinaryData *from, size_t count) {
    struct kivi_digest *to = calloc(count + 1, sizeof *to);
    for (size_t i = 0; to && i < count; i++) {
        if (digest_set(&to[i], from[i])) continue;
        free(to);
        return NULL;
    }
    return to;
}

int kivi_session_describe(struct kivi_client *client, const char *name,
                          struct kivi_session_info *info, struct kivi_layout_info *layout,
                          struct kivi_digest **digests, size_t *digest_count, uint32_t timeout_ms,
                          struct kivi_error *error) {
    Kivi__V1__DescribeRequest question = KIVI__V1__DESCRIBE_REQUEST__INIT;
    Kivi__V1__DescribeResponse *answer;
    question.name = (char *)name;
    int code = CLIENT_CALL(client, METHOD_DESCRIBE, &question, kivi__v1__describe_response, &answer,
                           timeout_ms, error);
    if (code != KIVI_OK) return code;

    struct kivi_digest *list = NULL;
    if (digests) list = digests_copy(answer->digests, answer->n_digests);
    if (digests && !list) {
        code = error_set(error, KIVI_INTERNAL, "digests", "they could not be read");
    } else {
        session_info_set(info, answer->info);
        if (layout) layout_info_set(layout, answer->layout);
        if (digests) *digests = list;
        if (digest_count) *digest_count = answer->n_digests;
    }
    protobuf_c_message_free_unpacked(&answer->base, NULL);
    return code;
}

/* A list that grows by one; false: memory is out. */
static bool list_append(struct kivi_session_info **list, size_t *count,
                        const Kivi__V1__SessionInfo *info) {
    if ((*count & (*count - 1)) == 0) { /* a power of two is full */
        size_t capacity = *count ? 2 * *count : 1;
        struct kivi_session_info *grown = realloc(*list, capacity * sizeof *grown);
        if (!grown) return false;
        *list = grown;
    }
    session_info_set(&(*list)[(*count)++], info);
    return true;
}

/* All messages of a List stream. */
static int list_receive(struct stream *stream, struct kivi_session_info **list, size_t *count,
                        uint64_t deadline_us, struct kivi_error *error) {
    for (;;) {
        const struct wire_message *message;
        int code = stream_receive(stream, &message, deadline_us, error);
        if (code != KIVI_OK || !message) return code;
        Kivi__V1__SessionInfo *info =
            kivi__v1__session_info__unpack(NULL, message->header_bytes, message->header);
        bool good = info && list_append(list, count, info);
        if (info) kivi__v1__session_info__free_unpacked(info, NULL);
        if (!good) return error_set(error, KIVI_INTERNAL, "", "a session could not be read");
    }
}

int kivi_session_list(struct kivi_client *client, const char *prefix, const char *after,
                      uint32_t limit, struct kivi_session_info **infos, size_t *count,
                      uint32_t timeout_ms, struct kivi_error *error) {
    Kivi__V1__ListRequest question = KIVI__V1__LIST_REQUEST__INIT;
    question.prefix = (char *)(prefix ? prefix : "");
    question.after = (char *)(after ? after : "");
    question.limit = limit;
    struct stream *stream = stream_open(client->transport, METHOD_LIST, error);
    if (!stream) return KIVI_RESOURCE_EXHAUSTED;

    struct kivi_session_info *list = NULL;
    size_t found = 0;
    uint64_t deadline_us = stream_deadline_us(stream, timeout_ms);
    int code = stream_send(stream, &question.base, NULL, 0, deadline_us, error);
    if (code == KIVI_OK) code = stream_finish(stream, deadline_us, error);
    if (code == KIVI_OK) code = list_receive(stream, &list, &found, deadline_us, error);
    stream_close(stream);
    if (code != KIVI_OK) {
        free(list);
        return code;
    }
    *infos = list;
    *count = found;
    return KIVI_OK;
}

int kivi_session_delete(struct kivi_client *client, const char *name, uint32_t timeout_ms,
                        struct kivi_error *error) {
    Kivi__V1__DeleteRequest question = KIVI__V1__DELETE_REQUEST__INIT;
    Kivi__V1__DeleteResponse *answer;
    question.name = (char *)name;
    int code = CLIENT_CALL(client, METHOD_DELETE, &question, kivi__v1__delete_response, &answer,
                           timeout_ms, error);
    if (code == KIVI_OK) protobuf_c_message_free_unpacked(&answer->base, NULL);
    return code;
}
