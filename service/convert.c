/* SPDX-License-Identifier: Apache-2.0 */
/* convert.c - requests out of messages.  convert_out.c goes the other way.
 *
 * Three sorts of helpers, then one decoder a call: unpacking into lent memory, refusing with a
 * field and a sentence, and copying what all calls have (digests, names, salts, numbers).
 */
#include "service/convert.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>

#include "proto/kivi/v1/admin.pb-c.h"
#include "proto/kivi/v1/kivi.pb-c.h"
#include "proto/kv_check.h"

enum { LEND_BYTES_MIN = 64 << 10, LEND_PIECES_MAX = (64 << 10) / sizeof(struct kv_span) };

/* ---- Unpacking into lent memory ----------------------------------------------------------------- */

/* protobuf-c takes memory in pieces; it gets them one behind the other, and NULL at the end. */
static void *memory_take(void *context, size_t bytes) {
    struct kv_inbound *in = context;
    size_t padded = (bytes + 15) & ~(size_t)15;
    if (padded < bytes || padded > in->memory_bytes) return NULL;
    void *taken = in->memory;
    in->memory += padded;
    in->memory_bytes -= padded;
    return taken;
}

/* Everything goes at once, when the caller uses its memory again. */
static void memory_give(void *context, void *pointer) {
}

static enum kv_status refuse(struct kv_request *request, const char *field, const char *format,
                             ...) __attribute__((format(printf, 3, 4)));
static enum kv_status refuse(struct kv_request *request, const char *field, const char *format,
                             ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(request->message, sizeof request->message, format, arguments);
    va_end(arguments);
    snprintf(request->field, sizeof request->field, "%s", field);
    return request->status = KV_INVALID;
}

static void *unpack(struct kv_inbound *in, const ProtobufCMessageDescriptor *type,
                    struct kv_request *request) {
    ProtobufCAllocator allocator = {memory_take, memory_give, in};
    void *message = protobuf_c_message_unpack(type, &allocator, in->wire.rest_bytes, in->wire.rest);
    if (!message) refuse(request, "", "the message is damaged, or has far too many parts");
    return message;
}

#define UNPACK(type, name)                                                                      \
    Kivi__V1__##type *message = unpack(in, &kivi__v1__##name##__descriptor, request);           \
    if (!message) return KV_INVALID

/* ---- What all calls have ------------------------------------------------------------------------ */

static enum kv_status read_digest(struct kv_request *request, const char *field,
                                  const ProtobufCBinaryData *bytes, struct kv_digest *out) {
    if (bytes->len != KV_DIGEST_BYTES)
        return refuse(request, field, "is %zu bytes long, not %d", bytes->len, KV_DIGEST_BYTES);
    memcpy(out->bytes, bytes->data, KV_DIGEST_BYTES);
    return KV_OK;
}

static enum kv_status read_salt(struct kv_request *request, const ProtobufCBinaryData *bytes,
                                struct kv_salt *out) {
    if (bytes->len > KV_SALT_MAX)
        return refuse(request, "salt", "is %zu bytes long; at most %d", bytes->len, KV_SALT_MAX);
    if (bytes->len) memcpy(out->bytes, bytes->data, bytes->len);
    out->count = (uint32_t)bytes->len;
    return KV_OK;
}

/* The length of the UTF-8 character at `text`, or 0.  Overlong forms, surrogates and what is
 * above U+10FFFF are none. */
static size_t utf8_length(const uint8_t *text) {
    static const uint32_t least[] = {0, 0, 0x80, 0x800, 0x10000};
    uint8_t first = text[0];
    size_t length = first < 0x80 ? 1 : first < 0xc0 ? 0 : first < 0xe0 ? 2 : first < 0xf0 ? 3
                    : first < 0xf8                                                          ? 4
                                                                                            : 0;
    if (length < 2) return length;
    uint32_t code = first & (0x7fu >> length);
    for (size_t i = 1; i < length; i++) {
        if ((text[i] & 0xc0) != 0x80) return 0;
        code = code << 6 | (text[i] & 0x3f);
    }
    bool surrogate = code >= 0xd800 && code < 0xe000;
    return code < least[length] || code > 0x10ffff || surrogate ? 0 : length;
}

