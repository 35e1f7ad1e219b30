"""Self-distillation of representations: what it is zero for, what it reaches, and that the model's own loss stays."""

import copy
from types import SimpleNamespace

import pytest
import torch
from checks import compiles
from test_training_distributed import assert_gradients, gradients_of, in_two, ordered_batch
from tiny import NUM_TEXT, awake, noise_of, ragged_batch, tiny
from torch import nn, randint, randn, tensor
from torch.nn.parallel import DistributedDataParallel

from transfusion_pytorch import Condition, SelfMaskedRepTraining, UNetDown, UNetUp

EXACT = dict(rtol=1e-9, atol=1e-11)
DEPTH = 4
SAME_LAYER = dict(student_layer=1, teacher_layer=1, student_dropout_rate=0.0)


def training_of(model=None, *, scale=0.2, **options) -> SelfMaskedRepTraining:
    """In training mode, of a model and a head in which nothing is at zero any more."""
    torch.manual_seed(0)
    made = SelfMaskedRepTraining(awake(tiny(trunk=dict(depth=DEPTH))) if model is None else model, **options)
    with torch.no_grad():
        for parameter in made.head.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return made.train()


def seeded(call, *args, **options):
    torch.manual_seed(7)
    return call(*args, **options)


class Seen:
    """Remembers the latents that student and teacher are given."""

    def __init__(self, training: SelfMaskedRepTraining, monkeypatch):
        self.student, self.teacher = [], []
        for model, kept in ((training.student, self.student), (training.teacher.ema_model, self.teacher)):
            monkeypatch.setattr(model, "forward_stream", self._spy(model.forward_stream, kept))

    def _spy(self, run, kept):
        def spy(stream, latents, *args, **options):
            kept.append({kind: x.clone() for kind, x in latents.items()})
            return run(stream, latents, *args, **options)

        return spy


# the loss


@pytest.mark.parametrize("trunk", [{}, {"num_residual_streams": 2}, {"untied": True}])
def test_the_same_layer_of_an_equal_teacher_is_predicted_exactly(trunk):
    training = training_of(awake(tiny(trunk=dict(depth=DEPTH) | trunk)), scale=0.0, **SAME_LAYER)
    _, losses = training(ragged_batch())
    assert losses.representation <= (1e-30 if "num_residual_streams" in trunk else 0)  # their sums are rounded

    with torch.no_grad():
        training.student.transformer.layers[0].get_parameter(
            "experts.1.ff.to_out.weight" if trunk.get("untied") else "ff.to_out.weight"
        ).mul_(1.5)
    assert training(ragged_batch())[1].representation > 1e-6


def test_the_loss_is_the_mean_cosine_distance_of_both_hidden_states():
    samples = [[tensor([1, 2]), randn(2, 3, 3).double()], [randn(4, 3).double(), tensor([3])]]
    training = training_of(student_layer=0, teacher_layer=2, student_dropout_rate=0.0, rep_loss_weight=0.5)
    states = [], []
    layers = training.student.transformer.layers[0], training.teacher.ema_model.transformer.layers[2]
    for layer, kept in zip(layers, states, strict=True):
        layer.register_forward_hook(lambda _, __, out, kept=kept: kept.append(out[0].detach()))
    total, losses = training(samples)

    batch = training.student.packer()(samples)
    slots = batch.stream.placements[0].slots
    student, teacher = (nn.functional.layer_norm(kept[0][slots], (16,)) for kept in states)
    expected = 1 - torch.cosine_similarity(training.head(student), teacher, dim=-1).mean()
    torch.testing.assert_close(losses.representation, expected, **EXACT)
    torch.testing.assert_close(total, losses.model + 0.5 * expected, **EXACT)


