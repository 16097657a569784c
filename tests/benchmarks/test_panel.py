"""The panel: the order of its tasks, what is made again after a kill or a change, and what the file says."""

import json
from types import SimpleNamespace

import pytest

from lmm_sae_nb.benchmarks import panel, panel_saes, seeds
from lmm_sae_nb.benchmarks.panel_saes import Member, Pass
from lmm_sae_nb.benchmarks.tasks import Task, do_tasks
from lmm_sae_nb.controls.chain import PartResult
from lmm_sae_nb.show.panel import MeasuredPart, read_panel, write_panel
from lmm_sae_nb.support.files import read_json, write_json

# ---- tasks ----------------------------------------------------------------------------------------------------------


def logged(log, name, fails=False):
    def call():
        log.append(name)
        if fails:
            raise OSError(f"no {name}")

    return call


def test_a_task_waits_for_those_before_it_and_a_failure_stops_only_those_behind_it():
    log, ended = [], {}
    tasks = {
        "last": Task(logged(log, "last"), after=("one", "two")),
        "one": Task(logged(log, "one")),
        "bad": Task(logged(log, "bad", fails=True)),
        "two": Task(logged(log, "two"), after=("one",)),
        "behind": Task(logged(log, "behind"), after=("bad",)),
        "further": Task(logged(log, "further"), after=("behind",)),
    }
    failed = do_tasks(tasks, 0, lambda name, error: ended.update({name: error}))
    assert log.index("one") < log.index("two") < log.index("last")
    assert set(log) == {"one", "two", "last", "bad"}
    assert failed["bad"] == "OSError: no bad"
    assert failed["behind"].endswith("bad failed")
    assert failed["further"].endswith("behind failed")
    assert ended.keys() == tasks.keys()


def test_a_circle_or_an_unknown_task_is_refused():
    with pytest.raises(ValueError, match=r"\['x'\], which are not among them"):
        do_tasks({"a": Task(list, after=("x",))}, 0, print)
    with pytest.raises(ValueError, match=r"\['a', 'b'\] wait for each other"):
        do_tasks({"a": Task(list, after=("b",)), "b": Task(list, after=("a",))}, 0, print)


def write(path, text):
    path.write_text(text)


@pytest.mark.slow
def test_processes_work_side_by_side(tmp_path):
    tasks = {str(n): Task(write, (tmp_path / str(n), f"{n}"), ("0",) if n else ()) for n in range(4)}
    assert do_tasks(tasks, 2, lambda *_: None) == {}
    assert sorted(path.read_text() for path in tmp_path.iterdir()) == ["0", "1", "2", "3"]


# ---- resuming -------------------------------------------------------------------------------------------------------

SAES = {
    "one": Member("the first", "seed", "first"),
    "two": Member("the second", "seed", "second"),
    "made": Member("a dictionary", "control"),
}


def names_part(case):
    return PartResult({"named": len(case.name)}, [], {3: {"concept": case.name}})


def reading_part(case):
    return PartResult({"letters": sum(map(len, (row["concept"] for row in case.rows("names").values())))}, ["little"])


def model_part(case):
    return {"accuracy": 0.123456789}


def empty_part(case):
    raise ValueError("no latent has a name; name some")


@pytest.fixture
def log(tmp_path, monkeypatch):
    """What was made, in order. A project in which all is small; making is writing a file."""
    made = []
    (tmp_path / "pyproject.toml").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(panel, "SAES", SAES)
    monkeypatch.setattr(panel_saes, "SAES", SAES)
    monkeypatch.setattr(panel, "FIRST", "one")
    monkeypatch.setattr(panel, "PASSES", {"first": Pass(), "second": Pass(1)})
    monkeypatch.setattr(panel, "inputs", lambda: {"pages": {"01": {"k": 4}}})
    monkeypatch.setattr(panel, "_data", lambda: {"scenes": "a"})

    def make(sae):
        write_json(panel_saes.sae_folder(sae) / "sae.safetensors", {"name": sae})

    def train(name, saes):
        made.append(f"train {name}")
        assert all(SAES[sae].trained_in == name for sae in saes)
        for sae in saes:
            make(sae)

    monkeypatch.setattr(panel_saes, "train", train)
    monkeypatch.setattr(panel_saes, "build", lambda name: (made.append(f"build {name}"), make(name)))
    monkeypatch.setattr(panel_saes, "cache_all", lambda model, saes: made.append("cache"))

    def counted(part):
        def measure(case):
            made.append(f"{case.part}, {case.name}")
            return part(case)

        return measure

    parts = {
        "names": panel.Part(counted(names_part), (names_part,)),
        "reads": panel.Part(counted(reading_part), (reading_part,), reads=("names",)),
        "plain": panel.Part(counted(model_part), (model_part,), of_model=True),
    }
    monkeypatch.setattr(panel, "PARTS", parts)
    return made