static bool text_is_clean(const char *text) {
    const uint8_t *at = (const uint8_t *)text;
    while (*at) {
        size_t length = utf8_length(at);
        if (length == 0 || *at < 0x20 || *at == 0x7f) return false;
        at += length;
    }
    return true;
}

/* A zero byte ends the C string that protobuf-c makes of a text; two names must not become one. */
static bool field_has_zero(const struct kv_inbound *in, uint32_t number) {
    struct kv_span rest = {in->wire.rest, in->wire.rest_bytes};
    struct kv_wire_field field;
    while (kv_wire_next(&rest, &field))
        if (field.number == number && field.type == 2 && field.bytes.count &&
            memchr(field.bytes.bytes, 0, field.bytes.count))
            return true;
    return false;
}

/* `number` is the field's in the message. */
static enum kv_status read_name(struct kv_request *request, const struct kv_inbound *in,
                                const char *field, uint32_t number, const char *name, bool empty_ok,
                                char out[KV_NAME_MAX + 1]) {
    size_t bytes = strlen(name);
    if (field_has_zero(in, number) || !text_is_clean(name))
        return refuse(request, field, "is not UTF-8 without control characters");
    if (bytes > KV_NAME_MAX || (bytes == 0 && !empty_ok))
        return refuse(request, field, "is %zu bytes long, not %d to %d", bytes, !empty_ok,
                      KV_NAME_MAX);
    memcpy(out, name, bytes + 1);
    return KV_OK;
}

static enum kv_status read_durability(struct kv_request *request, Kivi__V1__Durability from,
                                      enum kv_durability least, enum kv_durability *out) {
    *out = from ? (enum kv_durability)from : least;
    if (*out < least || *out > KV_SYNCED)
        return refuse(request, "durability", "%d cannot be waited for here", (int)from);
    return KV_OK;
}

static enum kv_status read_form(struct kv_request *request, Kivi__V1__Form from,
                                enum kv_form *out) {
    *out = from ? (enum kv_form)from : KV_FORM_FULL;
    if (*out != KV_FORM_FULL && *out != KV_FORM_PACKED)
        return refuse(request, "form", "%d is none", (int)from);
    return KV_OK;
}

/* Puts `bytes` of something beside the payload, at the next multiple of 64.  Cannot run out for a
 * message within the limit: staging is three times that. */
static enum kv_status stage(struct kv_request *request, size_t *used, const void *from, size_t bytes,
                            uint64_t *offset) {
    size_t at = (*used + 63) & ~(size_t)63;
    if (at > request->staging_bytes || bytes > request->staging_bytes - at)
        return refuse(request, "", "the message is too large for this service");
    if (bytes) memcpy(request->staging + at, from, bytes);
    *offset = at;
    *used = at + bytes;
    return KV_OK;
}

/* The payload, to the front of staging. */
static enum kv_status stage_data(struct kv_inbound *in, struct kv_request *request, size_t *used) {
    /* engine.h: a staging buffer is three of the largest payloads, and 64 KiB. */
    if (in->wire.data_bytes > (request->staging_bytes - (64 << 10)) / 3)
        return refuse(request, "data", "%zu bytes are more than this service takes",
                      in->wire.data_bytes);
    kv_wire_gather(&in->wire, request->staging);
    *used = request->bytes_in = in->wire.data_bytes;
    return KV_OK;
}

/* The payload stays where it is, if that pays; false: it does not.  Below LEND_BYTES_MIN a copy costs
 * less than keeping the message. */
