/* SPDX-License-Identifier: Apache-2.0 */
/* session.h - an open session, as libkivi's own files see it. */
#ifndef KIVI_CLIENTS_C_SESSION_H
#define KIVI_CLIENTS_C_SESSION_H

#include "clients/c/client.h"

struct kivi_session {
    struct kivi_client *client; /* borrowed */
    uint64_t handle;
    struct kivi_layout_info info;
    size_t element_bytes;
    size_t kv_row_bytes; /* K (or V) of one token and layer */
    size_t q_row_bytes;  /* Q of one row */
};

#endif
