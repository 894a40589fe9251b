/* SPDX-License-Identifier: Apache-2.0 */
/* io_fault.h - lets a test be the bad disk.
 *
 * A hook is asked about every request when it is submitted, on the submitting thread, whichever
 * engine runs, so "the third write" means the same everywhere and a scenario replays.  It is
 * compiled in always, because a fault path that only exists in test builds is not the one that
 * ships; unset, it costs one test of a pointer per request.  Nothing but tests sets it. */
#ifndef KV_STORAGE_IO_FAULT_H
#define KV_STORAGE_IO_FAULT_H

#include "storage/io.h"

struct kv_io_fault {
    int error;           /* not 0: nothing is done, and the request fails with it */
    uint64_t move_bytes; /* not 0: the first attempt moves only so many (a multiple of 4096) */
    uint64_t delay_us;   /* is done only after so long */
    bool torn;           /* with error and move_bytes: those bytes are moved, then it fails */
};

/* Fills in *fault (zero: nothing happens).  `hook` NULL: off. */
typedef void kv_io_fault_hook(void *context, const struct kv_io_request *request,
                              struct kv_io_fault *fault);
void kv_io_fault_set(kv_io_fault_hook *hook, void *context);

#endif
