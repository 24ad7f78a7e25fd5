"""From the plan to a JobSet: one pod per node, ended and started together. Pure.

    a pod ends with 2 or 3     a mistake in the configuration, or too little memory: the run fails, nothing is restarted
    it ends with anything else a rank died or was asked to stop (75): all pods are started again, from the newest
                               checkpoint, at most `launcher.max_restarts` times
    it is evicted or lost      the same
    all end with 0             the run is finished

The fields are those of jobset.x-k8s.io/v1alpha2 and batch/v1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from configs.errors import EXIT_BAD_CONFIG
from configs.schema import Config
from configs.schema_cluster import Kubernetes
from trainer.estimate.gate import EXIT_DOES_NOT_FIT
from trainer.plan.plan import Plan

NODE = "node"  # of the JobSet: the pods are NAME-node-0-0, NAME-node-0-1, ...
LONGEST_NAME = 63 - len(f"-{NODE}-0-9999")
INDEX = "JOB_COMPLETION_INDEX"  # Kubernetes sets it in each pod of an indexed job
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
HOPELESS = (EXIT_BAD_CONFIG, EXIT_DOES_NOT_FIT)


def jobset_name(label: str) -> str:
    """A Kubernetes name from a run's name; a service gets it too, and must begin with a letter (RFC 1035)."""
    name = re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")
    name = name if name[:1].isalpha() else f"run-{name}".strip("-")
    return name[:LONGEST_NAME].strip("-")


def jobset(config: Config, plan: Plan, overrides: Sequence[str], *, name: str) -> dict[str, Any]:
    """The manifest. overrides: of the run, as the pods get them. name: from `jobset_name`."""
    options = config.cluster.kubernetes
    metadata: dict[str, Any] = {"name": name, "labels": {"app.kubernetes.io/name": "distributed-training-cookbook"}}
    if options.namespace is not None:
        metadata["namespace"] = options.namespace
    if options.queue is not None:
        metadata["labels"][QUEUE_LABEL] = options.queue
    job = {
        "completionMode": "Indexed",
        "completions": plan.nodes,
        "parallelism": plan.nodes,
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "FailJob",
                    "onExitCodes": {"containerName": NODE, "operator": "In", "values": list(HOPELESS)},
                }
            ]
        },
        "template": {"spec": _pod(options, plan, overrides, address=f"{name}-{NODE}-0-0.{name}")},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True, "subdomain": name},
            "failurePolicy": {
                "maxRestarts": config.launcher.max_restarts,
                "rules": [
                    {
                        "name": "hopeless",
                        "action": "FailJobSet",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                    }
                ],
            },
            "replicatedJobs": [{"name": NODE, "replicas": 1, "template": {"spec": job}}],
        },
    }


def _pod(options: Kubernetes, plan: Plan, overrides: Sequence[str], *, address: str) -> dict[str, Any]:
    meeting = {"MASTER_ADDR": address, "MASTER_PORT": str(options.port)}
    container: dict[str, Any] = {
        "name": NODE,
        "image": options.image,
        "command": ["python", "-m", "launch.kubernetes.node"],
        "args": [_unexpanded(word) for word in overrides],
        "env": [{"name": key, "value": value} for key, value in {**meeting, **options.environment}.items()],
        "ports": [{"containerPort": options.port, "protocol": "TCP"}],
        "resources": _resources(options, plan),
        "volumeMounts": [
            {"name": "runs", "mountPath": options.mount},
            {"name": "shared-memory", "mountPath": "/dev/shm"},
        ],
    }
    if options.secrets:
        container["envFrom"] = [{"secretRef": {"name": name}} for name in options.secrets]
    spec: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": options.grace_seconds,
        "containers": [container],
        "volumes": [
            {"name": "runs", "persistentVolumeClaim": {"claimName": options.volume}},
            {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": options.shared_memory}},
        ],
    }
    if options.service_account is not None:
        spec["serviceAccountName"] = options.service_account
    if options.pod.get(
        "hostNetwork"
    ):  # otherwise the pods ask the node's name server, which does not know the first pod
        spec["dnsPolicy"] = "ClusterFirstWithHostNet"
    return {**spec, **_plain(options.pod)}


def _resources(options: Kubernetes, plan: Plan) -> dict[str, Any]:
    requests: dict[str, Any] = {}
    limits: dict[str, Any] = {}
    if options.cpus is not None:
        requests["cpu"] = str(options.cpus)
    if options.memory is not None:
        requests["memory"] = limits["memory"] = options.memory
    if plan.device == "cuda":
        requests[options.gpu_resource] = limits[options.gpu_resource] = str(plan.gpus_per_node)
    return {name: value for name, value in (("requests", requests), ("limits", limits)) if value}


def _unexpanded(word: str) -> str:
    """Kubernetes expands $(NAME) in arguments, and reduces $$ to $."""
    return re.sub(r"\$+(?=\()|\${2,}", lambda match: match[0] * 2, word)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value
