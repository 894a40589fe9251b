/* SPDX-License-Identifier: Apache-2.0 */
/* bench.cu - the CUDA backend against the clock.  Run by tests/device/run.
 *
 *     cuda_bench [--quick] [--variants] NAME...      NAME: copy attend more codec spill; by name alone: sweep trace
 *
 * One JSON object a line: {"name", "us", "bytes"} and what else there is to say.  Attention
 * is timed cold: sets of pages are rotated until they are more than twice the L2 cache, each
 * launch takes the next set, all launches of a round are one CUDA graph, and the figure is
 * the median of the rounds.  Pages are quantized from random data, lie scattered in one
 * arena, and every context has its first block and its newest block raw.
 */
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#define KV_ATTEND_TRACE
#include "kernels/cuda/attend.cuh"
#include "kernels/cuda/cuda.h"
#include "kernels/cuda/plan.h"

#define CHECK(call)                                                                            \
    do {                                                                                       \
        cudaError_t e_ = (call);                                                               \
        if (e_ != cudaSuccess) {                                                               \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, cudaGetErrorString(e_));        \
            exit(1);                                                                           \
        }                                                                                      \
    } while (0)

static bool quick, variants;
static struct cuda_device *device;
static struct kv_stream *stream;
static size_t cold_bytes;
static float coarse;

static cudaStream_t queue() {
    return ((struct cuda_stream *)stream)->queue;
}

/* ---- timing ---------------------------------------------------------------------------- */

/* Microseconds per launch: median over rounds of a graph of `launches` launches. */
static double time_graph(int launches, const std::function<void(int)> &launch) {
    cudaGraph_t graph;
    cudaGraphExec_t run;
    launch(0);
    CHECK(cudaStreamSynchronize(queue()));
    CHECK(cudaStreamBeginCapture(queue(), cudaStreamCaptureModeGlobal));
    for (int i = 0; i < launches; i++) launch(i);
    CHECK(cudaStreamEndCapture(queue(), &graph));
    CHECK(cudaGraphInstantiate(&run, graph, 0));
    cudaEvent_t a, b;
    CHECK(cudaEventCreate(&a));
    CHECK(cudaEventCreate(&b));
    std::vector<double> times;
    for (int r = 0; r < (quick ? 7 : 15) + 2; r++) {
        CHECK(cudaEventRecord(a, queue()));
        CHECK(cudaGraphLaunch(run, queue()));
        CHECK(cudaEventRecord(b, queue()));
        CHECK(cudaEventSynchronize(b));
        float ms;
        CHECK(cudaEventElapsedTime(&ms, a, b));
        if (r >= 2) times.push_back(1e3 * ms / launches);
    }
    CHECK(cudaGraphExecDestroy(run));
    CHECK(cudaGraphDestroy(graph));
    CHECK(cudaEventDestroy(a));
    CHECK(cudaEventDestroy(b));
    std::sort(times.begin(), times.end());
    return times[times.size() / 2];
}

/* Launches of a graph: every set once, about 1.5 ms at least. */
static int launches_for(int sets, double estimate_us) {
    int n = std::max(sets, (int)(1500 / std::max(estimate_us, 1.0)));
    n = (n + sets - 1) / sets * sets;
    return std::max(sets, std::min(n, 600 / sets * sets));
}

static int sets_for(double bytes) {
    return std::max(1, (int)((double)cold_bytes / bytes + 1));
}

template <class Type> static Type *gpu(size_t count) {
    void *p;
    CHECK(cudaMalloc(&p, count * sizeof(Type)));
    return (Type *)p;
}

/* ---- data ------------------------------------------------------------------------------ */

static __device__ uint64_t hash(uint64_t z) {
    z += 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

/* About normal; channels of unlike spread, so that every mix of widths occurs. */
static __global__ void fill(__half *p, size_t n, uint64_t seed, int D, float uneven) {
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) {
        uint64_t r = hash(i ^ (seed << 40));
        float s = 0;
        for (int k = 0; k < 4; k++) s += (float)((r >> (16 * k)) & 0xffff) * (1.0f / 65536) - 0.5f;
        const uint64_t c = hash(i % D + 1000 * (i / (128 * D)));
        p[i] = __float2half(s * 1.7320508f * exp2f(uneven * ((float)(c & 1023) / 512 - 1)));
    }
}

