"""Frozen BatchNorm folded into its convolution: the same outputs and gradients, less memory."""

import copy

import pytest
import torch
from torch import Tensor, nn

from convscope.core.backbone import Backbone, create_backbone
from convscope.core.errors import UserError
from convscope.eval.classification import Classification, ClassificationConfig
from convscope.eval.conv_bn import fold

NETWORKS: dict[str, dict[str, object]] = {
    "resnet50": {"layers": (1, 1, 1, 1), "channels": (4, 8, 12, 16)},
    "regnety_002": {},
    "mobilenetv3_small_050": {},
}


def lively(arch: str, **arguments: object) -> Backbone:
    """A float64 backbone whose statistics and affine maps are not those of its start."""
    backbone = create_backbone(arch, arguments, seed=0).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in backbone.modules():
            if isinstance(module, nn.BatchNorm2d):
                for value in (module.weight, module.bias, module.running_mean):
                    value.add_(torch.randn(value.shape, generator=generator, dtype=torch.float64), alpha=0.3)
                module.running_var.mul_(1 + torch.rand(value.shape, generator=generator, dtype=torch.float64))
    return backbone


@pytest.mark.parametrize("arch", NETWORKS)
def test_outputs_and_gradients_are_those_of_frozen_statistics(arch: str) -> None:
    found = []
    images = torch.randn(3, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for mode in ("eval", "tune"):
        backbone = lively(arch, **NETWORKS[arch])
        keys = list(backbone.state_dict())
        objective = Classification(backbone, 5, ClassificationConfig(convbn=mode)).double()
        assert list(backbone.state_dict()) == keys
        with torch.no_grad():
            objective.head.weight.copy_(
                torch.linspace(-1, 1, objective.head.weight.numel()).view_as(objective.head.weight)
            )
        loss = objective.train()({"image": images, "label": torch.tensor([0, 4, 2])}).loss
        loss.backward()
        found.append((loss, {name: p.grad for name, p in objective.named_parameters()}, dict(backbone.named_buffers())))
    (expected, gradients, buffers), (loss, gradients_of_tune, buffers_of_tune) = found
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_of_tune[name], gradient, rtol=0, atol=1e-11 * largest, msg=name)
    assert all(torch.equal(buffers_of_tune[name], value) for name, value in buffers.items())  # nothing has moved


def test_every_pair_of_a_resnet_is_found_and_less_is_kept_for_backward() -> None:
    backbone = lively("resnet50", **NETWORKS["resnet50"]).train()
    kept = []
    for _ in range(2):
        for module in backbone.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        sizes: dict[int, int] = {}
        alive: list[Tensor] = []

        def keep(tensor: Tensor, sizes: dict[int, int] = sizes, alive: list[Tensor] = alive) -> Tensor:
            alive.append(tensor)
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            backbone(torch.randn(2, 3, 64, 64, dtype=torch.float64)).sum()
        kept.append(sum(sizes.values()))
        if len(kept) == 1:
            norms = sum(isinstance(module, nn.BatchNorm2d) for module in backbone.modules())
            assert fold(backbone) == norms == 17  # the stem, three in each of four blocks, four shortcuts
    assert kept[1] < 0.75 * kept[0]


def test_copies_are_their_own_and_weights_still_load() -> None:
    backbone = lively("resnet18", channels=(4, 4, 4, 4)).eval()
    state = copy.deepcopy(backbone.state_dict())
    fold(backbone)
    twin = copy.deepcopy(backbone)
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    before = backbone(images)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(backbone(images), before)
    plain = create_backbone("resnet18", {"channels": (4, 4, 4, 4)}).double().eval()
    plain.load_state_dict(state)
    torch.testing.assert_close(plain(images), before, rtol=1e-10, atol=1e-12)
    twin.load_state_dict(state)
    assert torch.equal(twin(images), before)


def test_networks_without_such_pairs_are_refused() -> None:
    with pytest.raises(UserError, match="no BatchNorm behind a convolution"):
        fold(create_backbone("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (4, 4, 4, 4)}))
