"""`cluster=kubernetes`: the manifest fits the published API models, bad settings are refused, and pods may die.

The test machine has no Kubernetes. A fake kubectl gives prepared answers. The pods' processes are real; the tests read
from the manifest how the controller would react to their exit codes.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

from configs.errors import EXIT_BAD_CONFIG, EXIT_FINISHED, EXIT_STOPPED
from launch.__main__ import main
from launch.kubernetes.manifest import INDEX, LONGEST_NAME, jobset_name
from launch.kubernetes.node import main as node
from slurm.supervise import free_port
from trainer.checkpoint.catalog import CHECKPOINTS, step_name

WORDS = [
    "cluster=kubernetes",
    "cluster.nodes=2",
    "cluster.gpus_per_node=8",
    "parallel=fsdp",
    "cluster.kubernetes.image=registry.example.com/cookbook:1",
    "cluster.kubernetes.volume=runs",
]
KUBECTL = """#!/usr/bin/env python3
import json, os, sys
said = json.load(open(os.environ["KUBECTL_ANSWERS"]))
with open(os.environ["KUBECTL_ANSWERS"] + ".log", "a") as log:
    log.write(json.dumps([sys.argv[1:], sys.stdin.read() if "-f" in sys.argv else ""]) + "\\n")
code, out, err = next((answer for words, answer in said if all(word in sys.argv for word in words)), (0, "", ""))
print(out)
print(err, file=sys.stderr)
sys.exit(code)
"""
# The error output of kubectl 1.32.
UNREACHED = """E1129 01:48:25.910731 1 memcache.go:265] "Unhandled Error" err="couldn't get current server API"
Warning: the server doesn't have a resource type 'jobsets' in group 'jobset.x-k8s.io'

