"""An SAE at its hookpoint of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool
from torch import Tensor

from lmm_sae_nb.model.hookpoints import Hookpoint, is_normed, kinds_at, plain, titled
from lmm_sae_nb.model.lmm import LMM
from lmm_sae_nb.model.prompts import Prompt
from lmm_sae_nb.model.token_kinds import KINDS, SAE_KINDS
from lmm_sae_nb.sae.hook_names import layer_of, require_added, require_layer
from lmm_sae_nb.sae.topk import SAE
from lmm_sae_nb.support.devices import choose_device


@dataclass(frozen=True)
class SAEInPlace:
    """A model, an SAE, and the decoder layer, or other hookpoint, whose output the SAE reconstructs.

    Every function that caches, steers or attributes takes this one object. It checks once that the three belong
    together.

    lmm: the model under study.
    sae: of the layer's width; it is moved to the device of the layer, and becomes float32.
    layer: 0-based, the paper's 25th layer is 24; or the name of another hookpoint, such as "decoder.24.mlp".

    Raises:
        ValueError: the hookpoint does not exist, the SAE has another width, or it was trained elsewhere or on another
            model, or its files say that it reads another place.
    """

    lmm: LMM
    sae: SAE
    layer: Hookpoint

    def __post_init__(self):
        self.sae.require_width(self.lmm.width_at(self.layer))
        object.__setattr__(self, "layer", plain(self.layer))
        self.sae.to(self.lmm.device_of(self.layer), torch.float32)
        trained_on = self.sae.trained_on
        if trained_on is None:
            require_layer(self.sae.hook_name, self.layer)
            if is_normed(self.lmm.model, self.layer):
                require_added(self.sae.hook_name)
            return
        if trained_on.layer != self.layer:
            raise ValueError(
                f"the SAE was trained on {titled(trained_on.layer)}, not {self.layer}; give that layer, or train "
                f"an SAE on {titled(self.layer)} with notebooks/01_train_sae.py"
            )
        fingerprint = self.lmm.fingerprint(self.layer)
        if trained_on.model != fingerprint:
            raise ValueError(
                f"the SAE was trained on another model than {self.lmm.name}: {titled(self.layer)} had other weights "
                f"({trained_on.model[:40]}…, here {fingerprint[:40]}…); load the model that it was trained on"
            )

    @property
    def device(self) -> torch.device:
        """The device of the hookpoint's states, and so of the SAE."""
        return self.lmm.device_of(self.layer)

    def mask(self, prompt: Prompt, kinds: Sequence[str] = SAE_KINDS) -> Bool[Tensor, "batch tokens"]:
        """Mark the tokens of any of these kinds that have a state at the hookpoint."""
        known = kinds_at(self.layer)
        return prompt.mask(*(kind for kind in kinds if kind in known or kind not in KINDS))

    @classmethod
    def load(cls, model: str | Path, sae: str | Path, layer: Hookpoint | None = None, **settings) -> SAEInPlace:
        """Load a model and an SAE from folders or from the hub and put them together.

        layer: as of the class; by default the one that the SAE was trained on, if its files record it.
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
