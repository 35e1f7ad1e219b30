"""Faults for an engine, a model that fails when it is told to, and requests. `generation_fault_run` puts them to use.

Two kinds of faults are told apart:

- the fault of a request, which it brings along (code of the user that raises, latents that become NaN): it ends with
  `EndReason.ERROR`, and no other does
- the fault of a moment (memory that cannot be had, a module that fails once): whoever it hits may end with that error,
  or may be computed again

Whatever ends well equals, id by id and latent by latent, the same request in an engine of its own where nothing fails.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from generation_models import Lively, text
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from transfusion_pytorch import Transfusion
from transfusion_pytorch.generation.events import EndReason

LINE, IMAGE = 0, 1  # modalities of `fragile_model`: with modules of the user around the transformer, and without
UP_FAULT = 5  # the length of a line that the user's module behind the transformer does not take
MARK = 50.0  # latents beyond this are marks, which tell the user's modules to fail
HUGE = 1e300  # noise whose square is infinite: latents become NaN


class Awkward(Exception):
    """Cannot be made again from its message."""

    def __init__(self, code: int, message: str):
        super().__init__(f"{message} (code {code})")


ERRORS: list[Callable[[str], Exception]] = [
    KeyError,
    RuntimeError,
    ValueError,
    ZeroDivisionError,
    AssertionError,
    StopIteration,
    NotImplementedError,
    TypeError,
    IndexError,
    MemoryError,
    lambda message: Awkward(7, message),
]
OUT_OF_MEMORY: list[Callable[[str], Exception]] = [
    torch.OutOfMemoryError,
    MemoryError,
    lambda message: RuntimeError(f"[enforce fail] DefaultCPUAllocator: can't allocate memory: {message}"),
]


def is_injected(error: BaseException | None, number: int | None = None) -> bool:
    """Whether an error, or one that led to it, is ours (that of this number)."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if f"injected {'' if number is None else f'{number};'}" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


# a model that fails when it is told to


class Fragile(nn.Module):
    """A module of the user. It raises if it sees a mark that was set, once if it is `flaky`, and for shapes that it
    does not take.
    """

    def __init__(self, layer: nn.Module, refuses: int | None = None):
        super().__init__()
        self.layer, self.refuses = layer, refuses
        self.marks: dict[float, Exception] = {}
        self.flaky: Exception | None = None

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "meta" or not x.any():  # a dry run for the shapes
            return self.layer(x)
        if self.flaky is not None:
            error, self.flaky = self.flaky, None
            raise error
        for mark, error in self.marks.items():
            if (x == mark).any():
                raise error
        if self.refuses is not None and x.shape[1] == self.refuses:
            raise KeyError("injected by shape")
        return self.layer(x)


def fragile_model() -> Transfusion:
    """A tiny model in float64 with an encoder, a decoder and a pair of modules that can fail."""
    torch.manual_seed(3)
    pair = (Fragile(nn.Linear(2, 16, bias=False)), Fragile(nn.Linear(16, 2, bias=False), refuses=UP_FAULT))
    model = Transfusion(
        num_text_tokens=4,
        dim_latent=(2, 3),
        modality_num_dim=(1, 2),
        modality_encoder=(Fragile(nn.Identity()), None),
        modality_decoder=(Fragile(nn.Identity()), None),
        pre_post_transformer_enc_dec=(pair, None),
        transformer=dict(dim=16, depth=1, dim_head=8, heads=2),
    )
    model.to_logits = Lively(16, model.vocabulary.num_logits, bias=False)
    model.to_logits.register_buffer("push", torch.zeros(model.vocabulary.num_logits))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
        model.to_logits.push[model.meta_id] = 0.4
    return model.double().eval()


class Modules(NamedTuple):
    encoder: Fragile
    decoder: Fragile
    down: Fragile
    up: Fragile

    @classmethod
    def of(cls, model: Transfusion) -> "Modules":
        io = model.modalities[LINE]
        return cls(io.encoder, io.decoder, io.adapter.down, io.adapter.up)


# requests


@dataclass(frozen=True)
class Recipe:
    """A request that can be made any number of times, and its `seed`."""

    prompt: Any
    options: dict[str, Any]
    seed: int

    def arguments(self) -> dict[str, Any]:
        return self.options | dict(generator=torch.Generator().manual_seed(self.seed))


