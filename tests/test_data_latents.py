"""Latents made once: the same as the model would make, kept until the data or an encoder change."""

import io
import pickle

import pytest
import torch
from checks import no_typecheck
from PIL import Image
from tiny import tiny
from torch import nn, tensor

from transfusion_pytorch import (
    Condition,
    DataPlan,
    Latents,
    Sample,
    SampleError,
    SkipSample,
    StepLoader,
    WithCleanCopy,
)
from transfusion_pytorch.data import latents
from transfusion_pytorch.data.captioned import CaptionedImages
from transfusion_pytorch.data.images import ImageReader
from transfusion_pytorch.data.latents import cache_latents
from transfusion_pytorch.saving.files import PARTIAL


class Encoder(nn.Module):
    def __init__(self, scale=1.0):
        super().__init__()
        self.convolution, self.scale, self._calls = nn.Conv2d(3, 4, 2, stride=2), scale, []

    def forward(self, images):
        self._calls.append(len(images))
        return self.convolution(images) * self.scale


class Drawn(Encoder):
    def forward(self, images):
        return torch.distributions.Normal(super().forward(images), 1.0)


class Data(torch.utils.data.Dataset):
    """Whole samples: text, an image and a vector; the last is broken."""

    def __init__(self, size=7, key="key"):
        generator = torch.Generator().manual_seed(3)
        self.images = [torch.randn(3, 4, 4 + 2 * (i % 2), generator=generator) for i in range(size)]
        self.key = key

    def __len__(self):
        return len(self.images) + 1

    def __getitem__(self, index):
        if index == len(self.images):
            raise SkipSample("broken")
        parts = [tensor([index, 1]), self.images[index], Condition((1, torch.full((1, 2), float(index))))]
        return Sample(parts, name=f"n{index}", weight=2.0) if index else parts

    def fingerprint(self):
        return self.key


def model_with(encoder):
    torch.manual_seed(0)
    for parameter in encoder.parameters():
        nn.init.normal_(parameter)
    return tiny(
        dim_latent=(4, 2), modality_encoder=(encoder, None), channel_first_latent=(True, False), modality_num_dim=(2, 1)
    )


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    monkeypatch.setattr(latents, "SHARD_SIZE", 3)


def test_cached_latents_are_those_of_the_encoder(tmp_path):
    model = model_with(Encoder())
    cached = cache_latents(Data(), model, tmp_path, batch_size=2)
    assert len(cached) == 8
    for index in range(7):
        text, image, vector = cached[index].parts
        assert text.tolist() == [index, 1]
        assert isinstance(image, Latents)
        expected = model.modalities[0].encoder(Data().images[index][None])[0]
        assert torch.allclose(image.latents, expected, atol=1e-5)
        assert isinstance(vector, Condition)
        assert vector.part.latents.tolist() == [[index, index]]
    assert (cached[1].name, cached[1].weight, cached[0].weight) == ("n1", 2.0, 1.0)
    with pytest.raises(SkipSample, match="broken"):
        cached[7]


def test_a_model_reads_latents_as_it_reads_the_data(tmp_path):
    model = model_with(Encoder()).eval()
    cached = cache_latents(Data(), model, tmp_path)
    read = [model([data[2], data[1]], return_loss=False) for data in (Data(), cached)]
    assert torch.allclose(*read, atol=1e-5)


def test_cached_latents_keep_what_is_said_of_a_part(tmp_path):
    class Marked(Data):
        def __getitem__(self, index):
            image = self.images[index % len(self.images)]
            return Sample([WithCleanCopy(image), Condition(image), image, tensor([1])])

    made = cache_latents(Marked(), model_with(Encoder()), tmp_path)[2].parts
    assert [type(part) for part in made] == [WithCleanCopy, Condition, Latents, torch.Tensor]
    assert torch.equal(made[0].part.latents, made[2].latents)


def test_a_second_call_encodes_nothing(tmp_path):
    model = model_with(Encoder())
    first = cache_latents(Data(), model, tmp_path)
    calls = len(model.modalities[0].encoder._calls)
    second = cache_latents(Data(), model, tmp_path)
    assert len(model.modalities[0].encoder._calls) == calls
    assert torch.equal(first[2].parts[1].latents, second[2].parts[1].latents)
    assert first.fingerprint() == second.fingerprint()


def changed_weight(model):
    with torch.no_grad():
        model.modalities[0].encoder.convolution.bias[0] += 1e-3


def changed_setting(model):
    model.modalities[0].encoder.scale = 2.0


