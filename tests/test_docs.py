"""The documentation: the site builds without a warning, asks nothing of the network, and its tables are the code's."""

from __future__ import annotations

import functools
import html
import http.server
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag

import pytest
import torch
from mkdocs.exceptions import PluginError

from hooked_lm import HookedTransformer
from scripts import docs_site
from tests.browser import launched
from tests.docs_helpers import ROOT, is_elsewhere
from tests.docs_public import arguments, documented, faults, found, public
from tests.family_rows import ROWS
from weight_conversion.checkpoint import read_family
from weight_conversion.registry import family_of


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site. A warning is an error."""
    folder = tmp_path_factory.mktemp("docs") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert built.returncode == 0, built.stderr
    return folder


class Page(HTMLParser):
    """What a page links to, loads, and can be linked to; documents inside it included."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.ids: set[str] = set()
        self.within_style = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.ids |= {given[name] for name in ("id", "name") if name in given}
        self.within_style = tag == "style"
        if "srcdoc" in given:
            self.loads += Page(given["srcdoc"]).loads
        if tag == "a":
            self.links += [given["href"]] if "href" in given else []
            return
        self.loads += [given[name] for name in ("src", "href", "data", "poster") if name in given]
        self.loads += [part.split()[0] for part in given.get("srcset", "").split(",") if part.strip()]
        self.loads += loaded_by_css(given.get("style", ""))

    def handle_data(self, data: str) -> None:
        if self.within_style:
            self.loads += loaded_by_css(data)

    def handle_endtag(self, tag: str) -> None:
        self.within_style = False


def loaded_by_css(text: str) -> list[str]:
    """Return what style rules load."""
    return [match["url"] for match in re.finditer(r"(?:url\(|@import\s+)\s*['\"]?(?P<url>(?!data:)[^'\")\s;]+)", text)]


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path.read_text()) for path in site.rglob("*.html")}


# The site


def test_a_page_loads_nothing_from_elsewhere(site: Path, pages: dict[Path, Page]) -> None:
    outside = [(path.name, url) for path, page in pages.items() for url in page.loads if is_elsewhere(url)]
    styles = [(path.name, url) for path in site.rglob("*.css") for url in loaded_by_css(path.read_text())]
    assert outside == []
    assert [entry for entry in styles if is_elsewhere(entry[1])] == []


def test_what_would_be_loaded_is_seen() -> None:
    text = """<script src="//cdn/x.js"></script><style>@import 'https://a/b.css'; p {background: url(http://c)}</style>
    <iframe srcdoc="&lt;img src='https://d'&gt;"></iframe><img srcset="https://e 2x"><a href="https://f">no load</a>"""
    loads = Page(text).loads
    assert [url for url in loads if is_elsewhere(url)] == loads
    assert loads == ["//cdn/x.js", "https://a/b.css", "http://c", "https://d", "https://e"]


def test_every_link_within_the_site_leads_somewhere(site: Path, pages: dict[Path, Page]) -> None:
    broken = []
    for path, page in pages.items():
        # The page for what is not found links from the root, wherever it is shown.
        for url in [] if path.name == "404.html" else [*page.links, *page.loads]:
            if is_elsewhere(url) or url.startswith(("data:", "mailto:", "javascript:")):
                continue
            target, fragment = urldefrag(unquote(url))
            file = (path.parent / target).resolve() if target else path
            file = file / "index.html" if file.is_dir() else file
            known = pages.get(file, Page("")).ids
            if not file.exists() or (fragment and not fragment.startswith("__") and fragment not in known):
                broken.append(f"{path.relative_to(site)}: {url}")
    assert broken == []


def test_every_notebook_has_a_page_and_a_line_in_the_list(site: Path) -> None:
    listed = (site / "notebooks/index.html").read_text()
    for path in docs_site.notebooks():
        assert (site / "notebooks" / path.stem / "index.html").exists()
        assert f'href="{path.stem}/"' in listed
    assert docs_site.notebooks() == sorted((ROOT / "notebooks").glob("*.ipynb")) != []


def test_pages_from_elsewhere_are_there_in_their_words(site: Path) -> None:
    for uri, source in docs_site.PAGES_FROM.items():
        title = (ROOT / source).read_text().splitlines()[0].removeprefix("# ")
        assert f">{title}" in (site / uri.removesuffix(".md") / "index.html").read_text()


