#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Attention on a cache that is somewhere else, with nothing but NumPy.

    attend.py unix:///run/kivid/kivid.sock
"""
import sys

import numpy as np

import kivi

rng = np.random.default_rng(1)
layout = kivi.Layout(layers=1, kv_heads=8, query_heads=32, head_dim=128)
with kivi.Client(sys.argv[1]) as client, client.session("attend-example", layout) as s:
    k, v = rng.standard_normal((2, 1000, 8, 128)).astype(np.float16)
    s.append(0, k, v)
    out, lse = s.attend(0, rng.standard_normal((1, 32, 128)).astype(np.float16))
    print(f"{s.length} tokens, out {out.shape}, lse of head 0: {lse[0, 0]:.4f}")