class Settings(nn.Module):
    """What an encoder may hold beside weights."""

    def __init__(self):
        super().__init__()
        self.tensor, self.listed, self.named = torch.ones(1), [1, {"a": torch.ones(1)}], {"a": 1}
        self.hidden = [nn.Linear(1, 1)]
        self.register_buffer("unsaved", torch.ones(1), persistent=False)

    def forward(self, images):
        return images


def changed_tensor(encoder):
    encoder.tensor += 1


def changed_list(encoder):
    encoder.listed[1]["a"] += 1


def changed_dict(encoder):
    encoder.named["a"] = 2


def changed_buffer(encoder):
    encoder.unsaved += 1


def changed_hidden(encoder):
    encoder.hidden[0].weight.data += 1


@pytest.mark.parametrize("change", [changed_tensor, changed_list, changed_dict, changed_buffer, changed_hidden])
def test_everything_that_an_encoder_holds_is_in_its_key(change):
    model = model_with(Settings())
    key = latents.encoder_key(model.modalities[0])
    assert latents.encoder_key(model.modalities[0]) == key == latents.encoder_key(pickled(model.modalities[0]))
    change(model.modalities[0].encoder)
    assert latents.encoder_key(model.modalities[0]) != key


def pickled(value):
    return pickle.loads(pickle.dumps(value))


@no_typecheck
def test_cached_latents_are_counted_from_the_end_and_keep_weights_of_any_kind(tmp_path):
    class Weighted(Data):
        def __getitem__(self, index):
            return Sample([tensor([index])], weight=tensor(0.5))

    cached = cache_latents(Weighted(), model_with(Encoder()), tmp_path)
    assert cached[-1].parts[0].tolist() == [7]
    assert cached[-1].weight == 0.5
    for index in (8, -9):
        with pytest.raises(IndexError, match=f"there are 8 samples, got index {index}"):
            cached[index]


@pytest.mark.parametrize("change", [changed_weight, changed_setting])
def test_another_encoder_makes_it_anew(tmp_path, change):
    model = model_with(Encoder())
    before = cache_latents(Data(), model, tmp_path)
    change(model)
    after = cache_latents(Data(), model, tmp_path)
    assert not torch.equal(before[2].parts[1].latents, after[2].parts[1].latents)
    assert len(list(tmp_path.iterdir())) == 2


def test_other_data_make_it_anew(tmp_path):
    model = model_with(Encoder())
    folders = {
        cache_latents(Data(), model, tmp_path).folder,
        cache_latents(Data(key="other"), model, tmp_path).folder,
        cache_latents(Data(6), model, tmp_path).folder,
        cache_latents(Data(), model, tmp_path, data_key="mine").folder,
    }
    assert len(folders) == 4


def test_training_the_transformer_keeps_the_latents(tmp_path):
    model = model_with(Encoder())
    first = cache_latents(Data(), model, tmp_path).folder
    with torch.no_grad():
        for parameter in model.parameters_without_encoder_decoder():
            parameter.add_(1)
    assert cache_latents(Data(), model, tmp_path).folder == first


def test_what_an_encoder_draws_is_drawn_once_and_for_all(tmp_path):
    model = model_with(Drawn())
    state = torch.random.get_rng_state()
    first = cache_latents(Data(), model, tmp_path / "a")
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(99)
    second = cache_latents(Data(), model, tmp_path / "b")
    assert torch.equal(first[3].parts[1].latents, second[3].parts[1].latents)


class Killed(Data):
    """Stops in the middle of the second file."""

    def __getitem__(self, index):
        if index == 4:
            raise KeyboardInterrupt
        return super().__getitem__(index)


def test_a_killed_run_is_taken_up_and_never_gives_half(tmp_path):
    model = model_with(Encoder())
    with pytest.raises(KeyboardInterrupt):
        cache_latents(Killed(), model, tmp_path, batch_size=1)
    (folder,) = tmp_path.iterdir()
    assert [file.name for file in folder.iterdir()] == ["00000.safetensors"]
    (folder / f".00001.safetensors{PARTIAL}12345678").write_bytes(b"half")  # as SIGKILL leaves it
    calls = len(model.modalities[0].encoder._calls)
    shards = []
    cached = cache_latents(Data(), model, tmp_path, batch_size=1, progress=lambda each: shards.extend(each) or shards)
    assert shards == [1, 2]
    assert len(model.modalities[0].encoder._calls) - calls == 4
    assert cached.folder == folder
    assert len(list(folder.iterdir())) == 4
    assert cached[5].parts[0].tolist() == [5, 1]


