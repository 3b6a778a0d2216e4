"""SAN's CLIP is CLIP, its biases steer as a mask would, everything that should train does, and nothing else."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("transformers")

from transformers import CLIPConfig, CLIPModel

from medrobust.networks.san import MEAN, SAN, STD, vit_b16

EOT = 49407
POSITIONS = "clip.vision_model.embeddings.position_embedding.weight"
TINY: dict[str, Any] = {
    "text_config": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
    "vision_config": {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "patch_size": 8,
        "image_size": 32,
    },
    "projection_dim": 32,
    "logit_scale_init_value": 4.6052,
}
SMALL: dict[str, Any] = {
    "queries": 6,
    "channels": 24,
    "num_heads": 3,
    "blocks": 4,
    "patch_size": 8,
    "image_size": 64,
    "clip_layers": (0, 1, 3),
    "decoder_channels": 16,
}


def build(base: Any = TINY, **settings: Any) -> SAN:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = SAN(base, **{**SMALL, **settings}).eval()
    with torch.no_grad():
        # A fresh network's queries look alike and count alike, so that no prompt would change anything.
        network.side.query.mul_(50.0)
        network.decoder.rescale.weight.fill_(30.0)
    return network


@pytest.fixture
def network() -> SAN:
    return build()


@pytest.fixture
def image() -> Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def tokens() -> Tensor:
    return torch.tensor([[49406, 637, 2442, 3360, EOT, EOT], [49406, 320, 2368, EOT, EOT, EOT]])


def halved(image: Tensor) -> Tensor:
    """What CLIP sees, by another way than the network's."""
    mean, std = torch.tensor(MEAN).view(-1, 1, 1), torch.tensor(STD).view(-1, 1, 1)
    return F.interpolate((image - mean) / std, scale_factor=0.5, mode="bilinear", align_corners=False)


def pixels(network: SAN, image: Tensor) -> Tensor:
    return (image - network.mean) / network.std


def count(parameters: Any) -> int:
    return sum(parameter.numel() for parameter in parameters)


def test_the_papers_size() -> None:
    # CLIP's released settings are older than its end token's number.
    base = CLIPConfig(vision_config={"patch_size": 16}, text_config={"eos_token_id": 2})
    with torch.device("meta"):
        network = SAN(base)
        logits = network(torch.zeros(1, 3, 640, 640), torch.zeros(1, 77, dtype=torch.int64))
    assert logits.shape == (1, 1, 640, 640)
    adapter = [parameter for name, parameter in network.named_parameters() if not name.startswith("clip.")]
    assert count(adapter) == 8_219_058
    assert count(network.decoder.of_patch_for_bias.parameters()) + 2 + count(network.side.fusions[3].parameters()) == (
        1_103_090
    )
    assert network.get_parameter(POSITIONS).numel() == 151_296
    assert count(parameter for parameter in network.parameters() if parameter.requires_grad) == 8_370_354
    assert count(network.clip.parameters()) == 149_620_737
    with torch.device("meta"):
        assert count(CLIPModel(vit_b16()).parameters()) == 149_620_737


def test_gradients_reach_pixels_and_all_that_trains(network: SAN, image: Tensor, tokens: Tensor) -> None:
    image.requires_grad_(True)
    weight = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(2))
    (network(image, tokens) * weight).sum().backward()
    assert image.grad is not None
    assert (image.grad != 0).all()
    for name, parameter in network.named_parameters():
        trains = name == POSITIONS or not name.startswith("clip.")
        assert parameter.requires_grad == trains, name
        if trains:
            assert parameter.grad is not None, name
            # A weight before a ReLU may be idle; a whole tensor may not.
            assert parameter.grad.norm() > 1e-9, name
        else:
            assert parameter.grad is None, name
    assert (network.get_parameter(POSITIONS).grad.norm(dim=1) > 0).all()


def test_pixels_get_gradients_through_clip_too(network: SAN, image: Tensor, tokens: Tensor) -> None:
    with torch.no_grad():
        network.side.patch_embedding.weight.zero_()
        for fusion in network.side.fusions:
            fusion.linear.weight.zero_()
    image.requires_grad_(True)
    # The side network is blind now; the image reaches the scores alone, and these the mask.
    (gradient,) = torch.autograd.grad(network(image, tokens).square().sum(), image)
    assert (gradient != 0).all()


def test_training_changes_all_that_trains_and_nothing_else(network: SAN, image: Tensor, tokens: Tensor) -> None:
    before = copy.deepcopy(network.state_dict())
    network.train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        network(image, tokens).square().mean().backward()
        optimizer.step()
    changed = {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if name == POSITIONS or not name.startswith("clip.")}


