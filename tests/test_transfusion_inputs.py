"""What `Transfusion` may be called with, what it makes of it, and how it refuses the rest."""

import copy
from itertools import chain

import numpy as np
import pytest
import torch
from checks import no_typecheck
from tiny import NUM_TEXT, Spy, awake, layout, ragged_batch, tiny
from torch import nn, tensor

from transfusion_pytorch import LossBreakdown
from transfusion_pytorch.sequence.samples import Condition, Modality

SOS, META, SOM, CHAR = NUM_TEXT, NUM_TEXT + 2, NUM_TEXT + 3, NUM_TEXT + 7

EXACT = dict(rtol=1e-10, atol=1e-10)


@pytest.fixture
def model():
    return awake(tiny())


def images(*shape) -> torch.Tensor:
    return torch.randn(*shape, 3)


# the ways of calling it


def test_every_documented_way_of_calling(model):
    batch, ids = ragged_batch(), torch.randint(NUM_TEXT, (2, 6))
    total, parts = model(batch, return_breakdown=True)
    assert isinstance(parts, LossBreakdown)
    assert parts._fields == ("total", "text", "flow", "velocity", "recon")
    assert [part.ndim for part in parts] == [0, 0, 1, 1, 1]
    assert total == parts.total
    options = dict(velocity_consistency_ema_model=model.create_ema(), velocity_consistency_delta_time=1e-3)
    drawn = dict(num_modalities_to_times_fn=lambda counts: torch.rand(len(counts), int(counts.max())))
    losses = [model(batch), model(batch, **options), model(batch, times=0.5), model(batch, **drawn), model(ids)]
    losses += [model(images(3, 2, 2)), model(torch.randn(3, 4, 2), modality_type=1)]
    for loss in losses:
        assert loss.shape == ()
        assert loss.isfinite()
        assert loss.requires_grad
    longest = max(len(layout(model, sample)) for sample in batch)
    assert model(batch, return_loss=False).shape == (4, longest, model.vocabulary.num_logits)
    assert model(ids, return_loss=False).shape == (2, 6, model.vocabulary.num_logits)


def test_times_may_come_second_without_their_name(model):
    losses = [model(ragged_batch(), *a, generator=torch.Generator().manual_seed(1), **k) for a, k in TIMES_GIVEN]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


TIMES_GIVEN = [((0.25,), {}), ((), dict(times=0.25)), ((0.5,), {})]


def test_a_float_tensor_is_modality_0_and_an_integer_tensor_is_text(model):
    latents, ids = images(2, 2), tensor([1, 2])
    expected = model([[ids, (0, latents)]], return_loss=False)
    for batch in ([[ids, latents]], ([ids, latents],), [[tensor(1), tensor([2]), (np.int64(0), latents)]]):
        torch.testing.assert_close(model(batch, return_loss=False), expected, **EXACT)
    assert torch.equal(model([ids, ids], return_loss=False), model([[ids], [ids]], return_loss=False))


def test_a_forgotten_outer_list_is_refused(model):
    with pytest.raises(TypeError, match=r"side by side .* go in a list: \[\[\.\.\.\]\]"):
        model([tensor([1, 2]), images(2, 2)])


OPENINGS = [[META], [META, CHAR], [META, CHAR, SOM], [META, SOM], [SOM]]


@pytest.mark.parametrize("end", OPENINGS)
def test_a_sample_that_was_cut_off_in_an_opening_is_taken_without_it(model, end):
    cut = model([[tensor([SOS, 1, 2, *end])]], return_loss=False)
    torch.testing.assert_close(cut, model([[tensor([1, 2])]], return_loss=False), **EXACT)


