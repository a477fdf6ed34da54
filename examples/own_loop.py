"""A plain training loop with learning rate dropout. Stop it, start it again, and it continues.

python examples/own_loop.py state.pt
"""

import sys
from pathlib import Path

import torch
from torch import nn

import lrd

state_path = Path(sys.argv[1])
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
lrd.LRDropout(optimizer, keep_prob=0.5, seed=0)  # under DDP: the same seed on every rank

first_step = 0
if state_path.exists():
    state = torch.load(state_path, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])  # seed and update count of the masks are in it
    first_step = state["step"]

for step in range(first_step, 200):
    # The batch depends only on the step, so a resumed run sees the same batches as an
    # uninterrupted one.
    inputs = torch.randn(128, 8, generator=torch.Generator().manual_seed(step))
    targets = inputs.abs().sum(dim=1, keepdim=True)

    loss = nn.functional.mse_loss(model(inputs), targets)
    loss.backward()
    optimizer.step()  # about half of the elements move, the others keep their bits
    optimizer.zero_grad()

    if (step + 1) % 20 == 0:
        print(f"step {step + 1}: loss {loss.item():.4f}")
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
        torch.save(state, state_path)
