/* SPDX-License-Identifier: Apache-2.0 */
/* attend.cu - a call of attention, from items to one launch.
 *
 *   items, pages  --units-->  runs of units  --plan-->  blocks of the grid
 *
 * The plan gives every block about the same number of units and makes at most one wave of
 * blocks where it can: a second, thin wave costs more than an uneven first.
 */
#include "kernels/cuda/attend.h"

#include <algorithm>

#include "kernels/cuda/cuda.h"
#include "kernels/cuda/plan.h"
#include "proto/kv_check.h"

typedef const struct attend_kernel (*attend_table)[2];

static attend_table kernels_of(uint32_t head_dim) {
    switch (head_dim) {
    case 64: return attend_kernels_64;
    case 96: return attend_kernels_96;
    case 128: return attend_kernels_128;
    default: return attend_kernels_256;
    }
}

enum kv_status cuda_attend_open(struct cuda_device *device) {
    const uint32_t dims[] = {64, 96, 128, 256};
    for (uint32_t D : dims)
        for (uint32_t mode = 0; mode < 3; mode++)
            for (uint32_t wide = 0; wide < 2; wide++) {
                cudaError_t error = cudaFuncSetAttribute(
                    (const void *)kernels_of(D)[mode][wide].kernel,
                    cudaFuncAttributeMaxDynamicSharedMemorySize, (int)device->shared_max - 1024);
                if (error != cudaSuccess) {
                    fprintf(stderr, "cuda: head_dim %u mode %u: %s\n", D, mode, cudaGetErrorString(error));
                    return KV_UNAVAILABLE;
                }
            }
    return KV_OK;
}

static uint32_t log2_of(uint32_t x) {
    uint32_t n = 0;
    while (x >>= 1) n++;
    return n;
}

/* What the last of two digits may be worth, in log2 units, for scores that are off by 2.6e-4
 * (one standard deviation): every digit is off by up to half a last one, times what its code is off
 * the middle one, which is made up for. */
static float refine_above(uint32_t head_dim, const uint8_t widths[KV_QUARTERS]) {
    static const float squares[] = {0, 0.25f, 1.25f, 0, 21.25f}; /* variance of codes, by width */
    float sum = 0;
    for (uint32_t q = 0; q < KV_QUARTERS; q++) sum += (float)head_dim / KV_QUARTERS * squares[widths[q]];
    return 2.6e-4f * 1.4427f / 0.2887f / sqrtf(std::max(sum, 1.0f));
}

/* How many warps share a multiprocessor, as how many blocks, and how many stages each has at most. */
struct attend_form {
    uint32_t warps, blocks, stages;
    bool ahead; /* the first units are few enough of all to be asked for early */
};

/* Measured on an H100 (NOTES.md).  Where a warp gets one or two units, warps that get fewer only keep
 * others waiting, and a second stage of keys would come before others' first. */
static struct attend_form form_of(const struct attend_limits *limits, const struct attend_kernel *kernel,
                                  const struct attend_item *items, uint32_t count, uint32_t heads) {
    struct attend_form form = {kernel->threads / 32, kernel->blocks_per_sm, 4, true};
    if (limits->kernel != NULL || form.warps < 16) return form;
    uint64_t units = 0, sequences = 0;
    uint32_t longest = 1;
    for (uint32_t i = 0; i < count; i++) {
        longest = std::max(longest, items[i].unit_count);
        sequences += (uint64_t)heads * items[i].vector_blocks;
        units += (uint64_t)heads * items[i].vector_blocks * items[i].unit_count;
    }
    if (units < 32 * limits->processors) {
        const uint32_t splits = (uint32_t)std::max<uint64_t>(1, limits->processors / std::max<uint64_t>(1, sequences));
        const uint32_t each = (longest + splits - 1) / splits, rounds = (each + 11) / 12;
        return {std::max(4u, (each + rounds - 1) / rounds), 1, 2, false};
    }
    if (units < 128 * limits->processors) return {12, 1, 4, true};
    /* Several waves of short sequences: one block computes while the other starts or ends. */
    if (sequences > 2 * limits->processors && units < 128 * sequences) return {8, 2, 4, true};
    return form;
}

