"""Places on a disk or in an object store: gs://BUCKET/RUN and what else fsspec reaches, behind one set of functions.

A place on a disk is a pathlib.Path, and everything here does with it what `tiedjax.files` does. A place in a store is
an etils.epath.Path, which has the methods of one. What it does not do by itself stands here: an object is written
whole or not at all, cannot be appended to, is not mapped into memory, and belongs to no process.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import logging
import os
import re
import secrets
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from tiedjax import files
from tiedjax.errors import LockedError, StoreError, TakenOverError, TrainingError, UserError

# Those that etils.epath knows and that create an object for one process alone, and what fsspec needs for each.
SCHEMES = {"gs": "gcsfs", "s3": "s3fs"}
EXTRAS = {"gs": "pip install 'tiedjax[gcs]'"}
_NETWORK = ("aiohttp.", "requests.")  # modules whose errors say that no answer came
_CLIENTS = (*_NETWORK, "gcsfs.", "google.api_core.", "google.auth.", "google.cloud.", "botocore.", "azure.")
STEP = "0|[1-9][0-9]*"  # the name of a save
COMMITTED = "commit_success.txt"  # Orbax writes it last into a save in a store, where no folder can be renamed
LEASE = ".lease"
LEASE_SECONDS = 120.0  # how long a writer that has gone silent keeps others out
MARGIN = 10.0  # seconds by which a holder may be late to renew its lease
SKEW = 600.0  # seconds by which the clocks of two machines may differ
LOOKS = 24  # how often a writer looks for a sign of one that holds the lease, until that expires
UPLOAD_SECONDS = 30.0  # what a store holds of files that grow may be this late between two checkpoints
UPLOAD_SHARE = 0.05  # of the time spent uploading what grows, at most


# ---- Places ----


def is_remote(place: str | Path) -> bool:
    """Whether a place, or what a user wrote for one, lies in an object store."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", str(place)) is not None


def place(text: str | Path, option: str) -> Path:
    """The place that `option` was given: a path, or one that behaves like it for gs://BUCKET/DIR.

    UserError for what nothing can be called, a scheme that is not known, an address without a bucket, or a package that
    is missing.
    """
    if not is_remote(text):
        return files.local_path(text, option)
    files.refuse_impossible(str(text), option)
    scheme, rest = str(text).split("://", 1)
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise UserError(f"{option}: {scheme}:// is not known; use a path or one of {known}; got {str(text)!r}")
    if not re.match(r"[A-Za-z0-9][\w.-]+/.", rest):
        raise UserError(f"{option}: must name a bucket and a folder, such as {scheme}://BUCKET/RUN; got {str(text)!r}")
    _filesystem(scheme)
    from etils import epath

    return cast(Path, epath.Path(str(text).rstrip("/")))


def absolute(place: Path) -> Path:
    """The same place by a name that does not depend on the working directory."""
    return place if is_remote(place) else place.absolute()


def resolved(place: Path) -> Path:
    """The same place by its one name; what lies in a store has no other."""
    return place if is_remote(place) else place.resolve()


