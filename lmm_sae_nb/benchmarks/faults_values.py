"""Faults of what people bring: weights, presets, pictures, hostile text, and files that carry code."""

from __future__ import annotations

import io
import json
import math
import pickle
import random
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from lmm_sae_nb.benchmarks.faults_endings import Ending, compare, error_ending
from lmm_sae_nb.benchmarks.faults_files import READS
from lmm_sae_nb.benchmarks.faults_world import MODEL, World, begin_project
from lmm_sae_nb.cache.latent_cache import LatentCache
from lmm_sae_nb.chat.local import LocalChat
from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.sae.formats import FORMATS, SAEWeights, write_sae
from lmm_sae_nb.sae.topk import TopKSAE
from lmm_sae_nb.show import plots, rater, steering_panel, tables, thumbnails
from lmm_sae_nb.show.feature_browser import FeatureBrowser
from lmm_sae_nb.show.latent_table import LatentTable
from lmm_sae_nb.show.report import metrics_table
from lmm_sae_nb.steer.experiments import CaseStudy
from lmm_sae_nb.support import notebooks, presets
from lmm_sae_nb.support.files import write_json
from lmm_sae_nb.support.images import open_images
from lmm_sae_nb.support.intervals import Mean
from lmm_sae_nb.support.stages import Stage

# ---- weights ---------------------------------------------------------------------------------------------------


class Broken(NamedTuple):
    """What is wrong with an SAE.

    case: in words.
    names: of which an error must have one.
    wanted: dtype in which the SAE can be read all the same.
    """

    case: str
    names: list[str]
    wanted: torch.dtype | None = None


DTYPES = (torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.bool)


def _value(tensors: dict, name: str, config: Path, rng: random.Random) -> Broken:
    bad = rng.choice((math.nan, math.inf, -math.inf))
    tensors[name].view(-1)[rng.randrange(tensors[name].numel())] = bad
    return Broken(f"{name} has {bad}", [name])


def _shape(tensors: dict, name: str, config: Path, rng: random.Random) -> Broken:
    usual = tensors[name]
    other = rng.choice((torch.cat([usual, usual[:1]]), usual[:-1], usual[None], usual.flatten()[:, None])).contiguous()
    tensors[name] = other
    return Broken(f"{name} is {tuple(other.shape)}, not {tuple(usual.shape)}", [str(tuple(other.shape))])


def _dtype(tensors: dict, name: str, config: Path, rng: random.Random) -> Broken:
    dtype = rng.choice(DTYPES)
    tensors[name] = tensors[name].to(dtype)
    return Broken(f"{name} is {dtype}", [str(dtype).removeprefix("torch.")])


def _dtypes(tensors: dict, name: str, config: Path, rng: random.Random) -> Broken:
    dtype = rng.choice(DTYPES[:4])
    tensors |= {each: tensor.to(dtype) if tensor.is_floating_point() else tensor for each, tensor in tensors.items()}
    names = [str(dtype).removeprefix("torch.")]
    return Broken(f"all tensors are {dtype}", names, dtype if dtype.is_floating_point else None)


def _size(tensors: dict, name: str, config: Path, rng: random.Random) -> Broken:
    new, value = rng.choice((0, -1, 25, 3.7, True, "3", None, [], 10**30)), json.loads(config.read_text())
    value.get("trainer", value)["k"] = new
    config.write_text(json.dumps(value))
    return Broken(f"k is {new!r}", [config.name])


def _missing(tensors: dict, name: str, config: Path, rng: random.Random) -> Broken:
    del tensors[name]
    return Broken(f"{name} is missing", [name])


