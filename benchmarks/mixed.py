"""64 prompts of mixed lengths and modalities, whose continuations are scripted, so that both packages do the same work.

An untrained model writes what it likes, and two packages never like the same. So the weights are scripted: embeddings
are so long that the residual stream keeps the direction of the current id whatever the layers add to it, and the logit
layer, a dual basis of the states that reach it, reads off that id which one follows. What is written is then a walk
along the map `Script.following`, and a prompt decides by its last id which walk it is. All weights that do the work are
as they were; only what the model says is fixed.

Walks, by ids of text: `FIRST` ends in eos; `SECOND` goes to a picture (meta, "10,8", som), after which it goes on in
`THIRD`, which ends in eos. A prompt that ends in meta "2" goes on to "24", a sequence of modality 1, then to `SECOND`.

The peer throws away every written shape of more than one axis and draws the default shape, so (10, 8) is the default.
It does not put markers around modalities in a list, so prompts are given to it as they are with their markers.
"""

import hashlib
import json
import random
from dataclasses import dataclass
from typing import Any

import torch
from jobs import Job, Library, parts_of
from torch import Tensor, nn

NUM_TEXT = 192
FIRST, SECOND, THIRD = range(120), range(120, 160), range(160, 192)
SHAPES = ((10, 8), (24,))
CHANNELS = (8, 8)
LENGTH = 1e4  # of embeddings: what layers add is of order 1
Name = int | str  # an id of text as a number, a marker or a character by its name


def following() -> dict[Name, Name]:
    """What comes after what."""
    table: dict[Name, Name] = {k: k + 1 for k in range(NUM_TEXT)}
    table |= {FIRST[-1]: "eos", SECOND[-1]: "meta", THIRD[-1]: "eos"}
    table |= {"meta": "1", "1": "0", "0": ",", ",": "8", "8": "som0", "eom0": THIRD[12]}
    table |= {"2": "4", "4": "som1", "eom1": SECOND[24]}
    return table


def names_of(model: Any) -> dict[Name, int]:
    """The package's own ids. `sos` stands before everything and is never written."""
    chars = {char: int(model.char_tokenizer(char)[0]) for char in "0123456789,"}
    markers = {"sos": model.sos_id, "eos": model.eos_id, "meta": model.meta_id}
    markers |= {f"som{i}": int(model.som_ids[i]) for i in range(2)} | {
        f"eom{i}": int(model.eom_ids[i]) for i in range(2)
    }
    return {k: k for k in range(NUM_TEXT)} | {name: int(id) for name, id in markers.items()} | chars


@torch.no_grad()
def script(library: Library, model: nn.Module) -> None:
    """Sets embeddings and logit layer so that the model writes along `following`."""
    names, table = names_of(model), following()
    embedding, logits = library.embedding(model), library.logit_layer(model)
    embedding.weight.copy_(LENGTH * nn.functional.normalize(torch.randn_like(embedding.weight), dim=-1))
    states = hidden_states(library, model, [names[name] for name in table])
    basis = torch.linalg.pinv(states.double()).mT  # (ids, dim): basis[i] @ states[j] is 1 where i = j, else 0
    weight = torch.zeros_like(logits.weight, dtype=torch.double)
    weight.index_add_(0, torch.tensor([names[after] for after in table.values()]), basis)
    logits.weight.copy_(20 * weight)


def hidden_states(library: Library, model: nn.Module, ids: list[int]) -> Tensor:
    """What reaches the logit layer behind each id alone. Markers stand in for an id of text, by its embedding."""
    embedding, kept, seen = library.embedding(model), [], []
    hook = library.logit_layer(model).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    original = embedding.weight.clone()
    for some in torch.tensor(ids).split(NUM_TEXT):
        embedding.weight[: len(some)] = original[some]
        model(torch.arange(len(some))[:, None], return_loss=False)
        embedding.weight.copy_(original)
        kept.append(seen.pop().reshape(len(some), -1))
    hook.remove()
    return torch.cat(kept)


