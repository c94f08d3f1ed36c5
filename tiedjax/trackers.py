"""The process in which a tracking service's library runs: `python -m tiedjax.trackers wandb`.

Standard input has one JSON object a line: what the run is, then scalars step by step. Each line, and the end of the
input, is answered by one line, {"error": null} or {"error": REASON}. What the libraries print is shown to nobody.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

LAST_SECONDS = 60.0  # in which the process must end once its input has
PROJECT = "tiedjax"  # unless the service's own environment variable names another
MOST_LETTERS = 300  # of a reason
AT_ONCE = 100  # parameters that MLflow takes in one call


class Service(Protocol):
    """One run of a tracking service."""

    def log(self, step: int, scalars: dict[str, float]) -> None:
        """Sends the scalars of one step."""

    def finish(self) -> None:
        """Waits until they have arrived."""


class WeightsAndBiases:
    """A run of Weights & Biases; WANDB_PROJECT, WANDB_MODE and its other variables hold.

    Its own steps only ever rise, and a run that was killed repeats some: `step` is a number among the others.
    """

    def __init__(self, folder: Path, label: str, config: dict[str, Any]):
        import wandb

        project, kept = os.environ.get("WANDB_PROJECT", PROJECT), kept_id(folder / "wandb.json", new_id)
        self._run = wandb.init(project=project, name=label, id=kept, resume="allow", dir=str(folder), config=config)
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, scalars: dict[str, float]) -> None:
        """Hands them to the service's own process."""
        self._run.log({"step": step, **scalars})

    def finish(self) -> None:
        """Waits for the upload, if there is one."""
        self._run.finish()


class Trackio:
    """A run of trackio, which knows runs by their names; TRACKIO_PROJECT and its other variables hold."""

    def __init__(self, folder: Path, label: str, config: dict[str, Any]):
        import trackio

        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        name = kept_id(folder / "trackio.json", lambda: f"{label}-{new_id()}")
        self._run: Any = trackio.init(project=project, name=name, resume="allow", config=config)

    def log(self, step: int, scalars: dict[str, float]) -> None:
        """Hands them to its sender."""
        self._run.log(scalars, step=step)

    def finish(self) -> None:
        """Waits until they are written."""
        self._run.finish()


class MLflow:
    """A run of MLflow; MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME and its other variables hold."""

    def __init__(self, folder: Path, label: str, config: dict[str, Any]):
        import mlflow

        self._mlflow = mlflow
        mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))

        def begun() -> str:
            run_id = str(mlflow.start_run(run_name=label).info.run_id)
            parameters = list(flat(config))
            for first in range(0, len(parameters), AT_ONCE):
                mlflow.log_params(dict(parameters[first : first + AT_ONCE]))
            return run_id

        kept = kept_id(folder / "mlflow.json", begun)
        if mlflow.active_run() is None:
            mlflow.start_run(run_id=kept)

    def log(self, step: int, scalars: dict[str, float]) -> None:
        """Sends them and waits for the answer."""
        self._mlflow.log_metrics(scalars, step=step)

    def finish(self) -> None:
        """Marks the run as finished."""
        self._mlflow.end_run()


SERVICES: dict[str, Callable[[Path, str, dict[str, Any]], Service]] = {
    "wandb": WeightsAndBiases,
    "trackio": Trackio,
    "mlflow": MLflow,
}


def flat(tree: dict[str, Any], before: str = "") -> Any:
    """Dotted names and values of a nested mapping."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{before}{name}.")
        else:
            yield before + name, value


def new_id() -> str:
    """A name that no other run has."""
    return uuid.uuid4().hex[:12]


def kept_id(path: Path, made: Callable[[], str]) -> str:
    """Under which name the service knows this run: what an earlier command has left here, or a new one.

    Where it cannot be kept, the command that continues the run begins another one there.
    """
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["run"])
    except (OSError, ValueError, KeyError, TypeError):
        kept = made()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps({"run": kept}) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
    return kept


def main(kind: str) -> None:
    """Answers each line of standard input until it ends."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    silence = os.open(os.devnull, os.O_RDWR)  # a library that asks for a password must find nobody
    os.dup2(silence, 0)
    os.dup2(silence, 1)

    def answer(call: Callable[[], Any]) -> Any:
        value = error = None
        try:
            value = call()
        except ModuleNotFoundError as missing:
            error = str(missing)
            if missing.name == kind:
                error = f'it is not installed: pip install "tiedjax[{kind}]"'
        except BaseException as raised:  # what a library exits with is one of them
            error = (str(raised).splitlines() or [type(raised).__name__])[0][:MOST_LETTERS]
        answers.write(json.dumps({"error": error}).encode() + b"\n")
        answers.flush()
        return value

    begun = json.loads(requests.readline())
    service = answer(lambda: SERVICES[kind](Path(begun["folder"]), begun["label"], begun["config"]))
    if service is None:
        return
    for line in requests:
        row = json.loads(line)
        answer(partial(service.log, row["step"], row["scalars"]))
    last = threading.Timer(LAST_SECONDS, os._exit, [1])
    last.daemon = True
    last.start()
    answer(service.finish)


if __name__ == "__main__":
    main(sys.argv[1])
