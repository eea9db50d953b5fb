"""No configuration is left out of the tests."""

from tests.configs.two_steps import EXAMPLES


def test_every_benchmark_with_configurations_has_a_test() -> None:
    benchmarks = {path.parent.name for path in EXAMPLES.rglob("*.yaml")} - {"multidigits"}
    tested = {
        path.stem.removeprefix("test_")
        for path in (EXAMPLES.parent / "tests/configs").glob("test_*.py")
    }
    assert benchmarks <= tested - {"all"}
