"""Figures in a real browser: they are drawn, they answer to pointer and keyboard, and nothing leaves the page."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hooked_lm import plotting
from hooked_lm.plotting.document import document
from tests.browser import HEADS, HEIGHT, PROMPT, attention, gallery, launched, opened, plot_hover, required

FIGURES = gallery()
N = len(PROMPT)


# One for this file: see `launched`.
@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched() as found:
        yield found


@pytest.fixture
def screenshots(tmp_path: Path) -> Path:
    """Where screenshots go: the folder in HOOKED_LM_SCREENSHOTS, to be looked at, or one that is thrown away."""
    folder = Path(os.environ.get("HOOKED_LM_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# Plotly follows the window's width a little later.
SETTLED = """() => [...document.querySelectorAll(".plotly-graph-div")].every(
  (plot) => Math.abs(plot._fullLayout.width - plot.clientWidth) < 2)"""


def shoot(page: Any, folder: Path, name: str) -> None:
    """Take a screenshot at a page's width and at a phone's, where nothing may stick out of the page."""
    for width in (390, 980):
        page.set_viewport_size({"width": width, "height": HEIGHT})
        page.wait_for_function(SETTLED)
        page.screenshot(path=folder / f"{name}-{width}.png", full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth") <= width


# Figures of plotly: what is drawn (selector and how many), and what is said where one points.
DRAWN = [
    (
        "attention_pattern",
        [(".heatmaplayer image", 1)],
        (1, 2),
        "from position 2 to 1\ntokens ' Mary' → When\nattention 0.",
    ),
    ("log_prob_curve", [(".scatterlayer .point", 40), (".shapelayer path", 2)], (21, -0.3), "token at position 21"),
    ("head_scores", [(".heatmaplayer image", 1), (".heatmap-label", 32)], ("head 3", "layer 2"), "layer 2, head 3: 0."),
    ("composition_matrix", [(".heatmap-label", 36)], ("L1H2", "L0H1"), "L0H1, L1H2: 0.510"),
    ("ablation_bars", [(".barlayer .point path", 4)], (2.0, "without L1H2"), "without L1H2\n5.500"),
    (
        "layer_curves",
        [(".scatterlayer .trace", 2), (".scatterlayer .point", 12), (".legend .traces", 2)],
        ("layer 2", 0.8),
        "mean state\nlayer 2: 0.800",
    ),
    (
        "patching_grid",
        [(".heatmaplayer image", 1), (".xtick", N)],
        (14, 5),
        "layer 5, position 14 ' to'\nbrought back 1.",
    ),
    ("patching_grid_heads", [(".heatmap-label", 144)], (11, 0), "layer 0, head 11\nlogit difference"),
    ("patching_grid_large", [(".xtick", 30), (".ytick", 24)], (59, 23), "position 59 ' w5'"),
    ("lens_table", [(".heatmap-label", 7 * N)], (0, 6), "final, position 0 <|endoftext|>\n"),
    ("attribution_bars", [(".barlayer .point path", 8)], (1.0, "L5H1"), "L5H1\nlogit difference +2.610"),
    ("attribution_waterfall", [(".waterfalllayer .point path", 10)], (1.0, "total"), "total\nlogit difference 4.310"),
    (
        "training_curves",
        [(".scatterlayer .trace", 2), (".scatterlayer .point", 51 + 11)],
        (0, 4.6),
        "loss 4.6\nafter step 0",
    ),
    (
        "composition_graph",
        [(".scatterlayer .trace", 12 + 2), (".scatterlayer .point", 24 + 12)],
        (-1.5, 0),
        "L0H1\nwrites to 2, reads from 0",
    ),
    (
        "effect_intervals",
        [(".scatterlayer .point", 3), (".scatterlayer .js-line", 3), (".ytick", 3)],
        (0.62, "L0H4"),
        "L0H4\n0.6200 (0.3900 to 0.8600)",
    ),
    (
        "stacked_bars",
        [(".barlayer .point path", 6), (".legend .traces", 3)],
        (2.0, "layer 0"),
        "MLP\nlayer 0: 2",
    ),
    (
        "site_map",
        [(".heatmaplayer image", 1), (".xtick", 6), (".ytick", 4)],
        (2, 3),
        "log-probabilities, position ' Mary'\nlog10 of the difference -0.500",
    ),
    (
        "route_graph",
        [(".scatterlayer .point", 5 + 6), (".xtick", N), (".ytick", 3)],
        (9.0, 1.5),
        "L1H4 4 -> 14\ninto 1_post\nflow 0.300\nimportance 0.300",
    ),
]


@pytest.mark.parametrize(("name", "elements", "at", "said"), DRAWN, ids=[row[0] for row in DRAWN])
def test_a_figure_is_drawn_whole_and_says_what_one_points_at(
    browser: Any, tmp_path: Path, screenshots: Path, name: str, elements: Any, at: Any, said: str
) -> None:
    with opened(browser, FIGURES[name].save(tmp_path / f"{name}.html")) as page:
        found = [(selector, page.locator(f".plotly-graph-div {selector}").count()) for selector, _ in elements]
        assert found == elements
        assert said in plot_hover(page, *at)
        shoot(page, screenshots, name)


def test_every_kind_of_figure_is_looked_at() -> None:
    functions = {name for name in plotting.__all__ if callable(getattr(plotting, name)) and name.islower()}
    pages = {"page_html", "write_page"}
    assert functions - pages <= set(FIGURES)
    assert set(FIGURES) == {row[0] for row in DRAWN} | {"attention_heads", "attention_heads_large", "coloured_tokens"}


# Attention of many heads


@pytest.fixture(scope="module")
def heads_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FIGURES["attention_heads"].save(tmp_path_factory.mktemp("heads") / "heads.html")


@pytest.fixture
def heads(browser: Any, heads_file: Path) -> Iterator[Any]:
    with opened(browser, heads_file) as page:
        yield page


def shares(page: Any) -> list[float]:
    """What is shown of each token."""
    return [float(value) for value in page.eval_on_selector_all(".token", "all => all.map(one => one.dataset.value)")]


def pressed(page: Any, kind: str) -> list[int]:
    """Which heads or tokens are held."""
    return [
        place
        for place, state in enumerate(page.eval_on_selector_all(f".{kind}", "all => all.map(one => one.ariaPressed)"))
        if state == "true"
    ]


PATTERNS = attention(12, N)


def test_all_heads_and_tokens_are_there_and_first_each_token_has_the_mean_it_receives(
    heads: Any, screenshots: Path
) -> None:
    assert heads.locator(".head img").count() == 12
    assert heads.locator(".head span").all_inner_texts() == HEADS
    assert heads.locator(".token").all_text_contents() == PROMPT
    sizes = heads.eval_on_selector_all("img", "all => all.map(one => [one.naturalWidth, one.naturalHeight])")
    assert sizes == [[N, N]] * 13
    assert shares(heads) == pytest.approx(PATTERNS[0].mean(0).tolist(), abs=1e-4)
    shoot(heads, screenshots, "attention_heads")


def test_pointing_at_a_token_shows_where_it_attends(heads: Any) -> None:
    heads.locator(".token").nth(9).hover()
    assert shares(heads) == pytest.approx(PATTERNS[0, 9].tolist(), abs=1e-4)
    best = int(PATTERNS[0, 9].argmax())
    said = heads.locator(".said").inner_text()
    assert said.startswith(f"9 ',' attends to {best} {PROMPT[best]!r} {PATTERNS[0, 9, best]:.3f}")
    colours = heads.eval_on_selector_all(".token", "all => all.map(one => one.style.backgroundColor)")
    assert colours[best] != colours[-1] == "rgb(251, 250, 246)"
    assert heads.locator(".token.on").text_content() == ","
    heads.locator(".name").hover()
    assert shares(heads) == pytest.approx(PATTERNS[0].mean(0).tolist(), abs=1e-4)


def test_the_switch_shows_which_tokens_attend_to_it(heads: Any) -> None:
    heads.locator("[data-side=source]").click()
    heads.locator(".token").nth(2).hover()
    assert shares(heads) == pytest.approx(PATTERNS[0, :, 2].tolist(), abs=1e-4)
    assert heads.locator(".said").inner_text().startswith("2 ' Mary' is attended to by 3 ' and' ")
    row = heads.locator(".pattern .row").bounding_box()
    assert row["height"] > 10 * row["width"] > 0


def test_pointing_at_a_head_shows_that_head(heads: Any) -> None:
    heads.locator(".head").nth(5).hover()
    assert heads.locator(".name").inner_text() == "L0H5"
    assert shares(heads) == pytest.approx(PATTERNS[5].mean(0).tolist(), abs=1e-4)
    assert heads.locator(".head.on").count() == 1
    same = "document.querySelector('.pattern img').src === document.querySelectorAll('.head img')[5].src"
    assert heads.evaluate(same)


def test_a_click_holds_a_token_and_a_second_lets_go(heads: Any, screenshots: Path) -> None:
    token = heads.locator(".token").nth(10)
    token.click()
    assert pressed(heads, "token") == [10]
    heads.locator(".token").nth(4).hover()
    assert shares(heads) == pytest.approx(PATTERNS[0, 10].tolist(), abs=1e-4)
    heads.locator(".head").nth(7).hover()
    assert shares(heads) == pytest.approx(PATTERNS[7, 10].tolist(), abs=1e-4)
    shoot(heads, screenshots, "attention_heads-held")
    token.click()
    assert pressed(heads, "token") == []
    heads.locator(".token").nth(4).hover()
    assert shares(heads) == pytest.approx(PATTERNS[7, 4].tolist(), abs=1e-4)


def test_a_click_holds_a_head_another_takes_its_place_and_one_beside_lets_go(heads: Any) -> None:
    heads.locator(".head").nth(3).click()
    heads.locator(".head").nth(8).hover()
    assert (pressed(heads, "head"), heads.locator(".name").text_content()) == ([3], "L0H3")
    assert "held" in heads.locator(".name").get_attribute("class")
    heads.locator(".head").nth(8).click()
    assert (pressed(heads, "head"), heads.locator(".name").text_content()) == ([8], "L0H8")
    heads.mouse.click(5, 5)
    assert pressed(heads, "head") == []


def test_the_large_pattern_has_a_row_for_each_token(heads: Any) -> None:
    box = heads.locator(".pattern").bounding_box()
    heads.mouse.move(box["x"] + 20, box["y"] + box["height"] * 6.5 / N)
    assert heads.locator(".token.on").text_content() == PROMPT[6]
    row = heads.locator(".pattern .row").bounding_box()
    assert row["y"] == pytest.approx(box["y"] + box["height"] * 6 / N, abs=3)
    heads.mouse.click(box["x"] + 20, box["y"] + box["height"] * 6.5 / N)
    assert pressed(heads, "token") == [6]


def test_the_keyboard_reaches_heads_and_tokens(heads: Any) -> None:
    heads.locator(".head").nth(1).focus()
    assert heads.locator(".name").text_content() == "L0H1"
    heads.keyboard.press("Enter")
    heads.locator(".token").nth(11).focus()
    heads.keyboard.press(" ")
    assert (pressed(heads, "head"), pressed(heads, "token")) == ([1], [11])
    assert shares(heads) == pytest.approx(PATTERNS[1, 11].tolist(), abs=1e-4)
    heads.keyboard.press("Escape")
    assert (pressed(heads, "head"), pressed(heads, "token")) == ([], [])


def test_fewer_queries_than_keys_are_the_last_tokens(browser: Any, tmp_path: Path) -> None:
    pattern = PATTERNS[:2, -4:]
    with opened(browser, plotting.attention_heads(pattern, PROMPT).save(tmp_path / "last.html")) as page:
        page.locator(".token").nth(N - 4).hover()
        assert shares(page) == pytest.approx(pattern[0, 0].tolist(), abs=1e-4)
        page.locator(".token").nth(2).hover()
        assert page.locator(".said").inner_text() == "2 ' Mary' is no query here"
        assert shares(page) == [0.0] * N
        assert not page.locator(".pattern .row").is_visible()


def test_the_head_to_start_with_is_large_and_the_one_without_a_pointer(browser: Any, tmp_path: Path) -> None:
    with opened(browser, plotting.attention_heads(PATTERNS[:2], PROMPT, start=1).save(tmp_path / "start.html")) as page:
        assert page.locator(".name").inner_text() == "head 1"
        assert shares(page) == pytest.approx(PATTERNS[1].mean(0).tolist(), abs=1e-4)


def test_many_heads_stay_above_the_tokens_on_one_screen(browser: Any, tmp_path: Path, screenshots: Path) -> None:
    with opened(browser, FIGURES["attention_heads_large"].save(tmp_path / "large.html")) as page:
        assert page.locator(".head").count() == 144
        assert page.locator(".tokens").bounding_box()["y"] < 600
        page.locator(".head").nth(143).hover()
        assert page.locator(".name").inner_text() == "head 143"
        page.locator(".token").nth(59).hover()
        assert sum(shares(page)) == pytest.approx(1.0, abs=1e-2)
        shoot(page, screenshots, "attention_heads_large")


def test_without_scripts_there_are_still_pictures_and_tokens(browser: Any, heads_file: Path) -> None:
    with opened(browser, heads_file, java_script_enabled=False) as page:
        assert page.locator(".head img").first.is_visible()
        assert page.locator(".pattern img").is_visible()
        assert page.locator(".token").all_text_contents() == PROMPT


# Coloured tokens


def test_a_coloured_token_says_its_value_to_the_pointer_and_the_keyboard(
    browser: Any, tmp_path: Path, screenshots: Path
) -> None:
    figure = plotting.coloured_tokens(["<b>a</b>", "\n", "</script>"], [2.0, -1.0, 0.0], unit="bits")
    with opened(browser, figure.save(tmp_path / "tokens.html")) as page:
        assert page.locator(".token").all_text_contents() == ["<b>a</b>", "↵\n", "</script>"]
        tip = page.locator("#tip")
        assert not tip.is_visible()
        page.locator(".token").first.hover()
        assert tip.inner_text() == "position 0  '<b>a</b>'\nbits 2"
        page.locator(".token").nth(2).focus()
        assert tip.inner_text() == "position 2  '</script>'\nbits 0"
        colours = page.eval_on_selector_all(".token", "all => all.map(one => getComputedStyle(one).backgroundColor)")
        assert colours == ["rgb(15, 61, 115)", "rgb(232, 146, 90)", "rgb(251, 250, 246)"]
    with opened(browser, FIGURES["coloured_tokens"].save(tmp_path / "prompt.html")) as page:
        page.locator(".token").nth(3).hover()
        assert page.locator("#tip").is_visible()
        shoot(page, screenshots, "coloured_tokens")


def test_what_a_token_says_stays_inside_the_page(browser: Any, tmp_path: Path) -> None:
    figure = plotting.coloured_tokens(
        [f" word{place}" for place in range(80)], list(range(80)), unit="a long name of a unit"
    )
    with opened(browser, figure.save(tmp_path / "tokens.html"), width=390) as page:
        for place in (5, 6, 7, 8, 79):
            page.locator(".token").nth(place).hover()
            box = page.locator("#tip").bounding_box()
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= 390


# Pages and notebooks


def test_a_page_of_figures_is_drawn(browser: Any, tmp_path: Path, screenshots: Path) -> None:
    sections = [
        plotting.PageFigure("Two", "Side by side.", (FIGURES["attention_pattern"], FIGURES["head_scores"])),
        plotting.PageFigure("One", "Alone.", (FIGURES["attention_heads"],)),
    ]
    path = plotting.write_page(tmp_path / "page.html", "A page", "Words.", sections, [("1", "fact")])
    with opened(browser, path) as page:
        assert page.locator(".heatmaplayer image").count() == 2
        left, right = (page.locator(".plotly-graph-div").nth(place).bounding_box() for place in range(2))
        assert right["x"] > left["x"] + left["width"]
        page.frame_locator("iframe").locator(".token").nth(9).hover()
        assert page.frame_locator("iframe").locator(".token.on").text_content() == ","
        shoot(page, screenshots, "page")


@pytest.mark.parametrize("name", ["attention_heads", "patching_grid"])
def test_in_a_frame_as_a_notebook_has_it_a_figure_fits_and_works(browser: Any, tmp_path: Path, name: str) -> None:
    host = tmp_path / "host.html"
    host.write_text(f"<!doctype html><style>.token {{ color: red }}</style>{FIGURES[name]._repr_html_()}")
    with opened(browser, host) as page:
        frame = page.frame_locator("iframe")
        frame.locator(".head, .heatmaplayer image").first.wait_for()
        inside = page.frames[1].evaluate("[document.documentElement.scrollHeight, innerHeight, innerWidth]")
        assert inside[0] <= inside[1] < HEIGHT
        assert inside[2] > 900
        if name == "attention_heads":
            frame.locator(".token").nth(9).click()
            assert frame.locator(".token[aria-pressed=true]").text_content() == ","
            # The height follows the page's.
            page.set_viewport_size({"width": 390, "height": HEIGHT})
            page.wait_for_timeout(100)
            assert page.evaluate("document.querySelector('iframe').offsetHeight") > inside[1]


# The watch itself


def test_a_request_and_an_error_are_seen(browser: Any, tmp_path: Path) -> None:
    (tmp_path / "asks.html").write_text("<!doctype html><img src='http://127.0.0.1:9/a.png'>")
    with pytest.raises(AssertionError, match=r"127.0.0.1:9/a.png"), opened(browser, tmp_path / "asks.html"):
        pass
    (tmp_path / "fails.html").write_text("<!doctype html><script>nothing()</script>")
    with pytest.raises(AssertionError, match="nothing is not defined"), opened(browser, tmp_path / "fails.html"):
        pass


def test_a_figures_document_forbids_requests(browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "asks.html"
    path.write_text(document("A title", "", "<img src='http://127.0.0.1:9/a.png'>"))
    with pytest.raises(AssertionError, match="Content Security Policy"), opened(browser, path):
        pass


def test_without_a_browser_the_tests_are_skipped_unless_one_is_required(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.browser.chromium", lambda: None)
    monkeypatch.delenv("HOOKED_LM_BROWSER", raising=False)
    assert not required()
    with pytest.raises(pytest.skip.Exception), launched():
        pass
    monkeypatch.setenv("HOOKED_LM_BROWSER", "required")
    with pytest.raises(pytest.fail.Exception), launched():
        pass
