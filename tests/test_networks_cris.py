"""CRIS gives the authors' numbers and fits their checkpoint; its gradients reach pixels; padding says nothing."""

from __future__ import annotations

import hashlib
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medrobust.networks.clip_resnet import CLIPResNet, QuickGELU, SpatialAttention
from medrobust.networks.cris import CRIS, MEAN, STD, Projector, sines
from medrobust.networks.weights import load_weights

EOT = 49407
TINY: dict[str, Any] = {
    "width": 8,
    "depths": (1, 2, 1, 1),
    "embed_dim": 64,
    "channels": 32,
    "num_heads": 4,
    "text_layers": 2,
    "decoder_layers": 2,
    "decoder_hidden": 64,
}

# What the authors' own modules give. Logits: their sum, their absolute sum, and three of them.
LOGITS = {
    ("after_end", 64): (-5347.83, 5895.08, -1.70853, -0.135952, -0.555255),
    ("published", 64): (-388.722, 4150.75, -1.52742, 0.554013, -0.339608),
    ("after_end", 96): (-13066.2, 13971.3, -1.75604, -0.177604, -1.43956),
    ("published", 96): (-1358.32, 9787.8, -1.53812, 0.496571, -0.660959),
}
# L1 of the gradients of the logits' mean square: the image's, and those of the four parts.
GRADIENTS = {
    ("after_end", 64): (0.0173970, 5378.88, 779.521, 2233.12, 2811.71),
    ("published", 96): (0.00394196, 1366.45, 290.028, 758.156, 1155.54),
}
# Names and shapes of all 662 tensors in a checkpoint of the authors' modules at full size.
CHECKPOINT = "53bce7b3186b2f35df4c5b09e695385f40df0274687a83ce77883e2e76e5ad45"


def build(**settings: Any) -> CRIS:
    """A tiny network with the filled weights of the golden numbers."""
    network = CRIS(**{**TINY, **settings})
    fill(network)
    return network.eval()


@torch.no_grad()
def fill(network: nn.Module) -> None:
    for name, tensor in network.state_dict().items():
        if not tensor.ndim:
            continue
        place = torch.arange(tensor.numel(), dtype=torch.float64)
        phase = zlib.crc32(name.encode()) % 997
        wave = torch.sin(phase + 0.37 * place + 0.0123 * place * place).view_as(tensor)
        if tensor.ndim > 1:
            tensor.copy_(wave * tensor[0].numel() ** -0.5)
        else:
            tensor.copy_(0.1 * wave + (1 if name.endswith(("running_var", "weight")) else 0))


def image_of(size: int) -> Tensor:
    wave = torch.sin(0.011 * torch.arange(2 * 3 * size * size, dtype=torch.float64))
    return (wave.view(2, 3, size, size).float() + 1) / 2


def prompts(*rows: list[int], length: int = 77, pad: int = EOT) -> Tensor:
    return torch.tensor([[49406, *row, EOT] + [pad] * (length - 2 - len(row)) for row in rows])


ROWS = ([637, 2442, 3360, 6833, 335], [320, 2368])


@pytest.fixture
def image() -> Tensor:
    return image_of(64)


@pytest.fixture
def tokens() -> Tensor:
    return prompts(*ROWS)


@pytest.fixture
def mask() -> Tensor:
    return (torch.arange(77) < torch.tensor([[7], [4]])).long()


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(("padding", "size"), LOGITS)
def test_the_authors_logits(padding: Any, size: int, tokens: Tensor) -> None:
    logits = build(padding=padding)(image_of(size), tokens)
    assert logits.shape == (2, 1, size, size)
    found = [logits.sum(), logits.abs().sum(), logits[0, 0, 0, 0], logits[0, 0, 31, 17], logits[1, 0, 63, 63]]
    assert [value.item() for value in found] == pytest.approx(LOGITS[padding, size], rel=2e-5)


@pytest.mark.parametrize(("padding", "size"), GRADIENTS)
def test_the_authors_gradients(padding: Any, size: int, tokens: Tensor) -> None:
    network = build(padding=padding)
    x = image_of(size).requires_grad_()
    network(x, tokens).square().mean().backward()
    assert x.grad is not None
    found = [x.grad.abs().sum().item()]
    for part in (network.backbone, network.neck, network.decoder, network.proj):
        found.append(sum(p.grad.abs().sum().item() for p in part.parameters() if p.grad is not None))
    assert found == pytest.approx(GRADIENTS[padding, size], rel=1e-4)


