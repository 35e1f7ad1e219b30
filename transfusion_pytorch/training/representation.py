"""Self-distillation of representations beside the ordinary loss, with an EMA of the model as the teacher.

n tokens of the stream, t tokens of modalities among them, k latents of one modality, m spans, c channels, d model.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from transfusion_pytorch.evaluating import evaluating
from transfusion_pytorch.modalities.latents import LatentsByType
from transfusion_pytorch.network.precision import precise
from transfusion_pytorch.network.transformer import Transformer
from transfusion_pytorch.sequence.batch import Batch
from transfusion_pytorch.sequence.counts import TargetCounts
from transfusion_pytorch.training.distributed import zero_gradients
from transfusion_pytorch.training.ema import SAMPLING_METHODS, create_ema
from transfusion_pytorch.training.losses import ErrorSum, LossBreakdown, divided


class SelfMaskedLosses(NamedTuple):
    """What the total is made of.

    - `model`: the model's own loss, or its `LossBreakdown` with `return_breakdown=True`
    - `representation`: the mean error of a modality token, 0 where the batch has none to learn
    """

    model: Tensor | LossBreakdown
    representation: Float[Tensor, ""]


def cosine_distance(student: Float[Tensor, "t d"], teacher: Float[Tensor, "t d"]) -> Float[Tensor, " t"]:
    """`1 - cos` of each token, as half the squared distance of unit vectors: exactly 0 for equal ones."""
    return (F.normalize(student, dim=-1) - F.normalize(teacher, dim=-1)).square().sum(dim=-1) / 2


class PredictionHead(nn.Module):
    """From the student's hidden state to the teacher's: a residual MLP, which starts as the identity."""

    def __init__(self, dim: int):
        super().__init__()
        self.to_hidden, self.to_out = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)
        nn.init.zeros_(self.to_out.weight)
        nn.init.zeros_(self.to_out.bias)

    def forward(self, x: Float[Tensor, "t d"]) -> Float[Tensor, "t d"]:
        hidden = F.silu(self.to_hidden(x.to(self.to_hidden.weight.dtype)))
        return x + self.to_out(hidden).to(x.dtype)


class SelfMaskedRepTraining(nn.Module):
    """Trains a `Transfusion` with a second loss: hidden states of a student layer predict those of a teacher layer.

    The teacher is an EMA of the model. Both see one batch at the same times and with the same noise, but some of the
    student's latents are zeroed. The loss compares the two at the tokens of all modalities that have a flow loss.

    - `net`: the model, whose trunk is a `Transformer`
    - `ema_beta`: decay of the teacher, which `update()` moves after every optimizer step
    - `rep_loss_weight`: `total = model's loss + rep_loss_weight * representation loss`. With 0 there is neither a mask
      nor a teacher's forward pass, and the loss is the model's own
    - `student_layer`, `teacher_layer`: from 0, or from -1 backwards. A transformer of fewer than 3 layers takes its
      first one for the default of -3
    - `loss_fn`: of `(t, d)` predictions and `(t, d)` targets, both layer-normed without gains before the prediction
      head, gives the error of each token `(t,)`
    - `student_dropout_rate`, `teacher_dropout_rate`: which share of the noised latents is zeroed in training. What the
      teacher lacks the student lacks as well. Without `use_asymmetric_dropout` neither lacks anything

    In evaluation nothing is masked. Text and `Condition`s never are. The flow loss covers masked latents too, which the
    model must then infer from their neighbours. Sampling methods (`sample`, `generate_modality_only`, ...) are those of
    the teacher. `student` is `net` itself; `teacher` is an `EMA`, fit for `velocity_consistency_ema_model`; `head` is
    needed in training only. The optimizer takes `parameters()`; the teacher's have no gradient.

    Sources: data2vec (arXiv 2202.03555: an EMA teacher of unmasked input, normalised targets), SRA (arXiv 2505.02831:
    an earlier layer learns from a later one of the EMA, without an external encoder), REPA (arXiv 2410.06940: cosine
    similarity of projected hidden states), BYOL (arXiv 2006.07733: a predictor on the student's side alone).

    Raises `TypeError` for a `net` of another kind or one that `fully_shard` has split, and `ValueError` for numbers and
    layers out of range.
    """

    def __init__(
        self,
        net: Any,
        ema_beta: float = 0.999,
        rep_loss_weight: float = 0.1,
        student_layer: int = -3,
        teacher_layer: int = -1,
        loss_fn: Callable[[Tensor, Tensor], Tensor] = cosine_distance,
        use_asymmetric_dropout: bool = True,
        student_dropout_rate: float = 0.1,
        teacher_dropout_rate: float = 0.0,
    ):
        super().__init__()
        trunk = getattr(net, "transformer", None)
        if not isinstance(trunk, Transformer):
            raise TypeError(f"net must be a Transfusion whose transformer is a Transformer, got {type(net).__name__}")
        rates, depth = (student_dropout_rate, teacher_dropout_rate), trunk.depth
        student_layer = max(student_layer, -depth) if student_layer == -3 else student_layer
        most = student_dropout_rate if use_asymmetric_dropout else 1  # the teacher sees at least what the student sees
        layers, which = range(-depth, depth), f"be one of the {depth} layers, {-depth} to {depth - 1}"
        for name, value, is_right, rule in (
            ("ema_beta", ema_beta, 0 <= ema_beta <= 1, "lie between 0 and 1"),
            ("rep_loss_weight", rep_loss_weight, 0 <= rep_loss_weight < math.inf, "be finite and not negative"),
            ("student_layer", student_layer, student_layer in layers, which),
            ("teacher_layer", teacher_layer, teacher_layer in layers, which),
            ("student_dropout_rate", rates[0], 0 <= rates[0] < 1, "be at least 0 and below 1"),
            ("teacher_dropout_rate", rates[1], 0 <= rates[1] <= most, f"be from 0 to the student's, {most}"),
        ):
            if not is_right:
                raise ValueError(f"{name} must {rule}, got {value}")
        self.student_layer, self.teacher_layer = student_layer % depth, teacher_layer % depth
        self.rep_loss_weight, self.loss_fn = rep_loss_weight, loss_fn
        self.rates = rates if use_asymmetric_dropout else (0.0, 0.0)
        self.student = net
        self.teacher = create_ema(net, beta=ema_beta, update_every=1, update_after_step=0)
        self.head = PredictionHead(net.dim).to(device=net.device, dtype=net.dtype)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.teacher, name) if name in SAMPLING_METHODS else super().__getattr__(name)

    def forward(self, samples: Any, **options: Any) -> tuple[Tensor, SelfMaskedLosses]:
        """The total loss and its two parts. `samples` and `options` are those of `Transfusion.forward`; `counts` divide
        the representation loss, too. Raises `ValueError` for `reduction` and `return_loss`, which the model itself has.
        """
        if options.get("reduction", "mean") != "mean" or not options.get("return_loss", True):
            raise ValueError("reduction and return_loss=False are options of the model: call `.student` for them")
        found, breaks_down = [], options.pop("return_breakdown", False)
        network = dict(run_network=partial(self._run_both, found)) if self.rep_loss_weight else {}
        loss, parts = self.student(samples, **options, **network, return_breakdown=True)
        errors = found[0] if found else ErrorSum(loss.new_zeros(()), loss.new_zeros(()))
        representation = self._mean(errors, options.get("counts"))
        total = loss + self.rep_loss_weight * representation
        return total, SelfMaskedLosses(parts if breaks_down else loss, representation)

    def update(self) -> None:
        """Moves the teacher towards the student. Call it after each optimizer step."""
        self.teacher.update()

    update_teacher = update

    def _run_both(self, found: list[ErrorSum], batch: Batch, x_t: LatentsByType, t: Tensor, generator: Any) -> Any:
        """Runs student and teacher over a stream. Returns the student's output; the errors go to `found`."""
        stream, masks = batch.stream, self.training and self.rates[0] > 0
        seen = masked(x_t, batch, self.rates, generator) if masks else [x_t, x_t]
        states: list[dict[int, Any]] = [{self.student_layer: None}, {self.teacher_layer: None}]
        output = self.student.forward_stream(stream, seen[0], t, hidden_states=states[0])
        if not x_t:
            return output
        model: Any = self.teacher.ema_model
        with evaluating(model):
            model.forward_stream(stream, seen[1], t, hidden_states=states[1])
        slots = torch.cat([placement.slots for placement in stream.placements.values()])
        hidden = (state.index_select(0, slots) for each in states for state in each.values())
        student, teacher = (F.layer_norm(x.to(precise(x.dtype)), x.shape[-1:]) for x in hidden)
        errors, weight = self.loss_fn(self.head(student), teacher), token_weights(batch, slots)
        if errors.shape != weight.shape:
            raise ValueError(f"loss_fn must give one error per token, {tuple(weight.shape)}, got {tuple(errors.shape)}")
        found.append(ErrorSum((errors * weight).sum(), weight.sum()))
        return output

    def _mean(self, errors: ErrorSum, counts: TargetCounts | None) -> Float[Tensor, ""]:
        """Over the batch, the batches of all processes, or what the caller's counts cover."""
        total, count = errors.total[None], errors.count[None]
        if counts is not None:
            channels = [io.spec.dim_latent for io in self.student.modalities]
            count = (counts.latents.to(total) / total.new_tensor(channels)).sum()[None]
        if (processes := self.student._processes()) is None:
            return divided(total, count)[0]
        given = None if counts is None else counts.processes
        mean = processes.means(total, count) if given is None else processes.means_over(total, count, given)
        return mean[0] + zero_gradients([self.head])


def masked(x_t: LatentsByType, batch: Batch, rates: Sequence[float], generator: Any) -> list[LatentsByType]:
    """Latents at each of the rates: a share of those that have a flow loss is 0. One number for each latent, drawn on
    the generator's device as noise is, serves all rates.
    """
    made: list[LatentsByType] = [{} for _ in rates]
    for kind, latents in x_t.items():
        device = latents.device if generator is None else generator.device
        number = torch.rand(len(latents), generator=generator, device=device).to(latents.device, non_blocking=True)
        is_learned = batch.is_learned.index_select(0, batch.stream.placements[kind].span_of_latent)
        for seen, rate in zip(made, rates, strict=True):
            seen[kind] = latents.masked_fill(((number < rate) & is_learned)[:, None], 0)
    return made


def token_weights(batch: Batch, slots: Int[Tensor, " t"]) -> Float[Tensor, " t"]:
    """The weight of each modality token: that of its span, times latents per token (a U-Net half joins latents).

    They add up to the weighted number of latents, which is what `TargetCounts` have.
    """
    spans, weight = batch.stream.spans, batch.loss_weight
    if spans.shapes != spans.token_shapes:
        pairs = zip(spans.shapes, spans.token_shapes, strict=True)
        weight = weight * weight.new_tensor([prod(latents) / prod(tokens) for latents, tokens in pairs])
    return weight.index_select(0, batch.stream.modulation_index.index_select(0, slots) - 1)
