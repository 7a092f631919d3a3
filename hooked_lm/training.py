"""A small trainer: AdamW, warm-up and cosine, clipping, checkpoints written whole or not at all, metrics as JSONL.

    config = TrainingConfig(steps=1000, batch=32, lr=1e-3)
    train(model, tokens, config, folder="runs/first")

Run it again after an interruption, and it goes on from the last checkpoint to the very same weights: every batch is a
function of the seed and the step, and the checkpoint holds everything else that later steps depend on.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor, nn
from tqdm import tqdm

from hooked_lm._support.plain_data import PlainData
from hooked_lm._support.reading import parse_json
from hooked_lm.hooked_model import HookedModel

__all__ = [
    "CHECKPOINT",
    "METRICS",
    "Batches",
    "LossFn",
    "MetricsFn",
    "Record",
    "TrainingConfig",
    "make_optimizer",
    "next_token_loss",
    "row_batches",
    "train",
]

Batches = Callable[[int], object]
# The model and a batch to a scalar, and the model to numbers: they are the caller's, with the types that these have.
LossFn = Callable[..., Tensor]
MetricsFn = Callable[..., Mapping[str, float]]
Record = dict[str, int | float]

CHECKPOINT = "checkpoint.pt"
METRICS = "metrics.jsonl"
# The intervals of logging and saving do not change the weights, so a run may go on with other ones.
_FREE_TO_CHANGE = ("log_every", "evaluate_every", "checkpoint_every")


@dataclass(frozen=True)
class TrainingConfig:
    """All settings of a run besides the model and the data.

    Attributes:
        steps: optimizer steps.
        batch: rows in a step, where `train` is given rows of tokens. Batches from a function may have any size.
        lr: the learning rate at its peak.
        warmup: steps that it takes to rise to the peak, in a straight line.
        final_lr: the share of the peak after the last step; half a cosine leads down to it.
        weight_decay: of matrices; biases, gains and other vectors have none.
        clip: the largest norm of the gradient; a longer gradient is scaled down to it. None: no limit.
        betas: AdamW's.
        seed: of the order of the rows, and of torch's generator as the run starts.
        log_every: steps between metrics.
        evaluate_every: steps between calls of the `metrics` function; 0: after the last step only.
        checkpoint_every: steps between checkpoints; 0: after the last step only.

    Raises:
        ValueError: a value is out of range; the message names it and its range.
    """

    steps: int
    batch: int = 32
    lr: float = 1e-3
    warmup: int = 100
    final_lr: float = 0.1
    weight_decay: float = 0.1
    clip: float | None = 1.0
    betas: tuple[float, float] = (0.9, 0.95)
    seed: int = 0
    log_every: int = 10
    evaluate_every: int = 0
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        for name, least in (
            *(("steps", 1), ("batch", 1), ("warmup", 0), ("log_every", 1), ("evaluate_every", 0)),
            *(("checkpoint_every", 0), ("seed", 0)),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} is a whole number, {least} or more, not {value!r}")
        if self.warmup > self.steps:
            raise ValueError(f"warmup is {self.warmup} steps, which is more than the run's {self.steps}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr is a positive number, not {self.lr!r}")
        if not 0 <= self.final_lr <= 1:
            raise ValueError(f"final_lr is a part of lr, 0 to 1, not {self.final_lr!r}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay is 0 or more, not {self.weight_decay!r}")
        if self.clip is not None and not 0 < self.clip < math.inf:
            raise ValueError(f"clip is a positive number or None, not {self.clip!r}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas are two numbers, 0 or more and less than 1, not {self.betas!r}")

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0.

        It is `lr * (step + 1) / warmup` while that is below the peak, and then
        `lr * (final_lr + (1 - final_lr) * (1 + cos(pi * t)) / 2)` with t from 0 after the warm-up to 1 at the end.
        """
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        t = (step + 1 - self.warmup) / (self.steps - self.warmup)
        return self.lr * (self.final_lr + (1 - self.final_lr) * (1 + math.cos(math.pi * min(t, 1.0))) / 2)


def row_batches(rows: Int[Tensor, "row pos"], batch: int, seed: int) -> Batches:
    """Return the function from a step to its batch [batch pos], which passes over all rows in a new order each time.

    Rows that do not fill a batch wait for the next pass, which orders all rows anew.

    Args:
        rows: the data.
        batch: rows at a time.
        seed: of the random orders.

    Raises:
        ValueError: there are fewer rows than a batch has.
    """
    if rows.ndim != 2 or len(rows) < batch:
        raise ValueError(
            f"batches of {batch} rows need at least {batch} rows of tokens [row pos], got shape {tuple(rows.shape)}"
        )
    per_pass = len(rows) // batch

    def batch_of(step: int) -> Tensor:
        turn, place = divmod(step, per_pass)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + turn)
        order = torch.randperm(len(rows), generator=generator)[place * batch : (place + 1) * batch]
        return rows[order.to(rows.device)]

    return batch_of


