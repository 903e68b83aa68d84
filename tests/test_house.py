"""The house: which file may import which, how long each may be, and that no file but a model's own knows its name."""
import ast
import os
import re

import checkpoint

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BUDGET = {"train.py": 841, "sample.py": 436, "evaluate.py": 600, "vision_encoder.py": 450, "image_tokenizer.py": 655,
          "text_tokenizer.py": 260, "data.py": 947, "shape_world.py": 471, "checkpoint.py": 1034,
          "benchmarks.py": 465, "lmms_eval_adapter.py": 125, "model_mar.py": 781}
MODELS = ("model_mar.py", "model_ar.py", "model_diffusion.py", "model_openuni.py",
          "model_janus.py")  # a reader's own is not counted
MAY_IMPORT = {  # rooms below each room; a model file's name stands for all of them
    "custom_kernels": [], "text_tokenizer": [], "shape_world": [], "checkpoint": ["text_tokenizer", "custom_kernels"],
    "vision_encoder": ["custom_kernels"], "data": ["shape_world", "checkpoint", "vision_encoder"],
    "image_tokenizer": ["data", "checkpoint", "vision_encoder"],
    "model": ["data", "vision_encoder", "image_tokenizer", "checkpoint", "custom_kernels"],
    "sample": ["data", "checkpoint"], "evaluate": ["data", "shape_world", "checkpoint", "benchmarks"],
    "benchmarks": ["data", "checkpoint"], "lmms_eval_adapter": ["data", "checkpoint"],
    "train": ["data", "shape_world", "checkpoint", "image_tokenizer", "sample", "evaluate", "custom_kernels"],
    "bench": ["train", "evaluate", "image_tokenizer", "data", "checkpoint", "custom_kernels"]}  # never imported

def lines(path):
    with open(os.path.join(ROOT, path), encoding="utf-8") as f:
        return f.read().splitlines()

def python_files(*folders):
    for folder in folders:
        for name in sorted(os.listdir(os.path.join(ROOT, folder))):
            if name.endswith(".py"):
                yield os.path.join(folder, name) if folder else name

PRODUCT = list(python_files("", "custom_kernels"))

def test_every_file_stays_within_its_budget():
    lengths = {path: len(lines(path)) for path in PRODUCT}
    for path, n in lengths.items():
        if "/" not in path:
            assert n <= BUDGET.get(path, 770 if path.startswith("model_") else 0), (path, n)
    kernels = [n for path, n in lengths.items() if path.startswith("custom_kernels") and not path.endswith("bench.py")]
    assert sum(kernels) <= 1491, kernels
    ours = {path: n for path, n in lengths.items() if not path.startswith("model_") or path in MODELS}
    assert sum(ours.values()) <= 11709, (sum(ours.values()), ours)

def test_no_line_is_longer_than_120_characters():
    for path in PRODUCT + list(python_files("tests", "weights", "results")):
        for number, line in enumerate(lines(path), 1):
            assert len(line) <= 120, f"{path}:{number}: {len(line)} characters"

def test_imports_go_downwards_only():
    """Also those inside of functions; so there is no circle."""
    rooms = {os.path.splitext(path)[0] for path in PRODUCT if "/" not in path} | {"custom_kernels"}
    for path in PRODUCT:
        me = path.split("/")[0].removesuffix(".py")
        me = "model" if me.startswith("model_") else "bench" if path == "custom_kernels/bench.py" else me
        for node in ast.walk(ast.parse("\n".join(lines(path)))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            for name in {name.split(".")[0] for name in names} & rooms - {me}:
                assert name in MAY_IMPORT[me], f"{path} imports {name}"

def test_no_architecture_is_named_outside_its_model_file():
    """But as the default of --arch, and in docstrings and help texts: a new model_X.py needs no other file."""
    classes = {checkpoint.model_file(arch).Model.__name__ for arch in checkpoint.architectures()}
    names = set(checkpoint.architectures()) | classes
    for path in ("train.py", "sample.py", "evaluate.py", "data.py", "checkpoint.py", "shape_world.py",
                 "lmms_eval_adapter.py"):
        tree = ast.parse("\n".join(lines(path)))
        allowed = [node.args[0] for call in ast.walk(tree) if isinstance(call, ast.Call) for node in [call]
                   if node.args and isinstance(node.args[0], ast.Constant) and node.args[0].value == "--arch"]
        defaults = [keyword.value for call in ast.walk(tree) if isinstance(call, ast.Call)
                    and call.args and call.args[0] in allowed for keyword in call.keywords if keyword.arg == "default"]
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in defaults:
                assert node.value not in names and not re.fullmatch(r"model_\w+", node.value), f"{path}: {node.value!r}"
            assert not (isinstance(node, ast.Name) and node.id in classes), f"{path}: {node.id}"

def test_packaging_names_no_file():
    """Every top-level file is packaged by its place, and what pip installs is what requirements.txt says."""
    import tomllib
    with open(os.path.join(ROOT, "pyproject.toml"), "rb") as f:
        project = tomllib.load(f)
    assert project["tool"]["hatch"]["build"]["targets"]["wheel"]["include"][0] == "/*.py"
    assert project["project"]["dependencies"] == lines("requirements.txt")
