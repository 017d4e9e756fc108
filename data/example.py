"""The example of docs/data.md: three variables of two lakes, a row a day, with gaps. `python -m data.example FILE`."""

import sys
from datetime import date, timedelta
from pathlib import Path

import numpy as np

DAYS = {"north": 70, "south": 50}
UNKNOWN, ABSENT = ("north", 33), ("south", 20)  # a value that is missing, and a row


def lakes() -> str:
    """The CSV: temperature in degrees Celsius, level in cm, inflow in cubic metres a second."""
    draw, lines = np.random.RandomState(0), ["unique_id,ds,temperature,level,inflow"]
    for lake, days in DAYS.items():
        noise = draw.normal(0, 0.03, (days, 3))
        for day in range(days):
            wave = np.sin(2 * np.pi * day / np.array([14, 21, 10.5]) + len(lake))
            temperature, level, inflow = np.array([3.0, 120.0, 0.6]) + np.array([5.0, 30.0, 0.3]) * (wave + noise[day])
            level_text = "" if (lake, day) == UNKNOWN else f"{level:.1f}"
            if (lake, day) != ABSENT:
                when = date(2024, 1, 1) + timedelta(days=day)
                lines.append(f"{lake},{when},{temperature:.2f},{level_text},{inflow:.3f}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(lakes(), encoding="utf-8")
