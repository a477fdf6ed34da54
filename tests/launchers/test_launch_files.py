"""The launch files: the fields that their schemas know, and the commands in them.

No cluster is needed. Kubernetes' and Compose's files are checked against the published schemas. A
shell runs the commands: a script that prints its arguments takes the place of `accelerate`, and
Accelerate's own parser reads them.
"""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import kubeflow_trainer_api.models as schemas
import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

from lrd import recipe as recipes
from tests.helpers.launching import ROOT

LAUNCH = ROOT / "launch"
COMPOSE = LAUNCH / "compose.yaml"
DOCKERFILE = ROOT / "Dockerfile"
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
FREE_MAPPINGS = {"labels", "selector", "requests", "limits"}  # their keys are the user's choice


# Schemas


def find_ignored(document: Any, parsed: Any, path: str = "") -> list[str]:
    """Return the paths in a document whose value its model lost when it parsed the document."""
    if isinstance(document, dict) and isinstance(parsed, dict):
        paths = []
        for key, value in document.items():
            if key in parsed:
                paths += find_ignored(value, parsed[key], f"{path}.{key}")
            else:
                paths.append(f"{path}.{key}")
        return paths

    if isinstance(document, list) and isinstance(parsed, list) and len(document) == len(parsed):
        paths = []
        for index, (item, parsed_item) in enumerate(zip(document, parsed, strict=True)):
            paths += find_ignored(item, parsed_item, f"{path}[{index}]")
        return paths

    return [] if document == parsed else [path]


def find_unknown_fields(document: dict[str, Any]) -> list[str]:
    """Return the fields that Kubernetes does not know.

    Raises:
        ValueError: a field is missing or has a wrong type.
    """
    model = MODELS[document["apiVersion"], document["kind"]]
    return find_ignored(document, model.from_dict(document).to_dict())


def is_refused(document: dict[str, Any]) -> bool:
    try:
        return bool(find_unknown_fields(document))
    except (AttributeError, TypeError, ValueError):
        return True


