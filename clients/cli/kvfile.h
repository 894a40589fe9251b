/* SPDX-License-Identifier: Apache-2.0 */
/* kvfile.h - the K, V and Q of one text, from a safetensors file.
 *
 *   k.L, v.L     [kv heads, tokens, head_dim]     F16, BF16 or F32; L is any layer number
 *   q.L          [query heads, rows, head_dim]    optional: queries of the newest `rows` tokens
 *   q_energy.L   [kv heads, head_dim] F32         optional: running mean of q^2
 *   token_ids    [tokens] I32, U32 or I64         optional
 *
 * The layers that are present become layers 0, 1, ... of the layout in order of their numbers.
 */
#ifndef KIVI_CLIENTS_CLI_KVFILE_H
#define KIVI_CLIENTS_CLI_KVFILE_H

#include "clients/c/kivi.h"
#include "clients/cli/safetensors.h"

enum { KVFILE_LAYERS_MAX = 256 };

struct kvfile {
    struct st_file *file;
    uint32_t layers;
    uint32_t numbers[KVFILE_LAYERS_MAX]; /* L of layer i */
    const struct st_tensor *k[KVFILE_LAYERS_MAX], *v[KVFILE_LAYERS_MAX];
    const struct st_tensor *q[KVFILE_LAYERS_MAX], *energy[KVFILE_LAYERS_MAX]; /* or NULL */
    uint32_t kv_heads, query_heads, head_dim;
    uint32_t dtype;      /* enum kivi_dtype */
    uint64_t tokens;
    uint64_t rows;       /* of q; 0: there is none */
    bool has_energy;     /* in every layer */
    uint32_t *token_ids; /* [tokens], or NULL */
};

/* False on failure, with a sentence in `why`.  kvfile_close() is right in either case. */
bool kvfile_open(struct kvfile *kv, const char *path, char why[ST_WHY_BYTES]);
void kvfile_close(struct kvfile *kv);

/* The layout this file fits, with codec and model left to the caller. */
struct kivi_layout kvfile_layout(const struct kvfile *kv);

/* Positions begin .. begin + count - 1 of a [heads, positions, head_dim] tensor, turned to
 * [count][heads][head_dim], the order of the wire. */
void kvfile_turn(const struct kvfile *kv, const struct st_tensor *tensor, uint64_t begin,
                 uint64_t count, void *to);

/* All layers' energies one behind the other: [layers][kv_heads][head_dim]. */
void kvfile_energy(const struct kvfile *kv, float *to);

#endif
