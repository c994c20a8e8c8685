"""In which order programs add to memory, where the sum must not depend on chance.

Each tile of memory has a counter of the additions that are done. A program waits until all of those before
its own are, adds, waits until its own addition has arrived, and counts it. What it works on it waits for by
key tiles of smaller number alone. These were begun before, since the hardware starts programs in the order of
their numbers; or, where programs stay, they were drawn before, by programs that run and work on what they
draw in the order of numbers. So the smallest that is not done can always go on.

Where chance may have its way, but memory shall not be zeroed before, the first program that visits a tile
stores, and alone counts that it has. All others wait for that, and add in any order; of them all it has the
smallest number.

The TMA unit adds. PTX calls what it does the asynchronous proxy: an addition that is known to be complete is
visible to the thread that waited for it, and so to whoever sees that thread count (release and acquire). The
last one may read the sum then; but between seeing the count and having the TMA unit add, a fence must stand.
"""

from __future__ import annotations

from typing import Any

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin

from .compat import assemble

__all__ = ["count_when_added", "count_when_stored", "wait_for", "wait_until_added"]

_WAIT = """{
.reg .pred missing;
.reg .u32 seen;
again:
ld.acquire.gpu.global.u32 seen, [$1];
setp.lt.u32 missing, seen, $2;
@missing bra again;
fence.proxy.async.global;
mov.u32 $0, seen;
}"""

# All lanes wait, but only the one that had the TMA unit add has anything to wait for. It is elected again.
_COUNT = """{
.reg .pred elected;
cp.async.bulk.wait_group 0;
elect.sync _|elected, 0xffffffff;
@elected red.release.gpu.global.add.u32 [$1], 1;
mov.u32 $0, 0;
}"""

# What the other lanes have stored is visible to the one that counts once all have come to the barrier, and so
# to whoever sees it count.
_COUNT_STORED = """{
.reg .pred elected;
bar.warp.sync 0xffffffff;
elect.sync _|elected, 0xffffffff;
@elected red.release.gpu.global.add.u32 [$1], 1;
mov.u32 $0, 0;
}"""


@builtin
def wait_for(counter: Any, additions: Any, _semantic: Any = None) -> None:
    """Wait until the int32 at address ``counter`` says that so many additions are done."""
    assemble(_WAIT, [_address(counter, _semantic), additions], _semantic, "lr")


@builtin
def count_when_added(counter: Any, _semantic: Any = None) -> None:
    """Wait until all that this warp had the TMA unit add has arrived in memory, and count one addition."""
    assemble(_COUNT, [_address(counter, _semantic)], _semantic, "l")


@builtin
def count_when_stored(counter: Any, _semantic: Any = None) -> None:
    """Count once for this warp, behind all that its lanes have stored."""
    assemble(_COUNT_STORED, [_address(counter, _semantic)], _semantic, "l")


@builtin
def wait_until_added(_semantic: Any = None) -> None:
    """Wait until all that this thread had the TMA unit add has arrived in memory."""
    assemble("cp.async.bulk.wait_group 0; mov.u32 $0, 0;", [], _semantic)


def _address(pointer: Any, semantic: Any) -> Any:
    return semantic.cast(pointer, gl.int64)
