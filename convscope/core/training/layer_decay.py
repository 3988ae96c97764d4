"""Layer-wise learning rates: the nearer to the input, the smaller (BEiT, arXiv:2106.08254, appendix)."""

from collections.abc import Sequence

from timm.models import group_parameters

from convscope.core.backbone import Backbone
from convscope.core.errors import UserError

HEAD = "head."  # what timm calls a classifier's own norm and projection: they learn as fast as the classifier


def lr_scales(backbone: Backbone, decay: float, blocks: Sequence[int] = ()) -> dict[str, float]:
    """Factor of the learning rate for each parameter of `backbone.model`: decay ** (layers up to the classifier).

    The stem is layer 0, the classifier the layer after the last block.

    Args:
        backbone: a network whose blocks timm can tell apart.
        decay: factor from one layer to the next towards the input.
        blocks: how many successive blocks of each stage make a layer, as ConvNeXt and SparK group them; one each where
            empty.

    Raises:
        UserError: timm has no order of this network's blocks, or `blocks` is not one number for each stage.
    """
    model = backbone.model
    if not hasattr(model, "group_matcher"):
        raise UserError(f"timm does not tell the layers of {backbone.arch} apart; leave --layer-decay out")
    block_of: dict[str, int] = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    stage_of: dict[str, int] = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    body = [name for name in block_of if not name.startswith(HEAD)]
    stages: dict[int, set[int]] = {}
    for name in body:
        stages.setdefault(stage_of[name], set()).add(block_of[name])
    stages.pop(0, None)  # the stem
    sizes = list(blocks) or [1] * len(stages)
    if len(sizes) != len(stages):
        raise UserError(f"--layer-blocks takes a number for each stage: {backbone.arch} has {len(stages)}")
    layer_of_block, layer = {0: 0}, 0
    for size, stage in zip(sizes, sorted(stages)):
        for i, block in enumerate(sorted(stages[stage])):
            layer += i % size == 0
            layer_of_block[block] = layer
    scales = {name: decay ** (layer + 1 - layer_of_block[block_of[name]]) for name in body}
    return {name: scales.get(name, 1.0) for name in block_of}
