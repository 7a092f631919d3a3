"""RayActors: workers on the machines of a Ray cluster (extra `ray`)."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

from hooked_lm._support.extras import require
from hooked_lm.hooked_model import HookedModel
from hooked_lm.sweep.engine import run_part
from hooked_lm.workers.model_file import FILES, read_model, write_model
from hooked_lm.workers.pool import Pool, WorkerLost

__all__ = ["RayActors"]

_OBJECT_STORE = 200 * 2**20  # bytes, of a cluster that is started here


class RayActors(Pool):
    """Workers that are Ray actors, each with the model. Bodies and answers are bytes.

    Args:
        model: a `HookedTransformer`.
        n_workers: how many actors.
        address: of a cluster, as for `ray.init`; by default the one that this process is connected to, else a local
            one is started, without a dashboard.
        num_cpus, num_gpus: of each actor. With a GPU it computes there.
    """

    def __init__(
        self,
        model: HookedModel,
        n_workers: int = 2,
        *,
        address: str | None = None,
        num_cpus: int = 1,
        num_gpus: int = 0,
    ) -> None:
        ray = require("ray", "RayActors", "ray")
        self._ray, self._started = ray, not ray.is_initialized()
        if self._started:
            local = {} if address else {"include_dashboard": False, "object_store_memory": _OBJECT_STORE}
            ray.init(address=address, log_to_driver=False, **local)
        with tempfile.TemporaryDirectory() as folder:
            write_model(model, folder)
            files = ray.put({name: Path(folder, name).read_bytes() for name in FILES})
        actor = ray.remote(num_cpus=num_cpus, num_gpus=num_gpus)(_Actor)
        made = [actor.remote(files, "cuda" if num_gpus else "cpu", num_cpus) for _ in range(n_workers)]
        super().__init__([_Ray(ray, one.run.remote, partial(ray.kill, one)) for one in made], model)

    def close(self) -> None:
        """End the actors, and a cluster that was started here."""
        super().close()
        if self._started:
            self._ray.shutdown()


class _Actor:
    """What runs in the cluster."""

    def __init__(self, files: dict[str, bytes], device: str, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        with tempfile.TemporaryDirectory() as folder:
            for name, content in files.items():
                Path(folder, name).write_bytes(content)
            self.model = read_model(folder, device)

    def run(self, body: bytes) -> bytes:
        return run_part(self.model, body)


class _Ray:
    """An actor, seen from this process: what to call to run a body there, and to end it."""

    def __init__(self, ray: ModuleType, run: Callable[[bytes], object], end: Callable[[], object]) -> None:
        self._ray, self._run, self._end = ray, run, end

    def run(self, body: bytes) -> bytes:
        try:
            answer: bytes = self._ray.get(self._run(body))
        except self._ray.exceptions.RayActorError as error:
            raise WorkerLost(f"a Ray actor is lost: {error}") from error
        except self._ray.exceptions.RayTaskError as error:
            raise RuntimeError(f"{type(error.cause).__name__}: {error.cause}") from error
        return answer

    def close(self) -> None:
        self._end()
