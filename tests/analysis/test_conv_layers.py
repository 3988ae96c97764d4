"""A network's convolutions by depth, and BatchNorm folded into them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from convscope.analysis.conv_layers import conv_layers
from convscope.core.backbone import Backbone, Preprocessing, create_backbone


class Net(nn.Module):
    """Two branches and a layer that nothing runs through."""

    num_features = 4

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.unused = nn.Conv2d(3, 4, 3)
        self.last = nn.Conv2d(4, 4, 3, groups=4, stride=2)
        self.short = nn.Conv2d(4, 4, 1)
        self.long = nn.Sequential(nn.Conv2d(4, 4, 5, padding=2), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
        self.stem = nn.Conv2d(3, 4, (1, 7))
        self.change = change
        self.feature_info = [{"module": "last", "num_chs": 4, "reduction": 2}]

    def forward_intermediates(self, x: Tensor) -> None: ...

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.change(self.stem(x.mul_(2)))
        return self.last(self.short(x) + self.long(x))

    def forward_head(self, x: Tensor, pre_logits: bool) -> Tensor:
        return x.mean(dim=(2, 3))


def net(change: Callable[[Tensor], Tensor] = torch.relu) -> Backbone:
    return Backbone(Net(change), arch="net", preprocessing=Preprocessing(size=(32, 32)))


def test_depth_is_the_rank_of_the_longest_path() -> None:
    found = conv_layers(net().requires_grad_(False))
    assert found.depth_from == "graph"
    assert found.unreached == ("unused",)
    assert [(layer.name, layer.depth) for layer in found] == [
        ("stem", 0),
        ("short", 1),
        ("long.0", 1),
        ("long.2", 2),
        ("last", 3),
    ]
    assert [layer.depth_norm for layer in found] == [0, 1 / 3, 1 / 3, 2 / 3, 1]
    assert [layer.size for layer in found] == ["1x7", "1x1", "5x5", "3x3", "3x3"]
    last = found.layers[-1]
    assert (last.groups, last.stride, last.filters.shape) == (4, (2, 2), (4, 9))


def test_a_network_that_cuts_its_graph_gives_the_order_of_execution() -> None:
    found = conv_layers(net(torch.detach))
    assert found.depth_from == "execution order"
    assert [layer.name for layer in found] == ["stem", "short", "long.0", "long.2", "last"]
    assert [layer.depth for layer in found] == [0, 1, 2, 3, 4]


def test_a_network_that_does_not_run_gives_the_order_of_definition() -> None:
    def fail(x: Tensor) -> Tensor:
        raise RuntimeError("no")

    found = conv_layers(net(fail))
    assert found.depth_from == "definition order"
    assert [layer.name for layer in found][:2] == ["unused", "last"]


def test_branches_of_a_resnet_share_a_depth_and_modes_stay() -> None:
    backbone = create_backbone("resnet18_cifar", {"channels": (4, 4, 8, 8)}, seed=0).train()
    backbone.model.bn1.eval()
    found = {layer.name: layer for layer in conv_layers(backbone, fold_bn=True)}
    assert found["layer2.0.conv1"].depth == found["layer2.0.downsample.0"].depth
    assert found["layer4.1.conv2"].depth == 16
    assert found["layer4.1.conv2"].depth_norm == 1
    assert backbone.model.layer1.training
    assert not backbone.model.bn1.training
    assert backbone.model.layer1[0].bn1.running_mean.abs().max() == 0  # statistics of training were not touched


def test_a_single_convolution_has_depth_zero() -> None:
    (patches,) = conv_layers(create_backbone("test_vit", seed=0))
    assert (patches.size, patches.depth, patches.depth_norm) == ("16x16", 0, 0.0)


def test_a_network_that_takes_no_small_images() -> None:
    found = conv_layers(create_backbone("inception_v3", seed=0))
    assert found.depth_from == "graph"
    assert {"1x7", "7x1"} < {layer.size for layer in found}


def test_a_network_that_insists_on_its_size() -> None:
    def insist(x: Tensor) -> Tensor:
        assert x.shape[2] == 32
        return torch.relu(x)

    assert conv_layers(net(insist)).depth_from == "graph"


@pytest.mark.parametrize("arch", ["test_resnet", "test_efficientnet"])
def test_folded_weights_compute_what_both_layers_do(arch: str) -> None:
    backbone = create_backbone(arch, seed=0).double().eval()
    generator = torch.Generator().manual_seed(0)
    for norm in backbone.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for values in (norm.running_var, norm.weight):
                values.data.uniform_(0.5, 2, generator=generator)
            norm.bias.data.zero_()
            norm.running_mean.zero_()
    layers = {layer.name: layer for layer in conv_layers(backbone, fold_bn=True)}
    stored = {layer.name: layer.weight for layer in conv_layers(backbone)}
    made: dict[int, tuple[str, Tensor]] = {}
    checked: list[str] = []

    def after(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            made[id(output)] = (
                name,
                F.conv2d(inputs[0], layers[name].weight, None, module.stride, module.padding, 1, module.groups),
            )

        return hook

    def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if id(inputs[0]) not in made:
            return
        name, expected = made[id(inputs[0])]
        found = F.batch_norm(
            inputs[0], module.running_mean, module.running_var, module.weight, module.bias, eps=module.eps
        )
        assert layers[name].folded
        assert not torch.equal(layers[name].weight, stored[name])
        torch.testing.assert_close(found, expected)
        checked.append(name)

    for name, module in backbone.model.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(after(name))
        elif isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(before)
    with torch.no_grad():
        backbone(torch.randn(1, 3, 32, 32, generator=generator, dtype=torch.float64))
    assert len(checked) >= 10
