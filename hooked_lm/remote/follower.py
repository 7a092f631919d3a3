"""The other processes of a served model that is shared out: `python -m hooked_lm.remote.follower SOURCE STORE RANK`."""

from __future__ import annotations

import json
import sys

from hooked_lm.names import UnknownHookError
from hooked_lm.remote.group import Member, end_with_parent
from hooked_lm.remote.source import ModelSource
from hooked_lm.remote.worker import Stopped, introduce, run_job

__all__ = ["follow"]


def follow(source: ModelSource, rank: int, store: str | None) -> None:
    """Run the jobs of the first process, until the group ends.

    Args:
        source: of the model.
        rank: of this process.
        store: as for `Member`.
    """
    member = Member(source, rank, store)
    target = introduce(member.model)[2]

    def watch(number: int, layer: int) -> None:
        if member.agreed(False):
            raise Stopped

    while True:
        head, body = member.receive()
        try:
            run_job(member.model, target, head, body, watch)
        except (ValueError, UnknownHookError, Stopped):
            continue  # as in the first process, which tells the client


if __name__ == "__main__":
    end_with_parent()
    follow(ModelSource(**json.loads(sys.argv[1])), int(sys.argv[3]), sys.argv[2])
