"""Bad input is refused before anything is computed, with a message that says what was expected and what came."""

import pytest
import torch
from generation_models import GREEDY, IMAGE, LINE, VECTOR, assert_same, build, latents, noise, text
from torch import nn

from transfusion_pytorch import Latents

NAN, INFINITY = float("nan"), float("inf")
META, SOM, EOM, FOUR, COMMA = 6, (7, 8, 9, 10), (11, 12, 13, 14), 19, 25  # ids of `build`

PROMPTS = {
    "a string": ("hello", TypeError, "prompt 0, part 0: expected an integer tensor .* got str"),
    "a number": ([text(1), 3], TypeError, "prompt 0, part 1: expected an integer tensor .* got int"),
    "a type that is unknown": (
        (9, torch.ones(3)),
        ValueError,
        r"prompt 0, part 0: unknown modality type 9.* 4 \(from 0\)",
    ),
    "a type below 0": ((-1, torch.ones(3)), ValueError, "unknown modality type -1"),
    "a type that is a word": (("image", torch.ones(3)), TypeError, "prompt 0, part 0: .*int"),
    "a modality of ints": (
        [text(1), (LINE, text(1, 2))],
        TypeError,
        "prompt 0, part 1: modality 1 must be floating point",
    ),
    "a bool tensor": (torch.tensor([True]), TypeError, "prompt 0, part 0: .* got torch.bool"),
    "a complex tensor": (torch.ones(2, dtype=torch.complex64), TypeError, "got torch.complex64"),
    "an empty text": (
        [text(1), torch.tensor([], dtype=torch.long)],
        ValueError,
        "prompt 0, part 1: the tensor is empty",
    ),
    "a batch of texts": (torch.ones(2, 2, dtype=torch.long), ValueError, r"prompt 0, part 0: text is \(n,\), \(1, n\)"),
    "an id beyond the vocabulary": ([text(1), text(2, 99)], ValueError, "prompt 0, part 1: token id 99 .* 0 to 25"),
    "the id of null": (text(26), ValueError, "token id 26"),
    "an id below 0": (text(-1), ValueError, "token id -1"),
    "channels of another modality": (
        (LINE, torch.ones(4, 2)),
        ValueError,
        r"prompt 0, part 0: .* 3 channels.*\(4, 2\)",
    ),
    "too many axes": ((IMAGE, torch.ones(1, 2, 2, 1)), ValueError, "modality 2 takes latents of 2 axes"),
    "no axis at all": (torch.tensor(1.0), ValueError, r"modality 0 takes latents of 0 axes .* got shape \(\)"),
    "NaN": (
        [text(1), text(2), (LINE, torch.tensor([[0, NAN, 0]]))],
        ValueError,
        "prompt 0, part 2: .* NaN or infinity",
    ),
    "infinity": ([text(4), (VECTOR, torch.tensor([INFINITY, 0]))], ValueError, "prompt 0, part 1: .* NaN or infinity"),
    "a closing of nothing": (
        text(1, EOM[0], 2),
        ValueError,
        "prompt 0: markers of a modality stand where there is none",
    ),
    "a closing of another type": ([latents(IMAGE, 1, 1), text(EOM[1])], ValueError, "prompt 0: markers"),
    "no meta before a shape": (text(1, FOUR), ValueError, "prompt 0: markers"),
    "an opening of another shape": (
        text(1, META, FOUR, SOM[2]),
        ValueError,
        "prompt 0: the markers at its end.* do not open",
    ),
    "an opening that is no shape": (text(META, COMMA), ValueError, "prompt 0: the markers at its end"),
    "an opening that is too large": (text(META, FOUR, FOUR), ValueError, "at most max_modality_tokens=6 latents"),
}

OPTIONS = {
    "modality_steps": {0: ValueError, -2: ValueError, 2.0: TypeError, True: TypeError, "3": TypeError, None: TypeError},
    "max_length": {0: ValueError, -1: ValueError, 10.0: TypeError, None: TypeError},
    "max_modality_tokens": {0: ValueError, 1e3: TypeError},
    "cfg_scale": {INFINITY: ValueError, NAN: ValueError, "3": TypeError, True: TypeError},
    "text_temperature": {-0.1: ValueError, NAN: ValueError, INFINITY: ValueError, None: TypeError},
    "text_min_p": {-0.1: ValueError, 1.1: ValueError, NAN: ValueError, "0.1": TypeError},
    "fixed_modality_shape": {
        0: ValueError,
        (0,): ValueError,
        (2, -1): ValueError,
        (1.5,): ValueError,
        "4,4": ValueError,
        (1, 1, 1, 1): ValueError,
    },
    "force_modality_at_start": {
        4: ValueError,
        -1: ValueError,
        "image": TypeError,
        True: TypeError,
        0.5: TypeError,
        (IMAGE, (2, 2), 1): TypeError,
        (IMAGE, (2, 0)): ValueError,
        (IMAGE, 4): ValueError,
        (9, (2, 2)): ValueError,
    },
    "odeint_kwargs": {"midpoint": TypeError, 3: TypeError},
}


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture
def idle(model, monkeypatch):
    """A model that must not be run."""
    monkeypatch.setattr(model, "forward_stream", lambda *args, **options: pytest.fail("something was computed"))
    return model


