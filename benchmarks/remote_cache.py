"""Measure how long kto-train takes to its first batch from a cache on S3: moto's server behind a slow network.

    python benchmarks/remote_cache.py
    python benchmarks/remote_cache.py --rows 65536 --megabytes 10 --latency 0.03

The network is a proxy that delays the first byte of each answer and limits each connection, as one connection to S3 is
limited. The last table says why all shards are downloaded before the first update: which share of them the first
updates need, in the order of the first epoch.
"""

import argparse
import asyncio
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from text_table import text_table
from workload import SMALL, make_workload

from offline_kto.kto_core.cache.labels_hash import labels_hash_of
from offline_kto.kto_core.cache.manifest import fingerprint, identity_of, read_manifest, write_manifest
from offline_kto.kto_core.cache.shards import shard_name
from offline_kto.kto_core.hashing import file_hash, json_hash
from offline_kto.precompute.config import PrecomputeConfig
from offline_kto.precompute.run import precompute
from offline_kto.train.data.batches import EpochBatches

ROWS_PER_SHARD, ROWS_PER_GROUP, BATCH = 4096, 64, 32
_CHUNK = 2**16


class SlowNetwork:
    """A proxy in front of a port of this machine.

    Args:
        port: of the server.
        rate: bytes per second of each connection, towards the client.
        latency: seconds before the first byte of an answer.
    """

    def __init__(self, port: int, rate: float, latency: float) -> None:
        self._server, self._rate, self._latency = port, rate, latency
        self.port = free_port()
        started = threading.Event()
        threading.Thread(target=lambda: asyncio.run(self._serve(started)), daemon=True).start()
        started.wait()

    async def _serve(self, started: threading.Event) -> None:
        server = await asyncio.start_server(self._connect, "127.0.0.1", self.port)
        started.set()
        await server.serve_forever()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answers, requests = await asyncio.open_connection("127.0.0.1", self._server)
        asked = [time.monotonic()]

        async def forward() -> None:
            while data := await reader.read(_CHUNK):
                asked[0] = time.monotonic()
                requests.write(data)
                await requests.drain()
            requests.close()

        async def answer() -> None:
            free = 0.0  # when the connection may send again
            while data := await answers.read(_CHUNK):
                free = max(free, time.monotonic(), asked[0] + self._latency) + len(data) / self._rate
                await asyncio.sleep(free - time.monotonic())
                writer.write(data)
                await writer.drain()
            writer.close()

        await asyncio.gather(forward(), answer(), return_exceptions=True)


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_store() -> tuple[subprocess.Popen[bytes], int]:
    """Start moto's server in its own process, and return it with its port."""
    port = free_port()
    program = f"from moto.server import main; main(['-p', '{port}'])"
    store = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return store, port
        time.sleep(0.1)
    raise RuntimeError("moto's server did not start")


