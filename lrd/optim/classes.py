"""torch's optimizers with learning rate dropout, as drop-in classes.

::

    optimizer = lrd.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, keep_prob=0.5, seed=0)

Each class is torch's class with :class:`lrd.LRDropout` attached. It takes torch's arguments and, by
keyword, those of ``LRDropout``.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch.optim import Optimizer

from lrd.optim.dropout import LRDropout

# Follows the docstring of each class; {name} stands for the class's name.
_SHARED_DOCSTRING = r"""
.. math::
    \begin{aligned}
        &\textbf{for} \: t=0 \: \textbf{to} \: \ldots \: \textbf{do} \\
        &\hspace{5mm} \theta' \leftarrow
            \text{one step of {name} from } \theta, \text{ its state with it} \\
        &\hspace{5mm} m_i \leftarrow
            \mathbb{1}[u_i(\text{seed}, t, \text{parameter}) < \text{keep\_prob}]
            \quad \text{for each element } i \\
        &\hspace{5mm} \textbf{if} \: \text{rescale}: \quad
            \theta' \leftarrow \theta + (\theta' - \theta) / \text{keep\_prob} \\
        &\hspace{5mm} \theta_i \leftarrow
            \theta'_i \: \textbf{if} \: m_i = 1 \: \textbf{else} \: \theta_i
    \end{aligned}

The other arguments of :class:`torch.optim.{name}` follow ``params`` in torch's order.

Args:
    params (iterable): parameters or parameter groups, as for :class:`torch.optim.{name}`
    keep_prob (float, optional): probability that an element moves in a step, in (0, 1]. A parameter
        group may have its own (default: 0.5, the paper's; 1: {name} itself, bit for bit)
    seed (int, optional): seed of the masks, the same on every rank (default: 0)
    granularity (str, optional): which elements share one draw: 'element', 'row', 'column',
        'tensor' (default: 'element')
    rescale (bool, optional): divide a kept element's update by keep_prob (default: False, as in
        the paper)
    masks (str, optional): what is masked, see :class:`lrd.LRDropout` (default: 'update')
    first_index (int, optional): index of the first parameter in the position of its masks, where a
        model has several optimizers (default: 0)
    index_by (str, optional): 'order', or 'name' for masks that depend on a parameter's name and not
        on its place, see :class:`lrd.LRDropout` (default: 'order')

Differences from the authors' code (arXiv 1912.00144): keep_prob has no default of 0, at which
nothing moves. Momentum, Nesterov and weight decay are torch's, in every combination, and weight
decay is not written into the gradient. A dropped element does not move at all, not even by weight
decay, be it coupled or decoupled.
"""


class _Masked:
    """Mixin that comes before torch's class: it attaches ``LRDropout`` to what torch constructs."""

    def __init__(
        self,
        params: Any,
        *args: Any,
        keep_prob: float = 0.5,
        seed: int = 0,
        granularity: str = "element",
        rescale: bool = False,
        masks: str = "update",
        first_index: int = 0,
        index_by: str = "order",
        **kwargs: Any,
    ) -> None:
        super().__init__(params, *args, **kwargs)  # type: ignore[call-arg]

        assert isinstance(self, Optimizer)
        LRDropout(
            self,
            keep_prob=keep_prob,
            seed=seed,
            granularity=granularity,
            rescale=rescale,
            masks=masks,
            first_index=first_index,
            index_by=index_by,
        )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Complete the signature and the docstring of each class below."""
        super().__init_subclass__(**kwargs)

        # A user's class that derives from one of them describes itself.
        if _Masked not in cls.__bases__:
            return

        _, stock_class = cls.__bases__
        stock_parameters = list(inspect.signature(stock_class).parameters.values())
        dropout_parameters = [
            parameter
            for parameter in inspect.signature(_Masked.__init__).parameters.values()
            if parameter.kind is parameter.KEYWORD_ONLY
        ]
        cls.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [*stock_parameters, *dropout_parameters]
        )

        first_lines = inspect.cleandoc(cls.__doc__ or "")
        cls.__doc__ = first_lines + "\n" + _SHARED_DOCSTRING.replace("{name}", cls.__name__)


class SGD(_Masked, torch.optim.SGD):
    """SGD with learning rate dropout.

    The momentum buffer keeps accumulating in dropped elements, with Nesterov too.
    """


class Adam(_Masked, torch.optim.Adam):
    """Adam with learning rate dropout.

    Both moments keep accumulating in dropped elements, and so does AMSGrad's maximum.
    """


class AdamW(_Masked, torch.optim.AdamW):
    """AdamW with learning rate dropout.

    Decoupled weight decay is part of the update, so it does not touch dropped elements.
    """


class Adamax(_Masked, torch.optim.Adamax):
    """Adamax with learning rate dropout.

    The moment and the infinity norm keep accumulating in dropped elements.
    """


class NAdam(_Masked, torch.optim.NAdam):
    """NAdam with learning rate dropout.

    Both moments keep accumulating in dropped elements.
    """


class RAdam(_Masked, torch.optim.RAdam):
    """RAdam with learning rate dropout.

    Both moments keep accumulating in dropped elements.
    """


class Adagrad(_Masked, torch.optim.Adagrad):
    """Adagrad with learning rate dropout.

    The sum of squares keeps accumulating in dropped elements.
    """


class Adadelta(_Masked, torch.optim.Adadelta):
    """Adadelta with learning rate dropout.

    Its average of squared updates includes updates that were dropped.
    """


class RMSprop(_Masked, torch.optim.RMSprop):
    """RMSprop with learning rate dropout.

    The square average, the momentum buffer and the mean keep accumulating in dropped elements.
    """


class Rprop(_Masked, torch.optim.Rprop):
    """Rprop with learning rate dropout.

    The step sizes follow the signs of the gradients, in dropped elements too.
    """


class ASGD(_Masked, torch.optim.ASGD):
    """ASGD with learning rate dropout.

    Its average ``ax`` is of the values before dropped elements are restored.
    """


class SparseAdam(_Masked, torch.optim.SparseAdam):
    """SparseAdam with learning rate dropout.

    Rows without gradient do not move anyway; the mask is drawn for all elements.
    """


class Adafactor(_Masked, torch.optim.Adafactor):
    """Adafactor with learning rate dropout.

    Its factored moments keep accumulating in dropped elements.
    """


class Muon(_Masked, torch.optim.Muon):
    """Muon with learning rate dropout.

    The momentum buffer keeps accumulating in dropped elements. The update is orthogonalized as a
    whole before its elements are dropped. Decoupled weight decay is part of the update, so it does
    not touch dropped elements. Muon takes matrices only.
    """
