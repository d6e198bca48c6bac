"""What other people's code does with a model: streaming, pipelines, compilation, dtypes, folders."""

import importlib.util
import json
import threading

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from peft import LoraConfig, get_peft_model
from tiny_models import (
    FAMILIES,
    QUERIER_IDS,
    QUERIERS,
    TOWERS,
    VOCAB,
    aware_model,
    left_padded_batch,
    plain_model,
    qar_config,
    training_batch,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedTokenizerFast,
    StaticCache,
    TextIteratorStreamer,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.utils import logging as hf_logging

from qar_models import QARLlamaForCausalLM, apply_qar
from qar_models.base_mlp import fusable


def tokenizer():
    vocabulary = {"<pad>": 0, **{f"w{i}": i for i in range(1, VOCAB)}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", padding_side="left")


@pytest.mark.parametrize("tower", TOWERS)
def test_streaming(tower):
    model, tokens = aware_model(tower=tower), tokenizer()
    batch = tokens("w5 w6 w7", return_tensors="pt")
    batch.pop("token_type_ids", None)
    settings = {**batch, "querier_ids": torch.tensor([3]), "max_new_tokens": 5, "do_sample": False}
    expected = tokens.decode(model.generate(**settings)[0])
    streamer = TextIteratorStreamer(tokens)
    thread = threading.Thread(target=model.generate, kwargs={**settings, "streamer": streamer})
    thread.start()
    assert "".join(streamer) == expected
    thread.join()


@pytest.mark.parametrize("tower", TOWERS)
def test_pipeline(tower):
    model, tokens = aware_model(tower=tower), tokenizer()
    generate = pipeline("text-generation", model=model, tokenizer=tokens)
    texts = ["w5 w6 w7", "w8 w9"]
    for text, querier in zip(texts, (3, 1), strict=True):
        ids = torch.tensor([querier])
        got = generate(text, max_new_tokens=4, do_sample=False, querier_ids=ids)
        prompt = tokens(text, return_tensors="pt")["input_ids"]
        expected = model.generate(prompt, max_new_tokens=4, do_sample=False, querier_ids=ids)
        words = got[0]["generated_text"].removeprefix(text)
        assert words == tokens.decode(expected[0, prompt.shape[1] :])
    with pytest.raises(ValueError, match="querier_ids: missing"):
        generate(texts[0], max_new_tokens=4)


@pytest.mark.parametrize("tower", TOWERS)
def test_generate_refuses_before_any_work(tower, monkeypatch):
    model, batch = aware_model(tower=tower), left_padded_batch()
    monkeypatch.setattr(type(model.model), "forward", lambda *_, **__: pytest.fail("the decoder ran"))
    for ids, message in (
        (None, "querier_ids: missing"),
        (QUERIER_IDS[:2], r"querier_ids: got shape \(2,\), expected \(3,\)"),
        (QUERIER_IDS.unsqueeze(1).expand(3, 10), r"querier_ids: got shape \(3, 10\), expected \(3,\)"),
        (torch.tensor([0, 1, 9]), "querier_ids: got 9"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(**batch, querier_ids=ids, max_new_tokens=2)


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("tower", TOWERS)
def test_compiled_forward(tower):
    model, batch = aware_model(tower=tower), left_padded_batch(padding=0)
    expected = model(**batch, querier_ids=QUERIER_IDS, use_cache=False).logits
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        got = compiled(**batch, querier_ids=QUERIER_IDS, use_cache=False).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("how", ["compiled", "exported"])
@pytest.mark.parametrize(("policy", "lowest"), [("error", 0), ("mean", -1)])
@pytest.mark.parametrize("tower", TOWERS)
def test_a_traced_model_refuses_ids_too(tower, policy, lowest, how):
    model, batch = aware_model(tower=tower, unknown_querier=policy), left_padded_batch(padding=0)
    if how == "compiled":
        traced = torch.compile(model, fullgraph=True, backend="aot_eager")
    else:
        inputs = {**batch, "querier_ids": QUERIER_IDS, "use_cache": False}
        traced = torch.export.export(model, (), inputs, strict=False).module()
    with torch.no_grad():
        for wrong in (lowest - 1, QUERIERS):
            traced(**batch, querier_ids=torch.tensor([lowest, 2, QUERIERS - 1]), use_cache=False)
            with pytest.raises(RuntimeError, match=f"querier_ids: expected ids from {lowest} to 4"):
                traced(**batch, querier_ids=torch.tensor([0, wrong, 2]), use_cache=False)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("tower", TOWERS)
def test_a_compiled_model_may_checkpoint_its_layers(tower, backend):
    model, batch = aware_model(tower=tower, backend=backend).train(), training_batch()
    model(**batch, use_cache=False).loss.backward()
    expected = model.model.layers[0].experts.gate.grad.clone()
    model.zero_grad()
    model.gradient_checkpointing_enable()
    torch.compile(model, fullgraph=True, backend="aot_eager")(**batch, use_cache=False).loss.backward()
    torch.testing.assert_close(model.model.layers[0].experts.gate.grad, expected)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_training_refuses_clusters_that_are_not_there():
    model, batch = aware_model(num_clusters=2, projection_dim=8).train(), training_batch()
    batch |= {"response_mask": batch["attention_mask"]}
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for wrong in (-1, 2):
        with pytest.raises(RuntimeError, match="cluster_ids: expected ids from 0 to 1"):
            compiled(**batch, cluster_ids=torch.tensor([0, wrong, 1]), use_cache=False)
    assert model.contrast.writes.sum() == 0


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_packed_rows_of_any_number_of_windows():
    model = aware_model()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for lengths in ((5, 7, 4), (3, 9), (6,)):
        packed = {
            "input_ids": torch.randint(1, 90, (1, sum(lengths))),
            "querier_ids": torch.arange(len(lengths)),
            "cu_seq_lens_q": torch.tensor((0, *lengths)).cumsum(0).int(),
        }
        with torch.no_grad():
            torch.testing.assert_close(compiled(**packed).logits, model(**packed).logits)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("tower", TOWERS)
def test_an_exported_model_takes_batches_of_any_size(tower):
    model, batch = aware_model(tower=tower), left_padded_batch(padding=0)
    inputs = {**batch, "querier_ids": QUERIER_IDS, "use_cache": False}
    size = torch.export.Dim("batch", min=2, max=16)
    shapes = {name: None if value is False else {0: size} for name, value in inputs.items()}
    exported = torch.export.export(model, (), inputs, dynamic_shapes=shapes, strict=False).module()
    twice = {name: torch.cat((value, value)) for name, value in inputs.items() if value is not False}
    twice["use_cache"] = False
    with torch.no_grad():
        torch.testing.assert_close(exported(**twice).logits, model(**twice).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("tower", TOWERS)
def test_compiled_training_step_at_changing_lengths(tower):
    model = aware_model(tower=tower, num_clusters=2, projection_dim=8).train()
    batch = training_batch()
    batch |= {"response_mask": batch["attention_mask"], "cluster_ids": torch.tensor([0, 1, 1])}
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for length in (10, 9):
        shorter = {name: t[:, :length] if t.dim() == 2 else t for name, t in batch.items()}
        model.eval()
        model(**shorter, use_cache=False).loss.backward()
        expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        model.train()
        compiled(**shorter, use_cache=False).loss.backward()
        for name, gradient in expected.items():
            torch.testing.assert_close(dict(model.named_parameters())[name].grad, gradient)
        model.zero_grad()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("tower", TOWERS)
def test_compiled_decode_step_with_a_static_cache(tower):
    model, batch = aware_model(tower=tower), left_padded_batch(padding=0)
    ids = batch["input_ids"]
    expected = model(ids, querier_ids=QUERIER_IDS).logits
    step = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        cache = StaticCache(config=model.config, max_cache_len=16)
        model(ids[:, :6], querier_ids=QUERIER_IDS, past_key_values=cache)
        for position in range(6, 10):
            token = ids[:, position : position + 1]
            mask = torch.ones(3, position + 1, dtype=torch.long)
            out = step(token, attention_mask=mask, querier_ids=QUERIER_IDS, past_key_values=cache)
            torch.testing.assert_close(out.logits[:, 0], expected[:, position], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tower", TOWERS)
def test_bf16_autocast(tower):
    model, batch = aware_model(tower=tower, num_clusters=2, projection_dim=8), training_batch()
    batch |= {"response_mask": batch["attention_mask"], "cluster_ids": torch.tensor([0, 1, 1])}
    model.train()(**batch)
    expected = model.eval()(**batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = model(**batch)
    assert got.loss.dtype == torch.float32
    assert abs(got.lm_loss - expected.lm_loss) < 0.05 * expected.lm_loss
    assert abs(got.contrastive_loss - expected.contrastive_loss) < 0.1
    got.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("tower", TOWERS)
def test_loading_in_bf16_and_on_a_device(tower, tmp_path):
    aware_model(tower=tower).save_pretrained(tmp_path)
    for settings in ({}, {"device_map": "cpu"}, {"device_map": {"": "cpu"}}):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, **settings)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        out = model(**training_batch())
        assert out.logits.dtype == torch.bfloat16 and out.loss.isfinite()
        out.loss.backward()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("tower", TOWERS)
def test_packed_rows_equal_the_padded_batch(tower, attention):
    model = aware_model(tower=tower, base=plain_model(attn_implementation=attention))
    lengths = (4, 7, 5)
    ids = torch.randint(1, VOCAB, (3, 7), generator=torch.Generator().manual_seed(4))
    mask = torch.arange(7) < torch.tensor(lengths).unsqueeze(1)
    padded = model(ids, attention_mask=mask.long(), querier_ids=QUERIER_IDS).logits
    packed = model(
        ids[mask].unsqueeze(0),
        position_ids=torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0),
        querier_ids=QUERIER_IDS.unsqueeze(1).expand(3, 7)[mask].unsqueeze(0),
        use_cache=False,
    ).logits
    torch.testing.assert_close(packed[0], padded[mask], rtol=1e-4, atol=1e-4)


def test_trainers_metrics_see_the_logits_alone(tmp_path):
    seen, batch = [], training_batch()
    rows = [{key: value[index] for key, value in batch.items()} for index in range(3)]
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    trainer = Trainer(
        aware_model(),
        arguments,
        eval_dataset=rows,
        compute_metrics=lambda found: seen.append(found.predictions.shape) or {},
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
    )
    trainer.evaluate()
    assert seen == [batch["labels"].shape]


@pytest.mark.parametrize("family", FAMILIES)
def test_label_smoothing_of_the_trainer_looks_at_the_next_token(family, tmp_path):
    plain, batch = plain_model(family), training_batch()
    base = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, label_smoothing_factor=0.1)
    expected = Trainer(plain, arguments).compute_loss(plain, dict(base))
    peft = get_peft_model(apply_qar(plain_model(family), qar_config()), LoraConfig(target_modules=["q_proj"]))
    for model in (apply_qar(plain_model(family), qar_config()), peft):
        got = Trainer(model, arguments).compute_loss(model, dict(batch))
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("change", ["hook", "forward"])
def test_what_is_hung_on_an_activation_or_a_projection_runs(change):
    model, batch, calls = aware_model(), left_padded_batch(), []
    for layer in model.model.layers:
        if change == "hook":
            layer.mlp.act_fn.register_forward_hook(lambda *_: calls.append(1))
        else:
            own = layer.mlp.gate_proj.forward
            layer.mlp.gate_proj.forward = lambda x, own=own: calls.append(1) or own(x)
    model(**batch, querier_ids=QUERIER_IDS)
    assert len(calls) == len(model.model.layers)


def test_hooks_that_are_taken_off_leave_a_fusable_mlp():
    model = aware_model()
    mlp = model.model.layers[0].mlp
    for module in (mlp, mlp.gate_proj):
        add_hook_to_module(module, ModelHook())
        assert fusable(mlp) is None
        remove_hook_from_module(module)
        assert fusable(mlp) is not None


@pytest.mark.parametrize("when", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_an_mlp_with_hooks_of_any_kind_runs_in_its_own_modules(when):
    mlp = aware_model().model.layers[0].mlp
    handle = getattr(mlp.up_proj, f"register_{when}_hook")(lambda *_: None)
    assert fusable(mlp) is None
    handle.remove()
    assert fusable(mlp) is not None


def test_saved_folder_is_ready_to_publish(tmp_path):
    model = aware_model(querier_names=("Amy", "Bernadette", "Howard", "Raj", "Emily"))
    model.save_pretrained(tmp_path)
    assert {"config.json", "model.safetensors", "README.md"} <= {path.name for path in tmp_path.iterdir()}
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "QARLlamaForCausalLM" in card and "Amy" in card and card.startswith("---\n")
    (tmp_path / "README.md").write_text("mine")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_quantised_base_without_bitsandbytes(tmp_path):
    plain_model().save_pretrained(tmp_path)
    four_bit = BitsAndBytesConfig(load_in_4bit=True)
    with pytest.raises(ImportError, match="bitsandbytes"):
        QARLlamaForCausalLM.from_base(tmp_path, qar_config(), quantization_config=four_bit)


def test_contrastive_inputs_that_end_in_the_decoder_are_named(caplog):
    """As with TRL's trainers, which call the decoder and compute the language model's loss themselves."""
    hf_logging.warning_once.cache_clear()
    batch = training_batch()
    labels = batch.pop("labels")
    batch |= {"response_mask": batch["attention_mask"], "cluster_ids": torch.tensor([0, 1, 1])}
    model = aware_model(num_clusters=2, projection_dim=8)
    model.train()(**batch, labels=labels)
    model.eval().model(**batch)
    aware_model().train().model(**batch)
    assert not caplog.records
    for _ in range(2):
        model.train().model(**batch)
    assert [record.getMessage() for record in caplog.records] == [
        "response_mask, cluster_ids: got by the decoder, so the contrastive loss is not computed; only the "
        "language model's forward does that, which TRL's trainers replace (docs/models.md)"
    ]


@pytest.mark.parametrize("tower", TOWERS)
def test_the_decoder_may_return_a_tuple(tower):
    model, batch = aware_model(tower=tower), left_padded_batch() | {"querier_ids": QUERIER_IDS}
    expected, got = model.model(**batch), model.model(**batch, return_dict=False)
    assert isinstance(got, tuple) and len(got) == len(expected.to_tuple())
    assert torch.equal(got[0], expected.last_hidden_state) and torch.equal(got[-1], expected.querier_states)


def test_configurations_have_an_auto_map_that_folders_lack(tmp_path):
    """TRL reads it to load a folder; transformers writes it when a class is to be saved with its code."""
    aware_model().save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.auto_map == {} and AutoModelForCausalLM.from_pretrained(tmp_path).config.auto_map == {}
    assert "auto_map" not in config.to_dict() and config == AutoConfig.from_pretrained(tmp_path)
    config.auto_map["AutoModelForCausalLM"] = "code.Model"
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == {
        "AutoModelForCausalLM": "code.Model"
    }
    assert AutoConfig.from_pretrained(tmp_path).auto_map == {"AutoModelForCausalLM": "code.Model"}
    assert type(config)().auto_map == {}


def test_a_model_saved_with_its_code(tmp_path, monkeypatch):
    monkeypatch.setattr(QARLlamaForCausalLM, "_auto_class", "AutoModelForCausalLM")
    aware_model().save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.auto_map == {"AutoModelForCausalLM": "families.QARLlamaForCausalLM"}
