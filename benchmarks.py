"""The public benchmarks' files and rules: what they ask and where they want the pictures, how an answer in words is
read, and what scores are made of it. Nothing here needs a model. Facts about formats are from the scorers' published
sources; where these differ among each other, the docstring says whose rule it is.
"""
import ast
import base64
import csv
import io
import json
import os
import pathlib
import random
import re
from collections import Counter
from itertools import zip_longest
from operator import itemgetter

import numpy as np

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
            if key in first:
                raise ValueError(f"{here}: {' '.join(key)[:80]!r} was in {first[key]} before: take one of them out")
            first[key] = here
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
    spans = []
    for path in paths:
        with checkpoint.reading(path, "prompt_id is no number in some row"):
            ids = [int(row["prompt_id"]) for row in read_file(path, "--prompts")]
        spans.append((min(ids), max(ids)))
    fits = [name for name, parts in WISE.items() if set(spans) <= set(parts)]
    found = ", ".join(f"{low}-{high}" for low, high in spans)
    return f"wise: ids {found}: files of the {' or '.join(fits) or 'legacy and verified (mixed, or cut)'} protocol"

# ---------------------------------------------------------------------------------------------------------------------
# What a model is asked: a row of --data -> its pictures (names in --images, or bytes), and the words

WORD = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."

def ask_pope(row):
    row["true"] = {"yes": True, "no": False}[row["label"].strip().lower()]
    return [row["image"]], row["text"] + WORD

def ask_gqa(row):
    return [f"{row['imageId']}.jpg"], row["question"] + WORD

def options_of(row):
    return {letter: row[letter] for letter in "ABCD" if not is_empty(row.get(letter))}

def ask_mmbench(row):
    hint = "" if is_empty(row.get("hint")) else row["hint"] + "\n"
    lines = "".join(f"\n{letter}. {text}" for letter, text in options_of(row).items())
    return [base64.b64decode(row["image"])], hint + row["question"] + lines + LETTER

def ask_mmvp(row):
    options = re.fullmatch(r"\s*\(a\)(.*)\(b\)(.*)", row["Options"], re.DOTALL).groups()
    row["A"], row["B"] = (text.strip() for text in options)
    row["true"] = {"(a)": "A", "(b)": "B"}[row["Correct Answer"].strip()]
    return [f"{row['Index']}.jpg"], f"{row['Question']}\nA. {row['A']}\nB. {row['B']}{LETTER}"

def ask_mmmu(row):
    """The hub's columns, of which it also makes those of a prediction. Where there are several pictures, the tags that
    say which one is meant stay in the text."""
    pictures = [row[f"image_{i}"] for i in range(1, 8) if row.get(f"image_{i}")]
    options = ast.literal_eval(row["options"]) if isinstance(row["options"], str) else row["options"]
    text, lines = row["question"], "".join(f"\n({letter}) {option}" for letter, option in zip(LETTERS, options))
    if row["question_type"] == "multiple-choice":
        row.update(all_choices=list(LETTERS[:len(options)]), index2ans=dict(zip(LETTERS, options)))
    elif str(row["answer"]).startswith("["):
        row["answer"] = ast.literal_eval(row["answer"])
    asked = f"{text}{lines}\n{LETTER}" if row["question_type"] == "multiple-choice" else text + WORD
    if len(pictures) == 1:
        asked = asked.replace("<image 1>", "").strip()
    return pictures, asked

def ask_mmvet(row):
    return [row["imagename"]], row["question"]

# ---------------------------------------------------------------------------------------------------------------------
# How a reply is read

LETTERS = "ABCDEFGHI"

def pope_says_yes(reply):
    """POPE's own rule: yes is whatever does not say no before the first period, an empty reply too."""
    words = reply.split(".")[0].replace(",", "").split(" ")
    return not {"No", "not", "no"} & set(words)

def mmvp_choice(reply, options):
    """The rule without a judge of Bagel and InternVL -> an option's letter, or a reply that is none."""
    reply = reply.strip()
    if len(reply) == 1 or not reply:
        return reply
    if reply[0] in options:
        return reply[0]
    return next((letter for letter, text in options.items() if text in reply), reply)

def mmbench_choice(reply, options):
    """VLMEvalKit's exact matching -> a letter of the options {letter: text}, or None."""
    words = reply.translate(dict.fromkeys(map(ord, ".()[],:;!*#{}"), " ")).split()
    letters = [letter for letter in options if letter in words]
    if len(letters) == 1 and words.index(letters[0]) > len(words) - 5:
        return letters[0]
    line = " ".join(words).replace("Answer is", "answer is") + " "
    said = [letter for letter in options if f"answer is {letter} " in line]
    if not said and len(reply) <= 2 * sum(map(len, options.values())):
        said = [letter for letter, text in options.items() if text.lower() in reply.lower()]
    return said[0] if len(said) == 1 else None

