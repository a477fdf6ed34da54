"""`trainer.ema_decay`: a moving average of the weights, evaluated and saved beside the network."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class WeightAverage:
    """Exponential moving average of a network's weights and buffers (torch's `AveragedModel`).

    The first update copies them; each later one makes the average
    `decay * average + (1 - decay) * network`. Integers, such as BatchNorm's count of batches, are
    averaged likewise and rounded towards zero.

    Only BatchNorm's statistics differ between the ranks: those of rank 0 count, as they do in the
    network itself.

    Args:
        model: the network, without DDP.
        decay: in (0, 1).

    Attributes:
        network: the network with the averaged weights.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._averaged = AveragedModel(
            model,
            multi_avg_fn=get_ema_multi_avg_fn(decay),  # type: ignore[no-untyped-call]
            use_buffers=True,
        )
        self._averaged.requires_grad_(False)

    @property
    def network(self) -> nn.Module:
        return self._averaged.module

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take the weights after a step into the average."""
        self._averaged.update_parameters(model)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights and buffers, by their names in the network."""
        return {name: tensor.detach() for name, tensor in self.network.state_dict().items()}

    def load_state_dict(self, state: dict[str, Tensor], num_updates: int) -> None:
        """Go on from saved averages.

        Args:
            state: what `state_dict` returned.
            num_updates: how many updates they contain.

        Raises:
            RuntimeError: they are of another network.
        """
        self.network.load_state_dict(state)
        self._averaged.n_averaged.fill_(num_updates)

    def begin_at(self, model: nn.Module) -> None:
        """Forget what was averaged; the next update copies the network's weights."""
        self.load_state_dict(model.state_dict(), num_updates=0)
