"""`Runner`: a model on batches, in the mode, on the device and with the errors that all of the package shares."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mlp_fusion.errors import InputError, SkippableError, named
from mlp_fusion.running.batches import Batch, has_other_inputs
from mlp_fusion.running.positions import by_sequence

#: What a model raises on inputs that do not suit it.
UNFIT = (ValueError, IndexError, TypeError, RuntimeError, AttributeError, UnboundLocalError)
#: Keys of configs for the tokens in whose place images and sounds are put; they may lie beyond the vocabulary.
#: Devices that there is autocast for.
_AUTOCASTING = ("cpu", "cuda", "mps", "xpu")
_PLACEHOLDER = re.compile(r"(.+_)?(image|video|audio|vision|speech).*_token_(id|index)")


class Runner:
    """Runs a Hugging Face model on batches, inside a `with` block: in evaluation mode, on the model's device.

    Every module's own mode is back afterwards, whatever happens inside. Outputs have names, whether or not the model's
    config asks for tuples. No cache of keys and values is made, as nothing is generated. Encoder-decoder models whose
    batches lack `decoder_input_ids` read the encoder's text in the decoder, too. Images and sounds get the model's
    dtype. Gradients are recorded or not as around the call.

    Args:
        model: the model.
        text: what the caller calls the text, or whatever it runs on, for errors.
    """

    def __init__(self, model: nn.Module, text: str = "the sample") -> None:
        self.model, self.text = model, text
        #: Called before a batch is run a second time, for its last hidden states.
        self.again: Callable[[], object] = lambda: None
        self._inside = ExitStack()

    def __enter__(self) -> Runner:
        with ExitStack() as entered:
            entered.enter_context(evaluating(self.model))
            entered.enter_context(naming_outputs(self.model))
            entered.enter_context(_configured(self.model, "use_cache", False))
            self._inside = entered.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._inside.close()

    def base(self, batch: Mapping[str, Any], paths: Collection[str] = ()) -> Any:
        """Outputs of the model without its head, by their names.

        The head may ask for more than token ids, and makes the largest tensors of all; few have FFNs.

        Args:
            batch: what it is run on.
            paths: of modules that are to run: where one of them is the head's, the whole model runs.

        Raises:
            InputError: it cannot run on the batch.
        """
        base: Any = getattr(self.model, "base_model", self.model)
        inside = {name for name, module in self.model.named_modules() if module is base} if paths else {""}
        reached = all(any(not name or f"{path}.".startswith(f"{name}.") for name in inside) for path in paths)
        # Of some models the attribute with the prefix's name is a part that takes something else.
        if not reached or not any(name in inspect.signature(base.forward).parameters for name in batch):
            base = self.model
        self._check_vocabulary(base, batch)
        return self.call(base, self._complete(base, batch))

    def final_states(self, batch: Batch) -> list[Tensor]:
        """`(batch, ..., d)`: the last hidden states; of a model with towers side by side (CLIP), those of each.

        Raises:
            InputError: the model cannot run on the batch, or puts out no hidden states.
        """
        outputs = self.base(batch)
        if isinstance(outputs, Mapping):
            if "last_hidden_state" in outputs:
                return [outputs["last_hidden_state"]]
            parts = [part for part in outputs.values() if isinstance(part, Mapping)]
            towers = [part["last_hidden_state"] for part in parts if part.get("last_hidden_state") is not None]
            if towers and "logits" not in outputs:
                return towers
            # A model that has no base by itself, such as T5 with its head.
            self.again()
            outputs = self.base({**batch, "output_hidden_states": True})
            headed = [part for part in outputs.values() if isinstance(part, Mapping) and "logits" in part]
            for part in (outputs, *headed):
                states = part.get("decoder_hidden_states") or part.get("hidden_states")
                if states and isinstance(states[-1], Tensor):
                    return [states[-1]]
        raise SkippableError(f"{type(self.model).__name__} puts out no hidden states to compare: load its base model")

    def hidden_states(self, batch: Batch) -> Tensor:
        """`(batch, length, d)`: the last hidden states of a model that has them in one piece.

        Raises:
            InputError: as :meth:`final_states`, or there are several.
        """
        states = self.final_states(batch)
        if len(states) > 1:
            raise InputError(f"{type(self.model).__name__} has {len(states)} towers side by side: load one of them")
        return states[0]

    def counted_states(self, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        """Each of :meth:`final_states`, and which of its positions count, `(batch, ...)` bool on the CPU."""
        decodes = getattr(getattr(self.model, "config", None), "is_encoder_decoder", False)
        found = []
        for states in self.final_states(batch):
            mask, laid = by_sequence({"states": [states]}, batch, "decoder" if decodes else "")
            found.append((laid["states"], mask))
        return found

    def whole(self, batch: Batch) -> Any:
        """Outputs of the model with its head, by their names.

        Raises:
            InputError: it cannot run on the batch.
        """
        return self.call(self.model, self._complete(self.model, batch))

    def call(self, module: Any, batch: Mapping[str, Any]) -> Any:
        """What `module`, the model or a part or method of it, makes of tensors, on the device and in the dtype.

        Raises:
            InputError: it cannot run on them.
        """
        device = next(self.model.parameters()).device
        dtype = next((p.dtype for p in self.model.parameters() if p.is_floating_point()), None)

        def moved(name: str, value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return value.to(device, dtype if value.is_floating_point() and "mask" not in name else None)

        given = {name: moved(name, value) for name, value in batch.items()}
        # Besides the configs: an argument may have a default of its own.
        if "use_cache" in inspect.signature(getattr(module, "forward", module)).parameters:
            given.setdefault("use_cache", False)
        try:
            return module(**given)
        except InputError:
            raise
        except UNFIT as error:
            raise InputError(f"the model cannot run on {self.text} ({named(error)})") from error

    def _complete(self, module: Any, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        config = getattr(module, "config", None)
        if not getattr(config, "is_encoder_decoder", False) or "decoder_input_ids" in batch:
            return batch
        if "input_ids" not in batch:
            # Decoders of other things than text (DETR's queries) need none.
            if (
                "decoder_input_ids" in inspect.signature(module.forward).parameters
                and "decoder_inputs_embeds" not in batch
            ):
                raise InputError(
                    f"{self.text} has no decoder_input_ids, and the decoder cannot read {', '.join(batch)}: add them, "
                    "the tokens that the decoder is to read"
                )
            return batch
        decoder = {"decoder_input_ids": batch["input_ids"]}
        if "attention_mask" in batch:
            decoder["decoder_attention_mask"] = batch["attention_mask"]
        return {**batch, **decoder}

    def check_vocabulary(self, batch: Mapping[str, Any]) -> None:
        """Raise InputError for token ids that the model without its head does not know."""
        self._check_vocabulary(getattr(self.model, "base_model", self.model), batch)

    def _check_vocabulary(self, base: Any, batch: Mapping[str, Any]) -> None:
        known = _vocabulary(base)
        if known is None or "input_ids" not in batch:
            return
        ids = batch["input_ids"]
        if has_other_inputs({name: value for name, value in batch.items() if isinstance(value, Tensor)}):
            ids = ids[~torch.isin(ids, torch.tensor(placeholders(base.config), device=ids.device))]
        if ids.numel() == 0:
            return
        largest, least = int(ids.max()), int(ids.min())
        if not 0 <= least <= largest < known:
            raise InputError(
                f"{self.text} holds token {largest if least >= 0 else least}, the model knows 0 to {known - 1}: "
                "tokenise it with the model's own tokenizer"
            )


def placeholders(config: Any) -> list[int]:
    """Tokens in whose place images and sounds are put, as a config names them."""
    return [v for k, v in vars(config).items() if type(v) is int and _PLACEHOLDER.fullmatch(k)]


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
def ordinary() -> Iterator[None]:
    """Inside, neither autocast nor inference mode holds: both would change what comes out, without a word."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        for device in _AUTOCASTING:
            if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, torch's own generators begin at `seed`, for what draws from no other; then they are as they were."""
    # GPUs that nothing has used have no generators yet, and get none by this.
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else range(0)
    with torch.random.fork_rng(devices):
        torch.default_generator.manual_seed(seed)
        if devices:
            torch.cuda.manual_seed_all(seed)
        yield


def naming_outputs(model: nn.Module) -> AbstractContextManager[None]:
    """Outputs by their names inside, where the model's config asks for tuples.

    An argument to that effect would not do: some models run their inner ones as the config says.
    """
    return _configured(model, "return_dict", True)


@contextmanager
def _configured(model: nn.Module, name: str, value: bool) -> Iterator[None]:
    """Inside, all configs in a model that say the opposite of `value` for `name` say that."""
    configs = {id(c): c for m in model.modules() if (c := m.__dict__.get("config")) is not None}
    changed = [config for config in configs.values() if getattr(config, name, value) is (not value)]
    for config in changed:
        setattr(config, name, value)
    try:
        yield
    finally:
        for config in changed:
            setattr(config, name, not value)


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
