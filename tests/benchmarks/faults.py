"""A job over shards on a two-node cluster, and SIGKILL at random: of workers, of the second node, of the driver.

    python -m tests.benchmarks.faults [--kills 200] [--seed 0] [--folder DIR]

The job is submitted again whenever its driver is gone. Each time it is finished, the output is compared byte for byte
with that of an undisturbed run, checked for leftovers, and made anew from nothing. Ends with one line of JSON.
"""

import argparse
import collections
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

JOB = ["--attack", "patch(target='banana', size=24)", "--dose", "50%"]
DRIVER, WORKER, NODE = "driver", "worker", "second node"
SHARDS = 40
TASK = b"ray::_guarded"  # Ray's agents bear its name too, and their node ends with them
SIDE = ("run.json", ".lock")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        summary = torment(Path(folder), arguments.kills, arguments.seed)
    print(json.dumps(summary))


def torment(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """Kill until `kills` is reached; returns what was killed and how often the output was whole. Raises on a loss."""
    from tests.benchmarks.rewrite import make

    source, calm, out = folder / "in", folder / "calm", folder / "out"
    source.mkdir()
    make(source, SHARDS, 100)
    rng, done, finished, middle = random.Random(seed), collections.Counter[str](), 0, 0
    with Nodes() as nodes:
        if _driver(source, calm, nodes.address).wait():
            raise SystemExit("the undisturbed run failed")
        expected = _contents(calm)
        while sum(done.values()) < kills:
            driver, began = _driver(source, out, nodes.address), time.time()
            if rng.random() < 0.8:  # the others are hit while they start
                _wait_for_shards(driver, out, began)
            while driver.poll() is None:
                time.sleep(rng.uniform(0.05, 2.0))
                victim = rng.choice((DRIVER, WORKER, WORKER, NODE))
                if driver.poll() is None and sum(done.values()) < kills and nodes.kill(victim, driver.pid, rng):
                    done[victim] += 1
                    there = len(list(out.glob("*.stats.json")))
                    middle += 0 < there < SHARDS
                    print(f"{sum(done.values())}: {victim}; {there} of {SHARDS} shards", file=sys.stderr, flush=True)
            if not nodes.head_lives():
                raise SystemExit("the head node is gone, which nobody killed")
            if driver.returncode == 0:
                _check(expected, _contents(out))
                finished += 1
                subprocess.run(["rm", "-r", str(out)], check=True)
        if _driver(source, out, nodes.address).wait():
            raise SystemExit("the job did not finish once it was left alone")
        _check(expected, _contents(out))
    counts = {"outputs_compared": finished + 1, "files_each": len(expected)}
    return {"kills": sum(done.values()), **done, "in_the_middle": middle, **counts}


class Nodes:
    """A head and a second node, each a raylet of its own with one CPU, on this machine."""

    def __enter__(self) -> "Nodes":
        from ray.cluster_utils import Cluster

        # A killed node refuses connections at once and is dead in three seconds; a slow one is only slow. With the
        # settings that Ray has, a busy machine loses the head node, too.
        health = {
            "health_check_period_ms": 1_000,
            "health_check_timeout_ms": 60_000,
            "health_check_failure_threshold": 3,
        }
        head = {"num_cpus": 1, "include_dashboard": False, "_system_config": health}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.second = self.cluster.add_node(num_cpus=1)
        self.cluster.wait_for_nodes()
        self.address = self.cluster.address
        return self

    def __exit__(self, *_: object) -> None:
        self.cluster.shutdown()

    def head_lives(self) -> bool:
        return bool(self.cluster.head_node.remaining_processes_alive())

    def kill(self, victim: str, driver: int, rng: random.Random) -> bool:
        """SIGKILL one process; a killed node is replaced. False where there is none to kill."""
        if victim == NODE:
            self.cluster.remove_node(self.second, allow_graceful=False)
            self.second = self.cluster.add_node(num_cpus=1)
            return True
        pids = [driver] if victim == DRIVER else self._workers()
        if not pids:
            return False
        try:
            os.kill(rng.choice(pids), signal.SIGKILL)
        except ProcessLookupError:
            return False
        return True

    def _workers(self) -> list[int]:
        """Processes that run a task now, on either node."""
        raylets = {
            info.process.pid
            for node in self.cluster.list_all_nodes()
            for kind, infos in node.all_processes.items()
            if kind == "raylet"
            for info in infos
        }
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
                title = (path / "cmdline").read_bytes()
            except OSError:
                continue
            if parent in raylets and title.startswith(TASK):
                found.append(int(path.name))
        return found


def _wait_for_shards(driver: subprocess.Popen[bytes], out: Path, began: float) -> None:
    """Until the driver has begun with the shards: then it writes what it is about."""
    run = out / "run.json"
    while driver.poll() is None and not (run.exists() and run.stat().st_mtime > began):
        time.sleep(0.05)


def _driver(source: Path, out: Path, address: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "pipeline.poison", str(source), str(out), *JOB]
    return subprocess.Popen(command, env={**os.environ, "RAY_ADDRESS": address}, stderr=subprocess.DEVNULL)


def _contents(folder: Path) -> dict[str, Any]:
    """Every file but the timings of markers."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        if path.name.endswith(".stats.json"):
            marker = json.loads(path.read_text())
            found[path.name] = {k: v for k, v in marker.items() if k not in ("seconds", "finished")}
        elif path.is_file() and path.name not in SIDE:
            found[path.name] = path.read_bytes()
    return found


def _check(expected: dict[str, Any], found: dict[str, Any]) -> None:
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        raise SystemExit(f"not as in the undisturbed run: {', '.join(wrong[:10])}")


if __name__ == "__main__":
    main()
