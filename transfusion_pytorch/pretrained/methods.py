"""What a model offers to those who begin with a language model."""

import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from transfusion_pytorch.conversations.tokenizer import ChatTokenizer
from transfusion_pytorch.data.optional import import_optional
from transfusion_pytorch.modalities.build import count_modalities
from transfusion_pytorch.modalities.timing import TimeConditioning
from transfusion_pytorch.network.experts import PARTS, TEXT
from transfusion_pytorch.network.transformer import Transformer
from transfusion_pytorch.network.vocabulary_layers import TextEmbedding, TextLogits
from transfusion_pytorch.pretrained.families import rotary_bound, transformer_arguments
from transfusion_pytorch.pretrained.language_model import LanguageModel, find_language_model
from transfusion_pytorch.pretrained.weights import Weights, load_trunk, load_vocabulary
from transfusion_pytorch.saving.methods import checked_device_and_dtype
from transfusion_pytorch.saving.weights import build_without_weights

OF_THE_LANGUAGE_MODEL = ("transformer", "num_text_tokens", "tie_embeddings")  # arguments of `Transfusion`
TOKENIZER_SOURCES = ("tokenizer.model", "vocab.json", "vocab.txt")  # besides tokenizer.json
# the linear layers that LoRA adapts, by the name that `untied` has for them
ADAPTED = {"attention": "attn", "feedforward": "ff"}

Model = TypeVar("Model", bound="LanguageModelMethods")