static __global__ void read_all(const uint4 *p, size_t n, uint32_t *sink) {
    uint32_t x = 0;
    size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x;
    const size_t step = (size_t)gridDim.x * blockDim.x;
    for (; i + 3 * step < n; i += 4 * step) {
        uint4 v[4];
#pragma unroll
        for (int u = 0; u < 4; u++) v[u] = __ldcs(p + i + u * step);
#pragma unroll
        for (int u = 0; u < 4; u++) x ^= v[u].x ^ v[u].y ^ v[u].z ^ v[u].w;
    }
    for (; i < n; i += step) x ^= p[i].x ^ p[i].w;
    if (x == 0x12345678) *sink = x;
}

/* Time to read `bytes`, the best of some grids. */
static double ceiling_us(double bytes) {
    static char *arena;
    static size_t arena_bytes;
    static uint32_t *sink = gpu<uint32_t>(1);
    const int sets = sets_for(bytes);
    const size_t set = ((size_t)bytes + 511) / 512 * 512;
    if (arena_bytes < set * sets) {
        if (arena != NULL) CHECK(cudaFree(arena));
        arena_bytes = set * sets;
        arena = gpu<char>(arena_bytes);
        fill<<<2048, 256, 0, queue()>>>((__half *)arena, arena_bytes / 2, 7, 128, 0);
    }
    double best = 1e30;
    for (int per_sm : {1, 2, 4}) {
        const int blocks = (int)device->processors * per_sm;
        const double us = time_graph(launches_for(sets, bytes / 3e6), [&](int i) {
            read_all<<<blocks, 512, 0, queue()>>>((const uint4 *)(arena + (size_t)(i % sets) * set), (size_t)bytes / 16, sink);
        });
        best = std::min(best, us);
    }
    return best;
}

/* ---- attention --------------------------------------------------------------------------- */

struct problem {
    const char *codec;
    uint32_t sessions, tokens, group, head_dim, rows;
};

/* Pages of one codec: `count` packed ones and two raw ones for every 64. */
struct arena {
    struct kv_shape shape;
    std::vector<char *> packed, raw;
    std::vector<void *> memory;
};

static struct kv_shape shape_of(const char *codec, uint32_t head_dim) {
    struct kv_preset preset;
    if (kv_preset_find(codec, &preset) != KV_OK) exit(2);
    struct kv_shape shape = {};
    shape.heads = 8;
    shape.head_dim = (uint16_t)head_dim;
    shape.dtype = KV_DTYPE_F16;
    shape.codec = preset.codec;
    return shape;
}

static void arena_fill(struct arena *arena, const char *codec, uint32_t head_dim, size_t packed, size_t raw) {
    arena->shape = shape_of(codec, head_dim);
    const bool is_raw = arena->shape.codec.kind == KV_CODEC_RAW;
    if (is_raw) raw += packed, packed = 0;
    const size_t raw_bytes = kv_shape_bytes_raw(&arena->shape), bytes = is_raw ? 0 : kv_page_bytes(&arena->shape);
    const size_t source_pages = std::max<size_t>(64, raw);
    char *source = gpu<char>(source_pages * raw_bytes), *target = packed ? gpu<char>(packed * bytes) : NULL;
    arena->memory = {source, target};
    for (size_t i = 0; i < source_pages; i++)
        fill<<<256, 256, 0, queue()>>>((__half *)(source + i * raw_bytes), raw_bytes / 2, i, (int)head_dim, 2.0f);
    std::vector<size_t> order(packed);
    for (size_t i = 0; i < packed; i++) order[i] = i;
    srand(1);
    for (size_t i = packed; i > 1; i--) std::swap(order[i - 1], order[(size_t)rand() % i]);
    for (size_t i = 0; i < packed; i++) arena->packed.push_back(target + order[i] * bytes);
    for (size_t i = 0; i < source_pages; i++) arena->raw.push_back(source + i * raw_bytes);
    struct kv_quantize items[64];
    for (size_t i = 0; i < packed; i += 64) {
        const uint32_t n = (uint32_t)std::min<size_t>(64, packed - i);
        for (uint32_t j = 0; j < n; j++) items[j] = {arena->raw[(i + j) % 64], NULL, arena->packed[i + j]};
        kv_kernel_quantize(stream, &arena->shape, n, items);
    }
    CHECK(cudaStreamSynchronize(queue()));
}

