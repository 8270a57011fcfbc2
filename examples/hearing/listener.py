"""An audio encoder of one's own, in a file of one's own: a few convolutions over a spectrogram.

Import this before a model that has it is composed, trained or loaded. The record at the end is all that avlm has to be
told: what the encoder takes, and how its convolutions shorten it. Token counts, chunks of long sound, batches and the
call follow from that, and the first sound that disagrees with it is an error that names both counts.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from avlm.config.media import Convolution
from avlm.models.audio_encoders import AudioFamily, add_family


class ListenerConfig(PreTrainedConfig):
    """Its width, and the bins of the spectrogram that it takes."""

    model_type = "small_listener"

    def __init__(self, hidden_size: int = 32, bins: int = 40, **kwargs: Any) -> None:
        self.hidden_size, self.bins = hidden_size, bins
        super().__init__(**kwargs)


class ListenerModel(PreTrainedModel):
    """[clips, frames, bins] to [clips, shorter, hidden_size]."""

    config_class = ListenerConfig

    def __init__(self, config: ListenerConfig) -> None:
        super().__init__(config)
        self.first = nn.Conv1d(config.bins, config.hidden_size, kernel_size=5, stride=3)
        self.second = nn.Conv1d(config.hidden_size, config.hidden_size, kernel_size=3, padding=1)
        self.post_init()

    def forward(self, input_features: Tensor) -> BaseModelOutput:
        heard = nn.functional.gelu(self.first(input_features.transpose(1, 2)))
        return BaseModelOutput(last_hidden_state=self.second(heard).transpose(1, 2))


AutoConfig.register(ListenerConfig.model_type, ListenerConfig, exist_ok=True)
AutoModel.register(ListenerConfig, ListenerModel, exist_ok=True)
add_family(
    AudioFamily(
        model_type=ListenerConfig.model_type,
        hears=lambda config, released: {"features": "fbank", "mel_bins": config.bins, "n_fft": 512, "frame": 400},
        convolutions=lambda config: (
            Convolution(kernel=5, stride=3, padding=0),
            Convolution(kernel=3, stride=1, padding=1),
        ),
        layers=None,
        mask_name=None,
    )
)
