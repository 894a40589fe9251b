/* SPDX-License-Identifier: Apache-2.0 */
/* opponent.h - a bare C-core stream: carries bytes over a unix socket and drops them.
 *
 * What gRPC alone can do here, and so what Put is measured against: one client stream, messages of
 * the same size sent from where they lie, a server that frees them unread and answers one byte at
 * the end.  Server and client are two processes, as kivid and its client are.
 */
#ifndef KIVI_CLIENTS_CLI_OPPONENT_H
#define KIVI_CLIENTS_CLI_OPPONENT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

struct opponent;

/* Forks a server that listens on unix:`path` and lives as long as this process.  Must be called
 * before anything else of gRPC: a process that has used gRPC must not fork.  0: failed. */
pid_t opponent_serve(const char *path);

struct opponent *opponent_open(const char *path, uint32_t spin_us);
void opponent_close(struct opponent *opponent);

/* Streams `count` messages of `bytes` out of `data`, which holds `data_bytes` and is walked through
 * again and again.  Returns the seconds it took, or a negative number if the stream failed. */
double opponent_stream(struct opponent *opponent, const uint8_t *data, size_t data_bytes,
                       size_t bytes, uint64_t count);

#endif
