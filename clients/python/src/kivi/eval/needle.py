# SPDX-License-Identifier: Apache-2.0
"""Key retrieval: 5-digit numbers hidden in running text, asked for at its end.

Eight facts ("The secret number of apple is 12345.") stand at random places of a text; four are
asked for.  An answer counts when every one of its tokens is the model's first choice, given the
question and the answer's tokens before it.
"""

from __future__ import annotations

import random
from typing import Any, List, NamedTuple, Sequence, Tuple

WORDS = ("apple river stone tiger cloud garden window silver castle engine forest bridge candle "
         "dragon mirror rocket basket hammer island jacket kitten ladder magnet needle orange "
         "pencil quartz ribbon saddle temple umbrella violin").split()
FACTS, QUESTIONS = 8, 4
_STEP = 40  # facts start at multiples of this, so that they never overlap


class Row(NamedTuple):
    """ids: [length].  answers: (first token, tokens) of each."""
    ids: List[int]
    answers: List[Tuple[int, int]]


def rows(tokenizer: Any, text_ids: Sequence[int], count: int, length: int, seed: int
         ) -> List[Row]:
    """`count` rows of `length` tokens; the same seed gives the same rows."""
    rng = random.Random(seed)

    def encode(text: str) -> List[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    made = []
    for _ in range(count):
        names = rng.sample(WORDS, FACTS)
        secret = {name: "".join(rng.choice("0123456789") for _ in range(5)) for name in names}
        offset = rng.randrange(len(text_ids) - length - 1)
        ids = list(text_ids[offset:offset + length])
        tail: List[int] = []
        spans = []
        for name in rng.sample(names, QUESTIONS):
            tail += encode(f"\nQuestion: what is the secret number of {name}?\nAnswer:")
            answer = encode(" " + secret[name])
            spans.append((len(tail), len(answer)))
            tail += answer
        start = length - len(tail)
        places = sorted(rng.sample(range((start - 6 * _STEP) // _STEP), FACTS))
        for place, name in zip(places, names):
            fact = encode(f"\nThe secret number of {name} is {secret[name]}.\n")
            ids[place * _STEP:place * _STEP + len(fact)] = fact
        ids[start:] = tail
        made.append(Row(ids, [(start + first, tokens) for first, tokens in spans]))
    return made
