"""MSFlow: bits/dim against closed forms, flows that can be undone, objectives that train, and refusals."""

import math

import pytest
import torch
from torch import nn

from predoc_lib.batches import Share
from predoc_lib.data import photos
from predoc_lib.experiments.msflow import EVALUATION
from predoc_lib.msflow import MSFlow, pyramid
from predoc_lib.msflow.fields import KINDS, LARGEST, Field
from predoc_lib.msflow.model import NEAR, times

TIGHT = {"rtol": 1e-8, "atol": 1e-8}
READINGS = pytest.mark.parametrize(
    "reading",
    [{"pyramid": "haar"}, {"pyramid": "laplacian"}, {"pyramid": "laplacian", "condition": "dequantized"}],
    ids=str,
)


class Given:
    """Noise that is known."""

    def __init__(self, rows, seed=0):
        self.rows, self.generator = rows, torch.Generator().manual_seed(seed)

    def rand(self, *shape):
        return torch.rand(self.rows, *shape, generator=self.generator)

    def randn(self, *shape):
        return torch.randn(self.rows, *shape, generator=self.generator)


class Scaling(nn.Module):
    """f = 0.7 x + b: what is N(0, 1) at t = 1 was normal at t = 0 too, of a known mean and scale."""

    def __init__(self, b):
        super().__init__()
        self.b = nn.Parameter(torch.tensor(b))

    def forward(self, t, x, cond=None):
        return 0.7 * x + self.b

    def log_prob(self, x):
        mean = -self.b.detach() * (1 - math.exp(-0.7)) / 0.7
        return torch.distributions.Normal(mean, math.exp(-0.7)).log_prob(x).flatten(1).sum(1)


