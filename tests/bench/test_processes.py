"""bench/processes.py, with stand-ins for a GPU: the server imports without starting CUDA, and if it has, nobody is forked."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import groups, processes
from bench.measure import Bench
from bench.preload import LIBRARIES

ROOT = Path(__file__).parent.parent.parent

# PyTorch on a machine with one GPU, as far as imports ask. What starts CUDA leaves its name.
GPU = """
import os, sys, torch
started = []
for name in ("_cuda_getDeviceCount", "_cuda_init"):
    setattr(torch._C, name, lambda name=name: started.append(name) or 1)
torch._C._cuda_getCurrentRawStream = None
torch.version.cuda = "13.0"
torch.cuda._device_count_nvml = lambda: 1
torch.cuda._lazy_init = torch._C._cuda_init
"""


def answer(code: str, *args: str, **options) -> str:
    # Another test in this process may have started the server, which sets the variable for good.
    env = {k: v for k, v in os.environ.items() if k != "PYTORCH_NVML_BASED_CUDA_CHECK"}
    options = {"env": env, "cwd": ROOT, "capture_output": True, "text": True, "timeout": 120, **options}
    done = subprocess.run([sys.executable, "-c", code, *args], **options)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("asked", [True, False], ids=["by the driver's library", "as PyTorch does by itself"])
def test_the_server_may_ask_for_a_gpu(asked):
    """The libraries of the bench are there, and ask what they like: CUDA starts only without the variable."""
    code = f"""
if {asked}:
    from bench import processes
    processes.forkserver.ensure_running = lambda: None
    processes.start_server(["bench.preload"])
{GPU}
import bench.preload
assert not {set(LIBRARIES)} - sys.modules.keys()
assert torch.cuda.is_available() and torch.cuda.device_count() == 1
print(*started)
"""
    assert answer(code).split() == ([] if asked else ["_cuda_getDeviceCount"])


def test_a_library_that_starts_cuda_costs_the_forks(tmp_path):
    """Forks then find that they are bad ones: processes start anew, and one line says so. On a CPU forks go on."""
    (tmp_path / "library.py").write_text("import torch\ntorch.cuda._is_in_bad_fork = lambda: True\n")
    (tmp_path / "run.py").write_text("""
from bench.processes import process_context

def look(told):
    import torch
    told.send(torch.cuda._is_in_bad_fork())

if __name__ == "__main__":
    for device in ("cpu", "cuda", "cuda"):
        context = process_context(["library"], device)
        heard, told = context.Pipe(duplex=False)
        context.Process(target=look, args=(told,)).start()
        print(device, context.get_start_method(), heard.recv(), flush=True)
""")
    done = subprocess.run([sys.executable, tmp_path / "run.py"], env={"PYTHONPATH": f"{ROOT}:{tmp_path}"},
                          capture_output=True, text=True, timeout=120)  # fmt: skip
    lines = done.stdout.splitlines()
    assert lines[:1] + lines[2:] == ["cpu forkserver True", "cuda spawn False", "cuda spawn False"], done.stderr[-2000:]
    assert lines[1].startswith("a library has started CUDA")


def writes(b: Bench) -> None:
    b.write(b.record(f"child of {os.getppid()}", ""))


def test_a_run_of_processes_that_start_anew(tmp_path, monkeypatch):
    """The rows are the same."""
    monkeypatch.setattr(groups, "JOBS", {"writes": writes})
    found = []
    for bad in (False, True):
        monkeypatch.setattr(processes, "method", lambda device, bad=bad: "spawn" if bad else "forkserver")
        file = tmp_path / f"{bad}.jsonl"
        assert groups.run(["writes"], "cpu", "smoke", file, 5) == 0
        found.append(groups.read(file)[1:])
    (forked,), (spawned,) = found
    assert spawned == forked | {"what": f"child of {os.getpid()}"} != forked