def mmmu_choice(reply, letters, texts, rng):
    """MMMU's own rule for multiple choice -> (letter, is it a guess?). What stands last counts: a letter in brackets,
    else between blanks, else, in more than five words, an option's text; else a letter is guessed."""
    for mark in ",.!?;:'":
        reply = reply.strip(mark)
    reply = f" {reply} "
    ways = [(reply, {letter: form.format(letter) for letter in letters}) for form in ("({})", " {} ")]
    if len(reply.split()) > 5:
        ways.append((reply.lower(), {letter: text.lower() for letter, text in texts.items()}))
    for text, wanted in ways:
        places = {letter: text.rfind(what) for letter, what in wanted.items() if what in text}
        if places:
            return max(places, key=places.get), False
    return rng.choice(letters), True

KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
NUMBERS = (r"-?\b\d{1,3}(?:,\d{3})+\b", r"-?\d+(?:\.\d+)?[eE][+-]?\d+",  # 1,000; 1e3; 1.5
           r"-?(?:\d*\.\d+|\d+\b)(?![eE][+-]?\d)(?![,\d])")

def mmmu_forms(text):
    """What is compared: a number to two places, or lower case, a single letter with a blank beside it."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]

def mmmu_open_right(reply, gold):
    """MMMU's own rule for short answers: of each line the shortest tail after a key word (of the last line after "=",
    too), or the whole reply, and the numbers in them; right if a gold text is in one of them or a number is equal.
    gold: a text or a list. Lines end at a period before a capital, too, says the rule, but in lower case is none."""
    reply = reply.strip().strip(".").lower()
    lines, tails = reply.split("\n"), []
    for number, line in enumerate(lines, 1):
        best = ""
        for key in KEYS + ("=",) * (number == len(lines)):
            tail = line.rpartition(key)[2].strip()
            if key in line and (not best or len(tail) < len(best)):
                best = tail
        tails += [best] * (best not in (*":,.!?;'", ""))
    tails = tails or [reply]
    numbers = [number for tail in tails for pattern in NUMBERS for number in re.findall(pattern, tail)]
    said = [form for text in tails + numbers for form in mmmu_forms(text)]
    golds = [form for text in (gold if isinstance(gold, list) else [gold]) for form in mmmu_forms(str(text))]
    return any(form in golds if isinstance(form, float) else any(isinstance(g, str) and g in form for g in golds)
               for form in said)

# ---------------------------------------------------------------------------------------------------------------------
# Scores: rows and their replies -> values (units, k), one row for each unit that counts for itself; a function of their
# means (..., k) -> {name: score}, the main one first; and a note

def ratio(a, b):
    return a / np.maximum(b, 1e-12)

def score_pope(rows, replies):
    """F1, precision and recall of "yes", accuracy, and the share of "yes" among the replies."""
    yes = np.array([pope_says_yes(reply) for reply in replies])
    true = np.array([row["true"] for row in rows])

    def numbers(means):
        hit, alarm, miss = np.moveaxis(means, -1, 0)
        return {"F1": ratio(2 * hit, 2 * hit + alarm + miss), "accuracy": 1 - alarm - miss,
                "precision": ratio(hit, hit + alarm), "recall": ratio(hit, hit + miss), "yes": hit + alarm}
    return np.stack([yes & true, yes & ~true, ~yes & true], 1), numbers, f"{len(rows)} questions"

def score_gqa(rows, replies):
    """Equal strings; open questions are those whose structure is a query."""
    right = np.array([reply == row["answer"] for row, reply in zip(rows, replies)])
    query = np.array([row.get("types", {}).get("structural") == "query" for row in rows])

    def numbers(means):
        return {"accuracy": means[..., 0], "open": ratio(means[..., 1], means[..., 2]),
                "binary": ratio(means[..., 0] - means[..., 1], 1 - means[..., 2])}
    return np.stack([right, right & query, query], 1), numbers, f"{right.sum()} / {len(rows)} balanced questions"

EXCHANGED = {"99", "100", "279", "280"}  # whose labels lmms-eval has exchanged (MMVP issue 30)

def score_mmvp(rows, replies):
    """Pairs with both questions right, and questions; and pairs with EXCHANGED the other way round."""
    right = {}
    for row, reply in zip(rows, replies):
        said, true = mmvp_choice(reply, {"A": row["A"], "B": row["B"]}), row["true"]
        other = {"A": "B", "B": "A"}[true] if str(row["Index"]) in EXCHANGED else true
        right[int(row["Index"])] = said == true, said == other
    pairs = sorted({(i - 1) // 2 for i in right})
    if len(pairs) * 2 != len(right):
        raise ValueError(f"--data: {len(right)} questions, expected pairs, 1 and 2, 3 and 4: give the whole file")
    both = np.array([(right[2 * i + 1], right[2 * i + 2]) for i in pairs])  # (pairs, questions, labels)
    values = np.concatenate([both.all(1), both[:, :, 0].mean(1, keepdims=True)], 1)

    def numbers(means):
        return {"pairs": means[..., 0], "questions": means[..., 2], "pairs with 4 labels exchanged": means[..., 1]}
    return values, numbers, f"{int(both[:, :, 0].all(1).sum())} / {len(pairs)} pairs by the labels of --data"

def score_mmmu(rows, replies):
    """Accuracy over all questions, subjects in alphabetical order, with one stream of guesses."""
    rng, right, guesses = random.Random(42), [], 0
    for row, reply in zip(rows, replies):
        if row["question_type"] == "multiple-choice":
            said, guess = mmmu_choice(reply, row["all_choices"], row["index2ans"], rng)
            right.append(said in row["answer"] if isinstance(row["answer"], list) else said == row["answer"])
            guesses += guess
        else:
            right.append(mmmu_open_right(reply, row["answer"]))
    return np.array(right)[:, None], accuracy, f"{sum(right)} / {len(rows)}, {guesses} fallbacks"

def accuracy(means):
    return {"accuracy": means[..., 0]}

def score_mmbench(rows, replies):
    """Questions of which every rotation of the options (index modulo a million) is right."""
    groups, unread = {}, 0
    for row, reply in zip(rows, replies):
        said = mmbench_choice(reply, options_of(row))
        groups.setdefault(int(row["index"]) % 1_000_000, []).append(said == row["answer"])
        unread += said is None
    right = [all(groups[key]) for key in sorted(groups)]
    note = f"{sum(right)} / {len(right)} questions, {unread} of {len(rows)} replies without a letter"
    return np.array(right)[:, None], accuracy, note

SCORED = {  # the fields of --data; the official file of predictions and its columns, names first, replies last
    "pope": dict(name=["question_id"], fields=["image", "label", "text"], ask=ask_pope, score=score_pope, tokens=16,
                 file="{set}_answers.jsonl", columns=dict(question_id="question_id", question="text", answer="reply")),
    "gqa": dict(name=["key"], fields=["imageId", "isBalanced", "answer", "question"], ask=ask_gqa, score=score_gqa,
                tokens=16, keyed=True, file="predictions.json", columns=dict(questionId="key", prediction="reply")),
    "mmvp": dict(name=["Index"], fields=["Options", "Correct Answer", "Question"], ask=ask_mmvp, score=score_mmvp,
                 tokens=32, file="answers.jsonl", columns=dict(
                     question_id="Index", prompt="asked", answer="Correct Answer", response="reply")),
    "mmmu": dict(name=["id"], fields=["question_type", "answer", "options", "question"], ask=ask_mmmu, score=score_mmmu,
                 tokens=128, file="{subject}/output.json", columns=dict(
                     id="id", question_type="question_type", answer="answer", all_choices="all_choices",
                     index2ans="index2ans", response="reply")),
    "mmbench": dict(name=["index"], fields=["image", "answer", "A", "question"], ask=ask_mmbench, score=score_mmbench,
                    tokens=64, file="predictions.tsv", columns=dict(
                        index="index", question="question", A="A", B="B", C="C", D="D", answer="answer",
                        category="category", prediction="reply")),
    "mmvet": dict(name=["key"], fields=["imagename", "question"], ask=ask_mmvet, tokens=512, keyed=True,
                  file="answers.json", columns=dict(key="key", reply="reply"))}

def questions(name, paths, predictions=()):
    """{set: rows} of --data, with "pictures" and what is "asked": for POPE a set per file. Without --data the rows are
    those of MMMU's predictions, which hold all that its rule needs. Raises as read_rows does."""
    bench, sets = SCORED[name], {}
    for files in [[path] for path in paths] if name == "pope" else [paths]:
        key = pathlib.Path(files[0]).stem if name == "pope" else name
        if files:
            rows = read_rows(files, "--data", bench["name"], bench["fields"], bench.get("keyed", False))
        else:
            rows = read_rows(predictions, "--predictions", ["id"], ["answer", "question_type"])
        if key in sets:
            raise ValueError(f"--data {files[0]}: another file has this name too, which names the set of questions")
        sets[key] = [row for row in rows if name != "gqa" or row["isBalanced"]]
        images = {row["index"]: row["image"] for row in rows} if name == "mmbench" else {}
        for row in rows:
            row.update(set=key, place=f"{key} {row[bench['name'][0]]}")
            if name == "mmmu":
                row["subject"] = row["id"].partition("_")[2].rpartition("_")[0]
            if name == "mmbench":
                row["image"] = images.get(row["image"], row["image"])  # a rotation may name the row that holds it
            with checkpoint.reading(files[0] if files else predictions[0], f"no question in {row['place']}"):
                row["pictures"], row["asked"] = bench["ask"](row) if files else ([], "")
        if name == "mmmu":
            sets[key].sort(key=itemgetter("subject"))
    return sets

