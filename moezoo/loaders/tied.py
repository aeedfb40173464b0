"""The mapping rules for a checkpoint whose head may be tied to its embedding."""

import logging

from transformers import PreTrainedConfig

from moezoo import registry
from moezoo.loaders.checkpoint import Checkpoint
from moezoo.loaders.encodings import Encoding
from moezoo.loaders.mapping import Rule, Skip, stored_name

_log = logging.getLogger(__name__)
_CHUNK = 16 << 20


def tied_rules(
    config: PreTrainedConfig, checkpoint: Checkpoint, encoding: Encoding
) -> tuple[tuple[Rule | Skip, ...], tuple[str, str] | None]:
    """Return the rules for a checkpoint whose config may tie the head to the embedding.

    As in transformers, one of the two tensors is enough, a head equal to the embedding is left
    out, and a head that differs unties the model: the weights are right and the config is wrong.
    Where only their bytes can say which it is, the names of the two are returned too, and the rules
    leave out the head.
    """
    rules = rules_of(checkpoint)
    tensors = encoding.tensors
    head, embedding = (
        stored_name(rules, name, tensors) for name in ("lm_head.weight", "embed.weight")
    )
    if not config.tie_word_embeddings or head not in tensors:
        return rules, None
    if embedding not in tensors:
        return (*rules, Rule("embed.weight", head)), None
    a, b = tensors[head], tensors[embedding]
    if (a.shape, a.dtype) != (b.shape, b.dtype) or {head, embedding} & encoding.weights.keys():
        untie(config, checkpoint.name, (head, embedding))
        return rules, None
    return (*rules, Skip(head, "tied to the embedding")), (head, embedding)


def rules_of(checkpoint: Checkpoint) -> tuple[Rule | Skip, ...]:
    """Return the rules that fit the checkpoint's names, which may differ from those its config's
    model writes."""
    module = registry.architecture(str(checkpoint.config["model_type"]))
    rules: tuple[Rule | Skip, ...] = module.CHECKPOINT
    return rules


def same_bytes(checkpoint: Checkpoint, first: str, second: str, *, progress: bool) -> bool:
    """Return whether two tensors of one size are equal; downloads their files if need be."""
    nbytes = checkpoint.tensors[first].nbytes
    locations = checkpoint.fetch((first, second), progress=progress)
    with open(locations[first].path, "rb") as left, open(locations[second].path, "rb") as right:
        left.seek(locations[first].offset)
        right.seek(locations[second].offset)
        sizes = (min(_CHUNK, nbytes - start) for start in range(0, nbytes, _CHUNK))
        return all(left.read(size) == right.read(size) for size in sizes)


def untie(config: PreTrainedConfig, name: str, twins: tuple[str, str]) -> None:
    """Correct a config that ties two tensors which differ, with a warning; `name` is the model."""
    _log.warning(
        "%s: tie_word_embeddings is set, but %s and %s differ; they stay apart", name, *twins
    )
    config.tie_word_embeddings = False
