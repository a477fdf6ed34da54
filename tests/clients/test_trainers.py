"""Lightning's Trainer and Hugging Face's: bit for bit what the same trainer does masked by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lrd
from lrd import LRDropout
from tests.clients.reference import assert_same_bits, masked_by_hand, values
from tests.clients.small_training import loss_of, make_batch, make_model, train

NEEDED = "`make clients` installs it"
lightning = pytest.importorskip("lightning", reason=NEEDED)
transformers = pytest.importorskip("transformers", reason=NEEDED)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("one_thread"),
]

OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.01}),
}
SEED = 6
N_BATCHES = 6  # in an epoch


# Lightning


class LightningModel(lightning.LightningModule):
    """A model with its optimizer, which Lightning asks for when training begins."""

    def __init__(self, make_optimizer, make_scheduler=None):
        super().__init__()
        self.model = make_model()
        self.make_optimizer = make_optimizer
        self.make_scheduler = make_scheduler

    def training_step(self, batch, _):
        features, labels = batch
        return nn.functional.cross_entropy(self.model(features), labels)

    def configure_optimizers(self):
        optimizer = self.make_optimizer(self.model.parameters())
        if self.make_scheduler is None:
            return optimizer

        scheduler = {"scheduler": self.make_scheduler(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def train_dataloader(self):
        batches = [make_batch(step) for step in range(N_BATCHES)]
        features = torch.cat([features for features, _ in batches])
        labels = torch.cat([labels for _, labels in batches])
        return DataLoader(TensorDataset(features, labels), batch_size=8, shuffle=False)


def fit(module, *, max_epochs=2, ckpt_path=None, **arguments):
    trainer = lightning.Trainer(
        max_epochs=max_epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **arguments,
    )
    trainer.fit(module, ckpt_path=ckpt_path)
    return trainer


def with_lr_dropout(name, seed=SEED, keep_prob=0.5):
    """A function of parameters that makes an optimizer with LRDropout, as a user writes it."""
    cls, arguments = OPTIMIZERS[name]

    def make_optimizer(params):
        optimizer = cls(params, **arguments)
        LRDropout(optimizer, keep_prob=keep_prob, seed=seed)
        return optimizer

    return make_optimizer


def by_hand(name, seed=SEED, keep_prob=0.5):
    cls, arguments = OPTIMIZERS[name]
    return lambda params: masked_by_hand(cls, keep_prob=keep_prob, seed=seed)(params, **arguments)


@pytest.mark.parametrize("use_kernels", ["0", "1"])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.1},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_lightning(name, arguments, use_kernels, monkeypatch):
    monkeypatch.setenv("LRD_FUSED", use_kernels)
    module = LightningModel(with_lr_dropout(name))
    fit(module, **arguments)
    expected = LightningModel(by_hand(name))
    fit(expected, **arguments)
    assert_same_bits(list(module.parameters()), list(expected.parameters()))


def one_cycle(optimizer):
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=2 * N_BATCHES + 1)


def test_lightning_with_a_scheduler_of_steps():
    module = LightningModel(with_lr_dropout("SGD"), one_cycle)
    fit(module)
    expected = LightningModel(by_hand("SGD"), one_cycle)
    fit(expected)
    assert_same_bits(list(module.parameters()), list(expected.parameters()))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_under_lightning_are_taken_in_one_pass(name, monkeypatch):
    """Lightning gives each step a closure that computes the gradients."""
    monkeypatch.setenv("LRD_FUSED", "1")
    module = LightningModel(with_lr_dropout(name))
    trainer = fit(module, max_epochs=1)
    assert lrd.optim.dropout.get_lr_dropout(trainer.optimizers[0]).is_fused


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_lightning_resumes_in_a_fresh_trainer(name, tmp_path):
    checkpoint = tmp_path / "last.ckpt"
    module = LightningModel(with_lr_dropout(name))
    fit(module, max_epochs=1).save_checkpoint(checkpoint)

    # The seed of the new one does not count, that of the checkpoint does.
    resumed = LightningModel(with_lr_dropout(name, seed=SEED + 1))
    fit(resumed, max_epochs=3, ckpt_path=checkpoint)
    uninterrupted = LightningModel(by_hand(name))
    fit(uninterrupted, max_epochs=3)
    assert_same_bits(list(resumed.parameters()), list(uninterrupted.parameters()))


class ManualModel(LightningModel):
    """A model that steps its optimizer itself, through Lightning's wrapper around it."""

    def __init__(self, make_optimizer, attach=lambda optimizer: None):
        super().__init__(make_optimizer)
        self.automatic_optimization = False
        self.attach = attach

    def on_train_start(self):
        self.attach(self.optimizers())

    def training_step(self, batch, number):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, number))
        optimizer.step()


