"""Variables of the environment, launchers, and streams that are closed."""

from __future__ import annotations

import sys
from pathlib import Path

from .cases import RECIPE_FILE, Expected, Input, accepted, fails, refused, told, training

_ROOT = Path(__file__).parents[2]
_LAUNCH_FILES = _ROOT / "launch" / "accelerate"
_ALONE = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29555"}

# Variables that a launcher sets, with values that none would set.
RANKS: list[tuple[dict[str, str], Expected]] = [
    ({"WORLD_SIZE": "abc"}, refused("WORLD_SIZE", "abc")),
    ({"WORLD_SIZE": "-1"}, refused("WORLD_SIZE", "-1")),
    ({"WORLD_SIZE": "0"}, refused("WORLD_SIZE", "0")),
    ({"WORLD_SIZE": "1.5"}, refused("WORLD_SIZE", "1.5")),
    ({"WORLD_SIZE": "2 "}, refused("WORLD_SIZE")),
    ({"WORLD_SIZE": "4"}, refused("WORLD_SIZE", "RANK")),
    ({"WORLD_SIZE": "1"}, accepted("one rank")),
    ({"RANK": "abc"}, refused("RANK", "abc")),
    ({"RANK": "3"}, refused("RANK", "WORLD_SIZE")),
    ({"RANK": "-1", "WORLD_SIZE": "2", **_ALONE}, refused("RANK", "-1")),
    ({"RANK": "abc", "WORLD_SIZE": "2", **_ALONE}, refused("RANK", "abc")),
    ({"RANK": "5", "WORLD_SIZE": "2", **_ALONE}, refused("RANK", "5", "WORLD_SIZE")),
    ({"RANK": "2", "WORLD_SIZE": "2", **_ALONE}, refused("RANK", "WORLD_SIZE")),
    ({"RANK": "0", "WORLD_SIZE": "2"}, refused("MASTER_ADDR")),
    ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}, refused("MASTER_PORT")),
    ({"LOCAL_RANK": "abc"}, refused("LOCAL_RANK", "abc")),
    ({"LOCAL_RANK": "-2"}, refused("LOCAL_RANK", "-2")),
    ({"LOCAL_WORLD_SIZE": "abc"}, refused("LOCAL_WORLD_SIZE", "abc")),
    ({"LOCAL_WORLD_SIZE": "0"}, refused("LOCAL_WORLD_SIZE", "0")),
    (
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "2", **_ALONE},
        refused("LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    ),
    *(
        (
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
            refused("MASTER_PORT", port),
        )
        for port in ("abc", "-1", "65536", "99999999999", "1.5")
    ),
    (
        {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "no such host", "MASTER_PORT": "29556"},
        fails("rank 0", "no such host"),
    ),
    (
        {"RANK": "1", "WORLD_SIZE": "2", **_ALONE, "MASTER_PORT": "29557"},
        fails("rank"),  # nobody listens there, and trainer.timeout_minutes is short
    ),
    (
        {"RANK": "0", "WORLD_SIZE": "2", **_ALONE, "MASTER_PORT": "29558"},
        fails("rank", "1"),
    ),
]

OTHERS: list[tuple[dict[str, str], Expected]] = [
    ({"LRD_FUSED": "abc"}, refused("LRD_FUSED", "abc")),
    ({"LRD_FUSED": "2"}, refused("LRD_FUSED", "2")),
    ({"LRD_FUSED": "0"}, accepted("switches the kernels off")),
    ({"LRD_FUSED": "1"}, accepted("switches the kernels on")),
    ({"CUDA_VISIBLE_DEVICES": "abc"}, accepted("trainer.device is cpu")),
    ({"ACCELERATE_USE_CPU": "abc"}, refused("ACCELERATE_USE_CPU", "abc")),
    ({"ACCELERATE_MIXED_PRECISION": "fp16"}, told("mixed_precision", "fp16")),
    ({"ACCELERATE_MIXED_PRECISION": "abc"}, told("mixed_precision", "abc")),
    ({"GLOO_SOCKET_IFNAME": "nothing0"}, accepted("one rank has no network")),
    ({"HOME": "/nonexistent"}, accepted("nothing is written there")),
    ({"TERM": "abc", "COLUMNS": "abc"}, accepted("the width is guessed")),
    ({"COLUMNS": "1"}, accepted("one column")),
    ({"COLUMNS": "0"}, accepted("none")),
    ({"TMPDIR": "/nonexistent"}, accepted("nothing is written there")),
]

