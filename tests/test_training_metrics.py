"""Figures of a run: what is counted, when the device is read, what a log and a table of metrics hold."""

import csv
import io
import re
import sys
from collections import defaultdict

import numpy
import pytest
import torch
from tiny import ragged_batch, tiny
from torch import nn, tensor
from tracked import tensorboard_events, trackio_run

from transfusion_pytorch import Sample, plain_formulas
from transfusion_pytorch.training import reporting, trackers
from transfusion_pytorch.training.flops import FlopCounter, MultipliedWeights, peak_flops
from transfusion_pytorch.training.losses import SpanLosses
from transfusion_pytorch.training.metrics import LossTable, RunningMeans, describe_bad_batch, means_of
from transfusion_pytorch.training.metrics_file import MetricsFile
from transfusion_pytorch.training.reporting import ProgressReporter
from transfusion_pytorch.training.trackers import AccelerateTracker, create_tracker

pytest.importorskip("psutil")


# running means


def test_running_means_are_weighted_and_start_again():
    means = RunningMeans()
    means.add({"loss": tensor(1.0, requires_grad=True), "time": 2.0})
    means.add({"loss": tensor(4.0), "text": tensor(3)}, count=tensor(2.0))
    means.add({"empty": tensor(5.0)}, count=0)
    assert means.read() == {"loss": 3.0, "time": 2.0, "text": 3.0}
    assert means.read() == {}
    means.add({"loss": tensor(7.0)})
    assert means.read() == {"loss": 7.0}


def test_low_precision_is_added_up_in_single():
    means = RunningMeans()
    for _ in range(1000):
        means.add({"loss": tensor(1.0, dtype=torch.bfloat16)})  # which itself has no 257
    assert means.read() == {"loss": 1.0}


def test_adding_reads_nothing_from_the_device():
    """Nobody can read from the meta device."""
    loss = torch.empty((), device="meta")
    means = RunningMeans()
    for _ in range(2):
        means.add({"loss": loss, "time": 1.0}, count=loss)
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        means.read()
    table = LossTable(2)
    m = dict(device="meta")
    index = torch.empty(3, dtype=torch.long, **m)
    text = torch.empty(2, **m)
    spans = SpanLosses(torch.empty(3, **m), index, torch.empty(3, **m), index, text, (None, None), ("a", None))
    table.add_spans(spans)
    table.add_spans(spans)
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        table.read_sums()


# loss tables


def described(batch):
    sources = ["web", None, "books"]
    return [Sample(parts, name=f"{i}.png", source=sources[i % 3]) for i, parts in enumerate(batch)]


def test_spans_are_counted_by_modality_quarter_and_source():
    losses = SpanLosses(
        flow=tensor([1.0, 2.0, 4.0, 8.0, 100.0]),
        modality=tensor([0, 0, 1, 0, 1]),
        time=tensor([0.0, 0.25, 0.3, 0.999, 1.0]),  # the last is a condition
        sample=tensor([0, 1, 1, 2, 2]),
        text=torch.zeros(3),
        names=(None, None, None),
        sources=("web", None, "web"),
    )
    expected = {
        "flow_0": 11 / 3,
        "flow_0/t_0.00-0.25": 1.0,
        "flow_0/t_0.25-0.50": 2.0,
        "flow_0/t_0.75-1.00": 8.0,
        "flow_0/source_web": 4.5,
        "flow_1": 4.0,
        "flow_1/t_0.25-0.50": 4.0,
    }
    table = LossTable(2)
    for _ in range(2):
        table.add_spans(losses)
        table.add_spans(losses)
        assert means_of(table.read_sums()) == pytest.approx(expected)
    table.add_spans(losses)
    table.add_spans(losses._replace(sources=("new", "web", "new"), flow=losses.flow * 3))
    assert means_of(table.read_sums())["flow_0/source_new"] == pytest.approx(3 * 4.5)
    assert means_of(table.read_sums()) == {}


