"""CLIPSeg and its adapters give the authors' numbers, pass gradients on to pixels, and leave the base alone."""

from __future__ import annotations

import copy
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.losses import DiceCELoss
from torch import Tensor

pytest.importorskip("transformers")

from transformers import CLIPSegConfig, CLIPSegForImageSegmentation

from medrobust.networks.adapters import Adapter, DenseCLIPSeg, LoRACLIPSeg, ShallowCLIPSeg
from medrobust.networks.clipseg import CLIPSeg, rd64

EOT = 49407
TINY: dict[str, Any] = {
    "text_config": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    },
    "vision_config": {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "patch_size": 16,
        "image_size": 64,
    },
    "projection_dim": 32,
    "extract_layers": [1, 2, 3],
    "reduce_dim": 16,
    "decoder_num_attention_heads": 4,
    "decoder_intermediate_size": 32,
    "use_complex_transposed_convolution": True,
}

# What the authors' own modules give. Logits: their sum, their absolute sum, and three of them.
LOGITS = {
    "plain": (-62.374413, 82.960007, -0.00280436, -0.00752733, -0.00911045),
    "dense v": (-62.382507, 84.049530, -0.00283462, -0.00765062, -0.00911235),
    "dense vl": (-62.382832, 84.079117, -0.00283786, -0.00765025, -0.00911751),
    "dense vlc": (-62.341862, 78.801117, -0.00275419, -0.00707799, -0.00913433),
    "shallow v": (-62.379551, 83.805199, -0.00280536, -0.00760087, -0.00913836),
    "shallow vl": (-62.566967, 135.643448, -0.00768491, -0.00764965, -0.01235420),
    "shallow vlc": (-62.560581, 133.526550, -0.00732135, -0.00764090, -0.01224196),
}
# Trainable parameters, L1 of their gradients, L1 of the image's, loss, loss after five steps of PGD.
GRADIENTS = {
    "dense v": (4944, 3.05172e-4, 0.0415095, 1.6053718, 1.6055902),
    "dense vl": (8256, 1.02489e-3, 0.0422202, 1.6053724, 1.6055896),
    "dense vlc": (24928, 2.13718e-2, 0.0418862, 1.6053663, 1.6055872),
    "shallow v": (7128, 3.22177e-3, 0.0409375, 1.6053708, 1.6055896),
    "shallow vl": (11904, 8.49989e-3, 0.0487483, 1.6053519, 1.6056027),
    "shallow vlc": (28576, 2.48071e-2, 0.0488589, 1.6053576, 1.6056061),
}
ADAPTED = (*GRADIENTS, "lora")


def build(kind: str, **settings: Any) -> Any:
    """A tiny network with the filled weights of the golden numbers; LoRA and identity adapters keep their start."""
    name, _, variant = kind.partition(" ")
    settings = {"mean": (0, 0, 0), "std": (1, 1, 1), "attention": "eager", **settings}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name == "plain":
            network: CLIPSeg = CLIPSeg(TINY, **settings)
        elif name == "dense":
            network = DenseCLIPSeg(TINY, variant, bottleneck=8, **settings)
        elif name == "shallow":
            network = ShallowCLIPSeg(TINY, variant, bottleneck=24, **settings)
        else:
            network = LoRACLIPSeg(TINY, rank=4, **settings)
    fill(network, base_only=name == "lora" or bool(settings.get("identity")))
    return network.eval()


@torch.no_grad()
def fill(network: CLIPSeg, *, base_only: bool) -> None:
    for name, parameter in network.named_parameters():
        if parameter.ndim == 0 or (base_only and not name.startswith("clipseg.")):
            continue
        name = name.removeprefix("clipseg.")
        phase = zlib.crc32(name.encode()) % 997
        wave = torch.sin(0.37 * torch.arange(parameter.numel(), dtype=torch.float64) + phase).view_as(parameter)
        if "norm" in name and name.endswith("weight"):
            parameter.copy_(1 + 0.02 * wave)
        else:
            parameter.copy_((0.02 if parameter.ndim == 1 else 0.08) * wave)


