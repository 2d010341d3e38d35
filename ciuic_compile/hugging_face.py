"""Models of transformers' configurations, built on the meta device; transformers is optional."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import TargetError, nearest

_CLASS = re.compile(r"(?:transformers\.)?(\w+Config)")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_TEXT = ("CausalLM", "MaskedLM")
_OTHERS = ("Seq2SeqLM", "ImageClassification", "SequenceClassification")


@dataclass(frozen=True)
class Shape:
    """What a batch of a Hugging Face model looks like.

    Attributes:
        batch: sequences, or images.
        seq: tokens in a sequence; None: 2,048, or as many as the model has positions for.
        dtype: of the parameters, by name; None: as the configuration says.
        checkpointing: whether each layer is computed again in the backward (gradient checkpointing);
            None: as the configuration says.
    """

    batch: int = 1
    seq: int | None = None
    dtype: str | None = None
    checkpointing: bool | None = None


def is_config(name: str) -> bool:
    """Whether a target is a folder with ``config.json``, such a file, or a configuration class's name."""
    return _file(name) is not None or _CLASS.fullmatch(name) is not None


def build(
    name: str, shape: Shape, device: torch.device | None = None
) -> tuple[nn.Module, dict[str, Any], Callable[..., Tensor]]:
    """A training model, a batch for it as keyword arguments, and what takes the loss from its output.

    Args:
        name: what :func:`is_config` accepts.
        device: where it is made; None: the meta device, without memory.

    Raises:
        TargetError: transformers is not installed; no such class; a configuration that it does not know or
            that is damaged; a model that is neither for text nor for images.
    """
    transformers = _transformers(name)
    config = _config(name, transformers)
    dtype = _dtype(name, shape.dtype, config)
    if not hasattr(config, "decoder_start_token_id") and getattr(config, "is_encoder_decoder", False):
        config.decoder_start_token_id = 0  # a checkpoint's configuration has one; no value is looked at
    asked = shape.checkpointing
    if asked is None:  # building the model takes it out of the configuration
        asked = bool(getattr(config, "gradient_checkpointing", False))
    where = torch.device("meta") if device is None else device
    head = _head(name, transformers, config)
    try:
        with torch.device(where):
            model: nn.Module = getattr(transformers, head).from_config(config, dtype=dtype)
            _checkpoint(model, asked)
            model.train()
            if head == "AutoModelForCausalLM" and getattr(model, "loss_type", None) is None:
                model.loss_type = "ForCausalLM"  # type: ignore[assignment]  # the default; asked for, it is taken without a warning
            batch = _batch(name, head, config, model, shape, dtype)
    except (ValueError, KeyError, TypeError, RuntimeError, ImportError, AttributeError) as error:
        raise TargetError(
            f"target {name!r}: transformers cannot build it: {type(error).__name__}: {str(error)[:300]}\n"
            "  fix: check config.json against the model's documentation"
        ) from error
    return model, batch, take_loss


def take_loss(output: Any) -> Tensor:
    """The loss of a model that was given labels; the logits do not outlive the forward then."""
    loss: Tensor = output.loss
    return loss


def _transformers(name: str) -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise TargetError(
            f"target {name!r}: that is a Hugging Face configuration, and transformers is not installed\n"
            "  fix: pip install transformers"
        ) from error


def _file(name: str) -> Path | None:
    path = Path(name).expanduser()
    path = path / "config.json" if path.is_dir() else path
    return path if path.suffix == ".json" and path.is_file() else None