def next_token_loss(model: HookedModel, batch: Tensor) -> Tensor:
    """Return the mean next-token loss of tokens [batch pos], in nats: what `train` minimizes unless told otherwise.

    Args:
        model: a `HookedTransformer`.
        batch: tokens [batch pos].
    """
    loss: Tensor = model(batch, return_type="loss")
    return loss


def make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """Return AdamW over the parameters that are trained, with weight decay on the matrices.

    Biases [head d_head] have two axes and are no matrices; they are recognised by their name, `b_Q` or `bias`.

    Args:
        model: whose parameters.
        config: for its `lr`, `betas` and `weight_decay`.

    Raises:
        ValueError: no parameter requires a gradient.
    """
    named = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
    if not named:
        raise ValueError("there is nothing to train: no parameter of this model requires a gradient")
    matrices = [value for name, value in named if _is_matrix(name, value)]
    others = [value for name, value in named if not _is_matrix(name, value)]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=config.lr, betas=config.betas)


def _is_matrix(name: str, value: Tensor) -> bool:
    return value.ndim >= 2 and not name.rpartition(".")[2].startswith(("b_", "bias"))


def train(
    model: nn.Module,
    batches: Batches | Int[Tensor, "row pos"],
    config: TrainingConfig,
    folder: str | Path | None = None,
    loss_fn: LossFn | None = None,
    metrics: MetricsFn | None = None,
    resume: bool = True,
    verbose: bool = True,
) -> list[Record]:
    """Train a model in place, on the device its parameters are on, and return what was logged.

    Args:
        model: any module; the default loss takes a `HookedTransformer`.
        batches: a function from a step, counted from 0, to the batch that `loss_fn` takes: tensors, or tuples or
            dictionaries of tensors, which are moved to the model's device. It must depend on the step alone, so that a
            run can start again at any step. Or rows of tokens, `config.batch` of them in each step.
        config: the run's settings.
        folder: the folder of the checkpoint and the metrics; None keeps neither.
        loss_fn: `(model, batch)` to a scalar; by default the next-token loss.
        metrics: called with the model in eval mode and without gradients, every `config.evaluate_every` steps and after
            the last; its result is logged.
        resume: go on from the folder's checkpoint, if it has one. False starts over.
        verbose: show a progress bar.

    Returns:
        A record for each logged step: `step`, the steps done; `loss`, the mean since the last record, in nats for the
        default loss; `lr`; `grad_norm`, before clipping, of that step; and the numbers from `metrics`. The file
        `metrics.jsonl` holds the same, one JSON object a line.

    Raises:
        ValueError: the checkpoint in the folder is of a run with other settings, or of another model.
        FloatingPointError: the loss or the gradient is no longer finite; the message names the step. The last
            checkpoint stays.
    """
    run = _Run(model, config, None if folder is None else Path(folder), verbose)
    batch_of = row_batches(batches, config.batch, config.seed) if isinstance(batches, Tensor) else batches
    mode = model.training
    # The run seeds torch's generator, for dropout and the like; afterwards the generator's state is restored.
    with run.own_randomness():
        run.begin(resume)
        model.train()
        try:
            for step in run.remaining():
                run.take_step(step, batch_of(step), loss_fn or next_token_loss)
                run.record(step + 1, metrics)
                if step + 1 == config.steps or (config.checkpoint_every and (step + 1) % config.checkpoint_every == 0):
                    run.save(step + 1)
        finally:
            model.train(mode)
    return run.records


