#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Computes packed pages from 16-bit elements, independently of the C code.

    make_vectors.py            writes page_vectors.bin beside itself
    make_vectors.py --check    compares with what stands there, writes nothing

Written from the prose of kernels/page.h alone, in plain Python: binary32 is Python's binary64 rounded
by struct after every operation (innocuous for + - * / of binary32 values, because 53 >= 2 * 24 + 2),
sums called exact are Python integers, 16-bit and e4m3 rounding search the two neighbours with exact
fractions. It is slow and meant to be; tests/kernels/vectors_test.c holds the scalar backend to its
output byte for byte.

Input elements come from the formula in `elements`, which vectors_test.c repeats, so that the file holds
results only. File, little endian: "KVVEC001", then per case

    u32 bytes of the name, name    for messages; vectors_test.c knows the cases by it
    u32 bytes of the page, page    one packed page
"""

import math
import pathlib
import struct
import sys
from fractions import Fraction

T = 128


# ---- binary32, binary16, bfloat16, e4m3 ---------------------------------------------------------

def f32(x):
    return struct.unpack("<f", struct.pack("<f", x))[0]


def f32_of_integer(i):
    """An exact integer to binary32, in one rounding; Python's own would round twice."""
    if abs(i) < 1 << 53:
        return f32(float(i))
    shift = abs(i).bit_length() - 24
    quotient, rest = divmod(abs(i), 1 << shift)
    half = 1 << shift - 1
    quotient += rest > half or (rest == half and quotient & 1)
    return math.copysign(float(quotient << shift), i)


