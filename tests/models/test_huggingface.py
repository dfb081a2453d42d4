"""The ``transformers`` classes: configuration, outputs, loss, packing, checkpointing, compilation, refusals."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from gatework.core import GateworkError, PartError, advance, losses
from gatework.models import GateworkConfig

pytestmark = [pytest.mark.oldest, pytest.mark.usefixtures("quiet_transformers")]


def tokens(batch: int = 2, length: int = 11) -> torch.Tensor:
    return torch.randint(31, (batch, length), generator=torch.Generator().manual_seed(1))


def test_configuration_is_canonical_and_has_the_usual_names():
    config = GateworkConfig(d_model=32, layers=3, heads=2, d_ff=40, mixer="gla,attention( window = 4 )", depth="gateskip(0.5)")
    assert (config.mixer, config.depth) == ("gla, attention(window=4)", "gateskip(budget=0.5)")
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.intermediate_size) == (32, 3, 2, 40)
    assert config.tie_word_embeddings
    assert not GateworkConfig(tie_word_embeddings=False).tie_embeddings
    assert GateworkConfig(hidden_size=48).d_model == 48
    assert GateworkConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mixer": "gla, attentoin"}, "no mixer 'attentoin'; did you mean 'attention'"),
        ({"feedforward": "moe(expert=4)"}, "moe has no argument 'expert'; did you mean 'experts'"),
        ({"depth": "gla"}, "'gla' is a mixer, not a depth"),
    ],
)
def test_unknown_parts_meet_the_registry(settings, message):
    with pytest.raises(PartError, match=message):
        GateworkConfig(**settings)


def test_outputs_are_those_of_the_decoder(make):
    model, x = make(mixer="gla, attention"), tokens()
    expected = model.model(x)
    assert torch.equal(model(x).logits, expected)
    assert torch.equal(model(x, return_dict=False)[0], expected)
    assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(x)).logits, expected)
    mask = torch.ones_like(x)
    assert torch.equal(model(x, attention_mask=mask).logits, expected)
    for keep, places in ((3, slice(-3, None)), (torch.tensor([0, 5]), [0, 5])):
        torch.testing.assert_close(model(x, logits_to_keep=keep).logits, expected[:, places], rtol=0, atol=1e-12)
    mask[0, :4] = 0
    torch.testing.assert_close(model(x, attention_mask=mask).logits[0, 4:], model.model(x[:1, 4:])[0], rtol=0, atol=1e-10)
    assert model(x).past_key_values is None


def test_position_ids_that_start_again_keep_packed_documents_apart(make):
    model, x = make(mixer="gla, attention"), tokens(1, 9)
    places = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    packed = model(x, position_ids=places).logits
    torch.testing.assert_close(packed[:, 4:], model.model(x[:, 4:]), rtol=0, atol=1e-10)
    torch.testing.assert_close(model(x, position_ids=torch.arange(9)[None]).logits, model.model(x), rtol=0, atol=1e-10)


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, items: int | None = None) -> torch.Tensor:
    picked = [
        -logits[row, t].float().log_softmax(-1)[labels[row, t + 1]]
        for row in range(len(labels)) for t in range(labels.shape[1] - 1) if labels[row, t + 1] != -100
    ]
    return torch.stack(picked).sum() / (items or len(picked))


def test_the_loss_is_the_shifted_cross_entropy_and_in_training_the_parts_losses(make):
    model, x = make(feedforward="moe(experts=4)"), tokens()
    labels = x.clone()
    labels[0, :5] = -100
    torch.testing.assert_close(model(x, labels=labels).loss, cross_entropy(model.model(x), labels))
    model.train()
    logits = model.model(x)
    extra = sum(losses(model).values()).float()
    assert extra > 0
    torch.testing.assert_close(model(x, labels=labels).loss, cross_entropy(logits, labels) + extra)
    assert not losses(model), "the losses are handed out once"
    # Two batches of unequal size, accumulated: both terms are weighed by the share of the 30 items.
    here = int((labels[:, 1:] != -100).sum())
    expected = cross_entropy(logits, labels, 30) + extra * here / 30
    torch.testing.assert_close(model(x, labels=labels, num_items_in_batch=30).loss, expected)
    torch.testing.assert_close(model(x, labels=labels, num_items_in_batch=torch.tensor(30)).loss, expected)


def test_training_by_the_loss_reaches_routers_and_gates(make):
    model, x = make(feedforward="moe(experts=4, gate=topk(k=1))", depth="gateskip").train(), tokens()
    model(x, labels=x).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


CHECKPOINTED = {
    "attention": {},
    "routing": {
        "feedforward": "moe(experts=4, gate=topk(jitter=0.1, balance=[switch, z_loss, loss_free])), moe(gate=noisy_topk)",
        "mixer": "gla",
    },
    "gateskip": {
        "depth": "gateskip(budget=0.5, warmup=0)", "mixer": "gated_attention", "feedforward": "moe(gate=topk(balance=loss_free))",
    },
    "versatile": {"feedforward": "versatile_ffn(experts=4)", "depth": "gateskip(budget=0.7, warmup=0)"},
    "recursive": {"depth": "recursive(loops=2, rank=2)", "mixer": "gla"},
}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")  # Its new name is not in 5.0.
@pytest.mark.parametrize("settings", CHECKPOINTED.values(), ids=CHECKPOINTED)
def test_gradient_checkpointing_changes_nothing_but_memory(make, settings):
    x = tokens(3, 17)
    mask = torch.ones_like(x)
    mask[0, :5] = 0
    found = {}
    for how in ("plain", "plain again", {}, {"use_reentrant": False}, {"use_reentrant": True}):
        model = make(**settings).train()
        if isinstance(how, dict):
            model.gradient_checkpointing_enable(how or None)
            assert model.model.depth.gradient_checkpointing
        saved: list[int] = []

        def keep(tensor: torch.Tensor, saved: list[int] = saved) -> torch.Tensor:
            saved.append(tensor.numel() * tensor.element_size())
            return tensor

        torch.manual_seed(2)
        for _ in range(2):
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                loss = model(x, attention_mask=mask, labels=x).loss
            loss.backward()
            assert not losses(model)
        advance(model, 1, 10)
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        found[str(how)] = (loss.detach(), gradients, dict(model.named_buffers()), sum(saved))
    loss, gradients, buffers, whole = found["plain"]
    assert found["plain again"][3] == whole
    for how, (other_loss, other_gradients, other_buffers, kept) in found.items():
        torch.testing.assert_close(other_loss, loss, rtol=0, atol=0)
        torch.testing.assert_close(other_gradients, gradients, rtol=1e-12, atol=1e-14)
        # Tables, balance biases and counts: each token once.
        torch.testing.assert_close(other_buffers, buffers, rtol=0, atol=0, equal_nan=True)
        assert "plain" in how or kept < whole / 4
    if settings is CHECKPOINTED["routing"]:
        assert any(name.endswith("loss_free.bias") and tensor.abs().sum() > 0 for name, tensor in buffers.items())
    if settings is CHECKPOINTED["gateskip"]:
        assert buffers["model.depth.passes"] == 2


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_.*able` is deprecated:FutureWarning")
def test_gradient_checkpointing_is_for_training_without_a_cache(make):
    model, x = make(), tokens()
    model.gradient_checkpointing_enable()
    assert model(x, use_cache=True).past_key_values is not None
    model.train()
    assert model(x, use_cache=True).past_key_values is None
    state = model.new_cache(2)
    assert model(x, past_key_values=state).past_key_values is state
    model.gradient_checkpointing_disable()
    assert not model.model.depth.gradient_checkpointing


def test_vocabulary_is_resized(make):
    for tied in (True, False):
        model, x = make(torch.float32, tie_embeddings=tied), tokens()
        before = model(x).logits
        model.resize_token_embeddings(1000, mean_resizing=False)
        after = model(x).logits
        assert after.shape[-1] == model.config.vocab_size == 1000
        torch.testing.assert_close(after[..., :31], before)
        assert (model.model.head.weight is model.model.embedding.weight) == tied
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            assert layer.weight.shape == (1000, 16)
            torch.testing.assert_close(layer.weight[31:].std(), torch.tensor(0.25), rtol=0.05, atol=0)


def test_wrong_inputs_meet_one_sentence(make):
    model, x = make(), tokens()
    for arguments in ({}, {"input_ids": x, "inputs_embeds": torch.zeros(2, 11, 16)}):
        with pytest.raises(GateworkError, match="give either input_ids or inputs_embeds"):
            model(**arguments)
    for shape in ((2, 1, 11, 11), (2, 10)):
        with pytest.raises(GateworkError, match="attention_mask has a number for each token, not the shape"):
            model(x, attention_mask=torch.ones(shape))


@pytest.mark.compile
def test_compiled_forward_equals_eager(make):
    model, x = make(torch.float32, layers=1), tokens()
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(x).logits, model(x).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.compile
def test_one_graph_with_padding_and_in_training(make):
    model, x = make(torch.float32, mixer="gla, gated_attention(window=4)", feedforward="glu, mlp"), tokens()
    mask = torch.ones_like(x)
    mask[0, :4] = 0
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")  # The graphs, without generating code for them.
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, attention_mask=mask).logits, model(x, attention_mask=mask).logits)
    model.train()
    found = []
    for run in (model, compiled):
        model.zero_grad()
        loss = run(x, labels=x).loss
        loss.backward()
        found.append([loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


def test_models_import_no_transformers_and_name_the_extra():
    hide = "import sys\nsys.modules['transformers'] = None\n"
    code = "import gatework, gatework.models\nassert 'transformers' not in {m for m in sys.modules if sys.modules[m]}\n"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", hide + code + "gatework.models.GateworkConfig"], capture_output=True, text=True
    )
    message = 'ModuleNotFoundError: gatework.models.huggingface needs transformers: pip install "gatework[hf]"'
    assert done.stderr.splitlines()[-1] == message


def test_a_name_that_does_not_exist_is_said():
    import gatework.models

    with pytest.raises(AttributeError, match=r"module 'gatework\.models' has no attribute 'nothing'"):
        gatework.models.nothing  # noqa: B018
