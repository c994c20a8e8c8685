"""Packed sequences: each as if it were alone, whatever lies before, behind and between them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from fap_kernels import attention_varlen_backward, attention_varlen_forward, target
from fap_testing.cases import Case
from fap_testing.expectation import expect
from fap_testing.inputs import CaseInputs, make_inputs

NAN = float("nan")
LENGTHS = {
    "uneven": ((5, 40, 1, 17), (7, 33, 20, 48)),
    "empty_queries": ((0, 16, 0), (9, 16, 3)),
    "empty_keys": ((9, 16, 3), (0, 16, 0)),
    "one_token_each": ((1, 1, 1), (0, 40, 17)),
    "one_as_long_as_the_rest": ((3, 70, 4), (3, 70, 4)),
    "alone": ((33,), (50,)),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window_size": (6, 3), "softcap": 3.0},
    "dropout": {"causal": True, "dropout_p": 0.3},
}


class Packed:
    """Sequences packed into tensors of NaN: between them where ``slack`` leaves rows unused, and around."""

    def __init__(
        self, lengths: tuple[tuple[int, ...], tuple[int, ...]], *, dtype: torch.dtype, device: str,
        alibi: bool = False, slack: int = 0, head_dim: int = 16, **options: Any,
    ) -> None:  # fmt: skip
        self.options = options
        self.lengths = lengths
        self.sequences = [
            make_inputs(_case(b, q, k, head_dim, options), dtype=dtype, device=device)
            for b, (q, k) in enumerate(zip(*lengths, strict=True))
        ]
        self.slopes = torch.rand(len(self.sequences), 4, device=device) if alibi else None
        self.starts = [self._starts(side, slack) for side in lengths]
        names = {"q": 0, "k": 1, "v": 1, "dout": 0}
        self.tensors = {name: self._pack(name, self.starts[side]) for name, side in names.items()}
        self.dlse = torch.randn(4, self.starts[0][-1], device=device)
        used = (
            [torch.tensor(side, dtype=torch.int32, device=device) for side in lengths]
            if slack
            else [None] * 2
        )
        self.bounds = {
            "cu_seqlens_q": torch.tensor(self.starts[0], dtype=torch.int32, device=device),
            "cu_seqlens_k": torch.tensor(self.starts[1], dtype=torch.int32, device=device),
            "max_seqlen_q": max(lengths[0]) + slack,
            "max_seqlen_k": max(lengths[1]) + slack,
            "seqused_q": used[0],
            "seqused_k": used[1],
        }

    def run(self, rng_state: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        q, k, v, dout = self.tensors.values()
        options = self.options | ({} if self.slopes is None else {"alibi_slopes": self.slopes})
        out, lse, rng_state = attention_varlen_forward(q, k, v, **self.bounds, rng_state=rng_state, **options)
        dq, dk, dv = attention_varlen_backward(
            dout, q, k, v, out, lse, **self.bounds, dlse=self.dlse, rng_state=rng_state, **options
        )
        return {"out": out, "softmax_lse": lse.T, "dq": dq, "dk": dk, "dv": dv}

    def check(self, results: dict[str, torch.Tensor], keep_masks: list[torch.Tensor | None]) -> None:
        for b, (inputs, keep_mask) in enumerate(zip(self.sequences, keep_masks, strict=True)):
            rows = [slice(s[b], s[b] + side[b]) for s, side in zip(self.starts, self.lengths, strict=True)]
            slopes = None if self.slopes is None else self.slopes[b]
            alone = dataclasses.replace(inputs, dlse=self.dlse[None, :, rows[0]], alibi_slopes=slopes)
            mine = {
                name: x[rows[name in ("dk", "dv")]][None]
                for name, x in results.items()
                if name != "softmax_lse"
            }
            mine["softmax_lse"] = results["softmax_lse"][rows[0]].T[None]
            expect(alone, keep_mask=keep_mask).check(**mine)

    def check_unused(self, results: dict[str, torch.Tensor]) -> None:
        for name, x in results.items():
            side = name in ("dk", "dv")
            used = torch.zeros(len(x), dtype=torch.bool)
            for start, length in zip(self.starts[side][:-1], self.lengths[side], strict=True):
                used[start : start + length] = True
            unused = x[~used.to(x.device)]
            assert (unused == (torch.inf if name == "softmax_lse" else 0)).all(), name

    @staticmethod
    def _starts(lengths: tuple[int, ...], slack: int) -> list[int]:
        return [0, *torch.tensor([n + slack for n in lengths]).cumsum(0).tolist()]

    def _pack(self, name: str, starts: list[int]) -> torch.Tensor:
        like = getattr(self.sequences[0], name)
        around = 32
        buffer = like.new_full((starts[-1] + 2 * around, *like.shape[2:]), NAN)
        packed = buffer[around : around + starts[-1]]
        for start, inputs in zip(starts, self.sequences, strict=False):
            rows = getattr(inputs, name)[0]
            packed[start : start + len(rows)] = rows
        return packed


def _case(index: int, seqlen_q: int, seqlen_k: int, head_dim: int, options: dict[str, Any]) -> Case:
    return Case(
        name=f"sequence_{index}", seqlen_q=seqlen_q, seqlen_k=seqlen_k, nheads=4, nheads_k=2,
        head_dim=head_dim, **options,
    )  # fmt: skip


def check(packed: Packed) -> None:
    dropout_p = packed.options.get("dropout_p", 0.0)
    device = packed.dlse.device
    rng_state = torch.tensor([2**40 + 3, 5], device=device) if dropout_p else None
    results = packed.run(rng_state)
    keep_masks = [_keep_mask(b, x, dropout_p, rng_state) for b, x in enumerate(packed.sequences)]
    packed.check(results, keep_masks)
    packed.check_unused(results)


def _keep_mask(
    index: int, inputs: CaseInputs, dropout_p: float, rng_state: torch.Tensor | None
) -> torch.Tensor | None:
    """The mask of the dense call whose entry ``index`` has this sequence's lengths."""
    if not dropout_p:
        return None
    from fap_kernels import attention_probabilities

    q, k = (x.expand(index + 1, *x.shape[1:]).contiguous() for x in (inputs.q, inputs.k))
    lse = torch.zeros(index + 1, 4, q.shape[1], device=q.device)
    weights = attention_probabilities(q, k, lse, dropout_p=dropout_p, rng_state=rng_state)
    return ~torch.signbit(weights[index:, :, : q.shape[1], : k.shape[1]])


