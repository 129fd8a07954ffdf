"""Sampled decode against its definition in float64, draw by draw, and by statistics over thousands of seeds."""

import ml_dtypes
import numpy as np
import pytest

import arrays
import formula
import heddle
import sampled_formula as definition

METHODS = ["iid", "stratified", "systematic", "systematic_tile"]
FORMATS = ["fp32", "bf16", "fp16", "int8-baseline", "int8-a", "int8-b", "fp8"]
# How close to a boundary of the prefix sums a draw may come before float32 scores may move it to the next key.
MARGIN = 3e-6


class Setup:
    """A cache with random tokens, and what a call over it must give."""

    def __init__(self, rng, seq_lens, *, q_len=1, q_heads=4, kv_heads=2, dim=32, dim_v=24, page_size=16, format="fp32",
                 dtype="float32", partition=1, feature_major=False, spread=2.0):  # fmt: skip
        self.table, pages = arrays.paged(rng, seq_lens, page_size)
        self.lens = np.asarray(seq_lens, np.int32)
        self.group = q_heads // kv_heads
        self.cache = heddle.KVCache(pages, page_size, kv_heads, dim, head_dim_v=dim_v, format=format,
                                    partition=partition, feature_major=feature_major)  # fmt: skip
        total = int(self.lens.sum())
        cu = np.concatenate([[0], np.cumsum(self.lens)]).astype(np.int32)
        k, v = arrays.normal(rng, total, kv_heads, dim), arrays.normal(rng, total, kv_heads, dim_v)
        self.cache.append(k, v, self.table, np.zeros(len(seq_lens), np.int32), cu_seqlens=cu)
        self.q = (spread * rng.standard_normal((len(seq_lens), q_len, q_heads, dim))).astype(arrays.DTYPES[dtype])

    def decode(self, sampling, **options):
        return heddle.decode(self.q, self.cache, self.table, self.lens, sampling=sampling, **options)

    def rows(self, b, part):
        """The float64 [n, Hkv, D] that a request's keys (part "k") or values ("v") are."""
        c = self.cache
        x = np.asarray(getattr(c, part)).astype(np.float64)
        scale = getattr(c, f"{part}_scale")
        if scale is not None and scale.size > 1:
            x *= np.repeat(np.asarray(scale, np.float64), c.partition, axis=2)[..., None]
        elif scale is not None:
            x *= float(scale[0])
        n = int(self.lens[b])
        token = np.arange(n)
        return x[self.table[b, token // c.page_size], :, token % c.page_size]

    def query(self, b, i, h):
        q = np.asarray(self.q[b, i, h], np.float64)
        if not self.cache.format.startswith("int8"):
            return q
        scale = np.float32(np.abs(q).max()) / np.float32(127)
        if self.cache.format == "int8-baseline":
            scale = self.cache.q_scale[0]
        return formula.quantize(np.float32(q), scale).astype(np.float64) * float(scale)

    def expected(self, method, samples, *, seed=0, offset=0, keep=(0, 0, 0), bernoulli=0, stratified=False, seen=None,
                 lists=None, softcap=0.0, scale=None, sinks=None):  # fmt: skip
        """out, lse, margin [B, Sq, Hq, ...]: seen(n) -> bool [Sq, n]; lists(b, i, kv_head) -> the keys of a list."""
        b_, sq, hq, dim = self.q.shape
        out = np.zeros((b_, sq, hq, self.cache.head_dim_v))
        lse, margin = np.full((b_, sq, hq), -np.inf), np.full((b_, sq, hq), np.inf)
        self.drawn = {}
        for b in range(b_):
            n = int(self.lens[b])
            k, v = self.rows(b, "k"), self.rows(b, "v")
            mask = formula.visible(sq, n, causal=True) if seen is None else seen(n)
            for i in range(sq):
                for h in range(hq):
                    stream = {"seed": seed, "request": b, "head": h, "offset": offset, "query": i}
                    keys = np.arange(n) if lists is None else lists(b, i, h // self.group)
                    places = np.flatnonzero(mask[i][keys])
                    keys = keys[places]
                    if bernoulli:
                        q, unit = definition.ternary(
                            np.asarray(self.q[b, i, h], np.float64), bernoulli, stratified, **stream
                        )
                        q = q * unit
                    else:
                        q = self.query(b, i, h)
                    s = k[keys, h // self.group] @ q * (dim**-0.5 if scale is None else scale)
                    if softcap:
                        s = softcap * np.tanh(s / softcap)
                    z = -np.inf if sinks is None else float(sinks[h])
                    c, lse[b, i, h], margin[b, i, h] = definition.row(
                        s, places, method, samples, sink=z, keep=keep, **stream
                    )
                    if len(c):
                        out[b, i, h] = c @ v[keys, h // self.group]
                    self.drawn.setdefault((b, h // self.group), set()).update(keys[np.flatnonzero(c)].tolist())
        return out, lse.transpose(0, 2, 1), margin

    def check(self, sampling, expected, **options):
        """The share of rows whose draws float arithmetic could not have moved: those agree with the definition."""
        out, lse = self.decode(sampling, return_lse=True, **options)
        want, want_lse, margin = expected
        np.testing.assert_allclose(lse, want_lse, rtol=2e-5, atol=1e-4)
        sure = margin > MARGIN
        error = np.abs(np.asarray(out, np.float64) - want).max(-1)
        limit = formula.tolerance(self.q.dtype) * (1 + np.abs(want).max(-1))
        assert (error[sure] <= limit[sure]).all(), f"{error[sure].max()} at {np.argwhere(sure & (error > limit))[0]}"
        return sure.mean()


def test_philox_of_the_definition():
    """The published vectors (Random123, kat_vectors)."""
    words = [
        ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0],
         [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
    ]  # fmt: skip
    for counter, key, out in words:
        assert definition.philox(np.array(counter, np.uint64), key).tolist() == out


# --- draw by draw ---


@pytest.fixture(params=["reference", *(f"host {isa}" for isa in heddle.available_host_isas())])
def engine(request, default_threads):
    """A backend, on every instruction set."""
    backend, _, isa = request.param.partition(" ")
    if isa:
        heddle.set_host_isa(isa)
    return backend


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("format", FORMATS)
def test_every_format(rng, engine, method, format):
    setup = Setup(rng, [333, 0, 64, 1, 130], format=format, q_heads=6, dim=33, dim_v=17, page_size=7)
    setup.decode(None)  # int8-baseline takes its scale of q here
    sampling = heddle.Sampling(method, 48, seed=5, offset=9)
    assert setup.check(sampling, setup.expected(method, 48, seed=5, offset=9), backend=engine) > 0.8


@pytest.mark.parametrize("method", [*METHODS, "exact"])
@pytest.mark.parametrize(("q_len", "group"), [(1, 1), (1, 16), (3, 3), (5, 8)])
def test_groups_and_queries(rng, engine, method, q_len, group):
    """More than 16 rows of a KV head too."""
    samples = 0 if method == "exact" else 20
    setup = Setup(rng, [200, 2, 70], q_len=q_len, q_heads=group, kv_heads=1, dtype="bfloat16", format="bf16")
    sampling = heddle.Sampling(method, samples)
    assert setup.check(sampling, setup.expected(method, samples), backend=engine) > 0.8


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "keep", [(3, 0, 0), (0, 5, 0), (0, 0, 1), (0, 0, 3), (0, 0, 7), (4, 6, 9), (100, 100, 0), (0, 0, 1000)]
)
def test_kept_keys(rng, engine, method, keep):
    setup = Setup(rng, [150, 500, 3], q_heads=2, kv_heads=1, spread=1.0)
    options = dict(zip(("n_sink", "n_recent", "n_top"), keep, strict=True))
    sampling = heddle.Sampling(method, 10, seed=1, **options)
    assert setup.check(sampling, setup.expected(method, 10, seed=1, keep=keep), backend=engine) > 0.8


def test_ties_of_kept_keys_go_to_the_lower_index(rng, engine):
    """All scores equal: the first n_top of the free keys are read, and nothing is left to chance with all of them."""
    setup = Setup(rng, [300], q_heads=2, kv_heads=1)
    setup.q[:] = 0
    sampling = heddle.Sampling("systematic", 4, n_sink=2, n_top=70)
    setup.check(sampling, setup.expected("systematic", 4, keep=(2, 0, 70)), backend=engine)
    everything = heddle.Sampling("iid", 4, n_top=300)
    np.testing.assert_allclose(
        setup.decode(everything, backend=engine)[0, 0, 0], setup.rows(0, "v")[:, 0].mean(0), atol=1e-5
    )


@pytest.mark.parametrize("bernoulli", [1, 8, ("stratified", 8), ("stratified", 127)])
@pytest.mark.parametrize(("format", "page_size", "partition"), [
    ("fp32", 16, 1), ("bf16", 64, 1), ("fp16", 5, 1), ("int8-baseline", 16, 1), ("int8-a", 12, 4), ("int8-b", 128, 1),
    ("fp8", 16, 1),
])  # fmt: skip
def test_bernoulli(rng, engine, bernoulli, format, page_size, partition):
    setup = Setup(rng, [150, 1, 0, 77], q_len=2, q_heads=6, dim=19, format=format, page_size=page_size,
                  partition=partition, feature_major=True)  # fmt: skip
    stratified, number = isinstance(bernoulli, tuple), np.atleast_1d(bernoulli)[-1].astype(int)
    for method, samples in (("exact", 0), ("systematic", 16)):
        sampling = heddle.Sampling(method, samples, seed=3, bernoulli=bernoulli)
        want = setup.expected(method, samples, seed=3, bernoulli=int(number), stratified=stratified)
        assert setup.check(sampling, want, backend=engine) > 0.8


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("format", ["fp32", "int8-a", "fp8"])
@pytest.mark.parametrize("split", [64, 1000])
def test_selection_times_format_times_sampling_times_split(rng, engine, method, format, split):
    setup = Setup(rng, [400, 90], q_len=2, format=format)
    lists = {
        (b, i, h): np.sort(rng.choice(setup.lens[b] - 5, 70 if b == 0 else 31, replace=False))
        for b in range(2)
        for i in range(2)
        for h in range(2)
    }
    indices = np.full((2, 2, 2, 80), -1, np.int32)
    for (b, i, h), keys in lists.items():
        indices[b, i, h, : len(keys)] = keys
    sinks = np.array([0.5, -1.0, 3.0, -np.inf], np.float32)
    want = setup.expected(method, 30, lists=lambda b, i, h: lists[b, i, h], softcap=7.0, sinks=sinks, keep=(1, 2, 3),
                          seen=lambda n: formula.visible(2, n, causal=True, window=(260, 0)))  # fmt: skip
    sampling = heddle.Sampling(method, 30, n_sink=1, n_recent=2, n_top=3)
    share = setup.check(sampling, want, backend=engine, selection=heddle.select.tokens(indices), softcap=7.0,
                        sinks=sinks, window=260, schedule=heddle.Schedule("static", split))  # fmt: skip
    assert share > 0.8


@pytest.mark.parametrize("shared", [True, False])
def test_lists_of_a_request_and_windows(rng, engine, shared):
    setup = Setup(rng, [300, 300], q_len=3)
    keys = np.stack([[np.sort(rng.choice(300, 150, replace=False)) for _ in range(2)] for _ in range(2)])
    selection = heddle.select.tokens(keys.astype(np.int32)) if shared else heddle.select.window(100, n_global=20)
    seen = None if shared else lambda n: formula.visible(3, n, causal=True, window=(100, 0), n_global=20)
    want = setup.expected("systematic_tile", 9, seen=seen, lists=(lambda b, i, h: keys[b, h]) if shared else None)
    share = setup.check(heddle.Sampling("systematic_tile", 9), want, backend=engine, selection=selection)
    assert share > 0.8


def test_block_masks_per_query_head(rng, engine):
    setup = Setup(rng, [200], q_len=2)
    mask = rng.random((4, 2, 7)) < 0.6
    mask[:, :, 0] = True
    out, lse = setup.decode(heddle.Sampling("exact", 0), selection=heddle.select.block_mask(mask, (1, 32)),
                            backend=engine, return_lse=True)  # fmt: skip
    dense, dense_lse = setup.decode(None, selection=heddle.select.block_mask(mask, (1, 32)), return_lse=True)
    np.testing.assert_allclose(out, dense, atol=2e-5)
    np.testing.assert_allclose(lse, dense_lse, atol=2e-5)


def test_rows_without_keys(rng, engine):
    """No key: 0 and -inf; a sink alone: 0 and the sink."""
    setup = Setup(rng, [0, 1], q_len=3)
    out, lse = setup.decode(heddle.Sampling("iid", 4), return_lse=True, backend=engine)
    assert not out[0].any()
    assert np.isneginf(lse[0]).all()
    assert not out[1, :2].any()
    assert out[1, 2].any()
    sinks = np.array([1.0, -2.0, 200.0, -np.inf], np.float32)
    out, lse = setup.decode(heddle.Sampling("iid", 4), return_lse=True, sinks=sinks, backend=engine)
    assert not out[0].any()
    np.testing.assert_allclose(lse[0], np.repeat(sinks[:, None], 3, 1))
    assert np.isfinite(out).all()


# --- what is read ---


@pytest.mark.parametrize("method", METHODS)
def test_only_what_is_counted_is_read(rng, engine, method):
    """NaN everywhere in V but at the keys that the definition draws; keys that no query sees are NaN too."""
    setup = Setup(rng, [260, 90], q_heads=8, page_size=9)
    seen = lambda n: formula.visible(1, n, causal=True, window=(200, 0))  # noqa: E731
    margin = setup.expected(method, 12, seen=seen)[2]
    sampling = heddle.Sampling(method, 12)
    before, reads = setup.decode(sampling, window=200, return_reads=True, backend=engine)
    cache, v, k = setup.cache, np.array(setup.cache.v), np.array(setup.cache.k)
    cache.v[:], cache.k[:] = np.nan, np.nan
    for b in range(2):
        n = int(setup.lens[b])
        page, slot = setup.table[b, np.arange(n) // 9], np.arange(n) % 9
        visible = seen(n)[0]
        cache.k[page[visible], :, slot[visible]] = k[page[visible], :, slot[visible]]
        for h in range(2):
            drawn = sorted(setup.drawn[b, h])
            cache.v[page[drawn], h, slot[drawn]] = v[page[drawn], h, slot[drawn]]
            if margin.min() > MARGIN:
                assert reads[0][b, h] == len(drawn)
            assert reads[1][b, h] == visible.sum() * cache.head_dim
    assert margin.min() > MARGIN, "choose another seed: a draw that rounding moves reads a value that was made NaN"
    np.testing.assert_array_equal(setup.decode(sampling, window=200, backend=engine), before)


def test_bernoulli_reads_the_features_it_needs(rng, engine):
    """... and no others: their keys may be NaN."""
    setup = Setup(rng, [100], q_heads=1, kv_heads=1, dim=64, feature_major=True)
    sampling = heddle.Sampling("exact", 0, bernoulli=1)
    out, reads = setup.decode(sampling, return_reads=True, backend=engine)
    counts, _ = definition.ternary(setup.q[0, 0, 0].astype(float), 1, False, 0, 0, 0, 0, 0)
    needed = np.flatnonzero(counts)
    assert 0 < len(needed) < 64
    assert reads[1][0, 0] == 100 * len(needed)
    assert reads[0][0, 0] == 100
    setup.cache.k_by_feature[:, :, np.flatnonzero(counts == 0)] = np.nan
    setup.cache.k[:] = np.nan
    np.testing.assert_array_equal(setup.decode(sampling, backend=engine), out)


@pytest.mark.parametrize("where", ["k", "v"])
def test_nan_that_is_read_shows(rng, engine, where):
    setup = Setup(rng, [100], q_heads=1, kv_heads=1)
    getattr(setup.cache, where)[setup.table[0, 0], 0, 3] = np.nan
    out, lse = setup.decode(heddle.Sampling("iid", 8, n_sink=4), return_lse=True, backend=engine)
    assert np.isnan(out).all()
    assert np.isnan(lse).all() == (where == "k")


@pytest.mark.parametrize("format", ["fp32", "bf16", "int8-b", "int8-a"])
def test_keys_by_feature_are_the_keys(rng, format):
    """After appends of all sorts; int8-a quantizes an open partition again when it grows."""
    partition = 4 if format == "int8-a" else 1
    cache = heddle.KVCache(12, 8, 2, 5, format=format, partition=partition, feature_major=True)
    assert cache.feature_major
    table, at = np.arange(12, dtype=np.int32)[::-1].reshape(2, 6).copy(), np.zeros(2, np.int32)
    cache.calibrate(*(40 * arrays.normal(rng, 1, 8, 2, 5) for _ in range(2)))
    for n, size in ((7, 1.0), (1, 3.0), (1, 9.0), (20, 1.0), (2, 30.0)):
        k, v = (arrays.normal(rng, 2, n, 2, 5) * np.float32(size) for _ in range(2))
        at = cache.append(k, v, table, at)
        np.testing.assert_array_equal(np.asarray(cache.k_by_feature), np.asarray(cache.k).swapaxes(2, 3))
    plain = heddle.KVCache(12, 8, 2, 5, format=format, partition=partition)
    assert plain.k_by_feature is None
    assert cache.nbytes - plain.nbytes == cache.k.nbytes
    assert cache.bytes_per_token - plain.bytes_per_token == cache.k.nbytes / 96


# --- the same bits whatever the tiling ---


@pytest.mark.parametrize("method", [*METHODS, "exact"])
@pytest.mark.parametrize("bernoulli", [None, 4])
def test_bits_do_not_depend_on_who_computes(rng, default_threads, method, bernoulli):
    samples = 0 if method == "exact" else 40
    sampling = heddle.Sampling(method, samples, seed=8, bernoulli=bernoulli, n_top=3)
    setup = Setup(rng, [3000, 150], q_len=2, q_heads=6, page_size=61, feature_major=True, format="bf16")
    results = set()
    for threads in (1, 2, 5):
        heddle.set_num_threads(threads)
        for kind, split in (("auto", 0), ("static", 64), ("stealing", 640), ("tile", 100_000)):
            out, lse, reads = setup.decode(sampling, return_lse=True, return_reads=True,
                                           schedule=heddle.Schedule(kind, split))  # fmt: skip
            results.add((out.tobytes(), lse.tobytes(), reads[0].tobytes(), reads[1].tobytes()))
    assert len(results) == 1


def test_more_logits_than_are_held_at_a_time(rng):
    """96 MiB of them: queries are taken some at a time, which changes no bit."""
    setup = Setup(rng, [3000], q_len=1024, q_heads=8, kv_heads=1, dim=8, dim_v=4, spread=0.5)
    sampling = heddle.Sampling("systematic", 8)
    whole, reads = setup.decode(sampling, return_reads=True)
    assert reads[0][0, 0] <= 2 * 3000
    tail = heddle.decode(setup.q[:, -1:], setup.cache, setup.table, setup.lens, sampling=sampling, return_lse=True)
    dense_lse = setup.decode(None, return_lse=True)[1]
    np.testing.assert_allclose(setup.decode(sampling, return_lse=True)[1], dense_lse, atol=1e-4)
    np.testing.assert_allclose(tail[1][..., 0], dense_lse[..., -1], atol=1e-4)
    everything = setup.decode(heddle.Sampling("iid", 1, n_recent=3000), selection=heddle.select.window(31))
    np.testing.assert_allclose(everything, setup.decode(None, window=31), atol=1e-5)
    assert np.isfinite(whole).all()


def test_a_request_does_not_notice_its_batch(rng):
    setup = Setup(rng, [700, 300, 90])
    sampling = heddle.Sampling("systematic", 32)
    whole = setup.decode(sampling)
    alone = heddle.decode(setup.q[:1], setup.cache, setup.table[:1], setup.lens[:1], sampling=sampling)
    np.testing.assert_array_equal(whole[:1], alone)


@pytest.mark.parametrize("group", [1, 2, 3, 4, 7])
def test_logits_past_the_caches(rng, group):
    """More than a MiB of them in all, less for each request: they are written another way, which changes no bit."""
    keys = (1 << 20) // (2 * 4 * 4 * group)
    setup = Setup(rng, [keys, keys + 77, keys - 50], q_heads=4 * group, kv_heads=4, dim=8, dim_v=4, page_size=64)
    sampling = heddle.Sampling("stratified", 64, n_top=2)
    whole, lse = setup.decode(sampling, return_lse=True)
    alone = heddle.decode(setup.q[:1], setup.cache, setup.table[:1], setup.lens[:1], sampling=sampling, return_lse=True)
    np.testing.assert_array_equal(whole[:1], alone[0])
    np.testing.assert_array_equal(lse[:1], alone[1])
    np.testing.assert_allclose(lse, setup.decode(None, return_lse=True)[1], atol=1e-4)


def test_page_sizes_give_the_same_bits(rng):
    q = arrays.normal(rng, 1, 1, 4, 32)
    k, v = arrays.normal(rng, 1, 500, 2, 32), arrays.normal(rng, 1, 500, 2, 32)
    outs = set()
    for page_size in (1, 16, 50, 512):
        table, pages = arrays.paged(rng, [500], page_size)
        cache = heddle.KVCache(pages, page_size, 2, 32, format="fp32", feature_major=True)
        lens = cache.append(k, v, table, np.zeros(1, np.int32))
        for bernoulli in (None, 3):
            sampling = heddle.Sampling("stratified", 32, bernoulli=bernoulli)
            outs.add(heddle.decode(q, cache, table, lens, sampling=sampling).tobytes())
    assert len(outs) == 2


def test_seeds_offsets_heads_and_requests_draw_apart(rng):
    """Equal inputs in every request and head: only the counter tells their draws apart."""
    setup = Setup(rng, [200, 200], q_heads=4, kv_heads=1)
    setup.table[1] = setup.table[0]
    setup.q[:] = setup.q[0, 0, 0]
    offset = np.array([7], np.int32)
    outs = {}
    for name, s in {
        "a": heddle.Sampling("systematic", 8),
        "seed": heddle.Sampling("systematic", 8, seed=2**40),
        "offset": heddle.Sampling("systematic", 8, offset=7),
        "array": heddle.Sampling("systematic", 8, offset=offset),
    }.items():
        outs[name] = setup.decode(s)
        flat = outs[name].reshape(8, -1)
        assert len({row.tobytes() for row in flat}) == 8
    assert not np.array_equal(outs["a"], outs["seed"])
    assert not np.array_equal(outs["a"], outs["offset"])
    np.testing.assert_array_equal(outs["offset"], outs["array"])
    array = heddle.Sampling("systematic", 8, offset=offset)
    offset[0] = 0  # read at every call
    np.testing.assert_array_equal(setup.decode(array), outs["a"])


def test_torch(rng):
    import torch

    setup = Setup(rng, [100], dtype="bfloat16", format="bf16")
    sampling = heddle.Sampling("iid", 16, offset=torch.tensor([3], dtype=torch.int32))
    out, lse, (v_rows, k_features) = heddle.decode(
        *(arrays.to_torch(x) if isinstance(x, np.ndarray) else x for x in (setup.q, setup.cache, setup.table)),
        arrays.to_torch(setup.lens), sampling=sampling, return_lse=True, return_reads=True,
    )  # fmt: skip
    assert out.dtype == torch.bfloat16
    assert v_rows.dtype == k_features.dtype == torch.int64
    want = setup.decode(heddle.Sampling("iid", 16, offset=3))
    np.testing.assert_array_equal(out.float().numpy(), want.astype(np.float32))
    assert lse.shape == (1, 4, 1)


# --- by statistics ---

SEEDS = 2500
# |z| beyond 5.5 has probability 3.8e-8 for a normal mean. The tests below look at 9 x 4 heads x 8 columns and at 3 x 32
# scores, 384 numbers in all: for one choice of seeds in 69,000 a method without bias would fail.
Z = 5.5


@pytest.fixture(scope="module")
def small():
    """300 keys, 8 columns of V, one query of 4 heads, scores spread enough for some keys to dominate."""
    setup = Setup(np.random.default_rng(3), [300], dim=16, dim_v=8, kv_heads=2, spread=1.5)
    return setup, setup.expected("exact", 0)[0][0, 0], np.stack([_probabilities(setup, h) for h in range(4)])


def _probabilities(setup, h):
    s = setup.rows(0, "k")[:, h // setup.group] @ setup.query(0, 0, h) * setup.q.shape[-1] ** -0.5
    p = np.exp(s - s.max())
    return p / p.sum()


def _runs(setup, method, samples, seeds=SEEDS, **options):
    return np.stack([
        np.asarray(setup.decode(heddle.Sampling(method, samples, seed=seed, **options))[0, 0], np.float64)
        for seed in range(seeds)
    ])  # fmt: skip


@pytest.mark.parametrize(("method", "options"), [
    *((m, {}) for m in METHODS),
    ("iid", {"n_sink": 2, "n_recent": 3, "n_top": 10}), ("stratified", {"n_top": 4}),
    ("systematic_tile", {"n_top": 40}), ("systematic", {"n_sink": 5}),
])  # fmt: skip
def test_unbiased(small, method, options):
    setup, exact, _ = small
    outs = _runs(setup, method, 16, **options)
    error, spread = outs.mean(0) - exact, outs.std(0, ddof=1)
    assert (spread > 1e-4).all()
    z = error / (spread / np.sqrt(SEEDS))
    assert np.abs(z).max() < Z


def test_reference_is_unbiased_too(small):
    setup, exact, _ = small
    outs = np.stack([
        setup.decode(heddle.Sampling("systematic", 16, seed=s), backend="reference")[0, 0] for s in range(2000)
    ])  # fmt: skip
    assert np.abs((outs.mean(0) - exact) / (outs.std(0) / np.sqrt(2000))).max() < Z


@pytest.mark.parametrize("bernoulli", [1, 8, ("stratified", 8)])
def test_bernoulli_scores_are_unbiased(rng, bernoulli):
    """With one key, lse is its score."""
    setup = Setup(rng, [1] * 8, q_heads=4, kv_heads=1, dim=24, feature_major=True)
    _, exact = setup.decode(None, return_lse=True)
    lse = np.stack([
        setup.decode(heddle.Sampling("exact", 0, seed=seed, bernoulli=bernoulli), return_lse=True)[1]
        for seed in range(SEEDS)
    ]).astype(np.float64)  # fmt: skip
    spread = lse.std(0, ddof=1)
    assert (spread > 1e-3).all()
    assert np.abs((lse.mean(0) - exact) / (spread / np.sqrt(SEEDS))).max() < Z
    if bernoulli == 8:  # each of 8 independent queries: q_i k_i has variance k_i^2 |q_i| (c - |q_i|)
        q, k = setup.q[:, 0].astype(float), np.stack([setup.rows(b, "k")[0, 0] for b in range(8)])
        c = np.abs(q).max(-1, keepdims=True)
        variance = (k[:, None] ** 2 * np.abs(q) * (c - np.abs(q))).sum(-1) / 24 / 8
        ratio = (spread[..., 0] ** 2 / variance).mean()
        assert abs(ratio - 1) < 5 * np.sqrt(2 / SEEDS / 32)


def _slice_variance(p, v, samples):
    """Variance of the mean of one draw from each of `samples` equal slices of the prefix sums."""
    prefix = np.concatenate([[0], np.cumsum(p)])
    total = np.zeros(v.shape[1])
    for m in range(samples):
        low, high = m / samples, (m + 1) / samples
        share = np.clip(np.minimum(prefix[1:], high) - np.maximum(prefix[:-1], low), 0, None) * samples
        mean = share @ v
        total += share @ (v - mean) ** 2
    return total / samples**2


def _closed_forms(setup, p, samples):
    v = setup.rows(0, "v")
    iid, stratified = [], []
    for h in range(4):
        mean = p[h] @ v[:, h // setup.group]
        iid.append(p[h] @ (v[:, h // setup.group] - mean) ** 2 / samples)
        stratified.append(_slice_variance(p[h], v[:, h // setup.group], samples))
    return np.stack(iid), np.stack(stratified)


@pytest.mark.parametrize("samples", [8, 32])
def test_variances(small, samples):
    """iid and stratified equal their closed forms: the ratio, averaged over 32 columns, within 5 of its standard
    errors (false alarm 6e-7 each). Systematic stays below iid."""
    setup, _, p = small
    iid, stratified = _closed_forms(setup, p, samples)
    assert (stratified <= iid * (1 + 1e-12)).all()
    for method, form in (("iid", iid), ("stratified", stratified)):
        ratio = _runs(setup, method, samples).var(0, ddof=1) / form
        # Columns of one head share their draws, so heads alone count as independent.
        error = np.sqrt(2 / SEEDS / 4) * 1.5
        assert abs(ratio.mean() - 1) < 5 * error, (method, ratio.mean(), error)
    assert (_runs(setup, "systematic", samples).var(0, ddof=1).sum(-1) < iid.sum(-1)).all()


def test_slopes(small):
    """Variance over S: iid falls as 1 / S, strata faster."""
    setup, _, p = small
    sizes = np.array([4, 16, 64, 256])
    slopes = {}
    for method in ("iid", "stratified", "systematic"):
        variance = [_runs(setup, method, int(s), 400).var(0, ddof=1).sum() for s in sizes]
        slopes[method] = np.polyfit(np.log(sizes), np.log(variance), 1)[0]
    closed = np.log([_closed_forms(setup, p, int(s))[1].sum() for s in sizes])
    expected = np.polyfit(np.log(sizes), closed, 1)[0]
    assert abs(slopes["iid"] + 1) < 0.08
    assert abs(slopes["stratified"] - expected) < 0.08
    assert slopes["stratified"] < -1.1
    assert slopes["systematic"] < -1.1


@pytest.mark.parametrize("samples", [1, 7, 64, 1000])
def test_systematic_counts_are_exact(rng, backend, samples):
    """With unit vectors for values the output is the counts: whole, summing to S, within one of S p."""
    n = 200
    setup = Setup(rng, [n], q_heads=4, kv_heads=1, dim_v=n)
    for key in range(n):
        setup.cache.v[setup.table[0, key // 16], 0, key % 16] = np.eye(n, dtype=np.float32)[key]
    p = np.stack([_probabilities(setup, h) for h in range(4)])
    for seed in range(20):
        out = setup.decode(heddle.Sampling("systematic", samples, seed=seed), backend=backend)[0, 0].astype(float)
        counts = out * samples
        np.testing.assert_allclose(counts, np.rint(counts), atol=1e-3)
        assert (np.rint(counts).sum(-1) == samples).all()
        assert (np.abs(counts - samples * p) < 1 + 1e-3).all()


# --- errors ---


@pytest.mark.parametrize(("arguments", "options", "argument", "kind"), [
    (("iid", 0), {}, "samples", heddle.HeddleValueError),
    (("iid", -3), {}, "samples", heddle.HeddleValueError),
    (("iid", 2**20 + 1), {}, "samples", heddle.HeddleValueError),
    (("iid", 1.5), {}, "samples", heddle.HeddleTypeError),
    (("exact", 4), {}, "samples", heddle.HeddleValueError),
    (("prop", 4), {}, "method", heddle.HeddleValueError),
    ((3, 4), {}, "method", heddle.HeddleTypeError),
    (("iid", 4), {"seed": -1}, "seed", heddle.HeddleValueError),
    (("iid", 4), {"bernoulli": 0}, "bernoulli", heddle.HeddleValueError),
    (("iid", 4), {"bernoulli": 128}, "bernoulli", heddle.HeddleValueError),
    (("iid", 4), {"bernoulli": ("even", 8)}, "bernoulli", heddle.HeddleValueError),
    (("iid", 4), {"bernoulli": ("stratified", -8)}, "bernoulli", heddle.HeddleValueError),
    (("iid", 4), {"offset": -1}, "offset", heddle.HeddleValueError),
    (("iid", 4), {"offset": 2**32}, "offset", heddle.HeddleValueError),
    (("iid", 4), {"offset": np.zeros(1, np.int64)}, "offset", heddle.HeddleTypeError),
    (("iid", 4), {"offset": np.zeros(2, np.int32)}, "offset", heddle.HeddleValueError),
    (("iid", 4), {"n_sink": -1}, "n_sink", heddle.HeddleValueError),
    (("iid", 4), {"n_recent": -1}, "n_recent", heddle.HeddleValueError),
    (("iid", 4), {"n_top": -1}, "n_top", heddle.HeddleValueError),
])  # fmt: skip
def test_sampling_refuses(arguments, options, argument, kind):
    with pytest.raises(kind) as refused:
        heddle.Sampling(*arguments, **options)
    assert refused.value.argument == argument
    assert str(refused.value).startswith(f"{argument}: ")


def test_decode_refuses(rng):
    setup = Setup(rng, [20])
    out = np.full((*setup.q.shape[:3], 24), 7, np.float32)
    cases = [
        ({"sampling": "iid"}, "sampling", heddle.HeddleTypeError),
        ({"sampling": None, "return_reads": True}, "return_reads", heddle.HeddleValueError),
        ({"sampling": heddle.Sampling("exact", 0, bernoulli=4)}, "cache", heddle.HeddleValueError),
        ({"sampling": heddle.Sampling("iid", 4), "backend": "sm90"}, "backend", heddle.HeddleNotImplementedError),
    ]
    for options, argument, kind in cases:
        with pytest.raises(kind) as refused:
            setup.decode(options.pop("sampling"), out=out, **options)
        assert refused.value.argument == argument
    assert (out == 7).all()


def test_repr_and_properties():
    s = heddle.Sampling("stratified", 12, seed=4, bernoulli=("stratified", 8), offset=3, n_top=2)
    assert repr(s) == "Sampling('stratified', 12, seed=4, bernoulli=('stratified', 8), offset=3, n_top=2)"
    assert (s.method, s.samples, s.seed) == ("stratified", 12, 4)


def test_last_kernel(rng, backend):
    setup = Setup(rng, [20], format="bf16", dtype="bfloat16")
    assert setup.q.dtype == ml_dtypes.bfloat16
    setup.decode(heddle.Sampling("iid", 4), backend=backend)
    assert heddle.last_kernel().endswith("/sampled decode bf16")