def made(folder: Path) -> Path:
    """The folder, which is there now; a store has none, only objects whose names begin alike."""
    if not is_remote(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def refuse_unknown_bucket(place: Path) -> None:
    """UserError where there is no such bucket, or it may not be asked what it is, as Orbax does before it lists saves.

    StoreError where the store does not answer.
    """
    if not str(place).startswith("gs://"):
        return
    bucket = str(place).split("/")[2]
    try:
        with _as_os_errors(place):
            _store(place).call("GET", "b/{}", bucket)
    except FileNotFoundError:
        raise UserError(f"{place}: there is no bucket {bucket}, or it may not be seen") from None
    except PermissionError as error:
        raise UserError(
            f"{place}: the bucket {bucket} cannot be asked what it is; that takes the right storage.buckets.get, as in "
            f"roles/storage.legacyBucketReader ({error.strerror})"
        ) from None
    except OSError as error:
        raise _unable(place, "cannot be reached", error) from None


def _filesystem(scheme: str) -> Any:
    """fsspec's file system of a scheme, the one that etils.epath uses too."""
    # What is set here counts for Orbax too. gcsfs would ask for the kind of every bucket, which needs a right that who
    # may read and write its objects often lacks; epath would take TensorFlow where that is installed.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    os.environ.setdefault("EPATH_USE_TF", "false")
    if "STORAGE_EMULATOR_HOST" in os.environ:  # gcsfs reads it; TensorStore, which writes arrays, has its own
        os.environ.setdefault("TENSORSTORE_GCS_HTTP_URL", os.environ["STORAGE_EMULATOR_HOST"])
        os.environ.setdefault("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
    try:
        import fsspec

        # TensorStore and other machines write beside it: what it remembers of a folder is soon wrong.
        fsspec.config.conf.setdefault({"gs": "gcs"}.get(scheme, scheme), {}).setdefault("use_listings_cache", False)
        options = {"finalize_on_close": True} if scheme == "gs" else {}
        system = fsspec.filesystem(scheme, **options)
    except ImportError:
        how = EXTRAS.get(scheme, f"pip install {SCHEMES.get(scheme, 'fsspec')}")
        raise UserError(f"{scheme}:// needs a package that is not installed: {how}") from None
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs with a traceback what it raises as well
    return system


@contextlib.contextmanager
def _as_os_errors(place: str | Path) -> Iterator[None]:
    """What a store's client raises, as an OSError with a `strerror` that a person can read."""
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(place)) from None
    except FileExistsError:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(place)) from None
    except Exception as error:
        number = errno.EACCES if _denied(error) else errno.EIO
        raise OSError(number, _reason(error), str(place)) from error


def _reason(error: Exception) -> str:
    """What a client of a store has raised, in a line."""
    lines = str(error).splitlines() or [type(error).__name__]
    said = "; ".join(line.strip() for line in lines[:2] if line.strip())
    silent = isinstance(error, ConnectionError | TimeoutError) or type(error).__module__.startswith(_NETWORK)
    return f"the store {'does not answer' if silent else 'answers'}: {said}"


def _denied(error: Exception) -> bool:
    """Whether a store has said that this may not be done."""
    code = str(getattr(error, "code", ""))
    return code in ("401", "403") or isinstance(error, PermissionError) or _denied_by_gcsfs(error)


def _denied_by_gcsfs(error: Exception) -> bool:
    """Whether it is the bare OSError that gcsfs makes of a 403."""
    return type(error) is OSError and str(error).startswith("Forbidden: ")


def _unable(place: str | Path, what: str, error: OSError) -> UserError:
    """The error for what cannot be done there: a StoreError where a store fails, though the place may be right."""
    kind = StoreError if is_remote(place) and not isinstance(error, FileNotFoundError) else UserError
    return kind(f"{place}: {what}: {error.strerror or error}")


def failure(error: BaseException) -> str | None:
    """A line for what a store was asked in vain where nobody made more of it; None for any other error."""
    if isinstance(error, OSError) and error.filename is not None and is_remote(str(error.filename)):
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, Exception) and (type(error).__module__.startswith(_CLIENTS) or _denied_by_gcsfs(error)):
        return _reason(error)
    return None


def _store(place: Path) -> Any:
    return _filesystem(str(place).split("://", 1)[0])


# ---- Reading and writing ----


def read_bytes(place: Path) -> bytes:
    """The content of a file or an object. OSError, with a `strerror`, where that cannot be read."""
    if not is_remote(place):
        return place.read_bytes()
    with _as_os_errors(place):
        return bytes(_store(place).cat_file(str(place)))


def read_text(place: Path, hint: str = "", most: int = files.MOST_TEXT) -> str:
    """The text of a UTF-8 file or object of at most `most` bytes. UserError otherwise; `hint` says what is right.

    StoreError where a store fails.
    """
    if not is_remote(place):
        return files.read_text(place, hint, most)

    def content() -> bytes:
        try:
            return read_bytes(place)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise _unable(place, "cannot be read", error) from None

    return files.text_of(place, content, hint, most)


