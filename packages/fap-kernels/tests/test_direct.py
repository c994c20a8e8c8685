"""A direct launch hands Triton's C function what Triton's launcher would, and nothing of an earlier call."""

from __future__ import annotations

import gc
import inspect
import logging
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from ahead_of_time import TRITON, specialize
from triton import knobs
from triton.backends.nvidia import driver

from fap_kernels import AttentionProblem, direct, replay, target
from fap_kernels.direct import DirectLaunch
from fap_kernels.forward.launch import plan_forward
from fap_kernels.launch import Launch
from fap_kernels.replay import Replay

STREAM = 5


class Kernel:
    """What Triton's JIT would return for a launch, with Triton's launcher and a C function that records."""

    packed_metadata, function = (4, 1, 0), 77

    def __init__(self, launch: Launch) -> None:
        self.given: list[tuple[Any, ...]] = []
        self.metadata_made = 0
        signature, *_ = specialize(launch)
        count = sum(isinstance(x, str) and x.startswith("tensordesc") for x in signature.values())
        wrap = driver.wrap_handle_tensordesc
        # Triton 3.4 looks for descriptors among the arguments, later versions in the signature.
        signatures = [signature] if len(inspect.signature(wrap).parameters) == 3 else []
        self.run = object.__new__(driver.CudaLauncher)
        vars(self.run).update(
            launch=wrap(self.launch, *signatures, [{}] * count) if count else self.launch,
            arg_annotations=["annotations"], kernel_signature=b"signature", num_ctas=1,
            global_scratch_size=0, global_scratch_align=1, profile_scratch_size=0, profile_scratch_align=1,
            launch_cooperative_grid=False, launch_pdl=False, gsan_enabled=False,
        )  # fmt: skip

    def launch(self, *arguments: Any) -> None:
        self.given.append(tuple(tuple(x) if isinstance(x, list) else x for x in arguments))

    def launch_metadata(self, *_: Any) -> str:
        self.metadata_made += 1
        return "metadata"


class Talkative(driver.CudaLauncher):
    """Hands on more than it was given."""

    def __init__(self) -> None:
        pass

    def __call__(self, *arguments: Any) -> None:
        super().__call__(*arguments, "more")


@pytest.fixture(autouse=True)
def without_cuda(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Stand in for what needs a driver; the addresses that tensor maps were made for."""
    made: list[int] = []

    def make(descriptor: Any, *_: Any) -> list[Any]:
        made.append(descriptor.base.data_ptr())
        tensor_map = ("map", descriptor.base.data_ptr(), tuple(descriptor.block_shape))
        return [tensor_map, *descriptor.shape, *descriptor.strides]

    monkeypatch.setattr(driver, "make_tensordesc_arg", make)
    # Triton 3.8 and later ask it for a thing that these kernels do not use.
    monkeypatch.setattr(driver.triton.runtime.driver, "_active", SimpleNamespace(), raising=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(replay, "_empty", lambda *made: torch.empty_strided(*made[:2], dtype=made[2]))
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: STREAM, raising=False)
    return made


def plan(chip: target.Target) -> tuple[Launch, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A forward launch, and the tensors that it was given and that were made for it."""
    given = {name: torch.randn(2, 64, 4, 96, dtype=torch.float16) for name in "qkv"}
    out, lse = torch.empty(2, 64, 4, 96, dtype=torch.float16), torch.empty(2, 4, 64)
    problem = AttentionProblem.describe(**given, causal=True)
    launch = plan_forward(problem, chip, *given.values(), out, lse, None, None)
    return launch, given, {"out": out, "lse": lse}


def replay_of(kernel: Kernel, planned: tuple[Launch, Any, Any]) -> Replay:
    kept = Replay.of([(planned[0], kernel)], *planned[1:])
    assert kept is not None
    return kept


def launched_by_triton(launch: Launch, kernel: Kernel) -> tuple[Any, ...]:
    """What Triton's launcher hands to C for ``launch``, addresses in place of tensors."""
    values = [launch.arguments[parameter.name] for parameter in launch.kernel.params]
    addresses = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in values]
    hooks = (None, None, None)
    kernel.run(launch.programs, 1, 1, STREAM, kernel.function, kernel.packed_metadata, *hooks, *addresses)
    return kernel.given.pop()


