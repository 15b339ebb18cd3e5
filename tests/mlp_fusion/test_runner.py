"""`Runner`: a model on text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from moe_models import moe_model

from families import tiny_model, token_batch
from mlp_fusion import InputError
from mlp_fusion.running.runner import Runner, resolve_device


def test_modes_and_config_are_as_before_whatever_happens() -> None:
    model = tiny_model("bert").train()
    model.base_model.encoder.eval()
    model.config.return_dict = False
    modes = [module.training for module in model.modules()]

    def run() -> None:
        with Runner(model) as runner:
            assert not any(module.training for module in model.modules())
            assert runner.hidden_states(token_batch()).shape == (4, 9, 24)
            raise KeyError

    with pytest.raises(KeyError):
        run()
    assert [module.training for module in model.modules()] == modes
    assert model.config.return_dict is False


def test_base_and_whole_are_the_models_own_outputs() -> None:
    model, batch = tiny_model("gpt2", task="CausalLM"), token_batch()
    with torch.no_grad(), Runner(model) as runner:
        states, logits = runner.hidden_states(batch), runner.whole(batch).logits
        assert torch.equal(states, model.base_model(**batch).last_hidden_state)
        assert torch.equal(logits, model(**batch).logits)


def test_the_whole_model_runs_where_a_part_of_its_head_is_to() -> None:
    model, batch = tiny_model("gpt2", task="CausalLM"), token_batch()
    with torch.no_grad(), Runner(model) as runner:
        assert "logits" not in runner.base(batch, ["transformer.h.0.mlp", "transformer"])
        assert "logits" in runner.base(batch, ["transformer.h.0.mlp", "lm_head"])
        assert "last_hidden_state" in Runner(model.base_model).base(batch, ["h.0.mlp"])


def test_nothing_is_cached() -> None:
    """Switch takes no argument to that effect."""
    model, batch = moe_model("SwitchTransformersConfig"), token_batch()
    assert model(**batch, decoder_input_ids=batch["input_ids"]).past_key_values is not None
    with Runner(model) as runner:
        assert "past_key_values" not in runner.whole(batch)
    assert model.config.use_cache is model.decoder.config.use_cache is True


def test_gradients_are_recorded_where_the_caller_wants_them() -> None:
    model = tiny_model("bert")
    with Runner(model) as runner:
        assert runner.hidden_states(token_batch()).requires_grad
        with torch.no_grad():
            assert not runner.hidden_states(token_batch()).requires_grad


@pytest.mark.parametrize("bad", [-1, 97])
def test_tokens_that_the_model_does_not_know(bad: int) -> None:
    batch = token_batch()
    batch["input_ids"][1, 2] = bad
    with Runner(tiny_model("bert"), "the calibration text") as runner, pytest.raises(InputError) as caught:
        runner.base(batch)
    assert str(caught.value).startswith(f"the calibration text holds token {bad}, the model knows 0 to 96: ")


def test_what_a_model_cannot_run_on_is_one_line() -> None:
    batch = {**token_batch(), "position_ids": torch.full((4, 9), 99)}
    with Runner(tiny_model("bert"), "the text") as runner, pytest.raises(InputError) as caught:
        runner.whole(batch)
    message = str(caught.value)
    assert message.startswith("the model cannot run on the text (")
    assert "\n" not in message


def _tiny_t5() -> Any:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 97}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)).eval()


def test_a_decoder_reads_the_encoders_text_unless_it_has_its_own() -> None:
    """`T5Model` refuses a batch without decoder ids; with them it is left alone."""
    model, batch = _tiny_t5(), token_batch()
    own = token_batch(seed=1, length=5)["input_ids"]
    with torch.no_grad(), Runner(model) as runner:
        assert runner.hidden_states(batch).shape == (4, 9, 16)
        decoded = {"decoder_input_ids": batch["input_ids"], "decoder_attention_mask": batch["attention_mask"]}
        wanted = model(**batch, **decoded, output_hidden_states=True).decoder_hidden_states[-1]
        assert torch.equal(runner.hidden_states(batch), wanted)
        given = runner.hidden_states({**batch, "decoder_input_ids": own})
        assert torch.equal(
            given, model(**batch, decoder_input_ids=own, output_hidden_states=True).decoder_hidden_states[-1]
        )


def test_devices() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("gpu", "mps", "cuda:99"):
        with pytest.raises(InputError, match=f"device '{name}': "):
            resolve_device(name)
