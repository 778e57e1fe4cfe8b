"""Sizes, names of cards, and the memory that a CPU process really has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorafit.errors import UsageError
from lorafit.machine import devices
from lorafit.machine.devices import format_bytes, parse_gpu, peak_flops, read_device
from lorafit.machine.hardware import capability_of, cards, find_card, find_cards, usable_bytes

GIB = 2**30


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GiB", 24 * GIB), ("80gib", 80 * GIB), ("24GB", 24 * 10**9), ("24", 24 * GIB), (" 1.5 GiB ", 3 * GIB // 2),
     ("500MiB", 500 * 2**20)],
)  # fmt: skip
def test_sizes(text: str, size: int) -> None:
    facts = parse_gpu(text)
    assert (facts.kind, facts.memory_bytes, facts.bf16) == ("cuda", size, True)


@pytest.mark.parametrize("text", ["RTX-4090", "rtx 4090", "NVIDIA GeForce RTX 4090", "rtx4090"])
def test_names_are_found_however_they_are_written(text: str) -> None:
    facts = parse_gpu(text)
    assert facts.name == "RTX-4090"
    assert 23 * GIB < facts.memory_bytes < 24 * GIB  # what torch reports, not the label


@pytest.mark.parametrize("text", ["-1GiB", "0", "1e999GiB", "0.1GiB", "99999GiB", "24 parsecs", "", "nan", "RTX 4099"])
def test_what_is_no_card_names_flag_and_range(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_gpu(text)
    message = str(caught.value)
    assert message.startswith("--gpu: ")
    assert "range" in message or "24GiB" in message
    assert caught.value.exit_code == 2


def test_a_misspelt_card_gets_the_nearest_name() -> None:
    with pytest.raises(UsageError, match="did you mean RTX-4090"):
        parse_gpu("RTX-4099")


def test_this_machine_is_named_cpu() -> None:
    assert parse_gpu("cpu").kind == parse_gpu(" CPU ").kind == "cpu"
    assert peak_flops(parse_gpu("cpu")) is None


def test_the_peak_of_named_cards_alone_is_known() -> None:
    assert peak_flops(parse_gpu("rtx 4090")) == 165.2e12
    assert peak_flops(parse_gpu("24GiB")) is None
    assert parse_gpu("24GiB").name == "a GPU of 24 GiB"


def test_cards_are_whole() -> None:
    assert len(cards()) >= 77
    for card in cards():
        assert 0.9 * card["label_gib"] * GIB < usable_bytes(card) <= card["label_gib"] * GIB
        assert card["source"].startswith("https://")
        assert 10 < card["peak_tflops"] < 3000
        assert card["bandwidth_gb_per_second"] is None or 100 < card["bandwidth_gb_per_second"] < 10_000
        assert card["peak_dtype"] == ("bf16" if capability_of(card) >= (8, 0) else "fp16")
    t4 = find_card("T4")
    assert t4 is not None
    assert capability_of(t4) == parse_gpu("T4").capability == (7, 5)
    assert not parse_gpu("T4").bf16 and parse_gpu("A10").bf16 and parse_gpu("24GiB").capability is None


def test_this_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    two = read_device("cpu")
    monkeypatch.delenv("WORLD_SIZE")
    one = read_device("cpu")
    assert (one.kind, one.count, two.count) == ("cpu", 1, 2)
    assert 2**28 < two.memory_bytes < one.memory_bytes  # processes share what there is


def test_an_address_limit_bounds_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    import psutil

    own = psutil.Process().memory_info()
    monkeypatch.setattr(resource, "getrlimit", lambda _: (own.vms + 2**30, resource.RLIM_INFINITY))
    assert devices.cpu_memory_bytes() < own.rss + 2**30 + 2**28


def write_cgroup(folder: Path, limit: str, used: int, reclaimable: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(limit + "\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\ninactive_file {reclaimable}\n")


def test_control_groups_count_up_to_the_root(tmp_path: Path) -> None:
    root, own = tmp_path / "cgroup", tmp_path / "own"
    own.write_text("0::/system/job\n")
    write_cgroup(root / "system" / "job", str(4 * GIB), GIB, GIB // 2)
    write_cgroup(root / "system", str(2 * GIB), GIB, 0)
    write_cgroup(root, "max", GIB, 0)
    assert sorted(devices._cgroup_limits(root, own)) == [(2 * GIB, GIB), (4 * GIB, GIB // 2)]


def test_control_groups_of_version_one(tmp_path: Path) -> None:
    root, own = tmp_path / "cgroup", tmp_path / "own"
    own.write_text("12:cpu,cpuacct:/job\n5:memory:/job\n")
    folder = root / "memory" / "job"
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text(f"{GIB}\n")
    (folder / "memory.usage_in_bytes").write_text("1000\n")
    (folder / "memory.stat").write_text("total_inactive_file 200\n")
    assert list(devices._cgroup_limits(root, own)) == [(GIB, 800)]
    (folder / "memory.limit_in_bytes").write_text(f"{2**63 - 4096}\n")  # how version 1 says: none
    assert list(devices._cgroup_limits(root, own)) == []
    assert list(devices._cgroup_limits(root, tmp_path / "nothing")) == []


def test_bf16_is_read_from_the_cpus_flags(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("model name: X\nflags : fpu avx512f avx512_bf16\n")
    assert devices._cpu_has_bf16(info)
    info.write_text("flags : fpu avx512f\n")
    assert not devices._cpu_has_bf16(info)
    assert not devices._cpu_has_bf16(tmp_path / "nothing")


def test_bytes_for_people() -> None:
    assert [format_bytes(x) for x in (24 * GIB, 3 * GIB // 2, 310 * 2**20, 12 * 2**10, 5)] == [
        "24 GiB", "1.5 GiB", "310 MiB", "12 KiB", "5 B",
    ]  # fmt: skip


def test_a_cards_number_is_no_size() -> None:
    assert parse_gpu("4090").name == "RTX-4090"
    assert parse_gpu("12").name == "a GPU of 12 GiB (no unit means GiB)"
    assert parse_gpu("80").memory_bytes == 80 * 2**30
    assert parse_gpu("512").memory_bytes == 512 * 2**30


def test_every_file_is_a_name() -> None:
    """However it is written; and so is each name in it. Two cards share one only where they differ in memory alone."""
    for card in cards():
        for name in (card["file"], card["names"][0]):
            for written in (name, name.upper(), name.replace("-", " "), name.replace("-", "_"), f"NVIDIA {name} GPU"):
                assert parse_gpu(written).name == card["names"][0], written
        for name in card["names"]:
            same = find_cards(name)
            assert card in same
            assert len({(other["peak_tflops"], other["bandwidth_gb_per_second"]) for other in same}) == 1
            assert len({other["label_gib"] for other in same}) == len(same)


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("4070 laptop", "RTX-4070-Laptop"), ("4070laptop", "RTX-4070-Laptop"), ("4070-laptop", "RTX-4070-Laptop"),
        ("rtx 4070 laptop", "RTX-4070-Laptop"), ("RTX 4070 Laptop GPU", "RTX-4070-Laptop"),
        ("NVIDIA GeForce RTX 4070 Laptop GPU", "RTX-4070-Laptop"), ("rtx 4070 mobile", "RTX-4070-Laptop"),
        ("3060 ti", "RTX-3060-Ti"), ("3060ti", "RTX-3060-Ti"), ("2080ti", "RTX-2080-Ti"), ("4060", "RTX-4060"),
        ("4070 ti super", "RTX-4070-Ti-SUPER"), ("4050", "RTX-4050-Laptop"), ("3060 12 GB", "RTX-3060"),
        ("rtx 4090 24gb", "RTX-4090"), ("3080 12GB", "RTX-3080-12GB"), ("3080", "RTX-3080"), ("A100 80GB", "A100-80GB"),
        ("4060 ti 8 gb", "RTX-4060-Ti-8GB"), ("4060 ti 16GB", "RTX-4060-Ti-16GB"), ("a6000", "RTX-A6000"),
    ],
)  # fmt: skip
def test_a_card_is_called_many_ways(written: str, name: str) -> None:
    assert parse_gpu(written).name == name


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("1660", "'1660' is no known card; did you mean RTX-"), ("1080ti", "RTX-2080-Ti"),
        ("gtx 1080 ti", "is no known card"), ("640", "--gpu list names all"), ("9999", "is no known card"),
        ("1e3", "is no known card"), ("4090 48GB", "is no known card"), ("4099 laptop", "did you mean RTX-4090-Laptop"),
        ("24 parsecs", "no unit of memory"), ("4060 ti", "write RTX-4060-Ti-16GB or RTX-4060-Ti-8GB"),
        ("100", "write 100GiB or A100-40GB"), ("6000", "write RTX-6000-Ada or RTX-A6000 or RTX-PRO-6000"),
    ],
)  # fmt: skip
def test_no_number_of_a_card_is_a_size(written: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_gpu(written)
    assert said in str(caught.value)
    assert "…" not in str(caught.value)


def test_all_cards_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    from lorafit.cli import main

    for flags in (["--gpu", "list"], ["--gpu", "list", "--json"]):
        with pytest.raises(SystemExit) as ended:
            main(["estimate-memory", *flags])
        assert ended.value.code == 0
        shown = capsys.readouterr().out
        for card in cards():
            assert card["names"][0] in shown
        if "--json" in flags:
            assert [card["file"] for card in json.loads(shown)["cards"]] == [card["file"] for card in cards()]
        else:
            lines = shown.splitlines()[1:]
            assert len(lines) == len(cards()) and max(map(len, lines)) < 80
            for line in lines:
                assert parse_gpu(line.split()[0]).name == line.split()[0]


def test_a_label_is_said_beside_what_it_is() -> None:
    assert parse_gpu("12GB").name == "a GPU of 12 GB = 11.2 GiB"
    assert parse_gpu("12 GiB").name == "a GPU of 12 GiB"


@pytest.mark.parametrize("number", ["3070", "3080", "4060", "4070", "4080", "4090", "5060", "5070", "5080", "5090"])
def test_a_laptops_card_is_another_than_the_desktops(number: str) -> None:
    desktop, laptop = parse_gpu(number), parse_gpu(f"rtx {number} laptop")
    assert (desktop.name, laptop.name) == (f"RTX-{number}", f"RTX-{number}-Laptop")
    assert laptop.memory_bytes < desktop.memory_bytes * 1.05  # some labels, some what torch reports
    peaks = peak_flops(desktop), peak_flops(laptop)
    assert peaks[0] is not None and peaks[1] is not None
    assert peaks[1] < peaks[0]
    torchs = find_card(f"NVIDIA GeForce RTX {number} Laptop GPU")  # the name that torch reports
    assert torchs is not None
    assert torchs["names"][0] == laptop.name


def test_peaks_are_those_of_cores_and_clocks() -> None:
    """Two operations a multiply-add, times two: a tensor core adds 16-bit products in float32 at twice the rate of the
    cores; the clock is that of the highest power a laptop may give the card without a boost."""
    cores_and_clocks = {
        "RTX-4090-Laptop": (9728, 2040), "RTX-4080-Laptop": (7424, 2280), "RTX-4070-Laptop": (4608, 2175),
        "RTX-4060-Laptop": (3072, 2370), "RTX-4050-Laptop": (2560, 2370), "RTX-3080-Ti-Laptop": (7424, 1590),
        "RTX-3080-Laptop": (6144, 1710), "RTX-3070-Laptop": (5120, 1620), "RTX-3060-Laptop": (3840, 1703),
        "RTX-4070": (5888, 2475), "RTX-5060": (3840, 2497), "RTX-5060-Ti-16GB": (4608, 2572),
        "RTX-5070": (6144, 2512), "RTX-5070-Ti": (8960, 2452), "RTX-3050": (2560, 1777), "RTX-3060-Ti": (4864, 1665),
        "RTX-3070-Ti": (6144, 1770), "RTX-3080-12GB": (8960, 1710), "RTX-3080-Ti": (10240, 1665),
        "RTX-3090-Ti": (10752, 1860), "RTX-4060": (3072, 2460), "RTX-4060-Ti-8GB": (4352, 2535),
        "RTX-4070-SUPER": (7168, 2475), "RTX-4070-Ti-SUPER": (8448, 2610), "RTX-4080-SUPER": (10240, 2550),
    }  # fmt: skip
    for name, (cores, megahertz) in cores_and_clocks.items():
        card = find_card(name)
        assert card is not None
        assert card["peak_tflops"] == pytest.approx(4e-6 * cores * megahertz, abs=0.06), name
    turing = {  # its tensor cores add at the rate of Ampere's with twice the cores
        "RTX-2060": (1920, 1680), "RTX-2060-12GB": (2176, 1650), "RTX-2060-SUPER": (2176, 1650),
        "RTX-2070": (2304, 1620), "RTX-2070-SUPER": (2560, 1770), "RTX-2080": (2944, 1710),
        "RTX-2080-SUPER": (3072, 1815), "RTX-2080-Ti": (4352, 1545),
    }  # fmt: skip
    for name, (cores, megahertz) in turing.items():
        card = find_card(name)
        assert card is not None and capability_of(card) < (8, 0)
        assert card["peak_tflops"] == pytest.approx(8e-6 * cores * megahertz, abs=0.06), name
    sparse_in_4_bits = {"RTX-5090-Laptop": 1824, "RTX-5080-Laptop": 1334, "RTX-5070-Ti-Laptop": 992,
                        "RTX-5070-Laptop": 798}  # fmt: skip
    for name, tops in sparse_in_4_bits.items():
        card = find_card(name)
        assert card is not None
        assert card["peak_tflops"] == pytest.approx(tops / 16, abs=0.06), name
