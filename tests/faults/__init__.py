"""The fault campaign: real jobs that are killed, stopped, starved and lied to, and must end like one left alone."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # `launching` lies there; pytest has it on its path already
