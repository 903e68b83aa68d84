"""Every way weights and run state go in and out. A folder of ours is `model.safetensors` + `config.json` (what
sample.py loads) and, where a run can go on, `checkpoint.pt` (what --resume loads). Published checkpoints are read in
the format in which they were published, strictly, and without executing anything that is in them.
"""
import contextlib
import dataclasses
import enum
import hashlib
import importlib
import inspect
import itertools
import json
import os
import pathlib
import pickle
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import typing
import zipfile
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from custom_kernels import load_lora, lora_config, lora_layers, lora_state, merge_lora
from custom_kernels.products import use_products
from text_tokenizer import BadFile, check_file, load_tokenizer, origin, read_json, reading

try:
    import fcntl
except ImportError:  # Windows has no such locks: there two runs in one folder are not noticed
    fcntl = None

HERE = os.path.dirname(os.path.abspath(__file__))
WEIGHT_FILES = (".safetensors", ".bin", ".pth", ".pt", ".ckpt")

# ---------------------------------------------------------------------------------------------------------------------
# writing, and what every script needs at its edges

def reason_of(e):
    """The first line of an error: some of torch's go on with a page of advice."""
    return (str(e).strip() or type(e).__name__).splitlines()[0][:160]

def atomic(path, write):
    """Calls write(temporary path beside `path`), syncs that file and its folder to the disk and renames it: after a
    crash or on a full disk `path` holds what it held before. Links are followed. Raises OSError in one line, also for a
    path that is no regular file."""
    path = os.path.realpath(path)
    if os.path.lexists(path) and not os.path.isfile(path):
        raise OSError(f"{path}: is a folder or a device, which is not replaced by a file: give another name")
    temporary = f"{path}.tmp{os.getpid()}"
    try:
        with open(temporary, "wb") as f:
            mode = os.fstat(f.fileno()).st_mode
        write(temporary)
        os.chmod(temporary, mode)  # safetensors makes files that only their owner can read
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
        folder = os.open(os.path.dirname(path), os.O_RDONLY)
        os.fsync(folder)  # the new name, too
        os.close(folder)
    except (OSError, RuntimeError, SafetensorError) as e:  # torch and safetensors raise their own kinds on a full disk
        reason = getattr(e, "strerror", None) or reason_of(e)
        raise OSError(f"{path}: cannot be written ({reason}); what was there before is untouched") from origin(e)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)

def write_text(path, text):
    atomic(path, lambda temporary: pathlib.Path(temporary).write_text(text, encoding="utf-8"))

MANY = 10 ** 9
RANGES = {  # lowest and highest value of every flag that is a number, in train.py, sample.py and evaluate.py
    **dict.fromkeys(("steps", "log_every", "pool"), (1, MANY)),
    **dict.fromkeys(("warmup", "save_every", "eval_every", "eval_n", "stop_after", "clip", "preview_every"), (0, MANY)),
    **dict.fromkeys(("batch", "n", "max_new_tokens"), (1, 10 ** 6)), **dict.fromkeys(("accum", "threads"), (1, 4096)),
    "drop": (0, 1), **dict.fromkeys(("listings", "exact_captions"), (0, 1)), "questions": (1, 64), "workers": (0, 256),
    **dict.fromkeys(("betas", "ema"), (0, 1 - 1e-9)), **dict.fromkeys(("lr", "muon_lr", "muon_decay"), (0, 100)),
    **dict.fromkeys(("weight_decay", "temperature"), (0, 100)), **dict.fromkeys(("i2t_weight", "t2i_weight"), (0, 1e6)),
    **dict.fromkeys(("cache_gb", "data_weights"), (0, 1e6)), "preview": (0, 64), "cfg": (1, 1000), "lora": (0, 4096),
    "seed": (0, 2 ** 62)}

def check_ranges(args):
    """Raises ValueError for a number outside of its range; nan is outside of every range."""
    for name, (low, high) in RANGES.items():
        given = getattr(args, name, None)
        for value in given if isinstance(given, (list, tuple)) else [given]:
            if value is not None and not low <= value <= high:
                flag = f"--{name.replace('_', '-')} {value:g}"
                raise ValueError(f"{flag}: must be from {low:g} to {high:g}" + " (1 is no guidance)" * (name == "cfg"))

def refuse_unused(parser, argv, *uses):
    """Raises ValueError for a flag that was typed, but not as 0, which asks for nothing, and would change nothing.
    uses: ("flag flag ...", are these used with the others that were given?, what they are for)."""
    parser.set_defaults(**dict.fromkeys(vars(parser.parse_args(argv))))  # to None, which nobody can type
    typed = vars(parser.parse_args(argv))
    for flag, used, purpose in ((flag, *use) for flags, *use in uses for flag in flags.split()):
        if not used and typed.get(flag.replace("-", "_")):
            raise ValueError(f"--{flag} is for {purpose}: here it would change nothing, leave it out")

def check_device(name, dtype=None, compiled="off", world=1):
    """ValueError for a --device that is not there, and on mps (Apple's GPUs) for more than fp32 and one process."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    found = dict(cpu=1, cuda=torch.cuda.device_count(), mps=int(torch.backends.mps.is_available())).get(device.type)
    if found is None:
        raise ValueError(f"--device {name}: no such device; cpu, cuda, cuda:1, mps ...")
    if found <= (device.index or 0):
        raise ValueError(f"--device {name}: this torch ({torch.__version__}) sees {found} of that kind; give --device "
                         "cpu, or install a build of torch for it")
    if device.type == "mps" and (dtype in ("bf16", torch.bfloat16) or compiled == "on" or world > 1):
        raise ValueError(f"--device {name}: fp32, not compiled, one process: leave out --dtype, --compile and torchrun")

def free_memory(device):
    """Bytes that are free on a torch.device; infinite where nothing says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "cpu" and os.path.exists("/proc/meminfo"):  # Linux
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    return float("inf")

