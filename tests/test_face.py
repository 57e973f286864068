"""What a user types first."""
import subprocess, sys

import pytest


def test_five_names_and_nothing_heavy_before_they_are_asked_for():
    code = ("import sys, radrotator; early = {'torch', 'numpy'} & set(sys.modules);"
            "from radrotator import RadRotator, Radiograph, CT, read_radiograph, read_ct;"
            "sys.exit(0 if not early and callable(Radiograph.write) and 'RadRotator' in dir(radrotator) else 1)")
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("room", ["image", "read", "write"])
def test_a_radiograph_reads_and_writes_wherever_it_was_taken_from(room):
    code = f"from radrotator.radiograph.{room} import Radiograph; Radiograph.write, Radiograph.read"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_other_names_are_no_attributes():
    import radrotator
    with pytest.raises(AttributeError, match="Nobody"): radrotator.Nobody
