"""Evaluations of networks that read a prompt, from listings on disk: every number is known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from oracles import PromptLinear
from PIL import Image
from typer.testing import CliRunner

from medrobust.cli import app
from medrobust.data.tokenizer import encode, tokenize
from medrobust.preparing import prepare
from medrobust.records import read_csv
from medrobust.run_tables import read_prompts

LIVER = encode("liver")[1]
GREY = 140
"""Of the object; the background is 60. A change of 13/255 turns the object dark."""


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    root = tmp_path / "bundle"
    for folder in ("configs", "models", "images", "masks"):
        (root / folder).mkdir(parents=True)
    rows = []
    for number in range(2):
        pixels = np.full((10, 12, 3), 60, dtype=np.uint8)
        mask = np.zeros((10, 12), dtype=np.uint8)
        pixels[2:6, 3 : 7 + number], mask[2:6, 3 : 7 + number] = GREY, 255
        Image.fromarray(pixels).save(root / "images" / f"{number}.png")
        Image.fromarray(mask).save(root / "masks" / f"{number}.png")
        prompts = {"p0": "", "name": "liver", "synonym": ["the liver", "liver tissue"], "wrong": "spleen"}
        rows.append({"img_name": f"{number}.png", "mask_name": f"{number}.png", "prompts": prompts})
    (root / "test.json").write_text(json.dumps(rows))
    torch.save(PromptLinear(LIVER).state_dict(), root / "models" / "model.pt")
    config = {
        "imports": ["$import medrobust.data.prompts as prompts"],
        "bundle_root": ".",
        "ckpt_path": "$@bundle_root + '/models/model.pt'",
        "device": "$torch.device('cpu')",
        "prompt": "name",
        "network_def": {"_target_": "oracles.PromptLinear", "token": LIVER},
        "listed": "$prompts.datalist(@bundle_root + '/test.json', images=@bundle_root + '/images', "
        "masks=@bundle_root + '/masks')",
        "train": {"dataset": {"data": "@listed"}},
        "validate": {
            "preprocessing": {
                "_target_": "Compose",
                "transforms": [
                    {"_target_": "medrobust.data.pairs.LoadPair"},
                    {"_target_": "medrobust.data.pairs.Prompted", "policy": "@prompt"},
                ],
            },
            "dataset": {"data": "@listed"},
            "inferer": {"_target_": "SimpleInferer"},
        },
    }
    (root / "configs" / "train.yaml").write_text(yaml.safe_dump(config))
    inputs = {"image": {"num_channels": 3}, "input_ids": {"num_channels": 1}}
    outputs = {"pred": {"channel_def": {"0": "background", "1": "organ"}}}
    metadata = {"network_data_format": {"inputs": inputs, "outputs": outputs}}
    (root / "configs" / "metadata.json").write_text(json.dumps(metadata))
    return root


def call(*words: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


def dice(folder: Path, condition: str) -> list[float]:
    records = read_csv(folder / "records.csv")
    return [r.value for r in records if (r.condition, r.metric, r.class_name) == (condition, "dice", "organ")]


def test_prompts_and_sizes(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    eps = "4/255,12/255,16/255"
    call("evaluate", "-b", bundle, "-o", out, "-a", "fgsm", "--eps", eps, "--prompts", "synonym,wrong,p0")
    assert dice(out, "clean") == [1, 1]
    # 140 - 127.5 = 12.5 grey levels are what the object has to lose.
    assert dice(out, "FGSM 4/255") == dice(out, "FGSM 12/255") == [1, 1]
    assert dice(out, "FGSM 16/255") == [0, 0]
    assert dice(out, "noise 16/255") != dice(out, "FGSM 16/255")
    assert dice(out, "prompt synonym") == [1, 1]
    # The network then segments all that is dark, and nothing of the object.
    assert dice(out, "prompt wrong") == dice(out, "prompt p0") == [0, 0]
    assert read_prompts(out) == [("0", "name", "liver"), ("1", "name", "liver")]
    report = (out / "report.md").read_text()
    assert "Decline of Dice with the budget" in report
    assert len(list((out / "pictures").glob("*.png"))) == 2 * (3 + 3 + 3)
    # A prompt changes no voxel, so there is no adversarial volume of it.
    assert not [path for path in (out / "volumes").iterdir() if "prompt" in path.name]


def test_an_attack_on_all_prompts_cannot_serve_two_that_disagree(bundle: Path, tmp_path: Path) -> None:
    """Some prompts ask for what is bright, others for what is dark; on this model the majority's gradient decides."""
    out = tmp_path / "run"
    call("evaluate", "-b", bundle, "-o", out, "-a", "fgsm eps=16/255 objective=CE", "--protocol", "prompts")
    records = [r for r in read_csv(out / "records.csv") if r.metric == "dice" and r.class_name == "organ"]
    found = {
        protocol: [r.value for r in records if r.protocol == protocol] for protocol in ("whole volume", "all prompts")
    }
    assert found["all prompts"] == [0, 0]
    assert len(found["whole volume"]) == 4  # the attack, and its noise
    two = tmp_path / "two"
    listing = bundle / "test.json"
    listing.write_text(listing.read_text().replace('["the liver", "liver tissue"]', '"kidney"'))
    call("evaluate", "-b", bundle, "-o", two, "-a", "fgsm eps=16/255 objective=CE", "--protocol", "prompts")
    records = [r for r in read_csv(two / "records.csv") if r.metric == "dice" and r.class_name == "organ"]
    # Now "kidney" and "spleen" outvote "liver", so the image gets better for the prompt of the case.
    assert [r.value for r in records if r.protocol == "all prompts"] == [1, 1]


