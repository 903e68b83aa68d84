"""Every way weights and run state go in and out. A folder of ours is `model.safetensors` + `config.json` (what
sample.py loads) and, where a run can go on, `checkpoint.pt` (what --resume loads). Published checkpoints are read in
the format in which they were published, strictly, and without executing anything that is in them.
"""
import dataclasses
import importlib
import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import zipfile

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from text_tokenizer import load_tokenizer, read_json

HERE = os.path.dirname(os.path.abspath(__file__))
WEIGHT_FILES = (".safetensors", ".bin", ".pth", ".pt", ".ckpt")

# ---------------------------------------------------------------------------------------------------------------------
# writing, and what every script needs at its edges

def reason_of(e):
    """The first line of an error: some of torch's go on with a page of advice."""
    return (str(e).strip() or type(e).__name__).splitlines()[0][:160]

def atomic(path, write):
    """Calls write(temporary path beside `path`), syncs that file to the disk and renames it: after a crash or on a
    full disk `path` holds what it held before. Raises OSError in one line."""
    path = os.fspath(path)
    temporary = f"{path}.tmp{os.getpid()}"
    try:
        with open(temporary, "wb") as f:
            mode = os.fstat(f.fileno()).st_mode
        write(temporary)
        os.chmod(temporary, mode)  # safetensors makes files that only their owner can read
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as e:  # torch and safetensors raise their own kinds on a full disk
        reason = getattr(e, "strerror", None) or reason_of(e)
        raise OSError(f"{path}: cannot be written ({reason}); what was there before is untouched") from None
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)

def write_text(path, text):
    atomic(path, lambda temporary: pathlib.Path(temporary).write_text(text, encoding="utf-8"))

def check_device(name):
    """Raises ValueError for a --device that this machine or this torch does not have."""
    try:
        kind = torch.device(name).type
    except RuntimeError:
        raise ValueError(f"--device {name}: no such device; cpu, cuda, cuda:1 ...") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: this torch ({torch.__version__}) sees no GPU; give --device cpu, or "
                         "install a CUDA build")

def check_memory(device, trained):
    """ValueError where gradients and Adam's two moments of `trained` fp32 parameters do not fit any more."""
    need, free = 12 * trained, float("inf")
    if device.startswith("cuda"):
        free = torch.cuda.mem_get_info()[0]
    elif os.path.exists("/proc/meminfo"):  # Linux
        with open("/proc/meminfo") as lines:
            free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    if need > free:
        raise ValueError(f"{need / 1e9:.1f} GB are needed for gradients and Adam before any activation, "
                         f"{free / 1e9:.1f} GB are free: take a smaller --config, or a larger machine")

def one_line_errors(main):
    """Runs main() and exits with what it returns. What the user can put right (a missing file, a wrong value, too
    little memory) ends with its message alone and exit code 2; NANORECA_TRACEBACK=1 shows where it came from."""
    try:
        sys.exit(main() or 0)
    except (ValueError, OSError, ImportError, MemoryError, torch.OutOfMemoryError) as e:
        if os.environ.get("NANORECA_TRACEBACK"):
            raise
        print(f"error: {e}" if str(e) else f"error: {type(e).__name__}", file=sys.stderr, flush=True)
        sys.exit(2)

