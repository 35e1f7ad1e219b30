"""Language models of transformers as the trunk: the same numbers as there."""

import pytest
import torch
from language_models import FAMILIES, NUM_TEXT, begun, image, language_model, text
from tiny import awake

from transfusion_pytorch import Transfusion

pytest.importorskip("transformers")
from transformers.masking_utils import create_causal_mask

CLOSE = dict(rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(family):
    theirs, batch = language_model(family), text(3, 70)  # longer than what the scalings were made for
    with torch.no_grad():
        made = begun(theirs)(batch, return_loss=False)
        torch.testing.assert_close(made[..., :NUM_TEXT], theirs(batch).logits, **CLOSE)


@pytest.mark.parametrize("family", ["llama, biases", "llama, tied", "qwen2", "qwen3"])
def test_gradients_of_text_are_those_of_transformers(family):
    theirs, batch = language_model(family), text(2, 12)
    model = begun(theirs)
    theirs(batch).logits.square().mean().backward()
    model(batch, return_loss=False)[..., :NUM_TEXT].square().mean().backward()
    layer, decoder = model.transformer.layers[1], theirs.model.layers[1]
    of_qkv, attention = layer.attn.to_qkv.weight.grad, decoder.self_attn
    torch.testing.assert_close(model.text_embedding.text.weight.grad, theirs.model.embed_tokens.weight.grad, **CLOSE)
    torch.testing.assert_close(layer.attn.to_out.weight.grad, attention.o_proj.weight.grad, **CLOSE)
    torch.testing.assert_close(layer.ff_norm.weight.grad, decoder.post_attention_layernorm.weight.grad, **CLOSE)
    torch.testing.assert_close(of_qkv[-len(attention.v_proj.weight) :], attention.v_proj.weight.grad, **CLOSE)
    # queries are the same rows in another order
    queries, expected = of_qkv[: len(attention.q_proj.weight)], attention.q_proj.weight.grad
    torch.testing.assert_close(queries.norm(dim=1).sort().values, expected.norm(dim=1).sort().values, **CLOSE)


@pytest.mark.parametrize("family", ["llama, yarn", "qwen2", "qwen3"])
def test_mixed_input_attends_as_transformers_says(family):
    """Both ways inside of a span, to the past elsewhere: with their mask for blocks, and our positions."""
    theirs = language_model(family)
    model, seen = begun(theirs).eval(), {}
    trunk = model.transformer
    trunk.register_forward_pre_hook(lambda _, args, options: seen.update(options, x=args[0]), with_kwargs=True)
    trunk.register_forward_hook(lambda _, args, out: seen.update(out=out))
    with torch.no_grad():
        model([[text(5), image(), text(3), (1, torch.randn(3, 3)), image(2), text(4)]], return_loss=False)
        block = seen["conditioning"].modulation_index - 1  # -1 for text
        mask = create_causal_mask(
            config=theirs.config,
            inputs_embeds=seen["x"][None],
            attention_mask=None,
            cache=None,
            block_sequence_ids=block[None],
        )
        made = theirs.model(
            inputs_embeds=seen["x"][None], attention_mask=mask, position_ids=seen["position"][None]
        ).last_hidden_state
    torch.testing.assert_close(seen["out"], made[0], **CLOSE)


@pytest.mark.parametrize("family", ["llama, other heads", "llama, tied", "qwen3"])
@pytest.mark.parametrize("cache_kv", [True, False])
def test_greedy_continuations_are_those_of_transformers(family, cache_kv):
    theirs, prompt = language_model(family), text(1, 7)
    written = theirs.generate(prompt, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 7:]
    made = begun(theirs).generate_text_only(prompt, 27, temperature=0.0, cache_kv=cache_kv)
    assert made[0].tolist() == written.tolist()


@pytest.mark.parametrize("family", ["llama, tied", "qwen2", "qwen3"])
@torch.no_grad()
def test_types_are_kept(family, tmp_path):
    """In the model, in its files, and as far as bfloat16 goes in its logits."""
    batch, exact = text(2, 20), language_model(family)
    expected = exact(batch).logits
    theirs = language_model(family).bfloat16()
    model = begun(theirs)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.text_embedding.text.weight, theirs.model.embed_tokens.weight)
    logits = model.eval()(batch, return_loss=False)
    errors = [(made.float() - expected).square().mean() for made in (logits[..., :NUM_TEXT], theirs(batch).logits)]
    assert errors[0] < 1.5 * errors[1]
    assert errors[0] < 1e-3 * expected.square().mean()
    model.save_pretrained(tmp_path)
    loaded = Transfusion.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(loaded(batch, return_loss=False), logits)
    assert {parameter.dtype for parameter in begun(theirs, dtype=torch.float32).parameters()} == {torch.float32}


def test_new_rows_are_the_mean_of_the_vocabulary():
    theirs = language_model()
    model = begun(theirs)
    for rows, table in ((theirs.model.embed_tokens, model.text_embedding), (theirs.lm_head, model.to_logits)):
        mean = rows.weight.mean(dim=0).expand_as(table.markers.weight)
        torch.testing.assert_close(table.markers.weight, mean)
    tied = begun(language_model("llama, tied"))
    assert not list(tied.to_logits.parameters())
    hidden = torch.randn(3, 48)
    rows = torch.cat((tied.text_embedding.text.weight, tied.text_embedding.markers.weight[:-1]))
    torch.testing.assert_close(tied.to_logits(hidden), hidden @ rows.t())


def test_the_language_model_is_left_alone():
    theirs = language_model()
    before = {name: parameter.clone() for name, parameter in theirs.named_parameters()}
    awake(begun(theirs))
    for name, parameter in theirs.named_parameters():
        assert torch.equal(parameter, before[name])