The connection to the server 10.0.0.1:6443 was refused"""
ALLOWED = [["can-i"], [0, "yes", ""]]
SHARED = [["get"], [0, json.dumps({"spec": {"accessModes": ["ReadWriteMany"]}}), ""]]


def manifest(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main([*WORDS, "dry_run=true", *words]) == 0
    return yaml.safe_load(capsys.readouterr().out)


def pod(made: dict[str, Any]) -> dict[str, Any]:
    return made["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


@pytest.mark.parametrize(
    "words",
    [
        [],
        [
            "cluster.kubernetes.namespace=ml",
            "cluster.kubernetes.queue=research",
            "cluster.kubernetes.cpus=96",
            "cluster.kubernetes.memory=512Gi",
            "cluster.kubernetes.secrets=[hub, tracker]",
            "cluster.kubernetes.service_account=trainer",
            "cluster.kubernetes.environment={NCCL_DEBUG: INFO}",
            "cluster.kubernetes.pod={nodeSelector: {gpu: h100}, hostNetwork: true,"
            " tolerations: [{key: gpu, operator: Exists}]}",
        ],
        ["cluster.device=cpu", "cluster.gpus_per_node=2", "launcher.max_restarts=0"],
    ],
)
def test_the_api_knows_every_field(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    made = manifest(capsys, *words)
    read = JobsetV1alpha2JobSet.from_dict(made)
    assert read is not None
    # Fields that the models do not know are lost in this round trip.
    assert json.loads(json.dumps(read.to_dict(), default=lambda value: value.to_dict())) == made


def test_a_pod_for_each_node(capsys: pytest.CaptureFixture[str]) -> None:
    made = manifest(capsys, "train.run_dir=/runs/8B.test", "train.seed=7")
    job = made["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (job["completions"], job["parallelism"], job["backoffLimit"]) == (2, 2, 0)
    container = pod(made)["containers"][0]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "8"}
    assert container["env"][0] == {"name": "MASTER_ADDR", "value": "run-8b-test-node-0-0.run-8b-test"}
    assert container["args"] == [*WORDS, "train.run_dir=/runs/8B.test", "train.seed=7"]
    assert pod(made)["volumes"][1]["emptyDir"] == {"medium": "Memory", "sizeLimit": "16Gi"}
    assert pod(made)["terminationGracePeriodSeconds"] == 180
    assert made["spec"]["failurePolicy"]["maxRestarts"] == 3


def test_names() -> None:
    assert jobset_name("Llama_3.1-8B") == "llama-3-1-8b"
    assert jobset_name("8b") == "run-8b"
    assert jobset_name("_") == "run"
    assert len(jobset_name("x" * 300)) == LONGEST_NAME


def test_everything_that_is_wrong_is_said_at_once(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = [
        "cluster=kubernetes",
        "cluster.kubernetes.shared_memory=lots",
        "cluster.kubernetes.memory=0Gi",
        "cluster.kubernetes.queue=Research",
        "cluster.kubernetes.secrets=[a_b]",
        "launcher=deepspeed",
        "launcher.master_port=2000",
        "train.run_dir=/runs/../x",
        "train.resume=never",
        "cluster.kubernetes.gpu_resource='a b'",
        "cluster.kubernetes.pod={containers: [], restartPolicy: Always}",
        "cluster.kubernetes.environment={MASTER_PORT: '1', WORLD_SIZE: '2', JOB_COMPLETION_INDEX: '0', a-b: c}",
    ]
    assert main([*words, "--config-dir", str(tmp_path)]) == EXIT_BAD_CONFIG
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "cluster.kubernetes.image=null",
        "cluster.kubernetes.volume=null",
        "cluster.kubernetes.queue=Research",
        "cluster.kubernetes.secrets=[a_b]",
        "cluster.kubernetes.memory=0Gi",
        "cluster.kubernetes.shared_memory=lots",
        "cluster.kubernetes.gpu_resource=a b",
        "cluster.kubernetes.pod={containers",
        "cluster.kubernetes.pod={restartPolicy",
        *[f"cluster.kubernetes.environment={{{name}" for name in ("MASTER_PORT", "WORLD_SIZE", INDEX, "a-b")],
        "train.run_dir=/runs/../x",
        "cluster.gpus_per_node=null",
        "launcher.name=deepspeed",
        "launcher.master_port=2000",
        "train.resume=never",
        f"--config-dir {tmp_path}",
    ]
    assert main(["compare", *WORDS, "train.seed=1,2"]) == EXIT_BAD_CONFIG
    assert capsys.readouterr().err.startswith("cluster.kind=kubernetes: compare runs one point after another on this")


@pytest.mark.parametrize(
    ("answers", "problem"),
    [
        (
            [[["can-i"], [1, "no", ""]]],
            "cluster.kubernetes.namespace=ml: you may not create jobsets.jobset.x-k8s.io there; ask for that right, or"
            " name another namespace",
        ),
        (
            [[["can-i"], [0, "yes", "Warning: the server doesn't have a resource type 'jobsets'"]]],
            "cluster=kubernetes: this cluster does not know jobsets.jobset.x-k8s.io; install JobSet"
            " (https://jobset.sigs.k8s.io/docs/installation)",
        ),
        (
            [[["can-i"], [1, "", UNREACHED]]],
            "cluster=kubernetes: kubectl does not reach the cluster: The connection to the server 10.0.0.1:6443 was"
            " refused; name one of `kubectl config get-contexts` by cluster.kubernetes.context, or print the manifest"
            " with dry_run=true",
        ),
        (
            [ALLOWED, [["get"], [1, "", 'Error from server (NotFound): persistentvolumeclaims "runs" not found']]],
            'cluster.kubernetes.volume=runs: (NotFound): persistentvolumeclaims "runs" not found; create a'
            " PersistentVolumeClaim of that name, or name another",
        ),
        (
            [ALLOWED, [["get"], [0, json.dumps({"spec": {"accessModes": ["ReadWriteOnce"]}}), ""]]],
            "cluster.kubernetes.volume=runs: is ReadWriteOnce, and 2 nodes write to the run folder; name one that is"
            " ReadWriteMany",
        ),
        (
            [ALLOWED, SHARED, [["--dry-run=server"], [1, "", 'error: unable to recognize "STDIN"']]],
            'kubectl create: unable to recognize "STDIN"',
        ),
        (
            [
                ALLOWED,
                SHARED,
                [["--dry-run=server"], [1, "", 'Error from server (AlreadyExists): jobsets "a" already exists']],
            ],
            'kubectl create: (AlreadyExists): jobsets "a" already exists; if that run is through, delete it, and submit'
            " again: kubectl --context lab --namespace ml delete jobset a",
        ),
        ([ALLOWED, SHARED], None),
    ],
)
def test_the_cluster_is_asked_first(
    answers: list[Any],
    problem: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    program, said = tmp_path / "kubectl", tmp_path / "answers"
    program.write_text(KUBECTL)
    program.chmod(0o755)
    said.write_text(json.dumps(answers))
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("KUBECTL_ANSWERS", str(said))
    folder = ["train.run_dir=/runs/a"] if problem is not None else []
    code = main([*WORDS, "cluster.kubernetes.namespace=ml", "cluster.kubernetes.context=lab", *folder])
    shown = capsys.readouterr()
    asked = [json.loads(line) for line in Path(f"{said}.log").read_text().splitlines()]
    assert all(words[:4] == ["--context", "lab", "--namespace", "ml"] for words, _ in asked)
    created = [given for words, given in asked if words[4:] == ["create", "-f", "-"]]
    if problem is not None:
        assert (code, shown.err.splitlines(), created) == (EXIT_BAD_CONFIG, [problem], [])
        return
    assert code == EXIT_FINISHED
    name = yaml.safe_load(created[0])["metadata"]["name"]
    assert f"submitted  JobSet {name}\n" in shown.out
    assert f"follow     kubectl -n ml logs -f job/{name}-node-0\n" in shown.out


def test_a_kind_of_cluster_reads_its_own_section_alone(capsys: pytest.CaptureFixture[str]) -> None:
    wrong = ["cluster.slurm.time=1", "cluster.slurm.array=%4"]
    assert main([*WORDS, *wrong, "dry_run=true"]) == EXIT_BAD_CONFIG
    assert capsys.readouterr().err.splitlines() == [
        f"{word}: is read with cluster.kind=slurm alone, and this is cluster.kind=kubernetes; set that kind, or leave"
        " it out"
        for word in wrong
    ]
    assert main(["parallel=single", "cluster.kubernetes.volume=runs", "dry_run=true"]) == EXIT_BAD_CONFIG
    assert capsys.readouterr().err.startswith("cluster.kubernetes.volume=runs: is read with cluster.kind=kubernetes")


def test_without_kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(WORDS) == EXIT_BAD_CONFIG
    assert capsys.readouterr().err.startswith("cluster=kubernetes: kubectl is not on the PATH; install it, or print ")


def test_points_of_a_sweep_are_jobsets_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-m", *WORDS, "dry_run=true", "train.seed=1,2"]) == 0
    shown = capsys.readouterr().out
    # The whole output is one file for kubectl.
    assert len({made["metadata"]["name"] for made in yaml.safe_load_all(shown)}) == 2
    assert shown.endswith("# == 2 of 2 runs planned, none started\n")
    folders = "train.run_dir=/runs/a/x,/runs/b/x"
    assert main(["-m", *WORDS, "dry_run=true", folders]) == 0
    found = [made["metadata"]["name"] for made in yaml.safe_load_all(capsys.readouterr().out)]
    assert found == ["a-x", "b-x"]


def test_the_folder_is_settled_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Each pod has its own clock and environment, so the run folder is resolved before submission."""
    monkeypatch.setenv("MY_RUNS", "/runs/mine")
    args = pod(manifest(capsys, "train.run_dir=${oc.env:MY_RUNS}/${now:%Y}"))["containers"][0]["args"]
    assert re.fullmatch(r"train\.run_dir=/runs/mine/\d{4}", args[-1])