def test_a_damaged_file_is_named(tmp_path):
    model = model_with(Encoder())
    cached = cache_latents(Data(), model, tmp_path)
    file = cached.folder / "00001.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    assert cached[0].parts
    with pytest.raises(ValueError, match=r"00001.safetensors is not a whole safetensors file"):
        cached[4]


def test_a_failing_sample_is_named(tmp_path):
    class Failing(Data):
        def __getitem__(self, index):
            raise OSError("gone")

        def describe(self, index):
            return f"file {index}"

    with pytest.raises(SampleError, match=r"index 0 \(file 0\) could not be loaded: OSError: gone"):
        cache_latents(Failing(), model_with(Encoder()), tmp_path)

    class Infinite(Data):
        def __getitem__(self, index):
            return [torch.full((3, 4, 4), torch.inf)]

    with pytest.raises(ValueError, match=r"among 2 samples from index 0: sample 0, part 0: .*infinity"):
        cache_latents(Infinite(), model_with(Encoder()), tmp_path, batch_size=2)


def test_data_that_cannot_be_kept(tmp_path):
    class Random(Data):
        def sample(self, index, generator):
            return self[index]

    with pytest.raises(ValueError, match=r"a Random has random samples.*modalities\(index\) and arrange"):
        cache_latents(Random(), model_with(Encoder()), tmp_path)
    with pytest.raises(ValueError, match=r"a list has no fingerprint\(\); give a data_key"):
        cache_latents([[tensor([1])]], model_with(Encoder()), tmp_path)
    with pytest.raises(ValueError, match="batch_size is at least 1"):
        cache_latents(Data(), model_with(Encoder()), tmp_path, batch_size=0)


def captioned(folder):
    for i in range(5):
        file = io.BytesIO()
        Image.new("RGB", (8, 6 + 2 * i), (40 * i, 0, 9)).save(file, "PNG")
        (folder / f"{i}.png").write_bytes(file.getvalue()[: 50 if i == 3 else None])
        (folder / f"{i}.txt").write_text(f"{i}\nlong {i}")
    return CaptionedImages(folder, images=ImageReader(4, channels_first=True), prob_describe=0.5)


def image_model():
    torch.manual_seed(0)
    return tiny(
        num_text_tokens=256, dim_latent=4, modality_encoder=Encoder(), channel_first_latent=True, modality_num_dim=2
    )


def test_captions_stay_random_over_cached_images(tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    data, model = captioned(tmp_path / "images"), image_model()
    cached = cache_latents(data, model, tmp_path / "cache")
    monkeypatch.setattr(CaptionedImages, "read_image", None)  # nothing is read any more
    packer, made = model.packer(), set()
    for seed in range(30):
        sample, outline = (make(1, torch.Generator().manual_seed(seed)) for make in (cached.sample, cached.outline))
        made.add(tuple(type(part).__name__ for part in sample.parts))
        assert packer.num_tokens(outline) == packer.num_tokens(sample)
    assert made == {("Tensor", "Latents"), ("Latents", "Tensor")}
    with pytest.raises(SkipSample, match=r"3.png: not a whole image"):
        cached[3]
    assert "1.png, latents in" in cached.describe(1)


def test_cached_samples_are_packed_and_loaded_by_workers(tmp_path):
    (tmp_path / "images").mkdir()
    data, model = captioned(tmp_path / "images"), image_model()
    cached = cache_latents(data, model, tmp_path / "cache")
    cached[0]  # a file that is open stays here
    packer = model.packer(token_budget=48)
    results = []
    for workers in (0, 2):
        plan = DataPlan(cached, token_budget=48, packs_per_step=2, epochs=2, packer=packer)
        steps = list(StepLoader(plan, lambda s, r: packer([each.parts for each in s]), num_workers=workers))
        assert sum(len(step.skipped) for step in steps) == 2
        batches = [batch for step in steps for batch in step.batches if batch is not None]
        assert sum(map(len, batches)) == 8
        results.append([batch.stream.token.tolist() for batch in batches])
        assert model(batches[0]).isfinite()
    assert results[0] == results[1]


def test_datasets_can_be_sent_to_workers_of_any_kind(tmp_path):
    (tmp_path / "images").mkdir()
    data, model = captioned(tmp_path / "images"), image_model()
    cached = cache_latents(data, model, tmp_path / "cache")
    for each in (data, cached):
        first = each[1]
        again = pickle.loads(pickle.dumps(each))[1]
        assert first.name == again.name
        assert torch.equal(ids_of(first), ids_of(again))


def ids_of(sample):
    (ids,) = (part for part in sample.parts if torch.is_tensor(part))
    return ids
