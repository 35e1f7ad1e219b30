"""The trainer: equal to a loop written by hand, to itself when it is resumed, and to itself on more processes."""

import csv
import os
import re
import signal
import sys
import threading
from dataclasses import replace

import pytest
import torch
from checks import no_typecheck
from tiny import CHANNELS, NUM_TEXT, tiny
from torch import tensor
from torch.utils.data import Dataset, IterableDataset

from transfusion_pytorch import Callback, Condition, Mixture, SampleError, TrainConfig, Trainer, TrainingError
from transfusion_pytorch.data.order import seed_of

CONFIG = TrainConfig(steps=12, batch_size=4, log_every=1, validate_every=4, save_every=5, details_every=6, device="cpu")


def samples(count: int = 40) -> list:
    """Text and both modalities, of several lengths."""
    generator = torch.Generator().manual_seed(5)

    def latents(*shape):
        return torch.randn(*shape, generator=generator)

    kinds = [
        lambda i: [tensor([i % NUM_TEXT]), latents(2, 2, CHANNELS[0])],
        lambda i: [(1, latents(1 + i % 3, CHANNELS[1])), tensor([1, 2, i % NUM_TEXT])],
        lambda i: [torch.arange(1 + i % 5)],
    ]
    return [kinds[i % 3](i) for i in range(count)]


def fresh_model(**options):
    torch.manual_seed(1)
    return tiny(**options)


def trainer(folder, config=CONFIG, *, data=None, model=None, **options):
    if config.optimizer == "muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    model = fresh_model() if model is None else model
    return Trainer(model, samples() if data is None else data, config, folder=folder, **options)


def weights(model) -> dict:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal_states(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def rows(folder) -> list[dict]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


class Poisoned(Dataset):
    """One sample has latents that are fine by themselves, and whose loss is not finite."""

    def __init__(self, value=1e30):
        self.samples, self.value = samples(), value

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        if index == 21:
            return [tensor([0]), torch.full((2, 2, CHANNELS[0]), self.value)]
        return self.samples[index]

    def describe(self, index):
        return f"photo-{index}.png"


class StopAt(Callback):
    """Raises, or sends a signal, after so many steps."""

    def __init__(self, step, signal_number=None):
        self.at, self.signal = step, signal_number

    def on_step(self, trainer, losses):
        if trainer.step == self.at:
            if self.signal is None:
                raise RuntimeError("pulled the plug")
            os.kill(os.getpid(), self.signal)


def test_a_run_is_the_loop_that_one_would_write(tmp_path):
    config = replace(CONFIG, ema_beta=None, schedule="constant", warmup=0, cooldown=0.0, clip=None)
    model = fresh_model()
    run = trainer(tmp_path, config, model=model)
    run.fit()

    by_hand = fresh_model().train()
    groups = by_hand.parameter_groups(weight_decay=config.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)
    pack, mixture, data = by_hand.packer(), run.loader.plan.mixture, samples()
    for step in range(12):
        positions = range(4 * step, 4 * step + 4)
        chosen = [data[mixture.reference(position, seed=0).index] for position in positions]
        batch = pack(chosen, seeds=[seed_of(0, "draws", position) for position in positions])
        by_hand(batch).backward()
        for parameter in by_hand.parameters():  # a modality that the batch lacks: as with several processes
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        optimizer.step()
        optimizer.zero_grad()
    assert_equal_states(weights(model), weights(by_hand))


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(num_workers=2),
        dict(accumulation=2, precision="bf16"),
        dict(batch_size=None, token_budget=40, packs_per_step=2),
        dict(optimizer="muon", velocity_consistency=True),
    ],
    ids=["plain", "workers", "accumulation", "packed", "muon"],
)
def test_a_resumed_run_is_the_undisturbed_one_to_the_bit(tmp_path, options):
    """Stopped between two checkpoints, in the middle of an epoch; dropout draws from torch's own random numbers."""
    config, dropout = replace(CONFIG, **options), dict(trunk=dict(dropout=0.1))

    def run(name, **given):
        return trainer(tmp_path / name, config, model=fresh_model(**dropout), validation=samples(7), **given)

    whole = run("whole")
    end = whole.fit()
    with pytest.raises(RuntimeError, match="pulled the plug"):
        run("cut", callbacks=[StopAt(8)]).fit()
    torch.manual_seed(99)  # a new process stands somewhere else
    again = run("cut")
    assert again.fit(resume=True) == end
    assert_equal_states(weights(again.model), weights(whole.model))
    assert_equal_states(weights(again.average), weights(whole.average))
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    assert [int(row["step"]) for row in rows(tmp_path / "whole")] == list(range(1, 13))