def make_cache(folder: Path, small: Path, shards: int) -> None:
    """Write a cache whose row groups all repeat the one of a small real cache."""
    made = read_manifest(small)
    group = pq.read_table(small / made.shards[0]["file"])
    (folder / "train").mkdir(parents=True)
    table = pa.concat_tables([group] * (ROWS_PER_SHARD // ROWS_PER_GROUP))
    entries = []
    for number in range(shards):
        path = folder / shard_name(number)
        metadata = {
            name: json.dumps({**json.loads(it), "key": str(number)}) for name, it in group.schema.metadata.items()
        }
        pq.write_table(table.replace_schema_metadata(metadata), path, row_group_size=ROWS_PER_GROUP, compression="zstd")
        entries.append(
            {"file": shard_name(number), "rows": len(table), "bytes": path.stat().st_size, "sha256": file_hash(path)}
        )
    names = ("reference", "tokenizer", "tokenization", "pairing", "scorer", "data", "run")
    parts = {name: getattr(made, name) for name in names}
    times = shards * ROWS_PER_SHARD // ROWS_PER_GROUP
    counts = {name: made.data[name] * times for name in ("read", "kept", "desirable", "undesirable")}
    hashes = {
        "rows_hash": json_hash(shards),
        "labels_hash": labels_hash_of((folder / entry["file"] for entry in entries), made.columns),
    }
    parts["data"] = {**parts["data"], **counts, **hashes}
    write_manifest(folder, parts, entries, fingerprint(identity_of(parts), parts["pairing"], json_hash(shards)))


def seconds_to_first_batch(cache: str, out: Path) -> float:
    """Run kto-train for one update, and return after how many seconds it began."""
    command = [sys.executable, "-c", "from offline_kto.train.cli import train; train()", "--cache", cache]
    command += ["--out", str(out), "--max-steps", "1", "--batch-size", str(BATCH), "--save-steps", "0"]
    command += ["--device", "cpu"]
    started, found, said = time.perf_counter(), 0.0, []
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        said.append(line)
        if line.startswith("start "):
            found = time.perf_counter() - started
    if process.wait() or not found:
        raise RuntimeError(f"kto-train failed:\n{''.join(said)}")
    return found


def measure(work: Path, rows: int, rate: float, latency: float) -> list[tuple[str, float, str]]:
    """Return name, value and unit of every measurement."""
    made = make_workload(work / "workload", data=None, num_rows=ROWS_PER_GROUP, shape=SMALL, seed=0)
    precompute(PrecomputeConfig(model=str(made.model), data=str(made.data), out=work / "small"))
    folder = work / "large"
    make_cache(folder, work / "small", rows // ROWS_PER_SHARD)
    size = sum(path.stat().st_size for path in folder.rglob("*.parquet"))
    store, port = start_store()
    try:
        environment = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
        os.environ.update(environment, XDG_CACHE_HOME=str(work / "home"))
        files = fsspec.filesystem("s3", endpoint_url=f"http://127.0.0.1:{port}")
        files.makedirs("bucket", exist_ok=True)
        for path in [*folder.rglob("*.parquet"), folder / "manifest.json"]:
            files.put_file(str(path), f"bucket/refs/{path.relative_to(folder).as_posix()}")
        os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{SlowNetwork(port, rate, latency).port}"
        local = seconds_to_first_batch(str(folder), work / "run-local")
        first = seconds_to_first_batch("s3://bucket/refs", work / "run-first")
        again = seconds_to_first_batch("s3://bucket/refs", work / "run-again")
    finally:
        store.kill()
    return [
        ("files", size / 1e6, "MB"),
        ("shards", rows // ROWS_PER_SHARD, ""),
        ("one connection needs for all of it", size / rate, "s"),
        ("kto-train to its first batch, from a folder", local, "s"),
        ("the same from S3, downloaded before", again, "s"),
        ("the same from S3, for the first time", first, "s"),
    ]


def shards_needed(rows: int, updates: int) -> float:
    """Return which share of the shards the first updates of a shuffled epoch need."""
    batches = iter(EpochBatches([np.arange(rows)[:, None]], BATCH, shuffle=True, seed=0))
    needed = {key.index // ROWS_PER_SHARD for _ in range(updates) for key in next(batches)}
    return len(needed) / -(-rows // ROWS_PER_SHARD)


def main() -> None:
    """Measure, and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=65_536)
    parser.add_argument("--megabytes", type=float, default=10.0, help="per second and connection")
    parser.add_argument("--latency", type=float, default=0.03, help="seconds")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        found = measure(Path(temporary), args.rows, args.megabytes * 1e6, args.latency)
    print(text_table([f"{args.rows:,} rows", "", ""], [[n, f"{v:,.1f}", u] for n, v, u in found]))
    counts = (1, 2, 5, 12)
    table = [
        [f"{rows:,}", *(f"{shards_needed(rows, updates):.0%}" for updates in counts)] for rows in (args.rows, 1_000_000)
    ]
    print(text_table(["rows", *(f"update {count}" for count in counts)], table))


if __name__ == "__main__":
    main()
