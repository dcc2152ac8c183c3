"""What happens in a cell, as events: a JSONL log, lines on the terminal, a mirror at W&B."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, Literal

Mode = Literal["auto", "online", "offline", "disabled"]


class Tracker:
    """Writes each event of a cell to its log."""

    def __init__(self, name: str, folder: Path, wandb: Mode) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.name = name
        self.log = (folder / "log.jsonl").open("a")
        self._last = 0.0

    def announce(self, event: dict[str, Any]) -> None:
        """Log an event."""
        self.log.write(json.dumps({"time": time.time(), **event}) + "\n")
        self.log.flush()
        now = time.monotonic()
        if event["event"] == "task" or now - self._last > 30:
            self._last = now
            print(
                self.name,
                {k: v for k, v in event.items() if k not in ("config", "capacity")},
                flush=True,
            )

    def close(self, failed: bool = False) -> None:
        """Close the log."""
        self.log.close()