def prompts(*rows: list[int]) -> Tensor:
    return torch.tensor([[49406, *row] + [EOT] * (76 - len(row)) for row in rows])


@pytest.fixture
def image() -> Tensor:
    return torch.sin(0.011 * torch.arange(2 * 3 * 64 * 64, dtype=torch.float64)).view(2, 3, 64, 64).float()


@pytest.fixture
def tokens() -> Tensor:
    return prompts([637, 2442, 3360, 6833, 335], [320, 2368])


@pytest.fixture
def mask() -> Tensor:
    return (torch.arange(77) < torch.tensor([[7], [4]])).long()


def trainable(network: CLIPSeg) -> int:
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("kind", LOGITS)
def test_the_authors_logits(kind: str, image: Tensor, tokens: Tensor, mask: Tensor) -> None:
    logits = build(kind)(image, tokens, mask)
    assert logits.shape == (2, 1, 64, 64)
    found = [logits.sum(), logits.abs().sum(), logits[0, 0, 0, 0], logits[0, 0, 31, 17], logits[1, 0, 63, 63]]
    assert [value.item() for value in found] == pytest.approx(LOGITS[kind], rel=2e-5)


@pytest.mark.parametrize("kind", GRADIENTS)
def test_the_authors_gradients_and_attack(kind: str, image: Tensor, tokens: Tensor, mask: Tensor) -> None:
    network = build(kind)
    count, adapters_l1, image_l1, clean, attacked = GRADIENTS[kind]
    label = (image[:, :1] > 0.3).float()
    criterion = DiceCELoss(lambda_dice=1.5, lambda_ce=1.0)

    def loss_of(x: Tensor) -> Tensor:
        # The authors' loss takes a sigmoid twice.
        return criterion(network(x, tokens, mask).sigmoid(), label)

    x = image.clone().requires_grad_()
    loss = loss_of(x)
    loss.backward()
    adapters = list(network.adapter_parameters())
    assert trainable(network) == sum(parameter.numel() for parameter in adapters) == count
    assert loss.item() == pytest.approx(clean, rel=1e-5)
    assert sum(parameter.grad.abs().sum().item() for parameter in adapters) == pytest.approx(adapters_l1, rel=1e-4)
    assert x.grad.abs().sum().item() == pytest.approx(image_l1, rel=1e-4)
    adv = image
    for _ in range(5):
        x = adv.clone().requires_grad_()
        (grad,) = torch.autograd.grad(loss_of(x), x)
        adv = image + (adv + 2 / 255 * grad.sign() - image).clamp(-0.03, 0.03)
    # The whole attack moves the loss by 1.4e-4 of itself only, so the gain is held to 1 % too.
    after = loss_of(adv).item()
    assert after == pytest.approx(attacked, rel=1e-5)
    assert after - loss.item() == pytest.approx(attacked - clean, rel=1e-2)


def test_the_published_counts() -> None:
    counts = {"v": 1_784_448, "vl": 2_974_464, "vlc": 3_237_376, "l": 1_190_016, "c": 262_912}
    shallow = {"v": 2_363_136, "vl": 3_939_072, "vlc": 4_201_984, "l": 1_575_936, "c": 262_912}
    with torch.device("meta"):
        base = CLIPSegForImageSegmentation(rd64())
        plain = CLIPSeg(base)
        assert sum(parameter.numel() for parameter in plain.parameters()) == 150_747_746
        assert trainable(plain) == 1_127_009
        assert {variant: trainable(DenseCLIPSeg(base, variant)) for variant in counts} == counts
        assert {variant: trainable(ShallowCLIPSeg(base, variant)) for variant in shallow} == shallow
        assert trainable(LoRACLIPSeg(base)) == 442_368


