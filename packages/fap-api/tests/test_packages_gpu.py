"""The back ends that call other packages, with the real packages, where they are installed."""

from __future__ import annotations

import pytest
import torch

import fap_api
from fap_kernels.installed import importable
from fap_testing.cases import Case, select
from fap_testing.conformance import AttentionConformance, Subject, check_case

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # its import has some
    pytest.mark.gpu,
    pytest.mark.skipif(not importable("flag_gems"), reason="needs FlagGems: pip install 'fap-api[flaggems]'"),
]


def flag_gems(*args, **options):
    """flash_attn_func on FlagGems, which has no backward."""
    with fap_api.use_backend("flag_gems"), torch.no_grad():
        return fap_api.flash_attn_func(*args, **options)


SUBJECT = Subject(
    attention=flag_gems,
    dtypes=(torch.bfloat16, torch.float16),
    device="cuda",
    unsupported={
        "backward",
        "lse_gradient",
        "dropout",
        "alibi",
        "zero_length",
        "causal",  # but for whole blocks of queries, see WHOLE_BLOCKS
        "window",
    },
)

WHOLE_BLOCKS = [
    Case(
        name=f"whole_blocks_{name}", batch=2, nheads=4, nheads_k=2, seqlen_q=256, head_dim=head_dim, **options
    )
    for head_dim in (64, 128, 256)
    for name, options in {
        f"full_{head_dim}": {"seqlen_k": 256},
        f"causal_{head_dim}": {"seqlen_k": 256, "causal": True},
        f"causal_longer_keys_{head_dim}": {"seqlen_k": 300, "causal": True, "softcap": 5.0},
        f"window_{head_dim}": {"seqlen_k": 300, "window_size": (60, 20)},
    }.items()
]


class TestFlagGems(AttentionConformance):
    subject = SUBJECT
    cases = [case for case in select("quick") if case.name.startswith(("heads", "gqa", "combined", "layout"))]


@pytest.mark.parametrize("case", WHOLE_BLOCKS, ids=str)
@pytest.mark.parametrize("dtype", SUBJECT.dtypes, ids=str)
def test_flag_gems_computes_causal_and_windowed_calls_of_whole_query_blocks(case, dtype):
    subject = Subject(
        attention=flag_gems,
        dtypes=SUBJECT.dtypes,
        device="cuda",
        unsupported={"backward", "lse_gradient"},
    )
    check_case(subject, case, dtype)
