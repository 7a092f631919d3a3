"""Certify every family and write `docs/certificates.json` and, from it and the registry, `docs/families.md`.

python -m scripts.certify_families
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

from hooked_lm import verify
from tests.family_rows import ROWS, Row
from weight_conversion.left_out import LEFT_OUT
from weight_conversion.registry import ALIASES, FAMILIES, family_of

DOCS = Path(__file__).parents[1] / "docs"
FIGURES, TABLE = DOCS / "certificates.json", DOCS / "families.md"
CHECKS = ("activations", "cached decoding", "left padding", "gradients")

_INTRODUCTION = """\
# Supported families

Every family below has been compared with `transformers` site by site: the residual stream before and after every
block, what attention and MLP write, attention patterns, the final norm, logits, decoding with a key-value cache, a
prompt padded on the left, and gradients. The models are tiny and random, with every parameter drawn anew and every
feature within reach (windows shorter than the prompt, soft-caps that bite, more than one expert chosen). The figures
are the largest errors over all sites and variants, relative to the largest value at the site.

Measured with torch {torch} and transformers {transformers} on the CPU by `python -m scripts.certify_families`; what
each variant switches on is in `tests/family_rows`. To certify a checkpoint of your own: `hooked-lm verify PATH`.

| family | architectures | variants | activations and logits | cached | padded | gradients | in float64 |
|---|---|--:|--:|--:|--:|--:|--:|
"""

_ENDING = """
The last column is the largest error in float64. Where it is not below 1e-9, the reference rounds to float32 on its
way (most RMS norms do, whatever the model's precision); "none" means that it cannot run in float64. "newer" marks a
family whose config only a newer transformers has: `tests/test_newer_transformers.py` certifies it there.

transformers has no class for InternLM, InternLM2, Baichuan and EXAONE 3, whose checkpoints come with code of their own.
That code is never run: the weights are a Llama's under other names, so the reference is a Llama with the same weights
(for the Baichuan models with ALiBi, a Llama that is given ALiBi's biases as its mask).

## Short names

Any hub id or local folder of a family above loads. These names stand for hub ids:

"""


def certify(row: Row) -> dict[str, Any]:
    """Return the figures of one tiny model's certificate."""
    with tempfile.TemporaryDirectory() as folder:
        row.save(row.build(), Path(folder))
        certificate = verify(folder, positions=row.pos, reference=row.reference(Path(folder)))
    worst = {
        precision: {check: _worst(certificate.worst(check, precision)) for check in CHECKS}
        for precision in ("float32", "float64")
    }
    return {
        "row": row.id,
        "family": family_of(row.architecture).name,
        "passed": certificate.passed,
        "exact_in_float64": certificate.exact_in_float64,
        "sites": len(certificate.comparisons),
        "worst": worst,
        "not_compared": certificate.not_compared,
    }


def _worst(comparison: Any) -> float | None:
    return None if comparison is None else float(f"{comparison.relative:.1e}")


def family_table(figures: dict[str, Any]) -> str:
    """Return the page of supported families: the registry, with the worst figures of each family's certificates."""
    lines = _INTRODUCTION.format(**figures).splitlines()
    lines += [_line(family, [row for row in figures["rows"] if row["family"] == family.name]) for family in FAMILIES]
    lines += [
        *_ENDING.splitlines(),
        *(f"- `{alias}`: `{hub_id}`" for alias, hub_id in sorted(ALIASES.items())),
        "",
        "## What is left out, and why",
        "",
        *(f"- {kind.title}: {kind.reason}." for kind in LEFT_OUT),
        "",
        "[Adding a family](adding_a_family.md) takes one file, one line and one row.",
    ]
    return "\n".join(lines) + "\n"


def _line(family: Any, rows: list[dict[str, Any]]) -> str:
    def worst(precision: str, *checks: str) -> str:
        values = [row["worst"][precision][check] for row in rows for check in checks]
        measured = [value for value in values if value is not None]
        return f"{max(measured):.0e}" if measured else "none"

    columns = [worst("float32", check) for check in CHECKS] + [worst("float64", *CHECKS)]
    if not rows:  # only a newer transformers has its config
        columns = ["newer"] * len(columns)
    architectures = ", ".join(f"`{name}`" for name in family.architectures)
    return f"| {family.name} | {architectures} | {len(rows)} | {' | '.join(columns)} |"


def main() -> None:
    """Certify every row and write both files."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    torch.manual_seed(0)
    rows = [certify(row) for row in tqdm(ROWS, desc="certifying")]
    figures = {"torch": torch.__version__, "transformers": transformers.__version__, "rows": rows}
    DOCS.mkdir(exist_ok=True)
    FIGURES.write_text(json.dumps(figures, indent=1) + "\n")
    TABLE.write_text(family_table(figures))
    failed = [row["row"] for row in rows if not row["passed"]]
    if failed:
        raise SystemExit(f"certificates failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
