"""`recipes/testbed/table.py` compares methods question by question."""


def test_methods_are_compared_on_shared_questions(monkeypatch):
    from recipes.testbed import table as testbed_table

    def answers(label: str, *scores: float) -> list[dict]:
        return [
            {"picture": f"p{n // 2}", "question": f"q{n}", "scores": {label: score}}
            for n, score in enumerate(scores)
        ]

    known = answers("norm 0.25", 1, 0, 0, 0, 0, 0)
    more = answers("own 0.25", 1, 1, 0, 1)
    *_, norm, own = testbed_table.paired([known, more], "norm").splitlines()
    assert norm == "| `norm 0.25` | 25.0 |  |"
    assert own.startswith("| `own 0.25` | 75.0 | +50.0 (")
    other = testbed_table.paired([known, answers("own 0.11", 1, 1)], "norm")
    assert other.splitlines()[-1] == "| `own 0.11` | 100.0 |  |"