@pytest.mark.parametrize("end", OPENINGS)
def test_a_sample_that_was_cut_off_in_an_opening_can_be_continued_and_learned(model, end):
    """It is the sample without that opening: what is never drawn is neither read nor a target."""
    start, turn, latents = tensor([SOS, 1, 2, *end]), tensor([[3]]), images(2, 2)
    for parts, bare in [
        ([start, turn], [tensor([1, 2]), turn]),
        ([start, turn, latents], [tensor([1, 2, 3]), latents]),
        ([start, latents, turn], [tensor([1, 2]), latents, turn]),
        ([start, Condition(turn), latents], [tensor([1, 2]), Condition(turn), latents]),
        ([Condition(start), turn], [Condition(tensor([1, 2])), turn]),
        ([start, turn, tensor(end), tensor(4)], [tensor([1, 2, 3, 4])]),
    ]:
        pack = model.packer()
        cut, whole = pack([parts]), pack([bare])
        assert torch.equal(cut.stream.token, whole.stream.token)
        assert torch.equal(cut.stream.label, whole.stream.label)
        losses = [model([sample], times=0.5, generator=torch.Generator().manual_seed(0)) for sample in (parts, bare)]
        assert torch.equal(*losses)
        counts = [model.count_targets([sample]) for sample in (parts, bare)]
        assert counts[0].text == counts[1].text
        assert torch.equal(counts[0].latents, counts[1].latents)
    labels = pack([[start, turn]]).stream.label
    assert not set(labels.tolist()) & {META, CHAR, SOM}


def test_a_sample_of_an_opening_alone_is_an_empty_one(model):
    for ids in ([SOS, SOM], [SOS, META, CHAR, SOM]):
        tokens = model.packer()([[tensor(ids)]]).stream.token
        assert tokens.tolist() == [SOS, SOS + 1]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8])
def test_text_may_be_of_any_integer_type(model, dtype):
    ids = torch.randint(NUM_TEXT, (2, 5))
    assert torch.equal(model(ids.to(dtype), return_loss=False), model(ids, return_loss=False))
    assert torch.equal(model([[ids[0].to(dtype)]], return_loss=False), model([[ids[0]]], return_loss=False))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_latents_may_be_of_any_float_type(dtype):
    model, latents = tiny().eval(), images(3, 2).to(dtype)
    batch = [[tensor([1]), latents]]
    assert torch.equal(model(batch, return_loss=False), model([[tensor([1]), latents.float()]], return_loss=False))
    torch.manual_seed(0)
    loss = model(latents[None])
    torch.manual_seed(0)
    assert loss == model(latents[None].float())


def test_views_are_taken_as_they_are(model):
    latents = images(2, 4)
    odd = latents.mT.contiguous().mT
    ids = tensor([[1, 9], [2, 9]])[:, 0]
    expected = model([[tensor([1, 2]), latents]], return_loss=False)
    torch.testing.assert_close(model([[ids, odd]], return_loss=False), expected, **EXACT)


def test_a_batch_of_one_modality_is_bare_spans(model):
    spy = Spy(model.transformer)
    model(torch.randn(3, 4, 2), modality_type=1)
    model(images(2, 3, 3))
    model(images(5))
    assert [len(x) for x in spy.inputs] == [12, 18, 5]


def test_a_batch_of_one_modality_keeps_its_type(model):
    for kind, latents in ((0, images(2, 3)), (1, torch.randn(2, 3, 2))):
        _, parts = model(latents, modality_type=kind, return_breakdown=True)
        assert parts.flow.bool().tolist() == [kind == 0, kind == 1]


def test_a_sampled_sample_trains_as_the_bare_one_does(model):
    bare = [tensor([1, 2]), images(2, 2), tensor([3]), (1, torch.randn(2))]
    ids = layout(model, bare)
    first, last = ids.index(None), len(ids) - 1 - ids[::-1].index(None)
    between = ids[first + 4 : last]
    assert None not in between
    sampled = [tensor(ids[:first]), (0, bare[1]), tensor(between), bare[3], tensor(ids[last + 1 :])]
    torch.testing.assert_close(model([sampled], return_loss=False), model([bare], return_loss=False), **EXACT)
    pack = model.packer()
    for samples in ([sampled], [bare]):
        assert pack(samples).stream.spans.is_captioned.tolist() == [False, False]
    assert pack([[tensor([SOS]), *sampled[1:]]]).stream.spans.is_captioned.tolist() == [True, False]


def test_lists_and_tensors_of_the_caller_stay_as_they_were(model):
    batch = ragged_batch()
    before, parts = copy.deepcopy(batch), [list(map(id, sample)) for sample in batch]
    model.train()(batch, prob_uncond=1.0).backward()
    assert [list(map(id, sample)) for sample in batch] == parts
    for old, new in zip(chain(*before), chain(*batch), strict=True):
        assert torch.equal(*(part[1] if isinstance(part, tuple) else part for part in (old, new)))


