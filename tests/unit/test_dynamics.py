"""Models of features through time: what they are before training, and what time means to them."""

import pytest
import torch
from torch.nn import functional as F

from predoc_lib.yolo.dynamics import (
    ConvGRUCell,
    CopyLast,
    Extrapolation,
    FeatureGRU,
    FeatureODE,
    Field,
    kinetic_energy,
    places,
)
from predoc_lib.yolo.motion import FIRM

SHAPES = [(5, 2, 3), (4, 4, 6)]
SEEN = torch.arange(3.0, dtype=torch.float64)
MODELS = [(FeatureODE, True), (FeatureODE, False), (FeatureGRU, True), (FeatureGRU, False)]
models = pytest.mark.parametrize(("kind", "moves"), MODELS)
overviews = pytest.mark.parametrize("overview", [False, True])


def features(t=3, batch=2):
    return [torch.randn(batch, t, *shape, dtype=torch.float64) for shape in SHAPES]


def small(kind, moves, shapes=SHAPES, **options):
    return kind(shapes, width=6, moves=moves, **options).double()


def filled(network, by=0.2):
    """As if trained: no parameter is zero."""
    with torch.no_grad():
        for p in network.parameters():
            p.add_(by * torch.randn_like(p))
    return network


def trained(kind, moves, **options):
    return filled(small(kind, moves, **options))


def times(*values):
    return torch.tensor(values, dtype=torch.float64)


def close(found, wanted, tol=1e-9):
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y, atol=tol, rtol=0)


@overviews
@models
def test_the_untrained_model_is_copy_last(kind, moves, overview):
    x, query = features(), times(2.0, 2.5, 4.0, 7.75)
    model = small(kind, moves, overview=overview)
    model.set_scales(x)
    close(model.predict(x, SEEN, query), CopyLast().predict(x, SEEN, query))


@overviews
@models
def test_a_changed_model_is_not(kind, moves, overview):
    x, query = features(), times(3.0)
    found = trained(kind, moves, overview=overview).predict(x, SEEN, query)
    assert min((a - b).abs().max() for a, b in zip(found, CopyLast().predict(x, SEEN, query), strict=True)) > 0.01


def test_the_energy_of_a_straight_way_is_its_speed_squared_at_any_times_and_a_detour_costs_more():
    t = times(0.0, 0.5, 2.0, 3.0)
    start, speed = torch.randn(2, 2, 6, 4, 6, dtype=torch.float64)
    straight = start + t[:, None, None, None, None] * speed
    torch.testing.assert_close(kinetic_energy(straight, t), speed.square().mean())
    detour = straight.clone()
    detour[1] += 1
    assert kinetic_energy(detour, t) > kinetic_energy(straight, t)
    assert kinetic_energy(straight[:1], t[:1]) == 0


@models
def test_the_energy_is_that_of_the_way_from_the_contexts_end(kind, moves):
    """An ODE that is asked more often knows its way better, and a straight line is the shortest of all."""
    model, x = trained(kind, moves), features()
    every, last = times(2.0, 3.0, 4.0, 5.0), times(5.0)
    found, energy = model.predict_with_energy(x, SEEN, every)
    close(found, model.predict(x, SEEN, every))
    start, far = (model.predict_with_energy(x, SEEN, t)[1] for t in (times(2.0), last))
    assert 0 == start < far <= energy + 1e-12
    if kind is FeatureGRU:  # it steps from frame to frame, whatever is asked
        torch.testing.assert_close(far, energy)


def test_extrapolation_goes_on_along_the_line_of_the_last_two():
    x = [torch.randn(2, 1, *shape, dtype=torch.float64) for shape in SHAPES]
    speed = [torch.randn_like(y) for y in x]
    t, query = times(0.0, 1.0, 3.0), times(3.0, 3.5, 9.0)
    line = [[y + v * at[:, None, None, None] for y, v in zip(x, speed, strict=True)] for at in (t, query)]
    close(Extrapolation().predict(line[0], t, query), line[1])


@pytest.mark.parametrize("moves", [True, False])
def test_the_odes_features_do_not_depend_on_which_other_times_are_asked(moves):
    x, gaps = features(), []
    model = trained(FeatureODE, moves)
    for step in (0.5, 0.05):
        model.ode.step_size = step
        alone = model.predict(x, SEEN, times(4.0))
        among = model.predict(x, SEEN, times(2.0, 2.3, 3.1, 4.0, 5.0))
        gaps.append(max((a[:, 0] - b[:, 3]).abs().max().item() for a, b in zip(alone, among, strict=True)))
    assert gaps[1] < 1e-3, "but for the solver's error"
    assert gaps[1] < gaps[0] / 5


