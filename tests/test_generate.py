"""The generate example streams text from a cache, and fails if the cache changes what is written."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

import fap_nn

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def generate(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    spec = importlib.util.spec_from_file_location("generate", EXAMPLES / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)


@pytest.mark.smoke
def test_it_streams_what_one_pass_would_write(generate, capsys):
    assert generate.main(["--device", "cpu", "--steps", "80", "--length", "40"]) == 0
    printed = capsys.readouterr().out
    assert "Beautiful is better than " in printed
    assert "40 characters in" in printed
    assert "writes the same" in printed


def test_every_character_comes_when_it_is_known(generate):
    model = generate.TinyModel(7).eval()
    lengths = []
    forward = model.forward
    model.forward = lambda tokens, caches=None: lengths.append(tokens.shape[1]) or forward(tokens, caches)
    characters = generate.stream(model, torch.tensor([1, 2, 3]), 4)
    assert not lengths
    next(characters)
    assert lengths == [3]
    assert len([*characters]) == 3
    assert lengths == [3, 1, 1, 1]


def test_it_fails_if_the_cache_forgets(generate, capsys, monkeypatch):
    monkeypatch.setattr(fap_nn.KVCache, "advance", lambda self, tokens, lengths=None: self.reset())
    assert generate.main(["--device", "cpu", "--steps", "60", "--length", "40"]) == 1
    assert "WRONG" in capsys.readouterr().out


@pytest.mark.parametrize("prompt", ["", "Ünknown"])
def test_prompts_that_it_cannot_read_are_refused(generate, prompt, capsys):
    with pytest.raises(SystemExit):
        generate.main(["--device", "cpu", "--prompt", prompt])
    assert "--prompt must have characters" in capsys.readouterr().err
