"""Bounds against closed forms, critics against bad input, the plug-in on networks of others."""

import math

import pytest
import torch
import torchvision
from torch import nn

from predoc_lib.mimic import Critic, CriticError, MiMIc, MiMIcError, bounds, mutual_interaction
from predoc_lib.mimic.critic import standardize, variable
from predoc_lib.mimic.estimate import equicorrelated, estimate, gaussians, rotated_square, xor


def log_ratio(x, correlation):
    """log p(x) - sum of log p(x_j) of correlated Gaussians: the best critic."""
    joint = torch.distributions.MultivariateNormal(torch.zeros(len(correlation)).double(), correlation)
    return joint.log_prob(x) - torch.distributions.Normal(0.0, 1.0).log_prob(x).sum(1)


@pytest.mark.parametrize("name", bounds.BOUNDS)
def test_every_bound_of_the_best_critic_is_the_total_correlation(name):
    torch.manual_seed(0)
    correlation = torch.tensor([[1.0, 0.6, 0.2], [0.6, 1.0, 0.3], [0.2, 0.3, 1.0]], dtype=torch.float64)
    x = torch.randn(4000, 3, dtype=torch.float64) @ torch.linalg.cholesky(correlation).T
    joint, product = log_ratio(x, correlation), log_ratio(bounds.shuffle(x), correlation)
    shift = 1.0 if name == "nwj" else 0.0  # its best critic is 1 higher
    found = getattr(bounds, name)(joint + shift, product + shift).item()
    assert found == pytest.approx(-0.5 * torch.linalg.slogdet(correlation).logabsdet.item(), abs=0.06)


@pytest.mark.parametrize("name", bounds.BOUNDS)
def test_any_other_critic_gives_less(name):
    torch.manual_seed(0)
    correlation = torch.tensor([[1.0, 0.7], [0.7, 1.0]], dtype=torch.float64)
    x = torch.randn(4000, 2, dtype=torch.float64) @ torch.linalg.cholesky(correlation).T
    for scale in (0.3, 0.6, -1.0):
        joint, product = (scale * log_ratio(rows, correlation) for rows in (x, bounds.shuffle(x)))
        assert getattr(bounds, name)(joint, product) < 0.3367 - 0.02


def test_a_shuffle_keeps_every_channel_and_breaks_what_channels_share():
    torch.manual_seed(0)
    x = torch.randn(5000, 1).expand(-1, 3) + 0.1 * torch.randn(5000, 3)
    shuffled = bounds.shuffle(x)
    assert torch.equal(shuffled.sort(0).values, x.sort(0).values)
    assert torch.corrcoef(x.T)[0, 1] > 0.9
    assert (torch.corrcoef(shuffled.T) - torch.eye(3)).abs().max() < 4 / math.sqrt(5000)


def test_mines_gradient_has_less_bias_than_a_small_batchs():
    # T = a x: the gradient of log E[e^(a x)] for a standard normal x is a, exactly.
    torch.manual_seed(0)
    a, biased, corrected = 1.5, [], []
    exact = torch.tensor(a**2 / 2)  # log E[e^T], which a moving average tends to
    for _ in range(4000):
        x = torch.randn(8)
        for found, loss in (
            (biased, lambda t: bounds.donsker_varadhan(torch.zeros(8), t)),
            (corrected, lambda t: bounds.mine_objective(torch.zeros(8), t, exact)),
        ):
            slope = torch.tensor(a, requires_grad=True)
            loss(slope * x).backward()
            found.append(-slope.grad.item())
    error = 4 * torch.tensor(corrected).std().item() / math.sqrt(4000)
    assert abs(sum(corrected) / 4000 - a) < error
    assert a - sum(biased) / 4000 > 0.3


def test_gaussians_that_all_correlate_alike_have_the_total_correlation_asked_for():
    for channels, nats in ((2, 3.0), (10, 1.0)):
        assert equicorrelated(channels, nats)[1] == pytest.approx(nats, abs=1e-4)
    assert gaussians(torch.eye(3))[1] == 0