def test_the_published_counts_and_names() -> None:
    with torch.device("meta"):
        network = CRIS()
        large = CRIS(depths=(3, 4, 23, 3), embed_dim=512)
    assert {name: count(part) for name, part in network.named_children()} == {
        "backbone": 104_106_337,
        "neck": 24_142_336,
        "decoder": 12_631_552,
        "proj": 5_968_897,
    }
    assert count(network) == 146_849_122
    assert sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad) == 146_849_121
    assert count(network.backbone.visual.attnpool.connect) == 2_099_200
    layers = list(network.decoder.modules())
    assert {layer.p for layer in layers if isinstance(layer, nn.Dropout)} == {0.2}
    assert {layer.dropout for layer in layers if isinstance(layer, nn.MultiheadAttention)} == {0.2}
    # The authors' modules with their settings for RN101.
    assert count(large) == 161_251_682
    lines = sorted(f"{name} {tuple(tensor.shape)}" for name, tensor in network.state_dict().items())
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == CHECKPOINT


def test_the_text_as_in_transformers(tokens: Tensor) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPTextConfig(
        hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, projection_dim=64
    )
    theirs = transformers.CLIPTextModelWithProjection(config).eval()
    network = build().backbone
    state = {}
    for name, tensor in network.state_dict().items():
        name = re.sub(r"^transformer\.resblocks", "text_model.encoder.layers", name)
        for old, new in (
            ("ln_1", "layer_norm1"),
            ("ln_2", "layer_norm2"),
            ("c_fc", "fc1"),
            ("c_proj", "fc2"),
            ("attn.out_proj", "self_attn.out_proj"),
            ("ln_final", "text_model.final_layer_norm"),
            ("token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
        ):
            name = name.replace(old, new)
        if "attn.in_proj" in name:
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                state[name.replace("attn.in_proj_", f"self_attn.{part}_proj.")] = piece
        elif name == "positional_embedding":
            state["text_model.embeddings.position_embedding.weight"] = tensor
        elif name == "text_projection":
            state["text_projection.weight"] = tensor.T
        elif not name.startswith(("visual.", "logit_scale")):
            state[name] = tensor
    theirs.load_state_dict(state)
    expected = theirs(tokens)
    words, sentence = network.encode_text(tokens)
    torch.testing.assert_close(words, expected.last_hidden_state, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sentence, expected.text_embeds, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        for fast, slow in zip(network.encode_text(tokens), (words, sentence), strict=True):
            torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(7, 7), (3, 5)])
def test_spatial_attention_is_torchs(shape: tuple[int, int]) -> None:
    pool = SpatialAttention(16, 4, 6).eval()
    fill(pool)
    if shape != (7, 7):
        # Equal positions stay so at any size.
        with torch.no_grad():
            pool.positional_embedding[1:] = torch.linspace(-1, 1, 16)
    attention = nn.MultiheadAttention(16, 4, batch_first=True)
    parts = [getattr(pool, f"{part}_proj") for part in "qkv"]
    with torch.no_grad():
        attention.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
        attention.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
        attention.out_proj.weight.copy_(torch.eye(16))
    x = torch.randn(2, 16, *shape, generator=torch.Generator().manual_seed(0))
    tokens = x.flatten(2).mT + pool.positional_embedding[1 : 1 + shape[0] * shape[1]]
    seen = attention(tokens, tokens, tokens)[0] @ pool.c_proj.weight.T + pool.c_proj.bias
    conv, norm = pool.connect
    shortcut = torch.einsum("bchw, dc -> bdhw", x, conv.weight[..., 0, 0])
    per_channel = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    centre, spread, gain, offset = (value.view(-1, 1, 1) for value in per_channel)
    shortcut = (shortcut - centre) / (spread + 1e-5).sqrt() * gain + offset
    expected = (seen.mT.reshape(2, 6, *shape) + shortcut).clamp(min=0)
    assert expected.count_nonzero() > 0.2 * expected.numel()
    torch.testing.assert_close(pool(x), expected, atol=1e-5, rtol=1e-5)


def test_quick_gelu() -> None:
    x = torch.linspace(-6, 6, 49, dtype=torch.float64)
    torch.testing.assert_close(QuickGELU()(x), x / (1 + torch.exp(-1.702 * x)))


