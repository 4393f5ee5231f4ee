"""Gate files: smartkv_config.json and smartkv_gates.safetensors. Nothing is unpickled."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as deserialize
from safetensors.torch import save as serialize

from .model import ModelFacts

if TYPE_CHECKING:
    from .gates import Gates

CONFIG, WEIGHTS = "smartkv_config.json", "smartkv_gates.safetensors"
TYPE = "gates"
FORMAT_VERSION = 1
_OPTIONAL = ("sketch", "quantiles", "layer_shares", "decay", "calibration", "key_basis")


def save(gates: Gates, folder: Path, dtype: torch.dtype) -> None:
    """See Gates.save_pretrained. Each file appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"weight.{i}": x.to(dtype) for i, x in enumerate(gates.weights)}
    tensors |= {f"bias.{i}": x for i, x in enumerate(gates.biases)}
    tensors |= {name: x for name in _OPTIONAL if (x := getattr(gates, name)) is not None}
    content = serialize({name: x.contiguous().cpu() for name, x in tensors.items()}, {"format": "pt"})
    config = {
        "smartkv_type": TYPE,
        "format_version": FORMAT_VERSION,
        "base_model_name_or_path": gates.info.get("base_model"),
        "model": gates.model.to_dict(),
        "kind": gates.kind,
        "inputs": gates.inputs,
        "linear_layers": len(gates.weights),
        "shapes": {name: list(x.shape) for name, x in tensors.items()},
        "sha256": hashlib.sha256(content).hexdigest(),
        "info": gates.info,
    }
    partial = folder / (WEIGHTS + ".partial")
    partial.write_bytes(content)  # save_file would let nobody else read it, whatever the umask
    os.replace(partial, folder / WEIGHTS)
    partial = folder / (CONFIG + ".partial")
    partial.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, folder / CONFIG)


def load(cls: type[Gates], name: str | Path, **hub: Any) -> Gates:
    """See Gates.from_pretrained."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if str(name).startswith((".", "/", "~")) or str(name).count("/") != 1:
            raise ValueError(f"gates must be a folder or a hub id; folder {str(name)!r} does not exist")
        folder = _download(str(name), **hub)
    config = _read_config(folder / CONFIG)
    content, tensors = _read_tensors(folder / WEIGHTS, config["shapes"])
    try:
        count = range(sum(name.startswith("weight.") for name in tensors))
        if config["linear_layers"] != len(count):
            raise ValueError(f"linear_layers is {config['linear_layers']}, weights are there for {len(count)}")
        if not isinstance(config["info"], dict):
            raise ValueError(f"info must be a mapping; got {type(config['info']).__name__}")
        made = cls(
            [tensors[f"weight.{i}"] for i in count], [tensors[f"bias.{i}"] for i in count],
            ModelFacts.from_dict(config["model"]), config["kind"], config["inputs"],
            **{name: tensors.get(name) for name in _OPTIONAL}, info=config["info"], source=str(name),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"gates in {str(name)!r} are damaged: {error}") from error
    if config.get("sha256", digest := hashlib.sha256(content).hexdigest()) != digest:  # older files do not state it
        raise ValueError(f"gates in {str(name)!r} are damaged: {WEIGHTS} is not as it was saved (sha256)")
    return made


def _download(repo_id: str, **hub: Any) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        paths = [hf_hub_download(repo_id, file, **hub) for file in (CONFIG, WEIGHTS)]
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(
            f"gates {repo_id!r} are neither a folder nor on a hub that can be reached: {reason}"
        ) from error
    return Path(paths[0]).parent


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"gates folder {str(path.parent)!r} has no {path.name}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is damaged: it is not JSON ({error})") from error
    if not isinstance(config, dict) or config.get("smartkv_type") != TYPE:
        raise ValueError(f"{str(path)!r} does not describe gates: its smartkv_type must be {TYPE!r}")
    version = config.get("format_version")
    if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
        raise ValueError(f"{str(path)!r} has format_version {version!r}; this smartkv_ext reads up to {FORMAT_VERSION}")
    missing = {"model", "kind", "inputs", "linear_layers", "shapes", "info"} - set(config)
    if missing:
        raise ValueError(f"{str(path)!r} is damaged: {', '.join(sorted(missing))} must be there")
    return config


def _read_tensors(path: Path, shapes: Any) -> tuple[bytes, dict[str, torch.Tensor]]:
    """Bytes and tensors of the file, which must have the shapes that the configuration states."""
    if not path.is_file():
        raise ValueError(f"gates folder {str(path.parent)!r} has no {path.name}")
    content = path.read_bytes()
    try:
        tensors = deserialize(content)
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} is damaged or not a safetensors file: {error}") from error
    stated = shapes if isinstance(shapes, dict) else {}
    for name in sorted({*stated, *tensors}):
        found = list(tensors[name].shape) if name in tensors else "not there"
        if found != stated.get(name):
            wanted = stated.get(name, "unknown")
            raise ValueError(f"{str(path)!r} does not belong to its {CONFIG}: {name} is {found}, stated is {wanted}")
        if not tensors[name].is_floating_point():
            raise ValueError(f"{str(path)!r} is damaged: {name} must be floating-point; got {tensors[name].dtype}")
    return content, tensors


def push(gates: Gates, repo_id: str, **hub: Any) -> str:
    """See Gates.push_to_hub."""
    from huggingface_hub import HfApi

    api = HfApi(token=hub.pop("token", None))
    api.create_repo(repo_id, private=hub.pop("private", None), exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        gates.save_pretrained(folder)
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, **hub))
