"""The README's own commands and its budget: two set-up lines, and every command parses with flags that exist. The main
job itself runs in .ci/run."""
import os
import re
import shlex

import evaluate
import sample
import train

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
README = open(os.path.join(ROOT, "README.md"), encoding="utf-8").read()
JOINED = re.sub(r"\\\n\s*", " ", README)  # lines that end in a backslash go on
COMMANDS = re.findall(r"^    ((?:pip|python|torchrun) [^\n]*)", JOINED, re.M)
COMMANDS = [re.sub(r"\s+#.*", "", c).strip() for c in COMMANDS]

def test_two_set_up_commands():
    assert [c for c in COMMANDS if c.startswith("pip install")] == [
        "pip install -r requirements.txt && torchrun train.py --arch mar", "pip install -r requirements.txt && pytest"]

def test_every_command_parses():
    seen = 0
    for c in COMMANDS:
        for part in c.split("&&"):
            words = shlex.split(part)
            script = next((w for w in words if w.endswith(".py")), None)
            if script is None:
                continue
            assert os.path.exists(os.path.join(ROOT, script)), script
            argv = words[words.index(script) + 1:]
            if script == "train.py" and not {"--resume", "--export"} & set(argv):
                train.parse_args(argv)
            elif script in ("sample.py", "evaluate.py"):
                (sample if script == "sample.py" else evaluate).parse_args(argv)
            seen += 1
    assert seen >= 6

def test_docstring_commands_of_the_scripts_parse():
    for module, parse in ((m, m.parse_args) for m in (train, sample, evaluate)):
        text = re.sub(r"\\\s*\n\s*", " ", module.__doc__)
        for line in re.findall(rf"{module.__name__}\.py([^\n#]*)", text):
            if "--resume" not in line and "--verify" not in line:
                parse(shlex.split(line))

def test_readme_names_code_that_exists():
    import data
    import model_ar
    import model_diffusion
    import model_mar
    for cls in (model_mar.Harmon, model_ar.ShowO, model_diffusion.Bagel):
        assert callable(cls.reca_loss)
        for name in re.findall(rf"`{cls.__name__}\.(\w+)`", README):
            assert hasattr(cls, name), name
    assert len(data.RECA_TEMPLATES) >= 100
    for path in re.findall(r"`([\w/]+\.py)`", README):
        assert os.path.exists(os.path.join(ROOT, path)), path
    for path in re.findall(r"^    (\w+\.py|\w+/) ", README, re.M):  # the list of files
        assert os.path.exists(os.path.join(ROOT, path)), path

def test_readme_keeps_its_budget():
    """165 lines, 1,800 words, no line over 300 characters, the first command within 200 words."""
    lines, words = README.splitlines(), README.split()
    assert len(lines) <= 165 and len(words) <= 1800, (len(lines), len(words))
    assert max(map(len, lines)) <= 300, [line for line in lines if len(line) > 300]
    assert len(README[:README.index(COMMANDS[0])].split()) <= 200

def test_the_heart_is_shown_as_it_stands():
    """Every line of the README's code is a line of the model file, in the same order."""
    with open(os.path.join(ROOT, "model_mar.py"), encoding="utf-8") as f:
        source = [line.strip() for line in f]
    shown = re.search(r"```python\n(.*?)```", README, re.S).group(1).splitlines()
    at = 0
    for line in shown:
        at = next(i for i in range(at, len(source)) if source[i].startswith(line.strip().removesuffix('"""'))) + 1
    assert len(shown) >= 8
