"""A model folder that ``mlx_lm.load`` reads without a network."""

import dataclasses
import json
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.llama import Model, ModelArgs
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from .corpus import END_OF_TEXT

WEIGHTS = Path(__file__).parent / "weights"
METRICS_NAME = "training.json"

_END_TOKEN = "<|end|>"


def byte_tokenizer() -> Tokenizer:
    """A tokenizer whose ids are the bytes of the text's UTF-8 form."""
    vocabulary = {char: byte for byte, char in _byte_characters().items()}
    del vocabulary[_byte_characters()[END_OF_TEXT]]
    vocabulary[_END_TOKEN] = END_OF_TEXT
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([_END_TOKEN])
    return tokenizer


def _byte_characters() -> dict[int, str]:
    """The printable character that stands for each byte in a byte-level vocabulary."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    stand_ins = {byte: chr(256 + index) for index, byte in enumerate(others)}
    return {byte: chr(byte) for byte in printable} | stand_ins


def save(folder: Path, model: Model, metrics: dict) -> None:
    """Writes weights, configuration, tokenizer and the record of the training."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    config = dataclasses.asdict(model.args) | {"eos_token_id": END_OF_TEXT}
    _write_json(folder / "config.json", config)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": _END_TOKEN,
            "model_max_length": model.args.max_position_embeddings,
            "clean_up_tokenization_spaces": False,
        },
    )
    _write_json(folder / METRICS_NAME, metrics)


def load_model(folder: Path = WEIGHTS) -> Model:
    """The model in ``folder``, without its tokenizer: its token ids are bytes."""
    config = json.loads((folder / "config.json").read_text())
    model = Model(ModelArgs.from_dict(config))
    model.load_weights(str(folder / "model.safetensors"))
    mx.eval(model.parameters())
    return model


def load_metrics(folder: Path = WEIGHTS) -> dict:
    """The record that the training left beside the weights."""
    return json.loads((folder / METRICS_NAME).read_text())


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