def test_a_page_in_two_places_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from mkdocs.structure.files import File, Files

    files = Files([File("changelog.md", str(tmp_path), str(tmp_path), True)])
    monkeypatch.setattr(docs_site, "notebooks", list)
    monkeypatch.setattr(docs_site, "PAGES_FROM", {"changelog.md": "CHANGELOG.md"})
    with pytest.raises(PluginError, match="keep one"):
        docs_site.on_files(files, {"site_dir": str(tmp_path), "use_directory_urls": True})


def test_markers_that_nothing_makes_are_refused() -> None:
    with pytest.raises(PluginError, match=r"page\.md: nothing makes 'hook_piont'; there are axes, .*"):
        docs_site.filled("<!-- make: hook_piont -->", "page.md")


def test_a_notebook_without_a_title_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "09_untitled.ipynb"
    path.write_text(json.dumps({"cells": [{"cell_type": "markdown", "source": ["no title\n"]}]}))
    with pytest.raises(PluginError, match=r"09_untitled\.ipynb has no title"):
        docs_site.opening(path)


def test_a_notebooks_page_keeps_its_text_and_loses_what_fetches() -> None:
    kept = "<p>text</p><script>let local = 1</script>"
    fetching = '<script src=""> </script><script type="module">import("https://cdn")</script>'

    def page(uri: str) -> Any:
        return type("AnyPage", (), {"file": type("AnyFile", (), {"src_uri": uri})})

    assert docs_site.on_post_page(kept + fetching, page("notebooks/a.ipynb"), None) == kept
    assert docs_site.on_post_page(kept + fetching, page("a.md"), None) == kept + fetching


# The table of hook points


# The rows of the families whose names the table uses.
ROW_OF = {
    "GPT-2": "gpt2",
    "Pythia": "gpt-neox",
    "Llama": "llama",
    "Gemma 2": "gemma2",
    "Qwen 3": "qwen3",
    "Bloom": "bloom",
    "Mixtral": "mixtral",
    "Qwen 2 MoE": "qwen2-moe",
    "MiniCPM3": "minicpm3",
}


@functools.cache
def names_by_row() -> dict[str, set[str]]:
    """Return the hook names, layers left open, that a model of every family has."""
    names = {}
    for row in ROWS:
        cfg, _ = read_family(family_of(row.architecture), row.config_fields(), row.architecture)
        with torch.device("meta"):
            model = HookedTransformer(cfg.replace(init_weights=False))
        names[row.id] = {docs_site.general(name) for name in model.hook_dict}
    return names


def test_the_table_has_every_hook_point_of_every_family() -> None:
    assert set().union(*names_by_row().values()) <= set(docs_site.hook_points())


@pytest.mark.parametrize(("architecture", "row"), ROW_OF.items())
def test_what_the_table_says_of_an_architecture_is_so_of_its_family(architecture: str, row: str) -> None:
    of_the_table = {name for name, (having, _, _) in docs_site.hook_points().items() if architecture in having}
    assert of_the_table == names_by_row()[row]


@pytest.mark.parametrize("architecture", docs_site.ARCHITECTURES)
def test_activations_have_the_axes_that_the_table_gives(architecture: str) -> None:
    model = docs_site.models()[architecture]
    cfg, batch, pos = model.cfg, 6, 7
    sizes = {
        "batch": batch,
        "pos": pos,
        "query": pos,
        "key": pos,
        "head": cfg.n_heads,
        "kv_head": cfg.n_kv_heads,
        "d_head": cfg.d_head,
        "d_latent_kv": cfg.d_latent_kv,
        "d_latent_q": cfg.d_latent_q,
        "d_model": cfg.d_model,
        "d_mlp": cfg.d_mlp,
        "vocab": cfg.d_vocab,
        "expert": cfg.num_experts,
        "chosen": cfg.experts_per_token,
        "1": 1,
    }
    tokens = torch.arange(batch * pos).reshape(batch, pos) % cfg.d_vocab
    with torch.inference_mode():
        _, cache = model.run_with_cache(tokens, names_filter=list(model.hook_dict))
    table = docs_site.hook_points()
    for name, activation in cache.items():
        axes = table[docs_site.general(name)][1].split()
        if ".shared." in name:
            sizes = {**sizes, "d_mlp": cfg.d_shared_expert}
        elif "d_mlp" in axes:
            sizes = {**sizes, "d_mlp": cfg.d_mlp}
        assert list(activation.shape) == [sizes[axis] for axis in axes], name


