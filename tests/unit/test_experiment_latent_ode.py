"""The experiment end to end, with very small models: what is trained on, measured, written and loaded."""

import dataclasses

import pytest
import safetensors.torch
import torch

from predoc_lib import metrics, results, runs, training
from predoc_lib.checkpoint import WeightsError
from predoc_lib.data import MovingDigits, catalog, moving_digits
from predoc_lib.experiments import latent_ode as experiment
from predoc_lib.experiments.latent_ode import Config, build_model, load, measure, observed_times, predictor, run, spans
from predoc_lib.latent_ode import LatentODE

TINY = Config(n_digits=2, steps=3, batch_size=2, n_test=4, width=16, state=4, content=4, device="cpu")
SPANS = ("reconstruction", "prediction", "half_way", "backwards")


@pytest.fixture(scope="module", autouse=True)
def few_videos():
    """Never more than 256 videos: the mean image and the digit classifier do with few."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "moving_digits", lambda n, **options: moving_digits(min(n, 256), **options))
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder and the record of a run."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    return folder, run(TINY, folder, progress=False)


def change(**fields):
    return dataclasses.replace(TINY, **fields)


def test_a_run_leaves_a_whole_record_and_weights(finished):
    folder, rec = finished
    names = {"metrics.json", "weights.safetensors", "run.json", ".lock", "checkpoints"}
    assert {p.name for p in folder.iterdir()} == names
    assert results.load(folder) == rec
    assert rec["experiment"] == "latent_ode"
    assert rec["config"] == dataclasses.asdict(TINY)
    assert rec["seed"] == TINY.seed
    assert rec["data"] == {"name": "digits", "sha256": catalog.checksum("digits")}
    assert rec["evaluations"] == 4 * 19  # rk4, a step a frame over 20 frames
    assert [row["step"] for row in rec["history"]] == [3]
    assert {"loss", "seconds", "reconstruction_psnr", "prediction_psnr", "position_error"} <= rec["history"][0].keys()


def test_a_loaded_model_predicts_what_the_trained_one_was_measured_at(finished):
    folder, rec = finished
    model, config = load(folder)
    assert config == TINY
    assert not model.training
    assert measure(model, config) == rec["metrics"]


def test_a_run_that_was_killed_goes_on_as_if_nothing_had_been(finished, tmp_path, monkeypatch):
    _, rec = finished
    elbo, steps = LatentODE.negative_elbo, []

    def killed(self, *arguments, **options):
        steps.append(1)
        if len(steps) == 3:
            raise Stop
        return elbo(self, *arguments, **options)

    monkeypatch.setattr(LatentODE, "negative_elbo", killed)
    with pytest.raises(Stop):
        run(change(evaluate_every=1), tmp_path, progress=False)
    again = run(change(evaluate_every=1), tmp_path, progress=False)
    assert len(steps) == 4
    assert again["metrics"] == rec["metrics"]
    assert runs.state(tmp_path) == "finished"


def test_a_run_that_diverges_says_at_which_step_and_what_is_kept(tmp_path):
    with pytest.raises(training.TrainingError, match=r"Training stopped at step 2\. No checkpoint was saved yet\."):
        run(change(learning_rate=1e30), tmp_path, progress=False)


def test_the_same_seed_gives_the_same_weights_bit_by_bit(finished, tmp_path):
    folder, rec = finished
    torch.manual_seed(99)  # whatever was before
    again = run(TINY, tmp_path / "again", progress=False)
    assert again["metrics"] == rec["metrics"]
    run(change(seed=1), tmp_path / "other", progress=False)
    first, second, other = (
        safetensors.torch.load_file(f / "weights.safetensors") for f in (folder, tmp_path / "again", tmp_path / "other")
    )
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert not all(torch.equal(first[k], other[k]) for k in first)


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(change(steps=1), progress=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "fields",
    [
        {"dynamics": "gru"},
        {"layout": "plain", "field": "free"},
        {"objective": "reconstruction", "n_videos": 5},
        {"likelihood": "gaussian", "kl_weight": 0.0},
        {"method": "dopri5", "adjoint": True, "stride": 2},
        {"canvas": 64, "batch_size": 1, "n_test": 1},
    ],
    ids=str,
)
def test_every_kind_of_run_works_and_is_loaded_again(fields, tmp_path):
    config = change(steps=1, **fields)
    rec = run(config, tmp_path, progress=False)
    model, loaded = load(tmp_path)
    assert loaded == config
    assert rec["metrics"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert set(rec["metrics"]["prediction"]) == {config.dynamics, "mean image", "copy-last"}


# ---------------------------------------------------------------- what is trained on


class Stop(Exception):
    """Enough was seen."""


def scored(config, monkeypatch):
    """What the loss of the first steps is given."""
    calls, elbo = [], LatentODE.negative_elbo

    def spy(self, frames, t, n_context=None, mask=None, noise=None):
        if len(calls) == 2:
            raise Stop
        calls.append((frames, t, n_context))
        return elbo(self, frames, t, n_context, mask, noise)

    monkeypatch.setattr(LatentODE, "negative_elbo", spy)
    with pytest.raises(Stop):
        run(config)
    return calls


@pytest.mark.parametrize(
    ("fields", "times", "n_context"),
    [
        ({}, range(20), 10),
        ({"stride": 2}, range(0, 20, 2), 5),
        ({"objective": "reconstruction"}, range(10), 10),
        ({"objective": "reconstruction", "stride": 2}, range(0, 10, 2), 5),
    ],
    ids=str,
)
def test_the_frames_that_are_scored_are_those_of_objective_and_stride(monkeypatch, fields, times, n_context):
    config = change(**fields)
    for step, (frames, t, n) in enumerate(scored(config, monkeypatch), start=1):
        assert t.tolist() == list(times)
        assert n == n_context
        videos = moving_digits(config.batch_size, n_digits=2, canvas=32, seed=(config.seed, step), split="train")
        assert torch.equal(frames, videos.frames(t))


def test_at_stride_2_the_frames_between_change_nothing_that_is_trained(monkeypatch, tmp_path):
    config = change(stride=2)
    run(config, tmp_path / "true", progress=False)
    true = MovingDigits.frames

    def wrong_between(videos, t):
        frames = true(videos, t)
        return torch.where((t % 2 == 0)[:, None, None, None], frames, 1 - frames)

    monkeypatch.setattr(MovingDigits, "frames", wrong_between)
    monkeypatch.setattr(experiment, "measure", lambda model, config: {})
    monkeypatch.setattr(experiment, "progress_figures", lambda *arguments: {})
    run(config, tmp_path / "wrong", progress=False)
    a, b = (safetensors.torch.load_file(tmp_path / f / "weights.safetensors") for f in ("true", "wrong"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_set_of_training_videos_stays_the_same_over_the_run(monkeypatch):
    calls = scored(change(n_videos=3, batch_size=8), monkeypatch)
    pool = moving_digits(3, n_digits=2, canvas=32, seed=(0, 0), split="train").frames(torch.arange(20.0))
    drawn = [[next(i for i, v in enumerate(pool) if torch.equal(v, frame)) for frame in frames] for frames, *_ in calls]
    assert len(drawn[0]) == 8
    epochs = [sorted((drawn[0] + drawn[1])[i : i + 3]) for i in range(0, 15, 3)]
    assert epochs == [[0, 1, 2]] * 5


# ---------------------------------------------------------------- what is measured


def test_the_spans_are_those_of_the_report():
    assert observed_times(TINY).tolist() == list(range(10))
    assert observed_times(change(stride=2)).tolist() == [0, 2, 4, 6, 8]
    for stride in (1, 2):
        found = spans(change(stride=stride))
        assert tuple(found) == SPANS
        assert torch.equal(found["reconstruction"], observed_times(change(stride=stride)))
        assert found["prediction"].tolist() == list(range(10, 20))
        assert found["half_way"].tolist() == [i + stride / 2 for i in range(0, 10 - stride, stride)]
        assert found["backwards"].tolist() == [-5, -4, -3, -2, -1]


def test_the_table_has_the_model_and_every_baseline_where_it_means_something(finished):
    table = finished[1]["metrics"]
    assert {span: set(table[span]) for span in SPANS} == {
        "reconstruction": {"ode", "mean image"},
        "prediction": {"ode", "mean image", "copy-last"},
        "half_way": {"ode", "mean image", "copy-last", "cross-fade"},
        "backwards": {"ode", "mean image", "copy-last"},
    }
    for span in SPANS:
        for figures in table[span].values():
            assert set(figures) == {"mse", "psnr", "ssim"}


@pytest.mark.parametrize("stride", [1, 2])
def test_baselines_are_measured_as_by_hand(stride):
    """On test videos, against true frames at the very times."""
    config = change(stride=stride)
    found = measure(build_model(config), config)
    videos = moving_digits(config.n_test, n_digits=2, canvas=32, seed=(1234, 0), split="test")

    def at(*times):
        return videos.frames(torch.tensor(times))

    last = observed_times(config)[-1].item()
    predicted = [(at(last) - at(t)).square().mean().item() for t in range(10, 20)]
    assert found["prediction"]["copy-last"]["mse"] == pytest.approx(sum(predicted) / 10, rel=1e-5)
    first = [(at(0.0) - at(t)).square().mean().item() for t in range(-5, 0)]
    assert found["backwards"]["copy-last"]["mse"] == pytest.approx(sum(first) / 5, rel=1e-5)
    pairs = [(i, i + stride) for i in range(0, 10 - stride, stride)]
    faded = torch.cat([metrics.psnr((at(float(a)) + at(float(b))) / 2, at((a + b) / 2)) for a, b in pairs])
    assert found["half_way"]["cross-fade"]["psnr"] == pytest.approx(faded.mean().item(), rel=1e-4)
    train = moving_digits(256, n_digits=2, canvas=32, seed=(1234, 1), split="train").frames(torch.arange(20.0))
    constant = (train.mean((0, 1)) - at(*range(10))[:, ::stride]).square().mean()
    assert found["reconstruction"]["mean image"]["mse"] == pytest.approx(constant.item(), rel=1e-5)


class Oracle(LatentODE):
    """A model that knows the true videos of the test, and shows them ``wrong`` frames too late."""

    def __init__(self, config, wrong=0.0):
        super().__init__((32, 32), state=4, content=4, width=16)
        self.videos = moving_digits(config.n_test, canvas=32, seed=(1234, 0), split="test")
        self.wrong = wrong

    def predict(self, frames, t, t_query, mask=None):
        assert torch.equal(frames, self.videos.frames(t))  # only what was observed is given
        return self.videos.frames(t_query + self.wrong)


def test_a_model_that_knows_the_truth_is_measured_as_perfect_and_read_as_well_as_the_truth():
    config = change(n_digits=1, n_test=64)
    oracle = Oracle(config)
    found = measure(oracle, config)
    for span in SPANS:
        assert found[span]["ode"] == {"mse": 0, "psnr": 100, "ssim": pytest.approx(1)}
    assert found["parameters"] == sum(p.numel() for p in oracle.parameters())
    assert found["readable"]["predicted"] == found["readable"]["true"] > 0.6


def test_digits_in_the_wrong_place_cannot_be_read():
    config = change(n_digits=1, n_test=64)
    found = measure(Oracle(config, wrong=6.0), config)
    assert found["readable"]["predicted"] < 0.6 * found["readable"]["true"]
    assert found["prediction"]["ode"]["psnr"] < 20


def test_two_digits_are_not_read(finished):
    assert "readable" not in finished[1]["metrics"]


def test_the_position_error_is_how_far_off_a_digit_is():
    config = change(n_digits=1, n_test=16)
    oracle, seen = Oracle(config), observed_times(config)
    figures = experiment.progress_figures(oracle, oracle.videos, seen)
    assert figures["position_error"].max() < 1e-3
    assert figures["prediction_psnr"].tolist() == [100] * 16
    off = Oracle(config, wrong=0.5)
    later = torch.arange(10.0, 20.0)
    true, drawn = (off.videos.position(t)[:, :, 0] for t in (later, later + 0.5))
    found = experiment.progress_figures(off, off.videos, seen)["position_error"].mean().item()
    assert found == pytest.approx((true - drawn).norm(dim=-1).mean().item(), abs=1e-2)


EMBEDDED = [
    path.parent
    for path in sorted((results.RESULTS / "latent_ode").glob("*/weights.safetensors"))
    if path.parent.name.startswith("digits32")
]


@pytest.mark.parametrize("folder", EMBEDDED, ids=lambda folder: folder.name)
def test_the_recorded_weights_have_the_figures_of_their_record(folder):
    """Stored in half precision, run by today's code."""
    (model, config), recorded = load(folder), results.load(folder)["metrics"]
    videos = moving_digits(256, n_digits=config.n_digits, canvas=config.canvas, seed=(1234, 0), split="test")
    predict = predictor(model, videos, observed_times(config))
    for span, t in spans(config).items():
        found = metrics.psnr(predict(t), videos.frames(t)).mean().item()
        assert found == pytest.approx(recorded[span][config.dynamics]["psnr"], abs=0.05), span


