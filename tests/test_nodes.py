"""Two hosts train under torchrun, one of them is cut off and comes back: network namespaces joined by a virtual cable.

The namespaces belong to a user namespace of their own, so that no rights of root are needed where users may make one.
"""

import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from test_resume import assert_same

import runs

TIMEOUT = 20  # seconds of --timeout; a first step, with eight processes starting on two cores, has to be ready in them, too
SCRIPT = """
import itertools, os, sys, time
from pathlib import Path
sys.path[:0] = [{root!r}]
import flow
import training
import train_{stage} as script
owner, name = {moment}
calls, function, rank = itertools.count(1), getattr(owner, name), os.environ["RANK"]
def wrapped(*args):  # both ranks stop at the same place of the third step, until the cable has been cut
    if next(calls) == 3:
        Path({folder!r}, "half_" + rank).write_text(str(os.getpid()))
        os.replace(Path({folder!r}, "half_" + rank), Path({folder!r}, "here_" + rank))
        while not Path({folder!r}, "cut").exists():
            time.sleep(0.02)
    return function(*args)
setattr(owner, name, wrapped)
training.run_script(lambda: script.train(training.parse_config(script.{config})))
"""
# The cut falls into the exchange of the statistics, and into that of the gradients.
MOMENTS = {"stage1": "training.Run, 'clip'", "stage2": "flow.FlowLoss, 'forward'"}


class Hosts:
    """Two network namespaces, 10.0.0.1 and 10.0.0.2, and the training on them."""

    def __init__(self, stage: str, parts: Path, folder: Path):
        self.folder, self.agents, self.holders = folder, [], []
        folder.mkdir()
        self.c = runs.config(stage, parts, folder / "run", save_every=1, timeout=TIMEOUT)
        config = type(self.c).__name__
        script = SCRIPT.format(root=str(runs.ROOT), stage=stage, moment=MOMENTS[stage], folder=str(folder), config=config)
        (folder / "script.py").write_text(script)
        try:
            self._hold("unshare", "--user", "--map-root-user", "--net")
            self._hold(*self.on(0), "unshare", "--net")
            peer = ["peer", "name", "cable", "netns", str(self.holders[1].pid)]
            self.ip(0, "link", "add", "cable", "type", "veth", *peer)
            for host in (0, 1):
                self.ip(host, "address", "add", f"10.0.0.{host + 1}/24", "dev", "cable")
                self.ip(host, "link", "set", "lo", "up")
                self.ip(host, "link", "set", "cable", "up")
        except (OSError, subprocess.CalledProcessError) as e:
            self.close()
            pytest.skip(f"no network namespaces: {getattr(e, 'stderr', '') or e}".strip())

    def _hold(self, *command: str) -> None:
        """A process that keeps a namespace."""
        holder = [*command, "sh", "-c", "echo made; exec sleep 600"]
        holder = subprocess.Popen(holder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.holders.append(holder)
        if holder.stdout.readline() != "made\n":
            raise OSError(holder.stderr.read())

    def on(self, host: int) -> list[str]:
        return ["nsenter", "--target", str(self.holders[host].pid), "--user", "--net", "--preserve-credentials"]

    def ip(self, host: int, *arguments: str) -> None:
        subprocess.run([*self.on(host), "ip", *arguments], check=True, capture_output=True, text=True)

    def start(self) -> None:
        """The same command on both hosts, but for the host's own address and whether it is the one that they meet at."""
        for host in (0, 1):
            own = [f"--local-addr=10.0.0.{host + 1}", f"--rdzv-conf=is_host={int(host == 0)}"]
            meet = ["--rdzv-backend=c10d", "--rdzv-endpoint=10.0.0.1:29400", "--rdzv-id=two", *own]
            options = ["--nnodes=2", "--nproc-per-node=1", "--max-restarts=1", *meet, str(self.folder / "script.py")]
            command = [*self.on(host), *runs.torchrun(*options, *runs.flags(self.c))]
            env = {**runs.healing(), "GLOO_SOCKET_IFNAME": "cable"}
            with open(self.folder / f"host_{host}.log", "w") as log:
                self.agents.append(subprocess.Popen(command, stdout=log, stderr=log, env=env))

    def log(self, host: int) -> str:
        return (self.folder / f"host_{host}.log").read_text()

    def wait(self, condition, seconds: float) -> None:
        until = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < until, "\n\n".join(self.log(host)[-3000:] for host in (0, 1))
            time.sleep(0.05)

    def cut(self) -> bool:
        """Whether the cable has been cut, which is done once both ranks are at their place."""
        done = self.folder / "cut"
        if not done.exists() and all((self.folder / f"here_{rank}").exists() for rank in (0, 1)):
            self.ip(1, "link", "set", "cable", "down")
            self.cut_at = time.monotonic()
            done.touch()
        return done.exists()

    def trains(self, rank: int) -> bool:
        """Whether that rank of the first start is still there. What has ended but is not fetched yet has no command line."""
        try:
            return bool(Path("/proc", (self.folder / f"here_{rank}").read_text(), "cmdline").read_bytes())
        except OSError:
            return False

    def close(self) -> None:
        for agent in self.agents:
            agent.terminate()  # it ends its ranks
        for process in (*self.agents, *self.holders):
            try:
                process.wait(0 if process in self.holders else 10)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()


@pytest.mark.skipif(not all(map(shutil.which, ("ip", "unshare", "nsenter"))), reason="needs ip, unshare and nsenter (Linux)")
def test_a_host_that_is_cut_off_ends_in_time_and_goes_on_when_it_is_back(parts, tmp_path):
    """Both stages at the same time, each on two hosts of its own. Nobody starts anything again but torchrun."""
    stages, hosts = ("stage1", "stage2"), []
    try:
        for stage in stages:
            hosts.append(Hosts(stage, parts, tmp_path / stage))
            hosts[-1].start()
        hosts[0].wait(lambda: all([each.cut() for each in hosts]), 180)  # either first: the ranks do not wait for long
        for each in hosts:
            each.wait(lambda each=each: not (each.trains(0) or each.trains(1)), each.cut_at + TIMEOUT + 30 - time.monotonic())
            for rank in (0, 1):
                said = [line for line in each.log(rank).splitlines() if line.startswith("error: ")]
                assert len(said) == 1 and f"error: rank {rank} did not come on for {TIMEOUT} s" in said[0], each.log(rank)
            each.ip(1, "link", "set", "cable", "up")
        for stage in stages:
            runs.run(stage, runs.config(stage, parts, tmp_path / f"{stage}_straight"), tmp_path / "log", 2)
        for stage, each in zip(stages, hosts, strict=True):
            each.wait(lambda each=each: all(agent.poll() is not None for agent in each.agents), 180)
            assert [agent.returncode for agent in each.agents] == [0, 0], each.log(0)[-3000:] + each.log(1)[-3000:]
            assert f"resumed {each.c.out}/step_000002" in each.log(0) + each.log(1)
            assert_same(tmp_path / f"{stage}_straight", Path(each.c.out))
    finally:
        for each in hosts:
            each.close()
