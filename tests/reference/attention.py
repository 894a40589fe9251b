#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""attention.py - what the answers should be, computed without any of our C.

Reads safetensors files by hand and computes attention in double precision with numpy and nothing else.
A file of a text's cache holds

    k.L, v.L   [kv heads, tokens, dim]        q.L   [query heads, rows, dim], of the newest `rows` tokens

and an answer of kivid out.L [query heads, rows, dim] and lse.L [query heads, rows]. Query head h reads KV
head h // (query heads / kv heads). Row r of n sees the tokens up to its own: tokens - n + 1 + r of them.

    attention.py KV ANSWER            relative L2 of ANSWER's outputs to attention on KV
    attention.py KV ANSWER FETCHED    the same to attention with K and V of FETCHED instead (layer i of
                                      FETCHED is the i-th layer of KV)
"""
import json
import struct
import sys

import numpy as np

DTYPES = {"F16": np.float16, "F32": np.float32, "F64": np.float64, "I32": np.int32, "U32": np.uint32,
          "I64": np.int64, "U8": np.uint8, "BF16": np.uint16}


class Tensors(dict):
    """name -> array. BF16 comes as float32, which holds it exactly; .dtypes says what it was."""

    def __init__(self, path):
        super().__init__()
        self.dtypes = {}
        with open(path, "rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
            data = file.read()
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            array = np.frombuffer(data[begin:end], DTYPES[entry["dtype"]]).reshape(entry["shape"])
            if entry["dtype"] == "BF16":
                array = (array.astype(np.uint32) << 16).view(np.float32)
            self[name] = array
            self.dtypes[name] = entry["dtype"]

    def layers(self):
        """Numbers of the layers that are there, rising."""
        return sorted(int(name[2:]) for name in self if name[:2] == "k." and name[2:].isdigit())


def attention(q, k, v):
    """q [query heads, rows, dim], k and v [kv heads, tokens, dim] -> out like q, lse [query heads, rows]."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    heads, rows, dim = q.shape
    tokens = k.shape[1]
    group = heads // k.shape[0]
    sees = np.arange(tokens)[None, :] < (tokens - rows + 1 + np.arange(rows))[:, None]
    out = np.empty_like(q)
    lse = np.empty((heads, rows))
    for head in range(heads):
        score = np.where(sees, q[head] @ k[head // group].T / np.sqrt(dim), -np.inf)
        peak = score.max(axis=1, keepdims=True)
        weight = np.exp(score - peak)
        total = weight.sum(axis=1, keepdims=True)
        out[head] = weight @ v[head // group] / total
        lse[head] = (peak + np.log(total))[:, 0]
    return out, lse


def distance(answers, truths):
    """Relative L2 over all layers together."""
    difference = sum(np.square(np.asarray(a, np.float64) - t).sum() for a, t in zip(answers, truths))
    return float(np.sqrt(difference / sum(np.square(t).sum() for t in truths)))


def truths(text, source=None):
    """Outputs of every layer of `text`, with K and V of `source` (layer 0, 1, ...) if it is given."""
    results = []
    for index, layer in enumerate(text.layers()):
        k, v = ((source[f"k.{index}"], source[f"v.{index}"]) if source else
                (text[f"k.{layer}"], text[f"v.{layer}"]))
        results.append(attention(text[f"q.{layer}"], k, v)[0])
    return results


def outputs(text, answer):
    return [answer[f"out.{layer}"] for layer in text.layers()]


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    kv, answered = Tensors(sys.argv[1]), Tensors(sys.argv[2])
    fetched = Tensors(sys.argv[3]) if len(sys.argv) == 4 else None
    print(distance(outputs(kv, answered), truths(kv, fetched)))