@pytest.mark.parametrize("chip", [target.SM_90, target.SM_80], ids=lambda chip: chip.family)
def test_it_hands_on_what_triton_would(chip: target.Target) -> None:
    """By descriptors and by addresses, for the tensors of another call than the recorded one."""
    first = plan(chip)
    kernel = Kernel(first[0])
    kept = replay_of(kernel, first)
    for _ in range(2):
        launch, given, _ = plan(chip)
        out, lse = kept.run(*given.values())
        handed = kernel.given.pop()
        assert not kernel.given
        problem = AttentionProblem.describe(**given, causal=True)
        launch = plan_forward(problem, chip, *given.values(), out, lse, None, None)
        assert handed == launched_by_triton(launch, kernel)
    assert kernel.metadata_made == 0


def test_a_map_is_made_once_for_an_address(without_cuda: list[int]) -> None:
    planned = plan(target.SM_90)
    kept = replay_of(Kernel(planned[0]), planned)
    others = plan(target.SM_90)[1]
    kept.run(*others.values())
    made = len(without_cuda)
    assert {x.data_ptr() for x in others.values()} <= set(without_cuda)
    kept.run(*others.values())
    assert len(without_cuda) == made


def test_maps_are_not_kept_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "MOST_MAPS", 3)
    planned = plan(target.SM_90)
    kernel = Kernel(planned[0])
    kept = replay_of(kernel, planned)
    calls = [plan(target.SM_90)[1] for _ in range(5)]
    for given in calls:
        kept.run(*given.values())
        values = str(kernel.given.pop())
        assert all(f"('map', {x.data_ptr()}, " in values for x in given.values())
    (step,) = kept._steps
    assert step._direct is not None
    assert all(0 < len(maps) <= 3 for _, _, maps in step._direct._maps)


def test_it_keeps_no_tensor_alive() -> None:
    launch, given, made = plan(target.SM_90)
    kept = replay_of(Kernel(launch), (launch, given, made))
    gone = [weakref.ref(x) for x in (*given.values(), *made.values())]
    del launch, given, made
    gc.collect()
    assert kept is not None
    assert [x() for x in gone] == [None] * 5


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
def test_a_hook_is_told_of_a_launch(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """By Triton's launcher, which hands it on together with the metadata."""

    def hook(_: Any) -> None: ...

    planned = plan(target.SM_90)
    kernel = Kernel(planned[0])
    kept = replay_of(kernel, planned)
    chain = getattr(knobs.runtime, name)
    if hasattr(chain, "calls"):
        monkeypatch.setattr(chain, "calls", [hook])
    else:
        monkeypatch.setattr(knobs.runtime, name, hook)
    kept.run(*planned[1].values())
    (given,) = kernel.given
    assert getattr(knobs.runtime, name) in given
    assert "metadata" in given
    assert kernel.metadata_made == 1


@pytest.mark.parametrize("unknown", ["no launcher", "scratch", "another argument", "another wrapper"])
def test_an_unknown_launcher_is_left_to_itself(unknown: str, caplog: pytest.LogCaptureFixture) -> None:
    """The call is kept and launched all the same, in Triton's own way, and a log line says so."""
    if unknown == "another argument" and TRITON >= (3, 8):
        pytest.skip("from Triton 3.8 on C code makes tensor maps, which crashes on an argument too many")
    planned = plan(target.SM_90)
    kernel = Kernel(planned[0])
    known, around = kernel.run.launch, kernel.run
    if unknown == "no launcher":
        del kernel.run.launch
    elif unknown == "scratch":
        kernel.run.global_scratch_size = 16
    elif unknown == "another argument":
        kernel.run = Talkative()
        vars(kernel.run).update(vars(around))
    else:

        def wrapper(*arguments: Any) -> None:
            known(*arguments)

        kernel.run.launch = wrapper
    values = [planned[0].arguments[parameter.name] for parameter in planned[0].kernel.params]
    direct._tell.cache_clear()
    with caplog.at_level(logging.INFO, "fap_kernels"):
        assert DirectLaunch.of(kernel, (1, 1, 1), values) is None
    assert "launches take longer" in caplog.text
