"""Loads saved models where bwsk_fx cannot be imported, and keeps what they predict: PIXELS.pt FOLDER..."""

import sys


class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "bwsk_fx":
            raise ImportError(f"{name} is blocked")


sys.meta_path.insert(0, Blocker())
try:
    import bwsk_fx  # noqa: F401
except ImportError:
    pass
else:
    raise SystemExit("bwsk_fx was imported")

import torch  # noqa: E402
from transformers import AutoModelForImageClassification  # noqa: E402

pixels = torch.load(sys.argv[1], weights_only=True)
for folder in sys.argv[2:]:
    model = AutoModelForImageClassification.from_pretrained(folder)
    with torch.no_grad():
        torch.save(model(pixels).logits, f"{folder}.logits.pt")
