"""What `Transfusion` is trained on: every loss in closed form, times, guidance dropout, and who sees whom."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tiny import CHANNELS, NUM_TEXT, Spy, awake, latents_of, layout, noise_of, ragged_batch, targets, tiny
from torch import nn, tensor

from transfusion_pytorch import TimePolicy
from transfusion_pytorch.modalities.io import ModalityIO

EXACT = dict(rtol=1e-10, atol=1e-10)
TIMES = tensor([[0.25, 0.5], [0.75, 0.125], [0.0, 0.0], [0.5, 0.875]])  # the sums of their binary fractions are exact


@pytest.fixture
def same_noise(monkeypatch):
    monkeypatch.setattr(torch, "randn_like", noise_of)


def parts_of(model, batch, **options):
    return model(batch, return_breakdown=True, **options)[1]


# text


def test_text_loss_of_ids_is_the_cross_entropy_of_each_next_one():
    model, ids = awake(tiny()), torch.randint(NUM_TEXT, (3, 7))
    logits = model(ids, return_loss=False)
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss, parts = model(ids, return_breakdown=True)
    torch.testing.assert_close(parts.text, expected, **EXACT)
    torch.testing.assert_close(loss, expected, **EXACT)


def test_text_loss_of_samples_is_over_text_and_markers_and_nothing_else():
    model, batch = awake(tiny()), ragged_batch()
    logits = model(batch, return_loss=False)
    losses = []
    for row, sample in zip(logits, batch, strict=True):
        ids = layout(model, sample)
        assert not row[len(ids) :].any()
        losses += [F.cross_entropy(row[slot], tensor(label)) for slot, label in targets(ids).items()]
    torch.testing.assert_close(parts_of(model, batch, times=1.0).text, torch.stack(losses).mean(), **EXACT)


def test_markers_are_predicted_where_text_leads_to_them():
    model = tiny()
    ids = layout(model, [tensor([1]), torch.randn(2, 3)])
    two = model.char_tokenizer("2").item()
    labels = [1, model.meta_id, two, model.som_ids[0], model.eos_id]
    assert ids == [model.sos_id, *labels[:-1], None, None, model.eom_ids[0], model.eos_id]
    assert list(targets(ids).values()) == labels
    stream = model.packer()([[tensor([1]), torch.randn(2, 3)]]).stream
    assert stream.label[stream.label >= 0].tolist() == labels


@pytest.mark.parametrize("ignore_index", [-1, -100])
def test_ignore_index_is_a_label_and_changes_no_loss(ignore_index):
    torch.manual_seed(0)
    model = awake(tiny(ignore_index=ignore_index))
    assert (model.packer()(ragged_batch()).stream.label == ignore_index).any()
    torch.manual_seed(0)
    expected = awake(tiny())(ragged_batch(), times=1.0)
    torch.testing.assert_close(model(ragged_batch(), times=1.0), expected, **EXACT)


def test_a_single_token_has_nothing_to_predict():
    loss, parts = tiny()(tensor([[1], [2]]), return_breakdown=True)
    assert loss == parts.text == 0
    loss.backward()


# flow


@pytest.mark.parametrize("at", [0.0, 0.5, 0.875])
def test_a_new_model_predicts_no_velocity(at):
    model, batch = tiny().double().eval(), ragged_batch()
    torch.manual_seed(7)
    flow = parts_of(model, batch, times=at).flow
    torch.manual_seed(7)
    for modality in (0, 1):
        clean = latents_of(batch, modality).double()
        torch.testing.assert_close(flow[modality], (clean - torch.randn_like(clean)).square().mean(), **EXACT)


def test_a_new_model_predicts_a_clean_latent_of_zero():
    """From x_t the velocity to 0 is -x_t / (1 - t), and the true one is (clean - x_t) / (1 - t)."""
    model, batch = tiny(model_output_clean=True).double().eval(), ragged_batch()
    flow = parts_of(model, batch, times=0.75).flow
    for modality in (0, 1):
        expected = (4 * latents_of(batch, modality).double()).square().mean()
        torch.testing.assert_close(flow[modality], expected, **EXACT)


def decoders() -> list[nn.Module]:
    return [nn.Sequential(nn.Linear(channels, 4), nn.Tanh()) for channels in CHANNELS]


def oracle(monkeypatch, batch, *, of_clean: bool) -> list:
    """Lets every network predict the truth, which is returned by type and can be made wrong."""
    monkeypatch.setattr(torch, "randn_like", noise_of)
    clean = [latents_of(batch, modality).double() for modality in (0, 1)]
    truth = clean if of_clean else [latents - noise_of(latents) for latents in clean]
    monkeypatch.setattr(ModalityIO, "read", lambda io, *_: truth[io.spec.type])
    return truth


@pytest.mark.parametrize("at", [0.0, 0.3, 0.94, 0.96, 0.9985])
@pytest.mark.parametrize("of_clean", [False, True])
def test_the_perfect_flow_scores_zero_in_every_loss(monkeypatch, of_clean, at):
    batch = ragged_batch()
    model = tiny(model_output_clean=of_clean, modality_decoder=decoders(), reconstruction_loss_weight=1.0)
    model.double().eval()
    truth = oracle(monkeypatch, batch, of_clean=of_clean)
    options = dict(times=at, velocity_consistency_ema_model=model.create_ema())
    parts = parts_of(model, batch, **options)
    for loss in (parts.flow, parts.velocity, parts.recon):
        torch.testing.assert_close(loss, torch.zeros(2).double(), rtol=0, atol=1e-20)

    truth[1] = truth[1] + 0.1
    parts = parts_of(model, batch, **options)
    assert parts.flow[0] < 1e-20 < parts.flow[1]
    assert parts.recon[0] < 1e-20 < parts.recon[1]


def test_a_velocity_that_is_off_scores_by_how_much(monkeypatch):
    """Off by 0.5 at t = 0.25: half the velocity's square, and 0.75 of that way off the clean latent."""
    batch, model = ragged_batch(), tiny(reconstruction_loss_weight=1.0).double().eval()
    truth = oracle(monkeypatch, batch, of_clean=False)
    truth[0] = truth[0] + 0.5
    parts = parts_of(model, batch, times=0.25)
    torch.testing.assert_close(parts.flow, tensor([0.25, 0.0]).double(), **EXACT)
    torch.testing.assert_close(parts.recon, tensor([0.75**2 * 0.25, 0.0]).double(), **EXACT)


