/* SPDX-License-Identifier: Apache-2.0 */
/* client.h - what libkivi's files share: the client, and words translated to protobuf and back. */
#ifndef KIVI_CLIENTS_C_CLIENT_H
#define KIVI_CLIENTS_C_CLIENT_H

#include "clients/c/error.h"
#include "clients/c/kivi.h"
#include "clients/c/transport.h"
#include "proto/kivi/v1/admin.pb-c.h"
#include "proto/kivi/v1/kivi.pb-c.h"

struct kivi_client {
    struct transport *transport;
    uint32_t message_bytes;
};

/* transport_call() with the types said once: `answer` is a pointer to a Kivi__V1__... pointer,
 * `name` that type in lower case as protobuf-c spells it. */
#define CLIENT_CALL(client, method, question, name, answer, timeout_ms, error)          \
    transport_call((client)->transport, method, &(question)->base, &name##__descriptor, \
                   (ProtobufCMessage **)(answer), timeout_ms, error)

/* Borrows, as protobuf-c's structs do. */
static inline ProtobufCBinaryData bytes_of(const void *data, size_t bytes) {
    return (ProtobufCBinaryData){.len = data ? bytes : 0, .data = (uint8_t *)data};
}
static inline ProtobufCBinaryData digest_bytes(const struct kivi_digest *digest) {
    return bytes_of(digest, KIVI_DIGEST_BYTES);
}

/* Text into a fixed field, cut if it must be. */
void text_set(char *to, size_t to_bytes, const char *from);

/* False if it is not 32 bytes long. */
bool digest_set(struct kivi_digest *to, ProtobufCBinaryData from);

/* Zeros where the message lacks its parts; never fails. */
void layout_info_set(struct kivi_layout_info *to, const Kivi__V1__LayoutInfo *from);
void session_info_set(struct kivi_session_info *to, const Kivi__V1__SessionInfo *from);

#endif
