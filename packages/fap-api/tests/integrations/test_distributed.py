"""Attention over parts, by processes that talk over gloo or NCCL, against one with the whole."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fap_api.integrations import _ring
from fap_api.integrations.context_parallel import context_parallel_attention, shard_sequence

SCRIPT = Path(__file__).with_name("distributed_rank.py")


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
@pytest.mark.parametrize(
    ("device", "world_size"),
    [
        ("cpu", 2),
        ("cpu", 4),
        pytest.param(
            "cuda",
            2,
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
            ],
        ),
    ],
)
def test_parts_give_what_the_whole_gives(device, world_size, tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if device == "cpu":
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    arguments = str(world_size), str(tmp_path / "store"), device
    numbers = [str(rank) for rank in range(world_size)]
    if device == "cpu" and sys.platform == "linux":
        numbers = [",".join(numbers)]  # which start from one process that has imported everything
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(SCRIPT), number, *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in numbers
    ]
    try:
        outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    failed = [text for rank, text in zip(ranks, outputs, strict=True) if rank.returncode]
    assert not failed, "\n".join(failed)


def test_merging_two_halves_of_the_keys_gives_attention_to_all():
    q, k, v = torch.randn(3, 1, 6, 2, 8)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k)

    def attend(keys):
        lse = scores[..., keys].logsumexp(-1)
        p = (scores[..., keys] - lse[..., None]).exp()
        return torch.einsum("bhqk,bkhd->bqhd", p, v[:, keys]), lse

    (out, lse), (part, part_lse), (right, right_lse) = map(attend, (slice(4), slice(4, 6), slice(6)))
    _ring.merge(out, lse, part, part_lse)
    torch.testing.assert_close(out, right)
    torch.testing.assert_close(lse, right_lse)


def test_a_mesh_that_is_none_is_refused():
    x = torch.randn(1, 8, 2, 8)
    for call in (lambda: context_parallel_attention(x, x, x, mesh=2), lambda: shard_sequence(x, 2)):
        with pytest.raises(TypeError, match="mesh must be a DeviceMesh, .* got int"):
            call()


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_causal_work_is_equal_on_every_device(world_size):
    def pairs(rank, owner):
        queries, keys, causal = _ring._block(rank, owner, True, 8)
        count = (queries.stop - queries.start) * (keys.stop - keys.start)
        return count // 2 if causal else count

    steps = [
        [pairs(rank, (rank - step) % world_size) for rank in range(world_size)] for step in range(world_size)
    ]
    assert all(len(set(step)) == 1 for step in steps)