def test_positions() -> None:
    found = sines(3, 4)
    expected = [[f(place * rate) for rate in (1.0, 0.01) for f in (np.sin, np.cos)] for place in range(3)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=found.dtype))


def test_every_sentence_makes_its_own_kernel() -> None:
    projector = Projector(8, 5).eval()
    fill(projector)
    generator = torch.Generator().manual_seed(0)
    x, sentence = (torch.randn(shape, generator=generator) for shape in ((3, 8, 4, 4), (3, 5)))
    found = projector(x, sentence)
    assert found.shape == (3, 1, 16, 16)
    for case, made in enumerate(projector.txt(sentence)):
        seen = projector.vis(x[case : case + 1])
        expected = F.conv2d(seen, made[:36].view(1, 4, 3, 3), padding=1) + made[36]
        torch.testing.assert_close(found[case : case + 1], expected, atol=1e-5, rtol=1e-5)


def test_nothing_after_the_end_matters(image: Tensor, tokens: Tensor, mask: Tensor) -> None:
    network = build()
    expected = network(image, tokens)
    after, before = tokens.clone(), tokens.clone()
    after[0, 7:], after[1, 4:], before[:, 2] = 1237, 99, 1237
    for ids, given in ((after, None), (tokens, mask), (after, mask), (prompts(*ROWS, length=7), None)):
        torch.testing.assert_close(network(image, ids, given), expected, atol=1e-5, rtol=0)
    assert (network(image, before) - expected).abs().amax((1, 2, 3)).min() > 1e-2


def test_the_attention_mask_hides_words(image: Tensor, tokens: Tensor, mask: Tensor) -> None:
    network = build()
    mask[0, 2] = 0
    change = (network(image, tokens, mask) - network(image, tokens)).abs().amax((1, 2, 3))
    assert change[0] > 1e-2
    assert change[1] < 1e-5


def test_published_padding_is_zero(image: Tensor, tokens: Tensor, mask: Tensor) -> None:
    network, published = build(), build(padding="published")
    expected = network(image, tokens)
    torch.testing.assert_close(published(image, prompts(*ROWS, pad=0)), expected, atol=1e-5, rtol=0)
    padded = published(image, tokens)
    assert (padded - expected).abs().max() > 0.1
    assert torch.equal(published(image, tokens, mask), padded)
    assert (published(image, prompts(*ROWS, length=7)) - padded).abs().max() > 0.1


def test_cases_do_not_depend_on_each_other(image: Tensor, tokens: Tensor) -> None:
    network = build()
    both = network(image, tokens)
    for case in range(2):
        alone = network(image[case : case + 1], tokens[case : case + 1])
        torch.testing.assert_close(alone, both[case : case + 1], atol=1e-5, rtol=1e-5)


def test_one_prompt_serves_all_images(image: Tensor, tokens: Tensor, mask: Tensor) -> None:
    network = build()
    one = network(image, tokens[:1], mask[:1])
    torch.testing.assert_close(one, network(image, tokens[:1].expand(2, -1)), atol=1e-5, rtol=1e-5)
    assert (one[1] - network(image, tokens)[1]).abs().max() > 0.1


