"""Makes the fixtures of this folder with Hugging Face Diffusers.

    python golden.py [OUTPUT [PART ...]]

needs `torch`, `diffusers`, `scipy`, `torchsde` and `safetensors`. Reads the rows of `cases.json`,
writes what Diffusers makes of them to OUTPUT (default: `fixtures` beside this file), all or the
parts that are named, and prints the versions, which are recorded in `made_with.json` when all is
made. A new test is a new row.

A trajectory is a sampling loop without a network. One generator gives the start and the noise of
the steps; the "model" predicts `0.8 x + 0.15 cos(3 x + t / 100)`. With `begin`, the loop starts
inside the schedule from a noised wave. The tolerance of each recorded step is 2e-5 of the sample's
largest value (4e-3 in half precision), twenty times what a change of 1e-6 at the start grows to,
and 2e-7 of the start's largest value: the last digit of the noise that is removed.

`pairwise` are more such rows: for each class with a beta schedule, nearly every two of beta
schedule, prediction type, spacing, sigma schedule, order, kind of solver and number of steps (1, 2,
3, 5, 10, 25, 50, 999) meet in some row, where Diffusers gives finite numbers. Their tolerance grows
by its distance from itself when it computes in f64. Of their runs of more than 100 evaluations only
every tenth timestep and sigma is kept (`every`).
"""

import contextlib
import json
import math
import pathlib
import sys
import tempfile
import warnings
from unittest import mock

import diffusers
import numpy
import scipy
import torch
from diffusers.utils import logging
from safetensors.torch import save_file

HERE = pathlib.Path(__file__).parent
SHAPE = (2, 3, 4, 4)

torch.set_num_threads(1)
warnings.simplefilter("ignore")
logger = logging.get_logger("diffusers.configuration_utils")


def finite_json(value):
    """Spells out infinities, which JSON lacks."""
    return "-Infinity" if value == -math.inf else value


def build(name, config):
    config = dict(config)
    if config.get("solver_p"):
        solver_p = dict(config["solver_p"])
        config["solver_p"] = getattr(diffusers, solver_p.pop("_class_name"))(**solver_p)
    config = {k: -math.inf if v == "-Infinity" else v for k, v in config.items()}
    return getattr(diffusers, name)(**config)


def takes(function, argument):
    return argument in function.__code__.co_varnames[: function.__code__.co_argcount]


def wave():
    return torch.sin(torch.arange(math.prod(SHAPE))).reshape(SHAPE)


def model(case, x, t):
    output = 0.8 * x + 0.15 * torch.cos(3 * x + t / 100)
    if case["config"].get("variance_type") in ("learned", "learned_range"):
        output = torch.cat([output, 0.5 + 0.4 * torch.sin(2 * x)], dim=1)
    return output


@contextlib.contextmanager
def in_double(scheduler):
    """Has Diffusers compute in f64 what it computes in f32, from the same noise schedule and random
    numbers.
    """
    for key, value in vars(scheduler).items():
        if isinstance(value, torch.Tensor) and value.dtype == torch.float32:
            setattr(scheduler, key, value.double())
    draw, single = torch.randn, torch.float32
    randn = lambda *size, dtype=None, **options: draw(*size, dtype=single, **options).double()
    with (
        mock.patch.object(torch, "float32", torch.float64),
        mock.patch.object(numpy, "float32", numpy.float64),
        mock.patch.object(torch, "randn", randn),
    ):
        torch.set_default_dtype(torch.float64)
        try:
            yield scheduler
        finally:
            torch.set_default_dtype(single)


def run(case, nudge=0.0, scheduler=None):
    scheduler = scheduler or build(case["scheduler"], case["config"])
    scheduler.set_timesteps(**case["set_timesteps"])
    generator = torch.Generator("cpu").manual_seed(case["seed"])
    dtype = getattr(torch, case.get("dtype", "float32"))
    begin = case.get("begin", 0) * scheduler.order
    noise = torch.randn(SHAPE, generator=generator, dtype=dtype)
    if "begin" in case:
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(begin)
        timesteps = scheduler.timesteps[begin : begin + 1].repeat(SHAPE[0])
        sample = scheduler.add_noise(wave().to(dtype), noise, timesteps)
    else:
        sample = noise * scheduler.init_noise_sigma
    start = sample
    sample = sample + nudge
    options = dict(case.get("step", {}))
    if takes(scheduler.step, "generator"):
        options["generator"] = generator
    samples = []
    for t in scheduler.timesteps[begin:]:
        x = scheduler.scale_model_input(sample, t)
        sample = scheduler.step(model(case, x, t), t, sample, **options).prev_sample
        samples.append(sample)
    return scheduler, start, torch.stack(samples)


