"""Norms that cannot do without an extra input, which tests of norms that take none leave out."""

from __future__ import annotations

REQUIRING = frozenset({"cond_bn", "cond_in", "cond", "rn_b", "adacon", "spade", "sean"})
