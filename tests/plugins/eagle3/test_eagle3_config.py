from __future__ import annotations

import pytest

from specforge.errors import UsageError
from specforge.verifier.features import check_aux_layers
from specforge_eagle3.config import default_aux_layers


@pytest.mark.parametrize("number", [7, 8, 9, 12, 27, 80])
def test_default_layers(number: int) -> None:
    assert default_aux_layers(number) == [2, number // 2, number - 3]
    check_aux_layers(default_aux_layers(number), number)


@pytest.mark.parametrize("number", [3, 4, 5, 6])
def test_too_few_layers_for_the_default_are_refused_with_an_example_that_works(number: int) -> None:
    with pytest.raises(UsageError, match=f"has {number} decoder layers") as caught:
        default_aux_layers(number)
    example = str(caught.value).rpartition("[")[2].rstrip("]")
    check_aux_layers([int(word) for word in example.split(",")], number)
