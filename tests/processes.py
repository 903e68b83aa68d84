"""Scripts in one process or several, as `python` and `torchrun` start them, but without the seconds that each would
import PyTorch for: a server that has imported everything, and done nothing else, forks itself for every launch."""
import atexit
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LIMIT = 240  # seconds of a launch
SERVER = []  # at most one of this process

class Launch:
    """n processes that run a script with its arguments, n > 1 with what torchrun tells its own."""

    def __init__(self, n, *argv, script="train.py", **env):
        if not SERVER:
            command = [sys.executable, os.path.abspath(__file__)]
            env_of = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=ROOT)
            SERVER.append(subprocess.Popen(command, cwd=ROOT, env=env_of, stdin=subprocess.PIPE, text=True))
            atexit.register(SERVER[0].communicate)  # the end of its input is the end of it
        self.folder = tempfile.TemporaryDirectory(prefix="nanoreca-launch-")  # gone with this object
        self.path = os.path.join(self.folder.name, "said")
        job = dict(n=n, script=os.path.join(ROOT, script), argv=[str(arg) for arg in argv], path=self.path, env=env)
        print(json.dumps(job), file=SERVER[0].stdin, flush=True)

    @property
    def pid(self):
        """Of the launcher, whose children the processes are."""
        return int(self.told("pid"))

    def told(self, what):
        end = time.time() + LIMIT + 30
        while not os.path.exists(f"{self.path}.{what}"):
            assert time.time() < end and SERVER[0].poll() is None, "the server of launches hangs or is gone"
            if what == "code" and not alive(self.pid):
                return -signal.SIGKILL
            time.sleep(0.02)
        with open(f"{self.path}.{what}") as f:
            return f.read()

    def poll(self):
        return None if alive(self.pid) else int(self.told("code"))

    def wait(self):
        """-> exit code (that of the first process which failed), and what all of them said."""
        code = int(self.told("code"))
        with open(self.path, errors="replace") as said:
            return code, said.read()

def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False

def alone(*argv, **env):
    """The finished process of a script of its own, which does not start from what others have imported."""
    return subprocess.run([sys.executable, *argv], env=os.environ | env, cwd=ROOT, capture_output=True, text=True)

def torchrun(n, *argv, **more):
    """What a launch says that must succeed."""
    code, said = Launch(n, *argv, **more).wait()
    assert code == 0, said[-3000:]
    return said

def work(job):
    sys.argv, code = [job["script"], *job["argv"]], 1
    signal.alarm(LIMIT)
    try:
        runpy.run_path(job["script"], run_name="__main__")
        code = 0
    except SystemExit as e:
        code = e.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)

def launch(job):
    """In a process of its own. Once a worker fails, the others are asked to end, as torchrun does."""
    tell(job, "pid", os.getpid())
    said = os.open(job["path"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(said, 1), os.dup2(said, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    os.environ.update(job["env"])
    if job["n"] > 1:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port, n = str(free.getsockname()[1]), str(job["n"])
        os.environ.update(WORLD_SIZE=n, LOCAL_WORLD_SIZE=n, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    workers, code = set(), 0
    for rank in range(job["n"]):
        if job["n"] > 1:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
        if (worker := os.fork()) == 0:
            work(job)
        workers.add(worker)
    while workers:
        worker, status = os.wait()
        workers.remove(worker)
        if status and not code:
            code = os.waitstatus_to_exitcode(status)
            for other in workers:
                os.kill(other, signal.SIGTERM)
    tell(job, "code", code)
    os._exit(0)

def tell(job, what, number):
    with open(f"{job['path']}.part", "w") as f:
        f.write(str(number))
    os.rename(f"{job['path']}.part", f"{job['path']}.{what}")

def serve():
    import checkpoint
    import train  # noqa: F401 (and with it PyTorch)
    for arch in checkpoint.architectures():
        checkpoint.model_file(arch)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # pytest ends, and with it the input
    for line in sys.stdin:
        if os.fork() == 0:
            sys.stdin.close()
            launch(json.loads(line))
    try:
        while True:
            os.wait()
    except ChildProcessError:  # none is left
        pass

if __name__ == "__main__":
    serve()