def test_only_learned_modalities_are_compared():
    picture = randn(2, 2, 3)
    training = training_of(rep_loss_weight=1.0, student_dropout_rate=0.5)
    for samples, options in (
        (randint(0, NUM_TEXT, (2, 6)), {}),
        ([[Condition(picture), tensor([1, 2])]], {}),
        ([[picture, tensor([1, 2])]], dict(times=1.0)),
    ):
        training.zero_grad()
        total, losses = training(samples, prob_uncond=0.0, **options)
        assert losses.representation == 0
        assert total == losses.model == training.student(samples, prob_uncond=0.0, **options)
        total.backward()
        assert all(p.grad is None or not p.grad.any() for p in training.head.parameters())


def test_a_sample_counts_by_its_weight():
    first, second = [[randn(2, 2, 3)]], [[randn(3, 3)]]
    times, options = tensor([[0.5], [0.5]]), dict(student_dropout_rate=0.0)
    training = training_of(**options)
    noise = {0: randn(7, 3)}
    whole = training(first + second, times=times, noise=noise, sample_weights=[3.0, 0.0])[1]
    alone = training(first, times=0.5, noise={0: noise[0][:4]})[1]
    torch.testing.assert_close(whole.representation, alone.representation, **EXACT)


def test_a_loss_of_the_users_own():
    training = training_of(loss_fn=lambda x, y: (x - y).abs().mean(dim=-1), scale=0.0, **SAME_LAYER)
    assert training(ragged_batch())[1].representation == 0
    with pytest.raises(ValueError, match=r"loss_fn must give one error per token, \(\d+,\), got \(\)"):
        training_of(loss_fn=nn.functional.mse_loss)(ragged_batch())


# gradients


def test_gradients_reach_everything_but_the_teacher():
    training = training_of()
    training(ragged_batch())[0].backward()
    for name, parameter in training.named_parameters():
        is_trained = not name.startswith("teacher.")
        assert parameter.requires_grad == is_trained
        assert (parameter.grad is not None and bool(parameter.grad.any())) == is_trained, name


def test_the_representation_loss_reaches_the_layers_up_to_the_students():
    training = training_of(student_layer=-2, rep_loss_weight=1.0)
    training(ragged_batch())[1].representation.backward()
    model = training.student
    for index, layer in enumerate(model.transformer.layers):
        assert any(p.grad is not None for p in layer.parameters()) == (index <= 2), index
    assert model.modalities[0].adapter.to_model.weight.grad.any()
    assert model.text_embedding.weight.grad.any()
    assert model.to_logits.weight.grad is None


def test_learning_lowers_it():
    training = training_of(student_layer=0, rep_loss_weight=1.0, student_dropout_rate=0.3)
    optimizer = torch.optim.AdamW(training.parameters(), lr=3e-3)
    samples, losses = ragged_batch(), []
    for _ in range(40):
        total, parts = training(samples)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        training.update()
        losses.append(parts.representation.item())
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


# what student and teacher see


def test_masks_take_only_latents_that_are_learned(monkeypatch):
    source, target = randn(8, 3), randn(20, 20, 3)
    samples = [[Condition(source), tensor([1, 2, 3]), target]]
    training = training_of(student_dropout_rate=0.3, teacher_dropout_rate=0.1)
    seen = Seen(training, monkeypatch)
    output = training.student.forward_stream
    training(samples, times=0.5)
    plain = training_of(student_dropout_rate=0.0)
    without = Seen(plain, monkeypatch)
    seeded(training, samples, times=0.5)
    seeded(plain, samples, times=0.5)
    assert output is training.student.forward_stream

    x_t = without.student[0][0]
    assert torch.equal(x_t, without.teacher[0][0])
    student, teacher = seen.student[1][0], seen.teacher[1][0]
    of_student, of_teacher = ((x == 0).all(dim=-1) for x in (student, teacher))
    for made, gone in ((student, of_student), (teacher, of_teacher)):
        assert torch.equal(made[~gone], x_t[~gone])  # the same noise and times, and all that is not masked
        assert torch.equal(made[:8], source.to(made))
    assert not (of_teacher & ~of_student).any()  # what the teacher lacks the student lacks as well
    assert abs(of_student[8:].double().mean() - 0.3) < 0.08
    assert abs(of_teacher[8:].double().mean() - 0.1) < 0.06


