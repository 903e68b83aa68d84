"""The public benchmarks' files and rules: what they ask and where they want the pictures, how an answer in words is
read, and what scores are made of it. Nothing here needs a model. Facts about formats are from the scorers' published
sources; where these differ among each other, the docstring says whose rule it is.
"""
import csv
import io
import json
import os
import pathlib
import re
from collections import Counter

import checkpoint
from data import encoding_of

# ---------------------------------------------------------------------------------------------------------------------
# The benchmarks' files

csv.field_size_limit(2 ** 31 - 1)  # MMBench keeps its pictures in the cells of a table

def no_key_twice(pairs):
    """JSON's own reader would keep the last value of a key and drop the others."""
    if twice := [key for key, times in Counter(key for key, _ in pairs).items() if times > 1]:
        raise ValueError(f"the key {twice[0]!r} stands there twice")
    return dict(pairs)

def read_file(path, flag, keyed=False):
    """The rows of a JSON list, JSON lines, CSV, TSV or parquet file, or of {subject: rows}, as MMMU's outputs are.
    keyed: of a JSON object {key: row or text}, or a folder of texts, with the key as "key" and the text as "text"."""
    if keyed and os.path.isdir(path):
        texts = {key: pathlib.Path(path, key) for key in sorted(os.listdir(path)) if key.endswith(".txt")}
        return [dict(key=key, text=file.read_text(encoding="utf-8-sig").strip()) for key, file in texts.items()]
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{flag} {path}: no such file")
    kind, hint = "JSON object" if keyed else "list of rows", ": pip install pyarrow" * path.endswith(".parquet")
    with checkpoint.reading(path, f"not a {kind} that {flag} takes", hint):
        if path.endswith(".parquet"):
            from pyarrow.parquet import ParquetFile
            return ParquetFile(path).read().to_pylist()
        raw = pathlib.Path(path).read_bytes()
        text = raw.decode(encoding_of(raw))
        if path.endswith((".csv", ".tsv")):  # older copies of MMVP's file spell Index with a small L
            lines = io.StringIO(text.replace("lndex", "Index", 1), newline="")
            return list(csv.DictReader(lines, dialect="excel-tab" if path.endswith(".tsv") else "excel"))
        try:
            rows = json.loads(text, object_pairs_hook=no_key_twice)
        except json.JSONDecodeError:
            rows = [json.loads(line, object_pairs_hook=no_key_twice) for line in text.split("\n") if line.strip()]
        if keyed:
            return [dict(row if isinstance(row, dict) else {"text": row}, key=key) for key, row in rows.items()]
        if isinstance(rows, dict):
            lists = all(isinstance(some, list) for some in rows.values())
            rows = [row for some in rows.values() for row in some] if lists else [rows]
        return list(rows)

def read_rows(paths, flag, name, fields, keyed=False):
    """Rows of some files. name: the fields that tell two rows apart. fields: what else must be there, a text last.
    FileNotFoundError, or ValueError with the file and the first row that is wrong and how many are."""
    rows, first = [], {}
    for path in paths:
        some, wrong = read_file(path, flag, keyed), []
        for number, row in enumerate(some, 1):
            lacks = [f for f in (*name, *fields) if not isinstance(row, dict) or is_empty(row.get(f))]
            if lacks or not is_text(row[fields[-1]]):
                wrong.append(f"row {number} has no {[*lacks, fields[-1]][0]}")
        if wrong or not some:
            needs = ", ".join(dict.fromkeys((*name, *fields)))
            raise ValueError(f"{path}: {[*wrong, 'no rows'][0]} ({len(wrong)} of {len(some)} rows lack something; "
                             f"{flag} needs {needs} in each)")
        for number, row in enumerate(some, 1):
            key, here = tuple(str(row[f]) for f in name), f"{path} row {number}"
            if first.setdefault(key, here) != here:
                raise ValueError(f"{here}: {' '.join(key)[:80]!r} was in {first[key]} before: take one of them out")
        rows += some
    return rows

def is_empty(value):
    return value is None or isinstance(value, str) and not value.strip()

def is_text(value):
    return isinstance(value, str) and "\0" not in value and not re.search("[\ud800-\udfff]", value)

