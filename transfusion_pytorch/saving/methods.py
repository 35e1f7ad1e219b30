"""What a model offers for being saved, loaded and shared."""

import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from transfusion_pytorch.conversations.tokenizer import ChatTokenizer
from transfusion_pytorch.saving.card import CARD_FILE, ModelCard, is_ours, render
from transfusion_pytorch.saving.components import arguments_of, component_of, own_class
from transfusion_pytorch.saving.configuration import (
    CONFIG_FILE,
    check_names,
    constructor_arguments,
    describe,
    is_our_config,
    load_config,
)
from transfusion_pytorch.saving.files import save_json, save_tensors, whole_file
from transfusion_pytorch.saving.hub import folder_of, upload
from transfusion_pytorch.saving.tokenizer import (
    TOKENIZER_FILE,
    TOKENIZER_FILES,
    TokenizerFiles,
    load_tokenizer,
    read_tokenizer_files,
    tokenizer_json,
    write_tokenizer_files,
)
from transfusion_pytorch.saving.weights import WEIGHTS_FILE, build_without_weights, load_weights, weights_of

Model = TypeVar("Model", bound="PretrainedMethods")


class PretrainedMethods:
    """Saving and loading by folders of safetensors and JSON, for a module whose class is a registered component, or
    that says itself what it was built with.
    """

    name_or_path: str | None = None  # where it was loaded from; PEFT writes it into the configuration of an adapter
    example_call = "outputs = model(...)"  # a line of the model card
    _tokenizer: Any = None  # or its files, until somebody wants it

    def constructor_arguments(self) -> dict[str, Any]:
        """The arguments that build this module again. A subclass whose constructor takes other arguments returns those.

        Raises `TypeError` where they are not known: for a subclass of a registered class.
        """
        if component_of(self) is None:
            raise TypeError(
                f"{own_class(self).__name__} does not say what it was built with; decorate it with register_component, "
                "or override constructor_arguments()"
            )
        return arguments_of(self)

    @property
    def _num_text_tokens(self) -> int:
        """Which a tokenizer must fit to."""
        raise TypeError(f"{own_class(self).__name__} has no text tokens; leave the tokenizer out")

    def save_pretrained(self, folder: str | Path, *, card: ModelCard | None = None, tokenizer: Any = None) -> None:
        """Writes the model into a folder, which is made if need be:

        - `model.safetensors`: the `state_dict`, frozen autoencoders and latent statistics included, yours too
        - `config.json`: all arguments of the constructor, those of `Transformer`, `UNetDown`, `UNetUp` and `TimePolicy`
          included. Modules and functions of your own are named, and `from_pretrained` wants them handed over, unless
          their class is a registered component (`register_component`).
        - `README.md` with what the `card` says, unless there is one that was written by somebody else
        - `tokenizer.json` if there is a `tokenizer`, a `tokenizers.Tokenizer`, a `ChatTokenizer` or a fast one of
          `transformers`; of the latter two also `chat_template.jinja` and `tokenizer_config.json`. By default the one
          that the model was loaded with. Without any, that of a model saved here before is removed.

        Files that are there are replaced one by one, each of them whole or not at all. All processes that share a
        model by `fully_shard` call this, and one of them writes. Raises `TypeError` or `ValueError` for what cannot be
        saved, before anything is written, and `OSError` where the folder cannot be.
        """
        folder = Path(folder).expanduser()
        self._write(folder, source=folder.resolve().name, card=card, tokenizer=tokenizer)

    @classmethod
    def from_pretrained(
        cls: type[Model],
        folder_or_hub_id: str | Path,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        **modules_and_overrides: Any,
    ) -> Model:
        """The model of a folder that `save_pretrained` wrote, or of a repository on the Hugging Face hub, in evaluation
        mode: call `train()` to go on training.

        `device` is where the weights are loaded to (the CPU by default), `dtype` what floating point parameters are
        cast to (else they stay what they were). `modules_and_overrides` are arguments of the constructor: modules of
        your own that the configuration only names (one for all modalities that had one, or a list), and anything that
        is to be other than it was. Modules handed over get the weights that were saved. `revision` to
        `local_files_only` are those of `huggingface_hub.snapshot_download`.

        Nothing is unpickled, and nothing is imported because a file names it. Raises `ValueError` that names the file
        for one that is cut off, foreign or too new; one that lists what is to be handed over; one that lists weights
        that are missing, left over or of another shape; and `FileNotFoundError` where there is no such model.
        """
        target = checked_device_and_dtype(device, dtype)
        download = dict(revision=revision, token=token, cache_dir=cache_dir)
        folder = folder_of(
            folder_or_hub_id, force_download=force_download, local_files_only=local_files_only, **download
        )
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} has no {name}: it is no model that save_pretrained wrote")
        path = folder / CONFIG_FILE
        config = load_config(path)
        build = partial(_build, cls, config, modules_and_overrides, path)
        with torch.inference_mode(False):  # tensors made in it could never be trained
            model = build_without_weights(build)
            load_weights(model, folder / WEIGHTS_FILE, build, device=target, dtype=dtype)
        model.name_or_path = str(folder_or_hub_id)
        model._tokenizer = read_tokenizer_files(folder)
        return model.eval()

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        commit_message: str = "Upload model",
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        card: ModelCard | None = None,
        tokenizer: Any = None,
    ) -> str:
        """Uploads what `save_pretrained` writes to a repository on the Hugging Face hub, which is made if there is
        none. Returns the address of the commit, or nothing on a process that leaves this to another (see
        `save_pretrained`).
        """
        with tempfile.TemporaryDirectory() as folder:
            self._write(Path(folder), source=repo_id, card=card, tokenizer=tokenizer)
            if not self._is_writer:
                return ""
            return upload(
                Path(folder),
                repo_id,
                private=private,
                commit_message=commit_message,
                token=token,
                revision=revision,
                create_pr=create_pr,
            )

    @property
    def tokenizer(self) -> Any:
        """The tokenizer that the model was saved with, or None: a `ChatTokenizer` if it has a chat template or special
        tokens, a `tokenizers.Tokenizer` otherwise. Needs the package of that name.
        """
        if isinstance(files := self._tokenizer, TokenizerFiles):
            where, size = f"{TOKENIZER_FILE} of {self.name_or_path}", self._num_text_tokens
            if files.is_plain:
                self._tokenizer = load_tokenizer(files.tokenizer, size, where)
            else:
                self._tokenizer = ChatTokenizer.of_files(files, where, num_text_tokens=size)
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    @property
    def _is_writer(self) -> bool:
        """Of the processes that share a model by `fully_shard`, one writes."""
        return not isinstance(self, FSDPModule) or dist.get_rank() == 0

    def _write(self, folder: Path, *, source: str, card: ModelCard | None, tokenizer: Any) -> None:
        config = describe(own_class(self), self.constructor_arguments())
        weights = weights_of(self)  # type: ignore[arg-type]
        tokenizer = self._tokenizer if tokenizer is None else tokenizer
        files = None if tokenizer is None else files_of(tokenizer, self._num_text_tokens)
        count = sum(weights[name].numel() for name, _ in self.named_parameters())  # type: ignore[attr-defined]
        card = card or ModelCard(title=f"{own_class(self).__name__} model")
        readme = render(card, config, source=source, num_parameters=count, example_call=self.example_call)
        if not self._is_writer:
            return
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"{folder} is a file; save_pretrained needs the name of a folder")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            has_other_tokenizer = files is None and is_our_config(folder / CONFIG_FILE)
            save_tensors(folder / WEIGHTS_FILE, weights, {"format": "pt"})
            save_json(folder / CONFIG_FILE, config)
            if files is not None:
                write_tokenizer_files(folder, files)
            elif has_other_tokenizer:  # of a model that was saved here before
                for name in TOKENIZER_FILES:
                    (folder / name).unlink(missing_ok=True)
            if is_ours(folder / CARD_FILE):
                with whole_file(folder / CARD_FILE) as partial_file:
                    partial_file.write_text(readme, encoding="utf-8")
        except PermissionError as error:
            raise PermissionError(f"{folder} cannot be written to: {error}") from error


