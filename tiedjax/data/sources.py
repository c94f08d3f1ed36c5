"""Where documents come from, by name, and what decides them: the embedded corpus, TFDS datasets, text files."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiedjax.config import DataConfig
from tiedjax.data import text_files
from tiedjax.data.embedded_corpus import standard_library
from tiedjax.data.folders import locked
from tiedjax.errors import UserError
from tiedjax.host import storage
from tiedjax.text import nearest

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

KINDS = ("embedded", "tfds:", "text:", "tokens:", "prepared:")


@dataclass(frozen=True)
class Source:
    """Documents that can be read any number of times, always the same in the same order.

    `identity` is plain JSON that changes whenever the documents may have.
    """

    identity: dict[str, Any]
    documents: Callable[[], Iterator[str]]


def open_source(data: DataConfig, cache: Path, report: Callable[[str], None]) -> Source:
    """The source that `data.source` names; nothing is downloaded or read before its documents are."""
    kind, _, name = data.source.partition(":")
    if data.source == "embedded":
        identity, read = _embedded(cache / "tfds", report)
    elif kind == "tfds" and name:
        identity, read = _tfds(name, data.text_field)
    elif kind == "text" and name:
        identity, read = _text(name, data.text_field)
    else:
        raise unknown_source(data.source)
    whole = {**identity, "max_documents": data.max_documents}
    return Source(whole, lambda: itertools.islice(filter(str.strip, read()), data.max_documents))


def documents(data: DataConfig, cache: Path, report: Callable[[str], None] = lambda line: None) -> Iterator[str]:
    """The non-empty documents of `data.source`, at most data.max_documents of them."""
    return open_source(data, cache, report).documents()


def unknown_source(source: str) -> UserError:
    """The error for a source that no kind fits."""
    kind = source.partition(":")[0]
    hint = nearest(kind, [name.rstrip(":") for name in KINDS])
    return UserError(
        f"data.source: {source!r} is none of embedded, tfds:NAME[/CONFIG], text:GLOB, tokens:GLOB, prepared:DIR{hint}"
    )


def file_identity(path: Path) -> list[Any]:
    """[path, bytes, time of change or version]: what stands for a file's contents in the key of a cache."""
    if storage.is_remote(path):
        return storage.identity(path)
    state = path.stat()
    return [str(path), state.st_size, state.st_mtime_ns]


def _text(pattern: str, text_field: str) -> tuple[dict[str, Any], Callable[[], Iterator[str]]]:
    files = text_files.matching_files(pattern, "data.source")
    identity = {"kind": "text", "text_field": text_field, "files": [file_identity(path) for path in files]}
    return identity, lambda: itertools.chain.from_iterable(
        text_files.file_documents(path, text_field) for path in files
    )


def _embedded(folder: Path, report: Callable[[str], None]) -> tuple[dict[str, Any], Callable[[], Iterator[str]]]:
    def read() -> Iterator[str]:
        from tiedjax.data.embedded_corpus import embedded_corpus_dataset_builder as embedded

        # Under its own lock: two preparations with different vocabularies share this folder.
        with locked(folder / "embedded_corpus", report), _quiet_tfds():
            builder = embedded.Builder(data_dir=folder, file_format="array_record")
            builder.download_and_prepare()
        return _texts(builder, "embedded", "text")

    return {"kind": "embedded", "library": standard_library.identity()}, read


def _tfds(name: str, text_field: str) -> tuple[dict[str, Any], Callable[[], Iterator[str]]]:
    import tensorflow_datasets as tfds

    source = f"tfds:{name}"
    try:
        builder = tfds.builder(name, file_format="array_record")
    except tfds.core.DatasetNotFoundError:
        close = nearest(name.partition("/")[0], tfds.list_builders(with_community_datasets=False))
        raise UserError(f"data.source: {source}: TFDS knows no such dataset, and none is prepared{close}") from None
    except (OSError, ImportError, ValueError, RuntimeError) as error:
        raise UserError(f"data.source: {source}: {_first_line(error)}") from None

    def read() -> Iterator[str]:
        download = tfds.download.DownloadConfig(try_download_gcs=False)  # the mirror holds TFRecord, which needs TF
        try:
            with contextlib.redirect_stdout(sys.stderr):  # standard output is for results
                builder.download_and_prepare(download_config=download)
        except ImportError as error:
            raise UserError(f"data.source: {source} needs a package that is not here: {_first_line(error)}") from None
        except (OSError, AssertionError, ValueError, tfds.download.DownloadError) as error:
            raise UserError(f"data.source: {source}: cannot be downloaded or prepared: {_first_line(error)}") from None
        return _texts(builder, source, text_field)

    return {"kind": "tfds", "text_field": text_field, "dataset": builder.info.full_name}, read


def _texts(builder: tfds.core.DatasetBuilder, source: str, text_field: str) -> Iterator[str]:
    """The texts of split `train`, or of every split where there is none of that name."""
    splits = ["train"] if "train" in builder.info.splits else sorted(builder.info.splits)
    if text_field not in builder.info.features:
        fields = ", ".join(builder.info.features)
        raise UserError(f"data.text_field: {source} has no field {text_field!r}; its fields are {fields}")
    for split in splits:
        try:
            records = builder.as_data_source(split=split)
        except (ImportError, NotImplementedError, ValueError) as error:
            raise UserError(
                f"data.source: {source} is not stored as ArrayRecord, the form that is read without TensorFlow: "
                f"{_first_line(error)}"
            ) from None
        for start in range(0, len(records), 256):
            for record in records.__getitems__(range(start, min(start + 256, len(records)))):
                text = record[text_field]
                if not isinstance(text, bytes):
                    raise UserError(f"data.text_field: {text_field!r} of {source} is not text")
                yield text.decode("utf-8", "replace")


@contextlib.contextmanager
def _quiet_tfds() -> Iterator[None]:
    """Without TFDS's bars and prints, for what takes a second."""
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(None):
            yield
    finally:
        tfds.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]