def sources_there(paths, flag="--images"):
    """FileNotFoundError where files are missing; bytes are there."""
    gone = [path for path in paths if isinstance(path, str) and not os.path.isfile(path)]
    if gone:
        raise FileNotFoundError(f"{gone[0]}: no such picture, nor {len(gone) - 1} others of {len(paths)}; give their "
                                f"folder as {flag}")

def source_of(value, root):
    """A cell that names a picture, or holds it as parquet files do -> path or bytes."""
    value = value["bytes"] if isinstance(value, dict) else value
    return value if isinstance(value, bytes) else os.path.join(root or "", value)

# ---------------------------------------------------------------------------------------------------------------------
# Drawing benchmarks, whose own tools judge the pictures

DRAWN = {  # the file of each picture, in what folder of --out; the fields of its row of --prompts
    "geneval": dict(file="{number:05d}/samples/{picture:04d}.png", name=["prompt"], fields=["prompt"], n=4),
    "geneval2": dict(file="{number:05d}.png", name=["prompt"], fields=["prompt"]),
    "dpg": dict(file="{stem}.png", name=["key"], fields=["text"], keyed=True, tiles=4),
    "dpg-reca": dict(file="{stem}_{picture}.png", name=["key"], fields=["text"], keyed=True, n=4),
    "wise": dict(file="{prompt_id}.png", name=["prompt_id"], fields=["Prompt"]),
    "imgedit": dict(file="{key}.png", name=["key"], fields=["id", "prompt"], keyed=True, source="id"),
    "gedit": dict(file="fullset/{task_type}/{instruction_language}/{key}.png", folder="gen_image",
                  name=["task_type", "instruction_language", "key"], fields=["input_image", "instruction"],
                  source="input_image")}
WISE = dict(legacy=((1, 400), (401, 700), (701, 1000)), verified=((1, 400), (401, 640), (641, 1000)))  # ids of a file

def drawings(args):
    """What --draw makes: a list of dicts with file (its path in --out), prompt, tiles (pictures in a square there) and
    source (of an edit: path or bytes, else None); and what stands beside, {path: text, or path or bytes of a picture}.
    Raises as read_rows and sources_there do."""
    bench, plan, beside = DRAWN[args.draw], [], {}
    rows = read_rows(args.prompts, "--prompts", bench["name"], bench["fields"], bench.get("keyed", False))
    for number, row in enumerate(rows):
        source = source_of(row[bench["source"]], args.images) if "source" in bench else None
        names = dict(row, number=number, stem=str(row.get("key")).removesuffix(".txt"))
        for picture in range(args.n):
            file = bench["file"].format_map(dict(names, picture=picture))
            if os.path.isabs(file) or ".." in file.split("/"):
                raise ValueError(f"{args.prompts[0]}: {file!r} would be outside of --out: what names it is no name")
            file = os.path.join(bench.get("folder", "images"), file)
            plan.append(dict(file=file, prompt=row[bench["fields"][-1]], tiles=bench.get("tiles", 1), source=source))
        if args.draw == "geneval":
            beside[os.path.join("images", f"{number:05d}", "metadata.jsonl")] = json.dumps(row)
        elif args.draw == "gedit":
            beside[file.removesuffix(".png") + "_SRCIMG.png"] = source
    sources_there([each["source"] for each in plan])
    if args.draw == "geneval2":
        paths = {each["prompt"]: os.path.abspath(os.path.join(args.out, each["file"])) for each in plan}
        beside["image_paths.json"] = json.dumps(paths, indent=1, ensure_ascii=False)
    return plan, beside

def wise_protocol(paths):
    """The line that says whose ids the files have: WISE's two protocols give the same ids to different questions."""
    ids = [[int(row["prompt_id"]) for row in read_file(path, "--prompts")] for path in paths]
    spans = [(min(some), max(some)) for some in ids]
    fits = [name for name, parts in WISE.items() if set(spans) <= set(parts)]
    found = ", ".join(f"{low}-{high}" for low, high in spans)
    return f"wise: ids {found}: files of the {' or '.join(fits) or 'legacy and verified (mixed, or cut)'} protocol"
