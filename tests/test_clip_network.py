"""CLIP's zero-shot head: its numbers are transformers', OpenAI's layout is read, texts are encoded once."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel

from medrobust.attacks import PGD, CrossEntropy
from medrobust.networks.clip_zero_shot import MEAN, STD, ZeroShotCLIP

END = 99
TEXT = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT |= {"vocab_size": END + 1, "max_position_embeddings": 9, "eos_token_id": END, "projection_dim": 10}
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
VISION |= {"patch_size": 8, "image_size": 16, "projection_dim": 10}
TINY: dict[str, Any] = {"text_config": TEXT, "vision_config": VISION, "projection_dim": 10}
BLOCK = 4 * (16 * 16 + 16) + 16 * 24 + 24 + 24 * 16 + 16 + 4 * 16
VISUAL = 16 + 3 * 8 * 8 * 16 + 5 * 16 + 2 * 16 + 3 * BLOCK + 2 * 16
"""Parameters of a vision layer, and of the tower: class, patches, positions, two norms, three layers."""


def texts(count: int, seed: int = 0) -> Tensor:
    """Tokens (count, 9): start, words, end, and padding that differs."""
    ids = torch.randint(1, END, (count, 9), generator=torch.Generator().manual_seed(seed))
    ids[:, 5] = END
    return ids


def pictures(count: int = 3, seed: int = 1) -> Tensor:
    return torch.rand((count, 3, 16, 16), generator=torch.Generator().manual_seed(seed))


def make(prompts: Tensor | None = None, **settings: Any) -> ZeroShotCLIP:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ZeroShotCLIP(TINY, texts(8).view(4, 2, 9) if prompts is None else prompts, **settings).eval()


def normalised(image: Tensor) -> Tensor:
    return (image - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def test_captions_have_the_logits_of_transformers() -> None:
    network, ids = make(), texts(5, seed=3)
    with torch.no_grad():
        expected = network.clip(input_ids=ids, pixel_values=normalised(pictures())).logits_per_image
        torch.testing.assert_close(network(pictures(), ids), expected[..., None, None], rtol=1e-5, atol=1e-5)


def test_a_class_is_the_mean_of_its_unit_text_embeddings() -> None:
    network = make()
    with torch.no_grad():
        means = []
        for prompts in texts(8).view(4, 2, 9):
            each = [network.clip.get_text_features(one[None]).pooler_output[0] for one in prompts]
            means.append(sum(one / one.norm() for one in each) / 2)
        embedding = network.clip.get_image_features(normalised(pictures())).pooler_output
        cosines = torch.stack([F.cosine_similarity(embedding, mean[None]) for mean in means], 1)
        expected = network.clip.logit_scale.exp() * cosines
        torch.testing.assert_close(network.class_logits(pictures()), expected, rtol=1e-5, atol=1e-5)
        assert network(pictures()).shape == (3, 4, 1, 1)


def test_the_shift_is_that_of_the_embedding_before_scaling() -> None:
    network, reference = make(), torch.randn((3, 10, 1, 1), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = network.clip.get_image_features(normalised(pictures())).pooler_output - reference.flatten(1)
        shift = network(pictures(), reference=reference)
    torch.testing.assert_close(shift, expected[..., None, None], rtol=1e-5, atol=1e-6)


def test_one_channel_stands_for_three_equal_ones() -> None:
    grey = pictures()[:, :1]
    with torch.no_grad():
        torch.testing.assert_close(make()(grey), make()(grey.repeat(1, 3, 1, 1)))


def calls(network: ZeroShotCLIP) -> list[int]:
    counted: list[int] = []
    network.clip.text_model.register_forward_hook(lambda *_: counted.append(1))
    return counted


def test_texts_kept_under_autocast_serve_full_precision() -> None:
    network, expected = make(trainable="image"), make(trainable="image")(pictures())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        network(pictures())
    torch.testing.assert_close(network(pictures()), expected)


def test_texts_are_encoded_once_for_a_whole_attack_and_again_after_a_change() -> None:
    network = make(trainable="image")
    counted = calls(network)
    label = torch.zeros((3, 1, 1, 1), dtype=torch.long)
    attack = PGD(steps=5, objective=CrossEntropy())
    attack(network, pictures(), label)
    attack(network, pictures(seed=5), label)
    assert len(counted) == 1
    network(pictures(), texts(5))  # captions have a place of their own
    network(pictures())
    assert len(counted) == 2
    with torch.no_grad():
        before = network(pictures())
        network.clip.text_projection.weight.mul_(-1)
        assert (network(pictures()) - before).abs().min() > 1e-3
    network.load_state_dict(make().state_dict())
    with torch.no_grad():
        torch.testing.assert_close(network(pictures()), before)


def test_a_copy_and_inference_mode_keep_their_own_texts() -> None:
    network = make(trainable="image")
    with torch.inference_mode():
        expected = network(pictures()).clone()
    network(pictures()).sum().backward()  # kept in inference mode, used in training
    other = deepcopy(network)
    with torch.no_grad():
        other.clip.text_projection.weight.mul_(-1)
        torch.testing.assert_close(other(pictures()), -expected)
        torch.testing.assert_close(network(pictures()), expected)


def test_a_training_text_tower_gets_gradients_through_the_classes() -> None:
    network = make(trainable="all")
    network(pictures())[:, 0].sum().backward()
    gradient = network.clip.text_projection.weight.grad
    assert gradient is not None
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({"trainable": "image"}, VISUAL + 160),
        ({"trainable": "last", "blocks": 1}, BLOCK + 32 + 160),
        ({"trainable": "last", "blocks": 2}, 2 * BLOCK + 32 + 160),
        ({"trainable": "projection"}, 160),
        ({"trainable": "adapters", "adapters": 4}, 6 * (2 * 16 * 4 + 16 + 4)),
        ({"trainable": "none"}, 0),
    ],
    ids=lambda item: "-".join(str(value) for value in item.values()) if isinstance(item, dict) else "",
)
def test_what_trains_is_what_was_chosen_and_gets_a_gradient(settings: dict[str, Any], count: int) -> None:
    network = make(**settings)
    trains = [parameter for parameter in network.parameters() if parameter.requires_grad]
    assert sum(parameter.numel() for parameter in trains) == count
    if count:
        network(pictures())[:, 0].sum().backward()
        assert all(parameter.grad is not None for parameter in trains)


def test_all_of_clip_trains_with_the_temperature() -> None:
    assert all(parameter.requires_grad for parameter in make(trainable="all").parameters())


def test_adapters_start_as_the_identity_on_weights_without_them(tmp_path: Path) -> None:
    torch.save(make().state_dict(), tmp_path / "model.pt")
    with torch.random.fork_rng():
        torch.manual_seed(7)
        adapted = ZeroShotCLIP(TINY, texts(8).view(4, 2, 9), trainable="adapters", adapters=4).eval()
    adapted.load_base(tmp_path / "model.pt")
    with torch.no_grad():
        expected = make()(pictures())
        assert torch.equal(adapted(pictures()), expected)
        adapted.attn_adapters[0].fc2.bias.fill_(0.5)
        assert not torch.equal(adapted(pictures()), expected)


def hub_layout(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the hub's openai/clip-vit-base-patch32 holds: position numbers beside the weights."""
    return weights | {
        "text_model.embeddings.position_ids": torch.arange(9)[None],
        "vision_model.embeddings.position_ids": torch.arange(5)[None],
    }