@pytest.mark.parametrize("of_clean", [False, True])
def test_consistency_is_the_distance_to_the_teacher_a_little_later(monkeypatch, of_clean):
    """A teacher whose velocity is off by 0.5, or whose clean latent is off by 0.5 * (1 - t)."""
    batch, model = ragged_batch(), tiny(model_output_clean=of_clean).double().eval()
    truth = oracle(monkeypatch, batch, of_clean=of_clean)
    teacher = model.create_ema()
    wrong = [latents + (0.375 if of_clean else 0.5) for latents in truth]
    seen = Spy(teacher.ema_model.modalities[0].adapter.to_model), Spy(teacher.ema_model.time_embedding)
    for io in teacher.ema_model.modalities:
        io.read = lambda *_, i=io.spec.type: wrong[i]
    options = dict(velocity_consistency_ema_model=teacher, velocity_consistency_delta_time=0.125)
    parts = parts_of(model, batch, times=0.25, **options)
    torch.testing.assert_close(parts.velocity, tensor([0.25, 0.25]).double(), **EXACT)
    clean = latents_of(batch, 0).double()
    torch.testing.assert_close(seen[0].inputs[0], torch.lerp(noise_of(clean), clean, 0.375), **EXACT)
    assert seen[1].inputs[0].tolist() == [0.375] * 6


def test_text_alone_asks_no_teacher():
    model, teacher = tiny(), tiny()
    spy = Spy(teacher.transformer)
    parts_of(model, tensor([[1, 2]]), velocity_consistency_ema_model=teacher)
    assert not spy.inputs


def test_times_leave_the_teacher_room():
    model = tiny()
    spy = Spy(model.time_embedding)
    for times in (0.875, 0.5, 1.0):  # what is put at 1 is a condition, and stays there
        model(ragged_batch(), times=times, velocity_consistency_ema_model=tiny(), velocity_consistency_delta_time=0.25)
    assert [t.tolist() for t in spy.inputs] == [[0.75] * 6, [0.5] * 6, [1.0] * 6]


# the sum


