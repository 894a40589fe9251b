/* SPDX-License-Identifier: Apache-2.0 */
/* convert_out.c - messages out of finished requests.
 *
 * An answer is packed straight into the transport's memory: measured once, then written.  Lists
 * that can be long (blocks, digests, layouts) are packed entry by entry, so that no answer needs
 * memory of its own.  The payload is not touched: where it lies in staging is where it is sent
 * from.
 */
#include "service/convert.h"

#include <stdio.h>

#include "proto/kivi/v1/admin.pb-c.h"
#include "proto/kivi/v1/kivi.pb-c.h"
#include "proto/kv_check.h"
#include "service/version.h"

uint32_t kv_status_code(enum kv_status status) {
    /* The numbers are gRPC's and part of every client: they cannot change. */
    switch (status) {
    case KV_OK: return 0;
    case KV_CANCELLED: return 1;
    case KV_INVALID: return 3;
    case KV_DEADLINE: return 4;
    case KV_NOT_FOUND: return 5;
    case KV_EXISTS: return 6;
    case KV_BUSY: return 8;
    case KV_MISMATCH: return 9;
    case KV_ABORTED: return 10;
    case KV_UNSUPPORTED: return 12;
    case KV_IO_ERROR:
    case KV_UNAVAILABLE: return 14;
    case KV_CORRUPT: return 15;
    }
    return 2; /* UNKNOWN: not one of ours */
}

void kv_status_text(enum kv_status status, const char *field, const char *message, char *out,
                    size_t size) {
    static const char *const words[] = {
        "",
        "there is none of this name",
        "it is there already",
        "a limit is in use; try again",
        "the request breaks a rule",
        "the layout or state differs",
        "the length has changed meanwhile",
        "stored bytes failed their checksum",
        "a device failed",
        "cancelled",
        "the deadline passed",
        "the service is stopping or unhealthy",
        "not served by this version",
    };
    static_assert(sizeof words / sizeof words[0] == KV_UNSUPPORTED + 1, "one a status");
    if (!message[0]) message = words[status];
    snprintf(out, size, "%s%s%s", field, field[0] ? ": " : "", message);
}

/* ---- Packing ----------------------------------------------------------------------------------- */

static void pack(const ProtobufCMessage *message, size_t data_bytes, kv_room *room, void *context) {
    uint8_t head[KV_WIRE_DATA_HEAD_MAX];
    size_t head_bytes = data_bytes ? kv_wire_data_head(head, data_bytes) : 0;
    size_t bytes = protobuf_c_message_get_packed_size(message);
    uint8_t *target = room(context, bytes + head_bytes);
    protobuf_c_message_pack(message, target);
    memcpy(target + bytes, head, head_bytes);
}

/* A counted field of number `number` below 16: tag and length.  With a NULL target, only its size. */
static size_t put_head(uint8_t *target, uint32_t number, size_t bytes) {
    size_t count = 0;
    if (target) target[0] = (uint8_t)(number << 3 | 2);
    for (count = 1; bytes > 0x7f; bytes >>= 7, count++)
        if (target) target[count] = (uint8_t)(bytes | 0x80);
    if (target) target[count] = (uint8_t)bytes;
    return count + 1;
}

static size_t put_message(uint8_t *target, uint32_t number, const ProtobufCMessage *message) {
    size_t bytes = protobuf_c_message_get_packed_size(message);
    size_t head = put_head(target, number, bytes);
    if (target) protobuf_c_message_pack(message, target + head);
    return head + bytes;
}

static size_t put_digest(uint8_t *target, uint32_t number, const struct kv_digest *digest) {
    size_t head = put_head(target, number, KV_DIGEST_BYTES);
    if (target) memcpy(target + head, digest->bytes, KV_DIGEST_BYTES);
    return head + KV_DIGEST_BYTES;
}

/* protobuf-c wants pointers to what it only reads. */
static ProtobufCBinaryData binary(const struct kv_digest *digest) {
    return (ProtobufCBinaryData){KV_DIGEST_BYTES, (uint8_t *)(uintptr_t)digest->bytes};
}
static char *text(const char *from) {
    return (char *)(uintptr_t)from;
}

/* ---- Layouts and sessions ---------------------------------------------------------------------- */

/* A LayoutInfo and what hangs on it; points into itself, so it is filled where it stays. */
struct layout_message {
    Kivi__V1__LayoutInfo info;
    Kivi__V1__Layout layout;
    Kivi__V1__Codec codec;
    Kivi__V1__Exact exact;
    uint32_t mixes[KV_MIX_COUNT_MAX * KV_QUARTERS];
};