def poisoned_gradient(model, at: int, value: float = torch.nan):
    """The gradient of one matrix is not finite in one step."""
    calls = [0]

    def hook(gradient):
        calls[0] += 1
        return torch.full_like(gradient, value) if calls[0] == at else gradient

    model.muon_parameters()[0].register_hook(hook)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_no_optimizer_steps_where_one_gradient_is_not_finite(tmp_path, value):
    """With float16 the scaler looks at each optimizer by itself, and clipping has spoilt all gradients."""
    model = fresh_model()
    poisoned_gradient(model, at=5, value=value)
    run = trainer(tmp_path, replace(CONFIG, optimizer="muon", precision="fp16"), model=model)
    run.fit()
    for each in (run.model, run.average):
        assert all(tensor.isfinite().all() for tensor in each.state_dict().values())


@pytest.mark.parametrize("options", [dict(precision="fp16"), dict(precision="fp16", explosion=3.0)])
def test_float16_leaves_out_and_names_bad_steps_too(tmp_path, capfd, options):
    poison = 30.0 if "explosion" in options else 1e30
    config = replace(CONFIG, steps=80, details_every=0, save_every=0, validate_every=0, **options)
    assert trainer(tmp_path, config, data=Poisoned(poison)).fit().step == 80
    assert "data[21]" in capfd.readouterr().err
    assert all("nan" not in row["loss"] for row in rows(tmp_path))


def test_a_run_that_trains_nothing_any_more_stops(tmp_path):
    model = fresh_model()
    with torch.no_grad():
        model.to_logits.weight.fill_(torch.nan)
    with pytest.raises(TrainingError, match="50 steps in a row were left out, nothing is trained now"):
        trainer(tmp_path, replace(CONFIG, steps=100), model=model).fit()
    bad = [[tensor([0]), torch.full((2, 2, CHANNELS[0]), torch.nan)]] * 8
    with pytest.raises(TrainingError, match="every sample of it was left out"):
        trainer(tmp_path / "bad", replace(CONFIG, steps=100, on_bad_sample="skip"), data=bad).fit()


def test_gradients_that_stay_long_are_the_new_normal(tmp_path, capfd):
    easy, hard = [[torch.arange(1)]] * 160, [[tensor([0]), torch.full((2, 2, CHANNELS[0]), 300.0)]] * 160
    config = replace(CONFIG, steps=80, explosion=5.0, save_every=0, validate_every=0, details_every=0)
    trainer(tmp_path, config, data=Mixture({"data": easy + hard}, shuffle=False)).fit()
    assert 1 <= capfd.readouterr().err.count("step left out") <= 12


class Fragile(Poisoned):
    """One sample cannot be loaded."""

    def __getitem__(self, index):
        if index == 21:
            raise OSError("the disk is gone")
        return self.samples[index]


@pytest.mark.parametrize("options", [{}, dict(num_workers=1), dict(batch_size=None, token_budget=40)])
def test_a_sample_that_cannot_be_loaded_is_left_out_on_request(tmp_path, capfd, options):
    config = replace(CONFIG, on_bad_sample="skip", **options)
    assert trainer(tmp_path / "skip", config, data=Fragile()).fit().step == 12
    told = re.findall("left out: (.*)", capfd.readouterr().err)
    assert set(told[:9]) == {"data[21]: photo-21.png: could not be loaded: OSError: the disk is gone"}
    with pytest.raises(
        SampleError, match=r"source 'data', index 21 \(photo-21.png\): could not be loaded.*the disk is gone"
    ):
        trainer(tmp_path / "stop", replace(config, on_bad_sample="stop"), data=Fragile()).fit()