@pytest.mark.parametrize("options", [dict(use_asymmetric_dropout=False, student_dropout_rate=0.5), {}])
def test_nothing_is_masked_without_asymmetry_nor_in_evaluation(options, monkeypatch):
    training = training_of(**options).train(bool(options))
    seen = Seen(training, monkeypatch)
    training(ragged_batch(), times=0.5)
    for kind, latents in seen.student[0].items():
        assert torch.equal(latents, seen.teacher[0][kind])
        assert latents.all()


def test_the_teacher_has_no_dropout():
    training = training_of(awake(tiny(trunk=dict(depth=DEPTH, dropout=0.5))), scale=0.0, **SAME_LAYER)
    states = [], []
    for model, kept in zip((training.student, training.teacher.ema_model), states, strict=True):
        model.transformer.layers[1].register_forward_hook(lambda _, __, out, kept=kept: kept.append(out[0].detach()))
    samples, noise = [[tensor([1]), randn(2, 3, 3)]], randn(6, 3)
    for _ in range(2):
        training(samples, times=0.5, noise=noise, prob_uncond=0.0)
    (first, second), (target, same_target) = states
    assert not torch.equal(first, second)
    assert torch.equal(target, same_target)
    assert training.teacher.ema_model.training  # as it was
    assert training.eval()(ragged_batch())[1].representation == 0


# the model's own loss


@pytest.mark.parametrize("options", [dict(rep_loss_weight=0.0), dict(student_dropout_rate=0.0)])
def test_the_loss_of_the_model_stays_to_the_bit(options):
    training, samples = training_of(**options), ragged_batch()
    total, losses = seeded(training, samples)
    state = torch.get_rng_state()
    expected = seeded(training.student, samples)
    assert torch.equal(losses.model, expected)
    assert torch.equal(state, torch.get_rng_state())
    if not training.rep_loss_weight:
        assert torch.equal(total, expected)
        assert losses.representation == 0


def test_a_breakdown_is_that_of_the_model():
    training, samples = training_of(student_dropout_rate=0.0), ragged_batch()
    total, losses = seeded(training, samples, return_breakdown=True, velocity_consistency_ema_model=training.teacher)
    _, expected = seeded(
        training.student, samples, return_breakdown=True, velocity_consistency_ema_model=training.teacher
    )
    for made, other in zip(losses.model, expected, strict=True):
        assert torch.equal(made, other)
    assert torch.equal(total, expected.total + 0.1 * losses.representation)


def test_packed_and_padded_batches_are_as_good_as_samples():
    training, samples = training_of(), ragged_batch()
    pack = training.student.packer(prob_uncond=0.0)
    expected = seeded(training, samples, prob_uncond=0.0)[0]
    assert torch.equal(seeded(training, pack(samples))[0], expected)
    padded = training.student.packer(prob_uncond=0.0, token_budget=128)(samples)
    torch.testing.assert_close(seeded(training, padded)[0], expected, **EXACT)


def test_equal_generators_give_equal_losses():
    training, samples = training_of(student_dropout_rate=0.5), ragged_batch()
    losses = [training(samples, generator=torch.Generator().manual_seed(seed))[0] for seed in (3, 3, 4)]
    assert torch.equal(losses[0], losses[1])
    assert losses[0] != losses[2]


def with_unet(**options) -> nn.Module:
    halves = UNetDown(3, 16), UNetUp(3, 16)
    return tiny(dim_latent=3, modality_default_shape=(4, 4), pre_post_transformer_enc_dec=halves, **options)


@pytest.mark.parametrize("unet", [False, True])
def test_gradients_of_micro_batches_add_up(unet, monkeypatch):
    monkeypatch.setattr(torch, "randn_like", noise_of)
    torch.manual_seed(0)
    model = awake(with_unet() if unet else tiny(trunk=dict(depth=DEPTH)))
    pictures = [[tensor([1]), randn(4, 4, 3)], [randn(8, 4, 3), tensor([2, 3])], [randn(4, 8, 3)]]
    samples = pictures if unet else ragged_batch()
    training = training_of(model, student_dropout_rate=0.0, rep_loss_weight=1.0)
    options = dict(times=0.5, prob_uncond=0.0)
    training(samples, **options)[0].backward()
    expected = {name: p.grad for name, p in training.named_parameters() if p.grad is not None}

    training.zero_grad()
    shares = samples[:1], samples[1:]
    counts = sum(model.count_targets(share, **options) for share in shares)
    for share in shares:
        training(share, counts=counts, **options)[0].backward()
    for name, parameter in training.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], **EXACT)


