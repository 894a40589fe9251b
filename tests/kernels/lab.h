/* SPDX-License-Identifier: Apache-2.0 */
/* lab.h - one backend on a bench, for tests and kernel_check.
 *
 * A lab is a device with one stream and two areas of memory, device and pinned, from which
 * pieces are taken until lab_clear().  Everything waits for its result, so a test reads as
 * if kernels were plain functions; on a device that is not the host, data is carried there
 * and back.  What goes wrong here ends the program: a test cannot go on without its bench.
 */
#ifndef KV_TESTS_KERNELS_LAB_H
#define KV_TESTS_KERNELS_LAB_H

#include "kernels/kernel.h"

struct lab {
    struct kv_device *device;
    struct kv_stream *stream;
    uint8_t *area[2]; /* by enum kv_memory */
    size_t used[2];
};

enum { LAB_AREA_BYTES = 512 << 20 };

/* False: this machine has no such device. */
bool lab_open(struct lab *lab, const char *name, uint32_t workers);
void lab_close(struct lab *lab);

/* Gives all pieces back. */
void lab_clear(struct lab *lab);

/* A piece, 256-byte aligned, contents undefined. */
void *lab_device(struct lab *lab, size_t bytes);
void *lab_pinned(struct lab *lab, size_t bytes);

/* A device piece holding a copy of host memory, and the way back. */
void *lab_put(struct lab *lab, const void *source, size_t bytes);
void lab_get(struct lab *lab, void *target, const void *device, size_t bytes);

/* Returns when all queued work is done; ends the program after a minute. */
void lab_wait(struct lab *lab);

/* Verbs on host memory, waited for.  Pages are host arrays of kv_shape_bytes_raw() and
 * kv_page_bytes(). */
void lab_quantize(struct lab *lab, const struct kv_shape *shape, const uint16_t *raw,
                  const float *energy, uint8_t *packed);
void lab_dequantize(struct lab *lab, const struct kv_shape *shape, const uint8_t *packed,
                    enum kv_dtype dtype, uint16_t *raw);

/* One attend item whose pointers are all host memory: pages too.  out and lse are read
 * first when item->merge. */
void lab_attend(struct lab *lab, const struct kv_shape *shape, const struct kv_attend *item);

double lab_seconds(void); /* of a clock that never goes back */

/* ---- numbers --------------------------------------------------------------------------- */

/* A stream of random numbers that a seed replays on every machine. */
struct dice {
    uint64_t state;
};
uint64_t dice_bits(struct dice *dice);
uint32_t dice_below(struct dice *dice, uint32_t limit);
float dice_uniform(struct dice *dice); /* 0 .. 1 */
float dice_normal(struct dice *dice);

/* Ways to fill a raw page of one KV head, by name for messages. */
enum pattern {
    PATTERN_NORMAL,
    PATTERN_BIASED,      /* channels with a large mean and very different spreads */
    PATTERN_CONSTANT,    /* one value */
    PATTERN_ROWS,        /* constant along the token, and along the channel: groups of one value */
    PATTERN_ZEROS,       /* +0 and -0 */
    PATTERN_SUBNORMAL,
    PATTERN_TINY,        /* spans around 1e-8, where a group counts as constant */
    PATTERN_OUTLIERS,    /* a few channels and tokens larger by 1e4 */
    PATTERN_LARGEST,     /* the largest element, either sign */
    PATTERN_ALTERNATING, /* the sign changes with every element */
    PATTERN_COARSE,      /* few distinct values: ties everywhere */
    PATTERN_BITS,        /* any finite bit pattern within the limit */
    PATTERN_COUNT,
};
const char *pattern_name(enum pattern pattern);

/* Fills count heads of a raw page's half [head][128][head_dim]. */
void pattern_fill(enum pattern pattern, struct dice *dice, const struct kv_shape *shape,
                  uint16_t *half);

/* ---- real KV ----------------------------------------------------------------------------- */

/* A safetensors file in memory.  Tensors are found by name and not converted. */
struct fixture {
    uint8_t *bytes;
    size_t size;
};
struct tensor {
    const void *data;
    uint32_t shape[3]; /* absent dimensions are 1, the last one always present */
    enum kv_dtype dtype;
};
/* False: no such file, or not a safetensors file. */
bool fixture_open(struct fixture *fixture, const char *path);
void fixture_close(struct fixture *fixture);
/* False: no such tensor. */
bool fixture_find(const struct fixture *fixture, const char *name, struct tensor *out);

/* tests/NAME, also from where Bazel runs tests. */
const char *fixture_path(const char *name);

#endif
