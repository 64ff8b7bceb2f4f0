"""Make an experiment's recorded runs: ``python tools/record.py EXPERIMENT [--jobs 2] [--list] [NAME ...]``.

A run that is already under results/ is left alone and one that was stopped goes on from its checkpoint under runs/, so
the command can be stopped and called again; one that fails does not stop the others. Weights are kept, in half
precision, only for the runs that a chapter loads: all of them would not fit into a light clone.
"""

import argparse
import concurrent.futures
import importlib
import multiprocessing
import shutil
import sys
from pathlib import Path

import torch

from predoc_lib import results
from predoc_lib.data.densities import DENSITIES
from predoc_lib.experiments.config import build
from predoc_lib.experiments.flow2d import OBJECTIVES

MNIST = {"dataset": "mnist", "canvas": 64, "width": 192, "content": 48, "steps": 8000}
RECONSTRUCTION, FIRST, FREE = {"objective": "reconstruction"}, {"t0": "first"}, {"field": "free"}
PLAIN = {"layout": "plain", "learning_rate": 1e-3}  # at 3e-3 it stays at the mean image
# At 3e-3 both diverged, the ODE at step 1700: its field came to turn by 7 radians a frame, which rk4 with steps of one
# frame makes grow a hundredfold a step (it is stable up to 2.8).
CAREFUL = {"learning_rate": 1.5e-3, "step_size": 0.5}
LONG = {"n_train": 4000, "batch_size": 16, "precision": "bfloat16"}  # where a processor has instructions for it
FOURTH = {"overview": True, "gradient_weight": 0.5}
SHORT = {"n_train": 700, "steps": 2000, "balanced": False, "kinetic": 0.0}
KEEP = {  # runs whose weights a chapter loads
    "latent_ode": ("digits32-1-stride1-ode-seed0", "digits32-2-stride2-ode-seed0", "mnist64-2-stride2-ode-seed0"),
    "msflow": ("photos16-haar-flow_matching-seed0", "photos16-haar-flow_matching-long"),
    "flow2d": [f"{density}-{objective}-seed0" for density in DENSITIES for objective in OBJECTIVES],
    "features": ("cifar10_subset-seed0",),
    "yolo_dynamics": ("road-ode-seed0", "road-gru-seed0", "road-ode-short-seed0"),
    "flow_warp": ("road-seed0",),
    "features_to_frames": ("road-irevnet", "road-irevnet-pixels", "road-plain", "road-last"),
    "segmentation": ("road",),
    "mimic": ("digits-none-seed0", "digits-first-seed0", "cifar10_subset-none-seed0", "cifar10_subset-first-seed0"),
}
FILES = {"yolo_detector": ("detector.cfg", "detector.weights")}  # in place of weights


def latent_ode() -> dict[str, dict]:
    """{name of the run: its parameters}, the most needed first."""

    def all_of(name: str, stride: int, parameters: dict) -> dict[str, dict]:
        return {
            f"{name}-{n}-stride{stride}-{dynamics}-seed{parameters['seed']}": parameters
            | {"n_digits": n, "stride": stride, "dynamics": dynamics}
            for n in (2, 1)
            for dynamics in ("ode", "gru")
        }

    variants = {
        "digits32-1-stride1-ode-reconstruction": RECONSTRUCTION,
        "digits32-1-stride1-ode-first": FIRST,
        "digits32-1-stride1-ode-first-reconstruction": FIRST | RECONSTRUCTION,
        "digits32-1-stride1-ode-free": FREE,
        "digits32-1-stride1-ode-plain": PLAIN,
        "digits32-1-stride1-ode-report": PLAIN | FREE | FIRST | {"kl_weight": 1.0},
        "digits32-1-stride1-ode-report-reconstruction": PLAIN | FREE | FIRST | RECONSTRUCTION | {"kl_weight": 1.0},
        "digits32-1-stride1-ode-elbo": {"kl_weight": 1.0},
    }
    first, mnist = {"seed": 0}, MNIST | {"seed": 0}
    runs = all_of("digits32", 2, first) | all_of("digits32", 1, first)
    runs |= variants | all_of("mnist64", 2, mnist)
    runs |= all_of("mnist64", 1, mnist | {"steps": 4000})  # as many frames as 8000 steps see at stride 2
    for dynamics in ("ode", "gru"):
        runs[f"mnist64-2-stride1-{dynamics}-seed0"] |= CAREFUL
    for seed in (1, 2):
        runs |= all_of("digits32", 2, {"seed": seed}) | all_of("digits32", 1, {"seed": seed})
    for name in runs:
        if name.startswith("digits32-1-stride2"):
            runs[name] |= {"steps": 6000}  # as many frames as at stride 1; after 3000 steps neither has learned enough
    return runs