def test_a_hook_point_that_is_not_described_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(docs_site.MEANINGS, "attn.hook_z")
    with pytest.raises(PluginError, match=r"does not say what 'blocks\.{l}\.attn\.hook_z' shows"):
        docs_site.hook_point_table()


def test_nothing_is_described_that_is_not_there() -> None:
    assert {docs_site.site_of(name) for name in docs_site.hook_points()} == set(docs_site.MEANINGS)


def test_every_axis_of_the_table_is_explained_on_its_page(site: Path) -> None:
    page = re.sub(r"<[^>]+>", "", (site / "concepts/hook_points/index.html").read_text())
    used = {axis for _, axes, _ in docs_site.hook_points().values() for axis in axes.split()} - {"1"}
    explained = set(docs_site.names.AXES) | {"chosen"}
    assert used <= explained
    assert "chosen\ncounts the experts" in page


def test_the_page_shows_every_row_of_the_table(site: Path) -> None:
    page = (site / "concepts/hook_points/index.html").read_text()
    for name in docs_site.hook_points():
        assert f"<code>{name.removeprefix('blocks.{l}.')}</code>" in page


def test_every_name_in_the_drawing_of_a_block_is_a_hook_points() -> None:
    drawn = re.findall(r'<g class="site[^"]*">.*?<text[^>]*>([^<]+)</text>', docs_site.block_diagram())
    known = set(docs_site.hook_points())
    prefixes = ("", "blocks.{l}.", "blocks.{l}.attn.", "blocks.{l}.mlp.")
    assert [name for name in drawn if not any(prefix + name in known for prefix in prefixes)] == []
    of_gpt2 = {name.rpartition(".")[2] for name in names_by_row()["gpt2"]}
    assert of_gpt2 <= {name.rpartition(".")[2] for name in drawn}


def test_the_sites_drawn_as_made_on_demand_are() -> None:
    drawn = set(re.findall(r'<g class="site demand">.*?<text[^>]*>([^<]+)</text>', docs_site.block_diagram()))
    on_demand = {name.rpartition(".")[2] for name, (_, _, demand) in docs_site.hook_points().items() if demand}
    assert drawn == on_demand


def test_the_drawn_pattern_is_an_induction_heads() -> None:
    drawing = docs_site.induction_pattern()
    weights = re.findall(r"position (\d+) looks at (\d+): ([\d.]+)", drawing)
    found_later = [float(weight) for query, key, weight in weights if int(query) - int(key) == 19 and int(query) > 21]
    assert len(found_later) == 19
    assert min(found_later) > 0.5


# The reference


def test_the_reference_documents_every_public_name(site: Path) -> None:
    text = "".join(path.read_text() for path in (site / "reference").rglob("index.html"))
    ids = Page(text).ids
    # What a module offers from elsewhere stands under the module's own name.
    known = {f"{thing.__module__}.{thing.__qualname__}": thing for thing in public().values()}
    # A class or function may have an entry of its own, under the path that it is imported by.
    entries = {id(found(path)): path for path in documented()}
    missing = [
        path
        for path, thing in known.items()
        if path not in ids
        and entries.get(id(thing)) not in ids
        and not any(f"{module}.{thing.__name__}" in ids for module in documented())
    ]
    assert missing == []


def test_what_the_reference_names_exists_and_has_a_docstring() -> None:
    assert [path for path in documented() if not found(path).__doc__] == []


def test_shapes_are_legible_in_the_reference(site: Path) -> None:
    page = html.unescape(re.sub(r"<[^>]+>", "", (site / "reference/circuits/index.html").read_text()))
    assert "tokens: Int[Tensor, 'batch pos']" in page.replace('"', "'")
    assert "-> Float[Tensor, 'batch query key']" in page.replace('"', "'")