def one_line_errors(main):
    """Runs main() and exits with what it returns. What the user can put right (a missing file, a wrong value, too
    little memory) ends with its message alone and exit code 2; NANORECA_TRACEBACK=1 shows where it came from."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # names that a terminal cannot print are escaped
    try:
        sys.exit(main() or 0)
    except KeyboardInterrupt:
        if first_to_fail():
            print("interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
    except Exception as e:
        peer = isinstance(e, dist.DistError) or (isinstance(e, RuntimeError) and "gloo" in str(e))
        known = (ValueError, OSError, ImportError, MemoryError, torch.OutOfMemoryError)
        if "DataLoader worker" in str(e):  # raised wherever this process happens to be
            e = MemoryError(f"a process of --workers has died ({reason_of(e)}), mostly for want of (shared) memory: "
                            "give fewer --workers, or 0")
        if os.environ.get("NANORECA_TRACEBACK") or not (peer or isinstance(e, known)):
            raise
        if peer:
            e = f"another process of this run has died ({reason_of(e)}): go on with --resume"
        if isinstance(e, (FileExistsError, NotADirectoryError)) and e.filename:
            e = f"{e.filename}: a file stands where a folder is needed: give another path"
        if first_to_fail():
            table = getattr(e, "table", "") * ("--verbose" in sys.argv)
            print(f"error: {str(e) or type(e).__name__}{table}", file=sys.stderr, flush=True)
        sys.exit(2)

def remark(text):
    """A line, if it is one, that is no result of a script; of the first process only."""
    if text and int(os.environ.get("RANK", 0)) == 0:
        print(text, file=sys.stderr, flush=True)

def first_to_fail():
    """Under torchrun one fault is one line: is this the first process of this launch that has something to say?"""
    launcher = f"/proc/{os.getppid()}/stat"
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or not os.path.exists(launcher):
        return True
    with open(launcher) as f:
        started = f.read().rsplit(")", 1)[1].split()[19]  # so that a later launcher with this number is another one
    try:
        marker = os.path.join(tempfile.gettempdir(), f"nanoreca-{os.getppid()}-{started}")
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True

def end_with_launcher():
    """Ends this process within 10 seconds of its launcher's death, with a checkpoint if a step ends in time."""
    launcher = os.getppid()

    def watch():
        while os.getppid() == launcher:
            time.sleep(1)
        print("the launcher of this process has died: stopping", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(7)
        os._exit(2)
    threading.Thread(target=watch, daemon=True).start()

def git_commit():
    try:
        command = ["git", "-C", HERE, "describe", "--always", "--dirty", "--exclude=*"]  # dirty: with changes
        return subprocess.run(command, capture_output=True, text=True, timeout=5).stdout.strip() or "unknown"
    except OSError:
        return "unknown"

# ---------------------------------------------------------------------------------------------------------------------
# weight files

def check_weight_file(path):
    """Raises FileNotFoundError, or BadFile for what cannot be a file of weights."""
    check_file(path, "weight file")
    if not path.endswith(WEIGHT_FILES):
        raise BadFile(f"{path}: unknown kind of weight file, expected a name ending in {', '.join(WEIGHT_FILES)}, or a "
                      "folder")
    with open(path, "rb") as f:
        if f.read(20).startswith(b"version https://git"):
            raise BadFile(f"{path}: a git-lfs pointer of {os.path.getsize(path)} bytes, not the weights: run `git lfs "
                          "pull`")

def read_safetensors(path):
    """What to open and read a safetensors file in."""
    return reading(path, "not a complete safetensors file", ": copy or download it again")

WRAPPERS = ("model", "state_dict", "module", "ema")  # the first is taken where nobody chose
PREFIXES = re.compile(r"((module|model|_orig_mod)\.)*")  # of DDP, of trainers, of torch.compile
CHOSEN = {}  # --ckpt: --weights, for read_weights, which is called deep in a model file

def choose(args):
    """Notes --weights for when --ckpt is read. Raises ValueError where there is no --ckpt."""
    if args.weights and not args.ckpt:
        raise ValueError(f"--weights {args.weights} chooses among the state dicts of a --ckpt, and there is none")
    CHOSEN[args.ckpt] = args.weights

def unwrapped(state, path, choice=None):
    """The state dict in a training checkpoint, which has it, or several, beside optimizer state and counters: the one
    under the key `choice`, else under the first of WRAPPERS -> (state dict, what to say about that). Raises ValueError
    where `choice` is none."""
    keys, others = [], []
    while isinstance(state, dict) and (found := [k for k in (choice, *WRAPPERS) if isinstance(state.get(k), dict)]):
        keys, others, state = [*keys, found[0]], [*others, *found[1:]], state[found[0]]
    if choice and choice not in keys:
        raise BadFile(f"{path}: --weights {choice}: no such state dict in it, only {', '.join(keys + others) or 'one'}")
    rest = f", not {', '.join(sorted({*others} - {*keys}))} (--weights chooses)" * bool({*others} - {*keys})
    return state, f"{path}: weights under {'.'.join(keys)}{rest}" * bool(keys)

def read_pickle(path, device, choice=None):
    with reading(path, "cannot be read as a file of tensors", ". It is truncated, no PyTorch file, or holds Python "
                 "objects, which are never executed here: copy it again or convert it to .safetensors"):
        mmap = zipfile.is_zipfile(path) or None  # paged in tensor by tensor; older files are no zip archives
        state = torch.load(path, map_location=device, weights_only=True, mmap=mmap)
    state, taken = unwrapped(state, path, choice)
    if not isinstance(state, dict):
        raise BadFile(f"{path}: holds a {type(state).__name__}, expected a dict of tensors, maybe under one of "
                      f"{', '.join(WRAPPERS)}")
    for name, value in state.items():
        if not isinstance(value, torch.Tensor) or not isinstance(name, str):
            raise BadFile(f"{path}: entry {name!r} is a {type(value).__name__}, expected a tensor under a name: save "
                          "the model's plain state dict")
        if value.layout != torch.strided or value.is_meta or value.is_quantized:
            raise BadFile(f"{path}: {name} is a sparse, quantized or empty (meta) tensor, expected a plain one")
    remark(taken)
    return state

def weight_files(folder):
    """The weight files of a folder, {path: names that must be in it}: with an index all its shards, otherwise
    model.safetensors, pytorch_model.bin or the only one there."""
    files = sorted(name for name in os.listdir(folder) if not os.path.isdir(os.path.join(folder, name)))
    names = [name for name in files if name.endswith(WEIGHT_FILES)]
    usual = [name for kind in ("model.safetensors", "pytorch_model.bin") for name in (f"{kind}.index.json", kind)
             if name in files]
    if len(usual) > 1:
        remark(f"{folder}: {usual[0]} is read, {', '.join(usual[1:])} not")
    if usual and usual[0].endswith(".json"):
        path, shards = os.path.join(folder, usual[0]), {}
        file = read_json(path)
        table = file.get("weight_map") if isinstance(file, dict) else None
        if not isinstance(table, dict) or not table:
            raise BadFile(f"{path}: has no table 'weight_map' of tensors and their files: fetch it again")
        for name, shard in table.items():
            if not isinstance(shard, str) or shard != os.path.basename(shard):  # "../x" leads out of the folder
                raise BadFile(f"{path}: {name} is said to be in {str(shard)[:80]!r}, expected a file's plain name")
            shards.setdefault(shard, []).append(name)
        missing = sorted(set(shards) - set(names))
        if missing:
            raise FileNotFoundError(f"{folder}: {len(missing)} of {len(shards)} shards in {usual[0]} are missing, "
                                    f"first {missing[0]}")
        return {os.path.join(folder, shard): shards[shard] for shard in sorted(shards)}
    names = usual[:1] or names
    if "adapter_model.safetensors" in names and not usual:
        raise ValueError(f"{folder}: a run with --lora, which holds adapters alone: give sample.py and evaluate.py its "
                         f"base as --ckpt, and --lora {folder}; train.py --export joins the two")
    if len(names) != 1:
        raise FileNotFoundError(f"{folder}: a folder with {len(names)} weight files {names}: name the one to read")
    return {os.path.join(folder, names[0]): []}

def read_weights(path, device="cpu"):
    """Reads a checkpoint into {name: tensor} on `device`: a .safetensors file, a .pth/.pt/.bin/.ckpt pickle of
    tensors (read without executing anything, and `unwrapped`), or a folder (see weight_files). PREFIXES that ALL names
    share are left out, since no published model has such names alone. On the CPU tensors are mapped: what is not looked
    at takes no memory. Raises FileNotFoundError or ValueError: one line that names the path."""
    path, weights = os.fspath(path), {}
    choice = CHOSEN.get(path) or CHOSEN.get(os.path.dirname(path))
    for file, promised in (weight_files(path) if os.path.isdir(path) else {path: []}).items():
        check_weight_file(file)
        if file.endswith(".safetensors"):
            with read_safetensors(file), safe_open(file, framework="pt", device=str(device)) as f:
                state = {name: f.get_tensor(name) for name in f.keys()}
            unwrapped(state, file, choice)
        else:
            state = read_pickle(file, device, choice)
        lost = [name for name in promised if name not in state]
        if lost:
            raise BadFile(f"{file}: lacks {len(lost)} tensors that the folder's index says it holds, first {lost[0]}")
        weights.update(state)
    shared = "" if is_ours(path) else PREFIXES.match(os.path.commonprefix([*weights]))[0]
    return {name.removeprefix(shared): t for name, t in weights.items()}

def kind(t):
    return "float" if t.is_floating_point() else "complex" if t.is_complex() else "whole number"

def file_of(what, name):
    """The file that a tensor is from, where `what` is {prefix of names: file}, the longest first; or `what` itself."""
    return next(file for prefix, file in what.items() if name.startswith(prefix)) if isinstance(what, dict) else what

def check_keys(own, state, what):
    """Compares {name: tensor} `state` with the expected `own` (both on any device, meta included). what: the file, or
    of joined files {prefix: file}, see file_of. Raises ValueError with the counts and the first keys that are missing,
    unexpected, or of another shape or kind of number; the error's `table` has more of them, for --verbose."""
    for file in dict.fromkeys(what.values()) if isinstance(what, dict) else ():  # each for itself
        check_keys(*({k: t for k, t in side.items() if file_of(what, k) == file} for side in (own, state)), file)
    found = {
        "missing": [k for k in own if k not in state],
        "unexpected": [k for k in state if k not in own],
        "of another shape": [k for k in own if k in state and own[k].shape != state[k].shape],
        "of another type": [k for k in own if k in state and kind(own[k]) != kind(state[k])]}
    found = {word: keys for word, keys in found.items() if keys}
    if not found:
        return

    def line(word, k):
        sides = [f"{side} {kind(t[k]) if word == 'of another type' else tuple(t[k].shape)}"
                 for side, t in (("found", state), ("expected", own)) if k in t]
        return f"{word} {k} {', '.join(sides)}"
    counts = ", ".join(f"{len(keys)} {word}" for word, keys in found.items())
    rounds = itertools.zip_longest(*([line(word, k) for k in keys[:3]] for word, keys in found.items()))
    first = "; ".join([text for some in rounds for text in some if text][:3])
    e = BadFile(f"{what}: the weights do not fit ({len(own)} keys expected, {len(state)} found; {counts}), first "
                f"{first}: is it the right file and size? --verbose shows more")
    e.table = "".join(f"\n  {line(word, k)}" for word, keys in found.items() for k in keys[:200])
    raise e

def check_numbers(name, t, what):
    """-> t. Raises ValueError if there is a nan or an infinity in it: one pass, since these make the sum one, too."""
    if t.is_floating_point() and not t.sum().isfinite() and not t.isfinite().all():
        raise BadFile(f"{file_of(what, name)}: {name} holds {int((~t.isfinite()).sum()):,} nan or infinite numbers "
                      f"among {t.numel():,}, read as {t.dtype}: the run that wrote it diverged, or the file is damaged")
    return t

def cast(parameters, dtype):
    for p in parameters:
        p.data = p.data.to(dtype)

ADAPTERS = (".lora_A", ".lora_B")  # which come from elsewhere than the weights they stand beside

def own_rows(t):
    """-> what this process holds of a tensor, and which rows of the whole that is."""
    if not isinstance(t, DTensor):
        return t, slice(None)
    shape, offset = compute_local_shape_and_global_offset(t.shape, t.device_mesh, t.placements)
    return t.to_local(), slice(offset[0], offset[0] + shape[0])

@torch.no_grad()
def load_strict(module, state, what="model", device="cpu"):
    """Copies `state` into `module`; every key must match in name and shape. Tensors take the module's dtype and device;
    of a module on the meta device, sharded or not, memory on `device` is made first, and each process reads its own
    rows alone. Raises ValueError as check_keys does, before anything is copied."""
    own = {name: t for name, t in module.state_dict(keep_vars=True).items() if not name.endswith(ADAPTERS)}
    check_keys(own, state, what)
    if left := [name for name, b in module.named_buffers() if b.is_meta and name not in own]:
        raise ValueError(f"{what}: buffers {left[:5]} are in no checkpoint: compute them when the model is built")
    if any(t.device.type == "meta" for t in own.values()):
        make_empty(module, device)
        own = {name: t for name, t in module.state_dict(keep_vars=True).items() if name in own}
    else:  # what the module holds is worth something
        for name, t in own.items():
            check_numbers(name, state[name].to(t.dtype), what)
    for name, t in own.items():
        mine, rows = own_rows(t)
        mine.copy_(state[name][rows] if t.ndim else state[name])
        check_numbers(name, mine, what)

def make_empty(module, device):
    """Memory for a module on the meta device. Buffers with numbers in them, and which names share a parameter, stay."""
    exact, names = {name: b for name, b in module.named_buffers() if not b.is_meta}, {}
    for name, p in module.named_parameters(remove_duplicate=False):
        names.setdefault(p, []).append(name)
    module.to_empty(device=device)
    for first, *others in names.values():
        for owner, _, last in (name.rpartition(".") for name in others):
            setattr(module.get_submodule(owner), last, module.get_parameter(first))
    for name, buffer in exact.items():
        module.get_buffer(name).copy_(buffer)

def write_safetensors(path, state, metadata=None):
    """Writes {name: tensor} atomically, tied or overlapping tensors once per name. metadata: {string: string}."""
    seen, tensors = set(), {}
    for name, t in state.items():
        t = t.detach()
        storage = t.untyped_storage()
        if storage.data_ptr() in seen or not t.is_contiguous() or storage.nbytes() != t.numel() * t.element_size():
            t = t.clone(memory_format=torch.contiguous_format)  # the format refuses tensors that share memory
        seen.add(storage.data_ptr())
        tensors[name] = t
    atomic(path, lambda temporary: save_file(tensors, temporary, metadata={"format": "pt", **(metadata or {})}))

def sha256(*paths):
    """Of files in a row, as `cat FILES | sha256sum` says it."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as f:
            hashlib.file_digest(f, lambda: digest)
    return digest.hexdigest()

def write_checksum(file, path):
    """Adds the SHA-256 of `file` to path.sha256, where `file` is about to be renamed to `path`. A run may be killed
    between the two, and then the line before is the valid one: the last 8 are kept."""
    sums, last = f"{path}.sha256", []
    if os.path.isfile(sums):
        with open(sums, encoding="utf-8", errors="replace") as f:
            last = f.read().splitlines()[-7:]
    write_text(sums, "\n".join([*last, f"{sha256(file)}  {os.path.basename(path)}"]) + "\n")

def verify_checksum(path):
    """-> "", or one line to say where there is no checksum. Raises ValueError where none of the noted ones fits."""
    path, sums = os.fspath(path), f"{os.fspath(path)}.sha256"
    if not os.path.isfile(sums):
        return f"{path}: no {os.path.basename(sums)} beside it, so damage to it would not be noticed"
    with open(sums, encoding="utf-8", errors="replace") as noted:
        if sha256(path) not in noted.read().split():
            raise BadFile(f"{path}: its SHA-256 is not in {os.path.basename(sums)}: the file was damaged or replaced; "
                          "take a copy of it, or delete the .sha256 to read it all the same")
    return ""

def check_state(state, path):
    """Raises ValueError where checkpoint.pt does not hold what save_state writes."""
    def dicts(value, *keys):
        return isinstance(value, list) and all(isinstance(v, dict) and set(keys) <= set(v) for v in value)

    def tensors(value):
        return isinstance(value, dict) and all(isinstance(v, torch.Tensor) for v in value.values())
    get = state.get if isinstance(state, dict) else {}.get
    fits = {"step": type(get("step")) is int and get("step") >= 0, "args": isinstance(get("args"), dict),
            "model": tensors(get("model")) or isinstance(get("shards"), str), "config": isinstance(get("config"), dict),
            "optimizers": dicts(get("optimizers"), "state", "param_groups"),
            "ema": get("ema") is None or tensors(get("ema")), "history": dicts(get("history"), "step")}
    if not all(fits.values()):
        wrong = ", ".join(name for name in fits if not fits[name])
        raise BadFile(f"{path}: {wrong} missing or not of the kind that train.py writes: not a checkpoint of its runs")

# ---------------------------------------------------------------------------------------------------------------------
# models

def add_flags(parser):
    """The flags that say which model: of train.py, sample.py and evaluate.py."""
    add = parser.add_argument_group("model").add_argument
    add("--arch", choices=architectures(), default="mar")
    add("--config", default="tiny", help="model size: tiny or a published one, e.g. harmon-1.5b")
    add("--ckpt", help="folder written by train.py, or a published file (default: shipped weights)")
    add("--tokenizer-ckpt", help="image tokenizer: our folder, or the published file (kl16.ckpt, ...)")
    add("--vision-ckpt", help="published file or folder of what understands, where --ckpt lacks it (CLIP, InternVL3)")
    add("--rest-ckpt", nargs="+", metavar="PATH", help="published files of what --ckpt leaves out, the best first")
    add("--text-tokenizer", help="published text tokenizer, a folder or file; the tiny one is shipped")
    add("--weights", metavar="KEY", help=f"of a --ckpt with several state dicts: {', '.join(WRAPPERS)} or another key")
    add("--dtype", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 where a GPU has it, but for "
        "weights of tiny models and those that train")
    add("--verbose", action="store_true", help="all the keys of a checkpoint that does not fit")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--gemm", choices=("auto", "mkl", "onednn"), default="auto", help="float32 products on a CPU; auto: oneDNN "
        "where a check at the start finds it exact and faster than MKL")

def model_of(args):
    """The model that sample.py and evaluate.py are asked for."""
    model = load_model(args.arch, args.ckpt, args.config, args.tokenizer_ckpt, args.text_tokenizer, args.device,
                       dtype_of(args), args.vision_ckpt, adapters=args.adapters, rest=args.rest_ckpt)
    if args.device == "cpu":
        use_products(args.gemm)
    return model

def dtype_of(args):
    """--dtype, of the weights that sample.py and evaluate.py load; None: float32."""
    size = read_config(args.ckpt).get("size", "tiny") if args.ckpt and is_ours(args.ckpt) else args.config
    auto = args.dtype == "auto" and size != "tiny" and args.device.startswith("cuda") and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if auto or args.dtype == "bf16" else None

def architectures():
    """The names X of the files model_X.py beside this one: what --arch takes."""
    return sorted(name[6:-3] for name in os.listdir(HERE) if name.startswith("model_") and name.endswith(".py"))

def model_file(arch):
    return importlib.import_module(f"model_{arch}")

def default_weights(arch, stage="reca"):
    return os.path.join(HERE, "weights", f"{arch}-{stage}")

# Numbers of a config.json go from 1 (fractions: above 0) to a million, or, by the end of their names, from 0 or not so
# far: places and widths make tables before the weights are looked at.
FROM_ZERO = ("groups", "skip_last", "dropout", "grad", "ratio_min", "weight", "interval", "shift", "mean")
HIGHEST = {"bits": 18, "positions": 256, "latent_size": 256, "grid": 256, "hidden_size": 32768, "width": 32768,
           "image_size": 8192, "resize": 8192, "layers": 512, "depth": 512, "blocks": 64, "ratio": 64, "theta": 1e9,
           "dropout": 1, "factor": 1, "ratio_min": 1}
SIDES, WIDTHS = ("positions", "latent_size", "grid"), ("hidden_size", "width")  # of tables of places
PER_LEVEL = ("mult", "blocks", "resolutions")  # lists that may have any length

def checked(field, value, default):
    """A value of a config.json, lists as tuples, if it is of default's type and in its range. Raises ValueError."""
    low, high = 0, next((n for end, n in HIGHEST.items() if field.endswith(end)), 10 ** 6)
    if isinstance(default, tuple):
        length = len(value) if type(value) is list and field.endswith(PER_LEVEL) else len(default)
        if type(value) is list and len(value) == length <= 64:
            return tuple(checked(field, part, default[0] if default else 1) for part in value)
        expected = f"a list of {length} numbers"
    elif isinstance(default, (bool, str)):
        if type(value) is type(default):
            return value
        expected = "true or false" if isinstance(default, bool) else "a text"
    else:
        whole = isinstance(default, int)
        if not field.endswith(FROM_ZERO):
            low = 1 if whole else 1e-12
        if type(value) in (int, int if whole else float) and low <= value <= high:  # false for nan, too
            return value
        expected = f"a {'whole ' * whole}number from {low} to {high:,}"
    raise BadFile(f"{field} is {json.dumps(value)[:60]}, expected {expected}")

def from_dict(cls, values, path="config.json"):
    """A dataclass from a JSON dict, nested ones too (where a field has several types, the one with these fields), lists
    back to tuples. Raises ValueError where a field is unknown, missing, of another type or out of its range."""
    if not isinstance(values, dict):
        raise BadFile(f"{path}: {cls.__name__} is {json.dumps(values)[:60]}, expected an object with its fields")
    defaults, out, fields = cls(), {}, {f.name: f.type for f in dataclasses.fields(cls)}
    for names, how in ((set(values) - set(fields), "has no"), (set(fields) - set(values), "lacks the")):
        if names:
            raise BadFile(f"{path}: {cls.__name__} {how} field {', '.join(sorted(names))[:200]}: it was written by "
                          "another version of this code")
    for name, value in values.items():
        default = getattr(defaults, name)
        if dataclasses.is_dataclass(default):
            keys, kinds = set(value) if isinstance(value, dict) else (), typing.get_args(fields[name])
            fits = [kind for kind in kinds if {f.name for f in dataclasses.fields(kind)} == keys]
            out[name] = from_dict((fits or [type(default)])[0], value, path)
        else:
            out[name] = checked(f"{path}: {cls.__name__}.{name}", value, default)
    for name in [name for name in out if name.endswith("heads")]:
        width = out.get(name.replace("heads", "dim"), out.get("width", out.get("hidden_size", 0)))
        if width % out[name]:
            raise BadFile(f"{path}: {cls.__name__}.{name} is {out[name]}, which does not divide the width {width}")
    return cls(**out)

def check_vocabulary(config, tokenizer, what):
    """Raises ValueError where a text tokenizer cannot be the one that a model of this config was trained with."""
    size = getattr(config, "text_vocab", None) or config.vocab_size
    if not size // 2 <= tokenizer.vocab_size <= size:  # tables are padded, by some hundred rows
        raise BadFile(f"{what}: the text tokenizer has {tokenizer.vocab_size:,} ids, the model's vocabulary {size:,}: "
                      "give --text-tokenizer the one that it was trained with")

def whole_numbers(value, name=""):
    """All whole numbers in nested dicts and tuples, in order: [(name, number)]."""
    if isinstance(value, (dict, tuple)):
        parts = value.items() if isinstance(value, dict) else [(name, part) for part in value]
        return [found for key, part in parts for found in whole_numbers(part, key)]
    return [(name, value)] if isinstance(value, int) else []

def check_tables(numbers, path):
    """ValueError for sizes that are only together too much: these tables are computed before the weights are read."""
    side, width = (max([n for name, n in numbers if name.endswith(ends)], default=0) for ends in (SIDES, WIDTHS))
    if side * side * width > 4 * 10 ** 7:  # twice those of the largest published model
        raise BadFile(f"{path}: tables of {side} x {side} places and width {width}, expected at most 4 * 10^7 numbers")

def save_model(model, folder, arch, **extra):
    """Writes folder/model.safetensors, folder/config.json and, unless it is the shipped one, the text tokenizer. extra:
    what else config.json is to hold."""
    os.makedirs(folder, exist_ok=True)
    if lora_layers(model):
        save_adapters(model, folder)
    else:
        write_safetensors(os.path.join(folder, "model.safetensors"), model.state_dict())
    if dist.is_initialized() and dist.get_rank() > 0:
        return
    name = save_tokenizer(model, folder)
    meta = dict(arch=arch, config=dataclasses.asdict(model.config), text_tokenizer=name, **extra)
    write_text(os.path.join(folder, "config.json"), json.dumps(meta, indent=1))

def save_tokenizer(model, folder):
    """-> what to load a model's text tokenizer by, a file in the folder unless it is the shipped one: a typed path
    means nothing elsewhere."""
    tokenizer, name = getattr(model, "tokenizer", None), "text_tokenizer.json"
    if tokenizer in (None, load_tokenizer("tiny")):
        return "tiny"
    write_text(os.path.join(folder, name), tokenizer.as_file())
    return name

def save_adapters(model, folder):
    """Writes folder/adapter_model.safetensors and folder/adapter_config.json, as PEFT does. Of a sharded model all
    processes call it, and the first one writes."""
    state = lora_state(model)
    if dist.is_initialized() and dist.get_rank() > 0:
        return
    write_safetensors(os.path.join(folder, "adapter_model.safetensors"), state)
    write_text(os.path.join(folder, "adapter_config.json"), json.dumps(lora_config(model), indent=1))

def load_adapters(model, folder):
    """Merges the adapters of a run with --lora, or of PEFT, into the weights that they were trained on. Guidance is
    what that run says. Raises FileNotFoundError, and ValueError where they do not fit."""
    path, what = os.path.join(folder, "adapter_config.json"), f"--lora {folder}"
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{what}: no adapter_config.json there; expected the folder of a run with --lora")
    settings = read_json(path)
    get = settings.get if isinstance(settings, dict) else {}.get
    rank, alpha = get("r"), get("lora_alpha")
    odd = [name for name in ("use_dora", "use_rslora", "fan_in_fan_out", "rank_pattern", "alpha_pattern") if get(name)]
    if type(rank) is not int or not 0 < rank <= RANGES["lora"][1] or type(alpha) not in (int, float) or odd:
        raise BadFile(f"{path}: r {rank}, lora_alpha {alpha} {' '.join(odd)}: expected r, lora_alpha and plain LoRA")
    state = read_weights(os.path.join(folder, "adapter_model.safetensors"))
    load_lora(model, {k: check_numbers(k, v, what) for k, v in state.items()}, what, settings)
    merge_lora(model)
    if os.path.isfile(os.path.join(folder, "config.json")):
        model.config.cfg = from_dict(type(model.config), read_config(folder)["config"], folder).cfg

def saved_state(model):
    """What a checkpoint keeps of a model: its adapters alone where it has some."""
    state, adapted = model.state_dict(), lora_layers(model)
    return {name: t for name, t in state.items() if not adapted or name.endswith(ADAPTERS)}

def read_config(folder):
    path = os.path.join(folder, "config.json")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{folder}: no config.json there; expected a folder written by train.py "
                                "(model.safetensors + config.json; --shard runs are joined by --export), or give "
                                "--config for a published checkpoint")
    meta = read_json(path)
    if not isinstance(meta, dict) or "config" not in meta or "arch" not in meta:
        raise BadFile(f"{path}: lacks 'arch' or 'config': not a config.json of this project (transformers-style "
                      "exports load with --config NAME)")
    for name in ("arch", "text_tokenizer", "size"):
        checked(f"{path}: {name}", meta.get(name, ""), "")
    return meta

