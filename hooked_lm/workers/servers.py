"""Servers: models behind addresses as workers, those of `hooked-lm serve`."""

from __future__ import annotations

from hooked_lm.hooked_model import HookedModel
from hooked_lm.remote.client import RemoteModel
from hooked_lm.remote.manifest import weights_sha256
from hooked_lm.remote.protocol import RemoteError
from hooked_lm.workers.pool import Pool, WorkerLost

__all__ = ["Servers"]


class Servers(Pool):
    """Workers that are models on servers: `Servers(model, connect(url, token).model("name"), ...)`.

    Args:
        model: the same model in this process, which makes the base run and shares out the cells.
        *there: the models on servers.

    Raises:
        ValueError: one of them has other weights or another config.
    """

    def __init__(self, model: HookedModel, *there: RemoteModel) -> None:
        if not there:
            raise ValueError("Servers takes models on servers: hooked_lm.connect(url).model(name)")
        sha256, config = weights_sha256(model), _config(model.cfg.to_dict())
        for one in there:
            if one.manifest["weights_sha256"] != sha256 or _config(one.manifest["config"]) != config:
                raise ValueError(
                    f"{one!r} is another model than this one, in weights, processing or config: serve the same "
                    "checkpoint with the same processing and dtype"
                )
        super().__init__([_Server(one) for one in there], model)


def _config(fields: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in fields.items() if name not in ("device", "tokenizer_name")}


class _Server:
    def __init__(self, there: RemoteModel) -> None:
        self.there = there

    def run(self, body: bytes) -> bytes:
        try:
            return self.there.run_body(body)[0]
        except ConnectionError as error:
            raise WorkerLost(str(error)) from error
        except RemoteError as error:
            if error.status in (502, 504):
                raise WorkerLost(str(error)) from error
            raise

    def close(self) -> None:
        """A model on a server stays."""
