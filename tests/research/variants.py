# SPDX-License-Identifier: Apache-2.0
"""Codecs to try: what a page of keys and values would come back as, simulated in floating point.

A codec is a preset and what is changed about it: "kivi2,feedback=full,damp=0.5". Codec.bits() counts what
its page would take, metadata included; seal() gives K and V as a reader of that page would see them. The
presets here follow kernels/page.h up to rounding (the page decides in integers, this file in binary32).

kernels/CODECS.md defines every variant in a formula and holds the figures. In shapes, N stands for any
leading dims (layers, sequences, heads of one codec call are quantized together), T for 128 tokens, D for
the channels of a head.
"""

import dataclasses
import itertools

import torch

T = 128  # tokens of a page

# Widths of the four quarters of the slots, by their average.
MIXES = {
    3.0: [(4, 4, 4, 0), (4, 4, 2, 2)],
    2.5: [(4, 4, 2, 0), (4, 4, 1, 1), (4, 2, 2, 2)],
    2.0: [(4, 4, 0, 0), (4, 2, 2, 0), (4, 2, 1, 1), (2, 2, 2, 2)],
    1.75: [(4, 2, 1, 0), (4, 1, 1, 1), (2, 2, 2, 1)],
    1.5: [(4, 2, 0, 0), (4, 1, 1, 0), (2, 2, 2, 0), (2, 2, 1, 1)],
    1.25: [(4, 1, 0, 0), (2, 2, 1, 0), (2, 1, 1, 1)],
    1.0: [(4, 0, 0, 0), (2, 2, 0, 0), (2, 1, 1, 0), (1, 1, 1, 1)],
    0.5: [(2, 0, 0, 0), (1, 1, 0, 0)],
}
CANDIDATES = {4: (0, .16), 16: (0, .08, .16, .24), 64: (0, .04, .08, .12, .16, .2, .24, .28)}


