"""The recipe: defaults, file, overrides; what it refuses and how; what it calls the same run."""

from pathlib import Path

import pytest
import yaml

from lrd import recipe as recipes
from lrd.errors import UserError
from lrd.recipe import Recipe

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))

FULL = """
data: {dataset: imagefolder, root: /somewhere, batch_size: 96, image_size: 24, augment: crop_flip, padding: 2}
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
    optimizer = load(tmp_path, "optimizer: {name: RMSprop, alpha: 0.5}", "optimizer.lr=0.7").optimizer
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
    short, plain = (load(tmp_path, "", f"{key}={value}") for value in ("1e-3", "0.001"))
    assert short.mathematics()[key] == 0.001
    assert short.digest() == plain.digest()


def test_1e_3_is_a_number_within_lists_and_groups(tmp_path):
    text = "optimizer: {{betas: [0.9, {0}], etas: [{0}], groups: [{{match: a, lr: {0}, alpha: {0}}}]}}"
    short, plain = (load(tmp_path, text.format(value)) for value in ("1e-3", "0.001"))
    assert short == plain
    assert short.optimizer.betas == (0.9, 0.001)
    assert short.optimizer.arguments == {"etas": [0.001]}
    assert short.optimizer.groups[0].arguments == {"alpha": 0.001}


def test_lr_dropout_is_off_unless_asked_for(tmp_path):
    for text in ("", "lr_dropout:", "lr_dropout: null"):
        assert load(tmp_path, text).lr_dropout is None
        assert load(tmp_path, text, "lr_dropout.keep_prob=0.5").lr_dropout.keep_prob == 0.5
    assert load(tmp_path, "lr_dropout: {keep_prob: 0.5}", "lr_dropout=null").lr_dropout is None


def test_masks_are_seeded_by_the_recipe_unless_they_have_a_seed_of_their_own(tmp_path):
    text = "seed: 5\nlr_dropout: {keep_prob: 0.5}"
    assert load(tmp_path, text).mask_seed == 5
    assert load(tmp_path, text, "lr_dropout.seed=6").mask_seed == 6
    assert load(tmp_path, text).digest() == load(tmp_path, text, "lr_dropout.seed=5").digest()


@pytest.mark.parametrize("keep_prob", ["1", "1.0", "0.5", "1e-9"])
def test_keep_prob_from_above_0_to_1_is_good(tmp_path, keep_prob):
    assert load(tmp_path, "", f"lr_dropout.keep_prob={keep_prob}").lr_dropout.keep_prob == float(keep_prob)


@pytest.mark.parametrize("keep_prob", ["0", "-0.5", "1.0001", "2", ".nan", ".inf", "true", "half", "[0.5]"])
def test_any_other_keep_prob_is_refused(tmp_path, keep_prob):
    (line,) = refused(tmp_path, "", f"lr_dropout.keep_prob={keep_prob}")
    assert "lr_dropout.keep_prob: " in line
    (line,) = refused(tmp_path, f"lr_dropout: {{}}\noptimizer: {{groups: [{{match: a, keep_prob: {keep_prob}}}]}}")
    assert "optimizer.groups.0.keep_prob: " in line


@pytest.mark.parametrize(
    ("text", "key", "said"),
    [
        ("optimiser: {lr: 1}", "optimiser", "did you mean optimizer?"),
        ("data: {batchsize: 1}", "data.batchsize", "did you mean batch_size?"),
        ("lr_dropout: {keep_probability: 1}", "lr_dropout.keep_probability", "did you mean keep_prob?"),
        ("tracking: {zzz: 1}", "tracking.zzz", "every_steps"),
        ("data: {batch_size: many}", "data.batch_size", "'many'"),
        ("data: {batch_size: 1.5}", "data.batch_size", "1.5"),
        ("data: {batch_size: [1]}", "data.batch_size", "[1]"),
        ("data: {root: 3}", "data.root", "string"),
        ("data: {dataset: mnist}", "data.dataset", "'digits'"),
        ("model: resnet18", "model", "'resnet18'"),
        ("lr_dropout: 0.5", "lr_dropout", "0.5"),
        ("optimizer: {betas: [0.9]}", "optimizer.betas.1", "missing"),
        ("optimizer: {groups: [{lr: 1}]}", "optimizer.groups.0.match", "missing"),
        ("optimizer: {lr: }", "optimizer.lr", "None"),
        ("optimizer: {lr: -0.1}", "optimizer.lr", "-0.1"),
        ("optimizer: {lr: .nan}", "optimizer.lr", "nan"),
        ("optimizer: {lr: .inf}", "optimizer.lr", "finite"),
        ("data: {batch_size: 0}", "data.batch_size", "greater than 0"),
        ("trainer: {epochs: 0}", "trainer.epochs", "greater than 0"),
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
def test_a_fault_is_one_line_that_names_the_key(tmp_path, text, key, said):
    (line,) = refused(tmp_path, text)
    assert line.startswith(f"{tmp_path / 'given.yaml'}: {key}: ")
    assert said in line


def test_all_faults_are_listed(tmp_path):
    lines = refused(tmp_path, "data: {batchsize: 1}\nmodel: {width: 0}\nseed: true", "trainer.precision=fp64")
    assert len(lines) == 4
    for key in ("data.batchsize", "model.width", "seed", "trainer.precision"):
        assert sum(f": {key}: " in line for line in lines) == 1


@pytest.mark.parametrize("override", ["optimizer.lr", "=0.1", "optimizer..lr=0.1", ".lr=0.1", "optimizer.=0.1", ""])
def test_a_malformed_override_is_refused(tmp_path, override):
    (line,) = refused(tmp_path, "", override)
    assert line.startswith(f"{override}: ")
    assert "section.key=value" in line


@pytest.mark.parametrize("value", ["[1", "{", "'", "2025-02-30", "0x_"])
def test_an_override_whose_value_yaml_cannot_read_is_refused(tmp_path, value):
    (line,) = refused(tmp_path, "", f"run_dir={value}")
    assert "run_dir" in line


def test_an_override_of_an_entry_of_a_list_is_refused(tmp_path):
    (line,) = refused(tmp_path, "optimizer: {groups: [{match: a, lr: 0.1}]}", "optimizer.groups.0.lr=0.2")
    assert "optimizer.groups" in line


def test_an_override_does_not_hide_a_section_that_is_no_mapping(tmp_path):
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
def test_a_file_that_is_no_yaml_mapping_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "given.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        recipes.load(path)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{path}: ")


@pytest.mark.parametrize("name", ["nowhere.yaml", "folder"])
def test_a_recipe_that_is_not_there_is_refused_in_one_line(tmp_path, name):
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError) as caught:
        recipes.load(tmp_path / name)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{tmp_path / name}: ")


@pytest.mark.parametrize("text", ["", FULL], ids=["defaults", "full"])
def test_a_dump_reads_back_as_the_same_recipe(tmp_path, text):
    recipe = load(tmp_path, text)
    again = recipes.parse(yaml.safe_load(recipe.dump()), "dump")
    assert again == recipe
    assert again.digest() == recipe.digest()
    assert again.dump() == recipe.dump()


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
def test_where_and_how_long_is_no_part_of_the_mathematics(tmp_path, override):
    was, now = load(tmp_path, FULL), load(tmp_path, FULL, override)
    assert now != was
    assert now.mathematics() == was.mathematics()
    assert now.digest() == was.digest()


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
        "schedule.gamma=0.5",
        "schedule.warmup_steps=6",
        "trainer.accumulation_steps=4",
        "trainer.clip_norm=null",
        "trainer.precision=fp32",
        "seed=1",
    ],
)
def test_what_decides_about_the_numbers_changes_mathematics_and_digest(tmp_path, override):
    was, now = load(tmp_path, FULL), load(tmp_path, FULL, override)
    assert now.mathematics() != was.mathematics()
    assert now.digest() != was.digest()


def test_switching_lr_dropout_on_changes_the_digest_even_where_it_drops_nothing(tmp_path):
    assert load(tmp_path, "").digest() != load(tmp_path, "", "lr_dropout.keep_prob=1").digest()


@pytest.mark.parametrize("section", [None, *Recipe.model_fields])
def test_the_documents_name_every_key(section):
    text = (ROOT / "docs" / "recipes.md").read_text()
    parts = {"lr_dropout": recipes.LRDropout}
    model = Recipe if section is None else parts.get(section, Recipe.model_fields[section].annotation)
    keys = model.model_fields if hasattr(model, "model_fields") else {}
    assert [key for key in keys if f"`{key}`" not in text] == []
