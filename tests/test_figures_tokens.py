"""Tokens on their colours, and the attention of many heads: what is in the page before anything is pointed at."""

from __future__ import annotations

import json
import struct
import zlib
from base64 import b64decode
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
import torch

from hooked_lm import plotting
from hooked_lm.plotting.style import DIVERGING, SEQUENTIAL, colour_at, ink_on
from tests.browser import attention
from tests.helpers import luminance

AWKWARD = ["</script><script>", "<b>", " é", "\n", "", "&amp;", "日本", '"', "<!--", "\u2028"]


class Page(HTMLParser):
    """The text and attributes of elements by class, and what scripts hold, as a browser would read them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.texts: dict[str, list[str]] = {}
        self.attributes: dict[str, list[dict[str, str | None]]] = {}
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self._open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag == "script":
            self.scripts.append((found, ""))
        name = found.get("class") or tag
        self.texts.setdefault(name, []).append("")
        self.attributes.setdefault(name, []).append(found)
        if tag not in ("img", "meta", "i"):
            self._open.append(name)

    def handle_endtag(self, tag: str) -> None:
        if tag != "i":
            self._open.pop()

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "script":
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)
        elif self._open:
            self.texts[self._open[-1]][-1] += data


def data_of(figure: plotting.HtmlFigure) -> dict[str, Any]:
    return json.loads(next(text for attrs, text in Page(figure.html()).scripts if attrs.get("id") == "data"))


# Coloured tokens


def test_each_token_is_on_the_colour_of_its_value() -> None:
    page = Page(plotting.coloured_tokens(["a", " b", "c", "d"], torch.tensor([2.0, -1.0, 0.0, np.nan])).html())
    assert page.texts["token"] == ["a", " b", "c", "d"]
    styles = [token.get("style") for token in page.attributes["token"]]
    colours = [None if style is None else style.partition(":")[2].partition(";")[0] for style in styles]
    assert colours == [DIVERGING[-1][1], colour_at(DIVERGING, 0.25), DIVERGING[4][1], None]
    assert page.attributes["token"][3]["data-tip"] == "position 3  'd'\nno value"


def test_the_colours_are_around_the_centre_and_full_at_the_limit() -> None:
    figure = plotting.coloured_tokens(["a", "b", "c"], [1.0, 2.0, 5.0], centre=1.0, limit=2.0, unit="bits")
    page = Page(figure.html())
    colours = [str(token["style"])[11:18] for token in page.attributes["token"]]
    assert colours == [DIVERGING[4][1], colour_at(DIVERGING, 0.75), DIVERGING[-1][1]]
    assert [page.attributes["token"][1]["data-tip"], page.texts["span"][:4]] == [
        "position 1  'b'\nbits 2",
        ["bits", "-1", "1", "3"],
    ]


def test_amounts_are_the_bluer_the_larger_from_0_up() -> None:
    page = Page(plotting.coloured_tokens(["a", "b", "c", "d"], [np.nan, 0.0, 2.0, 4.0], unit="loss").html())
    styles = [str(token.get("style")) for token in page.attributes["token"]]
    assert styles[0] == "None"
    assert [style[11:18] for style in styles[1:]] == [colour_at(SEQUENTIAL, share) for share in (0.0, 0.5, 1.0)]
    assert page.texts["span"][:4] == ["loss", "0", "2", "4"]


def test_letters_can_be_read_on_every_colour() -> None:
    page = Page(plotting.coloured_tokens(["x"] * 41, np.linspace(-1, 1, 41)).html())
    for token in page.attributes["token"]:
        back, ink = (part.partition(":")[2] for part in str(token["style"]).split(";"))
        light, dark = sorted((luminance(back), luminance(ink)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5


def test_nothing_of_a_token_is_read_as_part_of_the_page() -> None:
    figure = plotting.coloured_tokens(AWKWARD, np.arange(len(AWKWARD)), unit="<i>", title="</title><b>")
    page = Page(figure.html())
    shown = [token.replace("\n", "↵\n") or "∅" for token in AWKWARD]
    assert page.texts["token"] == shown
    assert [str(token["data-tip"]).split("\n")[0] for token in page.attributes["token"]] == [
        f"position {place}  {token!r}" for place, token in enumerate(AWKWARD)
    ]
    assert page.texts["title"] == page.texts["h1"] == ["</title><b>"]
    assert "b" not in page.texts


@pytest.mark.parametrize(
    ("tokens", "values", "options", "said"),
    [
        (["a"], [1.0, 2.0], {}, r"1 tokens for values of shape \(2,\)"),
        ([], [], {}, "at least one"),
        (["a", "b"], [1.0, np.inf], {}, "'b' is not"),
        (["a"], [1.0], {"limit": 0.0}, "above 0, not 0.0"),
        (["a"], [1.0], {"limit": np.nan}, "above 0, not nan"),
    ],
)
def test_values_that_do_not_fit_raise(tokens: list[str], values: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        plotting.coloured_tokens(tokens, values, **options)


# Attention of many heads


def pixels(address: str) -> np.ndarray:
    """The colours in a PNG of a palette, [row column 3]."""
    content, place, chunks = b64decode(address.partition(",")[2]), 8, {}
    while place < len(content):
        (length,) = struct.unpack(">I", content[place : place + 4])
        name, body = content[place + 4 : place + 8], content[place + 8 : place + 8 + length]
        (check,) = struct.unpack(">I", content[place + 8 + length : place + 12 + length])
        assert check == zlib.crc32(name + body)
        chunks[name], place = body, place + 12 + length
    width, height, *kind = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert kind == [8, 3, 0, 0, 0]
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, width + 1)
    assert not rows[:, 0].any()
    return np.frombuffer(chunks[b"PLTE"], np.uint8).reshape(256, 3)[rows[:, 1:]]


def test_the_page_holds_every_entry_of_the_patterns() -> None:
    patterns = attention(3, 5)
    figure = plotting.attention_heads(torch.tensor(patterns), list("abcde"), ["L0H0", "L0H1", "<L0H2>"], "Layer 0")
    data = data_of(figure)
    held = np.frombuffer(b64decode(data["patterns"]), "<u2").reshape(3, 5, 5) / data["parts"]
    np.testing.assert_allclose(held, patterns, atol=1e-5)
    assert data["tokens"] == ["'a'", "'b'", "'c'", "'d'", "'e'"]
    assert data["names"] == ["L0H0", "L0H1", "<L0H2>"]
    assert (data["queries"], data["scale"]) == (5, [list(mark) for mark in SEQUENTIAL])
    letters = [ink_on(colour_at(SEQUENTIAL, data["white_from"] + step)) for step in (-0.01, 0.0)]
    assert letters == ["#000000", "#ffffff"]
    page = Page(figure.html())
    assert page.texts["h1"] == ["Layer 0"]
    assert page.texts["token"] == list("abcde")


def test_a_thumbnail_has_a_pixel_for_each_entry_in_its_colour() -> None:
    pattern = np.array([[[1.0, 0.0, 0.0], [0.4, 0.6, 0.0]]])
    page = Page(plotting.attention_heads(pattern, ["a", "b", "c"]).html())
    first, large = (str(image["src"]) for image in page.attributes["img"])
    assert first == large
    expected = [[colour_at(SEQUENTIAL, round(255 * share) / 255) for share in row] for row in pattern[0]]
    found = [["#" + bytes(pixel).hex() for pixel in row] for row in pixels(first)]
    assert found == expected


def test_nothing_of_a_token_or_name_ends_the_data_or_becomes_an_element() -> None:
    n = len(AWKWARD)
    figure = plotting.attention_heads(attention(2, n), AWKWARD, ["</script>", "<b>"], "<i>")
    assert data_of(figure)["tokens"] == [repr(token) for token in AWKWARD]
    assert data_of(figure)["names"] == ["</script>", "<b>"]
    page = Page(figure.html())
    assert page.texts["token"] == [token.replace("\n", "↵\n") or "∅" for token in AWKWARD]
    assert len(page.scripts) == 3  # the data, the widget, the fit
    assert len(page.texts["token"]) == n


def test_by_default_heads_have_their_numbers() -> None:
    assert data_of(plotting.attention_heads(attention(2, 3), list("abc")))["names"] == ["head 0", "head 1"]


def test_a_static_picture_shows_the_head_to_start_with() -> None:
    page = Page(plotting.attention_heads(attention(2, 3), list("abc"), start=1).html())
    _, second, large = (str(image["src"]) for image in page.attributes["img"])
    assert large == second
    for start in (-1, 2):
        with pytest.raises(ValueError, match=f"one of the heads 0-1, not {start}"):
            plotting.attention_heads(attention(2, 3), list("abc"), start=start)


@pytest.mark.parametrize(
    ("patterns", "tokens", "names", "said"),
    [
        (attention(2, 3)[0], list("abc"), None, r"\[head query key\], got \(3, 3\)"),
        (attention(2, 3)[None], list("abc"), None, r"got \(1, 2, 3, 3\)"),
        (attention(2, 3), list("ab"), None, "2 tokens for patterns of 3 queries and 3 keys"),
        (attention(2, 3)[..., :2], list("ab"), None, "3 queries and 2 keys"),
        (attention(2, 3), list("abc"), ["one"], "1 names for 2 heads"),
        (attention(2, 3) * 3, list("abc"), None, "between 0 and 3: hook_pattern has it"),
        (attention(2, 3) * np.nan, list("abc"), None, "between nan and nan"),
    ],
)
def test_patterns_that_do_not_fit_raise(patterns: Any, tokens: list[str], names: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        plotting.attention_heads(patterns, tokens, names)
