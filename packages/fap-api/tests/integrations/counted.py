"""Which passes a back end ran: the proof that a call came here and went nowhere else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

PASSES = ("forward", "backward", "varlen_forward", "varlen_backward")


@contextmanager
def counted_passes(backend: type) -> Iterator[list[str]]:
    """The names of the passes that ``backend`` runs meanwhile, in order."""
    ran: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in PASSES:
            method = getattr(backend, name)

            def spy(self, *arguments, _method=method, _name=name):
                ran.append(_name)
                return _method(self, *arguments)

            patch.setattr(backend, name, spy)
        yield ran