@pytest.mark.parametrize(("channels", "nats"), [(2, 0.5), (4, 1.5)])
def test_a_short_fit_comes_near_the_closed_form(channels, nats):
    torch.manual_seed(0)
    sample, truth = equicorrelated(channels, nats)
    assert estimate(
        sample, Critic(channels, 48), steps=200, batch=512, learning_rate=1e-2, last=20_000
    ) == pytest.approx(truth, abs=0.15)


@pytest.mark.slow
@pytest.mark.parametrize(("channels", "nats"), [(2, 0.5), (2, 3.0), (5, 1.0), (5, 3.0), (10, 0.5), (10, 3.0)])
def test_the_estimate_is_the_closed_form_within_5_percent_or_a_twentieth_of_a_nat(channels, nats):
    torch.manual_seed(0)
    sample, truth = equicorrelated(channels, nats)
    assert estimate(sample, Critic(channels)) == pytest.approx(truth, abs=max(0.05, 0.05 * truth))


@pytest.mark.slow
def test_in_20_dimensions_the_same_fit_is_within_a_tenth_and_too_low():
    torch.manual_seed(0)
    sample, truth = equicorrelated(20, 3.0)
    assert 0.9 * truth < estimate(sample, Critic(20)) < truth


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sample", "truth", "options"),
    [
        (xor, math.log(2), {}),
        (lambda n: torch.randn(n, 5), 0.0, {}),
        (rotated_square, 1 - math.log(2), {"batch": 4096, "learning_rate": 1e-2}),  # its edges are sharp
    ],
    ids=["xor", "independent", "square"],
)
def test_what_pairs_or_correlations_do_not_show_is_found_within_3_hundredths(sample, truth, options):
    torch.manual_seed(0)
    critic = Critic(sample(2).shape[1], 64, 3)
    assert estimate(sample, critic, **options) == pytest.approx(truth, abs=0.03)


def test_xor_is_pairwise_independent_and_the_square_uncorrelated():
    torch.manual_seed(0)
    for x in (xor(40_000), rotated_square(40_000)):
        off = torch.corrcoef(x.T) - torch.eye(x.shape[1])
        assert off.abs().max() < 4 / 200
    assert (xor(100).sum(1) % 2 == 0).all()
    assert (rotated_square(1000).abs().sum(1) <= 1).all()


def test_the_variable_of_a_map_is_a_mean_or_one_position_an_image():
    torch.manual_seed(0)
    maps = torch.arange(6).float()[:, None, None, None] + torch.rand(6, 3, 4, 5) / 2
    assert torch.allclose(variable(maps, "pooled"), maps.mean((2, 3)))
    row = variable(maps, "position", torch.Generator().manual_seed(1))
    where = (maps == row[:, :, None, None]).all(1).flatten(1)
    assert (where.sum(1) == 1).all(), "all channels of one position of the same image"
    assert len(where.int().argmax(1).unique()) > 1


def test_units_and_offsets_do_not_matter_to_a_critic():
    torch.manual_seed(0)
    critic, x = Critic(3), torch.randn(64, 3)
    scaled = x * torch.tensor([100.0, 0.01, 3.0]) + 7
    words = [mutual_interaction(critic, rows, torch.Generator().manual_seed(1)) for rows in (x, scaled)]
    assert words[0].item() == pytest.approx(words[1].item(), rel=1e-2, abs=1e-4)
    assert (standardize(torch.cat([x, torch.ones(64, 1)], 1))[:, 3] == 0).all()


def test_each_gradient_reaches_its_own_side():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    mimic = MiMIc(model, ["1"], example=torch.randn(2, 4))
    model(torch.randn(32, 4))
    mimic.penalty().backward()
    assert model[0].weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in mimic.critics.parameters())
    model.zero_grad()
    mimic.critic_loss().backward()
    assert model[0].weight.grad is None
    assert all(p.grad is not None for p in mimic.critics.parameters())