def test_the_same_as_transformers_forward(image: Tensor, tokens: Tensor) -> None:
    network = build("plain", attention="sdpa")
    for size in (64, 96):
        x = torch.nn.functional.interpolate(image, (size, size))
        theirs = network.clipseg(input_ids=tokens, pixel_values=x).logits
        torch.testing.assert_close(network(x, tokens)[:, 0], theirs)


def test_pixels_are_normalised_inside_and_grey_is_three_channels(image: Tensor, tokens: Tensor) -> None:
    plain, network = build("plain"), build("plain", mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    grey = image[:, :1].abs()
    mean, std = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), torch.tensor([0.5, 0.6, 0.7]).view(3, 1, 1)
    torch.testing.assert_close(network(grey, tokens), plain((grey.expand(-1, 3, -1, -1) - mean) / std, tokens))
    assert network.state_dict().keys() == plain.state_dict().keys()
    assert all(name.startswith("clipseg.") for name in plain.state_dict())


@pytest.mark.parametrize("kind", ["plain", "dense vlc", "shallow vlc", "lora"])
def test_in_mode_all_everything_that_trains_gets_a_gradient(kind: str, image: Tensor, tokens: Tensor) -> None:
    network = build(kind, trainable="all")
    # The wave of the golden weights has rows that no ReLU passes; a gradient must not hang on that.
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    x = image.clone().requires_grad_()
    network(x, tokens).square().sum().backward()
    assert x.grad.count_nonzero() > 0.99 * x.numel()
    names = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    silent = {name for name in names if network.get_parameter(name).grad is None}
    silent |= {name for name in names - silent if not network.get_parameter(name).grad.any()}
    assert silent == set()
    for tower in ("vision_model", "text_model"):
        assert f"clipseg.clip.{tower}.encoder.layers.0.self_attn.q_proj.weight" in names
    assert not any("vision_model.encoder.layers.4" in name for name in names)


def test_mode_decoder_trains_the_decoder() -> None:
    network = build("dense v", trainable="decoder")
    names = {
        name.split(".")[0 if "adapters" in name else 1] for name, p in network.named_parameters() if p.requires_grad
    }
    assert names == {"v_attn_adapters", "v_out_adapters", "decoder"}
    network.set_trainable("adapters")
    assert trainable(network) == 4944


