"""Reference models: names, weights, data splits, scores, and the errors of missing or damaged parts."""

import gzip
import subprocess
import sys

import numpy as np
import pytest
import torch
from graphwright.ir.errors import DataError, UnknownNameError
from graphwright.tools import zoo
from graphwright.tools.zoo import fashion_mnist, photographs, sentences, train
from graphwright.tools.zoo.packages import package_file
from graphwright.tools.zoo.reference import centered_correlation, similarity_spearman
from graphwright.tools.zoo.resnet import ResNet20
from graphwright.tools.zoo.weights_file import load_weights, save_weights
from scipy.stats import spearmanr

SHAPES = {
    "efficientnet-lite0": ([(1, 3, 224, 224)], (1, 1000), 4_652_008),
    "resnet20": ([(1, 1, 28, 28)], (1, 10), 272_186),
    "mobilenetv2": ([(1, 1, 28, 28)], (1, 10), 542_986),
    "vit-tiny": ([(1, 1, 28, 28)], (1, 10), 2_684_170),
    "minilm-l6": ([(1, 128), (1, 128)], (1, 384), 22_565_376),
    "gpt-small": ([(1, 256)], (1, 256, 1024), 5_328_896),
    "resnet50": ([(1, 3, 224, 224)], (1, 1000), 25_557_032),
    "resnet20-x4": ([(1, 1, 28, 28)], (1, 10), 4_326_602),
    "mobilenetv2-x4": ([(1, 1, 28, 28)], (1, 10), 8_080_906),
}
#: The first weight of ResNet-50's stem, drawn from its seed.
STEM_WEIGHT = -0.13516288995742798


@pytest.fixture(scope="module", params=list(SHAPES))
def reference(request):
    return zoo.load(request.param)


def predict(reference):
    def run(inputs):
        with torch.inference_mode():
            return reference.model(*inputs)

    return run


def test_names_are_the_documented_nine():
    assert zoo.names() == tuple(SHAPES)


def test_unknown_name_gives_the_nearest():
    with pytest.raises(UnknownNameError, match=r"unknown reference model 'mobilnetv2'; did you mean 'mobilenetv2'\?"):
        zoo.load("mobilnetv2")


def test_importing_the_zoo_touches_no_optional_package():
    code = (
        "import sys, graphwright.tools.zoo as zoo; zoo.load('resnet20');"
        "print({'torchvision', 'skimage', 'sklearn', 'PIL', 'tokenizers'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": ":".join(sys.path)})
    assert done.stdout.strip() == "set()", done.stderr


def test_shapes_parameters_and_eval_mode(reference):
    inputs, output, parameters = SHAPES[reference.name]
    assert [tuple(x.shape) for x in reference.example_inputs] == inputs
    assert tuple(predict(reference)(reference.example_inputs).shape) == output
    assert sum(p.numel() for p in reference.model.parameters()) == parameters
    assert not any(module.training for module in reference.model.modules())
    assert all(p.dtype == torch.float32 for p in reference.model.parameters())


def test_export_gives_the_same_outputs(reference):
    exported = torch.export.export(reference.model, reference.example_inputs).run_decompositions()
    torch.testing.assert_close(
        exported.module()(*reference.example_inputs), predict(reference)(reference.example_inputs), rtol=1e-4, atol=1e-4
    )


def test_calibration_labels_belong_to_the_calibration_samples():
    labels = zoo.load("resnet20").calibration_labels(40)
    assert torch.equal(labels, fashion_mnist.load_split("train")[1][55_000:55_040])
    language = zoo.load("gpt-small")
    (tokens,), following = language.calibration(3)[0], language.calibration_labels(3)
    assert torch.equal(tokens[:, 1:], following[:, :-1])
    assert zoo.load("efficientnet-lite0").calibration_labels(2) is None


def test_calibration_batches_repeat_and_a_smaller_request_is_a_prefix(reference):
    batches = reference.calibration(35)
    assert [len(batch[0]) for batch in batches] == [32, 3]
    assert all(x.dtype == y.dtype for x, y in zip(batches[0], reference.example_inputs, strict=True))
    for left, right in zip(reference.calibration(4)[0], batches[0], strict=True):
        assert torch.equal(left, right[:4])


