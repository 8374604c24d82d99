"""The network types by the names that `--network_args type=` takes."""

from collections.abc import Mapping

from musubi_tuner.networks.base import AdapterLayer
from musubi_tuner.networks.dora import DoRALayer
from musubi_tuner.networks.full import FullLayer
from musubi_tuner.networks.loha import LoHaLayer
from musubi_tuner.networks.lokr import LoKrLayer
from musubi_tuner.networks.lora import LoRALayer

TYPES: Mapping[str, type[AdapterLayer]] = {layer.kind: layer for layer in (LoRALayer, DoRALayer, LoKrLayer, LoHaLayer, FullLayer)}
