# SPDX-License-Identifier: Apache-2.0
"""RemoteCache inside transformers, on small random models of the common families: with raw16 the
outputs are the stock ones to rounding, whatever the path (decode, prefill, resume, batch)."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import kivi  # noqa: E402
import kivi.hf  # noqa: E402

SMALL = dict(vocab_size=128, hidden_size=128, intermediate_size=128, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, head_dim=64,
             max_position_embeddings=2048, pad_token_id=0, bos_token_id=1, eos_token_id=2)
FAMILIES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {}),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, {"use_sliding_window": False}),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, {}),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM, {"sliding_window": None}),
    "phi3": (transformers.Phi3Config, transformers.Phi3ForCausalLM,
             {"hidden_size": 256, "sliding_window": None}),
    "gemma": (transformers.GemmaConfig, transformers.GemmaForCausalLM, {}),
}


def build(family="llama"):
    config_class, model_class, more = FAMILIES[family]
    torch.manual_seed(7)
    settings = {**SMALL, **more}
    if family == "phi3":  # has no head_dim of its own
        settings.pop("head_dim")
    model = model_class(config_class(**settings)).eval()
    with torch.no_grad():  # attention that is not nearly uniform
        for name, weight in model.named_parameters():
            if "q_proj" in name or "k_proj" in name or "qkv_proj" in name:
                weight.mul_(3)
    kivi.hf.register()
    return model


def ids(count, seed=3, batch=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 128, (batch, count), generator=generator)


def stock(model, tokens, mask=None):
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        return model(tokens, attention_mask=mask).logits


def remote(model, tokens, cache, mask=None, implementation="kivi"):
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        return model(tokens, attention_mask=mask, past_key_values=cache).logits


def close(a, b, bound=2e-3):
    return (a - b).abs().max() / b.abs().max() < bound


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_stock_logits_with_raw16(client, family):
    model = build(family)
    tokens = ids(90)
    with client.session("a", model=model.config, codec="raw16") as s:
        cache = kivi.hf.RemoteCache(model.config, s)
        first = remote(model, tokens[:, :70], cache)  # prefill, attended locally
        second = remote(model, tokens[:, 70:89], cache)  # a chunk through the service
        third = remote(model, tokens[:, 89:], cache)  # decode
    assert close(torch.cat([first, second, third], 1), stock(model, tokens))


def test_prefill_over_a_stored_prefix_merges(client):
    model = build()
    tokens = ids(600)
    with client.session("a", model=model.config, codec="raw16") as s:
        cache = kivi.hf.RemoteCache(model.config, s)
        parts = [remote(model, tokens[:, a:b], cache) for a, b in ((0, 300), (300, 600))]
    assert close(torch.cat(parts, 1), stock(model, tokens))


def test_generate_says_what_stock_generate_says(client):
    model = build()
    tokens = ids(40)
    model.set_attn_implementation("sdpa")
    want = model.generate(tokens, max_new_tokens=20, do_sample=False)
    model.set_attn_implementation("kivi")
    with client.session("a", model=model.config, codec="raw16") as s:
        cache = kivi.hf.RemoteCache(model.config, s)
        got = model.generate(tokens, max_new_tokens=20, do_sample=False, past_key_values=cache)
    assert got.tolist() == want.tolist()


def test_a_session_goes_on_after_both_sides_were_restarted(daemon):
    model = build()
    tokens = ids(400)
    with kivi.Client(daemon.target) as client:
        s = client.session("chat", model=model.config)
        cache = kivi.hf.RemoteCache(model.config, s)
        remote(model, tokens[:, :350], cache)
        s.commit()
        want = remote(model, tokens[:, 350:], cache)
    daemon.kill()
    daemon.start()
    with kivi.Client(daemon.target) as client, client.session("chat", model=model.config) as s:
        assert s.length == 350
        got = remote(model, tokens[:, 350:], kivi.hf.RemoteCache(model.config, s))
    assert close(got, want, 1e-5)


def test_a_second_cache_goes_on_with_a_session_that_was_opened_empty(client):
    model = build()
    tokens = ids(60)
    with client.session("turns", model=model.config, codec="raw16") as s:
        assert s.usable == 0
        first = remote(model, tokens[:, :40], kivi.hf.RemoteCache(model.config, s))
        assert s.usable == s.length == 40
        second = remote(model, tokens[:, 40:], kivi.hf.RemoteCache(model.config, s))
    assert close(torch.cat([first, second], 1), stock(model, tokens))


def test_left_padded_batches_give_what_each_gives_alone(client):
    model = build()
    lengths = (60, 35)
    rows = [ids(n, seed=n) for n in lengths]
    padded = torch.cat([torch.nn.functional.pad(r, (60 - r.shape[1], 0)) for r in rows])
    mask = (padded != 0).long()
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    sessions = [client.session(f"b-{i}", model=model.config, codec="raw16") for i in range(2)]
    cache = kivi.hf.RemoteCache(model.config, sessions)
    model.set_attn_implementation("kivi")
    with torch.no_grad():
        logits = model(padded, attention_mask=mask, position_ids=position,
                       past_key_values=cache).logits
        step = model(torch.tensor([[5], [6]]), attention_mask=torch.cat(
            [mask, torch.ones(2, 1, dtype=torch.long)], 1),
            position_ids=position[:, -1:] + 1, past_key_values=cache).logits
    for i, row in enumerate(rows):
        alone = stock(model, torch.cat([row, torch.tensor([[5 + i]])], 1))
        assert close(torch.cat([logits[i, 60 - lengths[i]:], step[i]]), alone[0])


def test_fetch_mode_serves_stock_attention(client):
    model = build()
    tokens = ids(500)
    with client.session("a", model=model.config, codec="raw16") as s:
        cache = kivi.hf.RemoteCache(model.config, s, mode="fetch")
        parts = [remote(model, tokens[:, a:b], cache, implementation="sdpa")
                 for a, b in ((0, 400), (400, 499), (499, 500))]
    assert close(torch.cat(parts, 1), stock(model, tokens))


def test_two_sessions_with_the_same_prompt_hold_one_copy(client):
    model = build()
    tokens = ids(700)
    for name in ("a", "b"):
        with client.session(name, model=model.config) as s:
            remote(model, tokens, kivi.hf.RemoteCache(model.config, s))
    stats = client.stats()
    assert stats.blocks_shared == stats.blocks_sealed == 4  # 700 tokens: 572 before the window


def test_what_cannot_be_done_is_refused_with_advice(client):
    model = build()
    with client.session("a", model=model.config) as s:
        cache = kivi.hf.RemoteCache(model.config, s)
        model.set_attn_implementation("kivi")
        with pytest.raises(NotImplementedError, match="num_beams=1"):
            cache.reorder_cache(torch.tensor([0]))
        with pytest.raises(NotImplementedError, match="without an assistant"):
            cache.crop(-1)
        with pytest.raises(ValueError, match="one session per sequence"):
            model(ids(4, batch=2), past_key_values=cache)
    with client.session("b", model=model.config) as s:
        with pytest.raises(NotImplementedError, match="'packed' is described"):
            kivi.hf.RemoteCache(model.config, s, mode="packed")
        with pytest.raises(ValueError, match="not one of attend, fetch"):
            kivi.hf.RemoteCache(model.config, s, mode="pack")
    with pytest.raises(NotImplementedError, match="sliding_window"):
        kivi.hf.check(transformers.MistralConfig(**{**SMALL, "sliding_window": 64}))
    with pytest.raises(NotImplementedError, match="sliding_attention"):
        kivi.hf.check(transformers.Gemma2Config(**SMALL))


@pytest.mark.parametrize("how,advice", [(dict(num_beams=2), "num_beams=1|one session per sequence"),
                                        (dict(assistant=True), "without an assistant")])
def test_generate_refuses_what_rewrites_the_past(client, how, advice):
    model = build()
    model.set_attn_implementation("kivi")
    if how.pop("assistant", False):
        torch.manual_seed(5)
        how["assistant_model"] = build()  # another model's guesses: some are taken back
    with client.session("a", model=model.config) as s:
        cache = kivi.hf.RemoteCache(model.config, s)
        with pytest.raises((NotImplementedError, ValueError), match=advice):
            model.generate(ids(40), max_new_tokens=20, do_sample=False, past_key_values=cache, **how)
