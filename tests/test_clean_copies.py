"""Images that are learned on noised copies and seen clean by what follows, against a sample for each of them."""

import copy

import pytest
import torch
from checks import compiles
from tiny import CHANNELS, Spy, awake, tiny
from torch import nn, randn, tensor
from torch.utils.data import DataLoader

from transfusion_pytorch import (
    Condition,
    SelfMaskedRepTraining,
    TrainConfig,
    Trainer,
    UNetDown,
    UNetUp,
    WithCleanCopy,
)
from transfusion_pytorch.training.flops import FlopCounter
from transfusion_pytorch.training.representation import masked

EXACT = dict(rtol=1e-9, atol=1e-10)
TRUNKS = {
    "ragged": dict(),
    "dense": dict(attention="dense"),
    "softcap": dict(attn_kwargs=dict(softcap_value=5.0)),
    "shared keys": dict(heads=4, kv_heads=2),
    "shared keys, dense": dict(heads=4, kv_heads=2, attention="dense"),
    "untied experts": dict(untied=True),
    "checkpointing": dict(use_checkpoint=True),
    "selective checkpointing": dict(use_checkpoint="selective"),
    "value residuals, laser, streams": dict(use_value_residual=True, attn_laser=True, num_residual_streams=2),
}


def halves():
    """U-Net halves of modality 0, which has two axes."""
    options = dict(dim_latent=3, dim=16, dim_hidden=4)
    return UNetDown(**options), UNetUp(**options)


MODELS = {
    "times as tokens": lambda: dict(time_conditioning="token", trunk=dict(norm="rms")),
    "times added": lambda: dict(time_conditioning="added", trunk=dict(norm="rms")),
    "times at the output": lambda: dict(time_conditioning="output", trunk=dict(norm="rms")),
    "clean latents": lambda: dict(model_output_clean=True),
    "axial positions": lambda: dict(modality_num_dim=(2, 1), add_pos_emb=True),
    "U-Net": lambda: dict(modality_num_dim=(2, 1), pre_post_transformer_enc_dec=(halves(), None)),
    "reconstruction": lambda: dict(modality_decoder=(nn.Linear(3, 5), None), reconstruction_loss_weight=(0.7, 0.0)),
}


def build(trunk=None, **options):
    trunk = dict(trunk or {})
    attention = trunk.pop("attention", "auto")
    model = awake(tiny(trunk=trunk, **options))
    model.transformer.attention = attention
    return model


def samples():
    """Without marks: modalities of several sizes and types between texts, side by side, first, read, and none."""
    torch.manual_seed(3)
    latents = lambda *shape: randn(*shape, dtype=torch.float64)  # noqa: E731
    return [
        [tensor([1, 2]), latents(2, 2, 3), tensor([4]), (1, latents(3, 2)), latents(1, 3, 3), tensor([5, 6])],
        [tensor([9, 0, 1])],
        [
            Condition(latents(2, 2, 3)),
            Condition(tensor([3])),
            latents(2, 3, 3),
            tensor([7]),
            Condition((1, latents(1, 2))),
        ],
        [latents(3, 1, 3), tensor([8]), latents(2, 2, 3)],
    ]


def is_learned_modality(part):
    return not isinstance(part, Condition) and (isinstance(part, tuple) or part.is_floating_point())


def marked(batch):
    return [[WithCleanCopy(part) if is_learned_modality(part) else part for part in sample] for sample in batch]


def as_condition(part):
    return part if isinstance(part, Condition) else Condition(part)


def kind_and_tensor(part):
    part = part.part if isinstance(part, Condition) else part
    return part if isinstance(part, tuple) else (0, part)


def noise_for(batch, has_copies=False):
    """Noise that an instance keeps wherever it stands, by type, in the order of the batch."""
    found = {}
    for only_learned in (False, True) if has_copies else (False,):
        for sample in batch:
            for part in sample:
                kind, x = kind_and_tensor(part)
                if x.is_floating_point() and (is_learned_modality(part) or not only_learned):
                    found.setdefault(kind, []).append(torch.cos(7 * x.flatten(0, -2)))
    return {kind: torch.cat(parts) for kind, parts in found.items()}


