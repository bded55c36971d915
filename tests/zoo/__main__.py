"""Every model of a library, found, planned, converted, run and reverted: a JSON line for each.

``python -m tests.zoo --library timm --to gn --out timm.jsonl``; once more goes on where it
stopped. A table of what came out is printed at the end.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

from normswap.table import render
from tests.zoo.check import check
from tests.zoo.libraries import ZOOS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m tests.zoo")
    parser.add_argument("--library", choices=ZOOS, default="timm")
    parser.add_argument("--to", action="append", metavar="norm", help="default: gn; may repeat")
    parser.add_argument("--where", metavar="selector", help="default: what the norm converts")
    parser.add_argument("--match", default="*", metavar="glob", help="of the models' names")
    parser.add_argument("--every", type=int, default=1, metavar="n", help="only each n-th model")
    parser.add_argument("--out", type=Path, metavar="file", help="default: LIBRARY.jsonl")
    asked = parser.parse_args()
    zoo, targets = ZOOS[asked.library], asked.to or ["gn"]
    out: Path = asked.out or Path(f"{asked.library}.jsonl")
    done = _read(out)
    names = [name for name in zoo.names() if fnmatch.fnmatch(name, asked.match)][:: asked.every]
    with out.open("a") as file:
        for index, name in enumerate(names, start=1):
            if name in done:
                continue
            started = time.perf_counter()
            try:
                result = check(zoo, name, targets, asked.where)
            except Exception as error:
                told = f"{type(error).__name__}: {error}"[:300]
                result = {"model": name, "problems": [f"the check itself: {told}"]}
            result["seconds"] = time.perf_counter() - started
            done[name] = result
            file.write(json.dumps(result) + "\n")
            file.flush()
            print(f"{index}/{len(names)} {name}: {'; '.join(result['problems']) or 'ok'}")
    print(summary(asked.library, [done[name] for name in names if name in done], targets))


def _read(path: Path) -> dict[str, Any]:
    lines = path.read_text().splitlines() if path.exists() else []
    return {result["model"]: result for result in map(json.loads, lines)}


def summary(library: str, results: list[dict[str, Any]], targets: list[str]) -> str:
    """What came out, as a table."""
    found = [each for each in results if each.get("norms")]
    rows: list[tuple[object, ...]] = [
        ("models", len(results)),
        ("with norms", len(found)),
        ("norms", sum(each["norms"] for each in found)),
        ("called in a run", sum(each.get("called", 0) for each in found)),
        ("not run", sum("not_run" in each for each in results)),
        ("with a problem", sum(bool(each["problems"]) for each in results)),
    ]
    for to in targets:
        told = [each["targets"][to] for each in found if to in each.get("targets", {})]
        rows.append((f"to {to}: models", sum("converted" in each for each in told)))
        rows.append((f"to {to}: norms", sum(each.get("converted", 0) for each in told)))
        rows.append((f"to {to}: norms left, with a reason", sum(e.get("left", 0) for e in told)))
        rows.append((f"to {to}: models refused", sum("refused" in each for each in told)))
        times = sorted(
            each["find_s"] + each["targets"][to]["convert_s"]
            for each in found
            if "convert_s" in each.get("targets", {}).get(to, {})
        )
        if times:
            rows.append((f"to {to}: find + convert, median s", f"{statistics.median(times):.3f}"))
            rows.append((f"to {to}: find + convert, longest s", f"{times[-1]:.2f}"))
    problems = Counter(problem for each in results for problem in each["problems"])
    rows += [(problem[:70], count) for problem, count in problems.most_common(20)]
    return render(library, ("", ""), rows)


if __name__ == "__main__":
    main()