def save_folder(folder: Path, weights: dict[str, Tensor], config: dict[str, Any]) -> None:
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


NAMES = (
    "logit_scale",
    "text_model.embeddings.token_embedding.weight",
    "text_model.embeddings.position_embedding.weight",
    "text_model.encoder.layers.1.self_attn.q_proj.bias",
    "text_model.final_layer_norm.weight",
    "text_projection.weight",
    "vision_model.embeddings.class_embedding",
    "vision_model.embeddings.patch_embedding.weight",
    "vision_model.pre_layrnorm.weight",
    "vision_model.encoder.layers.2.mlp.fc2.weight",
    "vision_model.post_layernorm.bias",
    "visual_projection.weight",
)
"""Some of the names in openai/clip-vit-base-patch32, one of each kind."""


def test_a_folder_in_the_hubs_layout_loads_whole(tmp_path: Path) -> None:
    network = make()
    weights = network.clip.state_dict()
    assert set(NAMES) <= set(weights)
    config = {**CLIPConfig(**TINY).to_dict(), "model_type": "clip", "architectures": ["CLIPModel"]}
    half = {name: value.half() for name, value in weights.items()}
    save_folder(tmp_path / "half", hub_layout(half), config)
    loaded = ZeroShotCLIP.from_pretrained(str(tmp_path / "half"), network.prompts, trainable="none").eval()
    assert all(parameter.dtype == torch.float32 for parameter in loaded.parameters())
    with torch.no_grad():
        torch.testing.assert_close(loaded(pictures()), network(pictures()), rtol=2e-2, atol=2e-2)

    save_folder(tmp_path / "cut", {name: value for name, value in weights.items() if "visual_pro" not in name}, config)
    with pytest.raises(ValueError, match=r"got none for 1 tensors \(such as visual_projection.weight\)"):
        ZeroShotCLIP.from_pretrained(str(tmp_path / "cut"))
    save_folder(tmp_path / "other", weights, {**config, "model_type": "clipseg"})
    with pytest.raises(ValueError, match="expected a CLIP checkpoint"):
        ZeroShotCLIP.from_pretrained(str(tmp_path / "other"))
    with pytest.raises(FileNotFoundError, match="where there is none"):
        ZeroShotCLIP.from_pretrained(str(tmp_path / "nowhere"))


