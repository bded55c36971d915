"""Norms as their formulas are written down: mean, var, subtract, divide, in plain torch.

What normswap's layers are measured against: the same parameters, the same buffers, the same
outputs, and autograd goes through all of it. One function a norm, by the norm's name.
"""

from __future__ import annotations

from .of_batch import FORMULAS as OF_BATCH
from .of_estimates import FORMULAS as OF_ESTIMATES
from .of_sample import FORMULAS as OF_SAMPLE
from .of_several import FORMULAS as OF_SEVERAL
from .parts import Formula, Textbook

__all__ = ["FORMULAS", "Textbook"]

FORMULAS: dict[str, Formula] = {**OF_BATCH, **OF_SAMPLE, **OF_SEVERAL, **OF_ESTIMATES}
