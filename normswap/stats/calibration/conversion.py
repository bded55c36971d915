"""Calibration as the last step of a conversion."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

from torch import nn

from normswap.errors import StatisticsError, TooUnfaithful
from normswap.norms.fidelity import Fidelity
from normswap.randomness import kept_random_state
from normswap.stats.calibration.calibrate import calibrate
from normswap.stats.feed import device_of, forward_arguments, moved
from normswap.swap.changes import Changes
from normswap.swap.journal import records

__all__ = ["Fitting"]


class Fitting:
    """Fits what a conversion could not start as the source.

    Args:
        model: what is to be converted.
        loader: any iterable of batches.
        min_fidelity: the least fidelity that is wanted in the end.
    """

    def __init__(
        self, model: nn.Module, loader: Iterable[Any], min_fidelity: str | Fidelity | None
    ) -> None:
        self._model, self._loader = model, loader
        self._wanted = min_fidelity
        self._earlier = {norm for norm, _ in records(model).values()}

    @property
    def planned_fidelity(self) -> str | Fidelity | None:
        """The least fidelity that the plan itself has to have."""
        return None if self._wanted == Fidelity.CALIBRATED else self._wanted

    def first_inputs(self) -> Any:
        """What the model's forward takes of the first batch, which is kept to be read again.

        Raises:
            StatisticsError: there is no batch.
        """
        try:
            with kept_random_state():
                batches = iter(self._loader)
                first = next(batches)
        except StopIteration:
            raise StatisticsError(
                "calibrate= yields no batch, so there is nothing to fit on; is the loader used up?"
            ) from None
        if batches is self._loader:  # else it can be read from the start once more
            self._loader = chain([first], batches)
        args, kwargs = forward_arguments(self._model, first)
        return moved(kwargs or args, device_of(self._model, None))

    def fit(self, model: nn.Module) -> None:
        """Calibrate what the conversion could not make exact in eval mode, if there is any.

        Args:
            model: the converted model.

        Raises:
            StatisticsError: it cannot be fitted.
            TooUnfaithful: something is less faithful than is wanted.
        """
        norms = set(self._worse_than(Fidelity.NEAR, model).values())
        if not norms:
            return
        tensors = (t for norm in norms for t in (*norm.parameters(), *norm.buffers()))
        before = Changes(writes=[(tensor, tensor.detach().clone()) for tensor in tensors])
        try:
            calibrate(model, self._loader, where=lambda site: site.module in norms)
            self._refuse_less_than_wanted(model)
        except BaseException:
            before.make(model)  # the tensors that the conversion itself had left alone, too
            raise

    def _refuse_less_than_wanted(self, model: nn.Module) -> None:
        worse = self._worse_than(Fidelity.CALIBRATED, model)
        if worse and self._wanted == Fidelity.CALIBRATED:
            raise TooUnfaithful(
                f"min_fidelity={self._wanted!s} cannot be kept, since these cannot be "
                f"calibrated: {', '.join(worse)}; leave them out by skip=, or accept less"
            )

    def _worse_than(self, fidelity: Fidelity, model: nn.Module) -> dict[str, nn.Module]:
        """The norms that this conversion has made and that are less faithful, by path."""
        return {
            path: norm
            for path, (norm, record) in records(model).items()
            if norm not in self._earlier and record.fidelity.rank > fidelity.rank
        }
