"""Imitation learning on PushT: an expert demonstrates, a policy learns chunks of actions by flow matching.

python train_policy.py                         # InContextMMDiT on the positions of the T and the agent
python train_policy.py --policy transfusion    # Transfusion itself
python train_policy.py --observations pixels   # images of 96 x 96 pixels and the position of the agent
python train_policy.py --rounds 3               # three times the expert corrects the policy (DAgger), and it learns on
python train_policy.py --dagger results/RUN/model --demonstrations results/RUN/demonstrations.safetensors

Needs gym-pusht: pip install "transfusion-pytorch[policy]"
"""

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from transfusion_pytorch import Callback, ModelCard, TimePolicy, TrainConfig
from transfusion_pytorch.commands.errors import run_command
from transfusion_pytorch.examples import run
from transfusion_pytorch.examples.pictures import save_curves
from transfusion_pytorch.examples.pusht import (
    SHAPES,
    ChunkDataset,
    Demonstrations,
    NothingToCorrect,
    Scores,
    as_tensors,
    demonstrate,
    evaluate,
    frames,
    make_environment,
    save_gif,
)
from transfusion_pytorch.policy import ChunkExecutor, FlowPolicy, PolicyTrainer, TransfusionPolicy
from transfusion_pytorch.policy.executor import check_steps
from transfusion_pytorch.policy.trainer import NOT_FOR_POLICIES
from transfusion_pytorch.training.config import config_from_arguments

DEFAULTS = TrainConfig(
    steps=3000, batch_size=128, learning_rate=1e-3, weight_decay=0.01, ema_beta=0.99, beta2=0.95,
    validate_every=500, sample_every=0,
)  # fmt: skip
POLICIES: dict[str, Any] = {"flow": FlowPolicy, "transfusion": TransfusionPolicy}
HELD_OUT = 20  # episodes for the validation loss
EVALUATION_SEED = 100_000  # of the first episode in closed loop; demonstrations have seeds from that of the run on
WATCHED_SEED = 90_000  # of the first episode in closed loop while it trains
CORRECTION_SEED = 50_000  # what is added to the seed of demonstrations that correct a policy
TIMED_DECISIONS = 50
MOST_EPISODES, MOST_TEST_EPISODES, FEWEST = 700, 200, 2


def policy_from(args: argparse.Namespace) -> Any:
    options: dict[str, Any] = dict(
        observations=SHAPES[args.observations],
        dim_action=2,
        chunk_length=args.chunk_length,
        observation_steps=args.observation_steps,
        relative_to="agent_pos",
        dim=args.dim,
        depth=args.depth,
        time_policy=TimePolicy("beta" if args.times == "beta" else "uniform"),
        solver_steps=args.solver_steps,
    )
    if args.policy == "flow":
        options["ff_mult"] = 2
    return POLICIES[args.policy](**options)


def check_policy(policy: Any, args: argparse.Namespace) -> None:
    """Raises `ValueError` for what would end the run only after the demonstrations or the training."""
    check_steps(args.executed_steps, args.delay, policy.chunk_length)
    shapes = policy.observation_spec.shapes
    if shapes != SHAPES[args.observations]:
        raise ValueError(f"the policy in {args.dagger} observes {', '.join(shapes)}: give other --observations")


def check_resumed(place: Any) -> None:
    """Raises `ValueError` for a part of a run that is gone on with: later rounds follow from those before."""
    is_round = place.folder.name.startswith("round-")
    if is_round or (isinstance(place.resume, Path) and (place.folder / "round-1").exists()):
        whole = place.folder.parent if is_round else place.folder
        raise ValueError(f"a run of several rounds goes on as a whole: --resume {whole}")


def read_demonstrations(args: argparse.Namespace) -> list[Demonstrations]:
    """Those of the files that were given."""
    found = [Demonstrations.load(path) for path in args.demonstrations or ()]
    for file, part in zip(args.demonstrations or (), found, strict=True):
        if set(part.observations) != set(SHAPES[args.observations]):
            raise ValueError(f"{file} has {', '.join(part.observations)}: give other --observations")
    return found