def test_three_lines_attach_it_to_a_residual_network():
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    images, labels = torch.randn(8, 3, 32, 32), torch.randint(10, (8,))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.bn1.eval()

    mimic = MiMIc(model, layers=["layer1.0", "avgpool"], weight=0.1, example=images)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items()), "running means too"
    assert model.layer1.training
    assert not model.bn1.training
    mimic.join(optimizer)
    loss = nn.functional.cross_entropy(model(images), labels) + mimic.loss()

    weights = [critic.layers[0].weight.clone() for critic in mimic.critics.values()]
    assert [w.shape[1] for w in weights] == [64, 512]
    loss.backward()
    optimizer.step()
    assert all(not torch.equal(w, c.layers[0].weight) for w, c in zip(weights, mimic.critics.values(), strict=True))
    assert set(before) == set(model.state_dict()), "nothing is added to the model"


def test_what_follows_a_layer_in_place_does_not_change_what_is_seen():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True))
    mimic = MiMIc(model, ["0"], example=torch.randn(2, 4))
    x = torch.randn(32, 4)
    model(x)
    assert torch.equal(mimic.features["0"], model[0](x))
    assert mimic.features["0"].min() < 0


def test_a_plug_in_that_failed_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(4, 3), Pair())
    with pytest.raises(MiMIcError, match="returns a tuple"):
        MiMIc(model, ["1"], example=torch.randn(2, 4))
    MiMIc(model, ["0"], example=torch.randn(2, 4))
    assert not model[1]._forward_hooks
    with pytest.raises(MiMIcError, match="'0' is named twice"):
        MiMIc(model, ["0", "0"])


def test_a_layer_may_have_the_name_of_a_method_of_dictionaries():
    model = nn.Sequential()
    model.add_module("values", nn.Linear(4, 3))
    mimic = MiMIc(model, ["values"], example=torch.randn(2, 4))
    model(torch.randn(8, 4))
    assert mimic.loss().isfinite()


def test_the_moving_average_survives_scores_whose_exponentials_do_not():
    torch.manual_seed(0)
    critic, x = Critic(3, average=0.5), torch.randn(64, 3)
    nn.init.constant_(critic.layers[-1].bias, 200.0)
    critic.loss(x)
    assert critic.log_average.item() == pytest.approx(200 - math.log(2), abs=0.5)
    nn.init.zeros_(critic.layers[-1].bias)
    for _ in range(400):
        critic.loss(x)
    assert critic.log_average.item() == pytest.approx(0, abs=0.5)


def test_info_nce_is_its_definition_and_needs_no_square_of_rows():
    torch.manual_seed(0)
    joint, product = torch.randn(2, 7)
    shares = [j - torch.cat([j[None], product]).logsumexp(0) for j in joint]
    assert bounds.info_nce(joint, product).item() == pytest.approx((sum(shares) / 7 + math.log(8)).item(), rel=1e-6)
    assert bounds.info_nce(torch.zeros(10**6), torch.zeros(10**6)).item() == pytest.approx(0, abs=1e-4)