def test_tables_of_several_processes_are_those_of_one():
    generator = torch.Generator().manual_seed(0)
    tables, whole = [LossTable(2), LossTable(2), LossTable(2)], LossTable(2)
    for table, sources in zip(tables, (("a", "b"), ("b", None)), strict=False):  # the third has nothing
        spans = SpanLosses(
            flow=torch.rand(5, generator=generator),
            modality=torch.randint(2, (5,), generator=generator),
            time=torch.rand(5, generator=generator),
            sample=torch.randint(2, (5,), generator=generator),
            text=torch.zeros(2),
            names=(None, None),
            sources=sources,
        )
        table.add_spans(spans)
        whole.add_spans(spans)
    together = means_of(*(table.read_sums() for table in tables))
    assert together == pytest.approx(means_of(whole.read_sums()))
    assert len(together) > 8


def test_the_table_of_a_model_agrees_with_its_losses():
    model = tiny().eval()
    batch = model.packer()(described(ragged_batch()))
    table = LossTable(2)
    with torch.no_grad():
        spans = model(batch, reduction="span", generator=torch.Generator().manual_seed(1))
        rows = model(batch, reduction="none", generator=torch.Generator().manual_seed(1))
        mean = model(batch, return_breakdown=True, generator=torch.Generator().manual_seed(1))[1]
    assert torch.equal(spans.text, rows.text)
    table.add(spans, batch)
    read = means_of(table.read_sums())
    assert read["text"] == pytest.approx(mean.text.item(), rel=1e-5)
    for kind in range(2):
        ours = spans.flow[spans.modality == kind]
        assert read[f"flow_{kind}"] == pytest.approx(ours.mean().item(), rel=1e-5)
    by_source = defaultdict(list)
    for sample, source in enumerate(batch.sources):
        targets = int((batch.targets.sample == sample).sum())
        by_source[source] += [rows.text[sample].item()] * targets
    for source, losses in by_source.items():
        if losses and source:
            assert read[f"text/source_{source}"] == pytest.approx(numpy.mean(losses), rel=1e-5)


# bad batches


def test_bad_samples_are_named():
    model = tiny(modality_encoder=(None, nn.Linear(2, 2)), modality_decoder=(None, nn.Linear(2, 2)))
    batch = model.packer()(described(ragged_batch()))
    assert describe_bad_batch(batch).startswith("the data of its samples are finite (sample 0 '0.png' of 'web', ")
    first, raw = batch.data[0], batch.data[1].raw[0]
    first.latents[-1, 0] = float("nan")  # the last span of modality 0
    raw.data[0].view(-1)[0] = float("inf")
    spans, placements = batch.stream.spans, batch.stream.placements
    last = int(spans.sample[placements[0].spans[first.order[-1]]])
    of_raw = int(spans.sample[placements[1].spans[raw.order[0]]])
    phrases = {(last, "has NaN in modality 0"), (of_raw, "has infinity in modality 1")}
    found = describe_bad_batch(batch).split("; ")
    assert len(found) == 2
    for phrase, (sample, what) in zip(found, sorted(phrases), strict=True):
        source = f" of '{batch.sources[sample]}'" if batch.sources[sample] else ""
        assert phrase == f"sample {sample} '{sample}.png'{source} {what}"


# FLOPs


