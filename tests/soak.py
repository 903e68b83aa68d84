"""Kills a two-process run again and again and looks whether anything is lost: python tests/soak.py [ROUNDS] [SEED]

A run of the tiny AR model is started or resumed, one of its processes, or the launcher, is killed after a random while;
after all rounds it runs to its end. Its losses, gradient norms and weights must then be those of a run that was never
touched. 50 rounds take about twenty minutes on two cores. The report is one JSON line for each round.
"""
import collections
import json
import os
import sys
import tempfile

import torch
from safetensors.torch import load_file

sys.path[:0] = [os.path.dirname(os.path.dirname(os.path.abspath(__file__))), os.path.dirname(os.path.abspath(__file__))]
from test_runs import SMALL, kill_rounds, launch, rows  # noqa: E402

def main(rounds=50, seed=0):
    with tempfile.TemporaryDirectory() as folder:
        whole, out = f"{folder}/whole", f"{folder}/killed"
        common = [*SMALL[:-2], "--steps", str(20 * rounds), "--save-every", "5", "--log-every", "5"]
        assert launch(2, *common, "--out", whole).wait() == 0
        report = kill_rounds(out, common, rounds, seed)
        for line in report:
            print(json.dumps(line))
        a, b = (load_file(f"{where}/model.safetensors") for where in (out, whole))
        equal = rows(out)[-1] == rows(whole)[-1] and all(torch.equal(a[k], b[k]) for k in b)
        victims = collections.Counter(line["victim"] for line in report)
        print(f"{rounds} rounds, {dict(victims)}, {sum(line['resumed'] for line in report)} resumed, ended after at "
              f"most {max(line['seconds'] for line in report)} s; the end is {'' if equal else 'NOT '}bit for bit that "
              "of an undisturbed run")
        return 0 if equal else 1

if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
