"""What `auto` becomes on which hardware, and how many threads a rank gets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lrd import host
from lrd import recipe as recipes
from lrd.distributed import hardware
from lrd.errors import UserError
from lrd.recipe import Recipe
from lrd.train import run
from tests.helpers.equality import assert_same_final_state
from tests.helpers.training import train

pytestmark = pytest.mark.usefixtures("one_thread")

AUTO = ["trainer.precision=auto", "trainer.channels_last=auto"]


def resolve_auto(**trainer: Any) -> tuple[str, bool | str]:
    """Return the precision and channels_last that a trainer's settings become."""
    recipe = hardware.resolve_auto(Recipe.model_validate({"trainer": trainer}))
    return recipe.trainer.precision, recipe.trainer.channels_last


@pytest.fixture
def set_cpu_features(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets the features of the processor that torch reports."""

    def set_features(*names: str) -> None:
        features = dict.fromkeys(names, True)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features, raising=False)

    return set_features


@pytest.mark.parametrize(
    ("names", "precision"),
    [
        (["avx512_f", "avx512_bf16"], "bf16"),
        (["amx_tile", "amx_bf16"], "bf16"),
        (["avx2", "avx512_f", "avx512_vnni"], "fp32"),
        (["neon", "bf16", "sve_bf16"], "fp32"),
        ([], "fp32"),
    ],
)
def test_auto_on_a_cpu_is_the_precision_in_which_the_processor_multiplies(
    set_cpu_features, names, precision
):
    set_cpu_features(*names)
    settings = resolve_auto(precision="auto", channels_last="auto", device="cpu")
    assert settings == (precision, False)


@pytest.mark.parametrize("has_bf16", [True, False])
def test_auto_on_a_gpu(monkeypatch, set_cpu_features, has_bf16):
    set_cpu_features("avx512_bf16")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)

    precision = "bf16" if has_bf16 else "fp32"
    assert resolve_auto(precision="auto", channels_last="auto") == (precision, has_bf16)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("channels_last", [True, False])
def test_settings_other_than_auto_stay_as_they_are(set_cpu_features, precision, channels_last):
    set_cpu_features("avx512_bf16" if precision == "fp32" else "avx2")
    trainer = {"precision": precision, "channels_last": channels_last}
    recipe = Recipe.model_validate({"trainer": trainer})
    assert hardware.resolve_auto(recipe) is recipe


def test_auto_survives_a_dump_and_unknown_settings_are_refused(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("")
    recipe = recipes.load(path, AUTO)
    assert recipes.parse(yaml.safe_load(recipe.dump()), "dump") == recipe

    with pytest.raises(UserError) as caught:
        recipes.load(path, ["trainer.channels_last=sometimes", "trainer.precision=fp16"])
    assert [line.split(",")[0] for line in str(caught.value).splitlines()] == [
        "trainer.precision=fp16: trainer.precision: is 'fp16'",
        "trainer.channels_last=sometimes: trainer.channels_last: is 'sometimes'",
    ]


@pytest.mark.parametrize("error", [AttributeError, RuntimeError])
def test_if_torch_does_not_know_the_processor_the_kernel_is_asked(monkeypatch, tmp_path, error):
    def get_capabilities() -> None:
        raise error

    cpuinfo = tmp_path / "cpuinfo"
    monkeypatch.setattr(torch.cpu, "get_capabilities", get_capabilities, raising=False)
    monkeypatch.setattr(hardware, "_CPUINFO", cpuinfo)
    assert not hardware.has_bf16_instructions()  # the file is not there

    cpuinfo.write_text("processor : 0\nflags\t\t: fpu avx512f avx512_bf16\n")
    assert hardware.has_bf16_instructions()

    cpuinfo.write_text("processor : 0\nflags\t\t: fpu avx512f\n")
    assert not hardware.has_bf16_instructions()

    cpuinfo.write_text("processor : 0\nFeatures\t: fp asimd bf16\n")
    assert not hardware.has_bf16_instructions()


@pytest.fixture
def set_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Sets the cores of this host and the CPU quotas of this process's cgroups.

    A quota is in ms of each 100 ms, or `max`. They are given from the innermost cgroup outwards.
    """

    def set_cores_and_quotas(cores: int, *quotas: str) -> None:
        monkeypatch.setattr(
            hardware.os, "sched_getaffinity", lambda _: set(range(cores)), raising=False
        )
        monkeypatch.setattr("lrd.host._CGROUPS", tmp_path)
        monkeypatch.setattr("lrd.host._PROCESS_CGROUP", tmp_path / "own")
        (tmp_path / "own").write_text("4:memory:/elsewhere\n0::/pod/container\n")

        for folder, quota in zip(("pod/container", "pod", "."), quotas, strict=False):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / "cpu.max").write_text(f"{quota} 100\n")

    return set_cores_and_quotas


@pytest.mark.parametrize(
    ("cores", "quotas", "ranks", "threads", "expected"),
    [
        (8, [], 1, 16, 8),
        (8, [], 2, 8, 4),
        (8, [], 3, 8, 2),
        (2, [], 3, 2, 1),
        (8, [], 2, 1, 1),  # OMP_NUM_THREADS=1 is respected
        (8, ["400"], 2, 8, 2),
        (8, ["max", "150"], 1, 8, 1),
        (8, ["600", "max", "300"], 1, 8, 3),
        (8, ["50"], 4, 8, 1),
    ],
)
def test_a_rank_has_no_more_threads_than_its_share_of_the_cores(
    monkeypatch, set_cores, cores, quotas, ranks, threads, expected
):
    set_cores(cores, *quotas)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    torch.set_num_threads(threads)
    hardware.limit_threads()
    assert torch.get_num_threads() == expected


def test_cores_are_counted_on_a_host_without_cgroups(monkeypatch, tmp_path):
    monkeypatch.setattr("lrd.host._PROCESS_CGROUP", tmp_path / "none")
    assert host.available_cores() >= 1


def test_this_machine_either_has_bf16_instructions_or_not():
    assert hardware.has_bf16_instructions() in (True, False)


def test_a_run_with_auto_equals_the_run_with_the_settings_that_auto_became(
    tmp_path: Path, set_cpu_features: Callable[..., None]
):
    set_cpu_features("avx512_bf16")
    train(tmp_path, tmp_path / "auto", *AUTO, "trainer.max_steps=2")

    settings = ["trainer.precision=bf16", "trainer.channels_last=false"]
    train(tmp_path, tmp_path / "explicit", *settings, "trainer.max_steps=2")
    assert_same_final_state(tmp_path / "auto", tmp_path / "explicit")

    trainer = yaml.safe_load((tmp_path / "auto" / "recipe.yaml").read_text())["trainer"]
    assert (trainer["precision"], trainer["channels_last"]) == ("bf16", False)


def test_a_run_with_auto_is_refused_on_a_processor_with_another_precision(
    tmp_path: Path, set_cpu_features: Callable[..., None], capsys: pytest.CaptureFixture[str]
):
    set_cpu_features("avx512_bf16")
    train(tmp_path, tmp_path / "auto", *AUTO, "trainer.max_steps=2")
    capsys.readouterr()

    set_cpu_features("avx2")
    overrides = [f"run_dir={tmp_path / 'auto'}", *AUTO, "trainer.max_steps=3"]
    assert run(str(tmp_path / "recipe.yaml"), overrides) == 2

    printed = capsys.readouterr()
    assert "trainer.precision: auto is fp32 here" in printed.out
    assert "trainer.precision: the run in" in printed.err
    assert "had 'bf16', the recipe now says 'fp32'" in printed.err.replace("\n", " ")
