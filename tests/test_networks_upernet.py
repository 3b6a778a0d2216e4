"""UPerNet has the published sizes, is transformers' and a plain second implementation, and maps published weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ConvNextConfig, UperNetConfig, UperNetForSemanticSegmentation

from medrobust.networks.upernet import SIZES, UPerNet

DEPTHS = (1, 1, 2, 1)
WIDTHS = (16, 32, 64, 128)
TINY: dict[str, Any] = {"num_classes": 5, "depths": DEPTHS, "hidden_sizes": WIDTHS, "hidden_size": 32}
Shapes = dict[str, tuple[int, ...]]


@torch.no_grad()
def randomised(network: UPerNet, seed: int = 0) -> UPerNet:
    """Random values everywhere, running statistics too, so that nothing hides behind a start of 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in network.state_dict().items():
        tensor.copy_(values(name, tuple(tensor.shape), generator))
    return network.eval()


def values(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if not shape:
        return torch.tensor(3)
    if len(shape) > 1:
        return torch.randn(shape, generator=generator) * (2 / torch.Size(shape[1:]).numel()) ** 0.5
    return 0.4 * torch.rand(shape, generator=generator) + (0.8 if name.endswith(("weight", "var", "gamma")) else -0.2)


def tiny(**changes: Any) -> UPerNet:
    return randomised(UPerNet(**{**TINY, **changes}))


def image(height: int = 64, width: int = 64, channels: int = 3, batch: int = 1) -> Tensor:
    return torch.rand((batch, channels, height, width), generator=torch.Generator().manual_seed(1))


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def published_shapes(
    classes: int,
    depths: tuple[int, ...],
    widths: tuple[int, ...],
    hidden: int,
    *,
    stem: str = "conv",
    auxiliary: bool = True,
) -> Shapes:
    """Names and shapes of a published segmentation checkpoint, written down from the authors' modules."""
    shapes: Shapes = {}

    def both(name: str, *weight: int) -> None:
        shapes[f"{name}.weight"] = weight
        shapes[f"{name}.bias"] = weight[:1]

    def convolution(name: str, inputs: int, outputs: int, side: int) -> None:
        shapes[f"{name}.conv.weight"] = (outputs, inputs, side, side)
        both(f"{name}.batch_norm", outputs)
        shapes[f"{name}.batch_norm.running_mean"] = shapes[f"{name}.batch_norm.running_var"] = (outputs,)
        shapes[f"{name}.batch_norm.num_batches_tracked"] = ()

    first = widths[0]
    if stem == "conv":
        both("backbone.downsample_layers.0.stem.0", first // 2, 3, 3, 3)
        both("backbone.downsample_layers.0.stem.1", first // 2)
        both("backbone.downsample_layers.0.stem.3", first, first // 2, 3, 3)
        both("backbone.downsample_layers.0.stem.4", first)
    else:
        both("backbone.downsample_layers.0.0", first, 3, 4, 4)
        both("backbone.downsample_layers.0.1", first)
    for stage in range(1, 4):
        both(f"backbone.downsample_layers.{stage}.0", widths[stage - 1])
        both(f"backbone.downsample_layers.{stage}.1", widths[stage], widths[stage - 1], 2, 2)
    for stage, (depth, width) in enumerate(zip(depths, widths, strict=True)):
        for block in range(depth):
            name = f"backbone.stages.{stage}.{block}"
            shapes[f"{name}.gamma"] = (width,)
            both(f"{name}.dwconv", width, 1, 7, 7)
            both(f"{name}.norm", width)
            both(f"{name}.pwconv1", 4 * width, width)
            both(f"{name}.pwconv2", width, 4 * width)
        both(f"backbone.norm{stage}", width)
    both("decode_head.classifier", classes, hidden, 1, 1)
    for scale in range(4):
        convolution(f"decode_head.psp_modules.{scale}.1", widths[3], hidden, 1)
    convolution("decode_head.bottleneck", widths[3] + 4 * hidden, hidden, 3)
    for level in range(3):
        convolution(f"decode_head.lateral_convs.{level}", widths[level], hidden, 1)
        convolution(f"decode_head.fpn_convs.{level}", hidden, hidden, 3)
    convolution("decode_head.fpn_bottleneck", 4 * hidden, hidden, 3)
    if auxiliary:
        convolution("auxiliary_head.convs.0", widths[2], hidden // 2, 3)
        both("auxiliary_head.classifier", classes, hidden // 2, 1, 1)
    return shapes


def published(seed: int = 0, **changes: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    settings = {"classes": 5, "depths": DEPTHS, "widths": WIDTHS, "hidden": 32, **changes}
    return {name: values(name, shape, generator) for name, shape in published_shapes(**settings).items()}


def classifier(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A published ImageNet classifier (timm's names) with the backbone of a published segmentation checkpoint."""
    found = {}
    for name, tensor in weights.items():
        room, _, rest = name.partition(".")
        kind, *parts = rest.split(".")
        if room != "backbone" or kind.startswith("norm"):
            continue
        if kind == "downsample_layers":
            stage, *parts = parts
            start = f"stages.{stage}.downsample" if stage != "0" else "stem"
            found[".".join([start, *parts])] = tensor
        else:
            stage, block, *parts = parts
            for ours, theirs in (("dwconv", "conv_dw"), ("pwconv1", "mlp.fc1"), ("pwconv2", "mlp.fc2")):
                parts = [theirs if part == ours else part for part in parts]
            found[".".join(["stages", stage, "blocks", block, *parts])] = tensor
    width = weights["backbone.norm3.weight"].shape[0]
    ends = {"norm.weight": (width,), "norm.bias": (width,), "fc.weight": (1000, width), "fc.bias": (1000,)}
    return found | {f"head.{name}": torch.ones(shape) for name, shape in ends.items()}


def reference_maps(w: dict[str, Tensor], x: Tensor) -> list[Tensor]:
    """The four maps from published names alone, in plain functions."""

    def norm(y: Tensor, name: str) -> Tensor:
        centred = y - y.mean(1, keepdim=True)
        unit = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
        return unit * w[f"{name}.weight"].view(-1, 1, 1) + w[f"{name}.bias"].view(-1, 1, 1)

    def conv(y: Tensor, name: str, **settings: int) -> Tensor:
        weight = w[f"{name}.weight"]
        if weight.ndim == 2:
            weight = weight[..., None, None]
        return F.conv2d(y, weight, w[f"{name}.bias"], **settings)

    maps = []
    for stage, depth in enumerate(DEPTHS):
        down = f"backbone.downsample_layers.{stage}"
        if stage:
            x = conv(norm(x, f"{down}.0"), f"{down}.1", stride=2)
        elif f"{down}.0.weight" in w:
            x = norm(conv(x, f"{down}.0", stride=4), f"{down}.1")
        else:
            for place in (0, 3):
                x = conv(x, f"{down}.stem.{place}", stride=2, padding=1)
                x = F.gelu(norm(x, f"{down}.stem.{place + 1}"))
        for block in range(depth):
            name = f"backbone.stages.{stage}.{block}"
            y = norm(conv(x, f"{name}.dwconv", padding=3, groups=WIDTHS[stage]), f"{name}.norm")
            y = conv(F.gelu(conv(y, f"{name}.pwconv1")), f"{name}.pwconv2")
            x = x + w[f"{name}.gamma"].view(-1, 1, 1) * y
        maps.append(norm(x, f"backbone.norm{stage}"))
    return maps


def reference(w: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of both heads from published names alone, in plain functions."""

    def convolution(y: Tensor, name: str) -> Tensor:
        weight = w[f"{name}.conv.weight"]
        y = F.conv2d(y, weight, padding=weight.shape[-1] // 2)
        statistics = [w[f"{name}.batch_norm.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        return F.relu(F.batch_norm(y, *statistics))

    def resize(y: Tensor, like: Tensor) -> Tensor:
        return F.interpolate(y, like.shape[2:], mode="bilinear")

    def classify(y: Tensor, head: str) -> Tensor:
        return resize(F.conv2d(y, w[f"{head}.classifier.weight"], w[f"{head}.classifier.bias"]), x)

    maps = reference_maps(w, x)
    top = maps[3]
    pools = [
        resize(convolution(F.adaptive_avg_pool2d(top, side), f"decode_head.psp_modules.{place}.1"), top)
        for place, side in enumerate((1, 2, 3, 6))
    ]
    levels = [convolution(torch.cat([top, *pools], 1), "decode_head.bottleneck")]
    for level in (2, 1, 0):
        lateral = convolution(maps[level], f"decode_head.lateral_convs.{level}")
        levels.insert(0, lateral + resize(levels[0], lateral))
    outs = [convolution(levels[level], f"decode_head.fpn_convs.{level}") for level in range(3)]
    fused = torch.cat([resize(out, outs[0]) for out in (*outs, levels[3])], 1)
    logits = classify(convolution(fused, "decode_head.fpn_bottleneck"), "decode_head")
    return logits, classify(convolution(maps[2], "auxiliary_head.convs.0"), "auxiliary_head")


@pytest.mark.parametrize(
    ("size", "classes", "parameters", "tensors"),
    [("tiny", 21, 60_181_610, 272), ("tiny", 151, 60_281_710, 272), ("small", 21, 81_816_170, 434)],
)
def test_the_published_sizes(size: str, classes: int, parameters: int, tensors: int) -> None:
    with torch.device("meta"):
        network = UPerNet(classes, **SIZES[size]).eval()
        assert network(torch.zeros(1, 3, 473, 473)).shape == (1, classes, 473, 473)
    assert count(network) == parameters
    assert count(network.backbone.embeddings) == 43_200
    shapes = published_shapes(classes, SIZES[size]["depths"], (96, 192, 384, 768), 512)
    assert len(network.state_dict()) == len(shapes) == tensors
    # Without running statistics, what the checkpoint holds is what is counted.
    counted = {name: shape for name, shape in shapes.items() if "running" not in name and "tracked" not in name}
    assert sum(torch.Size(shape).numel() for shape in counted.values()) == parameters


def test_the_rate_of_skipping_rises_from_nothing_to_what_was_asked() -> None:
    with torch.device("meta"):
        network = UPerNet()
    blocks = [block for stage in network.backbone.encoder.stages for block in stage.layers]
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in blocks]
    assert rates == pytest.approx([0.4 * block / 17 for block in range(18)], abs=1e-6)


def test_it_starts_as_published() -> None:
    """Layer scales of 1, not ConvNeXt's 1e-6; matrices of standard deviation 0.02; no biases."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = UPerNet(**{**TINY, "hidden_sizes": (64, 64, 64, 128)})
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif parameter.ndim == 1:
            assert (parameter == 1).all(), name
        elif parameter.numel() > 1000:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name


def test_with_patches_it_is_transformers_own() -> None:
    """Equal to the bit, and state dicts fit as they are."""
    network = tiny(stem="patch")
    theirs = UperNetForSemanticSegmentation(
        UperNetConfig(
            backbone_config=ConvNextConfig(
                depths=list(DEPTHS),
                hidden_sizes=list(WIDTHS),
                out_features=["stage1", "stage2", "stage3", "stage4"],
            ),
            num_labels=5,
            hidden_size=32,
            auxiliary_channels=16,
        )
    ).eval()
    theirs.load_state_dict(network.state_dict())
    other = UPerNet(**TINY, stem="patch").eval()
    assert not torch.equal(other(image()), network(image()))
    other.load_state_dict(theirs.state_dict())
    for size in ((64, 64), (75, 98)):
        expected = theirs(image(*size)).logits
        assert torch.equal(network(image(*size)), expected)
        assert torch.equal(other(image(*size)), expected)


@pytest.mark.parametrize("stem", ["conv", "patch"])
@pytest.mark.parametrize("size", [(64, 64), (75, 98)])
def test_published_weights_give_what_plain_functions_give(stem: str, size: tuple[int, int]) -> None:
    weights = published(stem=stem)
    network = tiny(stem=stem)
    network.load_published(weights)
    network.double()
    x = image(*size, batch=2).double()
    exact = {name: tensor.double() for name, tensor in weights.items()}
    logits, auxiliary = reference(exact, x)
    assert logits.shape == (2, 5, *size)
    assert logits.std() > 0.1
    torch.testing.assert_close(network(x), logits)
    torch.testing.assert_close(network.with_auxiliary(x), (logits, auxiliary))


@pytest.mark.parametrize("prefix", ["", "module.", "module.base_model.", "base_model.model."])
def test_a_published_classifier_becomes_the_backbone(prefix: str) -> None:
    weights = published()
    own = {prefix + name: tensor for name, tensor in classifier(weights).items()}
    if prefix.endswith("model.model."):
        own |= {f"base_model.normalize.{name}": torch.ones(1, 3, 1, 1) for name in ("mean", "std")}
    network = UPerNet(**TINY).eval()
    heads = {name: tensor.clone() for name, tensor in network.state_dict().items() if not name.startswith("backbone.")}
    network.load_backbone(own)
    # The norms of the maps are not the classifier's: they keep their start.
    start = weights | {f"backbone.norm{n}.weight": torch.ones(width) for n, width in enumerate(WIDTHS)}
    start |= {f"backbone.norm{n}.bias": torch.zeros(width) for n, width in enumerate(WIDTHS)}
    for found, expected in zip(network.features(image()), reference_maps(start, image()), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    after = network.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in heads.items())


def test_a_classifier_with_patches_becomes_the_backbone() -> None:
    weights = published(stem="patch")
    network, expected = tiny(stem="patch"), tiny(stem="patch")
    expected.load_published(weights)
    network.load_backbone(classifier(weights))
    assert torch.equal(network.backbone.embeddings(image()), expected.backbone.embeddings(image()))
    assert torch.equal(
        network.backbone.encoder.stages[3].layers[0].pwconv2.weight, weights["backbone.stages.3.0.pwconv2.weight"]
    )


def test_without_an_auxiliary_head_the_published_one_is_left_out() -> None:
    weights = published()
    network = UPerNet(**TINY, auxiliary=False).eval()
    network.load_published(weights)
    assert not any(name.startswith("auxiliary_head") for name in network.state_dict())
    torch.testing.assert_close(network(image()), reference(weights, image())[0], atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="expected a network with an auxiliary head"):
        network.with_auxiliary(image())
    with pytest.raises(ValueError, match=r"got 8 that do not fit: no auxiliary_head\.convs\.0\.conv\.weight, "):
        tiny().load_published(published(auxiliary=False))


def test_weights_that_do_not_fit_are_named_and_change_nothing() -> None:
    network = tiny()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    weights = published(seed=2)
    wrong = dict(weights)
    del wrong["backbone.stages.2.1.gamma"]
    wrong["backbone.stages.2.2.gamma"] = torch.ones(64)
    wrong["decode_head.classifier.weight"] = torch.ones(7, 32, 1, 1)
    with pytest.raises(ValueError, match=f"expected published weights of {len(weights)} tensors, got 3") as caught:
        network.load_published(wrong)
    assert "no backbone.stages.2.1.gamma, " in str(caught.value)
    assert "backbone.stages.2.2.gamma, which has no place" in str(caught.value)
    assert "decode_head.classifier.weight (7, 32, 1, 1) where the network has (5, 32, 1, 1)" in str(caught.value)

    own = classifier(weights)
    del own["stem.stem.3.weight"]
    own["patch_embed.proj.weight"] = torch.ones(1)
    with pytest.raises(ValueError, match=r"got 2 that do not fit: no stem\.stem\.3\.weight, patch_embed\.proj\.weight"):
        network.load_backbone(own)
    with pytest.raises(ValueError, match=r"no stem\.stem\.0\.weight"):
        network.load_backbone(classifier(published(stem="patch")))
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_the_gradient_is_the_difference_quotient() -> None:
    network = tiny().double().requires_grad_(False)
    x = image(50, 67).double().requires_grad_()
    weight = torch.randn((1, 5, 50, 67), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (gradient,) = torch.autograd.grad((network(x) * weight).sum(), x)
    assert (gradient != 0).all()
    step = 1e-6
    for seed in range(2):
        direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        with torch.no_grad():
            ahead, behind = ((network(x + sign * step * direction) * weight).sum() for sign in (1, -1))
        assert ((ahead - behind) / (2 * step)).item() == pytest.approx((gradient * direction).sum().item(), rel=1e-4)


@pytest.mark.parametrize("stem", ["conv", "patch"])
def test_training_reaches_every_parameter(stem: str) -> None:
    network = tiny(stem=stem, drop_path_rate=0.0).train()
    logits, auxiliary = network.with_auxiliary(image(batch=2))
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    (logits * weight + 0.4 * auxiliary * weight.flip(1)).sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.norm() > 0, name


def test_a_tiny_network_learns_a_square() -> None:
    """Four images of noise with a bright square each: a few steps must find it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = UPerNet(2, DEPTHS, (8, 8, 16, 16), hidden_size=16, drop_path_rate=0.1, in_channels=1).train()
        x, label = 0.3 * image(channels=1, batch=4), torch.zeros(4, 64, 64, dtype=torch.int64)
        for case, (top, left) in enumerate(((4, 8), (30, 12), (16, 36), (36, 36))):
            x[case, :, top : top + 24, left : left + 24] += 0.6
            label[case, top : top + 24, left : left + 24] = 1
        optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3)
        for _ in range(40):
            logits, auxiliary = network.with_auxiliary(x)
            loss = F.cross_entropy(logits, label) + 0.4 * F.cross_entropy(auxiliary, label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    pred = network(x).argmax(1)
    overlap = 2 * (pred * label).sum() / (pred.sum() + label.sum())
    assert overlap > 0.8


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (95, 129)])
@pytest.mark.parametrize("stem", ["conv", "patch"])
def test_any_size_and_number_of_classes(size: tuple[int, int], stem: str) -> None:
    network = tiny(stem=stem, num_classes=1, pool_scales=(1, 2)).double()
    both = image(*size, batch=2).double()
    logits = network(both)
    assert logits.shape == (2, 1, *size)
    # In evaluation mode a case does not see its neighbour in the batch.
    torch.testing.assert_close(logits[1:], network(both[1:]))


def test_one_channel_stands_for_three_and_normalisation_is_inside() -> None:
    network = tiny()
    grey = image(channels=1)
    assert torch.equal(network(grey), network(grey.repeat(1, 3, 1, 1)))
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.4])
    normalising = tiny(mean=mean.tolist(), std=std.tolist())
    assert normalising.state_dict().keys() == network.state_dict().keys()
    normalised = (image() - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
    assert torch.equal(normalising(image()), network(normalised))
    single = tiny(in_channels=1, mean=(0.5,), std=(0.25,))
    assert torch.equal(single(grey), tiny(in_channels=1)((grey - 0.5) / 0.25))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (image(31, 40), "32 x 32 pixels or more, got 31 x 40"),
        (image(channels=2), r"expected images \(B, 1 or 3, H, W\), got \(1, 2, 64, 64\)"),
        (torch.zeros(1, 3, 32, 32, 32), "UPerNet is for 2-D, so slice volumes"),
    ],
)
def test_an_image_that_does_not_fit_is_named(x: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny()(x)


def test_training_wants_more_than_one_image() -> None:
    network = tiny().train()
    with pytest.raises(ValueError, match="expected 2 images or more in training mode, got 1"):
        network(image())
    assert tiny(pool_scales=(2, 3)).train()(image()).shape == (1, 5, 64, 64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depths": (1, 1, 1)}, r"expected 4 numbers for depths, got \(1, 1, 1\)"),
        ({"hidden_sizes": (8, 16)}, "expected 4 numbers for hidden_sizes"),
        ({"hidden_sizes": (9, 16, 32, 64)}, "expected an even first hidden size, got 9"),
        ({"stem": "cvst"}, "expected stem 'conv' or 'patch', got 'cvst'"),
        ({"mean": (0.5, 0.5)}, r"expected 1 or 3 numbers for mean, got \(0\.5, 0\.5\)"),
        ({"std": ()}, "expected 1 or 3 numbers for std"),
    ],
)
def test_settings_that_do_not_fit_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UPerNet(**{**TINY, **changes})
