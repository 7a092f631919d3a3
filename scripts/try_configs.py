"""Try published configs: shrink each, build it with random weights in `transformers`, load it here, compare the logits.

python -m scripts.try_configs CONFIGS.jsonl

Each line of the file is `{"source": where the config was found, "config": its fields}`. Prints each config that is not
equal with the reason, and the counts by outcome.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from hooked_lm import CheckpointError, HookedTransformer
from scripts.shrinking import VOCABULARY, shrunk
from tests.family_rows.row import randomise_reference
from weight_conversion.fields import HFConfig
from weight_conversion.registry import family_of

__all__ = ["OUTCOMES", "Outcome", "try_config", "try_file"]

OUTCOMES = ("equal", "different", "refused", "not supported", "no reference")
# The largest difference of logits, relative to the largest logit, that counts as equal.
TOLERANCE = 1e-4
POSITIONS = 24


@dataclass(frozen=True)
class Outcome:
    """What became of one config.

    Attributes:
        kind: one of `OUTCOMES`: the logits are equal or different; the architecture is supported and this config was
            refused; the architecture is not supported; `transformers` itself cannot build such a model.
        reason: the error or the difference.
        warned: the warnings of loading.
    """

    kind: str
    reason: str = ""
    warned: tuple[str, ...] = ()


def try_config(config: HFConfig, folder: Path) -> Outcome:
    """Return what becomes of one config.

    Args:
        config: the fields, as published.
        folder: an empty folder for the shrunk checkpoint.
    """
    small = shrunk(config)
    reference, failure = None, ""
    try:
        reference = _reference(small, folder)
    except Exception as error:  # a config of anyone's may fail in any way
        failure = f"{type(error).__name__}: {error}"
    # The config as published: transformers writes it without the fields that it drops.
    (folder / "config.json").write_text(json.dumps(small))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            model = HookedTransformer.from_pretrained_no_processing(folder)
        except CheckpointError as error:
            if not _is_supported(small):
                return Outcome("not supported", str(error))
            # Without a reference there are no weights, and to find none is then no refusal.
            failed = reference is None and "has no weights" in str(error)
            return Outcome("no reference", failure) if failed else Outcome("refused", str(error))
    assert reference is not None, "the model has been loaded from the weights of its reference"
    warned = tuple(str(warning.message) for warning in caught if warning.category is UserWarning)
    tokens = torch.randint(3, VOCABULARY, (2, POSITIONS), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, ours = reference(tokens).logits, model(tokens)
    difference = ((ours - expected).abs().max() / expected.abs().max().clamp(min=1.0)).item()
    kind = "equal" if difference <= TOLERANCE else "different"  # a NaN is different
    return Outcome(kind, f"logits differ by {difference:.0e}", warned)


def _reference(small: HFConfig, folder: Path) -> torch.nn.Module:
    """Return the transformers model of a config, every parameter random, and save its weights."""
    (folder / "config.json").write_text(json.dumps(small))
    hf_config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    reference = AutoModelForCausalLM.from_config(
        hf_config, attn_implementation="eager", dtype=torch.float32, trust_remote_code=False
    )
    randomise_reference(reference.eval())
    reference.save_pretrained(folder)
    return reference


def _is_supported(config: HFConfig) -> bool:
    """Whether the architecture of a config has a family here and a class in transformers."""
    try:
        family_of((config.get("architectures") or [""])[0])
    except CheckpointError:
        return False
    return True


def try_file(path: Path) -> Iterator[tuple[str, HFConfig, Outcome]]:
    """Yield the source, the config and the outcome of each line of a file of configs."""
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        with tempfile.TemporaryDirectory() as folder:
            yield entry["source"], entry["config"], try_config(entry["config"], Path(folder))


def report(outcomes: Iterable[tuple[str, HFConfig, Outcome]]) -> Counter[str]:
    """Print every config with its outcome, then the counts; return the counts."""
    counts: Counter[str] = Counter()
    for source, config, outcome in outcomes:
        counts[outcome.kind] += 1
        architecture = (config.get("architectures") or [config.get("model_type")])[0]
        print(f"{outcome.kind}: {architecture} ({source}): {' '.join(outcome.reason.split())}")
        for text in outcome.warned:
            print(f"    warned: {text}")
    print()
    for kind in OUTCOMES:
        print(f"{counts[kind]:4d} {kind}")
    return counts


def main() -> None:
    """Try the configs of the file that the command line names; fail if one gave other logits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="a .jsonl file of configs")
    transformers.logging.set_verbosity_error()
    counts = report(try_file(parser.parse_args().path))
    raise SystemExit(1 if counts["different"] else 0)


if __name__ == "__main__":
    main()