static void arena_free(struct arena *arena) {
    for (void *p : arena->memory) CHECK(cudaFree(p));
}

static double problem_bytes(const struct problem *p) {
    const struct kv_shape shape = shape_of(p->codec, p->head_dim);
    const double pages = p->tokens / 128.0;
    if (shape.codec.kind == KV_CODEC_RAW) return p->sessions * pages * (double)kv_shape_bytes_raw(&shape);
    const double raw = std::min(pages, 2.0);
    return p->sessions * ((pages - raw) * (double)kv_page_bytes(&shape) + raw * (double)kv_shape_bytes_raw(&shape));
}

/* One problem, prepared: sets of launches that differ in their pages. */
struct prepared {
    std::vector<struct attend_launch> launches;
    std::vector<void *> memory;
};

static void prepare(struct prepared *out, const struct problem *p, struct arena *arena, int sets, const struct attend_kernel *kernel, uint32_t slots, uint32_t stages) {
    const struct attend_limits limits = {device->processors, device->shared_max, slots, stages, ((struct cuda_stream *)stream)->parts_max, coarse, kernel};
    const uint32_t heads_q = 8 * p->group, pages = p->tokens / 128;
    const size_t elements = (size_t)p->sessions * p->rows * heads_q * p->head_dim;
    __half *query = gpu<__half>(elements);
    fill<<<256, 256, 0, queue()>>>(query, elements, 99, (int)p->head_dim, 0);
    float *result = gpu<float>(elements), *lse = gpu<float>(elements / p->head_dim);
    out->memory = {query, result, lse};
    size_t packed = 0, raw = 0;
    std::vector<uint32_t> visible(p->rows);
    for (uint32_t r = 0; r < p->rows; r++) visible[r] = p->tokens - p->rows + 1 + r;
    std::vector<uint8_t> host((size_t)p->sessions * (pages * 8 + 64) * 16 + (1 << 20));
    for (int s = 0; s < sets; s++) {
        std::vector<struct kv_page_ref> refs((size_t)p->sessions * pages);
        std::vector<struct kv_attend> items(p->sessions);
        for (uint32_t b = 0; b < p->sessions; b++) {
            for (uint32_t i = 0; i < pages; i++) {
                const bool is_raw = arena->packed.empty() || i == 0 || i == pages - 1;
                struct kv_page_ref *ref = &refs[(size_t)b * pages + i];
                ref->page = is_raw ? arena->raw[raw++ % arena->raw.size()] : arena->packed[packed++ % arena->packed.size()];
                ref->tokens = 128, ref->raw = is_raw;
            }
            items[b] = {};
            items[b].query = query + (size_t)b * p->rows * heads_q * p->head_dim;
            items[b].dtype = KV_DTYPE_F16;
            items[b].heads_q = heads_q, items[b].rows = p->rows;
            items[b].score_scale = 1.0f / sqrtf((float)p->head_dim);
            items[b].page_count = pages, items[b].pages = &refs[(size_t)b * pages];
            items[b].visible = visible.data();
            items[b].out = result + (size_t)b * p->rows * heads_q * p->head_dim;
            items[b].lse = lse + (size_t)b * p->rows * heads_q;
        }
        size_t bytes = (size_t)p->sessions * (sizeof(struct attend_item) + pages * 8 * 16 + p->rows * 4) + 256;
        uint8_t *table = gpu<uint8_t>(bytes);
        out->memory.push_back(table);
        host.resize(bytes);
        struct attend_launch launch = attend_prepare(&limits, &arena->shape, p->sessions, items.data(), host.data(), table);
        launch.call.parts = ((struct cuda_stream *)stream)->parts;
        launch.call.counters = ((struct cuda_stream *)stream)->counters;
        CHECK(cudaMemcpy(table, host.data(), launch.upload_bytes, cudaMemcpyHostToDevice));
        out->launches.push_back(launch);
    }
}

