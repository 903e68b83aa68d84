"""How batches come in time: made ahead in processes or a thread, from encodings that are kept on the disk."""
import hashlib
import json
import os
import signal
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch
from safetensors import safe_open
from torch.utils.data import DataLoader

from checkpoint import reading, write_safetensors

def worker_count(args, device):
    """--workers; where it was not given 0, but up to 4 on GPUs at published sizes."""
    if (given := getattr(args, "workers", 0)) is None and args.config != "tiny" and torch.device(device).type == "cuda":
        return max(1, min(4, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    return given or 0

def on_its_own(worker):
    """A signal reaches a whole group of processes, but workers end after their run: when it says so, or is gone."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)

def prefetch(make, items, workers=0, pin=False, depth=2):
    """Yields make(item) for each item, in order, made ahead: in a thread, or in so many processes, which are forked and
    so share this one's memory. pin: for copies to a GPU. Close the generator before the program ends."""
    if workers:
        import resource  # not on Windows; each tensor on its way is an open file
        resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    made = iter(DataLoader(items, None, num_workers=workers, collate_fn=make, pin_memory=pin, worker_init_fn=on_its_own,
                           multiprocessing_context="fork" if workers else None, generator=torch.Generator()))
    pool, ahead = ThreadPoolExecutor(1), deque()
    try:
        for _ in items:
            ahead.append(pool.submit(next, made))
            if len(ahead) > depth:
                yield ahead.popleft().result()
        yield from (future.result() for future in ahead)
    finally:  # a thread that is still inside torch while Python shuts down aborts the process
        pool.shutdown(wait=True, cancel_futures=True)

SHARD = 512  # rows in a file of --cache

def cache_key(model, stage, source, example):
    """A hash of all that the encodings of a data.Images depend on: the weights of precompute that nobody trains, the
    settings, preprocessing (example: what it made of a fixed picture), and the files: names, sizes, times of change."""
    key, stat_of = hashlib.sha256(), lru_cache(None)(os.stat)
    encoders = getattr(model, "encoders", None)  # the submodules that precompute uses; None: any
    for name, t in model.state_dict(keep_vars=True).items():
        if not t.requires_grad and (encoders is None or name.split(".")[0] in encoders):
            t = getattr(t, "full_tensor", t.detach)().cpu().contiguous().flatten()  # full_tensor: of a sharded model
            key.update(f"{name} {t.dtype}".encode() + t.view(torch.uint8).numpy().tobytes())
    settings = {k: v for k, v in vars(model.config).items() if k != "cfg"}, stage, source.exif
    key.update(repr(settings).encode() + example.numpy().tobytes())
    for s in source.samples:
        found = stat_of(s.file)
        about = os.path.abspath(s.file), found.st_size, found.st_mtime_ns, s.offset, s.size, s.group
        key.update(repr(about).encode())
    return key.hexdigest()[:20]

def packed(encodings):
    """As they are kept on the disk: floats as bf16, codes in 16 bits where they fit."""
    codes = {k: v for k, v in encodings.items() if v.dtype == torch.int64 and 0 <= v.min() and v.max() < 1 << 16}
    floats = {k: v.bfloat16() for k, v in encodings.items() if v.is_floating_point()}
    return encodings | floats | {k: v.to(torch.uint16) for k, v in codes.items()}

def checksum(tensors, row):
    return zlib.crc32(b"".join(tensors[k][row:row + 1].view(torch.uint8).numpy().tobytes() for k in sorted(tensors)))

class Cache:
    """Frozen encodings of n pictures on the disk, in files that are there whole or not at all and are mapped, not read.
    Each row has a checksum, since nobody reads a whole file before a run. ValueError for a damaged one."""

    def __init__(self, folder, n):
        self.paths = [os.path.join(folder, f"{start:09d}.safetensors") for start in range(0, n, SHARD)]
        self.size, self.shards, self.good, self.types = SHARD, [], [], {}

    def write(self, shard, encodings, verdicts):
        """verdicts: {name: why} of the pictures among these rows that are broken, and of those that are rejected."""
        tensors, types = packed(encodings), {k: str(v.dtype).removeprefix("torch.") for k, v in encodings.items()}
        sums = torch.tensor([checksum(tensors, row) for row in range(len(next(iter(tensors.values()))))])
        write_safetensors(self.paths[shard], tensors | {"sums": sums}, {"about": json.dumps([types, verdicts])})

    def open(self, source):
        """Maps all files, and drops from `source` (a data.Images) what could not be used."""
        for path in self.paths:
            with reading(path, "damaged file of --cache", ": delete it"), safe_open(path, "pt") as f:
                self.shards.append({k: f.get_tensor(k) for k in f.keys()})
                self.types, (broken, rejected) = json.loads(f.metadata()["about"])
            source.problems |= broken
            source.rejected |= rejected
        self.good = source.keep_good()

    def rows(self, index):
        """{name: tensor} of some of the good pictures, in the types that the model made."""
        found = []
        for shard, row in (divmod(self.good[int(i)], self.size) for i in index):
            sums, tensors = self.shards[shard]["sums"], {k: self.shards[shard][k] for k in self.types}
            if checksum(tensors, row) != sums[row]:
                raise ValueError(f"{self.paths[shard]}: damaged file of --cache (row {row}): delete it")
            found.append({k: tensors[k][row].to(getattr(torch, kind)) for k, kind in self.types.items()})
        return {k: torch.stack([row[k] for row in found]) for k in self.types}
