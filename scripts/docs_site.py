"""What the documentation site takes from elsewhere: pages from other folders, and tables and figures from the code.

A hook of MkDocs, named in `mkdocs.yml`. A line `<!-- make: NAME -->` in a page is replaced by what `MAKERS[NAME]`
returns, when the site is built; so nothing that can be read from the code is written down a second time.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from mkdocs.exceptions import PluginError
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File

from hooked_lm import HookedTransformer, HookedTransformerConfig, names

ROOT = Path(__file__).resolve().parents[1]

# Pages of the site that are files elsewhere in the repository.
PAGES_FROM = {
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
}

MARKER = re.compile(r"^<!-- make: (?P<name>[a-z_]+) -->$", flags=re.MULTILINE)

# The scripts that come with a notebook's page for MathJax and Mermaid, which no notebook here uses.
_FETCHING = re.compile(
    r"<script(?: src=\"\"| type=\"text/x-mathjax-config\"| type=\"module\")>(?:(?!</script>).)*</script>", re.DOTALL
)

# A link to a file of the repository that is a page of the site.
_REPOSITORY_LINK = re.compile(r"href=\"(?P<path>(?![a-z]+:)[^\"#]+\.(?:ipynb|md))(?P<anchor>(?:#[^\"]*)?)\"")


# What MkDocs calls


def on_config(config: Any) -> Any:
    """Put the notebooks into the navigation, in their order."""
    section = next(entry["Notebooks"] for entry in config["nav"] if "Notebooks" in entry)
    section += [{title_of(path): f"notebooks/{path.name}"} for path in notebooks()]
    return config


@event_priority(100)  # before the plugin that renders notebooks looks for them
def on_files(files: Any, config: Any) -> Any:
    """Add the notebooks, and the pages that are files elsewhere."""
    for path in notebooks():
        files.append(File(f"notebooks/{path.name}", str(ROOT), config["site_dir"], config["use_directory_urls"]))
    for uri, source in PAGES_FROM.items():
        if files.get_file_from_path(uri) is not None:
            raise PluginError(f"docs/{uri} exists, and scripts/docs_site.py makes the same page of {source}: keep one")
        files.append(File.generated(config, uri, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Replace the markers of a page by what they stand for."""
    return filled(markdown, page.file.src_uri)


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Turn a notebook's links to notebooks and to pages, as they are in the repository, into those of the site."""
    if not page.file.src_uri.endswith(".ipynb"):
        return html

    def link(match: re.Match[str]) -> str:
        path = (ROOT / "notebooks" / match["path"]).resolve()
        uri = str(path.relative_to(ROOT)).removeprefix("docs/")
        target = files.get_file_from_path(uri)
        if target is None:
            raise PluginError(f"{page.file.src_uri} links to {match['path']}, which is no page of this site")
        return f'href="{target.url_relative_to(page.file)}{match["anchor"]}"'

    return _REPOSITORY_LINK.sub(link, html)


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Take out of a notebook's page what would be fetched from elsewhere, were there formulas or charts to draw."""
    return _FETCHING.sub("", output) if page.file.src_uri.endswith(".ipynb") else output


def filled(markdown: str, where: str) -> str:
    """Return a page with its markers replaced."""

    def made(match: re.Match[str]) -> str:
        if match["name"] not in MAKERS:
            raise PluginError(f"{where}: nothing makes {match['name']!r}; there are {', '.join(MAKERS)}")
        return MAKERS[match["name"]]()

    return MARKER.sub(made, markdown)


# Notebooks


def notebooks() -> list[Path]:
    """Return the notebooks there are, in the order of their numbers."""
    return sorted((ROOT / "notebooks").glob("*.ipynb"))


@cache
def opening(path: Path) -> tuple[str, str]:
    """Return a notebook's title and the first paragraph below it."""
    cells = json.loads(path.read_text())["cells"]
    text = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    match = re.search(r"^# (?P<title>.+)\n+(?P<first>(?:[^\n]+\n?)*)", text, flags=re.MULTILINE)
    if match is None:
        raise PluginError(f"{path.name} has no title: its text must begin with a line '# ...'")
    return match["title"].strip(), " ".join(match["first"].split())


