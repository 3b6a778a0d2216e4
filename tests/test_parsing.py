"""What a person types becomes the attack she meant, or a line that says what is wrong."""

from __future__ import annotations

import pytest

from medrobust.attacks import PGD, VAFA, CosPGDLoss, CrossEntropy, DiceCE, MCEDice, SegPGDLoss, SoftDice
from medrobust.parsing import check_name, parse_attack, parse_attacks, parse_value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8/255", 8 / 255),
        ("1e-4", 1e-4),
        ("1.5E3", 1500.0),
        ("20", 20),
        ("true", True),
        ("null", None),
        ("8,8,16", (8, 8, 16)),
        ("1/2, 3", (0.5, 3)),
        ("linf", "linf"),
        ("-4/255", -4 / 255),
    ],
)
def test_values(text: str, value: object) -> None:
    assert parse_value(text) == value
    assert type(parse_value(text)) is type(value)


def test_division_by_zero() -> None:
    with pytest.raises(ValueError, match="division by zero"):
        parse_value("8/0")


@pytest.mark.parametrize(
    ("text", "name", "attack"),
    [
        ("pgd", "PGD", PGD()),
        ("PGD eps=4/255 steps=40", "PGD", PGD(eps=4 / 255, steps=40)),
        ("strong: pgd restarts=5 objective=CE", "strong", PGD(restarts=5, objective=CrossEntropy())),
        ("vafa block_size=16,16,16 objective=DiceCE", "VAFA", VAFA(block_size=(16, 16, 16), objective=DiceCE())),
        ("pgd objective=dicece-sigmoid", "PGD", PGD(objective=DiceCE(head="sigmoid"))),
    ],
)
def test_attacks(text: str, name: str, attack: object) -> None:
    assert parse_attack(text) == (name, attack)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected an attack such as"),
        ("pdg", "expected an attack among"),
        ("pgd epss=1/255", "got 'epss': did you mean eps"),
        ("pgd eps", "expected setting=value"),
        ("pgd eps=-1", "expected eps >= 0"),
        ("pgd eps=large", "expected"),
        ("pgd norm=l7", "expected norm 'linf' or 'l2'"),
        ("pgd steps=0", "expected whole steps"),
        ("pgd objective=hinge", "expected an objective"),
        ("vafa q_min=30", "expected 0 < q_min"),
        ("vafa final=medium", "expected final="),
    ],
)
def test_mistakes_are_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_attack(text)


@pytest.mark.parametrize(
    ("text", "objective"),
    [
        ("pgd", CrossEntropy()),  # soft Dice hardly slopes where a structure shall be absent
        ("apgd steps=100", CrossEntropy()),
        ("cospgd", CosPGDLoss()),  # without their losses they would be PGD
        ("segpgd", SegPGDLoss()),
        ("vafa reference=true", DiceCE()),
        ("pgd objective=SoftDice", SoftDice()),
        ("cospgd objective=MCEDice", MCEDice()),
    ],
)
def test_a_goal_replaces_no_loss_but_the_default_soft_dice(text: str, objective: object) -> None:
    named, wishes = parse_attacks([f"{text} goal=erase:liver"])
    (attack,) = named.values()
    assert attack.targeted
    assert attack.setting("objective") == objective
    assert list(wishes.values()) == ["erase:liver"]


def test_names_far_from_everything_list_what_there_is() -> None:
    with pytest.raises(ValueError, match="there are alpha, beta"):
        check_name("zzz", ["alpha", "beta"], "setting")
