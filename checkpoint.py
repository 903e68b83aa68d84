"""Every way weights and run state go in and out: our folders, published files, strict reports, safetensors, atomic writes."""
import dataclasses
import importlib
import json
import os
import shutil
import subprocess
import sys
import zipfile

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from text_tokenizer import load_tokenizer, read_json

HERE = os.path.dirname(os.path.abspath(__file__))


def atomic(path, write):
    """Call write(binary file) on a temporary name beside `path`, sync it to disk and rename: a crash or a full disk leaves what was there before."""
    tmp = f"{path}.tmp{os.getpid()}"
    try:
        with open(tmp, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except OSError as e:
        raise OSError(f"{path}: cannot be written ({e.strerror or e}); what was there before is untouched") from None
    finally:
        if os.path.exists(tmp):
            os.remove(tmp)


def write_text(path, text):
    atomic(path, lambda f: f.write(text.encode()))


def check_device(name):
    """Raises ValueError for a --device that this machine or this torch does not have."""
    try:
        kind = torch.device(name).type
    except RuntimeError:
        raise ValueError(f"--device {name}: no such device; cpu, cuda, cuda:1 ...") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: this torch ({torch.__version__}) sees no GPU; give --device cpu, or install a CUDA build")


def one_line_errors(main):
    """Run main() and exit with what it returns; what the user can put right (a missing file, a wrong value, too little memory) ends with its message alone
    and exit code 2. NANORECA_TRACEBACK=1 shows where it came from."""
    try:
        sys.exit(main() or 0)
    except (ValueError, OSError, ImportError, MemoryError, torch.OutOfMemoryError) as e:
        if os.environ.get("NANORECA_TRACEBACK"):
            raise
        print(f"error: {e}" if str(e) else f"error: {type(e).__name__}", file=sys.stderr, flush=True)
        sys.exit(2)


def _read_safetensors(path, device):
    try:
        with safe_open(path, framework="pt", device=str(device)) as f:
            return {name: f.get_tensor(name) for name in f.keys()}
    except SafetensorError as e:
        raise ValueError(f"{path}: not a complete safetensors file ({e}; {os.path.getsize(path):,} bytes on disk): "
                         "copy or download it again") from None


def _read_pickle(path, device):
    try:
        # mmap: a 30 GB checkpoint is paged in tensor by tensor. Files from before torch 1.6 are no zip archives and cannot be mapped
        state = torch.load(path, map_location=device, weights_only=True, mmap=True if zipfile.is_zipfile(path) else None)
    except Exception as e:  # truncated zip, foreign pickle, text file: torch raises half a dozen kinds, some with a page of advice
        reason = str(e).strip().splitlines() or [type(e).__name__]
        raise ValueError(f"{path}: cannot be read as a file of tensors ({reason[0][:160]}; {os.path.getsize(path):,} bytes on disk). It is "
                         "truncated, no PyTorch file, or holds Python objects, which are never executed here: copy it again or convert it "
                         "to .safetensors") from None
    for wrapper in ("model", "state_dict"):  # training checkpoints keep the weights beside optimizer state and counters
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict):
        raise ValueError(f"{path}: holds a {type(state).__name__}, expected a dict of tensors, maybe under the key 'model' or 'state_dict'")
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"{path}: entry {name!r} is a {type(value).__name__}, expected a tensor: save the model's plain state dict")
    return state


WEIGHT_FILES = (".safetensors", ".bin", ".pth", ".pt", ".ckpt")


def read_weights(path, device="cpu"):
    """Reads a checkpoint into {name: tensor} on `device`: a .safetensors file, a .pth/.pt/.bin/.ckpt pickle of tensors (read without
    executing anything; {"model": ...} and {"state_dict": ...} are unwrapped), or a folder: with an index file all its shards, otherwise
    model.safetensors, pytorch_model.bin, or the only weight file in it. FileNotFoundError or ValueError: one line that names the path."""
    path = os.fspath(path)
    if os.path.isdir(path):
        names = sorted(n for n in os.listdir(path) if n.endswith(WEIGHT_FILES))
        for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
            if os.path.exists(os.path.join(path, index)):
                with open(os.path.join(path, index)) as f:
                    shards = sorted(set(json.load(f)["weight_map"].values()))
                missing = [s for s in shards if s not in names]
                if missing:
                    raise FileNotFoundError(f"{path}: {len(missing)} of {len(shards)} shards in {index} are missing, first {missing[0]}")
                return {k: v for shard in shards for k, v in read_weights(os.path.join(path, shard), device).items()}
        for name in ("model.safetensors", "pytorch_model.bin"):
            if name in names:
                names = [name]
        if len(names) != 1:
            raise FileNotFoundError(f"{path}: a folder with {len(names)} weight files {names}: name the one to read")
        return read_weights(os.path.join(path, names[0]), device)
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: no such weight file or folder")
    if not path.endswith(WEIGHT_FILES):
        raise ValueError(f"{path}: unknown kind of weight file, expected a name ending in {', '.join(WEIGHT_FILES)}, or a folder")
    with open(path, "rb") as f:
        if f.read(20).startswith(b"version https://git"):
            raise ValueError(f"{path}: a git-lfs pointer of {os.path.getsize(path)} bytes, not the weights: run `git lfs pull`")
    return _read_safetensors(path, device) if path.endswith(".safetensors") else _read_pickle(path, device)