def tokenizer_of(folder, meta):
    """What to load the text tokenizer of a run by, as config.json or checkpoint.pt names it."""
    name = meta.get("text_tokenizer", "tiny")
    return name if name == "tiny" else os.path.join(folder, name)

def weights_hash(ckpt):
    """SHA-256 of a weight file, or of a folder's model.safetensors, or of all the weight files there in a row."""
    names = sorted(os.listdir(ckpt)) if os.path.isdir(ckpt) else []
    names = [name for name in names if name.endswith(WEIGHT_FILES)]
    names = ["model.safetensors"] if "model.safetensors" in names else names
    return sha256(*[os.path.join(ckpt, name) for name in names] or [ckpt])

def is_ours(path):
    """Is it a folder that save_model wrote?"""
    file = os.path.join(path, "config.json")
    return os.path.isfile(file) and isinstance(meta := read_json(file), dict) and {"arch", "config"} <= set(meta)

def load_model(arch, ckpt=None, config=None, tokenizer_ckpt=None, text_tokenizer=None, device="cpu", dtype=None,
               vision_ckpt=None, prepare=None, adapters=None, rest=()):
    """The model of `arch`, in eval mode, from one of our folders or, with `config` = a published size, from the
    original files. prepare: called with the model while it has no memory, see train.place. adapters: the folder of a
    run with --lora, merged into the weights; without ckpt into the shipped base. rest: files of what ckpt leaves out.
    Raises FileNotFoundError and ValueError with a message for the user."""
    check_device(device, dtype)
    if adapters:
        base = ckpt or default_weights(arch, "base")
        model = load_model(arch, base, config, tokenizer_ckpt, text_tokenizer, device, dtype, vision_ckpt, rest=rest)
        load_adapters(model, adapters)
        return model
    module, ckpt = model_file(arch), ckpt or default_weights(arch)
    if config in (None, "tiny") or is_ours(ckpt):
        meta = read_config(ckpt)
        if config not in (None, "tiny", meta.get("size", "tiny")):
            raise ValueError(f"--config {config} needs --ckpt, the published file or a run folder of that size: {ckpt} "
                             f"is of size {meta.get('size', 'tiny')}")
        fields = {f.name for f in dataclasses.fields(module.CONFIGS["tiny"])}
        if meta["arch"] != arch and not set(meta["config"]) <= fields:  # a copied model file may load the original's
            raise ValueError(f"{ckpt} holds a model of --arch {meta['arch']}, but --arch {arch} was asked for")
        tokenizer = load_tokenizer(text_tokenizer or tokenizer_of(ckpt, meta))
        return from_parts(arch, meta["config"], tokenizer, read_weights(ckpt), ckpt, device, dtype, prepare)
    if config not in module.CONFIGS:
        raise ValueError(f"--config {config}: --arch {arch} knows {', '.join(module.CONFIGS)}")
    if not text_tokenizer:
        raise ValueError(f"--config {config} needs --text-tokenizer: the folder or file of the published text "
                         "tokenizer (vocab.json + merges.txt, tokenizer.json or qwen.tiktoken)")
    tokenizer, load = load_tokenizer(text_tokenizer), module.Model.load_published
    check_vocabulary(module.CONFIGS[config], tokenizer, text_tokenizer)
    if rest and "rest" not in inspect.signature(load).parameters:
        raise ValueError(f"--rest-ckpt {rest[0]}: the --ckpt of --arch {arch} leaves nothing out, leave this out, too")
    return load(ckpt, config=config, tokenizer_path=tokenizer_ckpt, vision_path=vision_ckpt, tokenizer=tokenizer,
                device=device, dtype=dtype, prepare=prepare, **({"rest": rest} if rest else {}))