# ways through the network


def gradients(training, samples):
    training.zero_grad()
    seeded(training, samples)[0].backward()
    return {name: p.grad.clone() for name, p in training.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", [True, "selective"])
def test_checkpointing_changes_nothing(kind):
    training, samples = training_of(rep_loss_weight=1.0), ragged_batch()
    expected = gradients(training, samples)
    training.student.gradient_checkpointing_enable(kind)
    for name, gradient in gradients(training, samples).items():
        torch.testing.assert_close(gradient, expected[name], **EXACT)


@pytest.mark.slow
@compiles
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be instantiated")
def test_compiled_layers_change_nothing():
    torch.compiler.reset()
    model = awake(tiny(trunk=dict(depth=DEPTH)))
    model.transformer.attention = "dense"
    expected = gradients(training_of(model), ragged_batch())
    model.compile(backend="aot_eager")
    for name, gradient in gradients(training_of(model), ragged_batch()).items():
        torch.testing.assert_close(gradient, expected[name], **EXACT)


def test_nothing_is_read_from_the_device():
    training = training_of(with_unet()).to("meta")
    samples = [[tensor([1]), randn(4, 4, 3)], [Condition(randn(8, 4, 3)), tensor([2, 3]), randn(8, 4, 3)]]
    total, losses = training(samples)
    total.backward()
    assert losses.representation.is_meta


def test_untied_layers_are_read_in_the_order_of_the_stream():
    """The last layer behind the last norm is what the transformer gives."""
    model = awake(tiny(trunk=dict(untied=("attention", "feedforward"))))
    batch = model.packer()(ragged_batch())
    kept, t = {1: None}, torch.full((len(batch.stream.spans),), 0.5).double()
    latents = {kind: data.latents for kind, data in batch.data.items()}
    output = model.forward_stream(batch.stream, latents, t, hidden_states=kept)
    conditioning = model._conditioning(batch.stream, output.condition)
    norm = model.transformer.final_norm
    torch.testing.assert_close(norm(kept[1], norm.modulation(conditioning)), output.hidden, **EXACT)


def test_autocast():
    training = training_of(awake(tiny(trunk=dict(depth=DEPTH))).float())
    exact = seeded(training, ragged_batch())[1].representation
    with torch.autocast("cpu", torch.bfloat16):
        total, losses = seeded(training, ragged_batch())
    assert losses.representation.dtype == torch.float32
    torch.testing.assert_close(losses.representation, exact, rtol=0.05, atol=0.02)
    total.backward()
    assert all(p.grad.isfinite().all() for p in training.head.parameters())


# the teacher, copies, errors


def test_update_moves_the_teacher():
    training = training_of(ema_beta=0.0)
    teacher = training.teacher.ema_model
    for _ in range(2):  # the first is a copy, whatever beta is
        with torch.no_grad():
            training.student.to_logits.weight.add_(1.0)
        assert not torch.equal(teacher.to_logits.weight, training.student.to_logits.weight)
        training.update()
        assert torch.equal(teacher.to_logits.weight, training.student.to_logits.weight)

    slow = training_of(ema_beta=0.5)
    slow.update()
    before = slow.student.to_logits.weight.detach().clone()
    for _ in range(20):
        slow.update()
    with torch.no_grad():
        slow.student.to_logits.weight.add_(1.0)
    slow.update()
    torch.testing.assert_close(slow.teacher.ema_model.to_logits.weight, before + 0.5, **EXACT)


def test_sampling_is_the_teachers():
    training = training_of(awake(tiny(modality_default_shape=((2,), (2,)))).float())
    with torch.no_grad():
        training.student.modalities[0].adapter.to_latent.bias.add_(5.0)
    options = dict(batch_size=2, modality_type=0, modality_steps=2)
    made = seeded(training.generate_modality_only, **options)
    assert torch.equal(made, seeded(training.teacher.ema_model.generate_modality_only, **options))
    assert not torch.equal(made, seeded(training.student.generate_modality_only, **options))
    assert training.sample(max_length=8)
    with pytest.raises(AttributeError, match="sketch"):
        training.sketch  # noqa: B018


def test_copies_and_states():
    training, samples = training_of(), ragged_batch()
    training.update()
    twin = copy.deepcopy(training)
    other = SelfMaskedRepTraining(tiny(trunk=dict(depth=DEPTH)).double())
    other.load_state_dict(training.state_dict())
    for made in (twin, other.train()):
        assert torch.equal(seeded(made, samples)[0], seeded(training, samples)[0])
        assert made.teacher.step == 1
        with torch.no_grad():
            made.student.to_logits.weight.add_(1.0)
        made.update()
        assert not torch.equal(made.teacher.ema_model.to_logits.weight, training.teacher.ema_model.to_logits.weight)


@pytest.mark.parametrize("depth", [1, 2])
def test_the_default_layers_serve_shallow_transformers(depth):
    training = SelfMaskedRepTraining(tiny(trunk=dict(depth=depth)))
    assert (training.student_layer, training.teacher_layer) == (0, depth - 1)
    training(ragged_batch())[0].backward()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(student_layer=4), "student_layer must be one of the 4 layers, -4 to 3, got 4"),
        (dict(teacher_layer=-5), "teacher_layer must be one of the 4 layers, -4 to 3, got -5"),
        (dict(student_dropout_rate=1.0), "student_dropout_rate must be at least 0 and below 1, got 1.0"),
        (dict(teacher_dropout_rate=-0.1), "teacher_dropout_rate must be from 0 to the student's, 0.1, got -0.1"),
        (dict(teacher_dropout_rate=0.2), "teacher_dropout_rate must be from 0 to the student's, 0.1, got 0.2"),
        (dict(rep_loss_weight=float("nan")), "rep_loss_weight must be finite and not negative, got nan"),
        (dict(ema_beta=1.5), "ema_beta must lie between 0 and 1, got 1.5"),
    ],
)
def test_options_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SelfMaskedRepTraining(tiny(trunk=dict(depth=DEPTH)), **options)