def test_what_follows_the_time_asked_for_changes_nothing():
    x, model = features(), trained(FeatureODE, True)
    close(model.predict(x, SEEN, times(3.0)), [y[:, :1] for y in model.predict(x, SEEN, times(3.0, 3.4, 8.0))])


@models
def test_only_differences_of_times_count(kind, moves):
    x, model = features(), trained(kind, moves)
    close(model.predict(x, SEEN, times(2.5, 4.0)), model.predict(x, SEEN + 7, times(9.5, 11.0)))


@pytest.mark.parametrize("moves", [True, False])
def test_the_gru_between_two_frames_is_on_the_line_between_them(moves):
    x, model = features(), trained(FeatureGRU, moves)
    before, after = (model.predict(x, SEEN, times(t)) for t in (4.0, 5.0))
    close(model.predict(x, SEEN, times(4.5)), [(a + b) / 2 for a, b in zip(before, after, strict=True)])
    close(model.predict(x, SEEN, times(4.25)), [0.75 * a + 0.25 * b for a, b in zip(before, after, strict=True)])


def test_the_ode_between_two_frames_is_not():
    x, model = features(), trained(FeatureODE, True)
    before, half, after = (model.predict(x, SEEN, times(t)) for t in (4.0, 4.5, 5.0))
    mean = [(a + b) / 2 for a, b in zip(before, after, strict=True)]
    assert max((a - b).abs().max() for a, b in zip(half, mean, strict=True)) > 1e-3


@overviews
def test_rivals_have_equal_parameters(overview):
    sizes = [sum(p.numel() for p in kind(SHAPES, 48, moves, overview).parameters()) for kind, moves in MODELS]
    assert max(sizes) < 1.02 * min(sizes)


@overviews
@pytest.mark.parametrize("network", ["field", "cell", "encoder"])
def test_with_an_overview_a_cell_hears_the_farthest_at_once_and_without_it_does_not(network, overview):
    shape = (4, 4, 40)
    model = trained(FeatureODE, False, shapes=[shape], overview=overview)
    cell = filled(ConvGRUCell(0, 6, overview).double())
    reads = {
        "field": lambda x: model.ode.f(SEEN[0], x),
        "cell": lambda x: cell(x[:, :0], x),
        "encoder": lambda x: model.encode([x[:, None, :4]], SEEN[:1]),
    }
    x = torch.randn(1, 6, *shape[1:], dtype=torch.float64)
    other = x.clone()
    other[..., 0] += 1
    with torch.no_grad():
        found, changed = (reads[network](y)[..., -1] for y in (x, other))
    assert ((found - changed).abs().max() > 1e-6) == overview


@overviews
def test_a_recurrent_state_stays_between_minus_one_and_one(overview):
    cell = filled(ConvGRUCell(0, 6, overview).double(), by=3.0)
    h = 2 * torch.rand(2, 6, 4, 6, dtype=torch.float64) - 1
    for _ in range(50):
        h = cell(h[:, :0], h)
    assert h.abs().max() <= 1


@overviews
def test_with_an_overview_alone_a_cell_knows_where_it_is_along_both_axes(overview):
    """Far from every edge a convolution of features that are everywhere the same is the same in every cell."""
    model = trained(FeatureODE, True, shapes=[(3, 30, 30)], overview=overview)
    h = model.encode([torch.ones(1, 3, 3, 30, 30, dtype=torch.float64)], SEEN)[..., 10:20, 10:20]
    for axis in (2, 3):
        assert (h.std(axis).max() > 1e-3) == overview


def test_places_go_from_the_upper_left_to_the_lower_right():
    found = places(3, 5)[0]
    assert found[:, 0, 0].tolist() == [-1, -1]
    assert found[:, 2, 4].tolist() == [1, 1]
    assert found[:, 0, 4].tolist() == [1, -1]
    assert found[:, 1, 2].tolist() == [0, 0]


