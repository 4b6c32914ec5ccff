"""Let onnxruntime-genai go on greedily from prompts with images, which it prepares itself.

Usage: genai_images.py PACKAGE FOLDER. FOLDER/inputs.json has ``prompts``, each with its ``text`` and the names of its
``images`` in FOLDER, and ``new`` tokens to generate for each. FOLDER/outputs.npz gets of prompt i ``ids.i``, the
``grids.i`` of its images, ``pixels.i``, ``logits.i`` of its last token and the generated ``tokens.i``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime_genai as genai


def main(package: str, folder: Path) -> None:
    """Generate for one prompt after the other."""
    given = json.loads((folder / "inputs.json").read_text(encoding="utf-8"))
    model = genai.Model(package)
    processor = model.create_multimodal_processor()
    found = {}
    for number, prompt in enumerate(given["prompts"]):
        files = [str(folder / name) for name in prompt["images"]]
        inputs = processor(prompt["text"], images=genai.Images.open(*files) if files else None)
        found[f"ids.{number}"] = inputs["input_ids"].as_numpy()
        if files:
            found[f"pixels.{number}"] = inputs["pixel_values"].as_numpy()
            found[f"grids.{number}"] = inputs["image_grid_thw"].as_numpy()
        params = genai.GeneratorParams(model)
        begin = found[f"ids.{number}"].shape[1]
        length = begin + given["new"]
        params.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = genai.Generator(model, params)
        generator.set_inputs(inputs)
        found[f"logits.{number}"] = np.array(generator.get_logits()).reshape(-1)
        while not generator.is_done():
            generator.generate_next_token()
        found[f"tokens.{number}"] = np.array(generator.get_sequence(0)[begin:])
    np.savez(folder / "outputs.npz", **found)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
