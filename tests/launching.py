"""Starting the scripts of launch/ in a process group of their own, and ending what a test left of one."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

from programs import REPOSITORY, environment

LAUNCH = REPOSITORY / "launch"
STARTED: list[subprocess.Popen[str]] = []


def launch(
    script: str, *args: str | int | Path, devices: int = 1, path: Path | None = None, **more: str
) -> subprocess.Popen[str]:
    """Starts a launcher in a process group of its own, with `path` or this Python's programs found first."""
    first = path or Path(sys.executable).parent
    child = {"PATH": f"{first}{os.pathsep}{os.environ['PATH']}", **more}
    process = subprocess.Popen(
        ["/bin/bash", str(LAUNCH / script), *map(str, args)],
        cwd=REPOSITORY,
        env=environment(devices, **child),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Whoever runs the tests in the background may have SIGINT ignored, which a shell cannot undo.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    STARTED.append(process)
    return process


def end_what_was_started() -> None:
    """Whatever happened, the process group of every launcher ends with the test that started it."""
    while STARTED:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(STARTED.pop().pid, signal.SIGKILL)
