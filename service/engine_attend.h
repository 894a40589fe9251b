/* SPDX-License-Identifier: Apache-2.0 */
/* engine_attend.h - what the three files of ATTEND share.
 *
 *   engine_attend.c         the steps in their order: reserve, ingest, seal ... finish
 *   engine_attend_check.c   what each item says, against its session: begin
 *   engine_attend_waves.c   pages pinned, attended, unpinned, some at a time
 *
 * An item of the request is a part of the lane.  One that fails takes no further part, and the others
 * go on.
 */
#ifndef KV_SERVICE_ENGINE_ATTEND_H
#define KV_SERVICE_ENGINE_ATTEND_H

#include "service/engine_private.h"

/* What the answer says of one item. */
__attribute__((format(printf, 4, 5))) void
item_fail(struct kv_attend_item *item, enum kv_status status, const char *field,
          const char *format, ...);

/* The part takes no further part; what it has staged stays until the kernels are done with it. */
void part_fail(struct task *task, struct part *part, enum kv_status status, const char *field,
               const char *message);

static inline bool part_lives(const struct part *part) {
    return part->status == KV_OK;
}

static inline uint32_t length_after(const struct part *part) {
    return part->session->length[part->layer] + part->tokens;
}

/* Tokens that a row sees. */
static inline uint32_t row_sees(const struct part *part, uint32_t row) {
    uint32_t length = length_after(part);
    if (part->visible_given) return part->visible_given[row];
    if (part->mask == KV_MASK_ALL) return length;
    uint32_t behind = part->rows - 1 - row;
    return length > behind ? length - behind : 0;
}

static inline struct layout_entry *layout_of(const struct task *task) {
    return task->attend.layout;
}

/* The steps, in their order; attend_begin runs first, when turns and lane are there. */
void attend_reserve(struct kv_engine *engine, struct task *task);
void waves_begin(struct kv_engine *engine, struct task *task);
void attend_finish(struct kv_engine *engine, struct task *task);

/* Gives back what the waves still hold.  No kernel uses it any more. */
void waves_release(struct kv_engine *engine, struct task *task);

#endif
