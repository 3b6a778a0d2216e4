"""The report says what the records say, to the last digit, and is one file that needs nothing else."""

import re
import subprocess
import sys
from base64 import b64decode
from dataclasses import replace
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medrobust.pictures import panel
from medrobust.records import Record, csv_text, write_csv
from medrobust.report import html, markdown
from medrobust.tables import budget

PGD = "PGD(objective=SoftDice(head='softmax'), eps=0.03137254901960784, norm='linf', steps=20, step_size=0.1)"
VAFA = "VAFA(objective=SoftDice(head='softmax'), q_max=20.0, q_min=1.0, q_init=20.0, steps=20, ssim_weight=1.0)"
TABLES = VAFA.replace("steps=20", "steps=0")
NOISE = "RandomNoise(objective=SoftDice(head='softmax'), eps={}, norm='l2')"


def rows(
    condition: str, dice: dict[str, list[float]], attack: str = "", protocol: str = "", **extra: Any
) -> list[Record]:
    """Rows of two organs for each case; Dice 0 is a missed organ."""
    found = []
    for case, values in dice.items():
        shared = {"case": case, "condition": condition, "attack": attack, "protocol": protocol} | {
            "seed": 7,
            "model": "unetr sha256:abcd1234",
            "versions": "medrobust 0.1.0",
        }
        shared |= extra
        for organ, value in zip(["background", "liver", "spleen"], [0.99, *values], strict=True):
            status = "ok" if value else "missed"
            found.append(Record(**shared, metric="dice", class_name=organ, value=value, status=status))
            found.append(Record(**shared, metric="hd95", class_name=organ, value=10 * (1 - value), status=status))
        if attack:
            measured = {"ssim": 0.9512, "psnr": 38.4, "linf": 8 / 255, "flip_rate": 0.25, "l2": 3.5}
            found += [Record(**shared, metric=metric, value=value) for metric, value in measured.items()]
    return found


@pytest.fixture
def records() -> list[Record]:
    return [
        *rows("PGD", {"a": [0.4, 0.0], "b": [0.5, 0.3]}, PGD, "tiles"),
        *rows("clean", {"a": [0.9, 0.7], "b": [0.8, 0.8]}),
        *rows("PGD", {"a": [0.2, 0.0], "b": [0.3, 0.1]}, PGD, "whole volume"),
        *rows("VAFA", {"a": [0.1, 0.1], "b": [0.4, 0.4]}, VAFA, "whole volume"),
        *rows("VAFA tables only", {"a": [0.8, 0.6], "b": [0.7, 0.7]}, TABLES, "whole volume"),
        *rows("VAFA equal noise", {"a": [0.9, 0.7]}, NOISE.format(8.125), "whole volume"),
        *rows("VAFA equal noise", {"b": [0.8, 0.8]}, NOISE.format(9.5), "whole volume"),
    ]


