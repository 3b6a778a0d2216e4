"""Segmenter has the published size, is a plain second implementation to the digit, and maps published weights."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medrobust.networks.segmenter import Encoder, Segmenter, resize_positions

TINY: dict[str, Any] = {"num_classes": 5, "image_size": 32, "patch_size": 8, "hidden_size": 24, "num_layers": 3}
TINY |= {"num_heads": 3}
Shapes = dict[str, tuple[int, ...]]


@torch.no_grad()
def randomised(network: Segmenter, seed: int = 0) -> Segmenter:
    """Random values everywhere, so that nothing hides behind a start of 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in network.state_dict().items():
        tensor.copy_(values(name, tuple(tensor.shape), generator))
    return network.eval()


def values(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if len(shape) > 1:
        scale = 1.0 if name.endswith(("cls_token", "pos_embed", "cls_emb")) else torch.Size(shape[1:]).numel() ** -0.5
        return scale * torch.randn(shape, generator=generator)
    return 0.4 * torch.rand(shape, generator=generator) + (0.8 if name.endswith("weight") else -0.2)


def tiny(**changes: Any) -> Segmenter:
    return randomised(Segmenter(**{**TINY, **changes}))


def image(height: int = 32, width: int = 32, channels: int = 3, batch: int = 1) -> Tensor:
    return torch.rand((batch, channels, height, width), generator=torch.Generator().manual_seed(1))


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def block_shapes(name: str, channels: int) -> Shapes:
    shapes: Shapes = {}
    for part, weight in (
        ("norm1", (channels,)),
        ("norm2", (channels,)),
        ("attn.qkv", (3 * channels, channels)),
        ("attn.proj", (channels, channels)),
        ("mlp.fc1", (4 * channels, channels)),
        ("mlp.fc2", (channels, 4 * channels)),
    ):
        shapes[f"{name}.{part}.weight"] = weight
        shapes[f"{name}.{part}.bias"] = weight[:1]
    return shapes


def encoder_shapes(grid: int, patch: int, channels: int, depth: int) -> Shapes:
    """Names and shapes of a timm ViT, which are those of the published encoder, its classifier included."""
    shapes: Shapes = {"cls_token": (1, 1, channels), "pos_embed": (1, 1 + grid * grid, channels)}
    shapes |= {"patch_embed.proj.weight": (channels, 3, patch, patch), "patch_embed.proj.bias": (channels,)}
    for block in range(depth):
        shapes |= block_shapes(f"blocks.{block}", channels)
    shapes |= {"norm.weight": (channels,), "norm.bias": (channels,)}
    return shapes | {"head.weight": (1000, channels), "head.bias": (1000,)}


def published_shapes(classes: int, grid: int, patch: int, channels: int, depth: int) -> Shapes:
    """Names and shapes of a published segmentation checkpoint, written down from the authors' modules."""
    encoder = encoder_shapes(grid, patch, channels, depth)
    shapes = {f"encoder.{name}": shape for name, shape in encoder.items()}
    for block in range(2):
        shapes |= block_shapes(f"decoder.blocks.{block}", channels)
    shapes |= {"decoder.cls_emb": (1, classes, channels)}
    shapes |= {f"decoder.{name}": (channels, channels) for name in ("proj_dec.weight", "proj_patch", "proj_classes")}
    shapes |= {"decoder.proj_dec.bias": (channels,)}
    shapes |= {f"decoder.decoder_norm.{part}": (channels,) for part in ("weight", "bias")}
    return shapes | {f"decoder.mask_norm.{part}": (classes,) for part in ("weight", "bias")}


def filled(shapes: Shapes, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: values(name, shape, generator) for name, shape in shapes.items()}


def published(grid: int = 4, seed: int = 0) -> dict[str, Tensor]:
    return filled(published_shapes(5, grid, 8, 24, 3), seed)


def reference(w: dict[str, Tensor], image: Tensor, heads: int = 3) -> Tensor:
    """Logits from published names alone, for images that need no new positions, in plain functions."""

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        unit = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return unit * w[f"{name}.weight"] + w[f"{name}.bias"]

    def block(x: Tensor, name: str) -> Tensor:
        q, k, v = linear(norm(x, f"{name}.norm1"), f"{name}.attn.qkv").chunk(3, -1)
        each = x.shape[-1] // heads
        seen = []
        for head in range(heads):
            part = slice(head * each, (head + 1) * each)
            shares = (q[..., part] @ k[..., part].mT / math.sqrt(each)).softmax(-1)
            seen.append(shares @ v[..., part])
        x = x + linear(torch.cat(seen, -1), f"{name}.attn.proj")
        return x + linear(F.gelu(linear(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")), f"{name}.mlp.fc2")

    kernel = w["encoder.patch_embed.proj.weight"]
    patches = F.unfold(image, kernel.shape[-1], stride=kernel.shape[-1]).mT
    patches = patches @ kernel.flatten(1).T + w["encoder.patch_embed.proj.bias"]
    token = w["encoder.cls_token"].expand(len(image), -1, -1)
    x = torch.cat([token, patches], 1) + w["encoder.pos_embed"]
    for number in range(3):
        x = block(x, f"encoder.blocks.{number}")
    x = linear(norm(x, "encoder.norm")[:, 1:], "decoder.proj_dec")
    places = x.shape[1]
    x = torch.cat([x, w["decoder.cls_emb"].expand(len(image), -1, -1)], 1)
    for number in range(2):
        x = block(x, f"decoder.blocks.{number}")
    x = norm(x, "decoder.decoder_norm")
    place, kind = x[:, :places] @ w["decoder.proj_patch"], x[:, places:] @ w["decoder.proj_classes"]
    scores = torch.stack([F.cosine_similarity(place, kind[:, [k]], dim=-1) for k in range(kind.shape[1])], -1)
    side = math.isqrt(places)
    logits = norm(scores, "decoder.mask_norm").mT.unflatten(-1, (side, side))
    return F.interpolate(logits, image.shape[2:], mode="bilinear")


@pytest.mark.parametrize(("classes", "parameters"), [(151, 26_034_350), (21, 25_984_170)])
def test_the_published_size(classes: int, parameters: int) -> None:
    """About 26 million in the paper of PIR-AT; what is left out is the classifier that nothing depends on."""
    with torch.device("meta"):
        network = Segmenter(classes).eval()
        assert network(torch.zeros(1, 3, 500, 333)).shape == (1, classes, 500, 333)
    assert count(network) == parameters
    shapes = published_shapes(classes, 32, 16, 384, 12)
    assert len(network.state_dict()) == len(shapes) - 2 == 183
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == parameters + 1001 * 384 + 616
    rates = [block.drop_path.drop_prob for block in network.encoder.blocks]
    assert rates == pytest.approx([0.1 * block / 11 for block in range(12)])
    assert all(block.drop_path.drop_prob == 0 for block in network.decoder.blocks)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_published_weights_give_what_plain_functions_give(prefix: str) -> None:
    weights = published()
    network = tiny()
    network.load_published({prefix + name: tensor for name, tensor in weights.items()})
    network.double()
    x = image(batch=2).double()
    expected = reference({name: tensor.double() for name, tensor in weights.items()}, x)
    assert expected.std() > 0.1
    torch.testing.assert_close(network(x), expected)


@pytest.mark.parametrize("prefix", ["", "module.", "module.base_model.", "base_model.model."])
def test_a_published_classifier_becomes_the_encoder(prefix: str) -> None:
    """A ViT for 2 x 2 patches a side starts an encoder for 4 x 4: positions are interpolated, the rest is copied."""
    vit = filled(encoder_shapes(2, 8, 24, 3))
    own = {prefix + name: tensor for name, tensor in vit.items()}
    if prefix.endswith("model.model."):
        own |= {f"base_model.normalize.{name}": torch.ones(1, 3, 1, 1) for name in ("mean", "std")}
    network, same_size = tiny(), tiny(image_size=16)
    decoder = {name: tensor.clone() for name, tensor in network.decoder.state_dict().items()}
    network.load_backbone(own)
    same_size.load_backbone(own)
    assert torch.equal(same_size.encoder.pos_embed, vit["pos_embed"])
    # Asked for the other's size, each gives the other's result.
    torch.testing.assert_close(network.encoder(image()), same_size.encoder(image()))
    everything = {f"encoder.{name}": tensor for name, tensor in vit.items()}
    everything |= {name: tensor for name, tensor in published().items() if name.startswith("decoder.")}
    complete = tiny(image_size=16)
    complete.load_published(everything)
    expected = reference(everything, image(16, 16))
    torch.testing.assert_close(complete(image(16, 16)), expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(complete.encoder(image(16, 16)), same_size.encoder(image(16, 16)))
    assert all(torch.equal(tensor, decoder[name]) for name, tensor in network.decoder.state_dict().items())


def test_positions_are_interpolated_in_their_rows() -> None:
    """From 2 x 2 to 4 x 2: a quarter of the way in, halfway between; the class token's stays."""
    positions = torch.tensor([9.0, 0.0, 10.0, 4.0, 14.0]).view(1, 5, 1)
    tall = resize_positions(positions, (4, 2)).flatten()
    assert tall.tolist() == [9, 0, 10, 1, 11, 3, 13, 4, 14]
    # As many patches, but other sides: not the square's.
    wide = resize_positions(positions, (1, 4)).flatten()
    assert wide.tolist() == [9, 2, 4.5, 9.5, 12]
    assert resize_positions(positions, (2, 2)) is positions


def test_a_position_goes_to_its_patch() -> None:
    """With blocks switched off, the encoder gives each patch its position, normalised."""
    encoder = Encoder(1, 2, 8, 4, 1, 1, 0.0).eval()
    positions = torch.randn((1, 5, 4), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in (*encoder.patch_embed.parameters(), *encoder.blocks.parameters()):
            parameter.zero_()
        encoder.pos_embed.copy_(positions)
    expected = F.layer_norm(positions[0, 1:], (4,)).view(2, 2, 4)
    torch.testing.assert_close(encoder(torch.ones(1, 1, 16, 16))[0].movedim(0, -1), expected)


@pytest.mark.parametrize("size", [(30, 41), (1, 9), (32, 72)])
def test_sides_are_padded_by_zeros_and_cropped(size: tuple[int, int]) -> None:
    network = tiny().double()
    both = image(*size, batch=2).double()
    logits = network(both)
    assert logits.shape == (2, 5, *size)
    whole = torch.zeros(2, 3, -(-size[0] // 8) * 8, -(-size[1] // 8) * 8, dtype=torch.float64)
    whole[..., : size[0], : size[1]] = both
    assert torch.equal(logits, network(whole)[..., : size[0], : size[1]])
    # A case does not see its neighbour in the batch.
    torch.testing.assert_close(logits[1:], network(both[1:]))


def test_weights_that_do_not_fit_are_named_and_change_nothing() -> None:
    network = tiny()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    wrong = published(seed=2)
    del wrong["encoder.blocks.1.attn.qkv.bias"]
    wrong["encoder.dist_token"] = torch.ones(1, 1, 24)
    wrong["decoder.mask_norm.weight"] = torch.ones(7)
    with pytest.raises(ValueError, match="expected published weights of 75 tensors, got 3 that do not fit") as caught:
        network.load_published(wrong)
    assert "no encoder.blocks.1.attn.qkv.bias, " in str(caught.value)
    assert "encoder.dist_token, which has no place" in str(caught.value)
    assert "decoder.mask_norm.weight (7,) where the network has (5,)" in str(caught.value)

    stem = filled(encoder_shapes(2, 8, 24, 3))
    stem["patch_embed.proj.stem.0.weight"] = stem.pop("patch_embed.proj.weight")
    stem["pos_embed"] = torch.ones(1, 6, 24)
    with pytest.raises(ValueError, match=r"got 3 that do not fit: no patch_embed\.proj\.weight, patch_embed") as caught:
        network.load_backbone(stem)
    assert "pos_embed (1, 6, 24) where the network has (1, 17, 24)" in str(caught.value)
    with pytest.raises(ValueError, match=r"no encoder\.cls_token"):
        network.load_published(filled(encoder_shapes(4, 8, 24, 3)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_the_gradient_is_the_difference_quotient() -> None:
    network = tiny().double().requires_grad_(False)
    x = image(27, 38).double().requires_grad_()
    weight = torch.randn((1, 5, 27, 38), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (gradient,) = torch.autograd.grad((network(x) * weight).sum(), x)
    assert (gradient != 0).all()
    step = 1e-6
    for seed in range(2):
        direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        with torch.no_grad():
            ahead, behind = ((network(x + sign * step * direction) * weight).sum() for sign in (1, -1))
        assert ((ahead - behind) / (2 * step)).item() == pytest.approx((gradient * direction).sum().item(), rel=1e-5)


def test_training_reaches_every_parameter() -> None:
    network = tiny(dropout=0.0, drop_path_rate=0.0).train()
    logits = network(image(batch=2))
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    (logits * weight).sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.norm() > 0, name


def test_it_starts_as_published() -> None:
    """Matrices and embeddings of standard deviation 0.02, the two last projections of 1 / sqrt(channels)."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Segmenter(**{**TINY, "num_classes": 20, "hidden_size": 96})
    for name, parameter in network.named_parameters():
        if name.startswith("encoder.patch_embed"):
            continue
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif parameter.ndim == 1:
            assert (parameter == 1).all(), name
        elif parameter.numel() > 1000:
            scale = 96**-0.5 if name in ("decoder.proj_patch", "decoder.proj_classes") else 0.02
            assert parameter.std().item() == pytest.approx(scale, rel=0.1), name


def test_dropout_and_skipping_are_a_matter_of_training() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for changes in ({"dropout": 0.5, "drop_path_rate": 0.0}, {"dropout": 0.0, "drop_path_rate": 0.9}):
            network = tiny(**changes)
            assert torch.equal(network(image()), network(image()))
            network.train()
            assert not torch.equal(network(image()), network(image()))


def test_a_tiny_network_learns_a_square() -> None:
    """Four images of noise with a bright square each, and a class that nothing has: some steps must find the square."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Segmenter(3, 32, 4, 24, 2, 2, decoder_layers=1, in_channels=1, dropout=0.0, drop_path_rate=0.0)
        x, label = 0.3 * image(channels=1, batch=4), torch.zeros(4, 32, 32, dtype=torch.int64)
        for case, (top, left) in enumerate(((4, 8), (16, 4), (8, 16), (16, 16))):
            x[case, :, top : top + 12, left : left + 12] += 0.6
            label[case, top : top + 12, left : left + 12] = 1
        optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
        for _ in range(60):
            loss = F.cross_entropy(network(x), label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    pred = network(x).argmax(1)
    assert (pred < 2).all()
    overlap = 2 * (pred * label).sum() / (pred.sum() + label.sum())
    assert overlap > 0.9


def test_one_channel_stands_for_three_and_normalisation_is_inside() -> None:
    network = tiny()
    grey = image(channels=1)
    assert torch.equal(network(grey), network(grey.repeat(1, 3, 1, 1)))
    normalising = tiny(mean=(0.5,), std=(0.25, 0.5, 1.0))
    assert normalising.state_dict().keys() == network.state_dict().keys()
    normalised = (image(30, 32) - 0.5) / torch.tensor([0.25, 0.5, 1.0]).view(-1, 1, 1)
    # Padding is 0 after normalisation, as the authors have it.
    assert torch.equal(normalising(image(30, 32)), network(normalised))


@pytest.mark.parametrize("x", [torch.zeros(1, 2, 32, 32), torch.zeros(1, 3, 8, 8, 8), torch.zeros(1, 3, 0, 8)])
def test_an_image_that_does_not_fit_is_named(x: Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected images \(B, 1 or 3, H, W\), got .*slice volumes"):
        tiny()(x)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": 2}, "expected 3 classes or more, got 2"),
        ({"image_size": 36}, "expected image_size in multiples of patch_size 8, got 36"),
        ({"image_size": 0}, "got 0: change one of them"),
        ({"num_heads": 5}, "expected a hidden_size that 5 heads divide, got 24"),
        ({"mean": (0.5, 0.5)}, "expected 1 or 3 numbers for mean"),
        ({"std": ()}, "expected 1 or 3 numbers for std"),
    ],
)
def test_settings_that_do_not_fit_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Segmenter(**{**TINY, **changes})
