from __future__ import annotations

import pytest

from proteus_pipeline.errors import ConfigError
from proteus_pipeline.models.architecture import resolve_layer


def test_layers_count_from_either_end():
    assert [resolve_layer(i, 6) for i in range(-7, 7)] == [0, 1, 2, 3, 4, 5, 6] * 2
    for layer in (7, -8, 33):
        with pytest.raises(ConfigError, match=f"embedding.layer is {layer}, and the model has 6 layers"):
            resolve_layer(layer, 6)
