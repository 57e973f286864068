"""The rules of the house (CONTRIBUTING.md): each test names the offender."""
import subprocess, sys
from pathlib import Path

import pytest

from scripts import load_script

ROOT = Path(__file__).resolve().parents[1]
house = load_script("house")
ROOMS = house.rooms(ROOT/"radrotator")
LINES, COLUMNS, CELL, PUBLIC, KILOBYTES = 300, 120, 40, 12, 250

# Rooms that may have more public names than a reader keeps in mind, each with its reason.
MANY = {
}

# What is still to be mended. A test that passes although it stands here fails: take it off the list.
WIDE_ROOMS = """
""".split()  # lines, names or length
LARGE_NOTEBOOKS = """
""".split()  # kilobytes or cells


def to_mend(params, waiting, name):
    "Parameters of a test; those that wait to be mended are expected to fail"
    mark = pytest.mark.xfail(strict=True, reason="still to be mended")
    return [pytest.param(one, id=name(one), marks=mark if name(one) in waiting else ()) for one in params]



def named(offenders): return "\n" + "\n".join(map(str, offenders))


def test_imports_go_down():
    upward = [f"{room.name}:{line} imports {other}" for room in ROOMS for other, line in room.imports
              if other and house.floor(other.split(".")[0]) > house.floor(room.wing)]
    assert not upward, named(upward)


def number_rooms():
    "Module → its folder and its number there"
    numbers = {}
    for path in house.notebooks():
        first = "".join(house.json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"])
        if "default_exp" in first: numbers[first.split("default_exp")[1].split()[0]] = path.parent, int(path.name[:2])
    return numbers


def test_within_a_wing_imports_follow_the_numbers():
    "Rooms of one number stand side by side: none imports another"
    numbers = number_rooms()
    pairs = [(room, other, line) for room in ROOMS for other, line in room.imports if room.name in numbers and other in numbers]
    backward = [f"{room.name}:{line} imports {other}" for room, other, line in pairs
                if numbers[other][0] == numbers[room.name][0] and numbers[other][1] >= numbers[room.name][1]]
    assert len(pairs) > 200 and not backward, named(backward)


def test_inference_stands_alone():
    "To load weights and turn a radiograph nobody needs CT, phantoms, renderers or training"
    upward = [f"{room.name}:{line} imports {other}" for room in ROOMS if room.wing in house.INFERENCE for other, line in room.imports
              if other and other.split(".")[0] not in house.INFERENCE]
    assert not upward, named(upward)
    code = ("import sys, radrotator.rotate.rotator; heavy = {'numba', 'nibabel', 'diffdrr', 'nanodrr', 'accelerate'} & set(sys.modules);"
            "sys.exit(', '.join(sorted(heavy)) or 0)")
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0, f"a rotation imports {ran.stderr}"


@pytest.mark.parametrize("room", to_mend(ROOMS, WIDE_ROOMS, lambda room: room.name))
def test_a_room_is_a_room(room):
    wide = [f"line of {len(line)} columns: {line.strip()[:80]}…" for line in room.lines if len(line) > COLUMNS]
    crowd = [f"{len(room.public)} public names"]*(len(room.public) > PUBLIC and room.name not in MANY)
    long = [f"{len(room.code)} lines of code"]*(len(room.code) > LINES)
    assert not long + wide + crowd, named(long + wide + crowd)


@pytest.mark.parametrize("path", to_mend(house.notebooks(), LARGE_NOTEBOOKS, lambda path: path.relative_to(ROOT/"nbs").as_posix()))
def test_a_notebook_is_a_chapter(path):
    long = [f"exported cell of {len(lines)} lines: {lines[0]}" for lines in house.exported_cells(path) if len(lines) > CELL]
    large = [f"{path.stat().st_size//1000} KB"]*(path.stat().st_size > 1000*KILOBYTES)
    assert not long + large, named(long + large)


def processor_seconds(*words):
    "Of the better of three runs: the first one may compile"
    def once():
        before = sum(house_times())
        subprocess.run([sys.executable, *words], capture_output=True, cwd=ROOT)
        return sum(house_times()) - before
    return min(once() for _ in range(3))


def house_times():
    "User and system time of the children that have ended"
    import resource
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime, used.ru_stime


def test_the_package_is_imported_at_once():
    bare = processor_seconds("-c", "pass")
    assert processor_seconds("-c", "import radrotator") - bare < 0.05


@pytest.mark.parametrize("line", ["--help", "rotate nofile.png --z 5 -o turned.png", "rotate nofile.png --z 50 -o turned.png"])
def test_a_mistake_is_told_at_once(line):
    assert processor_seconds("-m", "radrotator", *line.split()) < 0.5