def by_definition(model, batch, times, **options):
    """A sample for each learned modality, with conditions before it and nothing behind; and the text of all samples, at
    t = 1. The parts of their losses, each a mean over what it is about.
    """
    _, of_text = model(batch, times=1.0, return_breakdown=True, **options)
    sums = {name: torch.zeros(len(CHANNELS), dtype=torch.float64) for name in ("flow", "velocity", "recon")}
    count = torch.zeros(len(CHANNELS))
    for row, sample in zip(times, batch, strict=True):
        place = 0
        for i, part in enumerate(sample):
            kind, x = kind_and_tensor(part)
            if x.is_floating_point() and is_learned_modality(part):
                alone = [[*map(as_condition, sample[:i]), part]]
                options |= dict(times=row[None, : place + 1], noise=noise_for(alone), return_breakdown=True)
                _, parts = model(alone, **options)
                sums = {name: total + getattr(parts, name) * x.numel() for name, total in sums.items()}
                count[kind] += x.numel()
            place += x.is_floating_point()
    means = {name: total / count for name, total in sums.items()}
    weighted = [mean @ mean.new_tensor(getattr(model.loss_weights, name)) for name, mean in means.items()]
    total = of_text.text + sum(weighted)
    return dict(total=total, text=of_text.text, **means)


def in_one_pass(model, batch, times, **options):
    options |= dict(times=times, noise=noise_for(batch, has_copies=True), return_breakdown=True)
    return model(marked(batch), **options)[1]._asdict()


def times_for(batch):
    most = max(sum(kind_and_tensor(part)[1].is_floating_point() for part in sample) for sample in batch)
    return torch.linspace(0.05, 0.9, len(batch) * most, dtype=torch.float64).view(len(batch), most)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
    }


def check(model, **options):
    """Losses, and gradients of all parameters."""
    batch = samples()
    made, expected = (each(model, batch, times_for(batch), **options) for each in (in_one_pass, by_definition))
    torch.testing.assert_close(made, expected, **EXACT)
    torch.testing.assert_close(*(gradients(model, each["total"]) for each in (made, expected)), **EXACT)


# one pass, and a sample for each image


@pytest.mark.parametrize("trunk", TRUNKS.values(), ids=TRUNKS)
def test_one_pass_is_a_sample_for_each_image(trunk):
    check(build(trunk))


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_one_pass_is_a_sample_for_each_image_in_any_model(options):
    check(build(**options()))


def test_the_consistency_loss_is_that_of_a_sample_for_each_image():
    model = build()
    teacher = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(0.9)
    check(model, velocity_consistency_ema_model=teacher, velocity_consistency_delta_time=0.01)


def test_without_marks_later_parts_see_noise():
    """So that the equalities above say something."""
    model, batch = build(), samples()
    parts = model(batch, times=times_for(batch), noise=noise_for(batch), return_breakdown=True)[1]
    made = in_one_pass(model, batch, times_for(batch))
    assert (parts.text - made["text"]).abs() > 1e-6
    assert (parts.flow - made["flow"]).abs().min() > 1e-6


def test_only_the_copy_itself_depends_on_its_noise():
    """By gradients: of every output with respect to the latents that are noised, in a layer that mixes everything."""
    model = build(dict(depth=1))
    batch = model.packer()(marked(samples()))
    seen, mask = [], batch.stream.layout.prepare().intervals.dense()
    model.transformer.register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    model(batch, times=0.5)
    [(x, out)] = seen
    direction = randn(out.shape[1], dtype=out.dtype)
    for q in range(len(out)):
        (slope,) = torch.autograd.grad((out[q] * direction).sum(), x, retain_graph=True)
        assert torch.equal(slope.ne(0).any(1), mask[q]), q


@pytest.mark.parametrize("kind", ["ragged", "dense"])
def test_packed_is_one_by_one_and_padded(kind):
    model, batch = build(dict(attention=kind)), samples()
    times = times_for(batch)
    together = [
        model(
            model.packer(token_budget=budget)(marked(batch), times=times),
            noise=noise_for(batch, True),
            reduction="none",
        )
        for budget in (None, 256)
    ]
    for i, sample in enumerate(batch):
        noise = noise_for([sample], True) or None
        alone = model(marked([sample]), times=times[i : i + 1], noise=noise, reduction="none")
        for each in together:
            torch.testing.assert_close([part[i] for part in each], [part[0] for part in alone], **EXACT)


# targets, counts and logits


def test_counts_are_those_of_the_losses():
    model, batch = build(), marked(samples())
    plain = model.count_targets(samples())
    assert torch.equal(model.count_targets(batch).as_tensor(), plain.as_tensor())
    counts = sum(model.count_targets([sample]) for sample in batch)
    options = dict(times=0.5, counts=counts)
    whole = model(batch, noise=noise_for(samples(), True), **options)
    parts = [
        model([one], noise=noise_for([sample], True) or None, **options)
        for one, sample in zip(batch, samples(), strict=True)
    ]
    torch.testing.assert_close(sum(parts), whole, **EXACT)


