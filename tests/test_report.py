"""report.html of a run folder: one file, which a browser shows without a network and without complaint."""
import html.parser
import json
import re
import shutil
import subprocess

import pytest
from helpers import run
from PIL import Image

import evaluate
import sample

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")

class Page(html.parser.HTMLParser):
    """Tags that are open, and every address that the page names."""

    def __init__(self, text):
        super().__init__()
        self.open, self.addresses, self.rows = [], [], 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.addresses += [value for name, value in attributes if name in ("src", "href")]
        self.rows += tag == "tr"
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.pop()

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of two steps, judged by made-up scores."""
    folder = tmp_path_factory.mktemp("runs") / "a <b>"
    scores = {"generation": {"score": 0.5, "interval": (0.2, 0.8), "seen": 0.6, "held_out": 0.25, "objects": 2.0,
                             "tasks": {"colors": {"score": 0.5, "n": 1, "interval": (0.1, 0.9)}}},
              "questions": {"accuracy": 0.75, "n": 4, "interval": (0.3, 0.95)}, "seconds": 1.0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "score_all", lambda *args, **more: scores)
        patch.setattr(evaluate, "report", lambda scores: "")
        assert run("--arch", "ar", "--stage", "base", "--mix", "t2i=1", "--steps", "2", "--batch", "8", "--pool", "8",
                   "--eval-n", "6", "--eval-every", "1", "--log-every", "1", "--preview", "1", "--device", "cpu",
                   "--threads", "1", "--gemm", "mkl", out=folder) == 0
    return folder

def test_a_finished_run_has_a_report_that_needs_nothing_else(folder):
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not page.open and len(page.addresses) == 1  # before_after.png, inside
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses) and "http" not in text
    assert "<title>ar, base: a &lt;b&gt;</title>" in text and text.count("<svg") == 2  # loss and t2i
    result = json.loads((folder / "result.json").read_text())
    assert result["commit"] in text and "plan of ar tiny, stage base" in text
    assert "<td>0.500 (0.200 to 0.800)</td>" in text and "<td>0.250</td>" in text and "0.750 (0.300 to 0.950)" in text

def test_before_after_and_change():
    before, after = ({"long": {"score": value, "interval": (value - 0.1, value + 0.1),
                               "held_out": {"score": value / 2, "interval": (0.0, 0.5)}}} for value in (0.25, 0.5))
    text = sample.score_table(before, after)
    cells = ["long prompts", "0.250 (0.150 to 0.350)", "0.500 (0.400 to 0.600)", "+0.250"]
    assert f"<tr><td>{'</td><td>'.join(cells)}</td></tr>" in text and Page(text).rows == 3
    assert "<td>long prompts</td><td></td><td>0.500" in sample.score_table(None, after)
    assert sample.score_table(None, None) == "<p>Nothing was judged (--eval-n).</p>"

def test_a_browser_shows_it(folder, tmp_path):
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    shutil.copy(folder / "report.html", tmp_path / "report.html")  # alone, so that nothing beside it can help
    common = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000",
              f"--user-data-dir={tmp_path}/profile", "--window-size=1000,1600"]
    shot = tmp_path / "shot.png"
    command = [*common, "--enable-logging=stderr", f"--screenshot={shot}", f"file://{tmp_path}/report.html"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert shot.exists() and not re.search(r"CONSOLE|ERR_", done.stderr), done.stderr[-2000:]
    colors = Image.open(shot).convert("RGB").getcolors(1 << 22)
    assert len(colors) > 50 and max(n for n, _ in colors) < 0.98 * 1000 * 1600  # text, curves and pictures
