"""Small models that are no language models, as their users write them: a forecaster of series, and a classifier."""

from typing import Any

import torch
from torch import nn
from transformers import MambaConfig, MambaModel, MambaPreTrainedModel

STEPS, CHANNELS, AHEAD = 12, 3, 4


class Forecaster(MambaPreTrainedModel):
    """The next AHEAD steps of a series, from windows of it: (b, T, channels) -> (b, AHEAD, channels)."""

    main_input_name = "values"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.enter = nn.Linear(CHANNELS, config.hidden_size)
        self.backbone = MambaModel(config)
        self.leave = nn.Linear(config.hidden_size, AHEAD * CHANNELS)
        self.post_init()

    @property
    def dummy_inputs(self) -> dict[str, torch.Tensor]:
        return {"values": torch.zeros(1, STEPS, CHANNELS)}

    def forward(self, values: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        hidden = self.backbone(inputs_embeds=self.enter(values)).last_hidden_state
        found = self.leave(hidden[:, -1]).unflatten(-1, (AHEAD, CHANNELS))
        return {"logits": found} | ({} if labels is None else {"loss": nn.functional.mse_loss(found, labels)})


class Classifier(MambaPreTrainedModel):
    """A class for a sequence of tokens, from the mean over its positions."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.backbone = MambaModel(config)
        self.leave = nn.Linear(config.hidden_size, 5)
        self.post_init()

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        found = self.leave(self.backbone(input_ids).last_hidden_state.mean(1))
        return {"logits": found} | ({} if labels is None else {"loss": nn.functional.cross_entropy(found, labels)})


def config(**sizes: int) -> Any:
    """Return a config of a tiny Mamba."""
    return MambaConfig(
        **{"vocab_size": 11, "hidden_size": 8, "state_size": 4, "num_hidden_layers": 2, "expand": 2, **sizes}
    )