def test_a_model_without_text_trains_on_modalities_alone():
    model = awake(tiny(num_text_tokens=0))
    _, parts = model([[images(2), (1, torch.randn(3, 2))]], return_breakdown=True)
    assert parts.text > 0  # markers
    assert (parts.flow > 0).all()
    assert model(images(2, 3)) > 0
    with pytest.raises(ValueError, match=r"sample 0, part 0: token id 3 is outside the vocabulary, which has no text"):
        model([[tensor([3])]])


def test_one_modality_has_the_width_of_the_model_by_default():
    model = tiny(dim_latent=None)
    assert model.num_modalities == 1
    assert model([[tensor([1]), torch.randn(2, 16)]]).isfinite()


# encoders and decoders


class Encoder(nn.Module):
    """Three channels to twice as many latent ones (linear, so that the expected answer is easily had)."""

    def __init__(self, channels: int = 3):
        super().__init__()
        self.layer = nn.Linear(channels, 2 * channels, bias=False)
        self.shapes: list[tuple] = []

    def forward(self, x):
        self.shapes.append(tuple(x.shape))
        return self.layer(x)


RAW = [[tensor([1]), torch.ones(4, 3), torch.zeros(2, 3)], [torch.full((4, 3), 2.0), tensor([5])]]


def test_an_encoder_sees_batches_of_equal_shape():
    model = tiny(dim_latent=6, modality_encoder=Encoder())
    model(RAW)
    assert sorted(model.modalities[0].encoder.shapes) == [(1, 2, 3), (2, 4, 3)]


def test_an_encoder_without_batches_sees_one_instance_at_a_time():
    model = tiny(dim_latent=6, modality_encoder=Encoder(), modality_encoder_decoder_requires_batch_dim=False)
    model(RAW)
    assert sorted(model.modalities[0].encoder.shapes) == [(2, 3), (4, 3), (4, 3)]


@pytest.mark.parametrize("batched", [True, False])
def test_encoding_inside_is_encoding_outside(batched):
    encoder = Encoder().double()
    model = awake(tiny(dim_latent=6, modality_encoder=encoder, modality_encoder_decoder_requires_batch_dim=batched))
    raw = [[tensor([1]), images(4), images(2)], [images(4), tensor([5])]]
    encoded = [[part if part.dtype == torch.long else encoder(part.double()) for part in sample] for sample in raw]
    logits = model(raw, return_loss=False)
    encoder.requires_grad_(True)
    assert not model._latents(model.packer()(raw))[0].requires_grad
    model.modalities[0].encoder = None
    torch.testing.assert_close(logits, model(encoded, return_loss=False), **EXACT)


@pytest.mark.parametrize(("batched", "shapes"), [(True, [(2, 4, 3), (1, 2, 3)]), (False, [(4, 3), (4, 3), (2, 3)])])
def test_a_decoder_sees_what_the_encoder_saw(batched, shapes):
    decoder = Encoder()
    options = dict(modality_decoder=decoder, modality_encoder_decoder_requires_batch_dim=batched)
    tiny(dim_latent=3, reconstruction_loss_weight=1, **options)(RAW)
    assert sorted(decoder.shapes) == sorted(2 * shapes)  # for the estimate and for its target


def test_decoding_is_the_inverse_of_encoding():
    encoder, decoder = Encoder().double(), nn.Linear(6, 3, bias=False).double()
    decoder.weight.data = torch.linalg.pinv(encoder.layer.weight.data)
    model = tiny(dim_latent=6, modality_encoder=encoder, modality_decoder=decoder).double()
    raw = [images(4).double(), images(2).double(), images(4).double()]
    encoded = model.encode([[Modality(0, raw[0]), Modality(0, raw[1])], [Modality(0, raw[2])]])
    decoded = model.decode(encoded)
    for data, latents, (kind, again) in zip(raw, chain(*encoded), chain(*decoded), strict=True):
        assert kind == 0
        torch.testing.assert_close(latents.tensor, encoder(data), **EXACT)
        torch.testing.assert_close(again, data, **EXACT)


