/* SPDX-License-Identifier: Apache-2.0 */
/* methods.c - what is served, and how.  What the contract declares and is not here answers
 * UNIMPLEMENTED. */
#include "service/rpc/internal.h"

#define KIVI "/kivi.v1.Kivi/"
#define ADMIN "/kivi.v1.Admin/"

/* path, shape, flights, staging, serial, then what applies of decode, encode, plan */
const struct method methods[] = {
    /* Where the engine answers, or is asked, with a list, the list lies in staging. */
    {KIVI "RegisterLayout", SHAPE_UNARY, 1, false, false, kv_decode_register, kv_encode_register, NULL},
    {KIVI "Lookup", SHAPE_UNARY, 1, true, false, kv_decode_lookup, kv_encode_lookup, NULL},
    {KIVI "OpenSession", SHAPE_UNARY, 1, true, false, kv_decode_open, kv_encode_open, NULL},
    {KIVI "Commit", SHAPE_UNARY, 1, false, false, kv_decode_commit, kv_encode_commit, NULL},
    {KIVI "Close", SHAPE_UNARY, 1, false, false, kv_decode_close, kv_encode_close, NULL},
    {KIVI "Delete", SHAPE_UNARY, 1, false, false, kv_decode_delete, kv_encode_delete, NULL},
    {KIVI "Describe", SHAPE_UNARY, 1, true, false, kv_decode_describe, kv_encode_describe, NULL},
    {ADMIN "Stats", SHAPE_UNARY, 1, false, false, kv_decode_stats, kv_encode_stats, NULL},
    {ADMIN "Layouts", SHAPE_UNARY, 1, true, false, kv_decode_layouts, kv_encode_layouts, NULL},

    /* Two frames: the second is read and copied while the engine works on the first, if that is no small one
     * (serve.c: may_read). */
    {KIVI "Append", SHAPE_DUPLEX, 2, true, true, kv_decode_append, kv_encode_append, NULL},
    {KIVI "Attend", SHAPE_DUPLEX, 2, true, true, kv_decode_attend, kv_encode_attend, NULL},
    {KIVI "Put", SHAPE_DUPLEX, KV_PUT_OPEN_MAX, true, false, kv_decode_put, kv_encode_put, NULL},

    {KIVI "Get", SHAPE_PAGES, 2, true, false, NULL, NULL, kv_decode_get},
    {KIVI "Fetch", SHAPE_PAGES, 2, true, false, NULL, NULL, kv_decode_fetch},
    {KIVI "List", SHAPE_PAGES, 1, true, false, NULL, NULL, kv_decode_list},

    {"/grpc.health.v1.Health/Check", SHAPE_CHECK, 0, false, false, NULL, NULL, NULL},
    {"/grpc.health.v1.Health/Watch", SHAPE_WATCH, 0, false, false, NULL, NULL, NULL},
    {"/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", SHAPE_REFLECTION, 0, false, false,
     NULL, NULL, NULL},
    {"/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", SHAPE_REFLECTION, 0, false,
     false, NULL, NULL, NULL},

    /* The last: whatever else a client may call. */
    {NULL, SHAPE_UNKNOWN, 0, false, false, NULL, NULL, NULL},
};
const size_t method_count = sizeof methods / sizeof methods[0];
static_assert(sizeof methods / sizeof methods[0] <= METHODS_MAX, "each has a place in kv_rpc");