static void layout_fill(struct layout_message *out, const struct kv_layout_info *from) {
    const struct kv_layout *layout = &from->layout;
    const struct kv_codec *codec = &layout->codec;
    const char *name = kv_codec_name(codec);
    static const Kivi__V1__Codec__Kind kinds[] = {
        [KV_CODEC_RAW]      = KIVI__V1__CODEC__KIND__RAW,
        [KV_CODEC_MINMAX]   = KIVI__V1__CODEC__KIND__MINMAX,
        [KV_CODEC_UNBIASED] = KIVI__V1__CODEC__KIND__UNBIASED,
    };
    kivi__v1__layout_info__init(&out->info);
    kivi__v1__layout__init(&out->layout);
    kivi__v1__codec__init(&out->codec);
    kivi__v1__exact__init(&out->exact);

    out->exact.window_tokens = layout->window_tokens;
    out->exact.sink_blocks = layout->sink_blocks;

    out->codec.preset = strcmp(name, "custom") == 0 ? text("") : text(name);
    out->codec.kind = kinds[codec->kind];
    out->codec.key_bits = codec->key_bits;
    out->codec.value_bits = codec->value_bits;
    out->codec.group = codec->group;
    out->codec.value_rotated = codec->value_rotated;
    out->codec.n_mixes = (size_t)codec->mix_count * KV_QUARTERS;
    out->codec.mixes = out->mixes;
    for (size_t i = 0; i < out->codec.n_mixes; i++)
        out->mixes[i] = codec->mixes[i / KV_QUARTERS][i % KV_QUARTERS];

    out->layout.model = text(from->model);
    out->layout.layers = layout->layers;
    out->layout.kv_heads = layout->heads;
    out->layout.query_heads = layout->heads_q;
    out->layout.head_dim = layout->head_dim;
    out->layout.dtype = (Kivi__V1__Dtype)layout->dtype;
    out->layout.block_tokens = layout->block_tokens;
    out->layout.softmax_scale = layout->score_scale;
    out->layout.codec = &out->codec;
    out->layout.exact = &out->exact;

    out->info.fingerprint = binary(&from->fingerprint);
    out->info.layout = &out->layout;
    out->info.page_bytes_packed = from->page_bytes_packed;
    out->info.page_bytes_full = from->page_bytes_raw;
    out->info.bits_per_element = from->bits_per_element;
}

static void session_fill(Kivi__V1__SessionInfo *out, const struct kv_session_info *from) {
    kivi__v1__session_info__init(out);
    out->name = text(from->name);
    out->fingerprint = binary(&from->fingerprint);
    out->length = from->length;
    out->length_committed = from->length_committed;
    out->sealed_tokens = from->sealed_tokens;
    out->bytes_held = from->bytes_held;
    out->bytes_full = from->bytes_full;
    out->blocks_host = from->blocks_host;
    out->blocks_nvme = from->blocks_nvme;
    out->blocks_missing = from->blocks_missing;
    out->open = from->open;
    out->age_ms = from->age_ms;
    out->durability = (Kivi__V1__Durability)from->durability;
}

void kv_encode_register(const struct kv_request *request, kv_room *room, void *context) {
    Kivi__V1__RegisterLayoutResponse message = KIVI__V1__REGISTER_LAYOUT_RESPONSE__INIT;
    struct layout_message layout;
    layout_fill(&layout, &request->reg.info);
    message.info = &layout.info;
    message.created = request->reg.created;
    pack(&message.base, 0, room, context);
}

static size_t put_layouts(uint8_t *target, const struct kv_request *request) {
    const uint8_t *from = request->staging + request->reply_offset;
    size_t bytes = 0;
    for (uint32_t i = 0; i < request->layouts.count; i++) {
        struct kv_layout_info info;
        struct layout_message layout;
        memcpy(&info, from + i * sizeof info, sizeof info);
        layout_fill(&layout, &info);
        bytes += put_message(target ? target + bytes : NULL, 1, &layout.info.base);
    }
    return bytes;
}

void kv_encode_layouts(const struct kv_request *request, kv_room *room, void *context) {
    put_layouts(room(context, put_layouts(NULL, request)), request);
}

void kv_encode_open(const struct kv_request *request, kv_room *room, void *context) {
    Kivi__V1__OpenSessionResponse message = KIVI__V1__OPEN_SESSION_RESPONSE__INIT;
    struct layout_message layout;
    layout_fill(&layout, &request->open.info);
    message.session = request->open.session;
    message.length = request->open.length;
    message.created = request->open.created;
    message.usable = request->open.usable;
    message.info = &layout.info;
    pack(&message.base, 0, room, context);
}

void kv_encode_commit(const struct kv_request *request, kv_room *room, void *context) {
    Kivi__V1__CommitResponse message = KIVI__V1__COMMIT_RESPONSE__INIT;
    message.length = request->commit.length;
    message.durability = (Kivi__V1__Durability)request->commit.durability;
    pack(&message.base, 0, room, context);
}