@dataclasses.dataclass
class Codec:
    """One codec. Widths are averages; the *_bits below are those of one metadata item."""
    name: str = ""
    key: float = 2.0
    value: float = 2.0
    rotate: bool = False       # Hadamard on values
    minmax: int = 0            # group of the published algorithm; most of what follows is ignored then
    energy: bool = True        # weigh key channels by query energy
    keep: float = 0.9          # what 32 rows leave of the running means of q; 1: all count alike
    scope: str = "head"        # who shares the budget of key widths: head, page (layer), block
    ranges: int = 16           # candidate ranges of a group
    feedback: str = "none"     # metric of key rounding: none, mean, full
    start: str = "round"       # codes before the sweeps: round, solve (GPTQ's way)
    sweeps: int = 1            # coordinate descent over the channels
    damp: float = 0.0          # share taken off the metric's off-diagonal
    refit: bool = False        # scales and zeros once more after such codes
    tokens: str = "none"       # weigh tokens in key ranges by attention mass: none, mass
    widths: str = "flat"       # value widths by token: flat, norm, mass, both
    metric: str = "none"       # value rounding against the output projection: none, output
    value_damp: float = 0.0    # as damp
    order_bits: int = 8
    key_scale: int = 8
    key_zero: int = 16
    value_mean: int = 16
    value_scale: int = 8
    value_zero: int = 8
    sink: int = 128            # first tokens kept exact
    window: int = 128          # newest tokens kept exact, at least
    ends: int = 16             # bits of these exact tokens

    def bits(self, D):
        """Bits per element of a page with head_dim D."""
        if self.minmax:
            return (self.key + self.value) / 2 + 32 / self.minmax
        key = self.key + (self.order_bits + self.key_scale + self.key_zero) / T
        value = self.value + self.value_mean / T + (self.value_scale + self.value_zero) / D
        value += 0 if self.widths == "flat" else self.order_bits / D
        return (key + value) / 2

    def held(self, D, length):
        """Bits per element of a whole context of that many tokens, exact ends counted."""
        sealed = max(0, (length - self.window) // T * T - self.sink)
        ends = 16 if self.ends == 16 else self.ends + 16 / D
        return (sealed * self.bits(D) + (length - sealed) * ends) / length


PRESETS = {
    "kivi2-paper": Codec(minmax=32, sink=0),
    "kivi2.5": Codec(key=2.5),
    "kivi2": Codec(),
    "kivi1.75": Codec(value=1, rotate=True),
    "kivi1.5": Codec(key=1.5, value=1, rotate=True),
}


def parse(spec):
    """"preset,field=value,..." -> Codec."""
    preset, *changes = spec.split(",")
    kinds = {f.name: type(f.default) for f in dataclasses.fields(Codec)}
    made = {"name": spec}
    for change in changes:
        field, value = change.split("=")
        made[field] = value == "1" if kinds[field] is bool else kinds[field](value)
    return dataclasses.replace(PRESETS[preset], **made)


# ---- parts --------------------------------------------------------------------------------------------

def half(x):
    return x.half().float()


def hadamard(D, device):
    """The normalised Walsh-Hadamard matrix of the largest power of two in D, repeated."""
    block = torch.ones(1, 1, device=device)
    while D % (2 * len(block)) == 0:
        block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)])
    return torch.block_diag(*[block / len(block) ** .5] * (D // len(block)))


def fit(x, bits, candidates, weight=None):
    """Unbiased ranges. x [N, groups, n] -> codes like x; scale, mean, error [N, groups, 1]. Of all candidate
    ranges the one with the least squared error, after x^ regressed on x has been given slope one."""
    weight = torch.ones_like(x[..., :1]) if weight is None else weight / weight.mean(-1, keepdim=True)
    average = lambda z: (z * weight).mean(-1, keepdim=True)
    mean = average(x)
    y = x - mean
    power = average(y * y).clamp_min(1e-14)
    low, span = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)
    best = None
    shares = [(0, 0)] if bits == 1 else itertools.product(CANDIDATES[candidates], repeat=2)
    for a, b in shares:
        if bits == 1:
            code = (y > 0).float()
        else:
            top = 2 ** bits - 1
            code = ((x - low - a * span) * (top / ((1 - a - b) * span).clamp_min(1e-8))).round().clamp(0, top)
        c = code - average(code)
        scale = power / average(c * y).clamp_min(1e-14)
        error = average((scale * c - y).square())
        if best is None:
            best = [error, scale, code]
        else:
            best = [torch.where(error < best[0], new, old) for new, old in zip((error, scale, code), best)]
    error, scale, code = best
    return code, scale * (span > 1e-8), mean, error


def store_scale(scale, bits, dims):
    """Scales as the page keeps them: e4m3 (8 bits) or steps of 2^(1/3) (4 bits) under one fp16 factor."""
    factor = half(scale.amax(dims, keepdim=True).clamp_min(1e-8))
    if bits == 4:
        return factor * torch.exp2(-(-3 * torch.log2((scale / factor).clamp_min(1e-9))).round().clamp(0, 15) / 3)
    return ((scale / factor * 448).to(torch.float8_e4m3fn).float() * factor / 448).clamp_min(1e-8)


def store_zero(zero, scale, bits, top):
    """Zeros: fp16, or an offset from -top/2 scales in quarters (8 bits) or eighths (4) of one, or none (0)."""
    if bits == 16:
        return half(zero)
    if bits == 0:
        return -scale * top / 2
    if bits == 8:
        return (zero / (scale / 4)).round().clamp(-128, 127) * (scale / 4)
    return ((zero + scale * top / 2) / (scale / 8)).round().clamp(-8, 7) * (scale / 8) - scale * top / 2


def choose(chunked, average):
    """Mixes under a budget. chunked {width: [R, N, 4]}: errors of the quarters of R records that share it;
    average: the width they may have. -> widths [R, N, 4] with the least sum of errors: one record takes the
    best mix of that average; more share it out in half bits, exactly, by dynamic programming."""
    first = next(iter(chunked.values()))
    records = len(first)
    levels = [average] if records == 1 else [b for b in (0.5, 1.0, 1.5, 2.0, 2.5, 3.0) if b <= average + 1]
    cost, widths = [], []
    for level in levels:
        costs = torch.stack([sum(chunked[w][..., i] for i, w in enumerate(mix)) for mix in MIXES[level]], -1)
        least = costs.min(-1)
        cost.append(least.values)
        widths.append(torch.tensor(MIXES[level], device=first.device)[least.indices])
    budget = round(records * (average - levels[0]) / 0.5)   # half bits above the narrowest
    least = torch.full((budget + 1, *first.shape[1:-1]), torch.inf, device=first.device)
    least[0] = 0
    taken = []
    for record in range(records):
        ways = torch.stack([torch.cat([torch.full_like(least[:i], torch.inf), least[:budget + 1 - i]])
                            + cost[i][record] for i in range(min(len(levels), budget + 1))])
        least, level = ways.min(0)
        taken.append(level)
    at, left = [None] * records, torch.full_like(taken[0][:1], budget)
    for record in reversed(range(records)):
        at[record] = taken[record].gather(0, left)
        left = left - at[record]
    at = torch.cat(at)
    return torch.stack(widths, -2).gather(-2, at[..., None, None].expand(*at.shape, 1, 4))[..., 0, :]


def feed_back(x, code, scale, zero, top, metric, order, start, sweeps):
    """Codes that care for their neighbours' errors: lowers the sum over rows of e M e', e = x^ - x.

    x, code [N, rows, n]; scale, zero, top [N, 1, n]; metric M [N, n, n]; order [N, n]: the columns in turn.
    A sweep moves one column at a time to the code next to its best value, all others fixed:
    x^_c - (e M)_c / M_cc. start "solve" makes the first pass GPTQ's way: columns not yet visited count as
    free real numbers, so that a column answers only for what they cannot mend."""
    move = lambda z: z.gather(-1, order[..., None, :].expand(*z.shape[:-1], z.shape[-1]))
    back = order[..., None, :].expand_as(x)
    x, code, scale, zero, top = move(x), move(code), move(scale), move(zero), move(top)
    metric = move(move(metric).transpose(-1, -2)).transpose(-1, -2)
    nearest = lambda c, want: torch.minimum(
        ((want - zero[..., c]) / scale[..., c].clamp_min(1e-12)).round().clamp_min(0), top[..., c])
    if start == "solve":
        level = metric.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None].clamp_min(1e-12)
        metric = metric + 0.01 * level * torch.eye(x.shape[-1], device=x.device)
        upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(metric)), upper=True)
        want = x.clone()
        for c in range(x.shape[-1]):
            code[..., c] = nearest(c, want[..., c])
            miss = (want[..., c] - code[..., c] * scale[..., c] - zero[..., c]) / upper[..., c, c, None]
            want[..., c + 1:] -= miss[..., None] * upper[..., c, None, c + 1:]
    pull = (code * scale + zero - x) @ metric if sweeps else None
    for _ in range(sweeps):
        for c in range(x.shape[-1]):
            here = code[..., c] * scale[..., c] + zero[..., c]
            new = nearest(c, here - pull[..., c] / metric[..., c, c, None].clamp_min(1e-12))
            pull += ((new - code[..., c]) * scale[..., c])[..., None] * metric[..., c, None, :]
            code[..., c] = new
    return torch.empty_like(code).scatter_(-1, back, code)


