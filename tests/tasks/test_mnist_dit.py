"""Drawing digits: the sampler's arithmetic by hand, the data, and the pretrained network's figure."""

import pytest
import torch

from secateur import SecateurError
from secateur.data.mnist import load_mnist
from secateur.tasks.mnist_dit import flow_loss, sampler, step
from secateur.tasks.networks.mnist_dit import MnistDit
from secateur.utils.files import data_dir

needs_data = pytest.mark.skipif(
    data_dir() is None or not (data_dir() / "mnist").is_dir(), reason="SECATEUR_DATA has no MNIST"
)


def predicts(x, t, y):
    """1 for a class, 0 for none."""
    return (y >= 0).float()[:, None, None, None].expand_as(x)


@pytest.mark.parametrize(
    ("number", "wanted"), [(10, 1.0), (15, 1.0), (20, 2.0), (30, 2.0), (35, 1.0), (49, 1.0)]
)
def test_a_step_goes_to_what_is_predicted_and_is_guided_in_the_middle(number, wanted):
    """x + (x1 - x) / (1 - t) / 50 with t = number / 50; between 0.3 and 0.7, both ends out, x1 = 2 * 1 - 1 * 0."""
    x = torch.full((2, 1, 28, 28), 0.25)
    after = step(predicts, x, number, torch.tensor([3, 7]))
    assert after.flatten()[0].item() == pytest.approx(
        0.25 + (wanted - 0.25) / (1 - number / 50) / 50, rel=1e-5
    )


def test_the_last_step_ends_at_the_prediction():
    x = torch.randn(2, 1, 28, 28)
    torch.testing.assert_close(step(predicts, x, 9, torch.tensor([1, 2]), steps=10), torch.ones_like(x))


def test_noise_is_a_function_of_the_seed_and_digits_come_in_turn():
    (one, digits), (same, _), (other, _) = (sampler().start(12, seed) for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert digits.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]


def test_the_flow_can_be_learned():
    torch.manual_seed(0)
    model, batch = MnistDit(), (torch.rand(8, 1, 28, 28), torch.arange(8))
    flow_loss(model, batch).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


@needs_data
def test_the_data_and_its_splits():
    (x, y), (tx, _) = load_mnist("train", 50), load_mnist("test")
    assert x.shape == (50, 1, 28, 28) and 0 <= x.min() and x.max() == 1 and y[:5].tolist() == [7, 2, 1, 0, 4]
    assert len(tx) == 1000
    with pytest.raises(SecateurError, match="no split"):
        load_mnist("dev")


@needs_data
def test_a_file_that_is_cut_short_is_refused(tmp_path, monkeypatch):
    import gzip

    (tmp_path / "mnist").mkdir()
    for name in ("images-idx3-ubyte.gz", "labels-idx1-ubyte.gz"):
        content = gzip.decompress((data_dir() / "mnist" / name).read_bytes())
        (tmp_path / "mnist" / name).write_bytes(gzip.compress(content[:1000]))
    monkeypatch.setenv("SECATEUR_DATA", str(tmp_path))
    with pytest.raises(SecateurError, match="cut short"):
        load_mnist("train", 5)
