"""A key is checked when it comes in, and gets into no text, in whatever form somebody repeats it."""

import base64
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import given
from hypothesis import strategies as st
from papermill import PapermillExecutionError

from lmm_sae_nb.benchmarks.faulty_server import FAULTS, serving
from lmm_sae_nb.chat.keys import Mask, read_key
from lmm_sae_nb.support import notebooks

KEY = "sk-Secret+with/signs=0123456789"


def test_white_space_at_the_ends_is_no_part_of_a_key(monkeypatch):
    monkeypatch.setenv("A_KEY", f" \t{KEY}\r\n")
    assert read_key("A_KEY", "http://host/v1") == KEY
    assert read_key("", "http://host/v1") == ""


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("", "is not set, or empty"), (" \n", "is not set, or empty"), ("sk-Sec\nret", "white space inside"),
        ("sk-Sec\tret", "white space inside"), ("Bearer sk-Secret", "white space inside"),
        ("sk-Sec  ret", "white space inside"), ("sk-Secret\u2011x", "other than printable ASCII"),
        ("sk-Sec\x7fret", "other than printable ASCII"), ("sk-Sécret", "other than printable ASCII"),
        ('"sk-Secret"', "quotes around"), ("'sk-Secret'", "quotes around"), ("\u00a0sk-Secret\u200b", "other than"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_key_is_refused_without_showing_it(monkeypatch, value, message):
    monkeypatch.setenv("A_KEY", value)
    with pytest.raises(ValueError, match=f"A_KEY, which is to hold the key for http://host/v1, .*{message}") as caught:
        read_key("A_KEY", "http://host/v1")
    assert "Sec" not in str(caught.value) and "Séc" not in str(caught.value)


@pytest.mark.parametrize(
    "said",
    [
        KEY, KEY.upper(), f"{KEY}{KEY}", KEY[:-3] + "***", f"...{KEY[5:20]}", quote(KEY, safe=""), quote_plus(KEY),
        quote(KEY), quote(KEY, safe="").replace("-", "%2D"), KEY.encode().hex(), KEY.encode().hex(" ").replace(" ", ""),
        base64.b64encode(KEY.encode()).decode(), base64.urlsafe_b64encode(KEY.encode()).decode(),
        *(base64.b64encode(("x" * n + KEY + "y" * n).encode()).decode() for n in (1, 2, 3)),
    ],
)  # fmt: skip
def test_a_key_is_hidden_in_whatever_form(said):
    shown = Mask(KEY)(f"a {said} b")
    hidden = shown.replace("[key]", "")
    assert "[key]" in shown and shown.startswith("a ") and shown.endswith(" b")
    assert len(hidden) <= len("a  b") + 12, hidden  # of base64, what the bytes beside the key decide


@given(st.text(), st.text(), st.integers(0, 31))
def test_other_text_stays(before, after, size):
    key = "0" * 31  # no piece of it is in most texts
    piece = KEY[:size]
    assert Mask("")(piece) == piece
    if "000" not in before + after and "://" not in before + after:
        assert Mask(key)(f"{before}x{key}x{after}") == f"{before}x[key]x{after}"


def test_the_password_of_an_address_is_hidden():
    assert Mask("")("proxy http://me:word@host:3128/ failed") == "proxy http://[name]@host:3128/ failed"


ASKING = """# ---
# jupyter:
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% tags=["parameters"]
run: str = "a"  # of the results
model: str = ""  # that is asked
texts: list[str] = []  # of the questions

# %%
from lmm_sae_nb.chat.questions import Question
from lmm_sae_nb.chat.recorded import Recorded, ask, open_chat

chat = Recorded(open_chat(model, key_variable="LOOPBACK_KEY", timeout=20.0), "replies.jsonl")
replies = [ask(chat, [Question(text) for text in texts[at::2]]) for at in (0, 1)]
print(*replies, chat.counts)
replies

# %%
ask(chat, [Question("401")])
"""


@pytest.mark.slow
def test_an_executed_notebook_holds_no_part_of_a_key_that_the_server_repeats(root, tmp_path, monkeypatch):
    monkeypatch.setenv("LOOPBACK_KEY", f"{KEY}\n")
    monkeypatch.setenv("PYTHONPATH", str(root))
    monkeypatch.setenv("IPYTHONDIR", notebooks.quiet_kernels(tmp_path / "ipython"))
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "page.py").write_text(ASKING)
    notebooks.convert(tmp_path / "page.py", tmp_path / "page.ipynb")
    echoes = ["a good one", *(name for name in FAULTS if name.startswith("echo"))]
    with serving(key=KEY) as server:
        values = {"model": f"m@{server.url}", "texts": echoes}
        with pytest.raises(PapermillExecutionError, match="refuses the key in LOOPBACK_KEY") as caught:
            notebooks.execute(tmp_path / "page.ipynb", tmp_path / "made.ipynb", values, root=tmp_path)
        assert {*server.times()} == {*echoes, "401"}
    executed = (tmp_path / "made.ipynb").read_text()
    assert "heard: a good one" in executed and "[key]" in executed and "EndpointError" in executed
    coded = base64.b64encode(f"Bearer {KEY}".encode()).decode().rstrip("=")[10:]
    pieces = [secret[at : at + 8] for secret in (KEY, coded) for at in range(len(secret) - 7)]
    for text in (executed, (tmp_path / "replies.jsonl").read_text(), str(caught.value)):
        assert not [piece for piece in pieces if piece in text]