def unbias(x, code, scale, zero, dim, bits):
    """Slope one and the mean kept, again, for codes that have moved. -> scale, zero; untouched where the codes
    say nothing about x."""
    y, c = x - x.mean(dim, keepdim=True), code - code.mean(dim, keepdim=True)
    along = (c * y).sum(dim, keepdim=True)
    told = (along > 0) & (scale > 1e-8)
    new = torch.where(told, y.square().sum(dim, keepdim=True) / along.clamp_min(1e-12), scale)
    new = torch.where(told, store_scale(new.clamp_max(4 * scale), bits, (-2, -1)), scale)
    return new, torch.where(told, half(x.mean(dim, keepdim=True) - new * code.mean(dim, keepdim=True)), zero)


# ---- pages --------------------------------------------------------------------------------------------

@dataclasses.dataclass
class Seen:
    """What the service has seen of a page's surroundings when it seals it; [N, ..] as K is.

    moment [N, D, D]: running mean of q' q over the query rows of the KV head; mean [N, D]: of q.
    mass, mass2 [N, T]: attention weight and its square that each token has had so far, summed over rows.
    output [N, D, D]: Gram matrix of the output projection, or None."""
    moment: torch.Tensor
    mean: torch.Tensor
    mass: torch.Tensor
    mass2: torch.Tensor
    output: torch.Tensor