# Variables that are read while Python or torch starts, so these need a process of their own.
AT_START: list[tuple[dict[str, str], Expected]] = [
    ({"OMP_NUM_THREADS": "abc"}, told("OMP_NUM_THREADS")),
    ({"OMP_NUM_THREADS": "-1"}, told("OMP_NUM_THREADS")),
    ({"OMP_NUM_THREADS": "0"}, told("OMP_NUM_THREADS")),
    ({"OMP_NUM_THREADS": "1000000"}, accepted("no more threads than cores")),
    ({"PYTHONOPTIMIZE": "2"}, accepted("without docstrings and assertions")),
    ({"LANG": "xx_YY.abc", "LC_ALL": "xx_YY.abc"}, accepted("an unknown locale")),
    ({"NUMBA_CACHE_DIR": "/proc/nothing"}, accepted("kernels are compiled again")),
    ({"MPLCONFIGDIR": "/proc/nothing"}, accepted("nothing is drawn")),
]

# Mirrors that cannot be used; nothing listens at port 9.
_KEYS = {"AWS_ACCESS_KEY_ID": "tester", "AWS_SECRET_ACCESS_KEY": "not-a-real-secret"}
_NO_KEYS = {"AWS_METADATA_ENDPOINT": "http://127.0.0.1:9"}
MIRRORS: list[tuple[str, dict[str, str], Expected]] = [
    ("s3://bucket/run", _NO_KEYS, refused("checkpoint.mirror", "no credentials")),
    (
        "s3://bucket/run",
        {**_KEYS, "AWS_ENDPOINT_URL": "http://127.0.0.1:9"},
        refused("checkpoint.mirror", "s3://bucket/run", "the server is not there"),
    ),
    ("s3://bucket/run", {**_KEYS, "AWS_ENDPOINT_URL": "abc"}, refused("checkpoint.mirror")),
    ("s3://bucket/run", {**_KEYS, "AWS_ENDPOINT_URL": "http://"}, refused("checkpoint.mirror")),
    *(
        (
            "s3://bucket/run",
            {**_KEYS, "AWS_ENDPOINT_URL": address},
            refused("checkpoint.mirror", "AWS_ENDPOINT_URL"),
        )
        for address in ("http://a:b", "http://a:99999", "http://[::1", "http://a<b")
    ),
    *(
        ("s3://bucket/run", {**_KEYS, name: "a\nb"}, refused("checkpoint.mirror", name))
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
    ),
    (
        "az://container/run",
        {"AZURE_STORAGE_ACCOUNT_NAME": "a\tb"},
        refused("checkpoint.mirror", "AZURE_STORAGE_ACCOUNT_NAME"),
    ),
    (
        "gs://bucket/run",
        {"GOOGLE_SERVICE_ACCOUNT": "a\rb"},
        refused("checkpoint.mirror", "GOOGLE_SERVICE_ACCOUNT"),
    ),
    ("az://container/run", {}, refused("checkpoint.mirror", "no credentials")),
    (
        "az://container/run",
        {"AZURE_STORAGE_ACCOUNT_NAME": "abc", "AZURE_STORAGE_ACCOUNT_KEY": "no base64!"},
        refused("checkpoint.mirror"),
    ),
    (
        "gs://bucket/run",
        {"GOOGLE_APPLICATION_CREDENTIALS": "nothing.json"},
        refused("checkpoint.mirror"),
    ),
]

_SHORT = ("trainer.timeout_minutes=0.03",)


def inputs() -> list[Input]:
    found = []
    for variables, expected in RANKS:
        found.append(
            Input("ranks", _describe(variables), expected, training(*_SHORT), environment=variables)
        )
    for variables, expected in OTHERS:
        found.append(
            Input("variables", _describe(variables), expected, training(), environment=variables)
        )
    for variables, expected in AT_START:
        command = (sys.executable, "-m", *training())
        found.append(
            Input("variables", _describe(variables), expected, command, environment=variables)
        )
    for url, variables, expected in MIRRORS:
        for command in (training(f"checkpoint.mirror={url}"), ("lrd", "checkpoints", url)):
            # `lrd checkpoints` is given the address, and no key of a recipe.
            words = expected.words if command[0] == "lrd.train" else expected.words[1:]
            name = f"{command[0]} {url} {_describe(variables)}"
            found.append(Input("mirrors", name, refused(*words), command, environment=variables))
    return found + _streams() + _launchers() + _other_starts()


def _describe(variables: dict[str, str]) -> str:
    return " ".join(f"{key}={value}" for key, value in variables.items())


def _streams() -> list[Input]:
    """Standard output that nobody reads."""
    reason = "the run goes on without a reader"
    found = []
    for stream in ("closed", "/dev/full", "/dev/null"):
        for command in (training(), ("lrd", "--version"), ("lrd", "--help")):
            name = f"{' '.join(command[:2])} >{stream}"
            expected = accepted(reason)
            if (stream, command[1]) == ("/dev/full", "--help"):
                expected = refused("No space left")
            found.append(Input("streams", name, expected, command, stdout=stream))

    python = " ".join([sys.executable, "-m", *training()])
    for name, tail in {"a reader that leaves": "| true", "stderr is closed": "2>&-"}.items():
        found.append(Input("streams", name, accepted(reason), ("sh", "-c", f"{python} {tail}")))
    bad = f"{python} seed=abc 2>&-"
    found.append(
        Input(
            "streams", "an error with no stderr", accepted(reason), ("sh", "-c", f"{bad} || true")
        )
    )
    return found


