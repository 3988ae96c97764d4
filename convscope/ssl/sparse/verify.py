"""Proof that a converted network is exact: with every unit visible it must equal the stock network.

A layer without a rule cannot see beyond its unit. So with every unit visible a position-wise layer agrees with the
dense pass and a spatial one does not, however it is written; and a layer that agrees there is exact for any mask.
"""

import copy
import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from convscope.core.backbone import Backbone
from convscope.core.errors import UserError
from convscope.ssl.sparse.rules import MaskContext, refusal
from convscope.ssl.sparse.units import VisibleUnits

TOLERANCE = 1e-8  # relative to the largest value, in float64
GRID = (2, 3)  # of units; a network for one size of image gets as many as that has


@dataclass(frozen=True)
class _Seen:
    path: str
    module: nn.Module
    input: object
    output: Tensor


def verify(backbone: Backbone, context: MaskContext, mask_unit: int) -> list[str]:
    """Compare units with the dense pass on a float64 copy whose parameters are all made to matter.

    Returns:
        Names of the parameters that the feature maps do not depend on, such as those of a classifier's head.

    Raises:
        UserError: the first layer that differs, by its name, or a network that cannot run on units at all.
    """
    twin, twin_context = copy.deepcopy((backbone, context))
    generator = torch.Generator().manual_seed(0)
    twin.double().eval()
    rows, columns = grid = _grid(backbone, mask_unit)
    images = torch.randn(2, 3, rows * mask_unit, columns * mask_unit, generator=generator, dtype=torch.float64)
    everything = VisibleUnits(torch.arange(rows * columns).expand(2, -1), grid)
    with torch.no_grad():
        for parameter in twin.parameters():  # zero-initialised branches and 1e-6 layer scales would hide a layer
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64), alpha=0.1)
        try:
            dense, maps = _run(twin, images)
            twin_context.units = everything
            units, found = _run(twin, everything.gather(images))
        except (AssertionError, RuntimeError, ValueError, IndexError) as error:
            raise UserError(
                f"SparK cannot train {backbone.arch}: it does not run on visible units ({str(error).splitlines()[0]}); "
                "choose a convolutional backbone"
            ) from error
    _compare(backbone, dense, units, everything)
    if not all(_same(maps[name], found[name], everything) for name in maps):  # code between the layers
        raise refusal(backbone.arch, "its forward", backbone.model)
    total = sum(feature_map.sum() for feature_map in twin.feature_maps(everything.gather(images)).values())
    gradients = torch.autograd.grad(total, list(twin.parameters()), allow_unused=True)  # type: ignore[arg-type]
    return [name for (name, _), gradient in zip(twin.named_parameters(), gradients) if gradient is None]


def _grid(backbone: Backbone, mask_unit: int) -> tuple[int, int]:
    if not backbone.model.pretrained_cfg.get("fixed_input_size"):
        return GRID
    height, width = backbone.preprocessing.size
    return height // mask_unit, width // mask_unit


def _run(backbone: Backbone, images: Tensor) -> tuple[list[_Seen], dict[str, Tensor]]:
    """Every module's input and output in the order in which they finish, so that the innermost culprit comes first;
    and the feature maps."""
    found: list[_Seen] = []

    def keep(path: str, module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        if isinstance(output, Tensor) and output.ndim == 4:  # cloned: an in-place activation may follow
            found.append(_Seen(path, module, inputs[0] if inputs else None, output.clone()))

    handles = [
        module.register_forward_hook(functools.partial(keep, path)) for path, module in backbone.model.named_modules()
    ]
    try:
        maps = backbone.feature_maps(images)
    finally:
        for handle in handles:
            handle.remove()
    return found, maps


def _compare(backbone: Backbone, dense: list[_Seen], units: list[_Seen], everything: VisibleUnits) -> None:
    for expected, found in zip(dense, units, strict=True):
        if _same(expected.output, found.output, everything):
            continue
        path, module = found.path, found.module
        both = isinstance(expected.input, Tensor) and isinstance(found.input, Tensor) and found.input.ndim == 4
        if both and not _same(expected.input, found.input, everything):  # type: ignore[arg-type]
            path = path.rpartition(".")[0]  # its parent handed it a wrong input
            module = backbone.model.get_submodule(path)
        raise refusal(backbone.arch, path, module)


def _same(expected: Tensor, found: Tensor, units: VisibleUnits) -> bool:
    if len(found) != units.batch * units.count:
        return True  # inside a per-image layer; its parent is compared
    for candidate in (found, found.permute(0, 3, 1, 2)):  # channels-first, or the channels-last inside of a block
        target = expected if candidate is found else expected.permute(0, 3, 1, 2)
        height, width = target.shape[-2:]
        rows, columns = units.grid
        fits = (height // rows, width // columns) == candidate.shape[-2:]
        if not fits or height % rows or width % columns or candidate.shape[1] != target.shape[1]:
            continue
        difference = (units.gather(target) - candidate).abs().max()
        return bool(difference <= TOLERANCE * target.abs().max())
    return False
