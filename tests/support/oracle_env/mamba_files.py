"""Run by the interpreter of .venv-oracle: mamba_ssm's own class reads folders, or writes one, and computes.

read IDS OUT FOLDER...: of each folder, from_pretrained, which is strict; OUT/<i>.safetensors then holds its tensors
and its logits for the tokens in IDS (JSON): `logits` of all at once, `decoded` of all but PREFIX one by one.
write IDS OUT CONFIG: a random model of a MambaConfig (JSON), written by save_pretrained to OUT/model, the same there.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from mamba_cpu import without_fused_path
from mamba_ssm.models.config_mamba import MambaConfig
from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
from mamba_ssm.utils.generation import InferenceParams
from safetensors.torch import save_file

PREFIX = 5


@torch.no_grad()
def record(model: MambaLMHeadModel, ids: torch.Tensor, out: Path) -> None:
    found = {f"model.{name}": tensor.detach().clone() for name, tensor in model.state_dict().items()}
    if model.lm_head.weight.dtype == torch.float32:  # numpy, which the interpreter computes with, has no bfloat16
        found["logits"] = model(ids).logits
        cache = InferenceParams(max_seqlen=ids.shape[1], max_batch_size=len(ids))
        decoded = [model(ids[:, :PREFIX], inference_params=cache).logits]
        for i in range(PREFIX, ids.shape[1]):
            cache.seqlen_offset = i
            decoded.append(model(ids[:, i : i + 1], inference_params=cache).logits)
        found["decoded"] = torch.cat(decoded, 1)
    save_file(found, out)


if __name__ == "__main__":
    command, tokens, target, *given = sys.argv[1:]
    ids, out = torch.tensor(json.loads(tokens)), Path(target)
    if command == "read":
        for i, folder in enumerate(given):
            config = json.loads((Path(folder) / "config.json").read_text())
            weights = torch.load(Path(folder) / "pytorch_model.bin", weights_only=True)
            dtype = weights["backbone.embedding.weight"].dtype
            model = MambaLMHeadModel.from_pretrained(folder, dtype=dtype)
            assert vars(model.config) == config
            record(without_fused_path(model), ids, out / f"{i}.safetensors")
    else:
        torch.manual_seed(0)
        model = MambaLMHeadModel(MambaConfig(**json.loads(given[0])))
        for parameter in model.parameters():  # biases of zero and gains of one would hide that they were mixed up
            parameter.data += torch.randn_like(parameter) / 16
        model.save_pretrained(out / "model")
        record(without_fused_path(model), ids, out / "0.safetensors")