def by_width(x, widths, codec, average, weight, scope, scale_bits, zero_bits, tokens=None):
    """Groups of x [L, B, H, n, m] (the last dim a group) get widths in four quarters of falling importance.
    -> code, scale, zero, top, each [L, B, H, n, m or 1]."""
    fits = {w: fit(x, w, codec.ranges, tokens) for w in widths if w}
    any_fit = next(iter(fits.values()))
    mean = any_fit[2]
    spread = (x - mean).square().mean(-1)
    error = {w: f[3][..., 0] * weight for w, f in fits.items()}
    error[0] = spread * weight
    order = (spread * weight).argsort(-1, descending=True)
    n = x.shape[-2]
    chunked = {w: e.gather(-1, order).unflatten(-1, (4, n // 4)).sum(-1) for w, e in error.items()}
    if scope == "head":
        chosen = choose({w: e[None] for w, e in chunked.items()}, average)[0]
    elif scope == "page":
        chosen = choose({w: e.movedim(2, 0) for w, e in chunked.items()}, average).movedim(0, 2)
    else:
        flat = {w: e.movedim(1, 2).flatten(0, 1) for w, e in chunked.items()}
        chosen = choose(flat, average).unflatten(0, (x.shape[0], x.shape[2])).movedim(2, 1)
    width = torch.empty_like(order).scatter_(-1, order, chosen.repeat_interleave(n // 4, -1))[..., None]
    pick = lambda i, none: sum(torch.where(width == w, f[i], 0) for w, f in fits.items()) + torch.where(
        width == 0, none, 0)
    code, top = pick(0, 0.0), (torch.exp2(width.float()) - 1)
    scale = store_scale(pick(1, 0.0), scale_bits, (-2, -1)) * (width > 0)
    if scale_bits < 8:   # coarse scales want their own codes; one bit has no choice
        again = ((x - mean + scale * code.mean(-1, keepdim=True)) / scale.clamp_min(1e-8)).round()
        code = torch.where(width > 1, torch.minimum(again.clamp_min(0), top), code)
    zero = mean - scale * code.mean(-1, keepdim=True)
    zero = torch.where(width > 0, store_zero(zero, scale.clamp_min(1e-8), zero_bits, top), half(mean))
    return code, scale, zero, top


def keys(codec, k, seen):
    """k [L, B, H, T, D] -> k^."""
    energy = seen.moment.diagonal(dim1=-2, dim2=-1) if codec.energy else torch.ones_like(k[..., 0, :])
    widths = sorted({w for mixes in MIXES.values() for mix in mixes for w in mix})
    tokens = None
    if codec.tokens == "mass":
        tokens = (seen.mass / seen.mass.mean(-1, keepdim=True) + 0.5)[..., None, :]
    code, scale, zero, top = by_width(k.transpose(-1, -2), widths, codec, codec.key, energy, codec.scope,
                                      codec.key_scale, codec.key_zero, tokens)
    code, scale, zero, top = (z.transpose(-1, -2) for z in (code, scale, zero, top))
    if codec.feedback != "none":
        metric = seen.moment if codec.feedback == "full" else seen.mean[..., None] * seen.mean[..., None, :]
        diagonal = torch.diag_embed(seen.moment.diagonal(dim1=-2, dim2=-1))
        metric = (1 - codec.damp) * metric
        metric = metric - torch.diag_embed(metric.diagonal(dim1=-2, dim2=-1)) + diagonal
        # Narrow channels first, so that wide ones can pay for them; of equal width the least important first.
        importance = (energy * k.var(-2)).argsort(-1).argsort(-1)
        order = (top[..., 0, :] * k.shape[-1] + importance).argsort(-1)
        code = feed_back(k, code.contiguous(), scale, zero, top, metric, order, codec.start, codec.sweeps)
        if codec.refit:
            scale, zero = unbias(k, code, scale, zero, -2, codec.key_scale)
    return code * scale + zero


def values(codec, v, seen):
    """v [L, B, H, T, D] -> v^."""
    turn = hadamard(v.shape[-1], v.device)
    mean = v.mean(-2, keepdim=True)
    step = mean.abs().amax(-1, keepdim=True).clamp_min(1e-9) / 127
    mean = half(mean) if codec.value_mean == 16 else (mean / step).round() * step
    y = (v - mean) @ turn if codec.rotate else v - mean
    if codec.widths == "flat":
        top = torch.tensor(2.0 ** codec.value - 1, device=v.device)
        code, scale, group_mean, _ = fit(y, int(codec.value), codec.ranges)
        scale = store_scale(scale, codec.value_scale, (-2, -1))
        if codec.value_scale < 8 and codec.value > 1:
            code = ((y - group_mean) / scale + code.mean(-1, keepdim=True)).round().clamp_min(0).minimum(top)
        zero = store_zero(group_mean - scale * code.mean(-1, keepdim=True), scale, codec.value_zero, top)
        top = top.expand_as(scale)
    else:
        weight = torch.ones_like(v[..., 0])
        if codec.widths == "mass":
            weight = seen.mass2 / seen.mass2.mean(-1, keepdim=True) + 0.1
        elif codec.widths == "both":
            weight = seen.mass / seen.mass.mean(-1, keepdim=True) + 0.1
        widths = sorted({w for mix in MIXES[codec.value] for w in mix})
        code, scale, zero, top = by_width(y, widths, codec, codec.value, weight, "head",
                                          codec.value_scale, codec.value_zero)
    if codec.metric == "output":
        metric = seen.output
        if codec.rotate:
            metric = turn.T @ metric @ turn
        diagonal = torch.diag_embed(metric.diagonal(dim1=-2, dim2=-1))
        metric = (1 - codec.value_damp) * metric + codec.value_damp * diagonal
        each = lambda z: z.expand(*z.shape[:-1], y.shape[-1])
        order = torch.arange(y.shape[-1], device=v.device).expand(*y.shape[:-2], -1)
        code = feed_back(y, code.contiguous(), each(scale), each(zero), each(top),
                         metric.expand(*y.shape[:-2], -1, -1), order, codec.start, codec.sweeps)
        if codec.refit:
            scale, _ = unbias(y, code, scale, zero, -1, codec.value_scale)
            zero = y.mean(-1, keepdim=True) - scale * code.mean(-1, keepdim=True)
            zero = store_zero(zero, scale, codec.value_zero, top)
    y = code * scale + zero
    return (y @ turn.T if codec.rotate else y) + mean


def published(x, bits, group):
    """KIVI as published, groups along the last dim: min-max, fp16 scale and minimum."""
    y = x.unflatten(-1, (-1, group))
    low, span = y.amin(-1, keepdim=True), y.amax(-1, keepdim=True) - y.amin(-1, keepdim=True)
    scale, low = half(span / (2 ** bits - 1)).clamp_min(1e-8), half(low)
    return (((y - low) / scale).round().clamp(0, 2 ** bits - 1) * scale + low).flatten(-2)


def seal(codec, k, v, seen):
    """One page of every record: k, v [L, B, H, T, D] -> k^, v^."""
    if codec.minmax:
        k = published(k.transpose(-1, -2), int(codec.key), codec.minmax).transpose(-1, -2)
        return k, published(v, int(codec.value), codec.minmax)
    return keys(codec, k, seen), values(codec, v, seen)


def exact(codec, x):
    """Tokens at either end: unchanged, or at 8 bits with a scale per token and head."""
    if codec.ends == 16:
        return x
    step = half(x.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-8)
    return (x / step).round() * step