static bool lend_data(struct kv_inbound *in, struct kv_request *request) {
    const struct kv_wire *wire = &in->wire;
    size_t left = wire->data_bytes, offset = wire->data_offset;
    if (!in->lend || left < LEND_BYTES_MIN || left > (request->staging_bytes - (64 << 10)) / 3)
        return false;
    struct kv_span *pieces = (struct kv_span *)request->staging;
    uint32_t count = 0;
    for (const struct kv_span *piece = wire->data; left > 0; piece++, offset = 0) {
        if (piece->count == offset) continue;
        if (count == LEND_PIECES_MAX) return false;
        size_t run = piece->count - offset < left ? piece->count - offset : left;
        pieces[count++] = (struct kv_span){piece->bytes + offset, run};
        left -= run;
    }
    request->put.pieces = pieces;
    request->put.piece_count = count;
    request->bytes_in = wire->data_bytes;
    return true;
}

/* A list that has no payload beside it, to the front of staging. */
static enum kv_status stage_first(struct kv_request *request, const void *from, size_t bytes) {
    size_t used = 0;
    uint64_t offset;
    return stage(request, &used, from, bytes, &offset);
}

/* ---- Layouts --------------------------------------------------------------------------------- */

/* A number that must fit 16 bits; its real range is layout.c's to know. */
static uint16_t narrow(struct kv_request *request, const char *field, uint32_t value) {
    if (value > UINT16_MAX && request->status == KV_OK)
        refuse(request, field, "%u is out of range", value);
    return (uint16_t)value;
}
static uint8_t narrow8(struct kv_request *request, const char *field, uint32_t value) {
    if (value > UINT8_MAX && request->status == KV_OK)
        refuse(request, field, "%u is out of range", value);
    return (uint8_t)value;
}

/* The codec as its fields say, a preset's name apart. */
static void read_codec_fields(struct kv_request *request, const Kivi__V1__Codec *from,
                              struct kv_codec *out) {
    *out = (struct kv_codec){
        .key_bits      = narrow8(request, "layout.codec.key_bits", from->key_bits),
        .value_bits    = narrow8(request, "layout.codec.value_bits", from->value_bits),
        .group         = narrow8(request, "layout.codec.group", from->group),
        .value_rotated = from->value_rotated != 0,
        .mix_count     = (uint8_t)(from->n_mixes / KV_QUARTERS),
    };
    switch (from->kind) {
    case KIVI__V1__CODEC__KIND__RAW: out->kind = KV_CODEC_RAW; break;
    case KIVI__V1__CODEC__KIND__MINMAX: out->kind = KV_CODEC_MINMAX; break;
    case KIVI__V1__CODEC__KIND__UNBIASED: out->kind = KV_CODEC_UNBIASED; break;
    default: refuse(request, "layout.codec.kind", "%d is none", (int)from->kind); return;
    }
    if (from->n_mixes % KV_QUARTERS != 0 || from->n_mixes > KV_MIX_COUNT_MAX * KV_QUARTERS) {
        refuse(request, "layout.codec.mixes", "%zu numbers are not 4, 8, 12 or 16", from->n_mixes);
        return;
    }
    for (size_t i = 0; i < from->n_mixes; i++)
        out->mixes[i / KV_QUARTERS][i % KV_QUARTERS] =
            narrow8(request, "layout.codec.mixes", from->mixes[i]);
}

static bool codec_has_fields(const Kivi__V1__Codec *codec) {
    return codec->kind || codec->key_bits || codec->value_bits || codec->group ||
           codec->value_rotated || codec->n_mixes;
}

/* The codec, and the exact parts that go with it unless the layout says otherwise. */
static void read_codec(struct kv_request *request, const Kivi__V1__Codec *from,
                       struct kv_preset *preset) {
    bool named = !from || from->preset[0] || !codec_has_fields(from);
    const char *name = from && from->preset[0] ? from->preset : "kivi2";
    if (named && kv_preset_find(name, preset) != KV_OK) {
        refuse(request, "layout.codec.preset", "'%.40s' is none", name);
        return;
    }
    if (!from || !codec_has_fields(from)) return;

    struct kv_codec codec;
    read_codec_fields(request, from, &codec);
    if (request->status != KV_OK) return;
    if (!named) {
        uint16_t sinks = codec.kind == KV_CODEC_UNBIASED ? 1 : 0;
        *preset = (struct kv_preset){.window_tokens = 128, .sink_blocks = sinks};
    } else if (memcmp(&codec, &preset->codec, sizeof codec) != 0) {
        refuse(request, "layout.codec", "the fields say something else than preset '%.40s'", name);
    }
    preset->codec = codec;
}