def from_parts(arch, config, tokenizer, state, ckpt, device="cpu", dtype=None, prepare=None):
    """A model in eval mode from its config (a dictionary) and its weights `state`; None: they will come in later."""
    module = model_file(arch)
    settings = from_dict(type(module.CONFIGS["tiny"]), config, os.path.join(ckpt, "config.json"))
    check_vocabulary(settings, tokenizer, ckpt)
    check_tables(whole_numbers(config), os.path.join(ckpt, "config.json"))
    with reading(ckpt, "no model can be built from its config.json"), torch.device("meta"):
        model = module.Model(settings, tokenizer)
    cast(model.parameters(), dtype or torch.float32)
    getattr(model, model.image_tokenizer).float()  # as load_published has it
    if prepare:
        prepare(model)
    if state is None:
        make_empty(model, device)
    else:
        load_strict(model, state, ckpt, device)
    return model.eval()

# ---------------------------------------------------------------------------------------------------------------------
# run state

def describe(args, state=None):
    """What is needed to repeat a run, for its result.json; of a resumed one the first command, too."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    device = f"{os.cpu_count()} CPU cores"
    if args.device.startswith("cuda"):
        device = torch.cuda.get_device_name(args.device)
    launcher = "torchrun" if world > 1 or "TORCHELASTIC_RUN_ID" in os.environ else "python"
    command = f"{launcher}{f' --nproc_per_node={world}' * (world > 1)} train.py {shlex.join(sys.argv[1:])}"
    here = dict(commit=git_commit(), torch=torch.__version__, world=world, device=device)
    commands = dict(command=state["command"], resumed_by=command) if state else dict(command=command)
    return dict(arch=args.arch, stage=args.stage, seed=args.seed, **commands, **here, args=vars(args))

class Log:
    """A run's lines: on the terminal, in log.jsonl and, if asked, in wandb or tensorboard; of the first process
    only."""

    def __init__(self, args, first, start):
        self.file = self.extra = None
        if not first:
            return
        if args.overwrite and not args.resume:  # not before everything is built and there is room
            for name in (*RUN_FILES, *(path.name for path in pathlib.Path(args.out).glob("preview-*.png"))):
                pathlib.Path(args.out, name).unlink(missing_ok=True)
            remove_shards(args.out)
        path = os.path.join(args.out, "log.jsonl")
        if start and os.path.exists(path):  # a run that died had gone further than its checkpoint
            with open(path, encoding="utf-8", errors="replace") as f:
                lines = [line for line in f if line.endswith("}\n") and json.loads(line)["step"] <= start]
            write_text(path, "".join(lines))
        self.file = open(path, "a")
        if args.log == "wandb":
            import wandb
            self.extra = wandb.init(project="nanoreca", name=os.path.basename(args.out), config=vars(args)).log
        elif args.log == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter
            writer = SummaryWriter(args.out)
            self.extra = lambda row: [writer.add_scalar(k, v, row["step"]) for k, v in row.items() if k != "step"]

    def say(self, text):
        if self.file:
            print(text, flush=True)

    def write(self, row, text):
        """row: {"step": ..., numbers or "scores"}; text: the line for the terminal."""
        if not self.file:
            return
        self.say(text)
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        if self.extra and "scores" not in row:
            self.extra(row)

    def close(self):
        if self.file:
            self.file.close()

RUN_FILES = ("checkpoint.pt", "checkpoint.pt.sha256", "model.safetensors", "adapter_model.safetensors", "log.jsonl")

def claim(args, rank, world, start):
    """Makes the run folder this run's own until it ends -> the open lock, on the first process. Sets args.out, on all
    processes, or raises on all of them what `lock_folder` raises; ValueError where not all start at the same step."""
    said, lock = [None, start], None
    if rank == 0:
        try:
            said[0], lock = lock_folder(args)
        except (ValueError, OSError) as e:
            said[0] = e
    if world > 1:
        dist.broadcast_object_list(said)
    if isinstance(said[0], Exception):
        raise said[0]
    if start != said[1]:
        raise ValueError(f"--resume {args.resume}: step {start}, on the first process {said[1]}: give all one folder")
    args.out = said[0]
    return lock

def lock_folder(args):
    """-> (folder, open lock file). Where nobody typed --out, the next free name is taken. Raises ValueError where the
    folder is in use or holds another run, OSError where it cannot be written."""
    first = args.out or os.path.join("runs", f"{args.arch}-{args.stage}")
    for n in itertools.count(1):
        out = first if n == 1 else f"{first}-{n}"
        os.makedirs(out, exist_ok=True)
        lock, problem = open(os.path.join(out, "run.lock"), "a+"), None
        holds = [name for name in RUN_FILES if os.path.exists(os.path.join(out, name))]
        try:
            if fcntl:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # falls with the process, however that ends
            if holds and not (args.resume or args.overwrite):
                problem = f"holds a run ({', '.join(holds)}): give another --out, --resume it, or --overwrite it"
        except OSError:
            lock.seek(0)
            problem = f"is in use by {lock.read().strip() or 'another process'}: wait, stop that, or give another --out"
        if problem is None:
            break
        lock.close()
        if args.out:
            raise ValueError(f"{out} {problem}")
    for name in os.listdir(out):
        if re.search(r"\.tmp\d+$", name):  # of runs that died
            os.remove(os.path.join(out, name))
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}")
    lock.flush()
    return out, lock

def size_of(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)

def check_disk(folder, need, what="a checkpoint", flag="--out"):
    """ValueError where `need` bytes do not fit beside what is there. A file is written whole before the old one
    goes."""
    free = shutil.disk_usage(folder).free
    if need > free:
        def text(n):
            return f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"
        raise ValueError(f"{folder}: {what} needs {text(need)} and {text(free)} are free: make room, or give {flag} on "
                         "another disk (what was saved before is untouched)")

def last_good(folder):
    path = os.path.join(folder, "checkpoint.pt")
    return f"{path} is good, go on from it with --resume" if os.path.exists(path) else "no checkpoint was saved before"

def check_finite(named, folder):
    """ValueError where weights are not finite, with what can be gone back to."""
    bad = [name for name, t in named if not torch.isfinite(t).all()]
    if bad:
        path = os.path.join(folder, "checkpoint.pt")
        good = f"{path} holds the last good step" if os.path.exists(path) else "no checkpoint was saved before"
        raise ValueError(f"{len(bad)} weights are not finite (first {bad[0]}), so nothing is written; {good}: lower "
                         "--lr")

def save_state(run, step):
    """checkpoint.pt of a run, for --resume: each step seeds itself, so the position is the step alone. A sharded run
    writes its tensors beside it, while the next steps run, and `settle` makes them the ones that count. Raises
    ValueError for weights that are not finite or a full disk, OSError where writing fails."""
    folder = run.args.out
    check_finite([*run.named, *(run.ema or {}).items()], folder)
    config = json.loads(json.dumps(dataclasses.asdict(run.model.config)))
    state = dict(step=step, args=vars(run.args), command=run.about["command"], config=config,
                 history=list(run.history),  # which goes on while shards are written
                 bf16=run.dtype == torch.bfloat16)
    if run.rank == 0 and run.args.stage != "tokenizer":
        state["text_tokenizer"] = save_tokenizer(run.model, folder)
    check_disk(folder, run.checkpoint_size)
    if not run.sharded:
        optimizers = [optimizer.state_dict() for optimizer in run.optimizers]
        write_state(folder, dict(state, model=saved_state(run.model), optimizers=optimizers, ema=run.ema))
        return
    settle(run)
    shards = f"shards-{step}"
    path = os.path.join(folder, shards)
    saving = dcp.async_save(all_tensors(run), checkpoint_id=path, process_group=run.side_group)
    summed = ThreadPoolExecutor(1).submit(shard_sums, saving, path, run.rank, run.world)
    run.saving = summed, dict(state, shards=shards, optimizers=[], ema=None)

def shard_sums(saving, path, rank, world):
    """-> {file: SHA-256} of this process's share of a sharded checkpoint, once all of it is written."""
    saving.result()
    return {name: sha256(os.path.join(path, name)) for name in sorted(os.listdir(path))[rank::world]}

