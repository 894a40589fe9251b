/* SPDX-License-Identifier: Apache-2.0 */
/* ptx.cuh - the machine's words that C++ has no name for.  One line of meaning each.
 *
 * Fragments, for lane 4 g + t of a warp (PTX ISA, "mma"):
 *
 *   A 16 x k   a0: row g, a1: row g + 8, K-values of the first half; a2, a3: second half
 *   B k x 8    b0, b1: column g, the same K-values
 *   C 16 x 8   c0, c1: row g, columns 2 t and 2 t + 1; c2, c3: row g + 8
 *
 * with K-values 4 t .. 4 t + 3 of each half for bytes, 2 t and 2 t + 1 for 16-bit elements.
 */
#ifndef KV_KERNELS_CUDA_PTX_CUH
#define KV_KERNELS_CUDA_PTX_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#define KV_DEVICE __device__ __forceinline__

/* Bulk copies and transaction barriers came with 9.0. */
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define KV_HAVE_BULK 1
#else
#define KV_HAVE_BULK 0
#endif

/* ---- products ------------------------------------------------------------------ */

KV_DEVICE void mma_u8s8(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                        uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 "
        "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

KV_DEVICE void mma_u8s8_k16(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t b0) {
    asm("mma.sync.aligned.m16n8k16.row.col.s32.u8.s8.s32 {%0,%1,%2,%3},{%4,%5},{%6},{%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a0), "r"(a1), "r"(b0));
}

KV_DEVICE void mma_s8s8(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                        uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
        "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

KV_DEVICE void mma_f16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                       uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

KV_DEVICE void mma_bf16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                        uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

/* ---- shared memory, by 32-bit address --------------------------------------------- */

KV_DEVICE uint32_t shared_address(const void *p) {
    return (uint32_t)__cvta_generic_to_shared(p);
}
KV_DEVICE uint32_t load_u8(uint32_t a) {
    uint32_t r;
    asm volatile("ld.shared.u8 %0,[%1];" : "=r"(r) : "r"(a) : "memory");
    return r;
}
KV_DEVICE uint32_t load_u16(uint32_t a) {
    uint16_t r;
    asm volatile("ld.shared.u16 %0,[%1];" : "=h"(r) : "r"(a) : "memory");
    return r;
}
KV_DEVICE uint32_t load_32(uint32_t a) {
    uint32_t r;
    asm volatile("ld.shared.u32 %0,[%1];" : "=r"(r) : "r"(a) : "memory");
    return r;
}
KV_DEVICE float load_f32(uint32_t a) {
    return __uint_as_float(load_32(a));
}
KV_DEVICE uint2 load_64(uint32_t a) {
    uint2 r;
    asm volatile("ld.shared.v2.u32 {%0,%1},[%2];" : "=r"(r.x), "=r"(r.y) : "r"(a) : "memory");
    return r;
}
KV_DEVICE uint4 load_128(uint32_t a) {
    uint4 r;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3},[%4];"
                 : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w)
                 : "r"(a)
                 : "memory");
    return r;
}
KV_DEVICE void store_u16(uint32_t a, uint32_t v) {
    asm volatile("st.shared.u16 [%0],%1;" ::"r"(a), "h"((uint16_t)v) : "memory");
}
KV_DEVICE void store_32(uint32_t a, uint32_t v) {
    asm volatile("st.shared.u32 [%0],%1;" ::"r"(a), "r"(v) : "memory");
}
KV_DEVICE void store_f32(uint32_t a, float v) {
    store_32(a, __float_as_uint(v));
}
KV_DEVICE void store_64(uint32_t a, uint32_t x, uint32_t y) {
    asm volatile("st.shared.v2.u32 [%0],{%1,%2};" ::"r"(a), "r"(x), "r"(y) : "memory");
}
KV_DEVICE void store_128(uint32_t a, uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
    asm volatile("st.shared.v4.u32 [%0],{%1,%2,%3,%4};" ::"r"(a), "r"(x), "r"(y), "r"(z), "r"(w)
                 : "memory");
}
/* Four 8 x 8 matrices of 16-bit elements, transposed; lane 8 m + r gives row r of matrix m. */
KV_DEVICE uint4 load_matrices_transposed(uint32_t a) {
    uint4 r;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3},[%4];"
                 : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w)
                 : "r"(a)
                 : "memory");
    return r;
}
/* Transposes one 8 x 8 matrix that lies across the warp. */
KV_DEVICE uint32_t transpose(uint32_t a) {
    uint32_t r;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0,%1;" : "=r"(r) : "r"(a));
    return r;
}

/* ---- pairs of 16-bit elements ------------------------------------------------------- */