def test_what_kubernetes_would_expand_arrives_as_typed(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["logging.run_name='$(HOME) $$(HOME) $$ $x a$'", 'logging.project="it\'s, [this]: 1"']
    args = pod(manifest(capsys, *words))["containers"][0]["args"]
    assert [expanded(word) for word in args[len(WORDS) : -1]] == words


def expanded(word: str) -> str:
    """Expands an argument like Kubernetes does if no variable is set.

    Reference: k8s.io/kubernetes/third_party/forked/golang/expansion.
    """
    return re.sub(r"\$(\$|\((.*?)\))", lambda match: "$" if match[1] == "$" else f"<{match[2]}>", word)


def test_pods_in_the_network_of_the_node_find_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    made = pod(manifest(capsys, "cluster.kubernetes.pod={hostNetwork: true}"))
    assert made["dnsPolicy"] == "ClusterFirstWithHostNet"


def test_a_pod_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("JOB_COMPLETION_INDEX", raising=False)
    assert node([*WORDS, "train.run_dir=/runs/a"]) == EXIT_BAD_CONFIG
    assert capsys.readouterr().err.startswith("JOB_COMPLETION_INDEX, MASTER_ADDR, MASTER_PORT: not set; a pod of a")


# The following tests run two pods on this machine.
STEPS = 8
RUN = (
    *("cluster=kubernetes", "cluster.device=cpu", "cluster.nodes=2", "cluster.gpus_per_node=1", "parallel=ddp"),
    *("cluster.kubernetes.image=a", "cluster.kubernetes.volume=b", "data=synthetic", "data.seq_len=32"),
    *(f"train.steps={STEPS}", "train.eval_every=0", "train.export=false", "checkpoint.every=2"),
    *("launcher.preflight=false", "logging.progress=off"),
)


def pods(words: list[str]) -> list[subprocess.Popen[bytes]]:
    port = str(free_port())
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "launch.kubernetes.node", *words],
            env={**os.environ, **world, "JOB_COMPLETION_INDEX": str(index)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for index in range(2)
    ]