enum kv_status kv_decode_register(struct kv_inbound *in, struct kv_request *request) {
    UNPACK(RegisterLayoutRequest, register_layout_request);
    request->kind = KV_REQUEST_REGISTER;
    const Kivi__V1__Layout *from = message->layout;
    if (!from) return refuse(request, "layout", "is missing");

    struct kv_preset preset = {0};
    read_codec(request, from->codec, &preset);
    if (from->exact) {
        preset.window_tokens =
            narrow(request, "layout.exact.window_tokens", from->exact->window_tokens);
        preset.sink_blocks = narrow(request, "layout.exact.sink_blocks", from->exact->sink_blocks);
    }
    struct kv_layout layout = {
        .layers        = narrow(request, "layout.layers", from->layers),
        .heads         = narrow(request, "layout.kv_heads", from->kv_heads),
        .heads_q       = narrow(request, "layout.query_heads", from->query_heads),
        .head_dim      = narrow(request, "layout.head_dim", from->head_dim),
        .block_tokens  = narrow(request, "layout.block_tokens", from->block_tokens),
        .window_tokens = preset.window_tokens,
        .sink_blocks   = preset.sink_blocks,
        .dtype         = narrow8(request, "layout.dtype", (uint32_t)from->dtype),
        .score_scale   = from->softmax_scale,
        .codec         = preset.codec,
    };
    if (layout.block_tokens == 0) layout.block_tokens = KV_BLOCK_TOKENS;
    if (layout.score_scale == 0 && layout.head_dim)
        layout.score_scale = (float)(1.0 / sqrt((double)layout.head_dim));
    request->reg.layout = layout;

    size_t bytes = strlen(from->model);
    if (bytes > KV_MODEL_MAX)
        return refuse(request, "layout.model", "is %zu bytes long; at most %d", bytes, KV_MODEL_MAX);
    if (!text_is_clean(from->model))
        return refuse(request, "layout.model", "is not UTF-8 without control characters");
    memcpy(request->reg.model, from->model, bytes + 1);
    return request->status;
}

enum kv_status kv_decode_layouts(struct kv_inbound *in, struct kv_request *request) {
    UNPACK(LayoutsRequest, layouts_request);
    request->kind = KV_REQUEST_LAYOUTS;
    return KV_OK;
}

enum kv_status kv_decode_stats(struct kv_inbound *in, struct kv_request *request) {
    UNPACK(StatsRequest, stats_request);
    request->kind = KV_REQUEST_STATS;
    return KV_OK;
}

/* ---- Blocks ---------------------------------------------------------------------------------- */

static enum kv_status lookup_digests(struct kv_request *request,
                                     const Kivi__V1__LookupRequest *message) {
    if (message->n_digests > KV_LOOKUP_BLOCKS_MAX)
        return refuse(request, "digests", "%zu are more than %d", message->n_digests,
                      KV_LOOKUP_BLOCKS_MAX);
    for (size_t i = 0; i < message->n_digests; i++) {
        struct kv_digest digest;
        enum kv_status status = read_digest(request, "digests", &message->digests[i], &digest);
        if (status != KV_OK) return status;
        memcpy(request->staging + i * sizeof digest, &digest, sizeof digest);
    }
    request->lookup.digest_count = (uint32_t)message->n_digests;
    return KV_OK;
}

enum kv_status kv_decode_lookup(struct kv_inbound *in, struct kv_request *request) {
    UNPACK(LookupRequest, lookup_request);
    request->kind = KV_REQUEST_LOOKUP;
    struct kv_lookup *lookup = &request->lookup;
    enum kv_status status =
        read_digest(request, "fingerprint", &message->fingerprint, &lookup->fingerprint);
    if (status == KV_OK) status = read_salt(request, &message->salt, &lookup->salt);
    if (status != KV_OK) return status;