def test_gradients_of_others_do_not_count(tmp_path):
    states = []
    for name in ("with", "without"):
        model = fresh_model()
        if name == "with":
            model(samples(3)).backward()
        trainer(tmp_path / name, model=model).fit()
        states.append(weights(model))
    assert_equal_states(*states)


def test_other_options_hold_from_the_checkpoint_on_and_are_told(tmp_path, capsys):
    with pytest.raises(RuntimeError, match="pulled the plug"):
        trainer(tmp_path, callbacks=[StopAt(8)]).fit()
    again = trainer(tmp_path, replace(CONFIG, learning_rate=1e-5, beta1=0.5, weight_decay=0.2))
    again.fit(resume=True)
    told = capsys.readouterr().out
    assert (
        "resumed with other options: learning_rate 0.001 -> 1e-05, beta1 0.9 -> 0.5, weight_decay 0.05 -> 0.2" in told
    )
    group = again._train_step.optimizers["adamw"].param_groups[0]
    assert (group["betas"], group["weight_decay"], group["peak_lr"]) == ((0.5, 0.99), 0.2, 1e-5)


def test_the_best_checkpoint_has_the_losses_of_its_own_weights(tmp_path):
    run = trainer(tmp_path, replace(CONFIG, validate_every=4, save_every=5, keep_last=9), validation=samples(5))
    run.fit()
    figures = {info.step: info.figures for info in run._checkpoints().infos()}
    assert figures[5] == figures[10] == {}
    assert figures[12] == run.figures == run.validate()


def test_without_validation_the_figures_are_the_last_training_losses(tmp_path):
    fitted = trainer(tmp_path).fit()
    assert fitted.figures["loss"] == float(rows(tmp_path)[-1]["loss"])


def test_rows_of_metrics_span_checkpoints(tmp_path):
    """A row is a mean over steps before and after the one that is resumed from."""
    config = replace(CONFIG, log_every=6)
    trainer(tmp_path / "whole", config).fit()
    with pytest.raises(RuntimeError, match="pulled the plug"):
        trainer(tmp_path / "cut", config, callbacks=[StopAt(8)]).fit()
    trainer(tmp_path / "cut", config).fit(resume=tmp_path / "cut")
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")


def test_numbers_of_samples_are_in_the_metrics(tmp_path):
    class Scores(Callback):
        def on_sample(self, trainer):
            return {"drawn as asked": 0.5, "grid": torch.zeros(2, 2, 3, dtype=torch.uint8)}

    trainer(tmp_path, replace(CONFIG, sample_every=0), callbacks=[Scores()]).fit()
    assert rows(tmp_path)[-1]["samples/drawn as asked"] == "0.5"


def test_what_is_not_trained_is_no_error(tmp_path):
    model = fresh_model()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        trainer(tmp_path, model=model)
    for parameter in model.muon_parameters() or model.transformer.parameters():
        parameter.requires_grad_(True)
    trainer(tmp_path, replace(CONFIG, optimizer="muon"), model=model).fit()


def test_validation_needs_something_to_predict(tmp_path):
    bad = [[tensor([0]), torch.full((2, 2, CHANNELS[0]), torch.nan)]] * 3
    run = trainer(tmp_path, replace(CONFIG, on_bad_sample="skip"), validation=bad)
    with pytest.raises(ValueError, match="nothing to predict"):
        run.validate()
    with pytest.raises(TypeError, match="validation data are a list or a dataset with a length, got Stream"):
        trainer(tmp_path, validation=Stream())


class Stream(IterableDataset):
    """Numbers, of which samples are made when they are read."""

    def __iter__(self):
        return iter(range(40))


def from_number(number: int, generator: torch.Generator) -> list:
    noise = torch.randn(2, 2, CHANNELS[0], generator=generator)
    return [tensor([number % NUM_TEXT]), noise]


