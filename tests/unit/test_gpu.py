"""What must hold on a CUDA device, against the CPU where that knows better: ``pytest tests/unit/test_gpu.py``."""

import copy

import pytest
import torch
from torch import nn

from predoc_lib.cnf import CNF, divergence
from predoc_lib.data import moving_digits
from predoc_lib.experiments import features_to_frames, flow_warp, latent_ode, mimic_dusk, segmentation, yolo_dynamics
from predoc_lib.experiments.config import build
from predoc_lib.flow_warp import WarpODE, fit_pair, warp
from predoc_lib.irevnet import IRevNet
from predoc_lib.measure import bytes_kept, peak_bytes
from predoc_lib.mimic import Critic, MiMIc, mutual_interaction
from predoc_lib.msflow import MSFlow
from predoc_lib.ode import NeuralODE, integrate, odeint_adjoint
from predoc_lib.precision import lower_precision
from predoc_lib.training import fit

GPU = "cuda"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

TIMES = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
# One run of 40 steps is chaotic at the preset's rate: another order of sums moves its loss by percents.
GENTLE = {"learning_rate": 5e-4, "device": GPU}


class Field(nn.Module):
    """A small f(t, x) or f(t, x, cond) of [B, width]."""

    def __init__(self, width=5, hidden=16):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width + 1, hidden), nn.Tanh(), nn.Linear(hidden, width))

    def forward(self, t, x, cond=0.0):
        return self.net(torch.cat([x + cond, t.expand(len(x))[:, None]], 1))