    if (message->lease_ms > KV_LEASE_MS_MAX)
        return refuse(request, "lease_ms", "%u is more than %d", message->lease_ms, KV_LEASE_MS_MAX);
    lookup->lease_ms = message->lease_ms;
    if (message->n_digests) {
        if (message->n_token_ids)
            return refuse(request, "token_ids", "either these or digests, not both");
        return lookup_digests(request, message);
    }
    /* A last partial block is ignored. */
    size_t blocks = message->n_token_ids / KV_BLOCK_TOKENS;
    if (blocks > KV_LOOKUP_BLOCKS_MAX)
        return refuse(request, "token_ids", "%zu blocks are more than %d", blocks,
                      KV_LOOKUP_BLOCKS_MAX);
    lookup->token_count = (uint32_t)message->n_token_ids;
    return stage_first(request, message->token_ids, message->n_token_ids * sizeof(uint32_t));
}

static enum kv_status put_name(struct kv_inbound *in, struct kv_request *request,
                               const Kivi__V1__PutRequest *message) {
    struct kv_put *put = &request->put;
    if (message->fingerprint.len) {
        enum kv_status status =
            read_digest(request, "fingerprint", &message->fingerprint, in->fingerprint);
        if (status != KV_OK) return status;
        *in->has_fingerprint = true;
    }
    if (!*in->has_fingerprint)
        return refuse(request, "fingerprint", "is missing from the first message of the stream");
    put->fingerprint = *in->fingerprint;

    put->has_digest = message->digest.len != 0;
    put->has_parent = message->parent.len != 0;
    if (put->has_digest) return read_digest(request, "digest", &message->digest, &put->digest);
    if (message->n_token_ids != KV_BLOCK_TOKENS)
        return refuse(request, "token_ids", "%zu instead of %d, and there is no digest",
                      message->n_token_ids, KV_BLOCK_TOKENS);
    memcpy(put->token_ids, message->token_ids, sizeof put->token_ids);
    enum kv_status status = KV_OK;
    if (put->has_parent) status = read_digest(request, "parent", &message->parent, &put->parent);
    return status == KV_OK ? read_salt(request, &message->salt, &put->salt) : status;
}

enum kv_status kv_decode_put(struct kv_inbound *in, struct kv_request *request) {
    UNPACK(PutRequest, put_request);
    request->kind = KV_REQUEST_PUT;
    struct kv_put *put = &request->put;
    size_t used = 0;
    enum kv_status status = put_name(in, request, message);
    if (status == KV_OK)
        status = read_durability(request, message->durability, KV_VOLATILE, &put->durability);
    if (status == KV_OK) status = read_form(request, message->form, &put->form);
    bool lent = status == KV_OK && put->form == KV_FORM_FULL && lend_data(in, request);
    used = request->bytes_in;
    if (status == KV_OK && !lent) status = stage_data(in, request, &used);
    if (status != KV_OK) return status;

    put->layer = message->layer;
    put->raw = message->raw;
    put->has_energy = message->n_query_energy != 0;
    put->energy_count = (uint32_t)message->n_query_energy;
    return stage(request, &used, message->query_energy, message->n_query_energy * sizeof(float),
                 &put->energy_offset);
}

static enum kv_status plan_layers(struct kv_request *why, const uint32_t *layers, size_t count,
                                  struct kv_plan *plan) {
    if (count > KV_LAYERS_MAX)
        return refuse(why, "layers", "%zu are more than %d", count, KV_LAYERS_MAX);
    for (size_t i = 0; i < count; i++) {
        if (layers[i] >= KV_LAYERS_MAX) return refuse(why, "layers", "there is no %u", layers[i]);
        plan->layers[i] = (uint16_t)layers[i];
    }
    plan->layer_count = (uint32_t)count;
    return KV_OK;
}

