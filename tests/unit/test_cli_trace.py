"""The picture of a pod's start."""

from xml.etree import ElementTree as ET

from vmrt.cli.trace import phases_svg, phases_text, spans

COLD = {"disk and tap": 10.0, "boot": 80.0, "network": 40.0, "join": 5.0, "configure": 10.0, "total": 101.0}
WARM = {"network": 40.0, "join": 20.0, "configure": 30.0, "total": 71.0}


def test_phases_lie_where_they_ran() -> None:
    assert spans(COLD) == [
        ("disk and tap", 0.0, 10.0),
        ("boot", 10.0, 90.0),
        ("network", 0.0, 40.0),
        ("join", 90.0, 95.0),
        ("configure", 90.0, 100.0),
        ("total", 0.0, 101.0),
    ]
    assert [row[1] for row in spans(WARM)] == [0.0, 40.0, 40.0, 0.0]
    assert spans({}) == []
    waited = spans({"turn": 100.0, **COLD})
    assert waited[:4] == [
        ("turn", 0.0, 100.0),
        ("disk and tap", 100.0, 110.0),
        ("boot", 110.0, 190.0),
        ("network", 100.0, 140.0),
    ]


def test_the_text_has_a_bar_for_each_phase_at_its_place() -> None:
    lines = phases_text(WARM).splitlines()
    assert [line.split()[0] for line in lines] == list(WARM)
    network, join, configure, total = (line[14:] for line in lines)
    assert network.startswith("#") and total.startswith("#" * 40)
    assert join.index("#") == configure.index("#") == network.rindex("#") + 1
    assert lines[0].endswith("40.0 ms")


def test_the_picture_is_well_formed_and_names_the_pods() -> None:
    root = ET.fromstring(phases_svg({"a <pod>": COLD, "warm": WARM}))
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "a <pod>" in texts and "80.0 ms" in texts
    bars = [element for element in root.iter("{http://www.w3.org/2000/svg}rect")][1:]
    assert len(bars) == len(COLD) + len(WARM)
    boot = bars[1]
    assert float(boot.attrib["width"]) > 7 * float(bars[0].attrib["width"])