@pytest.mark.parametrize("count", [0, -1, 100_000])
def test_impossible_counts_name_the_limits(reference, count):
    with pytest.raises(DataError, match=rf"{count} .* requested; ask for 1 to \d+"):
        reference.calibration(count)
    with pytest.raises(DataError, match=rf"{count} .* requested; ask for 1 to \d+"):
        reference.evaluate(predict(reference), count)


# Scores on the first 1,000 test images; one image may flip where another CPU rounds differently.
@pytest.mark.parametrize(("name", "score"), [("resnet20", 0.960), ("mobilenetv2", 0.966), ("vit-tiny", 0.947)])
def test_stored_weights_reach_the_stated_accuracy(name, score):
    reference = zoo.load(name)
    assert reference.metric_name == "top-1"
    assert reference.evaluate(predict(reference), 1000) >= score - 0.001


def test_top1_counts_labels_and_not_the_float_model():
    reference = zoo.load("resnet20")
    labels = torch.cat([labels for _, labels in reference.evaluation(64)])
    queue = list(labels.split(32))

    def oracle_with_one_error(inputs):
        output = torch.nn.functional.one_hot(queue.pop(0), 10).float()
        if not queue:
            output[-1] = output[-1].roll(1)
        return output

    assert reference.evaluate(oracle_with_one_error, 64) == 63 / 64


def test_agreement_counts_equal_classes_and_reuses_float_outputs():
    reference = zoo.load("efficientnet-lite0")
    assert reference.metric_name == "top-1 agreement"
    assert reference.evaluate(predict(reference), 8) == 1.0
    kept = reference._float_outputs[8]
    flipped = kept.clone()
    flipped[0] = -flipped[0]
    assert reference.evaluate(lambda inputs: flipped, 8) == 7 / 8
    assert reference._float_outputs[8] is kept


def test_spearman_matches_scipy_and_sees_damage():
    reference = zoo.load("minilm-l6")
    assert reference.metric_name == "spearman"
    assert reference.evaluate(predict(reference), 16) == pytest.approx(1.0, abs=1e-12)
    damaged = reference._float_outputs[16] + 0.05 * torch.randn(16, 384, generator=torch.Generator().manual_seed(0))
    score = reference.evaluate(lambda inputs: damaged, 16)
    assert 0.1 < score < 0.99

    rows = [torch.nn.functional.normalize(x.double(), dim=1) for x in (damaged, reference._float_outputs[16])]
    upper = np.triu_indices(16, 1)
    expected = spearmanr(*((x @ x.T).numpy()[upper] for x in rows)).statistic
    assert score == pytest.approx(expected, abs=1e-12)


def test_correlation_takes_the_shared_part_off():
    right = 10.0 + torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    left = right + 0.3 * torch.randn(5, 7, generator=torch.Generator().manual_seed(1))
    columns = [x.numpy() - x.numpy().mean(0) for x in (left, right)]
    assert centered_correlation(left, right) == pytest.approx(np.corrcoef(*(c.ravel() for c in columns))[0, 1], abs=1e-5)
    assert centered_correlation(right + 3.0, right) == pytest.approx(1.0, abs=1e-6)
    with pytest.raises(DataError, match="two samples or more"):
        centered_correlation(left[:1], right[:1])
    with pytest.raises(DataError, match="different outputs"):
        centered_correlation(torch.ones(5, 7), right)


def test_resnet50_is_the_same_in_every_process_and_keeps_its_activations_small():
    reference = zoo.load("resnet50")
    assert reference.metric_name == "logit correlation"
    assert float(reference.model.stem[0].weight[0, 0, 0, 0]) == pytest.approx(STEM_WEIGHT, abs=1e-7)
    assert reference.evaluate(predict(reference), 2) == pytest.approx(1.0, abs=1e-12)
    with torch.inference_mode():
        features = reference.model.blocks(reference.model.stem(*reference.example_inputs))
    assert 1.0 < float(features.std()) < 30.0


@pytest.mark.parametrize("name", ["resnet20-x4", "mobilenetv2-x4"])
def test_widened_networks_keep_their_activations_small(name):
    wide = zoo.load(name)
    assert wide.metric_name == "logit correlation"
    with torch.inference_mode():
        outputs = torch.cat([wide.model(*inputs) for inputs in wide.calibration(16)])
    assert 0.1 < float(outputs.std()) < 30.0


