/* SPDX-License-Identifier: Apache-2.0 */
/* kv_types.h - the words every room shares: status, digest, codec, shape.
 *
 * A *page* is K and V of one transformer layer for one block of consecutive
 * tokens.  A *block* is all layers' pages of the same tokens; it is the unit of
 * sharing, spilling and eviction, and immutable once sealed.  A page exists as
 *
 *   raw     16-bit elements unchanged: K [head][token][channel], then V alike
 *   packed  what the layout's codec makes of it; kernels/page.h draws the bits
 *
 * Everything here is a value.  Nothing allocates, blocks, logs or fails.
 */
#ifndef KV_PROTO_KV_TYPES_H
#define KV_PROTO_KV_TYPES_H

#include <assert.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* What an operation came to.  service/rpc maps each value to one gRPC code; the
 * name behind the arrow is that code. */
enum kv_status {
    KV_OK = 0,
    KV_NOT_FOUND,    /* no tier holds it                             -> NOT_FOUND */
    KV_EXISTS,       /* it is already there                          -> ALREADY_EXISTS */
    KV_BUSY,         /* a fixed limit is in use; retry may succeed   -> RESOURCE_EXHAUSTED */
    KV_INVALID,      /* the request breaks a written rule            -> INVALID_ARGUMENT */
    KV_MISMATCH,     /* right form, wrong state (layout, identity)   -> FAILED_PRECONDITION */
    KV_ABORTED,      /* a compare-and-append lost the race           -> ABORTED */
    KV_CORRUPT,      /* stored bytes failed their checksum           -> DATA_LOSS */
    KV_IO_ERROR,     /* a file or a device failed                    -> UNAVAILABLE */
    KV_CANCELLED,    /* the client went away                         -> CANCELLED */
    KV_DEADLINE,     /* the deadline passed                          -> DEADLINE_EXCEEDED */
    KV_UNAVAILABLE,  /* draining or the backend is unhealthy         -> UNAVAILABLE */
    KV_UNSUPPORTED,  /* part of the contract, not served yet         -> UNIMPLEMENTED */
};

/* Names a block, a layout or a session record: SHA-256. */
enum { KV_DIGEST_BYTES = 32 };
struct kv_digest {
    uint8_t bytes[KV_DIGEST_BYTES];
};

static inline bool kv_digest_equal(const struct kv_digest *a, const struct kv_digest *b) {
    return memcmp(a->bytes, b->bytes, KV_DIGEST_BYTES) == 0;
}

/* Element types of the wire.  Raw pages hold 16 bits: F32 is rounded to F16 (half to
 * even) on arrival. */
enum kv_dtype { KV_DTYPE_F16 = 1, KV_DTYPE_BF16 = 2, KV_DTYPE_F32 = 3 };

static inline size_t kv_dtype_bytes(enum kv_dtype dtype) {
    return dtype == KV_DTYPE_F32 ? 4 : 2;
}

/* How a page is packed.  A codec is data: kernels branch on these fields, never on a
 * preset's name.
 *
 *   RAW       16-bit elements unchanged
 *   MINMAX    the published KIVI: per group of `group` elements a scale and a minimum in
 *             16 bits; K grouped along tokens, V along channels; key_bits, value_bits in
 *             {2, 4}
 *   UNBIASED  one group per K channel (along the block's tokens) and per V token (along
 *             the channels); 8-bit scales; the K channels are sorted into four quarters
 *             whose widths come from one of `mixes`; V of value_bits in {1, 2} after the
 *             page's mean vector is taken out, rotated by a Hadamard matrix if value_rotated
 */
enum kv_codec_kind { KV_CODEC_RAW = 0, KV_CODEC_MINMAX = 1, KV_CODEC_UNBIASED = 2 };

enum { KV_MIX_COUNT_MAX = 4, KV_QUARTERS = 4 };

