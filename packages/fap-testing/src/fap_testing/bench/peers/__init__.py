"""The implementations that can be measured, by name. A new one is a class in a file here and a line below.

One that lives elsewhere needs neither: ``--peers my_module:MyPeer`` imports it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from fap_testing.bench.peers.base import Peer
from fap_testing.bench.peers.fap import FapApi, FapModule
from fap_testing.bench.peers.fap_kernels import FapDense, FapHopper, FapHopperDense, FapKernels, FapTriton
from fap_testing.bench.peers.flag_gems import FlagGems
from fap_testing.bench.peers.flash_attn_2 import FlashAttention2
from fap_testing.bench.peers.flash_attn_3 import FlashAttention3
from fap_testing.bench.peers.flash_attn_4 import FlashAttention4
from fap_testing.bench.peers.flex import FlexAttention
from fap_testing.bench.peers.sdpa import Sdpa, SdpaCudnn, SdpaFlash
from fap_testing.bench.peers.xformers import Xformers

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["PEERS", "Peer", "register", "select_peers"]

PEERS: dict[str, type[Peer]] = {}


def register(peer: type[Peer]) -> type[Peer]:
    """Make a peer known by its name; also a decorator, for one that lives elsewhere.

    Raises:
        ValueError: the name is taken.
    """
    if peer.name in PEERS:
        raise ValueError(f"a peer's name must be new, got {peer.name!r}")
    PEERS[peer.name] = peer
    return peer


for _peer in (
    FapApi,
    FapTriton,
    FapHopper,
    FapDense,
    FapHopperDense,
    FapKernels,
    FapModule,
    Sdpa,
    SdpaFlash,
    SdpaCudnn,
    FlexAttention,
    FlashAttention2,
    FlashAttention3,
    FlashAttention4,
    FlagGems,
    Xformers,
):
    register(_peer)


def select_peers(names: Sequence[str], backends: Sequence[str], *, command: str) -> list[Peer]:
    """Return the peers of these names, or, without names, those that a subcommand measures by itself.

    Args:
        names: of :data:`PEERS`, or ``module:Class``; "fap" and "fap-nn" stand once for each back end.
        backends: of fap_api, or "auto" for its own choice.
        command: the subcommand.

    Raises:
        ValueError: an unknown name, or a class that is no peer.
    """
    unknown = [name for name in names if name not in PEERS and ":" not in name]
    if unknown:
        raise ValueError(
            f"peers must be any of {', '.join(PEERS)}, or module:Class, got {', '.join(unknown)}"
        )
    if not names:
        asked = [peer for peer in PEERS.values() if not peer.commands or command in peer.commands]
    else:
        asked = [PEERS.get(name) or _imported(name) for name in dict.fromkeys(names)]
    return [variant for peer in asked for variant in peer.variants(backends)]


def _imported(name: str) -> type[Peer]:
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"the peer {name} cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Peer)):
        raise ValueError(f"the peer {name} must be a subclass of {Peer.__module__}.Peer, got {found!r}")
    return found
