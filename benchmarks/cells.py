"""Numbers that are measured once: a table is made of cells, and a run that was stopped goes on with those it lacks."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from medrobust.data.archive import cache_folder
from medrobust.records import versions


class Cells:
    """Cells in a file, one JSON line each; several processes may append to one file.

    Args:
        name: of the file, in the cache folder.
        share: (part, parts): of the cells that are missing, measure each ``parts``-th, beginning with ``part``.
        wait: ``False`` measures nothing: what is missing stays empty.
    """

    def __init__(self, name: str, share: tuple[int, int] = (0, 1), *, wait: bool = True) -> None:
        self.path = cache_folder() / "benchmarks" / f"{name}.jsonl"
        self.part, self.parts = share
        self.wait = wait
        self.asked = 0
        self.known: dict[str, Any] = {}
        if self.path.is_file():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                if row["versions"] == versions():
                    self.known[_text(row["key"])] = row["value"]

    def __call__(self, key: Mapping[str, Any], measure: Callable[[], Any]) -> Any:
        """What was measured for this key, measured now where it is missing; ``None`` for another process's share."""
        text = _text(key)
        if text in self.known:
            return self.known[text]
        self.asked += 1
        if not self.wait or (self.asked - 1) % self.parts != self.part:
            return None
        value = self.known[text] = measure()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": dict(key), "value": value, "versions": versions()}) + "\n")
        print(f"{text}: {value}", flush=True)
        return value


def _text(key: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in sorted(key.items()))
