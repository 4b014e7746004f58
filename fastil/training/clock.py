"""Where the time of a run went: timings.json, which no rerun reproduces."""

import platform
from collections import defaultdict
from typing import Any

import numpy as np
import torch

from fastil import machine
from fastil.device import device_name, processor_name


class Clock:
    """Seconds of each step's phases, over resumes; training and finetuning count finished epochs."""

    def __init__(self) -> None:
        self.seconds: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))

    def epoch(
        self, step: int, phase: str, images: int, seconds: float, data_seconds: float, loader_idle: float | None
    ) -> None:
        """Count an epoch of phase "train" or "correct". loader_idle: a share of its seconds, or None."""
        clock = self.seconds[str(step)]
        clock["images"] += images if phase == "train" else 0
        clock[phase] += seconds
        clock["waiting_for_data"] += data_seconds
        if loader_idle is not None:
            clock["loader_idle"] += seconds * loader_idle

    def set(self, step: int, **seconds: float) -> None:
        """Set seconds of phases of a step."""
        self.seconds[str(step)].update(seconds)

    def trained(self, step: int) -> float:
        """Seconds of training and finetuning of a step."""
        clock = self.seconds[str(step)]
        return clock["train"] + clock["correct"]

    def summary(self) -> dict[str, Any]:
        """For timings.json. A base step taken from another run took no time and has no speed. loader_idle: the seconds
        in which the loader's threads had nothing to do, where that is known."""
        phases = ("train", "correct", "memory", "evaluate", "waiting_for_data")
        return {
            "steps": {
                step: {phase: clock[phase] for phase in phases}
                | {"loader_idle": clock.get("loader_idle")}
                | {"images_per_second": clock["images"] / clock["train"] if clock["train"] else None}
                for step, clock in self.seconds.items()
            }
        }

    def state_dict(self) -> dict[str, dict[str, float]]:
        """Return what a checkpoint holds."""
        return {step: dict(clock) for step, clock in self.seconds.items()}

    def load_state_dict(self, state: dict[str, dict[str, float]]) -> None:
        """Take up what a checkpoint holds."""
        for step, clock in state.items():
            self.seconds[step].update(clock)


def versions(device: torch.device) -> dict[str, Any]:
    """What ran, on what."""
    return {
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "machine": {
            "device": device_name(device),
            "processor": processor_name(),
            "cores": machine.cores(),
            "platform": platform.platform(),
        },
    }
