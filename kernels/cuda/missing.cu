/* SPDX-License-Identifier: Apache-2.0 */
/* missing.cu - why there is no GPU to work on, in words for whoever has to change that. */
#include <cuda_runtime.h>

#include "kernels/backend.h"

const char *kv_cuda_missing(const char *name) {
    int count = 0;
    switch (cudaGetDeviceCount(&count)) {
    case cudaSuccess: break;
    case cudaErrorInsufficientDriver:
        return "no NVIDIA driver was found (libcuda.so.1), or it is older than the CUDA runtime that this kivid "
               "was built with";
    case cudaErrorNoDevice: return "the NVIDIA driver sees no GPU: pass one to this container or user";
    default: return "the NVIDIA driver does not answer (nvidia-smi may say why)";
    }
    return count == 0 ? "the NVIDIA driver sees no GPU"
                      : "there is no GPU of that number with compute capability 8.0 or later";
}
