"""What `auto` becomes, on what hardware."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from launching import final_state
from test_resume import assert_equal
from test_train import one_thread_and_ordinary_algorithms, train  # noqa: F401

from lrd import hardware
from lrd import recipe as recipes
from lrd.recipe import Recipe
from lrd.train import run

AUTO = ["trainer.precision=auto", "trainer.channels_last=auto"]


def settled(**trainer: Any) -> tuple[str, bool | str]:
    own = hardware.settle(Recipe.model_validate({"trainer": trainer})).trainer
    return own.precision, own.channels_last


@pytest.fixture
def processor(monkeypatch):
    """What torch says of the processor."""

    def has(*names: str) -> None:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(names, True), raising=False)

    return has


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
def test_auto_on_a_cpu_is_what_its_processor_multiplies_in(processor, names, precision):
    processor(*names)
    assert settled(precision="auto", channels_last="auto", device="cpu") == (precision, False)


@pytest.mark.parametrize("has_bf16", [True, False])
def test_auto_on_a_gpu(monkeypatch, processor, has_bf16):
    processor("avx512_bf16")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    assert settled(precision="auto", channels_last="auto") == ("bf16" if has_bf16 else "fp32", has_bf16)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("channels_last", [True, False])
def test_what_a_recipe_says_itself_is_left_alone(processor, precision, channels_last):
    processor("avx512_bf16" if precision == "fp32" else "avx2")
    recipe = Recipe.model_validate({"trainer": {"precision": precision, "channels_last": channels_last}})
    assert hardware.settle(recipe) is recipe


def test_auto_survives_a_dump_and_nothing_else_is_taken(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("")
    recipe = recipes.load(path, AUTO)
    assert recipes.parse(yaml.safe_load(recipe.dump()), "dump") == recipe
    with pytest.raises(recipes.UserError) as caught:
        recipes.load(path, ["trainer.channels_last=sometimes", "trainer.precision=fp16"])
    assert [line.split(",")[0] for line in str(caught.value).splitlines()] == [
        f"{path}: trainer.precision: is 'fp16'",
        f"{path}: trainer.channels_last: is 'sometimes'",
    ]


@pytest.mark.parametrize("fault", [AttributeError, RuntimeError])
def test_where_torch_does_not_know_the_kernel_is_asked(monkeypatch, tmp_path, fault):
    def capabilities() -> None:
        raise fault

    monkeypatch.setattr(torch.cpu, "get_capabilities", capabilities, raising=False)
    path = tmp_path / "cpuinfo"
    monkeypatch.setattr(hardware, "_CPUINFO", path)
    assert not hardware.has_bf16_instructions()
    for text, expected in (
        ("processor : 0\nflags\t\t: fpu avx512f avx512_bf16\n", True),
        ("processor : 0\nflags\t\t: fpu avx512f\n", False),
        ("processor : 0\nFeatures\t: fp asimd bf16\n", False),
    ):
        path.write_text(text)
        assert hardware.has_bf16_instructions() == expected


@pytest.fixture
def host(monkeypatch, tmp_path):
    """A host of so many cores, whose cgroups have these quotas (of each 100 ms, in ms; the root's last)."""

    def of(cores: int, *quotas: str) -> None:
        monkeypatch.setattr(hardware.os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
        monkeypatch.setattr(hardware, "_CGROUPS", tmp_path)
        monkeypatch.setattr(hardware, "_OWN_CGROUP", tmp_path / "own")
        (tmp_path / "own").write_text("4:memory:/elsewhere\n0::/pod/container\n")
        for folder, quota in zip(("pod/container", "pod", "."), quotas, strict=False):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / "cpu.max").write_text(f"{quota} 100\n")

    return of


@pytest.mark.parametrize(
    ("cores", "quotas", "ranks", "threads", "expected"),
    [
        (8, [], 1, 16, 8),
        (8, [], 2, 8, 4),
        (8, [], 3, 8, 2),
        (2, [], 3, 2, 1),
        (8, [], 2, 1, 1),  # OMP_NUM_THREADS=1 stands
        (8, ["400"], 2, 8, 2),
        (8, ["max", "150"], 1, 8, 1),
        (8, ["600", "max", "300"], 1, 8, 3),
        (8, ["50"], 4, 8, 1),
    ],
)
def test_a_rank_has_no_more_threads_than_its_share_of_the_cores(
    monkeypatch, host, cores, quotas, ranks, threads, expected
):
    host(cores, *quotas)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    torch.set_num_threads(threads)
    hardware.share_cores()
    assert torch.get_num_threads() == expected


def test_cores_are_known_where_there_are_no_cgroups(monkeypatch, tmp_path):
    monkeypatch.setattr(hardware, "_OWN_CGROUP", tmp_path / "none")
    assert hardware.cores() >= 1


def test_on_this_machine_it_says_something():
    assert hardware.has_bf16_instructions() in (True, False)


def test_a_run_with_auto_is_the_run_with_what_it_stands_for_and_another_processor_is_told(
    tmp_path: Path, processor, capsys: pytest.CaptureFixture[str]
):
    processor("avx512_bf16")
    train(tmp_path, tmp_path / "auto", *AUTO, "trainer.max_steps=2")
    train(tmp_path, tmp_path / "said", "trainer.precision=bf16", "trainer.channels_last=false", "trainer.max_steps=2")
    (weights, optimizer, _), (expected_weights, expected_optimizer, _) = (
        final_state(tmp_path / name) for name in ("auto", "said")
    )
    assert_equal(weights, expected_weights)
    assert_equal(optimizer, expected_optimizer)
    own = yaml.safe_load((tmp_path / "auto" / "recipe.yaml").read_text())["trainer"]
    assert (own["precision"], own["channels_last"]) == ("bf16", False)
    processor("avx2")
    capsys.readouterr()
    overrides = [f"run_dir={tmp_path / 'auto'}", *AUTO, "trainer.max_steps=3"]
    assert run(str(tmp_path / "recipe.yaml"), overrides) == 2
    said = capsys.readouterr()
    assert "trainer.precision: auto is fp32 here" in said.out
    assert "trainer.precision: the run in" in said.err
    assert "had 'bf16', the recipe now says 'fp32'" in said.err.replace("\n", " ")