class Outcome(NamedTuple):
    reason: EndReason
    sample: list


def line(*shape: int, seed: int = 0) -> tuple[int, Tensor]:
    return LINE, torch.randn(*shape, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def image(*shape: int, seed: int = 0) -> tuple[int, Tensor]:
    return IMAGE, torch.randn(*shape, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


COMMON = dict(max_length=22, max_modality_tokens=4, modality_steps=2)
LONG = text(*[i % 4 for i in range(70)])  # for which a cache has to grow
PROMPTS = [None, text(1), text(1, 2), line(3), image(1, 2), [text(2), line(2), text(1)], LONG]
WAYS = [
    dict(text_temperature=0.0),
    dict(text_top_k=3, cfg_scale=2.0),
    dict(plan=[("text", 3), (LINE, (2,))], cfg_scale=2.0),
    dict(plan=[(IMAGE, (1, 2)), ("text", 4)], modality_steps=3, odeint_kwargs=dict(method="euler")),
    dict(force_modality_at_start=(LINE, (3,)), modality_cfg_scale=1.5),
    dict(stop_ids=[2], text_repetition_penalty=1.3),
    dict(allowed_modalities=[]),
    dict(plan=[(LINE, (2,))], odeint_kwargs=dict(method="dopri5", atol=1.0, rtol=1.0)),
]
CATALOG = [
    Recipe(prompt, COMMON | way | (dict(max_length=92) if prompt is LONG else {}), seed=10 * i + j)
    for i, prompt in enumerate(PROMPTS)
    for j, way in enumerate(WAYS)
]


class Alone:
    """What requests of the catalog become in an engine of their own, where nothing fails."""

    def __init__(self, model: Transfusion):
        self.model = model
        self._known: dict[int, Outcome] = {}

    def __getitem__(self, index: int) -> Outcome:
        if index not in self._known:
            recipe = CATALOG[index]
            engine = self.model.create_engine()
            request = engine.submit(recipe.prompt, **recipe.arguments())
            engine.run()
            assert request.reason is not None
            self._known[index] = Outcome(request.reason, request.result())
        return self._known[index]


@cache
def shared_model() -> tuple[Transfusion, Alone]:
    """One for all runs, since what every request becomes alone takes longer to find out than a short run."""
    model = fragile_model()
    alone = Alone(model)
    for index in range(len(CATALOG)):
        alone[index]
    return model, alone


# faults of a request: each returns the prompt and options of one that must end with an error


class Injected(NamedTuple):
    """An error and its number; `mark` is a value of latents that means it."""

    number: int
    error: Exception

    @property
    def mark(self) -> float:
        return MARK + self.number / 1024


def _raising(error: Exception, at: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Has id 0 written, so that no text ends before there are `at` ids."""

    def processor(ids: Tensor, logits: Tensor) -> Tensor:
        if len(ids) >= at:
            raise error
        return torch.full_like(logits, -9.0).index_fill(0, torch.tensor(0), 9.0)

    return processor


def processor_raises(modules: Modules, one: Injected) -> tuple[Any, dict]:
    plan = dict(plan=[("text", 9)]) if one.number % 2 else dict(plan=[(LINE, (2,)), ("text", 9)])
    return text(1), dict(logits_processors=[_raising(one.error, at=2 + one.number % 3)], **plan)


def processor_returns_nonsense(modules: Modules, one: Injected) -> tuple[Any, dict]:
    nonsense = [
        lambda ids, logits: logits * torch.nan,
        lambda ids, logits: logits[1:],
        lambda ids, logits: "logits",
        lambda ids, logits: None,
        lambda ids, logits: torch.full_like(logits, -torch.inf),
    ]
    return text(2), dict(logits_processors=[nonsense[one.number % len(nonsense)]])


def module_refuses_a_prompt(modules: Modules, one: Injected) -> tuple[Any, dict]:
    modules.down.marks[one.mark] = one.error
    kind, x = line(2 + one.number % 2)
    x[0, 0] = one.mark
    return [text(1), (kind, x)], {}


def module_refuses_a_drawing(modules: Modules, one: Injected) -> tuple[Any, dict]:
    modules.down.marks[one.mark] = one.error
    return text(1), dict(plan=[("text", 2), (LINE, (2,)), ("text", 2)], init_modality_noise=_marked(one))


def module_refuses_a_shape(modules: Modules, one: Injected) -> tuple[Any, dict]:
    scale = [1.0, 2.0][one.number % 2]
    return text(3), dict(plan=[("text", 1), (LINE, (UP_FAULT,)), ("text", 2)], cfg_scale=scale)


def decoder_raises(modules: Modules, one: Injected) -> tuple[Any, dict]:
    """What is kept of `init_modality` comes back to the last digit, and so does a mark in it."""
    modules.decoder.marks[one.mark] = one.error
    kind, x = line(2)
    x[0, 0] = one.mark
    return text(1), dict(init_modality=(kind, x), modality_mask=torch.tensor([False, True]))


def solver_raises(modules: Modules, one: Injected) -> tuple[Any, dict]:
    def grid(velocity, start, times):
        raise one.error

    solver = dict(method=["euler", "midpoint"][one.number % 2], options=dict(grid_constructor=grid))
    return text(2), dict(plan=[("text", 1), (IMAGE, (1, 2)), ("text", 2)], odeint_kwargs=solver)


def latents_become_nan(modules: Modules, one: Injected) -> tuple[Any, dict]:
    noise = torch.full((4, 3), HUGE, dtype=torch.float64)
    plan = [("text", 2), ([LINE, IMAGE][one.number % 2], [(2,), (1, 2)][one.number % 2])]
    return text(1), dict(plan=plan, init_modality_noise=noise)


def logits_become_nan(modules: Modules, one: Injected) -> tuple[Any, dict]:
    noise = torch.full((4, 3), HUGE, dtype=torch.float64)
    return text(1), dict(plan=[(IMAGE, (2, 1)), ("text", 5)], init_modality_noise=noise)


def encoder_raises(modules: Modules, one: Injected) -> tuple[Any, dict]:
    """`submit` raises, and there is no request."""
    modules.encoder.marks[one.mark] = one.error
    kind, x = line(2)
    x[0, 0] = one.mark
    return [text(1), (kind, x)], {}


def _marked(one: Injected) -> Tensor:
    noise = torch.randn(4, 3, generator=torch.Generator().manual_seed(one.number), dtype=torch.float64)
    noise[0, 0] = one.mark
    return noise


OF_A_REQUEST: dict[str, Callable[[Modules, Injected], tuple[Any, dict]]] = {
    "processor raises": processor_raises,
    "processor returns nonsense": processor_returns_nonsense,
    "module refuses a prompt": module_refuses_a_prompt,
    "module refuses a drawing": module_refuses_a_drawing,
    "module refuses a shape": module_refuses_a_shape,
    "decoder raises": decoder_raises,
    "solver raises": solver_raises,
    "latents become NaN": latents_become_nan,
    "logits become NaN": logits_become_nan,
    "encoder raises": encoder_raises,
}
WITHOUT_OUR_ERROR = {"processor returns nonsense", "latents become NaN", "logits become NaN", "module refuses a shape"}

# faults of a moment, and clients that go

OF_A_MOMENT = ["no memory", "no memory for growth", "no memory while all is read again", "a module fails once"]
OF_A_CLIENT = ["cancelled", "cancelled at once", "disconnected", "disconnected before the first event"]
KINDS = [*OF_A_REQUEST, *OF_A_MOMENT, *OF_A_CLIENT]

GROWS = {"zeros", "new_zeros", "empty", "new_empty", "full", "new_full", "empty_like", "zeros_like"}
ALLOCATES = GROWS | {"cat", "stack", "tensor", "clone", "to", "linear", "matmul", "add", "mul", "ones", "arange", "sin"}
ALLOCATES |= {"scaled_dot_product_attention", "where", "masked_fill", "max", "softmax", "cumsum", "sort", "topk"}
ALLOCATES |= {"searchsorted", "rand", "randn", "index_select", "index_copy", "embedding", "repeat_interleave"}
ALLOCATES |= {"__getitem__"}


class OutOfMemory(TorchFunctionMode):
    """While this is entered, one call of torch fails: of those of the functions `names`, the one after `after`."""

    def __init__(self, error: Exception, *, names: set[str], after: int):
        super().__init__()
        self.error: Exception | None = error
        self.names, self.after = names, after

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.error is not None and getattr(func, "__name__", "") in self.names:
            self.after -= 1
            if self.after < 0:
                error, self.error = self.error, None
                raise error
        return func(*args, **(kwargs or {}))