def iterate_paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of each key that the schema names."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield (*path, key)
            if key not in FREE_MAPPINGS:
                yield from iterate_paths(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from iterate_paths(inner, (*path, index))


def changed(
    document: dict[str, Any], path: tuple[Any, ...], change: Callable[[Any, Any], None]
) -> dict[str, Any]:
    """Return a copy with one change.

    Args:
        path: of a key.
        change: gets the mapping or list that has the key, and the key.
    """
    result = copy.deepcopy(document)
    container = result
    for key in path[:-1]:
        container = container[key]
    change(container, path[-1])
    return result


def misspell(mapping: dict[str, Any], key: str) -> None:
    mapping[f"{key}s"] = mapping.pop(key)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_kubernetes_knows_every_field(name: str) -> None:
    assert find_unknown_fields(DOCUMENTS[name]) == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_misspelled_field_is_found_wherever_it_is(name: str) -> None:
    document = DOCUMENTS[name]
    choose_the_model = [("apiVersion",), ("kind",)]
    paths = [path for path in iterate_paths(document) if path not in choose_the_model]
    assert [path for path in paths if not is_refused(changed(document, path, misspell))] == []


@pytest.mark.parametrize("value", ["two", 2.5, ["2"], {}])
def test_a_wrong_type_is_found(value: Any) -> None:
    def set_value(mapping: dict[str, Any], key: str) -> None:
        mapping[key] = value

    job = DOCUMENTS["indexed-job Job"]
    for path in (("spec", "completions"), ("spec", "template", "spec", "containers")):
        assert is_refused(changed(job, path, set_value))


def check_compose_file(path: Path) -> str:
    """Return what the Compose specification's schema refuses."""
    schema = ["--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run(
        [sys.executable, "-m", "check_jsonschema", *schema, str(path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode in (0, 1), done.stderr
    return done.stdout if done.returncode else ""


def test_compose_knows_every_field() -> None:
    assert check_compose_file(COMPOSE) == ""


@pytest.mark.parametrize(
    ("right", "wrong"),
    [("restart:", "restarts:"), ("volumes: [runs", "volume: [runs"), ("init: true", "init: [1]")],
)
def test_compose_refuses_unknown_fields_and_wrong_types(
    tmp_path: Path, right: str, wrong: str
) -> None:
    text = COMPOSE.read_text()
    assert right in text

    path = tmp_path / "compose.yaml"
    path.write_text(text.replace(right, wrong))
    key = wrong.split(":")[0]
    assert key in check_compose_file(path)


# Commands


@dataclass
class Host:
    """A container that is a host of the run.

    Attributes:
        name: its address, for the other hosts.
        grace_seconds: between the signal to stop and the kill.
        persistent_folders: these outlive the container.
        cpus: its limit; None if there is none.
    """

    name: str
    command: list[str]
    environment: dict[str, str]
    grace_seconds: float
    persistent_folders: list[str]
    cpus: float | None = None


def expand_like_kubelet(text: str, environment: dict[str, str]) -> str:
    """Replace `$(NAME)` and `$$`, as the kubelet does before a shell sees the text."""

    def replacement(match: re.Match[str]) -> str:
        name = match[2]
        return environment.get(name, match[0]) if name else "$"

    return re.sub(r"\$(\$|\((\w+)\))", replacement, text)


def make_host(
    name: str,
    pod_spec: dict[str, Any],
    container: dict[str, Any],
    injected_environment: dict[str, str],
) -> Host:
    """Make the host that a container of Kubernetes is."""
    claims = {
        volume["name"]
        for volume in pod_spec.get("volumes", [])
        if "persistentVolumeClaim" in volume
    }
    persistent_folders = [
        mount["mountPath"] for mount in container.get("volumeMounts", []) if mount["name"] in claims
    ]
    variables = {
        variable["name"]: variable["value"]
        for variable in container.get("env", [])
        if "value" in variable
    }
    (token,) = [entry for entry in container["env"] if entry["name"] == "LRD_JOB_TOKEN"]
    assert token["valueFrom"]["secretKeyRef"]["name"] == "lrd-job-token"
    environment = injected_environment | variables
    words = [*container["command"], *container["args"]]
    return Host(
        name=name,
        command=[expand_like_kubelet(word, environment) for word in words],
        environment=environment,
        grace_seconds=pod_spec["terminationGracePeriodSeconds"],
        persistent_folders=persistent_folders,
        cpus=float(container["resources"]["limits"]["cpu"]),
    )


def make_hosts_of_job(job: str, subdomain: str, spec: dict[str, Any]) -> list[Host]:
    """Make the hosts of an indexed job, one for each index."""
    assert spec["completions"] == spec["parallelism"]
    assert spec["completionMode"] == "Indexed"
    pod_spec = spec["template"]["spec"]
    container = pod_spec["containers"][0]

    hosts = []
    for index in range(spec["completions"]):
        name = f"{job}-{index}.{subdomain}"
        injected_environment = {"JOB_COMPLETION_INDEX": str(index)}
        hosts.append(make_host(name, pod_spec, container, injected_environment))
    return hosts


def hosts_of_indexed_job() -> list[Host]:
    job = DOCUMENTS["indexed-job Job"]
    service = DOCUMENTS["indexed-job Service"]
    job_name = job["metadata"]["name"]
    pod_spec = job["spec"]["template"]["spec"]

    assert pod_spec["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": job_name}
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"]
    return make_hosts_of_job(job_name, pod_spec["subdomain"], job["spec"])


def hosts_of_jobset() -> list[Host]:
    document = DOCUMENTS["jobset JobSet"]
    name = document["metadata"]["name"]

    hosts = []
    for replicated_job in document["spec"]["replicatedJobs"]:
        job_name = f"{name}-{replicated_job['name']}-0"
        hosts += make_hosts_of_job(job_name, name, replicated_job["template"]["spec"])
    return hosts


def hosts_of_trainjob() -> list[Host]:
    job = DOCUMENTS["trainjob TrainJob"]
    runtime = DOCUMENTS["trainjob TrainingRuntime"]
    name = job["metadata"]["name"]
    trainer = job["spec"]["trainer"]
    assert job["spec"]["runtimeRef"] == {
        "kind": "TrainingRuntime",
        "name": runtime["metadata"]["name"],
    }

    # `node` is Kubeflow Trainer's name for the job and the container that train.
    (replicated_job,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    assert replicated_job["name"] == "node"
    pod_spec = replicated_job["template"]["spec"]["template"]["spec"]
    (container,) = pod_spec["containers"]
    assert container["name"] == "node"
    container = container | trainer | {"resources": trainer["resourcesPerNode"]}

    hosts = []
    for rank in range(trainer["numNodes"]):
        injected_environment = {
            "PET_NNODES": str(trainer["numNodes"]),
            "PET_NPROC_PER_NODE": str(trainer["numProcPerNode"]),
            "PET_MASTER_ADDR": f"{name}-node-0-0.{name}",
            "PET_MASTER_PORT": "29500",
            "PET_NODE_RANK": str(rank),
        }
        host_name = f"{name}-node-0-{rank}.{name}"
        hosts.append(make_host(host_name, pod_spec, container, injected_environment))
    return hosts


def expand_like_compose(text: str) -> str:
    """Replace `$NAME`, `${NAME:-default}` and `$$`, as Compose does in an empty environment."""

    def replacement(match: re.Match[str]) -> str:
        default = match[2]
        return "$" if match[1] == "$" else default or ""

    return re.sub(r"\$(\$|\w+|\{\w+:-([^}]*)\})", replacement, text)


def hosts_of_compose() -> list[Host]:
    hosts = []
    for name, service in yaml.safe_load(COMPOSE.read_text())["services"].items():
        assert service["restart"].startswith("on-failure:")
        minutes = float(re.fullmatch(r"(\d+)m", service["stop_grace_period"])[1])
        host = Host(
            name=name,
            command=[expand_like_compose(word) for word in service["command"]],
            environment=service["environment"],
            grace_seconds=60 * minutes,
            persistent_folders=[volume.split(":")[1] for volume in service.get("volumes", [])],
        )
        hosts.append(host)
    return hosts


def launch_arguments(host: Host, folder: Path) -> Namespace:
    """Run a host's command, by the shell that its file names, with a script as `accelerate`.

    Returns:
        The arguments of `accelerate launch`, as Accelerate reads them.
    """
    script = folder / "accelerate"
    script.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    script.chmod(0o755)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", **host.environment}
    done = subprocess.run(
        host.command, env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stderr == ""

    subcommand, *arguments = done.stdout.splitlines()
    assert subcommand == "launch"
    return launch_command_parser().parse_args(arguments)


def workdir_of_image() -> str:
    return re.search(r"^WORKDIR (\S+)$", DOCKERFILE.read_text(), re.MULTILINE)[1]


for_all_launch_files = pytest.mark.parametrize(
    "make_hosts", [hosts_of_compose, hosts_of_indexed_job, hosts_of_jobset, hosts_of_trainjob]
)


@for_all_launch_files
def test_the_commands_of_all_hosts_form_one_run(
    make_hosts: Callable[[], list[Host]], tmp_path: Path
) -> None:
    hosts = make_hosts()
    arguments = [launch_arguments(host, tmp_path) for host in hosts]

    # The hosts differ in their rank alone.
    machine_ranks = [host_arguments.machine_rank for host_arguments in arguments]
    assert sorted(machine_ranks) == list(range(len(hosts)))
    main_host = hosts[machine_ranks.index(0)]
    for host_arguments in arguments:
        del host_arguments.machine_rank
    common = arguments[0]
    assert all(host_arguments == common for host_arguments in arguments)

    # The launcher's arguments.
    ranks = common.num_processes
    assert common.num_machines == len(hosts)
    assert ranks % len(hosts) == 0
    assert common.main_process_ip == main_host.name
    assert common.rdzv_backend == "lrd"
    assert Path(common.config_file).parent == Path("launch/accelerate")
    load_config_from_file(str(ROOT / common.config_file))

    # What each rank runs.
    assert common.module
    assert common.training_script == "lrd.train"
    recipe_file, *overrides = common.training_script_args
    recipe = recipes.load(ROOT / recipe_file, overrides)
    assert recipe.data.batch_size % ranks == 0

    # The run directory is in a folder of the main host that outlives its container.
    run_dir = PurePosixPath(workdir_of_image(), recipe.run_dir)
    assert any(
        run_dir.is_relative_to(folder) and str(run_dir) != folder
        for folder in main_host.persistent_folders
    )

    for host in hosts:
        if host.cpus is not None:
            threads = int(host.environment["OMP_NUM_THREADS"]) * ranks // len(hosts)
            assert threads <= host.cpus


@for_all_launch_files
def test_the_ranks_have_time_to_save(make_hosts: Callable[[], list[Host]]) -> None:
    # The launcher kills ranks that have not ended after 30 s.
    assert all(host.grace_seconds > 30 for host in make_hosts())


@for_all_launch_files
def test_the_launcher_replaces_the_shell_and_gets_its_signals(
    make_hosts: Callable[[], list[Host]],
) -> None:
    for host in make_hosts():
        assert host.command[:2] == ["bash", "-c"]
        assert host.command[2].startswith("exec accelerate launch ")


def test_volumes_belong_to_the_images_user() -> None:
    user = re.search(r"^USER (\d+)$", DOCKERFILE.read_text(), re.MULTILINE)[1]
    text = "".join(path.read_text() for path in (LAUNCH / "kubernetes").iterdir())
    groups = re.findall(r"fsGroup: (\d+)", text)
    assert [int(group) for group in groups] == [int(user)] * 4


# All launch files


@pytest.mark.parametrize(
    "path", sorted(LAUNCH.rglob("*.yaml")), ids=lambda path: str(path.relative_to(LAUNCH))
)
def test_a_launch_file_begins_with_its_purpose_and_its_command(path: Path) -> None:
    text = path.read_text()
    head = re.match(r"# \w.*\n(#.*\n)+", text)[0]
    assert f"{path.relative_to(ROOT)}" in head
    assert re.search(r"^#   (accelerate|docker|kubectl|GLOO)", head, re.MULTILINE)
    for mentioned_file in re.findall(r"(?:launch|recipes)/[\w./-]+\.yaml", text):
        assert (ROOT / mentioned_file).is_file(), mentioned_file


@pytest.mark.parametrize(
    "path", sorted((LAUNCH / "accelerate").iterdir()), ids=lambda path: path.name
)
def test_accelerate_knows_every_key(path: Path, tmp_path: Path) -> None:
    load_config_from_file(str(path))

    misspelled = tmp_path / path.name
    misspelled.write_text(path.read_text().replace("num_machines:", "num_machine:"))
    with pytest.raises(ValueError, match="unknown keys"):
        load_config_from_file(str(misspelled))
