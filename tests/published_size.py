"""Walks a published model's whole path at full size: python tests/published_size.py --work FOLDER [--data TAR]

Published files are fabricated: names, shapes and kinds of number as published, random weights, a text tokenizer of the
published size. Then what people do with them runs as commands, one a stage: drawing, reconstructing, editing, answers;
two steps of RecA on pictures with LLaVA JSON, resume, both exports, and what was exported is read again; the same with
--lora 16 and with --shard on two processes. The table says for each stage the seconds, and the most memory that its
processes held together: of their own, and with mapped files, which the system can take back. Exit code 1: one failed.
A stage that leaves the machine less than --leave GB is ended. No network.
"""
import argparse
import base64
import contextlib
import glob
import gzip
import importlib
import itertools
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time

import torch
from PIL import Image

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import checkpoint  # noqa: E402
import shape_world  # noqa: E402
from image_tokenizer import TOKENIZERS, LFQTokenizer  # noqa: E402
from tests.test_published import GOLDEN, published_keys  # noqa: E402

MODELS = {  # file: [published weights, image tokenizer, text tokenizer]; gb: memory that stages need, and the disk
    "harmon-0.5b": dict(arch="mar", keys="harmon-0.5b", file=["harmon_0.5b.pth", "kl16.ckpt", "qwen.tiktoken"],
                        gb=dict(draw=5, lora=12, train=15, shard=20, disk=32), minutes=60),
    "show-o-256": dict(arch="ar", keys="show-o", file=["pytorch_model.bin", "magvitv2.bin", "vocab.json"],
                       gb=dict(draw=8, lora=22, train=28, shard=36, disk=60), minutes=90)}

# ---------------------------------------------------------------------------------------------------------------------
# what people download

def write_weights(path, shapes):
    """Random weights that one can compute with: norms near 1, biases near 0, and matrices that keep an input's size."""
    generator, state = torch.Generator().manual_seed(0), {}
    for name, shape in shapes.items():
        scale = 0.02 if len(shape) == 1 or "embed" in name else 1 / math.sqrt(math.prod(shape[1:]))
        state[name] = torch.randn(shape, generator=generator) * scale
        if len(shape) == 1 and name.endswith("weight"):
            state[name] += 1
    if "quantize.embedding" in state:  # these are no weights
        exact = LFQTokenizer(TOKENIZERS["magvitv2"]).state_dict()
        state |= {name: exact[name] for name in state if name.startswith("quantize.")}
    if "llm.lm_head.weight" in state:  # tied
        state["llm.lm_head.weight"] = state["llm.model.embed_tokens.weight"]
    torch.save({"model": state} if path.endswith(".ckpt") else state, path)

