"""An SAE at its layer of the model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.sae.hook_names import layer_of, require_layer
from lmm_sae_nb.sae.topk import SAE
from lmm_sae_nb.support.devices import choose_device


@dataclass(frozen=True)
class SAEInPlace:
    """A model, an SAE, and the decoder layer whose output the SAE reconstructs.

    Every function that caches, steers or attributes takes this one object. It checks once that the three belong
    together.

    lmm: the model under study.
    sae: of the layer's width; it is moved to the device of the layer, and becomes float32.
    layer: 0-based; the paper's 25th layer is 24.

    Raises:
        ValueError: the layer does not exist, the SAE has another width, or it was trained on another layer or model, or
            its files say that it reads another place.
    """

    lmm: LMM
    sae: SAE
    layer: int

    def __post_init__(self):
        self.lmm.layer(self.layer)
        self.sae.require_width(self.lmm.width)
        self.sae.to(self.lmm.device_of(self.layer), torch.float32)
        trained_on = self.sae.trained_on
        if trained_on is None:
            require_layer(self.sae.hook_name, self.layer)
            return
        if trained_on.layer != self.layer:
            raise ValueError(
                f"the SAE was trained on layer {trained_on.layer}, not {self.layer}; give that layer, or train an SAE "
                f"on layer {self.layer} with notebooks/01_train_sae.py"
            )
        fingerprint = self.lmm.fingerprint(self.layer)
        if trained_on.model != fingerprint:
            raise ValueError(
                f"the SAE was trained on another model than {self.lmm.name}: layer {self.layer} had other weights "
                f"({trained_on.model[:40]}…, here {fingerprint[:40]}…); load the model that it was trained on"
            )

    @property
    def device(self) -> torch.device:
        """The device of the layer's output, and so of the SAE."""
        return self.lmm.device_of(self.layer)

    @classmethod
    def load(cls, model: str | Path, sae: str | Path, layer: int | None = None, **settings) -> SAEInPlace:
        """Load a model and an SAE from folders or from the hub and put them together.

        layer: 0-based; by default the layer that the SAE was trained on, if its files record it.
        settings: for `LMM.load`.

        Raises:
            ValueError: no layer was given and the SAE's files record none, or as `SAEInPlace`.
        """
        where = "cpu" if settings.get("device_map") else choose_device(settings.get("device"))
        loaded = SAE.load(sae, device=where)
        if layer is None:
            layer = loaded.trained_on.layer if loaded.trained_on else layer_of(loaded.hook_name)
        if layer is None:
            raise ValueError(f"{sae} does not record the layer that it was trained on; give layer=...")
        return cls(LMM.load(model, **settings), loaded.requires_grad_(False), layer)
