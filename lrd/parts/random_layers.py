"""Seeds for what draws from the global random generators: dropout, stochastic depth, own losses.

Random layers read torch's global generator. Its state is in no checkpoint, and it differs between
ranks. Seeded before each forward pass, it gives numbers that are a function of a position, like all
else that is random in a run.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from lrd import philox
from lrd import recipe as recipes
from lrd.generators import set_generators
from lrd.philox import Domain
from lrd.recipe.schema import is_own


def needs_seeds(recipe: recipes.Recipe) -> bool:
    """Whether a forward or backward pass may draw random numbers.

    The built-in networks and losses draw none. What the others do is not looked into: a layer may
    draw in some steps only, and to seed the generators takes 20 microseconds.
    """
    return is_own(recipe.model.arch) or is_own(recipe.trainer.loss)


def seed_generators(seed: int, step: int, micro_step: int, rank: int, device: torch.device) -> None:
    """Seed the global generators of torch, NumPy and Python from a position.

    Args:
        seed: the recipe's.
        step: optimizer steps done.
        micro_step: forward passes done in this step.
        rank: the ranks draw different numbers.
        device: what the rank computes on; its generator is seeded beside the CPU's.
    """
    position = (step, micro_step, rank)
    words = philox.words(seed, Domain.LAYERS, position, first_block=0, n_blocks=1).tolist()

    set_generators(words[0], words[1], words[2])
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(words[0])


def read_generators(device: torch.device) -> tuple[object, ...]:
    """The states of the global generators, which can be compared: did something draw from them?

    Args:
        device: its generator is read beside the CPU's.
    """
    torch_states = [torch.get_rng_state()]
    if device.type == "cuda":
        torch_states.append(torch.cuda.get_rng_state(device))

    numpy_state: Any = np.random.get_state(legacy=False)
    numpy_position = (numpy_state["state"]["pos"], numpy_state["has_gauss"])
    # NumPy's position starts again after 624 draws, and then its key is another one.
    numpy_key = numpy_state["state"]["key"].tobytes()
    torch_bytes = tuple(state.numpy().tobytes() for state in torch_states)
    return (*torch_bytes, numpy_position, numpy_key, random.getstate())
