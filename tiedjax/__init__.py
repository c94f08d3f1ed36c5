"""Train tied and untied language models, split every table gradient by role, and measure what tying does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tiedjax.interop.model import Model, load_model
    from tiedjax.run import Run, RunTables, load_run

__all__ = ["Model", "Run", "RunTables", "load_model", "load_run"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in __all__:  # imported when first asked for: `tiedjax --help` must not wait for JAX
        from tiedjax import run
        from tiedjax.interop import model

        return getattr(run if hasattr(run, name) else model, name)
    raise AttributeError(f"module 'tiedjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