def test_pixels_are_normalised_inside_and_grey_is_three_channels(image: Tensor, tokens: Tensor) -> None:
    network, plain = build(), build(mean=(0, 0, 0), std=(1, 1, 1))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    grey = image[:, :1]
    expected = plain((grey.expand(-1, 3, -1, -1) - mean) / std, tokens)
    torch.testing.assert_close(network(grey, tokens), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_every_parameter_that_trains_gets_a_gradient(training: bool, tokens: Tensor) -> None:
    # Four channels in the first convolution, as in the other tests, leave some pixels to ReLU's dead side.
    network = build(width=16).double().train(training)
    x = torch.rand(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    network(x, tokens.int()).square().mean().backward()
    assert x.grad is not None
    assert x.grad.count_nonzero() > 0.99 * x.numel()
    norms = {name: 0.0 if p.grad is None else p.grad.norm().item() for name, p in network.named_parameters()}
    # A bias of all keys alike moves no softmax.
    silent = {"backbone.logit_scale", "backbone.visual.attnpool.k_proj.bias"}
    assert {name for name, norm in norms.items() if norm < 1e-12} == silent
    assert {name for name, p in network.named_parameters() if not p.requires_grad} == {"backbone.logit_scale"}
    positions = network.backbone.visual.attnpool.positional_embedding.grad
    assert positions is not None
    assert positions.norm(dim=1).nonzero().flatten().tolist() == list(range(1, 50))


def test_a_fresh_network_learns_which_half_a_prompt_names() -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = CRIS(**TINY).train()
        image = torch.rand(8, 3, 32, 32, generator=generator)
        tokens = prompts([320], [2368], length=4).repeat(4, 1)
        label = torch.zeros(8, 1, 32, 32)
        label[::2, ..., :16] = label[1::2, ..., 16:] = 1
        optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
        for _ in range(40):
            loss = F.binary_cross_entropy_with_logits(network(image, tokens), label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    right = (network(image, tokens) > 0) == label.bool()
    assert right.float().mean() > 0.9


def test_a_checkpoint_as_the_authors_save_it(image: Tensor, tokens: Tensor, tmp_path: Path) -> None:
    source, network = build(), CRIS(**TINY).eval()
    optimizer = torch.optim.Adam(source.parameters())
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [35])
    content = {
        "epoch": 50,
        "cur_iou": np.float64(0.69),
        "best_iou": np.float64(0.7),
        "prec": {"Pr@50": np.float64(0.8)},
        "state_dict": nn.DataParallel(source).state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": schedule.state_dict(),
    }
    torch.save(content, tmp_path / "cris_best.pth")
    report = load_weights(network, tmp_path / "cris_best.pth")
    assert report.loaded == len(source.state_dict())
    assert torch.equal(network(image, tokens), source(image, tokens))


def test_clips_own_weights_fit() -> None:
    source, network = build().backbone, CRIS(**TINY).backbone
    assert isinstance(network, CLIPResNet)
    clip = {name: tensor.half() for name, tensor in source.state_dict().items() if ".connect." not in name}
    keys = network.load_state_dict({**clip, "context_length": torch.tensor(77)}, strict=False)
    assert keys.unexpected_keys == ["context_length"]
    assert {name.rpartition(".connect.")[0] for name in keys.missing_keys} == {"visual.attnpool"}
    for name, tensor in clip.items():
        assert torch.equal(network.state_dict()[name], tensor.to(network.state_dict()[name].dtype))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 3, 64, 96), "multiples of 32, got 64 x 96"),
        ((2, 3, 48, 48), "multiples of 32, got 48 x 48"),
        ((2, 3, 0, 0), "multiples of 32, got 0 x 0"),
        ((2, 2, 64, 64), r"expected images \(B, 1 or 3, S, S\), got \(2, 2, 64, 64\)"),
        ((2, 1, 64, 64, 64), "slice volumes"),
    ],
)
def test_an_image_that_does_not_fit(shape: tuple[int, ...], message: str, tokens: Tensor) -> None:
    with pytest.raises(ValueError, match=message):
        build()(torch.zeros(shape), tokens)


def test_tokens_that_do_not_fit(image: Tensor, tokens: Tensor, mask: Tensor) -> None:
    network = build()
    with pytest.raises(ValueError, match=r"expected tokens \(1 or 2, at most 77\), got \(3, 77\)"):
        network(image, tokens[:1].expand(3, -1))
    with pytest.raises(ValueError, match=r"at most 77\), got \(2, 78\)"):
        network(image, torch.cat([tokens, tokens[:, -1:]], 1))
    with pytest.raises(ValueError, match=r"as integers, got torch\.float32"):
        network(image, tokens.float())
    with pytest.raises(ValueError, match=r"shaped as the tokens \(2, 77\), got \(1, 77\)"):
        network(image, tokens, mask[:1])
    with pytest.raises(ValueError, match="got one that begins with 0"):
        network(image, tokens, mask.flip(1))
    with pytest.raises(ValueError, match="end token 49407 in every prompt"):
        network(image, tokens[:, :4])


def test_training_takes_more_than_one_image(image: Tensor, tokens: Tensor) -> None:
    network = build().train()
    with pytest.raises(ValueError, match="expected 2 images or more in training mode, got 1"):
        network(image[:1], tokens[:1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 7}, "expected an even width, got 7"),
        ({"depths": (3, 4, 6)}, r"4 stages, 1 or more each, got \(3, 4, 6\)"),
        ({"channels": 30}, "multiples of 4, for positions, and of 4 heads, got 30"),
        ({"num_heads": 5}, "of 5 heads, got 32"),
        ({"padding": "none"}, "one of after_end, published, got 'none'"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CRIS(**{**TINY, **settings})
