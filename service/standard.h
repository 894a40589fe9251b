/* SPDX-License-Identifier: Apache-2.0 */
/* standard.h - the words of the services that every gRPC server offers: health and reflection.
 *
 * Bytes in, bytes out; who carries them is the rpc layer's business.  Reflection answers from a
 * descriptor set that is linked into the program: `file` entries of FileDescriptorProto, which hold
 * packages, messages, enums and services by name.  grpc.reflection.v1 and v1alpha have the same
 * messages on the wire, so one code serves both.
 *
 * Threads.  [any thread]  Nothing changes after start.
 */
#ifndef KV_SERVICE_STANDARD_H
#define KV_SERVICE_STANDARD_H

#include "service/convert.h"

/* A FileDescriptorSet; borrowed, for the life of the program. */
struct kv_standard {
    struct kv_span descriptors;
};

/* True if the set declares this: "kivi.v1.Kivi", "kivi.v1.Kivi.Attend", "kivi.v1.Layout",
 * "kivi.v1.Layout.layers". */
bool kv_standard_declares(const struct kv_standard *standard, const char *symbol);

/* Answers one ServerReflectionRequest, in `in`.  KV_INVALID: it is damaged. */
enum kv_status kv_reflection_answer(const struct kv_standard *standard, struct kv_inbound *in,
                                    kv_room *room, void *context);

enum kv_health { KV_HEALTH_SERVING = 1, KV_HEALTH_NOT_SERVING = 2, KV_HEALTH_UNKNOWN = 3 };

/* The service a HealthCheckRequest asks about; a name that does not fit is cut.  KV_INVALID. */
enum kv_status kv_health_service(struct kv_inbound *in, char *out, size_t size);
void kv_health_encode(enum kv_health health, kv_room *room, void *context);

#endif
