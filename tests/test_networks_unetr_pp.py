"""UNETR++ has the published size, its attention is the formula, and its gradient is the difference quotient's."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from medrobust.networks.unetr_pp import UNETRPP, Block, EfficientPairedAttention

SYNAPSE: dict[str, Any] = {"img_size": (128, 128, 64), "stem_stride": (4, 4, 2)}
ACDC: dict[str, Any] = {"img_size": (160, 160, 16), "stem_stride": (4, 4, 1)}
ACDC |= {"shared_projection": False, "convs_per_block": 2}
TINY: dict[str, Any] = {"img_size": (32, 16, 8), "stem_stride": (2, 2, 1), "feature_size": 4, "hidden_size": 24}
TINY |= {"num_heads": 2, "depths": (1, 2, 1, 1), "proj_size": (5, 4, 3, 2)}


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random parameters everywhere, so that no branch hides behind its small or empty start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return module


def tiny(**changes: Any) -> UNETRPP:
    network = randomised(UNETRPP(**{"in_channels": 1, "out_channels": 3, **TINY, **changes}))
    assert isinstance(network, UNETRPP)
    return network.eval()


def image(channels: int = 1, batch: int = 1, seed: int = 0) -> Tensor:
    return torch.rand((batch, channels, *TINY["img_size"]), generator=torch.Generator().manual_seed(seed))


def parameters_of_a_block(tokens: int, c: int, p: int, heads: int, projections: int, convs: int) -> int:
    position, norm, scale = tokens * c, 2 * c, c
    queries_keys_and_two_values = 4 * c * c
    summaries = projections * (tokens * p + p)
    outputs = 2 * (c * c // 2 + c // 2)
    temperatures = 2 * heads
    residual = convs * (2 * 27 * c * c + 2 * 2 * c)
    last = c * c + c
    attention = queries_keys_and_two_values + summaries + outputs + temperatures
    return position + norm + scale + attention + residual + last


def expected_parameters(
    classes: int, size: tuple[int, ...], stem: tuple[int, ...], projections: int, convs: int
) -> int:
    """The sum over the layers of the paper's figure, with the released widths; few convolutions have a bias."""
    patch = math.prod(stem)
    voxels = math.prod(size) // patch
    tokens = [voxels, voxels // 8, voxels // 64, voxels // 512]
    blocks = [
        3 * parameters_of_a_block(n, c, p, 4, projections, convs)
        for n, c, p in zip(tokens, (32, 64, 128, 256), (64, 64, 64, 32), strict=True)
    ]
    stem_and_norm = 32 * patch + 2 * 32
    downs = sum(8 * c * 2 * c + 2 * 2 * c for c in (32, 64, 128))
    ups = sum(8 * 2 * c * c for c in (32, 64, 128)) + 32 * 16 * patch
    skip_at_full_resolution = 27 * 16 + 27 * 16 * 16 + 16
    last_at_full_resolution = 2 * 27 * 16 * 16
    heads = sum(c * classes + classes for c in (16, 32, 64))
    encoder, decoder = sum(blocks), sum(blocks[:3])
    full = skip_at_full_resolution + last_at_full_resolution
    return stem_and_norm + downs + encoder + ups + decoder + full + heads


@pytest.mark.parametrize(
    ("classes", "settings", "count", "published"),
    [(14, SYNAPSE, 42_952_850, 42.96e6), (4, ACDC, 66_796_404, 66.8e6)],
    ids=["Synapse", "ACDC"],
)
def test_the_network_has_the_published_size(
    classes: int, settings: dict[str, Any], count: int, published: float
) -> None:
    """The count is what the authors' code has with these sizes, to the unit; their paper prints it rounded."""
    with torch.device("meta"):
        network = UNETRPP(1, classes, **settings, deep_supervision=True)
    found = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    projections, convs = (1, 1) if settings is SYNAPSE else (2, 2)
    assert found == count
    assert found == expected_parameters(classes, settings["img_size"], settings["stem_stride"], projections, convs)
    assert found == pytest.approx(published, abs=1e4)


@pytest.mark.parametrize("shared", [True, False])
def test_attention_is_its_formula(shared: bool) -> None:
    tokens, channels, heads, few = 6, 8, 2, 3
    attention = EfficientPairedAttention(tokens, channels, heads, few, shared_projection=shared)
    randomised(attention.double())
    assert len(attention.projections) == (1 if shared else 2)
    x = torch.randn((2, tokens, channels), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = attention(x).detach().numpy()

    weights = {name: value.detach().numpy() for name, value in attention.named_parameters()}
    summarise = [(weights[f"projections.{i}.weight"], weights[f"projections.{i}.bias"]) for i in (0, -int(shared) + 1)]
    each = channels // heads
    for case in range(2):
        q, k, v, w = np.split(weights["qkvw.weight"] @ x[case].numpy().T, 4)
        by_space, by_channel = np.zeros((channels, tokens)), np.zeros((channels, tokens))
        for head in range(heads):
            rows = range(head * each, (head + 1) * each)
            keys = [[sum(k[c, n] * summarise[0][0][j, n] for n in range(tokens)) for j in range(few)] for c in rows]
            values = [[sum(v[c, n] * summarise[1][0][j, n] for n in range(tokens)) for j in range(few)] for c in rows]
            keys, values = np.array(keys) + summarise[0][1], np.array(values) + summarise[1][1]
            length_q = {c: np.sqrt(sum(q[c, n] ** 2 for n in range(tokens))) for c in rows}
            length_k = {c: np.sqrt(sum(k[c, n] ** 2 for n in range(tokens))) for c in rows}
            for n in range(tokens):
                scores = [sum(q[c, n] / length_q[c] * keys[i, j] for i, c in enumerate(rows)) for j in range(few)]
                share = np.exp(np.array(scores) * weights["temperature"][0, head, 0, 0])
                for i, c in enumerate(rows):
                    by_space[c, n] = sum(share[j] / share.sum() * values[i, j] for j in range(few))
            for c in rows:
                scores = [sum(q[c, n] * k[d, n] for n in range(tokens)) / length_q[c] / length_k[d] for d in rows]
                share = np.exp(np.array(scores) * weights["temperature"][1, head, 0, 0])
                for n in range(tokens):
                    by_channel[c, n] = sum(share[j] / share.sum() * w[d, n] for j, d in enumerate(rows))
        spatial = by_space.T @ weights["spatial_out.weight"].T + weights["spatial_out.bias"]
        channel = by_channel.T @ weights["channel_out.weight"].T + weights["channel_out.bias"]
        np.testing.assert_allclose(found[case], np.concatenate([spatial, channel], axis=1), rtol=1e-9)


def test_a_position_goes_to_its_voxel() -> None:
    """With attention and convolutions switched off, a block adds what it learned for a voxel to that voxel."""
    block = Block(2 * 3 * 4, 2, 1, 2, shared_projection=True, convs=1, dropout_rate=0.0).eval()
    with torch.no_grad():
        block.position.copy_(torch.arange(48.0).reshape(1, 24, 2))
        block.scale.zero_()
        for parameter in block.convs[-1].parameters():
            parameter.zero_()
    x = torch.rand((1, 2, 2, 3, 4), generator=torch.Generator().manual_seed(0))
    position = torch.arange(48.0).reshape(2, 3, 4, 2).permute(3, 0, 1, 2)[None]
    assert torch.equal(block(x), x + position)


@pytest.mark.parametrize("changes", [{}, {"shared_projection": False, "convs_per_block": 2}], ids=["Synapse", "ACDC"])
def test_the_gradient_is_the_difference_quotient(changes: dict[str, Any]) -> None:
    network = tiny(**changes).double()
    x = image().double().requires_grad_()
    weight = torch.randn((1, 3, *TINY["img_size"]), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (gradient,) = torch.autograd.grad((network(x) * weight).sum(), x)
    assert torch.isfinite(gradient).all()
    assert (gradient != 0).all()
    step = 1e-7
    for seed in range(3):
        direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        with torch.no_grad():
            ahead, behind = ((network(x + sign * step * direction) * weight).sum() for sign in (1, -1))
        assert ((ahead - behind) / (2 * step)).item() == pytest.approx((gradient * direction).sum().item(), rel=1e-5)


@pytest.mark.parametrize(("in_channels", "out_channels"), [(1, 1), (3, 2), (4, 5)])
def test_any_number_of_channels(in_channels: int, out_channels: int) -> None:
    network = tiny(in_channels=in_channels, out_channels=out_channels).double()
    both = image(in_channels, batch=2).double()
    logits = network(both)
    assert logits.shape == (2, out_channels, *TINY["img_size"])
    # In evaluation mode a case does not see its neighbour in the batch.
    torch.testing.assert_close(logits[1:], network(both[1:]))


def test_deep_supervision_is_a_matter_of_training() -> None:
    deep = tiny(deep_supervision=True)
    assert isinstance(deep(image()), Tensor)
    full, half, quarter = deep.train()(image())
    assert (full.shape, half.shape, quarter.shape) == ((1, 3, 32, 16, 8), (1, 3, 16, 8, 8), (1, 3, 8, 4, 4))
    plain = tiny()
    assert len(plain.heads) == 1
    assert plain.train()(image()).shape == (1, 3, 32, 16, 8)
    assert torch.equal(deep.eval()(image()), deep(image()))


def test_dropout_is_a_matter_of_training() -> None:
    network = tiny(dropout_rate=0.5).train()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert not torch.equal(network(image()), network(image()))
    still = tiny(dropout_rate=0.0).train()
    assert torch.equal(still(image()), still(image()))


def test_half_precision_gives_nearly_the_same() -> None:
    network = tiny()
    full = network(image())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = network(image())
    assert half.dtype == torch.bfloat16
    assert (half.float() - full).norm() < 0.02 * full.norm()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"img_size": (32, 16, 12)}, r"img_size in multiples of \(16, 16, 8\) .* got \(32, 16, 12\)"),
        ({"img_size": (32, 16, 0)}, r"got \(32, 16, 0\)"),
        ({"img_size": (32, 16)}, r"expected 3 numbers for img_size, got \(32, 16\)"),
        ({"depths": (1, 1, 1)}, "expected 4 numbers for depths"),
        ({"proj_size": (1, 1, 1)}, "expected 4 numbers for proj_size"),
        ({"stem_stride": (4, 4)}, "expected 3 numbers for stem_stride"),
        ({"num_heads": 3}, r"that 3 heads divide, got \(8, 16, 32, 24\)"),
        ({"hidden_size": 25, "num_heads": 1}, "expected even numbers of channels"),
    ],
)
def test_sizes_that_do_not_fit_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UNETRPP(1, 3, **{**TINY, **changes})


@pytest.mark.parametrize("shape", [(1, 1, 32, 16, 16), (1, 2, 32, 16, 8), (1, 32, 16, 8)])
def test_an_image_of_another_size_is_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected an image \(B, 1, 32, 16, 8\), got .*sliding window"):
        tiny()(torch.zeros(shape))
