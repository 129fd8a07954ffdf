"""heddle inside transformers' models: the same numbers as the model's own attention, or a refusal."""

import subprocess
import sys
import threading

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.20")

import heddle  # noqa: E402
import heddle.hf  # noqa: E402

VOCABULARY = 61
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "eos_token_id": None,
    "bos_token_id": None,
}


@pytest.fixture(autouse=True)
def registered():
    heddle.hf.register()
    with torch.inference_mode():
        yield


def make(kind: str, **changes):
    torch.manual_seed(7)
    config = getattr(transformers, f"{kind}Config")(**SIZES | changes)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


@pytest.fixture
def llama():
    return make("Llama")


@pytest.fixture
def ids():
    return torch.randint(1, VOCABULARY, (2, 37), generator=torch.Generator().manual_seed(3))


def logits(model, implementation, *args, **kwargs):
    model.set_attn_implementation(implementation)
    return model(*args, **kwargs).logits


def assert_same(model, *args, own="sdpa", rows=None, **kwargs):
    """heddle's logits are those of the model's own attention, where rows (bool [B, S]) says that they count."""
    expected = logits(model, own, *args, **kwargs)
    got = logits(model, "heddle", *args, **kwargs)
    if rows is not None:
        expected, got = expected[rows.bool()], got[rows.bool()]
    torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-5)


# --- masks ----------------------------------------------------------------------------------------


def test_causal(llama, ids):
    assert_same(llama, ids)


@pytest.mark.parametrize("pads", [[(0, 5), (0, 0)], [(32, 37), (20, 37)], [(0, 9), (30, 37)], [(10, 14), (0, 3)]])
def test_padding(llama, ids, pads):
    """Left, right, both in one batch, and holes."""
    mask = torch.ones_like(ids)
    for row, (start, end) in enumerate(pads):
        mask[row, start:end] = 0
    assert_same(llama, ids, attention_mask=mask, rows=mask)


def test_a_row_of_padding_alone_is_finite(llama, ids):
    mask = torch.ones_like(ids)
    mask[1] = 0
    out = logits(llama, "heddle", ids, attention_mask=mask)
    assert out.isfinite().all()
    torch.testing.assert_close(out[0], logits(llama, "heddle", ids[:1])[0], rtol=1e-4, atol=1e-5)