def controlled(made: dict[str, Any], words: list[str], disturb: Any) -> tuple[str, list[list[int]]]:
    """Acts like the Job and JobSet controllers with this manifest.

    disturb: callback that gets the processes of the first start.
    Returns the end of the run and the exit codes of each start.
    """
    job, policy = made["spec"]["replicatedJobs"][0]["template"]["spec"], made["spec"]["failurePolicy"]
    hopeless = job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"]
    assert policy["rules"][0]["action"] == "FailJobSet" and job["backoffLimit"] == 0
    starts: list[list[int]] = []
    while len(starts) <= policy["maxRestarts"]:
        running = pods(words)
        if not starts:
            disturb(running)
        codes: list[int] = []
        for process in running:  # the first failed pod fails the job; the others get SIGTERM
            codes.append(process.wait(timeout=300))
            if codes[-1]:
                for other in running:
                    if other.poll() is None:
                        other.send_signal(signal.SIGTERM)
        starts.append(codes)
        if not any(codes):
            return "completed", starts
        if set(codes) & set(hopeless):
            return "failed", starts
    return "failed", starts


@pytest.mark.nightly
@pytest.mark.parametrize("what", ["evicted", "killed", "hopeless"])
def test_pods_that_end(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*RUN, f"train.run_dir={tmp_path}/run", f"cluster.kubernetes.mount={tmp_path}"]
    assert main([*words, "dry_run=true"]) == 0
    made = yaml.safe_load(capsys.readouterr().out)

    def disturb(running: list[subprocess.Popen[bytes]]) -> None:
        if what == "hopeless":
            return
        deadline = time.monotonic() + 200
        while not (tmp_path / "run" / CHECKPOINTS / step_name(2)).exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        running[1].send_signal(signal.SIGTERM if what == "evicted" else signal.SIGKILL)

    end, starts = controlled(made, [*words, "train.stepz=1"] if what == "hopeless" else words, disturb)
    if what == "hopeless":
        assert end == "failed" and len(starts) == 1 and starts[0][0] == EXIT_BAD_CONFIG, starts
        return
    assert end == "completed" and len(starts) == 2, starts
    if what == "evicted":
        assert starts[0] == [EXIT_STOPPED] * 2
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if line["kind"] == "step"] == list(range(1, STEPS + 1))