struct kv_codec {
    uint8_t kind;          /* enum kv_codec_kind */
    uint8_t key_bits;      /* MINMAX */
    uint8_t value_bits;    /* MINMAX, UNBIASED */
    uint8_t group;         /* MINMAX: 32, 64 or 128 */
    uint8_t value_rotated; /* UNBIASED: 0 or 1 */
    uint8_t mix_count;     /* UNBIASED: 1 .. KV_MIX_COUNT_MAX */
    uint8_t mixes[KV_MIX_COUNT_MAX][KV_QUARTERS]; /* widths in {0,1,2,4}, never rising, equal sums */
    uint8_t reserved[2];   /* zero */
};
static_assert(sizeof(struct kv_codec) == 24, "a codec is hashed into the layout fingerprint");

enum {
    KV_BLOCK_TOKENS = 128, /* tokens of a page; the only value of layout version 1 */
    KV_HEADS_MAX = 128,    /* KV heads */
    KV_HEADS_Q_MAX = 256,
    KV_GROUP_HEADS_MAX = 16, /* query heads that share one KV head */
    KV_HEAD_DIM_MAX = 256,
    KV_LAYERS_MAX = 256,
    KV_ROWS_MAX = 128, /* query rows of one attend item */
};

/* The extent of one page.  Valid when kv_shape_valid() says so. */
struct kv_shape {
    uint16_t heads;    /* KV heads: 1 .. KV_HEADS_MAX */
    uint16_t head_dim; /* 64, 96, 128 or 256 */
    uint8_t dtype;     /* of raw elements: KV_DTYPE_F16 or KV_DTYPE_BF16 */
    struct kv_codec codec;
};

static inline bool kv_head_dim_valid(uint32_t head_dim) {
    return head_dim == 64 || head_dim == 96 || head_dim == 128 || head_dim == 256;
}

/* Elements of K in a page, which is also the elements of V. */
static inline size_t kv_shape_elements(const struct kv_shape *shape) {
    return (size_t)shape->heads * KV_BLOCK_TOKENS * shape->head_dim;
}

/* Bytes of a raw page: K and V at 2 bytes an element. */
static inline size_t kv_shape_bytes_raw(const struct kv_shape *shape) {
    return 2 * kv_shape_elements(shape) * 2;
}

/* A model's cache shape, registered once and named by its fingerprint. */
struct kv_layout {
    uint16_t layers;        /* 1 .. KV_LAYERS_MAX */
    uint16_t heads;         /* KV heads */
    uint16_t heads_q;       /* query heads: a multiple of heads, at most 16 per KV head */
    uint16_t head_dim;      /* 64, 96, 128 or 256 */
    uint16_t block_tokens;  /* KV_BLOCK_TOKENS */
    uint16_t window_tokens; /* newest tokens never packed: a multiple of 128, 0 .. 1024 */
    uint16_t sink_blocks;   /* first blocks never packed: 0 .. 8 */
    uint8_t dtype;          /* enum kv_dtype: elements on the wire */
    uint8_t reserved;       /* zero */
    float score_scale;      /* multiplies q.k: finite and above 0 */
    struct kv_codec codec;
};
static_assert(sizeof(struct kv_layout) == 44, "no padding: hashed as bytes, little endian");

static inline struct kv_shape kv_layout_shape(const struct kv_layout *layout) {
    struct kv_shape shape = {
        .heads = layout->heads,
        .head_dim = layout->head_dim,
        .dtype = layout->dtype == KV_DTYPE_BF16 ? KV_DTYPE_BF16 : KV_DTYPE_F16,
        .codec = layout->codec,
    };
    return shape;
}

/* The shape of the same pages left in 16 bits: sinks and tails. */
static inline struct kv_shape kv_shape_raw(const struct kv_shape *shape) {
    struct kv_shape raw = {
        .heads = shape->heads, .head_dim = shape->head_dim, .dtype = shape->dtype};
    return raw;
}

/* A piece of memory that belongs to somebody else. */
struct kv_span {
    const uint8_t *bytes;
    size_t count;
};

#endif