def write_text_tokenizer(path):
    """Of Qwen2.5's or phi-1.5's size: all bytes, pairs of them and triples that end in a letter."""
    qwen, single = path.endswith(".tiktoken"), [bytes([b]) for b in range(256)]
    pairs = [a + b for a, b in itertools.product(single, single)]
    triples = (a + b for a, b in itertools.product(pairs, single[97:123]))
    tokens = [*single, *pairs, *triples][:151643 if qwen else 50256]
    if qwen:
        lines = [f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(tokens)]
        return checkpoint.write_text(path, "".join(lines))
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    names = {b: chr(256 + i) for i, b in enumerate(sorted({*range(256)} - visible))}
    words = ["".join(names.get(b, chr(b)) for b in token) for token in tokens]
    checkpoint.write_text(os.path.join(os.path.dirname(path), "merges.txt"),
                          "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in words[256:]))
    checkpoint.write_text(path, json.dumps({word: i for i, word in enumerate([*words, "<|endoftext|>"])}))

def write_files(config, folder, shard):
    """All the published files of a model, and a folder of pictures, out of a tar shard where there is one, with LLaVA
    JSON."""
    keys, path = MODELS[config]["keys"], [os.path.join(folder, name) for name in MODELS[config]["file"]]
    with gzip.open(os.path.join(GOLDEN, f"{'magvitv2' if keys == 'show-o' else keys}.keys.json.gz")) as f:
        encoder = {k.removeprefix("vae."): n for k, n in json.load(f).items() if k[:4] == "vae." or keys == "show-o"}
    for file, shapes in zip(path, (published_keys(keys), encoder)):
        write_weights(file, shapes)
    write_text_tokenizer(path[2])
    pictures = [Image.fromarray(p).resize((288, 288)) for p in shape_world.Scenes(12, seed=0).render()]
    captions, rows = ["some shapes on a board"] * 12, []
    if shard:
        with tarfile.open(shard) as tar:
            names = [name for name in tar.getnames() if name.endswith((".png", ".jpg"))][:12]
            pictures = [Image.open(tar.extractfile(name)).convert("RGB") for name in names]
            captions = [tar.extractfile(os.path.splitext(name)[0] + ".txt").read().decode() for name in names]
    for i, (picture, caption) in enumerate(zip(pictures, captions)):
        picture.save(os.path.join(folder, f"{i}.png"))
        said = ("human", "<image>\nWhat is it?"), ("gpt", caption)
        rows.append(dict(image=f"{i}.png", conversations=[{"from": who, "value": text} for who, text in said]))
    checkpoint.write_text(os.path.join(folder, "llava.json"), json.dumps(rows))

# ---------------------------------------------------------------------------------------------------------------------
# what people do with it

def stages(config, folder, shard):
    """-> {stage: (which of the model's `gb` it needs, command)}, in order. "2" stands for torchrun."""
    arch, (weights, encoder, text) = MODELS[config]["arch"], (f"{folder}/{name}" for name in MODELS[config]["file"])
    files = f"--arch {arch} --config {config} --tokenizer-ckpt {encoder} --text-tokenizer {text}"
    model, image, few = f"{files} --ckpt {weights}", f"--image {folder}/0.png", f"--steps 3 --out {folder}/drawn/"
    ask = f"{image} --question 'What is it?' --max-new-tokens 8"
    steps = (f"train {model} --data {folder}/0.png {folder}/1.png {folder}/2.png --i2t-data {folder}/llava.json "
             f"--image-root {folder} --recompute blocks --accum 1 --steps 2 --stop-after 1")
    out = {"files": ("draw", f"files {config} {folder} {shard or ''}"),
           "generate": ("draw", f"sample {model} --prompt 'a small red chair' {few}"),
           "reconstruct": ("draw", f"sample {model} {image} --reconstruct {few}"),
           "edit": ("draw", f"sample {model} {image} --edit 'Make it red.' {few}"),
           "answer": ("draw", f"sample {model} {ask}")}
    for name, gb, two, flags, read in (("lora", "lora", "", "--batch 1 --lora 16", f"{model} --lora"),
                                       ("lora-shard", "lora", "2 ", "--batch 2 --lora 16 --shard", ""),
                                       ("train", "train", "", "--batch 1", f"--arch {arch} --ckpt"),
                                       ("shard", "shard", "2 ", "--batch 2 --shard", "")):  # shares are joined first
        run = f"{folder}/{name}"
        out |= {name: (gb, f"{two}{steps} {flags} --out {run}"),
                f"{name}-resume": (gb, f"{two}train --resume {run} --stop-after 0"),
                **({f"{name}-read": (gb, f"sample {read} {run} {ask}")} if read else {}),
                f"{name}-ours": (gb, f"train --export {run} {run}-ours"),
                f"{name}-ours-read": (gb, f"sample --arch {arch} --ckpt {run}-ours {ask}"),
                f"{name}-published": (gb, f"train --export {run} {run}-published --layout published"),
                f"{name}-published-read": (gb, f"sample {files} --ckpt {run}-published {ask}")}
    return out

def one(size, script, *argv):
    """A stage, in its process: write_files, or a script's main, of models that take pictures of `size` pixels."""
    if script == "files":
        return write_files(*argv)
    module = importlib.import_module(script)
    for arch in checkpoint.architectures() if size != "0" else ():
        for name, config in checkpoint.model_file(arch).CONFIGS.items():
            config.image_size = config.image_size if name == "tiny" else int(size)
            if hasattr(config, "num_sampling_steps"):  # of each token
                config.num_sampling_steps = config.num_sampling_steps if name == "tiny" else "10"
    sys.argv = [script, *argv]
    checkpoint.one_line_errors(module.main)

# ---------------------------------------------------------------------------------------------------------------------
# what is measured

def memory(root):
    """-> GB that a process and its descendants have of their own, and together with the files that they have mapped."""
    about, found, own, mapped = {}, {root}, 0, 0
    for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/status") as f:  # it may just have ended
            about[pid] = {k: v.split()[0] for k, _, v in (line.partition(":") for line in f) if v.strip()}
    while more := {pid for pid, kv in about.items() if int(kv["PPid"]) in found} - found:
        found |= more
    for kv in [about[pid] for pid in found if "RssAnon" in about.get(pid, ())]:
        own, mapped = own + int(kv["RssAnon"]) + int(kv["RssShmem"]), mapped + int(kv["RssFile"])
    return own * 1.024e-6, (own + mapped) * 1.024e-6

def measured(command, leave):
    """Runs a command -> (seconds, GB, GB with mapped files, OK or what it said at last)."""
    started, peak, how = time.time(), (0, 0), ""
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=subprocess.STDOUT)
        while process.poll() is None:
            time.sleep(0.5)
            peak = tuple(map(max, peak, memory(process.pid)))
            if checkpoint.free_memory(torch.device("cpu")) < leave * 1e9:
                how = f"ended: less than {leave:g} GB were free"
                process.kill()  # torchrun's processes follow it
        said.seek(0)
        lines = said.read().splitlines() or ["nothing said"]
    print("\n".join(f"    {line}" for line in lines[-30:]), flush=True)
    return time.time() - started, *peak, how or ("OK" if process.returncode == 0 else lines[-1])

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--work", required=True, help="folder for the files")
    p.add_argument("--data", metavar="TAR", help="pictures with captions (default: of the shape world)")
    p.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    p.add_argument("--only", nargs="+", metavar="STAGE", help="these, of files that an earlier call kept")
    p.add_argument("--size", default="256", help="pixels of pictures; 0: as published")
    p.add_argument("--leave", type=float, default=1.0, help="GB of memory that stay free")
    p.add_argument("--keep", action="store_true", help="the files")
    args, rows = p.parse_args(), []
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    os.makedirs(args.work, exist_ok=True)
    for config in args.models:
        gb, minutes = MODELS[config]["gb"], MODELS[config]["minutes"]
        print(f"{config}: {gb['draw']} GB of memory to draw, {gb['lora']} for adapters in two processes, "
              f"{gb['train']} to train, {gb['shard']} in shares; {gb['disk']} GB of disk; "
              f"about {minutes} minutes on two cores", flush=True)
        free = shutil.disk_usage(args.work).free / 1e9
        if total < gb["draw"] or free < gb["disk"]:
            sys.exit(f"{config} needs {gb['draw']} GB of memory and {gb['disk']} on the disk; this machine has "
                     f"{total:.0f} and {free:.0f}")
    for config in args.models:
        folder = os.path.join(os.path.abspath(args.work), config)
        os.makedirs(folder, exist_ok=True)
        for stage, (need, command) in stages(config, folder, args.data and os.path.abspath(args.data)).items():
            if args.only and stage not in args.only:
                continue
            two, command = command.startswith("2 "), command.removeprefix("2 ")
            shown = command.replace(" ", ".py ", 1)
            print(f"{config} {stage}: {'torchrun --nproc_per_node=2' if two else 'python'} {shown}", flush=True)
            launcher = [sys.executable, *"-m torch.distributed.run --standalone --nproc_per_node=2".split()[:4 * two]]
            needed = MODELS[config]["gb"][need]
            row = 0, 0, 0, f"left out: it needs {needed} GB of memory"
            if needed <= total:
                row = measured([*launcher, __file__, "one", args.size, *shlex.split(command)], args.leave)
            rows.append((config, stage, *row))
            if stage.endswith("published-read") and not args.keep:
                for path in glob.glob(f"{folder}/{stage.removesuffix('-published-read')}*"):
                    shutil.rmtree(path)
        if not args.keep:
            shutil.rmtree(folder)
    print(f"{'model':12s} {'stage':24s} seconds     GB  with mapped files")
    for config, stage, seconds, own, mapped, how in rows:
        print(f"{config:12s} {stage:24s} {seconds:7.0f} {own:6.1f} {mapped:6.1f}  {how[:100]}")
    return int(any(how != "OK" and not how.startswith("left out") for *_, how in rows))

if __name__ == "__main__":
    sys.exit(one(*sys.argv[2:]) if sys.argv[1:2] == ["one"] else main())