class Block(nn.Module):
    """OpenAI's transformer layer, on torch's own attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        y = self.mlp["c_fc"](self.ln_2(x))
        return x + self.mlp["c_proj"](y * torch.sigmoid(1.702 * y))


class OpenAIsCLIP(nn.Module):
    """CLIP with OpenAI's names, written from the paper: the oracle of the layout."""

    def __init__(self, width: int, words: int, depth: int, projection: int) -> None:
        super().__init__()
        visual = self.visual = nn.Module()
        visual.class_embedding = nn.Parameter(torch.randn(width))
        visual.conv1 = nn.Conv2d(3, width, 8, 8, bias=False)
        visual.positional_embedding = nn.Parameter(torch.randn(5, width))
        visual.ln_pre, visual.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        visual.transformer = nn.ModuleDict(
            {"resblocks": nn.ModuleList(Block(width, width // 64) for _ in range(depth))}
        )
        visual.proj = nn.Parameter(torch.randn(width, projection) / width**0.5)
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(Block(words, words // 64) for _ in range(depth))})
        self.token_embedding = nn.Embedding(END + 1, words)
        self.positional_embedding = nn.Parameter(torch.randn(9, words))
        self.ln_final = nn.LayerNorm(words)
        self.text_projection = nn.Parameter(torch.randn(words, projection) / words**0.5)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, image: Tensor, ids: Tensor) -> Tensor:
        visual = self.visual
        patches = visual.conv1(image).flatten(2).transpose(1, 2)
        x = torch.cat([visual.class_embedding.expand(len(image), 1, -1), patches], 1) + visual.positional_embedding
        x = visual.ln_pre(x)
        for block in visual.transformer["resblocks"]:
            x = block(x, None)
        seen = visual.ln_post(x[:, 0]) @ visual.proj
        y = self.token_embedding(ids) + self.positional_embedding
        mask = torch.full((9, 9), -torch.inf).triu(1)
        for block in self.transformer["resblocks"]:
            y = block(y, mask)
        said = self.ln_final(y)[torch.arange(len(ids)), ids.argmax(-1)] @ self.text_projection
        return self.logit_scale.exp() * F.normalize(seen, dim=-1) @ F.normalize(said, dim=-1).t()


def test_openais_own_layout_gives_the_same_logits() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        original = OpenAIsCLIP(128, 64, 2, 24).eval()
        weights = {name: value.detach() for name, value in original.state_dict().items()}
    numbers = {"input_resolution": torch.tensor(16), "context_length": torch.tensor(9), "vocab_size": torch.tensor(100)}
    network = ZeroShotCLIP.from_openai(weights | numbers).eval()
    ids = texts(4)
    ids[:, 6:] = 0  # OpenAI's tokenizer pads with 0
    with torch.no_grad():
        expected = original(normalised(pictures()), ids)
        torch.testing.assert_close(network(pictures(), ids).flatten(1), expected, rtol=1e-4, atol=1e-4)


def test_another_layout_is_refused() -> None:
    with pytest.raises(ValueError, match="expected OpenAI's names"):
        ZeroShotCLIP.from_openai(CLIPModel(CLIPConfig(**TINY)).state_dict())


def test_the_released_sizes_follow_from_the_shapes() -> None:
    from medrobust.networks.clip_layout import from_openai

    with torch.device("meta"):
        original = OpenAIsCLIP(768, 512, 1, 512)
        original.visual.conv1 = nn.Conv2d(3, 768, 32, 32, bias=False)
        original.visual.positional_embedding = nn.Parameter(torch.empty(50, 768))
    config, _ = from_openai(original.state_dict())
    assert config["vision_config"]["num_attention_heads"] == 12
    assert config["text_config"]["num_attention_heads"] == 8
    assert (config["vision_config"]["patch_size"], config["vision_config"]["image_size"]) == (32, 224)
    assert config["vision_config"]["intermediate_size"] == 3072


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: make()(pictures()[:, :2]), "expected images"),
        (lambda: make()(pictures()[..., :8]), "expected images of 16 x 16"),
        (lambda: make()(pictures(), torch.ones((2, 9), dtype=torch.long)), "expected the end token 99"),
        (lambda: make(texts(8)), "expected prompts as tokens"),
        (lambda: make(trainable="text"), "expected trainable to be one of"),
        (lambda: make(trainable="adapters"), "expected adapters to train, got none"),
        (lambda: make(trainable="last", blocks=4), "expected blocks from 1 to the 3"),
        (lambda: ZeroShotCLIP(TINY)(pictures()), "expected prompts for class logits"),
    ],
)
def test_what_does_not_fit_is_said(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
