"""Latents that are made once by a model's encoders and kept on disk."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from transfusion_pytorch.data.loading import SampleError, SkipSample, as_sample, name_of
from transfusion_pytorch.data.order import generator_of, generators_kept, sample_seed, seed_generators
from transfusion_pytorch.modalities import preparation
from transfusion_pytorch.modalities.autoencoder import drawing_from
from transfusion_pytorch.saving.components import qualified_name
from transfusion_pytorch.saving.files import load_json, open_tensors, remove_partial, save_json, save_tensors
from transfusion_pytorch.sequence.samples import (
    Condition,
    Latents,
    Modality,
    Piece,
    Sample,
    Text,
    WithCleanCopy,
    parse_sample,
)

FORMAT = 2
INDEX = "index.json"  # written last: where it is, everything is
SHARD_SIZE = 512  # samples in a file


def cache_latents(
    dataset: Any,
    model: Any,
    folder: str | Path,
    *,
    batch_size: int = 16,
    data_key: str | None = None,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> "CachedLatents":
    """Encodes every modality of a dataset with the encoders of a `Transfusion`, on its device, and gives the same
    samples with `Latents` in place of raw data. What has been encoded before is read from the disk.

    Latents lie in a folder of their own inside `folder`, named by a key: of the data (`dataset.fingerprint()`, or
    `data_key` for a dataset without) and of the encoders (class, settings and weights). Where one of these changes,
    everything is encoded anew, beside the old, which you may delete. A run that was killed is taken up at the last
    whole file. With several processes, let one call this first.

    A dataset whose samples are random must say what stays the same, by `modalities(index)` and `arrange(index,
    modalities, generator)`, as the ready datasets of images do; only the former is kept. Otherwise whole samples are.
    What an encoder draws, such as a sample of its distribution, is drawn once. Samples that raise `SkipSample` do so
    from the cache too. `progress` wraps the numbers of the files that are to be written (`tqdm.tqdm`).

    Raises `ValueError` for a dataset that cannot be told from others, or that is random without these methods.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is at least 1, got {batch_size}")
    if hasattr(dataset, "sample") and not hasattr(dataset, "arrange"):
        raise ValueError(
            f"a {type(dataset).__name__} has random samples, of which only one could be kept; give it "
            "modalities(index) and arrange(index, modalities, generator)"
        )
    if data_key is None and not hasattr(dataset, "fingerprint"):
        raise ValueError(f"a {type(dataset).__name__} has no fingerprint(); give a data_key that changes with the data")
    parts = {
        "format": FORMAT,
        "data": data_key if data_key is not None else dataset.fingerprint(),
        "size": len(dataset),
        "shard_size": SHARD_SIZE,
        "encoders": [encoder_key(io) for io in model.modalities],
        "dtype": str(model.precision),
    }
    target = Path(folder) / blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()
    if not (target / INDEX).is_file():
        remove_partial(target)
        count = -(-len(dataset) // SHARD_SIZE)
        missing = [shard for shard in range(count) if not _shard(target, shard).is_file()]
        for shard in progress(missing):
            _write_shard(dataset, model, target, shard, batch_size)
        save_json(target / INDEX, parts)
    return CachedLatents(dataset, target)


class CachedLatents(Dataset):
    """The samples of a dataset with the latents that `cache_latents` made of them."""

    def __init__(self, dataset: Any, folder: Path):
        self.dataset, self.folder = dataset, folder
        kept = load_json(folder / INDEX)
        if kept["size"] != len(dataset):
            raise ValueError(f"{folder} has the latents of {kept['size']} samples, the dataset has {len(dataset)}")
        self.shard_size = kept["shard_size"]
        self._open: dict[int, tuple[Any, list[Any]]] = {}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        if not -len(self) <= index < len(self):
            raise IndexError(f"there are {len(self)} samples, got index {index}")
        index %= len(self)
        return self.sample(index, generator_of(0, index))

    def sample(self, index: int, generator: torch.Generator) -> Sample:
        return self._arranged(index, self._read(index, is_outline=False), generator)

    def outline(self, index: int, generator: torch.Generator) -> Sample:
        """Its shapes, without reading latents."""
        return self._arranged(index, self._read(index, is_outline=True), generator)

    def _arranged(self, index: int, kept: Sample, generator: torch.Generator) -> Sample:
        return self.dataset.arrange(index, kept.parts, generator) if hasattr(self.dataset, "arrange") else kept

    def describe(self, index: int) -> str:
        described = f"{self.dataset.describe(index)}, " if hasattr(self.dataset, "describe") else ""
        return f"{described}latents in {_shard(self.folder, index // self.shard_size)}"

    def fingerprint(self) -> str:
        return self.folder.name

    def _read(self, index: int, *, is_outline: bool) -> Sample:
        number, place = divmod(index, self.shard_size)
        if number not in self._open:
            file = open_tensors(_shard(self.folder, number))
            self._open[number] = file, json.loads(file.metadata()["samples"])
        file, samples = self._open[number]
        entry = samples[place]
        if "skipped" in entry:
            raise SkipSample(entry["skipped"])
        parts = []
        for i, part in enumerate(entry["parts"]):
            name = f"{place}.{i}"
            is_text = part["type"] is None
            if is_outline and not is_text:
                tensor = torch.empty(file.get_slice(name).get_shape(), device="meta")
            else:
                tensor = file.get_tensor(name)
            restored = tensor if is_text else Latents(part["type"], tensor)
            restored = WithCleanCopy(restored) if part["has_clean_copy"] else restored
            parts.append(restored if part["is_learned"] else Condition(restored))
        return Sample(parts, name=entry["name"], source=entry["source"], weight=entry["weight"])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}  # open files stay in their process


