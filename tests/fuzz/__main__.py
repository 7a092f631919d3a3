"""Run cases until the time is up: `python -m tests.fuzz --minutes 20`."""

from __future__ import annotations

import argparse
import collections
import multiprocessing
import sys
import time

from tests.fuzz.running import run_case, work
from tests.fuzz.ways import WAYS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--workers", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--start", type=int, default=int(time.time()), help="the first seed; by default the clock's")
    parser.add_argument("--ways", nargs="+", choices=sorted(WAYS), default=sorted(WAYS), metavar="WAY")
    parser.add_argument("--seed", type=int, help="run the cases of one seed only")
    options = parser.parse_args()
    if options.seed is not None:
        found = [(way, options.seed, run_case(way, options.seed)) for way in options.ways]
        counts, findings = collections.Counter(options.ways), [(w, s, text) for w, s, text in found if text]
    else:
        until = time.monotonic() + 60 * options.minutes
        jobs = [(options.start + one, options.workers, options.ways, until) for one in range(options.workers)]
        with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
            results = pool.starmap(work, jobs)
            pool.close()
            pool.join()
        counts = sum((one for one, _ in results), collections.Counter())
        findings = [finding for _, some in results for finding in some]
    for way, count in sorted(counts.items()):
        sys.stdout.write(f"{count:8,}  {way}\n")
    sys.stdout.write(f"{counts.total():8,}  cases, {len(findings)} findings\n")
    for way, seed, wrong in findings:
        sys.stdout.write(f"\npython -m tests.fuzz --seed {seed} --ways {way}\n{wrong}\n")
    return int(bool(findings))


if __name__ == "__main__":
    raise SystemExit(main())
