"""Repeating a call without planning it: with stand-ins for Triton's compiled kernels, and on a GPU."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch

from fap_kernels import (
    apply_rotary,
    attention_backward,
    attention_forward,
    attention_kvcache_forward,
    attention_varlen_backward,
    attention_varlen_forward,
    execute,
    kvcache_append,
    replay,
    target,
    use_schedule,
    varlen,
)
from fap_kernels.alike import Alike
from fap_kernels.launch import Launch
from fap_kernels.replay import Replay, Replays

if TYPE_CHECKING:
    from collections.abc import Callable


class Compiled:
    """What Triton's JIT returns, as far as a replay needs it; it writes down how it is launched."""

    packed_metadata, function = (4,), 77

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def launch_metadata(self, *_: Any) -> None:
        return None

    def run(self, *arguments: Any) -> None:
        self.calls.append(arguments)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    monkeypatch.setattr(replay, "_empty", lambda *made: torch.empty_strided(*made[:2], dtype=made[2]))
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: 5, raising=False)


def launch_of(**arguments: Any) -> Launch:
    params = [SimpleNamespace(name=name) for name in arguments]
    return Launch(SimpleNamespace(params=params), 12, arguments, 4)


def test_a_replay_launches_its_own_tensors(on_cpu: None) -> None:
    from triton.tools.tensor_descriptor import TensorDescriptor

    q, k, out = torch.zeros(4, 16), torch.ones(4, 16), torch.empty(4, 16)
    tile = TensorDescriptor(k, [4, 16], [16, 1], [2, 16])
    launch = launch_of(q=q, q_strides=(16, 1), k=None, k_part0=tile, scale=0.5, out=out, BLOCK=2)
    compiled = Compiled()
    replay = Replay.of([(launch, compiled)], {"q": q, "k": k}, {"out": out})
    assert replay is not None
    new_q, new_k = torch.rand(4, 16), torch.rand(4, 16)
    (made,) = replay.run(new_q, new_k)
    assert made.shape == out.shape
    ((x, y, z, stream, function, packed, metadata, _, _, *values),) = compiled.calls
    assert (x, y, z, stream, function, packed, metadata) == (12, 1, 1, 5, 77, (4,), None)
    assert values[0] is new_q
    assert values[1:3] == [(16, 1), None]
    assert values[3].base is new_k
    assert (values[3].shape, values[3].strides, values[3].block_shape) == ([4, 16], [16, 1], [2, 16])
    assert values[4] == 0.5
    assert values[5] is made
    assert values[6] == 2


def test_a_replay_keeps_no_tensor_alive(on_cpu: None) -> None:
    from triton.tools.tensor_descriptor import TensorDescriptor

    q = torch.zeros(4, 16)
    launch = launch_of(q_part0=TensorDescriptor(q, [4, 16], [16, 1], [2, 16]), q=q)
    replay = Replay.of([(launch, Compiled())], {"q": q}, {})
    gone = weakref.ref(q)
    del q, launch
    gc.collect()
    assert replay is not None
    assert gone() is None


def test_a_call_that_launched_a_copy_is_not_kept(on_cpu: None) -> None:
    q = torch.zeros(4, 16)
    assert Replay.of([(launch_of(q=q.clone()), Compiled())], {"q": q}, {}) is None
    assert Replay.of([(launch_of(other=q), Compiled())], {"q": q}, {}) is None