@pytest.mark.parametrize("net", [nn.Linear(2, 2), SimpleNamespace(transformer=nn.Linear(2, 2))])
def test_other_networks_are_refused(net):
    with pytest.raises(TypeError, match="net must be a Transfusion whose transformer is a Transformer, got "):
        SelfMaskedRepTraining(net)


@pytest.mark.parametrize("options", [dict(reduction="none"), dict(return_loss=False)])
def test_what_has_no_total_is_the_models(options):
    with pytest.raises(ValueError, match="options of the model"):
        training_of()(ragged_batch(), **options)


# several processes


def distributed():
    torch.manual_seed(0)
    return training_of(awake(tiny(trunk=dict(depth=DEPTH))), student_dropout_rate=0.0, rep_loss_weight=1.0)


def ddp_step(rank):
    """One process has no modality at all."""
    training, share = distributed(), slice(0, 3) if rank == 0 else slice(3, 4)
    wrapped = DistributedDataParallel(training)  # without find_unused_parameters
    total, losses = wrapped(ordered_batch()[share], times=0.5, prob_uncond=0.0)
    total.backward()
    return losses.representation.detach(), gradients_of(wrapped)


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "randn_like", noise_of)
    training = distributed()
    total, losses = training(ordered_batch(), times=0.5, prob_uncond=0.0)
    total.backward()
    expected = {name: p.grad for name, p in training.named_parameters() if p.requires_grad}
    for representation, made in in_two(ddp_step, tmp_path):
        torch.testing.assert_close(representation, losses.representation.detach(), **EXACT)
        assert_gradients(made, expected)