def test_losses_of_spans_are_those_of_the_copies():
    model, batch = build(), marked(samples())
    losses = model(batch, times=0.5, reduction="span")
    is_copy = model.packer()(batch).stream.spans.is_learned
    assert losses.flow[~is_copy].eq(0).all()
    assert losses.flow[is_copy].gt(0).all()
    assert (losses.time == torch.where(is_copy, 0.5, 1.0)).all()


def test_logits_are_those_of_the_samples_alone():
    model = build()
    for times in (None, 0.3):
        made = model(marked(samples()), times=times, return_loss=False)
        torch.testing.assert_close(made, model(samples(), return_loss=False), **EXACT)
    batch = model.packer(token_budget=256)(marked(samples()))
    torch.testing.assert_close(model(batch, return_loss=False), made, **EXACT)


def test_numbers_of_modalities_do_not_count_copies():
    seen, model = [], build()
    times_fn = lambda numbers: seen.append(numbers.tolist()) or torch.full((4, 3), 0.5)  # noqa: E731
    for batch in (samples(), marked(samples())):
        model(batch, num_modalities_to_times_fn=times_fn)
    assert seen == [[3, 0, 3, 2]] * 2


@pytest.mark.parametrize("is_marked", [False, True])
def test_null_text_is_that_before_the_last_drawn_image(is_marked):
    model = build(prob_uncond=1.0).train()
    spy = Spy(model.text_embedding)
    parts = [tensor([1, 2]), randn(2, 2, 3), tensor([3]), randn(1, 3, 3), tensor([5, 6])]
    batch = [parts, parts[:1]]
    _, losses = model(marked(batch) if is_marked else batch, return_breakdown=True)
    (tokens,), null = spy.inputs, model.vocabulary.null
    kept = [token for token in tokens.tolist() if token < 10 or token == null]
    assert [token for token in kept if token] == [null] * 3 + [5, 6, 1, 2]
    assert losses.text.isfinite()


def test_an_image_is_encoded_once():
    encoder = nn.Linear(5, 3)
    model = awake(tiny(modality_encoder=(encoder, None)))
    spy = Spy(encoder)
    images = [randn(2, 2, 5), randn(2, 2, 5)]
    model(
        [[tensor([1]), WithCleanCopy(images[0]), WithCleanCopy((1, randn(3, 2))), WithCleanCopy(images[1])]]
    ).backward()
    assert [len(x) for x in spy.inputs] == [2]


# everything else that takes a batch


def test_data_workers_pack_copies():
    model = build()
    pack, batch = model.packer(token_budget=256), marked(samples())
    expected = model(batch, times=0.5, noise=noise_for(samples(), True))
    for workers in (0, 1):
        for packed in DataLoader(batch, batch_size=4, collate_fn=pack, num_workers=workers):
            made = model(packed, times=0.5, noise=noise_for(samples(), True))
            torch.testing.assert_close(made, expected, **EXACT)


def test_a_run_is_the_same_in_other_batches_and_with_workers(tmp_path):
    """Times and noise of a copy depend on its sample alone: a step is one batch, or two, packed anywhere."""
    batch, made = [[_single(part) for part in sample] for sample in marked(samples())], []
    for i, options in enumerate((dict(), dict(accumulation=2, num_workers=1))):
        model = tiny()
        model.load_state_dict(made[0][0] if made else model.state_dict())
        before = copy.deepcopy(model.state_dict())
        config = TrainConfig(
            steps=3, batch_size=4, velocity_consistency=True, ema_every=1, ema_start=0, device="cpu", **options
        )
        Trainer(model, batch, config, folder=tmp_path / str(i)).fit()
        made.append((before, model.state_dict()))
    (before, one), (_, other) = made
    torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-5)
    assert any((one[name] - before[name]).abs().max() > 1e-3 for name in one)


def _single(part):
    if isinstance(part, (Condition, WithCleanCopy)):
        return type(part)(_single(part.part))
    return (part[0], part[1].float()) if isinstance(part, tuple) else part


