"""What holds for all tests, and how they run: in two processes, one for each core of a small machine. The first takes
files of tests from the front, the other from the back, until they meet; the first reports for both."""
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # models are tiny, and threads that wait for each other take the other core's time
import checkpoint
from custom_kernels.products import use_products

FOLDER = os.environ.pop("NANORECA_TESTS", None)  # in the second process: where both tell each other
FEW = 8  # files, which one process is left alone with

@pytest.fixture(autouse=True)
def plain_products():
    """Before each test PyTorch multiplies as it does by itself, whatever a run in this process chose."""
    use_products("mkl")

@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session):
    files = [list(items) for _, items in itertools.groupby(session.items, lambda item: item.path)]
    if FOLDER:
        run_files(session, files, FOLDER, reversed(range(len(files))))
    elif len(files) <= FEW or session.config.option.collectonly or session.config.option.usepdb:
        return None  # as pytest does by itself
    else:
        with tempfile.TemporaryDirectory() as folder:
            run_with_another(session, files, folder)
    return True

def run_files(session, files, folder, numbers, tell=lambda: None):
    """Runs the files that nobody has begun: whoever comes first makes their mark. The item that follows the last of a
    file is taken from another one, so that the file's fixtures end. -> names of the files that were run."""
    ran = set()
    for number in numbers:
        name = files[number][0].path.name
        try:
            os.close(os.open(f"{folder}/{name}", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            continue
        ran.add(name)
        kept = Reports(session.config)
        session.config.pluginmanager.register(kept)
        try:
            for item, following in zip(files[number], [*files[number][1:], files[number - 1][0]]):
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
                stop_if_asked(session)
        finally:
            session.config.pluginmanager.unregister(kept)
            if FOLDER:
                checkpoint.write_text(f"{folder}/{name}.json", json.dumps(kept.reports))
        tell()
    return ran

class Reports:
    """A plugin that keeps what is reported of tests, as JSON can hold it."""

    def __init__(self, config):
        self.config, self.reports = config, []

    def pytest_runtest_logreport(self, report):
        self.reports.append(self.config.hook.pytest_report_to_serializable(config=self.config, report=report))

def stop_if_asked(session):
    """As pytest's own loop does, for --exitfirst and interrupts."""
    if session.shouldfail:
        raise session.Failed(session.shouldfail)
    if session.shouldstop:
        raise session.Interrupted(session.shouldstop)

def run_with_another(session, files, folder):
    """Runs all files, together with a second process of the same command."""
    config, told = session.config, set()

    def tell():
        """Reports the files that the other process has ended since the last time."""
        for name in set(os.listdir(folder)) - told:
            if name.endswith(".json"):
                told.add(name)
                for data in checkpoint.read_json(f"{folder}/{name}"):
                    report = config.hook.pytest_report_from_serializable(config=config, data=data)
                    config.hook.pytest_runtest_logreport(report=report)
        stop_if_asked(session)
    command = [sys.executable, "-m", "pytest", *config.invocation_params.args, "-o", f"cache_dir={folder}/cache"]
    with open(f"{folder}/said", "w+") as said:
        other = subprocess.Popen(command, cwd=config.invocation_params.dir, stdout=said, stderr=said,
                                 env=os.environ | {"NANORECA_TESTS": folder})
        try:
            ran = run_files(session, files, folder, range(len(files)), tell)
            while other.poll() is None:
                tell()
                time.sleep(0.2)
            tell()
        finally:
            other.kill()
        said.seek(0)
        assert other.returncode in (0, 1), f"the second process of the tests ended: {said.read()[-3000:]}"
        lost = {items[0].path.name for items in files} - ran - {name.removesuffix(".json") for name in told}
        assert not lost, f"neither process has run {lost}"
