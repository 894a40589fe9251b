/* SPDX-License-Identifier: Apache-2.0 */
/* layout.c - layouts, from struct to message and back. */
#include <stdlib.h>
#include <string.h>

#include "clients/c/client.h"

enum { WIDTHS_MAX = 16 };

size_t kivi_dtype_bytes(uint32_t dtype) {
    switch (dtype) {
    case KIVI_F16:
    case KIVI_BF16: return 2;
    case KIVI_F32: return 4;
    default: return 0;
    }
}

/* A layout's message with the parts it points to. */
struct layout_message {
    Kivi__V1__Layout layout;
    Kivi__V1__Codec codec;
    Kivi__V1__Exact exact;
    uint32_t mixes[WIDTHS_MAX];
};

static int layout_pack(const struct kivi_layout *from, struct layout_message *to,
                       struct kivi_error *error) {
    const struct kivi_codec *codec = &from->codec;
    if (codec->mix_count > 4)
        return error_set(error, KIVI_INVALID_ARGUMENT, "layout.codec.mixes", "more than 4 mixes");

    kivi__v1__codec__init(&to->codec);
    to->codec.preset = (char *)codec->preset;
    to->codec.kind = (Kivi__V1__Codec__Kind)codec->kind;
    to->codec.key_bits = codec->key_bits;
    to->codec.value_bits = codec->value_bits;
    to->codec.group = codec->group;
    to->codec.value_rotated = codec->value_rotated;
    to->codec.n_mixes = (size_t)codec->mix_count * 4;
    to->codec.mixes = to->mixes;
    for (size_t i = 0; i < to->codec.n_mixes; i++) to->mixes[i] = codec->mixes[i / 4][i % 4];

    kivi__v1__exact__init(&to->exact);
    to->exact.window_tokens = from->window_tokens;
    to->exact.sink_blocks = from->sink_blocks;

    kivi__v1__layout__init(&to->layout);
    to->layout.model = (char *)from->model;
    to->layout.layers = from->layers;
    to->layout.kv_heads = from->kv_heads;
    to->layout.query_heads = from->query_heads;
    to->layout.head_dim = from->head_dim;
    to->layout.dtype = (Kivi__V1__Dtype)from->dtype;
    to->layout.softmax_scale = from->softmax_scale;
    if (codec->preset[0] || codec->kind) to->layout.codec = &to->codec;
    if (from->has_exact) to->layout.exact = &to->exact;
    return KIVI_OK;
}

static void codec_set(struct kivi_codec *to, const Kivi__V1__Codec *from) {
    text_set(to->preset, sizeof to->preset, from->preset);
    to->kind = (uint32_t)from->kind;
    to->key_bits = from->key_bits;
    to->value_bits = from->value_bits;
    to->group = from->group;
    to->value_rotated = from->value_rotated;
    size_t widths = from->n_mixes < WIDTHS_MAX ? from->n_mixes : WIDTHS_MAX;
    to->mix_count = (uint32_t)(widths / 4);
    for (size_t i = 0; i < widths; i++) to->mixes[i / 4][i % 4] = (uint8_t)from->mixes[i];
}

static void layout_set(struct kivi_layout *to, const Kivi__V1__Layout *from) {
    text_set(to->model, sizeof to->model, from->model);
    to->layers = from->layers;
    to->kv_heads = from->kv_heads;
    to->query_heads = from->query_heads;
    to->head_dim = from->head_dim;
    to->dtype = (uint32_t)from->dtype;
    to->softmax_scale = from->softmax_scale;
    if (from->codec) codec_set(&to->codec, from->codec);
    if (from->exact) {
        to->has_exact = true;
        to->window_tokens = from->exact->window_tokens;
        to->sink_blocks = from->exact->sink_blocks;
    }
}

void layout_info_set(struct kivi_layout_info *to, const Kivi__V1__LayoutInfo *from) {
    memset(to, 0, sizeof *to);
    if (!from) return;
    digest_set(&to->fingerprint, from->fingerprint);
    if (from->layout) layout_set(&to->layout, from->layout);
    to->page_bytes_packed = from->page_bytes_packed;
    to->page_bytes_full = from->page_bytes_full;
    to->bits_per_element = from->bits_per_element;
}

int kivi_layout_register(struct kivi_client *client, const struct kivi_layout *layout,
                         struct kivi_layout_info *info, bool *created, uint32_t timeout_ms,
                         struct kivi_error *error) {
    struct layout_message message;
    int code = layout_pack(layout, &message, error);
    if (code != KIVI_OK) return code;

    Kivi__V1__RegisterLayoutRequest question = KIVI__V1__REGISTER_LAYOUT_REQUEST__INIT;
    Kivi__V1__RegisterLayoutResponse *answer;
    question.layout = &message.layout;
    code = CLIENT_CALL(client, METHOD_REGISTER_LAYOUT, &question,
                       kivi__v1__register_layout_response, &answer, timeout_ms, error);
    if (code != KIVI_OK) return code;
    layout_info_set(info, answer->info);
    if (created) *created = answer->created;
    protobuf_c_message_free_unpacked(&answer->base, NULL);
    return KIVI_OK;
}

int kivi_layout_list(struct kivi_client *client, struct kivi_layout_info **infos, size_t *count,
                     uint32_t timeout_ms, struct kivi_error *error) {
    Kivi__V1__LayoutsRequest question = KIVI__V1__LAYOUTS_REQUEST__INIT;
    Kivi__V1__LayoutsResponse *answer;
    int code = CLIENT_CALL(client, METHOD_LAYOUTS, &question, kivi__v1__layouts_response, &answer,
                           timeout_ms, error);
    if (code != KIVI_OK) return code;

    struct kivi_layout_info *list = calloc(answer->n_layouts + 1, sizeof *list);
    if (!list) code = error_set(error, KIVI_RESOURCE_EXHAUSTED, "", "out of memory");
    for (size_t i = 0; list && i < answer->n_layouts; i++)
        layout_info_set(&list[i], answer->layouts[i]);
    if (list) {
        *infos = list;
        *count = answer->n_layouts;
    }
    protobuf_c_message_free_unpacked(&answer->base, NULL);
    return code;
}