def read_predictions(name, paths, sets):
    """Published files of predictions -> {set: a reply to each of its rows}. ValueError where a question has none, or,
    for POPE, whose rule pairs them by order, not in its place."""
    (number, *_, reply), out = SCORED[name]["columns"], {}
    if name == "pope" and len(paths) != len(sets):
        raise ValueError(f"--predictions: {len(paths)} files for {len(sets)} files of --data, expected one for each")
    for at, (key, rows) in enumerate(sets.items()):
        files = paths[at:at + 1] if name == "pope" else paths
        told = [row for path in files for row in read_file(path, "--predictions")]
        wanted = [str(row[SCORED[name]["name"][0]]) for row in rows]
        if name == "pope":
            own = [*wanted, *[None] * len(told)]  # since POPE's own files have no numbers
            told = [{number: each, **row} for each, row in zip(own, told)]
        texts = [row.get(reply, row.get("text")) for row in told]  # LLaVA's POPE has text
        replies = {str(row.get(number)): text for row, text in zip(told, texts) if isinstance(text, str)}
        if len(replies) < len(told) or name == "pope" and len(told) > len(rows):
            raise ValueError(f"{files[0]}: {len(told)} rows have {len(replies)} different {number} with a {reply}, and "
                             f"there are {len(rows)} questions")
        there = [*replies] if name == "pope" else [each if each in replies else None for each in wanted]
        if lost := [each for each, other in zip_longest(wanted, there) if each != other]:
            raise ValueError(f"{files[0]}: {len(lost)} of {len(rows)} questions have no {reply} in their place, first "
                             f"{lost[0]}: are these the predictions for those questions?")
        out[key] = [replies[each] for each in wanted]
    return out