def write_state(folder, state):
    path = os.path.join(folder, "checkpoint.pt")

    def write(temporary):
        torch.save(state, temporary)
        write_checksum(temporary, path)
    atomic(path, write)

def settle(run):
    """Waits until the shards that are being written are on all disks; then checkpoint.pt points to them and holds their
    checksums."""
    if run.saving is None:
        return
    (summed, state), run.saving, folder, sums = run.saving, None, run.args.out, [None] * run.world
    dist.all_gather_object(sums, summed.result(), group=run.side_group)
    if run.rank == 0:
        write_state(folder, dict(state, sums={name: digest for some in sums for name, digest in some.items()}))
        remove_shards(folder, state["shards"])

def remove_shards(folder, but=None):
    for name in os.listdir(folder):
        if re.fullmatch(r"shards-\d+", name) and name != but:
            shutil.rmtree(os.path.join(folder, name))

def all_tensors(run):
    """{name: tensor} of what a step changes or reads: weights, AdamW's state, averages; of each process its rows."""
    out = {f"model.{name}": t for name, t in saved_state(run.model).items()}
    out |= {f"ema.{name}": t for name, t in (run.ema or {}).items()}
    for name, p in run.named:
        out |= {f"adamw.{name}.{key}": t for key, t in run.optimizers[0].state.get(p, {}).items()}
    return out