def check_keys(own, state, what):
    """Compares {name: tensor} `state` with the expected `own` (on any device, meta included). Raises ValueError with a table of the
    missing, unexpected and wrongly shaped keys."""
    missing = [k for k in own if k not in state]
    unexpected = [k for k in state if k not in own]
    wrong = [k for k in own if k in state and own[k].shape != state[k].shape]
    if missing or unexpected or wrong:
        lines = [f"{what}: the weights do not fit ({len(own)} keys expected, {len(state)} found; "
                 f"{len(missing)} missing, {len(unexpected)} unexpected, {len(wrong)} of another shape): is it the right file and size?"]
        for kind, keys in (("missing", missing), ("unexpected", unexpected), ("shape", wrong)):
            for k in keys[:20]:
                found = f"found {tuple(state[k].shape)}" if k in state else ""
                expected = f"expected {tuple(own[k].shape)}" if k in own else ""
                lines.append(f"  {kind:10s} {k}  {', '.join(filter(None, (found, expected)))}")
            if len(keys) > 20:
                lines.append(f"  {kind:10s} ... and {len(keys) - 20} more")
        raise ValueError("\n".join(lines))


def load_strict(module, state, what="model"):
    """Loads `state` into `module`; every key must match in name and shape. Tensors take the dtype (and, unless the module was built on the
    meta device, the device) of the module. Raises ValueError as check_keys does; nothing is loaded then."""
    own = module.state_dict(keep_vars=True)
    check_keys(own, state, what)
    if any(t.is_meta for t in own.values()):  # nothing to copy into: the tensors of the file become the parameters
        state = {k: state[k].to(device=None if t.is_meta else t.device, dtype=t.dtype) for k, t in own.items()}
        module.load_state_dict(state, strict=True, assign=True)
        left = [k for k, b in module.named_buffers() if b.is_meta]
        if left:
            raise ValueError(f"{what}: buffers {left[:5]} are on the meta device and in no checkpoint: compute them after loading")
    else:
        module.load_state_dict(state, strict=True)


def stream(module, path, names, device, dtype):
    """Fills a module on the meta device from a .safetensors file, tensor by tensor. names: the keys it must have; dtype(name): of each."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such weight file")
    try:
        file = safe_open(path, framework="pt", device=str(device))
    except SafetensorError as e:
        size = f"{os.path.getsize(path):,} bytes on disk"
        raise ValueError(f"{path}: not a complete safetensors file ({e}; {size}): copy or download it again") from None
    own = module.state_dict()
    with file as f:
        check_keys({k: own[k] for k in names}, {k: torch.empty(f.get_slice(k).get_shape(), device="meta") for k in f.keys()}, path)
        for name in names:
            (owner, _, last), t = name.rpartition("."), f.get_tensor(name).to(dtype(name))
            owner = module.get_submodule(owner)
            setattr(owner, last, torch.nn.Parameter(t, owner._parameters[last].requires_grad) if last in owner._parameters else t)


def write_safetensors(path, state, metadata=None):
    """Writes {name: tensor} so that `path` always holds either the old file or the complete new one: a temporary file in the same folder,
    flushed to the disk, then renamed. Tied or overlapping tensors are stored once per name. metadata: {string: string}."""
    path = os.fspath(path)
    seen, tensors = set(), {}
    for name, t in state.items():
        t = t.detach()
        storage = t.untyped_storage()
        if storage.data_ptr() in seen or not t.is_contiguous() or storage.nbytes() != t.numel() * t.element_size():
            t = t.clone(memory_format=torch.contiguous_format)  # the format refuses tensors that share memory
        seen.add(storage.data_ptr())
        tensors[name] = t
    temporary = f"{path}.tmp{os.getpid()}"
    try:
        with open(temporary, "wb") as f:
            mode = os.fstat(f.fileno()).st_mode  # safetensors makes files that only their owner can read; take what is usual here
        save_file(tensors, temporary, metadata={"format": "pt", **(metadata or {})})
        os.chmod(temporary, mode)
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


# ----------------------------------------------------------------------------------------------------------------------
# Our own checkpoint folders: model.safetensors + config.json (also used by train.py and evaluate.py)
def from_dict(cls, values):
    """A dataclass from a JSON dict: nested dataclasses by their default's type, lists back to tuples. Unknown fields raise ValueError."""
    defaults = cls()
    unknown = set(values) - {f.name for f in dataclasses.fields(cls)}
    if unknown:
        raise ValueError(
            f"{cls.__name__} has no field {', '.join(sorted(unknown))}: config.json was written by another version of this code"
        )
    out = {}
    for name, value in values.items():
        default = getattr(defaults, name)
        out[name] = (
            from_dict(type(default), value) if dataclasses.is_dataclass(default) else tuple(value) if isinstance(value, list) else value
        )
    return cls(**out)


