"""The plugin serves those who use it and is invisible to those who do not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fap_testing

PACKAGE = Path(__file__).parents[1]


@pytest.fixture
def suite(tmp_path):
    """Write a suite into an empty folder and run it with the plugin, as its author would."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["OMP_NUM_THREADS"] = "1"
    environment["PYTHONPATH"] = str(Path(fap_testing.__file__).parents[1])

    def run(code, *options, ini=""):
        (tmp_path / "pytest.ini").write_text(f"[pytest]\n{ini}\n")
        (tmp_path / "test_it.py").write_text(code)
        command = [sys.executable, "-m", "pytest", "-p", "fap_testing.plugin", "-ra", *options]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=300
        )

    return run


@pytest.mark.smoke
def test_the_readmes_example_runs(suite):
    (example,) = re.findall(r"```python\n(.*?)```", (PACKAGE / "README.md").read_text(), re.DOTALL)
    result = suite(example)
    assert result.returncode == 0, result.stdout
    passed, skipped = (int(re.search(rf"(\d+) {word}", result.stdout)[1]) for word in ("passed", "skipped"))
    assert passed > 30
    assert "declared unsupported: window; refused with TypeError" in result.stdout
    assert skipped < 150


def test_a_wrong_subject_fails_as_a_pytest_class(suite):
    result = suite(
        """
import torch
from fap_testing.cases import select
from fap_testing.conformance import AttentionConformance, Subject
from fap_testing.reference import attention_reference

def mean(q, k, v, **options):
    return attention_reference(0 * q, k, v).out.to(q.dtype)

class TestMean(AttentionConformance):
    subject = Subject(attention=mean, dtypes=(torch.float32,), unsupported={"lse"})
    cases = select("quick", "gqa")
""",
        "-k",
        "gqa",
    )
    assert result.returncode == 1
    assert "FAILED test_it.py::TestMean::test_conformance[gqa_4_2-float32]" in result.stdout
    assert "out of case gqa_4_2 is too far from the oracle" in result.stdout


def test_fixtures(suite):
    result = suite(
        """
import pytest, torch
from fap_testing.cases import find

def test_fixtures(fap_reference, fap_case_inputs, fap_expect, fap_assert_close, fap_device, fap_seed):
    assert fap_device == torch.device("cpu")
    assert fap_seed == 7
    inputs = fap_case_inputs(find("gqa_4_2"))
    other = fap_case_inputs(find("gqa_4_2"), seed=0)
    assert not torch.equal(inputs.q, other.q)
    result = fap_reference(inputs.q, inputs.k, inputs.v)
    fap_assert_close(result.out.float(), result.out, result.out.float(), name="out")
    fap_expect(inputs).check(out=result.out.float(), softmax_lse=result.softmax_lse.float())
    with pytest.raises(AssertionError):
        fap_assert_close(result.out.float() + 1, result.out, result.out.float(), name="out")
""",
        "--fap-device=cpu",
        "--fap-seed=7",
    )
    assert result.returncode == 0, result.stdout


def test_a_foreign_suite_notices_nothing(suite):
    result = suite(
        """
import sys
import pytest

@pytest.mark.gpu
def test_own_gpu_marker_is_left_alone():
    assert "torch" not in sys.modules
    assert "fap_testing.reference" not in sys.modules
""",
        "--strict-markers",
        ini="markers =\n  gpu: this suite's own meaning",
    )
    assert result.returncode == 0, result.stdout
    assert "1 passed" in result.stdout


def test_no_marker_is_registered_unasked(suite):
    result = suite("import pytest\n\n@pytest.mark.gpu\ndef test_x():\n    pass\n", "--strict-markers")
    assert result.returncode == 2
    assert "'gpu' not found in `markers`" in result.stdout


def test_the_gpu_marker_skips_where_there_is_no_gpu(suite):
    code = """
import pytest, torch
torch.cuda.is_available = lambda: {has_gpu}

@pytest.mark.needs_gpu
def test_on_gpu():
    pass

def test_anywhere():
    pass
"""
    without = suite(code.format(has_gpu=False), "--strict-markers", ini="fap_gpu_marker = needs_gpu")
    assert "1 passed, 1 skipped" in without.stdout
    assert "needs a GPU, and torch.cuda.is_available() is False" in without.stdout
    with_gpu = suite(code.format(has_gpu=True), "--strict-markers", ini="fap_gpu_marker = needs_gpu")
    assert "2 passed" in with_gpu.stdout