def read_json(place: Path, hint: str = "") -> Any:
    """What a JSON file or object holds. UserError as of `read_text` and `files.parse_json`."""
    return files.parse_json(read_text(place, hint), str(place), hint)


def read_step(place: Path) -> int:
    """N of a file or object that holds {"step": N}. UserError for another."""
    record = read_json(place, hint := 'it must hold {"step": N}')
    step = record.get("step") if isinstance(record, dict) else None
    if type(step) is not int or step < 0:  # True is an int too
        raise UserError(f"{place}: is damaged: {hint}")
    return step


def exists(place: Path) -> bool:
    """Whether there is such a file, object or folder. OSError where a store does not say."""
    if not is_remote(place):
        return place.exists()
    with _as_os_errors(place):
        return bool(_store(place).exists(str(place)))


def refuse_silent(folder: Path) -> None:
    """StoreError where a store does not hand out all that lies in a folder: what cannot be read then is not damaged."""
    if not is_remote(folder):
        return
    try:
        with _as_os_errors(folder):
            filled = [str(folder / name) for name, size in _objects(folder).items() if size]
            for found in _store(folder).cat_ranges(filled, 0, 1):
                if isinstance(found, Exception) and not isinstance(found, FileNotFoundError):
                    raise found
    except OSError as error:
        raise _unable(folder, "cannot be read", error) from None


def names(folder: Path) -> list[str]:
    """What lies in a folder, by name, sorted; [] where there is none. OSError where a store does not say."""
    if not is_remote(folder):
        return sorted(os.listdir(folder)) if folder.is_dir() else []
    try:
        with _as_os_errors(folder):
            listed = _store(folder).ls(str(folder), detail=False)
    except FileNotFoundError:
        return []
    return sorted({name.rstrip("/").rsplit("/", 1)[-1] for name in listed} - {""})


def matching(pattern: Path) -> list[Path]:
    """The objects of a store that a glob (`**` allowed) matches, sorted. StoreError where a store does not say."""
    scheme = str(pattern).split("://", 1)[0]
    try:
        with _as_os_errors(pattern):
            found = _store(pattern).glob(str(pattern), detail=True)
    except OSError as error:
        raise _unable(pattern, "cannot be read", error) from None
    objects = sorted(name for name, about in found.items() if about["type"] == "file")
    return [place(f"{scheme}://{name}", str(pattern)) for name in objects]


def identity(place: Path) -> list[Any]:
    """[place, bytes, version]: what stands for the content of an object. UserError where there is none."""
    try:
        with _as_os_errors(place):
            about = _store(place).info(str(place))
    except OSError as error:
        raise _unable(place, "cannot be read", error) from None
    return [str(place), about["size"], _version(place, about)]


def write_atomically(place: str | Path, content: str | bytes) -> None:
    """Replaces the file or object by one with this content (text as UTF-8), whole or not at all. UserError if not."""
    if not is_remote(place):
        return files.write_atomically(place, content)
    data = content.encode() if isinstance(content, str) else content
    try:
        with _as_os_errors(place):
            _store(cast(Path, place)).pipe_file(str(place), data)
    except OSError as error:
        raise _unable(place, "cannot be written", error) from None


def remove(place: Path) -> None:
    """Removes a file or an object, if it is there."""
    if not is_remote(place):
        place.unlink(missing_ok=True)
        return
    with contextlib.suppress(FileNotFoundError), _as_os_errors(place):
        _store(place).rm_file(str(place))


def saved_steps(folder: Path) -> list[int]:
    """The steps in a folder of saves that are complete, ascending; needs no Orbax.

    On a disk a save gets its name when it is complete; in a store its last object says so.
    """
    steps = sorted(int(name) for name in names(folder) if re.fullmatch(STEP, name))
    return [step for step in steps if not is_remote(folder) or exists(folder / str(step) / COMMITTED)]


