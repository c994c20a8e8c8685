"""Plans of earlier calls, so that a repeated call is checked once."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch

from fap_api.backends import select
from fap_kernels.alike import Alike

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

__all__ = ["Plans"]

_MOST_PLANS = 4096
_Plan = TypeVar("_Plan")


class _Kept(Generic[_Plan]):
    """A plan, all it depends on but the tensors, and what knows such tensors at once."""

    __slots__ = ("alike", "plan", "rest")

    def __init__(self, plan: _Plan, rest: Hashable, alike: Alike) -> None:
        self.plan = plan
        self.rest = rest
        self.alike = alike


class Plans(Generic[_Plan]):
    """Plans by everything that they depend on, the last one's at hand.

    Gradient mode and what chooses a back end are part of it.
    """

    __slots__ = ("_kept", "_last")

    def __init__(self) -> None:
        self._kept: dict[Hashable, _Kept[_Plan]] = {}
        self._last: _Kept[_Plan] | None = None

    def get(
        self,
        tensors: Sequence[torch.Tensor | None],
        rest: Hashable,
        make: Callable[..., _Plan],
        arguments: Sequence[Any],
    ) -> _Plan:
        """The plan of an earlier call, or ``make(*arguments)``.

        Args:
            tensors: the call's tensors. A plan may depend on all there is to know of them but values and
                addresses.
            rest: what else it depends on, of types whose equal values stand for each other.
        """
        state = torch.is_grad_enabled(), select.explicit_choice(), os.environ.get(select.ENVIRONMENT)
        rest = (rest, state)
        last = self._last
        if last is not None and last.rest == rest and last.alike.match(tensors):
            return last.plan
        try:
            key = (_facts(tensors), rest)
            kept = self._kept.get(key)
        except (AttributeError, TypeError, RuntimeError):
            # A symbolic size, a nested tensor, which has no shape, or something that is no tensor at all.
            return make(*arguments)
        if kept is None:
            kept = _Kept(make(*arguments), rest, Alike(tensors))
            if len(self._kept) >= _MOST_PLANS:
                self._kept.clear()
            self._kept[key] = kept
        elif kept is last:
            # The dispatcher's state is another one, as under torch.inference_mode().
            kept.alike = Alike(tensors)
        self._last = kept
        return kept.plan

    def clear(self) -> None:
        """Forget all of them, as when another back end has come to be there."""
        self._kept.clear()
        self._last = None


def _facts(tensors: Sequence[torch.Tensor | None]) -> Hashable:
    return tuple(
        [
            None if x is None else (x.shape, x.stride(), x.dtype, x.device, x.layout, x.requires_grad)
            for x in tensors
        ]
    )