def more_demonstrations(
    args: argparse.Namespace, folder: Path, config: TrainConfig, known: list[Demonstrations], leader: Any, number: int
) -> Demonstrations:
    """All that are `known`, and new ones if there are none yet or the expert is to correct the policy `leader` in round
    `number`. The folder keeps all of them, and a run goes on with these when it is resumed.
    """
    path = folder / "demonstrations.safetensors"
    if path.is_file():
        return Demonstrations.load(path)
    if known and leader is None:
        return Demonstrations.joined(known)
    wanted = MOST_EPISODES if config.steps is None else config.steps // 4
    episodes = args.episodes or min(max(wanted, FEWEST), MOST_EPISODES)
    seed = config.seed + (0 if leader is None else CORRECTION_SEED + max(MOST_EPISODES, episodes) * number)
    made = demonstrate(episodes, observations=args.observations, seed=seed, policy=leader)
    joined = Demonstrations.joined([made, *known])
    folder.mkdir(exist_ok=True)
    joined.save(path)
    return joined


class InClosedLoop(Callback):
    """A few episodes of the average while it trains."""

    def __init__(self, episodes: int, options: dict[str, Any]):
        self.episodes, self.options = episodes, options

    def on_sample(self, trainer: Any) -> dict[str, float]:
        scores = Scores.of(evaluate(trainer.average, episodes=self.episodes, seed=WATCHED_SEED, **self.options))
        trainer.say(f"step {trainer.step:,}: {scores}")
        return {"success": scores.success, "coverage": scores.coverage}


def milliseconds_per_decision(policy: Any, observations: Any) -> float:
    """The median time of one chunk for one environment."""
    observation = as_tensors(make_environment(observations).reset(seed=EVALUATION_SEED)[0])
    stacked = {name: torch.stack([value] * policy.observation_steps)[None] for name, value in observation.items()}
    stacked = {name: value.to(policy.device) for name, value in stacked.items()}
    times = []
    for _ in range(TIMED_DECISIONS):
        started = time.perf_counter()
        policy.predict(stacked).cpu()
        times.append(1000 * (time.perf_counter() - started))
    return median(times)


class Trained(NamedTuple):
    """A policy, the trainer of its last round, how many steps there were in all, and of how many episodes."""

    policy: Any
    trainer: PolicyTrainer
    steps: int
    num_episodes: int


def closed_loop(args: argparse.Namespace) -> dict[str, Any]:
    """How the policy acts in the environment."""
    return dict(observations=args.observations, executed_steps=args.executed_steps, delay=args.delay)


def train_in_rounds(
    args: argparse.Namespace, config: TrainConfig, policy: Any, known: list[Demonstrations], place: Any
) -> Trained | None:
    """Learns from the expert, and then from its corrections, as often as `--rounds` says. None if it was stopped."""
    callbacks = [InClosedLoop(50, closed_loop(args))] if config.sample_every else []
    started, trained = time.monotonic(), None
    for number in range(args.rounds + 1):
        folder = place.folder / f"round-{number}" if number else place.folder
        leader = policy if number or args.dagger else None
        try:
            demonstrations = more_demonstrations(args, folder, config, known, leader, number)
        except NothingToCorrect as good:
            if trained is None:
                raise
            trained.trainer.say(f"round {number}: {good}")
            break
        lengths = dict(chunk_length=policy.chunk_length, observation_steps=policy.observation_steps)
        train, held_out = (ChunkDataset(part, **lengths) for part in demonstrations.split(HELD_OUT))
        if leader is None:
            chunks = train.everything()
            policy.fit_statistics(chunks.observation, chunks.actions, action_is_pad=chunks.is_pad)
        trainer = PolicyTrainer(policy, train, config, folder=folder, validation=held_out, callbacks=callbacks)
        trainer.say(f"round {number}: {len(demonstrations.ends)} demonstrations, {len(demonstrations.actions):,} steps")
        if trainer.fit(resume=True if number else place.resume).was_stopped:
            return None
        trainer.say(f"trained after {time.monotonic() - started:.0f} s")
        known, policy = [demonstrations], trainer.average.eval().cpu()
        steps = trainer.step + (0 if trained is None else trained.steps)
        trained = Trained(policy, trainer, steps, len(train.demonstrations.ends))
        if number < args.rounds:
            made = place.folder / f"round-{number}" / "model"  # the model of the run is that of the last round
            policy.save_pretrained(made)
            policy = type(policy).from_pretrained(made)
    return trained