def title_of(path: Path) -> str:
    """Return a notebook's title."""
    return opening(path)[0]


def notebook_table() -> str:
    """Return a table of the notebooks: title and first paragraph."""
    if not notebooks():
        return "There are none in this build."
    rows = [f"| [{title_of(path)}]({path.name}) | {opening(path)[1]} |" for path in notebooks()]
    return "\n".join(["| notebook | what it is about |", "|---|---|", *rows])


# Hook points

_SMALL: dict[str, Any] = {"n_layers": 2, "d_model": 24, "n_heads": 4, "d_head": 5, "n_ctx": 8, "d_vocab": 11}
_LLAMA: dict[str, Any] = {
    "act_fn": "silu",
    "gated_mlp": True,
    "normalization_type": "RMS",
    "positional_embedding_type": "rotary",
    "rotary_dim": 4,
    "n_key_value_heads": 2,
}

# One small model for every kind of block that has hook points of its own. No two axes are of one size.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "GPT-2": {"act_fn": "gelu_new"},
    "attention-only": {"attn_only": True, "normalization_type": None},
    "Pythia": {
        "act_fn": "gelu",
        "parallel_attn_mlp": True,
        "positional_embedding_type": "rotary",
        "rotary_dim": 4,
    },
    "Llama": _LLAMA,
    "Gemma 2": {**_LLAMA, "norm_placement": "before_and_after"},
    "Qwen 3": {**_LLAMA, "use_qk_norm": True},
    "Bloom": {"act_fn": "gelu_fast", "positional_embedding_type": "alibi", "post_embedding_ln": True},
    "Mixtral": {**_LLAMA, "num_experts": 9, "experts_per_token": 3},
    "Qwen 2 MoE": {
        **_LLAMA,
        "num_experts": 3,
        "experts_per_token": 2,
        "d_shared_expert": 13,
        "shared_expert_gate": True,
    },
    "MiniCPM3": {**_LLAMA, "n_key_value_heads": None, "d_latent_kv": 7, "d_latent_q": 6},
    "AFMoE": {**_LLAMA, "attention_gate": True},
    "ModernBERT decoder": {"act_fn": "gelu", "gated_mlp": True, "unembed_act_fn": "gelu", "first_norm": False},
    "LongCat-Flash": {**_LLAMA, "num_experts": 9, "experts_per_token": 3, "shortcut_experts": True},
    "SoLU": {"act_fn": "solu_ln"},
}

# The same site in every norm.
_NORM = {
    "hook_scale": "what the norm divides by",
    "hook_normalized": "normalised, before gain and bias",
}