@pytest.mark.parametrize("untied", [False, True, ["feedforward"]])
def test_flops_are_six_for_each_product_and_twelve_for_each_visible_key(untied):
    """Against what runs: rows of every linear layer, counted by hooks, and the dense mask."""
    model = tiny(trunk=dict(kv_heads=1, untied=untied)).eval()
    batch = model.packer()(ragged_batch())
    rows = defaultdict(int)

    def count(module, args, output):
        rows[module] += args[0].numel() // args[0].shape[-1]

    names = {module: name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for module in names:
        module.register_forward_hook(count)
    with plain_formulas(), torch.no_grad():
        model(batch)
    counted = sum(
        6 * module.weight.numel() * number for module, number in rows.items() if "positions" not in names[module]
    )
    made = FlopCounter(model)(batch)
    assert made.linear == counted
    visible = batch.stream.layout.prepare().intervals.dense().sum().item()
    assert made.attention == 12 * 2 * (2 * 8) * visible  # 2 layers, 2 heads of 8
    assert made.total == made.linear + made.attention


def test_padding_costs_nothing_and_frozen_autoencoders_are_left_out():
    model = tiny()
    plain, padded = (model.packer(**options)(ragged_batch()) for options in ({}, dict(token_budget=256)))
    count = FlopCounter(model)
    assert count(plain) == count(padded)
    encoded = tiny(modality_encoder=(nn.Linear(3, 3), None), modality_decoder=(nn.Linear(3, 3), None))
    assert MultipliedWeights.of(encoded) == MultipliedWeights.of(model)


def test_the_peak_of_a_device_is_known_by_its_name(monkeypatch):
    assert peak_flops("cpu") is None
    names = {"NVIDIA H100 PCIe": 756e12, "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA A100-SXM4-40GB": 312e12, "T4": None}
    for name, peak in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops("cuda") == peak


# progress


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def memory(monkeypatch):
    class Process:
        def memory_info(self):
            return type("Memory", (), {"rss": 3 * 2**29})

    monkeypatch.setattr(reporting, "_this_process", Process)


@pytest.mark.usefixtures("memory")
def test_a_log_has_a_line_now_and_then(monkeypatch):
    monkeypatch.setattr(reporting, "peak_flops", lambda device: 50.0)
    log, clock = io.StringIO(), Clock()
    with ProgressReporter(1012, initial=1000, processes=2, seconds=10, file=log, clock=clock) as progress:
        for step in range(12):
            clock.now += 60 if step == 0 else 4
            progress.update(
                {"loss": tensor(float(step)), "text": 1.0}, tokens=2000, samples=6, flops=100.0, learning_rate=3e-4
            )
            if step == 3:
                assert progress.figures == {
                    "loss": 2.0,
                    "text": 1.0,
                    "tokens_per_second": 500.0,
                    "samples_per_second": 1.5,
                    "mfu": 0.25,  # 25 FLOP/s of 2 times 50
                    "memory_gib": 1.5,
                    "learning_rate": 3e-4,
                }
        progress.write("a checkpoint")
    rates = "500 tokens/s  1.5 samples/s  MFU 25.0%  1.50 GiB  lr 3.0e-04"
    assert log.getvalue().splitlines() == [
        "step 1,001/1,012  loss 0  text 1  1.50 GiB  lr 3.0e-04",
        f"step 1,004/1,012  loss 2  text 1  {rates}  0:00:32 left",
        f"step 1,007/1,012  loss 5  text 1  {rates}  0:00:20 left",
        f"step 1,010/1,012  loss 8  text 1  {rates}  0:00:08 left",
        f"step 1,012/1,012  loss 10.5  text 1  {rates}  0:00:00 left",
        "a checkpoint",
    ]


@pytest.mark.usefixtures("memory")
def test_an_interrupted_run_shows_its_last_steps():
    log, clock = io.StringIO(), Clock()
    progress = ProgressReporter(100, file=log, clock=clock)
    for step in range(3):
        clock.now += 1
        progress.update({"loss": float(step)})
    progress.close()
    progress.close()
    assert [line.split("  ")[:2] for line in log.getvalue().splitlines()] == [
        ["step 1/100", "loss 0"],
        ["step 3/100", "loss 1.5"],
    ]


@pytest.mark.usefixtures("memory")
def test_the_device_is_read_no_more_often_than_a_line_is_written(monkeypatch):
    reads, read = [], RunningMeans.read
    monkeypatch.setattr(RunningMeans, "read", lambda self: reads.append(1) or read(self))
    log, clock = io.StringIO(), Clock()
    with ProgressReporter(1000, file=log, clock=clock) as progress:
        for _ in range(1000):
            clock.now += 0.1
            progress.update({"loss": tensor(1.0)})
    assert len(reads) == len(log.getvalue().splitlines()) == 11  # the first, one every 10 s, and the last


@pytest.mark.usefixtures("memory")
def test_a_terminal_has_a_bar():
    pytest.importorskip("tqdm")
    terminal, clock = Terminal(), Clock()
    with ProgressReporter(5, initial=2, file=terminal, clock=clock) as progress:
        for step in range(3):
            clock.now += 2
            progress.update({"loss": float(step)}, tokens=100)
        progress.write("saved")
    seen = terminal.getvalue()
    assert "5/5" in seen
    assert "loss 2  50 tokens/s  1.50 GiB" in seen
    assert re.search(r"^saved$", seen.replace("\r", "\n"), flags=re.MULTILINE)


def test_other_processes_are_silent():
    log = Terminal()
    with ProgressReporter(3, file=log, is_main=False) as progress:
        progress.update({"loss": torch.empty((), device="meta")}, tokens=1)
        progress.write("nothing")
    assert log.getvalue() == ""


def test_memory_of_a_process_is_that_which_it_has():
    log = io.StringIO()
    with ProgressReporter(1, file=log) as progress:
        progress.update({})
    assert 0.05 < progress.figures["memory_gib"] < 100


@pytest.mark.parametrize(("package", "file"), [("tqdm", Terminal()), ("psutil", io.StringIO())])
def test_what_is_missing_is_named(monkeypatch, package, file):
    monkeypatch.setitem(sys.modules, package, None)
    message = rf'{package}, which is not installed: pip install "transfusion-pytorch\[train\]"'
    with pytest.raises(ImportError, match=message):
        ProgressReporter(1, file=file)


# metrics.csv


def table_of(path):
    with path.open(newline="") as file:
        return list(csv.reader(file))


def log_steps(file, start, stop):
    """A loss each step, a validation loss at each fifth, a surprise in step 8 alone."""
    for step in range(start, stop):
        row = {"loss": step / 3}
        if step % 5 == 0:
            row["validation, mean"] = step * 1e-20
        if step == 8:
            row["surprise"] = 'a "b"\nc'
        file.append(step, row)


def test_rows_are_on_the_disk_at_once_and_columns_may_come_later(tmp_path):
    file = MetricsFile(tmp_path / "run" / "metrics.csv")
    assert table_of(file.path) == [["step"]]
    file.append(1, {"loss": 0.1, "text": None})
    assert table_of(file.path) == [["step", "loss", "text"], ["1", "0.1", ""]]
    file.append(2, {"other": 3, "loss": float("nan")})
    assert table_of(file.path) == [["step", "loss", "text", "other"], ["1", "0.1", "", ""], ["2", "nan", "", "3"]]
    file.append(3, {})
    assert table_of(file.path)[-1] == ["3", "", "", ""]
    assert [path.name for path in file.path.parent.iterdir()] == ["metrics.csv"]


@pytest.mark.parametrize("checkpoint", range(14))
def test_a_resumed_run_writes_the_table_of_an_undisturbed_one(tmp_path, checkpoint):
    undisturbed = MetricsFile(tmp_path / "undisturbed.csv")
    log_steps(undisturbed, 1, 21)
    path = tmp_path / "metrics.csv"
    log_steps(MetricsFile(path), 1, 13)
    with path.open("a") as file:
        file.write("13,4.33")  # killed while it wrote
    resumed = MetricsFile(path, resumed_step=checkpoint)
    header, *rows = table_of(path)
    assert [row[0] for row in rows] == [str(step) for step in range(1, min(checkpoint, 12) + 1)]
    assert ("surprise" in header) == (checkpoint >= 8)
    log_steps(resumed, min(checkpoint, 12) + 1, 21)
    assert path.read_bytes() == undisturbed.path.read_bytes()


def test_a_run_without_a_file_starts_one_and_a_new_run_starts_anew(tmp_path):
    path = tmp_path / "metrics.csv"
    MetricsFile(path, resumed_step=7).append(8, {"loss": 1.0})
    assert table_of(path) == [["step", "loss"], ["8", "1.0"]]
    MetricsFile(path)
    assert table_of(path) == [["step"]]


@pytest.mark.parametrize("content", ["epoch,loss\n1,2\n", "step,loss\none,2\n"])
def test_a_file_that_is_something_else_is_refused(tmp_path, content):
    path = tmp_path / "metrics.csv"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"metrics\.csv is not the metrics of a run"):
        MetricsFile(path, resumed_step=1)
    assert path.read_text() == content