def weights(world: World, place: Path, seed: int) -> Ending:
    """Break the weights or the config of an SAE in one of the three formats, and load it."""
    rng, folder = random.Random(seed), begin_project(place) / "sae"
    format = rng.choice(list(FORMATS))
    rows = torch.randn(24, 16, generator=torch.Generator().manual_seed(seed))
    rows = torch.nn.functional.normalize(rows, dim=1)
    write_sae(folder, SAEWeights(rows, torch.zeros(24), rows.clone(), torch.zeros(16), 3), format)
    file, pickled = folder / FORMATS[format].weights, FORMATS[format].weights.endswith(".pt")
    tensors = torch.load(file) if pickled else load_file(file)
    way = rng.choice((_value, _shape, _dtype, _dtypes, _size, _missing))
    broken = way(tensors, rng.choice(FORMATS[format].names), folder / FORMATS[format].config, rng)
    torch.save(tensors, file) if pickled else save_file(tensors, file)

    def read() -> object:
        sae = TopKSAE.load(folder)
        return sae.k, sae.W_dec.detach().float().tolist()

    wanted = broken.wanted and (3, rows.to(broken.wanted).float().tolist())
    ending = compare(f"{format}, {broken.case}", read, wanted, broken.names)
    return ending._replace(reason="it was accepted") if wanted is None and ending.ending == "another result" else ending


# ---- presets ---------------------------------------------------------------------------------------------------

VALUES = (2024, 3.7, "word", "", True, None, [], [1], {}, {"a": 1}, "2", math.inf, -1, 10**30, "a\tb", 'a"b', "ü")
BROKEN = {
    "a tab": b"run:\tfaults\n\tseed: 1\n",
    "a quotation mark": b'run: "faults\nseed: 1\n',
    "latin-1": "run: \u00fcbung\n".encode("latin-1"),
    "a list": b"- run\n- seed\n",
    "a number": b"3\n",
    "brackets": b"run: " + b"[" * 20_000 + b"]" * 20_000,
    "aliases": b"a: &a [x, x, x, x, x, x, x, x, x]\n"
    + b"".join(b"%c: &%c [%s]\n" % (98 + n, 98 + n, b",".join([b"*%c" % (97 + n)] * 9)) for n in range(9)),
    "zeros": b"run: faults\0\0\0\n",
    "an unknown name": b"no_such_parameter: 1\n",
    "an unknown notebook": b"99_nothing:\n  seed: 1\n",
    "an alias of itself": b"run: &a [*a]\n",
}


def preset(world: World, place: Path, seed: int) -> Ending:
    """Give a parameter a value of another type, or a preset that is no YAML, and read the preset."""
    import yaml

    rng, file = random.Random(seed), begin_project(place) / "mine.yaml"
    if rng.random() < 0.2:
        case, data = rng.choice(list(BROKEN.items()))
        file.write_bytes(data)
        ending = compare(case, lambda: presets.preset(file), None, [file.name])
        return ending._replace(reason="it was accepted") if ending.ending == "another result" else ending
    page = rng.choice(notebooks.sources())
    name, parameter = rng.choice(list(notebooks.parameters(page).items()))
    default, value, given = parameter.default, rng.choice(VALUES), name
    inside = rng.choice(list(default)) if isinstance(default, dict) and default else None
    if inside:
        default, given = default[inside], inside
    file.write_text(yaml.safe_dump({page.stem: {name: {inside: value} if inside else value}}))
    case = f"{page.stem}: {name}{f', {inside}' if inside else ''}: {value!r}"
    try:
        read = presets.preset(file)[page.stem][name]
    except Exception as error:
        return error_ending(case, error, [given, name]) if file.name in str(error) else error_ending(case, error, [])
    read = read[inside] if inside else read
    if (
        read == value
        and type(read) is type(value)
        and (_fits(value, default) or (parameter.type == "int or str" and isinstance(value, str)))
    ):
        return Ending(case, "as usual")  # a name is checked where the model is known
    if isinstance(default, str) and type(value) in (int, float, bool) and read in file.read_text():  # as it is written
        return Ending(case, "as usual")
    return Ending(case, "another result", f"{read!r} was accepted in the place of {default!r}")


def _fits(value: object, default: object) -> bool:
    """Whether a value can stand in the place of a default; only an integer may be given where a float is."""
    if isinstance(default, float):
        return type(value) in (int, float)
    if isinstance(default, list) and default and isinstance(value, list):
        return all(_fits(each, default[0]) for each in value)
    return default is None or type(value) is type(default)


# ---- pictures --------------------------------------------------------------------------------------------------