def test_lightning_with_manual_optimization():
    module = ManualModel(with_lr_dropout("SGD"))
    fit(module)
    expected = ManualModel(by_hand("SGD"))
    fit(expected)
    assert_same_bits(list(module.parameters()), list(expected.parameters()))


def test_lr_dropout_attached_to_lightnings_wrapper():
    cls, arguments = OPTIMIZERS["SGD"]
    module = ManualModel(
        lambda params: cls(params, **arguments),
        lambda wrapper: LRDropout(wrapper, seed=SEED),
    )
    fit(module)
    expected = ManualModel(by_hand("SGD"))
    fit(expected)
    assert_same_bits(list(module.parameters()), list(expected.parameters()))


@pytest.mark.parametrize("attach_to", ["before setup", "the wrapper"])
def test_lightning_fabric(attach_to):
    cls, arguments = OPTIMIZERS["SGD"]
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    model = make_model()
    optimizer = cls(model.parameters(), **arguments)
    if attach_to == "before setup":
        LRDropout(optimizer, seed=SEED)
    wrapped_model, wrapper = fabric.setup(model, optimizer)
    if attach_to == "the wrapper":
        LRDropout(wrapper, seed=SEED)

    for step in range(4):
        wrapper.zero_grad()
        fabric.backward(loss_of(wrapped_model, step))
        wrapper.step()

    by_hand_model = make_model()
    expected = train(by_hand_model, by_hand("SGD")(by_hand_model.parameters()), range(4))
    assert_same_bits(list(model.parameters()), expected)


# Hugging Face's Trainer


def make_language_model():
    """A GPT-2 of 2,000 elements, whose input and output embeddings are tied."""
    config = transformers.GPT2Config(
        vocab_size=17,
        n_positions=8,
        n_embd=16,
        n_layer=1,
        n_head=2,
        n_inner=16,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config)


def make_tokens():
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 17, (24, 8), generator=generator)
    return [{"input_ids": row, "labels": row} for row in tokens]


def hugging_face_trainer(folder, model, *, max_steps=6, optimizers=(None, None), **arguments):
    optimizer_cls_and_kwargs = arguments.pop("optimizer_cls_and_kwargs", None)
    settings = {
        "output_dir": str(folder),
        "max_steps": max_steps,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "seed": 0,
        **arguments,
    }
    return transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(**settings),
        train_dataset=make_tokens(),
        optimizers=optimizers,
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
    )


def train_language_model(folder, make_optimizer, **arguments):
    """Train with an optimizer of the model's parameters that the user makes."""
    model = make_language_model()
    optimizer = make_optimizer(model.parameters())
    hugging_face_trainer(folder, model, optimizers=(optimizer, None), **arguments).train()
    return values(list(model.parameters()))


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"bf16": True},
        {"gradient_accumulation_steps": 2},
        {"max_grad_norm": 0.1},
        {"lr_scheduler_type": "linear", "warmup_steps": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_hugging_face(name, arguments, tmp_path):
    params = train_language_model(tmp_path, with_lr_dropout(name), **arguments)
    expected = train_language_model(tmp_path, by_hand(name), **arguments)
    assert_same_bits(params, expected)


def test_hugging_face_makes_the_optimizer_from_a_class_of_lrd(tmp_path):
    """The trainer makes two groups: with weight decay and without."""
    arguments = {"lr": 1e-2, "weight_decay": 0.1}
    results = []
    for cls, more in (
        (lrd.optim.AdamW, {"keep_prob": 0.5, "seed": SEED}),
        (masked_by_hand(torch.optim.AdamW, seed=SEED), {}),
    ):
        model = make_language_model()
        trainer = hugging_face_trainer(
            tmp_path, model, optimizer_cls_and_kwargs=(cls, {**arguments, **more})
        )
        trainer.train()
        assert len(trainer.optimizer.param_groups) == 2
        results.append(values(list(model.parameters())))

    assert_same_bits(*results)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_hugging_face_resumes(name, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 3}
    train_language_model(tmp_path, with_lr_dropout(name), max_steps=3, **saving)

    model = make_language_model()
    optimizer = with_lr_dropout(name, seed=SEED + 1)(model.parameters())
    trainer = hugging_face_trainer(tmp_path, model, optimizers=(optimizer, None), **saving)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))

    expected = train_language_model(tmp_path / "uninterrupted", by_hand(name))
    assert_same_bits(values(list(model.parameters())), expected)
