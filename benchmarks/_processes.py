"""A measurement in a process of its own, so that nothing else is in its memory or its time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

# Of this program alone: ru_maxrss would hold the peak of the process that started it too.
PEAK = 'next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))'


def printed_by(program: str, place: Path, *arguments: str) -> Any:
    """Return the JSON that a program prints, which is given `place` and the arguments."""
    # Compiled once, as an installed package is, also where the environment says that nothing compiled is kept.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = str(place.with_name("compiled"))
    command = [sys.executable, "-c", program, str(place), *arguments]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)
