#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Two workers, one prompt, one copy.

    shared_prompt.py unix:///run/kivid/kivid.sock MODEL_DIR

The second session sends the same prompt.  Its blocks are found by their digest (a chain over the
token ids), so nothing is stored twice, and a third one starts with the whole prefix in place.
"""
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import kivi
import kivi.hf

PROMPT = "The library keeps one copy of every book that many readers share. " * 60


def main() -> None:
    target, directory = sys.argv[1:3]
    kivi.hf.register()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    model.set_attn_implementation("kivi")
    inputs = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    with kivi.Client(target) as client:
        for worker in ("worker-a", "worker-b"):
            before = client.stats()
            with client.session(worker, model=model.config) as session:
                cache = kivi.hf.RemoteCache(model.config, session)
                with torch.no_grad():
                    model(**inputs, past_key_values=cache)
            after = client.stats()
            print(f"{worker}: {inputs.input_ids.shape[1]} tokens, "
                  f"{after.blocks_sealed - before.blocks_sealed} blocks stored, "
                  f"{after.blocks_shared - before.blocks_shared} found in the cache")
        with client.session("worker-c", model=model.config,
                            token_ids=inputs.input_ids[0]) as session:
            print(f"worker-c: starts with {session.length} tokens in place")


if __name__ == "__main__":
    main()