static void prepared_free(struct prepared *prepared) {
    for (void *p : prepared->memory) CHECK(cudaFree(p));
}

static double attend_us(const struct problem *p, struct arena *arena, const struct attend_kernel *kernel, uint32_t slots, uint32_t stages, struct attend_launch *seen) {
    const double bytes = problem_bytes(p);
    const int sets = std::min(sets_for(bytes), 64);
    struct prepared prepared;
    prepare(&prepared, p, arena, sets, kernel, slots, stages);
    *seen = prepared.launches[0];
    const double us = time_graph(launches_for(sets, bytes / 2.5e6), [&](int i) { CHECK(attend_start(&prepared.launches[(size_t)(i % sets)], device->overlaps, queue())); });
    prepared_free(&prepared);
    return us;
}

/* The kernels that were thought of. */
static const struct attend_kernel plain_variants[] = {
    {attend<128, ATTEND_PLAIN, 1, 256, 2>, 256, 2, 4},
    {attend<128, ATTEND_PLAIN, 1, 128, 4>, 128, 4, 4},
    {attend<128, ATTEND_PLAIN, 1, 512, 1>, 512, 1, 4},
    {attend<128, ATTEND_PLAIN, 1, 128, 3>, 128, 3, 4},
    {attend<128, ATTEND_PLAIN, 1, 384, 1>, 384, 1, 4},
};
static const char *const variant_names[] = {"8w x2", "4w x4", "16w x1", "4w x3", "12w x1"};

static void bench_attend(const struct problem *p, bool with_ceiling, bool try_variants) {
    const double bytes = problem_bytes(p);
    const int sets = std::min(sets_for(bytes), 64);
    struct arena arena;
    const size_t pages = (size_t)p->sessions * (p->tokens / 128) * (size_t)sets;
    const size_t raw = (size_t)p->sessions * 2 * (size_t)sets;
    arena_fill(&arena, p->codec, p->head_dim, pages - std::min(raw, pages), raw);
    struct attend_launch seen;
    const double us = attend_us(p, &arena, NULL, 0, 0, &seen);
    char name[96];
    snprintf(name, sizeof name, "attend %s B=%u T=%u G=%u D=%u rows=%u", p->codec, p->sessions, p->tokens, p->group, p->head_dim, p->rows);
    printf("{\"name\":\"%s\",\"us\":%.2f,\"bytes\":%.0f,\"gbs\":%.0f,\"grid\":%u,\"stages\":%u,\"shared\":%u", name, us, bytes, bytes / us / 1e3, seen.grid, seen.call.stages, seen.shared_bytes);
    if (with_ceiling) {
        const double best = ceiling_us(bytes);
        printf(",\"ceiling_us\":%.2f,\"of_ceiling\":%.3f", best, best / us);
    }
    printf("}\n");
    fflush(stdout);
    if (try_variants)
        for (size_t v = 0; v < sizeof plain_variants / sizeof *plain_variants; v++) {
            const struct attend_kernel *kernel = &plain_variants[v];
            CHECK(cudaFuncSetAttribute((const void *)kernel->kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)device->shared_max - 1024));
            for (uint32_t stages : {2, 3, 4})
                for (int waves : {1, 2}) {
                    const uint32_t slots = device->processors * kernel->blocks_per_sm * waves;
                    if (slots > ((struct cuda_stream *)stream)->parts_max) continue;
                    if (waves == 2 && stages != 3) continue;
                    const double t = attend_us(p, &arena, kernel, slots, stages, &seen);
                    if (seen.call.stages != stages) continue;
                    printf("{\"name\":\"%s [%s stages %u slots %u]\",\"us\":%.2f,\"gbs\":%.0f,\"grid\":%u}\n", name, variant_names[v], stages, slots, t, bytes / t / 1e3, seen.grid);
                    fflush(stdout);
                }
        }
    arena_free(&arena);
}