def flow2d() -> dict[str, dict]:
    """The same: three ways of training, on three densities; three seeds of the one that the chapter is about."""
    few = {"steps": 1000, "batch_size": 128, "ema": 0.99}  # 512 points a step, as flow matching has, learn slower
    own = {"flow_matching": {}, "likelihood": few, "rnode": few}
    return {
        f"{density}-{objective}-seed{seed}": {"density": density, "objective": objective, "seed": seed} | own[objective]
        for seed in (0, 1, 2)
        for objective in OBJECTIVES
        for density in DENSITIES
        if seed == 0 or objective == "flow_matching"
    }


def msflow() -> dict[str, dict]:
    """The same: MSFlow on photographs for minutes and for longer, and on the subset of CIFAR-10."""
    fast = {"precision": "bfloat16"}  # twice as fast where the processor knows it
    large = fast | {"width": 64, "depth": 3, "learning_rate": 3e-3, "ema": 0.999}
    cifar = {"dataset": "cifar10_subset", "image_size": 32, "batch_size": 64, "steps": 8000, "n_test": 512}
    return {
        "photos16-haar-flow_matching-seed0": fast,
        "photos16-haar-flow_matching-long": large | {"steps": 10_000},
        "cifar10_subset-haar-flow_matching": large | cifar | {"frechet": 512, "evaluate_every": 400},
        "cifar10_subset-haar-flow_matching-h200": large | cifar | GPU,
    } | race()


GPU = {
    "width": 192, "widen": 1.3333, "depth": 4, "batch_size": 512, "learning_rate": 2e-3, "compile": True,
    "steps": 8400, "evaluate_every": 2100, "device": "cuda",
}  # fmt: skip
RATES = (1e-3, 3e-3, 1e-2)
# The width of a single scale makes it as large as three scales are. The cheapest step takes more images, which one
# scale's flow matching learns less from in the same time. Steps of a trial run, and of the run itself.
RACERS = {
    "single-likelihood": ({"scales": 1, "width": 64, "objective": "likelihood", "batch_size": 32}, 90, 200),
    "multi-likelihood": ({"scales": 3, "width": 32, "objective": "likelihood", "batch_size": 32}, 150, 400),
    "single-flow_matching": ({"scales": 1, "width": 64, "objective": "flow_matching", "batch_size": 32}, 1500, 6000),
    "multi-flow_matching": ({"scales": 3, "width": 32, "objective": "flow_matching", "batch_size": 128}, 400, 1700),
}
BEST = {  # of the trials
    "single-likelihood": 3e-3,
    "multi-likelihood": 1e-2,
    "single-flow_matching": 3e-3,
    "multi-flow_matching": 1e-2,
}


def race() -> dict[str, dict]:
    """Single scale against three, likelihood against flow matching: a trial at every learning rate, then the run."""
    runs = {}
    for name, (parameters, trial, steps) in RACERS.items():
        same = parameters | {"ema": 0.98}
        runs |= {
            f"race16-{name}-trial-{rate:g}": same | {"steps": trial, "learning_rate": rate, "evaluate_every": trial}
            for rate in RATES
        }
        if name in BEST:
            runs[f"race16-{name}"] = same | {"steps": steps, "learning_rate": BEST[name]}
    # The fastest racer once more, for about as long as its rival on one scale; the slowest with more steps planned.
    for name, steps in (("multi-flow_matching", 6000), ("single-likelihood", 280)):
        runs[f"race16-{name}-long"] = runs[f"race16-{name}"] | {"steps": steps}
    return runs


def features() -> dict[str, dict]:
    """The same: the classifier whose features the Frechet distance is measured with."""
    cifar = {"dataset": "cifar10_subset", "steps": 4000, "batch_size": 128, "n_test": 5000}
    return {"cifar10_subset-seed0": cifar | {"precision": "bfloat16"}}