@pytest.mark.parametrize("kind", ADAPTED)
def test_training_adapters_leaves_the_base_bit_equal(kind: str, image: Tensor, tokens: Tensor) -> None:
    network = build(kind).train()
    before = copy.deepcopy(network.state_dict())
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.1)
    losses = []
    for _ in range(3):
        loss = (network(image, tokens) - 0.1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    changed = {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == network.adapter_state_dict().keys()


@pytest.mark.parametrize("kind", ["dense vlc", "shallow vlc"])
def test_identity_adapters_start_as_plain_clipseg_and_learn(kind: str, image: Tensor, tokens: Tensor) -> None:
    network = build(kind, identity=True)
    assert torch.equal(network(image, tokens), build("plain")(image, tokens))
    optimizer = torch.optim.SGD(network.adapter_parameters(), lr=0.1)
    network(image, tokens).square().sum().backward()
    blocks = [module for module in network.modules() if isinstance(module, Adapter)]
    assert all(block.fc2.weight.grad.any() and block.fc2.bias.grad.any() for block in blocks)
    optimizer.step()
    optimizer.zero_grad()
    network(image, tokens).square().sum().backward()
    assert all(parameter.grad.any() for parameter in network.adapter_parameters())


def test_lora_starts_as_plain_clipseg(image: Tensor, tokens: Tensor) -> None:
    assert torch.equal(build("lora")(image, tokens), build("plain")(image, tokens))


def test_the_adapters_formula() -> None:
    adapter = Adapter(2, 1)
    with torch.no_grad():
        adapter.fc1.weight.copy_(torch.tensor([[1.0, 2.0]]))
        adapter.fc1.bias.fill_(-1.0)
        adapter.fc2.weight.copy_(torch.tensor([[3.0], [-3.0]]))
        adapter.fc2.bias.fill_(0.5)
    # Hidden: 1 + 4 - 1 = 4, and 0 for the second row; outer: 12.5 and -11.5, cut off, and 0.5 twice.
    out = adapter(torch.tensor([[1.0, 2.0], [-1.0, 0.0]]))
    assert out.tolist() == [[13.5, 2.0], [-0.5, 0.5]]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["plain", "dense vlc", "shallow vlc", "lora"])
def test_no_token_sees_what_follows(kind: str, attention: str, tokens: Tensor, mask: Tensor) -> None:
    network = build(kind, attention=attention)
    after, before = tokens.clone(), tokens.clone()
    after[0, 7:], after[1, 4:] = 1237, 99
    before[:, 2] = 1237
    expected = network.condition(tokens, None)
    torch.testing.assert_close(network.condition(after, None), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(network.condition(tokens, mask), expected, atol=1e-6, rtol=0)
    assert (network.condition(before, None) - expected).abs().amax(1).min() > 1e-3


@pytest.mark.parametrize("kind", ["plain", "shallow vlc"])
def test_the_old_end_token_is_the_largest(kind: str, image: Tensor, tokens: Tensor) -> None:
    network = build(kind)
    expected = network(image, tokens)
    network.config.text_config.eos_token_id = network.clipseg.clip.text_model.eos_token_id = 2
    assert torch.equal(network(image, tokens), expected)


@pytest.mark.parametrize("kind", ["plain", "dense vlc", "shallow vlc", "lora"])
def test_one_prompt_serves_all_images(kind: str, image: Tensor, tokens: Tensor, mask: Tensor) -> None:
    network = build(kind)
    one = network(image, tokens[:1], mask[:1])
    torch.testing.assert_close(one, network(image, tokens[:1].expand(2, -1), mask[:1].expand(2, -1)))
    torch.testing.assert_close(one[1:], network(image[1:], tokens[:1]))


@pytest.mark.parametrize("kind", ADAPTED)
def test_a_copy_has_adapters_of_its_own(kind: str, image: Tensor, tokens: Tensor) -> None:
    network = build(kind)
    expected = network(image, tokens)
    other = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in other.adapter_parameters():
            parameter.add_(1.0)
    assert torch.equal(network(image, tokens), expected)
    assert not torch.allclose(other(image, tokens), expected)


@pytest.mark.parametrize("kind", ADAPTED)
def test_adapters_come_back_from_their_file(kind: str, image: Tensor, tokens: Tensor, tmp_path: Path) -> None:
    network, other = build(kind), build(kind)
    with torch.no_grad():
        for parameter in network.adapter_parameters():
            parameter.add_(0.1)
    network.save_adapters(tmp_path / "adapters.safetensors")
    assert not torch.allclose(other(image, tokens), network(image, tokens))
    other.load_adapters(tmp_path / "adapters.safetensors")
    assert torch.equal(other(image, tokens), network(image, tokens))
    count = sum(parameter.numel() for parameter in network.adapter_parameters())
    assert (tmp_path / "adapters.safetensors").stat().st_size < 4 * count + 20_000


def test_adapters_of_another_network_are_refused(tmp_path: Path) -> None:
    network, path = build("dense v"), tmp_path / "adapters.safetensors"
    network.save_adapters(path)
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(ValueError, match=r"variant vl, got .* variant v in adapters"):
        build("dense vl").load_adapters(path)
    with pytest.raises(ValueError, match=r"network ShallowCLIPSeg.*got .* network DenseCLIPSeg"):
        build("shallow v").load_adapters(path)
    wide = DenseCLIPSeg({**TINY, "vision_config": {**TINY["vision_config"], "hidden_size": 64}}, "v", bottleneck=8)
    wide.save_adapters(path)
    with pytest.raises(ValueError, match=r"18 tensors.*fc1.weight \(8, 64\) for \(8, 48\)"):
        network.load_adapters(path)
    path.write_bytes(b"no tensors at all")
    with pytest.raises(ValueError, match="expected a safetensors file"):
        network.load_adapters(path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        network.load_adapters(tmp_path / "none.safetensors")
    network.set_trainable("decoder")
    with pytest.raises(ValueError, match="save state_dict"):
        network.save_adapters(path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_a_local_base(image: Tensor, tokens: Tensor, tmp_path: Path) -> None:
    source = build("plain")
    source.clipseg.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    network = DenseCLIPSeg.from_pretrained(
        str(tmp_path), variant="v", bottleneck=8, identity=True, mean=(0, 0, 0), std=(1, 1, 1), attention="eager"
    ).eval()
    assert torch.equal(network(image, tokens), source(image, tokens))
    assert trainable(network) == 4944


def test_a_wrong_base_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected a folder with config\.json"):
        CLIPSeg.from_pretrained(str(tmp_path / "nowhere"))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match=r"expected a CLIPSeg checkpoint, got .* 'bert'"):
        CLIPSeg.from_pretrained(str(tmp_path))
    network = CLIPSegForImageSegmentation(CLIPSegConfig(**TINY))
    state = {name: tensor for name, tensor in network.state_dict().items() if "film_mul" not in name}
    network.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"got none for 2 tensors \(such as decoder\.film_mul\.bias\)"):
        CLIPSeg.from_pretrained(str(tmp_path))
    CLIPSegConfig(**{**TINY, "reduce_dim": 32}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"weights in .* that fit its config\.json"):
        CLIPSeg.from_pretrained(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(ValueError, match="or a file cut short"):
        CLIPSeg.from_pretrained(str(tmp_path))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 3, 64, 48), "multiples of 16, got 64 x 48"),
        ((2, 3, 60, 60), "multiples of 16, got 60 x 60"),
        ((2, 2, 64, 64), r"expected images \(B, 1 or 3, S, S\), got \(2, 2, 64, 64\)"),
        ((2, 1, 64, 64, 64), "slice volumes"),
    ],
)
def test_an_image_that_does_not_fit(shape: tuple[int, ...], message: str, tokens: Tensor) -> None:
    with pytest.raises(ValueError, match=message):
        build("plain")(torch.zeros(shape), tokens)


