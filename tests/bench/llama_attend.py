#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""llama.cpp's attention over a q4_0 cache, beside attend_bench.  Optional; nothing here is built or shipped.

    pip install llama-cpp-python            # or any build of ggml as shared libraries
    tests/bench/llama_attend.py bazel-bin/tests/bench/attend_bench [--lib DIR]

ggml_flash_attn_ext() with keys and values of type q4_0: 8 KV heads, 32 query heads, 128 channels, 16,384
tokens, one query row, which is attend_bench's shape; 4.5 bits an element where kivi2 has 2.25.  DIR holds
libggml-base.so and libggml-cpu.so; without it they are looked for in the installed package.  Its answer is
compared with plain attention first, then both are timed in turn, and medians are printed.
"""
import argparse
import ctypes as C
import json
import pathlib
import statistics
import subprocess
import sys
import time

import numpy as np

HEADS, GROUP, D, TOKENS, RUNS, ROUNDS = 8, 4, 128, 16384, 9, 3
F32, Q4_0 = 0, 2


class Init(C.Structure):
    _fields_ = [("mem_size", C.c_size_t), ("mem_buffer", C.c_void_p), ("no_alloc", C.c_bool)]


class Plan(C.Structure):
    """ggml_cplan; what stands behind the third field is only carried, and room to spare for newer ones."""
    _fields_ = [("work_size", C.c_size_t), ("work_data", C.c_void_p), ("n_threads", C.c_int),
                ("rest", C.c_uint8 * 128)]


def libraries(directory):
    if directory is None:
        import importlib.util
        found = importlib.util.find_spec("llama_cpp")
        if found is None:
            sys.exit("llama_attend: no llama_cpp package; install it or name a --lib")
        directory = pathlib.Path(found.origin).parent / "lib"
    base = C.CDLL(str(pathlib.Path(directory) / "libggml-base.so"), mode=C.RTLD_GLOBAL)
    cpu = C.CDLL(str(pathlib.Path(directory) / "libggml-cpu.so"), mode=C.RTLD_GLOBAL)
    for name in ("ggml_init", "ggml_new_tensor_3d", "ggml_flash_attn_ext", "ggml_new_graph", "ggml_get_data"):
        getattr(base, name).restype = C.c_void_p
    base.ggml_quantize_chunk.restype = C.c_size_t
    cpu.ggml_graph_plan.restype = Plan
    return base, cpu


class Llama:
    def __init__(self, base, cpu):
        self.base, self.cpu = base, cpu
        cpu.ggml_cpu_init()
        self.context = C.c_void_p(base.ggml_init(Init(256 << 20, None, False)))
        random = np.random.default_rng(1)
        self.query = (random.standard_normal((HEADS * GROUP, D)) * 0.3).astype(np.float32)
        self.keys = random.standard_normal((HEADS, TOKENS, D)).astype(np.float32)
        self.values = random.standard_normal((HEADS, TOKENS, D)).astype(np.float32)
        q = self.tensor(F32, 1, HEADS * GROUP)
        C.memmove(base.ggml_get_data(q), self.query.ctypes.data, self.query.nbytes)
        k, v = self.packed(self.keys), self.packed(self.values)
        self.out = C.c_void_p(base.ggml_flash_attn_ext(self.context, q, k, v, None, C.c_float(1),
                                                       C.c_float(0), C.c_float(0)))
        self.graph = C.c_void_p(base.ggml_new_graph(self.context))
        base.ggml_build_forward_expand(self.graph, self.out)

    def tensor(self, kind, rows, heads):
        return C.c_void_p(self.base.ggml_new_tensor_3d(self.context, kind, C.c_int64(D), C.c_int64(rows),
                                                       C.c_int64(heads)))

    def packed(self, rows):
        tensor = self.tensor(Q4_0, TOKENS, HEADS)
        self.base.ggml_quantize_chunk(Q4_0, C.c_void_p(rows.ctypes.data),
                                      C.c_void_p(self.base.ggml_get_data(tensor)), C.c_int64(0),
                                      C.c_int64(HEADS * TOKENS), C.c_int64(D), None)
        return tensor

    def times(self, threads):
        plan = self.cpu.ggml_graph_plan(self.graph, threads, None)
        work = C.create_string_buffer(max(plan.work_size, 1))
        plan.work_data = C.addressof(work)
        times = []
        for _ in range(RUNS + 1):  # the first one begins threads
            start = time.perf_counter()
            if self.cpu.ggml_graph_compute(self.graph, C.byref(plan)) != 0:
                sys.exit("llama_attend: ggml_graph_compute failed")
            times.append(1e6 * (time.perf_counter() - start))
        return times[1:]

    def check(self):
        """Four bits leave an error of some percent; a wrong layout would leave nothing right."""
        self.times(1)
        out = np.ctypeslib.as_array(C.cast(self.base.ggml_get_data(self.out), C.POINTER(C.c_float)),
                                    (HEADS * GROUP, D))
        error = size = 0.0
        for head in range(HEADS * GROUP):
            score = self.keys[head // GROUP] @ self.query[head]
            weight = np.exp(score - score.max())
            truth = weight @ self.values[head // GROUP] / weight.sum()
            error, size = error + np.sum((out[head] - truth) ** 2), size + np.sum(truth ** 2)
        if error > 0.1 * size:
            sys.exit(f"llama_attend: the answer is off by {(error / size) ** 0.5:.2f} of its size")
        print(f"q4_0 answer, relative error {(error / size) ** 0.5:.3f}")


def ours(bench, codec):
    """Microseconds by threads."""
    text = subprocess.run([bench, "--codec", codec, "--json", "-"], check=True, capture_output=True).stdout
    return {row["threads"]: row["ours"] for row in json.loads(text)["rows"] if row["opponent_name"] == "fp32"
            or row["opponent_name"].startswith("fp32")}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", help="attend_bench")
    parser.add_argument("--lib", help="where ggml's shared libraries are")
    parser.add_argument("--codec", default="kivi2")
    options = parser.parse_args()
    llama = Llama(*libraries(options.lib))
    llama.check()
    theirs, mine = {1: [], 2: []}, {1: [], 2: []}
    for _ in range(ROUNDS):
        for threads in theirs:
            theirs[threads] += llama.times(threads)
        for threads, time_us in ours(options.bench, options.codec).items():
            mine[threads].append(time_us)
    for threads in theirs:
        a, b = statistics.median(mine[threads]), statistics.median(theirs[threads])
        print(f"{threads} thread{'s' if threads > 1 else ''}: {options.codec} {a:.0f} us, llama.cpp q4_0 {b:.0f} us, "
              f"{b / a:.2f}x")


main()