def clear_unfinished(folder: Path) -> None:
    """Removes what killed processes and failed saves have left in a folder of saves; only its one writer may call this.

    In a store a save would go on where they ended, also one of fewer processes, and keep what the others had written.
    On a disk, where Orbax gives what is not finished another name, it takes room. OSError where it cannot be removed.
    """
    if not is_remote(folder):
        for left in folder.glob("*.orbax-checkpoint-tmp*"):
            _remove_folder(left)
    else:
        steps = {name for name in names(folder) if re.fullmatch(STEP, name)}
        for name in sorted(steps - {str(step) for step in saved_steps(folder)}):
            with contextlib.suppress(FileNotFoundError), _as_os_errors(folder / name):
                _store(folder).rm(str(folder / name), recursive=True)


def _remove_folder(folder: Path) -> None:
    """Removes a folder to which threads of a save that has failed may still write for a moment."""
    for pause in (0.1, 0.3, 1.0):
        with contextlib.suppress(OSError):
            return shutil.rmtree(folder)
        time.sleep(pause)
    return shutil.rmtree(folder)


def uncommit(save: Path) -> None:
    """Has a save in a store count as unfinished, before it is removed: its objects go in no order."""
    if is_remote(save):
        remove(save / COMMITTED)


def set_aside(save: Path) -> None:
    """Renames a complete save to damaged-STEP, or that with a number behind it, which nothing reads. UserError if not.

    In a store its objects are copied, but for the one that says that it is complete, before it counts as unfinished.
    """
    try:
        there = names(save.parent)
        free = (f"damaged-{save.name}-{i}" if i else f"damaged-{save.name}" for i in itertools.count())
        aside = save.parent / next(name for name in free if name not in there)
        if not is_remote(save):
            os.replace(save, aside)
            return
        with _as_os_errors(save):
            for name in _objects(save):
                if name != COMMITTED:
                    _store(save).cp_file(str(save / name), str(aside / name))
        uncommit(save)
        with _as_os_errors(save):
            _store(save).rm(str(save), recursive=True)
    except OSError as error:
        raise _unable(save, "is damaged, and cannot be set aside", error) from None


def _objects(folder: Path) -> dict[str, int]:
    """The size of every object below a folder of a store, by its name there."""
    begins = len(str(folder).split("://", 1)[1]) + 1
    found = _store(folder).find(str(folder), detail=True)
    return {name[begins:]: about["size"] for name, about in found.items()}


# ---- Copies of objects on this machine ----


def cached(place: Path, folder: Path | None = None) -> Path:
    """A local file with the content of an object, kept after the first time in `folder`, by default in the cache; a
    local file as it is.

    An object that was replaced since is fetched again. UserError where it cannot be had.
    """
    if not is_remote(place):
        return place
    folder = folder or _cache()
    try:
        with _as_os_errors(place):
            about = _store(place).info(str(place))
            path = folder / _version(place, about) / place.name
            if path.is_file() and path.stat().st_size == about["size"]:
                return path
            _download(place, path, about["size"])
    except OSError as error:
        raise _unable(place, "cannot be read", error) from None
    return path


def cached_folder(place: Path, listing: str, others: Callable[[bytes], dict[str, int]]) -> Path:
    """A local folder with the file `listing` of a folder of a store, and with the `others`, by name, that it lists.

    Of each the listing says how many bytes it has. What has another listing is fetched into another folder, and the
    listing comes last, so that a folder that has it is whole. UserError where something cannot be had.
    """
    try:
        content = read_bytes(place / listing)
        folder = _cache() / hashlib.sha256(content).hexdigest()[:20]
        if not (folder / listing).is_file():
            for name, size in others(content).items():
                if not ((folder / name).is_file() and (folder / name).stat().st_size == size):
                    with _as_os_errors(place / name):
                        _download(place / name, folder / name, size)
            files.write_atomically(folder / listing, content)
    except OSError as error:
        raise _unable(error.filename or place, "cannot be read", error) from None
    return folder