def test_spearman_shares_ranks_and_refuses_constants():
    rows = torch.eye(4)
    with pytest.raises(DataError, match="similarities are equal"):
        similarity_spearman(rows, torch.randn(4, 3))
    with pytest.raises(DataError, match="3 samples or more"):
        similarity_spearman(rows[:2], rows[:2])


@pytest.mark.parametrize(
    ("output", "message"),
    [(torch.zeros(7), r"shape \(7,\)"), (torch.zeros(3, 10), r"shape \(3, 10\)"), (torch.full((8, 10), torch.nan), "finite")],
)
def test_unusable_predictions_are_refused(output, message):
    with pytest.raises(DataError, match=message):
        zoo.load("resnet20").evaluate(lambda inputs: output, 8)


def test_fashion_mnist_slices_do_not_overlap():
    images, labels = fashion_mnist.load_split("train")
    trained, _ = fashion_mnist.training_slice()
    held, held_labels = fashion_mnist.held_out_slice()
    assert torch.equal(torch.cat([trained, held]), images)
    assert torch.equal(held_labels, labels[55_000:])
    calibration = torch.cat([batch for (batch,) in zoo.load("resnet20").calibration(40)])
    assert torch.equal(calibration, fashion_mnist.normalize(images[55_000:55_040]))


def test_photographs_do_not_overlap_and_nothing_is_upside_down():
    assert not set(photographs.CALIBRATION_PHOTOGRAPHS) & set(photographs.EVALUATION_PHOTOGRAPHS)
    cat = photographs.read_photograph("skimage", "scikit-image", "data", "chelsea.png")
    crops = torch.stack([photographs.random_crop(cat, seed) for seed in range(4)])
    assert crops.shape == (4, 3, 224, 224)
    assert -1.0 <= crops.min() < -0.3 and 0.3 < crops.max() <= 1.0
    with torch.inference_mode():
        classes = zoo.load("efficientnet-lite0").model(crops).argmax(1)
    assert set(classes.tolist()) <= {281, 282, 285}  # tabby, tiger cat, Egyptian cat


def test_sentences_do_not_overlap_and_mix_documents():
    calibration, evaluation = sentences.split_sentences()
    assert not set(calibration) & set(evaluation)
    assert len(calibration) >= 600
    ids, mask = sentences.encode(evaluation[:2])
    assert ids.shape == mask.shape == (2, 128)
    assert ids[0, 0] == 101 and (ids[mask == 0] == 0).all()


def test_efficientnet_equals_the_published_implementation():
    """Logits of `efficientnet-lite-pytorch` 0.1.0, the implementation its weights were published with (equal bits there)."""
    ramp = torch.linspace(-1, 1, 3 * 224 * 224).reshape(1, 3, 224, 224)
    with torch.inference_mode():
        logits = zoo.load("efficientnet-lite0").model(ramp)[0]
    expected = torch.tensor([0.2660010, 0.5905822, 1.7197436, 1.3839475, 1.8400276, 1.9101911])
    torch.testing.assert_close(logits[:6], expected, rtol=1e-3, atol=1e-3)
    assert logits.topk(3).indices.tolist() == [701, 437, 540]


def test_minilm_equals_the_published_implementation():
    """Embeddings of `transformers`' BertModel with mean pooling (largest difference there 1.2e-7)."""
    texts = ("A cat sits on the mat.", "A small cat is sitting on a rug.", "The compiler lowers integer convolutions.")
    with torch.inference_mode():
        embeddings = zoo.load("minilm-l6").model(*sentences.encode(texts))
    expected = torch.tensor([0.1265353, -0.0328507, -0.0290596, 0.0444070, -0.0434453])
    torch.testing.assert_close(embeddings[0, :5], expected, rtol=1e-4, atol=1e-5)
    cosines = embeddings @ embeddings.T
    assert cosines[0, 1].item() == pytest.approx(0.736191, abs=1e-4)
    assert cosines[0, 2].item() == pytest.approx(-0.041816, abs=1e-4)


