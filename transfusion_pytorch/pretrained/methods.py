"""What a model offers to those who begin with a language model."""

from collections.abc import Sequence
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
from transfusion_pytorch.pretrained.language_model import (
    LanguageModel,
    check_weights,
    load_trunk,
    load_vocabulary,
    opened,
)
from transfusion_pytorch.saving.methods import checked_device_and_dtype

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

        - `time_conditioning`: how spans are told their time; `"norms"` makes the norms adaptive, from where they stand
        - `untied`: modalities get copies of the layers (LMFusion, arXiv 2412.15188); see `Transformer`. With
          `freeze_text` what reads text is not trained (see `freeze_text()`).
        - `tokenizer`: by default that of the folder or repository, if it has one
        - `eos_id`: the id that ends text; by default that of the tokenizer or the configuration
        - `dtype` of all parameters, by default that of the weights; `device` they come to
        - `gguf_file`: the name of a GGUF file in the folder, read by `transformers` as a whole
        - `revision` to `local_files_only`: those of `huggingface_hub.snapshot_download`

        The model is in training mode. Raises `ImportError` without `transformers`, and `ValueError` or `TypeError` that
        says what to do for an architecture that is not supported, incomplete weights, or a tokenizer that does not fit,
        before anything large is made.
        """
        target = checked_device_and_dtype(device, dtype)
        if num_experts is not None and not untied:
            raise ValueError(f"num_experts={num_experts} are of untied weights; set untied=True")
        hub = dict(revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
        with opened(name_or_model, gguf_file=gguf_file, **hub) as source, torch.inference_mode(False):
            check_weights(source)
            tokenizer = tokenizer_of(source, gguf_file) if tokenizer is None else ChatTokenizer(tokenizer)
            if tokenizer is not None and tokenizer.num_tokens > source.num_text:
                raise ValueError(
                    f"the tokenizer has {tokenizer.num_tokens} ids, and the language model {source.num_text}: it is "
                    "another's"
                )
            trunk: dict[str, Any] = source.transformer_arguments() | dict(
                untied=untied,
                num_experts=num_experts or count_modalities(dim_latent) + 1,
                norm="adaptive_rms" if time_conditioning == "norms" else "rms",
                dropout=dropout,
                use_checkpoint=use_checkpoint,
                use_flex_attn=use_flex_attn,
            )
            with torch.device("meta"):
                transformer = Transformer(**trunk)
            build: Any = cls
            model = build(
                num_text_tokens=source.num_text,
                transformer=transformer,
                dim_latent=dim_latent,
                time_conditioning=time_conditioning,
                eos_id=eos_of(source, tokenizer) if eos_id is None else eos_id,
                tie_embeddings=source.is_tied,
                **arguments,
            )
            dtype = source.dtype if dtype is None else dtype
            load_vocabulary(source, model.text_embedding, model.to_logits, dtype)
            load_trunk(source, transformer, dtype)
        _begin_at_zero(transformer, dtype)
        for module in (
            model.time_embedding,
            model.type_embedding,
            *(it for io in model.modalities for it in io.trained),
        ):
            module.to(dtype)
        model.tokenizer = tokenizer
        if freeze_text:
            model.freeze_text()
        return model.to(target)

    def freeze_text(self) -> None:
        """Leaves what reads text as it is: its layers, embedding and logits. What reads modalities is trained, and so
        are the markers. Logits of text behind text alone stay the same to the bit.

        Raises `ValueError` unless text has layers of its own (`untied=True`).
        """
        trunk = self.transformer
        if not self.vocabulary.num_text:
            raise ValueError("the model has no text (num_text_tokens is 0), so none can be frozen")
        if getattr(trunk, "untied", ()) != PARTS:
            raise ValueError(
                "text can be frozen where modalities have layers of their own: build the transformer with untied=True. "
                "To train a language model whose layers are shared, with its weights as they are, use LoRA"
            )
        frozen = [*trunk.layers_of(TEXT), trunk.final_norm[TEXT], self.text_embedding.text]
        frozen += [self.to_logits.text] if isinstance(self.to_logits, TextLogits) else []
        for module in frozen:
            module.requires_grad_(False)

    def lora_config(self, rank: int = 16, *, alpha: float | None = None, dropout: float = 0.0, **options: Any) -> Any:
        """A `peft.LoraConfig` for the linear layers of the transformer, by default with `alpha = 2 rank`.

        `peft.get_peft_model(model, model.lora_config())` trains these, and all that the language model did not have:
        rows of markers, adapters of modalities, times. The saved adapter has nothing else. Where weights are untied,
        the layers of text are left alone, and logits of text behind text stay the same to the bit. `options` are those
        of `LoraConfig`. Raises `ImportError` without `peft`.
        """
        peft = import_optional("peft", extra="adapters")
        experts = r"\.experts\.[1-9]\d*" if self.transformer.untied else ""
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
            target_modules=rf"(.*\.)?transformer\.layers\.\d+{experts}\.(attn|ff)\.to_(qkv|out|hidden)",
            modules_to_save=["time_embedding", "type_embedding", *markers, *modalities, *norms],
        )
        return peft.LoraConfig(**(arguments | options))


def tokenizer_of(source: LanguageModel, gguf_file: str | None) -> ChatTokenizer | None:
    """That of the folder of a language model, None where there is none."""
    if source.folder is None:
        return None
    if gguf_file is not None:
        from transformers import AutoTokenizer

        return ChatTokenizer(AutoTokenizer.from_pretrained(source.folder, gguf_file=gguf_file))
    return ChatTokenizer.load(source.folder) if (source.folder / "tokenizer.json").is_file() else None


def eos_of(source: LanguageModel, tokenizer: ChatTokenizer | None) -> int:
    """The id that ends text. Raises `ValueError` where nobody says which."""
    of_config = getattr(source.config, "eos_token_id", None)
    candidates = [
        getattr(tokenizer, "eos_id", None),
        *(of_config if isinstance(of_config, list) else [of_config]),
    ]
    found = next((int(token) for token in candidates if token is not None), None)
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