class Chance(nn.Module):
    """A layer whose loss draws from the device's own generator."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 1)

    def forward(self, x):
        return self.net(x + torch.randn_like(x)).square().mean()


def twins(model, *tensors):
    """The model and the tensors on the CPU, and copies on the GPU."""
    return (model, *tensors), (copy.deepcopy(model).to(GPU), *(x.to(GPU) for x in tensors))


def assert_near(found, expected, **tolerance):
    torch.testing.assert_close(found.cpu(), expected, **tolerance)


def gradients(solve, f, x0, t):
    """The solution, and the gradients of x0 and of the parameters."""
    x0 = x0.detach().requires_grad_()
    x = solve(f, x0, t)
    return [x, *torch.autograd.grad(x.square().sum(), [x0, *f.parameters()])]


SOLVERS = {
    "torchdiffeq": lambda f, x0, t: NeuralODE(f, rtol=1e-8, atol=1e-8)(x0, t),
    "torchdiffeq, adjoint": lambda f, x0, t: NeuralODE(f, rtol=1e-8, atol=1e-8, adjoint=True)(x0, t),
    "rk4": lambda f, x0, t: NeuralODE(f, method="rk4", step_size=0.1)(x0, t),
    "dopri5": lambda f, x0, t: integrate(f, x0, t, method="dopri5", rtol=1e-8, atol=1e-8).x,
    "adams": lambda f, x0, t: integrate(f, x0, t, method="adams", step_size=0.1).x,
    "adjoint": lambda f, x0, t: odeint_adjoint(f, x0, t, rtol=1e-8, atol=1e-8),
}


@pytest.mark.parametrize("solver", SOLVERS)
def test_solutions_and_gradients_are_those_of_the_cpu(solver):
    cpu, gpu = twins(Field().double(), torch.randn(4, 5, dtype=torch.float64), TIMES)
    for found, expected in zip(gradients(SOLVERS[solver], *gpu), gradients(SOLVERS[solver], *cpu), strict=True):
        assert found.is_cuda
        assert_near(found, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("exact", [True, False])
def test_a_flow_has_the_densities_and_samples_of_the_cpu(exact):
    (f, x, cond, noise), on_gpu = twins(Field(), *(torch.randn(6, 5) for _ in range(3)))
    g, y, given, drawn = on_gpu
    time = torch.tensor(0.4)
    signs = (None, None) if exact else (noise.sign(), drawn.sign())
    assert_near(divergence(g, time.to(GPU), y, given, signs[1]), divergence(f, time, x, cond, signs[0]))

    cpu, gpu = (CNF(field, (5,), exact=exact, rtol=1e-6, atol=1e-6) for field in (f, g))
    if exact:
        assert_near(gpu.log_prob(y, given), cpu.log_prob(x, cond), rtol=1e-4, atol=1e-4)
    assert_near(gpu.sample(6, given, drawn), cpu.sample(6, cond, noise), rtol=1e-4, atol=1e-4)
    t = torch.rand(6)
    assert_near(gpu.flow_matching_loss(y, given, drawn, t.to(GPU)), cpu.flow_matching_loss(x, cond, noise, t))

    assert gpu.sample(3, given[:3]).is_cuda
    parts = gpu.loss(y, given)
    parts["loss"].backward()
    assert torch.isfinite(parts["nll"])
    assert all(p.grad.isfinite().all() and p.grad.any() for p in g.parameters())


@pytest.mark.parametrize("pyramid", ["haar", "laplacian"])
@pytest.mark.parametrize("objective", ["flow_matching", "likelihood"])
def test_a_multi_scale_flow_trains_measures_and_samples(pyramid, objective):
    model = MSFlow(4, 3, 2, pyramid=pyramid, width=8, depth=1).to(GPU)
    images = torch.randint(256, (4, 3, 4, 4), dtype=torch.uint8, device=GPU)
    model.whiten(images)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    before = [p.clone() for p in model.parameters()]
    model.loss(images, objective).backward()
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    assert any((p != q).any() for p, q in zip(model.parameters(), before, strict=True))
    bits = model.bits_per_dim(images)
    assert bits.is_cuda
    assert bits.isfinite().all()
    samples = model.sample(2)
    assert samples.shape == (2, 3, 4, 4)
    assert samples.is_cuda

    class Drawn:
        """The same noise on both devices."""

        def __init__(self, device):
            self.generator, self.device = torch.Generator().manual_seed(0), device

        def rand(self, *shape):
            return torch.rand(4, *shape, generator=self.generator).to(self.device)

        def randn(self, *shape):
            return torch.randn(4, *shape, generator=self.generator).to(self.device)

    with model.solving(exact=True, rtol=1e-6, atol=1e-6):
        found = model.bits_per_dim(images, noise=Drawn(GPU))
    on_cpu = copy.deepcopy(model).cpu()
    with on_cpu.solving(exact=True, rtol=1e-6, atol=1e-6):
        assert_near(found, on_cpu.bits_per_dim(images.cpu(), noise=Drawn("cpu")), rtol=1e-3, atol=1e-3)


def test_fields_as_cuda_graphs_learn_what_they_learn_without():
    def losses(compile):
        torch.manual_seed(0)
        model = MSFlow(8, 3, 2, width=16, depth=1)
        images = torch.randint(256, (64, 3, 8, 8), dtype=torch.uint8)
        model.whiten(images)
        return [
            row["loss"]
            for row in fit(
                model, images, lambda model, images, rows: model.loss(images, noise=rows),
                torch.optim.Adam(model.parameters(), lr=1e-3), steps=6, batch_size=16, evaluate_every=1, ema=0.9,
                compile=compile, networks=model.networks, compilable=[flow.f for flow in model.flows], device=GPU,
                progress=False,
            ).history
        ]  # fmt: skip

    assert losses("reduce-overhead") == pytest.approx(losses(False), rel=1e-4)


def test_backpropagation_keeps_memory_for_every_step_and_the_adjoint_does_not():
    f, x0 = Field(width=64, hidden=256).to(GPU), torch.randn(1024, 64, device=GPU, requires_grad=True)
    span = torch.tensor([0.0, 1.0], device=GPU)

    def measured(measure, solve, steps):
        return measure(lambda: solve(f, x0, span, method="rk4", step_size=1 / steps), GPU)

    def direct(*arguments, **options):
        return integrate(*arguments, **options).x

    measured(bytes_kept, direct, 1)  # what CUDA's libraries take for themselves
    grow = [measured(bytes_kept, direct, n) for n in (10, 20, 40)]
    assert grow[2] - grow[1] == pytest.approx(2 * (grow[1] - grow[0]), rel=0.1), "proportional to the steps"
    stay = [measured(bytes_kept, odeint_adjoint, n) for n in (10, 20, 40)]
    assert max(stay) < 1.1 * min(stay)
    assert max(stay) < grow[0] / 5

    def trained(solve, steps):
        return peak_bytes(lambda: solve(f, x0, span, method="rk4", step_size=1 / steps).sum().backward(), GPU)

    for solve in (direct, odeint_adjoint):
        trained(solve, 1)  # the backward pass runs in a thread of its own, for which CUDA's libraries take more
    assert trained(direct, 40) > 2 * trained(direct, 10)
    assert trained(odeint_adjoint, 40) < 1.1 * trained(odeint_adjoint, 10)


def test_a_run_that_was_stopped_goes_on_with_the_devices_own_random_numbers(tmp_path):
    class Stop(Exception):
        """The end of a process."""

    def run(folder, stop_at=None):
        torch.manual_seed(0)
        model = Chance()

        def loss(model, x, rows):
            if rows.step == stop_at:
                raise Stop
            return model(x)

        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        options = {"steps": 12, "batch_size": 4, "evaluate_every": 3, "device": GPU, "progress": False}
        fit(model, torch.ones(20, 3), loss, optimizer, folder=folder, **options)
        return model.state_dict()

    undisturbed = run(None)
    with pytest.raises(Stop):
        run(tmp_path, stop_at=8)
    resumed = run(tmp_path)
    assert all(torch.equal(resumed[k], undisturbed[k]) for k in undisturbed)


# ---------------------------------------------------------------- the latent ODE


def test_an_irevnet_on_a_gpu_is_the_cpus_and_loses_nothing():
    torch.manual_seed(0)
    model = IRevNet(3, (2, 2), features=30, norm=False).double()
    (model, image), (other, moved) = twins(model, torch.rand(2, 3, 16, 24).double())
    feature, remainder = other(moved)
    for found, expected in zip((feature, remainder), model(image), strict=True):
        assert_near(found, expected, atol=1e-10, rtol=0)
    assert_near(other.inverse(feature, remainder), image, atol=1e-10, rtol=0)
    assert_near(other.inverse(feature), model.inverse(feature.cpu()), atol=1e-10, rtol=0)


@pytest.mark.filterwarnings("ignore:The model was trained")
@pytest.mark.parametrize("module", [features_to_frames, flow_warp, mimic_dusk, segmentation, yolo_dynamics])
def test_smoke_runs_of_the_video_experiments_finish(module):
    record = module.run(build(module.Config, "smoke", device=GPU), progress=False)
    assert record["device"] == torch.cuda.get_device_name()


def test_a_run_on_a_gpu_is_measured_the_same_on_the_cpu(tmp_path):
    few = {"n_digits": 2, "steps": 3, "batch_size": 2, "n_test": 4, "width": 16, "state": 4, "content": 4}
    record = latent_ode.run(latent_ode.Config(device=GPU, **few), tmp_path, progress=False)
    assert record["device"] == torch.cuda.get_device_name()
    found = latent_ode.measure(*latent_ode.load(tmp_path))
    for span in ("reconstruction", "prediction", "half_way", "backwards"):
        assert found[span]["ode"]["psnr"] == pytest.approx(record["metrics"][span]["ode"]["psnr"], abs=0.05)


@pytest.mark.parametrize("way", ["bfloat16", "compile"])
def test_for_the_same_weights_the_loss_is_nearly_that_of_float32_and_compiled_the_gradient_too(way):
    config = build(latent_ode.Config, "smoke")
    t = torch.arange(0.0, latent_ode.FRAMES, device=GPU)
    frames = moving_digits(config.batch_size, canvas=config.canvas).frames(t.cpu()).to(GPU)

    def loss_and_gradient(precision="float32", compiled=False):
        torch.manual_seed(0)
        model = latent_ode.build_model(config).to(GPU)
        noise = torch.zeros(len(frames), model.latent_size, device=GPU)
        if compiled:
            for network in model.networks:
                network.compile()
        with lower_precision(model.networks, precision, GPU):
            loss = model.negative_elbo(frames, t, n_context=latent_ode.CONTEXT, noise=noise)["loss"]
            loss.backward()
        return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])

    loss, gradient = loss_and_gradient()
    other, changed = loss_and_gradient(**({"compiled": True} if way == "compile" else {"precision": way}))
    assert other == pytest.approx(loss, rel=5e-3 if way == "bfloat16" else 1e-4)
    if way == "compile":
        assert (changed - gradient).norm() < 1e-2 * gradient.norm()
    else:  # untrained, the soft assignment of pixels to objects magnifies bfloat16's rounding
        assert torch.cosine_similarity(changed, gradient, dim=0) > 0.8


@pytest.mark.parametrize("change", [{"precision": "bfloat16"}, {"compile": True}], ids=str)
def test_lower_precision_and_compilation_change_the_final_loss_of_the_smoke_run_by_less_than_2_percent(
    change, monkeypatch
):
    monkeypatch.setattr(latent_ode, "measure", lambda model, config: {})

    def final(**options):
        config = build(latent_ode.Config, "smoke", **GENTLE, **options)
        return latent_ode.run(config, progress=False)["history"][-1]["loss"]

    seeds = range(3)
    ratios = [final(seed=seed, **change) / final(seed=seed) for seed in seeds]
    print(f"final loss over that of float32, {change}: {ratios}")
    assert sum(ratios) / len(ratios) == pytest.approx(1, abs=0.02)


def test_warps_and_velocities_are_those_of_the_cpu():
    torch.manual_seed(0)
    frames, flow = torch.rand(2, 3, 3, 48, 64), 3 * torch.randn(2, 2, 48, 64)
    model, t = WarpODE(width=8, residual=True), torch.arange(3.0)
    query = torch.tensor([0.5, 2.0, 3.5])
    for mode in ("bilinear", "bicubic"):
        here = warp(frames[:, 0].to(GPU), flow.to(GPU), mode=mode).cpu()
        torch.testing.assert_close(here, warp(frames[:, 0], flow, mode=mode), atol=1e-4, rtol=0)
    with torch.no_grad():
        expected = model.predict(frames, t, query), model.flow(frames, t, 2.0, 3.0)
        model = model.to(GPU)
        found = model.predict(frames.to(GPU), t.to(GPU), query.to(GPU)), model.flow(frames.to(GPU), t.to(GPU), 2.0, 3.0)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b, atol=2e-2, rtol=0)


def test_a_pair_is_fitted_on_the_device_of_its_images():
    torch.manual_seed(0)
    image = nn.functional.interpolate(torch.rand(1, 3, 8, 10), (48, 60), mode="bicubic").clamp(0, 1)
    flow = torch.ones(1, 2, 48, 60)
    found = fit_pair(warp(image, flow).to(GPU), image.to(GPU))
    assert found.device.type == GPU
    assert (found.cpu() - flow)[..., 8:-8, 8:-8].abs().mean() < 0.1


def test_critics_on_a_gpu_say_what_they_say_on_the_cpu_and_learn_under_autocast():
    torch.manual_seed(0)
    critic, x = Critic(3, 16), torch.randn(4096, 3) @ torch.tensor([[1.0, 0.5, 0], [0, 1, 0.5], [0, 0, 1]])
    words = [mutual_interaction(copy.deepcopy(critic).to(device), x.to(device)).item() for device in ("cpu", GPU)]
    assert words[1] == pytest.approx(words[0], abs=0.02)  # the shuffles differ
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2)).to(GPU)
    optimizer = torch.optim.Adam(model.parameters())
    mimic = MiMIc(model, ["0"], example=torch.randn(2, 4, device=GPU))
    mimic.join(optimizer, steps=2)
    before = mimic.critics["0"].layers[0].weight.clone()
    with torch.autocast(GPU, torch.bfloat16):
        out = model(torch.randn(64, 4, device=GPU))
        loss = out.square().mean() + mimic.loss()
    assert loss.dtype is torch.float32
    loss.backward()
    optimizer.step()
    assert not torch.equal(before, mimic.critics["0"].layers[0].weight)
    assert model[0].weight.isfinite().all()
