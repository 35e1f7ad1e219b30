"""A `Batch`: the same losses whoever packs it; conditions, labels, weights and counts."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from checks import TYPECHECK, no_typecheck
from tiny import NUM_TEXT, Spy, awake, latents_of, layout, noise_of, ragged_batch, targets, tiny
from torch import nn, tensor
from torch.utils.data import DataLoader

from transfusion_pytorch import Batch, Condition, Latents, LossBreakdown, Sample, TargetCounts, TimePolicy

EXACT = dict(rtol=1e-10, atol=1e-10)
TIMES = tensor([[0.25, 0.5], [0.75, 0.125], [0.0, 0.0], [0.5, 0.875]])
IMAGE, VECTOR = torch.randn(2, 2, 3), torch.randn(2)


@pytest.fixture
def model():
    return awake(tiny(reconstruction_loss_weight=0.5))


@pytest.fixture
def same_noise(monkeypatch):
    monkeypatch.setattr(torch, "randn_like", noise_of)


def seeded(call, seed=3):
    torch.manual_seed(seed)
    return call()


def parts_of(model, batch, **options):
    return model(batch, return_breakdown=True, **options)[1]


def assert_equal(one: LossBreakdown, other: LossBreakdown):
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)


# the same losses


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("how", ["as it is", "packed first", "pickled"])
def test_a_batch_is_its_samples_to_the_bit(model, training, how):
    model.train(training)
    pack, samples = model.packer(prob_uncond=0.5), ragged_batch() * 4
    model.prob_uncond = 0.5
    expected = seeded(lambda: parts_of(model, samples))
    if how == "pickled":
        pack = pickle.loads(pickle.dumps(pack))
        batch = pickle.loads(pickle.dumps(seeded(lambda: pack(samples))))
    else:
        batch = seeded(lambda: pack(samples))
    assert isinstance(batch, Batch)
    assert_equal(seeded(lambda: parts_of(model, batch)), expected)
    if how == "packed first":
        assert_equal(seeded(lambda: parts_of(model, model.packer(prob_uncond=0.5)(samples))), expected)
    gradients = []
    for given in (samples, batch):
        model.zero_grad()
        seeded(lambda given=given: model(given)).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("batch", [torch.randint(NUM_TEXT, (3, 5)), torch.randn(3, 2, 2, 3)])
def test_a_batch_of_one_kind_is_packed_too(model, batch):
    kind = 0 if batch.is_floating_point() else None
    packed = model.packer()(batch, modality_type=kind)
    assert torch.equal(seeded(lambda: model(packed)), seeded(lambda: model(batch, modality_type=kind)))
    assert torch.equal(model(packed, return_loss=False), model(batch, modality_type=kind, return_loss=False))


def test_padding_to_a_budget_changes_no_loss(model, same_noise):
    samples = ragged_batch()
    expected = parts_of(model, samples, times=TIMES)
    batch = model.packer(token_budget=128)(samples, times=TIMES)
    assert len(batch.stream.token) == 128
    for a, b in zip(parts_of(model, batch), expected, strict=True):
        torch.testing.assert_close(a, b, **EXACT)
    torch.testing.assert_close(model(batch, return_loss=False), model(samples, times=TIMES, return_loss=False), **EXACT)
    with pytest.raises(ValueError, match=r"the batch has \d+ tokens, more than the token budget of 64"):
        model.packer(token_budget=64)(samples)


def test_step_after_step_a_packer_packs_as_the_model_does(model):
    """Random numbers move on between steps, and what is dropped or clean depends on nothing else."""
    model.train()
    model.prob_uncond, losses = 0.5, []
    for packs in (False, True):
        pack = model.packer()
        torch.manual_seed(4)
        losses.append([model(pack(ragged_batch()) if packs else ragged_batch()).item() for _ in range(1)])
        for _ in range(5):
            samples = [[tensor([1, 2]), IMAGE, tensor([3])], [IMAGE, tensor([3, 4])]]
            losses[-1].append(model(pack(samples) if packs else samples).item())
    assert losses[0] == losses[1]


def test_times_decide_what_may_be_dropped_whoever_gives_them(model):
    model.train()
    model.prob_uncond, samples = 1.0, [[tensor([1, 2]), IMAGE, tensor([3]), torch.randn(1, 3)]]
    times = tensor([[0.5, 1.0]])
    packed, later = model.packer()(samples, times=times), model.packer()(samples)
    expected = model.count_targets(packed).text
    assert model.count_targets(later, times=times).text == model.count_targets(samples, times=times).text == expected
    assert model.count_targets(later).text < expected


def test_a_span_budget_keeps_the_shape(model):
    pack = model.packer(token_budget=128, span_budget=20)
    for count in (1, 15):
        assert pack([[(1, torch.randn(2))] * count]).stream.num_modulations == 20
    with pytest.raises(ValueError, match="the batch has 21 modalities, more than the span budget of 20"):
        pack([[(1, torch.randn(2))] * 21])
    assert model.packer(token_budget=128)([[(1, torch.randn(2))] * 15]).stream.num_modulations == 16


@pytest.mark.parametrize(
    ("budgets", "error", "message"),
    [
        (dict(span_budget=1), ValueError, "span_budget goes with a token_budget"),
        (dict(token_budget=128, span_budget=0), ValueError, "span_budget must be at least 1, got 0"),
        (dict(token_budget=0), ValueError, "token_budget must be at least 1, got 0"),
        (dict(token_budget=64.0), TypeError, "token_budget must be an int, got 64.0"),
    ],
)
@no_typecheck
def test_budgets_are_checked_at_once(model, budgets, error, message):
    with pytest.raises(error, match=message):
        model.packer(**budgets)


class Square:
    """A parser of shapes that can be neither copied nor pickled."""

    def __call__(self, written):
        return int(written), int(written)

    def __reduce_ex__(self, protocol):
        raise TypeError("stays where it is")


def test_packing_leaves_parsers_of_shapes_behind():
    def local(written):
        return int(written), int(written)

    for parser in (lambda written: (1, int(written)), local, Square(), (None, local)):
        model = awake(tiny(to_modality_shape_fn=parser))
        batch = pickle.loads(pickle.dumps(model.packer()))(ragged_batch())
        assert torch.equal(model(batch, return_loss=False), model(ragged_batch(), return_loss=False))
        assert model.modalities[1].spec.parse_shape("3")[1] == 3  # the model still has it


def test_padded_batches_have_one_shape(model):
    pack = model.packer(token_budget=192)
    shapes = set()
    for samples in (ragged_batch(), ragged_batch()[:1], [[tensor([1, 2])]]):
        spy = Spy(model.transformer)
        kept = []
        handle = model.transformer.register_forward_pre_hook(
            lambda m, a, k, kept=kept: kept.append(k), with_kwargs=True
        )
        model(pack(samples))
        handle.remove()
        shapes.add((spy.inputs[0].shape, kept[0]["conditioning"].spans.shape))
    assert len(shapes) == 1


def test_data_workers_pack(model):
    samples = ragged_batch() * 2
    pack = model.packer()
    for workers in (0, 2):
        loader = DataLoader(samples, batch_size=4, collate_fn=pack, num_workers=workers)
        for batch in loader:
            assert isinstance(batch, Batch)
            assert torch.equal(model(batch, return_loss=False), model(ragged_batch(), return_loss=False))


class Pool(nn.Module):
    """An encoder (g, h, w, c) -> (g, h / 2, w / 2, 3), with weights that packing must not need."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x):
        return self.layer(F.avg_pool2d(x.movedim(-1, 1), 2).movedim(1, -1))


