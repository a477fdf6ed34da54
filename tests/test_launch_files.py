"""The launch files: Kubernetes' and Compose's by their published schemas, the commands in them by a real shell.

No cluster is needed: `accelerate` is here a script that shows its arguments, and Accelerate's own parser reads them.
"""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import kubeflow_trainer_api.models as schemas
import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from launching import ROOT

from lrd import recipe

LAUNCH = ROOT / "launch"
COMPOSE = LAUNCH / "compose.yaml"
MODELS = {
    ("v1", "PersistentVolumeClaim"): schemas.IoK8sApiCoreV1PersistentVolumeClaim,
    ("v1", "Pod"): schemas.IoK8sApiCoreV1Pod,
    ("v1", "Service"): schemas.IoK8sApiCoreV1Service,
    ("batch/v1", "Job"): schemas.IoK8sApiBatchV1Job,
    ("jobset.x-k8s.io/v1alpha2", "JobSet"): schemas.JobsetV1alpha2JobSet,
    ("trainer.kubeflow.org/v1alpha1", "TrainingRuntime"): schemas.TrainerV1alpha1TrainingRuntime,
    ("trainer.kubeflow.org/v1alpha1", "TrainJob"): schemas.TrainerV1alpha1TrainJob,
}
DOCUMENTS = {
    f"{path.stem} {document['kind']}": document
    for path in sorted((LAUNCH / "kubernetes").glob("*.yaml"))
    for document in yaml.safe_load_all(path.read_text())
}
FREE = {"labels", "selector", "requests", "limits"}  # whose keys anybody may name


# Schemas


def unknown(given: Any, understood: Any, path: str = "") -> list[str]:
    """Where a document says what its model does not repeat."""
    if isinstance(given, dict) and isinstance(understood, dict):
        return [
            line
            for key, value in given.items()
            for line in (unknown(value, understood[key], f"{path}.{key}") if key in understood else [f"{path}.{key}"])
        ]
    if isinstance(given, list) and isinstance(understood, list) and len(given) == len(understood):
        pairs = enumerate(zip(given, understood, strict=True))
        return [line for number, pair in pairs for line in unknown(*pair, f"{path}[{number}]")]
    return [] if given == understood else [path]


def faults(document: dict[str, Any]) -> list[str]:
    """What Kubernetes would not take: a missing field or a wrong type raises ValueError, an unknown field is named."""
    model = MODELS[document["apiVersion"], document["kind"]]
    return unknown(document, model.from_dict(document).to_dict())