def measure_all(parts=("names", "reads", "plain")):
    failed = panel.run(panel.make_tasks(list(SAES), list(parts)), 0)
    assert not failed, failed
    return panel.collect({"date": "2026-11-30"})


def measured(log):
    return [name for name in log if ", " in name]


def test_every_part_of_every_sae_is_measured_once_and_in_order(log):
    found = measure_all()
    assert log[:4] == ["train first", "train second", "build made", "cache"]
    assert sorted(measured(log)) == sorted(
        [f"{part}, {sae}" for part in ("names", "reads") for sae in SAES] + ["plain, model"]
    )
    assert (found.missing, list(found.saes)) == ([], [*SAES, "model"])
    assert found.column("reads", "letters") == {"one": 3, "two": 3, "made": 4}
    assert found.saes["one"].parts["reads"].why == ["little"]
    assert found.find("model", "plain", "accuracy") == 0.12346
    assert found.group("control") == ["made"]
    log.clear()
    assert measure_all() == found
    assert measured(log) == []


def test_a_killed_panel_has_what_is_finished_and_goes_on(log, monkeypatch):
    whole = panel.PARTS["reads"].measure

    def killed(case):
        if case.name == "two":
            raise KeyboardInterrupt
        return whole(case)

    parts = dict(panel.PARTS)
    monkeypatch.setitem(panel.PARTS, "reads", panel.Part(killed, (reading_part,), reads=("names",)))
    monkeypatch.setattr(panel, "code_of", lambda part: {"code": "the same"})
    with pytest.raises(KeyboardInterrupt):
        measure_all()
    found = panel.collect({})
    assert found.missing == ["two, reads", "made, reads", "model, plain"]
    assert found.column("reads", "letters") == {"one": 3}
    monkeypatch.setattr(panel, "PARTS", parts)
    log.clear()
    assert measure_all().missing == []
    assert measured(log) == ["reads, two", "reads, made", "plain, model"]


def test_a_part_is_measured_again_if_what_decides_it_has_changed(log, monkeypatch):
    measure_all()
    log.clear()
    weights = panel_saes.sae_folder("two") / "sae.safetensors"
    monkeypatch.setattr(panel_saes, "train", lambda name, saes: None)  # it would write the old weights again
    write_json(weights, {"name": "other weights"})
    measure_all()
    assert measured(log) == ["names, two", "reads, two"]
    log.clear()
    monkeypatch.setattr(panel, "inputs", lambda: {"pages": {"01": {"k": 5}}})
    measure_all()
    assert len(measured(log)) == 7


def test_a_part_with_too_little_to_measure_says_why_and_does_not_stop_the_others(log, monkeypatch):
    monkeypatch.setitem(panel.PARTS, "names", panel.Part(empty_part, ()))
    monkeypatch.delitem(panel.PARTS, "reads")
    found = measure_all(("names", "plain"))
    assert found.missing == []
    assert found.saes["two"].parts["names"].metrics == {}
    assert found.saes["two"].parts["names"].why == ["names: no latent has a name; name some"]


def test_only_the_saes_that_are_read_are_made(log, monkeypatch):
    measured_alone = panel.make_tasks(["made"], ["names"])
    assert [name for name in measured_alone if ", " not in name] == ["train first", "build made", "cache "]
    monkeypatch.setitem(panel.PARTS, "names", panel.Part(names_part, (), other=lambda sae: "two"))
    assert "train second" in panel.make_tasks(["made"], ["names"])


def test_each_model_s_saes_are_cached_in_a_folder_of_that_model(log, monkeypatch):
    other = Member("of a model with new weights", "control", "second", "untrained")
    for module in (panel, panel_saes):
        monkeypatch.setattr(module, "SAES", SAES | {"other": other})
    tasks = panel.make_tasks(["one", "made", "other"], ["names"])
    assert tasks["cache "].arguments == ("", ("one", "made"))
    assert tasks["cache untrained"].arguments == ("untrained", ("other",))
    assert [name for name in tasks["names, other"].after if name.startswith("cache")] == ["cache untrained"]
    models = {member.model for member in panel_saes.SAES.values()}
    assert len({panel_saes.caches_of(model) for model in models}) == len(models) == 2