@pytest.mark.parametrize("options", [{}, dict(num_workers=1), dict(batch_size=None, token_budget=40)])
def test_a_stream_is_trained_on_and_resumed_to_the_bit(tmp_path, options):
    config = replace(CONFIG, **options)

    def run(name, **given):
        return trainer(tmp_path / name, config, data=Stream(), prepare=from_number, **given)

    whole = run("whole")
    whole.fit()
    with pytest.raises(RuntimeError, match="pulled the plug"):
        run("cut", callbacks=[StopAt(8)]).fit()
    again = run("cut")
    again.fit(resume=True)
    assert_equal_states(weights(again.model), weights(whole.model))
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")


def test_the_fill_of_the_token_budget_is_known(tmp_path):
    packed = trainer(tmp_path / "packed", replace(CONFIG, batch_size=None, token_budget=40))
    assert packed.fill is None
    packed.fit()
    assert 0.8 < packed.fill <= 1
    plain = trainer(tmp_path / "plain")
    plain.fit()
    assert plain.fill is None


def test_prepare_goes_with_streams(tmp_path):
    with pytest.raises(ValueError, match="prepare goes with data that can only be iterated over, got a list"):
        trainer(tmp_path, prepare=from_number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_leaves(tmp_path, capfd, number):
    fitted = trainer(tmp_path, callbacks=[StopAt(3, number)]).fit()
    assert fitted.was_stopped
    assert fitted.step == 3
    assert f"stopped by {number.name}: step 3 is saved" in capfd.readouterr().err
    assert signal.getsignal(number) is not None
    again = trainer(tmp_path)
    assert again.fit(resume=True).step == 12
    whole = trainer(tmp_path / "whole")
    whole.fit()
    assert_equal_states(weights(again.model), weights(whole.model))


def test_it_runs_in_another_thread(tmp_path):
    """Where Python allows no signal handlers."""
    ended = []
    thread = threading.Thread(target=lambda: ended.append(trainer(tmp_path).fit()))
    thread.start()
    thread.join()
    assert ended[0].step == 12


def test_accumulation_is_one_large_batch(tmp_path):
    states = []
    for accumulation in (1, 3):
        model = fresh_model().double()
        trainer(tmp_path / str(accumulation), replace(CONFIG, accumulation=accumulation), model=model).fit()
        states.append(weights(model))
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-6, atol=1e-8)


def test_a_step_that_is_not_finite_is_left_out_and_named(tmp_path, capfd):
    run = trainer(tmp_path, data=Poisoned())
    run.fit()
    told = capfd.readouterr().err
    assert told.count("step left out:") == 1
    assert "the gradient is not finite" in told
    assert "data[21]" in told
    for model in (run.model, run.average):
        assert all(value.isfinite().all() for value in model.state_dict().values())


def test_a_step_that_is_not_finite_stops_the_run_on_request(tmp_path):
    with pytest.raises(TrainingError, match=r"step \d+: the gradient is not finite.*data\[21\].*on_bad_step='skip'"):
        trainer(tmp_path, replace(CONFIG, on_bad_step="stop"), data=Poisoned()).fit()


def test_a_gradient_that_explodes_is_left_out(tmp_path, capfd):
    config = replace(CONFIG, steps=40, explosion=20.0, validate_every=100, save_every=0)
    trainer(tmp_path, config, data=Poisoned(1e4), model=fresh_model(flow_loss_weight=1.0)).fit()
    told = capfd.readouterr().err
    assert "the gradient explodes: its length is" in told
    assert "data[21]" in told


def test_a_sample_that_cannot_be_packed_is_named(tmp_path):
    with pytest.raises(SampleError, match=r"^source 'data', index 21: .*(NaN|infinity|finite)"):
        trainer(tmp_path, data=Poisoned(torch.nan)).fit()


def test_a_sample_that_cannot_be_packed_is_left_out_on_request(tmp_path, capfd):
    fitted = trainer(tmp_path, replace(CONFIG, on_bad_sample="skip"), data=Poisoned(torch.nan)).fit()
    assert fitted.step == 12
    (told,) = re.findall("left out: (.*)", capfd.readouterr().err)
    assert told.startswith("data[21]: sample 0")
    assert told.count("21") == 1


