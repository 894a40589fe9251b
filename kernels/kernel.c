/* SPDX-License-Identifier: Apache-2.0 */
/* kernel.c - the door of the six verbs: every argument is checked here, and nowhere below.
 *
 * What is checked is what host memory shows: shapes, counts, ranges, pointers that must be
 * there.  Contents of device memory are not looked at; kernel.h says what they must hold.
 */
#include <math.h>

#include "kernels/backend.h"
#include "proto/kv_check.h"

static void check_call(const struct kv_stream *stream, const struct kv_shape *shape,
                       uint32_t count, const void *items) {
    KV_CHECK(stream != NULL);
    KV_CHECK(kv_shape_valid(shape));
    KV_CHECK(count >= 1 && count <= KV_ITEMS_MAX);
    KV_CHECK(items != NULL);
}

/* Elements on the wire that this shape's raw pages can take. */
static bool dtype_fits(const struct kv_shape *shape, enum kv_dtype dtype) {
    return dtype == shape->dtype || (dtype == KV_DTYPE_F32 && shape->dtype == KV_DTYPE_F16);
}

static bool dtype_known(enum kv_dtype dtype) {
    return dtype == KV_DTYPE_F16 || dtype == KV_DTYPE_BF16 || dtype == KV_DTYPE_F32;
}

static bool rows_fit_page(uint32_t token, uint32_t tokens) {
    return token < KV_BLOCK_TOKENS && tokens >= 1 && tokens <= KV_BLOCK_TOKENS - token;
}

static bool heads_fit(const struct kv_shape *shape, uint32_t heads_q) {
    return heads_q >= shape->heads && heads_q % shape->heads == 0 &&
           heads_q / shape->heads <= KV_GROUP_HEADS_MAX && heads_q <= KV_HEADS_Q_MAX;
}

void kv_kernel_ingest(struct kv_stream *stream, const struct kv_shape *shape, uint32_t count,
                      const struct kv_ingest *items) {
    check_call(stream, shape, count, items);
    for (uint32_t i = 0; i < count; i++) {
        KV_CHECK(dtype_fits(shape, items[i].dtype));
        KV_CHECK(rows_fit_page(items[i].token, items[i].tokens));
        KV_CHECK(items[i].pieces ? stream->backend->is_host
                                 : items[i].keys != NULL && items[i].values != NULL);
        KV_CHECK(items[i].page != NULL && items[i].fault != NULL);
    }
    stream->backend->ingest(stream, shape, count, items);
}

uint32_t kv_kernel_ingest_here(const struct kv_device *device, const struct kv_shape *shape,
                               const struct kv_ingest *item, void *scratch) {
    KV_CHECK(device->backend->is_host && kv_shape_valid(shape));
    KV_CHECK(dtype_fits(shape, item->dtype) && rows_fit_page(item->token, item->tokens));
    KV_CHECK(item->pieces != NULL && item->page != NULL && scratch != NULL);
    return device->backend->ingest_here(device, shape, item, scratch);
}

void kv_kernel_emit(struct kv_stream *stream, const struct kv_shape *shape, uint32_t count,
                    const struct kv_emit *items) {
    check_call(stream, shape, count, items);
    for (uint32_t i = 0; i < count; i++) {
        KV_CHECK(items[i].dtype == shape->dtype || items[i].dtype == KV_DTYPE_F32);
        KV_CHECK(rows_fit_page(items[i].token, items[i].tokens));
        KV_CHECK(items[i].keys != NULL && items[i].values != NULL);
        KV_CHECK(items[i].page != NULL);
    }
    stream->backend->emit(stream, shape, count, items);
}

void kv_kernel_quantize(struct kv_stream *stream, const struct kv_shape *shape, uint32_t count,
                        const struct kv_quantize *items) {
    check_call(stream, shape, count, items);
    for (uint32_t i = 0; i < count; i++) KV_CHECK(items[i].raw != NULL && items[i].packed != NULL);
    stream->backend->quantize(stream, shape, count, items);
}

void kv_kernel_dequantize(struct kv_stream *stream, const struct kv_shape *shape, uint32_t count,
                          const struct kv_dequantize *items) {
    check_call(stream, shape, count, items);
    bool rounded = shape->codec.kind != KV_CODEC_RAW;
    for (uint32_t i = 0; i < count; i++) {
        KV_CHECK(items[i].packed != NULL && items[i].raw != NULL);
        KV_CHECK(items[i].dtype == shape->dtype || (rounded && items[i].dtype == KV_DTYPE_F16));
    }
    stream->backend->dequantize(stream, shape, count, items);
}

void kv_kernel_observe(struct kv_stream *stream, const struct kv_shape *shape, uint32_t count,
                       const struct kv_observe *items) {
    check_call(stream, shape, count, items);
    for (uint32_t i = 0; i < count; i++) {
        KV_CHECK(dtype_known(items[i].dtype));
        KV_CHECK(heads_fit(shape, items[i].heads_q));
        KV_CHECK(items[i].rows >= 1 && items[i].rows <= KV_ROWS_MAX);
        KV_CHECK(items[i].query != NULL);
        KV_CHECK(items[i].energy != NULL && items[i].rows_seen != NULL);
    }
    stream->backend->observe(stream, shape, count, items);
}

/* Raw pages may be partly filled; a packed page is a whole block. */
static bool page_ref_valid(const struct kv_page_ref *ref) {
    if (ref->page == NULL || ref->raw > 1) return false;
    return ref->raw ? ref->tokens >= 1 && ref->tokens <= KV_BLOCK_TOKENS
                    : ref->tokens == KV_BLOCK_TOKENS;
}

static void check_attend(const struct kv_shape *shape, const struct kv_attend *item) {
    KV_CHECK(dtype_known(item->dtype));
    KV_CHECK(heads_fit(shape, item->heads_q));
    KV_CHECK(item->rows >= 1 && item->rows <= KV_ROWS_MAX);
    KV_CHECK(isfinite(item->score_scale));
    KV_CHECK(item->query != NULL && item->visible != NULL);
    KV_CHECK(item->out != NULL && item->lse != NULL);
    KV_CHECK(item->page_count == 0 || item->pages != NULL);
}

void kv_kernel_attend(struct kv_stream *stream, const struct kv_shape *shape, uint32_t count,
                      const struct kv_attend *items) {
    check_call(stream, shape, count, items);
    uint64_t pages = 0;
    for (uint32_t i = 0; i < count; i++) {
        check_attend(shape, &items[i]);
        pages += items[i].page_count;
    }
    KV_CHECK(pages <= KV_ATTEND_PAGES_MAX);
    for (uint32_t i = 0; i < count; i++)
        for (uint32_t p = 0; p < items[i].page_count; p++)
            KV_CHECK(page_ref_valid(&items[i].pages[p]));
    stream->backend->attend(stream, shape, count, items);
}