def test_an_encoder_is_not_called_while_packing_and_once_by_the_model():
    encoder = Pool()
    model = awake(tiny(modality_encoder=(encoder, None)))
    pack, spy = model.packer(), Spy(encoder)
    assert not any(p.device.type != "meta" for finder in pack.modalities for p in finder.blank.parameters())
    pack = pickle.loads(pickle.dumps(pack))
    batch = pack([[tensor([1]), torch.randn(4, 6, 5)], [torch.randn(4, 6, 5), Latents(0, torch.randn(2, 2, 3))]])
    assert not spy.inputs
    assert batch.stream.spans.shapes == ((2, 3), (2, 3), (2, 2))
    model(batch)
    assert [tuple(x.shape) for x in spy.inputs] == [(2, 4, 6, 5)]


def test_latents_that_are_encoded_already_leave_the_encoder_out(same_noise):
    model = awake(tiny(modality_encoder=(Pool(), None)))
    raw = torch.randn(4, 6, 5).double()
    encoded = model.modalities[0].encoder(raw[None])[0].detach()
    for part in (raw, (0, raw)):
        expected = model([[tensor([1]), part, tensor([2])]], times=0.5)
        assert torch.equal(model([[tensor([1]), Latents(0, encoded), tensor([2])]], times=0.5), expected)
    with pytest.raises(ValueError, match=r"sample 0, part 0: modality 0 takes latents of 3 channels, last"):
        model([[Latents(0, raw)]])