def test_validation_is_the_same_whenever_it_is_asked(tmp_path):
    """The same times and noise for any state of the random numbers, any batch size, and in evaluation."""
    run = trainer(tmp_path, validation=samples(9))
    first = run.validate()
    torch.manual_seed(3)
    assert run.validate() == first
    run.validation.batch_size = 2
    assert run.validate() == pytest.approx(first, rel=1e-5)
    assert set(first) == {"loss", "text", "flow_0", "flow_1"}
    weights_of = run.model.loss_weights
    assert first["loss"] == pytest.approx(weights_of.text * first["text"] + first["flow_0"] + first["flow_1"])
    assert run.model.training


def test_metrics_tell_of_sources_and_times(tmp_path):
    data = Mixture({"web": samples(12), "books": [[tensor([1, 2, 3])]] * 12})
    trainer(tmp_path, replace(CONFIG, batch_size=16, details_every=2), data=data).fit()
    [row] = [row for row in rows(tmp_path) if row["step"] == "2"]
    assert float(row["details/text/source_books"]) > 0
    assert float(row["details/flow_0/source_web"]) > 0
    assert {name.partition("/t_")[2] for name in row if "/t_" in name} <= {
        "0.00-0.25",
        "0.25-0.50",
        "0.50-0.75",
        "0.75-1.00",
    }


def test_losses_that_the_data_cannot_have_are_neither_printed_nor_written(tmp_path, capfd):
    """A model has a modality even if it is only to write, and says nothing of it then."""
    text = [[torch.arange(1 + i % 5)] for i in range(12)]
    trainer(tmp_path / "text", data=text, validation=text[:3]).fit()
    assert "flow" not in capfd.readouterr().err
    columns = [name for name in rows(tmp_path / "text")[-1] if "/" not in name]
    assert columns == ["step", "loss", "text", "gradient_norm", "learning_rate"]
    pictures = [[torch.randn(2, 2, CHANNELS[0])]] * 8
    trainer(tmp_path / "flow", data=pictures, model=fresh_model(num_text_tokens=0)).fit()
    assert not {"flow_1", "velocity_0", "recon_0"} & set(rows(tmp_path / "flow")[-1])
    read = [[Condition(torch.randn(2, 2, CHANNELS[0])), tensor([1])]] * 8
    trainer(tmp_path / "read", data=read).fit()
    assert "flow_0" not in rows(tmp_path / "read")[-1]


def test_a_loss_is_the_mean_over_the_steps_that_have_it(tmp_path):
    """Steps of text alone, then of both: the column comes with the first of them, and stays."""
    text, both = [[tensor([1, 2])]] * 16, [[tensor([1]), torch.randn(2, 2, CHANNELS[0])]] * 16

    class Losses(Callback):
        def __init__(self):
            self.seen = []

        def on_step(self, trainer, losses):
            self.seen.append({name: value.item() for name, value in losses.items()})

    data, seen = Mixture({"data": text + both}, shuffle=False), Losses()
    trainer(tmp_path, replace(CONFIG, steps=8, log_every=3, details_every=0), data=data, callbacks=[seen]).fit()
    assert ["flow_0" in losses for losses in seen.seen] == [False] * 4 + [True] * 4
    first, second, last = rows(tmp_path)
    assert first["flow_0"] == ""
    for row, steps in ((second, seen.seen[4:6]), (last, seen.seen[6:])):
        mean = sum(losses["flow_0"] for losses in steps) / len(steps)
        assert float(row["flow_0"]) == pytest.approx(mean, rel=1e-6)


def test_details_take_one_forward_pass(tmp_path):
    calls = []
    model = fresh_model()
    model.transformer.register_forward_hook(lambda module, *values: calls.append(module.training))
    trainer(tmp_path, replace(CONFIG, steps=1, details_every=1), model=model).fit()
    assert calls == [True, False]
    assert {"details/text", "details/flow_0"} <= set(rows(tmp_path)[-1])


