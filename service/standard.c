/* SPDX-License-Identifier: Apache-2.0 */
/* standard.c - finds a name in a descriptor set, and speaks health and reflection.
 *
 * Descriptors nest: a file has messages (4), enums (5) and services (6); a message has fields (2),
 * messages (3) and enums (4); a service has methods (2).  Each has its name in field 1, and its
 * full name is that of what it is in, a dot, and its own.
 */
#include "service/standard.h"

#include <stdio.h>

#include "proto/grpc/health/v1/health.pb-c.h"
#include "proto/grpc/reflection/v1/reflection.pb-c.h"

enum { SERVICES_MAX = 16, SYMBOL_MAX = 512 };

/* ---- Descriptors ---------------------------------------------------------------------------------- */

/* The first field of that number, or nothing. */
static struct kv_span find_field(struct kv_span message, uint32_t number) {
    struct kv_wire_field field;
    while (kv_wire_next(&message, &field))
        if (field.number == number && field.type == 2) return field.bytes;
    return (struct kv_span){(const uint8_t *)"", 0};
}

/* If `symbol` is `name`, "" ; if it begins with that and a dot, what is behind, if anything; else
 * NULL. */
static const char *strip(const char *symbol, struct kv_span name) {
    if (strncmp(symbol, (const char *)name.bytes, name.count) != 0) return NULL;
    const char *rest = symbol + name.count;
    if (*rest == 0) return rest;
    return rest[0] == '.' && rest[1] ? rest + 1 : NULL;
}

enum sort { SORT_MESSAGE, SORT_SERVICE, SORT_LEAF };

/* True if what this descriptor describes is called `symbol`, or holds it. */
static bool describes(struct kv_span descriptor, enum sort sort, const char *symbol) {
    const char *rest = strip(symbol, find_field(descriptor, 1));
    if (!rest || *rest == 0) return rest != NULL;
    struct kv_wire_field field;
    while (sort != SORT_LEAF && kv_wire_next(&descriptor, &field)) {
        bool inside = sort == SORT_SERVICE ? field.number == 2 : field.number - 2 <= 2;
        bool message = sort == SORT_MESSAGE && field.number == 3;
        if (inside && field.type == 2 &&
            describes(field.bytes, message ? SORT_MESSAGE : SORT_LEAF, rest))
            return true;
    }
    return false;
}

static bool file_declares(struct kv_span file, const char *symbol) {
    struct kv_span package = find_field(file, 2);
    const char *rest = package.count ? strip(symbol, package) : symbol;
    struct kv_wire_field field;
    while (rest && *rest && kv_wire_next(&file, &field)) {
        if (field.type != 2 || field.number - 4 > 2) continue;
        enum sort sort = field.number == 4   ? SORT_MESSAGE
                         : field.number == 6 ? SORT_SERVICE
                                             : SORT_LEAF;
        if (describes(field.bytes, sort, rest)) return true;
    }
    return false;
}

/* The file of that name, or the one that declares that symbol; the other is NULL. */
static struct kv_span find_file(const struct kv_standard *standard, const char *name,
                                const char *symbol) {
    struct kv_span set = standard->descriptors;
    struct kv_wire_field field;
    while (kv_wire_next(&set, &field)) {
        if (field.number != 1 || field.type != 2) continue;
        struct kv_span called = find_field(field.bytes, 1);
        if (name ? strlen(name) == called.count && !memcmp(name, called.bytes, called.count)
                 : file_declares(field.bytes, symbol))
            return field.bytes;
    }
    return (struct kv_span){0};
}

bool kv_standard_declares(const struct kv_standard *standard, const char *symbol) {
    return find_file(standard, NULL, symbol).bytes != NULL;
}

/* Full names of all services; returns how many. */
static size_t list_services(const struct kv_standard *standard, char names[][SYMBOL_MAX]) {
    struct kv_span set = standard->descriptors;
    struct kv_wire_field file, field;
    size_t count = 0;
    while (kv_wire_next(&set, &file)) {
        struct kv_span package = find_field(file.bytes, 2), inside = file.bytes;
        while (kv_wire_next(&inside, &field) && count < SERVICES_MAX) {
            if (field.number != 6 || field.type != 2) continue;
            struct kv_span name = find_field(field.bytes, 1);
            snprintf(names[count++], SYMBOL_MAX, "%.*s.%.*s", (int)package.count, package.bytes,
                     (int)name.count, name.bytes);
        }
    }
    return count;
}