def read_checkpoint(folder):
    path = os.path.join(folder, "checkpoint.pt")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"--resume {folder}: no checkpoint.pt there; give the folder of a run that saved one")
    remark(verify_checksum(path))
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as e:
        raise ValueError(f"{path}: cannot be read ({reason_of(e)}): not a checkpoint of train.py") from origin(e)
    check_state(state, path)
    if "shards" in state:
        verify_shards(os.path.join(folder, state["shards"]), state.get("sums", {}))
    return state

def verify_shards(path, sums):
    """ValueError where files of a sharded checkpoint are not as they were written; each process looks at its share."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    files = {os.path.join(path, name): digest for name, digest in sorted(sums.items())[rank::world]}
    wrong = [file for file, digest in files.items() if not os.path.isfile(file) or sha256(file) != digest]
    if wrong:
        raise BadFile(f"{wrong[0]}: missing or damaged, its SHA-256 is not the one in checkpoint.pt (so are "
                      f"{len(wrong) - 1} others of {len(sums)}): take a copy of them")

def load_state(run, state):
    """Optimizers, averages and history of a stored run; settings that are typed now win over the stored ones."""
    if "shards" in state:
        load_adamw(run, os.path.join(run.args.resume, state["shards"]))
    elif run.sharded:
        load_rows(run.optimizers[0], state["optimizers"][0])
    else:
        for optimizer, saved in zip(run.optimizers, state["optimizers"]):
            typed = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
            optimizer.load_state_dict(saved)
            for group, settings in zip(optimizer.param_groups, typed):
                group.update(settings)
    if run.ema and state["ema"]:
        for name, value in state["ema"].items():
            mine, rows = own_rows(run.ema[name])
            mine.copy_(value[rows])
    run.start, run.history = state["step"], state["history"]

def load_rows(optimizer, saved):
    """AdamW's state of a run in one piece, of which a sharded run takes its rows."""
    numbers = [i for group in saved["param_groups"] for i in group["params"]]
    for i, p in zip(numbers, [p for group in optimizer.param_groups for p in group["params"]]):
        for key, value in saved["state"].get(i, {}).items():
            t = optimizer.state[p][key] = torch.zeros_like(p) if value.shape == p.shape else value
            mine, rows = own_rows(t)
            mine.copy_(value[rows] if value.ndim else value)

