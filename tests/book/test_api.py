"""The reference lists every module of the package, and reads docstrings of the house's form."""

import re

from book import api, pages


def test_each_folder_has_a_page_in_their_order_and_each_module_is_listed_once():
    overview, *others = api.pages().items()
    package = pages.ROOT / "lmm_sae_nb"
    folders = [name for name in [*api.layers(), *api.ON_TOP] if (package / name / "__init__.py").is_file()]
    assert [name for name, _ in others] == [f"reference/{folder}" for folder in folders]
    assert re.findall(r"^\| \[(\w+)\]\(reference/\1\) \| \S", overview[1], re.MULTILINE) == folders
    for folder, (_, text) in zip(folders, others, strict=True):
        modules = (file.relative_to(pages.ROOT) for file in (package / folder).rglob("[!_]*.py"))
        listed = re.findall(rf"automodule:: (lmm_sae_nb\.{folder}\.[\w.]+)\n", text)
        assert sorted(listed) == sorted(".".join(file.with_suffix("").parts) for file in modules)


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