@pytest.mark.parametrize("flow_weight", [0.5, (2.0, 0.25)])
def test_weighted_parts_sum_to_the_total(flow_weight):
    weights = dict(text_loss_weight=3.0, flow_loss_weight=flow_weight)
    weights |= dict(velocity_consistency_loss_weight=0.3, reconstruction_loss_weight=0.7)
    model = awake(tiny(**weights))
    total, parts = model(ragged_batch(), return_breakdown=True, velocity_consistency_ema_model=awake(tiny(), 0.1))
    for part in parts:
        assert (part > 0).all()
    flow = (tensor(flow_weight) * parts.flow).sum()
    torch.testing.assert_close(total, 3 * parts.text + flow + 0.3 * parts.velocity.sum() + 0.7 * parts.recon.sum())
    assert total == parts.total


def test_a_part_that_the_batch_has_not_is_zero():
    model = awake(tiny())
    text, images = parts_of(model, tensor([[1, 2, 3]])), parts_of(model, torch.randn(2, 4, 2), modality_type=1)
    assert text.total == text.text > 0
    assert not text.flow.any()
    assert images.total == images.flow[1] > 0
    assert images.text == images.flow[0] == 0


def test_a_batch_weighs_every_token_alike(same_noise):
    model, batch = awake(tiny(reconstruction_loss_weight=1.0)), ragged_batch()
    whole = parts_of(model, batch, times=TIMES)
    singles = [parts_of(model, [sample], times=times[None]) for sample, times in zip(batch, TIMES, strict=True)]
    counts = [len(targets(layout(model, sample))) for sample in batch]
    expected = sum(n * parts.text for n, parts in zip(counts, singles, strict=True)) / sum(counts)
    torch.testing.assert_close(whole.text, expected, **EXACT)
    counts = tensor([[4, 3], [4, 1], [0, 0], [6, 4]])
    for loss in ("flow", "recon"):
        sums = sum(n * getattr(parts, loss) for n, parts in zip(counts, singles, strict=True))
        torch.testing.assert_close(getattr(whole, loss), sums / counts.sum(0), **EXACT)


@pytest.mark.parametrize("order", [[3, 1, 0, 2], [0, 1, 2, 3, 0, 1, 2, 3]])
def test_order_and_repetition_of_samples_change_nothing(same_noise, order):
    model, batch = awake(tiny()), ragged_batch()
    expected = parts_of(model, batch, times=TIMES)
    actual = parts_of(model, [batch[i] for i in order], times=TIMES[order])
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


# logits and times


def test_a_packed_batch_is_its_samples_one_by_one():
    model, batch = awake(tiny()), ragged_batch()
    together = model(batch, return_loss=False)
    for row, sample in zip(together, batch, strict=True):
        (alone,) = model([sample], return_loss=False)
        torch.testing.assert_close(row[: len(alone)], alone, **EXACT)


def test_without_times_a_context_is_clean_and_nothing_is_random():
    model, batch = awake(tiny()), ragged_batch()
    state = torch.get_rng_state()
    logits = model(batch, return_loss=False)
    assert torch.equal(model(batch, return_loss=False), logits)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model(batch, return_loss=False, times=1.0), logits)


def test_at_time_zero_nothing_is_left_of_a_latent_and_at_one_nothing_of_the_noise(monkeypatch):
    model, sample = awake(tiny()), [tensor([1]), torch.randn(2, 3), tensor([2])]
    other = [tensor([1]), torch.randn(2, 3), tensor([2])]
    monkeypatch.setattr(torch, "randn_like", torch.ones_like)
    at = [[model([parts], return_loss=False, times=t) for parts in (sample, other)] for t in (0.0, 0.5)]
    assert torch.equal(*at[0])
    assert not torch.allclose(*at[1])


def test_the_time_of_each_modality_counts_from_there_on(same_noise):
    model = awake(tiny())
    batch = [[tensor([1]), torch.randn(1, 3), tensor([2]), torch.randn(1, 3), tensor([3])]] * 2
    times = tensor([[0.5, 0.5], [0.5, 0.5]])
    before = model(batch, return_loss=False, times=times)
    for span, first in ((0, 5), (1, 11)):  # sos 1 meta "1" som latent eom 2 meta "1" som latent eom ...
        changed = times.clone()
        changed[0, span] = 0.75
        difference = (model(batch, return_loss=False, times=changed) - before).abs().amax(-1)
        assert not difference[1].any()
        assert not difference[0, :first].any()
        assert difference[0, first:].all()