struct attend_launch attend_prepare(const struct attend_limits *limits, const struct kv_shape *shape,
                                    uint32_t count, const struct kv_attend *items, uint8_t *host,
                                    uint8_t *device) {
    struct attend_launch launch = {};
    struct attend_call *call = &launch.call;
    const struct kv_codec *codec = &shape->codec;
    const uint32_t D = shape->head_dim;
    const bool minmax = codec->kind == KV_CODEC_MINMAX;

    call->item_count = count;
    call->heads = shape->heads;
    call->raw_value_offset = (uint32_t)(kv_shape_elements(shape) * 2);
    call->bf16 = shape->dtype == KV_DTYPE_BF16;
    call->group_log = 5;
    uint32_t part_max = 0;
    if (codec->kind != KV_CODEC_RAW) {
        call->map = kv_page_map(shape);
        call->mix_count = codec->mix_count;
        for (uint32_t i = 0; i < codec->mix_count; i++) memcpy(&call->mixes[i], codec->mixes[i], 4);
        call->key_width_sum = kv_codec_key_width_sum(codec);
        call->key_bits = codec->key_bits;
        call->value_bits = codec->value_bits;
        if (minmax) call->group_log = (uint8_t)log2_of(codec->group);
        for (uint32_t i = 0; i < KV_MIX_COUNT_MAX; i++) {
            const uint8_t keys[] = {codec->key_bits, codec->key_bits, codec->key_bits, codec->key_bits};
            call->refine_above[i] = refine_above(D, minmax ? keys : codec->mixes[i]) *
                                    (limits->coarse != 0 ? limits->coarse : 1);
        }
        part_max = std::max(call->map.value_mean, call->map.record_bytes - call->map.value_mean);
    }
    part_max = std::max(part_max, ATTEND_SLICE * (2 * D + 16));
    call->stage_bytes = (part_max + 127) & ~127u;

    uint32_t vectors_most = 0;
    for (uint32_t i = 0; i < count; i++)
        vectors_most = std::max(vectors_most, items[i].rows * (items[i].heads_q / shape->heads));
    const uint32_t mode = minmax ? ATTEND_MINMAX : codec->value_rotated ? ATTEND_ROTATED : ATTEND_PLAIN;
    const struct attend_kernel *kernel =
        limits->kernel != NULL ? limits->kernel : &kernels_of(D)[mode][vectors_most > 4];
    launch.kernel = kernel;

    /* Units. */
    struct attend_item *out = call->items;
    size_t used = 0;
    struct attend_unit *units = (struct attend_unit *)host;
    call->units = (const struct attend_unit *)device;
    uint32_t unit_count = 0;
    for (uint32_t i = 0; i < count; i++) {
        uint32_t token = 0;
        out[i] = (struct attend_item){};
        out[i].unit_first = unit_count;
        for (uint32_t p = 0; p < items[i].page_count; p++) {
            const struct kv_page_ref *ref = &items[i].pages[p];
            if (!ref->raw && codec->kind != KV_CODEC_RAW) {
                units[unit_count++] = {(const char *)ref->page, token, KV_BLOCK_TOKENS, 0, 0};
            } else {
                for (uint32_t s = 0; s * ATTEND_SLICE < ref->tokens; s++)
                    units[unit_count++] = {(const char *)ref->page, token + s * ATTEND_SLICE,
                                           (uint16_t)std::min<uint32_t>(ATTEND_SLICE, ref->tokens - s * ATTEND_SLICE),
                                           1, (uint8_t)s};
            }
            token += ref->tokens;
        }
        out[i].unit_count = unit_count - out[i].unit_first;
    }
    used += unit_count * sizeof *units;
    call->visible = (const uint32_t *)(device + used);
    uint32_t *visible = (uint32_t *)(host + used);
    uint32_t visible_count = 0;

    for (uint32_t i = 0; i < count; i++) {
        out[i].query = items[i].query;
        out[i].out = items[i].out;
        out[i].lse = items[i].lse;
        out[i].score_scale = items[i].score_scale * 1.4426950408889634f;
        out[i].group = items[i].heads_q / shape->heads;
        out[i].vectors = items[i].rows * out[i].group;
        out[i].vector_blocks = (out[i].vectors + kernel->vectors - 1) / kernel->vectors;
        out[i].visible_first = visible_count;
        out[i].heads_q = items[i].heads_q;
        out[i].dtype = items[i].dtype;
        out[i].merge = items[i].merge;
        for (uint32_t r = 0; r < items[i].rows; r++) visible[visible_count++] = items[i].visible[r];
    }
    used += visible_count * sizeof *visible;
    launch.upload_bytes = used;

    /* As many stages as fit beside the other blocks of a multiprocessor, four at most; where
     * not even two do, fewer blocks, then fewer warps. */
    const uint32_t quads = kernel->vectors / 4;
    const struct attend_form form = form_of(limits, kernel, out, count, shape->heads);
    uint32_t blocks = form.blocks, warps = form.warps, room;
    call->ahead = form.ahead;
    for (;;) {
        room = (limits->shared_max + 1024) / blocks - 2048;
        call->stages = limits->stages != 0 ? limits->stages : form.stages;
        for (;; call->stages--) {
            launch.shared_bytes =
                attend_layout_of(D, minmax, call->group_log, quads, warps, call->stages, call->stage_bytes).bytes;
            if (launch.shared_bytes <= room || call->stages == 2) break;
        }
        if (launch.shared_bytes <= room) break;
        if (blocks > 1)
            blocks--;
        else
            warps--;
        KV_CHECK(warps > 0);
    }
    launch.threads = 32 * warps;

    const uint32_t slots = limits->slots != 0 ? limits->slots : limits->processors * blocks;
    launch.grid = attend_plan(out, count, shape->heads, slots, warps, limits->parts_max);
    for (uint32_t i = 0; i < count; i++) call->block_first[i] = out[i].block_first;
    return launch;
}