def save_model(model, folder, arch, **extra):
    """Writes folder/model.safetensors and folder/config.json, each under a temporary name first."""
    os.makedirs(folder, exist_ok=True)
    write_safetensors(os.path.join(folder, "model.safetensors"), model.state_dict())
    write_text(
        os.path.join(folder, "config.json"), json.dumps(dict(arch=arch, config=dataclasses.asdict(model.config), **extra), indent=1)
    )


def read_config(folder):
    path = os.path.join(folder, "config.json")
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"{folder}: no config.json there; expected a folder written by train.py (model.safetensors + config.json), or give --config for a published checkpoint"
        )
    meta = read_json(path)
    if not isinstance(meta, dict) or "config" not in meta or "arch" not in meta:
        raise ValueError(
            f"{path}: lacks 'arch' or 'config': not a config.json of this project (transformers-style exports load with --config NAME)"
        )
    return meta


def load_model(arch, ckpt=None, config=None, tokenizer_ckpt=None, text_tokenizer=None, device="cpu", dtype=None, vision_ckpt=None):
    """The model of `arch` from one of our folders, or, with `config` = a published size, from the original files. Raises one-line errors."""
    check_device(device)
    module = importlib.import_module(f"model_{arch}")
    ckpt = ckpt or default_weights(arch)
    if config is None or config == "tiny":
        meta = read_config(ckpt)
        if meta["arch"] != arch:
            raise ValueError(f"{ckpt} holds a model of --arch {meta['arch']}, but --arch {arch} was asked for: change one of the two")
        cfg = from_dict(type(module.CONFIGS["tiny"]), meta["config"])
        model = module.Model(cfg, load_tokenizer(text_tokenizer or meta.get("text_tokenizer", "tiny")))
        load_strict(model, read_weights(ckpt), ckpt)
        return model.to(device=device, dtype=dtype).eval()
    if config not in module.CONFIGS:
        raise ValueError(f"--config {config}: --arch {arch} knows {', '.join(module.CONFIGS)}")
    if not text_tokenizer:
        raise ValueError(
            f"--config {config} needs --text-tokenizer: the folder or file of the published text tokenizer (vocab.json + merges.txt, tokenizer.json or qwen.tiktoken)"
        )
    more = {"vision_path": vision_ckpt} if arch == "ar" else {}
    model = module.Model.load_published(
        ckpt,
        config=config,
        tokenizer_path=tokenizer_ckpt,
        tokenizer=load_tokenizer(text_tokenizer),
        device=device,
        dtype=dtype,
        **more,
    )
    return model.eval()


def architectures():
    """The names X of the files model_X.py beside this one: what --arch takes."""
    return sorted(name[6:-3] for name in os.listdir(HERE) if name.startswith("model_") and name.endswith(".py"))


def default_weights(arch, stage="reca"):
    return os.path.join(HERE, "weights", f"{arch}-{stage}")


def git_commit():
    try:
        return subprocess.run(["git", "-C", HERE, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, timeout=5).stdout.strip() or "unknown"
    except OSError:
        return "unknown"


def read_checkpoint(folder):
    path = os.path.join(folder, "checkpoint.pt")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"--resume {folder}: no checkpoint.pt there; give the run folder of a run that saved one")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:
        raise ValueError(f"{path}: cannot be read ({str(e).splitlines()[0][:120]}): it is truncated or not a checkpoint of train.py") from None
