/* SPDX-License-Identifier: Apache-2.0 */
/* fake_device.c - the one thing that storage asks of a device: memory.  Ordinary memory will do. */
#include "kernels/device.h"

#include <sys/mman.h>

enum kv_status kv_device_alloc(struct kv_device *device, enum kv_memory kind, size_t bytes,
                               void **out) {
    (void)device;
    (void)kind;
    void *memory =
        mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return KV_BUSY;
    *out = memory;
    return KV_OK;
}

void kv_device_free(struct kv_device *device, enum kv_memory kind, void *memory, size_t bytes) {
    (void)device;
    (void)kind;
    munmap(memory, bytes);
}