def cached_save(save: Path) -> Path:
    """A local copy of a complete save, kept after the first time: to open one in a store takes some 50 requests."""
    try:
        with _as_os_errors(save):
            folder = _cache() / _version(save / COMMITTED, _store(save).info(str(save / COMMITTED))) / save.name
            if not (folder / COMMITTED).is_file():
                sizes = _objects(save)
                for name in sorted(sizes, key=lambda name: name == COMMITTED):  # that last: what has it is whole
                    if not ((folder / name).is_file() and (folder / name).stat().st_size == sizes[name]):
                        _download(save / name, folder / name, sizes[name])
    except OSError as error:
        raise _unable(save, "cannot be read", error) from None
    return folder


def _version(place: Path, about: dict[str, Any]) -> str:
    """A name for what an object holds now, from what a store says about it."""
    version = [str(about.get(key)) for key in ("generation", "etag", "ETag", "mtime", "size")]
    return hashlib.sha256("\n".join([str(place), *version]).encode()).hexdigest()[:20]


def _cache() -> Path:
    return Path(os.environ.get("TIEDJAX_CACHE") or "~/.cache/tiedjax").expanduser() / "objects"


def _download(place: Path, path: Path, size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        _store(place).get_file(str(place), str(temporary))
        if (came := temporary.stat().st_size) != size:
            raise OSError(f"{came:,} of {size:,} bytes came")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _say(line: str) -> None:
    print(f"tiedjax: {line}", file=sys.stderr, flush=True)


# ---- Files that grow ----


class Growing:
    """A folder on this machine's disk, whose files grow, and the place of a run where they are to be.

    On a disk both are one. In a store the files are uploaded whole, by a thread between two checkpoints and by `sync`
    at each. An upload that fails is said once and made up for by the next. `check` is called before one, and raises
    where this process may not write any more.
    """

    def __init__(self, out: Path, check: Callable[[], None] = lambda: None, say: Callable[[str], None] | None = None):
        self.out, self._remote, self._check = out, is_remote(out), check
        self._say = say or _say
        self.folder = Path(tempfile.mkdtemp(prefix="tiedjax-")) if self._remote else out
        self._uploaded: dict[str, bytes] = {}  # digests of what lies there, by name
        self._failed = False
        self._busy, self._ends = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._uploads, name="upload", daemon=True)
        if self._remote:
            self._thread.start()

    def fetch(self, name: str) -> None:
        """Brings what is there already under this name, if anything. UserError where that cannot be read."""
        if not self._remote:
            return
        try:
            if exists(self.out / name):
                content = read_bytes(self.out / name)
                with self._busy:
                    (self.folder / name).write_bytes(content)
                    self._uploaded[name] = hashlib.sha256(content).digest()
        except OSError as error:
            raise _unable(self.out / name, "cannot be read", error) from None

    def sync(self) -> bool:
        """Uploads what has changed; returns when it is there, and whether all of it is."""
        if not self._remote:
            return True
        with self._busy:
            self._check()
            for path in sorted(self.folder.rglob("*")):
                if path.is_file() and not path.name.startswith("."):
                    name = path.relative_to(self.folder).as_posix()
                    try:
                        content = path.read_bytes()
                    except FileNotFoundError:  # another process has removed what it wrote
                        continue
                    digest = hashlib.sha256(content).digest()
                    if self._uploaded.get(name) == digest:
                        continue
                    try:
                        write_atomically(self.out / name, content)
                    except UserError as error:
                        if not self._failed:
                            self._say(f"{error}; the run goes on and tries again")
                        self._failed = True
                        return False
                    self._uploaded[name] = digest
            if self._failed:
                self._say(f"{self.out}: can be written again; nothing of it is lost")
            self._failed = False
            return True

    def close(self) -> None:
        """Uploads what is left, and removes the local folder once all of it is there."""
        if not self._remote:
            return
        self._ends.set()
        self._thread.join()
        complete = False
        with contextlib.suppress(TrainingError):  # another process writes this run now
            complete = self.sync()
        if complete:
            shutil.rmtree(self.folder, ignore_errors=True)
        else:
            self._say(f"{self.out}: what could not be written is in {self.folder}")

    def _uploads(self) -> None:
        pause = UPLOAD_SECONDS
        while not self._ends.wait(pause):
            began = time.monotonic()
            try:
                self.sync()
            except TrainingError:  # whoever trains hears of it at the next checkpoint
                return
            pause = max(UPLOAD_SECONDS, (time.monotonic() - began) / UPLOAD_SHARE)


