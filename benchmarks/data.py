"""Measures the preparation of text (read, tokenize, write shards) and the reading of batches, in tokens per second.

    python benchmarks/data.py --machine "2-core x86-64 virtual machine"

Writes benchmarks/results/data.json. Preparation is `tiedjax data prepare` with a tokenizer that is there already, of
the embedded corpus and of a larger .jsonl that repeats it; training that tokenizer is timed apart. Batches are read
in shuffled order from the shards on disk, as a run reads them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

from tiedjax.config import DataConfig
from tiedjax.data.batches import Batches
from tiedjax.data.prepare import prepare
from tiedjax.data.prepared import Prepared
from tiedjax.data.sources import documents
from tiedjax.data.tokenizer import train_bpe

SAVED = Path(__file__).parent / "results" / "data.json"
VOCABULARIES = (4096, 32_768)
BATCHES = ((64, 16), (64, 256), (1024, 256), (4096, 64))  # (positions T, sequences)


def write_repeated(texts: list[str], times: int, path: Path) -> Path:
    """A .jsonl that holds every text `times` times, each time as a document of its own."""
    with path.open("w", encoding="utf-8") as file:
        for repeat in range(times):
            for text in texts:
                file.write(json.dumps({"text": f"{repeat}\n{text}"}) + "\n")
    return path


def preparation(source: str, vocab_size: int, tokenizer: Path, folder: Path, repeats: int) -> dict[str, Any]:
    """Seconds of preparing a source with a given tokenizer, and tokens per second by their median."""
    seconds = []
    for repeat in range(repeats):
        data = DataConfig(source=source, tokenizer=str(tokenizer), cache=str(folder / "cache"))
        began = time.perf_counter()
        prepared = prepare(data, vocab_size, report=lambda line: None, out=folder / f"{vocab_size}-{repeat}")
        seconds.append(time.perf_counter() - began)
    tokens = prepared.num_tokens("train") + prepared.num_tokens("eval")
    return {
        "vocab_size": vocab_size,
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / statistics.median(seconds),
    }


def reading(prepared: Prepared, seq_len: int, batch_size: int, workers: int, windows: int) -> dict[str, Any]:
    """Tokens per second (inputs, that is T a sequence) of several windows of time; every batch is looked at."""
    batches = iter(Batches(prepared, seq_len, batch_size, seed=0, workers=workers).iterate())
    count = max(2_000_000 // (seq_len * batch_size), 20)
    rates = []
    for _ in range(windows + 1):  # the first starts the threads
        began = time.perf_counter()
        for tokens_BS in islice(batches, count):
            assert tokens_BS.shape == (batch_size, seq_len + 1)
        rates.append(count * batch_size * seq_len / (time.perf_counter() - began))
    return {
        "seq_len": seq_len,
        "batch_size": batch_size,
        "tokens_per_second": statistics.median(rates[1:]),
        "tokens_per_second_range": [min(rates[1:]), max(rates[1:])],
    }


def measure(folder: Path, repeats: int, times: int, workers: int) -> dict[str, Any]:
    """Everything, in a folder that may be thrown away."""
    cache = folder / "cache"
    texts = list(documents(DataConfig(), cache))  # also makes the embedded corpus, once
    sources = {
        "embedded": "embedded",
        f"text: the embedded corpus {times} times": f"text:{write_repeated(texts, times, folder / 'repeated.jsonl')}",
    }
    trained, prepared = [], []
    for vocab_size in VOCABULARIES:
        began = time.perf_counter()
        tokenizer = train_bpe(texts, vocab_size)
        trained.append({"vocab_size": vocab_size, "seconds": time.perf_counter() - began})
        path = folder / f"tokenizer-{vocab_size}.json"
        path.write_text(tokenizer.to_str(), encoding="utf-8")
        for number, (name, source) in enumerate(sources.items()):
            measured = preparation(source, vocab_size, path, folder / str(number), repeats)
            prepared.append({"source": name, **measured})
            print(json.dumps(prepared[-1]), flush=True)
    tokens = DataConfig(source=f"prepared:{folder / '1' / f'{VOCABULARIES[0]}-0'}")
    shards = prepare(tokens, VOCABULARIES[0], report=lambda line: None)
    read = []
    for seq_len, batch_size in BATCHES:
        read.append(reading(shards, seq_len, batch_size, workers, repeats))
        print(json.dumps(read[-1]), flush=True)
    characters = sum(map(len, texts))
    return {"characters": characters, "tokenizer_training": trained, "preparation": prepared, "batches": read}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", required=True, help="what it runs on, in words")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--times", type=int, default=8, help="how often the larger text repeats the embedded corpus")
    parser.add_argument("--json", type=Path, default=SAVED, help="where the results go")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        measured = measure(Path(scratch), args.repeats, args.times, os.cpu_count() or 1)
    results = {
        "machine": args.machine,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in ("tokenizers", "grain", "numpy")},
        **measured,
    }
    args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
