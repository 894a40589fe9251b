/* SPDX-License-Identifier: Apache-2.0 */
/* log.h - what the daemon says, one line at a time, on standard error.
 *
 *   text   2026-11-23T21:15:02.123Z info  rpc: listening on unix:///run/kivid/kivid.sock
 *   json   {"time":"2026-11-23T21:15:02.123Z","level":"info","message":"rpc: listening on ..."}
 *
 * Only service/ logs; lower rooms count.  A line is written with one write(), so that lines of
 * different threads never mix.  A place in the program that speaks more than KV_LOG_BURST times
 * in a second is silent for the rest of it, and its next line says how many were left out: a
 * broken disk or a hostile client cannot fill a disk with complaints.
 *
 * Threads.  [any thread]
 */
#ifndef KV_SERVICE_LOG_H
#define KV_SERVICE_LOG_H

#include <stdbool.h>

enum kv_log_level { KV_LOG_DEBUG, KV_LOG_INFO, KV_LOG_WARN, KV_LOG_ERROR };

enum {
    KV_LOG_BURST = 10,       /* lines a second from one place */
    KV_LOG_LINE_MAX = 2048,  /* bytes of one line; longer ones are cut */
};

/* At start, before other threads.  Without it: text, from INFO. */
void kv_log_start(enum kv_log_level least, bool json);

/* `format` must be a literal: it is what tells one place from another. */
void kv_log(enum kv_log_level level, const char *format, ...) __attribute__((format(printf, 2, 3)));

#endif