@pytest.mark.parametrize("name", PROMPTS)
def test_prompt_is_refused(idle, name):
    prompt, error, message = PROMPTS[name]
    with pytest.raises(error, match=message):
        idle.sample(prompt, **GREEDY)
    with pytest.raises(error, match=message.replace("prompt 0", "prompt 1")):
        idle.sample_many([text(1), prompt, None], **GREEDY)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in OPTIONS.items() for value in values])
def test_option_is_refused(idle, name, value):
    with pytest.raises(OPTIONS[name][value], match=name):
        idle.sample(text(1), **GREEDY | {name: value})


@pytest.mark.parametrize(
    ("noise", "message"),
    [
        (torch.randn(4), r"a float tensor \(n, d\).* got torch.float32 \(4,\)"),
        (torch.ones(4, 3, dtype=torch.long), r"a float tensor \(n, d\).* got torch.int64 \(4, 3\)"),
        ([[0.0]], r"a float tensor \(n, d\).* got list"),
        (torch.full((4, 3), NAN), "NaN or infinity"),
        (torch.randn(2, 3), r"needs 3 rows and 3 channels for shape \(3,\) of modality 1, got \(2, 3\)"),
        (torch.randn(4, 2), r"needs 3 rows and 3 channels for shape \(3,\) of modality 1, got \(4, 2\)"),
    ],
)
def test_noise_is_refused(idle, noise, message):
    with pytest.raises(ValueError, match=message):
        idle.sample(text(1), init_modality_noise=noise, force_modality_at_start=(LINE, (3,)), **GREEDY)
    with pytest.raises(ValueError, match=message):
        idle.generate_modality_only(modality_type=LINE, fixed_modality_shape=(3,), init_modality_noise=noise)


@pytest.mark.parametrize("method", ["heun", "Euler", 3])
def test_unknown_solver_is_refused(idle, method):
    with pytest.raises(ValueError, match=r"unknown ODE method .* choose one of"):
        idle.sample(text(1), odeint_kwargs=dict(method=method), **GREEDY)


@pytest.mark.parametrize("prompts", [None, 3, "hello", text(1, 2), dict(), (prompt for prompt in [None])])
def test_prompts_are_a_list(idle, prompts):
    with pytest.raises(TypeError, match=f"prompts must be a list of prompts, got {type(prompts).__name__}"):
        idle.sample_many(prompts)


def test_there_must_be_a_prompt(idle):
    with pytest.raises(ValueError, match=r"there are no prompts; for a sample from nothing give \[None\]"):
        idle.sample_many([])


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        (
            None,
            dict(fixed_modality_shape=(3,), force_modality_at_start=(LINE, (2,))),
            r"shape \(2,\) is asked for, and fixed_modality_shape is \(3,\)",
        ),
        (
            None,
            dict(fixed_modality_shape=(3,), force_modality_at_start=IMAGE),
            r"modality 2 cannot have the shape \(3,\)",
        ),
        (text(META, FOUR), dict(fixed_modality_shape=(3,)), r"which is fixed_modality_shape=\(3,\)"),
        (
            None,
            dict(force_modality_at_start=LINE),
            r"modality 1 has no default shape.*fixed_modality_shape.*default_shape",
        ),
        (
            None,
            dict(fixed_modality_shape=(1, 1, 1, 1)),
            r"fixed_modality_shape must be a tuple of 0 to 3 positive ints.* got \(1, 1, 1, 1\)",
        ),
    ],
)
def test_what_contradicts_itself_is_refused(idle, prompt, options, message):
    with pytest.raises(ValueError, match=message):
        idle.sample(prompt, **GREEDY, **options)


class EvenOnly(nn.Module):
    def __init__(self, dim_in: int, dim_out: int):
        super().__init__()
        self.project = nn.Linear(dim_in, dim_out)

    def forward(self, x):
        if x.shape[1] % 2:
            raise RuntimeError("an even number, please")
        return self.project(x)


