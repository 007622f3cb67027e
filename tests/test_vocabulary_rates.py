"""The learning rate of new embeddings: exactly that of an optimizer with the rate, for these rows alone."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from xlfa.errors import XLFAError
from xlfa.training import main
from xlfa.vocabulary.rates import new_piece_rows, scale_row_steps

ROWS = slice(5, 7)
OPTIMIZERS = {
    "adamw": lambda parameters, rate: torch.optim.AdamW(parameters, lr=rate, weight_decay=0.1),
    "adam": lambda parameters, rate: torch.optim.Adam(parameters, lr=rate),
    "sgd": lambda parameters, rate: torch.optim.SGD(parameters, lr=rate, momentum=0.9),
}


def train(create, rate, ratio=None, steps=5):
    """Embeddings after some steps with a falling rate."""
    torch.manual_seed(0)
    embedding = torch.nn.Embedding(7, 4)
    optimizer = create(embedding.parameters(), rate)
    if ratio is not None:
        scale_row_steps(optimizer, embedding.weight, ROWS, ratio)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, steps)
    # A gradient that does not depend on the rows' values: the states of both rates see the same.
    factors = torch.randn(steps, 7, 4)
    for step in range(steps):
        (embedding.weight * factors[step]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return embedding.weight.detach()


@pytest.mark.parametrize("create", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_rows_move_as_with_their_own_rate_and_others_as_without(create):
    plain, fast, scaled = train(create, 0.01), train(create, 0.05), train(create, 0.01, ratio=5)
    torch.testing.assert_close(scaled[ROWS], fast[ROWS], rtol=1e-5, atol=1e-6)
    assert torch.equal(scaled[: ROWS.start], plain[: ROWS.start])
    assert not torch.allclose(scaled[ROWS], plain[ROWS])


def test_removed_hooks_do_nothing():
    embedding = torch.nn.Embedding(7, 4)
    optimizer = torch.optim.SGD(embedding.parameters(), lr=1.0)
    for handle in scale_row_steps(optimizer, embedding.weight, ROWS, 10):
        handle.remove()
    before = embedding.weight.detach().clone()
    embedding.weight.sum().backward()
    optimizer.step()
    torch.testing.assert_close(embedding.weight.detach(), before - 1)


def test_frozen_embeddings_are_refused():
    layer, embedding = torch.nn.Linear(2, 2), torch.nn.Embedding(7, 4)
    with pytest.raises(XLFAError, match="not trained as one parameter"):
        scale_row_steps(torch.optim.SGD(layer.parameters(), lr=1.0), embedding.weight, ROWS, 2)


def test_the_rows_are_those_of_the_record(tmp_path):
    (tmp_path / "new_pieces.json").write_text(json.dumps({"first_id": 10, "pieces": ["a", "b"]}))
    assert new_piece_rows(str(tmp_path)) == slice(10, 12)


def test_an_encoder_without_new_pieces_is_refused(tmp_path):
    with pytest.raises(XLFAError, match="has no new_pieces.json"):
        new_piece_rows(str(tmp_path))


def embeddings_after_a_step(encoder, output, *flags):
    common = ["--model", encoder, "--task", "xnli", "--data_root", "sample", "--output_dir", str(output), "--seed", "3"]
    small = ["--max_train_examples", "48", "--max_eval_examples", "9", "--max_steps", "1", "--save_strategy", "no"]
    main([*common, *small, "--learning_rate", "1e-3", *flags])
    return load_file(output / "model.safetensors")["xlfa.encoder.embeddings.word_embeddings.weight"]


def test_training_gives_new_pieces_their_rate(tiny_encoder, tmp_path):
    encoder = tmp_path / "augmented"
    shutil.copytree(tiny_encoder, encoder)
    # The letters g, h, i.
    (encoder / "new_pieces.json").write_text(json.dumps({"first_id": 10, "pieces": ["g", "h", "i"]}))
    before = load_file(encoder / "model.safetensors")["embeddings.word_embeddings.weight"]
    plain = embeddings_after_a_step(str(encoder), tmp_path / "plain")
    fast = embeddings_after_a_step(str(encoder), tmp_path / "fast", "--new_pieces_learning_rate", "1e-2")
    torch.testing.assert_close((fast - before)[10:13], 10 * (plain - before)[10:13], rtol=1e-3, atol=1e-5)
    assert (plain - before)[10:13].abs().max() > 0
    others = [*range(10), *range(13, len(before))]
    assert torch.equal(fast[others], plain[others])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--new_pieces_learning_rate", "0"], "--new_pieces_learning_rate 0.0: above 0"),
        (["--new_pieces_learning_rate", "1", "--freeze_layers", "1"], "word embeddings are not trained with --peft"),
        (["--new_pieces_learning_rate", "1"], "has no new_pieces.json"),
    ],
)
def test_a_rate_that_cannot_apply_is_refused(tiny_encoder, tmp_path, flags, message):
    with pytest.raises(XLFAError) as error:
        embeddings_after_a_step(tiny_encoder, tmp_path / "run", *flags)
    assert message in str(error.value)