KV_DEVICE uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t r;
    asm("fma.rn.f16x2 %0,%1,%2,%3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
}
KV_DEVICE uint32_t mul2(uint32_t a, uint32_t b) {
    uint32_t r;
    asm("mul.rn.f16x2 %0,%1,%2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}
KV_DEVICE uint32_t add2(uint32_t a, uint32_t b) {
    uint32_t r;
    asm("add.rn.f16x2 %0,%1,%2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}
KV_DEVICE uint32_t sub2(uint32_t a, uint32_t b) {
    uint32_t r;
    asm("sub.rn.f16x2 %0,%1,%2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}
KV_DEVICE uint32_t max2(uint32_t a, uint32_t b) {
    uint32_t r;
    asm("max.f16x2 %0,%1,%2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}
KV_DEVICE uint32_t min2(uint32_t a, uint32_t b) {
    uint32_t r;
    asm("min.f16x2 %0,%1,%2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}
KV_DEVICE uint32_t min2_bf16(uint32_t a, uint32_t b) {
    uint32_t r;
    asm("min.bf16x2 %0,%1,%2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}
KV_DEVICE uint32_t max2_bf16(uint32_t a, uint32_t b) {
    uint32_t r;
    asm("max.bf16x2 %0,%1,%2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}
/* max(0, a b + c), rounded once. */
KV_DEVICE uint32_t fma2_relu(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t r;
    asm("fma.rn.relu.f16x2 %0,%1,%2,%3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
}
/* max(0, a - offset) of integers below 2048: their bits are f16 numbers too, 2^-24 apart. */
KV_DEVICE uint32_t above_offset(uint32_t a, int offset) {
    return offset == 0 ? a : fma2_relu(a, 0x3c003c00u, (0x8000u | (uint32_t)offset) * 0x10001u);
}
/* 1 where a > b, else 0, as f16. */
KV_DEVICE uint32_t above2(uint32_t a, uint32_t b) {
    uint32_t r;
    asm("set.gt.f16x2.f16x2 %0,%1,%2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}
/* Infinity becomes the largest finite value. */
KV_DEVICE uint32_t saturate_f16(uint32_t a) {
    return max2(min2(a, 0x7bff7bffu), 0xfbfffbffu);
}
KV_DEVICE uint32_t saturate_bf16(uint32_t a) {
    return max2_bf16(min2_bf16(a, 0x7f7f7f7fu), 0xff7fff7fu);
}
KV_DEVICE uint32_t abs2(uint32_t a) {
    return a & 0x7fff7fffu;
}
KV_DEVICE uint32_t pack_f16(float low, float high) {
    uint32_t r;
    asm("cvt.rn.f16x2.f32 %0,%1,%2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
KV_DEVICE uint32_t pack_bf16(float low, float high) {
    uint32_t r;
    asm("cvt.rn.bf16x2.f32 %0,%1,%2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
KV_DEVICE float low_f16(uint32_t a) {
    return __half2float(__ushort_as_half((unsigned short)a));
}
KV_DEVICE float high_f16(uint32_t a) {
    return __half2float(__ushort_as_half((unsigned short)(a >> 16)));
}
KV_DEVICE float low_bf16(uint32_t a) {
    return __uint_as_float(a << 16);
}
KV_DEVICE float high_bf16(uint32_t a) {
    return __uint_as_float(a & 0xffff0000u);
}
KV_DEVICE float exp2_fast(float x) {
    float r;
    asm("ex2.approx.ftz.f32 %0,%1;" : "=f"(r) : "f"(x));
    return r;
}

/* Adds to a word of global memory, for the whole device: what the block wrote before it, up to
 * its last barrier, is seen by who finds the sum. */
KV_DEVICE unsigned add_acquire_release(unsigned *p, unsigned x) {
    unsigned before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0,[%1],%2;" : "=r"(before) : "l"(p), "r"(x) : "memory");
    return before;
}

/* ---- launches that overlap -------------------------------------------------------------- */

/* Lets the stream's next kernel be brought in while this one runs; it does nothing to memory
 * before its own wait_previous(). */
KV_DEVICE void launch_next() {
#if KV_HAVE_BULK
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
/* Everything the stream did before this kernel is done and seen. */
KV_DEVICE void wait_previous() {
#if KV_HAVE_BULK
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/* ---- copies into shared memory -------------------------------------------------------- */

KV_DEVICE void barrier_init(uint32_t barrier) {
#if KV_HAVE_BULK
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
#endif
}
KV_DEVICE void barrier_init_done() {
#if KV_HAVE_BULK
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
KV_DEVICE void barrier_expect(uint32_t barrier, uint32_t bytes) {
#if KV_HAVE_BULK
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
#endif
}
KV_DEVICE void barrier_wait(uint32_t barrier, uint32_t parity) {
#if KV_HAVE_BULK
    asm volatile("{\n.reg .pred p;\nAGAIN_%=:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
                 "@p bra.uni DONE_%=;\nbra.uni AGAIN_%=;\nDONE_%=:\n}" ::"r"(barrier),
                 "r"(parity)
                 : "memory");
#endif
}
/* One lane; bytes and both addresses are multiples of 16. */
KV_DEVICE void copy_bulk(uint32_t target, const void *source, uint32_t bytes, uint32_t barrier) {
#if KV_HAVE_BULK
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1], %2, [%3];" ::"r"(target),
                 "l"(source), "r"(bytes), "r"(barrier)
                 : "memory");
#endif
}
/* Into the L2 cache only: a hint, whoever writes there meanwhile. */
KV_DEVICE void prefetch_bulk(const void *source, uint32_t bytes) {
#if KV_HAVE_BULK
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(source), "r"(bytes) : "memory");
#endif
}
/* Orders this thread's writes to shared memory before later bulk copies into it. */
KV_DEVICE void fence_bulk() {
#if KV_HAVE_BULK
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
KV_DEVICE void copy_16(uint32_t target, const void *source) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target), "l"(source) : "memory");
}
KV_DEVICE void copy_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int N> KV_DEVICE void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

#endif