enum kv_status kv_decode_get(struct kv_inbound *in, struct kv_plan *plan,
                             struct kv_request *request) {
    UNPACK(GetRequest, get_request);
    enum kv_status status =
        read_digest(request, "fingerprint", &message->fingerprint, &plan->fingerprint);
    if (status == KV_OK) status = read_form(request, message->form, &plan->form);
    if (status == KV_OK) status = plan_layers(request, message->layers, message->n_layers, plan);
    if (status != KV_OK) return status;
    if (message->n_digests == 0 || message->n_digests > KV_GET_BLOCKS_MAX)
        return refuse(request, "digests", "%zu are not 1 to %d", message->n_digests,
                      KV_GET_BLOCKS_MAX);
    plan->digest_count = (uint32_t)message->n_digests;
    for (size_t i = 0; i < message->n_digests && status == KV_OK; i++)
        status = read_digest(request, "digests", &message->digests[i], &plan->digests[i]);
    return status;
}

/* ---- Sessions -------------------------------------------------------------------------------- */

enum kv_status kv_decode_open(struct kv_inbound *in, struct kv_request *request) {
    UNPACK(OpenSessionRequest, open_session_request);
    request->kind = KV_REQUEST_OPEN;
    struct kv_open *open = &request->open;
    enum kv_status status = read_name(request, in, "name", 1, message->name, false, open->name);
    if (status == KV_OK)
        status = read_digest(request, "fingerprint", &message->fingerprint, &open->fingerprint);
    if (status == KV_OK) status = read_salt(request, &message->salt, &open->salt);
    if (status != KV_OK) return status;

    open->mode = (enum kv_open_mode)message->mode;
    if ((uint32_t)message->mode > KV_OPEN_EXISTING)
        return refuse(request, "mode", "%d is none", (int)message->mode);
    open->token_count = (uint32_t)message->n_token_ids;
    return stage_first(request, message->token_ids, message->n_token_ids * sizeof(uint32_t));
}

enum kv_status kv_decode_commit(struct kv_inbound *in, struct kv_request *request) {
    UNPACK(CommitRequest, commit_request);
    request->kind = KV_REQUEST_COMMIT;
    request->commit.session = message->session;
    request->commit.commit = true;
    return read_durability(request, message->durability, KV_WRITTEN, &request->commit.durability);
}

enum kv_status kv_decode_close(struct kv_inbound *in, struct kv_request *request) {
    UNPACK(CloseRequest, close_request);
    request->kind = KV_REQUEST_CLOSE;
    request->commit.session = message->session;
    request->commit.commit = message->commit;
    request->commit.durability = KV_WRITTEN;
    return KV_OK;
}

enum kv_status kv_decode_delete(struct kv_inbound *in, struct kv_request *request) {
    UNPACK(DeleteRequest, delete_request);
    request->kind = KV_REQUEST_DELETE;
    return read_name(request, in, "name", 1, message->name, false, request->named.name);
}

enum kv_status kv_decode_describe(struct kv_inbound *in, struct kv_request *request) {
    UNPACK(DescribeRequest, describe_request);
    request->kind = KV_REQUEST_DESCRIBE;
    return read_name(request, in, "name", 1, message->name, false, request->named.name);
}

enum kv_status kv_decode_list(struct kv_inbound *in, struct kv_plan *plan,
                              struct kv_request *request) {
    UNPACK(ListRequest, list_request);
    plan->limit = message->limit;
    enum kv_status status = read_name(request, in, "prefix", 1, message->prefix, true, plan->prefix);
    return status == KV_OK ? read_name(request, in, "after", 3, message->after, true, plan->after)
                           : status;
}

enum kv_status kv_decode_append(struct kv_inbound *in, struct kv_request *request) {
    UNPACK(AppendRequest, append_request);
    request->kind = KV_REQUEST_APPEND;
    struct kv_append *append = &request->append;
    append->session = message->session;
    append->layer = message->layer;
    append->all_layers = message->all_layers;
    append->expected_length = message->expected_length;
    append->tokens = message->tokens;
    if (message->n_token_ids && message->n_token_ids != message->tokens)
        return refuse(request, "token_ids", "%zu for %u tokens", message->n_token_ids,
                      message->tokens);