def some_images(n, side=8, channels=3, bits=8):
    """Coarse patterns with a little noise."""
    coarse = torch.rand(n, channels, side // 2, side // 2)
    images = nn.functional.interpolate(coarse, scale_factor=2, mode="bilinear") * 0.8 + 0.2 * torch.rand(1)
    return (images * (2**bits - 1)).to(torch.uint8)


def random_model(side=8, channels=3, scales=3, spread=0.3, **options):
    """One whose flows are no identity."""
    model = MSFlow(side, channels, scales, **({"width": 8, "depth": 1} | options))
    model.whiten(some_images(200, side, channels, model.bits))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "leave" in name:
                p.add_(spread * torch.randn_like(p) / p[0].numel() ** 0.5)
    model.trained.fill_(True)
    return model


@pytest.mark.parametrize("bits", [1, 5, 8])
@pytest.mark.parametrize(("channels", "scales"), [(1, 1), (3, 1), (3, 3)])
def test_bits_per_dim_of_an_affine_flow_of_haar_bands_are_a_gaussians(bits, channels, scales):
    """Orthonormal bands of a white Gaussian are white: the pixels' density is known, whatever the number of scales."""
    white = Scaling(0.0)
    model = MSFlow(8, channels, scales, bits, "haar", lam=None, field=lambda *shape: white, **TIGHT).double()
    images = some_images(5, channels=channels, bits=bits)
    z = images + Given(5).rand(channels, 8, 8).double()
    nats = white.log_prob(z / 2 ** (bits - 1) - 1) - images[0].numel() * (bits - 1) * math.log(2)
    found = model.bits_per_dim(images, noise=Given(5))
    torch.testing.assert_close(found, -nats / (images[0].numel() * math.log(2)), atol=1e-6, rtol=0)


@pytest.mark.parametrize("condition", ["rounded", "dequantized"])
def test_bits_per_dim_of_the_laplacian_add_up_those_of_every_scales_own_image(condition):
    f = Scaling(0.3)
    model = MSFlow(8, 3, 3, 8, "laplacian", condition=condition, field=lambda *shape: f, **TIGHT).double()
    images, noise, nats, below = some_images(4), Given(4), 0.0, None
    for levels in pyramid.rounded(images.double(), 3):
        z = levels + noise.rand(3, *levels.shape[2:]).double()
        y = 0.05 + 0.9 * z / 256
        x = torch.logit(y)
        nats = nats + f.log_prob(x if below is None else x - below)
        nats = nats + (math.log(0.9 / 256) - y.log() - (1 - y).log()).flatten(1).sum(1)
        known = torch.logit(0.05 + 0.9 * (levels + 0.5) / 256) if condition == "rounded" else x
        below = pyramid.double(known)
    found = model.bits_per_dim(images, noise=Given(4))
    torch.testing.assert_close(found, -nats / (192 * math.log(2)), atol=1e-6, rtol=0)


def test_a_finer_scales_network_is_wider_by_what_is_asked():
    model = MSFlow(8, 3, 3, width=12, widen=2.0, depth=1)
    assert [flow.f.net.enter.out_channels for flow in model.flows] == [3, 6, 12]
    with pytest.raises(ValueError, match="widen must be more than 0, got 0"):
        MSFlow(8, 3, 3, widen=0)


@READINGS
def test_an_untrained_flow_is_the_identity_on_whitened_bands(reading):
    """Known in closed form: each band a Gaussian of the channels' covariance; and at zero cost in training."""
    model = MSFlow(8, 3, 3, width=8, depth=1, **TIGHT, **reading)
    images = some_images(6)
    model.whiten(images)
    normal = torch.distributions.Normal(0.0, 1.0)
    nats = sum(normal.log_prob(x).flatten(1).sum(1) + d for x, _, d in model.encode(images, Given(6)))
    found = model.bits_per_dim(images, noise=Given(6))
    torch.testing.assert_close(found, -nats / (192 * math.log(2)), atol=1e-3, rtol=0)


@READINGS
def test_encoding_has_the_jacobian_that_it_says(reading):
    """Every scale's bands as a function of that scale's own dequantization noise (Haar: of the one there is)."""
    model = random_model(4, 1, 3, **reading).double()
    images, haar = some_images(1, 4, 1), reading["pyramid"] == "haar"

    class Known(Given):
        def __init__(self, *draws):
            self.draws = list(draws)

        def rand(self, *shape):
            return self.draws.pop(0).view(1, *shape)

    draws = [torch.rand(16)] if haar else [torch.rand(1), torch.rand(4), torch.rand(16)]
    draws = [draw.double() for draw in draws]
    said = [log_det.item() for _, _, log_det in model.encode(images, Known(*draws))]
    for i in range(len(draws)):

        def bands(u, i=i):
            encoded = model.encode(images, Known(*draws[:i], u, *draws[i + 1 :]))
            return torch.cat([x.flatten() for x, _, _ in encoded]) if haar else encoded[i][0].flatten()

        truth = torch.linalg.slogdet(torch.func.jacrev(bands)(draws[i]))[1].item()
        assert (sum(said) if haar else said[i]) == pytest.approx(truth, abs=1e-8)


@READINGS
def test_a_flow_can_be_undone_in_single_precision(reading):
    model, images = random_model(rtol=1e-7, atol=1e-7, **reading), some_images(4)
    for flow, (x, cond, _) in zip(model.flows, model.encode(images), strict=True):
        with torch.no_grad():
            noise = flow.carry(x, torch.tensor([0.0, 1.0]), cond)[-1]
            back = flow.carry(noise, torch.tensor([1.0, 0.0]), cond)[-1]
        assert (noise - x).abs().max() > 0.01, "the flow does nothing"
        assert (back - x).abs().max() <= 1e-4


@READINGS
def test_the_images_of_encoded_bands_are_the_images(reading):
    model, images, known = random_model(**reading), some_images(4), None
    for s, (x, _, _) in enumerate(model.encode(images)):
        cond = None if s == 0 else model.reading.condition(s, known)
        known = model.reading.compose(model.bands[s].inverse(x), cond)
    assert torch.equal(model.reading.pixels.levels(model.reading.view(2, known)).to(torch.uint8), images)


@READINGS
def test_exact_and_hutchinsons_bits_per_dim_agree_on_8x8_images(reading):
    model = random_model(channels=1, spread=1.0, method="rk4", step_size=0.25, **reading)
    image, n = some_images(1, 8, 1), 200

    class Same(Given):
        def rand(self, *shape):
            return torch.rand(1, *shape, generator=self.generator).expand(self.rows, *shape)

    with model.solving(exact=True):
        exact = model.bits_per_dim(image, noise=Same(1))
    estimates = model.bits_per_dim(image.expand(n, -1, -1, -1), noise=Same(n))
    assert abs(estimates.mean() - exact) < 4 * estimates.std() / n**0.5
    assert estimates.std() > 1e-3


@READINGS
def test_half_the_tolerance_changes_a_trained_models_bits_per_dim_by_less_than_a_thousandth(reading):
    model, images, found = MSFlow(8, 3, 3, width=16, depth=1, **reading), photos(16, 8, "test"), []
    model.whiten(photos(500, 8))
    before, optimizer = model.bits_per_dim(images).mean(), torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(60):
        optimizer.zero_grad()
        model.loss(photos(64, 8, seed=step)).backward()
        optimizer.step()
    for tolerance in (EVALUATION["rtol"], EVALUATION["rtol"] / 2):
        torch.manual_seed(0)
        with model.solving(rtol=tolerance, atol=tolerance):
            found.append(model.bits_per_dim(images).mean())
    assert found[0] < before - 0.3, "trained"
    assert abs(found[0] - found[1]) < 1e-3


def test_solving_changes_options_inside_the_block_only():
    model = MSFlow(4, 1, 2, width=8, depth=1, rtol=1e-3)
    with model.solving(exact=True, rtol=1e-7, method="rk4"):
        assert all(f.exact and f.solver["rtol"] == 1e-7 and f.solver["method"] == "rk4" for f in model.flows)
    with pytest.raises(ValueError, match="B at least 1"), model.solving(exact=True):
        model.bits_per_dim(torch.zeros(0, 1, 4, 4, dtype=torch.uint8))
    assert [f.exact for f in model.flows] == [True, False], "4 numbers are few, 12 are many"
    assert all(f.solver["rtol"] == 1e-3 and f.solver["method"] == "dopri5" for f in model.flows)


@pytest.mark.parametrize("condition", ["rounded", "dequantized"])
def test_the_coarser_scales_of_the_laplacian_score_coarser_images(condition):
    model = random_model(pyramid="laplacian", condition=condition)
    images = some_images(3)
    coarser = pyramid.rounded(images.float(), 3)[1].to(torch.uint8)
    small = MSFlow(4, 3, 2, pyramid="laplacian", condition=condition, width=8, depth=1)
    state = {name: value for name, value in model.state_dict().items() if name.split(".")[1:2] != ["2"]}
    small.load_state_dict(state | {"trained": model.trained[:2]})
    with model.solving(exact=True), small.solving(exact=True):
        found, truth = (m.log_probs(coarser, Given(3)) for m in (model, small))
    torch.testing.assert_close(found, truth)


@READINGS
@pytest.mark.parametrize("objective", ["flow_matching", "likelihood"])
def test_training_lowers_the_bits_per_dim(reading, objective):
    torch.manual_seed(1)
    model = MSFlow(4, 1, 2, bits=3, width=8, depth=1, method="rk4", step_size=0.5, **reading)
    images = some_images(256, 4, 1, 3)
    model.whiten(images)
    before = model.bits_per_dim(images, noise=Given(256)).mean()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(60 if objective == "flow_matching" else 20):
        optimizer.zero_grad()
        model.loss(images[step % 8 :: 8], objective).backward()
        optimizer.step()
    assert model.bits_per_dim(images, noise=Given(256)).mean() < before - 0.1


def test_flow_matching_weighs_errors_as_the_evidence_bound_does_but_less_near_the_data():
    """The mean of weight * g(t) over drawn times is, but for a factor, the integral of (1 - t) / (t + NEAR) g(t)."""
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    t, weight = times(u)
    assert 0 <= t.min() < t.max() < 1
    assert torch.all(t.diff() > 0)
    for g in (lambda t: torch.ones_like(t), lambda t: t**2, lambda t: (3 * t).cos()):
        expected = ((1 - u) / (u + NEAR) * g(u)).mean() / math.log(1 + 1 / NEAR)
        torch.testing.assert_close((weight * g(t)).mean(), expected, atol=1e-8, rtol=0)


@READINGS
def test_the_loss_of_flow_matching_is_the_sum_of_its_scales_weighted_by_their_share_of_the_numbers(reading):
    model, images, noise = random_model(4, 1, 2, **reading), some_images(5, 4, 1), Given(5)
    expected = 0.0
    for flow, (x, cond, _) in zip(model.flows, model.encode(images, noise), strict=True):
        eps, (t, weight) = noise.randn(*x.shape[1:]), times(noise.rand())
        x_t = torch.stack([(1 - s) * a + s * e for s, a, e in zip(t, x, eps, strict=True)])
        square = (flow.f(t, x_t, *([] if cond is None else [cond])) - (eps - x)).square()
        expected = expected + (weight * square.flatten(1).sum(1)).mean() / images[0].numel()
    torch.testing.assert_close(model.loss(images, noise=Given(5)), expected)


def test_one_scale_trained_alone_gets_the_gradient_that_it_gets_beside_the_others():
    model, images, gradients = random_model(4, 1, 2, exact=True), some_images(4, 4, 1), []
    for scale in (None, 1):
        model.zero_grad()
        model.loss(images, "likelihood", scale, Given(4)).backward()
        gradients.append([p.grad for p in model.flows[1].parameters()])
        assert all((p.grad is None) == (scale == 1) for p in model.flows[0].parameters())
    torch.testing.assert_close(gradients[0], gradients[1])


def test_the_likelihood_is_bits_per_dim_and_the_regularizers_are_added_to_it():
    model, images = random_model(1 << 3, 1, 2, kinetic=0.3, jacobian=0.2, exact=True), some_images(3, 8, 1)
    found = model.loss(images, "likelihood", noise=Given(3))
    bits = model.bits_per_dim(images, noise=Given(3)).mean()
    parts = [f.loss(x, c) for f, (x, c, _) in zip(model.flows, model.encode(images, Given(3)), strict=True)]
    extra = sum(
        share * (0.3 * p["kinetic"] + 0.2 * p["jacobian"]) for share, p in zip((1 / 4, 3 / 4), parts, strict=True)
    )
    torch.testing.assert_close(found, bits + extra, atol=1e-4, rtol=0)
    assert extra > 0.01


def test_a_likelihood_is_the_same_however_many_processes_share_the_batch():
    images = some_images(8)
    model = random_model(method="rk4", step_size=0.25, exact=False, kinetic=0.1, jacobian=0.1)

    def loss(processes: int, rank: int) -> torch.Tensor:
        rows = Share(8, 1, processes, rank, seed=0).rows(1, 0, torch.device("cpu"))
        return model.loss(images[rows.start : rows.stop], "likelihood", noise=rows)

    torch.testing.assert_close((loss(2, 0) + loss(2, 1)) / 2, loss(1, 0), rtol=0, atol=1e-5)
    assert not torch.isclose(loss(2, 0), loss(2, 1), rtol=0, atol=1e-3)


@READINGS
def test_samples_are_levels_and_the_same_noise_gives_the_same(reading):
    model = random_model(bits=3, **reading)
    images = model.sample(5, noise=Given(5))
    assert images.shape == (5, 3, 8, 8)
    assert images.dtype == torch.uint8
    assert images.max() < 8
    assert torch.equal(images, model.sample(5, noise=Given(5)))
    assert not torch.equal(images, model.sample(5, noise=Given(5, seed=1)))


@READINGS
def test_views_go_from_noise_to_the_sample_at_every_scale(reading):
    model, t = random_model(**reading), torch.linspace(1, 0, 5)
    views = model.views(3, noise=Given(3), t=t)
    assert [v.shape for v in views] == [(5, 3, 3, side, side) for side in (2, 4, 8)]
    assert torch.equal(model.reading.pixels.levels(views[-1][-1]).to(torch.uint8), model.sample(3, noise=Given(3)))
    cold = model.views(3, [1.0, 1.0, 0.0], noise=Given(3), t=t)
    torch.testing.assert_close(cold[1], views[1])
    assert not torch.allclose(cold[2][0], views[2][0])


def test_at_temperature_zero_all_samples_are_one():
    images = random_model().sample(4, temperature=0.0)
    assert (images == images[:1]).all()


def test_averaging_draws_changes_the_spread_and_not_the_mean():
    model, images = random_model(4, 1, 2, exact=True, method="rk4", step_size=0.25), some_images(1, 4, 1)
    many = images.expand(400, -1, -1, -1)
    one, four = model.bits_per_dim(many), model.bits_per_dim(many[:200], draws=4)
    assert four.std() / one.std() == pytest.approx(0.5, abs=0.12)
    assert abs(one.mean() - four.mean()) < 4 * (one.var() / 400 + four.var() / 200) ** 0.5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cond", [0, 3])
def test_a_field_sees_time_state_and_condition_and_no_other_row(kind, cond):
    f = Field(kind, 6, cond, 8, 1).double()  # in single precision a batch is rounded otherwise than a row
    nn.init.normal_(f.net.leave.weight)
    nn.init.normal_(f.net.blocks[0].second.weight)
    x, c, t = torch.randn(4, 6, 4, 4), torch.randn(4, cond, 4, 4) if cond else None, torch.rand(4)
    x, c, t = (value if value is None else value.double() for value in (x, c, t))
    together = f(t, x, c)
    assert together.shape == x.shape
    alone = torch.cat([f(t[i], x[i : i + 1], c if c is None else c[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(together, alone, atol=1e-10, rtol=1e-10)
    assert not torch.allclose(f(t + 0.1, x, c), together)
    assert c is None or not torch.allclose(f(t, x, c + torch.randn(4, cond, 1, 1)), together)


def test_a_fields_velocity_is_the_mean_one_of_the_normal_that_its_network_says():
    f = Field("conv", 1, 0, 8, 1)
    mu, sigma = 0.7, 0.2
    with torch.no_grad():
        f.net.leave.bias.copy_(torch.tensor([mu, LARGEST * math.atanh(math.log(sigma) / LARGEST)]))
    t, x_t = torch.rand(6), torch.randn(6, 1, 4, 4)
    a, s = (1 - t).view(-1, 1, 1, 1), t.view(-1, 1, 1, 1)
    gain = a * sigma**2 / (a**2 * sigma**2 + s**2)  # of x on x_t
    x = mu + gain * (x_t - a * mu)
    torch.testing.assert_close(f(t, x_t), (x_t - a * x) / s - x, atol=1e-3, rtol=1e-3)


@pytest.mark.usefixtures("as_shipped")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 6, "scales": 3}, "3 scales need an image side that divides by 4, got 6"),
        ({"bits": 9}, "bits must be 1 to 8"),
        ({"channels": 2}, "channels 1 or 3"),
        ({"scales": 0}, "scales at least 1"),
        ({"pyramid": "har"}, "Unknown pyramid 'har'. Did you mean 'haar'"),
        ({"condition": "round"}, "Unknown condition 'round'. Did you mean 'rounded'"),
        ({"field": "unit"}, "Unknown field 'unit'"),
        ({"lam": 0.5}, "lam must lie between 0 and 1/2, or be None, got 0.5"),
        ({"lam": 0.0}, "got 0.0"),
    ],
)
def test_bad_options_are_refused_in_one_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        MSFlow(**({"image_size": 8, "channels": 3, "scales": 2} | options))


@pytest.mark.usefixtures("as_shipped")
@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(2, 3, 8, 8), r"images must be uint8 levels, got torch.float32: predoc_lib.msflow.quantize makes"),
        (torch.full((2, 3, 8, 8), math.nan), "uint8"),
        (
            torch.zeros(2, 3, 6, 6, dtype=torch.uint8),
            r"images must be \[B, 3, 8, 8\], B at least 1, got \[2, 3, 6, 6\]",
        ),
        (torch.zeros(0, 3, 8, 8, dtype=torch.uint8), "B at least 1"),
        (torch.full((2, 3, 8, 8), 255, dtype=torch.uint8), "5-bit images must be below 32, got 255: shift 8-bit ones"),
    ],
)
def test_bad_images_are_refused_in_one_sentence(images, message):
    model = MSFlow(8, 3, 2, bits=5, width=8, depth=1)
    for call in (model.bits_per_dim, model.loss, model.whiten, model.log_probs):
        with pytest.raises(ValueError, match=message):
            call(images)


@pytest.mark.usefixtures("as_shipped")
def test_other_bad_input_is_refused_in_one_sentence():
    model, images = MSFlow(8, 3, 2, width=8, depth=1), some_images(2)
    with pytest.raises(ValueError, match=r"Scale 0 \(of 0 to 1\) is not trained, its samples would be noise: train it"):
        model.sample(1)
    model.loss(images, scale=0)
    with pytest.raises(ValueError, match=r"Scale 1 \(of 0 to 1\) is not trained"):
        model.sample(1)
    model.loss(images, scale=1)
    model.sample(1)
    for call, message in (
        (lambda: model.loss(images, "likelyhood"), "Unknown objective 'likelyhood'. Did you mean 'likelihood'"),
        (lambda: model.loss(images, scale=2), r"scale must lie in 0 \(coarsest\) to 1, got 2"),
        (lambda: model.bits_per_dim(images, draws=0), "draws must be at least 1, got 0"),
        (lambda: model.sample(0), "n must be at least 1"),
        (lambda: model.sample(1, temperature=-1.0), "temperatures at least 0"),
        (lambda: model.views(1, [1.0]), "one or 2"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