# trackers


def test_an_unknown_tracker_names_those_known(tmp_path):
    with pytest.raises(ValueError, match="unknown tracker 'mlfow'; there are trackio, tensorboard, wandb"):
        create_tracker("mlfow", project="p", run="r", folder=tmp_path)


@pytest.mark.parametrize(
    ("name", "package"), [("trackio", "trackio"), ("tensorboard", "tensorboard"), ("wandb", "accelerate")]
)
def test_a_tracker_that_is_not_installed_says_what_to_install(tmp_path, monkeypatch, name, package):
    monkeypatch.setattr(trackers, "find_spec", lambda wanted: None if wanted == package else wanted)
    with pytest.raises(ImportError, match=rf"'{name}' needs {package}, .*pip install .*\[train\]\" {name}"):
        create_tracker(name, project="p", run="r", folder=tmp_path)


GRID = numpy.arange(4 * 6 * 3, dtype=numpy.uint8).reshape(4, 6, 3)
CONFIG = {"steps": 10, "lr": 1e-3, "sizes": (4, 4), "none": None, "folder": "x"}


def track(name, folder):
    """Two steps and a picture; then the run goes on."""
    tracker = create_tracker(name, project="digits", run="one", folder=folder, config=CONFIG)
    tracker.log({"loss": 1.5, "flow_0": tensor(0.5), "samples": torch.from_numpy(GRID)}, step=3)
    tracker.log({"samples": GRID}, step=4)
    tracker.finish()
    again = create_tracker(name, project="digits", run="one", folder=folder, config=CONFIG)
    again.log({"loss": 1.25}, step=5)
    again.finish()


