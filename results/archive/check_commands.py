"""Do stored commands agree with the arguments stored beside them, and is every base that they start from stored, too?

    python results/archive/check_commands.py

It reads all runs under results/ and compares each flag of a command with the stored argument of that name, the file's
name with the run's architecture and seed, and each --ckpt with the --out folders of the other runs. It prints what
differs, and fails then. An argument that is not stored, or stored as null, was a default at that time: it is left out.

It does not call train.py. Flags change, and these commands are written for commit ab7f33b, the last one whose train.py
has all their flags and whose tests hold that each command means what was run. To repeat a run, check that commit out
(`git worktree add ../archive ab7f33b`) and give the command there. The `commit` in a file is that of the code when the
run started. Flags were added to some commands later, where a default had changed, so a command need not parse at the
commit beside it.
"""

import glob
import json
import os
import shlex
import sys

RESULTS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
WHERE = {"out", "ckpt", "save_every", "threads"}  # say where a run lay and how it was saved; some folders were renamed


def flags(command):
    """{name: [word, ...]} of the flags after train.py, dashes as in the stored arguments."""
    found, name = {}, None
    for word in shlex.split(command.split("train.py ")[1]):
        if word.startswith("--"):
            name = word[2:].replace("-", "_")
            found[name] = []
        else:
            found[name].append(word)
    return found


def same(words, stored):
    """Whether the words of a flag say what is stored: True for a flag alone, numbers as numbers, lists word by word."""
    if isinstance(stored, bool):
        return stored == (not words)
    if isinstance(stored, (int, float)):
        return float(words[0]) == stored
    return words == ([stored] if isinstance(stored, str) else stored)


def main():
    paths = sorted(glob.glob(os.path.join(RESULTS, "**", "*.json"), recursive=True))
    runs = {}
    for path in paths:
        with open(path, encoding="utf-8") as f:
            runs[os.path.relpath(path, RESULTS)] = json.load(f)
    outs = {flags(run["command"])["out"][0] for run in runs.values()}
    problems = []
    for path, run in runs.items():
        words = flags(run["command"])
        for name in words:
            stored = run["args"].get(name)
            if name not in WHERE and stored is not None and not same(words[name], stored):
                problems.append(f"{path}: --{name} {' '.join(words[name])} in the command, {stored} stored")
        label = os.path.basename(path).split("_")[1]
        if os.path.basename(path) != f"{run['arch']}_{label}_seed{run['seed']}.json":
            problems.append(f"{path}: the run is {run['arch']}, seed {run['seed']}")
        if "ckpt" in words and words["ckpt"][0] not in outs:
            problems.append(f"{path}: starts from {words['ckpt'][0]}, which no stored run wrote")
    print("\n".join([*problems, f"{len(runs)} runs, {len(problems)} problems"]))
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
