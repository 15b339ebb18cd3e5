"""A MiniALBERT student that starts from its teacher's weights instead of at random, which its paper does not do.

What a layer computes is not in any one of the teacher's layers, so the shared one gets what they have in common:

- embeddings: the teacher's, on the leading right singular vectors of its word embeddings; and, by least squares, the
  projection that then leads closest to what the teacher's encoder gets;
- FFN: the neurons of *all* of the teacher's layers in one row, fused to the student's width (see `methods/fusion.py`).
  The outputs of the fused neurons are divided by the number of layers: one pass adds what a layer adds on average;
- norms: means over the layers;
- attention: that of the layer in the middle, since heads of several layers have no common order;
- adapters: as they are drawn, but for the gain and the shift of their norms, which make them nearly the identity;
- the head for masked tokens: the teacher's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusion_kernels.activations import get_activation
from mlp_fusion.errors import InputError
from mlp_fusion.families import FFNSite
from mlp_fusion.finetuning.loading import first_position
from mlp_fusion.methods.fusion import fusion
from mlp_fusion.minialbert.modeling import MiniAlbertForMaskedLM
from mlp_fusion.neurons import UNNAMED, NeuronBundle
from mlp_fusion.reducing.chosen import find_ffns

_REMEDY = "let the student start at random (start='random')"


@torch.no_grad()
def start_from(student: MiniAlbertForMaskedLM, teacher: nn.Module, *, seed: int = 0) -> None:
    """Set the weights of a fresh student from its teacher, in place; see the module's docstring.

    Args:
        student: with the teacher's vocabulary, `hidden_size` and number of heads; both on the CPU.
        teacher: of BERT's kind, with a head for masked tokens or without. Of one without, or where the head is narrower
            than the states or shares the student's embeddings, the student's own stays as drawn.
        seed: of the clustering, and of the positions that the projection is fitted at.

    Raises:
        InputError: the two do not fit together, or a part of the teacher is not where models of BERT's kind have it;
            the student is as it was.

    Examples:
        >>> from transformers import AutoModelForMaskedLM, BertConfig
        >>> from mlp_fusion.finetuning.students import start_from
        >>> shape = {"vocab_size": 100, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
        >>> teacher = AutoModelForMaskedLM.from_config(BertConfig(**shape, num_hidden_layers=4))
        >>> student = mlp_fusion.MiniAlbertForMaskedLM(mlp_fusion.MiniAlbertConfig(**shape, embedding_size=8))
        >>> start_from(student, teacher)
        >>> torch.equal(student.predictions.decoder.weight, teacher.cls.predictions.decoder.weight)
        True
    """
    base: Any = getattr(teacher, "base_model", teacher)
    architecture, sites = find_ffns(teacher)
    layers = [_Layer.at(site, student.config.hidden_size) for site in sites]
    fused = _fused_across_depth([architecture.read(site) for site in sites], student, seed)
    embeddings = _Embeddings.of(base, student)
    head = _head(teacher, base, student)
    layer: Any = student.albert.encoder.layers[0]
    embeddings.give(student, seed)
    assert fused.b_in is not None
    assert fused.b_out is not None
    layer.ffn.weight.copy_(fused.w_in[0])
    layer.ffn.bias.copy_(fused.b_in[0])
    layer.ffn_output.weight.copy_(fused.w_out[0].T)
    layer.ffn_output.bias.copy_(fused.b_out[0])
    _give_mean(layer.attention.LayerNorm, [one.norms[0] for one in layers])
    _give_mean(layer.full_layer_layer_norm, [one.norms[1] for one in layers])
    targets = (layer.attention.query, layer.attention.key, layer.attention.value, layer.attention.dense)
    for target, source in zip(targets, layers[len(layers) // 2].attention, strict=True):
        target.load_state_dict(source.state_dict())
    for adapters in layer.adapters:
        _near_identity(adapters.attention.LayerNorm, layer.full_layer_layer_norm)
        _near_identity(adapters.ffn.LayerNorm, layer.attention.LayerNorm)
    for own, theirs in head:
        own.load_state_dict(theirs.state_dict())


@dataclass(frozen=True, eq=False)
class _Layer:
    """What a layer of BERT's kind has beside its FFN.

    Attributes:
        attention: query, key, value and output projections.
        norms: behind attention and behind FFN.
    """

    attention: list[nn.Linear]
    norms: list[nn.LayerNorm]

    @staticmethod
    def at(site: FFNSite, hidden: int) -> _Layer:
        """The layer around an FFN.

        Raises:
            InputError: it has other parts.
        """
        found = re.match(r".*(?:^|\.)\d+(?=\.|$)", site.path)
        path = found[0] if found else site.path
        own = {f"{site.path}.{name}".rpartition(".")[0] for name in site.kind.parameters}
        modules = [(f"{path}.{name}", part) for name, part in site.root.get_submodule(path).named_modules()]
        square = [
            part for name, part in modules
            if isinstance(part, nn.Linear) and part.in_features == part.out_features == hidden and name not in own
        ]  # fmt: skip
        norms = [part for _, part in modules if isinstance(part, nn.LayerNorm) and part.normalized_shape == (hidden,)]
        if len(square) != 4 or len(norms) != 2 or any(linear.bias is None for linear in square):
            raise InputError(
                f"{path} has {len(square)} projections and {len(norms)} norms as wide as the student's states, where "
                f"layers of BERT's kind have 4 and 2: {_REMEDY}"
            )
        return _Layer(square, norms)


def _fused_across_depth(bundles: list[NeuronBundle], student: MiniAlbertForMaskedLM, seed: int) -> NeuronBundle:
    """One FFN of the student's width from the neurons of all layers, whose outputs are a layer's on average.

    Raises:
        InputError: they are no plain FFNs with the student's activation, or all their neurons are too few.
    """
    first, width = bundles[0], student.config.intermediate_size
    activation: Any = student.albert.encoder.layers[0].activation
    z = torch.linspace(-6.0, 6.0, 101)
    if (
        any(one.layout != first.layout for one in bundles) or first.w_gate is not None or first.b_in is None
        or first.b_out is None or first.activation == UNNAMED
        or not torch.allclose(get_activation(first.activation).function(z), activation(z), atol=1e-6)
    ):  # fmt: skip
        raise InputError(
            f"the teacher's FFNs are no plain ones with biases and the student's {student.config.hidden_act}: {_REMEDY}"
        )
    plain = [one.parameterized("folded").to(dtype=torch.float32) for one in bundles]
    row = NeuronBundle(
        w_in=torch.cat([one.w_in for one in plain], 1),
        w_out=torch.cat([one.w_out for one in plain], 1) / len(plain),
        activation=first.activation,
        b_in=torch.cat([one.b_in for one in plain if one.b_in is not None], 1),
        b_out=torch.stack([one.b_out for one in plain if one.b_out is not None]).mean(0),
    )
    if width > row.width:
        raise InputError(f"the teacher has {row.width} neurons, the student {width}: make it narrower, or {_REMEDY}")
    return fusion(row, width, seed=seed).bundle.parameterized("folded")


@dataclass(frozen=True, eq=False)
class _Embeddings:
    """The teacher's embeddings.

    Attributes:
        words, positions, types: `(rows, width)` tables, `positions` from the first real one on.
        norm: behind their sum.
        projection: to the width of the states, where they are narrower.
    """

    words: Tensor
    positions: Tensor
    types: Tensor
    norm: nn.LayerNorm
    projection: nn.Linear | None

    @staticmethod
    def of(base: Any, student: MiniAlbertForMaskedLM) -> _Embeddings:
        """The embeddings of an encoder.

        Raises:
            InputError: it has others, or they do not suit the student's.
        """
        own, config = getattr(base, "embeddings", None), student.config
        words, positions = (getattr(own, f"{name}_embeddings", None) for name in ("word", "position"))
        norm, projection = getattr(own, "LayerNorm", None), getattr(base, "embeddings_project", None)
        if not isinstance(words, nn.Embedding) or not isinstance(positions, nn.Embedding) or norm is None:
            raise InputError(f"the embeddings of {type(base).__name__} are not of BERT's kind: {_REMEDY}")
        types = getattr(own, "token_type_embeddings", None)
        table = torch.zeros(config.type_vocab_size, words.embedding_dim) if types is None else types.weight
        found = _Embeddings(words.weight, positions.weight[first_position(base) :], table, norm, projection)
        if found.states != config.hidden_size:
            raise InputError(
                f"{type(base).__name__} has embeddings of {found.states} numbers and the student states of "
                f"{config.hidden_size}, and no projection from one to the other is where BERT's kind has it: {_REMEDY}"
            )
        for name, has, wants in (
            ("words", len(found.words), config.vocab_size),
            ("kinds of tokens", len(found.types), config.type_vocab_size),
        ):
            if has != wants:
                raise InputError(f"the teacher has {has} {name}, the student {wants}: they must have as many")
        if len(found.positions) < config.max_position_embeddings or found.words.shape[1] < config.embedding_size:
            raise InputError(
                f"the student has {config.max_position_embeddings} positions and embeddings of "
                f"{config.embedding_size}, the teacher {len(found.positions)} and {found.words.shape[1]}: it must not "
                "have more"
            )
        return found

    @property
    def states(self) -> int:
        """Width of what the teacher's encoder gets."""
        return self.words.shape[1] if self.projection is None else self.projection.out_features

    def give(self, student: MiniAlbertForMaskedLM, seed: int) -> None:
        """Set the student's embeddings and their projection."""
        own, projection = student.albert.embeddings, student.albert.encoder.projection
        own.LayerNorm.reset_parameters()
        positions = self.positions[: student.config.max_position_embeddings]
        basis = self._basis(student.config.embedding_size)
        for target, source in (
            (own.word_embeddings, self.words), (own.position_embeddings, positions),
            (own.token_type_embeddings, self.types),
        ):  # fmt: skip
            target.weight.copy_(source if basis is None else source.double() @ basis)
        if basis is None:
            own.LayerNorm.load_state_dict(self.norm.state_dict())
            if isinstance(self.projection, nn.Linear):
                projection.load_state_dict(self.projection.state_dict())
                return
        if isinstance(projection, nn.Linear):
            places = torch.randint(len(positions), (len(self.words),), generator=torch.Generator().manual_seed(seed))
            mine = _summed(own.word_embeddings.weight, own.position_embeddings.weight, own.token_type_embeddings.weight,
                           places, own.LayerNorm)  # fmt: skip
            wanted = _summed(self.words, positions, self.types, places, self.norm)
            wanted = wanted if self.projection is None else self.projection(wanted)
            weight, bias = _least_squares(mine, wanted)
            projection.weight.copy_(weight)
            projection.bias.copy_(bias)

    def _basis(self, width: int) -> Tensor | None:
        """`(teacher's width, width)` the leading right singular vectors of the words, float64; None for all of them."""
        if width == self.words.shape[1]:
            return None
        # What norms take away, the mean over a row, needs no direction.
        words = self.words.double() - self.words.double().mean(1, keepdim=True)
        return torch.linalg.eigh(words.T @ words)[1][:, -width:]


def _summed(words: Tensor, positions: Tensor, types: Tensor, places: Tensor, norm: nn.LayerNorm) -> Tensor:
    """`(words, width)` every word at a position, as token of the first kind, behind the norm."""
    result: Tensor = norm(words + positions[places] + types[0])
    return result


def _least_squares(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The W and b with the least squared error of `x W^T + b` against `y`."""
    rows = F.pad(x, (0, 1), value=1.0).double()
    moment = rows.T @ rows
    # The rows of a norm sum to zero over their width: the slightest ridge chooses among equals.
    moment += 1e-9 * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)
    solved = torch.linalg.solve(moment, rows.T @ y.double())
    return solved[:-1].T, solved[-1]


def _give_mean(target: nn.LayerNorm, sources: list[nn.LayerNorm]) -> None:
    target.weight.copy_(torch.stack([norm.weight for norm in sources]).mean(0))
    target.bias.copy_(torch.stack([norm.bias for norm in sources]).mean(0))


def _near_identity(target: nn.LayerNorm, before: nn.LayerNorm) -> None:
    """Give a norm the gain and the shift that restore what it takes from the outputs of the norm before it."""
    shift = before.bias.mean()
    spread = before.weight.square().mean() + (before.bias - shift).square().mean()
    target.weight.fill_(float(spread.sqrt()))
    target.bias.fill_(float(shift))


def _head(teacher: Any, base: Any, student: MiniAlbertForMaskedLM) -> list[tuple[nn.Module, nn.Module]]:
    """Pairs of a part of the student's head and the teacher's that it is to equal; none where there is no such."""
    hidden, inside = student.config.hidden_size, set(base.modules())
    outside = [part for part in teacher.modules() if part not in inside] if teacher is not base else []
    dense = [p for p in outside if isinstance(p, nn.Linear) and p.in_features == p.out_features == hidden]
    norms = [p for p in outside if isinstance(p, nn.LayerNorm) and p.normalized_shape == (hidden,)]
    decoder = teacher.get_output_embeddings() if outside else None
    tied = student.config.tie_word_embeddings
    if decoder is None or decoder.in_features != hidden or tied or len(dense) != 1 or len(norms) != 1:
        return []
    own = student.predictions
    return [(own.dense, dense[0]), (own.LayerNorm, norms[0]), (own.decoder, decoder)]