def _launchers() -> list[Input]:
    """Launch files and options of launchers."""
    table: dict[tuple[str, ...], Expected] = {
        ("--config_file", "nothing.yaml"): refused("nothing.yaml"),
        ("--config_file", RECIPE_FILE): refused(RECIPE_FILE),
        ("--config_file", "."): refused("."),
        ("--config_file", "/dev/null"): refused("/dev/null"),
        ("--num_processes", "abc"): refused("num_processes", "abc"),
        ("--num_processes", "0"): refused("num_processes", "0"),
        ("--num_processes", "-1"): refused("num_processes", "-1"),
        ("--num_machines", "2"): refused("--num_processes"),
        ("--mixed_precision", "abc"): refused("mixed_precision", "abc"),
        ("--nothing",): refused("--nothing"),
        ("--main_process_port", "abc"): refused("main_process_port", "abc"),
        ("--main_process_port", "99999999"): refused("main_process_port"),
        ("--max_restarts", "abc"): refused("max_restarts"),
        ("--max_restarts", "-1"): refused("max_restarts"),
    }
    group = "launchers"
    found = []
    for options, expected in table.items():
        command = (sys.executable, "-m", "lrd", "launch", *options, *training()[1:])
        name = f"lrd launch {' '.join(options)}"
        found.append(Input(group, name, expected, command, is_launched=True))

    launch = (sys.executable, "-m", "lrd", "launch")
    accelerate = (sys.executable, "-m", "accelerate.commands.launch")
    one_process = ("--config_file", str(_LAUNCH_FILES / "cpu-1.yaml"))
    run = ("-m", *training())
    others: dict[str, tuple[tuple[str, ...], Expected]] = {
        "lrd launch": (launch, refused("RECIPE")),
        "lrd launch, no such recipe": ((*launch, "nothing.yaml"), refused("nothing.yaml")),
        "lrd launch, an option at the end": (
            (*launch, *training()[1:], "--num_processes", "2"),
            refused("--num_processes"),
        ),
        "lrd launch, a bad value": ((*launch, *training("seed=abc")[1:]), refused("seed")),
        "lrd launch, a batch that cannot be split": (
            (*launch, "--num_processes", "2", *training("data.batch_size=241")[1:]),
            refused("data.batch_size"),
        ),
        "lrd launch, one image a rank": (
            (
                *launch,
                *("--num_processes", "2"),
                *training("data.batch_size=2", "data.image_size=4")[1:],
            ),
            refused("data.batch_size", "BatchNorm"),
        ),
        "lrd launch --mixed_precision fp16": (
            (*launch, "--mixed_precision", "fp16", *training()[1:]),
            told("mixed_precision", "fp16", "trainer.precision"),
        ),
        "accelerate launch --mixed_precision fp16": (
            (*accelerate, *one_process, "--mixed_precision", "fp16", *run),
            told("mixed_precision", "fp16", "trainer.precision"),
        ),
        "accelerate launch cpu-1.yaml --num_processes 2": (
            (*accelerate, *one_process, "--num_processes", "2", *run),
            told("num_processes"),
        ),
        "lrd launch cpu-1.yaml --num_processes 2": (
            (*launch, *one_process, "--num_processes", "2", *training()[1:]),
            told("num_processes"),
        ),
        "accelerate launch lrd/train.py": (
            (*accelerate, *one_process, str(_ROOT / "lrd" / "train.py"), *training()[1:]),
            accepted("trains as -m lrd.train does"),
        ),
        "lrd launch, the run directory is a file": (
            (*launch, "--num_processes", "2", RECIPE_FILE, f"run_dir={RECIPE_FILE}"),
            refused("run_dir", RECIPE_FILE),
        ),
    }
    for name, (command, expected) in others.items():
        found.append(Input(group, name, expected, command, is_launched=True))
    return found


def _other_starts() -> list[Input]:
    """Programs that are started in an unusual way."""
    lines = {
        "python -OO, lrd.optim": ("-OO", "-c", "import lrd; lrd.optim; lrd.LRDropout; lrd.Magma"),
        "python lrd/train.py": (str(_ROOT / "lrd" / "train.py"), *training()[1:]),
        "import torchvision": ("-c", "import torchvision"),
    }
    found = []
    for name, arguments in lines.items():
        command = (sys.executable, *arguments)
        found.append(Input("other starts", name, accepted("works"), command))
    make = ("make", "-C", str(_ROOT), "-n", "demo", "seed=1")
    found.append(Input("other starts", "make demo seed=1", told(" seed=1"), make))
    return found