/* Where the time of one cold launch goes: cycles from a block's start to each point of
 * attend(), the median and the largest over blocks, and when blocks start, in ns. */
static void bench_trace(const struct problem *p, const struct attend_kernel *kernel) {
    static const char *const points[TRACE_POINTS] = {"start ns", "", "item", "issued", "query", "first data", "last unit", "all warps", "merged", "counted", "combined", ""};
    const int sets = std::min(sets_for(problem_bytes(p)), 64);
    struct arena arena;
    const size_t pages = (size_t)p->sessions * (p->tokens / 128) * (size_t)sets, raw = (size_t)p->sessions * 2 * (size_t)sets;
    arena_fill(&arena, p->codec, p->head_dim, pages - std::min(raw, pages), raw);
    CHECK(cudaFuncSetAttribute((const void *)kernel->kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)device->shared_max - 1024));
    struct prepared prepared;
    prepare(&prepared, p, &arena, sets, kernel, 0, 2);
    static long long times[TRACE_BLOCKS][TRACE_POINTS];
    memset(times, 0, sizeof times);
    CHECK(cudaMemcpyToSymbol(trace_times, times, sizeof times));
    for (struct attend_launch &launch : prepared.launches) CHECK(attend_start(&launch, device->overlaps, queue()));
    CHECK(cudaStreamSynchronize(queue()));
    CHECK(cudaMemcpyFromSymbol(times, trace_times, sizeof times));
    const uint32_t grid = std::min<uint32_t>(prepared.launches[0].grid, TRACE_BLOCKS);
    printf("{\"name\":\"trace %s B=%u T=%u\",\"grid\":%u", p->codec, p->sessions, p->tokens, grid);
    for (int point = 0; point < TRACE_POINTS; point++) {
        if (points[point][0] == 0) continue;
        std::vector<long long> x;
        long long least = times[0][0];
        for (uint32_t b = 0; b < grid; b++) least = std::min(least, times[b][0]);
        for (uint32_t b = 0; b < grid; b++)
            if (times[b][point] != 0) x.push_back(times[b][point] - (point == 0 ? least : times[b][1]));
        if (x.empty()) continue;
        std::sort(x.begin(), x.end());
        printf(",\"%s\":[%lld,%lld,%lld]", points[point], x[0], x[x.size() / 2], x.back());
    }
    printf("}\n");
    prepared_free(&prepared);
    arena_free(&arena);
}

/* ---- the rest ---------------------------------------------------------------------------- */

static double bench_copy() {
    const size_t bytes = (size_t)1 << 30;
    char *a = gpu<char>(bytes), *b = gpu<char>(bytes);
    fill<<<2048, 256, 0, queue()>>>((__half *)a, bytes / 2, 3, 128, 0);
    cudaEvent_t x, y;
    CHECK(cudaEventCreate(&x));
    CHECK(cudaEventCreate(&y));
    std::vector<double> times;
    for (int r = 0; r < 13; r++) {
        CHECK(cudaEventRecord(x, queue()));
        CHECK(cudaMemcpyAsync(b, a, bytes, cudaMemcpyDeviceToDevice, queue()));
        CHECK(cudaEventRecord(y, queue()));
        CHECK(cudaEventSynchronize(y));
        float ms;
        CHECK(cudaEventElapsedTime(&ms, x, y));
        if (r > 1) times.push_back(ms * 1e3);
    }
    std::sort(times.begin(), times.end());
    const double us = times[times.size() / 2];
    printf("{\"name\":\"copy device\",\"us\":%.1f,\"bytes\":%.0f,\"gbs\":%.0f}\n", us, 2.0 * bytes, 2.0 * bytes / us / 1e3);
    CHECK(cudaFree(a));
    CHECK(cudaFree(b));
    return 2.0 * bytes / us / 1e3;
}