# ---------------------------------------------------------------- what goes wrong


def test_a_loss_that_is_not_finite_stops_the_run_and_no_record_is_written(monkeypatch, tmp_path):
    nan = {"loss": torch.tensor(float("nan"), requires_grad=True)}
    monkeypatch.setattr(LatentODE, "negative_elbo", lambda *arguments, **options: nan)
    with pytest.raises(training.TrainingError, match="step 1"):
        run(TINY, tmp_path, progress=False)
    assert not list(tmp_path.rglob("metrics.json")) + list(tmp_path.rglob("*.safetensors"))
    assert runs.state(tmp_path) == "failed"


def test_absent_data_stops_the_run_before_anything_is_written(monkeypatch, tmp_path):
    monkeypatch.setenv("PREDOC_DATA", str(tmp_path / "empty"))
    with pytest.raises(catalog.DataError, match="mnist"):
        run(change(dataset="mnist"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_weights_that_do_not_fit_the_record_beside_them_are_refused(finished, tmp_path):
    folder, rec = finished
    results.save(tmp_path, rec | {"config": rec["config"] | {"content": 8}})
    (tmp_path / "weights.safetensors").write_bytes((folder / "weights.safetensors").read_bytes())
    with pytest.raises(WeightsError, match=r"it has \[.*\] for '.*', the model \[.*\]"):
        load(tmp_path)


def test_a_folder_without_a_record_or_without_weights_is_refused(finished, tmp_path):
    with pytest.raises(results.ResultError, match=r"metrics\.json"):
        load(tmp_path)
    results.save(tmp_path, finished[1])
    with pytest.raises(WeightsError, match=r"weights\.safetensors"):
        load(tmp_path)
