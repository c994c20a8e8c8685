"""The kernels' promises are ones that fap-bench can look up."""

from __future__ import annotations

from pathlib import Path

import pytest

from fap_testing.bench.decode import Decode
from fap_testing.bench.peers import PEERS
from fap_testing.bench.prefill import Prefill
from fap_testing.bench.problem import DIRECTIONS
from fap_testing.bench.promises import Promise, load_promises
from fap_testing.bench.record import METRICS
from fap_testing.bench.varlen import Varlen

ROOT = Path(__file__).parents[1]
PROMISES = load_promises(ROOT / "packages/fap-kernels/benchmarks/promises.json")
HEADS = {"nheads": 8, "nheads_k": 8, "head_dim": 64}
PROBLEMS = {
    "prefill": Prefill(batch=1, seqlen_q=1, seqlen_k=1, **HEADS),
    "varlen": Varlen(lengths=(1, 2), **HEADS),
    "decode": Decode(lengths=(1, 2), **HEADS),
}
PROBLEMS |= {"overhead": PROBLEMS["prefill"], "memory": PROBLEMS["prefill"]}
MEASURES = {"tflops", "gbps", "ratio", *METRICS.values()}


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: f"{promise.peer} {promise.where}")
def test_a_promise_names_what_there_is(promise: Promise) -> None:
    where = dict(promise.where)
    terms = PROBLEMS[where.pop("command")].to_dict()
    directions = where.pop("direction", "fwd")
    assert set(directions if isinstance(directions, list) else [directions]) <= set(DIRECTIONS)
    assert where.keys() <= terms.keys(), "no row has such a size"
    assert promise.times is None or promise.times.keys() <= {"peer", "direction", *terms}
    for peer in (promise.peer, (promise.times or {}).get("peer", promise.peer)):
        assert peer.partition(":")[0] in PEERS
    assert promise.measure is None or promise.measure in MEASURES
    assert promise.why
