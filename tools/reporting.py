"""The output of the command line tools: bars on a terminal, an occasional line elsewhere, JSON lines if asked for."""

import json
import time
from typing import Any

from fastil.text import Bar, say

LINE_EVERY = 10.0  # seconds between lines of progress where there is no terminal


class Reporter:
    """The stages of a long job. as_json: everything goes to stdout as one JSON object per line."""

    def __init__(self, as_json: bool = False) -> None:
        self.as_json, self.shown = as_json, Bar()
        self.stage, self.total, self.done, self.bytes = "", 0, 0, 0
        self.began = self.last = time.monotonic()

    def begin(self, stage: str, total: int, done: int = 0) -> None:
        """Begin a stage over this many samples, `done` of them before a resume."""
        self.stage, self.total, self.done, self.first, self.bytes = stage, total, done, done, 0
        self.began = self.last = time.monotonic()
        if not self.as_json:
            self.shown.begin(stage, total, done)

    def advance(self, samples: int, size: int = 0) -> None:
        """Count this many more samples as done, with this many bytes in all."""
        self.done += samples
        self.bytes += size
        self.shown.advance(samples)
        if self.shown.bar is not None:
            return
        now = time.monotonic()
        if now - self.last < LINE_EVERY:
            return
        self.last = now
        rate = (self.done - self.first) / (now - self.began)
        left = (self.total - self.done) / rate if rate else 0.0
        speed = self.bytes / (now - self.began) / 1e6
        if self.as_json:
            self.event(
                "progress", stage=self.stage, done=self.done, total=self.total, images_per_second=round(rate, 1),
                megabytes_per_second=round(speed, 1), seconds_left=round(left, 1),
            )  # fmt: skip
        else:
            say(
                f"{self.stage}: {self.done:,} of {self.total:,}, {rate:,.0f} img/s, {speed:,.0f} MB/s, "
                f"about {f'{left / 60:.0f} min' if left > 90 else f'{left:.0f} s'} left",
                flush=True,
            )

    def end(self) -> None:
        """End the bar."""
        self.shown.end()

    def say(self, text: str, event: str = "note", **fields: Any) -> None:
        """Show a text to people, and an event with these fields, or the text, to programs."""
        if self.as_json:
            self.event(event, **(fields or {"text": text}))
        else:
            self.shown.say(text)

    def event(self, event: str, **fields: Any) -> None:
        """Print an event as a line of JSON."""
        say(json.dumps({"event": event} | fields), flush=True)