def test_copies_take_part_in_budgets():
    model = build()
    sample = marked(samples())[0]
    size = model.packer().num_tokens(sample)
    assert size == model.packer().num_tokens(samples()[0]) + 4 + 3 + 3
    assert model.packer(token_budget=size)([sample]).stream.num_padding == 0
    with pytest.raises(ValueError, match=f"the batch has {size} tokens, more than the token budget of {size - 1}"):
        model.packer(token_budget=size - 1)([sample])
    with pytest.raises(ValueError, match="the batch has 6 modalities, more than the span budget of 5"):
        model.packer(token_budget=256, span_budget=5)([sample])


def test_operations_are_counted_with_the_keys_that_are_seen():
    model = build()
    packed = model.packer()(marked(samples()))
    count = FlopCounter(model)
    visible = packed.stream.layout.prepare().intervals.dense().sum()
    assert count(packed).attention == 12 * count.width * visible


@pytest.mark.parametrize("kind", ["auto", "flex", "dense"])
def test_nothing_is_read_from_the_device(kind):
    model = tiny(trunk=dict(untied=True))
    batches = [model.packer(token_budget=budget)(marked(samples())) for budget in (None, 256)]
    model.to("meta").transformer.attention = kind
    for batch in batches:
        model(batch).backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_only_copies_are_masked_for_the_representation_loss():
    model = SelfMaskedRepTraining(build(), student_dropout_rate=0.9)
    batch = model.student.packer()(marked(samples()))
    x = model.student._latents(batch)
    (seen,) = masked(x, batch, [0.9], None)
    for kind, placement in batch.stream.placements.items():
        is_copy = batch.stream.spans.is_learned[placement.span_of_latent]
        assert torch.equal(seen[kind][~is_copy], x[kind][~is_copy])
        assert seen[kind][is_copy].eq(0).any()
    loss, parts = model.train()(marked(samples()))
    loss.backward()
    assert parts.representation > 0


def plain_and_compiled(attention, *, backend):
    """Two models of the same weights, in single precision."""
    torch.compiler.reset()
    plain = build().float()
    compiled = copy.deepcopy(plain)
    compiled.transformer.attention = attention
    compiled.compile(backend=backend)
    return plain, compiled


@compiles
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be instantiated")
def test_one_graph_serves_all_padded_batches_with_copies():
    plain, compiled = plain_and_compiled("dense", backend="aot_eager")
    batches = [marked(samples()), marked(samples()[::-1]), marked(samples()[2:])]
    for i, batch in enumerate(batches):
        packed = plain.packer(token_budget=192, span_budget=20)(batch, times=0.5)
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            torch.manual_seed(1)
            made = compiled(packed)
            ours = gradients(compiled, made)
        torch.manual_seed(1)
        expected = plain(packed)
        torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours, gradients(plain, expected), rtol=1e-3, atol=1e-4)


@compiles
@torch.no_grad()
def test_flex_attention_in_a_graph():
    plain, compiled = plain_and_compiled("flex", backend="eager")
    torch.testing.assert_close(
        *(
            model(marked(samples()), times=0.5, noise={k: x.float() for k, x in noise_for(samples(), True).items()})
            for model in (compiled, plain)
        ),
        rtol=1e-5,
        atol=1e-5,
    )


def test_a_prompt_reads_it_as_a_plain_part():
    model = tiny(modality_default_shape=((2, 2), (3,)))
    prompt = [tensor([1, 2]), randn(2, 2, 3), tensor([3])]
    options = dict(max_length=24, text_temperature=0.0)
    made = [model.sample(given, **options) for given in (prompt, [prompt[0], WithCleanCopy(prompt[1]), prompt[2]])]
    assert torch.equal(made[0][-1], made[1][-1])


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (
            WithCleanCopy(tensor([1])),
            "sample 0, part 1: WithCleanCopy is for modalities, got text, which is never noised",
        ),
        (WithCleanCopy(Condition(randn(2, 3))), "sample 0, part 1: a WithCleanCopy holds one part, got a Condition"),
        (Condition(WithCleanCopy(randn(2, 3))), "sample 0, part 1: a Condition holds one part, got a WithCleanCopy"),
        (WithCleanCopy("image"), "sample 0, part 1: expected an integer tensor .*, got str"),
    ],
)
def test_what_cannot_have_a_clean_copy_is_named(part, message):
    with pytest.raises(TypeError, match=message):
        tiny()([[tensor([2]), part]])


def test_a_trained_encoder_is_refused_as_ever():
    with pytest.raises(ValueError, match="sample 0, part 0: modality 0 has a flow loss and requires gradients"):
        tiny()([[WithCleanCopy(randn(2, 3, requires_grad=True)), tensor([1])]])
