/* SPDX-License-Identifier: Apache-2.0 */
/* error.c - codes by name, and which of them are worth another try.
 *
 * The service begins a sentence with the field at fault and a colon ("layout.head_dim: 80 is not
 * one of 64, 96, 128, 256").  Trailing metadata says it again for programs, but the status of one
 * item among many has no metadata, so the sentence is read here.
 */
#include "clients/c/error.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *const CODE_NAMES[] = {
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
};

const char *kivi_code_name(int code) {
    size_t count = sizeof CODE_NAMES / sizeof *CODE_NAMES;
    return code >= 0 && (size_t)code < count ? CODE_NAMES[code] : "UNKNOWN";
}

const char *kivi_version(void) {
    return KIVI_VERSION;
}

void kivi_free(void *memory) {
    free(memory);
}

/* The name before the colon, if what stands there can be one. */
static void field_find(struct kivi_error *error) {
    static const char letters[] = "abcdefghijklmnopqrstuvwxyz0123456789_.[]";
    size_t bytes = strspn(error->message, letters);
    if (bytes == 0 || bytes >= sizeof error->field) return;
    if (error->message[bytes] != ':' || error->message[bytes + 1] != ' ') return;
    memcpy(error->field, error->message, bytes);
    error->field[bytes] = 0;
}

int error_set(struct kivi_error *error, int code, const char *field, const char *format, ...) {
    if (!error) return code;
    memset(error, 0, sizeof *error);
    error->code = code;
    error->retry = code == KIVI_RESOURCE_EXHAUSTED || code == KIVI_UNAVAILABLE;

    va_list arguments;
    va_start(arguments, format);
    vsnprintf(error->message, sizeof error->message, format, arguments);
    va_end(arguments);
    if (field) snprintf(error->field, sizeof error->field, "%s", field);
    else field_find(error);
    return code;
}
