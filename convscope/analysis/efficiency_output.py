"""What `analyze efficiency` prints and writes."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convscope.analysis.common import aligned, write_result
from convscope.analysis.efficiency import LayerCost, Machine
from convscope.core.results import EvalResult, Figure
from convscope.plots.efficiency import GapPoint, WaterlinePanel, draw_gap, draw_waterline

SLOWEST = 5  # layers that are printed


@dataclass(frozen=True)
class Efficiency:
    """What one network costs and takes."""

    costs: Mapping[str, LayerCost]
    layer_seconds: Mapping[str, NDArray[np.float64]]  # (repeats,) of each layer in `costs`
    seconds: NDArray[np.float64]  # (repeats,) of whole passes without hooks
    latency: Figure  # their median
    accuracy: float | None  # per cent

    @property
    def macs(self) -> int:
        """Of a forward pass."""
        return sum(cost.macs for cost in self.costs.values())

    @property
    def bytes(self) -> int:
        """Moved in a forward pass."""
        return sum(cost.bytes for cost in self.costs.values())

    def waterline(self, machine: Machine) -> float:
        """Seconds that the layers need one after another."""
        return sum(machine.waterline(cost) for cost in self.costs.values())


def figures(measured: Mapping[str, Efficiency], machine: Machine) -> dict[str, Figure]:
    """Headline figures of each network; times in milliseconds."""
    found: dict[str, Figure] = {}
    for label, one in measured.items():
        prefix = f"{label}: " if len(measured) > 1 else ""
        median, low, high = one.latency.value, one.latency.low, one.latency.high
        ideal = machine.ideal(one.macs)
        times = Figure(median * 1e3, low and low * 1e3, high and high * 1e3, one.latency.n)
        share = Figure(ideal / median, high and ideal / high, low and ideal / low, one.latency.n)
        found |= {
            f"{prefix}GMACs": Figure(one.macs / 1e9),
            f"{prefix}megabytes moved": Figure(one.bytes / 1e6),
            f"{prefix}latency at peak arithmetic (ms)": Figure(ideal * 1e3),
            f"{prefix}waterline (ms)": Figure(one.waterline(machine) * 1e3),
            f"{prefix}latency (ms)": times,
            f"{prefix}efficiency": share,
        }
    return found


def model_details(one: Efficiency, machine: Machine) -> dict[str, Any]:
    """A network's part of the result file."""
    return {
        "accuracy": one.accuracy,
        "latency_by_layers": sum(float(np.median(times)) for times in one.layer_seconds.values()),
        "layers": [
            {
                "layer": name,
                "kind": cost.kind,
                "macs": cost.macs,
                "bytes": cost.bytes,
                "compute_seconds": machine.ideal(cost.macs),
                "memory_seconds": machine.transfer(cost.bytes),
                "waterline_seconds": machine.waterline(cost),
                "seconds": float(np.median(one.layer_seconds[name])),
            }
            for name, cost in one.costs.items()
        ],
    }


def table(result: EvalResult) -> str:
    """Aligned text: the machine, a row for each network, and its slowest layers."""
    machine = result.details["machine"]
    peak, bandwidth = machine["macs_per_second"] / 1e9, machine["bytes_per_second"] / 1e9
    given = " and ".join({"peak", "bandwidth"} - set(machine["measured"]))
    lines = [("model", "GMACs", "MB moved", "ideal ms", "waterline ms", "measured ms", "of peak")]
    models = result.details["models"]
    for label in models:
        prefix = f"{label}: " if len(models) > 1 else ""
        values = [f for name, f in result.figures.items() if name.startswith(prefix)]
        latency = values[4]
        interval = f" [{latency.low:.3g}, {latency.high:.3g}]" if latency.low is not None else ""
        cells = [f"{figure.value:.3g}" for figure in values[:4]]
        lines.append((label, *cells, f"{latency.value:.3g}{interval}", f"{values[5].value:.1%}"))
    text = [
        f"{machine['device']}, {result.details['dtype']}, batches of {result.data['batch_size']}: "
        f"{peak:.4g} GMAC/s, {bandwidth:.4g} GB/s" + (f" ({given} as given)" if given else ""),
        *aligned(lines),
    ]
    for label, one in models.items():
        slowest = sorted(one["layers"], key=lambda row: -row["seconds"])[:SLOWEST]
        rows = [(row["layer"], row["kind"], f"{row['seconds'] * 1e3:.3g} ms", _bound(row)) for row in slowest]
        text += [f"{label}: slowest layers", *(f"  {line}" for line in aligned(rows))]
    return "\n".join(text)


def _bound(row: Mapping[str, Any]) -> str:
    by = "arithmetic" if row["compute_seconds"] >= row["memory_seconds"] else "memory"
    return f"{row['waterline_seconds'] * 1e3:.3g} ms if bound by {by}"


def write(folder: Path, result: EvalResult, measured: Mapping[str, Efficiency], machine: Machine) -> None:
    """Write efficiency.json, .npz, .csv (networks), -layers.csv and the plots."""
    arrays: dict[str, Any] = {"labels": np.array(list(measured))}
    for index, one in enumerate(measured.values()):
        arrays |= {
            f"layers_{index}": np.array(list(one.costs)),
            f"macs_{index}": np.array([cost.macs for cost in one.costs.values()]),
            f"bytes_{index}": np.array([cost.bytes for cost in one.costs.values()]),
            f"layer_seconds_{index}": np.stack([one.layer_seconds[name] for name in one.costs]),
            f"seconds_{index}": one.seconds,
        }
    header = ("model", "accuracy", "macs", "bytes", "ideal_s", "waterline_s", "latency_s", "low", "high", "repeats")
    networks = [_row(label, one, machine) for label, one in measured.items()]
    layers = [(label, *row.values()) for label, one in result.details["models"].items() for row in one["layers"]]
    columns = ("model", "layer", "kind", "macs", "bytes", "compute_s", "memory_s", "waterline_s", "latency_s")
    points = [
        GapPoint(label, machine.ideal(one.macs), one.latency.value, one.accuracy) for label, one in measured.items()
    ]
    panels = [_panel(label, one, machine) for label, one in measured.items()]
    write_result(
        folder,
        "efficiency",
        result,
        arrays=arrays,
        tables={"efficiency": (header, networks), "efficiency-layers": (columns, layers)},
        pictures={"efficiency": draw_gap(points), "efficiency-waterline": draw_waterline(panels)},
    )


def _row(label: str, one: Efficiency, machine: Machine) -> tuple[Any, ...]:
    latency = one.latency
    least = (machine.ideal(one.macs), one.waterline(machine))
    return (label, one.accuracy, one.macs, one.bytes, *least, latency.value, latency.low, latency.high, latency.n)


def _panel(label: str, one: Efficiency, machine: Machine) -> WaterlinePanel:
    ideal, waterline = machine.ideal(one.macs), one.waterline(machine)
    least = f"at peak arithmetic {ideal * 1e3:.3g} ms, waterline {waterline * 1e3:.3g} ms"
    return WaterlinePanel(
        label,
        np.array([machine.ideal(cost.macs) for cost in one.costs.values()]),
        np.array([machine.transfer(cost.bytes) for cost in one.costs.values()]),
        np.array([float(np.median(one.layer_seconds[name])) for name in one.costs]),
        f"{len(one.costs)} layers in their order: {least}, measured {one.latency.value * 1e3:.3g} ms",
    )
