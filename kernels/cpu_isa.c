/* SPDX-License-Identifier: Apache-2.0 */
/* cpu_isa.c - which CPU instruction sets were built, best first.
 *
 * BUILD defines KV_CPU_X86 where the AVX tables are compiled in; whether this machine can
 * run them is asked once, when a device is opened.
 */
#include "kernels/cpu.h"

static const struct kv_cpu_isa *const tables[] = {
#ifdef KV_CPU_X86
    &kv_cpu_amx,
    &kv_cpu_avx512,
    &kv_cpu_avx2,
#endif
    &kv_cpu_scalar,
};

const struct kv_cpu_isa *kv_cpu_isa_find(const char *name) {
    bool best = strcmp(name, "auto") == 0;
    for (size_t i = 0; i < sizeof tables / sizeof tables[0]; i++)
        if (best ? tables[i]->available() : strcmp(tables[i]->name, name) == 0) return tables[i];
    return NULL;
}
