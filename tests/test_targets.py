"""The figures that were asked for and reached stay reached: whoever records a run anew meets them again."""

import numpy as np
import pytest

from predoc_lib import results


def metrics(experiment, name):
    return results.load(results.RESULTS / experiment / name)["metrics"]


def test_predicted_features_cost_the_reports_network_6_db_its_remainder_being_treated_alike():
    frames = metrics("features_to_frames", "road-irevnet")["frames"]
    assert frames["own"]["last"]["psnr"] - frames["predicted +3"]["last"]["psnr"] >= 6


def test_a_decoder_that_sees_the_last_frame_beats_the_i_revnet_by_6_db_and_copy_last_by_1():
    made = metrics("features_to_frames", "road-last")["frames"]["predicted +3"]
    report = metrics("features_to_frames", "road-irevnet")["frames"]["predicted +3"]
    assert made["made"]["psnr"] - max(report[row]["psnr"] for row in ("last", "zero")) >= 6
    assert made["made"]["psnr"] - made["copy-last"]["psnr"] >= 1


def precision(kind, drives, time, method, share=False):
    """mAP50 of a method at a time, over the three seeds; with ``share``, of the detector's on the true frame."""
    rows = [metrics("yolo_dynamics", f"road-{kind}-seed{seed}")[drives][time] for seed in (0, 1, 2)]
    return np.mean([row[method]["map50"] / (row["detector"]["map50"] if share else 1) for row in rows])


# On the drives set aside the share at +6 is short by 0.3 points, and half-way the two tie: the chapter says so.
@pytest.mark.parametrize(
    ("drives", "time", "share"), [("truth", "3", 0.90), ("truth", "6", 0.75), ("aside", "3", 0.90)]
)
def test_predicted_features_keep_so_much_of_the_ceiling_and_more_than_what_costs_nothing(drives, time, share):
    assert precision("ode", drives, time, "ode", share=True) >= share
    for rival in ("copy-last", "extrapolation", "tracked"):
        assert precision("ode", drives, time, "ode") > precision("ode", drives, time, rival)


def over_the_rival(drives, times):
    """mAP50 of the ODE minus the ConvGRU's, mean over times, of each seed; and twice its standard deviation."""
    runs = [
        [metrics("yolo_dynamics", f"road-{kind}-seed{seed}")[drives] for kind in ("ode", "gru")] for seed in (0, 1, 2)
    ]
    by = [np.mean([ode[t]["ode"]["map50"] - gru[t]["gru"]["map50"] for t in times]) for ode, gru in runs]
    return np.mean(by), 2 * np.std(by, ddof=1)


@pytest.mark.parametrize("drives", ["truth", "aside"])
@pytest.mark.parametrize("time", list("123456"))
def test_predicted_features_are_at_least_level_with_the_rivals_at_whole_frames(drives, time):
    by, sure = over_the_rival(drives, [time])
    assert by >= -min(sure, 0.01)  # wide spreads excuse no more than a point


def test_predicted_features_are_above_the_rivals_half_way_on_the_test_drives():
    by, sure = over_the_rival("truth", ["0.5", "1.5", "2.5", "3.5", "4.5", "5.5"])
    assert by > sure


def on_a_thousand_drives(times, rival=None):
    """Of the models of seed 0: share of the ceiling, or mAP50 above a rival; and its standard error from set to set."""
    sets = metrics("yolo_dynamics", "drives")

    def figure(rows):
        ours, other = (np.mean([rows[t][name]["map50"] for t in times]) for name in ("ode", rival or "detector"))
        return ours - other if rival else ours / other

    found = {name: figure(rows) for name, rows in sets.items()}
    whole = found.pop("all")
    return whole, np.std(list(found.values()), ddof=1) / np.sqrt(len(found))


@pytest.mark.parametrize(("time", "share"), [("3", 0.90), ("6", 0.75)])
def test_seed_0s_features_keep_as_much_on_a_thousand_drives_more_and_more_than_what_costs_nothing(time, share):
    assert on_a_thousand_drives([time])[0] >= share
    for rival in ("copy-last", "extrapolation", "tracked"):
        by, error = on_a_thousand_drives([time], rival)
        assert by > 2 * error


@pytest.mark.parametrize("time", list("123456"))
def test_seed_0s_features_are_level_with_the_rivals_on_a_thousand_drives_more_at_whole_frames(time):
    by, error = on_a_thousand_drives([time], "gru")
    assert by >= -min(2 * error, 0.01)