TURNS = {  # what the EXIF tag Orientation says, in NumPy
    1: lambda p: p, 2: lambda p: p[:, ::-1], 3: lambda p: p[::-1, ::-1], 4: lambda p: p[::-1],
    5: lambda p: p.swapaxes(0, 1), 6: lambda p: p.swapaxes(0, 1)[:, ::-1],
    7: lambda p: p[::-1, ::-1].swapaxes(0, 1), 8: lambda p: p.swapaxes(0, 1)[::-1],
}  # fmt: skip
MODES = {"1": "png", "L": "png", "LA": "png", "P": "gif", "PA": "png", "RGB": "png", "RGBA": "webp", "CMYK": "tiff",
         "YCbCr": "tiff", "LAB": "tiff", "I;16": "png", "I": "tiff", "F": "tiff"}  # fmt: skip
SIZES = ((40, 30), (1, 1), (1, 400), (400, 1), (192, 192), (97, 101))


def pictures(world: World, place: Path, seed: int) -> Ending:
    """Open a picture of an odd mode, size or direction; file and memory, training and cache must show the same."""
    rng, random_pixels = random.Random(seed), np.random.default_rng(seed)
    mode, (width, height), turn = rng.choice(list(MODES)), rng.choice(SIZES), rng.choice((1, 1, 3, 6, 8, 2, 5))
    folder = begin_project(place) / "my pictures é"
    folder.mkdir()
    case = f"{mode}, {width} x {height}, turned by {turn}, {MODES[mode]}"
    picture, right = _odd(mode, random_pixels, width, height)
    file = folder / f"a b.{MODES[mode]}"
    exif = picture.getexif()
    exif[0x0112] = turn
    lossless = {"lossless": True, "exact": True} if MODES[mode] == "webp" else {}
    with_exif = {"exif": exif} if MODES[mode] != "gif" else {}
    picture.save(file, **lossless, **with_exif)
    if with_exif and right is not None:
        right = TURNS[turn](right)
    try:
        with file.open("rb") as open_file, Image.open(open_file) as stored:  # no name: see `images._decode`
            stored.load()
            alone = stored.copy()
        opened = open_images(folder)[0]
        seen = world.lmm.prompt("", alone).inputs["pixel_values"]
    except Exception as error:
        ending = error_ending(case, error, [file.name, "floating-point", "a b"])
        return ending if right is None or ending.ending != "clear error" else ending._replace(
            ending="another result", reason=f"refused: {error}")  # fmt: skip
    if right is None:
        return Ending(case, "another result", "it was accepted")
    if opened.mode != "RGB" or np.abs(np.asarray(opened, int) - right).max(initial=0) > 1:
        return Ending(case, "another result", f"{opened.mode} {opened.size}: other pixels than the picture shows")
    wanted = world.lmm.prompt("", Image.fromarray(right.astype(np.uint8))).inputs["pixel_values"]
    if seen.shape != wanted.shape or (seen - wanted).abs().max() > 0.05:
        return Ending(case, "another result", "the model sees other pixels than the cache")
    return Ending(case, "as usual")