def test_channels_may_come_first():
    first, last = (awake(tiny(channel_first_latent=place)) for place in ((True, False), False))
    last.load_state_dict(first.state_dict())
    latents, other = images(2, 4), torch.randn(3, 2)
    expected = last([[tensor([1]), latents, (1, other)]], return_loss=False)
    batch = [[tensor([1]), latents.movedim(-1, 0), (1, other)]]
    torch.testing.assert_close(first(batch, return_loss=False), expected, **EXACT)
    assert last.packer()([[latents]]).num_tokens == first.packer()([[latents.movedim(-1, 0)]]).num_tokens


def test_each_modality_has_its_own_encoder_or_none():
    encoder = Encoder()
    model = tiny(dim_latent=(6, 2), modality_encoder=(encoder, None), modality_decoder=(None, nn.Identity()))
    assert model([[images(4), (1, torch.randn(2))]]).isfinite()
    assert encoder.shapes == [(1, 4, 3)]
    assert [info.encoder for info in map(model.get_modality_info, (0, 1))] == [encoder, None]


def test_an_encoder_under_autocast_gives_latents_of_full_precision():
    model = tiny(dim_latent=6, modality_encoder=Encoder())
    with torch.autocast("cpu", torch.bfloat16):
        assert model(RAW).isfinite()
        assert model._latents(model.packer()(RAW))[0].dtype == torch.float32


@pytest.mark.parametrize("batched", [True, False])
def test_an_encoder_that_works_in_place_leaves_the_data_alone(batched):
    data = -torch.ones(4, 3)
    options = dict(dim_latent=3, modality_encoder_decoder_requires_batch_dim=batched)
    tiny(modality_encoder=nn.ReLU(inplace=True), **options)([[data]])
    assert torch.equal(data, -torch.ones(4, 3))


class Gives(nn.Module):
    """An encoder that gives what it should not."""

    def __init__(self, made):
        super().__init__()
        self.made = made

    def forward(self, x):
        return self.made(x)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda x: x @ torch.ones(2, 3), r"sample 1, part 1: Gives of modality 0 does not take data of shape \(5, 3\)"),
        (lambda x: (x, x), r"^Gives of modality 0 must return a tensor or a distribution of them, got tuple"),
        (
            lambda x: torch.cat((x, x)),
            r"^Gives of modality 0 must return .* each of 1 instances, got shape \(2, 5, 3\)",
        ),
        (lambda x: x.mean(), r"^Gives of modality 0 must return a tensor with a row for each of 1 .* got shape \(\)"),
        (lambda x: x / 0, r"sample 1, part 1, encoded: the tensor contains NaN or infinity"),
        (
            lambda x: x[..., :2],
            r"sample 1, part 1, encoded: modality 0 takes latents of 3 channels, last, got .*5, 2\)",
        ),
    ],
)
def test_an_encoder_that_goes_wrong_is_named_with_the_sample_and_part(made, message):
    model = tiny(dim_latent=3, modality_encoder=Gives(made))
    model.transformer.forward = forbidden
    with pytest.raises((ValueError, TypeError), match=message):
        model([[tensor([1])], [tensor([2]), images(5)]])


# refusals


def forbidden(*args, **options):
    raise AssertionError("something was computed")


IDS, LATENTS = tensor([1, 2]), torch.ones(2, 2, 3)
NAN, INFINITY = LATENTS.clone(), LATENTS.clone()
NAN[0, 1, 2], INFINITY[1, 0, 0] = float("nan"), -float("inf")