def test_packed_sequences(llama, ids):
    """Several texts in one row, told apart by their positions."""
    positions = torch.cat([torch.arange(20), torch.arange(17)]).expand(2, -1)
    assert_same(llama, ids, position_ids=positions, use_cache=False)
    alone = logits(llama, "heddle", ids[:, 20:], use_cache=False)
    packed = logits(llama, "heddle", ids, position_ids=positions, use_cache=False)[:, 20:]
    torch.testing.assert_close(packed, alone, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("additive", [False, True])
def test_a_mask_of_the_caller(llama, ids, additive):
    mask = torch.rand(2, 1, 37, 37, generator=torch.Generator().manual_seed(1)) < 0.5
    mask |= torch.eye(37, dtype=torch.bool)
    mask &= torch.ones(37, 37, dtype=torch.bool).tril()
    if additive:
        mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    assert_same(llama, ids, attention_mask=mask)


def test_an_additive_bias_is_refused(llama, ids):
    bias = torch.zeros(1, 1, 37, 37)
    bias[..., 3] = -2.0
    with pytest.raises(heddle.HeddleNotImplementedError, match=r"^attention_mask: an additive bias"):
        logits(llama, "heddle", ids, attention_mask=bias)


@pytest.mark.parametrize("pads", [None, (0, 9), (8, 12)])
def test_sliding_window(ids, pads):
    """A model's own window; with holes in the batch it counts positions, as the model's mask does."""
    mask = torch.ones_like(ids)
    if pads is not None:
        mask[0, slice(*pads)] = 0
    assert_same(make("Mistral", sliding_window=7), ids, attention_mask=mask, rows=mask)


def test_softcap_and_alternating_windows(ids):
    model = make("Gemma2", sliding_window=7, attn_logit_softcapping=0.5, query_pre_attn_scalar=16)
    assert_same(model, ids, own="eager")
    uncapped = make("Gemma2", sliding_window=7, attn_logit_softcapping=None, query_pre_attn_scalar=16)
    assert (logits(uncapped, "heddle", ids) - logits(model, "heddle", ids)).abs().max() > 1e-3


def test_sinks(ids):
    model = make("GptOss", sliding_window=7, num_local_experts=2, num_experts_per_tok=1)
    for layer in model.model.layers:
        layer.self_attn.sinks.data = torch.randn(6)
    assert_same(model, ids, own="eager")


def test_bidirectional():
    torch.manual_seed(7)
    sizes = {"hidden_size": 48, "num_attention_heads": 6, "intermediate_size": 64, "num_hidden_layers": 2}
    model = transformers.BertModel(transformers.BertConfig(vocab_size=VOCABULARY, **sizes)).eval()
    ids = torch.randint(1, VOCABULARY, (2, 19))
    mask = torch.ones_like(ids)
    mask[0, 11:] = 0
    out = {}
    for implementation in ("sdpa", "heddle"):
        model.set_attn_implementation(implementation)
        out[implementation] = model(ids, attention_mask=mask).last_hidden_state[mask.bool()]
    torch.testing.assert_close(out["heddle"], out["sdpa"], rtol=2e-4, atol=2e-5)


def test_nothing_of_size_sq_sk_is_made():
    """Plain causal attention has no mask, a padded batch a row a request."""
    sizes = {"batch_size": 2, "q_length": 50_000_000, "kv_length": 50_000_000}
    assert heddle.hf.heddle_mask(**sizes) is None
    window = transformers.masking_utils.sliding_window_causal_mask_function(5)
    assert heddle.hf.heddle_mask(**sizes, mask_function=window, local_size=5) is None
    sizes = {"batch_size": 2, "q_length": 100_000, "kv_length": 100_000}
    mask = torch.ones(2, 100_000, dtype=torch.bool)
    assert heddle.hf.heddle_mask(**sizes, attention_mask=mask) is None
    mask[0, :7] = False
    assert heddle.hf.heddle_mask(**sizes, attention_mask=mask).shape == (2, 100_000)


# --- options --------------------------------------------------------------------------------------


def visible(selection: str, length: int) -> torch.Tensor:
    """The selections of these tests by their definition, bool [1, 1, length, length]."""
    i, j = torch.arange(length)[:, None], torch.arange(length)
    rule = {"window": (i - j < 6) | (j < 3), "strided": (i - j < 4) | ((i - j) % 5 == 0)}[selection]
    return (rule & (j <= i))[None, None]


SELECTIONS = {"window": lambda: heddle.select.window(5, n_global=3), "strided": lambda: heddle.select.strided(4, 5)}


@pytest.mark.parametrize("name", SELECTIONS)
def test_selection(llama, ids, name):
    expected = logits(llama, "sdpa", ids, attention_mask=visible(name, 37).expand(2, 1, -1, -1))
    with heddle.hf.options(selection=SELECTIONS[name]()):
        torch.testing.assert_close(logits(llama, "heddle", ids), expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name", SELECTIONS)
@pytest.mark.parametrize("cache", [None, "fp32"])
def test_selection_in_decode(llama, ids, name, cache):
    """Token by token it reads the same keys as in one prefill."""
    llama.set_attn_implementation("heddle")
    past = heddle.hf.HeddleCache(64, page_size=4) if cache else transformers.DynamicCache()
    with heddle.hf.options(selection=SELECTIONS[name]()):
        whole = llama(ids).logits
        steps = [llama(ids[:, :20], past_key_values=past).logits]
        steps += [llama(ids[:, t : t + 1], past_key_values=past).logits for t in range(20, 37)]
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=2e-4, atol=2e-5)


def test_a_selection_of_each_layer(llama, ids):
    seen = []

    def choose(layer, length):
        seen.append((layer, length))
        return heddle.select.window(5) if layer == 1 else None

    with heddle.hf.options(selection=choose):
        some = logits(llama, "heddle", ids)
    assert seen == [(0, 37), (1, 37), (2, 37)]
    dense = logits(llama, "heddle", ids)
    torch.testing.assert_close(some[:, :6], dense[:, :6], rtol=1e-4, atol=1e-5)
    assert (some - dense)[:, 6:].abs().max() > 1e-3


def test_a_selection_and_an_element_mask_are_refused(llama, ids):
    mask = visible("window", 37).expand(2, 1, -1, -1)
    with (
        heddle.hf.options(selection=heddle.select.window(5)),
        pytest.raises(heddle.HeddleNotImplementedError, match=r"^selection: "),
    ):
        logits(llama, "heddle", ids, attention_mask=mask)


@pytest.mark.parametrize("name", ["int8-baseline", "int8-a", "int8-b", "fp8"])
def test_kv_format(llama, ids, name):
    dense = logits(llama, "heddle", ids)
    with heddle.hf.options(kv_format=name):
        quantized = logits(llama, "heddle", ids)
    error = (quantized - dense).norm() / dense.norm()
    assert 1e-4 < error < 0.1
    torch.testing.assert_close(logits(llama, "heddle", ids), dense, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["int8-baseline", "int8-a", "int8-b", "fp8"])
@pytest.mark.parametrize("cache", [None, "bf16", "same"])
def test_a_format_that_attention_lacks_is_read_from_a_cache(monkeypatch, ids, name, cache):
    """As on a GPU, here on the host: from the model's own cache if it is of the format, else from one for the call."""
    llama = make("Llama", num_hidden_layers=1)
    with heddle.hf.options(kv_format=name):
        expected = logits(llama, "heddle", ids)
        monkeypatch.setattr(heddle.hf._cache, "_lacks_formats", lambda q: True)
        formats = []
        pool = heddle.KVCache
        monkeypatch.setattr(heddle, "KVCache", lambda *args, **kw: formats.append(kw["format"]) or pool(*args, **kw))
        kept = cache and heddle.hf.HeddleCache(64, format=name if cache == "same" else cache)
        got = logits(llama, "heddle", ids, past_key_values=kept)
    assert formats == {None: [name], "bf16": ["bf16", name], "same": [name]}[cache]
    assert (got - expected).norm() / expected.norm() < 1e-3


def test_dtype(llama, ids):
    """Attention in another dtype than the model's, which gets its own back; a cache stores what came."""
    dense = logits(llama, "heddle", ids)
    with heddle.hf.options(dtype=torch.bfloat16):
        rounded = logits(llama, "heddle", ids)
        padding = torch.ones_like(ids)
        padding[0, :4] = 0
        assert logits(llama, "heddle", ids, attention_mask=padding).dtype == torch.float32
        cache = heddle.hf.HeddleCache(64, format="bf16")
        steps = [llama(part, past_key_values=cache).logits for part in (ids[:, :30], ids[:, 30:])]
    assert rounded.dtype == torch.float32
    for got in (rounded, torch.cat(steps, 1)):
        assert 1e-4 < (got - dense).norm() / dense.norm() < 0.02


def test_a_name_of_its_own_options(llama, ids):
    heddle.hf.register("heddle-narrow", selection=heddle.select.window(5, n_global=3))
    expected = logits(llama, "sdpa", ids, attention_mask=visible("window", 37).expand(2, 1, -1, -1))
    torch.testing.assert_close(logits(llama, "heddle-narrow", ids), expected, rtol=2e-4, atol=2e-5)
    with heddle.hf.options(selection=None):
        assert_dense = logits(llama, "heddle-narrow", ids)
    torch.testing.assert_close(assert_dense, logits(llama, "heddle", ids), rtol=0, atol=0)


def test_options_nest_and_end(llama, ids):
    dense = logits(llama, "heddle", ids)
    with heddle.hf.options(selection=heddle.select.window(5)):
        narrow = logits(llama, "heddle", ids)
        with heddle.hf.options(backend="reference"):
            torch.testing.assert_close(logits(llama, "heddle", ids), narrow, rtol=2e-4, atol=2e-5)
            assert "reference" in heddle.last_kernel()
        assert torch.equal(logits(llama, "heddle", ids), narrow)
    assert torch.equal(logits(llama, "heddle", ids), dense)
    assert not torch.equal(narrow, dense)


def test_options_are_local_to_a_thread(llama, ids):
    dense = logits(llama, "heddle", ids)
    others = []

    def run():
        with torch.inference_mode():
            others.append(llama(ids).logits)

    with heddle.hf.options(selection=heddle.select.window(5)):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        assert not torch.equal(llama(ids).logits, dense)
    assert torch.equal(others[0], dense)


def test_an_unknown_option_is_refused():
    with pytest.raises(heddle.HeddleTypeError, match=r"^selections: no such option; allowed are .*selection"):
        heddle.hf.options(selections=None).__enter__()


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_another_implementations_name_is_refused(name):
    with pytest.raises(heddle.HeddleValueError, match=rf"^name: '{name}' is another implementation"):
        heddle.hf.register(name)


# --- what attention cannot do ---------------------------------------------------------------------


def test_gradients_are_refused(ids):
    with torch.inference_mode(False):
        model = make("Llama")
        with pytest.raises(heddle.HeddleNotImplementedError, match="gradient"):
            logits(model, "heddle", ids.clone())


def test_dropout_is_refused(ids):
    model = make("Llama", attention_dropout=0.1).train()
    with pytest.raises(heddle.HeddleNotImplementedError, match=r"^dropout: "):
        logits(model, "heddle", ids)


def test_a_static_cache_is_refused(llama, ids):
    llama.set_attn_implementation("heddle")
    cache = transformers.StaticCache(config=llama.config, max_cache_len=64)
    with pytest.raises(heddle.HeddleNotImplementedError, match=r"^past_key_values: .*StaticCache"):
        llama(ids, past_key_values=cache)


# --- HeddleCache ----------------------------------------------------------------------------------


def generate(model, implementation, ids, cache=None, new=16, **kwargs):
    model.set_attn_implementation(implementation)
    kwargs.setdefault("attention_mask", torch.ones_like(ids))
    return model.generate(ids, past_key_values=cache, do_sample=False, max_new_tokens=new, **kwargs)


@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_generation(llama, ids, page_size):
    expected = generate(llama, "sdpa", ids)
    assert torch.equal(generate(llama, "heddle", ids), expected)
    assert torch.equal(generate(llama, "heddle", ids, heddle.hf.HeddleCache(64, page_size=page_size)), expected)


@pytest.mark.parametrize("pads", [[(0, 5), (0, 0)], [(0, 1), (0, 30)]])
def test_generation_of_a_padded_batch(llama, ids, pads):
    mask = torch.ones_like(ids)
    for row, (start, end) in enumerate(pads):
        mask[row, start:end] = 0
    expected = generate(llama, "sdpa", ids, attention_mask=mask)
    cache = heddle.hf.HeddleCache(64, page_size=8)
    assert torch.equal(generate(llama, "heddle", ids, cache, attention_mask=mask), expected)
    # Padding takes no place in the cache.
    lengths = mask.sum(1) + 15
    assert torch.equal(cache.layers[0].seq_lens, lengths.to(torch.int32))


@pytest.mark.parametrize("padded", [False, True])
def test_chunked_prefill(llama, ids, padded):
    llama.set_attn_implementation("heddle")
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :13] = 0  # all of the second request's first chunk, some of its second
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    whole = llama(ids, attention_mask=mask, position_ids=positions).logits
    cache = heddle.hf.HeddleCache(40, page_size=4)
    chunks = [
        llama(ids[:, a:b], attention_mask=mask[:, :b], position_ids=positions[:, a:b], past_key_values=cache).logits
        for a, b in ((0, 10), (10, 31), (31, 32), (32, 37))
    ]
    rows = mask.bool()
    torch.testing.assert_close(torch.cat(chunks, 1)[rows], whole[rows], rtol=2e-4, atol=2e-5)