def write_predictions(name, sets, replies):
    """{file: text} as the official scorer reads them."""
    bench, tables, out = SCORED[name], {}, {}
    for key, rows in sets.items():
        for row, reply in zip(rows, replies[key]):
            cells = {column: dict(row, reply=reply).get(field) for column, field in bench["columns"].items()}
            cells = {column: cell for column, cell in cells.items() if cell is not None}
            tables.setdefault(bench["file"].format_map(row), []).append(cells)
    for file, table in tables.items():
        if file.endswith(".tsv"):
            text = io.StringIO()
            writer = csv.DictWriter(text, [*bench["columns"]], dialect="excel-tab", lineterminator="\n")
            writer.writeheader()
            writer.writerows(table)
            out[file] = text.getvalue()
        elif file.endswith(".jsonl"):
            out[file] = "".join(json.dumps(cells) + "\n" for cells in table)
        else:
            out[file] = json.dumps({c["key"]: c["reply"] for c in table} if name == "mmvet" else table, indent=1)
    return out

def intervals(scored, seed, minus=None, n=1000):
    """{set: (values, numbers, note)} -> {set: {score: (value, low, high)}}, and the sets' mean where there are several.
    The interval is where 95 % of the scores of n resamples of the units lie. minus: other replies to the same
    questions; then all are the differences, of the same resamples."""
    rng, found = np.random.default_rng(seed), {}
    for key, (values, numbers, _) in scored.items():
        k = values.shape[1]
        both = values if minus is None else np.concatenate([values, minus[key][0]], 1)
        picks = (rng.integers(len(both), size=len(both)) for _ in range(n))
        means = np.stack([both.mean(0), *(both[pick].mean(0) for pick in picks)])  # (1 + n, k or 2 k)
        found[key] = numbers(means[:, :k])
        if minus is not None:
            found[key] = {name: x - numbers(means[:, k:])[name] for name, x in found[key].items()}
    if len(found) > 1:
        names = next(iter(found.values()))
        found["mean"] = {name: np.mean([each[name] for each in found.values()], 0) for name in names}
    return {key: {name: (float(x[0]), *map(float, np.percentile(x[1:], (2.5, 97.5)))) for name, x in each.items()}
            for key, each in found.items()}