class SavingMethods(PretrainedMethods):
    """Saving and loading, mixed into `Transfusion`."""

    vocabulary: Any
    transformer: Any
    modalities: Any
    loss_weights: Any
    fallback_to_default_shape_if_invalid: bool
    model_output_clean: bool
    odeint_kwargs: dict[str, Any]
    prob_uncond: float
    time_policy: Any
    ignore_index: int
    time_conditioning: str
    tie_embeddings: bool
    is_text_frozen: bool

    example_call = "sample = model.sample(max_length=512)  # [text, (type, modality), text, ...]"

    def constructor_arguments(self) -> dict[str, Any]:
        """The arguments that build this model again, as they are now: what was changed after it was built, such as
        `prob_uncond` or an encoder, is what counts. Modules are the model's own.

        A subclass whose constructor takes other arguments returns those instead.
        """
        weights = self.loss_weights
        return dict(
            num_text_tokens=self.vocabulary.num_text,
            transformer=self.transformer,
            **self.modalities.arguments(),
            fallback_to_default_shape_if_invalid=self.fallback_to_default_shape_if_invalid,
            text_loss_weight=weights.text,
            flow_loss_weight=weights.flow,
            velocity_consistency_loss_weight=weights.velocity,
            reconstruction_loss_weight=weights.recon,
            model_output_clean=self.model_output_clean,
            odeint_kwargs=self.odeint_kwargs,
            prob_uncond=self.prob_uncond,
            time_policy=self.time_policy,
            ignore_index=self.ignore_index,
            time_conditioning=self.time_conditioning,
            eos_id=self.vocabulary.eos_id,
            tie_embeddings=self.tie_embeddings,
            freeze_text=self.is_text_frozen,
        )

    @property
    def _num_text_tokens(self) -> int:
        return self.vocabulary.num_text