class HostOnly(nn.Module):
    """Reads its data, which `meta` tensors do not have."""

    def forward(self, x):
        return x[:, :: 2 if bool((x < 100).all()) else 1]


def test_an_encoder_that_does_not_run_on_meta_needs_a_shape_function_only_in_a_packer():
    model = awake(tiny(modality_encoder=(HostOnly(), None)))
    samples = [[tensor([1]), torch.randn(4, 3)]]
    expected = model(samples, return_loss=False)
    with pytest.raises(ValueError, match=r"sample 0, part 1: HostOnly of modality 0 .* give a latent_shape_fn"):
        model.packer()(samples)
    pack = model.packer(latent_shape_fn=(lambda shape: (shape[0] // 2,), None))
    assert torch.equal(model(pack(samples), return_loss=False), expected)


# the meta device stands for one that nobody can read from

OPTIONS = {
    "plain": {},
    "clean": dict(model_output_clean=True),
    "reconstruction": dict(reconstruction_loss_weight=1.0, modality_decoder=(nn.Linear(3, 6), None)),
    "encoder": dict(modality_encoder=(nn.Linear(3, 3), None)),
    "value residual": dict(trunk=dict(use_value_residual=True, kv_heads=1)),
    "checkpoints": dict(trunk=dict(use_checkpoint=True)),
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", ["mixed", "padded", "text", "images"])
def test_nothing_is_read_back_from_the_device(options, kind):
    model = tiny(**copy.deepcopy(OPTIONS[options]))
    pack = model.packer(token_budget=128 if kind == "padded" else None, prob_uncond=0.5)
    samples = {"text": torch.randint(NUM_TEXT, (2, 5)), "images": torch.randn(2, 3, 3)}.get(kind, ragged_batch())
    batches = [pack(samples), pack(samples, times=0.5)]
    teacher = copy.deepcopy(model).to("meta")
    model.to("meta")
    counts = sum(map(model.count_targets, batches))
    for batch in batches:
        loss = model(batch, velocity_consistency_ema_model=teacher, counts=counts)
        loss.backward()
        assert loss.is_meta
        model(batch, reduction="none")
        model(batch, reduction="span")
        model.eval()(batch)
        model(batch, return_loss=False)
        model.train()


# conditions


def test_a_condition_is_read_and_not_learned(model, same_noise):
    text, answer, source, target = tensor([1, 2]), tensor([3, 4]), IMAGE, torch.randn(1, 3)
    samples = [[Condition(text), answer], [Condition((0, source)), text, target]]
    bare = [[text, answer], [source, text, target]]
    logits = model(bare, return_loss=False)
    assert torch.equal(model(samples, return_loss=False), logits)
    batch = model.packer()(samples)
    ids = [layout(model, sample) for sample in bare]
    unlearned = [{0, 1}, {0, 1, 2, 3, 4}]  # slots whose next id is of a condition: text; meta "2" "," "2" som
    expected = [
        {k: v for k, v in targets(row).items() if k not in gone} for row, gone in zip(ids, unlearned, strict=True)
    ]
    offset = len(ids[0])
    slots = [*expected[0], *(offset + slot for slot in expected[1])]
    assert batch.targets.slot.tolist() == slots
    assert batch.targets.label.tolist() == [*expected[0].values(), *expected[1].values()]
    parts = parts_of(model, samples, times=tensor([[0.5, 0.5], [0.5, 0.25]]))
    spy = Spy(model.time_embedding)
    alone = parts_of(model, samples, times=tensor([[0.5, 0.5], [0.5, 0.25]]))
    assert spy.inputs[0].tolist() == [1.0, 0.25]  # it has its column, and is clean
    assert_equal(alone, parts)


def test_the_flow_loss_is_that_of_what_is_learned(model, same_noise):
    both = [[Condition((0, IMAGE)), torch.randn(1, 3)]]
    mixed = parts_of(model, [[IMAGE, both[0][1]]], times=tensor([[1.0, 0.25]]))
    parts = parts_of(model, both, times=0.25)
    torch.testing.assert_close(parts.flow, mixed.flow, **EXACT)
    torch.testing.assert_close(parts.recon, mixed.recon, **EXACT)
    assert parts.flow[0] > 0
    assert parts_of(model, [[Condition((0, IMAGE)), tensor([1])]]).flow.tolist() == [0, 0]


def test_what_is_put_at_one_has_no_loss(model):
    parts = parts_of(model, ragged_batch(), times=1.0)
    assert parts.flow.tolist() == parts.recon.tolist() == [0, 0]
    assert model.eval().count_targets(ragged_batch(), times=1.0).latents.tolist() == [0, 0]


def test_a_marker_behind_a_condition_is_no_target(model):
    for part in (tensor([1, 2]), (0, IMAGE)):
        assert not len(model.packer()([[Condition(part)]]).targets.slot)


def test_guidance_drops_a_condition_like_any_text(model):
    null = model.vocabulary.null
    batch = model.packer()([[Condition(tensor([1, 2])), IMAGE], [Condition((0, IMAGE)), tensor([3])]])
    token = batch.drop_text(null, 1.0).stream.token
    assert (token == null).nonzero().flatten().tolist() == [1, 2]  # a caption of a condition conditions nothing


def test_prompts_accept_conditions_and_latents():
    model = awake(tiny(modality_default_shape=((2, 2), ())))
    options = dict(max_length=24, text_temperature=0.0)
    expected = model.sample([tensor([1]), IMAGE], **options)
    for prompt in ([Condition(tensor([1])), Condition((0, IMAGE))], [tensor([1]), Latents(0, IMAGE)]):
        assert repr(model.sample(prompt, **options)) == repr(expected)


def test_gradients_flow_into_a_condition_and_nowhere_else(model):
    source, target = IMAGE.clone().requires_grad_(), torch.randn(1, 3)
    model([[Condition((0, source)), target]]).backward()
    assert source.grad.abs().sum() > 0
    for part in (source, (0, source)):
        with pytest.raises(ValueError, match=r"sample 0, part 1: modality 0 has a flow loss .* detach\(\).* Condition"):
            model([[tensor([1]), part]])
    with torch.no_grad():
        model([[tensor([1]), source]])
    with pytest.raises(TypeError, match="sample 0, part 0: a Condition holds one part, got a Condition"):
        model([[Condition(Condition(source))]])


def test_gradients_flow_through_a_frozen_encoder_into_a_condition():
    model = awake(tiny(modality_encoder=(Pool(), None)))
    source = torch.randn(4, 4, 5, requires_grad=True)
    model([[Condition(source), tensor([1, 2])]]).backward()
    assert source.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in model.modalities[0].encoder.parameters())


# labels and weights


@pytest.mark.parametrize("ignored", [-1, -100])
def test_labels_are_shifted_inside(model, ignored):
    ids, labels = torch.randint(NUM_TEXT, (2, 5)), torch.randint(NUM_TEXT, (2, 5))
    labels[0, 2] = labels[1, 0] = ignored
    logits = model(ids, return_loss=False)
    wanted = labels.masked_fill(labels == ignored, -100)[:, 1:]
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), wanted.flatten(), ignore_index=-100)
    torch.testing.assert_close(model(ids, labels=labels), expected, **EXACT)
    assert model.count_targets(ids, labels=labels).text == (wanted != -100).sum()
    torch.testing.assert_close(model(ids, labels=ids), model(ids), **EXACT)


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (torch.zeros(2, 4, dtype=torch.long), ValueError, r"of the shape of the batch, \(2, 5\), got .*\(2, 4\)"),
        (torch.ones(2, 5).bool(), ValueError, r"labels are ids"),
        (torch.zeros(2, 5), ValueError, r"labels are ids"),
        (
            torch.full((2, 5), 999),
            ValueError,
            r"labels of sample 0, position 0: token id 999 is outside the vocabulary",
        ),
    ],
)
def test_labels_that_are_none_are_refused(model, labels, error, message):
    with pytest.raises(error, match=message):
        model(torch.randint(NUM_TEXT, (2, 5)), labels=labels)
    with pytest.raises(TypeError, match="labels go with a batch of ids"):
        model([[tensor([1, 2])]], labels=labels)


