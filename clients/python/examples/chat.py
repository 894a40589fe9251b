#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A chat in the terminal whose memory lives in kivid.

    chat.py unix:///run/kivid/kivid.sock MODEL_DIR [NAME]

Every turn is committed, so the conversation goes on after this program, or the service, or both
were killed: run it again with the same NAME.  Only the new tokens are ever sent.  An empty line
ends it.  What was said is kept beside the session's name in ./NAME.chat, because a cache holds
keys and values, not text.
"""
import pathlib
import sys
from typing import List

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import kivi
import kivi.hf


class Chat:
    def __init__(self, target: str, directory: str, name: str) -> None:
        kivi.hf.register()
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        self.model.set_attn_implementation("kivi")
        self.client = kivi.Client(target, timeout=60)
        self.session = self.client.session(name, model=self.model.config)
        self.log = pathlib.Path(f"{name}.chat")
        words = self.log.read_text().split() if self.log.exists() else []
        self.ids: List[int] = [int(w) for w in words][:self.session.length]
        if len(self.ids) < self.session.length:
            raise SystemExit(f"{self.log}: lacks the text of a session of {self.session.length} "
                             "tokens; choose another NAME")

    def turn(self, text: str) -> str:
        """One exchange; if the service was restarted meanwhile, resumes where it was committed."""
        start = len(self.ids)
        try:
            return self.exchange(text)
        except (kivi.NotFound, kivi.Unavailable):
            print("[the service was restarted; going on]")
            self.client.wait_ready(60)
            self.session.reopen()
            del self.ids[min(start, self.session.length):]
            return self.exchange(text)

    def exchange(self, text: str) -> str:
        ids = self.ids + self.tokenizer.encode(text + "\n", add_special_tokens=False)
        prompt = torch.tensor([ids])
        cache = kivi.hf.RemoteCache(self.model.config, self.session)
        out = self.model.generate(prompt, attention_mask=torch.ones_like(prompt),
                                  past_key_values=cache, max_new_tokens=40, do_sample=False)
        self.session.commit()
        # The newest token has been chosen, but its K and V are not in the cache yet.
        self.ids = out[0].tolist()[:self.session.lengths[0]]
        self.log.write_text(" ".join(map(str, self.ids)))
        return self.tokenizer.decode(out[0, prompt.shape[1]:], skip_special_tokens=True)


def main() -> None:
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    chat = Chat(sys.argv[1], sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else "chat")
    print(f"[{chat.session.length} tokens remembered]")
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            line = ""
        if not line:
            chat.session.close()
            return
        print(chat.turn(line))


if __name__ == "__main__":
    main()