def test_docstrings_say_what_they_have_to() -> None:
    assert [fault for path, thing in public().items() for fault in faults(path, thing)] == []


def test_faults_of_docstrings_are_found() -> None:
    class Bad:
        def silent(self) -> None: ...

        def trails(self) -> None:
            """Return something"""

        def short(self, one: int, two: int) -> None:
            """Return something.

            Args:
                one: the first,
                    on two lines: with a colon.
                three: nobody's.

            Raises:
                ValueError: never.
            """

        def silent_about_arguments(self, one: int, two: int, *rest: int) -> None:
            """Return something."""

        def takes_one(self, one: int, *rest: int, **options: int) -> None:
            """Return something of one."""

        def fails(self) -> None:
            """Return something."""
            if self:
                raise ValueError

        def fails_inside(self) -> Any:
            """Return something that fails."""

            def inside() -> None:
                raise ValueError

            return inside

        def fails_and_says_so(self) -> None:
            """Return something.

            Raises:
                ValueError: always.
            """
            raise ValueError

    Bad.__module__ = "hooked_lm.bad"
    assert faults("Bad", Bad) == [
        "Bad: no docstring",
        "Bad.fails: it raises, and has no Raises",
        "Bad.short: Args has three, which is no parameter",
        "Bad.short: Args lacks two",
        "Bad.silent: no docstring",
        "Bad.silent_about_arguments: no Args, and it takes one, two, rest",
        "Bad.trails: the first line does not end with a period: 'Return something'",
    ]
    assert arguments("Return.\n\nArgs:\n    a, b: both.\n    *c: rest.\n\nRaises:\n    E: no.") == ["a", "b", "c"]
    assert arguments("Return.") is None


# In a browser


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """The address of the site, served on this machine."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: Any) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched() as one:
        yield one


@pytest.fixture
def visit(browser: Any, address: str) -> Iterator[Any]:
    """A function that opens a page of the site. In the end nothing may have gone wrong, and nothing have been asked of
    other machines."""
    wrong: list[str] = []
    contexts = []

    def open_page(path: str, width: int = 1280, scheme: str = "light") -> Any:
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.on("console", lambda message: message.type in ("error", "warning") and wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        allowed = (address, "data:", "blob:", "about:")
        page.on("request", lambda request: request.url.startswith(allowed) or wrong.append(request.url))
        page.goto(address + path)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1280, "light")])
def test_pages_fit_the_window_and_fetch_nothing(visit: Any, width: int, scheme: str) -> None:
    for path in ("", "concepts/hook_points/", "migrating/", "reference/model/", "howto/figures/"):
        page = visit(path, width, scheme)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, path


# The boxes of a notebook's code that are narrower than what stands in them.
CUT = """[...document.querySelectorAll(".jp-InputArea .highlight-ipynb")].filter(
  (box) => box.scrollWidth > box.clientWidth).map((box) => box.textContent)"""


@pytest.mark.parametrize("notebook", [path.stem for path in docs_site.notebooks()])
def test_a_notebook_is_whole_on_a_desk_fits_a_phone_and_fetches_nothing(visit: Any, notebook: str) -> None:
    page = visit(f"notebooks/{notebook}/", 1280)
    assert page.locator(".jp-InputArea .highlight-ipynb").count() > 5
    assert page.evaluate(CUT) == []
    page = visit(f"notebooks/{notebook}/", 390)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    # The figures' letters can be read: they are scrolled.
    assert (
        page.evaluate("Math.min(...[...document.querySelectorAll('.jp-RenderedImage img')].map(i => i.width))") >= 640
    )


def test_search_works_without_a_network(visit: Any) -> None:
    page = visit("")
    # The page makes its index in a worker; with the other tests at work on two processors that can take long.
    page.wait_for_load_state("load")
    page.locator(".md-search__input").click()
    page.locator(".md-search__input").press_sequentially("fold_value_biases", delay=50)
    page.locator(".md-search-result__item a[href*='concepts/processing']").first.wait_for(timeout=90_000)


def test_the_colours_can_be_changed(visit: Any) -> None:
    page = visit("")
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.locator("label[for='__palette_1']").click()
    page.wait_for_function("(before) => getComputedStyle(document.body).backgroundColor !== before", arg=before)