def test_pictures_after_storing(bundle: Path, tmp_path: Path) -> None:
    """12.6/255 turns the object dark in memory; rounding gives 127 or 128 of 140 - 12.6, so PNG decides at 127.5."""
    out = tmp_path / "run"
    call("evaluate", "-b", bundle, "-o", out, "-a", "fgsm eps=12.6/255", "--stored", "png,jpeg30")
    assert dice(out, "FGSM") == [0, 0]
    assert dice(out, "FGSM as png") == [0, 0]  # 127.4 is stored as 127
    linf = {r.condition: r.value * 255 for r in read_csv(out / "records.csv") if r.metric == "linf"}
    assert linf["FGSM"] == pytest.approx(12.6, abs=1e-3)
    assert linf["FGSM as png"] == pytest.approx(13, abs=1e-3)
    assert linf["FGSM as jpeg30"] != pytest.approx(13, abs=0.2)
    texts = {r.condition: r.attack for r in read_csv(out / "records.csv")}
    assert texts["FGSM as png"] == texts["FGSM"] + " stored as png"
    # Going on with the same command finds everything there.
    assert "already there" in call(
        "evaluate", "-b", bundle, "-o", out, "-a", "fgsm eps=12.6/255", "--stored", "png,jpeg30"
    )
    text = call("evaluate", "-b", bundle, "-o", tmp_path / "x", "-a", "fgsm", "--stored", "png,gif", code=2)
    assert "expected to store as png or jpeg1 to jpeg100, got 'gif'" in text.replace("\n", " ")
    assert not (tmp_path / "x").exists()


def test_a_run_keeps_its_prompts(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    call("evaluate", "-b", bundle, "-o", out, "--prompts", "wrong")
    listing = bundle / "test.json"
    listing.write_text(listing.read_text().replace('"name": "liver"', '"name": "the liver"'))
    text = call("evaluate", "-b", bundle, "-o", out, "-a", "fgsm", "--prompts", "wrong", code=1)
    assert "expected the prompt 'liver' as in" in text.replace("\n", " ")


def test_an_overlay_changes_the_configuration(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "over.yaml").write_text("prompt: wrong\n")
    call("evaluate", "-b", bundle, "-o", tmp_path / "run", "--overlay", tmp_path / "over.yaml", "--prompts", "name")
    assert dice(tmp_path / "run", "clean") == [0, 0]
    assert dice(tmp_path / "run", "prompt name") == [1, 1]
    text = call("evaluate", "-b", bundle, "-o", tmp_path / "x", "--overlay", tmp_path / "no.yaml", "-a", "pgd", code=2)
    assert "expected the configuration" in text


def test_an_unknown_prompt_costs_its_condition_and_is_told(bundle: Path, tmp_path: Path) -> None:
    text = call("evaluate", "-b", bundle, "-o", tmp_path / "run", "--prompts", "wrong,p7", code=1)
    assert "prompt key among p0, name, synonym, wrong for case '0', got 'p7'" in text.replace("\n", " ")
    assert dice(tmp_path / "run", "prompt wrong") == [0, 0]


def test_a_universal_perturbation_of_the_bundle(bundle: Path, tmp_path: Path) -> None:
    """Brighter is safer for both cases, so the worst common change darkens every pixel of the object by eps."""
    file = tmp_path / "u.pt"
    call("universal", "-b", bundle, "-o", file, "--eps", "16/255", "--epochs", "3", "--split", "validation")
    delta = torch.load(file, weights_only=True)["delta"]
    assert torch.allclose(delta[:, 2:6, 3:7], torch.tensor(-16 / 255), atol=0.1 * 16 / 255)
    call("evaluate", "-b", bundle, "-o", tmp_path / "run", "-a", f"universal file={file} eps=16/255")
    assert dice(tmp_path / "run", "Universal") == [0, 0]


def test_other_prompts_are_made_into_tokens_as_the_bundle_does(bundle: Path) -> None:
    config = bundle / "configs" / "train.yaml"
    config.write_text(
        config.read_text().replace("policy: '@prompt'", "policy: '@prompt'\n      truncate: true\n      pad: 0")
    )
    run, cases = prepare(bundle=bundle, output=bundle / "run", prompts="name,long")
    case = {**cases[0], "prompts": {"name": "liver", "long": " ".join(["liver"] * 100)}}
    data = run.preprocessing(case)
    inputs = run.inputs(data, case)
    assert torch.equal(inputs.under("name")["input_ids"], inputs.own["input_ids"])
    assert inputs.own["input_ids"][3:].eq(0).all()
    each = [arguments["input_ids"] for arguments in inputs.each()]
    assert torch.equal(each[0], inputs.own["input_ids"])
    assert (
        each[1].tolist()
        == inputs.under("long")["input_ids"].tolist()
        == tokenize("liver " * 100, truncate=True)[0][0].tolist()
    )


def test_an_image_alone_has_no_prompts(bundle: Path, tmp_path: Path) -> None:
    image = bundle / "images" / "0.png"
    text = call("evaluate", "-b", bundle, "-o", tmp_path / "run", "-a", "fgsm", "--image", image, code=1)
    assert "case 0.png failed: expected a case with prompts, got an image alone" in text.replace("\n", " ")