class LanguageModelMethods:
    """Beginning with a language model. Mixed into `Transfusion`."""

    transformer: Any
    text_embedding: Any
    to_logits: Any
    time_embedding: Any
    type_embedding: Any
    modalities: Any
    vocabulary: Any
    tie_embeddings: bool

    is_text_frozen = False  # by `freeze_text`; saved with the model

    @classmethod
    def from_pretrained_lm(
        cls: type[Model],
        name_or_model: str | Path | nn.Module,
        *,
        dim_latent: int | Sequence[int],
        time_conditioning: TimeConditioning = "added",
        untied: bool | Sequence[str] = False,
        num_experts: int | None = None,
        freeze_text: bool = False,
        tokenizer: Any = None,
        eos_id: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        gguf_file: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        dropout: float = 0.0,
        use_checkpoint: Any = False,
        use_flex_attn: bool | None = None,
        **arguments: Any,
    ) -> Model:
        """A model whose trunk is a causal language model of `transformers`: Llama (Vicuna, SmolLM), Qwen2 or Qwen3.

        `name_or_model` is a folder, the id of a repository on the Hugging Face hub, or the module itself. Its weights
        are loaded into a `Transformer` (files one tensor at a time), which gives the same logits for text. Ids of text
        are those of its tokenizer; markers and the characters of shapes get new rows, the mean of all others. Tied
        embeddings stay tied. `arguments` are those of `Transfusion`, such as `modality_default_shape`.

        - `dim_latent`: channels of each modality; its length is the number of modalities
        - `time_conditioning`: how spans are told their time; `"norms"` makes the norms adaptive, from where they stand
        - `untied`: modalities get copies of the layers (LMFusion, arXiv 2412.15188), all or `"attention"`,
          `"feedforward"`, `"norms"`; `num_experts` of them, text included, by default one more than modalities (2: all
          modalities share theirs). With `freeze_text` what reads text is not trained (see `freeze_text()`)
        - `tokenizer`: a `ChatTokenizer` or what one is made of; by default that of the folder or repository, if it has
          one. A module has none, so hand it over
        - `eos_id`: the id that ends text; by default that of the tokenizer or the configuration
        - `dtype` of all parameters, by default that of the weights; `device` they come to
        - `gguf_file`: the name of a GGUF file in the folder, read by `transformers` as a whole
        - `revision` to `local_files_only`: those of `huggingface_hub.snapshot_download`. Of a repository only the
          configuration and the tokenizer are downloaded before they and all arguments are known to be right, and then
          only the safetensors that are read (a `gguf_file` has all of that in one)
        - `dropout` (a probability), `use_checkpoint` (recompute layers in the backward pass) and `use_flex_attn` (True:
          flex attention everywhere, False: nowhere, None: where it is fast): those of `Transformer`

        The model is in training mode. Raises `ImportError` without `transformers`, `FileNotFoundError` for a folder,
        repository or `gguf_file` that is not there and for a model without safetensors, and `ValueError` or `TypeError`
        that says what to do for an architecture that is not supported, incomplete weights, or a tokenizer that does not
        fit, before anything large is made. Warns where there is a tokenizer that cannot be read, where tables that the
        configuration ties have different numbers and are not tied, where a file has weights that no such model has, and
        of rotary positions that change in long samples.
        """
        target = checked_device_and_dtype(device, dtype)
        check_arguments(untied, num_experts, arguments)
        hub = dict(revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
        with torch.inference_mode(False):
            source = find_language_model(name_or_model, gguf_file=gguf_file, **hub)
            tokenizer = tokenizer_of(source, gguf_file) if tokenizer is None else ChatTokenizer(tokenizer)
            check_sizes(source, tokenizer)
            trunk: dict[str, Any] = transformer_arguments(source.config) | dict(
                untied=untied,
                num_experts=count_modalities(dim_latent) + 1 if num_experts is None else num_experts,
                norm="adaptive_rms" if time_conditioning == "norms" else "rms",
                dropout=dropout,
                use_checkpoint=use_checkpoint,
                use_flex_attn=use_flex_attn,
            )
            with torch.device("meta"):
                transformer = Transformer(**trunk)
            build: Any = partial(
                cls,
                num_text_tokens=source.num_text,
                transformer=transformer,
                dim_latent=dim_latent,
                time_conditioning=time_conditioning,
                eos_id=eos_of(source, tokenizer) if eos_id is None else eos_id,
                freeze_text=freeze_text,
                **arguments,
            )
            build_without_weights(build)  # what is wrong is found before weights are downloaded and read
            weights = source.weights()
            model = build(tie_embeddings=weights.is_tied)
            fill(model, source.config, weights, weights.dtype if dtype is None else dtype)
        model.tokenizer = tokenizer
        if freeze_text:
            model.freeze_text()  # again: the weights are other parameters
        return model.to(target)

    def freeze_text(self) -> None:
        """Leaves what reads text as it is: its layers, embedding and logits. What reads modalities is trained, and so
        are the markers. Logits of text behind text alone stay the same to the bit. A saved model is loaded frozen.

        Raises `ValueError` unless text has layers of its own (`untied=True`).
        """
        if not self.vocabulary.num_text:
            raise ValueError("the model has no text (num_text_tokens is 0), so none can be frozen")
        if getattr(self.transformer, "untied", ()) != PARTS:
            raise ValueError(
                "text can be frozen where modalities have layers of their own: build the transformer with untied=True. "
                "To train a language model whose layers are shared, with its weights as they are, use LoRA"
            )
        self._train_text(False)

    def unfreeze_text(self) -> None:
        """The inverse of `freeze_text`; does nothing where text is not frozen. `from_pretrained(folder,
        freeze_text=False)` loads a model that was saved frozen in that state.
        """
        if self.is_text_frozen:
            self._train_text(True)

    def _train_text(self, is_trained: bool) -> None:
        self.is_text_frozen = not is_trained
        trunk = self.transformer
        readers = [*trunk.layers_of(TEXT), trunk.final_norm[TEXT], self.text_embedding.text]
        readers += [self.to_logits.text] if isinstance(self.to_logits, TextLogits) else []
        for module in readers:
            module.requires_grad_(is_trained)

    def lora_config(self, rank: int = 16, *, alpha: float | None = None, dropout: float = 0.0, **options: Any) -> Any:
        """A `peft.LoraConfig` for the linear layers of the transformer, by default with `alpha = 2 rank`.

        `peft.get_peft_model(model, model.lora_config())` trains these, and all that the language model did not have:
        rows of markers, adapters of modalities, times. The saved adapter has nothing else. Where weights are untied,
        those of modalities are adapted and the layers of text are left alone, so logits of text behind text stay the
        same to the bit. Where only norms are untied (`["norms"]`), text and modalities share what is adapted. `options`
        are those of `LoraConfig`; `dropout` is of what goes through the adapter.

        PEFT compares an adapter with its base by names and shapes only: load it onto a model that was built with the
        same arguments. Raises `ImportError` without `peft`, and `ValueError` for a rank below 1 or a dropout outside of
        [0, 1).
        """
        if not isinstance(rank, int) or rank < 1:
            raise ValueError(f"rank must be an int of at least 1, got {rank!r}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is a probability below 1, got {dropout}")
        peft = import_optional("peft", extra="adapters")
        untied = self.transformer.untied
        own = [name for part, name in ADAPTED.items() if part in untied]
        adapted = "|".join(own or ADAPTED.values())
        # modules that experts share have one name, that of the first
        experts = r"\.experts\.[1-9]\d*" if own else r"\.experts\.0" if untied else ""
        modalities = [
            f"modalities.{i}.{name}"
            for i, io in enumerate(self.modalities)
            for name, module in (("adapter", io.adapter), ("positions", io.positions), ("timing", io.timing))
            if module is not None
        ]
        markers = [
            f"{name}.markers" if isinstance(getattr(self, name), TextEmbedding | TextLogits) else name
            for name in ("text_embedding", *([] if self.tie_embeddings else ["to_logits"]))
        ]
        named = self.transformer.named_modules(prefix="transformer")
        norms = [name for name, _ in named if name.endswith(".to_modulation")]
        arguments: dict[str, Any] = dict(
            r=rank,
            lora_alpha=2 * rank if alpha is None else alpha,
            lora_dropout=dropout,
            target_modules=rf"(.*\.)?transformer\.layers\.\d+{experts}\.({adapted})\.to_(qkv|out|hidden)",
            modules_to_save=["time_embedding", "type_embedding", *markers, *modalities, *norms],
        )
        return peft.LoraConfig(**(arguments | options))


def check_arguments(untied: bool | Sequence[str], num_experts: int | None, arguments: dict[str, Any]) -> None:
    """Raises `ValueError` for what is wrong with any language model."""
    if torch.get_default_device().type == "meta":
        raise ValueError('weights cannot be loaded inside of torch.device("meta"): call from_pretrained_lm outside')
    if num_experts is not None and not untied:
        raise ValueError(f"num_experts={num_experts} are of untied weights; set untied=True")
    if num_experts is not None and num_experts < 2:
        raise ValueError(f"num_experts is at least 2, text and one for modalities, got {num_experts}")
    if given := [name for name in OF_THE_LANGUAGE_MODEL if name in arguments]:
        raise ValueError(f"{', '.join(given)}: the language model says that; leave it out")


def fill(model: Any, config: Any, weights: Weights, dtype: torch.dtype) -> None:
    """Gives a model whose trunk is on the meta device the language model's weights, and all parameters this dtype."""
    load_vocabulary(weights, model.text_embedding, model.to_logits, dtype)
    load_trunk(config, weights.tensors, model.transformer, dtype)
    _begin_at_zero(model.transformer, dtype)
    adapters = [module for io in model.modalities for module in io.trained]
    for module in (model.time_embedding, model.type_embedding, *adapters):
        module.to(dtype)


def check_sizes(source: LanguageModel, tokenizer: ChatTokenizer | None) -> None:
    """Raises `ValueError` for a tokenizer that has ids which the language model has not, and warns of positions after
    which it would not be itself.
    """
    if tokenizer is not None and tokenizer.num_tokens > source.num_text:
        raise ValueError(
            f"the tokenizer has {tokenizer.num_tokens} ids, and the language model {source.num_text}: it is another's, "
            "or tokens were added to it that the model never had; hand over one without them (tokenizer=...)"
        )
    if (bound := rotary_bound(source.config)) is not None:
        warnings.warn(
            f"the rotary positions of the language model are those of transformers in samples of up to {bound} "
            "positions; in longer ones, where transformers would change them with the length, they stay the same here",
            stacklevel=3,
        )


def tokenizer_of(source: LanguageModel, gguf_file: str | None) -> ChatTokenizer | None:
    """That of the folder of a language model, None where there is none. Without a `tokenizer.json`, `transformers`
    makes one of what there is (`tokenizer.model`); where it cannot, a warning says what to do.
    """
    if (folder := source.folder) is None:
        return None
    if gguf_file is None and (folder / "tokenizer.json").is_file():
        return ChatTokenizer.load(folder)
    from transformers import AutoTokenizer

    if gguf_file is not None:
        return ChatTokenizer(AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file))
    found = [name for name in TOKENIZER_SOURCES if (folder / name).is_file()]
    if not found:
        return None
    try:
        return ChatTokenizer(AutoTokenizer.from_pretrained(folder))
    except Exception as error:  # of transformers, of packages that it asks for, of files
        reason = str(error).strip().partition("\n")[0]
        warnings.warn(
            f"{folder} has no tokenizer.json, and transformers makes no fast tokenizer of {', '.join(found)} "
            f"({reason}), so the model has no tokenizer: install sentencepiece and protobuf, or hand one over with "
            "tokenizer=...",
            stacklevel=3,
        )
        return None


def eos_of(source: LanguageModel, tokenizer: ChatTokenizer | None) -> int:
    """The id that ends text. Raises `ValueError` where nobody says which."""
    candidates = [getattr(tokenizer, "eos_id", None), *source.eos_ids]
    found = next((token for token in candidates if token is not None), None)
    if found is None:
        raise ValueError("neither tokenizer nor configuration say which id ends text: hand over eos_id=...")
    return found


@torch.no_grad()
def _begin_at_zero(transformer: nn.Module, dtype: torch.dtype) -> None:
    """What a language model does not have are the modulations of its norms, which start at zero."""
    for module in transformer.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                setattr(module, name, nn.Parameter(torch.zeros(parameter.shape, dtype=dtype)))