def test_seed_0s_features_are_above_the_rivals_on_a_thousand_drives_more_half_way():
    by, error = on_a_thousand_drives(["0.5", "1.5", "2.5", "3.5", "4.5", "5.5"], "gru")
    assert by > 2 * error


@pytest.mark.parametrize("pair", ["RubberWhale", "motorcycle"])
def test_fitted_flows_are_nearer_than_farnebacks_and_dis(pair):
    found = metrics("flow_warp", "pairs")[pair]
    assert found["fitted"]["known"] < min(found["farneback"]["known"], found["dis"]["known"])
    if pair == "RubberWhale":
        assert found["fitted"]["known"] <= 0.20


def test_the_velocity_field_is_above_copy_last_by_3_db_and_the_cross_fade_by_2():
    found = metrics("flow_warp", "road-seed0")["psnr"]
    assert found["3"]["ode"] - found["3"]["copy-last"] >= 3
    for half_way in ("0.5", "1.5"):
        assert found[half_way]["ode"] - found[half_way]["cross-fade"] >= 2


@pytest.mark.parametrize("flow", ["seen", "next"])
def test_the_velocity_fields_error_is_at_most_a_quarter_of_zero_flows_and_without_the_price_on_speed_it_is_more(flow):
    paid, free = (metrics("flow_warp", f"road-{name}")["error"][flow] for name in ("seed0", "free"))
    assert paid["ode"] <= 0.25 * paid["zero"] < free["ode"]


def test_critics_halve_the_digits_dependence_and_keep_rank_and_accuracy():
    def mean(way, *path):
        values = []
        for seed in (0, 1, 2):
            value = metrics("mimic", f"digits-{way}-seed{seed}")
            for key in path:
                value = value[key]
            values.append(value)
        return np.mean(values)

    for measure in ("copula", "neighbours"):
        plain, paid = (mean(way, "penultimate", measure) for way in ("none", "penultimate"))
        assert paid <= 0.5 * plain
    assert mean("penultimate", "penultimate", "rank") >= 0.9 * mean("none", "penultimate", "rank")
    assert mean("penultimate", "accuracy") >= mean("none", "accuracy") - 0.01


def test_a_quarter_of_an_hour_on_a_gpu_is_enough_for_3_5_bits_per_dim_on_cifar10():
    record = results.load(results.RESULTS / "msflow" / "cifar10_subset-haar-flow_matching-h200")
    found = record["metrics"]["test"]
    assert record["wall_time_s"] <= 15 * 60
    assert found["bits_per_dim"] + 2 * found["standard_error"] <= 3.5 < min(found["mixture"], found["webp"])


def test_three_scales_are_where_one_scales_likelihood_gets_in_half_an_hour_in_half_of_it_by_flow_matching_in_a_20th():
    race = {
        name: results.load(results.RESULTS / "msflow" / f"race16-{name}")["history"]
        for name in ("single-likelihood", "single-likelihood-long", "multi-likelihood", "multi-flow_matching")
    }
    steps = max(row["step"] for row in race["single-likelihood"] if row["seconds"] <= 1800)
    baselines = race["single-likelihood"] + race["single-likelihood-long"]  # planned for fewer steps, and for more
    target = min(row["bits_per_dim"] for row in baselines if row["step"] <= steps)
    for name, share in (("multi-flow_matching", 1 / 20), ("multi-likelihood", 1 / 2)):
        assert min(row["bits_per_dim"] for row in race[name] if row["seconds"] <= 1800 * share) <= target


@pytest.mark.parametrize(("name", "minutes", "lead"), [("seed0", 6, 0.05), ("long", 30, 0.25)])
def test_minutes_of_flow_matching_are_enough_to_beat_the_mixture_on_each_picture(name, minutes, lead):
    record = results.load(results.RESULTS / "msflow" / f"photos16-haar-flow_matching-{name}")
    assert record["wall_time_s"] <= 60 * minutes
    for picture in ("chelsea", "flower"):
        found = record["metrics"][picture]
        assert found["bits_per_dim"] <= found["mixture"] - lead
        assert found["bits_per_dim"] < found["webp"]


def test_an_hour_on_two_cores_is_enough_for_3_7_bits_per_dim_on_cifar10():
    record = results.load(results.RESULTS / "msflow" / "cifar10_subset-haar-flow_matching")
    found = record["metrics"]["test"]
    assert record["wall_time_s"] <= 3600
    assert found["bits_per_dim"] + 2 * found["standard_error"] <= 3.70 < min(found["mixture"], found["webp"])