@pytest.mark.interpreter
@pytest.mark.parametrize("options", ["causal", "window"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_every_sequence_is_as_if_alone(lengths: Any, options: str) -> None:
    check(Packed(lengths, dtype=torch.float32, device="cpu", **OPTIONS[options]))


@pytest.mark.interpreter
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_rows_beyond_seqused_do_not_count(options: dict[str, Any]) -> None:
    check(Packed(LENGTHS["uneven"], dtype=torch.float32, device="cpu", slack=7, **options))


@pytest.mark.interpreter
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_descriptors(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles fetched by descriptor, as on Hopper, do not read the neighbours."""
    monkeypatch.setattr(target, "INTERPRETER", dataclasses.replace(target.INTERPRETER, descriptors=True))
    check(Packed(LENGTHS["uneven"], dtype=torch.float32, device="cpu", slack=7, **options))


@pytest.mark.interpreter
def test_alibi_slopes_of_each_sequence() -> None:
    check(Packed(LENGTHS["uneven"], dtype=torch.float32, device="cpu", alibi=True, causal=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [40, 59, 64, 128, 256])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("slack", [0, 7])
def test_on_a_gpu(options: dict[str, Any], head_dim: int, dtype: torch.dtype, slack: int) -> None:
    lengths = ((0, 300, 1, 513, 64), (17, 128, 0, 700, 64))
    check(Packed(lengths, dtype=dtype, device="cuda", head_dim=head_dim, slack=slack, **options))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cu_seqlens_q": torch.zeros(3, dtype=torch.int64)}, "cu_seqlens_q must have dtype int32"),
        ({"cu_seqlens_k": torch.zeros(4, dtype=torch.int32)}, r"cu_seqlens_k must have shape .*\(3,\)"),
        ({"cu_seqlens_q": torch.zeros(0, dtype=torch.int32)}, "cu_seqlens_q must have shape"),
        ({"seqused_k": torch.zeros(3, dtype=torch.int32)}, r"seqused_k must have shape \(batch,\) = \(2,\)"),
        ({"cu_seqlens_q": [0, 1, 2]}, "cu_seqlens_q must be a torch.Tensor, got list"),
        ({"max_seqlen_q": 1.5}, "max_seqlen_q must be an integer, got float"),
        ({"max_seqlen_k": -1}, "max_seqlen_k must be at least 0, got -1"),
        ({"q": torch.zeros(1, 8, 2, 16)}, r"q must have 3 dimensions \(total, nheads, headdim\)"),
        ({"q": None}, "q must be a torch.Tensor, got NoneType"),
        ({"k": torch.zeros(8, 2, 8)}, "k must have q's head dimension 16, got 8"),
    ],
)  # fmt: skip
def test_mistakes_are_named(changes: dict[str, Any], message: str) -> None:
    bounds = torch.tensor([0, 4, 8], dtype=torch.int32)
    arguments = dict.fromkeys(("q", "k", "v"), torch.zeros(8, 2, 16)) | {
        "cu_seqlens_q": bounds, "cu_seqlens_k": bounds, "max_seqlen_q": 4, "max_seqlen_k": 4,
    }  # fmt: skip
    with pytest.raises((RuntimeError, TypeError, ValueError), match=message):
        attention_varlen_forward(**arguments | changes)