@pytest.mark.parametrize("ignored", [-1, -7])
@pytest.mark.parametrize("training", [True, False])
def test_padding_at_the_end_of_a_row_changes_nothing(ignored, training):
    model = awake(tiny(ignore_index=ignored)).train(training)
    rows = [[1, 2, 3, 4], [5, 6], [7, 8, 9]]
    ids = tensor([row + [ignored] * (5 - len(row)) for row in rows])
    before = ids.clone()
    plain = model.packer(adds_markers=False)([[tensor(row)] for row in rows])
    for given in (ids, model.packer()(ids)):
        batch = model._as_batch(given)
        assert batch.stream.token.tolist() == [id for row in rows for id in row]
        assert batch.stream.lengths == (4, 2, 3)
        assert torch.equal(model(given), model(plain))
        assert model.count_targets(given).text == 3 + 1 + 2
        logits = model(given, return_loss=False)
        assert torch.equal(logits, model(plain, return_loss=False))
        assert logits.shape[:2] == (3, 4)
    counts = model.count_targets(ids)
    one_by_one = sum(model(tensor([row]), counts=counts) for row in rows)
    torch.testing.assert_close(model(ids), one_by_one, **EXACT)
    torch.testing.assert_close(model(ids, reduction="none").text, model(plain, reduction="none").text, **EXACT)
    assert torch.equal(ids, before)