# ---- One writer ----


@dataclass(frozen=True)
class Holder:
    """A process that writes a run: where it runs, which it is, and until when it is known to."""

    host: str
    pid: int
    began: str  # the process's start in the machine's own ticks: a later process may get the same pid
    machine: str  # of the boot and the names of processes; "" where that is not known
    token: str
    expires: float  # seconds since 1970; 0 once it has ended

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    @classmethod
    def this(cls, expires: float = 0.0) -> Holder:
        """This process."""
        return cls(socket.gethostname(), os.getpid(), _start_of(os.getpid()), _machine(), secrets.token_hex(8), expires)

    @classmethod
    def parse(cls, content: bytes) -> Holder | None:
        """What `content` says; None where it says nothing that is understood."""
        try:
            holder = cls(**json.loads(content))
            return holder if isinstance(holder.expires, float | int) and isinstance(holder.pid, int) else None
        except (ValueError, TypeError):
            return None

    def dumps(self) -> bytes:
        """As JSON."""
        return (json.dumps(asdict(self)) + "\n").encode()

    @property
    def is_dead(self) -> bool:
        """Whether it ran on this machine and has ended. False where that is not known."""
        return self._ran_here and _start_of(self.pid) != self.began

    @property
    def is_alive(self) -> bool:
        """Whether it runs on this machine. False where that is not known."""
        return self._ran_here and not self.is_dead

    @property
    def _ran_here(self) -> bool:
        return bool(self.machine) and self.machine == _machine()


