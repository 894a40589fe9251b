/* SPDX-License-Identifier: Apache-2.0 */
/* error.h - filling in a struct kivi_error. */
#ifndef KIVI_CLIENTS_C_ERROR_H
#define KIVI_CLIENTS_C_ERROR_H

#include "clients/c/kivi.h"

/* Returns `code`.  `field` NULL: the sentence names it, as the contract's do ("field: sentence").
 * `error` may be NULL. */
int error_set(struct kivi_error *error, int code, const char *field, const char *format, ...)
    __attribute__((format(printf, 4, 5)));

#endif
