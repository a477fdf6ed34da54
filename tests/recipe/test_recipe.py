"""The recipe: defaults, file, overrides; what is refused; the settings that a resume compares."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import yaml
from torch.optim import lr_scheduler

from lrd import recipe as recipes
from lrd.errors import UserError
from lrd.recipe import OptimizerGroup, Recipe, reference
from lrd.recipe.schema import SCHEDULES, ScheduleSection, Section, get_mark, section_types

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))

FULL = """
data:
  dataset: imagefolder
  root: /somewhere
  batch_size: 96
  image_size: 24
  augment: crop_flip
  padding: 2
model: {arch: resnet18, width: 8, num_classes: 12}
optimizer:
  name: RMSprop
  lr: 1e-3
  betas: [0.9, 0.99]
  alpha: 9e-1
  centered: true
  groups:
    - {match: [bn*, "*.bias"], name: small, weight_decay: 0, keep_prob: 1}
    - {match: fc.*, lr: 2e-2, alpha: 0.5}
lr_dropout: {keep_prob: 0.25, seed: 18446744073709551615, granularity: row, rescale: true}
schedule: {name: MultiStepLR, milestones: [3, 7], gamma: 1e-1, unit: step, warmup_steps: 5}
trainer: {epochs: 11, clip_norm: 1.5, accumulation_steps: 2, precision: bf16}
seed: 9223372036854775807
"""


def load(folder: Path, text: str, *overrides: str) -> Recipe:
    path = folder / "given.yaml"
    path.write_text(text, encoding="utf-8")
    return recipes.load(path, list(overrides))


def refused(folder: Path, text: str, *overrides: str) -> list[str]:
    """The lines of the refusal."""
    with pytest.raises(UserError) as caught:
        load(folder, text, *overrides)
    return str(caught.value).splitlines()


def test_the_repository_has_recipes():
    assert RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_of_the_repository_loads_and_survives_a_dump(path):
    recipe = recipes.load(path)
    assert recipes.parse(yaml.safe_load(recipe.dump()), "dump") == recipe


def test_defaults_then_file_then_overrides(tmp_path):
    text = "data: {batch_size: 32}\noptimizer: {lr: 0.3}"
    recipe = load(tmp_path, text, "optimizer.lr=0.7", "model.width=16")
    assert recipe.data.batch_size == 32
    assert recipe.data.dataset == Recipe().data.dataset
    assert recipe.optimizer.lr == 0.7
    assert recipe.model.width == 16


def test_the_last_of_two_overrides_wins(tmp_path):
    assert load(tmp_path, "", "optimizer.lr=0.7", "optimizer.lr=0.8").optimizer.lr == 0.8


def test_an_override_leaves_the_rest_of_its_section(tmp_path):
    optimizer = load(
        tmp_path, "optimizer: {name: RMSprop, alpha: 0.5}", "optimizer.lr=0.7"
    ).optimizer
    assert (optimizer.name, optimizer.arguments) == ("RMSprop", {"alpha": 0.5})


def test_a_file_without_content_is_all_defaults(tmp_path):
    assert load(tmp_path, "", "run_dir=runs/default") == Recipe()


@pytest.mark.parametrize("text", ["trainer:\n  # nothing yet\n", "trainer: {}"])
def test_an_empty_section_is_all_defaults(tmp_path, text):
    assert load(tmp_path, text).trainer == Recipe().trainer


def test_run_dir_is_named_after_the_file_unless_given(tmp_path):
    assert load(tmp_path, "").run_dir == "runs/given"
    assert load(tmp_path, "run_dir: /a").run_dir == "/a"
    assert load(tmp_path, "run_dir: /a", "run_dir=/b").run_dir == "/b"


@pytest.mark.parametrize(
    "key",
    [
        "optimizer.lr",
        "optimizer.weight_decay",
        "optimizer.eps",
        "optimizer.alpha",
        "schedule.gamma",
        "trainer.clip_norm",
        "lr_dropout.keep_prob",
    ],
)
def test_1e_3_is_the_number_0_001(tmp_path, key):
    text = "schedule: {name: StepLR, step_size: 3}"
    short = load(tmp_path, text, f"{key}=1e-3")
    plain = load(tmp_path, text, f"{key}=0.001")
    assert short.result_settings()[key] == 0.001
    assert short == plain


def test_1e_3_is_a_number_within_lists_and_groups(tmp_path):
    text = (
        "optimizer: {{betas: [0.9, {0}], etas: [{0}], groups: [{{match: a, lr: {0}, alpha: {0}}}]}}"
    )
    short = load(tmp_path, text.format("1e-3"))
    plain = load(tmp_path, text.format("0.001"))
    assert short == plain
    assert short.optimizer.betas == [0.9, 0.001]
    assert short.optimizer.arguments == {"etas": [0.001]}
    assert short.optimizer.groups[0].arguments == {"alpha": 0.001}


def test_lr_dropout_is_off_unless_asked_for(tmp_path):
    for text in ("", "lr_dropout:", "lr_dropout: null"):
        assert load(tmp_path, text).lr_dropout is None
        assert load(tmp_path, text, "lr_dropout.keep_prob=0.5").lr_dropout.keep_prob == 0.5
    assert load(tmp_path, "lr_dropout: {keep_prob: 0.5}", "lr_dropout=null").lr_dropout is None


def test_masks_are_seeded_by_the_recipe_unless_they_have_their_own_seed(tmp_path):
    text = "seed: 5\nlr_dropout: {keep_prob: 0.5}"
    recipe = load(tmp_path, text)
    assert recipe.mask_seed == 5
    assert load(tmp_path, text, "lr_dropout.seed=6").mask_seed == 6

    with_seed = load(tmp_path, text, "lr_dropout.seed=5")
    assert with_seed.result_settings() == recipe.result_settings()


@pytest.mark.parametrize("keep_prob", ["1", "1.0", "0.5", "1e-9"])
def test_keep_prob_from_above_0_to_1_is_accepted(tmp_path, keep_prob):
    recipe = load(tmp_path, "", f"lr_dropout.keep_prob={keep_prob}")
    assert recipe.lr_dropout.keep_prob == float(keep_prob)


@pytest.mark.parametrize(
    "keep_prob", ["0", "-0.5", "1.0001", "2", ".nan", ".inf", "true", "half", "[0.5]"]
)
def test_any_other_keep_prob_is_refused(tmp_path, keep_prob):
    (line,) = refused(tmp_path, "", f"lr_dropout.keep_prob={keep_prob}")
    assert "lr_dropout.keep_prob: " in line
    (line,) = refused(
        tmp_path, f"lr_dropout: {{}}\noptimizer: {{groups: [{{match: a, keep_prob: {keep_prob}}}]}}"
    )
    assert "optimizer.groups.0.keep_prob: " in line


@pytest.mark.parametrize(
    ("text", "key", "message"),
    [
        ("optimiser: {lr: 1}", "optimiser", "did you mean optimizer?"),
        ("data: {batchsize: 1}", "data.batchsize", "did you mean batch_size?"),
        (
            "lr_dropout: {keep_probability: 1}",
            "lr_dropout.keep_probability",
            "did you mean keep_prob?",
        ),
        ("tracking: {zzz: 1}", "tracking.zzz", "every_steps"),
        ("data: {batch_size: many}", "data.batch_size", "'many'"),
        ("data: {batch_size: 1.5}", "data.batch_size", "1.5"),
        ("data: {batch_size: [1]}", "data.batch_size", "[1]"),
        ("data: {root: 3}", "data.root", "string"),
        ("data: {dataset: mnist}", "data.dataset", "'digits'"),
        ("model: resnet18", "model", "'resnet18'"),
        ("lr_dropout: 0.5", "lr_dropout", "0.5"),
        ("lr_dropout: {kind: mgma}", "lr_dropout.kind", "'magma'"),
        ("lr_dropout: {tau: 2}", "lr_dropout.tau", "kind dropout does not have"),
        ("lr_dropout: {score_start: 0}", "lr_dropout.score_start", "kind dropout"),
        *(
            (f"lr_dropout: {{kind: magma, {key}: {value}}}", f"lr_dropout.{key}", message)
            for key, value, message in (
                ("granularity", "element", "kind magma does not have; it has tau, score_start"),
                ("rescale", "false", "kind magma"),
                ("masks", "update", "kind magma"),
                ("tau", "0", "greater than 0"),
                ("score_start", "1.5", "less than or equal to 1"),
                ("keep_prob", "1", "less than 1"),
            )
        ),
        ("optimizer: {groups: [{lr: 1}]}", "optimizer.groups.0.match", "missing"),
        ("optimizer: {groups: [{match: 3}]}", "optimizer.groups.0.match", "a list of patterns"),
        ("optimizer: {groups: [{match: [a, 3]}]}", "optimizer.groups.0.match", "patterns"),
        ("optimizer: {lr: }", "optimizer.lr", "None"),
        ("optimizer: {lr: -0.1}", "optimizer.lr", "-0.1"),
        ("optimizer: {lr: .nan}", "optimizer.lr", "nan"),
        ("optimizer: {lr: .inf}", "optimizer.lr", "finite"),
        ("data: {batch_size: 0}", "data.batch_size", "greater than 0"),
        ("trainer: {epochs: 0}", "trainer.epochs", "greater than 0"),
        ("schedule: StepLR", "schedule", "'StepLR', should be a section of keys and values"),
        ("schedule: {name: [StepLR]}", "schedule.name", "is ['StepLR'], may be constant, "),
        ("schedule: {name: }", "schedule.name", "is None, may be constant, StepLR, "),
        *(
            (
                f"schedule: {{name: SequentialLR, milestones: [], schedules: [{{name: {name}}}]}}",
                "schedule.schedules.0.name",
                message,
            )
            for name, message in (
                ("OneCycleLR", "cannot be a part of SequentialLR"),
                ("ReduceLROnPlateau", "cannot be a part of SequentialLR"),
                ("SequentialLR", "cannot be a part of SequentialLR"),
                ("cosine", "did you mean CosineAnnealingLR?"),
            )
        ),
        ("schedule: {warmup_steps: -1}", "schedule.warmup_steps", "-1"),
        ("checkpoint: {keep_last: 0}", "checkpoint.keep_last", "greater than or equal to 2"),
        ("checkpoint: {keep_last: 1}", "checkpoint.keep_last", "greater than or equal to 2"),
        ("seed: -1", "seed", "-1"),
        ("lr_dropout: {seed: 18446744073709551616}", "lr_dropout.seed", "18446744073709551616"),
        ("run_dir: ''", "run_dir", "''"),
        ("seed: true", "seed", "True"),
        ("data: {batch_size: true}", "data.batch_size", "True"),
        ("optimizer: {lr: true}", "optimizer.lr", "True"),
        ("optimizer: {betas: [0.9, false]}", "optimizer.betas.1", "False"),
        ("trainer: {clip_norm: yes}", "trainer.clip_norm", "True"),
        ("optimizer: {groups: [{match: a, keep_prob: 0.5}]}", "optimizer.groups", "lr_dropout"),
    ],
)
def test_a_fault_is_one_line_that_names_the_key(tmp_path, text, key, message):
    (line,) = refused(tmp_path, text)
    assert line.startswith(f"{tmp_path / 'given.yaml'}: {key}: ")
    assert message in line


def test_all_faults_are_listed(tmp_path):
    lines = refused(
        tmp_path, "data: {batchsize: 1}\nmodel: {width: 0}\nseed: true", "trainer.precision=fp64"
    )
    assert len(lines) == 4
    for key in ("data.batchsize", "model.width", "seed", "trainer.precision"):
        assert sum(f": {key}: " in line for line in lines) == 1


@pytest.mark.parametrize(
    "override", ["optimizer.lr", "=0.1", "optimizer..lr=0.1", ".lr=0.1", "optimizer.=0.1", ""]
)
def test_a_malformed_override_is_refused(tmp_path, override):
    (line,) = refused(tmp_path, "", override)
    assert line.startswith(f"{override}: ")
    assert "section.key=value" in line


@pytest.mark.parametrize("value", ["[1", "{", "'", "2025-02-30", "0x_"])
def test_an_override_whose_value_yaml_cannot_read_is_refused(tmp_path, value):
    (line,) = refused(tmp_path, "", f"run_dir={value}")
    assert "run_dir" in line


def test_an_override_of_an_entry_of_a_list_is_refused(tmp_path):
    (line,) = refused(
        tmp_path, "optimizer: {groups: [{match: a, lr: 0.1}]}", "optimizer.groups.0.lr=0.2"
    )
    assert "optimizer.groups" in line


def test_an_override_does_not_hide_a_section_that_is_not_a_mapping(tmp_path):
    (line,) = refused(tmp_path, "optimizer: Adam", "optimizer.lr=0.1")
    assert "optimizer" in line
    assert "Adam" in line


@pytest.mark.parametrize(
    "content",
    [
        b"data: [",
        b"data: {batch_size: 1",
        b"a: b: c",
        b"\tdata: 1",
        b"data: \x00",
        b"\xff\xfe\xfa",
        b"- data\n- model",
        b"just words",
        b"3",
        b"run_dir: !!python/object/apply:os.getcwd []",
        b"run_dir: 2025-02-30",
    ],
)
def test_a_file_that_is_not_a_yaml_mapping_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "given.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        recipes.load(path)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{path}: ")


@pytest.mark.parametrize(
    "text",
    ["seed: 1\nseed: 2", "model: {width: 8}\ndata: {}\nmodel: {}", "data: {root: a, root: b}"],
)
def test_a_key_that_appears_twice_is_refused_with_its_line(tmp_path, text):
    (line,) = refused(tmp_path, text)
    assert re.search(r": line \d: .*the key (seed|model|root) appears twice$", line)


@pytest.mark.parametrize("name", ["nowhere.yaml", "folder"])
def test_a_recipe_that_does_not_exist_is_refused_in_one_line(tmp_path, name):
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError) as caught:
        recipes.load(tmp_path / name)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{tmp_path / name}: ")


MAGMA = "lr_dropout: {kind: magma, keep_prob: 0.25, score_start: 1}"


@pytest.mark.parametrize("text", ["", FULL, MAGMA], ids=["defaults", "full", "magma"])
def test_a_dump_reads_back_as_the_same_recipe(tmp_path, text):
    recipe = load(tmp_path, text)
    again = recipes.parse(yaml.safe_load(recipe.dump()), "dump")
    assert again == recipe
    assert again.result_settings() == recipe.result_settings()
    assert again.dump() == recipe.dump()


# The schedule: each scheduler has its own keys


def test_a_schedule_without_a_name_is_constant(tmp_path):
    for text in ("", "schedule:", "schedule: {}", "schedule: {name: constant}"):
        assert load(tmp_path, text).schedule == Recipe().schedule
    assert load(tmp_path, "schedule: {warmup_steps: 3}").schedule.name == "constant"


def test_a_key_of_another_scheduler_is_refused_with_the_right_keys(tmp_path):
    (line,) = refused(tmp_path, "schedule: {name: CosineAnnealingLR, gamma: 0.5}")
    expected = "schedule.gamma: unknown key; CosineAnnealingLR has name, unit, warmup_steps, T_max"
    assert f"{expected}, eta_min" in line


def test_another_scheduler_by_override_names_the_keys_that_are_left_over(tmp_path):
    text = "schedule: {name: MultiStepLR, milestones: [3], gamma: 0.1, warmup_steps: 5}"
    lines = refused(tmp_path, text, "schedule.name=CosineAnnealingLR")
    assert len(lines) == 2
    for key, line in zip(("milestones", "gamma"), lines, strict=True):
        assert f": schedule.{key}: unknown key; CosineAnnealingLR has name, unit, " in line
        assert line.endswith(f"(schedule.{key}=null leaves it out)")

    overrides = ["schedule.gamma=null", "schedule.milestones=null"]
    schedule = load(tmp_path, text, "schedule.name=CosineAnnealingLR", *overrides).schedule
    assert (schedule.name, schedule.warmup_steps) == ("CosineAnnealingLR", 5)
    assert schedule.arguments == {}


def test_a_misspelt_key_of_a_schedule_is_refused_even_without_a_value(tmp_path):
    (line,) = refused(tmp_path, "schedule: {name: StepLR, step_size: 3, gama: null}")
    assert "schedule.gama: unknown key; StepLR has " in line
    assert "did you mean gamma?" in line


def test_a_recipe_yaml_of_an_earlier_version_has_the_keys_of_all_schedulers(tmp_path):
    text = (
        "schedule: {name: StepLR, unit: epoch, warmup_steps: 0, metric: test_loss, step_size: 3, "
        "milestones: null, gamma: 0.5, T_max: null, lr_lambda: null, mode: null, min_lr: null}"
    )
    recipe = load(tmp_path, text)
    assert recipe == load(tmp_path, "schedule: {name: StepLR, step_size: 3, gamma: 0.5}")


@pytest.mark.parametrize("name", SCHEDULES)
def test_each_scheduler_has_the_arguments_of_torchs_class(name):
    """A misspelt key in the schema would be refused by torch only when it is used."""
    keys = set(SCHEDULES[name].model_fields) - set(ScheduleSection.model_fields) - {"metric"}
    if name == "constant":
        assert not keys
    elif name == "SequentialLR":
        assert keys == {"schedules", "milestones"}  # torch takes schedulers that were built
    else:
        assert keys <= set(inspect.signature(getattr(lr_scheduler, name)).parameters)


# The settings that a resume compares


@pytest.mark.parametrize(
    "override",
    [
        "run_dir=elsewhere",
        "data.root=/elsewhere",
        "trainer.epochs=99",
        "trainer.max_steps=7",
        "trainer.device=cpu",
        "trainer.eval_every=3",
        "trainer.fingerprint_every=3",
        "checkpoint.every_steps=3",
        "checkpoint.keep_last=9",
        "checkpoint.keep_best=false",
        "checkpoint.allow_changed=true",
        "tracking.every_steps=3",
        "tracking.probes=0",
    ],
)
def test_where_and_how_long_does_not_affect_the_results(tmp_path, override):
    before = load(tmp_path, FULL)
    after = load(tmp_path, FULL, override)
    assert after != before
    assert after.result_settings() == before.result_settings()


@pytest.mark.parametrize(
    "override",
    [
        "optimizer.lr=0.5",
        "optimizer.weight_decay=0.5",
        "optimizer.alpha=0.99",
        "optimizer.name=SGD",
        "optimizer.groups=[]",
        "data.batch_size=192",
        "data.augment=none",
        "model.width=16",
        "lr_dropout.keep_prob=0.5",
        "lr_dropout.seed=3",
        "lr_dropout={keep_prob: 0.25, granularity: row, rescale: true}",
        "lr_dropout={kind: magma, keep_prob: 0.25}",
        "schedule.gamma=0.5",
        "schedule.warmup_steps=6",
        "trainer.accumulation_steps=4",
        "trainer.clip_norm=null",
        "trainer.precision=fp32",
        "seed=1",
    ],
)
def test_what_affects_the_results_is_among_the_compared_settings(tmp_path, override):
    before = load(tmp_path, FULL)
    after = load(tmp_path, FULL, override)
    assert after.result_settings() != before.result_settings()


def test_lr_dropout_is_a_difference_even_if_it_drops_nothing(tmp_path):
    without = load(tmp_path, "")
    with_dropout = load(tmp_path, "", "lr_dropout.keep_prob=1")
    assert without.result_settings() != with_dropout.result_settings()


def test_a_kind_has_its_defaults_and_none_of_the_other_kinds(tmp_path):
    dropout = load(tmp_path, "lr_dropout: {}").lr_dropout
    assert dropout.arguments == {
        "keep_prob": 0.5,
        "granularity": "element",
        "rescale": False,
        "masks": "update",
    }
    magma = load(tmp_path, "lr_dropout: {kind: magma}").lr_dropout
    assert magma.arguments == {"keep_prob": 0.5, "tau": 2.0}


def test_the_kind_of_lr_dropout_is_compared_unless_it_is_the_one_of_earlier_versions(tmp_path):
    for text in ("lr_dropout: {}", "lr_dropout: {kind: dropout}"):
        assert "lr_dropout.kind" not in load(tmp_path, text).result_settings()

    settings = load(tmp_path, "lr_dropout: {kind: magma}").result_settings()
    given = load(tmp_path, "lr_dropout: {kind: magma, tau: 2}").result_settings()
    assert given == settings
    compared = {key: value for key, value in settings.items() if key.startswith("lr_dropout.")}
    assert {key: value for key, value in compared.items() if value is not None} == {
        "lr_dropout.kind": "magma",
        "lr_dropout.keep_prob": 0.5,
        "lr_dropout.seed": 0,
        "lr_dropout.tau": 2.0,
    }


def test_the_compared_settings_are_those_of_the_checkpoints_of_earlier_versions(tmp_path):
    """A resume compares them by key and value; a key that is not there counts as None."""
    text = """
    data: {batch_size: 64, root: elsewhere}
    optimizer: {name: RMSprop, alpha: 0.9, groups: [{match: "fc.*", lr: 0.2}]}
    lr_dropout: {keep_prob: 0.25}
    schedule: {name: CosineAnnealingLR, unit: step, warmup_steps: 20}
    trainer: {epochs: 8, clip_norm: 1.5}
    seed: 3
    """
    settings = load(tmp_path, text).result_settings()
    assert {key: value for key, value in settings.items() if value is not None} == {
        "data.dataset": "digits",
        "data.batch_size": 64,
        "data.augment": "none",
        "data.skip_corrupt": False,
        "model.arch": "resnet34",
        "model.width": 64,
        "model.sync_batchnorm": False,
        "optimizer.name": "RMSprop",
        "optimizer.lr": 0.1,
        "optimizer.alpha": 0.9,
        "optimizer.groups": [
            {
                "match": "fc.*",
                "name": None,
                "lr": 0.2,
                "weight_decay": None,
                "keep_prob": None,
            }
        ],
        "lr_dropout.keep_prob": 0.25,
        "lr_dropout.seed": 3,
        "lr_dropout.granularity": "element",
        "lr_dropout.rescale": False,
        "lr_dropout.masks": "update",
        "schedule.name": "CosineAnnealingLR",
        "schedule.unit": "step",
        "schedule.warmup_steps": 20,
        "schedule.metric": "test_loss",
        "trainer.precision": "fp32",
        "trainer.accumulation_steps": 1,
        "trainer.clip_norm": 1.5,
        "seed": 3,
    }


@pytest.mark.parametrize("compression", ["none", "bf16"])
def test_gradient_compression_is_compared_if_it_is_used(tmp_path, compression):
    settings = load(tmp_path, "", f"trainer.gradient_compression={compression}").result_settings()
    assert settings.get("trainer.gradient_compression") == (
        None if compression == "none" else compression
    )


def test_shards_do_not_affect_the_results_and_exclude_compression(tmp_path):
    settings = load(tmp_path, "").result_settings()
    assert load(tmp_path, "", "trainer.sharding=full").result_settings() == settings
    with pytest.raises(UserError, match=r"must be 'none' with trainer\.sharding=full") as caught:
        load(tmp_path, "", "trainer.sharding=full", "trainer.gradient_compression=bf16")
    assert "trainer.gradient_compression: is 'bf16'" in str(caught.value)


def test_the_exchange_of_kept_elements_does_not_affect_the_results_and_needs_sgd(tmp_path):
    kept = ("lr_dropout.keep_prob=0.5", "trainer.gradient_exchange=kept")
    settings = load(tmp_path, "", kept[0]).result_settings()
    assert load(tmp_path, "", *kept).result_settings() == settings
    with pytest.raises(
        UserError, match=r"trainer\.gradient_exchange: .* with optimizer\.name=Adam"
    ):
        load(tmp_path, "", *kept, "optimizer.name=Adam")
    with pytest.raises(UserError, match=r"trainer\.gradient_exchange: .* without lr_dropout"):
        load(tmp_path, "", "lr_dropout=null", kept[1])


def test_histograms_of_updates_need_whole_parameters(tmp_path):
    assert load(tmp_path, "", "tracking.histograms_every=10").tracking.histograms_every == 10
    with pytest.raises(UserError, match=r"tracking\.histograms_every: is 10, must be 0 with trai"):
        load(tmp_path, "", "tracking.histograms_every=10", "trainer.sharding=full")


def test_all_settings_but_the_folders_are_shared_by_the_ranks(tmp_path):
    recipe = load(tmp_path, FULL)
    keys = set()
    for name, section in recipe.model_dump().items():
        keys |= {f"{name}.{key}" for key in section} if isinstance(section, dict) else {name}
    assert set(recipe.settings_shared_by_ranks()) == keys - {"data.root", "data.workers", "run_dir"}


# The table of keys in the documents


def all_sections() -> list[type[Section]]:
    sections = [Recipe, OptimizerGroup]
    for field in Recipe.model_fields.values():
        sections += section_types(field)
    return sections


@pytest.mark.parametrize("section", all_sections(), ids=lambda section: section.__name__)
def test_every_key_is_marked_and_described(section):
    for key, field in section.model_fields.items():
        assert isinstance(get_mark(field, "affects_results"), bool), key
        assert isinstance(get_mark(field, "shared_by_ranks"), bool), key
        assert field.description, key


def test_the_table_of_keys_in_the_documents_is_the_one_of_the_schema():
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert text == reference.insert_table(text), (
        "regenerate it: python -m lrd.recipe.reference docs/recipes.md"
    )


def test_a_document_without_markers_is_refused():
    with pytest.raises(ValueError, match="keys: begin"):
        reference.insert_table("no markers")


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("optimizer.lr=fast", "optimizer.lr=fast: optimizer.lr: is 'fast', should be"),
        ("optimizer={lr: fast}", "optimizer={lr: fast}: optimizer.lr: is 'fast', should be"),
        ("modle.width=3", "modle.width=3: modle: unknown key;"),
        ("seed=-1", "seed=-1: seed: is -1, should be"),
    ],
)
def test_an_error_in_an_override_names_the_override(tmp_path, override, line):
    path = tmp_path / "recipe.yaml"
    path.write_text("model: {width: 0}\n")
    with pytest.raises(UserError) as caught:
        recipes.load(path, [override])
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert any(text.startswith(line) for text in lines)
    assert any(text.startswith(f"{path}: model.width: is 0, should be") for text in lines)


@pytest.mark.parametrize(
    ("override", "name"),
    [
        ("schedule.name=steplr", "StepLR"),
        ("trainer.precision=FP32", "fp32"),
        ("data.dataset=cifar1O", "cifar10"),
        ("trainer.epoch=3", "epochs"),
    ],
)
def test_a_wrong_name_gets_a_suggestion(tmp_path, override, name):
    path = tmp_path / "recipe.yaml"
    path.write_text("")
    with pytest.raises(UserError, match=rf"did you mean {name}\?"):
        recipes.load(path, [override])


def test_the_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / "recipe.yaml"
    path.write_text("run_dir: ~/x\ndata: {root: ~/img}\n")
    recipe = recipes.load(path)
    assert recipe.run_dir == str(tmp_path / "x")
    assert recipe.data.root == str(tmp_path / "img")
    with pytest.raises(UserError, match="run_dir: is '~nobody-here/x'"):
        recipes.load(path, ["run_dir=~nobody-here/x"])


@pytest.mark.parametrize(
    "text",
    [
        "seed: &x [*x]\n",
        "optimizer: &x {groups: [*x]}\n",
        "optimizer:\n  k: &a [1,1,1,1,1,1,1,1,1,1]\n"
        + "".join(
            f"  k{i}: &{'abcdefg'[i]} [{','.join(['*' + 'abcdefg'[i - 1]] * 10)}]\n"
            for i in range(1, 7)
        ),
        "seed: " + "[" * 2000 + "]" * 2000,
    ],
    ids=["list in itself", "section in itself", "alias bomb", "deep"],
)
def test_yaml_without_end_is_one_short_line(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        recipes.load(path)
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)