class Page(HTMLParser):
    """Tables as lists of rows of cell texts, and every tag with its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.inside = True
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside &= tag != "table"

    def handle_data(self, data: str) -> None:
        if self.inside and self.tables[-1] and self.tables[-1][-1]:
            self.tables[-1][-1][-1] = f"{self.tables[-1][-1][-1]} {data}".strip()


def table(text: str, number: int) -> dict[str, dict[str, str]]:
    """A table as ``row name -> column -> text``."""
    head, *body = Page(text).tables[number]
    return {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in body}


def test_headline_table(records: list[Record]) -> None:
    found = table(html(records), 0)
    assert list(found) == [
        "clean",
        "PGD tiles, L∞ 8/255, 20 steps",
        "PGD whole volume, L∞ 8/255, 20 steps",
        "VAFA whole volume, q_max 20, 20 steps",
        "VAFA tables only control, whole volume, q_max 20, 0 steps",
        "VAFA equal noise control, whole volume, L2 8.12 to 9.5",
        "worst of all, case by case",
    ]
    assert found["clean"] == {
        "Dice": "0.800 [0.800, 0.800]",
        "Dice drop": "–",
        "Missed": "0 of 4",
        "HD95, mm": "2.0",
        "SSIM": "–",
        "PSNR, dB": "–",
        "L∞": "–",
        "Flipped": "–",
        "Cases": "2",
    }
    assert found["PGD whole volume, L∞ 8/255, 20 steps"] == {
        "Dice": "0.150 [0.100, 0.200]",
        "Dice drop": "0.650 [0.600, 0.700]",
        "Missed": "1 of 4",
        "HD95, mm": "8.5",
        "SSIM": "0.9512",
        "PSNR, dB": "38.4",
        "L∞": "8/255",
        "Flipped": "25.00%",
        "Cases": "2",
    }
    # case a: min(0.2, 0.1, 0.1); case b: min(0.4, 0.2, 0.4); the controls are no attacks
    assert found["worst of all, case by case"]["Dice"] == "0.150 [0.100, 0.200]"
    assert found["worst of all, case by case"]["HD95, mm"] == "8.5"


def test_table_of_structures(records: list[Record]) -> None:
    found = table(html(records), 1)
    assert found["liver"] == {
        "clean": "0.850",
        "PGD, tiles": "0.450",
        "PGD, whole volume": "0.250",
        "VAFA": "0.250",
        "VAFA tables only": "0.750",
        "VAFA equal noise": "0.850",
    }
    assert found["spleen"]["PGD, whole volume"] == "0.050 1 missed"
    assert "background" not in found


def test_tiles_against_the_whole_volume(records: list[Record]) -> None:
    found = table(html(records), 2)
    assert found == {
        "PGD L∞ 8/255, 20 steps": {
            "Dice, tiles": "0.300 [0.200, 0.400]",
            "Dice, whole volume": "0.150 [0.100, 0.200]",
            "Whole volume takes": "0.150 [0.100, 0.200]",
        }
    }


def test_metrics_without_a_column_get_a_table(records: list[Record]) -> None:
    found = table(html(records), 3)
    assert found["VAFA"] == {"L2": "3.5"}
    assert "clean" not in found


def test_markdown_says_the_same(records: list[Record]) -> None:
    text = markdown(records)
    assert (
        "| PGD, whole volume | L∞ 8/255, 20 steps | 0.150 [0.100, 0.200] | 0.650 [0.600, 0.700] | 8.5 | 1 of 4 |"
        in text
    )
    assert "| spleen | 0.750 | 0.150 (1 missed) | 0.050 (1 missed) | 0.250 | 0.650 | 0.750 |" in text
    assert "| VAFA equal noise, whole volume (control) | L2 8.12 to 9.5 |" in text
    tables = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    assert [len({line.count(" | ") for line in found.splitlines() if "--" not in line}) for found in tables] == [1] * 5


def test_one_case_has_no_interval_and_says_so() -> None:
    text = markdown([*rows("clean", {"a": [0.9, 0.7]}), *rows("PGD", {"a": [0.2, 0.4]}, PGD, "whole volume")])
    assert "| PGD, whole volume | L∞ 8/255, 20 steps | 0.300 | 0.500 |" in text
    assert "There is one case, so no interval is given" in text
    assert "[" not in text.split("## Notes")[0]


def test_notes_count_the_empties_and_take_more(records: list[Record]) -> None:
    both = Record(case="a", condition="clean", metric="dice", class_name="spleen", value=1.0, status="both empty")
    text = markdown([*records, both], notes=["The reference masks come from TotalSegmentator."])
    assert "(1 of 25 Dice values here)" in text
    assert "missed, in the reference alone (2)" in text
    assert "- The reference masks come from TotalSegmentator." in text


def seen(metric: str, cells: dict[tuple[str, str], tuple[float, str]], condition: str = "PGD") -> list[Record]:
    """Rows of one metric: case and structure -> value and status."""
    attack = {"attack": PGD, "protocol": "whole volume"} if condition != "clean" else {}
    return [
        Record(case=case, condition=condition, metric=metric, class_name=organ, value=value, status=status, **attack)
        for (case, organ), (value, status) in cells.items()
    ]


def test_missed_lesions_are_averaged_over_what_the_reference_has() -> None:
    """All lesions of all structures are missed, whatever the zeros of structures that are not there."""
    cells = {
        ("a", "background"): (0.0, "ok"),
        ("a", "liver"): (1.0, "missed"),
        ("a", "spleen"): (0.0, "both empty"),
        ("a", "kidney"): (0.0, "invented"),
        ("b", "liver"): (1.0, "missed"),
        ("b", "spleen"): (1.0, "ok"),  # found in wrong places only
        ("c", "liver"): (0.0, "invented"),  # nothing to miss in this case
        ("c", "spleen"): (0.0, "both empty"),
    }
    absent = {("a", "liver"): (0.0, "both empty"), ("b", "liver"): (0.0, "invented")}
    records = [*seen("missed_rate", cells), *seen("missed_rate", absent, "clean")]
    (found,) = [one for one in Page(html(records)).tables if "Missed lesions" in one[0]]
    assert dict(found[1:]) == {"clean": "–", "PGD": "1"}
    half = seen("missed_rate", cells | {("b", "spleen"): (0.0, "ok")})
    assert "| PGD | 0.75 |" in markdown(half)
    assert "No value is left out of a mean, but for missed lesions" in markdown(half)
    # Other metrics are averaged over everything.
    assert "| PGD | 0.4444 |" in markdown([replace(record, metric="iou") for record in seen("iou", cells)])


def test_a_structure_without_a_right_voxel_is_missed_wherever_its_class_was_predicted() -> None:
    clean = {(case, organ): (0.9, "ok") for case in "ab" for organ in ("liver", "spleen")}
    dice = {
        ("a", "liver"): (0.0, "ok"),
        ("a", "spleen"): (0.0, "missed"),
        ("b", "liver"): (0.2, "ok"),
        ("b", "spleen"): (0.0, "invented"),
    }
    records = [*seen("dice", clean, "clean"), *seen("dice", dice), *seen("hd95", {("a", "liver"): (12.5, "ok")})]
    text = markdown(records)
    assert "2 of 3 structures are missed (2 cases)" in text
    assert "| 12.5 | 2 of 3 |" in text
    assert "| liver | 0.900 | 0.100 (1 missed) |" in text
    assert "| spleen | 0.900 | 0.000 (1 missed, 1 invented) |" in text
    assert "missed, in the reference alone (1)" in text
    assert "in wrong places only (1)" in text
    assert table(html(records), 0)["PGD whole volume, L∞ 8/255, 20 steps"]["Missed"] == "2 of 3"


def test_provenance_leads_back_to_the_file(records: list[Record], tmp_path: Path) -> None:
    write_csv(records, tmp_path / "records.csv")
    digest = sha256((tmp_path / "records.csv").read_bytes()).hexdigest()
    for text in (html(records), markdown(records)):
        assert digest in text
        assert "unetr sha256:abcd1234" in text
        assert "medrobust 0.1.0" in text
    assert PGD in markdown(records)
    assert "Seeds: 7" in markdown(records)


def test_pure_function_of_the_records(records: list[Record]) -> None:
    assert html(records) == html(list(records))
    assert html(records, controls=["VAFA"]) != html(records)
    noise_as_attack = table(html(records, controls=[]), 0)
    assert "VAFA equal noise whole volume, L2 8.12 to 9.5" in noise_as_attack


def test_one_file_without_links_or_scripts(records: list[Record]) -> None:
    page = Page(html(records))
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "a", "iframe", "object"})
    sources = [attrs["src"] or "" for _, attrs in page.tags if "src" in attrs]
    assert sources
    for source in sources:
        kind, _, data = source.partition(",")
        assert kind == "data:image/png;base64"
        assert b64decode(data, validate=True).startswith(b"\x89PNG")
    assert not re.search(r"url\(|@import|https?://", html(records))


def test_names_cannot_break_out() -> None:
    name = '<img src=x onerror="alert(1)">|`a`'
    records = [
        *rows("clean", {name: [0.9, 0.7]}),
        *rows(name, {name: [0.2, 0.4]}, f"{name}(eps=0.1)", name, model=name, versions=name),
    ]
    page = html(records, title=name, notes=[name])
    assert all("onerror" not in attrs for _, attrs in Page(page).tags)
    text = markdown(records, title=name, notes=[name])
    outside_code = re.sub(r"`[^`\n]*`", "", text.replace("\\`", ""))
    assert "<img" not in outside_code
    headline = next(line for line in text.splitlines() if line.startswith("| &lt;img"))
    assert len(re.findall(r"(?<!\\)\|", headline)) == 8


def test_two_models_and_two_budgets_are_told_apart() -> None:
    strong = PGD.replace("0.03137254901960784", "0.06274509803921569")
    records = [
        *rows("clean", {"a": [0.9, 0.9]}, model="plain"),
        *rows("PGD", {"a": [0.2, 0.2]}, PGD, "whole volume", model="plain"),
        *rows("PGD", {"a": [0.1, 0.1]}, strong, "whole volume", model="plain"),
        *rows("clean", {"a": [0.8, 0.8]}, model="hardened"),
        *rows("PGD", {"a": [0.6, 0.6]}, PGD, "whole volume", model="hardened"),
    ]
    text = html(records)
    together, plain, hardened = table(text, 0), table(text, 1), table(text, 4)
    # A stronger attack that one model alone was spared is no comparison.
    assert together == {
        "clean": {"plain": "0.900", "hardened": "0.800"},
        "PGD whole volume, L∞ 8/255, 20 steps": {"plain": "0.200", "hardened": "0.600"},
    }
    summary = markdown(records)
    # One budget and other settings, another case, or volumes made against another model: no comparison.
    other = PGD.replace("SoftDice", "CrossEntropy")
    for strange in (
        rows("BIM", {"a": [0.5, 0.5]}, other, "whole volume", model="hardened"),
        rows("BIM", {"b": [0.5, 0.5]}, PGD, "whole volume", model="hardened"),
        rows("BIM", {"a": [0.5, 0.5]}, f"saved {PGD}", "whole volume", model="hardened"),
    ):
        same = rows("BIM", {"a": [0.5, 0.5]}, PGD, "whole volume", model="plain")
        assert len(table(html([*records, *same, *strange]), 0)) == 2
    assert "| PGD, whole volume | L∞ 8/255, 20 steps | 0.200 | 0.600 |" in summary
    assert plain["PGD whole volume, L∞ 8/255, 20 steps"]["Dice drop"] == "0.700"
    assert plain["PGD whole volume, L∞ 16/255, 20 steps"]["Dice drop"] == "0.800"
    assert hardened["PGD whole volume, L∞ 8/255, 20 steps"]["Dice drop"] == "0.200"
    assert list(table(text, 2)["liver"]) == ["clean", "PGD, L∞ 8/255, 20 steps", "PGD, L∞ 16/255, 20 steps"]


@pytest.mark.parametrize(
    ("attacks", "expected"),
    [
        ([""], ""),
        ([PGD], "L∞ 8/255, 20 steps"),
        ([VAFA], "q_max 20, 20 steps"),
        (["FGSM(eps=0.01568627450980392, norm='linf')"], "L∞ 4/255"),
        (["GaussianNoise(targeted=False, std=0.03137254901960784)"], "std 8/255"),
        ([NOISE.format(2.0), NOISE.format(4.0)], "L2 2 to 4"),
        (["PGD(eps=(0.01568627450980392, 0.03137254901960784), norm='linf', steps=3)"], "L∞ 4 to 8/255, 3 steps"),
        (["PGD(eps=((0.5,), (1.0,)), norm='l2', step_size=((0.1,), (0.2,)), steps=3)"], "L2 0.5 to 1, 3 steps"),
        ([PGD, VAFA], "mixed, see provenance"),
        (["Mystery(strength=3)"], ""),
    ],
)
def test_budget(attacks: list[str], expected: str) -> None:
    assert budget(attacks) == expected


def test_without_clean_rows_or_dice_there_is_still_a_report() -> None:
    found = table(html(rows("PGD", {"a": [0.2, 0.4]}, PGD, "tiles")), 0)
    assert found["PGD tiles, L∞ 8/255, 20 steps"]["Dice drop"] == "–"
    only = [Record(case="a", condition="PGD", metric="psnr", value=float("inf"))]
    assert table(html(only), 0) == {"PGD": {"PSNR, dB": "∞", "Cases": "1"}}


def test_nothing_to_report_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one record"):
        markdown([])


def test_pictures_are_embedded_with_their_captions(records: list[Record], tmp_path: Path) -> None:
    maps = np.zeros((3, 1, 8, 6), dtype=int)
    png = panel(maps[0] * 0.5, maps[0] * 0.5, *maps, class_names=["background"])
    path = tmp_path / "ct_b__PGD__whole-volume__adv.png"
    path.write_bytes(png)
    images = [attrs for tag, attrs in Page(html(records, [path, ("by hand", png)])).tags if tag == "img"]
    assert [str(attrs["alt"]).split(":")[0] for attrs in images[1:]] == ["ct_b, PGD, whole volume", "by hand"]
    assert b64decode(str(images[1]["src"]).partition(",")[2]) == png
    few = html(records, [(f"number {k}", png) for k in range(10)], most_pictures=2)
    assert "2 of 10 are shown" in few
    assert re.findall(r"<figcaption>(number \d)", few) == ["number 0", "number 5"]
    with pytest.raises(ValueError, match="expected a PNG for the picture 'x'"):
        html(records, [("x", b"GIF89a")])


def test_a_report_needs_no_torch(records: list[Record], tmp_path: Path) -> None:
    write_csv(records, tmp_path / "records.csv")
    program = (
        "import sys; from medrobust.records import read_csv; from medrobust.report import html;"
        "html(read_csv(sys.argv[1])); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program, tmp_path / "records.csv"], check=True, cwd=Path(__file__).parents[1])
    assert csv_text(records).count("\n") == len(records) + 1