MALFORMED_BATCHES = {
    "nothing": (None, TypeError, r"a batch is a list of samples, got NoneType"),
    "string": ("a cat", TypeError, r"a batch is a list of samples, got str"),
    "dict": ({"text": IDS}, TypeError, r"a batch is a list of samples, got dict"),
    "generator": ((s for s in [[IDS]]), TypeError, r"a batch is a list of samples, got generator"),
    "array": (np.ones((2, 3)), TypeError, r"a batch is a list of samples, got ndarray"),
    "empty batch": ([], ValueError, r"the batch is empty"),
    "empty sample": ([[IDS], []], ValueError, r"sample 1 is empty"),
    "empty text": ([[IDS, IDS[:0]]], ValueError, r"sample 0, part 1: the tensor is empty, of shape \(0,\)"),
    "empty latents": ([[LATENTS[:0]]], ValueError, r"sample 0, part 0: the tensor is empty, of shape \(0, 2, 3\)"),
    "string as a part": ([["a cat"]], TypeError, r"sample 0, part 0: expected an integer tensor .* got str"),
    "number as a part": ([[IDS], [IDS, 3]], TypeError, r"sample 1, part 1: expected an integer tensor .* got int"),
    "nothing as a part": ([[None]], TypeError, r"sample 0, part 0: .* got NoneType"),
    "list as a part": ([[[IDS, LATENTS]]], TypeError, r"sample 0, part 0: .* got list"),
    "array as a part": ([[np.ones(3)]], TypeError, r"sample 0, part 0: .* got ndarray"),
    "dict as a sample": ([{"text": IDS}], TypeError, r"sample 0, part 0: .* got dict"),
    "three in a tuple": ([[(0, 1, LATENTS)]], TypeError, r"sample 0, part 0: .* got"),
    "sample in a tuple": ([(IDS, LATENTS)], TypeError, r"sample 0, part 0: .* int"),
    "type without tensor": ([[(0, [1.0, 2.0])]], TypeError, r"sample 0, part 0: .* got"),
    "bools": ([[IDS > 0]], TypeError, r"sample 0, part 0: .* got torch.bool"),
    "bools with a type": ([[(0, LATENTS > 0)]], TypeError, r"sample 0, part 0: .* got torch.bool"),
    "complex": ([[IDS, LATENTS + 1j]], TypeError, r"sample 0, part 1: .* got torch.complex64"),
    "unknown type": ([[IDS, (2, LATENTS)]], ValueError, r"sample 0, part 1: unknown modality type 2, .* has 2"),
    "negative type": ([[(-1, LATENTS)]], ValueError, r"sample 0, part 0: unknown modality type -1"),
    "string as a type": ([[("image", LATENTS)]], TypeError, r"sample 0, part 0: .*\(str, Tensor\)"),
    "bool as a type": ([[(True, LATENTS)]], TypeError, r"sample 0, part 0: .*\(bool, Tensor\)"),
    "float as a type": ([[(1.0, LATENTS)]], TypeError, r"sample 0, part 0: .*\(float, Tensor\)"),
    "text with a type": ([[(0, IDS)]], TypeError, r"sample 0, part 0: modality 0 must be floating point, got .*int64"),
    "wrong channels": ([[IDS, (1, LATENTS)]], ValueError, r"sample 0, part 1: modality 1 takes latents of 2 channels"),
    "channels first": ([[LATENTS.movedim(-1, 0)]], ValueError, r"part 0: .*; set channel_first_latent=True"),
    "too many axes": ([[torch.ones(1, 1, 1, 1, 3)]], ValueError, r"part 0: modality 0 takes latents of 0 to 3 axes"),
    "no axis at all": ([[tensor(1.0)]], ValueError, r"sample 0, part 0: modality 0 takes latents of 0 to 3 axes"),
    "a batch as a text": ([[IDS.expand(3, 2)]], ValueError, r"sample 0, part 0: text is .* got shape \(3, 2\)"),
    "id too high": ([[IDS], [LATENTS, tensor([1, 99])]], ValueError, r"sample 1, part 1: token id 99 is outside .* 9"),
    "id one too high": ([[tensor([1, SOS])]], ValueError, r"sample 0, part 0: token id 10 is outside .* 0 to 9"),
    "id too high in a returned sample": (
        [[tensor([SOS, 1]), tensor([99])]],
        ValueError,
        "sample 0, part 1: token id 99 is outside",
    ),
    "id below zero": ([[tensor(-1)]], ValueError, r"sample 0, part 0: token id -1 is outside the vocabulary"),
    "markers out of place": (
        [[tensor([SOS, 1, CHAR, 2])]],
        ValueError,
        rf"sample 0: markers of a modality stand where there is none, in the text \[1, {CHAR}, 2\]",
    ),
    "not a number": ([[IDS, NAN]], ValueError, r"sample 0, part 1: the tensor contains NaN or infinity"),
    "infinity": ([[IDS], [INFINITY]], ValueError, r"sample 1, part 0: the tensor contains NaN or infinity"),
    "too large": ([[LATENTS.double() * 1e300]], ValueError, r"sample 0, part 0: the tensor contains NaN or infinity"),
    "ids of one axis": (IDS, ValueError, r"a batch of text is \(b, n\), got shape \(2,\)"),
    "ids of three axes": (IDS[None, None], ValueError, r"a batch of text is \(b, n\), got shape \(1, 1, 2\)"),
    "no ids": (IDS[None, :0], ValueError, r"a batch of text is \(b, n\), got shape \(1, 0\)"),
    "ids too high": (IDS[None] + 9, ValueError, r"sample 0, position 0: token id 10 is outside .* 0 to 9"),
    "an id too high in a later row": (
        tensor([[1, 2, 3], [4, 5, 99]]),
        ValueError,
        r"sample 1, position 2: token id 99 is outside the vocabulary, expected 0 to 9",
    ),
    "padding inside a row": (tensor([[1, 2, 3], [1, -1, 2]]), ValueError, r"sample 1, position 1: -1 .* is padding"),
    "batch of bools": (IDS[None] > 0, TypeError, r"a batch of text is an integer tensor \(b, n\), got torch.bool"),
    "complex batch": (LATENTS + 1j, TypeError, r"a batch of text is an integer tensor \(b, n\), got torch.complex64"),
    "one float": (tensor(1.0), ValueError, r"a float batch is \(b, ...\), .* got shape \(\)"),
    "floats of one axis": (torch.ones(3), ValueError, r"a float batch is \(b, ...\), .* got shape \(3,\)"),
    "no floats": (LATENTS[:0], ValueError, r"a float batch is \(b, ...\), .* got shape \(0, 2, 3\)"),
    "floats of wrong channels": (torch.ones(2, 4, 5), ValueError, r"sample 0, part 0: .* 3 channels"),
    "floats with infinity": (torch.stack((LATENTS, INFINITY)), ValueError, r"sample 1, part 0: .* NaN or infinity"),
}


