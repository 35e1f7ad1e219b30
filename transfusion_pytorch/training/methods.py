"""What a model offers to those who train it."""

from collections.abc import Callable
from typing import Any

from ema_pytorch import EMA
from torch import nn
from torch.utils.data import DataLoader

from transfusion_pytorch.data.loading import create_dataloader
from transfusion_pytorch.network.transformer import Transformer
from transfusion_pytorch.training.ema import create_ema
from transfusion_pytorch.training.parameters import hidden_matrices, parameter_groups, reset_parameters


class TrainingMethods(nn.Module):
    """Compiling, averaging, and the parameters that optimizers take. Mixed into `Transfusion`."""

    transformer: Any
    modalities: Any
    _reset_embeddings: Callable[[], None]

    def compile(self, **options: Any) -> None:
        """Compiles the transformer's layers (see `Transformer.compile`); the rest is too small to gain by it.

        Raises `TypeError` if the transformer is a module of the user's own.
        """
        if not isinstance(self.transformer, Transformer):
            raise TypeError(f"only a Transformer is compiled from here, this is a {type(self.transformer).__name__}")
        self.transformer.compile(**options)

    def begin_forward(self) -> None:
        """Does nothing by itself. FSDP's hooks run around it as around `forward` (see `evaluating.gathered`)."""

    def create_ema(self, beta: float = 0.99, **options: Any) -> EMA:
        """A moving average that can sample. It starts after 100 updates; `options` as in `training.ema.create_ema`."""
        return create_ema(self, beta=beta, **options)

    def create_dataloader(
        self, dataset: Any, batch_size: int | None = 16, shuffle: bool | None = False, **options: Any
    ) -> DataLoader:
        """Batches of a dataset of samples, as this model takes them. `options` are those of `data.create_dataloader`,
        such as `collate_fn=model.packer()`, and of `DataLoader`.
        """
        return create_dataloader(dataset, batch_size, shuffle, **options)

    def parameters_without_encoder_decoder(self) -> list[nn.Parameter]:
        """What is to be trained: all parameters but those of the frozen autoencoders."""
        frozen = {id(parameter) for io in self.modalities for module in io.frozen for parameter in module.parameters()}
        return [parameter for parameter in self.parameters() if id(parameter) not in frozen]

    def muon_parameters(self) -> list[nn.Parameter]:
        """The hidden matrices, for the Muon optimizer; the rest goes to AdamW."""
        return hidden_matrices(self.transformer)

    def parameter_groups(self, *, weight_decay: float, by_expert: bool = False) -> list[dict[str, Any]]:
        """Trained parameters for AdamW: what decays, and what does not (biases, gains).

        With `by_expert`, for an untied transformer, each group also has an `expert`, so that it can get a learning rate
        of its own: 0 for the layers that read text, i + 1 for those of modality i (the last expert has all others),
        None for what all share and for everything around the transformer. Raises `ValueError` without untied weights.
        """
        if not by_expert:
            return parameter_groups(self, weight_decay=weight_decay)
        if not getattr(self.transformer, "untied", ()):
            raise ValueError(
                "by_expert=True: this transformer has one set of weights for all; build it with untied=True"
            )
        return parameter_groups(self, weight_decay=weight_decay, experts=self.transformer.expert_parameters())

    def gradient_checkpointing_enable(self, kind: Any = True) -> None:
        """Activations are computed again in the backward pass instead of being kept (see `Transformer`).

        Raises `TypeError` if the transformer is a module of the user's own that cannot do that.
        """
        if not hasattr(self.transformer, "gradient_checkpointing_enable"):
            raise TypeError(
                f"the trunk, of type {type(self.transformer).__name__}, has no gradient_checkpointing_enable"
            )
        self.transformer.gradient_checkpointing_enable(kind)

    def gradient_checkpointing_disable(self) -> None:
        self.gradient_checkpointing_enable(False)

    def reset_parameters(self) -> None:
        """Initial values for all parameters but those of the frozen autoencoders, which have none.

        For a model built on the `meta` device: `model.to_empty(device=...)`, then this.
        """
        reset_parameters(self, but={module for io in self.modalities for module in io.frozen})
        self._reset_embeddings()