def test_nothing_in_the_state_explodes():
    field = Field(6, True).double()
    with torch.no_grad():
        for p in field.parameters():
            p.mul_(50)
    change = field(times(0.0)[0], 100 * torch.randn(2, 8, 4, 6, dtype=torch.float64))
    assert (change[:, :6].abs() <= 1).all()


def test_every_channel_is_measured_by_its_root_mean_square():
    x, model = features(t=50), small(FeatureODE, True)
    model.set_scales([y * (1 + torch.arange(y.shape[2])[:, None, None]) for y in x])
    for scale in model.scales:
        wanted = 1 + torch.arange(len(scale)).double()
        assert (scale.flatten() / wanted - 1).abs().max() < 0.15


@overviews
@models
def test_every_parameter_learns(kind, moves, overview):
    model = trained(kind, moves, overview=overview)
    found = model.predict(features(), SEEN, times(3.0, 4.0))
    sum(y.square().sum() for y in found).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.usefixtures("as_shipped")
@pytest.mark.parametrize(
    ("t", "query"),
    [([0, 1, 1], [3]), ([0, 2, 1], [3]), ([0, 1, 2], [4, 3]), ([0, 1, 2], [1.5]), ([0, 1, 2], [])],
)
def test_times_that_cannot_be_are_refused(t, query):
    with pytest.raises(ValueError, match="Times must increase, and t_query must not begin before"):
        small(FeatureODE, True).predict(features(), times(*t), times(*query))


@pytest.mark.usefixtures("as_shipped")
def test_features_of_another_network_are_refused_with_both_shapes():
    model = small(FeatureODE, True)
    wrong = [x[:, :, :3] for x in features()]
    with pytest.raises(ValueError, match=r"Features must be .*\(3, 5, 2, 3\).* got \[\[2, 3, 3, 2, 3\]"):
        model.predict(wrong, SEEN, times(3.0))
    with pytest.raises(ValueError, match="Features must be"):
        model.predict(features()[:1], SEEN, times(3.0))
    with pytest.raises(ValueError, match="Features must be"):
        model.predict(features(t=2), SEEN, times(3.0))


@pytest.mark.parametrize(("shapes", "width"), [([(5, 3, 3), (4, 4, 6)], 6), (SHAPES, 0)])
def test_grids_that_do_not_meet_and_no_state_are_refused(shapes, width):
    with pytest.raises(ValueError, match="width must be at least 1 and every head's sides must divide the finest's"):
        FeatureODE(shapes, width)


@overviews
@models
def test_a_clip_is_predicted_alike_alone_and_in_a_batch(kind, moves, overview):
    model, x, later = trained(kind, moves, overview=overview), features(batch=3), times(2.5, 4.0)
    close([y[1:2] for y in model.predict(x, SEEN, later)], model.predict([y[1:2] for y in x], SEEN, later))


def test_what_moves_by_a_cell_a_frame_is_found_there():
    """With ds/dt = (1, 0) and a decoder that corrects nothing a map is shifted; half-way two cells share it."""
    model = small(FeatureODE, True)
    with torch.no_grad():
        model.ode.f.net[-1].bias[-2] = 1.0
        model.priority.weight.zero_()
        model.priority.bias.zero_()
    x = features(batch=1)
    last, found = x[1][:, -1], model.predict(x, SEEN, times(2.5, 3.0))[1]
    moved = (last[..., :-1] + FIRM * last[..., 1:]) / (1 + FIRM)
    torch.testing.assert_close(found[:, 1, ..., 1:], moved)
    torch.testing.assert_close(found[:, 1, ..., 0], last[..., 0])  # nothing comes: it keeps its own
    shared = (0.5 * last[..., :-1] + (0.5 + FIRM) * last[..., 1:]) / (1 + FIRM)
    torch.testing.assert_close(found[:, 0, ..., 1:], shared)


def test_a_convolutional_gru_on_one_cell_has_the_formula_of_a_gru():
    cell = ConvGRUCell(2, 3).double()
    x, h = torch.randn(4, 2, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)

    def linear(layer, *inputs):
        return F.linear(torch.cat(inputs, 1), layer.weight[:, :, 1, 1], layer.bias)

    reset, update = linear(cell.gates, x, h).sigmoid().chunk(2, 1)
    wanted = (1 - update) * h + update * linear(cell.candidate, x, reset * h).tanh()
    torch.testing.assert_close(cell(x[..., None, None], h[..., None, None])[..., 0, 0], wanted)