def yolo_detector() -> dict[str, dict]:
    """The same: the embedded detector."""
    return {"road": {}}


def yolo_dynamics() -> dict[str, dict]:
    """The same: the road's features through time, the ODE and its rival, in every design; what each choice buys."""
    kinds = {"ode": {}, "gru": {"dynamics": "gru", "moves": False}}
    seeds = [(kind, own, seed) for seed in (0, 1, 2) for kind, own in kinds.items()]
    runs = {f"road-{kind}-seed{seed}": own | LONG | {"seed": seed} for kind, own, seed in seeds}
    runs |= {f"road-{kind}-fourth-seed{seed}": own | FOURTH | LONG | {"seed": seed} for kind, own, seed in seeds}
    runs |= {f"road-{kind}-second-seed{seed}": own | {"seed": seed} for kind, own, seed in seeds}
    short = {f"road-{kind}-short-seed{seed}": own | {"seed": seed} for kind, own, seed in seeds}
    short |= {
        "road-gru-moves": {"dynamics": "gru"},
        "road-ode-still": {"moves": False},
        "road-ode-features": {"heads_weight": 0.0},
        "road-ode-gaussian": {"heads_weight": 0.0, "likelihood": "gaussian"},
        "road-ode-report": {"moves": False, "heads_weight": 0.0},
        "road-ode-random": {"dynamics": "random"},
        "road-ode-gradient": {"gradient_weight": 0.5},
        "road-ode-adversarial": {"adversarial_weight": 0.05},
        "road-ode-key": {"horizon": 6, "key_frames": 2},
    }
    runs |= {name: SHORT | run for name, run in short.items()}
    real = {"video": "driving/solidWhiteRight.mp4", "detector": "yolo/yolo-fastest-1.1.cfg"} | SHORT | {"steps": 500}
    runs |= {f"highway-{kind}": real | own for kind, own in kinds.items()}
    return runs


def flow_warp() -> dict[str, dict]:
    """The same: a velocity field on the drawn road. Errors of fitted flows are recorded by benchmarks/flow_warp.py."""
    return {"road-seed0": {}, "road-free": {"slowness": 0.0}}


def features_to_frames() -> dict[str, dict]:
    """The same: the i-RevNet as the report had it and as it might have been, and what to take instead."""
    invertible, trained = {"method": "irevnet", "learning_rate": 1e-3}, {"pixel_weight": 1.0}
    rows = {
        "irevnet": invertible,
        "last": {},
        "irevnet-quiet": invertible | {"unit": 0.2},
        "plain": {"method": "plain"},
        "irevnet-pixels": invertible | trained,
        "irevnet-true": invertible | trained | {"sees": "true"},
        "irevnet-ode": invertible | trained | {"remainder": "ode"},
        "last-cycle": {"cycle_weight": 0.5},
        "last-adversarial": {"adversarial_weight": 0.02},
        "iresnet": invertible | {"method": "iresnet"},  # to train through 30 fixed points a block takes an hour
        "last-joint": {"end_to_end": True},
        "irevnet-augmented": invertible | trained | {"noise": 0.2, "sees": "between"},
        "irevnet-joint": invertible | trained | {"end_to_end": True},
        "last-true": {"sees": "true"},
        "plain-true": {"method": "plain", "sees": "true"},
    }
    runs = {f"road-{name}": row for name, row in rows.items()}
    # On a real street the equation is trained too: it knows the drawn road only.
    real = {"video": "driving/solidWhiteRight.mp4", "end_to_end": True, "steps": 300}
    return runs | {"highway-last": real, "highway-irevnet": real | invertible | trained}


def segmentation() -> dict[str, dict]:
    """The same: masks of what is to come, and frames of them."""
    return {"road": {}}


