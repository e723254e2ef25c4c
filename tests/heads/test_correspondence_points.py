import itertools

import numpy as np
import pytest
import torch
from torch.nn import functional

from featstore.heads.correspondence_points import Grid, at_points
from featstore.heads.gather import gather

SHAPES = {"coarse": (5, 2, 3), "fine": (4, 6, 9), "odd": (3, 5, 4)}


def layers(seed=0, offset=0.0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(*shape, generator=generator) + offset for name, shape in SHAPES.items()}


def upsampled(maps, size):
    """Everything at the grid's size: what the head never makes."""
    parts = [functional.interpolate(m[None], size, mode="bilinear", align_corners=False)[0] for m in maps.values()]
    return torch.cat(parts)


@pytest.mark.parametrize("size", [(6, 9), (12, 18), (7, 5), (1, 1), (3, 4)])
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_cosines_are_those_of_upsampled_maps(size, offset):
    maps = layers(offset=offset)
    vectors = torch.randn(11, 12, generator=torch.Generator().manual_seed(1)) + offset
    whole = upsampled(maps, size)
    wanted = functional.cosine_similarity(vectors[:, :, None, None], whole[None], dim=1)
    torch.testing.assert_close(Grid(maps, size).cosines(vectors), wanted, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("size", [(12, 18), (7, 5)])
def test_the_nearest_position_is_that_of_a_search_of_everything(size):
    maps = layers()
    vectors = torch.randn(40, 12, generator=torch.Generator().manual_seed(2))
    xy, cosines = Grid(maps, size).nearest(vectors)
    whole = upsampled(maps, size)
    for number, vector in enumerate(vectors):
        best, place = -2.0, None
        for y, x in itertools.product(range(size[0]), range(size[1])):
            here = float(torch.dot(vector, whole[:, y, x]) / (vector.norm() * whole[:, y, x].norm()))
            if here > best:
                best, place = here, ((x + 0.5) / size[1], (y + 0.5) / size[0])
        assert cosines[number] == pytest.approx(best, abs=1e-5)
        np.testing.assert_allclose(xy[number], place, atol=1e-6)


def test_vectors_are_searched_some_at_a_time(monkeypatch):
    grid, vectors = Grid(layers(), (6, 9)), torch.randn(10, 12, generator=torch.Generator().manual_seed(3))
    whole = grid.nearest(vectors)
    asked = []
    cosines = Grid.cosines
    monkeypatch.setattr(Grid, "cosines", lambda self, some: asked.append(len(some)) or cosines(self, some))
    monkeypatch.setattr("featstore.heads.correspondence_points._CHUNK_BYTES", 3 * 4 * 6 * 9)
    parts = grid.nearest(vectors)
    assert asked == [3, 3, 3, 1]
    assert torch.equal(parts[0], whole[0])
    torch.testing.assert_close(parts[1], whole[1])


def test_gradients_are_those_of_upsampled_maps():
    size = (7, 11)
    grads = []
    for way in ("grid", "upsampled"):
        maps = {name: value.requires_grad_() for name, value in layers().items()}
        vectors = torch.randn(5, 12, generator=torch.Generator().manual_seed(1), requires_grad=True)
        if way == "grid":
            found = Grid(maps, size).cosines(vectors)
        else:
            found = functional.cosine_similarity(vectors[:, :, None, None], upsampled(maps, size)[None], dim=1)
        weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(4))
        (found * weights).sum().backward()
        grads.append([vectors.grad, *(value.grad for value in maps.values())])
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


def test_vectors_at_pixel_centres_are_those_that_pixel_heads_gather():
    maps, (height, width) = layers(), (10, 13)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    y, x = y.reshape(-1), x.reshape(-1)
    xy = torch.stack([(x + 0.5) / width, (y + 0.5) / height], 1)
    wanted = torch.cat([gather(value, y, x, size=(height, width)) for value in maps.values()], 1)
    torch.testing.assert_close(at_points(maps, xy), wanted, atol=1e-5, rtol=1e-5)


def test_a_point_between_centres_and_one_on_the_border_by_hand():
    maps = {"one": torch.tensor([[[1.0, 3.0], [5.0, 7.0]]])}
    # centres lie at 0.25 and 0.75; half way between is the mean, beyond the last centre nothing changes
    xy = torch.tensor([[0.25, 0.25], [0.5, 0.25], [0.5, 0.5], [0.0, 0.0], [1.0, 1.0], [0.375, 0.25]])
    assert at_points(maps, xy)[:, 0].tolist() == pytest.approx([1, 2, 4, 1, 7, 1.5])


def test_places_lie_in_the_position_that_holds_them():
    grid = Grid({"one": torch.ones(1, 2, 2)}, (2, 4))
    xy = torch.tensor([[0.0, 0.0], [0.24, 0.49], [0.26, 0.51], [1.0, 1.0], [0.5, 0.0]])
    assert grid.positions(xy).tolist() == [0, 0, 5, 7, 2]


def test_a_vector_or_position_of_zeros_has_cosine_zero():
    maps = {"one": torch.zeros(2, 3, 3)}
    assert Grid(maps, (3, 3)).cosines(torch.tensor([[1.0, 0.0], [0.0, 0.0]])).abs().max() == 0
    assert Grid({"one": torch.ones(2, 3, 3)}, (3, 3)).cosines(torch.zeros(1, 2)).abs().max() == 0