def score(trained: Trained, args: argparse.Namespace, folder: Path) -> None:
    """Many episodes in closed loop; the policy with its card, its loss and an episode as pictures."""
    policy, trainer = trained.policy, trained.trainer
    episodes = args.test_episodes or min(max(trainer.step // 10, FEWEST), MOST_TEST_EPISODES)
    scores = Scores.of(evaluate(policy, episodes=episodes, seed=EVALUATION_SEED, **closed_loop(args)))
    latency = milliseconds_per_decision(policy, args.observations)
    figures = {"success": scores.success, "highest_coverage": scores.coverage, "ms_per_decision": latency}
    source = f"{trained.num_episodes} episodes of a scripted expert on PushT"
    card = ModelCard(title="PushT policy", training_data=source, steps=trained.steps, figures=figures)
    policy.save_pretrained(folder / "model", card=card)
    save_curves(folder / "loss.png", {"loss": run.read_metrics(trainer.folder)["loss"]}, log=True)
    executor = ChunkExecutor(policy, executed_steps=args.executed_steps, delay=args.delay)
    save_gif(folder / "episode.gif", list(frames(executor, seed=EVALUATION_SEED, observations=args.observations)))
    trainer.say(f"{scores}")
    trainer.say(f"{latency:.1f} ms for each decision, with {torch.get_num_threads()} threads")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", choices=tuple(POLICIES), default="flow", help="InContextMMDiT or Transfusion")
    parser.add_argument("--observations", choices=tuple(SHAPES), default="state")
    parser.add_argument(
        "--episodes", type=run.positive_int, help=f"demonstrations (a fourth of the steps, at most {MOST_EPISODES})"
    )
    parser.add_argument("--demonstrations", type=run.existing_path, nargs="+", help="files of earlier runs, instead")
    parser.add_argument(
        "--dagger", type=run.existing_path, help="a saved policy that is trained further: the expert corrects it"
    )
    parser.add_argument(
        "--rounds", type=run.natural, default=0, help="further rounds, in each of which the expert corrects the policy"
    )
    parser.add_argument("--chunk-length", type=run.positive_int, default=16, help="actions that are predicted at once")
    parser.add_argument("--executed-steps", type=run.positive_int, default=4, help="of these, before the next decision")
    parser.add_argument("--delay", type=int, default=0, help="real-time chunking: actions that are held fixed")
    parser.add_argument("--observation-steps", type=run.positive_int, default=2, help="that a decision sees")
    parser.add_argument("--dim", type=run.positive_int, default=128, help="width of the model")
    parser.add_argument("--depth", type=run.positive_int, default=4, help="its layers")
    parser.add_argument("--times", choices=("uniform", "beta"), default="beta", help="how training draws them")
    parser.add_argument("--solver-steps", type=run.positive_int, default=4, help="evaluations of the network")
    parser.add_argument(
        "--test-episodes",
        type=run.positive_int,
        help=f"in closed loop, at the end (a tenth of the steps, at most {MOST_TEST_EPISODES})",
    )
    run.add_common_arguments(parser, DEFAULTS, skip=NOT_FOR_POLICIES)
    args = parser.parse_args()

    config = config_from_arguments(args, DEFAULTS)
    for module in ("gym_pusht", "matplotlib", "PIL"):  # the last two are wanted at the end of the run
        run.optional(module, extra="policy")
    run.seed_everything(config.seed)
    policy = policy_from(args) if args.dagger is None else POLICIES[args.policy].from_pretrained(args.dagger)
    check_policy(policy, args)
    known = read_demonstrations(args)
    place = run.open_run(args, f"policy-{args.policy}-{args.observations}", device=config.device)
    check_resumed(place)
    started = time.monotonic()
    trained = train_in_rounds(args, config, policy, known, place)
    if trained is not None:
        score(trained, args, place.folder)
        trained.trainer.say(f"results in {place.folder} after {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    run_command(main)
