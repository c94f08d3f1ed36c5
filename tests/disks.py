"""Disks that a test may fill."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def small_disk(folder: Path, size: int, files: int = 0) -> Iterator[Path]:
    """A disk of its own, of so many KiB, at a folder that is made; skips the test where none can be mounted.

    It holds so many files and folders, itself one of them; 0: any number.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}k,nr_inodes={files}", "none", str(folder)]
    mounted = subprocess.run(command, capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no disk can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path, leave: int = 0) -> Path:
    """The file that takes what was left of a disk, but for so many KiB."""
    filler = disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(disk).free - 1024 * leave))
    return filler


def enlarge(disk: Path, size: int) -> None:
    """Gives a disk so many KiB."""
    subprocess.run(["mount", "-o", f"remount,size={size}k", str(disk)], check=True)


def kib(folder: Path) -> int:
    """What the files below a folder take of a disk, in KiB: whole pages."""
    return sum(-(-path.stat().st_size // 4096) * 4 for path in folder.rglob("*") if path.is_file())