@pytest.mark.parametrize("ignored", [-1, -100])
def test_labels_of_padding_are_none(model, ignored):
    ids = tensor([[1, 2, 3, 4], [5, 6, -1, -1]])
    labels = tensor([[ignored, 9, ignored, 4], [5, 8, ignored, ignored]])
    expected = sum(
        model(tensor([row]), labels=tensor([of_row]), counts=model.count_targets(ids, labels=labels))
        for row, of_row in (([1, 2, 3, 4], labels[0].tolist()), ([5, 6], [5, 8]))
    )
    torch.testing.assert_close(model(ids, labels=labels), expected, **EXACT)
    assert model.count_targets(ids, labels=labels).text == 3
    labels[1, 2] = 7
    with pytest.raises(ValueError, match="labels of sample 1: its ids are padding from position 2 on, where labels"):
        model(ids, labels=labels)


@pytest.mark.parametrize("has_teacher", [True, False])
def test_losses_of_samples_over_given_counts_add_up(model, has_teacher):
    """Under `TYPECHECK`, too: one row of counts serves all samples."""
    samples, options = ragged_batch(), dict(times=0.25)
    if has_teacher:
        options |= dict(velocity_consistency_ema_model=awake(tiny(), 0.1), velocity_consistency_delta_time=0.25)
    counts = model.count_targets(samples, times=0.25)

    def parts(**given):
        generator = torch.Generator().manual_seed(1)
        given = dict(return_breakdown=True) | given
        made = model(samples, counts=counts, generator=generator, **options, **given)
        return made[1] if given["return_breakdown"] else made

    whole, rows = parts(), parts(reduction="none", return_breakdown=False)
    assert (whole.velocity > 0).all() == has_teacher
    for name in LossBreakdown._fields:
        assert len(getattr(rows, name)) == len(samples)
        torch.testing.assert_close(getattr(rows, name).sum(0), getattr(whole, name), **EXACT)


def test_weights_weigh_samples_and_their_counts(model, same_noise):
    samples, weights = ragged_batch(), tensor([0.5, 2.0, 1.0, 0.0])
    rows = model(samples, times=TIMES, reduction="none")
    counts = [model.count_targets([sample], times=times[None]) for sample, times in zip(samples, TIMES, strict=True)]
    parts = parts_of(model, samples, times=TIMES, sample_weights=weights)
    for name, each in (("text", "text"), ("flow", "latents"), ("recon", "decoded")):
        count = torch.stack([weight * getattr(c, each) for weight, c in zip(weights, counts, strict=True)])
        mean = (getattr(rows, name) * count).sum(0) / count.sum(0)
        torch.testing.assert_close(getattr(parts, name), mean, **EXACT)
    described = [Sample(sample, weight=float(weight)) for sample, weight in zip(samples, weights, strict=True)]
    assert_equal(parts_of(model, described, times=TIMES), parts)
    for wrong in (weights[:3], -weights, weights / 0):
        with pytest.raises(ValueError, match="sample_weights are 4 numbers of at least 0"):
            model(samples, sample_weights=wrong)