def test_a_prompt_chooses_its_region(image: Tensor, tokens: Tensor) -> None:
    network = build().train()
    label = torch.zeros(2, 1, 64, 64)
    label[0, :, 8:32, 8:32] = label[1, :, 32:56, 24:56] = 1
    same = image[:1].expand(2, -1, -1, -1)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        logits = network(same, tokens)
        F.binary_cross_entropy_with_logits(logits, label).backward()
        optimizer.step()
    pred = (network.eval()(same, tokens) > 0).float()
    dice = 2 * (pred * label).sum((1, 2, 3)) / (pred + label).sum((1, 2, 3))
    assert (dice > 0.9).all(), dice


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("size", [64, 96])
def test_without_biases_the_copies_are_clips_class_token(size: int, attention: Any) -> None:
    network = build(attention=attention)
    image = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    states = network.clip_states(pixels(network, image))
    patches = (size // 16) ** 2
    vision: Any = network.clip.vision_model(halved(image), interpolate_pos_encoding=True, output_hidden_states=True)
    assert len(states) == 4
    for state, expected in zip(states, vision.hidden_states, strict=False):
        assert state.shape == (2, 1 + patches, 48)
        torch.testing.assert_close(state, expected, atol=1e-5, rtol=0)
    found = network.recognise(states[-1], torch.zeros(2, 4, 6, size // 8, size // 8))
    expected = network.clip.get_image_features(halved(image), interpolate_pos_encoding=True).pooler_output
    torch.testing.assert_close(found, expected[:, None].expand(-1, 6, -1), atol=1e-5, rtol=0)


def test_biases_steer_as_an_attention_mask_on_one_sequence(image: Tensor) -> None:
    network = build(attention="eager")
    state = network.clip_states(pixels(network, image))[-1]
    biases = 2 * torch.randn(2, 4, 6, 8, 8, generator=torch.Generator().manual_seed(2))
    # CLIP has four patches a side here, so each takes the largest of two by two biases.
    pooled = biases.view(2, 4, 6, 4, 2, 4, 2).amax((4, 6)).flatten(3)
    mask = torch.zeros(2, 4, 6 + 17, 6 + 17)
    mask[..., :7] = float("-inf")
    mask[..., range(6), range(6)] = 0
    mask[..., 6:, 6] = 0
    mask[..., :6, 7:] = pooled
    tokens = torch.cat([state[:, :1].expand(-1, 6, -1), state], dim=1)
    for layer in network.clip.vision_model.encoder.layers[3:]:
        tokens = layer(tokens, mask)
    expected = network.clip.visual_projection(network.clip.vision_model.post_layernorm(tokens[:, :6]))
    found = network.recognise(state, biases)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (found[:, 0] - found[:, 1]).abs().max() > 1e-2


def test_a_bias_to_one_patch_shows_only_it(network: SAN, image: Tensor) -> None:
    state = network.clip_states(pixels(network, image))[-1]
    biases = torch.zeros(2, 4, 2, 8, 8)
    biases[:, :, 0, 2, 4], biases[:, :, 1, 7, 1] = 200.0, 200.0
    layer = network.clip.vision_model.encoder.layers[3]
    seen = []
    layer.self_attn.out_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    network.recognise(state, biases)
    values = layer.self_attn.v_proj(layer.layer_norm1(state[:, 1:]))
    torch.testing.assert_close(seen[0], values[:, [1 * 4 + 2, 3 * 4 + 0]])


def test_states_enter_the_blocks_in_order(network: SAN, image: Tensor, tokens: Tensor) -> None:
    states = network.clip_states(pixels(network, image))
    read: list[Tensor] = []
    entering: list[Tensor] = []
    for fusion in network.side.fusions:
        fusion.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    for block in network.side.blocks:
        block.register_forward_pre_hook(lambda module, args: entering.append(args[0]))
    network(image, tokens)
    for found, layer in zip(read, (0, 1, 3), strict=True):
        assert torch.equal(found, states[layer][:, 1:])
    for number, fusion in enumerate(network.side.fusions):
        before = list(entering)
        entering.clear()
        with torch.no_grad():
            fusion.linear.bias.add_(1.0)
        network(image, tokens)
        after = entering
        assert all(torch.equal(old, new) for old, new in zip(before[:number], after[:number], strict=True))
        torch.testing.assert_close(after[number][:, :6], before[number][:, :6])
        torch.testing.assert_close(after[number][:, 6:], before[number][:, 6:] + 1.0)


@pytest.mark.parametrize("size", [64, 96])
def test_tokens_keep_their_places(size: int, network: SAN) -> None:
    with torch.no_grad():
        for block in network.side.blocks:
            for last in (block.self_attn.out_proj, block.linear2):
                last.weight.zero_()
                last.bias.zero_()
    # The blocks add nothing now, so what goes in is what comes out.
    generator = torch.Generator().manual_seed(4)
    image = torch.rand(2, 3, size, size, generator=generator)
    states = torch.randn(3, 2, 48, size // 16, size // 16, generator=generator)
    queries, patches = network.side(image, list(states.flatten(3).mT))
    torch.testing.assert_close(queries, (network.side.query + 4 * network.side.query_position).expand(2, -1, -1))
    position = F.interpolate(network.side.position, size // 8, mode="bicubic")
    expected = network.side.patch_embedding(image) + 4 * position
    for fusion, state in zip(network.side.fusions, states, strict=True):
        normal = (state - state.mean(1, keepdim=True)) / (state.var(1, keepdim=True, correction=0) + 1e-6).sqrt()
        expected = expected + F.interpolate(
            F.conv2d(normal, fusion.linear.weight[:, :, None, None]), scale_factor=2, mode="bilinear"
        )
    torch.testing.assert_close(patches, expected, atol=1e-5, rtol=1e-5)


def test_the_decoders_products(network: SAN) -> None:
    generator = torch.Generator().manual_seed(3)
    queries, patches = torch.randn(2, 6, 24, generator=generator), torch.randn(2, 24, 8, 8, generator=generator)
    proposals, biases = network.decoder(queries, patches)
    assert proposals.shape == (2, 6, 8, 8)
    assert biases.shape == (2, 4, 6, 8, 8)
    decoder, patch = network.decoder, patches[1, :, 3, 5]
    query = decoder.of_query(queries[1, 4])
    torch.testing.assert_close(proposals[1, 4, 3, 5], query @ decoder.of_patch(patch))
    # The third of four heads has the third quarter of the channels.
    product = query @ decoder.of_patch_for_bias(patch)[32:48]
    torch.testing.assert_close(biases[1, 2, 4, 3, 5], decoder.rescale(product[None])[0])


def test_the_mask_is_a_mean_weighted_by_agreement(network: SAN, image: Tensor, tokens: Tensor) -> None:
    states = network.clip_states(pixels(network, image))
    proposals, biases = network.decoder(*network.side(pixels(network, image), [states[k][:, 1:] for k in (0, 1, 3)]))
    regions = network.recognise(states[-1], biases)
    text = network.clip.get_text_features(tokens).pooler_output
    expected = torch.zeros(2, 1, 64, 64)
    for case in range(2):
        agreement = network.clip.logit_scale.exp() * F.cosine_similarity(regions[case], text[case, None])
        large = F.interpolate(proposals[case, :, None], scale_factor=8, mode="bilinear")
        for weight, mask in zip(agreement.softmax(0), large, strict=True):
            expected[case] += weight * mask
    torch.testing.assert_close(network(image, tokens), expected, atol=1e-5, rtol=1e-5)


def test_agreement_is_a_scaled_cosine(network: SAN) -> None:
    with torch.no_grad():
        network.clip.logit_scale.fill_(torch.tensor(10.0).log())
    regions = torch.tensor([[[3.0, 4.0], [0.0, -2.0]]])
    found = network.class_logits(regions, torch.tensor([[5.0, 0.0]]))
    torch.testing.assert_close(found, torch.tensor([[6.0, 0.0]]))


def test_cases_do_not_see_each_other(network: SAN, image: Tensor, tokens: Tensor) -> None:
    both = network(image, tokens)
    for case in (0, 1):
        alone = network(image[case : case + 1], tokens[case : case + 1])
        torch.testing.assert_close(both[case : case + 1], alone, atol=1e-6, rtol=1e-5)
    assert (both[0] - both[1]).abs().max() > 1e-3


def test_one_prompt_serves_all_images_and_another_gives_another_mask(
    network: SAN, image: Tensor, tokens: Tensor
) -> None:
    one = network(image, tokens[:1])
    torch.testing.assert_close(one, network(image, tokens[:1].expand(2, -1)))
    other = network(image, tokens[1:])
    assert ((one - other).abs().amax((1, 2, 3)) > 1e-4).all()


def test_padding_changes_nothing(network: SAN, image: Tensor, tokens: Tensor) -> None:
    expected = network(image, tokens)
    mask = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0]])
    torch.testing.assert_close(network(image, tokens, mask), expected)
    after = tokens.clone()
    after[0, 5:], after[1, 4:] = 1237, 99
    torch.testing.assert_close(network(image, after), expected)


def test_the_old_end_token_is_the_largest(network: SAN, image: Tensor, tokens: Tensor) -> None:
    expected = network(image, tokens)
    network.clip.config.text_config.eos_token_id = network.clip.text_model.eos_token_id = 2
    assert torch.equal(network(image, tokens), expected)


def test_one_channel_is_three_equal_ones(network: SAN, image: Tensor, tokens: Tensor) -> None:
    grey = image[:, :1]
    assert torch.equal(network(grey, tokens), network(grey.expand(-1, 3, -1, -1), tokens))


def test_images_are_normalised_inside(network: SAN, image: Tensor, tokens: Tensor) -> None:
    plain = build(mean=(0, 0, 0), std=(1, 1, 1))
    torch.testing.assert_close(network(image, tokens), plain(pixels(network, image), tokens))


def test_without_gradients_the_logits_are_the_same(network: SAN, image: Tensor, tokens: Tensor) -> None:
    # PyTorch's encoder layers then take another path.
    expected = network(image, tokens)
    with torch.no_grad():
        torch.testing.assert_close(network(image, tokens), expected, atol=1e-5, rtol=1e-5)


def test_other_sizes(network: SAN, tokens: Tensor) -> None:
    assert network.unit == 16
    # Constant positions stay what they are at any size, and constant images are then the same anywhere.
    with torch.no_grad():
        network.side.position.fill_(0.1)
        network.clip.vision_model.embeddings.position_embedding.weight[1:] = 0.2
    for size in (48, 64, 80):
        logits = network(torch.full((2, 3, size, size), 0.3), tokens)
        assert logits.shape == (2, 1, size, size)
        torch.testing.assert_close(logits, logits[..., :1, :1].expand_as(logits), atol=1e-5, rtol=1e-5)


def test_a_model_as_base_is_used_itself(image: Tensor, tokens: Tensor) -> None:
    source = build()
    base = CLIPModel(CLIPConfig(**TINY)).eval()
    base.load_state_dict(source.clip.state_dict())
    network = build(base)
    assert network.clip is base
    network.load_state_dict(source.state_dict())
    assert torch.equal(network(image, tokens), source(image, tokens))
    of_config = build(CLIPConfig(**TINY))
    torch.testing.assert_close(of_config(image, tokens), source(image, tokens))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 3, 64, 48), "multiples of 16, got 64 x 48"),
        ((2, 3, 72, 72), "multiples of 16, got 72 x 72"),
        ((2, 3, 0, 0), "multiples of 16, got 0 x 0"),
        ((2, 2, 64, 64), r"expected images \(B, 1 or 3, S, S\), got \(2, 2, 64, 64\)"),
        ((2, 1, 64, 64, 64), "slice volumes"),
    ],
)
def test_an_image_that_does_not_fit(shape: tuple[int, ...], message: str, network: SAN, tokens: Tensor) -> None:
    with pytest.raises(ValueError, match=message):
        network(torch.zeros(shape), tokens)


