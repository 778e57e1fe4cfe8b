"""The plot is valid SVG and holds every method, whatever it is called."""

from __future__ import annotations

from itertools import pairwise
from xml.etree import ElementTree

from lorafit.studies.plot import Point, draw_quality

SVG = "{http://www.w3.org/2000/svg}"


def test_every_method_is_drawn_where_its_figures_are() -> None:
    points = [
        Point("lora <r=4>", 0.0, 0.0, 0.0, 1e4, 100.0, is_same=True),
        Point("dora", 1.0, 0.8, 1.2, 1e6, 300.0, is_same=False),
        Point("base", 0.5, 0.4, 0.6, 0, 0, is_same=False),
    ]
    tree = ElementTree.fromstring(draw_quality("loss", "lora", points))
    dots = [(float(dot.get("cx", 0)), float(dot.get("cy", 0)), dot.get("fill")) for dot in tree.iter(f"{SVG}circle")]
    assert len(dots) == 4  # two methods in two panels
    for lora, dora in (dots[:2], dots[2:]):
        assert lora[0] < dora[0]  # fewer parameters, less memory: further left
        assert lora[1] > dora[1]  # y grows downwards
        assert lora[2] != "white" == dora[2]
    names = [text.text for text in tree.iter(f"{SVG}text")]
    assert names.count("lora <r=4>") == names.count("base") == 2


def test_methods_that_cost_and_give_the_same_are_drawn_too() -> None:
    points = [Point(name, 0.0, 0.0, 0.0, 10, 5.0, is_same=True) for name in ("a", "b")]
    ElementTree.fromstring(draw_quality("loss", "lora", points))


def test_names_of_equal_methods_are_apart_and_a_base_far_away_is_told() -> None:
    points = [Point(name, 0.0, -0.1, 0.1, 4e6, 500.0, is_same=True) for name in ("lora", "rslora", "lora_plus")]
    tree = ElementTree.fromstring(
        draw_quality("loss", "lora", [*points, Point("base", 9.0, 8.0, 10.0, 0, 0, is_same=False)])
    )
    texts = list(tree.iter(f"{SVG}text"))
    for panel in range(2):
        heights = sorted(
            float(text.get("y", 0))
            for text in texts
            if text.text in {"lora", "rslora", "lora_plus"} and (float(text.get("x", 0)) > 560) == bool(panel)
        )
        assert len(heights) == 3 and min(b - a for a, b in pairwise(heights)) > 12
    assert any("outside of the picture: base, +9" in (text.text or "") for text in texts)
