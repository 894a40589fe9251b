/* SPDX-License-Identifier: Apache-2.0 */
/* attend_64.cu - the attention kernels of head_dim 64. */
#include "kernels/cuda/attend.cuh"

#define INSTANCE(mode, quads, threads, blocks) \
    { attend<64, mode, quads, threads, blocks>, threads, blocks, 4 * quads }

const struct attend_kernel attend_kernels_64[3][2] = {
    {INSTANCE(ATTEND_PLAIN, 1, 512, 1), INSTANCE(ATTEND_PLAIN, 2, 384, 1)},
    {INSTANCE(ATTEND_ROTATED, 1, 512, 1), INSTANCE(ATTEND_ROTATED, 2, 256, 1)},
    {INSTANCE(ATTEND_MINMAX, 1, 384, 1), INSTANCE(ATTEND_MINMAX, 2, 256, 1)},
};