def test_callbacks_see_the_run(tmp_path):
    class Seen(Callback):
        def __init__(self):
            self.calls = []

        def on_start(self, trainer):
            self.calls.append(("start", trainer.step))

        def on_validation(self, trainer, figures):
            self.calls.append(("validation", trainer.step))

        def on_sample(self, trainer):
            self.calls.append(("sample", trainer.step))
            assert not trainer.average.training
            assert not torch.is_grad_enabled()
            return {"quality": 1.0}

        def on_save(self, trainer, path):
            assert path.is_dir()
            self.calls.append(("save", trainer.step))

        def on_end(self, trainer):
            self.calls.append(("end", trainer.step))

    seen = Seen()
    trainer(tmp_path, replace(CONFIG, sample_every=6), callbacks=[seen], validation=samples(3)).fit()
    expected = [("start", 0), ("validation", 4), ("save", 5), ("sample", 6), ("validation", 8), ("save", 10)]
    assert seen.calls == [*expected, ("validation", 12), ("sample", 12), ("save", 12), ("end", 12)]


def test_a_folder_with_a_run_is_not_written_over(tmp_path):
    trainer(tmp_path).fit()
    with pytest.raises(FileExistsError, match="has checkpoints of a run: resume it"):
        trainer(tmp_path).fit()
    assert trainer(tmp_path).fit(resume=True).step == 12


def test_a_run_goes_on_from_any_of_its_checkpoints(tmp_path):
    whole = trainer(tmp_path)
    whole.fit()
    again = trainer(tmp_path)
    again.fit(resume=tmp_path / "checkpoints" / "step-00000010")
    assert_equal_states(weights(again.model), weights(whole.model))


def test_a_run_of_another_model_is_refused(tmp_path):
    trainer(tmp_path).fit()
    with pytest.raises(ValueError, match="belongs to another model than this one"):
        trainer(tmp_path, model=tiny(trunk=dict(depth=3))).fit(resume=True)


def test_a_run_on_other_data_is_refused(tmp_path):
    trainer(tmp_path).fit()
    with pytest.raises(ValueError, match=r"order of samples differs.*sizes was \{'data': 40\} and is \{'data': 41\}"):
        trainer(tmp_path, data=samples(41)).fit(resume=True)


@pytest.mark.parametrize("options", [dict(optimizer="muon"), dict(ema_beta=None), dict()])
def test_a_run_with_other_options_is_refused(tmp_path, options):
    trainer(tmp_path, replace(CONFIG, ema_beta=None) if not options else CONFIG).fit()
    if options == dict(ema_beta=None):  # what is not used is left in the checkpoint
        assert trainer(tmp_path, replace(CONFIG, **options)).fit(resume=True).step == 12
        return
    with pytest.raises(ValueError, match=r"has no (muon|ema), only .*resume with the options of the run"):
        trainer(tmp_path, replace(CONFIG, **options)).fit(resume=True)


def test_epochs_are_steps(tmp_path):
    run = trainer(tmp_path, replace(CONFIG, steps=None, epochs=2))
    assert run.config.steps == 20
    assert run.fit().step == 20


def test_without_validation_data_nothing_can_be_validated(tmp_path):
    with pytest.raises(ValueError, match="give Trainer"):
        trainer(tmp_path).validate()


def test_without_accelerate_an_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ImportError, match=r"transfusion-pytorch\[train\]"):
        trainer(tmp_path)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(steps=1, epochs=1), ValueError, "steps or epochs, not both"),
        (dict(steps=0), ValueError, "steps must be positive, got 0"),
        (dict(batch_size=4, token_budget=100), ValueError, "batch_size or token_budget, not both"),
        (dict(token_budget=100, accumulation=2), ValueError, "set packs_per_step"),
        (dict(packs_per_step=2), ValueError, "packs_per_step goes with a token_budget"),
        (dict(compile=True), ValueError, "compile needs a token_budget"),
        (dict(warmup=-1), ValueError, "warmup must not be negative"),
        (dict(cooldown=1.5), ValueError, "cooldown must lie between 0 and 1"),
        (dict(velocity_consistency=True, ema_beta=None), ValueError, "needs a moving average"),
        (dict(keep_last=True), TypeError, "keep_last must be a whole number"),
        pytest.param(dict(steps=1.5), TypeError, "steps must be a whole number or none, got 1.5", marks=no_typecheck),
        pytest.param(
            dict(optimizer="sgd"), TypeError, "optimizer must be 'adamw' or 'muon', got 'sgd'", marks=no_typecheck
        ),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        TrainConfig(**options)
