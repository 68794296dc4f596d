import pytest
import torch

from blockdiff import device
from blockdiff.attention.masks import dense_mask
from blockdiff.errors import InputError
from blockdiff.layout import BlockLayout

CPU = torch.device("cpu")
LAYOUTS = [
    BlockLayout(6, 1),
    BlockLayout(6, 2),
    BlockLayout(6, 3),
    BlockLayout(6, 6),
    BlockLayout(1, 1),
    BlockLayout(12, 4),
    BlockLayout(12, 3, window=3),
    BlockLayout(12, 3, window=6),
    BlockLayout(12, 2, window=8),
    BlockLayout(8, 1, window=3),
    BlockLayout(8, 2, window=16),
    BlockLayout(12, 4, clean="causal"),
    BlockLayout(12, 12, clean="causal"),
    BlockLayout(12, 4, inside="causal"),
    BlockLayout(12, 4, clean="causal", inside="causal", window=8),
    BlockLayout(12, 4, sliding=3),
    BlockLayout(12, 3, clean="causal", sliding=5),
    BlockLayout(12, 1, sliding=1),
    BlockLayout(12, 6, window=6, clean="causal", inside="causal", sliding=4),
    BlockLayout(10, 4, offset=2),
    BlockLayout(11, 3, window=6, clean="causal", offset=1),
]
EVERY = pytest.mark.parametrize("layout", LAYOUTS, ids=str)


def paper_mask(layout):
    """The paper's mask by double loop over x_0 ⊕ x_t, with the window as a number of tokens."""
    length, size = layout.length, layout.block_size
    mask = torch.zeros(2 * length, 2 * length, dtype=torch.bool)
    for i in range(2 * length):
        for j in range(2 * length):
            noised_query, noised_key = i >= length, j >= length
            query, key = ((x % length + layout.offset) // size for x in (i, j))
            # A window of W tokens: the query's block and the W − L' tokens before it.
            if layout.window is not None and (query - key) * size > layout.window - size:
                continue
            if layout.sliding is not None and i % length - j % length >= layout.sliding:
                continue
            later = i % length < j % length
            block_diagonal = noised_query and noised_key and query == key
            block_diagonal = block_diagonal and not (later and layout.inside == "causal")
            offset_block_causal = noised_query and not noised_key and query > key
            block_causal = not noised_query and not noised_key and query >= key
            block_causal = block_causal and not (later and layout.clean == "causal")
            mask[i, j] = block_diagonal or offset_block_causal or block_causal
    return mask


@EVERY
def test_whole_mask_is_the_papers(layout):
    assert torch.equal(dense_mask(layout, "two_stream", CPU), paper_mask(layout))


@EVERY
def test_parts_are_cut_from_the_whole(layout):
    whole, length = paper_mask(layout), layout.length
    assert torch.equal(dense_mask(layout, "clean", CPU), whole[:length, :length])
    assert torch.equal(dense_mask(layout, "noised", CPU), whole[length:])
    assert torch.equal(dense_mask(layout, "alone", CPU), whole[length:, length:])


@EVERY
def test_predicates_are_the_quarters_of_the_whole(layout):
    whole, length = paper_mask(layout), layout.length
    query, key = torch.arange(length)[:, None], torch.arange(length)[None]
    assert torch.equal(layout.m_bc(query, key), whole[:length, :length])
    assert torch.equal(layout.m_obc(query, key), whole[length:, :length])
    assert torch.equal(layout.m_bd(query, key), whole[length:, length:])


def test_special_cases():
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    assert torch.equal(dense_mask(BlockLayout(5, 1), "clean", CPU), causal)
    assert dense_mask(BlockLayout(5, 5), "clean", CPU).all()
    assert not dense_mask(BlockLayout(5, 5), "noised", CPU)[:, :5].any()


@pytest.mark.parametrize(
    ("length", "block_size", "window"),
    [(10, 4, None), (4, 8, None), (0, 1, None), (4, 0, None), (-4, 2, None), (4, -2, None),
     (8, 2, 3), (8, 2, 0), (8, 2, -2), (8, 4, 2)],
)  # fmt: skip
def test_sizes_that_do_not_fit(length, block_size, window):
    with pytest.raises(InputError):
        BlockLayout(length, block_size, window)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"clean": "token"}, "`clean` 'token' is unknown; choose one of block, causal"),
     ({"inside": "block"}, "`inside` 'block' is unknown; choose one of bidirectional, causal"),
     ({"sliding": 0}, "`sliding` is 0; it must be at least 1"),
     ({"sliding": 2.5}, "`sliding` is 2.5; it must be a whole number")],
)  # fmt: skip
def test_conventions_that_are_none(wrong, message):
    with pytest.raises(InputError, match=message):
        BlockLayout(8, 2, **wrong)


def test_a_causal_clean_stream_is_the_same_for_every_block_size():
    masks = [dense_mask(BlockLayout(12, n, clean="causal"), "clean", CPU) for n in (1, 2, 4, 12)]
    assert all(torch.equal(mask, masks[0]) for mask in masks)


def test_message_names_a_divisor():
    with pytest.raises(InputError, match="for example 5"):
        BlockLayout(10, 4)


def test_layout_is_a_value():
    assert BlockLayout(8, 2) == BlockLayout(8, 2) != BlockLayout(8, 2, 8)
    assert len({BlockLayout(8, 2), BlockLayout(8, 2), BlockLayout(8, 4)}) == 2
    conventions = {"clean": "causal", "inside": "causal", "sliding": 4}
    others = [BlockLayout(8, 2, **{name: value}) for name, value in conventions.items()]
    assert len({BlockLayout(8, 2), *others}) == 4
    first = dense_mask(BlockLayout(8, 2), "clean", CPU)
    assert dense_mask(BlockLayout(8, 2), "clean", CPU) is first, "masks are cached by layout"
    with pytest.raises(AttributeError):
        BlockLayout(8, 2).length = 4
    assert BlockLayout(8, 2).blocks == 4 and BlockLayout(6, 4, offset=2).blocks == 2


def test_cached_tensors_are_bounded_in_bytes(monkeypatch):
    """However many lengths there are; what was used last stays, however large."""
    monkeypatch.setattr(device, "KEPT_BYTES", 1000)
    made = []

    @device.cached
    def zeros(size):
        made.append(size)
        return [torch.zeros(size, dtype=torch.uint8)]

    with torch.inference_mode():
        assert not zeros(400)[0].is_inference()
    zeros(500)
    assert zeros(400) is zeros(400) and made == [400, 500]
    zeros(300)  # 500 was used the longest ago
    zeros(400)
    assert made == [400, 500, 300]
    zeros(5000)
    assert zeros(5000) is zeros(5000)
    zeros(300)
    assert made == [400, 500, 300, 5000, 300]
    zeros.cache_clear()
    zeros(300)
    assert made[-2:] == [300, 300]