def times_of(model, sample, count=400):
    """What training draws for the modalities of a sample, `(count, m)`."""
    spy = Spy(model.time_embedding)
    model([sample] * count)
    return spy.inputs[-1].view(count, -1)


def test_every_modality_is_noised_freely_wherever_it_stands():
    """Whatever follows: sampling starts from noise everywhere, so training must have seen it."""
    image, text = torch.randn(1, 3), tensor([1])
    vector = (1, torch.randn(2))
    for sample in ([text, image, vector], [image, vector], [text, image, text, image, text], [vector]):
        for times in times_of(tiny(), sample).T:
            assert times.min() < 0.02
            assert 0.45 < times.mean() < 0.55
            assert times.max() < 1


@pytest.mark.parametrize("probability", [0.0, 0.5, 1.0])
def test_what_a_caption_follows_is_clean_as_often_as_the_policy_says(probability):
    model = tiny(time_policy=TimePolicy(prob_clean_captioned=probability))
    first, last = times_of(model, [torch.randn(1, 3), tensor([1]), (1, torch.randn(2))]).T
    assert abs((first == 1).float().mean() - probability) < 0.1
    if probability < 1:
        assert first.min() < 0.05
    assert (last < 1).all()
    evaluated = times_of(model.eval(), [torch.randn(1, 3), tensor([1])])
    assert (evaluated < 1).all()


def test_the_limit_of_the_paper_is_for_what_precedes_its_caption():
    model = tiny(time_policy=TimePolicy(noise_limit=0.5, prob_clean_captioned=0))
    captioned, last = times_of(model, [torch.randn(1, 3), tensor([1]), torch.randn(1, 3)]).T
    assert 0.5 <= captioned.min() < 0.55
    assert last.min() < 0.05


def test_what_is_clean_has_no_loss_and_counts_know_it():
    model = tiny(time_policy=TimePolicy(prob_clean_captioned=0.5))
    batch = model.packer()([[torch.randn(1, 3), tensor([1])]] * 100)
    spy = Spy(model.time_embedding)
    spans = model(batch, reduction="span")
    is_clean = spy.inputs[0] == 1
    assert torch.equal(spans.flow == 0, is_clean)
    assert batch.counts.latents[0] == 3 * (~is_clean).sum()
    assert 30 < is_clean.sum() < 70


def test_the_time_policy_is_what_training_draws_from():
    model = tiny(time_policy=TimePolicy(distribution=0.25, noise_limit=0.0))
    spy = Spy(model.time_embedding)
    model(ragged_batch())
    assert spy.inputs[0].tolist() == [0.25] * 6


@pytest.mark.parametrize("return_loss", [True, False])
def test_a_function_of_the_number_of_modalities_gives_the_times(return_loss):
    model, seen = tiny(), []

    def times(counts):
        seen.append(counts.tolist())
        return TIMES

    spy = Spy(model.time_embedding)
    model(ragged_batch(), num_modalities_to_times_fn=times, return_loss=return_loss)
    assert seen == [[2, 2, 0, 2]]
    assert spy.inputs[0].tolist() == TIMES[[0, 1, 3]].flatten().tolist()


def test_times_may_be_one_for_each_sample():
    model, images = tiny(), torch.randn(3, 4, 3)
    spy = Spy(model.time_embedding)
    model(images, modality_type=0, times=[0.25, 0.5, 1])
    model(images, modality_type=0, times=tensor([0.25, 0.5, 1.0]))
    model(images, modality_type=0, num_modalities_to_times_fn=lambda counts: counts[:, None] / 4)
    assert [t.tolist() for t in spy.inputs] == [[0.25, 0.5, 1.0], [0.25, 0.5, 1.0], [0.25] * 3]


# guidance dropout

CONDITIONS = [{1, 2, 3, 14}, set(), set(), {1}]  # slots of the ragged batch: text that a modality still follows


def drop(model, batch, **options):
    """Ids that went in, sample by sample, and what was asked of the read-out."""
    embedded, read = Spy(model.text_embedding), Spy(model.to_logits)
    loss = model(batch, **options)
    lengths = [len(layout(model, sample)) for sample in batch]
    return SimpleNamespace(
        loss=loss, ids=embedded.inputs[-1].split(lengths), targets=read.inputs[-1], total=sum(lengths)
    )


