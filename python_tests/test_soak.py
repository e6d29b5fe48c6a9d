"""A slice of scripts/soak.py."""

import mlx.core as mx
import mlx_quantized_sdpa as qs
import pytest
import soak


@pytest.fixture(autouse=True)
def switched_on():
    with qs.enabled():
        yield


@pytest.mark.parametrize("life", soak.LIVES, ids=lambda life: life.__name__)
def test_lives(life):
    done = soak.run(1800, every=600, lives=(life,), check_every=10)
    assert done.checks >= 160
    if life is soak.Paged:
        assert done.refused > 0


def test_a_wrong_token_is_noticed(tmp_path):
    life = soak.Growing(0, tmp_path)
    for _ in range(30):
        life.step()
    life.check()
    q, out, rows, count = life.newest
    rows[0][7] = (rows[0][7] + 1) % soak.TOKENS
    with pytest.raises(AssertionError, match="off by"):
        life.check()


def test_memory_that_grows_is_noticed(tmp_path):
    kept = []

    class Leaking(soak.Growing):
        def idle(self):
            super().idle()
            kept.append(mx.zeros((1,), mx.int32))
            mx.eval(kept)

    with soak.exact_memory():
        run = soak.Soak(tmp_path, 10, lives=(Leaking,))
        run.turn()
        with pytest.raises(AssertionError, match="bytes more are in use"):
            run.turn()
