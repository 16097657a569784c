"""Panels of few SAEs, with numbers that are easy to read."""

from lmm_sae_nb.show.panel import MeasuredPart, Panel, PanelSAE
from lmm_sae_nb.show.panel_metrics import PanelMetric

GOOD, BAD = PanelMetric("part", "good"), PanelMetric("part", "bad")


def sae(group, about, **metrics):
    return PanelSAE(about, group, {"part": MeasuredPart(metrics, 1.0)})


PANEL = Panel(
    "", "", {}, {}, [],
    {
        "seed_0": sae("seed", "seed 0", good=(0.8, 0.7, 0.9), bad=0.5),
        "seed_1": sae("seed", "seed 1", good=(0.9, 0.8, 1.0), bad=0.7),
        "random": sae("control", "random rows", good=(0.1, 0.0, 0.2), bad=0.6),
        "frozen": sae("control", "frozen decoder", good=(0.2, 0.1, 0.3)),
        "model": sae("model", "no SAE", probe_f1=(0.5, 0.4, 0.6), latent_f1=0.3),
    },
)  # fmt: skip


def panel_of(trained, controls):
    """A panel with one metric: values of trained SAEs, and of controls by what they are."""
    saes = {f"seed_{n}": sae("seed", "", good=value) for n, value in enumerate(trained)}
    return Panel("", "", {}, {}, [], saes | {key: sae("control", key, good=x) for key, x in controls.items()})


def by_kind(group, about, why=(), **metrics):
    return PanelSAE(about, group, {"steer_kinds": MeasuredPart(metrics, 1.0, list(why))})


STEERED = Panel(
    "", "", {}, {}, [],
    {
        "seed_0": by_kind(
            "seed", "seed 0", ["face: none"], named_of_100_texture=(80, 50, 95),
            control_named_of_100_texture=(0, 0, 30), named_of_100_scene=(10, 0, 60),
            control_named_of_100_scene=(5, 0, 55),
        ),
        "seed_1": by_kind(
            "seed", "seed 1", ["face: none"], named_of_100_texture=(60, 20, 90),
            control_named_of_100_texture=(10, 0, 40), named_of_100_scene=(20, 0, 70),
            control_named_of_100_scene=(5, 0, 55), named_of_100=(40, 30, 50), control_named_of_100=(2, 0, 20),
        ),
        "random": by_kind(
            "control", "random rows", ["face: none", "texture: two"], named_of_100_scene=(20, 0, 70),
            named_of_100_texture=(30, 10, 50),
        ),
        "seed_2": sae("seed", "seed 2", good=0.5),
        "pca": by_kind("classical", "PCA", ["face: none"], named_of_100_texture=(5, 0, 30), named_of_100=(4, 1, 20)),
        "model": PanelSAE("no SAE", "model", {"direction_kinds": MeasuredPart({
            "steer_latent_named_of_100": (50, 40, 60), "steer_probe_named_of_100": (90, 80, 95),
            "steer_probe_named_of_100_texture": (100, 60, 100), "steer_probe_named_above_latent": (40, 20, 60),
        }, 1.0)}),
    },
)  # fmt: skip