def test_every_sample_has_a_row_of_its_own(model, same_noise):
    samples = ragged_batch()
    rows = model(samples, times=TIMES, reduction="none")
    assert isinstance(rows, LossBreakdown)
    assert [tuple(part.shape) for part in rows] == [(4,), (4,), (4, 2), (4, 2), (4, 2)]
    for i, sample in enumerate(samples):
        alone = parts_of(model, [sample], times=TIMES[i : i + 1])
        for row, expected in zip(rows, alone, strict=True):
            torch.testing.assert_close(row[i], expected, **EXACT)
    rows.total.sum().backward()
    weighted = model(samples, times=TIMES, reduction="none", sample_weights=[0, 1, 2, 3])
    assert not weighted.total[0]
    torch.testing.assert_close(weighted.total[1:], rows.total[1:], **EXACT)
    with pytest.raises(ValueError, match="reduction must be one of mean, none, span, got 'sum'"):
        model(samples, reduction="sum")


def test_spans_have_losses_of_their_own_with_what_they_belong_to(model, same_noise):
    samples = [Sample(sample, name=f"s{i}", source="ab"[i % 2]) for i, sample in enumerate(ragged_batch())]
    losses = model(samples, times=TIMES, reduction="span")
    assert losses.modality.tolist() == [0, 1, 0, 1, 1, 0]
    assert losses.sample.tolist() == [0, 0, 1, 1, 3, 3]
    assert losses.time.tolist() == TIMES[[0, 1, 3]].flatten().tolist()
    assert (losses.names, losses.sources) == (("s0", "s1", "s2", "s3"), ("a", "b", "a", "b"))
    sizes = tensor([4.0, 3, 4, 1, 4, 6])
    flow = parts_of(model, ragged_batch(), times=TIMES).flow
    for kind in (0, 1):
        of_kind = losses.modality == kind
        mean = (losses.flow * sizes)[of_kind].sum() / sizes[of_kind].sum()
        torch.testing.assert_close(mean, flow[kind], **EXACT)


def test_names_and_sources_may_be_given_beside_the_samples(model):
    batch = model.packer()(ragged_batch(), names=list("abcd"), sources=[None] * 4)
    assert (batch.names, batch.sources) == (tuple("abcd"), (None,) * 4)
    with pytest.raises(ValueError, match="names: expected one for each of 4 samples, got 1"):
        model.packer()(ragged_batch(), names=["a"])


# counts


def test_micro_batches_add_up_to_one_large_batch(same_noise):
    model = awake(tiny(reconstruction_loss_weight=0.5, modality_decoder=(nn.Linear(3, 7), None)))
    samples, teacher = ragged_batch(), awake(tiny(), 0.1)
    options = dict(velocity_consistency_ema_model=teacher)
    whole = model(samples, times=TIMES, **options)
    whole.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    batches = [model.packer()(samples[i : i + 1], times=TIMES[i : i + 1]) for i in range(4)]
    counts = sum(batch.counts for batch in batches)
    assert isinstance(counts, TargetCounts)
    total = 0
    for batch in batches:
        loss = model(batch, counts=counts, **options)
        loss.backward()
        total += loss.detach()
    torch.testing.assert_close(total, whole.detach(), **EXACT)
    for name, gradient in expected.items():
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, gradient, **EXACT)


def test_counts_and_training_of_a_batch_agree(model):
    model.prob_uncond, model.time_policy = 0.5, TimePolicy(prob_clean_captioned=0)
    batch = model.packer()(ragged_batch() * 8)
    spy = Spy(model.to_logits)
    parts_of(model.train(), batch)
    assert 0 < len(spy.inputs[0]) < len(batch.targets.slot)
    assert batch.counts.text == model.count_targets(batch).text == len(spy.inputs[0])
    assert model.eval().count_targets(batch).text == len(batch.targets.slot)
    expected = [8 * latents_of(ragged_batch(), kind).numel() for kind in (0, 1)]
    assert batch.counts.latents.tolist() == batch.counts.decoded.tolist() == expected


def test_numbers_for_dropping_text_differ_from_batch_to_batch_and_move_no_generator(model):
    pack, sample = model.packer(), [tensor([1]), IMAGE]
    state = torch.get_rng_state()
    first, second = pack([sample] * 1000).drop_text_number, pack([sample] * 1000).drop_text_number
    assert torch.equal(torch.get_rng_state(), state)
    assert abs(first.mean() - 0.5) < 0.05
    assert abs(torch.corrcoef(torch.stack((first, second)))[0, 1]) < 0.15