@dataclass(frozen=True)
class Prompt:
    """Names, and axial shapes `(type, shape)` of modalities, their markers included."""

    parts: tuple[Any, ...]

    def expected(self) -> list[str]:
        """The whole sample, sos to eos, as `structure` describes it."""
        table, out = following(), ["sos", *(describe(part) for part in self.parts)]
        name = self.parts[-1]
        while name != "eos":
            name = table[name]
            out.append(describe(name))
            if str(name).startswith("som"):
                kind = int(name[-1])
                out.append(describe((kind, SHAPES[kind])))
                name = f"eom{kind}"
                out.append(name)
        return out

    def as_given(self, names: dict[Name, int]) -> list[Any]:
        """As either package takes it: ids and `(type, latents)` in turn."""
        out: list[Any] = []
        for part in self.parts:
            if isinstance(part, tuple):
                out.append((part[0], torch.randn(*part[1], CHANNELS[part[0]])))
            elif out and isinstance(out[-1], list):
                out[-1].append(names[part])
            else:
                out.append([names[part]])
        return [torch.tensor(part) if isinstance(part, list) else part for part in out]


def describe(part: Any) -> str:
    return f"<{part[0]}:{','.join(map(str, part[1]))}>" if isinstance(part, tuple) else str(part)


def image(height: int, width: int) -> list[Any]:
    return ["meta", *f"{height},{width}", "som0", (0, (height, width)), "eom0"]


def make_prompts(number: int, seed: int = 0) -> list[Prompt]:
    """A quarter each: text alone; text that leads to a picture; a picture to write about; an eighth each: a sequence
    and then a picture; a picture, text, and another picture.
    """
    rng = random.Random(seed)
    words = lambda least=2, most=40: [rng.choice(FIRST) for _ in range(rng.randint(least, most))]  # noqa: E731
    sizes = lambda: image(rng.randint(6, 12), rng.randint(6, 12))  # noqa: E731
    kinds = [
        lambda: [*words(), rng.choice(FIRST)],
        lambda: [*words(), rng.choice(SECOND)],
        lambda: [*words(), *sizes()],
        lambda: [*words(), rng.choice(SECOND)],
        lambda: [*words(), rng.choice(FIRST)],
        lambda: [*words(), *sizes(), *words(), rng.choice(FIRST)],
        lambda: [*words(), "meta", "2"],
        lambda: [*words(), *sizes(), *words(), rng.choice(SECOND)],
    ]
    return [Prompt(tuple(kinds[i % len(kinds)]())) for i in range(number)]


def structure(sample: Any, names: dict[Name, int]) -> list[str]:
    """A returned sample by names, its latents by their shapes."""
    by_id = {id: name for name, id in names.items()}
    out: list[str] = []
    for part in parts_of(sample):
        if isinstance(part, tuple):
            out.append(describe((part[0], tuple(part[1].shape[:-1]))))
        else:
            out += [str(by_id.get(id, f"?{id}")) for id in part.tolist()]
    return out


def mixed_job(library: Library, quick: bool) -> Job:
    """64 scripted prompts through `sample_many`, 16 intervals, guidance 3, the likeliest token."""
    width = dict(dim=256, depth=2 if quick else 6, heads=4, dim_head=64)
    prompts = make_prompts(8 if quick else 64)
    model = library.build(num_text=NUM_TEXT, transformer=width, latents=CHANNELS, shapes=SHAPES).eval()
    script(library, model)
    names = names_of(model)
    options = dict(
        max_length=2048, text_temperature=0.0, cfg_scale=3.0, modality_steps=library.steps(4 if quick else 16)
    )
    made: list[Any] = []

    def run() -> None:
        with library.precision():
            made[:] = model.sample_many([prompt.as_given(names) for prompt in prompts], **options)

    def check() -> dict[str, Any]:
        structures = [structure(sample, names) for sample in made]
        for i, (got, prompt) in enumerate(zip(structures, prompts, strict=True)):
            if got != prompt.expected():
                raise RuntimeError(f"prompt {i} went off its script: {' '.join(got)}"[:300])
        digest = hashlib.sha256(json.dumps(structures).encode()).hexdigest()[:12]
        return {"work": len(prompts), "unit": "prompts", "structure": digest}

    return Job(model, run, check)
