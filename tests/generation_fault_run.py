"""Engines under a random load while faults strike: `run_faults` returns a `Report` whose every list should be empty."""

import gc
import random
import warnings
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from generation_faults import (
    ALLOCATES,
    CATALOG,
    COMMON,
    ERRORS,
    GROWS,
    KINDS,
    OF_A_MOMENT,
    OF_A_REQUEST,
    OUT_OF_MEMORY,
    WITHOUT_OUR_ERROR,
    Fragile,
    Injected,
    Modules,
    OutOfMemory,
    is_injected,
    shared_model,
)
from generation_models import shapes_of, slots_of
from torch import Tensor

from transfusion_pytorch.generation.engine import Engine, Request
from transfusion_pytorch.generation.events import Ended, EndReason

TOLERANCE = 1e-9  # as in the other tests of the engine, in float64
MAX_BATCH = 16
SLACK = 24  # objects more or less: masks of a grammar, shapes that were met for the first time
MOST_ESCAPES = 8  # errors in a row out of `step` that make an engine count as broken
SETTLING = range(16, 24)  # requests of the catalog that write and draw in all ways
ENOUGH = 40  # requests, for the cache of an engine to be as large as it will be


@dataclass
class Report:
    """What a run has shown. All lists should be empty.

    - `escaped`: errors that came out of `step`, `new_events` or `cancel`
    - `lost`: requests that never ended, have no reason, or no `Ended` as their last event and only there
    - `wrong`: requests that ended well and differ from themselves alone
    - `collateral`: requests without a fault that ended with an error which is not that of a moment
    - `unnoticed`: requests with a fault, or whose client has gone, that ended as if nothing had been
    - `unexpected`: warnings other than one for each engine that says that it halves its batches
    - `struck`: how many faults of a moment have come about
    - `grown`: what was more at the end than at the start: bytes of the cache, tensors, objects of the package
    """

    escaped: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    collateral: list[str] = field(default_factory=list)
    unnoticed: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    grown: list[str] = field(default_factory=list)
    reasons: Counter = field(default_factory=Counter)
    planned: Counter = field(default_factory=Counter)
    struck: int = 0
    submitted: int = 0
    steps: int = 0

    LISTS = ("escaped", "lost", "wrong", "collateral", "unnoticed", "unexpected", "grown")

    @property
    def is_clean(self) -> bool:
        return not any(getattr(self, name) for name in self.LISTS)

    def __str__(self) -> str:
        lines = [f"{self.submitted} requests, {self.steps} steps, ends {dict(self.reasons)}"]
        lines.append(f"faults {dict(self.planned)}, {self.struck} of a moment have struck")
        for name in self.LISTS:
            if found := getattr(self, name):
                lines.append(f"{name}: {len(found)}")
                lines += [f"    {count} x {line}" for line, count in Counter(found).most_common(6)]
        return "\n".join(lines)


@dataclass(eq=False)
class Client:
    """A request, what is expected of it, and what its client does."""

    request: Request
    kind: str
    number: int
    recipe: int | None = None
    patience: int | None = None  # cancels after so many steps
    may_fail: bool = False  # a fault of a moment struck while it was there
    has_gone: bool = False  # before it was done
    events: list = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.kind or "healthy"


