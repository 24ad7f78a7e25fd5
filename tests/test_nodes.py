"""Several nodes without SLURM: the lines that `python -m launch` prints run on two hosts.

A host is a network namespace with its own address and ports. A cable connects it to the other host only.
"""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.__main__ import main
from tests.support.warm import programs

ROOT = Path(__file__).parent.parent
HOSTS = {"cookbook-a": "10.213.7.1", "cookbook-b": "10.213.7.2"}
RUN = ["model=tiny", "model.config.hidden_size=64", "model.config.intermediate_size=96", "data=synthetic"]
RUN += ["data.seq_len=32", "train.steps=3", "train.global_batch_size=8", "train.export=false", "checkpoint.final=false"]
RUN += ["cluster.nodes=2", "cluster.gpus_per_node=2", "cluster.device=cpu"]


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"network namespaces cannot be made here: {done.stderr.strip()}")


def remove_hosts() -> None:
    for host in HOSTS:
        subprocess.run(["ip", "netns", "delete", host], capture_output=True)


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[str]]:
    """Creates two hosts with a cable between them and yields their names."""
    remove_hosts()
    try:
        names = list(HOSTS)
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        for name, address in HOSTS.items():
            ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        remove_hosts()


def printed_lines(words: list[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert main(words) == 0
    out = capsys.readouterr().out
    _, found, rest = out.partition("Run one line on each node, with the address of the first for NODE_0")
    assert found, out
    return rest.strip().splitlines()[1:]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("layout", ["launcher=torchrun parallel=fsdp", "launcher=deepspeed parallel=zero2"])
def test_the_printed_lines_train_on_two_hosts(
    layout: str, hosts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    lines = printed_lines([*RUN, *layout.split(), f"train.run_dir={run_dir}"], capsys)
    assert len(lines) == len(hosts)
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("".join(f"{address} slots=2\n" for address in HOSTS.values()))
    # GLOO_SOCKET_IFNAME replaces a real host's DNS name. Otherwise ranks would announce the loopback address.
    environment = programs().environment(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="cable")
    running = []
    for host, line in zip(hosts, lines, strict=True):
        filled = line.replace("NODE_0", HOSTS[hosts[0]]).replace("HOSTFILE", shlex.quote(str(hostfile)))
        command = ["ip", "netns", "exec", host, "bash", "-c", filled]
        running.append(
            subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    outputs = [each.communicate(timeout=240)[0] for each in running]
    assert [each.returncode for each in running] == [0, 0], "\n".join(outputs)
    rows = [json.loads(row) for row in (run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["kind"] == "step"]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    assert json.loads((run_dir / "status.json").read_text())["state"] == "finished"
