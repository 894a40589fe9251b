/* SPDX-License-Identifier: Apache-2.0 */
/* snapshot.c - the bytes of snapshot.h, out and in. */
#include "service/snapshot.h"

#include "proto/kv_check.h"

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "numbers are written as they are held");

static const char magic[8] = {'K', 'I', 'V', 'I', 'S', 'E', 'S', 'S'};

uint64_t snapshot_total_bytes(const struct snapshot_head *head) {
    return sizeof *head + (uint64_t)head->block_count * KV_DIGEST_BYTES + head->ids_count * 4ull +
           head->layers * 4ull + (uint64_t)head->layers * head->energy_count * 4;
}

struct kv_block_extent snapshot_extent(uint64_t tag, uint64_t total_bytes) {
    uint64_t part_bytes = SNAPSHOT_PART_BYTES;
    if (total_bytes > part_bytes * KV_PARTS_MAX) part_bytes *= 16;
    return (struct kv_block_extent){
        .tag = tag,
        .part_count = (uint32_t)((total_bytes + part_bytes - 1) / part_bytes),
        .part_bytes = (uint32_t)part_bytes,
    };
}

static uint8_t *put(uint8_t *out, const void *from, size_t bytes) {
    if (from && bytes) memcpy(out, from, bytes);
    return out + bytes;
}

void snapshot_encode(const struct snapshot *from, const struct kv_block_extent *extent,
                     uint8_t *out) {
    struct snapshot_head head = *from->head;
    memcpy(head.magic, magic, sizeof magic);
    head.version = SNAPSHOT_VERSION;
    head.head_bytes = sizeof head;
    head.total_bytes = snapshot_total_bytes(&head);
    uint64_t record_bytes = (uint64_t)extent->part_count * extent->part_bytes;
    KV_CHECK(head.total_bytes <= record_bytes);

    uint8_t *at = put(out, &head, sizeof head);
    at = put(at, from->keys, head.block_count * sizeof from->keys[0]);
    at = put(at, from->ids, head.ids_count * sizeof from->ids[0]);
    at = put(at, from->rows_seen, head.layers * sizeof from->rows_seen[0]);
    at = put(at, from->energy, (size_t)head.layers * head.energy_count * sizeof from->energy[0]);
    KV_CHECK(at == out + head.total_bytes);
    memset(at, 0, record_bytes - head.total_bytes);
}

static bool name_valid(const struct snapshot_head *head) {
    size_t bytes = strnlen(head->name, sizeof head->name);
    return bytes >= 1 && bytes <= KV_NAME_MAX;
}

bool snapshot_head_valid(const uint8_t *bytes, uint64_t available) {
    if (available < sizeof(struct snapshot_head)) return false;
    const struct snapshot_head *head = (const struct snapshot_head *)bytes;
    uint64_t sealed = (uint64_t)head->block_count * KV_BLOCK_TOKENS;
    uint64_t tail = head->length - sealed;
    uint32_t in_chunks = head->chunk_count ? head->chunk_count * head->chunk_layers : 0;
    return memcmp(head->magic, magic, sizeof magic) == 0 && head->version == SNAPSHOT_VERSION &&
           head->head_bytes == sizeof *head && head->length <= 1 << 24 && head->length >= sealed &&
           head->block_count <= (1 << 24) / KV_BLOCK_TOKENS && head->ids_given <= 1 &&
           head->ids_count == (head->ids_given ? tail : 0) && head->layers >= 1 &&
           head->layers <= KV_LAYERS_MAX && head->energy_count >= 64 &&
           head->energy_count <= KV_HEADS_MAX * KV_HEAD_DIM_MAX &&
           head->salt_count <= KV_SALT_MAX && name_valid(head) &&
           head->chunk_count <= head->layers && head->chunk_layers <= head->layers &&
           (tail > 0) == (head->chunk_count > 0) &&
           (tail == 0 || (in_chunks >= head->layers &&
                          in_chunks - head->layers < head->chunk_layers)) &&
           head->total_bytes == snapshot_total_bytes(head);
}

bool snapshot_decode(const uint8_t *bytes, uint64_t available, struct snapshot *out) {
    if (!snapshot_head_valid(bytes, available)) return false;
    const struct snapshot_head *head = (const struct snapshot_head *)bytes;
    if (head->total_bytes > available) return false;
    out->head = head;
    out->keys = (const struct kv_digest *)(bytes + sizeof *head);
    out->ids = (const uint32_t *)(out->keys + head->block_count);
    out->rows_seen = out->ids + head->ids_count;
    out->energy = (const float *)(out->rows_seen + head->layers);
    return true;
}

uint32_t snapshot_tail_tokens(const struct snapshot_head *head) {
    return (uint32_t)(head->length - (uint64_t)head->block_count * KV_BLOCK_TOKENS);
}

uint64_t snapshot_layer_bytes(const struct kv_shape *shape, uint32_t tail_tokens) {
    return (uint64_t)tail_tokens * 2 * shape->heads * shape->head_dim * 2;
}

uint32_t snapshot_chunk_layers(uint64_t layer_bytes, uint32_t layers) {
    uint64_t fit = layer_bytes ? SNAPSHOT_CHUNK_BYTES / layer_bytes : layers;
    return fit < 1 ? 1 : fit > layers ? layers : (uint32_t)fit;
}

size_t snapshot_rows_save(const struct kv_shape *shape, const uint8_t *page, uint32_t tokens,
                          uint8_t *out) {
    size_t row = shape->head_dim * 2, bytes = tokens * row;
    for (uint32_t h = 0; h < 2u * shape->heads; h++)
        memcpy(out + h * bytes, page + h * KV_BLOCK_TOKENS * row, bytes);
    return 2 * shape->heads * bytes;
}

size_t snapshot_rows_load(const struct kv_shape *shape, uint8_t *page, uint32_t tokens,
                          const uint8_t *from) {
    size_t row = shape->head_dim * 2, bytes = tokens * row;
    for (uint32_t h = 0; h < 2u * shape->heads; h++)
        memcpy(page + h * KV_BLOCK_TOKENS * row, from + h * bytes, bytes);
    return 2 * shape->heads * bytes;
}