def test_a_part_can_be_of_some_saes_only(log, monkeypatch):
    monkeypatch.setitem(panel.PARTS, "reads", panel.Part(reading_part, (), reads=("names",), saes=("made",)))
    found = measure_all()
    assert (found.missing, list(found.column("reads", "letters"))) == ([], ["made"])


def test_an_earlier_panel_stands_in_for_what_is_not_measured_here(log, monkeypatch):
    earlier = measure_all()
    panel.part_file("two", "reads").unlink()
    panel.part_file("one", "names").write_text("{}")
    found = panel.collect({"date": "2026-12-01"}, earlier)
    assert found.missing == []
    assert found.saes == earlier.saes
    assert found.made["kept"] == {"date": "2026-11-30", "parts": ["names", "reads"]}
    monkeypatch.setattr(panel, "inputs", lambda: {"pages": {"01": {"k": 4}}, "sizes": {"new": 3}})
    assert panel.collect({}, earlier).missing == []
    monkeypatch.setattr(panel, "inputs", lambda: {"pages": {"01": {"k": 8}}})
    with pytest.raises(ValueError, match="another recipe"):
        panel.collect({}, earlier)


def test_saes_can_be_kept_as_they_are(log):
    measure_all()
    log.clear()
    tasks = panel.make_tasks(list(SAES), ["names"], keep=True)
    assert panel.run(tasks, 0) == {}
    assert log == []


@pytest.mark.usefixtures("unchecked")
def test_code_counts_and_layout_does_not(log, monkeypatch):
    source = "def measure(case):\n    return {{'a': {}}}  # {}\n"
    texts = {"now": source.format(1, "one"), "comment": source.format(1, "two"), "changed": source.format(2, "one")}
    hashes = {}
    for name, text in texts.items():
        monkeypatch.setattr(panel.inspect, "getsource", lambda _, text=text: text)
        hashes[name] = panel._statements(SimpleNamespace())
    assert hashes["now"] == hashes["comment"] != hashes["changed"]


def test_only_what_was_asked_for_is_measured_and_the_rest_is_named_as_missing(log):
    found = measure_all(parts=("names",))
    assert set(found.missing) == {"one, reads", "two, reads", "made, reads", "model, plain"}
    assert read_json(panel.part_file("one", "names"))["metrics"] == {"named": 3}


def test_the_file_is_read_as_it_was_written(log, tmp_path):
    found = measure_all()
    write_panel(tmp_path / "panel.json", found)
    assert read_panel(tmp_path / "panel.json") == found
    assert read_panel("") is None


def test_numbers_and_their_ends_stand_together():
    part = MeasuredPart.of({"fvu": 0.123456, "fvu_low": 0.1, "fvu_high": 0.2, "asked": 3, "odd_low": 1}, 2.5, [])
    assert part.metrics == {"fvu": (0.12346, 0.1, 0.2), "asked": 3, "odd_low": 1}


# The committed panel.

RENEW = f"renew it with: {panel.COMMAND}"


def test_the_committed_panel_is_of_the_shipped_recipe(root):
    known = read_json(root / "book/panel.json")["recipe"]
    changed = seeds.differences(known, json.loads(json.dumps(panel.inputs())))
    assert not changed, "\n".join(["book/panel.json is of another recipe.", *changed, RENEW])


def test_the_committed_panel_holds_every_part_of_every_sae(root):
    found = read_panel(root / "book/panel.json")
    assert found.missing == [], RENEW
    for name in panel.SAES:
        of_sae = {part for part, each in panel.PARTS.items() if each.is_for(name)}
        assert found.saes[name].parts.keys() == of_sae, f"{name}; {RENEW}"
        assert (found.saes[name].about, found.saes[name].group) == (panel.SAES[name].about, panel.SAES[name].group)
    of_model = {part for part, each in panel.PARTS.items() if each.of_model}
    assert found.saes[panel.MODEL].parts.keys() == of_model, RENEW
    assert (root / "book/panel.json").stat().st_size < 700_000


def test_only_consistency_with_another_model_is_left_out_of_the_committed_panel(root):
    found = read_panel(root / "book/panel.json")
    empty = {(name, part) for name, sae in found.saes.items() for part, one in sae.parts.items() if not one.metrics}
    other_models = [name for name, member in panel.SAES.items() if member.model]
    assert empty == {(name, "consistency") for name in other_models}
    assert all("no comparison" in found.saes[name].parts["consistency"].why[0] for name in other_models)