def test_tensorboard_gets_numbers_and_pictures(tmp_path):
    pytest.importorskip("accelerate")
    pytest.importorskip("tensorboard")
    track("tensorboard", tmp_path)
    events = tensorboard_events(tmp_path / "digits" / "one")
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(3, 1.5), (5, 1.25)]
    assert [(event.step, event.value) for event in events.Scalars("flow_0")] == [(3, 0.5)]
    assert [image.step for image in events.Images("samples")] == [3, 4]
    Image = pytest.importorskip("PIL.Image")
    picture = Image.open(io.BytesIO(events.Images("samples")[0].encoded_image_string))
    assert numpy.array_equal(numpy.array(picture), GRID)


def test_trackio_gets_numbers_and_pictures(tmp_path):
    logged, [config, *_] = trackio_run("import test_training_metrics as tests; tests.track('trackio', '.')", tmp_path)
    assert logged[0] == ("one", 3, {"loss": 1.5, "flow_0": 0.5})
    assert logged[-1] == ("one", 5, {"loss": 1.25})
    pictures = [(it.step, it.values["samples"]["file_path"]) for it in logged if "samples" in it.values]
    assert [step for step, _ in pictures] == [3, 4]
    for _, path in pictures:
        picture = pytest.importorskip("PIL.Image").open(tmp_path / "trackio" / "media" / path)
        assert numpy.array_equal(numpy.array(picture)[..., :3], GRID)
    assert config["sizes"] == "[4, 4]"


class Recorder:
    """Stands in for one of accelerate's trackers."""

    def __init__(self):
        self.calls = []

    def log(self, values, step):
        self.calls.append(("log", values, step))

    def log_images(self, values, step):
        self.calls.append(
            ("images", {name: [image.shape for image in images] for name, images in values.items()}, step)
        )


def test_wandb_gets_lists_of_pictures():
    recorder = Recorder()
    AccelerateTracker(recorder, trackers.IMAGE_LOGGERS["wandb"]).log({"a": 1, "b": tensor(2.0), "grid": GRID}, step=7)
    assert recorder.calls == [("log", {"a": 1.0, "b": 2.0}, 7), ("images", {"grid": [(4, 6, 3)]}, 7)]


@pytest.mark.parametrize("image", [GRID.astype(float), GRID[..., :1], torch.zeros(2, 3), torch.zeros(3, 4, 6)])
def test_what_is_no_image_is_refused(image):
    recorder = Recorder()
    with pytest.raises(ValueError, match=r"'grid': an image is \(height, width, 3\) of uint8, got \("):
        AccelerateTracker(recorder, trackers.IMAGE_LOGGERS["wandb"]).log({"loss": 1.0, "grid": image}, step=1)
    assert recorder.calls == []
