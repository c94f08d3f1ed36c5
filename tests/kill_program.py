"""Run by test_kills.py: a command of tiedjax whose process kills itself at a call that is named beforehand.

`kill_program.py CALLS ARGUMENTS...`: CALLS is JSON, a list of [function, pattern, number, moment], of which each is
looked for once the one before was met: the call of `module:name` with this number among those whose arguments match the
pattern. At the last of them SIGKILL ends the process, `before` or `after` the call does its work, or when os.write has
written `half` of it.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import re
import signal
import sys
from collections.abc import Sequence
from typing import Any


def shown(argument: Any) -> str:
    """What a pattern is looked for in: text, numbers, paths, the folder of `Checkpoints`."""
    if isinstance(argument, bytes):
        return argument.decode(errors="replace")
    place = getattr(argument, "directory", argument)
    return str(place) if isinstance(place, str | int | os.PathLike) else ""


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def await_calls(calls: Sequence[tuple[str, str, int, str]]) -> None:
    """Puts what looks for the first of these calls in the place of its function."""
    (name, pattern, number, moment), *later = calls
    module, _, path = name.partition(":")
    *outer, last = path.split(".")
    holder = functools.reduce(getattr, outer, importlib.import_module(module))
    function, met = getattr(holder, last), 0

    @functools.wraps(function)
    def observed(*args: Any, **kwargs: Any) -> Any:
        nonlocal met
        matches = bool(re.search(pattern, " ".join(map(shown, args))))
        met += matches
        if not matches or met != number:
            return function(*args, **kwargs)
        if later:
            await_calls(later)
        elif moment == "before":
            die()
        elif moment == "half":
            file, content = args
            function(file, content[: len(content) // 2])
            die()
        result = function(*args, **kwargs)
        if not later:
            die()
        return result

    setattr(holder, last, observed)


if __name__ == "__main__":
    await_calls(json.loads(sys.argv[1]))
    from tiedjax import cli

    sys.exit(cli.main(sys.argv[2:]))
