/* SPDX-License-Identifier: Apache-2.0 */
/* layout.c - which cache shapes can be represented.
 *
 * A list of rules, each with the field it is about as a client knows it (kivi/v1/types.proto) and
 * a sentence that says the value and what is allowed.  Whatever passes here can be multiplied
 * without overflow: 256 layers of 128 heads of 256 channels stay below 2^36 bytes a block.
 */
#include "service/layout.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>

#include "kernels/page.h"

/* Where the first broken rule is written. */
struct verdict {
    enum kv_status status;
    char *field;
    char *message;
};

__attribute__((format(printf, 4, 5))) static void
rule(struct verdict *verdict, bool holds, const char *field, const char *format, ...) {
    if (holds || verdict->status != KV_OK) return;
    va_list values;
    va_start(values, format);
    vsnprintf(verdict->message, 200, format, values);
    va_end(values);
    snprintf(verdict->field, 48, "%s", field);
    verdict->status = KV_INVALID;
}

static void check_extent(struct verdict *v, const struct kv_layout *l) {
    rule(v, l->layers >= 1 && l->layers <= KV_LAYERS_MAX, "layout.layers",
         "%u is not in 1 .. %d", l->layers, KV_LAYERS_MAX);
    rule(v, l->heads >= 1 && l->heads <= KV_HEADS_MAX, "layout.kv_heads",
         "%u is not in 1 .. %d", l->heads, KV_HEADS_MAX);
    rule(v, l->heads_q >= 1 && l->heads_q <= KV_HEADS_Q_MAX, "layout.query_heads",
         "%u is not in 1 .. %d", l->heads_q, KV_HEADS_Q_MAX);
    if (v->status != KV_OK) return;
    rule(v, l->heads_q % l->heads == 0, "layout.query_heads",
         "%u is not a multiple of kv_heads, %u", l->heads_q, l->heads);
    rule(v, l->heads_q / l->heads <= KV_GROUP_HEADS_MAX, "layout.query_heads",
         "%u query heads for %u KV heads are more than %d each", l->heads_q, l->heads,
         KV_GROUP_HEADS_MAX);
    rule(v, kv_head_dim_valid(l->head_dim), "layout.head_dim",
         "%u is not one of 64, 96, 128, 256", l->head_dim);
    rule(v, l->dtype >= KV_DTYPE_F16 && l->dtype <= KV_DTYPE_F32, "layout.dtype",
         "%u is not one of F16, BF16, F32", l->dtype);
    rule(v, l->block_tokens == KV_BLOCK_TOKENS, "layout.block_tokens", "%u is not %d",
         l->block_tokens, KV_BLOCK_TOKENS);
    rule(v, isfinite(l->score_scale) && l->score_scale > 0, "layout.softmax_scale",
         "%g is not finite and above 0", (double)l->score_scale);
    rule(v, l->window_tokens % KV_BLOCK_TOKENS == 0 && l->window_tokens <= 1024,
         "layout.exact.window_tokens", "%u is not a multiple of 128 up to 1024", l->window_tokens);
    rule(v, l->sink_blocks <= 8, "layout.exact.sink_blocks", "%u is not in 0 .. 8",
         l->sink_blocks);
    rule(v, l->reserved == 0, "layout", "a reserved byte is not zero");
}

static void check_codec(struct verdict *v, const struct kv_layout *l) {
    const struct kv_codec *c = &l->codec;
    bool minmax = c->kind == KV_CODEC_MINMAX, unbiased = c->kind == KV_CODEC_UNBIASED;
    rule(v, c->kind <= KV_CODEC_UNBIASED, "layout.codec.kind",
         "%u is not one of RAW, MINMAX, UNBIASED", c->kind);
    rule(v, !minmax || c->key_bits == 2 || c->key_bits == 4, "layout.codec.key_bits",
         "%u is not 2 or 4", c->key_bits);
    rule(v, !minmax || c->value_bits == 2 || c->value_bits == 4, "layout.codec.value_bits",
         "%u is not 2 or 4", c->value_bits);
    rule(v, !unbiased || c->value_bits == 1 || c->value_bits == 2, "layout.codec.value_bits",
         "%u is not 1 or 2", c->value_bits);
    rule(v, !minmax || c->group == 32 || c->group == 64 || c->group == 128, "layout.codec.group",
         "%u is not one of 32, 64, 128", c->group);
    rule(v, !minmax || c->group == 0 || l->head_dim % c->group == 0, "layout.codec.group",
         "%u does not divide head_dim, %u", c->group, l->head_dim);
    rule(v, !unbiased || (c->mix_count >= 1 && c->mix_count <= KV_MIX_COUNT_MAX),
         "layout.codec.mixes", "%u mixes are not 1 .. %d", c->mix_count, KV_MIX_COUNT_MAX);

    struct kv_shape shape = kv_layout_shape(l);
    rule(v, kv_shape_valid(&shape), unbiased ? "layout.codec.mixes" : "layout.codec",
         unbiased ? "widths are 0, 1, 2 or 4, never rise inside a mix, and every mix has the "
                    "same sum above 0"
                  : "its fields contradict each other");
}

enum kv_status kv_layout_check(const struct kv_layout *layout, const char *model, char field[48],
                               char message[200]) {
    struct verdict verdict = {.status = KV_OK, .field = field, .message = message};
    check_extent(&verdict, layout);
    if (verdict.status == KV_OK) check_codec(&verdict, layout);
    size_t model_bytes = strnlen(model, KV_MODEL_MAX + 1);
    rule(&verdict, model_bytes <= KV_MODEL_MAX, "layout.model", "longer than %d bytes",
         KV_MODEL_MAX);
    return verdict.status;
}