TABLE_TYPES = {  # what a table of shards is made of, beside the types of numbers
    "Metadata", "MetadataIndex", "StorageMeta", "BytesStorageMetadata", "TensorStorageMetadata", "TensorProperties",
    "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING", "_StorageInfo", "Size", "PosixPath", "_get_layout"}

class Table(pickle.Unpickler):
    def find_class(self, module, name):
        if (module, name) == ("builtins", "getattr"):  # so the first versions of Python 3.11 write members of an Enum
            return enum.EnumMeta.__getitem__
        number = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if number or (module.split(".")[0] in ("torch", "pathlib") and name in TABLE_TYPES):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place there")

class ShardReader(dcp.FileSystemReader):
    def read_metadata(self, *args, **kwargs):
        with open(os.path.join(self.path, ".metadata"), "rb") as file:
            Table(file).load()  # because torch's own reader would run whatever a stranger has put into this file
        return super().read_metadata(*args, **kwargs)

def shard_names(path):
    with reading(path, "not a whole sharded checkpoint"):
        return set(ShardReader(path).read_metadata().state_dict_metadata)

def load_shards(path, wanted):
    """Fills tensors {name: tensor}, whole or sharded over any number of processes, with what `all_tensors` wrote."""
    stored = shard_names(path)
    if lacks := [name for name in wanted if name not in stored]:
        raise BadFile(f"{path}: lacks {len(lacks)} of {len(wanted)} tensors, first {lacks[0]}: of another model")
    with reading(path, "not a whole sharded checkpoint"):
        dcp.load(wanted, storage_reader=ShardReader(path), no_dist=not dist.is_initialized())

