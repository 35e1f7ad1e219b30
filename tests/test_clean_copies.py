"""Images that are learned on noised copies and seen clean by what follows, against a sample for each of them."""

import pytest
import torch
from tiny import CHANNELS, awake, tiny
from torch import randn, tensor

from transfusion_pytorch import Condition, WithCleanCopy

TRUNKS = {
    "ragged": dict(),
    "dense": dict(attention="dense"),
    "softcap": dict(attn_kwargs=dict(softcap_value=5.0)),
    "shared keys": dict(heads=4, kv_heads=2),
    "shared keys, dense": dict(heads=4, kv_heads=2, attention="dense"),
    "untied experts": dict(untied=True),
    "checkpointing": dict(use_checkpoint=True),
    "selective checkpointing": dict(use_checkpoint="selective"),
    "value residuals, laser": dict(use_value_residual=True, attn_laser=True, num_residual_streams=2),
}
MODELS = {
    "times as tokens": dict(time_conditioning="token", trunk=dict(norm="rms")),
    "times added": dict(time_conditioning="added", trunk=dict(norm="rms")),
    "clean latents": dict(model_output_clean=True),
    "axial positions": dict(modality_num_dim=(2, 1), add_pos_emb=True),
}


def build(trunk=None, **options):
    attention = (trunk or {}).pop("attention", None) if trunk else None
    model = awake(tiny(trunk=trunk, **options))
    if attention:
        model.transformer.attention = attention
    return model


def samples(seed=3):
    """Parts without marks: images of several sizes and types between texts, beside each other, and none at all."""
    torch.manual_seed(seed)
    return [
        [tensor([1, 2]), randn(2, 2, 3), tensor([4]), (1, randn(3, 2)), randn(1, 3, 3), tensor([5, 6])],
        [tensor([9, 0, 1])],
        [Condition(randn(2, 2, 3)), Condition(tensor([3])), randn(2, 3, 3), tensor([7]), Condition((1, randn(1, 2)))],
        [randn(3, 1, 3), tensor([8]), randn(2, 2, 3)],
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


def latents_of(batch):
    """The flat latents of each type, and those of them that are learned, in the order of the batch."""
    found = {kind: ([], []) for kind in range(len(CHANNELS))}
    for sample in batch:
        for part in sample:
            kind, tensor = kind_and_tensor(part)
            if tensor.is_floating_point():
                found[kind][0].append(tensor.flatten(0, -2))
                found[kind][1].extend([tensor.flatten(0, -2)] if is_learned_modality(part) else [])
    return found


def noise_of(latents):
    """Noise that an instance keeps wherever it stands."""
    return torch.cos(7 * latents)


def by_definition(model, batch, times, **options):
    """A sample for each learned modality, behind conditions, and the text of each sample at t = 1: the sum of the
    weighted losses, and flow losses by type.
    """
    _, parts = model(batch, times=1.0, return_breakdown=True, **options)
    flow, count = [0.0] * len(CHANNELS), [0] * len(CHANNELS)
    for row, sample in zip(times, batch, strict=True):
        place = 0
        for i, part in enumerate(sample):
            kind, tensor = kind_and_tensor(part)
            if not tensor.is_floating_point():
                continue
            if is_learned_modality(part):
                alone = [[*map(as_condition, sample[:i]), part]]
                noise = {
                    kind: torch.cat([noise_of(each) for each in clean])
                    for kind, (clean, _) in latents_of(alone).items()
                    if clean
                }
                _, of_one = model(alone, times=row[: place + 1][None], noise=noise, return_breakdown=True, **options)
                flow[kind] = flow[kind] + of_one.flow[kind] * tensor.numel()
                count[kind] += tensor.numel()
            place += 1
    flow = torch.stack([total / number for total, number in zip(flow, count, strict=True)])
    return parts.text + flow.sum(), parts.text, flow


def in_one_pass(model, batch, times, **options):
    noise = {
        kind: noise_of(torch.cat([*clean, *learned])) for kind, (clean, learned) in latents_of(batch).items() if clean
    }
    loss, parts = model(marked(batch), times=times, noise=noise, return_breakdown=True, **options)
    return loss, parts.text, parts.flow


def times_for(batch):
    most = max(sum(kind_and_tensor(part)[1].is_floating_point() for part in sample) for sample in batch)
    return torch.linspace(0.05, 0.9, len(batch) * most, dtype=torch.float64).view(len(batch), most)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def check(model, batch, **options):
    """Losses and gradients of all parameters."""
    batch = [[_double(part) for part in sample] for sample in batch]
    times = times_for(batch)
    made, expected = in_one_pass(model, batch, times, **options), by_definition(model, batch, times, **options)
    torch.testing.assert_close(made, expected, rtol=1e-10, atol=1e-10)
    ours, theirs = gradients(model, made[0]), gradients(model, expected[0])
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        ours_or_zero = torch.zeros(()) if ours[name] is None else ours[name]
        if gradient is None:
            assert not ours_or_zero.any(), name
            continue
        torch.testing.assert_close(ours[name], gradient, rtol=1e-9, atol=1e-10, msg=name)


def _double(part):
    if isinstance(part, Condition):
        return Condition(_double(part.part))
    if isinstance(part, tuple):
        return part[0], part[1].double()
    return part.double() if part.is_floating_point() else part


@pytest.mark.parametrize("trunk", TRUNKS.values(), ids=TRUNKS)
def test_one_pass_is_a_sample_for_each_image(trunk):
    check(build(dict(trunk)), samples())


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_one_pass_is_a_sample_for_each_image_in_any_model(options):
    check(build(**options), samples())