class Run:
    """One engine after another under a random load."""

    def __init__(self, *, kinds: Sequence[str], requests: int, faults: int, per_engine: int, seed: int):
        self.random, self.per_engine = random.Random(seed), per_engine
        self.model, self.alone = shared_model()
        self.modules, self.report = Modules.of(self.model), Report()
        self.plan = [""] * (requests - faults) + [kinds[i % len(kinds)] for i in range(faults)]
        self.random.shuffle(self.plan)
        self.number = 0
        self.clients: list[Client] = []
        self.moment: OutOfMemory | None = None
        self.flaky: Fragile | None = None

    def whole(self) -> Report:
        counts = []
        while self.plan:
            chunk, self.plan = self.plan[: self.per_engine], self.plan[self.per_engine :]
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                self._serve(self.model.create_engine(max_batch=MAX_BATCH), chunk)
            messages = [str(warning.message) for warning in caught]
            about_batches = [message for message in messages if "batch" in message]
            self.report.unexpected += [it for it in messages if it not in about_batches] + about_batches[1:]
            counts.append(live_objects())
        self._compare("engines that are gone", counts[0], counts[-1])
        return self.report

    def _serve(self, engine: Engine, plan: list[str]) -> None:
        """Two halves, each up to the last request: what there is after the first may not grow in the second."""
        counts, sizes, half = [], [], (len(plan) + 1) // 2
        for part in (plan[:half], plan[half:]):
            if not self._serve_part(engine, part):
                self._calm_down()
                return
            if len(plan) < ENOUGH:
                continue
            self._settle(engine)
            counts.append(live_objects())
            sizes.append(engine.stats.cache_bytes)
        if counts:
            self._compare("an engine", *counts)
            if sizes[1] > 2 * sizes[0]:
                self.report.grown.append(f"the cache of an engine, from {sizes[0]} to {sizes[1]} bytes")

    def _settle(self, engine: Engine) -> None:
        """Serves the same few requests one by one: what an engine keeps of its last steps is then always the same."""
        self._calm_down()
        for index in SETTLING:
            request = engine.submit(CATALOG[index].prompt, **CATALOG[index].arguments())
            engine.run()
            client = Client(request, kind="", number=0, recipe=index, events=request.new_events())
            self._judge(client)
        self.report.reasons.subtract(self.alone[index].reason.value for index in SETTLING)

    def _serve_part(self, engine: Engine, plan: list[str]) -> bool:
        """Whether the engine has come to the end of it."""
        waiting, escapes, limit = list(plan), 0, self.report.steps + 60 * len(plan) + 300
        while waiting or self.clients or not engine.is_idle:
            while waiting and len(self.clients) < 2 * MAX_BATCH and self.random.random() < 0.7:
                self._submit(engine, waiting.pop())
            escapes = 0 if self._step(engine) else escapes + 1
            self._look_after_clients()
            if escapes > MOST_ESCAPES or self.report.steps > limit:
                state = "an engine that is broken" if escapes else "an engine that comes to no end"
                self.report.lost += [f"{client.name}: in {state}" for client in self.clients]
                self.report.lost += [f"not served by {state}"] * len(waiting)
                for client in self.clients:
                    self._forget_mark(client.number)
                self.clients = []
                return False
        return True

    def _compare(self, where: str, before: Counter, after: Counter) -> None:
        for name, count in (after - before).items():
            if count > SLACK:
                self.report.grown.append(f"{name} of {where}, from {before[name]} to {after[name]}")

    # what happens to an engine

    def _submit(self, engine: Engine, kind: str) -> None:
        self.number += 1
        self.report.submitted += 1
        if kind:
            self.report.planned[kind] += 1
        number, index = self.number, None
        if kind in OF_A_REQUEST:
            error = self.random.choice(ERRORS)(f"injected {number};")
            prompt, options = OF_A_REQUEST[kind](self.modules, Injected(number, error))
            arguments = COMMON | options | dict(generator=torch.Generator().manual_seed(number))
        else:
            index = self.random.randrange(len(CATALOG))
            prompt, arguments = CATALOG[index].prompt, CATALOG[index].arguments()
        try:
            request = engine.submit(prompt, listen=self.random.random() < 0.7, **arguments)
        except Exception as error:
            if kind != "encoder raises" or not is_injected(error, number):
                self.report.escaped.append(f"{kind or 'healthy'}: submit raised {type(error).__name__}")
            self.report.reasons["refused"] += 1
            self._forget_mark(number)
            return
        client = Client(request, kind, number, index)
        self.clients.append(client)
        if kind in OF_A_MOMENT:
            self._strike(engine, kind, number)
        elif kind == "cancelled":
            client.patience = self.random.randrange(1, 12)
        elif kind == "cancelled at once":
            self._cancel(client)
        elif kind == "disconnected":
            self._listen_and_go(client, self.random.randrange(1, 6))
        elif kind == "disconnected before the first event":
            self._listen_and_go(client, 0)

    def _strike(self, engine: Engine, kind: str, number: int) -> None:
        message = f"injected {number};"
        if "read again" in kind:
            engine.weights_changed()  # though they have not
        if kind == "a module fails once":
            if self.flaky is not None:
                self.flaky.flaky = None
            self.flaky = self.random.choice([self.modules.down, self.modules.up])
            self.flaky.flaky = self.random.choice(ERRORS)(message)
            return
        names, most = (GROWS, 4) if kind == "no memory for growth" else (ALLOCATES, 500)
        if names is ALLOCATES and self.random.random() < 0.7:  # or only what a step does most of would fail
            names, most = {self.random.choice(sorted(ALLOCATES))}, 8
        error = self.random.choice(OUT_OF_MEMORY)(message)
        self.moment = OutOfMemory(error, names=names, after=self.random.randrange(most))

    def _step(self, engine: Engine) -> bool:
        """One step of the engine; whether nothing came out of it."""
        self.report.steps += 1
        try:
            with nullcontext() if self.moment is None else self.moment:
                engine.step()
        except Exception as error:
            of_a_moment = self._has_struck() or any(client.may_fail for client in self.clients)
            kinds = sorted({client.kind for client in self.clients if client.kind in OF_A_REQUEST})
            cause = "a fault of a moment" if of_a_moment else " or ".join(kinds) or "nothing"
            whose = "ours" if is_injected(error) else "its own"
            self.report.escaped.append(f"step raised {type(error).__name__} ({whose}) after {cause}")
            return False
        finally:
            self._has_struck()
        return True

    def _has_struck(self) -> bool:
        """Whether a fault of a moment has just struck; whoever was there may then end with its error."""
        is_spent = self.moment is not None and self.moment.error is None
        is_over = self.flaky is not None and self.flaky.flaky is None
        if is_spent:
            self.moment = None
        if is_over:
            self.flaky = None
        self.report.struck += is_spent + is_over
        for client in self.clients if is_spent or is_over else ():
            client.may_fail = True
        return is_spent or is_over

    def _calm_down(self) -> None:
        """Takes back faults of a moment that have not struck yet."""
        self.moment = None
        if self.flaky is not None:
            self.flaky.flaky = self.flaky = None

    # what clients do

    def _listen_and_go(self, client: Client, events: int) -> None:
        """Reads so many events, and forgets the stream. An engine is set to work by whoever reads."""
        stream = client.request.events()
        try:
            for _, event in zip(range(events), stream, strict=False):
                client.events.append(event)
        except Exception as error:
            if client.request.reason is not EndReason.ERROR:
                whose = "ours" if is_injected(error) else "its own"
                self.report.escaped.append(f"a stream raised {type(error).__name__} ({whose})")
        client.has_gone = not client.request.is_done
        del stream
        self._has_struck()

    def _cancel(self, client: Client) -> None:
        client.has_gone = not client.request.is_done
        try:
            client.request.cancel()
        except Exception as error:
            self.report.escaped.append(f"cancel raised {type(error).__name__}")

    def _look_after_clients(self) -> None:
        for client in list(self.clients):
            if client.patience is not None and not client.has_gone:
                client.patience -= 1
                if not client.patience:
                    self._cancel(client)
            try:
                with nullcontext() if self.moment is None else self.moment:
                    client.events += client.request.new_events()
            except Exception as error:
                if self._has_struck() and is_injected(error):
                    continue  # all of them come with the next call
                self.report.escaped.append(f"{client.name}: new_events raised {type(error).__name__}")
            self._has_struck()
            if client.request.is_done:
                self.clients.remove(client)
                self._judge(client)
                self._forget_mark(client.number)

    def _forget_mark(self, number: int) -> None:
        for module in self.modules:
            module.marks.pop(Injected(number, Exception()).mark, None)

    # what became of them

    def _judge(self, client: Client) -> None:
        request, report = client.request, self.report
        report.reasons[request.reason and request.reason.value] += 1
        ends = [event for event in client.events if isinstance(event, Ended)]
        if not ends and client.kind == "disconnected" and not client.has_gone:
            ends = [Ended([], request.reason)]  # in the stream that was forgotten, behind what was read of it
        elif len(ends) != 1 or client.events[-1] is not ends[0]:
            report.lost.append(f"{client.name}: {request.reason}, but Ended came {len(ends)} times or not last")
            return
        [ended] = ends
        if request.reason is None or ended.reason is not request.reason:
            report.lost.append(f"{client.name}: its reason is {request.reason}, and {ended.reason} was told")
        elif request.reason is EndReason.ERROR:
            self._judge_error(client, ended.error)
        elif request.reason is EndReason.CANCELLED:
            if not client.has_gone:
                report.collateral.append(f"{client.name}: cancelled, and its client is still there")
            self._judge_sample(client, request.result(), is_whole=False)
        elif client.has_gone or client.kind in OF_A_REQUEST:
            report.unnoticed.append(f"{client.name}: ended with {request.reason.value}")
        else:
            if request.reason is not self.alone[client.recipe].reason:
                report.wrong.append(f"{client.name}: ended with {request.reason.value}")
            self._judge_sample(client, request.result(), is_whole=True)

    def _judge_error(self, client: Client, error: Exception | None) -> None:
        name = type(error).__name__
        is_of_moment = client.may_fail and is_injected(error)
        if client.kind not in OF_A_REQUEST:
            if not is_of_moment:
                self.report.collateral.append(f"{client.name}: {name}")
        elif not is_of_moment and client.kind not in WITHOUT_OUR_ERROR and not is_injected(error, client.number):
            self.report.wrong.append(f"{client.name}: ended with a {name} that is not its own")

    def _judge_sample(self, client: Client, sample: list, *, is_whole: bool) -> None:
        """Against the same request alone. What was cancelled is as far as it came."""
        if client.recipe is None:
            return
        expected = self.alone[client.recipe].sample
        if not is_whole:
            so_far, slots = slots_of(self.model, sample), slots_of(self.model, expected)
            if so_far != slots[: len(so_far)]:
                self.report.wrong.append(f"{client.name}: cancelled, and has other text than alone")
        elif shapes_of(sample) != shapes_of(expected):
            self.report.wrong.append(f"{client.name}: other text or shapes than alone")
        elif any(
            (part[1] - other[1]).abs().max() > TOLERANCE
            for part, other in zip(sample, expected, strict=True)
            if isinstance(part, tuple)
        ):
            self.report.wrong.append(f"{client.name}: other latents than alone")


def live_objects() -> Counter:
    """How many tensors there are, and how many objects of each class of the package's generation."""
    gc.collect()
    found = Counter()
    for kind in map(type, gc.get_objects()):
        if issubclass(kind, Tensor):
            found["tensors"] += 1
        elif str(kind.__module__).startswith("transfusion_pytorch"):
            found[kind.__qualname__] += 1
    return found


def run_faults(
    kinds: Sequence[str] = KINDS, *, requests: int, faults: int, per_engine: int = 1000, seed: int = 0
) -> Report:
    """Sends requests through engines that serve `per_engine` each, and has faults of these kinds strike, all in an
    order that depends on the seed.
    """
    return Run(kinds=kinds, requests=requests, faults=faults, per_engine=per_engine, seed=seed).whole()