def keys(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of each key that the schema knows."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield (*path, key)
            if key not in FREE:
                yield from keys(inner, (*path, key))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from keys(inner, (*path, number))


def changed(document: dict[str, Any], path: tuple[Any, ...], change: Callable[[Any, Any], None]) -> dict[str, Any]:
    result = copy.deepcopy(document)
    inner = result
    for key in path[:-1]:
        inner = inner[key]
    change(inner, path[-1])
    return result


def is_refused(document: dict[str, Any]) -> bool:
    try:
        return bool(faults(document))
    except (AttributeError, TypeError, ValueError):
        return True


def misspell(inner: Any, key: str) -> None:
    inner[f"{key}s"] = inner.pop(key)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_kubernetes_knows_every_field(name: str) -> None:
    assert faults(DOCUMENTS[name]) == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_misspelled_field_is_found_wherever_it_is(name: str) -> None:
    document = DOCUMENTS[name]
    paths = [path for path in keys(document) if path not in (("apiVersion",), ("kind",))]  # these choose the model
    assert [path for path in paths if not is_refused(changed(document, path, misspell))] == []


@pytest.mark.parametrize("value", ["two", 2.5, ["2"], {}])
def test_a_wrong_type_is_found(value: Any) -> None:
    job = DOCUMENTS["indexed-job Job"]
    for path in (("spec", "completions"), ("spec", "template", "spec", "containers")):
        assert is_refused(changed(job, path, lambda inner, key: inner.__setitem__(key, value)))


def compose_faults(path: Path) -> str:
    """What the Compose specification's schema does not take."""
    arguments = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(path)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode in (0, 1), done.stderr
    return done.stdout if done.returncode else ""


def test_compose_knows_every_field() -> None:
    assert compose_faults(COMPOSE) == ""


@pytest.mark.parametrize(
    ("right", "wrong"),
    [("restart:", "restarts:"), ("volumes: [runs", "volume: [runs"), ("init: true", "init: [1]")],
)
def test_compose_refuses_what_it_does_not_know(tmp_path: Path, right: str, wrong: str) -> None:
    text = COMPOSE.read_text()
    assert right in text
    (tmp_path / "compose.yaml").write_text(text.replace(right, wrong))
    assert wrong.split(":")[0] in compose_faults(tmp_path / "compose.yaml")


# Commands


@dataclass
class Host:
    """A container that is a host of the run."""

    name: str
    command: list[str]
    environment: dict[str, str]
    grace_seconds: float
    kept: list[str]  # folders that outlive it
    cpus: float | None = None


def kubelet(text: str, environment: dict[str, str]) -> str:
    """What the kubelet makes of `$(NAME)` and `$$` before a shell sees it."""
    return re.sub(r"\$(\$|\((\w+)\))", lambda m: environment.get(m[2], m[0]) if m[2] else "$", text)


def host_of(name: str, spec: dict[str, Any], container: dict[str, Any], injected: dict[str, str]) -> Host:
    claims = {volume["name"] for volume in spec.get("volumes", []) if "persistentVolumeClaim" in volume}
    environment = injected | {each["name"]: each["value"] for each in container.get("env", [])}
    return Host(
        name,
        [kubelet(word, environment) for word in [*container["command"], *container["args"]]],
        environment,
        spec["terminationGracePeriodSeconds"],
        [mount["mountPath"] for mount in container.get("volumeMounts", []) if mount["name"] in claims],
        float(container["resources"]["limits"]["cpu"]),
    )


def job_hosts(job: str, subdomain: str, spec: dict[str, Any]) -> list[Host]:
    assert spec["completions"] == spec["parallelism"]
    assert spec["completionMode"] == "Indexed"
    pod = spec["template"]["spec"]
    return [
        host_of(f"{job}-{index}.{subdomain}", pod, pod["containers"][0], {"JOB_COMPLETION_INDEX": str(index)})
        for index in range(spec["completions"])
    ]


def of_indexed_job() -> list[Host]:
    job, service = DOCUMENTS["indexed-job Job"], DOCUMENTS["indexed-job Service"]
    pod = job["spec"]["template"]["spec"]
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"]
    return job_hosts(job["metadata"]["name"], pod["subdomain"], job["spec"])


def of_jobset() -> list[Host]:
    document = DOCUMENTS["jobset JobSet"]
    name = document["metadata"]["name"]
    return [
        host
        for replicated in document["spec"]["replicatedJobs"]
        for host in job_hosts(f"{name}-{replicated['name']}-0", name, replicated["template"]["spec"])
    ]


def of_trainjob() -> list[Host]:
    job, runtime = DOCUMENTS["trainjob TrainJob"], DOCUMENTS["trainjob TrainingRuntime"]
    assert job["spec"]["runtimeRef"] == {"kind": "TrainingRuntime", "name": runtime["metadata"]["name"]}
    [replicated] = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    assert replicated["name"] == "node"  # Kubeflow Trainer's names for what trains
    pod = replicated["template"]["spec"]["template"]["spec"]
    name, trainer = job["metadata"]["name"], job["spec"]["trainer"]
    [container] = pod["containers"]
    assert container["name"] == "node"
    container = container | trainer | {"resources": trainer["resourcesPerNode"]}
    shared = {
        "PET_NNODES": str(trainer["numNodes"]), "PET_NPROC_PER_NODE": str(trainer["numProcPerNode"]),
        "PET_MASTER_ADDR": f"{name}-node-0-0.{name}", "PET_MASTER_PORT": "29500",
    }  # fmt: skip
    return [
        host_of(f"{name}-node-0-{rank}.{name}", pod, container, shared | {"PET_NODE_RANK": str(rank)})
        for rank in range(trainer["numNodes"])
    ]


def of_compose() -> list[Host]:
    def filled_in(text: str) -> str:  # as Compose does where its own environment has none of the names
        return re.sub(r"\$(\$|\w+|\{\w+:-([^}]*)\})", lambda m: "$" if m[1] == "$" else m[2] or "", text)

    hosts = []
    for name, service in yaml.safe_load(COMPOSE.read_text())["services"].items():
        assert service["restart"].startswith("on-failure:")
        seconds = 60 * float(re.fullmatch(r"(\d+)m", service["stop_grace_period"])[1])
        kept = [volume.split(":")[1] for volume in service.get("volumes", [])]
        command = [filled_in(word) for word in service["command"]]
        hosts.append(Host(name, command, service["environment"], seconds, kept))
    return hosts


def arguments_of(host: Host, folder: Path) -> Any:
    """What `accelerate` is given on this host, as Accelerate reads it; run by the shell that the file names."""
    script = folder / "accelerate"
    script.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    script.chmod(0o755)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", **host.environment}
    done = subprocess.run(host.command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr == ""
    first, *rest = done.stdout.splitlines()
    assert first == "launch"
    return launch_command_parser().parse_args(rest)


hosts_of = pytest.mark.parametrize("hosts_of", [of_compose, of_indexed_job, of_jobset, of_trainjob])


@hosts_of
def test_the_commands_of_all_hosts_are_one_run(hosts_of: Callable[[], list[Host]], tmp_path: Path) -> None:
    hosts = hosts_of()
    asked = [arguments_of(host, tmp_path) for host in hosts]
    assert sorted(each.machine_rank for each in asked) == list(range(len(hosts)))
    assert {each.num_machines for each in asked} == {len(hosts)}
    main = hosts[[each.machine_rank for each in asked].index(0)]
    common = {
        (each.num_processes, each.main_process_ip, each.config_file, each.rdzv_backend, each.module) for each in asked
    }
    programs = {(each.training_script, *each.training_script_args) for each in asked}
    [(ranks, address, config_file, backend, is_module)], [(script, recipe_file, *overrides)] = common, programs
    assert address == main.name
    assert (backend, is_module, script) == ("lrd", True, "lrd.train")
    assert Path(config_file).parent == Path("launch/accelerate")
    load_config_from_file(str(ROOT / config_file))
    assert ranks % len(hosts) == 0
    chosen = recipe.load(ROOT / recipe_file, overrides)
    assert chosen.data.batch_size % ranks == 0
    run_dir = PurePosixPath(workdir(), chosen.run_dir)
    assert any(run_dir.is_relative_to(folder) and str(run_dir) != folder for folder in main.kept)
    for host in hosts:
        if host.cpus is not None:
            assert int(host.environment["OMP_NUM_THREADS"]) * ranks // len(hosts) <= host.cpus


@hosts_of
def test_the_ranks_have_the_time_to_save(hosts_of: Callable[[], list[Host]]) -> None:
    assert all(host.grace_seconds > 30 for host in hosts_of())  # the launcher's own patience with its ranks


@hosts_of
def test_the_launcher_takes_the_shells_place_and_gets_its_signals(hosts_of: Callable[[], list[Host]]) -> None:
    for host in hosts_of():
        assert host.command[:2] == ["bash", "-c"]
        assert host.command[2].startswith("exec accelerate launch ")


def workdir() -> str:
    return re.search(r"^WORKDIR (\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)[1]


def test_volumes_belong_to_the_images_user() -> None:
    user = int(re.search(r"^USER (\d+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)[1])
    groups = re.findall(r"fsGroup: (\d+)", "".join(path.read_text() for path in (LAUNCH / "kubernetes").iterdir()))
    assert len(groups) == 4
    assert {int(group) for group in groups} == {user}


# All launch files

FILES = sorted(LAUNCH.rglob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(LAUNCH)))
def test_a_launch_file_begins_with_when_to_take_it_and_its_command(path: Path) -> None:
    text = path.read_text()
    head = re.match(r"# \w.*\n(#.*\n)+", text)[0]
    assert f"{path.relative_to(ROOT)}" in head
    assert re.search(r"^#   (accelerate|docker|kubectl|GLOO)", head, re.MULTILINE)
    for mentioned in re.findall(r"(?:launch|recipes)/[\w./-]+\.yaml", text):
        assert (ROOT / mentioned).is_file(), mentioned


@pytest.mark.parametrize("path", sorted((LAUNCH / "accelerate").iterdir()), ids=lambda path: path.name)
def test_accelerate_knows_every_key(path: Path, tmp_path: Path) -> None:
    load_config_from_file(str(path))
    typo = tmp_path / path.name
    typo.write_text(path.read_text().replace("num_machines:", "num_machine:"))
    with pytest.raises(ValueError, match="unknown keys"):
        load_config_from_file(str(typo))