def test_shape_that_the_modules_around_do_not_take_is_refused():
    pair = (EvenOnly(3, 8), EvenOnly(8, 3))
    model = build(dim_latent=3, modality_num_dim=1, pre_post_transformer_enc_dec=pair)
    with pytest.raises(ValueError, match=r"fixed_modality_shape \(3,\): no modality of this model can have that shape"):
        model.sample(fixed_modality_shape=(3,))
    with pytest.raises(ValueError, match=r"the shape \(3,\): the modules around the transformer do not take it"):
        model.sample(force_modality_at_start=(0, (3,)))
    with pytest.raises(ValueError, match=r"\(3,\)"):
        model.sample(torch.randn(3, 3))
    assert model.sample(fixed_modality_shape=(4,), force_modality_at_start=0, max_length=12)[1][1].shape == (4, 3)


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        (torch.rand(1, 3), TypeError, r"a batch of text is an integer tensor \(b, n\), got torch.float32"),
        ([[1, 2]], TypeError, r"integer tensor \(b, n\), got list"),
        (torch.tensor([1, 2]), ValueError, r"a batch of text is \(b, n\), got shape \(2,\)"),
        (torch.ones(2, 0, dtype=torch.long), ValueError, r"a batch of text is \(b, n\), got shape \(2, 0\)"),
        (torch.tensor([[1, 4]]), ValueError, "prompt 0, position 1: token id 4 is outside the vocabulary"),
        (torch.tensor([[1, 2], [3, 9]]), ValueError, "prompt 1, position 1: token id 9 is outside the vocabulary"),
        (torch.tensor([[-1]]), ValueError, "token id -1"),
    ],
)
def test_text_alone_is_refused(idle, prompt, error, message):
    with pytest.raises(error, match=message):
        idle.generate_text_only(prompt, 8)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (dict(seq_len=-1), ValueError),
        (dict(seq_len=5.0), TypeError),
        (dict(seq_len=5, temperature=-1.0), ValueError),
        (dict(seq_len=5, min_p=2.0), ValueError),
    ],
)
def test_option_of_text_alone_is_refused(idle, options, error):
    with pytest.raises(error, match=next(reversed(options))):
        idle.generate_text_only(torch.tensor([[1]]), **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(batch_size=0), ValueError, "batch_size must be at least 1, got 0"),
        (dict(batch_size=2.0), TypeError, "batch_size must be an int, got 2.0"),
        (dict(modality_type=4), ValueError, r"unknown modality type 4, this model has 4 \(from 0\)"),
        (dict(modality_type="image"), TypeError, "modality_type: a modality type is an int"),
        (dict(modality_type=LINE), ValueError, "modality 1 has no default shape"),
        (
            dict(modality_type=LINE, init_modality=(IMAGE, torch.ones(2, 2, 1))),
            ValueError,
            "init_modality is of type 2 and modality_type is 1: give modality_type=2, or a modality of type 1",
        ),
        (
            dict(init_modality=Latents(LINE, torch.ones(2, 3))),
            ValueError,
            "init_modality is of type 1 and modality_type is 0",
        ),
        (dict(init_modality=(9, torch.ones(2))), ValueError, "init_modality: unknown modality type 9"),
        (dict(init_modality=torch.tensor([1])), TypeError, "init_modality: modality 0 must be floating point"),
        (dict(init_modality=[1, 2]), TypeError, r"init_modality: expected .* \(type, tensor\), got list"),
        (
            dict(modality_type=LINE, fixed_modality_shape=(2, 2)),
            ValueError,
            r"modality 1 cannot have the shape \(2, 2\): it has 1 axes",
        ),
        (dict(modality_type=LINE, fixed_modality_shape=3), ValueError, "fixed_modality_shape must be a tuple"),
        (dict(modality_type=LINE, fixed_modality_shape=(3,), modality_steps=0), ValueError, "modality_steps"),
    ],
)
def test_modality_alone_is_refused(idle, options, error, message):
    with pytest.raises(error, match=message):
        idle.generate_modality_only(**options)


def test_refused_calls_leave_the_model_as_it_was(model):
    options = GREEDY | dict(init_modality_noise=noise(), max_length=20)
    before = model.sample(text(1), **options)
    for prompt, error, _ in PROMPTS.values():
        with pytest.raises(error):
            model.sample(prompt, **GREEDY)
    with pytest.raises(ValueError, match="init_modality_noise needs"):
        model.sample(text(1), **options | dict(init_modality_noise=noise()[:1], force_modality_at_start=(LINE, (2,))))
    assert_same(model.sample(text(1), **options), before, tolerance=0)
