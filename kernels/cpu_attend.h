/* SPDX-License-Identifier: Apache-2.0 */
/* cpu_attend.h - attention cut into tasks.  Private to kernels/. */
#ifndef KV_KERNELS_CPU_ATTEND_H
#define KV_KERNELS_CPU_ATTEND_H

#include "kernels/kernel.h"

/* The attend entry of kv_cpu_backend. */
void kv_cpu_attend_submit(struct kv_stream *stream, const struct kv_shape *shape, uint32_t count,
                          const struct kv_attend *items);

#endif
