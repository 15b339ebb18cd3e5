"""`Runner`: a model on text, in the mode, on the device and with the errors that all of the package shares."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mlp_fusion.errors import InputError, named
from mlp_fusion.running.batches import Batch

#: What a model raises on inputs that do not suit it.
_UNFIT = (ValueError, IndexError, TypeError, RuntimeError, AttributeError)


class Runner:
    """Runs a Hugging Face model on batches, inside a `with` block: in evaluation mode, on the model's device.

    Every module's own mode is back afterwards, whatever happens inside. Outputs have names, whether or not the model's
    config asks for tuples. Encoder-decoder models whose batches lack `decoder_input_ids` read the encoder's text in the
    decoder, too. Gradients are recorded or not as around the call.

    Args:
        model: the model.
        text: what the caller calls the text that it runs on, for errors.
    """

    def __init__(self, model: nn.Module, text: str = "the sample") -> None:
        self.model, self.text = model, text
        self._inside = ExitStack()

    def __enter__(self) -> Runner:
        with ExitStack() as entered:
            entered.enter_context(evaluating(self.model))
            entered.enter_context(naming_outputs(self.model))
            self._inside = entered.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._inside.close()

    def base(self, batch: Mapping[str, Any]) -> Any:
        """Outputs of the model without its head, by their names.

        The head has no FFN of ours, may ask for more than token ids, and makes the largest tensors of all.

        Raises:
            InputError: it cannot run on the batch.
        """
        base: Any = getattr(self.model, "base_model", self.model)
        self._check_vocabulary(base, batch)
        return self._call(base, self._complete(base, batch))

    def hidden_states(self, batch: Batch) -> Tensor:
        """`(batch, length, d)`: the last hidden states.

        Raises:
            InputError: the model cannot run on the batch.
        """
        outputs = self.base(batch)
        if "last_hidden_state" not in outputs:  # a model that has no base by itself, such as T5 with its head
            outputs = self.base({**batch, "output_hidden_states": True})
            outputs = {"last_hidden_state": (outputs.get("decoder_hidden_states") or outputs["hidden_states"])[-1]}
        states: Tensor = outputs["last_hidden_state"]
        return states

    def whole(self, batch: Batch) -> Any:
        """Outputs of the model with its head, by their names.

        Raises:
            InputError: it cannot run on the batch.
        """
        return self._call(self.model, self._complete(self.model, batch))

    def _call(self, module: Any, batch: Mapping[str, Any]) -> Any:
        device = next(self.model.parameters()).device
        moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
        try:
            return module(**moved)
        except InputError:
            raise
        except _UNFIT as error:
            raise InputError(f"the model cannot run on {self.text} ({named(error)})") from error

    def _complete(self, module: Any, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        config = getattr(module, "config", None)
        if not getattr(config, "is_encoder_decoder", False) or "decoder_input_ids" in batch:
            return batch
        decoder = {"decoder_input_ids": batch["input_ids"]}
        if "attention_mask" in batch:
            decoder["decoder_attention_mask"] = batch["attention_mask"]
        return {**batch, **decoder}

    def _check_vocabulary(self, base: Any, batch: Mapping[str, Any]) -> None:
        known = _vocabulary(base)
        largest, least = int(batch["input_ids"].max()), int(batch["input_ids"].min())
        if known is not None and not 0 <= least <= largest < known:
            raise InputError(
                f"{self.text} holds token {largest if least >= 0 else least}, the model knows 0 to {known - 1}: "
                "tokenise it with the model's own tokenizer"
            )


def _vocabulary(base: Any) -> int | None:
    """How many tokens the model has embeddings of; None where it cannot say (a module around a model)."""
    try:
        return getattr(base.get_input_embeddings(), "num_embeddings", None)
    except (AttributeError, NotImplementedError):
        return None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, every module's own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def naming_outputs(model: nn.Module) -> Iterator[None]:
    """Outputs by their names inside, where the model's config asks for tuples.

    An argument to that effect would not do: some models run their inner ones as the config says.
    """
    configs = {id(c): c for m in model.modules() if (c := m.__dict__.get("config")) is not None}
    changed = [config for config in configs.values() if getattr(config, "return_dict", True) is False]
    for config in changed:
        config.return_dict = True
    try:
        yield
    finally:
        for config in changed:
            config.return_dict = False


def not_finite(what: str, dtype: torch.dtype) -> InputError:
    """The error of a model whose `what` overflow, or hold NaN, in `dtype`."""
    remedy = "run it in float32 (load it so; compress: --dtype float32)" if dtype.itemsize < 4 else "mend its weights"
    return InputError(f"{what} hold NaN or Inf in {str(dtype).removeprefix('torch.')}: {remedy}")


def resolve_device(device: str) -> torch.device:
    """`auto` becomes CUDA where there is one.

    Raises:
        InputError: not a device, or not there.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"device {device!r}: use auto, cpu, cuda or cuda:N") from error
    if found.type not in ("cpu", "cuda"):
        raise InputError(f"device {device!r}: use auto, cpu, cuda or cuda:N")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {device!r}: this machine has {torch.cuda.device_count()} CUDA devices")
    return found