def files_of(tokenizer: Any, num_text_tokens: int) -> TokenizerFiles:
    """What is written of a tokenizer. Errors as in `tokenizer_json`."""
    if isinstance(tokenizer, TokenizerFiles):
        return tokenizer
    text = tokenizer_json(tokenizer, num_text_tokens)
    chats = any(getattr(tokenizer, name, None) for name in ("chat_template", "special_tokens", "special_tokens_map"))
    return ChatTokenizer(tokenizer).files() if chats else TokenizerFiles(text)


def _build(cls: Any, config: Mapping[str, Any], given: Mapping[str, Any], path: Path) -> Any:
    """A model of a configuration. Raises `ValueError` that names the file."""
    try:
        arguments = constructor_arguments(config, given, path)
    except RecursionError as error:
        raise ValueError(f"{path} is malformed: it is nested too deeply") from error
    try:
        check_names(cls, arguments)
        return cls(**arguments)
    except TypeError as error:
        raise TypeError(f"{path}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def checked_device_and_dtype(device: Any, dtype: Any) -> torch.device:
    if dtype is not None and (not isinstance(dtype, torch.dtype) or not dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating point type such as torch.bfloat16, got {dtype!r}")
    try:
        target = torch.device("cpu" if device is None else device)
        torch.empty(1, device=target).cpu()
    except (AssertionError, RuntimeError) as error:  # torch built without CUDA asserts that it is there
        raise ValueError(f"weights cannot be loaded to device {str(device)!r}: {error}") from error
    return torch.device("cpu") if target.type == "cpu" else target  # safetensors knows no cpu:0
