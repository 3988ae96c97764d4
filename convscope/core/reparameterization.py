"""A network with parallel branches, or BatchNorm behind its convolutions, as the smaller one that computes the same."""

import copy

from timm.utils.model import reparameterize_model

from convscope.core.backbone import Backbone, create_backbone
from convscope.core.errors import UserError


def reparameterized(backbone: Backbone) -> Backbone:
    """The backbone in its form for inference, which computes what the trained one computes in evaluation.

    The merged weights are computed in float64. `model_args` of the result has `inference_mode`, which builds this form.

    Raises:
        UserError: an architecture that has no such form, or a backbone that has it already.
    """
    if backbone.model_args.get("inference_mode"):
        raise UserError(f"{backbone.source} is re-parameterized already")
    merged = reparameterize_model(copy.deepcopy(backbone.model).eval().double(), inplace=True).state_dict()
    try:
        built = create_backbone(backbone.arch, {**backbone.model_args, "inference_mode": True}, seed=0)
    except UserError:
        built = None
    if built is None or built.model.state_dict().keys() != merged.keys():
        raise UserError(
            f"{backbone.arch} has no form for inference to merge into; leave --reparameterize out "
            "(UniRepLKNet, RepLKNet and timm's FastViT have one)"
        )
    built.to(next(backbone.parameters())).model.load_state_dict(merged)  # in the trained one's precision, on its device
    built.preprocessing, built.source, built.origin = backbone.preprocessing, backbone.source, backbone.origin
    built.matched, built.absent = backbone.matched, backbone.absent
    return built.train(backbone.training)