def test_dropout_takes_the_text_before_a_modality_and_never_structure():
    model, batch = awake(tiny(prob_uncond=1.0)).train(), ragged_batch()
    dropped = drop(model, batch)
    null = model.vocabulary.null
    count = 0
    for sample, ids, taken in zip(batch, dropped.ids, CONDITIONS, strict=True):
        expected = [0 if token is None else token for token in layout(model, sample)]
        assert ids.tolist() == [null if slot in taken else token for slot, token in enumerate(expected)]
        count += len(targets(layout(model, sample), taken))
    assert len(dropped.targets) == count  # null is neither predicted nor predicted from


def test_text_loss_under_dropout_leaves_out_what_was_taken():
    model, sample = awake(tiny(prob_uncond=1.0)).train(), [tensor([1, 2]), torch.randn(2, 3), tensor([3])]
    logits = []
    model.to_logits.register_forward_hook(lambda module, args, out: logits.append(out))
    parts = parts_of(model, [sample])
    labels = list(targets(layout(model, sample), {1, 2}).values())
    torch.testing.assert_close(parts.text, F.cross_entropy(logits[0], tensor(labels)), **EXACT)


@pytest.mark.parametrize(
    ("probability", "training", "override"), [(1.0, False, None), (0.0, True, None), (1.0, True, 0.0)]
)
def test_nothing_is_dropped_in_evaluation_or_at_probability_zero(probability, training, override):
    model = tiny(prob_uncond=probability).train(training)
    dropped = drop(model, ragged_batch(), prob_uncond=override)
    assert not any((ids == model.vocabulary.null).any() for ids in dropped.ids)


def test_batches_of_text_are_never_dropped():
    model, ids = tiny(prob_uncond=1.0), tensor([[1, 2, 3]])
    spy = Spy(model.text_embedding)
    model(ids)
    model([[ids[0]]])
    assert not any((seen == model.vocabulary.null).any() for seen in spy.inputs)


def test_a_sample_loses_all_of_its_condition_or_none():
    model, sample = tiny(prob_uncond=0.25), [tensor([1, 2]), torch.randn(1, 3), tensor([3]), torch.randn(1, 3)]
    dropped = drop(model, [sample] * 200)
    counts = [int((ids == model.vocabulary.null).sum()) for ids in dropped.ids]
    assert set(counts) == {0, 3}
    assert 30 < counts.count(3) < 70  # of 200, one in four


# gradients


def test_a_slot_sees_its_own_past_and_its_whole_span():
    model = awake(tiny())
    batch = [[tensor([1]), torch.randn(3, 3), tensor([2])], [(1, torch.randn(2, 2)), tensor([3])]]
    ids = [layout(model, sample) for sample in batch]
    spans = [[(slot, token is None) for slot, token in enumerate(row)] for row in ids]
    inputs = []

    def keep(module, args, kwargs):
        inputs.append(args[0].detach().requires_grad_())
        return (inputs[0], *args[1:]), kwargs

    model.transformer.register_forward_pre_hook(keep, with_kwargs=True)
    logits = model(batch, return_loss=False)
    offset = 0
    for row, slots in zip(logits, spans, strict=True):
        for slot, in_span in slots:
            (gradient,) = torch.autograd.grad(row[slot].sum(), inputs[0], retain_graph=True)
            seen = gradient.abs().amax(-1).nonzero().flatten().tolist()
            assert seen == [offset + k for k, k_in_span in slots if k <= slot or (in_span and k_in_span)]
        offset += len(slots)


def everything_on() -> tuple:
    model = tiny(
        modality_encoder=[nn.Linear(channels, channels) for channels in CHANNELS],
        modality_decoder=decoders(),
        modality_num_dim=(2, None),
        reconstruction_loss_weight=1.0,
        trunk=dict(use_value_residual=True),
    )
    batch = ragged_batch()
    batch[1][0], batch[3][2] = torch.randn(2, 2, 3), (0, torch.randn(1, 3, 3))
    return awake(model).train(), batch