# What each hook point shows, by its name without the block.
MEANINGS: dict[str, str] = {
    "hook_tokens": "the tokens, as integers; may be replaced",
    "hook_embed": "the token embeddings",
    "hook_pos_embed": "the position embeddings, where they are learned and added",
    "embed.ln": "norm of the embeddings",
    "hook_resid_pre": "the residual stream that enters the block",
    "hook_attn_in": "a copy of the stream for each head, before the norm",
    "hook_q_input": "what each head's queries read, before the norm",
    "hook_k_input": "what each head's keys read, before the norm",
    "hook_v_input": "what each head's values read, before the norm",
    "ln1": "norm of what attention reads",
    "attn.latent_q_norm": "norm of the latent that queries are read from",
    "attn.hook_latent_q": "the latent that queries are read from (latent attention)",
    "attn.latent_kv_norm": "norm of the latent that keys and values are read from",
    "attn.hook_latent_kv": "the latent that keys and values are read from (latent attention)",
    "attn.hook_q": "queries, after the bias, before rotation",
    "attn.hook_k": "keys, after the bias, before rotation",
    "attn.hook_v": "values",
    "attn.q_norm": "norm of the queries",
    "attn.k_norm": "norm of the keys",
    "attn.hook_rot_q": "queries, rotated",
    "attn.hook_rot_k": "keys, rotated",
    "attn.hook_attn_scores": "scores, scaled and masked (minus infinity), before softmax",
    "attn.hook_pattern": "the attention pattern: each query's row sums to 1 (less with attention sinks)",
    "attn.hook_gate": "what the mixed values are multiplied by, between 0 and 1 (gated attention)",
    "attn.hook_z": "the values, mixed by the pattern, and multiplied by the gate where there is one",
    "attn.hook_result": "what each head writes; with `b_O` they sum to `hook_attn_out`",
    "ln1_post": "norm of what attention writes",
    "hook_attn_out": "what attention adds to the stream",
    "hook_resid_mid": "the stream between attention and MLP",
    "hook_mlp_in": "the MLP's own copy of its input, before the norm",
    "ln2": "norm of what the MLP reads",
    "mlp.hook_pre": "the hidden layer before its activation function (of a gated MLP: the gate)",
    "mlp.hook_pre_linear": "the other factor of a gated MLP",
    "mlp.hook_mid": "after the activation function, before the MLP's own norm",
    "mlp.ln": "norm inside the MLP",
    "mlp.hook_post": "the hidden layer that `W_out` reads",
    "mlp.hook_expert_weights": "the router's weight of every expert; an edit changes who is chosen too",
    "mlp.hook_expert_indices": "which experts were chosen, as integers",
    "shortcut.hook_expert_weights": "the router's weight of every expert whose output the next block adds",
    "shortcut.hook_expert_indices": "which of those experts were chosen, as integers",
    "hook_shortcut_out": "what the experts beside the MLP write, which the next block adds",
    "mlp.shared.hook_pre": "the shared expert's gate, before its activation function",
    "mlp.shared.hook_pre_linear": "the other factor of the shared expert",
    "mlp.shared.hook_post": "the hidden layer of the shared expert",
    "ln2_post": "norm of what the MLP writes",
    "hook_mlp_out": "what the MLP adds to the stream",
    "hook_resid_post": "the residual stream that leaves the block",
    "ln_final": "the final norm",
    "unembed.transform.hook_pre": "the layer before the unembedding, before its activation function",
    "unembed.transform.hook_post": "the layer before the unembedding, after its activation function",
    "unembed.transform.ln": "norm of what the unembedding reads",
    "unembed.hook_in": "what the unembedding reads",
    "unembed.hook_out": "the logits",
}


@cache
def models() -> dict[str, HookedTransformer]:
    """Return a small random model of every architecture in the table."""
    return {
        name: HookedTransformer(HookedTransformerConfig(**{**_SMALL, **fields, "seed": 0}))
        for name, fields in ARCHITECTURES.items()
    }


def general(name: str) -> str:
    """Return a hook name with its layer, and its expert, left open: `blocks.{l}.attn.hook_z`."""
    return re.sub(r"\bexperts\.\d+", "experts.{e}", re.sub(r"\bblocks\.\d+", "blocks.{l}", name))


def site_of(name: str) -> str:
    """Return the entry of `MEANINGS` that a hook point goes by: its name without the block, or its norm's."""
    site = name.removeprefix("blocks.{l}.")
    module, _, last = site.rpartition(".")
    site = module if last in _NORM else site
    if site not in MEANINGS:
        raise PluginError(f"MEANINGS in scripts/docs_site.py does not say what {name!r} shows")
    return site


def meaning(name: str) -> str:
    """Return what a hook point shows."""
    of_norm = _NORM.get(name.rpartition(".")[2])
    return MEANINGS[site_of(name)] + (f": {of_norm}" if of_norm else "")


def hook_points() -> dict[str, tuple[set[str], str, bool]]:
    """Return, for every hook name there is, the architectures that have it, its axes, and whether it is on demand."""
    found: dict[str, tuple[set[str], str, bool]] = {}
    for architecture, model in models().items():
        for name, point in model.hook_dict.items():
            named = " ".join(point.axes)
            where, axes, _ = found.setdefault(general(name), (set(), named, point.on_demand))
            if axes != named:
                raise PluginError(f"{name} has axes {point.axes!r} in {architecture} and {axes!r} elsewhere")
            where.add(architecture)
    return found