def test_counts_are_added_and_refused():
    one = TargetCounts(tensor(2.0), tensor([3.0, 4.0]), tensor([0.0, 1.0]))
    both = sum([one, one])
    assert (both.text, both.latents.tolist(), both.decoded.tolist()) == (4, [6, 8], [0, 2])
    with pytest.raises(ValueError, match="do not add up; call all_reduce"):
        one + TargetCounts(one.text, one.latents, one.decoded, processes=2)


# reproducible validation


def test_equal_generators_give_equal_losses(model):
    def evaluate(batch, seed):
        return parts_of(model.eval(), batch, generator=torch.Generator().manual_seed(seed))

    samples = ragged_batch()
    state = torch.get_rng_state()
    first = evaluate(samples, 1)
    assert_equal(evaluate(samples, 1), first)
    assert_equal(evaluate(model.packer()(samples), 1), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(evaluate(samples, 2).flow, first.flow)


def test_noise_may_be_given(model):
    samples = ragged_batch()
    noise = {kind: torch.randn_like(latents_of(samples, kind)) for kind in (0, 1)}
    first = parts_of(model, samples, times=TIMES, noise=noise)
    assert_equal(parts_of(model, samples, times=TIMES, noise=noise), first)
    images = torch.randn(2, 4, 3)
    expected = parts_of(model, images, times=0.5, noise={0: noise[0][:8]})
    assert_equal(parts_of(model, images, times=0.5, noise=noise[0][:8]), expected)
    with pytest.raises(ValueError, match=r"noise for modalities \[0, 1\] is a dict"):
        model(samples, noise=noise[0])
    with pytest.raises(ValueError, match=r"noise has the shape of the flat latents .* \(8, 3\), got \(2, 3\)"):
        model(images, noise=torch.randn(2, 3))


# what a Batch refuses


def test_what_belongs_to_packing_is_refused_with_a_batch(model):
    batch = model.packer()(ragged_batch())
    with pytest.raises(ValueError, match="a Batch has its sample_weights; give them to the packer"):
        model(batch, sample_weights=[1, 1, 1, 1])
    others = [tiny(dim_latent=3), tiny(num_text_tokens=50), tiny(modality_encoder=(nn.Linear(3, 3), None)), tiny()]
    for other in others:  # the last one has no reconstruction loss
        with pytest.raises(ValueError, match="the Batch was packed for another model"):
            other(batch)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(counts=5), TypeError, "counts must be a TargetCounts, got int"),
        (dict(generator=5), TypeError, "generator must be a Generator, got int"),
        (dict(sample_weights="abc"), TypeError, "sample_weights must be numbers, got str"),
        (dict(noise={5: torch.zeros(1)}), ValueError, r"noise for modalities \[5\], which the batch has not"),
        (dict(counts=TargetCounts(*map(torch.ones, [(), 1, 1]))), ValueError, "counts are of 1 modalities"),
    ],
)
def test_options_that_are_none_are_refused(model, options, error, message):
    is_checked = TYPECHECK and error is TypeError  # the type checker is faster, and says it in its own words
    with pytest.raises(error, match=None if is_checked else message):
        model(ragged_batch(), **options)


def test_every_call_drops_other_text(model):
    """Also where times and noise are given, so that nothing else moves the generator."""
    model.train()
    samples = [[tensor([1, 2]), torch.zeros(1, 3)]] * 16
    spy, options = Spy(model.text_embedding), dict(prob_uncond=0.5, times=0.5, noise=torch.zeros(16, 3))
    for _ in range(3):
        model(samples, **options)
    dropped = [(ids == model.vocabulary.null).tolist() for ids in spy.inputs]
    assert dropped[0] != dropped[1] != dropped[2]


# what is put at t = 1 is a condition


def test_what_is_put_at_one_is_like_a_condition(model, same_noise):
    source, text, target = torch.randn(2, 3), tensor([1, 2]), torch.randn(1, 3)
    teacher, times = awake(tiny(), 0.1), tensor([[1.0, 0.5]])
    options = dict(velocity_consistency_ema_model=teacher)
    put = parts_of(model, [[source, text, target]], times=times, **options)
    condition = parts_of(model, [[Condition((0, source)), text, target]], times=times, **options)
    for kind in ("flow", "velocity", "recon"):
        torch.testing.assert_close(getattr(put, kind), getattr(condition, kind), **EXACT)
    batch = model.packer()([[text, source]], times=1.0)
    assert not batch.is_droppable.any()
    again = batch.with_times(tensor([0.5]))
    assert again.count_targets().latents.tolist() == [6, 0]
    nearly = 1 - 1e-9
    assert model.packer()([[source]], times=nearly).times.tolist() == [nearly]  # in the precision of the model


