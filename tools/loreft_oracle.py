"""What pyreft says: hidden states of a model with random LoReFT edits, and the edits. For tests/test_loreft.py.

pyreft 0.1.0 does not run with the transformers of this project; it has an environment of its own, whose Python is
named by ICL_PYREFT_PYTHON:

    python -m venv ENVIRONMENT
    ENVIRONMENT/bin/pip install torch==2.13.0 transformers==4.45.1 matplotlib seaborn networkx datasets accelerate
    ENVIRONMENT/bin/pip install --no-deps pyreft==0.1.0 pyvene==0.1.8
    ICL_PYREFT_PYTHON=ENVIRONMENT/bin/python pytest tests/test_loreft.py

    python tools/loreft_oracle.py MODEL LAYERS TOKENS POSITIONS OUTPUT

LAYERS, TOKENS and POSITIONS are numbers joined by commas; a layer is edited at all POSITIONS. OUTPUT is a safetensors
file with `logits`, and for each layer `w`, `b` and `r` (rank, width).
"""

import sys
from pathlib import Path

import pyreft
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

RANK = 3


def main(model: str, layers: str, tokens: str, positions: str, output: str) -> None:
    """Edit, run, save."""
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_pretrained(model, torch_dtype=torch.float32)
    edited = [int(layer) for layer in layers.split(",")]
    representations = [
        {
            "layer": layer,
            "component": "block_output",
            "low_rank_dimension": RANK,
            "intervention": pyreft.LoreftIntervention(
                embed_dim=network.config.hidden_size, low_rank_dimension=RANK, dtype=torch.float32
            ),
        }
        for layer in edited
    ]
    reft = pyreft.get_reft_model(network, pyreft.ReftConfig(representations=representations))
    reft.eval()
    ids = torch.tensor([[int(token) for token in tokens.split(",")]])
    places = [[[int(position) for position in positions.split(",")]]] * len(edited)
    with torch.no_grad():
        _, outputs = reft({"input_ids": ids}, unit_locations={"sources->base": (None, places)})
        result = {"logits": outputs.logits[0]}
        for layer, found in zip(edited, reft.interventions.values(), strict=True):
            edit = found[0] if isinstance(found, list | tuple) else found
            result[f"{layer}.w"] = edit.learned_source.weight
            result[f"{layer}.b"] = edit.learned_source.bias
            result[f"{layer}.r"] = edit.rotate_layer.weight.T
    save_file({name: part.detach().contiguous() for name, part in result.items()}, Path(output))


if __name__ == "__main__":
    main(*sys.argv[1:])