/* Blocks that a target of units per block makes. */
static uint64_t blocks_at(const struct attend_item *items, uint32_t count, uint32_t heads, uint32_t units) {
    uint64_t blocks = 0;
    for (uint32_t i = 0; i < count; i++)
        blocks += (uint64_t)heads * items[i].vector_blocks * std::max(1u, (items[i].unit_count + units - 1) / units);
    return blocks;
}

uint32_t attend_plan(struct attend_item *items, uint32_t count, uint32_t heads, uint32_t slots,
                     uint32_t warps, size_t parts_max) {
    uint64_t sequences = 0;
    uint32_t longest = 1;
    for (uint32_t i = 0; i < count; i++) {
        sequences += (uint64_t)heads * items[i].vector_blocks;
        longest = std::max(longest, items[i].unit_count);
    }
    /* Every sequence has a block at least; where these are more than a wave, long ones may
     * still be cut so that none lasts longer than the average wave. */
    const uint64_t budget = std::min<uint64_t>(std::max<uint64_t>(slots, sequences + (sequences > slots ? slots : 0)),
                                               sequences > parts_max ? sequences : std::max<uint64_t>(sequences, parts_max));
    uint32_t low = std::min(warps, longest), high = longest;
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        if (blocks_at(items, count, heads, middle) <= budget)
            high = middle;
        else
            low = middle + 1;
    }
    uint32_t block = 0, part = 0, counter = 0;
    for (uint32_t i = 0; i < count; i++) {
        items[i].block_first = block;
        items[i].splits = std::max(1u, (items[i].unit_count + low - 1) / low);
        items[i].splits = std::min<uint32_t>(items[i].splits, ATTEND_SPLITS_MAX);
        const uint32_t of_item = heads * items[i].vector_blocks;
        items[i].part_first = part;
        items[i].counter_first = counter;
        block += of_item * items[i].splits;
        if (items[i].splits > 1) part += of_item * items[i].splits, counter += of_item;
    }
    KV_CHECK(part <= parts_max && counter <= COUNTERS);
    return block;
}

cudaError_t attend_start(const struct attend_launch *launch, bool overlaps, cudaStream_t queue) {
    cudaLaunchAttribute overlap = {};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    struct attend_call call = launch->call;
    call.ahead &= overlaps;
    cudaLaunchConfig_t config = {};
    config.gridDim = launch->grid;
    config.blockDim = launch->threads;
    config.dynamicSmemBytes = launch->shared_bytes;
    config.stream = queue;
    config.attrs = &overlap;
    config.numAttrs = overlaps;
    return cudaLaunchKernelEx(&config, launch->kernel->kernel, call);
}

void cuda_attend(struct kv_stream *base, const struct kv_shape *shape, uint32_t count,
                 const struct kv_attend *items) {
    struct cuda_stream *stream = (struct cuda_stream *)base;
    const struct attend_limits limits = {stream->device->processors, stream->device->shared_max, 0, 0, stream->parts_max, 0, NULL};
    size_t bytes = 0;
    for (uint32_t i = 0; i < count; i++)
        bytes += items[i].rows * sizeof(uint32_t) + (size_t)items[i].page_count * 8 * sizeof(struct attend_unit);
    struct cuda_upload upload = cuda_upload_reserve(stream, std::min<size_t>(bytes, UPLOAD_SEGMENT_BYTES));
    struct attend_launch launch =
        attend_prepare(&limits, shape, count, items, (uint8_t *)upload.host, (uint8_t *)upload.device);
    launch.call.parts = stream->parts;
    launch.call.counters = stream->counters;
    cuda_upload_send(stream, upload, launch.upload_bytes);
    /* The copy stands between this kernel and the one before. */
    cuda_ok(stream->device, attend_start(&launch, false, stream->queue));
}