class Lease:
    """The right to write a folder of a store, renewed by a thread until it is left; `clock` and `pause` are for tests.

    Its record is an object in the folder's .lease/ that is named by a number. To take the lease is to create the next
    number, which a store lets one process alone do; the newest is never removed, so that nobody who is late creates
    it again. Renewing rewrites a record in place: nobody else writes it. One who finds its own expired creates a new
    one, as any other would.

    A holder that is known to live keeps others out: one that renews its lease while it is watched, or runs on this
    machine. One that is silent is watched for as long as a lease lasts by this machine's clock, unless its own has
    expired so long ago that no difference of two clocks explains it.
    """

    def __init__(
        self,
        folder: Path,
        seconds: float = LEASE_SECONDS,
        clock: Callable[[], float] = time.time,
        pause: Callable[[float], object] = time.sleep,
    ):
        self._folder, self._seconds, self._clock, self._pause = folder / LEASE, seconds, clock, pause
        self._out, self._number, self._holder = folder, 0, Holder.this()
        self._tried: set[str] = set()  # tokens of what this process has asked the store to create
        self._lost: str | None = None
        self._busy, self._ends = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._renewals, name="lease", daemon=True)

    def __enter__(self) -> Lease:
        try:
            self._take()
        except OSError as error:
            raise _unable(self._out, "cannot be written", error) from None
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join()
        if self._lost is None:
            with contextlib.suppress(OSError):  # it expires by itself
                self._write(0.0)

    def check(self) -> None:
        """Raises TrainingError unless this process alone may write now, TakenOverError if another does."""
        with self._busy:
            if self._lost is None and self._clock() >= self._holder.expires:
                try:
                    self._renew()
                except OSError as error:
                    raise TrainingError(
                        f"{self._out}: the right to write could not be renewed: {error.strerror}; the same command "
                        "continues"
                    ) from None
            if self._lost is not None:
                raise TakenOverError(self._lost)

    def renew(self) -> None:
        """Puts the expiry off, or notes that another process has taken over; tries again later if it cannot."""
        with self._busy, contextlib.suppress(OSError):
            self._renew()

    def _renew(self) -> None:
        expired = self._clock() >= self._holder.expires
        if not expired:
            self._write(self._clock() + self._seconds)
        newest, holder = self._newest()
        if newest == self._number and expired:
            if self._created(newest + 1):
                self._number = newest + 1
                self._remove_older()
            newest, holder = self._newest()
        if newest != self._number and holder and holder.token in self._tried:  # created, and the answer was lost
            self._number, self._holder = newest, holder
        elif newest != self._number:
            self._lost = f"{self._out}: {holder or 'another process'} has taken over this run; this one ends"

    def _renewals(self) -> None:
        while not self._ends.wait(self._seconds / 4) and self._lost is None:
            self.renew()

    def _take(self) -> None:
        for _ in range(10):  # each time around another has come first
            newest = self._free()
            if self._created(newest + 1) and self._newest()[0] == newest + 1:
                self._number = newest + 1
                self._remove_older()
                return
        raise LockedError(f"{self._out}: other processes keep taking this run; end them or choose another --out")

    def _free(self) -> int:
        """The number of the newest record once its holder is gone; LockedError once it is known to live."""
        first = number, holder = self._newest()
        until = self._clock() + self._seconds + MARGIN
        said = False
        while holder and not holder.is_dead:
            left = min(until, holder.expires + SKEW) - self._clock()
            if left <= 0:
                break
            if holder.is_alive or (number, holder) != first:
                raise LockedError(f"{self._out}: {holder} is writing this run; wait for it or choose another --out")
            if not said:
                _say(
                    f"{self._out}: {holder} holds this run and may be gone; this process takes it over in "
                    f"{round(left)} s unless that one renews its lease"
                )
                said = True
            self._pause(min(left, self._seconds / LOOKS))
            number, holder = self._newest()
        return number

    def _remove_older(self) -> None:
        for number in self._numbers():
            if number < self._number:
                with contextlib.suppress(OSError):
                    remove(self._record(number))

    def _created(self, number: int) -> bool:
        holder, path = Holder.this(self._clock() + self._seconds), self._record(number)
        self._tried.add(holder.token)
        try:
            with _as_os_errors(path):
                _store(path).pipe_file(str(path), holder.dumps(), mode="create")
        except FileExistsError:
            # A request whose answer was lost is sent again, and then finds what it has written itself.
            written = Holder.parse(read_bytes(path))
            if written is None or written.token != holder.token:
                return False
        self._holder = holder
        return True

    def _write(self, expires: float) -> None:
        path = self._record(self._number)
        holder = Holder(**{**asdict(self._holder), "expires": expires})
        with _as_os_errors(path):
            _store(path).pipe_file(str(path), holder.dumps())
        self._holder = holder

    def _record(self, number: int) -> Path:
        return self._folder / f"{number:06d}"

    def _numbers(self) -> list[int]:
        return [int(name) for name in names(self._folder) if name.isdigit()]

    def _newest(self) -> tuple[int, Holder | None]:
        for _ in range(10):
            number = max(self._numbers(), default=0)
            try:
                return number, Holder.parse(read_bytes(self._record(number))) if number else None
            except FileNotFoundError:
                continue  # whoever took the next number has just removed it
        raise OSError(errno.EAGAIN, "its lease changes all the time")


class Lock:
    """What holding a folder of a disk gives; it cannot be lost."""

    def check(self) -> None:
        """Nothing: the lock ends with the process, however it ends."""


@contextlib.contextmanager
def sole_writer(directory: Path) -> Iterator[Lease | Lock]:
    """Creates the folder and holds it: two jobs that write one run would mix their weights.

    Raises UserError if it cannot be written, LockedError, which names the other, if another live process holds it.
    """
    if is_remote(directory):
        with Lease(directory) as lease:
            yield lease
    else:
        with files.sole_writer(directory, str(Holder.this())):
            yield Lock()


def _start_of(pid: int) -> str:
    """When a process began, in ticks since the boot; "" where there is none, or that cannot be known."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        state, *rest = stat.rpartition(")")[2].split()
    except (OSError, ValueError):
        return ""
    return "" if state in "ZX" else rest[18]  # a zombie writes nothing


def _machine() -> str:
    """This boot of this machine and its processes' namespace: within it a pid means one process. "" if not known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""