def refuses(model, samples, error, message, **options):
    """That the call fails as said, before anything is computed, and leaves no trace."""
    model.train()
    model.modalities[1].eval()
    modes = [module.training for module in model.modules()]
    kept = copy.deepcopy(samples) if isinstance(samples, list) else samples
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.transformer, "forward", forbidden)
        with pytest.raises(error, match=message):
            model(samples, **options)
    assert [module.training for module in model.modules()] == modes
    assert repr(samples) == repr(kept)
    model([[IDS, LATENTS]]).backward()


@pytest.fixture(scope="module")
def strict():
    return tiny()


@pytest.mark.parametrize("case", MALFORMED_BATCHES)
def test_a_malformed_batch_is_refused(strict, case):
    refuses(strict, *MALFORMED_BATCHES[case])


@pytest.mark.parametrize("return_loss", [True, False])
def test_a_refusal_does_not_depend_on_what_is_wanted(strict, return_loss):
    refuses(strict, [[tensor([99])]], ValueError, r"token id 99", return_loss=return_loss)


OPTIONS = [[IDS, LATENTS, (1, torch.ones(2))], [IDS]]
MALFORMED_OPTIONS = {
    "times of another batch": (dict(times=torch.rand(3)), ValueError, r"times must be .* got \(3,\)"),
    "too few times": (dict(times=torch.rand(2, 1)), ValueError, r"times must be .*\(2, 2\).* got \(2, 1\)"),
    "times of three axes": (dict(times=torch.rand(2, 2, 1)), ValueError, r"times must be .* got \(2, 2, 1\)"),
    "time below zero": (dict(times=-0.1), ValueError, r"times must lie between 0"),
    "time above one": (dict(times=tensor([0.5, 2.0])), ValueError, r"times must lie between 0"),
    "time not a number": (dict(times=float("nan")), ValueError, r"times must lie between 0"),
    "string as a time": (dict(times="late"), TypeError, r"times must be a number or a tensor of them, got str"),
    "ragged times": (dict(times=[[0.1, 0.2], [0.3]]), TypeError, r"times must be a number or a tensor of them"),
    "bool as times": (dict(times=tensor(True)), TypeError, r"times must be real numbers, got torch.bool"),
    "two sources of times": (
        dict(times=0.5, num_modalities_to_times_fn=lambda counts: counts),
        ValueError,
        r"give times or num_modalities_to_times_fn, not both",
    ),
    "function without times": (
        dict(num_modalities_to_times_fn=lambda counts: None),
        TypeError,
        r"times must be a number",
    ),
    "function with too few": (
        dict(num_modalities_to_times_fn=lambda counts: torch.rand(2, 1)),
        ValueError,
        r"times must be .* got \(2, 1\)",
    ),
    "no function": (dict(num_modalities_to_times_fn=0.5), TypeError, r"num_modalities_to_times_fn must be a function"),
    "probability": (dict(prob_uncond=1.5), ValueError, r"prob_uncond is a probability, got 1.5"),
    "no teacher": (dict(velocity_consistency_ema_model="ema"), TypeError, r"must be an EMA of this model, got str"),
    "other module": (dict(velocity_consistency_ema_model=nn.Linear(1, 1)), TypeError, r"EMA of this model, got Linear"),
    "type for a list": (dict(modality_type=0), TypeError, r"modality_type goes with a float batch .* got list"),
    "string as a type": (dict(modality_type="image"), TypeError, r"modality_type must be an int, got str"),
}


