"""Workers: several models that score parts of a sweep, in this process, in others, on servers or as Ray actors.

with Spawned(model, 2) as workers:
    scores = sweep(model, tokens, cells, metric, workers=workers)
"""

from hooked_lm.sweep.workers import WorkerError
from hooked_lm.workers.local import InProcess
from hooked_lm.workers.pool import Pool, Worker, WorkerLost
from hooked_lm.workers.rays import RayActors
from hooked_lm.workers.servers import Servers
from hooked_lm.workers.spawned import Spawned

__all__ = ["InProcess", "Pool", "RayActors", "Servers", "Spawned", "Worker", "WorkerError", "WorkerLost"]