/* ---- Messages ------------------------------------------------------------------------------------- */

static void *memory_take(void *context, size_t bytes) {
    struct kv_inbound *in = context;
    size_t padded = (bytes + 15) & ~(size_t)15;
    if (padded < bytes || padded > in->memory_bytes) return NULL;
    void *taken = in->memory;
    in->memory += padded;
    in->memory_bytes -= padded;
    return taken;
}
static void memory_give(void *context, void *pointer) {
}

static void *unpack(struct kv_inbound *in, const ProtobufCMessageDescriptor *type) {
    ProtobufCAllocator allocator = {memory_take, memory_give, in};
    return protobuf_c_message_unpack(type, &allocator, in->wire.rest_bytes, in->wire.rest);
}

static void pack(const ProtobufCMessage *message, kv_room *room, void *context) {
    protobuf_c_message_pack(message, room(context, protobuf_c_message_get_packed_size(message)));
}

#define ASKED(what) GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_##what
#define TOLD(what) GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__MESSAGE_RESPONSE_##what

enum kv_status kv_reflection_answer(const struct kv_standard *standard, struct kv_inbound *in,
                                    kv_room *room, void *context) {
    Grpc__Reflection__V1__ServerReflectionRequest *request =
        unpack(in, &grpc__reflection__v1__server_reflection_request__descriptor);
    if (!request) return KV_INVALID;

    Grpc__Reflection__V1__ServerReflectionResponse answer =
        GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__INIT;
    Grpc__Reflection__V1__ErrorResponse error = GRPC__REFLECTION__V1__ERROR_RESPONSE__INIT;
    Grpc__Reflection__V1__FileDescriptorResponse files =
        GRPC__REFLECTION__V1__FILE_DESCRIPTOR_RESPONSE__INIT;
    Grpc__Reflection__V1__ListServiceResponse list =
        GRPC__REFLECTION__V1__LIST_SERVICE_RESPONSE__INIT;
    Grpc__Reflection__V1__ServiceResponse services[SERVICES_MAX], *pointers[SERVICES_MAX];
    char names[SERVICES_MAX][SYMBOL_MAX];
    ProtobufCBinaryData bytes;
    answer.valid_host = request->host;
    answer.original_request = request;

    struct kv_span file = {0};
    if (request->message_request_case == ASKED(LIST_SERVICES)) {
        list.n_service = list_services(standard, names);
        list.service = pointers;
        for (size_t i = 0; i < list.n_service; i++) {
            pointers[i] = &services[i];
            grpc__reflection__v1__service_response__init(&services[i]);
            services[i].name = names[i];
        }
        answer.message_response_case = TOLD(LIST_SERVICES_RESPONSE);
        answer.list_services_response = &list;
        pack(&answer.base, room, context);
        return KV_OK;
    }
    if (request->message_request_case == ASKED(FILE_BY_FILENAME))
        file = find_file(standard, request->file_by_filename, NULL);
    if (request->message_request_case == ASKED(FILE_CONTAINING_SYMBOL))
        file = find_file(standard, NULL, request->file_containing_symbol);
    if (file.bytes) {
        bytes = (ProtobufCBinaryData){file.count, (uint8_t *)(uintptr_t)file.bytes};
        files.n_file_descriptor_proto = 1;
        files.file_descriptor_proto = &bytes;
        answer.message_response_case = TOLD(FILE_DESCRIPTOR_RESPONSE);
        answer.file_descriptor_response = &files;
    } else {
        /* Extensions are proto2's; of those there are none here, so none is ever found. */
        error.error_code = (int32_t)kv_status_code(KV_NOT_FOUND);
        error.error_message = (char *)(uintptr_t) "not found";
        answer.message_response_case = TOLD(ERROR_RESPONSE);
        answer.error_response = &error;
    }
    pack(&answer.base, room, context);
    return KV_OK;
}

enum kv_status kv_health_service(struct kv_inbound *in, char *out, size_t size) {
    Grpc__Health__V1__HealthCheckRequest *request =
        unpack(in, &grpc__health__v1__health_check_request__descriptor);
    if (!request) return KV_INVALID;
    snprintf(out, size, "%s", request->service);
    return KV_OK;
}

void kv_health_encode(enum kv_health health, kv_room *room, void *context) {
    Grpc__Health__V1__HealthCheckResponse answer = GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__INIT;
    answer.status = (Grpc__Health__V1__HealthCheckResponse__ServingStatus)health;
    pack(&answer.base, room, context);
}