def test_a_call_on_another_device_than_the_current_is_not_kept(
    on_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It launches on that device, and a replay on the current one."""
    q = torch.zeros(4, 16)
    launched = [(launch_of(q=q), Compiled())]
    assert Replay.of(launched, {"q": q}, {}) is not None
    monkeypatch.setattr(torch.Tensor, "get_device", lambda _: 1)
    assert Replay.of(launched, {"q": q}, {}) is None


def test_an_append_and_a_rotation_are_kept(on_cpu: None) -> None:
    """Every tensor of their launches is found among those given."""
    from fap_kernels.cache import Cache
    from fap_kernels.decode.launch import plan_append
    from fap_kernels.rotary.launch import plan_rotary

    cache, k, cos = torch.zeros(2, 32, 2, 16), torch.zeros(2, 1, 2, 16), torch.zeros(32, 4)
    v_cache, v, sin, out = (x.clone() for x in (cache, k, cos, k))
    lengths, index = torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    places = Cache.describe(k, cache, lengths, cache_batch_idx=index)
    append = plan_append(cache, v_cache, k, v, places, (cos, sin), True)
    given = {
        "k_cache": cache, "v_cache": v_cache, "k": k, "v": v, "cache_seqlens": lengths,
        "cache_batch_idx": index, "block_table": None, "cos": cos, "sin": sin,
    }  # fmt: skip
    assert Replay.of([(append, Compiled())], given, {}) is not None

    turn = plan_rotary(k, out, cos, sin, lengths, None, 1, interleaved=False, conjugate=False)
    given = {"x": k, "out": None, "cos": cos, "sin": sin, "offsets": lengths, "cu_seqlens": None}
    compiled = Compiled()
    replay = Replay.of([(turn, compiled)], given, {"out": out})
    assert replay is not None
    (made,) = replay.run(*given.values())
    (call,) = compiled.calls
    launched = dict(zip((x.name for x in turn.kernel.params), call[9:], strict=True))
    assert launched["x"] is k
    assert launched["out"] is made
    assert made.shape == out.shape


class TestWhatIsAlike:
    """Python's way to tell calls apart is a key, and the quick one a guard of PyTorch's compiler."""

    KINDS: ClassVar[dict[str, Callable[[], Any]]] = {
        "size": lambda: torch.zeros(2, 8, 4, 17),
        "rank": lambda: torch.zeros(2, 8, 4),
        "dtype": lambda: torch.zeros(2, 8, 4, 16, dtype=torch.float16),
        "strides": lambda: torch.zeros(2, 4, 8, 16).transpose(1, 2),
        "alignment": lambda: torch.zeros(2 * 8 * 4 * 16 + 1)[1:].view(2, 8, 4, 16),
        "gradient": lambda: torch.zeros(2, 8, 4, 16, requires_grad=True),
        "class": lambda: torch.nn.Parameter(torch.zeros(2, 8, 4, 16)),
        "device": lambda: torch.zeros(2, 8, 4, 16, device="meta"),
        "sparse": lambda: torch.zeros(2, 8, 4, 16).to_sparse(),
        "mkldnn": lambda: torch.zeros(2, 8, 4, 16).to_mkldnn(),
        "nested": lambda: torch.nested.nested_tensor([torch.zeros(8, 4, 16)] * 2),
        "jagged": lambda: torch.nested.nested_tensor([torch.zeros(8, 4, 16)] * 2, layout=torch.jagged),
        "functional": lambda: torch._to_functional_tensor(torch.zeros(2, 8, 4, 16)),
        "negative": lambda: torch._neg_view(torch.zeros(2, 8, 4, 16)),
        "text": lambda: "no tensor",
        "missing": lambda: None,
    }

    @staticmethod
    def draw() -> list[torch.Tensor | None]:
        return [torch.zeros(2, 8, 4, 16), None, torch.zeros(3, 5)]

    def test_new_tensors_of_the_same_kind_are(self) -> None:
        alike = Alike(self.draw())
        assert alike.match(self.draw())
        with torch.no_grad():
            assert alike.match(self.draw())

    @pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
    @pytest.mark.parametrize("kind", KINDS)
    def test_another_kind_is_not(self, kind: str) -> None:
        """Nor does anything go wrong in C++ for a layout that has no sizes or strides."""
        other = self.KINDS[kind]()
        first, *others = self.draw()
        alike = Alike([first, *others])
        assert not alike.match([other, *others])
        if isinstance(other, torch.Tensor):
            assert not Alike([other, *others]).match([first, *others])

    def test_what_is_missing_counts(self) -> None:
        """Where all sizes agree too, as those of seqused_q and seqused_k."""
        x = torch.zeros(4)
        assert not Alike([x, None]).match([None, x])
        assert not Alike([x, None]).match([x, x])
        assert not Alike([x, x]).match([x, None])

    def test_what_the_dispatcher_does_counts(self) -> None:
        alike = Alike(self.draw())
        with torch.inference_mode():
            assert not alike.match(self.draw())
            assert Alike(self.draw()).match(self.draw())

        def within(x: torch.Tensor) -> torch.Tensor:
            assert x.shape == (2, 8, 4, 16)
            assert not alike.match([x, *self.draw()[1:]])
            return x

        torch.func.vmap(within)(torch.zeros(3, 2, 8, 4, 16))

    def test_nothing_is_kept_alive(self) -> None:
        x = torch.zeros(4)
        gone = weakref.ref(x)
        alike = Alike([x])
        del x
        gc.collect()
        assert gone() is None
        assert alike.match([torch.zeros(4)])

    def test_where_pytorch_has_no_guard_nothing_is(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delattr(torch._C._dynamo.guards, "TensorGuards")
        assert not Alike(self.draw()).match(self.draw())


class TestTheLastCall:
    """It is found by the quick way, and no other call is."""

    OPTIONS = (0.5, True, (-1, -1), 1)

    @pytest.fixture(autouse=True)
    def as_if_on_a_gpu(self, on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> list[object]:
        """Facts of tensors on a CPU; those that had to be read."""
        read: list[object] = []

        def facts(tensors: Any) -> object:
            read.append([x.shape for x in tensors])
            return tuple(x.shape for x in tensors)

        monkeypatch.setattr(replay, "_facts", facts)
        return read

    @staticmethod
    def keep(replays: Replays, q: torch.Tensor, options: tuple[Any, ...]) -> Replay:
        key, nothing = replays.find((q,), options)
        assert nothing is None
        keep = replays.keeper(key, {"q": q})
        assert keep is not None
        keep([(launch_of(q=q), Compiled())], {})
        found = replays.find((q,), options)[1]
        assert found is not None
        return found

    def test_is_found_at_once(self, as_if_on_a_gpu: list[object]) -> None:
        replays, read = Replays(), as_if_on_a_gpu
        first = self.keep(replays, torch.zeros(2), self.OPTIONS)
        assert len(read) == 1, "when there was none"
        second = self.keep(replays, torch.zeros(3), self.OPTIONS)
        assert second is not first
        assert len(read) == 2
        for size, expected, reads in ((2, first, 1), (2, first, 0), (3, second, 1), (3, second, 0)):
            read.clear()
            assert replays.find((torch.zeros(size),), self.OPTIONS)[1] is expected
            assert len(read) == reads

    def test_is_found_again_under_inference_mode(self, as_if_on_a_gpu: list[object]) -> None:
        replays, read = Replays(), as_if_on_a_gpu
        kept = self.keep(replays, torch.zeros(2), self.OPTIONS)
        read.clear()
        with torch.inference_mode():
            for _ in range(3):
                assert replays.find((torch.zeros(2),), self.OPTIONS)[1] is kept
        assert len(read) == 1

    @pytest.mark.parametrize(
        "options",
        [
            (0.25, True, (-1, -1), 1),
            (0.5, 1, (-1, -1), 1),
            (0.5, True, (-1, 0), 1),
            (0.5, True, (-1.0, -1), 1),
            (0.5, True, [-1, -1], 1),
            (0.5, True, (-1, -1), True),
            (0.5, True, (-1, -1), torch.tensor(1)),
        ],
    )
    def test_is_not_one_with_other_options(self, options: tuple[Any, ...]) -> None:
        replays, q = Replays(), torch.zeros(2)
        kept = self.keep(replays, q, self.OPTIONS)
        assert replays.find((q,), options)[1] is None
        assert replays.find((q,), self.OPTIONS)[1] is kept

    def test_is_not_one_by_another_schedule(self) -> None:
        replays, q = Replays(), torch.zeros(2)
        kept = self.keep(replays, q, self.OPTIONS)
        with use_schedule("portable"):
            assert replays.find((q,), self.OPTIONS)[1] is None
        assert replays.find((q,), self.OPTIONS)[1] is kept

    def test_is_not_run_on_another_device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        replays, q = Replays(), torch.zeros(2)
        self.keep(replays, q, self.OPTIONS)
        monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 1)
        assert replays.find((q,), self.OPTIONS)[1] is None


class TestPackedSequences:
    """Every tensor of a call over packed sequences is known by its name, so the call is kept."""

    @pytest.fixture(autouse=True)
    def stand_ins(self, on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> list[Compiled]:
        """Launch nothing, and keep what is planned for a Hopper chip under one key; the kernels launched."""
        launched: list[Compiled] = []

        def run(launch: Launch, device: torch.device) -> Compiled:
            launched.append(Compiled())
            return launched[-1]

        monkeypatch.setattr(Launch, "run", run)
        monkeypatch.setattr(target, "target_of", lambda _: target.SM_90)
        monkeypatch.setattr(execute, "require_supported", lambda _: None)
        monkeypatch.setattr(replay, "_facts", lambda _: "those of any tensors")
        for name in ("_forward_replays", "_backward_replays"):
            monkeypatch.setattr(varlen, name, Replays())
        return launched

    @staticmethod
    def draw(paged: bool) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Tensors and options of a call, in new memory."""
        bounds = torch.tensor([0, 100, 400], dtype=torch.int32)
        tensors = {
            "q": torch.randn(400, 4, 64, dtype=torch.float16),
            "k": torch.randn(*((25, 16) if paged else (400,)), 2, 64, dtype=torch.float16),
            "v": torch.randn(*((25, 16) if paged else (400,)), 2, 64, dtype=torch.float16),
            "cu_seqlens_q": bounds.clone(),
            "cu_seqlens_k": bounds.clone(),
            "alibi_slopes": torch.rand(4),
        }
        if paged:
            tensors["block_table"] = torch.zeros(2, 19, dtype=torch.int32)
        return tensors, {"max_seqlen_q": 300, "max_seqlen_k": 300, "causal": True}

    @staticmethod
    def assert_launched_with(
        launched: list[Compiled], mine: dict[str, torch.Tensor], others: dict[str, torch.Tensor]
    ) -> None:
        values = [value for kernel in launched for call in kernel.calls for value in call]
        addresses = {
            x.data_ptr() for value in values if isinstance(x := getattr(value, "base", value), torch.Tensor)
        }
        assert all(kernel.calls for kernel in launched)
        assert {x.data_ptr() for x in mine.values()} <= addresses
        assert not {x.data_ptr() for x in others.values()} & addresses

    @pytest.mark.parametrize("paged", [False, True])
    def test_forward(self, stand_ins: list[Compiled], paged: bool) -> None:
        first, options = self.draw(paged)
        attention_varlen_forward(**first, **options)
        again, _ = self.draw(paged)
        out, lse, _ = attention_varlen_forward(**again, **options)
        assert len(stand_ins) == 1
        self.assert_launched_with(stand_ins, {**again, "out": out, "lse": lse}, first)
        assert (out.shape, lse.shape) == ((400, 4, 64), (4, 400))

    def test_backward(self, stand_ins: list[Compiled]) -> None:
        def call() -> tuple[dict[str, torch.Tensor], tuple[torch.Tensor, ...]]:
            tensors, options = self.draw(paged=False)
            tensors |= {"dout": torch.randn_like(tensors["q"]), "out": torch.randn_like(tensors["q"])}
            tensors |= {"softmax_lse": torch.randn(4, 400), "dlse": torch.randn(4, 400)}
            return tensors, attention_varlen_backward(**tensors, **options)

        first, _ = call()
        again, gradients = call()
        assert len(stand_ins) == 3
        self.assert_launched_with(
            stand_ins, again | dict(zip(("dq", "dk", "dv"), gradients, strict=True)), first
        )
        for gradient, name in zip(gradients, "qkv", strict=True):
            assert gradient.shape == again[name].shape

    def test_a_schedule_chosen_later_is_not_left_to_a_replay(self, stand_ins: list[Compiled]) -> None:
        tensors, options = self.draw(paged=False)
        attention_varlen_forward(**tensors, **options)
        with use_schedule("portable"):
            for _ in range(2):
                attention_varlen_forward(**tensors, **options)
        assert len(stand_ins) == 2, "planned once for each choice"
        attention_varlen_forward(**tensors, **options)
        assert len(stand_ins) == 2

    def test_rows_that_no_kernel_writes_are_not_left_to_a_replay(self, stand_ins: list[Compiled]) -> None:
        tensors, options = self.draw(paged=False)
        used = torch.tensor([3, 300], dtype=torch.int32)
        for _ in range(2):
            out, lse, _ = attention_varlen_forward(**tensors, **options, seqused_q=used)
            assert not out.any()
            assert (lse == torch.inf).all()
        assert len(stand_ins) == 2


@pytest.mark.gpu
class TestOnGpu:
    def test_keys_tell_calls_apart(self) -> None:
        q = torch.zeros(2, 8, 4, 16, device="cuda")
        base = ((q, q, None), (0.5, True, (-1, -1)))
        key = Replays().key
        others = [
            ((q[:1], q, None), base[1]),
            ((q.half(), q, None), base[1]),
            ((q.transpose(1, 2).contiguous().transpose(1, 2), q, None), base[1]),
            ((torch.zeros(2 * 8 * 4 * 16 + 1, device="cuda")[1:].view(2, 8, 4, 16), q, None), base[1]),
            ((q, q, q), base[1]),
            (base[0], (0.5, 1, (-1, -1))),
            (base[0], (0.25, True, (-1, -1))),
            (base[0], (0.5, True, (-1, 0))),
        ]
        assert key(*base) == key((q.clone(), q.clone(), None), base[1])
        keys = [key(*base), *(key(*other) for other in others)]
        assert len(set(keys)) == len(keys)
        assert None not in keys
        for window in ([-1, -1], (True, 0), (0.0, 0), torch.tensor([1, 1])):
            assert key(base[0], (0.5, True, window)) is None
        assert key((q.to_sparse(), q, None), base[1]) is None
        assert key(("q", q, None), base[1]) is None

    def test_a_repeated_call_sees_its_own_tensors(self) -> None:
        """First with one tensor for all three, which must not tie the three together for later calls."""

        def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
            out, lse, _ = attention_forward(q, k, v, causal=True)
            return out, lse, *attention_backward(out, q, k, v, out, lse, causal=True)

        q, k, v = (torch.randn(2, 200, 4, 64, device="cuda", dtype=torch.float16) for _ in range(3))
        step(q, q, q)
        again = step(q, k, v)
        # Another stride makes another key: planned afresh, but the same numbers.
        fresh = step(*(x.repeat(1, 1, 2, 1)[:, :, :4] for x in (q, k, v)))
        for mine, right in zip(again, fresh, strict=True):
            assert torch.equal(mine, right)

    def test_a_repeated_call_on_packed_sequences_sees_its_own_tensors(self) -> None:
        """Lengths of equal sum, batch and bound, which make one key, are the new call's own as well."""

        def step(lengths: list[int], *qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
            bounds = torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32)
            packing = (bounds, bounds, 200, 200)
            out, lse, _ = attention_varlen_forward(*qkv, *packing, causal=True)
            gradients = attention_varlen_backward(out, *qkv, out, lse, *packing, dlse=lse, causal=True)
            return out, lse, *gradients

        q, k, v = (torch.randn(400, 4, 64, device="cuda", dtype=torch.float16) for _ in range(3))
        step([200, 150, 50], q, q, q)
        again = step([1, 199, 200], q, k, v)
        fresh = step([1, 199, 200], *(x.repeat(1, 2, 1)[:, :4] for x in (q, k, v)))
        for mine, right in zip(again, fresh, strict=True):
            assert torch.equal(mine, right)

    def test_a_repeated_append_and_rotation_see_their_own_tensors(self) -> None:
        """In pages and not, in place and not, with columns that are not turned."""
        angles = torch.rand(64, 8, device="cuda") * 6
        cos, sin = angles.cos().half(), angles.sin().half()
        table = torch.tensor([[3, 1], [0, 2]], device="cuda", dtype=torch.int32)
        for pages in (None, table):
            results = []
            for repeat in range(3):
                torch.manual_seed(repeat // 2)  # the last is of other numbers
                shape = (4, 32, 2, 64) if pages is not None else (2, 64, 2, 64)
                k_cache, v_cache = (torch.randn(shape, device="cuda", dtype=torch.float16) for _ in range(2))
                k, v, x = (torch.randn(2, 3, 2, 64, device="cuda", dtype=torch.float16) for _ in range(3))
                lengths = torch.tensor([5, 30], device="cuda", dtype=torch.int32) + repeat // 2
                before = k_cache.clone()
                kvcache_append(
                    k_cache, v_cache, k, v, lengths, block_table=pages, rotary_cos=cos, rotary_sin=sin
                )
                turned = apply_rotary(k, cos, sin, interleaved=True, seqlen_offsets=lengths)
                rows = k_cache if pages is None else k_cache[pages.long()].flatten(1, 2)
                for b, start in enumerate(lengths.tolist()):
                    appended = rows[b, start : start + 3]
                    torch.testing.assert_close(appended, turned[b], atol=2e-3, rtol=2e-3)
                assert int((k_cache != before).any(-1).any(-1).sum()) == 6
                assert torch.equal(turned[..., 16:], k[..., 16:])
                in_place = x.clone()
                assert apply_rotary(in_place, cos, sin, seqlen_offsets=lengths, out=in_place) is in_place
                assert torch.equal(in_place, apply_rotary(x, cos, sin, seqlen_offsets=lengths))
                results.append((k_cache, v_cache, turned))
            for first, again in zip(*results[:2], strict=True):
                assert torch.equal(first, again)

    @pytest.mark.parametrize("num_splits", [1, 4])
    def test_a_repeated_decoding_step_sees_its_own_tensors(self, num_splits: int) -> None:
        def draw() -> tuple[torch.Tensor, ...]:
            q = torch.randn(3, 1, 8, 64, device="cuda", dtype=torch.float16)
            return q, *(torch.randn(3, 500, 2, 64, device="cuda", dtype=torch.float16) for _ in range(2))

        lengths = torch.tensor([500, 3, 250], device="cuda", dtype=torch.int32)
        attention_kvcache_forward(*draw(), lengths, num_splits=num_splits)
        q, k, v = draw()
        out, lse = attention_kvcache_forward(q, k, v, lengths, num_splits=num_splits)
        for b, length in enumerate(lengths.tolist()):
            one = slice(b, b + 1)
            right, right_lse, _ = attention_forward(q[one], k[one, :length], v[one, :length])
            torch.testing.assert_close(out[one], right, atol=2e-3, rtol=2e-3)
            torch.testing.assert_close(lse[one], right_lse, atol=1e-3, rtol=1e-3)

    def test_mistakes_are_told_after_a_call_was_kept_too(self) -> None:
        q = torch.randn(2, 64, 4, 64, device="cuda", dtype=torch.float16)
        attention_forward(q, q, q)
        with pytest.raises(RuntimeError, match="k must have q's batch size"):
            attention_forward(q, q[:1], q[:1])
        with pytest.raises(TypeError, match="causal must be True or False"):
            attention_forward(q, q, q, causal="yes")  # type: ignore[arg-type]