class _Run:
    """The state of a training run: the step, the optimizer, the records."""

    def __init__(self, model: nn.Module, config: TrainingConfig, folder: Path | None, verbose: bool) -> None:
        self.model, self.config, self.folder, self.verbose = model, config, folder, verbose
        self.optimizer = make_optimizer(model, config)
        self.device = next(model.parameters()).device
        self.step = 0
        # The losses since the last record.
        self.losses: list[float] = []
        self.grad_norm = math.nan
        self.records: list[Record] = []

    def begin(self, resume: bool) -> None:
        """Start from the checkpoint, or from the model as it is."""
        torch.manual_seed(self.config.seed)
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / CHECKPOINT
        if resume and path.is_file():
            self._restore(path)
        else:
            path.unlink(missing_ok=True)
        self._keep_records_up_to(self.step)

    def remaining(self) -> Iterator[int]:
        """Yield the steps that are left, with a progress bar."""
        steps = range(self.step, self.config.steps)
        with tqdm(steps, initial=self.step, total=self.config.steps, disable=not self.verbose, desc="train") as bar:
            for step in bar:
                yield step
                if self.records:
                    bar.set_postfix_str(f"loss {self.records[-1]['loss']:.3f}", refresh=False)

    def take_step(self, step: int, batch: object, loss_fn: LossFn) -> None:
        """Change the weights once."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate(step)
        loss = loss_fn(self.model, _on_device(batch, self.device))
        self._require_finite(loss, "loss", step)
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        trained = [value for group in self.optimizer.param_groups for value in group["params"]]
        norm = nn.utils.clip_grad_norm_(trained, math.inf if self.config.clip is None else self.config.clip)
        self._require_finite(norm, "gradient's norm", step)
        self.optimizer.step()
        self.losses.append(loss.item())
        self.grad_norm = norm.item()

    def own_randomness(self) -> AbstractContextManager[None]:
        """Return a context after which torch's generators, of the CPU and of the run's device, are as they were."""
        return torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else [])

    def _require_finite(self, value: Tensor, what: str, step: int) -> None:
        if not bool(torch.isfinite(value)):
            raise FloatingPointError(
                f"the {what} is {value.item()} at step {step}, with a learning rate of "
                f"{self.config.learning_rate(step):g}: try a lower lr, a longer warmup or a smaller clip"
            )

    def record(self, done: int, metrics: MetricsFn | None) -> None:
        """Log after `done` steps, if it is time to."""
        config, last = self.config, done == self.config.steps
        evaluate = metrics is not None and (last or bool(config.evaluate_every and done % config.evaluate_every == 0))
        if not (last or evaluate or done % config.log_every == 0):
            return
        record: Record = {
            "step": done,
            "loss": sum(self.losses) / len(self.losses),
            "lr": config.learning_rate(done - 1),
            "grad_norm": self.grad_norm,
        }
        if evaluate and metrics is not None:
            self.model.eval()
            with torch.no_grad(), self.own_randomness():
                record |= {name: float(value) for name, value in metrics(self.model).items()}
            self.model.train()
        self.losses = []
        self.records.append(record)
        if self.folder is not None:
            with (self.folder / METRICS).open("a") as file:
                file.write(json.dumps(record) + "\n")

    def save(self, done: int) -> None:
        """Write the checkpoint in one step: an interruption leaves the old file or the new one, never a part."""
        if self.folder is None:
            return
        state = {
            "config": asdict(self.config),
            "step": done,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "losses": self.losses,
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }
        written = self.folder / f"{CHECKPOINT}.new"
        with written.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        written.replace(self.folder / CHECKPOINT)

    def _restore(self, path: Path) -> None:
        state = _read_checkpoint(path)
        self._require_same_run(path, state["config"])
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{path} is of another model: {error}") from error
        self.step, self.losses = state["step"], state["losses"]
        torch.set_rng_state(state["rng"])
        if self.device.type == "cuda" and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)

    def _require_same_run(self, path: Path, saved: Mapping[str, object]) -> None:
        ours = asdict(self.config)
        differ = [
            f"{field.name} {saved.get(field.name)!r} (now {ours[field.name]!r})"
            for field in fields(self.config)
            if field.name not in _FREE_TO_CHANGE and saved.get(field.name) != ours[field.name]
        ]
        if differ:
            raise ValueError(
                f"{path} is of a run with {', '.join(differ)}: give the same settings to go on with it, another folder "
                "to keep it, or resume=False to start over"
            )

    def _keep_records_up_to(self, step: int) -> None:
        """Read the metrics that belong to the steps done, and drop those of steps that will be done again."""
        assert self.folder is not None
        path = self.folder / METRICS
        lines = path.read_text().splitlines() if path.is_file() else []
        self.records = [record for record in map(_parsed, lines) if record is not None and record["step"] <= step]
        written = self.folder / f"{METRICS}.new"
        written.write_text("".join(json.dumps(record) + "\n" for record in self.records))
        written.replace(path)


def _read_checkpoint(path: Path) -> PlainData:
    """The state that `save` has written.

    Raises:
        ValueError: the file holds something else, or is damaged.
    """
    parts = {"config", "step", "model", "optimizer", "losses", "rng", "cuda_rng"}
    otherwise = "Give another folder, or resume=False to start over"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes torch.load raise errors of many types
        raise ValueError(f"{path} is damaged or no training checkpoint: {error}. {otherwise}") from error
    if not isinstance(state, dict) or not parts <= state.keys() or not isinstance(state["config"], dict):
        raise ValueError(f"{path} is no training checkpoint, which holds {', '.join(sorted(parts))}. {otherwise}")
    return state


def _parsed(line: str) -> Record | None:
    """A record; None for a line that an interruption has cut short."""
    try:
        record = parse_json(line, "the line")
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _on_device(batch: object, device: torch.device) -> object:
    """The batch with every tensor in it moved to the device."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, tuple | list):
        parts = [_on_device(part, device) for part in batch]
        make: Callable[..., object] = type(batch)
        return make(*parts) if hasattr(batch, "_fields") else make(parts)
    if isinstance(batch, Mapping):
        return {name: _on_device(part, device) for name, part in batch.items()}
    return batch
