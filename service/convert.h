/* SPDX-License-Identifier: Apache-2.0 */
/* convert.h - messages of the contract to requests of the engine, and back.
 *
 * The only place, with standard.h, that knows protobuf-c.  A decoder reads one message and fills
 * one request; what is wrong with it and can be seen without the engine is refused here, with the
 * field named: a length, a number out of range, a name that is not text.  What needs the layout
 * or the session to be judged is the engine's to refuse.
 *
 * Memory.   Messages are unpacked into memory the caller lends, from its front; nothing is
 *           freed, the next message starts at the front again.  A message that needs more is
 *           refused: a few bytes on the wire can ask for a hundred times as many in memory.
 *           The payload goes from the pieces to request->staging, once, or is lent (kv_put).
 * Threads.  [any thread]  Whoever holds the request.
 * Errors.   KV_OK, or the status that is also in the request, with field and message.
 */
#ifndef KV_SERVICE_CONVERT_H
#define KV_SERVICE_CONVERT_H

#include "service/engine.h"
#include "service/wire.h"

/* A message, taken apart, and where to unpack it. */
struct kv_inbound {
    struct kv_wire wire;
    uint8_t *memory;
    size_t memory_bytes;
    /* What a Put stream said in its first message holds for the rest: the caller keeps it. */
    struct kv_digest *fingerprint;
    bool *has_fingerprint;
    bool lend; /* the pieces stay until the request is done, and the engine takes them as they are */
};

typedef enum kv_status kv_decode(struct kv_inbound *in, struct kv_request *request);

kv_decode kv_decode_register, kv_decode_layouts, kv_decode_lookup, kv_decode_put, kv_decode_open,
    kv_decode_commit, kv_decode_close, kv_decode_delete, kv_decode_describe, kv_decode_append,
    kv_decode_attend, kv_decode_stats;

/* Questions that are answered with many messages become a plan; the rpc layer makes the requests. */
struct kv_plan {
    struct kv_digest fingerprint;              /* Get */
    uint32_t digest_count;
    struct kv_digest digests[KV_GET_BLOCKS_MAX];
    enum kv_form form;
    uint64_t session, begin, end;              /* Fetch; end 0: all */
    enum kv_dtype dtype;                       /* Fetch; 0: the layout's */
    uint32_t layer_count;                      /* both; 0: all */
    uint16_t layers[KV_LAYERS_MAX];
    char prefix[KV_NAME_MAX + 1], after[KV_NAME_MAX + 1]; /* List */
    uint32_t limit;
};
typedef enum kv_status kv_decode_plan(struct kv_inbound *in, struct kv_plan *plan,
                                      struct kv_request *why);
kv_decode_plan kv_decode_get, kv_decode_fetch, kv_decode_list;

/* Called once by an encoder with the exact number of bytes it will write; the payload at
 * request->reply_offset, reply_bytes long, belongs right behind them. */
typedef uint8_t *kv_room(void *context, size_t bytes);

typedef void kv_encode(const struct kv_request *request, kv_room *room, void *context);

kv_encode kv_encode_register, kv_encode_layouts, kv_encode_lookup, kv_encode_open,
    kv_encode_commit, kv_encode_close, kv_encode_delete, kv_encode_describe, kv_encode_append,
    kv_encode_attend, kv_encode_stats;

/* A block's result: request->status is in it. */
kv_encode kv_encode_put;
/* `index` is the digest's in the question. */
void kv_encode_get(const struct kv_request *request, uint32_t index, kv_room *room, void *context);
kv_encode kv_encode_fetch;
void kv_encode_session(const struct kv_session_info *info, kv_room *room, void *context);

/* The gRPC code of a status (0 .. 16), as kv_types.h says. */
uint32_t kv_status_code(enum kv_status status);

/* Writes "field: message", or without a field just the message, as the contract wants it.  An
 * empty message is replaced by what the status means. */
void kv_status_text(enum kv_status status, const char *field, const char *message, char *out,
                    size_t size);

#endif