def test_tokens_that_do_not_fit(image: Tensor, tokens: Tensor, mask: Tensor) -> None:
    network = build("plain")
    with pytest.raises(ValueError, match=r"expected tokens \(1 or 2, at most 77\), got \(3, 77\)"):
        network(image, tokens[:1].expand(3, -1))
    with pytest.raises(ValueError, match=r"at most 77\), got \(2, 78\)"):
        network(image, torch.cat([tokens, tokens[:, -1:]], 1))
    with pytest.raises(ValueError, match=r"as integers, got torch\.float32"):
        network(image, tokens.float())
    with pytest.raises(ValueError, match=r"shaped as the tokens \(2, 77\), got \(1, 77\)"):
        network(image, tokens, mask[:1])
    with pytest.raises(ValueError, match="end token 49407 in every prompt"):
        network(image, tokens[:, :4])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CLIPSeg(TINY, trainable="adapters"), "CLIPSeg without adapters"),
        (lambda: CLIPSeg(TINY, trainable="both"), "one of adapters, decoder, all, got 'both'"),
        (lambda: DenseCLIPSeg(TINY, "cv"), "one of v, l, c, vl, vlc, got 'cv'"),
        (lambda: CLIPSeg({**TINY, "extract_layers": [1, 2, 5]}), "below the 5 vision layers"),
        (
            lambda: DenseCLIPSeg({**TINY, "text_config": {**TINY["text_config"], "num_hidden_layers": 2}}),
            "3 text layers",
        ),
        (lambda: ShallowCLIPSeg({**TINY, "projection_dim": 16}), "text tower of width 16"),
        (
            lambda: CLIPSeg({**TINY, "vision_config": {**TINY["vision_config"], "patch_size": 32}}),
            "expected patch_size 16 .* got 32",
        ),
    ],
)
def test_settings_that_do_not_fit(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
