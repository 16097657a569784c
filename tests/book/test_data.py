"""Every borrowed picture is listed with its source and its hash, and nothing is listed that is not there."""

import hashlib
import re

from lmm_sae_nb.pictureworld.world.concepts import EMOJI_FACES, EMOJI_OBJECTS


def test_the_table_is_the_folder(root):
    art = root / "data" / "pictureworld" / "art"
    table = dict(
        re.findall(r"\| `([\w-]+\.png)` \|.*\| `([0-9a-f]{64})` \|", (root / "data" / "README.md").read_text())
    )
    assert table == {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in art.glob("*.png")}


def test_every_drawing_that_a_scene_can_use_is_shipped_and_no_other(root):
    used = {*EMOJI_OBJECTS.values(), *(code for codes in EMOJI_FACES.values() for code in codes)}
    assert {file.stem for file in (root / "data" / "pictureworld" / "art").glob("*.png")} == used
