"""Let onnxruntime-genai go on greedily from prompts with a package.

Usage: genai_generate.py PACKAGE FOLDER. FOLDER/inputs.json has ``prompts``, lists of token ids, and ``new`` tokens to
generate for each; FOLDER/outputs.json gets the generated ids.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import onnxruntime_genai as genai


def main(package: str, folder: Path) -> None:
    """Generate for one prompt after the other."""
    given = json.loads((folder / "inputs.json").read_text(encoding="utf-8"))
    model = genai.Model(package)
    answers = []
    for prompt in given["prompts"]:
        params = genai.GeneratorParams(model)
        length = len(prompt) + given["new"]
        params.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = genai.Generator(model, params)
        generator.append_tokens(prompt)
        while not generator.is_done():
            generator.generate_next_token()
        answers.append([int(token) for token in generator.get_sequence(0)[len(prompt) :]])
    (folder / "outputs.json").write_text(json.dumps(answers), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