def test_tokens_that_do_not_fit(network: SAN, image: Tensor, tokens: Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected tokens \(1 or 2, at most 77\), got \(3, 6\)"):
        network(image, tokens[:1].expand(3, -1))
    with pytest.raises(ValueError, match=r"at most 77\), got \(2, 78\)"):
        network(image, tokens[:, -1:].expand(-1, 78))
    with pytest.raises(ValueError, match=r"as integers, got torch\.float32"):
        network(image, tokens.float())
    with pytest.raises(ValueError, match=r"shaped as the tokens \(2, 6\), got \(1, 6\)"):
        network(image, tokens, torch.ones(1, 6, dtype=torch.int64))
    with pytest.raises(ValueError, match="end token 49407 in every prompt"):
        network(image, tokens[:, :4])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clip_layers": (0, 5)}, r"less than CLIP's 5 layers.*got \(0, 5\)"),
        ({"clip_layers": (3, 1)}, r"that rise .* got \(3, 1\)"),
        ({"clip_layers": (-1, 1)}, r"from 0 or more .* got \(-1, 1\)"),
        ({"clip_layers": ()}, r"got \(\)"),
        ({"blocks": 2}, r"one for each of 2 blocks, got \(0, 1, 3\)"),
        ({"num_heads": 5}, "channels that 5 heads divide, got 24"),
        ({"image_size": 60}, "multiples of patch_size 8, got 60"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**settings)