def test_missing_fashion_mnist_names_the_debian_package(tmp_path):
    with pytest.raises(DataError, match="apt-get install dataset-fashion-mnist"):
        fashion_mnist.load_split("test", tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not gzip", "cannot be read"),
        (gzip.compress(bytes(100), mtime=0)[:20], "cannot be read"),
        (gzip.compress(b"\x00\x00\x0d\x01" + bytes(4), mtime=0), "not an IDX file"),
        (gzip.compress(b"\x00\x00\x08\x03" + bytes(4), mtime=0), "truncated"),
        (gzip.compress(b"\x00\x00\x08\x01\x00\x00\x00\x05" + bytes(4), mtime=0), r"states shape \(5,\)"),
    ],
)
def test_damaged_idx_files_are_named(tmp_path, content, message):
    path = tmp_path / "images.gz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        fashion_mnist.read_idx(path)


def test_missing_package_names_the_extra():
    with pytest.raises(DataError, match=r"surely-absent is not installed: run pip install 'graphwright\[zoo\]'"):
        package_file("surely_absent", "x", "surely-absent")
    with pytest.raises(DataError, match="scikit-image lacks data/no-such.png"):
        package_file("skimage", "data/no-such.png", "scikit-image")


def test_too_little_text_names_the_debian_packages(tmp_path):
    with pytest.raises(DataError, match="install the Debian packages base-files and perl"):
        sentences.split_sentences(tmp_path, tmp_path)


def test_weights_round_trip_and_refuse_strangers(tmp_path):
    path = tmp_path / "w.safetensors"
    with pytest.raises(DataError, match="missing"):
        load_weights(ResNet20(), path)
    model, copy = ResNet20(), ResNet20()
    save_weights(model, path)
    load_weights(copy, path)
    assert torch.equal(copy.conv.weight, model.conv.weight.half().float())
    with pytest.raises(DataError, match=r"classifier.* has shape \(10"):
        load_weights(ResNet20(classes=11), path)
    with pytest.raises(DataError, match="do not belong to Linear"):
        load_weights(torch.nn.Linear(2, 2), path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match="not a valid safetensors file"):
        load_weights(ResNet20(), path)
    with torch.no_grad():
        model.conv.weight[0] = 1e6
    with pytest.raises(DataError, match=r"conv\.weight .* float16 cannot represent"):
        save_weights(model, path)


def test_augmentation_keeps_shapes_and_erases_the_asked_share():
    torch.manual_seed(0)
    images = torch.full((400, 1, 28, 28), 2.0)
    kept = train.augment(images, erasing=0.0)
    assert kept.shape == images.shape
    background = -fashion_mnist.MEAN / fashion_mnist.STD
    inside = kept[:, :, 2:-2, 2:-2]
    assert (inside == 2.0).all()
    assert {round(v, 4) for v in kept.unique().tolist()} == {2.0, round(background, 4)}
    erased = (train.augment(images, erasing=0.5) == 0.0).flatten(1).any(1).float().mean()
    assert 0.4 < erased < 0.6


def test_augmentation_flips_about_half():
    torch.manual_seed(0)
    ramp = torch.linspace(1.0, 2.0, 28).expand(400, 1, 28, 28)
    middle = train.augment(ramp, erasing=0.0)[:, 0, 14]
    falling = (middle[:, 13] > middle[:, 14]).float().mean()
    assert 0.4 < falling < 0.6


def test_training_repeats_and_stores_loadable_weights(tmp_path, monkeypatch, capsys):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (600, 28, 28), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 10, (600,), generator=generator)
    monkeypatch.setattr(fashion_mnist, "training_slice", lambda root: (images[:512], labels[:512]))
    monkeypatch.setattr(fashion_mnist, "held_out_slice", lambda root: (images[512:], labels[512:]))
    monkeypatch.setattr(fashion_mnist, "load_split", lambda split, root: (images[512:], labels[512:]))
    written = []
    for run in range(2):
        output = tmp_path / f"{run}.safetensors"
        train.main(["resnet20", "--device", "cpu", "--epochs", "1", "--steps", "1", "--output", str(output)])
        written.append(output.read_bytes())
    assert written[0] == written[1]
    assert "stored float16 weights" in capsys.readouterr().out
    load_weights(ResNet20(), tmp_path / "0.safetensors")