def test_crop_takes_tokens_back(llama, ids):
    llama.set_attn_implementation("heddle")
    cache = heddle.hf.HeddleCache(64, page_size=4)
    whole = llama(ids, past_key_values=cache).logits
    cache.crop(-7)
    assert cache.get_seq_length() == 30
    again = llama(ids[:, 30:], past_key_values=cache).logits
    torch.testing.assert_close(again, whole[:, 30:], rtol=2e-4, atol=2e-5)
    with pytest.raises(heddle.HeddleValueError, match=r"^tokens_to_remove: -38; allowed are -37 to 0"):
        cache.crop(-38)


def test_a_cache_is_used_again_after_reset(llama, ids):
    llama.set_attn_implementation("heddle")
    cache = heddle.hf.HeddleCache(64, format="int8-b")
    first = llama(ids, past_key_values=cache).logits
    llama(ids[:, :1], past_key_values=cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.bytes_per_token == 0
    assert torch.equal(llama(ids, past_key_values=cache).logits, first)


@pytest.mark.parametrize(
    ("name", "bound"),
    [
        ("fp32", 1e-5),
        ("bf16", 2e-2),
        ("fp16", 2e-3),
        ("int8-baseline", 0.1),
        ("int8-a", 0.05),
        ("int8-b", 0.1),
        ("fp8", 0.1),
    ],
)
def test_formats(llama, ids, name, bound):
    llama.set_attn_implementation("heddle")
    whole = llama(ids).logits
    cache = heddle.hf.HeddleCache(64, format=name)
    assert cache.bytes_per_token == 0
    llama(ids[:, :30], past_key_values=cache)
    step = llama(ids[:, 30:], past_key_values=cache).logits
    assert (step - whole[:, 30:]).norm() / whole[:, 30:].norm() < bound
    element = {"fp32": 4, "bf16": 2, "fp16": 2}.get(name, 1)
    scales = 4 if name == "int8-a" else 0
    # 3 layers of 2 KV heads: K and V of 16 elements, the value's norm, and scheme A's scale of K.
    assert cache.bytes_per_token == 3 * 2 * (2 * 16 * element + 4 + scales)
    assert cache.saturated >= 0


def test_the_static_scales_cover_the_whole_prompt(llama, ids):
    """Queries too: the first decode step alone would calibrate them on one token."""
    llama.set_attn_implementation("heddle")
    cache = heddle.hf.HeddleCache(64, format="int8-baseline")
    captured = []

    def record(module, args, kwargs, out):
        captured.append(out)

    llama.model.layers[0].self_attn.q_proj.register_forward_hook(record, with_kwargs=True)
    llama(ids, past_key_values=cache)
    rotated = captured[0].view(
        2, 37, 6, 16
    )  # rotary embedding moves no pair's norm, so this bounds the largest element
    largest = (rotated[..., :8] ** 2 + rotated[..., 8:] ** 2).sqrt().max().item()
    scale = float(cache.layers[0].kv.q_scale[0])
    assert 0.5 * largest / 127 < scale <= 1.0001 * largest / 127
    assert cache.saturated == 0


def test_sampling_in_decode(llama, ids):
    """Keeping every key exactly is dense attention; the prefill is dense in any case; draws change with the offset."""
    llama.set_attn_implementation("heddle")

    def steps(sampling, **cache_options):
        cache = heddle.hf.HeddleCache(64, **cache_options)
        with heddle.hf.options(sampling=sampling):
            first = llama(ids[:, :30], past_key_values=cache).logits
            return first, llama(ids[:, 30:31], past_key_values=cache).logits

    prefill, dense = steps(None)
    seen = []

    def everything(layer, keys):
        seen.append((layer, keys))
        return heddle.Sampling("iid", 4, n_recent=keys)

    for got, want in zip(steps(everything), (prefill, dense), strict=True):
        torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-5)
    assert seen[-3:] == [(0, 31), (1, 31), (2, 31)]
    first, drawn = steps(heddle.Sampling("systematic", 8))
    torch.testing.assert_close(first, prefill)
    assert not torch.allclose(drawn, dense, atol=1e-4)
    assert not torch.equal(drawn, steps(heddle.Sampling("systematic", 8, offset=1))[1])
    bernoulli = steps(heddle.Sampling("exact", 0, bernoulli=127), feature_major=True, format="int8-a")[1]
    assert 0 < (bernoulli - dense).norm() / dense.norm() < 0.5

    def with_options(**changes):
        with heddle.hf.options(**changes):
            llama(ids)

    with pytest.raises(heddle.HeddleNotImplementedError, match=r"^sampling: .*HeddleCache"):
        with_options(sampling=heddle.Sampling("iid", 4))