def two_digits_up(value):
    value = max(value, 1e-9)
    digits = 1 - math.floor(math.log10(value))
    return math.ceil(value * 10**digits) / 10**digits


def trajectories(cases, out, one_file=None):
    schedules, tables, tensors = {}, {}, {}
    for case in cases:
        name = case["name"]
        scheduler, start, samples = run(case)
        if not torch.isfinite(samples).all():
            raise FloatingPointError(f"{name}: non-finite sample")
        _, _, nudged = run(case, 1e-6)
        noise = torch.zeros_like(samples)
        if one_file:
            with in_double(build(case["scheduler"], case["config"])) as double:
                noise = (samples - run(case, scheduler=double)[2]).abs()
        count = len(samples)
        steps = range(count) if count <= 6 else sorted({0, 1, 2, count // 2, count - 2, count - 1})
        case["recorded_steps"] = list(steps)
        digits = 4e-3 if "dtype" in case else 2e-5
        case["atol"] = [
            two_digits_up(
                float(
                    digits * samples[i].abs().max()
                    + 20 * (samples[i] - nudged[i]).abs().max()
                    + 2e-7 * start.abs().max()
                    + noise[i].max()
                )
            )
            for i in steps
        ]
        case["init_noise_sigma"] = float(scheduler.init_noise_sigma)
        case["order"] = scheduler.order
        if hasattr(scheduler, "alphas_cumprod"):
            table = scheduler.betas.numpy().tobytes() + scheduler.alphas_cumprod.numpy().tobytes()
            if table not in schedules:
                schedules[table] = f"schedule_{len(schedules):02}"
                tables[schedules[table] + ".betas"] = scheduler.betas
                tables[schedules[table] + ".alphas_cumprod"] = scheduler.alphas_cumprod
            case["schedule"] = schedules[table]
        case["file"] = one_file or case["scheduler"].removesuffix("Scheduler") + ".safetensors"
        file = tensors.setdefault(case["file"], {})
        every = 10 if one_file and count > 100 else 1
        if one_file:
            case["every"] = every
        file[name + ".timesteps"] = scheduler.timesteps[::every].clone()
        file[name + ".samples"] = samples[list(steps)].clone()
        if "begin" in case:
            file[name + ".start"] = start.clone()
        if hasattr(scheduler, "sigmas"):
            file[name + ".sigmas"] = scheduler.sigmas[::every].clone()
    for file, content in tensors.items():
        save_file(content, out / file)
    if not one_file:
        save_file(tables, out / "betas.safetensors")
    return cases


def pairwise(cases, out):
    return trajectories(cases, out, "pairwise.safetensors")


def add_noise(cases, out):
    tensors = {}
    for case in cases:
        scheduler = build(case["scheduler"], case["config"])
        scheduler.set_timesteps(case["num_inference_steps"])
        generator = torch.Generator("cpu").manual_seed(case["seed"])
        original = wave()
        noise = torch.randn(SHAPE, generator=generator)
        timesteps = torch.tensor(case["timesteps"])
        tensors[case["name"] + ".noisy"] = scheduler.add_noise(original, noise, timesteps)
        if hasattr(scheduler, "get_velocity"):
            tensors[case["name"] + ".velocity"] = scheduler.get_velocity(original, noise, timesteps)
    save_file(tensors, out / "add_noise.safetensors")
    return cases


def interchange(cases, _out):
    warned = []
    logger.warning = lambda message, *_: warned.append(message)
    for case in cases:
        warned.clear()
        classes = [case["source"]["_class_name"], *case["chain"]]
        config = dict(case["source"])
        for place, name in enumerate(classes):
            overrides = case["overrides_of_first"] if place == 1 else {}
            scheduler = getattr(diffusers, name).from_config(config, **overrides)
            config = scheduler.config
        arguments = set(type(scheduler)._get_init_keys(type(scheduler)))
        public = {k: finite_json(v) for k, v in config.items() if not k.startswith("_")}
        case["effective"] = {k: v for k, v in sorted(public.items()) if k in arguments}
        case["retained"] = {k: v for k, v in sorted(public.items()) if k not in arguments}
        case["defaulted"] = sorted(config.get("_use_default_values", []))
        case["warnings"] = len(warned)
        scheduler.set_timesteps(10)
        case["timesteps_10"] = scheduler.timesteps.tolist()
    return cases


def pairs(sources, _out):
    """Every source, made from its class's options, to every class: what differs from the class's
    own defaults.
    """
    warned = []
    logger.warning = lambda message, *_: warned.append(message)
    classes = [source["_class_name"] for source in sources]
    public = lambda scheduler: {
        k: finite_json(v) for k, v in scheduler.config.items() if not k.startswith("_")
    }
    defaults = {name: public(getattr(diffusers, name)()) for name in classes}
    rows = []
    for source in sources:
        own = getattr(diffusers, source["_class_name"]).from_config(dict(source))
        for name in classes:
            warned.clear()
            row = {"from": source["_class_name"], "to": name}
            try:
                scheduler = getattr(diffusers, name).from_config(own.config)
                differs = lambda k, v: defaults[name].get(k, "absent") != v
                row["differs"] = {k: v for k, v in public(scheduler).items() if differs(k, v)}
                row["defaulted"] = sorted(scheduler.config.get("_use_default_values", []))
                row["warnings"] = len(warned)
            except (ValueError, NotImplementedError):
                row["refused"] = True
            rows.append(row)
    return {"sources": sources, "defaults": defaults, "rows": rows}


def saved(cases, _out):
    """What this crate saves (`text`), loaded by Diffusers, and what Diffusers saves then."""
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            file = pathlib.Path(folder, "scheduler_config.json")
            file.write_text(case["text"])
            scheduler = getattr(diffusers, case["scheduler"]).from_pretrained(folder)
            scheduler.save_pretrained(folder)
            case["saved_again"] = file.read_text()
        scheduler.set_timesteps(10)
        case["timesteps_10"] = scheduler.timesteps.tolist()
    return cases


def rejected(cases, _out):
    for case in cases:
        case = case | {"name": "rejected", "seed": 0}
        try:
            made = lambda: build(case["scheduler"], case["config"])
            samples = run(case)[2] if case["set_timesteps"] else made()
        except (ValueError, NotImplementedError) as error:
            kind = type(error).__name__
        else:
            finite = isinstance(samples, torch.Tensor) and samples.isfinite().all()
            kind = "none" if finite else "FloatingPointError"
        if kind == "none" or kind != case["error"]:
            raise AssertionError(f"Diffusers says {kind} to {case}")
    return cases


def randn(cases, out):
    tensors = {}
    for case in cases:
        generator = torch.Generator("cpu").manual_seed(case["seed"])
        for place, shape in enumerate(case["draws"]):
            dtype = getattr(torch, case["dtype"])
            draw = torch.randn(shape, generator=generator, dtype=dtype)
            tensors[f"{case['name']}.{place}"] = draw
    save_file(tensors, out / "randn.safetensors")
    return cases


def spacing(_cases, _out):
    """For every number of steps: the count of timesteps and the sum of each times its place,
    from 1.

    The entry -1 that Diffusers' trailing spacing yields for some numbers of steps is left out
    and counted.
    """
    rows = {}
    for name in ("DDIMScheduler", "UniPCMultistepScheduler"):
        for kind in ("linspace", "leading", "trailing"):
            unipc = name == "UniPCMultistepScheduler"
            options = {"final_sigmas_type": "sigma_min"} if unipc else {}
            scheduler = getattr(diffusers, name)(timestep_spacing=kind, **options)
            row, extra = [], []
            for steps in range(1, 1001):
                scheduler.set_timesteps(steps)
                timesteps = scheduler.timesteps.tolist()
                if timesteps[-1] == -1:
                    timesteps.pop()
                    extra.append(steps)
                assert len(timesteps) == steps
                row.append(sum(t * place for place, t in enumerate(timesteps, 1)))
            rows[f"{name}.{kind}"] = {"weighted_sums": row, "extra_entry": extra}
    return rows


def saved_there(_cases, out):
    """A configuration as Diffusers saves it, with a bare infinity."""
    with tempfile.TemporaryDirectory() as folder:
        scheduler = diffusers.DPMSolverMultistepScheduler(1000, 0.00085, 0.012, "scaled_linear")
        scheduler.save_pretrained(folder)
        saved = pathlib.Path(folder, "scheduler_config.json").read_text()
    (out / "saved_dpmsolver_multistep.json").write_text(saved)


def main():
    out = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "fixtures"
    out.mkdir(parents=True, exist_ok=True)
    cases = json.loads((HERE / "cases.json").read_text())
    versions = {
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "scipy": scipy.__version__,
    }
    parts = (
        trajectories, pairwise, add_noise, interchange, pairs, saved, rejected, randn, spacing,
        saved_there,
    )
    for part in parts:
        if sys.argv[2:] and part.__name__ not in sys.argv[2:]:
            continue
        rows = part(cases.get(part.__name__), out)
        if rows is not None:
            listed = lambda: ",\n".join(map(json.dumps, rows)).join(["[\n", "\n]"])
            lines = json.dumps(rows) if isinstance(rows, dict) else listed()
            (out / f"{part.__name__}.json").write_text(lines + "\n")
    if not sys.argv[2:]:
        (out / "made_with.json").write_text(json.dumps(versions) + "\n")
    print(versions)


if __name__ == "__main__":
    main()