def _config(name: str, transformers: Any) -> Any:
    if (path := _file(name)) is not None:
        try:
            fields = json.loads(path.read_text("utf-8"))
            model_type = fields["model_type"]
        except (ValueError, KeyError, TypeError, OSError) as error:
            what = (
                "has no model_type" if isinstance(error, (KeyError, TypeError)) else f"is not JSON: {error}"
            )
            raise TargetError(
                f"target {name!r}: {path} {what}\n  fix: name a folder that save_pretrained() wrote"
            ) from error
        try:
            return transformers.AutoConfig.for_model(**fields)
        except (ValueError, KeyError, TypeError) as error:
            raise TargetError(
                f"target {name!r}: transformers {transformers.__version__} has no model type {model_type!r}: "
                f"{str(error)[:200]}\n  fix: correct model_type, or install a transformers that has it"
            ) from error
    match = _CLASS.fullmatch(name)
    assert match is not None, "is_config() was not asked"
    kind = getattr(transformers, match[1], None)
    if kind is None:
        known = [n for n in dir(transformers) if n.endswith("Config")]
        raise TargetError(
            f"target {name!r}: transformers {transformers.__version__} has no {match[1]}"
            f"{nearest(match[1], known)}\n  fix: correct the name"
        )
    return kind()


def _head(name: str, transformers: Any, config: Any) -> str:
    """The class that has a loss of its own when it gets labels, as the configuration suggests."""
    decodes = getattr(config, "is_decoder", False)
    heads = (*(_TEXT if decodes else reversed(_TEXT)), *_OTHERS)
    if getattr(config, "is_encoder_decoder", False):
        heads = ("Seq2SeqLM", *heads)
    for head in heads:
        if type(config) in getattr(transformers, f"AutoModelFor{head}")._model_mapping:
            return f"AutoModelFor{head}"
    raise TargetError(
        f"target {name!r}: no model with a loss is known for {type(config).__name__}\n"
        f"  valid: configurations for {', '.join(heads)}\n"
        "  fix: write a function that returns (model, example_inputs, loss_fn), and name it FILE.py:FUNCTION"
    )


def _dtype(name: str, asked: str | None, config: Any) -> torch.dtype:
    found = asked or getattr(config, "dtype", None) or "float32"
    text = str(found).removeprefix("torch.")
    if text not in _DTYPES:
        raise TargetError(
            f"target {name!r}: dtype {text!r}\n  valid: {', '.join(_DTYPES)}\n  fix: give --dtype"
        )
    return _DTYPES[text]


def _checkpoint(model: nn.Module, enable: bool) -> None:
    """Switch it on or off; models that have none stay as they are."""
    if not getattr(model, "supports_gradient_checkpointing", False):
        return
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # 5.x, 4.x
    getattr(model, f"{kind}_checkpointing_{'enable' if enable else 'disable'}")()


def _batch(
    name: str, head: str, config: Any, model: nn.Module, shape: Shape, dtype: torch.dtype
) -> dict[str, Any]:
    """Keyword arguments, zeros on the current device."""
    if head == "AutoModelForImageClassification":
        side = getattr(config, "image_size", 224)
        height, width = side if isinstance(side, (list, tuple)) else (side, side)
        channels = getattr(config, "num_channels", 3)
        pixels = torch.zeros(shape.batch, channels, height, width, dtype=dtype)
        return {"pixel_values": pixels, "labels": torch.zeros(shape.batch, dtype=torch.int64)}
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        raise TargetError(
            f"target {name!r}: its input is {model.main_input_name!r}, neither text nor images\n"
            "  fix: write a function that returns (model, example_inputs, loss_fn)"
        )
    text = config.get_text_config()
    most = getattr(text, "max_position_embeddings", None) or 2048
    seq = shape.seq or min(2048, most)
    ids = torch.zeros(shape.batch, seq, dtype=torch.int64)
    if head == "AutoModelForSequenceClassification":
        return {"input_ids": ids, "labels": torch.zeros(shape.batch, dtype=torch.int64)}
    batch: dict[str, Any] = {"input_ids": ids, "labels": ids.clone()}
    if head != "AutoModelForMaskedLM" and hasattr(config, "use_cache"):
        batch["use_cache"] = False  # a cache of keys and values is for inference
    return batch
