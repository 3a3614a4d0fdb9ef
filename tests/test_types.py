import numpy as np
import pytest

from detkit.types import Detections, Record


def record(*boxes: tuple[float, float, float, float], labels: int | None = None) -> Record:
    count = len(boxes) if labels is None else labels
    return Record(
        "a.jpg", (10, 20), np.array(boxes).reshape(-1, 4), np.zeros(count, np.int64), np.zeros(count, np.uint8)
    )


def test_a_record_may_be_empty_or_filled_to_the_edge() -> None:
    assert len(record().labels) == 0
    assert record((0, 0, 20, 10)).boxes.tolist() == [[0, 0, 20, 10]]


@pytest.mark.parametrize(
    "box", [(5, 5, 5, 8), (8, 5, 5, 8), (-1, 0, 5, 5), (0, 0, 21, 5), (0, 0, 5, 10.01), (0, 0, float("nan"), 5)]
)
def test_a_record_has_no_box_that_is_empty_inverted_or_outside(box: tuple[float, float, float, float]) -> None:
    with pytest.raises(ValueError, match=r"a\.jpg"):
        record((0, 0, 20, 10), box)


def test_a_records_columns_have_one_length() -> None:
    with pytest.raises(ValueError, match="2 labels"):
        record((0, 0, 5, 5), labels=2)


def test_detections_above_a_score() -> None:
    scores = np.array([0.9, 0.5, 0.2], np.float32)
    found = Detections(np.arange(12, dtype=np.float32).reshape(3, 4), scores, np.array([2, 1, 0]), (10, 20))
    best = found.above(0.5)
    assert len(found) == 3
    assert len(best) == 2
    assert best.labels.tolist() == [2, 1]
    assert best.boxes.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(ValueError, match="3 scores"):
        Detections(found.boxes[:2], scores, found.labels, (10, 20))
