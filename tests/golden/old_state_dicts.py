"""Makes state_dict_2017.pth, in the form that PyTorch up to 0.3 wrote, and state_dict_bfloat16.pth.

Such an old PyTorch can no longer be installed, so its pickles are written here: five of them, then the storages. The tensor
`tail` lies in a view of the storage that `weight` has. To run it: pip install torch; python tests/golden/old_state_dicts.py
"""

import collections
import pickle
import struct
from pathlib import Path

import torch

HERE = Path(__file__).parent


class Storage:
    """A storage's persistent id is what a file holds in its place."""

    def __init__(self, view):
        self.id = ("storage", torch.FloatStorage, "94", "cpu", 6, view)


class Tensor:
    def __init__(self, *arguments):
        self.arguments = arguments

    def __reduce__(self):
        return torch._utils._rebuild_tensor, self.arguments


class Pickler(pickle.Pickler):
    def persistent_id(self, value):
        return value.id if isinstance(value, Storage) else None


def main():
    tensors = collections.OrderedDict(
        weight=Tensor(Storage(None), 0, (2, 3), (3, 1)),
        tail=Tensor(Storage(("95", 3, 3)), 1, (2,), (1,)),
    )
    sizes = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    with (HERE / "state_dict_2017.pth").open("wb") as file:
        for value in (0x1950A86A20F9469CFC6C, 1001, sizes):
            pickle.dump(value, file, protocol=2)
        Pickler(file, protocol=2).dump(tensors)
        pickle.dump(["94"], file, protocol=2)
        file.write(struct.pack("<q6f", 6, *range(6)))
    torch.save({"weight": torch.tensor([1.0, -2.5, 0.15625]).bfloat16()}, HERE / "state_dict_bfloat16.pth")


if __name__ == "__main__":
    main()