void kv_encode_close(const struct kv_request *request, kv_room *room, void *context) {
    Kivi__V1__CloseResponse message = KIVI__V1__CLOSE_RESPONSE__INIT;
    message.length = request->commit.length;
    pack(&message.base, 0, room, context);
}

void kv_encode_delete(const struct kv_request *request, kv_room *room, void *context) {
    Kivi__V1__DeleteResponse message = KIVI__V1__DELETE_RESPONSE__INIT;
    pack(&message.base, 0, room, context);
}

void kv_encode_session(const struct kv_session_info *info, kv_room *room, void *context) {
    Kivi__V1__SessionInfo message;
    session_fill(&message, info);
    pack(&message.base, 0, room, context);
}

static size_t put_describe(uint8_t *target, const struct kv_request *request) {
    const struct kv_digest *digests =
        (const struct kv_digest *)(request->staging + request->reply_offset);
    Kivi__V1__SessionInfo session;
    struct layout_message layout;
    session_fill(&session, &request->named.info);
    layout_fill(&layout, &request->named.layout);
    size_t bytes = put_message(target, 1, &session.base);
    bytes += put_message(target ? target + bytes : NULL, 2, &layout.info.base);
    for (uint32_t i = 0; i < request->named.digest_count; i++)
        bytes += put_digest(target ? target + bytes : NULL, 3, &digests[i]);
    return bytes;
}

void kv_encode_describe(const struct kv_request *request, kv_room *room, void *context) {
    put_describe(room(context, put_describe(NULL, request)), request);
}

/* ---- Blocks ---------------------------------------------------------------------------------- */

static size_t put_lookup(uint8_t *target, const struct kv_request *request,
                         const Kivi__V1__LookupResponse *totals) {
    const struct kv_lookup_block *blocks =
        (const struct kv_lookup_block *)(const void *)(request->staging + request->reply_offset);
    size_t bytes = 0;
    for (uint32_t i = 0; i < request->lookup.block_count; i++) {
        Kivi__V1__LookupResponse__Block block = KIVI__V1__LOOKUP_RESPONSE__BLOCK__INIT;
        block.digest = binary(&blocks[i].digest);
        block.tier = (Kivi__V1__Tier)blocks[i].tier;
        block.bytes = blocks[i].bytes;
        bytes += put_message(target ? target + bytes : NULL, 1, &block.base);
    }
    if (target) protobuf_c_message_pack(&totals->base, target + bytes);
    return bytes + protobuf_c_message_get_packed_size(&totals->base);
}

void kv_encode_lookup(const struct kv_request *request, kv_room *room, void *context) {
    Kivi__V1__LookupResponse totals = KIVI__V1__LOOKUP_RESPONSE__INIT;
    totals.tokens = (uint64_t)request->lookup.block_count * KV_BLOCK_TOKENS;
    totals.load_us = request->lookup.load_us;
    totals.lease_ms = request->lookup.lease_ms;
    put_lookup(room(context, put_lookup(NULL, request, &totals)), request, &totals);
}

void kv_encode_put(const struct kv_request *request, kv_room *room, void *context) {
    Kivi__V1__PutResponse message = KIVI__V1__PUT_RESPONSE__INIT;
    char sentence[sizeof request->field + sizeof request->message + 2] = "";
    message.digest = binary(&request->put.digest);
    message.credit = KV_PUT_OPEN_MAX;
    if (request->status == KV_OK) {
        message.existed = request->put.existed;
        message.durability = (Kivi__V1__Durability)request->put.durability;
        message.bytes_held = request->put.bytes_held;
    } else {
        message.code = kv_status_code(request->status);
        kv_status_text(request->status, request->field, request->message, sentence,
                       sizeof sentence);
        message.message = sentence;
    }
    pack(&message.base, 0, room, context);
}

void kv_encode_get(const struct kv_request *request, uint32_t index, kv_room *room, void *context) {
    Kivi__V1__GetResponse message = KIVI__V1__GET_RESPONSE__INIT;
    char sentence[sizeof request->field + sizeof request->message + 2] = "";
    message.index = index;
    message.layer = request->get.layer;
    if (request->status == KV_OK) {
        message.form = (Kivi__V1__Form)request->get.form;
    } else {
        message.code = kv_status_code(request->status);
        kv_status_text(request->status, request->field, request->message, sentence,
                       sizeof sentence);
        message.message = sentence;
    }
    pack(&message.base, request->status == KV_OK ? request->reply_bytes : 0, room, context);
}

/* ---- Tokens ---------------------------------------------------------------------------------- */

void kv_encode_append(const struct kv_request *request, kv_room *room, void *context) {
    Kivi__V1__AppendResponse message = KIVI__V1__APPEND_RESPONSE__INIT;
    message.length = request->append.length;
    message.session_length = request->append.session_length;
    message.sealed_tokens = request->append.sealed_tokens;
    message.blocks_shared = request->append.blocks_shared;
    pack(&message.base, 0, room, context);
}

