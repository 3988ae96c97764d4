"""`convscope analyze efficiency`: how long networks take, and how long they would have to."""

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro

from convscope.analysis.common import load_models, model_records, one_or_all
from convscope.analysis.efficiency import Machine, layer_costs
from convscope.analysis.efficiency_output import Efficiency, figures, model_details, table, write
from convscope.analysis.latency import latencies, layer_latencies, measure_machine
from convscope.core.backbone import Backbone, eval_mode
from convscope.core.distributed import pick_device
from convscope.core.errors import UserError
from convscope.core.log import info, progress
from convscope.core.models import model_record
from convscope.core.options import AllowPartial, Arch, Device, require_at_least
from convscope.core.results import EvalResult, bootstrap

RESAMPLES = 500


@dataclasses.dataclass(frozen=True, kw_only=True)
class EfficiencyCommand:
    """Multiply-accumulates, bytes and latency of every layer, and the gap to what this machine could reach."""

    models: tyro.conf.Positional[tuple[str, ...]]
    """One or more MODELs; their classifiers are left out."""
    size: int | None = None
    """Height and width of the images in pixels; each model's own by default."""
    batch_size: int = 1
    """Images in a forward pass; of noise, for latency does not depend on what they show."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of weights and activations."""
    channels_last: bool = False
    """Keep the channels of a position side by side in memory."""
    repeats: int = 20
    """Forward passes that are timed, of which the median counts; as many again layer by layer."""
    warmup: int = 3
    """Forward passes before them."""
    threads: int | None = None
    """Threads of a CPU; torch's own choice by default."""
    peak: float | None = None
    """Peak arithmetic in 10^9 multiply-accumulates a second; measured by a matrix product by default."""
    bandwidth: float | None = None
    """Memory bandwidth in 10^9 bytes a second; measured by a copy by default."""
    accuracy: tuple[float, ...] = ()
    """Per cent, one for each MODEL, to be drawn over latency."""
    arch: Arch = None
    allow_partial: AllowPartial = 1.0
    device: Device = "auto"
    output_dir: Path = Path("results")
    """Where efficiency.json, .npz, .csv and the plots go."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "size", "batch_size", "repeats", "threads", task="efficiency")
        require_at_least(self, 0, "warmup", task="efficiency")
        for name in ("peak", "bandwidth"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"efficiency: --{name} must be more than 0, got {value}")
        if self.accuracy and len(self.accuracy) != len(set(self.models)):
            raise UserError(
                f"efficiency: {len(set(self.models))} models need as many --accuracy, got {len(self.accuracy)}"
            )
        if not all(0 <= one <= 100 for one in self.accuracy):
            raise UserError(f"efficiency: --accuracy is in per cent, got {self.accuracy}")


def run(config: EfficiencyCommand) -> None:
    """Load the models, measure the machine and them, write the files and print the table."""
    result = evaluate(load_models(config.models, arch=config.arch, allow_partial=config.allow_partial), config)
    print(table(result))
    info(f"efficiency: wrote {config.output_dir}/efficiency.json, .npz, .csv and plots")


def evaluate(backbones: Mapping[str, Backbone], config: EfficiencyCommand) -> EvalResult:
    """Measure labelled backbones on this machine, write the files, and return the result."""
    device, dtype = pick_device(config.device), getattr(torch, config.dtype)
    records, preprocessing, measured = {}, {}, {}
    accuracies = config.accuracy or (None,) * len(backbones)
    with _threads(config.threads) as threads:
        machine = _machine(device, dtype, config)
        for (label, original), accuracy in zip(backbones.items(), accuracies):
            backbone = original.at_size(config.size) if config.size else original
            records[label], preprocessing[label] = model_record(original), dataclasses.asdict(backbone.preprocessing)
            with progress(f"efficiency {label}", 1) as ticker:
                measured[label] = _measure(label, backbone, device, dtype, config, accuracy)
                ticker.advance()
    result = EvalResult(
        task="efficiency",
        protocol="efficiency/1",
        model=model_records(records),
        data={"source": "noise", "batch_size": config.batch_size},
        preprocessing=one_or_all(preprocessing),
        figures=figures(measured, machine),
        details={
            "machine": {
                "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
                "threads": threads,
                "macs_per_second": machine.peak,
                "bytes_per_second": machine.bandwidth,
                "measured": [name for name in ("peak", "bandwidth") if getattr(config, name) is None],
            },
            "dtype": config.dtype,
            "channels_last": config.channels_last,
            "models": {label: model_details(one, machine) for label, one in measured.items()},
        },
    )
    write(config.output_dir, result, measured, machine)
    return result


@contextmanager
def _threads(count: int | None) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield count or before
    finally:
        torch.set_num_threads(before)


def _machine(device: torch.device, dtype: torch.dtype, config: EfficiencyCommand) -> Machine:
    if config.peak and config.bandwidth:
        return Machine(peak=config.peak * 1e9, bandwidth=config.bandwidth * 1e9)
    found = measure_machine(device, dtype)
    return Machine(
        peak=config.peak * 1e9 if config.peak else found.peak,
        bandwidth=config.bandwidth * 1e9 if config.bandwidth else found.bandwidth,
    )


def _measure(
    label: str,
    backbone: Backbone,
    device: torch.device,
    dtype: torch.dtype,
    config: EfficiencyCommand,
    accuracy: float | None,
) -> Efficiency:
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    # A copy, for conversion is in place and would lose digits of the caller's weights.
    network = copy.deepcopy(backbone).to(device, dtype).to(memory_format=layout)
    noise = torch.randn(config.batch_size, 3, *backbone.preprocessing.size, generator=torch.Generator().manual_seed(0))
    images = noise.to(device, dtype).contiguous(memory_format=layout)
    try:
        with eval_mode(network):
            costs = layer_costs(network, images)
            whole = latencies(network, images, repeats=config.repeats, warmup=config.warmup)
            layers = layer_latencies(network, images, repeats=config.repeats)
    except (RuntimeError, AssertionError) as error:  # timm asserts sizes
        first = (str(error).splitlines() or [type(error).__name__])[0]
        where = f"{images.shape[2]} px in {config.dtype} on {device}"
        raise UserError(f"efficiency: {label} does not run at {where}: {first}") from error
    latency = bootstrap(whole, lambda rows: float(np.median(rows)), resamples=RESAMPLES)
    return Efficiency(costs, {name: layers[name] for name in costs}, whole, latency, accuracy)