def test_a_full_cache_is_refused_and_keeps_its_tokens(llama, ids):
    llama.set_attn_implementation("heddle")
    cache = heddle.hf.HeddleCache(38)
    whole = llama(ids, past_key_values=cache).logits
    with pytest.raises(heddle.HeddleValueError, match=r"^max_length: the HeddleCache holds 38 tokens, 39 came"):
        llama(ids[:, :2], past_key_values=cache)
    assert cache.get_seq_length() == 37
    cache.crop(-1)
    torch.testing.assert_close(llama(ids[:, 36:], past_key_values=cache).logits, whole[:, 36:], rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_another_implementation_cannot_read_a_heddle_cache(llama, ids, implementation):
    llama.set_attn_implementation(implementation)
    with pytest.raises(heddle.HeddleTypeError, match=r"^past_key_values: .*attn_implementation=\"heddle\""):
        llama(ids, past_key_values=heddle.hf.HeddleCache(64))


def test_an_element_mask_with_a_heddle_cache_is_refused(llama, ids):
    mask = visible("window", 37).expand(2, 1, -1, -1)
    llama.set_attn_implementation("heddle")
    with pytest.raises(heddle.HeddleNotImplementedError, match=r"^attention_mask: .*HeddleCache"):
        llama(ids, attention_mask=mask, past_key_values=heddle.hf.HeddleCache(64))


def test_padding_cannot_change_after_the_fact(llama, ids):
    llama.set_attn_implementation("heddle")
    cache = heddle.hf.HeddleCache(64)
    llama(ids, past_key_values=cache)
    mask = torch.ones(2, 38, dtype=torch.long)
    mask[0, 3] = 0
    with pytest.raises(heddle.HeddleValueError, match=r"^attention_mask: other cached tokens"):
        llama(ids[:, :1], attention_mask=mask, past_key_values=cache)


def test_beam_search_with_a_heddle_cache_is_refused(llama, ids):
    with pytest.raises(heddle.HeddleNotImplementedError, match=r"^past_key_values: .*beam search"):
        generate(llama, "heddle", ids, heddle.hf.HeddleCache(64), num_beams=2)


@pytest.mark.parametrize(
    ("arguments", "argument"),
    [
        ({"max_length": 0}, "max_length"),
        ({"max_length": 8.0}, "max_length"),
        ({"max_length": 8, "page_size": 0}, "page_size"),
    ],
)
def test_bad_cache_sizes_are_refused(arguments, argument):
    with pytest.raises(heddle.HeddleValueError, match=f"^{argument}: "):
        heddle.hf.HeddleCache(**arguments)


def test_an_unknown_format_is_refused(llama, ids):
    llama.set_attn_implementation("heddle")
    with pytest.raises(heddle.HeddleValueError, match=r"^format: "):
        llama(ids, past_key_values=heddle.hf.HeddleCache(64, format="int3"))


# --- packages -------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_a_missing_package_names_the_extra(package):
    code = f"import sys; sys.modules['{package}'] = None; import heddle.hf"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert process.returncode == 1
    last = process.stderr.strip().splitlines()[-1]
    assert last.startswith("ModuleNotFoundError: heddle.hf needs torch and transformers 5.20")
    assert "pip install 'heddle-attention[demo]'" in last


def test_an_older_transformers_is_refused():
    code = "import transformers; transformers.__version__ = '5.9.1'; import heddle.hf"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert process.returncode == 1
    assert "ImportError: heddle.hf needs transformers 5.20, 5.9.1 is installed" in process.stderr
