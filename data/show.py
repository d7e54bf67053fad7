"""Rows as people should see them before they train on them."""

from itertools import groupby, islice

from transformers import PreTrainedTokenizerBase

from data.rows import Mixture, Rows
from data.stream import Stream

LEARNED, GIVEN, PLAIN = "\033[32m", "\033[90m", "\033[0m"  # green, grey


def show(rows: Rows | Mixture | Stream, number: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """The first rows as text: learned tokens in green, given ones in grey, and a line between rows and documents."""
    lines = []
    for row in islice(rows if isinstance(rows, Stream) else map(rows.__getitem__, range(len(rows))), number):
        lines.append(f"--- row {row.number}: {len(row.tokens)} tokens, {int(row.learned.sum())} of them learned ---")
        start = 0
        for length in row.lengths:
            piece = zip(
                row.tokens[start : start + length].tolist(), row.learned[start : start + length].tolist(), strict=True
            )
            runs = [(learned, [token for token, _ in run]) for learned, run in groupby(piece, key=lambda pair: pair[1])]
            lines.append(
                "".join((LEARNED if learned else GIVEN) + tokenizer.decode(ids) + PLAIN for learned, ids in runs)
            )
            start += length
    return "\n".join([*lines, f"--- {LEARNED}learned{PLAIN}, {GIVEN}given{PLAIN} ---"])
