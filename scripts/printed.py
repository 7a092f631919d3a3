"""When two printed texts say the same, on machines that form sums in another order."""

from __future__ import annotations

import re


def agree(printed: str, shown: str) -> bool:
    """Whether two texts are the same, but for one in the last digit of a number: sums differ between machines."""
    number = re.compile(r"\d+(?:\.\d+)?")
    printed, shown = (re.sub(r"[-+](?=0(?:\.0+)?(?![\d.]))", "", text) for text in (printed, shown))  # -0.0 is 0.0
    decimals = [[len(one.partition(".")[2]) for one in number.findall(text)] for text in (printed, shown)]
    if decimals[0] != decimals[1] or number.split(printed) != number.split(shown):
        return False
    pairs = zip(number.findall(printed), number.findall(shown), strict=True)
    return all(abs(float(came) - float(said)) <= 1.001 * _last_digit(said) for came, said in pairs)


def _last_digit(number: str) -> float:
    """What one in the last digit after the point is worth; whole numbers have to be exact."""
    return 10.0 ** -len(number.partition(".")[2]) if "." in number else 0.0