# encoders that are not what they seem


class Shorter(nn.Module):
    """Makes fewer latents of some data than of others of the same shape, which a dry run cannot see."""

    def forward(self, x):
        return x[:, :1] if not x.is_meta and x.amax() > 5 else x


def test_latents_of_another_shape_than_was_packed_are_refused():
    model = awake(tiny(modality_encoder=(Shorter(), None)))
    assert model([[torch.zeros(4, 3)]]).isfinite()
    with pytest.raises(ValueError, match=r"sample 0, part 0: the encoder made latents of shape \(1,\), .* for \(4,\)"):
        model([[torch.full((4, 3), 9.0)]])


def test_an_encoder_that_cannot_be_copied_is_tried_itself():
    layer = torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    layer.held = torch.ones(3, requires_grad=True) * 2  # which deepcopy refuses
    model = awake(tiny(modality_encoder=(layer, None)))
    samples = [[torch.randn(4, 3), tensor([1])]]
    expected = model(samples, return_loss=False)
    with pytest.raises(ValueError, match=r"modality 0: its modules cannot be copied .* give a latent_shape_fn"):
        model.packer()
    batch = pickle.loads(pickle.dumps(model.packer(latent_shape_fn=(lambda_free, None))))(samples)
    assert torch.equal(model(batch, return_loss=False), expected)


def lambda_free(shape):
    return shape[:-1]


class Random(nn.Module):
    def forward(self, x):
        return torch.distributions.Normal(x, torch.ones_like(x))


def test_a_generator_also_draws_what_an_encoder_draws():
    model = awake(tiny(modality_encoder=(Random(), None)))
    batch = model.packer()([[torch.randn(4, 3)]])
    state = torch.get_rng_state()
    first, second = (model(batch, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(model(batch, generator=torch.Generator().manual_seed(2)), first)


def test_a_packer_takes_samples_as_datasets_give_them(model):
    pack = model.packer()
    text = tensor([1, 2])
    for sample in ((text, IMAGE), Sample((text, IMAGE))):
        assert torch.equal(model(pack([sample]), return_loss=False), model([[text, IMAGE]], return_loss=False))


def test_latents_on_a_device_are_searched_for_nan_on_request_only(model):
    bad = torch.full((2, 3), float("nan"))
    with pytest.raises(ValueError, match="sample 0, part 0: the tensor contains NaN"):
        model.packer()([[bad]])
    assert model.packer(checks_devices=())([[bad]]).data[0].latents.isnan().all()


def test_with_seeds_a_sample_is_the_same_in_every_batch():
    """Everything random comes from the seed of the sample: losses of its parts add up to that of the whole batch."""
    model = tiny(prob_uncond=0.5, time_policy=TimePolicy("logit_normal", prob_clean_captioned=0.5)).train()
    text, image = torch.tensor([1, 2]), torch.randn(3, 3)
    samples = [[text, image, text], [image, text], [text, image, image], [image], [text]] * 8
    seeds = list(range(7, 7 + len(samples)))
    pack = model.packer()
    whole = pack(samples, seeds=seeds)
    parts = [pack(samples[i::3], seeds=seeds[i::3]) for i in range(3)]
    counts = whole.counts
    assert torch.equal(sum(part.counts for part in parts).latents, counts.latents)
    assert 0 < counts.text < model.packer(prob_uncond=0.0)(samples, seeds=seeds).counts.text
    first = model(whole, counts=counts)
    torch.manual_seed(3)  # is not asked
    assert torch.equal(model(whole, counts=counts), first)
    assert torch.allclose(sum(model(part, counts=counts) for part in parts), first, rtol=1e-5)
    assert not torch.equal(model(pack(samples, seeds=[seed + 1 for seed in seeds])), model(whole))


@pytest.mark.parametrize("seeds", [[1], [1, -1], [1, 0.5], [1, True]])
def test_seeds_are_one_whole_number_for_each_sample(seeds):
    with pytest.raises(ValueError, match="seeds: expected an int of at least 0 for each of 2 samples"):
        tiny().packer()([[torch.tensor([1])], [torch.tensor([2])]], seeds=seeds)
