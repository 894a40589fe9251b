#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What a codec idea does to a language model, before anybody writes it in C.

    measure.py --model DIR --text FILE --codec kivi2 --codec kivi2,feedback=full,damp=0.5 [--windows 96]

DIR is any directory of a causal language model with full attention that transformers loads. The text goes
through it on the decode path, 32 tokens at a time: every token attends to what the codec (variants.py) has
left of the tokens before it. The reference is the same loop on an exact cache. A row has

    page    bits per element of a sealed page, metadata counted
    held    the same over the whole context, exact ends counted
    KL      of the codec's next-token distribution from the reference's, nats per token, +- its standard
            error over windows; rows of one run see the same windows, so they differ by much less than that
    ratio   perplexity / the reference's;   top-1: how often the first choice agrees
    needle  with --needle N: 5-digit numbers found again in N tokens (for models that can)

Nothing is random but the questions of the needle, whose seed is printed. Needs torch and transformers; a GPU
makes a row seconds, a CPU minutes.
"""

import argparse
import math
import pathlib
import sys
import time

import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import Cache, CacheLayerMixin

import variants

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "clients/python/src/kivi/eval"))
import needle  # noqa: E402

CHUNK = 32       # tokens of one forward pass, and of one step of the running means
NEEDLE_SEED = 5


class Layer(CacheLayerMixin):
    """K and V of one layer [B, H, length, D], and what attention has seen of them."""

    is_sliding = False

    def __init__(self, cache):
        super().__init__()
        self.cache, self.seen, self.is_initialized = cache, 0, True
        self.k = self.v = self.moment = self.mean = None
        self.steps = 0

    def lazy_initialization(self, *states):
        pass

    def get_mask_sizes(self, query_length):
        return self.seen + (query_length if isinstance(query_length, int) else len(query_length)), 0

    def get_seq_length(self):
        return self.seen

    def get_max_length(self):
        return self.cache.length

    def update(self, k, v, *args, **kwargs):
        if self.k is None:
            shape = (*k.shape[:2], self.cache.length, k.shape[3])
            self.k, self.v = k.new_zeros(shape), v.new_zeros(shape)
            self.mass, self.mass2 = k.new_zeros(shape[:3]), k.new_zeros(shape[:3])
        new = slice(self.seen, self.seen + k.shape[2])
        self.seen = new.stop
        exact = self.cache.exact
        self.k[:, :, new], self.v[:, :, new] = exact(variants.half(k)), exact(variants.half(v))
        held = self.k[:, :, :self.seen]
        held.layer = self  # how attend() finds it
        return held, self.v[:, :, :self.seen]

    def attend(self, q, k, v, scaling):
        """q [B, Hq, n, D] -> [B, n, Hq, D]; its rows are the newest tokens."""
        n, heads = q.shape[2], k.shape[1]
        rows = q.unflatten(1, (heads, -1)).flatten(2, 3)                  # [B, H, group n, D]
        scores = (rows * scaling) @ k.transpose(-1, -2)
        later = torch.ones(n, k.shape[2], dtype=torch.bool, device=q.device).triu(k.shape[2] - n + 1)
        p = scores.masked_fill_(later.repeat(scores.shape[2] // n, 1), -torch.inf).softmax(-1)
        out = (p @ v).unflatten(2, (-1, n)).flatten(1, 2).transpose(1, 2)
        if self.cache.codec is not None:
            self.mass[..., :self.seen] += p.sum(-2)
            self.mass2[..., :self.seen] += p.square_().sum(-2)
            moment, mean = rows.transpose(-1, -2) @ rows / rows.shape[2], rows.mean(2)
            self.steps += 1
            new = max(1 - self.cache.codec.keep, 1 / self.steps)
            self.moment = torch.lerp(self.moment, moment, new) if self.steps > 1 else moment
            self.mean = torch.lerp(self.mean, mean, new) if self.steps > 1 else mean
        return out


class Codecache(Cache):
    """A cache whose older pages are what the codec left of them. codec None: exact."""

    def __init__(self, model, codec, coded, length):
        layers = model.config.get_text_config().num_hidden_layers
        super().__init__(layers=[Layer(self) for _ in range(layers)])
        self.codec, self.coded, self.length, self.sealed = codec, coded, length, 0
        self.output = output_grams(model) if codec is not None and codec.metric == "output" else None
        self.exact = (lambda x: x) if codec is None else (lambda x: variants.exact(codec, x))

    def seal(self):
        """Seals what has left the window, in all coded layers at once (no layer looks at another's)."""
        while self.codec is not None and self.sealed + variants.T <= self.layers[0].seen - self.codec.window:
            page = slice(self.sealed, self.sealed + variants.T)
            kept = min(max(0, self.codec.sink - self.sealed), variants.T)
            self.sealed = page.stop
            if kept < variants.T:
                self.seal_page(page, kept)

    def seal_page(self, page, kept):
        """The first `kept` tokens stay exact and are in nobody's way: the others' mean stands for them."""
        layers = [self.layers[i] for i in self.coded]
        gather = lambda name: torch.stack([getattr(layer, name) for layer in layers])
        part = lambda name: torch.stack([getattr(layer, name)[:, :, page] for layer in layers])
        seen = variants.Seen(gather("moment"), gather("mean"), part("mass"), part("mass2"),
                             None if self.output is None else self.output[self.coded][:, None])
        k, v = part("k"), part("v")
        for x in (k, v):
            x[..., :kept, :] = x[..., kept:, :].mean(-2, keepdim=True)
        k, v = variants.seal(self.codec, k, v, seen)
        rest = slice(page.start + kept, page.stop)
        for i, layer in enumerate(layers):
            layer.k[:, :, rest], layer.v[:, :, rest] = k[i, :, :, kept:], v[i, :, :, kept:]


def output_grams(model):
    """[layers, H, D, D]: per KV head, the sum over its query heads of W'W, W the head's columns of o_proj."""
    config = model.config.get_text_config()
    grams = []
    for layer in model.base_model.layers:
        w = layer.self_attn.o_proj.weight.unflatten(1, (config.num_key_value_heads, -1, layer.self_attn.head_dim))
        grams.append(torch.einsum("ohgc,ohgd->hcd", w, w))
    return torch.stack(grams)


def register():
    AttentionInterface.register("research", lambda module, q, k, v, mask, scaling=None, **_: (
        k.layer.attend(q, k, v, scaling or q.shape[-1] ** -.5), None))
    AttentionMaskInterface.register("research", lambda *args, **kwargs: None)


@torch.no_grad()
def run(model, ids, codec, coded):
    """ids [B, length] -> the last hidden states [B, length, hidden]."""
    cache, out = Codecache(model, codec, coded, ids.shape[1]), []
    for at in range(0, ids.shape[1], CHUNK):
        chunk = ids[:, at:at + CHUNK]
        places = torch.arange(at, at + chunk.shape[1], device=ids.device).expand(len(ids), -1)
        out.append(model.base_model(input_ids=chunk, position_ids=places, past_key_values=cache,
                                    use_cache=True).last_hidden_state)
        cache.seal()
    return torch.cat(out, 1)


@torch.no_grad()
def compare(model, states, truth, ids):
    """Per window: [nll, KL, agreements]."""
    head, sums = model.get_output_embeddings(), []
    for state, exact, row in zip(states, truth, ids):
        p, r = head(state[:-1]).log_softmax(-1), head(exact[:-1]).log_softmax(-1)
        sums.append(torch.stack([-p.gather(-1, row[1:, None]).mean(), (r.exp() * (r - p)).sum(-1).mean(),
                                 (p.argmax(-1) == r.argmax(-1)).float().mean()]))
    return torch.stack(sums)


@torch.no_grad()
def found(model, states, rows):
    head, right = model.get_output_embeddings(), 0
    for state, row in zip(states, rows):
        for first, n in row.answers:
            guess = head(state[first - 1:first - 1 + n]).argmax(-1).tolist()
            right += guess == row.ids[first:first + n]
    return right


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--codec", action="append", default=[], help="preset,field=value,... (variants.py)")
    parser.add_argument("--codecs", type=pathlib.Path, help="a file of them, one a line")
    parser.add_argument("--windows", type=int, default=96)
    parser.add_argument("--skip", type=int, default=0, help="windows left out at the text's start")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--layers", default="", help="coded layers, as 0-3 (default: all); others stay exact")
    parser.add_argument("--needle", type=int, default=0, metavar="TOKENS")
    parser.add_argument("--questions", type=int, default=256)
    parser.add_argument("--batch", type=int, default=96)
    return parser.parse_args()


def main():
    args = parse()
    specs = args.codec + (args.codecs.read_text().split() if args.codecs else [])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    register()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval().to(device)
    model.set_attn_implementation("research")
    config = model.config.get_text_config()
    D = model.base_model.layers[0].self_attn.head_dim
    first, _, last = args.layers.partition("-")
    coded = list(range(int(first or 0), int(last or first or config.num_hidden_layers - 1) + 1))
    text = tokenizer.encode(pathlib.Path(args.text).read_text(errors="replace"), add_special_tokens=False)
    text = text[args.skip * args.length:]
    windows = min(args.windows, len(text) // args.length)
    ids = torch.tensor(text[:windows * args.length], device=device).view(-1, args.length)
    asked = needle.rows(tokenizer, text, args.questions // needle.QUESTIONS, args.needle,
                        NEEDLE_SEED) if args.needle else []
    print(f"# {pathlib.Path(args.model).name}, {pathlib.Path(args.text).name}: windows {args.skip}.."
          f"{args.skip + windows} of {args.length} tokens, layers {coded[0]}..{coded[-1]} coded, head_dim {D}; needle {args.needle} tokens, "
          f"{len(asked) * needle.QUESTIONS} questions, seed {NEEDLE_SEED}; {device}", flush=True)
    truth, base = [], 0.0
    for spec in [None] + specs:
        began = time.time()
        codec = variants.parse(spec) if spec else None
        sums = []
        for i, part in enumerate(ids.split(args.batch)):
            states = run(model, part, codec, coded)
            truth += [states] if codec is None else []
            sums.append(compare(model, states, truth[i], part))
        sums = torch.cat(sums)
        nll, kl, same = sums.mean(0).tolist()
        base = base if spec else nll
        error = (sums[:, 1].std() / len(sums) ** .5).item() if len(sums) > 1 else math.nan
        right = 0
        for i in range(0, len(asked), args.batch):
            rows = asked[i:i + args.batch]
            right += found(model, run(model, torch.tensor([r.ids for r in rows], device=device), codec, coded), rows)
        score = f"{right / (len(asked) * needle.QUESTIONS):.3f}" if asked else "-"
        page, held = (codec.bits(D), codec.held(D, args.length)) if codec else (16, 16)
        what = spec or f"exact: perplexity {math.exp(nll):.3f}"
        print(f"page {page:6.3f}  held {held:5.2f}  KL {kl:.5f} +-{error:.5f}  "
              f"ratio {math.exp(nll - base):.4f}  "
              f"top-1 {same:.4f}  needle {score}  {time.time() - began:5.1f} s  {what}", flush=True)


if __name__ == "__main__":
    main()
