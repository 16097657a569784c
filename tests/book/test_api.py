"""The reference page lists every module of the package, and reads docstrings of the house's form."""

import re

from book import api, pages


def test_every_module_is_listed_once_and_folders_stand_in_their_order():
    text = api.page()
    listed = re.findall(r"automodule:: (lmm_sae_nb\.\w+\.[\w.]+)\n", text)
    package = pages.ROOT / "lmm_sae_nb"
    modules = {
        ".".join(file.relative_to(pages.ROOT).with_suffix("").parts)
        for file in package.glob("*/**/[!_]*.py")
    }  # fmt: skip
    assert sorted(listed) == sorted(modules)
    folders = re.findall(r"^## (\w+)", text, re.MULTILINE)
    assert folders == [name for name in [*api.layers(), *api.ON_TOP] if (package / name / "__init__.py").is_file()]


def test_a_folders_modules_stand_in_the_reading_order_of_its_docstring(tmp_path):
    folder = tmp_path / "lmm_sae_nb" / "sae"
    (folder / "inner").mkdir(parents=True)
    for name in ("__init__", "a", "b", "c", "inner/d", "inner/__init__"):
        (folder / f"{name}.py").write_text('"""Read c.py, then inner/d.py, then a.py."""' if name == "__init__" else "")
    order = [name.removeprefix("lmm_sae_nb.sae.") for name in api.modules(folder)]
    assert order == ["c", "inner.d", "a", "b"]


def test_arguments_and_errors_of_a_docstring_become_lists_and_no_other_text_is_markup():
    lines = """\
Return a*b, which `c|d` needs: not `x`_ alone.

a, b: the (rows, cols) of one.
c: two
    lines.

See: nothing is an argument here.

Raises:
    ValueError: `a` is
        negative.
    KeyError: none.""".splitlines()
    assert [line for line in api.restructured(lines, {"a", "b", "c"}) if line] == [
        r"Return a\*b, which ``c|d`` needs: not ``x``\_ alone.",
        ":param a: the (rows, cols) of one.",
        ":param b: the (rows, cols) of one.",
        ":param c: two lines.",
        "See: nothing is an argument here.",
        ":raises ValueError: ``a`` is negative.",
        ":raises KeyError: none.",
    ]