def one_of_two(rank, file, kept):
    """A process with data of its own: the critics of both must end alike."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.0)
    mimic = MiMIc(net, ["0"], example=torch.randn(2, 4))
    mimic.join(optimizer, 1e-2, steps=4)
    torch.manual_seed(rank + 1)
    net(torch.randn(64, 4))
    mimic.critic_loss().backward()
    mimic._average()  # as data-parallel training does for the first step
    optimizer.step()
    torch.save(mimic.critics["0"].state_dict()["layers.0.weight"], kept / str(rank))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_critics_of_processes_with_other_data_stay_alike(tmp_path):
    torch.multiprocessing.spawn(one_of_two, (tmp_path / "meeting", tmp_path), nprocs=2)
    weights = [torch.load(tmp_path / str(rank), weights_only=True) for rank in (0, 1)]
    torch.testing.assert_close(*weights, rtol=0, atol=1e-7)


def test_further_steps_move_the_critics_alone():
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    net = nn.Sequential(model)
    moved = []
    for steps in (1, 4):
        optimizer = torch.optim.Adam(net.parameters(), lr=0.0)
        mimic = MiMIc(net, ["0"], example=torch.randn(2, 4))
        mimic.join(optimizer, 1e-3, steps)
        net(torch.randn(64, 4))
        start, weight = mimic.critics["0"].layers[0].weight.clone(), model.weight.clone()
        (mimic.loss()).backward()
        optimizer.step()
        moved.append((mimic.critics["0"].layers[0].weight - start).abs().mean().item())
        assert torch.equal(model.weight, weight)
        mimic.remove()
    assert moved[1] > 2 * moved[0]


def test_after_removal_the_model_is_as_it_was():
    model = nn.Sequential(nn.Linear(4, 3))
    mimic = MiMIc(model, "0")
    mimic.remove()
    model(torch.randn(4, 4))
    assert not mimic.features
    assert not model[0]._forward_hooks


def test_it_works_under_autocast_in_full_precision():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    mimic = MiMIc(model, ["0"], example=torch.randn(2, 4))
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(32, 4))
        assert mimic.features["0"].dtype is torch.bfloat16
        loss = mimic.loss()
    assert loss.dtype is torch.float32
    loss.backward()
    assert model[0].weight.grad.isfinite().all()


def test_spectral_normalization_bounds_the_slope_and_the_gradient_penalty_moves_it_to_one():
    torch.manual_seed(0)
    x = torch.randn(256, 5)
    critic = Critic(5, spectral=True)
    rows = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(critic(rows).sum(), rows)
    assert slope.norm(dim=1).max() < 1.1**3  # a SiLU's own slope is at most 1.1
    plain = Critic(5)
    before = plain.gradient_penalty(x).item()
    optimizer = torch.optim.Adam(plain.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        plain.loss(x, penalty=10.0).backward()
        optimizer.step()
    assert plain.gradient_penalty(x).item() < 0.2 * before


class Pair(nn.Module):
    def forward(self, x):
        return x, x


def test_bad_input_gets_one_sentence_that_says_what_to_do():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1), nn.Identity())
    with pytest.raises(MiMIcError, match=r"Unknown layer 'layer1'\.|Valid: 0, 1, 2"):
        MiMIc(model, ["layer1"])
    named = nn.ModuleDict({"encoder": nn.Linear(2, 2)})
    with pytest.raises(MiMIcError, match="Did you mean 'encoder'"):
        MiMIc(named, ["encodr"])
    with pytest.raises(MiMIcError, match="Name at least one layer"):
        MiMIc(model, [])
    with pytest.raises(CriticError, match="at least two channels, got 1"):
        MiMIc(model, ["1"], example=torch.randn(2, 4))
    mimic = MiMIc(nn.Sequential(nn.Linear(4, 3)), ["0"])
    with pytest.raises(MiMIcError, match="seen no batch yet"):
        mimic.penalty()
    with pytest.raises(MiMIcError, match="no critics yet"):
        mimic.join(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1))


def test_a_batch_of_one_is_refused():
    model = nn.Sequential(nn.Linear(4, 3))
    mimic = MiMIc(model, ["0"], example=torch.randn(2, 4))
    model(torch.randn(1, 4))
    with pytest.raises(CriticError, match="batch of one cannot be shuffled"):
        mimic.penalty()


def test_a_layer_that_returns_a_tuple_is_refused():
    model = nn.Sequential(nn.Linear(4, 3), Pair())
    with pytest.raises(MiMIcError, match="Layer '1' returns a tuple"):
        MiMIc(model, ["1"], example=torch.randn(2, 4))


def test_a_model_in_evaluation_mode_is_refused():
    model = nn.Sequential(nn.Linear(4, 3)).eval()
    mimic = MiMIc(model, ["0"], example=torch.randn(2, 4))
    model(torch.randn(8, 4))
    with pytest.raises(MiMIcError, match="evaluation mode"):
        mimic.penalty()


def test_a_critic_that_is_not_finite_is_refused():
    critic = Critic(3)
    nn.init.constant_(critic.layers[0].weight, math.nan)
    with pytest.raises(CriticError, match="not finite"):
        mutual_interaction(critic, torch.randn(8, 3))
    with pytest.raises(CriticError, match="tensor of floats"):
        variable(torch.zeros(8, 3, dtype=torch.int64))
    with pytest.raises(CriticError, match="made for 3 channels, got 4"):
        mutual_interaction(Critic(3), torch.randn(8, 4))
    with pytest.raises(CriticError, match="Unknown bound"):
        Critic(3, bound="dv")