def load_trained(model, state, folder):
    """What a resumed run's checkpoint keeps of the model."""
    own = saved_state(model)
    if "shards" in state:
        load_shards(os.path.join(folder, state["shards"]), {f"model.{name}": t for name, t in own.items()})
        return
    check_keys(own, state["model"], folder)
    for name, t in own.items():
        mine, rows = own_rows(t)
        mine.copy_(state["model"][name][rows])

def load_adamw(run, path):
    """State of the optimizer and averages out of a sharded checkpoint."""
    stored, optimizer = shard_names(path), run.optimizers[0]
    for name, p in run.named:
        if f"adamw.{name}.step" in stored:  # those that have had a gradient
            step = torch.zeros((), device=p.device if optimizer.param_groups[0]["fused"] else "cpu")
            optimizer.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    load_shards(path, {name: t for name, t in all_tensors(run).items() if name in stored and name[:6] != "model."})

class Interrupted(Exception):
    """A signal came while the model was judged."""

@contextlib.contextmanager
def averaged(run, may_end=False):
    """The model with its averaged weights, where --ema keeps some, as it is judged, drawn with and saved. may_end: a
    signal may end what is done with it (Interrupted). Where what is frozen is in bf16, products are, as in a step."""
    mixed = run.dtype == torch.bfloat16 and run.args.config != "tiny"
    own, run.judging = [p.detach().clone() for _, p in run.named] if run.ema else [], may_end
    with torch.no_grad(), torch.autocast(run.device.type, run.dtype, enabled=mixed):
        try:
            for (_, p), average in zip(run.named, (run.ema or {}).values()):
                p.copy_(average)
            yield
        finally:
            run.judging = False
            for (_, p), value in zip(run.named, own):
                p.copy_(value)