@pytest.mark.parametrize("case", MALFORMED_OPTIONS)
def test_a_malformed_option_is_refused(strict, case):
    options, error, message = MALFORMED_OPTIONS[case]
    refuses(strict, OPTIONS, error, message, **options)


@pytest.mark.parametrize("name", ["prob_uncond", "velocity_consistency_delta_time"])
@no_typecheck
def test_what_is_no_number_is_refused(strict, name):
    options = {name: "a", "velocity_consistency_ema_model": strict}
    refuses(strict, OPTIONS, TypeError, rf"{name} must be a number, got 'a'", **options)


@pytest.mark.parametrize("ahead", [0.0, 1.0, -0.1])
def test_a_teacher_stands_ahead(strict, ahead):
    options = dict(velocity_consistency_ema_model=strict, velocity_consistency_delta_time=ahead)
    refuses(strict, OPTIONS, ValueError, r"velocity_consistency_delta_time must lie between 0 and 1", **options)


@pytest.mark.parametrize(
    ("batch", "kind", "error", "message"),
    [
        (IDS[None], 0, TypeError, r"modality_type goes with a float batch .* got torch.int64"),
        (LATENTS[None], 2, ValueError, r"sample 0.*: unknown modality type 2, this model has 2"),
        (LATENTS[None], -1, ValueError, r"unknown modality type -1"),
        (LATENTS[None], True, TypeError, r"modality_type must be an int, got bool"),
        (LATENTS[None], 0.0, TypeError, r"modality_type must be an int, got float"),
        (LATENTS[None], 1, ValueError, r"sample 0, part 0: modality 1 takes latents of 2 channels"),
    ],
)
def test_a_type_must_fit_its_batch(strict, batch, kind, error, message):
    refuses(strict, batch, error, message, modality_type=kind)


@pytest.mark.parametrize(
    ("num_dim", "latents", "message"),
    [
        (2, torch.ones(4, 3), r"takes latents of 2 axes and one of channels, got shape \(4, 3\)"),
        (
            2,
            torch.ones(1, 4, 4, 3),
            r"takes latents of 2 axes .* got shape \(1, 4, 4, 3\); a batch is a list of samples, without a batch axis",
        ),
        (0, torch.ones(1, 3), r"takes latents of 0 axes"),
    ],
)
def test_the_number_of_axes_is_held_to(num_dim, latents, message):
    model = tiny(modality_num_dim=(num_dim, None))
    batch = [[IDS], [IDS, latents]]
    model.transformer.forward = forbidden
    with pytest.raises(ValueError, match=rf"sample 1, part 1: modality 0 {message}"):
        model(batch)


def test_after_a_refusal_the_next_batch_counts_as_if_nothing_had_been():
    losses = []
    for malformed in (None, [[IDS, NAN]]):
        torch.manual_seed(0)
        model = tiny()
        if malformed is not None:
            with pytest.raises(ValueError, match="NaN"):
                model(malformed)
        torch.manual_seed(1)
        losses.append(model(OPTIONS))
    assert losses[0] == losses[1]