/* Quantize and dequantize of 2048 pages (16 calls of 64, twice), bytes in and out. */
static void bench_codec(const char *codec, uint32_t head_dim, double copy_gbs) {
    struct arena arena;
    const uint32_t pages = 1024;
    arena_fill(&arena, codec, head_dim, pages, 256);
    const double raw = (double)kv_shape_bytes_raw(&arena.shape), packed = (double)kv_page_bytes(&arena.shape);
    char *back = gpu<char>((size_t)(256 * raw));
    for (int way = 0; way < 2; way++) {
        cudaEvent_t x, y;
        CHECK(cudaEventCreate(&x));
        CHECK(cudaEventCreate(&y));
        std::vector<double> times;
        for (int r = 0; r < 7; r++) {
            CHECK(cudaEventRecord(x, queue()));
            for (uint32_t i = 0; i < pages; i += 64) {
                struct kv_quantize q[64];
                struct kv_dequantize d[64];
                for (uint32_t j = 0; j < 64; j++) {
                    q[j] = {arena.raw[(i + j) % 256], NULL, arena.packed[i + j]};
                    d[j] = {arena.packed[i + j], back + (size_t)((i + j) % 256) * (size_t)raw,
                            (enum kv_dtype)arena.shape.dtype};
                }
                if (way == 0)
                    kv_kernel_quantize(stream, &arena.shape, 64, q);
                else
                    kv_kernel_dequantize(stream, &arena.shape, 64, d);
            }
            CHECK(cudaEventRecord(y, queue()));
            CHECK(cudaEventSynchronize(y));
            float ms;
            CHECK(cudaEventElapsedTime(&ms, x, y));
            if (r > 1) times.push_back(ms * 1e3);
        }
        std::sort(times.begin(), times.end());
        const double us = times[times.size() / 2], bytes = pages * (raw + packed);
        printf("{\"name\":\"%s %s D=%u\",\"us\":%.1f,\"bytes\":%.0f,\"gbs\":%.0f,\"of_copy\":%.3f}\n", way ? "dequantize" : "quantize", codec, head_dim, us, bytes, bytes / us / 1e3, bytes / us / 1e3 / copy_gbs);
        fflush(stdout);
    }
    CHECK(cudaFree(back));
    arena_free(&arena);
}

static void bench_spill() {
    const size_t piece = 73856, count = 4096, bytes = piece * count;
    char *d = gpu<char>(bytes);
    void *h;
    CHECK(cudaHostAlloc(&h, bytes, cudaHostAllocPortable));
    for (int down = 0; down < 2; down++)
        for (int pieces = 0; pieces < 2; pieces++) {
            cudaEvent_t x, y;
            CHECK(cudaEventCreate(&x));
            CHECK(cudaEventCreate(&y));
            std::vector<double> times;
            for (int r = 0; r < 5; r++) {
                CHECK(cudaEventRecord(x, queue()));
                const size_t step = pieces ? 32 * piece : bytes; /* a block of a model of 32 layers */
                for (size_t i = 0; i < bytes; i += step)
                    kv_stream_copy(stream, down ? (char *)h + i : d + i, down ? d + i : (char *)h + i, step);
                CHECK(cudaEventRecord(y, queue()));
                CHECK(cudaEventSynchronize(y));
                float ms;
                CHECK(cudaEventElapsedTime(&ms, x, y));
                times.push_back(ms * 1e3);
            }
            std::sort(times.begin(), times.end());
            printf("{\"name\":\"%s %s\",\"us\":%.1f,\"bytes\":%zu,\"gbs\":%.1f}\n", down ? "spill" : "restore", pieces ? "by block" : "in one", times[2], bytes, (double)bytes / times[2] / 1e3);
        }
    CHECK(cudaFreeHost(h));
    CHECK(cudaFree(d));
}