def encoder_key(io: Any) -> Any:
    """What the latents of a modality depend on: the class, settings and weights of its encoder, and its layout."""
    spec, encoder = io.spec, io.encoder
    layout = [spec.dim_latent, spec.channel_first]
    if encoder is None:
        return layout
    digest = blake2b(_described(encoder).encode(), digest_size=16)
    return [*layout, qualified_name(encoder), repr(encoder), digest.hexdigest()]


def _parts_of(module: nn.Module) -> Iterator[str]:
    """Weights, buffers (those that are not saved too) and attributes of all modules in one, which `repr` may not show:
    a scale, a number of steps. Attributes that begin with `_` are the module's own affair.
    """
    for path, each in module.named_modules():
        own = {name: value for name, value in vars(each).items() if name[0] != "_" and name != "training"}
        yield f"{path}: {qualified_name(each)} {_described(own | each._parameters | each._buffers)}"


def _described(value: Any) -> str:
    """The same for what is equal, in any process: tensors by their numbers, functions and other objects by name."""
    if isinstance(value, nn.Module):
        return "; ".join(_parts_of(value))
    if isinstance(value, Tensor):
        numbers = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return f"{value.dtype} {tuple(value.shape)} {blake2b(numbers, digest_size=16).hexdigest()}"
    if isinstance(value, Mapping):
        return f"{{{', '.join(sorted(f'{key!r}: {_described(each)}' for key, each in value.items()))}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_described, value))}]"
    if isinstance(value, (set, frozenset)):
        return f"{{{', '.join(sorted(map(_described, value)))}}}"
    if value is None or isinstance(value, (int, float, complex, str, bytes, Enum, torch.dtype)):
        return repr(value)
    if type(value).__module__ == "numpy" and hasattr(value, "tobytes"):
        return f"{value.dtype} {value.shape} {blake2b(value.tobytes(), digest_size=16).hexdigest()}"
    if is_dataclass(value) and not isinstance(value, type):
        return (
            f"{qualified_name(value)} {_described({field.name: getattr(value, field.name) for field in fields(value)})}"
        )
    return qualified_name(value)


def _shard(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.safetensors"


def _write_shard(dataset: Any, model: Any, folder: Path, number: int, batch_size: int) -> None:
    first = number * SHARD_SIZE
    end = min(first + SHARD_SIZE, len(dataset))
    tensors: dict[str, Tensor] = {}
    entries: list[dict[str, Any]] = []
    for start in range(first, end, batch_size):
        loaded = [_load(dataset, index, len(model.modalities)) for index in range(start, min(start + batch_size, end))]
        encoded = iter(_encode([pieces for _, pieces in loaded if pieces], model, start))
        for entry, pieces in loaded:
            for i, piece in enumerate(next(encoded) if pieces else []):
                tensors[f"{len(entries)}.{i}"] = _kept(piece, model)
                kind, is_copied = (piece.type, piece.has_clean_copy) if isinstance(piece, Modality) else (None, False)
                entry["parts"].append({"type": kind, "is_learned": piece.is_learned, "has_clean_copy": is_copied})
            entries.append(entry)
    save_tensors(_shard(folder, number), tensors, {"samples": json.dumps(entries)})


@torch.no_grad()
def _encode(samples: list[list[Piece]], model: Any, start: int) -> list[list[Piece]]:
    if not samples:
        return []
    try:
        with drawing_from(generator_of(0, "latents", start)):
            return preparation.encode(samples, model.modalities, device=model.device, dtype=model.precision)
    except ValueError as error:
        raise ValueError(f"among {len(samples)} samples from index {start}: {error}") from error


def _kept(piece: Piece, model: Any) -> Tensor:
    if isinstance(piece, Text):
        return piece.ids
    return model.modalities[piece.type].spec.from_channel_last(piece.tensor).cpu().contiguous()


def _load(dataset: Any, index: int, num_modalities: int) -> tuple[dict[str, Any], list[Piece]]:
    """What is written of a sample beside its tensors, and its pieces: none where it is left out."""
    try:
        with generators_kept():
            seed_generators(sample_seed(0, index))
            loaded = dataset.modalities(index) if hasattr(dataset, "arrange") else dataset[index]
        sample = as_sample(loaded)
        pieces = parse_sample(sample.parts, num_modalities, "sample") if sample.parts else []  # of a text
    except SkipSample as reason:
        return {"skipped": str(reason)}, []
    except Exception as error:
        raise SampleError(f"{name_of(dataset, index)} could not be loaded: {type(error).__name__}: {error}") from error
    weight = None if sample.weight is None else float(sample.weight)  # may be a tensor
    return {"name": sample.name, "source": sample.source, "weight": weight, "parts": []}, pieces
