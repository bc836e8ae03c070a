"""``nemo-eaft plan``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from nemo_eaft.compose import compose
from nemo_eaft.hf_model import check_layout, warn_of_length
from nemo_eaft.plan.hardware import Hardware
from nemo_eaft.plan.layouts import nearest, search
from nemo_eaft.plan.plan import Plan
from nemo_eaft.plan.rehearsal import check_environment, rehearse
from nemo_eaft.plan.report import as_mapping, show, show_layouts, summary
from nemo_eaft.plan.shape import find_shape
from nemo_eaft.settings import Settings

START = Path(__file__).with_name("search.yaml")
"""What a search starts from where no CONF is given."""
_SHOWN = 10
_EPILOG = (
    "Without --gpus the layout of CONF is planned. With --gpus all layouts of so many GPUs are tried and ranked: "
    "nemo-eaft plan --gpus 16 --model Qwen/Qwen3-32B trainer.seq_length=4096. GB are 10^9 bytes. With --rehearse NeMo "
    "and Megatron-Core build every kind of rank without memory, and what they build is compared with the plan; exit "
    "code 1 where it differs."
)

# Fields of Hardware, each an option.
_ASSUMED = {
    "gpu_memory_gb": ("GB", "memory of a GPU"),
    "tflops": ("T", "highest dense bfloat16 rate of a GPU, 10^12 operations a second"),
    "mfu": ("PART", "part of it reached while computing, assumed"),
    "node_gbs": ("GB/S", "what a rank sends to others of its machine, assumed"),
    "network_gbs": ("GB/S", "what a rank sends to other machines, assumed"),
}


def add_arguments(parser: argparse.ArgumentParser, overrides: str) -> None:
    """The command's arguments. ``overrides``: what KEY=VALUE means."""
    parser.epilog = _EPILOG
    parser.add_argument("conf", metavar="CONF", nargs="?", help="a name of conf/ or a .yaml file")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help=overrides)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument(
        "--rehearse", action="store_true", help="also build every kind of rank without memory, and compare it"
    )
    parser.add_argument("--gpus", type=int, metavar="N", help="search the best layout of N GPUs, 8 in a machine")
    parser.add_argument("--model", metavar="NAME", help="Hugging Face name or folder, in place of model.hf")
    parser.add_argument(
        "--attention", choices=("flash", "unfused"), help="default: flash on GPUs, unfused on the CPU and with fp32"
    )
    defaults = Hardware()
    for name, (metavar, text) in _ASSUMED.items():
        default = getattr(defaults, name)
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=float, metavar=metavar, help=f"{text} (default: {default:g})")


def run(arguments: argparse.Namespace) -> int:
    """Plan, print, and return 0; 1 where a rehearsal found something else than the plan says.

    Raises:
        ValueError: what train would refuse, or arguments that do not go together.
        RuntimeError: a rehearsal could not be built.
    """
    conf, overrides = _words(arguments)
    hardware = _hardware(arguments)
    if arguments.rehearse:
        check_environment()
    if arguments.gpus is not None:
        if arguments.rehearse:
            raise ValueError("--rehearse needs the layout of a CONF; allowed is --gpus or --rehearse")
        return _search(arguments, conf, overrides, hardware)
    if conf is None:
        raise ValueError("plan needs a CONF, or --gpus N with --model NAME")
    settings = _compose(conf, overrides, arguments.model)
    shape = find_shape(settings.model.hf)
    check_layout(settings, shape)
    plan = Plan(settings, shape, hardware, arguments.attention)
    others = [] if plan.verdict == "fits" else nearest(plan)
    if not arguments.json:
        # Before a rehearsal, which takes a while and may fail.
        show(plan, others, _console())
        sys.stdout.flush()
    rehearsal = None
    if arguments.rehearse:
        print("nemo-eaft: NeMo builds every kind of rank; half a minute, or a few", file=sys.stderr, flush=True)
        rehearsal = rehearse(settings, plan.fused_linear)
    if arguments.json:
        mapping = as_mapping(plan) | {"nearest_that_fit": [summary(other) for other in others]}
        _print_json(mapping if rehearsal is None else mapping | {"rehearsal": rehearsal.as_mapping()})
    elif rehearsal is not None:
        print("\n".join(rehearsal.lines()))
    return 0 if rehearsal is None or rehearsal.passed else 1


def _search(arguments: argparse.Namespace, conf: str | None, overrides: list[str], hardware: Hardware) -> int:
    gpus: int = arguments.gpus
    in_machine = hardware.gpus_per_node
    if gpus < 1 or (gpus > in_machine and gpus % in_machine):
        raise ValueError(f"--gpus={gpus} must be 1 to {in_machine}, or a multiple of {in_machine}")
    per_node = min(gpus, in_machine)
    if conf is None and arguments.model is None:
        raise ValueError(f"--gpus={gpus} needs --model NAME or a CONF")
    settings = _compose(conf or str(START), overrides, arguments.model)
    shape = find_shape(settings.model.hf)
    warn_of_length(settings, shape)
    plans = search(settings, shape, hardware, arguments.attention, (gpus // per_node, per_node))
    if not plans:
        raise ValueError(
            f"--gpus={gpus}: no layout of so many GPUs is possible with {settings.model.hf} and "
            f"trainer.global_batch_size={settings.trainer.global_batch_size}: {_reason(settings, gpus, per_node)}"
        )
    if arguments.json:
        _print_json({"gpus": gpus, "best": as_mapping(plans[0]), "layouts": [summary(plan) for plan in plans]})
    else:
        show(plans[0], [], _console())
        title = f"layouts of {gpus} GPUs, best first ({min(_SHOWN, len(plans))} of {len(plans)})"
        show_layouts(title, plans[:_SHOWN], _console())
    return 0


def _reason(settings: Settings, gpus: int, per_node: int) -> str:
    rows = settings.trainer.global_batch_size // settings.trainer.micro_batch_size
    if rows * per_node < gpus:
        return f"at most {rows} copies of the model have a micro-batch each; raise trainer.global_batch_size"
    return "give CONF and its parallel.* instead, and the error says why"


def _words(arguments: argparse.Namespace) -> tuple[str | None, list[str]]:
    """CONF and overrides: argparse does not tell one from the other where an option comes first."""
    words = [word for word in (arguments.conf, *arguments.overrides) if word is not None]
    confs = [word for word in words if "=" not in word]
    if len(confs) > 1:
        raise ValueError(f"plan takes one CONF, got {' and '.join(confs)}; settings are given as group.key=VALUE")
    return (confs[0] if confs else None), [word for word in words if "=" in word]


def _compose(conf: str, overrides: list[str], model: str | None) -> Settings:
    words = overrides if model is None else [*overrides, f"model.hf={model}"]
    return compose(conf, words, unused=("data.train", "run.dir"))


def _hardware(arguments: argparse.Namespace) -> Hardware:
    given = {name: getattr(arguments, name) for name in _ASSUMED}
    return Hardware(**{name: value for name, value in given.items() if value is not None})


def _console() -> Any:
    from rich.console import Console

    # Not cut to 80 columns where the output goes to a file.
    return Console(highlight=False, width=None if sys.stdout.isatty() else 160)


def _print_json(mapping: dict[str, Any]) -> None:
    print(json.dumps(mapping, indent=2))