def ordered(found: dict[str, Any]) -> list[str]:
    """Return hook names in the order in which a run comes past them."""
    sites = list(MEANINGS)
    return sorted(found, key=lambda name: (sites.index(site_of(name)), name.endswith("hook_normalized")))


def where(architectures: set[str]) -> str:
    """Say which of the architectures of the table have a hook point."""
    missing = [name for name in ARCHITECTURES if name not in architectures]
    if not missing:
        return "all"
    if len(missing) <= 2:
        return f"all but {', '.join(missing)}"
    return ", ".join(name for name in ARCHITECTURES if name in architectures)


def hook_point_table() -> str:
    """Return the tables of all hook points, read from small models of several architectures."""
    found = hook_points()
    parts = {"Before the blocks": "hook_", "In block `l`, after `blocks.{l}.`": "blocks.{l}.", "After the blocks": ""}
    text, left = [], ordered(found)
    for title, prefix in parts.items():
        rows = [name for name in left if name.startswith(prefix)]
        left = [name for name in left if name not in rows]
        text += [f"### {title}", "", "| name | shape | what it shows | in |", "|---|---|---|---|"]
        for name in rows:
            architectures, axes, on_demand = found[name]
            mark = " *(on demand)*" if on_demand else ""
            shown = name.removeprefix("blocks.{l}.")
            text.append(f"| `{shown}` | `{axes}` | {meaning(name)}{mark} | {where(architectures)} |")
        text.append("")
    return '<div class="wide" markdown>\n\n' + "\n".join(text) + "\n</div>"


def axis_table() -> str:
    """Return the glossary of axis names."""
    rows = [f"| `{axis}` | {what} |" for axis, what in names.AXES.items()]
    return "\n".join(["| axis | what it counts |", "|---|---|", *rows])


# Figures


def block_diagram() -> str:
    """Return the drawing of a block and its hook points, as part of the page, so that it takes the page's colours."""
    drawing = (ROOT / "docs/assets/block.svg").read_text().replace("\n", "")
    return f'<figure class="diagram">{drawing}</figure>'


def induction_pattern() -> str:
    """Return the attention pattern of the bundled model's induction head, drawn."""
    model = HookedTransformer.from_pretrained("demo-induction-2l")
    block = torch.arange(1, 21)
    tokens = torch.cat((torch.zeros(1, dtype=torch.long), block, block))[None]
    with torch.inference_mode():
        _, kept = model.run_with_cache(tokens, names_filter="blocks.1.attn.hook_pattern")
    pattern = kept["pattern", 1][0]
    head = int(pattern.diagonal(offset=-19, dim1=-2, dim2=-1).mean(-1).argmax())
    size, squares = 10, []
    for query, row in enumerate(pattern[head].tolist()):
        for key, weight in enumerate(row):
            if weight > 0.02:
                place = f'x="{size * key}" y="{size * query}" width="{size}" height="{size}"'
                label = html.escape(f"position {query} looks at {key}: {weight:.2f}")
                squares.append(f'<rect {place} fill-opacity="{weight:.2f}"><title>{label}</title></rect>')
    edge = size * tokens.shape[1]
    drawing = (
        f'<svg viewBox="-1 -1 {edge + 2} {edge + 2}" role="img" aria-label="Attention pattern of head 1.{head}">'
        f'<rect class="frame" width="{edge}" height="{edge}"/><path class="causal" d="M0 0L{edge} {edge}H0z"/>'
        f"{''.join(squares)}</svg>"
    )
    caption = (
        f"Where head 1.{head} of <code>demo-induction-2l</code> looks, on twenty tokens that come twice. Rows are the "
        "positions that look, columns the positions they look at. In the second half every token looks at the one that "
        "came after its earlier copy: the lower diagonal. In the first half there is no copy to find."
    )
    return f'<figure class="pattern">{drawing}<figcaption>{caption}</figcaption></figure>'


MAKERS: dict[str, Callable[[], str]] = {
    "axes": axis_table,
    "block_diagram": block_diagram,
    "hook_points": hook_point_table,
    "induction_pattern": induction_pattern,
    "notebooks": notebook_table,
}
