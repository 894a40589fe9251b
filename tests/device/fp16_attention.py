# SPDX-License-Identifier: Apache-2.0
"""Times the opponent: fp16 decode attention by cuDNN, through PyTorch's SDPA with enable_gqa.

    python3 tests/device/fp16_attention.py [--quick] [--flash] B,T,G,D[,rows] ...

One JSON object a line, {"name", "us", "bytes"}; as in kernels/cuda/bench.cu: sets of K and V are
rotated until they are more than twice the L2 cache, one CUDA graph of launches, medians.
"""
import json
import statistics
import sys

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

HEADS = 8
DEFAULT = ["1,32768,4,128", "1,131072,4,128", "16,8192,4,128", "16,32768,4,128", "64,8192,4,128",
           "64,32768,4,128"]


def time_graph(launches, launch, rounds):
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for i in range(3):
            launch(i)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for i in range(launches):
                launch(i)
        times = []
        for i in range(rounds + 2):
            a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            a.record()
            graph.replay()
            b.record()
            b.synchronize()
            if i >= 2:
                times.append(a.elapsed_time(b) * 1e3 / launches)
    return statistics.median(times)


def bench(backend, name, B, T, G, D, rows, rounds, cold):
    bytes_each = 2 * B * HEADS * T * D * 2
    sets = min(64, int(cold / bytes_each) + 1)
    kv = [[torch.randn(B, HEADS, T, D, device="cuda", dtype=torch.float16) for _ in range(2)]
          for _ in range(sets)]
    q = torch.randn(B, HEADS * G, rows, D, device="cuda", dtype=torch.float16)

    def launch(i):
        k, v = kv[i % sets]
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    launches = max(sets, min(int(1500 / max(1.0, bytes_each / 2.5e6)) // sets * sets, 200))
    with sdpa_kernel([backend]):
        us = time_graph(launches, launch, rounds)
    print(json.dumps({"name": f"fp16 {name} B={B} T={T} G={G} D={D} rows={rows}", "us": round(us, 2),
                      "bytes": bytes_each, "gbs": round(bytes_each / us / 1e3)}), flush=True)


def main(arguments):
    rounds = 7 if "--quick" in arguments else 15
    shapes = [a for a in arguments if not a.startswith("--")] or DEFAULT
    backends = [(SDPBackend.CUDNN_ATTENTION, "cudnn")]
    if "--flash" in arguments:
        backends.append((SDPBackend.FLASH_ATTENTION, "flash"))
    cold = 4 * torch.cuda.get_device_properties(0).L2_cache_size
    for shape in shapes:
        B, T, G, D, *rows = (int(x) for x in shape.split(","))
        for backend, name in backends:
            try:
                bench(backend, name, B, T, G, D, rows[0] if rows else 1, rounds, cold)
            except (RuntimeError, torch.OutOfMemoryError) as error:
                print(json.dumps({"name": f"fp16 {name} {shape}", "error": str(error).split("\n")[0]}),
                      flush=True)
            torch.cuda.empty_cache()


main(sys.argv[1:])