def test_every_trained_parameter_gets_a_gradient_and_nothing_frozen_does():
    model, batch = everything_on()
    teacher = model.create_ema()
    model(batch, velocity_consistency_ema_model=teacher, times=0.5, prob_uncond=0.0).backward()
    trained = {id(parameter) for parameter in model.parameters_without_encoder_decoder()}
    for name, parameter in model.named_parameters():
        frozen = ".encoder." in name or ".decoder." in name
        assert frozen == (id(parameter) not in trained), name
        assert frozen == (not parameter.requires_grad), name
        assert frozen == (parameter.grad is None), name
        assert frozen or parameter.grad.abs().sum() > 0, name
    assert all(parameter.grad is None for parameter in teacher.ema_model.parameters())


def test_encoder_and_decoder_stay_in_evaluation_mode():
    model, _ = everything_on()
    for mode in (True, False, True):
        model.train(mode)
        assert model.transformer.training == mode
        assert not any(part.training for io in model.modalities for half in io.frozen for part in half.modules())


def gradients_of(model, loss) -> list:
    """Of each modality's way out."""
    loss.backward()
    return [io.adapter.to_latent.weight.grad for io in model.modalities]


@pytest.mark.parametrize("images_only", [False, True])
def test_consistency_trains_the_model_and_not_the_teacher(images_only):
    model, teacher = awake(tiny(text_loss_weight=0, flow_loss_weight=0)), awake(tiny(), 0.1).train()
    batch, modality = (torch.randn(2, 4, 3), 0) if images_only else (ragged_batch(), None)
    loss = model(batch, modality_type=modality, velocity_consistency_ema_model=teacher)
    first, second = gradients_of(model, loss)
    assert first.abs().sum() > 0
    assert (second is None) == images_only
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(module.training for module in teacher.modules())


def test_reconstruction_reaches_through_the_decoder(same_noise):
    """A decoder that doubles makes the error four times as large, and so its gradient."""
    results = []
    for scale in (1.0, 2.0):
        torch.manual_seed(3)
        weights = dict(text_loss_weight=0, flow_loss_weight=0, reconstruction_loss_weight=1)
        model = awake(tiny(modality_decoder=(nn.Linear(3, 3, bias=False), None), **weights))
        nn.init.eye_(model.modalities[0].decoder.weight).mul_(scale)
        loss = model(torch.randn(2, 4, 3), times=0.5)
        results.append((loss.detach(), gradients_of(model, loss)[0]))
    for single, double in zip(*results, strict=True):
        assert single.abs().sum() > 0
        torch.testing.assert_close(double, 4 * single, **EXACT)


# training


def test_training_lowers_every_loss():
    model, batch = tiny(trunk=dict(dim=32)), ragged_batch()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    def measured():
        torch.manual_seed(5)
        return parts_of(model.eval(), batch * 8)

    before = measured()
    for _ in range(30):
        model.train()(batch * 4).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = measured()
    assert after.text < 0.2 * before.text
    assert (after.flow < 0.9 * before.flow).all()


def test_a_step_under_autocast():
    model, batch = everything_on()
    model.float()
    with torch.autocast("cpu", torch.bfloat16):
        loss, parts = model(batch, velocity_consistency_ema_model=model.create_ema(), return_breakdown=True)
    assert all(part.dtype == torch.float32 and part.isfinite().all() for part in parts)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters_without_encoder_decoder() if p.grad is not None)
    exact = parts_of(model.eval(), batch, times=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        rough = parts_of(model, batch, times=1.0)
    torch.testing.assert_close(rough.text, exact.text, rtol=0.05, atol=0)


def losses_of(model, steps: int, *, autocast: bool):
    """Of a small task learnt by heart, text and flow together."""
    torch.manual_seed(3)
    pictures = torch.randn(4, 3, 3, 3)
    batch = [[torch.full((5,), i), pictures[i], tensor([i, 9 - i])] for i in range(4)]
    optimizer, losses = torch.optim.AdamW(model.parameters(), 3e-3), []
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def test_training_in_bfloat16_comes_to_the_same_losses():
    model = tiny()
    rounded = losses_of(copy.deepcopy(model), 150, autocast=True)
    exact = losses_of(model, 150, autocast=False)
    assert exact[-40:].mean() < 0.6 * exact[:5].mean(), "it learns"
    torch.testing.assert_close(rounded[-40:].mean(), exact[-40:].mean(), rtol=0.1, atol=0)