void kv_encode_attend(const struct kv_request *request, kv_room *room, void *context) {
    enum { SENTENCE_MAX = 48 + 160 + 2 };
    Kivi__V1__AttendResponse message = KIVI__V1__ATTEND_RESPONSE__INIT;
    Kivi__V1__AttendResponse__Item items[KV_ATTEND_ITEMS_MAX], *pointers[KV_ATTEND_ITEMS_MAX];
    char sentences[KV_ATTEND_ITEMS_MAX][SENTENCE_MAX];
    for (uint32_t i = 0; i < request->attend.item_count; i++) {
        const struct kv_attend_item *from = &request->attend.items[i];
        pointers[i] = &items[i];
        kivi__v1__attend_response__item__init(&items[i]);
        items[i].length = from->length;
        if (from->status == KV_OK) continue;
        items[i].code = kv_status_code(from->status);
        kv_status_text(from->status, from->field, from->message, sentences[i], SENTENCE_MAX);
        items[i].message = sentences[i];
    }
    message.id = request->attend.id;
    message.n_items = request->attend.item_count;
    message.items = pointers;
    pack(&message.base, request->reply_bytes, room, context);
}

void kv_encode_fetch(const struct kv_request *request, kv_room *room, void *context) {
    Kivi__V1__FetchResponse message = KIVI__V1__FETCH_RESPONSE__INIT;
    message.layer = request->fetch.layer;
    message.begin = request->fetch.begin;
    message.tokens = request->fetch.tokens;
    pack(&message.base, request->reply_bytes, room, context);
}

/* ---- Stats ----------------------------------------------------------------------------------- */

void kv_encode_stats(const struct kv_request *request, kv_room *room, void *context) {
    const struct kv_engine_stats *from = &request->stats;
    const struct kv_store_stats *store = &from->store;
    Kivi__V1__StatsResponse message = KIVI__V1__STATS_RESPONSE__INIT;
    Kivi__V1__StatsResponse__Tier host = KIVI__V1__STATS_RESPONSE__TIER__INIT, nvme = host,
                                  gpu = host;
    host.blocks = store->blocks_resident;
    host.bytes = store->arena_bytes_used;
    host.bytes_max = from->arena_bytes_max;
    nvme.blocks = store->blocks_on_disk;
    nvme.bytes = store->disk_bytes_used;
    nvme.bytes_max = from->disk_bytes_max;
    message.version = text(KV_VERSION);
    message.backend = text(from->backend ? from->backend : "");
    message.io_engine = text(from->io_engine ? from->io_engine : "");
    message.uptime_ms = from->uptime_ms;
    message.ready = from->ready;
    message.host = &host;
    message.nvme = &nvme;
    gpu.blocks = from->gpu.blocks;
    gpu.bytes = from->gpu.bytes_used;
    gpu.bytes_max = from->gpu.bytes_max;
    if (from->gpu.bytes_max) message.gpu = &gpu;
    message.pages_from_gpu = from->pages_from_gpu;
    message.gpu_copies = from->gpu.copies;
    message.gpu_bytes_copied = from->gpu.bytes_copied;
    message.gpu_evictions = from->gpu.evictions;
    message.gpu_refusals = from->gpu.refusals;
    message.blocks = store->blocks;
    message.blocks_max = from->blocks_max;
    message.sessions_open = from->sessions_open;
    message.sessions_known = from->sessions_known;
    message.sessions_max = from->sessions_max;
    message.layouts = from->layouts;
    message.tail_bytes = from->tail_bytes;
    message.tail_bytes_max = from->tail_bytes_max;
    message.requests = from->requests;
    message.errors = from->errors;
    message.tokens_appended = from->tokens_appended;
    message.rows_attended = from->rows_attended;
    message.bytes_in = from->bytes_in;
    message.bytes_out = from->bytes_out;
    message.blocks_sealed = from->blocks_sealed;
    message.blocks_shared = from->blocks_shared;
    message.pages_from_host = from->pages_from_host;
    message.pages_from_nvme = from->pages_from_nvme;
    message.evictions = store->evictions;
    message.drops = store->drops;
    message.spills = store->spills;
    message.restores = store->restores;
    message.corruptions = store->corruptions;
    message.io_errors = store->io_errors;
    message.bytes_written = store->bytes_written;
    message.bytes_read = store->bytes_read;
    message.segments_lost = store->segments_lost;
    message.recovered_blocks = store->recovered_blocks;
    message.recovered_sessions = from->recovered_sessions;
    message.recovery_us = store->recovery_us;
    message.recovery_bytes = store->recovery_bytes;
    message.recovery_clean = store->recovery_clean;
    pack(&message.base, 0, room, context);
}
