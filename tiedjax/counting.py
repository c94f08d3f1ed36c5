"""token_counts.npy of a run whose text is too long to be counted before step 1: written beside training."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from tiedjax.config import RunConfig
from tiedjax.data.prepared import Prepared
from tiedjax.host import process, storage
from tiedjax.host.workers import Aside, ProcessEnded, Task

TOKEN_COUNTS = "token_counts.npy"


class Counting:
    """Has one process write token_counts.npy beside training, if asked to begin.

    If that process is killed, another counts again after training, once. When this is left it waits for the counts if
    they are `needed` now, unless `stop` comes, and ends the process.
    """

    def __init__(self, cfg: RunConfig, out: Path, label: str, prepared: Prepared, stop: process.Requests):
        arguments = {
            "directory": str(prepared.directory),
            "seq_len": cfg.model.seq_len,
            "vocab_rows": cfg.model.table_rows,
            "path": str(storage.absolute(out) / TOKEN_COUNTS),
        }
        self._task = Task(f"{label}: counting tokens", "tiedjax.data.counts:count_beside_training", arguments)
        self._wait = f"{label}: trained; waiting until its {prepared.num_tokens('train'):,} training tokens are counted"
        self._stop = stop
        self._begun = False
        self._aside: Aside | None = None  # the main process's, while one counts
        self._killed = False
        self.needed = False

    def __enter__(self) -> Counting:
        return self

    def begin(self) -> None:
        """Starts that process, from the main one of a cluster; all of them ask for it."""
        self._begun = True
        if process.is_main():
            self._aside = Aside(self._task)

    def check(self) -> None:
        """Raises the UserError of a token that does not fit, if one has been met by now."""
        self._counted()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None and self.needed and self._begun and not process.main_says(self._counted):
                process.say(self._wait)
                self._wait_for_counts()
        finally:
            if self._aside:
                self._aside.end()

    def _wait_for_counts(self) -> None:
        """All processes of a cluster wait, so that a signal to any of them ends all."""
        while not self._stop.stops():
            if self._killed and not self._aside:
                self._aside = Aside(self._task)
            if process.main_says(partial(self._counted, seconds=0.2)):
                return

    def _counted(self, seconds: float = 0) -> bool:
        """Whether it is done, at once or after waiting so long; ProcessEnded if it was killed for the second time."""
        try:
            return self._aside is not None and self._aside.returned(seconds)
        except ProcessEnded as error:
            self._aside = None
            if self._killed:
                raise
            self._killed = True
            process.say(f"{error}; tokens are counted again after training")
            return False
