"""What holds for all tests, and the processes that some of them wait for."""
import concurrent.futures
import os
import subprocess

import pytest

from custom_kernels.products import use_products

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
POOL, STARTED = concurrent.futures.ThreadPoolExecutor(1), {}

@pytest.fixture(autouse=True)
def plain_products():
    """Before each test PyTorch multiplies as it does by itself, whatever a run in this process chose."""
    use_products("mkl")

def pytest_collection_finish(session):
    """Tests that only wait for another process find it in EARLY of their file: {test: (command, environment)}. These
    run one after the other from the start, on the second core, which most tests leave idle."""
    for item in session.items if not session.config.option.collectonly else ():
        if "early" in item.fixturenames:
            command, more = item.module.EARLY[item.name]
            STARTED[item.name] = POOL.submit(subprocess.run, command, env=os.environ | more, cwd=ROOT,
                                             capture_output=True, text=True)

@pytest.fixture
def early(request):
    """The finished process of this test."""
    return STARTED[request.node.name].result()
