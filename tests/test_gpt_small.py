"""The small GPT: its text, its tokenizer, its metric and its training loop."""

import math

import pytest
import torch
import torch.nn.functional as F
from graphwright.ir.errors import DataError
from graphwright.tools import zoo
from graphwright.tools.zoo import manuals, train, train_gpt
from graphwright.tools.zoo.gpt import CONTEXT, VOCABULARY, GPTSmall
from graphwright.tools.zoo.weights_file import load_weights


def test_a_document_lies_on_one_side_and_most_train():
    sides = [manuals.side_of(f"python3-doc/library/{index}.rst.txt") for index in range(3000)]
    assert 60 < sides.count("calibration") < 130 and 60 < sides.count("test") < 130
    assert not set(manuals.documents("calibration")) & set(manuals.documents("test"))


def test_windows_are_whole_sorted_and_start_where_the_one_before_ends():
    windows = manuals.held_out_windows("test")
    assert windows.shape[1] == CONTEXT + 1 and windows.min() >= 0 and windows.max() < VOCABULARY
    assert len(windows) >= manuals.EVALUATION_WINDOWS
    (ids,) = manuals.encode([manuals.documents("test")[0]])
    known = {tuple(window.tolist()) for window in windows}
    assert tuple(ids[: CONTEXT + 1]) in known and tuple(ids[CONTEXT : 2 * CONTEXT + 1]) in known


def test_labels_are_the_following_tokens_and_calibration_holds_none_of_the_test_windows():
    data = manuals.Manuals()
    ((inputs,), labels) = next(iter(data.evaluation(3)))
    assert inputs.shape == labels.shape == (3, CONTEXT)
    assert torch.equal(inputs[:, 1:], labels[:, :-1])
    calibration = {tuple(row.tolist()) for (batch,) in data.calibration(500) for row in batch}
    assert not calibration & {tuple(row.tolist()) for (batch,), _ in data.evaluation(None) for row in batch}


def test_text_survives_the_tokenizer():
    text = "def naïve(x):\n\treturn  x  # déjà vu ✓\n"
    (ids,) = manuals.encode([text])
    tokenizer = manuals.load_tokenizer()
    assert tokenizer.get_vocab_size() == VOCABULARY
    assert ids[0] == tokenizer.token_to_id(manuals.BOUNDARY) == 0
    assert tokenizer.decode(ids[1:]) == text


def test_the_tokenizer_trains_alike_twice(tmp_path):
    texts = manuals.documents("calibration")
    for name in ("a", "b"):
        manuals.train_tokenizer(texts, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_pod_parts_leave_the_code():
    module = "package X;\n=head1 NAME\n\nX - does x\n\n=cut\n\nsub f { 1 }\n=pod\n\nThe end.\n"
    assert manuals.pod_parts(module) == "=head1 NAME\n\nX - does x\n\n\n=pod\n\nThe end.\n"


def test_a_missing_package_is_named():
    absent = manuals.Source("surely-absent-doc", "/usr/share/doc/surely-absent", "*.txt")
    with pytest.raises(DataError, match="apt-get install surely-absent-doc"):
        manuals.documents("test", (absent,))


def test_no_token_sees_a_later_one():
    torch.manual_seed(0)
    model = GPTSmall().eval()
    ids = torch.randint(VOCABULARY, (1, 40))
    changed = ids.clone()
    changed[0, 25:] = (ids[0, 25:] + 1) % VOCABULARY
    with torch.inference_mode():
        before, after = model(ids), model(changed)
    torch.testing.assert_close(before[:, :25], after[:, :25], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before[:, 25:], after[:, 25:], atol=1e-2)


def test_the_metric_is_the_mean_log_likelihood_of_all_tokens():
    reference = zoo.load("gpt-small")
    assert reference.metric_name == "log-likelihood"
    generator = torch.Generator().manual_seed(0)
    batches = list(reference.evaluation(40))
    logits = [torch.randn(*labels.shape, VOCABULARY, generator=generator) for _, labels in batches]
    queue = list(logits)
    score = reference.evaluate(lambda inputs: queue.pop(0), 40)
    labels = torch.cat([labels for _, labels in batches])
    assert score == pytest.approx(-F.cross_entropy(torch.cat(logits).flatten(0, 1), labels.flatten()).item(), abs=1e-5)
    uniform = reference.evaluate(lambda inputs: torch.zeros(*inputs[0].shape, VOCABULARY), 40)
    assert zoo.perplexity(uniform) == pytest.approx(VOCABULARY, rel=1e-5)
    with pytest.raises(DataError, match=r"shape \(8, 1024\) for 8 samples of gpt-small, expected \(8, 256, outputs\)"):
        reference.evaluate(lambda inputs: torch.zeros(8, VOCABULARY), 8)


def test_stored_weights_reach_the_stated_perplexity():
    reference = zoo.load("gpt-small")
    with torch.inference_mode():
        score = reference.evaluate(lambda inputs: reference.model(*inputs), 64)
        windows = manuals.held_out_windows("test")[:64]
        assert score == pytest.approx(train_gpt.log_likelihood(reference.model, windows), abs=1e-4)
    assert zoo.perplexity(score) < 8.272  # measured 8.190


def test_training_repeats_learns_and_stores_loadable_weights(tmp_path, monkeypatch, capsys):
    windows = manuals.held_out_windows("calibration")[:4]
    monkeypatch.setattr(manuals, "documents", lambda side: ["one two three four five six seven eight nine ten " * 40])
    monkeypatch.setattr(manuals, "held_out_windows", lambda side: windows)
    monkeypatch.setattr(train_gpt, "_BATCH", 2)
    written = []
    for run in range(2):
        output = tmp_path / f"{run}.safetensors"
        train.main(["gpt-small", "--device", "cpu", "--epochs", "1", "--steps", "2", "--output", str(output)])
        written.append(output.read_bytes())
    assert written[0] == written[1]
    assert "gpt-small stored float16 weights: perplexity held-out" in capsys.readouterr().out
    load_weights(GPTSmall(), tmp_path / "0.safetensors")

    tokens = torch.tensor([token for ids in manuals.encode(manuals.documents("training")) for token in ids])
    held_out = tokens.unfold(0, CONTEXT + 1, 16)[:1]
    scores: list[float] = []
    train_gpt.train_gpt(tokens, held_out, lambda model: scores.append(train_gpt.log_likelihood(model, held_out)), 4, 2)
    assert scores == sorted(scores) and scores[-1] > scores[0] > -math.log(VOCABULARY) - 0.1