    size_t used = 0;
    enum kv_status status = stage_data(in, request, &used);
    append->has_token_ids = message->n_token_ids != 0;
    if (status == KV_OK)
        status = stage(request, &used, message->token_ids, message->n_token_ids * sizeof(uint32_t),
                       &append->token_ids_offset);
    append->has_energy = message->n_query_energy != 0;
    append->energy_count = (uint32_t)message->n_query_energy;
    if (status == KV_OK)
        status = stage(request, &used, message->query_energy,
                       message->n_query_energy * sizeof(float), &append->energy_offset);
    return status;
}

/* The item's lists go beside the payload; their lengths are checked first, because a list of small
 * numbers is shorter on the wire than in memory. */
static enum kv_status attend_item(struct kv_request *request, size_t index, size_t *used,
                                  const Kivi__V1__AttendRequest__Item *from) {
    struct kv_attend_item *item = &request->attend.items[index];
    char field[48];
    *item = (struct kv_attend_item){
        .session         = from->session,
        .rows            = from->rows,
        .mask            = (enum kv_mask)from->mask,
        .has_visible     = from->n_visible != 0,
        .append_tokens   = from->append_tokens,
        .expected_length = from->expected_length,
        .has_token_ids   = from->n_token_ids != 0,
        .no_energy       = from->no_energy,
    };
    snprintf(field, sizeof field, "items[%zu].rows", index);
    if (from->rows > KV_ROWS_MAX)
        return refuse(request, field, "%u are more than %d", from->rows, KV_ROWS_MAX);
    snprintf(field, sizeof field, "items[%zu].mask", index);
    if ((uint32_t)from->mask > KV_MASK_CAUSAL)
        return refuse(request, field, "%d is none", (int)from->mask);
    snprintf(field, sizeof field, "items[%zu].visible", index);
    if (from->n_visible && from->n_visible != from->rows)
        return refuse(request, field, "%zu for %u rows", from->n_visible, from->rows);
    enum kv_status status = stage(request, used, from->visible, from->n_visible * sizeof(uint32_t),
                                  &item->visible_offset);
    if (status != KV_OK) return status;
    snprintf(field, sizeof field, "items[%zu].token_ids", index);
    if (from->n_token_ids && from->n_token_ids != from->append_tokens)
        return refuse(request, field, "%zu for %u tokens", from->n_token_ids, from->append_tokens);
    return stage(request, used, from->token_ids, from->n_token_ids * sizeof(uint32_t),
                 &item->token_ids_offset);
}

enum kv_status kv_decode_attend(struct kv_inbound *in, struct kv_request *request) {
    UNPACK(AttendRequest, attend_request);
    request->kind = KV_REQUEST_ATTEND;
    request->attend.id = message->id;
    request->attend.layer = message->layer;
    if (message->n_items == 0 || message->n_items > KV_ATTEND_ITEMS_MAX)
        return refuse(request, "items", "%zu are not 1 to %d", message->n_items,
                      KV_ATTEND_ITEMS_MAX);
    request->attend.item_count = (uint32_t)message->n_items;

    size_t used = 0;
    enum kv_status status = stage_data(in, request, &used);
    for (size_t i = 0; i < message->n_items && status == KV_OK; i++)
        status = attend_item(request, i, &used, message->items[i]);
    return status;
}

enum kv_status kv_decode_fetch(struct kv_inbound *in, struct kv_plan *plan,
                               struct kv_request *request) {
    UNPACK(FetchRequest, fetch_request);
    plan->session = message->session;
    plan->begin = message->begin;
    plan->end = message->end;
    plan->dtype = (enum kv_dtype)message->dtype;
    if (plan->end && plan->end < plan->begin)
        return refuse(request, "end", "%llu is before begin", (unsigned long long)plan->end);
    if ((uint32_t)message->dtype > KIVI__V1__DTYPE__DTYPE_F32)
        return refuse(request, "dtype", "%d is none", (int)message->dtype);
    return plan_layers(request, message->layers, message->n_layers, plan);
}