def git_commit():
    try:
        command = ["git", "-C", HERE, "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, timeout=5).stdout.strip() or "unknown"
    except OSError:
        return "unknown"

# ---------------------------------------------------------------------------------------------------------------------
# weight files

def open_safetensors(path, device="cpu"):
    """-> an open safetensors file, whose tensors are read one by one. Raises FileNotFoundError or ValueError."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such weight file")
    try:
        return safe_open(path, framework="pt", device=str(device))
    except SafetensorError as e:
        size = f"{os.path.getsize(path):,} bytes on disk"
        raise ValueError(f"{path}: not a complete safetensors file ({e}; {size}): copy or download it again") from None

def read_pickle(path, device):
    try:
        mmap = zipfile.is_zipfile(path) or None  # paged in tensor by tensor; older files are no zip archives
        state = torch.load(path, map_location=device, weights_only=True, mmap=mmap)
    except Exception as e:  # truncated zip, foreign pickle, text file: torch raises half a dozen kinds
        size = f"{os.path.getsize(path):,} bytes on disk"
        raise ValueError(f"{path}: cannot be read as a file of tensors ({reason_of(e)}; {size}). It is truncated, no "
                         "PyTorch file, or holds Python objects, which are never executed here: copy it again or "
                         "convert it to .safetensors") from None
    for wrapper in ("model", "state_dict"):  # training checkpoints keep the weights beside optimizer state and counters
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict):
        raise ValueError(f"{path}: holds a {type(state).__name__}, expected a dict of tensors, maybe under the key "
                         "'model' or 'state_dict'")
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"{path}: entry {name!r} is a {type(value).__name__}, expected a tensor: save the "
                             "model's plain state dict")
    return state

def weight_files(folder):
    """The weight files of a folder: with an index all its shards, otherwise model.safetensors, pytorch_model.bin or
    the only one there."""
    names = sorted(n for n in os.listdir(folder) if n.endswith(WEIGHT_FILES))
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if os.path.exists(os.path.join(folder, index)):
            shards = sorted(set(read_json(os.path.join(folder, index))["weight_map"].values()))
            missing = [s for s in shards if s not in names]
            if missing:
                raise FileNotFoundError(f"{folder}: {len(missing)} of {len(shards)} shards in {index} are missing, "
                                        f"first {missing[0]}")
            return [os.path.join(folder, shard) for shard in shards]
    for name in ("model.safetensors", "pytorch_model.bin"):
        if name in names:
            names = [name]
    if len(names) != 1:
        raise FileNotFoundError(f"{folder}: a folder with {len(names)} weight files {names}: name the one to read")
    return [os.path.join(folder, names[0])]

def read_weights(path, device="cpu"):
    """Reads a checkpoint into {name: tensor} on `device`: a .safetensors file, a .pth/.pt/.bin/.ckpt pickle of
    tensors (read without executing anything; {"model": ...} and {"state_dict": ...} are unwrapped), or a folder (see
    weight_files). Raises FileNotFoundError or ValueError: one line that names the path."""
    path = os.fspath(path)
    if os.path.isdir(path):
        return {k: v for file in weight_files(path) for k, v in read_weights(file, device).items()}
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: no such weight file or folder")
    if not path.endswith(WEIGHT_FILES):
        raise ValueError(f"{path}: unknown kind of weight file, expected a name ending in {', '.join(WEIGHT_FILES)}, "
                         "or a folder")
    with open(path, "rb") as f:
        if f.read(20).startswith(b"version https://git"):
            raise ValueError(f"{path}: a git-lfs pointer of {os.path.getsize(path)} bytes, not the weights: run `git "
                             "lfs pull`")
    if not path.endswith(".safetensors"):
        return read_pickle(path, device)
    with open_safetensors(path, device) as f:
        return {name: f.get_tensor(name) for name in f.keys()}

def check_keys(own, state, what):
    """Compares {name: tensor} `state` with the expected `own` (on any device, meta included). Raises ValueError with
    a table of the missing, unexpected and wrongly shaped keys."""
    missing = [k for k in own if k not in state]
    unexpected = [k for k in state if k not in own]
    wrong = [k for k in own if k in state and own[k].shape != state[k].shape]
    if not missing and not unexpected and not wrong:
        return
    lines = [f"{what}: the weights do not fit ({len(own)} keys expected, {len(state)} found; {len(missing)} missing, "
             f"{len(unexpected)} unexpected, {len(wrong)} of another shape): is it the right file and size?"]
    for kind, keys in (("missing", missing), ("unexpected", unexpected), ("shape", wrong)):
        for k in keys[:20]:
            found = [f"found {tuple(state[k].shape)}"] if k in state else []
            expected = [f"expected {tuple(own[k].shape)}"] if k in own else []
            lines.append(f"  {kind:10s} {k}  {', '.join(found + expected)}")
        if len(keys) > 20:
            lines.append(f"  {kind:10s} ... and {len(keys) - 20} more")
    raise ValueError("\n".join(lines))

def load_strict(module, state, what="model"):
    """Loads `state` into `module`; every key must match in name and shape. Tensors take the dtype (and, unless the
    module was built on the meta device, the device) of the module. Raises ValueError as check_keys does; nothing is
    loaded then."""
    own = module.state_dict(keep_vars=True)
    check_keys(own, state, what)
    if not any(t.is_meta for t in own.values()):
        module.load_state_dict(state, strict=True)
        return
    # nothing to copy into: the tensors of the file become the parameters
    state = {k: state[k].to(device=None if t.is_meta else t.device, dtype=t.dtype) for k, t in own.items()}
    module.load_state_dict(state, strict=True, assign=True)
    left = [k for k, b in module.named_buffers() if b.is_meta]
    if left:
        raise ValueError(f"{what}: buffers {left[:5]} are in no checkpoint: compute them after loading")

def stream(module, path, names, device, dtype):
    """Fills a module on the meta device from a .safetensors file, tensor by tensor, so that no second copy is ever
    held. names: the keys that it must have. Raises FileNotFoundError, and ValueError as check_keys does."""
    own = module.state_dict()
    with open_safetensors(path, device) as f:
        found = {k: torch.empty(f.get_slice(k).get_shape(), device="meta") for k in f.keys()}
        check_keys({k: own[k] for k in names}, found, path)
        for name in names:
            owner, _, last = name.rpartition(".")
            owner, value = module.get_submodule(owner), f.get_tensor(name).to(dtype)
            if last in owner._parameters:
                value = torch.nn.Parameter(value, owner._parameters[last].requires_grad)
            setattr(owner, last, value)

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

# ---------------------------------------------------------------------------------------------------------------------
# models

def add_flags(parser):
    """The flags that say which model: of train.py, sample.py and evaluate.py."""
    add = parser.add_argument_group("model").add_argument
    add("--arch", choices=architectures(), default="mar")
    add("--config", default="tiny", help="model size: tiny or a published one, e.g. harmon-1.5b")
    add("--ckpt", help="folder written by train.py, or a published file (default: shipped weights)")
    add("--tokenizer-ckpt", help="image tokenizer: our folder, or the published file (kl16.ckpt, ...)")
    add("--vision-ckpt", help="published CLIP file, of the Show-o CLIP variants")
    add("--text-tokenizer", help="published text tokenizer, a folder or file; the tiny one is shipped")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")

def architectures():
    """The names X of the files model_X.py beside this one: what --arch takes."""
    return sorted(name[6:-3] for name in os.listdir(HERE) if name.startswith("model_") and name.endswith(".py"))

def model_file(arch):
    return importlib.import_module(f"model_{arch}")

def default_weights(arch, stage="reca"):
    return os.path.join(HERE, "weights", f"{arch}-{stage}")

def from_dict(cls, values):
    """A dataclass from a JSON dict, nested ones too, lists back to tuples. Unknown fields raise ValueError."""
    defaults, out = cls(), {}
    unknown = set(values) - {f.name for f in dataclasses.fields(cls)}
    if unknown:
        raise ValueError(f"{cls.__name__} has no field {', '.join(sorted(unknown))}: config.json was written by "
                         "another version of this code")
    for name, value in values.items():
        default = getattr(defaults, name)
        if dataclasses.is_dataclass(default):
            value = from_dict(type(default), value)
        out[name] = tuple(value) if isinstance(value, list) else value
    return cls(**out)

def save_model(model, folder, arch, **extra):
    """Writes folder/model.safetensors and folder/config.json. extra: what else config.json is to hold."""
    os.makedirs(folder, exist_ok=True)
    write_safetensors(os.path.join(folder, "model.safetensors"), model.state_dict())
    meta = dict(arch=arch, config=dataclasses.asdict(model.config), **extra)
    write_text(os.path.join(folder, "config.json"), json.dumps(meta, indent=1))

def read_config(folder):
    path = os.path.join(folder, "config.json")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{folder}: no config.json there; expected a folder written by train.py "
                                "(model.safetensors + config.json), or give --config for a published checkpoint")
    meta = read_json(path)
    if not isinstance(meta, dict) or "config" not in meta or "arch" not in meta:
        raise ValueError(f"{path}: lacks 'arch' or 'config': not a config.json of this project (transformers-style "
                         "exports load with --config NAME)")
    return meta

def load_model(arch, ckpt=None, config=None, tokenizer_ckpt=None, text_tokenizer=None, device="cpu", dtype=None,
               vision_ckpt=None):
    """The model of `arch`, in eval mode, from one of our folders or, with `config` = a published size, from the
    original files. Raises FileNotFoundError and ValueError with a message for the user."""
    check_device(device)
    module, ckpt = model_file(arch), ckpt or default_weights(arch)
    if config is None or config == "tiny":
        meta = read_config(ckpt)
        fields = {f.name for f in dataclasses.fields(module.CONFIGS["tiny"])}
        if meta["arch"] != arch and not set(meta["config"]) <= fields:  # a copied model file may load the original's
            raise ValueError(f"{ckpt} holds a model of --arch {meta['arch']}, but --arch {arch} was asked for")
        settings = from_dict(type(module.CONFIGS["tiny"]), meta["config"])
        model = module.Model(settings, load_tokenizer(text_tokenizer or meta.get("text_tokenizer", "tiny")))
        load_strict(model, read_weights(ckpt), ckpt)
        return model.to(device=device, dtype=dtype).eval()
    if config not in module.CONFIGS:
        raise ValueError(f"--config {config}: --arch {arch} knows {', '.join(module.CONFIGS)}")
    if not text_tokenizer:
        raise ValueError(f"--config {config} needs --text-tokenizer: the folder or file of the published text "
                         "tokenizer (vocab.json + merges.txt, tokenizer.json or qwen.tiktoken)")
    return module.Model.load_published(ckpt, config=config, tokenizer_path=tokenizer_ckpt, vision_path=vision_ckpt,
                                       tokenizer=load_tokenizer(text_tokenizer), device=device, dtype=dtype)

# ---------------------------------------------------------------------------------------------------------------------
# run state

def describe(args):
    """What is needed to repeat a run, for its result.json."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    device = f"{os.cpu_count()} CPU cores"
    if args.device.startswith("cuda"):
        device = torch.cuda.get_device_name(args.device)
    command = f"torchrun{f' --nproc_per_node={world}' * (world > 1)} train.py {shlex.join(sys.argv[1:])}"
    here = dict(commit=git_commit(), torch=torch.__version__, world=world, device=device)
    return dict(arch=args.arch, stage=args.stage, seed=args.seed, command=command, **here, args=vars(args))

class Log:
    """A run's lines: on the terminal, in log.jsonl and, if asked, in wandb or tensorboard; of the first process
    only."""

    def __init__(self, args, first):
        self.file = self.extra = None
        if not first:
            return
        os.makedirs(args.out, exist_ok=True)
        self.file = open(os.path.join(args.out, "log.jsonl"), "a" if args.resume else "w")
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

def save_state(run, step):
    """checkpoint.pt of a run, for --resume: each step seeds itself, so the position is the step alone. Raises
    ValueError where the disk has no room for it, OSError where writing fails."""
    folder, optimizers = run.args.out, [optimizer.state_dict() for optimizer in run.optimizers]
    state = dict(step=step, args=vars(run.args), model=run.model.state_dict(), optimizers=optimizers, ema=run.ema,
                 history=run.history)
    need = sum(t.numel() * t.element_size() for t in state["model"].values()) * 4  # weights, two moments, averages
    path, free = os.path.join(folder, "checkpoint.pt"), shutil.disk_usage(folder).free
    if need > free:
        raise ValueError(f"{path}: the checkpoint needs about {need / 1e9:.1f} GB and {free / 1e9:.1f} GB are free: "
                         "make room or give --out on another disk (the last checkpoint is untouched)")
    atomic(path, lambda temporary: torch.save(state, temporary))

def read_checkpoint(folder):
    path = os.path.join(folder, "checkpoint.pt")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"--resume {folder}: no checkpoint.pt there; give the folder of a run that saved one")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:
        raise ValueError(f"{path}: cannot be read ({reason_of(e)}): truncated or not a checkpoint of "
                         "train.py") from None

def load_state(run, state):
    """Optimizers, averages and history of a stored run; settings that are typed now win over the stored ones."""
    for optimizer, saved in zip(run.optimizers, state["optimizers"]):
        typed = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        optimizer.load_state_dict(saved)
        for group, settings in zip(optimizer.param_groups, typed):
            group.update(settings)
    if run.ema and state["ema"]:
        for name, value in state["ema"].items():
            run.ema[name].copy_(value)
    run.start, run.history = state["step"], state["history"]