def _odd(mode: str, rng: np.random.Generator, width: int, height: int) -> tuple[Image.Image, np.ndarray | None]:
    """Return a random picture of a mode, and its RGB pixels on white by formulas; None if it has no meaning."""
    grey, alpha = rng.integers(0, 256, (2, height, width), dtype=np.uint8)
    colour = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    deep = rng.integers(0, 65536, (height, width)).astype(np.uint16)
    palette = rng.integers(0, 256, (8, 3), dtype=np.uint8)

    def triple(shades: np.ndarray) -> np.ndarray:
        return np.repeat(shades[..., None].astype(int), 3, -1)

    def on_white(pixels: np.ndarray) -> np.ndarray:
        part = alpha[..., None] / 255
        return np.rint(pixels * part + 255 * (1 - part)).astype(int)

    def of_palette() -> Image.Image:
        picture = Image.fromarray(grey % 8).convert("P")
        picture.putpalette(palette.ravel().tolist())
        return picture

    def of_clear_palette() -> Image.Image:
        picture = of_palette()
        picture.info["transparency"] = 3
        return picture

    shades = triple((deep.astype(int) + 128) // 257)
    made: dict[str, tuple[Callable[[], Image.Image], np.ndarray | None]] = {
        "1": (lambda: Image.fromarray(grey > 127), np.where(triple(grey) > 127, 255, 0)),
        "L": (lambda: Image.fromarray(grey), triple(grey)),
        "RGB": (lambda: Image.fromarray(colour), colour.astype(int)),
        "LA": (lambda: Image.fromarray(np.dstack([grey, alpha])), on_white(triple(grey))),
        "RGBA": (lambda: Image.fromarray(np.dstack([colour, alpha])), on_white(colour)),
        "P": (of_palette, palette[grey % 8].astype(int)),
        "PA": (of_clear_palette, np.where(triple(grey % 8) == 3, 255, palette[grey % 8])),
        "I;16": (lambda: Image.fromarray(deep), shades),
        "I": (lambda: Image.fromarray(deep.astype(np.int32)), shades),
        "F": (lambda: Image.fromarray(grey.astype(np.float32) / 255), None),
    }
    if mode in made:
        make, pixels = made[mode]
        return make(), pixels
    channels = len(Image.new(mode, (1, 1)).getbands())
    picture = Image.frombytes(mode, (width, height), rng.bytes(width * height * channels))
    return picture, np.asarray(picture.convert("RGB"), int)  # what Pillow makes of colours for print


# ---- text ------------------------------------------------------------------------------------------------------

TEXTS = (
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", '"><svg onload=alert(1)>', "</td></tr></table><form>",
    "'><iframe src=javascript:alert(1)>", "<!-- <marquee>", "]]><object>", "&lt;script&gt; &amp;",
    "<a href='javascript:1'>",
    "$10 (10% off $20)", r"solve $\begin{cases} x$", r"\frac{1}{2} ^_{}", "$", "$$ $$", r"\$", "x_i^2 & #1 % ~",
    "{0} {name} %s %(x)s", "````\n<script>\n````", "::::{raw} html\n<script>", "a" * 3000, "word " * 600, "",
    " ", "\n\n\n", "line\nline\r\nline", "\x00\x07\x1b[31mred", "\ud83d", "\u202eright to left",
    "\U0001f600 \u4e16\u754c",
    "{{ 7 * 7 }} {% raise %}", "`code` **bold** [a](javascript:1)", "None", "_nolegend_", "\t",
)  # fmt: skip
INCHES = 30  # no figure is wider or higher than this many


def _study(text: str) -> CaseStudy:
    return CaseStudy(text, 1, text, text, [0.0, 1.0], [text, f"{text} more"], [], None)


def _table(world: World, text: str) -> LatentTable:
    known = LatentCache.load(world.folder / "cache")
    row = {"outcome": "explained", "concept": text, "kind": text, "answer": text, text: 1.0}
    return LatentTable(known, open_images(world.folder / "pictures"), {0: row})


def _browser(world: World, text: str) -> str:
    browser = FeatureBrowser(_table(world, text))
    browser.show(0)
    return browser.title.value + browser.facts.value + browser.bars.value


def _rater(world: World, text: str) -> str:
    from lmm_sae_nb.interpret.exemplars import exemplars

    known, images = LatentCache.load(world.folder / "cache"), open_images(world.folder / "pictures")
    live = int(known.live.nonzero()[0, 0])
    rows = {live: {"concept": text, "kind": text}}
    shown = rater.Rater(Path("ratings.jsonl"), rows, {live: exemplars(known, images, live)}, rater=text)
    shown.rate("yes")
    shown.undo()
    return shown.question.value + shown.status.value + shown.count.value


def _metrics(world: World, text: str) -> str:
    stage = Stage("faults", "text")
    write_json(stage.path("metrics.json"), {text: 1.0})
    return metrics_table(stage).data


COUNTS, EDGES = np.array([1, 2]), np.array([0.0, 0.5, 1.0])
HTML: dict[str, Callable[[World, str], str]] = {
    "table": lambda world, text: tables.table([{text: text, "mean": Mean(1.0, 0.0, 2.0)}], text).data,
    "token_html": lambda world, text: tables.token_html([text, text], [1.0, -1.0]),
    "shaded_texts": lambda world, text: tables.shaded_texts({text: [([text], [1.0])]}).data,
    "mark_changes": lambda world, text: tables.mark_changes("other", f"word {text}"),
    "case_studies": lambda world, text: tables.case_studies([_study(text)]).data,
    "answers_html": lambda world, text: steering_panel.answers_html(
        {"untouched": "a", "spliced": text, "steered": text}
    ),
    "download_html": lambda world, text: steering_panel.download_html(text, text),
    "histogram_svg": lambda world, text: thumbnails.histogram_svg(COUNTS, EDGES, text),
    "latent table": lambda world, text: _table(world, text).details(0),
    "feature browser": _browser,
    "rater": _rater,
    "metrics_table": _metrics,
}
ROW = {"low": 0.1, "fraction": 0.2, "high": 0.3}
SQUARE = Image.new("RGB", (8, 8))
FIGURES: dict[str, Callable[[str], object]] = {
    "curve": lambda text: plots.curve([{"a": 1.0, text: 2.0}], text, "a", label=text).legend(),
    "proportions": lambda text: plots.proportions({text: ROW, "b": ROW}),
    "means": lambda text: plots.means({text: {text: Mean(1.0, 0.5, 2.0)}}, text),
    "mean_panels": lambda text: plots.mean_panels({text: {text: {text: Mean(1.0, 0.5, 2.0)}}}),
    "histogram": lambda text: plots.histogram(np.array([1.0, 2.0]), text, ylabel=text),
    "stacked": lambda text: plots.stacked({text: {text: 1.0}}, text),
    "compared": lambda text: plots.compared({text: {text: 1.0}}, text),
    "bars": lambda text: plots.bars({text: {text: 1.0}}, text),
    "calibration": lambda text: plots.calibration({text: [0.5]}, {text: [0.5]}, text, text),
    "agreement": lambda text: plots.agreement(np.array([0.0, 1.0]), {text: np.array([0.0, 1.0])}, text),
    "scatter": lambda text: plots.scatter([1.0], [1.0], text, text),
    "cross_table": lambda text: plots.cross_table({text: {text: 1}}, text, text),
    "images": lambda text: plots.images([SQUARE, SQUARE], [text, text]),
    "picture_rows": lambda text: plots.picture_rows([(text, [SQUARE])]),
    "signed_maps": lambda text: plots.signed_maps(SQUARE, {text: np.ones((2, 2)), "b": np.ones((2, 2))}),
}


class _Structure(HTMLParser):
    """Collects the tags of a text with the names of their attributes, and addresses that would run code."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: set[tuple] = set()
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        code = [name for name, value in attributes if (value or "").strip().lower().startswith("javascript:")]
        self.tags.add((tag, *sorted(name for name, _ in attributes), *code))

    def handle_comment(self, data: str) -> None:
        self.tags.add(("comment",))


def markup(world: World, place: Path, seed: int) -> Ending:
    """Put hostile text where text of models, files and people is shown as HTML: it must stay text."""
    (begin_project(place) / "book").symlink_to(world.root / "book")
    slots = list(HTML)
    slot, text = slots[seed % len(slots)], TEXTS[seed // len(slots) % len(TEXTS)]
    case = f"{slot}: {text[:40]!r}"
    try:
        tags = _Structure(HTML[slot](world, text)).tags
    except Exception as error:
        return error_ending(case, error, [text[:20].strip() or "text", "empty", "name", "metrics.json"])
    (begin_project(place / "other") / "book").symlink_to(world.root / "book")
    more = tags - _Structure(HTML[slot](world, "some words")).tags
    return Ending(case, "injected", str(sorted(more))[:200]) if more else Ending(case, "as usual")


def figures(world: World, place: Path, seed: int) -> Ending:
    """Draw hostile text in every kind of figure: it is drawn as text, and the figure keeps a readable size."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    plots.style()
    slots = list(FIGURES)
    slot, text = slots[seed % len(slots)], TEXTS[seed // len(slots) % len(TEXTS)]
    case, drawn = f"{slot}: {text[:40]!r}", io.BytesIO()
    try:
        FIGURES[slot](text)
        pyplot.savefig(drawn, format="png", dpi=20, bbox_inches="tight")
    except Exception as error:
        return error_ending(case, error, [])
    finally:
        pyplot.close("all")
    width, height = (round(pixels / 20, 1) for pixels in Image.open(drawn).size)
    if max(width, height) > INCHES:
        return Ending(case, "another result", f"a figure of {width} x {height} inches")
    return Ending(case, "as usual")


# ---- code ------------------------------------------------------------------------------------------------------


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, target: Path):
        self._target = target

    def __reduce__(self):
        return Path.touch, (self._target,)


def code(world: World, place: Path, seed: int) -> Ending:
    """Give a file that carries code wherever a file is read: the code must not run."""
    rng, canary = random.Random(seed), begin_project(place) / "canary"
    make = rng.choice((_pickled, _pickled, _saved, _yaml, _dictionary, _model, _template))
    case, read = make(world, place / "project", canary, rng)
    try:
        read()
    except Exception as error:
        refused = f"refused: {type(error).__name__}"
    else:
        refused = "read"
    return Ending(case, "code ran", refused) if canary.exists() else Ending(case, "nothing ran")


Hostile = tuple[str, Callable[[], object]]  # what was done, and a call that reads it


def _pickled(world: World, project: Path, canary: Path, rng: random.Random) -> Hostile:
    kind = READS[name := rng.choice(list(READS))]
    file = rng.choice(sorted(path for path in world.copy(project, *kind.needs).glob(kind.files) if path.is_file()))
    file.unlink()  # a model's files are hard links
    file.write_bytes(pickle.dumps(Bomb(canary)))
    return f"{name}: {file.name} is a pickle", lambda: kind.read(world, project)


def _saved(world: World, project: Path, canary: Path, rng: random.Random) -> Hostile:
    kind = READS["checkpoint"]
    file = rng.choice(sorted(path for path in world.copy(project, *kind.needs).glob(kind.files) if path.is_file()))
    file.unlink()
    torch.save({"": Bomb(canary)}, file)
    return f"checkpoint: {file.name} is saved by torch", lambda: kind.read(world, project)


def _yaml(world: World, project: Path, canary: Path, rng: random.Random) -> Hostile:
    file, tag = project.with_name("mine.yaml"), f"python/object/{rng.choice(('apply', 'new'))}:os.system"
    file.write_text(f"run: !!{tag} ['touch {canary}']\n")
    return f"preset with !!{tag}", lambda: presets.preset(file)


def _dictionary(world: World, project: Path, canary: Path, rng: random.Random) -> Hostile:
    project.mkdir()
    torch.save({"encoder.weight": Bomb(canary)}, project / "ae.pt")
    trainer = {"dict_class": "AutoEncoderTopK", "activation_dim": 1, "dict_size": 1, "k": 1}
    write_json(project / "config.json", {"trainer": trainer})
    return "an SAE of dictionary_learning", lambda: TopKSAE.load(project)


def _model(world: World, project: Path, canary: Path, rng: random.Random) -> Hostile:
    shutil.copytree(world.root / MODEL, project)
    (project / "evil.py").write_text(f"open({str(canary)!r}, 'w')\nfrom transformers import *\n")
    config = json.loads((project / "config.json").read_text())
    config |= {"model_type": rng.choice((config["model_type"], "evil"))}
    config |= {"auto_map": {name: f"evil.{name}" for name in ("AutoConfig", "AutoModelForImageTextToText")}}
    (project / "config.json").write_text(json.dumps(config))
    return "a model's folder with hostile code", _load(project, rng)


def _template(world: World, project: Path, canary: Path, rng: random.Random) -> Hostile:
    shutil.copytree(world.root / MODEL, project)
    template = f"{{{{ cycler.__init__.__globals__.os.system('touch {canary}') }}}}"
    (project / "chat_template.jinja").write_text(template)
    return "a model's folder with a hostile template", _load(project, rng)


def _load(project: Path, rng: random.Random) -> Callable[[], object]:
    return rng.choice((lambda: LMM.load(project).prompt("a"), lambda: LocalChat.load(project)))


KINDS = {
    "weights": (weights, 300, "NaN, infinity, other shapes, dtypes and sizes in SAEs of three formats"),
    "preset": (preset, 400, "values of other types, and files that are no YAML"),
    "pictures": (pictures, 300, "pictures of every mode, of odd sizes, turned, transparent, 16-bit"),
    "text in HTML": (markup, len(HTML) * len(TEXTS), "hostile text in each table, panel and widget"),
    "text in figures": (figures, len(FIGURES) * len(TEXTS), "hostile text in each kind of figure"),
    "code in files": (code, 150, "pickles, YAML tags, code beside a model, chat templates"),
}