def nearest(x, bits, values):
    """The bit pattern whose value is nearest to x >= 0, ties to the even pattern; saturates.
    values[pattern] rises with pattern."""
    low, high = 0, len(values) - 1
    if x >= values[high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if values[middle] <= x:
            low = middle
        else:
            high = middle
    below, above = Fraction(x) - Fraction(values[low]), Fraction(values[high]) - Fraction(x)
    if below == above:
        return low if low % 2 == 0 else high
    return low if below < above else high


def small_float(pattern, exponent_bits, fraction_bits, bias):
    exponent, fraction = pattern >> fraction_bits, pattern & (1 << fraction_bits) - 1
    if exponent == 0:
        return math.ldexp(fraction, 1 - bias - fraction_bits)
    return math.ldexp((1 << fraction_bits) + fraction, exponent - bias - fraction_bits)


F16 = [small_float(p, 5, 10, 15) for p in range(0x7c00)]
BF16 = [small_float(p, 8, 7, 127) for p in range(0x7f80)]
E4M3 = [small_float(p, 4, 3, 7) for p in range(0x7f)]


def to_small(x, values):
    pattern = nearest(abs(x), 16, values)
    return pattern | (0x8000 if math.copysign(1, x) < 0 else 0)


def of_small(pattern, values):
    return math.copysign(values[pattern & 0x7fff], -1 if pattern & 0x8000 else 1)


def f16_bits(x):
    return to_small(x, F16)


def f16(x):
    return of_small(f16_bits(x), F16)


def rint(x):
    """To an integer, ties to even: what round() does."""
    return round(x)


# ---- the group rule -------------------------------------------------------------------------------

SHARES = [0.0, 0.08, 0.16, 0.24]
OFFSETS = [0, 164, 328, 491]


def step(width, a, b):
    return f16(((1 << width) - 1) / ((1 - SHARES[a] - SHARES[b]) * 2047))


class Group:
    def __init__(self, x):
        self.n = len(x)
        self.low = f32(min(x) + 0.0)
        span = f32(max(x) - self.low)
        self.constant = span <= f32(1e-8)
        self.unit, self.mean, self.power, self.u = 0.0, self.low, 0, [0] * self.n
        if self.constant:
            return
        per = f32(2047 / span)
        self.u = [rint(f32(f32(v - self.low) * per)) for v in x]
        self.unit = f32(span / 2047)
        self.total = sum(self.u)
        self.power = self.n * sum(u * u for u in self.u) - self.total ** 2
        share = f32(f32_of_integer(self.total) / float(self.n))
        self.mean = f32(self.low + f32(share * self.unit))

    def candidates(self, width):
        if width == 1:
            yield [1 if self.n * u > self.total else 0 for u in self.u]
            return
        top = (1 << width) - 1
        for a in range(4):
            for b in range(4):
                m = step(width, a, b)
                yield [min(max(rint((u - OFFSETS[a]) * m), 0), top) for u in self.u]

    def choose(self, width):
        """codes, s, e, SC"""
        if self.constant:
            return [0] * self.n, 0.0, 0.0, 0
        best = None
        for codes in self.candidates(width):
            sc = sum(codes)
            covariance = self.n * sum(c * u for c, u in zip(codes, self.u)) - sc * self.total
            variance = self.n * sum(c * c for c in codes) - sc * sc
            if variance == 0 or covariance <= 0:
                continue
            x = f32_of_integer(covariance)
            merit = f32(f32(x * x) / f32_of_integer(variance))
            if best is None or merit > best[0]:
                best = merit, x, codes, sc
        merit, x, codes, sc = best
        power = f32_of_integer(self.power)
        s = f32(f32(power / x) * self.unit)
        e = f32(power * f32(f32(power / merit) - 1))
        return codes, s, e, sc


def page_scales(scales):
    """factor (bits), stored e4m3, what the reader will have"""
    factor = f16_bits(max(scales, default=0.0))
    if factor == 0:
        return 0, [0] * len(scales), [0.0] * len(scales)
    each = f32(of_small(factor, F16) / 448)
    stored = [nearest(f32(s / each), 8, E4M3) for s in scales]
    return factor, stored, [f32(E4M3[p] * each) for p in stored]


# ---- order of codes ---------------------------------------------------------------------------------

class Codes:
    """Writes codes into the order of page.h, one at a time."""

    def __init__(self, count_bytes):
        self.bytes = bytearray(count_bytes)

    def tile_byte(self, k, m_value, k_value):
        g, r = m_value % 8, m_value // 8
        h, t, byte = k_value // 16, k_value % 16 // 4, k_value % 4
        word = {32: (4 * g + t) * 4 + 2 * h + r, 16: (4 * g + t) * 2 + r, 8: (2 * g + t) * 2 + r}[k]
        return 4 * word + byte

    def put(self, start, k, width, tile, m_value, k_value, code):
        per_byte = 8 // width
        unit, position = tile // per_byte, tile % per_byte
        at = start + unit * 16 * k + self.tile_byte(k, m_value, k_value)
        self.bytes[at] |= code << (width * position)


ROW_TOKEN = [4 * ((m & 7) >> 1) + 2 * (m >> 3) + (m & 1) for m in range(16)]
CHUNKS = {64: [16], 96: [16, 8], 128: [32], 256: [32, 32]}


def pack_keys(D, widths, codes):
    """codes[slot][token]"""
    out = Codes(4 * D * sum(widths))
    start = 0
    for q, width in enumerate(widths):
        if width == 0:
            continue
        slot = q * D // 4
        for k in CHUNKS[D]:
            for k_value in range(k):
                for tile in range(8):
                    for m in range(16):
                        code = codes[slot + k_value][16 * tile + ROW_TOKEN[m]]
                        out.put(start, k, width, tile, m, k_value, code)
            start += 8 * width // 8 * 16 * k
            slot += k
    return bytes(out.bytes)


def pack_values(D, width, codes):
    """codes[token][channel]"""
    out = Codes(16 * D * width)
    for token in range(T):
        for channel in range(D):
            tile = D // 16 * (token // 32) + channel // 16
            out.put(0, 32, width, tile, channel % 16, token % 32, codes[token][channel])
    return bytes(out.bytes)


# ---- UNBIASED -------------------------------------------------------------------------------------------

def unbiased_keys(k, D, mixes, energy):
    """k[token][channel] -> mix, factor, the parts' bytes"""
    groups = [Group([k[t][c] for t in range(T)]) for c in range(D)]
    weight = [f32(f32(g.unit * g.unit) * e) for g, e in zip(groups, energy)]
    power = [f32_of_integer(g.power) for g in groups]
    importance = [f32(p * w) for p, w in zip(power, weight)]
    order = sorted(range(D), key=lambda c: (-importance[c], c))

    widths = sorted({w for mix in mixes for w in mix} - {0})
    chosen = {w: [g.choose(w) for g in groups] for w in widths}
    error = {w: [f32(choice[2] * weight[c]) for c, choice in enumerate(chosen[w])] for w in widths}
    error[0] = importance

    def cost(mix):
        total = 0.0
        for slot, c in enumerate(order):
            total = f32(total + error[mix[slot // (D // 4)]][c])
        return total

    costs = [cost(mix) for mix in mixes]
    index = costs.index(min(costs))
    slot_width = [mixes[index][slot // (D // 4)] for slot in range(D)]
    pick = [chosen[w][c] if w else ([0] * T, 0.0, 0.0, 0) for w, c in zip(slot_width, order)]

    factor, stored, scales = page_scales([p[1] for p in pick])
    zeros = []
    for (codes, _, _, sc), s, w, c in zip(pick, scales, slot_width, order):
        mean = groups[c].mean
        zeros.append(f16_bits(f32(mean - f32(s * f32(sc / 128))) if w else mean))
    parts = bytes(order) + bytes(stored) + struct.pack("<%dH" % D, *zeros)
    return index, factor, parts + pack_keys(D, mixes[index], [p[0] for p in pick])


def rotate(y):
    D = len(y)
    n = D & -D
    y = list(y)
    stride = 1
    while stride < n:
        for c in range(D):
            if c & stride == 0:
                a, b = y[c], y[c + stride]
                y[c], y[c + stride] = f32(a + b), f32(a - b)
        stride *= 2
    norm = f32(1 / math.sqrt(n))
    return [f32(v * norm) for v in y]


def unbiased_values(v, D, width, rotated):
    means = []
    for c in range(D):
        part = [0.0] * 8
        for t in range(T):
            part[t % 8] = f32(part[t % 8] + v[t][c])
        pair = [f32(part[i] + part[i + 1]) for i in (0, 2, 4, 6)]
        total = f32(f32(pair[0] + pair[1]) + f32(pair[2] + pair[3]))
        means.append(f16_bits(f32(total / 128)))

    tokens = []
    for t in range(T):
        y = [f32(v[t][c] - of_small(means[c], F16)) for c in range(D)]
        group = Group(rotate(y) if rotated else y)
        codes, s, _, sc = group.choose(width)
        z = f32(group.mean - f32(s * f32(sc / D)))
        if s == 0 or abs(z) > f32(31 * s):
            codes, sc, s = [0] * D, 0, f32(abs(group.mean) / 31)
        tokens.append((group.mean, codes, s, sc))

    factor, stored, scales = page_scales([token[2] for token in tokens])
    zeros = []
    for (mean, _, _, sc), s in zip(tokens, scales):
        zero = 0
        if s != 0:
            quarters = f32(f32(mean - f32(s * f32(sc / D))) / f32(s / 4))
            zero = min(max(rint(quarters), -128), 127)
        zeros.append(zero)
    parts = struct.pack("<%dH" % D, *means) + bytes(stored) + struct.pack("<128b", *zeros)
    return factor, parts + pack_values(D, width, [token[1] for token in tokens])


def unbiased_record(k, v, D, codec, energy):
    mix, key_factor, keys = unbiased_keys(k, D, codec["mixes"], energy)
    value_factor, values = unbiased_values(v, D, codec["value_bits"], codec["rotated"])
    return struct.pack("<BBHH10x", mix, 0, key_factor, value_factor) + keys + values


# ---- MINMAX -----------------------------------------------------------------------------------------------

def minmax_group(x, top, values):
    """scale bits, min bits, codes"""
    def r(y):
        return of_small(to_small(y, values), values)

    low, high = f32(min(x) + 0.0), f32(max(x) + 0.0)
    scale_bits = to_small(f32(r(f32(high - low)) / top), values)
    scale = of_small(scale_bits, values)
    if scale == 0:
        codes = [0] * len(x)
    else:
        codes = [rint(min(max(r(f32(r(f32(y - low)) / scale)), 0), top)) for y in x]
    return scale_bits, to_small(low, values), codes


def minmax_record(k, v, D, codec, values):
    n = codec["group"]
    key_scale, key_min, key_codes = [], [], [[0] * T for _ in range(D)]
    for group in range(T // n):
        for c in range(D):
            x = [k[group * n + i][c] for i in range(n)]
            s, low, codes = minmax_group(x, (1 << codec["key_bits"]) - 1, values)
            key_scale.append(s)
            key_min.append(low)
            key_codes[c][group * n:(group + 1) * n] = codes
    value_scale, value_min, value_codes = [], [], [[0] * D for _ in range(T)]
    for group in range(D // n):
        for t in range(T):
            x = v[t][group * n:(group + 1) * n]
            s, low, codes = minmax_group(x, (1 << codec["value_bits"]) - 1, values)
            value_scale.append(s)
            value_min.append(low)
            value_codes[t][group * n:(group + 1) * n] = codes

    def halves(bits):
        return struct.pack("<%dH" % len(bits), *bits)

    return (halves(key_scale) + halves(key_min) + pack_keys(D, [codec["key_bits"]] * 4, key_codes) +
            halves(value_scale) + halves(value_min) + pack_values(D, codec["value_bits"], value_codes))


# ---- cases ------------------------------------------------------------------------------------------------

class Stream:
    """x -> 6364136223846793005 x + 1442695040888963407 mod 2^64; the upper 32 bits."""

    def __init__(self, seed):
        self.state = seed

    def next(self):
        self.state = (self.state * 6364136223846793005 + 1442695040888963407) % (1 << 64)
        return self.state >> 32


def elements(kind, D, seed, values):
    """16-bit patterns [token][channel] of one half of a page; integers and exact powers of two only, so
    that any language makes the same."""
    stream = Stream(seed)
    shift = [stream.next() % 7 for _ in range(D)]
    bias = [stream.next() % 4096 - 2048 for _ in range(D)]
    page = []
    for t in range(T):
        row = []
        for c in range(D):
            # The sum of four uniforms is close enough to a bell.
            bell = sum(stream.next() % 2048 for _ in range(4)) - 4094
            if kind == "bell":
                x = math.ldexp(bell, shift[c] - 14)
            elif kind == "biased":
                x = math.ldexp(bell, shift[c] - 14) + math.ldexp(bias[c], -6)
            else:  # "odd": constants, zeros of both signs, subnormals, outliers, the largest
                rule = (c + 3 * (t // 64)) % 8
                x = {0: math.ldexp(bias[c], -8),
                     1: -0.0 if bell & 1 else 0.0,
                     2: math.ldexp(bell, -30),
                     3: math.ldexp(bell, -12) + (10000.0 if t == 77 else 0.0),
                     4: 65280.0 if bell & 1 else -65280.0,
                     5: math.ldexp((t ^ c) & 1, 0) - 0.5,
                     6: math.ldexp(bell % 5, -2),
                     7: math.ldexp(bell, -11)}[rule]
            row.append(to_small(x, values))
        page.append(row)
    return page


MIX_2 = [(4, 4, 0, 0), (4, 2, 2, 0), (4, 2, 1, 1), (2, 2, 2, 2)]
MIX_1_5 = [(4, 2, 0, 0), (4, 1, 1, 0), (2, 2, 2, 0), (2, 2, 1, 1)]
PRESETS = {
    "kivi2": {"mixes": MIX_2, "value_bits": 2, "rotated": False},
    "kivi1.5": {"mixes": MIX_1_5, "value_bits": 1, "rotated": True},
    "kivi2-paper": {"group": 32, "key_bits": 2, "value_bits": 2},
    "kivi4-paper": {"group": 32, "key_bits": 4, "value_bits": 4},
}

# preset, head_dim, element type, kind, query energy
CASES = [
    ("kivi2", 128, "f16", "bell", False),
    ("kivi2", 128, "f16", "biased", True),
    ("kivi2", 128, "f16", "odd", False),
    ("kivi2", 128, "bf16", "biased", False),
    ("kivi2", 96, "f16", "biased", True),
    ("kivi2", 64, "bf16", "odd", False),
    ("kivi2", 256, "f16", "biased", False),
    ("kivi1.5", 128, "f16", "biased", True),
    ("kivi1.5", 128, "f16", "odd", False),
    ("kivi1.5", 96, "bf16", "bell", False),
    ("kivi2-paper", 128, "f16", "biased", False),
    ("kivi2-paper", 128, "f16", "odd", False),
    ("kivi2-paper", 128, "bf16", "odd", False),
    ("kivi2-paper", 96, "f16", "bell", False),
    ("kivi4-paper", 64, "f16", "biased", False),
]


def case_name(case):
    preset, D, dtype, kind, energy = case
    return " ".join([preset, str(D), dtype, kind, "energy" if energy else "plain"])


def compute(number, case):
    preset, D, dtype, kind, with_energy = case
    values = F16 if dtype == "f16" else BF16
    codec = PRESETS[preset]
    k = [[of_small(p, values) for p in row] for row in elements(kind, D, 2 * number + 1, values)]
    v = [[of_small(p, values) for p in row] for row in elements(kind, D, 2 * number + 2, values)]
    stream = Stream(1000 + number)
    energy = [math.ldexp(stream.next() % 1000, -7) if with_energy else 1.0 for _ in range(D)]
    if "group" in codec:
        return minmax_record(k, v, D, codec, values)
    return unbiased_record(k, v, D, codec, energy)


def main():
    out = b"KVVEC001"
    for number, case in enumerate(CASES):
        name, page = case_name(case).encode(), compute(number, case)
        out += struct.pack("<I", len(name)) + name + struct.pack("<I", len(page)) + page
    path = pathlib.Path(__file__).with_name("page_vectors.bin")
    if sys.argv[1:] == ["--check"]:
        if path.read_bytes() != out:
            sys.exit("page_vectors.bin differs from what page.h's prose gives")
        return
    path.write_bytes(out)


if __name__ == "__main__":
    main()
