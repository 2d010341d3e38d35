"""Targets: models that take no memory, and Hugging Face configurations."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ciuic_compile import targets
from ciuic_compile.errors import TargetError
from ciuic_compile.hugging_face import Shape
from ciuic_compile.planning import plan
from ciuic_compile.weightless import weightless

TINY = {"vocab_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**TINY, "intermediate_size": 128, "num_key_value_heads": 2, "dtype": "bfloat16"},
    "gpt2": {"vocab_size": 512, "n_layer": 2, "n_head": 4, "n_embd": 64},
    "bert": {**TINY, "intermediate_size": 128},
    "t5": {"vocab_size": 512, "d_model": 64, "d_ff": 128, "num_layers": 2, "num_heads": 4, "d_kv": 16},
    "vit": {**{k: v for k, v in TINY.items() if k != "vocab_size"}, "intermediate_size": 128},
}


# ---------------------------------------------------------------- without memory


def test_what_authors_do_to_models_takes_no_memory() -> None:
    with weightless():
        model = nn.Linear(2**20, 2**20).cuda().to("cuda:1").to(device="cuda", dtype=torch.bfloat16)  # 2 TiB
        model.weight.data.normal_(std=0.02)
        nn.init.trunc_normal_(model.weight)
        embedding = nn.Embedding(2**30, 2**12, device="cuda", dtype=torch.float16)
        x = torch.randn(4, 2**20, device="cuda", pin_memory=True)
        twin = x.to(model.weight)
        mask = torch.zeros_like(x, device="cuda").cpu().half()
    assert model.weight.is_meta and model.weight.dtype == torch.bfloat16 and model.weight.requires_grad
    assert embedding.weight.is_meta and embedding.weight.dtype == torch.float16
    assert x.is_meta and twin.is_meta and twin.dtype == torch.bfloat16
    assert mask.is_meta and mask.dtype == torch.float16
    assert not torch.ones(1).is_meta, "it is over after the block"


def test_schedules_keep_their_values_until_they_meet_a_weight() -> None:
    with weightless():
        rates = [x.item() for x in torch.linspace(0, 0.5, 3)]
        frequencies = 1.0 / 10_000 ** (torch.arange(0, 8, 2, device="cuda").float() / 8)
        assert int(torch.tensor([3], device="cuda")[0]) == 3
        table = nn.Parameter(torch.empty(4))
        with torch.no_grad():
            table.copy_(frequencies)
        mixed = table * frequencies
    assert rates == [0.0, 0.25, 0.5]
    assert frequencies.device.type == "cpu" and frequencies[0] == 1
    assert table.is_meta and mixed.is_meta


def test_a_checkpoint_may_be_loaded() -> None:
    state = nn.Linear(8, 8).state_dict()
    with weightless():
        model = nn.Linear(8, 8)
        assert not model.load_state_dict(state).missing_keys
    assert model.weight.is_meta


@pytest.mark.parametrize("where", ["import", "function", "forward"])
def test_a_program_that_exits_is_an_error(tmp_path: Path, where: str) -> None:
    """With status 0, too: `ciuic check` would pass, and judge no entry after it."""
    leave = {name: "sys.exit(0)" if name == where else "pass" for name in ("import", "function", "forward")}
    (tmp_path / "leaves.py").write_text(
        f"""import sys
import torch
from torch import nn
{leave["import"]}
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
    def forward(self, x):
        {leave["forward"]}
        return self.linear(x).sum()
def f():
    {leave["function"]}
    return Model(), torch.randn(2, 4)
"""
    )

    def planned() -> None:
        made = targets.load(f"{tmp_path / 'leaves.py'}:f")
        plan(made.model, made.inputs)

    with pytest.raises(TargetError, match="(?i)exit"):
        planned()


def test_a_module_of_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "a_package").mkdir()
    source = "import torch\nfrom torch import nn\ndef f():\n"
    source += "    return torch.compile(nn.Linear(4, 4)), {'input': torch.ones(2, 4)}\n"
    (tmp_path / "a_package" / "models.py").write_text(source)
    made = targets.load("a_package.models:f")
    assert isinstance(made.inputs, dict) and made.inputs["input"].is_meta and made.loss_fn is None
    (planned,) = plan(made.model, made.inputs, torch.sum, options={"min_bytes": 0})
    assert planned.input_bytes == (4 * 4 + 4 + 2 * 4) * 4
    real = targets.load("a_package.models:f", allocate=torch.device("cpu"))
    assert not real.inputs["input"].is_meta


# ---------------------------------------------------------------- Hugging Face


def config(folder: Path, kind: str, **more: Any) -> str:
    (folder / "config.json").write_text(json.dumps({"model_type": kind, **CONFIGS.get(kind, {}), **more}))
    return str(folder)


@pytest.mark.parametrize("kind", CONFIGS)
def test_hugging_face_models_plan_as_one_graph(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    made = targets.load(config(tmp_path, kind), Shape(batch=2, seq=64))
    assert all(p.is_meta for p in made.model.parameters()) and made.model.training
    (planned,) = plan(made.model, made.inputs, made.loss_fn, options={"min_bytes": 0}, device="h200")
    assert planned.planned_saved_bytes * 2 <= planned.baseline_saved_bytes
    assert planned.input_bytes > sum(p.nbytes for p in made.model.parameters())


def test_gradient_checkpointing_is_respected(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    saved = []
    for written, asked in ((False, None), (False, True), (True, None), (True, False)):
        folder = config(tmp_path, "llama", gradient_checkpointing=written)
        made = targets.load(folder, Shape(batch=2, seq=64, checkpointing=asked))
        (planned,) = plan(made.model, made.inputs, made.loss_fn, options={"mode": "lossless"}, device="h200")
        saved.append(planned.baseline_saved_bytes)
    assert saved[0] == saved[3] > 2 * saved[1] == 2 * saved[2]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not JSON"),
        ("{}", "has no model_type"),
        ('{"model_type": "lama"}', "no model type 'lama'"),
        ('{"model_type": "llama", "dtype": "int4"}', "dtype 'int4'"),
        ('{"model_type": "wav2vec2"}', "no model with a loss"),
    ],
)
def test_configurations_that_cannot_be_built(text: str, said: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(TargetError, match=said) as failed:
        targets.load(str(tmp_path))
    assert "fix: " in str(failed.value)


def test_a_configuration_class_by_name() -> None:
    pytest.importorskip("transformers")
    made = targets.load("transformers.GPT2Config", Shape(seq=8))
    assert sum(p.numel() for p in made.model.parameters()) == 124_439_808
    with pytest.raises(TargetError, match="did you mean 'LlamaConfig'"):
        targets.load("transformers.LlamConfig")


def test_without_transformers_it_says_what_to_install(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "from ciuic_compile.cli import main\n"
        f"sys.exit(main(['plan', {config(tmp_path, 'llama')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "pip install transformers" in done.stderr