static const struct problem goals[] = {
    {"kivi2", 1, 32768, 4, 128, 1},  {"kivi2", 1, 131072, 4, 128, 1}, {"kivi2", 16, 8192, 4, 128, 1},
    {"kivi2", 16, 32768, 4, 128, 1}, {"kivi2", 64, 8192, 4, 128, 1},  {"kivi2", 64, 32768, 4, 128, 1},
};
static const struct problem others[] = {
    {"kivi2-paper", 16, 32768, 4, 128, 1}, {"kivi2-paper", 64, 8192, 4, 128, 1}, {"kivi1.5", 1, 32768, 4, 128, 1},
    {"kivi1.5", 16, 32768, 4, 128, 1},     {"kivi2.5", 16, 32768, 4, 128, 1},    {"raw16", 16, 8192, 4, 128, 1},
    {"kivi2", 16, 32768, 4, 128, 16},      {"kivi2", 16, 32768, 8, 128, 1},      {"kivi2", 16, 32768, 1, 128, 1},
    {"kivi2", 16, 32768, 4, 64, 1},        {"kivi2", 16, 32768, 4, 256, 1},      {"kivi2", 1, 2048, 4, 128, 1},
    {"kivi2", 1, 8192, 4, 128, 1},
};

/* How attention grows: every length, batch, group and head_dim, as far as memory goes. */
static void bench_sweep() {
    const double bytes_max = 24e9; /* of one set; there is room for it and for what it is made from */
    for (int dim : {64, 128, 256})
        for (int group : {1, 4, 8})
            for (int batch : {1, 4, 16, 64})
                for (int tokens = 2048; tokens <= 524288; tokens *= 2) {
                    const struct problem p = {"kivi2", batch, tokens, group, dim, 1};
                    if (problem_bytes(&p) <= bytes_max)
                        bench_attend(&p, true, false);
                    else
                        fprintf(stderr, "left out: B=%d T=%d D=%d takes %.0f GB\n", batch, tokens, dim, problem_bytes(&p) * 1e-9);
                }
}

int main(int argc, char **argv) {
    std::vector<std::string> names;
    for (int i = 1; i < argc; i++) {
        if (std::string(argv[i]) == "--quick")
            quick = true;
        else if (std::string(argv[i]) == "--variants")
            variants = true;
        else if (std::string(argv[i]) == "--coarse" && i + 1 < argc)
            coarse = strtof(argv[++i], NULL);
        else
            names.push_back(argv[i]);
    }
    struct kv_device_options options = {"cuda", 0};
    struct kv_device *opened;
    if (kv_device_open(&options, &opened) != KV_OK || kv_stream_open(opened, &stream) != KV_OK) {
        fprintf(stderr, "no CUDA device\n");
        return 1;
    }
    device = (struct cuda_device *)opened;
    cudaDeviceProp properties;
    CHECK(cudaGetDeviceProperties(&properties, device->ordinal));
    cold_bytes = (size_t)(properties.l2CacheSize * 4.0);
    printf("{\"gpu\":\"%s\",\"processors\":%u,\"l2\":%d}\n", properties.name, device->processors, properties.l2CacheSize);
    auto wanted = [&](const char *name) { return names.empty() || std::find(names.begin(), names.end(), name) != names.end(); };
    double copy_gbs = 0;
    if (wanted("copy") || wanted("codec")) copy_gbs = bench_copy();
    if (wanted("attend"))
        for (const struct problem &p : goals) bench_attend(&p, true, variants);
    if (wanted("more"))
        for (const struct problem &p : others) bench_attend(&p, true, false);
    if (!names.empty() && wanted("sweep")) bench_sweep();
    if (wanted("trace"))
        for (const struct problem &p : {goals[0], others[11], goals[2]})
            for (int v : {0, 2, 4}) bench_trace(&p, &plain_variants[v]);
    if (wanted("codec")) {
        for (const char *codec : {"kivi2-paper", "kivi2", "kivi1.5", "kivi4-paper", "kivi2.5"}) bench_codec(codec, 128, copy_gbs);
    }
    if (wanted("spill")) bench_spill();
    return 0;
}
