/* SPDX-License-Identifier: Apache-2.0 */
/* shadow.h - a device with memory of its own, made of a CPU backend.
 *
 * What it hands out as device memory cannot be touched: a dereference by the CPU ends the test at once
 * (address space without access rights).  Its kernels are the CPU backend's, which are given the real
 * memory behind those addresses.  Everything else is as on a GPU: work happens later than it was queued
 * (an idle stream takes a nap first, so that whoever forgets to wait finds old bytes), pinned memory can
 * be read by both sides, and the device can fail for good.
 *
 * With it everything that service/ does around a GPU is tested on machines that have none. */
#ifndef KV_TESTS_KERNELS_SHADOW_H
#define KV_TESTS_KERNELS_SHADOW_H

#include "kernels/device.h"

struct shadow_options {
    struct kv_device_options inner; /* the CPU backend */
    size_t device_bytes;            /* device memory there is; 0: enough */
};

enum kv_status shadow_open(const struct shadow_options *options, struct kv_device **out);

/* [any thread] From here on nothing is computed or copied any more, and kv_device_status() says so. */
void shadow_fail(struct kv_device *device);

#endif