def mimic() -> dict[str, dict]:
    """The same: where critics sit on a classifier, beside decorrelation; and how much the layers pay."""
    sets = {
        "digits": {"transfer": True, "evaluate_every": 100},
        "mnist": {"dataset": "mnist", "transfer": True, "evaluate_every": 100},
        "cifar10_subset": {"dataset": "cifar10_subset", "steps": 600, "batch_size": 128, "evaluate_every": 100},
    }
    ways = {place: {"place": place} for place in ("none", "penultimate", "first", "both")}
    ways["decorrelation"] = {"method": "decorrelation", "weight": 0.01}
    runs = {
        f"{name}-{way}-seed{seed}": same | parameters | {"seed": seed}
        for name, same in sets.items()
        for seed in (0, 1, 2)
        for way, parameters in ways.items()
    }
    variants = {f"weight{weight:g}": {"weight": weight} for weight in (0.01, 0.1, 0.3, 1.0)}
    variants |= {f"weight0.01-seed{seed}": {"weight": 0.01, "seed": seed} for seed in (1, 2)}
    critics = {
        "one-step": {"critic_steps": 1},
        "nwj": {"bound": "nwj"},
        "info_nce": {"bound": "info_nce"},
        "spectral": {"spectral": True},
        "gradient": {"gradient_penalty": 1.0},
    }
    variants |= critics
    for name in ("info_nce", "gradient"):  # they left the least
        variants |= {f"{name}-seed{seed}": critics[name] | {"seed": seed} for seed in (1, 2)}
    return runs | {f"digits-penultimate-{name}": sets["digits"] | change for name, change in variants.items()}


def mimic_sprites() -> dict[str, dict]:
    """The same: autoencoders of sprites, each way of taking codes apart."""
    weights = {"beta_vae": 4.0, "factor_vae": 10.0, "beta_tcvae": 6.0, "mimic": 1.0, "decorrelation": 1.0}
    return {
        f"{method}-seed{seed}": {
            "method": method,
            "seed": seed,
            "weight": weights.get(method, 1.0),
            "evaluate_every": 500,
        }
        for seed in (0, 1, 2)
        for method in ("plain", "decorrelation", "mimic", "vae", "beta_vae", "factor_vae", "beta_tcvae")
    }


def mimic_dusk() -> dict[str, dict]:
    """The same: a segmentation by day, seen at dusk, and the one that has learned dusk too."""
    ways = {method: {"method": method} for method in ("plain", "decorrelation", "mimic")}
    ways["plain-both"] = {"method": "plain", "light": "both"}
    return {f"{way}-seed{seed}": run | {"seed": seed} for seed in (0, 1, 2) for way, run in ways.items()}


PLANS = {
    "latent_ode": latent_ode,
    "flow2d": flow2d,
    "msflow": msflow,
    "features": features,
    "yolo_detector": yolo_detector,
    "yolo_dynamics": yolo_dynamics,
    "flow_warp": flow_warp,
    "features_to_frames": features_to_frames,
    "segmentation": segmentation,
    "mimic": mimic,
    "mimic_sprites": mimic_sprites,
    "mimic_dusk": mimic_dusk,
}


def make(experiment: str, name: str) -> str:
    """Make one run, and say how it went."""
    torch.set_num_threads(1)
    module = importlib.import_module(f"predoc_lib.experiments.{experiment}")
    config = build(module.Config, "book", **PLANS[experiment]()[name])
    folder = Path("runs", "record", experiment, name)
    record = module.run(config, folder, progress=False)
    shutil.rmtree(results.RESULTS / experiment / name, ignore_errors=True)  # it is there if it is made again
    results.promote(folder, name, weights=name in KEEP.get(experiment, ()), files=FILES.get(experiment, ()))
    figures = {row: f"{value:.4g}" for row, value in record["history"][-1].items()}
    return f"{name}: {record['wall_time_s']:.0f} s, {figures}"


def main() -> None:
    """Make what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment", choices=PLANS)
    parser.add_argument("names", nargs="*", help="only these")
    parser.add_argument("--list", action="store_true", help="show the plan and what is there")
    parser.add_argument("--again", action="store_true", help="also what is there")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    arguments = parser.parse_intermixed_args()
    plan, there = PLANS[arguments.experiment](), results.RESULTS / arguments.experiment
    wanted = arguments.names or plan
    missing = [name for name in wanted if arguments.again or not (there / name / "metrics.json").exists()]
    if arguments.list:
        print(*(f"{'missing' if name in missing else 'there'}  {name}  {p}" for name, p in plan.items()), sep="\n")
        return
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(arguments.jobs, mp_context=spawn) as pool:
        runs = {pool.submit(make, arguments.experiment, name): name for name in missing}
        for done in concurrent.futures.as_completed(runs):
            error = done.exception()
            print(f"{runs[done]}: {error}" if error else done.result(), flush=True)
    sys.exit(any(run.exception() for run in runs))


if __name__ == "__main__":
    main()
