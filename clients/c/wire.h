/* SPDX-License-Identifier: Apache-2.0 */
/* wire.h - large messages without packing: the header apart from the payload.
 *
 * Every large message of the contract carries its tensors in one field, `bytes data = 15`, and
 * everything else in small ones.  protobuf-c would copy the tensors twice.  Instead
 *
 *   out   the message is packed with `data` empty; the field's tag and length follow; the tensors
 *         are sent from where they lie
 *   in    the received pieces are walked once: small fields are gathered into a scratch, which
 *         protobuf-c unpacks; of `data` only views into the pieces are kept
 *
 * so the bytes on the wire are those of an ordinary protobuf message.
 *
 * Knows nothing of gRPC.  Threads: none of its own, no shared state.
 */
#ifndef KIVI_CLIENTS_C_WIRE_H
#define KIVI_CLIENTS_C_WIRE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <protobuf-c/protobuf-c.h>

enum {
    WIRE_PAYLOAD_FIELD = 15,
    WIRE_HEADER_MAX = 64 << 10, /* small fields of one message: 64 items with their sentences */
    WIRE_TAIL_MAX = 11,         /* tag and length of the payload field */
};

/* A run of bytes somewhere else. */
struct wire_piece {
    const uint8_t *data;
    size_t bytes;
};

/* One received message, taken apart.  Begin with all zero; wire_message_free() at the end.  Reused
 * from message to message, so a stream allocates only while its messages grow. */
struct wire_message {
    uint8_t *header; /* the small fields, as protobuf */
    size_t header_bytes;
    struct wire_piece *payload; /* views into the pieces of the last wire_split() */
    size_t payload_count;
    size_t payload_bytes;
    size_t payload_max; /* capacity of `payload` */
};

/* Takes a message apart.  False: it is not protobuf, or its small fields exceed WIRE_HEADER_MAX,
 * or memory is out. */
bool wire_split(struct wire_message *message, const struct wire_piece *pieces, size_t count);

/* Copies payload bytes offset .. offset + bytes - 1, which must exist, to `to`. */
void wire_gather(const struct wire_message *message, size_t offset, size_t bytes, void *to);

void wire_message_free(struct wire_message *message);

/* Bytes that wire_pack() may need. */
size_t wire_pack_max(const ProtobufCMessage *message);

/* Packs `message`, whose `data` is empty, and the tag and length of a payload of `payload_bytes`
 * that will follow.  Returns the bytes written to `to`. */
size_t wire_pack(const ProtobufCMessage *message, size_t payload_bytes, uint8_t *to);

#endif
