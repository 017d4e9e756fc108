"""The learning rate as a function of the step alone, so that a resumed run has the same one."""

import math

SCHEDULES = ("constant", "linear", "cosine", "warmup-stable-decay")
"""After the warm-up: as it is; down in a line, or in half a cosine, to the end; as it is, and in a line at the end."""


def whole(part: float, steps: int) -> int:
    """Steps: a part of a run's where it is below 1, else as it stands."""
    return round(part * steps) if part < 1 else int(part)


def check(schedule: str, steps: int, warmup: float, decay: float) -> None:
    """Raise ValueError unless warm-up and decay fit into a run of so many steps."""
    first, last = whole(warmup, steps), whole(decay, steps) if schedule == "warmup-stable-decay" else 0
    if first >= steps and first:
        raise ValueError(f"warmup is {first} steps: expected fewer than the run's {steps}")
    if first + last > steps:
        raise ValueError(
            f"decay is {last} steps: expected at most {steps - first}, what the warm-up of {first} leaves of {steps}"
        )


def factor(schedule: str, step: int, steps: int, warmup: float = 0.0, decay: float = 0.2, floor: float = 0.0) -> float:
    """What the learning rate is multiplied by.

    Args:
        schedule: of `SCHEDULES`.
        step: updates made before this one; of `steps`.
        warmup: over how many steps the rate rises in a line, to 1 with the last of them; see `whole`.
        decay: over how many of the last steps "warmup-stable-decay" falls.
        floor: what it falls to, after the last step.
    """
    first = whole(warmup, steps)
    if step < first:
        return (step + 1) / first
    begins = steps - whole(decay, steps) if schedule == "warmup-stable-decay" else first
    done = max(0, step - begins) / max(1, steps - begins)  # of the fall: 0 to less than 1
    left = {"constant": 1.0, "cosine": (1 + math.cos(math.pi * done)) / 2}.get(schedule, 1 - done)
    return floor + (1 - floor) * left
