/* SPDX-License-Identifier: Apache-2.0 */
/* fake_device.c - the one thing that storage asks of a device: memory.  Ordinary memory will do. */
#include "kernels/device.h"

#include <stdlib.h>

enum kv_status kv_device_alloc(struct kv_device *device, enum kv_memory kind, size_t bytes,
                               void **out) {
    (void)device;
    (void)kind;
    void *memory = aligned_alloc(4096, bytes);
    if (memory == NULL) return KV_BUSY;
    memset(memory, 0, bytes);
    *out = memory;
    return KV_OK;
}

void kv_device_free(struct kv_device *device, enum kv_memory kind, void *memory, size_t bytes) {
    (void)device;
    (void)kind;
    (void)bytes;
    free(memory);
}
